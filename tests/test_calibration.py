"facelab.calibration against plain loops, scikit-learn and hand values; bad input; an interval that is put to the test"
import json, warnings
import numpy as np, pandas as pd, pytest
from scipy.optimize import minimize_scalar
from sklearn.linear_model import LogisticRegression
from facelab.calibration import *
from facelab.datasets import IdentityLeak
from facelab.metrics import fmr, fnmr, score_pairs

RECIPE = dict(detector='hog', upsample=1, align='chip', size=150, encoder='dlib', metric='euclidean')


def random_pairs(seed, digits=1, n=80, gap=1.5):
    rng = np.random.default_rng(seed)
    mated = rng.permutation(np.r_[True, False, rng.random(n - 2) < .4])
    return (rng.normal(size=n) + mated*gap).round(digits), mated


def faces(n_people, n_photos, seed, dim=12):
    "Scores of invented photos: a place for each person, and noise around it that differs from person to person"
    rng = np.random.default_rng(seed)
    noise = .55*np.exp(.25*rng.normal(size=n_people))
    v = rng.normal(size=(n_people, 1, dim)) + noise[:, None, None]*rng.normal(size=(n_people, n_photos, dim))
    v = v.reshape(-1, dim)
    return score_pairs(1 - np.linalg.norm(v[:, None] - v[None], axis=2)/6, np.repeat([f'p{i:03}' for i in range(n_people)], n_photos))


def fitted(t, method='logistic', **kw): return Calibrator(method, RECIPE).fit(t.score, t.mated, t.left_person, t.right_person, **kw)


# costs

@pytest.mark.parametrize('seed', range(8))
@pytest.mark.parametrize('costs', [(1, 1, .5), (100, 1, .95), (1, 20, .3)])
def test_cost_threshold_is_the_cheapest_of_all(seed, costs):
    s, m = random_pairs(seed, digits=seed % 3)
    kw = dict(zip(('cost_fm', 'cost_fnm', 'prior'), costs))
    cost = lambda t: expected_cost(fmr(s, m, t), fnmr(s, m, t), **kw)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        t = cost_threshold(s, m, **kw)
    every = [-np.inf, *np.unique(s), np.inf]
    assert cost(t) == pytest.approx(min(map(cost, every)))
    assert all(cost(u) == pytest.approx(x) for u, x in zip(*cost_curve(s, m, **kw)[['threshold', 'cost']].to_numpy().T))


def test_cost_threshold_lies_in_the_gap():
    assert cost_threshold([.9, .8, .2, .1], [1, 1, 0, 0]) == pytest.approx(.5)
    close = np.array([.5, np.nextafter(.5, 0)])
    t = cost_threshold(close, [1, 0])
    assert (fmr(close, [1, 0], t), fnmr(close, [1, 0], t)) == (0, 0)


@pytest.mark.parametrize('kw, words', [(dict(cost_fm=0), 'cost_fm'), (dict(cost_fnm=-2), 'cost_fnm'), (dict(cost_fm=np.nan), 'cost_fm'), (dict(cost_fm=np.inf), 'cost_fm'),
                                       (dict(prior=0), 'prior'), (dict(prior=1), 'prior'), (dict(prior=np.nan), 'prior')])
def test_costs_are_checked_everywhere(kw, words):
    t = random_pairs(0)
    for f in (lambda: bayes_llr(**kw), lambda: expected_cost(.1, .1, **kw), lambda: cost_curve(*t, **kw), lambda: cost_threshold(*t, **kw), lambda: Calibrator().fit(*t).threshold(**kw)):
        with pytest.raises(ValueError, match=words): f()


def test_bayes_threshold_is_where_both_decisions_cost_the_same():
    for fm, fnm, prior in [(1, 1, .5), (100, 1, .95), (3, 7, .01)]:
        p = posterior(bayes_llr(fm, fnm, prior), prior)
        assert (1 - p)*fm == pytest.approx(p*fnm)


# bits

@pytest.mark.parametrize('seed', range(6))
def test_cllr_is_the_loop(seed):
    s, m = random_pairs(seed)
    paid = [[], []]
    for x, y in zip(s, m): paid[int(y)].append(np.log2(1 + np.exp(-x if y else x)))
    assert cllr(s, m) == pytest.approx((np.mean(paid[0]) + np.mean(paid[1]))/2)
    assert calibration_loss(s, m) == pytest.approx(cllr(s, m) - min_cllr(s, m))


@pytest.mark.parametrize('seed', range(4))
def test_min_cllr_is_the_best_of_all_rising_stairs(seed):
    "All ways to cut a short row of distinct scores into blocks whose LLRs rise"
    s, m = random_pairs(seed, n=9, gap=.8)
    x = np.unique(s)
    best = np.inf
    for cuts in range(2**(len(x) - 1)):
        block = np.r_[0, np.cumsum([cuts >> i & 1 for i in range(len(x) - 1)])][np.searchsorted(x, s)]
        with np.errstate(divide='ignore'):
            llr = np.log([[m[block == b].sum()/m.sum() for b in range(block.max() + 1)], [(~m)[block == b].sum()/(~m).sum() for b in range(block.max() + 1)]])
            step = llr[0] - llr[1]
            rises = (step[1:] >= step[:-1] - 1e-12).all()
        if rises: best = min(best, cllr(step[block], m))
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        assert min_cllr(s, m) == pytest.approx(best, abs=1e-9)


@pytest.mark.parametrize('seed', range(6))
def test_only_the_order_matters_to_min_cllr(seed):
    s, m = random_pairs(seed, digits=0)
    p = np.random.default_rng(seed).permutation(len(s))
    assert min_cllr(np.exp(s)*7, m) == pytest.approx(min_cllr(s, m)) == pytest.approx(min_cllr(s[p], m[p]))
    assert 0 <= min_cllr(s, m) <= 1 and min_cllr(s, m) <= cllr(s, m) + 1e-12
    scale = minimize_scalar(lambda a: cllr(a*s, m), bounds=(0, 50), method='bounded')
    assert min_cllr(s, m) <= scale.fun + 1e-12


def test_known_values_of_cllr():
    assert cllr(np.zeros(7), [1, 0, 0, 0, 1, 0, 0]) == 1 == min_cllr(np.zeros(4), [1, 0, 0, 1])
    assert cllr([np.inf, -np.inf], [1, 0]) == 0 and cllr([-np.inf, 0], [1, 0]) == np.inf
    assert cllr([1000, -1000], [0, 1]) == pytest.approx(1000/np.log(2))
    with pytest.warns(UserWarning, match='distances'): assert min_cllr([.1, .9], [1, 0]) == pytest.approx(1)


@pytest.mark.parametrize('f', [cllr, min_cllr, calibration_loss, lambda s, m: Calibrator().fit(s, m), lambda s, m: Calibrator('isotonic').fit(s, m), cost_threshold])
@pytest.mark.parametrize('s, m, words', [([np.nan, 1], [1, 0], 'NaN'), ([1, 2], [1, 1], 'no non-mated'), ([1, 2], [0, 0], 'no mated'), ([], [], 'no '),
                                         ([1, 2, 3], [1, 0], '3 scores but 2'), ([[1], [2]], [1, 0], 'flat'), ([1, 2], ['a', 'b'], 'True/False')])
def test_nonsense_is_refused(f, s, m, words):
    with pytest.raises(ValueError, match=words): f(s, m)


# calibration

def test_line_is_scikit_learn_with_both_kinds_weighing_the_same():
    rng = np.random.default_rng(1)
    m = np.arange(22000) < 2000
    s = rng.normal(size=22000) + 1.2*m
    weight = np.where(m, .5/m.sum(), .5/(~m).sum())*len(m)
    ref = LogisticRegression(C=1e9, tol=1e-9).fit(s[:, None], m, sample_weight=weight)
    c, x = Calibrator().fit(s, m), np.linspace(-2, 3, 20)
    assert c.llr(x) == pytest.approx(ref.decision_function(x[:, None]), abs=.01)
    assert c.llr(x) == pytest.approx(1.2*x - .72, abs=.15)  # the truth of two bells of width 1


@pytest.mark.parametrize('method', CALIBRATIONS)
def test_the_mixture_of_pairs_does_not_matter(method):
    s, m = random_pairs(3, n=600)
    more = np.r_[s, np.tile(s[~m], 9)], np.r_[m, np.zeros(9*(~m).sum(), dtype=bool)]
    x = np.quantile(s, np.linspace(.1, .9, 15))
    assert Calibrator(method).fit(*more).llr(x) == pytest.approx(Calibrator(method).fit(s, m).llr(x), abs=.12)


@pytest.mark.parametrize('method', CALIBRATIONS)
@pytest.mark.parametrize('seed', range(4))
def test_rising_bounded_and_indifferent_to_order_and_scale(method, seed):
    s, m = random_pairs(seed, digits=2)
    c, x, p = Calibrator(method).fit(s, m), np.linspace(-9, 9, 300), np.random.default_rng(seed).permutation(len(s))
    y = c.llr(x)
    assert (np.diff(y) >= -1e-12).all() and y.min() >= -np.log(m.sum() + 1) - 1e-9 and y.max() <= np.log((~m).sum() + 1) + 1e-9
    assert Calibrator(method).fit(s[p], m[p]).llr(x) == pytest.approx(y, abs=1e-5)
    if method == 'logistic': assert Calibrator(method).fit(1e6*s - 5, m).llr(1e6*x - 5) == pytest.approx(y, abs=1e-4)
    for costs in ((1, 1, .5), (2, 1, .6)):
        assert c.llr(c.threshold(*costs)) == pytest.approx(bayes_llr(*costs), abs=1e-6)


@pytest.mark.parametrize('method', CALIBRATIONS)
def test_separated_scores_stay_within_what_was_seen(method):
    s, m = np.r_[np.linspace(.7, .9, 20), np.linspace(.1, .3, 50)], np.arange(70) < 20
    c = Calibrator(method).fit(s, m)
    assert np.isfinite(c.llr(s)).all() and c.llr(5.) <= np.log(51) + 1e-9 and c.llr(-5.) >= -np.log(21) - 1e-9
    assert c.probability(.75) > .9 and c.probability(.2) < .1 and cllr(c.llr(s), m) < .1


def test_people_are_counted_when_they_have_names():
    t = faces(6, 4, 0)
    c, nameless = fitted(t, n_boot=0), Calibrator().fit(t.score, t.mated)
    assert c.counts == dict(mated=36, non_mated=240, people=6, pairs_of_people=15) and nameless.counts == dict(mated=36, non_mated=240)
    assert c.llr(9.) == pytest.approx(np.log(16)) and c.llr(-9.) == pytest.approx(-np.log(7)) and nameless.llr(9.) == pytest.approx(np.log(241))
    swapped = Calibrator().fit(t.score, t.mated, t.right_person, t.left_person, n_boot=0)
    assert swapped.counts == c.counts
    with pytest.raises(ValueError, match='support 16 : 1 at most'): c.threshold(cost_fm=20)
    with pytest.raises(ValueError, match='every score is a match'): c.threshold(cost_fnm=20)


def test_degenerate_fits():
    for method in CALIBRATIONS:
        with pytest.raises(ValueError, match='all scores are'): Calibrator(method).fit([.5]*4, [1, 0, 1, 0])
        with pytest.raises(ValueError, match='distances'): Calibrator(method).fit([.1, .2, .8, .9], [1, 1, 0, 0])
        with pytest.raises(ValueError, match='not fitted'): Calibrator(method).probability(.5)
        with pytest.raises(ValueError, match='not fitted'): Calibrator(method).to_dict()
    with pytest.raises(ValueError, match='method'): Calibrator('spline')
    t = faces(4, 3, 0)
    with pytest.raises(ValueError, match='five of them'): fitted(t)
    with pytest.raises(ValueError, match='disagree in'): Calibrator().fit(t.score, t.mated, t.left_person, t.left_person)
    with pytest.raises(ValueError, match='right people'): Calibrator().fit(t.score, t.mated, t.left_person, t.right_person[:5])
    with pytest.raises(ValueError, match='NaN or infinite'): fitted(t, n_boot=0).llr([.5, np.nan])
    with pytest.raises(ValueError, match='no interval without people'): fitted(t, n_boot=0).probability_interval(.5)
    assert 'not fitted' in repr(Calibrator()) and '4 people' in repr(fitted(t, n_boot=0))


def test_shapes_and_priors():
    c = fitted(faces(8, 4, 1), n_boot=20)
    for s in (.5, [.5, .6], np.full((2, 3), .5)):
        p, (lo, hi) = c.probability(s), c.probability_interval(s)
        assert np.shape(p) == np.shape(s) == np.shape(lo) == np.shape(hi) and (lo <= p).all() and (p <= hi).all()
    assert c.probability(.5, .9) > c.probability(.5, .5) > c.probability(.5, .1)
    assert posterior(c.llr(.5), .2) == c.probability(.5, .2)
    with pytest.raises(ValueError, match='prior'): c.probability(.5, prior=2)


# people, recipes, files

def test_people_of_the_fit_may_not_judge():
    a, b = faces(8, 4, 1), faces(8, 4, 2)
    c = fitted(a, n_boot=0)
    with pytest.raises(IdentityLeak, match='8 people') as e: c.judge(b.score, b.mated, b.left_person, b.right_person)
    assert len(e.value.people) == 8
    others = b.assign(left_person='x' + b.left_person, right_person='x' + b.right_person)
    j = c.judge(others.score, others.mated, others.left_person, others.right_person, recipe=RECIPE, n_boot=20)
    assert j.bits['loss'] == pytest.approx(j.bits['cllr'] - j.bits['min_cllr']) and (j.lo <= j.bits).all() and (j.bits <= j.hi).all()
    assert j.bits['cllr'] == pytest.approx(cllr(c.llr(b.score), b.mated)) and set(j.mated) == {48} and set(j.non_mated) == {448}
    assert c.judge(b.score, b.mated).lo.isna().all()
    check_disjoint([], ['a']); check_disjoint(pd.Series(['a', 'b']), {'c'})


@pytest.mark.parametrize('change', [dict(detector='adaptive'), dict(align='margin'), dict(encoder='facenet'), dict(metric='cosine'), dict(upsample=0), dict(extra=1)])
def test_another_recipe_is_refused_by_name(change):
    c = fitted(faces(8, 4, 1), n_boot=5)
    key = next(iter(change))
    for ask in (c.llr, c.probability, c.probability_interval):
        ask(.5); ask(.5, recipe=dict(RECIPE))
        with pytest.raises(ValueError, match=key): ask(.5, recipe=RECIPE | change)
    check_same_recipe(None, None)
    with pytest.raises(ValueError, match='unknown'): check_same_recipe(None, RECIPE)


@pytest.mark.parametrize('method', CALIBRATIONS)
def test_file_gives_the_same_answers_and_no_names(method):
    t = faces(8, 4, 1)
    c, x = fitted(t, method, n_boot=20), np.linspace(-1, 2, 50)
    text = json.dumps(c.to_dict(), allow_nan=False)
    back = Calibrator.from_dict(json.loads(text))
    assert not any(p in text for p in c.people) and back.people is None and len(text) < 20_000
    for f in ('llr', 'probability', 'probability_interval'): np.testing.assert_array_equal(getattr(c, f)(x), getattr(back, f)(x))
    assert back.recipe == RECIPE and back.counts == c.counts and back.threshold(cost_fm=2) == c.threshold(cost_fm=2)
    assert Calibrator.from_dict(fitted(t, method, n_boot=0).to_dict()).band is None
    with pytest.warns(UserWarning, match='whom it was fitted on'): back.judge(t.score, t.mated, t.left_person, t.right_person, n_boot=5)


@pytest.mark.parametrize('change', [dict(kind='other'), dict(method='magic'), dict(x=[0]), dict(x=[1, 0]), dict(x=['a', 'b']), dict(llr=[1, 0]), dict(llr=[0, float('nan')]), dict(llr=None),
                                    dict(band=[[1, 2]]), dict(band=3), dict(counts=None), dict(counts={})])
def test_broken_files_are_refused(change):
    d = fitted(faces(8, 4, 1), n_boot=5).to_dict()
    for bad in (d | change, {k: v for k, v in d.items() if k not in change}):
        if bad.keys() == d.keys() or 'band' not in change:
            with pytest.raises(ValueError, match='not a calibrator'): Calibrator.from_dict(bad)
    for bad in (None, [], 'text', {}):
        with pytest.raises(ValueError, match='not a calibrator'): Calibrator.from_dict(bad)


# reliability

def test_reliability_counts_every_pair_once():
    rng = np.random.default_rng(0)
    p = rng.random(5000)**2
    m = rng.random(5000) < p
    r = reliability(p, m)
    assert r.pairs.sum() == 5000 and r.mated.sum() == m.sum() and ((r.low <= r.said) & (r.said <= r.high)).all()
    for o in r.itertuples():
        inside = (p >= o.low) & ((p < o.high) | (o.high == 1) & (p <= 1))
        assert (o.pairs, o.mated) == (inside.sum(), m[inside].sum()) and o.share == pytest.approx(m[inside].mean())
    assert ((r.lo <= r.said) & (r.said <= r.hi)).mean() > .7  # these probabilities are true
    assert len(reliability([0, 1], [0, 1])) == 2 and reliability([1, 1], [1, 1]).pairs.tolist() == [2]
    with pytest.raises(ValueError, match='no probabilities'): reliability([-.1, .5], [0, 1])


def test_plots_draw_what_the_tables_say():
    import matplotlib.pyplot as plt
    ax = plot_costs(cost_curve(*random_pairs(1)), 'a')
    assert plot_costs(cost_curve(*random_pairs(2)), 'b', ax=ax) is ax and len(ax.lines) == 4
    table = reliability([.2, .2, .8, .8, 1], [0, 0, 1, 0, 1])
    ax = plot_reliability(table, 'x', color='k')
    assert len(ax.containers) == 1 and len(ax.containers[0][0].get_xdata()) == len(table)
    plt.close('all')


# the interval, put to the test

def test_interval_holds_the_truth():
    "People drawn anew for each calibration; the truth comes from 300 people"
    parts = [faces(60, 4, 100 + i) for i in range(5)]
    s, m = (np.concatenate([t[c] for t in parts]) for c in ('score', 'mated'))
    truth = Calibrator().fit(s, m)
    at = np.r_[np.quantile(s[m], [.1, .3, .5]), np.quantile(s[~m], [.9, .97])]
    def holds(seed):
        c = fitted(faces(20, 4, seed), n_boot=60)
        lo, hi = c.probability_interval(at)
        p = posterior(np.clip(truth.llr(at), *c.limits))
        return (lo - 1e-9 <= p) & (p <= hi + 1e-9)
    assert np.mean([holds(i) for i in range(20)]) > .88
