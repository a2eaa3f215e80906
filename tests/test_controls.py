"Matched controls of single methods, lists, stages and self-guidance, against a loss and a gradient that are computed apart; and splits"
import math
from functools import partial

import numpy as np, pytest, torch
import torch.nn.functional as F
from fastai.callback.mixup import MixUp
from fastai.data.core import DataLoader, DataLoaders
from fastai.learner import Learner
from torch import nn

from fastkdtf.callback.distill import Distill, KnowledgeDistillation, LsrKD, MemoryReplay, ScaledCE, TfKDReg, describe_sum, matched_controls
from fastkdtf.callback.effdstl import CKM, WSL
from fastkdtf.callback.methods import methods
from fastkdtf.callback.relatives import DKD
from fastkdtf.callback.selfguide import SelfGuidance, StochasticDepth
from fastkdtf.callback.stages import Stage
from fastkdtf.callback.twostage import effdstl_stages
from fastkdtf.lab.compare import compare
from fastkdtf.lab.page import headline, report_html
from fastkdtf.lab.report import comparisons, read_runs
from fastkdtf.lab.one_run import LearnerParts, make_callbacks, split_loaders
from fastkdtf.lab.training import Arm, Campaign, controls_of, with_controls
from fastkdtf.teachers.base import UniformTeacher
from fastkdtf.teachers.network import EnsembleTeacher, NetworkTeacher
from fastkdtf.vision.data import kd_dataloaders

K = 10
def net(): return nn.Sequential(nn.Flatten(), nn.Linear(3*8*8, K))
def names(method): return (lambda found: None if found is None else list(found))(controls_of(make_callbacks(method), K))

def gradient(cbs, z, y):
    "Of the training loss with respect to logits that are nearly uniform, as fastai's step makes it"
    class Logits(nn.Module):
        def __init__(self):
            super().__init__()
            self.z = nn.Parameter(z.clone())
        def forward(self, x): return self.z
    dls = DataLoaders(*[DataLoader(list(zip(torch.zeros(len(y), 1), y)), bs=len(y), num_workers=0)]*2, device='cpu')
    dls.c = K
    learn = Learner(dls, Logits(), loss_func=nn.CrossEntropyLoss(), opt_func=partial(torch_sgd, seen := []), cbs=make_callbacks(cbs))
    with learn.no_bar(), learn.no_logging(): learn.fit(1, 0.)
    return seen[0]

def torch_sgd(seen, params, lr, **kwargs):
    from fastai.optimizer import OptimWrapper
    class Look(torch.optim.SGD):
        def step(self, closure=None): seen.append(self.param_groups[0]['params'][0].grad.clone())
    return OptimWrapper(params, Look, lr=lr)

@pytest.mark.parametrize('method', [LsrKD(), [LsrKD(alpha=.2), TfKDReg(alpha=.3, name='second')], [LsrKD(tau=1.), LsrKD(alpha=.3, tau=1., name='second')],
                                    [TfKDReg(alpha=.95, tau=40., variant='official'), LsrKD(alpha=.03)]])
def test_at_uniform_predictions_the_control_with_smoothing_has_the_gradient_of_the_methods_it_controls(method):
    "That is what scale and ε mean"
    g = torch.Generator().manual_seed(0)
    y,z = torch.arange(8)%K,torch.zeros(8, K)
    controls = matched_controls(method, K)
    smoothed = [control for name,control in controls.items() if name.startswith('LS')]
    made = make_callbacks(method)
    if not smoothed: smoothed = [made]   # label smoothing is its own control
    torch.testing.assert_close(gradient(method, z, y), gradient(smoothed[0], z, y), atol=1e-6, rtol=1e-4)

@pytest.mark.parametrize('method,controls', [
    (LsrKD(), ['LS 0.1']), (LsrKD(tau=1.), []), (None, []), (StochasticDepth(), []), (MixUp(), None), (MemoryReplay(), ['CE ×1.5']),
    (SelfGuidance(), ['CE ×2.75', 'stochastic depth 0.5']), (SelfGuidance(lam=0., p_last=.8), ['CE ×2', 'stochastic depth 0.8']),
    (SelfGuidance(full_backward=False), ['CE ×1.75', 'stochastic depth 0.5']),
    ([LsrKD(), MixUp()], ['CE + mix_up', 'LS 0.1 + mix_up']), ([LsrKD(tau=1.), MixUp()], ['CE + mix_up']),
    ([SelfGuidance(), MixUp()], ['CE ×2.75 + mix_up', 'stochastic depth 0.5 + mix_up']),
    ([StochasticDepth(), LsrKD(tau=1.)], ['CE + stochastic_depth']),
    ([LsrKD(alpha=.1, tau=1.), LsrKD(alpha=.2, tau=1., name='second')], []),   # together they are label smoothing
    (Distill(UniformTeacher(), loss=lambda z, t: z.sum(1)), None), ([LsrKD(), Distill(UniformTeacher(), loss=lambda z, t: z.sum(1))], None),
    ([Stage(1, [LsrKD()]), Stage(2, [TfKDReg()])], ['CE then CE ×2.9', 'LS 0.1 then LS 0.663 ×2.9']), ([Stage(1), Stage(1, lr=.1)], None),
    ([Stage(1, [LsrKD()]), Stage(2)], ['CE then CE', 'LS 0.1 then CE']), ([MixUp(), Stage(1, [LsrKD()])], ['CE', 'LS 0.1']),
    (lambda: effdstl_stages(5, net()), ['CE ×2 then CE']), (lambda: [WSL(net())], ['CE ×6'])])
def test_every_method_has_its_controls_or_none_is_known(method, controls): assert names(method) == controls

def test_a_sum_of_methods_is_described_as_their_weights_gradients_and_targets_added():
    parts = LsrKD(alpha=.2),TfKDReg(alpha=.3, name='second')
    one,two = (part.describe(K) for part in parts)
    whole = describe_sum(parts, K)
    assert whole.hard == pytest.approx(one.hard+two.hard-1) and whole.soft_gradient == pytest.approx(one.soft_gradient+two.soft_gradient)
    assert not whole.exact and describe_sum([LsrKD(tau=1.)], K).exact
    assert describe_sum([KnowledgeDistillation(net()), LsrKD(alpha=.05)], K).epsilon is None

def test_controls_in_stages_keep_the_schedule_and_whatever_is_no_method():
    mix,made = MixUp(),make_callbacks([Stage(1, [LsrKD(), MixUp()], lr=.3, wd=.1, bs=4), Stage(2, [TfKDReg()], lr=.1)])
    ce,ls = controls_of(made, K).values()
    for control in (ce, ls):
        assert [(stage.n_epoch, stage.lr, stage.wd, stage.bs) for stage in control] == [(1, .3, .1, 4), (2, .1, None, None)]
        assert [type(cb).__name__ for cb in control[0].cbs][0] == 'MixUp' and len(control[0].cbs) == 2 and len(control[1].cbs) == 1

def test_a_control_does_not_take_the_name_of_another_method():
    arms = with_controls({'baseline': None, 'KD': partial(KnowledgeDistillation, net()), 'CE ×3.7': LsrKD(), 'again': partial(KnowledgeDistillation, net())}, K)
    assert arms['CE ×3.7'][1:] == ([], True) and arms['CE ×3.7 (2)'][1:] == (['KD', 'again'], False)
    same = with_controls({'baseline': None, 'KD': partial(KnowledgeDistillation, net()), 'CE ×3.7': ScaledCE(3.7)}, K)
    assert list(same) == ['baseline', 'KD', 'CE ×3.7'] and same['CE ×3.7'][1:] == (['KD'], True)

@pytest.fixture(scope='module')
def dls(): return kd_dataloaders('digits', bs=32, train_subset=96, device='cpu')

def test_every_named_method_is_in_the_headline_of_a_comparison_and_kds_teacher_is_measured(dls):
    teacher = net()
    methods = {'LSR': partial(LsrKD, tau=1.), 'LsrKD': LsrKD, 'KD': partial(KnowledgeDistillation, teacher), 'own': partial(Distill, teacher, loss=lambda z, t: z.pow(2).sum(1)),
               'mine, in $ and $': [LsrKD(alpha=.2), MixUp(.4)]}
    c = compare(methods, dls, net, 1, seeds=2)
    assert c.methods == list(methods)
    said = headline(c)
    for name in methods: assert any(name in words for words in said), name
    assert 'Held against baseline only, which is the matched control: LSR.' in said and 'Held against baseline only, as no matched control is known: own.' in said
    dl = dls.test.new(shuffle=False, drop_last=False)
    right = torch.cat([(teacher.eval()(x).argmax(1) == y).float() for x,y in dl]).mean().item()
    assert c.table.loc[['KD', 'own'], 'teacher'].tolist() == pytest.approx([right]*2) and c.table.teacher.drop(['KD', 'own']).isna().all()
    assert c.runs('LS 0.2 + mix_up')[0]['named'] is False and c.control_for('LS 0.2 + mix_up') == ['mine, in $ and $']

# ---------------------------------------------------------------- splits

def test_with_splits_each_seed_has_images_of_its_own_and_the_table_is_one(tmp_path):
    dls = kd_dataloaders('digits', bs=32, train_subset=96, device='cpu')
    c = compare({'LsrKD': LsrKD}, dls, net, 1, seeds=4, splits=2, out=tmp_path)
    splits = [r['settings']['split']['train_digest'] for r in c.runs('LsrKD')]
    assert splits[0] == splits[2] != splits[1] == splits[3] and [r['split']['number'] for r in c.runs('LsrKD')] == [0, 1, 0, 1]
    assert 'differs between 2 splits of the data and 4 seeds' in c.covers
    found, = comparisons(read_runs(tmp_path))
    assert found.table.equals(c.table) and found.covers == c.covers and found.covers in headline(found)
    size = (tmp_path/'results.jsonl').stat().st_size
    again = compare({'LsrKD': LsrKD}, dls, net, 1, seeds=4, splits=2, out=tmp_path)
    assert again.table.equals(c.table) and (tmp_path/'results.jsonl').stat().st_size == size, 'nothing is trained again'
    assert 'splits' in report_html(c)

def test_a_function_of_the_split_makes_loaders_and_what_cannot_be_split_is_refused_before_training():
    seen = []
    def loaders(split):
        seen.append(split)
        return kd_dataloaders('digits', bs=32, seed=split, train_subset=96, device='cpu')
    assert len(split_loaders(loaders, 3)) == 3 and seen == [0, 1, 2]
    plain = DataLoaders(*[DataLoader([(torch.zeros(1), 0)], bs=1, num_workers=0)]*2, device='cpu')
    assert split_loaders(plain, 1) is plain
    with pytest.raises(TypeError, match='splits=2 needs data that can be split again'): split_loaders(plain, 2)
    with pytest.raises(ValueError, match='splits must be at least 1'): split_loaders(plain, 0)
    with pytest.raises(ValueError, match='splits=3 needs as many seeds'): compare({'LsrKD': LsrKD}, loaders, net, 1, seeds=2, splits=3)

def test_a_campaign_takes_loaders_of_each_split_in_turn():
    several = [kd_dataloaders('digits', bs=32, seed=s, train_subset=96, device='cpu') for s in range(2)]
    c = Campaign({'baseline': Arm()}, LearnerParts(several, net), 1, seeds=[5, 3, 9])
    assert [c.loaders[s] for s in (5, 3, 9)] == [several[0], several[1], several[0]]
    with pytest.raises(TypeError, match='dls must be DataLoaders'): Campaign({'baseline': Arm()}, LearnerParts(None, net), 1)
    with pytest.raises(ValueError, match='dls is empty'): Campaign({'baseline': Arm()}, LearnerParts([], net), 1)


def taught_together(teacher): return [DKD(teacher), CKM(teacher)]

@pytest.mark.parametrize('name,method', [(m.name, m.maker(K)) for m in methods.values() if m.needs_teacher and not m.control]
                         + [('two', taught_together), ('ensemble', lambda teacher: DKD(EnsembleTeacher([teacher, net()])))])
def test_controls_that_are_taught_wait_for_the_same_teacher(dls, name, method, tmp_path):
    "Whatever a method's controls are, they train where the teacher is an arm, and each is taught by its network and no other"
    c = compare({name: Arm(method, teacher='teacher')}, LearnerParts(dls, net), 1, 1, teacher=LearnerParts(dls, net, settings=dict(arch='large')), out=tmp_path)
    arms = {record['method']: record for record in c.records}
    expected = controls_of(make_callbacks(partial(method, net())), K) or {}
    assert set(arms) >= {'baseline', 'teacher', name, *expected}
    def is_taught(cbs): return any(isinstance(t, (NetworkTeacher, EnsembleTeacher)) for cb in make_callbacks(cbs) for t in getattr(cb, 'teachers', {}).values())
    taught = {control for control,cbs in expected.items() if is_taught(cbs)}
    assert taught or name not in ('DKD', 'NKD', 'DIST', 'two', 'ensemble')
    assert {o for o,record in arms.items() if 'teacher_accuracy' in record} == {name, *taught}
    assert len({record['teacher_accuracy'] for record in arms.values() if 'teacher_accuracy' in record}) == 1
