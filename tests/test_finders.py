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
from facelab.finders import (OnnxYolo, OnnxYuNet, UltralyticsYolo, boxes_of_maps, boxes_of_rows, count_boxes, enlarged, faces_from, fetch, get_yolo, get_yunet, haar,
                             letterbox, match_boxes, mtcnn, nms, yolo, yolo_detector, yunet)
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
    assert {'haar', 'yunet', 'mtcnn', 'yolo'} <= set(detectors())
    assert recipe('dlib', 'haar', 0) != recipe('dlib', 'hog', 0) and recipe('dlib', 'yolo', 0) != recipe('dlib', 'yunet', 0)


def test_counting_leaves_doubtful_places_out():
    true, odd, far = [Box(0, 10, 10, 0), Box(0, 40, 10, 30)], Box(50, 60, 60, 50), Box(80, 90, 90, 80)
    assert count_boxes(true, [true[0], true[0], odd, far], [odd]) == dict(found=1, missed=1, false=2)
    assert count_boxes(true, [], [odd]) == dict(found=0, missed=2, false=0) and count_boxes([], [odd]) == dict(found=0, missed=0, false=1)


# photos of odd shapes

ODD = [(8, 8), (8, 1500), (1500, 8), (31, 33, 4), (40, 9, 3)]

@pytest.mark.parametrize('shape', ODD)
@pytest.mark.parametrize('name', ['haar', 'yunet', 'mtcnn'])
def test_odd_sizes_grey_and_transparent(name, shape, monkeypatch):
    if name == 'yunet': monkeypatch.setenv('FACELAB_YUNET', yunet_file())
    if name == 'mtcnn': pytest.importorskip('facenet_pytorch')
    noise = np.random.default_rng(0).integers(0, 255, shape).astype(np.uint8)
    for upsample in (0, 1):
        for f in detect(noise, name, upsample): assert f.box == f.box.clip(*shape[1::-1]) and f.box.area


# YOLO: a network that takes white for a face

STRIDES = {8: .7, 16: .8, 32: .9}

def white_maps(side, extra):
    "Nodes and constants of raw maps: 64 channels that say 1, 1, 1, 2 cells, the logit 20*brightness - 10, `extra` zeros"
    h, np_h = pytest.importorskip('onnx').helper, pytest.importorskip('onnx').numpy_helper
    nodes, consts, outs = [], [], []
    for s in STRIDES:
        n = side//s; bins = np.zeros((1, 64, n, n), np.float32)
        for edge, cells in enumerate((1, 1, 1, 2)): bins[:, 16*edge + cells] = 100
        for k, v in dict(bins=bins, extra=np.zeros((1, extra, n, n), np.float32), by=np.float32(20), less=np.float32(10)).items(): consts.append(np_h.from_array(np.asarray(v), f'{k}{s}'))
        nodes += [h.make_node('ReduceMax', ['images'], [f'm{s}'], axes=[1]), h.make_node('AveragePool', [f'm{s}'], [f'p{s}'], kernel_shape=[s, s], strides=[s, s]), h.make_node('Mul', [f'p{s}', f'by{s}'], [f'q{s}']),
                  h.make_node('Sub', [f'q{s}', f'less{s}'], [f'l{s}']), h.make_node('Concat', [f'bins{s}', f'l{s}', f'extra{s}'], [f'out{s}'], axis=1)]
        outs.append((f'out{s}', [1, 65 + extra, n, n]))
    return nodes, consts, outs


def white_rows(side, extra, kinds=1, face=0):
    "Nodes and constants of the usual table: boxes 80 x 100 around each cell, brightness times .7, .8, .9 as the score of kind number `face`"
    h, np_h = pytest.importorskip('onnx').helper, pytest.importorskip('onnx').numpy_helper
    nodes, consts, parts = [], [], []
    for s, weight in STRIDES.items():
        n = side//s; y, x = (np.indices((n, n)) + .5).reshape(2, -1)*s; zeros = lambda k: np.zeros((1, k, n*n), np.float32)
        box = np.stack([x, y, 0*x + 80, 0*x + 100]).astype(np.float32)[None]
        for k, v in dict(head=np.concatenate([box, zeros(face)], 1), tail=zeros(kinds - 1 - face + extra), shape=np.array([1, 1, n*n]), w=np.array(weight, np.float32)).items(): consts.append(np_h.from_array(v, f'{k}{s}'))
        nodes += [h.make_node('ReduceMax', ['images'], [f'm{s}'], axes=[1]), h.make_node('AveragePool', [f'm{s}'], [f'p{s}'], kernel_shape=[s, s], strides=[s, s]), h.make_node('Mul', [f'p{s}', f'w{s}'], [f's{s}']),
                  h.make_node('Reshape', [f's{s}', f'shape{s}'], [f'r{s}']), h.make_node('Concat', [f'head{s}', f'r{s}', f'tail{s}'], [f'c{s}'], axis=1)]
        parts.append(f'c{s}')
    nodes.append(h.make_node('Concat', parts, ['output0'], axis=2))
    return nodes, consts, [('output0', [1, 4 + kinds + extra, 21*(side//32)**2])]


def save(path, graph, side=640, names="{0: 'face'}"):
    onnx = pytest.importorskip('onnx'); pytest.importorskip('onnxruntime'); h, F = onnx.helper, onnx.TensorProto.FLOAT
    nodes, consts, outs = graph
    model = h.make_model(h.make_graph(nodes, 'white', [h.make_tensor_value_info('images', F, [1, 3, side, side])], [h.make_tensor_value_info(n, F, s) for n, s in outs], consts), opset_imports=[h.make_opsetid('', 13)], ir_version=9)
    if names: h.set_model_props(model, dict(names=names))
    path.write_bytes(model.SerializeToString())
    return path


def dots(*middles, size=(320, 160), half=9):
    "Black photo (width, height) with white squares around (x, y)"
    im = np.zeros((size[1], size[0], 3), np.uint8)
    for x, y in middles: im[y - half:y + half, x - half:x + half] = 255
    return im


@pytest.mark.parametrize('extra', [0, 15])
@pytest.mark.parametrize('names', ["{0: 'face'}", "{0: 'FACE'}", "{0: '0'}", None])
def test_yolo_finds_the_boxes_that_a_hand_computes(tmp_path, extra, names):
    net = OnnxYolo(save(tmp_path/'w.onnx', white_rows(640, extra), names=names), score=.6)
    boxes, scores = net.boxes(dots((168, 56), (264, 104)))
    assert np.allclose(boxes[np.argsort(boxes[:, 0])], [[148, 31, 188, 81], [244, 79, 284, 129]], atol=1e-4) and scores == pytest.approx([.9, .9])
    tall = net.boxes(dots((56, 168), size=(160, 320)))[0]
    assert np.allclose(tall, [[36, 143, 76, 193]], atol=1e-4)
    assert [tuple(f.box) for f in net(dots((168, 56)), 3)] == [(31, 188, 81, 148)] and net(dots(), 0) == []
    edge = net(dots((10, 10)))[0]
    assert (edge.box.top, edge.box.left) == (0, 0) and edge.landmarks.shape == (5, 2)


@pytest.mark.parametrize('extra', [0, 15])
def test_yolo_reads_raw_maps(tmp_path, extra):
    net = OnnxYolo(save(tmp_path/'m.onnx', white_maps(640, extra)), score=.6)
    boxes, scores = net.boxes(dots((168, 56)))
    big = boxes[(boxes[:, 2] - boxes[:, 0]).argmax()]
    assert np.allclose(big, [168 - 16, 56 - 16, 168 + 16, 56 + 32], atol=1e-3)
    assert scores.max() == pytest.approx(1/(1 + np.exp(-10)), abs=1e-4)
    m = np.zeros((80, 20, 20)); m[[1, 16 + 2, 32 + 3, 48], 2, 10] = 1e4; m[64, 2, 10], m[64, 0, 0] = 1e4, -1e4
    b, s = boxes_of_maps([m], 640)
    assert np.allclose(b[50], [304, 16, 432, 80]) and s[50] == 1 and s[0] < 1e-20 and len(s) == 400


def test_yolo_of_several_kinds_takes_the_face(tmp_path):
    names = str({0: 'person', 1: 'plate', 2: 'face'})
    path = save(tmp_path/'k.onnx', white_rows(320, 0, kinds=3, face=2), side=320, names=names)
    net = OnnxYolo(path, score=.6)
    assert (net.place, net.side, net.free) == (2, 320, False) and len(net.boxes(dots((168, 56), size=(320, 320), half=17))[0]) == 1
    assert OnnxYolo(path, label='plate', score=.6)(dots((168, 56))) == []


def test_yolo_says_what_it_cannot_use(tmp_path):
    def refused(why, path, **kw):
        with pytest.raises(ValueError, match=why): OnnxYolo(path, **kw)
    good = save(tmp_path/'good.onnx', white_rows(64, 0), side=64)
    refused('finds person, car, and no face', save(tmp_path/'a.onnx', white_rows(64, 0, kinds=2), side=64, names=str({0: 'person', 1: 'car'})))
    refused('finds cat, and no face', save(tmp_path/'b.onnx', white_rows(64, 0), side=64, names="{0: 'cat'}"))
    refused('which of its 3 kinds', save(tmp_path/'c.onnx', white_rows(64, 2), side=64, names=None))
    refused('which of its 1 kinds', save(tmp_path/'d.onnx', white_rows(64, 0), side=64, names="{0: 'face', 1: 'body'}"))
    refused('no plate', good, label='plate')
    for i, text in enumerate(("not a table", "[1", "__import__('os')")): assert OnnxYolo(save(tmp_path/f'n{i}.onnx', white_rows(64, 0), side=64, names=text)).place == 0
    for i, n in enumerate((0, 10, 400)):
        (tmp_path/f'cut{i}.onnx').write_bytes(good.read_bytes()[:n]); refused('is not a network that can be read as YOLO', tmp_path/f'cut{i}.onnx')
    nodes, consts, _ = white_rows(64, 0)
    refused('answers have the shape', save(tmp_path/'e.onnx', (nodes[:2], [], [('p8', [1, 1, 8, 8])]), side=64))
    refused('is not a network', yunet_file())


def test_yolo_by_path_and_by_name(tmp_path, monkeypatch):
    monkeypatch.setenv('FACELAB_DATA', str(tmp_path)); monkeypatch.delenv('FACELAB_YOLO', raising=False); (tmp_path/'weights').mkdir()
    with pytest.raises(FileNotFoundError, match='FACELAB_YOLO'): detect(dots((168, 56)), 'yolo')
    monkeypatch.setenv('FACELAB_YOLO', str(tmp_path/'gone.onnx'))
    with pytest.raises(FileNotFoundError, match='FACELAB_YOLO names'): get_yolo()
    path = save(tmp_path/'w.onnx', white_rows(640, 0)); monkeypatch.setenv('FACELAB_YOLO', str(path))
    assert detect(dots((168, 56)), 'yolo')[0].box == (31, 188, 81, 148)
    sha = hashlib.sha256(path.read_bytes()).hexdigest()
    assert yolo_detector(path, sha256=sha.upper(), score=.6)(dots()) == []
    with pytest.raises(ValueError, match='another file .*not opened'): yolo_detector(path, sha256='f'*64)
    with pytest.raises(FileNotFoundError, match='no file'): yolo_detector(tmp_path/'none.onnx')
    monkeypatch.setitem(sys.modules, 'onnxruntime', None)
    with pytest.raises(ImportError, match=r"facelab\[onnx\]"): yolo_detector(path)


def test_yolo_reads_a_changed_file_again(tmp_path, monkeypatch):
    path = save(tmp_path/'w.onnx', white_rows(640, 0)); monkeypatch.setenv('FACELAB_YOLO', str(path))
    assert yolo(dots((168, 56)))[0].score == pytest.approx(.9)
    save(path, white_rows(640, 1), names=str({0: 'x', 1: 'face'})); os.utime(path, ns=(1, 1))
    assert yolo(dots((168, 56))) == []


def test_no_pickle_is_opened_by_default(tmp_path, monkeypatch):
    import pickle
    class Evil:
        def __reduce__(self): return (Path.touch, (tmp_path/'it ran',))
    for name in ('face.pt', 'face.PTH', 'renamed.onnx'):
        path = tmp_path/name; path.write_bytes(pickle.dumps(Evil())); monkeypatch.setenv('FACELAB_YOLO', str(path))
        with pytest.raises((ValueError, ImportError)): yolo(dots())
    with pytest.raises(ValueError, match='can run any program.*pickle=True'): yolo_detector(tmp_path/'face.pt')
    with pytest.raises(ValueError, match='another file'): yolo_detector(tmp_path/'face.pt', pickle=True, sha256='0'*64)
    monkeypatch.setitem(sys.modules, 'ultralytics', None)
    with pytest.raises(ImportError, match=r"facelab\[yolo\]"): UltralyticsYolo(tmp_path/'face.pt')
    assert not (tmp_path/'it ran').exists()


def test_a_pt_goes_through_the_package(tmp_path):
    pytest.importorskip('ultralytics'); from ultralytics import YOLO
    (net := YOLO('yolov8n.yaml')).save(tmp_path/'things.pt')
    with pytest.raises(ValueError, match='no face'): yolo_detector(tmp_path/'things.pt', pickle=True)
    assert net.names and isinstance(yolo_detector(tmp_path/'things.pt', label='person', pickle=True)(dots((168, 56))), list)


@pytest.mark.parametrize('shape', [*ODD, (1, 700, 3), (700, 1, 3), (1, 1, 3)])
def test_yolo_on_odd_sizes(tmp_path, shape, monkeypatch):
    monkeypatch.setenv('FACELAB_YOLO', str(save(tmp_path/'w.onnx', white_rows(640, 0))))
    white = np.full(shape, 255, np.uint8)
    find = detect if min(shape[:2]) >= 8 else lambda im, name: yolo(im)
    for f in find(white, 'yolo'): assert f.box == f.box.clip(*shape[1::-1])


@pytest.mark.parametrize('h, w', [(640, 640), (100, 333), (375, 500), (1, 640), (3000, 7), (641, 640)])
def test_letterbox_and_back(h, w):
    im = np.random.default_rng(1).integers(0, 255, (h, w, 3)).astype(np.uint8)
    square, scale, (left, top) = letterbox(im, 640)
    assert square.shape == (640, 640, 3) and scale == min(640/h, 640/w) and min(left, top) >= 0 and max(left, top) <= 320
    if (h, w) == (640, 640): assert (square == im).all()
    outside = square.copy(); outside[top:top + max(1, round(h*scale)), left:left + max(1, round(w*scale))] = 114
    assert (outside == 114).all()


@pytest.mark.parametrize('seed', range(5))
def test_suppression_equals_the_plain_loop(seed):
    r = np.random.default_rng(seed); corner = r.uniform(0, 60, (80, 2)); boxes = np.c_[corner, corner + r.uniform(5, 40, (80, 2))]; scores = r.random(80)
    keep = []
    for i in np.argsort(-scores):
        a = Box(boxes[i, 1], boxes[i, 2], boxes[i, 3], boxes[i, 0])
        if all(iou(a, Box(boxes[j, 1], boxes[j, 2], boxes[j, 3], boxes[j, 0])) <= .5 for j in keep): keep.append(i)
    assert nms(boxes, scores).tolist() == keep
    table = np.r_[(boxes[:, :2] + boxes[:, 2:]).T/2, (boxes[:, 2:] - boxes[:, :2]).T, scores[None], np.zeros((15, 80))]
    back = boxes_of_rows(table)
    assert np.allclose(back[0], boxes) and (back[1] == scores).all()
