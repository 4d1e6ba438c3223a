"""How much faster than face_recognition does a folder of photos become embeddings, and are they as good?

    python -m bench.folder [--data att|lfw] [--photos 1000] [--repeats 5] [--json FILE]
    python -m bench.folder --memory 1000 10000

Both sides start from files and end with 128 numbers for every face they find. face_recognition: `load_image_file`,
`face_locations`, `face_encodings`, with its defaults. facelab: `embed_folder(..., faces='all')`, with its defaults. The photos are
cut into `--repeats` parts, the sides take turns on each part, and the ratio is that of the medians over the parts, by the photo.
Both have loaded their networks and started their processes before; what that took is printed.

att: the 400 AT&T portraits, doubled in size and written as PNG. lfw: photos of LFW, drawn at random (seed 0), needs FACELAB_DATA.

Neighbours: for every photo in which both found somebody, the face nearest to the middle counts. Does facelab's vector have
face_recognition's vector of the same photo as its nearest (`itself`)? Do both name the same photo among the others as
nearest (`same photo`), and the same person (`same person`)? As a floor, face_recognition is compared with itself on the same
photos with three grey pixels added at the left and the top (`--floor`), and facelab with its own HOG boxes (`--hog`).
"""
import os
import tempfile
import time
from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image

from bench import numbers, parser, report
from facelab.datasets import att_faces, data_root, lfw
from facelab.embed import similarity
from facelab.folder import embed_folder
from facelab.images import load_image


def doubled_att(folder):
    "The AT&T portraits, twice as large, as PNG files"
    table = att_faces()
    for i, p in enumerate(table.path): load_image(p).resize((184, 224), Image.Resampling.BILINEAR).save(f'{folder}/{i}.png')
    return table.assign(path=[f'{folder}/{i}.png' for i in range(len(table))])


def photos_of(data, n, folder):
    "Table of photos"
    if data == 'att': return doubled_att(folder).sample(frac=1, random_state=0).head(n).reset_index(drop=True)
    if not (data_root()/'lfw_home').is_dir(): raise SystemExit('LFW is not there: set FACELAB_DATA (data/README.md says how to get it)')
    return lfw().sample(n, random_state=0).reset_index(drop=True)


def theirs(paths, shift=0):
    "face_recognition's boxes (top, right, bottom, left) and vectors of each photo"
    import face_recognition
    out = []
    for p in paths:
        image = face_recognition.load_image_file(p)
        if shift: image = np.pad(image, ((shift, 0), (shift, 0), (0, 0)), constant_values=128)
        boxes = face_recognition.face_locations(image)
        out.append((boxes, face_recognition.face_encodings(image, boxes)))
    return out


def ours(table, **kw):
    "facelab's boxes and vectors of each photo"
    found = embed_folder(table, faces='all', progress=False, **kw)
    ends = np.cumsum(found.report.n_faces)
    return [(list(found.faces.box[a:b]), list(found.vectors[a:b])) for a, b in zip([0, *ends], ends)]


def middle(found, size):
    "The vector of the face nearest to the middle, or None"
    (boxes, vectors), (w, h) = found, size
    if not len(boxes): return None
    return vectors[int(np.argmin([abs(b[1] + b[3] - w) + abs(b[0] + b[2] - h) for b in boxes]))]


def neighbours(a, b, table):
    "How far two sets of vectors of the same photos agree about who is nearest"
    sizes = [Image.open(p).size for p in table.path]
    both = [(x, y, who) for x, y, who in zip(map(middle, a, sizes), map(middle, b, sizes), table.person) if x is not None and y is not None]
    x, y, who = (np.array(o) for o in zip(*both))
    itself = similarity(x, y, 'euclidean').argmax(1) == np.arange(len(x))
    nearest = [(similarity(v, v, 'euclidean') - 9*np.eye(len(v))).argmax(1) for v in (x, y)]
    again = np.array([(who == o).sum() > 1 for o in who])
    right = [float((who[n] == who)[again].mean()) for n in nearest]
    return dict(photos=len(x), itself=float(itself.mean()), same_photo=float((nearest[0] == nearest[1]).mean()),
                same_person=float((who[nearest[0]] == who[nearest[1]])[again].mean()), with_another_photo=int(again.sum()), rank1_ours=right[0], rank1_theirs=right[1],
                moved=float(np.median(np.linalg.norm(x - y, axis=1))))


def memory(counts):
    "Peak memory of all processes of `embed_folder`, for folders of several sizes, in megabytes"
    import subprocess, sys
    import psutil
    code = 'import sys; from facelab.datasets import lfw; from facelab.folder import embed_folder; print(len(embed_folder(lfw().head(int(sys.argv[1])), workers=2, progress=False)))'
    peaks = {}
    for n in counts:
        start, p = time.perf_counter(), subprocess.Popen([sys.executable, '-c', code, str(n)])
        tree, peak = psutil.Process(p.pid), 0
        while p.poll() is None:
            try: peak = max(peak, sum(o.memory_full_info().pss for o in [tree, *tree.children(recursive=True)]))
            except psutil.Error: pass
            time.sleep(.5)
        peaks[n] = peak/1e6
        print(f'{n:>8} photos: {peaks[n]:.0f} MB at most in all processes together, {time.perf_counter() - start:.0f} s')
    print(f'difference: {max(peaks.values()) - min(peaks.values()):.0f} MB')


def main(argv=None):
    p = parser(__doc__, repeats=5)
    p.add_argument('--data', choices=('att', 'lfw'), default='att')
    p.add_argument('--photos', type=int, default=1000, help='at most so many')
    p.add_argument('--workers', type=int, default=2, help='processes of facelab')
    p.add_argument('--floor', action='store_true', help='compare face_recognition with itself on shifted photos')
    p.add_argument('--hog', action='store_true', help='compare with facelab on the boxes of face_recognition')
    p.add_argument('--memory', type=int, nargs='+', metavar='N', help='only measure memory, for folders of N photos of LFW')
    a = p.parse_args(argv)
    if a.memory: return memory(a.memory)
    start = time.perf_counter(); import face_recognition
    cold = {'face_recognition': time.perf_counter() - start}
    with tempfile.TemporaryDirectory() as folder:
        table = photos_of(a.data, a.photos, folder)
        start = time.perf_counter(); embed_folder(table.head(2*32), workers=a.workers, progress=False); cold['facelab'] = time.perf_counter() - start
        theirs(table.path[:3])
        runs, x, y = {'face_recognition': [], 'facelab': []}, [], []
        for part in np.array_split(np.arange(len(table)), a.repeats):
            part = table.iloc[part]
            start = time.perf_counter(); y += theirs(part.path); runs['face_recognition'].append((time.perf_counter() - start)/len(part))
            start = time.perf_counter(); x += ours(part, workers=a.workers); runs['facelab'].append((time.perf_counter() - start)/len(part))
        agree = dict(facelab=neighbours(x, y, table))
        if a.hog: agree['facelab, HOG boxes'] = neighbours(ours(table, workers=a.workers, detector='hog'), y, table)
        if a.floor: agree['face_recognition, shifted by 3 pixels'] = neighbours(theirs(table.path, shift=3), y, table)
    ms = numbers(runs)
    count = lambda found: (sum(len(b) for b, _ in found), sum(not b for b, _ in found))
    faces = {'facelab': count(x), 'face_recognition': count(y)}
    fewer = sum(len(b) < len(c) for (b, _), (c, _) in zip(x, y))
    print('first photos, with loading and starting: ' + ', '.join(f'{k} {v:.1f} s' for k, v in cold.items()))
    print('faces found, photos without: ' + ', '.join(f'{k} {n}, {none}' for k, (n, none) in faces.items()) + f'; photos with fewer faces than face_recognition finds: {fewer}')
    print(pd.DataFrame(agree).T.round(4).to_string())
    report(a, runs, ms['face_recognition']/ms['facelab'], f'{len(table)} photos ({a.data}), {a.workers} workers; milliseconds a photo', faces=faces, fewer=fewer, agree=agree, cold=cold)


if __name__ == '__main__': main()
