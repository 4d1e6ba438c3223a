"System 4: miners against plain loops, a training that can be interrupted, a collapse that is caught, files that are refused"
import warnings

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from facelab.datasets import IdentityLeak
from facelab.embed import Embeddings, load_encoder, save_encoder
from facelab.losses import semi_hard
from facelab.models.triplet import (MINERS, StopOnCollapse, TripletLoss, TripletNet, batch_eer, collapsed, fit_triplet, gallery_sizes, hard_enough,
                                    hardest, library_semi_hard, pixel_distance, triplet_dls, triplet_encoder, triplet_learner, triplet_tower)
from facelab.protocols import find_encoder

torch.set_num_threads(1)


def distances(e): return [[float(((a - b)**2).sum()) for b in e] for a in e]


@pytest.mark.parametrize('seed', range(4))
def test_miners_by_loops(seed):
    g = torch.Generator().manual_seed(seed)
    e, y = torch.nn.functional.normalize(torch.randn(10, 3, generator=g)), torch.randint(0, 4, (10,), generator=g)
    d, n = distances(e), range(10)
    every = {(a, p, q) for a in n for p in n for q in n if a != p and y[a] == y[p] and y[a] != y[q]}
    got = lambda m: {tuple(o) for o in torch.stack(m(e, y, .2), 1).tolist()}
    assert got(hard_enough) == {(a, p, q) for a, p, q in every if d[a][p] - d[a][q] + .2 > 0}
    far = lambda a: max((p for p in n if p != a and y[p] == y[a]), key=lambda p: d[a][p])
    near = lambda a: min((q for q in n if y[q] != y[a]), key=lambda q: d[a][q])
    assert got(hardest) == {(a, far(a), near(a)) for a in {o[0] for o in every}}
    pytest.importorskip('pytorch_metric_learning')
    assert got(library_semi_hard) == got(semi_hard)


@pytest.mark.parametrize('mine', list(MINERS))
@pytest.mark.parametrize('people', [[0, 1, 2, 3], [0, 0, 0, 0], [0]])
def test_a_batch_without_triplets_costs_nothing(mine, people):
    e = torch.randn(len(people), 4, requires_grad=True)
    loss = TripletLoss(mine=mine)(e, torch.tensor(people)); loss.backward()
    assert loss.item() == 0 and (e.grad == 0).all()


def test_loss_is_alpha_on_one_point_and_every_triplet_counts_without_gradients():
    e, y = torch.ones(6, 3), torch.tensor([0, 0, 1, 1, 2, 2])
    for alpha in (.2, 1.): assert TripletLoss(alpha, 'hardest')(e, y).item() == pytest.approx(alpha)
    with torch.no_grad(): assert TripletLoss()(e, y).item() == pytest.approx(.2)


def test_library_that_is_absent(monkeypatch):
    import builtins
    real = builtins.__import__
    def gone(name, *a, **k):
        if name.startswith('pytorch_metric_learning'): raise ImportError(name)
        return real(name, *a, **k)
    monkeypatch.setattr(builtins, '__import__', gone)
    with pytest.raises(ImportError, match=r'facelab\[metric\]'): library_semi_hard(torch.randn(4, 2), torch.tensor([0, 0, 1, 1]))


def test_collapsed():
    rng = np.random.default_rng(0); v = rng.normal(size=(20, 16))
    assert not collapsed(v) and not collapsed(v[:1]) and not collapsed(v[:0])
    assert collapsed(v*0 + 1) and collapsed(v/1000 + 1) and collapsed(v*np.nan) and not collapsed(v*1e-3 + 0, least=1e-6)


def folder(tmp_path, people=6, photos=4, start=0):
    rng, rows = np.random.default_rng(start), []
    for p in range(start, start + people):
        base = rng.integers(0, 256, (6, 6, 3))
        for i in range(photos):
            path = tmp_path/f'p{p:02}'/f'{i}.png'; path.parent.mkdir(exist_ok=True, parents=True)
            Image.fromarray((base + rng.integers(-15, 16, base.shape)).clip(0, 255).astype(np.uint8)).resize((40, 40)).save(path)
            rows.append((str(path), f'p{p:02}'))
    return pd.DataFrame(rows, columns=['path', 'person'])


@pytest.fixture
def people(tmp_path): return folder(tmp_path), folder(tmp_path, 3, start=20)


def learner(dls, **kw):
    torch.manual_seed(0)
    return triplet_learner(dls, dim=8, width=4, **kw)


def test_interrupted_training_takes_the_same_path(people, tmp_path):
    from fastai.callback.core import Callback
    class Interrupt(Callback):
        def before_epoch(self):
            if self.epoch == 2: raise KeyboardInterrupt
    dls, file = triplet_dls(*people, size=32, bs=12), tmp_path/'run.safetensors'
    whole = learner(dls); log = fit_triplet(whole, 4)
    with pytest.raises(KeyboardInterrupt): fit_triplet(learner(dls), 4, checkpoint=file, cbs=[Interrupt()])
    for p in people[0].path[:10]: Image.new('RGB', (40, 40)).save(p)     # the folder changes, the photos in memory do not
    again = learner(dls); log2 = fit_triplet(again, 4, checkpoint=file)
    pd.testing.assert_frame_equal(log, log2)
    for a, b in zip(whole.model.parameters(), again.model.parameters()): assert torch.equal(a, b)
    changed = triplet_dls(*people, size=32, bs=12)
    with pytest.raises(ValueError, match='another training .*photos'): fit_triplet(learner(changed), 4, checkpoint=file)
    with pytest.raises(ValueError, match='another training .*lr 0.003 in the file, 0.1 here'): fit_triplet(learner(dls), 4, lr=.1, checkpoint=file)
    with pytest.raises(ValueError, match='another training .*width'): fit_triplet(triplet_learner(dls, dim=8, width=8), 4, checkpoint=file)
    foreign = save_encoder(triplet_encoder(again), tmp_path/'enc.safetensors', 'triplet', **again.model.build)
    with pytest.raises(ValueError, match='not a checkpoint of a triplet training'): fit_triplet(learner(dls), 4, checkpoint=foreign)
    assert not list(tmp_path.glob('.*'))


def test_collapse_is_stopped_and_nothing_is_lost(people):
    from fastai.callback.core import Callback
    class Blind(Callback):
        order = 55
        def after_pred(self):
            if self.epoch >= 2: self.learn.pred = self.pred*0 + 1
    learn = learner(triplet_dls(*people, size=32, bs=12))
    with pytest.warns(UserWarning, match='collapsed in epoch'): log = fit_triplet(learn, 9, cbs=[Blind()])
    assert 2 <= len(log) < 9 and 'good epoch' in log.attrs['stopped']
    assert all(torch.isfinite(p).all() for p in learn.model.parameters())
    assert not fit_triplet(learn, 1, lr=1e-4).attrs['stopped']


def test_bad_classes(people, tmp_path):
    train, valid = people
    with pytest.raises(ValueError, match='two people'): triplet_dls(train[train.person == 'p00'], valid, size=32)
    with pytest.raises(ValueError, match='everybody has one'): triplet_dls(train.groupby('person').head(1), valid, size=32)
    with pytest.raises(IdentityLeak): triplet_dls(train, train[train.person == 'p00'], size=32)
    with pytest.warns(UserWarning, match='1 people in training have one photo'): triplet_dls(train[3:], valid, size=32)
    bad = pd.concat([train, pd.DataFrame(dict(path=[str(tmp_path/'gone.png')], person=['p00']))])
    with pytest.warns(UserWarning, match='1 of 37 photos cannot be read'): dls = triplet_dls(bad, valid, size=32)
    assert len(dls.train.dataset) == 24 and (dls.report.status != 'ok').sum() == 1
    with pytest.raises(ValueError, match='empty'): triplet_dls(train[:0], valid[:0], size=32)


@pytest.mark.parametrize('mode', ['1', 'L', 'P', 'RGBA', 'CMYK', 'I', 'F'])
def test_pictures_of_any_mode_and_size(mode):
    from facelab.embed import Encoder
    enc = Encoder(triplet_tower(8, 4, 32), 'x', 32, 8, 'euclidean')
    try: v = enc.encode([Image.new('RGB', (57, 31), (90, 120, 30)).convert(mode)])
    except ValueError as e: assert mode in ('I', 'F') and str(e)
    else: assert np.linalg.norm(v) == pytest.approx(1, abs=1e-4)


def test_file_of_an_encoder(tmp_path):
    from facelab.embed import Encoder
    enc = Encoder(TripletNet(8, 4, 32), 'mine', 32, 8, 'euclidean', 'chip', threshold=.3)
    file = save_encoder(enc, tmp_path/'a.safetensors', 'triplet', **enc.module.build)
    got, face = find_encoder(str(file)), [Image.new('RGB', (32, 32), (200, 100, 50))]
    np.testing.assert_allclose(got.encode(face), enc.encode(face), atol=1e-5)
    assert (got.name, got.threshold, got.align) == ('mine', .3, 'chip')
    with pytest.raises(ValueError, match='another network'): load_encoder(save_encoder(enc, tmp_path/'b.safetensors', 'triplet', dim=8, width=8, size=32))
    with pytest.raises(ValueError, match='cannot be built'): load_encoder(save_encoder(enc, tmp_path/'c.safetensors', 'triplet', depth=3))


def test_small_measures():
    assert pixel_distance(Image.new('L', (9, 9), 0), Image.new('L', (50, 50), 255)) == 1
    assert batch_eer(torch.tensor([[0.], [10], [1], [11]]), torch.tensor([0, 0, 1, 1])) > .5
    rng = np.random.default_rng(1); names = np.repeat([f'p{i}' for i in range(8)], 6)
    v = rng.normal(size=(48, 5)).astype(np.float32)
    t = gallery_sizes(Embeddings(v, names, dict(metric='euclidean')), threshold=-1.)
    place = np.tile(np.arange(6), 8)
    for k in (1, 3, 5):
        let_in = right = 0
        for i in np.flatnonzero(place == 5):
            d = np.linalg.norm(v - v[i], axis=1); refs = place < k
            own, other = d[refs & (names == names[i])].min(), d[refs & (names != names[i])].min()
            right += own < other; let_in += other <= 2
        assert t.rank1[k] == right/8 and t.strangers_in[k] == let_in/8
