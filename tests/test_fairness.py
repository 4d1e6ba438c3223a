"facelab.fairness against plain loops and known truths: counts, tosses, tests of differences, labels with mistakes"
import io

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from scipy.stats import norm

from facelab import fairness
from facelab.datasets import lfw
from facelab.fairness import *
from facelab.metrics import fmr, subject_bootstrap, threshold_at_fmr, wilson_ci


def crowd(sizes, photos=3, lean=None, noise=.5, dim=16, seed=0):
    "Pairs of invented people with groups; people of a group with `lean` look alike"
    rng, lean = np.random.default_rng(seed), lean or {}
    person = [f'{g}{i}' for g, n in sizes.items() for i in range(n)]
    tilt = np.array([lean.get(g, 0) for g, n in sizes.items() for _ in range(n)])[:, None]
    x = tilt*np.eye(dim)[0] + np.sqrt(1 - tilt**2)*rng.normal(size=(len(person), dim))/dim**.5
    x = np.repeat(x, photos, 0) + noise*rng.normal(size=(len(person)*photos, dim))/dim**.5
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    i, j = np.triu_indices(len(x), 1)
    names = np.repeat(person, photos)
    t = pd.DataFrame(dict(left=i, right=j, left_person=names[i], right_person=names[j], score=(x @ x.T)[i, j].round(3), mated=names[i] == names[j]))
    return add_groups(t, pd.Series({p: p[0] for p in person}))


def slow_counts(t, threshold):
    "people, pairs and errors of every cell, pair by pair"
    out = {}
    for r in t.itertuples():
        key = ('fnmr' if r.mated else 'fmr', *sorted([r.left_group, r.right_group]))
        people, n, k, wrong = out.setdefault(key, [set(), 0, 0, set()])
        bad = r.score < threshold if r.mated else r.score >= threshold
        people |= {r.left_person, r.right_person}
        if bad: wrong |= {r.left_person, r.right_person}
        out[key] = [people, n + 1, k + bad, wrong]
    return {k: (len(p), len(w), n, e) for k, (p, n, e, w) in out.items()}


@pytest.mark.parametrize('seed', range(4))
@pytest.mark.parametrize('by', ['person', 'photo'])
def test_counts_are_the_double_loop(seed, by):
    t = crowd(dict(A=6, B=4, C=2), seed=seed)
    if by == 'photo':
        labels = pd.Series(np.random.default_rng(seed).choice(['dark', 'light'], 36))
        t = add_groups(t, labels, by='photo')
    threshold = t.score.sample(1, random_state=seed).iloc[0]   # a tie on purpose
    a = audit_groups(t, threshold, across=True, min_people=2, min_pairs=1, n_boot=50)
    fast = {(r.rate, r.group, r.other): (r.people, r.wrong_people, r.pairs, r.errors) for r in a.itertuples() if r.pairs}
    assert fast == slow_counts(t, threshold)
    ok = a[a.value.notna()]
    np.testing.assert_allclose(ok.value, ok.errors/ok.pairs)
    assert ((ok.lo <= ok.value) & (ok.value <= ok.hi)).all()
    within = audit_groups(t, threshold, min_people=2, min_pairs=1, n_boot=50)
    pd.testing.assert_frame_equal(within, a[a.group == a.other].drop(columns='other').reset_index(drop=True))


def test_all_cells_together_are_the_whole():
    t = crowd(dict(A=12, B=12))
    a = audit_groups(t, .5, across=True)
    f = a[a.rate == 'fmr']
    assert f.errors.sum()/f.pairs.sum() == pytest.approx(fmr(t.score, t.mated, .5))
    assert a.pairs.sum() == len(t)


def test_tosses_are_the_plain_loop():
    rng = np.random.default_rng(1)
    w, i, j = rng.integers(0, 2, (7, 30)).astype(float), rng.integers(0, 7, 90), rng.integers(0, 7, 90)
    slow = [sum(w[a, k]*w[b, k] for a, b in zip(i, j)) for k in range(30)]
    np.testing.assert_allclose(fairness._weighted(w, i, j), slow)


def test_uncertainty_is_that_of_the_subject_bootstrap():
    t = crowd(dict(A=30), lean=dict(A=.4))
    a = audit_groups(t, .5, n_boot=2000, min_pairs=50).set_index('rate')
    tosses = []
    subject_bootstrap(t.score, t.mated, t.left_person, t.right_person, lambda s, m: tosses.append((fmr(s, m, .5), 1 - (s[m] >= .5).mean())) or 0, n_boot=1500)
    for rate, v in zip(('fmr', 'fnmr'), np.var(tosses, axis=0)):
        assert a.value[rate]*(1 - a.value[rate])/a.worth[rate] == pytest.approx(v, rel=.15)
        assert a.worth[rate] < a.pairs[rate]


def test_order_of_rows_and_sides_changes_nothing():
    t = crowd(dict(A=12, B=12))
    u = t.sample(frac=1, random_state=3)
    flip = dict(left_person='right_person', right_person='left_person', left_group='right_group', right_group='left_group', left='right', right='left')
    a, b, c = (audit_groups(o, .5, across=True, n_boot=100) for o in (t, u, u.rename(columns=flip)))
    pd.testing.assert_frame_equal(a, b); pd.testing.assert_frame_equal(a, c)
    pd.testing.assert_frame_equal(audit_groups(t, .5, n_boot=100), audit_groups(t.assign(left_group=t.left_group.astype(str), right_group=t.right_group.astype(str)), .5, n_boot=100))


def test_few_people_keep_their_row():
    t = crowd(dict(A=12, B=1, C=3))
    a = audit_groups(t, .5).set_index(['rate', 'group'])
    assert a.status['fnmr', 'B'] == 'too few to say: 1 person, 10 wanted' and a.status['fmr', 'B'] == 'too few to say: 0 people, 10 wanted'
    assert a.loc[('fmr', 'C'), ['people', 'pairs']].tolist() == [3, 27] and np.isnan(a.value['fmr', 'C'])
    assert audit_groups(t, .5, min_pairs=10**6).value.isna().all()
    assert len(a) == 6
    unseen = add_groups(t, pd.Series({'A0': 'A', 'nobody': 'Z'}))
    assert set(audit_groups(unseen, .5).group) == {'A', 'Z', '(no label)'}


def test_no_error_seen_is_not_certainty():
    t = crowd(dict(A=15))
    a = audit_groups(t, 2., min_pairs=30).set_index('rate')                   # nothing matches: FMR 0, FNMR 1
    assert a.status.to_dict() == dict(fnmr='ok', fmr='no error seen')
    assert a.worth.to_dict() == dict(fnmr=15, fmr=105)
    assert wilson_ci(0, 105)[1] < a.hi['fmr'] < 1.4*wilson_ci(0, 105)[1] and a.lo['fmr'] == 0
    assert a.hi['fnmr'] == 1 and a.lo['fnmr'] < wilson_ci(15, 15)[0]


def test_intervals_cover_and_wilson_does_not():
    truth = {k: v for k, v in zip(('fmr', 'fnmr'), _rates(crowd(dict(A=500), lean=dict(A=.4), photos=2, seed=99)))}
    hits = {(k, w): 0 for k in truth for w in ('people', 'pairs')}
    for seed in range(60):
        a = audit_groups(crowd(dict(A=25), lean=dict(A=.4), seed=seed), .5, n_boot=200, min_pairs=50).set_index('rate')
        for k, v in truth.items():
            hits[k, 'people'] += a.lo[k] <= v <= a.hi[k]
            hits[k, 'pairs'] += a.wilson_lo[k] <= v <= a.wilson_hi[k]
    assert hits['fmr', 'people'] >= 54 and hits['fnmr', 'people'] >= 51
    assert hits['fmr', 'pairs'] < 45


def _rates(t):
    return fmr(t.score, t.mated, .5), float((t.score[t.mated] < .5).mean())


def test_equal_groups_are_rarely_called_different():
    wrong = 0
    for seed in range(40):
        c = compare_groups(crowd(dict(A=25, B=25, C=25), seed=seed, noise=.6), .5, n_boot=200)
        wrong += c.verdict.str.startswith('different').any()
    assert wrong <= 5


def test_unequal_groups_are_found_and_the_verdict_agrees_with_the_interval():
    t = crowd(dict(A=60, B=60), lean=dict(B=.6))
    c = compare_groups(t, .5).iloc[0]
    assert (c.a, c.b) == ('B', 'A') and c.lo > 1 and c.p < .05 and c.verdict.startswith('different')
    a = audit_groups(t, .5).set_index(['rate', 'group']).value
    assert c.ratio == pytest.approx(a['fmr', 'B']/a['fmr', 'A'])
    d = compare_groups(t, .5, how='difference').iloc[0]
    assert d.difference == pytest.approx(a['fmr', 'B'] - a['fmr', 'A']) and d.lo < d.difference < d.hi
    e = compare_groups(crowd(dict(A=20, B=20), noise=.6), .5).iloc[0]
    assert e.lo < 1 < e.hi and 'remains possible' in e.verdict and e.p > .05


def test_same_people_in_both_groups_are_compared_by_their_own_difference():
    rng, rows = np.random.default_rng(0), []
    for p in range(40):                                          # everybody has a rate of their own, a bit higher on bad photos
        base = rng.choice([.05, .6])
        rows += [(f'p{p}', g, float(rng.random() >= base + d)) for g, d in (('good', 0), ('bad', .12)) for _ in range(60)]
    t = pd.DataFrame(rows, columns=['left_person', 'left_group', 'score'])
    t = t.assign(right_person=t.left_person, right_group=t.left_group, mated=True)
    c = compare_groups(t, .5, 'fnmr').iloc[0]
    assert c.overlap and c.verdict.startswith('different')


def test_too_few_errors_are_not_compared():
    t = crowd(dict(A=12, B=12, C=2))
    c = compare_groups(t, 2.)
    assert len(c) == 3 and c.ratio.isna().all() and c.verdict.str.contains('too few').all()
    assert 'C: too few to say' in c.verdict.iloc[-1]
    with pytest.raises(ValueError, match='two groups'): worst_ratio(t, 2.)


def test_worst_ratio_is_largest_over_geometric_mean():
    t = crowd(dict(A=30, B=30, C=30, D=2), lean=dict(B=.5), noise=.6)
    r, a = worst_ratio(t, .5), audit_groups(t, .5).query('rate == "fmr"').value.dropna()
    assert r.ratio == pytest.approx(a.max()/np.exp(np.log(a).mean()))
    assert (r.worst, r.groups) == ('B', 3) and 1 <= r.lo < r.ratio < r.hi and r.left_out.startswith('D (too few')


def test_contrasts_without_spread_or_with_broken_tosses():
    est, lo, hi, se, p = fairness._contrasts(np.array([1., 1]), np.ones((2, 9)), np.array([[1., -1]]), .95)
    assert est[0] == lo[0] == hi[0] == 0 and p[0] == 1
    tossed = np.random.default_rng(0).normal(size=(2, 99)); tossed[0, 3] = np.nan
    assert np.isfinite(fairness._contrasts(np.zeros(2), tossed, np.array([[1., -1]]), .95)).all()


@pytest.mark.parametrize('rate,factor', [(.02, 2), (.1, 1.5), (.01, 3)])
def test_pairs_needed_has_the_promised_power(rate, factor):
    n = pairs_needed(rate, factor)
    k = np.random.default_rng(0).binomial(n, [rate, factor*rate], (20_000, 2))
    with np.errstate(divide='ignore', invalid='ignore'): z = np.log(k[:, 1]/k[:, 0])/np.sqrt((1/k - 1/n).sum(1))
    assert (z > norm.ppf(.975)).mean() == pytest.approx(.8, abs=.06)


def test_pairs_and_people_needed_refuse_nonsense():
    for bad in dict(rate=0), dict(rate=.6), dict(rate=.01, factor=1), dict(rate=float('nan')):
        with pytest.raises(ValueError): pairs_needed(**bad)
    assert pairs_needed(.01, tests=10) > pairs_needed(.01) < pairs_needed(.01, power=.95)
    t = compare_groups(crowd(dict(A=20, B=20), noise=.6), .5)
    with pytest.raises(ValueError, match='above 1'): people_needed(t, factor=1)
    assert people_needed(t, 4).times[0] < people_needed(t).times[0]


def test_thresholds_keep_their_promise_within_each_group():
    t = crowd(dict(A=15, B=15, C=3), lean=dict(B=.6))
    g = group_thresholds(t, .02)
    assert list(g.index) == ['A', 'B', 'C', 'everybody'] and g.status['C'] == 'too few to say: 3 people, 10 wanted'
    assert g.threshold['B'] > g.threshold['A']
    for k in 'AB':
        own = t[(t.left_group == k) & (t.right_group == k) & ~t.mated]
        assert (own.score >= g.threshold[k]).mean() <= .02 < (own.score >= g.threshold[k] - .001).mean() + .01
    strangers = t[~t.mated]
    assert g.threshold['everybody'] == threshold_at_fmr(np.append(strangers.score, strangers.score.max()), np.arange(len(strangers) + 1) == len(strangers), .02)
    with pytest.raises(ValueError, match='no threshold for C'): audit_groups(t, g.threshold)
    a = audit_groups(t, g.threshold.fillna(g.threshold['everybody'])).query('rate == "fmr"').set_index('group')
    assert (a.value[['A', 'B']] <= .02).all()
    assert audit_groups(t, g.threshold.fillna(.5), across=True).query('group != other').pairs.sum() == 0
    for bad in (0, -1, 2):
        with pytest.raises(ValueError, match='share above 0'): group_thresholds(t, bad)


def test_labels_with_mistakes(tmp_path):
    def read(text, **kw):
        (tmp_path/'l.csv').write_text(text, encoding='utf-8')
        return read_labels(tmp_path/'l.csv', 'group', **kw)
    assert read('person,group\n007,A\n李雷, B\n').to_dict() == {'007': 'A', '李雷': 'B'}
    assert read('person,group\nAnn,None\nBob,NA\nEve,\n').dropna().to_dict() == dict(Ann='None', Bob='NA')
    assert read('person,group\nAnn,\nAnn,A\n').to_dict() == dict(Ann='A')
    for text, kw, words in [('person,group\nAnn,A\nAnn,B\n', {}, 'more than one label for Ann'), ('person,group\n ,A\n', {}, '1 rows have no person'), ('person,groop\nAnn,A\n', {}, 'no column group'),
                            ('person,group\nAnn,A\nBob,F\n', dict(allowed=['A', 'B']), 'not allowed: F')]:
        with pytest.raises(ValueError, match=words): read(text, **kw)
    df = pd.DataFrame(dict(person=['a', 'b', 'c'], group=[1., np.nan, None]))
    assert read_labels(df, 'group').dropna().to_dict() == dict(a='1.0')
    assert read_labels(pd.DataFrame(dict(path=['x.jpg'], light=['dark'])), 'light', by='path').to_dict() == {'x.jpg': 'dark'}
    with pytest.raises(FileNotFoundError): read_labels(tmp_path/'absent.csv', 'group')


def test_people_without_a_label_stay():
    t = crowd(dict(A=12, B=12)).drop(columns=['left_group', 'right_group'])
    labels = pd.Series({f'A{i}': 'A' for i in range(12)} | {f'B{i}': None for i in range(6)})
    a = audit_groups(add_groups(t, labels), .5).set_index(['rate', 'group'])
    assert a.people['fnmr', '(no label)'] == 12 and '(no label)' not in set(compare_groups(add_groups(t, labels), .5)[['a', 'b']].values.ravel())
    with pytest.raises(ValueError, match='none of the 2 labels'): add_groups(t, pd.Series(['A', 'B'], ['Ann', 'Bob']))


def test_from_a_csv_to_a_verdict(tmp_path):
    t = crowd(dict(A=60, B=60), lean=dict(B=.6)).drop(columns=['left_group', 'right_group'])
    people = sorted(set(t.left_person) | set(t.right_person))
    rows = [f'{p},{"" if p in ("A3", "B7") else "group " + p[0]}' for p in people]
    (tmp_path/'said.csv').write_text('\n'.join(['person,said', *rows]))
    u = add_groups(t, read_labels(tmp_path/'said.csv', 'said', allowed=['group A', 'group B']))
    a, c = audit_groups(u, .5), compare_groups(u, .5)
    assert a.group.tolist() == ['group A', 'group B', '(no label)']*2 and a.people.tolist()[:3] == [59, 59, 2]
    assert len(c) == 1 and c.a[0] == 'group B' and c.verdict[0].startswith('different')


@pytest.mark.parametrize('change,words', [(lambda t: t.assign(score=np.nan), 'NaN'), (lambda t: t.assign(mated=~t.mated), 'disagree'), (lambda t: t.drop(columns='left_group'), 'no column left_group'),
                                          (lambda t: t.assign(left_person=None), 'no person'), (lambda t: t.assign(mated='yes'), 'True/False')])
def test_bad_pairs_are_refused(change, words):
    with pytest.raises(ValueError, match=words): audit_groups(change(crowd(dict(A=4))), .5)


def test_acquisition_is_counted_by_group():
    seen = pd.DataFrame(dict(path=[f'{k}.jpg' for k in range(120)], person=[f'p{k//4}' for k in range(120)], status='ok'))
    seen.loc[::10, 'status'] = 'no face'; seen.loc[5, 'status'] = 'bad image'
    labels = pd.Series({f'p{k}': 'A' if k < 15 else 'B' for k in range(29)})
    a = acquired_by_group(seen, labels).set_index('group')
    assert a.errors.to_dict() == {'A': 7, 'B': 6, '(no label)': 0} and a.photos.to_dict() == {'A': 60, 'B': 56, '(no label)': 4}
    assert a.status['(no label)'] == 'too few to say: 1 person, 10 wanted' and (a.rate == 'fta').all()


def test_pictures_show_every_group():
    import matplotlib.pyplot as plt
    t = crowd(dict(A=12, B=12, C=2))
    fig = plot_groups(audit_groups(t, .5, min_pairs=10))
    assert [len(ax.get_yticklabels()) for ax in fig.axes] == [3, 3] and [o.get_text() for o in fig.axes[0].texts] == ['too few to say']
    ax = plot_group_matrix(audit_groups(t, .5, across=True), 'fnmr')
    assert len(ax.texts) == 9
    plt.close('all')


def test_measures_of_photos(face):
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 256, (40, 40, 3)).astype(np.uint8)
    assert sharpness(noise) > sharpness(face) > sharpness(face.resize((20, 24)).resize(face.size))
    assert brightness(np.zeros((10, 10, 3), np.uint8)) == 0 and brightness(Image.new('RGB', (10, 10), 'white')) == 255
    t = thirds(pd.Series(rng.permutation(999), index=range(5, 1004)))
    assert t.value_counts().to_list() == [333]*3 and list(t.cat.categories) == ['low', 'middle', 'high'] and t.index[0] == 5
    assert thirds([1, 2, 3, 4], ('dim', 'lit')).tolist() == ['dim', 'dim', 'lit', 'lit']
    with pytest.raises(ValueError, match='1 different'): thirds([7, 7, 7, np.nan])


def test_quality_of_every_jpeg(tmp_path, face):
    for q in (1, 5, 20, 50, 75, 90, 100):
        for mode in ('RGB', 'L'):
            f = io.BytesIO(); face.convert(mode).save(f, 'JPEG', quality=q)
            assert jpeg_quality(f) == q
    f = io.BytesIO(); face.save(f, 'JPEG', qtables=[[7]*64, [9]*64])
    assert jpeg_quality(f) is None
    face.save(tmp_path/'a.png'); assert jpeg_quality(tmp_path/'a.png') is None


def test_photos_of_lfw_that_were_saved_again(lfw_home):
    t = lfw(people=['George_W_Bush', 'Ariel_Sharon'])
    q = pd.Series([jpeg_quality(p) for p in t.path])
    assert set(q.dropna()) <= {20, 90} and q.notna().all()


def test_nothing_here_guesses_who_people_are():
    assert not [n for n in fairness.__all__ if any(w in n.lower() for w in ('gender', 'sex', 'age_', 'race', 'ethnic', 'skin', 'predict', 'guess'))]
