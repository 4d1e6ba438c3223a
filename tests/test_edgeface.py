"EdgeFace: place of the chip, weights files of every kind, messages; with random weights."
import sys

import numpy as np
import pytest
import torch

from facelab.datasets import data_root
from facelab.embed import encoders
from facelab.models.edgeface import (ARCFACE, ArcFrame, convert_edgeface, edgeface_encoder, edgeface_mirrored, edgeface_net, edgeface_path,
                                     fill_edgeface, merge_low_rank, place_chip, read_state)

REAL = data_root()/'weights'/'edgeface_xs_dequant_timm.pth'


@pytest.fixture(scope='module')
def state():
    pytest.importorskip('timm')
    torch.manual_seed(0)
    return edgeface_net().state_dict()


@pytest.fixture
def nowhere(tmp_path, monkeypatch):
    monkeypatch.setenv('FACELAB_DATA', str(tmp_path))
    monkeypatch.delenv('FACELAB_EDGEFACE', raising=False)
    return tmp_path


def test_place_is_a_similarity():
    "Eyes put where ArcFace has them, to half a pixel and the rounding of the scale"
    for eyes in ([(.3, .3), (.7, .3)], [(.33, .31), (.67, .32)], [(.4, .5), (.6, .5)]):
        size, left, top = place_chip(eyes)
        assert np.abs(np.array(eyes)*size + (left, top) - ARCFACE[:2]).max() < 1.2


def test_frame_is_black_and_exact():
    x = torch.rand(2, 3, 100, 100)
    y = ArcFrame(100, 6, 20)(x)
    assert torch.equal(y[..., 20:, 6:106], x[..., :92, :])
    assert (y[..., :20, :] == -1).all() and (y[..., :6] == -1).all() and (y[..., 106:] == -1).all()
    assert ArcFrame(112, 0, 0)(torch.rand(1, 3, 112, 112)).shape == (1, 3, 112, 112)
    wide = torch.rand(1, 3, 168, 168)
    assert torch.equal(ArcFrame()(wide), wide[..., 14:126, 28:140])


def test_frame_keeps_mirrors():
    for size, frame in ((168, ArcFrame()), (100, ArcFrame(100, 6, 20))):
        x = torch.rand(1, 3, size, size)
        assert torch.equal(frame(x.flip(3)), frame(x).flip(3))


def test_eyes_of_dlibs_mean_face_fall_into_place():
    "The corners of the eyes in dlib's mean face of five points, as shares of the face"
    right, left = ((.8595674595992 + .6460604764104)/2, (.2134981538014 + .2289674387677)/2), ((.1205750620789 + .3340850613712)/2, (.2137274526848 + .2290642403242)/2)
    eyes = (np.array([left, right]) + .75)/2.5
    assert place_chip(eyes)[0] == 168
    assert np.abs(eyes*168 + (-28, -14) - ARCFACE[:2]).max() < 1


def test_without_timm(monkeypatch):
    monkeypatch.setitem(sys.modules, 'timm', None)
    with pytest.raises(ImportError, match=r"pip install 'facelab\[edgeface\]'"): edgeface_net()


def test_network(state):
    assert len(state) == 214 and state['head.fc.weight'].shape == (512, 192) and state['stem.0.weight'].shape == (32, 3, 4, 4)
    with torch.inference_mode(): assert fill_edgeface(state)(torch.zeros(2, 3, 112, 112)).shape == (2, 512)


def test_low_rank_gives_the_same_answer():
    g = torch.Generator().manual_seed(0)
    a, b, c, x = (torch.randn(s, generator=g) for s in ((3, 10), (7, 3), (7,), (4, 10)))
    m = merge_low_rank({'model.f.linear1.weight': a, 'model.f.linear2.weight': b, 'model.f.linear2.bias': c, 'model.g': c})
    assert set(m) == {'f.weight', 'f.bias', 'g'} and torch.allclose(x @ m['f.weight'].T + m['f.bias'], (x @ a.T) @ b.T + c, atol=1e-5)


class Evil:
    def __reduce__(self): return (open, ('evil was here', 'w'))


def test_files_that_are_no_weights(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({'a': Evil()}, 'evil.pth')
    for name, data in (('empty.pth', b''), ('text.pth', b'Dear Sir or Madam, this is a letter'), ('half.safetensors', b'\x10\x00\x00\x00\x00\x00\x00\x00{"a":')):
        (tmp_path/name).write_bytes(data)
    for name in ('evil.pth', 'empty.pth', 'text.pth', 'half.safetensors'):
        with pytest.raises(ValueError, match=name): read_state(name)
    assert not (tmp_path/'evil was here').exists()
    torch.save([torch.zeros(1)], 'list.pth'); torch.save({'a': 1}, 'number.pth'); torch.save({}, 'nothing.pth')
    for name in ('list.pth', 'number.pth', 'nothing.pth'):
        with pytest.raises(ValueError, match='tensors by name'): read_state(name)
    with pytest.raises(FileNotFoundError): read_state('absent.pth')
    with pytest.raises(FileNotFoundError): read_state(tmp_path)


@pytest.mark.parametrize('spoil', [lambda s: s.pop('stem.0.bias'), lambda s: s.update(extra=torch.zeros(1)), lambda s: s.update({'stem.0.bias': torch.zeros(3)})])
def test_wrong_weights_are_refused(state, spoil):
    bad = dict(state); spoil(bad)
    with pytest.raises(ValueError, match='file.pth: not the weights of EdgeFace-XS: 1 tensors'): fill_edgeface(bad, 'file.pth')


def test_path_in_order(nowhere, monkeypatch):
    with pytest.raises(FileNotFoundError, match='not for commercial use'): edgeface_path()
    own, named = nowhere/'weights'/'edgeface_xs.safetensors', nowhere/'named.pth'
    own.parent.mkdir(); own.touch(); named.touch()
    assert edgeface_path() == own and edgeface_path(named) == named
    monkeypatch.setenv('FACELAB_EDGEFACE', str(named))
    assert edgeface_path() == named
    with pytest.raises(FileNotFoundError, match='absent'): edgeface_path(nowhere/'absent.pth')


def test_a_pickle_is_never_found_by_default(nowhere, state):
    (nowhere/'weights').mkdir()
    torch.save(state, nowhere/'weights'/'edgeface_xs.pth'); torch.save(state, nowhere/'weights'/'edgeface_xs_dequant_timm.pth')
    with pytest.raises(FileNotFoundError): edgeface_path()


def test_convert_and_encode(nowhere, state):
    torch.save({f'model.{k}': v for k, v in state.items()}, nowhere/'theirs.pt')
    dest = convert_edgeface(nowhere/'theirs.pt')
    assert dest == edgeface_path() and [o.name for o in dest.parent.iterdir()] == [dest.name]
    a, b = edgeface_encoder(), edgeface_encoder(nowhere/'theirs.pt')
    faces = list(np.random.default_rng(0).integers(0, 256, (3, 168, 168, 3), dtype=np.uint8))
    assert np.array_equal(a.encode(faces), b.encode(faces)) and np.allclose(np.linalg.norm(a.encode(faces), axis=1), 1, atol=1e-5)
    assert np.allclose(edgeface_mirrored().encode(faces), edgeface_mirrored().encode([o[:, ::-1] for o in faces]), atol=1e-5)
    assert (a.size, a.dim, a.align, a.metric) == (168, 512, 'wide', 'cosine') and 'not for commercial use' in a.licence


def test_failed_conversion_leaves_nothing(nowhere, state):
    torch.save({k: v for k, v in state.items() if 'stem' not in k}, nowhere/'part.pt')
    with pytest.raises(ValueError, match='part.pt'): convert_edgeface(nowhere/'part.pt')
    assert not (nowhere/'weights').exists()


def test_registered(): assert {'edgeface-xs', 'edgeface-xs+mirror'} <= set(encoders())


@pytest.mark.skipif(not REAL.is_file(), reason='the weights are not in FACELAB_DATA')
def test_real_weights_tell_people_apart(att):
    pytest.importorskip('timm')
    from facelab.crop import take_face
    from facelab.metrics import eer, score_pairs
    table = att[att.person > 's35'].groupby('person').head(4)
    v = edgeface_encoder(REAL).encode([take_face(p, 'wide', 168, 'adaptive')[0] for p in table.path])
    p = score_pairs(v @ v.T, table.person)
    assert eer(p.score, p.mated) < .05
