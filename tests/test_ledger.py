"A ledger of many records: each line is looked at once, and records are read when they are asked for"
import json, os

import pytest

from fastkdtf.lab import runs
from fastkdtf.lab.runs import Ledger, check_run
from fastkdtf.lab.report import read_runs

def record(key, **more):
    scores = dict(accuracy=.5, nll=1., ece=0.)
    return dict(key=key, method='a', rank=0, control_for=[], seed=0, setting='s', evaluated_on='test', last=scores, best=scores, history=dict(accuracy=[.1, .5]), seconds_per_epoch=1.) | more

def write(path, n): path.write_text(''.join(json.dumps(record(f'{i}', text='x'*200))+'\n' for i in range(n)))

@pytest.fixture
def looked(monkeypatch):
    "Lines that were looked at, and parsed"
    counts = dict(lines=0, parsed=0)
    note,parse = runs._Index._note,runs.read_json
    def count_note(self, line): counts['lines'] += 1; return note(self, line)
    def count_parse(text): counts['parsed'] += 1; return parse(text)
    monkeypatch.setattr(runs._Index, '_note', count_note), monkeypatch.setattr(runs, 'read_json', count_parse)
    return counts

def test_look_ups_and_appends_do_not_look_at_lines_again(tmp_path, looked):
    write(tmp_path/'results.jsonl', 20_000)
    ledger = Ledger(tmp_path/'results.jsonl', check_run)
    assert len(ledger) == 20_000 and looked == dict(lines=20_000, parsed=0)
    for i in (0, 10_000, 19_999): assert ledger.find(f'{i}')['key'] == f'{i}'
    assert ledger.find('none') is None and looked == dict(lines=20_000, parsed=3)
    assert Ledger(tmp_path/'results.jsonl').find('5')['key'] == '5' and looked['lines'] == 20_000   # one index for all who ask
    for i in range(10): assert ledger.append(record(f'new{i}')) and not ledger.append(record(f'new{i}'))
    assert len(ledger) == 20_010 and looked == dict(lines=20_010, parsed=4)

def test_all_records_are_parsed_in_few_steps(tmp_path, looked):
    write(tmp_path/'results.jsonl', 5000)
    assert len(read_runs(tmp_path)) == 5000 and looked['parsed'] < 50

def test_what_others_add_is_seen(tmp_path):
    ledger,path = Ledger(tmp_path/'results.jsonl'),tmp_path/'results.jsonl'
    assert 'a' not in ledger
    with open(path, 'a') as f: f.write('{"key": "a"}\n')
    assert 'a' in ledger
    with open(path, 'a') as f: f.write('{"key": "b", "x": 1}\n')
    assert ledger.find('b')['x'] == 1 and len(ledger) == 2

@pytest.mark.parametrize('change', [lambda path: path.write_text('{"key": "c", "x": 7}\n'), lambda path: path.write_text(''), lambda path: path.unlink(),
                                    lambda path: os.replace(path.with_name('other'), path), lambda path: path.write_text(path.read_text().replace('"a"', '"z"')),
                                    lambda path: path.write_text(path.read_text().replace('1', '11') + '{"key": "c"}\n')])
def test_a_file_that_was_changed_otherwise_is_looked_at_anew(tmp_path, change):
    path,ledger = tmp_path/'results.jsonl',Ledger(tmp_path/'results.jsonl')
    path.write_text(''.join(f'{{"key": "{key}", "x": 1}}\n' for key in 'ab'))   # unsealed, as others may write
    path.with_name('other').write_text('{"key": "o"}\n{"key": "p"}\n{"key": "q"}\n')
    assert len(ledger) == 2
    stat = path.stat()
    change(path)
    if path.exists(): os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns+10**6))   # a clock may be slower than a test
    lines = path.read_text().splitlines() if path.exists() else []
    assert [r['key'] for r in ledger] == [json.loads(line)['key'] for line in lines] and len(ledger) == len(lines)
    for line in lines: assert ledger.find(json.loads(line)['key']) == json.loads(line)

def sealed(tmp_path, **more):
    ledger = Ledger(tmp_path/'results.jsonl', check_run)
    for key in 'abc': ledger.append(record(key, text='ü', curve=[.1, 1e-300, 2**53+1, None]) | more)
    return ledger

@pytest.mark.parametrize('old,new', [('0.5', '0.6'), ('"seed": 0', '"seed": 1'), ('1e-300', '1e-301'), ('null', '0'), ('"text"', '"texts"'), ('"a", "rank"', '"b", "rank"')])
@pytest.mark.parametrize('key', 'abc')
def test_a_record_that_was_changed_by_hand_is_named(tmp_path, old, new, key):
    ledger = sealed(tmp_path)
    lines = ledger.path.read_text().splitlines(keepends=True)
    changed = [line.replace(old, new) if f'"key": "{key}"' in line else line for line in lines]
    assert sum(map(str.__ne__, lines, changed)) == 1
    ledger.path.write_text(''.join(changed))
    for look in (ledger.records, lambda: ledger.find(key), lambda: read_runs(tmp_path)):
        with pytest.raises(ValueError, match=f"results.jsonl: the record of '{key}' was changed after it was written: repair or remove that line"): look()
    others = [o for o in 'abc' if o != key]
    assert [ledger.find(o)['key'] for o in others] == others

def test_a_seal_belongs_to_what_a_record_says_and_not_to_how_it_is_written(tmp_path):
    ledger = sealed(tmp_path)
    before = ledger.records()
    ledger.path.write_text(''.join(json.dumps(json.loads(line), sort_keys=True, ensure_ascii=False, separators=(',', ':'))+'\n'
                                   for line in ledger.path.read_text().splitlines()), encoding='utf-8')
    assert ledger.records() == before and len(before) == 3 and not any('seal' in r for r in before) and ledger.unsealed == []

def test_records_without_a_seal_are_read_named_and_sealed(tmp_path):
    path,ledger = tmp_path/'results.jsonl',sealed(tmp_path)
    lines = path.read_text().splitlines()
    plain = {k: v for k,v in json.loads(lines[1]).items() if k != 'seal'}
    path.write_text('\n'.join([lines[0], json.dumps(plain), '', lines[2], '{"key": "torn']))
    assert ledger.unsealed == ['b'] and ledger.find('b') == plain and ledger.seal() == 1
    assert path.read_text().splitlines()[::4] == [lines[0], '{"key": "torn'] and ledger.unsealed == [] and ledger.seal() == 0
    assert [r['key'] for r in ledger.records()] == ['a', 'b', 'c'] and path.read_text().splitlines()[1] == lines[1]
    assert Ledger(tmp_path/'none.jsonl').seal() == 0 and not (tmp_path/'none.jsonl').exists()

@pytest.mark.parametrize('seal', ['', 'x', 3, None, [], '0'*16])
def test_another_seal_does_not_fit(tmp_path, seal):
    (tmp_path/'results.jsonl').write_text(json.dumps(record('a') | dict(seal=seal))+'\n')
    with pytest.raises(ValueError, match="the record of 'a' was changed"): read_runs(tmp_path)

def test_lines_that_only_together_are_json_are_damaged(tmp_path):
    path = tmp_path/'results.jsonl'
    path.write_text('{"key": "a", "x": [{}\n{}]}\n{"key": "c"}, {"key": "d"}\n')
    with pytest.raises(ValueError, match='results.jsonl'): Ledger(path).records()

def test_a_second_key_at_the_end_is_damage(tmp_path):
    (tmp_path/'results.jsonl').write_text('{"key": "a", "x": 1, "key": "b"}\n')
    with pytest.raises(ValueError, match="the record of 'a' has another key"): Ledger(tmp_path/'results.jsonl').find('a')

def test_a_line_that_does_not_fit_on_the_disk_leaves_the_ledger_whole(tmp_path, monkeypatch):
    ledger = Ledger(tmp_path/'results.jsonl')
    ledger.append(dict(key='a'))
    before = ledger.path.read_bytes()
    write = os.write
    monkeypatch.setattr(os, 'write', lambda fd, data: write(fd, data[:5]) if b'"b"' in data else write(fd, data))
    with pytest.raises(OSError, match='results.jsonl: the record was not written, and those before it are whole'): ledger.append(dict(key='b'))
    monkeypatch.undo()
    assert ledger.path.read_bytes() == before and ledger.append(dict(key='b')) and len(ledger) == 2

bad = dict(method=3, rank='first', control_for='baseline', seed=True, setting=None, evaluated_on=[], last=.5, best={}, history=[1], seconds_per_epoch='fast',
           callbacks=[3], description=[['a']], settings=[], teacher_accuracy='good', epoch_seconds=[None, 'x'], baseline=3, date=20)

@pytest.mark.parametrize('name', bad)
def test_a_record_of_another_shape_is_named(name, tmp_path):
    Ledger(tmp_path/'results.jsonl').append(record('odd', **{name: bad[name]}))
    with pytest.raises(ValueError, match=rf"results.jsonl: the record of 'odd' is no run: its '{name}'"): read_runs(tmp_path)

@pytest.mark.parametrize('name', ['method', 'rank', 'control_for', 'seed', 'setting', 'evaluated_on', 'last', 'best', 'history', 'seconds_per_epoch'])
def test_a_record_without_a_part_is_named(name, tmp_path):
    Ledger(tmp_path/'results.jsonl').append({k: v for k,v in record('odd').items() if k != name})
    with pytest.raises(ValueError, match=rf"is no run: it has no '{name}'"): read_runs(tmp_path)

def test_a_diverged_run_is_a_run(tmp_path):
    scores = dict(accuracy=None, nll=None, ece=None)
    Ledger(tmp_path/'results.jsonl').append(record('odd', last=scores, best=scores, seconds_per_epoch=None, history=dict(train_loss=[None])))
    assert len(read_runs(tmp_path)) == 1
