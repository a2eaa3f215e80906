"""Training in stages: what each changes and when, one history, and the same training after an interrupt anywhere."""
import math, re
from functools import partial
from pathlib import Path

import numpy as np, pytest, torch
from fastai.basics import Callback, DataLoader, DataLoaders, Learner, OptimWrapper, SGD, accuracy
from fastai.callback.all import MixUp, SaveModelCallback
from fastai.learner import CancelFitException
from fastai.losses import CrossEntropyLossFlat, LabelSmoothingCrossEntropyFlat
from hypothesis import given, settings, strategies as st
from torch import nn

from fastkdtf.vision.data import kd_dataloaders
from fastkdtf.callback.distill import Distill, LsrKD, MemoryReplay, TfKDReg
from fastkdtf.callback.effdstl import CKM, WSL
from fastkdtf.callback.checkpoint import Checkpoint, seed_run
from fastkdtf.callback.stages import OneDisplay, Stage, scale_epochs

K = 4

@pytest.fixture(autouse=True)
def in_tmp_path(tmp_path, monkeypatch): monkeypatch.chdir(tmp_path)

class Blobs:
    def __init__(self, n=48, seed=0):
        gen = torch.Generator().manual_seed(seed)
        self.y = torch.arange(n)%K
        self.x = torch.randn(n, 6, generator=gen) + torch.eye(6)[self.y]
    def __len__(self): return len(self.y)
    def __getitem__(self, i): return self.x[i],self.y[i]

def net(seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, K))

def learner(cbs=None, opt_func=SGD, **kwargs):
    seed_run(0)
    dls = DataLoaders(DataLoader(Blobs(), bs=8, shuffle=True, num_workers=0, drop_last=True), DataLoader(Blobs(seed=1), bs=16, num_workers=0), device='cpu')
    dls.c = K
    seed_run(0, dls)
    return Learner(dls, net(), loss_func=CrossEntropyLossFlat(), metrics=accuracy, cbs=cbs, opt_func=opt_func, **kwargs)

def quiet(learn, stages, *args, **kwargs):
    with learn.no_bar(), learn.no_logging(): learn.fit_stages(stages, *args, **kwargs)
    return learn

class Watch(Callback):
    "What is in force at each training batch"
    order,run_valid = 70,False
    def __init__(self): self.rows = []
    def before_step(self):
        opt = self.learn.opt
        momentum = [len(opt.state[p]) for g in opt.param_lists for p in g] if not isinstance(opt, OptimWrapper) else [len(opt.opt.state.get(p, {})) for p in self.learn.model.parameters()]
        self.rows.append(dict(lr=opt.hypers[-1]['lr'], wd=opt.hypers[-1].get('wd'), opt=id(opt), n=len(self.learn.yb[0]), state=sum(momentum), loss_func=type(self.learn.loss_func),
                              methods=[type(o).__name__ for o in self.learn.cbs if isinstance(o, Distill)], epoch=self.epoch, pct=self.learn.pct_train))
    def __getitem__(self, k): return [o[k] for o in self.rows]


# ---------------------------------------------------------------- epochs

@settings(max_examples=200, deadline=None)
@given(shares=st.lists(st.floats(.01, 1000.), min_size=1, max_size=6), extra=st.integers(0, 300))
def test_scaled_epochs_add_up_and_keep_the_proportion(shares, extra):
    n = len(shares)+extra
    out = scale_epochs(shares, n)
    assert sum(out) == n and min(out) >= 1 and all(isinstance(o, int) for o in out)
    exact = [o/sum(shares)*n for o in shares]
    if min(exact) >= 1: assert all(abs(a-b) < 1 for a,b in zip(out, exact))

def test_the_papers_proportion():
    assert [scale_epochs([240, 60], n) for n in (300, 100, 10, 5, 4, 3, 2)] == [[240,60],[80,20],[8,2],[4,1],[3,1],[2,1],[1,1]]

@pytest.mark.parametrize('make,error,words', [
    (lambda: scale_epochs([240, 60], 1), ValueError, 'n_epoch must be at least 2, one for each stage, got 1'), (lambda: scale_epochs([1, 0], 5), ValueError, 'shares'),
    (lambda: Stage(0), ValueError, 'n_epoch'), (lambda: Stage(1.5), TypeError, 'n_epoch'), (lambda: Stage(1, wd=-1), ValueError, 'wd'), (lambda: Stage(1, bs=0), ValueError, 'bs'),
    (lambda: Stage(1, fit='fine_tune'), ValueError, "fit must be one of 'fit', 'fit_one_cycle', 'fit_flat_cos', got 'fine_tune'"),
    (lambda: Stage(1, lr=(1., .1, .01)), ValueError, 'lr must be a number, a slice, or the pair'), (lambda: Stage(1, lr=(.1, -1)), ValueError, 'lr'),
    (lambda: Stage(1, lr=(.1, .01), fit='fit_one_cycle'), ValueError, 'a schedule of its own'), (lambda: Stage(1, opt_func='sgd'), TypeError, 'opt_func'),
    (lambda: Stage(1, loss_func=3), TypeError, 'loss_func'), (lambda: Stage(1, opt_func=SGD, new_opt=False), ValueError, 'give one of them')])
def test_bad_stages(make, error, words):
    with pytest.raises(error, match=words): make()

def test_stage_lists_that_do_not_add_up():
    learn = learner()
    for stages,n,error,words in (([], None, ValueError, 'stages is empty'), ([Stage(2), Stage(3)], 6, ValueError, r'2 \+ 3 = 5 epochs, not n_epoch=6'),
                                 ([Stage(1), (2, LsrKD())], None, TypeError, 'list of Stage')):
        with pytest.raises(error, match=words): learn.fit_stages(stages, n)
    assert learn.opt is None


# ---------------------------------------------------------------- what changes, and when

def test_everything_changes_at_the_switch():
    log = Watch()
    learn = learner(log)
    own = learn.loss_func,learn.opt_func,learn.dls,learn.lr
    quiet(learn, [Stage(2, [LsrKD(), MixUp()], lr=(.5, .1), wd=.01, opt_func=partial(SGD, mom=.9)),
                  Stage(1, TfKDReg(), lr=.05, wd=0., opt_func=partial(OptimWrapper, opt=torch.optim.SGD, momentum=.5), loss_func=LabelSmoothingCrossEntropyFlat(), bs=16)], 3)
    first,second = log.rows[:12],log.rows[12:]
    assert len(second) == 3
    assert all(o['methods'] == ['LsrKD'] and o['wd'] == .01 and o['n'] == 8 for o in first) and all(o['methods'] == ['TfKDReg'] and o['wd'] == 0 and o['n'] == 16 for o in second)
    assert len({o['opt'] for o in first}) == len({o['opt'] for o in second}) == 1 and first[0]['opt'] != second[0]['opt']
    assert [o['state'] > 0 for o in second] == [False, True, True]   # a fresh optimizer remembers nothing
    assert {o['loss_func'] for o in second} == {LabelSmoothingCrossEntropyFlat}
    np.testing.assert_allclose([o['lr'] for o in first], [.1+.4*(1+math.cos(math.pi*i/12))/2 for i in range(12)])
    assert [o['lr'] for o in second] == [.05]*3
    assert [o['pct'] for o in second] == pytest.approx([0, 1/3, 2/3])
    assert (learn.loss_func, learn.opt_func, learn.dls, learn.lr) == own and isinstance(learn.opt, OptimWrapper)
    assert not [o for o in learn.cbs if isinstance(o, (Distill, MixUp))] and [o.name for o in learn.metrics] == ['accuracy']

def test_an_optimizer_can_go_on():
    log = Watch()
    quiet(learner(log, opt_func=partial(SGD, mom=.9)), [Stage(1, lr=.1, wd=.1), Stage(1, lr=.01, wd=0., new_opt=False)])
    assert len(set(log['opt'])) == 1 and log['state'][6] > 0 and log['wd'] == [.1]*6+[0.]*6 and log['lr'] == [.1]*6+[.01]*6

def test_stages_that_change_nothing_are_one_training():
    kw = dict(opt_func=partial(SGD, mom=.9))
    a = quiet(learner(**kw), [Stage(2, lr=.1), Stage(1, lr=.1, new_opt=False)])
    b = quiet(learner(**kw), Stage(3, lr=.1))
    c = learner(**kw)
    with c.no_bar(), c.no_logging(): c.fit(3, .1)
    for o in (a, b):
        assert all(torch.equal(p, q) for p,q in zip(o.model.state_dict().values(), c.model.state_dict().values()))
        assert str(o.recorder.values) == str(c.recorder.values) and o.recorder.iters == c.recorder.iters and o.recorder.lrs == c.recorder.lrs
        assert [float(l) for l in o.recorder.losses] == [float(l) for l in c.recorder.losses]

def test_the_teacher_changes_at_the_switch():
    asked = []
    def named(name):
        def teacher(step):
            asked.append(name)
            return torch.zeros(len(step.y), K)
        return teacher
    quiet(learner(), [Stage(1, WSL(named('weak'))), Stage(1, CKM(named('strong')))])
    assert asked == ['weak']*6 + ['strong']*6

@pytest.mark.parametrize('fit', ['fit', 'fit_one_cycle', 'fit_flat_cos'])
def test_training_methods_of_the_learner(fit):
    a = quiet(learner(), [Stage(2, lr=.1, wd=.02, fit=fit)])
    b = learner()
    with b.no_bar(), b.no_logging(): getattr(b, fit)(2, .1, wd=.02)
    assert all(torch.equal(p, q) for p,q in zip(a.model.state_dict().values(), b.model.state_dict().values())) and a.recorder.lrs == b.recorder.lrs

def test_batch_size_of_the_images_loader():
    seed_run(0)
    dls = kd_dataloaders('digits', bs=128)
    log = Watch()
    learn = Learner(dls, nn.Sequential(nn.Flatten(), nn.LazyLinear(10)), metrics=accuracy, opt_func=SGD, cbs=log)
    learn.model(dls.one_batch()[0].cpu())
    quiet(learn, [Stage(1), Stage(1, LsrKD(), bs=64)])
    n = len(dls.train)
    assert log['n'] == [128]*n + [64]*(len(log['n'])-n) and len(log['n'])-n >= 2*n and learn.dls is dls

def test_an_early_stop_ends_its_stage_only():
    class Stop(Callback):
        def after_epoch(self):
            if len(self.recorder.values) == 0: raise CancelFitException
    learn = quiet(learner(), [Stage(3, Stop()), Stage(2)])
    assert len(learn.recorder.lrs) == 6+12


# ---------------------------------------------------------------- one history

def test_one_history_over_different_columns():
    learn = quiet(learner(), [Stage(2, LsrKD(), lr=.1), Stage(1, lr=.1), Stage(2, [LsrKD(), TfKDReg(alpha=.2)], lr=.1)])
    r = learn.recorder
    assert r.metric_names == ['epoch', 'train_loss', 'valid_loss', 'accuracy', 'base_loss', 'soft_loss', 'lsr_kd_loss', 'tf_kd_reg_loss', 'time']
    known = np.array([[not math.isnan(float(v)) for v in row] for row in r.values])
    assert known[:,:3].all() and known.shape == (5, 7)
    assert known[:,3].tolist() == [1,1,0,1,1] and known[:,4].tolist() == [1,1,0,0,0] and known[:,5].tolist() == known[:,6].tolist() == [0,0,0,1,1]
    assert len(r.losses) == len(r.lrs) == 30 and r.iters == [6,12,18,24,30]
    r.plot_loss(show_epochs=True)

def test_the_smoothed_loss_goes_on():
    learn = quiet(learner(), [Stage(1, lr=0.), Stage(1, lr=0.)])
    losses = [float(o) for o in learn.recorder.losses]
    assert abs(losses[6]-losses[5]) < .15*losses[5] and learn.recorder.smooth_loss.count == 12

def test_later_fits_and_predictions_are_as_ever():
    learn = quiet(learner(), [Stage(1, LsrKD()), Stage(1, WSL(net(3)))])
    with learn.no_bar(): assert len(learn.get_preds()[0]) == 48 and len(learn.validate()) == 2
    with learn.no_bar(), learn.no_logging(): learn.fit(1)
    assert learn.recorder.metric_names == ['epoch', 'train_loss', 'valid_loss', 'accuracy', 'time'] and len(learn.recorder.values) == 1

def test_one_table_and_one_bar(capsys):
    learn = learner()
    bar = learn.progress
    learn.fit_stages([Stage(2, LsrKD()), Stage(1, TfKDReg())])
    out = capsys.readouterr().out
    assert out.count('valid_loss') == 1
    shown = [int(m) for m in re.findall(r'(?:^|\s)(\d+)\s+\d+\.\d{6}\s+\d+\.\d{6}\s', out)]
    assert shown == [0, 1, 2], shown
    assert learn.progress is bar and not hasattr(bar, 'mbar') and not [o for o in learn.cbs if isinstance(o, OneDisplay)]
    learn.fit(1)
    assert 'soft_loss' not in capsys.readouterr().out

def test_trackers_see_a_fit_per_stage():
    learn = quiet(learner(SaveModelCallback(monitor='accuracy', fname='best')), [Stage(2, LsrKD(), lr=.1), Stage(2, lr=.1)])
    assert (Path('models')/'best.pth').exists() and len(learn.recorder.values) == 4

def test_an_interrupt_leaves_the_learner_as_it_was():
    class Break(Callback):
        run_valid = False
        def after_batch(self):
            if len(self.recorder.lrs) == 9: raise KeyboardInterrupt
    learn = learner()
    own = learn.loss_func,learn.opt_func,learn.dls,learn.progress,learn.logger
    with pytest.raises(KeyboardInterrupt): learn.fit_stages([Stage(1, LsrKD()), Stage(1, [MixUp(), TfKDReg()], loss_func=LabelSmoothingCrossEntropyFlat(), bs=4)], cbs=Break())
    assert (learn.loss_func, learn.opt_func, learn.dls, learn.progress, learn.logger) == own
    assert [o.name for o in learn.metrics] == ['accuracy'] and not [o for o in learn.cbs if isinstance(o, (Distill, MixUp, Break))]
    learn.fit(1)


# ---------------------------------------------------------------- going on after an interrupt

class Die(Callback):
    "Interrupt at a place of the training, counted in batches or epochs of all stages"
    order = 2000
    def __init__(self, batch=None, epochs=None): self.batch,self.epochs = batch,epochs
    def after_batch(self):
        if self.training and self.batch == len(self.recorder.lrs): raise KeyboardInterrupt
    def after_epoch(self):
        if self.epochs == len(self.recorder.values): raise KeyboardInterrupt

def teach(step): return step.xb[0] @ torch.linspace(-1, 1, 6*K).view(6, K)
def better(step): return 2*step.xb[0][:,:K]

def stages(equal=False):
    "Three stages; `equal`: alike in all that a checkpoint compares"
    if equal: return [Stage(2, WSL(teach), lr=(.2, .01)), Stage(2, WSL(better), lr=(.1, .001))]
    return [Stage(2, [WSL(teach), LsrKD(alpha=.1, tau=1.)], lr=(.2, .01), wd=.01), Stage(1, MemoryReplay(2, interval_steps=4), lr=.05, new_opt=False),
            Stage(2, CKM(better), lr=(.1, .001), wd=0., opt_func=partial(OptimWrapper, opt=torch.optim.Adam), bs=16)]

def state(learn):
    r = learn.recorder
    return ({k: v.clone() for k,v in learn.model.state_dict().items()}, [float(o) for o in r.losses], r.lrs, r.iters, str(r.values), list(r.metric_names))

def train(path, *cbs, equal=False, **kwargs):
    learn = learner(opt_func=partial(SGD, mom=.9), **kwargs)
    try: quiet(learn, stages(equal), cbs=[Checkpoint(path), *cbs])
    except KeyboardInterrupt: return None
    return learn

def same(a, b):
    (w,*x),(v,*y) = state(a),state(b)
    assert all(torch.equal(w[k], v[k]) for k in w)
    for name,p,q in zip(('losses', 'lrs', 'iters', 'values', 'names'), x, y): assert p == q, name

@pytest.mark.parametrize('equal', [False, True])
@pytest.mark.parametrize('where', [dict(batch=1), dict(batch=8), dict(epochs=1), dict(epochs=2), dict(batch=13), dict(epochs=3), dict(batch=19), dict(batch=20), dict(epochs=4), dict(epochs=5)], ids=str)
def test_resumed_in_any_stage_it_is_the_same_training(where, equal, tmp_path):
    whole = train(tmp_path/'whole.pt', equal=equal)
    assert train(tmp_path/'broken.pt', Die(**where), equal=equal) is None or where == dict(epochs=5) and equal
    same(train(tmp_path/'broken.pt', equal=equal), whole)

def test_interrupted_in_every_stage(tmp_path):
    whole = train(tmp_path/'whole.pt')
    for where in (dict(batch=3), dict(batch=9), dict(batch=15), dict(epochs=3), dict(batch=20)): assert train(tmp_path/'broken.pt', Die(**where)) is None
    same(train(tmp_path/'broken.pt'), whole)

@pytest.mark.parametrize('equal', [False, True])
def test_the_same_checkpoint_object_goes_on_too(equal, tmp_path):
    "As in a notebook, where the cell is run again"
    whole = train(tmp_path/'whole.pt', equal=equal)
    learn,checkpoint = learner(opt_func=partial(SGD, mom=.9)),Checkpoint(tmp_path/'broken.pt')
    for batch in (4, 15):
        with pytest.raises(KeyboardInterrupt): quiet(learn, stages(equal), cbs=[checkpoint, Die(batch=batch)])
    quiet(learn, stages(equal), cbs=checkpoint)
    same(learn, whole)

def test_a_finished_training_is_loaded(tmp_path):
    whole = train(tmp_path/'a.pt')
    log = Watch()
    again = train(tmp_path/'a.pt', log)
    assert not log.rows
    same(again, whole)

def test_a_checkpoint_of_other_stages_is_refused(tmp_path):
    train(tmp_path/'a.pt')
    with pytest.raises(ValueError, match='belongs to another training'):
        quiet(learner(opt_func=partial(SGD, mom=.9)), [Stage(3, [WSL(teach), LsrKD(alpha=.1, tau=1.)])], cbs=Checkpoint(tmp_path/'a.pt'))

def test_a_resumed_call_says_nothing_of_our_own_callbacks(tmp_path, capsys, recwarn):
    "What they hold is of one call, and the stages before pass again"
    with pytest.raises(KeyboardInterrupt): learner().fit_stages(stages(), cbs=[Checkpoint(tmp_path/'a.pt'), Die(batch=9)])
    learner().fit_stages(stages(), cbs=Checkpoint(tmp_path/'a.pt'))
    assert re.findall('a.pt: (.*)', capsys.readouterr().out) == ['continuing after epoch 1 of 2']
    assert [str(w.message) for w in recwarn if 'could not keep' in str(w.message)] == []
