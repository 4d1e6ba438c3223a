"Tracks, their vectors, names over time, even pace, whole files, films that are none, and the command"
import json
import os
import subprocess
import sys
from itertools import permutations
from unittest import mock

import cv2
import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from facelab.collect import BadVideo, NotSaved, video_frames
from facelab.datasets import att_split
from facelab.detect import Box, Face, iou, register_detector
from facelab.embed import Encoder, register_encoder
from facelab.fairness import sharpness
from facelab.gallery import UNKNOWN, Gallery
from facelab.images import load_image
from facelab.video import (CODES, Film, Look, Track, Tracker, box_at, check_out, draw_faces, evenly, facelab_video, film_json, film_table, frontal, in_two_places, keep_best, look_quality, name_film,
                           named_frames, open_known, pair_boxes, watch, write_video)

cv2.setNumThreads(1)
COLOURS = dict(red=(230, 40, 40), green=(40, 230, 40), blue=(40, 40, 230))


def blobs(image, upsample=0):
    "Faces are squares of one colour: a detector for films of squares"
    out = []
    for c in range(3):
        ys, xs = np.nonzero((image[..., c] > 160) & (image.sum(2) < 420))
        if len(ys) > 200: out.append(Face(Box(int(ys.min()), int(xs.max()) + 1, int(ys.max()) + 1, int(xs.min())), 1.))
    return out


class Colour(torch.nn.Module):
    "The mean colour is the vector; it counts its calls"
    calls = 0
    def forward(self, x): Colour.calls += len(x); return x.mean((2, 3))


@pytest.fixture(autouse=True)
def toy():
    register_detector('blobs', blobs)
    register_encoder('colour', lambda: Encoder(Colour(), 'colour', 16, 3, 'cosine', threshold=.9, device='cpu'))
    Colour.calls = 0
    yield
    from facelab import detect, embed
    detect._detectors.pop('blobs'); embed._makers.pop('colour'); embed._made.pop('colour', None)


@pytest.fixture
def gallery():
    g = Gallery('colour', 'blobs', 0)
    for name in ('red', 'green'): assert list(g.enrol(name, picture(**{name: (150, 40)}), consent=True).status) == ['ok']
    return g


def picture(**where):
    "A dark frame with a square of 40 for each name, at x, y"
    out = np.full((120, 320, 3), 30, np.uint8)
    for name, (x, y) in where.items(): out[y:y + 40, x:x + 40] = COLOURS[name]
    return out


@pytest.fixture
def film(tmp_path):
    "Red goes right, green goes left and behind red; blue is there for the second half"
    frames = [picture(**dict(green=(250 - 4*t, 20), red=(10 + 4*t, 24)), **(dict(blue=(140, 75)) if t >= 30 else {})) for t in range(60)]
    write_video(frames, tmp_path/'film.avi', 15)
    return tmp_path/'film.avi'


def test_pairing_is_the_best_of_all():
    "Against every permutation"
    rng = np.random.default_rng(0)
    for _ in range(60):
        old, new = ([Box(int(t), int(l) + 20, int(t) + 20, int(l)) for t, l in rng.integers(0, 30, (n, 2))] for n in rng.integers(1, 5, 2))
        got = sum(iou(old[i], new[j]) for i, j in pair_boxes(old, new, 0.))
        n = max(len(old), len(new)); table = np.zeros((n, n)); table[:len(old), :len(new)] = [[iou(a, b) for b in new] for a in old]
        assert got == pytest.approx(max(sum(table[i, p[i]] for i in range(n)) for p in permutations(range(n))))


def test_crossing_keeps_names(film, gallery):
    t = film_table(watch(film, gallery), gallery)
    assert sorted(t['name']) == ['green', 'red', UNKNOWN] and (t.doubt == '').all() and in_two_places(t) == []
    ends = {r.track: r for r in t.itertuples()}
    for tr in watch(film, gallery).tracks[:2]:
        a, b = tr.sightings[0][2].left, tr.sightings[-1][2].left
        assert (b - a > 200) == (t.set_index('track').name[tr.number] == 'red') and len(ends) == 3


def test_unknown_stays_unknown_and_empty_galleries_know_nobody(film, gallery):
    seen = watch(film, gallery)
    assert set(film_table(seen, gallery, threshold=1.)['name']) == {UNKNOWN}
    t = film_table(seen, Gallery('colour', 'blobs', 0)); assert set(t['name']) == {UNKNOWN} and t.score.isna().all()
    json.dumps(film_json(seen, t, Gallery('colour', 'blobs', 0)), allow_nan=False)


def test_a_few_embeddings_per_track_and_no_pictures_kept(film, gallery):
    Colour.calls = 0; seen = watch(film, gallery, every=1)
    assert seen.faces > 120 and Colour.calls <= 9 and all(o.chip is None for t in seen.tracks for o in t.best)
    Colour.calls = 0; assert len(watch(film, gallery, every=1, keep=1).tracks) == 3 and Colour.calls == 3


def test_chips_in_memory_are_bounded(film, gallery):
    held, most = [], []
    real = keep_best
    def spy(best, new, keep=3, apart=1.):
        out = real(best, new, keep, apart); held.append(len(out)); most.append(len(out)); return out
    with mock.patch('facelab.video.keep_best', spy): watch(film, gallery, every=1)
    assert max(most) <= 3 and len(held) > 100


def test_a_track_of_two_people_is_doubted(gallery):
    t = Track(1); t.seen(0, 0., Box(0, 9, 9, 0)); t.seen(3, .5, Box(0, 9, 9, 0)); t.best = [Look(.5, 0, 0., Box(0, 9, 9, 0), None)]
    t.vector, t.agree = gallery.vectors[0], .1
    f = Film('x', 4, .5, 8, 2, 2, [t])
    assert list(film_table(f, gallery).doubt) == ['two people?'] and list(film_table(f, gallery, threshold=.05).doubt) == ['']


def test_nobody_is_in_two_places():
    t = pd.DataFrame(dict(track=[1, 2, 3, 4], name=['A', 'A', 'A', UNKNOWN], **{'from': [0., 1., 5., 0.], 'to': [2., 3., 6., 9.]}))
    assert in_two_places(t) == [('A', 1, 2)]


def test_tracks_wait_and_end():
    box, tracker = Box(0, 10, 10, 0), Tracker(patience=1.)
    tracker.look(0, 0., [box]); assert tracker.look(1, 1., [])[1] == [] and len(tracker.live) == 1
    (again,), _ = tracker.look(2, 1., [box]); assert again.number == 1
    assert [t.number for t in tracker.look(3, 2.5, [box])[1]] == [1] and tracker.live[0].number == 2 and len(tracker.end()) == 1 and tracker.live == []


def test_quality_orders_looks():
    face = np.random.default_rng(0).integers(0, 255, (60, 60, 3), dtype=np.uint8); soft = cv2.GaussianBlur(face, (9, 9), 3)
    assert sharpness(soft) < .1*sharpness(face)
    points = np.array([(0, 0), (10, 0), (30, 0), (20, 0), (15, 12)]); turned = points + np.array([[0, 0]]*4 + [[8, 0]])
    assert frontal(points) == 1 > frontal(turned) > 0 and frontal(points*0) >= 0
    q = lambda c, p, h=100: look_quality(c, Face(Box(0, h, h, 0), 1., p))
    assert q(face, points) > max(q(soft, points), q(face, turned), q(face, points, 40)) and q(face, None) == q(face, points)


def test_best_looks_by_brute_force():
    "No two kept looks near each other, the best of all always kept"
    rng = np.random.default_rng(1)
    for _ in range(50):
        q, best = rng.random(30), []
        for i in range(30): best = keep_best(best, Look(q[i], i, i/5, None, None), 3, 1.)
        assert len(best) <= 3 and best[0].quality == q.max() and all(abs(a.seconds - b.seconds) >= 1 for a in best for b in best if a is not b)


@pytest.mark.parametrize('kind', CODES)
def test_kinds_of_files(tmp_path, kind):
    assert write_video([picture()]*4, tmp_path/f'a{kind}', 10) == 4
    got = list(video_frames(tmp_path/f'a{kind}')); assert len(got) == 4 and got[0].image.shape == (120, 320, 3)


@pytest.mark.parametrize('name,why', [('a.mov', 'written as'), ('a', 'written as'), ('none/a.mp4', 'no folder'), ('dir.mp4', 'is a folder')])
def test_places_that_are_none(tmp_path, name, why):
    (tmp_path/'dir.mp4').mkdir()
    with pytest.raises(ValueError, match=why): check_out(tmp_path/name)


def test_the_old_video_stays_when_the_new_one_fails(tmp_path, film):
    (tmp_path/'old.avi').write_bytes(b'old')
    def broken():
        yield picture()
        raise RuntimeError('stopped')
    with pytest.raises(RuntimeError): write_video(broken(), tmp_path/'old.avi')
    with mock.patch('facelab.video._count', lambda p: 1), pytest.raises(NotSaved, match='disk full'): write_video([picture()]*3, tmp_path/'old.avi')
    assert (tmp_path/'old.avi').read_bytes() == b'old' and sorted(p.name for p in tmp_path.iterdir()) == ['film.avi', 'old.avi']


def test_even_pace_by_brute_force():
    "At every moment of the copy, the picture that was on the screen (to half a picture)"
    rng = np.random.default_rng(0)
    for _ in range(40):
        times = np.cumsum(rng.uniform(.01, .4, 30)); times -= times[0]; fps = rng.uniform(5, 40)
        out = list(evenly([(i, t, i) for i, t in enumerate(times)], fps))
        assert abs(len(out) - (times[-1]*fps + 1)) <= 1
        for k, got in enumerate(out[:-1]): assert times[got] <= (k + .5)/fps + 1e-9 and (got + 1 == 30 or times[got + 1] >= (k + .5)/fps - 1/fps - 1e-9)


def test_boxes_between_looks():
    t = Track(1)
    for n, s, x in ((10, 1., 0), (13, 1.3, 30), (40, 4., 60)): t.seen(n, s, Box(0, x + 10, 10, x))
    assert [getattr(box_at(t, n), 'left', None) for n in (9, 10, 11, 12, 13, 14, 39, 40, 41)] == [None, 0, 10, 20, 30, None, None, 60, None]
    assert box_at(t, 26, gap=5.).left == 44


def test_named_video(tmp_path, film, gallery):
    f, t = name_film(film, gallery, tmp_path/'out.avi')
    a, b = list(video_frames(film)), list(video_frames(tmp_path/'out.avi'))
    assert len(a) == len(b) == 60 and a[30].image.shape == b[30].image.shape and np.abs(a[30].image.astype(int) - b[30].image).max() > 100
    assert b[-1].seconds == pytest.approx(a[-1].seconds, abs=.05)
    with pytest.raises(ValueError, match='the video itself'): name_film(film, gallery, film)
    same = list(named_frames(film, f, t[:0])); assert (np.asarray(same[30][2]) == a[30].image).all()


def test_labels_stay_inside():
    image = np.zeros((60, 90, 3), np.uint8)
    out = draw_faces(image, [Box(-20, 30, 20, -9), Box(40, 200, 90, 70), Box(99, 130, 120, 99), Box(20, 60, 40, 40)], ['李雷 0.50', 'Ann'*20, 'out', 'x'], [True, False, True, True])
    assert out.size == (90, 60) and np.asarray(out).any()


def test_films_that_are_none(tmp_path, gallery):
    (tmp_path/'empty.mp4').touch(); Image.new('RGB', (64, 64)).save(tmp_path/'photo.mp4', 'PNG'); (tmp_path/'text.avi').write_text('hello')
    for name, reason in (('empty.mp4', 'empty'), ('photo.mp4', 'photo'), ('text.avi', 'not a video'), ('none.avi', 'missing')):
        with pytest.raises(BadVideo) as e: watch(tmp_path/name, gallery)
        assert e.value.reason == reason
    for kw in (dict(every=0), dict(keep=0)):
        with pytest.raises(ValueError, match='1 or more'): watch(tmp_path/'empty.mp4', gallery, **kw)


def test_a_film_cut_short(tmp_path, film, gallery):
    (tmp_path/'cut.avi').write_bytes(film.read_bytes()[:film.stat().st_size//2])
    f = watch(tmp_path/'cut.avi', gallery); assert f.note.startswith('ends early') and 10 < f.frames < 50 and len(film_table(f, gallery)) >= 2


def test_a_film_of_one_frame_and_one_of_nobody(tmp_path, gallery):
    write_video([picture(red=(50, 50))], tmp_path/'one.avi'); f, t = name_film(tmp_path/'one.avi', gallery, tmp_path/'one-named.avi', least=1)
    assert list(t['name']) == ['red'] and f.frames == 1 and np.isnan(t.agree[0]) and len(film_table(f, gallery)) == 0
    write_video([picture()]*9, tmp_path/'nobody.avi'); f, t = name_film(tmp_path/'nobody.avi', gallery, tmp_path/'nobody-named.avi')
    assert len(t) == 0 and list(t.columns)[:2] == ['track', 'name'] and len(list(video_frames(tmp_path/'nobody-named.avi'))) == 9


def test_uneven_clock(tmp_path, gallery):
    gif = [Image.fromarray(picture(red=(x, 50))) for x in (50, 52, 82, 84, 86)]
    gif[0].save(tmp_path/'g.gif', save_all=True, append_images=gif[1:], duration=[100, 1500, 100, 100, 100])
    f, t = name_film(tmp_path/'g.gif', gallery, tmp_path/'g.avi', every=1)
    assert t['to'].max() == pytest.approx(1.8) and list(t['name']) == ['red'] and len(list(video_frames(tmp_path/'g.avi')))/f.fps == pytest.approx(1.8 + 1/f.fps, abs=.3)


def test_galleries(tmp_path, gallery):
    gallery.save(tmp_path/'g.npz'); assert open_known(tmp_path/'g.npz').people == ['red', 'green']
    (tmp_path/'bad.npz').write_bytes(b'no'); (tmp_path/'folder').mkdir()
    for bad in ('bad.npz', 'none.npz', 'folder'):
        with pytest.raises(ValueError): open_known(tmp_path/bad)


def run(capsys, *args, **kw):
    try: facelab_video(*map(str, args), **{k: str(v) if hasattr(v, 'suffix') else v for k, v in kw.items()}); code = 0
    except SystemExit as e: code = e.code
    return code, *capsys.readouterr()


def test_the_command(tmp_path, film, gallery, capsys):
    gallery.save(tmp_path/'g.npz')
    code, out, err = run(capsys, film, gallery=tmp_path/'g.npz', table=tmp_path/'t.csv', json=tmp_path/'t.json', out=tmp_path/'o.mp4')
    assert (code, err) == (0, '') and 'red' in out and UNKNOWN in out
    t, told = pd.read_csv(tmp_path/'t.csv'), json.loads((tmp_path/'t.json').read_text())
    assert list(t['name']) == [r['name'] for r in told['tracks']] and told['threshold'] == .9 and all(len(r['path']) == r['looks'] for r in told['tracks'])
    for change, word in ((dict(gallery=None), '--gallery'), (dict(gallery='none.npz'), 'no such gallery'), (dict(out=tmp_path/'o.mov'), 'written as'), (dict(every=0), '1 or more'), (dict(threshold=7.), 'threshold')):
        code, _, err = run(capsys, film, **(dict(gallery=tmp_path/'g.npz') | change)); assert code == 2 and err.count('\n') == 1 and word in err, err
    assert run(capsys, tmp_path/'none.mp4', gallery=tmp_path/'g.npz')[0] == 2


def test_the_command_for_real(tmp_path):
    "A process of its own, real faces, a folder of people"
    att = att_split()[1]; photos = [load_image(p) for p in att.path[att.person == 's31']]
    (tmp_path/'people'/'Ben').mkdir(parents=True); photos[0].resize((184, 224)).save(tmp_path/'people'/'Ben'/'1.png')
    def frame(t): out = Image.new('RGB', (320, 240), 'dimgrey'); out.paste(photos[4].resize((138, 168)), (20 + 8*t, 40)); return out
    write_video([frame(t) for t in range(7)], tmp_path/'film.mp4', 5)
    (tmp_path/'command.py').write_text('from facelab.video import facelab_video\nfacelab_video()\n')
    r = subprocess.run([sys.executable, '-W', 'ignore', str(tmp_path/'command.py'), str(tmp_path/'film.mp4'), '--gallery', str(tmp_path/'people'), '--out', str(tmp_path/'o.mp4')],
                       capture_output=True, text=True, timeout=240, env=os.environ | dict(OMP_NUM_THREADS='1'))
    assert r.returncode == 0 and r.stderr == '' and 'Ben' in r.stdout and (tmp_path/'o.mp4').exists(), (r.stdout, r.stderr)
