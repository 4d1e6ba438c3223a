"The table of all systems: rows made once, failures told, comparisons on the same questions"
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from facelab import leaderboard as lb
from facelab.protocols import RESULT_COLUMNS, Protocol, Result, read_results

ROOT = Path(__file__).resolve().parent.parent


def result(right, people=None, name='toy', task='pairs'):
    right = np.asarray(right, dtype=bool); people = people if people is not None else np.arange(len(right)).astype(str)
    trials = pd.DataFrame(dict(left_person=people, right_person=people, person=people, right=right))
    measures = pd.DataFrame([dict(value=right.mean(), lo=0., hi=1., n=len(right), of='pairs')], index=['accuracy'])
    return Result('a', Protocol(name, task, trials), {}, measures, trials, pd.DataFrame(), 1., 2.)


def test_compare_needs_the_same_questions():
    with pytest.raises(ValueError, match='different questions'): lb.compare(result([1, 0]), result([1, 0], name='other'))
    with pytest.raises(ValueError, match='different questions'): lb.compare(result([1, 0]), result([1, 0, 1]))


def test_compare_counts_and_covers_zero_when_fair():
    r = np.random.default_rng(0); inside = 0
    for i in range(60):
        a, b = r.random((2, 150)) < .9
        c = lb.compare(result(a), result(b), n_boot=300, seed=i)
        assert c['only_a'] == (a & ~b).sum() and c['only_b'] == (b & ~a).sum() and c['difference'] == pytest.approx(a.mean() - b.mean())
        inside += c['lo'] <= 0 <= c['hi']
    assert inside >= 50


def test_compare_is_wider_when_few_people_answer_often():
    r = np.random.default_rng(1); a, b = r.random((2, 40)) < .8
    wide = lb.compare(result(a.repeat(10), np.arange(40).repeat(10).astype(str), task='open set'), result(b.repeat(10), np.arange(40).repeat(10).astype(str), task='open set'))
    narrow = lb.compare(result(a.repeat(10)), result(b.repeat(10)))
    assert wide['hi'] - wide['lo'] > 2*(narrow['hi'] - narrow['lo'])


def test_rows_are_made_once_and_failures_told(tmp_path, monkeypatch):
    made = []
    def evaluate(name, protocol, progress):
        made.append(name)
        if name == 'gone': raise FileNotFoundError('no weights here')
        return result([1, 1, 0, 1], name=protocol)
    monkeypatch.setattr(lb, 'evaluate', evaluate)
    systems = dict(one='x', gone='y', eigenfaces='z')
    absent = lb.run_board(tmp_path/'r.csv', systems, ['att-one-photo'])
    assert absent == {('gone', 'att-one-photo'): 'no weights here', ('eigenfaces', 'att-one-photo'): 'it was fitted to people of this test'}
    assert read_results(tmp_path/'r.csv').system.tolist() == ['one']
    lb.run_board(tmp_path/'r.csv', systems, ['att-one-photo'])
    assert made == ['one', 'gone', 'gone']
    lb.run_board(tmp_path/'r.csv', systems, ['att-one-photo'], again=True)
    assert made[3:] == ['one', 'gone'] and len(read_results(tmp_path/'r.csv')) == 1


def test_the_table_in_the_repository():
    t = read_results(ROOT/'data'/'results.csv')
    assert list(t) == RESULT_COLUMNS and len(t) and not t.duplicated(['system', 'protocol']).any()
    assert set(t.protocol) <= {'att-one-photo', 'lfw-view1', 'lfw-view2', 'lfw-open-set'}
    assert (t.command.str.startswith('facelab-')).all() and (t.fta.between(0, 1)).all()
    text = lb.board(t).to_string()
    for line in text.splitlines(): assert line.rstrip() in (ROOT/'README.md').read_text(encoding='utf-8')
