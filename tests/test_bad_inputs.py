"A bad argument is one line that names it, before anything is trained"
import sys
from pathlib import Path

import numpy as np, pytest
from fastai.basics import Learner

sys.path.insert(0, str(Path(__file__).parent))
import bad_inputs
from bad_inputs import bad_calls, calls, is_clear, outcome, prepare

def began(*args, **kwargs): raise AssertionError('a training began')

@pytest.fixture(scope='module')
def tmp(tmp_path_factory):
    tmp = tmp_path_factory.mktemp('bad')
    prepare(tmp)
    return tmp

@pytest.fixture(autouse=True)
def untrained(monkeypatch): monkeypatch.setattr(Learner, 'fit', began)

def trains(said): return said is not None and 'a training began' in said[1]

def test_the_calls_work_as_they_are(tmp):
    "Else a bad argument would hide behind another one"
    failed = {name: said for name,(f,kwargs) in calls(tmp).items() if (said := outcome(f, kwargs)) and not trains(said)}
    assert failed == {}

def test_bad_arguments_are_named(tmp, record_property):
    n,unclear,taken = 0,[],[]
    for name,f,kwargs,arg in bad_calls(calls(tmp)):
        n,said = n+1,outcome(f, kwargs)
        if said is None or trains(said): taken.append((name, arg, repr(kwargs[arg])[:40]))
        elif not is_clear(said, arg): unclear.append((name, arg, repr(kwargs[arg])[:40], said))
    record_property('tried', n)
    assert unclear == [] and taken == []
    assert n >= 2000

@pytest.mark.parametrize('kind', [np.int64, np.int32, np.uint8])
def test_whole_numbers_of_numpy_are_whole_numbers(kind, tmp):
    for name in ('MemoryTeacher', 'kd_dataloaders', 'Stage', 'compare', 'create_model', 'Checkpoint', 'sweep'):
        f,kwargs = calls(tmp)[name]
        more = dict(MemoryTeacher=dict(n_copies=kind(2)), kd_dataloaders=dict(bs=kind(16), seed=kind(1)), Stage=dict(n_epoch=kind(1)),
                    compare=dict(n_epoch=kind(1), seeds=kind(1)), create_model=dict(n_classes=kind(3)), Checkpoint=dict(every=kind(1)), sweep=dict(n_epoch=kind(1), seeds=kind(1)))[name]
        said = outcome(f, {**kwargs, **more})
        assert said is None or trains(said), (name, said)

@pytest.mark.parametrize('kind', [np.float32, np.float64, np.float16])
def test_numbers_of_numpy_are_numbers(kind, tmp):
    for name,more in (('LsrKD', dict(alpha=kind(.5), tau=kind(2))), ('TfKDRegLoss', dict(alpha=kind(.5), tau=kind(2))), ('kd_dataloaders', dict(valid_pct=kind(.25))),
                      ('compare', dict(lr=kind(.5))), ('Stage', dict(wd=kind(.5)))):
        f,kwargs = calls(tmp)[name]
        said = outcome(f, {**kwargs, **more})
        assert said is None or trains(said), (name, said)
