"Faces found and cut out of whole folders: bad files, odd names, interruptions, every orientation."
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image, ImageFile

from conftest import jpeg
from facelab import detect as D
from facelab.crop import NoFace, align_face, crop_face, crop_folder, crops_of, safe_name, take_face
from facelab.datasets import data_root, people_folder
from facelab.detect import Box, Face, detect, register_detector
from facelab.images import BadImage, load_image

T = Image.Transpose
UNDO = {2: T.FLIP_LEFT_RIGHT, 3: T.ROTATE_180, 4: T.FLIP_TOP_BOTTOM, 5: T.TRANSPOSE, 6: T.ROTATE_90, 7: T.TRANSVERSE, 8: T.ROTATE_270}
COLUMNS = 'path person crop status reason box n_faces seconds'.split()
ROOT = Path(__file__).resolve().parent.parent


def run(table, dest, **kw): return crop_folder(table, dest, **{**dict(size=64, detector='quick', workers=1, progress=False), **kw})


def table(paths, person='Ann'): return pd.DataFrame(dict(path=[str(o) for o in paths], person=person))


def files(folder): return {o.relative_to(folder).as_posix() for o in Path(folder).rglob('*') if o.is_file() and not o.name.startswith('.') and o.name != 'log.jsonl'}


def whole(report, n):
    "A report of `n` rows that says where every crop is"
    assert list(report.columns) == COLUMNS and len(report) == n
    ok = report[report.status == 'ok']
    assert all(Path(o).is_file() for o in ok.crop) and report.crop[report.status != 'ok'].isna().all()
    assert (ok.reason == '').all() and (report.reason[report.status != 'ok'] != '').all()
    return report


def boxes(report): return [tuple(o) if o else None for o in report.box]


# ---- bad files

def test_bad_files(bad_files, face, tmp_path):
    face.save(tmp_path/'good.png')
    Image.new('RGB', (100, 100), 'white').save(tmp_path/'blank.png')
    rows = [(o, reason) for reason, paths in bad_files.items() for o in paths]
    t = table([tmp_path/'good.png', *[o for o, _ in rows], tmp_path/'blank.png'])
    for i in range(2):  # the second time from the log
        r = whole(crop_folder(t, tmp_path/'out', size=64, upsample=2, workers=1, progress=False), len(rows) + 2)
        assert r.path.tolist() == t.path.tolist()
        assert r.status.tolist() == ['ok'] + ['bad image']*len(rows) + ['no face']
        assert r.reason.tolist()[1:-1] == [reason for _, reason in rows]
        assert crops_of(r).photo.tolist() == [str(tmp_path/'good.png')]


def test_paths_that_cannot_be_paths(quick, att, tmp_path):
    t = pd.DataFrame(dict(path=['', 'a\0b.jpg', 'x'*5000, float('nan'), '/\udcff.jpg', att.path[0]]))
    r = whole(run(t, tmp_path), 6)
    assert r.status.tolist() == ['bad image']*5 + ['ok']


def test_nothing_to_do(quick, att, tmp_path): assert whole(run(att[:0], tmp_path), 0).empty and not quick


def test_a_bad_setting_is_said_at_once(att, tmp_path):
    with pytest.raises(ValueError, match='chip'): crop_folder(att[:2], tmp_path, align='sideways', progress=False)
    with pytest.raises(ValueError, match="no detector named 'x'"): crop_folder(att[:2], tmp_path, detector='x', progress=False)


# ---- names

NAMES = ['Ann Lee', 'a/b', 'a\\b', 'a_b', '..', '.', '../../up', '/etc/passwd', 'Dr. B. v. C.', 'ends with.', ' spaces ', '李雷', 'Ольга', 'Zoë', '👩‍🚀', 'n'*10_000, 'n'*9_999, '李'*300, '👩'*300, 'CON?*:<>|"', 'tab\tnewline\n', '-rf', '~', '%41', '$HOME', "O'Neil"]


def test_odd_names(quick, att, tmp_path):
    t = pd.DataFrame(dict(path=att.path[:len(NAMES)], person=NAMES))
    out = tmp_path/'in here'/'out'
    r = whole(run(t, out), len(NAMES))
    assert r.status.tolist() == ['ok']*len(NAMES), r.reason.tolist()
    assert r.person.tolist() == NAMES and crops_of(r).person.tolist() == NAMES
    homes = [Path(o).resolve().parent for o in r.crop]
    assert len(set(homes)) == len(NAMES) and all(o.parent == out.resolve() for o in homes)
    assert [o.name for o in tmp_path.iterdir()] == ['in here']
    assert people_folder(out).person.nunique() == len(NAMES)


@pytest.mark.parametrize('letter', ['n', 'é', '李', '👩', '.', ' '])
def test_long_names(quick, att, tmp_path, letter):
    stems = [letter*k for k in range(1, 250) if len((letter*k + 'x.pgm').encode()) <= 255]
    for k, stem in enumerate(stems[-8:]): (tmp_path/f'{stem}x.pgm').symlink_to(att.path[k])
    r = whole(run(table(sorted(tmp_path.glob('*.pgm')), letter*500), tmp_path/'out'), len(list(tmp_path.glob('*.pgm'))))
    assert set(r.status) == {'ok'}, r.reason[0]


def test_safe_name():
    made = [safe_name(o) for o in NAMES]
    assert len(set(made)) == len(NAMES) and all(o not in ('', '.', '..') and not set(o) & set('/\\:*?"<>|\n\t') and len(o.encode()) <= 255 for o in made)
    assert safe_name('Ann Lee') == 'Ann Lee' and safe_name('a/b') != safe_name('a_b')


def test_people_folder_with_loops(quick, people_dir, tmp_path):
    (people_dir/'loop').symlink_to(people_dir)
    (people_dir/'Ann Lee'/'again').symlink_to(people_dir/'Ann Lee')
    (people_dir/'Ann Lee'/'self.jpg').symlink_to(people_dir/'Ann Lee'/'self.jpg')
    r = whole(run(people_folder(people_dir), tmp_path/'out'), 17)
    assert r.status.value_counts().to_dict() == {'ok': 16, 'bad image': 1}


# ---- duplicates

def test_a_photo_listed_twice(quick, att, tmp_path):
    t = att.iloc[[0, 1, 0, 0]]
    r = whole(run(t, tmp_path), 4)
    assert len(quick) == 2 and r.crop[0:1].tolist()*3 == r.crop.iloc[[0, 2, 3]].tolist() and len(files(tmp_path)) == 2


def test_a_photo_of_two_people(quick, att, tmp_path):
    t = pd.DataFrame(dict(path=[att.path[0]]*2, person=['Ann', 'Bob']))
    for _ in range(2):
        r = whole(run(t, tmp_path), 2)
        assert r.crop.nunique() == 2 and [Path(o).parent.name for o in r.crop] == ['Ann', 'Bob']


def test_copies_and_namesakes_keep_their_own_crops(quick, att, tmp_path):
    for o in ('a', 'b'):
        (tmp_path/o).mkdir()
        shutil.copy(att.path[0], tmp_path/o/'1.pgm')
    r = whole(run(table([tmp_path/'a'/'1.pgm', tmp_path/'b'/'1.pgm']), tmp_path/'out'), 2)
    assert r.crop.nunique() == 2 and len(quick) == 2


# ---- done once, and never lost

SIZE, N = 112, 60
SCRIPT = f'''
import signal; signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job starts with Ctrl-C ignored
import sys
from facelab.crop import crop_folder
from facelab.datasets import att_faces
crop_folder(att_faces()[:{N}], sys.argv[1], size={SIZE}, upsample=2, workers=2, progress=False)
'''


def log_of(folder):
    "Whole lines of the log, by key, and how often each key is there"
    rows, times = {}, {}
    log = Path(folder)/'log.jsonl'
    for line in log.read_text().splitlines() if log.exists() else []:
        try: row = json.loads(line)
        except ValueError: continue
        rows[row['key']] = row
        times[row['key']] = times.get(row['key'], 0) + 1
    return rows, times


@pytest.fixture(scope='module')
def untouched(att, tmp_path_factory):
    "Report of a run that nobody interrupted"
    return crop_folder(att[:N], tmp_path_factory.mktemp('untouched'), size=SIZE, upsample=2, workers=2, progress=False)


def interrupted(dest, how, ends=False):
    "A run in which something happens when 10 photos are done: `how(process)`; returns when it has stopped, or come to its end"
    p = subprocess.Popen([sys.executable, '-c', SCRIPT, str(dest)], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True)
    try:
        end = time.monotonic() + 120
        while len(log_of(dest)[0]) < 10:
            assert p.poll() is None and time.monotonic() < end, p.communicate()[0]
            time.sleep(.01)
        how(p)
        p.wait(timeout=120)
        assert (p.returncode == 0) == ends, p.communicate()[0]
    finally:
        try: os.killpg(p.pid, signal.SIGKILL)
        except ProcessLookupError: pass
        p.communicate()


def kill_a_worker(p):
    for o in Path('/proc').glob('[0-9]*'):
        try: parent, line = int((o/'stat').read_text().rsplit(')', 1)[1].split()[1]), (o/'cmdline').read_text()
        except OSError: continue
        if parent == p.pid and 'loky' in line and 'resource_tracker' not in line: return os.kill(int(o.name), signal.SIGKILL)
    raise AssertionError('no worker found')


WAYS = dict(power_cut=lambda p: os.killpg(p.pid, signal.SIGKILL), control_c=lambda p: os.killpg(p.pid, signal.SIGINT), parent_killed=lambda p: p.kill())


@pytest.mark.skipif(sys.platform != 'linux', reason='looks for processes in /proc')
@pytest.mark.parametrize('way', WAYS)
def test_interrupted_and_resumed(att, untouched, tmp_path, way):
    interrupted(tmp_path, WAYS[way])
    before, _ = log_of(tmp_path)
    assert 10 <= len(before) < N
    stamps = {o: (tmp_path/o).stat().st_mtime_ns for o in files(tmp_path)}
    r = whole(crop_folder(att[:N], tmp_path, size=SIZE, upsample=2, workers=2, progress=False), N)
    after, times = log_of(tmp_path)
    # nothing is lost
    assert r.status.tolist() == untouched.status.tolist() and boxes(r) == boxes(untouched) and r.n_faces.tolist() == untouched.n_faces.tolist()
    for a, b in zip(r.crop, untouched.crop): assert pd.isna(a) and pd.isna(b) or Path(a).read_bytes() == Path(b).read_bytes()
    assert len(files(tmp_path)) == (r.status == 'ok').sum()
    # nothing is done twice: at most what had not reached the log yet
    assert len(after) == N and set(times.values()) == {1}
    assert all(after[k] == before[k] for k in before)
    again = [o for o, t in stamps.items() if (tmp_path/o).stat().st_mtime_ns != t]
    assert len(again) <= len(stamps) - sum(o['status'] == 'ok' for o in before.values())


@pytest.mark.skipif(sys.platform != 'linux', reason='looks for processes in /proc')
def test_a_killed_worker_is_replaced(att, untouched, tmp_path):
    interrupted(tmp_path, kill_a_worker, ends=True)
    rows, times = log_of(tmp_path)
    assert len(rows) == N and set(times.values()) == {1}
    r = whole(crop_folder(att[:N], tmp_path, size=SIZE, upsample=2, workers=2, progress=False), N)
    assert r.status.tolist() == untouched.status.tolist() and boxes(r) == boxes(untouched)


def test_a_deadly_photo_is_reported(att, tmp_path):
    def deadly(image, upsample):
        if image[0, 0, 0] > 200: os.kill(os.getpid(), signal.SIGKILL)
        return [Face(Box(20, 80, 90, 10), .5)]
    register_detector('deadly', deadly)
    try:
        Image.new('RGB', (90, 110), 'white').save(tmp_path/'white.png')
        r = whole(crop_folder(table([*att.path[:5], tmp_path/'white.png', *att.path[5:9]]), tmp_path/'out', size=32, detector='deadly', workers=2, progress=False), 10)
    finally: D._detectors.pop('deadly')
    assert r.status.tolist() == ['ok']*5 + ['failed'] + ['ok']*4 and 'died' in r.reason[5]


@pytest.mark.parametrize('harm', [lambda b: b[:-30], lambda b: b[:-30] + b'\xff\xfe\x00', lambda b: b.replace(b'"status"', b'"stat', 1), lambda b: b + b'\n\n[1, 2]\nnull\n{}\n3\n', lambda b: b''], ids=['torn', 'not text', 'one word', 'strangers', 'emptied'])
def test_damaged_log(quick, att, tmp_path, harm):
    first = run(att[:5], tmp_path)
    log = tmp_path/'log.jsonl'
    log.write_bytes(harm(log.read_bytes()))
    r = whole(run(att[:5], tmp_path), 5)
    assert r.drop(columns='seconds').equals(first.drop(columns='seconds'))
    done = len(quick)
    whole(run(att[:5], tmp_path), 5)
    assert len(quick) == done, 'the log was not repaired'


def test_only_what_is_new_or_changed(quick, att, tmp_path):
    photos = [Path(shutil.copy(att.path[i], tmp_path/f'{i}.pgm')) for i in range(4)]
    out = tmp_path/'out'
    run(table(photos[:3]), out)
    r = run(table(photos), out)
    assert len(quick) == 4
    Path(r.crop[0]).unlink()
    old = Path(r.crop[1]).read_bytes()
    shutil.copy(att.path[9], photos[1])
    photos[2].unlink()
    r = whole(run(table(photos), out), 4)
    assert len(quick) == 6 and Path(r.crop[1]).read_bytes() != old and r.reason.tolist() == ['', '', 'missing', '']
    shutil.copy(att.path[2], photos[2])
    assert set(whole(run(table(photos), out), 4).status) == {'ok'}


def test_changed_settings(quick, att, tmp_path):
    "Every set of settings has its own crops, in whatever order they are asked for"
    def sizes(r): return {Image.open(o).size for o in whole(r, 3).crop}
    for size in (64, 32, 64, 32): assert sizes(run(att[:3], tmp_path, size=size)) == {(size, size)}
    assert len(quick) in (6, 12)
    margin = [Path(o).read_bytes() for o in run(att[:3], tmp_path).crop]
    chip = [Path(o).read_bytes() for o in run(att[:3], tmp_path, align='chip').crop]
    assert all(a != b for a, b in zip(margin, chip))
    assert [Path(o).read_bytes() for o in run(att[:3], tmp_path).crop] == margin
    done = len(quick)
    run(att[:3], tmp_path, upsample=0)
    assert len(quick) == done + 3


def test_moved_folder(quick, att, tmp_path):
    run(att[:3], tmp_path/'a')
    (tmp_path/'a').rename(tmp_path/'b')
    whole(run(att[:3], tmp_path/'b'), 3)
    assert len(quick) == 3


# ---- a disk that says no

def test_dest_is_a_file(quick, att, tmp_path):
    (tmp_path/'out').write_text('a file')
    with pytest.raises(OSError, match='out'): run(att[:1], tmp_path/'out')
    assert (tmp_path/'out').read_text() == 'a file' and not quick


def test_what_cannot_be_written_is_tried_again(quick, att, tmp_path):
    (tmp_path/'s01').write_text('in the way')
    r = whole(run(att[8:12], tmp_path), 4)
    assert r.status.tolist() == ['failed']*2 + ['ok']*2 and 's01' in r.reason[0]
    (tmp_path/'s01').unlink()
    assert whole(run(att[8:12], tmp_path), 4).status.tolist() == ['ok']*4 and len(quick) == 6


def test_full_disk(quick, att, tmp_path, monkeypatch):
    save = Image.Image.save
    def full(im, f, *args, **kw):
        save(im, f, *args, **kw)
        raise OSError(28, 'No space left on device')
    with monkeypatch.context() as m:
        m.setattr(Image.Image, 'save', full)
        r = whole(run(att[:2], tmp_path), 2)
    assert set(r.status) == {'failed'} and 'No space left' in r.reason[0]
    assert not [o for o in tmp_path.rglob('*') if o.is_file() and o.name != 'log.jsonl'], 'half a crop was left'
    assert set(whole(run(att[:2], tmp_path), 2).status) == {'ok'}


# ---- detectors of one's own

def test_custom_detector_in_processes(att, tmp_path):
    where = Box(20, 80, 90, 10)
    def mine(image, upsample):
        if image[0, 0, 0] > 200: raise RuntimeError('out of order')
        return [Face(where, .5), Face(Box(0, 8, 8, 0), .9)]
    register_detector('mine', mine)
    try:
        Image.new('RGB', (90, 110), 'white').save(tmp_path/'white.png')
        r = whole(crop_folder(table([*att.path[:5], tmp_path/'white.png']), tmp_path/'out', size=32, detector='mine', workers=2, progress=False), 6)
    finally: D._detectors.pop('mine')
    assert r.status.tolist() == ['ok']*5 + ['failed'] and r.reason[5] == 'RuntimeError: out of order'
    assert boxes(r)[:5] == [where]*5 and r.n_faces.tolist()[:5] == [2]*5 and isinstance(r.box[0], Box)


def test_one_process_or_two(att, untouched, tmp_path):
    r = whole(crop_folder(att[:8], tmp_path, size=SIZE, upsample=2, workers=1, progress=True), 8)
    assert boxes(r) == boxes(untouched)[:8]
    assert [Path(o).read_bytes() for o in r.crop.dropna()] == [Path(o).read_bytes() for o in untouched.crop[:8].dropna()]


# ---- one photo

def with_tag(im, tag):
    exif, f = Image.Exif(), io.BytesIO()
    exif[274] = tag
    (im.transpose(UNDO[tag]) if tag > 1 else im).save(f, 'PNG', exif=exif)
    return f.getvalue()


@pytest.mark.parametrize('align', ['margin', 'chip'])
def test_every_orientation_gives_the_same_face(face, tmp_path, align):
    crop, found, n = take_face(face, align, 96, upsample=2)
    for tag in range(1, 9):
        path = tmp_path/f'{tag}.png'
        path.write_bytes(with_tag(face, tag))
        c, f, k = take_face(path, align, 96, upsample=2)
        assert (f.box, k) == (found.box, n) and np.array_equal(c, crop), tag
    r = crop_folder(table(sorted(tmp_path.glob('*.png'))), tmp_path/'out', align=align, size=96, upsample=2, workers=1, progress=False)
    assert all(np.array_equal(Image.open(o), crop) for o in r.crop)


def montage(att, sizes, pick=(40, 0, 60, 80)):
    "AT&T faces side by side, `sizes` times their height; the picture, and the columns where each stands"
    faces = [Image.open(att.path[i]).convert('RGB').resize((round(92*k), round(112*k))) for i, k in zip(pick, sizes)]
    im, x, spans = Image.new('RGB', (sum(o.width for o in faces) + 40*len(faces), max(o.height for o in faces)), 'white'), 0, []
    for o in faces:
        im.paste(o, (x, 0))
        spans.append((x, x + o.width))
        x += o.width + 40
    return im, spans


@pytest.mark.parametrize('largest', range(4))
def test_many_faces_the_largest_is_taken(att, largest):
    sizes = [2., 2., 2., 2.]
    sizes[largest] = 3.4
    im, spans = montage(att, sizes)
    for align in ('margin', 'chip'):
        crop, f, n = take_face(im, align, 64)
        assert n == 4 and spans[largest][0] <= (f.box.left + f.box.right)/2 <= spans[largest][1]
        assert crop.size == (64, 64)


def test_no_face(face):
    for im in (Image.new('RGB', (200, 200)), face.resize((12, 14))):
        with pytest.raises(NoFace, match='hog'): take_face(im)


def test_box_at_the_edge(face):
    assert crop_face(face, Box(-30, 120, 130, -20), size=None).size == face.size
    with pytest.raises(ValueError, match='outside'): crop_face(face, Box(200, 300, 250, 210), margin=0)
    for box in (Box(0, 92, 112, 0), Box(-50, 60, 60, -50)): assert align_face(face, box).size == (150, 150)


# ---- detect

PARITY = '''
import json, sys, warnings
warnings.simplefilter('ignore')
import face_recognition, numpy as np
from facelab.images import load_image
print(json.dumps([face_recognition.face_locations(np.array(load_image(path)), up, model) for path, up, model in json.load(sys.stdin)]))
'''


def test_parity_with_face_recognition(att):
    "In a process of its own: importing face_recognition changes Pillow for everybody"
    photos = data_root()/'photos'
    asked = [(o, 2, 'hog') for o in att.path[::20]] + [(att.path[40], 1, 'cnn')] + [(str(o), 1, 'hog') for o in sorted(photos.glob('20*.jpg'))]
    r = subprocess.run([sys.executable, '-c', PARITY], input=json.dumps(asked), capture_output=True, text=True, timeout=200, cwd=ROOT)
    assert r.returncode == 0, r.stderr
    theirs = json.loads(r.stdout)
    assert len(theirs) >= 21 and sum(map(len, theirs)) >= 20
    for (path, up, model), boxes in zip(asked, theirs): assert sorted(tuple(f.box) for f in detect(path, model, up)) == sorted(map(tuple, boxes)), path


def test_detect_takes_what_load_image_takes(face, tmp_path):
    face.save(tmp_path/'a.png')
    want = [f.box for f in detect(face, upsample=2)]
    assert len(want) == 1
    for o in (tmp_path/'a.png', str(tmp_path/'a.png'), (tmp_path/'a.png').read_bytes(), np.asarray(face), face.convert('L'), with_tag(face, 6)): assert [f.box for f in detect(o, upsample=2)] == want


def test_largest_first(att):
    found = detect(montage(att, [2., 3.4, 2.6, 3.])[0])
    assert len(found) == 4 and [f.box.area for f in found] == sorted([f.box.area for f in found], reverse=True)
    assert all(f.landmarks.shape == (5, 2) for f in found)


def test_detect_refuses(face):
    with pytest.raises(ValueError, match='there are hog'): detect(face, 'yolo99')
    with pytest.raises(ValueError, match='upsample'): detect(face, upsample=-1)
    with pytest.raises(BadImage): detect(b'')


# ---- what importing face_recognition does to Pillow

def test_cut_files_are_refused_after_import_of_face_recognition(tmp_path, face):
    data = {fmt: io.BytesIO() for fmt in ('JPEG', 'PNG', 'GIF', 'TIFF', 'BMP')}
    for fmt, f in data.items():
        face.save(f, fmt)
        (tmp_path/f'{fmt}.img').write_bytes(f.getvalue()[:len(f.getvalue())//2])
    code = ("import sys, warnings; warnings.simplefilter('ignore')\n"
            "import face_recognition\n"
            "from PIL import ImageFile; assert ImageFile.LOAD_TRUNCATED_IMAGES\n"
            "from facelab.images import BadImage, load_image\n"
            "for path in sys.argv[1:]:\n"
            "    try: load_image(path)\n"
            "    except BadImage as e: assert e.reason == 'truncated', (path, e)\n"
            "    else: raise AssertionError(path)\n"
            "assert ImageFile.LOAD_TRUNCATED_IMAGES")
    r = subprocess.run([sys.executable, '-c', code, *map(str, tmp_path.glob('*.img'))], capture_output=True, text=True, timeout=200, cwd=ROOT)
    assert r.returncode == 0, r.stderr


def test_cut_files_are_refused_in_threads(face, monkeypatch):
    monkeypatch.setattr(ImageFile, 'LOAD_TRUNCATED_IMAGES', True)
    data = jpeg(face)
    def one(i):
        try: return load_image(data if i % 3 else data[:len(data)//2]).size
        except BadImage as e: return e.reason
    with ThreadPoolExecutor(8) as pool: got = list(pool.map(one, range(300)))
    assert got == [(92, 112) if i % 3 else 'truncated' for i in range(300)] and ImageFile.LOAD_TRUNCATED_IMAGES
