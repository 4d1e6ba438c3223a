"""How much faster than face_recognition does facelab turn faces into numbers, with the same network?

    python -m bench.encode [--faces 64] [--batch 32] [--repeats 7] [--threads 2] [--encoder dlib] [--json FILE]

Both sides get the same decoded photos (AT&T faces at twice their size) with the same face boxes. `face_encodings(photo, [box])`
finds five landmarks, turns the face upright and computes its descriptor; facelab does exactly these three things. dlib's bare
descriptor function, which gets chips that are upright already, is set against the same in facelab. All ways and the
multiplication of matrices that gives the limit take turns; medians count. Three lines are judged:

    one at a time   given boxes, facelab one face after another, against face_encodings   (wanted: >= 5)
    limit           chips, in batches: time over operations / measured GEMM rate         (wanted: <= 2)
    ratio           given boxes, in batches, against face_encodings                      (wanted: >= 20)
"""
import argparse
import json
import warnings

import numpy as np
import torch

from facelab.crop import align_face
from facelab.datasets import att_faces
from facelab.detect import detect
from facelab.embed import get_encoder
from facelab.images import load_image
from facelab.models.dlib_resnet import weights_path
from facelab.speed import count_flops, time_each, vector_change

SIDE = 1024  # of the matrices
THEIRS, DLIB, BARE = 'face_encodings, given boxes', 'dlib descriptor, given chips', 'dlib descriptor, list of chips'


def some_photos(n):
    "Up to `n` photos at twice their size with the box of their face inside the photo, the first photos of everybody first"
    table, out = att_faces(), []
    for path in table.assign(i=table.groupby('person').cumcount()).sort_values('i', kind='stable').path:
        photo = load_image(path)
        photo = np.array(photo.resize((2*photo.width, 2*photo.height)))
        inside = [f.box for f in detect(photo) if min(f.box.top, f.box.left) > 0 and f.box.bottom < photo.shape[0] and f.box.right < photo.shape[1]]
        if inside: out.append((photo, inside[0]))
        if len(out) == n: break
    return out


def ways_of(photos, chips, encoder, batch, few):
    "By name: (what to call, how many faces it does)"
    import dlib, face_recognition
    reference = dlib.face_recognition_model_v1(str(weights_path()))
    a, b, out = (torch.rand(SIDE, SIDE) for _ in range(3))
    upright = lambda which: [align_face(p, box) for p, box in which]
    ways = {THEIRS: (lambda: [face_recognition.face_encodings(p, [tuple(box)])[0] for p, box in photos[:few]], few),
            DLIB: (lambda: [reference.compute_face_descriptor(c) for c in chips[:few]], few),
            BARE: (lambda: reference.compute_face_descriptor(chips[:few]), few),
            f'facelab, given boxes, {batch} at a time': (lambda: encoder.encode(upright(photos), batch), len(photos)),
            'facelab, given boxes, one at a time': (lambda: [encoder.encode(upright([o])) for o in photos[:few]], few),
            f'facelab, given chips, {batch} at a time': (lambda: encoder.encode(chips, batch), len(chips)),
            'facelab, given chips, one at a time': (lambda: [encoder.encode([c]) for c in chips[:few]], few),
            'matrices': (lambda: torch.mm(a, b, out=out), 1)}
    return ways


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument('--faces', type=int, default=64, help='how many faces facelab gets in batches')
    p.add_argument('--few', type=int, default=8, help='how many faces those get that take one after another')
    p.add_argument('--batch', type=int, default=32, help='faces at a time')
    p.add_argument('--repeats', type=int, default=7, help='turns of each way')
    p.add_argument('--threads', type=int, default=torch.get_num_threads(), help='threads of PyTorch')
    p.add_argument('--encoder', default='dlib', help="name of facelab's side: 'dlib', or 'dlib-bf16' for other numbers and more speed")
    p.add_argument('--json', help='also write the result to this file')
    a = p.parse_args(argv)
    warnings.simplefilter('ignore')
    torch.set_num_threads(a.threads)
    photos, encoder = some_photos(a.faces), get_encoder(a.encoder)
    few, chips = min(a.few, len(photos)), [np.array(align_face(p, box)) for p, box in photos]
    ways = ways_of(photos, chips, encoder, a.batch, few)
    ours = encoder.encode(chips, a.batch)[:few]
    gaps = {'same boxes': vector_change(np.array(ways[THEIRS][0]()), ours)['largest'], 'same chips': vector_change(np.array([list(o) for o in ways[DLIB][0]()]), ours)['largest']}
    runs = time_each({k: f for k, (f, _) in ways.items()}, a.repeats)/[n for _, n in ways.values()]
    ms = (runs.median()*1000).to_dict()
    rate = 2*SIDE**3/ms.pop('matrices')*1000
    limit = count_flops(encoder.module, encoder.size)/rate*1000
    batched, single, chips_b, chips_1 = (ms[k] for k in list(ms)[3:])
    bare = min(ms[DLIB], ms[BARE])
    result = {'chips, in batches': bare/chips_b, 'chips, one at a time': bare/chips_1, 'one at a time': ms[THEIRS]/single, 'limit': chips_b/limit, 'ratio': ms[THEIRS]/batched}
    print(f'{len(photos)} faces, {a.repeats} turns, {a.threads} threads of PyTorch, encoder {a.encoder!r}; largest difference of a number: ' + ', '.join(f'{v:.1e} ({k})' for k, v in gaps.items()))
    for k, v in ms.items(): print(f'{k:>37}: {v:7.2f} ms a face  (fastest {runs[k].min()*1000:.2f}, slowest {runs[k].max()*1000:.2f})')
    print(f'{"matrices of " + str(SIDE):>37}: {rate/1e9:.0f} GFLOP/s, so a face takes {limit:.2f} ms at the least')
    for k in ('chips, in batches', 'chips, one at a time'): print(f"{k}: {result[k]:.1f} (against dlib's bare descriptor, the faster of its two ways)")
    for k in ('one at a time', 'limit'): print(f'{k}: {result[k]:.2f}')
    if a.json:
        with open(a.json, 'w', encoding='utf-8') as f:
            json.dump(result | dict(milliseconds=ms, gflops=rate/1e9, limit_ms=limit, largest_difference=max(gaps.values()), differences=gaps, faces=len(photos), batch=a.batch, repeats=a.repeats, threads=a.threads, encoder=a.encoder, runs=runs.to_dict('list')), f, indent=1, default=float)
    print(f'ratio: {result["ratio"]:.1f}')


if __name__ == '__main__': main()
