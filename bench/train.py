"""How many images a second does training take in, fed by the plain fastai recipe and fed by facelab.batches?

    python -m bench.train [--json FILE] [--repeats 3] [--threads 2] [--size 224] [--bs 32]

Both sides train the same ResNet34 from random weights, everything unfrozen, on the same crops of AT&T faces, with the same
batch size and the same number of steps. They take turns, so that a busy moment of the machine hits both.
A turn is one `Learner.fit` of a few steps; the first step of each turn, in which worker processes start, is not counted.

- classifier: `DataBlock(ImageBlock, CategoryBlock)`, `Resize`, `aug_transforms()`, `vision_learner`, as in fastai's tutorials,
  with no worker process and with two; the better one counts. facelab: `crop_dls` with the same `aug_transforms()`, `speed_up`.
- pairs: the two towers of lesson 05 (`pair_dls`, bs/2 pairs a step) against all pairs of a batch (bs faces a step): equally
  many faces through the network per step. facelab learns from (bs - 1) times as many pairs; that is not counted.

images/s is the batch size over the median seconds of a step. The last line is the ratio of the classifier as each side comes:
fastai's recipe in 32-bit floats; facelab in mixed precision where the processor has units for bfloat16 (lesson 05b shows what
that does to the result), else in 32-bit floats too. The ratio with 32-bit floats on both sides is printed as well.
"""
import argparse
import json
import tempfile
import time
import warnings
from statistics import median

import torch

with warnings.catch_warnings(action='ignore', category=FutureWarning): from fastai.vision.all import *

from facelab.batches import StepTimer, batch_pair_learner, bf16_units, cache_crops, crop_dls, speed_up
from facelab.crop import crop_folder, crops_of
from facelab.datasets import att_faces
from facelab.pairs import make_pairs
from facelab.train import pair_dls, siamese_learner

CLASSIFIER, PAIRS = ('plain fastai, no workers', 'plain fastai, 2 workers'), ('two towers, a pair at a time',)


def some_crops(folder, n, size):
    "The first `n` crops of AT&T faces"
    return crops_of(crop_folder(att_faces()[:n + 20], folder, size=size, workers=1, progress=False))[:n].reset_index(drop=True)


def plain_classifier(crops, held, size, bs, workers):
    "What fastai's tutorials do"
    block = DataBlock((ImageBlock, CategoryBlock), get_x=ColReader('path'), get_y=ColReader('person'), splitter=IndexSplitter(held),
                      item_tfms=Resize(size), batch_tfms=[*aug_transforms(), Normalize.from_stats(*imagenet_stats)])
    return vision_learner(block.dataloaders(crops, bs=bs, num_workers=workers), resnet34, pretrained=False, normalize=False)


def learners(folder, size, bs, steps):
    "Every way of feeding, by name; each has `steps` batches in an epoch"
    crops, n = some_crops(folder, steps*bs + 8, size), steps*bs
    held = list(range(n, len(crops)))
    start = time.perf_counter(); pixels, report = cache_crops(crops, size); once = time.perf_counter() - start
    train, valid, half = report[:n], report[n:], bs//2
    fast = lambda **k: speed_up(vision_learner(crop_dls(pixels, train, valid, bs, batch_tfms=aug_transforms()), resnet34, pretrained=False, normalize=False), **k)
    ways = {name: plain_classifier(crops, held, size, bs, w) for name, w in zip(CLASSIFIER, (0, 2))}
    ways['facelab, classifier'] = fast()
    ways['facelab, classifier, floats'] = fast(bf16=False)
    pairs = pair_dls(make_pairs(crops, half*steps, seed=1), make_pairs(crops, 8, seed=2), size=size, bs=half)
    ways[PAIRS[0]] = siamese_learner(pairs, init='none')
    ways['facelab, all pairs of a batch'] = batch_pair_learner(crop_dls(pixels, train, report, bs, per_person=3), init='none', bf16=False)
    for learn in ways.values(): learn.unfreeze()
    return ways, once/len(crops)


class NoValidation(Callback):
    "Training steps only"
    def before_validate(self): raise CancelValidException


def turn(learn):
    "Seconds of each step of one epoch but the first"
    clock = StepTimer()
    with learn.no_bar(), learn.no_logging(): learn.fit(1, 1e-4, cbs=[clock, NoValidation()])
    return (clock.table().sum(axis=1)/1000).tolist()


def measure(ways, repeats):
    "Seconds of every step of each way, taking turns"
    runs = {k: [] for k in ways}
    for _ in range(repeats):
        for k, learn in ways.items(): runs[k] += turn(learn)
    return runs


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument('--repeats', type=int, default=3, help='turns of each way')
    p.add_argument('--threads', type=int, default=torch.get_num_threads(), help='threads of PyTorch')
    p.add_argument('--size', type=int, default=224, help='side of the crops, pixels')
    p.add_argument('--bs', type=int, default=32, help='faces in a step')
    p.add_argument('--steps', type=int, default=3, help='steps of a turn; the first is not counted')
    p.add_argument('--json', help='also write the result to this file')
    a = p.parse_args(argv)
    if a.steps*a.bs > 376: p.error('steps times batch size must not exceed 376, the crops there are')
    if a.steps < 2 or a.repeats < 1: p.error('two steps and one repeat at least: the first step of a turn is not counted')
    torch.set_num_threads(a.threads)
    with tempfile.TemporaryDirectory() as folder:
        ways, once = learners(folder, a.size, a.bs, a.steps)
        runs = measure(ways, a.repeats)
    speed = {k: a.bs/median(v) for k, v in runs.items()}
    ratios = dict(classifier=speed['facelab, classifier']/max(speed[k] for k in CLASSIFIER),
                  pairs=speed['facelab, all pairs of a batch']/max(speed[k] for k in PAIRS))
    ratios['classifier, floats'] = speed['facelab, classifier, floats']/max(speed[k] for k in CLASSIFIER)
    print(f'ResNet34, {a.size} pixels, {a.bs} faces a step, {len(runs[PAIRS[0]])} steps each, {a.threads} threads of PyTorch; decoding once: {1000*once:.1f} ms a crop')
    for k, v in runs.items(): print(f'{k:>32}: {speed[k]:6.2f} images/s  ({1000*median(v):.0f} ms a step, fastest {1000*min(v):.0f}, slowest {1000*max(v):.0f})')
    kind = 'mixed precision' if bf16_units() else 'floats, since this processor has no units for bfloat16'
    print(f"classifier: {ratios['classifier']:.2f} times the images ({kind}), {ratios['classifier, floats']:.2f} with floats on both sides; pairs: {ratios['pairs']:.2f} times the images and {ratios['pairs']*(a.bs - 1):.0f} times the pairs (floats)")
    if a.json:
        with open(a.json, 'w', encoding='utf-8') as f:
            json.dump(dict(ratio=ratios['classifier'], ratios=ratios, images_per_second=speed, seconds=runs, decode_once=once, size=a.size, bs=a.bs, repeats=a.repeats, steps=a.steps, threads=a.threads), f, indent=1)
    print(f"ratio: {ratios['classifier']:.2f}")


if __name__ == '__main__': main()
