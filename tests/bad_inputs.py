"""Bad values for the arguments of public callables, made from their signatures

Each argument of a call that works is replaced by values of another kind. What comes must be one line that names the argument, or the value
must be as good as another: NumPy's numbers are numbers."""
import inspect, math, types, typing, warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cache
from pathlib import Path

import numpy as np
import torch
from fastai.basics import CrossEntropyLossFlat, DataLoaders, Learner
from torch import nn

import fastkdtf.all as kd
from fastkdtf.callback.schedules import Schedule
from fastkdtf.lab.runs import Ledger
from fastkdtf.lab.sweep import search_space
from fastkdtf.lab.training import Arm, Campaign, train_run

@cache
def dls(): return kd.kd_dataloaders('digits', bs=16, train_subset=32, device='cpu')
def model(): return nn.Sequential(nn.Flatten(), nn.Linear(192, 10))
def learn():
    l = Learner(dls(), model(), loss_func=CrossEntropyLossFlat())
    l.remove_cbs(l.cbs[3:])
    return l

recipe = 'wang2020/T1/ResNet20/LsrKD'

def calls(tmp):
    "Name → a call that works: the callable, and its arguments; nothing is trained"
    out = {}
    def add(f, **kwargs): out[f.__qualname__] = f,kwargs
    for method in (kd.LsrKD, kd.TfKDReg, kd.MemoryReplay, kd.StochasticDepth, kd.SelfGuidance, kd.ScaledCE, kd.ScaledLS): add(method)
    add(kd.Distill, teacher=kd.UniformTeacher())
    for method in (kd.KnowledgeDistillation, kd.WSL, kd.CKM): add(method, teacher=model())
    for loss in (kd.LabelSmoothingKDLoss, kd.LsrKDLoss, kd.TfKDRegLoss, kd.KDLoss, kd.WSLLoss, kd.CKMLoss): add(loss)
    add(kd.VirtualTeacher), add(kd.NetworkTeacher, model=model()), add(kd.EnsembleTeacher, teachers=[model(), model()])
    add(kd.MemoryTeacher), add(kd.CachedTeacher, teacher=model(), path=tmp/'cache')
    add(kd.TeacherCorrection, gamma=.1), add(kd.SmoothTo), add(kd.Amplify, delta=.1), add(kd.Replace, teacher=model()), add(kd.WSLWeight)
    add(kd.Checkpoint, path=tmp/'c.pth'), add(kd.seed_run, seed=1, dls=dls()), add(kd.Augment)
    add(kd.kd_dataloaders, source='digits', bs=16, device='cpu')
    add(kd.read_files, path=tmp/'x.npz'), add(kd.read_npz, path=tmp/'x.npz'), add(kd.create_model, name='resnet8', n_classes=10)
    add(kd.Stage, n_epoch=1), add(Schedule), add(kd.paper_grid, recipe=recipe), add(kd.recipe, id=recipe), add(kd.recipes)
    add(search_space, grid=dict(alpha=[.1, .2]))
    add(Campaign, arms={'baseline': Arm()}, dls=dls(), model_fn=model, n_epoch=1, seeds=1)
    add(Ledger, path=tmp/'l.jsonl'), add(kd.read_runs, paths=tmp), add(kd.with_index, dls=dls())
    return out

def tried(tmp, trained):
    "Calls that train when all is well; with a bad argument they must not come to it"
    out = {}
    def add(f, **kwargs): out[f.__qualname__] = f,kwargs
    add(kd.compare, methods={'LsrKD': kd.LsrKD}, dls=dls(), model_fn=model, n_epoch=1, seeds=1)
    add(train_run, method=None, seed=0, dls=dls(), model_fn=model, n_epoch=1)
    add(kd.sweep, recipe=recipe, dls=dls(), grid=dict(alpha=[.1]), n_epoch=1, out=tmp/'sweep')
    add(kd.run_recipes, ids=[recipe], seeds=1, epochs=1, data='digits', out=tmp/'runs')
    return out

class Odd:
    "No number, text, path, function or anything else"
    def __repr__(self): return '<odd>'

numbers = [math.nan, -1, -math.inf, 10**400, 'x', None, [], {}, Odd(), np.array([1., 2.]), 1j]
others  = [3.5, -7, None, [], {}, Odd(), '', b'x', np.nan, True]

def kinds(annotation):
    "The types that an annotation allows"
    if annotation is inspect.Parameter.empty: return ()
    if isinstance(annotation, types.UnionType) or typing.get_origin(annotation) is typing.Union: return tuple(k for a in typing.get_args(annotation) for k in kinds(a))
    return (typing.get_origin(annotation) or annotation,)

def fits(value, allowed):
    "True if a value is of a type that the annotation allows, or can't be told"
    if not allowed or object in allowed: return True
    for kind in allowed:
        if kind in (int, float):
            if isinstance(value, (int, np.integer) if kind is int else (int, float, np.number)) and not isinstance(value, bool): return True
        elif kind is type(None) or kind is None:
            if value is None: return True
        elif kind is bool:
            if isinstance(value, (bool, np.bool_)): return True
        elif kind is Callable:
            if callable(value): return True
        elif isinstance(kind, type):
            if isinstance(value, kind): return True
        else: return True
    return False

def bad_calls(calls):
    "Yield (name, callable, arguments, the one that is bad) for every value that its annotation does not allow"
    for name,(f,kwargs) in calls.items():
        target = f.__init__ if inspect.isclass(f) else f
        try: hints = typing.get_type_hints(target)
        except Exception: hints = getattr(target, '__annotations__', {})
        for p in inspect.signature(f).parameters.values():
            if p.kind in (p.VAR_KEYWORD, p.VAR_POSITIONAL) or p.name in ('self',): continue
            allowed = kinds(hints.get(p.name, p.annotation))
            for value in (numbers if {int, float} & set(allowed) else others):
                if not fits(value, allowed) or isinstance(value, float) and {int, float} & set(allowed) and not math.isfinite(value) or isinstance(value, int) and abs(value) > 10**300:
                    yield name,f,{**kwargs, p.name: value},p.name

def outcome(f, kwargs):
    "What a call said: None if it was content, else the error's type and words"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')
            f(**kwargs)
    except Exception as e: return type(e).__name__,str(e)

def is_clear(said, name):
    "True if an error is one line that names the argument"
    kind,words = said
    return kind in ('TypeError', 'ValueError', 'FileNotFoundError') and name in words and len(words.strip().splitlines()) == 1 and len(words) < 600
