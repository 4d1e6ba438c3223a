"A folder sorted by people: groups, numbers that are promises, names that people type, a page that nothing can break out of"
import json
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from facelab.datasets import att_split
from facelab.detect import Box
from facelab.embed import Embeddings, similarity
from facelab.gallery import Gallery, RecipeMismatch
from facelab.sorting import (Remembered, bcubed, bcubed_faces, best_setting, copy_photos, facelab_sort, group_faces, group_threshold, join_groups, keep_numbers, photo_rows, read_names, report_page,
                             same_files, sort_faces, sort_folder, sweep_groups, thumbnails_of, write_names)

RECIPE = dict(detector='hog', upsample=1, align='chip', size=150, encoder='toy', metric='euclidean')
att = att_split()[1]


def photo(person, i): return Image.open(att.path[att.person == person].iloc[i]).convert('RGB')


def group(*faces):
    image = Image.new('RGB', (200*len(faces), 240))
    for x, (s, i) in enumerate(faces): image.paste(photo(s, i).resize((184, 224)), (8 + 200*x, 8))
    return image


def same(a, b): return len(set(zip(a, b))) == len(set(a)) == len(set(b))


def crowd(seed=0, people=12, photos=8, spread=.12, d=16):
    "Vectors of some people and who they are"
    rng = np.random.default_rng(seed); who = np.repeat(np.arange(people), rng.integers(1, photos + 1, people))
    return (rng.normal(size=(people, d))[who]*.3 + rng.normal(size=(len(who), d))*spread).astype(np.float32), [f'p{i}' for i in who]


def found_of(vectors, paths):
    "What `embed_folder` gives, without photos"
    faces = pd.DataFrame(dict(path=paths, person='', box=[Box(0, 10, 10, 0)]*len(paths), score=1.))
    report = pd.DataFrame(dict(path=list(dict.fromkeys(paths)))).assign(person='', status='ok', reason='', n_faces=1, seconds=0., row=0)
    return Embeddings(vectors, ['']*len(paths), RECIPE, list(paths), report, faces)


# ---- groups

def average_linkage(v, threshold):
    "The definition, step by step"
    groups = [[i] for i in range(len(v))]; s = similarity(v, v, 'euclidean').astype(float)
    while len(groups) > 1:
        best, a, b = max((s[np.ix_(g, h)].mean(), i, j) for i, g in enumerate(groups) for j, h in enumerate(groups) if i < j)
        if best < threshold: break
        groups[a] += groups.pop(b)
    return [next(k for k, g in enumerate(groups) if i in g) for i in range(len(v))]


@pytest.mark.parametrize('seed', range(3))
@pytest.mark.parametrize('threshold', [.5, .2, -.2])
def test_average_linkage(seed, threshold):
    v, _ = crowd(seed, 6, 6)
    assert same(group_faces(v, threshold=threshold).tolist(), average_linkage(v, threshold))


def test_groups_are_numbered_by_size():
    v, _ = crowd(3)
    for method in ('average', 'complete', 'single', 'hdbscan'):
        g = group_faces(v, threshold=.3, method=method); n = np.bincount(g)
        assert (np.diff(n) <= 0).all() and n.min() > 0
    assert group_faces(np.ones((5, 4), np.float32), threshold=.99).tolist() == [0]*5 and group_faces(np.eye(5, dtype=np.float32), 'cosine', .5).tolist() == list(range(5))


@pytest.mark.parametrize('metric', ['cosine', 'euclidean', 'l1'])
def test_every_metric(metric):
    v, who = crowd(1)
    g = group_faces(v, metric, {'cosine': .6, 'euclidean': .3, 'l1': -.5}[metric])
    assert len(g) == len(v) and g.min() == 0


def test_bcubed_by_hand():
    rng = np.random.default_rng(5)
    for _ in range(20):
        n = int(rng.integers(1, 30)); g, p = rng.integers(0, 6, n).tolist(), [f'p{i}' for i in rng.integers(0, 5, n)]
        precision, recall = bcubed_faces(g, p)
        for i in range(n):
            both = sum(g[j] == g[i] and p[j] == p[i] for j in range(n))
            assert precision[i] == pytest.approx(both/g.count(g[i])) and recall[i] == pytest.approx(both/p.count(p[i]))
        b = bcubed(g, p); assert 0 <= b.precision_lo <= b.precision + 1e-9 <= b.precision_hi + 2e-9 <= 1 + 3e-9 and b.faces == n
    with pytest.raises(ValueError, match='2 groups for 1 people'): bcubed_faces([1, 2], ['a'])


def test_intervals_hold():
    "New people of the same kind, 200 times: the interval of the first test holds the mean of all"
    rng = np.random.default_rng(0)
    def test(n=40): return np.repeat(np.arange(n), 5), np.repeat(rng.random(n), 5)
    held = 0
    for _ in range(200):
        who, split = test(); g = np.where(split < .3, 1000 + np.arange(len(who)), who)  # three people in ten are never grouped: recall .2
        b = bcubed(g, who); held += b.recall_lo <= .3*.2 + .7 <= b.recall_hi
    assert 180 <= held


def test_choosing():
    v, who = crowd(2); t = sweep_groups(Embeddings(v, who, RECIPE), np.array([-2., .2, .9]))
    assert best_setting(t) == .2 and t.precision.is_monotonic_increasing and t.recall.is_monotonic_decreasing
    assert list(sweep_groups(Embeddings(v, who, RECIPE), method='hdbscan', least=(2, 4)).setting) == [2, 4]
    assert group_threshold('dlib') > .4


# ---- numbers and memory

def test_numbers_are_never_used_again():
    assert keep_numbers([0, 0, 1], [5, 5, 5], 9).tolist() == [5, 5, 10] and keep_numbers([0, 1], [0, 0], 0).tolist() == [1, 2]
    assert keep_numbers([0]*4 + [1]*2, [1, 1, 2, 2, 2, 2], 2).tolist() in ([1]*4 + [2]*2,)


@pytest.mark.parametrize('seed', range(5))
def test_named_stays_whatever_comes(seed):
    "Photos in three portions: what was named in the first run is named in all, and nobody else gets its number"
    v, who = crowd(seed, 15, 9, .08); paths = [f'/x/{i}.jpg' for i in range(len(v))]; order = np.random.default_rng(seed).permutation(len(v))
    memory, names, before = Remembered(v[:0], np.zeros(0, int), RECIPE), {}, {}
    for n in (len(v)//3, 2*len(v)//3, len(v)):
        i = order[:n]; found = found_of(v[i], [paths[j] for j in i]); t = sort_faces(found, .4, None, memory, names).assign(i=i)
        from facelab.sorting import _update
        for j, g, p in zip(t.i, t.group, t.person):
            if before.get(j) in names: assert (g, p) == (before[j], names[before[j]])
        new = set(t.group) - set(before.values()); assert all(g > memory.last for g in new)
        memory = _update(memory, found, t, names); before.update(zip(t.i, t.group))
        names = names | {int(t.group.iloc[0]): f'Name {t.group.iloc[0]}'}
        assert len(memory.groups) == len(memory.vectors) >= n


def test_memory_of_another_recipe(tmp_path):
    m = Remembered(np.eye(3, dtype=np.float32), np.array([1, 2, 2]), RECIPE, 2); m.save(tmp_path/'g.npz')
    with pytest.raises(RecipeMismatch, match='different encoder'): Remembered.load(tmp_path/'g.npz', RECIPE | dict(encoder='other'))
    (tmp_path/'g.npz').write_bytes(b'half')
    with pytest.raises(ValueError, match='not a usable'): Remembered.load(tmp_path/'g.npz', RECIPE)
    assert join_groups(np.eye(3, dtype=np.float32), m, [], .5).tolist() == [0]*3


def test_known_people_come_first():
    v, who = crowd(4, 5, 6, .02); g = Gallery.from_embeddings(Embeddings(v[:1], ['Ann'], RECIPE), threshold=.5)
    t = sort_faces(found_of(v, [f'{i}.jpg' for i in range(len(v))]), .4, g)
    ann = np.array(who) == who[0]
    assert (t.person[ann] == 'Ann').all() and (t.how[ann] == 'known').all() and (t.group[ann] == 0).all() and (t.person[~ann] != 'Ann').all()
    both = sort_faces(found_of(v, [f'{i}.jpg' for i in range(len(v))]), .4, g, Remembered(v, t.group.to_numpy(), RECIPE, 9), {1: 'Ann'})
    assert (both.person == 'Ann').sum() == ann.sum() + (t.group == 1).sum()


# ---- names.csv

@pytest.mark.parametrize('text, words', [('group,name\n1,Ann\n1,Bob\n', 'line 3: group 1 has two names'), ('group,name\nAnn,1\n', 'line 2: the number of a group is missing'), ('group,name\n1,Unknown\n', 'line 2: .*strangers'),
    ('group,name\n1,"a\nb"\n', 'line 2: .*one line'), ('group,name\n1,person 12\n', 'without a name are called'), ('what\n', 'no columns'), ('', 'no columns'), ('\n\n', 'no columns'), ('group,name\n1,\u200b\n', 'visible')])
def test_what_cannot_be_a_name(tmp_path, text, words):
    (tmp_path/'n.csv').write_text(text, encoding='utf-8')
    with pytest.raises(ValueError, match=words): read_names(tmp_path/'n.csv')
    assert (tmp_path/'n.csv').read_text(encoding='utf-8') == text


@pytest.mark.parametrize('name', ['Ann', 'Zoë "Z" Lee, jr.', '李雷', '<img src=x onerror=alert(1)>', '../../x', "=cmd|' /C calc'!A0", 'a;b', 'x'*10_000, '\u202eevil'])
@pytest.mark.parametrize('mark', [',', ';', '\t'])
def test_names_come_back(tmp_path, name, mark):
    t = pd.DataFrame(dict(group=[3, 4], faces=[2, 1], photos=[2, 1], name=[name, ''])); write_names(t, tmp_path/'n.csv')
    assert read_names(tmp_path/'n.csv') == {3: name} and (tmp_path/'n.csv').read_bytes()[:3] == b'\xef\xbb\xbf'
    t.to_csv(tmp_path/'o.csv', sep=mark, index=False); assert read_names(tmp_path/'o.csv') == {3: name}


# ---- real photos

@pytest.fixture(scope='module')
def base(tmp_path_factory):
    "holiday/ with two people on three photos, a copy, a wall and a file that is none; already measured once in sorted/"
    d = tmp_path_factory.mktemp('sorting'); h = d/'holiday'; (h/'<b>').mkdir(parents=True)
    for name, faces in {'1.png': [('s31', 0), ('s33', 0)], '<b>/"2.png': [('s31', 1)], '3.png': [('s33', 1), ('s39', 0)]}.items(): group(*faces).save(h/name)
    Image.new('RGB', (120, 120), 'teal').save(h/'wall.png'); (h/'broken.jpg').write_bytes(b'no photo'); shutil.copy(h/'1.png', h/'1 copy.png')
    sort_folder(h, out=d/'sorted', workers=1)
    return d


@pytest.fixture
def root(base, tmp_path):
    shutil.copytree(base/'sorted', tmp_path/'sorted'); return base


def again(root, tmp_path, **kw): return sort_folder(root/'holiday', out=tmp_path/'sorted', workers=1, **kw)


def name(tmp_path, **names):
    t = pd.read_csv(tmp_path/'sorted'/'names.csv', keep_default_na=False); t['name'] = [names.get(f'_{g}', '') for g in t.group]; write_names(t, tmp_path/'sorted'/'names.csv')


def test_two_runs_are_the_same(root, tmp_path):
    before = {o.name: o.read_bytes() for o in (tmp_path/'sorted').iterdir() if o.suffix in ('.csv', '.html')}
    s = again(root, tmp_path)
    assert {o.name: o.read_bytes() for o in (tmp_path/'sorted').iterdir() if o.suffix in ('.csv', '.html')} == before
    assert len(s.photos) == 6 and s.faces.person.value_counts().to_dict() == {'Person 1': 3, 'Person 2': 3, 'Person 3': 1} and (s.faces.groupby('path').person.nunique() == s.faces.groupby('path').size()).all()
    assert s.photos.reason.str.startswith('the same file as 1').sum() == 1 and len(pd.read_csv(tmp_path/'sorted'/'photos.csv')) == 6
    assert all(o.stat().st_mode & 0o77 == 0 for o in (tmp_path/'sorted').iterdir())


def test_names_are_remembered_merged_and_taken_back(root, tmp_path):
    evil = '<script>alert(1)</script>'
    name(tmp_path, _1=evil, _2=evil); s = again(root, tmp_path); page = (tmp_path/'sorted'/'report.html').read_text(encoding='utf-8')
    assert s.faces.person.value_counts().to_dict() == {evil: 6, 'Person 3': 1} and '<script' not in page and '&lt;script&gt;' in page and '<b>/' not in page
    assert any('is twice on' in o for o in s.notes)
    s = again(root, tmp_path); assert s.faces.person.value_counts().to_dict() == {evil: 6, 'Person 3': 1}
    name(tmp_path, _1='Ann'); s = again(root, tmp_path); assert s.faces.person.value_counts().to_dict() == {'Ann': 3, 'Person 2': 3, 'Person 3': 1}


def test_groups_that_are_gone(root, tmp_path):
    with (tmp_path/'sorted'/'names.csv').open('a', encoding='utf-8') as f: f.write('77,1,1,Nobody\n')
    s = again(root, tmp_path); assert 'Nobody' not in set(s.faces.person) and any("group 77 'Nobody'" in o for o in s.notes) and read_names(tmp_path/'sorted'/'names.csv') == {77: 'Nobody'}
    (tmp_path/'sorted'/'groups.npz').unlink(); s = again(root, tmp_path)
    assert s.faces.group.min() > 77, 'a number in names.csv never means somebody else'


def test_the_table_is_not_overwritten_while_it_is_edited(root, tmp_path, monkeypatch):
    import facelab.sorting as m
    real = m.photo_rows
    def slow(*a): name(tmp_path, _1='typed meanwhile'); os.utime(tmp_path/'sorted'/'names.csv', (1, 1)); return real(*a)
    monkeypatch.setattr(m, 'photo_rows', slow); s = again(root, tmp_path)
    assert read_names(tmp_path/'sorted'/'names.csv') == {1: 'typed meanwhile'} and 'run again' in s.notes[-1]


def test_known_people_from_folder_and_gallery(root, tmp_path):
    (tmp_path/'people'/'Ann').mkdir(parents=True); photo('s31', 5).save(tmp_path/'people'/'Ann'/'1.png'); (tmp_path/'people'/'Ann'/'2.png').write_bytes(b'')
    s = again(root, tmp_path, people=tmp_path/'people')
    assert (s.faces.person == 'Ann').sum() == 3 and any('2.png was left out' in o for o in s.notes)
    with pytest.raises(ValueError, match='choose a folder outside'): sort_folder(root/'holiday', tmp_path/'people', tmp_path/'people'/'out')


def test_copies(root, tmp_path):
    before = {o: o.stat().st_mtime_ns for o in (root/'holiday').rglob('*')}
    s = again(root, tmp_path, copy_to=tmp_path/'c')
    assert sorted(o.name for o in (tmp_path/'c').iterdir()) == ['(no face)', '.facelab-copies.json', 'Person 1', 'Person 2', 'Person 3'] and s.photos.copies.map(len).sum() == len(s.faces) + 1
    name(tmp_path, _1='../../x'); (tmp_path/'c'/'Person 2'/'mine.txt').write_text('mine'); changed = next(o for o in (tmp_path/'c'/'Person 1').iterdir()); changed.write_bytes(b'changed by me')
    s = again(root, tmp_path, copy_to=tmp_path/'c')
    assert not (tmp_path.parent/'x').exists() and [o.read_bytes() for o in (tmp_path/'c'/'Person 1').iterdir()] == [b'changed by me'] and (tmp_path/'c'/'Person 2'/'mine.txt').exists()
    assert all((tmp_path/'c'/o).resolve().is_relative_to(tmp_path/'c') for k in s.photos.copies for o in k)
    assert {o: o.stat().st_mtime_ns for o in (root/'holiday').rglob('*')} == before
    (tmp_path/'full').mkdir(); (tmp_path/'full'/'a').write_text('')
    with pytest.raises(ValueError, match='not empty'): copy_photos(s.photos, tmp_path/'full')
    links = copy_photos(s.photos, tmp_path/'l', link=True); assert all((tmp_path/'l'/o).is_symlink() for k in links.copies for o in k)


def test_a_list_of_copies_from_elsewhere(root, tmp_path):
    "A forged list cannot make us delete files outside"
    (tmp_path/'c').mkdir(); victim = tmp_path/'victim.txt'; victim.write_text('x'); st = victim.stat()
    (tmp_path/'c'/'.facelab-copies.json').write_text(json.dumps({'../victim.txt': [st.st_size, st.st_mtime_ns], str(victim): [st.st_size, st.st_mtime_ns]}))
    again(root, tmp_path, copy_to=tmp_path/'c'); assert victim.exists()


def test_nothing_to_sort(tmp_path):
    (tmp_path/'e').mkdir()
    with pytest.raises(ValueError, match='no photos in e'): sort_folder(tmp_path/'e')
    with pytest.raises(ValueError, match='not a folder'): sort_folder(tmp_path/'nowhere')
    Image.new('RGB', (100, 100)).save(tmp_path/'e'/'a.png'); (tmp_path/'e'/'b.jpg').write_bytes(b'')
    s = sort_folder(tmp_path/'e', workers=1); assert s.faces.empty and s.names.empty and list(s.photos.status) == ['no face', 'bad image'] and (tmp_path/'e-sorted'/'report.html').exists()
    assert sorted(o.name for o in tmp_path.iterdir()) == ['e', 'e-sorted'] and sort_folder(tmp_path/'e', workers=1).faces.empty


def test_thumbnails_of_what_is_gone(root, tmp_path):
    v, _ = crowd(0, 3, 3); found = found_of(v, [f'/nowhere/{i}.jpg' for i in range(len(v))]); t = sort_faces(found, .3)
    page = report_page(t, photo_rows(found.report, t, '/nowhere'), [], .3, 'x'); assert page.count('no picture') == len(v) and '<img' not in page
    assert thumbnails_of(root/'holiday'/'broken.jpg', [Box(0, 9, 9, 0)]) == ['']


def test_a_face_on_very_many_photos():
    rng = np.random.default_rng(0); v = (np.ones(8) + rng.normal(size=(600, 8))*.01).astype(np.float32); found = found_of(v, [f'/n/{i}.jpg' for i in range(600)])
    t = sort_faces(found, .5); page = report_page(t, photo_rows(found.report, t, '/n'), [], .5, 'x')
    assert set(t.person) == {'Person 1'} and page.count('no picture') == 12 and 'and 588 more' in page and page.count('<tr>') == 601


def test_copies_of_a_file(tmp_path):
    for n, c in zip('abcd', (b'xx', b'yy', b'xx', b'xx')): (tmp_path/n).write_bytes(c)
    assert same_files([tmp_path/n for n in 'abcd'] + [tmp_path/'gone']) == {str(tmp_path/'c'): str(tmp_path/'a'), str(tmp_path/'d'): str(tmp_path/'a')}


def test_command(root, tmp_path, capsys):
    with pytest.raises(SystemExit) as e: facelab_sort(str(root/'holiday'), out=str(tmp_path/'sorted'), json='-')
    said = capsys.readouterr(); got = json.loads(said.out)
    assert e.value.code == got['code'] == 1 and said.err == '' and [o['status'] for o in got['photos'] if o['photo'] == 'broken.jpg'] == ['bad image'] and len(got['photos']) == 6 and len(got['faces']) == 7 and {'photo', 'status', 'people'} <= set(got['photos'][0])
    (tmp_path/'sorted'/'names.csv').write_text('group,name\n1,Ann\n1,Bob\n')
    for args, kw in (((tmp_path/'nowhere',), {}), ((root/'holiday',), dict(out=str(tmp_path/'sorted'))), ((root/'holiday',), dict(encoder='magic', out=str(tmp_path/'o'))), ((root/'holiday',), dict(threshold=7., out=str(tmp_path/'o')))):
        with pytest.raises(SystemExit) as e: facelab_sort(str(args[0]), **kw)
        err = capsys.readouterr().err; assert e.value.code == 2 and re.fullmatch('facelab-sort: [^\n]+\n', err)
