"dlib's CNN face detector in PyTorch: the boxes of dlib, for photos of every size."
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from facelab.datasets import data_root, lfw
from facelab.detect import Box, cnn_dlib, detect, detect_many, dlib_file, get_detector, hog
from facelab.images import load_image
from facelab.models.dlib_mmod import Mmod, OneFilter, adaptive, cnn, compare_boxes, double_size, mmod_net, pyramid_canvas, read_mmod, suppress, tile_pyramid


@pytest.fixture(scope='module')
def theirs():
    import dlib
    return dlib.cnn_face_detection_model_v1(str(dlib_file('mmod_human_face_detector.dat')))


@pytest.fixture(scope='module')
def mmod(): return Mmod()


def page(att, size, n):
    "`n` portraits, each `size` pixels wide, side by side"
    out = Image.new('RGB', (size*n, size*112//92))
    for i in range(n): out.paste(load_image(att.path[i*30]).resize((size, size*112//92)), (i*size, 0))
    return np.array(out)


def same(found, wanted):
    boxes, scores = found
    assert boxes.tolist() == [[o.rect.left(), o.rect.top(), o.rect.right(), o.rect.bottom()] for o in wanted]
    np.testing.assert_allclose(scores, [o.confidence for o in wanted], atol=2e-3)


@pytest.mark.parametrize('size, n, upsample', [(184, 1, 0), (92, 3, 1), (60, 4, 1), (40, 5, 2), (151, 2, 0), (263, 2, 0), (500, 1, 0)])
def test_boxes_of_dlib(att, theirs, mmod, size, n, upsample):
    image = page(att, size, n)
    wanted = theirs(image, upsample)
    assert len(wanted) >= 1
    same(mmod.boxes([image], upsample)[0], wanted)


@pytest.mark.parametrize('h, w', [(97, 131), (60, 300), (300, 60), (80, 80), (250, 249)])
def test_odd_sizes(att, theirs, mmod, h, w):
    image = np.array(load_image(att.path[0]).resize((w, h)))
    same(mmod.boxes([image])[0], theirs(image, 0))
    same(mmod.boxes([image], 1)[0], theirs(image, 1))


@pytest.mark.parametrize('h, w', [(8, 8), (9, 200), (200, 9)])
def test_tiny_photos(att, mmod, h, w):
    "dlib's own detector fails on these, or worse, writes over memory that is not its own: it must not be asked here"
    image = np.array(load_image(att.path[0]).resize((w, h)))
    for upsample in (0, 1): assert len(mmod.boxes([image], upsample)[0][0]) == 0


def test_many_sizes_at_once(att, mmod):
    photos = [page(att, s, 1) for s in (184, 150, 184, 200, 150, 184)]
    for (a, s), (b, t) in zip(mmod.boxes(photos), [mmod.boxes([o])[0] for o in photos]):
        assert (a == b).all()
        np.testing.assert_allclose(s, t, atol=1e-4)
    assert mmod.boxes([]) == []


def test_threshold(att, mmod):
    image = page(att, 184, 1)
    few, many = mmod.boxes([image], threshold=.5)[0], mmod.boxes([image], threshold=-1.)[0]
    assert len(few[1]) <= 1 <= len(many[1]) and (many[1] > -1).all() and not len(mmod.boxes([image], threshold=9.)[0][1])


@pytest.mark.skipif(not (data_root()/'lfw_home').is_dir(), reason='LFW is not in FACELAB_DATA')
def test_boxes_of_dlib_on_lfw():
    photos = [np.array(load_image(p)) for p in lfw().sample(24, random_state=3).path]
    result = compare_boxes([[f.box for f in o] for o in detect_many(photos, 'cnn', 0)], [[f.box for f in cnn_dlib(o, 0)] for o in photos])
    assert result['matched'] == result['theirs'] >= 24 and result['added'] == 0


def test_from_several_threads(att):
    photos = [page(att, s, 1) for s in (184, 170, 160, 150)]*3
    with ThreadPoolExecutor(4) as pool: found = list(pool.map(lambda o: [f.box for f in cnn(o, 0)], photos))
    assert found == [[f.box for f in cnn(o, 0)] for o in photos]


def test_by_name(att):
    assert get_detector('cnn') is cnn and detect(att.path[0], 'cnn')[0].landmarks.shape == (5, 2)
    grey = load_image(att.path[0]).convert('L')
    assert [f.box for f in detect(grey, 'cnn')] == [f.box for f in detect(att.path[0], 'cnn')]


def test_adaptive_is_the_cheap_look_or_the_close_one(att):
    large, small = page(att, 184, 2), page(att, 62, 3)
    assert [f.box for f in adaptive(large)] == [f.box for f in cnn(large, 0)]
    assert cnn(small, 0) == [] and len(adaptive(small)) >= max(len(hog(small, 1)), len(cnn(small, 1))) >= 2
    assert adaptive(small, 0) == [] and adaptive(np.full((90, 90, 3), 99, np.uint8)) == []


def test_half_precision_moves_boxes_by_a_cell_at_most(att, mmod):
    half = Mmod(dtype=torch.bfloat16)
    photos = [page(att, 184, 1)]
    (a, s), (b, t) = mmod.boxes(photos)[0], half.boxes(photos)[0]
    assert len(a) == len(b) and abs(s - t).max() < .1 and abs(a - b).max() < 40


def test_double_size_against_a_loop():
    x = np.random.default_rng(0).integers(0, 256, (5, 4, 3))
    got = double_size(torch.from_numpy(x.astype(np.uint8))[None])[0].numpy()
    for r in range(11):
        for c in range(10):
            y, z = r*4/10, c*3/9
            i, j = min(int(y), 3), min(int(z), 2)
            wanted = (x[i, j]*(1 - (z - j)) + x[i, j + 1]*(z - j))*(1 - (y - i)) + (x[i + 1, j]*(1 - (z - j)) + x[i + 1, j + 1]*(z - j))*(y - i)
            assert np.abs(got[r, c] - np.floor(wanted + 1e-6)).max() <= 1


def test_suppress_against_a_loop():
    rng = np.random.default_rng(1)
    for _ in range(20):
        corner, side = rng.integers(0, 60, (12, 2)), rng.integers(5, 40, (12, 2))
        boxes, scores = np.hstack([corner, corner + side]), rng.random(12)
        def apart(a, b):
            w, h = min(a[2], b[2]) - max(a[0], b[0]) + 1, min(a[3], b[3]) - max(a[1], b[1]) + 1
            around = (max(a[2], b[2]) - min(a[0], b[0]) + 1)*(max(a[3], b[3]) - min(a[1], b[1]) + 1)
            return not (w > 0 and h > 0 and w*h/around > .3)
        keep = []
        for i in sorted(range(12), key=lambda i: -scores[i]):
            if all(apart(boxes[i], boxes[j]) for j in keep): keep.append(i)
        assert suppress(boxes, scores, .3).tolist() == keep


@pytest.mark.parametrize('side', [1, 3, 9])
def test_one_filter(side):
    torch.manual_seed(0)
    w, b, x = torch.randn(1, 6, side, side), torch.randn(1), torch.randn(2, 6, 13, 11)
    torch.testing.assert_close(OneFilter(w, b)(x), F.conv2d(x, w, b, padding=side//2), atol=1e-4, rtol=0)


def test_levels_do_not_touch(mmod):
    for h, w in [(250, 250), (33, 80), (700, 90), (64, 500)]:
        image = torch.full((1, h, w, 3), 255, dtype=torch.uint8)
        canvas, covered = tile_pyramid(image, mmod.mean)[0, 0], np.zeros(pyramid_canvas(h, w)[:2], int)
        for top, left, a, b in pyramid_canvas(h, w).levels: covered[top:top + a, left:left + b] += 1
        assert covered.max() == 1 and ((canvas.numpy() != 0) == (covered == 1)).all()


def test_the_file_is_read_to_its_end():
    net = read_mmod()
    assert sum(p.numel() for p in mmod_net(net['layers']).parameters()) == sum(o['weight'].size + len(o['bias']) for o in net['layers'] if o['kind'] == 'con_4') == 180711
    with pytest.raises(FileNotFoundError): read_mmod('nowhere.dat')


@pytest.mark.skipif(not torch.cuda.is_available(), reason='no GPU')
def test_on_a_gpu(att, theirs):
    image = page(att, 184, 2)
    assert compare_boxes([[Box(t, r, b, l) for l, t, r, b in Mmod(device='cuda').boxes([image])[0][0].tolist()]], [[f.box for f in cnn_dlib(image, 0)]])['added'] == 0
