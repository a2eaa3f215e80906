"CachedTeacher and its store: values, keys, faults, interruption, several writers"
import errno, json, multiprocessing, os, pickle, random, resource, shutil, signal, time
from copy import deepcopy
from types import SimpleNamespace

import numpy as np, pytest, torch
from fastai.basics import Callback, CrossEntropyLossFlat, DataLoaders, Learner, accuracy, load_learner
from fastai.callback.all import MixUp, ProgressCallback
from hypothesis import given, settings, strategies as st
from torch import nn

import fastkdtf.teachers.cache as cache
from fastkdtf.vision.augment import Augment
from fastkdtf.teachers.cache import CachedTeacher, LogitStore, key_samples, pack_logits, sample_keys, unpack_logits
from fastkdtf.core import Step, TwoValued, soften
from fastkdtf.vision.data import kd_dataloaders
from fastkdtf.callback.distill import KnowledgeDistillation
from fastkdtf.vision.identity import loader_identity
from fastkdtf.vision.loader import with_index
from fastkdtf.callback.checkpoint import seed_run
from fastkdtf.teachers.network import EnsembleTeacher, NetworkTeacher
from fastkdtf.teachers.base import Teacher, UniformTeacher

N,K = 40,12


class Fake(Teacher):
    "Logits that depend on the input alone, which is (index, view)"
    before_student = True
    def __init__(self, name='a', k=K): self.name,self.k,self.asked,self.attached = name,k,0,0
    def attach(self, learn): self.attached += 1
    def __call__(self, step):
        self.asked += len(step.xb[0])
        return logits_of(step.xb[0], self.k)
    def __repr__(self): return f'Fake({self.name})'


def logits_of(x, k=K):
    i,v = x.double().unbind(1)
    return (7*torch.sin(1.3*i[:,None] + .7*torch.arange(k) + 2.1*v[:,None]) + .1*i[:,None]).float()


class FakeLoader:
    "Knows its samples and makes them again"
    bs,n_inp,dataset,augments = 8,1,range(N),True
    def __init__(self, identity='data', views=1): self.identity,self.augment = identity,SimpleNamespace(views=views)
    def batch_of(self, idx, view): return torch.stack([idx, view], 1).float(), idx % 3


def learner(identity='data', vocab=None, views=1): return SimpleNamespace(dls=SimpleNamespace(train=FakeLoader(identity, views), vocab=vocab), epoch=0)


def identity_of(dl):
    if dl.identity is None: raise ValueError('Rotate is random')
    return dl.identity


@pytest.fixture(autouse=True)
def fake_identity(monkeypatch): monkeypatch.setattr(cache, 'loader_identity', identity_of)


def step(idx, view=None):
    idx = torch.as_tensor(idx)
    view = torch.zeros_like(idx) if view is None else torch.as_tensor(view)
    return Step(idx % 3, None, (torch.stack([idx, view], 1).float(),), idx=idx, view=view)


def relative(z): return z - z.max(1, keepdim=True).values


def attached(path, teacher=None, learn=None, **kwargs):
    teacher = CachedTeacher(teacher or Fake(), path, **kwargs)
    teacher.attach(learn or learner())
    return teacher


def keys(*idx, view=0): return sample_keys(torch.tensor(idx), torch.full((len(idx),), view))


# what is stored

@pytest.mark.parametrize('dtype', ['float16', 'float32'])
def test_packed_logits_are_the_live_ones(dtype):
    z = 6*torch.randn(64, 30) + 100
    back = unpack_logits(*pack_logits(z, dtype=getattr(torch, dtype)), 30)
    torch.testing.assert_close(back, relative(z), rtol=0 if dtype == 'float32' else 2**-11, atol=0)
    if dtype == 'float32': assert torch.equal(soften(back, 4., 30), soften(z, 4., 30))


@settings(max_examples=50, deadline=None)
@given(k=st.integers(1, 9), scale=st.floats(.01, 50), seed=st.integers(0, 1000))
def test_top_k_keeps_its_probabilities_and_spreads_the_rest(k, scale, seed):
    z = scale*torch.randn(5, 10, generator=torch.Generator().manual_seed(seed))
    p = torch.softmax(unpack_logits(*pack_logits(z, k, torch.float32), 10).double(), 1)
    live = torch.softmax(z.double(), 1)
    torch.testing.assert_close(p.sum(1), torch.ones(5).double())
    for row,want in zip(p, live):
        best = want.argsort(descending=True)
        torch.testing.assert_close(row[best[:k]], want[best[:k]], rtol=1e-5, atol=1e-12)
        torch.testing.assert_close(row[best[k:]], ((want[best[k:]]).sum()/(10-k)).expand(10-k), rtol=1e-4, atol=1e-12)


def test_classes_that_are_impossible_stay_so():
    z = torch.tensor([[0.,1.,-float('inf'),2.]])
    for k in (None, 1, 2, 3): assert torch.softmax(unpack_logits(*pack_logits(z, k), 4), 1).isfinite().all()
    assert soften(unpack_logits(*pack_logits(z), 4), 4., 4)[0,2] == 0


@pytest.mark.parametrize('bad', [float('nan'), float('inf')])
def test_nan_is_not_stored(tmp_path, bad):
    class Broken(Fake):
        def __call__(self, step): return super().__call__(step).index_fill(1, torch.tensor([2]), bad)
    t = attached(tmp_path/'c', Broken())
    with pytest.raises(ValueError, match='NaN or infinite.*nothing of this batch was stored'): t(step([1, 2]))
    assert len(t.store) == 0


@given(st.lists(st.tuples(st.integers(0, 2**32-1), st.integers(0, 2**31-1)), min_size=1))
def test_keys_tell_samples_apart(samples):
    idx,view = map(torch.tensor, zip(*samples))
    k = sample_keys(idx, view)
    assert len(set(k.tolist())) == len(set(samples))
    assert [o.tolist() for o in key_samples(k)] == [idx.tolist(), view.tolist()]


@pytest.mark.parametrize('idx,view', [(-1, 0), (2**32, 0), (0, -1), (0, 2**31)])
def test_keys_out_of_range(idx, view):
    with pytest.raises(ValueError, match='indices must be in'): sample_keys(torch.tensor([3, idx]), torch.tensor([0, view]))


# any order of batches gives what the live teacher gives

@settings(max_examples=30, deadline=None)
@given(st.lists(st.lists(st.tuples(st.integers(0, 30), st.integers(0, 3)), min_size=1, max_size=9), min_size=1, max_size=8),
       st.sampled_from([(None, 'float16'), (None, 'float32'), (3, 'float32')]), st.sampled_from([1, 200, 2**20]), st.data())
def test_any_order_of_batches(tmp_path_factory, batches, form, chunk, data):
    path,(top_k,dtype) = tmp_path_factory.mktemp('cache')/'c',form
    seen,fake = set(),Fake()
    t = attached(path, fake, top_k=top_k, dtype=dtype)
    for batch in batches:
        if data.draw(st.booleans()): t.detach(); t = attached(path, fake, top_k=top_k, dtype=dtype)   # another process, or the next fit
        t.store.chunk = chunk
        s,before = step(*map(list, zip(*batch))),fake.asked
        z,live = t(s),logits_of(s.xb[0])
        assert fake.asked - before == sum(o not in seen for o in batch)
        seen.update(batch)
        if top_k is None: torch.testing.assert_close(z, relative(live), rtol=2**-11 if dtype == 'float16' else 0, atol=0)
        else:
            torch.testing.assert_close(z, unpack_logits(*pack_logits(live, top_k, torch.float32), K), rtol=0, atol=0)
            torch.testing.assert_close(soften(z, 1., K).topk(3).values, soften(live, 1., K).topk(3).values, rtol=1e-4, atol=1e-6)
    t.detach()
    assert len(LogitStore(path, 'Fake(a)', t.store.about['data'], top_k, dtype)) == len(seen) == t.store.rows


def test_first_and_second_reading_are_equal(tmp_path):
    t = attached(tmp_path/'c', top_k=4)
    first = t(step(range(20)))
    assert torch.equal(t(step(range(20))), first)
    t.detach()
    assert torch.equal(attached(tmp_path/'c', top_k=4)(step(range(20))), first)


def test_other_views_are_other_rows(tmp_path):
    t = attached(tmp_path/'c', dtype='float32')
    a,b = t(step([5], [0])),t(step([5], [1]))
    assert not torch.equal(a, b) and t.teacher.asked == 2
    s = step([5, 6])
    s.view = None
    assert torch.equal(t(s)[:1], a)


def test_hit_rate_of_the_epoch(tmp_path):
    learn = learner()
    t = attached(tmp_path/'c', learn=learn)
    assert np.isnan(t.hit_rate)
    t(step([1, 2])); t(step([2, 3]))
    assert (t.hits, t.calls) == (1, 4) and t.columns['hit_rate']() == .25
    learn.epoch = 1
    t(step([1, 2, 3]))
    assert t.hit_rate == 1
    t.detach()
    assert t.hit_rate == 1
    t.attach(learn)
    assert t.calls == 0


def test_several_inputs_and_labels_are_cut_alike(tmp_path):
    class Sees(Fake):
        def __call__(self, step):
            assert len(step.xb[1]) == len(step.y) == len(step.idx) == len(step.view) == len(step.xb[0])
            assert (step.xb[1] == step.idx).all() and (step.y == step.idx % 3).all() and step.xb[2] == 'text'
            return super().__call__(step)
    t = attached(tmp_path/'c', Sees())
    for idx in ([1, 2], [2, 9, 1, 4]):
        s = step(idx)
        s.xb = (*s.xb, s.idx.clone(), 'text')
        t(s)


# refusals

@pytest.mark.parametrize('change,says', [
    (dict(teacher=Fake('b')), r'the teacher \(its weights'), (dict(learn=learner('other')), r'the data \(images'), (dict(learn=learner(vocab=['x', 'y'])), r'the data'),
    (dict(top_k=5), r'top_k \(3 there, 5 here\)'), (dict(top_k=None), r'top_k \(3 there, None here\)'), (dict(dtype='float32'), r"dtype \('float16' there, 'float32' here\)"),
    (dict(top_k=5, dtype='float32'), 'top_k.* and dtype.* differs; give CachedTeacher another path, or delete this folder')])
def test_another_cache_is_refused(tmp_path, change, says):
    t = attached(tmp_path/'c', top_k=3)
    t(step([1])); t.detach()
    with pytest.raises(ValueError, match=says): attached(tmp_path/'c', **{**dict(top_k=3), **change})


def test_another_number_of_classes_is_refused(tmp_path):
    t = attached(tmp_path/'c')
    t(step([1])); t.detach()
    with pytest.raises(ValueError, match='holds logits of 12 classes, and the teacher returned 9'): attached(tmp_path/'c', Fake(k=9))(step([2]))
    with pytest.raises(ValueError, match='top_k must be below the number of classes, 12'): attached(tmp_path/'d', top_k=12)(step([2]))


def test_random_pipelines_are_refused(tmp_path):
    t = CachedTeacher(Fake(), tmp_path/'c')
    with pytest.raises(ValueError, match='CachedTeacher must know an image.*Rotate is random'): t.attach(learner(None))
    with pytest.raises(ValueError, match='a new version of an image every time.*views=8'): t.attach(learner(views=None))
    assert not t.teacher.attached and not (tmp_path/'c').exists()


def test_unknown_samples_are_refused(tmp_path):
    s = step([1])
    s.idx = None
    with pytest.raises(ValueError, match=r'MixUp and CutMix.*with_index\(dls\)'): attached(tmp_path/'c')(s)
    with pytest.raises(ValueError, match=r'attach\(learn\) opens it'): CachedTeacher(Fake(), tmp_path/'c')(step([1]))


@pytest.mark.parametrize('out', [TwoValued(1., 0.), torch.zeros(2, 3, 4), torch.zeros(4), torch.zeros(1, 5)])
def test_only_logits_of_one_teacher(tmp_path, out):
    class Odd(Fake):
        def __call__(self, step): return out
    with pytest.raises(ValueError, match=r'a cache holds logits \[N,K\], here \[3,K\]'): attached(tmp_path/'c', Odd())(step([1, 2, 3]))


def test_arguments(tmp_path):
    for teacher in (UniformTeacher(), lambda step: step.z, CachedTeacher(Fake(), tmp_path)):
        with pytest.raises(TypeError, match='a cache takes a network'): CachedTeacher(teacher, tmp_path)
    with pytest.raises(TypeError, match='at every temperature; cache its networks'): CachedTeacher(EnsembleTeacher([Fake(), Fake('b')]), tmp_path)
    CachedTeacher(EnsembleTeacher([Fake(), Fake('b')], 'logits'), tmp_path)
    EnsembleTeacher([CachedTeacher(Fake(), tmp_path/'a'), CachedTeacher(Fake('b'), tmp_path/'b')])
    with pytest.raises(ValueError, match='top_k must be at least 1'): CachedTeacher(Fake(), tmp_path, top_k=0)
    with pytest.raises(ValueError, match="dtype must be one of 'float16', 'float32'"): CachedTeacher(Fake(), tmp_path, dtype='int8')
    (tmp_path/'file').touch()
    with pytest.raises(ValueError, match='path must be a folder'): attached(tmp_path/'file')


def test_copies_and_pickles_leave_the_cache_behind(tmp_path):
    t = attached(tmp_path/'c')
    t(step(range(30)))
    for twin in (deepcopy(t), pickle.loads(pickle.dumps(t))):
        assert twin.store is None and twin.learn is None and repr(twin) == repr(t)
    t.detach()
    twin.attach(learner())
    assert torch.equal(twin(step([3])), t(step([3])))


# damage

class Otherwise(nn.Module):
    "Says something else when it is asked again"
    def __init__(self, how):
        super().__init__()
        self.how,self.fc,self.n,self.last = how,nn.Linear(2, K),0,None
        self.register_buffer('calls', torch.zeros(()))
    def forward(self, x):
        z = self.fc(x)
        if self.how == 'noise': return z + torch.randn_like(z)
        if self.how == 'attribute':
            self.n += 1
            return z*self.n
        if self.how == 'buffer':
            self.calls += 1
            return z*self.calls
        if self.how == 'previous':
            before,self.last = self.last,z.detach().mean(0)
            return z if before is None else z + before
        self.n += 1   # which it does not look at
        return z

@pytest.mark.parametrize('fast', [True, False])
@pytest.mark.parametrize('how', ['noise', 'attribute', 'buffer', 'previous', 'counts only'])
@pytest.mark.parametrize('several', [False, True])
def test_a_teacher_that_answers_otherwise_when_asked_again_is_refused_before_anything_is_kept(how, fast, several, tmp_path):
    teacher = NetworkTeacher(Otherwise(how), fast=fast, teacher_norm=None)
    given = EnsembleTeacher([NetworkTeacher(nn.Linear(2, K), teacher_norm=None), teacher], 'logits') if several else teacher
    cached = CachedTeacher(given, tmp_path/'c')
    learn = SimpleNamespace(**vars(learner()), loss_func=nn.CrossEntropyLoss(), model=nn.Linear(2, K), cbs=[], xb=(torch.zeros(4, 2),))
    cached.attach(learn)
    idx = torch.arange(4)
    batch = Step(idx % 3, xb=(torch.stack([idx, idx], 1).float(),), idx=idx, view=torch.zeros_like(idx))
    if how == 'counts only': assert cached(batch).shape == (4, K)
    else:
        with pytest.raises(ValueError, match='answers otherwise when it is asked again.*use the live teacher'): cached(batch)
        cached.detach()
        assert not (tmp_path/'c'/'rows.bin').exists()

@pytest.fixture
def filled(tmp_path):
    t = attached(tmp_path/'c')
    t(step(range(20))); t.detach()
    return tmp_path/'c'


def flip(path, at):
    raw = bytearray(path.read_bytes())
    raw[at] ^= 1
    path.write_bytes(raw)


def test_truncated_rows(filled):
    size = (filled/'rows.bin').stat().st_size
    os.truncate(filled/'rows.bin', size-1)
    with pytest.raises(ValueError, match='rows.bin is truncated, with 19 of 20 rows: delete the folder'): attached(filled)
    (filled/'rows.bin').unlink()
    with pytest.raises(ValueError, match='truncated, with 0 of 20 rows'): attached(filled)


@pytest.mark.parametrize('at', [0, 100, -1])
def test_one_flipped_bit_is_seen(filled, at):
    flip(filled/'rows.bin', at)
    with pytest.raises(ValueError, match='damaged, as its checksum shows'): attached(filled)


@pytest.mark.parametrize('text,says', [('', 'is damaged'), ('{"about": {', 'is damaged'), ('[]', 'is not the manifest'), ('{"rows": 3}', 'is not the manifest'), ('\udcff', 'is damaged')])
def test_damaged_manifest(filled, text, says):
    (filled/'manifest.json').write_bytes(text.encode('utf-8', 'surrogateescape'))
    with pytest.raises(ValueError, match=says): attached(filled)


@pytest.mark.parametrize('field,value,says', [('rows', 21, 'truncated'), ('rows', 19, 'checksum'), ('crc32', 1, 'checksum'), ('n_classes', 13, 'truncated'), ('n_classes', 11, 'checksum'), ('rows', -1, 'is not the manifest')])
def test_changed_manifest(filled, field, value, says):
    m = json.loads((filled/'manifest.json').read_text())
    (filled/'manifest.json').write_text(json.dumps({**m, field: value}))
    with pytest.raises(ValueError, match=says): attached(filled)


def test_deleted_in_use_and_used_again(filled):
    t = attached(filled)
    t(step([30]))
    shutil.rmtree(filled)
    with pytest.raises(ValueError, match='was deleted while in use'): t.detach()
    t.attach(learner())
    t(step([30])); t.detach()
    assert len(attached(filled).store) == 1


# interruption

def test_rows_that_do_not_count_are_replaced(filled):
    with open(filled/'rows.bin', 'ab') as f: f.write(b'x'*1000)
    t = attached(filled)
    assert len(t.store) == 20
    t(step(range(25))); t.detach()
    torch.testing.assert_close(attached(filled, Broken())(step(range(25))), relative(logits_of(step(range(25)).xb[0])), rtol=1e-3, atol=1e-3)


class Broken(Fake):
    def __call__(self, step): raise AssertionError('the cache should know')


@pytest.mark.parametrize('where', ['fsync', 'replace'])
@pytest.mark.parametrize('error', [OSError(errno.ENOSPC, 'No space left on device'), KeyboardInterrupt()])
def test_a_failed_write_loses_nothing(filled, monkeypatch, where, error):
    t = attached(filled)
    z = t(step(range(18, 40)))
    with monkeypatch.context() as m:
        def fail(*args): raise error
        m.setattr(cache.os, where, fail)
        with pytest.raises(type(error)) as e: t.detach()
        if isinstance(error, OSError):
            assert e.value.errno == errno.ENOSPC
            for o in ('cannot write', str(filled), 'No space left', 'Its 20 rows on disk are good', 'make room'): assert o in str(e.value)
    assert len(attached(filled).store) == 20   # others see what was there
    t.attach(learner())   # what waited in memory is written by the next fit
    assert t.store.rows == 40 and torch.equal(attached(filled, Broken())(step(range(18, 40))), z)


def test_a_disk_that_fills_up_within_a_write(tmp_path):
    t = attached(tmp_path/'c')
    t(step(range(5))); t.detach()
    t(step(range(200)))
    soft,hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    old = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
        with pytest.raises(OSError, match='Its 5 rows on disk are good'): t.detach()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, old)
    assert (tmp_path/'c'/'rows.bin').stat().st_size == 1000 and len(attached(tmp_path/'c').store) == 5
    t.detach()
    assert len(attached(tmp_path/'c', Broken()).store) == 200


def test_an_interrupt_after_the_manifest(filled, monkeypatch):
    t = attached(filled)
    t(step(range(30)))
    with monkeypatch.context() as m:
        def fail(*args): raise KeyboardInterrupt
        m.setattr(LogitStore, '_take', fail)
        with pytest.raises(KeyboardInterrupt): t.store._append(t.store.pending)
    t.detach()
    assert t.store.rows == len(attached(filled).store) == 30


fork = multiprocessing.get_context('fork')

def store_at(path): return LogitStore(path, 'teacher', 'data')

def write(path, first, last, kill_in=None):
    "Another process, which writes 50 rows at a time; killed at the fourth call of a function of `os`"
    def work():
        if kill_in:
            function,calls = getattr(os, kill_in),[]
            def killing(*args):
                calls.append(args)
                if len(calls) > 3: os.kill(os.getpid(), signal.SIGKILL)
                return function(*args)
            setattr(os, kill_in, killing)
        store = store_at(path)
        for i in range(first, last, 50):
            idx = torch.arange(i, i+50)
            k = sample_keys(idx, 0*idx)
            new = store.find(k) < 0
            if new.any(): store.add(k[new], *pack_logits(sines(idx[new])), 20)
            store.commit()
    p = fork.Process(target=work)
    p.start()
    return p

def sines(idx): return torch.sin(idx[:,None]*torch.arange(1., 21))

def check_rows(path, idx):
    store = store_at(path)
    rows = store.find(sample_keys(idx, 0*idx))
    assert (rows >= 0).all()
    torch.testing.assert_close(unpack_logits(*store.read(rows), 20), relative(sines(idx)), rtol=2**-10, atol=1e-6)
    return store


@pytest.mark.parametrize('kill_in', [None, 'fsync', 'replace'])
def test_killed_while_writing(tmp_path, kill_in):
    path,n = tmp_path/'c',0
    for i in range(4):
        p = write(path, 0, 10**7, kill_in)
        if kill_in is None:
            end = time.monotonic() + 20
            while len(store_at(path)) <= n and time.monotonic() < end: time.sleep(.001)
            time.sleep(random.random()*.02)
            p.kill()
        p.join()
        assert p.exitcode == -signal.SIGKILL
        n,before = len(store_at(path)),n
        assert n > before and n % 50 == 0
        check_rows(path, torch.arange(n))
    p = write(path, 0, n+500)   # goes on, over what the dead ones left behind
    p.join()
    assert p.exitcode == 0 and len(check_rows(path, torch.arange(n+500))) == n+500


def test_two_writers_share_a_cache(tmp_path):
    ps = [write(tmp_path/'c', 0, 1500), write(tmp_path/'c', 500, 2000)]
    for p in ps: p.join()
    assert [p.exitcode for p in ps] == [0, 0]
    assert len(check_rows(tmp_path/'c', torch.arange(2000))) == 2000   # nobody wrote what the other had written


def test_two_trainings_at_once(tmp_path):
    a,b = attached(tmp_path/'c'),attached(tmp_path/'c')
    za,zb = a(step(range(20))),b(step(range(10, 30)))
    a.detach(); b.detach()
    assert b.store.rows == 30 and torch.equal(za[10:], zb[:10])
    assert torch.equal(attached(tmp_path/'c', Broken())(step(range(30))), torch.cat([za, zb[10:]]))


def test_a_read_only_cache_is_read(filled):
    if os.geteuid() == 0: pytest.skip('root may write everywhere')
    filled.chmod(0o500)
    try: attached(filled, Broken())(step(range(20)))
    finally: filled.chmod(0o700)


# fill and verify

def test_fill_and_go_on(tmp_path):
    t = CachedTeacher(Fake(), tmp_path/'c')
    class Stops(Fake):
        def __call__(self, step):
            if self.asked >= 24: raise KeyboardInterrupt
            return super().__call__(step)
    stopped = CachedTeacher(Stops(), tmp_path/'c')
    with pytest.raises(KeyboardInterrupt): stopped.fill(learner(views=2))
    t.fill(learner(views=2), bs=16)
    assert t.teacher.asked == 2*N-24 and t.store.rows == 2*N
    t.fill(learner(views=2))
    assert t.teacher.asked == 2*N-24


@pytest.mark.parametrize('kwargs', [{}, dict(dtype='float32'), dict(top_k=3), dict(top_k=3, dtype='float32')])
def test_verify(tmp_path, kwargs):
    t = CachedTeacher(Fake(), tmp_path/'c', **kwargs)
    assert t.verify(learner()) == (0, 0.)
    t.fill(learner(views=3))
    found = t.verify(learner(views=3), n=100, bs=30)
    assert found.n == 100 and found.error <= (2**-11 if t.dtype == 'float16' else 1e-6)
    class Drifted(Fake):
        def __call__(self, step): return super().__call__(step)*(1+.01*(step.idx == 7)[:,None])
    with pytest.raises(ValueError, match='is not what Fake'): CachedTeacher(Drifted(), tmp_path/'c', **kwargs).verify(learner(views=3), n=3*N)


# with a learner

def network(seed):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Flatten(), nn.Linear(3*8*8, 24), nn.BatchNorm1d(24), nn.ReLU(), nn.Linear(24, 10))


def fit(method, n_epoch=2, dls=None, cbs=(), augment=Augment(pad=1, views=2)):
    seed_run(3)
    dls = dls or kd_dataloaders('digits', bs=64, augment=augment, train_subset=256, device='cpu')
    seed_run(3, dls)
    learn = Learner(dls, network(1), loss_func=CrossEntropyLossFlat(), metrics=accuracy, cbs=[method, *cbs]).remove_cb(ProgressCallback)
    with learn.no_logging(): learn.fit(n_epoch)
    return learn


@pytest.fixture(scope='module')
def teacher(): return NetworkTeacher(network(0).eval())


@pytest.fixture
def real_identity(monkeypatch): monkeypatch.setattr(cache, 'loader_identity', loader_identity)


def columns(learn, name):
    at = list(learn.recorder.metric_names).index(name) - 1
    return [o[at] for o in learn.recorder.values]


@pytest.mark.parametrize('augment', [None, Augment(pad=1, flip=True, rotate=10, views=3)])
def test_trains_as_the_live_teacher_does(tmp_path, teacher, real_identity, augment):
    live = fit(KnowledgeDistillation(teacher), augment=augment)
    for again in (False, True):
        t = CachedTeacher(teacher, tmp_path/'c', dtype='float32')
        learn = fit(KnowledgeDistillation(t), augment=augment)
        for a,b in zip(learn.model.state_dict().values(), live.model.state_dict().values()): torch.testing.assert_close(a, b, rtol=0, atol=1e-6)
        rates = columns(learn, 'hit_rate')
        if again:             assert rates == [1, 1]
        elif augment is None: assert rates == [0, 1]
        else:                 assert rates[0] == 0 < rates[1] < 1
        assert columns(learn, 'soft_loss') == pytest.approx(columns(live, 'soft_loss'), rel=1e-5)
    assert t.verify(live).error < 1e-5


def test_fill_then_train_without_asking(tmp_path, teacher, real_identity):
    learn = fit(KnowledgeDistillation(teacher), n_epoch=1)
    t = CachedTeacher(teacher, tmp_path/'c')
    t.fill(learn)
    assert t.store.rows == 2*256
    assert t.verify(learn, n=200).error < 1e-3
    assert columns(fit(KnowledgeDistillation(t)), 'hit_rate') == [1, 1]


def test_another_teacher_data_or_augmentation_with_a_learner(tmp_path, teacher, real_identity):
    fit(KnowledgeDistillation(CachedTeacher(teacher, tmp_path/'c')), n_epoch=1)
    with pytest.raises(ValueError, match='the teacher .* differs'): fit(KnowledgeDistillation(CachedTeacher(network(5), tmp_path/'c')))
    for augment in (None, Augment(pad=2, views=2)):
        with pytest.raises(ValueError, match='the data .* differs'): fit(KnowledgeDistillation(CachedTeacher(teacher, tmp_path/'c')), augment=augment)
    with pytest.raises(ValueError, match='a new version of an image every time'): fit(KnowledgeDistillation(CachedTeacher(teacher, tmp_path/'c')), augment=Augment(pad=1))
    with pytest.raises(ValueError, match='MixUp'): fit(KnowledgeDistillation(CachedTeacher(teacher, tmp_path/'c')), cbs=[MixUp()])


def test_other_loaders(tmp_path, teacher, real_identity):
    x = torch.randn(96, 3, 8, 8)
    items = [(o, int(i % 10)) for i,o in enumerate(x)]
    make = lambda: DataLoaders.from_dsets(items[:64], items[64:], bs=16, shuffle=True, device='cpu', num_workers=0)
    with pytest.raises(ValueError, match=r'with_index\(dls\)'): fit(KnowledgeDistillation(CachedTeacher(teacher, tmp_path/'c')), dls=make())
    for rates in ([0, 1], [1, 1]):
        t = CachedTeacher(teacher, tmp_path/'c')
        learn = fit(KnowledgeDistillation(t), dls=with_index(make()))
        assert columns(learn, 'hit_rate') == rates
    assert t.verify(learn).error < 1e-3


def test_export_leaves_teacher_and_cache_out(tmp_path, teacher, real_identity):
    learn,plain = fit(KnowledgeDistillation(CachedTeacher(teacher, tmp_path/'c'))),fit(KnowledgeDistillation(teacher))
    sizes = []
    for o in (learn, plain):
        o.export(tmp_path/'o.pkl')
        sizes.append((tmp_path/'o.pkl').stat().st_size)
    assert abs(sizes[0] - sizes[1]) < 2000
    learn.export(tmp_path/'o.pkl')
    with pytest.warns(UserWarning): loaded = load_learner(tmp_path/'o.pkl')
    assert loaded.dls.vocab == learn.dls.vocab


def test_interrupted_fit_goes_on(tmp_path, teacher, real_identity):
    class Stop(Callback):
        order = 90
        def after_batch(self):
            if self.training and self.train_iter == 3: raise KeyboardInterrupt
    t = CachedTeacher(teacher, tmp_path/'c')
    with pytest.raises(KeyboardInterrupt): fit(KnowledgeDistillation(t), cbs=[Stop()], augment=None)
    assert len(t.store) == t.store.rows == 192    # what an interrupt leaves is written at once
    assert columns(fit(KnowledgeDistillation(t), augment=None), 'hit_rate') == [.75, 1]
