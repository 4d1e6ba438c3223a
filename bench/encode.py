"""How much faster than dlib is dlib's network in PyTorch, and does it give the same numbers?

    python -m bench.encode [--faces 64] [--repeats 7] [--threads 2] [--json FILE]

Both sides get the same aligned 150-pixel chips of AT&T faces and take turns, so that a busy moment of the machine hits
both. dlib is measured through its Python function, one chip after another; it is also given the whole list at once, and
the better of its two medians counts. facelab is measured through `Encoder.encode`, from uint8 pixels to vectors.
The ratio is dlib's seconds a face over facelab's, by medians.
"""
import argparse
import json
import time
from statistics import median

import numpy as np
import torch

from facelab.crop import NoFace, take_face
from facelab.datasets import att_faces
from facelab.models.dlib_resnet import dlib_encoder, weights_path


def some_chips(n):
    "Up to `n` aligned chips, the first photos of everybody first"
    table, chips = att_faces(), []
    for path in table.assign(i=table.groupby('person').cumcount()).sort_values('i', kind='stable').path:
        if len(chips) == n: break
        try: chips.append(np.array(take_face(path, align='chip', size=150)[0]))
        except NoFace: continue
    return chips


def seconds(f, faces):
    "Seconds a face of calling `f` once"
    start = time.perf_counter(); f()
    return (time.perf_counter() - start)/faces


def measure(chips, repeats, threads):
    "Seconds a face of each way, all runs; and the largest difference between the two"
    import dlib
    torch.set_num_threads(threads)
    reference, encoder = dlib.face_recognition_model_v1(str(weights_path())), dlib_encoder()
    ways = {'dlib, one by one': lambda: [reference.compute_face_descriptor(c) for c in chips],
            'dlib, as a list': lambda: reference.compute_face_descriptor(chips),
            'facelab, 64 at a time': lambda: encoder.encode(chips, bs=64),
            'facelab, one by one': lambda: [encoder.encode([c]) for c in chips]}
    theirs = np.array([list(o) for o in reference.compute_face_descriptor(chips)])
    worst = float(np.abs(encoder.encode(chips) - theirs).max())
    runs = {k: [] for k in ways}
    for _ in range(repeats):
        for k, f in ways.items(): runs[k].append(seconds(f, len(chips)))
    return runs, worst


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument('--faces', type=int, default=64, help='how many chips')
    p.add_argument('--repeats', type=int, default=7, help='turns of each way')
    p.add_argument('--threads', type=int, default=torch.get_num_threads(), help='threads of PyTorch')
    p.add_argument('--json', help='also write the result to this file')
    a = p.parse_args(argv)
    chips = some_chips(a.faces)
    runs, worst = measure(chips, a.repeats, a.threads)
    ms = {k: median(v)*1000 for k, v in runs.items()}
    ratio = min(ms['dlib, one by one'], ms['dlib, as a list'])/ms['facelab, 64 at a time']
    print(f'{len(chips)} chips, {a.repeats} turns, {a.threads} threads of PyTorch; largest difference {worst:.1e}')
    for k, v in ms.items(): print(f'{k:>22}: {v:7.2f} ms a face  (fastest {min(runs[k])*1000:.2f}, slowest {max(runs[k])*1000:.2f})')
    if a.json:
        with open(a.json, 'w', encoding='utf-8') as f:
            json.dump(dict(ratio=ratio, milliseconds=ms, runs=runs, largest_difference=worst, faces=len(chips), repeats=a.repeats, threads=a.threads), f, indent=1)
    print(f'ratio: {ratio:.1f}')


if __name__ == '__main__': main()
