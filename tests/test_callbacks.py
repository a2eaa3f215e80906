"""The callbacks `Distill`, `LsrKD`, `TfKDReg` and the controls, in everything that fastai does with a callback.

Numbers come from `reference.py` (float64 NumPy) or from plain PyTorch loops. Each `test_pitfall_NN_…` guards one habit of fastai that
callbacks are known to break, named after it.
"""
import copy, math, pickle, random, sys, warnings
from functools import lru_cache, partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np, pandas as pd, pytest, torch, torch.nn.functional as F
import matplotlib
matplotlib.use('agg')
from fastai.basics import (
    BCEWithLogitsLossFlat, Callback, CrossEntropyLossFlat, DataLoader, DataLoaders, Learner, MSELossFlat, SGD, TensorImage, accuracy, load_learner)
from fastai.callback.all import (
    CSVLogger, CutMix, EarlyStoppingCallback, FetchPredsCallback, GradientAccumulation, GradientClip, MixedPrecision, MixUp, ProgressCallback,
    SaveModelCallback, SchedCos, SchedLin, ShowGraphCallback)
from fastai.interpret import ClassificationInterpretation
from fastai.learner import CancelBatchException, CancelFitException
from fastai.losses import LabelSmoothingCrossEntropyFlat
from fastai.vision import learner as _   # registers how images' losses are plotted
from hypothesis import given, settings, strategies as st
from torch import nn
from torchvision.models import resnet18

sys.path.insert(0, str(Path(__file__).parent))
import reference as ref
from networks import CPUAutocast
from fastkdtf.vision.data import kd_dataloaders
from fastkdtf.callback.distill import Distill, LsrKD, ScaledCE, ScaledLS, TfKDReg, matched_controls
from fastkdtf.losses import LsrKDLoss, TfKDRegLoss
from fastkdtf.callback.checkpoint import Checkpoint, seed_run
from fastkdtf.targets import TeacherCorrection
from fastkdtf.teachers.base import UniformTeacher, VirtualTeacher
from fastkdtf.callback.term import LossTerm

K = 10


@pytest.fixture(autouse=True)
def in_tmp_path(tmp_path, monkeypatch):
    "Learners save below the working directory"
    monkeypatch.chdir(tmp_path)


# ---------------------------------------------------------------- methods

class LinearTeacher:
    "A frozen network on the student's batch; `n` of them give `[n,N,K]`"
    def __init__(self, n=None, k=K):
        gen = torch.Generator().manual_seed(5)
        self.w,self.n,self.calls = torch.randn(n or 1, 3*8*8, k, generator=gen)/4, n, 0
    def __call__(self, step):
        self.calls += 1
        zt = step.xb[0].flatten(1) @ self.w
        return zt if self.n else zt[0]

METHODS = {   # name -> how to make the callback (given alpha), the reference's terms
    'LsrKD':            (LsrKD, ref.lsr_kd),
    'LsrKD-TC':         (partial(LsrKD, gamma=.25), partial(ref.lsr_kd, gamma=.25)),
    'TfKDReg':          (TfKDReg, ref.tf_kd_reg),
    'TfKDReg-printed':  (partial(TfKDReg, scale=1), partial(ref.tf_kd_reg, scale=1)),
    'TfKDReg-official': (partial(TfKDReg, variant='official', multiplier=5.), partial(ref.tf_kd_reg, variant='official', multiplier=5.)),
    'ScaledLS':         (lambda alpha=.1: ScaledLS(alpha), ref.label_smoothing),
}
MAKERS = {**{k: m for k,(m,_) in METHODS.items()}, 'Distill-network': lambda alpha=.5: Distill(LinearTeacher(), alpha),
          'Distill-ensemble': lambda alpha=.5: Distill(LinearTeacher(3), alpha, tau=(2., 3.), scale='tau')}
each_method = pytest.mark.parametrize('method', METHODS)
every_maker = pytest.mark.parametrize('method', MAKERS)

def terms_of(method, y, alpha=.1, n_classes=K):
    "The reference's two terms: hard with its weight, soft with its weight"
    return METHODS[method][1](alpha=alpha)(np.asarray(y), n_classes)

def mean_loss(z, term, weight=None):
    "Mean over the samples of one reference term, of weight 1 unless given"
    return ref.evaluate(np.asarray(z), [term._replace(weight=term.weight if weight is None else weight)])[0].mean()


# ---------------------------------------------------------------- learners on digits

@lru_cache
def digits(bs=48, n=192): return kd_dataloaders('digits', bs=bs, train_subset=n, device='cpu')

def conv_net():
    return nn.Sequential(nn.Conv2d(3, 4, 3, 2, 1), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(.2), nn.Flatten(), nn.Linear(64, K))

def no_dropout(): return nn.Sequential(*[o for o in conv_net() if not isinstance(o, nn.Dropout)])

def plain_net():
    "No BatchNorm, no dropout: what a step does depends on nothing but the batch"
    return nn.Sequential(nn.Flatten(), nn.Linear(192, 12), nn.Tanh(), nn.Linear(12, K))

def digits_learner(cbs=(), model_fn=conv_net, seed=0, dls=None, metrics=accuracy, **kwargs):
    dls = dls or digits()
    seed_run(seed, dls)
    kwargs = {'loss_func': CrossEntropyLossFlat(), 'opt_func': partial(SGD, mom=.9), 'lr': .05, **kwargs}
    learn = Learner(dls, model_fn(), metrics=metrics, cbs=cbs, **kwargs)
    seed_run(seed+1, dls)
    return learn.remove_cb(ProgressCallback)

def trained(cbs=(), n_epoch=2, fit_cbs=(), **kwargs):
    learn = digits_learner(cbs, **kwargs)
    learn.fit(n_epoch, cbs=fit_cbs)
    return learn

def weights(learn): return {k: v.clone() for k,v in learn.model.state_dict().items()}

def assert_same(a, b, msg=''):
    "Bit for bit"
    a,b = (weights(o) if isinstance(o, Learner) else o for o in (a, b))
    assert a.keys() == b.keys()
    for k in a: assert torch.equal(a[k], b[k]), f'{k} {msg}'

def assert_differ(a, b): assert any(not torch.equal(o, p) for o,p in zip(weights(a).values(), weights(b).values()))

def assert_close(a, b, atol=2e-6):
    a,b = (weights(o) if isinstance(o, Learner) else o for o in (a, b))
    for k in a: torch.testing.assert_close(a[k], b[k], atol=atol, rtol=1e-5, msg=lambda m: f'{k}: {m}')

def metric_names(learn): return list(learn.metrics.attrgot('name'))

def column(learn, name): return [o[learn.recorder.metric_names.index(name)-1] for o in learn.recorder.values]


class Spy(Callback):
    "What the step holds after our term and before GradientAccumulation and the scaler"
    order,run_valid = 5.5,False
    def before_fit(self): self.steps = []
    def after_loss(self):
        mix = getattr(self.learn.loss_func, '__self__', None)
        self.steps.append(SimpleNamespace(
            x=self.learn.xb[0].clone(), y=self.learn.y.clone(), z=self.learn.pred.detach().clone(), loss_grad=self.learn.loss_grad.detach().clone(),
            loss=self.learn.loss.detach().clone(), types=(type(self.learn.loss_grad), type(self.learn.loss)), pct=self.learn.pct_train,
            lam=getattr(mix, 'lam', None), y1=getattr(mix, 'yb1', (None,))[0]))
    def before_step(self): self.steps[-1].grads = [p.grad.clone() for p in self.learn.model.parameters()]


class Stop(Callback):
    "Ctrl-C, or another error, the `at`-th time that `event` happens"
    order = 2000
    def __init__(self, event, at=1, error=KeyboardInterrupt, order=2000): self.event,self.at,self.error,self.seen,self.order = event,at,error,0,order
    def __call__(self, event_name):
        if event_name != self.event or (event_name == 'before_batch' and not self.training): return
        self.seen += 1
        if self.seen == self.at: raise self.error()


# ---------------------------------------------------------------- one step on given logits

class Logits(nn.Module):
    "A 'network' whose only parameter are its logits, so that its gradient is the loss's with respect to them"
    def __init__(self, z, wrap=lambda z: z):
        super().__init__()
        self.z,self.wrap = nn.Parameter(z.clone()),wrap
    def forward(self, x): return self.wrap(self.z[:len(x)])

def logits(*shape, spread=2., seed=0): return spread*torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
def labels(n_classes, *shape, seed=1): return torch.randint(n_classes, shape, generator=torch.Generator().manual_seed(seed))

def one_batch_learner(z, y, cbs=(), loss_func=None, wrap=lambda z: z, metrics=None):
    dls = DataLoaders([(torch.zeros(len(z), 1, 4, 4), y)], [(torch.zeros(len(z), 1, 4, 4), y)])
    learn = Learner(dls, Logits(z, wrap), loss_func=loss_func or CrossEntropyLossFlat(), opt_func=SGD, lr=0., metrics=metrics, cbs=cbs, path='.')
    return learn.remove_cb(ProgressCallback)

def one_step(cb, z, y, loss_func=None, cbs=(), seed=0, **kwargs):
    "The spied step, with `grad`, the loss's gradient with respect to the logits"
    spy = Spy()
    learn = one_batch_learner(z, y, [*([] if cb is None else [cb]), *cbs, spy], loss_func, **kwargs)
    torch.manual_seed(seed)
    with learn.no_logging(): learn.fit(1)
    step = spy.steps[0]
    step.grad,step.columns = step.grads[0],dict(zip(learn.recorder.metric_names[1:], learn.recorder.values[0]))
    return step


# ---------------------------------------------------------------- composition

@every_maker
@pytest.mark.parametrize('mixup', [False, True], ids=['plain', 'MixUp'])
def test_alpha_0_is_bit_identical_to_no_callback(method, mixup):
    extra = lambda: [MixUp(.4)] if mixup else []
    plain,ours = trained(extra(), 3),trained([MAKERS[method](alpha=0.)] + extra(), 3)
    assert_same(plain, ours)
    for a,b in zip(plain.recorder.values, ours.recorder.values): assert list(a)[:3] == list(b)[:3]   # train_loss, valid_loss, accuracy
    assert plain.recorder.losses == ours.recorder.losses

@every_maker
def test_each_method_does_change_training(method): assert_differ(trained([MAKERS[method]()], 1), trained((), 1))

@pytest.mark.parametrize('first,second', [('LsrKD', 'TfKDReg'), ('LsrKD-TC', 'Distill-network'), ('TfKDReg-official', 'Distill-ensemble'), ('ScaledLS', 'LsrKD')])
@pytest.mark.parametrize('mixup', [False, True], ids=['plain', 'MixUp'])
def test_order_of_callbacks_never_matters(first, second, mixup):
    extra = [MixUp] if mixup else []
    make = lambda nm: MAKERS[nm](alpha=.3)
    a = trained([make(first), make(second)] + extra)
    assert_same(a, trained(extra + [make(second), make(first)]))
    assert_same(a, trained([make(second)] + extra, fit_cbs=[make(first)]), 'with one given to fit')
    assert_differ(a, trained([make(first)] + extra))

def test_three_of_one_class_with_names_in_any_order():
    make = [lambda n=n,t=t: LsrKD(.2, tau=t, name=n) for n,t in zip('abc', (1., 3., 7.))]
    runs = [trained([make[i]() for i in order], 1) for order in ((0, 1, 2), (2, 0, 1), (1, 2, 0))]
    assert_same(runs[0], runs[1]), assert_same(runs[0], runs[2])
    assert runs[0].b.temperatures(0.) == (3., 3.)
    assert runs[0].recorder.metric_names[4:8] == ['base_loss', 'a_loss', 'b_loss', 'c_loss']

def test_two_methods_add_up():
    z,y = logits(12, K),labels(K, 12)
    base = one_step(None, z, y)
    steps = [one_step(MAKERS[o](alpha=.3), z, y) for o in ('LsrKD', 'TfKDReg')]
    both = one_step(LsrKD(.3), z, y, cbs=[TfKDReg(.3)])
    torch.testing.assert_close(both.loss_grad, base.loss_grad + sum(o.loss_grad-base.loss_grad for o in steps))
    torch.testing.assert_close(both.grad, base.grad + sum(o.grad-base.grad for o in steps))

def test_callbacks_that_do_not_run_are_left_out():
    off = LsrKD(.5)
    off.run = False
    z,y = logits(12, K),labels(K, 12)
    step = one_step(off, z, y, cbs=[TfKDReg(.3)])
    assert torch.equal(step.grad, one_step(TfKDReg(.3), z, y).grad) and 'soft_loss' in step.columns


# ---------------------------------------------------------------- validation and columns

@every_maker
def test_pitfall_01_valid_loss_and_metrics_are_the_learners_own(method):
    ours = trained([MAKERS[method](alpha=.6)])
    plain = digits_learner()
    plain.model.load_state_dict(ours.model.state_dict())
    expected = list(plain.validate())
    assert [column(ours, 'valid_loss')[-1], column(ours, 'accuracy')[-1]] == expected and len(expected) == 2
    assert list(ours.validate()) == expected

def test_pitfall_01_no_term_in_validation():
    teacher = LinearTeacher()
    learn = digits_learner([Distill(teacher, .5)])
    learn.validate(), learn.get_preds(), learn.get_preds(ds_idx=0, with_loss=True)
    assert teacher.calls == 0
    learn.fit(2)
    assert teacher.calls == 2*len(learn.dls.train), 'the teacher sees training batches only, each once'

@pytest.mark.parametrize('how', ['Learner', 'fit', 'class', 'class-fit'])
def test_columns(how):
    cb = LsrKD if 'class' in how else LsrKD()
    learn = trained([cb], fit_cbs=[]) if how in ('Learner', 'class') else trained([], fit_cbs=[cb])
    assert list(learn.recorder.metric_names) == ['epoch', 'train_loss', 'valid_loss', 'accuracy', 'base_loss', 'soft_loss', 'time']
    assert all(len(o) == 5 and all(isinstance(v, float) or torch.is_tensor(v) for v in o) for o in learn.recorder.values)
    assert metric_names(learn) == ['accuracy']
    assert len(learn.validate()) == 2
    assert_same(learn, trained([LsrKD()]), how)

def uneven_dls(n=40, bs=16, seed=3):
    gen = torch.Generator().manual_seed(seed)
    items = [(torch.randn(3, 8, 8, generator=gen), int(i)) for i in torch.randint(K, (n+20,), generator=gen)]
    return DataLoaders(DataLoader(items[:n], bs=bs, shuffle=True), DataLoader(items[n:], bs=bs), device='cpu')

@each_method
def test_column_values_are_epoch_means_over_samples(method):
    spy = Spy()
    learn = trained([MAKERS[method](alpha=.3), spy], 2, dls=uneven_dls())
    assert [len(o.y) for o in spy.steps] == [16, 16, 8]*2
    for epoch in range(2):
        steps = spy.steps[3*epoch:3*epoch+3]
        terms = [terms_of(method, o.y, .3) for o in steps]
        n = np.array([len(o.y) for o in steps])
        base = np.array([mean_loss(o.z, t[0], 1.) for o,t in zip(steps, terms)])
        soft = np.array([mean_loss(o.z, t[1], 1.) for o,t in zip(steps, terms)])
        assert column(learn, 'base_loss')[epoch] == pytest.approx((base*n).sum()/40, rel=1e-5)
        assert column(learn, 'soft_loss')[epoch] == pytest.approx((soft*n).sum()/40, rel=1e-4, abs=1e-6)

def test_columns_of_two_methods():
    spy = Spy()
    learn = trained([TfKDReg(.3), LsrKD(.3), spy], 1)
    assert list(learn.recorder.metric_names[3:]) == ['accuracy', 'base_loss', 'lsr_kd_loss', 'tf_kd_reg_loss', 'time']
    for method,name in (('LsrKD', 'lsr_kd_loss'), ('TfKDReg', 'tf_kd_reg_loss')):
        expected = np.mean([mean_loss(o.z, terms_of(method, o.y)[1], 1.) for o in spy.steps])
        assert column(learn, name)[0] == pytest.approx(expected, rel=1e-4)

def test_the_logged_train_loss_is_the_mixture():
    spy = Spy()
    trained([LsrKD(.3), spy], 1)
    for o in spy.steps: assert torch.equal(o.loss, o.loss_grad)

def test_a_soft_loss_that_is_never_computed_shows_nan():
    learn = trained([LsrKD(0.)], 1)
    assert math.isnan(column(learn, 'soft_loss')[0]) and column(learn, 'base_loss')[0] > 0

def test_SaveModelCallback_monitors_soft_loss_and_pitfall_22_best_weights_stay():
    best = {}
    class Watch(Callback):
        order = 49.5
        def after_validate(self): best[self.epoch] = weights(self.learn)
    learn = trained([LsrKD(.9, tau=1.), Watch(), SaveModelCallback(monitor='soft_loss', comp=np.less)], 4)
    assert_same(weights(learn), best[int(np.argmin(column(learn, 'soft_loss')))])

def test_EarlyStoppingCallback_monitors_base_loss():
    learn = trained([LsrKD(), EarlyStoppingCallback(monitor='base_loss', min_delta=10., patience=1)], 5)
    assert len(learn.recorder.values) == 2 and metric_names(learn) == ['accuracy']

def test_CSVLogger():
    learn = trained([LsrKD(), CSVLogger()], 2)
    table = pd.read_csv('history.csv')
    assert list(table.columns) == list(learn.recorder.metric_names) and len(table) == 2
    assert np.allclose(table.soft_loss, column(learn, 'soft_loss'), rtol=1e-4)

def test_ShowGraphCallback_and_ProgressCallback():
    learn = digits_learner([LsrKD()])
    learn.add_cbs([ProgressCallback(), ShowGraphCallback()])
    learn.fit(2)
    learn.recorder.plot_loss()
    assert column(learn, 'soft_loss')[0] > 0

def test_Recorder_with_train_metrics():
    learn = digits_learner([LsrKD()])
    learn.recorder.train_metrics = True
    learn.fit(2)
    names = learn.recorder.metric_names
    assert list(names[1:-1]) == [f'{s}_{o}' for s in ('train', 'valid') for o in ('loss', 'accuracy', 'base_loss', 'soft_loss')]
    assert all(len(o) == 8 for o in learn.recorder.values)
    assert column(learn, 'train_soft_loss') == column(learn, 'valid_soft_loss') and metric_names(learn) == ['accuracy']

def test_columns_without_metrics():
    learn = trained([LsrKD()], 1, metrics=None)
    assert list(learn.recorder.metric_names[1:-1]) == ['train_loss', 'valid_loss', 'base_loss', 'soft_loss'] and len(learn.metrics) == 0


# ---------------------------------------------------------------- the gradient

@each_method
def test_pitfall_02_the_gradient_is_changed_not_only_the_log(method):
    z,y = logits(16, K),labels(K, 16)
    for alpha in (.1, .6, 1.):
        value,grad,size = ref.loss(z, y, METHODS[method][1](alpha=alpha))
        step = one_step(MAKERS[method](alpha=alpha), z, y)
        assert step.loss_grad.item() == pytest.approx(value, rel=1e-5, abs=1e-5)
        assert np.allclose(step.grad, grad, atol=1e-7 + 1e-5*size.max(), rtol=0)

def plain_soft_loss(method, z, y, alpha):
    "The whole loss in plain PyTorch, as one would write it by hand"
    n,k = z.shape
    hard = F.cross_entropy(z, y)
    if method.startswith('LsrKD'):
        gamma = .25 if 'TC' in method else 1/k
        t = torch.full((n, k), (1-gamma)/(k-1)).scatter_(1, y[:,None], gamma)
        return (1-alpha)*hard + alpha*3*F.kl_div(F.log_softmax(z/3, 1), t, reduction='batchmean')
    pd = torch.full((n, k), .01/(k-1)).scatter_(1, y[:,None], .99)
    if 'official' in method:   # `nn.KLDivLoss()` is the mean over samples and classes
        return (1-alpha)*hard + alpha*5*nn.KLDivLoss(reduction='mean')(F.log_softmax(z, 1), F.softmax(pd/20, 1))
    s = 1 if 'printed' in method else 400
    return (1-alpha)*hard + alpha*s*F.kl_div(F.log_softmax(z/20, 1), F.softmax(pd.log()/20, 1), reduction='batchmean')

@pytest.mark.parametrize('method', [o for o in METHODS if o != 'ScaledLS'])
@pytest.mark.parametrize('clip', [False, True], ids=['', 'GradientClip'])
def test_replay_in_plain_pytorch(method, clip):
    spy,alpha = Spy(),.3
    learn = digits_learner([MAKERS[method](alpha=alpha), spy] + [GradientClip(.3)]*clip, plain_net)
    model = copy.deepcopy(learn.model)
    opt = torch.optim.SGD(model.parameters(), lr=.05, momentum=.9)
    learn.fit(3)
    assert len(spy.steps) == 12
    norms = []
    for o in spy.steps:
        opt.zero_grad()
        plain_soft_loss(method, model(o.x), o.y, alpha).backward()
        if clip: norms.append(nn.utils.clip_grad_norm_(model.parameters(), .3))
        opt.step()
    assert not clip or max(norms) > .3, 'the threshold should have been reached'
    assert_close(learn, dict(model.state_dict()))

def test_replay_with_a_network_teacher():
    "Hinton et al.: `(1-α)·CE + α·τ²·KL`"
    spy,teacher = Spy(),LinearTeacher()
    learn = digits_learner([Distill(teacher, .9, tau=4.), spy], plain_net)
    model = copy.deepcopy(learn.model)
    opt = torch.optim.SGD(model.parameters(), lr=.05, momentum=.9)
    learn.fit(2)
    for o in spy.steps:
        opt.zero_grad()
        z,zt = model(o.x),o.x.flatten(1)@teacher.w[0]
        (.1*F.cross_entropy(z, o.y) + .9*16*F.kl_div(F.log_softmax(z/4, 1), F.softmax(zt/4, 1), reduction='batchmean')).backward()
        opt.step()
    assert_close(learn, dict(model.state_dict()))

@pytest.mark.parametrize('cb,loss', [(LsrKD(.3), LsrKDLoss(.3)), (LsrKD(.3, gamma=.25), LsrKDLoss(.3, gamma=.25)), (TfKDReg(.3), TfKDRegLoss(.3)),
                                     (TfKDReg(.3, variant='official', multiplier=5.), TfKDRegLoss(.3, variant='official', multiplier=5.))], ids=repr)
def test_loss_as_loss_func_trains_like_the_callback(cb, loss):
    z,y = logits(16, K),labels(K, 16)
    torch.testing.assert_close(one_step(cb, z, y).grad, one_step(None, z, y, loss).grad, atol=1e-7, rtol=1e-5)
    assert_close(trained([cb]), trained(loss_func=loss))
    assert_close(trained([cb, MixUp(.4)]), trained([MixUp(.4)], loss_func=loss))

unit = st.floats(0., 1.)
@settings(derandomize=True, max_examples=40, deadline=None)
@given(alpha=unit, tau=st.floats(.5, 30.), gamma=st.none() | st.floats(.01, .99), k=st.integers(2, 40), n=st.integers(1, 6), seed=st.integers(0, 99))
def test_property_LsrKD_is_the_weighted_sum(alpha, tau, gamma, k, n, seed):
    z,y = logits(n, k, seed=seed),labels(k, n, seed=seed)
    value,grad,size = ref.loss(z, y, ref.lsr_kd(alpha, tau, gamma))
    step = one_step(LsrKD(alpha, tau, gamma), z, y)
    assert step.loss_grad.item() == pytest.approx(value, rel=2e-5, abs=2e-5)
    assert np.abs(step.grad.numpy() - grad).max() <= 1e-5*size.max() + 1e-8

@settings(derandomize=True, max_examples=40, deadline=None)
@given(alpha=unit, tau=st.floats(1., 40.), a=st.floats(.5, .99), scale=st.sampled_from([1, 'tau', 'tau2', .7]), variant=st.sampled_from(['paper', 'official']),
       k=st.integers(2, 40), n=st.integers(1, 6), seed=st.integers(0, 99))
def test_property_TfKDReg_is_the_weighted_sum(alpha, tau, a, scale, variant, k, n, seed):
    m = 3. if variant == 'official' else 1.
    if variant == 'official': scale = 1
    z,y = logits(n, k, seed=seed),labels(k, n, seed=seed)
    value,grad,size = ref.loss(z, y, ref.tf_kd_reg(alpha, tau, a, scale, variant, m))
    step = one_step(TfKDReg(alpha, tau, a, scale, variant, m), z, y)
    weight = 1 + alpha*(tau**2 if scale == 'tau2' else 40)
    assert step.loss_grad.item() == pytest.approx(value, rel=2e-5, abs=1e-6*weight)
    assert np.abs(step.grad.numpy() - grad).max() <= 1e-5*size.max() + 1e-8

@settings(derandomize=True, max_examples=40, deadline=None)
@given(hard=unit, soft=st.floats(0., 4.), taus=st.tuples(st.floats(.5, 8.), st.floats(.5, 8.)), scale=st.sampled_from([1, 'tau', 'tau2', 2.5]),
       loss=st.sampled_from(['kl', 'ce']), copies=st.sampled_from([None, 1, 3]), variant=st.sampled_from(['paper', 'official']), seed=st.integers(0, 99))
def test_property_Distill_is_the_weighted_sum(hard, soft, taus, scale, loss, copies, variant, seed):
    n,k,m = 5,7,(2. if variant == 'official' else 1.)
    z,y,zt = logits(n, k, seed=seed),labels(k, n, seed=seed),logits(*((copies,) if copies else ()), n, k, seed=seed+1)
    step = one_step(Distill(lambda step: zt, (hard, soft), taus, scale, loss, variant=variant, multiplier=m), z, y)
    s = {'tau': taus[1], 'tau2': taus[1]**2}.get(scale, scale) * (m/k if variant == 'official' else 1)
    ts = [ref.softmax(o.double().numpy()/taus[0]) for o in (zt if copies else [zt])]
    terms = [ref.Term(hard, ref.one_hot(y.numpy(), k), 1., 'ce')] + [ref.Term(soft*s/len(ts), t, taus[1], loss) for t in ts]
    value,grad,size = ref.evaluate(z, terms)
    assert step.loss_grad.item() == pytest.approx(value.mean(), rel=2e-5, abs=2e-5)
    assert np.abs(step.grad.numpy() - grad/n).max() <= 1e-5*size.max()/n + 1e-8


# ---------------------------------------------------------------- controls

def real_logits(n=64, k=100):
    "Logits as a half-trained network has them: the label often first, mistakes among them"
    z,y = logits(n, k, spread=1.5),labels(k, n)
    z[torch.arange(n), y] += 6*torch.rand(n, generator=torch.Generator().manual_seed(2))
    return z,y

OFFICIAL = [('MobileNetV2', dict(alpha=.95, tau=40.), .160, .0595), ('ShuffleNetV2', dict(alpha=.95, tau=10.), .160, .0595),
            ('ResNet18', dict(alpha=.1, tau=20., multiplier=100.), .100, 1.0), ('GoogLeNet', dict(alpha=.1, tau=40., multiplier=50.), .053, .95)]

@pytest.mark.parametrize('args,eps,scale', [o[1:] for o in OFFICIAL], ids=[o[0] for o in OFFICIAL])
def test_training_with_the_control_is_indistinguishable(args, eps, scale):
    "Published settings of Tf-KD_reg are label smoothing, and the control is it exactly"
    z,y = real_logits()
    method = TfKDReg(**args, variant='official')
    d = method.describe(100)
    assert d.exact and d.epsilon == pytest.approx(eps, abs=6e-4) and d.scale == pytest.approx(scale, abs=6e-5)
    controls = matched_controls(method, 100)
    ls = [o for o in controls.values() if isinstance(o, ScaledLS)]
    assert len(ls) == 1
    grads = [one_step(o, z, y).grad for o in (method, ls[0])]
    assert torch.norm(grads[0]-grads[1])/torch.norm(grads[0]) < 2e-6
    by_torch = one_step(None, z, y, lambda p, t: d.scale*F.cross_entropy(p, t, label_smoothing=d.epsilon)).grad
    assert torch.norm(grads[0]-by_torch)/torch.norm(grads[0]) < 2e-6
    # label smoothing of the α that the setting would have with a uniform teacher is near, but not the same
    w = args['alpha']*args.get('multiplier', 1.)/100
    uniform = one_step(ScaledLS(w/(1-args['alpha']+w), 1-args['alpha']+w), z, y).grad
    assert 1e-6 < torch.norm(grads[0]-uniform)/torch.norm(grads[0]) < 1e-3

@pytest.mark.parametrize('make', [lambda: LsrKD(.3), lambda: LsrKD(.1, tau=8., gamma=.025), TfKDReg, lambda: TfKDReg(.4, tau=6.)])
def test_controls_of_softened_methods_match_at_uniform_predictions(make):
    n,k = 8,100
    y,method = labels(k, n),make()
    d = method.describe(k)
    ls = [o for o in matched_controls(method, k).values() if isinstance(o, ScaledLS)][0]
    assert not d.exact
    small = lambda eps: [one_step(o, eps*logits(n, k), y).grad for o in (method, ls)]
    a,b = small(0.)
    assert torch.norm(a-b)/torch.norm(a) < 2e-6
    a,b = small(3.)
    assert torch.norm(a-b)/torch.norm(a) > 1e-3, 'first order only'

def test_matched_controls_are_scaled_cross_entropy_and_scaled_smoothing():
    controls = matched_controls(TfKDReg(.95, 40., variant='official'), 100)
    ce,ls = (next(o for o in controls.values() if isinstance(o, c)) for c in (ScaledCE, ScaledLS))
    z,y = real_logits()
    plain = one_step(None, z, y)
    torch.testing.assert_close(one_step(ce, z, y).grad, .0595*plain.grad)
    torch.testing.assert_close(one_step(ls, z, y).grad, .0595*one_step(None, z, y, nn.CrossEntropyLoss(label_smoothing=.1596)).grad, rtol=1e-3, atol=1e-7)

@pytest.mark.parametrize('factor', [.05, 1., 3.])
def test_ScaledCE(factor):
    z,y = logits(16, K),labels(K, 16)
    plain = one_step(None, z, y)
    step = one_step(ScaledCE(factor), z, y)
    torch.testing.assert_close(step.grad, factor*plain.grad)
    torch.testing.assert_close(step.loss_grad, factor*plain.loss_grad)
    if factor == 1: assert_same(trained([ScaledCE()]), trained())

def test_ScaledLS_is_torchs_label_smoothing():
    z,y = logits(16, K),labels(K, 16)
    torch.testing.assert_close(one_step(ScaledLS(.3, .2), z, y).grad, .2*one_step(None, z, y, nn.CrossEntropyLoss(label_smoothing=.3)).grad)


# ---------------------------------------------------------------- fastai's other callbacks

@pytest.mark.parametrize('method', ['LsrKD', 'TfKDReg', 'Distill-network'])
def test_pitfall_03_GradientAccumulation(method):
    "6 micro-batches of 8 are one batch of 48"
    def run(bs, cbs):
        dls = digits()
        train = dls.train.new(bs=bs, shuffle=False)
        return trained([MAKERS[method](alpha=.5)] + cbs, 2, dls=DataLoaders(train, dls.valid, device='cpu'), model_fn=plain_net)
    big,small = run(48, []),run(8, [GradientAccumulation(48)])
    assert LossTerm.order < GradientAccumulation.order
    assert_close(big, small, atol=1e-6)
    assert_differ(big, run(48, [GradientAccumulation(96)]))

def test_pitfall_17_columns_count_batches_whose_step_is_skipped():
    spy = Spy()
    learn = trained([LsrKD(), spy, GradientAccumulation(100)], 1)
    assert len(spy.steps) == 4
    assert column(learn, 'soft_loss')[0] == pytest.approx(np.mean([mean_loss(o.z, terms_of('LsrKD', o.y)[1], 1.) for o in spy.steps]), rel=1e-4)

@pytest.mark.parametrize('mix', [MixUp, CutMix])
@each_method
def test_pitfall_13_MixUp_and_CutMix_blend_the_two_labels(method, mix):
    z,y = logits(16, K),labels(K, 16)
    step = one_step(MAKERS[method](alpha=.3), z, y, cbs=[mix()], seed=3)
    lam = np.broadcast_to(np.asarray(step.lam, np.float64), 16)
    assert not torch.equal(step.y, step.y1) and (0 < lam).all() and (lam < 1).any() and torch.equal(step.y, y)
    mixed = 0.
    for labels_,share in ((step.y, lam), (step.y1, 1-lam)):
        hard,soft = terms_of(method, labels_, .3)
        mixed = mixed + np.array([(share*ref.evaluate(z, [o])[0]).mean() for o in (hard, soft, soft._replace(weight=1.))])
    assert step.loss_grad.item() == pytest.approx(mixed[0]+mixed[1], rel=1e-5)
    assert step.columns['soft_loss'] == pytest.approx(mixed[2], rel=1e-4, abs=1e-6)

@pytest.mark.parametrize('mix', [MixUp, CutMix])
def test_pitfall_04_loss_func_is_left_alone_beside_MixUp(mix):
    for cbs in ([mix, LsrKD], [LsrKD, mix]):
        loss_func = CrossEntropyLossFlat()
        learn = digits_learner(cbs, loss_func=loss_func)
        learn.fit(1)
        assert learn.loss_func is loss_func and loss_func.reduction == 'mean'
        learn.fit(1)

def test_MixUp_of_a_network_teacher_sees_the_mixed_batch():
    seen = []
    class Teacher(LinearTeacher):
        def __call__(self, step):
            seen.append(step.xb[0].clone())
            return super().__call__(step)
    spy = Spy()
    trained([Distill(Teacher(), .5), MixUp(.4), spy], 1)
    for x in seen: assert any(torch.equal(x, o.x) for o in spy.steps)

def test_one_hot_labels_beside_MixUp():
    "fastai mixes labels that are no integers itself; the soft loss follows the mixture rule"
    z,y = logits(16, K),F.one_hot(labels(K, 16), K).float()
    step = one_step(TfKDReg(.3), z, y, nn.CrossEntropyLoss(), [MixUp()], seed=3)
    assert not torch.equal(step.y, y)
    value,grad,_ = ref.loss(z, step.y, ref.tf_kd_reg(.3))
    assert step.loss_grad.item() == pytest.approx(value, rel=1e-5)
    assert np.allclose(step.grad, grad, atol=1e-6)

@every_maker
def test_pitfall_12_half_precision(method):
    class Halves(Callback):
        order,seen = 0,set()
        def after_pred(self): self.seen.add(self.learn.pred.dtype)
    spy = Spy()
    trained([MAKERS[method](alpha=.3), CPUAutocast(), Halves(), spy], 2)
    assert torch.bfloat16 in Halves.seen, 'autocast was not on'
    for o in spy.steps:
        assert o.loss_grad.dtype == torch.float32 and o.loss_grad.isfinite()
        if method not in METHODS: continue
        hard,soft = terms_of(method, o.y, .3)
        assert o.loss_grad.item() == pytest.approx(mean_loss(o.z, hard)+mean_loss(o.z, soft), rel=1e-5, abs=1e-5)
    assert_same(trained([MAKERS[method](alpha=0.), CPUAutocast()], 1), trained([CPUAutocast()], 1))

@pytest.mark.parametrize('to', ['to_fp16', 'to_bf16', 'to_fp32', 'to_channelslast'])
@pytest.mark.filterwarnings('ignore:.*CUDA is not available.*', 'ignore:.*GradScaler.*')
def test_precision_and_memory_formats_of_fastai(to):
    plain = trained([LsrKD(.3)], model_fn=no_dropout)   # whose mask would follow the memory format
    learn = digits_learner([LsrKD(.3)], no_dropout)
    kwargs = dict(use_amp=False) if to == 'to_channelslast' else {}
    getattr(learn, to)(**kwargs)
    learn.fit(2)
    assert_close(learn, plain, atol=1e-5)


# ---------------------------------------------------------------- interrupts and fits after fits

EVENTS = [('before_fit', 1), ('before_epoch', 2), ('before_train', 1), ('before_batch', 3), ('after_pred', 2), ('after_loss', 3), ('before_step', 2),
          ('after_train', 1), ('before_validate', 1), ('after_validate', 2), ('after_epoch', 1), ('after_fit', 1)]

def check_usable(learn, n_columns=2):
    "A fit after an interrupt or an error has every column once and leaves nothing behind"
    loss_func = learn.loss_func
    seed_run(1, learn.dls)
    learn.fit(1)
    names = list(learn.recorder.metric_names)
    assert len(set(names)) == len(names) and len([o for o in names if o.endswith('_loss')]) == 2+n_columns
    assert metric_names(learn) == ['accuracy'] and learn.loss_func is loss_func
    assert len(learn.validate()) == 2

@pytest.mark.parametrize('how', ['Learner', 'fit'])
@pytest.mark.parametrize('event,at', EVENTS, ids=[o[0] for o in EVENTS])
def test_pitfall_05_ctrl_c_leaves_nothing_behind(event, at, how):
    ours = [LsrKD(.3), TfKDReg(.3)]
    learn = digits_learner(ours if how == 'Learner' else [])
    with pytest.raises(KeyboardInterrupt): learn.fit(2, cbs=[Stop(event, at)] + (ours if how == 'fit' else []))
    if how == 'fit':
        assert metric_names(learn) == ['accuracy']
        assert not learn._grab_cbs(LossTerm)
    assert len(learn.validate()) == 2, 'validation after an interrupt shows what it always shows'
    assert len(learn.get_preds()) == 2
    assert metric_names(learn) == ['accuracy']
    check_usable(learn, 3 if how == 'Learner' else 0)

def test_interrupted_and_fitted_again_trains_as_if_never_interrupted():
    learn = digits_learner([LsrKD(.3)])
    start = weights(learn)
    with pytest.raises(KeyboardInterrupt): learn.fit(2, cbs=[Stop('after_loss', 3)])
    learn.model.load_state_dict(start)
    seed_run(1, learn.dls)
    learn.fit(2, reset_opt=True)
    expected = digits_learner([LsrKD(.3)])
    seed_run(1, expected.dls)
    expected.fit(2)
    assert_same(learn, expected)

def test_cancelled_fit_restores_metrics():
    learn = digits_learner([LsrKD()])
    learn.fit(2, cbs=[Stop('after_loss', 2, CancelFitException)])
    assert metric_names(learn) == ['accuracy']
    learn.fit(1, cbs=[Stop('before_batch', 1, CancelBatchException)])
    assert metric_names(learn) == ['accuracy'] and column(learn, 'soft_loss')[0] > 0

def test_pitfall_11_lr_find_leaves_no_trace():
    def run(find):
        learn = digits_learner([LsrKD(SchedCos(0, .9), tau=SchedLin(1., 4.))])
        before = weights(learn)
        if find:
            learn.lr_find(num_it=8, show_plot=False)
            assert_same(before, weights(learn), 'comes back')
            assert metric_names(learn) == ['accuracy']
        seed_run(1, learn.dls)
        learn.fit(2, reset_opt=True)
        return learn
    a,b = run(True),run(False)
    assert_same(a, b)
    assert [list(o) for o in a.recorder.values] == [list(o) for o in b.recorder.values]

@pytest.mark.parametrize('way', ['fit_one_cycle', 'fit_flat_cos', 'fine_tune'])
def test_fastais_fits(way):
    def split(m): return [list(m[:2].parameters()), list(m[2:].parameters())]
    learns = []
    for cbs in ([], [LsrKD(0.)], [LsrKD(.3)]):
        learn = digits_learner(cbs, splitter=split)
        getattr(learn, way)(2, 1e-2)
        learns.append(learn)
        assert metric_names(learn) == ['accuracy']
    assert_same(learns[0], learns[1])
    assert_differ(learns[0], learns[2])

def test_schedules_restart_per_fit():
    spy = Spy()
    learn = digits_learner([LsrKD(SchedLin(0., .8)), spy])
    firsts = []
    for _ in range(2):
        learn.fit(1)
        firsts.append([o.pct for o in spy.steps])
    assert firsts[0] == firsts[1] and firsts[0][0] == 0

def test_freeze_and_unfreeze():
    def split(m): return [list(m[:2].parameters()), list(m[2:].parameters())]
    learn = digits_learner([LsrKD(.3)], splitter=split, train_bn=False)
    before = weights(learn)
    learn.freeze()
    learn.fit(1)
    assert torch.equal(before['0.weight'], learn.model[0].weight) and not torch.equal(before['5.weight'], learn.model[5].weight)
    learn.unfreeze()
    learn.fit(1)
    assert not torch.equal(before['0.weight'], learn.model[0].weight)

@pytest.mark.parametrize('make', [lambda: LsrKD(SchedCos(.1, .9)), lambda: TfKDReg(.3)])
@pytest.mark.parametrize('at', [3, 6])
def test_Checkpoint_resumes_as_if_undisturbed(tmp_path, make, at):
    expected = trained([make(), MixUp(.4)], 3)
    path = tmp_path/'ck.pth'
    with pytest.raises(KeyboardInterrupt): trained([make(), MixUp(.4)], 3, fit_cbs=[Checkpoint(path), Stop('before_batch', at)])
    resumed = trained([make(), MixUp(.4)], 3, fit_cbs=[Checkpoint(path)], seed=9)
    assert_same(resumed, expected)
    assert [list(o) for o in resumed.recorder.values] == [list(o) for o in expected.recorder.values]
    assert [o.item() for o in resumed.recorder.losses] == [o.item() for o in expected.recorder.losses]


# ---------------------------------------------------------------- prediction, export, inspection

def test_export_load_predict(tmp_path):
    learn = trained([LsrKD(.3), TfKDReg(.2)], 1)
    item = learn.dls.valid_ds.items[:3]
    expected = [learn.predict(o) for o in item]
    learn.export(tmp_path/'learn.pkl')
    loaded = load_learner(tmp_path/'learn.pkl')
    for o,(cls,i,probs) in zip(item, expected):
        got = loaded.predict(o)
        assert got[0] == cls and got[1] == i and torch.equal(got[2], probs)
    assert [type(o) for o in loaded.cbs if isinstance(o, LossTerm)] == [LsrKD, TfKDReg] and loaded.lsr_kd.weights(0.) == learn.lsr_kd.weights(0.)
    dl = loaded.dls.test_dl(learn.dls.valid_ds.items[:8])
    assert loaded.get_preds(dl=dl)[0].shape == (8, K)
    loaded.dls = learn.dls
    loaded.remove_cb(ProgressCallback)
    check_usable(loaded, 3), check_usable(learn, 3)

def test_pitfall_08_export_holds_no_more_than_the_plain_learner(tmp_path):
    for name,cbs in (('plain', []), ('ours', [LsrKD(.3), TfKDReg(.2)])): trained(cbs, 1).export(tmp_path/name)
    assert (tmp_path/'ours').stat().st_size < (tmp_path/'plain').stat().st_size + 8000

@every_maker
def test_pitfall_08_pickle_and_deepcopy_carry_settings_not_state(method):
    cb = MAKERS[method](alpha=.3)
    copies = [copy.deepcopy(cb), pickle.loads(pickle.dumps(cb))]
    expected = trained([cb], 1)
    copies.append(copy.deepcopy(cb))   # of one that is attached to a learner
    for o in copies: assert_same(trained([o], 1), expected)
    assert not {'base_mean', 'soft_mean'} & set(cb.__getstate__())

def test_a_used_callback_serves_another_learner():
    cb = LsrKD(.3)
    a = trained([], 1, fit_cbs=[cb])
    assert_same(trained([], 1, fit_cbs=[cb]), a)

def test_get_preds_with_and_without_labels():
    learn = trained([LsrKD(.3)], 1)
    plain = digits_learner()
    plain.model.load_state_dict(learn.model.state_dict())
    for o,p in zip(learn.get_preds(with_loss=True, with_decoded=True), plain.get_preds(with_loss=True, with_decoded=True)): assert torch.equal(o, p)
    items = learn.dls.valid_ds.items[:8]
    without = learn.get_preds(dl=learn.dls.test_dl(items))
    assert without[1] is None and torch.equal(without[0], plain.get_preds(dl=plain.dls.test_dl(items))[0])
    fresh = digits_learner([LsrKD(.3)])
    assert fresh.get_preds(dl=fresh.dls.test_dl(items))[1] is None   # no loss has ever been computed

def test_pitfall_15_losses_per_sample_stay_vectors():
    learn = trained([LsrKD(.3)], 1)
    preds,targs,losses = learn.get_preds(with_loss=True)
    assert losses.shape == targs.shape and torch.allclose(losses, -preds.log().gather(1, targs[:,None].as_subclass(torch.Tensor))[:,0], atol=1e-5)

def test_show_results_and_Interpretation():
    learn = trained([LsrKD(.3)], 1)
    learn.show_results(max_n=4)
    interp = ClassificationInterpretation.from_learner(learn)
    assert interp.confusion_matrix().sum() == len(learn.dls.valid_ds)
    assert len(interp.top_losses(5)[0]) == 5
    interp.plot_top_losses(4), interp.plot_confusion_matrix()
    check_usable(learn)

def test_summary():
    learn = digits_learner([LsrKD(.3)])
    assert 'LsrKD' in learn.summary()
    learn.fit(1)
    assert 'LsrKD' in learn.summary()
    check_usable(learn)

@pytest.mark.parametrize('fitted', [False, True])
def test_tta(fitted):
    learn = trained([LsrKD(.3)], 1) if fitted else digits_learner([LsrKD(.3)])
    preds,targs = learn.tta(n=2)
    assert preds.shape == (len(targs), K) and metric_names(learn) == ['accuracy']
    check_usable(learn)

def test_FetchPredsCallback_in_a_fit():
    learn = trained([LsrKD(.3)], 2, fit_cbs=[FetchPredsCallback()])
    assert all(len(o) == 5 for o in learn.recorder.values) and metric_names(learn) == ['accuracy']
    assert_same(trained([LsrKD(0.)], 2, fit_cbs=[FetchPredsCallback()]), trained([], 2, fit_cbs=[FetchPredsCallback()]))


# ---------------------------------------------------------------- the remaining pitfalls

@every_maker
def test_pitfall_06_one_forward_of_the_student_per_batch(method):
    learn = trained([MAKERS[method](alpha=.3)], 2)
    assert learn.model[1].num_batches_tracked == 2*len(learn.dls.train)

@every_maker
def test_pitfall_07_no_random_number_is_consumed(method):
    def draws(cbs):
        trained(cbs, 1)
        return random.random(), np.random.rand(), torch.rand(1).item()
    assert draws([MAKERS[method](alpha=.3)]) == draws([])

def test_pitfall_09_no_gradient_reaches_the_teacher():
    net = conv_net()
    class Careless:
        "Neither `no_grad` nor `detach`"
        def __call__(self, step): return net(step.xb[0])
    learn = trained([Distill(Careless(), .5)], 1)
    assert all(p.grad is None for p in net.parameters())
    assert all(p.grad is not None for p in learn.model.parameters())
    ours = {id(p) for p in learn.model.parameters()}
    assert {id(p) for p in learn.opt.all_params().itemgot(0)} == ours

def test_pitfall_10_the_learners_loss_stays_a_fastai_loss():
    loss_func = CrossEntropyLossFlat()
    learn = trained([LsrKD(.3)], 1, loss_func=loss_func)
    assert learn.loss_func is loss_func
    assert torch.allclose(learn.get_preds()[0].sum(1), torch.ones(1)), 'activation'

def test_pitfall_14_a_batch_outside_the_loop():
    teacher = LinearTeacher()
    class Outside(Callback):
        "As TensorBoardCallback does"
        order = 70
        def after_epoch(self):
            with torch.no_grad(): self.learn.one_batch(0, self.dls.valid.one_batch())
    learn = trained([Distill(teacher, .5), Outside()], 2)
    assert teacher.calls == 2*len(learn.dls.train)
    assert all(len(o) == 5 for o in learn.recorder.values)
    assert_same(trained([LsrKD(0.), Outside()], 2), trained([Outside()], 2))

def test_pitfall_16_parts_see_plain_tensors():
    seen = []
    class Teacher(LinearTeacher):
        def __call__(self, step):
            seen.append([type(step.xb[0]), type(step.z)])
            return super().__call__(step)
    ours,plain = Spy(),Spy()
    learn = trained([Distill(Teacher(), .5), ours], 1)
    trained([plain], 1)
    assert isinstance(learn.dls.one_batch()[0], TensorImage)
    assert seen and all(o == [torch.Tensor]*2 for o in seen)
    assert issubclass(plain.steps[0].types[0], torch.Tensor) and plain.steps[0].types[0] is not torch.Tensor
    assert all(o.types == (torch.Tensor, torch.Tensor) for o in ours.steps)    # so is the loss: fastai's subclass makes each operation slow

def test_pitfall_19_the_model_and_its_optimizer_are_left_alone():
    ours,plain = trained([LsrKD(.3), Distill(LinearTeacher(), .2)], 1),trained((), 1)
    assert ours.model.state_dict().keys() == plain.model.state_dict().keys()
    assert len(ours.opt.all_params()) == len(plain.opt.all_params())

def test_pitfall_20_nothing_of_learner_or_model_is_shadowed():
    class Crowded(nn.Sequential): alpha,tau,scale,teacher,loss,variant,settings,base_mean,soft_mean = range(9)
    with warnings.catch_warnings():
        warnings.filterwarnings('error', message='You are shadowing')
        learn = trained([LsrKD(.3), TfKDReg(.2)], 1)
    crowded = digits_learner([LsrKD(.3), TfKDReg(.2)], lambda: Crowded(*conv_net()))
    crowded.fit(1)
    assert_same(crowded, learn)

def test_pitfall_21_no_hooks_are_left():
    learn = digits_learner([LsrKD(.3)])
    with pytest.raises(KeyboardInterrupt): learn.fit(1, cbs=[Stop('after_loss', 2)])
    learn.fit(1)
    for m in learn.model.modules(): assert not (m._forward_hooks or m._forward_pre_hooks or m._backward_hooks)


# ---------------------------------------------------------------- base losses

def test_class_weights():
    "The base loss is the learner's own; the soft loss has no class weights"
    w = torch.linspace(.2, 2., K)
    z,y = logits(16, K),labels(K, 16)
    step = one_step(LsrKD(.3), z, y, CrossEntropyLossFlat(weight=w))
    soft = terms_of('LsrKD', y, .3)[1]
    assert step.loss_grad.item() == pytest.approx(.7*F.cross_entropy(z, y, weight=w).item() + mean_loss(z, soft), rel=1e-5)
    assert step.columns['base_loss'] == pytest.approx(F.cross_entropy(z, y, weight=w).item(), rel=1e-5)
    trained([LsrKD(.3), MixUp(.4)], 1, loss_func=CrossEntropyLossFlat(weight=w))

@pytest.mark.parametrize('loss_func,base', [
    (LabelSmoothingCrossEntropyFlat(eps=.1), lambda z, y: F.cross_entropy(z, y, label_smoothing=.1)),
    (nn.CrossEntropyLoss(), F.cross_entropy), (F.cross_entropy, F.cross_entropy), (lambda p, t: 2*F.cross_entropy(p, t), lambda z, y: 2*F.cross_entropy(z, y))],
    ids=['LabelSmoothing', 'nn.CrossEntropyLoss', 'function', 'lambda'])
def test_any_base_loss(loss_func, base):
    z,y = logits(16, K),labels(K, 16)
    step = one_step(LsrKD(.3), z, y, loss_func)
    assert step.loss_grad.item() == pytest.approx(.7*base(z, y).item() + mean_loss(z, terms_of('LsrKD', y, .3)[1]), rel=1e-5)
    if not hasattr(loss_func, 'y_int'): return
    mixed = one_step(LsrKD(.3), z, y, loss_func, [MixUp()])
    lam = mixed.lam.double().numpy()
    soft = sum((s*ref.evaluate(z, [terms_of('LsrKD', t, .3)[1]])[0]).mean() for t,s in ((mixed.y, lam), (mixed.y1, 1-lam)))
    assert mixed.columns['base_loss']*.7 + soft == pytest.approx(mixed.loss_grad.item(), rel=1e-5)

@pytest.mark.parametrize('make,mixup', [(CrossEntropyLossFlat, False), (CrossEntropyLossFlat, True), (nn.CrossEntropyLoss, False)])
def test_reduction_sum(make, mixup):
    z,y = logits(16, K),labels(K, 16)
    extra = lambda: [MixUp()] if mixup else []
    total,mean = (one_step(TfKDReg(.3), z, y, make(reduction=r), extra()) for r in ('sum', 'mean'))
    torch.testing.assert_close(total.loss_grad, 16*mean.loss_grad)
    torch.testing.assert_close(total.grad, 16*mean.grad)

@pytest.mark.parametrize('loss_func', [CrossEntropyLossFlat(ignore_index=3), nn.CrossEntropyLoss(ignore_index=3)], ids=['flat', 'torch'])
@pytest.mark.parametrize('method', ['LsrKD', 'TfKDReg', 'network'])
def test_ignore_index_counts_in_neither_term(loss_func, method):
    z,y = logits(16, K),labels(K, 16)
    assert 0 < (y == 3).sum() < 16
    zt = logits(16, K, seed=7)
    make = (lambda t: Distill(lambda step: t, .3)) if method == 'network' else (lambda t: MAKERS[method](alpha=.3))
    step,keep = one_step(make(zt), z, y, loss_func),y != 3
    expected = one_step(make(zt[keep]), z[keep], y[keep])
    torch.testing.assert_close(step.loss_grad, expected.loss_grad)
    torch.testing.assert_close(step.grad[keep], expected.grad)
    assert (step.grad[~keep] == 0).all()

@pytest.mark.parametrize('axis,shape', [(1, (4, K, 3, 2)), (-1, (4, 6, K)), (1, (4, K, 5))])
@pytest.mark.parametrize('method', ['LsrKD', 'LsrKD-TC', 'TfKDReg', 'network'])
def test_dense_predictions(axis, shape, method):
    z = logits(*shape)
    flat = lambda t: t.movedim(axis, -1).reshape(-1, K)
    y = labels(K, *[n for i,n in enumerate(shape) if i != axis%len(shape)])
    y.view(-1)[:3] = -100
    zt = logits(*shape, seed=7)
    to_axis_1 = lambda t: t.movedim(axis, 1)
    if method == 'network': dense,rows = Distill(lambda step: to_axis_1(zt), .3),Distill(lambda step: flat(zt)[keep], .3)
    else:                   dense,rows = (MAKERS[method](alpha=.3) for _ in range(2))
    keep = y.reshape(-1) != -100
    step = one_step(dense, z, y, CrossEntropyLossFlat(axis=axis))
    expected = one_step(rows, flat(z)[keep], y.reshape(-1)[keep])
    torch.testing.assert_close(step.loss_grad, expected.loss_grad)
    torch.testing.assert_close(flat(step.grad)[keep], expected.grad)

@each_method
def test_soft_labels_follow_the_mixture_rule(method):
    z,q = logits(16, K),logits(16, K, seed=4).softmax(1)
    value,grad,size = ref.loss(z, q, METHODS[method][1](alpha=.3))
    step = one_step(MAKERS[method](alpha=.3), z, q, nn.CrossEntropyLoss())
    assert step.loss_grad.item() == pytest.approx(value, rel=1e-5)
    assert np.allclose(step.grad, grad, atol=1e-5*size.max())
    onehot = F.one_hot(labels(K, 16), K).float()
    torch.testing.assert_close(one_step(MAKERS[method](alpha=.3), z, onehot, nn.CrossEntropyLoss()).grad, one_step(MAKERS[method](alpha=.3), z, labels(K, 16)).grad)

def test_labels_with_an_axis_of_one():
    z,y = logits(16, K),labels(K, 16)
    assert torch.equal(one_step(LsrKD(.3), z, y[:,None]).grad, one_step(LsrKD(.3), z, y).grad)


# ---------------------------------------------------------------- what Distill is given

def test_schedules_take_the_value_of_each_step():
    spy,sched = Spy(),SchedCos(0, .9)
    trained([LsrKD(sched, tau=SchedLin(1., 5.)), spy], 3)
    assert len(spy.steps) == 12
    for i,o in enumerate(spy.steps):
        a,tau = .45*(1 - math.cos(math.pi*i/12)), 1 + 4*i/12
        value,*_ = ref.loss(o.z, o.y, ref.lsr_kd(a, tau))
        assert o.loss_grad.item() == pytest.approx(value, rel=1e-5)

def test_schedules_of_a_pair():
    spy = Spy()
    trained([Distill(UniformTeacher(), (SchedLin(1., .5), SchedLin(0., 2.)), tau=(1., SchedLin(1., 3.)), scale='tau2'), spy], 1)
    for i,o in enumerate(spy.steps):
        hard,soft,tau = 1-.5*i/4, 2*i/4, 1+2*i/4
        expected = hard*F.cross_entropy(o.z, o.y) + soft*tau**2*F.kl_div(F.log_softmax(o.z/tau, 1), torch.full_like(o.z, 1/K), reduction='batchmean')
        torch.testing.assert_close(o.loss_grad, expected, rtol=1e-5, atol=1e-6)

def test_pair_alpha_leaves_the_hard_loss_whole():
    z,y,zt = logits(16, K),labels(K, 16),logits(16, K, seed=7)
    step = one_step(Distill(lambda s: zt, (1, 2.5), tau=2.), z, y)
    expected = F.cross_entropy(z, y) + 2.5*4*F.kl_div(F.log_softmax(z/2, 1), F.softmax(zt/2, 1), reduction='batchmean')
    torch.testing.assert_close(step.loss_grad, expected)

def test_custom_loss():
    z,y,zt = logits(16, K),labels(K, 16),logits(16, K, seed=7)
    seen = {}
    def jensen(zs, target):
        seen.update(zs=zs.detach().clone(), target=target.clone())
        return (F.softmax(zs, 1) - target).square().sum(1)
    step = one_step(Distill(lambda s: zt, .4, tau=(2., 5.), scale=3., loss=jensen), z, y)
    torch.testing.assert_close(seen['zs'], z/5), torch.testing.assert_close(seen['target'], F.softmax(zt/2, 1))
    torch.testing.assert_close(step.loss_grad, .6*F.cross_entropy(z, y) + .4*3*(F.softmax(z/5, 1)-F.softmax(zt/2, 1)).square().sum(1).mean())
    one_step(Distill(VirtualTeacher(.9), .4, tau=1., loss=jensen), z, y)
    torch.testing.assert_close(seen['target'], torch.full((16, K), .1/9).scatter(1, y[:,None], .9))

def test_several_teachers_average_their_losses():
    z,y,zt = logits(16, K),labels(K, 16),logits(3, 16, K, seed=7)
    step = one_step(Distill(lambda s: zt, .4, tau=2.), z, y)
    soft = sum(F.kl_div(F.log_softmax(z/2, 1), F.softmax(o/2, 1), reduction='batchmean') for o in zt)/3
    torch.testing.assert_close(step.loss_grad, .6*F.cross_entropy(z, y) + .4*4*soft)
    own = one_step(Distill(lambda s: zt, .4, tau=2., loss=lambda z, t: (t*(t.log() - z.log_softmax(1))).sum(-1)), z, y)   # `[n,N]`
    torch.testing.assert_close(own.loss_grad, step.loss_grad)

def test_sample_weight():
    z,y,zt = logits(16, K),labels(K, 16),logits(16, K, seed=7)
    def weight(step): return 1 - step.p.gather(1, step.y[:,None])[:,0]
    step = one_step(Distill(lambda s: zt, (1, 2.), tau=1., sample_weight=weight), z, y)
    w = 1 - F.softmax(z, 1).gather(1, y[:,None])[:,0]
    zz = z.clone().requires_grad_()
    loss = F.cross_entropy(zz, y) + 2*(w*F.kl_div(F.log_softmax(zz, 1), F.softmax(zt, 1), reduction='none').sum(1)).mean()
    loss.backward()
    torch.testing.assert_close(step.loss_grad, loss.detach())
    torch.testing.assert_close(step.grad, zz.grad)   # the weight is not differentiated

def test_sample_weight_that_forgets_to_detach_is_no_part_of_the_gradient():
    z,y,zt = logits(16, K),labels(K, 16),logits(16, K, seed=7)
    a,b = (one_step(Distill(lambda s: zt, .5, sample_weight=w), z, y) for w in (lambda s: s.z.softmax(1).amax(1), lambda s: s.z.detach().softmax(1).amax(1)))
    assert torch.equal(a.grad, b.grad)

def test_rewrites_apply_one_after_the_other():
    z,y,zt = logits(16, K),labels(K, 16),logits(16, K, seed=7)
    order = []
    def sharpen(target, step):
        order.append('sharpen')
        return target**2/(target**2).sum(1, keepdim=True)
    def halve(target, step):
        order.append('halve')
        return target/2 + .5/K
    step = one_step(Distill(lambda s: zt, .4, tau=2., rewrite=[sharpen, halve]), z, y)
    t = F.softmax(zt/2, 1)**2
    t = t/t.sum(1, keepdim=True)/2 + .5/K
    torch.testing.assert_close(step.loss_grad, .6*F.cross_entropy(z, y) + .4*4*F.kl_div(F.log_softmax(z/2, 1), t, reduction='batchmean'))
    assert order == ['sharpen', 'halve']

def test_TeacherCorrection_of_a_network_and_of_several():
    z,y,zt = logits(16, K),labels(K, 16),logits(2, 16, K, seed=7)
    step = one_step(Distill(lambda s: zt, .4, tau=2., rewrite=TeacherCorrection(.3)), z, y)
    soft = 0.
    for o in zt:
        q = F.softmax(o/2, 1)
        t = (.7*q/(1-q.gather(1, y[:,None]))).scatter(1, y[:,None], .3)
        soft = soft + F.kl_div(F.log_softmax(z/2, 1), t, reduction='batchmean')/2
    torch.testing.assert_close(step.loss_grad, .6*F.cross_entropy(z, y) + .4*4*soft)

def test_parts_see_one_step_object():
    z,y = logits(16, K),labels(K, 16)
    seen,shapes = [],[]
    def teacher(step):
        seen.append(step)
        shapes.append(step.xb[0].shape)
        return torch.zeros(16, K)
    one_step(Distill(teacher, .4, tau=(2., 3.), rewrite=lambda t, s: (seen.append(s), t)[1], sample_weight=lambda s: (seen.append(s), torch.ones(16))[1]), z, y)
    step = seen[0]
    assert all(o is step for o in seen) and len(seen) == 3
    assert torch.equal(step.y, y) and torch.equal(step.z.detach(), z) and step.tau == (2., 3.) and step.idx is None and shapes == [(16, 1, 4, 4)]
    torch.testing.assert_close(step.p, F.softmax(z/3, 1)), torch.testing.assert_close(step.pt, torch.full((16, K), .1))
    assert not step.p.requires_grad and step.z.requires_grad

def test_no_teacher_call_and_no_soft_loss_without_weight():
    teacher = LinearTeacher()
    def no_loss(*_): raise AssertionError('computed')
    trained([Distill(teacher, 0., loss=no_loss)], 1)
    trained([Distill(teacher, (1., 0.), loss=no_loss)], 1)
    assert teacher.calls == 0
    trained([Distill(teacher, lambda pct: .5 if pct > .6 else 0.)], 1)
    assert teacher.calls == 1, 'of four steps at 0, ¼, ½, ¾ only the last has weight'

def test_large_and_offset_logits():
    z,y = logits(16, K),labels(K, 16)
    for method in METHODS:
        step,shifted = one_step(MAKERS[method](alpha=.3), z*1e3, y),one_step(MAKERS[method](alpha=.3), z + 1e4, y)
        assert step.loss_grad.isfinite() and step.grad.isfinite().all()
        torch.testing.assert_close(shifted.grad, one_step(MAKERS[method](alpha=.3), z + 1e4 - 1e4, y).grad, rtol=1e-2, atol=1e-4)


# ---------------------------------------------------------------- bad input

@pytest.mark.parametrize('make,error,words', [
    (lambda: LsrKD(-.1), ValueError, 'alpha'), (lambda: LsrKD(1.1), ValueError, 'alpha'), (lambda: TfKDReg(float('nan')), ValueError, 'alpha'),
    (lambda: LsrKD('a'), TypeError, 'alpha'), (lambda: LsrKD(None), TypeError, 'alpha'), (lambda: LsrKD(True), TypeError, 'alpha'),
    (lambda: Distill(UniformTeacher(), (1., -1.)), ValueError, 'alpha'), (lambda: Distill(UniformTeacher(), (-.1, 1.)), ValueError, 'alpha'),
    (lambda: LsrKD(tau=0), ValueError, 'tau'), (lambda: LsrKD(tau=-1.), ValueError, 'tau'), (lambda: LsrKD(tau=float('inf')), ValueError, 'tau'),
    (lambda: Distill(UniformTeacher(), tau=(1., 0.)), ValueError, 'tau'), (lambda: TfKDReg(tau='hot'), TypeError, 'tau'),
    (lambda: LsrKD(gamma=0.), ValueError, 'gamma'), (lambda: LsrKD(gamma=1.), ValueError, 'gamma'), (lambda: TfKDReg(correct_prob=1.), ValueError, 'correct_prob'),
    (lambda: TfKDReg(variant='oficial'), ValueError, 'variant'), (lambda: TfKDReg(multiplier=2.), ValueError, 'multiplier'),
    (lambda: TfKDReg(variant='official', multiplier=0.), ValueError, 'multiplier'), (lambda: TfKDReg(scale='tau3'), ValueError, 'scale'),
    (lambda: Distill(UniformTeacher(), scale=-1), ValueError, 'scale'), (lambda: Distill(UniformTeacher(), loss='mse'), ValueError, 'loss'),
    (lambda: Distill(None), TypeError, 'teacher'), (lambda: Distill('resnet'), FileNotFoundError, 'a teacher is a module'), (lambda: Distill(3), TypeError, 'teacher'),
    (lambda: LsrKD(SchedLin(0., 1.2)), ValueError, 'alpha'), (lambda: LsrKD(SchedLin(-.2, 1.)), ValueError, 'alpha'),
    (lambda: LsrKD(tau=SchedLin(4., 0.)), ValueError, 'tau'), (lambda: Distill(UniformTeacher(), (1., SchedLin(1., -1.))), ValueError, 'alpha'),
    (lambda: LsrKD(lambda pct: -.5 if .2 < pct < .4 else .5), ValueError, 'alpha'), (lambda: LsrKD(tau=lambda pct: 0. if .2 < pct < .4 else 2.), ValueError, 'tau'),
    (lambda: ScaledCE(0.), ValueError, 'factor'), (lambda: ScaledLS(1.5), ValueError, 'epsilon'), (lambda: ScaledLS(.1, -1.), ValueError, 'factor'),
    (lambda: LsrKD().describe(1), ValueError, 'n_classes'), (lambda: LsrKD().describe(), ValueError, 'n_classes'),
    (lambda: Distill(UniformTeacher(), (.1, .2, .3)), ValueError, r'alpha must be .* the pair \(hard, soft\)'),
    (lambda: Distill(UniformTeacher(), tau=(1., 2., 3.)), ValueError, 'tau must be .* the pair'), (lambda: LsrKD(lambda pct: None), TypeError, 'alpha at 0 %'),
    (lambda: Distill(UniformTeacher(), rewrite='abc'), TypeError, 'rewrite must be a function'),
    (lambda: Distill(UniformTeacher(), rewrite=[TeacherCorrection]), TypeError, 'rewrite must be .*TeacherCorrection'),
    (lambda: Distill(UniformTeacher(), sample_weight=2), TypeError, 'sample_weight must be a function'),
    (lambda: Distill(UniformTeacher), TypeError, r'give UniformTeacher\(…\)'), (lambda: Distill(resnet18), TypeError, r'got resnet18, which makes one'),
])
def test_bad_arguments_are_refused_at_once(make, error, words):
    with pytest.raises(error, match=words): make()

@pytest.mark.parametrize('cbs,words', [
    ([LsrKD(.2), LsrKD(.2)], 'name='), ([Distill(UniformTeacher(), .2), Distill(VirtualTeacher(), .2)], 'EnsembleTeacher'),
    ([LsrKD(.2, name='a'), TfKDReg(.2, name='a')], 'name='), ([LsrKD(.6), TfKDReg(.6)], 'alpha'), ([LsrKD(SchedLin(0., .6)), TfKDReg(SchedLin(0., .6))], 'alpha'),
    ([LsrKD(.6, name='b'), TfKDReg(.5), ScaledCE(.95)], 'alpha'), ([ScaledCE(.3), LsrKD(.4)], 'alpha')])
@pytest.mark.parametrize('how', ['Learner', 'fit'])
def test_bad_combinations_are_refused_before_training(cbs, words, how):
    cbs = copy.deepcopy(cbs)
    learn = digits_learner(cbs if how == 'Learner' else [])
    before = weights(learn)
    with pytest.raises(ValueError, match=words): learn.fit(1, cbs=cbs if how == 'fit' else [])
    assert_same(before, weights(learn))
    learn.remove_cbs(list(learn._grab_cbs(LossTerm)))
    assert metric_names(learn) == ['accuracy']
    check_usable(learn, 0)

def test_a_callback_that_is_given_twice_is_refused_and_stays_where_it_was():
    cb = LsrKD(.2)
    learn = digits_learner([cb])
    with pytest.raises(ValueError, match="'lsr_kd' is among the callbacks twice"): learn.fit(1, cbs=cb)
    learn.fit(1)
    assert_same(learn, trained([LsrKD(.2)], 1))

def test_weights_that_add_up_to_one_are_fine():
    trained([LsrKD(.1, name=str(i)) for i in range(10)], 1)
    trained([LsrKD(SchedLin(1., 0.)), TfKDReg(SchedLin(0., 1.))], 1)
    trained([ScaledCE(3.), LsrKD(1.)], 1)

WRONG = {   # name: learner's loss, labels, logits' shape, wrap, callback, error, words
    'regression':   (MSELossFlat(), logits(8, 1), (8, 1), None, LsrKD, TypeError, 'regression'),
    'L1':           (nn.L1Loss(), logits(8, 3), (8, 3), None, LsrKD, TypeError, 'regression'),
    'multi-label':  (BCEWithLogitsLossFlat(), (logits(8, 3) > 0).float(), (8, 3), None, LsrKD, TypeError, 'multi-label'),
    'nothing':      (lambda p, t: F.cross_entropy(p[1], t), labels(3, 8), (8, 3), lambda z: ((), z), LsrKD, TypeError, 'tuple'),
    'one output':   (lambda p, t: F.binary_cross_entropy_with_logits(p[:,0], t.float()), labels(2, 8), (8, 1), None, LsrKD, ValueError, 'two outputs'),
    'no class axis': (lambda p, t: F.binary_cross_entropy_with_logits(p, t.float()), labels(2, 8), (8,), None, LsrKD, ValueError, r'\[N,K\]'),
    'integer logits': (lambda p, t: p.float().sum()*torch.ones(1, requires_grad=True), labels(3, 8), (8, 3), lambda z: z.long(), LsrKD, TypeError, 'floating'),
    'label shape':  (lambda p, t: F.cross_entropy(p, t[:,0]), labels(3, 8, 2), (8, 3), None, LsrKD, ValueError, 'labels'),
    'teacher shape':    (None, labels(3, 8), (8, 3), None, lambda: Distill(lambda s: torch.zeros(8, 4)), ValueError, 'teacher'),
    'teacher batch':    (None, labels(3, 8), (8, 3), None, lambda: Distill(lambda s: torch.zeros(7, 3)), ValueError, 'teacher'),
    'teacher ndim':     (None, labels(3, 8), (8, 3), None, lambda: Distill(lambda s: torch.zeros(2, 2, 8, 3)), ValueError, 'teacher'),
    'teacher returns None': (None, labels(3, 8), (8, 3), None, lambda: Distill(lambda s: None), TypeError, 'teacher'),
    'weights shape':    (None, labels(3, 8), (8, 3), None, lambda: Distill(UniformTeacher(), sample_weight=lambda s: torch.ones(8, 1)), TypeError, 'sample_weight.*got .8, 1.'),
    'weights are none': (None, labels(3, 8), (8, 3), None, lambda: Distill(UniformTeacher(), sample_weight=lambda s: 1.), TypeError, 'sample_weight.*got float'),
    'loss shape':       (None, labels(3, 8), (8, 3), None, lambda: Distill(UniformTeacher(), loss=lambda z, t: (z-t).square()), TypeError, 'loss.*got .8, 3.'),
    'rewrite shape':    (None, labels(3, 8), (8, 3), None, lambda: Distill(lambda s: torch.zeros(8, 3), rewrite=lambda t, s: t[:,:1]), TypeError, 'rewrite.*got .8, 1.'),
    'teacher returns a tuple': (None, labels(3, 8), (8, 3), None, lambda: Distill(lambda s: (torch.zeros(8, 3),)), TypeError, 'teacher'),
}
@pytest.mark.parametrize('case', WRONG)
@pytest.mark.parametrize('how', ['Learner', 'fit'])
def test_wrong_learners_and_teachers_are_refused_by_name(case, how):
    loss_func,y,shape,wrap,make,error,words = WRONG[case]
    cb = make()
    learn = one_batch_learner(logits(*shape), y, [cb] if how == 'Learner' else [], loss_func, wrap or (lambda z: z))
    with learn.no_logging():
        with pytest.raises(error, match=words): learn.fit(1, cbs=[cb] if how == 'fit' else [])
        if how == 'Learner': learn.remove_cb(cb)
        assert len(learn.metrics) == 0
        learn.fit(1)   # usable again
    assert list(learn.recorder.metric_names) == ['epoch', 'train_loss', 'valid_loss', 'time']

@pytest.mark.parametrize('how', ['stays', 'replaced'])
def test_after_an_error_the_callback_works_again(how):
    fail = [True]
    class Teacher(LinearTeacher):
        def __call__(self, step): return None if fail[0] else super().__call__(step)
    learn = digits_learner([Distill(Teacher(), .3)])
    with pytest.raises(TypeError, match='teacher'): learn.fit(1)
    fail[0] = False
    if how == 'replaced': learn.remove_cb(Distill).add_cb(LsrKD(.3))
    assert len(learn.validate()) == 2
    check_usable(learn)
