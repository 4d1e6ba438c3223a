"Detectors from elsewhere: their boxes are ours, their files are checked, and what is missing is said"
import hashlib
import http.server
import os
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

from facelab import finders
from facelab.datasets import data_root
from facelab.detect import Box, detect, detectors, iou
from facelab.embed import recipe
from facelab.finders import OnnxYuNet, enlarged, faces_from, fetch, get_yunet, haar, match_boxes, mtcnn, yunet
from facelab.images import load_image


def yunet_file():
    for path in (os.environ.get('FACELAB_YUNET'), data_root()/'weights'/'yunet_n_dynamic.onnx', data_root()/'weights'/'face_detection_yunet_2023mar.onnx'):
        if path and Path(path).is_file(): return str(path)
    pytest.skip("YuNet's file is not in FACELAB_DATA")


def test_boxes_are_clipped_and_scaled(face):
    im = np.array(face); h, w = im.shape[:2]
    faces = faces_from(im, [[-20, -20, 80, 80], [2*w - 30, 2*h - 30, 100, 100], [2*w + 5, 0, 50, 50]], [1, 2, 3], upsample=1)
    assert [tuple(f.box) for f in faces] == [(0, 30, 30, 0), (h - 15, w, h, w - 15)] and [f.score for f in faces] == [1, 2]
    assert all(f.landmarks.shape == (5, 2) for f in faces)
    assert enlarged(im, 2).shape == (4*h, 4*w, 3)


def test_haar_agrees_with_hog_about_most_faces(att):
    agree = [iou(h[0].box, f[0].box) > .4 for p in att.path[::20] if (h := detect(load_image(p), 'haar')) and (f := detect(load_image(p), 'hog'))]
    assert len(agree) >= 14 and np.mean(agree) >= .9


@pytest.mark.parametrize('seed', range(5))
def test_matching_is_one_to_one(seed):
    r = np.random.default_rng(seed)
    box = lambda: Box(*(lambda t, l: (t, l + 20, t + 20, l))(*map(int, r.integers(0, 60, 2))))
    true, found = [box() for _ in range(6)], [box() for _ in range(9)]
    hits, false = match_boxes(true, found)
    assert hits + len(false) == len(found) and hits <= 6
    assert all(any(iou(t, found[j]) >= .3 for t in true) for j in set(range(9)) - set(false))


@pytest.fixture
def server(tmp_path):
    "A real server on this machine: (address, requests so far)"
    (tmp_path/'w.bin').write_bytes(b'weights'*1000); asked = []
    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *a): super().__init__(*a, directory=str(tmp_path))
        def do_GET(self): asked.append(self.path); super().do_GET()
        def log_message(self, *a): pass
    s = http.server.ThreadingHTTPServer(('127.0.0.1', 0), Handler)
    threading.Thread(target=s.serve_forever, daemon=True).start()
    yield f'http://127.0.0.1:{s.server_port}/w.bin', asked, hashlib.sha256(b'weights'*1000).hexdigest()
    s.shutdown(); s.server_close()


def test_fetch_asks_once_and_checks(server, tmp_path):
    url, asked, good = server; dest = tmp_path/'in'/'w.bin'
    with pytest.raises(FileNotFoundError, match='consent=True'): fetch(url, good, dest)
    assert not asked
    for _ in range(2): assert fetch(url, good, dest, consent=True) == dest
    assert len(asked) == 1
    dest.write_bytes(b'cut')
    with pytest.raises(FileNotFoundError, match='not the right file'): fetch(url, good, dest)
    assert fetch(url, good, dest, consent=True).read_bytes() == b'weights'*1000
    with pytest.raises(ValueError, match='another file'): fetch(url, '0'*64, tmp_path/'in'/'v.bin', consent=True)
    with pytest.raises(OSError): fetch(url.replace('w.bin', 'none'), good, tmp_path/'in'/'u.bin', consent=True)
    assert [o.name for o in (tmp_path/'in').iterdir()] == ['w.bin']


def test_yunet_says_what_is_missing(monkeypatch, tmp_path, face):
    monkeypatch.setenv('FACELAB_DATA', str(tmp_path)); monkeypatch.delenv('FACELAB_YUNET', raising=False)
    with pytest.raises(FileNotFoundError, match='opencv_zoo'): yunet(np.array(face))
    monkeypatch.setenv('FACELAB_YUNET', str(tmp_path/'gone.onnx'))
    with pytest.raises(FileNotFoundError, match='FACELAB_YUNET names'): get_yunet()
    for name, data in dict(a=b'', b=b'height of nonsense').items():
        (tmp_path/name).write_bytes(data); monkeypatch.setenv('FACELAB_YUNET', str(tmp_path/name))
        with pytest.raises(ValueError, match='not a network'): yunet(np.array(face))


def test_opencv_and_our_own_arithmetic_agree(tmp_path, face, monkeypatch):
    "The file with free sizes, made fixed, is read by OpenCV: both must draw the same box"
    path = yunet_file(); ort = pytest.importorskip('onnxruntime')
    if b'height' not in Path(path).read_bytes(): pytest.skip('the file has fixed sizes')
    options = ort.SessionOptions(); options.optimized_model_filepath = str(tmp_path/'fixed.onnx'); options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_BASIC
    for k, v in dict(batch=1, height=224, width=192).items(): options.add_free_dimension_override_by_name(k, v)
    ort.InferenceSession(path, options)
    im = np.array(face.resize((192, 224)))
    monkeypatch.setenv('FACELAB_YUNET', path); ours = yunet(im)
    monkeypatch.setenv('FACELAB_YUNET', str(tmp_path/'fixed.onnx')); theirs = yunet(im)
    assert not isinstance(finders._yunet(str(tmp_path/'fixed.onnx')), OnnxYuNet)
    assert len(ours) == len(theirs) == 1 and ours[0].box == theirs[0].box and ours[0].score == pytest.approx(theirs[0].score, abs=1e-4)
    odd = np.array(face.resize((187, 211))); monkeypatch.setenv('FACELAB_YUNET', path)
    assert len(yunet(odd)) == 1 and iou(yunet(odd)[0].box, detect(odd, 'hog')[0].box) > .3


def test_mtcnn_with_and_without_its_package(face, monkeypatch):
    finders._mtcnn.cache_clear()
    with monkeypatch.context() as m:
        m.setitem(sys.modules, 'facenet_pytorch', None)
        with pytest.raises(ImportError, match='--no-deps facenet-pytorch'): mtcnn(np.array(face))
    pytest.importorskip('facenet_pytorch')
    assert iou(mtcnn(np.array(face), 1)[0].box, detect(face, 'hog')[0].box) > .4 and mtcnn(np.full((100, 100, 3), 128, np.uint8)) == []


def test_they_are_part_of_a_recipe():
    assert {'haar', 'yunet', 'mtcnn'} <= set(detectors())
    assert recipe('dlib', 'haar', 0) != recipe('dlib', 'hog', 0)
