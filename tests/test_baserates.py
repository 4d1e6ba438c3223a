"facelab.baserates against exact arithmetic, drawing galleries at random, simulation of the interval, and bad input"
from decimal import Decimal, getcontext
import matplotlib.pyplot as plt, numpy as np, pandas as pd, pytest
from scipy.stats import binom
from facelab.baserates import *
from facelab.metrics import fpir as measured_fpir, wilson_ci

getcontext().prec = 60


@pytest.mark.parametrize('fmr', [0, 1e-18, 1e-9, 1e-6, .001, .01, .5, 1])
@pytest.mark.parametrize('n', [0, 1, 2, 70, 10_000, 8_000_000_000])
def test_formula_in_sixty_digits(fmr, n):
    exact = 1 - (1 - Decimal(fmr))**n if n else Decimal(0)
    assert fpir_from_fmr(fmr, n) == pytest.approx(float(exact), rel=1e-12)


@pytest.mark.parametrize('n', [1, 2, 70, 1680, 10**9])
@pytest.mark.parametrize('fpir', [1e-12, 1e-6, .01, .5, .999])
def test_inverse(fpir, n):
    assert fpir_from_fmr(fmr_for_fpir(fpir, n), n) == pytest.approx(fpir, rel=1e-9)


@pytest.mark.parametrize('fmr', [1e-9, 1e-6, 3e-5, .001, .013, .2, .5])
def test_largest_gallery_is_the_largest(fmr):
    for n in (1, 2, 3, 7, 70, 999, 12_345):
        promise = fpir_from_fmr(fmr, n)
        if promise > .9999: continue
        assert largest_gallery(fmr, promise) == n
    for promise in (.001, .01, .37):
        n = largest_gallery(fmr, promise)
        assert fpir_from_fmr(fmr, n) <= promise*(1 + 1e-9) < fpir_from_fmr(fmr, n + 1)*(1 + 1e-9)
    assert largest_gallery(1, .5) == 0


def test_seventy_students():
    assert fpir_from_fmr(.001, 70) == pytest.approx(.0676, abs=5e-5)
    assert strangers_named(.001, 70) == pytest.approx(6.76, abs=.005)
    assert np.allclose(fpir_from_fmr([.1, .2], [[1], [2]]), [[.1, .2], [.19, .36]])


@pytest.mark.parametrize('call', [lambda: fpir_from_fmr(1.5, 2), lambda: fpir_from_fmr(-.1, 2), lambda: fpir_from_fmr(np.nan, 2), lambda: fpir_from_fmr([.1, 7], 2),
    lambda: fpir_from_fmr(.1, -1), lambda: fpir_from_fmr(.1, 2.5), lambda: fpir_from_fmr(.1, np.inf), lambda: fmr_for_fpir(.1, 0), lambda: fmr_for_fpir(2, 1),
    lambda: largest_gallery(0, .1), lambda: largest_gallery(.1, 1), lambda: largest_gallery(.1, np.nan), lambda: strangers_named(3, 70),
    lambda: expected_visitors(.5, 99, .1), lambda: positive_predictive_value(.9, .1, 2), lambda: trials_to_show(0), lambda: trials_to_show(1), lambda: trials_to_show(.1, 1),
    lambda: hit_odds(3, 4), lambda: hit_odds(3, -1)])
def test_bad_input(call):
    with pytest.raises(ValueError): call()


def test_percent_is_suspected():
    with pytest.raises(ValueError, match='meant in percent'): fpir_from_fmr(5, 70)


@pytest.mark.parametrize('rate', [.9, .5, .1, .01, 1e-3, 1e-6])
def test_trials_are_just_enough(rate):
    n = trials_to_show(rate)
    assert (1 - rate)**n <= .05*(1 + 1e-9) and (1 - rate)**(n - 1) > .05


def test_visitors_and_bayes_agree():
    rng = np.random.default_rng(0)
    for s, t, f in rng.random((20, 3)):
        table = expected_visitors(s, t, f)
        assert table.to_numpy().sum() == pytest.approx(1000)
        assert table.named['enrolled']/table.named.sum() == pytest.approx(positive_predictive_value(t, f, 1 - s))
        assert whole_people(table).sum() == 1000 and np.abs(whole_people(table) - table.to_numpy()).max() < 1


def test_whole_people_of_anything():
    rng = np.random.default_rng(1)
    for _ in range(100):
        c = rng.random(5)*rng.integers(1, 50)
        out = whole_people(c)
        assert out.sum() == round(c.sum()) and (np.abs(out - c) < 1).all()
    assert whole_people([0, 0, 7]).tolist() == [0, 0, 7]


@pytest.mark.parametrize('people,n', [(1, 1), (5, 0), (6, 3), (9, 9), (12, 1)])
def test_hit_odds_by_drawing(people, n):
    rng = np.random.default_rng(people)
    first = np.array([np.append(np.sort(rng.permutation(people)[:n]), people)[0] for _ in range(4000)])   # the first k people match
    odds = hit_odds(people, n)
    assert len(odds) == people + 1 and odds[0] == 0
    for k in range(people + 1): assert odds[k] == pytest.approx((first < k).mean(), abs=.04)


def test_fpir_by_size_by_drawing():
    rng = np.random.default_rng(2)
    s = rng.normal(size=(60, 15)) + rng.normal(size=(60, 1))
    t = fpir_by_size(s, 2.2, [1, 4, 15])
    assert t.fpir[0] == pytest.approx((s >= 2.2).mean()) and t.fpir[2] == measured_fpir(s, 2.2)
    assert t.fpir[1] == pytest.approx(np.mean([measured_fpir(s[:, rng.permutation(15)[:4]], 2.2) for _ in range(3000)]), abs=.01)
    assert (t.lo <= t.fpir).all() and (t.fpir <= t.hi).all() and (t.fpir <= t.formula + 1e-12).all()
    for bad in (s[0], s[:0], np.where(s > 2, np.nan, s)):
        with pytest.raises(ValueError): fpir_by_size(bad, 2.2, [1])
    with pytest.raises(ValueError, match='five of them'): fpir_by_size(s[:4], 2.2, [1])


def test_no_stranger_named_is_no_certainty():
    t = fpir_by_size(np.zeros((100, 8)), .5, [1, 8], np.repeat(np.arange(10), 10))
    assert (t.fpir == 0).all() and (t.lo == 0).all() and (t.hi > .2).all()


@pytest.mark.parametrize('people,visits,spread', [(15, 10, .12), (40, 10, .12), (40, 1, 0), (200, 5, .05)])
def test_coverage_over_people(people, visits, spread):
    "New people every time, each with a rate of their own: the interval over people holds where the one over visits falls short"
    rng, p, inside, naive, n = np.random.default_rng(3), .1, 0, 0, 400
    who = np.repeat(np.arange(people), visits)
    for _ in range(n):
        rates = np.clip(rng.gamma((p/spread)**2, spread**2/p, people), 0, 1) if spread else np.full(people, p)
        wrong = rng.random(len(who)) < rates[who]
        lo, hi = people_ci(wrong, who); inside += lo <= p <= hi
        lo, hi = wilson_ci(wrong.sum(), len(wrong)); naive += lo <= p <= hi
    assert .92 <= inside/n <= .99
    if spread*visits > 1: assert naive/n < .9


def test_people_ci_edges():
    who = np.repeat(np.arange(6), 3)
    assert people_ci(np.ones(18), who)[1] == 1 and people_ci(np.zeros(18), who)[0] == 0
    x = np.random.default_rng(0).random(18) < .3
    order = np.random.default_rng(1).permutation(18)
    assert people_ci(x, who) == pytest.approx(people_ci(x[order], who[order]))
    assert people_ci(x, who) == pytest.approx(people_ci(x, pd.Series(list('abcdef')).repeat(3)))
    assert people_ci(x, who, level=.5)[0] > people_ci(x, who)[0]
    for v, w in ((x, who[:-1]), (x[:0], who[:0]), (x*2., who), (np.full(18, np.nan), who), (x[:3], who[:3])):
        with pytest.raises(ValueError): people_ci(v, w)
    assert binom.cdf(0, 6, people_ci(np.zeros(18), who)[1]) < .05


def test_pictures():
    assert len(plot_fpir([.1, .01]).lines) == 2
    ax = plot_visitors(expected_visitors(.3, .9, .1))
    assert [len(l.get_xdata()) for l in ax.lines] == [630, 70, 30, 270]
    assert len(plot_fpir_by_size(fpir_by_size(np.eye(6), .5, [1, 6])).lines) == 2
    plt.close('all')
