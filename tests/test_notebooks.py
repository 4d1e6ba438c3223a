"Every notebook runs, is clean, is exported, and keeps the promises that a reader relies on."
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from fastcore.nbio import mk_cell, new_nb, read_nb, write_nb

ROOT = Path(__file__).resolve().parent.parent
NBS = ROOT/'nbs'
NOTEBOOKS = sorted(NBS.glob('*.ipynb'))
BIN = Path(sys.executable).parent
LIMIT = 600  # seconds for one notebook
by_name = pytest.mark.parametrize('path', NOTEBOOKS, ids=lambda o: o.stem)


def outputs(path):
    "Saved outputs of the notebook at `path`, with the id of their cell"
    return [(c.id, o) for c in read_nb(path).cells if c.cell_type == 'code' for o in c.get('outputs', [])]


def prose(path): return '\n\n'.join(c.source for c in read_nb(path).cells if c.cell_type == 'markdown')


# ---- they run

def environment():
    "That of the tests (conftest shares out the cores), with the commands of this Python first"
    return {**os.environ, 'PATH': f'{BIN}{os.pathsep}{os.environ["PATH"]}', 'MPLBACKEND': 'Agg'}


def run_notebook(path, limit=LIMIT):
    "(passed, what it said) of `nbdev-test` on one notebook, in a process group of its own, which ends with it"
    command = [sys.executable, BIN/'nbdev-test', path, '--n-workers', '0']
    p = subprocess.Popen(command, cwd=ROOT, env=environment(), text=True, errors='replace', stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True)
    late = ''
    try: said = p.communicate(timeout=limit)[0]
    except subprocess.TimeoutExpired:
        late = f'\nended after {limit} seconds'
        os.killpg(p.pid, signal.SIGINT)  # nbdev-test says where it hangs
        try: said = p.communicate(timeout=15)[0]
        except subprocess.TimeoutExpired:
            os.killpg(p.pid, signal.SIGKILL)
            said = p.communicate()[0]
    finally:
        try: os.killpg(p.pid, signal.SIGKILL)
        except ProcessLookupError: pass
    return p.returncode == 0 and not late, re.sub(r'\x1b\[[\d;]*m', '', said) + late


def beside(): return {o.relative_to(NBS).as_posix() for o in NBS.rglob('*') if '.ipynb_checkpoints' not in o.parts}


@by_name
def test_runs(path):
    before = beside()
    passed, said = run_notebook(path)
    if not passed: pytest.fail(f'{path.name} failed:\n{said}', pytrace=False)
    assert not beside() - before, f'files appeared in nbs/ while {path.name} ran'


@pytest.fixture
def toy(tmp_path):
    "A project with one notebook: `toy(cells) -> its path`"
    def make(*cells):
        shutil.copy(ROOT/'pyproject.toml', tmp_path)
        path = tmp_path/'nbs'/'toy.ipynb'
        path.parent.mkdir()
        nb = new_nb()
        nb.cells = [mk_cell(o, 'code') for o in cells]
        write_nb(nb, path)
        return path
    return make


def test_a_failure_is_told(toy):
    passed, said = run_notebook(toy('x = 40', '#| slow\nraise SystemExit', '#| gpu\n1/0', 'def broken(): raise ValueError(f"it is {x + 2}")', 'broken()'))
    assert not passed and 'ValueError: it is 42' in said and 'broken()' in said and '\x1b' not in said


def test_flagged_cells_do_not_run(toy): assert run_notebook(toy('#| slow\n1/0', '#| notest\n1/0', '#| gpu\n1/0', 'import os; assert os.environ["IN_TEST"]'))[0]


def test_a_hang_ends(toy):
    passed, said = run_notebook(toy('import time', 'time.sleep(60)'), limit=8)
    assert not passed and 'time.sleep(60)' in said and 'ended after 8 seconds' in said


# ---- they are clean and exported

@pytest.fixture(scope='module')
def copy(tmp_path_factory):
    "The project's notebooks and nothing that was made from them"
    d = tmp_path_factory.mktemp('project')
    shutil.copy(ROOT/'pyproject.toml', d)
    shutil.copytree(NBS, d/'nbs', ignore=lambda folder, names: [o for o in names if not o.endswith('.ipynb')])
    (d/'facelab').mkdir()
    shutil.copy(ROOT/'facelab'/'__init__.py', d/'facelab')
    return d


def call(name, cwd): subprocess.run([sys.executable, BIN/name], cwd=cwd, env=environment(), check=True, timeout=120, stdin=subprocess.DEVNULL)


def test_clean(copy):
    call('nbdev-clean', copy)
    dirty = [o.name for o in NOTEBOOKS if o.read_bytes() != (copy/'nbs'/o.name).read_bytes()]
    assert not dirty, f'run nbdev-clean on {", ".join(dirty)}'


def modules(folder): return {o.relative_to(folder).as_posix(): o.read_text(encoding='utf-8') for o in folder.rglob('*') if o.is_file() and '__pycache__' not in o.parts}


def test_exported(copy):
    call('nbdev-export', copy)
    made, kept = modules(copy/'facelab'), modules(ROOT/'facelab')
    assert made.keys() == kept.keys(), 'modules without a notebook, or not exported yet'
    assert not [o for o in made if made[o] != kept[o]], 'run nbdev-export; what was edited in facelab/ belongs into a notebook'


# ---- what a reader sees

@by_name
def test_title(path):
    first = read_nb(path).cells[0]
    assert first.cell_type == 'markdown'
    assert re.match(r'# \S.*\n+> \S', first.source), 'the first cell is a title and a subtitle: "# Title", then "> one line"'


@by_name
def test_was_run(path):
    "Outputs are saved, none of them is an error, and none tells where on a disk it was made"
    saved = outputs(path)
    assert saved, 'no output is saved'
    assert not [i for i, o in saved if o['output_type'] == 'error']
    text = {i: json.dumps([o.get('text', ''), {k: v for k, v in o.get('data', {}).items() if not k.startswith('image/') or 'svg' in k}], ensure_ascii=False) for i, o in saved}
    found = [(i, m[0]) for i, o in text.items() if (m := re.search(r'(?<![\w.:/])(/work/|/root/|/tmp/|/home/|/Users/|/var/folders/)[^"\s]*|[^"\s]*site-packages[^"\s]*|\b[A-Z]:\\\\Users[^"\s]*', o))]
    assert not found, 'absolute paths of one machine'


def targets(text):
    "Files that markdown links to, code left out"
    text = re.sub(r'^```.*?^```|`[^`\n]+`', '', text, flags=re.S | re.M)
    links = re.findall(r'\]\(([^)\s]+)', text) + re.findall(r'''<(?:img|a|source)\b[^>]*?\b(?:src|href)=["']([^"']+)''', text)
    return [o.split('#')[0] for o in links if not re.match(r'[a-z][\w+.-]*:|#|attachment:', o, re.I)]


@by_name
def test_links(path):
    lost = [o for o in targets(prose(path)) if not (NBS/o).exists()]
    assert not lost, 'links that lead nowhere'


def test_targets(): assert targets('[a](b.ipynb#c) `[no](no.md)` [w](https://x.y/z) ![p](../p.png "t") [here](#there) <img src="i.png">\n```\n[no](no.md)\n```') == ['b.ipynb', '../p.png', 'i.png']


def test_every_lesson_has_its_module():
    "A lesson's number says where it stands, the rest of its name is the module that it exports"
    for path in NOTEBOOKS:
        source = '\n'.join(c.source for c in read_nb(path).cells if c.cell_type == 'code')
        name = re.search(r'^#\s*\|\s*default_exp:?\s+(\S+)', source, flags=re.M)
        if path.stem != 'index': assert re.fullmatch(r'\d\d[a-z]?_' + re.escape(name[1]), path.stem), path.name


# ---- README.md

@pytest.fixture(scope='module')
def readme():
    import runpy
    return runpy.run_path(str(ROOT/'.ci'/'readme.py'))


def test_readme_is_the_index(readme):
    text, pictures = readme['readme'](NBS/'index.ipynb')
    old, files = readme['written'](ROOT)
    assert old == text, 'run  python .ci/readme.py'
    assert files == pictures


def test_readme_links():
    lost = [o for o in targets((ROOT/'README.md').read_text(encoding='utf-8')) if not (ROOT/o).exists()]
    assert not lost, 'links that lead nowhere'


def test_readme_script(readme, tmp_path):
    nb, png = new_nb(), 'aGVsbG8='
    def result(**data): return dict(output_type='execute_result', data=data, metadata={}, execution_count=None)
    def code(source, *outs): return {**mk_cell(source, 'code'), 'outputs': list(outs)}
    nb.cells = [mk_cell('# Title\n\n> line\n\n[`a`](00_a.ipynb#b) ![p](../data/p.png "t") [w](https://x.y/z.ipynb) [h](#there) `[c](c.md)` <img src="i.png" width="9">', 'markdown'),
                code('#| default_exp a'), code('#| hide\nsecret = 1'), code('#| echo: false\nquiet', result(**{'text/plain': ['shown']})), code('#| output: false\nloud', result(**{'text/plain': ['hidden']})),
                code('f(1)', dict(output_type='stream', name='stdout', text=['one\n', '```\n']), dict(output_type='stream', name='stderr', text='noise'), result(**{'image/png': png, 'text/plain': 'a figure'})),
                code('g(2)', result(**{'text/markdown': '| a |\n|---|', 'text/plain': 'table'}))]
    (tmp_path/'nbs').mkdir()
    write_nb(nb, tmp_path/'nbs'/'index.ipynb')
    readme['main'](folder=tmp_path)
    text, files = readme['written'](tmp_path)
    picture, = files
    assert files[picture] == b'hello'
    assert text.split('\n\n')[1:] == ['# Title', '> line', '[`a`](nbs/00_a.ipynb#b) ![p](data/p.png "t") [w](https://x.y/z.ipynb) [h](#there) `[c](c.md)` <img src="nbs/i.png" width="9">',
        '```\nshown\n```', '```python\nloud\n```', '```python\nf(1)\n```', '````\none\n```\n````', f'![](README_files/{picture})', '```python\ng(2)\n```', '| a |\n|---|\n']
    readme['main'](check=True, folder=tmp_path)
    (tmp_path/'README.md').write_text('edited')
    with pytest.raises(SystemExit, match='readme.py'): readme['main'](check=True, folder=tmp_path)
    nb.cells = nb.cells[:2]
    write_nb(nb, tmp_path/'nbs'/'index.ipynb')
    readme['main'](folder=tmp_path)
    assert not (tmp_path/'README_files').exists()
