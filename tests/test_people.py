"Faces of photos named from a folder of people: strangers, failures, labels and files"
import json
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from facelab.crop import safe_name
from facelab.datasets import att_split
from facelab.detect import Box
from facelab.gallery import UNKNOWN
from facelab.images import load_image
from facelab.people import (_check_out, _has_all, _fonts, draw_names, enrol_folder, face_rows, facelab_people, name_photos, name_font, people_demo, picture_name, place_labels,
                            write_pictures)

att = att_split()[1]


def photo(person, i): return Image.open(att.path[att.person == person].iloc[i]).convert('RGB')


@pytest.fixture(scope='module')
def root(tmp_path_factory):
    "people/ with two people, photos/ with one of them and a stranger side by side, a wall, and a file that is none"
    d = tmp_path_factory.mktemp('demo')
    for s, name in (('s31', 'Ann'), ('s33', 'Ольга')):
        (d/'people'/name).mkdir(parents=True)
        for i in range(2): photo(s, i).save(d/'people'/name/f'{i}.png')
    (d/'photos').mkdir()
    group = Image.new('RGB', (368, 224))
    for x, (s, i) in enumerate([('s31', 5), ('s39', 0)]): group.paste(photo(s, i).resize((184, 224)), (184*x, 0))
    group.save(d/'photos'/'party.png'); Image.new('L', (200, 200), 90).save(d/'photos'/'wall.png'); (d/'photos'/'text.jpg').write_bytes(b'hello')
    return d


@pytest.fixture(scope='module')
def gallery(root): return enrol_folder(root/'people')[0]


def test_strangers_stay_unknown(gallery, root):
    f = name_photos(gallery, root/'photos').faces.sort_values('box', key=lambda b: b.str[3])
    assert list(f['name']) == ['Ann', UNKNOWN] and (f.score[f['name'] == UNKNOWN] < gallery.threshold).all()
    for t in (-1., .2, .5, .99):
        g = name_photos(gallery, root/'photos'/'party.png', threshold=t).faces
        assert ((g.score >= t) == (g['name'] != UNKNOWN)).all()


def test_every_photo_is_in_the_list(gallery, root):
    rows = face_rows(name_photos(gallery, root/'photos'))
    assert list(rows.status) == ['ok', 'ok', 'bad image', 'no face'] and list(rows.face) == [1, 2, 0, 0]
    none = face_rows(name_photos(gallery, root/'photos'/'wall.png')); assert list(none.status) == ['no face'] and write_pictures(none, root/'photos', root/'none').picture.tolist() == ['']
    gone = face_rows(name_photos(gallery, pd.DataFrame(dict(path=[str(root/'photos'/'party.png'), str(root/'gone.jpg')])))); assert list(gone.status) == ['ok', 'ok', 'bad image'] and gone.reason.iloc[-1] == 'missing'


def test_who_can_be_enrolled(tmp_path, root):
    with pytest.raises(ValueError, match='not a folder'): enrol_folder(tmp_path/'nowhere')
    (tmp_path/'a').mkdir()
    with pytest.raises(ValueError, match='no folders of people'): enrol_folder(tmp_path/'a')
    (tmp_path/'a'/'Ann').mkdir()
    with pytest.raises(ValueError, match='no photos in them'): enrol_folder(tmp_path/'a')
    Image.new('RGB', (99, 99)).save(tmp_path/'a'/'Ann'/'1.png')
    with pytest.raises(ValueError, match='none of the 1 photos .* 1 no face'): enrol_folder(tmp_path/'a')
    (tmp_path/'a'/'Ann'/'2.png').write_bytes((root/'photos'/'party.png').read_bytes()); photo('s31', 0).convert('LA').save(tmp_path/'a'/'Ann'/'3.png')
    g, report = enrol_folder(tmp_path/'a'); assert list(report.status) == ['no face', 'several faces', 'ok'] and len(g.names) == 1
    assert report.reason[1] == '2 faces, whose is the name?'
    (tmp_path/'a'/'unknown').mkdir(); photo('s31', 0).save(tmp_path/'a'/'unknown'/'1.png')
    with pytest.raises(ValueError, match='answer for strangers'): enrol_folder(tmp_path/'a')


def test_fonts():
    for text in ('Łukasz', 'Ελένη', 'Иван', "O'Neil, jr. <b>"): assert name_font(text)[0] == text and name_font(text)[1] == _fonts()[0]
    assert name_font('a\u202eb\x07c\n')[0] == 'abc' and len(name_font('é'*500)[0]) == 40
    text, path = name_font('李雷\U00012000'); assert _has_all(path, text) and text


@pytest.mark.parametrize('seed', range(30))
def test_labels_hide_nobody(seed):
    rng = np.random.default_rng(seed); n = rng.integers(1, 12); w, h = rng.integers(200, 900, 2)
    boxes = [Box(t, min(l + s, w), min(t + s, h), l) for t, l, s in zip(rng.integers(0, h - 20, n), rng.integers(0, w - 20, n), rng.integers(15, 200, n))]
    out = place_labels(boxes, [tuple(rng.integers(10, 150, 2)) for _ in range(n)], (w, h)); placed = [o for o in out if o]
    over = lambda a, b: min(a.right, b.right) > max(a.left, b.left) and min(a.bottom, b.bottom) > max(a.top, b.top)
    assert len(out) == n and all(0 <= o.left and o.right <= w and 0 <= o.top and o.bottom <= h for o in placed)
    assert not any(over(o, b) for i, o in enumerate(placed) for b in [*boxes, *placed[:i]])


@pytest.mark.parametrize('size', [(92, 112), (30, 900), (640, 480), (5000, 3000)])
def test_pictures_of_any_size(size):
    image = Image.new('RGB', size, 'grey'); w, h = size
    out = draw_names(image, [Box(h//4, w//2, h//2, w//4), Box(0, w, h, 0)], ['Ann', 'X'*60], [True, False])
    assert 480 <= max(out.size) <= 2600 and out.mode == 'RGB' and image.getpixel((0, 0)) == (128, 128, 128)
    with_all = draw_names(np.zeros((50, 50, 3), np.uint8), [], []); assert with_all.size == (480, 480)


def test_the_original_is_left_alone_and_nothing_half_written(gallery, root, tmp_path):
    before = (root/'photos'/'party.png').read_bytes()
    rows = write_pictures(face_rows(name_photos(gallery, root/'photos')), root/'photos', tmp_path/'out')
    assert [o.name for o in (tmp_path/'out').iterdir()] == ['party.png'] and (root/'photos'/'party.png').read_bytes() == before
    assert Image.open(tmp_path/'out'/'party.png').width >= 480 and rows.picture.tolist() == ['party.png']*2 + ['']*2


def test_names_of_pictures():
    names = [picture_name(f'q/{o}', 'q') for o in ('a.jpg', 'b/a.jpg', 'b_a.jpg', 'a.JPEG', 'a.webp', 'a.png', 'c:d.png')]
    assert len({o.lower() for o in names}) == len(names) and all(o.rsplit('.', 1)[1] in ('jpg', 'jpeg', 'png') and safe_name(o.rsplit('.', 1)[0]) for o in names)


def test_where_pictures_must_not_go(root, tmp_path):
    for out in (root/'photos', root/'photos'/'x', root/'people', root/'people'/'Ann'):
        with pytest.raises(ValueError, match='choose a folder outside'): _check_out(out, root/'people', root/'photos')
    (tmp_path/'file').write_text('')
    with pytest.raises(ValueError, match='is a file'): _check_out(tmp_path/'file', root/'people')


def test_command(root, tmp_path, capsys):
    with pytest.raises(SystemExit) as e: facelab_people(str(root/'people'), str(root/'photos'), out=str(tmp_path/'out'), json=str(tmp_path/'faces.json'))
    assert e.value.code == 1 and 'unknown' in capsys.readouterr().out
    got = json.loads((tmp_path/'faces.json').read_text(encoding='utf-8'))
    assert [o['name'] for o in got['faces'] if o['face']] and len(got['faces']) == 4 and len(got['people']) == 4 and got['faces'][2]['score'] is None and len(got['faces'][0]['box']) == 4
    for args in ((root/'people', root/'nowhere'), (root/'photos', root/'photos'), (root/'people', None)):
        with pytest.raises(SystemExit) as e: facelab_people(*(o and str(o) for o in args))
        assert e.value.code == 2 and capsys.readouterr().err.startswith('facelab-people: ')
    assert facelab_people(str(root/'people'), str(root/'photos'/'wall.png')) is None


def test_a_photo_that_vanishes_between_finding_and_drawing(gallery, root, tmp_path):
    (tmp_path/'q').mkdir(); p = tmp_path/'q'/'a.png'; p.write_bytes((root/'photos'/'party.png').read_bytes())
    rows = face_rows(name_photos(gallery, p)); p.unlink()
    out = write_pictures(rows, tmp_path/'q', tmp_path/'out'); assert set(out.reason) == {'named, but not drawn: missing'} and list(out['name']) == list(rows['name'])


def test_one_person_alone(root, tmp_path):
    (tmp_path/'people'/'Ann').mkdir(parents=True); photo('s31', 0).save(tmp_path/'people'/'Ann'/'1.png')
    rows, report = people_demo(tmp_path/'people', root/'photos'/'party.png')
    assert sorted(rows['name']) == ['Ann', UNKNOWN] and len(report) == 1


def test_photos_beside_folders_are_not_lost(tmp_path):
    photos = att_split()[1]
    path = lambda s, i: photos.path[photos.person == s].iloc[i]
    for to in ('people/Ann/0.png', 'people/Bob/0.png', 'new/loose.png', 'new/more/deep.png'):
        (tmp_path/to).parent.mkdir(parents=True, exist_ok=True)
        load_image(path('s31' if 'Ann' in to or 'new' in to else 's33', 3 if 'new' in to else 0)).save(tmp_path/to)
    rows, _ = people_demo(tmp_path/'people', tmp_path/'new', progress=False)
    assert sorted(Path(p).name for p in rows.path) == ['deep.png', 'loose.png'] and set(rows.name) == {'Ann'}


def test_sorting_from_the_same_command(tmp_path):
    photos = att_split()[1]
    for s, name in (('s31', 'Ann'), ('s33', 'Bob')):
        for i in range(4):
            to = tmp_path/(f'people/{name}/{i}.png' if i < 2 else f'holiday/{name}{i}.png'); to.parent.mkdir(parents=True, exist_ok=True)
            load_image(photos.path[photos.person == s].iloc[i]).save(to)
    r = subprocess.run([Path(sys.executable).parent/'facelab-people', 'people', '--sort', 'holiday'], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert r.returncode == 0 and 'Ann' in r.stdout and 'Bob' in r.stdout, r.stdout + r.stderr
    assert list(tmp_path.rglob('*.html'))
