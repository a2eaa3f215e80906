"Our methods with their equations by hand, and learners small enough to train hundreds of times"
import copy
from dataclasses import dataclass
from functools import lru_cache, partial
from types import SimpleNamespace

import torch, torch.nn.functional as F
from fastai.basics import Callback, CrossEntropyLossFlat, Learner, SGD, accuracy
from fastai.callback.progress import ProgressCallback
from torch import Tensor, nn

from networks import lively, norms
from fastkdtf.vision.data import kd_dataloaders
from fastkdtf.vision.loader import batch_info
from fastkdtf.callback.distill import Distill, KnowledgeDistillation, LsrKD, MemoryReplay, TfKDReg
from fastkdtf.callback.effdstl import CKM, WSL
from fastkdtf.callback.memories import DLB, MeanTeacher, OnlineLabelSmoothing, PSKD
from fastkdtf.callback.relatives import DIST, DKD, MaxSup, NKD, StandardisedKD
from fastkdtf.callback.views import CSKD, RDrop
from fastkdtf.vision.models import create_model
from fastkdtf.callback.checkpoint import seed_run
from fastkdtf.callback.selfguide import SelfGuidance, StochasticDepth
from fastkdtf.targets import Amplify, Replace
from fastkdtf.teachers.network import EnsembleTeacher
from fastkdtf.teachers.cache import CachedTeacher

K = 10


# ---------------------------------------------------------------- networks and learners

@lru_cache
def network(seed):
    "A teacher of 240 kB, never trained: what it says matters here, not whether it is right"
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        net = lively(nn.Sequential(nn.Flatten(), nn.Linear(192, 300), nn.BatchNorm1d(300), nn.ReLU(), nn.Dropout(.5), nn.Linear(300, K)))
    net[-1].weight.data.mul_(3)
    return net

def convolutions():
    return lively(nn.Sequential(nn.Conv2d(3, 6, 3, 2, 1, bias=False), nn.BatchNorm2d(6), nn.ReLU(),
                                nn.Conv2d(6, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(32, K)))

def dropping():
    net = convolutions()
    return net.insert(7, nn.Dropout(.3))

def residual(): return lively(create_model('resnet8', K))

def per_sample(model):
    "Batch norms replaced and dropout gone, so that no sample's output depends on the rest of its batch"
    for name,m in list(model.named_modules()):
        if isinstance(m, nn.Dropout): m.p = 0.
        if isinstance(m, norms): model.get_submodule(name.rpartition('.')[0]).register_module(name.rpartition('.')[2], nn.GroupNorm(1, m.num_features))
    return model

@lru_cache
def digits(bs=16, device='cpu'): return kd_dataloaders('digits', bs=bs, train_subset=48, valid_pct=.02, device=device)

def learner(cbs=(), net=convolutions, dls=None, seed=0, **kwargs):
    dls = dls or digits()
    seed_run(seed, dls)
    kwargs = dict(loss_func=CrossEntropyLossFlat(), opt_func=partial(SGD, mom=.9), lr=.02, metrics=accuracy, path='.') | kwargs
    learn = Learner(dls, net(), cbs=cbs, **kwargs).remove_cb(ProgressCallback)
    seed_run(seed+1, dls)
    made[:] = [learn, copy.deepcopy(learn.model.state_dict())]
    return learn

made = []   # the last learner and its first weights


# ---------------------------------------------------------------- what a step holds

def plain(t): return t.detach().cpu().clone().as_subclass(Tensor)

class Spy(Callback):
    "Each training step, after our terms and before GradientAccumulation and the scaler"
    order,run_valid = 5.5,False
    def before_fit(self): self.steps = []
    def before_batch(self):
        self.now = SimpleNamespace(x=plain(self.learn.xb[0]), student=copy.deepcopy(self.learn.model).cpu())
        self.now.students,self.now.total = [o.student for o in self.steps] + [self.now.student],self.learn.n_iter*self.learn.n_epoch
        info = batch_info(self.learn.dl)
        self.now.idx,self.now.partners = info and info.idx.tolist(),[plain(x) for x in getattr(info, 'beside', ())]
        self.now.before,self.now.epoch,self.now.n_epoch = list(self.steps),self.learn.epoch,self.learn.n_epoch
    def after_pred(self):
        self.now.z,self.now.sub,self.now.bits,self.now.subs = plain(self.learn.pred),None,None,{}
        self.pred = self.learn.pred   # half precision replaces it
        self.pred.retain_grad()
        for cb in self.learn.cbs:
            if isinstance(cb, (SelfGuidance, StochasticDepth)): self.now.bits = cb.bits
            if isinstance(cb, (SelfGuidance, RDrop)): self.now.subs[type(cb).__name__] = plain(cb.batch.z)
        self.now.sub = self.now.subs.get('SelfGuidance')
    def after_loss(self):
        mix,y = getattr(self.learn.loss_func, '__self__', None),plain(self.learn.y)
        lam = None if mix is None else plain(torch.as_tensor(mix.lam))
        self.now.labels = [(y, 1.)] if mix is None else [(y, lam), (plain(mix.yb1[0]), 1-lam)]
        self.now.loss = plain(self.learn.loss_grad)
        self.steps.append(self.now)
    def after_backward(self): self.now.grad = plain(self.pred.grad)


# ---------------------------------------------------------------- the equations

def one_hot(y): return F.one_hot(y, K).double()
def says(net, x):
    with torch.no_grad(): return copy.deepcopy(net).eval()(x).double()
def kl(t, z, tau): return (torch.xlogy(t, t) - t*F.log_softmax(z/tau, 1)).sum(1)
def entropy(t, z, tau=1.): return -(t*F.log_softmax(z/tau, 1)).sum(1)
def softened(net, x, tau): return (says(net, x)/tau).softmax(1)
def with_label_at(p, y, value):
    "`p` with `value` on the label, the rest in proportion"
    q = one_hot(y)
    rest = p*(1-q)
    return value[:,None]*q + (1-value)[:,None]*rest/rest.sum(1, keepdim=True)

def at(p, y): return p.gather(1, y[:,None])[:,0]

def past(o, n=2, interval=2):
    "The copies of Algorithm 1 before this step: refreshed before every second one"
    copies = [o.students[0]]*n
    for t in range(1, len(o.students)+1):
        if t%interval == 0 and interval < o.total: copies = [o.students[t-1], *copies[:-1]]   # never where it is the whole training
    return copies

def uniform(z, y, o): return .3*3*kl(torch.full_like(z, 1/K), z, 3.)
def corrected(z, y, o): return .3*3*kl(with_label_at(torch.full_like(z, 1/K), y, torch.full_like(z[:,0], .25)), z, 3.)
def virtual(y): return with_label_at(torch.full((len(y), K), 1/K, dtype=torch.double), y, torch.full((len(y),), .99, dtype=torch.double))
def tf_kd_reg(z, y, o): return .3*400*kl((virtual(y).log()/20).softmax(1), z, 20.)
def tf_kd_official(z, y, o): return .3*5/K*kl((virtual(y)/20).softmax(1), z, 1.)
def kd(z, y, o): return .6*16*kl(softened(network(7), o.x, 4.), z, 4.)
def ensemble(z, y, o): return .6*16*kl((softened(network(7), o.x, 4.) + softened(network(8), o.x, 4.))/2, z, 4.)
def replay(z, y, o): return .25*9*sum(kl(softened(c, o.x, 3.), z, 3.) for c in past(o))/2
def replay_corrected(z, y, o):
    return .25*3*sum(kl(with_label_at(softened(c, o.x, 3.), y, torch.full_like(z[:,0], .3)), z, 3.) for c in past(o))/2
def self_guidance(z, y, o): return .25*9*kl((z.detach()/3).softmax(1), o.sub.double(), 3.)
def wsl(z, y, o):
    zt = says(network(7), o.x)
    weight = 1 - torch.exp(-entropy(one_hot(y), z.detach())/(entropy(one_hot(y), zt)+1e-7))
    return 2.5*4*weight*entropy((zt/2).softmax(1), z, 2.)
def ckm(z, y, o):
    pt,p = softened(network(7), o.x, .7),z.softmax(1)
    mined = (pt.argmax(1) == y) & (at(p, y) > at(pt, y))
    return entropy(torch.where(mined[:,None], virtual(y), pt), z)
def amplified(z, y, o):
    pt = softened(network(7), o.x, 2.)
    return .5*4*kl(with_label_at(pt, y, (at(pt, y)+.2).clamp(max=1)), z, 2.)
def replaced(z, y, o):
    return .5*4*kl(with_label_at(softened(network(7), o.x, 2.), y, at(softened(network(8), o.x, 2.), y)), z, 2.)

# what a training remembers

def pskd_weight(o): return .3*(o.epoch+1)/o.n_epoch
def pskd(z, y, o):
    last = {i: row.double() for b in o.before for i,row in zip(b.idx, b.z)}
    target = torch.stack([last[i].softmax(0) if i in last else q for i,q in zip(o.idx, one_hot(y))])
    return pskd_weight(o)*entropy(target, z)

def ols(z, y, o):
    means = torch.full((K, K), 1/K, dtype=torch.double)
    last = [(row.double().softmax(0), c) for b in o.before if b.epoch == o.epoch-1 for row,c in zip(b.z, b.labels[0][0])]
    for k in range(K):
        right = [p for p,c in last if c == k == p.argmax()]
        if right: means[k] = torch.stack(right).mean(0)
    return .5*entropy(means[y], z)

def dlb(z, y, o):
    n = len(z)//2
    if not o.before: return 0*z.sum(1)
    assert o.before[-1].idx[n:] == o.idx[:n]
    known = (o.before[-1].z[n:].double()/3).softmax(1)
    return torch.cat([2*9*kl(known, z[:n], 3.), 0*z[n:].sum(1)])

def cskd(z, y, o):
    if o.bits is not None and o.sub is None: target = subnetwork_by_hand(o, *o.partners)   # the branches that StochasticDepth has dropped
    else:
        with torch.no_grad(): target = copy.deepcopy(o.student).train()(*o.partners)
    target = target.double()
    return 16*kl((target/4).softmax(1), z, 4.)

def rdrop(z, y, o):
    other = o.subs['RDrop'].double()
    return .6*.5*(kl(z.softmax(1), other, 1.) + kl(other.softmax(1), z, 1.))

def average(o, decay=.9):
    "The running average of the weights before this step"
    mean = copy.deepcopy(o.students[0])
    for t,student in enumerate(o.students[1:], 1):
        keep = min(1-1/(t+1), decay)
        for ours,theirs in zip(mean.state_dict().values(), student.state_dict().values()):
            ours.copy_(keep*ours + (1-keep)*theirs if ours.is_floating_point() else theirs)
    return mean
def mean_teacher(z, y, o): return kl(softened(average(o), o.x, 1.), z, 1.)

# the divergence taken apart

def max_sup(z, y, o): return .3*(z.max(1)[0] - z.mean(1))
def among_others(z, y, tau):
    "The distribution of the other classes among themselves, without the label's column"
    return (z[~one_hot(y).bool()].view(len(y), K-1)/tau).softmax(1)
def dkd(z, y, o):
    zt = says(network(7), o.x)
    b,bt = at((z/4).softmax(1), y),at((zt/4).softmax(1), y)
    pair = bt*(bt/b).log() + (1-bt)*((1-bt)/(1-b)).log()
    n,nt = among_others(z, y, 4.),among_others(zt, y, 4.)
    return 16*(pair + 8*(nt*(nt/n).log()).sum(1))
def nkd(z, y, o):
    zt = says(network(7), o.x)
    n,nt = among_others(z, y, 2.),among_others(zt, y, 2.)
    return -at(zt.softmax(1), y)*at(z.log_softmax(1), y) - 1.5*4*(nt*n.log()).sum(1)
def correlation(a, b):
    a,b = a-a.mean(1, keepdim=True),b-b.mean(1, keepdim=True)
    return F.cosine_similarity(a, b, dim=1, eps=0.)
def dist(z, y, o):
    p,t = z.softmax(1),softened(network(7), o.x, 1.)
    value = 2*(1-correlation(p, t).mean()) + 2*(1-correlation(p.T, t.T).mean())
    return value.expand(len(z))
def standardised_kd(z, y, o):
    standard = lambda z: (z-z.mean(1, keepdim=True))/z.std(1, keepdim=True)
    return 9*4*kl((standard(says(network(7), o.x))/2).softmax(1), standard(z), 2.)

def cached(): return CachedTeacher(network(7), 'cache', dtype='float32')   # in the working directory

@dataclass
class Method:
    "A callback of ours and what it is, by hand"
    make:object # makes it, given changed arguments
    soft:object=None # (student's logits, labels, step) → what it adds to each sample's loss
    hard:float=1. # weight of the learner's own loss
    off:dict|None=None # arguments that leave it without weight
    net:object=convolutions # makes the student
    steps:int=1 # of the optimizer, for each batch of the loader
    hard_at:object=None # step → weight of the learner's own loss, where it changes

def smoothing(z, y, o): return .3*kl(torch.full_like(z, 1/K), z, 1.)

METHODS = {   # by the name in the list of methods; others are forms of these
    'LSR':              Method(partial(LsrKD, alpha=.3, tau=1.), smoothing, .7, dict(alpha=0.)),
    'LsrKD':            Method(partial(LsrKD, alpha=.3), uniform, .7, dict(alpha=0.)),
    'LsrKD-TC':         Method(partial(LsrKD, alpha=.3, gamma=.25), corrected, .7, dict(alpha=0.)),
    'TfKDReg':          Method(partial(TfKDReg, alpha=.3), tf_kd_reg, .7, dict(alpha=0.)),
    'TfKDReg-official': Method(partial(TfKDReg, alpha=.3, variant='official', multiplier=5.), tf_kd_official, .7, dict(alpha=0.)),
    'KD':               Method(lambda alpha=.6, **kw: KnowledgeDistillation(network(7), alpha, **kw), kd, .4, dict(alpha=0.)),
    'KD cached':        Method(lambda alpha=.6, **kw: KnowledgeDistillation(cached(), alpha, **kw), kd, .4, dict(alpha=0.)),
    'KD ensemble':      Method(lambda alpha=.6, **kw: KnowledgeDistillation(EnsembleTeacher([network(7), network(8)]), alpha, **kw), ensemble, .4, dict(alpha=0.)),
    'MemoryReplay':     Method(partial(MemoryReplay, 2, interval_steps=2), replay, .75, dict(alpha=0.)),
    'MemoryReplay-TC':  Method(partial(MemoryReplay, 2, interval_steps=2, gamma=.3), replay_corrected, .75, dict(alpha=0.)),
    'StochasticDepth':  Method(StochasticDepth, None, 1., dict(p_last=1.), residual),
    'SelfGuidance':     Method(SelfGuidance, self_guidance, 1., None, residual),
    'WSL':              Method(lambda beta=2.5, **kw: WSL(network(7), beta, **kw), wsl, 1., dict(beta=0.)),
    'CKM':              Method(lambda **kw: CKM(network(7), **kw), ckm, 0.),
    'PSKD':             Method(lambda alpha_t=.3, **kw: PSKD(alpha_t, **kw), pskd, .7, dict(alpha_t=0.), hard_at=lambda o: 1-pskd_weight(o)),
    'OnlineLabelSmoothing': Method(OnlineLabelSmoothing, ols, .5, dict(alpha=1.)),
    'DLB':              Method(DLB, dlb, steps=2),
    'CSKD':             Method(CSKD, cskd, off=dict(lam=0.)),
    'RDrop':            Method(RDrop, rdrop, net=dropping),
    'MeanTeacher':      Method(partial(MeanTeacher, .9, rampup=0), mean_teacher, off=dict(w=0.)),
    'MaxSup':           Method(lambda alpha=.3, **kw: MaxSup(alpha, **kw), max_sup, off=dict(alpha=0.)),
    'DKD':              Method(lambda **kw: DKD(network(7), warmup=1, **kw), dkd),
    'NKD':              Method(lambda **kw: NKD(network(7), tau=2., **kw), nkd),
    'DIST':             Method(lambda **kw: DIST(network(7), **kw), dist),
    'StandardisedKD':   Method(lambda **kw: StandardisedKD(network(7), **kw), standardised_kd, .1, dict(hard=1., soft=0.)),
    'Distill Amplify':  Method(lambda alpha=.5, **kw: Distill(network(7), alpha, 2., rewrite=Amplify(.2), **kw), amplified, .5, dict(alpha=0.)),
    'Distill Replace':  Method(lambda alpha=.5, **kw: Distill(network(7), alpha, 2., rewrite=Replace(network(8), 'confidence'), **kw), replaced, .5, dict(alpha=0.)),
}

def cross_entropy(z, y, **kwargs): return F.cross_entropy(z, y, **kwargs)

def by_hand(
    o, # a step as `Spy` noted it
    *methods, # that train together
    base=cross_entropy, # the learner's own loss of logits and labels, which takes `reduction`
):
    "The whole loss of a training step, in float64: the terms of its one or two labels by their share"
    z,hard = o.z.double(),1 + sum((m.hard_at(o) if m.hard_at else m.hard)-1 for m in methods)
    mean = lambda losses, share: (losses*torch.as_tensor(share, dtype=torch.double)).mean()
    total = 0.
    for y,share in o.labels:
        ce = lambda z: base(z, y) if len(o.labels) == 1 else mean(base(z, y, reduction='none'), share)
        total = total + hard*ce(z) + sum(mean(m.soft(z, y, o), share) for m in methods if m.soft)
        total = total + sum(ce(sub.double()) for sub in o.subs.values())   # the other pass learns from the labels too
    return total

def subnetwork_by_hand(o, x=None):
    "What the student says without the branches that were dropped: their last norm returns nothing to add"
    class Nothing(nn.Module):
        def forward(self, x): return torch.zeros_like(x)
    net = create_model('resnet8', K)
    net.load_state_dict(o.student.state_dict())
    for stage,bit in zip(net.stages, o.bits, strict=True):
        if not bit: stage[0].bn2 = Nothing()
    with torch.no_grad(): return net.train()(o.x if x is None else x)
