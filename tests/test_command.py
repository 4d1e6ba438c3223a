"Files that commands write: whole, for the right readers, and asked for before the work."
import os

import pytest

from facelab.command import can_write, write_whole


def test_the_old_text_stays_until_the_new_one_is_whole(tmp_path, monkeypatch):
    write_whole(tmp_path/'a'/'b.txt', 'old')
    def fail(*args): raise OSError(28, 'No space left on device')
    monkeypatch.setattr(os, 'replace', fail)
    with pytest.raises(OSError): write_whole(tmp_path/'a'/'b.txt', 'new')
    assert (tmp_path/'a'/'b.txt').read_text() == 'old' and os.listdir(tmp_path/'a') == ['b.txt']


def test_private_files_stay_private_and_lines_stay_as_they_are(tmp_path):
    path = tmp_path/'names.csv'
    write_whole(path, 'for everybody'); path.chmod(0o644)
    write_whole(path, 'group,name\r\n1,Zoë\r\n', 0o600)
    assert path.stat().st_mode & 0o77 == 0 and path.read_bytes() == 'group,name\r\n1,Zoë\r\n'.encode()
    (tmp_path/'d').mkdir()
    with pytest.raises(OSError): write_whole(tmp_path/'d', 'x')
    assert sorted(os.listdir(tmp_path)) == ['d', 'names.csv']


def test_asked_before_the_work(tmp_path):
    can_write(tmp_path/'new'/'result.csv'); can_write(tmp_path/'figures', folder=True)
    assert sorted(os.listdir(tmp_path)) == ['figures', 'new'] and not os.listdir(tmp_path/'new')
    (tmp_path/'file').write_text('x')
    for path, folder in ((tmp_path/'new', False), (tmp_path/'file', True)):
        with pytest.raises(ValueError, match='give the name'): can_write(path, folder)
    with pytest.raises(OSError): can_write(tmp_path/'file'/'below.csv')
    assert (tmp_path/'file').read_text() == 'x'
