"The in-memory loader, its augmentation against plain loops and Pillow, indices of any loader, and names of data sets"
import copy, os, pickle, random, shutil, subprocess, sys, warnings
from pathlib import Path
from types import SimpleNamespace

import matplotlib
matplotlib.use('Agg')
import numpy as np
import pandas as pd
import pytest
import torch
import torchvision.transforms as T
from fastai.callback.data import WeightedDL
from fastai.data.all import DataLoader, DataLoaders, Datasets, IntToFloatTensor, Normalize, TfmdDL, Transform
from fastai.tabular.all import Categorify, FillMissing, TabularDataLoaders, tabular_learner
from fastai.text.data import LMDataLoader, SortedDL
from fastai.vision.all import (Callback, CropPad, CrossEntropyLossFlat, FlipItem, ImageDataLoaders, Interpretation, Learner, PILImage, RandomCrop, Resize,
                               TensorCategory, TensorImage, accuracy, aug_transforms, load_learner, nn)
from hypothesis import given, settings, strategies as st
from PIL import Image

from fastkdtf.vision.augment import Augment
from fastkdtf.vision.data import kd_dataloaders
from fastkdtf.vision.identity import loader_identity
from fastkdtf.vision.loader import BatchInfo, CategorizeRecord, NormalizeBatch, RecordDL, batch_info, blank_records, image_tensor, to_records, with_index
from fastkdtf.lab.measure import interleaved_times, median_ratio

M = 2**64-1
def mix(z):
    z = (z^(z>>30))*0xBF58476D1CE4E5B9 & M
    z = (z^(z>>27))*0x94D049BB133111EB & M
    return z^(z>>31)
def bits(*keys):
    h = 0
    for k in keys: h = mix((h+0x9E3779B97F4A7C15+k) & M)
    return h
def below(b, n): return (b>>32)*n>>32

def plain_params(a, idx, view):
    "What the docs say, in Python's integers"
    key = bits(a.seed, idx, view)
    shift,turn = (mix(key+i*0x9E3779B97F4A7C15 & M) for i in (1,2))
    return below(shift, 2*a.pad+1), below(shift<<32 & M, 2*a.pad+1), bool(turn&1) and a.flip, (2*(turn>>11)/2**53-1)*a.rotate

def plain_augment(img, a, dy, dx, flip, angle):
    "Pad, crop, flip one image [C,H,W] in NumPy, and turn it with Pillow"
    _,h,w = img.shape
    img = np.pad(img, ((0,0),(a.pad,a.pad),(a.pad,a.pad)))[:,dy:dy+h,dx:dx+w]
    if flip: img = img[...,::-1]
    if a.rotate: img = np.asarray(Image.fromarray(img.transpose(1,2,0).copy()).rotate(angle, Image.Resampling.NEAREST)).transpose(2,0,1)
    return img

def images(n=64, h=32, w=32, seed=0, low=1): return np.random.default_rng(seed).integers(low, 256, (n,3,h,w), dtype=np.uint8)
def record_dl(augment=None, n=60, bs=8, split_idx=0, norm=True, size=(8,8), **kw):
    recs = to_records(images(n, *size).transpose(0,2,3,1), np.arange(n)%4)
    dset = Datasets(recs, [[image_tensor], [CategorizeRecord(list('abcd'))]], split_idx=split_idx)
    tfms = [IntToFloatTensor(), *([NormalizeBatch.from_stats([.5]*3, [.3]*3, cuda=False)] if norm else [])]
    dl = RecordDL(dset, augment, bs=bs, **{**dict(shuffle=True, drop_last=True, num_workers=0, device='cpu'), **kw}, after_batch=tfms)
    dl.rng = random.Random(0)
    return dl

settings_of = st.builds(Augment, flip=st.booleans(), pad=st.integers(0, 9), rotate=st.sampled_from([0., 5., 15., 90., 180.]), seed=st.integers(0, 2**63-1))


# augmentation

@pytest.mark.parametrize('a', [Augment(flip=True), Augment(pad=4), Augment(rotate=15), Augment(flip=True, pad=4), Augment(flip=True, pad=4, rotate=15),
                               Augment(pad=3, rotate=180, seed=9), Augment(flip=True, pad=40)], ids=repr)
@pytest.mark.parametrize('size', [(32,32), (9,14), (1,1)], ids=str)
def test_equals_a_plain_loop_and_pillow(a, size):
    x,idx,view = images(40, *size),np.arange(40)*7,np.arange(40)**3+2**60
    got = a(torch.from_numpy(x), torch.from_numpy(idx), torch.from_numpy(view))
    assert got.dtype==torch.uint8 and got.is_contiguous()
    p = a.params(idx, view)
    for i in range(40):
        want = plain_params(a, int(idx[i]), int(view[i]))
        assert (p.dy[i], p.dx[i], p.flip[i], p.angle[i])==want
        assert (got[i].numpy()==plain_augment(x[i], a, *want)).all()

@given(settings_of, st.integers(0, 2**40), st.integers(0, 2**62-1), st.tuples(st.integers(1, 12), st.integers(1, 12)))
@settings(max_examples=60, deadline=None)
def test_replay_and_bounds(a, idx, view, size):
    x = torch.from_numpy(images(3, *size))
    i,v = torch.arange(3)+idx, torch.full((3,), view)
    got,p = a(x, i, v),a.params(i, v)
    assert torch.equal(a(x, i, v), got) and torch.equal(a(x[1:2], i[1:2], v[1:2]), got[1:2])
    assert torch.equal(a(x.float(), i, v), got.float())
    assert ((0<=p.dy)&(p.dy<=2*a.pad)&(0<=p.dx)&(p.dx<=2*a.pad)).all() and (np.abs(p.angle)<=a.rotate).all() and (a.flip or not p.flip.any())
    assert got.shape==x.shape and set(got.unique().tolist())<={0, *x.unique().tolist()}

def uniform(counts):
    "Chi-square of equal shares lies where it does but once in 10,000 (Wilson and Hilferty's approximation)"
    counts = np.asarray(counts, float)
    chi,k = ((counts-counts.mean())**2/counts.mean()).sum(),len(counts)-1
    return abs((chi/k)**(1/3) - (1-2/(9*k)))/np.sqrt(2/(9*k)) < 4

@pytest.mark.parametrize('idx,view', [(np.arange(90_000), np.zeros(90_000)), (np.zeros(90_000), np.arange(90_000)), (np.arange(90_000)%300, np.arange(90_000)//300)],
                         ids=['samples', 'views', 'both'])
def test_distribution_and_independence(idx, view):
    a = Augment(flip=True, pad=4, rotate=15)
    p = a.params(idx, view)
    assert uniform(np.bincount(p.dy, minlength=9)) and uniform(np.bincount(p.dx, minlength=9)) and uniform(np.bincount(p.flip, minlength=2))
    assert uniform(np.histogram(p.angle, 50, (-15,15))[0])
    assert uniform(np.bincount(p.dy*18+p.dx*2+p.flip, minlength=162))                       # the settings of one sample
    assert uniform(np.histogram2d(p.angle, p.flip, (9,2))[0].ravel())
    for o in p.dy, p.dx: assert uniform(np.bincount(o[:-1]*9+o[1:], minlength=81))          # neighbours
    assert uniform(np.bincount(p.flip[:-1]*2+p.flip[1:], minlength=4))
    other = Augment(flip=True, pad=4, rotate=15, seed=1).params(idx, view)
    assert uniform(np.bincount(p.dy*9+other.dy, minlength=81))

def test_records_to_be_filled():
    recs = blank_records(5, 4, 3)
    x,y = images(5, 4, 3),np.arange(5)
    for i in range(5): recs['image'][i],recs['label'][i] = x[i],y[i]
    assert type(recs) is type(to_records(x.transpose(0,2,3,1), y)) and (recs==to_records(x.transpose(0,2,3,1), y)).all()

def test_padding_is_black_before_normalisation():
    dl = record_dl(Augment(pad=8), bs=60, norm=False)
    x,_ = dl.one_batch()
    black = (x==0).float().mean((0,1))
    shown = np.array([sum(0<=d+r-8<8 for d in range(17)) for r in range(8)])/17 # share of shifts that show something in row r
    assert np.abs(1-np.outer(shown, shown)-black.numpy()).max()<.25 and x.max()<=1
    dl = record_dl(Augment(pad=8), bs=60)
    assert dl.one_batch()[0].min()==pytest.approx(-.5/.3)

def test_views():
    few,rng = Augment(flip=True, views=5),random.Random(0)
    v = torch.cat([few.draw(rng, 100) for _ in range(100)])
    assert uniform(np.bincount(v, minlength=5)) and v.dtype==torch.int64
    v = torch.cat([Augment(flip=True).draw(rng, 100) for _ in range(100)])
    assert len(v.unique())==10_000 and 0<=v.min() and 2**60<v.max()<2**62
    assert torch.equal(few.draw(random.Random(3), 9), few.draw(random.Random(3), 9))

@pytest.mark.skipif(not torch.cuda.is_available(), reason='no GPU')
def test_gpu_gives_the_same_bits():
    a,x,i = Augment(flip=True, pad=4, rotate=15),torch.from_numpy(images(256)),torch.arange(256)
    assert torch.equal(a(x.cuda(), i, i).cpu(), a(x, i, i))
    cpu,gpu = record_dl(a),record_dl(a, device='cuda')
    for (x,y),(x2,y2) in zip(cpu, gpu, strict=True): assert torch.allclose(x, x2.cpu(), atol=1e-6) and torch.equal(y, y2.cpu())
    assert vars(gpu)['_kept'][1].is_cuda

@pytest.mark.parametrize('kw,error,why', [
    (dict(flip=.5),       TypeError,  'flip must be True or False'),
    (dict(pad=1.5),       TypeError,  'pad must be a whole number'),
    (dict(pad=-1),        ValueError, 'pad=-1 must be at least 0'),
    (dict(rotate='a'),    TypeError,  'rotate must be a number of degrees'),
    (dict(rotate=-5),     ValueError, 'rotate=-5 must lie between'),
    (dict(rotate=float('nan')), ValueError, 'rotate=nan must lie'),
    (dict(views=0),       ValueError, 'views=0 must be at least 1'),
    (dict(views=2**31),   ValueError, r'views=2147483648 must be below'),
    (dict(seed=-1),       ValueError, 'seed=-1 must be'),
    (dict(seed=2**63),    ValueError, 'must be below')])
def test_bad_settings(kw, error, why):
    with pytest.raises(error, match=why): Augment(**kw)

def test_settings_show_and_compare():
    a = Augment(flip=True, pad=4, views=3)
    assert repr(a)=='Augment(flip=True, pad=4, rotate=0, views=3, seed=0)' and eval(repr(a))==a and a!=Augment(flip=True, pad=4)
    assert a and not Augment() and pickle.loads(pickle.dumps(a))==a


# in-memory loader

@pytest.mark.parametrize('workers', [0, 2])
@pytest.mark.parametrize('a', [Augment(flip=True, pad=2, rotate=15), Augment(flip=True, pad=2, views=3), None], ids=repr)
def test_batches_come_again(a, workers):
    dl = record_dl(a, num_workers=workers)
    items,seen = dl.dataset.items,[]
    for _ in range(2):
        for x,y in dl:
            info = batch_info(dl)
            assert isinstance(info, BatchInfo) and info.idx.dtype==info.view.dtype==torch.int64 and len(info.idx)==len(info.view)==len(y)==8
            assert (type(x),type(y))==(TensorImage,TensorCategory) and (y==torch.from_numpy(np.array(items['label']))[info.idx]).all()
            want = torch.from_numpy(np.array(items['image'][info.idx.numpy()]))
            if a: want = a(want, info.idx, info.view)
            else: assert not info.view.any()
            assert torch.equal(x.as_subclass(torch.Tensor), (want.float().div_(255)-.5)/.3)
            seen.append((x, y, info))
    for x,y,info in seen:
        x2,y2 = dl.batch_of(*info)
        assert torch.equal(x, x2) and torch.equal(y, y2)
    assert batch_info(dl)==seen[-1][2]
    assert len(seen)==14 and len({int(i) for *_,o in seen[:7] for i in o.idx})==56

def test_workers_change_nothing():
    a,b = (list(record_dl(Augment(flip=True, pad=2), num_workers=n)) for n in (0,2))
    for (x,y),(x2,y2) in zip(a, b, strict=True): assert torch.equal(x, x2) and torch.equal(y, y2)

def test_augmentation_comes_from_the_rng_and_leaves_the_order():
    def epochs(a, stop=99):
        dl = record_dl(a)
        list(zip(range(stop), dl))
        return [(batch_info(dl).idx.tolist(), batch_info(dl).view.tolist()) for _ in dl]
    assert epochs(Augment(pad=2))==epochs(Augment(pad=2))==epochs(Augment(pad=2), stop=1)    # also after an interrupted epoch
    dl = record_dl(Augment(pad=2))
    state = dl.rng.getstate()
    first = [x for x,_ in dl]
    dl.rng.setstate(state)
    assert all(torch.equal(a, x) for a,(x,_) in zip(first, dl))
    assert not all(torch.equal(a, x) for a,(x,_) in zip(first, dl))
    before = random.getstate(),np.random.get_state()[1].copy()
    list(dl)
    assert random.getstate()==before[0] and (np.random.get_state()[1]==before[1]).all()

def test_training_only():
    a = Augment(flip=True, pad=4)
    train = record_dl(a)
    valid = record_dl(a, split_idx=1, shuffle=False, drop_last=False)
    assert train.augments and not valid.augments and train.new().augment is a and train.new(augment=None).augment is None
    x = torch.cat([o for o,_ in valid])
    assert torch.equal(x, (torch.from_numpy(np.array(valid.dataset.items['image'])).float().div_(255)-.5)/.3)
    assert torch.equal(valid.batch_of(torch.arange(8), torch.zeros(8, dtype=torch.int64))[0], x[:8])
    dls = DataLoaders(train, valid, device='cpu')
    t = dls.test_dl(valid.dataset.items[:9])
    assert not t.augments and torch.equal(t.one_batch()[0][:8], x[:8])
    with valid.dataset.set_split_idx(0): assert valid.augments and not torch.equal(valid.one_batch()[0], x[:8])   # learn.tta

def test_item_transforms_are_augmented_too():
    class Invert(Transform):
        def encodes(self, x:TensorImage): return 255-x
    dl = record_dl(Augment(flip=True, pad=2))
    dl = dl.new(after_item=[Invert()])
    x,y = dl.one_batch()
    info = batch_info(dl)
    want = dl.augment(255-torch.from_numpy(np.array(dl.dataset.items['image'][info.idx.numpy()])), info.idx, info.view)
    assert torch.equal(x.as_subclass(torch.Tensor), (want.float().div_(255)-.5)/.3)
    assert torch.equal(dl.batch_of(*info)[0], x)

def test_learner(tmp_path):
    dls = kd_dataloaders('digits', bs=64, device='cpu', augment=Augment(pad=1, rotate=10))
    seen = []
    class See(Callback):
        def before_batch(self):
            info = batch_info(self.learn.dl)
            items = self.learn.dl.dataset.items
            seen.append((self.training, bool(info.view.any())))
            assert (self.y.as_subclass(torch.Tensor)==torch.from_numpy(np.array(items['label'][info.idx.numpy()]))).all()
    learn = Learner(dls, nn.Sequential(nn.Flatten(), nn.Linear(192,10)), loss_func=CrossEntropyLossFlat(), metrics=accuracy, path=tmp_path)
    with learn.no_bar(), learn.no_logging():
        learn.fit(2, 1e-2, cbs=See())
        assert set(seen)=={(True,True),(False,False)}
        assert torch.equal(learn.get_preds()[0], learn.get_preds()[0])
        tta,plain = learn.tta(n=2)[0],learn.get_preds()[0]
        assert not torch.equal(tta, plain)
        learn.show_results(max_n=4)
        Interpretation.from_learner(learn).plot_top_losses(4)
        dls.show_batch(max_n=4); dls.train.show_batch(max_n=4, unique=True)
        learn.export('m.pkl')
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')
            loaded = load_learner(tmp_path/'m.pkl')
        img = dls.test_ds.items['image'][0].transpose(1,2,0)
        Image.fromarray(img).save(tmp_path/'a.png')
        want = learn.get_preds(ds_idx=2)[0][0]
        with loaded.no_bar():
            for o in img, Image.fromarray(img), tmp_path/'a.png', image_tensor(img): assert torch.allclose(loaded.predict(o)[2], want, atol=1e-6)
    matplotlib.pyplot.close('all')
    assert loaded.dls.train.augment==dls.train.augment

def test_copies_and_pickles():
    dl = record_dl(Augment(pad=2))
    list(dl)
    for o in pickle.loads(pickle.dumps(dl)), copy.deepcopy(dl):
        assert batch_info(o) is None and o.augment==dl.augment and torch.equal(o.batch_of([1,2], [3,4])[0], dl.batch_of([1,2], [3,4])[0])
        assert o.after_batch.dl is o

def test_large_sets_stay_in_main_memory(monkeypatch):
    dl = record_dl(Augment(pad=2), device='meta')
    dl.one_batch()
    assert vars(dl)['_kept'][1].device.type=='meta'
    monkeypatch.setattr(RecordDL, 'max_kept', 10)
    dl = record_dl(Augment(pad=2), device='meta')
    assert dl.one_batch()[0].device.type=='meta' and '_kept' not in vars(dl)

def test_augment_must_be_one():
    with pytest.raises(TypeError, match='augment must be an Augment or None'): record_dl(True)


# indices of any loader

def same(a, b):
    for x,y in zip(a, b, strict=True):
        assert type(x) is type(y) and len(x)==len(y)
        for o,p in zip(x, y): assert type(o) is type(p) and torch.equal(o, p)

@pytest.fixture(scope='module')
def files(tmp_path_factory):
    root = tmp_path_factory.mktemp('pets')
    for i,o in enumerate(images(48, 12, 12).transpose(0,2,3,1)):
        (root/'ab'[i%2]).mkdir(exist_ok=True)
        Image.fromarray(o).save(root/'ab'[i%2]/f'{i:02}.png')
    return root

def pets(files, **kw): return ImageDataLoaders.from_folder(files, valid_pct=.25, seed=1, bs=8, **{**dict(num_workers=0, device='cpu'), **kw})

@pytest.mark.parametrize('workers', [0, 2])
def test_image_files(files, workers, tmp_path):
    plain,dls = pets(files, num_workers=workers),pets(files, num_workers=workers)
    assert with_index(dls) is dls and with_index(dls) is dls
    plain.train.rng,dls.train.rng = random.Random(0),random.Random(0)
    same(list(plain.train), list(dls.train))
    same(list(plain.valid), list(dls.valid))
    whole = torch.from_numpy(images(48, 12, 12))
    for dl in dls.train, dls.valid, dls.train.new(shuffle=False, drop_last=False, bs=5):
        n = 0
        for x,y in dl:
            idx = batch_info(dl).idx
            at = torch.tensor([int(Path(dl.dataset.items[i]).stem) for i in idx])
            assert torch.equal((x*255).round().byte(), whole[at]) and len(y)==len(idx)
            x2,y2 = dl.batch_of(idx)
            assert torch.equal(x, x2) and torch.equal(y, y2)
            n += len(y)
        assert n==len(dl)*dl.bs if dl.drop_last else n==len(dl.dataset)
    learn = Learner(dls, nn.Sequential(nn.Flatten(), nn.Linear(432,2)), loss_func=CrossEntropyLossFlat(), path=tmp_path)
    with learn.no_bar(), learn.no_logging():
        learn.fit(1); learn.show_results(max_n=2); dls.show_batch(max_n=2)
        preds = learn.get_preds(dl=dls.test_dl(dls.valid_ds.items))[0]
        assert torch.equal(preds, learn.get_preds()[0])
        learn.export('m.pkl')
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')
            loaded = load_learner(tmp_path/'m.pkl')
        with loaded.no_bar(): assert torch.allclose(loaded.predict(dls.valid_ds.items[0])[2], preds[0], atol=1e-6)
    matplotlib.pyplot.close('all')

def test_tabular_and_weighted():
    df = pd.DataFrame(dict(a=np.arange(60.), b=list('xyz')*20, y=['p','q']*30))
    dls = with_index(TabularDataLoaders.from_df(df, procs=[Categorify,FillMissing], cat_names=['b'], cont_names=['a'], y_names='y', bs=8, device='cpu',
                                                valid_idx=list(range(0,60,5))))
    for dl in dls:
        for cat,cont,y in dl: assert (cont[:,0].numpy()==dl.dataset.items['a'].values[batch_info(dl).idx].astype(np.float32)).all()
    learn = tabular_learner(dls, layers=[4])
    with learn.no_bar(), learn.no_logging():
        learn.fit(1)
        assert learn.predict(df.iloc[0])[2].shape==(2,) and len(learn.get_preds(dl=dls.test_dl(df))[0])==60
    dset = Datasets(list(range(50)), [[lambda o: float(o)],[lambda o: int(o)]])
    dl = WeightedDL(dset, bs=10, wgts=np.r_[np.zeros(25),np.ones(25)], num_workers=0, shuffle=True)
    with_index(DataLoaders(dl))
    for x,y in dl: assert (y==batch_info(dl).idx).all() and y.min()>=25

def test_texts_of_different_length():
    from fastai.text.data import pad_input
    rng = np.random.default_rng(0)
    texts = [torch.from_numpy(rng.integers(2, 50, n)) for n in rng.integers(3, 30, 40)]
    for shuffle in True, False:
        dl = SortedDL(Datasets(list(range(40)), [[lambda i: texts[i]], [lambda i: i]]), bs=7, shuffle=shuffle, num_workers=0, before_batch=pad_input)
        dls = with_index(DataLoaders(dl))
        n = 0
        for x,y in dls.train:
            assert (y==batch_info(dl).idx).all()
            n += len(y)
        assert n==40 and dls.train.new(dl.dataset).bs==7

def test_plain_fastai_loader_and_skipped_items():
    from fastai.data.load import SkipItemException
    class Odd(TfmdDL):
        def create_item(self, s):
            if s%3==0: raise SkipItemException
            return super().create_item(s)
    for dl in DataLoader(list(range(20)), bs=4, shuffle=True), Odd(Datasets(list(range(20)), [[lambda o: int(o)]]), bs=4, num_workers=0):
        dls = with_index(DataLoaders(dl))
        for b in dls.train:
            b = b if isinstance(b, torch.Tensor) else b[0]
            assert b.tolist()==batch_info(dl).idx.tolist()

def test_several_processes(monkeypatch):
    try: import accelerate
    except ImportError: # fastai.distributed needs its name only, as long as nothing trains
        monkeypatch.setitem(sys.modules, 'accelerate', SimpleNamespace(Accelerator=type('Accelerator', (), {})))
        monkeypatch.delitem(sys.modules, 'fastai.distributed', raising=False)
    from fastai.distributed import DistributedDL
    monkeypatch.setattr(DistributedDL, '_broadcast', lambda self, t, rank: list(t))
    for make in lambda: record_dl(Augment(flip=True, pad=2)), lambda: with_index(DataLoaders(TfmdDL(Datasets(list(range(60)), [[lambda o: float(o)],[lambda o: o%4]]),
                                                                                             bs=8, shuffle=True, num_workers=0))).train:
        got = []
        for rank in 0,1:
            dl = make()
            dl.rng = random.Random(0)
            dist = DistributedDL(dl, rank=rank, world_size=2, device='cpu')
            for x,y in dist:
                info = batch_info(dist)
                assert (y==info.idx%4).all() and len(info.idx)==len(y)
                if isinstance(dl, RecordDL): assert torch.equal(dl.batch_of(*info)[0], x)
                got += info.idx.tolist()
        assert len(set(got))>=48 and len(set(got))==len(got)

def test_pinned_tuples_come_as_lists():
    dls = with_index(DataLoaders(TfmdDL(Datasets(list(range(8)), [[lambda o: float(o)],[lambda o: int(o)]]), bs=4, num_workers=0, pin_memory=True, device='cpu')))
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        assert all(type(b) is tuple for b in dls.train)
    b = next(iter(dls.train.create_batches(dls.train.get_idxs())))
    assert type(dls.train.after_batch((list(b[0]), b[1]))) is tuple

def test_what_has_no_index():
    with pytest.raises(TypeError, match=r'loader 0 is a torch\.utils\.data.* put its data set in a fastai DataLoader'):
        with_index(DataLoaders(torch.utils.data.DataLoader([1,2])))
    with pytest.raises(ValueError, match='LMDataLoader'):
        with_index(DataLoaders(LMDataLoader([torch.arange(100)], bs=2, seq_len=5, num_workers=0)))
    with pytest.raises(ValueError, match='one by one by index'): with_index(DataLoaders(DataLoader(iter(range(5)), bs=2)))
    with pytest.raises(ValueError, match='one by one by index'): with_index(DataLoaders(DataLoader([1,2], bs=None)))
    assert batch_info(TfmdDL([1,2], bs=1, num_workers=0)) is None and batch_info([1]) is None and batch_info(None) is None

def test_whole_batches_of_ones_own_have_no_index():
    dl = TfmdDL(list(range(8)), bs=4, num_workers=0)
    with_index(DataLoaders(dl))
    dl.create_batches = lambda samps: iter([torch.arange(4)])
    assert [b.tolist() for b in dl]==[[0,1,2,3]] and batch_info(dl) is None


# names of data sets

def test_identity_names_what_is_seen():
    a = Augment(flip=True, pad=2)
    name = loader_identity(record_dl(a))
    assert len(name)==32 and name==loader_identity(record_dl(a, bs=5, shuffle=False, drop_last=False))
    dl = record_dl(a); list(dl)
    assert loader_identity(dl)==name
    others = [record_dl(None), record_dl(Augment(flip=True, pad=2, seed=1)), record_dl(Augment(flip=True, pad=2, views=4)), record_dl(a, norm=False),
              record_dl(a, n=59), record_dl(a, split_idx=1)]
    names = [name, *map(loader_identity, others)]
    assert len(set(names))==6 and loader_identity(others[0])==loader_identity(others[-1])  # not augmented either way
    dl = record_dl(a); dl.dataset.items['image'][17,0,0,0] ^= 1
    assert loader_identity(dl)!=name
    dl = record_dl(a); dl.after_batch[1].mean += .01
    assert loader_identity(dl)!=name

def test_identity_disturbs_nothing():
    dl = record_dl(Augment(pad=2))
    next(iter(dl))
    info,rng,state = batch_info(dl),dl.rng.getstate(),(random.getstate(),torch.get_rng_state())
    loader_identity(dl)
    assert batch_info(dl) is info and dl.rng.getstate()==rng and random.getstate()==state[0] and torch.equal(torch.get_rng_state(), state[1])

def test_identity_is_the_same_in_every_process(files):
    code = '''if True:
        import sys, random; sys.path.insert(0, 'tests')
        import test_loader as t
        from pathlib import Path
        print(t.loader_identity(t.record_dl(t.Augment(flip=True))), t.loader_identity(t.with_index(t.pets(Path(sys.argv[1]))).train))'''
    env = {**os.environ, 'PYTHONHASHSEED': '5', 'PYTHONPATH': '', 'PYTHONWARNINGS': 'ignore'}
    out = subprocess.run([sys.executable, '-c', code, str(files)], cwd=Path(__file__).parents[1], env=env, capture_output=True, text=True)
    assert out.returncode==0, out.stderr
    assert out.stdout.split()==[loader_identity(record_dl(Augment(flip=True))), loader_identity(with_index(pets(files)).train)]

def test_identity_of_files(files, tmp_path):
    name = loader_identity(with_index(pets(files)).train)
    shutil.copytree(files, tmp_path/'moved')
    assert loader_identity(with_index(pets(tmp_path/'moved')).train)==name
    assert loader_identity(with_index(pets(files, item_tfms=Resize(6, method='squish'))).train)!=name
    assert loader_identity(with_index(pets(files, batch_tfms=Normalize.from_stats([.5]*3, [.2]*3, cuda=False))).train)!=name
    o = next((tmp_path/'moved'/'a').iterdir()); o.write_bytes(o.read_bytes()+b' ')
    assert loader_identity(with_index(pets(tmp_path/'moved')).train)!=name

class TV(Transform):
    def __init__(self, *tfms): self.tfms = list(tfms)
    def encodes(self, x:PILImage):
        for t in self.tfms: x = t(x)
        return x

class Noise(Transform):
    def encodes(self, x:TensorImage): return x+torch.rand(1)

def jitter(x:PILImage): return PILImage.create(np.roll(np.asarray(x), np.random.randint(12), 1))

@pytest.mark.parametrize('kw,why', [
    (dict(item_tfms=FlipItem()),                                  'FlipItem is random'),
    (dict(batch_tfms=aug_transforms(size=12)),                    'is random'),
    (dict(item_tfms=TV(T.RandomHorizontalFlip(.02))),               'RandomHorizontalFlip is random'),
    (dict(item_tfms=TV(T.Compose([T.RandomCrop(12, padding=2)]))),  'RandomCrop is random'),
    (dict(item_tfms=[jitter]),                                    'fetched twice is not the same'),
    (dict(batch_tfms=[Noise()]),                                  'fetched twice is not the same')], ids=['fastai','aug_transforms','torchvision','compose','item','batch'])
def test_unrecorded_randomness_is_refused(files, kw, why):
    dls = with_index(pets(files, **kw))
    with pytest.raises(ValueError, match=f'{why}.*kd_dataloaders'): loader_identity(dls.train)
    if why in ('FlipItem is random','is random'): loader_identity(dls.valid)      # fastai's leave validation alone

def test_identity_without_index(files):
    with pytest.raises(ValueError, match=r'call with_index\(dls\) first'): loader_identity(pets(files).train)
    with pytest.raises(ValueError, match=r'with_index'): loader_identity(None)

def test_resize_is_random_where_it_crops(files):
    with pytest.raises(ValueError, match="Resize is random.*method='squish'"): loader_identity(with_index(pets(files, item_tfms=Resize(6))).train)
    loader_identity(with_index(pets(files, item_tfms=Resize(6))).valid)
    loader_identity(with_index(pets(files, item_tfms=Resize(6, method='squish'))).train)

def test_a_called_object_is_seen_through():
    dls = with_index(DataLoaders(TfmdDL(torch.rand(9,3,4,4), bs=3, num_workers=0, after_item=[T.RandomErasing(p=1e-9)])))
    with pytest.raises(ValueError, match='RandomErasing is random'): loader_identity(dls.train)


# speed

def test_faster_than_image_files(tmp_path):
    for i,o in enumerate(images(512).transpose(0,2,3,1)):
        (tmp_path/str(i%10)).mkdir(exist_ok=True)
        Image.fromarray(o).save(tmp_path/str(i%10)/f'{i}.png')
    byfile = ImageDataLoaders.from_folder(tmp_path, valid_pct=.5, seed=0, bs=128, num_workers=0, device='cpu',
                                          item_tfms=[CropPad(40, pad_mode='zeros'), RandomCrop(32), FlipItem()],
                                          batch_tfms=Normalize.from_stats([.5]*3, [.3]*3, cuda=False)).train
    ours = record_dl(Augment(flip=True, pad=4), n=256, bs=128, size=(32,32))
    assert len(byfile)==len(ours)==2
    def use(dl):
        for _ in dl: pass
    times = interleaved_times({'files': lambda: use(byfile), 'ours': lambda: use(ours)}, rounds=7)
    assert median_ratio(times, 'files', 'ours')>=20


def test_every_part_of_a_method_knows_the_samples():
    "Whether it runs before the student or after it"
    from fastkdtf.callback.distill import Distill
    from fastkdtf.teachers.base import Teacher
    dls = kd_dataloaders('digits', bs=64, augment=Augment(pad=1, views=2))
    seen = []
    class Early(Teacher):
        before_student = True
        def __call__(self, step):
            seen.append((step.idx, step.view))
            return torch.zeros(len(step.idx), 10)
    def weight(step):
        idx,view = seen[-1]
        assert step.idx is not None and torch.equal(step.idx, idx) and torch.equal(step.view, view)
        return torch.ones(len(step.y))
    learn = Learner(dls, nn.Sequential(nn.Flatten(), nn.Linear(192, 10)), cbs=Distill(Early(), .5, sample_weight=weight))
    with learn.no_bar(), learn.no_logging(): learn.fit(1)
    assert len(seen) == len(dls.train) and set(torch.cat([v for _,v in seen]).tolist()) == {0, 1}
