"Networks and callbacks that change a batch in place, which leaves the tensor that a method holds where it was"
import copy

import pytest
import torch
from fastai.basics import Callback
from torch import nn

from matrix import METHODS, convolutions, learner, network
from networks import Centred
from fastkdtf.callback import term
from fastkdtf.callback.distill import Distill, KnowledgeDistillation
from fastkdtf.callback.survival import second_pass, writes_inputs
from fastkdtf.callback.views import RDrop
from fastkdtf.teachers.base import Teacher
from fastkdtf.vision.loader import were_given

pytestmark = [pytest.mark.filterwarnings('ignore:DIST correlates the samples'), pytest.mark.filterwarnings('ignore:the network says the same in both passes')]

@pytest.fixture(autouse=True)
def in_tmp_path(tmp_path, monkeypatch): monkeypatch.chdir(tmp_path)

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
    assert writes_inputs(net, (x,)) == [2] and writes_inputs(other, (x,)) == [0]
    assert torch.equal(torch.get_rng_state(), states)
    second_pass(net, (x,), check=True)
    assert torch.equal(x, before) and all(torch.equal(v, state[k]) for k,v in net.state_dict().items())

def test_the_network_is_asked_once_a_fit_where_a_callback_might_have_done_it(monkeypatch):
    asked = []
    monkeypatch.setattr(term, 'writes_inputs', lambda *args: asked.append(1) or writes_inputs(*args))
    class Looks(Callback):
        order = 30
        def before_batch(self): pass
    for cbs,times in ([], 0), ([Looks()], 2):   # methods, each once, of 6 batches
        learn = learner([RDrop(), KnowledgeDistillation(network(7)), *cbs], lambda: Centred(convolutions(), True))
        for n in (1, 2):
            learn.fit(2)
            assert len(asked) == n*times

class Changes(Callback):
    order = 50
    def __init__(self, change, order=50): self.change,self.order = change,order
    def before_batch(self): self.learn.xb = (self.change(self.learn.xb[0]),)

VIEWS = dict(transposed=lambda x: x.transpose(2, 3), turned=lambda x: x.transpose(2, 3).contiguous(), cropped=lambda x: x[..., :6, :6],
             flipped=lambda x: x.flip(3), noisy=lambda x: x + .1)

@pytest.mark.parametrize('view', VIEWS)
@pytest.mark.parametrize('name', ['KD', 'RDrop', 'MemoryReplay', 'CSKD'])
def test_another_view_of_the_same_memory_is_another_image(name, view):
    def net(): return nn.Sequential(nn.AdaptiveAvgPool2d(8), convolutions())
    with pytest.raises(ValueError, match='a callback has changed the inputs'): weights([METHODS[name].make(), Changes(VIEWS[view])], net)

@pytest.mark.parametrize('view', ['transposed', 'turned', 'flipped', 'noisy'])
def test_a_cached_teacher_keeps_no_answer_to_another_view(view):
    m = METHODS['KD cached']
    with pytest.raises(ValueError, match='must know which sample'): weights([m.make(), Changes(VIEWS[view], 2)], m.net)
    after = weights([m.make()], m.net)
    assert torch.equal(after, weights([METHODS['KD'].make()], m.net))

def test_a_copy_of_another_type_is_the_same_image_and_finer_numbers_are_not():
    t = torch.randint(0, 255, (2, 3, 4, 4), dtype=torch.uint8)
    def is_noted(x, t, version): return were_given((x,), [(t, version)])
    one = t,t._version
    assert is_noted(t.float(), *one) and not is_noted(t.float() + .5, *one) and is_noted(t.view(t.shape), *one)
    x = torch.randn(4)
    assert is_noted(x.half(), x, x._version) and is_noted(x.double(), x, x._version) and not is_noted(x.double() + 1e-12, x, x._version)

@pytest.mark.parametrize('make', [lambda: METHODS['KD'].make(), lambda: Distill(lambda batch: network(7)(batch.xb[0])), RDrop], ids=['KD', 'function', 'RDrop'])
@pytest.mark.parametrize('change', ['in place', 'replaced'])
def test_a_network_that_writes_into_its_inputs_hides_no_callback(make, change):
    class Late(Callback):
        order = 50
        def before_batch(self):
            if change == 'replaced': self.learn.xb = (self.learn.xb[0]*3,)
            else: self.learn.xb[0].mul_(3)
    with pytest.raises(ValueError, match='a callback has changed the inputs'): weights([make(), Late()], lambda: Centred(convolutions(), True))

@pytest.mark.parametrize('name', ['KD', 'RDrop', 'MeanTeacher', 'MemoryReplay'])
def test_a_network_that_writes_into_its_inputs_now_and_then_is_trained(name):
    class Clips(Centred):
        def forward(self, x):
            large = x.max() > 1.5
            if not self.in_place: x = x.clamp(max=1.5) if large else x
            elif large: x.clamp_(max=1.5)
            return self.net(x)
    a,b = (weights([METHODS[name].make()], lambda: Clips(convolutions(), in_place)) for in_place in (True, False))
    assert torch.equal(a, b)

def test_a_teacher_of_the_users_that_writes_into_its_inputs_changes_nothing_for_the_student():
    class Early(Late): before_student = True
    net = copy.deepcopy(network(7)).eval()
    a,b = (weights([Distill(Early(Centred(net, in_place)))], lambda: Centred(convolutions(), True)) for in_place in (True, False))
    assert torch.equal(a, b)
