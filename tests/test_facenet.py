"FaceNet's network, its files, heads on vectors, the split by photo, unknown, and what can be wrong; random weights only."
import hashlib
import json
import warnings
from importlib.util import find_spec

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from sklearn.metrics import accuracy_score, confusion_matrix, f1_score
from torch import nn

from facelab.datasets import IdentityLeak, check_leak
from facelab.embed import Encoder, load_encoder, save_encoder
from facelab.gallery import UNKNOWN
from facelab.models import facenet
from facelab.models.facenet import (CLASS_RECIPES, FACENET_FILES, Copies, FaceClassifier, InceptionResnetV1, as_learner, calibrate_class, class_augmentation,
                                    class_costs, class_measures, confusion_table, convert_facenet, copy_vectors, door, facenet_encoder, facenet_head,
                                    facenet_path, facenet_tower, fill_facenet, fit_head, get_facenet, load_classifier, name_faces, peak_memory,
                                    resnet_head, save_class_table, save_classifier, split_copies, train_classifier)


@pytest.fixture(scope='module')
def net():
    torch.manual_seed(0)
    return InceptionResnetV1().eval()


@pytest.fixture(scope='module')
def published(net, tmp_path_factory):
    "A file as the authors publish it: a pickle of tensors, names of strangers included"
    path = tmp_path_factory.mktemp('published')/'20180402-114759-vggface2.pt'
    torch.save(net.state_dict() | {'logits.weight': torch.zeros(7, 512), 'logits.bias': torch.zeros(7)}, path)
    return path


@pytest.fixture
def nowhere(tmp_path, monkeypatch):
    monkeypatch.setenv('FACELAB_DATA', str(tmp_path/'data'))
    monkeypatch.delenv('FACELAB_FACENET', raising=False)
    return tmp_path


def colours(n_people, photos, seed=0, noise=25):
    "Faces that are easy to tell apart: plain pictures, one colour for each person"
    rng = np.random.default_rng(seed)
    own = np.random.default_rng(99).integers(40, 216, (n_people, 3))
    return [(f'p{i}', Image.fromarray((own[i] + rng.normal(0, noise, (8, 8, 3))).clip(0, 255).astype(np.uint8))) for i in range(n_people) for _ in range(photos)]


@pytest.fixture
def faces(tmp_path):
    rows = []
    for i, (who, im) in enumerate(colours(4, 4)):
        (tmp_path/who).mkdir(exist_ok=True); im.save(path := tmp_path/who/f'{i}.png'); rows.append((str(path), who))
    return pd.DataFrame(rows, columns=['path', 'person'])


def tiny(name='tiny', metric='euclidean', scale=1.):
    m = nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten())
    return Encoder(m, name, 8, 12, metric, mean=(127.5,)*3, std=(64.*scale,)*3)


@pytest.fixture
def trained(faces):
    return train_classifier(tiny(), copy_vectors(tiny(), faces, 4), epochs=40, lr=1e-2)


# the network

def test_size_and_names(net):
    assert sum(p.numel() for p in net.parameters()) == 23_482_624
    named = InceptionResnetV1(8631).state_dict()
    assert named['logits.weight'].shape == (8631, 512) and set(named) - set(net.state_dict()) == {'logits.weight', 'logits.bias'}


@pytest.mark.skipif(not find_spec('facenet_pytorch'), reason='facenet-pytorch is not installed')
def test_the_same_as_facenet_pytorch(net):
    with warnings.catch_warnings(action='ignore'): from facenet_pytorch import InceptionResnetV1 as Theirs
    theirs = Theirs().eval()
    assert {k: v.shape for k, v in theirs.state_dict().items()} == {k: v.shape for k, v in net.state_dict().items()}
    net2 = InceptionResnetV1(); net2.load_state_dict(theirs.state_dict(), strict=True); theirs.load_state_dict(net.state_dict(), strict=True)
    x = torch.rand(2, 3, 160, 160)*2 - 1
    with torch.inference_mode(): assert (net(x) - theirs(x)).abs().max() < 1e-6


def test_deterministic_unit_vectors(net):
    x = torch.rand(2, 3, 160, 160)
    with torch.inference_mode(): a, b = net(x), net(x)
    assert torch.equal(a, b) and torch.allclose(a.norm(dim=1), torch.ones(2), atol=1e-5)


def test_recipes_as_given():
    assert [type(o).__name__ for o in facenet_head(512, 70)] == ['BatchNorm1d', 'Dropout', 'Linear', 'ReLU', 'Dropout', 'Linear']
    assert [type(o).__name__ for o in resnet_head(2048, 70)] == ['Dropout', 'Linear', 'ReLU', 'Dropout', 'Linear']
    assert [o.p for o in facenet_head(2, 2) if isinstance(o, nn.Dropout)] == [.3, .3] and [o.p for o in resnet_head(2, 2) if isinstance(o, nn.Dropout)] == [.5, .5]
    assert CLASS_RECIPES['facenet'] | dict(head=0) == dict(head=0, epochs=100, lr=1e-4, bs=16)
    assert CLASS_RECIPES['resnet50'] | dict(head=0) == dict(head=0, epochs=10, lr=1e-3, bs=16)


# files

def test_no_weights_says_how(nowhere):
    with pytest.raises(FileNotFoundError, match='weights need one download'): facenet_encoder()
    with pytest.raises(FileNotFoundError, match='consent=True'): get_facenet()
    with pytest.raises(ValueError, match='published are'): get_facenet('msceleb')
    with pytest.raises(ValueError, match='sha256='): get_facenet('casia-webface', consent=True)


def test_fetch_check_convert(nowhere, published, monkeypatch, net):
    good = hashlib.sha256(published.read_bytes()).hexdigest()
    monkeypatch.setitem(FACENET_FILES, 'vggface2', dict(url=published.as_uri(), sha256='0'*64))
    with pytest.raises(ValueError, match='nothing was kept'): get_facenet(consent=True)
    assert not list((nowhere/'data').rglob('*.safetensors'))
    assert get_facenet(consent=True, sha256=good) == facenet_path()
    assert not any(k.startswith('logits') for k in load_file(facenet_path()))
    face = Image.new('RGB', (50, 70), 'gray')
    e = facenet_encoder()
    direct = Encoder(net, 'x', 160, 512, mean=(127.5,)*3, std=(128.,)*3)
    assert np.allclose(e.encode([face]), direct.encode([face]), atol=1e-6) and e.licence.startswith('weights MIT')


def test_published_sha256_is_a_sha256():
    assert len(FACENET_FILES['vggface2']['sha256']) == 64 and int(FACENET_FILES['vggface2']['sha256'], 16)
    assert all(o['url'].startswith('https://github.com/timesler/facenet-pytorch/releases/') for o in FACENET_FILES.values())


def test_wrong_files(tmp_path, net):
    torch.save(object(), tmp_path/'object.pt'); (tmp_path/'text.pt').write_text('Dear Sir or Madam,')
    for bad in 'object.pt', 'text.pt':
        with pytest.raises(ValueError, match=bad): facenet_encoder(tmp_path/bad)
    state = net.state_dict()
    for wrong in ({k: v for k, v in state.items() if k != 'last_bn.weight'}, state | {'extra': torch.zeros(1)}, state | {'last_bn.weight': torch.zeros(128)}, {'fc.weight': torch.zeros(3)}):
        with pytest.raises(ValueError, match='not the weights of InceptionResnetV1'): fill_facenet(wrong)
    torch.save({'fc.weight': torch.zeros(3)}, tmp_path/'other.pt')
    with pytest.raises(ValueError, match='other.pt'): convert_facenet(tmp_path/'other.pt', tmp_path/'out.safetensors')
    assert not (tmp_path/'out.safetensors').exists()


def test_encoder_file_round_trip(tmp_path, net):
    e = Encoder(net, 'facenet-random', 160, 512, mean=(127.5,)*3, std=(128.,)*3)
    back = load_encoder(save_encoder(e, tmp_path/'e.safetensors', 'facenet'))
    face = Image.new('RGB', (90, 90), 'gray')
    assert np.allclose(back.encode([face]), e.encode([face]), atol=1e-6) and back.mean == e.mean
    with pytest.raises(ValueError, match='facenet'): facenet_tower('vgg')


# copies and splits

def test_copies_are_seeded_by_place(faces):
    a, b = copy_vectors(tiny(), faces, 3), copy_vectors(tiny(), faces[:2], 3)
    assert np.allclose(a.vectors[:8], b.vectors, atol=1e-5) and len(a) == 16*4 and list(a.table['copy'][:4]) == [0, 1, 2, 3]
    assert not np.array_equal(a.vectors, copy_vectors(tiny(), faces, 3, seed=1).vectors)


def test_bad_photos_are_reported(faces, bad_files, tmp_path):
    paths = [p for ps in bad_files.values() for p in ps]
    c = copy_vectors(tiny(), pd.concat([faces, pd.DataFrame(dict(path=paths, person='p0'))], ignore_index=True), 1)
    assert len(c.report) == 16 + len(paths) and (c.report.status == 'ok').sum() == len(c)//2 and (c.report.reason[16:] != '').sum() >= len(paths) - 1


def test_folder_that_changes_during_the_run(faces, monkeypatch):
    "A photo disappears after the run has begun: its rows are missing, the rest is there, the report says so"
    gone, plain = faces.path[5], facenet.fit_size
    def fit(path, size):
        if str(path) == faces.path[2]: __import__('os').unlink(gone)
        return plain(path, size)
    monkeypatch.setattr(facenet, 'fit_size', fit)
    c = copy_vectors(tiny(), faces, 2)
    assert len(c) == 15*3 and c.report.status[5] == 'bad image' and c.report.reason[5] == 'missing'


def test_copies_file(faces, tmp_path):
    c = copy_vectors(tiny(), faces, 1); back = Copies.load(c.save(tmp_path/'c.npz'))
    assert np.array_equal(back.vectors, c.vectors) and back.table.astype(str).equals(c.table.astype(str)) and list(back.report.status) == list(c.report.status)
    with pytest.raises(ValueError): Copies.load(faces.path[0])
    none = copy_vectors(tiny(), faces[:0], 1); assert none.vectors.shape == (0, 12) and len(none) == 0


@pytest.mark.parametrize('seed', range(5))
def test_no_photo_on_both_sides(seed):
    rng = np.random.default_rng(seed)
    photos = [(f'{who}/{i}', who) for who in 'abcdefg' for i in range(rng.integers(1, 6))]
    t = pd.DataFrame([(p, w, k) for p, w in photos for k in range(41)], columns=['photo', 'person', 'copy'])
    held = split_copies(t, .2, seed=seed)
    assert not set(t.photo[held]) & set(t.photo[~held]) and set(t.person[~held]) == set('abcdefg')
    assert t.photo[held].nunique() == max(1, min(round(.2*len(photos)), len(photos) - 7))
    leaky = split_copies(t, .2, by='copy', seed=seed)
    assert leaky.sum() == round(.2*len(t)) and set(t.photo[leaky]) & set(t.photo[~leaky])


def test_leak_detector_agrees(faces):
    t = copy_vectors(tiny(), faces, 5).table
    by = {by: split_copies(t, by=by) for by in ('copy', 'photo')}
    with pytest.raises(IdentityLeak): check_leak(t[~by['copy']], t[by['copy']], near=None, people=False)
    check_leak(t[~by['photo']], t[by['photo']], near=None, people=False)


def test_split_of_little():
    t = pd.DataFrame(dict(photo=list('abc'), person=['x', 'x', 'y']))
    held = split_copies(t, .9); assert held.sum() == 1 and not held[2]
    for bad in 0, 1, -.1, 2:
        with pytest.raises(ValueError, match='share'): split_copies(t, bad)
    with pytest.raises(ValueError, match='everybody has one photo'): split_copies(t[1:])
    with pytest.raises(ValueError, match="'person'"): split_copies(t, by='person')


def test_augmentation_takes_any_size():
    aug = class_augmentation(40, seed=3)
    for size in (8, 8), (300, 20): assert aug(image=np.zeros((*size, 3), np.uint8))['image'].shape == (40, 40, 3)


# training and answers

def test_training_learns_and_repeats(faces, trained):
    assert trained.epochs.train_loss.iloc[-1] < trained.epochs.train_loss.iloc[0] - .2
    assert class_measures(trained.valid.person, trained.valid.nearest)['accuracy'] > .5
    again = train_classifier(tiny(), copy_vectors(tiny(), faces, 4), epochs=40, lr=1e-2)
    assert again.epochs.equals(trained.epochs)
    assert len(trained.references) == 16 - trained.valid.photo.nunique()


def test_rate_falls_on_a_plateau(faces):
    c = copy_vectors(tiny(), faces, 2); held = split_copies(c.table)
    learn = fit_head(c, held, sorted(set(c.table.person)), epochs=30, lr=1., patience=2)
    assert learn.epochs.lr.iloc[-1] < learn.epochs.lr.iloc[0] and list(learn.epochs.epoch) == list(range(1, 31))


def test_a_class_that_is_none(faces):
    with pytest.raises(ValueError, match='two people'): train_classifier(tiny(), copy_vectors(tiny(), faces[faces.person == 'p0'], 1))
    with pytest.raises(ValueError, match='two people, this one has 0'): train_classifier(tiny(), copy_vectors(tiny(), faces[:0], 1))
    with pytest.raises(ValueError, match='strangers'): train_classifier(tiny(), copy_vectors(tiny(), faces.replace('p0', UNKNOWN), 1))
    one_each = faces.groupby('person').head(1)
    with pytest.raises(ValueError, match='everybody has one photo'): train_classifier(tiny(), copy_vectors(tiny(), one_each, 1))
    lone = pd.concat([faces[faces.person != 'p3'], faces[faces.person == 'p3'][:1]])
    c = train_classifier(tiny(), copy_vectors(tiny(), lone, 2), epochs=2)
    assert 'p3' in c.names and 'p3' not in set(c.valid.person)


def test_batch_of_one_left_over(faces):
    "17 training pictures in batches of 16: batch norm cannot take one alone"
    c = copy_vectors(tiny(), faces, 0); c = Copies(pd.concat([c.table, c.table[:1].assign(photo='again')], ignore_index=True), np.concatenate([c.vectors, c.vectors[:1]]), c.report)
    held = np.zeros(17, bool); held[3] = True
    assert len(fit_head(c, held, ['p0', 'p1', 'p2', 'p3'], epochs=1, bs=15).epochs) == 1


def test_nothing_below_the_threshold(trained):
    v = np.random.default_rng(0).normal(size=(50, 12)).astype(np.float32)
    for t in 0, .3, .6, .99, 2:
        a = trained.answers(v, t)
        assert ((a.name == UNKNOWN) == (a.similarity < t)).all() and (a.name[a.similarity >= t] == a.nearest[a.similarity >= t]).all()
    assert len(trained.answers(v[:0])) == 0


def test_calibration_keeps_its_promise(trained):
    rng = np.random.default_rng(1); new = rng.normal(size=(100, 12)).astype(np.float32)
    for score in 'probability', 'reference':
        for fpir in 0, .01, .05, .5:
            c = calibrate_class(trained, new, fpir, score)
            assert (c.answers(new).name != UNKNOWN).mean() <= fpir + 1e-9
    assert trained.threshold == .6 and trained.score == 'probability'


def test_door_counts(trained):
    known = Copies(trained.valid[['photo', 'person', 'copy']], trained.references[:0], None)
    known.vectors = np.repeat(trained.references[:1], len(known), 0)
    d = door(trained, known, Copies(pd.DataFrame(dict(photo=list('ab'), person=['x', 'y'])), trained.references[:2], None), threshold=0)
    assert d.photos['strangers named'] == 2 and d.photos['named rightly'] + d.photos['named wrongly'] == len(known)


def test_measures_against_sklearn():
    rng = np.random.default_rng(0); who = rng.choice(list('abcde'), 200); said = np.where(rng.random(200) < .7, who, rng.choice(list('abcdef'), 200))
    m = class_measures(who, said)
    assert m['accuracy'] == pytest.approx(accuracy_score(who, said)) and m['f1'] == pytest.approx(f1_score(who, said, average='macro', labels=list('abcde')))
    assert np.array_equal(confusion_table(who, said), confusion_matrix(who, said)) and m['lo'] < m['accuracy'] < m['hi']


def test_photos_of_any_kind(trained, quick, face):
    for im in (face, face.convert('L'), face.convert('RGBA'), face.convert('P'), face.convert('I;16'), face.convert('1'), face.resize((400, 300))):
        a = trained.predict(im, 0, detector='quick'); assert a.name in trained.names and 0 <= a.similarity <= 1
    assert list(name_faces(trained, face, detector='quick').columns) == ['box', 'name', 'similarity', 'nearest']
    from facelab.images import BadImage
    with pytest.raises(BadImage): trained.predict(b'nothing')


# keeping it

def test_classifier_file(trained, tmp_path):
    v = np.random.default_rng(0).normal(size=(9, 12)).astype(np.float32)
    path = save_classifier(calibrate_class(trained, v, .1, 'reference'), tmp_path/'c.safetensors')
    back = load_classifier(path, tiny())
    assert back.score == 'reference' and back.names == trained.names and back.answers(v).equals(calibrate_class(trained, v, .1, 'reference').answers(v))
    assert [p.name for p in tmp_path.glob('.*')] == []
    with pytest.raises(ValueError, match='other weights'): load_classifier(path, tiny(scale=2))
    with pytest.raises(FileNotFoundError): load_classifier(tmp_path/'none.safetensors')
    (tmp_path/'half.safetensors').write_bytes(path.read_bytes()[:500])
    with pytest.raises(ValueError, match='half'): load_classifier(tmp_path/'half.safetensors')
    encoder_file = save_encoder(Encoder(InceptionResnetV1(), 'x', 160, 512), tmp_path/'e.safetensors', 'facenet')
    with pytest.raises(ValueError, match='not a classifier'): load_classifier(encoder_file)


@pytest.mark.parametrize('metric', ['euclidean', 'cosine'])
def test_learner_says_the_same(faces, metric):
    c = train_classifier(tiny(metric=metric), copy_vectors(tiny(metric=metric), faces, 1), epochs=3)
    learn = as_learner(c, faces)
    x = c.encoder.batch([Image.open(p) for p in faces.path])
    with torch.inference_mode(): p = learn.model.eval()(x).softmax(1).numpy()
    assert np.allclose(p, c.scores(c.encoder.encode([Image.open(p) for p in faces.path])), atol=1e-5)


def test_costs_and_tables(trained, tmp_path):
    cost = class_costs(trained, bs=2, times=1)
    assert cost['head'] == cost['parameters'] == sum(p.numel() for p in trained.head.parameters()) and cost['ms_one'] > 0
    wide = Encoder(nn.Conv2d(3, 8, 1, bias=False), 'wide', 16, 8)
    assert peak_memory(wide, 2) >= 2*8*16*16*4
    rows = [dict(system='a', accuracy=.5), dict(system='b', accuracy=.25)]
    assert save_class_table(rows, tmp_path/'t.csv').equals(pd.read_csv(tmp_path/'t.csv')) and json.loads(save_class_table(rows, tmp_path/'t.json') is not None and (tmp_path/'t.json').read_text()) == rows
    with pytest.raises(ValueError, match='.csv or .json'): save_class_table(rows, tmp_path/'t.txt')
