"Encoders without a network: pixels, eigenfaces, gradients."
import json

import cv2
import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.decomposition import PCA

from facelab.embed import encoders, get_encoder, save_npz
from facelab.models.baselines import GradientHistograms, GreyPixels, eigenfaces_encoder, fit_eigenfaces, gradients_encoder, load_eigenfaces, pixels_encoder, save_eigenfaces


@pytest.fixture(scope='module')
def faces(att): return [Image.open(p).convert('RGB') for p in att.path[:200:4]]


def test_pixels_are_correlation(faces):
    v = pixels_encoder(24).encode(faces[:6])
    flat = np.array([np.asarray(f.resize((24, 24), Image.Resampling.LANCZOS), float).mean(2).ravel() for f in faces[:6]])
    assert np.allclose(v @ v.T, np.corrcoef(flat), atol=1e-4)


def test_pixels_ignore_brightness_and_contrast(faces):
    a = np.asarray(faces[0].resize((32, 32)))
    v = pixels_encoder().encode([a, (a*.5 + 60).astype(np.uint8)])
    assert v[0] @ v[1] > .999


def test_a_flat_picture_is_no_nan():
    for e in (pixels_encoder(), gradients_encoder()): assert np.isfinite(e.encode([np.full((96, 96, 3), 7, np.uint8)])).all()


@pytest.mark.parametrize('whiten', [True, False])
def test_eigenfaces_are_sklearns(faces, whiten):
    e = fit_eigenfaces(faces[:40], 10, 20, whiten)
    x = np.array([np.asarray(f.resize((20, 20), Image.Resampling.LANCZOS), float).mean(2).ravel()/255 for f in faces])
    x -= x.mean(1, keepdims=True)
    pca = PCA(10, svd_solver='full', whiten=whiten).fit(x[:40])
    with torch.inference_mode(): got = e.module(e.batch(faces)).numpy()
    assert np.allclose(got, pca.transform(x), atol=2e-3)


def test_eigenfaces_do_not_depend_on_the_run(faces):
    a, b = (fit_eigenfaces(faces[:30], 8, 16) for _ in range(2))
    assert np.array_equal(a.encode(faces[30:]), b.encode(faces[30:]))


@pytest.mark.parametrize('dim,n', [(0, 10), (10, 10), (3, 0), (1, 1)])
def test_too_few_faces(faces, dim, n):
    with pytest.raises(ValueError, match='need more than'): fit_eigenfaces(faces[:n], dim)


def test_saved_and_loaded(faces, tmp_path):
    e = fit_eigenfaces(faces[:30], 8, 16, name='mine', align='margin')
    back = load_eigenfaces(save_eigenfaces(e, tmp_path/'e.npz'))
    assert np.array_equal(back.encode(faces[30:]), e.encode(faces[30:])) and (back.name, back.align, back.size, back.dim) == ('mine', 'margin', 16, 8)
    assert eigenfaces_encoder(tmp_path/'e.npz').name == 'mine'


def test_foreign_and_damaged_files(tmp_path):
    good = dict(weight=np.ones((2, 9), np.float32), bias=np.ones(2, np.float32), about=np.array(json.dumps(dict(size=3, name='x', align='chip'))))
    for change in (dict(bias=np.ones(3)), dict(weight=np.ones((2, 8))), dict(about=np.array('no json')), dict(about=np.array('{}')), dict(about=np.array('[1]')), dict(weight=np.ones(4))):
        with pytest.raises(ValueError, match='e.npz'): load_eigenfaces(save_npz(tmp_path/'e.npz', **good | change))
    with pytest.raises(ValueError, match='lacks'): load_eigenfaces(save_npz(tmp_path/'e.npz', weight=np.ones((2, 9))))
    (tmp_path/'e.npz').write_bytes(b'PK\x03\x04 cut short')
    with pytest.raises(ValueError, match='e.npz'): load_eigenfaces(tmp_path/'e.npz')
    with pytest.raises(FileNotFoundError): load_eigenfaces(tmp_path/'absent.npz')
    np.savez(tmp_path/'e.npz', weight=np.array([object()]), bias=np.ones(1), about=good['about'])
    with pytest.raises(ValueError, match='pickle'): load_eigenfaces(tmp_path/'e.npz')


def slow_cells(grey, cell, bins):
    "Histograms by loops over pixels"
    p = np.pad(grey, 1, mode='edge')
    h = np.zeros((bins, grey.shape[0]//cell, grey.shape[1]//cell))
    for i in range(grey.shape[0]//cell*cell):
        for j in range(grey.shape[1]//cell*cell):
            dx, dy = p[i + 1, j + 2] - p[i + 1, j], p[i + 2, j + 1] - p[i, j + 1]
            place = (np.arctan2(dy, dx) % np.pi)/np.pi*bins
            k, part = int(place) % bins, place - int(place)
            h[k, i//cell, j//cell] += np.hypot(dx, dy)*(1 - part)/cell**2
            h[(k + 1) % bins, i//cell, j//cell] += np.hypot(dx, dy)*part/cell**2
    return h


def test_histograms_by_loops():
    x = np.random.default_rng(0).random((16, 24)).astype(np.float32)
    got = GradientHistograms(8, 9).cells(torch.from_numpy(x).expand(1, 3, 16, 24))[0].numpy()
    assert np.allclose(got, slow_cells(x, 8, 9), atol=1e-4)


def test_near_opencvs_hog(faces):
    "OpenCV weighs pixels by place and shares them between cells, so the numbers differ; which faces are alike does not"
    d = cv2.HOGDescriptor((96, 96), (16, 16), (8, 8), (8, 8), 9)
    grey = [np.asarray(f.resize((96, 96)).convert('L')) for f in faces]
    theirs = np.array([d.compute(g).ravel() for g in grey]); theirs /= np.linalg.norm(theirs, axis=1, keepdims=True)
    ours = gradients_encoder().encode(grey)
    i = np.triu_indices(len(faces), 1)
    assert np.corrcoef((theirs @ theirs.T)[i], (ours @ ours.T)[i])[0, 1] > .9 and theirs.shape == ours.shape


def test_gradients_ignore_light(faces):
    a = np.asarray(faces[0].resize((96, 96)), float)
    v = gradients_encoder().encode([a.astype(np.uint8), (a*.6 + 40).astype(np.uint8)])
    assert v[0] @ v[1] > .97


def test_gradients_sizes():
    assert gradients_encoder(64, 16).dim == 9*36
    for size, cell in ((100, 8), (8, 8)):
        with pytest.raises(ValueError, match='cells'): gradients_encoder(size, cell)


def test_grey_is_grey(): assert GreyPixels()(torch.rand(2, 3, 4, 5)).shape == (2, 20)


def test_registered():
    assert {'pixels', 'gradients', 'eigenfaces'} <= set(encoders())
    assert [get_encoder(n).name for n in ('pixels', 'gradients')] == ['pixels', 'gradients']
