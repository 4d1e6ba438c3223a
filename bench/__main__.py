"""All benchmarks, one after another, and their ratios in one table.

    python -m bench [--dest DIR] [--summary]

Each writes DIR/NAME.json (default: bench-results/). The table goes to nbs/images/speed.csv, which the README shows.
With --summary nothing is measured; the table is made from what is in DIR. About twenty minutes on two cores.
"""
import argparse
import json
import subprocess
import sys
from pathlib import Path

import pandas as pd

from facelab.datasets import data_root

RUNS = {'encode': 'encode', 'detect': 'detect', 'att': 'folder --data att --hog --floor', 'lfw': 'folder --data lfw --hog', 'train': 'train', 'metrics': 'metrics'}


def load(dest, name):
    path = dest/f'{name}.json'
    return json.loads(path.read_text(encoding='utf-8')) if path.exists() else None


def rows(dest):
    "One row per claim: what, milliseconds of the other side and of facelab, ratio, command"
    def row(what, theirs, ours, name, unit='ms'):
        return {'what': what, 'the other': f'{theirs:.1f} {unit}', 'facelab': f'{ours:.1f} {unit}', 'ratio': f'{(theirs/ours if unit == "ms" else ours/theirs):.1f}', 'command': f'python -m bench.{RUNS[name].split(" --hog")[0]}'}
    if r := load(dest, 'encode'):
        ms = r['milliseconds']
        theirs = ms['face_encodings, given boxes']
        yield row(f'a face to 128 numbers, {r["batch"]} at a time', theirs, ms[f'facelab, given boxes, {r["batch"]} at a time'], 'encode')
        yield row('a face to 128 numbers, one at a time', theirs, ms['facelab, given boxes, one at a time'], 'encode')
    if r := load(dest, 'detect'):
        ms = r['milliseconds']
        yield row('CNN detection, 250 x 250, in batches', ms['dlib, a batch'], ms['facelab, a batch'], 'detect')
        yield row('CNN detection, 250 x 250, one photo', ms['dlib, one by one'], ms['facelab, one by one'], 'detect')
    for name, what in (('att', 'AT&T photos (doubled)'), ('lfw', 'LFW photos')):
        if r := load(dest, name): yield row(f'{what}: file to vectors', *(r['milliseconds'][k] for k in ('face_recognition', 'facelab')), name)
    if r := load(dest, 'train'):
        speed = r['images_per_second']
        plain = max(v for k, v in speed.items() if k.startswith('plain'))
        yield row('training ResNet34, 224 pixels, mixed precision where there are units for it', plain, speed['facelab, classifier'], 'train', 'images/s')
        yield row('the same in floats on both sides', plain, speed['facelab, classifier, floats'], 'train', 'images/s')
    if r := load(dest, 'metrics'):
        kind = min(('float64', 'float32', 'float64, ties'), key=r['ratios'].get)
        yield row(f'ROC of {r["settings"]["scores"]:,} scores ({kind})', *(r['milliseconds'][f'{k}, {kind}'] for k in ('scikit-learn', 'facelab')), 'metrics')


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument('--dest', default='bench-results', help='folder for the JSON files')
    p.add_argument('--summary', action='store_true', help='only make the table')
    a = p.parse_args(argv)
    dest = Path(a.dest); dest.mkdir(parents=True, exist_ok=True)
    for name, command in RUNS.items() if not a.summary else ():
        if name == 'lfw' and not (data_root()/'lfw_home').is_dir(): continue
        module, *options = command.split()
        print(f'\n== python -m bench.{command}', flush=True)
        subprocess.run([sys.executable, '-W', 'ignore', '-m', f'bench.{module}', *options, '--json', str(dest/f'{name}.json')], check=True)
    table = pd.DataFrame(rows(dest))
    table.to_csv(Path(__file__).parent.parent/'nbs'/'images'/'speed.csv', index=False)
    print('\n' + table.to_string(index=False))


if __name__ == '__main__': main()
