"The app as people meet it: a real Chromium without a window, driven by Playwright, against a server that the tests start themselves"
import io
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from PIL import Image

pytest.importorskip('gradio', reason='the app needs gradio')
sync_api = pytest.importorskip('playwright.sync_api', reason='browser tests need playwright')
CHROMIUM = next((o for o in ('/usr/bin/chromium', shutil.which('chromium'), shutil.which('chromium-browser'), shutil.which('google-chrome')) if o and Path(o).exists()), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason='browser tests need chromium (apt-get install chromium)')
WAIT = 120_000

from facelab.datasets import att_split  # noqa: E402


def photo(person, i):
    att = att_split()[1]
    return Image.open(att.path[att.person == person].iloc[i]).convert('RGB').resize((368, 448), Image.Resampling.LANCZOS)


@pytest.fixture(scope='module')
def files(tmp_path_factory):
    "Photos of AT&T people, a group, a wall, text with the name of a photo, and a file of nine megabytes"
    d = tmp_path_factory.mktemp('photos')
    for s in ('s31', 's35', 's39'):
        for i in range(4): photo(s, i).save(d/f'{s}-{i}.jpg')
    group = Image.new('RGB', (820, 500), (70, 74, 80))
    for x, (s, i) in enumerate([('s31', 5), ('s39', 5)]): group.paste(photo(s, i), (28 + 400*x, 26))
    group.save(d/'group.jpg'); Image.new('RGB', (300, 300), 'teal').save(d/'wall.png')
    (d/'text.jpg').write_text('this is no photo'); (d/'huge.jpg').write_bytes(os.urandom(9*2**20))
    face = Image.new('RGB', (640, 480), (90, 90, 90)); face.paste(photo('s31', 0), (136, 16))
    data = io.BytesIO(); face.save(data, 'JPEG', quality=90); (d/'camera.mjpeg').write_bytes(data.getvalue()*4)
    return d


@pytest.fixture(scope='module')
def server(tmp_path_factory):
    "The app in a process of its own: (address, folder that it runs in, what it wrote)"
    if url := os.environ.get('FACELAB_APP_URL'): yield url, None; return
    d = tmp_path_factory.mktemp('server')
    with socket.socket() as free: free.bind(('127.0.0.1', 0)); port = free.getsockname()[1]  # two workers may each need a server
    env = os.environ | dict(PYTHONPATH=os.pathsep.join([str(Path(__file__).parent.parent), os.environ.get('PYTHONPATH', '')]), TMPDIR=str(d))
    with open(d/'log.txt', 'wb') as log:
        p = subprocess.Popen([sys.executable, '-W', 'ignore', '-c', f'from facelab.app import facelab_app; facelab_app(port={port})'], cwd=d, env=env, stdout=log, stderr=log)
        for _ in range(1200):
            if b'http://' in (d/'log.txt').read_bytes() or p.poll() is not None: break
            time.sleep(.1)
        assert p.poll() is None, (d/'log.txt').read_text()
        yield f'http://127.0.0.1:{port}/', d
        p.send_signal(signal.SIGTERM); p.wait(60)
    said = (d/'log.txt').read_text()
    assert 'Traceback' not in said and 'base64' not in said and '.jpg' not in said and 'Ann' not in said, said
    assert not list(d.glob('facelab-app-*')), 'photos stayed behind'


@pytest.fixture(scope='module')
def browser(files):
    with sync_api.sync_playwright() as p:
        b = p.chromium.launch(executable_path=CHROMIUM, args=['--no-sandbox', '--use-fake-device-for-media-stream', f'--use-file-for-fake-video-capture={files/"camera.mjpeg"}'])
        yield b
        b.close()


@pytest.fixture
def visit(browser, server):
    "Opens the app as a new visitor; at the end nothing may have been fetched from elsewhere and no script of a name may have run"
    contexts, outside, alarms = [], [], []

    def _visit(width=1200, height=900, **kw):
        c = browser.new_context(viewport=dict(width=width, height=height), **kw); contexts.append(c)
        page = c.new_page(); page.set_default_timeout(WAIT)
        page.on('request', lambda r: r.url.startswith((server[0], 'data:', 'blob:')) or outside.append(r.url))
        page.on('dialog', lambda o: (alarms.append(o.message), o.dismiss()))
        page.goto(server[0]); page.get_by_role('tab', name='Recognise').wait_for()
        return page

    yield _visit
    for c in contexts: c.close()
    assert outside == [] and alarms == []


def tab(page, name):
    "Opens a tab, also where the narrow page keeps it in a menu"
    o = page.get_by_role('tab', name=name)
    if not o.first.is_visible(): page.locator('.overflow-menu button').first.click(); page.get_by_role('button', name=name).first.click()
    else: o.first.click()


def give(page, where, *paths): page.locator(f'{where} input[type=file]').set_input_files([str(p) for p in paths])


def enrol(page, name, *paths):
    tab(page, 'Enrol and forget')
    page.locator('#name input, #name textarea').fill(name); give(page, '#files', *paths)
    page.locator('#enrolled .fl-card').nth(len(paths) - 1).wait_for()
    page.locator('#consent input').check(); page.locator('#enrol').click()
    page.locator('#enrolled .fl-good').wait_for()


def recognise(page, path, wait='#seen img.fl-photo'):
    tab(page, 'Recognise'); give(page, '#photo', path); page.locator(wait).first.wait_for()
    return page.locator('#seen').inner_text()


def test_upload_and_slider(visit, files):
    page = visit()
    assert 'Choose a photo' in page.locator('#seen').inner_text()
    enrol(page, 'Ann', *(files/f's31-{i}.jpg' for i in range(3)))
    said = recognise(page, files/'group.jpg')
    assert '2 faces' in said and 'Ann' in said and '1 unknown' in said
    page.locator('#threshold input[type=number]').fill('.95'); page.locator('#threshold input[type=number]').press('Enter')
    page.locator('#seen', has_text='2 unknown').wait_for()
    assert 'Ann' not in page.locator('#seen').inner_text()
    slider = page.locator('#threshold input[type=range]'); slider.focus()
    for _ in range(9): slider.press('ArrowLeft')
    page.locator('#seen', has_text='Ann').wait_for()


def test_verify(visit, files):
    page = visit(); tab(page, 'Verify')
    give(page, '#first', files/'s31-0.jpg'); page.locator('#verdict', has_text='Choose two photos').wait_for()
    give(page, '#second', files/'s31-3.jpg'); page.locator('#verdict .fl-same').wait_for()
    assert page.locator('#verdict .fl-crop').count() == 2 and 'Mistakes of this kind' in page.locator('#verdict').inner_text()
    page.locator('#second [aria-label="Remove Image"]').click()
    page.locator('#verdict', has_text='Choose two photos').wait_for()
    give(page, '#second', files/'s39-0.jpg'); page.locator('#verdict .fl-other').wait_for()


def test_names_do_nothing_and_people_can_go(visit, files):
    page, evil = visit(), '<img src=x onerror=alert(1)>'
    enrol(page, evil, files/'s35-0.jpg', files/'s35-1.jpg'); enrol(page, '../../x', files/'s31-0.jpg')
    assert evil in page.locator('#people').last.inner_text() and '../../x' in page.locator('#people').last.inner_text()
    assert page.locator('img[src="x"]').count() == 0
    assert evil in recognise(page, files/'s35-3.jpg')
    tab(page, 'Enrol and forget'); page.locator('#goes input').click(); page.get_by_role('option', name=evil).click()
    page.locator('#forget').click(); page.locator('#no').click(); page.locator('#yes').wait_for(state='hidden')
    page.locator('#forget').click(); page.locator('#yes').click()
    page.locator('#forgotten', has_text='is forgotten').wait_for()
    assert '../../x' in page.locator('table', has_text='photos').last.inner_text() and evil not in page.locator('table', has_text='photos').last.inner_text()
    assert page.locator('img[src="x"]').count() == 0
    page.locator('#name input, #name textarea').fill('A'*10_000)
    assert len(page.locator('#name input, #name textarea').input_value()) <= 80


def test_bad_and_huge_files(visit, files):
    page = visit()
    assert 'this is text' in recognise(page, files/'text.jpg', '#seen [role=alert]')
    tab(page, 'Verify'); give(page, '#first', files/'huge.jpg')
    page.get_by_text(re.compile('maximum|too large|larger than|exceed', re.I)).first.wait_for()
    assert 'No face was found' in recognise(page, files/'wall.png')


def test_two_sessions(visit, files):
    ann, bob = visit(), visit()
    enrol(ann, 'Annabel Lee', files/'s31-0.jpg', files/'s31-1.jpg')
    assert '1 unknown' in recognise(bob, files/'s31-3.jpg') and 'Annabel Lee' in recognise(ann, files/'s31-3.jpg')
    tab(bob, 'Enrol and forget'); bob.get_by_text('Nobody is enrolled yet').wait_for()
    assert 'Annabel' not in bob.content()


def test_keyboard_only(visit, files):
    page = visit()

    def reach(selector, key='Tab', most=60):
        for _ in range(most):
            page.keyboard.press(key)
            if page.evaluate('s => { const a = document.activeElement; return !!a && (a.matches(s) || !!a.closest(s)) }', selector): return
        raise AssertionError(f'the keyboard does not reach {selector}')

    def press_until_asked(selector, seconds=10):
        "Space, as a person would: again, when a busy page has not answered the first time"
        for _ in range(WAIT//(1000*seconds)):
            try:
                with page.expect_file_chooser(timeout=1000*seconds) as chosen: page.keyboard.press('Space')
                return chosen.value
            except sync_api.TimeoutError:
                if not page.evaluate('s => !!document.activeElement?.closest(s)', selector): reach(selector)
        raise AssertionError(f'{selector} asks for no file')

    page.get_by_role('tab', name='Recognise').focus()
    reach('[role=tab]:nth-of-type(3)'); page.keyboard.press('Enter'); page.locator('#enrol').wait_for()
    reach('#name'); page.keyboard.type('Ann')
    reach('#files')
    press_until_asked('#files').set_files([str(files/'s31-0.jpg'), str(files/'s31-1.jpg')]); page.locator('#enrolled .fl-card').nth(1).wait_for()
    reach('#consent'); page.keyboard.press('Space'); reach('#enrol'); page.keyboard.press('Enter')
    page.locator('#enrolled', has_text='Ann is enrolled with 2 of 2').wait_for()


def test_telephone(visit, files):
    page = visit(360, 740, has_touch=True, is_mobile=True)
    recognise(page, files/'group.jpg')
    for name in ('Recognise', 'Verify', 'Enrol and forget'):
        tab(page, name)
        assert page.evaluate('document.scrollingElement.scrollWidth <= window.innerWidth'), f'{name} is wider than the telephone'


def test_camera_refused(visit):
    page = visit(permissions=[]); tab(page, 'Collect')
    page.locator('#camera').get_by_text('Click to Access Webcam').click()
    page.locator('.fl-alarm', has_text='The camera cannot be used: the browser was not allowed').wait_for()
    page.locator('#who input, #who textarea').fill('Ann'); page.locator('#begin').click(); page.locator('#collected', has_text='ask first').wait_for()


def test_collect(visit, server, tmp_path):
    page = visit(permissions=['camera']); tab(page, 'Collect')
    page.locator('#who input, #who textarea').fill('Ann'); page.locator('#where input, #where textarea').fill(str(tmp_path))
    page.locator('#may input').check(); page.locator('#begin').click(); page.locator('#collected', has_text='Look into the camera').wait_for()
    page.locator('#camera').get_by_text('Click to Access Webcam').click()
    page.locator('#camera').get_by_text('Record').click()
    page.locator('#live img').wait_for()
    page.locator('#anchor').click(); page.locator('#collected', has_text='anchor 1 saved').wait_for()
    page.locator('#positive').click(); page.locator('#collected', has_text='positive 1 saved').wait_for()
    page.locator('#finish').click(); page.locator('#collected', has_text='1 anchor, 1 positive').wait_for()
    assert [len(list((tmp_path/'people'/'Ann'/o).glob('*.jpg'))) for o in ('anchor', 'positive')] == [1, 1]
