"""`SelfGuidance` and `StochasticDepth` in training, against equations written by hand and against networks that saw full passes only"""
import copy, math, os, random, sys
from functools import lru_cache, partial
from itertools import product
from pathlib import Path

import numpy as np, pytest, torch, torch.nn.functional as F
import matplotlib
matplotlib.use('agg')
from fastai.basics import Callback, CrossEntropyLossFlat, DataLoader, DataLoaders, Learner, SGD, TensorImage, accuracy, load_learner
from fastai.callback.all import CutMix, GradientAccumulation, MixedPrecision, MixUp, ProgressCallback
from fastai.callback.schedule import *
from fastai.learner import CancelFitException
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import TensorDataset

sys.path.insert(0, str(Path(__file__).parent))
from test_survival import by_hand, close, lively, norms
from networks import CPUAutocast
from processes import together
from fastkdtf.vision.cifar_nets import BasicBlock, CifarResNet
from fastkdtf.vision.data import kd_dataloaders
from fastkdtf.callback.distill import KnowledgeDistillation, LsrKD, MemoryReplay, matched_controls
from fastkdtf.lab.compare import compare
from fastkdtf.callback.checkpoint import Checkpoint, seed_run
from fastkdtf.callback.selfguide import Draws, SelfGuidance, StochasticDepth
from fastkdtf.lab.interpret import TrainAccuracy, plot_errors, plot_subnetworks, subnetwork_outputs
from fastkdtf.callback.survival import fold, residual_blocks, subnetwork, survival, survival_probs

K,p_last = 10,.4
probs = [1 - l/3*(1-p_last) for l in (1,2,3)]

@pytest.fixture(autouse=True)
def in_tmp_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)

def three_blocks(): return CifarResNet(BasicBlock, 1, K, widths=(4,6,8), stem=4)

@lru_cache
def digits(bs=32, n=96): return kd_dataloaders('digits', bs=bs, train_subset=n, device='cpu')

def digits_learner(cbs=(), seed=0, lr=.05, model=None, dls=None, **kwargs):
    dls = dls or digits()
    seed_run(seed, dls)
    kwargs = dict(loss_func=CrossEntropyLossFlat(), opt_func=partial(SGD, mom=.9), metrics=accuracy) | kwargs
    learn = Learner(dls, three_blocks() if model is None else model, cbs=cbs, lr=lr, **kwargs)
    seed_run(seed+1, dls)
    return learn.remove_cb(ProgressCallback)

def trained(cbs=(), n_epoch=1, **kwargs):
    learn = digits_learner(cbs, **kwargs)
    learn.fit(n_epoch)
    return learn

def same(a, b):
    a,b = (o.model.state_dict() if isinstance(o, Learner) else o for o in (a, b))
    return all(torch.equal(a[k], b[k]) for k in a)

class FixedDraws(Draws):
    "Draws what it is told"
    masks = None
    def __call__(self, model): return [bool(int(o)) for o in self.masks]

class Told:
    "A callback whose draws are told by `masks`"
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.draws = FixedDraws(self.draws.p_last)
    @property
    def masks(self): return self.draws.masks
    @masks.setter
    def masks(self, bits): self.draws.masks = bits

class Fixed(Told, SelfGuidance): pass
class FixedDepth(Told, StochasticDepth): pass

class Masks(Callback):
    "Notes what was drawn"
    order = 7
    def __init__(self): self.seen = []
    def before_batch(self):
        if self.training: self.seen.append(next(o.bits for o in self.learn.cbs if isinstance(o, (SelfGuidance, StochasticDepth))))

class Stop(Callback):
    "Ends the training after the first backward and keeps its gradients"
    order = 50
    def __init__(self): self.loss,self.grads = None,None
    def after_backward(self):
        self.loss = self.learn.loss.item()
        self.grads = {k: None if p.grad is None else p.grad.clone() for k,p in self.learn.model.named_parameters()}
        self.pred = self.learn.pred.detach()
        raise CancelFitException()


# ---------------------------------------------------------------- equation 5

xb,yb = torch.randn(12,3,8,8, generator=torch.Generator().manual_seed(5)).double(),torch.arange(12)%K

def one_batch(cbs, model, x=xb, y=yb, loss_func=None):
    "The loss and gradients of one training step in float64"
    dls = DataLoaders(*[DataLoader(TensorDataset(x, y), bs=len(y))]*2)
    dls.c,stop = K,Stop()
    learn = Learner(dls, model, loss_func=loss_func or nn.CrossEntropyLoss(), opt_func=SGD, lr=0., cbs=[*cbs, stop]).remove_cb(ProgressCallback)
    with learn.no_logging(): learn.fit(1)
    return stop

def equation_5(z_sub, z_full, y, lam, tau, detach=True, full_backward=True):
    ce = lambda z: -z.log_softmax(1)[range(len(y)), y].mean()
    pt,ps = ((z/tau).softmax(1) for z in (z_full, z_sub))
    if detach: pt = pt.detach()
    loss = ce(z_sub) + lam*tau**2*(pt*(pt.log()-ps.log())).sum(1).mean()
    return loss + ce(z_full) if full_backward else loss

settings = [dict(lam=.25, tau=3.), dict(lam=0., tau=3.), dict(lam=1., tau=1.), dict(lam=.5, tau=2., detach=False), dict(lam=.25, tau=3., full_backward=False),
            dict(lam=0., tau=3., full_backward=False)]

@pytest.mark.parametrize('setting', settings, ids=str)
@pytest.mark.parametrize('bits', [''.join(o) for o in product('01', repeat=3)])
def test_equation_5(bits, setting):
    model = lively(three_blocks()).double()
    d = {k: v.clone().requires_grad_(v.is_floating_point() and 'running' not in k) for k,v in model.state_dict().items()}
    cb = Fixed(p_last=p_last, **setting)
    cb.masks = bits
    got = one_batch([cb], model)
    z_full = by_hand(d, xb, probs)
    want = equation_5(by_hand(d, xb, [int(o) for o in bits]), z_full, yb, **setting)
    want.backward()
    assert got.loss == pytest.approx(want.item(), rel=1e-10)
    close(got.pred, z_full.detach())
    for k,g in got.grads.items():
        assert g is not None, k   # nothing is unused
        close(g, torch.zeros_like(g) if d[k].grad is None else d[k].grad)

@pytest.mark.parametrize('bits', [''.join(o) for o in product('01', repeat=3)])
def test_stochastic_depth_by_hand(bits):
    model = lively(three_blocks()).double()
    d = {k: v.clone().requires_grad_(v.is_floating_point() and 'running' not in k) for k,v in model.state_dict().items()}
    cb = FixedDepth(p_last)
    cb.masks = bits
    got = one_batch([cb], model)
    want = F.cross_entropy(by_hand(d, xb, [int(o) for o in bits]), yb)
    want.backward()
    assert got.loss == pytest.approx(want.item(), rel=1e-10)
    for k,g in got.grads.items(): close(g, torch.zeros_like(g) if d[k].grad is None else d[k].grad)

def test_class_weights_and_sum_reduction():
    "Both cross-entropies are the learner's own; the divergence follows its reduction, and skips what it ignores"
    w,y = torch.rand(K).double()+.5,yb.clone()
    y[:3] = -100
    model = lively(three_blocks()).double()
    d,cb = {k: v.clone() for k,v in model.state_dict().items()},Fixed(p_last=p_last)
    cb.masks = '101'
    zs,zf = by_hand(d, xb, (1,0,1)),by_hand(d, xb, probs)
    kl = F.kl_div((zs/3).log_softmax(1), (zf/3).softmax(1), reduction='none').sum(1)[3:]
    for kw in (dict(), dict(reduction='sum')):
        got = one_batch([cb], copy.deepcopy(model), y=y, loss_func=nn.CrossEntropyLoss(weight=w, **kw))
        ce = partial(F.cross_entropy, target=y, weight=w, **kw)
        assert got.loss == pytest.approx((ce(zs)+ce(zf)+.25*9*(kl.sum() if kw else kl.mean())).item(), rel=1e-9)


# ---------------------------------------------------------------- statistics

class FullOnly(Callback):
    "The plain training of a network that carries survival probabilities"
    def before_fit(self): survival(self.learn.model)

@pytest.mark.parametrize('setting', [dict(), dict(full_backward=False)], ids=str)
def test_running_statistics_are_those_of_full_passes(setting):
    a,b = (trained(cb, lr=0., n_epoch=2) for cb in (SelfGuidance(**setting), FullOnly()))
    assert same(a, b) and a.model.bn1.num_batches_tracked == 6
    assert a.recorder.values[-1][1:3] == b.recorder.values[-1][1:3]   # validation: eq. 4's

def test_stochastic_depth_moves_the_statistics_of_what_it_computes():
    cb = FixedDepth()
    cb.masks = '101'
    learn = trained(cb, lr=0.)
    moved = {k: o.num_batches_tracked.item() for k,o in learn.model.named_modules() if isinstance(o, norms)}
    assert {k for k,v in moved.items() if not v} == {'stages.1.0.bn1', 'stages.1.0.bn2'} and set(moved.values()) == {0, 3}

def test_every_parameter_gets_a_gradient():
    cb = FixedDepth()
    cb.masks = '010'
    learn = digits_learner(cb)
    learn.fit(1)
    grads = {k: p.grad for k,p in learn.model.named_parameters()}
    assert all(g is not None for g in grads.values())


# ---------------------------------------------------------------- draws

METHODS = {'SG': SelfGuidance, 'SD': StochasticDepth}
each_method = pytest.mark.parametrize('method', METHODS)

def masks_of(cb, n_epoch=2, **kwargs):
    spy = Masks()
    trained([cb, spy], n_epoch, **kwargs)
    return spy.seen

@each_method
def test_same_seed_same_masks(method):
    make = METHODS[method]
    one = masks_of(make())
    assert one == masks_of(make()) and len(one) == 6
    assert one != masks_of(make(), seed=5)
    assert masks_of(make(seed=3)) == masks_of(make(seed=3), seed=5) != one

@each_method
def test_the_global_generator_is_untouched(method):
    "The same orders of samples and the same numbers afterwards as without the method"
    class After(Callback):
        def after_fit(self): self.learn.after = torch.rand(3), random.random(), np.random.rand()
    make = METHODS[method]
    def run(cb):
        ids = []
        class Note(Callback):
            def before_batch(self): ids.append(self.x.sum().item())
        learn = trained([*([cb] if cb else []), Note(), After()], 2)
        return ids, *learn.after
    a,b = run(None),run(make())
    assert a[0] == b[0] and torch.equal(a[1], b[1]) and a[2:] == b[2:]

@each_method
def test_each_fit_draws_anew(method):
    spy = Masks()
    learn = digits_learner([METHODS[method](seed=1), spy])
    learn.fit(1)
    learn.fit(1)
    assert spy.seen[:3] != spy.seen[3:]

def test_ranks_draw_their_own_masks(monkeypatch):
    one = masks_of(SelfGuidance(seed=1))
    monkeypatch.setattr('fastkdtf.callback.selfguide.rank_distrib', lambda: 1)
    assert masks_of(SelfGuidance(seed=1)) != one

@each_method
def test_frequencies(method):
    "100 batches of the three-block network; a binomial of 4.5 standard deviations"
    learn = digits_learner([METHODS[method](), spy := Masks()], dls=digits(8, 96))
    learn.fit(9)
    draws = torch.tensor(spy.seen).double().mean(0)
    for f,p in zip(draws, (5/6, 4/6, 3/6)): assert abs(f-p) < 4.5*math.sqrt(p*(1-p)/108)

class Interrupt(Callback):
    def after_epoch(self):
        if self.epoch == 1: raise KeyboardInterrupt

@each_method
def test_a_resumed_training_goes_on_with_the_same_masks(method):
    make,spy = METHODS[method],Masks()
    whole = digits_learner([make(), spy])
    whole.fit(3)
    first = digits_learner(make())
    with pytest.raises(KeyboardInterrupt): first.fit(3, cbs=[Checkpoint('run.pt'), Interrupt()])
    resumed,again = digits_learner([make(), rest := Masks()], seed=9),Checkpoint('run.pt')
    resumed.fit(3, cbs=again)
    assert rest.seen == spy.seen[-len(rest.seen):] and 0 < len(rest.seen) < 9
    assert same(whole, resumed) and whole.recorder.values[-1][:2] == resumed.recorder.values[-1][:2]


# ---------------------------------------------------------------- beside fastai's other callbacks

@pytest.mark.parametrize('make', [SelfGuidance, StochasticDepth, partial(SelfGuidance, full_backward=False)], ids=str)
def test_half_precision(make):
    cb,seen = make(),[]
    class Dtypes(Callback):
        order = 0
        def after_pred(self):
            if self.training: seen.append((getattr(cb, 'z', None), self.learn.pred.dtype))
        def after_loss(self): assert self.learn.loss_grad.dtype == torch.float32
    learn = trained([cb, CPUAutocast(), Dtypes()], 2)
    assert all(d == torch.bfloat16 and (z is None or z.dtype == torch.bfloat16) for z,d in seen) and len(seen) == 6
    full = trained(make(), 2)
    assert learn.recorder.values[-1][0] == pytest.approx(full.recorder.values[-1][0], rel=.03)
    assert all(p.isfinite().all() for p in learn.model.parameters())

@each_method
def test_gradient_accumulation(method):
    "Two batches of 16 make the step of their mean loss"
    x,y = torch.randn(32,3,8,8),torch.arange(32)%K
    make = dict(SG=Fixed, SD=FixedDepth)[method]
    def run(bs, cbs=()):
        cb,torch.manual_seed(3)
        dls = DataLoaders(DataLoader(TensorDataset(x, y), bs=bs), DataLoader(TensorDataset(x, y), bs=bs))
        dls.c = K
        learn = Learner(dls, three_blocks(), loss_func=CrossEntropyLossFlat(), opt_func=SGD, lr=.1, cbs=[cb, *cbs]).remove_cb(ProgressCallback)
        for m in learn.model.modules():   # the batch's statistics differ
            if isinstance(m, norms): m.momentum = 0.
        learn.add_cb(EvalNorms())
        with learn.no_logging(): learn.fit(1)
        return learn.model.state_dict()
    class EvalNorms(Callback):
        def before_train(self):
            for m in self.learn.model.modules():
                if isinstance(m, norms): m.eval()
    cb = make()
    cb.masks = '110'
    a,b = run(32),run(16, [GradientAccumulation(32)])
    for k in a: torch.testing.assert_close(a[k], b[k], rtol=1e-4, atol=1e-6)

@pytest.mark.parametrize('mix', [MixUp, CutMix])
def test_mixing(mix):
    "Both cross-entropies mix the two labels; the divergence asks for none"
    cb,got = Fixed(p_last=p_last),{}
    cb.masks = '101'
    class Note(Callback):
        order = 5.5
        def after_pred(self):
            if self.training: got.setdefault('z', (cb.batch.z.detach(), self.learn.pred.detach()))
        def after_loss(self):
            if not self.training or 'loss' in got: return
            m = next(o for o in self.learn.cbs if isinstance(o, mix))
            got.update(loss=self.learn.loss_grad.item(), y=self.learn.y, y1=m.yb1[0], lam=m.lam)
    trained([mix(.4), cb, Note()])
    zs,zf = (o.double() for o in got['z'])
    ce = lambda z: (got['lam']*F.cross_entropy(z, got['y'], reduction='none') + (1-got['lam'])*F.cross_entropy(z, got['y1'], reduction='none')).mean()
    kl = F.kl_div((zs/3).log_softmax(1), (zf/3).softmax(1), reduction='batchmean')
    assert got['loss'] == pytest.approx((ce(zs)+ce(zf)+.25*9*kl).item(), rel=1e-5)

def teacher(): return nn.Sequential(nn.Flatten(), nn.Linear(192, K))

partners = {'LsrKD': lambda: LsrKD(.3), 'KD': lambda: KnowledgeDistillation(teacher(), .6), 'MrKD': lambda: MemoryReplay(2, interval=1)}

@pytest.mark.parametrize('order', [0, 1])
@pytest.mark.parametrize('partner', partners)
def test_composition(partner, order):
    "The sum of the terms; the partner teaches the full network"
    losses,other = [],partners[partner]()
    class Note(Callback):
        order = 5.5
        def after_loss(self):
            if not self.training or losses: return
            sg = self.learn.self_guidance
            base,own,others = sg.siblings[0].base_mean.value,sg.soft_mean.value,other.soft_mean.value
            losses.append((self.learn.loss_grad.item(), (other.hard_weight(0)*base + own + other.soft_weight(K, 0)*others).item()))
    cbs = [SelfGuidance(), other]
    learn = trained([*(cbs[::-1] if order else cbs), Note()], 2)
    (got,want), = losses
    assert got == pytest.approx(want, rel=1e-5)
    assert 'divergence' in learn.recorder.metric_names

def test_memory_copies_are_the_full_network():
    class Look(Callback):
        order = 6
        def before_batch(self):
            if not self.training: return
            net = self.learn.memory_replay.teacher.copies[0]
            assert survival_probs(net.model) or net.folded
            if self.learn.train_iter == 4:   # just refreshed: interval of one epoch
                m = copy.deepcopy(self.learn.model).eval()
                with torch.no_grad(): torch.testing.assert_close(net(self.x), m(self.x), rtol=1e-3, atol=1e-3)
                self.learn.looked = True
    learn = trained([StochasticDepth(), MemoryReplay(1, interval_steps=1), Look()], 2)
    assert learn.looked

def test_full_backward_False_leaves_nothing_to_teach_the_full_network():
    with pytest.raises(ValueError, match='of the hard loss'): trained([SelfGuidance(full_backward=False), LsrKD()])


# ---------------------------------------------------------------- the learner

@each_method
def test_lr_find_then_fit(method):
    learn = digits_learner(METHODS[method](), dls=digits(8, 96))
    learn.lr_find(num_it=8, show_plot=False)
    learn.fit(1)
    assert learn.metrics.attrgot('name') == ['accuracy'] and survival_probs(learn.model)[-1] == .5

@each_method
def test_predictions_are_equation_4(method):
    learn = trained(METHODS[method](p_last=p_last))
    d = {k: v.double() for k,v in learn.model.state_dict().items()}
    x,y = (torch.cat(o) for o in zip(*learn.dls.valid))
    want = by_hand(d, x.as_subclass(torch.Tensor).double(), probs, training=False)
    preds,_,loss = learn.get_preds(with_loss=True)
    close(preds.double(), want.softmax(1), 1e-5)
    assert loss.mean().item() == pytest.approx(F.cross_entropy(want, y.as_subclass(torch.Tensor)).item(), rel=1e-4)
    assert learn.validate()[0] == pytest.approx(loss.mean().item(), rel=1e-4) and learn.metrics.attrgot('name') == ['accuracy']
    learn.export('model.pkl')
    loaded = load_learner('model.pkl')
    with torch.no_grad(): close(loaded.model.eval()(x.as_subclass(torch.Tensor)).double(), want, 1e-5)
    assert survival_probs(loaded.model) == pytest.approx(probs)
    with torch.no_grad(): close(fold(learn.model.eval())(x.as_subclass(torch.Tensor)).double(), want, 1e-5)
    plain = three_blocks()
    plain.load_state_dict(fold(learn.model).state_dict())
    with torch.no_grad(): close(plain.eval()(x.as_subclass(torch.Tensor)).double(), want, 1e-5)

@each_method
def test_validation_before_a_fit_leaves_the_model_alone(method):
    learn = digits_learner(METHODS[method]())
    learn.validate()
    learn.get_preds()
    assert not residual_blocks(learn.model)

@each_method
def test_an_error_in_the_model_leaves_no_sub_network_behind(method):
    class Break(Callback):
        order = 6
        def before_batch(self):
            if self.training and self.learn.train_iter == 1: self.learn.xb = (self.x[:, :2],)
    learn = digits_learner([METHODS[method](), Break()])
    with pytest.raises(RuntimeError): learn.fit(1)
    learn.remove_cb(Break)
    x,model = torch.randn(4,3,8,8),copy.deepcopy(learn.model)
    with torch.no_grad(): assert torch.equal(learn.model.eval()(x), model.eval()(x))
    assert all(m.track_running_stats for m in learn.model.modules() if isinstance(m, norms))
    learn.fit(1)

def test_images_that_are_tensor_subclasses():
    class Sub(Callback):
        order = -1
        def before_batch(self): self.learn.xb = (TensorImage(self.x),)
    assert same(trained([SelfGuidance(), Sub()]), trained(SelfGuidance()))

def test_columns():
    learn = trained(SelfGuidance(lam=.5, tau=2.))
    assert list(learn.recorder.metric_names) == ['epoch', 'train_loss', 'valid_loss', 'accuracy', 'base_loss', 'soft_loss', 'student_loss', 'divergence', 'time']
    base,soft,student,kl = learn.recorder.values[-1][3:]
    assert soft == pytest.approx(student+.5*4*kl, rel=1e-5)

def test_a_diverged_training_is_a_result():
    learn = trained(SelfGuidance(lam=3.), lr=1e8)
    assert len(learn.recorder.values) == 1

def test_describe():
    d = SelfGuidance().describe(100)
    assert (d.hard, d.soft, d.tau, d.scale) == (2., 2.25, 3., 2.75) and list(d.controls) == ['CE ×2.75']
    assert SelfGuidance(full_backward=False).describe(100).hard == 1 and 'only teaches' in str(SelfGuidance(full_backward=False).describe(100))
    assert (StochasticDepth().describe(100).hard, StochasticDepth().describe(100).soft) == (1., 0.)
    assert list(matched_controls(SelfGuidance(), 100)) == ['CE ×2.75', 'stochastic depth 0.5']
    learn = digits_learner(SelfGuidance())
    assert learn.self_guidance.describe().n_classes == K
    for o in METHODS.values():
        with pytest.raises(ValueError, match='n_classes'): o().describe()

def test_errors():
    for kw in (dict(lam=-1), dict(tau=0), dict(p_last=0), dict(p_last=2), dict(seed=-1)):
        with pytest.raises(ValueError, match=next(iter(kw))): SelfGuidance(**kw)
    with pytest.raises(TypeError, match='lam'): SelfGuidance(lam='1')
    with pytest.raises(ValueError, match='p_last'): StochasticDepth(0)
    with pytest.raises(ValueError, match='choose one'): SelfGuidance(detach=False, full_backward=False)
    with pytest.raises(ValueError, match='both drop'): trained([SelfGuidance(), StochasticDepth()])
    with pytest.raises(ValueError, match='both drop'): trained([SelfGuidance(), SelfGuidance(name='second')])
    with pytest.raises(ValueError, match='no residual blocks'): trained(SelfGuidance(), model=teacher())
    with pytest.raises(ValueError, match='compile fold'): trained(SelfGuidance(), model=torch.compile(three_blocks(), backend='eager'))

class Checkpointed(nn.Module):
    def __init__(self, reentrant):
        super().__init__()
        self.net,self.reentrant = three_blocks(),reentrant
    def forward(self, x): return checkpoint(self.net, x.detach().requires_grad_(), use_reentrant=self.reentrant)

@pytest.mark.parametrize('reentrant', [True, False])
@each_method
def test_activations_that_are_computed_again_are_refused(method, reentrant):
    "A backward pass knows nothing of the sub-network, so the gradients would be those of another one"
    with pytest.raises(ValueError, match='checkpoints activations'): trained(METHODS[method](), model=Checkpointed(reentrant))

@each_method
def test_synchronised_norms_are_refused(method, monkeypatch):
    "They would wait for a process that dropped their branch; one process alone may have them"
    model = nn.SyncBatchNorm.convert_sync_batchnorm(three_blocks())
    monkeypatch.setattr('fastkdtf.callback.selfguide.num_distrib', lambda: 2)
    with pytest.raises(ValueError, match='sync_bn=False'): trained(METHODS[method](), model=model)


# ---------------------------------------------------------------- two processes

class DataParallel(Callback):
    "What fastai's DistributedTrainer does, without a launcher"
    order,passes = 11,0
    def count(self, model, args): self.passes += model.training
    def before_fit(self):
        self.learn.model = nn.parallel.DistributedDataParallel(self.learn.model)
        self.learn.model.register_forward_pre_hook(self.count)
    def after_fit(self): self.learn.model = self.learn.model.module

makers = {'SG': SelfGuidance, 'SD': StochasticDepth, 'SG-no-full': partial(SelfGuidance, full_backward=False)}
images = torch.randn(2,3,8,3,8,8, generator=torch.Generator().manual_seed(1)),torch.arange(48).view(2,3,8)%K   # rank, batch, sample

def worker(rank, port, path):
    os.environ.update(MASTER_ADDR='127.0.0.1', MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE='2')
    torch.set_num_threads(1)
    torch.distributed.init_process_group('gloo', rank=rank, world_size=2)
    x,y = (o[rank].flatten(0, 1) for o in images)
    for name,make in makers.items():
        dls = DataLoaders(*[DataLoader(TensorDataset(x, y), bs=8)]*2, device='cpu')
        dls.c,spy,grads = K,Masks(),[]
        class Grads(Callback):
            order = 12
            def after_backward(self): grads.append({k: p.grad.clone() for k,p in self.learn.model.module.named_parameters()})
        torch.manual_seed(0)
        learn = Learner(dls, three_blocks(), loss_func=CrossEntropyLossFlat(), opt_func=SGD, lr=.05, cbs=[make(seed=1), spy, parallel := DataParallel(), Grads()])
        learn.remove_cb(ProgressCallback)
        with learn.no_logging(): learn.fit(2)
        assert parallel.passes == 6   # the sub-network's pass goes around the wrapper
        torch.save((spy.seen, learn.model.state_dict(), grads), path/f'{name}-{rank}.pt')
    torch.distributed.destroy_process_group()

@pytest.fixture(scope='module')
def two_processes(tmp_path_factory):
    path = tmp_path_factory.mktemp('gloo')
    together(worker, path)
    return path

@pytest.mark.parametrize('name', makers)
def test_two_processes(name, two_processes):
    "No parameter is unused, ranks draw their own masks, gradients are the mean of both ranks', and weights stay equal"
    (masks0,w0,g0),(masks1,w1,g1) = (torch.load(two_processes/f'{name}-{i}.pt') for i in (0,1))
    assert masks0 != masks1 and len(masks0) == len(masks1) == 6
    for k in w0:
        if 'running' not in k and 'num_batches' not in k: assert torch.equal(w0[k], w1[k]), k
    for a,b in zip(g0, g1): assert all(torch.equal(a[k], b[k]) for k in a)
    torch.manual_seed(0)
    model,total = survival(three_blocks()).train(),0.
    for x,y,mask in zip(*(o[:,0] for o in images), (masks0[0], masks1[0])):   # the first step, by hand
        with subnetwork(model, mask): zs = model(x)
        if name == 'SD': total = total + F.cross_entropy(zs, y)/2
        else: total = total + equation_5(zs, model(x), y, .25, 3., full_backward=name == 'SG')/2
    total.backward()
    for k,p in model.named_parameters(): torch.testing.assert_close(g0[0][k], torch.zeros_like(p) if p.grad is None else p.grad, rtol=1e-4, atol=1e-5)


# ---------------------------------------------------------------- looking

def test_subnetwork_outputs():
    model = survival(lively(three_blocks()).double(), p_last).train()
    model.bn1.eval()
    d = {k: v.clone() for k,v in model.state_dict().items()}
    for bits,factors in (('101', (1,0,1)), ([0,0,0], (0,0,0)), (None, probs)):
        z,f = subnetwork_outputs(model, bits, xb)
        close(z, by_hand(d, xb, factors, training=False))
        close(model.fc(f), z)
        assert not z.requires_grad and f.shape == (12, 8)
    assert model.training and not model.bn1.training and same(model.state_dict(), d) and not model.fc._forward_pre_hooks
    with pytest.raises(ValueError, match='linear layer'): subnetwork_outputs(survival(BasicBlock(3,3)), '1', xb.float())

def test_plots():
    model = survival(three_blocks())
    axs = plot_subnetworks(model, torch.randn(40,3,8,8), torch.arange(40)%K, {'A': '110', 'B': '101'})
    assert [o.get_title() for o in axs] == ['full network', 'A', 'B'] and all(len(o.collections[0].get_offsets()) == 40 for o in axs)
    learn = digits_learner([SelfGuidance(), TrainAccuracy()])
    seen = []
    class Note(Callback):
        def after_loss(self):
            if self.training and self.epoch == 1: seen.append((self.learn.pred.argmax(1) == self.learn.y).float().mean().item())
    learn.fit(2, cbs=Note())
    ax = plot_errors({'SG': learn, 'record': dict(accuracy=[.5, .75])})
    lines = {o.get_label(): o for o in ax.lines}
    assert list(lines['record'].get_ydata()) == [50., 25.] and len(ax.lines) == 3
    record = dict(zip(list(learn.recorder.metric_names)[1:], learn.recorder.values[-1]))
    assert lines['SG'].get_ydata()[-1] == pytest.approx(100*(1-record['accuracy'])) and record['train_accuracy'] == pytest.approx(np.mean(seen))
    assert ax.lines[1].get_ydata()[-1] == pytest.approx(100*(1-np.mean(seen)), abs=1e-4) and learn.metrics.attrgot('name') == ['accuracy']
    learn.validate()
    assert learn.metrics.attrgot('name') == ['accuracy']
    with pytest.raises(ValueError, match='accuracy'): plot_errors({'x': dict(valid_loss=[1.])})

def test_measured_description():
    learn = digits_learner(SelfGuidance())
    before = {k: v.clone() for k,v in learn.model.state_dict().items()}
    row = learn.describe_kd(2).loc['self_guidance']
    assert row['soft/hard gradient'] > 0 and -1 <= row['cosine'] <= 1 and same(learn.model.state_dict(), before)

def test_compare(tmp_path):
    methods = {'SG': lambda: [SelfGuidance(), TrainAccuracy()], 'SD': StochasticDepth}
    got = compare(methods, digits(), three_blocks, 1, seeds=2, controls=False, out=tmp_path/'runs')
    assert {r['method'] for r in got.records} == {'baseline', 'SG', 'SD'}
    ax = plot_errors({f"{r['method']} {r['seed']}": r['history'] for r in got.records})
    assert len(ax.lines) == 6+2
