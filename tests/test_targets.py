"""Rewrites, subsets and weights of `fastkdtf.targets`, against `reference.py` (float64, one sample at a time) and for what must always hold."""
import copy, math, pickle, sys
from pathlib import Path

import numpy as np, pytest, torch
import torch.nn.functional as F
from hypothesis import given, settings, strategies as st

sys.path.insert(0, str(Path(__file__).parent))
import reference as ref
from fastkdtf.core import Step, TwoValued
from fastkdtf.targets import (
    Amplify, Correct, Regularization, Replace, SmoothTo, StudentAhead, Subset, TeacherCorrection, WSLWeight, log_odds)

given_quick = lambda *a, **k: lambda f: settings(max_examples=120, deadline=None)(given(*a, **k)(f))
some = lambda *shape, seed=0, scale=2.: torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)*scale

def strong_step(rewrite, strong, **kwargs):
    "A step as `Distill` makes it, with the second teacher's logits"
    step = Step(**kwargs)
    if isinstance(rewrite, Replace): step.extra_logits = {rewrite: strong}
    return step

def make(name, on=None):
    return {'correction': lambda: TeacherCorrection(.3, on), 'smooth': lambda: SmoothTo(.99, on), 'one-hot': lambda: SmoothTo(1., on),
            'amplify': lambda: Amplify(.2, on=on), 'amplify student': lambda: Amplify(.2, 'student', on), 'amplify to 1': lambda: Amplify(1., on=on),
            **{what: lambda what=what: Replace(lambda step: None, what, on) for what in ('full', 'partial', 'confidence')}}[name]()
NAMES = ['correction', 'smooth', 'one-hot', 'amplify', 'amplify student', 'amplify to 1', 'full', 'partial', 'confidence']
SUBSETS = {'all': None, 'correct': Correct(), 'wrong': ~Correct(), 'ahead': StudentAhead(), 'mined': Correct() & StudentAhead(), 'either': ~Correct() | StudentAhead()}

def dense(target, step): return target.dense(step.y, step.n_classes) if isinstance(target, TwoValued) else target


# ---------------------------------------------------------------- every rewrite gives a distribution

@st.composite
def extreme_logits(draw, n, k):
    "Rows whose probability of class 0 is 0, 1, 1e-30 or anything, as logarithms (with -inf), or as logits far apart"
    rows = []
    for _ in range(n):
        p = draw(st.sampled_from([0., 1., 1e-30, 1-1e-12, .5, .1]))
        rest = np.array(draw(st.lists(st.floats(0., 1.), min_size=k-1, max_size=k-1)))+1e-3*(p != 0)
        rest = rest/rest.sum() if rest.sum() > 0 else np.full(k-1, 1/(k-1))
        with np.errstate(divide='ignore'): row = np.log(np.concatenate([[p], (1-p)*rest]))
        rows.append(row*draw(st.sampled_from([1., 30.])) if np.isfinite(row).all() else row)
    return torch.tensor(np.array(rows))

@given_quick(data=st.data(), name=st.sampled_from(NAMES), on=st.sampled_from(list(SUBSETS)), k=st.integers(2, 6), several=st.booleans(), positions=st.booleans(),
             tau=st.sampled_from([(1., 1.), (.7, 1.), (4., 2.)]), dtype=st.sampled_from([torch.float32, torch.float64]))
def test_a_rewritten_target_is_a_distribution(data, name, on, k, several, positions, tau, dtype):
    n = 3
    zt,strong = (torch.stack([data.draw(extreme_logits(n, k)) for _ in range(2 if m else 1)]).to(dtype) for m in (several, False))
    z = data.draw(extreme_logits(n, k)).clamp(min=-1e4).to(dtype)
    zt,strong = (zt if several else zt[0]),strong[0]
    y = torch.tensor(data.draw(st.lists(st.sampled_from([0, 0, 1, -100]), min_size=n, max_size=n)))
    if positions: zt,strong,z,y = zt[...,None].expand(*zt.shape, 2),strong[...,None].expand(n, k, 2),z[...,None].expand(n, k, 2),y[:,None].expand(n, 2)
    rewrite = make(name, SUBSETS[on])
    step = strong_step(rewrite, strong, y=y, z=z, zt=zt, tau=tau)
    t = rewrite(step.pt, step)
    if isinstance(t, TwoValued): t = t.dense(y.clamp(min=0), k)
    axis = t.ndim-y.ndim
    assert t.shape in (z.shape, zt.shape) and t.isfinite().all()
    assert (t >= 0).all(), t.min()
    assert ((t.sum(axis)-1).abs() <= 1e-6).all(), (t.sum(axis)-1).abs().max()

@given_quick(data=st.data(), names=st.lists(st.sampled_from(NAMES), min_size=2, max_size=3))
def test_rewrites_in_a_row_give_a_distribution(data, names):
    zt,strong,z = (data.draw(extreme_logits(4, 4)).float() for _ in range(3))
    step = Step(torch.tensor([0,1,2,3]), z.clamp(min=-1e4), zt=zt)
    rewrites = [make(o, on=Correct()) for o in names]
    step.extra_logits = {o: strong for o in rewrites}
    t = step.pt
    for o in rewrites: t = o(t, step)
    assert (t >= 0).all() and ((t.sum(1)-1).abs() <= 1e-6).all()


# ---------------------------------------------------------------- values

@pytest.mark.parametrize('tau', [1., .7, 3.])
@pytest.mark.parametrize('name', NAMES)
def test_values(name, tau):
    n,k = 40,7
    z,zt,strong = some(n, k), some(n, k, seed=1), some(n, k, seed=2)
    y = torch.arange(n)%k
    rewrite = make(name)
    step = strong_step(rewrite, strong, y=y, z=z, zt=zt, tau=(tau, 2.))
    a,s,b,c = zt.numpy(),z.numpy(),strong.numpy(),y.numpy()
    expected = {'correction': lambda: ref.put_on_label(a, c, .3, tau), 'smooth': lambda: ref.smoothed(c, k, .99), 'one-hot': lambda: ref.one_hot(c, k),
                'amplify': lambda: ref.amplified(a, c, .2, tau), 'amplify student': lambda: ref.amplified(s, c, .2, 2.),
                'amplify to 1': lambda: ref.one_hot(c, k), **{w: lambda w=w: ref.replaced(a, b, c, w, tau) for w in ('full', 'partial', 'confidence')}}[name]()
    np.testing.assert_allclose(dense(rewrite(step.pt, step), step), expected, atol=1e-6 if 'o' in name[:3] else 1e-12)

@pytest.mark.parametrize('name', NAMES)
def test_a_subset_leaves_the_others_alone_in_full_precision(name):
    z,zt,strong,y = some(30, 5),some(30, 5, seed=1),some(30, 5, seed=2),torch.arange(30)%5
    whole,part = make(name),make(name, on=StudentAhead())
    steps = [strong_step(o, strong, y=y, z=z, zt=zt, tau=(.7, 1.)) for o in (whole, part)]
    t,ahead = part(steps[1].pt, steps[1]),StudentAhead()(steps[1])
    assert 0 < ahead.sum() < 30 and t.dtype == torch.float64
    assert torch.equal(t[~ahead], steps[1].pt[~ahead])
    torch.testing.assert_close(t[ahead], dense(whole(steps[0].pt, steps[0]), steps[0])[ahead].double(), atol=1e-6, rtol=0)

def test_the_gap_of_a_smoothed_target_is_exact_in_double_precision():
    step = Step(torch.tensor([1]), some(1, 3), zt=torch.tensor([[0.,9,0]], dtype=torch.float64))
    t = SmoothTo(.99, on=Correct())(step.pt, step)
    np.testing.assert_allclose(t, [[.005,.99,.005]], rtol=1e-14)

@pytest.mark.parametrize('name', NAMES)
def test_several_teachers_are_rewritten_one_by_one(name):
    z,zt,strong,y = some(12, 5),some(3, 12, 5, seed=1),some(12, 5, seed=2),torch.arange(12)%5
    rewrite = make(name, on=Correct())
    step = strong_step(rewrite, strong, y=y, z=z, zt=zt)
    t = rewrite(step.pt, step)
    assert t.shape == zt.shape
    for i,o in enumerate(zt):
        one = strong_step(rewrite, strong, y=y, z=z, zt=o)
        torch.testing.assert_close(t[i], rewrite(one.pt, one))

@pytest.mark.parametrize('name', NAMES)
def test_positions_are_samples(name):
    z,zt,strong,y = some(2, 5, 3, 4),some(2, 5, 3, 4, seed=1),some(2, 5, 3, 4, seed=2),torch.arange(24).view(2, 3, 4)%5
    flat = lambda t: t.movedim(1, -1).reshape(-1, 5)
    rewrite = make(name, on=~Correct() | StudentAhead())
    step = strong_step(rewrite, strong, y=y, z=z, zt=zt)
    row = strong_step(rewrite, flat(strong), y=y.flatten(), z=flat(z), zt=flat(zt))
    torch.testing.assert_close(flat(rewrite(step.pt, step)), rewrite(row.pt, row))

@pytest.mark.parametrize('name', NAMES)
def test_a_common_offset_of_logits_changes_nothing(name):
    z,zt,strong = ((some(12, 5, seed=i).float()*64).round()/64 for i in range(3))   # still exact beside the offset
    y = torch.arange(12)%5
    rewrite = make(name, on=StudentAhead())
    a,b = (strong_step(rewrite, strong+o, y=y, z=z+o, zt=zt+o, tau=(.7, 1.)) for o in (0., 8192.))
    torch.testing.assert_close(rewrite(a.pt, a), rewrite(b.pt, b), atol=1e-6, rtol=1e-5)

def test_no_gradient_reaches_a_target_or_a_weight():
    z = some(6, 4).requires_grad_()
    step = Step(torch.arange(6)%4, z, zt=some(6, 4, seed=1))
    for name in NAMES[:6]: assert not dense(make(name, on=StudentAhead())(step.pt, step), step).requires_grad
    assert not WSLWeight()(step).requires_grad and not StudentAhead()(step).requires_grad

def test_label_only_teachers_keep_their_closed_form():
    step = Step(torch.tensor([0,1]), torch.zeros(2, 4), zt=TwoValued(0., 0.))
    assert Amplify(.25)(step.pt, step) == pytest.approx((.5, .5/3))
    assert SmoothTo(.91)(step.pt, step) == pytest.approx((.91, .03))
    t = Amplify(.25, on=StudentAhead())(step.pt, step)   # nobody is ahead
    torch.testing.assert_close(t, torch.full((2, 4), .25))


# ---------------------------------------------------------------- subsets

@given_quick(data=st.data(), tau=st.sampled_from([(1., 1.), (.7, 1.), (4., 2.)]))
def test_subsets_are_what_the_paper_says(data, tau):
    grid = st.lists(st.lists(st.integers(-4, 4), min_size=4, max_size=4), min_size=5, max_size=5)
    z,zt = (torch.tensor(data.draw(grid)).double() for _ in range(2))
    y = np.array(data.draw(st.lists(st.integers(0, 3), min_size=5, max_size=5)))
    step = Step(torch.tensor(y), z, zt=zt, tau=tau)
    assert Correct()(step).tolist() == ref.is_correct(zt, y).tolist()
    p,pt = ref.softmax(z.numpy()/tau[1]),ref.softmax(zt.numpy()/tau[0])
    clear = abs(p-pt)[np.arange(5), y] > 1e-12
    assert (StudentAhead()(step).numpy() == (p > pt)[np.arange(5), y])[clear].all()

def test_comparisons_are_strict():
    same = torch.tensor([[3.,1,2],[2.,2,1]])
    step = Step(torch.tensor([0,0]), same, zt=same)
    assert not StudentAhead()(step).any()
    assert Correct()(step).tolist() == [True, False]   # beside another is not before it

def test_the_student_is_ahead_where_probabilities_have_no_digits_left():
    z,zt = torch.tensor([[60.,0,0],[50.,0,0],[-200.,0,0]]),torch.tensor([[50.,0,0],[60.,0,0],[-300.,0,0]])
    step = Step(torch.zeros(3, dtype=torch.long), z, zt=zt)
    assert step.p[:2,0].tolist() == step.pt[:2,0].tolist() == [1.,1.]
    assert StudentAhead()(step).tolist() == [True, False, True]

def test_classes_that_a_teacher_rules_out():
    "Logits of minus infinity, as an ensemble's or a mask's may be"
    no = -math.inf
    step = Step(torch.tensor([0,0,0]), torch.zeros(3, 3), zt=torch.tensor([[no,no,0.],[0.,no,no],[1.,0.,no]]))
    assert StudentAhead()(step).tolist() == [True, False, False] and Correct()(step).tolist() == [False, True, True]
    w = WSLWeight()(step)
    assert w.isfinite().all() and w[0] == 0 and w[1] == 1

def test_subsets_form_an_algebra():
    z,zt,y = some(200, 3),some(200, 3, seed=1),torch.arange(200)%3
    step = Step(y, z, zt=zt)
    c,a = Correct(),StudentAhead()
    assert Regularization is StudentAhead
    for x,b in ((~(c & a), ~c | ~a), (~(c | a), ~c & ~a), (~~c, c), ((c & a) | (c & ~a), c)): assert torch.equal(x(step), b(step))
    sizes = [int(o(step).sum()) for o in (c & a, c & ~a, ~c & a, ~c & ~a)]
    assert sum(sizes) == 200 and all(sizes)
    odd = lambda step: step.y%2 == 1
    assert torch.equal((c & odd)(step), c(step) & odd(step))
    assert 'Correct() & ~StudentAhead()' in repr(SmoothTo(.99, on=c & ~a))
    assert [o.inside_correct for o in (c, a, c & a, c | a, ~c, (c & a) | c)] == [True, False, True, False, False, True]
    assert torch.equal(pickle.loads(pickle.dumps(c & ~a))(step), (c & ~a)(step)) and torch.equal(copy.deepcopy(c | a)(step), (c | a)(step))
    with pytest.raises(TypeError): c & 3

def test_subsets_of_several_teachers_and_of_label_only_ones():
    z,zt,y = some(9, 4),some(2, 9, 4, seed=1),torch.arange(9)%4
    for subset in (Correct(), StudentAhead(), ~Correct() & StudentAhead()):
        both = subset(Step(y, z, zt=zt))
        assert both.shape == (2, 9)
        for i in range(2): assert torch.equal(both[i], subset(Step(y, z, zt=zt[i])))
    assert Correct()(Step(y, z, zt=TwoValued(2., 0.))).all() and not Correct()(Step(y, z, zt=TwoValued(0., 0.))).any()
    virtual = TwoValued(1., 0.)
    assert torch.equal(StudentAhead()(Step(y, z, zt=virtual)), StudentAhead()(Step(y, z, zt=virtual.dense(y, 4).double())))

def test_a_subset_of_ones_own():
    class Third(Subset):
        def __call__(self, step): return step.y%3 == 0
    step = Step(torch.arange(6), some(6, 6), zt=some(6, 6, seed=1))
    t = SmoothTo(.9, on=Third() & ~Third() | Third())(step.pt, step)
    assert (t[::3].diagonal(0) > 0).all() and torch.equal(t[1], step.pt[1]) and t[3,3].item() == pytest.approx(.9)


# ---------------------------------------------------------------- weights

@pytest.mark.parametrize('tau', [1., 2., 4.])
def test_weights(tau):
    z,zt,y = some(50, 6, scale=4.),some(50, 6, seed=1, scale=4.),torch.arange(50)%6
    w = WSLWeight(tau)(Step(y, z, zt=zt))
    np.testing.assert_allclose(w, ref.wsl_weights(z, zt, y.numpy(), tau), rtol=1e-10)
    assert (w >= 0).all() and (w <= 1).all()
    np.testing.assert_allclose(WSLWeight(tau)(Step(y, z.float(), zt=zt.float())), w, rtol=2e-5)

@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_a_solved_sample_has_no_weight(dtype):
    "EffDstl's code makes 0/0 = NaN of the first"
    z,zt = torch.tensor([[500.,0,0],[500.,0,0],[0.,500,0]], dtype=dtype),torch.tensor([[500.,0,0],[0.,1,2],[500.,0,0]], dtype=dtype)
    w = WSLWeight()(Step(torch.zeros(3, dtype=torch.long), z, zt=zt))
    assert w.isfinite().all() and (w[:2] < 1e-30).all() and w[2] == 1

def test_the_weight_falls_to_0_as_the_student_learns():
    step = lambda m: Step(torch.tensor([0]), torch.tensor([[m,0.,0.]]), zt=torch.tensor([[2.,0,0]]))
    w = [WSLWeight()(step(float(m))).item() for m in range(-4, 60, 2)]
    assert all(a > b or a == b == 0 for a,b in zip(w, w[1:])) and w[0] > .99 and w[-1] < 1e-12

def test_several_teachers_weigh_as_their_mean_distribution():
    z,zt,y = some(8, 5),some(3, 8, 5, seed=1),torch.arange(8)%5
    mean = torch.softmax(zt/2, 2).mean(0).log()*2
    torch.testing.assert_close(WSLWeight(2.)(Step(y, z, zt=zt)), WSLWeight(2.)(Step(y, z, zt=mean)))

@pytest.mark.parametrize('zt', [some(8, 5, seed=1), some(2, 8, 5, seed=1), TwoValued(2., 0.)], ids=['one', 'several', 'label-only'])
def test_weights_of_label_distributions_are_the_mixture(zt):
    z,q = some(8, 5),torch.softmax(some(8, 5, seed=3), 1)
    expected = sum(q[:,c]*WSLWeight(2.)(Step(torch.full((8,), c), z, zt=zt)) for c in range(5))
    torch.testing.assert_close(WSLWeight(2.)(Step(q, z, zt=zt)), expected, atol=1e-6, rtol=1e-6)

def test_log_odds():
    z,y = some(20, 4),torch.arange(20)%4
    p = torch.softmax(z/3, 1).gather(1, y[:,None])[:,0]
    torch.testing.assert_close(log_odds(z, y, 3.), p.logit())
    torch.testing.assert_close(log_odds(z.float()+8192, y).double(), log_odds((z.float()+8192).double(), y), atol=1e-4, rtol=1e-5)

@pytest.mark.parametrize('tau', [.5, 1., 4.])
def test_the_gradient_of_log_odds_is_that_of_their_definition(tau):
    z,y = some(20, 4).requires_grad_(),torch.arange(20)%4
    by_definition = (z/tau).gather(1, y[:,None])[:,0] - (z/tau).masked_fill(F.one_hot(y, 4).bool(), -math.inf).logsumexp(1)
    weights = some(20)
    found,expected = (torch.autograd.grad((odds*weights).sum(), z)[0] for odds in (log_odds(z, y, tau), by_definition))
    torch.testing.assert_close(found, expected)
    assert torch.autograd.gradgradcheck(lambda z: log_odds(z, y, tau), z)


# ---------------------------------------------------------------- labels that are probabilities


@pytest.mark.parametrize('name', NAMES)
def test_inside_correct_label_distributions_are_the_mixture_of_their_classes(name):
    n,k = 60,4
    z,zt,strong,q = some(n, k),some(n, k, seed=1),some(n, k, seed=2),torch.softmax(some(n, k, seed=3), 1)
    rewrite = make(name, on=Correct() & StudentAhead())
    def target(y):
        step = Step(y, z, zt=zt, tau=(.7, 1.))
        if isinstance(rewrite, Replace): step.extra_logits = {rewrite: strong}
        return rewrite(step.pt, step)
    expected = sum(q[:,c,None]*target(torch.full((n,), c)) for c in range(k))
    torch.testing.assert_close(target(q), expected)
    gate = [int((Correct() & StudentAhead())(Step(torch.full((n,), c), z, zt=zt, tau=(.7, 1.))).sum()) for c in range(k)]
    assert 0 < sum(gate) < n

def test_the_same_of_several_teachers():
    z,zt,q = some(20, 4),some(3, 20, 4, seed=1),torch.softmax(some(20, 4, seed=3), 1)
    rewrite,step = SmoothTo(.99, on=Correct()),Step(q, z, zt=zt)
    t = rewrite(step.pt, step)
    for i,o in enumerate(zt):
        one = Step(q, z, zt=o)
        torch.testing.assert_close(t[i], rewrite(one.pt, one))

def test_where_there_is_no_closed_form_it_says_so():
    q = torch.full((2, 4), .25)
    step = Step(q, torch.zeros(2, 4), zt=some(2, 4))
    for o in (Amplify(.1), Amplify(.1, 'student'), SmoothTo(.9, on=StudentAhead()), SmoothTo(.9, on=~Correct())):
        with pytest.raises(TypeError, match='needs integer labels, got probabilities'): o(step.pt, step)
    assert SmoothTo(.91)(step.pt, step) == pytest.approx((.91, .03))   # has one: `label_loss`
    virtual = Step(q, torch.zeros(2, 4), zt=TwoValued(1., 0.))
    with pytest.raises(TypeError, match='integer labels'): SmoothTo(.9, on=Correct())(virtual.pt, virtual)


# ---------------------------------------------------------------- bad input

@pytest.mark.parametrize('make,error,words', [
    (lambda: SmoothTo(0.), ValueError, r'confidence must be in \(0,1\], got 0.0'), (lambda: SmoothTo(1.01), ValueError, 'confidence'),
    (lambda: Amplify(0), ValueError, r'delta must be in \(0,1\], got 0'), (lambda: Amplify(-.1), ValueError, 'delta'), (lambda: Amplify('much'), TypeError, 'delta'),
    (lambda: Amplify(.1, 'pupil'), ValueError, "who must be one of 'teacher', 'student'"), (lambda: Replace(torch.zeros, 'none'), ValueError, 'what must be one of'),
    (lambda: Replace(None), TypeError, 'teacher must be a strong teacher'), (lambda: SmoothTo(.9, on=True), TypeError, 'on must be a function'),
    (lambda: WSLWeight(0), ValueError, 'tau'), (lambda: WSLWeight(eps=0), ValueError, 'eps')])
def test_bad_arguments(make, error, words):
    with pytest.raises(error, match=words): make()

def test_a_replacement_needs_its_teachers_logits():
    rewrite,step = Replace(lambda step: None),Step(torch.tensor([0]), torch.zeros(1, 3), zt=torch.zeros(1, 3))
    with pytest.raises(ValueError, match='rewrite='): rewrite(step.pt, step)
    step.extra_logits = {rewrite: torch.zeros(2, 1, 3)}
    with pytest.raises(ValueError, match='EnsembleTeacher'): rewrite(step.pt, step)


# ---------------------------------------------------------------- a second teacher, in a training

def train(cb, *cbs):
    "One epoch on points of four classes; the learner, and the loss of its first batch"
    import fastai.callback.all   # `no_bar`
    from fastai.basics import Callback, CrossEntropyLossFlat, DataLoader, DataLoaders, Learner
    from fastkdtf.callback.checkpoint import seed_run
    class First(Callback):
        order = 49
        def after_loss(self): self.seen = getattr(self, 'seen', None) or (self.learn.loss_grad.item(), self.learn.x, self.learn.y, self.learn.pred.detach())
    x,y = some(64, 6).float(),torch.arange(64)%4
    seed_run(0)
    data = list(zip(x + 2*torch.eye(6)[y], y))
    dls = DataLoaders(DataLoader(data, bs=16, num_workers=0), DataLoader(data, bs=16, num_workers=0), device='cpu')
    first,learn = First(),Learner(dls, torch.nn.Linear(6, 4), loss_func=CrossEntropyLossFlat(), cbs=cb)
    with learn.no_bar(), learn.no_logging(): learn.fit(1, cbs=[first, *cbs])
    return learn,first.seen

def linear(seed, k=4):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return torch.nn.Linear(6, k)

@pytest.mark.parametrize('what', ['full', 'partial', 'confidence'])
def test_distill_asks_the_strong_teacher(what):
    from fastkdtf.callback.distill import Distill
    weak,strong = linear(1),linear(2)
    rewrite = Replace(strong, what, on=StudentAhead())
    _,(loss,x,y,z) = train(Distill(weak, (0., 1.), 1., scale=1, loss='ce', rewrite=rewrite))
    a,b = weak(x).detach().numpy(),strong(x).detach().numpy()
    ahead = ref.is_ahead(z, a, y.numpy(), (1., 1.))
    target = np.where(ahead[:,None], ref.replaced(a, b, y.numpy(), what), ref.softmax(a.astype(float)))
    assert 0 < ahead.sum() < 16 and loss == pytest.approx(-(target*ref.log_softmax(z.double().numpy())).sum(1).mean(), rel=1e-5)
    assert strong.weight.grad is None and rewrite.teacher.copy is None

def test_a_strong_teacher_is_asked_once_a_batch_before_the_student():
    from fastai.callback.all import MixUp
    from fastkdtf.callback.distill import Distill
    from fastkdtf.teachers.base import Teacher
    calls = []
    class Strong(Teacher):
        before_student = True
        def attach(self, learn): calls.append('attach')
        def detach(self): calls.append('detach')
        def after_step(self): calls.append('step')
        def __call__(self, step):
            calls.append((step.z is None, torch.is_grad_enabled()))
            return linear(2)(step.xb[0])
    cb = Distill(linear(1), rewrite=[Amplify(.1), Replace(Strong(), on=Correct())])
    train(cb, MixUp())
    assert calls == ['attach', *[(True, False), 'step']*4, 'detach']
    twin = copy.deepcopy(cb)
    assert twin.rewrites[1] is not cb.rewrites[1] and list(twin.teachers) == [None, twin.rewrites[1]]
    assert len(pickle.dumps(Distill(linear(1), rewrite=Replace(torch.nn.Linear(1000, 1000))))) < 10_000

def test_a_strong_teacher_that_does_not_fit():
    from fastkdtf.callback.distill import Distill
    with pytest.raises(ValueError, match=r"student's shape \(16, 4\).*got \(16, 7\)"): train(Distill(linear(1), rewrite=Replace(linear(2, 7))))
    with pytest.raises(TypeError, match='teacher must be'): Distill(linear(1), rewrite=Replace(3))
    with pytest.raises(ValueError, match='not a number'): train(Distill(linear(1), rewrite=Replace(lambda step: step.z.detach()*float('nan'))))

def test_mixed_targets_of_a_subset_need_the_cross_entropy():
    from fastkdtf.callback.distill import Distill
    q = torch.softmax(some(4, 4), 1).float()
    step = Step(q, some(4, 4).float(), zt=some(4, 4, seed=1).float())
    rule = SmoothTo(.99, on=Correct())
    assert Distill(linear(1), loss='ce', rewrite=rule).sample_losses(step).isfinite().all()
    with pytest.raises(TypeError, match="loss='ce'"): Distill(linear(1), rewrite=rule).sample_losses(step)
