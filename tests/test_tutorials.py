"What a reader pastes from a page has all its names, and the tutorials' own methods do what plain PyTorch loops of their papers do"
import ast, builtins, importlib, re
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

from fastkdtf.callback.distill import MemoryReplay
from fastkdtf.callback.survival import draw_bits, fixed_statistics, subnetwork, survival
from fastkdtf.losses import KDLoss
from fastkdtf.vision.data import kd_dataloaders
from fastkdtf.vision.models import create_model
from fastkdtf.vision.loader import batch_info
from fastkdtf.callback.checkpoint import Checkpoint

tutorials = Path(__file__).parents[1]/'nbs'/'tutorials'

def definitions(name, **ns):
    "The namespace of a notebook's cells that do nothing but import and define, beside what is given"
    for cell in read_nb(tutorials/f'{name}.ipynb').cells:
        if cell.cell_type != 'code' or cell.source.lstrip().startswith(('!', '#| hide\n# on Colab')): continue
        if all(isinstance(o, (ast.Import, ast.ImportFrom, ast.FunctionDef, ast.ClassDef)) for o in ast.parse(cell.source).body): exec(cell.source, ns)
    return ns

def brought(node):
    "Names that a statement, or a part of one, defines"
    match node:
        case ast.ImportFrom(names=[ast.alias(name='*')]): return vars(importlib.import_module(node.module))
        case ast.Import() | ast.ImportFrom(): return [(o.asname or o.name).split('.')[0] for o in node.names]
        case ast.FunctionDef() | ast.ClassDef() | ast.ExceptHandler(name=str()): return [node.name]
        case ast.arg(): return [node.arg]
        case ast.Name(ctx=ast.Store() | ast.Del()): return [node.id]
    return []

def names_a_reader_lacks(path):
    "Names that the cells on show use, and no cell on show brings"
    known,lacking = {*dir(builtins), 'display'},set()
    for cell in read_nb(path).cells:
        if cell.cell_type != 'code' or re.search(r'^#\| *(hide|export|echo: false)', cell.source, re.M): continue
        nodes = [*ast.walk(ast.parse(cell.source))]
        known.update(*map(brought, nodes))
        lacking |= {o.id for o in nodes if isinstance(o, ast.Name)} - known
    return lacking

def test_what_a_page_shows_brings_the_names_that_it_uses():
    "A reader who pastes the cells of a tutorial, or of a page beside them, meets no NameError"
    pages = [*tutorials.glob('*.ipynb'), *tutorials.parent.glob('[a-z]*.ipynb')]
    assert len(pages) > 25 and {o.name: lacks for o in pages if (lacks := names_a_reader_lacks(o))} == {}

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

def test_my_dkd_is_the_papers(own):
    "Zhao et al. 2022: the pair (label, rest) and the other classes among themselves"
    teacher,tau = net(),4.
    teacher.load_state_dict({k: 2*v if v.is_floating_point() else v for k,v in teacher.state_dict().items()})
    def loss_of(model, step):
        _,x,y,_,_ = step
        with torch.no_grad(): zt = deepcopy(teacher).eval()(x)
        z,rows = model(x),torch.arange(len(y))
        p,t = (z/tau).softmax(1),(zt/tau).softmax(1)
        def parts(p):
            on = p[rows, y]
            others = torch.stack([torch.cat([row[:i], row[i+1:]]) for row,i in zip(p, y)])
            return torch.stack([on, 1-on], 1),others/others.sum(1, keepdim=True)
        (b,n),(bt,nt) = parts(p),parts(t)
        return F.cross_entropy(z, y) + tau**2*((bt*(bt/b).log()).sum(1) + 8*(nt*(nt/n).log()).sum(1)).mean()
    ours = trained(loaders(), own['my_dkd'](deepcopy(teacher)), 4)
    assert len(ours[0]) == 20
    same(ours, *replay(ours[0], loss_of))

def test_temporal_ensembling_is_the_papers(own):
    "Laine and Aila 2017: the running mean of what the student said of each image"
    ours = trained(loaders(), own['temporal_ensembling'](), 4)
    mean = {}
    def loss_of(model, step):
        idx,x,y,_,_ = step
        z = model(x)
        p = z.softmax(1).detach()
        target = torch.stack([mean.get(i, row) for i,row in zip(idx, p)])
        loss = .5*F.cross_entropy(z, y) + .5*(target*(target.log() - z.log_softmax(1))).sum(1).mean()
        mean.update({i: .6*mean[i] + .4*row if i in mean else row for i,row in zip(idx, p)})
        return loss
    assert len(ours[0]) == 20
    same(ours, *replay(ours[0], loss_of))
    plain,_ = replay(ours[0], lambda model, s: F.cross_entropy(model(s[1]), s[2]))
    assert abs(plain[-1]-ours[0][-1][-1]) > 1e-3   # the teacher is not without effect

@pytest.mark.filterwarnings('ignore:watch goes on without')
def test_temporal_ensembling_resumes(own, tmp_path):
    "Interrupted between epochs, it goes on as if it had not been"
    class Stop(Callback):
        def before_epoch(self):
            if self.epoch == 2: raise KeyboardInterrupt
    def train(path, cbs=()):
        set_seed(1)
        return trained(loaders(), own['temporal_ensembling'](), 4, cbs=[Checkpoint(path), *cbs])
    whole = train(tmp_path/'whole.pt')
    with pytest.raises(KeyboardInterrupt): train(tmp_path/'a.pt', [Stop()])
    resumed = train(tmp_path/'a.pt')
    assert [o[-1] for o in resumed[0]] == [o[-1] for o in whole[0][10:]]
    for k,v in whole[1].items(): assert torch.equal(v, resumed[1][k])

class Answer(dict):
    __getattr__ = dict.__getitem__

class StandIn:
    "A `Trainer` that only computes losses"
    def __init__(self, model): self.model,self.args = model,type('', (), dict(device='cpu'))
    def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
        out = model(**inputs)
        return (out.loss, out) if return_outputs else out.loss

@pytest.fixture(scope='module')
def plain(): return definitions('huggingface', Trainer=StandIn)

def flat():
    "A small network without batch norm"
    torch.manual_seed(3)
    return nn.Sequential(nn.Flatten(), nn.Linear(192, 24), nn.ReLU(), nn.Linear(24, 10))

def test_memory_replay_in_a_loop_is_the_callback(plain):
    "The same batches, the same weights"
    set_seed(1)
    watch,method = Watch(),MemoryReplay(3, interval_steps=4)
    learn = Learner(loaders(), flat(), nn.CrossEntropyLoss(), SGD, cbs=[Double(), watch, method])
    learn.recorder.smooth_loss = SmoothLoss()
    with learn.no_bar(), learn.no_logging(): learn.fit(4, .1)
    model = flat()
    plain['memory_replay'](model, [(x, y) for _,x,y,*_ in watch.steps], torch.optim.SGD(model.parameters(), .1), 4)
    assert len(watch.steps) == 20
    for k,v in learn.model.state_dict().items(): torch.testing.assert_close(v, model.state_dict()[k], rtol=1e-9, atol=1e-11)

def test_self_guidance_in_a_loop_is_the_papers(plain):
    "Eq. 5 with the two networks written out; whole and part have the gradients of their own terms"
    net = survival(create_model('resnet8', 10).double()).train()
    x,y = torch.randn(8, 3, 8, 8),torch.arange(8)
    torch.manual_seed(0)
    bits = draw_bits(net)
    torch.manual_seed(0)
    before = {k: v.clone() for k,v in net.state_dict().items()}
    loss = plain['self_guidance_loss'](net, x, y)
    loss.backward()
    ours = [p.grad.clone() for p in net.parameters()]
    net.load_state_dict(before)
    net.zero_grad()
    with subnetwork(net, bits), fixed_statistics(net): zs = net(x)
    zt = net(x)
    p,t = (zs/3).log_softmax(1),(zt.detach()/3).softmax(1)
    expected = F.cross_entropy(zs, y) + F.cross_entropy(zt, y) + .25*9*(t*(t.log()-p)).sum(1).mean()
    expected.backward()
    torch.testing.assert_close(loss, expected)
    for g,p in zip(ours, net.parameters()): torch.testing.assert_close(g, p.grad)

class Classifier(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(5, 3)
    def forward(self, x, labels=None):
        z = self.layer(x)
        return Answer(loss=None if labels is None else F.cross_entropy(z, labels), logits=z)

def test_the_trainer_with_a_teacher_distils_in_training_and_evaluates_as_before(plain):
    student,teacher = Classifier(),Classifier().train()
    trainer = plain['DistillationTrainer'](student, teacher=teacher, loss_func=KDLoss(.5, 2.))
    inputs = dict(x=torch.randn(4, 5), labels=torch.tensor([0, 1, 2, 0]))
    loss,out = trainer.compute_loss(student.train(), inputs, return_outputs=True, num_items_in_batch=4)
    z,zt = student(inputs['x']).logits,teacher(inputs['x']).logits
    p,t = (z/2).log_softmax(1),(zt/2).softmax(1)
    torch.testing.assert_close(loss, .5*F.cross_entropy(z, inputs['labels']) + .5*4*(t*(t.log()-p)).sum(1).mean())
    loss.backward()
    assert 'labels' in inputs and not teacher.training and all(p.grad is None and not p.requires_grad for p in teacher.parameters())
    torch.testing.assert_close(trainer.compute_loss(student.eval(), inputs), F.cross_entropy(z, inputs['labels']))

def test_every_page_that_people_look_for_is_executed():
    "They have code, and none of it is kept from running; `test_notebooks` runs them"
    for name in ('your_own_photos', 'choosing_alpha', 'loggers', 'huggingface', 'segmentation'):
        code = [c.source for c in read_nb(tutorials/f'{name}.ipynb').cells if c.cell_type == 'code']
        assert len(code) > 10 and not any('eval: false' in o or '#| slow' in o for o in code), name

def test_temporal_ensembling_refuses_mixed_images(own):
    from fastai.callback.mixup import MixUp
    with pytest.raises(ValueError, match='belongs to no sample'): trained(loaders(), own['temporal_ensembling'](), 1, cbs=[MixUp()])
