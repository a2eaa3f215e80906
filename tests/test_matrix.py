"""Every callback of ours in every situation that fastai makes, and beside every other: one test, whose cells are a page of the documentation.

A cell shows that something holds, not only that nothing is raised. What cannot make sense is refused, and its cell asserts the words.
With FASTKDTF_MATRIX=path every cell adds a line of JSON to that file; `tools/matrix.py` makes the table of the documentation from it.
"""
import copy, csv, json, os, re, sys, traceback, zipfile
from contextlib import contextmanager
from datetime import timedelta
from functools import partial
from pathlib import Path

import numpy as np, pandas as pd, pytest, torch, torch.distributed as dist, torch.nn.functional as F
import matplotlib
matplotlib.use('agg')
from fastai.basics import Callback, CastToTensor, CrossEntropyLossFlat, DataLoader, DataLoaders, Learner, Recorder, TrainEvalCallback, load_learner
from fastai.callback.all import ChannelsLast, CSVLogger, CutMix, GradientAccumulation, GradientClip, MixedPrecision, MixUp, SaveModelCallback
from fastai.callback.schedule import *
from fastai.interpret import ClassificationInterpretation
from fastai.losses import LabelSmoothingCrossEntropyFlat
from fastai.vision import learner as _   # registers how images' losses are plotted
from matplotlib import pyplot as plt
from sklearn.metrics import confusion_matrix
from timm.utils import ModelEmaV3
from torch import nn

sys.path.insert(0, str(Path(__file__).parent))
import matrix
from matrix import (FastxtendsMixUp, K, METHODS, ReadsAsTheTeacher, Spy, TsaisMixUp, TwoImages, Wrapped, by_hand, device, digits, learner, made, network,
                    pairs_of_images, per_sample, residual, subnetwork_by_hand, table_net, table_teacher, tables, unet, unet_twin)
from networks import CPUAutocast, lively
from processes import together
from fastkdtf.callback.selfguide import Draws
from fastkdtf.callback.checkpoint import Checkpoint, seed_run

pytestmark = [pytest.mark.filterwarnings('ignore:DIST correlates the samples'), pytest.mark.filterwarnings('ignore:the network says the same in both passes')]

table = Path(__file__).parents[1]/'nbs'/'compatibility.csv'

@pytest.fixture(autouse=True)
def in_tmp_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    yield
    plt.close('all')


# ---------------------------------------------------------------- checks

def fitted(m, cbs=(), n_epoch=1, **kwargs):
    "A learner after a fit with the method"
    learn = learner([m.make(), *cbs], **{'net': m.net, **kwargs})
    learn.fit(n_epoch)
    return learn

def state(o): return {k: v.detach().cpu().clone() for k,v in (o.model if isinstance(o, Learner) else o).state_dict().items()}

def assert_same(a, b):
    a,b = ({k: v for k,v in (o if isinstance(o, dict) else state(o)).items()} for o in (a, b))
    assert a.keys() == b.keys()
    for k in a: assert torch.equal(a[k], b[k]), k

def assert_close(a, b, tol=1e-5):
    a,b = (o if isinstance(o, dict) else state(o) for o in (a, b))
    assert a.keys() == b.keys()
    for k in a: torch.testing.assert_close(a[k], b[k], rtol=tol, atol=tol, msg=lambda m: f'{k}: {m}')

def columns(learn): return {k: [float(o[i]) for o in learn.recorder.values] for i,k in enumerate(learn.recorder.metric_names[1:-1])}

def assert_same_history(a, b):
    "What both have recorded, but for what a cache found on disk, and the losses of all batches"
    a_columns,b_columns = columns(a),columns(b)
    for k in (a_columns.keys() & b_columns.keys()) - {'hit_rate'}: assert a_columns[k] == b_columns[k], k
    assert [o.item() for o in a.recorder.losses] == [o.item() for o in b.recorder.losses]

def alone(learn, **kwargs):
    "fastai's own learner with the same weights"
    return learner(net=lambda: copy.deepcopy(learn.model), loss_func=learn.loss_func, dls=learn.dls, **kwargs)

def metric_names(learn): return list(learn.metrics.attrgot('name'))

def assert_losses(m, steps, tol=1e-5, grads=True, **kwargs):
    "Every step's loss is the equation's, and so is its gradient with respect to the network's output"
    assert steps
    for o in steps:
        assert o.loss.dtype == torch.float32
        o.z = o.z.double().requires_grad_()
        expected = by_hand(o, m, **kwargs)
        assert o.loss.item() == pytest.approx(expected.item(), rel=tol)
        if grads: torch.testing.assert_close(o.grad.double(), torch.autograd.grad(expected, o.z)[0], rtol=1e-3, atol=1e-6)

def assert_clean(learn):
    "Nothing of ours is left on learner and network; evaluation is fastai's own"
    assert list(learn.validate()) == list(alone(learn).validate())
    assert metric_names(learn) == ['accuracy']
    for o in learn.model.modules(): assert not (o._forward_hooks or o._forward_pre_hooks or o._backward_hooks)


# ---------------------------------------------------------------- situations

SITUATIONS = {}
def situation(name):
    def _add(f):
        SITUATIONS[name] = f
        return f
    return _add

@situation('plain')
def plain(m):
    "Each step's loss and gradient are the equation's, and `valid_loss` is the learner's own"
    learn = fitted(m, [spy := Spy()], 2)
    assert len(spy.steps) == 6*m.steps
    assert_losses(m, spy.steps)
    for o in spy.steps:
        if o.bits is not None: torch.testing.assert_close(o.z.detach().float() if o.sub is None else o.sub, subnetwork_by_hand(o), rtol=1e-4, atol=1e-4)
    assert list(learn.recorder.values[-1][1:3]) == list(alone(learn).validate())
    assert_clean(learn)

@situation('weight 0')
def weight_0(m):
    "Bit for bit no callback"
    if m.off is None: pytest.skip('has no setting without effect')
    def run(cbs):
        learn = learner(cbs, m.net)
        learn.fit(1)
        return learn
    ours,own = run([m.make(**m.off)]),run([])
    assert_same(ours, own)
    assert_same_history(ours, own)

def half(m, device, amp):
    class Halves(Callback):
        order,seen = 0,set()
        def after_pred(self): self.seen.add(self.learn.pred.dtype)
    learn = fitted(m, [spy := Spy(), Halves(), amp], dls=digits(device=device))
    assert Halves.seen == {torch.float16 if device == 'cuda' else torch.bfloat16}
    assert_losses(m, spy.steps, .03, grads=False)
    for p in learn.model.parameters(): assert p.dtype == torch.float32 and p.isfinite().all()

@situation('bfloat16')
def bfloat16(m):
    "The network answers in half precision, the loss is in float32 and within 3 % of the equation"
    half(m, 'cpu', CPUAutocast())

@situation('float16, scaled')
def float16(m):
    "The same on a GPU, with a scaler"
    if not torch.cuda.is_available(): pytest.skip('needs a GPU')
    half(m, 'cuda', MixedPrecision())

class Same(Draws):
    "The draws of stochastic depth, always the same"
    def __call__(self, model): return [True, False, True]

def always(learn):
    for cb in learn.cbs:
        if isinstance(vars(cb).get('draws'), Draws): cb.draws = Same()
    return learn

@situation('GradientAccumulation')
def accumulated(m):
    "Four batches of 4 make the step of one of 16"
    if m in (METHODS['DIST'], METHODS['DLB']): pytest.skip('compares the samples of a batch: four small batches are not a large one')
    def run(bs, cbs=()):
        dls = digits()
        dls = DataLoaders(dls.train.new(bs=bs, shuffle=False), dls.valid, device=device)
        learn = always(learner([m.make(), *cbs], lambda: per_sample(m.net()), dls))
        learn.fit(1)
        return learn
    one,parts = run(16),run(4, [GradientAccumulation(16)])
    assert_close(one, parts)

def mixed(m, mix):
    learn = fitted(m, [spy := Spy(), mix(.4)])
    assert all(len(o.labels) == 2 for o in spy.steps) and any(((0 < o.labels[0][1]) & (o.labels[0][1] < 1)).any() for o in spy.steps)
    assert_losses(m, spy.steps)
    assert isinstance(learn.loss_func, CrossEntropyLossFlat)
    assert_clean(learn)

@situation('MixUp')
def mixup(m):
    "The loss is that of the two labels, by their share"
    mixed(m, MixUp)

@situation('CutMix')
def cutmix(m):
    "The loss is that of the two labels, by their share"
    mixed(m, CutMix)

def based(m, loss_func, base):
    learn = fitted(m, [spy := Spy()], loss_func=loss_func)
    assert_losses(m, spy.steps, base=base)
    assert list(learn.recorder.values[-1][1:3]) == list(alone(learn).validate())

@situation('label smoothing')
def label_smoothing(m):
    "The hard term is the learner's, with its label smoothing; the soft term is what it was"
    based(m, LabelSmoothingCrossEntropyFlat(eps=.1), partial(F.cross_entropy, label_smoothing=.1))

@situation('class weights')
def class_weights(m):
    "The hard term is the learner's, with its class weights; the soft term is what it was"
    w = torch.linspace(.2, 2., K)
    based(m, CrossEntropyLossFlat(weight=w), partial(F.cross_entropy, weight=w.double()))

class Probabilities(Callback):
    "Turns labels into probabilities, as loaders with soft labels have them"
    order = -5
    def before_batch(self): self.learn.yb = (F.one_hot(self.learn.y.as_subclass(torch.Tensor), K).float(),)

@situation('one-hot labels')
def one_hot_labels(m):
    "Labels that are probabilities give the loss of the integers that they stand for"
    fitted(m, [spy := Spy(), Probabilities()], loss_func=nn.CrossEntropyLoss(), metrics=None)
    for o in spy.steps:
        assert o.labels[0][0].shape == (16, K)
        o.labels = [(o.labels[0][0].argmax(1), 1.)]
    assert_losses(m, spy.steps)

def unindexed():
    "Loaders that do not tell which sample is where"
    x,y = digits().train.one_batch()
    items = [(x[i].as_subclass(torch.Tensor), y[i].item()) for i in range(len(x))]
    dls = DataLoaders(DataLoader(items, bs=8, shuffle=True), DataLoader(items, bs=16), device=device)
    dls.c = K
    return dls

@situation('no sample indices')
def no_indices(m):
    "Any loader will do: each step's loss and gradient are the equation's"
    fitted(m, [spy := Spy()], dls=unindexed())
    assert_losses(m, spy.steps)

@situation('lr_find, fit')
def lr_find(m):
    "Weights come back, and the fit is bit for bit that without `lr_find`"
    def run(find):
        learn = learner([m.make()], m.net)
        before = state(learn)
        if find: learn.lr_find(num_it=8, show_plot=False)
        assert_same(before, learn)
        assert metric_names(learn) == ['accuracy']
        seed_run(1, learn.dls)
        learn.fit(1)
        return learn
    a,b = run(True),run(False)
    assert_same(a, b)
    assert_same_history(a, b)

def storages(path):
    with zipfile.ZipFile(path) as z: return sum(bool(re.search(r'/data/\d+$', o)) for o in z.namelist())

@situation('export, load, predict')
def export(m):
    "The file holds as many tensors as without the method, and predicts what the network says"
    learn = fitted(m)
    learn.export('ours.pkl')
    plain = alone(learn)
    plain.fit(1)
    plain.export('plain.pkl')
    assert storages('ours.pkl') == storages('plain.pkl')
    assert Path('ours.pkl').stat().st_size < Path('plain.pkl').stat().st_size + 12_000
    loaded,items = load_learner('ours.pkl'),learn.dls.valid_ds.items[:3]
    dl = learn.dls.test_dl(items)
    with torch.no_grad(): probs = copy.deepcopy(learn.model).eval()(dl.one_batch()[0]).softmax(1)
    for item,p in zip(items, probs):
        label,i,said = loaded.predict(item)
        assert label == str(i.item()) and i == p.argmax()
        torch.testing.assert_close(said, p.as_subclass(torch.Tensor).cpu(), rtol=1e-4, atol=1e-6)

@situation('SaveModel, resume')
def resume(m):
    "A training continued from its checkpoint is bit for bit the undisturbed one, and so are the best weights"
    def run(name, cbs, seed=0):
        learn = learner([m.make(), SaveModelCallback(fname=name)], m.net, seed=seed)
        learn.fit_one_cycle(2, .05, cbs=cbs)
        return learn
    expected = run('undisturbed', [])
    with pytest.raises(KeyboardInterrupt): run('resumed', [Checkpoint('training.pt'), Stop('after_loss', 5)])
    again = run('resumed', [Checkpoint('training.pt')], seed=9)
    assert_same(again, expected)
    assert_same_history(again, expected)
    assert_same(*(torch.load(f'models/{o}.pth', weights_only=True) for o in ('resumed', 'undisturbed')))

@situation('validate, get_preds')
def validated(m):
    "Before a fit and after it: fastai's own numbers, and the network stays as it is"
    learn = learner([m.make()], m.net)
    for fit in (False, True):
        if fit: learn.fit(1)
        before,own = state(learn),alone(learn)
        assert list(learn.validate()) == list(own.validate())
        for a,b in zip(learn.get_preds(with_loss=True, with_decoded=True), own.get_preds(with_loss=True, with_decoded=True)): assert torch.equal(a, b)
        assert_same(before, learn)

@situation('get_preds without labels')
def without_labels(m):
    "Before a fit and after it: what fastai says"
    learn = learner([m.make()], m.net)
    items = learn.dls.valid_ds.items[:8]
    for fit in (False, True):
        if fit: learn.fit(1)
        preds,targs = learn.get_preds(dl=learn.dls.test_dl(items))
        assert targs is None and torch.equal(preds, alone(learn).get_preds(dl=learn.dls.test_dl(items))[0])

@situation('show_results')
def show_results(m):
    "The titles are labels and the network's first classes"
    learn = fitted(m)
    learn.show_results(max_n=4, shuffle=False)
    _,targs,classes = alone(learn).get_preds(with_decoded=True)
    assert [o.get_title().split() for o in plt.gcf().axes[:4]] == [[str(y.item()), str(p.item())] for y,p in zip(targs[:4], classes[:4])]

@situation('Interpretation')
def interpretation(m):
    "Confusion matrix and top losses are those of the network's own predictions"
    learn = fitted(m)
    interp = ClassificationInterpretation.from_learner(learn)
    probs,targs,classes = alone(learn).get_preds(with_decoded=True)
    assert (interp.confusion_matrix() == confusion_matrix(targs, classes, labels=range(K))).all()
    losses = -probs.log()[range(len(targs)), targs.as_subclass(torch.Tensor)]
    torch.testing.assert_close(interp.top_losses(5)[0].as_subclass(torch.Tensor), losses.as_subclass(torch.Tensor).topk(5).values, rtol=1e-4, atol=1e-5)
    interp.plot_top_losses(4)
    assert_clean(learn)

@situation('CSVLogger')
def csv_logger(m):
    "The file has the recorder's columns, ours among them, each once"
    learn = fitted(m, [CSVLogger()], 2)
    names = list(learn.recorder.metric_names)
    logged = pd.read_csv('history.csv')
    assert list(logged.columns) == names and len(set(names)) == len(names) and ('base_loss' in names) == bool(m.soft)
    for k,v in columns(learn).items(): np.testing.assert_allclose(logged[k], v, rtol=1e-4)

@situation('TensorBoard')
def tensorboard(m):
    "Each column is written, each epoch"
    pytest.importorskip('tensorboard', reason='tensorboard is not installed')
    from fastai.callback.tensorboard import TensorBoardCallback
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    learn = fitted(m, [TensorBoardCallback('events', trace_model=False)], 2)
    events = EventAccumulator('events').Reload()
    for k,v in columns(learn).items():
        if k != 'train_loss': np.testing.assert_allclose([o.value for o in events.Scalars(k)], v, rtol=1e-5)   # fastai writes that of each batch

@situation('GradientClip')
def gradient_clip(m):
    "The gradient of the whole loss is scaled to the norm asked for"
    norms = []
    class Norm(Callback):
        order = 10
        def before_step(self): norms.append([p.grad.clone() for p in self.learn.model.parameters()])
    class After(Norm): order = 12
    learn = fitted(m, [Norm(), GradientClip(.05), After()])
    total = lambda gs: torch.stack([g.norm() for g in gs]).norm()
    assert len(norms) == 6*m.steps
    for before,after in zip(norms[::2], norms[1::2]):
        assert total(before) > .05 and total(after).item() == pytest.approx(.05, rel=1e-4)
        for a,b in zip(before, after): torch.testing.assert_close(b, a*.05/total(before), rtol=1e-3, atol=1e-7)

@situation('ChannelsLast')
def channels_last(m):
    "The weights lie channels last, and are those of a training without, but for rounding"
    a,b = fitted(m, [ChannelsLast()]),fitted(m)
    convs = [o for o in a.model.modules() if isinstance(o, nn.Conv2d)]
    assert all(o.weight.is_contiguous(memory_format=torch.channels_last) for o in convs) and not convs[0].weight.is_contiguous()
    assert_close(a, b, 1e-4)

class EMA(Callback):
    "Validates an exponential moving average of the weights"
    order,run_valid = 60,True
    def before_fit(self): self.ema = ModelEmaV3(self.learn.model, decay=.8)
    def after_step(self): self.ema.update(self.learn.model)
    def before_validate(self): self.trained,self.learn.model = self.learn.model,self.ema.module
    def after_validate(self): self.learn.model = self.trained

@situation('EMA')
def ema(m):
    "timm's average is that of the weights after each step; validation is of the average, training of the network itself"
    history = []
    class After(Callback):
        order = 61
        def before_fit(self): history.append(state(self.learn))
        def after_step(self): history.append(state(self.learn))
    learn = fitted(m, [EMA(), After()])
    assert len(history) == 1 + 3*m.steps
    mean = history[0]
    for o in history[1:]: mean = {k: .8*mean[k] + .2*v if v.is_floating_point() else v for k,v in o.items()}
    assert_close(mean, state(learn.ema.ema.module))
    assert_same(history[-1], learn)
    assert_same(learn, fitted(m))
    own = learner(net=lambda: copy.deepcopy(learn.ema.ema.module))
    assert list(learn.recorder.values[-1][1:3]) == list(own.validate())

class Stop(Callback):
    "Ctrl-C, the `at`-th time that `event` happens in training"
    order = 2000
    def __init__(self, event, at): self.event,self.at,self.seen = event,at,0
    def __call__(self, name):
        if name != self.event or not self.training: return
        self.seen += 1
        if self.seen == self.at: raise KeyboardInterrupt

@situation('Ctrl-C, fit again')
def interrupted(m):
    "No column and no hook is left, evaluation is fastai's own, and the next fit is bit for bit one that was never interrupted"
    learn = learner([m.make()], m.net)
    start = state(learn)
    for event in ('before_batch', 'after_loss', 'after_backward'):
        with pytest.raises(KeyboardInterrupt): learn.fit(1, cbs=Stop(event, 2))
        assert_clean(learn)
    learn.model.load_state_dict(start)
    for p in learn.model.parameters(): p.grad = None   # fastai keeps those of the interrupted batch
    seed_run(1, learn.dls)
    learn.fit(1, reset_opt=True)
    names = list(learn.recorder.metric_names)
    assert len(set(names)) == len(names)
    expected = fitted(m)
    assert_same(learn, expected)
    assert_same_history(learn, expected)

# what goes on after an interrupt

def resumed(m, make, look):
    "The same of an undisturbed training and of one that was resumed"
    def run(folder, *more, seed=0):
        learn = learner([m.make(), *make(), *more], m.net, seed=seed, path=Path(folder))
        learn.fit(2, cbs=[Checkpoint(Path(folder)/'training.pt')])
        return learn
    for folder in 'ab': Path(folder).mkdir()
    expected = run('a')
    with pytest.raises(KeyboardInterrupt): run('b', Stop('after_loss', 5 if m.steps == 1 else 8))
    again = run('b', seed=9)
    assert_same(again, expected)
    return look(again),look(expected)

@situation('EMA, resumed')
def ema_resumed(m):
    "An average of the weights that says nothing of its state is bit for bit that of the undisturbed training"
    again,expected = resumed(m, lambda: [EMA()], lambda learn: state(learn.ema.ema.module))
    assert_same(again, expected)

@situation('CSVLogger, resumed')
def csv_logger_resumed(m):
    "The log is that of the undisturbed training, but for the times"
    def look(learn): return pd.read_csv(learn.path/'history.csv').drop(columns=['time', 'hit_rate'], errors='ignore')
    again,expected = resumed(m, lambda: [CSVLogger()], look)
    assert len(again) == 2
    pd.testing.assert_frame_equal(again, expected)

# other ground

@situation('MixUp of tsai')
def tsai(m):
    "The loss is that of the two labels, by their share: the mixer is known by what it holds"
    mixed(m, TsaisMixUp)

@situation('MixUp of fastxtend')
def fastxtend(m):
    "The same, though its loss function has another name"
    mixed(m, FastxtendsMixUp)

@situation('unet')
def of_unet(m):
    "A network that reads what its own hooks keep: each step's loss and gradient are the equation's, with copies that are made independently"
    fitted(m, [spy := Spy(unet_twin)], 2, net=unet)
    assert_losses(m, spy.steps, 1e-4)

@situation('ModelOutput')
def model_output(m):
    "A network that returns more than logits, as transformers' do, with a loss that takes it: each step's loss is the equation's"
    net = lambda: Wrapped(m.net())
    fitted(m, [spy := Spy()], 2, net=net, loss_func=lambda out, y: F.cross_entropy(out.logits, y), metrics=None)
    assert_losses(m, spy.steps)

@situation('two images')
def two_images(m):
    "A network of two inputs: teachers and copies see both"
    teacher = {seed: TwoImages(network(seed)) for seed in (7, 8)}
    with replaced_by(network=teacher.get):
        fitted(m, [spy := Spy()], 2, net=lambda: TwoImages(m.net()), dls=pairs_of_images())
        assert_losses(m, spy.steps)

@situation('table')
def of_table(m):
    "Rows with missing numbers; the teacher was trained with other means, spreads and medians, and answers as on its own table"
    teacher = {seed: ReadsAsTheTeacher(table_teacher(seed)) for seed in (7, 8)}
    with replaced_by(network=teacher.get, given=table_teacher):
        fitted(m, [spy := Spy()], 2, net=lambda: lively(table_net()), dls=tables())
        assert_losses(m, spy.steps, 1e-4)

@contextmanager
def replaced_by(**names):
    "Other networks as teachers, in the methods and in the equations"
    kept = {name: getattr(matrix, name) for name in names}
    vars(matrix).update(names)
    try: yield
    finally: vars(matrix).update(kept)


# ---------------------------------------------------------------- two processes

def train_part(m, world):
    "A process's part of a training that two share, by fastai's DistributedTrainer; or one process with the whole batches, in the order that makes them the same"
    cbs,both = [],digits(8 if world > 1 else 16, 'cpu')
    dls = DataLoaders(both.train.new(shuffle=False), both.valid, device='cpu')
    if world > 1:
        from fastai.distributed import DistributedTrainer
        cbs = [DistributedTrainer(sync_bn=False, cpu=True)]
    else: dls.train.get_idxs = lambda: [i for b in range(0, 24, 8) for half in (0, 24) for i in range(half+b, half+b+8)]
    learn = always(learner([m.make(), *cbs], lambda: per_sample(m.net()), dls))
    with learn.no_logging(): learn.fit(2)
    return dict(weights=state(learn), valid=list(learn.recorder.values[-1][1:3]), own=list(alone(learn, cbs=cbs).validate()))

def _broadcast(self, t, rank):
    "fastai's sends it over GPUs only"
    t = torch.tensor(t)
    dist.broadcast(t, rank)
    return t.tolist()

def work(rank, port, folder):
    "Every method in turn"
    os.environ.update(MASTER_ADDR='127.0.0.1', MASTER_PORT=str(port), RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE='2')
    torch.set_num_threads(1)
    dist.init_process_group('gloo', timeout=timedelta(seconds=60))
    from fastai.distributed import DistributedDL
    DistributedDL._broadcast = _broadcast
    os.chdir(folder)   # the same for both: a cache is shared
    for name,m in METHODS.items():
        try: result = train_part(m, 2) | dict(error='')
        except Exception: result = dict(error=traceback.format_exc())
        torch.save(result, folder/f'{name}-{rank}.pt')
    dist.destroy_process_group()

@pytest.fixture(scope='module')
def gloo(once):
    "The folder with what each method gave in two processes, started when first asked"
    return lambda: once('gloo', partial(together, work))

@situation('two processes')
def two_processes(m, gloo):
    "Two processes with half of each batch train like one with the whole"
    if not (dist.is_available() and dist.is_gloo_available()): pytest.skip('needs gloo')
    pytest.importorskip('accelerate', reason='accelerate is not installed')
    if device != 'cpu': pytest.skip('trains on processors')
    if m is METHODS['DIST']: pytest.skip('compares the samples of a batch: two halves are not the whole')
    name = next(k for k,o in METHODS.items() if o is m)
    a,b = (torch.load(gloo()/f'{name}-{rank}.pt') for rank in range(2))
    if said := re.search('batches cannot be arranged.*', a['error']):
        learner()   # for `refusal`: those of the processes are gone
        raise ValueError(said[0])
    for o in (a, b): assert not o['error'], o['error']
    assert_same(a['weights'], b['weights'])
    assert_close(a['weights'], train_part(m, 1)['weights'])
    assert a['valid'] == a['own']


# ---------------------------------------------------------------- pairs of our own

def beside(m, other):
    "The loss is the sum of both methods' terms, whichever comes first"
    net = residual if residual in (m.net, other.net) else m.net
    losses = []
    for order in (1, -1):
        both = [m.make(), other.make()]
        if type(both[0]) is type(both[1]) and m is not other: both[1] = other.make(name='second')   # as its words say
        learner([*both[::order], spy := Spy()], net, digits(24)).fit(1)
        losses.append([o.loss for o in spy.steps])
    assert losses[0] == losses[1]
    for o in spy.steps: assert o.loss.item() == pytest.approx(by_hand(o, m, other).item(), rel=1e-5)

names = list(METHODS)
PAIRS = {f'beside {name}': partial(beside, other=o) for name,o in METHODS.items()}
CELLS = [(name, s) for name in METHODS for s in SITUATIONS] + [(a, f'beside {b}') for i,a in enumerate(names) for b in names[i:]]


# ---------------------------------------------------------------- refusals

MIXERS = 'MixUp', 'CutMix', 'MixUp of tsai', 'MixUp of fastxtend'
REFUSED = {
    **{('KD cached', mix): (ValueError, 'Under MixUp and CutMix') for mix in MIXERS},
    **{('KD cached', s): (ValueError, r'call with_index\(dls\)') for s in ('no sample indices', 'table')},
    **{(o, 'one-hot labels'): (TypeError, 'integer labels') for o in ('MemoryReplay-TC', 'Distill Amplify', 'Distill Replace', 'OnlineLabelSmoothing')},
    **{(o, mix): (ValueError, 'belongs to no sample') for o in ('PSKD', 'OnlineLabelSmoothing', 'DLB', 'CSKD') for mix in MIXERS},
    **{(o, s): (ValueError, r'call with_index\(dls\)') for o in ('PSKD', 'DLB', 'CSKD') for s in ('no sample indices', 'table')},
    **{(o, 'table'): (ValueError, 'no residual blocks') for o in ('StochasticDepth', 'SelfGuidance')},
    **{(o, 'two processes'): (ValueError, 'batches cannot be arranged in several processes') for o in ('DLB', 'CSKD')},
}
for method,s in CELLS:
    if not s.startswith('beside'): continue
    pair = [method, s.removeprefix('beside ')]
    if set(pair) <= {'StochasticDepth', 'SelfGuidance'} and pair != ['SelfGuidance']*2: REFUSED[method, s] = ValueError, 'both drop branches'
    elif set(pair) == {'DLB', 'CSKD'}: REFUSED[method, s] = ValueError, 'two methods would arrange the batches'
    elif pair[0] == pair[1]: REFUSED[method, s] = ValueError, 'give one of them a name='
    elif sum(1-METHODS[o].hard for o in pair) > 1+1e-9: REFUSED[method, s] = ValueError, 'lower their alpha to a sum of at most 1'

def refusal(error, words, check):
    "What it says, before the first step; without our callbacks the learner trains on"
    with pytest.raises(error, match=words) as e: check()
    learn,before = made
    for k,p in learn.model.named_parameters(): assert torch.equal(p.cpu(), before[k].cpu()), k
    learn.remove_cbs([o for o in learn.cbs if not isinstance(o, (TrainEvalCallback, Recorder, CastToTensor))])
    learn.loss_func = CrossEntropyLossFlat()   # fastai's MixUp does not survive an error
    learn.fit(1)
    assert list(learn.recorder.metric_names) == ['epoch', 'train_loss', 'valid_loss', *metric_names(learn), 'time'] and set(metric_names(learn)) <= {'accuracy'}
    return ' '.join(str(e.value).split())


# ---------------------------------------------------------------- the matrix

def note(method, situation, result):
    if path := os.environ.get('FASTKDTF_MATRIX'):
        cell = dict(at=CELLS.index((method, situation)), method=method, situation=situation, result=result)
        with open(path, 'a') as f: f.write(json.dumps(cell) + '\n')

@pytest.mark.parametrize('method,situation', CELLS)
def test_matrix(method, situation, gloo):
    check = partial({**SITUATIONS, **PAIRS}[situation], METHODS[method], **(dict(gloo=gloo) if situation == 'two processes' else {}))
    try:
        refused = REFUSED.get((method, situation))
        result = f'refused: {refusal(*refused, check)}' if refused else check() or 'works'
    except pytest.skip.Exception as e:
        note(method, situation, f'skipped: {e.msg}')
        raise
    note(method, situation, result)

def test_the_documentation_shows_these_cells():
    "After a change: python tools/matrix.py"
    with open(table, newline='') as f: kept = list(csv.DictReader(f.readlines()[1:]))
    assert [(o['method'], o['situation']) for o in kept] == CELLS
    kinds = {(o['method'], o['situation']): o['result'].partition(': ')[0] for o in kept}
    assert set(kinds.values()) <= {'works', 'refused', 'skipped'}
    assert {k for k,v in kinds.items() if v == 'refused'} == set(REFUSED)

def test_every_method_of_the_list_is_in_the_matrix():
    from fastkdtf.callback.methods import methods
    ours = [m.name for m in methods.values() if not m.control]
    assert len(ours) > 10 and set(ours) <= set(METHODS)
