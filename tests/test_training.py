"Campaigns: arms with their own network, schedule and stages; what a run's record says of time"
import json, shutil, time
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from fastai.callback.core import Callback
from fastai.data.core import DataLoader, DataLoaders
from fastai.learner import Learner
from fastai.metrics import accuracy
from fastai.torch_core import set_seed
from torch import nn

from fastkdtf.callback.distill import Distill, KnowledgeDistillation, LsrKD, TfKDReg
from fastkdtf.lab.compare import compare
from fastkdtf.callback.checkpoint import seed_run
from fastkdtf.callback.stages import Stage
from fastkdtf.teachers.network import NetworkTeacher
from fastkdtf.lab.learners import learner_maker
from fastkdtf.lab.report import comparisons, read_runs
from fastkdtf.lab.runs import Run, work
from fastkdtf.vision.cifar_nets import BasicBlock, CifarResNet
from fastkdtf.vision.data import kd_dataloaders
from fastkdtf.lab.one_run import LearnerParts, make_callbacks, train_run
from fastkdtf.lab.training import Campaign, Arm, method_identity
from fastkdtf.callback.twostage import effdstl_stages

pytestmark = pytest.mark.usefixtures('no_drawing')

def loaders(n=48, bs=16, wait=0., seed=0):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(n+32, 6, generator=g)
    y = (x[:,:3].argmax(1))
    class Slow(list):
        def __getitem__(self, i):
            time.sleep(wait)
            return super().__getitem__(i)
    items = Slow(zip(x, y))
    train,valid = Slow(items[:n]),Slow(items[n:])
    dls = DataLoaders(DataLoader(train, bs=bs, shuffle=True, drop_last=True, num_workers=0), DataLoader(valid, bs=32, num_workers=0))
    for dl in dls.loaders: dl.vocab = list('abc')
    dls.c = 3
    return dls

def small(): return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
def large(): return nn.Sequential(nn.Linear(6, 32), nn.ReLU(), nn.Linear(32, 3))
def fit_steadily(learn, n_epoch, lr=1e-2, cbs=None): learn.fit(n_epoch, lr, cbs=cbs)
def learner(*args, **kwargs): return Learner(*args, loss_func=nn.CrossEntropyLoss(), **kwargs)

def parts(model_fn=small, **kwargs): return LearnerParts(loaders(**kwargs), model_fn, learner)
def campaign(arms, **kwargs): return Campaign(arms, parts(), 2, **{**dict(seeds=2), **kwargs})

class Watch(Callback):
    def __init__(self, seen): self.seen = seen
    def before_fit(self): self.seen.append((sum(p.numel() for p in self.model.parameters()), self.n_epoch, float(self.opt.hypers[-1]['lr'])))

def test_an_arm_has_its_own_network_epochs_and_fit():
    c = campaign({'teacher': Arm(keep='best', model_fn=large, n_epoch=3, fit=partial(fit_steadily, lr=.03)),
                  'student': Arm(KnowledgeDistillation, teacher='teacher')}, fit='fit')
    seen = []
    for name in c.arms: c.train(name, 0, cbs=[Watch(seen)])
    assert seen == [(32*6+32+32*3+3, 3, .03), (6*8+8+8*3+3, 2, .001)]
    teacher,student = (c.runs[name, 0].settings for name in c.arms)
    assert (teacher['n_epoch'], teacher['fit'], teacher['n_params']) == (3, 'fit_steadily(lr=0.03)', 323)
    assert (student['n_epoch'], student['fit'], student['n_params']) == (2, 'fit', 83)

def test_a_teacher_is_known_by_its_own_settings_only(tmp_path):
    "The same teacher is found in the folder whoever its student is"
    teacher = Arm(keep='best', model_fn=large, fit=partial(fit_steadily, lr=.03))
    one = campaign({'teacher': teacher, 'a': Arm(KnowledgeDistillation, teacher='teacher')}, out=tmp_path, seeds=1)
    other = Campaign({'teacher': teacher, 'a': Arm(LsrKD)}, parts(partial(nn.Linear, 6, 3)), 2, 1, out=tmp_path)
    assert one.runs['teacher', 0].key == other.runs['teacher', 0].key and one.runs['a', 0].key != other.runs['a', 0].key
    one.run()
    n = len((tmp_path/'results.jsonl').read_text().splitlines())
    other.run()
    assert n == 2 and len((tmp_path/'results.jsonl').read_text().splitlines()) == 3

def test_what_a_teachers_own_learner_says_of_it_is_not_covered_by_the_students_settings():
    arms = {'teacher': Arm(keep='best', make_learner=replace(parts(large), settings=dict(arch='large'))), 'a': Arm(KnowledgeDistillation, teacher='teacher')}
    said = {run.arm: run.settings for run in campaign(arms, seeds=1, settings=dict(data='noise', arch='small')).runs.values()}
    assert {name: (s['data'], s['arch']) for name,s in said.items()} == {'teacher': ('noise', 'large'), 'a': ('noise', 'small')}

@pytest.fixture
def trained(monkeypatch):
    "The arms that are trained, in order"
    names,train = [],Campaign._train
    def noted(self, run, cbs):
        names.append(run.arm)
        return train(self, run, cbs)
    monkeypatch.setattr(Campaign, '_train', noted)
    return names

taught = {'teacher': Arm(keep='best', model_fn=large), 'baseline': Arm(keep='last'), 'student': Arm(KnowledgeDistillation, teacher='teacher', keep='last'),
          'twice as long': Arm(start='baseline')}

def test_where_all_is_finished_lost_weights_are_not_missed(tmp_path, trained):
    first = campaign(taught, out=tmp_path).compare()
    assert trained == [*taught]*2
    trained.clear()
    records = (tmp_path/'results.jsonl').read_bytes()
    shutil.rmtree(tmp_path/'weights')
    again = campaign(taught, out=tmp_path).compare()
    assert not trained and str(again.table.to_csv()) == str(first.table.to_csv()) and (tmp_path/'results.jsonl').read_bytes() == records

def test_lost_weights_are_trained_again_where_a_run_that_is_left_needs_them(tmp_path, trained):
    campaign(taught, seeds=1, out=tmp_path).run()
    student = torch.load(next(f for f in (tmp_path/'weights'/'last').iterdir() if f.stem == campaign(taught, seeds=1).runs['student', 0].digits))
    shutil.rmtree(tmp_path/'weights')
    trained.clear()
    pupil = {**taught, 'pupil': Arm(partial(KnowledgeDistillation, tau=2.), teacher='student')}
    c = campaign(pupil, seeds=1, out=tmp_path)
    records = c.run()
    assert trained == ['teacher', 'student', 'pupil'] and len(records) == 5 == len((tmp_path/'results.jsonl').read_text().splitlines())
    assert all(torch.equal(v, student[k]) for k,v in c.weights('student', 0).items())
    trained.clear()
    shutil.rmtree(tmp_path/'weights')
    whole,without = campaign(pupil, out=tmp_path),campaign(pupil, out=None)
    with pytest.raises(ValueError, match="needs 'teacher'"): without.train('student', 0)
    for o in (whole, without):
        assert all(torch.equal(v, student[k]) for k,v in o.weights('student', 0).items())
        assert trained == ['teacher', 'student']
        trained.clear()

def test_a_run_that_is_trained_again_to_another_end_says_so(tmp_path, trained, recwarn):
    campaign(taught, seeds=1, out=tmp_path).run()
    assert not [o for o in recwarn if 'were gone' in str(o.message)]
    lines = (tmp_path/'results.jsonl').read_text().splitlines()
    shutil.rmtree(tmp_path/'weights')
    c = campaign({**taught, 'pupil': Arm(LsrKD, start='student')}, seeds=1, out=tmp_path)
    c.record(c.runs['student', 0])['last']['accuracy'] = .123   # as another machine might have had it
    with pytest.warns(UserWarning, match='weights of student, seed 0 were gone, and trained again reach accuracy .*, not the 0.123 '): c.run()
    assert (tmp_path/'results.jsonl').read_text().splitlines()[:len(lines)] == lines

def test_a_checkpoint_left_behind_is_deleted_when_its_run_is_found(tmp_path):
    c = campaign({'baseline': Arm()}, seeds=1, out=tmp_path)
    c.run()
    left = tmp_path/'unfinished'/f"{c.runs['baseline', 0].digits}.pt"
    left.write_bytes(b'')
    campaign({'baseline': Arm()}, seeds=1, out=tmp_path).run()
    assert not left.exists()

def test_settings_of_an_arm_tell_its_runs_apart():
    differing = [{}, dict(settings=dict(arch='a')), dict(n_epoch=3), dict(fit='fit'), dict(model_fn=large),
                 dict(fit=partial(fit_steadily, lr=.1)), dict(fit=partial(fit_steadily, lr=.2))]
    keys = [campaign({'baseline': Arm(**o)}).runs['baseline', 0].key for o in differing]
    assert len(set(keys)) == len(keys)
    assert campaign({'baseline': Arm(n_epoch=2, fit='fit_one_cycle', model_fn=small)}).runs['baseline', 0].key == keys[0]

def test_two_teachers():
    seen = []
    def method(*teachers):
        seen.append(teachers)
        return LsrKD()
    arms = {'a': Arm(keep='best'), 'b': Arm(keep='last', model_fn=large), 'student': Arm(method, teacher=('a', 'b'))}
    c = campaign(arms, seeds=1)
    records = c.run()
    assert [type(o.model[0]).__name__ for o in seen[-1]] == ['Linear']*2 and [o.model[0].out_features for o in seen[-1]] == [8, 32]
    for name,keep,t in zip('ab', ('best', 'last'), seen[-1]):
        assert all(torch.equal(v, t.model.state_dict()[k]) for k,v in c.weights(name, 0).items()), (name, keep)
    assert 'teacher_accuracy' not in records[2] and [v for k,v in records[2]['description'] if k == 'teacher from'] == ['best weights of a', 'last weights of b']

def test_stages_as_a_method():
    "A run in stages is the training that `fit_stages` makes"
    stages = lambda: [Stage(1, [LsrKD(tau=1.)], lr=.02), Stage(2, [TfKDReg()], lr=(.05, .001))]
    r = train_run(stages, 3, parts(), 3, keep='last')
    dls = loaders()
    seed_run(3, dls)
    learn = learner(dls, small(), metrics=accuracy)
    seed_run(3, dls)
    with learn.no_bar(), learn.no_logging(): learn.fit_stages(stages(), 3)
    assert all(torch.equal(v, r['weights'][k]) for k,v in learn.model.state_dict().items())
    assert r['history']['accuracy'] == [float(v[2]) for v in learn.recorder.values] and len(r['epoch_seconds']) == len(r['loading_seconds']) == 3

def test_the_best_epoch_of_stages_is_counted_from_the_first():
    class Rise(Callback):
        "Accuracies .1, .2, … in place of those measured"
        order = 61
        def after_epoch(self): self.recorder.values[-1][self.recorder.metric_names.index('accuracy')-1] = .1*len(self.recorder.values)
    r = train_run([Stage(1), Stage(2)], 0, parts(), 3, cbs=[Rise()])
    assert r['best']['epoch'] == 2 and r['best']['valid_accuracy'] == pytest.approx(.3)

def test_compare_takes_stages_beside_callbacks(tmp_path):
    t = NetworkTeacher(large(), teacher_norm=None)
    c = compare({'LsrKD': LsrKD, 'two stages': partial(effdstl_stages, 2, t, stage1=dict(lr=(.1, .01)), stage2=dict(lr=(.01, .001)))}, loaders(), small, 2, seeds=2, fit=fit_steadily, controls=False,
                loss_func=nn.CrossEntropyLoss(), out=tmp_path)
    assert c.names == ['baseline', 'LsrKD', 'two stages'] and len(c.records) == 6
    stages = c.runs('two stages')[0]['callbacks']
    assert [o['callback'] for o in stages] == ['Stage', 'Stage'] and [o['callback'] for o in stages[0]['cbs']] == ['WSL', 'Distill'] and stages[1]['wd'] == 0
    assert [v for k,v in c.runs('two stages')[0]['description'] if k == 'method'][0].startswith('WSL')

def test_identity_of_stages():
    make = lambda **kw: [Stage(1, [LsrKD()], **kw), Stage(1)]
    ids = [method_identity(make()), method_identity(make()), method_identity(make(lr=.1)), method_identity(make(wd=0.)), method_identity([Stage(1, [LsrKD(alpha=.2)]), Stage(1)])]
    assert ids[0] == ids[1] and all(o != ids[0] for o in ids[2:])

def test_callbacks_in_stages_are_fresh():
    stage = Stage(1, [LsrKD()])
    first,second = make_callbacks(stage),make_callbacks([stage])
    assert first[0].cbs[0] is not second[0].cbs[0] and first[0].cbs[0] is not stage.cbs[0] and isinstance(first[0].cbs[0], Distill)

def test_stages_must_fit_the_epochs():
    with pytest.raises(ValueError, match='= 2 epochs, not n_epoch=3'): train_run([Stage(1), Stage(1)], 0, parts(), 3)

def test_waiting_for_batches_is_told_from_training():
    slow,quick = (train_run(None, 0, parts(wait=w), 2) for w in (.01, 0.))
    assert all(w >= .01*48 and w <= s for w,s in zip(slow['loading_seconds'], slow['epoch_seconds']))
    assert sum(quick['loading_seconds']) < sum(slow['loading_seconds'])

def held_weights():
    torch.manual_seed(0)
    return learner_maker(learner(loaders(), small(), metrics=accuracy))

@pytest.mark.parametrize('make', [parts, held_weights])
def test_a_run_is_the_same_whichever_seeds_are_asked_for(make, tmp_path):
    "More seeds, or others, go on in a folder, and all are one comparison"
    def trained(seeds): return [r['key'] for r in Campaign({'baseline': Arm(), 'other': Arm(LsrKD, model_fn=None)}, make(), 1, seeds, out=tmp_path).run()]
    first,more,last = trained([0, 1]),trained([2, 1]),trained([1])
    records = read_runs(tmp_path)
    assert set(first) & set(more) == set(last) and len(records) == 6 and len(comparisons(records)) == 1

def test_what_follows_a_batch_is_not_waiting_for_the_next():
    class Slow(Callback):
        order = 51   # after the recorder
        def after_batch(self): time.sleep(.02)
    record,n = train_run(None, 0, parts(), 2, cbs=[Slow()]),len(loaders().train)
    assert n > 1 and all(waited <= spent-.02*n for waited,spent in zip(record['loading_seconds'], record['epoch_seconds']))

@pytest.mark.parametrize('fit,error,why', [('train', ValueError, 'fit must name a training method'), (3, TypeError, 'fit must be a text or a function, got 3'),
                                           (None, TypeError, 'fit must be a text or a function, got None')])
def test_fits_that_are_none(fit, error, why):
    with pytest.raises(error, match=why): campaign({'a': Arm()}, fit=fit)

def test_train_says_what_is_missing():
    c = campaign({'a': Arm(keep='last'), 'b': Arm(start='a')}, seeds=1)
    assert c.train('b', 0, wait=False) is None
    with pytest.raises(ValueError, match="'b', seed 0, needs 'a', which is not finished"): c.train('b', 0)
    c.train('a', 0)
    assert c.train('b', 0)['method'] == 'b'

def test_runs_of_0_1_0_are_shown_and_never_taken_for_todays(tmp_path):
    "They do not say which images and which code made them, so the same call trains anew beside them"
    written = Path(__file__).parent/'written_by_0_1_0'/'results.jsonl'
    dls = kd_dataloaders('digits', bs=64, train_subset=128)
    net = lambda: CifarResNet(BasicBlock, 1, 10, widths=(4,4,4), stem=4)
    out = tmp_path/'old'
    out.mkdir()
    shutil.copy(written, out)
    c = compare({'LsrKD': LsrKD}, dls, net, 1, seeds=1, out=out)
    old,new = written.read_bytes(),(out/'results.jsonl').read_bytes()
    assert new.startswith(old) and len(new.splitlines()) == 6
    known = {json.loads(line)['key'] for line in old.splitlines()}
    assert len(known) == 3 and known.isdisjoint(r['key'] for r in c.records)
    compare({'LsrKD': LsrKD}, dls, net, 1, seeds=1, out=out)
    assert (out/'results.jsonl').read_bytes() == new

def test_the_key_of_a_run():
    "It changes with all that decides the numbers, and with which weights of which run it uses; what it keeps itself is no part of it"
    first = Run('a', 0, dict(n_epoch=1), keep='last')
    differing = [dict(), dict(seed=1), dict(settings=dict(n_epoch=2)), dict(method=[dict(callback='LsrKD')]),
                 dict(teachers=(first,)), dict(start=first), dict(teachers=(replace(first, keep='best'),)),
                 dict(teachers=(replace(first, seed=1),)), dict(teachers=(first, first))]
    keys = [Run(**{**dict(arm='b', seed=0, settings=dict(n_epoch=1)), **kw}).key for kw in differing]
    assert len(set(keys)) == len(keys) == 9
    assert Run('b', 0, dict(n_epoch=1), keep='best').key == keys[0]
    with pytest.raises(AttributeError): first.seed = 1

def pretend(outcome):
    "A `train` that trains nothing, and the calls it got; `outcome(run, wait)` is a record, None or an error"
    calls = []
    def train(run, wait, cbs):
        calls.append((run.arm, wait))
        if isinstance(done := outcome(run, wait), Exception): raise done
        return done
    return train,calls

def made_up_runs():
    teacher,other = Run('teacher', 0, dict(n_epoch=1), keep='last'),Run('other', 0, dict(n_epoch=1))
    return [teacher, Run('taught', 0, dict(n_epoch=1), teachers=(teacher,)), other]

def test_work_takes_what_is_free_before_it_waits():
    "Another process has the teacher, and is done when it is waited for, or has been while this one was at work"
    for done_meanwhile in (False, True):
        ended = set()
        def outcome(run, wait):
            free = wait or run.arm == 'other' or done_meanwhile and 'other' in ended
            if run.arm == 'taught': free = 'teacher' in ended
            if not free: return None
            ended.add(run.arm)
            return {}
        train,calls = pretend(outcome)
        assert work(made_up_runs(), train) == {}
        waited = [] if done_meanwhile else [('teacher', False), ('taught', False)]
        assert calls == [('teacher', False), ('taught', False), ('other', False), *waited, ('teacher', not done_meanwhile), ('taught', False)]

def test_work_ends_with_an_error_that_nobody_notes():
    train,calls = pretend(lambda run, wait: RuntimeError('no memory') if run.arm == 'teacher' else {})
    with pytest.raises(RuntimeError, match='no memory'): work(made_up_runs(), train, retries=3)
    assert calls == [('teacher', False)]

def test_work_tries_again_and_goes_on_without_those_that_need_a_failed_run():
    train,calls = pretend(lambda run, wait: RuntimeError('no memory') if run.arm == 'teacher' else {})
    runs,notes = made_up_runs(),[]
    failed = work(runs, train, lambda run, attempt, error, trace: notes.append((run.arm, attempt, error, 'in train' in trace)), retries=1)
    assert failed == {runs[0].key: 'RuntimeError: no memory', runs[1].key: f'needs {runs[0].key}, which failed'}
    assert notes == [('teacher', i, 'RuntimeError: no memory', True) for i in (1, 2)]
    assert calls == [('teacher', False), ('teacher', False), ('other', False)]

@pytest.mark.parametrize('error', [KeyboardInterrupt, SystemExit])
def test_an_interrupt_is_no_failure(error):
    def train(run, wait, cbs): raise error
    with pytest.raises(error): work(made_up_runs(), train, lambda *args: pytest.fail('noted'), retries=1)
