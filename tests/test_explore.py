"""The exploration of Song et al. 2023, §4: FGSM where the answer is known, the change of confidence, and the table of schemes and subsets."""
import copy, math
from functools import partial

import matplotlib
matplotlib.use('agg')
import numpy as np, pytest, torch, torch.nn.functional as F
from fastai.basics import CrossEntropyLossFlat, DataLoader, DataLoaders
from torch import nn

from fastkdtf.core import Step
from fastkdtf.lab.explore import Exploration, SoftOnly, confidence_change, exploration_schemes, exploration_subsets, explore, fgsm
from fastkdtf.callback.checkpoint import seed_run
from fastkdtf.targets import Amplify, Correct, Replace, SmoothTo, StudentAhead
from fastkdtf.teachers.network import NetworkTeacher

K = 4
@pytest.fixture(autouse=True)
def in_tmp_path(tmp_path, monkeypatch): monkeypatch.chdir(tmp_path)

def some(*shape, seed=0): return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
def linear(n, k, seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Linear(n, k)


# ---------------------------------------------------------------- FGSM

def test_on_a_linear_model_the_change_of_the_margin_is_known():
    "Of two classes, the margin falls by ε·|w|₁ in the maximum norm, and by ε·|w|₂ in the Euclidean"
    model,x,y = linear(12, 2),some(20, 12),torch.arange(20)%2
    w = (model.weight[0]-model.weight[1]).detach()
    margin = lambda x: (model(x)[:,0]-model(x)[:,1])*(1-2*y)
    for norm,length in (('inf', w.abs().sum()), (2, w.norm())):
        for eps in (0., .01, 1.): torch.testing.assert_close(margin(fgsm(model, x, y, eps, norm)) - margin(x), (-eps*length).expand(20), atol=1e-4, rtol=1e-4)

def test_confidence_after_the_step_is_the_closed_form():
    model,x,y = linear(6, 2),some(9, 6),torch.arange(9)%2
    w = (model.weight[0]-model.weight[1]).detach()
    gap = (model(x)[:,0]-model(x)[:,1])*(1-2*y)
    after = model(fgsm(model, x, y, .3)).softmax(1).gather(1, y[:,None])[:,0]
    torch.testing.assert_close(after, torch.sigmoid(gap - .3*w.abs().sum()), atol=1e-5, rtol=1e-4)

def test_several_classes_and_images():
    model = nn.Sequential(nn.Flatten(), linear(12, 5))
    x,y = some(7, 3, 2, 2),torch.arange(7)%5
    w = model[1].weight.detach()
    g = ((model(x).softmax(1)-F.one_hot(y, 5)).detach() @ w).view_as(x)   # the gradient of the cross-entropy
    torch.testing.assert_close(fgsm(model, x, y, .1), x+.1*g.sign())
    moved = fgsm(model, x, y, .1, 2)
    torch.testing.assert_close(moved, x+.1*g/g.flatten(1).norm(dim=1)[:,None,None,None], atol=1e-6, rtol=1e-5)
    torch.testing.assert_close((moved-x).flatten(1).norm(dim=1), torch.full((7,), .1))

def test_the_model_stays_as_it_is():
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(.5), nn.Linear(8, 3)).train()
    model[1].eval()
    before = copy.deepcopy(model.state_dict())
    x,y = some(5, 4),torch.arange(5)%3
    with torch.no_grad(): a,b = fgsm(model, x, y, .1),fgsm(model, x, y, .1)
    assert torch.equal(a, b) and not a.requires_grad and not x.requires_grad
    assert [m.training for m in model] == [True, False, True, True] and all(p.grad is None for p in model.parameters())
    assert all(torch.equal(v, before[k]) for k,v in model.state_dict().items())

def test_no_gradient_no_step():
    model = linear(4, 3)
    nn.init.zeros_(model.weight)
    x = some(5, 4)
    for norm in ('inf', 2): assert torch.equal(fgsm(model, x, torch.zeros(5, dtype=torch.long), .1, norm), x)

@pytest.mark.parametrize('kwargs,error,words', [(dict(eps=-.1), ValueError, r'eps must be in \[0,inf\), got -0.1'), (dict(eps='big'), TypeError, 'eps'),
                                                (dict(eps=.1, norm=1), ValueError, "norm must be one of 'inf', 2, got 1")])
def test_bad_steps(kwargs, error, words):
    with pytest.raises(error, match=words): fgsm(linear(4, 3), some(2, 4), torch.tensor([0,1]), **kwargs)
    with pytest.raises(error, match=words): confidence_change(linear(4, 3), linear(4, 3), [], **kwargs)


# ---------------------------------------------------------------- change of confidence

def test_change_of_confidence():
    nets = {k: linear(6, K, i).train() for i,k in enumerate(('teacher', 'student', 'third'))}
    data = [(some(30, 6, seed=i), torch.arange(30)%K) for i in range(3)]
    study = confidence_change(NetworkTeacher(nets['teacher'], teacher_norm=None), nets['student'], data, .2, others={'third': nets['third']}, n=10**6)
    expected = {}
    for x,y in data:
        said = {k: o(x).softmax(1).gather(1, y[:,None])[:,0] for k,o in nets.items()}
        bad = fgsm(nets['teacher'], x, y, .2)
        manipulated = (nets['teacher'](x).argmax(1) == y) & (said['student'] > said['teacher'])
        for k,o in nets.items():
            change = (o(bad).softmax(1).gather(1, y[:,None])[:,0]-said[k]).detach()
            for group,which in (('manipulated', manipulated), ('kept', ~manipulated)): expected.setdefault((k, group), []).append(change[which])
    for (k,group),o in expected.items():
        o = torch.cat(o)
        got = study.changes[(study.changes.network == k) & (study.changes.group == group)].change
        np.testing.assert_allclose(sorted(got), sorted(o.tolist()), atol=1e-6)
        assert study.table['mean'].loc[k, group] == pytest.approx(o.mean().item(), abs=1e-6) and study.table['count'].loc[k, group] == len(o)
    assert (study.changes[study.changes.network == 'teacher'].change <= 1e-6).all() and all(o.training for o in nets.values())
    study.plot()
    assert 'eps=0.2' in repr(study) and '<table' in study._repr_html_()

def test_a_choice_of_samples():
    a,b = linear(6, K),linear(6, K, 1)
    data = [(some(400, 6), torch.arange(400)%K)]
    study = confidence_change(a, b, data, .1, n=20)
    assert set(study.table['count'].values.flatten()) == {20}
    assert study.changes.equals(confidence_change(a, b, data, .1, n=20).changes) and not study.changes.equals(confidence_change(a, b, data, .1, n=20, seed=1).changes)
    whole = confidence_change(a, b, data, .1, on=~Correct() | Correct())
    assert set(whole.changes.group) == {'manipulated'} and len(whole.changes) == 800
    with pytest.raises(TypeError, match='must be a module'): confidence_change(lambda x: x, b, data, .1)


# ---------------------------------------------------------------- schemes and subsets

def loaders():
    class Blobs:
        loss_func = CrossEntropyLossFlat()
        def __init__(self, n=64, seed=0): self.x,self.y = some(n, 6, seed=seed)+torch.eye(6)[torch.arange(n)%K],torch.arange(n)%K
        def __len__(self): return len(self.y)
        def __getitem__(self, i): return self.x[i],self.y[i]
    seed_run(0)
    dls = DataLoaders(DataLoader(Blobs(), bs=16, shuffle=True, num_workers=0), DataLoader(Blobs(seed=1), bs=32, num_workers=0), device='cpu')
    dls.c = K
    return dls

def test_schemes():
    step = Step(torch.arange(4), some(4, K), zt=some(4, K, seed=1))
    made = {k: o(Correct()) for k,o in exploration_schemes(linear(6, K), smooth_to=.9, delta=.2).items()}
    assert list(made) == ['full', 'partial', 'confidence', 'label smoothing', 'teacher amplification', 'student amplification']
    assert [o.what for o in list(made.values())[:3]] == ['full', 'partial', 'confidence'] and made['full'].teacher is made['partial'].teacher
    assert made['label smoothing'].confidence == .9 and [made[f'{o} amplification'].who for o in ('teacher', 'student')] == ['teacher', 'student']
    assert all(isinstance(o.on, Correct) for o in made.values()) and exploration_schemes() == {}
    assert list(exploration_subsets) == ['all', 'correct', 'not correct', 'regularization', 'reg & cor']
    with pytest.raises(ValueError, match='delta'): exploration_schemes(delta=0.)['teacher amplification'](None)

def record(method, seed, acc, rank):
    return dict(key=f'{method}{seed}', method=method, rank=rank, seed=seed, control_for=[], baseline='weak teacher', setting='s', evaluated_on='test', seconds_per_epoch=1.,
                last=dict(accuracy=acc, nll=1., ece=0.), best=dict(accuracy=acc, epoch=1), history=dict(train_accuracy=[.1,acc], accuracy=[.1,acc], valid_loss=[1.,.5]))

def test_normalised_accuracy():
    accs = {'weak teacher': (.50,.54), 'strong teacher': (.60,.64), 'full | correct': (.62,.62), 'full | all': (.52,.57), 'confidence | correct': (.47,.52)}
    result = Exploration([record(m, s, a, i) for i,(m,o) in enumerate(accs.items()) for s,a in enumerate(o)], 'weak teacher')
    assert result.normalised('full | correct') == pytest.approx([1, 1]) and result.normalised('full | all') == pytest.approx([0, .5])
    assert result.grid.loc['full', 'all'] == pytest.approx(.25) and result.grid.loc['confidence', 'correct'] == pytest.approx(-.25) and math.isnan(result.grid.loc['confidence', 'all'])
    assert result.table.normalised['weak teacher'] == pytest.approx(0) and result.shown.normalised['strong teacher'] == '1.00'
    ax = result.plot_schemes()
    assert sorted(y for o in ax.collections for y in o.get_offsets()[:,1].tolist()) == pytest.approx([-.5, 0, 0, .5, 1, 1])
    lines = result.plot_overfitting(['full | all'])[0].lines
    assert lines[0].get_ydata().tolist() == pytest.approx([.1, .545])
    same = Exploration([record(m, 0, .5, i) for i,m in enumerate(('weak teacher', 'strong teacher'))], 'weak teacher')
    assert math.isnan(same.normalised('strong teacher')[0])

def test_an_exploration(tmp_path):
    dls,weak,strong = loaders(),linear(6, K, 1),linear(6, K, 2)
    schemes = exploration_schemes(smooth_to=.9)
    run = lambda: explore(weak, strong, dls, partial(nn.Linear, 6, K), 2, schemes, {'all': None, 'reg & cor': Correct() & StudentAhead()}, seeds=2, fit='fit', lr=.01, out=tmp_path/'out')
    result = run()
    assert result.names == ['weak teacher', 'strong teacher', 'label smoothing | all', 'label smoothing | reg & cor'] and len(result.records) == 8
    assert {'schemes.csv', 'schemes.png', 'table.csv', 'report.html', 'results.jsonl'} <= {o.name for o in (tmp_path/'out').iterdir()}
    assert all(len(r['history']['train_accuracy']) == 2 and 0 <= r['history']['train_accuracy'][0] <= 1 for r in result.records)
    stamp = (tmp_path/'out'/'results.jsonl').read_text()
    assert run().normalised('label smoothing | all') == result.normalised('label smoothing | all') and (tmp_path/'out'/'results.jsonl').read_text() == stamp

def test_full_replacement_of_all_samples_is_the_strong_teacher():
    dls,weak,strong = loaders(),linear(6, K, 1),linear(6, K, 2)
    result = explore(weak, strong, dls, partial(nn.Linear, 6, K), 1, exploration_schemes(strong), {'all': None, 'correct': Correct()}, seeds=1, fit='fit', lr=.01)
    losses = {n: result.curves(n, 'train_loss')[0,0] for n in result.names}
    assert losses['full | all'] == losses['strong teacher'] and len(set(losses.values())) == 7

def test_bad_explorations():
    dls,model_fn = loaders(),partial(nn.Linear, 6, K)
    with pytest.raises(TypeError, match='schemes must be a dict'): explore(linear(6, K), linear(6, K), dls, model_fn, 1, {})
    with pytest.raises(TypeError, match='subsets must be a dict'): explore(linear(6, K), linear(6, K), dls, model_fn, 1, exploration_schemes(smooth_to=.9), [Correct()])
    with pytest.raises(ValueError, match='3 outputs.*4 classes'): explore(linear(6, K), linear(6, 3), dls, model_fn, 1, exploration_schemes(smooth_to=.9), seeds=1)
