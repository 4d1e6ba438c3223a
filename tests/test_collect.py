"Photos taken on purpose: hints, names, full disks, two programs at once, videos that are none, and the command"
import errno
import io
import json
import os
import subprocess
import sys
import threading
from types import SimpleNamespace
from unittest import mock

import cv2
import numpy as np
import pandas as pd
import pytest
from PIL import Image

from facelab.collect import (KEYS, VIDEO_REASONS, BadVideo, Collection, NoScreen, NotSaved, Sight, Taken, Window, check_screen, check_video, collected, collected_pairs, draw_live, facelab_collect,
                             folder_of, look_at, not_saved, open_video, portrait, portrait_window, press, run_session, save_next, scripted, video_frames)
from facelab.datasets import att_split, people_folder
from facelab.detect import Box, Face, register_detector
from facelab.images import load_image

cv2.setNumThreads(1)
att = att_split()[1]


def frame(person=None, i=0, x=200, scale=2):
    "A grey room, with an AT&T photo at x"
    out = Image.new('RGB', (640, 480), 'dimgrey')
    if person:
        p = load_image(att.path[att.person == person].iloc[i])
        out.paste(p.resize((round(scale*p.width), round(scale*p.height))), (x, 120))
    return np.asarray(out)


def film(path, frames, fps=5, code='MJPG'):
    out = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*code), fps, frames[0].shape[1::-1])
    for o in frames: out.write(np.ascontiguousarray(o[..., ::-1]))
    out.release()
    return path


@pytest.fixture(scope='module')
def ben(): return frame('s31')


@pytest.fixture(scope='module')
def video(tmp_path_factory, ben): return film(tmp_path_factory.mktemp('video')/'session.avi', [frame(), ben, ben, frame('s31', 1), frame('s31', 2)])


@pytest.fixture
def sees():
    "A detector that finds what it is told to: `.boxes`, for a frame of 480 pixels"
    told = SimpleNamespace(boxes=[Box(50, 150, 150, 50)])
    register_detector('told', lambda image, upsample: [Face(b, 1.) for b in told.boxes])
    yield told
    from facelab import detect
    detect._detectors.pop('told')


def test_windows_are_square_and_inside():
    rng = np.random.default_rng(0)
    for _ in range(300):
        w, h = rng.integers(80, 2000, 2)
        side = int(rng.integers(10, min(w, h) + 1)); left, top = int(rng.integers(0, w - side + 1)), int(rng.integers(0, h - side + 1))
        box = Box(top, left + side, top + side, left); o = portrait_window(box, (int(w), int(h)))
        assert o.width == o.height and o.clip(w, h) == o
        assert o.top <= box.top and o.left <= box.left and o.bottom >= box.bottom and o.right >= box.right


@pytest.mark.parametrize('boxes,start', [([], 'no face'), ([Box(0, 30, 30, 0)], 'the face is 30'), ([Box(50, 150, 150, 50), Box(50, 300, 130, 220)], 'somebody else'),
                                         ([Box(50, 150, 150, 50), Box(60, 180, 90, 152)], 'somebody else')])
def test_hints(sees, boxes, start):
    sees.boxes = boxes
    s = look_at(np.zeros((240, 480, 3), np.uint8), 'told')
    assert s.window is None and s.hint.startswith(start)


def test_a_small_face_far_away_is_nobodys_business(sees):
    sees.boxes = [Box(50, 150, 150, 50), Box(0, 470, 30, 440)]
    assert look_at(np.zeros((240, 480, 3), np.uint8), 'told').window


def test_scale_of_large_frames(sees):
    s = look_at(np.zeros((720, 1440, 3), np.uint8), 'told')
    assert s.boxes == [Box(150, 450, 450, 150)]


@pytest.mark.parametrize('name', ['李雷', 'Zoë', '../../x', '/etc/passwd', '..', '.hidden', '__init__', 'a'*10_000, '<img onerror=alert(1)>', 'CON:', 'a/b\\c', 'Ann.'])
def test_names_stay_inside(tmp_path, ben, name):
    c = Collection(tmp_path, name, consent=True)
    assert c.anchor(ben).path.resolve().is_relative_to(tmp_path/'people')
    assert list(collected(tmp_path).person) == [name] and len(people_folder(tmp_path/'people')) == 1


@pytest.mark.parametrize('name', ['', '  ', 'unknown', 'UNKNOWN', 'a\nb', '\u200b'])
def test_names_refused(tmp_path, name):
    with pytest.raises(ValueError): Collection(tmp_path, name, consent=True)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize('consent', [False, None, 1, 'yes'])
def test_consent(tmp_path, consent):
    with pytest.raises(PermissionError, match='ask first'): Collection(tmp_path, 'Ann', consent=consent)
    assert not list(tmp_path.iterdir())


def test_names_that_differ_in_case_only_do_not_share_a_folder(tmp_path, ben):
    Collection(tmp_path, 'Ann', consent=True).anchor(ben)
    (tmp_path/'people'/'ann').symlink_to(tmp_path/'people'/'Ann') if not (tmp_path/'people'/'ann').exists() else None # as on a disk that ignores case
    with pytest.raises(ValueError, match='belongs to'): Collection(tmp_path, 'ann', consent=True)


def test_files_are_the_owners_only(tmp_path, ben):
    path = Collection(tmp_path, 'Ann', consent=True).anchor(ben).path
    assert oct(path.parent.stat().st_mode)[-2:] == '00'
    assert Image.open(path).size == (250, 250) and Image.open(path).format == 'JPEG'


def test_nothing_is_overwritten_by_two_at_once(tmp_path):
    image, got = Image.new('RGB', (64, 64)), []
    threads = [threading.Thread(target=lambda: got.extend(save_next(image, tmp_path) for _ in range(25))) for _ in range(4)]
    for t in threads: t.start()
    for t in threads: t.join()
    assert len(set(got)) == 100 and sorted(p.name for p in tmp_path.iterdir()) == sorted(p.name for p in got)


def test_a_gap_in_the_numbers_is_not_filled_from_below(tmp_path):
    for n in (1, 7): (tmp_path/f'{n:04}.jpg').touch()
    (tmp_path/'holiday.jpg').touch()
    assert save_next(Image.new('RGB', (64, 64)), tmp_path).name == '0008.jpg' and (tmp_path/'0007.jpg').stat().st_size == 0


@pytest.mark.parametrize('code,why', [(errno.ENOSPC, 'disk is full'), (errno.EDQUOT, 'quota'), (errno.EACCES, 'must not be written'), (errno.EIO, 'Input/output')])
def test_a_disk_that_says_no(tmp_path, ben, code, why):
    c = Collection(tmp_path, 'Ann', consent=True); c.anchor(ben)
    with mock.patch('os.fsync', side_effect=OSError(code, os.strerror(code))), pytest.raises(NotSaved, match=why): c.positive(ben)
    assert c.counts == dict(anchor=1, positive=0) and [p.name for p in c.place.rglob('*') if p.is_file()].count('0001.jpg') == 1
    assert c.positive(ben)


def test_automatic_stops_when_the_disk_is_full(tmp_path, ben):
    c = Collection(tmp_path, 'Ann', consent=True); c.automatic = True
    with mock.patch('os.fsync', side_effect=OSError(errno.ENOSPC, '')), pytest.raises(NotSaved): c.see(ben, 1.)
    assert not c.automatic and c.see(ben, 2.)[1] == 'ready'


def test_no_photo_without_its_person(tmp_path, ben):
    c = Collection(tmp_path, 'Ann', consent=True)
    with mock.patch('facelab.collect.write_whole', side_effect=OSError(errno.ENOSPC, '')), pytest.raises(NotSaved): c.anchor(ben)
    assert c.counts['anchor'] == 0


def test_folder_that_cannot_be_made(tmp_path):
    (tmp_path/'people').write_text('a file')
    with pytest.raises(NotSaved): Collection(tmp_path, 'Ann', consent=True)


def test_automatic_by_the_clock_of_the_frames(tmp_path, sees):
    c, image = Collection(tmp_path, 'Ann', consent=True, pause=2., detector='told'), np.zeros((240, 480, 3), np.uint8)
    c.automatic = True
    saved = []
    for t in range(12):
        sees.boxes = [] if t in (4, 5) else [Box(50, 150, 150, 50)]
        if c.see(image, float(t))[1].endswith('saved'): saved.append(t)
    assert saved == [0, 2, 6, 8, 10] and c.counts['positive'] == 5
    c.automatic = False
    assert c.see(image, 99.)[1] == 'ready'


def test_live_picture(sees):
    s = look_at(np.zeros((240, 480, 3), np.uint8), 'told')
    out = draw_live(np.zeros((240, 480, 3), np.uint8), s, 'Ann', 'ready')
    assert out.width == 480 and out.height > 240 and out.getpixel((51, 51)) == (0, 0x72, 0xb2)
    assert draw_live(np.zeros((9, 9, 3), np.uint8), Sight([], None), '李'*99).width == 9


@pytest.mark.parametrize('bad', [None, 'none.png', b'', np.zeros((4, 4, 3), np.uint8)])
def test_a_frame_that_is_none(tmp_path, bad):
    with pytest.raises(ValueError): Collection(tmp_path, 'Ann', consent=True).anchor(bad)


def test_collected_reads_foreign_photos_too(tmp_path, ben):
    Collection(tmp_path, 'Ann', consent=True).anchor(ben)
    Image.fromarray(ben).save(tmp_path/'people'/'Ann'/'loose.png')
    assert sorted(collected(tmp_path).role) == ['', 'anchor']
    (tmp_path/'people'/'Ann'/'person.json').write_text('[')
    with pytest.raises(ValueError, match='cannot be read'): collected(tmp_path)


def test_pairs():
    rows = pd.DataFrame([('a1', 'Ann', 'anchor'), ('a2', 'Ann', 'anchor'), ('p1', 'Ann', 'positive'), ('b1', 'Ben', 'anchor'), ('q1', 'Ben', 'positive')], columns=['path', 'person', 'role'])
    out = collected_pairs(rows, pd.DataFrame(dict(path=['n1'], person=['Eve'])))
    assert set(map(tuple, out[out.mated][['left', 'right']].values)) == {('a1', 'p1'), ('a2', 'p1'), ('b1', 'q1')}
    assert list(out[~out.mated].right) == ['n1']*3 and sorted(out[~out.mated].left) == ['a1', 'a2', 'b1']


def test_video_files(tmp_path, video, ben):
    for name, data in {'empty.mp4': b'', 'text.mp4': b'hello'*99, 'list.m3u8': b'#EXTM3U\n', 'mpd.mp4': b'<?xml?>', 'noise.avi': bytes(range(256))*9, 'half.mp4': None}.items():
        (tmp_path/name).write_bytes(data if data is not None else film(tmp_path/'whole.mp4', [ben]*5, code='mp4v').read_bytes()[:3000])
    Image.fromarray(ben).save(tmp_path/'photo.jpg'); Image.fromarray(ben).save(tmp_path/'photo.avi', 'PNG')
    want = dict(zip(('empty.mp4', 'text.mp4', 'list.m3u8', 'mpd.mp4', 'noise.avi', 'half.mp4', 'photo.jpg', 'photo.avi', 'none.mp4'),
                    ('empty', *['not a video']*5, 'photo', 'photo', 'missing')))
    for name, reason in want.items():
        with pytest.raises(BadVideo) as e: list(video_frames(tmp_path/name))
        assert e.value.reason == reason and VIDEO_REASONS[reason] in str(e.value) and str(tmp_path) not in str(e.value), name
    with pytest.raises(BadVideo): check_video(tmp_path)
    assert open_video(video).isOpened()


def test_frames_keep_their_times(tmp_path):
    gif = [Image.new('RGB', (64, 64), (60*i, 80, 0)) for i in range(4)]
    gif[0].save(tmp_path/'g.gif', save_all=True, append_images=gif[1:], duration=[100, 700, 100, 100])
    got = list(video_frames(tmp_path/'g.gif'))
    assert [round(f.seconds, 2) for f in got] == [0, .1, .8, .9] and [f.n for f in got] == [0, 1, 2, 3] and got[3].image[0, 0, 0] > 170


def test_a_phone_held_sideways(tmp_path):
    "The file says: turn me by a quarter. The matrix stands in the box `tkhd`, 44 bytes after its name"
    import struct
    picture = np.full((48, 96, 3), 60, np.uint8); picture[:24, :24] = 250
    data = bytearray(film(tmp_path/'a.mp4', [picture]*3, code='mp4v').read_bytes()); at = data.find(b'tkhd') + 44
    data[at:at + 36] = struct.pack('>9i', 0, 65536, 0, -65536, 0, 0, 0, 0, 1 << 30)
    (tmp_path/'b.mp4').write_bytes(data)
    f = next(video_frames(tmp_path/'b.mp4'))
    assert f.image.shape == (96, 48, 3) and f.image[5, 40].min() > 180 and f.image[5, 5].max() < 120


def test_damaged_packets_are_passed_by(tmp_path, ben):
    data = bytearray(film(tmp_path/'a.avi', [ben]*20).read_bytes()); data[len(data)//3:len(data)//3 + 400] = bytes(400)
    (tmp_path/'b.avi').write_bytes(data)
    assert len(list(video_frames(tmp_path/'b.avi'))) >= 15


def test_camera_that_is_not_there():
    with pytest.raises(BadVideo, match='plugged in'): list(video_frames(97))


def test_screens():
    with mock.patch('cv2.getBuildInformation', lambda: '  GUI:   NONE\n'), pytest.raises(NoScreen, match="opencv-python<5"): Window()
    with mock.patch('cv2.getBuildInformation', lambda: '  GUI:   QT5\n'), mock.patch.dict(os.environ, DISPLAY='', WAYLAND_DISPLAY=''), mock.patch('sys.platform', 'linux'), pytest.raises(NoScreen, match='DISPLAY'): check_screen()


@pytest.mark.parametrize('bad', ['x', '1:', ':a', '1:z', '-1:a', '1:aa', '1.5:a'])
def test_scripts(bad):
    with pytest.raises(ValueError, match='FRAME:KEY'): scripted(bad)


def test_session_without_frames(tmp_path):
    assert [n for n, _ in run_session(Collection(tmp_path, 'Ann', consent=True), [], scripted('0:a'))] == [0]


def test_keys(tmp_path, ben):
    c = Collection(tmp_path, 'Ann', consent=True)
    assert isinstance(press(c, 'a', ben), Taken) and press(c, 'p', ben) and press(c, 'c', ben).startswith('automatic on') and press(c, 'z', ben) is None
    assert press(c, 'q', ben) == 'Ann: 1 anchor, 1 positive' and set(KEYS) == set('apcq') and not press(c, 'a', ben)


def test_the_command_for_real(tmp_path, video):
    "In a process of its own: what people type, what they see, what they get"
    (tmp_path/'command.py').write_text('from facelab.collect import facelab_collect\nfacelab_collect()\n')
    args = (tmp_path/'class', '--name', 'Ann Lee', '--consent', '--source', video, '--headless', '--keys', '0:a 1:a 2:p 2:c', '--pause', '0.3', '--json', tmp_path/'log.json')
    r = subprocess.run([sys.executable, '-W', 'ignore', tmp_path/'command.py', *map(str, args)], capture_output=True, text=True, timeout=240)
    assert r.returncode == 1 and 'frame 0: no face' in r.stderr and 'frame 1: anchor 1 saved' in r.stderr and r.stdout.count('\n') == 1 and 'Ann Lee: 1 anchor' in r.stdout, (r.stdout, r.stderr)
    told = json.loads((tmp_path/'log.json').read_text())
    assert told['counts'] == collected(tmp_path/'class').role.value_counts().to_dict() and told['session'][0]['taken'] is False
    assert {p.name for p in (tmp_path/'class'/'people').iterdir()} == {'Ann Lee'}


def run(capsys, *args, **kw):
    try: facelab_collect(*map(str, args), **kw); code = 0
    except SystemExit as e: code = e.code
    return code, *capsys.readouterr()


def test_wrong_use_is_one_line(tmp_path, video, capsys):
    ok = dict(name='Ann', consent=True, source=str(video), keys='1:a')
    assert run(capsys, tmp_path, **ok)[0] == 0
    for change, word in ((dict(name=None), '--name'), (dict(consent=False), 'ask first'), (dict(keys=None, headless=True), '--keys'), (dict(source='none.mp4'), 'missing'), (dict(keys='1:x'), 'FRAME:KEY'),
                         (dict(source=None, camera=97), 'camera 97'), (dict(pause=0.), 'pause'), (dict(size=3), 'size'), (dict(detector='nose'), 'no detector')):
        code, _, err = run(capsys, tmp_path, **(ok | change))
        assert code == 2 and err.count('\n') == 1 and word in err and err.startswith('facelab-collect: '), (change, err)


def test_full_disk_in_the_command(tmp_path, video, capsys):
    with mock.patch('os.fsync', side_effect=OSError(errno.ENOSPC, 'No space left')): code, _, err = run(capsys, tmp_path, name='Ann', consent=True, source=str(video), keys='1:a')
    assert code == 2 and err == 'facelab-collect: nothing was saved: the disk is full; what was saved before is safe\n'
    assert not [p for p in tmp_path.rglob('*') if p.is_file()] and 'disk is full' in str(not_saved(OSError(errno.ENOSPC, '')))


def test_portrait_is_not_stretched():
    image = np.zeros((480, 640, 3), np.uint8); image[200:300, 300:400] = 255
    out = np.asarray(portrait(image, Box(150, 450, 350, 250), 200))
    assert (out[60:140, 60:140] > 250).all() and out[:45].max() < 5
    assert folder_of('Ann') == 'Ann'
