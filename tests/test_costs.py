"What a step does once, and what it does not do at all: counted, not timed"
import sys
from collections import Counter
from contextlib import nullcontext
from pathlib import Path

import pytest, torch
from fastai.basics import Callback, CrossEntropyLossFlat, DataLoaders, Learner, SGD
from fastai.callback.progress import ProgressCallback
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import fastkdtf
from fastkdtf.callback.distill import KnowledgeDistillation, LsrKD, MemoryReplay
from fastkdtf.callback.effdstl import CKM, WSL
from fastkdtf.callback.selfguide import SelfGuidance, StochasticDepth
from fastkdtf.core import Batch
from fastkdtf.teachers.memory import MemoryTeacher
from fastkdtf.teachers.network import NetworkTeacher
from fastkdtf.vision.models import create_model

K = 5
x,y = torch.randn(32, 3, 8, 8, generator=torch.Generator().manual_seed(0)),torch.arange(32)%K
def linear(): return nn.Sequential(nn.Flatten(), nn.Linear(192, K))

def fit(cbs, net=None, n_epoch=1):
    dls = DataLoaders(*[DataLoader(TensorDataset(x, y), 8)]*2)
    dls.c = K
    torch.manual_seed(1)
    learn = Learner(dls, net or linear(), CrossEntropyLossFlat(), opt_func=SGD, lr=.01, cbs=cbs).remove_cb(ProgressCallback)
    with learn.no_logging(): learn.fit(n_epoch)
    return learn

def operations(out):
    "Number of nodes in the graph of a tensor"
    seen,todo = set(),[out.grad_fn]
    while todo:
        node = todo.pop()
        if node is None or node in seen: continue
        seen.add(node)
        todo += [f for f,_ in node.next_functions]
    return len(seen)

class Graph(Callback):
    order,run_valid = 5.9,False
    def before_fit(self): self.sizes = []
    def after_loss(self): self.sizes.append((operations(self.learn.loss_grad), operations(self.pred)))

def test_a_dropped_branch_adds_no_operation_in_one_process():
    "No more than the sub-network and its loss; every parameter has a gradient all the same"
    class Gradients(Callback):
        order,run_valid = 5.9,False
        def after_backward(self): assert all(p.grad is not None for p in self.learn.model.parameters())
    fit([graph := Graph()], create_model('resnet8', K))
    whole,loss = graph.sizes[0][1],graph.sizes[0][0]-graph.sizes[0][1]
    fit([StochasticDepth(.3, seed=0), graph, Gradients()], create_model('resnet8', K), 3)
    assert len(graph.sizes) == 12 and all(total-network == loss for total,network in graph.sizes)
    assert min(network for _,network in graph.sizes) < whole

def test_a_full_network_that_only_teaches_builds_no_graph():
    class Look(Callback):
        order,run_valid = 5.9,False
        def before_fit(self): self.grads = []
        def after_loss(self): self.grads.append((self.learn.pred.requires_grad, self.learn.loss_grad.requires_grad))
    fit([SelfGuidance(full_backward=False), look := Look()], create_model('resnet8', K))
    assert look.grads == [(False, True)]*4

@pytest.mark.parametrize('make', [WSL, CKM])
def test_facts_of_a_batch_are_found_once_for_the_loss_and_the_columns(make, monkeypatch):
    found,once = [],Batch.once
    def counted(self, fact, find):
        def look():
            found.append((id(self), fact))
            return find()
        alive.append(self)
        return once(self, fact, look)
    alive = []
    monkeypatch.setattr(Batch, 'once', counted)
    fit([make(linear())])
    assert len(found) >= 8 and set(Counter(found).values()) == {1}

def test_autocast_of_the_student_stays_on_for_copies_on_a_device_of_the_same_kind():
    teacher = MemoryTeacher(1, interval_steps=2, copy_device='cpu')
    assert isinstance(teacher._precision(torch.device('cpu'), torch.device('cpu')), nullcontext)
    seen = []
    class Look(nn.Module):
        def forward(self, z):
            if not torch.is_grad_enabled(): seen.append(torch.is_autocast_enabled('cpu'))
            return z
    class Half(Callback):
        order = 0
        def before_batch(self):
            self.region = torch.autocast('cpu', torch.bfloat16)
            self.region.__enter__()
        def after_batch(self): self.region.__exit__(None, None, None)
    class Trains(Half): run_valid = False
    fit([MemoryReplay(1, interval_steps=2, copy_device='cpu'), Trains()], nn.Sequential(linear(), Look()))
    assert len(seen) >= 4 and seen.count(True) >= 4

def test_what_a_teacher_needs_on_the_device_is_put_there_once():
    "The order of its classes, and what its images are multiplied with"
    held = []
    class Notes(NetworkTeacher):
        def __call__(self, batch):
            out = super().__call__(batch)
            held.append((self.order, *self._scale))
            return out
    net = nn.Sequential(nn.Flatten(), nn.Linear(192, K))
    teacher = Notes(net, vocab=list('abcde'), teacher_norm=([.5]*3, [.2]*3))
    dls = DataLoaders(*[DataLoader(TensorDataset(x, y), 8)]*2)
    dls.c,dls.vocab = K,list('edcba')
    learn = Learner(dls, linear(), CrossEntropyLossFlat(), opt_func=SGD, cbs=KnowledgeDistillation(teacher)).remove_cb(ProgressCallback)
    with learn.no_logging(): learn.fit(2)
    assert len(held) == 8 and all(a is b for row in held[1:] for a,b in zip(row, held[0])) and held[0][0].tolist() == [4, 3, 2, 1, 0]

def calls_of_ours(method, n_epoch=2):
    "How often a training step calls functions of ours: the most in any batch after the first, and which"
    folder,counts = str(Path(fastkdtf.__file__).parent),[]
    def profile(frame, event, _):
        if event == 'call' and frame.f_code.co_filename.startswith(folder): counts[-1][frame.f_code.co_name] += 1
    class Count(Callback):
        order,run_valid = -100,False
        def before_batch(self):
            counts.append(Counter())
            sys.setprofile(profile)
    class Stop(Callback):
        order,run_valid = 1000,False
        def after_batch(self): sys.setprofile(None)
    try: fit([method, Count(), Stop()], n_epoch=n_epoch)
    finally: sys.setprofile(None)
    return max((sum(count.values()), count) for count in counts[2:])

@pytest.mark.parametrize('name,most', [('MrKD-TC', 145), ('LsrKD', 100), ('KD', 140), ('WSL', 190)])
def test_a_step_calls_few_functions_of_ours(name, most):
    "0.1.0 made 169 calls for a batch of MrKD-TC"
    make = {'MrKD-TC': lambda: MemoryReplay(1, interval_steps=1000, gamma=.3), 'LsrKD': LsrKD, 'KD': lambda: KnowledgeDistillation(linear()), 'WSL': lambda: WSL(linear())}
    with pytest.warns(UserWarning) if name == 'MrKD-TC' else nullcontext(): n,calls = calls_of_ours(make[name]())
    assert 5 < n <= most, calls.most_common(20)

def test_a_batch_is_one_object_and_its_teachers_are_collected_once_a_fit(monkeypatch):
    from fastkdtf.callback.distill import Distill
    made,collected,find = [],[],Distill._find_teachers
    class Counted(Batch):
        def __init__(self, *args, **kwargs):
            made.append(self)
            super().__init__(*args, **kwargs)
    monkeypatch.setattr('fastkdtf.callback.term.Batch', Counted)
    monkeypatch.setattr(Distill, '_find_teachers', lambda self: collected.append(self) or find(self))
    method = KnowledgeDistillation(linear())
    del collected[:]
    fit([method], n_epoch=2)
    assert len(made) == 8 and len(collected) == 1
