"facelab.metrics against a double loop, scikit-learn and SciPy, with ties, bad input, and intervals that are put to the test"
import numpy as np, pandas as pd, pytest
from scipy.optimize import brentq
from scipy.stats import binom, norm
from sklearn import metrics as skm
from facelab.metrics import *


def random_scores(seed, digits=1):
    "Between 4 and 200 pairs; the fewer digits, the more ties"
    rng = np.random.default_rng(seed)
    n = int(rng.integers(4, 200))
    mated = rng.permutation(np.r_[True, False, rng.random(n - 2) < rng.uniform(.1, .9)])
    return (rng.normal(size=n) + mated*rng.uniform(0, 2)).round(digits), mated


def slow_rates(scores, mated, t):
    "FMR and FNMR at threshold t, counted pair by pair"
    false = missed = yes = no = 0
    for s, m in zip(scores, mated):
        if m: yes += 1; missed += s < t
        else: no += 1; false += s >= t
    return false/no, missed/yes


@pytest.mark.parametrize('seed', range(12))
def test_curve_is_the_double_loop(seed):
    s, m = random_scores(seed, digits=seed % 3)
    r = roc(s, m)
    assert np.isinf(r.threshold[0]) and r.threshold[1:].tolist() == sorted(set(s), reverse=True)
    for row in r.itertuples():
        assert (row.fmr, row.fnmr) == pytest.approx(slow_rates(s, m, row.threshold), abs=1e-12)
        assert (row.fmr, row.fnmr) == pytest.approx((fmr(s, m, row.threshold), fnmr(s, m, row.threshold)), abs=1e-12)


@pytest.mark.filterwarnings('ignore:AUC')
@pytest.mark.parametrize('seed', range(12))
def test_scikit_learn_agrees(seed):
    s, m = random_scores(seed, digits=seed % 3)
    r, (f, t, thr) = roc(s, m), skm.roc_curve(m, s, drop_intermediate=False)
    for ours, theirs in (r.fmr, f), (r.tmr, t), (r.threshold, thr): np.testing.assert_array_equal(ours, theirs)
    assert auc(s, m) == pytest.approx(skm.roc_auc_score(m, s))
    assert eer(s, m) == pytest.approx(brentq(lambda x: 1 - x - np.interp(x, *_simple(f, t)), 0, 1), abs=1e-6)
    precision, recall, thr = skm.precision_recall_curve(m, s)
    c = pr_curve(s, m).iloc[::-1]
    np.testing.assert_allclose(c[['threshold', 'precision', 'recall']], np.c_[thr, precision[:-1], recall[:-1]])
    at = c.iloc[len(c)//2]
    assert at.f1 == pytest.approx(skm.f1_score(m, s >= at.threshold))


def _simple(f, t):
    "np.interp needs rising x: nudge vertical steps apart"
    return f + 1e-9*np.arange(len(f)), t


@pytest.mark.filterwarnings('ignore:AUC')
@pytest.mark.parametrize('seed', range(5))
def test_order_scale_and_type_change_nothing(seed):
    s, m = random_scores(seed)
    p = np.random.default_rng(seed).permutation(len(s))
    base = eer(s, m), auc(s, m)
    assert (eer(s[p], m[p]), auc(s[p], m[p])) == base
    assert (eer(3*s - 7, m), auc(3*s - 7, m)) == pytest.approx(base)
    assert (eer(s.tolist(), m.astype(int).tolist()), auc(pd.Series(s), pd.Series(m, dtype='boolean'))) == base
    assert (eer(-s, ~m), auc(-s, ~m)) == pytest.approx(base)


@pytest.mark.parametrize('mated, nonmated, rate', [([.9, .8], [.2, .1], 0), ([.5, .5], [.5, .5], .5), ([.9, .8, .3], [.7, .2, .1], 1/3), ([.9, .5], [.5, .1], .25), ([.9, .4], [.6, .1, 0], 1/3)])
def test_eer_by_hand(mated, nonmated, rate):
    assert eer(mated + nonmated, [1]*len(mated) + [0]*len(nonmated)) == pytest.approx(rate)


def test_distances_are_noticed():
    for f in auc, eer:
        with pytest.warns(UserWarning, match='-distance'): f([.1, .2, .8, .9], [1, 1, 0, 0])


@pytest.mark.parametrize('scores, mated, words', [
    ([.1, .2, .3], [1, 0], '3 scores but 2 labels'), ([np.nan, .2], [1, 0], '1 of 2 scores are NaN or infinite'), ([np.inf, .2], [1, 0], 'infinite'),
    ([None, .2], [1, 0], 'NaN'), ([[.1], [.2]], [1, 0], 'one flat list'), ([.1, .2], [1, 1], 'no non-mated'), ([.1, .2], [0, 0], 'no mated'), ([], [], 'no mated'),
    ([.1, .2], [1, 2], 'True/False'), ([.1, .2], [1, -1], 'True/False'), ([.1, .2], [True, None], 'True/False'), ([.1, .2], ['same', 'different'], 'True/False')])
@pytest.mark.parametrize('f', [roc, auc, eer, det_curve, pr_curve, lambda s, m: threshold_at_fmr(s, m, .5), lambda s, m: operating_point(s, m, .5)])
def test_nonsense_is_refused(f, scores, mated, words):
    with pytest.raises(ValueError, match=words): f(scores, mated)


def test_one_kind_is_enough_where_one_kind_is_asked_for():
    assert fmr([.9, .1], [0, 0], .5) == fnmr([.9, .1], [1, 1], .5) == .5
    for f in fmr, fnmr:
        with pytest.raises(ValueError): f([], [], .5)
        with pytest.raises(ValueError, match='threshold is NaN'): f([.1, .2], [0, 1], np.nan)


@pytest.mark.parametrize('dtype', [np.float32, np.float64])
@pytest.mark.parametrize('seed', range(8))
def test_threshold_keeps_its_promise_and_is_the_lowest(seed, dtype):
    s, m = random_scores(seed, digits=seed % 3)
    s = s.astype(dtype)
    for target in (1/(~m).sum(), .1, .3, 1):
        if target < 1/(~m).sum(): continue
        t = threshold_at_fmr(s, m, target)
        assert fmr(s, m, t) <= target and (s[~m] >= t).mean() <= target, 'also when float32 scores meet a python float'
        assert all(fmr(s, m, u) > target for u in np.unique(s) if u < t)
        assert fnmr_at_fmr(s, m, target) == fnmr(s, m, t)


def test_threshold_refuses_what_the_pairs_cannot_show():
    s, m = np.r_[np.linspace(0, .6, 3000), .9], np.r_[np.zeros(3000), 1]
    with pytest.raises(ValueError, match=r'0 in 3000 only bounds FMR below 0\.0013 .*rule of three 0\.001.* 1/3000 or more, or bring 10000 '): threshold_at_fmr(s, m, 1e-4)
    assert threshold_at_fmr(s, m, 1/3000) == .6
    for bad in (0, -.1, 1.1, np.nan):
        with pytest.raises(ValueError, match='a share above 0'): threshold_at_fmr(s, m, bad)


def test_ties_at_the_top_push_the_threshold_above_every_score():
    t = threshold_at_fmr([.9, .9, .1, .2], [0, 0, 0, 1], 1/3)
    assert .9 < t < .900001 and np.float32(t) == t


def test_wilson_covers():
    "Exact coverage over all outcomes, averaged over rates: Wilson's is close to what it says, the schoolbook interval's is not"
    n, rates = 50, np.linspace(.005, .5, 100)
    lo, hi = np.array([wilson_ci(k, n) for k in range(n + 1)]).T
    cover = [binom.pmf(np.flatnonzero((lo <= p) & (p <= hi)), n, p).sum() for p in rates]
    assert .94 < np.mean(cover) < .97 and min(cover) > .83
    assert wilson_ci(0, 50)[0] == 0 and wilson_ci(50, 50)[1] == 1
    assert wilson_ci(0, 3000)[1] == pytest.approx(.00128, abs=1e-5)
    for k, n in ((4, 3), (-1, 3), (0, 0)):
        with pytest.raises(ValueError): wilson_ci(k, n)


def fresh_people(seed, n=15, k=4):
    "Scores of n new people with k photos: everybody has a level of their own, for mated and for non-mated pairs"
    rng = np.random.default_rng(seed)
    who = np.repeat(np.arange(n), k); i, j = np.triu_indices(n*k, 1); left, right = who[i], who[j]
    sheep, wolf = rng.normal(0, 1, n), rng.normal(0, .5, n)
    level = np.where(left == right, 2 + sheep[left], wolf[left] + wolf[right])
    return level + rng.normal(size=len(i)), left == right, left, right


def test_bootstrap_over_people_covers_where_wilson_does_not():
    truth = dict(fnmr=norm.cdf(-1/2**.5), fmr=norm.sf(1/1.5**.5))
    rates, hit, trials = lambda s, m: (fnmr(s, m, 1), fmr(s, m, 1)), np.zeros((2, 2)), 120
    for seed in range(trials):
        s, m, left, right = fresh_people(seed)
        lo, hi = subject_bootstrap(s, m, left, right, rates, n_boot=100)
        wilson = operating_point(s, m, 1)
        for i, (k, p) in enumerate(truth.items()):
            hit[i] += lo[i] <= p <= hi[i], wilson.lo[k] <= p <= wilson.hi[k]
    people, pairs = (hit/trials).T
    assert (people > .85).all() and pairs[0] < .87 and pairs[1] < .4, (people, pairs)


def test_bootstrap_contract():
    s, m, left, right = fresh_people(0)
    a = subject_bootstrap(s, m, left, right, eer, n_boot=50)
    assert a == subject_bootstrap(s, m, left, right, eer, n_boot=50) != subject_bootstrap(s, m, left, right, eer, n_boot=50, seed=1)
    assert a[0] < eer(s, m) < a[1] and all(type(x) is float for x in a)
    narrow = subject_bootstrap(s, m, left, right, eer, n_boot=50, level=.5)
    assert a[0] < narrow[0] < narrow[1] < a[1]
    with pytest.raises(ValueError, match='disagree'): subject_bootstrap(s, ~m, left, right, eer)
    with pytest.raises(ValueError, match='five of them'): subject_bootstrap(*fresh_people(0, n=4), eer)
    with pytest.raises(ValueError, match='left and'): subject_bootstrap(s, m, left[:-1], right, eer)


def test_det_axes_are_finite_and_keep_the_rates():
    s, m = random_scores(3)
    d = det_curve(s, m)
    assert np.isfinite(d[['fmr_dev', 'fnmr_dev']]).all(None) and d.fmr.min() == 0 and d.fmr.max() == 1
    inner = d[(d.fmr > 0) & (d.fmr < 1)]
    np.testing.assert_allclose(norm.cdf(inner.fmr_dev), inner.fmr)


def test_ranks_against_a_loop():
    rng = np.random.default_rng(0)
    gallery, probes = rng.permutation(list('aabbbcdde')), rng.choice(list('abcde'), 40)
    S = rng.normal(size=(40, 9)).round(1)
    best = lambda row, p: max(x for x, g in zip(row, gallery) if g == p)
    slow = [1 + sum(best(row, o) >= best(row, p) for o in 'abcde' if o != p) for row, p in zip(S, probes)]
    assert match_ranks(S, probes, gallery).tolist() == slow
    assert rank1(S, probes, gallery) == cmc(S, probes, gallery)[1] == np.mean(np.array(slow) == 1)
    c = cmc(S, probes, gallery)
    assert len(c) == 5 and c.is_monotonic_increasing and c[5] == 1
    assert tpir(S, probes, gallery, -9) == rank1(S, probes, gallery) and tpir(S, probes, gallery, 9) == 0
    assert fpir(S, .5) == fpir(S.max(1), .5) == np.mean([max(r) >= .5 for r in S])


def test_identification_refuses_nonsense():
    for names, words in ((list('ax'), 'not enrolled: x'), (['a'], r'shape \(2, 2\)')):
        with pytest.raises(ValueError, match=words): match_ranks(np.eye(2), names, list('ab'))
    with pytest.raises(ValueError, match='NaN'): match_ranks([[np.nan, 1]], ['a'], list('ab'))
    with pytest.raises(ValueError, match='NaN'): fpir([np.nan], .5)
    with pytest.raises(ValueError, match='no strangers'): fpir(np.ones((0, 3)), .5)
    with pytest.raises(ValueError, match='threshold is NaN'): fpir([.5], np.nan)
    assert rank1(np.ones((4, 4)), list('abcd'), list('abcd')) == 0, 'one vector for everybody recognises nobody'


def test_plots_draw_where_they_are_told():
    import matplotlib; matplotlib.use('Agg')
    import matplotlib.pyplot as plt
    s, m = random_scores(1)
    for f, x in (plot_roc, roc(s, m)), (plot_det, det_curve(s, m)), (plot_thresholds, pr_curve(s, m)), (plot_cmc, cmc(np.eye(3), list('abc'), list('abc'))):
        ax = plt.figure().add_subplot()
        assert f(x, ax=ax) is ax and ax.lines and ax.get_xlabel() and f(x) is not ax
        ax.figure.canvas.draw()
    assert plot_scores(s, m, .5, ax=ax) is ax
    plt.close('all')


def wide_scores(seed, kind):
    "Scores that are hard to sort as whole numbers: signs, zeros of both signs, ties, huge and tiny ones"
    rng = np.random.default_rng(seed)
    s = dict(ties=lambda: rng.normal(size=50_000).round(3), huge=lambda: rng.normal(size=3000)*10.**rng.integers(-300, 300, 3000), zeros=lambda: rng.choice([0., -0., 1e-320, -1e-320, 5e-324, 1e300], 3000),
             negative=lambda: -rng.exponential(size=20_000).round(4), beside=lambda: np.nextafter(rng.integers(1, 50, 3000)/7, rng.choice([-9., 9.], 3000)), integers=lambda: rng.integers(-5, 5, 3000).astype(float),
             limits=lambda: rng.choice([np.finfo(float).max, np.finfo(float).min, 2., 1.9999999999999998, -2.], 3000))[kind]()
    return s, rng.random(len(s)) < .3


@pytest.mark.filterwarnings('ignore:AUC')
@pytest.mark.filterwarnings('ignore::RuntimeWarning:numpy', 'ignore:overflow')
@pytest.mark.parametrize('dtype', [np.float32, np.float64])
@pytest.mark.parametrize('kind', ['ties', 'huge', 'zeros', 'negative', 'beside', 'integers', 'limits'])
def test_fast_curve_equals_scikit_learn_to_the_last_bit(kind, dtype):
    s, m = wide_scores(0, kind)
    s = s.astype(dtype); keep = np.isfinite(s); s, m = s[keep], m[keep]
    before = s.copy()
    r, (f, t, thr) = roc(s, m), skm.roc_curve(m, s, drop_intermediate=False)
    for ours, theirs in (r.fmr, f), (r.tmr, t), (r.threshold, thr.astype(float)): np.testing.assert_array_equal(ours, theirs)
    np.testing.assert_array_equal(r.fnmr, 1 - r.tmr)
    assert (s == before).all() and auc(s, m) == pytest.approx(skm.roc_auc_score(m, s), abs=1e-12)
    for target in (.001, .1, .5, .999): assert threshold_at_fmr(s, m, target) == slow_threshold(r, target)


def slow_threshold(r, target):
    "The last row of the curve that keeps the promise"
    t = r.threshold[np.searchsorted(r.fmr, target, side='right') - 1]
    return t if np.isfinite(t) else float(np.nextafter(np.float32(r.threshold[1]), np.float32(np.inf)))


def test_pieces_of_the_curve_join():
    "Runs of equal scores that end at, before and after the end of a piece of 16,384"
    for n in (16_383, 16_384, 16_385, 32_768, 40_000):
        for run in (1, 2, 3, 16_384, n):
            s = (np.arange(n)//run).astype(float); m = np.arange(n) % 3 == 0
            t, f, h = map(np.concatenate, zip(*curve_steps(s, m)))
            want = np.unique(s)[::-1]
            assert t.tolist() == want.tolist() and f[-1] + h[-1] == n and h[-1] == m.sum()
            assert (f + h).tolist() == [(s >= x).sum() for x in want] if run > 100 else (f + h == np.minimum(n, n - want*run)).all()


def test_memory_and_arrays_are_left_alone():
    s, m = random_scores(5); frozen = s.astype(np.float32); frozen.flags.writeable = m.flags.writeable = False
    for f in roc, auc, eer, det_curve, pr_curve: f(frozen, m)
    half = roc(s.astype(np.float16), m)
    np.testing.assert_array_equal(half.fmr, roc(s.astype(np.float16).astype(float), m).fmr)


def test_true_match_rate_at_false_match_rate():
    s, m = random_scores(7, 3)
    for target in (.05, .3): assert tmr_at_fmr(s, m, target) == 1 - fnmr_at_fmr(s, m, target) == pytest.approx((s[m] >= threshold_at_fmr(s, m, target)).mean())
    with pytest.raises(ValueError, match='cannot show a false match rate'): tmr_at_fmr(s, m, 1e-6)


def test_failures_to_acquire_count_as_rejections():
    "Against a count of people: some without a reference, some attempts without a face, the rest compared"
    rng = np.random.default_rng(0)
    for _ in range(20):
        enrolled, face, score = rng.random(500) < .9, rng.random(500) < .8, rng.random(500)
        done = enrolled & face
        fta, fte = 1 - done.sum()/enrolled.sum(), 1 - enrolled.mean()
        got = with_failures((score[done] >= .6).mean(), (score[done] < .6).mean(), fta, fte)
        assert got == pytest.approx(((done & (score >= .6)).mean(), 1 - (done & (score >= .6)).mean()))
    for bad in (-.1, 1.1, np.nan, np.inf):
        for i in range(4):
            with pytest.raises(ValueError, match=['fmr', 'fnmr', 'fta', 'fte'][i]): with_failures(*[bad if i == j else .1 for j in range(4)])


def test_repeated_pairs():
    left, right = ['a', 'b', 'a', 'c', 'c', 'a'], ['b', 'a', 'c', 'a', 'c', 'd']
    with pytest.warns(UserWarning, match=r'3 of 6 pairs .* 2 repeated .* 1 of a photo with itself'): assert repeated_pairs(left, right).tolist() == [False, True, False, True, True, False]
    rng = np.random.default_rng(0)
    l, r = rng.integers(0, 30, (2, 300))
    seen, slow = set(), []
    for a, b in zip(l, r): slow.append(a == b or frozenset((a, b)) in seen); seen.add(frozenset((a, b)))
    with pytest.warns(UserWarning): assert repeated_pairs(l, r).tolist() == slow
    assert not repeated_pairs(['a', 'a'], ['b', 'c']).any() and len(repeated_pairs([], [])) == 0
    with pytest.raises(ValueError, match='1 photos on the left but 2'): repeated_pairs(['a'], ['b', 'c'])


def test_identification_at_a_promise_about_strangers():
    rng = np.random.default_rng(1)
    for seed in range(10):
        S, strangers = rng.normal(size=(50, 8)).round(1), rng.normal(size=(30, 8)).round(1)
        gallery = rng.permutation(list('aabbccdd')); probes = rng.choice(list('abcd'), 50)
        best = strangers.max(1)
        for f in (1/30, .1, .5, 1):
            allowed = [t for t in np.unique(np.r_[S.max(1), best, 99]) if (best >= t).mean() <= f]
            want = max(tpir(S, probes, gallery, t) for t in allowed)
            assert tpir_at_fpir(S, probes, gallery, strangers, f) == tpir_at_fpir(S, probes, gallery, best, f) == want
        assert fnir(S, probes, gallery, .5) == pytest.approx(1 - tpir(S, probes, gallery, .5))
        with pytest.raises(ValueError, match='30 visits of strangers cannot show a false positive identification rate of 0.01: 0 in 30 only bounds FPIR below 0.11'): tpir_at_fpir(S, probes, gallery, strangers, .01)
        for bad, words in (([], 'no strangers'), (np.ones((0, 8)), 'no strangers'), ([np.nan], 'NaN')):
            with pytest.raises(ValueError, match=words): tpir_at_fpir(S, probes, gallery, bad, .5)
        with pytest.raises(ValueError, match='fpir is a share above 0'): tpir_at_fpir(S, probes, gallery, strangers, 0)
