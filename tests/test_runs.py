"Checkpoint and resume, seeds, ledger and locks"
import json, os, random, subprocess, sys, time
from pathlib import Path

import numpy as np, pytest, torch
from functools import partial
from fastai.basics import Adam, Callback, CrossEntropyLossFlat, DataLoaders, Datasets, L, Learner, OptimWrapper, SGD, accuracy, load_learner, ranger
from fastai.callback.all import EarlyStoppingCallback, GradientAccumulation, MixUp, ProgressCallback, ReduceLROnPlateau, SaveModelCallback
from hypothesis import given, settings, strategies as st
from torch import nn
from torch.amp import GradScaler

from fastkdtf.lab import runs
from fastkdtf.callback.checkpoint import Checkpoint, seed_run
from fastkdtf.lab.runs import Ledger, run_environment
from fastkdtf.files import replacing, run_lock
from processes import processes

torch.set_num_threads(1)   # in child processes too: the numbers of a run depend on it

N_BATCH = 4   # training batches per epoch of `tiny_learner`


def tiny_dls(bs=16):
    x = torch.randn(104, 6, generator=torch.Generator().manual_seed(1))
    items = [(o, int(o[:3].sum() > o[3:].sum())) for o in x]
    return DataLoaders.from_dsets(items[:72], items[72:], bs=bs, shuffle=True, drop_last=True, device='cpu', num_workers=0)


class Noise(Callback):
    "Augmentation from all three global generators, and state of its own"
    run_valid = False
    total = 0.
    def before_batch(self):
        scale = 1 + .1*random.random() + .1*np.random.rand() + .1*np.random.randn()
        self.learn.xb = (self.x*scale + .1*torch.randn_like(self.x),)
        self.total += scale
    def state_dict(self): return {'total': self.total, 'array': np.arange(3), 'nested': L({'a': (1, None)})}
    def load_state_dict(self, state): self.total = state['total']


class Stop(Callback):
    "Raise at a moment of the training, counted over all its fits"
    order = 2000
    def __init__(self, event, at, error=KeyboardInterrupt): self.event,self.at,self.error,self.seen = event,at,error,0
    def __call__(self, event_name):
        if event_name != self.event or (event_name == 'before_batch' and not self.training): return
        self.seen += 1
        if self.seen == self.at: raise self.error()


class Events(Callback):
    "Write down every event outside the batches"
    order = 999
    def __init__(self): self.seen = []
    def __call__(self, event_name):
        if event_name in ('before_fit', 'before_epoch', 'before_train', 'after_epoch', 'after_fit'): self.seen.append(event_name)


def splitter(model): return [list(model[0].parameters()) + list(model[1].parameters()), list(model[2:].parameters())]


def tiny_learner(path, cbs=(), opt_func=Adam, seed=0, **kwargs):
    dls = tiny_dls()
    seed_run(seed, dls)
    model = nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(.3), nn.Linear(16, 2))
    learn = Learner(dls, model, loss_func=CrossEntropyLossFlat(), opt_func=opt_func, metrics=accuracy, splitter=splitter, path=path, cbs=cbs, **kwargs)
    return learn.remove_cb(ProgressCallback)


def state(learn):
    "Everything that must be equal, bit for bit"
    rec,opt = learn.recorder,learn.opt.state_dict()
    tensors = {k: v for k,v in learn.model.state_dict().items()}
    moments = opt['state'] if isinstance(opt['state'], list) else list(opt['state'].values())
    tensors.update({f'opt{i}.{k}': torch.as_tensor(v) for i,o in enumerate(moments) for k,v in o.items()})
    tensors['losses'] = torch.stack([torch.as_tensor(o) for o in rec.losses]) if rec.losses else torch.zeros(0)
    plain = dict(values=[list(o) for o in rec.values], lrs=list(map(float, rec.lrs)), iters=list(rec.iters), hps={k: list(map(float, v)) for k,v in getattr(rec, 'hps', {}).items()},
                 train_iter=learn.train_iter, final=list(learn.final_record), smooth=float(learn.smooth_loss), noise=learn.noise.total if hasattr(learn, 'noise') else None,
                 draws=(random.random(), np.random.rand(), torch.rand(1).item(), learn.dls.train.rng.random(), learn.dls.valid.rng.random()))
    return tensors,plain


def assert_same(a, b):
    (ta,pa),(tb,pb) = a,b
    assert pa == pb
    assert ta.keys() == tb.keys()
    for k in ta: assert torch.equal(ta[k], tb[k]), k


ways = dict(
    fit           = lambda learn, cbs: learn.fit(5, 1e-2, cbs=cbs),
    fit_one_cycle = lambda learn, cbs: learn.fit_one_cycle(5, 1e-2, cbs=cbs),
    fit_flat_cos  = lambda learn, cbs: learn.fit_flat_cos(5, 1e-2, cbs=cbs),
    fine_tune     = lambda learn, cbs: learn.fine_tune(3, 1e-2, freeze_epochs=2, cbs=cbs),
)
opts = dict(adam=Adam, sgd=partial(SGD, mom=.9), ranger=ranger, torch_sgd=partial(OptimWrapper, opt=torch.optim.SGD, momentum=.9), torch_adam=partial(OptimWrapper, opt=torch.optim.Adam))
def more_cbs(): return [Noise(), MixUp(.4), GradientAccumulation(40)]


def run(tmp_path, way='fit_one_cycle', cbs=(), opt='adam', **kwargs):
    learn = tiny_learner(tmp_path, opt_func=opts[opt], **kwargs)
    ways[way](learn, list(cbs))
    return learn


# ---------------------------------------------------------------- resume

@pytest.mark.parametrize('way', ways)
@pytest.mark.parametrize('event,at', [('before_batch', 2), ('before_batch', 2*N_BATCH+1), ('before_batch', 3*N_BATCH+3), ('after_epoch', 1), ('after_epoch', 2),
                                      ('before_epoch', 3), ('before_validate', 4), ('after_epoch', 5), ('after_fit', 1)])
def test_resumed_equals_undisturbed(tmp_path, way, event, at):
    expected = state(run(tmp_path, way, more_cbs()))
    path = tmp_path/'ck.pth'
    with pytest.raises(KeyboardInterrupt): run(tmp_path, way, more_cbs() + [Checkpoint(path), Stop(event, at)])
    random.seed(99), np.random.seed(99), torch.manual_seed(99)
    assert_same(state(run(tmp_path, way, more_cbs() + [Checkpoint(path)], seed=7)), expected)


@pytest.mark.parametrize('opt', opts)
def test_every_optimizer(tmp_path, opt):
    expected = state(run(tmp_path, 'fine_tune', [Noise()], opt))
    for at in (N_BATCH+1, 4*N_BATCH+2):
        path = tmp_path/f'{at}.pth'
        with pytest.raises(KeyboardInterrupt): run(tmp_path, 'fine_tune', [Noise(), Checkpoint(path), Stop('before_batch', at)], opt)
        assert_same(state(run(tmp_path, 'fine_tune', [Noise(), Checkpoint(path)], opt, seed=7)), expected)


def test_checkpoint_changes_nothing(tmp_path):
    assert_same(state(run(tmp_path, 'fine_tune', more_cbs() + [Checkpoint(tmp_path/'ck.pth')])), state(run(tmp_path, 'fine_tune', more_cbs())))


def test_many_interrupts(tmp_path):
    expected = state(run(tmp_path, 'fine_tune', more_cbs(), seed=3))
    for at in (3, 6, 5, 7, 6, 9):
        try: run(tmp_path, 'fine_tune', more_cbs() + [Checkpoint(tmp_path/'ck.pth'), Stop('before_batch', at)], seed=at)
        except KeyboardInterrupt: pass
    assert_same(state(run(tmp_path, 'fine_tune', more_cbs() + [Checkpoint(tmp_path/'ck.pth')])), expected)


@pytest.mark.parametrize('way', ['fit_one_cycle', 'fine_tune'])
@pytest.mark.parametrize('at', [2, N_BATCH+2, 3*N_BATCH+2])
@pytest.mark.parametrize('attached', [True, False])
def test_ctrl_c_and_the_same_call_on_the_same_learner(tmp_path, way, at, attached):
    expected = state(run(tmp_path, way))
    ck = Checkpoint(tmp_path/'ck.pth')
    learn = tiny_learner(tmp_path, cbs=[ck] if attached else [])
    cbs = [] if attached else [ck]
    with pytest.raises(KeyboardInterrupt): ways[way](learn, [*cbs, Stop('before_batch', at)])
    ways[way](learn, cbs)
    assert '_with_events' not in vars(learn)
    assert_same(state(learn), expected)


def test_ctrl_c_and_only_the_second_fit_again(tmp_path):
    def two(learn, ck):
        learn.fit(2, 1e-2, cbs=ck)
        learn.fit(2, 1e-2, cbs=ck)
    undisturbed = tiny_learner(tmp_path)
    two(undisturbed, [])
    expected = state(undisturbed)
    learn,ck = tiny_learner(tmp_path),Checkpoint(tmp_path/'ck.pth')
    learn.fit(2, 1e-2, cbs=ck)
    with pytest.raises(KeyboardInterrupt): learn.fit(2, 1e-2, cbs=[ck, Stop('before_batch', 3)])
    learn.fit(2, 1e-2, cbs=ck)
    assert_same(state(learn), expected)


def test_trackers_continue(tmp_path):
    def cbs(name): return [SaveModelCallback(fname=name), ReduceLROnPlateau(patience=1, monitor='accuracy'), EarlyStoppingCallback(patience=3, monitor='accuracy')]
    def train(name, *more):
        learn = tiny_learner(tmp_path)
        learn.fit(12, .3, cbs=cbs(name) + list(more))
        return learn
    undisturbed = train('a')
    expected,n = state(undisturbed),len(undisturbed.recorder.values)
    assert n < 12
    for at in range(N_BATCH+1, n*N_BATCH, N_BATCH):
        path = tmp_path/f'{at}.pth'
        with pytest.raises(KeyboardInterrupt): train('b', Checkpoint(path), Stop('before_batch', at))
        assert_same(state(train('b', Checkpoint(path))), expected)
    assert len(train('b', Checkpoint(path)).recorder.values) == n   # stopped early is finished


def test_skipped_epochs_fire_no_events(tmp_path):
    with pytest.raises(KeyboardInterrupt): run(tmp_path, 'fit', [Checkpoint(tmp_path/'ck.pth'), Stop('before_batch', 3*N_BATCH+1)])
    events = Events()
    learn = run(tmp_path, 'fit', [Checkpoint(tmp_path/'ck.pth'), events])
    assert events.seen == ['before_fit'] + ['before_epoch', 'before_train', 'after_epoch']*2 + ['after_fit']
    assert '_with_events' not in vars(learn) and len(learn.recorder.values) == 5


def test_finished_training_trains_nothing(tmp_path, capsys):
    for way in ('fit_one_cycle', 'fine_tune'):
        expected = state(run(tmp_path, way, [Checkpoint(tmp_path/way)]))
        before = (tmp_path/way).read_bytes()
        capsys.readouterr()
        events = Events()
        learn = run(tmp_path, way, [Checkpoint(tmp_path/way), events], seed=5)
        out = capsys.readouterr().out.strip().splitlines()
        assert sum('complete' in o for o in out) == 1
        assert 'before_epoch' not in events.seen and '_with_events' not in vars(learn)
        assert_same(state(learn), expected)
        assert (tmp_path/way).read_bytes() == before


def test_every(tmp_path):
    expected = state(run(tmp_path))
    ck = tmp_path/'ck.pth'
    with pytest.raises(KeyboardInterrupt): run(tmp_path, cbs=[Checkpoint(ck, every=2), Stop('before_batch', 3*N_BATCH+2)])
    assert torch.load(ck, weights_only=True)['epoch'] == 2
    learn = run(tmp_path, cbs=[Checkpoint(ck, every=2)], seed=3)
    assert torch.load(ck, weights_only=True)['epoch'] == 5
    assert_same(state(learn), expected)


def test_scaler_of_mixed_precision(tmp_path):
    class Scaling(Callback):
        "fastai's MixedPrecision has no CPU form; its scaler does"
        order = 10
        def before_fit(self): self.learn.scaler = GradScaler('cpu', init_scale=4., growth_interval=3)
        def before_backward(self): self.learn.loss_grad = self.scaler.scale(self.loss_grad)
        def before_step(self):
            for p in self.model.parameters():
                if p.grad is not None: p.grad /= self.scaler.get_scale()
        def after_step(self):
            self.scaler._found_inf_per_device = None
            growth = self.scaler._growth_tracker + 1
            self.scaler._growth_tracker = growth % 3
            if growth == 3: self.scaler._scale *= 2.
        def after_fit(self): self.scale = self.scaler.get_scale()
    ck = tmp_path/'ck.pth'
    expected = state(run(tmp_path, cbs=[s := Scaling()]))
    with pytest.raises(KeyboardInterrupt): run(tmp_path, cbs=[Scaling(), Checkpoint(ck), Stop('before_batch', 2*N_BATCH+2)])
    again = run(tmp_path, cbs=[t := Scaling(), Checkpoint(ck)])
    assert t.scale == s.scale > 4
    assert_same(state(again), expected)


def test_with_progress_bar(tmp_path):
    ck = tmp_path/'ck.pth'
    with pytest.raises(KeyboardInterrupt): run(tmp_path, cbs=[Checkpoint(ck), Stop('before_batch', 3*N_BATCH+1)])
    for _ in range(2):
        learn = tiny_learner(tmp_path, cbs=[ProgressCallback()])
        learn.fit_one_cycle(5, 1e-2, cbs=Checkpoint(ck))
        assert len(learn.recorder.values) == 5


# ---------------------------------------------------------------- other uses of the learner

def test_nothing_happens_outside_fit(tmp_path):
    ck = tmp_path/'ck.pth'
    learn = tiny_learner(tmp_path, cbs=Checkpoint(ck))
    learn.lr_find(num_it=6, show_plot=False, suggest_funcs=None)
    learn.validate(), learn.get_preds(), learn.summary()
    assert not ck.exists()
    learn.fit(2, 1e-2)
    before = ck.read_bytes()
    learn.lr_find(num_it=6, show_plot=False, suggest_funcs=None)
    learn.validate(), learn.get_preds(), learn.summary()
    assert ck.read_bytes() == before
    assert learn.checkpoint.run


def point(i):  return torch.arange(i, i+6)/64
def parity(i): return i%2


def test_export(tmp_path):
    learn = tiny_learner(tmp_path, cbs=Checkpoint(tmp_path/'ck.pth'))
    plain = tiny_learner(tmp_path)
    for o in (learn, plain):
        o.dls = Datasets(list(range(64)), [[point], [parity]], splits=(range(48), range(48, 64))).dataloaders(bs=16, num_workers=0, device='cpu')
        o.fit(1)
    plain.export('plain.pkl'), learn.export('with.pkl')
    assert (tmp_path/'with.pkl').stat().st_size - (tmp_path/'plain.pkl').stat().st_size < 500
    loaded = load_learner(tmp_path/'with.pkl')
    assert loaded.checkpoint.fits == [] and not loaded.checkpoint.fitting
    before = (tmp_path/'ck.pth').read_bytes()
    dl = learn.dls.valid
    torch.testing.assert_close(loaded.get_preds(dl=dl)[0], learn.get_preds(dl=dl)[0])
    assert (tmp_path/'ck.pth').read_bytes() == before


# ---------------------------------------------------------------- bad files and arguments

def test_other_trainings_are_refused(tmp_path):
    ck = tmp_path/'ck.pth'
    with pytest.raises(KeyboardInterrupt): run(tmp_path, cbs=[Checkpoint(ck), Stop('before_batch', N_BATCH+2)])
    before = ck.read_bytes()
    def other(match, learn=None, n_epoch=5, cbs=()):
        learn = learn or tiny_learner(tmp_path)
        weights = [p.clone() for p in learn.model.parameters()]
        with pytest.raises(ValueError, match=match) as e: learn.fit_one_cycle(n_epoch, 1e-2, cbs=[Checkpoint(ck), *cbs])
        assert 'delete it' in str(e.value) and str(ck) in str(e.value)
        assert all(torch.equal(a, b) for a,b in zip(weights, learn.model.parameters()))
        assert ck.read_bytes() == before
    other('n_epoch: 5 in the file, 6 here', n_epoch=6)
    wide = tiny_learner(tmp_path)
    wide.model[4] = nn.Linear(16, 3)
    other(r'4.weight: \(2, 16\) in the file, \(3, 16\) here', wide)
    deep = tiny_learner(tmp_path)
    deep.model.append(nn.Linear(2, 2))
    other('5.weight: nothing in the file', deep)
    small = tiny_learner(tmp_path)
    small.dls = tiny_dls(bs=8)
    other('batches per epoch: 4 in the file, 9 here', small)
    other('hyper-parameters', tiny_learner(tmp_path, opt_func=partial(SGD, mom=.9)))
    other('callbacks with state', cbs=[Noise()])
    frozen = tiny_learner(tmp_path)
    frozen.freeze()
    other('trained parameters', frozen)


def test_damaged_files_are_refused(tmp_path):
    ck = tmp_path/'ck.pth'
    run(tmp_path, cbs=[Checkpoint(ck)])
    whole = ck.read_bytes()
    flipped = bytearray(whole)
    flipped[len(whole)//2] ^= 255
    torch.save({'weights': torch.zeros(2)}, tmp_path/'other.pth')
    for bad in (whole[:len(whole)//2], whole[:-10], b'', b'no checkpoint', bytes(flipped), (tmp_path/'other.pth').read_bytes()):
        ck.write_bytes(bad)
        with pytest.raises(ValueError, match='damaged'): run(tmp_path, cbs=[Checkpoint(ck)])
        assert ck.read_bytes() == bad


def test_bad_arguments(tmp_path):
    for every in (0, -1, 1.5, True, '1'):
        with pytest.raises(ValueError, match='every'): Checkpoint(tmp_path/'ck.pth', every=every)
    with pytest.raises(ValueError, match='folder'): Checkpoint(tmp_path)
    with pytest.raises(ValueError, match='folder'): Ledger(tmp_path)
    for seed in ('1', 1.5, None, True):
        with pytest.raises(TypeError, match='seed'): seed_run(seed)


def test_unsavable_state_is_named_and_the_old_file_stays(tmp_path):
    class Odd(Callback):
        what = 1
        def state_dict(self): return {'what': self.what}
        def load_state_dict(self, state): pass
        def after_epoch(self): self.what = nn.Linear
    ck = tmp_path/'ck.pth'
    with pytest.raises(TypeError, match='type: a state_dict must hold'): run(tmp_path, cbs=[Checkpoint(ck), Odd()])
    assert torch.load(ck, weights_only=True)['epoch'] == 0


def test_interrupt_while_writing_leaves_the_old_file(tmp_path, monkeypatch):
    expected = state(run(tmp_path))
    for fail in ('save', 'fsync', 'replace'):
        ck,calls = tmp_path/f'{fail}.pth',[]
        where = torch if fail == 'save' else os
        real = getattr(where, fail)
        def interrupted(*args, **kwargs):
            calls.append(1)
            if len(calls) == 5:
                if fail == 'save': args[1].write(b'half a file')
                raise KeyboardInterrupt
            return real(*args, **kwargs)
        monkeypatch.setattr(where, fail, interrupted)
        with pytest.raises(KeyboardInterrupt): run(tmp_path, cbs=[Checkpoint(ck)])
        monkeypatch.undo()
        assert_same(state(run(tmp_path, cbs=[Checkpoint(ck)], seed=2)), expected)


# ---------------------------------------------------------------- kill -9

class Slow(Callback):
    def after_batch(self): time.sleep(.004)

def slow_training(folder, ready):
    ready.set()
    learn = run(folder, 'fine_tune', more_cbs() + [Slow(), Checkpoint(folder/'ck.pth')])
    torch.save(state(learn), folder/'result.pth')

def started(f, *args):
    "A process of its own, which is about to begin"
    ready = processes.Event()
    p = processes.Process(target=f, args=(*args, ready))
    p.start()
    assert ready.wait(120)
    return p


def test_kill_9(tmp_path):
    expected = state(run(tmp_path, 'fine_tune', more_cbs()))
    killed = 0
    for _ in range(3):
        p = started(slow_training, tmp_path)
        if killed < 2:
            time.sleep((time.time_ns()%450)/1000 + .05)
            killed += p.is_alive()
            p.kill()
        p.join()
    assert p.exitcode == 0 or (tmp_path/'result.pth').exists()
    assert_same(torch.load(tmp_path/'result.pth', weights_only=False), expected)


# ---------------------------------------------------------------- seeds

def test_seed_run():
    def draws(seed):
        dls = tiny_dls()
        seed_run(seed, dls)
        return random.random(), np.random.rand(), torch.rand(1).item(), [b[1].tolist() for b in dls.train], dls.valid.rng.random()
    assert draws(3) == draws(3)
    assert all(a != b for a,b in zip(draws(3), draws(4)))
    g = torch.utils.data.DataLoader(list(range(8)), shuffle=True, generator=torch.Generator())
    seed_run(1, DataLoaders(g, g))
    a = [int(o) for o in g]
    seed_run(1, DataLoaders(g, g))
    assert [int(o) for o in g] == a


# ---------------------------------------------------------------- ledger

json_values = st.recursive(st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
                           lambda o: st.lists(o) | st.dictionaries(st.text(), o), max_leaves=20)


@settings(max_examples=60, deadline=None)
@given(records=st.lists(st.tuples(st.text(min_size=1), st.dictionaries(st.text(), json_values)), max_size=6))
def test_any_record_round_trips(tmp_path_factory, records):
    ledger,expected = Ledger(tmp_path_factory.mktemp('ledger')/'results.jsonl'),{}
    for key,values in records:
        record = {**values, 'key': key}
        assert ledger.append(record) == (key not in expected)
        expected.setdefault(key, record)
    assert ledger.records() == list(expected.values()) == list(ledger)
    assert all(key in ledger and ledger.find(key) == record for key,record in expected.items())
    assert len(ledger) == len(expected)


def test_values_of_arrays(tmp_path):
    ledger = Ledger(tmp_path/'sub'/'results.jsonl')
    assert 'a' not in ledger and ledger.records() == [] and ledger.find('a') is None
    ledger.append(dict(key='a', x=np.float32(.5), n=np.int64(3), t=torch.tensor(2.), b=np.bool_(True), v=np.arange(3), nan=float('nan'), inf=np.float64('-inf'),
                       path=tmp_path, l=L(1, torch.tensor([1., float('nan')])), d={1: 2}))
    assert ledger.find('a') == dict(key='a', x=.5, n=3, t=2., b=True, v=[0, 1, 2], nan=None, inf=None, path=str(tmp_path), l=[1, [1., None]], d={'1': 2})


def test_bad_records(tmp_path):
    ledger = Ledger(tmp_path/'results.jsonl')
    for bad in ({}, {'key': ''}, {'key': 3}, {'key': None}):
        with pytest.raises(ValueError, match='key'): ledger.append(bad)
    with pytest.raises(TypeError, match='dict'): ledger.append(['key'])
    with pytest.raises(TypeError, match='record cannot hold a'): ledger.append({'key': 'a', 'x': nn.ReLU()})
    assert not ledger.path.exists()


@pytest.mark.parametrize('torn', [b'{"key": "b", "x', b'\x00'*30, '{"key": "ü'.encode()[:-1], b'7'])
def test_torn_last_line(tmp_path, torn):
    ledger = Ledger(tmp_path/'results.jsonl')
    ledger.append({'key': 'a'})
    with open(ledger.path, 'ab') as f: f.write(torn)
    assert [o['key'] for o in ledger] == ['a']
    assert ledger.append({'key': 'b'})
    assert [json.loads(o)['key'] for o in ledger.path.read_text().splitlines()] == ['a', 'b']
    assert Path(f'{ledger.path}.torn').read_bytes() == torn+b'\n'


def test_last_line_without_newline_is_a_record(tmp_path):
    ledger = Ledger(tmp_path/'results.jsonl')
    ledger.path.write_text('{"key": "a"}\n\n{"old": 1}\r\n{"key": "b"}')
    assert ledger.records() == [{'key': 'a'}, {'old': 1}, {'key': 'b'}]
    assert not ledger.append({'key': 'b'}) and ledger.append({'key': 'c'})
    assert ledger.path.read_bytes().startswith(b'{"key": "a"}\n\n{"old": 1}\r\n{"key": "b"}\n{"key": "c", "seal": ')


@pytest.mark.parametrize('line', ['not JSON', '7', '[1]', '{"key": "x"'])
def test_bad_line_in_the_middle(tmp_path, line):
    ledger = Ledger(tmp_path/'results.jsonl')
    ledger.path.write_text(f'{{"key": "a"}}\n{line}\n{{"key": "b"}}\n')
    before = ledger.path.read_bytes()
    for f in (ledger.records, lambda: ledger.append({'key': 'c'})):
        with pytest.raises(ValueError, match='results.jsonl, line 2'): f()
    assert ledger.path.read_bytes() == before


def writer(path, me, n, go, ready):
    ready.set()
    go.wait(60)
    ledger = Ledger(path)
    for i in range(n):
        ledger.append(dict(key=f'{me}/{i}', text='x'*(i%50)*40))
        ledger.append(dict(key=f'shared/{i}', by=me))


def test_two_writers(tmp_path):
    path,n,go = tmp_path/'results.jsonl',200,processes.Event()
    ps = [started(writer, path, me, n, go) for me in 'ab']
    go.set()
    for p in ps: p.join()
    assert [p.exitcode for p in ps] == [0, 0]
    keys = [json.loads(o)['key'] for o in path.read_text().splitlines()]
    assert len(keys) == len(set(keys)) == 3*n
    assert set(keys) == {f'{me}/{i}' for me in ('a', 'b', 'shared') for i in range(n)}


def test_killed_writer(tmp_path):
    path = tmp_path/'results.jsonl'
    go = processes.Event()
    go.set()
    p = started(writer, path, 'a', 100_000, go)
    while not path.exists(): time.sleep(.01)
    time.sleep((time.time_ns()%350)/1000 + .05)
    p.kill()
    p.join()
    assert p.exitcode != 0
    n = len(Ledger(path))
    assert n and Ledger(path).append({'key': 'after'}) and len(Ledger(path)) == n+1


def as_if_new():
    "The environment as a new process would see it"
    runs._source.cache_clear()
    return run_environment()

@pytest.fixture(autouse=True, scope='module')
def forget():
    yield
    runs._source.cache_clear()

def test_run_environment(monkeypatch):
    env = run_environment()
    assert {'python', 'torch', 'torchvision', 'fastai', 'timm', 'fastkdtf', 'commit', 'dirty', 'platform', 'device', 'threads', 'processor', 'date'} == set(env)
    assert json.loads(json.dumps(env)) == env
    assert env['commit'] is None or len(env['commit']) == 40
    monkeypatch.setenv('PATH', '')
    assert as_if_new()['commit'] is None


def test_commit_is_fastkdtfs_own(tmp_path, monkeypatch):
    "Not that of a repository which happens to hold the environment fastkdtf is installed in"
    import fastkdtf
    git = lambda *args: subprocess.run(['git', '-C', str(tmp_path), '-c', 'user.name=a', '-c', 'user.email=a@b', *args], check=True, capture_output=True)
    site = tmp_path/'site-packages'/'fastkdtf'
    site.mkdir(parents=True), git('init'), git('commit', '--allow-empty', '-m', 'x')
    monkeypatch.setattr(fastkdtf, '__file__', str(site/'__init__.py'))
    assert as_if_new()['commit'] is None and as_if_new()['dirty'] is None
    own = tmp_path/'fastkdtf'
    own.mkdir()
    monkeypatch.setattr(fastkdtf, '__file__', str(own/'__init__.py'))
    assert as_if_new()['commit'] and as_if_new()['dirty'] is False
    (own/'core.py').write_text('1')
    assert run_environment()['dirty'] is False, 'what was imported is what runs'
    assert as_if_new()['dirty'] is True


def test_run_lock(tmp_path):
    hold = "import sys; from fastkdtf.files import run_lock\nwith run_lock(sys.argv[1]) as mine: print(mine, flush=True); sys.stdin.readline()"
    p = subprocess.Popen([sys.executable, '-c', hold, str(tmp_path/'a'/'run')], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert p.stdout.readline() == 'True\n'
    with run_lock(tmp_path/'a'/'run') as mine: assert not mine
    with run_lock(tmp_path/'a'/'other') as mine: assert mine
    p.kill(), p.wait(), p.stdin.close(), p.stdout.close()
    with run_lock(tmp_path/'a'/'run', timeout=5) as mine: assert mine
    with pytest.raises(KeyError):
        with run_lock(tmp_path/'b'): raise KeyError
    with run_lock(tmp_path/'b') as mine: assert mine


def test_replacing_survives_stale_files(tmp_path):
    (tmp_path/'x.tmp').write_bytes(b'stale, and longer than what comes')
    with replacing(tmp_path/'x') as f: f.write(b'new')
    assert (tmp_path/'x').read_bytes() == b'new' and not (tmp_path/'x.tmp').exists()

def test_an_interrupt_while_saving_is_an_interrupt(tmp_path):
    "torch's writer closes its archive on the way out, which fails"
    def save(f):
        try: raise KeyboardInterrupt
        finally: raise RuntimeError('unexpected pos')
    (tmp_path/'a').write_text('old')
    with pytest.raises(KeyboardInterrupt):
        with replacing(tmp_path/'a') as f: save(f)
    assert (tmp_path/'a').read_text() == 'old'
