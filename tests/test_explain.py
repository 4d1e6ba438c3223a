"facelab.explain: squares, occlusion, Grad-CAM, the checks of maps, and what is refused."
import sys
from unittest.mock import patch

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from facelab import explain as ex
from facelab.crop import NoFace
from facelab.embed import Encoder, Tower
from facelab.models.baselines import gradients_encoder, pixels_encoder
from facelab.models.dlib_resnet import DlibResNet
from facelab.train import SiameseNet, create_body, resnet18


class Small(nn.Module):
    "Two convolutions and a mean: (n, 3, 32, 32) to (n, 8)"
    def __init__(self):
        super().__init__()
        self.maps = nn.Sequential(nn.Conv2d(3, 6, 3, 2, 1), nn.ReLU(inplace=True), nn.Conv2d(6, 8, 3, 2, 1), nn.ReLU(inplace=True))
    def forward(self, x): return self.maps(x).mean((2, 3))


@pytest.fixture
def small():
    torch.manual_seed(0)
    return Encoder(Small(), 'small', 32, 8, 'euclidean', device='cpu')


@pytest.fixture
def pictures():
    return [o for o in np.random.default_rng(0).integers(0, 256, (3, 40, 36, 3), dtype=np.uint8)]


@pytest.mark.parametrize('size,side,step', [(150, .2, .1), (150, .2, .13), (7, .5, .3), (32, 1, 1), (10, .01, .01)])
def test_squares_cover_everything(size, side, step):
    m = ex.squares(size, side, step)
    assert m.dtype == torch.bool and m.any(0).all() and len({int(o.sum()) for o in m}) == 1


@pytest.mark.parametrize('side,step', [(0, 0), (.1, .2), (1.2, .1), (.2, 0), (.2, -.1)])
def test_squares_refuse(side, step):
    with pytest.raises(ValueError, match='shares of the picture'): ex.squares(20, side, step)


@pytest.mark.parametrize('metric', ['euclidean', 'cosine', 'l1'])
@pytest.mark.parametrize('fill', [None, 'blur', 90])
def test_occlusion_against_a_plain_loop(small, pictures, metric, fill):
    small.metric = metric
    a, b = [ex.fit_size(o, 32) for o in pictures[:2]], pictures[1:]
    got = ex.occlusion_maps(a, b, small, .5, .25, fill, bs=4)
    colour = ex._colour(small, fill)
    for face, other, mp in zip(a, b, got):
        x, v, total, count = small.batch([face])[0], small.encode([other]), np.zeros((32, 32)), np.zeros((32, 32))
        score = lambda x: ex.row_similarity(small.module(x[None]).detach().numpy(), v, metric)[0]
        for top in range(0, 17, 8):
            for left in range(0, 17, 8):
                y, here = x.clone(), np.zeros((32, 32), bool)
                here[top:top + 16, left:left + 16] = True
                grey = x.mean((1, 2), keepdim=True) if colour is None else ex._blurred(x[None])[0] if fill == 'blur' else colour
                y[:, here] = grey.expand_as(y)[:, here]
                total[here] += score(x) - score(y); count[here] += 1
        np.testing.assert_allclose(mp, total/count, atol=2e-5)


def test_occlusion_takes_any_size_mode_and_encoder(pictures):
    grey, wide = Image.new('L', (30, 90), 80), Image.new('RGBA', (200, 50), (9, 99, 200, 128))
    for e in (pixels_encoder(16), gradients_encoder(16)):
        assert ex.occlusion_maps([grey, wide, pictures[0]], pictures, e, .5, .5).shape == (3, 16, 16)
    flat = ex.occlusion_maps([grey], [grey], pixels_encoder(16), .5, .5)
    assert np.isfinite(flat).all() and not flat.any()
    with pytest.raises(ValueError, match='2 faces and 3 others'): ex.occlusion_maps(pictures[:2], pictures, pixels_encoder(16))


def test_cam_is_the_formula(small, pictures):
    "alpha = mean gradient, map = relu(sum alpha A), for frozen weights too"
    e = small
    e.module.requires_grad_(False)
    x, ref = e.batch(pictures), torch.from_numpy(e.encode(pictures[::-1]))
    a = e.module.maps(x).detach().requires_grad_()
    ex.pair_target(ref, 'euclidean')(a.mean((2, 3))).sum().backward()
    want = (a.grad.mean((2, 3), keepdim=True)*a).sum(1)
    got = ex.cam(e.module, x, ex.pair_target(ref, 'euclidean'), 'maps', positive=False)
    big = torch.nn.functional.interpolate(want[:, None], (32, 32), mode='bilinear')[:, 0].detach().numpy()
    np.testing.assert_allclose(got, big, atol=1e-6)
    np.testing.assert_allclose(ex.cam(e.module, x, ex.pair_target(ref, 'euclidean'), e.module.maps[3], positive=True), np.maximum(got, 0), atol=.02)
    np.testing.assert_allclose(ex.pair_cams(pictures[:1], pictures[2:], e)[0], ex.pair_cams(pictures, pictures[::-1], e)[0], atol=1e-6)


def test_cam_of_a_photo_with_itself_is_finite(small, pictures):
    assert np.isfinite(ex.pair_cams(pictures, pictures, small)).all()


def test_layers():
    with torch.no_grad():
        assert [h for _, _, h, _ in ex.trunk_maps(DlibResNet(), torch.zeros(1, 3, 150, 150))][-1] == 2
        net = SiameseNet(create_body(resnet18(weights=None), pretrained=False), 512)
        for m, x, want in ((Tower(net), 160, 'model.body'), (Tower(net), 96, 'model.body.6')):
            found = ex.cam_layer(m, torch.zeros(1, 3, x, x))
            assert ex.cam(m, torch.zeros(2, 3, x, x), lambda v: v[:, 0]).shape == (2, x, x)
            assert [n for n, o in m.named_modules() if o is found] == [want]


def test_layers_refused(pictures):
    for e in (pixels_encoder(16), gradients_encoder(16)):
        with pytest.raises(ValueError, match='no convolutional layer.*use occlusion_maps'): ex.pair_cams(pictures, pictures, e)
    net = nn.Sequential(nn.Conv2d(3, 2, 3, 8), nn.Flatten())
    with pytest.raises(ValueError, match="layer='0'"): ex.cam(net, torch.zeros(1, 3, 32, 32), lambda v: v[:, 0])
    with pytest.raises(ValueError, match="no layer 'head'"): ex.cam(net, torch.zeros(1, 3, 32, 32), lambda v: v[:, 0], 'head')


def test_hooks_are_gone(small, pictures):
    ex.pair_cams(pictures, pictures[::-1], small)
    assert not any(m._forward_hooks or m._backward_hooks for m in small.module.modules())
    class Broken(nn.Module):
        def __init__(self): super().__init__(); self.conv = nn.Conv2d(3, 2, 3)
        def forward(self, x): self.conv(x); raise RuntimeError('no')
    b = Broken()
    with pytest.raises(RuntimeError): ex.trunk_maps(b, torch.zeros(1, 3, 8, 8))
    assert not b.conv._forward_hooks


def test_package_absent(small, pictures):
    with patch.dict(sys.modules, {'captum.attr': None, 'captum': None}):
        with pytest.raises(ImportError, match=r"pip install 'facelab\[explain\]'"): ex.pair_cams(pictures, pictures, small)
        assert ex.occlusion_maps(pictures, pictures, small, .5, .5).shape == (3, 32, 32)


def test_shuffle(small, pictures):
    before = {k: v.clone() for k, v in small.module.state_dict().items()}
    a, b, c = ex.shuffle_weights(small), ex.shuffle_weights(small), ex.shuffle_weights(small, seed=1)
    assert all((before[k] == v).all() for k, v in small.module.state_dict().items())
    np.testing.assert_array_equal(a.encode(pictures), b.encode(pictures))
    assert np.abs(a.encode(pictures) - c.encode(pictures)).max() > 1e-3
    for k, v in a.module.state_dict().items(): assert torch.equal(v.flatten().sort()[0], before[k].flatten().sort()[0])
    part = ex.shuffle_weights(small, 'maps.2')
    assert torch.equal(part.module.maps[0].weight, before['maps.0.weight']) and not torch.equal(part.module.maps[2].weight, before['maps.2.weight'])


def test_curves_begin_and_end_alike(small, pictures):
    maps = np.random.default_rng(0).normal(size=(3, 20, 20))
    down, up = (ex.cover_curves(pictures, pictures[::-1], maps, small, 4, 4, r) for r in (False, True))
    assert down.shape == (3, 5)
    np.testing.assert_allclose(down[:, 0], up[:, -1], atol=1e-6); np.testing.assert_allclose(down[:, -1], up[:, 0], atol=1e-6)
    np.testing.assert_allclose(down[:, 0], ex.row_similarity(small.encode(pictures), small.encode(pictures[::-1]), 'euclidean'), atol=1e-5)
    opposite = ex.cover_curves(pictures, pictures[::-1], -maps, small, 4, 4, True)
    np.testing.assert_allclose(down, opposite[:, ::-1], atol=1e-6)


def test_intervals_and_regions():
    assert ex.mean_interval([1, 1, 1]) == (1, 1, 1)
    assert ex.mean_interval([1, 3, 5, 7], [0, 0, 1, 1])[0] == 4
    with pytest.raises(ValueError, match='not 1'): ex.mean_interval([1, np.nan])
    for size, align in ((32, 'chip'), (150, 'chip'), (168, 'wide')):
        assert (sum(m.astype(int) for m in ex.region_masks(size, align).values()) == 1).all()
    t = ex.region_table(np.ones((2, 50, 50)))
    np.testing.assert_allclose(t.ratio, 1); np.testing.assert_allclose(t.area.sum(), 1)
    with pytest.raises(ValueError, match='aligned faces only'): ex.region_table(np.ones((2, 50, 50)), 'margin')


def test_likeness():
    a = np.random.default_rng(0).normal(size=(2, 16, 16))
    np.testing.assert_allclose(ex.map_likeness(a, 2*a + 1, 4), 1)
    assert np.isnan(ex.map_likeness(a, np.zeros_like(a))).all()


def test_pair_without_a_face(face):
    flat = Image.new('RGB', (80, 80), 'grey')
    with pytest.raises(NoFace, match='the right photo'): ex.explain_pair(face, flat, pixels_encoder(), detector='hog')
    with pytest.raises(NoFace, match='the left photo'): ex.explain_pair(flat, face, pixels_encoder(), detector='hog')
    with pytest.raises(ValueError, match="not 'shap'"): ex.explain_pair(face, face, pixels_encoder(), method='shap')


def test_pair(face):
    got = ex.explain_pair(face, face, pixels_encoder(), detector='hog', step=.2, threshold=.5)
    assert got.match and abs(got.score - 1) < 1e-5 and got.maps.shape == (2, 32, 32) and 'match' in repr(got)
    np.testing.assert_allclose(got.maps[0], got.maps[1])
    fig = ex.plot_maps(got.faces, got.maps, ncols=1)
    assert len(fig.axes) == 3
