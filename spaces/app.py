"""facelab as a public demo, for Hugging Face Spaces (`python spaces/app.py` shows it on this computer only).

Every visitor starts with the AT&T people, in memory, for themselves alone; what they upload is deleted within a minute,
whom they enrol is gone when they leave. Nothing is written to the disk that outlives the process.
"""
import os
import signal
import sys
import threading
from functools import cache

import torch
from PIL import Image

from facelab import app
from facelab.datasets import att_faces
from facelab.desk import recognise
from facelab.embed import get_encoder
from facelab.folder import embed_folder
from facelab.gallery import Gallery

ON_SPACES = 'SPACE_ID' in os.environ
HOST = os.environ.get('GRADIO_SERVER_NAME') or ('0.0.0.0' if ON_SPACES else '127.0.0.1')
PORT = int(os.environ.get('GRADIO_SERVER_PORT') or 7860)
WARNING = """<div role="note" style="border:2px solid #c24e00;border-radius:8px;padding:.6rem .9rem;margin:.5rem 0">
<b>This is a public demo.</b> It starts with forty people of the AT&amp;T faces (AT&amp;T Laboratories Cambridge, 1992 to 1994) and with nobody else.
Show it only photos of yourself, or of people who have agreed. Photos are sent to the computer that runs this page and deleted there within a minute;
whom you enrol is known to your browser window only and forgotten when you close it. It makes mistakes, more often for some groups of people than for others;
a photo of a photo fools it. Decide nothing about anybody with it.</div>"""


@cache
def att_people(photos=2):
    "Vectors of the first photos of the forty AT&T people"
    table = att_faces().groupby('person').head(photos)
    return embed_folder(table.assign(person='AT&T ' + table.person), None, 'dlib', 'adaptive', workers=1, progress=False)


class Demo(app.House):
    "Each visitor has a gallery of their own, and it begins with the AT&T people"
    def of(self, session):
        own = self.guests.get(session, 'gallery')
        return own if own is not None else self.guests.put(session, 'gallery', Gallery.from_embeddings(att_people(), encoder=get_encoder('dlib')))


def main():
    torch.set_num_threads(2)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))  # so that what was uploaded is removed on the way out
    house = Demo(local=False, notice=WARNING)
    recognise(house.of(None), Image.new('RGB', (320, 240)))
    page = app.start_app(house, HOST, PORT)
    print(f'facelab demo: {page.local_url}', flush=True)
    try: threading.Event().wait()
    except KeyboardInterrupt: pass
    finally: house.close()


if __name__ == '__main__': main()
