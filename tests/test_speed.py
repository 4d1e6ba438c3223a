"Counting, timing, and other forms of an encoder: the same numbers or another name, and clear words for every wrong file."
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

import facelab.speed as speed
from facelab.crop import NoFace, take_face
from facelab.embed import Embeddings, Encoder, embed, encoders, get_encoder, similarity
from facelab.gallery import Gallery, RecipeMismatch
from facelab.models.dlib_resnet import dlib_encoder, load_dlib
from facelab.speed import (FaceReader, PixelNet, check_parity, compiled_encoder, copy_rate, count_flops, cpp_compiler, export_onnx, gemm_rate, half_encoder,
                           layer_flops, layer_work, listen, need, onnx_encoder, onnx_session, plot_roofline, plot_stages, quantise_onnx, roofline, score_change,
                           time_each, time_stages, torch_threads, vector_change, whole_file)

gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason='no GPU')


class Small(nn.Module):
    "A network of 10,000 numbers for pictures of 32 pixels; dropout would show a forgotten eval mode"
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Conv2d(3, 8, 5, 2), nn.ReLU(), nn.Conv2d(8, 16, 3, padding=1), nn.ReLU(), nn.Dropout(.5), nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(256, 24))
    def forward(self, x): return self.net(x)


def small(**kw): return Encoder(Small(), **dict(name='small', size=32, dim=24, threshold=.7) | kw)


@pytest.fixture(scope='module')
def pictures(): return list(np.random.default_rng(1).integers(0, 256, (11, 32, 32, 3), dtype=np.uint8))


@pytest.fixture(scope='module')
def exported(tmp_path_factory):
    "The small network as a file"
    for o in ('onnx', 'onnxruntime', 'onnxscript'): pytest.importorskip(o)
    return export_onnx(small(), tmp_path_factory.mktemp('onnx')/'small.onnx')


@pytest.fixture(scope='module')
def chips(att):
    "16 aligned chips of 16 people"
    out = []
    for path in att.groupby('person').head(1).path:
        try: out.append(np.array(take_face(path, align='chip', size=150)[0]))
        except NoFace: continue
    return out[:16]


def leftovers(folder): return [o.name for o in Path(folder).iterdir() if o.name.startswith('.')]


# ---- clocks

def test_turns():
    "One call that does not count, then A, B, A, B"
    calls = []
    t = time_each(dict(a=lambda: calls.append('a'), b=lambda: calls.append('b')), repeats=3)
    assert ''.join(calls) == 'ab'*4 and t.shape == (3, 2) and (t >= 0).all(axis=None)


def test_a_way_that_fails_is_heard():
    with pytest.raises(ZeroDivisionError): time_each(dict(a=lambda: 1/0))


def test_stages_hand_on():
    seen = []
    steps = dict(double=lambda x: 2*x, note=lambda x: seen.append(x) or x, wait=lambda x: time.sleep(.01))
    t = time_stages(21, dict(a=steps, b=dict(wait=lambda x: time.sleep(.03))), repeats=2)
    assert seen == [42]*3 and list(t) == ['double', 'note', 'wait']
    assert t.loc['b', 'double'] == 0 and t.loc['a', 'wait'] >= .01 and t.loc['b', 'wait'] >= .03


def test_pictures_are_drawn():
    ax = plot_stages(pd.DataFrame(dict(x=[.001, .002], y=[.003, .004]), index=['a', 'b']))
    assert len(ax.patches) == 4
    t = roofline(Small(), torch.zeros(2, 3, 32, 32), 1e9, 1e9, repeats=1)
    assert plot_roofline(t, 1e9, 1e9, ax=ax, label='two') is ax and len(ax.collections[0].get_offsets()) == 3


# ---- counting

@pytest.mark.parametrize('layer, x, flops', [(nn.Conv2d(3, 5, 3), (1, 3, 7, 7), 2*25*5*27), (nn.Conv2d(3, 5, 3, stride=2), (1, 3, 7, 7), 2*9*5*27), (nn.Conv2d(4, 8, 3, groups=2), (1, 4, 7, 7), 2*25*8*18),
    (nn.Conv2d(3, 5, 3, padding=1), (2, 3, 7, 7), 2*2*49*5*27), (nn.Linear(10, 4), (3, 10), 2*3*40)])
def test_flops_by_hand(layer, x, flops): assert layer_flops(layer, layer(torch.zeros(x))) == flops


def test_flops_of_dlib():
    "Two operations per multiply-add: 0.54 GFLOP; folding changes nothing, PyTorch's own counter agrees"
    from torch.utils.flop_counter import FlopCounterMode
    net = load_dlib()
    with FlopCounterMode(display=False) as counter, torch.inference_mode(): net(torch.zeros(1, 3, 150, 150))
    assert count_flops(net, 150) == count_flops(load_dlib(fold=False), 150) == counter.get_total_flops() == 541_708_288


def test_work_grows_with_the_batch():
    net = load_dlib()
    one, four = (layer_work(net, torch.zeros(n, 3, 150, 150)) for n in (1, 4))
    assert len(one) == 30 and (four.flops == 4*one.flops).all() and (four.intensity > one.intensity).all()


def test_counting_in_other_precisions(): assert count_flops(Small().bfloat16(), 32) == count_flops(Small(), 32)


def test_nobody_listens_afterwards():
    net, heard = Small(), []
    with pytest.raises(RuntimeError):
        with listen(net, heard): net(torch.zeros(1, 1, 32, 32))
    n = len(heard); net(torch.zeros(1, 3, 32, 32))
    assert len(heard) == n and not any(m._forward_hooks for m in net.modules())


def test_modes_come_back():
    "A frozen part of a network in training stays frozen, the rest stays in training"
    net = Small(); net.net[0].eval()
    count_flops(net, 32); roofline(net, torch.zeros(1, 3, 32, 32), 1., 1., 1)
    assert net.training and net.net[4].training and not net.net[0].training


def test_threads_come_back():
    n = torch.get_num_threads()
    with torch_threads(1): assert torch.get_num_threads() == 1
    gemm_rate(64, threads=1, repeats=1); copy_rate(1, threads=1, repeats=1)
    assert torch.get_num_threads() == n
    with pytest.raises((RuntimeError, ValueError)):
        with torch_threads(-1): pass
    assert torch.get_num_threads() == n


def test_rates(): assert gemm_rate(256, repeats=3) > 1e8 and gemm_rate(128, repeats=1, dtype=torch.bfloat16) > 0 and copy_rate(8, repeats=3) > 1e7


def test_batches_are_faster(chips):
    "A face among 16 costs clearly less than a face alone"
    e = dlib_encoder()
    t = time_each(dict(alone=lambda: [e.encode([c]) for c in chips], together=lambda: e.encode(chips, 16)), repeats=5).min()
    assert t.alone > 1.1*t.together


# ---- change

def test_vector_change():
    a = np.zeros((2, 3))
    assert vector_change(a, a) == dict(largest=0, median=0, moved=0)
    assert vector_change(a, a + [[0, 3, 4], [0, 0, 0]]) == dict(largest=4, median=0, moved=5)


def test_score_change():
    c = score_change([.1, .39, .41, .9], [.1, .4, .39, .8], [False, False, True, True], .4)
    assert c['flips'] == 2 and c['pairs'] == 4 and c['score'] == pytest.approx(.1) and c['eer'] == .5
    assert score_change([.1, .2], [.1, .2], [False, True], .15)['eer'] == 0


# ---- fewer bits, compilers

def test_half(chips):
    e, exact = half_encoder('dlib', torch.bfloat16), dlib_encoder().encode(chips)
    got = e.encode(chips)
    assert got.dtype == np.float32 and e.name == 'dlib-bf16' and (e.align, e.metric, e.threshold, e.licence) == ('chip', 'euclidean', .4, 'public domain')
    assert 1e-4 < vector_change(exact, got)['moved'] < .05
    s = [similarity(v, v, 'euclidean') for v in (exact, got)]
    assert np.abs(s[0] - s[1])[~np.eye(len(chips), dtype=bool)].max() < .05
    assert np.array_equal(dlib_encoder().encode(chips), exact), 'the original is not touched'


def test_half_is_for_halves():
    for dtype in (torch.int8, torch.float32, 'half'):
        with pytest.raises(ValueError, match='bfloat16 or torch.float16'): half_encoder('dlib', dtype)


def test_known_by_name():
    assert 'dlib-bf16' in encoders() and get_encoder('dlib-bf16') is get_encoder('dlib-bf16')


def test_no_mixing(tmp_path):
    f = Gallery('dlib-bf16').save(tmp_path/'g.npz')
    assert Gallery.load(f).recipe['encoder'] == 'dlib-bf16'
    with pytest.raises(RecipeMismatch, match='dlib-bf16'): Gallery.load(f, encoder='dlib')


@gpu
def test_half_on_a_gpu(chips):
    e = dlib_encoder()
    assert e.device == 'cuda'
    exact = dlib_encoder(); exact.device = 'cpu'; exact.module.cpu()
    h = half_encoder(e)
    assert h.name == 'dlib-fp16' and vector_change(exact.encode(chips), h.encode(chips))['moved'] < .02


def test_no_compiler(monkeypatch):
    monkeypatch.delenv('CXX', raising=False); monkeypatch.setenv('PATH', '')
    for f in (cpp_compiler, compiled_encoder):
        with pytest.raises(RuntimeError, match='Install g'): f()
    monkeypatch.setenv('CXX', 'no-such-compiler')
    with pytest.raises(RuntimeError, match='no-such-compiler'): cpp_compiler()


@pytest.mark.skipif(not shutil.which('g++'), reason='no compiler')
def test_compiled(pictures):
    e = small(device='cpu')
    c = compiled_encoder(e)
    assert c.name == 'small-compiled' and np.abs(c.encode(pictures[:4]) - e.encode(pictures[:4])).max() < 1e-5


# ---- ONNX

@pytest.mark.parametrize('metric', ['cosine', 'euclidean'])
def test_there_and_back(tmp_path, pictures, metric):
    pytest.importorskip('onnxscript')
    e = small(metric=metric, align='chip', licence='mine', mean=(1., 2., 3.), std=(50., 60., 70.))
    e.threshold = np.float32(.7)
    o = onnx_encoder(export_onnx(e, tmp_path/'deep'/'er'/'a.onnx', name='mine'))
    assert (o.name, o.size, o.dim, o.metric, o.align, o.licence, round(o.threshold, 6), o.device) == ('mine', 32, 24, metric, 'chip', 'mine', .7, 'cpu')
    for bs in (1, 4, 64): assert np.abs(o.encode(pictures, bs) - e.encode(pictures)).max() <= 2e-6
    assert o.encode([]).shape == (0, 24) and not leftovers(tmp_path/'deep'/'er')


def test_dlib_file(tmp_path, chips):
    pytest.importorskip('onnxscript')
    e = dlib_encoder()
    o = onnx_encoder(export_onnx(e, tmp_path/'dlib.onnx'))
    assert o.name == 'dlib-onnx' and np.abs(o.encode(chips) - e.encode(chips)).max() <= 2e-6
    assert check_parity(e, o, 2e-6) <= 2e-6


def test_any_runtime_can_use_it(exported, pictures):
    "Without a line of facelab: pixels in, vectors out, and a text that says what they are"
    import onnxruntime
    s = onnxruntime.InferenceSession(str(exported), providers=['CPUExecutionProvider'])
    assert np.allclose(s.run(None, {'pixels': np.stack(pictures)})[0], onnx_encoder(exported).module(torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2)), atol=1e-6)
    about = json.loads(s.get_modelmeta().custom_metadata_map['facelab'])
    assert about['metric'] == 'cosine' and about['size'] == 32 and len(about['mean']) == len(about['std']) == 3


def test_used_like_any_encoder(exported, att, pictures, tmp_path):
    e = onnx_encoder(exported)
    emb = embed(list(att.path[:3]) + ['nowhere.jpg'], e)
    assert len(emb) == 3 and emb.recipe['encoder'] == 'small-onnx' and emb.report.status.tolist() == ['ok']*3 + ['bad image']
    assert Embeddings.load(emb.save(tmp_path/'e.npz')).recipe == emb.recipe
    g = Gallery(e); g.enrol('Ann', [att.path[0]], consent=True); f = g.save(tmp_path/'g.npz')
    assert Gallery.load(f, encoder=onnx_encoder(exported)).verify(att.path[0], 'Ann')
    with pytest.raises(RecipeMismatch): Gallery.load(f, encoder='dlib')
    for wrong in (['nowhere.jpg'], [np.zeros((9, 9, 7), np.uint8)], [b'no picture']):
        with pytest.raises(ValueError): e.encode(wrong)


def test_pixels_are_normalised_inside(pictures):
    e = small(mean=(10., 20., 30.), std=(2., 3., 4.), metric='euclidean', device='cpu')
    with torch.inference_mode(): got = PixelNet(e).eval()(torch.from_numpy(np.stack(pictures)))
    assert np.abs(got.numpy() - e.encode(pictures)).max() <= 2e-6*np.abs(got.numpy()).max()


def test_another_network_is_not_let_through(monkeypatch, tmp_path):
    "A file that gives other numbers, and one made in low precision, are never put in place; what was there stays"
    pytest.importorskip('onnxscript')
    f = tmp_path/'a.onnx'; f.write_bytes(b'old')
    with pytest.raises(ValueError, match='differs from small'): export_onnx(small(), f, tolerance=0)
    monkeypatch.setattr(speed, 'check_parity', lambda *a: (_ for _ in ()).throw(KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt): export_onnx(small(), f)
    assert f.read_bytes() == b'old' and not leftovers(tmp_path)


def test_parity_of_nan():
    "Not a number is not parity"
    bad = small(); bad.module.net[-1].bias.data[:] = np.nan
    with pytest.raises(ValueError, match='differs'): check_parity(small(), bad, 1.)


def test_places_that_cannot_be_written(tmp_path):
    (tmp_path/'file').write_text('x')
    with pytest.raises(IsADirectoryError, match='folder'): export_onnx(small(), tmp_path)
    with pytest.raises(OSError): export_onnx(small(), tmp_path/'file'/'below.onnx')
    with pytest.raises(OSError): export_onnx(small(), tmp_path/('n'*300))
    assert [o.name for o in tmp_path.iterdir()] == ['file']


@pytest.mark.skipif(os.name != 'posix' or os.geteuid() == 0, reason='needs a user who may not write everywhere')
def test_no_permission(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(PermissionError): export_onnx(small(), tmp_path/'a.onnx')


def test_disk_full(tmp_path):
    f = tmp_path/'a'; f.write_text('old')
    with pytest.raises(OSError, match='full'):
        with whole_file(f) as t: t.write_text('ha'); raise OSError(28, 'disk full')
    assert f.read_text() == 'old' and not leftovers(tmp_path)


def test_not_again(exported, tmp_path):
    with pytest.raises(ValueError, match='already'): export_onnx(onnx_encoder(exported), tmp_path/'b.onnx')


@pytest.mark.parametrize('name', ['onnx', 'onnxruntime', 'onnxscript'])
def test_missing_package(name, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ImportError, match=r"pip install 'facelab\[onnx\]'"): export_onnx(small(), tmp_path/'a.onnx')
    assert not list(tmp_path.iterdir())


def test_missing_runtime(monkeypatch, exported, tmp_path):
    monkeypatch.setitem(sys.modules, 'onnxruntime', None)
    with pytest.raises(ImportError, match='onnxruntime is not installed'): onnx_encoder(exported)
    with pytest.raises(ImportError, match='facelab'): quantise_onnx(exported, tmp_path/'q.onnx', [])


def test_loaded_late():
    "Neither ONNX nor dlib nor a compiler at import"
    code = "import facelab.speed, sys; heavy = {'onnx', 'onnxruntime', 'onnxscript', 'dlib', 'face_recognition', 'facelab.models.dlib_resnet', 'torch._inductor'} & set(sys.modules); assert not heavy, heavy"
    r = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, timeout=120)
    assert r.returncode == 0, r.stderr


@pytest.mark.parametrize('keep', [0, 1, 10, 100, .5, .99])
def test_cut_short(exported, tmp_path, keep):
    data, f = exported.read_bytes(), tmp_path/'half.onnx'
    f.write_bytes(data[:int(keep*len(data)) if isinstance(keep, float) else keep])
    with pytest.raises(ValueError, match='half.onnx'): onnx_encoder(f)


def test_foreign_files(tmp_path, att, bad_files):
    pytest.importorskip('onnxruntime')
    for f in (att.path[0], bad_files['truncated'][0], bad_files['not an image'][0]):
        with pytest.raises(ValueError, match='not a usable ONNX file'): onnx_encoder(f)
    for f in (tmp_path, tmp_path/'nowhere.onnx'):
        with pytest.raises(FileNotFoundError): onnx_encoder(f)
    with pytest.raises(ValueError, match='data'): onnx_session(b'')


def described(exported, text, to):
    "The exported file with another description"
    import onnx
    m = onnx.load(str(exported))
    del m.metadata_props[:]
    if text is not None: onnx.helper.set_model_props(m, dict(facelab=text))
    to.write_bytes(m.SerializeToString())
    return to


@pytest.mark.parametrize('text', [None, '', 'null', '[]', '{', '{}', '"x"', '3'])
def test_no_description(exported, tmp_path, text):
    with pytest.raises(ValueError, match='f.onnx'): onnx_encoder(described(exported, text, tmp_path/'f.onnx'))


@pytest.mark.parametrize('key, value', [('size', 33), ('size', '32'), ('dim', 25), ('metric', 'manhattan'), ('metric', None), ('align', 3), ('align', 'left'), ('name', None), ('threshold', 'high'), ('mean', 0)])
def test_wrong_description(exported, tmp_path, key, value):
    about = json.loads(onnx_encoder(exported).module.session.get_modelmeta().custom_metadata_map['facelab'])
    with pytest.raises(ValueError): onnx_encoder(described(exported, json.dumps(about | {key: value}), tmp_path/'f.onnx'))


def test_more_in_the_description_is_ignored(exported, tmp_path):
    about = json.loads(onnx_encoder(exported).module.session.get_modelmeta().custom_metadata_map['facelab'])
    assert onnx_encoder(described(exported, json.dumps(about | dict(module='x', colour='red')), tmp_path/'f.onnx')).name == 'small-onnx'


# ---- eight bits

def unsigned(path):
    "Is what flows between the layers stored as unsigned bytes? Signed ones take twice as long on x86"
    import onnx
    m = onnx.load(str(path))
    flows = {n.input[2] for n in m.graph.node if n.op_type == 'QuantizeLinear'}
    kinds = {o.data_type for o in m.graph.initializer if o.name in flows}
    return kinds == {onnx.TensorProto.UINT8}


def test_eight_bits(exported, tmp_path, pictures):
    q = onnx_encoder(quantise_onnx(exported, tmp_path/'q.onnx', pictures[:6]))
    e = small()
    assert (q.name, q.size, q.dim, q.metric, q.threshold) == ('small-int8', 32, 24, 'cosine', .7)
    moved = vector_change(e.encode(pictures), q.encode(pictures))['moved']
    assert unsigned(tmp_path/'q.onnx')
    assert 1e-4 < moved < .5 and not leftovers(tmp_path)
    assert onnx_encoder(quantise_onnx(exported, tmp_path/'q.onnx', pictures, name='tiny')).name == 'tiny'


def test_eight_bits_bad_input(exported, tmp_path, pictures):
    for faces in ([], ['nowhere.jpg'], [None], [np.zeros((32, 32, 7), np.uint8)]):
        with pytest.raises((ValueError, TypeError)): quantise_onnx(exported, tmp_path/'q.onnx', faces)
    with pytest.raises(FileNotFoundError): quantise_onnx(tmp_path/'nowhere.onnx', tmp_path/'q.onnx', pictures)
    with pytest.raises(IsADirectoryError): quantise_onnx(exported, tmp_path, pictures)
    assert not list(tmp_path.iterdir())


def test_reader(pictures):
    r = FaceReader(pictures[:5], 32, bs=2)
    got = [r.get_next() for _ in range(4)]
    assert [len(o['pixels']) for o in got[:3]] == [2, 2, 1] and got[3] is None and got[0]['pixels'].dtype == np.uint8


def test_need():
    assert need('json', 'os') == [json, os]
    with pytest.raises(ImportError, match='nowhere_at_all'): need('json', 'nowhere_at_all')


def test_lfw_keeps_its_decisions(lfw_home):
    "Sixty pairs of LFW: bfloat16 moves scores by less than .05 and flips at most 2 decisions"
    from facelab.datasets import lfw_pairs
    pairs = lfw_pairs('test').groupby('mated').head(30)
    faces = {}
    for p in sorted({*pairs.left, *pairs.right}):
        try: faces[p] = np.array(take_face(p, align='chip', size=150, upsample=0)[0])
        except NoFace: pass
    pairs, row = pairs[pairs.left.isin(faces) & pairs.right.isin(faces)], {p: i for i, p in enumerate(faces)}
    scores = [1 - np.linalg.norm(v[pairs.left.map(row)] - v[pairs.right.map(row)], axis=1) for v in (e.encode(list(faces.values()), 32) for e in (dlib_encoder(), half_encoder('dlib', torch.bfloat16)))]
    c = score_change(*scores, pairs.mated, .4)
    assert c['pairs'] > 50 and c['score'] < .05 and c['flips'] <= 2


# ---- benchmark

def test_bench_encode(tmp_path):
    "A small run: the same numbers, all lines, the last one the ratio"
    r = subprocess.run([sys.executable, '-m', 'bench.encode', '--faces', '8', '--few', '2', '--batch', '8', '--repeats', '2', '--json', str(tmp_path/'r.json')], cwd=Path(__file__).resolve().parent.parent, capture_output=True, text=True, timeout=300)
    assert r.returncode == 0, r.stderr
    result, lines = json.loads((tmp_path/'r.json').read_text()), r.stdout.strip().splitlines()
    assert lines[-1] == f'ratio: {result["ratio"]:.1f}' and {'one at a time', 'limit'} <= {o.split(':')[0] for o in lines}
    assert result['largest_difference'] <= 2e-6 and result['ratio'] > 1 and result['faces'] == 8
