"The ResNet34 that travels with facelab: what it is made from, its file, and what happens to bad ones."
import os
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
import torch
from fastai.vision.all import resnet18, resnet34

import facelab.train as train
from facelab.embed import Encoder, get_encoder, load_encoder
from facelab.models.resnet34_faces import TEACHERS, Course, first_views, halved, numbered, resnet34_faces, save_faces, taught_views, train_by, train_faces
from facelab.pretrain import FaceViews, face_tower
from facelab.train import FACES_FILE, faces_file, faces_weights, has_faces, make_body


class Loud:
    "A teacher that says the mean colour, quickly"
    name, dim = 'loud', 3
    def __new__(cls): return Encoder(torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten()), 'loud', 32, 3, 'euclidean')


@pytest.fixture(scope='module')
def faces():
    rng = np.random.default_rng(0)
    people = np.repeat([f'p{i}' for i in range(10)], 4)
    pixels = rng.integers(0, 255, (40, 40, 40, 3), dtype=np.uint8)
    return pixels, pd.DataFrame(dict(path=[f'{p}/{i}.jpg' for i, p in enumerate(people)], person=people, row=range(40), status='ok'))


def test_numbers_of_people():
    assert numbered(list('abacab'), 3).tolist() == [0, -1, 0, -1, 0, -1]
    assert numbered([]).tolist() == []


def test_views_are_made_once_and_for_these_faces_only(faces, tmp_path):
    pixels, rows = faces
    views, kept = taught_views(pixels, rows, tmp_path, Loud(), 3, .2)
    assert len(views) == 3*(40 - len(kept))
    first = {o: o.stat().st_mtime_ns for o in tmp_path.rglob('*.npy')}
    again, _ = taught_views(pixels, rows, tmp_path, Loud(), 3, .2)
    assert {o: o.stat().st_mtime_ns for o in tmp_path.rglob('*.npy')} == first and np.array_equal(again.targets, views.targets)
    other = pixels.copy(); other[int(rows.row[~rows.person.isin(kept.person)].iloc[0]), 0, 0] ^= 1
    taught_views(other, rows, tmp_path, Loud(), 3, .2)
    assert len(list(tmp_path.glob('views-*'))) == 2
    assert not list(tmp_path.rglob('.*'))


def test_nobody_of_those_kept_out_is_in_a_view(faces, tmp_path):
    pixels, rows = faces
    views, kept = taught_views(pixels, rows, tmp_path, Loud(), 1, .3)
    hidden = {pixels[i].tobytes() for i in kept.row}
    assert kept.person.nunique() == 3 and not hidden & {np.asarray(o).tobytes() for o in views.pixels}


def test_an_interrupted_run_makes_up_for_it(faces, tmp_path):
    pixels, rows = faces
    kw = dict(pixels=pixels, rows=rows, teacher=Loud(), per_face=1, held=.2)
    views, _ = taught_views(folder=tmp_path/'views', **kw)
    make = dict(courses=(Course(32, 1, 1e-3), Course(32, 1, 1e-3, 'answers', keep_map=True)), arch='resnet18', total=16, bs=8)
    whole = train_faces(views, tmp_path/'a', **make)
    half = train_faces(views, tmp_path/'b', minutes=0, **make)
    assert len(half.log) <= 2
    rest = train_faces(views, tmp_path/'b', **make)
    assert rest.log.loss.tolist() == pytest.approx(whole.log.loss.tolist(), rel=1e-5)


def test_a_course_begins_with_the_map_of_the_one_before_or_with_a_new_one(faces, tmp_path):
    pixels, rows = faces
    views, _ = taught_views(pixels, rows, tmp_path/'views', Loud(), 1, .2)
    still = lambda keep, **kw: train_faces(views, tmp_path/str((keep, *kw)), (Course(32, 1, 1e-3), Course(32, 1, 1e-12, keep_map=keep)), arch='resnet18', total=16, bs=8, **kw)
    for keep in (True, False):
        learn, dims = still(keep), [load_encoder(tmp_path/str((keep,))/f'{o}.safetensors') for o in ('first', 'second')]
        assert [e.dim for e in dims] == [3 if keep else 512, 512]
        if keep: assert torch.allclose(learn.model.project.weight, dims[0].module.head.weight, atol=1e-6)
    assert still(True, how='labels').model.project is None


def test_the_first_course_sees_the_first_views_only(faces, tmp_path):
    pixels, rows = faces
    views, _ = taught_views(pixels, rows, tmp_path, Loud(), 4, .2)
    few, _ = taught_views(pixels, rows, tmp_path, Loud(), 2, .2)
    half = first_views(views, .5)
    assert np.array_equal(half.pixels, few.pixels) and torch.equal(half.people, few.people)
    assert len(first_views(FaceViews(views.pixels, views.people), .25)) == len(views)//4


def test_a_checkpoint_of_another_recipe_is_refused(faces, tmp_path):
    pixels, rows = faces
    views, _ = taught_views(pixels, rows, tmp_path/'views', Loud(), 1, .2)
    make = dict(size=32, arch='resnet18', total=16, bs=8, epochs=1)
    train_by('distilled', views, tmp_path/'run', **make)
    with pytest.raises(ValueError, match='labels differ|differ, for example'): train_by('both', views, tmp_path/'run', **make)
    with pytest.raises(ValueError, match='another training'): train_by('distilled', views, tmp_path/'run', **dict(make, arch='resnet34'))


def test_labels_alone_need_no_teacher(faces):
    pixels, rows = faces
    views = FaceViews(pixels, numbered(rows.person), np.zeros((40, 3)))
    assert train_by('labels', views, size=32, arch='resnet18', total=16, bs=8, epochs=1).model.project is None
    assert set(TEACHERS['labels']) == {'labels', 'copy', 'relation'}


def test_numbers_too_large_for_half_precision(tmp_path):
    e = Encoder(face_tower('resnet18'), 'big', 32, 512, align='chip')
    with torch.no_grad(): e.module.body[0].weight[0, 0, 0, 0] = 1e6
    with pytest.raises(ValueError, match='too large for half precision'): save_faces(e, tmp_path/'a.safetensors', 'resnet18')
    assert not list(tmp_path.iterdir())


@pytest.fixture(scope='module')
def file(tmp_path_factory):
    path = tmp_path_factory.mktemp('w')/'f.safetensors'
    torch.manual_seed(0)
    return path, save_faces(Encoder(face_tower('resnet34'), 'mine', 64, 512, align='chip', threshold=.5), path)


def test_the_same_numbers_everywhere(file):
    path, digest = file
    e, state = resnet34_faces(path, sha256=digest), faces_weights(file=path, sha256=digest)
    assert (e.name, e.size, e.threshold, e.metric) == ('mine', 64, .5, 'cosine')
    assert all(torch.equal(v, state[k.removeprefix('body.')].to(v.dtype)) for k, v in e.module.state_dict().items())
    x = np.random.default_rng(0).integers(0, 255, (2, 64, 64, 3), dtype=np.uint8)
    assert np.array_equal(halved(e).encode(list(x)), e.encode(list(x)))


@pytest.mark.parametrize('damage', ['missing', 'truncated', 'one bit', 'another network'])
def test_bad_files(file, damage, tmp_path):
    path, digest = file
    bad = tmp_path/'f.safetensors'
    if damage == 'another network': other = save_faces(Encoder(face_tower('resnet18'), 'mine', 64, 512, align='chip'), bad, 'resnet18')
    elif damage != 'missing':
        data = bytearray(path.read_bytes()); data[-1] ^= 1
        bad.write_bytes(data if damage == 'one bit' else data[:1000])
    error = FileNotFoundError if damage == 'missing' else ValueError
    with pytest.raises(error, match='f.safetensors'): faces_file(bad, digest)
    with pytest.raises(error, match='f.safetensors'): resnet34_faces(bad, sha256=digest)
    if damage == 'another network':
        from fastai.vision.all import create_body
        with pytest.raises(ValueError, match='belongs to another network'): train.fill(create_body(resnet34(weights=None), pretrained=False), faces_weights(file=bad, sha256=other), 'f.safetensors')


def test_starts_in_their_order(monkeypatch, capsys, file):
    path, digest = file
    monkeypatch.setattr(train, 'shipped', lambda name: path)
    monkeypatch.setattr(train.faces_file, '__defaults__', (None, digest))
    body, name = make_body(resnet34)
    assert name == 'faces' and 'weights that know faces' in capsys.readouterr().out
    assert torch.equal(body[0].weight, load_encoder(path).module.body[0].weight)
    monkeypatch.setattr(train, 'imagenet_weights', lambda arch: arch(weights=None).state_dict())
    assert make_body(resnet18)[1] == 'imagenet' and make_body(resnet34, 'imagenet')[1] == 'imagenet'
    def gone(name): raise FileNotFoundError(name)
    monkeypatch.setattr(train, 'shipped', gone)
    assert make_body(resnet34)[1] == 'imagenet' and not has_faces(resnet34)
    with pytest.raises(FileNotFoundError, match=FACES_FILE): make_body(resnet34, 'faces')
    monkeypatch.setattr(train, 'imagenet_weights', lambda arch: None)
    assert make_body(resnet34)[1] == 'random' and 'starting from random' in capsys.readouterr().out


def test_the_file_that_travels():
    e = get_encoder('resnet34-faces')
    assert (e.name, e.size, e.dim, e.metric, e.align) == ('resnet34-faces', 112, 128, 'cosine', 'chip') and 'LFW' in e.licence
    assert faces_file().stat().st_size < 45e6 and (faces_file().parent/'README.md').read_text().count(train.FACES_SHA256) == 1


def test_the_command_says_what_is_missing(tmp_path):
    r = subprocess.run([sys.executable, '-m', 'facelab.pretrain', '--out', str(tmp_path/'o')], capture_output=True, text=True, timeout=120, env={**os.environ, 'FACELAB_DATA': str(tmp_path)})
    assert r.returncode == 2 and 'no such file' in r.stderr and 'Traceback' not in r.stderr
