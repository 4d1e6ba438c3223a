"Protocols by brute force, every failure counted, and what bad lists of pairs do"
import json
import os
import subprocess
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from facelab.datasets import att_faces
from facelab.embed import Embeddings, Encoder, similarity
from facelab.protocols import (best_threshold, blufr, check_pairs, evaluate, find_protocol, gallery_eer, gallery_measures, judge_gallery, judge_pairs,
                               k_photos_each, lfw_view1, mistakes, nearest_references, one_photo_each, open_set_points, pair_measures,
                               pairs_file, people_folds, threshold_for_strangers)

rng = np.random.default_rng(0)


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv('FACELAB_CACHE', str(tmp_path_factory.getbasetemp()/'cache'))


@pytest.mark.parametrize('seed', range(20))
def test_best_threshold_is_best(seed):
    r = np.random.default_rng(seed)
    n = r.integers(2, 30)
    s, m = r.integers(0, 8, n)/8, np.r_[True, False, r.random(n - 2) < .5]
    right = lambda t: ((s >= t) == m).sum()
    assert right(best_threshold(s, m)) == max(right(t) for t in np.r_[np.unique(s), 2])


def some_pairs(n=400, people=40, folds=4):
    left, right = rng.integers(0, people, (2, n))
    right = np.where(np.arange(n) % 2, left, np.where(left == right, (left + 1) % people, right))
    return pd.DataFrame(dict(left=[f'{i}/a{k}' for k, i in enumerate(left)], right=[f'{i}/b{k}' for k, i in enumerate(right)], left_person=left.astype(str),
                             right_person=right.astype(str), mated=left == right, fold=np.arange(n) % folds + 1))


def test_no_fold_sees_itself():
    p = some_pairs()
    s = rng.normal(size=len(p)) + 2*p.mated
    before = judge_pairs(p, s)
    changed = s.copy(); changed[p.fold == 2] = rng.normal(size=(p.fold == 2).sum())
    after = judge_pairs(p, changed)
    cut = lambda t: t[t.fold == 2].threshold.unique()
    assert cut(before) == cut(after)
    assert (before[before.fold != 2].threshold.unique() != after[after.fold != 2].threshold.unique()).any()


def test_failures_are_errors_of_either_kind():
    p = some_pairs(); s = np.where(p.mated, 1., 0.); s[:10] = np.nan
    m = pair_measures(judge_pairs(p, s))
    assert m.value['accuracy'] == pytest.approx(1 - 10/len(p))
    assert m.value['fmr'] == m.value['fnmr'] == 0 and m.n['fmr'] + m.n['fnmr'] == len(p) - 10
    assert m.lo['accuracy'] < m.value['accuracy'] < m.hi['accuracy'] <= 1


def test_measures_equal_sklearn():
    from sklearn.metrics import f1_score, precision_score, recall_score, roc_auc_score
    p = some_pairs(); s = rng.normal(size=len(p)) + 1.5*p.mated
    t = judge_pairs(p, s, threshold=.7); m = pair_measures(t).value
    for name, f in dict(precision=precision_score, recall=recall_score, f1=f1_score).items(): assert m[name] == pytest.approx(f(p.mated, s >= .7))
    assert m['auc'] == pytest.approx(roc_auc_score(p.mated, s))


def line(n=12, k=4, d=3):
    names = np.repeat([f'p{i:02}' for i in range(n)], k)
    v = rng.normal(size=(n, d)).repeat(k, 0) + .4*rng.normal(size=(n*k, d))
    paths = [f'{a}/{i}' for i, a in enumerate(names)]
    return Embeddings(v, list(names), dict(metric='euclidean'), paths), pd.DataFrame(dict(path=paths, person=names))


def test_gallery_against_double_loops():
    emb, df = line(); p = one_photo_each(df, folds=3)
    near = nearest_references(emb, p.table)
    t = judge_gallery(near, fpir=.1); m = gallery_measures(t).value
    refs = p.table[p.table.role == 'reference'].index
    s = similarity(emb.vectors, emb.vectors, 'euclidean')
    cut, first, named, let_in = t.groupby('fold').threshold.first(), 0, 0, 0
    probes = p.table[p.table.role == 'probe']
    for i, r in probes.iterrows():
        own, other = max(s[i, j] for j in refs if df.person[j] == r.person), max(s[i, j] for j in refs if df.person[j] != r.person)
        first += own > other; named += own > other and own >= cut[r.fold]; let_in += other >= cut[r.fold]
    assert (m['rank1'], m['tpir'], m['fpir']) == pytest.approx((first/len(probes), named/len(probes), let_in/len(probes)))
    for f in cut.index: assert cut[f] == threshold_for_strangers(near.other[near.fold != f], .1)
    c = open_set_points(t)
    for r in c.sample(8, random_state=0).itertuples():
        new, known = t[t.asked == 'stranger'], t[t.asked == 'known']
        assert (r.fpir, r.fnir) == pytest.approx(((new.score >= r.threshold).mean(), 1 - (known['first'] & (known.own >= r.threshold)).mean()))


def test_gallery_eer_is_that_of_the_pairs():
    from facelab.metrics import eer
    emb, df = line(); p = one_photo_each(df, folds=3)
    s = similarity(emb.vectors, emb.vectors, 'euclidean'); ref = set(p.table.index[p.table.role == 'reference'])
    pairs = [(s[i, j], df.person[i] == df.person[j]) for i in range(len(df)) if i not in ref for j in ref]
    e = gallery_eer(emb, p.table).loc['eer']
    assert e.value == pytest.approx(eer(*zip(*pairs))) and e.n == len(pairs) and e.lo <= e.value <= e.hi
    only = p.table[(p.table.person == 'p00')]
    assert not len(gallery_eer(emb, only))


def test_ties_are_not_first():
    emb = Embeddings([[1.], [-1], [0]], ['a', 'b', 'a'], dict(metric='euclidean'), ['a0', 'b0', 'a1'])
    t = pd.DataFrame(dict(path=['a0', 'b0', 'a1'], person=['a', 'b', 'a'], role=['reference', 'reference', 'probe'], fold=1))
    assert not judge_gallery(nearest_references(emb, t), threshold=-9)['first'].any()


def test_lost_references_and_probes_count():
    emb, df = line(); p = one_photo_each(df, folds=3)
    keep = np.flatnonzero([o not in (df.path[0], df.path[5]) for o in emb.paths])
    t = judge_gallery(nearest_references(emb[keep], p.table), fpir=.1)
    assert len(t) == 2*36
    assert not t[(t.person == 'p00') & (t.asked == 'known')].right.any()
    assert not t[(t.path == df.path[5]) & (t.asked == 'known')].right.item() and t[(t.path == df.path[5]) & (t.asked == 'stranger')].right.item()
    with pytest.raises(ValueError, match='no reference photo'): nearest_references(emb[[1]], p.table)


def test_folds_are_by_person_and_stable():
    df = att_faces()
    a, b = (k_photos_each(o, 2) for o in (df, df.sample(frac=1, random_state=1)))
    fold = lambda p: p.table.drop_duplicates('person').set_index('person').fold.sort_index()
    assert fold(a).equals(fold(b)) and (a.table.groupby('person').fold.nunique() == 1).all()
    with pytest.raises(ValueError, match='10 people at least'): people_folds(['a', 'b'])


@pytest.mark.parametrize('change, match', [
    (dict(mated=['maybe']*4), 'maybe'), (dict(mated=[1, 1, 1, 1]), 'disagree'), (dict(left_person=['b', 'a', 'a', 'a']), 'disagree')])
def test_bad_lists(change, match):
    good = pd.DataFrame(dict(left=list('acac'), right=list('bdda'), left_person=list('aaaa'), right_person=list('abab'), mated=[1, 0, 1, 0]))
    assert len(check_pairs(good)) == 4
    with pytest.raises(ValueError, match=match): check_pairs(good.assign(**change))


def test_people_with_numbers_for_names(tmp_path):
    (tmp_path/'p.csv').write_text('left,right,left_person,right_person,mated\n1/a.png,1/b.png,01,01,True\n1/a.png,2/a.png,01,1,False\n')
    with warnings.catch_warnings(): warnings.simplefilter('ignore'); p = pairs_file(tmp_path/'p.csv')
    assert p.table.left_person.tolist() == ['01', '01'] and len(p.missing) == 3


def test_missing_pairs_columns_and_files(tmp_path):
    for text, match in (('', 'not a readable'), ('left,right\na,b\n', 'missing: mated'), ('left,right,mated\na/1,,1\n', 'lack')):
        (tmp_path/'p.csv').write_text(text)
        with pytest.raises(ValueError, match=match): pairs_file(tmp_path/'p.csv')
    with pytest.raises(ValueError, match='no protocol'): find_protocol(tmp_path/'nothing')


def test_strangers_must_resolve_the_rate():
    with pytest.raises(ValueError, match='bring 1000 at least'): threshold_for_strangers(np.arange(10.), .001)
    s = np.array([.1, .5, .5, .9])
    for f in (.25, .5, .75): assert (s >= threshold_for_strangers(s, f)).mean() <= f


class Tiny(torch.nn.Module):
    "Sixteen by sixteen grey pixels, mean removed"
    def forward(self, x):
        x = torch.nn.functional.adaptive_avg_pool2d(x.mean(1, keepdim=True), 16).flatten(1)
        return x - x.mean(1, keepdim=True)


def tiny(): return Encoder(Tiny(), 'tiny', 64, 256)


def test_whole_way(quick):
    t = evaluate(tiny(), k_photos_each(att_faces()[:120], 2, folds=3, fpir=.05), detector='quick', progress=False)
    assert len(t.report) == 120 and t['fta'] == (t.report.status != 'ok').mean()
    assert set(t.json()) >= {'encoder', 'protocol', 'pairs', 'accuracy', 'se', 'lo', 'hi', 'threshold', 'fta', 'seconds', 'rank1', 'fpir'}
    json.dumps(t.json())
    w = mistakes(t, 5)
    assert len(w) == 5 and all(os.path.exists(o) for o in [*w.left, *w.right])
    assert (w.left_person != w.right_person).equals(w.kind != 'missed')


def test_mistakes_of_pairs_name_both_photos():
    p = some_pairs(40)
    trials = judge_pairs(p, np.random.default_rng(0).random(40), .5)
    w = mistakes(SimpleNamespace(trials=trials, protocol=SimpleNamespace(task='pairs', table=p)), 5)
    assert len(w) == 5 and set(w.right) <= set(p.right) and set(w.kind) <= {'missed', 'false match'}
    asked = p.set_index(['left', 'right']).mated
    assert all(asked[l, r] == (k == 'missed') for l, r, k in zip(w.left, w.right, w.kind))


def test_blufr_on_a_list_of_its_form(tmp_path, monkeypatch, quick):
    from scipy.io import savemat
    df = att_faces(); home = tmp_path/'lfw_home'/'lfw'; names = []
    for i, r in enumerate(df.itertuples()):
        d = home/r.person; d.mkdir(parents=True, exist_ok=True)
        names.append(f'{r.person}_{i % 10 + 1:04}.jpg'); Image.open(r.path).resize((184, 224)).save(d/names[-1], quality=95)
    monkeypatch.setenv('FACELAB_DATA', str(tmp_path))
    column = lambda *rows: np.array([None, *[np.array(o)[:, None] + 1 for o in rows]], dtype=object)[1:, None]
    gal = [np.arange(0, 200, 10), np.arange(200, 400, 10)]
    prob = [np.setdiff1d(np.arange(400), g) for g in gal]
    savemat(tmp_path/'lfw_home'/'blufr_lfw_config.mat', dict(imageList=np.array(names, dtype=object)[:, None], testIndex=column(np.arange(400), np.arange(400)), galIndex=column(*gal), probIndex=column(*prob)))
    p = blufr(); assert len(p.table) == 400 and (p.table.trial1 == 'reference').sum() == 20
    r = evaluate(tiny(), p, detector='quick', progress=False)
    assert (r.trials.pairs <= 400*399//2).all() and 0 < r['tpir'] < 1 and 0 < r['accuracy'] < 1
    (home/df.person[0]/names[0]).unlink()
    with pytest.raises(FileNotFoundError, match='1 are not there'): blufr()


def test_blufr_rate_against_everything():
    from facelab.protocols import _trial
    emb, df = line(30, 4); roles = np.full(120, 'probe', dtype=object); roles[::8] = 'reference'
    r = _trial(emb, df, roles, 'euclidean', fpir=.1)
    s = similarity(emb.vectors, emb.vectors, 'euclidean'); i, j = np.triu_indices(120, 1); m = df.person.to_numpy()[i] == df.person.to_numpy()[j]
    no = np.sort(s[i, j][~m])[::-1]; k = int(.001*len(no)) or 1
    assert r['vr'] == pytest.approx((s[i, j][m] > no[k]).mean()) and r['pairs'] == len(i)


def test_lfw_views_share_nobody_within(lfw_home):
    t = lfw_view1().table
    assert not {*t[t.fold == 0].left_person} & {*t[t.fold == 1].left_person}


def test_command_line(tmp_path):
    script = Path(sys.executable).parent/'facelab-evaluate'
    if not script.exists(): pytest.skip('facelab is not installed with its commands')
    r = subprocess.run([script, '--protocol', 'nowhere'], capture_output=True, text=True)
    assert r.returncode == 2 and 'no protocol, file or folder' in r.stderr and 'Traceback' not in r.stderr


@pytest.mark.parametrize('where', ['csv', 'figures'])
def test_a_place_that_cannot_be_written_is_said_before_the_measuring(where, tmp_path, monkeypatch, capsys):
    import facelab.protocols as protocols
    monkeypatch.setattr(protocols, 'evaluate', lambda *a, **k: pytest.fail('measured first'))
    (tmp_path/'csv').mkdir(); (tmp_path/'figures').write_text('x')
    with pytest.raises(SystemExit) as end: protocols.facelab_evaluate(**{where: str(tmp_path/where)})
    assert end.value.code == 2 and 'give the name of a' in capsys.readouterr().err
