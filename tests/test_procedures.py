"Procedures on `Learner`: replayed step by step, resumed, and held against what they are made of"
import json, threading, time, warnings
from copy import deepcopy
from functools import partial

import pytest, torch
import torch.nn.functional as F
import matplotlib
matplotlib.use('agg')
from matplotlib import pyplot as plt
from fastai.basics import SGD, Adam, Callback, CancelFitException, CrossEntropyLossFlat, DataLoader, DataLoaders, Learner, accuracy
from fastai.callback.all import GradientClip, MixUp
from fastai.callback.progress import ProgressCallback
from fastai.optimizer import OptimWrapper
from torch import nn

import fastkdtf.lab.defective
import fastkdtf.lab.training
from fastkdtf.lab.defective import PoorTeacher, PoorTeachers
from fastkdtf.callback.distill import KnowledgeDistillation, LsrKD
from fastkdtf.lab.compare import compare
from fastkdtf.lab.procedures import Taught, teacher_accuracy
from fastkdtf.lab.report import Comparison, comparisons, read_runs
from fastkdtf.files import run_lock
from fastkdtf.callback.checkpoint import seed_run
from fastkdtf.teachers.network import EnsembleTeacher, NetworkTeacher
from fastkdtf.teachers.base import UniformTeacher
from fastkdtf.lab.one_run import BatchDraws, LearnerParts, StepDraws
from fastkdtf.lab.training import Arm, Campaign

torch.set_num_threads(1)
K,N_BATCH = 3,3


# ---------------------------------------------------------------- data, networks, learners

def tiny_dls(test=True):
    "48 training, 24 validation and 30 test samples of 6 numbers; the label follows from them, with noise"
    gen = torch.Generator().manual_seed(0)
    x = torch.randn(102, 6, generator=gen)
    y = (x[:,:3] + .8*torch.randn(102, 3, generator=gen)).argmax(1)
    items = [(a, int(c)) for a,c in zip(x, y)]
    train = DataLoader(items[:48], bs=16, shuffle=True, drop_last=True, num_workers=0)
    dls = DataLoaders(train, *[DataLoader(o, bs=20, num_workers=0) for o in [items[48:72]] + [items[72:]]*test], device='cpu')
    dls.c,dls.vocab = K,['a', 'b', 'c']
    return dls

def net(): return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, K))

def learner(dls=None, model=None, seed=3, **kwargs):
    torch.manual_seed(seed)
    return Learner(dls or tiny_dls(), model or net(), **{'loss_func': CrossEntropyLossFlat(), 'lr': .02, **kwargs}).remove_cb(ProgressCallback)

def weak_net(seed=7):
    torch.manual_seed(seed)
    return nn.Linear(6, K)

def weights(model): return {k: v.clone() for k,v in model.state_dict().items()}
def same(a, b): return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
def numbers(record): return json.loads(json.dumps({k: record[k] for k in ('last', 'best', 'history')}).replace('NaN', 'null'))
def by_run(c): return {(r['method'], r['seed']): numbers(r) for r in c.records}
def lines(out): return [json.loads(o) for o in (out/'results.jsonl').read_text().splitlines()]

@pytest.fixture(autouse=True)
def no_plots(no_drawing, monkeypatch): monkeypatch.setattr(Taught, 'plot_teachers', lambda self: plt.figure(figsize=(1, 1)))

class Forbidden(Exception): pass
def forbidden(*args, **kwargs): raise Forbidden


# ---------------------------------------------------------------- Tf-KD_self

class Log(Callback):
    "Writes down every training batch, a list for each fit"
    fits = []
    def before_fit(self):
        if not self.lock.locked(): Log.fits.append([])
    def before_batch(self):
        if self.training: Log.fits[-1].append((self.x.clone(), self.y.clone()))

def sgd(model, batches, lr, loss):
    for x,y in batches:
        model.train().zero_grad()
        loss(model(x), x, y).backward()
        with torch.no_grad():
            for p in model.parameters(): p -= lr*p.grad
    return model

@pytest.mark.parametrize('alpha,tau,scale,factor', [(.9, 4., 'tau2', 16.), (.1, 20., 'tau2', 400.), (.5, 2., 1, 1.)])
def test_tf_kd_self_step_by_step(alpha, tau, scale, factor):
    Log.fits = []
    learn = learner(opt_func=SGD, cbs=Log, lr=.05)
    start = deepcopy(learn.model)
    learn.fit_tf_kd_self(2, fit='fit', alpha=alpha, tau=tau, scale=scale, teacher='last', controls=False)
    first,second = Log.fits
    assert len(first) == len(second) == 2*N_BATCH and all(torch.equal(a[0], b[0]) for a,b in zip(first, second)), 'the student sees the batches of its teacher'
    teacher = sgd(deepcopy(start), first, .05, lambda z, x, y: F.cross_entropy(z, y)).eval()
    def kd(z, x, y):
        with torch.no_grad(): t = (teacher(x)/tau).softmax(1)
        kl = (t*(t.log() - (z/tau).log_softmax(1))).sum(1).mean()
        return (1-alpha)*F.cross_entropy(z, y) + alpha*factor*kl
    student = sgd(deepcopy(start), second, .05, kd)
    for k,v in student.state_dict().items(): torch.testing.assert_close(learn.model.state_dict()[k], v, rtol=1e-5, atol=1e-5)
    assert learn.opt is None and not same(weights(teacher), weights(learn.model))

def test_what_tf_kd_self_gives(tmp_path, draws):
    learn = learner()
    c = learn.fit_tf_kd_self(2, seeds=[4, 1], controls=True, out=tmp_path)
    assert c.names == ['baseline', 'Tf-KD_self', 'CE ×3.7', 'twice as long'] and list(c.table.seeds) == [2]*4
    assert c.control_for('CE ×3.7') == c.control_for('twice as long') == ['Tf-KD_self'] and c.controls('Tf-KD_self') == ['CE ×3.7', 'twice as long']
    for seed in (4, 1):
        base,student = (next(r for r in c.runs(n) if r['seed'] == seed) for n in ('baseline', 'Tf-KD_self'))
        assert student['teacher_accuracy'] == base['best']['accuracy'], 'the teacher is the best on validation'
        assert ['teacher from', 'best weights of baseline'] in student['description'] and ['scale of the loss', '3.7'] in student['description'] and base['description'] == []
    assert 'teacher acc %' in c.shown and c.table.teacher['Tf-KD_self'] == pytest.approx(sum(r['best']['accuracy'] for r in c.runs('baseline'))/2)
    for o in ('table.csv', 'accuracy.png', 'curves.png', 'teachers.png', 'report.html'): assert (tmp_path/o).exists(), o
    assert 'Tf-KD_self' in (tmp_path/'report.html').read_text()
    z,y = learn.get_preds(ds_idx=2, act=lambda x: x)
    assert accuracy(z, y).item() == next(r for r in c.runs('Tf-KD_self') if r['seed'] == 1)['last']['accuracy'], 'the learner holds the student of the last seed'
    read, = comparisons(read_runs(tmp_path))
    assert sorted(read.names) == sorted(c.names) and len(read.records) == 8, 'seeds of one method stay together'
    learn.fit(1)

def test_tf_kd_self_trains_two_networks_unless_asked_for_more(capsys):
    learn = learner()
    c = learn.fit_tf_kd_self(2)
    assert c.names == ['baseline', 'Tf-KD_self'] and '2 trainings of 2 epochs: baseline, Tf-KD_self' in capsys.readouterr().out

@pytest.mark.parametrize('found', [False, True])
def test_the_recorder_holds_the_last_training(tmp_path, found):
    "Batch by batch where the student was trained now; epoch by epoch where it was found"
    if found: learner().fit_tf_kd_self(2, seeds=[4, 1], out=tmp_path)
    learn = learner()
    c = learn.fit_tf_kd_self(2, seeds=[4, 1], out=tmp_path)
    history = next(r for r in c.runs('Tf-KD_self') if r['seed'] == 1)['history']
    assert [list(map(float, row)) for row in learn.recorder.values] == [list(row) for row in zip(*history.values())]
    assert [name for name in learn.recorder.metric_names if name not in ('epoch', 'time')] == list(history)
    assert len(learn.recorder.losses) == len(learn.recorder.lrs) == (0 if found else 2*len(learn.dls.train))
    learn.fit(1)

def test_seeds_start_from_the_same_or_from_fresh_weights():
    class Start(Callback):
        seen = []
        def before_fit(self):
            if not self.lock.locked(): Start.seen.append(weights(self.model))
    go = lambda **kw: learner(cbs=Start).fit_tf_kd_self(1, seeds=2, controls=False, **kw)
    held = weights(learner().model)
    go()
    assert len(Start.seen) == 4 and all(same(o, held) for o in Start.seen)
    Start.seen = []
    go(model_fn=net)
    a,b,c,d = Start.seen
    assert same(a, b) and same(c, d) and not same(a, c) and not same(a, held)

def test_alpha_0_is_the_baseline():
    learn = learner()
    c = learn.fit_tf_kd_self(2, alpha=0., seeds=2, controls=True, model_fn=net)
    for base,student in zip(c.runs('baseline'), c.runs('Tf-KD_self')):
        assert student['last'] == base['last'] and student['best'] == base['best']
        assert all(student['history'][k] == v for k,v in base['history'].items())

def test_twice_as_long_is_fit_twice():
    start = learner()
    c = learner(model=deepcopy(start.model)).fit_tf_kd_self(2, seeds=[5], controls=True, teacher='last')
    dls = tiny_dls()
    learn = learner(dls, deepcopy(start.model), metrics=accuracy)
    with learn.no_logging():
        seed_run(5, dls)
        learn.fit_one_cycle(2)
        learn.opt = None
        first = [float(v[1]) for v in learn.recorder.values]
        seed_run(5+2**31, dls)   # other batches than the first time
        learn.fit_one_cycle(2)
    assert first == c.runs('baseline')[0]['history']['valid_loss']
    assert [float(v[1]) for v in learn.recorder.values] == c.runs('twice as long')[0]['history']['valid_loss']

def test_best_teacher_is_the_best_epochs(tmp_path):
    learn = learner()
    c = learn.fit_tf_kd_self(3, out=tmp_path, controls=False)
    base = c.runs('baseline')[0]
    kept = torch.load(tmp_path/'weights'/'best'/(base['key'].rsplit('/', 1)[1]+'.pt'), weights_only=True)
    model = net()
    model.load_state_dict(kept)
    assert teacher_accuracy(model, learn) == base['best']['accuracy']

def test_without_a_test_set():
    dls = tiny_dls(test=False)
    c = learner(dls).fit_tf_kd_self(1)
    assert c.records[0]['evaluated_on'] == 'validation' and c.runs('Tf-KD_self')[0]['teacher_accuracy'] == c.runs('baseline')[0]['best']['valid_accuracy']
    poor = learner(dls).poor_teachers(1, at_epochs=[1])
    assert poor[0].accuracy is None and poor.shown['test acc %'].tolist() == ['–']
    learner(dls).defective_kd(poor, 1, controls=False)


# ---------------------------------------------------------------- what a run is made of

def test_the_learners_own_settings():
    "Loss, optimizer, splitter, decay, momenta, callbacks: a baseline is what the learner itself would have trained"
    splitter = lambda m: [list(m[0].parameters()), list(m[1:].parameters())]
    args = dict(loss_func=CrossEntropyLossFlat(weight=torch.tensor([1., 2., 3.])), opt_func=partial(OptimWrapper, opt=torch.optim.SGD), splitter=splitter, wd=.1, moms=(.9, .8, .9), wd_bn_bias=True, lr=.1)
    c = learner(cbs=[GradientClip(.1), MixUp(.4)], **args).reversed_kd(weak_net(), 2, controls=False)
    dls = tiny_dls()
    learn = learner(dls, metrics=accuracy, cbs=[GradientClip(.1), MixUp(.4)], **args)
    seed_run(0, dls)
    draws = BatchDraws(0)
    with learn.no_logging(): learn.fit_one_cycle(2, cbs=[draws, StepDraws(draws)])
    assert [float(v[1]) for v in learn.recorder.values] == c.runs('baseline')[0]['history']['valid_loss']
    keys = {learner(**{**args, **kw}).reversed_kd(weak_net(), 1, controls=False).records[0]['key'] for kw in ({}, dict(wd=.2), dict(moms=(.8, .7, .8)), dict(cbs=GradientClip(.1)), dict(cbs=GradientClip(.2)), dict(loss_func=CrossEntropyLossFlat()), dict(seed=4))}
    assert len(keys) == 7

@pytest.mark.parametrize('go', [lambda o: o.reversed_kd(weak_net(), 1), lambda o: o.poor_teachers(1, at_epochs=[1]), lambda o: o.defective_kd([weak_net()], 1)])
def test_the_learner_stays_as_it_is(go):
    own = GradientClip(.1)
    learn = learner(cbs=own)
    before,cbs = weights(learn.model),list(learn.cbs)
    go(learn)
    assert same(weights(learn.model), before) and list(learn.cbs) == cbs and own.learn is learn and learn.opt is None

def test_a_method_of_the_learners_own_is_kept():
    c = learner(cbs=LsrKD()).reversed_kd(weak_net(), 1, alpha=.5, controls=False)
    assert 'base_loss' in c.runs('baseline')[0]['history'] and {'lsr_kd_loss', 'knowledge_distillation_loss'} <= c.runs('Re-KD')[0]['history'].keys()


# ---------------------------------------------------------------- Re-KD

@pytest.mark.parametrize('kw', [dict(), dict(alpha=.3, tau=2., scale=1), dict(variant='official', multiplier=5.)])
def test_reversed_kd_is_compare_with_knowledge_distillation(kw):
    weak = weak_net()
    c = learner().reversed_kd(weak, 2, seeds=2, model_fn=net, **kw)
    d = compare({'Re-KD': lambda: KnowledgeDistillation(weak, **kw)}, tiny_dls(), net, 2, seeds=2, lr=.02, loss_func=CrossEntropyLossFlat())
    assert c.names == d.names and by_run(c) == by_run(d)

def test_teacher_accuracy():
    learn,weak = learner(),weak_net()
    x,y = (torch.stack([torch.as_tensor(o[i]) for o in learn.dls.loaders[2].dataset]) for i in (0, 1))
    expected = (weak(x).argmax(1) == y).float().mean().item()
    assert teacher_accuracy(weak, learn) == pytest.approx(expected)
    assert teacher_accuracy(EnsembleTeacher([weak, deepcopy(weak)]), learn) == pytest.approx(expected)
    turned = nn.Sequential(weak, nn.Linear(3, 3, bias=False))
    turned[1].weight.data = torch.eye(3).flip(0)
    assert teacher_accuracy(NetworkTeacher(turned, vocab=['c', 'b', 'a']), learn) == pytest.approx(expected), 'classes are matched by name'
    with pytest.raises(TypeError, match='a teacher must be a network here'): teacher_accuracy(UniformTeacher(), learn)
    with pytest.raises(ValueError, match='does not know'): learn.reversed_kd(NetworkTeacher(weak, vocab=['x', 'y', 'z']), 1)

def test_a_weak_teacher_that_is_not_weak():
    strong = learner(lr=.1)
    with strong.no_logging(): strong.fit(15)
    c = learner(lr=1e-4).reversed_kd(strong, 1)
    assert 'called weak is more accurate' in c.caption and c.table.teacher['Re-KD'] > c.table['last']['baseline']
    poor = nn.Linear(6, K)
    nn.init.zeros_(poor.weight)
    poor.bias.data = torch.tensor([-9., -9., 9.])
    assert 'called weak' not in learner(lr=.05).reversed_kd(poor, 8, controls=False).caption

def test_the_learner_may_teach_itself():
    learn = learner()
    assert learn.reversed_kd(learn, 1, controls=False).runs('Re-KD')[0]['teacher_accuracy'] == teacher_accuracy(deepcopy(learn.model), learn)


# ---------------------------------------------------------------- De-KD

class StopAfter(Callback):
    order = 61   # after the recorder
    def __init__(self, n): self.n = n
    def after_epoch(self):
        if self.epoch+1 == self.n: raise CancelFitException

def test_poor_teachers_are_an_unfinished_training():
    poor = learner().poor_teachers(5, at_epochs=[3, 1], seed=2)
    assert [o.epoch for o in poor] == [1, 3] and [o.asked for o in poor] == [['epoch 1'], ['epoch 3']]
    for o in poor:
        dls = tiny_dls()
        learn = learner(dls, metrics=accuracy)
        seed_run(2, dls)
        with learn.no_logging(): learn.fit_one_cycle(5, cbs=StopAfter(o.epoch))
        assert same(o.weights, weights(learn.model)) and o.valid_accuracy == learn.recorder.values[-1][-1]
        z,y = learn.get_preds(ds_idx=2, act=lambda x: x)
        assert o.accuracy == accuracy(z, y).item() and o.vocab == ['a', 'b', 'c']

def test_poor_teachers_stop_with_the_last(monkeypatch):
    Log.fits = []
    learner(cbs=Log).poor_teachers(5, at_epochs=[2])
    assert [len(o) for o in Log.fits] == [2*N_BATCH]
    assert [o.epoch for o in learner().poor_teachers(at_epochs=[1, 2])] == [1, 2], 'the schedule ends with the last'

def test_poor_teachers_at_accuracies():
    dls = tiny_dls()
    learn = learner(dls, metrics=accuracy, lr=.1, seed=6)
    seed_run(1, dls)
    with learn.no_logging(): learn.fit_one_cycle(6)
    accs = [float(v[-1]) for v in learn.recorder.values]
    aim = max(accs)
    first = accs.index(aim)+1
    assert 1 < first and accs[0] > accs[0]/2 > 0
    poor = learner(lr=.1, seed=6).poor_teachers(6, at_epochs=[1], at_accuracies=[aim, accs[0]/2], seed=1)
    assert [(o.epoch, o.valid_accuracy) for o in poor] == [(1, accs[0]), (first, aim)]
    assert poor[0].asked == ['epoch 1', f'{100*accs[0]/2:g} %'] and poor.missing == []
    with pytest.warns(UserWarning, match='never reached on validation in 6 epochs: 100 %'): poor = learner(lr=.1, seed=6).poor_teachers(6, at_epochs=[], at_accuracies=[aim, 1.], seed=1)
    assert [o.epoch for o in poor] == [first] and poor.missing == [1.] and 'Never reached on validation: 100 %' in poor.caption

def test_poor_teachers_save_and_load(tmp_path):
    poor = learner().poor_teachers(3, at_epochs=[1, 3])
    poor.save(tmp_path/'new'/'folder')
    again = PoorTeachers.load(tmp_path/'new'/'folder', net)
    assert repr(again) == repr(poor) and [o.identity for o in again] == [o.identity for o in poor] and all(isinstance(o, PoorTeacher) for o in again)
    assert '43' in poor._repr_html_() or 'taken for' in poor._repr_html_()
    with pytest.raises(ValueError, match='epoch1.pt is damaged, or no weights of this Linear'): PoorTeachers.load(tmp_path/'new'/'folder', weak_net)
    (tmp_path/'new'/'folder'/'epoch3.pt').write_bytes(b'nonsense')
    with pytest.raises(ValueError, match='epoch3.pt is damaged'): PoorTeachers.load(tmp_path/'new'/'folder', net)
    with pytest.raises(FileNotFoundError, match='teachers.json'): PoorTeachers.load(tmp_path, net)

def test_poor_teachers_resume(tmp_path, monkeypatch):
    expected = learner().poor_teachers(4, at_epochs=[1, 3])
    for at in (2, 2*N_BATCH+2, 2):
        Fragile.at,Fragile.seen = at,0
        with pytest.raises(RuntimeError, match='interrupted'): learner(model=Fragile()).poor_teachers(4, at_epochs=[1, 3], out=tmp_path)
    Fragile.at = None
    poor = learner(model=Fragile()).poor_teachers(4, at_epochs=[1, 3], out=tmp_path)
    for a,b in zip(poor, expected): assert same({k.removeprefix('net.'): v for k,v in a.weights.items()}, b.weights) and (a.epoch, a.accuracy) == (b.epoch, b.accuracy)
    assert len(list(tmp_path.glob('*.pt'))) == 2 and not list(tmp_path.glob('unfinished*.pt'))
    monkeypatch.setattr(fastkdtf.lab.defective, 'train_run', forbidden)
    again = learner(model=Fragile()).poor_teachers(4, at_epochs=[1, 3], out=tmp_path)
    assert repr(again) == repr(poor)
    with pytest.raises(ValueError, match='teachers of another training'): learner(model=Fragile()).poor_teachers(4, at_epochs=[1, 2], out=tmp_path)

def test_defective_kd(tmp_path):
    poor = learner().poor_teachers(3, at_epochs=[1, 3])
    c = learner().defective_kd(poor, 2, seeds=2, out=tmp_path)
    assert c.names == ['baseline', 'De-KD epoch 1', 'De-KD epoch 3', 'CE ×3.7'] and c.control_for('CE ×3.7') == c.names[1:3]
    assert [c.teacher_accuracies(o) for o in c.names[1:3]] == [[o.accuracy]*2 for o in poor]
    d = learner().defective_kd({'first': poor[0].model, 'weak': weak_net()}, 2, seeds=2, controls=False)
    assert d.names == ['baseline', 'first', 'weak'] and by_run(d)['first', 0] == by_run(c)['De-KD epoch 1', 0]

def test_plot_teachers(monkeypatch):
    monkeypatch.undo()
    c = learner().defective_kd([weak_net(0), weak_net(1)], 1, seeds=2)
    ax = c.plot_teachers()
    dots = sorted(tuple(o) for s in ax.collections[:1] for o in s.get_offsets().tolist())
    assert sorted(tuple(round(v, 4) for v in o) for o in dots) == sorted((round(100*r['teacher_accuracy'], 4), round(100*r['last']['accuracy'], 4)) for r in c.runs('De-KD teacher 1'))
    assert {o.get_text() for o in ax.get_legend().get_texts()} == {'baseline', 'CE ×3.7', 'student, mean ± sd'}
    plt.close('all')


# ---------------------------------------------------------------- interrupts, several processes, files

class Fragile(nn.Module):
    "Raises at one training batch, counted over all trainings"
    at,seen = None,0
    def __init__(self):
        super().__init__()
        torch.manual_seed(3)
        self.net = net()
    def forward(self, x):
        if self.training:
            Fragile.seen += 1
            if Fragile.seen == Fragile.at: raise RuntimeError('interrupted')
        return self.net(x)

def self_train(out=None, **kw):
    learn = learner(model=Fragile())
    return learn,learn.fit_tf_kd_self(2, seeds=2, out=out, **{"controls": True, **kw})

@pytest.fixture(scope='module')
def expected():
    Fragile.at = None
    with pytest.MonkeyPatch.context() as m:
        return by_run(self_train()[1])

RUN = 2*N_BATCH   # batches
@pytest.mark.parametrize('at', [[2], [RUN+1], [RUN+4, N_BATCH+1], [3*RUN+2], [4*RUN+5, RUN+1]])
def test_resumed_after_an_exception(tmp_path, expected, at):
    for n in at:
        Fragile.at,Fragile.seen = n,0
        learn = learner(model=Fragile())
        before = weights(learn.model)
        with pytest.raises(RuntimeError, match='interrupted'): learn.fit_tf_kd_self(2, seeds=2, controls=True, out=tmp_path)
        assert same(weights(learn.model), before)
    Fragile.at,Fragile.seen = None,0
    learn,c = self_train(tmp_path)
    assert by_run(c) == expected and {(r['method'], r['seed']): numbers(r) for r in lines(tmp_path)} == expected
    assert not list((tmp_path/'unfinished').glob('*.pt')) and len(list((tmp_path/'weights').glob('*/*.pt'))) == 4
    if at == [RUN+1]: assert Fragile.seen == 7*RUN, 'the teacher was not trained again'
    z,y = learn.get_preds(ds_idx=2, act=lambda x: x)
    assert accuracy(z, y).item() == c.runs('Tf-KD_self')[-1]['last']['accuracy']

def test_finished_is_finished(tmp_path, monkeypatch):
    Fragile.at = None
    first,c = self_train(tmp_path)
    before = (tmp_path/'results.jsonl').read_bytes()
    monkeypatch.setattr(fastkdtf.lab.training, 'train_run', forbidden)
    again,d = self_train(tmp_path)
    assert (tmp_path/'results.jsonl').read_bytes() == before and repr(c) == repr(d) and same(weights(first.model), weights(again.model))

def test_lost_and_damaged_weights(tmp_path):
    Fragile.at = None
    first,c = self_train(tmp_path, controls=False)
    before = (tmp_path/'results.jsonl').read_bytes()
    files = {r['method']: tmp_path/'weights'/{'baseline': 'best', 'Tf-KD_self': 'last'}[r['method']]/(r['key'].rsplit('/', 1)[1]+'.pt') for r in c.records if r['seed'] == 1}
    files['Tf-KD_self'].unlink()
    again,_ = self_train(tmp_path, controls=False)
    assert (tmp_path/'results.jsonl').read_bytes() == before and same(weights(first.model), weights(again.model))
    files['Tf-KD_self'].unlink()
    files['baseline'].write_bytes(files['baseline'].read_bytes()[:100])
    with pytest.raises(ValueError, match='the weights of baseline, is damaged: delete it'): self_train(tmp_path, controls=False)
    files['baseline'].unlink()
    again,_ = self_train(tmp_path, controls=False)
    assert (tmp_path/'results.jsonl').read_bytes() == before and same(weights(first.model), weights(again.model))

def test_last_and_best_teachers_in_one_folder(tmp_path):
    "The baseline is one run with two sets of weights"
    go = lambda teacher, out=None: learner(lr=.3).fit_tf_kd_self(4, seeds=[2], teacher=teacher, out=out, controls=False)
    alone = {o: by_run(go(o)) for o in ('best', 'last')}
    assert alone['best']['Tf-KD_self', 2] != alone['last']['Tf-KD_self', 2], 'the best is not the last here'
    assert {o: by_run(go(o, tmp_path)) for o in alone} == alone
    assert [r['method'] for r in lines(tmp_path)] == ['baseline', 'Tf-KD_self', 'Tf-KD_self']
    assert Taught(read_runs(tmp_path)[:2]).names == ['baseline', 'Tf-KD_self']

def test_a_teacher_that_another_process_trains(tmp_path, expected):
    "What does not need it goes on; then it is waited for"
    Fragile.at = None
    key = next(k for r in [learner(model=Fragile()).fit_tf_kd_self(2, seeds=2, controls=False)] for k in [r.runs('baseline')[0]['key']])
    claimed,release,released = threading.Event(),threading.Event(),[]
    def other():
        with run_lock(tmp_path/'unfinished'/(key.rsplit('/', 1)[1]+'.pt')) as mine:
            assert mine
            claimed.set()
            released.append(release.wait(30))
    thread = threading.Thread(target=other)
    thread.start()
    assert claimed.wait(10)
    def let_go():
        ledger = tmp_path/'results.jsonl'
        while not ledger.exists() or ledger.read_bytes().count(b'\n') < 5: time.sleep(.02)   # a line may be half written
        release.set()
    threading.Thread(target=let_go, daemon=True).start()
    c = self_train(tmp_path)[1]
    thread.join()
    assert released == [True]
    order = [(r['method'], r['seed']) for r in lines(tmp_path)]
    assert by_run(c) == expected and order[0] == ('CE ×3.7', 0) and order.index(('baseline', 0)) == 5 and len(order) == 8

def test_keys_of_dependent_runs():
    "They change with the run that they depend on, and with which of its weights"
    def keys(method=None, keep='last', kd=KnowledgeDistillation):
        arms = {'baseline': Arm(method, keep=keep), 'taught': Arm(kd, teacher='baseline'), 'on': Arm(start='baseline')}
        return {k[0]: r.key for k,r in Campaign(arms, LearnerParts(tiny_dls(), net, partial(Learner, loss_func=CrossEntropyLossFlat())), 1, seeds=1).runs.items()}
    plain,other,best = keys(),keys(LsrKD),keys(keep='best')
    assert keys() == plain and all(plain[k] != other[k] for k in plain)
    assert best['baseline'] == plain['baseline'] and best['taught'] != plain['taught'] and best['on'] != plain['on']
    assert keys(kd=partial(KnowledgeDistillation, tau=2.))['taught'] != plain['taught']
    weak = [learner().reversed_kd(weak_net(i), 1, controls=False).records[1]['key'] for i in (0, 1, 0)]
    assert weak[0] == weak[2] != weak[1]


# ---------------------------------------------------------------- bad input

@pytest.mark.parametrize('call,error,message', [
    (lambda o: o.fit_tf_kd_self(0), ValueError, 'n_epoch'), (lambda o: o.fit_tf_kd_self(1.5), TypeError, 'n_epoch'), (lambda o: o.fit_tf_kd_self(1, seeds=0), ValueError, 'seeds'),
    (lambda o: o.fit_tf_kd_self(1, teacher='first'), ValueError, 'teacher'), (lambda o: o.fit_tf_kd_self(1, alpha=2.), ValueError, 'alpha'), (lambda o: o.fit_tf_kd_self(1, fit='train'), ValueError, 'fit'),
    (lambda o: o.fit_tf_kd_self(1, lr=-1.), ValueError, 'lr'), (lambda o: o.fit_tf_kd_self(1, model_fn=net()), TypeError, 'model_fn must be a function'),
    (lambda o: o.fit_tf_kd_self(1, model_fn=weak_net), ValueError, "model_fn must make a network like the learner's own"),
    (lambda o: o.reversed_kd(3, 1), TypeError, 'teacher'), (lambda o: o.reversed_kd('no/such/file.pkl', 1), FileNotFoundError, 'no such file'), (lambda o: o.reversed_kd(UniformTeacher(), 1), TypeError, 'must be a network'),
    (lambda o: o.reversed_kd(nn.Linear(6, 5), 1), ValueError, '5|classes'),
    (lambda o: o.poor_teachers(10), ValueError, 'at_epochs has 50, which is beyond n_epoch=10'), (lambda o: o.poor_teachers(at_epochs=[0]), ValueError, 'at_epochs'),
    (lambda o: o.poor_teachers(at_epochs=3), TypeError, 'at_epochs must be a list'), (lambda o: o.poor_teachers(3, at_epochs=[]), ValueError, 'both empty'),
    (lambda o: o.poor_teachers(at_epochs=[], at_accuracies=[.5]), ValueError, 'n_epoch is needed'), (lambda o: o.poor_teachers(3, [1], [50.]), ValueError, 'at_accuracies'),
    (lambda o: o.poor_teachers(3, [1], fit='fine_tune'), ValueError, 'two trainings'), (lambda o: o.poor_teachers(0, [1]), ValueError, 'beyond n_epoch|n_epoch'),
    (lambda o: o.defective_kd([], 1), ValueError, 'teachers is empty'), (lambda o: o.defective_kd({}, 1), ValueError, 'teachers is empty'), (lambda o: o.defective_kd(weak_net(), 1), TypeError, 'teachers must be a list'),
    (lambda o: o.defective_kd([PoorTeacher(weak_net(), 1, .5)]*2, 1), ValueError, "two teachers are called 'De-KD epoch 1'"), (lambda o: o.defective_kd([3], 1), TypeError, 'teacher'),
    (lambda o: o.poor_teachers(1, [1], out=__file__), ValueError, 'out must be a folder'), (lambda o: o.reversed_kd(weak_net(), 1, out=__file__), ValueError, 'out must be a folder')])
def test_bad_input(call, error, message, monkeypatch):
    monkeypatch.setattr(fastkdtf.lab.training, 'train_run', forbidden)
    monkeypatch.setattr(fastkdtf.lab.defective, 'train_run', forbidden)
    with pytest.raises(error, match=message): call(learner())

def test_an_optimizer_of_this_very_network():
    model = net()
    learn = learner(model=model, opt_func=OptimWrapper(opt=torch.optim.SGD(model.parameters(), lr=.1)))
    with pytest.raises(ValueError, match='opt_func is an optimizer of this very network'): learn.reversed_kd(weak_net(), 1)
