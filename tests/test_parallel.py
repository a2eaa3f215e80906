"Several processes that train the runs of one folder on one device"
import subprocess
import sys
import tempfile
import time

import pytest
import torch
from hypothesis import given, strategies as st

from fastkdtf.cli import main
from fastkdtf.lab.parallel import GPUState, Siblings, gpu_state, has_room, is_sibling, start_sibling
from fastkdtf.lab.runs import Ledger

def command(out, *more): return ['compare', '--data', 'digits', '--arch', 'resnet8', '--methods', 'LSR', '--no-controls', '--train-subset', '64', '--bs', '32',
                                 '--epochs', '1', '--seeds', '2', '--device', 'cpu', '--out', str(out), *map(str, more)]

@pytest.fixture
def one_thread():
    n = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(n)

def scores(folder):
    records = Ledger(folder/'results.jsonl').records()
    return {record['key']: {name: value for name,value in record.items() if name in ('last', 'best', 'history')} for record in records}

def test_a_sibling_trains_what_it_finds_and_leaves_the_report_to_its_starter(tmp_path, one_thread, capsys):
    child = start_sibling(command(tmp_path/'shared'), threads=1)
    assert child.wait(120) == 0, child.said.seek(0) or child.said.read()
    child.stdin.close()
    child.said.close()
    theirs = scores(tmp_path/'shared')
    assert len(theirs) == 4 and not (tmp_path/'shared'/'report.html').exists()
    assert main(command(tmp_path/'shared')) == 0 and 'none trained now' in capsys.readouterr().out
    assert (tmp_path/'shared'/'report.html').exists()
    assert main(command(tmp_path/'alone', '--parallel', 1)) == 0
    one = scores(tmp_path/'alone')
    assert one == theirs and all(one.values())
    assert main(command(tmp_path/'two', '--parallel', 2)) == 0
    assert scores(tmp_path/'two') == one, 'two processes give what one gives'
    assert 'ended early' not in capsys.readouterr().err and torch.get_num_threads() == 1

def test_a_sibling_stops_when_its_starter_ends(tmp_path):
    child = start_sibling(command(tmp_path, '--epochs', 500), threads=1)
    while child.poll() is None and not list(tmp_path.glob('unfinished/*.pt')): time.sleep(.05)
    assert child.poll() is None
    child.stdin.close()   # as the system does when a process ends
    assert child.wait(60) == 130
    child.said.close()

@pytest.mark.parametrize('n', ['auto', 1])
def test_a_processor_gets_no_siblings_unless_they_are_asked_for(n):
    with Siblings(lambda threads: pytest.fail('started one'), n) as siblings: pass
    assert siblings.children == []

def test_a_sibling_has_no_siblings(monkeypatch):
    monkeypatch.setenv('FASTKDTF_SIBLING', '1')
    assert is_sibling()
    with Siblings(lambda threads: pytest.fail('started one'), 5) as siblings: assert siblings.children == []

def stand_in(code='import sys; sys.stdin.read()'):
    child = subprocess.Popen([sys.executable, '-c', code], stdin=subprocess.PIPE)
    child.said = tempfile.TemporaryFile()
    return child

def test_threads_are_shared_and_given_back():
    n,seen = torch.get_num_threads(),[]
    torch.set_num_threads(4)
    def start(threads):
        seen.append(threads)
        return stand_in()
    with Siblings(start, 2): assert torch.get_num_threads() == 2
    assert torch.get_num_threads() == 4 and seen == [2]
    torch.set_num_threads(n)

def test_an_error_in_the_block_ends_the_siblings():
    with pytest.raises(KeyboardInterrupt):
        with Siblings(lambda threads: stand_in(), 3) as siblings: raise KeyboardInterrupt
    assert len(siblings.children) == 2 and all(child.poll() == 0 for child in siblings.children)

def test_a_gpu_that_nothing_is_known_of_trains_one_run_at_a_time(monkeypatch):
    monkeypatch.setenv('PATH', '')
    assert gpu_state('cuda') is None
    with Siblings(lambda threads: pytest.fail('started one'), device='cuda', settle=.01) as siblings: assert siblings.starter is None

def test_no_more_are_started_once_one_has_found_nothing_to_do():
    states = iter([GPUState(10**9, 0.)])
    state = lambda: next(states, GPUState(9*10**8, .1))
    with Siblings(lambda threads: stand_in('pass'), device='cuda', state=state, most=9, settle=.5) as siblings: siblings.starter.join(60)
    assert len(siblings.children) == 1

@given(st.integers(1, 10**12), st.integers(0, 10**12), st.floats(0, 1), st.integers(1, 16))
def test_another_process_is_started_only_where_memory_and_time_are_left(total, used, busy, n):
    used = min(used, total)
    room = has_room(GPUState(total, 0.), [GPUState(total-used, busy)], n)
    assert not room or busy < .9 and 0 < used/n < total-used
    assert room or busy >= .9 or used == 0 or total-used <= 1.5*used/n

@pytest.mark.parametrize('args', [['--parallel', '0'], ['--parallel', 'many'], ['--parallel', '65'], ['--parallel', '1.5']])
def test_a_wrong_number_of_processes_is_named(args, capsys):
    assert main(['compare', *args]) == 2 and '--parallel' in capsys.readouterr().err

def test_ray_shares_devices_itself(tmp_path, capsys):
    assert main(['run', 'wang2020/T1/ResNet20/MrKD3', '--engine', 'ray', '--parallel', '2', '--out', str(tmp_path)]) == 2
    assert '--parallel 2' in capsys.readouterr().err and not list(tmp_path.iterdir())
