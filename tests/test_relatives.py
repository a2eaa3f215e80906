"The later methods by the specification's check values: a whole step of a learner, in float64"
import math
from functools import partial
from itertools import count

import pytest, torch, torch.nn.functional as F
from fastai.basics import Callback, DataLoaders, Learner, SGD
from fastai.callback.progress import ProgressCallback
from fastai.data.load import DataLoader
from torch import nn, tensor
from torch.utils.data import TensorDataset

from fastkdtf.all import *
from fastkdtf.callback.relatives import LabelLogit

pytestmark = pytest.mark.filterwarnings('ignore:DIST correlates the samples')

double = partial(tensor, dtype=torch.double)
Z,Y  = double([[1., .5, -.5], [.2, -.3, .8]]),tensor([0, 1])
ZT   = double([[2., -.5, .5], [0, 1., .5]])
Z3,ZT3 = torch.cat([Z, double([[-.4, .6, .1]])]),torch.cat([ZT, double([[-1., .3, .9]])])


# ---------------------------------------------------------------- one step of a learner

class Rows(nn.Module):
    "A network whose inputs are numbers of rows, and whose logits are these rows"
    def __init__(self, z):
        super().__init__()
        self.z = nn.Parameter(z.clone())
    def forward(self, i): return self.z[i]

class Look(Callback):
    "Note loss and gradient of each batch, before any step"
    order,run_valid = 5.5,False
    def before_fit(self): self.steps = []
    def after_loss(self):
        self.loss = self.learn.loss_grad.item()
        self.learn.loss = self.learn.loss.float()   # the recorder's own
    def after_backward(self):
        self.steps.append((self.loss, self.learn.model.z.grad.clone()))
        self.learn.model.z.grad = None

class Before(Callback):
    "Do something before each batch of training, before the methods do"
    order,run_valid = 4,False
    def __init__(self, do): self.do = do
    def before_batch(self): self.do()

def rows_learner(cb, z=Z, y=Y, n=None, bs=None, cbs=()):
    data = TensorDataset(torch.arange(len(z)), y)
    dls = with_index(DataLoaders(*[DataLoader(data, bs=bs or n or len(z), n=n) for _ in range(2)]))
    dls.c = z.shape[1]
    learn = Learner(dls, Rows(z), loss_func=nn.CrossEntropyLoss(), opt_func=SGD, lr=0., cbs=[cb, *cbs])
    return learn.remove_cb(ProgressCallback)

def step(cb, z=Z, y=Y, before=None, n_epoch=1, **kwargs):
    "Loss and the two derivatives of the specification, of the last batch"
    look = Look()
    learn = rows_learner(cb, z, y, cbs=[look] + [Before(before)]*(before is not None), **kwargs)
    with learn.no_logging(): learn.fit(n_epoch)
    loss,grad = look.steps[-1]
    return [loss, grad[0, 1].item(), grad[1, 1].item()]

def says(zt): return lambda batch: zt
def close(got, *expected): assert got == pytest.approx(expected, abs=6e-7)

def test_pskd_is_taught_what_the_student_said_last():
    cb = PSKD(.4)
    close(step(cb, before=lambda: cb.teacher.table.write(torch.arange(2), ZT)), 1.139508, .153171, -.312846)

def test_pskd_is_taught_the_label_of_a_sample_that_it_has_not_seen():
    cb = PSKD(.4)
    close(step(cb, before=lambda: cb.teacher.table.write(tensor([1]), ZT[1:])), 1.081933, .165749, -.312846)

def test_cskd_is_taught_what_the_student_says_of_a_partner():
    cb = CSKD()
    def pair():
        assert cb.teacher.pairs.members == {0: [2], 1: [3]}
    class Meet(Callback):
        order = 4.5   # before the loader is arranged
        def before_train(self): cb.teacher.pairs.members = {0: [2], 1: [3]}
    look = Look()
    learn = rows_learner(cb, torch.cat([Z, ZT]), Y.repeat(2), n=2, cbs=[look, Meet(), Before(pair)])
    with learn.no_logging(): learn.fit(1)
    (loss,grad), = look.steps
    close([loss, grad[0, 1].item(), grad[1, 1].item()], 1.502846, .370911, -.583299)
    assert not grad[2:].any()

def test_dlb_is_taught_what_the_student_said_one_step_ago():
    cb = DLB()
    def known():
        if cb.teacher.logits is not None: cb.teacher.logits = ZT[:1]
    close(step(cb, before=known), 1.544950, .562223, -.411550)

def test_online_label_smoothing_takes_the_mean_of_right_predictions():
    cb = OnlineLabelSmoothing()
    def seen():
        cb.teacher.observe(Batch(Y, ZT))
        cb.teacher.after_epoch()
    close(step(cb, before=seen), 1.132348, .150027, -.288170)

class Twice(Rows):
    "In training every other pass returns other logits, the first too"
    passes = count()   # of the class, so that no pass is taken back
    def forward(self, i): return ZT[i] if self.training and next(self.passes)%2 == 0 else self.z[i]

def test_rdrop_adds_both_losses_and_half_of_both_divergences():
    look,cb = Look(),RDrop()
    learn = rows_learner(cb, cbs=[look])
    learn.model = Twice(Z)
    with learn.no_logging(): learn.fit(1)
    (loss,grad), = look.steps
    close([loss, grad[0, 1].item(), grad[1, 1].item()], 1.799569, .272523, -.495158)

def test_maxsup_pulls_down_the_largest_logit(): close(step(MaxSup(.1)), 1.229815, .149083, -.428216)

def test_label_smoothing_pulls_down_the_label():
    close(step(Distill(UniformTeacher(), (1., .1), 1., loss=LabelLogit())), 1.174815, .149083, -.378216)
    smoothed = F.cross_entropy(Z, Y, label_smoothing=.1).item()
    assert smoothed == pytest.approx(1.174815, abs=6e-7)

def test_dkd_weighs_the_label_and_the_others_apart(): close(step(DKD(says(ZT), warmup=1)), 3.360278, 2.223754, -.583299)
def test_dkd_warms_up_by_whole_epochs(): close(step(DKD(says(ZT)), n_epoch=5), 1.716181, .680251, -.454487)
def test_nkd_at_the_papers_settings(): close(step(NKD(says(ZT))), 3.119482, .639328, -.619991)
def test_nkd_keeps_the_label_at_temperature_1(): close(step(NKD(says(ZT), gamma=3.5, tau=3.)), 24.271279, 1.159727, -.619991)
def test_dist_of_two_samples(): close(step(DIST(says(ZT), tau=1.)), 4.157883, .717939, -.746270)
def test_dist_of_three_samples():
    close(step(DIST(says(ZT3), tau=4.), Z3, tensor([0, 1, 2])), 47.754320, 13.929759, -9.931327)

def test_standardised_logits(): close(step(StandardisedKD(says(ZT))), 5.933321, 1.653662, -1.172047)
def test_standardised_logits_with_the_other_deviation(): close(step(StandardisedKD(says(ZT), ddof=0)), 8.672083, 2.330487, -1.600739)

def taught_by_average(cb):
    "The running average says `ZT`"
    class Average(EMATeacher):
        def __call__(self, batch): return ZT[batch.xb[0]]
    cb.teacher.__class__ = Average
    return cb

def test_the_mean_teacher_with_the_divergence(): close(step(taught_by_average(MeanTeacher()), n_epoch=3), 1.208885, .187950, -.438789)
def test_the_mean_teacher_with_the_squared_difference():
    close(step(taught_by_average(MeanTeacher(w=100., loss='mse')), n_epoch=3), 1.974760, .723883, -.822072)

# methods that are settings of what is there

class Hardest(Rewrite):
    "Only the teacher's first class"
    def rewrite(self, target, batch): return F.one_hot(target.argmax(1), batch.n_classes).to(target)

def test_deit_hard_is_a_rewrite():
    zt = torch.stack([ZT[0], double([-1., .3, .9])])
    close(step(Distill(says(zt), .5, 1., 1, 'ce', Hardest())), .893149, .165749, -.161550)

def test_ttm_is_a_setting(): close(step(Distill(says(ZT), (1., 45.), (10., 1.), 1)), 6.953747, .985734, -4.309250)

def test_wttm_weighs_the_samples():
    weight = lambda batch: batch.zt.softmax(1).pow(.2).sum(1)
    close(step(Distill(says(ZT), (1., 4.), (5., 1.), 1, sample_weight=weight)), 2.320710, .491169, -1.316113)

class Annealed(SoftLoss):
    "Mean squared difference from the teacher's logits, times 1-(T-1)/10"
    asks_label = False
    def __call__(self, batch, target): return (batch.z - (1-(7-1)/10)*batch.zt).square().mean(1)

def test_annealing_kd_is_a_loss_of_raw_logits(): close(step(Distill(says(ZT), (0., 1.), 1., 1, Annealed())), .318333, .233333, -.233333)

def test_cwtm_weighs_labels_by_the_teachers_confidence():
    weight = lambda batch: (w := batch.zt.softmax(1).amax(1))/w.mean()
    close(step(Distill(says(ZT), (0., 1.), 1., 1, 'ce', SmoothTo(1.), weight)), 1.053063, .199570, -.327575)

class SwapOthers(Rewrite):
    "The teacher's largest probability stays, the two others change places"
    def rewrite(self, target, batch):
        first = target.argmax(1, keepdim=True)
        others = torch.stack([torch.arange(3)[torch.arange(3) != i] for i in first])
        return target.scatter(1, others, target.gather(1, others.flip(1)))

def test_dkpp_permutes_all_but_the_teachers_first_class():
    close(step(Distill(says(ZT), (0., 1.), 1., 1, 'ce', SwapOthers())), 1.078777, .080273, -.164790)


# ---------------------------------------------------------------- limits

def grads(cb, **kwargs):
    look = Look()
    learn = rows_learner(cb, cbs=[look], **kwargs)
    with learn.no_logging(): learn.fit(1)
    return look.steps[-1]

@pytest.mark.parametrize('tau', [1., 3.])
def test_dkd_with_the_others_at_the_teachers_mass_is_kd(tau):
    zt = double([[2., -.5, .5], [-.5, 2., .5]])   # as sure of both labels
    rest = 1-(zt/tau).softmax(1)[0, 0].item()
    (a,da),(b,db) = grads(DKD(says(zt), 1., rest, tau, 1)),grads(Distill(says(zt), (1., 1.), tau))
    assert a == pytest.approx(b, rel=1e-12)
    torch.testing.assert_close(da, db)

def test_nkd_without_the_others_is_cross_entropy_times_one_plus_confidence():
    weights = 1 + ZT.softmax(1)[[0, 1], Y]
    z = Z.clone().requires_grad_()
    expected = (weights*F.cross_entropy(z, Y, reduction='none')).mean()
    expected.backward()
    loss,grad = grads(NKD(says(ZT), 0.))
    assert loss == pytest.approx(expected.item(), rel=1e-12)
    torch.testing.assert_close(grad, z.grad)

def test_dist_does_not_see_the_scale_of_standardised_probabilities():
    p = torch.rand(6, 4, dtype=torch.double)
    loss = DIST(says(None)).soft_loss
    assert loss._loss(p, 3*p + .2).item() == pytest.approx(0., abs=1e-6)

def test_maxsup_is_label_smoothing_where_the_student_is_right():
    y = Z.argmax(1)
    (a,da),(b,db) = grads(MaxSup(.15), y=y),grads(Distill(UniformTeacher(), (1., .15), 1., loss=LabelLogit()), y=y)
    assert a == pytest.approx(b, rel=1e-12)
    torch.testing.assert_close(da, db)
    assert a == pytest.approx(F.cross_entropy(Z, y, label_smoothing=.15).item(), rel=1e-12)

def test_standardised_logits_do_not_see_an_affine_change_of_the_teacher():
    (a,da),(b,db) = grads(StandardisedKD(says(ZT))),grads(StandardisedKD(says(7*ZT - 3)))
    assert a == pytest.approx(b, rel=1e-6)
    torch.testing.assert_close(da, db, rtol=1e-6, atol=1e-7)

def test_standardising_is_an_option_of_kd_dkd_and_nkd():
    (a,da),(b,db) = grads(DKD(says(5*ZT), standardise=True, warmup=1)),grads(DKD(says(ZT), standardise=True, warmup=1))
    assert a == pytest.approx(b, rel=1e-6) and not torch.allclose(da, grads(DKD(says(ZT), warmup=1))[1])
    assert grads(NKD(says(5*ZT), standardise=True))[0] == pytest.approx(grads(NKD(says(ZT), standardise=True))[0], rel=1e-6)
    kd,own = KnowledgeDistillation(says(5*ZT), .3, 2., standardise=True),StandardisedKD(says(ZT), .7, .3)
    assert grads(kd)[0] == pytest.approx(grads(own)[0], rel=1e-6)

@pytest.mark.parametrize('cb', [DKD, NKD, DIST, StandardisedKD], ids=lambda o: o.__name__)
@pytest.mark.parametrize('zt', [1e4*ZT, double([[0., -math.inf, -math.inf], [-1e3, 0., -1e3]]), torch.zeros(2, 3, dtype=torch.double)],
                         ids=['sure', 'rules out', 'flat'])
def test_a_sure_or_a_flat_teacher_gives_finite_losses_and_gradients(cb, zt):
    zt = zt.clamp(min=-1e30)
    for z in (Z, 1e4*Z, torch.zeros_like(Z)):
        loss,grad = grads(cb(says(zt)), z=z)
        assert math.isfinite(loss) and grad.isfinite().all()

@pytest.mark.parametrize('make', [DKD, NKD, partial(DIST, tau=2.), StandardisedKD], ids=['DKD', 'NKD', 'DIST', 'StandardisedKD'])
def test_labels_that_are_probabilities_are_the_mean_over_their_labels(make):
    q = double([[.3, 0., .7], [0., 1., 0.]])
    mixed,_ = grads(make(says(ZT)), y=q)
    soft = lambda y: grads(cb := make(says(ZT)), y=y)[0] - cb.weights(0.)[0]*F.cross_entropy(Z, y).item()
    first,second = soft(tensor([0, 1])),soft(tensor([2, 1]))
    assert soft(q) == pytest.approx(.3*first + .7*second, rel=1e-9)
    assert (first == second) == (make not in (DKD, NKD))   # the others do not ask for the label

@pytest.mark.parametrize('make', [DKD, NKD, DIST, StandardisedKD], ids=lambda o: o.__name__)
def test_several_teachers_count_by_their_mean(make):
    several,one,other = (grads(make(says(zt)))[0] for zt in (torch.stack([ZT, Z.flip(0)]), ZT, Z.flip(0)))
    assert several == pytest.approx((one+other)/2, rel=1e-9)


# ---------------------------------------------------------------- high temperatures

def cast(zt): return lambda batch: zt.to(batch.z.dtype)

HOT = {
    'LsrKD': lambda tau: LsrKD(tau=tau), 'LsrKD-TC': lambda tau: LsrKD(tau=tau, gamma=.3), 'TfKDReg': lambda tau: TfKDReg(tau=tau),
    'KD': lambda tau: KnowledgeDistillation(cast(ZT), tau=tau), 'KD, ce': lambda tau: Distill(cast(ZT), tau=tau, loss='ce', scale='tau'),
    'two teachers': lambda tau: KnowledgeDistillation(lambda batch: torch.stack([ZT, ZT.flip(1)]).to(batch.z.dtype), tau=tau),
    'an ensemble': lambda tau: KnowledgeDistillation([Rows(ZT), Rows(ZT.flip(1))], tau=tau),
    'another for each': lambda tau: Distill(cast(ZT), tau=(2., tau)), 'standardised': lambda tau: StandardisedKD(cast(ZT), tau=tau),
    'WSL': lambda tau: WSL(cast(ZT), tau=tau, weight_tau=tau), 'DKD': lambda tau: DKD(cast(ZT), tau=tau, warmup=1),
    'NKD': lambda tau: NKD(cast(ZT), tau=tau), 'DIST': lambda tau: DIST(cast(ZT), tau=tau),
    'a function': lambda tau: Distill(cast(ZT), tau=tau, loss=lambda z, t: F.kl_div(z.log_softmax(1), t, reduction='none').sum(1)),
    **{type(rewrite).__name__: lambda tau, rewrite=rewrite: Distill(cast(ZT), tau=tau, rewrite=rewrite)
       for rewrite in (TeacherCorrection(.4), SmoothTo(.6), Amplify(.3), Amplify(.3, who='student'), Replace(cast(ZT.flip(0))), SmoothTo(.6, on=Correct()))},
    'a rewrite of two values': lambda tau: Distill(VirtualTeacher(.9), tau=tau, rewrite=SmoothTo(.5, on=Correct())),
    'a function of two values': lambda tau: Distill(VirtualTeacher(.9), tau=tau, loss=lambda z, t: F.kl_div(z.log_softmax(1), t, reduction='none').sum(1)),
    'DKD of two values': lambda tau: DKD(VirtualTeacher(.9), tau=tau, warmup=1), 'DIST of two values': lambda tau: DIST(VirtualTeacher(.9), tau=tau)}

@pytest.mark.parametrize('tau', [100., 1e4, 1e6])
@pytest.mark.parametrize('name', HOT)
def test_high_temperatures_are_as_exact_in_float32_as_in_float64(name, tau):
    def grad(dtype):
        look = Look()
        with (learn := rows_learner(HOT[name](tau), Z.to(dtype), cbs=[look])).no_logging(): learn.fit(1)
        assert look.steps[-1][1].dtype == dtype
        return look.steps[-1][0],look.steps[-1][1].double()
    (loss,ours),(expected,theirs) = map(grad, (torch.float32, torch.float64))
    assert loss == pytest.approx(expected, rel=1e-5, abs=1e-14*tau**2)   # what float64 rounds
    assert torch.allclose(ours, theirs, rtol=2e-5, atol=1e-6*theirs.abs().max().item())
    assert theirs.abs().max() > 0

@pytest.mark.parametrize('tau', [20., 100., 1e4, 1e6])
def test_a_virtual_teacher_is_the_same_in_closed_form_and_written_out(tau):
    def nobody(batch): return torch.zeros(len(batch.y), dtype=torch.bool)
    def written_out(z, t): return F.kl_div(z.log_softmax(1), t, reduction='none').sum(1)
    teacher = VirtualTeacher(.99)
    closed,*others = (step(Distill(teacher, tau=tau, **how), Z.float()) for how in ({}, dict(rewrite=SmoothTo(.5, on=nobody)), dict(loss=written_out)))
    for other in others: assert other == pytest.approx(closed, rel=1e-5, abs=1e-14*tau**2)
