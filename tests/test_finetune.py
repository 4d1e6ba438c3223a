"dlib's network in fastai's hands: the same numbers, the right groups, and clear words for tables that cannot teach."
import math
import warnings

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from torch import nn

from facelab.crop import crop_folder, crops_of
from facelab.embed import recipe
from facelab.finetune import (Angles, Descriptor, GroupRates, MarginLoss, Through, adapt, all_scores, blend_curve, blend_weights, check_chips,
                              dlib_resnet, dlib_split, dlib_stats, exam, exam_table, face_dls, face_learner, head_learner, imprint, night_photo,
                              one_cycle, paired_change, smooth_photo, threshold_from, tuned_encoder, vectors_of)
from facelab.images import load_image
from facelab.metrics import eer
from facelab.models.dlib_resnet import dlib_encoder

with warnings.catch_warnings(action='ignore', category=FutureWarning):
    from fastai.vision.all import PILImage, create_body, even_mults, set_seed, vision_learner
from fastai.vision.learner import model_meta


@pytest.fixture(scope='module')
def chips(att, tmp_path_factory):
    "Aligned chips of six people, four photos each"
    few = att[att.person.isin(att.person.unique()[:6])].groupby('person').head(4)
    return crops_of(crop_folder(few, tmp_path_factory.mktemp('chips'), align='chip', size=150, detector='hog+cnn', workers=1, progress=False))


@pytest.fixture(scope='module')
def photos(chips): return [load_image(p) for p in chips.path]


@pytest.fixture(scope='module')
def dlib(): return dlib_encoder()


@pytest.fixture
def learn(chips):
    set_seed(42, True)
    return face_learner(face_dls(chips, bs=9))


def state(m): return {k: v.clone() for k, v in m.state_dict().items()}


def fit(learn, *args, **kw):
    with learn.no_bar(), learn.no_logging(): learn.fit_one_cycle(*args, **kw)


# ---- the arch

def test_arch_is_dlib(photos, dlib):
    x = dlib.batch(photos)
    with torch.inference_mode(): got = dlib_resnet('DEFAULT').eval()(x).numpy()
    assert got.shape == (24, 128) and np.abs(got - dlib.encode(photos)).max() <= 2e-6


def test_arch_through_vision_learner(chips, photos, dlib):
    "Weights, cut, groups, normalisation and freezing come from `model_meta`; the body says what dlib says"
    dls = face_dls(chips, bs=6)
    learn = vision_learner(dls, dlib_resnet)
    x, _ = dls.valid.one_batch()
    with torch.inference_mode(): got = learn.model[0].eval()(x).flatten(1).numpy()
    assert np.abs(got - dlib.encode([load_image(p) for p in dls.valid_ds.items.path[:len(x)]])).max() <= 2e-6
    assert [{p.requires_grad for p in g} for g in dlib_split(learn.model)] == [{False}, {False}, {True}]
    assert [len(g) for g in learn.opt.param_lists][:2] == [84, 33]
    assert learn.model(x).shape == (6, 6)


def test_random_weights_and_files(tmp_path):
    a, b = dlib_resnet(), dlib_resnet()
    assert not torch.equal(a.stem[0][0].weight, b.stem[0][0].weight)
    with pytest.raises(FileNotFoundError): dlib_resnet(tmp_path/'none.dat')
    (tmp_path/'bad.dat').write_bytes(b'hello')
    with pytest.raises(ValueError, match='bad.dat'): dlib_resnet(tmp_path/'bad.dat')


def test_not_pretrained_is_not_frozen_and_not_normalised(chips):
    learn = vision_learner(face_dls(chips, bs=6), dlib_resnet, pretrained=False)
    assert all(p.requires_grad for p in learn.model.parameters())
    assert not [t for t in learn.dls.after_batch.fs if hasattr(t, 'mean')]


def test_body_and_meta():
    body = create_body(dlib_resnet('DEFAULT'))
    assert len(body) == 4 and isinstance(body[3], Descriptor)
    meta = model_meta[dlib_resnet]
    assert meta['cut'] == -2 and meta['weights'] == 'DEFAULT' and meta['split'] is dlib_split
    assert np.allclose([255*np.array(o) for o in dlib_stats], [[122.782, 117.001, 104.298], [256]*3])


def test_groups_hold_every_parameter_once():
    model = nn.Sequential(create_body(dlib_resnet()), Angles(128, 3))
    got = [id(p) for g in dlib_split(model) for p in g]
    assert len(got) == len(set(got)) and set(got) == {id(p) for p in model.parameters()}


# ---- training

def test_frozen_and_unfrozen(learn):
    before = state(learn.model)
    fit(learn, 1, 1e-2)
    assert [k for k, v in state(learn.model).items() if not torch.equal(v, before[k])] == ['1.weight']
    learn.unfreeze()
    before = state(learn.model)
    fit(learn, 1, 1e-4)
    still = [k for k, v in state(learn.model).items() if torch.equal(v, before[k])]
    assert not still, still


@pytest.mark.parametrize('lrs, wanted', [(slice(1e-6, 1e-4), [1e-6, 1e-5, 1e-4]), (slice(1e-4), [1e-5, 1e-5, 1e-4]), (1e-5, [1e-5]*3), ([2e-4, 1e-5, 1e-3], [2e-4, 1e-5, 1e-3])])
def test_rates_follow_one_cycle(learn, lrs, wanted):
    log = GroupRates(); learn.unfreeze()
    fit(learn, 2, lrs, cbs=log)
    n = len(log.rates)
    assert n == 2*len(learn.dls.train) and np.allclose(log.rates, [[one_cycle(lr, i/n) for lr in wanted] for i in range(n)], rtol=1e-5)


def test_one_cycle():
    assert one_cycle(1, 0) == 1/25 and one_cycle(1, .25) == 1 and math.isclose(one_cycle(1, 1), 1e-5) and math.isclose(one_cycle(1, .125), .52)
    assert np.allclose(even_mults(1e-6, 1e-4, 3), [1e-6, 1e-5, 1e-4])


def test_vectors_and_head_on_them(chips, dlib):
    "The head on vectors gives what the frozen learner gives on photos; training it leaves the body alone"
    set_seed(1, True)
    learn = face_learner(face_dls(chips, bs=7))
    v, y = vectors_of(learn, learn.dls.valid)
    assert np.abs(v.numpy() - dlib.encode([load_image(p) for p in learn.dls.valid_ds.items.path])).max() <= 2e-6
    x, _ = learn.dls.valid.one_batch()
    learn.model.eval()
    with torch.no_grad(): assert torch.allclose(learn.model[1](v[:len(x)]), torch.Tensor(learn.model(x)), atol=1e-5)
    before, quick = state(learn.model[0]), head_learner(learn)
    assert len(quick.dls.train_ds) == 18 and len(quick.dls.train) == 1 and quick.model is learn.model[1]
    was = learn.model[1].weight.detach().clone()
    fit(quick, 3, 1e-2)
    assert not torch.equal(was, learn.model[1].weight) and all(torch.equal(v, before[k]) for k, v in learn.model[0].state_dict().items())


def test_imprint_is_the_mean_direction(learn):
    learn.model[1].weight.data.zero_()
    w = imprint(learn).model[1].weight
    v, y = vectors_of(learn)
    assert torch.allclose(w.norm(dim=1), torch.ones(6), atol=1e-5)
    near = torch.stack([nn.functional.normalize(v[y == k]).mean(0) for k in range(6)])
    assert (nn.functional.cosine_similarity(w, near) > .99).all()


def test_margin_loss_by_loop():
    rng = np.random.default_rng(0)
    cos, y, m, s = rng.uniform(-1, 1, (5, 4)), rng.integers(0, 4, 5), .35, 12.
    z = [[s*(c - m*(j == k)) for j, c in enumerate(row)] for row, k in zip(cos, y)]
    wanted = np.mean([-math.log(math.exp(r[k])/sum(map(math.exp, r))) for r, k in zip(z, y)])
    got = MarginLoss(m, s)(torch.tensor(cos), torch.tensor(y))
    assert math.isclose(got, wanted, rel_tol=1e-6)


def test_angles_ignore_length():
    head, x = Angles(8, 3), torch.randn(5, 8)
    assert torch.allclose(head(x), head(7*x), atol=1e-6) and head(x).abs().max() <= 1 + 1e-6
    assert torch.allclose(head(x), head(x[..., None, None]))


def test_batch_larger_than_the_table_still_trains(chips):
    learn = adapt(chips[:8], epochs=1, frozen=1, bs=500)
    assert len(learn.dls.train) == 1 and np.isfinite(learn.stages.train_loss).all()


def test_same_seed_same_network(chips):
    a, b = (adapt(chips, night_photo, mix=.5, epochs=1, frozen=2, bs=9, seed=7) for _ in range(2))
    for p, q in zip(a.model.parameters(), b.model.parameters()): assert torch.allclose(p, q, atol=1e-6)


# ---- cameras

def test_night(photos):
    a = photos[0].resize((40, 60))
    assert night_photo(a, seed=1) == night_photo(a, seed=1) != night_photo(a, seed=2)
    assert night_photo(a).size == (40, 60) and night_photo(a).mode == 'RGB'
    error = [np.abs(np.asarray(night_photo(a, light, seed=0), float) - np.asarray(a.convert('L').convert('RGB'), float)).mean() for light in (2, 8, 100, 10_000)]
    assert error == sorted(error, reverse=True) and error[-1] < 3
    assert np.asarray(smooth_photo(a), float).std() < np.asarray(a, float).std()


@pytest.mark.parametrize('mix, kept', [(0., 0), (1., 50)])
def test_through(mix, kept):
    cam, white = Through(lambda im: Image.new('RGB', im.size), mix), PILImage.create(np.full((4, 4, 3), 255, np.uint8))
    assert sum(np.asarray(cam(white, split_idx=0)).max() == 255 for _ in range(50)) == kept
    assert all(np.asarray(cam(white, split_idx=1)).max() == 0 for _ in range(20))


# ---- exams

def test_exam_needs_five_people():
    with pytest.raises(ValueError, match='five'): exam(np.eye(8), np.repeat(list('abcd'), 2))


def test_exam_and_change():
    names = np.repeat(list('abcdef'), 3)
    rng = np.random.default_rng(0)
    same = names[:, None] == names
    noise = lambda k: (lambda a: a + a.T)(rng.normal(0, k, same.shape))
    good, bad = same + noise(.05), same + noise(.6)
    assert paired_change(good, good, names, n_boot=10) == (0, 0, 0)
    up, down = paired_change(good, bad, names, n_boot=40), paired_change(bad, good, names, n_boot=40)
    assert up[0] > 0 and up[1] > 0 and np.allclose(up, [-down[0], -down[2], -down[1]])
    table = exam(good, names, threshold=.5, n_boot=20)
    assert list(table.index) == ['eer', 'false matches', 'false non-matches', 'rank-1'] and table.value.eer == 0 and table.attrs['pairs'] == 153
    assert (table.lo <= table.value).all() and (table.value <= table.hi).all()
    assert exam_table(dict(x=table)).loc['x', 'rank-1'].startswith('1.000 [')


def test_threshold_from(photos, chips, dlib):
    s = all_scores(dlib, photos)
    same = chips.person.to_numpy()[:, None] == chips.person.to_numpy()
    t = threshold_from(dlib, photos, chips.person, fmr=.05)
    assert (s[~same] >= t).mean() <= .05


# ---- the encoder

def test_tuned_encoder(learn, photos, dlib):
    unit = dlib.encode(photos); unit /= np.linalg.norm(unit, axis=1, keepdims=True)
    assert np.abs(tuned_encoder(learn, 'new').encode(photos) - unit).max() <= 2e-6
    learn.unfreeze(); fit(learn, 1, 1e-4)
    e = tuned_encoder(learn, 'dlib-mine'); after = e.encode(photos)
    assert np.abs(after - unit).max() > 1e-3 and np.abs(tuned_encoder(learn, 'x', share=0).encode(photos) - unit).max() <= 2e-6
    fit(learn, 1, 1e-4)
    assert np.array_equal(e.encode(photos), after)
    assert (e.name, e.size, e.dim, e.metric, e.align) == ('dlib-mine', 150, 128, 'cosine', 'chip') and np.allclose(e.mean, dlib.mean)
    assert recipe(e) != recipe(dlib)
    with pytest.raises(ValueError, match='a name of its own'): tuned_encoder(learn, 'dlib')


def test_folding_changes_nothing(learn, photos):
    learn.unfreeze(); fit(learn, 1, 1e-4)
    learn.model.eval()
    with torch.inference_mode(): want = nn.functional.normalize(learn.model[0](dlib_encoder().batch(photos)).flatten(1)).numpy()
    assert np.abs(tuned_encoder(learn, 'x').encode(photos) - want).max() < 1e-5


def test_blend():
    a, b = nn.Linear(3, 2), nn.Linear(3, 2)
    for share in (0, .25, 1): assert torch.allclose(blend_weights(a, b, share).weight, (1 - share)*a.weight + share*b.weight)


def test_blend_curve(learn, photos, chips):
    curve = blend_curve(learn, dict(day=(photos, chips.person)), shares=(0, 1), n_boot=5)
    assert list(curve.columns) == ['exam', 'share', 'eer', 'lo', 'hi'] and len(curve) == 2


# ---- tables that cannot teach

def test_good_chips_pass(chips): check_chips(chips)


@pytest.mark.parametrize('spoil, says', [
    (lambda t: t.drop(columns='person'), 'no column person'),
    (lambda t: t[['photo']], 'no column path and no person'),
    (lambda t: t[:4], 'one person in the table'),
    (lambda t: t[:0], 'nobody in the table'),
    (lambda t: t[:5], 'only one photo of s02'),
    (lambda t: t.assign(person=[None] + list(t.person[1:])), '1 photos without a person'),
])
def test_bad_tables(chips, spoil, says):
    for f in (check_chips, face_dls, adapt):
        with pytest.raises(ValueError, match=says): f(spoil(chips))


def test_bad_crops(chips, att, tmp_path):
    "Another size, another cut, a file that is no photo: each says what to do"
    photos = att[:20]
    cut = lambda name, **kw: crops_of(crop_folder(photos, tmp_path/name, detector='hog+cnn', workers=1, progress=False, **kw))
    for table in (cut('a', align='chip', size=96), cut('b', size=224), cut('c', size=150), photos):
        with pytest.raises(ValueError, match="align='chip', size=150"): check_chips(table)
    (tmp_path/'text.png').write_text('hello')
    with pytest.raises(ValueError, match='text.png'): check_chips(pd.concat([chips, pd.DataFrame(dict(path=[str(tmp_path/'text.png')]*2, person='s01'))]))


def test_mirrored_and_grainy_chips_are_still_aligned(chips, tmp_path):
    for name, f in dict(mirror=lambda im, i: im.transpose(Image.Transpose.FLIP_LEFT_RIGHT), night=lambda im, i: night_photo(im, 30, seed=i)).items():
        paths = [tmp_path/f'{name} {i}.png' for i in range(len(chips))]
        for i, (p, q) in enumerate(zip(chips.path, paths)): f(load_image(p), i).save(q)
        check_chips(chips.assign(path=[str(p) for p in paths]))


def test_eer_is_the_default(photos, chips, dlib):
    s = all_scores(dlib, photos)
    assert paired_change(s, s, chips.person, n_boot=5) == paired_change(s, s, chips.person, stat=eer, n_boot=5)
