"""`tune`: what is held out, what is tried, what is chosen, and what is said of it

A scripted method makes the errors known beforehand, so that the choice can be checked."""
from functools import partial

import matplotlib
matplotlib.use('agg')
import numpy as np
import pandas as pd
import pytest
import torch
from fastai.callback.core import Callback
from fastai.callback.training import GradientClip
from fastai.data.core import DataLoader, DataLoaders, Datasets
from fastai.data.transforms import Transform
from fastai.learner import Learner
from fastai.losses import CrossEntropyLossFlat, MSELossFlat
from fastai.metrics import accuracy, mae
from fastai.tabular.all import CategoryBlock, Normalize, TabularDataLoaders
from torch import nn

import fastkdtf.lab.training
from fastkdtf.callback.distill import KnowledgeDistillation, LsrKD, TfKDReg
from fastkdtf.lab.learners import LearnerFrom
from fastkdtf.lab.tune import Part, hold_out, tune

optuna = pytest.importorskip('optuna')

pytestmark = pytest.mark.usefixtures('no_drawing')

def items(n, seed=0):
    x = torch.randn(n, 6, generator=torch.Generator().manual_seed(seed))
    return list(zip(x, x[:,:3].argmax(1)))

def loaders(test=True):
    parts = [DataLoader(items(48), bs=16, shuffle=True, drop_last=True, num_workers=0),
             *[DataLoader(items(20, seed), bs=32, num_workers=0) for seed in range(1, 2+test)]]
    dls = DataLoaders(*parts)
    dls.c = 3
    return dls

def net(): return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
def learner(test=True, **kwargs): return Learner(loaders(test), net(), **{**dict(loss_func=CrossEntropyLossFlat(), metrics=accuracy), **kwargs})

class Shift(Callback):
    "Adds to the judged accuracy what its settings say: most at a=.3, b=2; less on the test set than on held-out samples"
    order = 50.5   # after the recorder has measured
    def __init__(self, a=.1, b=1): self.a,self.b = a,b
    def after_validate(self):
        bonus = .2 - abs(self.a-.3) - .05*abs(self.b-2)
        self.recorder.log[-1] = .5 + bonus

def chosen(found): return found.best_params


# ---------------------------------------------------------------- held-out samples

def test_three_sets_share_no_sample():
    dls = loaders(False)
    three = hold_out(dls, .25, seed=3)
    def of(dl): return {tuple(x.tolist()) for x,_ in (dl.dataset[i] for i in range(len(dl.dataset)))}
    train,held,last = map(of, three.loaders)
    assert (len(train), len(held)) == (36, 12) and not train & held and train | held == of(dls.train) and three.loaders[2] is dls.valid
    assert of(hold_out(dls, .25, seed=3).train) == train and of(hold_out(dls, .25, seed=4).train) != train
    assert len(dls.loaders) == 2 and len(dls.train.dataset) == 48

def test_held_out_samples_are_not_augmented():
    "Those of training keep the transforms of training, those that are held out get those of validation"
    class Noise(Transform):
        split_idx = 0
        def encodes(self, x:torch.Tensor): return x+100 if x.is_floating_point() else x
    dsets = Datasets(list(range(40)), [[lambda i: torch.tensor(float(i))], [lambda i: torch.tensor(i % 2)]], splits=[list(range(30)), list(range(30, 40))])
    dls = dsets.dataloaders(bs=10, num_workers=0, device='cpu', after_item=Noise())
    three = hold_out(dls, .2)
    assert three.train.one_batch()[0].min() >= 100 and three.valid.one_batch()[0].max() < 100 and len(three.valid.dataset) == 6

def test_rows_of_a_table_are_held_out():
    df = pd.DataFrame(dict(a=np.arange(60.), b=np.arange(60.)[::-1], y=['u', 'v']*30))
    dls = TabularDataLoaders.from_df(df, procs=[Normalize], cont_names=['a', 'b'], y_names='y', y_block=CategoryBlock(), bs=10, valid_idx=list(range(50, 60)), device='cpu')
    three = hold_out(dls, .2)
    rows = [set(dl.dataset.items.index) for dl in three.loaders]
    assert list(map(len, rows)) == [40, 10, 10] and not rows[0] & rows[1] and rows[0] | rows[1] == set(range(50)) and rows[2] == set(range(50, 60))
    xs = torch.cat([batch[1] for batch in three.valid])
    expected = dls.train_ds.items.loc[sorted(rows[1]), ['a', 'b']].values
    assert np.allclose(np.sort(xs.numpy(), 0), np.sort(expected.astype(np.float32), 0), atol=1e-6)

def test_a_part_hides_what_would_give_other_samples():
    part = Part(pd.DataFrame(dict(a=range(5))), [0, 1], 1)
    for name in ('iloc', 'loc', 'items', 'subset'): assert not hasattr(part, name)

@pytest.mark.parametrize('share', [0, 1, 1.5, .001, .999])
def test_a_share_that_leaves_nothing_is_refused(share):
    with pytest.raises(ValueError, match='share'): hold_out(loaders(False), share)


# ---------------------------------------------------------------- what is tried and chosen

def test_every_combination_is_tried_and_the_best_on_held_out_samples_is_chosen(tmp_path):
    found = tune(Shift, learner(), 2, dict(a=[.1, .3, .5], b=[1, 2]), out=tmp_path, confirm=0)
    assert len(found.table) == 6 and {(p['a'], p['b']) for p in (t.params for t in found.trials)} == {(a, b) for a in (.1, .3, .5) for b in (1, 2)}
    assert found.confirmed is None and 'was not confirmed' in found.verdict

def test_the_choice_follows_validation_and_not_the_test_set(tmp_path):
    "The test set of these loaders is never read before the choice"
    seen = []
    class Watch(list):
        def __getitem__(self, i):
            seen.append(i)
            return super().__getitem__(i)
    learn = learner()
    learn.dls.loaders[2] = DataLoader(Watch(items(20, 2)), bs=32, num_workers=0)
    seen.clear()
    found = tune(LsrKD, learn, 1, dict(alpha=[.1, .5]), out=tmp_path, confirm=0)
    assert not seen and found.best.error == found.table.error.min()
    tune(LsrKD, learn, 1, dict(alpha=[.1, .5]), out=tmp_path, confirm=1)
    assert seen

def test_what_is_chosen_is_confirmed_with_other_seeds_beside_baseline_and_controls(tmp_path, draws):
    found = tune(LsrKD, learner(), 1, dict(alpha=[.1, .5], tau=[3., 5.]), seeds=2, out=tmp_path, confirm=2, lr=.1)
    c = found.confirmed
    assert {r['seed'] for r in c.records} == {2, 3} and c.records[0]['evaluated_on'] == 'test'
    assert c.names[:2] == ['baseline', 'LsrKD'] and c.controls('LsrKD')
    said = c.runs('LsrKD')[0]['callbacks'][0]
    assert {k: said[k] for k in ('alpha', 'tau')} == chosen(found)
    ours,base = ([1-r['last']['accuracy'] for r in c.runs(name)] for name in ('LsrKD', 'baseline'))
    told = found.verdict
    assert f'{100*found.best.error:.2f} % on the samples that chose it' in told and f'{100*np.mean(ours):.2f} ± ' in told and 'on the test set, with 2 other seeds' in told
    assert f'a difference of {100*(np.mean(ours)-found.best.error):+.2f} points' in told
    gained,left = np.mean(found.baseline)-found.best.error,np.mean(base)-np.mean(ours)
    assert f'over the baseline was {100*gained:+.2f} where it was chosen, and is {100*left:+.2f} there' in told
    for name in ('tune.csv', 'tune_alpha.png', 'tune_tau.png', 'tune.db', 'report.html', 'results.jsonl'): assert (tmp_path/name).exists(), name

def test_a_second_method_in_a_folder_adds_to_table_and_report(tmp_path, draws):
    for method in (LsrKD, TfKDReg): tune(method, learner(), 1, dict(alpha=[.1, .5]), out=tmp_path, confirm=1)
    trials,confirmed = (pd.read_csv(tmp_path/f'{name}.csv') for name in ('tune', 'table'))
    assert [name.split()[0] for name in trials.study] == ['LsrKD']*2 + ['TfKDReg']*2 and set(trials.alpha) == {.1, .5}
    assert {'LsrKD', 'TfKDReg'} <= {name.split()[0] for name in confirmed.method}
    page = (tmp_path/'report.html').read_text()
    assert 'LsrKD' in page and 'TfKDReg' in page

class Breaks(Callback):
    "Weights that are no numbers after the first step, if `a` is large"
    def __init__(self, a): self.a = a
    def after_step(self):
        if self.a > .5: next(self.model.parameters()).data.fill_(float('nan'))

def test_a_trial_that_diverged_is_not_chosen(tmp_path):
    found = tune(Breaks, learner(), 1, dict(a=[.7, .2]), confirm=0, out=tmp_path)
    assert list(found.table.state) == ['diverged', 'complete'] and chosen(found) == {'a': .2}
    found = tune(Breaks, learner(), 1, dict(a=[.7, .9]), confirm=1, out=tmp_path)
    assert found.confirmed is None and 'Nothing was chosen' in repr(found) and 'Nothing was chosen' in found._repr_html_()
    with pytest.raises(ValueError, match='all were pruned or diverged'): found.best_settings

def test_loaders_without_a_test_set_confirm_on_their_validation_set(tmp_path):
    found = tune(LsrKD, learner(False), 1, dict(alpha=[.1, .5]), out=tmp_path, confirm=2)
    assert '38 samples to train on and 10 to choose by' in found.caption and 'on the former validation set' in found.verdict
    assert found.confirmed.records[0]['settings']['n_valid'] == 10

def test_the_same_call_trains_nothing_again(tmp_path, monkeypatch):
    call = partial(tune, LsrKD, dls=loaders(), model_fn=net, n_epoch=1, grid=dict(alpha=[.1, .5]), out=tmp_path, confirm=1, loss_func=CrossEntropyLossFlat())
    first = call()
    monkeypatch.setattr(fastkdtf.lab.training, 'train_run', lambda *args, **kwargs: pytest.fail('something is trained'))
    again = call()
    assert again.table.equals(first.table) and again.verdict == first.verdict

def test_a_killed_search_goes_on_as_if_it_had_not_been(tmp_path):
    class Stop(Exception): pass
    class Kill(Callback):
        order = 1001
        def before_batch(self):
            if self.training and Kill.left == 0: raise Stop('now')
            Kill.left -= self.training
    make = LearnerFrom(lambda: learner())
    def search(out, n=None):
        Kill.left = -1 if n is None else n
        def fit(learn, n_epoch, lr=.05, cbs=None): learn.fit(n_epoch, lr, cbs=[*cbs, Kill()])
        return tune(LsrKD, make, 2, dict(alpha=(.05, .9), tau=(1., 9., 'log')), tpe=4, fit=fit, out=out, confirm=0, prune=False)
    whole = search(tmp_path/'whole')
    for n in (9, 20):
        with pytest.raises(Stop): search(tmp_path/str(n), n)
        assert search(tmp_path/str(n)).table.equals(whole.table), n

def test_a_search_stays_in_its_ranges(tmp_path):
    found = tune(LsrKD, learner(), 1, dict(alpha=(.2, .4), tau=(1, 3)), tpe=5, out=tmp_path, confirm=0)
    assert len(found.table) == 5 and found.table.alpha.between(.2, .4).all() and set(found.table.tau) <= {1, 2, 3}

def test_methods_with_a_teacher_by_name_and_in_python(tmp_path):
    torch.manual_seed(1)
    teacher = net()
    by_name = tune('KD:tau=2', learner(), 1, dict(alpha=[.3, .6]), teacher=teacher, out=tmp_path/'a', confirm=1)
    partly = tune(partial(KnowledgeDistillation, teacher, tau=2.), learner(), 1, dict(alpha=[.3, .6]), out=tmp_path/'b', confirm=1)
    assert len(by_name.table) == len(partly.table) == 2 and by_name.confirmed.table.teacher.notna().any()
    first = tune('KD', learner(), 1, dict(alpha=[.3, .6]), teacher=LearnerFrom(lambda: learner()), out=tmp_path/'c', confirm=1)
    assert 'teacher' in first.confirmed.names and len(first.table) == 2

def test_another_metric(tmp_path):
    def made(): return Learner(values_dls, nn.Linear(6, 1), loss_func=MSELossFlat(), metrics=mae)
    values_dls = DataLoaders(*[DataLoader([(x, x[:1]) for x,_ in items(n, n)], bs=16, num_workers=0) for n in (48, 20, 20)])
    values_dls.c = 1
    found = tune(GradientClip, made, 2, dict(max_norm=[.01, 1.]), out=tmp_path, confirm=2, lr=.05)
    assert chosen(found) == dict(max_norm=1.) and found.error_name == 'mae' and 'Its mae is' in found.verdict
    assert found.best.error == pytest.approx(found.table.error.min())

def test_a_line_of_a_figure_goes_through_the_chosen_setting(tmp_path):
    found = tune(LsrKD, learner(), 1, dict(alpha=[.1, .5, .9], tau=[1., 3.]), out=tmp_path, confirm=0)
    ax = found.plot('alpha')
    line = next(o for o in ax.containers if hasattr(o, 'lines'))
    tau = chosen(found)['tau']
    errors = [t.user_attrs['errors'][0] for t in found.trials if t.params['tau'] == tau]
    assert np.allclose(line.lines[0].get_ydata(), 100*np.array(errors)) and list(line.lines[0].get_xdata()) == [.1, .5, .9]


# ---------------------------------------------------------------- mistakes

@pytest.mark.parametrize('kw,error,why', [
    (dict(grid={}), TypeError, 'grid must be a dict'), (dict(grid=dict(alpha=(.1, .9))), TypeError, r"grid\['alpha'\] must be a list"), (dict(grid=dict(alpha=[.1, 2.])), ValueError, 'alpha must be in'),
    (dict(grid=dict(speed=[1])), ValueError, 'speed'), (dict(grid=dict(alpha=(.9, .1)), tpe=3), ValueError, 'low must be below high'), (dict(n_epoch=0), ValueError, 'n_epoch must be at least 1'),
    (dict(fit='train'), ValueError, 'fit must name'), (dict(metric='f1'), ValueError, "metric='f1' is no metric"), (dict(method='KD'), ValueError, 'KD needs a teacher'), (dict(method='Nonsense'), ValueError, 'no method')])
def test_mistakes_are_told_before_anything_is_trained(kw, error, why, tmp_path, monkeypatch):
    monkeypatch.setattr(Learner, 'fit', lambda *args, **kwargs: pytest.fail('something is trained'))
    args = {**dict(method=LsrKD, learn=learner(), n_epoch=1, grid=dict(alpha=[.1, .5]), out=tmp_path), **kw}
    with pytest.raises(error, match=why): tune(args.pop('method'), **args)

def test_inputs_that_the_network_cannot_take_are_told_before_anything_is_trained(tmp_path):
    wrong = Learner(loaders(), nn.Linear(5, 3), loss_func=CrossEntropyLossFlat(), metrics=accuracy)
    with pytest.raises(ValueError, match=r'cannot take its batches \(\[16, 6\], \[16\]\)'): tune(LsrKD, wrong, 1, dict(alpha=[.1]), out=tmp_path)
