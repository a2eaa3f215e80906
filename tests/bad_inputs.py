"""Bad values for the arguments of public callables, made from their signatures

Each argument of a call that works is replaced by values of another kind. What comes must be one line that names the argument, or the value
must be as good as another: NumPy's numbers are numbers."""
import inspect, math, types, typing, warnings
from collections.abc import Callable
from functools import cache

import numpy as np
from fastai.basics import CrossEntropyLossFlat, Learner, accuracy
from torch import nn

import fastkdtf.all as kd
from fastkdtf.callback.schedules import Schedule
from fastkdtf.lab.experiment import run_recipes
from fastkdtf.lab.recipes import recipe as find_recipe, recipes
from fastkdtf.lab.report import read_runs
from fastkdtf.lab.runs import Ledger
from fastkdtf.lab.sweep import paper_grid, sweep
from fastkdtf.lab.study import search_space
from fastkdtf.lab.tune import tune

@cache
def dls(): return kd.kd_dataloaders('digits', bs=16, train_subset=32, device='cpu')
def model(): return nn.Sequential(nn.Flatten(), nn.Linear(192, 10))
def learn(): return Learner(dls(), model(), loss_func=CrossEntropyLossFlat(), metrics=accuracy)

recipe = 'wang2020/T1/ResNet20/LsrKD'

def calls(tmp):
    "Name → a call that works: the callable, and its arguments. Where a training would begin, `fit` says so"
    out = {}
    def add(f, **kwargs): out[f.__qualname__] = f,kwargs
    for method in (kd.LsrKD, kd.TfKDReg, kd.MemoryReplay, kd.StochasticDepth, kd.SelfGuidance, kd.ScaledCE, kd.ScaledLS): add(method)
    for name in ('PSKD', 'CSKD', 'DLB', 'OnlineLabelSmoothing', 'RDrop', 'MaxSup'):
        if hasattr(kd, name): add(getattr(kd, name))
    add(kd.Distill, teacher=kd.UniformTeacher())
    for method in (kd.KnowledgeDistillation, kd.WSL, kd.CKM): add(method, teacher=model())
    for loss in (kd.LabelSmoothingKDLoss, kd.LsrKDLoss, kd.TfKDRegLoss, kd.KDLoss, kd.WSLLoss, kd.CKMLoss): add(loss)
    add(kd.VirtualTeacher), add(kd.NetworkTeacher, model=model()), add(kd.EnsembleTeacher, teachers=[model(), model()])
    add(kd.MemoryTeacher), add(kd.CachedTeacher, teacher=model(), path=tmp/'cache')
    add(kd.TeacherCorrection, gamma=.1), add(kd.SmoothTo), add(kd.Amplify, delta=.1), add(kd.Replace, teacher=model()), add(kd.WSLWeight)
    add(kd.Checkpoint, path=tmp/'c.pth'), add(kd.seed_run, seed=1, dls=dls()), add(kd.Augment)
    add(kd.kd_dataloaders, source='digits', bs=16, device='cpu')
    add(kd.read_files, path=tmp/'x.npz'), add(kd.read_npz, path=tmp/'x.npz'), add(kd.create_model, name='resnet8', n_classes=10)
    add(kd.Stage, n_epoch=1), add(Schedule), add(paper_grid, recipe=recipe), add(find_recipe, id=recipe), add(recipes)
    add(search_space, grid=dict(alpha=[.1, .2]))
    add(Ledger, path=tmp/'l.jsonl'), add(read_runs, paths=tmp/'runs'), add(kd.with_index, dls=dls())
    add(kd.compare, methods={'LsrKD': kd.LsrKD}, learn=learn(), n_epoch=1, seeds=1)
    out['compare in parts'] = kd.compare,dict(methods={'LsrKD': kd.LsrKD}, dls=dls(), model_fn=model, n_epoch=1, seeds=1)
    add(tune, method=kd.LsrKD, learn=learn(), n_epoch=1, grid=dict(alpha=[.1, .2]), out=tmp/'tune')
    add(sweep, recipe=recipe, dls=dls(), grid=dict(alpha=[.1]), n_epoch=1, out=tmp/'sweep')
    add(run_recipes, ids=[recipe], seeds=1, epochs=1, scale=.01, data='digits', out=tmp/'recipes', retries=0)
    return out

def prepare(tmp):
    "Write what the calls read"
    rng = np.random.default_rng(0)
    np.savez(tmp/'x.npz', train_images=rng.integers(0, 256, (40,8,8,3), dtype=np.uint8), train_labels=np.arange(40)%2,
             test_images=rng.integers(0, 256, (10,8,8,3), dtype=np.uint8), test_labels=np.arange(10)%2, class_names=np.array(['a', 'b']))
    scores = dict(accuracy=.5, nll=1., ece=0.)
    Ledger(tmp/'runs'/'results.jsonl').append(dict(key='a', method='a', rank=0, control_for=[], seed=0, setting='s', evaluated_on='test', last=scores,
                                                   best=scores, history={}, seconds_per_epoch=1.))

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
            if p.kind in (p.VAR_KEYWORD, p.VAR_POSITIONAL) or name == 'compare in parts' and p.name == 'learn': continue
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

also = {'model': 'teacher', 'dls': 'loader'}   # a `NetworkTeacher` says what a teacher is

def is_clear(said, name):
    "True if an error is one line that names the argument"
    kind,words = said
    name = name if name in words else also.get(name, name)
    return kind in ('TypeError', 'ValueError', 'FileNotFoundError') and name in words and len(words.strip().splitlines()) == 1 and len(words) < 600
