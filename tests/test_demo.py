"The main job on folders that people really have: too small, empty, broken, or just enough."
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from facelab.datasets import att_faces, split_people
from facelab.demo import COLUMNS, NotEnough, demo, judge, write_report
from facelab.embed import embed
from facelab.gallery import Gallery
from facelab.images import load_image
from facelab.models.baselines import pixels_encoder


def class_of(folder, people, photos):
    "A folder of `people` AT&T people with `photos` photos each"
    for person, t in list(att_faces().groupby('person'))[:people]:
        (folder/person).mkdir(parents=True)
        for path in t.path[:photos]: load_image(path).save(folder/person/f'{Path(path).stem}.png')
    return folder


def spoil(folder):
    for p in folder.rglob('*.png'): p.write_bytes(p.read_bytes()[:100])


@pytest.mark.parametrize('people, photos, spoiled, message', [
    (1, 3, False, 'only one person'), (2, 1, False, 'one photo of each person'), (2, 2, True, 'no face found in any of the 4 photos')])
def test_too_little_is_said(tmp_path, people, photos, spoiled, message):
    folder = class_of(tmp_path/'class', people, photos)
    if spoiled: spoil(folder)
    with pytest.raises(NotEnough, match=message): demo(str(folder), tmp_path/'out', progress=False)


def test_one_line_on_the_command_line(tmp_path):
    (tmp_path/'empty').mkdir()
    command = Path(sys.executable).parent/'facelab-demo'
    p = subprocess.run([command, '--data', tmp_path/'empty', '--out', tmp_path/'out'], capture_output=True, text=True, timeout=120)
    last = p.stderr.strip().splitlines()[-1]
    assert p.returncode == 2 and last.startswith('facelab-demo: ') and 'no folders of people' in last and 'Traceback' not in p.stderr


def test_small_class_with_a_bad_file_and_a_strange_name(tmp_path):
    folder = class_of(tmp_path/'class', 4, 2)
    (folder/'s04').rename(folder/'<b>Zoë & Søn')
    (folder/'s01'/'broken.jpg').write_bytes(b'')
    table, notes = demo(str(folder), tmp_path/'out', progress=False)
    assert list(table.columns) == COLUMNS and list(table.system) == ['raw pixels', 'dlib encoder']
    assert '9 photos of 4 people; no face found or not readable: 1' in notes[0]
    assert table.rank1[1] == 4/5  # the unreadable photo counts as a miss
    page = (tmp_path/'out'/'report.html').read_text(encoding='utf-8')
    assert '<b>' not in page and 'data:image/png;base64,' in page and 'http' not in page
    assert pd.read_csv(tmp_path/'out'/'report.csv').status.value_counts().to_dict() == {'ok': 8, 'bad image': 1}
    assert set(Gallery.load(tmp_path/'out'/'gallery.npz').people) == {'s01', 's02', 's03', '<b>Zoë & Søn'}


def test_raw_pixels_are_what_they_were_measured_to_be():
    table = att_faces()
    strangers = split_people(table, .25, 42)[1].person.unique()
    row = judge('raw pixels', '-', embed(table, pixels_encoder(112, 'margin')), strangers, len(table))
    assert row['pairs'] == 4950 and abs(row['rank1'] - .67) < .02 and .12 < row['eer'] < .22 and row['eer_lo'] < row['eer'] < row['eer_hi']


def test_report_is_whole_or_not_there(tmp_path):
    with pytest.raises(FileNotFoundError): write_report(tmp_path/'r.html', 't', pd.DataFrame(dict(a=[np.nan])), [], [(tmp_path/'gone.png', 'x')])
    assert list(tmp_path.iterdir()) == []
