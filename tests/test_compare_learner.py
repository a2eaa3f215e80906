"""`compare` with a learner, or with a function that makes one: what is kept, what each run starts from, and what fastai itself would do

Every training is replayed with a plain fastai learner."""
import random
import warnings
from copy import deepcopy
from functools import partial

import matplotlib
matplotlib.use('agg')
import numpy as np
import pytest
import torch
import torchvision
from fastai.callback.core import Callback
from fastai.callback.training import GradientClip
from fastai.callback.tracker import SaveModelCallback
from fastai.data.core import DataLoader, DataLoaders, Datasets
from fastai.data.transforms import Categorize, IntToFloatTensor, Normalize, ToTensor
from fastai.learner import Learner
from fastai.losses import CrossEntropyLossFlat, MSELossFlat
from fastai.metrics import DiceMulti, F1Score, accuracy, error_rate, mae
from fastai.optimizer import SGD, OptimWrapper
from fastai.torch_core import params, set_seed
from fastai.tabular.all import CategoryBlock, TabularDataLoaders, tabular_learner
from fastai.vision.core import PILImage, PILMask, imagenet_stats
from fastai.vision.learner import unet_learner, vision_learner
from sklearn.datasets import load_wine
from torch import nn

from fastkdtf.callback.checkpoint import seed_run
from fastkdtf.callback.distill import LsrKD, MemoryReplay
from fastkdtf.lab.compare import compare
from fastkdtf.lab.learners import LearnerFrom, LearnerLike, check_learner, copy_learner
from test_learners import text_learner
from fastkdtf.lab.report import read_runs
from fastkdtf.lab.statistics import Score
from fastkdtf.lab.one_run import BatchDraws, StepDraws, _draw_anew, judged_by
from fastkdtf.lab.training import Arm, Campaign


@pytest.fixture(autouse=True)
def in_tmp_path(tmp_path, no_drawing, monkeypatch):
    "Learners save below the working directory"
    monkeypatch.chdir(tmp_path)

def loaders(n=48, bs=16, test=False, values=False):
    g = torch.Generator().manual_seed(0)
    x = torch.randn(n+32, 6, generator=g)
    y = x[:,:1]*2 if values else x[:,:3].argmax(1)
    items = list(zip(x, y))
    parts = [DataLoader(items[:n], bs=bs, shuffle=True, drop_last=True, num_workers=0), *[DataLoader(items[n:], bs=32, num_workers=0)]*(1+test)]
    dls = DataLoaders(*parts)
    dls.c = 1 if values else 3
    return dls

def net(k=3): return nn.Sequential(nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(.2)), nn.Linear(8, k))
def halves(model): return [params(model[0]), params(model[1])]
opt = partial(SGD, mom=.7)

def learner(model=None, **kwargs):
    given = dict(loss_func=CrossEntropyLossFlat(), splitter=halves, opt_func=opt, metrics=[error_rate, accuracy], cbs=GradientClip(.5), wd=.03)
    return Learner(loaders(), model or net(), **{**given, **kwargs})

def pretrained():
    set_seed(5)
    learn = learner()
    with learn.no_bar(), learn.no_logging(): learn.fit(1, .05)
    return learn

def draws(seed):
    "What gives loaders and steps random states of their own, as in every run"
    draws = BatchDraws(seed)
    return [draws, StepDraws(draws)]

def test_draws_are_those_of_fastais_seed():
    def drawn(): return random.random(),np.random.rand(),torch.rand(1).item()
    for n in range(3):
        _draw_anew(7, 'step', n)
        ours = drawn()
        set_seed(random.Random(f'7/step/{n}').getrandbits(32))
        assert drawn() == ours

def state(model): return {k: v.clone() for k,v in model.state_dict().items()}
def same(a, b): return all(torch.equal(a[k], b[k]) for k in a) and a.keys() == b.keys()
def history(learn): return [list(map(float, row)) for row in learn.recorder.values]


# ---------------------------------------------------------------- a learner

def test_a_run_is_the_training_that_fastai_makes_from_the_same_weights():
    learn = pretrained()
    c = compare({'LsrKD': LsrKD}, learn, 2, seeds=[3], fit='fit_one_cycle', lr=.05, controls=False)
    for name,cbs in (('baseline', []), ('LsrKD', [LsrKD()])):
        own = learner(deepcopy(learn.model))
        seed_run(3, own.dls)
        with own.no_bar(), own.no_logging(): own.fit_one_cycle(2, .05, cbs=[*cbs, *draws(3)])
        names = list(own.recorder.metric_names[1:-1])
        got = c.runs(name)[0]['history']
        assert list(got) == names and [list(row) for row in zip(*got.values())] == history(own), name

def test_fine_tune_is_fastais_with_its_frozen_epoch():
    learn = pretrained()
    c = compare({'LsrKD': LsrKD}, learn, 2, seeds=[3], fit='fine_tune', lr=.05, controls=False)
    for name,cbs in (('baseline', []), ('LsrKD', [LsrKD()])):
        own,rows = learner(deepcopy(learn.model)),[]
        seed_run(3, own.dls)
        with own.no_bar(), own.no_logging(): own.fine_tune(2, .05, cbs=[*cbs, *draws(3), Rows(rows)])
        got = c.runs(name)[0]['history']
        assert len(rows) == 3 and [list(row) for row in zip(*got.values())] == rows, name

class Frozen(Callback):
    "How many parameters move in each epoch"
    def __init__(self, seen): self.seen = seen
    def before_epoch(self): self.before = state(self.model)
    def after_epoch(self):
        moved = [p.numel() for name,p in self.model.named_parameters() if not torch.equal(p, self.before[name])]
        self.seen.append((sum(p.numel() for p in self.model.parameters() if p.requires_grad), sum(moved)))

def test_frozen_layers_are_counted_as_fastai_counts_them():
    seen,own = [],[]
    learn = pretrained()
    def fit(learn, n_epoch, lr=.05, cbs=None): learn.fine_tune(n_epoch, lr, cbs=[*cbs, Frozen(seen)])
    compare({'baseline': None}, learn, 1, seeds=1, fit=fit)
    plain = learner(deepcopy(learn.model))
    with plain.no_bar(), plain.no_logging(): plain.fine_tune(1, .05, cbs=Frozen(own))
    assert seen == own and seen[0][0] == 16+27 and seen[1][0] == 56+16+27   # fastai trains the norms of frozen layers

def test_layers_that_the_learner_has_frozen_stay_frozen():
    learn = pretrained()
    learn.freeze()
    seen = []
    def fit(learn, n_epoch, lr=.05, cbs=None): learn.fit(n_epoch, lr, cbs=[*cbs, Frozen(seen)])
    c = compare({'baseline': None}, learn, 2, seeds=1, fit=fit)
    assert seen == [(43, 43)]*2 and c.records[0]['settings']['n_trainable'] == 43

def test_the_learner_stays_as_it_is():
    learn = pretrained()
    learn.freeze()
    before,cbs,optimizer,rows = state(learn.model),list(learn.cbs),learn.opt,history(learn)
    flags = [p.requires_grad for p in learn.model.parameters()]
    compare({'LsrKD': LsrKD, 'MemoryReplay': MemoryReplay}, learn, 1, seeds=2, fit='fine_tune', controls=False)
    assert same(state(learn.model), before) and list(learn.cbs) == cbs and learn.opt is optimizer and history(learn) == rows
    assert all(cb.learn is learn for cb in learn.cbs) and flags == [p.requires_grad for p in learn.model.parameters()]

def test_every_arm_of_every_seed_starts_from_the_weights_that_the_learner_holds():
    learn,starts = pretrained(),[]
    class Start(Callback):
        def before_fit(self): starts.append(state(self.model))
    def fit(learn, n_epoch, lr=.05, cbs=None): learn.fit(n_epoch, lr, cbs=[*cbs, Start()])
    compare({'LsrKD': LsrKD}, learn, 1, seeds=2, fit=fit, controls=False)
    assert len(starts) == 4 and all(same(start, state(learn.model)) for start in starts)

def test_a_learner_keeps_its_class_and_what_was_set_on_it():
    class Own(Learner):
        def __init__(self, *args, gain=1., **kwargs):
            super().__init__(*args, **kwargs)
            self.gain = gain
    learn = Own(loaders(), net(), loss_func=CrossEntropyLossFlat(), metrics=accuracy, gain=3., lr=.07, wd=.1, moms=(.9, .8, .9), cbs=[GradientClip(.1)])
    learn.recorder.train_metrics = True
    twin = copy_learner(learn)
    assert type(twin) is Own and (twin.gain, twin.lr, twin.wd, twin.moms) == (3., .07, .1, (.9, .8, .9))
    assert [cb.name for cb in twin.cbs] == [cb.name for cb in learn.cbs] and twin.gradient_clip is not learn.gradient_clip and twin.gradient_clip.max_norm == .1
    assert twin.recorder.train_metrics and twin.recorder is not learn.recorder and twin.dls is learn.dls and twin.opt is None

def test_metrics_of_training_batches_do_not_hide_the_judged_one():
    learn = learner(metrics=accuracy)
    learn.recorder.train_metrics = True
    c = compare({'baseline': None}, learn, 2, seeds=1)
    r = c.records[0]
    assert r['best']['valid_accuracy'] == max(r['history']['valid_accuracy']) and 'train_accuracy' in r['history']

def test_a_loss_with_state_is_not_shared_between_runs():
    class Moving(nn.Module):
        def __init__(self):
            super().__init__()
            self.calls = 0
        def forward(self, pred, y):
            self.calls += 1
            return nn.functional.cross_entropy(pred, y)
    loss = Moving()
    compare({'baseline': None}, learner(loss_func=loss), 1, seeds=2)
    assert loss.calls == 0


# ---------------------------------------------------------------- a function that makes one

def test_a_function_draws_new_weights_for_each_seed_and_the_same_ones_for_all_arms():
    starts = {}
    class Start(Callback):
        def before_fit(self): starts.setdefault(self.model[1].weight.flatten()[0].item(), []).append(state(self.model))
    def fit(learn, n_epoch, lr=.05, cbs=None): learn.fit(n_epoch, lr, cbs=[*cbs, Start()])
    compare({'LsrKD': LsrKD}, lambda: learner(), 1, seeds=3, fit=fit, controls=False)
    assert len(starts) == 3 and all(len(o) == 2 and same(*o) for o in starts.values())

def test_a_function_may_ask_for_the_seed():
    seen = []
    def make(seed):
        seen.append(seed)
        return learner()
    compare({'baseline': None}, make, 1, seeds=[4, 7])
    assert {4, 7} == set(seen)

@pytest.mark.parametrize('what', ['learner', 'network', 'body'])
def test_a_function_that_returns_the_same_network_again_is_refused_before_the_first_run(what, monkeypatch):
    kept,model,body = learner(),net(),net()[0]
    make = dict(learner=lambda: kept, network=lambda: learner(model), body=lambda: learner(nn.Sequential(body, nn.Linear(8, 3))))[what]
    trained = []
    def fit(learn, n_epoch, lr=.05, cbs=None): trained.append(1)
    with pytest.raises(ValueError, match='returned before'): compare({'baseline': None}, make, 1, seeds=2, fit=fit)
    assert not trained

def test_the_two_forms_agree():
    "Loaders and a function that makes the network are the learner that they make"
    parts = compare({'LsrKD': LsrKD}, loaders(), net, 2, seeds=2, lr=.05, loss_func=CrossEntropyLossFlat(), opt_func=opt)
    def make(): return Learner(dls, net(), loss_func=CrossEntropyLossFlat(), opt_func=opt, metrics=accuracy)
    dls = loaders()
    own = compare({'LsrKD': LsrKD}, make, 2, seeds=2, lr=.05)
    assert [r['history'] for r in parts.records] == [r['history'] for r in own.records] and len(own.records) == 6


# ---------------------------------------------------------------- the metric that is judged

@pytest.mark.parametrize('metric,picked', [('error_rate', min), ('accuracy', max), ('valid_loss', min)])
def test_the_best_epoch_is_picked_by_the_metric(metric, picked):
    c = compare({'baseline': None}, learner(), 4, seeds=2, lr=.1, metric=metric)
    for r in c.records:
        values = r['history'][metric]
        assert r['best']['epoch'] == values.index(picked(values)) and r['best'][f"valid_{metric.removeprefix('valid_')}"] == picked(values)
        assert r['last'][metric] == pytest.approx(values[-1], abs=1e-6)

def test_without_metrics_a_classifier_is_judged_by_accuracy():
    r = compare({'baseline': None}, learner(metrics=None), 1, seeds=1).records[0]
    assert r['last']['accuracy'] == pytest.approx(r['history']['accuracy'][-1])

@pytest.mark.parametrize('name,higher', [('error_rate', False), ('accuracy_multi', True), ('mae', False), ('_rmse', False), ('r2_score', True), ('brier_score_loss', False),
    ('dice', True), ('foreground_acc', True), ('perplexity', False), ('hamming_loss', False), ('jaccard_coeff', True), ('matthews_corrcoef', True), ('mean_absolute_error', False)])
def test_the_direction_of_known_names(name, higher):
    class Metric: pass
    m = Metric()
    m.name = name
    from fastcore.foundation import L
    class Some: metrics = L(m)
    assert judged_by(Some, name) == Score(name, higher) and judged_by(Some, name, not higher) == Score(name, not higher)

def steadiness(pred, y): return pred.std()

def test_a_metric_whose_direction_is_not_known_is_asked_for():
    with pytest.raises(ValueError, match="metric='steadiness' does not say which way is better.*higher=True"): compare({'baseline': None}, learner(metrics=steadiness), 1, metric='steadiness')
    c = compare({'baseline': None}, learner(metrics=steadiness), 2, seeds=1, metric='steadiness', higher=False)
    assert c.records[0]['best']['epoch'] == int(np.argmin(c.records[0]['history']['steadiness']))

def test_an_unknown_metric_is_refused():
    with pytest.raises(ValueError, match="metric='f1' is no metric of this learner: it has error_rate, accuracy, valid_loss"): compare({'baseline': None}, learner(), 1, metric='f1')


# ---------------------------------------------------------------- what is checked before the first run

def test_mistakes_are_told_before_anything_is_trained(monkeypatch):
    def never(*args, **kwargs): pytest.fail('something is trained')
    monkeypatch.setattr(Learner, 'fit', never)
    two = {'LsrKD': LsrKD}
    with pytest.raises(ValueError, match='lsr_kd among its callbacks'): compare(two, learner(cbs=LsrKD()), 1)
    with pytest.raises(ValueError, match='opt_func is an optimizer'): compare(two, learner(opt_func=OptimWrapper(net().parameters(), torch.optim.SGD, lr=.1)), 1)
    with pytest.raises(ValueError, match='training loader makes no batch: it holds 8 samples, and its batches 16: give a smaller bs'):
        compare(two, Learner(loaders(8), net(), loss_func=CrossEntropyLossFlat()), 1)
    with pytest.raises(TypeError, match='learn must be a Learner, a function that makes one'): compare(two, net(), 1)
    with pytest.raises(TypeError, match='learn must be a Learner, or a function that makes one, got Sequential'): compare(two, net, 1)
    with pytest.raises(TypeError, match='learn must be'): compare(two, None, 1)
    with pytest.raises(ValueError, match='fit must name'): compare(two, learner(), 1, fit='train')
    with pytest.raises(ValueError, match='KD needs a teacher: give teacher='): compare(['KD'], learner(), 1)

def test_fine_tune_of_one_group_says_that_it_freezes_nothing():
    with pytest.warns(UserWarning, match='freezes nothing here'): compare({'baseline': None}, loaders(), net, 1, seeds=1, fit='fine_tune', loss_func=CrossEntropyLossFlat())
    with warnings.catch_warnings():
        warnings.simplefilter('error', UserWarning)
        check_learner(learner(), 'fine_tune')

def test_a_callback_that_cannot_be_copied_is_named():
    class Open(Callback):
        def __init__(self): self.file = open(__file__)
    with pytest.raises(TypeError, match='the callback open cannot be copied'): compare({'baseline': None}, learner(cbs=Open()), 1)


# ---------------------------------------------------------------- kept in a folder

def test_the_same_call_goes_on(tmp_path):
    learn = pretrained()
    first = compare({'LsrKD': LsrKD}, learn, 1, seeds=1, fit='fine_tune', out=tmp_path/'out')
    n = len((tmp_path/'out'/'results.jsonl').read_text().splitlines())
    again = compare({'LsrKD': LsrKD}, learn, 1, seeds=2, fit='fine_tune', out=tmp_path/'out')
    assert n == 3 and len((tmp_path/'out'/'results.jsonl').read_text().splitlines()) == 6
    assert [r['key'] for r in again.records if r['seed'] == 0] == [r['key'] for r in first.records]

def test_what_decides_the_numbers_is_in_the_key(tmp_path):
    def key(learn): return compare({'baseline': None}, learn, 1, seeds=1, out=tmp_path/'out').records[0]['key']
    learn,other,frozen = pretrained(),pretrained(),pretrained()
    with torch.no_grad(): other.model[1].bias += 1
    frozen.freeze()
    clipped = copy_learner(learn)
    clipped.gradient_clip.max_norm = .1
    keys = [key(o) for o in (learn, pretrained(), other, frozen, clipped, learner(deepcopy(learn.model), wd=.1))]
    assert keys[0] == keys[1] and len(set(keys)) == 5

def shifted(by):
    class Shifted(Callback):
        def __init__(self): self._by,self.callback = by,'shift'
        def before_batch(self): self.learn.xb = (self.x+self._by,)
    return Shifted()

def stepped(by):
    class Own(Learner):
        def _do_one_batch(self):
            self.xb = (self.xb[0]*by,)
            super()._do_one_batch()
    return Own

class Sharp(Learner):
    def __init__(self, *args, rho=.05, **kwargs):
        super().__init__(*args, **kwargs)
        self.rho = rho

def scored(by):
    def score(pred, y): return by*(pred.argmax(1) == y).float().mean()
    return score

def half_right(pred, y): return accuracy(pred, y)/2
half_right.__name__ = 'accuracy'

def test_code_and_settings_of_a_learner_are_in_the_key(monkeypatch):
    ours = LearnerLike(learner(net()))
    def key(metric=None, higher=None, fit='fit', model=ours.learn.model, maker=Learner, metrics=accuracy, cbs=None, **kwargs):
        learn = maker(ours.dls, deepcopy(model), CrossEntropyLossFlat(), opt, metrics=metrics, cbs=cbs, **kwargs)
        return Campaign({'baseline': Arm()}, LearnerLike(learn), 1, [0], fit, metric=metric, higher=higher).runs['baseline', 0].key
    changes = [dict(), dict(lr=.1), dict(lr=.2), dict(cbs=shifted(.1)), dict(cbs=shifted(.5)), dict(maker=stepped(2)), dict(maker=stepped(3)),
               dict(maker=Sharp), dict(maker=partial(Sharp, rho=.1)), dict(metrics=half_right), dict(metrics=scored(1), metric='score', higher=True),
               dict(metrics=scored(2), metric='score', higher=True), dict(metrics=scored(1), metric='score', higher=False), dict(metric='valid_loss'),
               dict(metrics=F1Score(average='macro'), metric='f1_score'), dict(metrics=F1Score(average='micro'), metric='f1_score')]
    keys = [key(**change) for change in changes]
    for lr in (.1, .2):
        monkeypatch.setattr(Learner, 'fit_own', lambda self, n_epoch, cbs=None, lr=lr: self.fit(n_epoch, lr, cbs=cbs), raising=False)
        keys.append(key(fit='fit_own'))
    assert len(keys) == 18 and len(set(keys)) == 18, [i for i,k in enumerate(keys) if keys.count(k) > 1]
    again = dict(cbs=shifted(.1)),dict(metrics=scored(2), metric='score', higher=True),dict(maker=partial(Sharp, rho=.1)),dict(metrics=[accuracy, error_rate])
    assert [keys.index(key(**change)) for change in again] == [3, 11, 8, 0]
    f1 = F1Score(average='micro')
    f1.preds,f1.targs = [torch.ones(2)],[torch.ones(2)]
    assert key(metrics=f1, metric='f1_score') == keys[15] and len(f1.preds) == 1

def test_an_interrupted_fine_tune_goes_on(tmp_path):
    "Killed in the frozen epoch, between the two fits and in the second one: the numbers are those of a run that was not"
    learn = pretrained()
    class Stop(Exception): pass
    class Kill(Callback):
        order = 1001
        def __init__(self, at): self.at = at
        def before_batch(self):
            if self.training and len(self.recorder.values) == self.at and self.iter == 1: raise Stop('now')
    def run(out, kill=None):
        from fastkdtf.lab.training import Arm, Campaign
        campaign = Campaign({'MemoryReplay': Arm(MemoryReplay)}, LearnerLike(learn), 2, 1, 'fine_tune', .05, out, 'MemoryReplay')
        return campaign.train('MemoryReplay', 0, cbs=[] if kill is None else [Kill(kill)])
    whole = run(tmp_path/'whole')
    for at in range(3):
        with pytest.raises(Stop): run(tmp_path/str(at), at)
        got = run(tmp_path/str(at))
        assert got['history'] == whole['history'] and got['last'] == whole['last'] and len(got['history']['accuracy']) == 3, at


# ---------------------------------------------------------------- no classes

def test_a_regression_is_compared_by_its_own_metric():
    learn = Learner(loaders(values=True), net(1), loss_func=MSELossFlat(), metrics=mae, splitter=halves)
    c = compare({'clipped': lambda: GradientClip(.1)}, learn, 2, seeds=2)
    assert len(c.records) == 4 and all(r['last']['mae'] == pytest.approx(r['history']['mae'][-1], rel=1e-5) for r in c.records)
    assert c.records[0]['metric'] == 'mae' and c.records[0]['higher'] is False

def test_runs_of_any_metric_are_kept_and_read_again(tmp_path):
    learn = Learner(loaders(values=True), net(1), loss_func=MSELossFlat(), metrics=mae, splitter=halves)
    first,again = (compare({'clipped': lambda: GradientClip(.1)}, learn, 1, seeds=2, out=tmp_path) for _ in range(2))
    assert len(first.records) == 4 and first.records == again.records == read_runs(tmp_path)


# ---------------------------------------------------------------- what people bring

def colours(i, size=32):
    "A picture in one of three colours, with noise"
    g = np.random.default_rng(i)
    return PILImage.create((g.integers(0, 60, (size, size, 3)) + 150*np.eye(3)[i % 3]).astype(np.uint8))
def colour(i): return 'rgb'[i % 3]
def bright(i): return PILMask.create((np.array(colours(i))[...,0] > 100).astype(np.uint8))

def pictures(label=colour, n=24):
    labels = [label, Categorize] if label is colour else [label]
    dsets = Datasets(list(range(n+9)), [[colours], labels], splits=[list(range(n)), list(range(n, n+9))])
    dls = dsets.dataloaders(bs=8, num_workers=0, device='cpu', after_item=[ToTensor], after_batch=[IntToFloatTensor, Normalize.from_stats(*imagenet_stats, cuda=False)])
    if label is bright: dls.c = 2
    return dls

def a_torchvision_network(): return vision_learner(pictures(), torchvision.models.resnet18, pretrained=False, normalize=False, metrics=[error_rate, accuracy])
def a_timm_network(): return vision_learner(pictures(), 'test_resnet', pretrained=False, normalize=False, metrics=accuracy)
def a_unet(): return unet_learner(pictures(bright, 8), torchvision.models.resnet18, pretrained=False, normalize=False, n_out=2, loss_func=CrossEntropyLossFlat(axis=1), metrics=DiceMulti())
def a_table():
    df = load_wine(as_frame=True).frame
    dls = TabularDataLoaders.from_df(df, procs=[Normalize], cont_names=list(df.columns[:-1]), y_names='target', y_block=CategoryBlock(), bs=32, valid_idx=list(range(0, len(df), 4)), device='cpu')
    return tabular_learner(dls, layers=[8], metrics=accuracy)
def a_text(): return text_learner()

@pytest.mark.parametrize('make,given', [*[(make, given) for make in (a_timm_network, a_table, a_text) for given in ('learner', 'function')],
                                        (a_torchvision_network, 'function'), (a_unet, 'learner')])
def test_learners_of_every_kind_are_fine_tuned_as_fastai_does_it(make, given):
    "Frozen and trained parameters of both phases, and the numbers of each epoch, are those of a plain fastai learner"
    set_seed(2)
    first = make()
    seen,own = [],[]
    def fit(learn, n_epoch, lr=1e-3, cbs=None): learn.fine_tune(n_epoch, lr, cbs=[*cbs, Trainable(seen)])
    metric = 'dice_multi' if make is a_unet else 'accuracy'
    c = compare({'baseline': None}, first if given == 'learner' else make, 1, seeds=[4], fit=fit, metric=metric)
    if given == 'learner': plain = copy_learner(first)
    else:
        seed_run(4)
        plain = make()
    plain.to_fast('32')   # images channels last, as every run has them
    seed_run(4, plain.dls)
    rows = []
    with plain.no_bar(), plain.no_logging(): plain.fine_tune(1, 1e-3, cbs=[*draws(4), Trainable(own), Rows(rows)])
    assert seen == own and len(own) == 2 and (make in (a_table,) or own[0] < own[1])
    history = c.records[0]['history']
    assert metric in history and len(rows) == 2
    np.testing.assert_allclose(list(zip(*history.values())), rows, rtol=1e-6)

class Trainable(Callback):
    "How many parameters are trained in each fit"
    def __init__(self, seen): self.seen = seen
    def before_fit(self): self.seen.append(sum(p.numel() for p in self.model.parameters() if p.requires_grad))

class Rows(Callback):
    order = 52   # right behind the recorder
    def __init__(self, rows): self.rows = rows
    def after_epoch(self): self.rows.append(list(map(float, self.recorder.values[-1])))
