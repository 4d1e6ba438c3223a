"From photo files to vectors: the same numbers as the slow road, and nothing lost whatever happens."
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

import facelab.detect as D
from facelab.crop import take_face
from facelab.datasets import data_root, photos_in
from facelab.detect import Box, Face, detect, iou, register_detector
from facelab.embed import Embeddings, Encoder, get_encoder
from facelab.folder import embed_cached, embed_folder, load_photo, measure_photos, read_done, read_row, weights_digest, write_row
from facelab.gallery import Gallery
from facelab.images import load_image, load_scaled


class Means(torch.nn.Module):
    "An encoder that takes no time: the mean of each colour"
    def forward(self, x): return x.mean((2, 3))


QUICK = Encoder(Means(), 'means', 16, 3, metric='euclidean', align='margin')


def run(source, dest=None, **kw): return embed_folder(source, dest, **{**dict(encoder=QUICK, detector='quick', workers=1), **kw})


def table(paths): return pd.DataFrame(dict(path=[str(o) for o in paths], person='Ann'))


# ---- the same numbers

def test_the_slow_road(att):
    paths = list(att.path[::40])
    found = embed_folder(table(paths), detector='cnn', workers=1)
    slow = get_encoder('dlib').encode([take_face(p, 'chip', 150, 'cnn')[0] for p in paths])
    assert np.abs(found.vectors - slow).max() < 2e-6 and found.recipe == Gallery(detector='cnn').recipe
    assert [b for b in found.faces.box] == [detect(p, 'cnn')[0].box for p in paths]


def test_one_process_or_two(att):
    paths = table(att.path[:300:10])
    one, two = (embed_folder(paths, workers=n) for n in (1, 2))
    assert np.abs(one.vectors - two.vectors).max() < 2e-6 and one.names == two.names and one.paths == two.paths
    pd.testing.assert_frame_equal(one.report.drop(columns='seconds'), two.report.drop(columns='seconds'))
    pd.testing.assert_frame_equal(one.faces, two.faces)


def test_same_vectors_as_face_recognition_on_its_boxes(att):
    import face_recognition
    far = []
    for p in att.path[::20]:
        image = np.array(load_image(p))
        found = embed_folder(table([p]), detector='hog', faces='all', workers=1)
        assert sorted(tuple(b) for b in found.faces.box) == sorted(face_recognition.face_locations(image))
        far += [np.linalg.norm(found.vectors[i] - face_recognition.face_encodings(image, [tuple(b)])[0]) for i, b in enumerate(found.faces.box)]
    assert np.median(far) < 1e-5    # landmarks of a box that was cut at the edge may differ


@pytest.mark.skipif(not (data_root()/'photos').is_dir(), reason='group photos are not in FACELAB_DATA')
def test_never_fewer_faces_than_face_recognition_in_group_photos():
    import face_recognition
    paths = [p for p in photos_in(data_root()/'photos') if Path(p).parent.name == 'photos' and max(Image.open(p).size) < 1300]
    found = embed_folder(table(paths), faces='all', workers=1)
    theirs = [len(face_recognition.face_locations(np.array(load_image(p)))) for p in paths]
    assert len(paths) > 8 and all(found.report.n_faces >= theirs), (found.report.n_faces.tolist(), theirs)


def test_gallery_takes_it(att):
    found = embed_folder(att.iloc[:30:5], workers=1)
    gallery = Gallery(detector='adaptive')
    gallery.add(found)
    assert set(gallery.people) == set(found.names)


# ---- large photos

def test_boxes_are_of_the_original(att, tmp_path):
    big = load_image(att.path[0]).resize((92*16, 112*16), Image.Resampling.BICUBIC)
    big.save(tmp_path/'big.jpg', quality=95)
    full, small = (measure_photos([tmp_path/'big.jpg'], 'dlib', detector='cnn', upsample=0, max_side=m)[0] for m in (3000, 450))
    assert iou(Box(*full['boxes'][0]), Box(*small['boxes'][0])) > .7 and np.linalg.norm(full['vectors'] - small['vectors']) < .4


@pytest.mark.parametrize('tag', range(1, 9))
def test_scaled_is_upright(face, tag, tmp_path):
    exif = Image.Exif(); exif[274] = tag
    face.resize((1472, 1792)).save(tmp_path/'a.jpg', exif=exif, quality=95)
    small, scale = load_scaled(tmp_path/'a.jpg', 400)
    whole = load_image(tmp_path/'a.jpg')
    assert max(small.size) == 400 and abs(scale - 4.48) < .01 and (small.width > small.height) == (whole.width > whole.height)
    assert np.abs(np.asarray(small, float) - np.asarray(whole.resize(small.size, Image.Resampling.BOX), float)).mean() < 3


def test_a_photo_too_large_to_decode_whole(tmp_path):
    Image.new('L', (12_000, 9_000), 128).save(tmp_path/'huge.jpg')
    assert load_photo(tmp_path/'huge.jpg', 3000)['image'].shape == (2250, 3000, 3)
    assert load_image(tmp_path/'huge.jpg', max_pixels=2e8).size == (12_000, 9_000)


# ---- bad files

@pytest.mark.parametrize('workers', [1, 2])
def test_bad_files_in_the_middle(bad_files, att, workers):
    bad = [(str(o), reason) for reason, paths in bad_files.items() for o in paths]
    good = [(p, '') for p in att.path[:len(bad)*3]]
    rows = [row for i, b in enumerate(bad) for row in (*good[i*3:i*3 + 3], b)]
    r = embed_folder(table([p for p, _ in rows]), encoder=QUICK, detector='cnn', workers=workers).report
    assert r.path.tolist() == [p for p, _ in rows] and r.reason.tolist() == [o for _, o in rows]
    assert [s == 'bad image' for s in r.status] == [bool(o) for _, o in rows]


def test_nobody_and_everybody(att, tmp_path):
    page = Image.new('RGB', (184*3, 224))
    for i in range(3): page.paste(load_image(att.path[i*10]).resize((184, 224)), (i*184, 0))
    page.save(tmp_path/'page.png'); Image.new('RGB', (100, 100), 'white').save(tmp_path/'wall.png')
    one, every = (embed_folder(table([tmp_path/'wall.png', tmp_path/'page.png']), faces=o, workers=1) for o in ('largest', 'all'))
    assert one.report.status.tolist() == ['no face', 'ok'] and one.report.row.tolist() == [-1, 0] and (len(one), len(every)) == (1, 3)
    assert every.report.n_faces.tolist() == one.report.n_faces.tolist() == [0, 3] and every.names == ['Ann']*3


def test_nothing(quick, tmp_path):
    found = run(table([]), tmp_path/'nothing.npz')
    assert len(found) == 0 and found.report.empty and len(Embeddings.load(tmp_path/'nothing.npz')) == 0


@pytest.mark.parametrize('kw, text', [(dict(faces='both'), "'central' or 'all'"), (dict(max_side=20), '80 or more'), (dict(detector='magic'), 'no detector named'), (dict(encoder='magic'), 'no encoder named'), (dict(workers=-1), 'at least one worker')])
def test_refused(quick, att, kw, text):
    with pytest.raises(ValueError, match=text): run(table(att.path[:3]), **kw)


def test_images_in_memory_are_refused(quick):
    with pytest.raises(ValueError, match='reads files'): run([np.zeros((50, 50, 3), np.uint8)])


# ---- resume

def test_only_what_is_new_or_changed(quick, att, tmp_path):
    folder, dest = tmp_path/'people', tmp_path/'out'/'faces.npz'
    for i in range(4):
        (folder/f'p{i % 2}').mkdir(parents=True, exist_ok=True)
        (folder/f'p{i % 2}'/f'{i}.pgm').write_bytes(Path(att.path[i]).read_bytes())
    first = run(folder, dest); assert len(quick) == 4
    again = run(folder, dest); assert len(quick) == 4
    assert (again.vectors == first.vectors).all() and again.report.equals(first.report) and again.faces.equals(first.faces)
    (folder/'p0'/'0.pgm').write_bytes(Path(att.path[9]).read_bytes()); os.utime(folder/'p0'/'0.pgm', ns=(1, 1))
    (folder/'p1'/'new.pgm').write_bytes(Path(att.path[10]).read_bytes())
    (folder/'p1'/'1.pgm').unlink()
    more = run(folder, dest); assert len(quick) == 6
    assert len(more) == 4 and len(Embeddings.load(dest)) == 4 and not list(dest.parent.glob('*.part'))
    run(folder, dest, upsample=2); assert len(quick) == 10
    assert dest.stat().st_mode & 0o077 == 0


def test_twice_the_same_photo(quick, att):
    found = run(table([att.path[0]]*3 + [att.path[1]]))
    assert len(quick) == 2 and len(found) == 4 and (found.vectors[0] == found.vectors[2]).all()


@pytest.mark.parametrize('harm', [lambda b: b[:-30], lambda b: b[:-30] + b'\xff\xfe\x00', lambda b: b.replace(b'"vectors"', b'"v', 1), lambda b: b + b'\n\n[1, 2]\nnull\n{}\n3\n', lambda b: b''], ids=['torn', 'not text', 'one word', 'strangers', 'emptied'])
def test_damaged_log(quick, att, tmp_path, harm):
    rows = measure_photos(list(att.path[:6]), QUICK, 'quick')
    whole = run(table(att.path[:6]), tmp_path/'a.npz')
    keys = [o['key'] for o in json.loads(str(np.load(tmp_path/'a.npz')['rows']))]
    lines = '\n'.join(write_row(k, r) for k, r in zip(keys, rows)).encode() + b'\n'
    (tmp_path/'b.npz.part').write_bytes(harm(lines))
    quick.clear()
    found = run(table(att.path[:6]), tmp_path/'b.npz')
    assert len(quick) <= 6 and (found.vectors == whole.vectors).all() and not (tmp_path/'b.npz.part').exists()


def test_a_foreign_file_is_not_overwritten(quick, att, tmp_path):
    other = Embeddings(np.zeros((1, 3)), ['x'], {}); other.save(tmp_path/'a.npz')
    before = (tmp_path/'a.npz').read_bytes()
    with pytest.raises(ValueError, match='choose another name'): run(table(att.path[:2]), tmp_path/'a.npz')
    (tmp_path/'b.npz').write_bytes(b'text')
    with pytest.raises(ValueError, match='b.npz'): run(table(att.path[:2]), tmp_path/'b.npz')
    assert (tmp_path/'a.npz').read_bytes() == before


def test_a_row_survives_as_text():
    row = dict(status='ok', reason='', n_faces=2, boxes=[[1, 2, 3, 4]]*2, scores=[.5, -1.], vectors=np.random.rand(2, 128).astype(np.float32), seconds=.1)
    key, back = read_row(write_row('k', row))
    assert key == 'k' and (back.pop('vectors') == row.pop('vectors')).all() and back == row
    empty = row | dict(vectors=np.zeros((0, 128), np.float32))
    assert read_row(write_row('k', empty))[1]['vectors'].shape == (0, 128)


# ---- accidents

def test_failures_are_tried_again(att, tmp_path):
    broken = [True]
    def find(image, upsample):
        if broken: raise RuntimeError('out of order')
        return [Face(Box(20, 80, 90, 10), 1.)]
    register_detector('broken', find)
    try:
        first = run(table(att.path[:3]), tmp_path/'a.npz', detector='broken')
        assert set(first.report.status) == {'failed'} and set(first.report.reason) == {'RuntimeError: out of order'}
        broken.clear()
        assert set(run(table(att.path[:3]), tmp_path/'a.npz', detector='broken').report.status) == {'ok'}
    finally: D._detectors.pop('broken')


def test_a_box_outside_the_photo_stops_nobody(att, tmp_path):
    register_detector('astray', lambda image, upsample: [Face(Box(900, 990, 990, 900) if image.shape[0] == 77 else Box(20, 80, 90, 10), 1.)])
    try:
        Image.new('RGB', (77, 77)).save(tmp_path/'odd.png')
        found = run(table([att.path[0], tmp_path/'odd.png', att.path[1]]), detector='astray')
    finally: D._detectors.pop('astray')
    assert found.report.status.tolist() == ['ok', 'failed', 'ok'] and 'outside' in found.report.reason[1] and len(found) == 2


def test_a_deadly_photo(att, tmp_path):
    def deadly(image, upsample):
        if image.shape[:2] == (77, 77): os.kill(os.getpid(), signal.SIGKILL)
        return [Face(Box(20, 80, 90, 10), 1.)]
    register_detector('deadly', deadly)
    try:
        Image.new('RGB', (77, 77)).save(tmp_path/'deadly.png')
        r = run(table([*att.path[:9], tmp_path/'deadly.png', *att.path[9:20]]), tmp_path/'a.npz', detector='deadly', workers=2).report
    finally: D._detectors.pop('deadly')
    assert r.status.tolist() == ['ok']*9 + ['failed'] + ['ok']*11 and 'died' in r.reason[9] and len(read_done(tmp_path/'a.npz')) == 20


SCRIPT = '''
import sys
import pandas as pd
from facelab.datasets import att_faces
from facelab.folder import embed_folder
embed_folder(att_faces().head(400), sys.argv[1], detector='cnn', workers=2, progress=False)
'''


@pytest.mark.skipif(sys.platform != 'linux', reason='signals of a terminal')
@pytest.mark.parametrize('how', [signal.SIGINT, signal.SIGKILL], ids=['control_c', 'power_cut'])
def test_stopped_and_resumed(att, tmp_path, how):
    dest = tmp_path/'faces.npz'
    log = tmp_path/'faces.npz.part'
    p = subprocess.Popen([sys.executable, '-c', SCRIPT, str(dest)], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
                         preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler))
    try:
        end = time.monotonic() + 120
        while not log.exists() or len(log.read_bytes().splitlines()) < 20:
            assert p.poll() is None and time.monotonic() < end, p.communicate()[0]
            time.sleep(.02)
        os.killpg(p.pid, how)
        p.wait(timeout=60)
    finally:
        try: os.killpg(p.pid, signal.SIGKILL)
        except ProcessLookupError: pass
        p.communicate()
    done = read_done(dest)
    assert p.returncode != 0 and 20 <= len(done) < 400 and not dest.exists()
    few = att.head(400).iloc[:64]
    found = embed_folder(few, dest, detector='cnn', workers=2)
    straight = embed_folder(few.iloc[::8], detector='cnn', workers=1)
    assert found.report.status.eq('ok').all() and np.abs(found.vectors[::8] - straight.vectors).max() < 2e-6


@pytest.mark.skipif(sys.platform == 'win32', reason='limits of POSIX')
def test_disk_full_with_two_workers(att, tmp_path):
    script = SCRIPT.replace('import sys', 'import resource, sys\nresource.setrlimit(resource.RLIMIT_FSIZE, (30_000, resource.RLIM_INFINITY))').replace('head(400)', 'head(100)')
    dest = tmp_path/'faces.npz'
    p = subprocess.run([sys.executable, '-c', script, str(dest)], capture_output=True, text=True, timeout=300)
    assert p.returncode != 0 and 'OSError' in p.stderr and not dest.exists()
    assert 10 < len(read_done(dest)) < 100


# ---- which face, and measured once

def test_central_face_not_the_largest(tmp_path):
    def two(image, upsample): return [Face(Box(0, 60, 60, 0), 1.), Face(Box(40, 70, 60, 50), .5)]
    register_detector('two', two)
    try:
        Image.new('RGB', (120, 100)).save(tmp_path/'a.png')
        box = {which: [tuple(o) for o in run(table([tmp_path/'a.png']), detector='two', faces=which).faces.box] for which in ('largest', 'central', 'all')}
    finally: D._detectors.pop('two')
    assert box == dict(largest=[(0, 60, 60, 0)], central=[(40, 70, 60, 50)], all=[(0, 60, 60, 0), (40, 70, 60, 50)])


def test_few_photos_are_in_memory_at_a_time(att, monkeypatch):
    import facelab.folder as F
    alive, most = set(), []
    class Watched(np.ndarray):
        def __del__(self): alive.discard(self.base.ctypes.data if self.base is not None else 0)
    real = F.load_photo
    def load(path, max_side):
        row = real(path, max_side); a = np.zeros((2000, 1500, 3), np.uint8); alive.add(a.ctypes.data); row['image'] = a.view(Watched); most.append(len(alive))
        return row
    monkeypatch.setattr(F, 'load_photo', load)
    register_detector('nobody', lambda image, upsample: [])
    try: rows = measure_photos(list(att.path[:12]), QUICK, 'nobody')
    finally: D._detectors.pop('nobody')
    assert [r['status'] for r in rows] == ['no face']*12 and max(most) <= 3


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv('FACELAB_CACHE', str(tmp_path/'cache'))
    return tmp_path/'cache'


def ask(photos, encoder=QUICK, **kw): return embed_cached(table(photos), encoder, detector='quick', progress=False, **kw)


def test_every_photo_once(att, cache, quick):
    a, b = ask(att.path[:6]), ask(att.path[3:9])
    assert len(quick) == 9 and (a.vectors[3:] == b.vectors[:3]).all()
    both = ask([*att.path[8:2:-1], att.path[0]])
    assert len(quick) == 9 and both.paths == [*att.path[8:2:-1], att.path[0]] and (both.vectors[:6] == b.vectors[::-1]).all()
    assert len(list(cache.iterdir())) == 1 and (next(cache.iterdir()).stat().st_mode & 0o077) == 0


def test_other_weights_other_file(att, cache, quick):
    nets = [torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), torch.nn.Linear(3, 3)) for _ in range(2)]
    one, two = (Encoder(o, 'same name', 16, 3, align='margin') for o in nets)
    assert weights_digest(one) != weights_digest(two)
    assert not np.allclose(ask(att.path[:3], one).vectors, ask(att.path[:3], two).vectors) and len(list(cache.iterdir())) == 2
    assert weights_digest(Encoder(Means(), 'means', 16, 3, metric='euclidean', align='margin')) == weights_digest(QUICK)


def test_lost_photos_are_reported_and_gone_ones_forgotten(att, cache, quick, tmp_path):
    Image.open(att.path[0]).save(tmp_path/'mine.png')
    r = ask([att.path[1], tmp_path/'nowhere.png', tmp_path/'mine.png']).report
    assert r.status.tolist() == ['ok', 'bad image', 'ok'] and r.row.tolist() == [0, -1, 1]
    (tmp_path/'mine.png').unlink()
    ask([att.path[2]])
    assert sorted(Embeddings.load(next(cache.iterdir())).paths) == sorted(att.path[1:3])
    with pytest.raises(ValueError, match='by one face'): ask(att.path[:2], faces='all')


def test_photos_that_changed_are_measured_when_asked_for_and_not_before(att, cache, quick, tmp_path):
    mine = [tmp_path/f'{i}.png' for i in range(3)]
    for p, q in zip(mine, att.path): Image.open(q).save(p)
    ask(mine)
    for p in mine: os.utime(p, (1, 1))
    ask(att.path[:1])
    assert len(quick) == 4
    ask(mine[:1])
    assert len(quick) == 5


def test_a_broken_cache_says_which_file(att, cache, quick):
    ask(att.path[:2]); f = next(cache.iterdir()); f.write_bytes(f.read_bytes()[:100])
    with pytest.raises(ValueError, match=f.name[:10]): ask(att.path[:2])
