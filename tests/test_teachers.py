"""Networks as teachers: `KDLoss`, `KnowledgeDistillation`, `NetworkTeacher`, `EnsembleTeacher`.

Numbers come from `reference.py` (float64 NumPy) or from plain PyTorch loops that know nothing of the package.
"""
import copy, pickle, random, sys, types
from functools import lru_cache, partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np, pytest, timm, torch, torch.nn.functional as F
import matplotlib
matplotlib.use('agg')
from fastai.basics import Callback, CrossEntropyLossFlat, DataLoaders, Learner, SGD, TensorImage, load_learner
from fastai.callback.all import CutMix, GradientAccumulation, MixedPrecision, MixUp, ProgressCallback, SchedLin
from fastai.data.core import Datasets, TfmdDL
from fastai.data.transforms import Categorize, Normalize
from fastai.losses import LabelSmoothingCrossEntropyFlat
from fastai.vision import learner as _   # registers how images' results are shown
from hypothesis import given, settings, strategies as st
from sklearn.datasets import load_digits
from torch import nn

sys.path.insert(0, str(Path(__file__).parent))
import reference as ref
from networks import CPUAutocast, Centred
from fastkdtf.core import Step
from fastkdtf.callback.distill import Distill, KnowledgeDistillation
from fastkdtf.losses import KDLoss
from fastkdtf.vision.models import create_model
from fastkdtf.callback.checkpoint import Checkpoint, seed_run
from fastkdtf.teachers.base import UniformTeacher
from fastkdtf.teachers.network import EnsembleTeacher, NetworkTeacher, as_teacher, class_names, class_order, input_stats, renormalise

K = 10
f16,bf16,f32,f64 = torch.float16,torch.bfloat16,torch.float32,torch.float64


@pytest.fixture(autouse=True)
def in_tmp_path(tmp_path, monkeypatch):
    "Learners save below the working directory"
    monkeypatch.chdir(tmp_path)

def logits(*shape, spread=3., seed=0, dtype=f64):
    return (spread*torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=f64)).to(dtype)

def labels(n_classes, *shape, seed=1): return torch.randint(n_classes, shape, generator=torch.Generator().manual_seed(seed))

def soft_labels(*shape, axis=1, seed=2, dtype=f64):
    "Label distributions in which one class has no share"
    q = logits(*shape, seed=seed).softmax(axis)
    q.select(axis, 0).zero_()
    return (q/q.sum(axis, keepdim=True)).to(dtype)


# ---------------------------------------------------------------- KDLoss

TOL = {f64: 1e-10, f32: 1e-5}
SETTINGS = [dict(scale=1), dict(scale='tau'), dict(scale='tau2'), dict(scale=2.5), dict(scale=0.), dict(variant='official'),
            dict(variant='official', multiplier=100.), dict(variant='official', scale=1), dict(variant='official', scale='tau', multiplier=50.)]
name_of = lambda o: '-'.join(f'{k}={v}' for k,v in o.items()) or 'default'
each_setting = pytest.mark.parametrize('setting', SETTINGS, ids=name_of)

def value_and_grad(loss, z, *args):
    z = z.detach().requires_grad_()
    out = loss(z, *args)
    return out.detach(), torch.autograd.grad(out.sum(), z)[0]

def check_kd(z, y, zt, several=False, tol=None, **setting):
    "Value within `tol·max(1,|L|)`, gradient within `tol` of the size of what is subtracted, at the inputs as represented"
    tol = tol or TOL.get(z.dtype, 1e-5)
    out,grad = value_and_grad(KDLoss(**setting), z, y, zt)
    as_np = lambda t: t.double().numpy() if t.is_floating_point() else t.numpy()
    want,want_grad,size = ref.kd(as_np(z), as_np(y), [as_np(o) for o in zt] if several else [as_np(zt)], **setting)
    assert out.dtype == (f64 if z.dtype == f64 else f32) and grad.dtype == z.dtype and out.shape == np.shape(want)
    err = (np.abs(as_np(out) - want)/np.maximum(1, np.abs(want))).max()
    assert err <= tol, f'value off by {err:.2g} of max(1,|L|)'
    gtol = max(tol, torch.finfo(z.dtype).eps)
    over = ((np.abs(as_np(grad) - want_grad) - torch.finfo(z.dtype).smallest_normal - 1e-3*gtol*np.abs(size).max())/(size+1e-300)).max()
    assert over <= gtol, f'gradient off by {over:.2g} of its size'
    return out,grad

@pytest.mark.parametrize('dtype', [f64, f32, f16, bf16], ids=str)
@pytest.mark.parametrize('tau', [.5, 1., 4., 20.])
@each_setting
def test_KDLoss_values_and_gradients(setting, tau, dtype):
    for k in (2, 10, 100):
        z,zt,y = logits(16, k, dtype=dtype),logits(16, k, seed=5, dtype=dtype),labels(k, 16)
        for alpha in (.1, .9): check_kd(z, y, zt, alpha=alpha, tau=tau, **setting)

@pytest.mark.parametrize('dtype', [f64, f32], ids=str)
@pytest.mark.parametrize('alpha', [0, 0., 1, 1., .3])
@each_setting
def test_KDLoss_ends_of_alpha(setting, alpha, dtype):
    if alpha == 1 and setting.get('scale') == 0: return   # nothing is left
    z,zt,y = logits(8, K, dtype=dtype),logits(8, K, seed=5, dtype=dtype),labels(K, 8)
    out,grad = check_kd(z, y, zt, alpha=alpha, **setting)
    if alpha == 0:
        plain = value_and_grad(F.cross_entropy, z, y)
        torch.testing.assert_close((out, grad), plain, rtol=1e-6, atol=1e-7)

@pytest.mark.parametrize('reduction', ['mean', 'sum', 'none'])
@pytest.mark.parametrize('shape,axis', [((7, 5), 1), ((7, 5), -1), ((3, 5, 4), 1), ((3, 4, 5), 2), ((3, 4, 5), -1), ((2, 5, 3, 4), 1), ((2, 3, 4, 5), -1),
                                        ((2, 3, 5, 4), 2)], ids=str)
@pytest.mark.parametrize('kind', ['integer', 'ignore', 'soft'])
@pytest.mark.parametrize('n', [None, 1, 3], ids=['one', 'n=1', 'n=3'])
def test_KDLoss_dense_several_teachers_and_reductions(shape, axis, reduction, kind, n):
    positions = [o for i,o in enumerate(shape) if i != axis % len(shape)]
    y = soft_labels(*shape, axis=axis) if kind == 'soft' else labels(5, *positions)
    if kind == 'ignore': y.view(-1)[::3] = 2
    zt = logits(*([] if n is None else [n]), *shape, seed=5)
    for dtype in (f64, f32):
        if kind == 'soft': y = y.to(dtype)
        for setting in (dict(alpha=.3), dict(alpha=1.), dict(alpha=.6, variant='official', multiplier=5.)):
            extra = dict(ignore_index=2) if kind == 'ignore' else {}
            check_kd(logits(*shape, dtype=dtype), y, zt.to(dtype), n is not None, axis=axis, reduction=reduction, **setting, **extra)

def test_KDLoss_labels_with_an_axis_of_one_and_other_integer_types():
    z,zt,y = logits(8, K),logits(8, K, seed=5),labels(K, 8)
    want = KDLoss()(z, y, zt)
    for o in (y[:,None], y.int(), y.to(torch.uint8)): assert KDLoss()(z, o, zt) == want

@each_setting
def test_KDLoss_huge_logits(setting):
    for dtype in (f64, f32):
        z,zt,y = torch.zeros(6, K, dtype=dtype),torch.zeros(6, K, dtype=dtype),labels(K, 6)
        for i in range(6): z[i, i],z[i, i+1],zt[i, i+2],zt[i, i] = 1e4, -1e4, 1e4, 1e4*(i % 2)
        for alpha in (.1, 1. if setting.get('scale') != 0 else .5):
            out,grad = check_kd(z, y, zt, alpha=alpha, **setting)
            assert out.isfinite() and grad.isfinite().all()

@pytest.mark.parametrize('dtype', [f64, f32], ids=str)
def test_KDLoss_does_not_see_a_common_offset(dtype):
    z,zt,y = (64*logits(16, K)).round().to(dtype)/64,(64*logits(16, K, seed=5)).round().to(dtype)/64,labels(K, 16)   # which 1e4 does not round
    want = value_and_grad(KDLoss(), z, y, zt)
    for a,b in ((1e4, 0), (0, 1e4), (-1e4, 1e4)): assert all(map(torch.equal, value_and_grad(KDLoss(), z+a, y, zt+b), want)), (a, b)

def test_KDLoss_masked_classes_in_the_teacher():
    "A logit of -inf is a probability of 0, which contributes 0"
    z,zt,y = logits(8, K),logits(8, K, seed=5),labels(K, 8)
    low = zt.clone()
    zt[:, 3],low[:, 3] = -torch.inf,-1e9
    torch.testing.assert_close(value_and_grad(KDLoss(), z, y, zt), value_and_grad(KDLoss(), z, y, low), rtol=1e-12, atol=1e-12)

@each_setting
@pytest.mark.parametrize('kind', ['integer', 'soft', 'dense', 'several'])
def test_KDLoss_gradcheck(setting, kind):
    shape = (3, 4, 2) if kind == 'dense' else (3, 4)
    y = soft_labels(*shape) if kind == 'soft' else labels(4, *shape[:1], *shape[2:])
    zt,z = logits(*([3] if kind == 'several' else []), *shape, seed=5),logits(*shape).requires_grad_()
    for reduction in ('mean', 'none'): assert torch.autograd.gradcheck(partial(lambda f, o: f(o, y, zt), KDLoss(.4, 2., reduction=reduction, **setting)), (z,))

@settings(derandomize=True, max_examples=60, deadline=None)
@given(alpha=st.floats(0., 1.), tau=st.floats(.3, 40.), setting=st.sampled_from(SETTINGS), k=st.integers(2, 60), n=st.integers(1, 6), copies=st.integers(1, 3),
       spread=st.sampled_from([0., .1, 3., 30.]), seed=st.integers(0, 99))
def test_property_KDLoss_is_the_equation(alpha, tau, setting, k, n, copies, spread, seed):
    if alpha == 1 and setting.get('scale') == 0: return
    z,zt,y = logits(n, k, seed=seed, spread=spread),logits(copies, n, k, seed=seed+1, spread=spread),labels(k, n, seed=seed)
    check_kd(z, y, zt, True, alpha=alpha, tau=tau, **setting)
    out,_ = value_and_grad(KDLoss(1., tau, reduction='none'), z, y, zt)
    assert (out >= -1e-9*tau**2).all(), 'a divergence is not negative'
    order = torch.randperm(k, generator=torch.Generator().manual_seed(seed))
    value = KDLoss(alpha, tau, **setting)(z, y, zt)
    torch.testing.assert_close(KDLoss(alpha, tau, **setting)(z[:, order], order.argsort()[y], zt[..., order]), value, rtol=1e-9, atol=1e-9)

def test_no_gradient_reaches_teacher_pred():
    zt,z = logits(8, K, seed=5).requires_grad_(),logits(8, K).requires_grad_()
    for o in (zt, zt*1., torch.stack([zt, 2*zt])): KDLoss()(z, labels(K, 8), o).backward()
    assert zt.grad is None and z.grad is not None

def test_KDLoss_takes_inference_tensors_and_integers_are_refused_as_logits():
    z,y = logits(8, K).requires_grad_(),labels(K, 8)
    with torch.inference_mode(): zt = logits(8, K, seed=5)*1
    KDLoss()(z, y, zt).backward()
    assert torch.allclose(z.grad, value_and_grad(KDLoss(), z, y, zt.clone())[1])

def test_KDLoss_mixed_types_and_autocast():
    z,zt,y = logits(8, K, dtype=f32),logits(8, K, seed=5),labels(K, 8)
    out,grad = value_and_grad(KDLoss(), z, y, zt)
    value,want,_ = ref.kd(z, y, [zt])
    assert out.item() == pytest.approx(value, rel=1e-5) and np.allclose(grad, want, atol=1e-6)
    assert out.dtype == f32, "the teacher's type does not decide on the loss's"
    plain = value_and_grad(KDLoss(), z, y, zt.float())
    with torch.autocast('cpu', dtype=bf16): torch.testing.assert_close(value_and_grad(KDLoss(), z, y, zt.float()), plain, rtol=0, atol=0)

def test_any_function_may_return_float64_logits():
    zt = logits(8, K, seed=5)
    got = one_step(KnowledgeDistillation(lambda step: zt, .5), z := logits(8, K, dtype=f32), y := labels(K, 8))
    assert got.loss.item() == pytest.approx(ref.kd(z, y, [zt], .5)[0], rel=1e-5) and got.loss.dtype == f32

@each_setting
def test_identity_a_teacher_that_agrees_has_no_soft_gradient(setting):
    z,y = logits(16, K),labels(K, 16)
    out,grad = value_and_grad(KDLoss(.7, **setting), z, y, z.clone())
    hard,hard_grad = value_and_grad(F.cross_entropy, z, y)
    torch.testing.assert_close((out, grad), (.3*hard, .3*hard_grad), rtol=1e-9, atol=1e-12)

@pytest.mark.parametrize('tau', [1., 4., 20.])
def test_identity_mean_reduced_times_K_is_batchmean(tau):
    z,zt,y = logits(16, 100),logits(16, 100, seed=5),labels(100, 16)
    official,paper = KDLoss(1., tau, variant='official', multiplier=100.),KDLoss(1., tau)
    torch.testing.assert_close(official(z, y, zt), paper(z, y, zt), rtol=1e-12, atol=0)
    batchmean = nn.KLDivLoss(reduction='batchmean')(F.log_softmax(z/tau, 1), F.softmax(zt/tau, 1))
    torch.testing.assert_close(paper(z, y, zt), tau**2*batchmean, rtol=1e-10, atol=0)
    torch.testing.assert_close(KDLoss(1., tau, scale=1)(z, y, zt), batchmean, rtol=1e-10, atol=0)

@pytest.mark.filterwarnings('ignore:reduction:UserWarning')
@pytest.mark.parametrize('alpha,tau', [(.95, 20.), (.6, 20.), (.9, 6.)])
@pytest.mark.parametrize('multiplier', [1., 50.])
def test_identity_official_is_the_authors_loss_kd(alpha, tau, multiplier):
    "`nn.KLDivLoss()` as they call it: the mean over samples and classes, times `T·T·multiplier`"
    def loss_kd(z, y, zt):
        soft = nn.KLDivLoss()(F.log_softmax(z/tau, 1), F.softmax(zt/tau, 1))*(tau*tau*multiplier)
        return (1-alpha)*F.cross_entropy(z, y) + alpha*soft
    z,zt,y = logits(16, 100),logits(16, 100, seed=5),labels(100, 16)
    torch.testing.assert_close(value_and_grad(KDLoss(alpha, tau, variant='official', multiplier=multiplier), z, y, zt), value_and_grad(loss_kd, z, y, zt),
                               rtol=1e-10, atol=1e-14)

@pytest.mark.parametrize('alpha', [.1, .5, 1.])
def test_identity_uniform_teacher_at_tau_1_is_label_smoothing(alpha):
    z,y = logits(16, K),labels(K, 16)
    for zt in (torch.zeros(16, K, dtype=f64), torch.full((16, K), 7., dtype=f64)):
        out,grad = value_and_grad(KDLoss(alpha, 1.), z, y, zt)
        smooth,smooth_grad = value_and_grad(partial(F.cross_entropy, label_smoothing=alpha), z, y)
        torch.testing.assert_close(grad, smooth_grad, rtol=1e-10, atol=1e-14)
        torch.testing.assert_close(out, smooth - alpha*np.log(K), rtol=1e-10, atol=1e-12)

def test_KDLoss_defaults_are_the_fields():
    z,zt,y = logits(16, K),logits(16, K, seed=5),labels(K, 16)
    assert KDLoss()(z, y, zt) == KDLoss(alpha=.9, tau=4., scale='tau2', variant='paper', multiplier=1., axis=1, reduction='mean')(z, y, zt)
    assert copy.deepcopy(KDLoss(.3))(z, y, zt) == pickle.loads(pickle.dumps(KDLoss(.3)))(z, y, zt) == KDLoss(.3)(z, y, zt)
    assert torch.equal(KDLoss().decodes(z), z.argmax(1)) and torch.allclose(KDLoss().activation(z), z.softmax(1))

def test_KDLoss_has_no_weight_for_ignored_positions_only():
    z,zt,y = logits(8, K),logits(8, K, seed=5),labels(K, 8)
    y[2] = -100
    out,grad = value_and_grad(KDLoss(.5, reduction='none'), z, y, zt)
    assert out[2] == 0 and not grad[2].any() and (out[[0, 1, 3, 4, 5, 6, 7]] != 0).all()
    keep = y != -100
    torch.testing.assert_close(KDLoss(.5)(z, y, zt), KDLoss(.5)(z[keep], y[keep], zt[keep]))

@pytest.mark.parametrize('args,error,word', [
    (dict(alpha=-.1), ValueError, 'alpha'), (dict(alpha=1.1), ValueError, 'alpha'), (dict(alpha='x'), TypeError, 'alpha'),
    (dict(alpha=float('nan')), ValueError, 'alpha'),
    (dict(tau=0.), ValueError, 'tau'), (dict(tau=-1.), ValueError, 'tau'), (dict(tau=float('inf')), ValueError, 'tau'),
    (dict(scale='tau3'), ValueError, 'scale'), (dict(scale=-1), ValueError, 'scale'), (dict(variant='repo'), ValueError, 'variant'),
    (dict(multiplier=2.), ValueError, 'multiplier'),
    (dict(variant='official', multiplier=0.), ValueError, 'multiplier'), (dict(reduction='batchmean'), ValueError, 'reduction')], ids=str)
def test_KDLoss_bad_arguments(args, error, word):
    with pytest.raises(error, match=word): KDLoss(**args)

@pytest.mark.parametrize('zt', [logits(8, 9), logits(7, K), logits(8), logits(2, 8, 9), logits(2, 2, 8, K), None, [[1.]*K]*8, logits(8, K).long()],
                         ids=['width', 'batch', 'vector', 'n-width', 'ndim', 'None', 'list', 'integers'])
def test_KDLoss_bad_teacher_logits(zt):
    with pytest.raises((ValueError, TypeError), match='teacher'): KDLoss()(logits(8, K), labels(K, 8), zt)


# ---------------------------------------------------------------- networks and data

DIGITS = load_digits()

class get_image:
    "Image `i` as `[3,8,8]` between 0 and 1"
    def __call__(self, i): return TensorImage(torch.tensor(DIGITS.images[i]/16, dtype=f32).expand(3, 8, 8).clone())

class get_label:
    def __call__(self, i): return str(DIGITS.target[i])

@lru_cache
def dls_of(classes='0123456789', norm=((.3, .3, .3), (.4, .4, .4)), n=96, bs=32, named=True, shuffle=True):
    "Loaders of `n` training images of these digits, outputs in this order; with (mean, std) or None"
    items = [i for i in range(len(DIGITS.target)) if str(DIGITS.target[i]) in classes]
    dsets = [Datasets(o, [[get_image()], [get_label(), Categorize(vocab=list(classes), sort=False)]]) for o in (items[:n], items[n:n+32])]
    after = [Normalize.from_stats(*norm, cuda=False)] if norm else []
    train = TfmdDL(dsets[0], bs=bs, shuffle=shuffle, drop_last=True, num_workers=0, device='cpu', after_batch=after)
    dls = DataLoaders(train, train.new(dsets[1], shuffle=False, drop_last=False), device='cpu')
    assert list(dls.vocab) == list(classes)
    return dls

def randomise_bn(model, seed=0):
    "Running statistics and affine parts as if it had been trained"
    gen = torch.Generator().manual_seed(seed)
    for m in model.modules():
        if not isinstance(m, nn.modules.batchnorm._BatchNorm): continue
        for o,low in ((m.running_mean, -.5), (m.running_var, .5), (m.weight.data, .5), (m.bias.data, -.5)): o.copy_(low + torch.rand(o.shape, generator=gen))
    return model

def conv_net(k=K, width=4, dropout=.2):
    return nn.Sequential(nn.Conv2d(3, width, 3, 2, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU(), nn.Dropout(dropout), nn.Flatten(), nn.Linear(16*width, k))

def bn_net(): return conv_net(dropout=0.)

def plain_net(k=K): return nn.Sequential(nn.Flatten(), nn.Linear(192, 12), nn.Tanh(), nn.Linear(12, k))

def network(k=K, seed=7, width=6, sharp=3.):
    "A teacher: batch norm with statistics of its own and dropout, in training mode, as one forgets it"
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        net = randomise_bn(conv_net(k, width, .5))
    net[-1].weight.data.mul_(sharp)
    return net.train()

def says(net, x):
    "The network's logits in evaluation mode"
    with torch.no_grad(): return copy.deepcopy(net).eval()(x.as_subclass(torch.Tensor))

class Recording(nn.Module):
    "Keeps what it was given and how; a class attribute, since copies of it are made"
    log = []
    def __init__(self, net=None):
        super().__init__()
        self.net = net or network()
    def forward(self, x):
        out = self.net(x)
        self.log.append(SimpleNamespace(x=x.detach().clone(), out=out.detach().clone(), training=self.training or self.net.training,
                                        type=type(x), grad=torch.is_grad_enabled()))
        return out

@pytest.fixture
def recording():
    Recording.log = []
    return Recording()

plainly = partial(NetworkTeacher, fast=False)   # nothing that could call the network once more, or not its `forward`

def learner(cbs=(), model_fn=conv_net, seed=0, dls=None, **kwargs):
    dls = dls or dls_of()
    seed_run(seed, dls)
    learn = Learner(dls, model_fn(), cbs=cbs, **{'loss_func': CrossEntropyLossFlat(), 'opt_func': partial(SGD, mom=.9), 'lr': .05, 'path': '.', **kwargs})
    seed_run(seed+1, dls)
    return learn.remove_cb(ProgressCallback)

def trained(cbs=(), n_epoch=2, fit_cbs=(), **kwargs):
    learn = learner(cbs, **kwargs)
    learn.fit(n_epoch, cbs=fit_cbs)
    return learn

def weights(o): return {k: v.detach().clone() for k,v in getattr(o, 'model', o).state_dict().items()}

def same(a, b):
    a,b = weights(a),weights(b)
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)

def assert_close(a, b, atol=1e-5):
    a,b = weights(a),weights(b)
    for k in a: torch.testing.assert_close(a[k], b[k], atol=atol, rtol=1e-5, msg=lambda m: f'{k}: {m}')

class Spy(Callback):
    "The batches of a training as the student saw them"
    order,run_valid = 5.5,False
    def before_fit(self): self.steps = []
    def after_loss(self):
        mix = getattr(self.learn.loss_func, '__self__', None)
        lam = getattr(mix, 'lam', None)
        kept = lambda t: t.detach().as_subclass(torch.Tensor).clone()
        self.steps.append(SimpleNamespace(
            x=kept(self.learn.xb[0]), y=kept(self.learn.y), lam=copy.copy(lam), y1=None if mix is None else kept(mix.yb1[0]),
            pct=self.learn.pct_train, loss=kept(self.learn.loss_grad), pred=kept(self.learn.pred)))

class At(Callback):
    "Do something the `at`-th time that `event` happens in training"
    order = 2000
    def __init__(self, event, do, at=1): self.event,self.do,self.at,self.seen = event,do,at,0
    def __call__(self, event_name):
        if event_name != self.event or (event_name.endswith('batch') and not self.training): return
        self.seen += 1
        if self.seen == self.at: self.do()

def throw(error):
    def f(): raise error
    return f

def replay(model, spy, loss, n=None, lr=.05, mom=.9):
    "Plain PyTorch: `loss(z, step)` over the batches of a spied training"
    opt = torch.optim.SGD(model.parameters(), lr=lr, momentum=mom)
    model.train()
    for o in spy.steps[:n]:
        opt.zero_grad()
        loss(model(o.x), o).backward()
        opt.step()
    return model

def hand_kd(net, alpha=.9, tau=4., hard=F.cross_entropy):
    "Hinton et al., as one writes it by hand"
    def f(z, o):
        soft = F.kl_div(F.log_softmax(z/tau, 1), F.softmax(says(net, o.x)/tau, 1), reduction='batchmean')
        return (1-alpha)*hard(z, o.y) + alpha*tau**2*soft
    return f

def mixed(z, o, loss=partial(F.cross_entropy, reduction='none')): return (o.lam*loss(z, o.y) + (1-o.lam)*loss(z, o.y1)).mean()

def state_of(model):
    "Whatever a fit could change in a module"
    hooks = '_forward_hooks', '_forward_pre_hooks', '_backward_hooks', '_state_dict_hooks', '_backward_pre_hooks'
    return SimpleNamespace(
        state={k: v.detach().clone() for k,v in model.state_dict().items()}, ids=[id(p) for p in [*model.parameters(), *model.buffers()]],
        about=[(nm, m.training, type(m), sorted(vars(m)), [list(getattr(m, h)) for h in hooks]) for nm,m in model.named_modules()],
        params=[(nm, p.requires_grad, p.dtype, p.device, p.grad is None, p.is_leaf, p.stride(), p._version, p.data_ptr()) for nm,p in model.named_parameters()],
        buffers=[(nm, p.dtype, p.device, p._version, p.data_ptr()) for nm,p in model.named_buffers()])

def assert_untouched(model, before):
    now = state_of(model)
    assert now.state.keys() == before.state.keys()
    for k in now.state: assert torch.equal(now.state[k], before.state[k]), k
    for o in ('ids', 'about', 'params', 'buffers'): assert getattr(now, o) == getattr(before, o), o

def logits_of(teacher, learn, x=None, tau=4.):
    "What a teacher says to a learner's first batch"
    teacher.attach(learn)
    if x is None:
        b = next(iter(learn.dls.valid))
        x = b[0]
    x = x.as_subclass(torch.Tensor)
    with torch.no_grad(): out = teacher(Step(torch.zeros(len(x), dtype=torch.long), None, (x,), tau=(tau, tau)))
    teacher.detach()
    return x, out.clone()

def close(a, b, rtol=1e-4): torch.testing.assert_close(a, b, rtol=rtol, atol=rtol*b.abs().max().item())


# ---------------------------------------------------------------- one step and whole trainings

def rng_state(): return torch.get_rng_state(),random.getstate(),np.random.get_state()[1].tolist()

def same_rng(before):
    now = rng_state()
    assert torch.equal(before[0], now[0]) and before[1:] == now[1:], 'random numbers were drawn'

class Logits(nn.Module):
    "A student whose only parameter are its logits"
    def __init__(self, z):
        super().__init__()
        self.z = nn.Parameter(z.clone())
    def forward(self, x): return self.z[:len(x)]

class Says(nn.Module):
    "A teacher that always says the same; `wrap` is how"
    def __init__(self, z, wrap=lambda z: z):
        super().__init__()
        self.register_buffer('z', z.clone())
        self.wrap = wrap
    def forward(self, x): return self.wrap(self.z)

def one_step(cb, z, y, loss_func=None):
    "Loss and its gradient with respect to the student's logits"
    dls = DataLoaders([(torch.zeros(len(z), 1, 4, 4), y)], [(torch.zeros(len(z), 1, 4, 4), y)])
    seen = SimpleNamespace()
    class Grad(Callback):
        order = 5.5
        def after_loss(self):
            if self.training: seen.loss = self.learn.loss_grad.detach().clone()
        def before_step(self): seen.grad = self.learn.model.z.grad.clone()
    learn = Learner(dls, Logits(z), loss_func=loss_func or CrossEntropyLossFlat(), opt_func=SGD, lr=0., cbs=[cb, Grad()], path='.').remove_cb(ProgressCallback)
    with learn.no_logging(): learn.fit(1)
    return seen

@each_setting
@pytest.mark.parametrize('alpha', [.3, 1.])
def test_KnowledgeDistillation_is_the_equation(setting, alpha):
    if alpha == 1 and setting.get('scale') == 0: return
    z,zt,y = logits(16, K, dtype=f32),logits(16, K, seed=5, dtype=f32),labels(K, 16)
    for tau in (1., 4., 20.):
        got = one_step(KnowledgeDistillation(Says(zt), alpha, tau, **setting), z, y)
        value,grad,size = ref.kd(z, y, [zt], alpha, tau, **setting)
        assert got.loss.item() == pytest.approx(value, rel=1e-5, abs=1e-5)
        assert (np.abs(got.grad.numpy()-grad) <= 2e-5*size + 1e-8).all()
        torch.testing.assert_close((got.loss, got.grad), value_and_grad(KDLoss(alpha, tau, **setting), z, y, zt), rtol=2e-5, atol=1e-6)

@pytest.mark.parametrize('axis,shape', [(1, (4, 5, 3)), (-1, (4, 3, 5)), (1, (2, 5, 3, 4))], ids=str)
def test_dense_predictions(axis, shape):
    z,zt = logits(*shape, dtype=f32),logits(*shape, seed=5, dtype=f32)
    y = labels(5, *[o for i,o in enumerate(shape) if i != axis % len(shape)])
    for teacher in (Says(zt), EnsembleTeacher([Says(zt), Says(zt+1.)])):
        got = one_step(KnowledgeDistillation(teacher, .3), z, y, CrossEntropyLossFlat(axis=axis))
        value,grad,_ = ref.kd(z, y, [zt], .3, axis=axis)
        assert got.loss.item() == pytest.approx(value, rel=1e-5)
        assert np.allclose(got.grad, grad, atol=1e-6)

def test_ignored_labels_and_soft_labels():
    z,zt,y = logits(8, K, dtype=f32),logits(8, K, seed=5, dtype=f32),labels(K, 8)
    y[2] = -100
    got = one_step(KnowledgeDistillation(Says(zt), .3), z, y)
    assert got.loss.item() == pytest.approx(ref.kd(z, y, [zt], .3)[0], rel=1e-5) and not got.grad[2].any()
    q = soft_labels(8, K, dtype=f32)
    got = one_step(KnowledgeDistillation(Says(zt), .3), z, q, nn.CrossEntropyLoss())
    assert got.loss.item() == pytest.approx(ref.kd(z, q, [zt], .3)[0], rel=1e-5)

@pytest.mark.parametrize('setting', [dict(), dict(alpha=.3, tau=20., variant='official', multiplier=50.), dict(alpha=1., scale=1),
                                     dict(alpha=.5, tau=1.)], ids=name_of)
def test_trains_like_KDLoss(setting):
    net,spy = network(),Spy()
    learn = learner([KnowledgeDistillation(net, **setting), spy], plain_net)
    start = copy.deepcopy(learn.model)
    learn.fit(2)
    loss = KDLoss(**setting)
    assert_close(learn, replay(start, spy, lambda z, o: loss(z, o.y, says(net, o.x))), 2e-6)

@pytest.mark.parametrize('alpha,tau', [(.9, 4.), (.5, 1.)])
@pytest.mark.parametrize('fast', [True, False])
def test_replay_of_20_steps_in_plain_pytorch(alpha, tau, fast):
    "A student with batch norm, momentum, a teacher left in training mode"
    net,spy = network(),Spy()
    learn = learner([KnowledgeDistillation(NetworkTeacher(net, fast=fast), alpha, tau), spy], bn_net)
    start = copy.deepcopy(learn.model)
    learn.fit(7)
    assert len(spy.steps) == 21
    assert_close(learn, replay(start, spy, hand_kd(net, alpha, tau)))
    assert not same(learn, trained((), 7, model_fn=bn_net))

@pytest.mark.parametrize('extra', [[], [MixUp]], ids=['', 'MixUp'])
def test_alpha_0_is_no_callback_and_asks_no_teacher(recording, extra):
    plain,ours = trained(extra),trained([KnowledgeDistillation(plainly(recording), 0.)] + extra)
    assert same(plain, ours) and plain.recorder.losses == ours.recorder.losses
    for a,b in zip(plain.recorder.values, ours.recorder.values): assert list(a)[:2] == list(b)[:2]
    assert not Recording.log

def test_valid_loss_is_the_learners_own():
    learn = trained([KnowledgeDistillation(network())], 1)
    pairs = [(says(learn.model, x), y.as_subclass(torch.Tensor)) for x,y in learn.dls.valid]
    z,y = map(torch.cat, zip(*pairs))
    values = dict(zip(learn.recorder.metric_names[1:], learn.recorder.values[-1]))
    assert values['valid_loss'] == pytest.approx(F.cross_entropy(z, y).item(), rel=1e-5)
    assert learn.validate()[0] == pytest.approx(values['valid_loss'], rel=1e-5)

def test_columns_are_the_parts():
    net,spy = network(),Spy()
    learn = trained([KnowledgeDistillation(net, .6), spy], 1)
    values = dict(zip(learn.recorder.metric_names[1:], learn.recorder.values[-1]))
    base = [F.cross_entropy(o.pred, o.y).item() for o in spy.steps]
    soft = [ref.kd(o.pred, o.y, [says(net, o.x)], 1., scale=1)[0] for o in spy.steps]
    assert values['base_loss'] == pytest.approx(np.mean(base), rel=1e-4) and values['soft_loss'] == pytest.approx(np.mean(soft), rel=1e-4)
    for o,b,s in zip(spy.steps, base, soft): assert o.loss.item() == pytest.approx(.4*b + .6*16*s, rel=1e-4)

@pytest.mark.parametrize('mix', [MixUp, CutMix])
@pytest.mark.parametrize('smooth', [False, True], ids=['CE', 'label smoothing'])
def test_MixUp_and_CutMix(recording, mix, smooth):
    "The teacher sees the mixed images, the base loss is fastai's mixed loss"
    spy,mixer = Spy(),mix(.7)
    loss_func = LabelSmoothingCrossEntropyFlat() if smooth else CrossEntropyLossFlat()
    learn = learner([KnowledgeDistillation(plainly(recording), .6), mixer, spy], plain_net, loss_func=loss_func)
    start = copy.deepcopy(learn.model)
    learn.fit(2)
    assert len(Recording.log) == len(spy.steps) == 6 and any(not torch.equal(o.y, o.y1) for o in spy.steps)
    for seen,o in zip(Recording.log, spy.steps): assert torch.equal(seen.x, o.x)
    hard = partial(F.cross_entropy, reduction='none', label_smoothing=.1 if smooth else 0.)
    def loss(z, o):
        soft = F.kl_div(F.log_softmax(z/4, 1), F.softmax(says(recording.net, o.x)/4, 1), reduction='batchmean')
        return .4*mixed(z, o, hard) + .6*16*soft
    assert_close(learn, replay(start, spy, loss))

def test_GradientAccumulation_is_a_large_batch():
    net = network()
    def run(bs, cbs): return trained([KnowledgeDistillation(net, .7), *cbs], 2, dls=dls_of(bs=bs, shuffle=False), model_fn=plain_net)
    big,small = run(48, []),run(8, [GradientAccumulation(48)])
    assert_close(big, small, 2e-6)
    assert not same(big, run(48, [GradientAccumulation(96)]))

def test_alpha_on_a_schedule(recording):
    spy = Spy()
    learn = learner([KnowledgeDistillation(plainly(recording), SchedLin(0., .8), tau=SchedLin(1., 5.)), spy], plain_net)
    start = copy.deepcopy(learn.model)
    learn.fit(3)
    assert spy.steps[0].pct == 0 and len(Recording.log) == len(spy.steps)-1, 'without weight, without a call'
    assert_close(learn, replay(start, spy, lambda z, o: hand_kd(recording.net, .8*o.pct, 1+4*o.pct)(z, o)))

def test_two_teachers_by_name():
    a,b,spy = network(seed=7),network(seed=8),Spy()
    cbs = [KnowledgeDistillation(a, .3, 2., name='big'), KnowledgeDistillation(b, .5, 6., name='other')]
    learn = learner([*cbs, spy], plain_net)
    start = copy.deepcopy(learn.model)
    learn.fit(2)
    assert {'base_loss', 'big_loss', 'other_loss'} <= set(learn.recorder.metric_names)
    def loss(z, o): return .2*F.cross_entropy(z, o.y) + sum(hand_kd(net, 1., tau)(z, o)*alpha for net,alpha,tau in ((a, .3, 2.), (b, .5, 6.)))
    assert_close(learn, replay(start, spy, loss))
    with pytest.raises(ValueError, match='EnsembleTeacher'): trained([KnowledgeDistillation(a, .3), KnowledgeDistillation(b, .3)], 1)

def test_a_used_callback_serves_another_learner_and_so_does_its_copy():
    cb = KnowledgeDistillation(network(), .5)
    a = trained([cb], 1)
    assert same(trained([cb], 1), a) and same(trained([copy.deepcopy(cb)], 1), a)


def test_given_to_fit_or_to_the_learner():
    net = network()
    assert same(trained([], fit_cbs=[KnowledgeDistillation(net)]), trained([KnowledgeDistillation(net)]))

def test_one_teacher_in_two_places():
    one,a,b = NetworkTeacher(network()),network(),network()
    twice = [KnowledgeDistillation(one, .3, 2., name='one'), KnowledgeDistillation(one, .5, 6., name='two')]
    assert same(trained(twice), trained([KnowledgeDistillation(a, .3, 2., name='one'), KnowledgeDistillation(b, .5, 6., name='two')]))
    assert same(trained([KnowledgeDistillation(EnsembleTeacher([one, one]))]), trained([KnowledgeDistillation(EnsembleTeacher([a, b]))]))

def test_an_ensemble_on_a_temperature_schedule():
    nets,spy = [network(seed=i) for i in (3, 4)],Spy()
    learn = learner([KnowledgeDistillation(EnsembleTeacher(nets), .8, SchedLin(1., 6.)), spy], plain_net)
    start = copy.deepcopy(learn.model)
    learn.fit(2)
    def loss(z, o):
        tau = 1+5*o.pct
        t = sum(F.softmax(says(net, o.x)/tau, 1) for net in nets)/2
        return .2*F.cross_entropy(z, o.y) + .8*tau**2*F.kl_div(F.log_softmax(z/tau, 1), t, reduction='batchmean')
    assert_close(learn, replay(start, spy, loss))

@pytest.mark.parametrize('at', [2, 4])
def test_Checkpoint_resumes_as_if_undisturbed(at, tmp_path):
    make,path = lambda: [KnowledgeDistillation(network(), SchedLin(.2, .9))],tmp_path/'ck.pth'
    expected = trained(make(), 3)
    with pytest.raises(KeyboardInterrupt): trained(make(), 3, fit_cbs=[Checkpoint(path), At('after_loss', throw(KeyboardInterrupt()), 3*at//2)])
    assert same(trained(make(), 3, fit_cbs=[Checkpoint(path)], seed=9), expected)
    assert path.stat().st_size < 200_000

@pytest.mark.parametrize('way', ['fit_one_cycle', 'fine_tune'])
def test_fastais_fits(way):
    def split(m): return [list(m[:2].parameters()), list(m[2:].parameters())]
    net,learns = network(),[]
    before = state_of(net)
    for cbs in ([], [KnowledgeDistillation(net, 0.)], [KnowledgeDistillation(net)]):
        learns.append(learner(cbs, splitter=split))
        getattr(learns[-1], way)(2, 1e-2)
    assert same(learns[0], learns[1]) and not same(learns[0], learns[2])
    assert_untouched(net, before)

def test_describe():
    cb = KnowledgeDistillation(network(), .9, 4.)
    for o in (cb.describe(K), KDLoss(.9, 4.).describe(K)): assert '0.1' in str(o) and str(o).strip()
    assert learner([cb]).knowledge_distillation.describe() and 'network' in repr(cb.teacher).lower()


# ---------------------------------------------------------------- hygiene

class Boom(Exception): pass

def hooked(net):
    net[0].register_forward_hook(lambda m, i, o: None), net.register_forward_pre_hook(lambda m, i: None)
    return net

@pytest.mark.parametrize('mode', ['train', 'eval', 'mixed'])
@pytest.mark.parametrize('fast', [True, False])
@pytest.mark.parametrize('end', ['well', 'Boom', 'Ctrl-C', 'Ctrl-C before the first batch'])
def test_the_teacher_is_left_as_it_was(mode, fast, end):
    net = hooked(network())
    net.train(mode != 'eval')
    if mode == 'mixed': net[1].eval()
    net[0].weight.requires_grad_(False)
    before,mode_before = state_of(net),net.training
    learn = learner([KnowledgeDistillation(NetworkTeacher(net, fast=fast))])
    if end == 'well': learn.fit(1)
    else:
        error = Boom if end == 'Boom' else KeyboardInterrupt
        event,at = ('before_epoch', 1) if 'first' in end else ('after_loss', 2)
        with pytest.raises(error): learn.fit(1, cbs=At(event, throw(error()), at))
    assert_untouched(net, before)
    learn.fit(1)
    assert_untouched(net, before)
    learn.validate(), learn.get_preds(), learn.lr_find(num_it=4, show_plot=False)
    assert_untouched(net, before)

def test_a_fit_after_an_interrupt_is_as_if_there_had_been_none():
    def run(interrupt):
        learn = learner([KnowledgeDistillation(network())])
        start = copy.deepcopy(learn.model.state_dict())
        if interrupt:
            with pytest.raises(KeyboardInterrupt): learn.fit(1, cbs=At('after_loss', throw(KeyboardInterrupt()), 2))
            learn.model.load_state_dict(start)
        seed_run(1, learn.dls)
        learn.fit(2, reset_opt=True)
        return learn
    assert same(run(True), run(False))

def test_a_teacher_given_as_a_learner_is_left_as_it_was():
    teacher = trained((), 1)
    before = state_of(teacher.model)
    rest = teacher.dls,teacher.opt,teacher.loss_func,list(teacher.cbs),copy.deepcopy(teacher.opt.state_dict())
    trained([KnowledgeDistillation(teacher)], seed=5)
    assert_untouched(teacher.model, before)
    assert all(a is b for a,b in zip((teacher.dls, teacher.opt, teacher.loss_func), rest[:3])) and list(teacher.cbs) == rest[3]
    assert all(o.learn is teacher for o in teacher.cbs)
    teacher.fit(1)   # and still works

@pytest.mark.parametrize('meddle', [lambda m: m.train(), lambda m: m.to(f64), lambda m: m[-1].weight.data.zero_(), lambda m: m.requires_grad_(True),
                                    lambda m: m[1].reset_running_stats()], ids=['train', 'float64', 'zeroed', 'requires_grad', 'reset'])
def test_nothing_done_to_the_teacher_in_mid_fit_reaches_its_targets(meddle):
    spy,net = Spy(),network().eval()
    learn = learner([KnowledgeDistillation(net, 1.), spy], plain_net)
    learn.fit(2, cbs=At('after_batch', lambda: meddle(net), 2))
    assert same(learn, trained([KnowledgeDistillation(network().eval(), 1.)], model_fn=plain_net))

def test_the_teacher_runs_in_evaluation_mode_without_graph_on_plain_tensors(recording):
    learn = trained([KnowledgeDistillation(plainly(recording))])
    assert Recording.log and recording.training
    for o in Recording.log:
        assert not o.training and not o.grad and o.type is torch.Tensor
        torch.testing.assert_close(o.out, says(recording.net, o.x))
    own = {id(p) for p in recording.parameters()}
    assert not any(id(p) in own for p in learn.model.parameters())
    assert not any(id(p) in own for g in learn.opt.all_params() for p in [g[0]])
    assert all(p.grad is None for p in recording.parameters())
    assert len(list(learn.opt.all_params())) == len(list(learn.model.parameters()))
    assert not any(isinstance(m, Recording) for m in learn.model.modules())
    assert set(learn.model.state_dict()) == set(conv_net().state_dict())

def test_the_next_fit_sees_what_the_teacher_has_become():
    net = network()
    cb = KnowledgeDistillation(net, 1.)
    trained([cb], 1)
    net[-1].weight.data.neg_()
    twin = network()
    twin[-1].weight.data.neg_()
    assert same(trained([cb], 1), trained([KnowledgeDistillation(twin, 1.)], 1))

def big(): return nn.Sequential(nn.Flatten(), nn.Linear(192, 4096), nn.ReLU(), nn.Linear(4096, K))   # 3.3 MB

@pytest.mark.parametrize('make', [lambda: NetworkTeacher(big()), lambda: EnsembleTeacher([big(), big()]), lambda: EnsembleTeacher([big(),
                                  EnsembleTeacher([big(), big()])]),
                                  lambda: Learner(dls_of(), big(), loss_func=CrossEntropyLossFlat())], ids=['network', 'ensemble', 'nested', 'learner'])
@pytest.mark.parametrize('when', ['fresh', 'fitted', 'interrupted'])
def test_an_exported_learner_is_as_large_as_without(tmp_path, make, when):
    sizes = []
    for name,cbs in (('plain', []), ('ours', [KnowledgeDistillation(make())])):
        learn = learner(cbs)
        if when == 'fitted': learn.fit(1)
        if when == 'interrupted':
            with pytest.raises(KeyboardInterrupt): learn.fit(1, cbs=At('after_loss', throw(KeyboardInterrupt()), 2))
            learn.metrics = []
        learn.export(tmp_path/name)
        sizes.append((tmp_path/name).stat().st_size)
    assert abs(sizes[1]-sizes[0]) < max(.02*sizes[0], 2**16), sizes

@pytest.mark.parametrize('ensemble', [False, True])
def test_an_exported_learner_loads_without_the_teachers_class(tmp_path, ensemble):
    module = types.ModuleType('vanishing')
    exec('import torch\nclass Gone(torch.nn.Module):\n'
         '    def __init__(self, net):\n        super().__init__()\n        self.net = net\n'
         '    def forward(self, x): return self.net(x)\n'
         '    def __reduce__(self): raise TypeError("cannot be pickled")\n'
         '    def __deepcopy__(self, memo):\n        import copy\n        return Gone(copy.deepcopy(self.net, memo))', module.__dict__)
    sys.modules['vanishing'] = module
    try:
        gone = module.Gone(network())
        learn = trained([KnowledgeDistillation(EnsembleTeacher([gone, network()]) if ensemble else gone)], 1)
        item = learn.dls.valid_ds.items[0]
        expected = learn.predict(item)
        learn.export(tmp_path/'learn.pkl')
    finally: del sys.modules['vanishing']
    assert b'vanishing' not in (tmp_path/'learn.pkl').read_bytes()
    loaded = load_learner(tmp_path/'learn.pkl')
    got = loaded.predict(item)
    assert got[0] == expected[0] and torch.equal(got[2], expected[2])
    loaded.dls = learn.dls
    loaded.remove_cb(ProgressCallback)
    assert loaded.get_preds()[0].shape == (32, K) and len(loaded.validate()) >= 1
    before = weights(loaded)
    with pytest.raises(ValueError, match='exported.*teacher'): loaded.fit(1)
    assert same(SimpleNamespace(state_dict=lambda: before), loaded)
    with pytest.raises(ValueError, match='exported.*teacher'): loaded.lr_find(num_it=2, show_plot=False)
    loaded.remove_cb(KnowledgeDistillation)
    loaded.add_cb(KnowledgeDistillation(network()))
    loaded.fit(1)
    learn.fit(1)   # exporting took nothing from the learner itself

def test_only_training_asks_the_teacher(recording):
    learn = learner([KnowledgeDistillation(plainly(recording))])
    n,items = len(learn.dls.train),learn.dls.valid_ds.items[:4]
    learn.fit(2)
    assert len(Recording.log) == 2*n
    learn.validate(), learn.get_preds(), learn.get_preds(with_loss=True), learn.get_preds(ds_idx=0), learn.predict(items[0]), learn.show_results(max_n=2)
    learn.get_preds(dl=learn.dls.test_dl(items)), learn.summary()
    assert len(Recording.log) == 2*n
    learn.lr_find(num_it=5, show_plot=False)
    assert 2*n+5 <= len(Recording.log) <= 2*n+6

def test_lr_find_leaves_no_trace():
    def run(find):
        learn = learner([KnowledgeDistillation(network())])
        if find: learn.lr_find(num_it=6, show_plot=False)
        seed_run(1, learn.dls)
        learn.fit(2, reset_opt=True)
        return learn
    assert same(run(True), run(False))

def test_a_callback_that_does_not_run_needs_no_teacher(recording):
    cb = KnowledgeDistillation(plainly(recording))
    cb.run = False
    learn = learner([cb])
    with learn.removed_cbs([cb]): learn.fit(1)
    assert not Recording.log

@pytest.mark.parametrize('kind', ['weight_norm', 'spectral_norm', 'parametrized', 'after a forward'])
@pytest.mark.parametrize('fast', [True, False])
def test_networks_that_are_hard_to_copy(kind, fast):
    net = network()
    if kind == 'weight_norm':
        with pytest.warns(FutureWarning): nn.utils.weight_norm(net[-1])
        net(torch.randn(4, 3, 8, 8))
        net[-1].weight_g.data.mul_(2.)   # the weight itself still is of old
    elif kind == 'spectral_norm': nn.utils.spectral_norm(net[-1])
    elif kind == 'parametrized': nn.utils.parametrizations.weight_norm(net[0])
    if kind != 'weight_norm': net(torch.randn(4, 3, 8, 8))
    if kind == 'after a forward': net.kept = net[:2](torch.randn(2, 3, 8, 8))   # a tensor with a graph
    net.eval()
    x,got = logits_of(NetworkTeacher(net, fast=fast), learner())
    with torch.no_grad(): close(got, net(x))


@pytest.mark.parametrize('fast', [True, False])
@pytest.mark.parametrize('how', ['alone', 'ensemble', 'order'])
def test_a_teacher_that_writes_into_its_input_spoils_nobodys_batch(fast, how):
    def run(inplace):
        t = NetworkTeacher(Centred(network(), inplace), fast=fast, vocab=list('9876543210') if how == 'order' else None)
        return trained([KnowledgeDistillation(EnsembleTeacher([t, network(seed=3)]) if how == 'ensemble' else t)], 1, model_fn=plain_net)
    assert_close(run(True), run(False), 1e-6)

def test_an_in_place_layer_at_the_front_of_a_teacher():
    run = lambda inplace: trained([KnowledgeDistillation(nn.Sequential(nn.ReLU(inplace=inplace), network()))], 1, model_fn=plain_net)
    assert_close(run(True), run(False), 1e-6)

@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize('how', ['script', 'trace'])
def test_torchscript_teachers(how):
    net = network().eval()
    script = torch.jit.script(net) if how == 'script' else torch.jit.trace(net, torch.randn(2, 3, 8, 8))
    with pytest.raises(TypeError, match='TorchScript'): NetworkTeacher(script)

def test_wrapped_and_compiled_teachers():
    net = network()
    for wrapped in (nn.DataParallel(net), torch.compile(net, backend='eager')):
        x,got = logits_of(NetworkTeacher(wrapped), learner())
        close(got, says(net, x))
    learn = learner()
    for wrapped in (nn.DataParallel(learn.model), torch.compile(learn.model, backend='eager')):
        with pytest.raises(ValueError, match='cop[yi]'): NetworkTeacher(wrapped).attach(learn)

def test_a_distilled_learner_teaches_the_next(tmp_path):
    "Born-again networks: the file carries a callback whose teacher is gone"
    first = trained([KnowledgeDistillation(network())], 1)
    first.export(tmp_path/'first.pkl')
    from_file,live = (trained([KnowledgeDistillation(o)], 1, seed=4) for o in (load_learner(tmp_path/'first.pkl'), first))
    assert same(from_file, live)


# ---------------------------------------------------------------- mismatches

def test_class_order():
    assert class_order(list('abc'), list('abc')) is None and class_order(None, list('abc')) is None and class_order(list('abc'), None) is None
    assert class_order(list('abc'), list('cab')) == [1, 2, 0] and class_order(list('ca'), list('abc')) == [2, 0]
    with pytest.raises(ValueError, match='x.*y|2 of') as e: class_order(list('axy'), list('abc'))
    assert 'x' in str(e.value) and 'y' in str(e.value)

def test_class_names_and_input_stats():
    assert class_names(dls_of('357')) == list('357') and class_names(DataLoaders([1], [1])) is None
    mean,std = input_stats(dls_of(norm=((.1, .2, .3), (.4, .5, .6))).train)
    assert mean == pytest.approx([.1, .2, .3]) and std == pytest.approx([.4, .5, .6])
    assert input_stats(dls_of(norm=None).train) is None and input_stats([1]) is None

def norm(x, stats):
    m,s = (torch.tensor(o)[:,None,None] for o in stats)
    return (x-m)/s

A,B = ((.3, .3, .3), (.4, .4, .4)),((.5, .6, .7), (.2, .3, .5))

@pytest.mark.parametrize('student,teacher', [(A, B), (None, B), (A, None), (A, A),
                                             (None, None)], ids=['both', 'student plain', 'teacher plain', 'same', 'none'])
def test_renormalise(student, teacher):
    image = torch.rand(4, 3, 5, 5)
    x,want = (norm(image, o) if o else image for o in (student, teacher))
    got = renormalise(student, teacher)
    if student == teacher: assert got is None
    else: torch.testing.assert_close(x*got[0]+got[1], want, rtol=1e-5, atol=1e-5)

@pytest.mark.parametrize('as_what', ['learner', 'vocab', 'file'])
@pytest.mark.parametrize('student,teacher', [('0123456789', '0123456789'), ('0123456789', '9876543210'), ('0123456789', '1357924680'), ('357', '0123456789'),
                                             ('735', '9876543210'), ('01', '10')])
def test_classes_are_matched_by_name(as_what, student, teacher, tmp_path):
    net = network(len(teacher))
    if as_what == 'vocab': t = NetworkTeacher(net, vocab=list(teacher))
    else:
        t = learner(model_fn=lambda: net, dls=dls_of(teacher))
        if as_what == 'file':
            t.export(tmp_path/'t.pkl')
            t = tmp_path/'t.pkl'
        t = NetworkTeacher(t, trust=as_what == 'file')
    learn = learner(model_fn=lambda: conv_net(len(student)), dls=dls_of(student))
    x,got = logits_of(t, learn)
    where = [teacher.index(o) for o in student]
    for tau in (1., 4.):   # restricted and renormalised
        p = says(net, x).div(tau).softmax(1)[:, where]
        close(got.div(tau).softmax(1), p/p.sum(1, keepdim=True))
    spy = Spy()
    learn = learner([KnowledgeDistillation(t, .8), spy], lambda: plain_net(len(student)), dls=dls_of(student))
    start = copy.deepcopy(learn.model)
    learn.fit(1)
    pick = nn.Sequential(copy.deepcopy(net), Pick(where))
    assert_close(learn, replay(start, spy, hand_kd(pick, .8)))

class Pick(nn.Module):
    def __init__(self, where):
        super().__init__()
        self.where = where
    def forward(self, x): return x[:, self.where]

def test_missing_classes_are_refused_before_the_first_batch():
    calls = []
    for teacher in (learner(model_fn=lambda: network(9), dls=dls_of('123456789')), NetworkTeacher(network(), vocab=list('abcdefghij'))):
        learn = learner([KnowledgeDistillation(teacher)])
        before = weights(learn)
        with pytest.raises(ValueError, match='0'): learn.fit(1, cbs=At('before_batch', lambda: calls.append(1)))
        assert same(SimpleNamespace(state_dict=lambda: before), learn)
    assert not calls

@pytest.mark.parametrize('k', [7, 12])
def test_unknown_classes_of_another_number_are_refused_naming_both(k):
    learn = learner([KnowledgeDistillation(network(k))])
    before = weights(learn)
    with pytest.raises(ValueError) as e: learn.fit(1)
    assert '10' in str(e.value) and str(k) in str(e.value) and 'teacher' in str(e.value)
    assert same(SimpleNamespace(state_dict=lambda: {k: v for k,v in before.items() if 'running' not in k and 'num_b' not in k}),
                SimpleNamespace(state_dict=lambda: {k: v for k,v in weights(learn).items() if 'running' not in k and 'num_b' not in k}))

def test_vocab_of_another_length_than_the_outputs():
    with pytest.raises(ValueError, match='9.*10|10.*9'): trained([KnowledgeDistillation(NetworkTeacher(network(9), vocab=list('0123456789')))], 1)

@pytest.mark.parametrize('student', [A, None], ids=['student normalised', 'student plain'])
@pytest.mark.parametrize('fast', [True, False])
def test_teacher_norm(student, fast):
    dls,net = dls_of(norm=student),network()
    image = next(iter(dls_of(norm=None).valid))[0].as_subclass(torch.Tensor)
    x = norm(image, student) if student else image
    T = partial(NetworkTeacher, fast=fast)
    teachers = [(T(net, teacher_norm=B), B), (T(net, teacher_norm=(list(B[0]), list(B[1]))), B), (T(net), student), (T(net, teacher_norm=None), student),
                (T(learner(model_fn=lambda: net, dls=dls_of(norm=B))), B), (T(learner(model_fn=lambda: net, dls=dls_of(norm=B)), teacher_norm=A), A),
                (T(learner(model_fn=lambda: net, dls=dls_of(norm=A))), A), (T(learner(model_fn=lambda: net, dls=dls_of(norm=None))), None),
                (T(learner(model_fn=lambda: net, dls=dls_of(norm=B)), teacher_norm=None), student)]
    for i,(teacher,stats) in enumerate(teachers):
        seen,got = logits_of(teacher, learner(dls=dls))
        torch.testing.assert_close(seen, x)
        close(got, says(net, norm(image, stats) if stats else image)), i

def test_a_normalised_file_teaches_a_plain_student(tmp_path):
    net = network()
    learner(model_fn=lambda: net, dls=dls_of(norm=B)).export(tmp_path/'t.pkl')
    image,got = logits_of(NetworkTeacher(tmp_path/'t.pkl', trust=True), learner(dls=dls_of(norm=None)))
    close(got, says(net, norm(image, B)))

@pytest.mark.filterwarnings('ignore:.*is a network of timm')
@pytest.mark.parametrize('intact', [True, False], ids=['head as pretrained', 'new head'])
def test_timm_networks_know_their_statistics_while_their_head_is_intact(intact):
    with torch.random.fork_rng():
        net = randomise_bn(timm.create_model('test_resnet', pretrained=False)).eval()
        if not intact: net.reset_classifier(K)
    k = net.num_classes
    assert net.pretrained_cfg['num_classes'] == 1000
    cfg = net.pretrained_cfg['mean'],net.pretrained_cfg['std']
    x = torch.randn(2, 3, 32, 32)
    batches = [(x, labels(k, 2))]
    learn = Learner(DataLoaders(batches, batches), nn.Linear(3072, k), loss_func=CrossEntropyLossFlat())
    for args,stats in (({}, cfg if intact else None), (dict(teacher_norm=None), None), (dict(teacher_norm=A), A)):
        _,got = logits_of(NetworkTeacher(net, **args), learn)
        close(got, says(net, norm(x, stats) if stats else x))

class AnySize(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv,self.head = nn.Conv2d(3, 4, 3),nn.Linear(4, K)
    def forward(self, x):
        Recording.log.append(x.clone())
        return self.head(self.conv(x).mean((2, 3)))

@pytest.mark.parametrize('size,shape', [(16, (16, 16)), (4, (4, 4)), ((6, 12), (6, 12)), ((8, 8), (8, 8)), ([5, 4], (5, 4)), (None, (8, 8))], ids=str)
def test_teacher_size(size, shape):
    Recording.log = []
    x,_ = logits_of(plainly(AnySize(), teacher_size=size, teacher_norm=B), learner())
    seen = Recording.log[-1]
    image = x*torch.tensor(A[1])[:,None,None] + torch.tensor(A[0])[:,None,None]
    want = norm(image, B)
    assert seen.shape == (*x.shape[:2], *shape)
    torch.testing.assert_close(seen.mean((2, 3)), want.mean((2, 3)), rtol=.02, atol=.12)   # a smaller or larger version of the same image
    if shape == (8, 8): torch.testing.assert_close(seen, want, rtol=1e-5, atol=1e-5)
    if shape == (16, 16): torch.testing.assert_close(F.avg_pool2d(seen, 2), want, rtol=.3, atol=1.5)
    if shape == (4, 4): assert (seen - F.avg_pool2d(want, 2)).abs().mean() < .6

@pytest.mark.parametrize('args', [dict(teacher_norm='imagenet'), dict(teacher_norm=(.5,)), dict(teacher_norm=((.5,), (0.,))), dict(teacher_size=0),
                                  dict(teacher_size=-3),
                                  dict(teacher_size=(3, 0)), dict(teacher_size='big'), dict(teacher_size=2.5)], ids=str)
def test_bad_teacher_norm_and_size_are_refused_by_name(args):
    with pytest.raises((ValueError, TypeError), match=next(iter(args))): NetworkTeacher(network(), **args)

@pytest.mark.parametrize('axis', [1, -1])
def test_classes_of_dense_predictions_are_matched_on_their_axis(axis):
    zt = logits(4, 5, 3, dtype=f32) if axis == 1 else logits(4, 3, 5, dtype=f32)
    loss_func = CrossEntropyLossFlat(axis=axis)
    dls = dls_of('12')
    learn = Learner(dls, nn.Linear(2, 2), loss_func=loss_func)
    t = NetworkTeacher(Says(zt), vocab=list('01234'))
    _,got = logits_of(t, learn, torch.zeros(4, 1))
    assert torch.equal(got, zt[:, 1:3] if axis == 1 else zt[..., 1:3])

@pytest.mark.parametrize('make', [tuple, list, np.array, lambda o: [int(i) for i in o], lambda o: dls_of('0123456789').vocab],
                                  ids=['tuple', 'list', 'array', 'int', 'CategoryMap'])
def test_vocab_of_any_kind(make):
    net = network()
    x,got = logits_of(NetworkTeacher(net, vocab=make(list('0123456789'))), learner())
    close(got, says(net, x))

def test_teacher_norm_of_other_channels():
    learn = learner([KnowledgeDistillation(NetworkTeacher(network(), teacher_norm=([.5]*4, [.2]*4)))])
    with pytest.raises(ValueError, match='teacher_norm'): learn.fit(1)

class Around(nn.Module):
    def __init__(self, body):
        super().__init__()
        self.body = body
    def forward(self, x): return self.body(x)

@pytest.mark.parametrize('make', [lambda l: l.model, lambda l: l, lambda l: Learner(l.dls, l.model, loss_func=l.loss_func), lambda l: Around(l.model),
                                  lambda l: nn.Sequential(l.model[0], nn.ReLU(), nn.Flatten(), nn.Linear(64, K)),
                                  lambda l: EnsembleTeacher([network(), l.model]),
                                  lambda l: copy.copy(l.model)],
                         ids=['module', 'learner', 'another learner', 'wrapped', 'shared layer', 'in an ensemble', 'shallow copy'])
def test_the_student_is_not_its_own_teacher(make):
    learn = learner()
    before = weights(learn)
    learn.add_cb(KnowledgeDistillation(make(learn)))
    with pytest.raises(ValueError, match='cop[yi]'): learn.fit(1)
    assert same(SimpleNamespace(state_dict=lambda: before), learn)

def test_a_copy_of_the_student_is_a_teacher():
    learn = learner()
    learn.add_cb(KnowledgeDistillation(copy.deepcopy(learn.model)))
    learn.fit(1)


# ---------------------------------------------------------------- sources

def speaks_like(teacher, net):
    x,got = logits_of(teacher, learner())
    close(got, says(net, x))

@pytest.mark.parametrize('wrap', [str, Path], ids=['str', 'Path'])
@pytest.mark.parametrize('how', ['as_teacher', 'NetworkTeacher'])
def test_sources_module_learner_and_exported_file(wrap, how, tmp_path):
    make = dict(as_teacher=as_teacher, NetworkTeacher=NetworkTeacher)[how]
    net = network()
    teacher = learner(model_fn=lambda: net)
    teacher.export(tmp_path/'teacher.pkl')
    path = wrap(tmp_path/'teacher.pkl')
    with pytest.raises(ValueError, match='teacher.pkl.*runs the code in it.*trust=True'): make(path)
    for o in (net, teacher, path):
        before = rng_state()
        t = NetworkTeacher(path, trust=True) if o is path else make(o)
        same_rng(before)
        speaks_like(t, net)

@pytest.mark.parametrize('saved', ['state_dict', 'learn.save', 'learn.save without optimizer'])
@pytest.mark.parametrize('arch', ['module', 'name'])
def test_sources_weights(saved, arch, tmp_path):
    with torch.random.fork_rng():
        net = randomise_bn(create_model('resnet20', K), 3)
        other = create_model('resnet20', K)
    path = tmp_path/'w.pth'
    if saved == 'state_dict': torch.save(net.state_dict(), path)
    else:
        learn = learner(model_fn=lambda: net)
        learn.create_opt()
        path = learn.save(tmp_path/'w', with_opt='without' not in saved)
    before = copy.deepcopy(other.state_dict())
    state = rng_state()
    t = NetworkTeacher(path, arch=other if arch == 'module' else 'resnet20')
    same_rng(state)
    speaks_like(t, net)
    speaks_like(NetworkTeacher(str(path), arch=other if arch == 'module' else 'resnet20'), net)
    if arch == 'module':
        for k,v in other.state_dict().items(): assert torch.equal(v, before[k]), 'the network given as arch= is not the teacher, and stays as it was'

def test_weights_for_the_students_own_architecture_do_not_overwrite_the_student(tmp_path):
    learn,net = learner(),network(width=4)
    torch.save(net.state_dict(), tmp_path/'w.pth')
    before = weights(learn)
    t = NetworkTeacher(tmp_path/'w.pth', arch=learn.model)
    assert same(SimpleNamespace(state_dict=lambda: before), learn), 'loading a teacher must not change the student'
    learn.add_cb(KnowledgeDistillation(t))
    learn.fit(1)

def write(path, kind):
    if kind == 'pickled dict':
        with open(path, 'wb') as f: pickle.dump({'a': 1}, f)
    elif kind == 'weights':      torch.save(network().state_dict(), path)
    elif kind == 'whole module': torch.save(nn.Linear(3, 4), path)
    elif kind == 'text':         path.write_text('no pickle at all')
    elif kind == 'torch dict':   torch.save({'a': 1}, path)
    elif kind == 'no entries':   torch.save({}, path)
    elif kind == 'a tensor':     torch.save(torch.zeros(3), path)
    elif kind == 'empty':        path.write_bytes(b'')
    elif kind == 'truncated':
        learner().export(path)
        path.write_bytes(path.read_bytes()[:1000])
    return path

FILES = ['pickled dict', 'torch dict', 'no entries', 'a tensor', 'weights', 'whole module', 'text', 'empty', 'truncated']

@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize('kind', FILES)
def test_a_file_that_is_no_exported_learner(kind, tmp_path):
    path = write(tmp_path/'strange.pkl', kind)
    with pytest.raises(ValueError) as e: NetworkTeacher(path)
    assert 'strange.pkl' in str(e.value)
    if kind == 'weights': assert 'arch' in str(e.value)
    with pytest.raises(ValueError, match='strange.pkl'): NetworkTeacher(path, trust=True)

@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize('kind', [o for o in FILES if o != 'weights'])
@pytest.mark.parametrize('arch', ['resnet20', 'module'])
def test_a_file_that_holds_no_weights(kind, arch, tmp_path):
    path = write(tmp_path/'strange.pth', kind)
    with pytest.raises(ValueError) as e: NetworkTeacher(path, arch=network() if arch == 'module' else arch)
    assert 'strange.pth' in str(e.value)

@pytest.mark.parametrize('arch', ['resnet20', 'module'])
def test_weights_of_another_network(arch, tmp_path):
    path = write(tmp_path/'w.pth', 'weights')
    net = network(width=5)
    before = copy.deepcopy(net.state_dict())
    with pytest.raises(ValueError) as e: NetworkTeacher(path, arch=net if arch == 'module' else arch)
    assert 'w.pth' in str(e.value)
    for k,v in net.state_dict().items(): assert torch.equal(v, before[k]), 'half-loaded'

def test_weights_that_end_in_a_scalar(tmp_path):
    "Batch norm's counter is the last entry of a network that ends in one"
    net = nn.Sequential(nn.Flatten(), nn.Linear(192, K), nn.BatchNorm1d(K))
    torch.save(net.state_dict(), tmp_path/'w.pth')
    speaks_like(NetworkTeacher(tmp_path/'w.pth', arch=copy.deepcopy(net)), net)
    with pytest.raises(ValueError, match='w.pth|arch'): NetworkTeacher(tmp_path/'w.pth', arch='resnet20')

@pytest.mark.parametrize('path', ['no/such/file.pkl', Path('no/such/file.pkl'), 'resnet_nonesuch'])
@pytest.mark.parametrize('arch', [None, 'resnet20'])
def test_a_missing_file(path, arch):
    with pytest.raises(FileNotFoundError, match='no.such|nonesuch'): NetworkTeacher(path, arch=arch)

@pytest.mark.parametrize('what', [3, None, [network], network, {'a': 1}], ids=['int', 'None', 'list', 'function', 'dict'])
def test_what_is_no_teacher(what):
    with pytest.raises(TypeError, match='teacher'): NetworkTeacher(what)

def test_as_teacher():
    f = lambda step: step.xb[0]
    assert as_teacher(f)(Step(None, None, (3,))) == 3 and isinstance(as_teacher(network()), NetworkTeacher)
    t = UniformTeacher()
    assert as_teacher(t) is t and as_teacher(EnsembleTeacher([network(), network()])).teachers
    for o in (3, None, [1]):
        with pytest.raises(TypeError, match='teacher'): as_teacher(o)
    with pytest.raises(TypeError, match='teacher'): KnowledgeDistillation(None)

@pytest.mark.parametrize('name', ['resnet18', 'timm/resnet18', 'resnet18.a1_in1k'])
def test_timm_names_are_pretrained(name, monkeypatch):
    calls,net = [],network()
    def create(name, **kwargs):
        calls.append((name, kwargs))
        torch.rand(3)
        return net
    monkeypatch.setattr(timm, 'create_model', create)
    state = torch.get_rng_state()
    t = NetworkTeacher(name, drop_rate=.1)
    assert calls == [(name.removeprefix('timm/'), dict(pretrained=True, drop_rate=.1))] and torch.equal(state, torch.get_rng_state())
    speaks_like(t, net)
    NetworkTeacher(name, pretrained=False)
    assert calls[-1][1] == dict(pretrained=False)

def test_a_file_beats_a_timm_name_and_other_arguments_are_refused(monkeypatch):
    net = network()
    learner(model_fn=lambda: net).export('resnet18')
    monkeypatch.setattr(timm, 'create_model', lambda *a, **k: pytest.fail('there is a file'))
    speaks_like(NetworkTeacher('resnet18', trust=True), net)
    for model in (net, 'resnet18'):
        with pytest.raises(TypeError): NetworkTeacher(model, no_such_argument=1)

def test_identity():
    "The same for the same network in any process, another after any change that changes the outputs"
    net = network()
    base = NetworkTeacher(net).identity
    assert base == NetworkTeacher(copy.deepcopy(net)).identity == NetworkTeacher(net).identity
    other = copy.deepcopy(net)
    other[-1].bias.data[0] += 1e-3
    ids = [base, NetworkTeacher(other).identity, NetworkTeacher(net, teacher_norm=B).identity, NetworkTeacher(net, vocab=list('0123456789')).identity,
           NetworkTeacher(net, teacher_size=16).identity, EnsembleTeacher([net, other]).identity, EnsembleTeacher([net, other], 'logits').identity]
    assert len(set(ids)) == len(ids)
    twin = copy.deepcopy(net)
    twin[2] = nn.Sigmoid()
    assert NetworkTeacher(twin).identity != base, 'same weights, other function'
    with_hooks = NetworkTeacher(hooked(net).eval()).identity
    logits_of(NetworkTeacher(net), learner())
    assert NetworkTeacher(net).identity == with_hooks != base


# ---------------------------------------------------------------- ensembles

@pytest.mark.parametrize('taus', [(4., 4.), (1., 1.), (.7, 3.), (6., 2.)], ids=str)
@pytest.mark.parametrize('n', [2, 5])
def test_ensemble_averages_softened_probabilities(taus, n):
    z,y = logits(16, K, dtype=f32),labels(K, 16)
    zts = [logits(16, K, seed=5+i, dtype=f32, spread=1+2*i) for i in range(n)]
    got = one_step(Distill(EnsembleTeacher([Says(o) for o in zts]), .6, tau=taus), z, y)
    t = ref.ensemble_target(zts, taus[0])
    value,grad,_ = ref.evaluate(z.numpy(), [ref.Term(.4, ref.one_hot(y.numpy(), K), 1., 'ce'), ref.Term(.6*taus[1]**2, t, taus[1], 'kl')])
    assert got.loss.item() == pytest.approx(value.mean(), rel=1e-5)
    assert np.allclose(got.grad, grad/16, atol=1e-6)

def test_ensemble_of_logits_of_twins_and_nested():
    z,y = logits(16, K, dtype=f32),labels(K, 16)
    a,b,c = (logits(16, K, seed=5+i, dtype=f32) for i in range(3))
    step = lambda t: one_step(KnowledgeDistillation(t, .6), z, y)
    pairs = [(EnsembleTeacher([Says(a), Says(b)], 'logits'), Says((a+b)/2)), (EnsembleTeacher([Says(a), Says(a)]), Says(a)),
             (EnsembleTeacher([Says(a), Says(a+9)]), Says(a)),
             (EnsembleTeacher([Says(a), EnsembleTeacher([Says(b), Says(c)])]), EnsembleTeacher([Says(a), Says(a), Says(b), Says(c)]))]
    for one,other in pairs: torch.testing.assert_close((step(one).loss, step(one).grad), (step(other).loss, step(other).grad), rtol=1e-4, atol=1e-6)

def test_ensemble_of_huge_logits():
    z,y = logits(4, K, dtype=f32),labels(K, 4)
    a = torch.zeros(4, K)
    a[:, 0] = 1e4
    got = one_step(KnowledgeDistillation(EnsembleTeacher([Says(a), Says(-a)]), .6), z, y)
    t = ref.ensemble_target([a, -a], 4.)
    value,grad,_ = ref.evaluate(z.numpy(), [ref.Term(.4, ref.one_hot(y.numpy(), K), 1., 'ce'), ref.Term(.6*16, t, 4., 'kl')])
    assert got.loss.item() == pytest.approx(value.mean(), rel=1e-5) and np.allclose(got.grad, grad/4, atol=1e-6)

def test_ensemble_of_three_in_a_training():
    nets,spy = [network(seed=i) for i in (3, 4, 5)],Spy()
    before = [state_of(o) for o in nets]
    learn = learner([KnowledgeDistillation(EnsembleTeacher(nets), .8), spy], plain_net)
    start = copy.deepcopy(learn.model)
    learn.fit(2)
    def loss(z, o):
        t = sum(F.softmax(says(net, o.x)/4, 1) for net in nets)/3
        return .2*F.cross_entropy(z, o.y) + .8*16*F.kl_div(F.log_softmax(z/4, 1), t, reduction='batchmean')
    assert_close(learn, replay(start, spy, loss))
    for o,b in zip(nets, before): assert_untouched(o, b)

def test_ensemble_members_have_classes_and_statistics_of_their_own():
    a,b,c = network(seed=3),network(seed=4),network(12, seed=5)
    t = EnsembleTeacher([a, learner(model_fn=lambda: b, dls=dls_of('9876543210', norm=B)), NetworkTeacher(c, vocab=list('x0123456789y'), teacher_norm=B)])
    x,got = logits_of(t, learner())
    image = x*torch.tensor(A[1])[:,None,None] + torch.tensor(A[0])[:,None,None]
    want = ref.ensemble_target([says(a, x), says(b, norm(image, B)).flip(1), says(c, norm(image, B))[:, 1:11]], 4.)
    assert np.allclose(got.div(4).softmax(1), want, atol=1e-5)
    with pytest.raises(ValueError, match='0'): trained([KnowledgeDistillation(EnsembleTeacher([a, NetworkTeacher(b, vocab=list('abcdefghij'))]))], 1)

@pytest.mark.parametrize('bad', [float('nan'), float('inf'), -float('inf')])
@pytest.mark.parametrize('average', ['probs', 'logits'])
def test_ensemble_with_a_broken_member(bad, average):
    broken = torch.zeros(8, K)
    broken[3, 2] = bad
    t = EnsembleTeacher([Says(torch.zeros(8, K)), Says(broken)], average)
    if average == 'probs' and bad == -float('inf'): return   # a probability of 0
    with pytest.raises(ValueError, match='teacher|Teacher'): one_step(KnowledgeDistillation(t), logits(8, K, dtype=f32), labels(K, 8))

def test_ensemble_of_different_widths():
    with pytest.raises(ValueError, match='10.*7|7.*10'): trained([KnowledgeDistillation(EnsembleTeacher([network(), network(7)]))], 1)
    with pytest.raises(ValueError, match='10.*7|7.*10'): trained([KnowledgeDistillation(EnsembleTeacher([network(7), network(7)]))], 1)

@pytest.mark.parametrize('args,error,word', [(([],), ValueError, 'two'), (([network()],), ValueError, 'two'), (([network(), 3],), TypeError, 'teacher'),
                                             (([network(), UniformTeacher()],), TypeError, 'network'), (([network(), network()], 'mean'),
                                             ValueError, 'average'), ((network(),), TypeError, 'teachers'),
                                             (('resnet18',), TypeError, 'teachers')],
                         ids=['none', 'one', 'number', 'label teacher', 'average', 'no list', 'a name'])
def test_bad_ensembles(args, error, word):
    with pytest.raises(error, match=word): EnsembleTeacher(*args)


# ---------------------------------------------------------------- faults

class Faulty(nn.Module):
    "Says `fault(logits)` in its `at`-th batch"
    n = 0
    def __init__(self, fault, at=3, net=None):
        super().__init__()
        self.net,self.fault,self.at = net or network(),fault,at
        type(self).n = 0
    def forward(self, x):
        type(self).n += 1
        z = self.net(x)
        return self.fault(z) if type(self).n == self.at else z

def with_entry(value):
    def f(z):
        z = z.clone()
        z[5, 2] = value
        return z
    return f

@pytest.mark.parametrize('value', [float('nan'), float('inf'), -float('inf')])
@pytest.mark.parametrize('alpha', [.6, 1.])
@pytest.mark.parametrize('at', [1, 3, 5])
def test_a_batch_with_broken_logits_gets_no_soft_term_and_the_run_stops(value, alpha, at):
    t,spy = Faulty(with_entry(value), at),Spy()
    before = state_of(t)
    learn = learner([KnowledgeDistillation(plainly(t), alpha), spy], plain_net)
    start = copy.deepcopy(learn.model)
    with pytest.raises(ValueError, match='(?i)teacher.*Faulty|Faulty.*teacher'): learn.fit(2)
    assert len(spy.steps) == at, 'it stops at once'
    good = hand_kd(t.net, alpha)
    last = spy.steps[-1]
    assert_close(learn, replay(start, spy, lambda z, o: (1-alpha)*F.cross_entropy(z, o.y) if o is last else good(z, o)))
    assert_untouched(t, before)
    learn.validate()
    learn.remove_cb(KnowledgeDistillation)
    learn.fit(1)   # and without the teacher it goes on
    assert all(v.isfinite().all() for v in weights(learn).values())

@pytest.mark.parametrize('fault,error,words', [
    (lambda z: z[:, :7], ValueError, '7'), (lambda z: z[:5], ValueError, '5'), (lambda z: z[:, 0], (TypeError, ValueError), 'teacher|Teacher'),
    (lambda z: {}, TypeError, 'dict'), (lambda z: (), TypeError, 'tuple'), (lambda z: (z[:, :7], z), ValueError, '7'),
    (lambda z: ('a', z), TypeError, 'tuple|str'),
    (lambda z: None, TypeError, 'NoneType'), (lambda z: z.long(), (TypeError, ValueError), 'int64|float'),
    (lambda z: z.mean(), (TypeError, ValueError), 'teacher|Teacher'),
    (lambda z: z > 0, (TypeError, ValueError), 'bool|float'), (lambda z: z.numpy(), TypeError, 'ndarray'),
    (lambda z: z.to(torch.complex64), (TypeError, ValueError), 'complex|float')],
    ids=['width', 'batch', 'vector', 'dict', 'empty', 'tuple width', 'tuple str', 'None', 'integer', 'scalar', 'bool', 'numpy', 'complex'])
@pytest.mark.parametrize('at', [1, 2])
def test_strange_outputs_are_refused(fault, error, words, at):
    learn = learner([KnowledgeDistillation(plainly(Faulty(fault, at)), .5)])
    with pytest.raises(error, match=words): learn.fit(1)
    learn.validate()

@pytest.mark.parametrize('wrap', [lambda z: (z,), lambda z: (z, z[:, :3]), lambda z: [z, None], lambda z: {'hidden': z[:, :3], 'logits': z}],
                         ids=['tuple', 'with features', 'list', 'dict'])
def test_the_first_of_a_tuple_counts(wrap):
    z,zt,y = logits(8, K, dtype=f32),logits(8, K, seed=5, dtype=f32),labels(K, 8)
    for T in (NetworkTeacher, plainly):
        got = one_step(KnowledgeDistillation(T(Says(zt, wrap)), .5), z, y)
        assert got.loss.item() == pytest.approx(ref.kd(z, y, [zt], .5)[0], rel=1e-5)

def test_a_teacher_that_raises():
    t = Faulty(throw(Boom('the disk is full')), 2)
    t.fault = lambda z: throw(Boom('the disk is full'))()
    before,learn = state_of(t),learner([KnowledgeDistillation(plainly(t), .5)])
    with pytest.raises(Boom, match='the disk is full'): learn.fit(1)
    assert_untouched(t, before)
    learn.fit(1)   # it raises but once

@pytest.mark.parametrize('dtype', [f16, bf16, f64], ids=str)
def test_teacher_logits_of_another_type(dtype):
    z,zt,y = logits(8, K, dtype=f32),logits(8, K, seed=5, dtype=dtype),labels(K, 8)
    got = one_step(KnowledgeDistillation(Says(zt), .5), z, y)
    assert got.loss.item() == pytest.approx(ref.kd(z, y, [zt.double()], .5)[0], rel=1e-5) and got.grad.dtype == f32
    ens = one_step(KnowledgeDistillation(EnsembleTeacher([Says(zt), Says(zt)]), .5), z, y)
    torch.testing.assert_close(ens.grad, got.grad, rtol=1e-3, atol=1e-6)

@pytest.mark.parametrize('dtype,rtol', [(f64, 1e-5), (bf16, 5e-2), (f16, 5e-3)], ids=['float64', 'bfloat16', 'float16'])
@pytest.mark.parametrize('fast', [True, False])
def test_a_teacher_of_another_type(dtype, rtol, fast):
    net = network().to(dtype)
    before = state_of(net)
    learn = learner([KnowledgeDistillation(NetworkTeacher(net, fast=fast), .8), (spy := Spy())], plain_net)
    start = copy.deepcopy(learn.model)
    learn.fit(1)
    assert_untouched(net, before)
    assert_close(learn, replay(start, spy, hand_kd(copy.deepcopy(net).float(), .8)), rtol)
    x,got = logits_of(NetworkTeacher(net, fast=fast), learner())
    close(got.float(), says(copy.deepcopy(net).float(), x), rtol)

@pytest.mark.parametrize('dtype,rtol', [(f64, 1e-6), (bf16, 5e-2)], ids=['float64', 'bfloat16'])
@pytest.mark.parametrize('fast', [True, False])
def test_a_float32_teacher_of_images_of_another_type(dtype, rtol, fast):
    net = network()
    x,got = logits_of(NetworkTeacher(net, fast=fast, teacher_norm=B), learner(), torch.randn(6, 3, 8, 8, generator=torch.Generator().manual_seed(1)).to(dtype))
    image = x.double()*torch.tensor(A[1])[:,None,None] + torch.tensor(A[0])[:,None,None]
    close(got.double(), says(copy.deepcopy(net).double(), norm(image, B).double()), rtol)


# ---------------------------------------------------------------- half precision, random numbers

@pytest.mark.parametrize('order', ['before', 'after'])
def test_the_teacher_runs_under_the_learners_autocast(recording, order):
    spy,kd = Spy(),KnowledgeDistillation(plainly(recording), .7)
    learn = trained([kd, CPUAutocast(), spy] if order == 'before' else [CPUAutocast(), spy, kd])
    assert {o.out.dtype for o in Recording.log} == {bf16}
    assert all(o.loss.isfinite() and o.loss.dtype == f32 for o in spy.steps)
    for o,seen in zip(spy.steps, Recording.log):
        assert o.loss.item() == pytest.approx(ref.kd(o.pred.float(), o.y, [seen.out.float()], .7)[0], rel=1e-5)
    assert not torch.is_autocast_enabled('cpu')
    Recording.log = []
    learn.remove_cb(CPUAutocast)
    learn.fit(1)
    assert {o.out.dtype for o in Recording.log} == {f32}

@pytest.mark.parametrize('dtype', [f64, f32, f16, bf16], ids=str)
@pytest.mark.parametrize('fast', [True, False])
def test_a_teacher_of_any_type_under_autocast(dtype, fast):
    spy = Spy()
    trained([KnowledgeDistillation(NetworkTeacher(network().to(dtype), fast=fast), .7), CPUAutocast(), spy], 1)
    full = network()
    for o in spy.steps: assert o.loss.item() == pytest.approx(ref.kd(o.pred.float(), o.y, [says(full, o.x)], .7)[0], rel=.1)

@pytest.mark.parametrize('fast', [True, False])
def test_half_precision_trains_about_the_same(fast):
    half,full = (trained([KnowledgeDistillation(NetworkTeacher(network(), fast=fast), .7), *o], 1, model_fn=plain_net) for o in ([CPUAutocast()], []))
    assert_close(half, full, .02)
    assert not same(half, full)
    assert same(trained([KnowledgeDistillation(network(), 0.), CPUAutocast()], 1), trained([CPUAutocast()], 1))

def test_autocast_ends_when_the_teacher_raises():
    learn = learner([KnowledgeDistillation(plainly(Faulty(lambda z: throw(Boom('full'))(), 2))), CPUAutocast()])
    with pytest.raises(Boom): learn.fit(1)
    assert not torch.is_autocast_enabled('cpu') and torch.is_grad_enabled() and not torch.is_inference_mode_enabled()

class Draws(Callback):
    "The global generators after each batch, and the student's dropout masks"
    order = 1000
    def before_fit(self):
        self.states,self.masks = [],[]
        self.hook = self.learn.model[3].register_forward_hook(lambda m, i, o: self.masks.append((o != 0).clone()))
    def after_batch(self): self.states.append(rng_state())
    def after_fit(self): self.hook.remove()

@pytest.mark.parametrize('make', [lambda: NetworkTeacher(network()), lambda: plainly(network()), lambda: EnsembleTeacher([network(), network(seed=3)])],
                         ids=['fast', 'plain', 'ensemble'])
def test_no_random_number_is_consumed(make):
    ours,plain = Draws(),Draws()
    learn = learner()
    learn.model[0].weight.requires_grad_(False)   # so that both see the same activations below dropout
    learn.fit(2, cbs=[plain])
    trained([KnowledgeDistillation(make(), .5)], fit_cbs=[ours])
    for a,b in zip(plain.states, ours.states, strict=True): assert torch.equal(a[0], b[0]) and a[1:] == b[1:]
    assert torch.equal(plain.masks[0], ours.masks[0])

def test_making_and_attaching_a_teacher_consumes_no_random_number():
    learn = learner()
    before = rng_state()
    KnowledgeDistillation(network())
    logits_of(NetworkTeacher(network()), learn, torch.zeros(4, 3, 8, 8))
    same_rng(before)
