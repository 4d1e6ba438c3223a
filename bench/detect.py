"""How much faster than dlib is dlib's CNN face detector in PyTorch, and does it draw the same boxes?

    python -m bench.detect [--photos 16] [--repeats 5] [--threads 2] [--json FILE]

Photos of 250 x 250 pixels: LFW where FACELAB_DATA has it, else AT&T portraits enlarged and laid on grey. All ways get the
same arrays and take turns. dlib is measured one photo at a time and as one batch of all; so is facelab. dlib's HOG detector
with the photo doubled once, the default of face_recognition, runs along. The ratio is batch against batch, by medians.
"""
import numpy as np
from PIL import Image

from bench import numbers, parser, report, turns
from facelab.datasets import att_faces, data_root, lfw
from facelab.detect import Box, dlib_file, hog
from facelab.images import load_image
from facelab.models.dlib_mmod import Mmod, compare_boxes


def square_photos(n, side=250):
    "`n` photos of 250 x 250 pixels, and what they are"
    if (data_root()/'lfw_home').is_dir(): return [np.array(load_image(p)) for p in lfw().sample(n, random_state=0).path], 'LFW'
    pages = [Image.new('RGB', (side, side), 'grey') for _ in range(n)]
    for page, path in zip(pages, att_faces().path[::max(1, 400//n)]): page.paste(load_image(path).resize((184, 224)), (33, 13))
    return [np.array(o) for o in pages], 'AT&T on grey'


def main(argv=None):
    import dlib
    import torch
    p = parser(__doc__, repeats=5)
    p.add_argument('--photos', type=int, default=16, help='how many')
    a = p.parse_args(argv)
    torch.set_num_threads(a.threads)
    photos, data = square_photos(a.photos)
    theirs, ours = dlib.cnn_face_detection_model_v1(str(dlib_file('mmod_human_face_detector.dat'))), Mmod()
    runs = turns({
        'dlib, one by one': lambda: [theirs(o, 0) for o in photos],
        'dlib, a batch': lambda: theirs(photos, 0, batch_size=len(photos)),
        'facelab, one by one': lambda: [ours.boxes([o]) for o in photos],
        'facelab, a batch': lambda: ours.boxes(photos),
        'HOG, doubled once': lambda: [hog(o, 1) for o in photos]}, a.repeats, len(photos))
    boxes = [[Box(t, r, b, l) for l, t, r, b in found[0].tolist()] for found in ours.boxes(photos)]
    same = compare_boxes(boxes, [[Box(d.rect.top(), d.rect.right(), d.rect.bottom(), d.rect.left()) for d in theirs(o, 0)] for o in photos])
    ms = numbers(runs)
    single = ms['dlib, one by one']/ms['facelab, one by one']
    ratio = ms['dlib, a batch']/ms['facelab, a batch']
    report(a, runs, ratio, f'{len(photos)} photos of 250 x 250 ({data}), {a.threads} threads of PyTorch; of {same["theirs"]} boxes of dlib {same["matched"]} found again, {same["added"]} added',
           {'one by one': single, 'against HOG, doubled': ms['HOG, doubled once']/ms['facelab, one by one']}, same=same)


if __name__ == '__main__': main()
