"The commands as people and programs use them: answers, exit codes, errors in one line, and folders as they really are"
import importlib
import inspect
import json
import os
import re
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from facelab import cli, command
from facelab.datasets import att_split
from facelab.embed import Embeddings
from facelab.gallery import Gallery

ODD = ['<img src=x onerror=alert(1)>', '../../x', '100% $HOME `id`', '李雷', "O'Neil; rm -rf"]
COMMANDS = 'crop pairs train embed enrol identify verify forget'.split()
att = att_split()[1]


def photo(person, i): return Image.open(att.path[att.person == person].iloc[i]).convert('RGB')


@pytest.fixture(scope='module')
def root(tmp_path_factory):
    "people/ with three people, new/ with a party, one of the three, a stranger and a wall; a gallery of the three"
    d = tmp_path_factory.mktemp('road')
    for s, name in (('s35', 'Ann'), ('s33', 'Bela'), ('s31', 'Chidi')):
        (d/'people'/name).mkdir(parents=True)
        for i in range(2): photo(s, i).save(d/'people'/name/f'{i}.jpg', quality=95)
    (d/'new').mkdir()
    group = Image.new('RGB', (400, 240), 'dimgrey')
    for x, (s, i) in enumerate([('s31', 6), ('s39', 0)]): group.paste(photo(s, i).resize((184, 224)), (8 + 200*x, 8))
    for image, name in ((group, 'party'), (photo('s33', 9), 'door'), (photo('s40', 0), 'stranger'), (Image.new('RGB', (200, 200), 'teal'), 'wall')): image.save(d/'new'/f'{name}.jpg', quality=95)
    (d/'bad').mkdir(); (d/'bad'/'text.jpg').write_text('Dear Sir'); (d/'empty').mkdir()
    return d


@pytest.fixture
def run(root, capsys, monkeypatch):
    "`run('crop', 'people', '--json')` in `root`: (exit code, stdout, stderr); stdout and stderr have no traceback"
    monkeypatch.chdir(root); monkeypatch.delenv('FACELAB_TRACEBACK', raising=False)
    def run(name, *args):
        monkeypatch.setattr(sys, 'argv', [f'facelab-{name}', *map(str, args)])
        try: code = getattr(cli, f'facelab_{name}')() or 0
        except SystemExit as e: code = e.code or 0
        out, err = capsys.readouterr()
        assert 'Traceback' not in out + err
        if code == 2: assert out == '' and err.startswith(f'facelab-{name}: ') and err.count('\n') == 1, err
        return code, out, err
    return run


@pytest.fixture(scope='module')
def three(root):
    "The gallery of Ann, Bela and Chidi, made by the command"
    here = os.getcwd(); os.chdir(root)
    try: cli.facelab_enrol('people', 'three.npz', consent=True)
    finally: os.chdir(here)
    return root/'three.npz'


@pytest.fixture
def gallery(three, tmp_path):
    "A copy of it"
    (tmp_path/'g.npz').write_bytes(three.read_bytes())
    return tmp_path/'g.npz'


def process(name, *args, cwd=None):
    "The command in a process of its own, as it is installed or as pip would install it"
    script = Path(sys.executable).parent/f'facelab-{name}'
    start = [script] if script.exists() else [sys.executable, '-c', f'import sys; from facelab.cli import facelab_{name}; sys.exit(facelab_{name}())']
    return subprocess.run([*start, *map(str, args)], cwd=cwd, capture_output=True, text=True, timeout=200, stdin=subprocess.DEVNULL)


# ---- processes

@pytest.mark.parametrize('name', COMMANDS)
def test_help_comes_at_once(name):
    code = f'import sys; sys.argv = ["facelab-{name}", "--help"]; from facelab.cli import facelab_{name} as f\ntry: f()\nexcept SystemExit as e: print(e.code, [o for o in ("torch", "pandas", "fastai", "matplotlib", "dlib") if o in sys.modules])'
    r = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, timeout=60)
    *text, last = r.stdout.splitlines()
    assert last == '0 []' and r.stderr == '' and f'  facelab-{name} ' in r.stdout and 'examples:' in text and 'exit code: 0 fine, 1 something was left out, 2 wrong use' in text
    assert '(default: True)' not in r.stdout and '--json' in r.stdout


def test_the_road_in_real_processes(root, tmp_path):
    r = process('crop', 'people', '--out', tmp_path/'crops', cwd=root)
    assert (r.returncode, r.stderr) == (0, '') and len(list((tmp_path/'crops').rglob('*.png'))) == 6
    r = process('enrol', 'people', '--consent', '--gallery', tmp_path/'g.npz', '--json', cwd=root)
    assert (r.returncode, r.stderr) == (0, '') and json.loads(r.stdout)['people'] == ['Ann', 'Bela', 'Chidi']
    assert os.stat(tmp_path/'g.npz').st_mode & 0o077 == 0


def test_questions_in_real_processes(root, three, gallery):
    r = process('identify', 'new', '--gallery', gallery, cwd=root); lines = r.stdout.splitlines()
    assert (r.returncode, r.stderr) == (1, '') and lines[0].startswith('new/door.jpg: Bela 0.') and lines[1].startswith('new/party.jpg: Chidi 0.') and ', unknown 0.' in lines[1]
    assert lines[2].startswith('new/stranger.jpg: unknown 0.') and lines[3] == 'new/wall.jpg: no face' and 'Of 100 strangers' in lines[4]
    r = process('forget', 'Bela', '--gallery', gallery, '--yes')
    assert (r.returncode, r.stderr) == (0, '') and b'Bela' not in gallery.read_bytes() and Gallery.load(gallery).people == ['Ann', 'Chidi']


def test_wrong_use_in_real_processes(root):
    for name, args in (('pairs', ('nowhere',)), ('embed', ('nowhere',)), ('train', ('people', '--system', 'twins')), ('verify', ('new/door.jpg',)), ('crop', ())):
        r = process(name, *args, cwd=root)
        assert r.returncode == 2 and r.stdout == '' and r.stderr.startswith(f'facelab-{name}: ') and r.stderr.count('\n') == 1


def test_a_reader_that_hangs_up(root):
    r = subprocess.run(f'{sys.executable} -c "from facelab.command import say, Said; say(Said(\'x\\n\'*99999), \'x\')" | head -1', shell=True, capture_output=True, text=True, timeout=60)
    assert r.stdout == 'x\n' and r.stderr == ''


# ---- one vocabulary

def test_words_mean_the_same_everywhere():
    for name in COMMANDS:
        sig = inspect.signature(getattr(cli, f'facelab_{name}'))
        assert all(p.annotation is command.VOCABULARY[w] for w, p in sig.parameters.items()) and 'json' in sig.parameters


def test_names_of_modules_do_not_clash():
    found = {o: m.stem for m in Path(cli.__file__).parent.glob('*.py') if m.stem not in ('cli', 'all', '_modidx', '__init__') for o in m.read_text(encoding='utf-8').partition('__all__ = [')[2].partition(']')[0].replace("'", '').replace('\n', '').replace(' ', '').split(',')}
    assert not {o: found[o] for o in cli.__all__ if o in found} and len(cli.__all__) <= 45


# ---- bad input

@pytest.mark.parametrize('args, message', [
    (('crop', 'nowhere'), 'no photo or folder at nowhere'), (('crop', 'empty'), 'no photos in empty'), (('crop', 'people', '--out', 'people/x'), 'choose a place outside'), (('crop', 'people', '--out', 'new/door.jpg'), 'is a file'),
    (('crop', 'people', '--size', 'big'), "invalid int value: 'big'"), (('crop', 'people', '--align', 'left'), 'invalid choice'), (('crop', 'people', '--detector', 'nose', '--out', 'x'), "no detector named 'nose'"), (('crop', 'people', '--faces', 'two', '--out', 'x'), "not 'two'"),
    (('crop', 'people', '--colour', '1'), 'unrecognized arguments'), (('crop', 'people', '--det', 'hog'), 'unrecognized arguments'), (('crop', 'people', '--out', '/proc/facelab'), '/proc/facelab'), (('crop', '--json', 'photo.jpg'), 'put --json last'),
    (('pairs', 'empty'), 'no folders of people'), (('pairs', 'people', '--pairs', '0', '--out', 'p0'), '0 pairs are none'), (('pairs', 'new'), 'photos but no folders'), (('pairs', 'people', '--out', 'people/pairs'), 'choose a place outside'),
    (('embed', 'empty'), 'no photos'), (('embed', 'people', '--encoder', 'gone.onnx'), "no encoder and no file named 'gone.onnx'"), (('embed', 'people', '--out', '/proc/x.npz'), '/proc/'), (('embed', 'people', '--out', 'people'), 'is a folder'),
    (('train', 'people', '--out', 'x.pkl'), '.safetensors'), (('train', 'people', '--arch', 'vgg'), 'resnet18, resnet34 or resnet50'), (('train', 'people', '--init', 'gone.pth'), 'no file at gone.pth'), (('train', 'people', '--init', 'none'), 'too few faces'),
    (('enrol', 'people'), 'say --consent'), (('enrol', 'nowhere', '--consent'), 'no photo or folder'), (('enrol', 'empty', '--consent'), 'no photos'), (('enrol', 'new', '--consent'), '--name NAME'), (('enrol', 'people', '--consent', '--name', 'Ann'), 'folders of 3 people'),
    (('enrol', 'new/door.jpg', '--consent', '--name', 'unknown'), 'answer for strangers'), (('enrol', 'new/door.jpg', '--consent', '--name', ' '), 'visible character'), (('enrol', 'new/door.jpg', '--consent', '--name', 'x'*10_000), '10,000 characters'), (('enrol', 'people', '--consent', '--faces', 'all'), 'faces is one'),
    (('enrol', 'people', '--consent', '--gallery', '/proc/g.npz'), 'g.npz'), (('enrol', 'people', '--consent', '--gallery', 'bad/text.jpg'), 'text.jpg'), (('enrol', 'people', '--consent', '--encoder', 'dlob', '--gallery', 'no.npz'), 'dlob'),
    (('identify', 'new'), 'no gallery at gallery.npz'), (('identify', 'gone.jpg'), 'no photo or folder'), (('identify', 'new', '--gallery', 'bad/text.jpg'), 'text.jpg'), (('identify', 'new', '--faces', 'some'), 'faces is all or largest'), (('identify', 'new', '--threshold', 'high'), 'invalid float'),
    (('verify', 'new/door.jpg'), 'give a second photo, or --name'), (('verify', 'new/door.jpg', 'new/wall.jpg', '--name', 'Ann'), 'give a second photo, or --name'), (('verify', 'gone.jpg', 'new/wall.jpg'), 'no photo at gone.jpg'), (('verify', 'new/door.jpg', '--name', 'Ann'), 'no gallery'),
    (('forget', 'Ann'), 'no gallery at gallery.npz'), (('forget', 'Ann', '--gallery', 'bad/text.jpg', '--yes'), 'text.jpg')])
def test_wrong_use(run, args, message):
    code, _, err = run(*args)
    assert code == 2 and message in err and len(err) < 600


@pytest.mark.parametrize('args, message', [(('forget', 'Anna', '--yes'), 'do you mean Ann?'), (('forget', 'x'*10_000, '--yes'), 'knows 3 people'), (('forget', '../../x', '--yes'), 'nobody is enrolled as ../../x'), (('forget', 'Ann'), 'say --yes'),
    (('verify', 'new/door.jpg', '--name', '\x1b[31mAnn'), 'nobody is enrolled'), (('enrol', 'people', '--consent', '--encoder', 'pixels'), 'made by'), (('enrol', 'people', '--consent', '--detector', 'hog'), 'leave --detector out'), (('identify', 'new/door.jpg', '--threshold', '2'), 'a threshold is a number up to 1')])
def test_wrong_use_of_a_gallery(run, gallery, args, message):
    before = gallery.read_bytes()
    code, _, err = run(*args, '--gallery', gallery)
    assert code == 2 and message in err and '\x1b' not in err and len(err) < 600 and gallery.read_bytes() == before


def test_a_gallery_in_use(run, gallery):
    from facelab.desk import gallery_in_use
    before = gallery.read_bytes()
    with gallery_in_use(gallery):
        for args in (('enrol', 'people', '--consent'), ('forget', 'Ann', '--yes')):
            code, _, err = run(*args, '--gallery', gallery)
            assert code == 2 and 'in use by another' in err
        assert run('identify', 'new/door.jpg', '--gallery', gallery)[0] == 0
    assert gallery.read_bytes() == before and run('forget', 'Ann', '--yes', '--gallery', gallery)[0] == 0


def test_a_full_disk_keeps_the_old_file(run, gallery, monkeypatch):
    before, replace = gallery.read_bytes(), os.replace
    def full(a, b): raise OSError(28, 'No space left on device', str(b))
    monkeypatch.setattr(os, 'replace', full)
    for args in (('enrol', 'new/stranger.jpg', '--name', 'Dora', '--consent'), ('forget', 'Ann', '--yes')):
        code, _, err = run(*args, '--gallery', gallery)
        assert code == 2 and 'full' in err
    assert run('identify', 'new/door.jpg', '--gallery', gallery, '--json', 'x.json')[0] == 2
    monkeypatch.setattr(os, 'replace', replace)
    assert gallery.read_bytes() == before and not [o for o in gallery.parent.iterdir() if o.suffix == '.tmp']


def test_one_bad_photo(run, root, tmp_path):
    d = tmp_path/'Ann'; d.mkdir()
    photo('s35', 3).save(d/'good.png'); (d/'empty.jpg').write_bytes(b''); (d/'text.jpg').write_text('hello'); Image.new('RGB', (99, 99)).save(d/'black.png')
    (d/'party.jpg').write_bytes((root/'new'/'party.jpg').read_bytes())
    code, out, _ = run('crop', tmp_path, '--out', 'c1')
    assert code == 1 and out.startswith('2 of 5 faces cut') and out.count('left out') == 3
    code, out, _ = run('embed', tmp_path, '--out', 'e1.npz', '--json'); got = json.loads(out)
    assert code == 1 and sorted(o['status'] for o in got['report']) == ['bad image', 'bad image', 'no face', 'ok', 'ok'] and len(Embeddings.load('e1.npz')) == 2
    code, out, _ = run('enrol', tmp_path, '--consent', '--gallery', tmp_path/'g.npz', '--json'); got = json.loads(out)
    assert code == 1 and sorted(o['status'] for o in got['report']) == ['bad image', 'bad image', 'no face', 'ok', 'several faces'] and got['people'] == ['Ann']
    code, out, _ = run('enrol', d/'party.jpg', '--name', 'Ann', '--faces', 'largest', '--consent', '--gallery', tmp_path/'g.npz')
    assert code == 0 and 'by 2 photos' in out
    code, out, _ = run('identify', d, '--gallery', tmp_path/'g.npz', '--json'); got = json.loads(out)
    assert code == 1 and [o['status'] for o in got['photos']] == ['no face', 'bad image', 'ok', 'ok', 'bad image']


def test_nobody_usable_makes_no_gallery(run, tmp_path):
    code, out, _ = run('enrol', 'new/wall.jpg', '--name', 'Wall', '--consent', '--gallery', tmp_path/'g.npz')
    assert code == 1 and 'knows 0 people' in out and not (tmp_path/'g.npz').exists()


def test_photos_beside_the_people(run, tmp_path):
    (tmp_path/'Ann').mkdir(); photo('s35', 3).save(tmp_path/'Ann'/'1.png'); photo('s33', 0).save(tmp_path/'loose.png')
    code, out, err = run('crop', tmp_path, '--out', 'c2', '--json')
    assert code == 1 and 'loose.png: left out' in err and json.loads(out)['notes'] and json.loads(out)['photos'] == 1


def test_odd_names(run, root, tmp_path):
    for i, name in enumerate(ODD): assert run('enrol', root/'new'/'door.jpg' if not i else root/'people'/'Ann'/'0.jpg', '--name', name, '--consent', '--gallery', tmp_path/'g.npz')[0] == 0
    assert Gallery.load(tmp_path/'g.npz').people == ODD and [o.name for o in tmp_path.iterdir() if not o.name.startswith('.')] == ['g.npz']
    for name in ODD: assert run('forget', name, '--yes', '--gallery', tmp_path/'g.npz')[0] == 0
    assert len(Gallery.load(tmp_path/'g.npz')) == 0
    code, out, _ = run('identify', 'new/door.jpg', '--gallery', tmp_path/'g.npz')
    assert code == 1 and 'unknown' in out
    folder = tmp_path/'people'
    for name in ('<img src=x onerror=alert(1)>', 'a\x1b[31m', 'Unknown'): (folder/name).mkdir(parents=True); photo('s35', 0).save(folder/name/'1.png')
    code, out, _ = run('enrol', folder, '--consent', '--gallery', tmp_path/'h.npz')
    assert code == 1 and out.count('bad name') == 2 and '\x1b' not in out and Gallery.load(tmp_path/'h.npz').people == ['<img src=x onerror=alert(1)>']
    code, out, _ = run('crop', folder, '--out', tmp_path/'c')
    assert code == 0 and '\x1b' not in out and all(o.resolve().is_relative_to(tmp_path/'c') for o in (tmp_path/'c').rglob('*'))


# ---- answers

def test_codes_of_questions(run, gallery):
    ask = lambda *args: run(*args, '--gallery', gallery)[0]
    assert [ask('identify', f'new/{o}.jpg') for o in ('door', 'party', 'stranger', 'wall')] == [0, 0, 1, 1] and ask('identify', 'bad/text.jpg') == 1 and ask('identify', 'new/door.jpg', '--threshold', '.99') == 1
    assert [ask('verify', 'new/door.jpg', '--name', o) for o in ('Bela', 'Ann')] == [0, 1] and ask('verify', 'new/wall.jpg', '--name', 'Ann') == 1 and ask('verify', 'bad/text.jpg', '--name', 'Ann') == 1
    assert [ask('verify', 'new/door.jpg', f'{o}.jpg') for o in ('people/Bela/0', 'people/Ann/0', 'new/wall', 'bad/text')] == [0, 1, 1, 1]


def test_never_a_name_below_the_threshold(run, gallery):
    for t in ('-1', '.2', '.5', '.9'):
        got = json.loads(run('identify', 'new', '--gallery', gallery, '--threshold', t, '--json')[1])
        assert all((f['score'] >= float(t)) == (f['name'] != 'unknown') for p in got['photos'] for f in p['faces']) and got['threshold'] == float(t)


def test_json_is_all_there_is(run, gallery, tmp_path):
    for args in (('identify', 'new', '--gallery', gallery), ('verify', 'new/door.jpg', '--name', 'Ann', '--gallery', gallery), ('verify', 'new/door.jpg', 'new/wall.jpg'), ('crop', 'new', '--out', tmp_path/'c'), ('embed', 'people', '--out', tmp_path/'e.npz'), ('pairs', 'people', '--no-pictures', '--out', tmp_path/'p'), ('forget', 'Ann', '--yes', '--gallery', gallery)):
        code, out, err = run(*args, '--json'); got = json.loads(out, parse_constant=lambda o: pytest.fail(o))
        assert got['command'] == f'facelab-{args[0]}' and got['code'] == code and err == ''
    code, out, _ = run('identify', 'new/door.jpg', '--gallery', tmp_path/'g.npz', '--json', tmp_path/'sub'/'a.json')
    assert 'A name needs' in out and json.loads((tmp_path/'sub'/'a.json').read_text())['photos'][0]['path'] == 'new/door.jpg' and [o.name for o in (tmp_path/'sub').iterdir()] == ['a.json']


def test_pictures_of_answers(run, root, gallery, tmp_path):
    (tmp_path/'q'/'a').mkdir(parents=True); (tmp_path/'q'/'b').mkdir()
    for o in 'ab': (tmp_path/'q'/o/'x.jpg').write_bytes((root/'new'/'party.jpg').read_bytes())
    assert run('identify', tmp_path/'q', '--gallery', gallery, '--out', tmp_path/'named')[0] == 0
    assert len(list((tmp_path/'named').iterdir())) == 2 and run('identify', tmp_path/'q', '--gallery', gallery, '--out', tmp_path/'q'/'named')[0] == 2


def test_what_is_done_is_not_done_again(run, tmp_path, monkeypatch):
    first = json.loads(run('crop', 'people', '--out', tmp_path/'c', '--json')[1]); assert run('embed', 'people', '--out', tmp_path/'e.npz')[0] == 0
    monkeypatch.setattr('facelab.crop.take_face', lambda *a, **k: pytest.fail('cut again')); monkeypatch.setattr('facelab.folder.measure_photos', lambda *a, **k: pytest.fail('measured again'))
    assert json.loads(run('crop', 'people', '--out', tmp_path/'c', '--json')[1]) == first and run('embed', 'people', '--out', tmp_path/'e.npz')[0] == 0


def test_stopped_and_taken_up(run, tmp_path, monkeypatch):
    import facelab.crop as room
    real, n = room.crop_one, []
    def slow(*a):
        n.append(1)
        if len(n) == 4: raise KeyboardInterrupt
        return real(*a)
    monkeypatch.setattr(room, 'crop_one', slow); monkeypatch.setattr(room, 'share', lambda work, todo, workers, size: ((j, work([j])[0]) for j in todo))
    code, out, err = run('crop', 'people', '--out', tmp_path/'c'); assert code == 130 and out == '' and err == 'facelab-crop: stopped; nothing is half written\n'
    assert run('crop', 'people', '--out', tmp_path/'c')[0] == 0 and len(n) == 4 + 3 and not list((tmp_path/'c').rglob('.*'))


def test_an_error_that_nobody_expected(run, monkeypatch):
    def broken(place): raise ZeroDivisionError('division by zero')
    monkeypatch.setattr(cli, 'photos_under', broken)
    assert run('crop', 'people')[::2] == (2, 'facelab-crop: unexpected ZeroDivisionError: division by zero\n')
    monkeypatch.setenv('FACELAB_TRACEBACK', '1')
    with pytest.raises(ZeroDivisionError): cli.facelab_crop('people')


def test_progress_only_on_a_terminal(run, monkeypatch, tmp_path):
    assert run('crop', 'people', '--out', tmp_path/'a')[2] == ''
    monkeypatch.setattr(sys.stderr, 'isatty', lambda: True, raising=False)
    code, out, err = run('crop', 'people', '--out', tmp_path/'b', '--json'); assert code == 0 and json.loads(out) and '6/6' in err
    assert run('crop', 'people', '--out', tmp_path/'c', '--no-progress')[2] == ''


def test_pairs_are_those_that_evaluate_takes(run, root, tmp_path):
    from facelab.protocols import pairs_file
    assert run('pairs', 'people', '--out', tmp_path/'p', '--pairs', '100', '--seed', '1')[0] == 0
    t = pd.read_csv(tmp_path/'p'/'pairs.csv'); assert len(t) == 6 and t.mated.sum() == 3 and len(list((tmp_path/'p').rglob('*.jpg'))) == 6
    p = pairs_file(tmp_path/'p'/'pairs.csv'); assert len(p.table) == 6 and not p.missing
    before = (tmp_path/'p'/'pairs.csv').read_bytes()
    assert run('pairs', 'people', '--out', tmp_path/'p', '--pairs', '4')[0] == 2 and (tmp_path/'p'/'pairs.csv').read_bytes() == before


@pytest.mark.parametrize('system', ['towers', 'pair-image'])
def test_training_and_what_comes_of_it(run, tmp_path, system):
    from facelab.protocols import find_encoder
    for s, t in list(att_split()[0].groupby('person'))[:4]:
        for i, p in enumerate(t.path[:3]): (tmp_path/'class'/s).mkdir(parents=True, exist_ok=True); Image.open(p).save(tmp_path/'class'/s/f'{i}.png')
    code, out, err = run('train', tmp_path/'class', '--system', system, '--arch', 'resnet18', '--init', 'none', '--pairs', 8, '--epochs', 1, '--size', 32, '--out', tmp_path/'e.safetensors', '--detector', 'whole', '--json')
    got = json.loads(out); assert code == 0 and err == '' and got['trained_on'] == got['judged_by'] == 2 and got['pairs'] == 15 and 0 <= got['eer'] <= 1 and got['lo'] is None and len(got['log']) == 2
    e = find_encoder(tmp_path/'e.safetensors'); assert e.size == 32 and e.threshold == got['threshold'] and e.encode([photo('s31', 0)]).shape == (1, 512)
    assert [o.name for o in tmp_path.iterdir() if o.is_file()] == ['e.safetensors']


def test_plain_is_json():
    o = dict(a=np.float32('nan'), b=np.arange(2), c=[np.bool_(True), Path('x')], d=pd.DataFrame(dict(e=[None, np.inf])), f=float('-inf'))
    assert json.loads(json.dumps(command.plain(o), allow_nan=False)) == dict(a=None, b=[0, 1], c=[True, 'x'], d=[dict(e=None)]*2, f=None)


def test_older_commands_use_the_words_for_the_same_kind_of_value():
    import ast
    kinds = {w: o.__origin__.__name__ if isinstance(o.__origin__, type) else 'str' for w, o in command.VOCABULARY.items()}
    for file in Path(cli.__file__).parent.glob('*.py'):
        for f in ast.walk(ast.parse(file.read_text(encoding='utf-8'))):
            if not isinstance(f, ast.FunctionDef) or not any(getattr(d, 'id', '') == 'call_parse' for d in f.decorator_list): continue
            for a in f.args.args:
                if a.arg in kinds and isinstance(a.annotation, ast.Name): assert a.annotation.id == kinds[a.arg], f'{f.name}: {a.arg}'


SCRIPTS = dict(re.findall(r'^ +(facelab-[a-z]+) = (\S+)$', (Path(__file__).parent.parent/'settings.ini').read_text(), re.M))
del SCRIPTS['facelab-app']  # a server: it has no answer, and ends when it is told to


@pytest.mark.parametrize('name', SCRIPTS)
def test_every_command_speaks_the_same_language(name, monkeypatch, capsys):
    module, f = SCRIPTS[name].split(':'); f = getattr(importlib.import_module(module), f)
    words = inspect.signature(f).parameters
    assert 'json' in words and set(words) <= set(command.VOCABULARY) and f.__doc__.count('\n') > 1
    for args, wanted in ((['--nonsense'], 2), (['--help'], 0)):
        monkeypatch.setattr(sys, 'argv', [name, *args])
        with pytest.raises(SystemExit) as e: f()
        out, err = capsys.readouterr()
        assert (e.value.code or 0) == wanted, (out, err)
        if wanted: assert out == '' and err.startswith(f'{name}: ') and err.count('\n') == 1
        else: assert 'examples:' in out and 'exit code: 0' in out and all(f'--{w}' in out or f'--no-{w}' in out for w in (k.replace('_', '-') for k, p in words.items() if p.default is not p.empty and k != 'other'))


@pytest.mark.parametrize('name, args, code, key', [
    ('people', ['people', '--query', 'new'], 0, 'faces'), ('sort', ['new', '--people', 'people', '--out', 'new-sorted'], 0, 'groups'), ('evaluate', ['--encoder', 'pixels', '--protocol', 'att-one-photo'], 0, 'rank1'),
    ('collect', ['class'], 2, None), ('video', ['none.mp4'], 2, None), ('demo', ['--data', 'empty', '--out', 'demo'], 2, None), ('leaderboard', ['--csv', 'bad/text.jpg'], 2, None)])
def test_answers_for_programs_from_every_command(root, monkeypatch, capsys, name, args, code, key):
    monkeypatch.chdir(root); monkeypatch.setattr(sys, 'argv', [f'facelab-{name}', *args, '--json'])
    module, f = SCRIPTS[f'facelab-{name}'].split(':')
    try: got = getattr(importlib.import_module(module), f)() or 0
    except SystemExit as e: got = e.code
    out, err = capsys.readouterr()
    assert got == code, (out, err)
    if code == 2: assert out == '' and err.count('\n') == 1 and err.startswith(f'facelab-{name}: '), err
    else: told = json.loads(out); assert told['command'] == f'facelab-{name}' and told['code'] == 0 and key in told


def test_notes_of_the_answer_stand_beside_those_of_the_way(capsys):
    @command.command
    def facelab_note(size):
        """A command with something to note.

        examples:
          facelab-note 1"""
        warnings.warn('by the way')
        return command.Said('fine', dict(notes=['of the answer']))
    with warnings.catch_warnings(): facelab_note(1, json=True)
    assert json.loads(capsys.readouterr().out)['notes'] == ['of the answer', 'by the way']
