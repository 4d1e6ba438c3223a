"""ROC curves of ten million scores, and all pairs of 13,233 photos.

    python -m bench.metrics [--scores N] [--photos N] [--repeats N] [--json FILE]

`facelab.metrics.roc` and `sklearn.metrics.roc_curve` get the same arrays and take turns; one mated pair in twenty. Three kinds
of scores: float64 that nearly never tie, the same as float32, and float64 rounded to four digits, where nearly all tie. With
`drop_intermediate=False` scikit-learn's curve has a row for every distinct score, as facelab's always has, and the two have to be
equal to the last bit. Its default, which drops rows on straight lines, is timed too. What each needs at most on top of the arrays
is measured in a process of its own, with the worst case, float64 without ties.
Then all pairs: vectors of LFW if there is LFW (dlib's network; measured first if not in the cache, which takes minutes), else random
vectors of that shape. From vectors to exact FMR, FNMR, EER and the threshold at FMR 1e-6 (or the least that the photos can show).

    ratio    the smallest of the three: scikit-learn's time over facelab's   (wanted: >= 5, at less than 1,000 MB)
"""
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from . import numbers, parser, report, turns

KINDS = {'float64': lambda s: s, 'float32': lambda s: s.astype(np.float32), 'float64, ties': lambda s: s.round(4)}


def some_scores(n):
    "Bell-shaped heaps, one mated pair in twenty"
    rng = np.random.default_rng(42)
    mated = rng.random(n) < .05
    return rng.normal(size=n)*.1 + .3*mated, mated


def some_vectors():
    "Vectors and names of LFW, or random ones of its shape, and what they are"
    from facelab.datasets import data_root, lfw
    if (data_root()/'lfw_home').is_dir():
        from facelab.folder import embed_cached
        emb = embed_cached(lfw())
        return emb.vectors, np.array(emb.names), 'LFW, dlib'
    rng = np.random.default_rng(42)
    people = rng.zipf(2.3, 6000).clip(max=530)
    who = np.repeat(np.arange(6000), people)[:13_233]
    who = np.append(who, np.arange(6000, 6000 + 13_233 - len(who)))
    v = rng.normal(size=(who.max() + 1, 128))[who] + .7*rng.normal(size=(len(who), 128))
    return np.float32(v/np.linalg.norm(v, axis=1, keepdims=True)), who, 'random vectors'


def equal(scores, mated):
    "Is facelab's curve scikit-learn's, to the last bit?"
    from sklearn.metrics import roc_curve
    from facelab.metrics import roc
    r = roc(scores, mated)
    return all(np.array_equal(a, b.astype(float)) for a, b in zip((r.fmr, r.tmr, r.threshold), roc_curve(mated, scores, drop_intermediate=False)))


def peak():
    "The most memory this process has held, MB (Linux counts a parent's into getrusage, so its own file is read)"
    status = Path('/proc/self/status')
    if status.exists(): return int(status.read_text().split('VmHWM:')[1].split()[0])/1e3
    import resource
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss/1e6


def job(what, a, b):
    "The call whose memory counts, with its imports done"
    if what == 'scikit-learn':
        from sklearn.metrics import roc_curve
        return lambda: roc_curve(b, a, drop_intermediate=False)
    if what != 'pairs':
        from facelab import metrics
        return lambda: getattr(metrics, what.split()[-1])(a, b)
    from facelab.allpairs import score_all_pairs

    def pairs():
        c = score_all_pairs(a, b, 'euclidean')
        t = c.threshold_at_fmr(max(1e-6, 1/c.nonmated))
        return dict(mated=c.mated, nonmated=c.nonmated, eer=c.eer(), fmr=c.fmr(t), fnmr=c.fnmr(t))
    return pairs


def child(what, where):
    "In a process of its own: seconds, and how much higher the peak of memory is after than before"
    a, b = (np.load(where/f'{k}.npy') for k in (('vectors', 'names') if what == 'pairs' else ('scores', 'mated')))
    f = job(what, a, b)
    before, start = peak(), time.perf_counter()
    out = f()
    print(json.dumps(dict(seconds=time.perf_counter() - start, megabytes=peak() - before) | (out if what == 'pairs' else {})))


def alone(what, where):
    "What `child` measured"
    done = subprocess.run([sys.executable, '-W', 'ignore', '-m', 'bench.metrics', '--child', what, '--where', str(where)], check=True, capture_output=True, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def main(argv=None):
    p = parser(__doc__, 3)
    p.add_argument('--scores', type=int, default=10**7, help='how many scores')
    p.add_argument('--photos', type=int, default=13_233, help='how many photos for all pairs')
    p.add_argument('--child', help='for the benchmark itself'); p.add_argument('--where', help='for the benchmark itself')
    a = p.parse_args(argv)
    if a.child: return child(a.child, Path(a.where))
    from sklearn.metrics import roc_auc_score, roc_curve
    from facelab.metrics import auc, roc, threshold_at_fmr
    base, m = some_scores(a.scores)
    runs, ratios, same = {}, {}, {}
    for kind, make in KINDS.items():
        s = make(base)
        same[kind] = equal(s, m)
        ways = {f'scikit-learn, {kind}': lambda: roc_curve(m, s, drop_intermediate=False), f'facelab, {kind}': lambda: roc(s, m)}
        if kind == 'float32':
            ways |= {'scikit-learn, its default': lambda: roc_curve(m, s), 'scikit-learn, AUC': lambda: roc_auc_score(m, s), 'facelab, AUC': lambda: auc(s, m), 'facelab, threshold at FMR .0001': lambda: threshold_at_fmr(s, m, 1e-4)}
        runs |= turns(ways, a.repeats, 1)
        ms = numbers(runs)
        ratios[kind] = ms[f'scikit-learn, {kind}']/ms[f'facelab, {kind}']
    ratios |= {'float32, against its default': ms['scikit-learn, its default']/ms['facelab, float32'], 'AUC': ms['scikit-learn, AUC']/ms['facelab, AUC']}
    with tempfile.TemporaryDirectory() as d:
        d = Path(d)
        vectors, names, source = some_vectors()
        vectors, names = vectors[:a.photos], names[:a.photos]
        for k, v in dict(scores=base, mated=m, vectors=vectors, names=names).items(): np.save(d/f'{k}.npy', v)
        memory = {k: alone(k, d)['megabytes'] for k in ('scikit-learn', 'facelab, roc', 'facelab, eer')} if os.name == 'posix' else {}
        pairs = alone('pairs', d) if os.name == 'posix' else {}
    headline = f'{a.scores:,} scores, {a.repeats} turns, curves equal to the last bit: ' + ', '.join(f'{k} {v}' for k, v in same.items())
    if memory: headline += '\nat most on top of the arrays, float64 without ties: ' + ', '.join(f'{k} {v:.0f} MB' for k, v in memory.items())
    if pairs: headline += (f'\nall pairs of {len(names):,} photos ({source}): {pairs["mated"] + pairs["nonmated"]:,} pairs in {pairs["seconds"]:.1f} s at {pairs["megabytes"]:.0f} MB; '
                           f'EER {pairs["eer"]:.4f}, FNMR {pairs["fnmr"]:.4f} at FMR {pairs["fmr"]:.2g}')
    report(a, runs, min(ratios[k] for k in KINDS), headline, ratios, megabytes=memory, pairs=pairs | dict(source=source, photos=len(names)), equal=same)


if __name__ == '__main__': main()
