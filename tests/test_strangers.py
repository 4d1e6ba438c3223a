"facelab.strangers against double loops and drawn galleries, with ties, bad input, and groups that may not share people"
import matplotlib.pyplot as plt, numpy as np, pandas as pd, pytest
from facelab.baserates import fpir_by_size
from facelab.datasets import IdentityLeak
from facelab.embed import Embeddings, similarity
from facelab.metrics import fpir, rank1, tpir
from facelab.strangers import *


def crowd(people=20, photos=4): return pd.DataFrame([(f'{p}/{i}', f'p{p:02}') for p in range(people) for i in range(photos)], columns=['path', 'person'])


def random_visits(seed, digits=1, probes=50, strangers=40):
    rng = np.random.default_rng(seed)
    found = np.where(rng.random(probes) < .2, -np.inf, rng.normal(1, 1, probes).round(digits))
    return found, rng.normal(0, 1, strangers).round(digits)


# ---- groups

@pytest.mark.parametrize('seed', range(5))
@pytest.mark.parametrize('references', [1, 3])
def test_groups_share_nobody(seed, references):
    t = open_set_split(crowd(), 8, 5, 7, references, seed)
    who = {r: set(g.person) for r, g in t.groupby('role')}
    assert who['reference'] == who['probe'] and len(who['reference']) == 8 and len(who['calibrating']) == 5 and len(who['judging']) == 7
    assert not who['probe'] & who['calibrating'] and not who['probe'] & who['judging'] and not who['calibrating'] & who['judging']
    assert (t[t.role == 'reference'].groupby('person').size() == references).all() and len(t) == 80
    assert (crowd().loc[t.index, 'path'] == t.path).all()
    check_roles(t)
    pd.testing.assert_frame_equal(t, open_set_split(crowd(), 8, 5, 7, references, seed))


def test_other_seed_other_people():
    assert set(open_set_split(crowd(), 8, 5, 7, seed=1).query('role == "judging"').person) != set(open_set_split(crowd(), 8, 5, 7, seed=2).query('role == "judging"').person)


def test_groups_by_name():
    t = open_set_split(crowd(), ['p01', 'p02'], 3, ['p05'])
    assert set(t.query('role == "judging"').person) == {'p05'} and set(t.query('role == "probe"').person) == {'p01', 'p02'}
    assert not {'p01', 'p02', 'p05'} & set(t.query('role == "calibrating"').person)
    with pytest.raises(IdentityLeak, match='p05'): open_set_split(crowd(), ['p01', 'p05'], 3, ['p05'])
    with pytest.raises(ValueError, match='nobody'): open_set_split(crowd(), ['nobody'], 3, 3)


@pytest.mark.parametrize('args', [(0, 1, 1), (21, 1, 1), (10, 8, 3), (8, 5, 7, 4), (-1, 1, 1)])
def test_too_few_people(args):
    with pytest.raises(ValueError, match='are wanted'): open_set_split(crowd(), *args)


def test_leaks_are_found():
    t = open_set_split(crowd(), 8, 5, 7)
    for a, b in (('judging', 'probe'), ('calibrating', 'reference'), ('judging', 'calibrating')):
        bad = t.copy(); thief = bad[bad.role == b].person.iloc[0]
        bad.loc[bad.index[bad.role == a][0], 'person'] = thief
        with pytest.raises(IdentityLeak) as e: check_roles(bad)
        assert e.value.people == [thief]
    with pytest.raises(ValueError, match='twice'): check_roles(pd.concat([t, t[:1]]))
    with pytest.raises(ValueError, match='unknown: guest'): check_roles(pd.concat([t, t[:1].assign(role='guest')]))
    with pytest.raises(ValueError, match='without a reference'): check_roles(t[~((t.role == 'reference') & (t.person == t[t.role == 'probe'].person.iloc[0]))])


# ---- rates

@pytest.mark.parametrize('seed', range(8))
def test_curve_is_the_loop(seed):
    found, best = random_visits(seed, seed % 3)
    c = open_set_curve(found, best)
    assert np.isinf(c.threshold[0]) and (c.threshold.diff().dropna() < 0).all()
    assert set(c.threshold[1:]) == set(found[np.isfinite(found)]) | set(best)
    for r in c.itertuples():
        assert r.named == sum(x >= r.threshold for x in best) and r.missed == sum(x < r.threshold for x in found)
        assert (r.fpir, r.fnir) == (r.named/len(best), r.missed/len(found))
    assert c.fpir.iloc[-1] == 1 and c.fnir.iloc[-1] == np.isneginf(found).mean() and c.fpir[0] == 0 and c.fnir[0] == 1


@pytest.mark.parametrize('seed', range(6))
def test_metrics_agree(seed):
    "The rates of this room are those of facelab.metrics, ties included, several references a person"
    rng = np.random.default_rng(seed)
    gallery, probe = np.repeat(list('abcde'), 2), rng.choice(list('abcde'), 60)
    s = (rng.normal(size=(60, 10)) + 1.5*(probe[:, None] == gallery)).round(1)
    strangers = rng.normal(size=(40, 10)).round(1)
    found = found_scores(s, probe, gallery)
    c = open_set_curve(found, strangers.max(1))
    assert c.fnir.iloc[-1] == pytest.approx(1 - rank1(s, probe, gallery))
    for r in c.iloc[1::7].itertuples():
        assert r.fpir == fpir(strangers, r.threshold) and 1 - r.fnir == pytest.approx(tpir(s, probe, gallery, r.threshold))
        p = open_set_point(found, strangers.max(1), r.threshold)
        assert p.errors.tolist() == [r.named, r.missed] and (p.lo <= p.rate).all() and (p.rate <= p.hi).all()


def test_who_is_never_found():
    assert found_scores(np.ones((3, 3)), list('abc'), list('abc')).tolist() == [-np.inf]*3
    assert open_set_point([-np.inf]*5, [.5]*5, -np.inf).rate.tolist() == [1, 1]


@pytest.mark.parametrize('found,best', [([], [.1]), ([.1], []), ([np.nan], [.1]), ([.1], [np.nan]), ([np.inf], [.1]), ([.1], [np.inf]), ([.1], [-np.inf]), ([[.1]], [.1]), ([.1], [[.1]])])
def test_bad_scores(found, best):
    with pytest.raises(ValueError): open_set_curve(found, best)
    with pytest.raises(ValueError): open_set_point(found, best, .5)


# ---- threshold

@pytest.mark.parametrize('dtype', [np.float32, np.float64])
@pytest.mark.parametrize('seed', range(6))
def test_threshold_is_the_lowest(seed, dtype):
    best = random_visits(seed, 1)[1].astype(dtype)
    for share in (1/40, .05, .1, 1/3, .5, .9, 1):
        t = threshold_at_fpir(best, share)
        assert (best >= t).mean() <= share + 1e-9
        assert all((best >= u).mean() > share + 1e-9 for u in set(best.tolist()) if u < t)


def test_threshold_refuses():
    best = np.linspace(0, 1, 50)
    with pytest.raises(ValueError, match='50 strangers cannot show an FPIR of 0.01.*bring 100 strangers'): threshold_at_fpir(best, .01)
    with pytest.raises(ValueError, match='10 strangers cannot show'): threshold_at_fpir(best, .05, np.repeat(np.arange(10), 5))
    assert threshold_at_fpir(best, .1, np.repeat(np.arange(10), 5)) == best[45]
    for share in (0, -1, 1.1, np.nan):
        with pytest.raises(ValueError): threshold_at_fpir(best, share)
    with pytest.raises(ValueError, match='names'): threshold_at_fpir(best, .1, ['x'])
    for n in range(1, 200): assert threshold_at_fpir(np.arange(n), 1/n) == n - 1


# ---- intervals

def test_bootstrap():
    found, best = random_visits(0, 3, 200, 100)
    probe, stranger = np.repeat(np.arange(50), 4), np.arange(100)
    stat = lambda f, b: misses_at_fpir(f, b, [.1, 1])
    lo, hi = open_set_bootstrap(found, best, probe, stranger, stat, 200)
    assert lo.shape == (2,) and (lo <= stat(found, best)).all() and (stat(found, best) <= hi).all()
    assert np.array_equal(open_set_bootstrap(found, best, probe, stranger, stat, 20), open_set_bootstrap(found, best, probe, stranger, stat, 20))
    wide = open_set_bootstrap(np.sort(found), best, np.repeat(np.arange(5), 40), stranger, stat, 200)
    assert ((wide[1] - wide[0]) > (hi - lo)).all()
    for who in (probe[:-1], np.zeros(200)):
        with pytest.raises(ValueError): open_set_bootstrap(found, best, who, stranger, stat, 2)


def test_bootstrap_and_formula_agree():
    rng = np.random.default_rng(5)
    person = np.repeat(np.arange(60), 5)
    found = np.where(rng.random(300) < rng.beta(1, 4, 60)[person], -np.inf, 1.)
    p = open_set_point(found, np.zeros(60), -np.inf, person).loc['fnir']
    lo, hi = open_set_bootstrap(found, np.zeros(60), person, np.arange(60), lambda f, b: misses_at_fpir(f, b, 1), 1000)
    assert (p.lo, p.hi) == pytest.approx((lo, hi), abs=.015)


@pytest.mark.parametrize('seed', range(4))
def test_misses_at_fpir(seed):
    found, best = random_visits(seed, seed % 2)
    for share in (0, .025, .2, .5, 1):
        cuts = [t for t in [np.inf, *best, *found[np.isfinite(found)]] if (best >= t).mean() <= share + 1e-9]
        assert misses_at_fpir(found, best, share) == (found < min(cuts)).mean()


# ---- several photos, growing galleries

def test_fuse():
    rng = np.random.default_rng(0)
    s, who = rng.normal(size=(7, 6)), np.array(list('bacacc'))
    for how in ('max', 'mean'):
        f, people = fuse(s, who, how)
        assert list(people) == list('abc') and all(f[i, j] == pytest.approx(getattr(s[i, who == p], how)()) for i in range(7) for j, p in enumerate(people))
    assert found_scores(fuse(s, who)[0], who[:1].repeat(7), people) == pytest.approx(found_scores(s, who[:1].repeat(7), who))
    for bad in ((s[0], who), (s, who[:3]), (s, who, 'sum')):
        with pytest.raises(ValueError): fuse(*bad)


@pytest.mark.parametrize('metric', ['cosine', 'euclidean'])
def test_one_photo_each_is_its_own_mean(metric):
    v = np.random.default_rng(0).normal(size=(4, 8)).astype('float32')
    if metric == 'cosine': v /= np.linalg.norm(v, axis=1, keepdims=True)
    m = mean_references(Embeddings(v, list('abcd'), dict(metric=metric)))
    assert m.names == list('abcd') and np.allclose(similarity(m.vectors, v, metric).diagonal(), 1, atol=1e-3)


def test_sizes_by_drawing_galleries():
    rng = np.random.default_rng(7)
    people, probe = np.array([f'p{i}' for i in range(12)]), np.repeat([f'p{i}' for i in range(12)], 3)
    s, strangers = rng.normal(size=(36, 12)) + 2*(probe[:, None] == people), rng.normal(size=(50, 12)) + rng.normal(size=(50, 1))
    t = threshold_by_size(strangers, .1, [1, 5, 12])
    assert t.threshold.is_monotonic_increasing and t.threshold[2] == threshold_at_fpir(strangers.max(1), .1)
    exact = [fpir_by_size(strangers, r.threshold, [r.n]).fpir[0] for r in t.itertuples()]
    below = [fpir_by_size(strangers, np.nextafter(np.max(strangers[strangers < r.threshold]), -np.inf), [r.n]).fpir[0] for r in t.itertuples() if r.n < 12]
    assert max(exact) <= .1 + 1e-9 and min(below) > .1
    out = fnir_by_size(s, probe, people, t)
    found = found_scores(s, probe, people)
    assert out.fnir[2] == pytest.approx((found < t.threshold[2]).mean()) and out.rank1[2] == pytest.approx(rank1(s, probe, people)) and out.rank1[0] == 1
    drawn = []
    for _ in range(400):
        for i in rng.permutation(36)[:6]:
            own = np.flatnonzero(people == probe[i])[0]
            g = np.append(rng.permutation(np.delete(np.arange(12), own))[:4], own)
            drawn.append(not (s[i, own] >= t.threshold[1] and (s[i, g] >= s[i, own]).sum() == 1))
    assert out.fnir[1] == pytest.approx(np.mean(drawn), abs=.04)


def test_sizes_with_ties():
    s = np.full((10, 4), .5)
    t = threshold_by_size(s, .1, [1, 4])
    assert (t.threshold > .5).all() and (threshold_by_size(s, 1, [1, 4]).threshold == .5).all()
    with pytest.raises(ValueError): threshold_by_size(s, .05, [1])
    with pytest.raises(ValueError): threshold_by_size(s, .1, [5])


def test_picture():
    found, best = random_visits(0)
    ax = plot_open_set(open_set_curve(found, best), 'x')
    assert ax.get_xscale() == ax.get_yscale() == 'log' and ax.lines[0].get_xdata().min() >= 1/len(best)
    plot_open_set(open_set_curve([1.]*5, [0.]*5), ax=ax); plt.close('all')
