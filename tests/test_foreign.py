"Batches, losses and labels of another kind than ours: right, or refused with a sentence"
import gc
import warnings
from fractions import Fraction
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from fastai.basics import DataLoaders, Learner, SGD, load_learner
from fastai.callback.all import CSVLogger, GradientAccumulation, MixUp
from fastai.callback.core import Callback, CancelBatchException, CancelEpochException, CancelFitException, CancelTrainException
from fastai.callback.schedule import lr_find as _   # Learner.lr_find
from fastai.callback.progress import ProgressCallback
from fastai.data.load import DataLoader as FastaiLoader
from fastai.layers import NoneReduce
from fastai.losses import BaseLoss, CrossEntropyLossFlat, FocalLossFlat
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.nn.utils import prune
from torch.utils.data import DataLoader, TensorDataset

from networks import CPUAutocast
from fastkdtf.callback.checkpoint import Checkpoint, seed_run
from fastkdtf.callback.distill import Distill, KnowledgeDistillation, LsrKD, MemoryReplay, TfKDReg
from fastkdtf.callback.effdstl import CKM, WSL
from fastkdtf.callback.precision import HalfPrecision
from fastkdtf.callback.memories import MeanTeacher
from fastkdtf.callback.views import RDrop
from fastkdtf.callback.selfguide import SelfGuidance, StochasticDepth
from fastkdtf.callback.survival import residual_blocks
from fastkdtf.callback.term import LossTerm, loss_kind
from fastkdtf.closed_form import label_loss
from fastkdtf.core import Batch, TwoValued, check_labels, first_output, looks_like_probabilities, plain_tensors
from fastkdtf.losses import CKMLoss, KDLoss
from fastkdtf.teachers.base import FunctionTeacher, Teacher, networks_of
from fastkdtf.teachers.cache import CachedTeacher
from fastkdtf.teachers.frozen import FrozenCopy
from fastkdtf.teachers.memory import MemoryTeacher, is_due
from fastkdtf.teachers.network import EnsembleTeacher, NetworkTeacher
from fastkdtf.lab.compare import describe_kd as _   # Learner.describe_kd
from fastkdtf.vision.data import kd_dataloaders
from fastkdtf.vision.loader import batch_info
from fastkdtf.vision.models import create_model

K = 5
g = torch.Generator().manual_seed(0)
x,y = torch.randn(32, 3, 8, 8, generator=g),torch.randint(0, K, (32,), generator=g)
def linear(k=K): return nn.Sequential(nn.Flatten(), nn.Linear(192, k))

class Keep(Callback):
    "Keep predictions, labels and the loss of each step"
    order = 5.5
    def before_fit(self): self.steps = []
    def after_loss(self):
        if not self.training: return
        learn = self.learn
        self.steps.append(SimpleNamespace(pred=learn.pred, x=learn.xb[0], y=learn.y, loss=learn.loss_grad.item(), learn=learn))

def fit(cbs, loss=None, net=None, labels=y, data=x, n_epoch=1):
    dls = DataLoaders(*[DataLoader(TensorDataset(data, labels), 16)]*2)
    dls.c = K
    torch.manual_seed(1)
    keep = Keep()
    learn = Learner(dls, net or linear(), loss or CrossEntropyLossFlat(), opt_func=SGD, lr=.01, cbs=[*cbs, keep]).remove_cb(ProgressCallback)
    with learn.no_logging(): learn.fit(n_epoch)
    return keep.steps

def lsr(z, y, alpha=.1, tau=3.):
    kl = -torch.tensor(float(z.shape[1])).log() - (z/tau).log_softmax(1).mean(1)
    return (1-alpha)*F.cross_entropy(z, y) + alpha*tau*kl.mean()

# batches

class Permute(Callback):
    "Another order of the samples than the loader's"
    order,run_valid = 0,False
    def before_batch(self):
        self.i = torch.arange(len(self.y)-1, -1, -1)
        self.learn.xb,self.learn.yb = (self.x[self.i],),(self.y[self.i],)

class InPlace(Callback):
    order,run_valid = 0,False
    def before_batch(self): self.x.mul_(.5)

class Blend(Callback):
    "A mixer that nobody knows, with labels that are probabilities"
    order,run_valid = 0,False
    def before_batch(self):
        q = F.one_hot(self.y, self.dls.c).float()
        self.learn.xb,self.learn.yb = ((self.x+self.x.flip(0))/2,),((q+q.flip(0))/2,)

@pytest.mark.parametrize('change', [Permute, InPlace, Blend])
def test_a_batch_that_a_callback_changed_has_no_indices_and_a_cache_refuses_it(change, tmp_path):
    dls = kd_dataloaders('digits', bs=32, train_subset=64, device='cpu')
    seen = []
    class Asks(Teacher):
        before_student = True
        def __call__(self, batch):
            seen.append(batch.idx)
            return torch.zeros(len(batch.xb[0]), 10)
    net = lambda: nn.Sequential(nn.Flatten(), nn.Linear(192, 10))
    def train(*cbs):
        learn = Learner(dls, net(), nn.CrossEntropyLoss(), cbs=cbs).remove_cb(ProgressCallback)
        with learn.no_logging(): learn.fit(1)
    train(Distill(Asks(), .5, 1.))
    assert len(seen) == 2 and all(o is not None for o in seen)
    train(Distill(Asks(), .5, 1.), change())
    assert len(seen) == 4 and seen[2:] == [None, None]
    cache = CachedTeacher(net(), tmp_path/'c')
    with pytest.raises(ValueError, match='must know which sample'): train(KnowledgeDistillation(cache), change())
    assert len(list((tmp_path/'c').glob('rows*'))) == 0 or (tmp_path/'c'/'rows.bin').stat().st_size == 0
    train(KnowledgeDistillation(CachedTeacher(net(), tmp_path/'d')))

def test_what_a_loader_gave_is_known_by_its_tensors():
    dl = kd_dataloaders('digits', bs=32, train_subset=64, device='cpu').train
    for xb,_ in dl:
        assert batch_info(dl, (xb,)) is batch_info(dl) is not None
        assert batch_info(dl, (xb.as_subclass(Tensor),)) is batch_info(dl)   # the same numbers in the same place
        assert batch_info(dl, (xb.clone(),)) is batch_info(dl, (xb.double(),)) is batch_info(dl)   # or the same elsewhere, of another type
        assert batch_info(dl, (xb.flip(0),)) is None and batch_info(dl, (xb[1:],)) is None and batch_info(dl, (xb*2,)) is None
        xb.add_(0)
        assert batch_info(dl, (xb,)) is None and batch_info(dl) is not None

# mixers

class OtherMixUp(Callback):
    "MixUp as other libraries have it: fastai's in all but its class"
    run_valid,every = False,1
    def before_train(self): self.old_lf,self.learn.loss_func,self.n = self.learn.loss_func,self.lf,0
    def after_train(self): self.learn.loss_func = self.old_lf
    def before_batch(self):
        self.n += 1
        self.mixes = self.n%self.every == 0
        if not self.mixes and hasattr(self, 'lam'): return   # what it holds is that of an earlier batch
        self.lam,order = torch.rand(len(self.y)),torch.randperm(len(self.y))
        self.yb1 = (self.y[order],)
        if self.mixes: self.learn.xb = (torch.lerp(self.x[order], self.x, self.lam[:,None,None,None]),)
    def lf(self, pred, *yb):
        if not self.mixes: return self.old_lf(pred, *yb)
        with NoneReduce(self.old_lf) as lf: return torch.lerp(lf(pred, *self.yb1), lf(pred, *yb), self.lam).mean()

@pytest.mark.parametrize('every', [1, 2])
def test_a_mixer_of_another_library_is_known_by_what_it_holds(every):
    class Note(Callback):
        order,run_valid = 5.4,False
        def after_loss(self): held.append([(self.learn.y, mixer.lam), (mixer.yb1[0], 1-mixer.lam)] if mixer.mixes else [(self.learn.y, torch.ones(16))])
    held,mixer = [],OtherMixUp()
    mixer.every = every
    steps = fit([mixer, TfKDReg(.3), Note()], n_epoch=2)
    assert len(steps) == 4 and {len(o) for o in held} == ({2} if every == 1 else {1, 2})
    for o,pairs in zip(steps, held):
        z,p = o.pred.double(),TfKDReg().teacher.soft_targets(K, 20.)
        want = 0.
        for labels,part in pairs:
            t = torch.full((16, K), p.off, dtype=torch.double).scatter_(1, labels[:,None], p.on)
            kl = (t*(t.log()-(z/20).log_softmax(1))).sum(1)
            want = want + (part*(.7*F.cross_entropy(z, labels, reduction='none') + .3*400*kl)).mean()
        assert o.loss == pytest.approx(want.item(), rel=1e-5)

def test_tsais_mixup(tmp_path):
    tsai = pytest.importorskip('tsai.data.mixed_augmentation')
    held,mixer,keep = [],tsai.MixUp1d(),Keep()
    class Note(Callback):
        order,run_valid = 5.4,False
        def after_loss(self): held.append([(plain_tensors(self.learn.y), mixer.lam), (plain_tensors(mixer.yb1[0]), 1-mixer.lam)])
    learn = digits_learner(tmp_path, digit_net(), mixer, LsrKD(), Note(), keep)
    with learn.no_logging(): learn.fit(1)
    assert len(keep.steps) == len(held) == 2
    for o,pairs in zip(keep.steps, held):
        z,y = plain_tensors((o.pred.double(), o.y))
        base = sum((part*F.cross_entropy(z, labels, reduction='none')).mean() for labels,part in pairs)
        assert o.loss == pytest.approx((.9*base + lsr(z, y) - .9*F.cross_entropy(z, y)).item(), rel=1e-5)

def test_a_callback_whose_loss_nobody_understands_is_refused():
    class Odd(Callback):
        run_valid = False
        def before_train(self): self.old,self.learn.loss_func = self.learn.loss_func,self.lf
        def after_train(self): self.learn.loss_func = self.old
        def lf(self, pred, *yb): return self.old(pred, *yb)*2
    with pytest.raises(TypeError, match='Odd has put a loss of its own in the place of the learner'): fit([Odd(), LsrKD()])
    class Liar(OtherMixUp):
        def lf(self, pred, *yb): return self.old_lf(pred, *yb)*3
    with pytest.raises(TypeError, match='neither that of its labels nor the mixture that Liar holds'): fit([Liar(), LsrKD()])

# losses

def ignoring(label): return partial(F.cross_entropy, ignore_index=label)

@pytest.mark.parametrize('make,kind', [
    (F.cross_entropy, (1, -100, 'mean')), (ignoring(3), (1, 3, 'mean')), (partial(ignoring(3), reduction='sum'), (1, 3, 'sum')),
    (partial(partial(F.cross_entropy, ignore_index=3), ignore_index=4), (1, 4, 'mean')), (nn.CrossEntropyLoss(ignore_index=2, reduction='sum'), (1, 2, 'sum')),
    (CrossEntropyLossFlat(axis=-1, ignore_index=7), (-1, 7, 'mean')), (lambda z, y: F.cross_entropy(z, y), (1, -100, 'mean'))])
def test_what_a_loss_says_of_itself(make, kind): assert tuple(loss_kind(make)) == kind

def test_the_ignored_label_of_a_wrapped_loss_is_not_trained_on():
    marked = y.clone()
    marked[::4] = 255
    steps = fit([LsrKD()], ignoring(255), labels=marked)
    assert len(steps) == 2
    for o in steps:
        keep = o.y != 255
        assert keep.sum() == 12 and o.loss == pytest.approx(lsr(o.pred[keep].double(), o.y[keep]).item(), rel=1e-5)

@pytest.mark.parametrize('method', [LsrKD, TfKDReg, lambda: KnowledgeDistillation(linear()), lambda: MemoryReplay(2, interval_steps=1)])
def test_a_label_outside_the_classes_is_refused_where_the_loss_hides_that_it_ignores_it(method):
    marked = y.clone()
    marked[3] = 255
    with pytest.raises(ValueError, match='between 0 and 4.*got 255.*ignore_index=255'):
        fit([method()], lambda z, y: F.cross_entropy(z, y, ignore_index=255), labels=marked)

@pytest.mark.parametrize('loss', [F.binary_cross_entropy_with_logits, F.mse_loss, lambda z, y: F.mse_loss(z.sigmoid(), y)])
def test_several_labels_and_regression_are_refused_though_their_loss_is_a_function(loss):
    several = (torch.rand(32, K, generator=torch.Generator().manual_seed(2)) > .4).float()
    several[:,0] = 1.
    for method in (LsrKD(), KnowledgeDistillation(linear()), TfKDReg()):
        with pytest.raises(TypeError, match='several labels'): fit([method], loss, labels=several)

def test_labels_that_are_probabilities_stay_welcome():
    q = torch.rand(32, K, generator=torch.Generator().manual_seed(2)).softmax(1)
    assert len(fit([LsrKD()], nn.CrossEntropyLoss(), labels=q)) == 2

@pytest.mark.parametrize('bad', [torch.tensor([0, 5]), torch.tensor([-1, 0])])
def test_losses_do_not_clamp_labels(bad):
    z = torch.randn(2, K)
    for loss in (lambda: KDLoss(alpha=1.)(z, bad, z), lambda: CKMLoss()(z, bad, z)):
        with pytest.raises(ValueError, match='labels must lie between 0 and 4'): loss()

def test_an_ignored_position_has_no_labelled_class():
    dense = TwoValued(.7, .1).dense(torch.tensor([1, -100, 255]), 4)
    assert torch.allclose(dense, torch.tensor([[.1, .7, .1, .1], [.1]*4, [.1]*4]))

def test_check_labels_says_what_is_wrong():
    check_labels(torch.tensor([0, -100, 4]), 5)
    check_labels(torch.tensor([[.2, .8]]), 2)
    with pytest.raises(ValueError, match='got 5'): check_labels(torch.tensor([0, 5]), 5)
    with pytest.raises(TypeError, match='off by 1'): check_labels(torch.tensor([[1., 1.]]), 2)

class Holds(nn.Module):
    "A loss of the user's, in a layer"
    def __init__(self, loss):
        super().__init__()
        self.loss = loss
    def forward(self, z, y): return self.loss(z, y)

class Calls:
    "A loss of the user's, in an object; `method` is another"
    def __init__(self, loss): self.loss = loss
    def __call__(self, z, y): return self.loss(z, y)
    def method(self, z, y): return self.loss(z, y)

def around(loss): return lambda z, y: loss(z, y)

WRAPS = [Holds, Calls, lambda loss: Calls(loss).method, around, lambda loss: partial(around(loss)), lambda loss: Holds(Holds(loss))]

@pytest.mark.parametrize('loss', [lambda: nn.CrossEntropyLoss(ignore_index=3), lambda: CrossEntropyLossFlat(ignore_index=3)])
@pytest.mark.parametrize('wrap', WRAPS)
def test_the_ignored_label_of_a_loss_inside_a_loss_is_known(wrap, loss): assert loss_kind(wrap(loss())) == (1, 3, 'mean')

def test_losses_inside_a_loss_that_contradict_each_other_say_nothing():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.a,self.b = nn.CrossEntropyLoss(ignore_index=3),nn.NLLLoss(ignore_index=4)
    assert loss_kind(Two()) == loss_kind(lambda z, y: F.cross_entropy(z, y)) == (1, -100, 'mean')

@pytest.mark.parametrize('wrap', WRAPS[:4])
def test_a_label_that_a_loss_inside_a_loss_ignores_is_not_trained_on(wrap):
    marked = y.clone()
    marked[::4] = 255
    steps = fit([LsrKD()], wrap(nn.CrossEntropyLoss(ignore_index=255)), labels=marked)
    assert len(steps) == 2
    for o in steps:
        keep = o.y != 255
        assert o.loss == pytest.approx(lsr(o.pred[keep].double(), o.y[keep]).item(), rel=1e-5)

SECOND_PASS = dict(SelfGuidance=SelfGuidance, RDrop=RDrop)
def random_net(): return nn.Sequential(create_model('resnet8', K), nn.Dropout(.2))

@pytest.mark.parametrize('name', SECOND_PASS)
@pytest.mark.parametrize('loss,labels,words', [
    (lambda z, t: F.cross_entropy(z, t, ignore_index=0), y, 'the label 0 do not count in the loss'), (lambda z, t: F.cross_entropy(z, t, reduction='sum'), y, 'the loss is the sum'),
    (F.mse_loss, F.one_hot(y, K).float(), '1 is added to all')])
def test_methods_that_run_the_student_twice_look_at_the_loss_too(name, loss, labels, words):
    with pytest.warns(UserWarning, match=words): fit([SECOND_PASS[name]()], loss, random_net(), labels)

@pytest.mark.parametrize('name', SECOND_PASS)
@pytest.mark.parametrize('at', [3, 20])
def test_methods_that_run_the_student_twice_refuse_labels_that_are_no_classes(name, at):
    marked = y.clone()
    marked[at] = 255
    with pytest.raises(ValueError, match='between 0 and 4.*got 255'): fit([SECOND_PASS[name]()], lambda z, t: F.cross_entropy(z, t, ignore_index=255), random_net(), marked)
    several = (torch.rand(32, K, generator=torch.Generator().manual_seed(2)) > .4).float()
    several[:,0] = 1.
    with pytest.raises(TypeError, match='several labels'): fit([SECOND_PASS[name]()], F.binary_cross_entropy_with_logits, random_net(), several)

@pytest.mark.parametrize('name', SECOND_PASS)
def test_methods_that_run_the_student_twice_say_nothing_where_all_is_well(name):
    for loss in (None, nn.CrossEntropyLoss(label_smoothing=.1), ignoring(3), FocalLossFlat()):
        with warnings.catch_warnings():
            warnings.simplefilter('error', UserWarning)
            assert len(fit([SECOND_PASS[name]()], loss, random_net())) == 2

@pytest.mark.parametrize('make', [LsrKD, lambda: KnowledgeDistillation(linear()), lambda: MemoryReplay(1, interval_steps=1), RDrop])
def test_logits_in_float64_train_as_they_would_without_the_method(make):
    "fastai takes the loss in float32, whatever the logits"
    class Doubled(nn.Module):
        def __init__(self):
            super().__init__()
            self.net,self.drop = linear(),nn.Dropout(.1)
        def forward(self, x): return self.net(self.drop(x)).double()
    steps = fit([make()], net=Doubled())
    assert len(steps) == 2 and all(o.pred.dtype == torch.float64 and np.isfinite(o.loss) for o in steps)

class Casts(nn.Module):
    "Brings its inputs to float32, and takes them out of what holds them"
    def __init__(self, net):
        super().__init__()
        self.net = net
    def forward(self, x): return self.net(getattr(x, 'images', x).float())

class Held:
    "An object that neither fastai nor PyTorch can look into, as a batch of graphs is"
    def __init__(self, images): self.images = images

COPIED = dict(KD=lambda net: KnowledgeDistillation(net), MemoryReplay=lambda net: MemoryReplay(1, interval_steps=1), MeanTeacher=lambda net: MeanTeacher(.5, rampup=0))

@pytest.mark.parametrize('name', COPIED)
@pytest.mark.parametrize('change', [Tensor.double, Tensor.half, Held], ids=['float64', 'float16', 'object'])
def test_networks_that_bring_their_inputs_to_their_own_type_are_copied_as_they_are(name, change):
    class Change(Callback):
        order = 1
        def before_batch(self): self.learn.xb = (change(self.x),)
    def losses(wrap, *cbs):
        torch.manual_seed(0)
        return [o.loss for o in fit([COPIED[name](wrap(linear())), *cbs], net=wrap(linear()), data=x.half().float())]
    assert losses(Casts, Change()) == losses(nn.Sequential) != []

@pytest.mark.parametrize('make', [lambda: KnowledgeDistillation(linear()), lambda: MemoryReplay(1, interval_steps=1), lambda: MeanTeacher(.5, rampup=0), RDrop])
def test_a_batch_that_changes_after_a_method_has_read_it_is_refused(make):
    class Later(Permute): order = 7
    with pytest.raises(ValueError, match='give that callback an order below 5'): fit([make(), Later()])

def test_what_is_asked_after_the_student_sees_what_the_student_has_read():
    class Later(Permute): order = 7
    net = linear()
    steps = fit([Distill(lambda batch: net(batch.xb[0])), Later()])
    assert len(steps) == 2 and torch.equal(steps[0].y, y[:16].flip(0))
    for o in steps:
        z,zt = o.pred.detach().double()/4,net(o.x).detach().double()/4
        kl = F.kl_div(z.log_softmax(1), zt.softmax(1), reduction='batchmean')
        assert o.loss == pytest.approx((.1*F.cross_entropy(4*z, o.y) + .9*16*kl).item(), rel=1e-5)
    assert len(fit([LsrKD(), Later()])) == 2   # it reads no image

def test_copies_of_a_network_that_is_pruned_in_the_middle_are_pruned_from_then_on():
    class Prune(Callback):
        def before_epoch(self):
            if self.epoch == 1: prune.l1_unstructured(self.model[1], 'weight', .5)
    memory = MemoryReplay(2, interval_steps=1)
    shapes = []
    class Look(Callback):
        def after_batch(self): shapes.append([len(copy.shapes) for copy in memory.teacher.copies])
    assert len(fit([memory, Prune(), Look()], n_epoch=2)) == 4 and shapes[:2] == [[2, 2]]*2 and shapes[-1] == [3, 3]
    with pytest.raises(ValueError, match='weights that its average does not have'): fit([MeanTeacher(.5, rampup=0), Prune()], n_epoch=2)

# teachers

def test_probabilities_in_place_of_logits_are_said_aloud():
    net = linear()
    with pytest.warns(UserWarning, match='probabilities, it seems'): fit([KnowledgeDistillation(nn.Sequential(net, nn.Softmax(1)))])
    assert looks_like_probabilities(torch.tensor([[.5, .5], [1., 0.]])) and not looks_like_probabilities(torch.tensor([[.5, .6]]))
    assert not looks_like_probabilities(torch.tensor([[1.5, -.5]]))

class Several(nn.Module):
    "Returns more than logits"
    def __init__(self, kind):
        super().__init__()
        self.net,self.kind = linear(),kind
    def forward(self, x):
        z = self.net(x)
        if self.kind == 'tuple': return z,z.mean()
        if self.kind == 'dict':  return {'hidden': x, 'logits': z}
        return SimpleNamespace(hidden=x, logits=z)

LOSSES = dict(tuple=lambda p, t: F.cross_entropy(p[0], t) + .3*p[1], dict=lambda p, t: F.cross_entropy(p['logits'], t))

@pytest.mark.filterwarnings('ignore:an interval of')
@pytest.mark.parametrize('kind', LOSSES)
@pytest.mark.parametrize('method', ['LsrKD', 'KD', 'MemoryReplay'])
def test_students_that_return_more_than_logits(kind, method):
    teacher = linear()
    make = dict(LsrKD=LsrKD, KD=lambda: KnowledgeDistillation(teacher), MemoryReplay=lambda: MemoryReplay(1, interval_steps=100))[method]
    net = Several(kind)
    steps = fit([make()], LOSSES[kind], net)
    assert len(steps) == 2
    o = steps[0]
    z,base = first_output(o.pred).double(),LOSSES[kind](o.pred, o.y).item()
    if method == 'LsrKD': want = .9*base + (lsr(z, o.y) - .9*F.cross_entropy(z, o.y)).item()
    else:
        zt = teacher.eval()(o.x).double() if method == 'KD' else z.detach()   # before the first step the copy is the student
        alpha,tau = (.9, 4.) if method == 'KD' else (.25, 3.)
        t = (zt/tau).softmax(1)
        want = (1-alpha)*base + alpha*tau**2*(t*(t.log()-(z/tau).log_softmax(1))).sum(1).mean().item()
    assert o.loss == pytest.approx(want, rel=1e-5)

@pytest.mark.parametrize('kind', ['tuple', 'dict'])
def test_teachers_that_return_more_than_logits(kind):
    net = Several(kind).eval()
    steps = fit([KnowledgeDistillation(net, alpha=1.)])
    assert len(steps) == 2
    for o in steps:
        t = (net.net(o.x)/4).softmax(1)
        assert o.loss == pytest.approx((16*(t*(t.log()-(o.pred/4).log_softmax(1))).sum(1).mean()).item(), rel=1e-4)

def test_a_network_that_returns_more_than_logits_in_training_only():
    "GoogLeNet with its auxiliary heads, as student and as teacher"
    def loss(out, t): return F.cross_entropy(out, t) if isinstance(out, Tensor) else F.cross_entropy(out.logits, t) + .3*(F.cross_entropy(out.aux_logits1, t) + F.cross_entropy(out.aux_logits2, t))
    torch.manual_seed(0)
    teacher = create_model('torchvision/googlenet', K, aux_logits=True)
    images = torch.randn(8, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    dls = DataLoaders(*[DataLoader(TensorDataset(images, y[:8]), 4)]*2)
    dls.c = K
    learn = Learner(dls, create_model('torchvision/googlenet', K, aux_logits=True), loss, opt_func=SGD, lr=.001, cbs=[KnowledgeDistillation(teacher, .5, 2.), keep := Keep()]).remove_cb(ProgressCallback)
    with learn.no_logging(): learn.fit(1)
    assert len(keep.steps) == 2 and teacher.training
    for o in keep.steps:
        z,zt = o.pred.logits.double(),teacher.eval()(o.x).detach().double()
        assert o.loss == pytest.approx((.5*loss(o.pred, o.y).double() + .5*kd_by_hand(zt, z, 2.)).item(), rel=1e-4)

def test_self_guidance_of_a_network_that_returns_more_than_logits():
    class Aux(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = create_model('resnet8', K)
        def forward(self, x):
            z = self.body(x)
            return z,z*2
    steps = fit([SelfGuidance()], lambda p, t: F.cross_entropy(p[0], t) + .3*F.cross_entropy(p[1], t), Aux())
    assert len(steps) == 2 and all(torch.isfinite(torch.tensor(o.loss)) for o in steps)

def test_inputs_in_a_dict():
    class Fed(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = linear()
        def forward(self, o): return self.net(o['image'])
    items = [({'image': a}, b) for a,b in zip(x, y)]
    dls = DataLoaders(*[DataLoader(items, 16)]*2)
    dls.c,teacher = K,Fed()
    for method in (KnowledgeDistillation(teacher), MemoryReplay(2, interval_steps=1, alpha=.1)):
        learn = Learner(dls, Fed(), CrossEntropyLossFlat(), opt_func=SGD, lr=.01, cbs=[method, keep := Keep()]).remove_cb(ProgressCallback)
        with learn.no_logging(): learn.fit(1)
        assert len(keep.steps) == 2

# derivatives

@pytest.mark.parametrize('tau,hard,soft,target', [(1., .9, .1, TwoValued(.2, .2)), (3., .7, .9, TwoValued(.4, .15)), (20., 0., 1., TwoValued(.2, .2))])
@pytest.mark.parametrize('reduction', ['mean', 'sum', 'none'])
@pytest.mark.parametrize('soft_labels', [False, True])
def test_second_derivatives(tau, hard, soft, target, reduction, soft_labels):
    z = torch.randn(4, K, dtype=torch.double, generator=torch.Generator().manual_seed(3)).requires_grad_()
    labels = torch.rand(4, K, dtype=torch.double, generator=torch.Generator().manual_seed(4)).softmax(1) if soft_labels else torch.tensor([1, 2, -100, 4])
    def f(z):
        loss = label_loss(z, labels, target, tau, hard, soft, reduction=reduction)
        return loss.pow(2).sum() if reduction == 'none' else loss
    assert torch.autograd.gradcheck(f, (z,)) and torch.autograd.gradgradcheck(f, (z,))

# one callback, one learner

def test_a_method_that_another_learner_was_given_is_not_lost_silently():
    method = LsrKD()
    make = lambda cbs: Learner(DataLoaders(*[DataLoader(TensorDataset(x, y), 16)]*2), linear(), CrossEntropyLossFlat(), cbs=cbs).remove_cb(ProgressCallback)
    first,second = make(method),make(method)
    with second.no_logging(): second.fit(1)
    assert 'soft_loss' in second.recorder.metric_names
    with pytest.raises(ValueError, match='lsr_kd was given to another learner since'): first.fit(1)
    first.remove_cbs([cb for cb in first.cbs if cb.name == 'lsr_kd'])
    with first.no_logging(): first.fit(1)
    second.remove_cb(method)
    first.add_cb(method)   # taken off the one, it may go to the other
    with first.no_logging(): first.fit(1)
    assert 'soft_loss' in first.recorder.metric_names

# what outlives a fit

def test_the_second_fit_draws_other_sub_networks_and_a_second_run_the_same():
    class Note(Callback):
        order,run_valid = 7,False
        def before_batch(self): seen.append(tuple(next(cb.bits for cb in self.learn.cbs if isinstance(cb, (SelfGuidance, StochasticDepth)))))
    runs = []
    for make in (SelfGuidance, StochasticDepth, SelfGuidance, StochasticDepth):
        seen = []
        dls = DataLoaders(*[DataLoader(TensorDataset(x, y), 2)]*2)
        torch.manual_seed(1)
        learn = Learner(dls, create_model('resnet20', K), CrossEntropyLossFlat(), opt_func=SGD, lr=.001, cbs=[make(seed=3), Note()]).remove_cb(ProgressCallback)
        with learn.no_logging():
            learn.fit(1)
            learn.fit(1)
        assert len(seen) == 32 and seen[:16] != seen[16:]
        runs.append(seen)
    assert runs[0] == runs[1] == runs[2] == runs[3]

def test_an_interrupted_pass_leaves_no_sub_network_behind():
    class Cut(nn.Module):
        def __init__(self):
            super().__init__()
            self.net,self.cut = create_model('resnet8', K),True
        def forward(self, x):
            if self.cut and self.training: raise KeyboardInterrupt
            return self.net(x)
    net,method = Cut(),StochasticDepth(.01, seed=0)
    learn = Learner(DataLoaders(*[DataLoader(TensorDataset(x, y), 16)]*2), net, CrossEntropyLossFlat(), opt_func=SGD, cbs=method).remove_cb(ProgressCallback)
    with learn.no_logging(), pytest.raises(KeyboardInterrupt): learn.fit(1)
    drawn = [block._drawn for block in residual_blocks(net)]
    assert len(drawn) == 3 and all(bits is None for bits in drawn)

def test_a_method_that_could_teach_nothing_is_refused():
    net = create_model('resnet8', K)
    with pytest.raises(ValueError, match='wsl would teach'): fit([SelfGuidance(full_backward=False), WSL(linear())], net=net)

def test_logits_far_below_the_largest_stay_finite_in_half_precision():
    from fastkdtf.teachers.cache import pack_logits, unpack_logits
    z = torch.tensor([[0., -1e5, 3.]])
    values,_ = pack_logits(z)
    assert values.isfinite().all() and torch.equal(unpack_logits(values, None, 3).softmax(1), torch.tensor([[-3., -65504., 0.]]).softmax(1))

# what is resumed

def resumable(folder, cbs, seed=0, n_epoch=4, fit='fit'):
    "A training that `Checkpoint` keeps in the folder, with batches in random order"
    dls = DataLoaders(DataLoader(TensorDataset(x, y), 16, shuffle=True, generator=torch.Generator()), DataLoader(TensorDataset(x, y), 16))
    seed_run(seed, dls)
    learn = Learner(dls, linear(), CrossEntropyLossFlat(), opt_func=SGD, lr=.1, cbs=cbs, path=folder).remove_cb(ProgressCallback)
    with learn.no_logging(): getattr(learn, fit)(n_epoch, cbs=[Checkpoint(folder/'run.pt')])
    return learn

class Average(Callback):
    "A moving average of the weights, as users write it: nothing says what its state is"
    def __init__(self, decay=.8): self.decay,self.steps = decay,0
    def before_fit(self):
        self.net,self.plain = ModelEmaV3(self.learn.model, decay=self.decay),{k: v.clone() for k,v in self.learn.model.state_dict().items()}
        self.losses,self.last,self.total = [],{},np.zeros(2)
    def after_step(self):
        self.net.update(self.learn.model)
        for k,v in self.learn.model.state_dict().items(): self.plain[k] = torch.lerp(v, self.plain[k], self.decay)
        self.steps += 1
    def after_batch(self):
        if not self.training: return
        self.losses.append(self.learn.loss.item())
        self.last = {'loss': (np.float32(self.losses[-1]), self.learn.loss.detach()), 3: None}
        self.total += self.steps

class StopAt(Callback):
    order = 2000
    def __init__(self, at): self.at = at
    def after_batch(self):
        if self.training and self.train_iter == self.at: raise KeyboardInterrupt

@pytest.mark.parametrize('fit', ['fit', 'fine_tune'])
def test_a_callback_without_a_state_dict_goes_on_as_if_nothing_had_happened(fit, tmp_path, capsys):
    expected = resumable(tmp_path/'undisturbed', [LsrKD(), Average()], fit=fit).average
    with pytest.raises(KeyboardInterrupt): resumable(tmp_path/'a', [LsrKD(), Average(), StopAt(5)], fit=fit)
    with pytest.warns(UserWarning, match='average goes on without its losses'): again = resumable(tmp_path/'a', [LsrKD(), Average()], seed=7, fit=fit).average
    assert 'average has no state_dict; what it held was loaded: steps, net, plain, last, total' in capsys.readouterr().out
    for a,b in ((again.net.state_dict(), expected.net.state_dict()), (again.plain, expected.plain)):
        assert a.keys() == b.keys() and len(a) == 2
        for k in a: assert torch.equal(a[k], b[k]), k
    assert again.last == expected.last and type(again.last['loss'][0]) is np.float32 and again.steps == expected.steps
    assert (again.total == expected.total).all() and again.total.dtype == float
    assert again.losses == expected.losses[-len(again.losses):] and 0 < len(again.losses) < 8   # a log is not kept, and named

def test_half_precision_goes_on_without_a_warning(tmp_path):
    with pytest.raises(KeyboardInterrupt): resumable(tmp_path, [HalfPrecision(), StopAt(5)])
    with warnings.catch_warnings():
        warnings.filterwarnings('error', message='.*goes on without')
        assert len(resumable(tmp_path, [HalfPrecision()], seed=7).recorder.values) == 4

@pytest.mark.filterwarnings('ignore:average goes on without')
def test_settings_of_a_callback_are_those_of_the_call_and_not_of_the_file(tmp_path):
    with pytest.raises(KeyboardInterrupt): resumable(tmp_path, [Average(.8), StopAt(5)])
    assert resumable(tmp_path, [Average(.5)]).average.decay == .5

def test_the_weights_of_the_file_are_there_when_other_callbacks_begin(tmp_path):
    class Look(Callback):
        def before_fit(self): seen.append(self.learn.model[1].weight.detach().clone())
        def before_epoch(self): seen.append(self.learn.model[1].weight.detach().clone())
    seen = []
    with pytest.raises(KeyboardInterrupt): resumable(tmp_path, [StopAt(5)])
    resumable(tmp_path, [Look()], seed=7)
    assert len(seen) == 3 and torch.equal(seen[0], seen[1]) and not torch.equal(seen[1], seen[2])

def test_what_cannot_be_kept_is_named(tmp_path):
    class Odd(Callback):
        def before_fit(self): self.queue,self.net = SimpleNamespace(),None
        def after_step(self): self.net = linear()   # not there yet when the fit goes on
    with pytest.raises(KeyboardInterrupt): resumable(tmp_path, [Odd(), StopAt(5)])
    with pytest.warns(UserWarning, match='odd goes on without its queue, net'): resumable(tmp_path, [Odd()])

def test_a_callback_that_is_gone_is_named(tmp_path, capsys):
    with pytest.raises(KeyboardInterrupt): resumable(tmp_path, [Average(), StopAt(5)])
    resumable(tmp_path, [])
    assert 'not in this fit, though they were before: average' in capsys.readouterr().out

@pytest.mark.parametrize('append', [False, True])
@pytest.mark.parametrize('fit', ['fit', 'fine_tune'])
@pytest.mark.parametrize('at', [1, 3, 5, 8])
def test_a_log_that_is_resumed_is_the_undisturbed_one(append, fit, at, tmp_path):
    "Rows of epochs that were logged, but not saved, are written once"
    rows = lambda folder: [line.split(',')[:3] for line in (folder/'history.csv').read_text().splitlines()]
    make = lambda: [LsrKD(), CSVLogger(append=append)]
    for name in ('undisturbed', 'a'): (tmp_path/name).mkdir()
    resumable(tmp_path/'undisturbed', make(), fit=fit)
    with pytest.raises(KeyboardInterrupt): resumable(tmp_path/'a', [*make(), StopAt(at)], fit=fit)
    if at == 8:   # stopped between the log and the file
        with open(tmp_path/'a'/'history.csv', 'a') as f: f.write('3,.1,.1,.1,.1,00:00\n')
    learn = resumable(tmp_path/'a', make(), seed=7, fit=fit)
    assert rows(tmp_path/'a') == rows(tmp_path/'undisturbed') and len(rows(tmp_path/'a')) == 5 + 2*(append and fit == 'fine_tune')
    assert learn.csv_logger.append == append
    resumable(tmp_path/'a', make(), seed=7, fit=fit)   # complete: nothing is trained, and nothing is lost
    assert rows(tmp_path/'a') == rows(tmp_path/'undisturbed')

# what one step is

class NotesRefreshes(MemoryTeacher):
    "Notes the number of the step, and of the samples before it, at each refresh"
    def _refresh(self):
        super()._refresh()
        self.notes_.append(self.learn.made)

class Made(Callback):
    "Count the optimizer's steps"
    order,start = -5,0
    def before_fit(self): self.learn.made = self.start
    def after_step(self): self.learn.made += 1

def refreshes(interval, n_samples, bs, n_epoch, n_acc=None, start_epoch=0, drop_last=False, start=0):
    "Steps made before each refresh, and in all"
    data = TensorDataset(torch.randn(n_samples, 3, 8, 8), torch.arange(n_samples)%K)
    loader = DataLoader(data, bs, drop_last=drop_last)
    teacher,made = NotesRefreshes(1, interval),Made()
    teacher.notes_,made.start = [],start
    cbs = [Distill(teacher, .3, 2.), made] + ([GradientAccumulation(n_acc)] if n_acc else [])
    learn = Learner(DataLoaders(loader, loader), linear(), CrossEntropyLossFlat(), opt_func=SGD, lr=.01, cbs=cbs).remove_cb(ProgressCallback)
    with learn.no_logging(): learn.fit(n_epoch, start_epoch=start_epoch)
    return teacher.notes_,learn.made

@pytest.mark.parametrize('n_samples,bs,n_acc,n_epoch,drop_last', [
    (40, 16, 32, 6, False), (50, 16, 32, 6, False), (50, 16, 24, 4, False), (33, 8, 20, 5, False), (50, 16, 32, 6, True), (50, 16, 16, 4, False), (21, 4, 100, 12, False)])
def test_an_epoch_of_accumulated_steps_is_counted_in_samples_that_carry_over(n_samples, bs, n_acc, n_epoch, drop_last):
    "κ = 1 epoch is the steps of the whole training over its epochs, exactly"
    moved,made = refreshes(1, n_samples, bs, n_epoch, n_acc, drop_last=drop_last)
    due = [t-1 for t in range(1, made+2) if is_due(t, Fraction(made, n_epoch))]   # the last step may have begun
    assert moved and moved in (due, [t for t in due if t < made])

@pytest.mark.parametrize('n_acc', [None, 32])
@pytest.mark.parametrize('interval', [.75, 1, 2])
def test_a_training_that_starts_at_a_later_epoch_refreshes_where_the_whole_one_would(n_acc, interval):
    whole,made = refreshes(interval, 40, 16, 6, n_acc)
    begin = refreshes(interval, 40, 16, 6, n_acc)[1]//2   # three of six epochs
    later,_ = refreshes(interval, 40, 16, 6, n_acc, start_epoch=3, start=begin)
    assert later == [t for t in whole if t >= begin] and later

# a teacher that several have

class Asked(nn.Module):
    def __init__(self):
        super().__init__()
        self.net,self.n = linear(),0
    def forward(self, x):
        self.n += 1
        return self.net(x)

def counted(teacher, *methods, **kwargs):
    "Fit with methods that share a teacher of `Asked`, whose number of passes a class counts"
    n = [0]
    class Counts(type(teacher)):
        def __call__(self, batch):
            n[0] += 1
            return super().__call__(batch)
    teacher.__class__ = Counts
    return fit([method(teacher) for method in methods], **kwargs),n[0]

a_term = partial(Distill, alpha=.3, tau=2., name='a')
b_term = partial(Distill, alpha=.3, tau=3., name='b')

def kd_by_hand(zt, z, tau):
    t = (zt/tau).softmax(1)
    return tau**2*(t*(t.log()-(z/tau).log_softmax(1))).sum(1).mean()

def test_a_network_that_two_methods_share_is_run_once_a_batch():
    net = linear().eval()
    steps,n = counted(NetworkTeacher(net), a_term, b_term)
    assert n == len(steps) == 2
    for o in steps:
        z,zt = o.pred.double(),net(o.x).double()
        want = .4*F.cross_entropy(z, o.y) + .3*kd_by_hand(zt, z, 2.) + .3*kd_by_hand(zt, z, 3.)
        assert o.loss == pytest.approx(want.item(), rel=1e-5)

def test_a_mean_of_probabilities_depends_on_the_temperature_and_is_asked_by_each():
    nets = [linear().eval(), linear().eval()]
    steps,n = counted(EnsembleTeacher(nets), a_term, b_term)
    assert n == 4
    for o in steps:
        z,mean = o.pred.double(),lambda tau: sum((net(o.x).double()/tau).softmax(1) for net in nets)/2
        soft = lambda tau: tau**2*(mean(tau)*(mean(tau).log()-(z/tau).log_softmax(1))).sum(1).mean()
        assert o.loss == pytest.approx((.4*F.cross_entropy(z, o.y) + .3*soft(2.) + .3*soft(3.)).item(), rel=1e-5)
    assert counted(EnsembleTeacher(nets), a_term, partial(b_term, tau=2.))[1] == 2
    assert counted(EnsembleTeacher(nets, 'logits'), a_term, b_term)[1] == 2

@pytest.mark.parametrize('makers', [(a_term, b_term), (b_term, a_term), (partial(a_term, alpha=0.), b_term), (a_term, partial(b_term, alpha=0.))])
def test_a_memory_that_two_methods_share_counts_each_step_once(makers):
    teacher = NotesRefreshes(1, interval_steps=3)
    teacher.notes_ = []
    fit([Made(), *(make(teacher) for make in makers)], n_epoch=4)
    assert teacher.notes_ == [2, 5]   # before steps 3 and 6 of 8

def test_a_teacher_that_is_a_rewrites_too_is_run_once_and_counts_once():
    from fastkdtf.targets import Replace
    net = linear()
    method = lambda teacher: Distill(teacher, .3, 2., rewrite=Replace(teacher, 'full'))
    assert counted(NetworkTeacher(net), method)[1] == 2

def test_a_shared_memory_resumes(tmp_path):
    def run(folder, *more, seed=0):
        teacher = MemoryTeacher(2, interval_steps=3)
        return resumable(folder, [a_term(teacher), b_term(teacher), *more], seed)
    expected = run(tmp_path/'undisturbed').model
    with pytest.raises(KeyboardInterrupt): run(tmp_path/'a', StopAt(5))
    again = run(tmp_path/'a', seed=7).model
    for p,q in zip(again.parameters(), expected.parameters(), strict=True): assert torch.equal(p, q)

# functions as teachers

def test_a_function_finds_its_networks_wherever_they_are():
    net = linear()
    class Has:
        def __init__(self): self.nets = {'one': [net]}
        def method(self, batch): return self.nets['one'][0](batch.xb[0])
        def __call__(self, batch): return self.method(batch)
    def outer(batch): return inner(batch)
    def inner(batch): return net(batch.xb[0])
    def given(net, batch): return net(batch.xb[0])
    forms = dict(closure=lambda batch: net(batch.xb[0]), nested=outer, partial=partial(given, net), method=Has().method, object=Has(), uses_a_global=uses_a_global)
    for name,form in forms.items():
        found = networks_of(form)
        assert len(found) == 1 and found[0] is (a_global_network if name == 'uses_a_global' else net), name
    assert networks_of(lambda batch: batch.z*0) == []

a_global_network = linear()
def uses_a_global(batch): return a_global_network(batch.xb[0])

def test_a_function_runs_its_networks_without_a_graph_and_in_evaluation_mode_and_leaves_them_as_they_were():
    net,seen = nn.Sequential(linear(), nn.Dropout(.5)),[]
    net[1].eval()
    def ask(batch):
        seen.append((torch.is_grad_enabled(), net.training, net[0].training, net[1].training))
        return net(batch.xb[0])
    steps = fit([KnowledgeDistillation(ask)])
    assert seen == [(False,)*4]*2 and (net.training, net[0].training, net[1].training) == (True, True, False)
    zt = net.eval()(steps[0].x).double()
    z = steps[0].pred.double()
    assert steps[0].loss == pytest.approx((.1*F.cross_entropy(z, steps[0].y) + .9*kd_by_hand(zt, z, 4.)).item(), rel=1e-5)
    class Fails(Exception): pass
    def fail(batch):
        net.training
        raise Fails
    net.train()
    with pytest.raises(Fails): FunctionTeacher(fail)(Batch(y, xb=(x,)))
    assert net.training and net[1].training

def test_the_student_is_left_in_training_mode_where_a_function_asks_it():
    net,seen = linear(),[]
    def ask(batch):
        seen.append(net.training)
        return batch.z.detach()
    fit([KnowledgeDistillation(ask)], net=net)
    assert seen == [True, True]

def digits_learner(folder, net, *cbs):
    "On loaders that can be exported"
    dls = kd_dataloaders('digits', bs=16, train_subset=32, device='cpu')
    return Learner(dls, net, CrossEntropyLossFlat(), opt_func=SGD, lr=.01, cbs=cbs, path=folder).remove_cb(ProgressCallback)

def digit_net(): return nn.Sequential(nn.Flatten(), nn.Linear(192, 10))

def test_a_function_with_a_network_is_not_exported(tmp_path):
    net = nn.Sequential(nn.Flatten(), nn.Linear(192, 3000), nn.Linear(3000, 10))
    learn = digits_learner(tmp_path, digit_net(), KnowledgeDistillation(lambda batch: net(batch.xb[0])))
    with learn.no_logging(): learn.fit(1)
    learn.export('a.pkl')
    assert (tmp_path/'a.pkl').stat().st_size < 800_000 < sum(p.nbytes for p in net.parameters())
    loaded = load_learner(tmp_path/'a.pkl')
    loaded.dls = learn.dls
    with loaded.no_logging(), pytest.raises(ValueError, match="this teacher's function was left out"): loaded.fit(1)

def test_an_ensemble_answers_before_it_is_attached():
    nets = [linear().eval(), linear().eval()]
    said = EnsembleTeacher(nets)(Batch(y, xb=(x,)))
    assert torch.allclose(said.softmax(1), sum(net(x).softmax(1) for net in nets)/2, atol=1e-5)

# what is let go

def at_the_end(event):
    class End(Callback):
        order,run_valid = 30,False
    def end(self):
        if self.learn.train_iter == 1: raise KeyboardInterrupt
    setattr(End, event, end)
    return End()

METHODS = dict(LsrKD=LsrKD, KD=lambda: KnowledgeDistillation(linear()), MemoryReplay=lambda: MemoryReplay(2, interval_steps=1),
               ensemble=lambda: KnowledgeDistillation(EnsembleTeacher([linear(), linear()])), WSL=lambda: WSL(linear()), CKM=lambda: CKM(linear()),
               SelfGuidance=SelfGuidance, no_full=lambda: SelfGuidance(full_backward=False))

def held(method):
    "Tensors with a graph, and copies of networks, that can be reached from a method"
    gc.collect()
    found,todo,seen = [],[vars(method).get(name) for name in vars(method) if name != '_learn'],set()
    while todo:
        o = todo.pop()
        if id(o) in seen or isinstance(o, (Learner, type, str, int)): continue
        seen.add(id(o))
        if isinstance(o, FrozenCopy) or isinstance(o, Tensor) and o.grad_fn is not None: found.append(o)
        elif isinstance(o, Batch): found.append(o)
        elif isinstance(o, dict): todo += o.values()
        elif isinstance(o, (list, tuple)): todo += o
        elif hasattr(o, '__dict__') and not isinstance(o, nn.Module): todo += vars(o).values()
    return found

@pytest.mark.parametrize('event', ['before_batch', 'after_pred', 'after_loss', 'after_backward', 'after_step'])
@pytest.mark.parametrize('name', METHODS)
def test_ctrl_c_leaves_no_copy_and_no_graph_and_the_learner_as_it_was(name, event):
    method,loaders = METHODS[name](),DataLoaders(*[DataLoader(TensorDataset(x, y), 16)]*2)
    net = create_model('resnet8', K) if isinstance(method, SelfGuidance) else linear()
    learn = Learner(loaders, net, CrossEntropyLossFlat(), opt_func=SGD, lr=.01, cbs=[method, at_the_end(event)]).remove_cb(ProgressCallback)
    with learn.no_logging(), pytest.raises(KeyboardInterrupt): learn.fit(1)
    assert held(method) == [] and torch.is_grad_enabled() and not learn.metrics and '_with_events' not in vars(learn)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in net.modules())

@pytest.mark.parametrize('signal', [CancelBatchException, CancelTrainException, CancelEpochException, CancelFitException])
@pytest.mark.parametrize('name', ['KD', 'SelfGuidance', 'no_full'])
@pytest.mark.parametrize('event', ['before_batch', 'after_loss'])
def test_a_skipped_batch_leaves_no_graph(name, signal, event):
    class Skip(Callback):
        order,run_valid = 30,False
        def after_epoch(self): seen.append((method.batch, torch.is_grad_enabled()))
        def after_fit(self): seen.append((method.batch, torch.is_grad_enabled()))
    def skip(self): raise signal
    setattr(Skip, event, skip)
    method,seen = METHODS[name](),[]
    fit([method, Skip()], net=create_model('resnet8', K) if isinstance(method, SelfGuidance) else None)
    assert seen and all(o == (None, True) for o in seen) and held(method) == []

@pytest.mark.parametrize('make', [SelfGuidance, StochasticDepth])
@pytest.mark.parametrize('signal', [CancelFitException, CancelEpochException, KeyboardInterrupt])
def test_a_fit_that_stops_in_the_middle_of_a_pass_leaves_the_network_whole(make, signal):
    class Skip(Callback):
        order,run_valid = 30,False
        def before_batch(self): raise signal
    net = create_model('resnet8', K)
    learn = Learner(DataLoaders(*[DataLoader(TensorDataset(x, y), 16)]*2), net, CrossEntropyLossFlat(), opt_func=SGD, cbs=[make(.01, seed=0) if make is StochasticDepth else make(p_last=.01), Skip()])
    with learn.no_bar(), learn.no_logging():
        try: learn.fit(1)
        except KeyboardInterrupt: pass
    bits = [(block._drawn, block._bits) for block in residual_blocks(net)]
    assert len(bits) == 3 and set(bits) == {(None, None)}

@pytest.mark.parametrize('make', [SelfGuidance, StochasticDepth])
def test_summary_and_lr_find_leave_a_network_that_was_never_trained_so_as_it_was(make, tmp_path):
    net = create_model('resnet8', 10)
    learn = digits_learner(tmp_path, net, make())
    before = net.eval()(x)
    with learn.no_logging():
        learn.summary()
        assert torch.equal(net.eval()(x), before) and not residual_blocks(net)
        learn.lr_find(num_it=12, show_plot=False)
        assert torch.equal(net.eval()(x), before) and not residual_blocks(net)
        learn.fit(1)
        assert len(residual_blocks(net)) == 3
        learn.lr_find(num_it=12, show_plot=False)
        assert len(residual_blocks(net)) == 3   # what was trained so stays so

def test_a_learner_can_be_exported_in_the_middle_of_a_fit(tmp_path):
    class InBetween(Callback):
        def after_epoch(self): self.learn.export('a.pkl')
    learn = digits_learner(tmp_path, digit_net(), LsrKD(), InBetween())
    with learn.no_logging(): learn.fit(1)
    loaded = load_learner(tmp_path/'a.pkl')
    loaded.dls = learn.dls
    with loaded.no_logging(): loaded.fit(1)
    assert '_with_events' not in vars(loaded)

def test_watching_targets_of_copies_lets_the_learner_be_evaluated(tmp_path):
    from fastkdtf.lab.interpret import WatchTargets
    learn = digits_learner(tmp_path, digit_net(), MemoryReplay(1, interval_steps=1), watch := WatchTargets())
    with learn.no_logging(): learn.fit(1)
    seen = watch.seen
    assert set(seen) == {'memory_replay'}
    assert len(learn.validate()) == 1 and watch.seen is seen

# describe_kd

def described(cbs=(), net=None, dls=None, **kwargs):
    "A learner that was never fitted"
    if dls is None:
        dls = DataLoaders(*[DataLoader(TensorDataset(x, y), 16)]*2)
        dls.c = K
    return Learner(dls, net or linear(), CrossEntropyLossFlat(), opt_func=SGD, cbs=cbs, **kwargs).remove_cb(ProgressCallback)

LOOKED_AT = dict(KD=lambda: KnowledgeDistillation(linear(), alpha=.5), MemoryReplay=lambda: MemoryReplay(2, interval=25), ensemble=METHODS['ensemble'], WSL=METHODS['WSL'])

@pytest.mark.parametrize('name', [*LOOKED_AT, 'LsrKD'])
def test_methods_are_measured_before_any_fit_and_given_as_arguments_as_well_as_attached(name, recwarn):
    make = LOOKED_AT.get(name, LsrKD)
    learn = described([make()])
    n_cbs,kept = len(learn.cbs),set(vars(learn))
    attached = learn.describe_kd(n_batches=2)
    assert set(vars(learn)) == kept and not [w for w in recwarn if 'interval' in str(w.message)]
    plain = described(net=learn.model)
    assert list(attached.index) == list(plain.describe_kd(make, n_batches=2).index) and len(plain.cbs) == n_cbs-1
    own = next(cb for cb in learn.cbs if isinstance(cb, LossTerm))
    given = plain.describe_kd(own, n_batches=2)   # also one that another learner has, which keeps it
    assert own.learn is learn and own in learn.cbs
    torch.manual_seed(0)
    for column in ('soft/hard gradient', 'cosine'):
        if name != 'MemoryReplay': assert given[column].tolist() == attached[column].tolist()   # of another memory it is near 0
    with learn.no_logging(): learn.fit(1)
    assert learn.describe_kd().index.tolist() == attached.index.tolist()   # and after a fit

def test_a_given_method_is_measured_in_place_of_the_learners_own():
    learn = described([LsrKD()])
    own = learn.lsr_kd
    assert list(learn.describe_kd(TfKDReg).index) == ['tf_kd_reg'] and list(learn.describe_kd([LsrKD(.3), TfKDReg]).index) == ['lsr_kd', 'tf_kd_reg']
    assert learn.lsr_kd is own and own in learn.cbs and own.learn is learn and 'tf_kd_reg' not in vars(learn)
    alone = described()
    assert list(alone.describe_kd('LsrKD:alpha=.3').index) == ['lsr_kd'] and list(alone.describe_kd('KD', teacher=linear()).index) == ['knowledge_distillation']
    with pytest.raises(ValueError, match='KD needs a teacher'): alone.describe_kd('KD')
    with pytest.raises(ValueError, match='fit.cbs=…. are gone'): alone.describe_kd()
    with pytest.raises(ValueError, match='stochastic_depth adds no term'): described([StochasticDepth()]).describe_kd()
    assert list(learn.describe_kd(2).index) == ['lsr_kd']   # the number of batches, as in 0.1.0

def test_a_dash_stands_where_a_term_has_no_gradient():
    row = described([CKM(linear())]).describe_kd().loc['ckm']
    assert (row['soft/hard gradient'], row['cosine']) == ('–', '–') and row['time'] > 0
    row = described([LsrKD(alpha=0.)]).describe_kd().loc['lsr_kd']
    assert (row['soft/hard gradient'], row['cosine']) == (0., '–')

@pytest.mark.parametrize('name', [*LOOKED_AT, 'LsrKD'])
def test_half_precision_is_measured_as_it_trains(name):
    seen = []
    class Look(nn.Module):
        def forward(self, z):
            if isinstance(z.dtype, torch.dtype): seen.append(z.dtype)   # folding looks at it too
            return z
    teacher,student = linear(),nn.Sequential(linear(), Look())
    make = lambda: KnowledgeDistillation(teacher, alpha=.5) if name == 'KD' else LOOKED_AT.get(name, LsrKD)()
    half = described([make(), CPUAutocast()], student).describe_kd()
    assert seen and set(seen) == {torch.bfloat16}
    full = described([make()], student).describe_kd()
    if name in ('KD', 'LsrKD'): assert half.iloc[0]['cosine'] == pytest.approx(full.iloc[0]['cosine'], abs=.05)
    described([make()]).to_fp16().describe_kd()   # fastai's own, which does nothing without a GPU

@pytest.mark.parametrize('kind', ['torch', 'fastai', 'no attribute'])
def test_loaders_without_a_device(kind):
    loader = FastaiLoader(TensorDataset(x, y), 16) if kind == 'fastai' else DataLoader(TensorDataset(x, y), 16)
    dls = SimpleNamespace(train=loader, valid=loader, loaders=[loader]*2) if kind == 'no attribute' else DataLoaders(loader, loader)
    dls.c = K
    assert getattr(dls, 'device', None) is None
    assert list(described([LsrKD()], dls=dls).describe_kd().index) == ['lsr_kd']

def test_networks_of_several_outputs_are_measured_with_the_loss_that_takes_them():
    learn = described([LsrKD()], Several('tuple'))
    learn.loss_func = LOSSES['tuple']
    plain = described([LsrKD()], learn.model.net)
    assert learn.describe_kd().iloc[0]['soft/hard gradient'] > 0
    assert learn.describe_kd().iloc[0]['cosine'] != plain.describe_kd().iloc[0]['cosine']   # the hard term has another part

def test_each_batch_is_run_a_few_times_only():
    "No more than it takes: gradients once a batch, and at most eleven timed rounds of one batch"
    class Count(nn.Module):
        n = 0
        def forward(self, z):
            Count.n += 1
            return z
    described([LsrKD()], nn.Sequential(linear(), Count())).describe_kd(n_batches=2)
    assert 2 + 2*4 + 2 <= Count.n <= 2 + 2*11 + 2 + 2

def test_the_copy_of_an_attached_callback_leaves_the_learner_out():
    from fastkdtf.lab.one_run import make_callbacks
    copies = []
    class Heavy(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = linear()
        def __deepcopy__(self, memo):
            copies.append(self)
            return self
        def forward(self, x): return self.net(x)
    learn = described([own := LsrKD(.3), mix := MixUp(.4)], Heavy())
    for cb in (own, mix):
        made, = make_callbacks(cb)
        assert made is not cb and made.learn is None and cb.learn is learn
    assert not copies and make_callbacks(own)[0].alpha == .3

# what a loss, or a network, does not say of itself

def hidden(**kwargs): return lambda z, t: F.cross_entropy(z, t, **kwargs)

class Then(nn.Module):
    def __init__(self, f):
        super().__init__()
        self.net,self.f = linear(),f
    def forward(self, x): return self.f(self.net(x))

def one_hot(): return F.one_hot(y, K).float()

@pytest.mark.parametrize('method', [LsrKD, lambda: KnowledgeDistillation(linear()), TfKDReg])
@pytest.mark.parametrize('loss,net,labels,words', [
    (hidden(ignore_index=0), None, y, 'the label 0 do not count in the loss, but do in the soft term.*ignore_index=0'),
    (hidden(weight=torch.tensor([1., 1, 0, 1, 0])), None, y, 'the label 2, 4 do not count'),
    (hidden(reduction='sum'), None, y, 'the loss is the sum of the samples'),
    (lambda z, t: F.binary_cross_entropy_with_logits(z, one_hot_of(t)), None, y, '1 is added to all'),
    (F.binary_cross_entropy_with_logits, None, one_hot(), '1 is added to all'), (F.mse_loss, None, one_hot(), '1 is added to all'),
    (lambda p, t: F.nll_loss(p.log(), t), Then(lambda z: z.softmax(1)), y, 'the model returned numbers that are not negative and sum to 1')])
def test_what_a_loss_hides_is_found_in_the_first_batch_and_said_aloud(method, loss, net, labels, words):
    with pytest.warns(UserWarning, match=words): fit([method()], loss, net and Then(net.f), labels)

def one_hot_of(t): return F.one_hot(t, K).float()

@pytest.mark.parametrize('loss,net,labels', [
    (CrossEntropyLossFlat(), None, y), (nn.CrossEntropyLoss(label_smoothing=.1, weight=torch.rand(K)), None, y), (nn.CrossEntropyLoss(), None, one_hot()),
    (nn.NLLLoss(), Then(lambda z: z.log_softmax(1)), y), (FocalLossFlat(), None, y), (CrossEntropyLossFlat(reduction='sum'), None, y),
    (lambda z, t: (F.cross_entropy(z, t, reduction='none')*torch.linspace(.1, 1, 16)).mean(), None, y), (ignoring(3), None, y),
    (hidden(), Then(lambda z: z*100), y), (nn.MultiMarginLoss(), None, y)])
def test_losses_of_one_class_among_several_are_taken_without_a_word(loss, net, labels):
    for method in (LsrKD, lambda: KnowledgeDistillation(linear())):
        with warnings.catch_warnings():
            warnings.simplefilter('error', UserWarning)
            assert len(fit([method()], loss, net, labels)) == 2

@pytest.mark.parametrize('method', [LsrKD, lambda: KnowledgeDistillation(linear()), lambda: CKM(linear()), lambda: LsrKD(gamma=.4)])
def test_labels_outside_the_classes_are_found_in_later_batches_too(method):
    marked = y.clone()
    marked[20] = 255
    with pytest.raises(ValueError, match='got 255'): fit([method()], hidden(ignore_index=255), labels=marked)

def test_a_look_at_the_loss_draws_no_random_number():
    "A loss that draws sees the numbers that it would have seen"
    drawn = []
    def loss(z, t):
        drawn.append(torch.rand(1).item())
        return F.cross_entropy(z, t)
    fit([LsrKD()], loss)
    looked,alone = drawn[:],drawn.clear()
    fit([], loss)
    assert drawn[:2] == [looked[0], looked[4]] and len(looked) == len(drawn)+3

@pytest.mark.parametrize('wrap', [lambda loss: loss, lambda loss: BaseLoss(lambda: loss, flatten=False)], ids=['module', 'in fastai'])
def test_a_look_at_the_loss_leaves_its_state_alone(wrap):
    class Counting(nn.CrossEntropyLoss):
        "Follows how frequent the classes are"
        def __init__(self):
            super().__init__()
            self.n_calls = 0
            self.register_buffer('prior', torch.ones(K)/K)
        def forward(self, z, t):
            self.n_calls += 1
            self.prior.lerp_(F.one_hot(t.long(), K).float().mean(0), .1)
            return super().forward(z + self.prior.log(), t)
    looked,alone = Counting(),Counting()
    fit([LsrKD()], wrap(looked))
    fit([], wrap(alone))
    assert looked.n_calls == alone.n_calls == 4 and torch.equal(looked.prior, alone.prior)

@pytest.mark.parametrize('order', [0, 6])
def test_a_loss_that_is_scaled_before_the_soft_term_is_added_is_said_aloud(order):
    class Accumulate(Callback):
        def after_loss(self): self.learn.loss_grad /= 4
    cb = Accumulate()
    cb.order = order
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter('always')
        fit([KnowledgeDistillation(linear()), cb])
    assert sum('a callback has scaled the loss' in str(o.message) for o in said) == (order == 0)

def test_a_look_at_the_loss_leaves_the_graph_of_the_step_alone():
    "Gradients that a callback keeps of the logits, and its hooks, are those of the step"
    seen = []
    class Hooks(Callback):
        run_valid = False
        def after_pred(self):
            self.learn.pred.retain_grad()
            self.learn.pred.register_hook(seen.append)
        def after_backward(self): assert torch.equal(self.learn.pred.grad, seen[-1])
    fit([LsrKD(), Hooks()])
    assert len(seen) == 2

@pytest.mark.parametrize('dtype', [torch.int8, torch.int16, torch.int32, torch.uint8])
@pytest.mark.parametrize('method', [lambda: LsrKD(gamma=.4), lambda: WSL(linear()), lambda: CKM(linear())])
def test_labels_of_small_integer_types(dtype, method):
    def run(labels):
        torch.manual_seed(0)
        return [o.loss for o in fit([method()], lambda z, t: F.cross_entropy(z, t.long()), labels=labels)]
    assert run(y.to(dtype)) == run(y)
