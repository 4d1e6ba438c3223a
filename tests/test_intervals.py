"facelab.intervals against a loop over pairs of pairs, the paper's own program, the slow bootstrap, exhaustive enumeration and simulation"
from itertools import product
import numpy as np, pandas as pd, pytest
from scipy.stats import norm
from facelab.intervals import *
from facelab.metrics import fmr, fnmr, operating_point, score_pairs, subject_bootstrap, wilson_ci


def random_pairs(seed, people=7, n=60):
    "Pairs of few people in no order, a third of them wrong, some twice"
    rng = np.random.default_rng(seed)
    left, right = rng.choice([f'p{i}' for i in range(people)], (2, n))
    return rng.random(n) < .3, left, right


def slow_sum(x, left, right):
    "The products of x over all couples of pairs that share a person"
    return sum(x[p]*x[q] for p in range(len(x)) for q in range(len(x)) if {left[p], right[p]} & {left[q], right[q]})


@pytest.mark.parametrize('seed', range(10))
@pytest.mark.parametrize('people', [3, 7, 40])
def test_sum_over_pairs_of_pairs_is_the_double_loop(seed, people):
    w, left, right = random_pairs(seed, people)
    g = group_pairs(w, left, right)
    assert (g.n, g.errors.sum()) == (60, w.sum()) and (g.a <= g.b).all() and len(set(zip(g.a, g.b))) == len(g.a)
    assert shared_sum(g, g.errors) == slow_sum(w.astype(int), left, right)
    assert shared_share(g) == pytest.approx(slow_sum(np.ones(60), left, right)/3600, abs=1e-12)
    e = w - w.mean()
    loop, rows = slow_sum(e, left, right), ((g.errors - g.pairs*g.rate)**2).sum()
    assert rate_variance(g, unbiased=False) == pytest.approx(max(loop, rows)/3600, abs=1e-12)


@pytest.mark.parametrize('people,mated', [(3, True), (5, True), (4, False), (5, False)])
def test_variance_is_right_on_average_over_all_tests(people, mated):
    "Every outcome of coins per person (mated) or per two people (non-mated): the mean of the estimates is the variance of the rate"
    a, b = (np.arange(people),)*2 if mated else np.triu_indices(people, 1)
    tests = [group_pairs(np.repeat(c, 2), np.repeat(a, 2), np.repeat(b, 2)) for c in product([0, 1], repeat=len(a))]
    raw = [shared_sum(g, g.errors - g.pairs*g.rate)/g.n**2/(1 - shared_share(g)) for g in tests]
    assert np.mean(raw) == pytest.approx(np.var([g.rate for g in tests]), abs=1e-12)
    if mated: assert [rate_variance(g) for g in tests] == pytest.approx(raw)


def test_variance_is_right_on_average_when_people_cause_the_errors():
    "A pair of strangers fails when one of its two people is difficult: covariance through people, not pairs"
    a, b = np.triu_indices(6, 1)
    tests = [group_pairs(np.maximum(np.array(c)[a], np.array(c)[b]), a, b) for c in product([0, 1], repeat=6)]
    raw = [shared_sum(g, g.errors - g.pairs*g.rate)/g.n**2/(1 - shared_share(g)) for g in tests]
    assert np.mean(raw) == pytest.approx(np.var([g.rate for g in tests]), abs=1e-12)
    assert shared_share(tests[0]) == pytest.approx(1 - (6 - 2)*(6 - 3)/(6*5))


def cimat_scores(s, left, right):
    "Nested dictionaries, as `cimat` wants them: both orders, mated pairs once"
    people = sorted(set(left) | set(right))
    d = {p: {} for p in people}
    for x, l, r in zip(s, left, right):
        d[l].setdefault(r, []).append(x)
        if l != r: d[r].setdefault(l, []).append(x)
    return d


def compare_with_cimat(s, mated, left, right, threshold):
    uq = pytest.importorskip('cimat').UncertaintyEstimator(scores=cimat_scores(s, left, right))
    theirs = dict(zip(('fnmr', 'fmr'), uq.compute_variance(threshold)))
    bounds = dict(zip(('fnmr', 'fmr'), uq.get_binerror_ci(threshold)))
    for kind, m in ('fnmr', True), ('fmr', False):
        w = (s[mated == m] < threshold) == m
        g = group_pairs(w, left[mated == m], right[mated == m])
        v, p = rate_variance(g, unbiased=False), g.rate
        assert v == pytest.approx(theirs[kind], rel=1e-12, abs=1e-18)
        if 1 < w.sum() < len(w) - 1:
            assert wilson_bounds(p, p*(1 - p)/v, norm.ppf(.975)) == pytest.approx(bounds[kind], abs=1e-12)
            ours = rate_interval(w, left[mated == m], right[mated == m])
            assert ours.lo <= bounds[kind][0] + 1e-12 and ours.hi >= bounds[kind][1] - 1e-12
    return theirs


@pytest.mark.parametrize('seed', range(8))
def test_the_authors_program_agrees(seed):
    rng = np.random.default_rng(seed)
    names = np.repeat([f'p{i:02}' for i in range(12)], rng.integers(2, 5, 12))
    i, j = np.triu_indices(len(names), 1)
    keep = rng.random(len(i)) < .7
    left, right = names[i[keep]], names[j[keep]]
    mated = left == right
    wolf = dict(zip(np.unique(names), rng.normal(size=12)))
    s = rng.normal(size=len(left)) + 2*mated + np.array([wolf[l] + wolf[r] for l, r in zip(left, right)])
    compare_with_cimat(s, mated, left, right, 1.)


def test_the_authors_program_agrees_on_real_faces(att):
    from facelab.images import load_image
    x = np.stack([np.asarray(load_image(p).convert('L').resize((16, 16)), np.float32).ravel() for p in att.path[:150]])
    x -= x.mean(1, keepdims=True); x /= np.linalg.norm(x, axis=1, keepdims=True)
    t = score_pairs(x @ x.T, att.person[:150])
    compare_with_cimat(t.score.to_numpy(), t.mated.to_numpy(), t.left_person.to_numpy(str), t.right_person.to_numpy(str), .7)


@pytest.mark.parametrize('seed', range(5))
def test_copies_sides_order_and_names_do_not_matter(seed):
    w, left, right = random_pairs(seed, 20, 150)
    r = rate_interval(w, left, right)
    rng = np.random.default_rng(seed); order, side = rng.permutation(150), rng.random(150) < .5
    assert rate_interval(w[order], np.where(side, left, right)[order], np.where(side, right, left)[order])[2:6] == pytest.approx(r[2:6])
    number = {p: i for i, p in enumerate(np.unique([left, right]))}
    assert rate_interval(w, [number[p] for p in left], [number[p] for p in right]) == pytest.approx(r)
    g, double = group_pairs(w, left, right), group_pairs(*[np.tile(x, 3) for x in (w, left, right)])
    assert rate_variance(double) == pytest.approx(rate_variance(g)) and spread_df(double) == pytest.approx(spread_df(g))
    mirrored = rate_interval(~w, left, right)
    assert (1 - mirrored.hi, 1 - mirrored.lo, mirrored.effective_n) == pytest.approx((r.lo, r.hi, r.effective_n))


def test_independent_pairs_get_the_plain_interval():
    w = np.random.default_rng(0).random(3000) < .1
    r = rate_interval(w, np.arange(3000), np.arange(3000, 6000))
    assert (r.lo, r.hi) == pytest.approx(wilson_ci(w.sum(), 3000), abs=2e-4)
    assert 2990 < r.effective_n <= 3000 and r.people == 6000
    assert rate_interval(w*0, np.arange(3000)).hi == pytest.approx(wilson_ci(0, 3000)[1])


@pytest.mark.parametrize('level', [.5, .9, .95, .99])
def test_interval_holds_the_rate_and_grows_with_the_level(level):
    for seed in range(5):
        w, left, right = random_pairs(seed, 12, 90)
        r, wide = rate_interval(w, left, right, level), rate_interval(w, left, right, (1 + level)/2)
        assert 0 <= wide.lo <= r.lo <= r.rate <= r.hi <= wide.hi <= 1 and r.effective_n <= r.n and r.level == level


def test_no_error_and_nothing_but_errors():
    who = np.repeat([f'p{i}' for i in range(40)], 45)
    none, all_ = rate_interval(np.zeros(1800), who), rate_interval(np.ones(1800), who)
    assert (none.lo, none.hi) == pytest.approx(wilson_ci(0, 40)) and none.effective_n == 40
    assert (all_.lo, all_.hi) == pytest.approx(wilson_ci(40, 40))
    uneven = group_pairs(np.zeros(10), list('aaaaaaabcd'))
    assert effective_n(uneven) == pytest.approx(100/(49 + 3))
    one = np.zeros(1800); one[7] = 1
    assert 2 < spread_df(group_pairs(one, who)) < 2.2 and rate_interval(one, who).hi > wilson_ci(1, 1800)[1]


def test_the_fewest_people():
    for args in (([0, 1, 1], list('aaa')), ([0, 1, 0], list('aab'), list('bcc')), ([0, 1, 1], list('aaa'), list('bcd')), ([1], ['a'])):
        with pytest.raises(ValueError, match='in common with every other pair'): rate_interval(*args)
    r = rate_interval([0, 1, 0, 1, 1, 0], list('aaabbc'), list('bcdcdd'))
    assert 0 <= r.lo < r.hi <= 1 and r.people == 4
    with pytest.raises(ValueError, match='five of them'): people_bootstrap([0, 1, 0, 1], list('abcd'))


@pytest.mark.parametrize('wrong,left,right,words', [([0, .5], 'ab', 'ab', 'neither 0 nor 1'), ([0, np.nan], 'ab', 'ab', '1 of 2 entries'), ([0, 1, 1], 'ab', 'abc', '3 pairs but 2 left'),
    ([], '', '', 'shape'), ([[0, 1]], 'ab', 'ab', 'shape'), ([0, 1], ['a', None], ['a', 'b'], 'no name'), ([0, 1], [1., np.nan], [1., 2.], 'no name')])
def test_bad_input(wrong, left, right, words):
    with pytest.raises(ValueError, match=words.replace('(', r'\(')): rate_interval(wrong, list(left), list(right))


def test_bad_tables():
    s, m, left = np.array([.9, .1, .5, .3]), [1, 0, 1, 0], list('abba')
    right = list('aabb')
    for change, words in [(dict(scores=[.9, np.nan, .5, .3]), 'NaN'), (dict(left_person=list('abb')), '3 left'), (dict(threshold=np.nan), 'threshold is NaN'), (dict(right_person=list('bbbb')), 'disagree'), (dict(level=95), 'between 0 and 1')]:
        with pytest.raises(ValueError, match=words): intervals(**dict(scores=s, mated=m, left_person=left, right_person=right, threshold=.4) | change)


def fresh_scores(seed, people=15, photos=4):
    "Scores with a level for every person"
    rng = np.random.default_rng(seed)
    who = np.repeat([f'p{i:02}' for i in range(people)], photos); i, j = np.triu_indices(len(who), 1)
    f = np.repeat(rng.normal(size=people), photos)
    return f[i] + f[j] + rng.normal(size=len(i)) + 2*(who[i] == who[j]), who[i] == who[j], who[i], who[j]


def test_table_has_the_counts_of_operating_point():
    s, m, left, right = fresh_scores(0)
    t, plain = intervals(s, m, left, right, 1.), operating_point(s, m, 1.)
    assert t[['errors', 'pairs', 'rate']].equals(plain[['errors', 'pairs', 'rate']]) and (t.people == 15).all()
    assert (t.hi - t.lo > plain.hi - plain.lo).all()
    assert tuple(t.loc['fnmr', ['lo', 'hi']]) == rate_interval(s[m] < 1, left[m], right[m])[3:5]
    assert intervals(pd.Series(s), pd.Series(m), pd.Series(left), pd.Series(right), 1.).equals(t)
    assert 'worth' in str(rate_interval(s[m] < 1, left[m], right[m]))


@pytest.mark.parametrize('seed', range(3))
def test_fast_bootstrap_is_the_slow_one(seed):
    s, m, left, right = fresh_scores(seed)
    lo, hi = subject_bootstrap(s, m, left, right, lambda s, m: (fmr(s, m, 1), fnmr(s, m, 1)), n_boot=60, seed=seed)
    for i, mated in enumerate([False, True]):
        fast = people_bootstrap((s[m == mated] < 1) == mated, left[m == mated], right[m == mated], n_boot=60, seed=seed)
        assert fast == pytest.approx((lo[i], hi[i]), abs=1e-12)


def test_variance_of_the_tosses():
    "For mated pairs the plug-in variance; for non-mated ones that with the rows added instead of taken away"
    s, m, left, right = fresh_scores(1, 60, 4)
    g = group_pairs(s[m] < 1, left[m], right[m])
    assert toss_rates(g, 20_000).var() == pytest.approx(rate_variance(g, unbiased=False), rel=.06)
    g = group_pairs(s[~m] >= 1, left[~m], right[~m]); r = g.errors - g.pairs*g.rate
    assert toss_rates(g, 20_000).var() == pytest.approx((shared_sum(g, r) + 2*(r @ r))/g.n**2, rel=.12)


def test_difference_of_two_systems():
    w, left, right = random_pairs(3, 20, 200)
    v = w ^ (np.random.default_rng(0).random(200) < .1)
    d = difference_interval(w, v, left, right)
    assert d.difference == pytest.approx(w.mean() - v.mean()) and d.lo < d.difference < d.hi and (d.rate_a, d.rate_b) == (w.mean(), v.mean())
    assert difference_interval(v, w, left, right)[2:5] == pytest.approx((-d.difference, -d.hi, -d.lo))
    e = w.astype(int) - v - d.difference
    g = group_pairs(w, left, right); g = g._replace(errors=g.errors - group_pairs(v, left, right).errors)
    assert rate_variance(g, unbiased=False) == pytest.approx(max(slow_sum(e, left, right), ((g.errors - g.pairs*g.rate)**2).sum())/200**2)
    r = difference_interval(w, w, left, right)
    assert r.difference == 0 and r.lo == -r.hi < 0
    hard = np.repeat(np.random.default_rng(1).random(30) < .4, 10); who = np.repeat(np.arange(30), 10)
    a, b = hard.copy(), hard.copy(); b[::10] = ~b[::10]
    shared = difference_interval(a, b, who)
    assert shared.hi - shared.lo < rate_interval(a, who).hi - rate_interval(a, who).lo


def test_memory_is_in_proportion_to_the_pairs():
    "A million people, each met once or twice: no square of people anywhere"
    rng = np.random.default_rng(0)
    left, right = rng.integers(0, 1_000_000, (2, 300_000)); right += left == right
    w = rng.random(300_000) < .01
    r = rate_interval(w, left, right)
    assert (r.lo, r.hi) == pytest.approx(wilson_ci(w.sum(), 300_000), abs=1e-4) and r.effective_n > 280_000


@pytest.mark.parametrize('mated', [True, False])
def test_coverage_where_wilson_fails(mated):
    c = coverage(25, 5, .1, mated, reps=300, n_boot=100, seed=1).share
    assert c['independent'] < .85 and .9 < c['rate_interval'] < .985 and c['bootstrap, Wilson'] > .9 and c['rate_interval'] > c['plug-in'] - .005, c


@pytest.mark.parametrize('mated', [True, False])
def test_simulated_pairs_have_the_rate(mated):
    w = [simulate_pairs(np.random.default_rng(s), 200, 3, .05, mated, person=.2, photo=.2) for s in range(20)]
    assert np.mean([x[0].mean() for x in w]) == pytest.approx(.05, abs=.006)
    assert all(((left == right) == mated).all() for _, left, right in w)
