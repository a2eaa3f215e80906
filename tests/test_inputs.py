"""A teacher reads what the student reads: images, tables, words. What is right comes from the teacher's own loaders, or from plain arithmetic."""
import copy, warnings
from functools import partial
from types import SimpleNamespace

import numpy as np, pandas as pd, pytest, timm, torch, torch.nn.functional as F
from fastai.basics import CategoryBlock, CrossEntropyLossFlat, DataLoaders, Datasets, Learner, Transform, load_learner
from fastai.callback.all import ProgressCallback
from fastai.data.transforms import Normalize, ToTensor
from fastai.layers import Lambda
from fastai.tabular.all import Categorify, FillMissing, FillStrategy, TabularDataLoaders, TabularProc, tabular_learner
from fastai.torch_core import TensorImage, fastuple
from fastai.vision.core import TensorMask
from hypothesis import given, settings, strategies as st
from torch import nn

from fastkdtf.callback.distill import KnowledgeDistillation
from fastkdtf.core import Batch, first_output
from fastkdtf.teachers.base import Teacher
from fastkdtf.teachers.inputs import image_places, map_tensors, table_scale, tensors_in, translate_table
from fastkdtf.teachers.network import EnsembleTeacher, NetworkTeacher

@pytest.fixture(autouse=True)
def start(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)

def close(a, b, tol=1e-4): torch.testing.assert_close(a, b, rtol=tol, atol=tol*b.abs().max().item())

# ---------------------------------------------------------------- D1. tables

def rows(n=60, seed=0, shift=0., factor=1., missing=True):
    "A table with two columns of numbers, one of which has gaps, and a column of names; the label follows from all three"
    rng = np.random.default_rng(seed)
    df = pd.DataFrame(dict(weight=rng.normal(3, 2, n)*factor+shift, length=rng.normal(-1, 5, n)*factor, colour=rng.choice(['red', 'green'], n)))
    df['fruit'] = np.where(df.weight + df.length > 2, 'apple', 'pear')
    if missing: df.loc[rng.choice(n, n//4, replace=False), 'weight'] = np.nan
    return df

def table(df, procs=(Categorify, FillMissing, Normalize), **kwargs):
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        return TabularDataLoaders.from_df(df, procs=list(procs), cat_names=['colour'], cont_names=['weight', 'length'], y_names='fruit',
                                          y_block=CategoryBlock(), bs=16, valid_idx=list(range(8)), device='cpu', **kwargs)

def tabular(dls, cbs=(), seed=0):
    torch.manual_seed(seed)
    return tabular_learner(dls, layers=[8], cbs=cbs).remove_cb(ProgressCallback)

def through(dls, df):
    "Rows as loaders make them, in order, without labels"
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        batches = [b[:2] for b in dls.test_dl(df.drop(columns='fruit'), bs=len(df))]
    return tuple(map(torch.cat, zip(*batches)))

def answers(teacher, learn, xb):
    teacher.attach(learn)
    return teacher(Batch(None, xb=xb))

@pytest.mark.parametrize('procs,its_procs', [
    ((FillMissing, Normalize),)*2, ((FillMissing,), (FillMissing, Normalize)), ((FillMissing, Normalize), (FillMissing,)),
    ((partial(FillMissing, FillStrategy.constant, fill_vals=dict(weight=9.)), Normalize), (partial(FillMissing, FillStrategy.mode), Normalize))],
    ids=['all', 'student plain', 'teacher plain', 'filled otherwise'])
@pytest.mark.parametrize('how', ['learner', 'file'])
def test_a_teacher_of_tables_reads_the_rows_as_its_own_loaders_make_them(procs, its_procs, how):
    df,theirs = rows(),rows(80, 1, shift=20., factor=3.)
    own,its = (table(data, [Categorify, *[proc() for proc in made]]) for data,made in ((df, procs), (theirs, its_procs)))
    teacher = tabular(its)
    teacher.fit(1)
    want = teacher.model.eval()(*through(its, df)).detach()
    learn = tabular(own)
    if how == 'file':
        teacher.export('t.pkl')
        teacher = 't.pkl'
    got = answers(NetworkTeacher(load_learner('t.pkl') if how == 'file' else teacher), learn, through(own, df))
    close(got, want)
    plain = teacher.model.eval()(*through(own, df)).detach() if how == 'learner' else None
    assert plain is None or (plain-want).abs().max() > .01, 'the statistics matter here'

def test_a_students_fit_uses_the_translated_table():
    df,theirs = rows(),rows(80, 1, shift=20., factor=3.)
    own,its = table(df),table(theirs)
    teacher,seen = tabular(its),[]
    class Recording(NetworkTeacher):
        def __call__(self, batch):
            seen.append((batch.xb, super().__call__(batch)))
            return seen[-1][1]
    learn = tabular(own, KnowledgeDistillation(Recording(teacher), .5))
    learn.fit(1)
    numbers = lambda stats: torch.tensor([float(value) for value in stats.values()])
    scale,its_scale = table_scale(own),table_scale(its)
    for (cats,conts),got in seen:
        raw = conts.double()*numbers(scale.stds) + numbers(scale.means)
        filled = cats[:,1] == 2
        raw[filled,0] = float(its_scale.fills['weight'])
        x = (raw-numbers(its_scale.means))/numbers(its_scale.stds)
        close(got, teacher.model.eval()(cats, x.float()).detach())
    assert len(seen) == 3 and sum(int((cats[:,1] == 2).sum()) for (cats,_),_ in seen) > 5

@settings(derandomize=True, max_examples=15, deadline=None)
@given(seed=st.integers(0, 99), shift=st.sampled_from([0., -7., 1e3]), factor=st.sampled_from([.01, 1., 50.]), missing=st.booleans())
def test_property_translated_tables_are_those_of_the_other_loaders(seed, shift, factor, missing):
    df,theirs = rows(seed=seed, missing=missing),rows(80, seed+1, shift, factor, missing)
    own,its = table(df),table(theirs)
    translate = translate_table(table_scale(own), table_scale(its))
    torch.testing.assert_close(translate(through(own, df))[1], through(its, df)[1], rtol=1e-3, atol=2e-3)

def test_equal_statistics_need_no_translation(): assert translate_table(*[table_scale(table(rows())) for _ in range(2)]) is None

def test_a_table_whose_filled_rows_nobody_can_tell_is_refused():
    procs = lambda value: [Categorify, FillMissing(FillStrategy.constant, add_col=False, fill_vals=dict(weight=value)), Normalize]
    own,its = table(rows(), procs(1.)),table(rows(), procs(2.))
    with pytest.raises(ValueError, match='fill column weight with 1.0 where it is missing, the teacher.s with 2.0.*add_col=True'):
        NetworkTeacher(tabular(its)).attach(tabular(own))
    NetworkTeacher(tabular(table(rows(), procs(1.)))).attach(tabular(own))

class Logarithm(TabularProc):
    order = 3
    def encodes(self, to): to['length'] = np.log1p(to['length'].abs())

def test_processors_that_nobody_can_translate_are_refused():
    with_log = [Categorify, FillMissing, Normalize, Logarithm]
    with pytest.raises(ValueError, match='what Logarithm does to the teacher.s table or the student.s cannot be translated'):
        NetworkTeacher(tabular(table(rows(), with_log))).attach(tabular(table(rows())))
    with pytest.raises(ValueError, match="the tables' Logarithm cannot be translated where means"):
        NetworkTeacher(tabular(table(rows(seed=3), with_log))).attach(tabular(table(rows(), with_log)))
    class Own(Normalize): pass
    with pytest.raises(ValueError, match='what Own does'): NetworkTeacher(tabular(table(rows(), [Categorify, FillMissing, Own]))).attach(tabular(table(rows())))
    same = [NetworkTeacher(tabular(table(rows(), with_log))),tabular(table(rows(), with_log))]
    same[0].attach(same[1])

# ---------------------------------------------------------------- D2. several images

A,B = ((.3, .3, .3), (.4, .4, .4)),((.5, .6, .7), (.2, .3, .5))

def normed(x, stats):
    mean,std = (torch.tensor(stat)[:,None,None] for stat in stats)
    return (x-mean)/std

class Pair(nn.Module):
    "Of two images, in a tuple or apart, and whatever else"
    def __init__(self):
        super().__init__()
        self.body,self.fc = nn.Conv2d(3, 4, 3),nn.Linear(8, 5)
    def forward(self, *xs):
        a,b = xs[0] if isinstance(xs[0], (tuple, list)) else xs[0].values() if isinstance(xs[0], dict) else xs[:2]
        rest = [x for x in xs[1 if isinstance(xs[0], (tuple, list, dict)) else 2:]]
        z = self.fc(torch.cat([self.body(x).mean((2, 3)) for x in (a, b)], 1))
        return z + sum(x.float().mean() for x in rest)

class ImageTuple(fastuple): pass

FORMS = {'apart': lambda a,b: (a, b), 'tuple': lambda a,b: ((a, b),), 'fastai tuple': lambda a,b: (ImageTuple(a, b),),
         'dict': lambda a,b: ({'a': a, 'b': b},), 'list': lambda a,b: ([a, b],),
         'and a table': lambda a,b: (a, b, torch.arange(8.).reshape(4, 2)), 'and numbers': lambda a,b: (a, b, torch.arange(4))}

@pytest.mark.parametrize('form', FORMS)
@pytest.mark.parametrize('size', [None, 12])
@pytest.mark.parametrize('fast', [True, False])
def test_all_images_are_brought_into_the_teachers_scale_and_size(form, size, fast):
    images,net = (torch.rand(4, 3, 8, 8),torch.rand(4, 3, 8, 8)),Pair()
    def resized(x): return x if size is None else F.interpolate(x, size, mode='bilinear', antialias=True)
    teacher = NetworkTeacher(net, teacher_norm=B, teacher_size=size, fast=fast)
    loader = SimpleNamespace(after_batch=SimpleNamespace(fs=[Normalize.from_stats(*A, cuda=False)]))
    own = DataLoaders(loader, loader)
    learn = Learner(own, nn.Linear(1, 5), loss_func=CrossEntropyLossFlat())
    got = answers(teacher, learn, FORMS[form](*[normed(x, A) for x in images]))
    want = net(*FORMS[form](*[resized(normed(x, B)) for x in images])).detach()
    close(got, want)

def test_statistics_keep_their_precision_after_a_batch_in_half_precision():
    net,x = Pair(),torch.rand(4, 3, 8, 8)
    teacher = NetworkTeacher(net, teacher_norm=B)
    loader = SimpleNamespace(after_batch=SimpleNamespace(fs=[]))
    learn = Learner(DataLoaders(loader, loader), nn.Linear(1, 5), loss_func=CrossEntropyLossFlat())
    answers(teacher, learn, (x.bfloat16(), x.bfloat16()))
    close(teacher(Batch(None, xb=(x, x))), net(normed(x, B), normed(x, B)).detach(), 1e-5)

class get_pair:
    def __call__(self, i): return TensorImage(torch.full((3, 8, 8), .1*i))
class get_other:
    def __call__(self, i): return TensorImage(torch.full((3, 8, 8), .05*i))
class get_flow:
    "Three channels of numbers that are no image"
    def __call__(self, i): return TensorMask(torch.full((3, 8, 8), float(i)))
class get_label:
    def __call__(self, i): return torch.tensor(i%5)

def test_inputs_that_fastai_does_not_call_images_stay_as_they_are():
    dsets = Datasets(list(range(8)), [[get_pair()], [get_other()], [get_flow()], [get_label()]], n_inp=3)
    dl = dsets.dataloaders(bs=4, num_workers=0, device='cpu', after_batch=[Normalize.from_stats(*A, cuda=False)], drop_last=False).train
    dls,seen = DataLoaders(dl, dl),[]
    class Keep(nn.Module):
        def forward(self, a, b, flow):
            seen.append([t.clone() for t in (a, b, flow)])
            return torch.zeros(len(a), 5)
    class Student(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(192, 5)
        def forward(self, a, b, flow):
            own.append([t.as_subclass(torch.Tensor).clone() for t in (a, b, flow)])
            return self.fc(a.flatten(1))
    own = []
    method = KnowledgeDistillation(NetworkTeacher(Keep(), teacher_norm=B, fast=False))
    learn = Learner(dls, Student(), loss_func=CrossEntropyLossFlat(), cbs=method).remove_cb(ProgressCallback)
    with learn.no_logging(): learn.fit(1)
    mean,std = (torch.tensor(stat)[:,None,None] for stat in A)
    assert len(seen) == 2
    for theirs,ours in zip(seen, own):
        for a,b in zip(theirs[:2], ours[:2]): close(a, normed(b*std+mean, B))
        assert torch.equal(theirs[2], ours[2])

@pytest.mark.parametrize('how', ['fit', 'fill'])
def test_a_cached_teacher_reads_what_the_live_one_reads(how, tmp_path):
    "Also of several inputs, of which some are no images"
    from fastkdtf.teachers.cache import CachedTeacher
    from fastkdtf.vision.loader import with_index
    dsets = Datasets(list(range(8)), [[get_pair()], [get_flow()], [get_label()]], n_inp=2)
    dls = with_index(DataLoaders(*[dsets.dataloaders(bs=4, num_workers=0, device='cpu', shuffle=False, drop_last=False).train for _ in range(2)]))
    class Reads(nn.Module):
        def forward(self, a, flow): return torch.stack([a.mean((1, 2, 3)), flow.mean((1, 2, 3)), a[:,0,0,0], flow[:,1,0,0], a[:,2,1,1]], 1)
    class Student(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(192, 5)
        def forward(self, a, flow): return self.fc(a.flatten(1))
    live,cached = (NetworkTeacher(Reads(), teacher_norm=B) for _ in range(2))
    def train(teacher):
        said = []
        class Says(type(teacher)):
            def __call__(self, batch):
                said.append(super().__call__(batch))
                return said[-1]
        teacher.__class__ = Says
        torch.manual_seed(0)
        learn = Learner(dls, Student(), loss_func=CrossEntropyLossFlat(), cbs=KnowledgeDistillation(teacher)).remove_cb(ProgressCallback)
        if how == 'fill' and teacher is not live: teacher.fill(learn)
        with learn.no_logging(): learn.fit(1)
        return torch.cat(said[-2:])
    wanted,got = train(live),train(CachedTeacher(cached, tmp_path/'cache', dtype='float32'))
    wanted = wanted - wanted.amax(1, keepdim=True)
    assert len(wanted) == 8 and wanted.std() > .1
    close(got.sort(0).values, wanted.sort(0).values, 1e-5)

def test_tensors_are_found_in_containers_of_any_class():
    x = (ImageTuple(torch.zeros(1), torch.ones(2)), {'a': [torch.zeros(3)], 'b': 'word'}, 4)
    assert [len(t) for t in tensors_in(x)] == [1, 2, 3]
    y = map_tensors(lambda t: t+1, x)
    assert type(y[0]) is ImageTuple and y[1]['b'] == 'word' and y[2] == 4 and [t.sum().item() for t in tensors_in(y)] == [1, 4, 3]
    assert image_places((torch.zeros(2, 5), torch.zeros(2, 5))) == [False, False]

# ---------------------------------------------------------------- D3. language models

def words_dls(words, lm=True):
    from fastai.text.data import LMDataLoader
    text = [torch.arange(40) % len(words) for _ in range(4)]
    if lm: dl = LMDataLoader(text, bs=2, seq_len=5, num_workers=0)
    else: dl = DataLoaders.from_dsets([(t[:5], t[1:6]) for t in text], bs=2, device='cpu', num_workers=0).train
    dls = DataLoaders(dl, dl)
    dls.vocab = words
    return dls

def lm(n=4): return nn.Sequential(nn.Embedding(n, 3), nn.Linear(3, n))

def lm_learner(words, cbs=(), is_lm=True):
    learn = Learner(words_dls(words, is_lm), lm(len(words)), loss_func=CrossEntropyLossFlat(axis=-1), cbs=cbs)
    return learn.remove_cb(ProgressCallback)

WORDS,OTHER = ['the', 'cat', 'sat', 'on'],['cat', 'the', 'on', 'sat']

@pytest.mark.parametrize('give', ['learner', 'module'])
def test_a_language_model_of_other_words_is_refused(give):
    teacher = lm_learner(OTHER)
    if give == 'module': teacher = NetworkTeacher(teacher.model, vocab=OTHER)
    with pytest.raises(ValueError, match="other words or columns than the student: number 0 is 'cat' to it and 'the' here"):
        lm_learner(WORDS, KnowledgeDistillation(teacher)).fit(1)

def test_a_language_model_of_the_same_words_teaches():
    learn = lm_learner(WORDS, KnowledgeDistillation(lm_learner(WORDS)))
    with learn.no_logging(): learn.fit(1)

def test_token_numbers_of_other_loaders_are_refused_before_the_first_step():
    "Loaders of the user's own: only the batch tells that words are read and predicted"
    learn = lm_learner(WORDS, KnowledgeDistillation(NetworkTeacher(lm(), vocab=OTHER)), is_lm=False)
    before = copy.deepcopy(learn.model.state_dict())
    with pytest.raises(ValueError, match='reads numbers of words, and its words are not the student'): learn.fit(1)
    assert all(torch.equal(v, learn.model.state_dict()[k]) for k,v in before.items())
