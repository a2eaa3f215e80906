"""`compare` and `describe_kd`: what must be the same is the same, bit for bit; interrupts, several processes and bad input lose nothing"""
import contextlib, json, math, os, random, signal, subprocess, sys, time
from copy import deepcopy
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np, pandas as pd, pytest, torch
import matplotlib
matplotlib.use('agg')
from matplotlib import pyplot as plt
from fastai.basics import SGD, Adam, Callback, CrossEntropyLossFlat, DataLoaders, Learner, accuracy
from fastai.callback.all import GradientClip, MixUp, SchedCos
from fastai.callback.progress import ProgressCallback
from torch import nn
from torch.utils.data import TensorDataset

import fastkdtf.lab.one_run, fastkdtf.lab.training
from fastkdtf.callback.distill import Distill, LsrKD, ScaledCE, ScaledLS, TfKDReg
from fastkdtf.lab.compare import compare
from fastkdtf.lab.one_run import BatchDraws, StepDraws, make_callbacks
from fastkdtf.lab.training import Arm, with_controls
from fastkdtf.lab.report import Comparison
from fastkdtf.vision.models import create_model
from fastkdtf.vision.data import kd_dataloaders
from fastkdtf.lab.runs import Ledger
from fastkdtf.callback.checkpoint import seed_run
from fastkdtf.callback.survival import survival_probs
from fastkdtf.teachers.base import Teacher, UniformTeacher, VirtualTeacher
from processes import needs_fork, processes

torch.set_num_threads(1)   # in child processes too: the numbers of a run depend on it

pytestmark = pytest.mark.usefixtures('no_drawing')
K,N_BATCH = 3,3


# ---------------------------------------------------------------- data, model, calls

def tiny_dls(test=True, shuffle=True, seed=0):
    "48 training, 24 validation and 30 test samples of 6 numbers; the label follows from them, with noise"
    gen = torch.Generator().manual_seed(seed)
    x = torch.randn(102, 6, generator=gen)
    y = (x[:,:3] + .8*torch.randn(102, 3, generator=gen)).argmax(1)
    items = [(a, int(c)) for a,c in zip(x, y)]
    sets = [items[:48], items[48:72]] + [items[72:]]*test
    dls = DataLoaders.from_dsets(*sets, bs=16, shuffle=shuffle, drop_last=shuffle, device='cpu', num_workers=0)
    dls.c = K
    return dls

def net(): return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(.3), nn.Linear(8, K))

def tiny_compare(methods, dls=None, model_fn=net, n_epoch=2, seeds=2, **kwargs):
    return compare(methods, dls or tiny_dls(), model_fn, n_epoch, seeds, loss_func=CrossEntropyLossFlat(), **{'lr': .02, **kwargs})

def numbers(record): return json.loads(json.dumps({k: record[k] for k in ('last', 'best', 'history')}))
def by_run(records): return {(r['method'], r['seed']): numbers(r) for r in records}
def lines(out): return [json.loads(o) for o in (out/'results.jsonl').read_text().splitlines()]
def ledger_numbers(out): return {r['key']: numbers(r) for r in lines(out)}

def assert_whole(out, n_runs):
    "Every run once, nothing left over, a table for all"
    keys = [r['key'] for r in lines(out)]
    assert len(keys) == len(set(keys)) == n_runs
    assert not list((out/'unfinished').glob('*.pt')) and {'table.csv', 'accuracy.png', 'curves.png', 'report.html'} <= {o.name for o in out.iterdir()}

BOTH = {'LsrKD': LsrKD, 'TfKDReg': partial(TfKDReg, alpha=.2)}
ALL_NAMES = ['baseline', 'LsrKD', 'TfKDReg', 'LS 0.1']   # and the two controls of TfKDReg

@pytest.fixture(scope='module')
def undisturbed(tmp_path_factory):
    "The runs of `BOTH` that everything else is held against"
    out = tmp_path_factory.mktemp('undisturbed')
    return out,tiny_compare(BOTH, out=out, n_epoch=3)


# ---------------------------------------------------------------- the same start, the same batches

class Logged(nn.Module):
    "Writes down its initial weights and every training batch, once per training; a batch that is only tried has no gradient"
    log = []
    def __init__(self):
        super().__init__()
        self.net,self.mine = net(),None

    def forward(self, x):
        if self.training and torch.is_grad_enabled():
            if self.mine is None:
                self.mine = dict(weights=[p.detach().clone() for p in self.parameters()], batches=[])
                Logged.log.append(self.mine)
            self.mine['batches'].append(x.clone())
        return self.net(x)

class Greedy(Callback):
    "Takes random numbers wherever it can"
    def draw(self): return random.random() + np.random.rand() + torch.rand(1).item()
    def __init__(self): self.draw()
    def before_fit(self): self.draw()
    def before_batch(self): self.draw()

def greedy_factory():
    net(), random.random()
    return [Greedy(), LsrKD()]

def test_same_weights_and_batches_per_seed():
    Logged.log = []
    c = tiny_compare({'greedy': greedy_factory, **BOTH}, model_fn=Logged)
    methods = len(c.names)
    assert len(Logged.log) == 2*methods and methods == 9
    per_seed = Logged.log[:methods],Logged.log[methods:]
    for runs in per_seed:
        for run in runs:
            assert all(torch.equal(a, b) for a,b in zip(run['weights'], runs[0]['weights']))
            assert len(run['batches']) == 2*N_BATCH and all(torch.equal(a, b) for a,b in zip(run['batches'], runs[0]['batches']))
    a,b = (runs[0] for runs in per_seed)
    assert not torch.equal(a['weights'][0], b['weights'][0]) and not torch.equal(a['batches'][0], b['batches'][0])
    assert not torch.equal(a['batches'][0], a['batches'][N_BATCH]), 'each epoch has its own order'


def test_other_methods_order_and_folder_change_nothing(undisturbed, tmp_path):
    all_runs = by_run(undisturbed[1].records)
    random.seed(99), torch.manual_seed(99)
    alone,other = {'LsrKD': LsrKD},{'other': ScaledCE, 'greedy': Greedy, 'TfKDReg': partial(TfKDReg, alpha=.2), 'baseline': None, 'LsrKD': LsrKD}
    for methods,out in ((alone, None), (other, None), (alone, tmp_path)):
        runs = by_run(tiny_compare(methods, out=out, n_epoch=3).records)
        shared = runs.keys() & all_runs.keys()
        assert len(shared) >= 6 and {m for m,_ in shared} >= {'baseline', 'LsrKD', 'LS 0.1'}
        assert all(runs[k] == all_runs[k] for k in shared)

def test_other_seeds_change_nothing(undisturbed):
    runs = by_run(tiny_compare(BOTH, n_epoch=3, seeds=[7, 1], controls=False).records)
    assert {k[1] for k in runs} == {7, 1} and runs['LsrKD', 1] == by_run(undisturbed[1].records)['LsrKD', 1]
    assert runs['LsrKD', 1] != runs['LsrKD', 7]

def test_baseline_is_a_plain_learner(undisturbed):
    dls = tiny_dls()
    seed_run(1, dls)
    model = net()
    learn = Learner(dls, model, metrics=accuracy, loss_func=CrossEntropyLossFlat()).remove_cb(ProgressCallback)
    seed_run(1, dls)
    draws = BatchDraws(1)
    with learn.no_logging(): learn.fit_one_cycle(3, .02, cbs=[draws, StepDraws(draws)])
    record = next(r for r in undisturbed[1].records if (r['method'], r['seed']) == ('baseline', 1))
    assert record['history']['valid_loss'] == [v[1] for v in learn.recorder.values] and record['history']['accuracy'] == [v[2] for v in learn.recorder.values]
    with learn.no_bar():
        z,y = learn.get_preds(ds_idx=2, act=lambda x: x)
    assert record['last']['accuracy'] == accuracy(z, y).item() and record['last']['nll'] == pytest.approx(CrossEntropyLossFlat()(z, y).item())


def test_what_a_record_holds(undisturbed):
    out,c = undisturbed
    for r in lines(out):
        for k in ('key', 'method', 'seed', 'last', 'best', 'history', 'seconds_per_epoch', 'torch', 'fastai', 'fastkdtf', 'commit', 'date', 'settings', 'callbacks'): assert k in r, k
        for score in (r['last'], r['best']): assert score['accuracy'] >= 0 and score['nll'] > 0 and 0 <= score['ece'] <= 1 and len(score['reliability']) == 15
        assert len(r['history']['valid_loss']) == len(r['epoch_seconds']) == 3 and {'train_loss', 'accuracy'} <= r['history'].keys()
        s = r['settings']
        assert (s['n_epoch'], s['lr'], s['bs'], s['n_train'], s['n_classes'], s['fit'], s['model']) == (3, .02, 16, 48, K, 'fit_one_cycle', 'Sequential')
        assert ('base_loss' in r['history']) == (r['method'] != 'baseline')
    tf = next(r for r in lines(out) if r['method'] == 'TfKDReg')
    assert tf['description'] == [['method', TfKDReg(alpha=.2).describe(K).title], *map(list, TfKDReg(alpha=.2).describe(K).rows())]
    assert all(r['description'] == [] for r in lines(out) if r['method'] == 'baseline')
    assert tf['callbacks'] == [dict(callback='TfKDReg', alpha=.2, tau=20., correct_prob=.99, scale='tau2', variant='paper', multiplier=1.)]
    assert_whole(out, 12)
    pd.testing.assert_frame_equal(pd.read_csv(out/'table.csv', index_col='method').fillna({'control_for': ''}), c.table, check_dtype=False)


# ---------------------------------------------------------------- controls

def test_controls_are_shared_and_named(undisturbed):
    table = undisturbed[1].table
    assert list(table.index[:4]) == ALL_NAMES and len(table) == 6
    assert table.control_for['LS 0.1'] == 'LsrKD' and (table.control_for[4:] == 'TfKDReg').all() and (table.control_for[:3] == '').all()
    methods = {'baseline': None, 'LSR': partial(LsrKD, tau=1.), 'a': LsrKD, 'b': partial(LsrKD, tau=4.)}
    arms = with_controls({**methods, 'user': Greedy, 'pair': [LsrKD(), Greedy()]}, 10)
    assert list(arms)[:6] == ['baseline', 'LSR', 'a', 'b', 'user', 'pair'], 'label smoothing .1 is there already, as a method'
    assert arms['LSR'][1] == ['a', 'b'] and {name: arm[1:] for name,arm in list(arms.items())[6:]} == {'CE + greedy': (['pair'], False), 'LS 0.1 + greedy': (['pair'], False)}
    arms = with_controls({'baseline': None, 'a': LsrKD, 'b': partial(LsrKD, tau=4.)}, 10)
    assert list(arms) == ['baseline', 'a', 'b', 'LS 0.1'] and arms['LS 0.1'][1] == ['a', 'b']
    d = arms['LS 0.1'][0].describe(10)
    assert (d.epsilon, d.scale) == pytest.approx((.1, 1.))

def test_without_controls():
    c = tiny_compare(BOTH, controls=False, n_epoch=1, seeds=1)
    assert c.names == ['baseline', 'LsrKD', 'TfKDReg']

def test_control_trains_as_described(undisturbed):
    "Where the equivalence is exact, the control's run is the method's, up to rounding"
    c = tiny_compare({'official': partial(TfKDReg, variant='official', multiplier=100.)}, n_epoch=3, seeds=1)
    method,control = (next(r for r in c.records if r['method'] == n) for n in ('official', [n for n in c.names if n.startswith('LS')][0]))
    assert method['history']['valid_loss'] == pytest.approx(control['history']['valid_loss'], rel=1e-3)


# ---------------------------------------------------------------- going on: skip, add, change

class Forbidden(Exception): pass
def forbidden(*args, **kwargs): raise Forbidden

def test_finished_runs_are_skipped(undisturbed, monkeypatch):
    out,c = undisturbed
    before,folder = (out/'results.jsonl').read_bytes(),sorted(o.name for o in out.iterdir())
    (out/'table.csv').unlink()
    monkeypatch.setattr(fastkdtf.lab.training, 'train_run', forbidden)
    again = tiny_compare(BOTH, out=str(out), n_epoch=3)
    assert (out/'results.jsonl').read_bytes() == before and sorted(o.name for o in out.iterdir()) == folder
    pd.testing.assert_frame_equal(again.table, c.table)
    assert repr(again) == repr(c)

def test_one_method_that_diverges_beside_others():
    c = tiny_compare({'LsrKD': Arm(LsrKD, fit=too_fast)}, n_epoch=1, seeds=1, lr=None)
    assert c.shown.loc['LsrKD', 'NLL'] == '–' != c.shown.loc['baseline', 'NLL']

def test_adding_seeds_methods_and_settings(tmp_path):
    def go(methods, **kw):
        c = tiny_compare(methods, out=tmp_path, **{'n_epoch': 1, **kw})
        return c,(tmp_path/'results.jsonl').read_bytes()
    one,first = go({'LsrKD': LsrKD}, seeds=1)
    two,second = go({'LsrKD': LsrKD}, seeds=3)
    assert second.startswith(first) and len(lines(tmp_path)) == 9 and list(two.table.seeds) == [3, 3, 3]
    more,third = go({'mine': partial(LsrKD, alpha=.3), 'LsrKD': LsrKD}, seeds=3)
    assert third.startswith(second) and len(lines(tmp_path)) == 15 and more.names == ['baseline', 'mine', 'LsrKD', 'LS 0.3', 'LS 0.1']
    for kw in (dict(lr=.03), dict(n_epoch=2), dict(fit='fit'), dict(opt_func=SGD), dict(settings=dict(data='x')), dict(dls=tiny_dls(test=False))):
        before = (tmp_path/'results.jsonl').read_bytes()
        _,after = go({'LsrKD': LsrKD}, seeds=1, **kw)
        assert after.startswith(before) and after.count(b'\n') == before.count(b'\n')+3, kw
    _,last = go({'LsrKD': LsrKD}, seeds=1)
    assert last == after, 'the first settings are still there'

def test_the_split_is_part_of_the_setting(tmp_path):
    def go(split):
        dls = tiny_dls()
        if split is not None: dls.split = split
        return tiny_compare({'baseline': None}, dls, n_epoch=1, seeds=1).records[0]
    plain,one,other = go(None),go(dict(seed=0, train_digest='ab')),go(dict(seed=1, train_digest='cd'))
    assert 'split' not in plain['settings'] and one['settings']['split'] == dict(seed=0, train_digest='ab')
    assert len({o['key'] for o in (plain, one, other)}) == 3 and numbers(plain) == numbers(one)

def changed(methods, **kw):
    "Keys of the first method, for each of several definitions"
    return [next(r['key'] for r in tiny_compare({'m': m}, n_epoch=1, seeds=1, controls=False, **kw).records if r['method'] == 'm') for m in methods]

@pytest.mark.parametrize('methods', [
    (LsrKD, partial(LsrKD, .2), partial(LsrKD, tau=2.), partial(LsrKD, gamma=.2), TfKDReg, partial(TfKDReg, scale=1)),
    (lambda: Distill(VirtualTeacher()), lambda: Distill(VirtualTeacher(.9)), lambda: Distill(VirtualTeacher(), tau=(1., 2.)), lambda: Distill(UniformTeacher())),
    (lambda: Distill(NamelessTeacher()), lambda: Distill(NamelessTeacher(3))),
    (partial(LsrKD, alpha=SchedCos(0, .3)), partial(LsrKD, alpha=SchedCos(0, .2))),
    (lambda: [LsrKD(), GradientClip(.1)], lambda: [LsrKD(), GradientClip(.5)], LsrKD),
    (partial(Distill, UniformTeacher(), variant='official', multiplier=1.), partial(Distill, UniformTeacher(), variant='official', multiplier=5.)),
    (partial(Distill, UniformTeacher()), partial(Distill, UniformTeacher(), sample_weight=lambda step: torch.ones(len(step.y))/2)),
    (lambda: [LsrKD(), MixUp(.2)], lambda: [LsrKD(), MixUp(.8)])])
def test_other_settings_are_other_runs(methods):
    keys = changed(methods)
    assert len(set(keys)) == len(keys)
    assert changed(methods[:1]) == keys[:1]

def user_function(step): return step.z

class UserTeacher:
    "Without a repr of its own"
    def __init__(self): self.power,self.f,self.more = 2,user_function,{'b': 1, 'a': [1, 2]}
    def __call__(self, step): return step.z*self.power

class NamelessTeacher(Teacher):
    "Neither a repr nor an identity of its own"
    def __init__(self, power=2): self.power = power
    def __call__(self, step): return step.z*self.power

class UserCallback(Callback):
    "Without settings"
    def __init__(self): self.words,self.f,self.inner = ('x', 'y'),user_function,UserTeacher()

class WithSet(Callback):
    def __init__(self): self.words = {f'word {i}' for i in range(12)}

STABLE = {'function': partial(Distill, user_function), 'teacher': lambda: Distill(UserTeacher()), 'nameless': lambda: Distill(NamelessTeacher()), 'lambda': lambda: Distill(lambda step: step.z), 'callback': UserCallback,
          'loss': partial(Distill, UniformTeacher(), loss=lambda z, t: z.sum(1)), 'schedule': partial(LsrKD, alpha=SchedCos(0, .9)), 'list': lambda: [UserCallback(), LsrKD()]}

def keys_here(): return {k: changed([m])[0] for k,m in {**STABLE, 'set': WithSet}.items()}

@pytest.fixture(scope='module')
def keys_of_two_processes():
    code = f'import sys, json, io, contextlib; sys.path.insert(0, {str(Path(__file__).parent)!r})\nwith contextlib.redirect_stdout(io.StringIO()):\n' \
           '    import test_learner\n    keys = test_learner.keys_here()\nprint(json.dumps(keys))'
    other = '1' if os.environ.get('PYTHONHASHSEED') != '1' else '2'
    r = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, env={**os.environ, 'PYTHONHASHSEED': other})
    assert r.returncode == 0, r.stderr
    return keys_here(),json.loads(r.stdout)

@pytest.mark.parametrize('name', STABLE)
def test_keys_are_the_same_in_every_process(keys_of_two_processes, name):
    here,there = keys_of_two_processes
    assert here[name] == there[name]

def test_keys_of_sets(keys_of_two_processes): assert keys_of_two_processes[0]['set'] == keys_of_two_processes[1]['set']


# ---------------------------------------------------------------- interrupts

class Fragile(nn.Module):
    "Raises at one training batch, counted over all trainings"
    at,seen,error = None,0,[RuntimeError]
    def __init__(self):
        super().__init__()
        self.net = net()
    def forward(self, x):
        if self.training and torch.is_grad_enabled():
            Fragile.seen += 1
            if Fragile.seen == Fragile.at: raise Fragile.error[0]('interrupted')
        return self.net(x)

def fragile(out, **kw): return tiny_compare({'LsrKD': LsrKD}, out=out, model_fn=Fragile, n_epoch=3, seeds=2, **kw)

@pytest.fixture(scope='module')
def expected(tmp_path_factory):
    "Ledger numbers of `fragile`, undisturbed"
    Fragile.at = None
    out = tmp_path_factory.mktemp('expected')
    fragile(out)
    return ledger_numbers(out)

@pytest.mark.parametrize('at', [[1], [2], [N_BATCH+1], [2*N_BATCH], [3*N_BATCH+2], [9*N_BATCH, 3, 1, 14]])
@pytest.mark.parametrize('error', [RuntimeError, KeyboardInterrupt])
def test_resumed_after_an_exception(tmp_path, expected, at, error):
    for n in at:
        Fragile.at,Fragile.seen,Fragile.error = n,0,[error]
        with pytest.raises(error): fragile(tmp_path)
    Fragile.at = None
    c = fragile(tmp_path)
    assert ledger_numbers(tmp_path) == expected
    assert_whole(tmp_path, 6)
    assert by_run(c.records) == by_run(lines(tmp_path))

def test_interrupt_between_training_and_ledger(tmp_path, expected, monkeypatch):
    "The last epoch is saved, but its scores are not"
    Fragile.at = None
    for owner,name in ((fastkdtf.lab.one_run, 'evaluate'), (fastkdtf.lab.one_run, 'evaluate'), (Ledger, 'append')):
        with monkeypatch.context() as m:
            m.setattr(owner, name, forbidden)
            with pytest.raises(Forbidden): fragile(tmp_path)
    fragile(tmp_path)
    assert ledger_numbers(tmp_path) == expected
    assert_whole(tmp_path, 6)


class SlowNet(nn.Module):
    "A little slower, so that there is time to be killed in"
    def __init__(self):
        super().__init__()
        self.net = net()
    def forward(self, x):
        time.sleep(.002)
        return self.net(x)

def in_process(out, started=None, go=None, seeds=2):
    with open(os.devnull, 'w') as null, contextlib.redirect_stdout(null):
        if started is not None: started.set()
        if go is not None: go.wait()
        tiny_compare({'LsrKD': LsrKD}, out=Path(out), model_fn=SlowNet, n_epoch=3, seeds=seeds)

@pytest.fixture(scope='module')
def slow_expected(tmp_path_factory):
    out = tmp_path_factory.mktemp('slow')
    in_process(out)
    return ledger_numbers(out)

@needs_fork
def test_killed_at_a_random_time(tmp_path, slow_expected):
    killed = 0
    for _ in range(4):
        started = processes.Event()
        p = processes.Process(target=in_process, args=(str(tmp_path), started))
        p.start()
        assert started.wait(60)
        p.join(random.SystemRandom().uniform(.02, .5))
        if p.exitcode is None:
            os.kill(p.pid, signal.SIGKILL)
            killed += 1
        p.join()
        if (tmp_path/'results.jsonl').exists(): assert {r['key'] for r in lines(tmp_path)} <= slow_expected.keys()
    in_process(tmp_path)
    assert ledger_numbers(tmp_path) == slow_expected
    assert_whole(tmp_path, 6)

@needs_fork
def test_two_processes_on_one_folder(tmp_path, slow_expected):
    go = processes.Event()
    started = [processes.Event() for _ in range(2)]
    ps = [processes.Process(target=in_process, args=(str(tmp_path), s, go)) for s in started]
    for p in ps: p.start()
    for s in started: assert s.wait(60)
    go.set()
    for p in ps: p.join()
    assert [p.exitcode for p in ps] == [0, 0]
    assert ledger_numbers(tmp_path) == slow_expected
    assert_whole(tmp_path, 6)
    assert list(pd.read_csv(tmp_path/'table.csv', index_col='method').seeds) == [2, 2, 2]

@needs_fork
def test_the_other_process_dies(tmp_path, slow_expected):
    "Its claim ends with it, and its run is finished here"
    started = processes.Event()
    p = processes.Process(target=in_process, args=(str(tmp_path), started))
    p.start()
    assert started.wait(60)
    while p.is_alive() and not list(tmp_path.glob('unfinished/*.pt')): time.sleep(.005)
    os.kill(p.pid, signal.SIGSTOP)
    killer = subprocess.Popen([sys.executable, '-c', f'import os, time; time.sleep(.5); os.kill({p.pid}, 9)'])
    in_process(tmp_path)
    killer.wait(), p.join()
    assert ledger_numbers(tmp_path) == slow_expected
    assert_whole(tmp_path, 6)


# ---------------------------------------------------------------- best and last

VALID,TEST = (.25, .75, .5, .75, .5),(.6, .2, .8, .4, 1.)   # accuracies after each epoch

class Scripted(nn.Module):
    "Right on as many samples as the script says; `x` is (index of the sample, 1 for the test set, label)"
    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.zeros(()))
        self.register_buffer('epoch', torch.tensor(0))
    def forward(self, x):
        if self.training: self.epoch += 1
        n = max(int(self.epoch), 1)-1
        right = torch.where(x[:,1] == 1, TEST[n]*20, VALID[n]*20)
        c = torch.where(x[:,0] < right-1e-6, x[:,2], 1-x[:,2])
        return torch.stack([1-c, c], 1) + 0*self.w

def scripted_dls(test=True):
    items = lambda n, flag: [(torch.tensor([float(i), flag, float(i%2)]), i%2) for i in range(n)]
    dls = DataLoaders.from_dsets(items(4, 0.), items(20, 0.), *[items(20, 1.)]*test, bs=64, device='cpu', num_workers=0, drop_last=False)
    dls.c = 2
    return dls

def test_best_is_picked_on_validation_and_reported_on_test():
    r = tiny_compare({'baseline': None}, scripted_dls(), Scripted, n_epoch=5, seeds=1).records[0]
    assert r['history']['accuracy'] == pytest.approx(VALID) and r['evaluated_on'] == 'test'
    assert r['last']['accuracy'] == pytest.approx(TEST[-1])
    assert (r['best']['epoch'], r['best']['valid_accuracy'], r['best']['accuracy']) == (1, pytest.approx(.75), pytest.approx(TEST[1])), 'the first of the best'

class ScriptedFragile(Scripted):
    at = None
    def forward(self, x):
        if self.training and int(self.epoch) == ScriptedFragile.at: raise Forbidden
        return super().forward(x)

def test_best_before_an_interrupt(tmp_path):
    go = lambda: tiny_compare({'baseline': None}, scripted_dls(), ScriptedFragile, n_epoch=5, seeds=1, out=tmp_path)
    for ScriptedFragile.at in (3, 4):
        with pytest.raises(Forbidden): go()
    ScriptedFragile.at = None
    r = go().records[0]
    assert (r['best']['epoch'], r['best']['valid_accuracy'], r['best']['accuracy']) == (1, pytest.approx(.75), pytest.approx(TEST[1]))
    assert r['last']['accuracy'] == pytest.approx(TEST[-1]) and r['history']['accuracy'] == pytest.approx(VALID)

def test_without_a_test_set(undisturbed):
    c = tiny_compare({'baseline': None}, scripted_dls(test=False), Scripted, n_epoch=5, seeds=1)
    r = c.records[0]
    assert r['evaluated_on'] == 'validation' and 'validation set' in c.caption and 'test set' in undisturbed[1].caption
    assert (r['last']['accuracy'], r['best']['accuracy']) == (pytest.approx(VALID[-1]), pytest.approx(max(VALID)))


# ---------------------------------------------------------------- how methods are given

def drawing():
    "As a factory that makes a network does"
    net(), np.random.rand(), random.random()
    return LsrKD()

def test_ways_to_give_a_method(undisturbed):
    instance = LsrKD()
    before = dict(vars(instance))
    ways = {'class': LsrKD, 'partial': partial(LsrKD), 'lambda': lambda: LsrKD(), 'instance': instance, 'list': [instance], 'tuple': (LsrKD,), 'list from a function': lambda: [LsrKD()], 'drawing': drawing}
    runs = by_run(tiny_compare(ways, n_epoch=3, seeds=1, controls=False).records)
    expected = by_run(undisturbed[1].records)['LsrKD', 0]
    for name in ways: assert runs[name, 0] == expected, name
    assert vars(instance) == before and instance.learn is None

def test_make_callbacks():
    mine = Greedy()
    cbs = make_callbacks([LsrKD, mine, None, [partial(TfKDReg, alpha=.3)]])
    assert [type(o) for o in cbs] == [LsrKD, Greedy, TfKDReg] and cbs[1] is not mine and cbs[2].alpha == .3
    assert make_callbacks(None) == []
    for bad in (3, 'LsrKD', lambda: 3, [LsrKD, 'x']):
        with pytest.raises(TypeError, match='a method must be'): make_callbacks(bad)

def test_several_callbacks_together():
    c = tiny_compare({'both': lambda: [LsrKD(), TfKDReg()], 'clip': [LsrKD(), GradientClip(.1)]}, n_epoch=1, seeds=1)
    assert c.names == ['baseline', 'both', 'clip', 'CE ×2.9', 'LS 0.661 ×2.9', 'CE + gradient_clip', 'LS 0.1 + gradient_clip']
    assert {'lsr_kd_loss', 'tf_kd_reg_loss'} <= c.records[1]['history'].keys()

@pytest.mark.filterwarnings('ignore:.*freezes nothing here')
@pytest.mark.parametrize('fit', ['fit', 'fit_one_cycle', 'fit_flat_cos', 'fine_tune'])
def test_ways_to_train(fit, tmp_path):
    c = tiny_compare({'baseline': None}, fit=fit, n_epoch=2, seeds=1, out=tmp_path)
    assert fit in c.caption and 0 <= c.records[0]['last']['accuracy'] <= 1 and len(lines(tmp_path)) == 1
    tiny_compare({'baseline': None}, fit=fit, n_epoch=2, seeds=1, lr=None)

def test_a_baseline_of_ones_own():
    c = tiny_compare({'LSR': partial(LsrKD, tau=1.), 'LsrKD': LsrKD}, baseline='LSR', n_epoch=1, seeds=1, controls=False)
    assert c.names == ['LSR', 'LsrKD'] and math.isnan(c.table.difference['LSR']) and not math.isnan(c.table.difference['LsrKD'])


# ---------------------------------------------------------------- diverging

def too_fast(learn, n_epoch, cbs): learn.fit_one_cycle(n_epoch, 1e30, cbs=cbs)

def test_a_diverging_run_is_a_result(tmp_path, monkeypatch):
    c = tiny_compare({'LsrKD': LsrKD}, n_epoch=2, seeds=2, fit=too_fast, lr=None, opt_func=SGD, out=tmp_path)
    assert_whole(tmp_path, 6)
    for r in lines(tmp_path): assert r['last']['nll'] is None and r['history']['valid_loss'][-1] is None and r['last']['accuracy'] is not None
    assert 'NLL' not in c.shown and c.shown.loc['LsrKD', 'last acc %'] != '–'
    monkeypatch.setattr(fastkdtf.lab.training, 'train_run', forbidden)
    again = tiny_compare({'LsrKD': LsrKD}, n_epoch=2, seeds=2, fit=too_fast, lr=None, opt_func=SGD, out=tmp_path)
    assert repr(again) == repr(c)


# ---------------------------------------------------------------- bad input

@pytest.mark.parametrize('change,error,name', [
    (dict(methods={}), TypeError, 'methods'), (dict(methods=[LsrKD]), TypeError, 'methods'), (dict(methods=LsrKD), TypeError, 'methods'),
    (dict(methods={'KD': None}), ValueError, "methods.*'KD'"), (dict(methods={'KD': 'LsrKD'}), TypeError, "method.*'LsrKD'"),
    (dict(seeds=0), ValueError, 'seeds'), (dict(seeds=-1), ValueError, 'seeds'), (dict(seeds=[]), ValueError, 'seeds'), (dict(seeds=True), TypeError, 'seeds'),
    (dict(seeds=2.), TypeError, 'seeds'), (dict(seeds='3'), TypeError, 'seeds'),
    (dict(n_epoch=0), ValueError, 'n_epoch'), (dict(n_epoch=1.5), TypeError, 'n_epoch'), (dict(n_epoch=True), TypeError, 'n_epoch'), (dict(n_epoch=None), TypeError, 'n_epoch'),
    (dict(fit='train'), ValueError, "fit.*'train'"), (dict(fit='dls'), ValueError, 'fit'),
    (dict(lr=0.), ValueError, 'lr'), (dict(lr='fast'), TypeError, 'lr'), (dict(lr=-1), ValueError, 'lr'), (dict(lr=math.nan), ValueError, 'lr'),
    (dict(seeds=[0, 0]), ValueError, 'seeds'),
    (dict(seeds=[0, 'a']), TypeError, 'seed'),
    (dict(model_fn=nn.Linear(6, 3)), TypeError, 'model_fn'),
])
def test_bad_input(change, error, name, monkeypatch, tmp_path):
    monkeypatch.setattr(fastkdtf.lab.training, 'train_run', forbidden)
    kw = {'methods': {'LsrKD': LsrKD}, 'n_epoch': 1, 'seeds': 1, **change}
    with pytest.raises(error, match=name): tiny_compare(kw.pop('methods'), out=tmp_path/'out', **kw)
    assert not (tmp_path/'out'/'results.jsonl').exists()

def test_a_second_comparison_in_a_folder_adds_to_table_and_report(tmp_path, draws):
    tiny_compare({'LsrKD': LsrKD}, out=tmp_path, controls=False)
    second = tiny_compare({'TfKDReg': TfKDReg}, out=tmp_path, controls=False)   # of the same setting
    table = pd.read_csv(tmp_path/'table.csv', index_col='method')
    assert list(second.names) == ['baseline', 'TfKDReg'] and set(table.index) == {'baseline', 'LsrKD', 'TfKDReg'} and len(table) == 3
    assert table.loc['TfKDReg', 'difference'] == pytest.approx(second.table.loc['TfKDReg', 'difference'])
    third = tiny_compare({'LsrKD': LsrKD}, out=tmp_path, controls=False, n_epoch=1)   # of another
    table = pd.read_csv(tmp_path/'table.csv')
    assert list(table.method) == ['baseline', 'LsrKD', 'baseline', 'LsrKD', 'TfKDReg'] and table.setting.nunique() == 2
    assert table['last'][:2].tolist() == pytest.approx(third.table['last'].tolist())
    page = (tmp_path/'report.html').read_text()
    assert page.count('<h2>') >= 2 and 'TfKDReg' in page

def test_bad_folders(tmp_path, monkeypatch):
    monkeypatch.setattr(fastkdtf.lab.training, 'train_run', forbidden)
    (tmp_path/'file').write_text('mine')
    with pytest.raises(ValueError, match='out.*file'): tiny_compare(BOTH, out=tmp_path/'file')
    assert (tmp_path/'file').read_text() == 'mine'
    (tmp_path/'results.jsonl').write_text('{"key": "a"}\nnonsense\n{"key": "b"}\n')
    with pytest.raises(ValueError, match='results.jsonl, line 2'): tiny_compare(BOTH, out=tmp_path)
    assert (tmp_path/'results.jsonl').read_text() == '{"key": "a"}\nnonsense\n{"key": "b"}\n'


# ---------------------------------------------------------------- describe_kd

def softmax(z):
    e = np.exp(z-z.max(1, keepdims=True))
    return e/e.sum(1, keepdims=True)

def by_hand(model, batches, hard, soft, tau, target):
    "Mean ratio of norms, and mean cosine, of the gradients of a linear model"
    w,b = (p.detach().double().numpy() for p in model.parameters())
    ratios,cosines = [],[]
    for x,y in batches:
        x,y = x.double().numpy(),y.numpy()
        z,onehot = x@w.T+b,np.eye(K)[y]
        t = np.where(onehot == 1, *target)
        flat = lambda g: np.concatenate([(g.T@x).ravel(), g.sum(0)])/len(x)
        gh,gs = flat(hard*(softmax(z)-onehot)),flat(soft/tau*(softmax(z/tau)-t))
        ratios.append(np.linalg.norm(gs)/np.linalg.norm(gh))
        cosines.append(gh@gs/np.linalg.norm(gh)/np.linalg.norm(gs))
    return np.mean(ratios),np.mean(cosines)

def linear_learner(cbs, shuffle=False, model=None, **kw):
    torch.manual_seed(0)
    dls = tiny_dls(shuffle=shuffle)
    return Learner(dls, model or nn.Linear(6, K), loss_func=CrossEntropyLossFlat(), cbs=cbs, **kw).remove_cb(ProgressCallback)

def virtual(tau, a=.99):
    p = np.array([a]+[(1-a)/(K-1)]*(K-1))**(1/tau)
    return p[0]/p.sum(),p[1]/p.sum()

@pytest.mark.parametrize('n_batches', [1, 2, 3])
@pytest.mark.parametrize('cb,hard,soft,tau,target', [
    (LsrKD(), .9, .1*3, 3., (1/K, 1/K)), (LsrKD(.4, tau=2., gamma=.5), .6, .4*2, 2., (.5, .25)), (TfKDReg(), .9, .1*400, 20., virtual(20.)), (ScaledLS(.2, 3.), 2.4, .6, 1., (1/K, 1/K))])
def test_describe_kd_by_hand(cb, hard, soft, tau, target, n_batches):
    learn = linear_learner([deepcopy(cb)])
    expected = by_hand(learn.model, list(islice(learn.dls.train, n_batches)), hard, soft, tau, target)
    row = learn.describe_kd(n_batches=n_batches).loc[cb.name]
    assert (row['soft/hard gradient'], row['cosine']) == pytest.approx(expected, abs=6e-4)
    assert row['time'] > 0 and row['memory'] > 0

def test_describe_kd_of_several_and_schedules():
    learn = linear_learner([TfKDReg(), LsrKD(alpha=SchedCos(0, .8))])
    batches = list(islice(learn.dls.train, 4))
    table = learn.describe_kd()
    assert list(table.index) == ['lsr_kd', 'tf_kd_reg'] and list(table.columns) == ['soft/hard gradient', 'cosine', 'time', 'memory']
    assert table.loc['lsr_kd', 'soft/hard gradient'] == pytest.approx(by_hand(learn.model, batches, .2, .8*3, 3., (1/K, 1/K))[0], abs=6e-4)
    half = learn.describe_kd(pct=.5)
    assert half.loc['lsr_kd', 'soft/hard gradient'] == pytest.approx(by_hand(learn.model, batches, .6, .4*3, 3., (1/K, 1/K))[0], abs=6e-4)
    assert half.loc['tf_kd_reg', 'cosine'] == table.loc['tf_kd_reg', 'cosine']
    assert learn.describe_kd(pct=0.).loc['lsr_kd', 'soft/hard gradient'] == 0

def test_describe_kd_changes_nothing():
    "Neither before the first fit nor between two: weights, optimizer, buffers, random states, order of batches"
    def trained(look):
        dls = tiny_dls()
        seed_run(0, dls)
        learn = Learner(dls, net(), loss_func=CrossEntropyLossFlat(), opt_func=Adam, cbs=[LsrKD(), Greedy()], metrics=accuracy).remove_cb(ProgressCallback)
        seed_run(1, dls)
        with learn.no_logging():
            for _ in range(2):
                if look:
                    learn.model.eval()
                    grads = [p.grad for p in learn.model.parameters()]
                    learn.describe_kd(n_batches=2)
                    assert not learn.model.training and all(a is p.grad for a,p in zip(grads, learn.model.parameters()))
                    learn.model.train()
                learn.fit(2, .02)
        return learn,(random.random(), np.random.rand(), torch.rand(1).item(), dls.train.rng.random(), dls.valid.rng.random())
    (a,rng_a),(b,rng_b) = trained(True),trained(False)
    assert rng_a == rng_b and a.recorder.values == b.recorder.values
    for k,v in b.model.state_dict().items(): assert torch.equal(v, a.model.state_dict()[k]), k
    for x,y in zip(a.opt.state_dict()['state'], b.opt.state_dict()['state']): assert all(torch.equal(torch.as_tensor(x[k]), torch.as_tensor(y[k])) for k in y)

def test_describe_kd_leaves_a_torch_loaders_order():
    from torch.utils.data import DataLoader
    x,y = torch.randn(48, 6),torch.arange(48)%K
    def order(look):
        dls = DataLoaders(*[DataLoader(TensorDataset(x, y), 16, shuffle=True, generator=torch.Generator().manual_seed(3)) for _ in range(2)], device='cpu')
        learn = Learner(dls, nn.Linear(6, K), loss_func=CrossEntropyLossFlat(), cbs=LsrKD()).remove_cb(ProgressCallback)
        if look: learn.describe_kd(n_batches=1)
        return torch.cat([b[1] for b in dls.train])
    assert torch.equal(order(True), order(False))

def test_describe_kd_after_an_error():
    learn = linear_learner([LsrKD()], model=nn.Sequential(nn.BatchNorm1d(6), nn.Linear(6, K)), shuffle=True)
    before = {k: v.clone() for k,v in learn.model.state_dict().items()}
    loss,learn.loss_func = learn.loss_func,forbidden
    rng = learn.dls.train.rng.getstate()
    with pytest.raises(Forbidden): learn.describe_kd()
    learn.loss_func = loss
    assert all(torch.equal(v, before[k]) for k,v in learn.model.state_dict().items()) and learn.dls.train.rng.getstate() == rng

def test_describe_kd_frozen_parameters():
    learn = linear_learner([LsrKD()], model=nn.Sequential(nn.Linear(6, 6), nn.Linear(6, K)))
    learn.model[0].requires_grad_(False)
    assert np.isfinite(learn.describe_kd().loc['lsr_kd', 'cosine'])

def test_describe_kd_bad_input():
    with pytest.raises(ValueError, match='no method.*add_cb'): linear_learner([]).describe_kd()
    learn = linear_learner([LsrKD()])
    for n,error in ((0, ValueError), (-1, ValueError), (1.5, TypeError), (True, TypeError)):
        with pytest.raises(error, match='n_batches'): learn.describe_kd(n_batches=n)
    for pct in (-.1, 1.1):
        with pytest.raises(ValueError, match='pct'): learn.describe_kd(pct=pct)
    with pytest.raises(TypeError, match='pct'): learn.describe_kd(pct='end')


# ---------------------------------------------------------------- describe_kd and what methods keep

def test_describe_kd_leaves_network_and_cache_alone(tmp_path):
    "A method may change the network, and a cache must not take one batch's logits for another's"
    from fastkdtf.teachers.cache import CachedTeacher
    from fastkdtf.callback.distill import KnowledgeDistillation
    from fastkdtf.callback.selfguide import SelfGuidance
    dls = kd_dataloaders('digits', bs=64)
    teacher = nn.Sequential(nn.Flatten(), nn.Linear(192, 10))
    cache = CachedTeacher(teacher, tmp_path/'cache', dtype='float32')
    learn = Learner(dls, create_model('resnet8', 10), cbs=[KnowledgeDistillation(cache, .5), SelfGuidance()])
    model,before = learn.model,{k: v.clone() for k,v in learn.model.state_dict().items()}
    assert list(learn.describe_kd(n_batches=3).index) == ['knowledge_distillation', 'self_guidance']
    assert learn.model is model and not survival_probs(model) and all(torch.equal(v, before[k]) for k,v in model.state_dict().items())
    assert cache.verify(learn).n > 0
