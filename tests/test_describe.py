"""`describe`, label teachers, teacher correction and `plot_soft_targets`, against float64 autograd on the dense equations of `reference.py`."""
import math, random, sys
from functools import partial
from pathlib import Path

import numpy as np, pytest, torch, torch.nn.functional as F
import matplotlib
matplotlib.use('agg')
from matplotlib import pyplot as plt
from fastai.basics import CrossEntropyLossFlat, DataLoaders, Learner
from fastai.callback.schedule import SchedLin
from hypothesis import given, settings, strategies as st

sys.path.insert(0, str(Path(__file__).parent))
import reference as ref
from fastkdtf.core import Step, TwoValued
from fastkdtf.describe import Description
from fastkdtf.callback.distill import Distill, LsrKD, ScaledCE, ScaledLS, TfKDReg, matched_controls
from fastkdtf.lab.interpret import plot_soft_targets
from fastkdtf.losses import LabelSmoothingKDLoss, LsrKDLoss, TfKDRegLoss
from fastkdtf.targets import TeacherCorrection
from fastkdtf.teachers.base import UniformTeacher, VirtualTeacher

few = settings(max_examples=60, deadline=None)


# ---------------------------------------------------------------- settings at random, and their gradients by autograd

def random_settings(n=40):
    "`(loss, callback, reference terms, K)`, all over the parameters' ranges"
    rng = random.Random(0)
    ks,alpha = (2, 3, 10, 100, 1000),lambda: rng.choice((.05, .1, .5, .95, 1., rng.random()))
    out = []
    for _ in range(n):
        kw = dict(alpha=alpha(), tau=rng.choice((1., .5, 2., 3., 20., 40.)))
        lsr = {**kw, 'gamma': rng.choice((None, .025, .25, .9, .02+.9*rng.random()))}
        out.append((LsrKDLoss(**lsr), LsrKD(**lsr), ref.lsr_kd(**lsr), rng.choice(ks)))
        tf = {**kw, 'correct_prob': rng.choice((.99, .9, .5)), 'scale': rng.choice((1, 'tau', 'tau2', 7.))}
        out.append((TfKDRegLoss(**tf), TfKDReg(**tf), ref.tf_kd_reg(**tf), rng.choice(ks)))
        official = {**kw, 'correct_prob': rng.choice((.99, .9)), 'variant': 'official', 'multiplier': rng.choice((1., 50., 100.))}
        out.append((TfKDRegLoss(**official), TfKDReg(**official), ref.tf_kd_reg(**official), rng.choice(ks)))
    for variant in ('paper', 'official'):
        a = alpha()
        out.append((LabelSmoothingKDLoss(a, variant), None, ref.label_smoothing(a, variant), rng.choice(ks)))
    return out

SETTINGS = random_settings()

def gradients(terms, y, k, z):
    "Gradient of each term, by autograd of its dense float64 equation"
    out = []
    for weight,t,tau,_ in terms(np.array([y]), k):
        z = z.detach().requires_grad_()
        out.append(torch.autograd.grad(-weight*(torch.from_numpy(t)*torch.log_softmax(z/tau, 1)).sum(), z)[0])
    return out

def smoothed(y, k, eps):
    "Label smoothing's target"
    t = torch.full((1, k), eps/k, dtype=torch.float64)
    t[0, y] += 1-eps
    return t

def agree(a, b, tol=1e-10): return (a-b).abs().max() <= tol*max(1, b.abs().max())


@pytest.mark.parametrize('i', range(len(SETTINGS)))
def test_equivalent_label_smoothing(i):
    "`W·(p - LS(ε))` is the gradient: at uniform predictions always, everywhere if `exact`"
    loss,_,terms,k = SETTINGS[i]
    d,y = loss.describe(k),k//2
    uniform = torch.zeros(1, k, dtype=torch.float64)
    anywhere = 3*torch.randn(1, k, dtype=torch.float64, generator=torch.Generator().manual_seed(i))
    ours = lambda z: d.scale*(z.softmax(1) - smoothed(y, k, d.epsilon))
    total = lambda z: sum(gradients(terms, y, k, z))
    assert agree(ours(uniform), total(uniform))
    assert d.exact == agree(ours(anywhere), total(anywhere))
    assert f"{d.epsilon:.3f} ({'exact' if d.exact else 'first order'})" in repr(d)


@pytest.mark.parametrize('i', range(len(SETTINGS)))
def test_weights_in_force(i):
    "Hard and soft weight, target and gradient ratios are the reference's"
    loss,_,terms,k = SETTINGS[i]
    d,parts = loss.describe(k),terms(np.array([0]), k)
    soft = parts[-1]
    assert d.hard == pytest.approx(parts[0].weight if len(parts) == 2 else 0.)
    assert (d.soft, d.tau) == pytest.approx((soft.weight, soft.tau))
    assert d.target == pytest.approx((soft.target[0,0], soft.target[0,1]))
    assert d.soft_gradient == pytest.approx(soft.weight/soft.tau) and d.scale == pytest.approx(d.hard + soft.weight/soft.tau)
    if not d.hard: return
    ratios = []
    for confidence in (1/k, .9):
        z = torch.full((1, k), (1-confidence)/(k-1), dtype=torch.float64)
        z[0,0] = confidence
        g = [o.norm().item() for o in gradients(terms, 0, k, z.log())]
        assert d.gradient_ratio(confidence) == pytest.approx(g[1]/g[0], rel=1e-6, abs=1e-9)
        ratios.append(g[1]/g[0])
    assert d.negligible == (max(ratios) < .01) == ('the soft term is negligible' in repr(d))


@pytest.mark.parametrize('i', [i for i,o in enumerate(SETTINGS) if o[1] is not None])
def test_loss_and_callback_say_the_same(i):
    loss,cb,_,k = SETTINGS[i]
    a,b = loss.describe(k),cb.describe(k)
    assert a.rows() == b.rows() and a.settings == b.settings
    assert (a.hard, a.soft, a.tau, a.epsilon) == pytest.approx((b.hard, b.soft, b.tau, b.epsilon))
    assert a.controls.keys() == b.controls.keys() and a.as_control == b.as_control


@pytest.mark.parametrize('kw,eps,scale', [
    (dict(alpha=.95, tau=40, variant='official'), .160, .0595),                    # MobileNetV2
    (dict(alpha=.1, tau=20, variant='official', multiplier=100.), .100, 1.)])      # ResNet18
def test_the_authors_settings_are_label_smoothing(kw, eps, scale):
    for d in (TfKDReg(**kw).describe(100), TfKDRegLoss(**kw).describe(100)):
        assert d.epsilon == pytest.approx(eps, abs=5e-4) and d.scale == pytest.approx(scale, abs=5e-5) and d.exact
        assert f'{eps:.3f} (exact)' in repr(d) and f'{scale:.3g}' in repr(d)
    z = torch.randn(64, 100, dtype=torch.float64, requires_grad=True)
    y = torch.randint(0, 100, (64,))
    ours,control = (torch.autograd.grad(o, z)[0] for o in (TfKDRegLoss(**kw)(z, y), d.scale*F.cross_entropy(z, y, label_smoothing=d.epsilon)))
    assert torch.allclose(ours, control, rtol=1e-10, atol=1e-14)


def test_official_label_smoothing():
    assert LabelSmoothingKDLoss(.1, 'official').describe(10).epsilon == pytest.approx(.1*10/9)
    assert LabelSmoothingKDLoss(.1).describe(10).epsilon == pytest.approx(.1)


def test_eq_9_as_printed_is_negligible():
    assert TfKDReg(scale=1).describe(100).negligible and TfKDRegLoss(scale=1).describe(100).negligible
    assert not TfKDReg().describe(100).negligible and not LsrKD().describe(100).negligible


def test_no_soft_term_or_no_loss():
    d = LsrKD(alpha=0.).describe(10)
    assert d.exact and d.epsilon == pytest.approx(0, abs=1e-12) and d.scale == 1 and d.controls == {} and d.as_control == 'CE'
    nothing = TfKDReg(alpha=1., scale=0).describe(10)
    assert nothing.scale == 0 and nothing.epsilon is None and nothing.as_control is None and 'scale of the loss' in repr(nothing)

def test_no_loss_has_no_controls():
    assert TfKDReg(alpha=1., scale=0).describe(10).controls == {} == matched_controls(TfKDReg(alpha=1., scale=0), 10)


# ---------------------------------------------------------------- controls

@pytest.mark.parametrize('i', range(len(SETTINGS)))
def test_controls_match(i):
    loss,cb,terms,k = SETTINGS[i]
    d = loss.describe(k)
    for name,(hard,soft) in d.controls.items():
        assert hard + soft == pytest.approx(d.scale)
        if soft: assert soft/(hard+soft) == pytest.approx(d.epsilon)
        assert name.startswith('LS' if soft else 'CE') and name not in ('CE', d.as_control)
        assert ('×' in name) == (not math.isclose(d.scale, 1, rel_tol=1e-6))
    smooth = any(soft for _,soft in d.controls.values())
    assert smooth == (0 < d.epsilon < 1 and d.as_control is None)
    if cb is None: return
    made = matched_controls(cb, k)
    assert list(made) == list(cb.describe(k).controls)
    for name,control in made.items():
        c = control.describe(k)
        assert c.scale == pytest.approx(d.scale) and c.epsilon == pytest.approx(d.epsilon if name.startswith('LS') else 0, abs=1e-9)
        assert c.exact and c.as_control == name


@pytest.mark.parametrize('cb,name', [
    (LsrKD(tau=1.), 'LS 0.1'), (LsrKD(.2, tau=1.), 'LS 0.2'), (ScaledLS(.1), 'LS 0.1'), (ScaledLS(.1, 2.9), 'LS 0.1 ×2.9'), (ScaledCE(2.9), 'CE ×2.9'),
    (ScaledCE(), 'CE'), (LsrKD(), None), (LsrKD(tau=1., gamma=.25), None), (TfKDReg(), None), (TfKDReg(variant='official'), None)])
def test_which_methods_are_controls_themselves(cb, name): assert cb.describe(10).as_control == name


def test_known_controls():
    assert list(LsrKD().describe(10).controls) == ['LS 0.1']
    assert list(LsrKD(tau=1.).describe(10).controls) == []
    assert list(TfKDReg(alpha=.95, tau=40, variant='official').describe(100).controls) == ['CE ×0.0595', 'LS 0.16 ×0.0595']
    assert list(ScaledLS(.1, 2.).describe(10).controls) == ['CE ×2']


# ---------------------------------------------------------------- number of classes, schedules, notes

def learner(c=7, cbs=()):
    items = [(torch.randn(4), i%c) for i in range(14)]
    dls = DataLoaders.from_dsets(items, items, bs=7, device='cpu', num_workers=0)
    dls.c = c
    return Learner(dls, torch.nn.Linear(4, c), loss_func=CrossEntropyLossFlat(), cbs=cbs)

@pytest.mark.parametrize('make', [LsrKD, TfKDReg, partial(TfKDReg, variant='official'), ScaledCE, ScaledLS, partial(Distill, UniformTeacher())])
def test_number_of_classes(make):
    cb = make()
    with pytest.raises(ValueError, match='n_classes'): cb.describe()
    learn = learner(7, [cb])
    assert repr(cb.describe()) == repr(cb.describe(7)) and '7 classes' in repr(cb.describe())
    learn.remove_cb(cb)
    with pytest.raises(ValueError, match='n_classes'): cb.describe()

@pytest.mark.parametrize('k,error', [(1, ValueError), (0, ValueError), (-3, ValueError), ('10', TypeError), (True, TypeError), ([10], TypeError), (2.5, TypeError)])
def test_bad_number_of_classes(k, error):
    for o in (LsrKD(), TfKDRegLoss(), LabelSmoothingKDLoss()):
        with pytest.raises(error, match='n_classes'): o.describe(k)

def test_schedules():
    cb = LsrKD(alpha=SchedLin(0, .4), tau=SchedLin(1., 3.))
    for pct in (0., .5, 1.):
        d = cb.describe(10, pct=pct)
        fixed = LsrKD(alpha=.4*pct, tau=1+2*pct).describe(10)
        assert (d.hard, d.soft, d.tau, d.epsilon) == pytest.approx((fixed.hard, fixed.soft, fixed.tau, fixed.epsilon))
        assert f'on a schedule; shown at {pct:.0%} of the training' in repr(d)
    assert 'schedule' not in repr(fixed)
    assert '100%' in repr(cb.describe(10))

def test_notes():
    assert 'weights of samples' in repr(Distill(UniformTeacher(), sample_weight=lambda s: torch.ones(len(s.y))).describe(10))
    assert 'a function of your own' in repr(Distill(UniformTeacher(), loss=lambda z, t: z.sum(1)).describe(10))

def test_a_teacher_that_looks_at_the_image_has_no_equivalent():
    d = Distill(lambda step: step.z, alpha=.5, tau=2.).describe(10)
    assert d.epsilon is None and d.target is None and d.gradient_ratio(.5) is None and not d.negligible and d.as_control is None
    assert list(d.controls) == ['CE ×1.5'] and (d.hard, d.soft, d.scale) == (.5, 2., 1.5)
    assert 'smoothing' not in repr(d)


# ---------------------------------------------------------------- how it looks

def test_table_and_html():
    d = TfKDReg(alpha=.95, tau=40, variant='official').describe(100)
    text,html = repr(d),d._repr_html_()
    for o in ('TfKDReg(alpha=0.95, tau=40', '100 classes', '0.05 · H(q, p)', '0.0095 · D_KL(t, p)', '0.010248', '0.009997', '0.160 (exact)', '0.0595', 'LS 0.16 ×0.0595'):
        assert o in text and o in html.replace('&#x27;', "'"), o
    assert len(text.splitlines()) < 12 and html.count('<tr>') == len(d.rows()) == len(text.splitlines())-1

def test_html_is_escaped():
    html = Description('<b>bold</b>', {'f': '<script>&'}, 3, 1., 0., notes=['a < b & c'])._repr_html_()
    assert '<b>' not in html and '<script>' not in html and 'a &lt; b &amp; c' in html and '&lt;b&gt;bold' in html


# ---------------------------------------------------------------- targets

unit = st.floats(.001, .999)

@few
@given(st.integers(2, 2000), unit, st.floats(.1, 100), st.sampled_from(['paper', 'official']))
def test_softened_label_teachers(k, a, tau, variant):
    p = np.full(k, (1-a)/(k-1))
    p[0] = a
    z = (p if variant == 'official' else np.log(p))/tau
    expected = np.exp(z-z.max())/np.exp(z-z.max()).sum()
    t = VirtualTeacher(a, variant).soft_targets(k, tau)
    assert (t.on, t.off) == pytest.approx((expected[0], expected[1]), rel=1e-9)
    assert t.on + (k-1)*t.off == pytest.approx(1, rel=1e-9)
    assert UniformTeacher().soft_targets(k, tau) == pytest.approx((1/k, 1/k))

@few
@given(st.integers(2, 50), st.integers(1, 8), unit, unit)
def test_corrected_two_valued(k, n, gamma, a):
    step = Step(torch.arange(n)%k, torch.zeros(n, k))
    t = TeacherCorrection(gamma)(TwoValued(a, (1-a)/(k-1)), step)
    dense = t.dense(step.y, k)
    assert t.on == gamma and torch.allclose(dense.sum(1), torch.ones(n), atol=1e-5)
    assert torch.allclose(dense[torch.arange(n), step.y], torch.full((n,), gamma))

@few
@given(st.integers(2, 12), st.integers(1, 6), st.sampled_from([(), (1,), (3,)]), st.sampled_from([(), (4,), (2, 3)]), unit, st.integers(0, 10**6))
def test_corrected_tensors(k, n, copies, positions, gamma, seed):
    "γ on the label, the others in the teacher's proportion, for `[N,K]`, `[n,N,K]` and dense predictions"
    gen = torch.Generator().manual_seed(seed)
    y = torch.randint(0, k, (n, *positions), generator=gen)
    t = torch.randn(*copies, n, k, *positions, generator=gen).softmax(len(copies)+1)
    before = t.clone()
    out = TeacherCorrection(gamma)(t, Step(y, torch.zeros(n, k, *positions)))
    assert torch.equal(t, before)
    last = lambda o: o.movedim(len(copies)+1, -1).reshape(-1, k).double().numpy()
    labels = np.tile(y.reshape(-1).numpy(), copies[0] if copies else 1)
    for row,given_row,c in zip(last(out), last(t), labels):
        expected = given_row*(1-gamma)/(given_row.sum()-given_row[c])
        expected[c] = gamma
        assert row == pytest.approx(expected, abs=1e-5)
        assert row.sum() == pytest.approx(1, abs=1e-5) and row[c] == pytest.approx(gamma)

def test_corrected_uniform_is_lsrkd_tc():
    k,y = 10,torch.tensor([3])
    dense = TeacherCorrection(.25)(torch.full((1, k), 1/k), Step(y, torch.zeros(1, k)))
    assert torch.allclose(dense, TeacherCorrection(.25)(TwoValued(.1, .1), Step(y, torch.zeros(1, k))).dense(y, k))

def test_correction_of_a_certain_teacher():
    t = torch.tensor([[200., 0., 0.]]).softmax(1)
    out = TeacherCorrection(.3)(t, Step(torch.tensor([0]), torch.zeros(1, 3)))
    assert torch.allclose(out, torch.tensor([[.3, .35, .35]]))

def test_bad_targets():
    for gamma,error in ((0, ValueError), (1, ValueError), (1.5, ValueError), ('.2', TypeError)):
        with pytest.raises(error, match='gamma'): TeacherCorrection(gamma)
    with pytest.raises(TypeError, match='integer labels'): TeacherCorrection(.2)(torch.ones(1, 2)/2, Step(torch.ones(1, 2)/2, torch.zeros(1, 2)))
    for a in (0, 1, -1, 2):
        with pytest.raises(ValueError, match='correct_prob'): VirtualTeacher(a)
    with pytest.raises(ValueError, match='variant'): VirtualTeacher(variant='code')
    for tau in (0, -1.):
        with pytest.raises(ValueError, match='tau'): VirtualTeacher().soft_targets(10, tau)


# ---------------------------------------------------------------- plot_soft_targets

class Network:
    "A linear network on the image"
    def __init__(self, k): self.w = torch.randn(3*4*4, k, generator=torch.Generator().manual_seed(1))
    def __call__(self, step): return step.xb[0].flatten(1)@self.w

def expected_heights(teacher, k, tau, y, xb):
    if xb is not None: return torch.softmax((xb.flatten(1)@teacher.w/tau).double(), 1)[0].numpy()
    if isinstance(teacher, UniformTeacher): return np.full(k, 1/k)
    return ref.virtual_target(np.array([y]), k, teacher.correct_prob, tau, teacher.variant)[0]

@pytest.mark.parametrize('teacher,xb', [(UniformTeacher(), None), (VirtualTeacher(), None), (VirtualTeacher(.9, variant='official'), None),
                                        (Network(7), torch.randn(1, 3, 4, 4, generator=torch.Generator().manual_seed(0)))])
def test_plotted_heights(teacher, xb):
    k,y,taus = 7,2,(.5, 1, 20)
    axs = plot_soft_targets(teacher, k, taus, y=y, xb=xb)
    assert len(axs) == 3
    for ax,tau in zip(axs, taus):
        heights = np.array([o.get_height() for o in ax.patches])
        assert heights == pytest.approx(expected_heights(teacher, k, tau, y, xb), abs=1e-6)
        assert len(heights) == k and f'{tau:g}' in ax.get_title()
        assert any(np.allclose(line.get_ydata(), 1/k) for line in ax.lines), 'the uniform distribution is drawn'
        colors = [o.get_facecolor() for o in ax.patches]
        assert [c != colors[(y+1)%k] for c in colors] == [i == y for i in range(k)], 'the label stands out'
    plt.close('all')

def test_plot_on_given_axes_and_several_copies():
    own = plt.subplots(1, 2)[1]
    copies = lambda step: torch.stack([step.z, step.z+torch.tensor([2., 0., 0.])])
    axs = plot_soft_targets(copies, 3, (1, 2), axs=own)
    assert axs is own and len(plt.get_fignums()) == 1
    e = math.exp(2)
    assert [o.get_height() for o in own[0].patches] == pytest.approx([(1/3+e/(e+2))/2] + [(1/3+1/(e+2))/2]*2, abs=1e-6)
    plt.close('all')

def test_bad_plots():
    with pytest.raises(ValueError, match='tau'): plot_soft_targets(UniformTeacher(), 5, (0,))
    with pytest.raises(ValueError, match='shape'): plot_soft_targets(lambda step: torch.zeros(1, 4), 5)
    with pytest.raises(TypeError, match='logits'): plot_soft_targets(lambda step: [0.], 5)
    plt.close('all')
