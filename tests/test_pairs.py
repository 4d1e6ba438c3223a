"""Pairs: counts by hand, draws against double loops, copies by seed, and folders that survive bad files and interruptions."""
import itertools, os, subprocess, sys
import numpy as np, pandas as pd, pytest
from PIL import Image
from facelab import pairs as P
from facelab.datasets import IdentityLeak, att_faces, check_leak, split_people


def table(**counts):
    return pd.DataFrame([(f'{p}/{i}', p) for p, k in counts.items() for i in range(k)], columns=['path', 'person'])


def keys(df): return [frozenset(o) for o in df[['left', 'right']].values]


@pytest.fixture(scope='module')
def faces(): return att_faces()


@pytest.fixture
def people(tmp_path):
    "Three people, two coloured pictures each"
    rows, rng = [], np.random.default_rng(0)
    for p in ('Ann', 'Bob / B. Ö', '李'):
        for i in range(2):
            f = tmp_path/f'{len(rows)} {i}.png'
            Image.fromarray(rng.integers(0, 255, (40, 30, 3), dtype=np.uint8)).save(f)
            rows.append((f, p))
    return pd.DataFrame(rows, columns=['path', 'person'])


@pytest.mark.parametrize('n,k', [(1, 1), (1, 5), (4, 3), (7, 2), (40, 10)])
def test_mated_count(n, k):
    df = table(**{f'p{i}': k for i in range(n)})
    assert len(P.mated_pairs(df)) == n*k*(k - 1)//2


@pytest.mark.parametrize('counts', [dict(a=1, b=1), dict(a=5, b=1, c=3), dict(z=2, a=2, m=4, b=1)])
def test_both_kinds_against_a_double_loop(counts):
    df = table(**counts).sample(frac=1, random_state=1)
    loop = {True: set(), False: set()}
    for a, b in itertools.combinations(df.itertuples(), 2): loop[a.person == b.person].add(frozenset((a.path, b.path)))
    for mated, got in ((True, P.mated_pairs(df)), (False, P.nonmated_pairs(df))):
        assert len(got) == len(loop[mated]) and set(keys(got)) == loop[mated]
        assert (got.mated == mated).all() and ((got.left_person == got.right_person) == mated).all()


def test_every_draw_is_a_subset_and_every_size_works():
    df = table(a=3, b=2, c=1)
    full = set(keys(P.nonmated_pairs(df)))
    assert len(full) == 15 - 4
    for n in range(12):
        got = keys(P.nonmated_pairs(df, n, seed=n))
        assert len(got) == len(set(got)) == n and set(got) <= full
    with pytest.raises(ValueError, match='this table has 11'): P.nonmated_pairs(df, 12)


def test_draw_is_even():
    df = table(a=3, b=2, c=1)
    seen = pd.Series([k for s in range(1100) for k in keys(P.nonmated_pairs(df, 2, seed=s))]).value_counts()
    assert len(seen) == 11 and seen.between(140, 260).all()  # 200 expected


def test_large_tables_are_not_listed():
    n = 200_000
    df = pd.DataFrame(dict(path=[f'{i}.jpg' for i in range(n)], person=[f'p{i//2}' for i in range(n)]))
    got = P.nonmated_pairs(df, 1000)
    assert len(set(keys(got))) == 1000 and (got.left_person != got.right_person).all()


@pytest.mark.parametrize('positives,kinds', [('both', {'': 20, 'other photo': 10, 'augmented copy': 10}),
    ('augmented', {'': 20, 'augmented copy': 20}), ('photos', {'': 20, 'other photo': 20})])
def test_make_pairs_kinds(positives, kinds):
    df = table(a=4, b=4, c=4, d=4)
    got = P.make_pairs(df, 40, positives=positives)
    assert got.columns.tolist() == ['left', 'right', 'mated', 'left_person', 'right_person', 'positive']
    assert got.positive.value_counts().to_dict() == kinds and got.index.tolist() == list(range(40))
    assert (got.mated == (got.left_person == got.right_person)).all() and (got.mated == (got.positive != '')).all()
    assert ((got.left == got.right) == (got.positive == 'augmented copy')).all()
    two = keys(got[got.left != got.right])
    assert len(two) == len(set(two))
    person = df.set_index('path').person
    assert (person[got.left].values == got.left_person).all() and (person[got.right].values == got.right_person).all()


def test_make_pairs_seed_balance_and_sides():
    df = table(**{f'p{i}': 5 for i in range(12)})
    a = P.make_pairs(df, 101)
    pd.testing.assert_frame_equal(a, P.make_pairs(df, 101))
    pd.testing.assert_frame_equal(a, P.make_pairs(df.assign(extra=1), 101))
    assert not a.equals(P.make_pairs(df, 101, seed=1)) and a.mated.sum() == 50
    natural = P.make_pairs(df, 177, balanced=False, positives='photos')
    assert natural.mated.sum() == round(177*120/1770)
    d = P.make_pairs(df, 1000).query('not mated')
    assert .4 < (d.left_person < d.right_person).mean() < .6


def test_make_pairs_takes_the_whole_table_when_asked():
    df = table(a=2, b=2)
    got = P.make_pairs(df, 8)
    assert set(keys(got[~got.mated])) == set(keys(P.nonmated_pairs(df)))
    assert got.positive.value_counts().to_dict() == {'': 4, 'other photo': 2, 'augmented copy': 2}
    with pytest.raises(ValueError, match='this table has 4'): P.make_pairs(df, 10)


def test_everyone_once_before_anyone_twice():
    got = P.make_pairs(table(a=30, b=2, c=2, d=3), 12, positives='photos')
    count = got[got.mated].left_person.value_counts()
    assert count['b'] == count['c'] == 1 and count['d'] == 2 and count['a'] == 2


def test_one_photo_each_and_one_person():
    one = table(a=1, b=1, c=1)
    assert P.make_pairs(one, 6).positive.value_counts().to_dict() == {'': 3, 'augmented copy': 3}
    with pytest.raises(ValueError, match="positives='both'"): P.make_pairs(one, 6, positives='photos')
    for df in (table(a=5), table(a=1)):
        with pytest.raises(ValueError, match='two people'): P.make_pairs(df, 4)
    with pytest.raises(ValueError, match='two people'): P.make_pairs(table(a=1).iloc[:0], 4)
    with pytest.raises(ValueError, match='augmented'): P.make_pairs(one, 4, positives='x')


def test_tables_that_contradict_themselves():
    df = table(a=2, b=2)
    assert len(P.mated_pairs(pd.concat([df, df]))) == 2
    with pytest.raises(ValueError, match='two names'): P.mated_pairs(pd.concat([df, df.assign(person='c')]))
    with pytest.raises(ValueError, match='no path or no person'): P.mated_pairs(df.assign(person=['a', None, 'b', 'b']))


def test_a_split_of_people_is_a_split_of_pairs(faces):
    small = faces.groupby('person').head(3)
    train, valid = (P.make_pairs(o, 40) for o in split_people(small))
    check_leak(P.faces_of(train), P.faces_of(valid), near=None)
    rows = P.make_pairs(small, 300)
    with pytest.raises(IdentityLeak): check_leak(P.faces_of(rows[:240]), P.faces_of(rows[240:]), near=None)
    assert P.faces_of(rows).columns.tolist() == ['path', 'person'] and not P.faces_of(rows).path.duplicated().any()


def test_augmentation_is_the_recipe():
    import cv2
    flip, rotate, light, noise, holes, resize = P.augmentation(160).transforms
    assert [t.p for t in (flip, rotate, light, noise, holes, resize)] == [.5, .5, .5, .2, .2, 1]
    assert rotate.limit == (-15, 15) and rotate.border_mode == cv2.BORDER_REFLECT_101
    assert light.brightness_limit == light.contrast_limit == (-.2, .2)
    assert np.allclose(np.array(noise.std_range)*255, [10**.5, 50**.5])
    assert (holes.num_holes_range, holes.hole_height_range, holes.hole_width_range) == ((1, 8), (8, 8), (8, 8))
    assert (resize.height, resize.width) == (160, 160) and P.augmentation().transforms[-1].height == 224


def test_steps_are_independent_coins():
    def taken(seed):
        aug = P.augmentation(8, seed)
        aug.save_applied_params = True
        names = [n for n, _ in aug(image=np.zeros((8, 8, 3), np.uint8))['applied_transforms']]
        return [n in names for n in ('HorizontalFlip', 'Rotate', 'RandomBrightnessContrast', 'GaussNoise', 'CoarseDropout')]
    a = np.array([taken(s) for s in range(600)])
    assert np.allclose(a.mean(0), [.5, .5, .5, .2, .2], atol=.07)
    assert np.abs(np.corrcoef(a.T) - np.eye(5)).max() < .15


def test_nothing_phones_home():
    code = ("import facelab.pairs, sys; assert 'albumentations' not in sys.modules and 'torch' not in sys.modules; import socket\n"
            "def no(*a, **k): raise SystemExit('network')\n"
            "socket.socket.connect = no; socket.getaddrinfo = no\n"
            "facelab.pairs.augmentation(); assert 'albumentations' in sys.modules")
    env = {k: v for k, v in os.environ.items() if k != 'NO_ALBUMENTATIONS_UPDATE'}
    r = subprocess.run([sys.executable, '-W', 'error::UserWarning', '-c', code], env=env, capture_output=True, text=True)
    assert r.returncode == 0, r.stderr


def test_read_pair(people):
    copies = P.make_pairs(people, 24, positives='augmented')
    mated = copies[copies.mated]
    looks = {P.read_pair(row, 32)[1].tobytes() for _, row in mated[mated.left == mated.left.iloc[0]].iterrows()}
    assert len(looks) > 1
    row = mated.iloc[3]
    a, b = P.read_pair(row, 32), P.read_pair(copies.loc[row.name], 32)
    assert a[0] == b[0] and a[1] == b[1] and a[0].size == (32, 32) and a[0].mode == 'RGB'
    assert {P.read_pair(row, 32, seed=s)[1].tobytes() for s in range(5)} != {a[1].tobytes()}
    d = copies[~copies.mated].iloc[0]
    assert P.read_pair(d, 32)[1] == P.augment(d.right, P._plain(32))
    aug = P.augmentation(32, seed=0)
    drawn = [P.read_pair(d, 32, aug) for _ in range(8)]
    assert all(len({o[i].tobytes() for o in drawn}) > 1 for i in (0, 1))


def test_pair_image():
    red, blue = Image.new('RGB', (50, 70), 'red'), Image.new('L', (9, 9), 200)
    for size in (224, 101, 2):
        a = np.array(P.pair_image(red, blue, size))
        assert a.shape == (size, size, 3)
        assert (a[:, :size//2] == (255, 0, 0)).all() and (a[:, size//2:] == 200).all()


def test_write_pairs_survives_bad_files(people, tmp_path):
    pairs = P.make_pairs(people, 10)
    (tmp_path/'text.jpg').write_text('no picture')
    pairs.loc[2, 'left'], pairs.loc[5, 'right'], pairs.loc[7, 'right'] = str(tmp_path/'gone.jpg'), str(tmp_path/'text.jpg'), str(tmp_path)
    r = P.write_pairs(pairs, tmp_path/'out', size=32, progress=False)
    assert len(r) == 10 and r.columns.tolist() == ['path', 'label', 'status', 'reason'] and r.index.equals(pairs.index)
    assert r.status[[2, 5, 7]].tolist() == ['bad image']*3 and (r.status.drop([2, 5, 7]) == 'ok').all()
    assert [o.split(':')[0] for o in r.reason[[2, 5, 7]]] == ['missing', 'not an image', 'unreadable']
    files = sorted(str(p) for p in (tmp_path/'out').rglob('*.*') if p.suffix != '.sha256')
    assert files == sorted(r.path[r.path != ''])
    assert (r.label == np.where(pairs.mated, 'same', 'different')).all()
    for p, label in zip(r.path, r.label):
        if p: assert p.split(os.sep)[-2] == label and Image.open(p).size == (32, 32)


def test_write_pairs_resumes(people, tmp_path, monkeypatch):
    pairs, whole = P.make_pairs(people, 10), tmp_path/'whole'
    P.write_pairs(pairs, whole, size=32, progress=False)
    real, calls = P.pair_image, []
    def stop(*a):
        calls.append(1)
        if len(calls) == 5: raise KeyboardInterrupt
        return real(*a)
    monkeypatch.setattr(P, 'pair_image', stop)
    with pytest.raises(KeyboardInterrupt): P.write_pairs(pairs, tmp_path/'cut', size=32, progress=False)
    r = P.write_pairs(pairs, tmp_path/'cut', size=32, progress=False)
    assert len(calls) == 5 + 6 and (r.status == 'ok').all()
    P.write_pairs(pairs, tmp_path/'cut', size=32, progress=False)
    assert len(calls) == 11
    for f in whole.rglob('*.jpg'): assert f.read_bytes() == (tmp_path/'cut'/f.relative_to(whole)).read_bytes()
    assert not list((tmp_path/'cut').rglob('*.part'))


def test_a_folder_holds_one_set(people, tmp_path):
    pairs = P.make_pairs(people, 6)
    P.write_pairs(pairs, tmp_path/'a', size=32, progress=False)
    for other in (dict(seed=1), dict(size=33), dict(aug_all=True), dict(pairs=P.make_pairs(people, 6, seed=1))):
        with pytest.raises(ValueError, match='holds other pairs'):
            P.write_pairs(**{**dict(pairs=pairs, dest=tmp_path/'a', size=32, progress=False), **other})
    assert (P.write_pairs(pairs, tmp_path/'b', size=32, progress=True, aug_all=True).status == 'ok').all()


def test_triplets():
    df = table(a=3, b=1, c=2).sample(frac=1, random_state=0)
    t, person = P.triplets(df, 3000), df.set_index('path').person
    assert t.columns.tolist() == ['anchor', 'positive', 'negative', 'anchor_person', 'negative_person']
    assert (person[t.anchor].values == person[t.positive].values).all() and (t.anchor != t.positive).all()
    assert (person[t.anchor].values == t.anchor_person).all() and (person[t.negative].values == t.negative_person).all()
    assert (t.anchor_person != t.negative_person).all()
    assert len(t.drop_duplicates()) == 3*2*3 + 2*1*4  # every possible triplet turns up
    pd.testing.assert_frame_equal(t, P.triplets(df, 3000))
    with pytest.raises(ValueError, match='two photos'): P.triplets(table(a=1, b=1), 2)
    with pytest.raises(ValueError, match='two people'): P.triplets(table(a=3), 2)
