"The batch under way: who is asked about it, when, with which labels, and what is left of it"
import math
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from fastai.basics import DataLoaders, Learner, SGD
from fastai.callback.all import CutMix, MixUp, SchedLin
from fastai.callback.core import Callback, CancelBatchException
from fastai.callback.progress import ProgressCallback
from fastai.losses import CrossEntropyLossFlat
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from fastkdtf.callback.distill import Distill, KnowledgeDistillation, LsrKD, matched_controls
from fastkdtf.callback.selfguide import SelfGuidance
from fastkdtf.callback.term import LossTerm, RunningMean
from fastkdtf.core import Batch, Step, kept
from fastkdtf.divergence import SoftLoss
from fastkdtf.teachers.base import Teacher, UniformTeacher
from fastkdtf.vision.models import create_model

K = 5

class Keep(Callback):
    "Keep logits, labels and the loss of each step"
    order = 5.5
    def before_fit(self): self.steps = []
    def after_loss(self):
        if not self.training: return
        mixing = next((cb for cb in self.learn.cbs if isinstance(cb, (MixUp, CutMix))), None)
        pairs = [(self.learn.y, mixing.lam), (mixing.yb1[0], 1-mixing.lam)] if mixing else [(self.learn.y, 1.)]
        self.steps.append(SimpleNamespace(z=self.learn.pred.detach().double(), x=self.learn.x, pairs=pairs, loss=self.learn.loss_grad.item(),
                                          base=self.learn.loss_func(self.learn.pred, *self.learn.yb).item()))

def fit(cbs, n_epoch=1, size=8, net=None):
    g = torch.Generator().manual_seed(0)
    x,y = torch.randn(32, 3, size, size, generator=g),torch.randint(0, K, (32,), generator=g)
    dls = DataLoaders(DataLoader(TensorDataset(x, y), 16), DataLoader(TensorDataset(x, y), 16))
    dls.c = K
    torch.manual_seed(1)
    net = net or nn.Sequential(nn.Flatten(), nn.Linear(3*size*size, K))
    keep = Keep()
    learn = Learner(dls, net, CrossEntropyLossFlat(), opt_func=SGD, lr=.01, cbs=[*cbs, keep]).remove_cb(ProgressCallback)
    with learn.no_logging(): learn.fit(n_epoch)
    return learn,keep.steps

def log_probs(z): return torch.log_softmax(z, 1)

class LabelSquared(SoftLoss):
    "Reads the label and nothing else: `(1 - p_label)²`"
    calls = 0
    def __call__(self, batch, target):
        self.calls += 1
        return (1 - batch.z.softmax(1).gather(1, batch.y[:,None])[:,0])**2

class Entropy(SoftLoss):
    "Reads no label"
    asks_label,calls = False,0
    def __call__(self, batch, target):
        self.calls += 1
        p = batch.z.log_softmax(1)
        return -(p.exp()*p).sum(1)

class Says(Teacher):
    "Notes when it is asked, and about which labels"
    def __init__(self, **declared):
        self.asked = []
        for name,value in declared.items(): setattr(self, name, value)
    def __call__(self, batch):
        self.asked.append(SimpleNamespace(y=batch.y, early=batch.z is None, grad=torch.is_grad_enabled()))
        return torch.zeros(len(batch.y), K)

# labels

@pytest.mark.parametrize('mix', [None, MixUp, CutMix])
def test_a_loss_that_reads_the_label_is_computed_for_each_and_mixed_as_the_labels_are(mix):
    loss = LabelSquared()
    _,steps = fit([Distill(UniformTeacher(), (1., .5), 1., scale=1, loss=loss), *([mix(.4)] if mix else [])])
    assert len(steps) == 2 and loss.calls == (4 if mix else 2)
    for o in steps:
        soft = lambda y: (1 - o.z.softmax(1).gather(1, y[:,None])[:,0])**2
        want = sum((torch.as_tensor(part).double()*soft(y)).mean().item() for y,part in o.pairs)
        assert o.loss == pytest.approx(o.base + .5*want, rel=1e-5)

def test_a_loss_that_reads_no_label_is_computed_once():
    loss = Entropy()
    _,steps = fit([Distill(Says(before_student=True), (1., .5), 1., scale=1, loss=loss), MixUp(.4)])
    assert len(steps) == 2 and loss.calls == 2
    for o in steps: assert o.loss == pytest.approx(o.base + .5*-(log_probs(o.z).exp()*log_probs(o.z)).sum(1).mean().item(), rel=1e-5)

def test_a_subclass_whose_losses_read_the_label_is_right_under_mixup_without_saying_so():
    class Own(Distill):
        def sample_losses(self, batch): return (1 - batch.z.softmax(1).gather(1, batch.y[:,None])[:,0])**2
    method = Own(Says(before_student=True), (1., .5), 1., scale=1)
    _,steps = fit([method, MixUp(.4)])
    assert len(steps) == 2
    for o in steps:
        want = sum((torch.as_tensor(part).double()*(1 - o.z.softmax(1).gather(1, y[:,None])[:,0])**2).mean().item() for y,part in o.pairs)
        assert o.loss == pytest.approx(o.base + .5*want, rel=1e-5)
    d = method.describe(K)
    assert d.scale is None and d.epsilon is None and matched_controls(method, K) == {} and ('scale of the loss', 'not known') in d.rows()

def test_what_a_method_declares_goes_before_what_its_parts_say():
    class Own(Distill):
        asks_label = False
        def sample_losses(self, batch): return batch.z.pow(2).sum(1)
    seen = Says(before_student=True)
    fit([Own(seen, (1., .5), 1., scale=1), MixUp(.4)])
    assert len(seen.asked) == 2

def test_a_teacher_that_reads_the_label_before_the_student_is_asked_for_each_label_of_a_mixed_image():
    mixed,plain = Says(before_student=True, asks_label=True),Says(before_student=True, asks_label=True)
    _,steps = fit([Distill(mixed, .5, 1.), MixUp(.4)])
    assert [o.early for o in mixed.asked] == [False]*4
    for i,o in enumerate(steps):
        for asked,(y,_) in zip(mixed.asked[2*i:2*i+2], o.pairs, strict=True): assert torch.equal(asked.y, y)
    fit([Distill(plain, .5, 1.)])
    assert [o.early for o in plain.asked] == [True]*2

def test_one_number_for_the_batch_is_a_soft_loss_too_but_not_for_two_labels():
    class Whole(SoftLoss):
        asks_label = False
        def __call__(self, batch, target): return batch.z.std()
    _,steps = fit([Distill(Says(before_student=True), (1., .5), 1., scale=1, loss=Whole), MixUp(.4)])
    assert len(steps) == 2
    for o in steps: assert o.loss == pytest.approx(o.base + .5*o.z.std().item(), rel=1e-5)
    Whole.asks_label = True
    with pytest.raises(TypeError, match='two labels'): fit([Distill(UniformTeacher(), (1., .5), 1., scale=1, loss=Whole), MixUp(.4)])

# when

def test_a_teacher_that_must_see_every_batch_is_asked_at_weight_0_and_others_are_not():
    for alpha in (0., SchedLin(0., 0.)):
        for early in (False, True):
            keen,other = Says(every_batch=True, before_student=early),Says(before_student=early)
            fit([Distill(keen, alpha, 1.)], 2)
            fit([Distill(other, alpha, 1.)], 2)
            assert len(keen.asked) == 4 and not other.asked

def test_a_method_of_weight_0_changes_nothing_though_its_teacher_sees_every_batch():
    a,b = (fit(cbs, 2)[0].model[1].weight for cbs in ([Distill(Says(every_batch=True), 0., 1.)], []))
    assert torch.equal(a, b)

def test_every_teacher_is_asked_without_a_graph():
    late,early = Says(),Says(before_student=True)
    fit([Distill(late, .5, 1.), Distill(early, .5, 1., name='early')])
    assert [o.grad for o in late.asked+early.asked] == [False]*4 and [o.early for o in late.asked+early.asked] == [False]*2 + [True]*2

def test_huge_logits_of_a_teacher_count_though_their_sum_is_infinite():
    def huge(batch): return torch.tensor([3e38, 3e38, 0., 0., 0.]).expand(len(batch.y), K)
    _,steps = fit([Distill(huge, 1., 1., scale=1, loss='ce')])
    assert len(steps) == 2
    for o in steps: assert o.loss == pytest.approx(-log_probs(o.z)[:,:2].mean().item(), rel=1e-5)

@pytest.mark.parametrize('bad', [math.inf, -math.inf, math.nan])
def test_one_number_of_a_teacher_that_is_none_stops_the_training(bad):
    def broken(batch): return torch.zeros(len(batch.y), K).index_fill(1, torch.tensor([2]), bad)
    with pytest.raises(ValueError, match='infinite or not a number'): fit([Distill(broken, .5)])

@pytest.mark.parametrize('ignored', [-100, -1, 2, 255])
def test_positions_count_unless_the_loss_ignores_their_label(ignored):
    for y in (torch.tensor([0, 3, 1]), torch.tensor([[0, ignored], [ignored, 4]]), torch.full((3,), ignored), torch.empty(0, dtype=torch.long)):
        keep = kept(y, ignored)
        assert keep is None and not (y == ignored).any() or torch.equal(keep, y != ignored)

def test_weights_that_are_learned_get_their_gradients():
    "Weights of a method may be tensors; here the soft loss is the mean square of the logits"
    class Learned(LossTerm):
        def hard_weight(self, pct): return .5
        def contribution(self, labels):
            self.hard,self.soft = (hard,soft) = torch.tensor(.5, requires_grad=True),torch.tensor(2., requires_grad=True)
            return hard, soft, self.learn.pred.pow(2).mean()
        def after_step(self): steps.append((self.hard.grad.item(), self.soft.grad.item()))
    steps = []
    _,kept_steps = fit([Learned()])
    assert len(steps) == len(kept_steps) == 2
    for (hard,soft),o in zip(steps, kept_steps):
        assert hard == pytest.approx(o.base, rel=1e-5) and soft == pytest.approx(o.z.pow(2).mean().item(), rel=1e-5)
        assert o.loss == pytest.approx(.5*hard + 2*soft, rel=1e-5)

def test_a_column_of_half_precision_losses_is_added_up_in_float32():
    mean,losses = RunningMean(),torch.rand(1000, generator=torch.Generator().manual_seed(0)).bfloat16()
    for loss in losses: mean.add(loss, 16)
    torch.testing.assert_close(mean.value, losses.double().mean().float(), rtol=1e-5, atol=0)

# what is left

def test_the_batch_goes_when_it_ends():
    class Look(Callback):
        order,run_valid = 100,False
        def before_fit(self): self.seen = []
        def before_batch(self): self.seen.append(isinstance(method.batch, Batch))
        def before_backward(self): self.seen.append((method.batch.xb, method.batch.answers))
        def after_batch(self): self.seen.append(method.batch)
    method,look = KnowledgeDistillation(nn.Sequential(nn.Flatten(), nn.Linear(192, K))),Look()
    fit([method, look])
    assert look.seen == [True, ((), {}), None]*2 and method.batch is None

@pytest.mark.parametrize('make', [lambda: KnowledgeDistillation(nn.Sequential(nn.Flatten(), nn.Linear(192, K))), SelfGuidance, LsrKD])
def test_the_batch_goes_when_it_is_skipped(make):
    class Skip(Callback):
        order,run_valid = 20,False
        def before_batch(self): raise CancelBatchException()
    method = make()
    net = create_model('resnet8', K) if isinstance(method, SelfGuidance) else None
    fit([method, Skip()], net=net)
    assert method.batch is None

def test_step_is_the_old_name():
    assert Step is Batch and Step(torch.tensor([0]), None, (1,)).xb == (1,)

def test_a_batch_with_labels_shares_what_was_said_and_keeps_its_own():
    batch = Batch(torch.tensor([0]), answers={None: 1})
    labelled = batch.labelled(torch.tensor([1]), torch.zeros(1, 3))
    labelled.answers['more'] = 2
    assert batch.answers == {None: 1} and labelled.answers == {None: 1, 'more': 2} and labelled.extra_logits is not batch.extra_logits


# ---------------------------------------------------------------- what a batch costs

def journey(method):
    "Return the modules of this library that a later batch calls functions of, in order"
    seen,on = [],[False]
    def look(frame, event, arg):
        if event == 'call' and on[0] and f'{os.sep}fastkdtf{os.sep}' in frame.f_code.co_filename: seen.append(Path(frame.f_code.co_filename).stem)
    class Window(Callback):
        order = -30
        def before_batch(self): on[0] = self.training and self.iter == 1
        def after_batch(self): on[0] = False
    before = sys.getprofile()
    sys.setprofile(look)
    try: fit([method, Window()])
    finally: sys.setprofile(before)
    return [name for name in seen if name not in ('models', 'cifar_nets')]

@pytest.mark.parametrize('method,calls,changes', [(LsrKD, 61, 24), (lambda: KnowledgeDistillation(nn.Sequential(nn.Flatten(), nn.Linear(192, K))), 97, 41)])
def test_a_later_batch_calls_few_functions_and_changes_modules_rarely(method, calls, changes):
    seen = journey(method())
    assert 30 < len(seen) <= calls and sum(a != b for a,b in zip(seen, seen[1:])) <= changes

def test_an_error_in_any_epoch_takes_the_columns_off_and_a_batch_is_not_guarded_by_itself():
    class Fail(Callback):
        def before_batch(self):
            if not self.training: return
            guarded.append('_with_events' in vars(self.learn))
            if self.epoch == 1: raise RuntimeError('on purpose')
    guarded = []
    x,y = torch.randn(32, 3, 8, 8),torch.randint(0, K, (32,))
    dls = DataLoaders(*[DataLoader(TensorDataset(x, y), 16)]*2)
    dls.c = K
    learn = Learner(dls, nn.Sequential(nn.Flatten(), nn.Linear(192, K)), CrossEntropyLossFlat(), SGD, cbs=[LsrKD(), Fail()]).remove_cb(ProgressCallback)
    with learn.no_logging(), pytest.raises(RuntimeError, match='on purpose'): learn.fit(2)
    assert guarded == [False]*3 and '_with_events' not in vars(learn) and not learn.metrics and learn.lsr_kd.batch is None
