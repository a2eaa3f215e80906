"The later methods that remember or look twice: whole trainings, replayed in plain PyTorch and float64, and resumed in the middle"
import math, random
from functools import partial
from types import SimpleNamespace

import pytest, torch, torch.nn.functional as F
from fastai.basics import Callback, CancelBatchException, DataLoaders, Learner, SGD
from fastai.callback.progress import ProgressCallback
from fastai.callback.training import GradientAccumulation
from fastai.data.load import DataLoader
from torch import nn
from torch.utils.data import TensorDataset

from fastkdtf.all import *

pytestmark = pytest.mark.filterwarnings('ignore:journal goes on without')

K,N,BS,EPOCHS = 5,50,12,6   # two samples of each epoch are left out

def data():
    g = torch.Generator().manual_seed(0)
    y = torch.arange(N)%K
    x = torch.randn(N, 8, generator=g, dtype=torch.double) + torch.randn(K, 8, generator=g, dtype=torch.double)[y]
    return TensorDataset(x, y)

def loaders(seed, **kwargs):
    train,valid = DataLoader(data(), bs=BS, shuffle=True, drop_last=True, **kwargs),DataLoader(data(), bs=N)
    train.rng = random.Random(seed)
    dls = with_index(DataLoaders(train, valid))
    dls.c = K
    return dls

def network(dropout=0.):
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(dropout), nn.Linear(16, K)).double()

class Journal(Callback):
    "Note which samples each batch holds, and seed what the step draws"
    order,run_valid = 4,False
    def __init__(self, seed=True): self.batches,self.seed = [],seed
    def before_batch(self):
        info = batch_info(self.learn.dl)
        self.batches.append(SimpleNamespace(idx=info.idx, epoch=self.epoch, partners=getattr(info, 'beside', None)))
        if self.seed: torch.manual_seed(100*self.epoch + self.iter)

class Single(Callback):
    "The recorder wants float32"
    order = 5.5
    def after_loss(self): self.learn.loss = self.learn.loss.float()

def make_learner(dls, dropout, *cbs):
    opt_func = partial(SGD, mom=.9)
    return Learner(dls, network(dropout), nn.CrossEntropyLoss(), opt_func, lr=.05, cbs=[*cbs, Single()]).remove_cb(ProgressCallback)

def train(cb, dropout=0., n_epoch=EPOCHS, seed=1, cbs=(), **kwargs):
    journal = Journal()
    learn = make_learner(loaders(seed, **kwargs), dropout, cb, journal, *cbs)
    with learn.no_logging(): learn.fit(n_epoch)
    return learn,journal.batches

def replay(batches, loss, dropout=0., after=None, n_epoch=EPOCHS):
    "The network that plain PyTorch trains on the same batches: `loss(net, batch, x, y)`"
    net,(x,y) = network(dropout),data().tensors
    optimizer = torch.optim.SGD(net.parameters(), lr=.05, momentum=.9)
    at = {}
    for batch in batches:
        batch.iter = at[batch.epoch] = at.get(batch.epoch, -1) + 1
        torch.manual_seed(100*batch.epoch + batch.iter)
        optimizer.zero_grad()
        loss(net, batch, x[batch.idx], y[batch.idx]).backward()
        optimizer.step()
        if after: after(net)
    return net

def assert_same_network(learn, net):
    ours = learn.model.state_dict()
    for name,value in net.state_dict().items():
        torch.testing.assert_close(ours[name], value, rtol=1e-9, atol=1e-11, msg=lambda m: f'{name}: {m}')

def kl(t, z, tau=1.): return (torch.xlogy(t, t) - t*(z/tau).log_softmax(1)).sum(1)
def entropy(t, z): return -(t*z.log_softmax(1)).sum(1)
def without_statistics(net, *args):
    "A pass in training mode that leaves the running statistics as they were"
    norm = net[1]
    mean,var,norm.running_mean,norm.running_var = norm.running_mean,norm.running_var,torch.zeros(16).double(),torch.ones(16).double()
    count,norm.num_batches_tracked = norm.num_batches_tracked,torch.tensor(0)
    out = net(*args)
    norm.running_mean,norm.running_var,norm.num_batches_tracked = mean,var,count
    return out

# ---------------------------------------------------------------- the methods by hand

def pskd():
    table = {}
    def loss(net, batch, x, y):
        z,alpha = net(x),.8*(batch.epoch+1)/EPOCHS
        target = torch.stack([table[i].softmax(0) if i in table else F.one_hot(c, K).double() for i,c in zip(batch.idx.tolist(), y)])
        table.update(zip(batch.idx.tolist(), z.detach()))
        return ((1-alpha)*F.cross_entropy(z, y, reduction='none') + alpha*entropy(target, z)).mean()
    return loss

def ols(even=False):
    s,now,total,count = torch.full((K, K), 1/K, dtype=torch.double),[0],torch.zeros(K, K, dtype=torch.double),torch.zeros(K)
    def loss(net, batch, x, y):
        if batch.epoch != now[0]:
            now[0] = batch.epoch
            for c in range(K): s[c] = total[c]/count[c] if count[c] else torch.full((K,), 1/K)
            if even:
                for c in range(K): s[c] = torch.where(torch.arange(K) == c, s[c, c], (1-s[c, c])/(K-1))
            total.zero_(), count.zero_()
        z = net(x)
        for p,c in zip(z.detach().softmax(1), y):
            if p.argmax() == c:
                total[c] += p
                count[c] += 1
        return (.5*F.cross_entropy(z, y, reduction='none') + .5*entropy(s[y], z)).mean()
    return loss

def dlb():
    last = []
    def loss(net, batch, x, y):
        z,n = net(x),BS//2
        total = F.cross_entropy(z, y)
        if last:
            idx,logits = last.pop()
            assert idx == batch.idx[:n].tolist()
            total = total + 9*kl((logits/3).softmax(1), z[:n], 3.).mean()
        last.append((batch.idx[n:].tolist(), z[n:].detach()))
        return total
    return loss

def cskd(net, batch, x, y):
    (partners,) = batch.partners
    xs,ys = data().tensors
    same = [(xs == p).all(1).nonzero().item() for p in partners]
    assert ys[same].tolist() == y.tolist()
    with torch.no_grad(): target = (without_statistics(net, partners)/4).softmax(1)
    z = net(x)
    return F.cross_entropy(z, y) + 16*kl(target, z, 4.).mean()

def rdrop(net, batch, x, y):
    a = without_statistics(net, x)
    b = net(x)
    both = (a.softmax(1)*(a.log_softmax(1)-b.log_softmax(1)) + b.softmax(1)*(b.log_softmax(1)-a.log_softmax(1))).sum(1)
    return F.cross_entropy(a, y) + F.cross_entropy(b, y) + .6*.5*both.mean()

def mean_teacher(decay, rampup=2):
    teacher,t = network(),[0]
    def loss(net, batch, x, y):
        young = 1-1/(t[0]+1) < decay
        with torch.no_grad(): zt = without_statistics(teacher.train(), x) if young else teacher.eval()(x)
        z = net(x)
        return F.cross_entropy(z, y) + math.exp(-5*(1-min(batch.epoch/rampup, 1))**2)*kl(zt.softmax(1), z).mean()
    def after(net):
        t[0] += 1
        a = min(1-1/(t[0]+1), decay)
        state = net.state_dict()
        for name,value in teacher.state_dict().items():
            value.copy_(a*value + (1-a)*state[name] if value.is_floating_point() else state[name])
    return loss,after

METHODS = dict(
    PSKD=(PSKD, lambda: (pskd(), None), 0.), OLS=(OnlineLabelSmoothing, lambda: (ols(), None), 0.),
    OLS_even=(partial(OnlineLabelSmoothing, even=True), lambda: (ols(True), None), 0.),
    DLB=(DLB, lambda: (dlb(), None), 0.), CSKD=(CSKD, lambda: (cskd, None), .3), RDrop=(RDrop, lambda: (rdrop, None), .3),
    MeanTeacher=(partial(MeanTeacher, .9, rampup=2), lambda: mean_teacher(.9), 0.))

@pytest.mark.parametrize('name', METHODS)
def test_a_training_is_its_replay_in_plain_pytorch(name):
    make,by_hand,dropout = METHODS[name]
    learn,batches = train(make(), dropout)
    steps = EPOCHS*(8 if name == 'DLB' else 4)
    assert len(batches) == steps >= 20 and batches[-1].epoch == EPOCHS-1
    loss,after = by_hand()
    assert_same_network(learn, replay(batches, loss, dropout, after))

class Stop(Callback):
    order = 7
    def __init__(self, at): self.at = at
    def after_batch(self):
        if self.training and self.epoch == self.at and self.iter == 1: raise KeyboardInterrupt

def weights(learn): return {name: value.clone() for name,value in learn.model.state_dict().items()}

@pytest.mark.parametrize('name', METHODS)
def test_a_training_resumed_in_the_middle_is_the_uninterrupted_one(name, tmp_path):
    make,_,dropout = METHODS[name]
    whole,_ = train(make(), dropout)
    with pytest.raises(KeyboardInterrupt): train(make(), dropout, cbs=[Checkpoint(tmp_path/'c'), Stop(3)])
    again,batches = train(make(), dropout, seed=7, cbs=[Checkpoint(tmp_path/'c')])
    assert batches[0].epoch == 3
    for name,value in weights(whole).items(): assert torch.equal(weights(again)[name], value), name
    for a,b in zip(whole.recorder.values, again.recorder.values, strict=True):
        assert [float(v) for v in a] == pytest.approx([float(v) for v in b], nan_ok=True)

@pytest.mark.parametrize('name', ['PSKD', 'OLS', 'DLB', 'MeanTeacher'])
def test_a_new_fit_starts_with_nothing_remembered(name):
    make,_,dropout = METHODS[name]
    cb = make()
    learn,_ = train(cb, dropout, n_epoch=2)
    again = make_learner(loaders(1), dropout, cb, Journal())
    with again.no_logging(): again.fit(2)
    for key,value in weights(learn).items(): assert torch.equal(weights(again)[key], value), key

def test_the_last_prediction_is_the_newest_of_a_sample_that_comes_twice():
    table = SampleTable(3)
    table.write(torch.tensor([1, 1, 1]), torch.tensor([[0., 1.], [0., 2.], [0., 3.]]))
    assert table.rows[1].tolist() == [-3., 0.] and table.seen.tolist() == [False, True, False]

def test_samples_that_an_epoch_left_out_keep_their_older_prediction():
    cb = PSKD()
    seen = []
    class See(Callback):
        order = 6
        def after_epoch(self): seen.append(cb.teacher.table.seen.sum().item())
    train(cb, cbs=[See()])
    assert seen[0] == 48 and seen == sorted(seen) and seen[-1] > 48

def test_with_decay_0_the_average_is_the_network():
    cb,ours = MeanTeacher(0.),[]
    class See(Callback):
        order = 6
        def after_step(self):
            average = cb.teacher.copy.model.state_dict()
            ours.append(all(torch.equal(average[name], value) for name,value in self.learn.model.state_dict().items()))
    train(cb, cbs=[See()], n_epoch=2)
    assert len(ours) == 8 and all(ours)

def test_the_average_moves_once_a_step_of_the_optimizer():
    cb = MeanTeacher(.9)
    seen = []
    class See(Callback):
        order = 8
        def after_batch(self): seen.append(cb.teacher.t)
    train(cb, cbs=[GradientAccumulation(2*BS), See()], n_epoch=2)
    assert [t for t in seen if t][::2] and max(seen) == 4

def test_partners_are_drawn_anew_from_the_whole_class_and_leave_the_order_alone():
    (_,plain),(_,ours) = train(LsrKD()),train(CSKD(), dropout=.3)
    assert [b.idx.tolist() for b in plain] == [b.idx.tolist() for b in ours]
    x,_ = data().tensors
    drawn = [(x == p).all(1).nonzero().item() for b in ours for p in b.partners[0]]
    own = [i for b in ours for i in b.idx.tolist()]
    assert len(set(drawn)) > 40 and 0 < sum(a == b for a,b in zip(drawn, own)) < len(own)/4

def test_the_control_of_cskd_pairs_each_sample_with_itself():
    _,batches = train(CSKD(same=True))
    x,_ = data().tensors
    assert len(batches) == 24
    for b in batches: assert torch.equal(b.partners[0], x[b.idx])

def test_each_half_of_dlb_comes_twice_and_the_halves_of_an_epoch_are_a_permutation():
    _,batches = train(DLB())
    n = BS//2
    for a,b in zip(batches, batches[1:]): assert a.idx[n:].tolist() == b.idx[:n].tolist()
    for e in range(EPOCHS):
        new = [i for b in batches if b.epoch == e for i in b.idx[n:].tolist()]
        assert len(new) == len(set(new)) == 48
    assert batches[0].idx[:n].tolist() == [b for b in batches if b.epoch == 0][-1].idx[n:].tolist()

@pytest.mark.parametrize('make', [PSKD, DLB, CSKD])
def test_workers_give_the_same_batches(make):
    (_,here),(_,there) = train(make(), n_epoch=2),train(make(), n_epoch=2, num_workers=2)
    assert len(here) == len(there) and [b.idx.tolist() for b in here] == [b.idx.tolist() for b in there]
    if make is CSKD: assert all(torch.equal(a.partners[0], b.partners[0]) for a,b in zip(here, there))

@pytest.mark.parametrize('make', [PSKD, CSKD, DLB])
def test_what_is_remembered_of_samples_ends_with_their_data_set(make):
    "Another data set in the second epoch, smaller, in another order and batch: partners are of the class, and nothing of the first is a target"
    class Swap(Callback):
        order = -10
        def before_epoch(self):
            if self.epoch == 0: return
            x,y = data().tensors
            x,y = x.flip(0)[:40],y.flip(0)[:40]
            self.learn.dls = with_index(DataLoaders(*[DataLoader(TensorDataset(x, y), bs=8)]*2))
            self.classes = {tuple(row.tolist()): int(c) for row,c in zip(x, y)}
    class Look(Callback):
        order,run_valid = 6,False
        def before_fit(self): self.taught,self.pairs = [],0
        def after_loss(self):
            if self.epoch == 0: return
            if make is PSKD: self.taught.append(bool(cb.teacher.seen.any()))
            if make is DLB:  self.taught.append(cb.teacher.twin.source.bs == 8)
            for row,c in zip(*(t for part in (getattr(batch_info(self.learn.dl), 'beside', None) or [[]], self.yb) for t in part)):
                assert swap.classes[tuple(row.tolist())] == c
                self.pairs += 1
    cb,swap,look = make(),Swap(),Look()
    learn = make_learner(loaders(1), 0., cb, swap, look)
    with learn.no_logging(): learn.fit(2)
    assert look.pairs == 40*(make is CSKD)
    assert look.taught == {PSKD: [False]*5, CSKD: [], DLB: [True]*10}[make]

def test_a_cancelled_batch_teaches_nothing_in_the_next():
    cb = DLB()
    taught = []
    class Cancel(Callback):
        order = 5.2
        def after_pred(self):
            if self.training and self.iter == 3: raise CancelBatchException
    class See(Callback):
        order = 6
        def after_loss(self):
            if self.training: taught.append(bool(cb.teacher.weigh(cb.batch.labelled(self.y, self.pred)).any()))
    train(cb, cbs=[Cancel(), See()], n_epoch=1)
    assert taught == [False, True, True, False, True, True, True]

def test_averaged_weights_train_plainly_and_end_with_the_average():
    _,batches = train(LsrKD(0.), n_epoch=2)
    average,t = network().state_dict(),[0]
    def after(net):
        t[0] += 1
        a = min(1-1/(t[0]+1), .9)
        for name,value in net.state_dict().items():
            average[name] = a*average[name] + (1-a)*value if value.is_floating_point() else value.clone()
    replay(batches, lambda net, batch, x, y: F.cross_entropy(net(x), y), after=after)
    learn,_ = train(AveragedWeights(.9), n_epoch=2)
    for name,value in learn.model.state_dict().items(): torch.testing.assert_close(value, average[name], rtol=1e-9, atol=1e-11)

def test_averaged_weights_resume(tmp_path):
    whole,_ = train(AveragedWeights(.9))
    with pytest.raises(KeyboardInterrupt): train(AveragedWeights(.9), cbs=[Checkpoint(tmp_path/'c'), Stop(3)])
    again,_ = train(AveragedWeights(.9), seed=7, cbs=[Checkpoint(tmp_path/'c')])
    for name,value in weights(whole).items(): assert torch.equal(weights(again)[name], value), name
