"Averaging several looks at a face: views, exactness, recipes, names."
import pickle

import cv2
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from facelab.averaging import Averaged, affine_view, averaged, jitter_views, jittered, look, mirrored
from facelab.embed import Encoder, encoders, get_encoder, recipe
from facelab.speed import half_encoder


class Small(nn.Module):
    "A tiny network whose answer depends on place, deterministic"
    def __init__(self, dim=8):
        super().__init__()
        g = torch.Generator().manual_seed(0)
        self.w = nn.Parameter(torch.randn(dim, 3*16*16, generator=g))
        self.calls = []

    def forward(self, x):
        self.calls.append(len(x))
        return x.flatten(1) @ self.w.T


def small(metric='euclidean', **kw): return Encoder(Small(), 'small', 16, 8, metric, mean=(0.,)*3, std=(255.,)*3, **kw)


@pytest.fixture
def noise(): return list(np.random.default_rng(0).integers(0, 256, (5, 16, 16, 3), dtype=np.uint8))


def test_straight_and_mirrored_are_exact():
    x = torch.rand(3, 3, 7, 9)
    assert torch.equal(look(x, affine_view()[None]), x)
    assert torch.equal(look(x, affine_view(flip=True)[None]), x.flip(3))


def test_mirror_by_interpolation_agrees():
    x = torch.rand(2, 3, 8, 8)
    nearly = affine_view(flip=True, dx=1e-7)
    assert torch.allclose(look(x, nearly[None]), x.flip(3), atol=1e-5)


@pytest.mark.parametrize('angle,seen,dx,dy,flip', [(10, 1, 0, 0, False), (0, .8, .1, -.05, False), (-3, .97, .02, .01, True), (3, 1.1, 0, 0, False)])
def test_look_agrees_with_opencv(angle, seen, dx, dy, flip):
    "warpAffine with the same map in pixels"
    n = 32
    x = cv2.GaussianBlur(np.random.default_rng(0).random((n, n)).astype(np.float32), (0, 0), 2)
    view = affine_view(angle, seen, dx, dy, flip).numpy().astype(np.float64)
    pixel = np.array([[n/2, 0, (n - 1)/2], [0, n/2, (n - 1)/2], [0, 0, 1]])
    m = (pixel @ np.vstack([view, [0, 0, 1]]) @ np.linalg.inv(pixel))[:2]
    want = cv2.warpAffine(x, m, (n, n), flags=cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP, borderMode=cv2.BORDER_REPLICATE)
    got = look(torch.from_numpy(x)[None, None], torch.tensor(view[None], dtype=torch.float32))[0, 0].numpy()
    assert np.abs(got - want).max() < .01


def test_look_order_and_layout():
    x = torch.rand(3, 3, 8, 8)
    views = torch.stack([affine_view(), affine_view(5.), affine_view(flip=True)])
    y = look(x, views)
    assert y.shape == (9, 3, 8, 8) and y.is_contiguous(memory_format=torch.channels_last)
    for k in range(3): assert torch.allclose(y[3*k:3*k + 3], look(x, views[k:k + 1]))


def test_look_keeps_the_type(): assert look(torch.rand(1, 3, 8, 8).bfloat16(), affine_view(3.)[None]).dtype == torch.bfloat16


def test_jitter_is_repeatable_and_balanced():
    a = jitter_views(7)
    assert a.shape == (7, 2, 3) and torch.equal(a, jitter_views(7)) and torch.equal(a, jitter_views(20)[:7])
    assert not torch.equal(a, jitter_views(7, seed=3))
    assert torch.equal(a[1::2, :, 0], -a[:6:2, :, 0]) and torch.equal(a[1::2, :, 1:], a[:6:2, :, 1:])
    still = jitter_views(2, angle=0, seen=(1, 1), shift=0)
    assert torch.allclose(still, torch.stack([affine_view(), affine_view(flip=True)]))


@pytest.mark.parametrize('n', [0, -3])
def test_no_looks(n):
    with pytest.raises(ValueError, match='at least one'): jitter_views(n)


@pytest.mark.parametrize('metric', ['euclidean', 'cosine'])
def test_average_is_the_double_loop(metric, noise):
    e, views = small(metric), jitter_views(5)
    want = []
    for image in noise:
        rows = [e.module(look(e.batch([image]), v[None]))[0].detach() for v in views]
        want.append(sum(r/r.norm() if metric == 'cosine' else r for r in rows)/len(rows))
    want = torch.stack(want)
    want = F.normalize(want) if metric == 'cosine' else want
    assert np.allclose(averaged(e, views, 'x').encode(noise), want.numpy(), atol=1e-4)


def test_one_look_is_the_encoder(noise):
    for metric in ('euclidean', 'cosine'):
        e = small(metric)
        assert np.allclose(averaged(e, affine_view()[None], 'once').encode(noise), e.encode(noise), atol=1e-6)


def test_batches_stay_small_and_do_not_matter(noise):
    e = small()
    a = averaged(e, jitter_views(100), 'many')
    many = noise*20
    e.module.calls.clear()
    v = a.encode(many, bs=32)
    assert max(e.module.calls) <= 64 and sum(e.module.calls) == 100*len(many)
    assert np.allclose(v[:5], a.encode(noise, bs=1), atol=1e-4)
    assert a.encode([]).shape == (0, 8)


def test_names_recipes_thresholds():
    e = small(threshold=.4)
    a, b = mirrored(e), jittered(e, 6, threshold=.5)
    assert (a.name, a.threshold, b.name, b.threshold) == ('small+mirror', None, 'small+jitter6', .5)
    assert jittered(e, 6, seed=2, angle=5.).name == 'small+jitter6 seed=2 angle=5.0'
    assert len({str(recipe(o)) for o in (e, a, b, jittered(e, 7))}) == 4
    assert e.module is a.module.net


def test_distances_shrink(noise):
    e = small()
    one, two = e.encode(noise), e.encode([o[:, ::-1] for o in noise])
    d = lambda v: np.linalg.norm(v[:, None] - v[None], axis=2)
    assert (d(mirrored(e).encode(noise)) <= (d(one) + d(two))/2 + 1e-4).all()


def test_mirrored_does_not_see_the_side(noise):
    a = mirrored(small())
    assert np.allclose(a.encode(noise), a.encode([o[:, ::-1] for o in noise]), atol=1e-4)


@pytest.mark.parametrize('shape', [(2, 3), (0, 2, 3), (2, 3, 2)])
def test_wrong_views(shape):
    with pytest.raises(ValueError, match='shape'): Averaged(Small(), torch.zeros(shape))


def test_views_are_part_of_the_weights(noise):
    a = mirrored(small())
    assert 'views' in a.module.state_dict()
    b = pickle.loads(pickle.dumps(a.module.eval()))
    assert np.allclose(b(a.batch(noise)).detach().numpy(), a.encode(noise), atol=1e-5)


def test_registered(att):
    assert {'dlib+mirror', 'dlib+jitter'} <= set(encoders())
    face = [np.asarray(o) for o in np.random.default_rng(1).integers(0, 256, (1, 150, 150, 3), dtype=np.uint8)]
    e, plain = get_encoder('dlib+mirror'), get_encoder('dlib')
    assert np.allclose(e.encode(face), (plain.encode(face) + plain.encode([face[0][:, ::-1]]))/2, atol=1e-5)
    assert plain.threshold < e.threshold <= get_encoder('dlib+jitter').threshold and plain.name == 'dlib'


def test_half_precision_inside_and_outside(noise):
    e = small()
    exact = jittered(e, 4).encode(noise)
    for h in (jittered(half_encoder(e), 4), half_encoder(jittered(e, 4))):
        assert np.abs(h.encode(noise) - exact).max() < .05*np.abs(exact).max()
