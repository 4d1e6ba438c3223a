"System 1: its layers, its loss by loops, runs that are interrupted, and what it refuses"
import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from fastai.vision.all import set_seed
from PIL import Image

from facelab.batches import cache_crops, crop_dls
from facelab.embed import load_encoder, save_encoder, similarity
from facelab.models import l1_siamese as l1
from facelab.models.l1_siamese import L1Loss, L1Siamese, L1Tower, best_f1, faces_key, fit_l1, l1_body, l1_encoder, l1_learner, l1_sides, l1_tower, verify_faces
from facelab.protocols import find_encoder

SMALL = dict(size=69, dim=8, channels=(2, 2, 2, 2))


@pytest.fixture(scope='module')
def faces(att):
    "Pixels of eight people with four photos each, and their report"
    return cache_crops(att[att.person <= 's08'].groupby('person').head(4), 69)


def dls_of(faces, train=None, people=5):
    pixels, report = faces
    first = report[report.person <= f's{people:02}'] if train is None else train
    return crop_dls(pixels, first, report[report.person > 's06'], bs=8, per_person=4, batch_tfms=[l1.FlipAndLight()], stats=([0.]*3, [1.]*3))


def learner(faces, seed=42, train=None, **kw):
    set_seed(seed)
    return l1_learner(dls_of(faces, train), **{**SMALL, **kw})


@pytest.mark.parametrize('size', [69, 70, 83, 100, 101, 128])
def test_sides_are_those_of_the_layers(size):
    x, seen = torch.zeros(1, 3, size, size), []
    for layer in l1_body(size, 4, (1, 1, 1, 1)).eval():
        x = layer(x)
        if isinstance(layer, (torch.nn.Conv2d, torch.nn.MaxPool2d)): seen.append(x.shape[-1])
    assert seen == l1_sides(size) and x.shape == (1, 4)


@pytest.mark.parametrize('size', [1, 10, 68])
def test_too_small(size):
    with pytest.raises(ValueError, match='69'): l1_sides(size)
    with pytest.raises(ValueError, match='69'): l1_tower(size)


def test_published_size():
    with torch.device('meta'): m = L1Siamese()
    assert sum(p.numel() for p in m.parameters()) == 18_206_145 and m.build == dict(size=100, dim=4096, channels=[64, 128, 128, 256])
    assert [o.p for o in m.modules() if isinstance(o, torch.nn.Dropout)] == [.3]*3


@pytest.mark.parametrize('seed', range(4))
def test_loss_by_loops(seed):
    g = torch.Generator().manual_seed(seed)
    y, z = torch.randint(0, 3, (7,), generator=g), torch.randn(21, generator=g)
    out = torch.rand(7, 7, generator=g) < .3; out = out | out.T
    for held in (None, out):
        cost, wrong, k = {True: [], False: []}, {True: [], False: []}, 0
        for i in range(7):
            for j in range(i + 1, 7):
                same = bool(y[i] == y[j]); p = 1/(1 + np.exp(-z[k].item())); k += 1
                if held is not None and held[i, j]: continue
                cost[same].append(-np.log(p if same else 1 - p)); wrong[same].append((p >= .5) != same)
        loss = L1Loss() if held is None else L1Loss(y, held)
        labels = y if held is None else torch.arange(7)
        assert loss(z, labels).item() == pytest.approx(sum(np.mean(o) for o in cost.values() if o)/2, rel=1e-4)
        assert float(loss.error(z, labels)) == pytest.approx(sum(np.mean(o) for o in wrong.values() if o)/2, abs=1e-6)


def test_a_batch_of_strangers_is_finite():
    z = torch.zeros(6, requires_grad=True); L1Loss()(z, torch.arange(4)).backward()
    assert torch.isfinite(z.grad).all()


def test_one_network_for_both():
    m, (a, b) = L1Siamese(**SMALL).eval(), torch.rand(2, 3, 3, 69, 69)
    with torch.inference_mode():
        every, rows = m(torch.cat([a, b])), list(zip(*np.triu_indices(6, 1)))
        for k in range(3): assert every[rows.index((k, k + 3))].item() == pytest.approx(m(a, b)[k].item(), abs=1e-5)
        assert torch.allclose(m(a, b), m(b, a), atol=1e-6)


@pytest.mark.parametrize('seed', range(3))
def test_score_is_the_logit(seed):
    torch.manual_seed(seed); m = L1Siamese(**SMALL).eval(); torch.nn.init.normal_(m.head.weigh.weight); torch.nn.init.normal_(m.head.weigh.bias)
    class Learn: model = m
    e = l1_encoder(Learn, threshold=.8)
    images = list(np.random.default_rng(seed).integers(0, 256, (5, 69, 69, 3), dtype=np.uint8))
    v = e.encode(images)
    with torch.inference_mode(): want = m(e.batch(images)).numpy()
    got = (similarity(v, v, 'l1') + m.head.weigh.bias.item())[np.triu_indices(5, 1)]
    assert np.allclose(got, want, atol=1e-4) and 1/(1 + np.exp(-e.threshold - m.head.weigh.bias.item())) == pytest.approx(.8, abs=1e-6)
    before = v.copy(); torch.nn.init.zeros_(m.head.weigh.weight); assert np.array_equal(e.encode(images), before)


def test_weights_of_both_signs():
    t = L1Tower(torch.nn.Identity(), 3); t.weight[:] = torch.tensor([-2., 0, 5]); a, b = torch.rand(2, 4, 3)
    want = torch.stack([(t.weight*(x - b).abs()).sum(1) for x in a])
    assert np.allclose(similarity(t(a), t(b), 'l1'), want.numpy(), atol=1e-5)


@pytest.mark.parametrize('first, every', [(1, 10), (2, 1), (3, 2)])
def test_interrupted_or_not(faces, tmp_path, first, every):
    kw = dict(lr=1e-3, decay=.9, every=every)
    whole = learner(faces); log = fit_l1(whole, 4, **kw)
    fit_l1(learner(faces), first, folder=tmp_path, **kw)
    again = learner(faces, seed=7); log2 = fit_l1(again, 4, folder=tmp_path, **kw)
    assert log.equals(log2) and list(log.epoch) == [1, 2, 3, 4]
    for a, b in zip(whole.model.state_dict().values(), again.model.state_dict().values()): assert torch.equal(a, b)
    assert [o.name for o in tmp_path.iterdir()] == ['state.safetensors']
    done = learner(faces, seed=8); assert fit_l1(done, 4, folder=tmp_path, **kw).equals(log) and torch.equal(done.model.head.weigh.weight, whole.model.head.weigh.weight)


def test_killed_between_checkpoints(faces, tmp_path):
    class Power(l1.Callback):
        def before_train(self):
            if self.epoch == 3: raise KeyboardInterrupt
    kw = dict(lr=1e-3, every=2); cut = learner(faces); cut.add_cb(Power())
    with pytest.raises(KeyboardInterrupt): fit_l1(cut, 4, folder=tmp_path, **kw)
    again, whole = learner(faces, seed=3), learner(faces)
    assert fit_l1(again, 4, folder=tmp_path, **kw).equals(fit_l1(whole, 4, **kw))


def test_a_folder_that_changed(faces, att, tmp_path):
    pixels, report = faces; folder = tmp_path/'photos'
    for i, r in enumerate(report[report.person <= 's05'].itertuples()):
        (folder/r.person).mkdir(parents=True, exist_ok=True); (folder/r.person/f'{i}.pgm').write_bytes(open(r.path, 'rb').read())
    def look():
        paths = sorted(folder.rglob('*.pgm')); return cache_crops(pd.DataFrame(dict(path=paths, person=[p.parent.name for p in paths])), 69)
    def run(px, rp, epochs):
        set_seed(1); learn = l1_learner(crop_dls(px, rp, rp, bs=8, per_person=4, batch_tfms=[l1.FlipAndLight()], stats=([0.]*3, [1.]*3)), **SMALL)
        return fit_l1(learn, epochs, folder=tmp_path/'run'), faces_key(learn.dls)
    first = look(); _, key = run(*first, 1)
    min(folder.rglob('*.pgm')).write_bytes(open(att.path[399], 'rb').read())
    log, same = run(*first, 2); assert same == key and len(log) == 2
    kept = (tmp_path/'run'/'state.safetensors').read_bytes()
    with pytest.raises(ValueError, match='faces'): run(*look(), 3)
    assert (tmp_path/'run'/'state.safetensors').read_bytes() == kept


@pytest.mark.parametrize('change, named', [(dict(dim=9), 'dim'), (dict(channels=(2, 2, 2, 3)), 'channels'), (dict(penalty=0.), 'penalty'), (dict(clip=2.), 'clip')])
def test_checkpoint_of_another_network(faces, tmp_path, change, named):
    fit_l1(learner(faces), 1, folder=tmp_path)
    with pytest.raises(ValueError, match=named): fit_l1(learner(faces, **change), 2, folder=tmp_path)
    with pytest.raises(ValueError, match='lr'): fit_l1(learner(faces), 2, lr=1., folder=tmp_path)


def test_damaged_checkpoint(faces, tmp_path):
    (tmp_path/'state.safetensors').write_bytes(b'not at all')
    with pytest.raises(ValueError, match='not a usable checkpoint'): fit_l1(learner(faces), 1, folder=tmp_path)


def test_few_photos(faces):
    pixels, report = faces
    one_each, one_person = report.groupby('person').head(1), report[report.person == 's01']
    with pytest.raises(ValueError, match='two photos'): dls_of(faces, one_each)
    with pytest.raises(ValueError, match='two people'): dls_of(faces, one_person)
    lonely = pd.concat([report[report.person == 's02'], report[report.person.isin(['s01', 's03'])].groupby('person').head(1)])
    assert np.isfinite(fit_l1(learner(faces, train=lonely), 1).train_loss[0])


def test_files(faces, tmp_path):
    learn = learner(faces); e = l1_encoder(learn, 'mine', .7)
    file = save_encoder(e, tmp_path/'mine.safetensors', 'l1-siamese', **learn.model.build)
    for back in (load_encoder(file), find_encoder(str(file))):
        assert np.array_equal(back.encode(list(faces[0][:3])), e.encode(list(faces[0][:3])))
        assert (back.name, back.dim, back.metric, back.threshold) == ('mine', 16, 'l1', e.threshold)
    save_encoder(e, file, 'l1-siamese', **{**SMALL, 'dim': 9})
    with pytest.raises(ValueError, match='another network'): load_encoder(file)


def test_verify(faces, face):
    e = l1_encoder(learner(faces)); other = Image.fromarray(np.array(faces[0][9]))
    got = verify_faces(face, other, e, detector=None)
    assert got == pytest.approx(verify_faces(other, face, e, detector=None)) and type(got['is_match']) is bool and 0 <= got['score'] <= 1
    assert got['is_match'] == (got['score'] >= .5)
    for odd in (face.convert('L'), face.convert('RGBA'), face.resize((31, 300)), np.asarray(face.convert('L')), face.convert('P')): assert 0 <= verify_faces(odd, other, e, None)['score'] <= 1
    with pytest.raises(ValueError, match='no face'): verify_faces(Image.new('RGB', (90, 90)), face, e, 'hog')
    from facelab.models.baselines import pixels_encoder
    with pytest.raises(ValueError, match='System 1'): verify_faces(face, face, pixels_encoder())
    for t in (0, 1, -3.): 
        with pytest.raises(ValueError, match='between 0 and 1'): l1_encoder(learner(faces), threshold=t)


def test_best_f1_by_loop():
    rng = np.random.default_rng(0); s, m = rng.random(60).round(2), rng.random(60) < .4
    def f1(t): hit = s >= t; return 2*(hit & m).sum()/(hit.sum() + m.sum())
    best = best_f1(s, m); assert best.f1 == pytest.approx(max(f1(t) for t in s)) and f1(best.threshold) == pytest.approx(best.f1)


def test_flip_and_light_keeps_the_range():
    x = torch.rand(32, 3, 8, 8); y = l1.FlipAndLight(.5, .5).encodes(l1.TensorImage(x))
    assert y.shape == x.shape and 0 <= y.min() and y.max() <= 1 and not torch.equal(y.as_subclass(torch.Tensor), x)
    assert l1.FlipAndLight.split_idx == 0


def test_a_batch_in_which_no_pair_counts():
    z, y = torch.randn(6, requires_grad=True), torch.arange(4)
    loss = L1Loss(torch.tensor([0, 0, 1, 1]), torch.ones(4, 4, dtype=torch.bool)); loss(z, y).backward()
    assert float(loss(z, y)) == float(loss.error(z, y)) == 0 and (z.grad == 0).all()
