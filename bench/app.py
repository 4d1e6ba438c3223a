"""Eight people use the app at once, for a minute.

    python -m bench.app [--users N] [--seconds N] [--json FILE]

The app is started as people start it (`facelab-app --gallery FILE`), with AT&T people enrolled. Each user is a session of its own and sends,
as fast as the answers come, a photo of a person that only this user shows; every fourth call compares two photos. An answer that names somebody else's
person, or gives an error, counts. Memory is the server's, before the first photo and half a minute after the last.

    errors       answers that were none                                    (wanted: 0)
    cross-talk   answers that belong to another user's photo               (wanted: 0)
    p95          95 % of the answers took at most so long
    ratio        memory afterwards over memory after the first answers     (wanted: about 1)
"""
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np

from . import parser


def enrolled(folder, users):
    "A gallery of as many AT&T people as there are users, and their other photos as files"
    from facelab.datasets import att_split
    from facelab.desk import enrol_person, keep_gallery
    from facelab.gallery import Gallery
    att, gallery, photos = att_split()[1], Gallery('dlib', 'adaptive'), {}
    for person in list(dict.fromkeys(att.person))[:users]:
        paths = list(att.path[att.person == person])
        enrol_person(gallery, person, paths[:3], True)
        photos[person] = [as_jpeg(p, folder/f'{person}-{i}.jpg') for i, p in enumerate(paths[3:6])]
    return keep_gallery(gallery, folder/'people.npz'), photos


def as_jpeg(source, path):
    "A photo of a size that telephones send, about two million pixels"
    from PIL import Image
    Image.open(source).convert('RGB').resize((1288, 1568), Image.Resampling.LANCZOS).save(path, quality=90)
    return path


def memory(pid):
    "What a process holds, MB"
    return int(Path(f'/proc/{pid}/status').read_text().split('VmRSS:')[1].split()[0])/1e3


class User(threading.Thread):
    "One session: sends photos of one person until time is up"
    def __init__(self, url, person, photos, until):
        super().__init__(daemon=True)
        self.url, self.person, self.photos, self.until, self.seconds, self.errors, self.crossed = url, person, photos, until, [], [], 0

    def ask(self, client, i):
        from gradio_client import handle_file
        a, b = (handle_file(str(self.photos[j % len(self.photos)])) for j in (i, i + 1))
        if i % 4 == 3: return client.predict(a, b, api_name='/verify')['matched'] is True
        names = [f['name'] for f in client.predict(a, None, api_name='/recognise')['faces']]
        return names == [self.person]

    def run(self):
        from gradio_client import Client
        client, i = Client(self.url, verbose=False), 0
        while time.monotonic() < self.until:
            start = time.monotonic()
            try: self.crossed += not self.ask(client, i)
            except Exception as e: self.errors.append(f'{type(e).__name__}: {e}')
            self.seconds.append(time.monotonic() - start); i += 1


def start(gallery, port):
    "The app as a process, and the seconds until it answers"
    import httpx
    began = time.monotonic()
    p = subprocess.Popen([sys.executable, '-W', 'ignore', '-c', f'from facelab.app import facelab_app; facelab_app(gallery={str(gallery)!r}, port={port})'], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while time.monotonic() - began < 120 and p.poll() is None:
        try: httpx.get(f'http://127.0.0.1:{port}/', trust_env=False); return p, time.monotonic() - began
        except httpx.TransportError: time.sleep(.1)
    raise SystemExit(f'the app did not start: {p.stderr.read() if p.poll() is not None else "it takes too long"}')


def main(argv=None):
    p = parser(__doc__, 1)
    p.add_argument('--users', type=int, default=8, help='at once, at most 10'); p.add_argument('--seconds', type=float, default=60); p.add_argument('--port', type=int, default=7899)
    a = p.parse_args(argv)
    os.environ['NO_PROXY'] = '127.0.0.1'
    with tempfile.TemporaryDirectory() as d:
        gallery, photos = enrolled(Path(d), a.users)
        server, started = start(gallery, a.port)
        url = f'http://127.0.0.1:{a.port}/'
        try:
            warm = User(url, *next(iter(photos.items())), time.monotonic() + 10); warm.start(); warm.join()
            before = memory(server.pid)
            users = [User(url, person, files, time.monotonic() + a.seconds) for person, files in photos.items()]
            for u in users: u.start()
            for u in users: u.join()
            peak = memory(server.pid); time.sleep(min(30, a.seconds/2)); after = memory(server.pid)
        finally:
            server.terminate(); said = server.communicate(timeout=60)
    seconds = np.array([s for u in users for s in u.seconds])
    out = dict(users=a.users, answers=len(seconds), errors=sum(len(u.errors) for u in users), crossed=sum(u.crossed for u in users), start=started, alone=float(np.median(warm.seconds[1:] or warm.seconds)),
               median=float(np.median(seconds)), p95=float(np.quantile(seconds, .95)), before=before, peak=peak, after=after, log=said[1])
    print(f'{a.users} users, {a.seconds:g} s: {out["answers"]} answers, {out["errors"]} errors, {out["crossed"]} crossed; started in {started:.1f} s')
    for e in sorted({e for u in users for e in u.errors})[:5]: print('  error:', e)
    print(f'one user alone: {out["alone"]:.2f} s an answer; all at once: median {out["median"]:.2f} s, p95 {out["p95"]:.2f} s')
    print(f'memory of the server: {before:.0f} MB before, {peak:.0f} MB right after, {after:.0f} MB later')
    if out['log'].strip(): print('log of the server:\n' + out['log'][-2000:])
    print(f'ratio: {after/before:.2f}')
    if a.json: Path(a.json).write_text(json.dumps(out, indent=1), encoding='utf-8')
    return 1 if out['errors'] or out['crossed'] else 0


if __name__ == '__main__': raise SystemExit(main())
