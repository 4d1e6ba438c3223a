"Feeding: caches that survive bad files, orders, losses against double loops, one optimiser against the other, layouts, errors."
import json, warnings
from pathlib import Path

import numpy as np, pandas as pd, pytest, torch
from PIL import Image
from torch import nn

from facelab.batches import *
from facelab.datasets import split_people
from facelab.embed import encoder_from
from facelab.train import SiameseNet, fill, make_body, read_weights, save_model
from fastai.optimizer import Adam
from fastai.callback.core import Callback
from fastai.vision.all import TensorImage, resnet18, set_seed

warnings.filterwarnings('ignore', category=FutureWarning)


@pytest.fixture(scope='module')
def cached(att):
    "Twenty people, ten photos each, 32 pixels"
    return cache_crops(att[:200], 32)


def tiny(): return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, stride=2, padding=1))


def fit(learn, n=1, lr=1e-3):
    with learn.no_bar(), learn.no_logging(): learn.fit(n, lr)
    return torch.stack([torch.as_tensor(float(o)) for o in learn.recorder.losses])


@pytest.mark.parametrize('folder', [False, True])
def test_every_bad_file_is_a_row(bad_files, att, tmp_path, folder):
    bad = [(str(p), 'bad', reason) for reason, paths in bad_files.items() for p in paths]
    table = pd.DataFrame([*[(p, n, '') for p, n in att[:5].values], *bad, *[(p, n, '') for p, n in att[5:8].values]], columns=['path', 'person', 'why'])
    pixels, report = cache_crops(table, 32, tmp_path/'c' if folder else None)
    assert report.reason.tolist() == table.why.tolist() and (report.row == range(len(table))).all()
    assert (pixels[report.status == 'bad image'] == 0).all() and all(o.any() for o in pixels[report.status == 'ok'])


def test_sizes_and_shapes_that_differ(tmp_path):
    for i, size in enumerate([(30, 50), (400, 20), (32, 32)]): Image.new('L', size, 77).save(tmp_path/f'{i}.png')
    pixels, report = cache_crops(pd.DataFrame(dict(path=[tmp_path/f'{i}.png' for i in range(3)], person=list('abc'))), 32)
    assert pixels.shape == (3, 32, 32, 3) and (pixels == 77).all() and (report.status == 'ok').all()


def test_cache_is_made_again_when_a_file_changes_or_the_cache_is_damaged(tmp_path, att):
    Image.new('RGB', (32, 32), 'white').save(tmp_path/'a.png')
    table, folder = pd.DataFrame(dict(path=[tmp_path/'a.png'], person=['a'])), tmp_path/'cache'
    assert cache_crops(table, 32, folder)[0].min() == 255
    Image.new('RGB', (32, 32), 'black').resize((40, 40)).save(tmp_path/'a.png')
    assert cache_crops(table, 32, folder)[0].max() == 0
    for f in folder.glob('*.json'): f.write_text('[')
    assert cache_crops(table, 32, folder)[1].status.tolist() == ['ok']
    for f in folder.glob('*.npy'): f.write_bytes(f.read_bytes()[:200])
    assert cache_crops(table, 32, folder)[0].shape == (1, 32, 32, 3)


def test_interrupted_write_leaves_nothing(tmp_path, att, monkeypatch):
    def stop(*args): raise KeyboardInterrupt
    monkeypatch.setattr('facelab.batches.load_image', stop)
    with pytest.raises(KeyboardInterrupt): cache_crops(att[:3], 32, tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize('m', [1, 2, 3, 7])
def test_person_order(m):
    people = np.repeat(np.arange(9), [1, 2, 3, 4, 5, 6, 7, 8, 9])
    order = person_order(people, m, seed=3)
    assert sorted(order) == list(range(len(people))) and order == person_order(people, m, seed=3)
    runs = (np.diff(people[order]) != 0).sum() + 1
    assert runs <= sum(-(-k//m) for k in range(1, 10))


def test_dls_cover_every_photo_once(cached):
    pixels, report = cached
    train, valid = split_people(report)
    dls = crop_dls(pixels, train, valid, bs=20, per_person=5)
    assert pd.Series(torch.cat([y for _, y in dls.train]).tolist()).value_counts().eq(10).all()
    assert len(torch.cat([y for _, y in dls.valid])) == len(valid)
    a, b = (torch.cat([x for x, _ in dls.valid]) for _ in range(2))
    assert torch.equal(a, b)
    assert set(dls.vocab) == set(report.person)


@pytest.mark.parametrize('change, per_person, says', [
    (lambda t: t[:0], None, 'no faces for training'), (lambda t: t.drop(columns='row'), None, 'no column `row`'),
    (lambda t: t[t.person == t.person[0]], 4, 'need two people'), (lambda t: t.drop_duplicates('person'), 4, 'everybody has one'),
    (lambda t: t.assign(status='bad image'), None, 'cannot be read')])
def test_tables_that_cannot_be_fed(cached, change, per_person, says):
    pixels, report = cached
    train, valid = split_people(report)
    with pytest.raises(ValueError, match=says): crop_dls(pixels, change(train), valid, per_person=per_person)
    with pytest.raises(ValueError, match=says.replace('training', 'validation')): crop_dls(pixels, train, change(valid.reset_index(drop=True)), per_person=per_person)


def test_empty_table(att):
    with pytest.raises(ValueError, match='empty'): cache_crops(att[:0], 32)


@pytest.mark.parametrize('people', [[0, 0, 1, 1, 2], [0, 0, 0], [0, 1, 2]])
@pytest.mark.parametrize('metric', ['cosine', 'euclidean'])
def test_loss_against_a_double_loop(people, metric):
    torch.manual_seed(0)
    net, people = BatchPairNet(tiny(), 8, metric=metric).eval(), torch.tensor(people)
    x = torch.rand(len(people), 3, 16, 16)
    losses = {True: [], False: []}
    for i in range(len(x)):
        for j in range(i + 1, len(x)):
            same = bool(people[i] == people[j])
            losses[same].append(-SiameseNet.forward(net, x[i:i+1], x[j:j+1]).log_softmax(1)[0, int(same)])
    by_hand = torch.stack([torch.stack(v).mean() for v in losses.values() if v]).mean()
    loss = BatchPairLoss()(net(x), people)
    torch.testing.assert_close(loss, by_hand, atol=1e-5, rtol=1e-5)
    ours, theirs = (torch.autograd.grad(o, net.body.parameters()) for o in (loss, by_hand))
    for a, b in zip(ours, theirs): torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-3)
    assert 0 <= pair_error(net(x), people) <= 1


def test_same_photo_twice_has_a_finite_gradient():
    x = torch.rand(1, 3, 16, 16).repeat(4, 1, 1, 1)
    for metric in ('cosine', 'euclidean'):
        net = BatchPairNet(tiny(), 8, metric=metric)
        BatchPairLoss()(net(x), torch.tensor([0, 0, 1, 1])).backward()
        assert all(torch.isfinite(p.grad).all() for p in net.parameters())


def test_fused_adam_is_adam_on_a_net_with_frozen_parts():
    def train(opt_func):
        set_seed(0)
        net = nn.Sequential(tiny(), nn.Sequential(nn.Flatten(), nn.Linear(8*8*8, 3))).to(memory_format=torch.channels_last)
        groups = [list(o.parameters()) for o in net]
        opt = opt_func(groups, lr=1e-2); opt.freeze_to(1)
        for i in range(10):
            if i == 4: opt.freeze_to(0)
            opt.set_hypers(lr=slice(1e-3, 1e-2/(i + 1)))
            nn.functional.cross_entropy(net(torch.rand(4, 3, 16, 16)), torch.tensor([0, 1, 2, 0])).backward()
            opt.step(); opt.zero_grad()
        return torch.cat([p.detach().flatten() for p in net.parameters()])
    torch.testing.assert_close(train(fused_adam), train(Adam), atol=1e-4, rtol=1e-3)


def test_layouts_do_not_change_numbers():
    torch.manual_seed(0)
    net, x = make_body(resnet18, init='none')[0].eval(), torch.rand(2, 3, 96, 96)
    with torch.no_grad():
        plain = net(x)
        hooks = [m.register_forward_pre_hook(lay_out) for m in net.modules() if isinstance(m, nn.Conv2d)]
        torch.testing.assert_close(net(x), plain, atol=1e-4, rtol=1e-3)
    assert net[0].weight.is_contiguous(memory_format=torch.channels_last)
    assert net[-1][-1].conv2.weight.is_contiguous() and len(hooks) == 20


class Break(Callback):
    def after_pred(self): raise RuntimeError('broken')


def test_a_broken_fit_can_be_followed_by_another(cached):
    pixels, report = cached
    learn = batch_pair_learner(crop_dls(pixels, *split_people(report), bs=16, per_person=4), body=tiny(), dim=8, bf16=True)
    with pytest.raises(RuntimeError), learn.no_bar(), learn.no_logging(), learn.added_cbs(Break()): learn.fit(1)
    assert torch.isfinite(fit(learn)).all()
    assert 'forward' not in learn.model.__dict__ and not any(m._forward_pre_hooks for m in learn.model.modules())


def test_learner_goes_on_to_the_next_rooms(cached, tmp_path):
    pixels, report = cached
    learn = batch_pair_learner(crop_dls(pixels, *split_people(report), bs=20, per_person=5), body=tiny(), dim=8)
    assert not learn.model.body[0].weight.requires_grad
    learn.unfreeze(); fit(learn, 2)
    encoder = encoder_from(learn, 'tiny', size=32)
    v = encoder.encode(list(pixels[:4]))
    e = torch.nn.functional.normalize(embed_faces(learn.model, crop_dls(pixels, report, report[:4], batch_tfms=[]).valid))
    assert v.shape == (4, 8) and np.allclose(v, e, atol=1e-4)
    fill(SiameseNet(tiny(), 8), read_weights(save_model(learn, tmp_path/'t.safetensors')))


def test_augmentation_stays_in_range_and_is_seeded():
    x = torch.rand(16, 3, 32, 32)
    a = BatchAugment(zoom=1.2)
    set_seed(5); one = a(TensorImage(x), split_idx=0)
    set_seed(5); two = a(TensorImage(x), split_idx=0)
    assert torch.equal(one, two) and 0 <= one.min() and one.max() <= 1 and type(one) is TensorImage
    assert torch.equal(a(TensorImage(x), split_idx=1), x)


def test_bench_runs(tmp_path, capsys, monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).resolve().parent.parent)
    from bench.train import main
    main(['--size', '32', '--bs', '8', '--steps', '2', '--repeats', '1', '--threads', '1', '--json', str(tmp_path/'r.json')])
    result = json.loads((tmp_path/'r.json').read_text())
    assert capsys.readouterr().out.splitlines()[-1] == f"ratio: {result['ratio']:.2f}"
    with pytest.raises(SystemExit): main(['--steps', '1'])
