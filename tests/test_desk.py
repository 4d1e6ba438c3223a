"What arrives at a desk: files that are none, names that are traps, two at once, a full disk, and a person who wants to go"
import errno
import io
import json
import os
import stat
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from facelab import desk
from facelab.baserates import fpir_from_fmr
from facelab.calibration import Calibrator
from facelab.datasets import shipped
from facelab.detect import Box, Face, register_detector
from facelab.desk import *
from facelab.embed import Embeddings, Encoder, similarity
from facelab.gallery import Gallery, RecipeMismatch
from facelab.images import REASONS, BadImage
from facelab.intervals import intervals


class Mean(__import__('torch').nn.Module):
    "Means of a grid of 4 x 4 cells of a face"
    def forward(self, x): return __import__('torch').nn.functional.adaptive_avg_pool2d(x, 4).flatten(1)


def squares(image, upsample=1):
    "A face is a square of 40 pixels on a dark ground, wherever the picture is lit"
    a = np.asarray(image).max(2) > 60
    xs = np.flatnonzero(a.any(0)); starts = [x for x in xs if x - 1 not in set(xs)]
    return [Face(Box(10, x + 60, 70, x), 1., None) for x in starts]


def person(seed, noise=0., n=1):
    "A picture with a made-up face; the same seed is the same person"
    out = Image.new('RGB', (90*n, 80))
    for i in range(n):
        cells = np.random.default_rng(seed + i).integers(70, 255, (4, 4, 3)).repeat(15, 0).repeat(15, 1)
        cells = np.clip(cells + np.random.default_rng(99).normal(0, noise, cells.shape), 65, 255)
        out.paste(Image.fromarray(cells.astype(np.uint8)), (90*i + 10, 10))
    return out


@pytest.fixture(scope='module')
def toy():
    register_detector('squares', squares)
    return Encoder(Mean(), 'toy', 64, 48, metric='cosine', align='margin', threshold=.9)


@pytest.fixture
def gallery(toy): return Gallery(toy, 'squares')


def stored(image, kind='PNG', **kw):
    image.save(f := io.BytesIO(), kind, **kw)
    return f.getvalue()


# -- uploads

@pytest.mark.parametrize('data, reason, words', [
    (b'', 'empty', 'nothing in it'), (b'hello', 'not an image', 'text'), ('Grüße'.encode(), 'not an image', 'text'), ('é'.encode()*2000 + b'\xc3', 'not an image', 'text'),
    (b'<svg xmlns="http://www.w3.org/2000/svg"/>', 'not an image', 'text'), (b'\0\0\0\x18ftypmp42' + bytes(50), 'not an image', 'video'), (b'\0\0\0\x14ftypqt  ' + bytes(50), 'not an image', 'video'),
    (b'\x1aE\xdf\xa3' + bytes(50), 'not an image', 'video'), (b'RIFF\0\0\0\0AVI ' + bytes(50), 'not an image', 'video'), (b'%PDF-1.7\n' + bytes(50), 'not an image', 'PDF'), (b'PK\3\4' + bytes(50), 'not an image', 'archive'),
    (bytes(1000), 'not an image', 'no picture that can be read'), (np.random.default_rng(0).bytes(5000), 'not an image', 'no picture'), (None, 'missing', 'none was given'),
    (stored(Image.new('RGB', (300, 300)), 'JPEG')[:400], 'truncated', 'cut short'), (stored(Image.new('1', (6000, 5000))), 'too large', '30.0 million'), (stored(Image.new('L', (400, 4))), 'too small', 'too small')])
def test_what_is_not_a_photo_is_said_in_words(data, reason, words):
    with pytest.raises(BadUpload) as e: check_upload(data)
    assert e.value.reason == reason and reason in REASONS and isinstance(e.value, BadImage)
    assert words in str(e.value) and str(e.value).startswith('the photo: ') and '\n' not in str(e.value)


def test_size_is_counted_while_reading_and_the_limit_itself_is_allowed():
    class Endless:
        name, taken = '/secret/endless.jpg', 0
        def read(self, n=-1): assert n >= 0; self.taken += n; return bytes(n)
    with pytest.raises(BadUpload, match='^endless.jpg: the file is larger than 8 MB'): check_upload(e := Endless())
    assert e.taken == 8*2**20 + 1
    photo = stored(Image.new('RGB', (50, 50)))
    assert check_upload(photo + bytes(1000 - len(photo)), max_mb=1000/2**20).size == (50, 50)
    with pytest.raises(BadUpload, match='larger'): check_upload(photo + bytes(1001 - len(photo)), max_mb=1000/2**20)
    assert check_upload(Image.new('RGB', (1000, 1000)), max_mpx=1).size == (1000, 1000)
    with pytest.raises(BadUpload, match='too many pixels'): check_upload(np.zeros((1001, 1000, 3), np.uint8), max_mpx=1)


def test_names_of_files_lose_their_folders(tmp_path):
    (tmp_path/'me.jpg').write_text('dear desk')
    for name, words in {'me.jpg': 'text', 'gone.jpg': 'no such file', '': 'cannot be opened', 'x'*5000: '', 'nul\0.jpg': ''}.items():
        with pytest.raises(BadUpload) as e: check_upload(tmp_path/name)
        assert words in str(e.value) and str(tmp_path) not in str(e.value) and len(str(e.value)) < 200


def test_animation_orientation_and_metadata():
    a, b = person(1), person(2)
    gif = check_upload(stored(a, 'GIF', save_all=True, append_images=[b, b]))
    assert gif.mode == 'RGB' and np.abs(np.asarray(gif, float) - np.asarray(a, float)).mean() < 12
    exif = Image.Exif(); exif[274] = 6; exif[270] = 'where I live'
    turned = check_upload(stored(a.rotate(90, expand=True), 'JPEG', exif=exif, quality=95))
    assert turned.size == a.size and not turned.info and not turned.getexif()
    assert check_upload(io.BytesIO(stored(a))).size == check_upload(a).size == check_upload(np.asarray(a)).size == a.size


def test_heic_is_read_where_its_package_is_and_named_where_it_is_not(monkeypatch):
    monkeypatch.setitem(sys.modules, 'pillow_heif', None)
    with pytest.raises(BadUpload, match='pip install pillow-heif'): check_upload(b'\0\0\0\x18ftypheic' + bytes(50))
    monkeypatch.undo()
    heif = pytest.importorskip('pillow_heif')
    heif.from_pillow(person(3)).save(f := io.BytesIO(), quality=90)
    assert check_upload(f.getvalue()).size == (90, 80)
    with pytest.raises(BadUpload): check_upload(f.getvalue()[:200])


# -- files

def test_a_busy_gallery(tmp_path):
    file = tmp_path/'new'/'g.npz'
    code = f'import sys\nfrom filelock import FileLock\nl = FileLock({str(tmp_path/"new"/".g.npz.lock")!r}); l.acquire(); print(1, flush=True); input()'
    with gallery_in_use(file):
        with pytest.raises(GalleryBusy, match='g.npz is in use'):
            with gallery_in_use(file): pass
        with gallery_in_use(tmp_path/'new'/'h.npz'): pass
    other = subprocess.Popen([sys.executable, '-c', code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    other.stdout.readline()
    (tmp_path/'link.npz').symlink_to(file)
    for path in file, tmp_path/'link.npz':
        with pytest.raises(GalleryBusy) as e:
            with gallery_in_use(path): pass
        assert str(tmp_path) not in str(e.value)
    other.kill(); other.communicate()
    with pytest.raises(KeyError):
        with gallery_in_use(file): raise KeyError('released in any case')
    with gallery_in_use(file): pass
    assert stat.S_IMODE((tmp_path/'new').stat().st_mode) == 0o700
    (tmp_path/'file').write_text('')
    with pytest.raises(NotKept, match='a file is where the folder should be'):
        with gallery_in_use(tmp_path/'file'/'g.npz'): pass


def test_keep_and_open(tmp_path, gallery, toy):
    file = tmp_path/'g.npz'
    assert len(open_gallery(file)) == 0 and not file.exists()
    enrol_person(gallery, 'Ann', person(1), True)
    assert keep_gallery(gallery, file) == file.resolve() and stat.S_IMODE(file.stat().st_mode) == 0o600
    file.chmod(0o644)
    assert open_gallery(file).people == ['Ann'] and stat.S_IMODE(file.stat().st_mode) == 0o600
    assert open_gallery(file, toy).encoder is toy
    with pytest.raises(RecipeMismatch): open_gallery(file, 'dlib')
    with pytest.raises(NotKept, match='a folder has that name'): open_gallery(tmp_path)
    with pytest.raises(NotKept, match='a folder has that name'): keep_gallery(gallery, tmp_path)
    file.write_bytes(b'rubbish')
    with pytest.raises(ValueError, match='g.npz'): open_gallery(file)


@pytest.mark.parametrize('code, words', [(errno.ENOSPC, 'the disk is full'), (errno.EDQUOT, 'used up'), (errno.EROFS, 'read-only')])
def test_a_full_disk_keeps_the_old_file_and_the_old_gallery(tmp_path, gallery, monkeypatch, code, words):
    file = tmp_path/'g.npz'
    enrol_person(gallery, 'Ann', person(1), True, file)
    before = file.read_bytes()
    def full(fd): raise OSError(code, os.strerror(code))
    monkeypatch.setattr('facelab.embed.os.fsync', full)
    for act in (lambda: keep_gallery(gallery, file), lambda: enrol_person(gallery, 'Bea', person(2), True, file), lambda: forget_person(gallery, file, 'Ann')):
        with pytest.raises(NotKept) as e: act()
        assert str(e.value) == f'g.npz was not written: {words}' or words in str(e.value)
        assert e.value.errno == code and file.read_bytes() == before and os.listdir(tmp_path) == ['g.npz'] and gallery.people == ['Ann'] and gallery.names == ['Ann']
    monkeypatch.undo()
    enrol_person(gallery, 'Bea', person(2), True, file)
    assert open_gallery(file).people == ['Ann', 'Bea']


@pytest.mark.skipif(os.geteuid() == 0, reason='root may write everywhere')
def test_a_folder_that_is_not_ours(tmp_path, gallery):
    tmp_path.chmod(0o500)
    with pytest.raises(NotKept, match='you may not use that folder'): keep_gallery(gallery, tmp_path/'g.npz')
    tmp_path.chmod(0o700)


# -- enrol, forget

@pytest.mark.parametrize('name', ['<img src=x onerror=alert(1)>', '../../x', '"; DROP TABLE', '李雷', 'Zoë', 'Иван', '=1+1', 'a'*80, '%s{0}$x'])
def test_odd_names_are_names(tmp_path, gallery, name):
    file = tmp_path/'g.npz'
    assert list(enrol_person(gallery, name, person(1), True, file).status) == ['ok']
    assert list(recognise(gallery, person(1)).faces['name']) == [name] and name in open_gallery(file)
    assert name in forget_person(gallery, file, name) and os.listdir(tmp_path) == ['g.npz'] and len(gallery) == 0


@pytest.mark.parametrize('name', ['', ' ', '\n', 'a\nb', 'a\0b', 'unknown', 'UNKNOWN ', 'a'*81, 'x'*10_000, 'Ann\u202egpj', 'a\u2028b', '\u2066Ann', None, 5])
def test_what_is_no_name(gallery, name):
    with pytest.raises((ValueError, TypeError)) as e: enrol_person(gallery, name, person(1), True)
    assert len(str(e.value)) < 300 and len(gallery) == 0


def test_accents_are_one_name(gallery):
    enrol_person(gallery, 'Zoe\u0308', person(1), True); enrol_person(gallery, 'Zo\xeb', person(1, 8), True)
    assert len(gallery) == 1 and len(gallery.names) == 2


@pytest.mark.parametrize('consent', [False, None, 1, 'yes', np.True_])
def test_consent_is_true_or_no(gallery, consent):
    with pytest.raises(PermissionError, match='ask first'): enrol_person(gallery, 'Ann', person(1), consent)
    assert len(gallery) == 0


def test_every_photo_has_a_row(gallery, monkeypatch):
    photos = [person(1), b'text', person(1), person(5, n=2), Image.new('RGB', (90, 80)), None, stored(person(1, 8))]
    t = enrol_person(gallery, 'Ann', photos, True)
    assert list(t.status) == ['ok', 'bad image', 'duplicate', 'several faces', 'no face', 'bad image', 'ok'] and list(t.photo) == [f'photo {i}' for i in range(1, 8)]
    assert (t.reason[t.status != 'ok'] != '').all() and gallery.names == ['Ann', 'Ann']
    assert list(enrol_person(gallery, 'Bob', person(5, n=2), True, largest=True).status) == ['ok']
    with pytest.raises(ValueError, match='no photos'): enrol_person(gallery, 'Ann', [], True)
    with pytest.warns(UserWarning, match='same photo'): t = enrol_person(gallery, 'Cy', [person(1)], True)
    assert 'looks like Ann' in t.hints[0] and 'enrolled as' in t.reason[0]
    def broken(*a): raise RuntimeError('the detector fell over')
    monkeypatch.setattr(desk, 'detect', broken)
    t = enrol_person(gallery, 'Dan', person(9), True)
    assert list(t.status) == ['failed'] and 'fell over' in t.reason[0] and 'Dan' not in gallery


def test_forgetting_is_looked_at(tmp_path, gallery, monkeypatch):
    file = tmp_path/'g.npz'
    enrol_person(gallery, 'Ann', [person(1), person(1, 8)], True, file); enrol_person(gallery, 'Bea', person(2), True, file)
    again = open_gallery(file)
    assert forget_person(gallery, file, ' Ann ').startswith('Ann is forgotten: 2 photos removed')
    assert open_gallery(file).names == ['Bea'] and len(open_gallery(file).vectors) == 1 and stat.S_IMODE(file.stat().st_mode) == 0o600
    with pytest.raises(KeyError): forget_person(gallery, file, 'Ann')
    monkeypatch.setattr(Gallery, 'load', classmethod(lambda cls, path, encoder=None: again))
    with pytest.raises(RuntimeError, match='still holds'): forget_person(gallery, file, 'Bea')
    monkeypatch.undo()
    enrol_person(gallery, 'Dora', person(4), True)
    assert 'Dora is forgotten' in forget_person(gallery, tmp_path/'never'/'saved.npz', 'Dora') and (tmp_path/'never'/'saved.npz').exists()


def test_enrolling_while_others_look(gallery, tmp_path):
    enrol_person(gallery, 'p0', person(1000), True)
    wrong, stop = [], threading.Event()
    def looking():
        while not stop.is_set():
            try: assert list(recognise(gallery, person(1000)).faces['name']) == ['p0']
            except BaseException as e: wrong.append(e); return
    def enrolling(k):
        for i in range(6): enrol_person(gallery, f'{k}-{i}', person(2000 + 10*k + i), True, tmp_path/'g.npz')
    lookers, writers = [threading.Thread(target=looking) for _ in range(2)], [threading.Thread(target=enrolling, args=(k,)) for k in range(3)]
    for t in lookers + writers: t.start()
    for t in writers: t.join()
    stop.set()
    for t in lookers: t.join()
    assert not wrong and len(gallery) == 19 and sorted(open_gallery(tmp_path/'g.npz').people) == sorted(gallery.people)


# -- recognise, compare

def test_never_a_name_below_the_threshold(gallery):
    for i in range(4): enrol_person(gallery, f'p{i}', person(100 + i), True)
    picture = person(102, 20, n=3)
    for t in np.linspace(-1, 1, 9):
        seen = recognise(gallery, picture, t, k=2)
        named = seen.faces[seen.faces['name'] != 'unknown']
        assert (named.score >= t).all() and (seen.faces.score[seen.faces['name'] == 'unknown'] < t).all() and (seen.best.score >= t).all()
        assert seen.best.groupby('face').size().le(2).all() and set(named.face) == set(seen.best.face)
        assert not [n for n in gallery.people if n in seen.said and n not in set(named['name'])]
    assert len(seen.faces) == 3 and list(seen.faces) == ['face', 'name', 'score', 'top', 'right', 'bottom', 'left']
    assert seen.picture.mode == 'RGB'


def test_nobody_there_and_nobody_enrolled(gallery):
    seen = recognise(gallery, Image.new('RGB', (300, 200)))
    assert len(seen.faces) == len(seen.best) == 0 and 'No face' in seen.said
    seen = recognise(gallery, person(1, n=2))
    assert list(seen.faces['name']) == ['unknown']*2 and seen.faces.score.isna().all() and 'Nobody is enrolled' in seen.said
    for bad in np.nan, 1.5, np.inf: pytest.raises(ValueError, recognise, gallery, person(1), bad)


def test_boxes_are_in_pixels_of_the_photo(gallery, monkeypatch):
    monkeypatch.setattr(desk, 'detect', lambda image, *a: [Face(Box(10, 60, 50, 20), 1., None)])
    large = Image.new('RGB', (3200, 1600))
    assert recognise(gallery, large).faces.loc[0, ['top', 'right', 'bottom', 'left']].tolist() == [20, 120, 100, 40]


def test_only_a_small_photo_is_searched_twice(monkeypatch):
    asked = []
    monkeypatch.setattr(desk, 'detect', lambda image, name, upsample: asked.append((name, max(image.size), upsample)) or [])
    for detector in 'adaptive', 'hog':
        for side in 640, 641, 4000: recognise(Gallery('dlib', detector), Image.new('RGB', (side, 100)))
    assert asked == [('adaptive', 640, 1), ('adaptive', 641, 0), ('adaptive', 1600, 0), ('hog', 640, 1), ('hog', 641, 1), ('hog', 1600, 1)]


def test_comparing(gallery, toy):
    same, other, none = compare_photos(toy_gallery := gallery, person(1), person(1, 5)), compare_photos(gallery, person(1), person(7)), compare_photos(gallery, Image.new('RGB', (90, 80)), Image.new('RGB', (90, 80)))
    assert same.matched is True and other.matched is False and none.matched is None and np.isnan(none.score) and none.left is None
    assert 'first and the second photo' in none.said and np.isnan(same.probability) and 'nobody has measured' in same.said
    assert same.score == pytest.approx(compare_photos(gallery, person(1, 5), person(1)).score) and same.left.size == (64, 64)
    assert 'largest was taken' in compare_photos(gallery, person(1), person(1, n=2)).said and desk.compare is compare_photos
    assert compare_photos(gallery, person(1), person(7), threshold=-1).matched is True


# -- what was measured

def crowd(people=30, seed=0):
    rng = np.random.default_rng(seed)
    who = np.repeat(np.arange(people), rng.integers(1, 4, people))
    return Embeddings((rng.normal(size=(people, 6))[who] + .6*rng.normal(size=(len(who), 6))).astype(np.float32), [f'p{i:02}' for i in who], dict(metric='cosine', encoder='toy'))


def test_curves_against_a_double_loop():
    emb = crowd()
    one, t = first_photos(emb, 1), [-.5, 0, .3, .7, .95]
    c = error_curves(emb, t)
    s = lambda a, b: float(similarity(a[None], b[None], 'cosine')[0, 0])
    rows = [(s(one.vectors[i], one.vectors[j]), False, one.names[i], one.names[j]) for i in range(len(one)) for j in range(i)]
    rows += [(s(emb.vectors[i], emb.vectors[j]), True, emb.names[i], emb.names[j]) for i in range(len(emb)) for j in range(i) if emb.names[i] == emb.names[j]]
    pairs = pd.DataFrame(rows, columns=['score', 'mated', 'left', 'right'])
    for row in c.itertuples():
        want = intervals(pairs.score, pairs.mated, pairs.left, pairs.right, row.threshold)
        assert [row.fmr, row.fmr_lo, row.fmr_hi] == pytest.approx(want.loc['fmr', ['rate', 'lo', 'hi']].tolist()) and [row.fnmr, row.fnmr_lo, row.fnmr_hi] == pytest.approx(want.loc['fnmr', ['rate', 'lo', 'hi']].tolist())


def test_strangers_against_all_galleries():
    from itertools import combinations
    emb = crowd(14, 3)
    count = pd.Series(emb.names).value_counts()
    refs, new = [emb.vectors[emb.names.index(n)] for n in sorted(count.index[count > 1])], [emb.vectors[emb.names.index(n)] for n in sorted(count.index[count == 1])]
    c = stranger_curves(emb, [.1, .4], [1, 2, 3])
    assert (c['strangers'], c['enrolled']) == (len(new), len(refs))
    hit = similarity(np.stack(new), np.stack(refs), 'cosine')
    for t, row in zip((.1, .4), c['fpir']):
        assert row == pytest.approx([np.mean([(hit[:, list(g)] >= t).any(1).mean() for g in combinations(range(len(refs)), n)]) for n in (1, 2, 3)])


def test_the_shipped_table():
    path = shipped('calibration.json')
    assert path.stat().st_size < 60_000
    d = json.loads(path.read_text())
    assert d['command'] == 'python -m facelab.desk' and [o['recipe']['encoder'] for o in d['systems']] == ['dlib', 'edgeface-xs']
    for o in d['systems']:
        t, f = np.array(o['threshold']), np.array(o['fpir'])
        assert (np.diff(t) > 0).all() and (np.diff(o['fmr']) <= 0).all() and (np.diff(o['fnmr']) >= 0).all() and (np.diff(f, axis=0) <= 1e-9).all() and (np.diff(f, axis=1) >= -1e-3).all()
        for k in 'fmr', 'fnmr', 'fpir': assert (np.array(o[f'{k}_lo']) <= np.array(o[k])).all() and (np.array(o[k]) <= np.array(o[f'{k}_hi'])).all()
        at = np.searchsorted(t, o['fpir_threshold']); formula = fpir_from_fmr(np.array(o['fmr'])[at][:, None], np.array(o['sizes']))
        assert (f <= formula*1.15 + 1e-5).all()  # the formula uses other people's FMR, and is not undercut by much
        assert Calibrator.from_dict(o['calibrator']).recipe == o['recipe'] and (o['counts']['people'], o['strangers'], o['enrolled']) == (5749, 4069, 1680)


def test_meaning_between_beyond_and_outside(monkeypatch, gallery):
    m = dict(threshold=[.2, .4, .6], sizes=[1, 10, 100], fpir_threshold=[.2, .4, .6], fpir=[[.1, .5, .9], [.01, .08, .3], [0, 0, 0]], measured_on='a test', counts={},
             fmr=[.1, .01, 0], fnmr=[0, .1, .5]) | {f'{k}_{e}': [0, 0, 0] for k in ('fmr', 'fnmr') for e in ('lo', 'hi')} | {f'fpir_{e}': [[0, 0, 0]]*3 for e in ('lo', 'hi')}
    monkeypatch.setattr(desk, 'measured', lambda g: m)
    at = lambda t, n: threshold_meaning(gallery, t, n)
    assert [at(.4, n).strangers_per_100 for n in (0, 1, 10, 100)] == pytest.approx([0, 1, 8, 30])
    assert at(.3, 10).fmr == pytest.approx(.055) and at(.3, 10).strangers_per_100 == pytest.approx(100*np.sqrt(.5*.08)) and 8 < at(.4, 50).strangers_per_100 < 30
    assert at(.4, 500).strangers_per_100 == pytest.approx(100*(1 - .99**500)) and 'at most' in at(.4, 500).said
    assert at(.6, 100).strangers_per_100 == 0
    for t in -.1, .19, .61, 1: assert np.isnan(at(t, 10).fmr) and 'measured from 0.2 to 0.6' in at(t, 10).said
    for t in np.nan, 1.2: pytest.raises(ValueError, at, t, 10)
    enrol_person(gallery, 'Ann', person(1), True)
    assert threshold_meaning(gallery, .4).strangers_per_100 == pytest.approx(1) and 'gallery of 1 person ' in threshold_meaning(gallery, .4).said


def test_no_number_for_what_nobody_measured(gallery, monkeypatch):
    assert measured(gallery) is None
    m = threshold_meaning(gallery, .5, 10)
    assert np.isnan([m.fmr, m.fnmr, m.strangers_per_100]).all() and m.measured_on == '' and 'nobody has measured' in m.said
    assert measured('dlib') and measured(Gallery('dlib', 'adaptive', upsample=2)) is None and measured(Gallery('dlib', 'hog')) is None
    monkeypatch.setattr(desk, 'weights_digest', lambda e: 'other')
    assert measured('dlib') is None
    monkeypatch.undo(); desk._tables.cache_clear()
    def gone(name): raise FileNotFoundError(name)
    monkeypatch.setattr(desk, 'shipped', gone)
    assert measured('dlib') is None
    desk._tables.cache_clear()


# -- folders

def test_a_folder_of_people(tmp_path, toy, monkeypatch):
    monkeypatch.setattr(desk, 'embed_folder', lambda t, dest, e, **kw: __import__('facelab.folder').folder.embed_folder(t, dest, e, 'squares', workers=1, **kw))
    monkeypatch.setenv('FACELAB_CACHE', str(tmp_path/'cache'))
    for i in range(16):
        (tmp_path/'people'/f'p{i:02}').mkdir(parents=True)
        for k in range(10): person(50*i, 3*k).save(tmp_path/'people'/f'p{i:02}'/f'{k}.png')
    Image.new('RGB', (90, 80)).save(tmp_path/'people'/'p00'/'dark.png'); (tmp_path/'people'/'p01'/'odd.jpg').write_text('no photo')
    r = evaluate_people(tmp_path/'people', toy)
    assert '16 people, 162 photos' in r.said and 'chosen on other people' in r.said and 'strangers who get a name' in r.said and str(tmp_path) not in r.said
    assert sorted(r.lost.status) == ['bad image', 'no face'] and sorted(r.lost.photo) == ['dark.png', 'odd.jpg'] and not (tmp_path/'cache').exists()
    assert r.table.set_index('measure').loc['rank1', 'n'] == 146 and r.figure.axes
    with pytest.raises(ValueError): evaluate_people(tmp_path/'people'/'p00', toy)
    __import__('matplotlib.pyplot').pyplot.close('all')


def test_latency_of_what_is_here(toy):
    t = measure_latency([toy, 'gone', '/no/such/file.onnx'], n=3)
    assert list(t.encoder) == ['toy', 'gone', '/no/such/file.onnx'] and t.ms_per_face[0] > 0 and t.ms_alone[0] > 0 and t.ms_per_face[1:].isna().all() and (t.reason[1:] != '').all()


def test_nothing_of_gradio_here():
    assert len(desk.__all__) <= 45 and 'gradio' not in Path(desk.__file__).read_text()
