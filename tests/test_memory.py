"""Memory replay: Wang et al. 2020, Algorithm 1, against a plain PyTorch loop written from the paper, and everything around it.

The loop knows nothing of the package: copies are `deepcopy`s, targets are dense, the divergence is `F.kl_div`.
"""
import copy, gc, math, os, sys, threading, traceback, warnings
from fractions import Fraction
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np, pytest, torch, torch.distributed as dist, torch.nn.functional as F
from fastai.basics import Callback, CancelStepException, CrossEntropyLossFlat, DataLoaders, Learner, OptimWrapper, SGD, load_learner
from fastai.callback.all import CutMix, GradientAccumulation, MixedPrecision, MixUp, ProgressCallback, SchedLin
from hypothesis import given, settings, strategies as st
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import TensorDataset

sys.path.insert(0, str(Path(__file__).parent))
import reference as ref
from fastkdtf.core import Step, TwoValued, at_label, put_confidence
from fastkdtf.callback.distill import Distill, KnowledgeDistillation, LsrKD, MemoryReplay
from fastkdtf.teachers.frozen import FrozenCopy
from fastkdtf.teachers.memory import MemoryTeacher, is_due
from fastkdtf.vision.models import create_model
from fastkdtf.callback.checkpoint import Checkpoint, seed_run
from fastkdtf.targets import Rewrite, TeacherCorrection
from fastkdtf.teachers.network import EnsembleTeacher
from processes import processes

pytestmark = pytest.mark.filterwarnings('ignore:curve goes on without')

K = 10
f16,bf16,f32,f64 = torch.float16,torch.bfloat16,torch.float32,torch.float64


@pytest.fixture(autouse=True)
def in_tmp_path(tmp_path, monkeypatch):
    "Learners save below the working directory"
    monkeypatch.chdir(tmp_path)


# ---------------------------------------------------------------- networks, data, learners

N_IMAGES,BS = 64,16   # four batches an epoch

def small_net(dtype=f32, seed=0, norm=nn.BatchNorm2d):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), norm(8), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1), norm(8), nn.ReLU(),
                             nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, K)).to(dtype)

plain_norm = partial(nn.GroupNorm, 2)   # no batch statistics

def trained_net(**kwargs):
    "One whose running statistics are in use"
    net = small_net(**kwargs)
    x,_ = images(seed=9, dtype=next(net.parameters()).dtype)
    with torch.no_grad():
        for _ in range(20): net(x)
    return net

def images(n=N_IMAGES, seed=0, dtype=f32):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(n, 3, 8, 8, generator=g).to(dtype), torch.randint(K, (n,), generator=g)

class Items(list):
    def new_empty(self): return Items()   # for `export`

def make_dls(x, y, bs=BS, shuffle=False, drop_last=False):
    items = Items(zip(x, y))
    dls = DataLoaders.from_dsets(items, Items(items[:BS]), bs=bs, shuffle=shuffle, drop_last=drop_last, device='cpu', num_workers=0)
    dls.c = K
    return dls

momentum_sgd = {'fastai': partial(SGD, mom=.9), 'torch': partial(OptimWrapper, opt=torch.optim.SGD, momentum=.9)}

def learner(cbs=(), net=None, dls=None, opt='torch', **kwargs):
    net = small_net() if net is None else net
    dls = make_dls(*images(dtype=next(net.parameters()).dtype), **kwargs) if dls is None else dls
    loss = nn.CrossEntropyLoss() if next(net.parameters()).dtype == f64 else CrossEntropyLossFlat()   # fastai's casts to float32
    learn = Learner(dls, net, loss_func=loss, opt_func=momentum_sgd[opt], cbs=cbs)
    learn.remove_cb(ProgressCallback)
    if next(net.parameters()).dtype == f64: learn.add_cb(Shown())
    return learn

class Shown(Callback):
    "The recorder's mean takes float32 only; the gradient's loss stays as it is"
    order = 900
    def after_loss(self): self.learn.loss = self.learn.loss.float()

def quiet_fit(learn, *args, **kwargs):
    with learn.no_logging(): learn.fit(*args, **kwargs)
    return learn

class Curve(Callback):
    "Losses of the training batches"
    order,run_valid = 500,False
    def before_fit(self): self.losses = []
    def after_loss(self): self.losses.append(self.learn.loss_grad.item())

class Recording(MemoryTeacher):
    "Remembers what it said"
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.said = []
    def __call__(self, step):
        self.said.append(super().__call__(step))
        return self.said[-1]

def replay(teacher, **kwargs): return Distill(teacher, **{'alpha': .25, 'tau': 3., **kwargs})

class At(Callback):
    "Call a function at an event, the `at`-th time in training"
    def __init__(self, event, f, at=None, order=400): self.event,self.f,self.at,self.order,self.seen = event,f,at,order,0
    def __call__(self, event):
        if event != self.event or not (self.training or event in ('before_fit', 'after_epoch', 'after_fit')): return
        self.seen += 1
        if self.at is None or self.seen == self.at: self.f(self.learn)


# ---------------------------------------------------------------- Algorithm 1 as it is printed

def corrected(q, y, gamma):
    "Eq. 16"
    index = y[:, None]
    return (q*(1-gamma)/(1-q.gather(1, index))).scatter(1, index, gamma)

class Algorithm1:
    """`θ̂_1…θ̂_n` and SGD with momentum; a step is a list of micro-batches

    `fresh`: copies of weights that no batch has touched normalise with the statistics of the batch."""
    def __init__(self, net, n, kappa, n_steps, alpha=.25, tau=3., gamma=None, lr=.05, fresh=True, opt=None):
        self.net,self.n,self.alpha,self.tau,self.gamma,self.t,self.moved = net,n,alpha,tau,gamma,0,False
        self.due = set(ref.refresh_steps(Fraction(kappa), n_steps))
        self.copies,self.fresh = [(copy.deepcopy(net), fresh)]*n,fresh
        self.opt = opt or torch.optim.SGD(net.parameters(), lr, momentum=.9)
        self.losses = []

    def ask(self, i, x):
        net,fresh = self.copies[i]
        net = copy.deepcopy(net).train() if fresh else net.eval()
        with torch.no_grad(): return net(x)

    def loss(self, x, y):
        teachers = [self.ask(i, x) for i in range(self.n)]
        z = self.net.train()(x)
        logq,soft = F.log_softmax(z/self.tau, 1),0.
        for zt in teachers:
            q = F.softmax(zt/self.tau, 1)
            if self.gamma is not None: q = corrected(q, y, self.gamma)
            soft = soft + F.kl_div(logq, q, reduction='batchmean')/self.n
        return (1-self.alpha)*F.cross_entropy(z, y) + self.alpha*(self.tau if self.gamma is not None else self.tau**2)*soft

    def step(self, *batches, skip=False):
        t = self.t+1
        if t in self.due and not self.moved:
            for i in range(self.n-1, 0, -1): self.copies[i] = self.copies[i-1]
            self.copies[0] = copy.deepcopy(self.net),self.fresh
            self.moved = True
        self.fresh = False
        self.opt.zero_grad()
        n = sum(len(y) for _,y in batches)
        for x,y in batches:
            loss = self.loss(x, y)
            (loss*len(y)/n).backward()
            self.losses.append(loss.item())
        if skip: return   # nothing but the running statistics has changed
        self.opt.step()
        self.t,self.moved = t,False

def batches_of(x, y, n_epoch, bs=BS): return [o for _ in range(n_epoch) for o in zip(x.split(bs), y.split(bs))]

def assert_same_weights(a, b, tol):
    for (k,p),q in zip(a.state_dict().items(), b.state_dict().values()):
        if p.is_floating_point(): assert (p-q).abs().max() <= tol*max(1, q.abs().max()), k
        else: assert torch.equal(p, q), k

TOL = {f32: 1e-5, f64: 1e-10}


# ---------------------------------------------------------------- 1. step by step

@pytest.mark.parametrize('dtype', [f32, f64], ids=str)
@pytest.mark.parametrize('gamma', [None, .3])
@pytest.mark.parametrize('n,kappa', [(1, 5), (3, 3), (3, Fraction(5, 2)), (5, 2), (2, 1), (1, 1), (1, Fraction(1, 3))], ids=str)
def test_the_weights_are_those_of_algorithm_1(n, kappa, gamma, dtype):
    x,y = images(dtype=dtype)
    plain = Algorithm1(small_net(dtype), n, kappa, 24, gamma=gamma)
    for batch in batches_of(x, y, 6): plain.step(batch)
    log = Curve()
    learn = learner([MemoryReplay(n, interval_steps=kappa, gamma=gamma), log], small_net(dtype), opt='fastai' if gamma else 'torch')
    quiet_fit(learn, 6, .05)
    np.testing.assert_allclose(log.losses, plain.losses, rtol=10*TOL[dtype])
    assert_same_weights(learn.model, plain.net, TOL[dtype])
    assert not torch.equal(learn.model[0].weight, small_net(dtype)[0].weight)

@pytest.mark.parametrize('alpha,tau', [(.1, 1.), (.9, 8.)])
def test_other_weights_and_temperatures(alpha, tau):
    x,y = images(dtype=f64)
    plain = Algorithm1(small_net(f64), 3, 4, 20, alpha, tau)
    for batch in batches_of(x, y, 5): plain.step(batch)
    assert_same_weights(quiet_fit(learner(MemoryReplay(3, 1, alpha=alpha, tau=tau), small_net(f64)), 5, .05).model, plain.net, 1e-10)

def test_the_wrong_algorithm_is_told_from_the_right_one():
    "What the check above would miss is nothing that matters: each of these changes moves the weights"
    def run(**kwargs):
        plain = Algorithm1(small_net(f64), **{**dict(n=3, kappa=3, n_steps=24), **kwargs})
        for batch in batches_of(*images(dtype=f64), 6): plain.step(batch)
        return plain.net
    right = run()
    for wrong in (dict(n=1), dict(kappa=4), dict(fresh=False), dict(alpha=.26), dict(gamma=.3), dict(n_steps=2)):
        with pytest.raises(AssertionError): assert_same_weights(run(**wrong), right, 1e-6)

def test_initial_copies_are_one_network_with_batch_statistics():
    net = small_net()
    x,_ = images()
    first = copy.deepcopy(net).train()(x[:BS]).detach()
    teacher = Recording(3, interval_steps=100)
    with pytest.warns(UserWarning, match='longer than the training'): learn = quiet_fit(learner(replay(teacher), net), 1, .05)
    assert all(o.shape == (BS, K) for o in teacher.said)   # one answer, not three
    torch.testing.assert_close(teacher.said[0], first)
    again = copy.deepcopy(small_net()).train()
    for said,xb in zip(teacher.said, x.split(BS)): torch.testing.assert_close(said, copy.deepcopy(again)(xb).detach(), rtol=1e-4, atol=1e-5)

def test_copies_include_buffers():
    "The copy answers as the student in evaluation mode did, running statistics and all"
    teacher,snapshots = Recording(1, interval_steps=4),[]
    learn = learner([replay(teacher), At('before_batch', lambda l: snapshots.append(copy.deepcopy(l.model).eval()), order=-50)])
    quiet_fit(learn, 3, .1)
    x,_ = images()
    xbs = x.split(BS)
    for t in range(4, 13):
        due = t//4*4   # the copy was made before step `due`
        torch.testing.assert_close(teacher.said[t-1], snapshots[due-1](xbs[(t-1) % 4]).detach(), rtol=1e-4, atol=1e-4)

def test_with_two_copies_and_an_interval_of_one_step_the_second_is_the_step_befores():
    teacher,snapshots = Recording(2, interval_steps=1),[]
    learn = learner([replay(teacher), At('before_batch', lambda l: snapshots.append(copy.deepcopy(l.model).eval()), order=-50)], trained_net())
    quiet_fit(learn, 2, .1)
    xbs = images()[0].split(BS)
    for i in range(1, 8):
        now,before = teacher.said[i]
        torch.testing.assert_close(now,    snapshots[i](xbs[i % 4]).detach(), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(before, snapshots[i-1](xbs[i % 4]).detach(), rtol=1e-4, atol=1e-4)
        assert not torch.allclose(now, before, rtol=1e-3, atol=1e-3)


# ---------------------------------------------------------------- 2. intervals

@given(st.fractions(Fraction(1, 50), 500, max_denominator=1000), st.integers(1, 2000))
@settings(max_examples=100, deadline=None)
def test_copies_move_at_the_first_step_at_or_after_each_multiple(kappa, n_steps):
    due = [t for t in range(1, n_steps+1) if is_due(t, kappa)]
    if kappa < 1: assert due == list(range(1, n_steps+1))
    else:
        assert len(due) == n_steps//kappa
        assert due == ref.refresh_steps(kappa, n_steps)

@pytest.mark.parametrize('kappa', [1, 2, 7, 40])
def test_a_whole_interval_is_t_mod_kappa(kappa):
    for t in range(1, 200): assert is_due(t, Fraction(kappa)) == (t % kappa == 0)

def drive(teacher, per_epoch, n_epoch, model=None, n_classes=K):
    "The steps before which the copies of a teacher move; the network is changed after every step, and nothing is trained"
    model = nn.Linear(1, n_classes) if model is None else model
    loader = SimpleNamespace(bs=BS)
    teacher.attach(SimpleNamespace(model=model, cbs=[], dl=loader, dls=SimpleNamespace(train=loader), yb=(torch.zeros(BS, dtype=torch.long),), n_iter=per_epoch, n_epoch=n_epoch, epoch=0, lock=threading.Lock()))
    x,moved,last = torch.zeros(1, 1),[],None
    for t in range(1, per_epoch*n_epoch+1):
        with torch.no_grad(): model.bias.fill_(t)
        teacher.before_batch()
        said = teacher(Step(torch.zeros(1, dtype=torch.long), None, (x,))).flatten()[0].item()
        if last is not None and said != last or last is None and is_due(t, teacher.kappa): moved.append((t, said))
        last = said
        teacher.after_step()
    assert all(t == said for t,said in moved)   # the first copy is the network just before the step
    return [t for t,_ in moved]

@pytest.mark.parametrize('interval,kappa', [(2.5, Fraction(1955, 2)), (1, 391), (.25, Fraction(391, 4)), (Fraction(1, 3), Fraction(391, 3)), (1/391, 1), (4/391, 4),
                                            (10/391, 10), (40/391, 40), (.1, Fraction(391, 10)), (np.float64(2.5), Fraction(1955, 2)), (np.float32(.5), Fraction(391, 2)),
                                            (np.int64(2), 782), (None, Fraction(6*391, 8))], ids=str)
def test_an_interval_in_epochs_is_an_exact_fraction(interval, kappa):
    assert drive(MemoryTeacher(1, interval), 391, 6) == ref.refresh_steps(Fraction(kappa), 6*391)

def test_a_fractional_interval_refreshes_as_often_as_the_fraction_says():
    assert len(drive(MemoryTeacher(1, 2.5), 39, 200)) == 80   # 97.5 steps: rounded to 97 or 98 it were 80 and 79
    assert len(drive(MemoryTeacher(1, interval_steps=Fraction(5, 2)), 100, 1)) == 40

def test_an_interval_below_a_step_is_every_step():
    for o in (.5, 1e-3, 1e-9): assert drive(MemoryTeacher(1, interval_steps=o), 5, 2) == list(range(1, 11))

@pytest.mark.parametrize('epochs,steps', [(1, 4), (.75, 3), (.5, 2.), (1.25, 5), (Fraction(5, 8), 2.5)], ids=str)
def test_epochs_and_steps_agree(epochs, steps):
    def run(**kwargs): return quiet_fit(learner(MemoryReplay(2, **kwargs)), 3, .05).model
    assert_same_weights(run(interval=epochs), run(interval_steps=steps), 0)

def test_no_interval_is_an_eighth_of_the_training():
    def run(**kwargs): return quiet_fit(learner(MemoryReplay(2, **kwargs)), 4, .05).model
    assert_same_weights(run(), run(interval_steps=2), 0)

def initial_teacher(net): return lambda step: copy.deepcopy(net).train()(step.xb[0])

@pytest.mark.parametrize('n', [1, 3])
def test_an_interval_beyond_the_training_is_distillation_from_the_initial_network(n):
    with pytest.warns(UserWarning, match='17 steps is longer than the training, 16 steps.*initial'):
        a = quiet_fit(learner(MemoryReplay(n, interval_steps=17)), 4, .05)
    b = quiet_fit(learner(KnowledgeDistillation(initial_teacher(small_net()), .25, 3.)), 4, .05)
    assert_same_weights(a.model, b.model, 1e-5)

def test_an_interval_of_the_whole_training_never_copies():
    "Wang et al. §4.3: with κ = T the copies are never updated"
    with warnings.catch_warnings():
        warnings.simplefilter('error', UserWarning)
        a = quiet_fit(learner(MemoryReplay(2, 4)), 4, .05)
    plain = Algorithm1(small_net(), 2, 17, 16)   # never due
    for batch in batches_of(*images(), 4):
        plain.step(batch)
        assert plain.copies[0][1]
    assert_same_weights(a.model, plain.net, 1e-5)
    assert drive(MemoryTeacher(1, interval_steps=16), 4, 4) == [] and drive(MemoryTeacher(1, interval_steps=15), 4, 4) == [15]


# ---------------------------------------------------------------- 3. copies of untrained networks

@pytest.mark.parametrize('n,kappa', [(3, 3), (1, 1)])
def test_a_deep_network_from_scratch(n, kappa):
    d = load_digits()
    x = torch.tensor(d.images[:128], dtype=f32)[:, None].expand(-1, 3, -1, -1)/16
    y = torch.tensor(d.target[:128])
    torch.manual_seed(0)
    net = create_model('resnet110', K)
    teacher,log = Recording(n, interval_steps=kappa),Curve()
    with torch.no_grad(): assert copy.deepcopy(net).eval()(x[:32]).abs().max() > 1e3   # what evaluation mode would say
    quiet_fit(learner([replay(teacher), log], net, make_dls(x, y, 32)), 1, .01)
    said = teacher.said[:2] if kappa > 1 else teacher.said[:1]   # of the untrained copies
    assert max(o.abs().max() for o in said) < 50
    assert all(math.isfinite(o) for o in log.losses) and max(log.losses[:len(said)]) < 10

def test_untrained_is_a_norm_that_no_batch_has_touched():
    untrained = lambda net: FrozenCopy(net, untrained=True).untrained
    assert untrained(small_net()) and not untrained(trained_net())
    assert not untrained(small_net(norm=plain_norm))
    assert not untrained(nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3, track_running_stats=False)))
    net = trained_net()
    for m in net:
        if isinstance(m, nn.BatchNorm2d): m.num_batches_tracked.zero_()   # converted weights, old checkpoints
    assert not untrained(net)

@pytest.mark.parametrize('n', [1, 3])
def test_a_pretrained_network_is_evaluated_from_the_start(n):
    plain = Algorithm1(trained_net(dtype=f64), n, 3, 12, fresh=False)
    for batch in batches_of(*images(dtype=f64), 3): plain.step(batch)
    assert_same_weights(quiet_fit(learner(MemoryReplay(n, interval_steps=3), trained_net(dtype=f64)), 3, .05).model, plain.net, 1e-10)

def test_a_pretrained_body_with_a_new_head_keeps_its_statistics():
    body = trained_net()[:-1]
    net = nn.Sequential(*body, nn.BatchNorm1d(8), nn.Linear(8, K))
    teacher = Recording(1, interval_steps=9)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        quiet_fit(learner(replay(teacher), copy.deepcopy(net)), 1, .05)
    net.eval()[-2].train()   # the new norm alone
    for said,xb in zip(teacher.said, images()[0].split(BS)): torch.testing.assert_close(said, net(xb).detach(), rtol=1e-3, atol=1e-4)

@pytest.mark.parametrize('schedule', [SchedLin(0., .5), lambda pct: 0. if pct < .4 else .5], ids=['from 0', 'off, then on'])
def test_copies_move_while_the_soft_term_has_no_weight(schedule):
    "Algorithm 1 knows of no schedule: initial copies are θ_0, and refreshes are due whether the term counts or not"
    net = small_net(f64)
    plain = Algorithm1(net, 2, 3, 16)
    for i,batch in enumerate(batches_of(*images(dtype=f64), 4)):
        plain.alpha = schedule(i/16)
        plain.step(batch)
    learn = quiet_fit(learner(MemoryReplay(2, interval_steps=3, alpha=schedule), small_net(f64)), 4, .05)
    assert_same_weights(learn.model, net, 1e-10)


# ---------------------------------------------------------------- 4. what counts as a step

@pytest.mark.parametrize('norm,tol', [(nn.BatchNorm2d, 1e-9), (plain_norm, 1e-9)], ids=['batch norm', 'group norm'])
def test_micro_batches_do_not_count(norm, tol):
    x,y = images(dtype=f64)
    plain = Algorithm1(small_net(f64, norm=norm), 3, 3, 12)
    parts = batches_of(x, y, 6, 8)
    for i in range(0, len(parts), 4): plain.step(*parts[i:i+4])   # four parts of eight images
    log = Curve()
    learn = quiet_fit(learner([MemoryReplay(3, interval_steps=3), GradientAccumulation(32), log], small_net(f64, norm=norm), bs=8), 6, .05)
    assert_same_weights(learn.model, plain.net, tol)

def test_accumulated_gradients_are_those_of_the_large_batch():
    def run(bs, *cbs): return quiet_fit(learner([MemoryReplay(3, .5), *cbs], small_net(f64, norm=plain_norm), bs=bs), 6, .05).model   # κ = 1 step of two an epoch
    large = run(32)
    assert_same_weights(run(8, GradientAccumulation(32)), large, 1e-9)
    assert_same_weights(run(16, GradientAccumulation(32)), large, 1e-9)

class Overflow(Callback):
    "What `MixedPrecision` does when a gradient is infinite"
    order = 11
    def __init__(self, at): self.at,self.seen = at,0
    def before_step(self):
        self.seen += 1
        if self.seen in self.at: raise CancelStepException()

@pytest.mark.parametrize('norm', [nn.BatchNorm2d, plain_norm], ids=['batch norm', 'group norm'])
@pytest.mark.parametrize('skipped', [{1, 2}, {3, 4, 5, 9}], ids=str)
def test_skipped_steps_do_not_count(skipped, norm):
    plain = Algorithm1(small_net(f64, norm=norm), 3, 3, 16)
    for i,batch in enumerate(batches_of(*images(dtype=f64), 4), 1): plain.step(batch, skip=i in skipped)
    learn = quiet_fit(learner([MemoryReplay(3, interval_steps=3), Overflow(skipped)], small_net(f64, norm=norm)), 4, .05)
    assert_same_weights(learn.model, plain.net, 1e-10)

def test_validation_and_predictions_in_between_do_not_count():
    plain = Algorithm1(small_net(f64), 3, 3, 16)
    for batch in batches_of(*images(dtype=f64), 4): plain.step(batch)
    def look(learn):
        if learn.lock.locked(): return   # the events of the validation itself
        learn.validate()
        learn.get_preds(dl=learn.dls.valid)
    learn = quiet_fit(learner([MemoryReplay(3, interval_steps=3), At('after_epoch', look)], small_net(f64)), 4, .05)
    assert_same_weights(learn.model, plain.net, 1e-10)

def test_lr_find_before_a_fit_changes_nothing_and_warns_of_nothing():
    plain = Algorithm1(small_net(f64), 3, 12, 16)
    for batch in batches_of(*images(dtype=f64), 4): plain.step(batch)
    learn = learner(MemoryReplay(3, 3), small_net(f64))
    with warnings.catch_warnings():
        warnings.filterwarnings('error', message='.*longer than the training')
        with learn.no_bar(): learn.lr_find(num_it=5, show_plot=False, suggest_funcs=None)
    assert_same_weights(quiet_fit(learn, 4, .05).model, plain.net, 1e-10)

def test_a_second_fit_starts_new_copies():
    x,y = images(dtype=f64)
    net = small_net(f64)
    first = Algorithm1(net, 3, 3, 8)
    for batch in batches_of(x, y, 2): first.step(batch)
    second = Algorithm1(net, 3, 3, 8, fresh=False, opt=first.opt)
    for batch in batches_of(x, y, 2): second.step(batch)
    learn = learner(MemoryReplay(3, interval_steps=3), small_net(f64))
    quiet_fit(quiet_fit(learn, 2, .05), 2, .05)
    assert_same_weights(learn.model, net, 1e-10)

def test_a_fit_after_an_interrupted_one_starts_new_copies():
    def stop(learn): raise KeyboardInterrupt
    learn = learner(MemoryReplay(3, interval_steps=3), small_net(f64))
    with pytest.raises(KeyboardInterrupt): quiet_fit(learn, 2, .05, cbs=At('before_batch', stop, 6))
    net,opt = copy.deepcopy(learn.model),learn.opt
    learn.create_opt()
    plain = Algorithm1(net, 3, 3, 8, fresh=False)
    for batch in batches_of(*images(dtype=f64), 2): plain.step(batch)
    assert_same_weights(quiet_fit(learn, 2, .05).model, net, 1e-10)

def test_a_torch_loader():
    x,y = images()
    loader = torch.utils.data.DataLoader(TensorDataset(x, y), BS)
    dls = DataLoaders(loader, loader)
    dls.c = K
    plain = Algorithm1(small_net(), 2, 2, 8)
    for batch in batches_of(x, y, 2): plain.step(batch)
    assert_same_weights(quiet_fit(learner(MemoryReplay(2, .5), dls=dls), 2, .05).model, plain.net, 1e-5)

def test_an_ensemble_takes_no_memory():
    "It would not tell its members of steps, and the copies would never move"
    with pytest.raises(TypeError, match='MemoryTeacher'): EnsembleTeacher([MemoryTeacher(1, interval_steps=2), trained_net(seed=3)])


# ---------------------------------------------------------------- 5. resume and export

def resumable(path, cbs=(), seed=0, **kwargs):
    net,dls = small_net(seed=seed),make_dls(*images(), shuffle=True)
    seed_run(seed, dls)
    return learner([MemoryReplay(3, **{'interval_steps': 3, **kwargs}), Curve(), *cbs], net, dls)

def full_state(learn): return learn.model.state_dict(), [float(o) for o in learn.recorder.losses], learn.curve.losses

def stop(learn): raise KeyboardInterrupt

@pytest.mark.parametrize('kwargs', [{}, dict(interval_steps=6), dict(interval_steps=2.5, gamma=.3), dict(copy_dtype=bf16), dict(n=1)], ids=str)
@pytest.mark.parametrize('event,at', [('before_batch', 7), ('before_batch', 14), ('after_epoch', 1), ('after_epoch', 2)])
def test_a_resumed_training_is_the_undisturbed_one(tmp_path, event, at, kwargs):
    kwargs = dict(kwargs)
    if kwargs.pop('n', 3) == 1: kwargs['interval_steps'] = 5
    whole = quiet_fit(resumable(tmp_path, **kwargs), 4, .05)
    path = tmp_path/'ck.pth'
    with pytest.raises(KeyboardInterrupt):
        quiet_fit(resumable(tmp_path, [Checkpoint(path), At(event, stop, at, order=2000)], **kwargs), 4, .05)
    again = quiet_fit(resumable(tmp_path, [Checkpoint(path)], seed=7, **kwargs), 4, .05)
    (want,losses,exact),(got,losses2,exact2) = full_state(whole),full_state(again)
    for k in want: assert torch.equal(want[k], got[k]), k
    assert losses == losses2
    assert exact[-len(exact2):] == exact2 and 0 < len(exact2) < 16

def test_resume_in_the_middle_of_an_accumulated_step(tmp_path):
    "Four batches an epoch, three a step: step 2's refresh was made in epoch 1 and is not made again"
    def make(*cbs, seed=0): return resumable(tmp_path, [GradientAccumulation(48), *cbs], seed=seed, interval_steps=2)
    whole = quiet_fit(make(), 6, .05)
    path = tmp_path/'ck.pth'
    for at in (1, 2, 4):
        path.unlink(missing_ok=True)
        with pytest.raises(KeyboardInterrupt): quiet_fit(make(Checkpoint(path), At('after_epoch', stop, at, order=2000)), 6, .05)
        again = quiet_fit(make(Checkpoint(path), seed=7), 6, .05)
        for k,v in whole.model.state_dict().items(): assert torch.equal(v, again.model.state_dict()[k]), (at, k)

def test_resume_in_one_session(tmp_path):
    whole = quiet_fit(resumable(tmp_path), 4, .05)
    learn = resumable(tmp_path, [Checkpoint(tmp_path/'ck.pth')])
    with pytest.raises(KeyboardInterrupt): quiet_fit(learn, 4, .05, cbs=At('before_batch', stop, 10))
    quiet_fit(learn, 4, .05)
    for k,v in whole.model.state_dict().items(): assert torch.equal(v, learn.model.state_dict()[k]), k

def test_a_twice_interrupted_training(tmp_path):
    whole,path = quiet_fit(resumable(tmp_path), 4, .05),tmp_path/'ck.pth'
    for at,seed in ((6, 0), (6, 1)):   # in the second epoch, then in the third
        with pytest.raises(KeyboardInterrupt): quiet_fit(resumable(tmp_path, [Checkpoint(path), At('before_batch', stop, at)], seed=seed), 4, .05)
    again = quiet_fit(resumable(tmp_path, [Checkpoint(path)], seed=7), 4, .05)
    for k,v in whole.model.state_dict().items(): assert torch.equal(v, again.model.state_dict()[k]), k

def test_the_exported_learner_holds_no_copies(tmp_path):
    def size(name, *cbs, during=False):
        net = nn.Sequential(nn.Flatten(), nn.Linear(192, 500), nn.Linear(500, K))
        learn = learner(cbs, net)
        export = lambda l: l.export(tmp_path/name)
        quiet_fit(learn, 2, .01, cbs=[At('after_epoch', export, 2)] if during else [])
        if not during: export(learn)
        return (tmp_path/name).stat().st_size
    plain = size('plain')
    for during in (False, True):
        assert size('memory', MemoryReplay(5, interval_steps=1), during=during) - plain < 20_000
        loaded = load_learner(tmp_path/'memory')
        x,y = images()
        assert torch.isfinite(loaded.model(x)).all() and loaded.memory_replay.teacher.copies is None
        loaded.dls = make_dls(x, y)
        loaded.remove_cbs([o for o in loaded.cbs if isinstance(o, At)])
        quiet_fit(loaded, 1, .01)   # and trains again

def test_a_pickled_or_copied_callback_holds_no_copies():
    cb,held = MemoryReplay(3, interval_steps=1),[]
    def look(learn):
        twin = copy.deepcopy(cb.teacher)
        held.append((twin.copies, twin.learn, cb.teacher.copies is not None))
    quiet_fit(learner([cb, At('after_batch', look, 5)]), 2, .05)
    assert held == [(None, None, True)]


# ---------------------------------------------------------------- 6. teacher correction of networks

def logits(*shape, spread=3., seed=0, dtype=f64):
    return (spread*torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=f64)).to(dtype)

def labels(n_classes, *shape, seed=1): return torch.randint(n_classes, shape, generator=torch.Generator().manual_seed(seed))

def step_of(zt, y, tau=(3., 3.), z=None):
    shape = zt.shape[-2:] if y.ndim == 1 else zt.shape[-2-(y.ndim-1):]
    return Step(y, torch.zeros(shape, dtype=zt.dtype) if z is None else z, zt=zt, tau=tau)

@pytest.mark.parametrize('dtype', [f64, f32], ids=str)
@pytest.mark.parametrize('tau', [.7, 1., 3., 20.])
@pytest.mark.parametrize('gamma', [1e-6, .01, .3, .99, 1-1e-6])
def test_correction_is_eq_16(gamma, tau, dtype):
    for k in (2, 10, 100):
        zt,y = logits(16, k, dtype=dtype),labels(k, 16)
        step = step_of(zt, y, (tau, tau))
        out = TeacherCorrection(gamma)(step.pt, step)
        assert out.dtype == dtype
        torch.testing.assert_close(out.double(), torch.tensor(ref.put_on_label(zt.double(), y, gamma, tau)), rtol={f64: 1e-9, f32: 2e-5}[dtype], atol={f64: 0, f32: 6e-8}[dtype])
        printed = corrected((zt.double()/tau).softmax(1), y, gamma)
        torch.testing.assert_close(out.double(), printed, rtol=1e-4, atol=1e-7)

@pytest.mark.parametrize('size', [1e3, 1e4])
@pytest.mark.parametrize('dtype', [f64, f32, f16, bf16], ids=str)
def test_correction_is_safe_when_the_teacher_is_sure(size, dtype):
    "`q̂_c → 1`: the others' shares are still the teacher's, which `(1-γ)·q̂/(1-q̂_c)` could not tell"
    others = torch.tensor([[0., 1., 2., -1., 0.], [0., 3., 0., 1., 2.]])
    y = torch.tensor([0, 2])
    zt = others.to(dtype)
    zt[[0, 1], y] = size
    step = step_of(zt, y)
    out = TeacherCorrection(.4)(step.pt, step)
    want = ref.put_on_label(zt.double(), y, .4, 3.)
    np.testing.assert_allclose(out.double(), want, rtol=1e-5)
    assert out.dtype == (f64 if dtype == f64 else f32)

def test_correction_of_copies_comes_before_their_mean():
    zt,y,z = logits(3, 8, K),labels(K, 8),logits(8, K, seed=5)
    step = step_of(zt, y, z=z)
    out = TeacherCorrection(.3)(step.pt, step)
    assert out.shape == (3, 8, K)
    for o,t in zip(out, zt): np.testing.assert_allclose(o, ref.put_on_label(t, y, .3, 3.), rtol=1e-10)
    mean_first = ref.put_on_label(np.log(sum(ref.softmax(t.numpy()/3) for t in zt)/3), y, .3)
    assert np.abs(out.mean(0).numpy() - mean_first).max() > 1e-3   # the two orders differ

@pytest.mark.parametrize('gamma', [None, .3])
@pytest.mark.parametrize('n', [1, 3])
def test_the_soft_loss_of_copies_is_the_mean_of_theirs(n, gamma):
    zt,y = logits(n, 8, K),labels(K, 8)
    z = logits(8, K, seed=5).requires_grad_()
    cb = MemoryReplay(n, 1, gamma=gamma)
    step = step_of(zt, y, z=z)
    loss = .75*F.cross_entropy(z, y, reduction='none') + cb.soft_weight(K, .5)*cb.sample_losses(step)
    grad, = torch.autograd.grad(loss.sum(), z)
    want,want_grad,_ = ref.mrkd(z.detach(), y.numpy(), list(zt), gamma=gamma)
    np.testing.assert_allclose(loss.detach(), want, rtol=1e-10)
    np.testing.assert_allclose(grad, want_grad, rtol=1e-8, atol=1e-12)

def test_correction_after_another_rewrite():
    zt,y = logits(8, K),labels(K, 8)
    step = step_of(zt, y)
    flat = .5*step.pt + .5/K   # any distribution
    np.testing.assert_allclose(TeacherCorrection(.3)(flat, step), corrected(flat, y, .3), rtol=1e-9)
    twice = TeacherCorrection(.3)(TeacherCorrection(.8)(step.pt, step), step)
    np.testing.assert_allclose(twice, TeacherCorrection(.3)(step.pt, step), rtol=1e-9)
    sure = torch.zeros(8, K, dtype=f64).scatter_(1, y[:, None], 1.)   # nothing left to share in proportion
    out = TeacherCorrection(.3)(sure, step)
    assert out.isfinite().all()
    np.testing.assert_allclose(out.sum(1), 1.)
    np.testing.assert_allclose(out.gather(1, y[:, None]), .3)

def test_correction_of_zero_entries_leaves_them_zero():
    zt,y = logits(8, K),torch.zeros(8, dtype=torch.long)
    zt[:, 3] = -torch.inf
    step = step_of(zt, y)
    out = TeacherCorrection(.3)(step.pt, step)
    assert (out[:, 3] == 0).all()
    np.testing.assert_allclose(out, ref.put_on_label(zt, y, .3, 3.), rtol=1e-10)

def test_correction_of_part_of_a_batch():
    zt,y = logits(3, 8, K),labels(K, 8)
    step = step_of(zt, y)
    which = torch.tensor([1, 0, 1, 0, 0, 0, 1, 1]).bool()
    out,full = TeacherCorrection(.3, on=lambda s: which)(step.pt, step),TeacherCorrection(.3)(step.pt, step)
    assert torch.equal(out[:, which], full[:, which]) and torch.equal(out[:, ~which], step.pt[:, ~which])
    each = torch.stack([which, ~which, which])   # another set for each copy
    out = TeacherCorrection(.3, on=lambda s: each)(step.pt, step)
    assert torch.equal(out, torch.where(each[..., None], full, step.pt))
    one = step_of(zt[0], y)
    out = TeacherCorrection(.3, on=lambda s: which)(one.pt, one)
    assert torch.equal(out, torch.where(which[:, None], full[0], one.pt))
    with pytest.raises(TypeError, match='on'): TeacherCorrection(.3, on='all')

def test_correction_of_part_of_a_batch_for_targets_from_the_label():
    y = labels(5, 5)
    which = torch.tensor([1, 0, 0, 1, 0]).bool()
    q = torch.tensor([.5, .3, .2, 0, 0]).repeat(5, 1)
    for labels_ in (y, q, torch.cat([q, q[:2]])):   # also as many samples as classes
        n = len(labels_)
        on = torch.cat([which, torch.tensor([True, False])])[:n]
        step = Step(labels_, torch.zeros(n, 5), zt=TwoValued(0., 0.))
        out = TeacherCorrection(.6, on=lambda s: on)(step.pt, step)
        hot = labels_ if labels_.is_floating_point() else F.one_hot(labels_, 5).float()
        torch.testing.assert_close(out, torch.where(on[:, None], .1 + .5*hot, torch.full((n, 5), .2)))

@pytest.mark.parametrize('n', [None, 3])
def test_correction_of_dense_predictions_and_ignored_positions(n):
    y = labels(5, 2, 4, 3)
    y[0, 0] = -100
    zt = logits(*([] if n is None else [n]), 2, 5, 4, 3)
    z = logits(2, 5, 4, 3, seed=5)
    step = Step(y, z, zt=zt, tau=(2., 2.))
    out = TeacherCorrection(.3)(step.pt, step)
    assert out.shape == zt.shape and out.isfinite().all()
    rows = lambda t: t.movedim(-3, -1).reshape(-1, 5)
    for o,t in zip(out if n else [out], zt if n else [zt]):
        keep = y.reshape(-1) >= 0
        np.testing.assert_allclose(rows(o)[keep], ref.put_on_label(rows(t)[keep], y.reshape(-1)[keep], .3, 2.), rtol=1e-10)
    for bad in (255, -100, -1):   # whatever a data set calls "ignored"
        y[0, 0] = bad
        assert TeacherCorrection(.3)(step.pt, step).isfinite().all()

@pytest.mark.parametrize('dtype', [torch.int32, torch.uint8, torch.int16], ids=str)
def test_correction_for_labels_of_other_integer_types(dtype):
    zt,y = logits(8, K),labels(K, 8)
    assert torch.equal(put_confidence(zt, y.to(dtype), .3), put_confidence(zt, y, .3))

def test_correction_for_soft_labels_mixes_or_refuses():
    zt,q = logits(8, K),logits(8, K, seed=3).softmax(1)
    step = Step(q, torch.zeros(8, K, dtype=f64), zt=zt, tau=(3., 3.))
    try: out = TeacherCorrection(.3)(step.pt, step)
    except TypeError as e: assert 'integer labels' in str(e)
    else: np.testing.assert_allclose(out, ref.corrected_soft_labels(zt.numpy(), q.numpy(), .3, 3.), rtol=1e-9)

def test_rewrites_shown():
    assert repr(TeacherCorrection(.3)) == 'TeacherCorrection(gamma=0.3)'
    with pytest.raises(ValueError, match='gamma'): TeacherCorrection(0.)
    class Half(Rewrite):
        def rewrite(self, target, step): return target/2 + .5/step.n_classes
    zt,y = logits(8, K),labels(K, 8)
    step = step_of(zt, y)
    torch.testing.assert_close(Half()(step.pt, step).sum(1), torch.ones(8, dtype=f64))


# ---------------------------------------------------------------- 7. put_confidence

numbers = st.floats(-1e4, 1e4, width=32)

@given(st.integers(2, 12).flatmap(lambda k: st.lists(st.lists(numbers, min_size=k, max_size=k), min_size=1, max_size=4)),
       st.floats(0, 1), st.floats(.05, 50), st.integers(0, 11), st.sampled_from([f32, f64]))
@settings(max_examples=100, deadline=None)
def test_put_confidence_is_a_distribution(rows, value, tau, label, dtype):
    z = torch.tensor(rows, dtype=dtype)
    y = torch.full((len(z),), label % z.shape[1])
    p = put_confidence(z, y, value, tau)
    assert p.dtype == dtype and (p >= 0).all() and p.isfinite().all()
    np.testing.assert_allclose(p.double().sum(1), 1, atol=1e-6)
    np.testing.assert_allclose(p.double(), ref.put_on_label(z.double(), y, value, tau), atol=2e-6, rtol=1e-3)

def test_put_confidence_takes_a_value_for_each_sample():
    z,y = logits(8, K),labels(K, 8)
    v = torch.linspace(0, 1, 8, dtype=f64)
    out = put_confidence(z, y, v[:, None], 2.)
    for i in range(8): np.testing.assert_allclose(out[i:i+1], ref.put_on_label(z[i:i+1], y[i:i+1], v[i].item(), 2.), rtol=1e-10)
    z = logits(3, 8, K)
    out = put_confidence(z, y, v[:, None], 2.)
    assert out.shape == (3, 8, K)
    np.testing.assert_allclose(out.gather(2, y[:, None].expand(3, 8, 1))[..., 0], v.expand(3, 8))

@pytest.mark.parametrize('tau', [.7, 1., 3.])
def test_put_confidence_does_not_see_a_common_offset_or_the_labels_logit(tau):
    z,y = (64*logits(16, K)).round().float()/64,labels(K, 16)   # which 1e4 does not round
    want = put_confidence(z, y, .3, tau)
    for offset in (1e4, -1e4): torch.testing.assert_close(put_confidence(z+offset, y, .3, tau), want, rtol=1e-6, atol=0)
    for own in (1e4, 1e8, -1e4): torch.testing.assert_close(put_confidence(z.scatter(1, y[:, None], own), y, .3, tau), want, rtol=1e-6, atol=0)

def test_at_label_finds_the_class_in_every_layout():
    y = labels(5, 2, 4)
    for t in (logits(2, 5, 4), logits(3, 2, 5, 4)):
        index,axis = at_label(t, y)
        got = t.gather(axis, index).squeeze(axis)
        for i in range(2):
            for j in range(4): assert torch.equal(got[..., i, j], t[..., i, y[i, j], j])


# ---------------------------------------------------------------- 8. with fastai's other callbacks

class CPUAutocast(MixedPrecision):
    "`to_bf16` for the CPU"
    def before_fit(self): self.autocast,self.learn.scaler,self.scales = torch.autocast('cpu', dtype=bf16),torch.amp.GradScaler('cpu', enabled=False),[]

@pytest.mark.parametrize('mix', [MixUp, CutMix])
@pytest.mark.parametrize('gamma', [None, .3])
def test_mixed_images(mix, gamma):
    teacher,seen = Recording(2, interval_steps=2),[]
    cb = replay(teacher, scale='tau2' if gamma is None else 'tau', rewrite=() if gamma is None else TeacherCorrection(gamma))
    def look(learn):
        zt,z,lam,y1,y2 = teacher.said[-1],learn.pred.detach(),learn.distill.mixing.lam.numpy().reshape(-1),learn.yb[0],learn.distill.mixing.yb1[0]
        copies = [o.numpy() for o in (zt if zt.ndim == 3 else zt[None])]
        parts = [ref.mrkd(z.numpy(), y.numpy(), copies, gamma=gamma)[0] for y in (y1, y2)]
        seen.append((learn.loss_grad.item(), (lam*parts[0] + (1-lam)*parts[1]).mean()))
        snapshot = copies_by_hand(teacher, learn.xb[0])
        torch.testing.assert_close(snapshot, zt, rtol=1e-4, atol=1e-5)   # the copies saw the student's images
    quiet_fit(learner([mix(1.), cb, At('after_loss', look)]), 2, .05)
    got,want = zip(*seen)
    assert len(seen) == 8
    np.testing.assert_allclose(got, want, rtol=1e-4)

def copies_by_hand(teacher, x):
    out = [o(x.as_subclass(torch.Tensor)) for o in teacher.copies]
    return out[0] if len({id(o) for o in teacher.copies}) == 1 else torch.stack(out)

def test_half_precision():
    teacher,exact,log,log32 = Recording(3, interval_steps=3),Recording(3, interval_steps=3),Curve(),Curve()
    quiet_fit(learner([replay(teacher), CPUAutocast(), log]), 4, .05)
    quiet_fit(learner([replay(exact), log32]), 4, .05)
    xs = [o.flatten().float() for o in teacher.said]
    assert all(torch.equal(o, o.to(bf16).float()) for o in xs)   # the copies ran in half precision
    assert {o.dtype for o in exact.said} == {f32}
    np.testing.assert_allclose(log.losses, log32.losses, rtol=.05)
    assert not torch.is_autocast_enabled('cpu')

@pytest.mark.parametrize('dtype,tol', [(bf16, .03), (f16, .01), (f64, 1e-4)], ids=str)
@pytest.mark.parametrize('amp', [False, True])
def test_copies_in_another_precision(dtype, tol, amp):
    a,b,la,lb = Recording(3, interval_steps=3, copy_dtype=dtype),Recording(3, interval_steps=3),Curve(),Curve()
    held = []
    half = lambda: [CPUAutocast()] if amp else []
    look = At('after_batch', lambda l: held.append({p.dtype for o in a.copies for p in o.model.parameters()}))
    quiet_fit(learner([replay(a), la, *half(), look]), 4, .05)
    quiet_fit(learner([replay(b), lb, *half()]), 4, .05)
    assert all(o == {dtype} for o in held)
    np.testing.assert_allclose(la.losses, lb.losses, rtol=max(tol, .05*amp))

def test_copies_in_half_precision_of_a_network_of_words():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Embedding(20, 8), nn.Flatten(), nn.Linear(32, K))
    cb,held = MemoryReplay(2, interval_steps=2, copy_dtype=bf16),[]
    quiet_fit(learner([cb, At('after_batch', lambda l: held.append({p.dtype for o in cb.teacher.copies for p in o.model.parameters()}))],
                      net, make_dls(torch.randint(0, 20, (64, 4)), labels(K, 64))), 1, .05)
    assert held == [{bf16}]*4

@pytest.mark.parametrize('device', ['cpu', torch.device('cpu'), ['cpu', 'cpu'], 'spread'], ids=str)
def test_copies_on_a_named_device(device):
    if device == 'spread' and torch.cuda.is_available(): pytest.skip('the copies would leave the CPU')
    a = quiet_fit(learner(MemoryReplay(3, interval_steps=3, copy_device=device)), 4, .05)
    b = quiet_fit(learner(MemoryReplay(3, interval_steps=3)), 4, .05)
    assert_same_weights(a.model, b.model, 0)

def test_the_sum_of_several_methods_in_any_order():
    teacher = trained_net(seed=4)
    def make(): return [MemoryReplay(2, interval_steps=3), LsrKD(), KnowledgeDistillation(teacher, .3, name='kd')]
    runs = []
    for order in (0, 1, 2):
        cbs = make()
        learn = learner(cbs[order:]+cbs[:order])
        quiet_fit(learn, 3, .05)
        runs.append(learn.model)
    for o in runs[1:]: assert_same_weights(o, runs[0], 0)
    names = []
    learn = learner(make()+[At('before_fit', lambda l: names.extend(m.name for m in l.metrics))])
    quiet_fit(learn, 1, .05)
    assert {'base_loss', 'memory_replay_loss', 'lsr_kd_loss', 'kd_loss'} <= set(names)

def test_two_memories_with_names():
    "Half the weight twice is the whole"
    a = quiet_fit(learner([MemoryReplay(2, interval_steps=3, alpha=.1), MemoryReplay(2, interval_steps=3, alpha=.15, name='other')], small_net(f64)), 3, .05)
    b = quiet_fit(learner(MemoryReplay(2, interval_steps=3, alpha=.25), small_net(f64)), 3, .05)
    assert_same_weights(a.model, b.model, 1e-10)
    with pytest.raises(ValueError, match='name='): quiet_fit(learner([MemoryReplay(2), MemoryReplay(3)]), 1, .05)


# ---------------------------------------------------------------- 9. two processes

BS2 = 16   # images of a whole batch

def train_part(rank, world, norm):
    "What a process of a parallel training returns: weights, and the answers of each step's copies on the same images"
    x,y = images()
    if world > 1: part = torch.cat([torch.arange(i+rank*BS2//2, i+(rank+1)*BS2//2) for i in range(0, len(x), BS2)])
    else:         part = torch.arange(len(x))
    cb,probe,answers,own = MemoryReplay(3, interval_steps=3),x[:8],[],[]
    def look(learn):
        answers.append([o(probe) for o in cb.teacher.copies])
    def student(learn):
        if learn.train_iter % 3 == 2: own.append(copy.deepcopy(getattr(learn.model, 'module', learn.model)).eval()(probe).detach())   # before steps 3, 6, …
    net = small_net(norm=norm)
    learn = learner([cb, At('before_batch', student, order=-50), At('after_batch', look)], net, make_dls(x[part], y[part], BS2//world))
    if world > 1: learn.model = nn.parallel.DistributedDataParallel(net)
    quiet_fit(learn, 3, .05)
    return dict(weights=net.state_dict(), answers=[torch.stack(o) for o in answers], own=own)

def work(rank, world, folder, norm):
    torch.set_num_threads(1)
    try:
        dist.init_process_group('gloo', init_method=f'file://{folder}/meet', rank=rank, world_size=world)
        torch.save(train_part(rank, world, norm), f'{folder}/{rank}.pth')
        dist.barrier()
        dist.destroy_process_group()
    except BaseException:
        Path(f'{folder}/{rank}.error').write_text(traceback.format_exc())
        raise

def in_two_processes(folder, norm):
    both = [processes.Process(target=work, args=(rank, 2, str(folder), norm)) for rank in range(2)]
    for p in both: p.start()
    for p in both: p.join(120)
    for p in both:
        if p.is_alive(): p.kill()
    errors = [f.read_text() for f in Path(folder).glob('*.error')]
    assert not errors, errors[0]
    return [torch.load(f'{folder}/{rank}.pth') for rank in range(2)]

needs_gloo = pytest.mark.skipif(not (hasattr(os, 'fork') and dist.is_available() and dist.is_gloo_available()), reason='needs fork and gloo')

@needs_gloo
def test_two_processes_are_one_with_the_whole_batch(tmp_path):
    a,b = in_two_processes(tmp_path, plain_norm)
    whole = train_part(0, 1, plain_norm)
    for k,v in whole['weights'].items():
        assert torch.equal(a['weights'][k], b['weights'][k]), k
        torch.testing.assert_close(a['weights'][k], v, rtol=1e-5, atol=1e-6)
    assert len(whole['answers']) == 12
    for o,p,w in zip(a['answers'], b['answers'], whole['answers']):
        assert torch.equal(o, p)
        torch.testing.assert_close(o, w, rtol=1e-4, atol=1e-5)

@needs_gloo
def test_copies_of_two_processes_have_the_first_ones_buffers(tmp_path):
    a,b = in_two_processes(tmp_path, nn.BatchNorm2d)
    for o,p in zip(a['answers'], b['answers']): assert torch.equal(o, p)
    for i in range(3, 12):   # at step i+1 the first copy is the student before step 3, 6, 9 or 12
        last = (i+1)//3
        torch.testing.assert_close(a['answers'][i][0], a['own'][last-1], rtol=1e-4, atol=1e-5)
    assert any(not torch.allclose(o, p, rtol=1e-4, atol=1e-5) for o,p in zip(a['own'], b['own']))   # the processes' own statistics do differ


# ---------------------------------------------------------------- 10. memory, random numbers, no weight

def live_bytes():
    "Storage of all tensors that are alive"
    gc.collect()
    storages = {}
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        for o in gc.get_objects():
            if issubclass(type(o), torch.Tensor): storages[o.untyped_storage().data_ptr()] = o.untyped_storage().nbytes()
    return sum(storages.values())

def wide_net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 64, 3), nn.BatchNorm2d(64), nn.ReLU(), nn.Conv2d(64, 64, 3), nn.BatchNorm2d(64), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
                         nn.Linear(64, K))

@pytest.mark.parametrize('n', [1, 5])
def test_copies_hold_parameters_and_buffers_and_nothing_more(n):
    each = sum(t.nbytes for t in wide_net().state_dict().values())
    def run(cb):
        seen = []
        learn = learner([*([cb] if cb else []), At('after_batch', lambda l: seen.append((live_bytes(), cb and cb.teacher.n_bytes)), 7, order=2000)], wide_net())
        quiet_fit(learn, 2, .05)
        return *seen[0], live_bytes()
    (plain,_,plain_after),(ours,said,after) = run(None),run(MemoryReplay(n, interval_steps=1))
    assert .9*n*each <= said <= n*each*1.01
    assert ours-plain <= n*each*1.01 + 4096
    assert after-plain_after <= 4096   # given back

def test_one_initial_copy_is_held_once():
    seen,cb = [],MemoryReplay(5, interval_steps=3)
    quiet_fit(learner([cb, At('after_batch', lambda l: seen.append(cb.teacher.n_bytes))], wide_net()), 4, .05)
    each = sum(t.nbytes for t in wide_net().state_dict().values())
    kept = [round(o/each) for o in seen]
    assert kept == [min(5, 1+t//3) for t in range(1, 17)] and cb.teacher.n_bytes == 0

def test_copies_in_half_precision_hold_half():
    seen = []
    for dtype in (None, bf16):
        cb = MemoryReplay(2, interval_steps=2, copy_dtype=dtype)
        quiet_fit(learner([cb, At('after_batch', lambda l: seen.append(cb.teacher.n_bytes), 6)], wide_net()), 2, .05)
    assert .45 < seen[1]/seen[0] < .55

def test_no_random_number_is_drawn():
    draws = []
    for cbs in ([], [MemoryReplay(3, interval_steps=2, gamma=.3)]):
        net,dls = nn.Sequential(small_net(), nn.Dropout(.5)),make_dls(*images(), shuffle=True)
        seed_run(3, dls)
        quiet_fit(learner(cbs, net, dls), 2, .05)
        draws.append((torch.rand(3).tolist(), np.random.rand(3).tolist(), dls.train.rng.random()))
    assert draws[0] == draws[1]

def test_without_weight_it_is_as_if_it_were_not_there():
    a,b = quiet_fit(learner(MemoryReplay(3, interval_steps=2, alpha=0.)), 3, .05),quiet_fit(learner(), 3, .05)
    for k,v in b.model.state_dict().items(): assert torch.equal(v, a.model.state_dict()[k]), k
    assert list(map(float, a.recorder.losses)) == list(map(float, b.recorder.losses))

def test_the_student_is_left_alone():
    "Neither mode nor gradients nor buffers of the student change when its copies are asked"
    cb,seen = MemoryReplay(2, interval_steps=1),[]
    def look(learn): seen.append((all(m.training for m in learn.model.modules()), learn.model[1].num_batches_tracked.item()))
    learn = quiet_fit(learner([cb, At('after_pred', look)]), 2, .05)
    assert seen == [(True, i+1) for i in range(8)]
    mine = {id(p) for p in learn.model.parameters()}
    assert {id(p) for h in learn.opt.param_lists for p in h} == mine   # no copy in the optimizer

def test_validation_stays_the_learners_own():
    a,b = quiet_fit(learner(MemoryReplay(3, interval_steps=2)), 2, .05),quiet_fit(learner(), 2, .05)
    loss = float(a.validate()[0])
    x,y = images()
    with torch.no_grad(): want = F.cross_entropy(a.model.eval()(x[:BS]), y[:BS]).item()
    assert math.isclose(loss, want, rel_tol=1e-5)


# ---------------------------------------------------------------- 11. bad input, descriptions

@pytest.mark.parametrize('kwargs,error,words', [
    (dict(n_copies=0), ValueError, 'n_copies.*at least 1.*0'), (dict(n_copies=-1), ValueError, 'n_copies'), (dict(n_copies=2.5), TypeError, 'n_copies.*2.5'),
    (dict(n_copies=True), TypeError, 'n_copies'), (dict(interval=-1), ValueError, 'interval.*-1'), (dict(interval=0), ValueError, 'interval'),
    (dict(interval='1'), TypeError, "interval.*'1'"), (dict(interval=math.nan), ValueError, 'interval'), (dict(interval=math.inf), ValueError, 'interval'),
    (dict(interval_steps=0), ValueError, 'interval_steps'), (dict(interval_steps=-.5), ValueError, 'interval_steps'),
    (dict(interval=1, interval_steps=4), ValueError, 'interval.*interval_steps'), (dict(gamma=0), ValueError, 'gamma'), (dict(gamma=0.), ValueError, 'gamma'),
    (dict(gamma=1), ValueError, 'gamma'), (dict(gamma=1.), ValueError, 'gamma'), (dict(gamma=-.1), ValueError, 'gamma'), (dict(gamma='a'), TypeError, 'gamma'),
    (dict(copy_dtype='half'), TypeError, 'copy_dtype'), (dict(copy_dtype=torch.int8), TypeError, 'copy_dtype'),
    (dict(copy_device='nowhere'), (ValueError, TypeError), 'copy_device'), (dict(copy_device=[]), (ValueError, TypeError), 'copy_device'),
    (dict(alpha=1.5), ValueError, 'alpha'), (dict(tau=0), ValueError, 'tau')], ids=str)
def test_bad_arguments_are_named_at_construction(kwargs, error, words):
    with pytest.raises(error, match=words): MemoryReplay(**kwargs)

@pytest.mark.parametrize('interval', [dict(interval=5), dict(interval_steps=17)], ids=str)
def test_an_interval_longer_than_the_training_is_allowed_and_says_what_it_means(interval):
    with pytest.warns(UserWarning) as got: quiet_fit(learner(MemoryReplay(2, **interval)), 4, .05)
    said = [str(o.message) for o in got if 'longer' in str(o.message)]
    assert len(said) == 1 and '16 steps' in said[0] and 'initial network' in said[0]

def test_a_network_that_cannot_be_copied():
    net = small_net()
    net[0].lock = threading.Lock()
    with pytest.raises(TypeError, match='model.*Sequential.*cannot be copied.*lock'): quiet_fit(learner(MemoryReplay(2, 1), net), 1, .05)

def test_a_learner_that_does_not_classify():
    learn = learner(MemoryReplay(2, 1))
    learn.loss_func = nn.MSELoss()
    with pytest.raises(TypeError, match='regression'): quiet_fit(learn, 1, .05)

def test_description():
    d = MemoryReplay(3, 1).describe(100)
    assert (d.hard, d.tau) == (.75, 3.) and math.isclose(d.soft, .25*9) and d.target is None and not d.notes
    d = MemoryReplay(3, 1, gamma=.3).describe(100)
    assert math.isclose(d.soft, .25*3) and not d.notes
    assert any('1/K' in o for o in MemoryReplay(3, 1, gamma=.005).describe(100).notes)
    assert 'n_copies=3' in d.title and 'gamma=0.3' in d.title
    with pytest.raises(ValueError, match='n_classes'): MemoryReplay().describe()

@pytest.mark.parametrize('when', ['before', 'after'])
@pytest.mark.parametrize('dtype', [None, bf16])
def test_memory_is_described_once_attached(when, dtype):
    net = nn.Sequential(nn.Flatten(), nn.Linear(192, 2**13), nn.Linear(2**13, K))
    mib = 3*sum(p.numel() for p in net.parameters())*(4 if dtype is None else 2)/2**20
    learn = learner(MemoryReplay(3, 1, copy_dtype=dtype), net)
    if when == 'after': quiet_fit(learn, 1, 1e-3)
    notes = learn.memory_replay.describe().notes
    assert any(f'{mib:.1f} MiB' in o for o in notes), notes

def test_shown():
    assert repr(MemoryTeacher(2, .5)) == 'MemoryTeacher(2, interval=0.5)'
    assert repr(MemoryTeacher(copy_dtype=bf16)) == 'MemoryTeacher(3, copy_dtype=torch.bfloat16)'
    cb = MemoryReplay()
    assert (cb.teacher.n_copies, cb.alpha, cb.tau, cb.teacher.interval) == (3, .25, (3., 3.), None)
