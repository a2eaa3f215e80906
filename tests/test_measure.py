"Times as ratios of interleaved runs, and peak memory of a known pattern; no absolute time is asserted"
import os, time

import numpy as np, pytest, torch

from fastkdtf.lab.bench import machine
from fastkdtf.lab.measure import interleaved_times, keep_freed_memory, median_ratio, peak_memory

MB = 2**20
def tensor(mb): return torch.empty(mb*MB, dtype=torch.uint8)


def test_candidates_take_turns():
    calls = []
    times = interleaved_times({k: lambda k=k: calls.append(k) for k in 'abc'}, rounds=4)
    assert ''.join(calls) == 'abc'*5, 'one round more, which does not count'
    assert set(times) == set('abc') and all(v.shape == (4,) and (v > 0).all() for v in times.values())

def test_ratio_is_the_median_over_rounds():
    times = dict(a=np.array([2., 30., 4.]), b=np.array([1., 3., 4.]))
    assert median_ratio(times, 'a', 'b') == 2. and median_ratio(times, 'b', 'a') == .5 and median_ratio(times, 'a', 'a') == 1.
    assert isinstance(median_ratio(times, 'a', 'b'), float) and median_ratio(times, candidate='b', reference='a') == .5

def test_slower_is_slower():
    times = interleaved_times({'fast': lambda: None, 'slow': lambda: time.sleep(.002)}, rounds=5)
    assert median_ratio(times, 'slow', 'fast') > 5


def one():
    tensor(5)
def both():
    a,b = tensor(4),tensor(8)
def in_turn():
    for _ in range(3): tensor(6)
def rise_and_fall():
    a,b = tensor(4),tensor(8)
    del a
    c = tensor(2)   # 10, after 12
def inner():
    a = tensor(3)
    one()           # 3 + 5
    b = tensor(1)
def view():
    a = tensor(4)
    b,c = a[:MB],a.view(2, -1)
def nothing(): pass

@pytest.mark.parametrize('f,mb', [(one, 5), (both, 12), (in_turn, 6), (rise_and_fall, 12), (inner, 8), (view, 4), (nothing, 0)])
def test_peak_of_a_known_pattern(f, mb): assert peak_memory(f) == mb*MB

def test_what_was_held_before_does_not_count():
    "Neither what stays nor what is freed meanwhile"
    kept,held = tensor(16),[tensor(16)]
    def f():
        held.clear()
        tensor(4)
    assert peak_memory(f) == 4*MB and len(kept)

def test_peak_of_a_backward():
    z = torch.zeros(256, 1024, requires_grad=True)
    assert peak_memory(lambda: torch.autograd.grad((z*2).sum(), z)) >= z.nbytes

def test_errors_pass_and_stderr_comes_back(capfd):
    def fail(): raise RuntimeError('mine')
    with pytest.raises(RuntimeError, match='mine'): peak_memory(fail)
    os.write(2, b'still here\n')
    assert capfd.readouterr().err == 'still here\n'

def test_keep_freed_memory(): assert isinstance(keep_freed_memory(), bool)

def test_a_benchmark_names_the_device(monkeypatch):
    monkeypatch.setattr(torch.cuda, 'get_device_name', lambda device: f'the card {device}')
    assert machine()['device'] == 'cpu' and machine('cuda:1')['device'] == 'the card cuda:1' and machine()['cores'] == os.cpu_count()
