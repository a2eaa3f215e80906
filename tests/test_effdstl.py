"""`WSLLoss`, `CKMLoss`, the callbacks `WSL` and `CKM`, and `learn.fit_effdstl`, against `reference.py` (float64) and plain loops."""
import copy, math, pickle, sys, warnings
from functools import partial
from pathlib import Path

import numpy as np, pytest, torch, torch.nn.functional as F
from fastai.basics import Callback, DataLoader, DataLoaders, Learner, accuracy
from fastai.callback.all import MixUp, SchedCos
from fastai.learner import CancelFitException
from fastai.losses import CrossEntropyLossFlat
from torch import nn

sys.path.insert(0, str(Path(__file__).parent))
import reference as ref
from fastkdtf.core import Step
from fastkdtf.callback.distill import Distill
from fastkdtf.callback.effdstl import CKM, WSL
from fastkdtf.losses import CKMLoss, WSLLoss, wsl_settings
from fastkdtf.callback.checkpoint import seed_run
from fastkdtf.targets import Correct, SmoothTo, StudentAhead, WSLWeight
from fastkdtf.teachers.base import VirtualTeacher
from fastkdtf.callback.twostage import effdstl_stages

K = 5
some = lambda *shape, seed=0, scale=2.: torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)*scale
LOSSES = {'wsl': (WSLLoss, ref.wsl), 'ckm': (CKMLoss, ref.ckm)}
each_loss = pytest.mark.parametrize('name', LOSSES)

@pytest.fixture(autouse=True)
def in_tmp_path(tmp_path, monkeypatch): monkeypatch.chdir(tmp_path)


# ---------------------------------------------------------------- losses

@pytest.mark.parametrize('kwargs', [{}, dict(beta=.5, weight_tau=2., smoothing=.1), dict(beta=2.25, tau=4.), dict(beta=0.), dict(smoothing=1.)])
def test_wsl_value_and_gradient(kwargs):
    z,zt,y = some(40, K).requires_grad_(),some(40, K, seed=1),torch.arange(40)%K
    loss = WSLLoss(reduction='none', **kwargs)(z, y, zt)
    loss.sum().backward()
    value,grad,_ = ref.wsl(z.detach(), y.numpy(), zt, **kwargs)
    np.testing.assert_allclose(loss.detach(), value, rtol=1e-10)
    np.testing.assert_allclose(z.grad, grad, atol=1e-10)

@pytest.mark.parametrize('kwargs', [{}, dict(tau_teacher=1.), dict(tau_teacher=.8, tau_student=2., smooth_to=.9), dict(smooth_to=1.)])
def test_ckm_value_and_gradient(kwargs):
    z,zt,y = some(40, K).requires_grad_(),some(40, K, seed=1),torch.arange(40)%K
    loss = CKMLoss(reduction='none', **kwargs)(z, y, zt)
    loss.sum().backward()
    value,grad,_ = ref.ckm(z.detach(), y.numpy(), zt, **kwargs)
    np.testing.assert_allclose(loss.detach(), value, rtol=1e-10)
    np.testing.assert_allclose(z.grad, grad, atol=1e-10)

def test_numbers_worked_out_by_hand():
    "One sample, three classes, everything a logarithm of a small fraction"
    z,zt,y = torch.tensor([[.5,.25,.25]]).log(),torch.tensor([[.25,.25,.5]]).log(),torch.tensor([0])
    w = 1-math.exp(-math.log(2)/math.log(4))   # ln 2 over ln 4: 1 - e^{-1/2}
    assert WSLWeight()(Step(y, z, zt=zt)).item() == pytest.approx(1-math.exp(-.5), rel=1e-5)
    soft = -(.25*math.log(.5) + .75*math.log(.25))
    assert WSLLoss(tau=1.)(z, y, zt).item() == pytest.approx(math.log(2) + 2.5*w*soft, rel=1e-5)
    assert CKMLoss(tau_teacher=1.)(z, y, zt).item() == pytest.approx(soft, rel=1e-5)   # the teacher is wrong: as it is
    right = torch.tensor([[.4,.3,.3]]).log()   # right, and less sure
    assert CKMLoss(tau_teacher=1.)(z, y, right).item() == pytest.approx(-.99*math.log(.5) - .01*math.log(.25), rel=1e-5)

def test_the_two_codes_of_wsl_agree_at_temperature_1_only():
    z,zt,y = some(64, 10),some(64, 10, seed=1),torch.arange(64)%10
    pair = lambda tau: [WSLLoss(tau=tau, weight_tau=o)(z, y, zt).item() for o in (1., tau)]
    same,other = pair(1.),pair(2.)
    assert same[0] == same[1] and abs(other[0]-other[1]) > .01*other[0]
    for tau in (1., 2.):   # as the two codes have them
        ce = lambda a, t: F.cross_entropy(a/t, y, reduction='none')
        soft = F.cross_entropy(z/tau, F.softmax(zt/tau, 1), reduction='none')
        zhou = F.cross_entropy(z, y) + 2.5*tau**2*((1-torch.exp(-ce(z, 1)/(ce(zt, 1)+1e-7)))*soft).mean()
        song = F.cross_entropy(z, y, label_smoothing=.1) + .5*tau**2*((1-torch.exp(-ce(z, tau)/ce(zt, tau)))*soft).mean()
        torch.testing.assert_close(WSLLoss.published('wsl', tau=tau)(z, y, zt), zhou)
        torch.testing.assert_close(WSLLoss.published('effdstl', tau=tau, weight_tau=tau)(z, y, zt), song, atol=1e-6, rtol=1e-6)

def test_published_settings():
    assert wsl_settings == {'wsl': dict(beta=2.5, tau=2., weight_tau=1., smoothing=0.), 'wsl-cifar100': dict(beta=2.25, tau=4., weight_tau=1., smoothing=0.),
                            'effdstl': dict(beta=.5, tau=2., weight_tau=2., smoothing=.1)}
    assert WSLLoss.published('wsl').settings == WSLLoss().settings
    assert WSLLoss.published('effdstl', tau=3., ignore_index=7).settings == dict(beta=.5, tau=3., weight_tau=2., smoothing=.1)
    with pytest.raises(ValueError, match='setting must be one of'): WSLLoss.published('paper')

def test_wsl_becomes_plain_distillation_for_a_hopeless_student():
    zt,y = some(16, K, seed=1),torch.arange(16)%K
    zt = zt.scatter(1, y[:,None], 40.)   # the teacher knows
    z = some(16, K).scatter(1, y[:,None], -40.)
    soft = F.cross_entropy(z/2, F.softmax(zt/2, 1))
    torch.testing.assert_close(WSLLoss()(z, y, zt), F.cross_entropy(z, y) + 2.5*4*soft)

@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16, torch.float32])
def test_solved_samples_leave_no_nan(dtype):
    y = torch.arange(4)
    z = (F.one_hot(y, K)*200.).to(dtype).requires_grad_()
    for loss in (WSLLoss(), WSLLoss.published('effdstl'), CKMLoss()):
        value = loss(z, y, z.detach())
        value.backward()
        assert value.isfinite() and value.dtype == torch.float32 and z.grad.isfinite().all()
    assert WSLLoss()(z, y, z).item() == 0

@each_loss
def test_reductions_axis_and_ignored_positions(name):
    cls,reference = LOSSES[name]
    z,zt,y = some(2, 3, 4, K),some(2, 3, 4, K, seed=1),torch.arange(24).view(2, 3, 4)%K
    y[0,:,1:3] = 255
    keep = y != 255
    value = reference(z[keep], y[keep].numpy(), zt[keep])[0]
    loss = lambda r: cls(axis=-1, ignore_index=255, reduction=r)(z, y, zt)
    each = loss('none')
    assert each.shape == y.shape and (each[~keep] == 0).all()
    np.testing.assert_allclose(each[keep], value, rtol=1e-10)
    assert loss('mean').item() == pytest.approx(value.mean()) and loss('sum').item() == pytest.approx(value.sum())
    torch.testing.assert_close(cls(axis=1, ignore_index=255)(z.movedim(-1, 1), y, zt.movedim(-1, 1)), loss('mean'))

@each_loss
def test_label_distributions_are_the_mixture_of_their_classes(name):
    loss = LOSSES[name][0](reduction='none')
    z,zt,q = some(50, K),some(50, K, seed=1),torch.softmax(some(50, K, seed=2), 1)
    expected = sum(q[:,c]*loss(z, torch.full((50,), c), zt) for c in range(K))
    torch.testing.assert_close(loss(z, q, zt), expected)
    one_hot = F.one_hot(torch.arange(50)%K, K).double()
    torch.testing.assert_close(loss(z, one_hot, zt), loss(z, torch.arange(50)%K, zt), atol=1e-6, rtol=1e-6)

@each_loss
def test_several_teachers(name):
    loss = WSLLoss(weight_tau=2.) if name == 'wsl' else CKMLoss()
    z,zt,y = some(16, K),some(3, 16, K, seed=1),torch.arange(16)%K
    torch.testing.assert_close(loss(z, y, zt[:1]), loss(z, y, zt[0]))
    mean = (zt/2).softmax(2).mean(0).log()*2   # of WSL, the teacher is their mean distribution; of CKM, each has its own samples
    torch.testing.assert_close(loss(z, y, zt), loss(z, y, mean) if name == 'wsl' else sum(loss(z, y, o) for o in zt)/3)

@each_loss
def test_fastai_takes_it_as_a_loss(name):
    loss = LOSSES[name][0]()
    z = some(4, K)
    torch.testing.assert_close(loss.activation(z), z.softmax(1)), torch.testing.assert_close(loss.decodes(z), z.argmax(1))
    assert pickle.loads(pickle.dumps(loss)).settings == loss.settings and repr(loss).startswith(type(loss).__name__+'(')
    assert copy.deepcopy(loss)(z, torch.arange(4), z).isfinite() and loss.y_int

def test_describe():
    d = WSLLoss().describe(10)
    assert (d.hard, d.soft, d.tau, d.epsilon) == (1., 10., 2., None) and 'WSLLoss' in repr(d)
    assert (CKMLoss().describe(10).hard, CKMLoss().describe(10).soft) == (0., 1.)
    net = nn.Linear(4, 10)
    assert (WSL(net).describe(10).hard, WSL(net).describe(10).soft) == (1., 10.)
    assert CKM(net).describe(10).soft == 1. and 'CKM' in CKM(net).describe(10).title

@pytest.mark.parametrize('make,words', [
    (lambda: WSLLoss(beta=-1), 'beta'), (lambda: WSLLoss(tau=0), 'tau'), (lambda: WSLLoss(weight_tau=0), 'weight_tau'), (lambda: WSLLoss(smoothing=1.5), 'smoothing'),
    (lambda: CKMLoss(tau_teacher=0), 'tau_teacher'), (lambda: CKMLoss(tau_student=-1), 'tau_student'), (lambda: CKMLoss(smooth_to=0), 'smooth_to'),
    (lambda: WSL(nn.Linear(1, 2), beta=-1), 'beta'), (lambda: WSL(nn.Linear(1, 2), tau=0), 'tau'), (lambda: WSL(nn.Linear(1, 2), weight_tau=0), 'weight_tau'),
    (lambda: CKM(nn.Linear(1, 2), tau_teacher=0), 'tau_teacher'), (lambda: CKM(nn.Linear(1, 2), smooth_to=2), 'smooth_to'),
    (lambda: WSL.published('zhou', nn.Linear(1, 2)), 'setting')])
def test_bad_arguments(make, words):
    with pytest.raises(ValueError, match=words): make()

@each_loss
def test_bad_shapes(name):
    loss = LOSSES[name][0]()
    with pytest.raises(ValueError, match="student's shape"): loss(some(4, K), torch.arange(4), some(4, K+1))
    with pytest.raises(ValueError, match='labels'): loss(some(4, K), torch.arange(3), some(4, K))
    with pytest.raises(TypeError, match='tensor'): loss(some(4, K), torch.arange(4), None)


# ---------------------------------------------------------------- callbacks

class Blobs:
    "Points of `K` classes, as a data set"
    def __init__(self, n=96, seed=0):
        gen = torch.Generator().manual_seed(seed)
        self.y = torch.arange(n)%K
        self.x = torch.randn(n, 8, generator=gen) + 1.5*torch.eye(8)[self.y]
    def __len__(self): return len(self.y)
    def __getitem__(self, i): return self.x[i],self.y[i]

def loaders(bs=16):
    train = DataLoader(Blobs(), bs=bs, shuffle=True, num_workers=0, drop_last=True)
    dls = DataLoaders(train, DataLoader(Blobs(seed=1), bs=48, num_workers=0), device='cpu')
    dls.c = K
    return dls

def net(seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, K))

def learner(cbs=None, seed=0, bs=16, **kwargs):
    seed_run(0)
    dls = loaders(bs)
    seed_run(0, dls)
    return Learner(dls, net(seed), loss_func=kwargs.pop('loss_func', CrossEntropyLossFlat()), metrics=accuracy, cbs=cbs, **kwargs)

def quiet(learn, fit, *args, **kwargs):
    with learn.no_bar(), learn.no_logging(): getattr(learn, fit)(*args, **kwargs)
    return learn

TEACHER = None
def teacher():
    global TEACHER
    if TEACHER is None: TEACHER = quiet(learner(seed=7), 'fit', 3, 1e-2).model.eval()
    return TEACHER

class Look(Callback):
    "What the first training batch came to"
    order = 49
    def after_loss(self):
        y,p = self.learn.y,self.learn.pred.detach()
        self.seen = dict(loss=self.learn.loss_grad.item(), y=y, z=p, x=self.learn.x.clone(), mix=getattr(self.learn, 'mix_up', None) or getattr(self.learn, 'cut_mix', None))
        if self.seen['mix']: self.seen.update(lam=self.seen['mix'].lam.clone(), y1=self.seen['mix'].yb1[0].clone())
        raise CancelFitException

def first_batch(*cbs, **kwargs):
    look = Look()
    quiet(learner(**kwargs), 'fit', 1, cbs=[*cbs, look])
    with torch.no_grad(): look.seen['zt'] = teacher()(look.seen['x'])
    return look.seen

CALLBACKS = {'wsl': (WSL, WSLLoss()), 'effdstl': (partial(WSL.published, 'effdstl'), WSLLoss(beta=.5, weight_tau=2.)), 'ckm': (CKM, CKMLoss()),
             'ckm .8': (partial(CKM, tau_teacher=.8, smooth_to=.9), CKMLoss(.8, smooth_to=.9))}
each_callback = pytest.mark.parametrize('name', CALLBACKS)

@each_callback
def test_a_callback_trains_on_its_loss(name):
    make,loss = CALLBACKS[name]
    b = first_batch(make(teacher()))
    assert b['loss'] == pytest.approx(loss(b['z'], b['y'], b['zt']).item(), rel=1e-5)

@each_callback
def test_mixup_mixes_the_losses_of_both_labels(name):
    make,loss = CALLBACKS[name]
    b = first_batch(make(teacher()), MixUp())
    loss = copy.copy(loss)
    loss.reduction = 'none'
    expected = (b['lam']*loss(b['z'], b['y'], b['zt']) + (1-b['lam'])*loss(b['z'], b['y1'], b['zt'])).mean()
    assert b['loss'] == pytest.approx(expected.item(), rel=1e-5)

def test_ckm_is_distill_with_its_parts():
    "The same training, bit by bit"
    plain = lambda: Distill(teacher(), (0., 1.), (.7, 1.), scale=1, loss='ce', rewrite=SmoothTo(.99, on=Correct() & StudentAhead()))
    a,b = (quiet(learner(cb), 'fit', 2, 1e-2) for cb in (CKM(teacher()), plain()))
    assert all(torch.equal(p, q) for p,q in zip(a.model.parameters(), b.model.parameters()))
    assert [float(o) for o in a.recorder.losses] == [float(o) for o in b.recorder.losses]

def test_wsl_is_distill_with_its_weights():
    plain = lambda: Distill(teacher(), (1., 2.5), 2., loss='ce', sample_weight=WSLWeight())
    a,b = (quiet(learner(cb), 'fit', 2, 1e-2) for cb in (WSL(teacher()), plain()))
    assert all(torch.equal(p, q) for p,q in zip(a.model.parameters(), b.model.parameters()))

def test_without_weight_it_is_no_callback():
    a,b = (quiet(learner(cb), 'fit', 2, 1e-2) for cb in (WSL(teacher(), beta=0.), None))
    assert all(torch.equal(p, q) for p,q in zip(a.model.parameters(), b.model.parameters()))

def values(learn, row=-1): return dict(zip(learn.recorder.metric_names[1:-1], learn.recorder.values[row]))

class Gather(Callback):
    "The columns once more, from the batches"
    order,run_valid = 49,False
    def before_fit(self): self.rows = []
    def after_loss(self):
        z,y,zt = self.learn.pred.detach().double(),self.learn.y.numpy(),teacher()(self.learn.x).detach().double()
        tau = self.tau
        correct,ahead = ref.is_correct(zt, y),ref.is_ahead(z, zt, y, tau)
        self.rows += [dict(correct=c, student_ahead=a, mined=c and a, agreement=g, weight=w) for c,a,g,w in
                      zip(correct, ahead, z.argmax(1) == zt.argmax(1), ref.wsl_weights(z, zt, y))]
    def mean(self, k): return np.mean([float(o[k]) for o in self.rows])

@pytest.mark.parametrize('make,tau,names', [(WSL, (2., 2.), ['weight','correct','student_ahead','agreement']),
                                            (CKM, (.7, 1.), ['mined','correct','student_ahead','agreement'])])
def test_columns(make, tau, names):
    gather = Gather()
    gather.tau = tau
    learn = quiet(learner([make(teacher()), gather]), 'fit', 1, 1e-2)
    assert learn.recorder.metric_names[3:-1] == ['accuracy', 'base_loss', 'soft_loss', *names]
    seen = values(learn)
    for k in names: assert seen[k] == pytest.approx(gather.mean(k), abs=1e-5), k
    assert 0 < seen['correct'] < 1 and 0 < seen['student_ahead'] < 1

def test_columns_begin_anew_with_each_epoch_and_leave_with_the_fit():
    learn = quiet(learner(CKM(teacher())), 'fit', 12, 1e-2)
    agreement = [values(learn, i)['agreement'] for i in range(12)]
    assert agreement[-1] > agreement[0]+.2
    assert [o.name for o in learn.metrics] == ['accuracy']

def test_columns_under_mixup_count_each_label_by_its_share():
    class Sides(Callback):
        order,run_valid,mine = 49,False,[]
        def after_loss(self):
            mix,zt = self.learn.mix_up,teacher()(self.learn.x)
            right = lambda y: (zt.argmax(1) == y).float()
            self.mine.append(mix.lam*right(self.learn.y) + (1-mix.lam)*right(mix.yb1[0]))
    sides = Sides()
    seen = values(quiet(learner([CKM(teacher()), MixUp(), sides]), 'fit', 1, 1e-2))
    assert seen['correct'] == pytest.approx(torch.cat(sides.mine).mean().item(), rel=1e-4)
    assert 0 <= seen['mined'] <= min(seen['correct'], seen['student_ahead']) < 1

def test_ignored_positions_count_in_no_column():
    class Dense(nn.Module):
        def __init__(self): super().__init__(); self.net = net(3)
        def forward(self, x): return self.net(x)[:,:,None].expand(-1, -1, 3)
    class Positions(Blobs):
        def __getitem__(self, i): return self.x[i],torch.stack([self.y[i], self.y[i], torch.tensor(255)])
    wide = lambda step: torch.stack([teacher()(step.xb[0])]*3, 2)
    rows = {}
    for name,data,model,source,loss in (('dense', Positions, Dense(), wide, CrossEntropyLossFlat(axis=1, ignore_index=255)), ('flat', Blobs, net(3), teacher(), CrossEntropyLossFlat())):
        seed_run(0)
        dls = DataLoaders(DataLoader(data(), bs=32, num_workers=0), DataLoader(data(), bs=32, num_workers=0), device='cpu')
        learn = Learner(dls, model, loss_func=loss, cbs=WSL(source))
        rows[name] = values(quiet(learn, 'fit', 1, 0.))
    for k in ('weight', 'correct', 'student_ahead', 'agreement', 'soft_loss'): assert rows['dense'][k] == pytest.approx(rows['flat'][k], rel=1e-4), k

def test_a_label_only_teacher():
    seen = values(quiet(learner(CKM(VirtualTeacher(.9))), 'fit', 1, 1e-2))
    assert seen['correct'] == 1 and seen['mined'] == seen['student_ahead']

def test_validation_is_the_learners_own_and_a_pickle_leaves_the_teacher_out():
    learn = quiet(learner(CKM(teacher())), 'fit', 1, 1e-2)
    z,y = torch.cat([learn.model(x).detach() for x,_ in learn.dls.valid]),learn.dls.valid.dataset.y
    assert values(learn)['valid_loss'] == pytest.approx(F.cross_entropy(z, y).item(), rel=1e-5)
    assert len(pickle.dumps(CKM(nn.Linear(1000, 1000)))) < 10_000

def test_schedules_and_two_of_a_kind():
    quiet(learner(WSL(teacher(), beta=SchedCos(0., 2.), tau=SchedCos(4., 1.))), 'fit', 1, 1e-2)
    learn = quiet(learner([CKM(teacher()), WSL(net(5))]), 'fit', 1, 1e-2)
    assert sum(o.endswith('mined') for o in learn.recorder.metric_names) == 1 and {'ckm_loss', 'wsl_loss'} < set(learn.recorder.metric_names)
    with pytest.raises(ValueError, match='two methods are called'): quiet(learner([WSL(teacher()), WSL(net(5))]), 'fit', 1)
    with pytest.raises(ValueError, match='take 2 of the hard loss'): quiet(learner([CKM(teacher()), CKM(net(5), name='other')]), 'fit', 1)

def test_the_teacher_stays_as_it_is():
    t = copy.deepcopy(teacher()).train()
    before = copy.deepcopy(t.state_dict())
    quiet(learner(WSL(t)), 'fit', 1, 1e-2)
    assert t.training and all(p.grad is None for p in t.parameters()) and all(torch.equal(v, before[k]) for k,v in t.state_dict().items())


# ---------------------------------------------------------------- two stages

def test_the_papers_two_stages():
    one,two = effdstl_stages(300, teacher(), net(9))
    assert (one.n_epoch, one.lr, one.wd, two.n_epoch, two.lr, two.wd) == (240, (.5, 1e-5), 4e-5, 60, (5e-2, 5e-4), 0.)
    wsl,smooth = one.cbs
    assert isinstance(wsl, WSL) and wsl.settings | dict(teacher=0) == dict(teacher=0, beta=.5, tau=2., weight_tau=2.) and smooth.weights(0) == (.9, .1)
    ckm, = two.cbs
    assert isinstance(ckm, CKM) and ckm.settings | dict(teacher=0) == dict(teacher=0, tau_teacher=.7, tau_student=1., smooth_to=.99)
    assert wsl.teacher is not ckm.teacher and one.new_opt and two.new_opt
    opt = one.opt_func([[nn.Parameter(torch.zeros(1))]], lr=.1)
    group, = opt.opt.param_groups
    assert isinstance(opt.opt, torch.optim.SGD) and group['momentum'] == .9 and not group['nesterov'] and not group['dampening']

def test_ablations():
    same = effdstl_stages(10, teacher())
    assert same[0].cbs[0].teacher is same[1].cbs[0].teacher and [o.n_epoch for o in same] == [8, 2]
    plain = effdstl_stages(10, teacher(), ckm=False, tau_teacher=1.)[1].cbs[0]
    assert not isinstance(plain, CKM) and not plain.rewrites and plain.tau == (1., 1.) and plain.weights(0) == (0., 1.)
    assert [o.n_epoch for o in effdstl_stages(10, teacher(), two_stages=False)] == [10]
    assert effdstl_stages(10, teacher(), tau_teacher=.8)[1].cbs[0].tau == (.8, 1.)
    assert len(effdstl_stages(10, teacher(), smoothing=0.)[0].cbs) == 1
    changed = effdstl_stages(10, teacher(), stage1=dict(lr=.1, n_epoch=5, cbs=MixUp()), stage2=dict(n_epoch=5, bs=8))
    assert (changed[0].lr, changed[0].wd, changed[1].bs, changed[1].wd) == (.1, 4e-5, 8, 0.) and isinstance(changed[0].cbs[-1], MixUp)

def test_stage_1_is_effdstls_published_loss():
    b = first_batch(*effdstl_stages(5, teacher())[0].cbs)
    assert b['loss'] == pytest.approx(WSLLoss.published('effdstl')(b['z'], b['y'], b['zt']).item(), rel=1e-5)

def plain_two_stages(n1, n2, lr1, lr2, weak, better):
    "The training in a few lines of PyTorch"
    learn = learner()
    model,losses = learn.model.train(),[]
    for n,lr,wd,loss,teach in ((n1, lr1, 4e-5, WSLLoss.published('effdstl'), weak), (n2, lr2, 0., CKMLoss(), better)):
        opt = torch.optim.SGD(model.parameters(), lr=lr[0], momentum=.9, weight_decay=wd)
        total,done = n*len(learn.dls.train),0
        for _ in range(n):
            for x,y in learn.dls.train:
                opt.param_groups[0]['lr'] = lr[1] + (lr[0]-lr[1])*(1+math.cos(math.pi*done/total))/2
                out = loss(model(x), y, teach(x).detach())
                opt.zero_grad()
                out.backward()
                opt.step()
                losses.append(out.item())
                done += 1
            for _ in learn.dls.valid: pass
    return model,losses

def test_fit_effdstl_is_the_papers_training():
    better = quiet(learner(seed=8), 'fit', 4, 1e-2).model.eval()
    learn = quiet(learner(), 'fit_effdstl', 5, teacher(), better, stage1=dict(lr=(.1, 1e-5)))
    second = 5e-2*16/1024,5e-4*16/1024   # the paper's, for batches of 16; stage 1 has what it was given
    model,losses = plain_two_stages(4, 1, (.1, 1e-5), second, teacher(), better)
    for p,q in zip(learn.model.parameters(), model.parameters()): torch.testing.assert_close(p, q, atol=2e-5, rtol=1e-4)
    assert len(learn.recorder.losses) == len(losses)
    smooth,out = 0.,[]
    for i,o in enumerate(losses, 1):
        smooth = .98*smooth + .02*o
        out.append(smooth/(1-.98**i))
    np.testing.assert_allclose([float(o) for o in learn.recorder.losses], out, rtol=1e-4)

def test_the_papers_rates_shrink_with_the_batch_and_those_that_are_given_do_not():
    learn = quiet(learner(), 'fit_effdstl', 5, teacher(), stage2=dict(lr=(.02, 1e-5)))
    n = len(learn.dls.train)
    assert learn.dls.bs == 16 and learn.recorder.lrs[0] == pytest.approx(.5*16/1024) and learn.recorder.lrs[4*n] == pytest.approx(.02)
    for bs in (1024, 256, 2048):
        one,two = effdstl_stages(300, teacher(), bs=bs)
        assert one.lr == pytest.approx((.5*bs/1024, 1e-5*bs/1024)) and two.lr == pytest.approx((5e-2*bs/1024, 5e-4*bs/1024))
    with pytest.raises(ValueError, match='bs'): effdstl_stages(300, teacher(), bs=0)

def test_a_loss_that_explodes_is_said_once_and_one_that_falls_is_not():
    with pytest.warns(UserWarning, match='the loss is .* the learning rate.*too large') as found:
        quiet(learner(), 'fit_effdstl', 5, teacher(), stage1=dict(lr=(500., 400.)))
    assert sum('too large' in str(o.message) for o in found) == 1
    with warnings.catch_warnings():
        warnings.filterwarnings('error', message='.*too large')
        quiet(learner(), 'fit_effdstl', 5, teacher())

@pytest.mark.parametrize('kwargs,error,words', [
    (dict(n_epoch=1), ValueError, 'at least 2, one for each stage, got 1'), (dict(n_epoch=0), ValueError, 'n_epoch must be at least 1'), (dict(n_epoch=2.5), TypeError, 'n_epoch'),
    (dict(n_epoch=5, stage1=dict(n_epoch=3)), ValueError, r'3 \+ 1 = 4 epochs, not n_epoch=5'), (dict(n_epoch=5, stage2=dict(epochs=1)), ValueError, "stage2 has 'epochs'"),
    (dict(n_epoch=5, stage1=3), TypeError, 'stage1 must be a dict'), (dict(n_epoch=5, smoothing=2), ValueError, 'smoothing'), (dict(n_epoch=5, tau_teacher=0), ValueError, 'tau_teacher'),
    (dict(n_epoch=5, two_stages=False, stage2=dict(wd=0.)), ValueError, 'two_stages=False')])
def test_bad_two_stages(kwargs, error, words):
    learn = learner()
    with pytest.raises(error, match=words): learn.fit_effdstl(teacher=teacher(), **kwargs)
    assert learn.opt is None and not hasattr(learn.recorder, 'values')

def test_a_strong_teacher_with_other_classes():
    learn = learner()
    with pytest.raises(ValueError, match='4 outputs.*5 classes'):
        quiet(learn, 'fit_effdstl', 2, teacher(), nn.Linear(8, 4))
