"""The label-only losses of the papers, written a second time: float64 NumPy, dense [N,K] targets, one loop per rule.

Nothing here is taken from the package: every function follows one equation of Yuan 2019 or Wang 2020, as slowly as it is printed.
"""
import math
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

# --- memory replay and teacher correction

def put_on_label(logits, y, value, tau=1.):
    "Wang eq. 16: `value` on the label; the others share the rest as `softmax(logits/τ)` without the label shares it, `[N,K]`"
    out = np.empty(np.shape(logits))
    for i,(z,c) in enumerate(zip(np.asarray(logits, np.float64), y)):
        others = [m for m in range(len(z)) if m != c]
        w = np.exp((z[others] - z[others].max())/tau)
        out[i, others],out[i, c] = (1-value)*w/w.sum(),value
    return out

def corrected_soft_labels(logits, q, gamma, tau=1.):
    "Teacher correction's target under label distributions: the mixture of the targets for every label"
    n_classes = q.shape[1]
    return sum(q[:, c, None]*put_on_label(logits, np.full(len(q), c), gamma, tau) for c in range(n_classes))

def mrkd(z, y, copies, alpha=.25, tau=3., gamma=None):
    "Wang eq. 13–14, factor τ²; with `gamma` eq. 16–17, factor τ. Value `[N]`, gradient and its size, from logits `[N,K]` of the student and of each copy"
    z = np.asarray(z, np.float64)
    targets = [softmax(np.asarray(o, np.float64)/tau) if gamma is None else put_on_label(o, y, gamma, tau) for o in copies]
    scale = alpha*(tau**2 if gamma is None else tau)/len(copies)
    return evaluate(z, [Term(1-alpha, one_hot(y, z.shape[1]), 1., 'ce')] + [Term(scale, t, tau, 'kl') for t in targets])

def refresh_steps(kappa, n_steps):
    "The steps before which copies move: the first one at or after each multiple of κ, a `Fraction`"
    steps,multiple = set(),kappa
    while -(-multiple//1) <= n_steps:
        steps.add(int(-(-multiple//1)))
        multiple += kappa
    return sorted(steps)

# --- Song et al. 2023: subsets, rewrites, WSL, consistent knowledge mining; one sample at a time, from logits `[N,K]`

def label_entropy(z, y, tau=1.):
    "Cross-entropy on the label `[N]`: `log(1 + Σ_{i≠k} exp((z_i - z_k)/τ))`, which stays exact near 0"
    z = np.asarray(z, np.float64)
    return np.array([np.log1p(sum(math.exp(min((row[i]-row[c])/tau, 700.)) for i in range(len(row)) if i != c)) for row,c in zip(z, y)])

def is_correct(zt, y): return np.array([all(row[c] > row[i] for i in range(len(row)) if i != c) for row,c in zip(np.asarray(zt, np.float64), y)])

def is_ahead(z, zt, y, tau):
    "The student's probability of the label is above the teacher's; `tau`: teacher's, student's. The rarer the doubt, the smaller the entropy"
    return label_entropy(z, y, tau[1]) < label_entropy(zt, y, tau[0])

def smoothed(y, n_classes, t): return two_valued(y, n_classes, t, (1-t)/(n_classes-1))

def amplified(logits, y, delta, tau=1.):
    "Eq. 4 and 5 (of the teacher or of the student, by whose logits are given)"
    p = softmax(np.asarray(logits, np.float64)/tau)
    return np.concatenate([put_on_label(logits[i:i+1], y[i:i+1], min(p[i,c]+delta, 1.), tau) for i,c in enumerate(y)])

def replaced(weak, strong, y, what, tau=1.):
    "Eq. 1 and 2: who says how sure, and who shares the rest"
    p = {'weak': softmax(np.asarray(weak, np.float64)/tau), 'strong': softmax(np.asarray(strong, np.float64)/tau)}
    if what == 'full': return p['strong']
    sure,rest = ('weak', strong) if what == 'partial' else ('strong', weak)
    return np.concatenate([put_on_label(rest[i:i+1], y[i:i+1], p[sure][i,c], tau) for i,c in enumerate(y)])

def wsl_weights(z, zt, y, tau=1., eps=1e-7): return -np.expm1(-label_entropy(z, y, tau)/(label_entropy(zt, y, tau)+eps))

def per_sample(z, terms_of):
    "`evaluate` of each row with its own terms"
    parts = [evaluate(z[i:i+1], terms_of(i)) for i in range(len(z))]
    return tuple(np.concatenate(o) for o in zip(*parts))

def wsl(z, y, zt, beta=2.5, tau=2., weight_tau=1., smoothing=0.):
    "Value `[N]`, gradient and its size"
    z,zt = np.asarray(z, np.float64),np.asarray(zt, np.float64)
    k = z.shape[1]
    w,soft,hard = wsl_weights(z, zt, y, weight_tau),softmax(zt/tau),(1-smoothing)*one_hot(y, k)+smoothing/k
    return per_sample(z, lambda i: [Term(1., hard[i:i+1], 1., 'ce'), Term(beta*tau**2*w[i], soft[i:i+1], tau, 'ce')])

def ckm_target(z, y, zt, tau_teacher=.7, tau_student=1., smooth_to=.99):
    z,zt = np.asarray(z, np.float64),np.asarray(zt, np.float64)
    mined = is_correct(zt, y) & is_ahead(z, zt, y, (tau_teacher, tau_student))
    return np.where(mined[:,None], smoothed(y, z.shape[1], smooth_to), softmax(zt/tau_teacher))

def ckm(z, y, zt, tau_teacher=.7, tau_student=1., smooth_to=.99):
    "Value `[N]`, gradient and its size"
    return evaluate(z, [Term(1., ckm_target(z, y, zt, tau_teacher, tau_student, smooth_to), tau_student, 'ce')])
