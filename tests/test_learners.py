"""Learners of texts, of tables, and of a class for each pixel: what a step adds up to, what validation says, what is exported.

The losses are written here a second time, in float64, on the logits that the learner itself has given; teachers and past copies are
fresh networks with the weights that the learner had, never the package's copies. All data come with installed packages.
"""
import warnings
from functools import lru_cache, partial
from importlib.util import find_spec
from operator import itemgetter
from pathlib import Path
from runpy import run_path
from types import SimpleNamespace

import numpy as np, pandas as pd, pytest, torch, torch.nn.functional as F
import matplotlib
matplotlib.use('agg')
from fastai.basics import (
    Callback, CategoryBlock, ColReader, ColSplitter, CrossEntropyLossFlat, DataBlock, Datasets, Learner, Normalize, accuracy, load_learner, noop, set_seed)
from fastai.callback.all import ProgressCallback
from fastai.layers import Lambda
from fastai.tabular.all import TabularDataLoaders, tabular_learner
from fastai.text.all import AWD_LSTM, TextBlock, get_text_classifier, text_classifier_learner
from fastai.vision.core import TensorImageBW, TensorMask
from sklearn.datasets import load_breast_cancer, load_digits, load_wine
from sklearn.ensemble import RandomForestClassifier
from torch import nn

from fastkdtf.callback.distill import Distill, KnowledgeDistillation, LsrKD, MemoryReplay, TfKDReg
from fastkdtf.teachers.frozen import copy_model
from fastkdtf.lab.compare import compare
from fastkdtf.vision.loader import with_index
from fastkdtf.teachers.memory import MemoryTeacher


@pytest.fixture(autouse=True)
def in_tmp_path(tmp_path, monkeypatch):
    "Learners save below the working directory"
    monkeypatch.chdir(tmp_path)


# ---------------------------------------------------------------- texts: which language is it?

class Characters:
    "Every character is a word"
    def __call__(self, texts): return (list(o.replace(' ', '▁')) for o in texts)

LANGUAGES = ['cs', 'fr', 'ru', 'ta']

@lru_cache
def sentences():
    folder = Path(find_spec('spacy').origin).parent/'lang'
    rows = [(s[:60], lang, i%4 == 3) for lang in LANGUAGES for i,s in enumerate(run_path(str(folder/lang/'examples.py'))['sentences'])]
    return pd.DataFrame(rows, columns=['text', 'language', 'valid'])

@lru_cache
def text_dls():
    text = TextBlock.from_df('text', tok=Characters(), rules=[], min_freq=1, max_vocab=250, n_workers=0)
    block = DataBlock((text, CategoryBlock), get_x=ColReader('text'), get_y=ColReader('language'), splitter=ColSplitter('valid'))
    return block.dataloaders(sentences(), bs=8, num_workers=0, device='cpu')

text_config = dict(emb_sz=12, n_hid=16, n_layers=2, pad_token=1, bidir=False, output_p=.1, hidden_p=.1, input_p=.1, embed_p=.05, weight_p=.2)

def text_learner(cbs=(), dls=None):
    "fastai's own: the network returns what its regularisers need too, and forgets its hidden state between batches, not within"
    return text_classifier_learner(dls or text_dls(), AWD_LSTM, pretrained=False, config=text_config, seq_len=20, metrics=accuracy, cbs=cbs)

def logits_only_net(dls=None):
    "The same network, returning the logits and nothing else"
    dls = dls or text_dls()
    return nn.Sequential(get_text_classifier(AWD_LSTM, len(dls.vocab[0]), dls.c, seq_len=20, config=text_config), Lambda(itemgetter(0)))

def logits_only_learner(cbs=(), dls=None): return Learner(dls or text_dls(), logits_only_net(dls), metrics=accuracy, cbs=cbs)


# ---------------------------------------------------------------- tables

@lru_cache
def table(name):
    data = dict(wine=load_wine, cancer=load_breast_cancer)[name](as_frame=True)
    return data.frame.assign(target=np.array(data.target_names)[data.target]),list(data.feature_names)

@lru_cache
def table_dls(name):
    df,names = table(name)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')   # of torch about pandas' arrays
        return TabularDataLoaders.from_df(df, procs=[Normalize], cont_names=names, y_names='target', y_block=CategoryBlock(), bs=64 if name == 'cancer' else 16,
                                          valid_idx=list(range(0, len(df), 4)), device='cpu')

def table_learner(name, cbs=(), dls=None): return tabular_learner(dls or table_dls(name), layers=[16], metrics=accuracy, cbs=cbs)


# ---------------------------------------------------------------- pixels: background, or a stroke of which digit?

@lru_cache
def strokes():
    images,labels = load_digits(n_class=4, return_X_y=True)
    images = np.kron(images.reshape(-1, 8, 8), np.ones((2, 2)))
    return images,np.where(images > 4, 1+labels[:,None,None], 0)

def image_of(i): return TensorImageBW(torch.tensor(strokes()[0][i]/16).float()[None])
def mask_of(i): return TensorMask(torch.tensor(strokes()[1][i]))

@lru_cache
def pixel_dls():
    dls = Datasets(list(range(100)), [[image_of], [mask_of]], splits=[list(range(80)), list(range(80, 100))]).dataloaders(bs=16, num_workers=0, device='cpu')
    dls.c = 5
    return dls

def conv(n_in, n_out, stride=1): return nn.Sequential(nn.Conv2d(n_in, n_out, 3, stride, 1, bias=False), nn.BatchNorm2d(n_out), nn.ReLU())

class SmallUNet(nn.Module):
    def __init__(self, n_classes=5, width=8):
        super().__init__()
        self.fine,self.coarse = conv(1, width),nn.Sequential(conv(width, 2*width, 2), conv(2*width, 2*width, 2), conv(2*width, width))
        self.head = nn.Conv2d(2*width, n_classes, 1)
    def forward(self, x):
        fine = self.fine(x)
        return self.head(torch.cat([fine, F.interpolate(self.coarse(fine), scale_factor=4)], 1))

def pixel_learner(cbs=(), dls=None):
    return Learner(dls or pixel_dls(), SmallUNet(), loss_func=CrossEntropyLossFlat(axis=1), metrics=partial(accuracy, axis=1), cbs=cbs)

KINDS = dict(text=text_learner, logits_only=logits_only_learner, wine=partial(table_learner, 'wine'), cancer=partial(table_learner, 'cancer'), pixels=pixel_learner)
ITEMS = dict(text=lambda: sentences().iloc[3], logits_only=lambda: sentences().iloc[3], wine=lambda: table('wine')[0].iloc[0],
             cancer=lambda: table('cancer')[0].iloc[0], pixels=lambda: 80)   # the first of each validation set
RATES = dict(text=2e-2, logits_only=2e-2, wine=1e-2, cancer=1e-2, pixels=1e-2)

def made(kind, cbs=(), seed=0, dls=None):
    torch.manual_seed(seed)
    learn = KINDS[kind](cbs, dls)
    if learn.cbs.filter(lambda o: isinstance(o, ProgressCallback)): learn.remove_cb(ProgressCallback)
    return learn

def fitted(learn, n_epoch, lr, seed=1):
    set_seed(seed)   # texts are ordered by NumPy's generator
    learn.dls.train.rng.seed(seed)   # the order of the batches
    with learn.no_logging(): learn.fit(n_epoch, lr)
    return learn

@lru_cache
def teacher_of(kind): return fitted(made(kind, seed=5), 2, RATES[kind])


# ---------------------------------------------------------------- the methods, written a second time

def log_p(z, tau=1.): return (z.double()/tau).log_softmax(1)

def cross_entropy(z, y): return -log_p(z).gather(1, y[:,None]).mean()

def kl(t, logp):
    "Of distributions on axis 1, mean over everything else"
    return (torch.special.xlogy(t, t) - t*logp).sum(1).mean()

def lsr_kd(z, y, _):
    "Wang et al. 2020, eq. 10, α = .1, τ = 3"
    return .9*cross_entropy(z, y) + .1*3*kl(torch.full_like(z, 1/z.shape[1], dtype=torch.float64), log_p(z, 3.))

def tf_kd_reg(z, y, _):
    "Yuan et al. 2020, eq. 8–9, α = .1, τ = 20, a = .99"
    k = z.shape[1]
    virtual = torch.full_like(z, .01/(k-1), dtype=torch.float64).scatter(1, y[:,None], .99)
    return .9*cross_entropy(z, y) + .1*20**2*kl((virtual.log()/20).softmax(1), log_p(z, 20.))

def distilled(z, y, zt):
    "Hinton et al. 2015, α = .9, τ = 4"
    return .1*cross_entropy(z, y) + .9*4**2*kl(log_p(zt, 4.).exp(), log_p(z, 4.))

def replayed(z, y, zts):
    "Wang et al. 2020, Algorithm 1, α = .25, τ = 3"
    return .75*cross_entropy(z, y) + .25*3**2*sum(kl(log_p(o, 3.).exp(), log_p(z, 3.)) for o in zts)/len(zts)

def says(kind, state, xb):
    "Logits of a network with these weights, in float64 and evaluation mode; norms that have seen no batch take this one's statistics"
    model = made(kind).model
    model.load_state_dict(state)
    model.double().eval()
    for m in model.modules():
        if isinstance(m, nn.modules.batchnorm._BatchNorm) and not m.num_batches_tracked: m.train()
    with torch.no_grad(): out = model(*[x.double() if x.is_floating_point() else x for x in xb])
    return out[0] if isinstance(out, tuple) else out

def state_of(model): return {k: v.detach().clone() for k,v in model.state_dict().items()}

def taught_by(kind, spy, i): return says(kind, state_of(teacher_of(kind).model), spy.steps[i].xb)

def taught_by_copies(kind, spy, i):
    "Two copies, moved before every third step: θ̂_1 is the network before the last such step, θ̂_2 the one before the step of that kind before it"
    moves = [0, 0, *range(2, i+1, 3)]   # the steps whose weights were copied, from 0, after the two initial copies
    return [says(kind, spy.steps[j].state, spy.steps[i].xb) for j in moves[-2:]]

METHODS = {   # name -> how to make the callback, its loss, what its teacher said
    'LsrKD':                 (lambda kind: LsrKD(), lsr_kd, lambda *_: None),
    'TfKDReg':               (lambda kind: TfKDReg(), tf_kd_reg, lambda *_: None),
    'KnowledgeDistillation': (lambda kind: KnowledgeDistillation(teacher_of(kind)), distilled, taught_by),
    'MemoryReplay':          (lambda kind: MemoryReplay(2, interval_steps=3), replayed, taught_by_copies)}

class Spy(Callback):
    "Weights before each step, and what the step was made of"
    order,run_valid = 6,False   # after the methods
    def __init__(self): self.steps = []
    def before_batch(self): self.state = state_of(self.learn.model)
    def after_loss(self):
        plain = lambda t: t.as_subclass(torch.Tensor).detach().clone()
        z,y = plain(self.learn.pred),plain(self.learn.y)
        if y.ndim == z.ndim: y = y[:,0].long()   # a table's labels come as a column of small integers
        rnn = getattr(self.learn, 'rnn', None)
        regularisers = 0.
        if rnn is not None:   # AR and TAR of AWD-LSTM, at fastai's weights: not part of the loss that a method shares
            out,raw = rnn.out.detach().double(),rnn.raw_out.detach().double()
            regularisers = 2*out.square().mean() + (raw[:,1:]-raw[:,:-1]).square().mean()
        self.steps.append(SimpleNamespace(xb=[plain(x) for x in self.learn.xb], y=y, z=z, loss=self.learn.loss_grad.item(), state=self.state,
                                          regularisers=regularisers))

CASES = [(kind, method) for kind in KINDS for method in METHODS if kind != 'logits_only' or method == 'MemoryReplay']

@pytest.mark.parametrize('kind,method', CASES)
def test_each_kind_with_each_method(kind, method, tmp_path):
    make,loss,teacher = METHODS[method]
    spy = Spy()
    learn = fitted(made(kind, [make(kind), spy]), 3, RATES[kind])
    n = len(spy.steps)
    assert n == 3*len(learn.dls.train)

    # every step's loss; a network's opinion is computed anew in the first ones and the last
    for i in sorted({0, 1, 2, 3, 5, 8, n-1}):
        o = spy.steps[i]
        assert o.loss == pytest.approx((loss(o.z, o.y, teacher(kind, spy, i)) + o.regularisers).item(), rel=2e-5), i

    # validation knows nothing of the method
    names,values = learn.recorder.metric_names,learn.recorder.values   # `get_preds` starts new ones
    z,y = learn.get_preds(act=noop)
    own = cross_entropy(z.as_subclass(torch.Tensor), (y[:,0].long() if y.ndim == z.ndim else y).as_subclass(torch.Tensor)).item()
    assert values[-1][1] == pytest.approx(own, rel=1e-5)
    with learn.no_logging(): assert learn.validate()[0] == pytest.approx(own, rel=1e-5)

    # it learns
    first,last = (np.mean([o.loss for o in steps]) for steps in (spy.steps[:n//3], spy.steps[-(n//3):]))
    base = [v[names.index('base_loss')-1] for v in values]
    assert last < .95*first and base[-1] < .95*base[0]

    # what is exported predicts as before, and holds neither teacher nor copies
    learn.remove_cb(Spy)
    item = ITEMS[kind]()
    said = learn.predict(item)
    learn.export(tmp_path/'learner.pkl')
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        loaded = load_learner(tmp_path/'learner.pkl')
    again = loaded.predict(item)
    torch.testing.assert_close(again[2], said[2])
    assert torch.equal(torch.as_tensor(again[1]), torch.as_tensor(said[1]))
    torch.testing.assert_close(said[2].as_subclass(torch.Tensor), z[0].as_subclass(torch.Tensor).softmax(0), rtol=1e-4, atol=1e-5)
    cb = next(o for o in loaded.cbs if isinstance(o, Distill))
    assert getattr(cb.teacher, 'model', None) is None and getattr(cb.teacher, 'copies', None) is None


# ---------------------------------------------------------------- a recurrent network keeps a state: nobody else touches it

def traces(learn):
    "All that a step leaves behind in a recurrent network and around it"
    spy = next(o for o in learn.cbs if isinstance(o, Spy))
    rnn = next(m for m in learn.model.modules() if isinstance(m, AWD_LSTM))
    hidden = [t for pair in rnn.hidden for t in pair]
    dropped = [m.module.weight_hh_l0.detach() for m in rnn.rnns]
    return [*learn.model.state_dict().values(), *hidden, *dropped, *[o.z for o in spy.steps], torch.get_rng_state()]

def weightless(teacher): return Distill(teacher, alpha=(1., 1e-30), tau=2.)   # is asked at every step, and its part is lost in rounding

@lru_cache
def undisturbed(kind):
    learn = fitted(made(kind, Spy()), 1, RATES[kind])
    return traces(learn),[v[:3] for v in learn.recorder.values]

SILENT = {
    'LsrKD, α = 0': lambda: LsrKD(0.), 'TfKDReg, α = 0': lambda: TfKDReg(0.), 'KnowledgeDistillation, α = 0': lambda: KnowledgeDistillation(teacher_of('text'), 0.),
    'MemoryReplay, α = 0': lambda: MemoryReplay(alpha=0.), 'a teacher': lambda: weightless(teacher_of('text')),
    'several copies': lambda: weightless(MemoryTeacher(3, interval_steps=2))}

@pytest.mark.parametrize('kind,method', [
    (kind, method) for kind in ('text', 'logits_only') for method in SILENT
    if kind == 'text' or method == 'several copies'])
def test_the_students_recurrence_is_its_own(kind, method):
    learn = fitted(made(kind, [SILENT[method](), Spy()]), 1, RATES[kind])
    expected,_ = undisturbed(kind)
    got = traces(learn)
    assert len(got) == len(expected) and all(torch.equal(a, b) for a,b in zip(got, expected))

@pytest.mark.parametrize('method', ['LsrKD, α = 0'])
def test_without_a_share_the_columns_are_those_of_fastai(method):
    learn = fitted(made('text', [SILENT[method](), Spy()]), 1, RATES['text'])
    assert [v[:3] for v in learn.recorder.values] == undisturbed('text')[1]

def test_a_teacher_of_the_same_class_keeps_its_own_state():
    "What it says of a batch does not depend on the batches before, nor on the student's; and the learner that it came from is left alone"
    teacher = teacher_of('text')
    rnn = teacher.model[0].module
    before = [*map(torch.clone, state_of(teacher.model).values()), *[t.clone() for pair in rnn.hidden for t in pair]]
    spy = Spy()
    fitted(made('text', [KnowledgeDistillation(teacher), spy]), 1, RATES['text'])
    after = [*state_of(teacher.model).values(), *[t for pair in rnn.hidden for t in pair]]
    assert all(torch.equal(a, b) for a,b in zip(before, after, strict=True))
    for o in spy.steps[::2]: assert o.loss == pytest.approx((distilled(o.z, o.y, says('text', state_of(teacher.model), o.xb)) + o.regularisers).item(), rel=2e-5)

def test_teacher_from_a_file():
    teacher_of('text').export('teacher.pkl')
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        learners = [fitted(made('text', [KnowledgeDistillation(o), Spy()]), 1, RATES['text']) for o in (teacher_of('text'), load_learner('teacher.pkl'))]
    assert all(torch.equal(a, b) for a,b in zip(*map(traces, learners)))

@pytest.mark.parametrize('kind', ['text', 'logits_only'])
def test_a_text_model_is_copied_in_the_middle_of_a_step(kind):
    learn = made(kind)
    x,y = (o.as_subclass(torch.Tensor) for o in learn.dls.train.one_batch())
    def gradients(between):
        torch.manual_seed(3)
        learn.model.train()
        learn.model.zero_grad()
        out = learn.model(x)
        got = between()
        F.cross_entropy(out[0] if kind == 'text' else out, y).backward()
        return got,[p.grad.clone() for p in learn.model.parameters()]
    _,expected = gradients(lambda: None)
    twin,got = gradients(lambda: copy_model(learn.model))   # its recurrent weights have a history here: `deepcopy` refuses
    assert all(torch.equal(a, b) for a,b in zip(got, expected))
    own = {t.data_ptr() for t in learn.model.state_dict().values()}
    assert not own & {t.data_ptr() for t in twin.state_dict().values()}
    said = []
    for model in (learn.model, twin):
        model.load_state_dict(state_of(learn.model))   # statistics of the norms
        model.eval()
        with torch.no_grad(): out = model(x)
        said.append(out[0] if kind == 'text' else out)
    assert torch.equal(*said)

def test_a_second_fit_takes_new_copies():
    "Of a network that a fit has left with tensors that have a history"
    spy = Spy()
    learn = fitted(made('logits_only', [MemoryReplay(2, interval_steps=3), spy]), 1, RATES['logits_only'])
    spy.steps.clear()
    fitted(learn, 1, RATES['logits_only'], seed=2)
    for i in (0, 1, 4):
        o = spy.steps[i]
        assert o.loss == pytest.approx(replayed(o.z, o.y, taught_by_copies('logits_only', spy, i)).item(), rel=2e-5)


# ---------------------------------------------------------------- a forest teaches a network

def test_a_forest_as_teacher():
    "Out-of-bag probabilities of scikit-learn's random forest, by the number of the sample"
    df,names = table('wine')
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        dls = with_index(TabularDataLoaders.from_df(df, procs=[Normalize], cont_names=names, y_names='target', y_block=CategoryBlock(), bs=32,
                                                    valid_idx=list(range(0, len(df), 4)), device='cpu'))
    items = dls.train_ds.items
    forest = RandomForestClassifier(50, oob_score=True, random_state=0).fit(items[names], items.target)
    probs = np.clip(forest.oob_decision_function_, 1e-3, None)
    seen = []
    def teacher(step):
        seen.append(step.idx.clone())
        return torch.tensor(np.log(probs[step.idx]), dtype=torch.float32)
    spy = Spy()
    fitted(made('wine', [KnowledgeDistillation(teacher), spy], dls=dls), 2, 1e-2)
    assert len(seen) == len(spy.steps) > 6
    for idx,o in zip(seen, spy.steps):
        assert torch.equal(o.y, torch.tensor(items.target.values[idx], dtype=torch.long))   # the forest speaks of these samples
        assert o.loss == pytest.approx(distilled(o.z, o.y, torch.tensor(np.log(probs[idx]))).item(), rel=2e-5)


# ---------------------------------------------------------------- side by side

def test_compare_texts():
    c = compare({'MemoryReplay': partial(MemoryReplay, 2, interval_steps=3)}, text_dls(), logits_only_net, 1, seeds=2, lr=2e-2, controls=False)
    assert list(c.table.index) == ['baseline', 'MemoryReplay'] and len(c.records) == 4
    for r in c.records: assert r['last']['accuracy'] == pytest.approx(r['history']['accuracy'][-1], abs=1e-6)

@pytest.mark.parametrize('name', ['wine', 'cancer'])
def test_compare_tables(name):
    c = compare({'LsrKD': LsrKD}, table_dls(name), lambda: table_learner(name).model, 1, seeds=2, lr=1e-2, controls=False)
    assert list(c.table.index) == ['baseline', 'LsrKD'] and len(c.records) == 4
    for r in c.records:
        assert r['last']['accuracy'] == pytest.approx(r['history']['accuracy'][-1], abs=1e-6)
        assert r['last']['nll'] == pytest.approx(r['history']['valid_loss'][-1], rel=1e-5)

@pytest.mark.parametrize('kind', ['text', 'logits_only', 'wine', 'pixels'])
def test_measured_on_its_own_batches(kind):
    learn = fitted(made(kind, [LsrKD(), KnowledgeDistillation(teacher_of(kind))]), 1, RATES[kind])
    rows = learn.describe_kd(n_batches=1)
    assert list(rows.index) == ['knowledge_distillation', 'lsr_kd'] and np.isfinite(rows[['soft/hard gradient', 'cosine']].values).all()


# ---------------------------------------------------------------- what the inputs mean

def other_words():
    text = TextBlock.from_df('text', tok=Characters(), rules=[], min_freq=1, max_vocab=200, n_workers=0)
    block = DataBlock((text, CategoryBlock), get_x=ColReader('text'), get_y=ColReader('language'), splitter=ColSplitter('valid'))
    return block.dataloaders(sentences()[::-1].assign(text=lambda d: d.text.str.upper()), bs=8, num_workers=0, device='cpu')

def other_columns():
    df,names = table('wine')
    return TabularDataLoaders.from_df(df, procs=[Normalize], cont_names=names[1:]+names[:1], y_names='target', y_block=CategoryBlock(), bs=16, valid_idx=[0, 1], device='cpu')

@pytest.mark.parametrize('learner,own,other', [(text_learner, text_dls, other_words), (partial(table_learner, 'wine'), partial(table_dls, 'wine'), other_columns)],
                         ids=['words', 'columns'])
def test_a_teacher_of_other_inputs_is_refused(learner, own, other):
    teacher = learner(dls=other())
    with pytest.raises(ValueError, match='other words or columns than the student: number [0-9]+ is'):
        learner(dls=own(), cbs=KnowledgeDistillation(teacher)).fit(1)
    teacher.export('teacher.pkl')
    with pytest.raises(ValueError, match='other words or columns'): learner(dls=own(), cbs=KnowledgeDistillation(load_learner('teacher.pkl'))).fit(1)
    with learner(dls=own(), cbs=KnowledgeDistillation(learner(dls=own()))).no_bar() as same: same.fit(1)
