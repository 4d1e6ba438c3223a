"facelab.allpairs against the list of all pairs: same counts, same thresholds, same intervals, whatever the blocks, with ties and bad input"
import json, os, subprocess, sys, tracemalloc
from pathlib import Path
import numpy as np, pytest
from facelab import metrics
from facelab.allpairs import score_all_pairs, group_rows, own_scores, stranger_scores
from facelab.embed import similarity
from facelab.intervals import intervals


def random_faces(seed, n=60, people=12, d=3, digits=0):
    "Vectors near a centre per person; with few digits most scores tie. Some people have one photo"
    rng = np.random.default_rng(seed)
    names = np.array([f'p{i:02}' for i in rng.integers(0, people, n - 2)] + ['alone', 'p00'])
    centre = {p: rng.normal(size=d)*2 for p in set(names)}
    return np.float32([centre[p] + rng.normal(size=d) for p in names]).round(digits) + np.float32(.5), names


def listed(v, names, metric): return metrics.score_pairs(similarity(v, v, metric), names)


def thresholds(t, rng):
    "Observed scores, their neighbours, points between, and beyond both ends"
    s = rng.choice(t.score, 40)
    return [*s.astype(float), *np.nextafter(s, np.float32(9)).astype(float), *(s.astype(float) + 1e-12), *rng.uniform(t.score.min() - 1, 1.5, 40), -99, 99, -np.inf, np.inf]


CASES = [(seed, metric, digits, keep, block) for seed, (metric, digits, keep, block) in enumerate([
    ('euclidean', 0, 5, 100), ('euclidean', 0, 1, 1), ('euclidean', 3, 10, 700), ('euclidean', 5, 10_000, 1 << 21),
    ('cosine', 0, 5, 100), ('cosine', 3, 30, 500), ('cosine', 5, 1, 61), ('euclidean', 0, 10_000, 121)])]


@pytest.mark.filterwarnings('ignore:AUC')
@pytest.mark.parametrize('seed, metric, digits, keep, block', CASES)
def test_counts_are_those_of_the_list(seed, metric, digits, keep, block):
    v, names = random_faces(seed, digits=digits)
    t, c, rng = listed(v, names, metric), score_all_pairs(v, names, metric, keep, block), np.random.default_rng(seed)
    no, yes = t.score[~t.mated].to_numpy().astype(float), t.score[t.mated].to_numpy().astype(float)
    assert (c.mated, c.nonmated, c.lowest) == (len(yes), len(no), no.min())
    ask = thresholds(t, rng)
    np.testing.assert_array_equal(c.false_matches(ask), [(no >= x).sum() for x in ask])
    for x in ask: assert (c.fmr(x), c.fnmr(x)) == ((no >= x).mean(), (yes < x).mean())
    assert (c.auc(), c.eer()) == pytest.approx((metrics.auc(t.score, t.mated), metrics.eer(t.score, t.mated)), abs=1e-12)
    full, corners = metrics.roc(t.score, t.mated), c.roc()
    for r in corners.itertuples():
        assert (r.fmr, r.tmr) == pytest.approx(((no >= r.threshold).mean(), (yes >= r.threshold).mean()), abs=1e-12)
    np.testing.assert_allclose(np.interp(full.fmr + 1e-9*np.arange(len(full)), *_rising(corners)), full.tmr, atol=1e-4)
    assert np.isfinite(c.det_curve()[['fmr_dev', 'fnmr_dev']]).all(None)


def _rising(r): return r.fmr + 1e-9*np.arange(len(r)), r.tmr


@pytest.mark.parametrize('seed, metric, digits, keep, block', CASES)
def test_threshold_is_the_one_of_the_list(seed, metric, digits, keep, block):
    v, names = random_faces(seed, digits=digits)
    t, c = listed(v, names, metric), score_all_pairs(v, names, metric, keep, block)
    n = c.nonmated
    for k in {1, 2, 3, keep - 1, keep, keep + 1, n//100, n//10, n//2, n - 2, n - 1, n}:
        if 1 <= k <= n:
            want = metrics.threshold_at_fmr(t.score, t.mated, k/n)
            assert c.threshold_at_fmr(k/n) == want, (k, n)
            assert c.fmr(want) <= k/n and c.fnmr_at_fmr(k/n) == metrics.fnmr(t.score, t.mated, want)
    for bad, words in ((.5/n, f'{n} non-mated pairs cannot show'), (0, 'a share above 0'), (np.nan, 'a share above 0')):
        with pytest.raises(ValueError, match=words): c.threshold_at_fmr(bad)


@pytest.mark.parametrize('seed, metric, digits, keep, block', CASES)
def test_people_and_intervals(seed, metric, digits, keep, block):
    v, names = random_faces(seed, digits=digits)
    t, c = listed(v, names, metric), score_all_pairs(v, names, metric, keep, block)
    for x in np.quantile(t.score, [.3, .9, .99]):
        wrong = t[~t.mated & (t.score.astype(float) >= x)]
        f, p = c.false_people(x), c.by_person(x)
        assert f.false.sum() == len(wrong) and (f.false <= f.pairs).all() and f.false.is_monotonic_decreasing
        count = lambda a, b: ((wrong.left_person == a) & (wrong.right_person == b) | (wrong.left_person == b) & (wrong.right_person == a)).sum()
        for r in f.head(5).itertuples(): assert r.false == count(r.left_person, r.right_person)
        for name, r in p.iterrows():
            k = (names == name).sum()
            assert tuple(r[:2]) == (k, k*(k - 1)//2) and r.nonmated == k*(len(names) - k)
            assert r.missed == (t.mated & (t.left_person == name) & (t.score.astype(float) < x)).sum()
            assert r.false == ((wrong.left_person == name) | (wrong.right_person == name)).sum()
        want = intervals(t.score, t.mated, t.left_person, t.right_person, x)
        np.testing.assert_allclose(c.intervals(x).to_numpy(float), want.to_numpy(float), rtol=1e-9)


def test_worst_pairs_carry_the_rows_of_the_caller():
    v, names = random_faces(3, digits=5)
    c, s = score_all_pairs(v, names, 'euclidean', keep=20), similarity(v, v, 'euclidean')
    w = c.worst(8)
    assert len(w) == 16 and (w.left < w.right).all()
    for r in w.itertuples():
        assert r.score == s[r.left, r.right] and (names[r.left], names[r.right]) == (r.left_person, r.right_person) and (r.left_person == r.right_person) == r.mated
    t = listed(v, names, 'euclidean')
    assert w.score.tolist() == [*t.score[~t.mated].nlargest(8), *t.score[t.mated].nsmallest(8)]
    assert len(c.worst(10**6)) == 20 + c.mated


def test_every_pair_once():
    names = np.array(list('cabbcaad'))
    order, who, end = group_rows(names)
    assert names[order].tolist() == list('ccaaabbd') and end.tolist() == [2, 2, 5, 5, 5, 7, 7, 8] and who.tolist() == [0, 0, 1, 1, 1, 2, 2, 3]
    v = np.random.default_rng(0).normal(size=(8, 4)).astype(np.float32)
    s, i, j = own_scores(v, end, 'cosine')
    assert [(a, b) for a, b in zip(i, j)] == [(0, 1), (2, 3), (2, 4), (3, 4), (5, 6)]
    for block in (1, 8, 17, 24, 1000):
        pairs = [(a + x, first + y) for a, first, b in stranger_scores(v, end, 'cosine', block) for x, y in np.argwhere(b > -np.inf)]
        assert len(pairs) == len(set(pairs)) == 28 - 5 and all(who[x] < who[y] for x, y in pairs)


def test_one_vector_for_everybody():
    c = score_all_pairs(np.ones((30, 4)), [f'p{i//3}' for i in range(30)], 'cosine', keep=5)
    assert (c.auc(), c.eer(), c.fmr(1 - 1e-6), c.fmr(1.1)) == (.5, .5, 1, 0)
    assert c.threshold_at_fmr(.5) > 1 and c.fmr(c.threshold_at_fmr(.5)) == 0 and c.threshold_at_fmr(1) == pytest.approx(1)
    assert c.intervals(.5).loc['fmr', 'rate'] == 1 and c.intervals(1.1).loc['fmr', 'errors'] == 0


def test_nonsense_is_refused():
    v = np.eye(4, dtype=np.float32)
    for vectors, names, words in ((v, list('abc'), '3 names but vectors'), (v[0], list('abcd'), '4 names'), (v, list('aaaa'), 'all 4 photos show one person'), (v[:1], ['a'], 'all 1 photos'),
                                  (v[:0], [], 'all 0 photos'), (v*np.nan, list('aabb'), '4 of 4 vectors hold NaN'), (np.where(v > 0, np.inf, 0), list('aabb'), 'infinite'), (v, ['a', None, 'b', 'c'], '1 of 4 photos have no name')):
        with pytest.raises(ValueError, match=words): score_all_pairs(vectors, names, 'euclidean')
    with pytest.raises(ValueError, match='metric'): score_all_pairs(v, list('aabb'), 'manhattan')
    with pytest.raises(ValueError, match='keep'): score_all_pairs(v, list('aabb'), 'cosine', keep=0)
    c = score_all_pairs(v, list('aabb'), 'euclidean')
    for f in c.fmr, c.fnmr, c.false_people:
        with pytest.raises(ValueError, match='threshold is NaN'): f(np.nan)
    with pytest.raises(ValueError, match='four people'): c.intervals(.5)


def test_nobody_has_two_photos():
    c = score_all_pairs(np.random.default_rng(0).normal(size=(6, 3)), list('abcdef'), 'euclidean')
    assert (c.mated, c.nonmated) == (0, 15) and 0 < c.fmr(-1) <= 1
    assert c.threshold_at_fmr(1/15) == np.sort(c.top[0])[-1]
    for f in (lambda: c.fnmr(0), c.roc, c.auc, c.eer, c.det_curve, lambda: c.intervals(0)):
        with pytest.raises(ValueError, match='no mated pairs'): f()


def test_memory_does_not_grow_with_the_pairs():
    def peak(n):
        v = np.random.default_rng(0).normal(size=(n, 16)).astype(np.float32)
        tracemalloc.start()
        score_all_pairs(v, np.arange(n)//2, 'euclidean', block=1 << 16)
        top = tracemalloc.get_traced_memory()[1]; tracemalloc.stop()
        return top
    small, large = peak(700), peak(2800)
    assert large < 4*small and large < 2800*2799/2*4, 'sixteen times the pairs, and less than their scores would take'


@pytest.mark.skipif(os.name != 'posix', reason='the benchmark measures memory on Linux and macOS')
def test_bench_metrics(tmp_path):
    env = os.environ | dict(FACELAB_DATA=str(tmp_path))
    r = subprocess.run([sys.executable, '-W', 'ignore', '-m', 'bench.metrics', '--scores', '20000', '--photos', '300', '--repeats', '1', '--json', str(tmp_path/'r.json')], cwd=Path(__file__).resolve().parent.parent, env=env, capture_output=True, text=True, timeout=120)
    assert r.returncode == 0, r.stderr[-2000:]
    done = json.loads((tmp_path/'r.json').read_text())
    assert r.stdout.splitlines()[-1].startswith('ratio: ') and all(done['equal'].values()) and done['pairs']['mated'] + done['pairs']['nonmated'] == 300*299//2 and done['pairs']['fmr'] > 0
