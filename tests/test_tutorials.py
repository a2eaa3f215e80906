"The tutorials' own methods against plain PyTorch loops of their papers' algorithms"
import ast
from copy import deepcopy
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from fastai.callback.core import Callback
from fastai.learner import AvgSmoothLoss, Learner
from fastai.optimizer import SGD
from fastai.torch_core import set_seed
from fastcore.nbio import read_nb
from torch import nn

from fastkdtf.vision.data import kd_dataloaders
from fastkdtf.vision.loader import batch_info
from fastkdtf.callback.checkpoint import Checkpoint

tutorials = Path(__file__).parents[1]/'nbs'/'tutorials'

def definitions(name):
    "The namespace of a notebook's cells that do nothing but import and define"
    ns = {}
    for cell in read_nb(tutorials/f'{name}.ipynb').cells:
        if cell.cell_type != 'code' or cell.source.lstrip().startswith(('!', '#| hide\n# on Colab')): continue
        if all(isinstance(o, (ast.Import, ast.ImportFrom, ast.FunctionDef, ast.ClassDef)) for o in ast.parse(cell.source).body): exec(cell.source, ns)
    return ns

@pytest.fixture(autouse=True)
def double():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)

@pytest.fixture(scope='module')
def own(): return definitions('own_method')

class Watch(Callback):
    "Double precision, and what every step saw and lost"
    order,run_valid = 1,False
    def before_fit(self): self.steps = []
    def before_batch(self):
        self.learn.xb = (self.x.as_subclass(torch.Tensor).double(),)
        self.seen = batch_info(self.dl).idx.tolist(),self.x,self.y.as_subclass(torch.Tensor),self.epoch
    def after_backward(self): self.steps.append((*self.seen, self.loss.item()))

class Double(Callback):
    "Validation in double precision"
    order = 0
    def before_batch(self): self.learn.xb = (self.x.as_subclass(torch.Tensor).double(),)

class SmoothLoss(AvgSmoothLoss):
    def reset(self): self.count,self.val = 0,torch.zeros(())   # fastai's own is float32

def net():
    "A small network with a batch norm, whose mode matters"
    torch.manual_seed(3)
    return nn.Sequential(nn.Flatten(), nn.Linear(192, 24), nn.BatchNorm1d(24), nn.ReLU(), nn.Linear(24, 10))

def loaders(): return set_seed(1) or kd_dataloaders('digits', bs=16, train_subset=90)

def trained(dls, method, n_epoch, lr=.1, cbs=()):
    "Steps of a training with the library, and its last weights"
    watch = Watch()
    learn = Learner(dls, net(), nn.CrossEntropyLoss(), SGD, cbs=[Double(), watch, method, *cbs])
    learn.recorder.smooth_loss = SmoothLoss()
    with learn.no_bar(), learn.no_logging(): learn.fit(n_epoch, lr)
    return watch.steps,learn.model.state_dict()

def replay(steps, loss_of, lr=.1):
    "The same steps in plain PyTorch; `loss_of(model, step)` is the paper's"
    model,losses = net(),[]
    opt = torch.optim.SGD(model.parameters(), lr)
    model.train()
    for step in steps:
        loss = loss_of(model, step)
        opt.zero_grad()
        loss.backward()
        opt.step()
        losses.append(loss.item())
    return losses,model.state_dict()

def same(ours, losses, weights):
    steps,own_weights = ours
    assert max(abs(a[-1]-b) for a,b in zip(steps, losses)) < 1e-9
    for k in weights: torch.testing.assert_close(own_weights[k], weights[k], rtol=1e-8, atol=1e-10)

def test_ps_kd_is_the_papers(own):
    "Kim et al. 2021: labels softened by the student of the last epoch, α_t = .8·t/T"
    n_epoch = 4
    ours = trained(loaders(), own['PSKD'](n_epoch), n_epoch)
    past = {}
    def loss_of(model, step):
        _,x,y,epoch,_ = step
        if past.get('epoch') != epoch: past.update(epoch=epoch, teacher=deepcopy(model).eval())   # as the last epoch left it
        target = F.one_hot(y, 10).double()
        if epoch:
            alpha = .8*(epoch+1)/n_epoch
            with torch.no_grad(): target = (1-alpha)*target + alpha*past['teacher'](x).softmax(1)
        return -(target*model(x).log_softmax(1)).sum(1).mean()
    assert len(ours[0]) == 20
    same(ours, *replay(ours[0], loss_of))
    plain,_ = replay(ours[0], lambda model, s: F.cross_entropy(model(s[1]), s[2]))
    assert abs(plain[-1]-ours[0][-1][-1]) > 1e-3   # the teacher is not without effect

def test_alpha_is_the_papers(own):
    "By epoch, whatever rounding the sum of a training's shares has"
    for n_epoch in (3, 7, 49, 300):
        for epoch in range(n_epoch):
            pct = epoch/n_epoch
            for i in range(11):
                assert own['alpha_t'](pct, n_epoch) == pytest.approx(.8*(epoch+1)/n_epoch if epoch else 0.)
                pct += 1/(11*n_epoch)

def test_batches_overlap_by_half(own):
    dls = own['overlapping'](loaders())
    for _ in range(2):
        seen = [batch_info(dls.train).idx.tolist() for _ in dls.train]
        assert len(seen) == len(dls.train) == 90//8-1
        assert all(a[8:] == b[:8] for a,b in zip(seen, seen[1:]))
        new = seen[0] + [i for o in seen[1:] for i in o[8:]]
        assert len(set(new)) == len(new) == 88   # every image once as new but the two of an incomplete half

@pytest.mark.parametrize('alpha,tau', [(1., 3.), (.5, 2.)])
def test_dlb_is_the_papers(own, alpha, tau):
    "Shen et al. 2022: the first half of a batch learns what the student said of it a step ago"
    ours = trained(own['overlapping'](loaders()), own['DLB'](alpha, tau), 3)
    last = {}
    def loss_of(model, step):
        idx,x,y,_,_ = step
        z = model(x)
        loss = F.cross_entropy(z, y)
        taught = [(i, last[o]) for i,o in enumerate(idx) if o in last]
        if taught:
            log_p,t = (z[[i for i,_ in taught]]/tau).log_softmax(1),(torch.stack([o for _,o in taught])/tau).softmax(1)
            loss = loss + alpha*tau**2*(t*(t.log()-log_p)).sum()/(len(idx)//2)
        last.clear()
        last.update(zip(idx, z.detach()))
        return loss
    assert len(ours[0]) == 30
    same(ours, *replay(ours[0], loss_of))
    plain,_ = replay(ours[0], lambda model, s: F.cross_entropy(model(s[1]), s[2]))
    assert abs(plain[-1]-ours[0][-1][-1]) > 1e-3

def test_dlb_resumes(own, tmp_path):
    "Interrupted between epochs, it goes on as if it had not been"
    class Stop(Callback):
        def before_epoch(self):
            if self.epoch == 2: raise KeyboardInterrupt
    def train(path, cbs=()):
        set_seed(1)
        return trained(own['overlapping'](loaders()), own['DLB'](), 4, cbs=[Checkpoint(path), *cbs])
    whole = train(tmp_path/'whole.pt')
    with pytest.raises(KeyboardInterrupt): train(tmp_path/'a.pt', [Stop()])
    resumed = train(tmp_path/'a.pt')
    assert [o[-1] for o in resumed[0]] == [o[-1] for o in whole[0][20:]]
    for k,v in whole[1].items(): assert torch.equal(v, resumed[1][k])

def test_dlb_needs_indices(own):
    from fastkdtf.core import Step
    with pytest.raises(ValueError, match='with_index'): own['LastBatch']()(Step(torch.zeros(2, dtype=torch.long), torch.zeros(2, 3)))
