"Benchmarks of facelab: each one measures a single claim, and says so in its last line."
import argparse
import json
import time
from statistics import median


def parser(doc, repeats):
    "The arguments every benchmark has"
    p = argparse.ArgumentParser(description=doc.splitlines()[0])
    p.add_argument('--repeats', type=int, default=repeats, help='turns of each way')
    p.add_argument('--threads', type=int, default=2, help='threads of PyTorch')
    p.add_argument('--json', help='also write the result to this file')
    return p


def turns(ways, repeats, n):
    "Seconds per item of each way, called in turn `repeats` times after one call that does not count"
    for f in ways.values(): f()
    runs = {k: [] for k in ways}
    for _ in range(repeats):
        for k, f in ways.items():
            start = time.perf_counter(); f()
            runs[k].append((time.perf_counter() - start)/n)
    return runs


def numbers(runs):
    "Medians, in milliseconds"
    return {k: median(v)*1000 for k, v in runs.items()}


def report(args, runs, ratio, headline, ratios={}, **more):
    "Print all runs, further ratios, and the ratio last; write JSON if asked"
    print(headline)
    for k, v in numbers(runs).items():
        print(f'{k:>32}: {v:8.2f} ms  (fastest {min(runs[k])*1000:.2f}, slowest {max(runs[k])*1000:.2f})')
    for k, v in ratios.items(): print(f'{k:>32}: {v:8.2f}')
    if args.json:
        result = dict(ratio=ratio, ratios=ratios, milliseconds=numbers(runs), runs=runs, settings=vars(args), headline=headline, **more)
        with open(args.json, 'w', encoding='utf-8') as f: json.dump(result, f, indent=1)
    print(f'ratio: {ratio:.1f}')
