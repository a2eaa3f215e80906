"""The label-only losses against `reference.py`, which was written from the equations without looking at the package.

Tolerances: values within `1e-5·max(1,|value|)` in float32 and `1e-10·max(1,|value|)` in float64. Single samples
(`reduction='none'`) may err by three roundings times the terms' weights where that is more: α·τ² is 360 at α=.9, τ=20.
A gradient entry is a difference of probabilities, so its error is measured against the sum of their magnitudes,
`Σ weight·(p+t)/τ`: at most 1e-5 of it in float32 and 1e-10 in float64, plus 1e-8 and 1e-16 for entries near 0.
"""
import copy, io, math, pickle, sys
from pathlib import Path
import numpy as np, pytest, torch, torch.nn.functional as F
from hypothesis import given, settings, strategies as st
from torch import nn

sys.path.insert(0, str(Path(__file__).parent))
import reference as ref
from fastkdtf.losses import LabelSmoothingKDLoss, LsrKDLoss, TfKDRegLoss
from fastkdtf.teachers.base import UniformTeacher, VirtualTeacher

f16, bf16, f32, f64 = torch.float16, torch.bfloat16, torch.float32, torch.float64
TOL   = {f32: 1e-5, f64: 1e-10}
KINDS = dict(lsr=(LabelSmoothingKDLoss, ref.label_smoothing), lsrkd=(LsrKDLoss, ref.lsr_kd), tfkd=(TfKDRegLoss, ref.tf_kd_reg))
DEFAULTS = [('lsr', {}), ('lsr', dict(variant='official')), ('lsrkd', {}), ('lsrkd', dict(gamma=.25)),
            ('tfkd', {}), ('tfkd', dict(variant='official', multiplier=100.))]
name_of  = lambda case: '-'.join([case[0], *(f'{k}={v}' for k,v in case[1].items())])
each_loss = pytest.mark.parametrize('case', DEFAULTS, ids=name_of)

def make(case, **kwargs):
    "The loss under test and the reference's terms for `case = (kind, method arguments)`"
    kind, args = case
    cls, terms = KINDS[kind]
    return cls(**args, **kwargs), terms(**args)

def logits(*shape, dtype=f64, spread=3., seed=0):
    g = torch.Generator().manual_seed(seed)
    return (spread*torch.randn(*shape, generator=g, dtype=f64)).to(dtype)

def labels(n_classes, *shape, seed=1): return torch.randint(n_classes, shape, generator=torch.Generator().manual_seed(seed))

def soft_labels(*shape, axis=1, dtype=f64, seed=2):
    "Label distributions with a class of probability 0 in each of them"
    q = logits(*shape, seed=seed).softmax(axis)
    q.select(axis, 0).zero_()
    return (q/q.sum(axis, keepdim=True)).to(dtype)

def grad_of(loss, z, targ):
    "Value and gradient of the value's sum, with `z` as a fresh leaf of the same layout"
    z = z.detach().requires_grad_()
    out = loss(z, targ)
    return out.detach(), torch.autograd.grad(out.sum(), z)[0]

def check_value(out, want, tol, msg=''):
    out = out.double().numpy()
    assert out.shape == np.shape(want), f'{msg}: shape {out.shape}, expected {np.shape(want)}'
    err = (np.abs(out - want)/np.maximum(1, np.abs(want))).max(initial=0)
    assert err <= tol, f'{msg}: value off by {err:.2g} of max(1,|value|), allowed {tol:.1e}'

def check_grad(grad, want, size, tol, floor=None, msg=''):
    if floor is None: floor = 1e-8 if tol > 1e-6 else 1e-16
    over = (np.abs(grad.double().numpy() - want) - floor)/(size + 1e-300)
    assert over.max(initial=0) <= tol, f'{msg}: gradient off by {over.max():.2g} of its size, allowed {tol:.1e}'

def weight(terms, n_classes): return sum(t.weight for t in terms(np.zeros(1, int), n_classes))

def check(case, z, targ, **kwargs):
    "Value and gradient of one call against the float64 forms, at the inputs as represented"
    loss, terms = make(case, **kwargs)
    tol = vtol = TOL[z.dtype]
    if kwargs.get('reduction') == 'none': vtol = max(tol, 3*torch.finfo(z.dtype).eps*weight(terms, z.shape[kwargs.get('axis', 1)]))
    out, grad = grad_of(loss, z, targ)
    value, want, size = ref.loss(z.detach().double().numpy(), targ.numpy(), terms, **kwargs)
    assert grad.shape == z.shape and grad.dtype == z.dtype
    check_value(out, value, vtol, name_of(case))
    check_grad(grad, want, size, tol, msg=name_of(case))
    return out, grad

# --- values and gradients over the settings of use

def grid(n_classes, tau):
    for alpha in (.1, .9):
        for gamma in (None, .025, .25, 1/n_classes): yield 'lsrkd', dict(alpha=alpha, tau=tau, gamma=gamma)
        for scale in (1, 'tau', 'tau2', 2.5):        yield 'tfkd', dict(alpha=alpha, tau=tau, scale=scale)
        for multiplier in (1., 50., 100.):
            yield 'tfkd', dict(alpha=alpha, tau=tau, variant='official', multiplier=multiplier)
    yield 'tfkd', dict(tau=tau, correct_prob=.9)

@pytest.mark.parametrize('dtype', [f32, f64], ids=str)
@pytest.mark.parametrize('tau', [.5, 1., 3., 20.])
@pytest.mark.parametrize('n_classes', [2, 10, 100, 1000])
def test_values_and_gradients(n_classes, tau, dtype):
    z, y = logits(16, n_classes, dtype=dtype), labels(n_classes, 16)
    for case in grid(n_classes, tau):
        check(case, z, y)
        check(case, z, y, reduction='none')

@pytest.mark.parametrize('dtype', [f32, f64], ids=str)
@pytest.mark.parametrize('variant', ['paper', 'official'])
@pytest.mark.parametrize('alpha', [0., .1, .5, 1.])
@pytest.mark.parametrize('n_classes', [2, 10, 100, 1000])
def test_label_smoothing_values_and_gradients(n_classes, alpha, variant, dtype):
    z, y = logits(16, n_classes, dtype=dtype), labels(n_classes, 16)
    for reduction in ('mean', 'none'): check(('lsr', dict(alpha=alpha, variant=variant)), z, y, reduction=reduction)

@pytest.mark.parametrize('alpha', [0, 1])
@pytest.mark.parametrize('kind,args', DEFAULTS[2:], ids=map(name_of, DEFAULTS[2:]))
def test_ends_of_alpha(kind, args, alpha):
    "α=0 is cross-entropy, α=1 the soft term alone"
    z, y = logits(8, 10), labels(10, 8)
    out, grad = check((kind, dict(args, alpha=alpha)), z, y)
    if alpha == 0: torch.testing.assert_close(out, F.cross_entropy(z, y), rtol=0, atol=1e-14)

@each_loss
@pytest.mark.parametrize('shape', [(7, 5), (3, 5, 4), (2, 5, 3, 4), (2, 5, 2, 3, 2)], ids=str)
@pytest.mark.parametrize('reduction', ['mean', 'sum', 'none'])
@pytest.mark.parametrize('kind', ['integer', 'soft'])
def test_reductions_and_dense(case, shape, reduction, kind):
    targ = labels(5, shape[0], *shape[2:]) if kind == 'integer' else soft_labels(*shape)
    for dtype in (f32, f64):
        out, _ = check(case, logits(*shape, dtype=dtype), targ, reduction=reduction)
        assert out.shape == (torch.Size([shape[0], *shape[2:]]) if reduction == 'none' else torch.Size([]))

@each_loss
def test_scaled_inputs_are_finite_and_right(case):
    "Defaults at every spread of the logits, from nearly uniform to saturated predictions"
    for spread in (1e-3, .1, 10., 100., 1000.):
        for dtype in (f32, f64): check(case, logits(16, 10, dtype=dtype, spread=spread), labels(10, 16))

# --- check values and closed relations

SOFTENED = [(.99,   10, 20, (.134982, .096113), (.104539, .099496)),   # by the equations, and by the authors' code
            (.99,  100, 20, (.015741, .009942), (.010502, .009995)),
            (.99,  100, 40, (.012551, .009974), (.010248, .009997)),
            (.99, 1000, 20, (.001776, .000999), (.001051, .001000))]

@pytest.mark.parametrize('a,n_classes,tau,equations,official', SOFTENED)
def test_virtual_teacher_check_values(a, n_classes, tau, equations, official):
    for variant, printed in (('paper', equations), ('official', official)):
        on_off = VirtualTeacher(correct_prob=a, variant=variant).soft_targets(n_classes, tau)
        dense  = ref.virtual_target(np.zeros(1, int), n_classes, a, tau, variant)[0]
        assert np.allclose(on_off, printed, rtol=0, atol=5.01e-7)
        assert np.allclose(on_off, dense[:2], rtol=1e-12, atol=0)
        assert on_off[0] + (n_classes-1)*on_off[1] == pytest.approx(1, abs=1e-12)

@pytest.mark.parametrize('tau', [.5, 1, 3, 20])
@pytest.mark.parametrize('n_classes', [2, 10, 1000])
def test_uniform_teacher_stays_uniform(n_classes, tau):
    assert np.allclose(UniformTeacher().soft_targets(n_classes, tau), 1/n_classes, rtol=1e-14, atol=0)

def test_virtual_teacher_at_tau_one_is_unsoftened():
    assert VirtualTeacher(.99).soft_targets(100, 1.) == pytest.approx((.99, .01/99), rel=1e-12)
    on, off = VirtualTeacher(.999).soft_targets(1000, .5)
    assert 0 < off < 1e-11 and .999 < on < 1

@pytest.mark.parametrize('n_classes', [2, 10, 100])
@pytest.mark.parametrize('alpha', [0., .1, .6, 1.])
def test_label_smoothing_is_torchs(n_classes, alpha):
    z, y = logits(12, n_classes), labels(n_classes, 12)
    out, grad   = grad_of(LabelSmoothingKDLoss(alpha), z, y)
    want, wgrad = grad_of(nn.CrossEntropyLoss(label_smoothing=alpha), z, y)
    torch.testing.assert_close(out, want - alpha*math.log(n_classes), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(grad, wgrad, rtol=1e-12, atol=1e-14)

@pytest.mark.parametrize('n_classes', [2, 10, 100])
@pytest.mark.parametrize('alpha', [0., .1, .4])
def test_official_label_smoothing_is_torchs_with_larger_epsilon(n_classes, alpha):
    z, y = logits(12, n_classes), labels(n_classes, 12)
    eps  = alpha*n_classes/(n_classes-1)
    for got, want in zip(grad_of(LabelSmoothingKDLoss(alpha, 'official'), z, y), grad_of(nn.CrossEntropyLoss(label_smoothing=eps), z, y)):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-14)

def test_printed_scale_is_negligible():
    "Spec §2: at τ=20, α=.1 the soft gradient of eq. 9 as printed is about 1e-4 of the hard one"
    z, y = logits(64, 100, spread=1.), labels(100, 64)
    total, hard = (grad_of(l, z, y)[1] for l in (TfKDRegLoss(.1, 20., scale=1), TfKDRegLoss(0.)))
    ratio = (total - .9*hard).norm()/(.9*hard).norm()
    assert 2e-5 < ratio < 5e-4

def test_defaults_are_those_of_the_papers():
    z, y = logits(4, 10), labels(10, 4)
    pairs = [(LabelSmoothingKDLoss(), LabelSmoothingKDLoss(alpha=.1, variant='paper')), (LsrKDLoss(), LsrKDLoss(.1, 3., None)),
             (TfKDRegLoss(), TfKDRegLoss(.1, 20., .99, 'tau2', 'paper', 1.)), (TfKDRegLoss(), TfKDRegLoss(scale=400.)),
             (TfKDRegLoss(scale='tau'), TfKDRegLoss(scale=20)),
             (TfKDRegLoss(variant='official'), TfKDRegLoss(variant='official', scale=1))]   # its student's temperature is 1
    for a,b in pairs: assert a(z, y).item() == pytest.approx(b(z, y).item(), rel=1e-13)

# --- numerical safety

@each_loss
@pytest.mark.parametrize('dtype', [f32, f64], ids=str)
def test_huge_logits(case, dtype):
    z = torch.tensor([[1e4, -1e4, 0.], [-1e4, 1e4, 0.], [1e4, 1e4, 1e4], [-1e4, -1e4, -1e4], [1e4, 1e4, -1e4], [0., 0., 1e4]], dtype=dtype)
    for c in range(3):
        for reduction in ('none', 'mean'): check(case, z, torch.full((6,), c), reduction=reduction)

@pytest.mark.parametrize('tau', [.5, 3., 20.])
@pytest.mark.parametrize('kind', ['lsrkd', 'tfkd'])
def test_huge_logits_at_temperatures(kind, tau):
    z = (logits(16, 100, dtype=f32).sign()*1e4).requires_grad_()
    check((kind, dict(tau=tau)), z, labels(100, 16), reduction='none')

@each_loss
@pytest.mark.parametrize('offset', [1e4, -1e4])
@pytest.mark.parametrize('n_classes', [10, 1000])
def test_common_offset(case, offset, n_classes):
    "The value changes by what float32 rounds away from the logits, and by nothing else"
    z, y = logits(16, n_classes, dtype=f32) + offset, labels(n_classes, 16)
    for reduction in ('mean', 'none'): check(case, z, y, reduction=reduction)
    exact = logits(16, n_classes, dtype=f32).mul(1024).round().div(1024)                  # representable with and without the offset
    loss, _ = make(case)
    torch.testing.assert_close(loss(exact + offset, y), loss(exact, y), rtol=1e-6, atol=1e-6)

@each_loss
@pytest.mark.parametrize('dtype', [f16, bf16], ids=str)
@pytest.mark.parametrize('soft', [False, True])
def test_half_precision(case, dtype, soft):
    "Value in float32, gradient in the logits' dtype; the only error is the final rounding of the gradient"
    eps, tiny = torch.finfo(dtype).eps, torch.finfo(dtype).smallest_normal*torch.finfo(dtype).eps
    loss, terms = make(case, reduction='sum')
    for z in (logits(16, 100, dtype=dtype), logits(16, 100, dtype=dtype).sign()*6e4, logits(16, 10, dtype=dtype, spread=1.) + 1e4):
        y = soft_labels(*z.shape, dtype=f32) if soft else labels(z.shape[1], 16)
        out, grad = grad_of(loss, z, y)
        value, want, size = ref.loss(z.double().numpy(), y.numpy(), terms, reduction='sum')
        assert out.dtype == f32 and grad.dtype == dtype and grad.isfinite().all()
        check_value(out, value, 1e-5)
        bound = 1e-5*size + eps*np.abs(want) + tiny
        assert (np.abs(grad.double().numpy() - want) <= bound).all()

@pytest.mark.parametrize('dtype', [f16, bf16], ids=str)
def test_half_precision_at_low_temperature(dtype):
    "z/τ leaves float16's range here: it must be computed in float32"
    z = logits(8, 10, dtype=dtype).sign()*6e4
    for kind in ('lsrkd', 'tfkd'):
        loss, terms = make((kind, dict(tau=.5)))
        out, grad = grad_of(loss, z, labels(10, 8))
        check_value(out, ref.loss(z.double().numpy(), labels(10, 8).numpy(), terms)[0], 1e-5)
        assert grad.isfinite().all()

@each_loss
def test_autocast_changes_nothing(case):
    z, y = logits(16, 100, dtype=f32), labels(100, 16)
    loss, _ = make(case)
    want, wgrad = grad_of(loss, z, y)
    with torch.autocast('cpu', torch.bfloat16): out, grad = grad_of(loss, z, y)
    assert out.dtype == f32
    assert torch.equal(out, want) and torch.equal(grad, wgrad)

@each_loss
def test_nan_stays_where_it_is(case):
    z, y = logits(6, 5, dtype=f32), labels(5, 6)
    z[2,3] = math.nan
    loss, _ = make(case, reduction='none')
    assert loss(z, y).isnan().tolist() == [False, False, True, False, False, False]

# --- autograd

@each_loss
@pytest.mark.parametrize('reduction', ['mean', 'sum', 'none'])
@pytest.mark.parametrize('targ', ['integer', 'soft', 'ignored'])
@pytest.mark.parametrize('shape', [(4, 3), (2, 3, 4), (2, 3, 2, 2)], ids=str)
def test_gradcheck(case, reduction, targ, shape):
    loss, _ = make(case, reduction=reduction)
    y = soft_labels(*shape) if targ == 'soft' else labels(3, shape[0], *shape[2:])
    if targ == 'ignored': y.view(-1)[::2] = -100
    z = logits(*shape, spread=1.).requires_grad_()
    assert torch.autograd.gradcheck(lambda z: loss(z, y), z)

@each_loss
@pytest.mark.parametrize('reduction', ['mean', 'none'])
def test_backward_twice(case, reduction):
    loss, _ = make(case, reduction=reduction)
    z, y = logits(6, 5).requires_grad_(), labels(5, 6)
    out = loss(z, y).sum()
    (3*out).backward(retain_graph=True)
    first = z.grad.clone()
    out.backward(retain_graph=True)
    out.backward()
    torch.testing.assert_close(z.grad, first*5/3, rtol=1e-12, atol=1e-15)
    torch.testing.assert_close(first, 3*grad_of(loss, z, y)[1], rtol=1e-12, atol=1e-15)

@each_loss
@pytest.mark.parametrize('shape', [(6, 5), (2, 5, 3, 2)], ids=str)
def test_upstream_gradient_per_sample(case, shape):
    loss, terms = make(case, reduction='none')
    z, y = logits(*shape).requires_grad_(), labels(5, shape[0], *shape[2:])
    w = torch.linspace(-1, 2, y.numel(), dtype=f64).view_as(y)
    (loss(z, y)*w).sum().backward()
    _, want, size = ref.loss(z.detach().numpy(), y.numpy(), terms, reduction='none')
    w = w.unsqueeze(1).numpy()
    check_grad(z.grad, want*w, size*np.abs(w), 1e-10)

@each_loss
def test_no_silent_second_derivative(case):
    "Either right or refused: a gradient computed in the forward pass has no graph of its own"
    loss, _ = make(case)
    z, y = logits(4, 3).requires_grad_(), labels(3, 4)
    try:
        grad, = torch.autograd.grad(loss(z, y), z, create_graph=True)
        second, = torch.autograd.grad(grad.square().sum(), z)
    except RuntimeError: return
    eps, g = 1e-6, lambda z: grad_of(loss, z, y)[1]
    for i in range(4):
        for k in range(3):
            d = torch.zeros_like(z); d[i,k] = eps
            numeric = (g(z+d).square().sum() - g(z-d).square().sum())/(2*eps)
            assert second[i,k].item() == pytest.approx(numeric.item(), rel=1e-4, abs=1e-8)

@each_loss
def test_gradient_reaches_what_made_the_logits(case):
    model = nn.Linear(4, 3).double()
    x, y = logits(8, 4), labels(3, 8)
    loss, terms = make(case)
    z = model(x)
    loss(z, y).backward()
    _, want, _ = ref.loss(z.detach().numpy(), y.numpy(), terms)
    torch.testing.assert_close(model.weight.grad, torch.tensor(want).T@x, rtol=1e-10, atol=1e-13)
    torch.testing.assert_close(model.bias.grad, torch.tensor(want).sum(0), rtol=1e-10, atol=1e-13)

@each_loss
@pytest.mark.parametrize('soft', [False, True])
def test_inputs_are_left_alone(case, soft):
    z, y = logits(6, 5, dtype=f32), soft_labels(6, 5, dtype=f32) if soft else labels(5, 6)
    z0, y0 = z.clone(), y.clone()
    loss, _ = make(case)
    grad_of(loss, z, y)
    assert torch.equal(z, z0) and torch.equal(y, y0)

@each_loss
def test_without_gradients(case):
    z, y = logits(6, 5, dtype=f32), labels(5, 6)
    loss, _ = make(case)
    want = loss(z.clone().requires_grad_(), y)
    assert not loss(z, y).requires_grad and torch.equal(loss(z, y), want)
    with torch.no_grad():        assert not loss(z.clone().requires_grad_(), y).requires_grad
    with torch.inference_mode(): assert torch.equal(loss(z.clone(), y), want)

# --- layouts

@each_loss
def test_non_contiguous(case):
    base = logits(10, 12, dtype=f64)
    views = [base.t(), base[:, ::2], base[::2, 1:6], base[:1].expand(6, 12), base.flip(1)]
    for z in views: check(case, z, labels(z.shape[1], z.shape[0]))
    check(case, base, soft_labels(12, 10, axis=0).t())
    wide = logits(6, 10).requires_grad_()
    y, (loss, terms) = labels(5, 6), make(case)
    loss(wide[:, ::2], y).backward()
    _, want, size = ref.loss(wide.detach()[:, ::2].numpy(), y.numpy(), terms)
    check_grad(wide.grad[:, ::2], want, size, 1e-10)
    assert not wide.grad[:, 1::2].any()

@each_loss
@pytest.mark.parametrize('reduction', ['mean', 'none'])
def test_channels_last(case, reduction):
    z, y = logits(2, 5, 3, 4).to(memory_format=torch.channels_last), labels(5, 2, 3, 4)
    check(case, z, y, reduction=reduction)
    check(case, z, y.transpose(1, 2).contiguous().transpose(1, 2), reduction=reduction)
    check(case, z, soft_labels(2, 5, 3, 4), reduction=reduction)

@each_loss
@pytest.mark.parametrize('reduction', ['mean', 'none'])
def test_classes_on_the_last_axis(case, reduction):
    z, y = logits(2, 6, 5), labels(5, 2, 6)
    out, grad = check(case, z, y, axis=-1, reduction=reduction)
    same, gsame = check(case, z.transpose(1, 2), y, reduction=reduction)
    torch.testing.assert_close(out, same, rtol=1e-13, atol=0)
    torch.testing.assert_close(grad, gsame.transpose(1, 2), rtol=1e-12, atol=1e-15)
    check(case, z, soft_labels(2, 6, 5, axis=-1), axis=-1, reduction=reduction)
    y[0,2] = -100
    check(case, z, y, axis=-1, reduction=reduction)
    check(case, logits(7, 5), labels(5, 7), axis=-1, reduction=reduction)

# --- ignored positions

@each_loss
@pytest.mark.parametrize('ignore_index', [-100, 255, 0])
@pytest.mark.parametrize('reduction', ['mean', 'sum', 'none'])
def test_ignore_index(case, ignore_index, reduction):
    for shape in [(8, 5), (2, 5, 3, 4)]:
        z, y = logits(*shape), labels(5, shape[0], *shape[2:])
        y.view(-1)[1::3] = ignore_index
        out, grad = check(case, z, y, reduction=reduction, ignore_index=ignore_index)
        gone = y == ignore_index
        assert not grad.movedim(1, -1)[gone].any()
        if reduction == 'none': assert not out[gone].any()
        else:
            kept = z.movedim(1, -1)[~gone]
            want = make(case, reduction=reduction)[0](kept, y[~gone])
            torch.testing.assert_close(out, want, rtol=1e-12, atol=0)

@each_loss
def test_ignored_logits_do_not_matter(case):
    z, y = logits(6, 5, dtype=f32), labels(5, 6)
    y[3] = -100
    loss, _ = make(case)
    want = loss(z, y)
    z[3] = 1e4*z[3].sign()
    assert torch.equal(loss(z, y), want)

@each_loss
def test_everything_ignored(case):
    "As F.cross_entropy: mean is nan, sum 0, none zeros"
    for shape in [(4, 3), (2, 3, 2, 2)]:
        z, y = logits(*shape), torch.full((shape[0], *shape[2:]), -100)
        for reduction in ('mean', 'sum', 'none'):
            loss, _ = make(case, reduction=reduction)
            torch.testing.assert_close(loss(z, y), F.cross_entropy(z, y, reduction=reduction), equal_nan=True)
            if reduction != 'mean': assert not grad_of(loss, z, y)[1].any()

# --- soft labels

@each_loss
@pytest.mark.parametrize('n_classes', [2, 10, 100])
@pytest.mark.parametrize('dtype', [f32, f64], ids=str)
def test_soft_labels_are_mixtures(case, n_classes, dtype):
    z = logits(6, n_classes, dtype=dtype)
    for reduction in ('mean', 'none'): check(case, z, soft_labels(6, n_classes, dtype=dtype), reduction=reduction)

@each_loss
@pytest.mark.parametrize('args', [dict(tau=.5), dict(tau=1.), dict(alpha=.9, tau=20.)], ids=str)
def test_soft_labels_at_temperatures(case, args):
    kind, base = case
    if kind == 'lsr': args = dict(alpha=.6)
    check((kind, dict(base, **args)), logits(6, 10), soft_labels(6, 10))

@each_loss
@pytest.mark.parametrize('shape', [(6, 5), (2, 5, 3, 4)], ids=str)
def test_one_hot_labels_are_integer_labels(case, shape):
    z, y = logits(*shape), labels(5, shape[0], *shape[2:])
    q = F.one_hot(y, 5).movedim(-1, 1).double()
    for reduction in ('mean', 'none'):
        loss, _ = make(case, reduction=reduction)
        for a,b in zip(grad_of(loss, z, q), grad_of(loss, z, y)): torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)

@each_loss
def test_soft_labels_mix_two_integer_losses(case):
    "What fastai's MixUp does by hand"
    z, a, b = logits(6, 5), labels(5, 6), labels(5, 6, seed=9)
    lam  = torch.linspace(0, 1, 6, dtype=f64)
    loss, _ = make(case, reduction='none')
    q = lam[:,None]*F.one_hot(a, 5) + (1-lam[:,None])*F.one_hot(b, 5)
    torch.testing.assert_close(loss(z, q), lam*loss(z, a) + (1-lam)*loss(z, b), rtol=1e-12, atol=1e-13)

@each_loss
def test_soft_labels_of_another_dtype(case):
    q = soft_labels(6, 5)
    loss, terms = make(case)
    for zt, qt in [(f32, f64), (f64, f32), (bf16, f32), (f32, bf16), (f16, f16)]:
        z = logits(6, 5, dtype=zt)
        out, grad = grad_of(loss, z, q.to(qt))
        want = ref.loss(z.double().numpy(), q.numpy(), terms)[0]
        check_value(out, want, max(1e-5, 10*torch.finfo(qt).eps))    # what the labels' own rounding costs
        assert grad.dtype == zt

# --- sizes at which the work is done in pieces

@each_loss
def test_many_classes(case):
    z, y = logits(64, 21841, dtype=f32), labels(21841, 64)
    y[5] = -100
    check(case, z, y)

@each_loss
def test_many_classes_many_samples(case):
    "Far beyond any cache: what one sample gives must not depend on its neighbours"
    z, y = logits(8, 21841, dtype=f32).repeat(24, 1), labels(21841, 8).repeat(24)
    z, y = z[:-3], y[:-3]
    loss, terms = make(case, reduction='none')
    out, grad = grad_of(loss, z, y)
    value, want, size = ref.loss(z[:8].double().numpy(), y[:8].numpy(), terms, reduction='none')
    again = np.arange(len(z)) % 8
    check_value(out, value[again], 1e-5)
    for i in range(0, len(z), 8): check_grad(grad[i:i+8], want[:len(grad[i:i+8])], size[:len(grad[i:i+8])], 1e-5)

@pytest.mark.parametrize('case', [DEFAULTS[2], DEFAULTS[4]], ids=name_of)
def test_one_sample_larger_than_a_piece(case):
    check(case, logits(2, 1_500_000, dtype=f32), labels(1_500_000, 2), reduction='none')

@pytest.mark.parametrize('case', [DEFAULTS[3], DEFAULTS[4]], ids=name_of)
def test_large_dense(case):
    z, y = logits(2, 21, 300, 300, dtype=f32), labels(21, 2, 300, 300)
    y[:, :20] = 255
    y[1, :, 7] = 255
    check(case, z, y, ignore_index=255)
    check(case, z.to(memory_format=torch.channels_last), y, ignore_index=255, reduction='none')

def test_one_large_image():
    check(DEFAULTS[4], logits(1, 3, 1300, 1300, dtype=f32), labels(3, 1, 1300, 1300), reduction='none')

def test_large_soft_labels():
    z, q = logits(400, 5000, dtype=f32), soft_labels(400, 5000, dtype=f32)     # 8 MB, against pieces of 0.7 MB
    for case in (DEFAULTS[0], DEFAULTS[3], DEFAULTS[5]):
        loss, _ = make(case, reduction='none')
        whole, grad = grad_of(loss, z, q)
        parts = [grad_of(loss, a, b) for a,b in zip(z.split(37), q.split(37))]
        torch.testing.assert_close(whole, torch.cat([v for v,_ in parts]), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(grad,  torch.cat([g for _,g in parts]), rtol=1e-5, atol=1e-7)

# --- properties

property_test = settings(deadline=None, max_examples=40, derandomize=True)
taus, alphas  = st.floats(.25, 50.), st.floats(0., 1.)
gammas        = st.one_of(st.none(), st.floats(.001, .999))

@st.composite
def cases(draw):
    kind, alpha = draw(st.sampled_from(list(KINDS))), draw(alphas)
    if kind == 'lsr':   return kind, dict(alpha=alpha, variant=draw(st.sampled_from(['paper', 'official'])))
    if kind == 'lsrkd': return kind, dict(alpha=alpha, tau=draw(taus), gamma=draw(gammas))
    args = dict(alpha=alpha, tau=draw(taus), correct_prob=draw(st.floats(.01, .999)))
    if draw(st.booleans()): return kind, dict(args, variant='official', multiplier=draw(st.floats(.1, 200.)))
    return kind, dict(args, scale=draw(st.sampled_from([1, 'tau', 'tau2', .5])))

@st.composite
def batches(draw, soft=None):
    "Float64 logits `[N,K]` or `[N,K,d…]` and targets for them"
    n, k, seed = draw(st.integers(1, 5)), draw(st.integers(2, 12)), draw(st.integers(0, 2**16))
    shape = (n, k, *draw(st.lists(st.integers(1, 3), max_size=2)))
    z = logits(*shape, spread=draw(st.sampled_from([0., .1, 1., 10., 100.])), seed=seed)
    soft = draw(st.booleans()) if soft is None else soft
    return z, soft_labels(*shape, seed=seed+1) if soft else labels(k, n, *shape[2:], seed=seed+1)

@property_test
@given(cases(), batches(), st.sampled_from(['mean', 'sum', 'none']))
def test_property_reference(case, batch, reduction): check(case, *batch, reduction=reduction)

@property_test
@given(cases(), batches())
def test_property_not_negative_and_gradient_sums_to_zero(case, batch):
    "Each loss is a sum of cross-entropies and divergences: never below 0 (up to rounding), and blind to a common offset"
    loss, terms = make(case, reduction='none')
    out, grad = grad_of(loss, *batch)
    scale = ref.loss(batch[0].numpy(), batch[1].numpy(), terms, reduction='none')[2].sum(1).max()
    assert out.min() >= -1e-12*(1 + scale*max(case[1].get('tau', 1), 1))
    assert grad.sum(1).abs().max() <= 1e-12*max(1, scale)

@property_test
@given(cases(), batches(), st.floats(-1e3, 1e3))
def test_property_offset_per_sample(case, batch, offset):
    z, targ = batch
    shift = offset*torch.linspace(-1, 1, z.shape[0], dtype=f64).view(-1, *[1]*(z.ndim-1))
    loss, _ = make(case, reduction='none')
    a, b = loss(z, targ), loss(z + shift, targ)
    torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-8)   # the sum z + shift is rounded, and scale multiplies that

@property_test
@given(cases(), batches(), st.randoms(use_true_random=False))
def test_property_class_order(case, batch, random):
    z, targ = batch
    perm = list(range(z.shape[1])); random.shuffle(perm)
    perm = torch.tensor(perm)
    moved = targ[:, perm] if targ.is_floating_point() else perm.argsort()[targ]
    loss, _ = make(case, reduction='none')
    a, b = grad_of(loss, z, targ), grad_of(loss, z[:, perm], moved)
    torch.testing.assert_close(b[0], a[0], rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(b[1], a[1][:, perm], rtol=1e-10, atol=1e-10)

@property_test
@given(batches(), alphas, taus)
def test_property_gamma_one_over_k(batch, alpha, tau):
    z, targ = batch
    for got, want in zip(grad_of(LsrKDLoss(alpha, tau, gamma=1/z.shape[1]), z, targ), grad_of(LsrKDLoss(alpha, tau), z, targ)):
        torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-12)

@property_test
@given(batches(), alphas)
def test_property_tau_one_is_label_smoothing(batch, alpha):
    for got, want in zip(grad_of(LsrKDLoss(alpha, tau=1.), *batch), grad_of(LabelSmoothingKDLoss(alpha), *batch)):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-13)

@property_test
@given(batches(), alphas, st.floats(.01, .99))
def test_property_virtual_teacher_at_tau_one_is_teacher_correction(batch, alpha, a):
    for got, want in zip(grad_of(TfKDRegLoss(alpha, 1., a, scale=1), *batch), grad_of(LsrKDLoss(alpha, 1., gamma=a), *batch)):
        torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-12)

@property_test
@given(batches(soft=False), alphas)
def test_property_virtual_teacher_of_label_smoothing(batch, alpha):
    "Spec §2: `a = 1-α+α/K` makes `p^d` the target of label smoothing, so α=1 at τ=1 has its gradient"
    z, y = batch
    k = z.shape[1]
    if not 0 < 1-alpha+alpha/k < 1: return
    got, want = grad_of(TfKDRegLoss(1., 1., 1-alpha+alpha/k), z, y)[1], grad_of(nn.CrossEntropyLoss(label_smoothing=alpha), z, y)[1]
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)

@property_test
@given(cases(), batches())
def test_property_reductions_agree(case, batch):
    by = {r: make(case, reduction=r)[0](*batch) for r in ('mean', 'sum', 'none')}
    torch.testing.assert_close(by['sum'],  by['none'].sum(),  rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(by['mean'], by['none'].mean(), rtol=1e-11, atol=1e-11)

# --- bad input

nan, inf = math.nan, math.inf
BAD_VALUES = [(cls, 'alpha', v) for cls in (LabelSmoothingKDLoss, LsrKDLoss, TfKDRegLoss) for v in (-.1, 1.5, nan, inf)]
BAD_VALUES += [(cls, 'tau', v) for cls in (LsrKDLoss, TfKDRegLoss) for v in (0., -3., nan, inf)]
BAD_VALUES += [(LsrKDLoss, 'gamma', v) for v in (0., 1., -.5, 2., nan)]
BAD_VALUES += [(TfKDRegLoss, 'correct_prob', v) for v in (0., 1., -.5, 99., nan)]
BAD_VALUES += [(TfKDRegLoss, 'scale', v) for v in ('tau3', '', -1., nan, inf)]
BAD_VALUES += [(cls, 'variant', v) for cls in (LabelSmoothingKDLoss, TfKDRegLoss) for v in ('offical', 'Paper', None)]
BAD_VALUES += [(cls, 'reduction', v) for cls in (LabelSmoothingKDLoss, LsrKDLoss, TfKDRegLoss) for v in ('avg', 'batchmean', None)]
case_id = lambda v: getattr(v, '__name__', repr(v))

@pytest.mark.parametrize('cls,arg,value', BAD_VALUES, ids=case_id)
def test_bad_values(cls, arg, value):
    with pytest.raises((ValueError, TypeError) if value is None else ValueError) as e: cls(**{arg: value})
    assert arg in str(e.value) and str(value) in str(e.value)

@pytest.mark.parametrize('multiplier', [-1., nan, inf])
def test_bad_multiplier(multiplier):
    with pytest.raises(ValueError, match='multiplier') as e: TfKDRegLoss(variant='official', multiplier=multiplier)
    assert str(multiplier) in str(e.value)

def test_multiplier_belongs_to_the_official_variant():
    with pytest.raises(ValueError, match='multiplier') as e: TfKDRegLoss(variant='paper', multiplier=100.)
    assert '100' in str(e.value) and 'official' in str(e.value)

NUMBERS = [(LabelSmoothingKDLoss, 'alpha'), (LsrKDLoss, 'alpha'), (LsrKDLoss, 'tau'), (LsrKDLoss, 'gamma'), (TfKDRegLoss, 'alpha'),
           (TfKDRegLoss, 'tau'), (TfKDRegLoss, 'correct_prob'), (TfKDRegLoss, 'scale')]
@pytest.mark.parametrize('value', [True, False, '0.5', [.5], {}, object], ids=repr)
@pytest.mark.parametrize('cls,arg', NUMBERS, ids=case_id)
def test_not_a_number(cls, arg, value):
    with pytest.raises((TypeError, ValueError), match=arg): cls(**{arg: value})

@pytest.mark.parametrize('cls,arg', [n for n in NUMBERS if n[1] != 'gamma'], ids=case_id)
def test_none_is_not_a_number(cls, arg):
    with pytest.raises((TypeError, ValueError), match=arg): cls(**{arg: None})

def test_every_kind_of_number_is_welcome():
    z, y = logits(4, 5), labels(5, 4)
    for half in (np.float64(.5), np.float32(.5)):
        assert LsrKDLoss(half, np.int64(2), gamma=half)(z, y) == LsrKDLoss(.5, 2., .5)(z, y)      # bit for bit: no float32 arithmetic
        assert TfKDRegLoss(half, 2, half, scale=np.float32(4))(z, y) == TfKDRegLoss(.5, 2., .5, scale=4)(z, y)

BAD_SHAPES = dict(
    pred_1d      =(torch.randn(5), torch.tensor(1), 'pred'),
    pred_0d      =(torch.tensor(1.), torch.tensor(1), 'pred'),
    one_class    =(torch.randn(4, 1), torch.zeros(4, dtype=torch.long), 'pred|class'),
    integer_pred =(torch.ones(4, 3, dtype=torch.long), torch.zeros(4, dtype=torch.long), 'pred'),
    too_few      =(torch.randn(4, 3), torch.zeros(3, dtype=torch.long), 'targ|label'),
    too_many     =(torch.randn(4, 3), torch.zeros(5, dtype=torch.long), 'targ|label'),
    one_label    =(torch.randn(4, 3), torch.zeros(1, dtype=torch.long), 'targ|label'),
    one_hot_int  =(torch.randn(4, 3), torch.ones(4, 3, dtype=torch.long), 'targ|label'),
    float_labels =(torch.randn(4, 3), torch.zeros(4), 'targ|label'),
    soft_classes =(torch.randn(4, 3), torch.rand(4, 2), 'targ|label'),
    soft_samples =(torch.randn(4, 3), torch.rand(1, 3), 'targ|label'),
    dense        =(torch.randn(2, 3, 4, 4), torch.zeros(2, 4, 5, dtype=torch.long), 'targ|label'),
    two_columns  =(torch.randn(4, 3), torch.zeros(4, 2, dtype=torch.long), 'targ|label'),
    dense_swapped=(torch.randn(2, 3, 4, 5), torch.zeros(2, 5, 4, dtype=torch.long), 'targ|label'),
    dense_flat   =(torch.randn(2, 3, 4, 4), torch.zeros(2, dtype=torch.long), 'targ|label'),
    dense_soft   =(torch.randn(2, 3, 4, 4), torch.rand(2, 4, 4, 3), 'targ|label'))

@each_loss
@pytest.mark.parametrize('bad', BAD_SHAPES)
def test_wrong_shapes(case, bad):
    pred, targ, names = BAD_SHAPES[bad]
    with pytest.raises((ValueError, TypeError) if bad == 'integer_pred' else ValueError, match=names): make(case)[0](pred, targ)

@each_loss
@pytest.mark.parametrize('shape', [(4, 3), (2, 3, 4, 5)])
def test_labels_with_a_class_axis_of_1(case, shape):
    "fastai's losses flatten the labels, so `[N,1]` and `[N,1,H,W]` reach them too"
    loss, pred = make(case)[0], torch.randn(shape)
    targ = torch.randint(0, 3, shape[:1] + shape[2:])
    assert loss(pred, targ.unsqueeze(1)) == loss(pred, targ)

@each_loss
def test_shape_message_says_what_is_expected(case):
    with pytest.raises(ValueError) as e: make(case)[0](torch.randn(4, 3), torch.zeros(5, dtype=torch.long))
    found, expected = str([5]), str([4])
    assert found in str(e.value).replace('(5,)', found) and expected in str(e.value).replace('(4,)', expected)

@each_loss
@pytest.mark.parametrize('wrong', [3, 100, -1])
def test_label_out_of_range(case, wrong):
    "A label that is no class must not become some other class, silently"
    with pytest.raises((IndexError, ValueError, RuntimeError)): make(case)[0](torch.randn(4, 3), torch.tensor([0, 1, wrong, 2]))

# --- plain PyTorch

@each_loss
def test_plain_pytorch(case):
    torch.manual_seed(0)
    x, y = logits(64, 8, dtype=f32), labels(4, 64)
    model = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 4))
    loss, _ = make(case)
    opt = torch.optim.SGD([*model.parameters(), *([nn.Parameter(torch.zeros(1))] + list(loss.parameters()))], lr=.3)
    losses = []
    for _ in range(60):
        l = loss(model(x), y)
        losses.append(l.item())
        opt.zero_grad(); l.backward(); opt.step()
    assert losses[-1] < losses[0]*.9
    assert isinstance(loss, nn.Module) and not list(loss.parameters()) and not loss.state_dict()
    assert loss.to('cpu') is loss

@each_loss
def test_copies(case):
    z, y = logits(6, 5), labels(5, 6)
    for reduction in ('mean', 'none'):
        loss, _ = make(case, reduction=reduction, ignore_index=2)
        want = loss(z, y)
        buffer = io.BytesIO()
        torch.save(loss, buffer); buffer.seek(0)
        for twin in (copy.copy(loss), copy.deepcopy(loss), pickle.loads(pickle.dumps(loss)), torch.load(buffer, weights_only=False)):
            assert type(twin) is type(loss) and torch.equal(twin(z, y), want)

@each_loss
def test_fastai_attributes(case):
    loss, _ = make(case)
    z, y = logits(6, 5), labels(5, 6)
    assert loss.y_int is True and loss.axis == 1 and loss.reduction == 'mean'
    torch.testing.assert_close(loss.activation(z), z.softmax(1))
    assert torch.equal(loss.decodes(z), z.argmax(1))
    dense, last = logits(2, 5, 3, 4), make(case, axis=-1)[0]
    torch.testing.assert_close(loss.activation(dense), dense.softmax(1))
    assert torch.equal(loss.decodes(dense), dense.argmax(1))
    torch.testing.assert_close(last.activation(dense), dense.softmax(-1))
    assert torch.equal(last.decodes(dense), dense.argmax(-1))
    mean = loss(z, y)
    loss.reduction = 'none'
    assert loss(z, y).shape == (6,)
    loss.reduction = 'sum'
    torch.testing.assert_close(loss(z, y), mean*6)
    loss.axis = -1
    assert loss(logits(2, 6, 5), labels(5, 2, 6)).shape == ()

@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU')
@each_loss
@pytest.mark.parametrize('dtype', [f32, f64, f16, bf16], ids=str)
def test_on_gpu(case, dtype):
    for z, y in [(logits(64, 1000, dtype=dtype), labels(1000, 64)), (logits(2, 21, 64, 64, dtype=dtype), labels(21, 2, 64, 64)),
                 (logits(64, 100, dtype=dtype), soft_labels(64, 100, dtype=f32))]:
        loss, terms = make(case, reduction='sum')
        out, grad = grad_of(loss, z.cuda(), y.cuda())
        value, want, size = ref.loss(z.double().numpy(), y.numpy(), terms, reduction='sum')
        check_value(out.cpu(), value, TOL.get(dtype, 1e-5))
        check_grad(grad.cpu(), want, size, max(TOL.get(dtype, 1e-5), torch.finfo(dtype).eps), floor=1e-7)

# --- fastai

from fastai.callback.core import Callback
from fastai.callback.mixup import MixUp
from fastai.data.block import CategoryBlock, DataBlock, TransformBlock
from fastai.data.transforms import ItemGetter, RandomSplitter
from fastai.interpret import ClassificationInterpretation
from fastai.learner import Learner, load_learner
from fastai.metrics import accuracy
from fastai.torch_core import TensorCategory, TensorImage

@pytest.fixture
def dls():
    x, y = logits(80, 8, dtype=f32), labels(3, 80)
    items = list(zip(x, [f'class {c}' for c in y.tolist()]))
    block = DataBlock(blocks=(TransformBlock, CategoryBlock), get_x=ItemGetter(0), get_y=ItemGetter(1), splitter=RandomSplitter(seed=0))
    return block.dataloaders(items, bs=16, num_workers=0, device='cpu')

@pytest.fixture
def learner(dls, tmp_path):
    def make_learner(loss, **kwargs):
        torch.manual_seed(0)
        learn = Learner(dls, nn.Linear(8, 3), loss_func=loss, path=tmp_path, **kwargs)
        learn.remove_cbs([cb for cb in learn.cbs if type(cb).__name__ == 'ProgressCallback'])
        return learn
    return make_learner

@each_loss
def test_learner_trains(case, learner):
    loss, terms = make(case)
    learn = learner(loss, metrics=accuracy)
    with learn.no_logging():
        learn.fit(3, 1e-1)
    (first, *_), *_, (last, after, _) = learn.recorder.values
    assert last < first
    z, y = torch.cat([learn.model(x) for x,_ in learn.dls.valid]), torch.cat([y for _,y in learn.dls.valid])
    assert after == pytest.approx(ref.loss(z.detach().numpy(), y.numpy(), terms)[0], rel=1e-4)

@each_loss
def test_get_preds(case, learner):
    loss, terms = make(case)
    learn = learner(loss)
    probs, targs, decoded = learn.get_preds(with_decoded=True)
    torch.testing.assert_close(probs.sum(1), torch.ones(len(probs)))
    z = torch.cat([learn.model(x) for x,_ in learn.dls.valid]).detach()
    torch.testing.assert_close(probs, z.softmax(1))
    assert torch.equal(decoded, probs.argmax(1))
    *_, each = learn.get_preds(with_loss=True)
    check_value(each, ref.loss(z.numpy(), targs.numpy(), terms, reduction='none')[0], 1e-5)
    assert loss.reduction == 'mean' and learn.loss_func is loss

@each_loss
def test_interpretation(case, learner):
    learn = learner(make(case)[0])
    interp = ClassificationInterpretation.from_learner(learn)
    losses, idxs = interp.top_losses(5)
    assert losses.shape == (5,) and (losses.diff() <= 0).all()
    assert interp.confusion_matrix().sum() == len(learn.dls.valid_ds)

@each_loss
def test_predict_one(case, learner):
    learn = learner(make(case)[0])
    label, idx, probs = learn.predict(learn.dls.valid_ds.items[0])
    assert label == learn.dls.vocab[idx] and probs.sum().item() == pytest.approx(1)

@each_loss
def test_export_and_load(case, learner, tmp_path):
    learn = learner(make(case)[0])
    want = learn.get_preds()[0]
    learn.export('learn.pkl')
    loaded = load_learner(tmp_path/'learn.pkl')
    z, y = logits(6, 3), labels(3, 6)
    assert type(loaded.loss_func) is type(learn.loss_func) and torch.equal(loaded.loss_func(z, y), learn.loss_func(z, y))
    got, _, decoded = loaded.get_preds(dl=loaded.dls.test_dl(learn.dls.valid_ds.items), with_decoded=True)
    torch.testing.assert_close(got, want)
    assert torch.equal(decoded, want.argmax(1))

class MixedLossIsSoftLabelLoss(Callback):
    "After MixUp has mixed two losses, the learner's loss is ours on mixed labels"
    order = MixUp.order + 1
    def before_fit(self): self.seen = 0
    def after_loss(self):
        if not self.training: return
        k, a, b, lam = self.pred.shape[1], self.yb[0], self.mix_up.yb1[0], self.mix_up.lam[:,None]
        q = lam*F.one_hot(torch.as_tensor(a), k) + (1-lam)*F.one_hot(torch.as_tensor(b), k)
        want = copy.deepcopy(self.loss_of)(self.pred.detach(), torch.Tensor(q))
        assert self.learn.loss_grad.item() == pytest.approx(want.item(), rel=1e-5)
        self.seen += 1

@each_loss
def test_mixup(case, learner):
    loss, _ = make(case)
    check_mix = MixedLossIsSoftLabelLoss()
    check_mix.loss_of = make(case)[0]
    learn = learner(loss, cbs=[MixUp(.4), check_mix])
    weights = learn.model.weight.detach().clone()
    with learn.no_logging(): learn.fit(2, 1e-2)
    assert check_mix.seen == 8 and not torch.equal(weights, learn.model.weight)
    assert all(math.isfinite(v) for row in learn.recorder.values for v in row)
    assert learn.loss_func is loss and loss.reduction == 'mean'

@each_loss
def test_tensor_subclasses(case):
    "fastai hands over TensorImage-like predictions and TensorCategory targets"
    loss, _ = make(case)
    z, y = logits(6, 5, dtype=f32), labels(5, 6)
    want, wgrad = grad_of(loss, z, y)
    leaf = z.clone().requires_grad_()
    out = loss(TensorImage(leaf), TensorCategory(y))
    out.backward()
    assert out.item() == want.item() and torch.equal(leaf.grad, wgrad)
