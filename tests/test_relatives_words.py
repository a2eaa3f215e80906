"What the later methods say of themselves, what they refuse, and how they join everything that reads the list of methods"
import math, warnings
from copy import deepcopy
from functools import partial

import pytest, torch, torch.nn.functional as F
from fastai.basics import Callback, CrossEntropyLossFlat, DataLoaders, Learner, load_learner
from fastai.callback.mixup import CutMix, MixUp
from fastai.callback.progress import ProgressCallback
from fastai.data.load import DataLoader
from hypothesis import given, settings, strategies as st
from torch import Tensor, nn, tensor
from torch.utils.data import TensorDataset

from fastkdtf.all import *
from fastkdtf.vision.samplers import sample_labels
from fastkdtf.callback.methods import methods
from fastai.text.data import TensorText
from fastkdtf.lab.bench import listed_candidates
from fastkdtf.lab.training import with_controls
from test_relatives import Before, Look, rows_learner, says

later = ['PSKD', 'OnlineLabelSmoothing', 'DLB', 'CSKD', 'RDrop', 'MeanTeacher', 'MaxSup', 'DKD', 'NKD', 'DIST', 'StandardisedKD']

# ---------------------------------------------------------------- what describe says

def random_batch(seed, n=6, k=5):
    g = torch.Generator().manual_seed(seed)
    logits = lambda: 2*torch.randn(n, k, generator=g, dtype=torch.double)
    return logits(), torch.randint(0, k, (n,), generator=g), logits()

def gradient(cb, z, y, before=None):
    look = Look()
    learn = rows_learner(cb, z, y, cbs=[look] + [Before(before)]*(before is not None))
    with learn.no_logging(), warnings.catch_warnings():
        warnings.simplefilter('ignore')
        learn.fit(1)
    return look.steps[-1][1]*len(z)

def ratio(seed, low, high): return low + (high-low)*torch.rand(2, generator=torch.Generator().manual_seed(seed), dtype=torch.double)

@pytest.mark.parametrize('seed', range(20))
@pytest.mark.parametrize('name', ['PSKD', 'OLS', 'MeanTeacher', 'KD'])
def test_hard_and_soft_gradient_are_those_that_describe_names(name, seed):
    z,y,zt = random_batch(seed)
    a,b = ratio(seed, .05, .95).tolist()
    tau = 1 + 4*b
    if name == 'PSKD':
        cb = PSKD(a)
        before = lambda: cb.teacher.table.write(torch.arange(6), zt)
        target = zt.softmax(1)
    elif name == 'OLS':
        cb = OnlineLabelSmoothing(a)
        def before():
            cb.teacher.observe(Batch(y, zt))
            cb.teacher.after_epoch()
        s = torch.stack([zt.softmax(1)[(y == c) & (zt.argmax(1) == c)].mean(0) for c in range(5)])
        target = torch.where(s.isnan(), .2, s)[y]
    elif name == 'MeanTeacher':
        cb,before = MeanTeacher(b, w=3*a, rampup=0),None
        target = z.softmax(1)   # the average is the student itself: no soft gradient
    else: cb,before,target = KnowledgeDistillation(says(zt), a, tau),None,(zt/tau).softmax(1)
    d = cb.describe(5)
    q,t = F.one_hot(y, 5),cb.temperatures(1.)[1]
    expected = d.hard*(z.softmax(1)-q) + d.soft_gradient*((z/t).softmax(1)-target)
    torch.testing.assert_close(gradient(cb, z, y, before), expected, rtol=1e-6, atol=1e-9)
    assert d.scale == pytest.approx(d.hard + d.soft_gradient)

@pytest.mark.parametrize('seed', range(20))
def test_the_scale_of_dkd_is_that_of_the_labelled_logit(seed):
    z,y,zt = random_batch(seed)
    alpha,beta = (3*ratio(seed, 0., 1.)).tolist()
    tau = 1 + beta
    cb = DKD(says(zt), alpha, beta, tau, warmup=1)
    d,at = cb.describe(5),(range(6), y)
    assert d.soft_gradient is None and d.scale == pytest.approx(1 + alpha*tau)
    soft = (d.scale-1)*((z/tau).softmax(1)[at] - (zt/tau).softmax(1)[at])
    torch.testing.assert_close(gradient(cb, z, y)[at], z.softmax(1)[at] - 1 + soft, rtol=1e-6, atol=1e-9)

@pytest.mark.parametrize('seed', range(20))
def test_maxsup_takes_from_one_logit_what_it_gives_to_all(seed):
    z,y,_ = random_batch(seed)
    a,_ = ratio(seed, 0., 1.).tolist()
    cb = MaxSup(a)
    soft = gradient(cb, z, y) - (z.softmax(1)-F.one_hot(y, 5))
    torch.testing.assert_close(soft.sum(1), torch.zeros(6).double(), atol=1e-9, rtol=0)
    torch.testing.assert_close(soft, a*(F.one_hot(z.argmax(1), 5).double() - .2), rtol=1e-6, atol=1e-9)
    assert cb.describe(5).scale == 1. and cb.describe(5).soft_gradient is None

@pytest.mark.parametrize('make', [NKD, DIST, StandardisedKD, partial(KnowledgeDistillation, standardise=True), partial(DKD, standardise=True)])
def test_what_is_not_known_is_said_to_be_so(make):
    d = make(says(None)).describe(10)
    assert d.scale is d.soft_gradient is d.epsilon is d.as_control is None and d.controls == {}
    assert 'not known' in str(d)

@pytest.mark.parametrize('name,scale', dict(PSKD=1, OnlineLabelSmoothing=1, DLB=4, CSKD=5, RDrop=2, MeanTeacher=2, MaxSup=1, DKD=5).items())
def test_the_scales_of_the_papers_defaults(name, scale):
    assert methods[name].describe(100).scale == pytest.approx(scale)

def test_a_custom_loss_on_a_uniform_target_is_not_label_smoothing():
    class Own(SoftLoss):
        def __call__(self, batch, target): return batch.z.square().mean(1)
        def scale(self, n_classes): return .5
    d = Distill(UniformTeacher(), (1., .2), 1., loss=Own).describe(10)
    assert (d.scale, d.epsilon, d.as_control, list(d.controls)) == (1.1, None, None, ['CE ×1.1'])

# ---------------------------------------------------------------- controls

def test_each_method_has_the_controls_that_tell_its_idea_from_the_rest():
    own = dict(PSKD=['PSKD by class'], OnlineLabelSmoothing=['OLS, even'], DLB=['CE ×4', 'DLB, α=0'], CSKD=['CE ×5', 'CSKD, same image'],
               RDrop=['CE ×2', 'RDrop, α=0'], MeanTeacher=['CE ×2', 'averaged weights'], MaxSup=['LS, same schedule'], DKD=['CE ×5', 'KD (1, 1)'],
               NKD=['CE × (1+confidence)'], DIST=['DIST, classes', 'DIST, samples'], StandardisedKD=[])
    for name in later: assert list(matched_controls(methods[name].example(10), 10)) == own[name], name

def test_controls_of_the_same_name_and_another_teacher_are_two_arms():
    a,b = nn.Linear(2, 3),nn.Linear(2, 3)
    arms = list(with_controls({'one': DKD(a), 'other': DKD(b), 'again': DKD(a)}, 3))
    assert [o for o in arms if o.startswith('KD')] == ['KD (1, 1)', 'KD (1, 1) (2)'] and arms.count('CE ×5') == 1

def test_a_controls_control_is_not_made():
    for name in ('PSKD', 'OnlineLabelSmoothing', 'DLB', 'CSKD', 'RDrop', 'NKD', 'DIST', 'MaxSup'):
        for control in methods[name].example(10).own_controls(10).values(): assert control.own_controls(10) == {}, name

def test_compare_trains_a_later_method_beside_its_controls(tmp_path):
    dls = kd_dataloaders('digits', bs=32, train_subset=64)
    def network(): return nn.Sequential(nn.Flatten(), nn.Dropout(.1), nn.Linear(192, 10))
    c = compare({'PSKD': PSKD, 'CSKD': CSKD, 'RDrop': RDrop}, dls, network, 1, seeds=1, out=tmp_path)
    assert set(c.names) == {'baseline', 'PSKD', 'CSKD', 'RDrop', 'PSKD by class', 'CE ×5', 'CSKD, same image', 'CE ×2', 'RDrop, α=0'}

# ---------------------------------------------------------------- what is refused

def digits(bs=16, **kwargs): return kd_dataloaders('digits', bs=bs, train_subset=48, **kwargs)
def learner(*cbs, dls=None, **kwargs):
    dls = dls or digits()
    kwargs = {'loss_func': CrossEntropyLossFlat(), **kwargs}
    return Learner(dls, nn.Sequential(nn.Flatten(), nn.Linear(192, 10)), cbs=cbs, **kwargs).remove_cb(ProgressCallback)

def refuses(error, words, learn):
    before = [p.detach().clone() for p in learn.model.parameters()]
    with pytest.raises(error, match=words), learn.no_logging(): learn.fit(1)
    for a,b in zip(before, learn.model.parameters()): assert torch.equal(a, b)

@pytest.mark.parametrize('mix', [MixUp, CutMix])
@pytest.mark.parametrize('make', [PSKD, OnlineLabelSmoothing, DLB, CSKD])
@pytest.mark.parametrize('first', [True, False])
def test_mixed_images_belong_to_no_sample(make, mix, first):
    cbs = [make(), mix()]
    refuses(ValueError, f'{cbs[0].name} remembers predictions, and one of an image that {mix.__name__} mixes', learner(*cbs[::1 if first else -1]))

class Late(Callback):
    "Mixes labels, as MixUp does, without being one"
    order = 1
    def lf(self, pred, yb): return self.old_lf(pred, yb)
    def before_batch(self):
        if not self.training: return
        self.old_lf,self.yb1,self.lam = CrossEntropyLossFlat(),(self.learn.y,),.5
        self.learn.loss_func = self.lf

def test_a_mixer_that_nobody_knows_is_refused_at_the_first_batch():
    refuses(ValueError, 'that Late mixes', learner(OnlineLabelSmoothing(), Late()))

class Flip(Callback):
    "Changes the images behind the loader's back"
    order = 1
    def before_batch(self): self.learn.xb = (self.learn.xb[0].flip(0),)

@pytest.mark.parametrize('make', [PSKD, DLB])
@pytest.mark.parametrize('order', [1, 7])
def test_images_that_a_callback_has_changed_are_refused(make, order):
    flip = Flip()
    flip.order = order
    refuses(ValueError, 'a callback has changed the images', learner(make(), flip))

@pytest.mark.parametrize('make', [PSKD, DLB, CSKD])
def test_a_loader_without_indices_is_refused_before_the_first_batch(make):
    items = [(torch.randn(3, 8, 8), i%10) for i in range(40)]
    dls = DataLoaders(DataLoader(items, bs=8), DataLoader(items, bs=8))
    dls.c = 10
    refuses(ValueError, r'call with_index\(dls\) first', learner(make(), dls=dls))
    learn = learner(make(), dls=with_index(dls))
    with learn.no_logging(): learn.fit(1)   # and then it works

def test_online_label_smoothing_needs_integer_labels():
    class Soft(Callback):
        order = 1
        def before_batch(self): self.learn.yb = (F.one_hot(self.learn.y.as_subclass(Tensor), 10).float(),)
    refuses(TypeError, 'integer labels', learner(OnlineLabelSmoothing(), Soft(), loss_func=nn.CrossEntropyLoss()))

def test_dlb_needs_an_even_batch(): refuses(ValueError, 'bs must be even, got 15', learner(DLB(), dls=digits(15)))
def test_two_methods_cannot_arrange_the_batches(): refuses(ValueError, 'two methods would arrange the batches', learner(DLB(), CSKD()))

@pytest.mark.parametrize('kwargs,words', [(dict(loss_func=CrossEntropyLossFlat(reduction='sum')), "the learner's loss is a sum"),
                                          (dict(loss_func=CrossEntropyLossFlat(ignore_index=3)), 'some positions do not count')])
def test_a_loss_of_the_whole_batch_refuses_what_weighs_samples(kwargs, words):
    refuses(TypeError, words, learner(DIST(nn.Sequential(nn.Flatten(), nn.Linear(192, 10))), **kwargs))

def test_a_loss_of_the_whole_batch_refuses_weights_of_samples():
    teacher = nn.Sequential(nn.Flatten(), nn.Linear(192, 10))
    cb = Distill(teacher, (1., 1.), 1., loss=DIST(teacher).soft_loss, sample_weight=lambda batch: torch.ones(len(batch.y)))
    refuses(TypeError, 'samples have weights', learner(cb))

@pytest.mark.parametrize('bad,words', [
    (lambda: PSKD(1.1), r'alpha_t must be in \[0,1\], got 1.1'), (lambda: OnlineLabelSmoothing(-.1), r'alpha must be in \[0,1\]'),
    (lambda: OnlineLabelSmoothing(first='zero'), "first must be one of 'uniform', 'label'"), (lambda: DLB(tau=0), r'tau must be in \(0,1e6]'),
    (lambda: CSKD(-1.), r'alpha must be in \[0,inf\)|lam must be'), (lambda: RDrop(-1.), r'alpha must be in \[0,inf\), got -1.0'),
    (lambda: MeanTeacher(1.), r'decay must be in \[0,1\), got 1.0'), (lambda: MeanTeacher(w=-1.), r'w must be in \[0,inf\)'),
    (lambda: MeanTeacher(loss='l1'), "loss must be one of 'kl', 'mse'"), (lambda: MeanTeacher(rampup=-1), 'rampup must be at least 0'),
    (lambda: MaxSup(1.5), r'alpha must be in \[0,1\]'), (lambda: DKD(says(0), beta=-1.), r'beta must be in \[0,inf\)'),
    (lambda: DKD(says(0), warmup=0), 'warmup must be at least 1'), (lambda: NKD(says(0), gamma=-1.), r'gamma must be in \[0,inf\)'),
    (lambda: DIST(says(0), gamma=-2.), r'gamma must be in \[0,inf\)'), (lambda: StandardisedKD(says(0), ddof=2), 'ddof must be one of 0, 1'),
    (lambda: CSKD(lambda pct: -1.), 'lam at 0 %'), (lambda: StandardisedKD(says(0), hard=-1.), 'hard must be'), (lambda: WSL(says(0), lambda pct: -1.), 'beta at 0 %'),
    (lambda: PSKD(dtype=torch.int8), 'dtype must be a floating-point'), (lambda: PSKD(device='gpu'), "device: 'gpu' is no device")])
def test_arguments_are_checked_when_the_callback_is_made(bad, words):
    with pytest.raises((ValueError, TypeError), match=words): bad()

def test_a_checkpoint_of_another_data_set_is_refused():
    table = SampleTable(5)
    with pytest.raises(ValueError, match='the checkpoint remembers 4 samples, and the data set has 5'):
        table.load_state_dict(dict(n=4, rows=None, seen=None))

def test_warnings_where_a_method_cannot_do_what_it_is_for():
    z,y,zt = random_batch(0, k=2)
    with pytest.warns(UserWarning, match='with two classes'): rows_learner(DKD(says(zt), warmup=1), z, y, cbs=[Look()]).fit(1)
    z,y,zt = random_batch(0)
    with pytest.warns(UserWarning, match='6 are few'): rows_learner(DIST(says(zt)), z, y, cbs=[Look()]).fit(1)

# ---------------------------------------------------------------- the rest of the house

@pytest.mark.parametrize('name', later)
def test_an_exported_learner_holds_nothing_that_was_remembered(name, tmp_path):
    cb = methods[name].maker(10)(*[nn.Sequential(nn.Flatten(), nn.Linear(192, 10))]*methods[name].needs_teacher)
    learn = learner(cb)
    learn.path = tmp_path
    with learn.no_logging(), warnings.catch_warnings():
        warnings.simplefilter('ignore')
        learn.fit(1)
        learn.export('learner.pkl')
        loaded = load_learner(tmp_path/'learner.pkl')
    assert (tmp_path/'learner.pkl').stat().st_size < 60_000
    assert type(loaded.cbs[-1]) is type(cb) or any(type(o) is type(cb) for o in loaded.cbs)

@pytest.mark.parametrize('name', later)
def test_the_callback_can_be_copied_after_a_fit_and_trained_again(name):
    cb = methods[name].maker(10)(*[nn.Sequential(nn.Flatten(), nn.Linear(192, 10))]*methods[name].needs_teacher)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        learn = learner()
        with learn.no_logging(): learn.fit(1, cbs=cb)
        again = learner()
        with again.no_logging(): again.fit(1, cbs=deepcopy(cb))

def test_the_benchmark_steps_every_later_method():
    network = nn.Sequential(nn.Conv2d(3, 4, 3, 2), nn.BatchNorm2d(4), nn.Flatten(), nn.Dropout(.1), nn.Linear(36, 10))
    batch = torch.randn(12, 3, 8, 8),torch.arange(12)%10
    found = {name: c for name,c in listed_candidates(network, 10).items() if name in later}
    assert list(found) == [m for m in methods if m in later]
    for name,candidate in found.items():
        step = candidate.start(deepcopy(network), batch, 10)
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')
            losses = [step().item() for _ in range(3)]
        assert all(math.isfinite(loss) for loss in losses), name
        if candidate.beside: candidate.beside(batch[0])

@pytest.mark.parametrize('name', later)
def test_describe_kd_measures_every_later_method(name):
    cb = methods[name].maker(10)(*[nn.Sequential(nn.Flatten(), nn.Linear(192, 10))]*methods[name].needs_teacher)
    learn = learner(cb)
    order = learn.dls.train.rng.getstate()
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        row = learn.describe_kd(n_batches=2).iloc[0]
    assert math.isfinite(row['soft/hard gradient']) and learn.dls.train.rng.getstate() == order

@pytest.mark.parametrize('name', later)
def test_the_command_line_describes_every_later_method(name):
    from fastkdtf.cli import main
    assert main(['describe', name, '--classes', '20']) in (0, None)

def test_the_loaders_transforms_and_device_serve_partners_too():
    dls = digits(8)
    learn,seen = learner(CSKD(), dls=dls),[]
    class See(Callback):
        order = 6
        def before_batch(self):
            if self.training: seen.append((self.x, batch_info(self.dl).beside[0]))
    with learn.no_logging(): learn.fit(1, cbs=See())
    for x,partner in seen: assert partner.dtype == x.dtype and partner.shape == x.shape
    assert len(seen) == 6 and abs(torch.cat([p for _,p in seen]).mean()) < .5   # normalised

@given(st.integers(3, 40), st.integers(1, 6), st.booleans(), st.integers(0, 10**6))
@settings(max_examples=40, deadline=None)
def test_arranged_loaders_give_every_sample_as_often_as_they_say(n, half, drop_last, seed):
    import random
    y = torch.arange(n)%3
    def loader():
        dl = DataLoader(TensorDataset(torch.arange(n), y), bs=2*half, shuffle=True, drop_last=drop_last)
        dl.rng = random.Random(seed)
        return with_index(DataLoaders(dl)).train
    plain,pairs = loader(),arranged(loader(), Pairs(y))
    batches = [(x.tolist(), batch_info(pairs).beside[0]) for x,_ in pairs]
    assert [x.tolist() for x,_ in plain] == [x for x,_ in batches] and len(pairs) == len(batches) == len(plain)
    for x,partner in batches: assert (y[x] == y[partner]).all()
    twin = arranged(loader(), Overlap())
    if n < half:
        with pytest.raises(ValueError, match='at least one half'): list(twin)
        return
    for _ in range(2):
        halves = [x.tolist() for x,_ in twin]
        assert len(halves) == len(twin) == n//half and all(a[half:] == b[:half] for a,b in zip(halves, halves[1:]))
        new = [i for b in halves for i in b[half:]]
        assert len(set(new)) == len(new) == n//half*half

# ---------------------------------------------------------------- shapes and loaders of other kinds

def loss_of(cb, z, y, before=None):
    look = Look()
    learn = rows_learner(cb, z, y, cbs=[look] + [Before(before)]*(before is not None))
    with learn.no_logging(), warnings.catch_warnings():
        warnings.simplefilter('ignore')
        learn.fit(1)
    return look.steps[-1]

@pytest.mark.parametrize('make', [partial(DKD, warmup=1), NKD, DIST, StandardisedKD], ids=['DKD', 'NKD', 'DIST', 'StandardisedKD'])
def test_positions_of_a_dense_prediction_count_as_samples(make):
    z,y,zt = random_batch(3, 12)
    dense = lambda t: t.view(6, 2, 5).transpose(1, 2).contiguous()
    flat,flat_grad = loss_of(make(says(zt)), z, y)
    value,grad = loss_of(make(says(dense(zt))), dense(z), y.view(6, 2))
    assert value == pytest.approx(flat, rel=1e-9)
    torch.testing.assert_close(grad.transpose(1, 2).reshape(12, 5), flat_grad)

@pytest.mark.parametrize('make', [OnlineLabelSmoothing, MaxSup, partial(PSKD, .5), RDrop])
def test_methods_without_a_teacher_take_dense_predictions_too(make):
    z,y,_ = random_batch(4, 12)
    flat,_ = loss_of(make(), z, y)
    value,_ = loss_of(make(), z.view(6, 2, 5).transpose(1, 2).contiguous(), y.view(6, 2))
    assert value == pytest.approx(flat, rel=1e-9)

def test_positions_that_do_not_count_are_in_no_mean():
    z,y,zt = random_batch(5)
    y[:2] = -100
    teacher = ClassMeans()
    teacher.observe(Batch(y, zt))
    assert teacher.counts.sum() == ((zt.argmax(1) == y)[2:]).sum()
    for make in (partial(DKD, warmup=1), NKD, StandardisedKD, MaxSup):
        cb,short = (make() if make is MaxSup else make(says(t)) for t in (zt, zt[2:]))
        assert loss_of(cb, z, y)[0] == pytest.approx(loss_of(short, z[2:], y[2:])[0], rel=1e-9)

@pytest.mark.parametrize('dtype,tol', [(torch.float16, 1e-3), (torch.float32, 1e-6), (None, 1e-12)])
def test_a_table_keeps_predictions_to_the_precision_of_its_type(dtype, tol):
    table = SampleTable(8, dtype)
    z = 30*torch.randn(5, 7, dtype=torch.double)
    z[0, 0] = -1e6   # more than half precision holds
    table.write(torch.arange(5), z)
    rows,seen = table.read(torch.arange(8), z)
    assert seen.tolist() == [True]*5 + [False]*3 and rows.dtype == torch.double
    torch.testing.assert_close(rows[:5].softmax(1), z.softmax(1), rtol=0, atol=tol)

@pytest.mark.parametrize('make', [PSKD, DLB, CSKD])
def test_a_weighted_loader_that_draws_samples_twice_is_welcome(make):
    from fastai.callback.data import WeightedDL
    items = [(torch.randn(3, 8, 8), i%10) for i in range(48)]
    dls = with_index(DataLoaders(WeightedDL(items, bs=8, wgts=list(range(1, 49)), shuffle=True, num_workers=0), DataLoader(items, bs=8)))
    dls.c,seen = 10,[]
    class See(Callback):
        run_valid = False
        def before_batch(self): seen.append(batch_info(self.dl).idx.tolist())
    learn = learner(make(), See(), dls=dls)
    with learn.no_logging(): learn.fit(2)
    assert all(math.isfinite(loss) for loss in learn.recorder.losses) and any(len(set(idx)) < 8 for idx in seen)

def test_samples_of_other_lengths_are_padded_with_their_partners():
    from fastai.text.data import SortedDL, pad_input
    items = [(TensorText(torch.ones(3+i%5).long()), tensor(i%2)) for i in range(24)]
    dls = with_index(DataLoaders(SortedDL(items, bs=4, shuffle=True, before_batch=pad_input), SortedDL(items, bs=4, before_batch=pad_input)))
    twin = arranged(dls.train, Pairs(sample_labels(dls.train)))
    n = 0
    for x,y in twin:
        n += len(x)
        assert batch_info(twin).beside[0].shape == x.shape
    assert n == 24
