"""The papers' tables as data, every recipe built and stepped, and the papers' schedules against plain PyTorch loops."""
import ast, re
from dataclasses import replace
from decimal import Decimal
from functools import partial
from types import SimpleNamespace

import numpy as np, pytest, torch
import torch.nn.functional as F
from fastai.basics import Callback, DataLoader, DataLoaders, Learner, OptimWrapper, accuracy
from fastai.losses import CrossEntropyLossFlat
from torch import nn
from torch.optim.lr_scheduler import ChainedScheduler, CosineAnnealingLR, LinearLR, MultiStepLR

import fastkdtf.lab.recipes
from fastkdtf.callback.distill import Distill
from fastkdtf.vision.models import create_model
from fastkdtf.lab.recipes import image_sets, paper_table, recipe, recipes
from fastkdtf.callback.checkpoint import Checkpoint, seed_run
from fastkdtf.callback.schedules import fit_schedule, learning_rate
from fastkdtf.callback.selfguide import SelfGuidance, StochasticDepth

# ---------------------------------------------------------------- schedules

K = 4
n_steps = 5   # in an epoch

def blobs():
    gen = torch.Generator().manual_seed(0)
    y = torch.arange(8*n_steps)%K
    return torch.randn(len(y), 6, generator=gen, dtype=torch.float64) + torch.eye(6, dtype=torch.float64)[y], y

def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, K)).double()

def learner():
    "Its batches are in order, so that a plain loop sees the same"
    dls = DataLoaders(*[DataLoader(list(zip(*blobs())), bs=8, num_workers=0) for _ in range(2)], device='cpu')
    return Learner(dls, net(), metrics=accuracy, loss_func=CrossEntropyLossFlat())

def quiet(learn, fit, *args, **kwargs):
    with learn.no_bar(), learn.no_logging(): fit(learn, *args, **kwargs)
    return learn

def plain_loop(n_epoch, make_opt, make_sched):
    "Weights and learning rates of a training as one writes it in PyTorch, the scheduler stepped after each batch"
    model,(x,y),lrs = net(),blobs(),[]
    opt = make_opt(model.parameters())
    sched = make_sched(opt)
    for _ in range(n_epoch):
        for xb,yb in zip(x.split(8), y.split(8)):
            lrs.append(opt.param_groups[0]['lr'])
            F.cross_entropy(model(xb).float(), yb).backward()   # fastai's loss is float32
            opt.step()
            opt.zero_grad()
            sched.step()
    return torch.cat([p.detach().ravel() for p in model.parameters()]), lrs

def warmed(opt, milestones, n_warm, gamma):
    "Milestones and warm-up in steps; the first step has the first of `n_warm` equal amounts"
    return ChainedScheduler([LinearLR(opt, 1/n_warm, 1., n_warm-1), MultiStepLR(opt, milestones, gamma)])

sgd = partial(torch.optim.SGD, lr=.1, momentum=.9, weight_decay=5e-3)
yuan = dict(lr=.1, milestones=(60, 120, 160), factor=.2, epochs=200, wd=5e-3)

cases = {
    # 200 epochs as 4: milestones after 1.2, 2.4 and 3.2 epochs of 5 steps, 20 epochs of warm-up are 2 steps
    'milestones and warm-up': (4, dict(**yuan, warmup=20), sgd, lambda opt: warmed(opt, [6, 12, 16], 2, .2)),
    'as it is written': (4, dict(lr=.1, milestones=(2, 3), factor=.1, warmup=1, wd=5e-3), sgd, lambda opt: warmed(opt, [10, 15], 5, .1)),
    # the first 3 of 8 epochs: milestones after 12, 24 and 32 steps
    'stopped early': (3, dict(**yuan, warmup=20, of=8), sgd, lambda opt: warmed(opt, [12, 24, 32], 4, .2)),
    'cosine': (3, dict(lr=.1, schedule='cosine', lr_end=.02, epochs=300, wd=5e-3), sgd, lambda opt: CosineAnnealingLR(opt, 15, .02)),
    'cosine, stopped early': (2, dict(lr=.1, schedule='cosine', wd=5e-3, of=5), sgd, lambda opt: CosineAnnealingLR(opt, 25)),
    'nesterov': (3, dict(**yuan, nesterov=True), partial(sgd, nesterov=True), lambda opt: MultiStepLR(opt, [5, 9, 12], .2)),
    'adam': (3, dict(lr=.01, optimizer='adam', milestones=(1,), factor=.5, wd=.01), partial(torch.optim.Adam, lr=.01, weight_decay=.01), lambda opt: MultiStepLR(opt, [5], .5)),
}

@pytest.mark.parametrize('case', cases)
def test_a_fit_is_the_plain_loop(case):
    n_epoch,settings,opt,sched = cases[case]
    weights,lrs = plain_loop(n_epoch, opt, sched)
    learn = quiet(learner(), fit_schedule, n_epoch, **settings)
    np.testing.assert_allclose(learn.recorder.lrs, lrs, rtol=1e-12)
    np.testing.assert_allclose(torch.cat([p.detach().ravel() for p in learn.model.parameters()]), weights, rtol=1e-9, atol=1e-12)

def test_a_milestone_comes_neither_early_nor_late():
    for n in (7, 390, 391):
        for n_epoch in (20, 60, 200, 33):
            rates = [learning_rate(s, n_epoch*n, milestones=(60, 120, 160), factor=.2, epochs=200) for s in range(n_epoch*n)]
            changes = [s for s in range(1, len(rates)) if rates[s] != rates[s-1]]
            assert changes == [-(-m*n_epoch*n//200) for m in (60, 120, 160)]   # the first step at or after the milestone

def test_its_optimizer_is_for_that_fit_only():
    learn = learner()
    own = learn.opt_func
    quiet(learn, fit_schedule, 1, lr=.05, wd=.1)
    assert isinstance(learn.opt, OptimWrapper) and type(learn.opt.opt) is torch.optim.SGD and learn.opt_func is own
    assert [g['weight_decay'] for g in learn.opt.opt.param_groups] == [.1]
    class Stop(Callback):
        def before_step(self): raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt): quiet(learn, fit_schedule, 1, cbs=Stop())
    assert learn.opt_func is own

class StopAt(Callback):
    order = 2000
    def __init__(self, epoch): self.at = epoch
    def after_epoch(self):
        if self.epoch == self.at: raise KeyboardInterrupt

@pytest.mark.parametrize('settings', [dict(**yuan, warmup=20), dict(lr=.1, schedule='cosine', wd=5e-3, of=6)], ids=['step', 'cosine'])
@pytest.mark.parametrize('again', ['in another process', 'in the same one'])
def test_the_same_call_goes_on_where_it_stopped(tmp_path, settings, again):
    whole = quiet(learner(), fit_schedule, 4, **settings)
    learn,checkpoint = learner(),Checkpoint(tmp_path/'run.pt')
    with pytest.raises(KeyboardInterrupt): quiet(learn, fit_schedule, 4, **settings, cbs=[checkpoint, StopAt(1)])
    if again == 'in another process': learn,checkpoint = learner(),Checkpoint(tmp_path/'run.pt')
    quiet(learn, fit_schedule, 4, **settings, cbs=[checkpoint])
    assert learn.recorder.lrs == whole.recorder.lrs and [list(o) for o in learn.recorder.values] == [list(o) for o in whole.recorder.values]
    for a,b in zip(learn.model.state_dict().values(), whole.model.state_dict().values()): assert torch.equal(a, b)

@pytest.mark.parametrize('bad,words', [(dict(of=1), 'of must be at least 2'), (dict(schedule='linear'), "schedule must be one of 'step', 'cosine'"), (dict(lr=0), 'lr must'),
                                       (dict(optimizer='lamb'), 'optimizer must be one of'), (dict(wd=-1), 'wd must'), (dict(epochs=0), 'epochs must')])
def test_bad_schedules_are_refused(bad, words):
    with pytest.raises((ValueError, TypeError), match=re.escape(words)): fit_schedule(learner(), 2, **bad)

# ---------------------------------------------------------------- the tables

# Printed results of each table, baselines, other methods and second metrics included
n_rows = dict(
    yuan2019 = dict(T1=22, T2=12, T3=14, T4=22, F4a=12, T5=12, F5a=12, T6=8, T7=3, T8=16, T9=16, F6a=12),
    yuan2020 = dict(S4=9),
    wang2020 = dict(T1=84, T2=70),   # 12 networks, and 5 on each of 2 sets, by 7 columns
    zheng2022 = dict(T1=12, T2=8, T3=12, T4=10, T5=16, T6=5),
    song2023 = dict(T1=40, T2=20, T3=14, T4a=4, T4b=16, T4c=3, T4d=3, T4e=3, P4=1))

# (printed gain, what it would be), where the papers contradict themselves
contradictions = {
    'yuan2019/T2/MobileNetV2/ReKD/from Plain CNN': ('+0.92', '+0.83'),
    'yuan2019/T4/cifar100/MobileNetV2/DeKD/from ResNet50': ('+3.09', '+3.07'),
    'yuan2019/T4/cifar100/ResNet18/DeKD/from ResNet50': ('+1.23', '+1.36'),
    'yuan2019/T8/GoogLeNet/KD/from ResNeXt29': ('+0.99', '+0.69'),
    'yuan2019/T9/ShuffleNetV2/LSR': ('+0.11', '+0.15'),
    'yuan2019/T9/DenseNet121/TfKD_reg': ('+0.18', '+0.22'),
    'yuan2019/T9/DenseNet121/KD/from ResNeXt29': ('+0.26', '+0.29'),
    'zheng2022/T1/cifar100/ResNet-110/SelfGuidance': ('+4.59', '+4.58')}
n_gains = 113

results = paper_table('results').to_dict('records')
every = recipes()
ids = list(every.index)

def test_ids_are_names_of_their_own():
    assert len(set(ids)) == len(ids) == len(results)
    for i,o in zip(ids, results):
        place = [o['paper'], o['table']] + [o['data']]*(len({r['data'] for r in results if (r['paper'], r['table']) == (o['paper'], o['table'])}) > 1)
        assert i == '/'.join(k for k in [*place, o['student'], o['method'], o['case']] if k)
        assert not set('/,') & set(o['case']+o['student']+o['method'])

def test_cells_hold_what_they_say():
    for o in results:
        assert o['data'] in image_sets and o['metric'] in ('accuracy', 'error', 'accuracy5', 'error5', 'gain', 'gpu_hours'), o
        for k in ('value', 'sd'): assert re.fullmatch(r'(\d+(\.\d+)?)?', o[k]), o
        assert re.fullmatch(r'([+-]?\d+(\.\d+)?)?', o['gain']), o
        assert o['value'] or o['gain'] or o['note'], o

def decimals(text): return Decimal(text) if text else None

def baseline_of(row):
    same = lambda o: all(o[k] == row[k] for k in ('paper', 'table', 'data', 'student', 'metric'))
    found = [o for o in results if o['method'] == 'baseline' and same(o) and not o['case'].startswith('epoch')]
    return found[0] if len(found) == 1 else None

def test_printed_gains_are_value_minus_baseline_but_for_the_papers_own_contradictions():
    "A gain of an error rate is a reduction"
    wrong,checked = {},0
    for i,o in zip(ids, results):
        if not (o['value'] and o['gain']): continue
        base = baseline_of(o)
        assert base is not None, i
        gain = decimals(o['value'])-decimals(base['value'])
        if o['metric'].startswith('error'): gain = -gain
        checked += 1
        if gain != decimals(o['gain']): wrong[i] = (o['gain'], f'{gain:+}')
    assert wrong == contradictions
    assert checked == n_gains
    by_id = dict(zip(ids, results))
    for i,(printed,real) in wrong.items(): assert printed[1:] in by_id[i]['contradiction'] and real[1:] in by_id[i]['contradiction'], i

def test_every_row_of_every_table_is_there():
    assert every.groupby(['paper', 'table']).size().to_dict() == {(p, t): n for p,tables in n_rows.items() for t,n in tables.items()}

def literals(text): return {k.strip(): ast.literal_eval(v) for k,v in (o.split('=', 1) for o in text.split('; ') if o)}

def fits(line, row):
    words = lambda o: f" {o.get('case', '')} "
    return line['paper'] == row['paper'] and all(not line.get(k) or line[k] == row[k] for k in ('data', 'table', 'method', 'student', 'teacher')) \
        and (not line.get('case') or words(line) in words(row))

def test_every_line_of_hyper_parameters_is_used():
    "Unused are those of the supplement that repeat the paper's, one of a network without a result, and those of a method that only a figure has"
    lines = paper_table('settings').to_dict('records')
    same = lambda a, b: all(a[k] == b[k] for k in ('data', 'method', 'student', 'teacher')) and literals(a['settings']) == literals(b['settings'])
    alone = []
    for line in lines:
        if any(fits(line, o) for o in results): continue
        if line['paper'] == 'yuan2020' and any(o['paper'] == 'yuan2019' and same(line, o) for o in lines): continue
        alone.append('/'.join(line[k] for k in ('paper', 'source', 'data', 'method', 'student', 'teacher') if line[k]))
    assert alone == ['yuan2019/T13/tiny_imagenet/TfKD_self/ResNet18', *(f'wang2020/§4.3/{data}MrKD5' for data in ('', 'cifar10/', 'cinic10/'))]
    teaching = {n for o in results for n in o['teacher'].split(' > ')}
    for line in paper_table('schedules').to_dict('records'):
        assert line['student'] in teaching or any(fits(line, o) for o in results) or line['paper'] == 'yuan2020', line

def test_networks_are_those_that_are_printed():
    known = {(o['paper'], o['student']) for o in paper_table('networks').to_dict('records')}
    for o in results:
        if not o['student']: continue   # §4 of Song et al. speaks of a teacher, and of no network that it teaches
        for name in [o['student'], *(o['teacher'].split(' > ') if o['teacher'] else [])]: assert not name or (o['paper'], name) in known, (o['paper'], name)

def test_papers_can_be_cited():
    assert set(paper_table('papers').paper) == set(every.paper)
    for p in set(every.paper):
        r = recipe(every.index[every.paper == p][0])
        assert r.cite().startswith(f'@misc{{{p},') and r.student in r.cite() and r.cite().count('{') == r.cite().count('}')

# ---------------------------------------------------------------- joining

# Written down from the papers and the authors' code, not from the tables
joined = {
    'yuan2019/T8/MobileNetV2/TfKD_reg': (dict(alpha=.95, tau=40, correct_prob=.99, scale=1, variant='official', multiplier=1.),
        dict(alpha='code', correct_prob='§5.2'), dict(epochs=200, bs=128, lr=.1, milestones=(60, 120, 160), factor=.2, warmup=1, wd=5e-4, augment=('flip', 'crop', 'rotate15'))),
    'yuan2019/T8/ResNet18/TfKD_reg': (dict(alpha=.1, tau=20, correct_prob=.99, scale=1, variant='official', multiplier=100.), dict(multiplier='code'), dict(lr=.1)),
    'yuan2019/T9/MobileNetV2/TfKD_reg': (dict(alpha=.1, tau=20, correct_prob=.99, scale='tau2', variant='paper'), dict(alpha='T14', scale='decided here'),
        dict(factor=.1, augment=('flip', 'rotate20'), size=64)),
    'wang2020/T1/ResNet56/LsrKD-TC': (dict(alpha=.1, tau=3, gamma=.025), dict(gamma='§4.3'), dict(schedule='cosine', lr=.1, lr_end=1e-4, wd=5e-4, epochs=200, bs=128)),
    'wang2020/T2/cinic10/ResNet56/LsrKD-TC': (dict(alpha=.1, tau=3, gamma=.25), {}, dict(augment=('flip', 'crop'))),
    'wang2020/T1/ResNet56/MrKD3': (dict(n_copies=3, interval=25, alpha=.25, tau=3), {}, dict(momentum=.9)),
    'wang2020/T2/cifar10/ResNet56/MrKD1': (dict(n_copies=1, interval=25, alpha=.1, tau=3), {}, {}),
    'wang2020/T2/cifar10/ResNet56/MrKD3-TC': (dict(n_copies=3, interval=25, alpha=.1, tau=3, gamma=.25), dict(gamma='decided here'), {}),
    'zheng2022/T1/cifar100/ResNet-110/SelfGuidance': (dict(lam=.25, tau=3, p_last=.5), {}, dict(epochs=300, milestones=(150, 225), factor=.1, nesterov=True, wd=1e-4)),
    'zheng2022/T5/cifar10/ResNet-50/SelfGuidance/lam=3': (dict(lam=3, tau=3, p_last=.5, detach=True), dict(lam='T5', detach='decided here'), {}),
    'zheng2022/T6/ResNet-110/SelfGuidance/no backward full': (dict(lam=.25, full_backward=False, tau=3, p_last=.5, detach=True), {}, {}),
    'yuan2020/S4/ResNet18/LSR': (dict(alpha=.15, variant='official'), dict(alpha='S4'), {}),
    'yuan2019/T2/ResNet18/ReKD/from Plain CNN': (dict(alpha=.01, tau=20, scale='tau2', variant='official', multiplier=1.), dict(alpha='T10'), dict(optimizer='sgd', momentum=.9)),
    'yuan2019/T2/Plain CNN/KD/from ResNet18': (dict(alpha=.9, tau=20, scale='tau2', variant='official', multiplier=1.), dict(alpha='T10'), dict(optimizer='adam', lr=.01)),
    'song2023/T1/ResNet18/EffDstl': (dict(beta=.5, tau=2, smoothing=.1, tau_teacher=.7, smooth_to=.99, ckm=True, two_stages=True,
        teacher_from=('timm/resnet34.tv_in1k', 'timm/resnet34d')), dict(tau='§5.2', beta='code'), dict(epochs=300, bs=1024, lr=.5, lr_end=1e-5, wd=4e-5, schedule='cosine', size=224)),
    'song2023/T4d/ResNet18/EffDstl/tau_teacher=0.8': (dict(tau_teacher=.8, tau=2), dict(tau_teacher='T4d'), dict(epochs=300)),
    'song2023/T4b/ResNet18/MEALV2/after EffDstl top5': (dict(tau=1), {}, dict(epochs=80, lr=.01, lr_end=5e-4, wd=0.)),
}

@pytest.mark.parametrize('id', joined)
def test_settings_and_schedules_are_joined(id):
    r,(settings,sources,schedule) = recipe(id),joined[id]
    assert settings.items() <= r.settings.items() and (len(settings) < 4 or r.settings.keys() == settings.keys())
    assert sources.items() <= r.sources.items() and r.sources.keys() == r.settings.keys()
    for k,v in schedule.items(): assert getattr(r.schedule, k) == v, k

def test_a_recipe_shows_what_is_printed_beside_what_is_used_instead():
    "The settings and schedules where the authors' code has another number than the paper, all of them"
    settings,schedules = {},{}
    for i in every.index[every.runnable]:
        r = recipe(i)
        for name,(used,source,printed,where) in r.overridden.items():
            assert used != printed and source in ('code', 'decided here') and where not in ('code', 'decided here')
            assert f'{printed!r}, {where}' in repr(r) and (f'{name}={used!r} ({source}; printed: {printed!r}, {where})' in repr(r))
            if name in ('alpha', 'tau'): settings[i] = name,used,printed
            if name in ('bs', 'lr', 'wd'): schedules.setdefault(name, {})[i] = used,printed
            assert (r.settings.get(name) if name in r.settings else getattr(r.schedule, name)) == used
    assert settings == {'yuan2019/T8/ShuffleNetV2/TfKD_reg': ('tau', 10, 20), 'yuan2020/S4/ShuffleNetV2/TfKD_reg': ('tau', 10, 20), **{
        i: ('alpha', .9, .95) for i in every.index if '/DenseNet121/TfKD_self' in i and recipe(i).data == 'cifar100'}}
    assert set(schedules['bs'].values()) == {(64, 128)} and set(schedules['lr'].values()) == {(.05, .1)} and len(schedules['bs']) == len(schedules['lr']) > 10
    assert set(schedules['wd'].values()) == {(0., 5e-4)} and len(schedules['wd']) == 3   # of the plain CNN

def test_normal_kd_from_resnext29_has_the_printed_weight_and_dekd_its_own():
    for i in every.index[every.runnable]:
        r = recipe(i)
        if (r.student, r.teacher, r.data) != ('MobileNetV2', 'ResNeXt29', 'cifar100'): continue
        assert (r.settings['alpha'], r.sources['alpha']) == {'KD': (.6, 'T10'), 'ReKD': (.6, 'T10'), 'DeKD': (.95, 'T11')}[r.method_name], i

def test_two_stages_are_shown_as_two_schedules():
    r = recipe('song2023/T1/ResNet18/EffDstl')
    one,two = r.schedules
    assert (one.epochs, one.lr, one.lr_end, one.wd, one.bs) == (240, .5, 1e-5, 4e-5, 1024) and (two.epochs, two.lr, two.lr_end, two.wd) == (60, 5e-2, 5e-4, 0.)
    assert 'stage 1: 240 epochs' in repr(r) and 'stage 2: 60 epochs' in repr(r) and 'training:' not in repr(r)
    for i in every.index: assert len(recipe(i).schedules) == (2 if recipe(i).method_name == 'EffDstl' and recipe(i).runnable else 1)

def test_a_miniatures_batches_shrink_in_every_schedule_and_in_both_stages():
    r = replace(recipe('song2023/T1/ResNet18/EffDstl'), batch_share=1/64)
    assert [(s.bs, s.lr, s.lr_end) for s in r.schedules] == [(16, .5/64, 1e-5/64), (16, 5e-2/64, 5e-4/64)]
    assert (r.fit is recipe(r.id).fit) and r.schedule_of('ResNet34').bs == 16 and "batch: 0.015625 of the paper's size" in repr(r) and 'batch 16' in repr(r)

def test_every_recipe_that_can_be_run_has_a_schedule():
    for i in every.index[every.runnable]:
        for s in [recipe(i).schedule, *map(recipe(i).schedule_of, recipe(i).teacher_names)]:
            assert None not in (s.epochs, s.bs, s.optimizer, s.lr, s.schedule, s.wd, s.size), i
            assert s.schedule == 'cosine' or s.milestones and s.factor, i
            assert max(s.milestones, default=0) < s.epochs

def test_one_that_cannot_be_run_says_why():
    for i in every.index[~every.runnable]:
        with pytest.raises(ValueError, match=re.escape(f'{i} cannot be run: ')): recipe(i).method()

# ---------------------------------------------------------------- one step of each

class Few:
    def __init__(self, n_classes, side, n):
        gen = torch.Generator().manual_seed(0)
        self.x,self.y = torch.randn(n, 3, side, side, generator=gen),torch.arange(n)%n_classes
    def __len__(self): return len(self.y)
    def __getitem__(self, i): return self.x[i],self.y[i]

def few(n_classes, side, n):
    "Loaders of one batch"
    dls = DataLoaders(*[DataLoader(Few(n_classes, side, n), bs=n, num_workers=0) for _ in range(2)], device='cpu')
    dls.c = n_classes
    return dls

def stepped(r, dls, teachers):
    "The learner of a recipe after as many steps as it has stages"
    n = 2 if r.method_name == 'EffDstl' else 1
    learn = r.learner(dls, teachers, n)
    sums = lambda: torch.stack([p.detach().square().sum() for p in learn.model.parameters()])
    before = sums()
    seed_run(0)
    with learn.no_bar(), learn.no_logging(): r.fit(learn, n)
    assert len(learn.recorder.lrs) == n and all(o.isfinite() for o in learn.recorder.losses)
    after = sums()
    assert after.isfinite().all() and (after != before).double().mean() > .5   # timm's last norm of a branch starts at 0
    return learn

networks = sorted({o.split(".")[0] for i in every.index[every.runnable] for o in [recipe(i).network, *recipe(i).teacher_networks]})   # without the names of weights

@pytest.mark.parametrize('name', networks)
def test_every_network_takes_a_step(name):
    "At 16 pixels, or its own 32, with the small stem where the library's network is made for 224, by the first baseline that trains it"
    side = 32 if name == 'plain_cnn' else 16
    first = next((recipe(i) for i in every.index[every.runnable] if recipe(i).network == name and recipe(i).method_name == 'baseline'), None)
    if first is not None:
        stepped(first, few(4, side, 2), None)
        return
    any_recipe = recipe(every.index[every.runnable][0])
    model = any_recipe.model_fn(4, 'cifar100', name)()
    loss = F.cross_entropy(model(torch.randn(2, 3, side, side)), torch.tensor([0, 1]))
    loss.backward()
    assert loss.isfinite() and all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())

@pytest.fixture
def stub(monkeypatch):
    "In place of every network one that is small: linear, or residual where `residual` asks for it"
    def make(name, n_classes, **kwargs): return create_model('resnet8', n_classes) if stub.residual else nn.Sequential(nn.Flatten(), nn.Linear(3*8*8, n_classes))
    stub = SimpleNamespace(residual=False, make=make)
    monkeypatch.setattr(fastkdtf.lab.recipes, 'create_model', make)
    return stub

def check_method(r, learn):
    made = [cb for cb in learn.cbs if isinstance(cb, (Distill, StochasticDepth, SelfGuidance))]
    if r.method_name == 'baseline': assert not made
    elif r.method_name == 'EffDstl': assert learn.opt.opt.param_groups[0]['weight_decay'] == 0   # stage 2
    elif len(made) == 2: assert r.teacher.count(' > ') == 1 and [o.name for o in made] == ['first', 'second']
    else:
        cb, = made
        given,stated = cb.settings,{k: v for k,v in r.settings.items() if not k.startswith('teacher_')}
        if 'interval' in stated: stated['interval'] /= r.schedule.epochs   # of one epoch
        if r.method_name not in ('LSR', 'MEALV2'): assert stated.items() <= given.items()

@pytest.mark.parametrize('id', every.index[every.runnable])
def test_every_recipe_takes_a_step(id, stub):
    """Its method, by its schedule and optimizer, for its number of classes, with a stub of its network, and functions in place of the teachers

    The networks themselves have taken their step above; that of the recipe is asked for by name."""
    r = recipe(id)
    assert {o.split('.')[0] for o in [r.network, *r.teacher_networks]} <= set(networks)
    stub.residual = r.method_name in ('SD', 'SelfGuidance')
    learn = stepped(r, few(image_sets[r.data][0], 8, 4), [lambda step: 2*step.z.flip(0)]*len(r.teacher_networks) or None)
    check_method(r, learn)
    if r.method_name != 'EffDstl': assert learn.opt.opt.param_groups[0]['weight_decay'] == r.schedule.wd

first_of = {recipe(i).method_name: i for i in reversed(every.index[every.runnable]) if recipe(i).teacher_networks}

@pytest.mark.parametrize('method', first_of)
def test_networks_teach(method, stub):
    "One recipe of each method that has teachers, with networks as teachers"
    stub.residual,r = True,recipe(first_of[method])
    check_method(r, stepped(r, few(image_sets[r.data][0], 8, 4), [create_model('resnet8', image_sets[r.data][0]) for _ in r.teacher_networks]))
