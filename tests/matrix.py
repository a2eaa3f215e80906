"""Our methods with their equations by hand, and learners small enough to train hundreds of times

With FASTKDTF_TEST_DEVICE=cuda they train on a GPU."""
import copy, os, warnings
from collections import OrderedDict
from dataclasses import dataclass
from functools import lru_cache, partial
from types import SimpleNamespace

import numpy as np, pandas as pd, torch, torch.nn.functional as F
from fastai.basics import Callback, CategoryBlock, CrossEntropyLossFlat, DataLoader, DataLoaders, Learner, SGD, accuracy
from fastai.callback.progress import ProgressCallback
from fastai.layers import NoneReduce
from fastai.tabular.core import Categorify, FillMissing, Normalize
from fastai.tabular.data import TabularDataLoaders
from fastai.tabular.model import TabularModel
from fastai.vision.models.unet import DynamicUnet
from torch import Tensor, nn
from torch.distributions.beta import Beta

from networks import lively, norms
from fastkdtf.vision.data import kd_dataloaders
from fastkdtf.vision.cifar_nets import BasicBlock, CifarResNet
from fastkdtf.vision.loader import batch_info, with_index
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
device = os.environ.get('FASTKDTF_TEST_DEVICE', 'cpu')


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
def digits(bs=16, device=device): return kd_dataloaders('digits', bs=bs, train_subset=48, valid_pct=.02, device=device)

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
def logits_of(out): return out if isinstance(out, Tensor) else out.logits

class Spy(Callback):
    "Each training step, after our terms and before GradientAccumulation and the scaler"
    order,run_valid = 5.5,False
    def __init__(self, twin=copy.deepcopy): self.twin = twin   # copies a student
    def before_fit(self): self.steps = []
    def before_batch(self):
        inputs = tuple(map(plain, self.learn.xb))
        self.now = SimpleNamespace(x=inputs if len(inputs) > 1 else inputs[0], student=self.twin(self.learn.model).cpu(), twin=self.twin)
        self.now.students,self.now.total = [o.student for o in self.steps] + [self.now.student],self.learn.n_iter*self.learn.n_epoch
        info = batch_info(self.learn.dl)
        self.now.idx,self.now.partners = info and info.idx.tolist(),[plain(x) for x in getattr(info, 'beside', ())]
        self.now.before,self.now.epoch,self.now.n_epoch = list(self.steps),self.learn.epoch,self.learn.n_epoch
    def after_pred(self):
        self.pred = logits_of(self.learn.pred)   # half precision replaces it
        self.now.z,self.now.sub,self.now.bits,self.now.subs = plain(self.pred),None,None,{}
        self.pred.retain_grad()
        for cb in self.learn.cbs:
            if isinstance(cb, (SelfGuidance, StochasticDepth)): self.now.bits = cb.bits
            if isinstance(cb, (SelfGuidance, RDrop)): self.now.subs[type(cb).__name__] = plain(logits_of(cb.batch.z))
        self.now.sub = self.now.subs.get('SelfGuidance')
    def after_loss(self):
        mix,y = getattr(self.learn.loss_func, '__self__', None),plain(self.learn.y)
        if y.shape[1:] == (1,): y = y[:,0].long()   # of a table
        lam = None if mix is None else plain(torch.as_tensor(mix.lam))
        self.now.labels = [(y, 1.)] if mix is None else [(y, lam), (plain(mix.yb1[0]), 1-lam)]
        self.now.loss = plain(self.learn.loss_grad)
        self.steps.append(self.now)
    def after_backward(self): self.now.grad = plain(self.pred.grad)


# ---------------------------------------------------------------- the equations

def one_hot(y): return F.one_hot(y, K).double()
def inputs(x): return x if isinstance(x, tuple) else (x,)
def says(net, x):
    "What a network says in evaluation mode, in which it is not left"
    training = [m for m in net.modules() if m.training]
    with torch.no_grad(): out = logits_of(net.eval()(*inputs(x))).double()
    for m in training: m.training = True
    return out
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
        with torch.no_grad(): target = logits_of(o.twin(o.student).train()(*o.partners))
    target = target.double()
    return 16*kl((target/4).softmax(1), z, 4.)

def rdrop(z, y, o):
    other = o.subs['RDrop'].double()
    return .6*.5*(kl(z.softmax(1), other, 1.) + kl(other.softmax(1), z, 1.))

def average(o, decay=.9):
    "The running average of the weights before this step"
    mean = o.twin(o.students[0])
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

def given(seed):
    "What a method is given as its teacher, which says what `network(seed)` says"
    return network(seed)

def cached(): return CachedTeacher(given(7), 'cache', dtype='float32')   # in the working directory

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
    'KD':               Method(lambda alpha=.6, **kw: KnowledgeDistillation(given(7), alpha, **kw), kd, .4, dict(alpha=0.)),
    'KD cached':        Method(lambda alpha=.6, **kw: KnowledgeDistillation(cached(), alpha, **kw), kd, .4, dict(alpha=0.)),
    'KD ensemble':      Method(lambda alpha=.6, **kw: KnowledgeDistillation(EnsembleTeacher([given(7), given(8)]), alpha, **kw), ensemble, .4, dict(alpha=0.)),
    'MemoryReplay':     Method(partial(MemoryReplay, 2, interval_steps=2), replay, .75, dict(alpha=0.)),
    'MemoryReplay-TC':  Method(partial(MemoryReplay, 2, interval_steps=2, gamma=.3), replay_corrected, .75, dict(alpha=0.)),
    'StochasticDepth':  Method(StochasticDepth, None, 1., dict(p_last=1.), residual),
    'SelfGuidance':     Method(SelfGuidance, self_guidance, 1., None, residual),
    'WSL':              Method(lambda beta=2.5, **kw: WSL(given(7), beta, **kw), wsl, 1., dict(beta=0.)),
    'CKM':              Method(lambda **kw: CKM(given(7), **kw), ckm, 0.),
    'PSKD':             Method(lambda alpha_t=.3, **kw: PSKD(alpha_t, **kw), pskd, .7, dict(alpha_t=0.), hard_at=lambda o: 1-pskd_weight(o)),
    'OnlineLabelSmoothing': Method(OnlineLabelSmoothing, ols, .5, dict(alpha=1.)),
    'DLB':              Method(DLB, dlb, steps=2),
    'CSKD':             Method(CSKD, cskd, off=dict(lam=0.)),
    'RDrop':            Method(RDrop, rdrop, net=dropping),
    'MeanTeacher':      Method(partial(MeanTeacher, .9, rampup=0), mean_teacher, off=dict(w=0.)),
    'MaxSup':           Method(lambda alpha=.3, **kw: MaxSup(alpha, **kw), max_sup, off=dict(alpha=0.)),
    'DKD':              Method(lambda **kw: DKD(given(7), warmup=1, **kw), dkd),
    'NKD':              Method(lambda **kw: NKD(given(7), tau=2., **kw), nkd),
    'DIST':             Method(lambda **kw: DIST(given(7), **kw), dist),
    'StandardisedKD':   Method(lambda **kw: StandardisedKD(given(7), **kw), standardised_kd, .1, dict(hard=1., soft=0.)),
    'Distill Amplify':  Method(lambda alpha=.5, **kw: Distill(given(7), alpha, 2., rewrite=Amplify(.2), **kw), amplified, .5, dict(alpha=0.)),
    'Distill Replace':  Method(lambda alpha=.5, **kw: Distill(given(7), alpha, 2., rewrite=Replace(given(8), 'confidence'), **kw), replaced, .5, dict(alpha=0.)),
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


# ---------------------------------------------------------------- other ground

class Segments(nn.Module):
    "fastai's U-Net, whose blocks read what its own hooks keep of the encoder; the mean over the pixels says the class"
    def __init__(self):
        super().__init__()
        net = CifarResNet(BasicBlock, 1, K, widths=(4,8,8), stem=4)
        encoder = nn.Sequential(nn.Sequential(net.conv1, net.bn1, nn.ReLU()), *net.stages)
        self.unet = DynamicUnet(encoder, K, (8,8))
    def forward(self, x): return self.unet(x).mean((2,3))

def unet(): return lively(Segments())

def unet_twin(net):
    "Another one with the same weights: a copy would read the features of its original"
    with torch.random.fork_rng(): twin = Segments()
    twin.load_state_dict(net.state_dict())
    return twin.train(net.training)

class ModelOutput(OrderedDict):
    "What networks of transformers return: a dict whose entries are attributes and, by number, members"
    def __getattr__(self, name):
        try: return self[name]
        except KeyError: raise AttributeError(name) from None
    def __getitem__(self, i): return super().__getitem__(i) if isinstance(i, str) else list(self.values())[i]

class Wrapped(nn.Module):
    "Returns more than logits"
    def __init__(self, body):
        super().__init__()
        self.body = body
    def forward(self, x): return ModelOutput(logits=self.body(x), features=x.flatten(1))

class TwoImages(nn.Module):
    "Looks at two images"
    def __init__(self, body):
        super().__init__()
        self.body = body
    def forward(self, a, b): return self.body(.7*a + .3*b)

@lru_cache
def pairs_of_images():
    x,y = (torch.stack(list(map(torch.as_tensor, o))) for o in zip(*[digits().train_ds[i] for i in range(48)]))
    x = x.float()/255 if x.dtype == torch.uint8 else x
    items = [(a, b, int(c)) for a,b,c in zip(x, x.flip(0), y)]
    dls = with_index(DataLoaders(DataLoader(items, bs=16, shuffle=True), DataLoader(items[:16], bs=16), device=device))
    dls.c = K
    return dls

class OtherMixUp(Callback):
    "MixUp of other libraries, for what they share"
    run_valid = False
    def __init__(self, alpha=.4): self.distrib = Beta(torch.tensor(alpha), torch.tensor(alpha))
    def lf(self, pred, *yb):
        if not self.training: return self.old_lf(pred, *yb)
        with NoneReduce(self.old_lf) as lf: loss = torch.lerp(lf(pred, *self.yb1), lf(pred, *yb), self.lam)
        return loss.mean()
    def before_batch(self):
        lam = self.distrib.sample((len(self.x),)).to(self.x.device)
        self.lam,shuffle = torch.max(lam, 1-lam),torch.randperm(len(self.x))
        self.learn.xb = (torch.lerp(self.x[shuffle], self.x, self.lam[:,None,None,None]),)
        self.yb1 = (self.y[shuffle],)

class TsaisMixUp(OtherMixUp):
    "As `MixUp1d` of tsai 1.0.1"
    def before_train(self):
        if not self.training: return
        self.learn.dls.one_batch()
        self.old_lf,self.learn.loss_func = self.learn.loss_func,self.lf
    def after_train(self): self.learn.loss_func = self.old_lf

class FastxtendsMixUp(OtherMixUp):
    "As `MixUp` of fastxtend 0.1.7"
    def before_train(self): self.old_lf,self.learn.loss_func = self.learn.loss_func,self.solo_lf
    def after_train(self): self.learn.loss_func = self.old_lf
    after_cancel_train = after_cancel_fit = after_train
    def solo_lf(self, pred, *yb): return self.lf(pred, *yb)

# tables

def frame(seed, scale, shift):
    "Two numbers, of which some are missing, and a category"
    rng = np.random.default_rng(seed)
    data = dict(a=scale*rng.normal(size=60)+shift, b=rng.exponential(scale, 60), c=np.array(['x','y','z'])[np.arange(60)%3], target=(np.arange(60)%K).astype(str))
    out = pd.DataFrame(data)
    out.loc[::7, 'a'] = np.nan
    return out

@lru_cache
def tables(seed=0, scale=1., shift=0.):
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')   # of torch about pandas' arrays
        return TabularDataLoaders.from_df(frame(seed, scale, shift), procs=[Categorify, FillMissing, Normalize], cat_names=['c'], cont_names=['a','b'],
                                          y_names='target', y_block=CategoryBlock(), bs=16, valid_idx=list(range(48, 60)), device=device)

def table_net(): return TabularModel([(4, 3), (3, 2)], 2, K, [12])

@lru_cache
def table_teacher(seed):
    "A learner of a table with other means, spreads and medians"
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return Learner(tables(seed, 3., 5.), lively(table_net()), CrossEntropyLossFlat())

class ReadsAsTheTeacher(nn.Module):
    "What that learner says of a row of the student's table, which comes with the student's statistics"
    def __init__(self, learn):
        super().__init__()
        self.net,(ours,its) = learn.model,(dls.train.procs for dls in (tables(), learn.dls))
        self.norms = [(ours.normalize.means[n], ours.normalize.stds[n], its.normalize.means[n], its.normalize.stds[n], its.fill_missing.na_dict.get(n)) for n in 'ab']
    def forward(self, cats, conts):
        columns = []
        for x,(mean,std,its_mean,its_std,median) in zip(conts.double().T, self.norms):
            raw = x*std + mean
            if median is not None: raw = torch.where(cats[:,1] == 2, torch.tensor(float(median), dtype=torch.double), raw)   # `a_na` is the second category
            columns.append((raw-its_mean)/its_std)
        return self.net(cats, torch.stack(columns, 1).float())
