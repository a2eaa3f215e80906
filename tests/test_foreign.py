"Batches, losses and labels of another kind than ours: right, or refused with a sentence"
from functools import partial
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from fastai.basics import DataLoaders, Learner, SGD
from fastai.callback.all import GradientAccumulation, MixUp
from fastai.callback.core import Callback
from fastai.callback.progress import ProgressCallback
from fastai.layers import NoneReduce
from fastai.losses import CrossEntropyLossFlat
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from fastkdtf.callback.distill import Distill, KnowledgeDistillation, LsrKD, MemoryReplay, TfKDReg
from fastkdtf.callback.selfguide import SelfGuidance, StochasticDepth
from fastkdtf.callback.survival import residual_blocks
from fastkdtf.callback.term import loss_kind
from fastkdtf.closed_form import label_loss
from fastkdtf.core import TwoValued, check_labels, first_output, looks_like_probabilities
from fastkdtf.losses import CKMLoss, KDLoss
from fastkdtf.teachers.base import Teacher
from fastkdtf.teachers.cache import CachedTeacher
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

def test_tsais_mixup():
    tsai = pytest.importorskip('tsai.data.mixed_augmentation')
    held = []
    class Note(Callback):
        order,run_valid = 5.4,False
        def after_loss(self): held.append([(self.learn.y, mixer.lam), (mixer.yb1[0], 1-mixer.lam)])
    mixer = tsai.MixUp1d()
    steps = fit([mixer, LsrKD(), Note()])
    assert len(steps) == len(held) == 2
    for o,pairs in zip(steps, held):
        z = o.pred.double()
        base = sum((part*F.cross_entropy(z, labels, reduction='none')).mean() for labels,part in pairs)
        assert o.loss == pytest.approx((.9*base + lsr(z, o.y) - .9*F.cross_entropy(z, o.y)).item(), rel=1e-5)

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
    from fastkdtf.callback.effdstl import WSL
    net = create_model('resnet8', K)
    with pytest.raises(ValueError, match='wsl would teach'): fit([SelfGuidance(full_backward=False), WSL(linear())], net=net)

def test_logits_far_below_the_largest_stay_finite_in_half_precision():
    from fastkdtf.teachers.cache import pack_logits, unpack_logits
    z = torch.tensor([[0., -1e5, 3.]])
    values,_ = pack_logits(z)
    assert values.isfinite().all() and torch.equal(unpack_logits(values, None, 3).softmax(1), torch.tensor([[-3., -65504., 0.]]).softmax(1))
