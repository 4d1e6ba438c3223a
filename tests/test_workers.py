"Work shared among processes: nothing lost, nothing twice, in bounded memory, whoever dies."
import itertools
import os
import signal
import subprocess
import sys
import time

import pytest

from facelab.workers import WorkerDied, chunks, cores, share


def squares(numbers): return [n*n for n in numbers]


def dies_at(n, marker=None):
    "Work that kills its process at `n`; with a marker file only as long as that is not there"
    def work(numbers):
        if n in numbers and not (marker and marker.exists()):
            if marker: marker.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return squares(numbers)
    return work


@pytest.mark.parametrize('workers, size, n', [(1, 16, 40), (2, 1, 7), (2, 5, 23), (3, 16, 10), (2, 16, 0), (None, 4, 9)])
def test_everything_once(workers, size, n): assert sorted(share(squares, range(n), workers, size)) == [(i, i*i) for i in range(n)]


def test_items_need_not_be_hashable_or_different():
    items = [dict(n=1), dict(n=1), dict(n=2)]
    assert sorted(v for _, v in share(lambda xs: [x['n'] for x in xs], items, workers=2, size=1)) == [1, 1, 2]


def test_items_are_taken_as_needed():
    taken = []
    def numbers():
        for i in itertools.count(): taken.append(i); yield i
    stream = share(squares, numbers(), workers=2, size=3)
    got = [next(stream) for _ in range(12)]
    assert len(set(got)) == 12 and len(taken) <= 12 + 3*5
    stream.close()


@pytest.mark.parametrize('at', [0, 5, 39])
def test_a_deadly_item(at):
    got = dict(share(dies_at(at), range(40), workers=2, size=4))
    assert isinstance(got.pop(at), WorkerDied) and got == {i: i*i for i in range(40) if i != at}


def test_several_deadly_items():
    def work(numbers):
        if any(n % 10 == 3 for n in numbers): os.kill(os.getpid(), signal.SIGKILL)
        return squares(numbers)
    got = dict(share(work, range(25), workers=2, size=4))
    assert {n for n, v in got.items() if isinstance(v, WorkerDied)} == {3, 13, 23} and len(got) == 25


def test_an_accident_is_repaired(tmp_path):
    assert dict(share(dies_at(5, tmp_path/'seen'), range(20), workers=2, size=4)) == {i: i*i for i in range(20)}


@pytest.mark.parametrize('workers', [1, 2])
def test_errors_come_out_and_the_pool_lives(workers):
    with pytest.raises(ZeroDivisionError): list(share(lambda xs: [1//x for x in xs], range(5), workers))
    with pytest.raises(ValueError, match='zip'): list(share(lambda xs: xs[:-1], range(5), workers))
    assert dict(share(squares, range(5), workers)) == {i: i*i for i in range(5)}


class Unsendable:
    def __reduce__(self): return int, ('no number',)


def test_work_that_cannot_be_sent_is_an_error_and_no_death():
    thing = Unsendable()
    with pytest.raises(Exception, match='serialize|no number') as e: list(share(lambda xs: [thing]*len(xs), range(3), workers=2))
    assert not isinstance(e.value, WorkerDied)
    assert dict(share(squares, range(5), workers=2)) == {i: i*i for i in range(5)}


def test_refused():
    with pytest.raises(ValueError, match='at least one'): list(share(squares, [1], workers=0))
    assert list(chunks(range(3), 2)) == [[0, 1], [2]] and cores() >= 1


def test_threads_are_shared_out(): assert {v for _, v in share(lambda xs: [os.environ['OMP_NUM_THREADS'] for _ in xs], range(4), workers=2, size=1)} == {str(max(1, cores()//2))}


@pytest.mark.skipif(sys.platform != 'linux', reason='looks for processes in /proc')
def test_control_c_leaves_nobody_behind(tmp_path):
    script = 'import time\nfrom facelab.workers import share\ndef slow(xs): time.sleep(.2); return xs\nfor x, _ in share(slow, range(1000), workers=2, size=1): print(x, flush=True)'
    p = subprocess.Popen([sys.executable, '-c', script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler))
    for _ in range(3): p.stdout.readline()
    os.kill(p.pid, signal.SIGINT)
    _, err = p.communicate(timeout=60)
    assert p.returncode != 0 and 'KeyboardInterrupt' in err
    def left():
        return [o for o in os.listdir('/proc') if o.isdigit() and o != str(os.getpid()) and _session(o) == p.pid]
    end = time.monotonic() + 20
    while left() and time.monotonic() < end: time.sleep(.2)
    assert not left()


def _session(pid):
    try: return int(open(f'/proc/{pid}/stat').read().rsplit(')', 1)[1].split()[3])
    except OSError: return None
