"Networks and callbacks that change a batch in place, which leaves the tensor that a method holds where it was"
import copy

import pytest
import torch
from fastai.basics import Callback
from torch import nn

from matrix import METHODS, convolutions, learner, network
from fastkdtf.callback.distill import Distill, KnowledgeDistillation
from fastkdtf.callback.survival import second_pass, writes_inputs
from fastkdtf.callback.views import RDrop
from fastkdtf.teachers.base import Teacher

pytestmark = [pytest.mark.filterwarnings('ignore:DIST correlates the samples'), pytest.mark.filterwarnings('ignore:the network says the same in both passes')]

@pytest.fixture(autouse=True)
def in_tmp_path(tmp_path, monkeypatch): monkeypatch.chdir(tmp_path)

class Centred(nn.Module):
    "Centres its inputs, as networks do that bring their own normalisation"
    def __init__(self, net, in_place):
        super().__init__()
        self.net,self.in_place = net,in_place
    def forward(self, x): return self.net(x.sub_(.5).mul_(3.) if self.in_place else (x-.5)*3.)

class Noise(Callback):
    "Add noise to the images after the methods have seen them"
    order = 20
    def __init__(self, in_place): self.in_place = in_place
    def before_batch(self):
        if not self.training: return
        x,noise = self.learn.xb[0],torch.randn(self.learn.xb[0].shape, generator=torch.Generator().manual_seed(self.train_iter))
        if self.in_place: x.add_(noise)
        else: self.learn.xb = (x+noise,)

def weights(cbs, net):
    learn = learner(cbs, net)
    learn.fit(2)
    return torch.cat([p.detach().flatten() for p in learn.model.parameters()])

@pytest.mark.parametrize('name', METHODS)
def test_a_network_that_writes_into_its_inputs_trains_as_one_that_does_not(name):
    m = METHODS[name]
    a,b = (weights([m.make()], lambda: Centred(m.net(), in_place)) for in_place in (True, False))
    assert torch.equal(a, b) and a.isfinite().all()

SEEN = ['KD', 'KD cached', 'KD ensemble', 'MemoryReplay', 'MemoryReplay-TC', 'SelfGuidance', 'WSL', 'CKM', 'CSKD', 'RDrop', 'MeanTeacher', 'DKD', 'NKD', 'DIST',
        'StandardisedKD', 'Distill Amplify', 'Distill Replace', 'PSKD', 'DLB']   # these read images, or whose they are

@pytest.mark.parametrize('name', METHODS)
def test_what_is_changed_in_place_is_seen_as_what_is_put_in_its_place(name):
    m = METHODS[name]
    def outcome(in_place):
        try: return weights([m.make(), Noise(in_place)], m.net)
        except ValueError as e: return str(e)
    a,b = map(outcome, (True, False))
    if name not in SEEN: assert torch.equal(a, b)
    else: assert a == b and 'a callback has changed' in a

class Late(Teacher):
    "A teacher of the user's that is asked after the student"
    def __init__(self, net): self.net = net
    def __call__(self, batch): return self.net(batch.xb[0])

@pytest.mark.parametrize('make', [lambda net: Distill(lambda batch: net(batch.xb[0])), lambda net: Distill(Late(net))], ids=['function', 'class'])
def test_who_is_asked_after_the_student_reads_what_the_network_was_given(make):
    net = copy.deepcopy(network(7)).eval()
    a,b,early = (weights([cb], lambda: Centred(convolutions(), in_place)) for cb,in_place in
                 ((make(net), True), (make(net), False), (KnowledgeDistillation(net), False)))
    assert torch.equal(a, b) and torch.allclose(a, early)

def test_a_pass_for_the_answer_leaves_nothing_behind():
    x,net,other = torch.randn(4, 3, 8, 8),Centred(convolutions(), True).train(),Centred(convolutions(), False).train()
    before,state,states = x.clone(),{k: v.clone() for k,v in net.state_dict().items()},torch.get_rng_state()
    assert writes_inputs(net, (x,)) and not writes_inputs(other, (x,))
    assert torch.equal(torch.get_rng_state(), states)
    second_pass(net, (x,), check=True)
    assert torch.equal(x, before) and all(torch.equal(v, state[k]) for k,v in net.state_dict().items())

def test_the_network_is_asked_once_a_fit(monkeypatch):
    import fastkdtf.callback.term as term
    asked = []
    monkeypatch.setattr(term, 'writes_inputs', lambda *args: asked.append(1) or writes_inputs(*args))
    learn = learner([RDrop(), KnowledgeDistillation(network(7))], lambda: Centred(convolutions(), True))
    learn.fit(2)
    assert len(asked) == 2   # methods, each once, of 6 batches
    learn.fit(1)
    assert len(asked) == 4
