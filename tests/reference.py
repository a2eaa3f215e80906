"""The label-only losses of the papers, written a second time: float64 NumPy, dense [N,K] targets, one loop per rule.

Nothing here is taken from the package: every function follows one equation of Yuan 2019 or Wang 2020, as slowly as it is printed.
"""
from typing import NamedTuple
import numpy as np

class Term(NamedTuple):
    "`weight · D_KL(target, softmax(z/tau))`, or the cross-entropy `weight · H(target, softmax(z/tau))`"
    weight: float
    target: np.ndarray
    tau: float
    form: str

def log_softmax(z):
    "Row-wise, shifted by the row's maximum"
    z = z - z.max(1, keepdims=True)
    return z - np.log(np.exp(z).sum(1, keepdims=True))

def softmax(z): return np.exp(log_softmax(z))

def xlogy(x, y):
    "`x·log y`, and 0 where `x` is 0"
    return np.where(x == 0, 0., x*np.log(np.where(x == 0, 1., y)))

def two_valued(y, n_classes, on, off):
    "[N,K] matrix: `on` at the label, `off` elsewhere"
    t = np.full((len(y), n_classes), float(off))
    t[np.arange(len(y)), y] = on
    return t

def one_hot(y, n_classes): return two_valued(y, n_classes, 1., 0.)

def evaluate(z, terms):
    "Values [N], gradients [N,K] and gradient sizes [N,K] (`Σ weight·(p+t)/τ`, what rounding errors are measured against)"
    z = np.asarray(z, np.float64)
    value, grad, size = np.zeros(len(z)), np.zeros_like(z), np.zeros_like(z)
    for weight, t, tau, form in terms:
        logp = log_softmax(z/tau)
        p = np.exp(logp)
        value -= weight*np.where(t == 0, 0., t*logp).sum(1)
        if form == 'kl': value += weight*xlogy(t, t).sum(1)
        grad += weight*(p - t)/tau
        size += weight*(p + t)/tau
    return value, grad, size

# --- one function per method: (labels [N], K) -> the terms of its equation

def label_smoothing(alpha=0.1, variant='paper'):
    "Yuan eq. 1–3; official: plain cross-entropy with 1-α on the label and α/(K-1) elsewhere"
    def terms(y, n_classes):
        if variant == 'official': return [Term(1., two_valued(y, n_classes, 1-alpha, alpha/(n_classes-1)), 1., 'ce')]
        return [Term(1-alpha, one_hot(y, n_classes), 1., 'ce'),
                Term(alpha, np.full((len(y), n_classes), 1/n_classes), 1., 'kl')]
    return terms

def lsr_kd(alpha=0.1, tau=3., gamma=None):
    "Wang eq. 10; with `gamma` eq. 11–12. The factor is τ and the target is not softened"
    def terms(y, n_classes):
        if gamma is None: soft = np.full((len(y), n_classes), 1/n_classes)
        else:             soft = two_valued(y, n_classes, gamma, (1-gamma)/(n_classes-1))
        return [Term(1-alpha, one_hot(y, n_classes), 1., 'ce'), Term(alpha*tau, soft, tau, 'kl')]
    return terms

def virtual_target(y, n_classes, correct_prob, tau, variant='paper'):
    "Yuan eq. 8, softened: `softmax(log p^d / τ)`; official: `softmax(p^d / τ)`"
    pd = two_valued(y, n_classes, correct_prob, (1-correct_prob)/(n_classes-1))
    return softmax(pd/tau if variant == 'official' else np.log(pd)/tau)

def tf_kd_reg(alpha=0.1, tau=20., correct_prob=0.99, scale='tau2', variant='paper', multiplier=1.):
    "Yuan eq. 9; official: target from probabilities, student not softened, KL averaged over N·K, times `multiplier`"
    def terms(y, n_classes):
        soft = virtual_target(y, n_classes, correct_prob, tau, variant)
        hard = Term(1-alpha, one_hot(y, n_classes), 1., 'ce')
        if variant == 'official': return [hard, Term(alpha*multiplier/n_classes, soft, 1., 'kl')]
        s = {'tau': tau, 'tau2': tau**2}.get(scale, scale)
        return [hard, Term(alpha*s, soft, tau, 'kl')]
    return terms

# --- what a loss class adds: soft labels, dense predictions, ignored positions, reductions

def _per_sample(z, targ, terms):
    "`evaluate` for integer labels, or the mixture `Σ_c q_c·(value for label c)` for label distributions"
    n, n_classes = z.shape
    if np.issubdtype(targ.dtype, np.integer): return evaluate(z, terms(targ, n_classes))
    value, grad, size = np.zeros(n), np.zeros(z.shape), np.zeros(z.shape)
    for c in range(n_classes):
        v, g, s = evaluate(z, terms(np.full(n, c), n_classes))
        value += targ[:, c]*v
        grad  += targ[:, c, None]*g
        size  += targ[:, c, None]*s
    return value, grad, size

def loss(z, targ, terms, axis=1, reduction='mean', ignore_index=-100):
    "Value, gradient of the value's sum with respect to `z`, and that gradient's size; `z` has its classes at `axis`"
    z, targ = np.asarray(z, np.float64), np.asarray(targ)
    soft = not np.issubdtype(targ.dtype, np.integer)
    last = np.moveaxis(z, axis, -1)
    flat = last.reshape(-1, last.shape[-1])
    labels = np.moveaxis(targ.astype(np.float64), axis, -1).reshape(flat.shape) if soft else targ.reshape(-1)
    keep = np.ones(len(flat), bool) if soft else labels != ignore_index
    value, grad, size = np.zeros(len(flat)), np.zeros(flat.shape), np.zeros(flat.shape)
    value[keep], grad[keep], size[keep] = _per_sample(flat[keep], labels[keep], terms)
    back = lambda a: np.moveaxis(a.reshape(last.shape), -1, axis)
    if reduction == 'none': return value.reshape(last.shape[:-1]), back(grad), back(size)
    count = keep.sum() if reduction == 'mean' else 1
    return value.sum()/count, back(grad)/count, back(size)/count

# --- distillation from networks: the soft target is given by logits, per sample

def ensemble_target(logits, tau):
    "Mean of the teachers' softened probabilities, `[N,K]`"
    return sum(softmax(np.asarray(zt, np.float64)/tau) for zt in logits)/len(logits)

def kd(z, targ, teachers, alpha=.9, tau=4., scale='tau2', variant='paper', multiplier=1., axis=1, reduction='mean', ignore_index=-100):
    """Yuan eq. 4, `(1-α) H(q,p) + α s D_KL(p^t_τ, p_τ)`, averaged over a list of teachers; official: the KL is the mean over N·K, times `multiplier`

    Value, gradient of its sum with respect to `z`, and that gradient's size, as `loss` has them."""
    z,targ = np.asarray(z, np.float64),np.asarray(targ)
    n_classes,last = z.shape[axis],np.moveaxis(z, axis, -1)
    rows = lambda a: np.moveaxis(np.asarray(a, np.float64), axis, -1).reshape(-1, n_classes)
    flat,soft_labels = rows(z),not np.issubdtype(targ.dtype, np.integer)
    keep = np.ones(len(flat), bool) if soft_labels else targ.reshape(-1) != ignore_index
    q = rows(targ) if soft_labels else one_hot(np.where(keep, targ.reshape(-1), 0), n_classes)
    s = {'tau': tau, 'tau2': tau**2}.get(scale, scale)
    if variant == 'official': s = s*multiplier/n_classes
    terms = [Term(1-alpha, q, 1., 'ce')] + [Term(alpha*s/len(teachers), softmax(rows(zt)/tau), tau, 'kl') for zt in teachers]
    value,grad,size = (np.where(keep.reshape(-1, *[1]*(a.ndim-1)), a, 0.) for a in evaluate(flat, terms))
    back = lambda a: np.moveaxis(a.reshape(last.shape), -1, axis)
    if reduction == 'none': return value.reshape(last.shape[:-1]), back(grad), back(size)
    count = keep.sum() if reduction == 'mean' else 1
    return value.sum()/count, back(grad)/count, back(size)/count
