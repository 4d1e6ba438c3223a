"Training on faces with labels or a teacher: bad input, resuming, what moves and what does not"
import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import save_file

from facelab.embed import load_encoder, save_encoder
from facelab.pretrain import (FaceAugment, FaceStudent, FaceViews, StudentLoss, copy_loss, face_tower, load_state, loose_affine, make_views,
                              people_balanced, pretrain, relation_loss, student_encoder, student_views, teach, view1_people)


@pytest.fixture(scope='module')
def faces():
    rng = np.random.default_rng(0)
    means = rng.integers(0, 256, (5, 1, 1, 1, 3))
    return (means + rng.integers(-40, 40, (5, 8, 32, 32, 3))).clip(0, 255).astype(np.uint8).reshape(40, 32, 32, 3), np.repeat(np.arange(5), 8)


SMALL = dict(bs=16, epochs=2, augment=FaceAugment(32, 0, 0, 0), lr=1e-3)


def test_every_photo_once_when_nobody_has_too_many():
    people = np.repeat(np.arange(10), 3)
    assert sorted(people_balanced(people, 3, 0)) == list(range(30))
    assert np.bincount(people[people_balanced(people, 2, 0)]).tolist() == [2]*10


def test_relation_against_a_double_loop():
    torch.manual_seed(0)
    e, t, r = torch.randn(5, 7), torch.randn(5, 3), torch.tensor([.7, .1])
    cos = lambda a, b: (a @ b/(a.norm()*b.norm())).item()
    loop = [(r[0]*cos(e[i], e[j]) + r[1] - cos(t[i], t[j])).item()**2 for i in range(5) for j in range(5) if i != j]
    assert relation_loss(e, t, r).item() == pytest.approx(np.mean(loop), rel=1e-4)
    assert copy_loss(t, t).item() == pytest.approx(0, abs=1e-6)
    loss = StudentLoss(labels=0, copy=0, relation=0, answers=3)
    said = torch.randn(5, 3)
    assert loss((None, said, e, r), torch.full((5,), -1), t).item() == pytest.approx(3*np.mean([(cos(said[i], said[j]) - cos(t[i], t[j]))**2 for i in range(5) for j in range(5) if i != j]), rel=1e-4)


def test_labels_of_nobody_teach_nothing(faces):
    torch.manual_seed(0)
    m = FaceStudent(face_tower().body, people=5)
    out = m(torch.rand(4, 3, 32, 32))
    loss = lambda people: StudentLoss()(out, torch.tensor(people), None)
    assert loss([0, 1, -1, -1]).item() == pytest.approx(StudentLoss()((out[0][:2], *out[1:]), torch.tensor([0, 1]), None).item())


def test_interrupted_or_not_the_same_weights(faces, tmp_path):
    views = FaceViews(*faces)
    whole = pretrain(views, **SMALL)
    pretrain(views, tmp_path/'a', minutes=1e-9, **SMALL)
    parts = pretrain(views, tmp_path/'a', **SMALL)
    assert len(parts.log) == 2 and all(torch.equal(a, b) for a, b in zip(whole.model.state_dict().values(), parts.model.state_dict().values()))
    before = (tmp_path/'a'/'state.safetensors').stat().st_mtime_ns
    done = pretrain(views, tmp_path/'a', **SMALL)
    assert len(done.log) == 2 and (tmp_path/'a'/'state.safetensors').stat().st_mtime_ns == before


def test_weight_decay_is_the_same_after_a_restart(faces, tmp_path):
    views = FaceViews(*faces)
    pretrain(views, tmp_path/'a', minutes=1e-9, **SMALL)
    learn = pretrain(views, tmp_path/'a', **SMALL)
    flags = [learn.opt.state[p].get('do_wd', True) for p, *_ in learn.opt.all_params()]
    assert not all(flags) and any(flags)


@pytest.mark.parametrize('change', [dict(lr=2e-3), dict(epochs=3), dict(seed=1), dict(arch='resnet34'), dict(loss=StudentLoss(margin=.3)), dict(augment=FaceAugment(40, 0, 0, 0))])
def test_a_checkpoint_of_another_recipe_is_refused(faces, tmp_path, change):
    pretrain(FaceViews(*faces), tmp_path/'a', minutes=1e-9, **SMALL)
    with pytest.raises(ValueError, match='another training'): pretrain(FaceViews(*faces), tmp_path/'a', **(SMALL | change))


def test_photos_that_change_between_two_runs_are_noticed(faces, tmp_path):
    pixels, people = faces
    pretrain(FaceViews(pixels, people), tmp_path/'a', minutes=1e-9, **SMALL)
    with pytest.raises(ValueError, match='data'): pretrain(FaceViews(pixels[::-1].copy(), people), tmp_path/'a', **SMALL)
    with pytest.raises(ValueError, match='data'): pretrain(FaceViews(pixels, people[::-1].copy()), tmp_path/'a', **SMALL)


@pytest.mark.parametrize('damage', [lambda b: b[:500], lambda b: b'', lambda b: b'{}' + b])
def test_a_damaged_checkpoint_says_so(faces, tmp_path, damage):
    pretrain(FaceViews(*faces), tmp_path/'a', minutes=1e-9, **SMALL)
    f = tmp_path/'a'/'state.safetensors'; f.write_bytes(damage(f.read_bytes()))
    with pytest.raises(ValueError, match='not a usable checkpoint'): pretrain(FaceViews(*faces), tmp_path/'a', **SMALL)


def test_weights_without_a_recipe_are_no_checkpoint(tmp_path):
    save_file(dict(a=torch.zeros(1)), tmp_path/'state.safetensors')
    with pytest.raises(ValueError, match='not a usable checkpoint'): load_state(tmp_path, {})


def test_blends_are_means_of_two_faces(faces):
    pixels, people = faces
    flat = np.stack([np.full((32, 32, 3), v, np.uint8) for v in (0, 200)])
    many, who = make_views(flat, [0, 1], per_face=20, blend=1.)
    assert (who[:2] == [0, 1]).all() and (who[2:] == -1).all()
    assert (many[:2] == flat).all()
    assert len(make_views(pixels, people, 3, 0.)[0]) == 120 and (make_views(pixels, people, 3, 0.)[1] >= 0).all()


def test_views_on_disk_are_those_in_memory(faces, tmp_path):
    a, b = make_views(*faces, 3)[0], make_views(*faces, 3, dest=tmp_path/'v.npy')[0]
    assert (a == b).all() and np.load(tmp_path/'v.npy', mmap_mode='r').shape == a.shape


def test_a_teacher_moves_the_student(faces):
    pixels, people = faces
    said = pixels.mean((1, 2))/255
    learn = pretrain(FaceViews(pixels, np.full(40, -1), said - said.mean(0)), loss=StudentLoss(labels=0), **(SMALL | dict(epochs=6)))
    assert learn.model.people is None and learn.model.project.weight.shape == (3, 512) and learn.log.loss.iloc[-1] < learn.log.loss.iloc[0]


def test_nobody_on_both_sides_and_too_few_people(faces):
    pixels, people = faces
    rows = pd.DataFrame(dict(person=[f'p{i}' for i in people], path=[str(i) for i in range(40)], row=range(40)))
    views, names, kept = student_views(pixels, rows, .4)
    assert kept.person.nunique() == 2 and not set(names) & set(kept.person) and len(views) + len(kept) == 40
    with pytest.raises(ValueError, match='two people'): student_views(pixels[:8], rows[:8])


def test_files_come_back_and_others_are_refused(faces, tmp_path):
    e = student_encoder(pretrain(FaceViews(*faces), **SMALL), 'mine', 32)
    f = save_encoder(e, tmp_path/'mine.safetensors', 'faces', arch='resnet18')
    assert np.array_equal(load_encoder(f).encode(list(faces[0][:3])), e.encode(list(faces[0][:3])))
    save_encoder(e, f, 'faces', arch='resnet34')
    with pytest.raises(ValueError, match='do not fit'): load_encoder(f)
    save_encoder(e, f, 'faces', depth=18)
    with pytest.raises(ValueError, match='cannot be built'): load_encoder(f)


def test_no_list_of_people(tmp_path, monkeypatch):
    monkeypatch.setenv('FACELAB_DATA', str(tmp_path))
    with pytest.raises(FileNotFoundError, match='peopleDevTest.txt'): view1_people('test')
