"Twins against hand-made distances, checkpoints to the last bit, and what is refused"
import shutil

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from torch import nn

from facelab.averaging import Averaged
from facelab.datasets import att_faces
from facelab.detect import detect
from facelab.embed import Encoder, load_encoder, save_encoder, similarity
from facelab.models.contrastive import (ContrastiveLoss, CoupledAdam, TwinSet, Twins, by_acquaintance, contrastive_encoder, contrastive_learner, contrastive_tower,
                                        fit_twins, seen_and_new, train_published, twin_dls)
from facelab.pairs import make_pairs


def body(): return nn.Sequential(nn.Conv2d(3, 4, 3, 2, 1, bias=False), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU())


@pytest.fixture(scope='module')
def pairs():
    t = att_faces()
    return [make_pairs(t[t.person.isin(names)], n, positives='photos') for names, n in (({'s01', 's02', 's03', 's04'}, 40), ({'s05', 's06'}, 16))]


@pytest.fixture(scope='module')
def dls(pairs): return twin_dls(*pairs, size=16, bs=16)


def twins(dls, seed=0):
    torch.manual_seed(seed)
    return contrastive_learner(dls, body=body(), dim=8, bf16=False)


def test_distances_by_loop():
    torch.manual_seed(1); t = Twins(body(), 8).eval(); a, b = torch.randn(2, 5, 3, 16, 16)
    d = t(a, b)
    for i in range(5): assert d[i].item() == pytest.approx(float(np.linalg.norm((t.embed(a[i:i + 1]) - t.embed(b[i:i + 1])).detach().numpy())), abs=1e-5)
    assert torch.allclose(d, t(b, a)) and torch.isfinite(torch.autograd.grad(t(a, a).sum(), t.body[0].weight)[0]).all()


def test_batches_hold_the_photos_of_the_pairs(pairs, dls):
    row = pairs[0].iloc[3]; left, right, same = dls.loaders[0].dataset[3]
    want = np.asarray(Image.open(row.left).convert('RGB').resize((16, 16), Image.Resampling.LANCZOS))
    assert np.abs(left.movedim(0, -1).numpy().astype(int) - want).max() <= 1 and bool(same) == row.mated
    assert sum(len(y) for *_, y in dls.loaders[1]) == 16 and sum(len(y) for *_, y in dls.loaders[0]) == 40


def test_weight_decay_is_coupled():
    for wd in (0., .3):
        ours, theirs = (nn.Parameter(torch.tensor([1., -2, 3])) for _ in range(2))
        a, b = CoupledAdam([ours], lr=.01), torch.optim.Adam([theirs], lr=.01, weight_decay=wd); a.set_hyper('wd', wd)
        for _ in range(5):
            for p, o in ((ours, a), (theirs, b)): o.zero_grad(); (p - 1).square().sum().backward(); o.step()
        assert torch.equal(ours.data, theirs.data)


def test_loss_falls_and_a_run_can_be_interrupted_anywhere(dls, tmp_path):
    a = twins(dls); whole = fit_twins(a, 4, 1e-3)
    assert whole.train_loss.iloc[-1] < whole.train_loss.iloc[0]
    fit_twins(twins(dls), 1, 1e-3, folder=tmp_path)
    for n in (3, 4): b = twins(dls, seed=n); fit_twins(b, n, 1e-3, folder=tmp_path)
    for p, q in zip(a.model.state_dict().values(), b.model.state_dict().values()): assert torch.equal(p, q)
    assert len(fit_twins(b, 2, 1e-3, folder=tmp_path)) == 4


def test_other_trainings_are_refused_and_nothing_is_lost(dls, pairs, tmp_path):
    fit_twins(twins(dls), 1, folder=tmp_path); before = (tmp_path/'state.safetensors').read_bytes()
    with pytest.raises(ValueError, match='another training.*lr'): fit_twins(twins(dls), 2, 1e-2, folder=tmp_path)
    with pytest.raises(ValueError, match='photos'): fit_twins(twins(twin_dls(pairs[0], pairs[1], 20, 16)), 2, folder=tmp_path)
    other = contrastive_learner(dls, body=nn.Sequential(nn.Conv2d(3, 8, 3, 2), nn.ReLU(), nn.ReLU()), dim=8, bf16=False)
    with pytest.raises(ValueError, match='another network'): fit_twins(other, 2, folder=tmp_path)
    assert (tmp_path/'state.safetensors').read_bytes() == before and len(list(tmp_path.iterdir())) == 1


def test_a_folder_that_changes_between_two_runs(pairs, tmp_path):
    names = {p: tmp_path/f'{i}.png' for i, p in enumerate(sorted({*pairs[0].left, *pairs[0].right, *pairs[1].left, *pairs[1].right}))}
    for p, q in names.items(): Image.open(p).save(q)
    mine = [t.assign(left=t.left.map(names), right=t.right.map(names)) for t in pairs]
    kw = dict(epochs=1, bs=16, size=16, body=body(), dim=8, bf16=False)
    train_published(tmp_path/'run', *mine, **kw)
    first = names[pairs[0].left[0]]
    shutil.copy(names[pairs[1].left[0]], first)
    with pytest.raises(ValueError, match='photos'): train_published(tmp_path/'run', *mine, **kw | dict(epochs=2, body=body()))
    first.write_bytes(b'changed')
    with pytest.raises(ValueError, match=f'{first.name} .not an image.'): train_published(tmp_path/'run', *mine, **kw)
    assert len(list((tmp_path/'run').iterdir())) == 1


def test_pairs_that_cannot_be_learned_from(pairs):
    t, v = pairs
    for bad, words in ((t[:0], 'empty'), (t[t.mated], 'one person alone'), (t[~t.mated], 'nobody here has two photos')):
        with pytest.raises(ValueError, match=words): twin_dls(bad, v, 16)
        with pytest.raises(ValueError, match=words): twin_dls(t, bad, 16)


def test_photos_of_all_kinds(tmp_path, face):
    kinds = {'a.png': face.convert('RGBA'), 'b.png': face.convert('L'), 'c.png': face.convert('P'), 'd.jpg': face.convert('CMYK'), 'e.png': face.resize((300, 40)), 'f.png': face.convert('1')}
    for name, im in kinds.items(): im.save(tmp_path/name)
    p = pd.DataFrame(dict(left=[tmp_path/o for o in ('a.png', 'c.png', 'e.png')], right=[tmp_path/o for o in ('b.png', 'd.jpg', 'f.png')], mated=[True, False, True]))
    d = twin_dls(p, p, 16, 2)
    assert d.loaders[0].dataset.pixels.shape == (6, 16, 16, 3) and len(fit_twins(twins(d), 1)) == 1


def test_frozen_weights_do_not_move(dls):
    learn = twins(dls); learn.freeze(); w = [learn.model.body[i].weight.detach().clone() for i in (0, 3)]; b = learn.model.body[4].weight.detach().clone()
    with learn.no_bar(), learn.no_logging(): learn.fit(1, 1e-2)
    assert all(torch.equal(o, learn.model.body[i].weight) for i, o in zip((0, 3), w)) and not torch.equal(b, learn.model.body[4].weight)


def test_encoder_gives_the_distance_of_the_twins(dls, face):
    learn = twins(dls); e = contrastive_encoder(learn, 'x', 16); other = face.rotate(20)
    d = learn.model.eval()(e.batch([face]).cpu(), e.batch([other]).cpu()).item()
    assert 1 - similarity(e.encode([face]), e.encode([other]), 'euclidean').item() == pytest.approx(d, abs=1e-4)
    before = e.encode([face]); nn.init.zeros_(learn.model.body[0].weight); assert np.array_equal(before, e.encode([face])) and e.threshold == .5


def test_files(tmp_path, face):
    e = Encoder(contrastive_tower(mirror=True), 'twice', 32, 512)
    f = save_encoder(e, tmp_path/'a.safetensors', 'contrastive', mirror=True)
    back = load_encoder(f); assert isinstance(back.module, Averaged) and np.array_equal(back.encode([face]), e.encode([face]))
    assert np.allclose(e.encode([face]), e.encode([face.transpose(Image.Transpose.FLIP_LEFT_RIGHT)]), atol=1e-4)
    save_encoder(e, f, 'contrastive')
    with pytest.raises(ValueError, match='weights of another network'): load_encoder(f)


def test_the_whole_photo_is_the_face(face):
    found, = detect(face, 'whole', 0); assert tuple(found.box) == (0, face.width, face.height, 0)


def test_by_acquaintance_counts_both_sides():
    t = pd.DataFrame(dict(left_person=list('abcdefgh'), right_person=list('bbcdefgh'), right=[False] + [True]*7))
    out = by_acquaintance(t, ['b']); assert out.pairs.tolist() == [2, 6] and out.accuracy.tolist() == [.5, 1]


def test_loss_is_a_mean_with_its_margin():
    d, m = torch.tensor([.6, .6]), torch.tensor([True, False])
    assert ContrastiveLoss()(d, m).item() == pytest.approx(.13) and ContrastiveLoss(2.)(d, m).item() == pytest.approx((.18 + .98)/2)
    assert len(TwinSet(np.zeros((2, 8, 8, 3), np.uint8), [0], [1], [True])) == 1
