"What only a machine with a GPU can show"
import warnings
from functools import partial
from pathlib import Path

import pytest, torch

from matrix import K, METHODS, digits, learner, residual
from fastkdtf.callback.checkpoint import Checkpoint
from fastkdtf.callback.methods import methods
from fastkdtf.lab.bench import StepBench
from fastkdtf.lab.compare import compare
from fastkdtf.lab.one_run import LearnerParts
from fastkdtf.vision.augment import Augment
from fastkdtf.vision.data import kd_dataloaders
from fastkdtf.vision.models import create_model
from test_matrix import Stop, state

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason='no GPU')
gpu = 'cuda'

@pytest.fixture(autouse=True)
def in_tmp_path(tmp_path, monkeypatch): monkeypatch.chdir(tmp_path)

def waits(step, n=4):
    "Where the host waits for the GPU, or sends it something and waits, in a step"
    for _ in range(3): step()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode('warn')
    try:
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter('always')
            for _ in range(n): step()
    finally: torch.cuda.set_sync_debug_mode('default')
    places = [f'{Path(w.filename).name}:{w.lineno}' for w in said if 'synchronizing' in str(w.message)]
    return {place: places.count(place)/n for place in sorted(set(places))}

def bench(m, precision=None):
    torch.manual_seed(0)
    batch = torch.randn(16, 3, 8, 8, device=gpu),torch.randint(0, K, (16,), device=gpu)
    return StepBench((residual if m is None else m.net)().to(gpu), batch, K, [] if m is None else [m.make()], precision)

@pytest.mark.parametrize('precision', [None, 'bf16', 'fp16'])
@pytest.mark.parametrize('name', METHODS)
def test_a_step_waits_for_the_gpu_once_beside_the_recorder(name, precision):
    own,ours = (waits(bench(m, precision)) for m in (None, METHODS[name]))
    assert own and sum(ours.values()) <= sum(own.values())+1, (own, ours)

def test_a_batch_of_images_is_made_with_one_copy_to_the_gpu():
    dls = kd_dataloaders('digits', bs=16, augment=Augment(flip=True, pad=1), device=gpu)
    batches = iter(dls.train)
    found = waits(lambda: next(batches))
    assert sum(found.values()) <= 1, found

@pytest.mark.parametrize('name', [name for name in METHODS if name != 'RDrop'])   # a processor drops out others
def test_a_training_goes_on_on_another_device(name):
    "Interrupted on a GPU, it ends on a processor, near where it would have ended on the GPU"
    m = METHODS[name]
    def run(device, *cbs):
        learn = learner([m.make()], m.net, digits(device=device))
        learn.fit(2, cbs=[Checkpoint(f'{name}.pt'), *cbs])
        return learn
    expected = learner([m.make()], m.net, digits(device=gpu))
    expected.fit(2)
    with pytest.raises(KeyboardInterrupt): run(gpu, Stop('after_loss', 5 if m.steps == 1 else 8))
    here = run('cpu')
    for k,v in state(here).items():
        assert v.device.type == 'cpu'
        torch.testing.assert_close(v, state(expected)[k].cpu(), rtol=.02, atol=.02)

def test_targets_kept_on_a_gpu_are_read_on_a_processor():
    here,there = (learner([METHODS['KD cached'].make()], dls=digits(device=device)) for device in (gpu, 'cpu'))
    here.fit(1)
    there.fit(1)
    assert any(f.is_file() for f in Path('cache').rglob('*')) and there.recorder.values[-1][there.recorder.metric_names.index('hit_rate')-1] == 1

@pytest.mark.parametrize('name', [name for name in METHODS if METHODS[name].soft])
def test_describe_kd_says_on_a_gpu_what_it_says_on_a_processor(name):
    m = METHODS[name]
    tables = []
    for device in (gpu, 'cpu'):
        learn = learner([m.make()], m.net, digits(device=device))
        tables.append(learn.describe_kd())
    numbers = [t.select_dtypes('number').drop(columns=['time', 'memory'], errors='ignore') for t in tables]
    assert len(numbers[0]) and list(numbers[0].columns) == list(numbers[1].columns)
    for column in numbers[0]: assert numbers[0][column].to_numpy() == pytest.approx(numbers[1][column].to_numpy(), rel=.02, abs=.02, nan_ok=True), column

def test_a_comparison_on_a_gpu_says_so_and_trains_nothing_twice(tmp_path):
    dls = kd_dataloaders('digits', bs=64, device=gpu)
    parts = LearnerParts(dls, partial(create_model, 'resnet8', 10))
    arms = {name: methods[name].make for name in ('LsrKD', 'TfKDReg')}
    run = lambda: compare(arms, parts, 2, 2, out=tmp_path/'runs', precision='bf16')
    first,again = run(),run()
    assert {r['device'] for r in first.records} == {torch.cuda.get_device_name()}
    assert len(first.records) == len(again.records) and [r['seconds_per_epoch'] for r in first.records] == [r['seconds_per_epoch'] for r in again.records]
