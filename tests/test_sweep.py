"""`sweep`: trials, their table and figures from scripted errors; killed at any moment it ends as if nothing had happened; the test set is never read"""
import contextlib, json, math, os, random, signal, sys, time
from functools import partial
from itertools import count
from pathlib import Path
from types import SimpleNamespace

import numpy as np, pandas as pd, pytest, torch
import matplotlib
matplotlib.use('agg')
from matplotlib import pyplot as plt
from fastai.basics import Callback, CrossEntropyLossFlat, DataLoaders, Learner
from torch import nn

import fastkdtf.lab.sweep
from fastkdtf.callback.distill import LsrKD, MemoryReplay
from fastkdtf.lab.recipes import recipe, recipes
from fastkdtf.lab.sweep import paper_grid, search_space, sweep
from fastkdtf.lab.one_run import LearnerParts
from fastkdtf.lab.training import Campaign, Arm, method_identity
from processes import needs_fork, processes

optuna = pytest.importorskip('optuna')
torch.set_num_threads(1)   # in child processes too: the numbers of a run depend on it

OWN = dict(alpha=.2, tau=3.)

def a_recipe(**settings): return SimpleNamespace(id='paper/T1/net/LsrKD', method_name='LsrKD', settings={**OWN, **settings}, schedule=SimpleNamespace(epochs=8))


# ---------------------------------------------------------------- scripted trainings

def errors_of(settings, seed, n_epoch):
    "Validation errors by epoch: best at alpha .2 and tau 4"
    last = .1 + .1*abs(math.log(settings['alpha']/.2)) + .02*abs(settings.get('tau', 3.)-4.) + .01*seed
    return [last + .3*(n_epoch-1-e)/n_epoch for e in range(n_epoch)]

class Scripted:
    "A campaign without training; `moments` is called at each moment at which a process may die"
    finished,epochs,moments = {},[],staticmethod(lambda: None)

    def __init__(self, r, dls, seeds, n_epoch, out, controls, settings, **kwargs):
        assert not controls and len(dls.loaders) == 2
        if not 0 < settings['alpha'] <= 1: raise ValueError(f"alpha must be in [0,1], got {settings['alpha']}")
        self.settings,self.seeds,self.n_epoch,self.baseline = {**r.settings, **settings},seeds,n_epoch,'net baseline'
        self.arms = {'net baseline': SimpleNamespace(n_epoch=n_epoch), 'LsrKD': SimpleNamespace(n_epoch=n_epoch)}
        own = {'net baseline': '', 'LsrKD': f'/{json.dumps(self.settings)}'}
        self.runs = {(name, s): SimpleNamespace(key=f'{out}/{name}/{s}/{n_epoch}{own[name]}') for name in self.arms for s in seeds}
        self.store = SimpleNamespace(checkpoint=lambda run: [])

    def train(self, name, seed, cbs=()):
        key = self.runs[name, seed].key
        if key not in self.finished:
            errors = [.3+.02*seed]*self.n_epoch if name == self.baseline else errors_of(self.settings, seed, self.n_epoch)
            for e in range(self.n_epoch):
                learn = SimpleNamespace(recorder=SimpleNamespace(metric_names=['epoch', 'valid_loss', 'accuracy', 'time'], values=[(0., 1-o) for o in errors[:e+1]]))
                if name != self.baseline: self.epochs.append((self.settings['alpha'], seed, e))
                for cb in cbs:
                    cb.learn = learn
                    self.moments()
                    cb('after_epoch')
            self.moments()
            self.finished[key] = dict(key=key, last=dict(accuracy=1-errors[-1], nll=1.), history=dict(accuracy=[1-o for o in errors]))
            self.moments()
        return self.finished[key]

class NoTest:
    "A test set that must not be looked at"
    bs = 1
    def __getattr__(self, name): raise AssertionError(f'the test set was asked for {name}')
    def __iter__(self): raise AssertionError('the test set was read')

@pytest.fixture
def scripted(monkeypatch):
    class Mine(Scripted): finished,epochs = {},[]
    monkeypatch.setattr(fastkdtf.lab.sweep, 'recipe_campaign', Mine)
    return Mine

@pytest.fixture
def no_figures(monkeypatch): monkeypatch.setattr(fastkdtf.lab.sweep.Sweep, 'save', lambda self, out: None)

def some_dls(shuffle=True):
    "64 training and 32 validation samples of 6 numbers, and a test set that fails when it is touched"
    gen = torch.Generator().manual_seed(0)
    x = torch.randn(96, 6, generator=gen)
    y = (x[:,:3] + .8*torch.randn(96, 3, generator=gen)).argmax(1)
    items = [(a, int(c)) for a,c in zip(x, y)]
    dls = DataLoaders.from_dsets(items[:64], items[64:], bs=16, shuffle=shuffle, drop_last=shuffle, device='cpu', num_workers=0)
    dls.loaders.append(NoTest())
    dls.c = 3
    return dls

def a_sweep(out, grid=None, r=None, **kwargs):
    return sweep(r or a_recipe(), some_dls(), dict(alpha=[.1, .2, .4], tau=[3., 5.]) if grid is None else grid, out=out, **{'n_epoch': 4, **kwargs})


# ---------------------------------------------------------------- table and figures

def test_a_grid_varies_one_parameter_at_a_time(tmp_path, scripted, no_figures):
    s = a_sweep(tmp_path, seeds=2)
    t = s.table
    assert list(zip(t.alpha, t.tau)) == [(.1, 3.), (.2, 3.), (.4, 3.), (.2, 5.)]   # the recipe's own settings once
    by_hand = [.1 + .1*math.log(2) + .02, .12, .1 + .1*math.log(2) + .02, .12]   # of seed 0; seed 1 is .01 above
    np.testing.assert_allclose(t.error, np.array(by_hand)+.005)
    np.testing.assert_allclose(t.sd, .01/math.sqrt(2))
    assert list(t.seeds) == [2]*4 and list(t.state) == ['complete']*4
    np.testing.assert_allclose(s.baseline, [.3, .32])
    assert s.best.name == 1 and s.best_settings == OWN and t['rank'][s.best.name] == 1

def test_settings_around_which_a_grid_varies(tmp_path, scripted, no_figures):
    s = a_sweep(tmp_path, dict(alpha=[.2, .4]), settings=dict(tau=4.))
    np.testing.assert_allclose(s.table.error, [.1, .1 + .1*math.log(2)])
    assert s.best_settings == dict(alpha=.2, tau=4.)

def test_the_figure_shows_what_differs_in_one_parameter(tmp_path, scripted, no_figures):
    s = a_sweep(tmp_path, dict(alpha=[.4, .1, .2], tau=[5., 3.]), seeds=2)
    for parameter,xs,errors in (('alpha', [.1, .2, .4], [.125 + .1*math.log(2), .125, .125 + .1*math.log(2)]), ('tau', [3., 5.], [.125, .125])):
        ax = s.plot(parameter)
        line = ax.containers[0].lines[0]
        np.testing.assert_allclose(np.float64(line.get_xdata()), xs)
        np.testing.assert_allclose(np.float64(line.get_ydata()), 100*np.array(errors))
        bars = ax.containers[0].lines[2][0].get_segments()
        np.testing.assert_allclose([b[1][1]-b[0][1] for b in bars], 200*.01/math.sqrt(2))
        low,high = ax.patches[0].get_extents().transformed(ax.transData.inverted()).intervaly
        np.testing.assert_allclose([low, high], [31-math.sqrt(2), 31+math.sqrt(2)])   # baseline .3 and .32
        plt.close()
    with pytest.raises(ValueError, match='parameter must be one of'): s.plot('gamma')

def test_what_is_saved_and_shown(tmp_path, scripted):
    s = a_sweep(tmp_path)
    saved = pd.read_csv(tmp_path/'sweep.csv', index_col='trial')
    np.testing.assert_allclose(saved.error, s.table.error)
    assert {o.name for o in tmp_path.glob('*.png')} == {'alpha.png', 'tau.png'}
    for text in (repr(s), s._repr_html_()):
        for o in ('4 trials', '4 of 8 epochs', '1 seed,', '64 images', '32 held out', 'baseline 30.00 %'): assert o in text

def test_a_second_sweep_in_a_folder_adds_to_the_table_and_the_figures(tmp_path, scripted, monkeypatch):
    drawn,plot = [],fastkdtf.lab.sweep.Sweep.plot
    def noted(self, parameter, ax=None):
        drawn.append((self.study, parameter, [trial.params for trial in self.trials]))
        return plot(self, parameter, ax)
    monkeypatch.setattr(fastkdtf.lab.sweep.Sweep, 'plot', noted)
    first = a_sweep(tmp_path, dict(alpha=[.1, .2], tau=[5.]))
    second = a_sweep(tmp_path, dict(alpha=[.3, .4, .5]), r=a_recipe(tau=4.))
    saved = pd.read_csv(tmp_path/'sweep.csv')
    assert list(saved.groupby('study', sort=False).size()) == [len(first.table), len(second.table)] == [3, 3]
    assert list(saved.study.unique()) == [first.study, second.study] and first.study != second.study
    np.testing.assert_allclose(saved.error, [*first.table.error, *second.table.error])
    assert list(saved.alpha) == [.1, .2, .2, .3, .4, .5] and saved.tau.isna().tolist() == [False]*3+[True]*3
    both = [[*trial] for trial in (drawn[-2], drawn[-1])]
    assert [o[:2] for o in both] == [[first.study, 'alpha'], [second.study, 'alpha']]
    assert both[0][2] == [trial.params for trial in first.trials] and both[1][2] == [trial.params for trial in second.trials]
    assert {o.name for o in tmp_path.glob('*.png')} == {'alpha.png', 'tau.png'}
    height,width,_ = plt.imread(tmp_path/'alpha.png').shape
    assert height/width == pytest.approx(2*3.6/6, rel=.1)   # one above the other
    before = (tmp_path/'sweep.csv').read_bytes()
    a_sweep(tmp_path, dict(alpha=[.1, .2], tau=[5.]))   # the first again
    assert (tmp_path/'sweep.csv').read_bytes() == before

def test_what_a_second_sweep_draws_of_the_first_is_what_the_first_drew(tmp_path, scripted):
    first = a_sweep(tmp_path, dict(alpha=[.1, .2], tau=[5.]), seeds=2)
    second = a_sweep(tmp_path, dict(alpha=[.3, .4]), seeds=[1], r=a_recipe(tau=4.))
    again,own = second._beside(tmp_path)
    assert own is second and again.study == first.study and again.caption == first.caption and again.table.equals(first.table)
    lines = [ax.containers[0].lines[0].get_xydata() for ax in (first.plot('alpha'), again.plot('alpha'))]
    np.testing.assert_allclose(*lines)
    plt.close('all')

def test_trials_of_an_older_version_are_shown_without_what_it_did_not_keep(tmp_path, scripted):
    first = a_sweep(tmp_path, dict(alpha=[.1, .2]))
    storage = optuna.storages.RDBStorage(f'sqlite:///{tmp_path}/sweep.db')
    optuna.load_study(study_name=first.study, storage=storage).set_user_attr('about', {})
    left = optuna.create_study(storage=storage, study_name='interrupted')
    left.add_trial(optuna.trial.create_trial(state=optuna.trial.TrialState.RUNNING, params={'alpha': .1}, distributions={'alpha': optuna.distributions.FloatDistribution(0, 1)}))
    a_sweep(tmp_path, dict(alpha=[.3, .4, .5]))
    saved = pd.read_csv(tmp_path/'sweep.csv')
    assert saved.alpha.tolist() == [.1, .2, .3, .4, .5] and 'interrupted' not in set(saved.study)

def test_a_longer_grid_reuses_what_was_trained(tmp_path, scripted, no_figures):
    a_sweep(tmp_path, dict(alpha=[.1, .2]))
    n = len(scripted.epochs)
    s = a_sweep(tmp_path, dict(alpha=[.1, .2, .4]))
    assert len(scripted.epochs) == n+4 and len(s.table) == 3
    again = a_sweep(tmp_path, dict(alpha=[.1, .2, .4]))
    assert len(scripted.epochs) == n+4 and again.table.equals(s.table)


# ---------------------------------------------------------------- pruning and divergence

def test_the_worst_are_pruned_at_the_epoch_at_which_they_are_known(tmp_path, scripted, no_figures):
    "Optuna's median of the five trials before it; not in the first third of the epochs"
    s = a_sweep(tmp_path, dict(alpha=[.2, .19, .21, .18, .22, .9, .2001]), prune=True, n_epoch=6)
    assert list(s.table.state) == ['complete']*5 + ['pruned', 'complete']
    assert [e for a,_,e in scripted.epochs if a == .9] == [0, 1, 2]   # 6//3 epochs are not looked at
    assert math.isnan(s.table.error[5]) and s.table['rank'].isna()[5] and '1 pruned' in s.caption
    marks = s.plot('alpha').collections[-1].get_offsets()
    plt.close()
    np.testing.assert_allclose(marks, [[.9, 100*errors_of(dict(alpha=.9), 0, 6)[2]]])
    trained = len(scripted.epochs)
    assert a_sweep(tmp_path, dict(alpha=[.2, .19, .21, .18, .22, .9, .2001]), prune=True, n_epoch=6).table.equals(s.table) and len(scripted.epochs) == trained
    whole = a_sweep(tmp_path, dict(alpha=[.2, .19, .21, .18, .22, .9, .2001]), n_epoch=6)   # a grid is not pruned unless asked
    assert set(whole.table.state) == {'complete'}

class Breaks(Callback):
    "From the third step on the loss is no number"
    def __init__(self, alpha): self.alpha = alpha
    def after_loss(self):
        if self.training and self.alpha > .5 and self.train_iter >= 3: self.learn.loss_grad = self.learn.loss = self.learn.loss*float('nan')

def net(): return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(.3), nn.Linear(8, 3))

def with_loss(*args, **kwargs): return Learner(*args, loss_func=CrossEntropyLossFlat(), **kwargs)

def real_campaign(r, dls, seeds, n_epoch, out, controls, settings, make=LsrKD, model_fn=net, **kwargs):
    s = {**r.settings, **settings}
    arms = {'net baseline': Arm(), 'LsrKD': Arm(partial(make, **s))}
    return Campaign(arms, LearnerParts(dls, model_fn, with_loss), n_epoch, seeds, lr=.02, out=out, baseline='net baseline')

def lines(out): return [json.loads(o) for o in (Path(out)/'results.jsonl').read_text().splitlines()]
def ledger_numbers(out): return {r['key']: json.dumps([r[k] for k in ('last', 'best', 'history')]) for r in lines(out)}

def test_a_diverged_run_is_a_result(tmp_path, no_figures, monkeypatch):
    monkeypatch.setattr(fastkdtf.lab.sweep, 'recipe_campaign', partial(real_campaign, make=lambda alpha, tau: Breaks(alpha)))
    s = a_sweep(tmp_path, dict(alpha=[.2, .9]), seeds=2)
    assert list(s.table.state) == ['complete', 'diverged'] and s.table.error[1] == 1 and s.table.error[0] < 1 and '1 diverged' in s.caption
    assert sorted(len(r['history']['accuracy']) for r in lines(tmp_path)) == [0, 0, 4, 4, 4, 4]   # it ended in its first epoch
    before = ledger_numbers(tmp_path)
    assert a_sweep(tmp_path, dict(alpha=[.2, .9]), seeds=2).table.equals(s.table) and ledger_numbers(tmp_path) == before

def test_replay_that_diverges_is_a_result_too(tmp_path, no_figures, monkeypatch):
    "Its copies would be no numbers either, which is an error of its own"
    def replay(alpha, tau): return [MemoryReplay(interval_steps=1, alpha=alpha, tau=tau), *([Explode()] if alpha > .5 else [])]
    monkeypatch.setattr(fastkdtf.lab.sweep, 'recipe_campaign', partial(real_campaign, make=replay))
    assert list(a_sweep(tmp_path, dict(alpha=[.2, .9])).table.state) == ['complete', 'diverged']

class Explode(Callback):
    "Weights that are no numbers after a step whose loss was one"
    def after_step(self):
        if self.train_iter == 2: next(self.model.parameters()).data.fill_(float('nan'))


# ---------------------------------------------------------------- what is looked at

def test_the_test_set_is_not_touched(tmp_path, no_figures, monkeypatch):
    monkeypatch.setattr(fastkdtf.lab.sweep, 'recipe_campaign', real_campaign)
    s = a_sweep(tmp_path)
    with pytest.raises(AssertionError, match='test set was read'): list(some_dls().loaders[2])   # this one tells
    assert {r['evaluated_on'] for r in lines(tmp_path)} == {'validation'} and len(lines(tmp_path)) == 5
    values = {r['callbacks'][0]['alpha']: 1-r['history']['accuracy'][-1] for r in lines(tmp_path) if r['callbacks'] and r['callbacks'][0]['tau'] == 3}
    np.testing.assert_allclose(s.table.error[:3], [values[a] for a in (.1, .2, .4)], rtol=1e-6)

def test_validation_on_the_test_set_is_refused(tmp_path, scripted):
    dls = some_dls()
    dls.split = dict(valid_pct=0)
    with pytest.raises(ValueError, match='dls validates on the test set'): sweep(a_recipe(), dls, dict(alpha=[.2]), out=tmp_path)


# ---------------------------------------------------------------- search

SPACE = dict(alpha=(.01, .9, 'log'), tau=[2., 4., 8.])

def test_a_search_is_within_its_ranges_and_goes_on(tmp_path, scripted, no_figures):
    s = a_sweep(tmp_path/'whole', SPACE, tpe=16)
    assert len(s.table) == 16 and s.table.alpha.between(.01, .9).all() and set(s.table.tau) <= {2., 4., 8.} and s.table.alpha.nunique() == 16
    a_sweep(tmp_path/'parts', SPACE, tpe=5)
    assert a_sweep(tmp_path/'parts', SPACE, tpe=16).table.equals(s.table)
    assert not a_sweep(tmp_path/'other', SPACE, tpe=16, seed=1).table.alpha.equals(s.table.alpha)

def test_whole_numbers_stay_whole(tmp_path, scripted, no_figures):
    s = a_sweep(tmp_path, dict(alpha=(.1, .3), n_copies=(1, 5)), tpe=8)
    assert pd.api.types.is_integer_dtype(s.table.n_copies) and s.table.n_copies.between(1, 5).all() and s.table.n_copies.nunique() > 1

class Killed(BaseException): pass

def test_ended_at_every_moment_a_search_is_the_same(tmp_path, scripted, no_figures):
    "Trial 10 and those after it are suggested by what came before; some are pruned in the middle"
    again = lambda out: a_sweep(out, SPACE, tpe=12, n_epoch=3)
    moments = count()
    scripted.moments = staticmethod(lambda: next(moments))
    expected = again(tmp_path/'whole').table
    n = next(moments)
    assert 'pruned' in set(expected.state) and n > 50
    for kill in random.Random(0).sample(range(n), 3):
        scripted.finished.clear()
        left = iter(range(kill+1, -1, -1))
        def dies():
            if next(left, None) == 0: raise Killed
        scripted.moments = staticmethod(dies)
        with pytest.raises(Killed): again(tmp_path/str(kill))
        assert again(tmp_path/str(kill)).table.equals(expected), kill

@pytest.mark.parametrize('name', ['add_trial', 'tell'])
def test_ended_where_the_study_is_written(tmp_path, scripted, no_figures, monkeypatch, name):
    expected = a_sweep(tmp_path/'whole', SPACE, tpe=3).table
    for kill in (0, 2):
        for when in ('before', 'after'):
            scripted.finished.clear()
            calls,real,out = count(),getattr(optuna.Study, name),tmp_path/f'{kill} {when}'
            def dies(self, *args, **kwargs):
                mine = isinstance(self._storage, optuna.storages.RDBStorage) or 'Cached' in type(self._storage).__name__
                this = mine and next(calls) == kill
                if this and when == 'before': raise Killed
                real(self, *args, **kwargs)
                if this: raise Killed
            with monkeypatch.context() as m:
                m.setattr(optuna.Study, name, dies)
                with pytest.raises(Killed): a_sweep(out, SPACE, tpe=3)
            assert a_sweep(out, SPACE, tpe=3).table.equals(expected), (kill, when)

def test_an_error_in_a_trial_is_raised_and_the_trial_repeated(tmp_path, scripted, no_figures):
    calls = count()
    def fails():
        if next(calls) == 20: raise RuntimeError('out of memory')
    scripted.moments = staticmethod(fails)
    with pytest.raises(RuntimeError, match='out of memory'): a_sweep(tmp_path)
    s = a_sweep(tmp_path)
    assert len(s.table) == 4 and list(s.table.state) == ['complete']*4


# ---------------------------------------------------------------- other processes

class SlowNet(nn.Module):
    "A little slower, so that there is time to be killed in"
    def __init__(self):
        super().__init__()
        self.net = net()
    def forward(self, x):
        time.sleep(.003)
        return self.net(x)

def in_process(out, how, started=None):
    with open(os.devnull, 'w') as null, contextlib.redirect_stdout(null):
        fastkdtf.lab.sweep.recipe_campaign,fastkdtf.lab.sweep.Sweep.save = partial(real_campaign, model_fn=SlowNet),lambda self, out: None
        if started is not None: started.set()
        return a_sweep(Path(out), SPACE if how else None, tpe=how, n_epoch=3).table

@pytest.fixture
def restored(monkeypatch):
    for o,name in ((fastkdtf.lab.sweep, 'recipe_campaign'), (fastkdtf.lab.sweep.Sweep, 'save')): monkeypatch.setattr(o, name, getattr(o, name))

@needs_fork
@pytest.mark.parametrize('how', [None, 12])
def test_killed_at_a_random_time(tmp_path, restored, how):
    start = time.perf_counter()
    expected = in_process(tmp_path/'whole', how)
    took,out,killed = time.perf_counter()-start,tmp_path/'killed',0
    for _ in range(3):
        started = processes.Event()
        p = processes.Process(target=in_process, args=(str(out), how, started))
        p.start()
        assert started.wait(100)
        p.join(random.SystemRandom().uniform(.1, .6)*took)
        if p.exitcode is None:
            os.kill(p.pid, signal.SIGKILL)
            killed += 1
        p.join()
    assert killed
    pd.testing.assert_frame_equal(in_process(out, how), expected, check_exact=True)
    assert ledger_numbers(out) == ledger_numbers(tmp_path/'whole') and len(lines(out)) == len(ledger_numbers(out))
    assert not list(out.glob('unfinished/*.pt'))

@needs_fork
def test_two_processes_share_a_sweep(tmp_path, restored):
    expected = in_process(tmp_path/'one', None)
    ps = [processes.Process(target=in_process, args=(str(tmp_path/'two'), None)) for _ in range(2)]
    for p in ps: p.start()
    for p in ps: p.join()
    assert [p.exitcode for p in ps] == [0, 0]
    pd.testing.assert_frame_equal(in_process(tmp_path/'two', None), expected, check_exact=True)
    assert ledger_numbers(tmp_path/'two') == ledger_numbers(tmp_path/'one') and len(lines(tmp_path/'two')) == 5

@needs_fork
def test_two_processes_share_a_search(tmp_path, restored):
    "What is suggested depends on which trials have ended, so only that each is done once is the same"
    ps = [processes.Process(target=in_process, args=(str(tmp_path), 12)) for _ in range(2)]
    for p in ps: p.start()
    for p in ps: p.join()
    assert [p.exitcode for p in ps] == [0, 0]
    t = in_process(tmp_path, 12)
    assert list(t.index) == list(range(12)) and set(t.state) <= {'complete', 'pruned'}
    assert len(lines(tmp_path)) == 1+(t.state == 'complete').sum()

def test_without_optuna(tmp_path, monkeypatch):
    assert 'optuna' not in vars(fastkdtf.lab.sweep)   # it is imported when it is needed
    monkeypatch.setitem(sys.modules, 'optuna', None)
    with pytest.raises(ImportError, match='sweep needs Optuna: pip install'): sweep('yuan2019/T8/MobileNetV2/LSR', out=tmp_path)


# ---------------------------------------------------------------- grids of the papers, bad input

def test_the_grids_are_the_papers():
    "Wang et al. 2020, §4.3, and the best values of the supplement of Yuan et al. 2020, Tab. 4"
    g = paper_grid(SimpleNamespace(id='x', method_name='MrKD3-TC'))
    assert g == dict(alpha=[.01, .05, .1, .25, .5, .75, .9], tau=[1, 2, 3, 4, 5, 8, 12, 20], gamma=[.01, .011, .015, .025, .05, .1, .25, .5, .75, .9],
                     interval=[1/391, 4/391, 10/391, 40/391, .25, 1, 2.5, 10, 25, 50, 100, 200], n_copies=[1, 3, 5])
    lsr = paper_grid(SimpleNamespace(id='x', method_name='LSR'))['alpha']
    assert len(lsr) == 50 and lsr[0] == .01 and {.15, .19, .23} <= set(lsr) and max(np.diff(lsr)) == pytest.approx(.02)
    assert search_space(g) == dict(alpha=(.01, .9, 'log'), tau=(1., 20., 'log'), gamma=(.01, .9, 'log'), interval=(1/391, 200., 'log'), n_copies=(1, 5))
    with pytest.raises(ValueError, match="the papers state no grid for KD"): paper_grid(SimpleNamespace(id='x', method_name='KD'))

@pytest.mark.parametrize('name', ['LSR', 'LsrKD', 'LsrKD-TC', 'MrKD1', 'MrKD3', 'MrKD3-TC', 'SelfGuidance'])
def test_each_grid_makes_its_method(name):
    r = recipe(recipes(method=name, runnable=True).index[0])
    given = {} if 'gamma' in r.settings or name != 'MrKD3-TC' else dict(gamma=.25)
    for p,values in paper_grid(r).items():
        made = [json.dumps(method_identity(r.method(100, 4, **{**given, p: v}))) for v in values]
        assert len(set(made)) == len(values), p

def test_bad_input(tmp_path, scripted):
    def bad(kind, match, *args, **kwargs):
        with pytest.raises(kind, match=match): a_sweep(tmp_path, *args, **kwargs)
    bad(TypeError, r"grid\['alpha'\] must be a list of values, got \(0.1, 0.9\)", dict(alpha=(.1, .9)))
    bad(TypeError, r"grid\['alpha'\] must be a list of values, got \[\]", dict(alpha=[]))
    bad(TypeError, 'grid must be', {})
    bad(TypeError, 'grid must be', 'papers')
    bad(ValueError, 'with .*alpha.*: alpha must be in', dict(alpha=[.2, 1.5]))
    bad(ValueError, 'low must be below high', dict(alpha=(.9, .1)), tpe=3)
    bad(ValueError, 'above 0', dict(alpha=(0., .1, 'log')), tpe=3)
    bad(TypeError, r"grid\['alpha'\] must be \(low, high\)", dict(alpha=.5), tpe=3)
    bad((TypeError, ValueError), 'tpe', SPACE, tpe=0)
    bad((TypeError, ValueError), 'seeds', seeds=0)
    bad((TypeError, ValueError), 'n_epoch', n_epoch=0)
    assert not scripted.finished   # before anything is trained
    with pytest.raises(ValueError, match='is no recipe'): sweep('wang2020/T9/no/such', out=tmp_path)
