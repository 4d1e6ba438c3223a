"The app without a browser: what comes in, what goes out, what stays, and who may ask"
import errno
import io
import os
import socket
import stat
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

pytest.importorskip('gradio', reason='the app needs gradio')
import httpx  # noqa: E402

from facelab import app as app_module  # noqa: E402
from facelab.app import (MOST_PHOTOS, House, Memory, Room, _take_files, build_app, clear_abandoned, enrol_html, facelab_app, forget_html, hash_password, hints_html, make_gate, meaning_html, password_fits,  # noqa: E402
                         people_html, polite, recognise_html, safe_text, slider_range, start_app, sweep, table_html, upload_bytes, verify_html)
from facelab.datasets import att_split  # noqa: E402
from facelab.desk import enrol_person, gallery_in_use, open_gallery  # noqa: E402
from facelab.gallery import Gallery  # noqa: E402

EVIL = ['<img src=x onerror=alert(1)>', '"><script>alert(1)</script>', '../../x', "' onmouseover='alert(1)", '&lt;b&gt;', '${alert(1)}', '[a](javascript:alert(1))', '李雷', 'é'*80]
att = att_split()[1]


def photo(person, i): return Image.open(att.path[att.person == person].iloc[i]).convert('RGB')


def sent(image, kind='PNG', **kw):
    data = io.BytesIO(); image.save(data, kind, **kw)
    return data.getvalue()


def free_port():
    with socket.socket() as o: o.bind(('127.0.0.1', 0)); return o.getsockname()[1]


@pytest.fixture(scope='module')
def face(): return sent(photo('s31', 0))


@pytest.fixture
def house():
    h = House(); yield h
    h.close()


@pytest.fixture(scope='module')
def served(tmp_path_factory):
    "A running app with one person in a file, and a short memory"
    path = tmp_path_factory.mktemp('served')/'people.npz'
    g = open_gallery(path); enrol_person(g, 'Ann', [photo('s31', i) for i in range(2)], True, path)
    h = House(path, room=Room(every=.3)); a = start_app(h, port=free_port())
    yield a, h
    a.close(verbose=False); h.close()
    assert not h.room.path.exists()


def ask(served, path, how='GET', **kw): return httpx.request(how, served[0].local_url.rstrip('/') + path, trust_env=False, timeout=60, **kw)


def send(served, data, name='face.png'): return ask(served, '/gradio_api/upload', 'POST', files=dict(files=(name, data)))


def call(served, api, *data):
    "The answer of a public function, or its error, as a program gets it"
    import json
    event = ask(served, f'/gradio_api/call/{api}', 'POST', json=dict(data=list(data))).json()['event_id']
    said = ask(served, f'/gradio_api/call/{api}/{event}').text
    kind, value = said.strip().split('\n')[:2]
    return kind.removeprefix('event: '), json.loads(value.removeprefix('data: '))


def as_file(path): return dict(path=path, meta={'_type': 'gradio.FileData'})


@pytest.mark.parametrize('name', EVIL)
def test_names_are_text(house, face, name):
    report = enrol_html(house, 'me', name, [(name, face)], True)
    g = house.of('me'); assert len(g) == 1 and 'fl-good' in report
    pages = [report, people_html(g), recognise_html(g, face, .4), hints_html(g, name, [(name, face), (name, b'no')]), forget_html(house, 'me', name), forget_html(house, 'me', name)]
    for html in pages:
        assert '<script' not in html and '<img src=x' not in html and "onmouseover='" not in html and '${' not in html.replace('${alert(1)}', '')
    assert len(house.of('me')) == 0


def test_long_names(house, face):
    assert '80 at most' in enrol_html(house, 'me', 'A'*10_000, [('a', face)], True) and len(house.of('me')) == 0
    g = Gallery('dlib', 'adaptive'); g.enrol('B'*10_000, [photo('s31', 1)], consent=True)
    for html in (people_html(g), recognise_html(g, face, .4)): assert 'B'*200 not in html and 'BBB' in html


def test_tables_escape_everything():
    html = table_html(pd.DataFrame({c: [c] for c in EVIL}), EVIL[0])
    assert '<script' not in html and '<img' not in html and table_html(pd.DataFrame(dict(a=[None, np.nan, 3, .5]))).count('–') == 2


@pytest.mark.parametrize('data,word', [(b'hello', 'text'), (b'', 'nothing in it'), (b'\0\0\0 ftypisom' + bytes(99), 'video'), (b'%PDF-1.4', 'PDF'), (b'\xff\xd8\xff\xe0' + bytes(50), 'role="alert"'), (b'0'*(8*2**20 + 1), 'larger than 8 MB')])
def test_what_is_no_photo(house, face, data, word):
    for html in (recognise_html(house.of('me'), data, .4), verify_html(house.of('me'), face, data)): assert word in html and 'role="alert"' in html
    assert word.replace('role="alert"', 'status') in enrol_html(house, 'me', 'Ann', [('a', data)], True) and len(house.of('me')) == 0


def test_many_pixels_and_odd_formats(house, face):
    bomb = sent(Image.new('L', (6000, 5000)))
    assert 'too many pixels' in recognise_html(house.of('me'), bomb, .4)
    frames = [photo('s31', i).quantize(64) for i in range(3)]
    gif = sent(frames[0], 'GIF', save_all=True, append_images=frames[1:])
    enrol_html(house, 'me', 'Ann', [('a', face)], True)
    assert 'Ann' in recognise_html(house.of('me'), gif, .4)
    heif = pytest.importorskip('pillow_heif'); heif.register_heif_opener()
    assert 'Ann' in recognise_html(house.of('me'), sent(photo('s31', 0), 'HEIF', quality=90), .4)


def test_no_face_and_empty_gallery(house, face):
    assert 'No face was found' in recognise_html(house.of('me'), sent(Image.new('RGB', (200, 200), 'teal')), .4)
    assert 'Nobody is enrolled' in recognise_html(house.of('me'), face, .4)


@pytest.mark.parametrize('threshold', [float('nan'), float('inf'), 7, 'abc', None])
def test_odd_thresholds(house, face, threshold):
    enrol_html(house, 'me', 'Ann', [('a', face)], True)
    assert isinstance(recognise_html(house.of('me'), face, threshold), str) and isinstance(meaning_html(house.of('me'), threshold), str)


@pytest.mark.parametrize('payload', [dict(path='/etc/passwd'), dict(path='../../etc/passwd'), dict(path='https://example.com/a.jpg'), dict(url='https://example.com/a.jpg'), dict(path=''), dict(path='a\0b')])
def test_only_what_was_sent(house, payload):
    with pytest.raises((ValueError, OSError)): upload_bytes(payload, house.room.path)
    os.symlink('/etc/passwd', house.room.path/'link')
    with pytest.raises(ValueError): upload_bytes(dict(path=str(house.room.path/'link')), house.room.path)


def test_not_too_many_photos(house):
    for i in range(MOST_PHOTOS + 5): (house.room.path/f'{i}.jpg').write_bytes(b'x')
    assert len(_take_files(house, 'me', [dict(path=str(house.room.path/f'{i}.jpg')) for i in range(MOST_PHOTOS + 5)])) == MOST_PHOTOS
    (house.room.path/'0.jpg').unlink()
    kept = _take_files(house, 'me', [dict(path=str(house.room.path/'0.jpg'))]); assert list(kept.values())[0][1] == b'x'


def test_consent_and_sessions(house, face):
    for consent in (False, None, 'yes', 1): assert 'ask first' in enrol_html(house, 'ann', 'Ann', [('a', face)], consent)
    enrol_html(house, 'ann', 'Ann', [('a', face)], True); house.memory.put('ann', 'photo', face)
    assert 'Ann' not in recognise_html(house.of('bob'), face, .4) and house.memory.get('bob', 'photo') is None and house.of('ann') is not house.of('bob')
    house.leave('ann'); assert house.memory.get('ann', 'photo') is None and len(house.of('ann')) == 0


def test_memory_forgets():
    m = Memory(10)
    for i in range(100): m.put(f'{i}', 'photo', i)
    m.tidy(time.monotonic() + 599); assert len(m) == 100
    m.tidy(time.monotonic() + 601); assert len(m) == 0


def test_full_disk_changes_nothing(tmp_path, face, monkeypatch):
    h = House(tmp_path/'people.npz')
    try:
        assert 'fl-good' in enrol_html(h, 'me', 'Ann', [('a', face)], True) and stat.S_IMODE((tmp_path/'people.npz').stat().st_mode) == 0o600
        before = (tmp_path/'people.npz').read_bytes()
        monkeypatch.setattr(Gallery, 'save', lambda *a: (_ for _ in ()).throw(OSError(errno.ENOSPC, 'No space left on device')))
        assert 'the disk is full' in enrol_html(h, 'me', 'Bob', [('b', sent(photo('s33', 0)))], True)
        assert h.gallery.people == ['Ann'] and (tmp_path/'people.npz').read_bytes() == before
    finally: h.close()


def test_forgotten_in_the_file(tmp_path, face):
    h = House(tmp_path/'people.npz')
    try:
        enrol_html(h, 'me', 'Annabel', [('a', face)], True); assert 'Annabel' in open_gallery(tmp_path/'people.npz')
        assert 'read again' in forget_html(h, 'me', 'Annabel') and 'Annabel' not in open_gallery(tmp_path/'people.npz')
        assert b'Annabel' not in (tmp_path/'people.npz').read_bytes()
    finally: h.close()


def test_errors_say_nothing_about_people(capfd):
    @polite
    def broken(name): raise RuntimeError(f'{name} in /home/ann/secret.jpg')
    assert 'should not have' in broken('Annabel')
    out = capfd.readouterr(); assert 'Annabel' not in out.err + out.out and 'secret' not in out.err and 'RuntimeError' in out.err


def test_sweep_is_not_fooled(tmp_path):
    late = tmp_path/'a'/'face.jpg'; late.parent.mkdir(); late.write_bytes(b'x'); os.utime(late, (4e9, 4e9))
    assert sweep(tmp_path, 30) == 0 and sweep(tmp_path, 30, time.time() + 31) == 1
    assert sweep(tmp_path/'nowhere') == 0 and clear_abandoned(tmp_path) == 0


def test_walls(served):
    for path in ('/monitoring', '/monitoring/summary', '/docs', '/openapi.json', '/gradio_api/openapi.json', '/gradio_api/runs', '/gradio_api/run-history/buckets', '/gradio_api/deep_link?session_hash=x', '/gradio_api/proxy=http://x', '/gradio_api/vibe-code',
                 '/gradio_api/dev/reload', '/manifest.json', '/pwa_icon', '/../../etc/passwd', '/gradio_api/component_server', '/gradio_api/process_recording', '/gradio_api/run/recognise', '/gradio_api/api/recognise'):
        assert ask(served, path).status_code == 404, path
    for path in ('/gradio_api/file=/etc/passwd', f'/gradio_api/file={served[1].file}', f'/gradio_api/file={Path(__file__)}'): assert ask(served, path).status_code in (403, 404), path
    page = ask(served, '/')
    assert page.status_code == 200 and page.headers['cache-control'] == 'no-store' and 'Ann' not in page.text.replace('Annot', '') and ask(served, '/config').json()['run_history'] is False and ask(served, '/config').json()['analytics_enabled'] is False


def test_other_names_and_other_sites(served):
    assert ask(served, '/', headers=dict(host='evil.example')).status_code == 421
    assert ask(served, '/gradio_api/queue/join', 'POST', json={}, headers=dict(origin='https://evil.example')).status_code == 403
    assert ask(served, '/gradio_api/call/recognise', 'POST', json=dict(data=[as_file('http://169.254.169.254/latest')])).status_code == 400
    assert ask(served, '/gradio_api/call/recognise', 'POST', content='{', headers={'content-type': 'application/json'}).status_code == 400
    assert ask(served, '/gradio_api/upload', 'POST', content=(b'x' for _ in range(3)), headers={'content-type': 'multipart/form-data; boundary=a'}).status_code == 411
    with pytest.raises(httpx.HTTPError): httpx.get(served[0].local_url.replace('127.0.0.1', '127.0.0.2'), trust_env=False, timeout=5)


def test_only_two_functions_have_names(served):
    assert sorted(ask(served, '/gradio_api/info').json()['named_endpoints']) == ['/recognise', '/verify']
    for name in {f.api_name for f in served[0].fns.values()} - {'recognise', 'verify', None}: assert ask(served, f'/gradio_api/call/{name}', 'POST', json=dict(data=[])).status_code == 404, name


def test_api(served, face):
    path = send(served, face).json()[0]
    kind, (answer,) = call(served, 'recognise', as_file(path), .4); assert kind == 'complete' and [f['name'] for f in answer['faces']] == ['Ann']
    other = send(served, sent(photo('s39', 0))).json()[0]
    kind, (answer,) = call(served, 'verify', as_file(path), as_file(other)); assert kind == 'complete' and answer['matched'] is False
    kind, said = call(served, 'recognise', as_file(send(served, b'hello', 'a.jpg').json()[0]), None); assert kind == 'error' and 'text' in str(said)
    for bad in (None, 'text', 7, as_file('/etc/passwd'), as_file('')): assert call(served, 'recognise', bad, .4)[0] == 'error'
    assert call(served, 'recognise', as_file(path), 9)[0] == 'error'


def test_large_uploads(served):
    r = send(served, b'0'*(8*2**20 + 1)); assert r.status_code == 413 and 'maximum' in r.text


def test_uploads_do_not_stay(served, face):
    served[1].room.age = 1.5
    path = send(served, face, 'my secret.png').json()[0]
    assert Path(path).is_relative_to(served[1].room.path) and stat.S_IMODE(served[1].room.path.stat().st_mode) == 0o700
    first = ask(served, f'/gradio_api/file={path}'); assert first.status_code == 200 and first.headers['cache-control'] == 'no-store'
    for _ in range(60):
        if not list(served[1].room.path.iterdir()): break
        time.sleep(.2)
    served[1].room.age = 30
    assert not list(served[1].room.path.iterdir()) and ask(served, f'/gradio_api/file={path}').status_code in (403, 404)


def test_password(face, tmp_path, capfd):
    h = House(tmp_path/'people.npz')
    try:
        enrol_html(h, 'me', 'Annabel', [('a', face)], True)
        a = start_app(h, port=free_port(), gate=make_gate('ann', hash_password('correct horse'), .01)); url = a.local_url.rstrip('/')
        with httpx.Client(trust_env=False, timeout=30) as c:
            for path in ('/config', '/gradio_api/info', '/gradio_api/file=x'): assert c.get(url + path).status_code == 401
            assert c.post(url + '/gradio_api/upload', files=dict(files=('a.png', face))).status_code == 401 and c.post(url + '/gradio_api/call/recognise', json=dict(data=[None, None])).status_code == 401
            assert 'Annabel' not in c.get(url + '/').text
            for user, password in (('ann', 'wrong'), ('bob', 'correct horse'), ('ann', 'correct hors'), ('', ''), ('ann', 'x'*2000)): assert c.post(url + '/login', data=dict(username=user, password=password)).status_code in (400, 422)
            assert c.post(url + '/login', data=dict(username='ann', password='correct horse')).status_code == 200 and c.get(url + '/config').status_code == 200
        a.close(verbose=False)
    finally: h.close()
    out = capfd.readouterr(); assert 'horse' not in out.out + out.err and 'Annabel' not in out.out + out.err


def test_constant_time(monkeypatch):
    calls = []; real = app_module.hmac.compare_digest
    monkeypatch.setattr(app_module.hmac, 'compare_digest', lambda a, b: calls.append((len(a), len(b))) or real(a, b))
    kept = hash_password('correct horse')
    assert password_fits('correct horse', kept) and not password_fits('x', kept) and calls[0] == calls[1] and calls[0][0] == calls[0][1]


def test_gallery_in_use(tmp_path, capsys):
    script = f"from filelock import FileLock\nimport sys\nwith FileLock({str(tmp_path/'.people.npz.lock')!r}): print('mine', flush=True); sys.stdin.read()"
    p = subprocess.Popen([sys.executable, '-c', script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert p.stdout.readline() == 'mine\n'
        with pytest.raises(SystemExit) as e: facelab_app(gallery=str(tmp_path/'people.npz'), port=free_port())
        said = capsys.readouterr().err; assert e.value.code == 2 and 'in use by another' in said and len(said.splitlines()) == 1
    finally: p.communicate('')
    with gallery_in_use(tmp_path/'people.npz'): pass


def test_wrong_use(tmp_path, capsys):
    with socket.socket() as o:
        o.bind(('127.0.0.1', 0)); o.listen()
        for kw, word in ((dict(port=o.getsockname()[1]), 'another program has it'), (dict(host='0.0.0.0'), '--auth'), (dict(public=True, gallery='x.npz'), 'names in the gallery'), (dict(auth=f'ann:{tmp_path}/none'), 'password file none'), (dict(encoder='nobody', port=free_port()), 'nobody')):
            with pytest.raises(SystemExit) as e: facelab_app(**kw)
            said = capsys.readouterr().err; assert e.value.code == 2 and len(said.splitlines()) == 1 and 'Traceback' not in said and word in said, said


def test_public_pages_do_not_touch_the_disk():
    h = House(local=False)
    try: labels = [b.label for b in build_app(h).blocks.values() if type(b).__name__ == 'Tab']
    finally: h.close()
    assert 'Collect' not in labels and 'Evaluate my folder' not in labels and 'Recognise' in labels and 'What it must not be used for' in labels


def test_nobody_is_told(house, monkeypatch):
    import gradio.analytics
    def told(*a, **k): raise AssertionError('telemetry')
    for o in ('version_check', 'initiated_analytics', 'launched_analytics', 'error_analytics', '_do_analytics_request'): monkeypatch.setattr(gradio.analytics, o, told, raising=False)
    monkeypatch.setattr('gradio.networking.setup_tunnel', told); monkeypatch.setenv('GRADIO_SHARE', 'True'); monkeypatch.setenv('GRADIO_ANALYTICS_ENABLED', 'True'); monkeypatch.setenv('SPACE_ID', '')
    a = start_app(house, port=free_port())
    assert not a.share and not a.analytics_enabled and a.server_name == '127.0.0.1' and a.max_file_size == 8*2**20
    a.close(verbose=False)


def test_slider_holds_the_threshold():
    for metric, t in (('cosine', .7), ('cosine', .31), ('euclidean', .4), ('euclidean', .37), ('l1', -2.), ('cosine', .99)):
        r = slider_range(metric, t); assert r['minimum'] <= t <= r['maximum'] <= 1 and r['step'] in (.01, .05)
