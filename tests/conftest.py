"Fixtures that several test modules share."
import atexit
import io
import os
import shutil
import tempfile
from pathlib import Path

if 'FACELAB_CACHE' not in os.environ:  # what tests and notebooks measure is shared among their processes, and gone afterwards
    os.environ['FACELAB_CACHE'] = tempfile.mkdtemp(prefix='facelab-cache-')
    atexit.register(shutil.rmtree, os.environ['FACELAB_CACHE'], ignore_errors=True)

if workers := os.environ.get('PYTEST_XDIST_WORKER_COUNT'):  # the cores are shared out before NumPy and PyTorch count them
    for o in ('OMP_NUM_THREADS', 'MKL_NUM_THREADS', 'OPENBLAS_NUM_THREADS'): os.environ[o] = str(max(1, (os.cpu_count() or 1)//int(workers)))

import numpy as np
import pytest
from PIL import Image

from facelab import detect
from facelab.datasets import att_faces, data_root
from facelab.detect import Box, Face, register_detector


@pytest.fixture(scope='session')
def att():
    "The AT&T faces as a table path, person"
    return att_faces()


@pytest.fixture(scope='session')
def face(att):
    "One AT&T face, RGB, 92 x 112"
    return Image.open(att.path[40]).convert('RGB')


@pytest.fixture
def lfw_home():
    "The folder `lfw_home`; the test is skipped where LFW is not"
    home = data_root()/'lfw_home'
    if not (home/'lfw').is_dir() or not (home/'pairs.txt').is_file(): pytest.skip('LFW is not in FACELAB_DATA')
    return home


@pytest.fixture
def quick():
    "A detector that knows where the face is without looking, and counts; only for one process"
    calls = []
    def find(image, upsample):
        calls.append(image.shape)
        return [Face(Box(20, 80, 90, 10), 1.)]
    register_detector('quick', find)
    yield calls
    detect._detectors.pop('quick')


def jpeg(im, **kw):
    "`im` as the bytes of a JPEG file"
    f = io.BytesIO()
    im.save(f, 'JPEG', **{'quality': 95, **kw})
    return f.getvalue()


@pytest.fixture(scope='session')
def bad_files(tmp_path_factory, face):
    "Files that are no photos: `{reason: [paths]}`"
    d = tmp_path_factory.mktemp('bad')
    data = jpeg(face)
    for name, content in {'empty.jpg': b'', 'half.jpg': data[:len(data)//2], 'start.jpg': data[:12], 'text.jpg': b'Dear Sir or Madam,\n', 'noise.png': bytes(range(256))*4}.items():
        (d/name).write_bytes(content)
    face.save(d/'whole.png')
    (d/'half.png').write_bytes((d/'whole.png').read_bytes()[:5000])
    (d/'whole.png').unlink()
    Image.new('RGB', (1, 1)).save(d/'dot.png')
    Image.new('L', (12_000, 9_000)).save(d/'huge.png')
    (d/'folder.jpg').mkdir()
    (d/'loop.jpg').symlink_to(d/'loop.jpg')
    (d/'gone.jpg').symlink_to(d/'nowhere.jpg')
    names = {'missing': ['absent.jpg', 'gone.jpg', 'text.jpg/inside.jpg'], 'empty': ['empty.jpg'], 'truncated': ['half.jpg', 'start.jpg', 'half.png'],
             'not an image': ['text.jpg', 'noise.png'], 'too large': ['huge.png'], 'too small': ['dot.png'], 'unreadable': ['folder.jpg', 'loop.jpg']}
    return {reason: [d/o for o in files] for reason, files in names.items()}


@pytest.fixture
def people_dir(tmp_path, att):
    "A folder of people with difficult names; `.names` are the people"
    d = tmp_path/'people'
    names = ['Ann Lee', 'Dr. B. v. C.', '李雷', 'Ольга', "O'Neil, jr.", '-dash', '100%', 'a#b']
    for i, name in enumerate(names):
        (d/name).mkdir(parents=True)
        for k in range(2): (d/name/f'photo {k}.pgm').write_bytes(Path(att.path[i*10 + k]).read_bytes())
    return d


def mean_difference(a, b):
    "Mean difference of two pictures in grey levels"
    return float(np.abs(np.asarray(a, float) - np.asarray(b, float)).mean())
