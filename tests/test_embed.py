"Encoders, scores and embeddings: one photo gives one vector however it comes in, and no file is trusted."
import os
import pickle
import subprocess
import sys
import threading
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from torch import nn

from facelab.embed import (Embeddings, Encoder, Tower, embed, encoder_from, encoders, fit_size, get_encoder, load_batch, load_npz,
                           photo_table, pixel_stats, recipe, register_encoder, save_npz, similarity)


class Small(nn.Module):
    "A small network with batch normalisation and dropout, so that train mode would show"
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Conv2d(3, 8, 5, 2), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(.5), nn.AdaptiveAvgPool2d(2), nn.Flatten())
        self.seen = []
    def forward(self, x): self.seen.append(len(x)); return self.net(x)


def small(**kw): return Encoder(Small(), name='small', size=48, dim=32, **kw)


@pytest.fixture
def e(): return small()


@pytest.fixture
def emb():
    v = np.random.default_rng(0).normal(size=(6, 4)).astype(np.float32)
    return Embeddings(v, ['Ann', 'Ann', '李雷', "O'Neil, jr.", 'Žofie', ''], dict(encoder='small', metric='cosine'), [f'{i}.png' for i in range(6)])


# ---- encoder

def test_one_photo_one_embedding(e, face, tmp_path):
    face.save(tmp_path/'a.png')
    want = e.encode([face])
    for same in (tmp_path/'a.png', str(tmp_path/'a.png'), np.array(face), (tmp_path/'a.png').read_bytes()):
        assert np.allclose(e.encode([same]), want, atol=1e-6)
    others = [Image.effect_noise((60, 70), 80) for _ in range(6)]
    for bs in (1, 2, 64): assert np.allclose(e.encode([*others, face], bs=bs)[-1:], want, atol=1e-6)


def test_grey_sizes_types(e, face):
    got = e.encode([face.convert('L'), np.array(face)[..., 0], face.resize((300, 20)), face.convert('RGBA')])
    assert got.shape == (4, 32) and got.dtype == np.float32 and np.allclose(np.linalg.norm(got, axis=1), 1, atol=1e-6)
    assert e.encode([]).shape == (0, 32) and e.encode([]).dtype == np.float32


def test_modes_and_gradients(e, face):
    want = e.encode([face, face.rotate(90)])
    e.module.train()
    assert np.array_equal(e.encode([face, face.rotate(90)]), want) and not e.module.training
    assert not any(p.grad is not None for p in e.module.parameters())
    assert np.array_equal(np.stack([want[0]]), e.encode([face])) or np.allclose(want[:1], e.encode([face]), atol=1e-6)


def test_batches(e, face):
    e.module.seen.clear(); e.encode([face]*5, bs=2)
    assert e.module.seen == [2, 2, 1]


def test_metric_decides_about_length(face):
    raw, unit = small(metric='euclidean').encode([face]), small().encode([face])
    assert abs(np.linalg.norm(raw) - 1) > 1e-3 and np.allclose(raw/np.linalg.norm(raw), unit, atol=1e-6)


def test_black_photo_is_no_nan():
    pool = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
    e = Encoder(pool, 'mean', 16, 3, mean=(0., 0., 0.), std=(255.,)*3)
    assert np.array_equal(e.encode([Image.new('RGB', (16, 16))]), [[0, 0, 0]])


def test_wrong_fields(face):
    for kw in (dict(metric='manhattan'), dict(align='loose')):
        with pytest.raises(ValueError): small(**kw)
    with pytest.raises(ValueError, match='pooling'): Encoder(nn.Conv2d(3, 4, 3), 'flat', 48, 4).encode([face])
    with pytest.raises(ValueError, match='expected'): Encoder(Small(), 'dim', 48, 31).encode([face])


def test_fit(face):
    assert fit_size(face, 50).size == (50, 50) and np.array_equal(np.asarray(fit_size(fit_size(face, 50), 50)), np.asarray(fit_size(face, 50)))


# ---- scores

@pytest.mark.parametrize('metric', ['cosine', 'euclidean'])
@pytest.mark.parametrize('scale', [1e-3, 1, 1e3])
def test_similarity_is_the_double_loop(metric, scale):
    rng = np.random.default_rng(1)
    a, b = rng.normal(size=(5, 128))*scale, rng.normal(size=(7, 128))*scale
    one = (lambda p, q: p @ q/np.linalg.norm(p)/np.linalg.norm(q)) if metric == 'cosine' else (lambda p, q: 1 - np.linalg.norm(p - q))
    want = np.array([[one(p, q) for q in b] for p in a])
    got = similarity(a, b, metric)
    assert got.dtype == np.float32 and np.allclose(got, want, rtol=1e-6, atol=1e-6)
    assert np.allclose(similarity(b, a, metric), got.T)


@pytest.mark.parametrize('metric', ['cosine', 'euclidean'])
def test_identical_scores_one(metric):
    v = np.random.default_rng(2).normal(size=(300, 512)).astype(np.float32)
    assert np.allclose(similarity(v, v, metric).diagonal(), 1, atol=2e-6)
    assert similarity(np.zeros((0, 512)), v, metric).shape == (0, 300)
    assert np.isfinite(similarity(np.zeros((1, 512)), v, metric)).all()


def test_similarity_unknown_metric():
    with pytest.raises(ValueError, match='metric'): similarity([[1.]], [[1.]], 'l2')


# ---- files

def test_there_and_back(emb, tmp_path):
    f = emb.save(tmp_path/'new folder'/'e.npz')
    back = Embeddings.load(f)
    assert back.names == emb.names and back.recipe == emb.recipe and back.paths == emb.paths
    assert back.vectors.dtype == np.float32 and np.array_equal(back.vectors, emb.vectors)
    assert os.listdir(f.parent) == ['e.npz']
    with np.load(f, allow_pickle=False) as z: assert set(z.files) == {'vectors', 'names', 'recipe', 'paths'} and all(z[k].dtype != object for k in z.files)


def test_empty_there_and_back(tmp_path):
    none = Embeddings(np.zeros((0, 128)), [], dict(encoder='dlib'))
    back = Embeddings.load(none.save(tmp_path/'e.npz'))
    assert len(back) == 0 and back.vectors.shape == (0, 128) and back.paths is None and len(back['Ann']) == 0


@pytest.mark.parametrize('part', [0, 1, .1, .5, .9, .999])
def test_cut(emb, tmp_path, part):
    f = emb.save(tmp_path/'e.npz')
    data = f.read_bytes(); f.write_bytes(data[:int(len(data)*part) if part < 1 else 1])
    with pytest.raises(ValueError, match='e.npz'): Embeddings.load(f)


def test_damaged_inside(emb, tmp_path):
    "A flipped byte in the numbers is found by the archive's checksum"
    f = Embeddings(np.random.default_rng(0).normal(size=(500, 64)), ['a']*500, {}).save(tmp_path/'e.npz')
    data = bytearray(f.read_bytes()); data[len(data)//2] ^= 255; f.write_bytes(data)
    with pytest.raises(ValueError, match='e.npz'): Embeddings.load(f)


class Bomb:
    def __reduce__(self): return exec, ("raise SystemExit('a pickle was executed')",)


def test_pickle_refused(tmp_path):
    f = tmp_path/'evil.npz'
    np.savez(f, vectors=np.zeros((1, 2)), names=np.array([Bomb()], dtype=object), recipe=np.array('{}'))
    with pytest.raises(ValueError, match='pickled'): Embeddings.load(f)
    f.write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(ValueError, match='evil.npz'): Embeddings.load(f)
    np.save(tmp_path/'evil.npy', np.array([Bomb()], dtype=object))
    with pytest.raises(ValueError): Embeddings.load(tmp_path/'evil.npy')


def test_foreign(tmp_path):
    with pytest.raises(FileNotFoundError): Embeddings.load(tmp_path/'no.npz')
    for name, content in (('a.npz', b'hello'), ('b.npz', b''), ('c.npz', b'PK\x03\x04' + bytes(100))):
        (tmp_path/name).write_bytes(content)
        with pytest.raises(ValueError, match=name): Embeddings.load(tmp_path/name)
    np.save(tmp_path/'plain.npy', np.zeros(3))
    with pytest.raises(ValueError): load_npz(tmp_path/'plain.npy')
    np.savez(tmp_path/'other.npz', x=np.zeros(3))
    with pytest.raises(ValueError, match='lacks vectors, names, recipe'): Embeddings.load(tmp_path/'other.npz')


@pytest.mark.parametrize('bad', [dict(vectors=np.zeros((2, 3))), dict(vectors=np.zeros(1)), dict(recipe=np.array('{')), dict(recipe=np.array('[1]')),
                                 dict(vectors=np.array([['a']])), dict(names=np.array('Ann')), dict(paths=np.array(['a', 'b']))])
def test_contradictory(tmp_path, bad):
    f = save_npz(tmp_path/'odd.npz', **(dict(vectors=np.zeros((1, 3)), names=np.array(['Ann']), recipe=np.array('{}')) | bad))
    with pytest.raises(ValueError, match='odd.npz'): Embeddings.load(f)


def test_interrupted_save_keeps_the_old_file(emb, tmp_path, monkeypatch):
    f = emb.save(tmp_path/'e.npz'); old = f.read_bytes()
    def half(file, **arrays): file.write(b'PK half'); raise KeyboardInterrupt
    monkeypatch.setattr('facelab.embed.np.savez_compressed', half)
    with pytest.raises(KeyboardInterrupt): emb.save(f)
    assert f.read_bytes() == old and os.listdir(tmp_path) == ['e.npz']


def test_many_writers_one_whole_file(tmp_path):
    es = [Embeddings(np.full((50, 8), i), [str(i)]*50, {}) for i in range(8)]
    ts = [threading.Thread(target=o.save, args=(tmp_path/'e.npz',)) for o in es]
    for t in ts: t.start()
    for t in ts: t.join()
    back = Embeddings.load(tmp_path/'e.npz')
    assert (back.vectors == float(back.names[0])).all() and os.listdir(tmp_path) == ['e.npz']


# ---- Embeddings

def test_rows(emb):
    assert np.array_equal(emb[1], emb.vectors[1]) and np.array_equal(emb[np.int64(-1)], emb.vectors[-1])
    assert emb['Ann'].paths == ['0.png', '1.png'] and len(emb['nobody']) == 0 and emb[1:3].names == ['Ann', '李雷']
    mask = np.array(emb.names) == 'Žofie'
    for m in (mask, mask.tolist(), pd.Series(mask)): assert emb[m].paths == ['4.png']
    assert emb[[5, 0]].names == ['', 'Ann'] and len(emb[[]]) == 0 and emb[[0]].recipe == emb.recipe
    with pytest.raises(IndexError): emb[6]
    with pytest.raises(IndexError): emb[[9]]


def test_compared_by_identity(emb, e):
    assert emb == emb and emb != emb[:] and len({e, small()}) == 2


def test_lengths_must_agree():
    with pytest.raises(ValueError): Embeddings(np.zeros((2, 3)), ['a'], {})
    with pytest.raises(ValueError): Embeddings(np.zeros((1, 3)), ['a'], {}, ['x', 'y'])
    with pytest.raises(ValueError): Embeddings(np.zeros(3), ['a']*3, {})


# ---- embed

def test_bad_files_are_rows(e, bad_files, att):
    bad = [(reason, f) for reason, fs in bad_files.items() if reason != 'too large' for f in fs]
    paths = [p for i, (_, f) in enumerate(bad) for p in (f, att.path[i])]
    got = embed(pd.DataFrame(dict(path=paths, person=[f'p{i}' for i in range(len(paths))])), e, bs=4)
    assert len(got.report) == len(paths) and list(got.report.columns) == ['path', 'person', 'status', 'reason', 'row']
    assert list(got.report.reason[::2]) == [r for r, _ in bad] and set(got.report.status[1::2]) == {'ok'}
    assert list(got.report.row[1::2]) == list(range(len(bad))) and set(got.report.row[::2]) == {-1}
    assert got.names == [f'p{i}' for i in range(1, len(paths), 2)]
    assert np.allclose(got.vectors, e.encode(list(att.path[:len(bad)])), atol=1e-6)


def test_sources(e, people_dir, att, tmp_path):
    by_folder = embed(people_dir, e)
    assert set(by_folder.names) == set(os.listdir(people_dir)) and len(by_folder) == 16
    flat = tmp_path/'flat'; flat.mkdir(); (flat/'Ann.pgm').write_bytes(Path(att.path[0]).read_bytes())
    assert embed(flat, e).names == embed(str(flat), e).names == ['Ann']
    table = att[3:6]
    want = embed(table, e)
    assert want.names == ['s01']*3 and want.paths == list(table.path)
    for same in (list(table.path), [np.array(Image.open(p)) for p in table.path], [Image.open(p) for p in table.path], iter(table.path)):
        assert np.allclose(embed(same, e).vectors, want.vectors, atol=1e-6)
    assert embed([np.zeros((20, 20), np.uint8)], e).paths is None
    assert len(embed(att.path[0], e)) == len(embed(np.zeros((20, 20), np.uint8), e)) == 1
    nothing = tmp_path/'nothing'; nothing.mkdir()
    for empty in ([], att[:0], nothing):
        got = embed(empty, e)
        assert got.vectors.shape == (0, 32) and len(got.report) == 0


def test_nonsense_in_a_list_is_a_row(e, face):
    got = embed([face, None, 7, b'', face], e, bs=2)
    assert len(got) == 2 and list(got.report.status) == ['ok', 'bad image', 'bad image', 'bad image', 'ok'] and got.report.reason[1:4].ne('').all()


def test_decoding_is_batch_by_batch(e, att, monkeypatch):
    "No more decoded photos than one batch at a time"
    sizes = []
    def watched(items, size): sizes.append(len(items)); return load_batch(items, size)
    monkeypatch.setattr('facelab.embed.load_batch', watched)
    embed(att[:10], e, bs=4)
    assert sizes == [4, 4, 2]


def test_silent_in_tests(e, att, capsys):
    embed(att[:3], e, bs=1)
    assert capsys.readouterr().out == ''
    embed(att[:3], e, bs=1, progress=True)


def test_recipe(e, att):
    assert recipe(e, 'cnn', 2) == dict(detector='cnn', upsample=2, align='margin', size=48, encoder='small', metric='cosine')
    assert embed(att[:1], e, detector='cnn', upsample=0).recipe == recipe(e, 'cnn', 0)
    assert recipe('dlib') == dict(detector='hog', upsample=1, align='chip', size=150, encoder='dlib', metric='euclidean')


def test_photo_table_keeps_every_row(att):
    t = att[:4].set_index(pd.Index([7, 7, 7, 7]))
    assert list(photo_table(t).index) == [0, 1, 2, 3] and photo_table(t.drop(columns='person')).person[0] == '1'


# ---- names and learners

def test_register():
    made = []
    register_encoder('test small', lambda: made.append(1) or small())
    assert 'test small' in encoders() and not made
    assert get_encoder('test small') is get_encoder('test small') and made == [1]
    register_encoder('test small', 'no.such.module:f')
    with pytest.raises(ModuleNotFoundError): get_encoder('test small')
    with pytest.raises(ValueError, match='dlib'): get_encoder('nobody')


def test_embed_does_not_import_the_models():
    code = "import sys, facelab.embed; print([m for m in sys.modules if m.startswith(('facelab.models', 'facelab.train', 'dlib', 'fastai', 'face_recog'))])"
    out = subprocess.run([sys.executable, '-W', 'ignore', '-c', code], capture_output=True, text=True, cwd=find_spec('facelab').submodule_search_locations[0] + '/..')
    assert out.stdout.strip() == '[]', out.stdout + out.stderr


class Twin(nn.Module):
    def __init__(self): super().__init__(); self.body = Small()
    def embed(self, x): return self.body(x)
    def forward(self, a, b): return self.embed(a) - self.embed(b)


class Learn:
    "What encoder_from needs of a Learner"
    def __init__(self, model): self.model = model


def test_encoder_from_is_a_copy(face):
    learn = Learn(Twin())
    e = encoder_from(learn, name='twin', size=48)
    before = e.encode([face])
    learn.model.train()
    for p in learn.model.parameters(): p.data += 1
    assert np.array_equal(e.encode([face]), before) and learn.model.training
    assert (e.name, e.dim, e.metric, e.align) == ('twin', 32, 'cosine', 'margin')


def test_encoder_from_vision_learner_pools(face):
    from torchvision.models import resnet18
    body = nn.Sequential(*list(resnet18(weights=None).children())[:-2])
    e = encoder_from(Learn(nn.Sequential(body, nn.Linear(512, 2))), size=64)
    assert e.dim == 512 and e.encode([face]).shape == (1, 512)
    x = torch.rand(2, 3, 64, 64)
    with torch.inference_mode(): assert torch.allclose(Tower(nn.Sequential(body.eval(), nn.Identity()))(x), body(x).mean((2, 3)), atol=1e-6)


def test_pixel_stats():
    from types import SimpleNamespace as N
    norm = N(mean=torch.tensor([.485, .456, .406])[None, :, None, None], std=torch.tensor([.229, .224, .225])[None, :, None, None])
    mean, std = pixel_stats(N(dls=N(after_batch=N(fs=[N(), norm]))))
    assert np.allclose(mean, [123.675, 116.28, 103.53], atol=1e-3) and np.allclose(std, [58.395, 57.12, 57.375], atol=1e-3)
    assert pixel_stats(N()) == ((0.,)*3, (255.,)*3)
