"Loaders on digits and .npz files: splits, fastai's whole interface, export without images, bad input."
import gzip, io, json, os, pickle, random, shutil, tarfile, warnings, zipfile
from functools import partial
from pathlib import Path

import matplotlib
matplotlib.use('Agg')
import numpy as np
import pytest
import torch
from fastai.vision.all import (CrossEntropyLossFlat, DataLoaders, Interpretation, Learner, PILImage, TensorCategory, TensorImage,
                               Transform, accuracy, load_learner, nn, set_seed)
from PIL import Image
from sklearn.datasets import load_digits

from fastkdtf.vision import data
from fastkdtf.vision.augment import Augment
from fastkdtf.vision.data import channel_stats, image_tensor, kd_dataloaders, npz_arrays, read_files, read_npz, stratified, to_records


def items(dl): return dl.dataset.items
def loaders(dls): return [items(o) for o in dls]
def epoch(dl): return torch.cat([y for _,y in dl])
def linear(dls, size=8):
    model = nn.Sequential(nn.Flatten(), nn.Linear(3*size*size, dls.c))
    return Learner(dls, model, loss_func=CrossEntropyLossFlat(), metrics=accuracy)

@pytest.fixture
def digits(): return kd_dataloaders('digits', bs=64, device='cpu')

@pytest.fixture
def arrays():
    rng = np.random.default_rng(0)
    return dict(train_images=rng.integers(0, 256, (200,9,7,3), dtype=np.uint8), train_labels=(np.arange(200)%5).astype(np.uint8),
                test_images =rng.integers(0, 256, (30,9,7,3), dtype=np.uint8),  test_labels =(np.arange(30)%5).astype(np.uint8),
                class_names=np.array(['e','d','c','b','a']))

@pytest.fixture
def save(tmp_path, arrays):
    def _f(nm='set.npz', drop=(), **changes):
        path = tmp_path/nm
        np.savez(path, **{k:v for k,v in {**arrays, **changes}.items() if k not in drop})
        return path
    return _f


# splits

def test_digits_split():
    dls = kd_dataloaders('digits', device='cpu')
    assert [len(o) for o in loaders(dls)]==[1078,360,359]
    assert isinstance(dls, DataLoaders) and list(dls.vocab)==list('0123456789') and dls.c==10
    for o in loaders(dls):
        share = np.bincount(o['label'], minlength=10)/len(o)
        assert np.abs(share - np.bincount(load_digits().target)/1797).max() < .01
    whole = np.concatenate([o['image'][:,0].reshape(len(o), -1) for o in loaders(dls)])
    given = np.rint(load_digits().images*255/16).astype(np.uint8).reshape(1797, -1)
    assert (np.unique(whole, axis=0, return_counts=True)[1]==np.unique(given, axis=0, return_counts=True)[1]).all()
    assert whole.max()==255 and all((o['image'][:,0]==o['image'][:,i]).all() for o in loaders(dls) for i in (1,2))

def test_seed_decides_the_split_and_nothing_else_does():
    a = loaders(kd_dataloaders('digits', device='cpu', seed=3))
    np.random.seed(9); torch.manual_seed(9); random.seed(9)
    np_state,torch_state = np.random.get_state()[1].copy(), torch.get_rng_state()
    b = loaders(kd_dataloaders('digits', device='cpu', seed=3, bs=32))
    assert (np.random.get_state()[1]==np_state).all() and torch.equal(torch.get_rng_state(), torch_state)
    assert all((x==y).all() for x,y in zip(a, b))
    c = loaders(kd_dataloaders('digits', device='cpu', seed=4))
    assert not any((x['image']==y['image']).all() for x,y in zip(a, c))

def test_train_subset():
    full,sub,small = (kd_dataloaders('digits', device='cpu', bs=10, train_subset=n) for n in (None,200,10))
    assert all((items(full[i])==items(o[i])).all() for o in (sub,small) for i in (1,2))
    assert np.bincount(items(sub.train)['label']).tolist()==pytest.approx([20]*10, abs=1)
    assert np.bincount(items(small.train)['label']).tolist()==[1]*10
    flat = lambda o: {r.tobytes() for r in items(o.train)['image']}
    assert flat(small) <= flat(sub) <= flat(full)
    mean,std = channel_stats(items(sub.train)['image'])
    assert torch.allclose(sub.after_batch[1].mean.flatten().double(), torch.tensor(mean)) # the subset's own statistics
    assert torch.allclose(sub.after_batch[1].std.flatten().double(), torch.tensor(std))

def test_stratified():
    rng = np.random.default_rng
    labels = rng(0).permutation(np.repeat([0,1,2,4], [500,300,3,1]))
    for n in (4, 10, 100, 803):
        counts = np.bincount(labels[stratified(labels, n, rng(1))], minlength=5)
        assert counts.sum()==n and (counts[[0,1,2,4]]>=1).all()
        assert np.abs(counts[:2] - n*np.array([500,300])/804).max() <= 2
    assert (stratified(labels, 50, rng(1))==stratified(labels, 50, rng(1))).all()
    assert (stratified(labels, 50, rng(1))!=stratified(labels, 50, rng(2))).any()
    assert len(stratified(labels, 0, rng(1)))==0

def test_npz_keeps_its_test_set(save, arrays):
    dls = kd_dataloaders(save(extra=np.zeros(3)), bs=16, device='cpu')
    assert [len(o) for o in loaders(dls)]==[180,20,30]
    assert (items(dls.test)['image'].transpose(0,2,3,1)==arrays['test_images']).all()
    assert (items(dls.test)['label']==arrays['test_labels']).all()
    assert np.bincount(items(dls.valid)['label']).tolist()==[4]*5
    assert list(dls.vocab)==['e','d','c','b','a'] # the order of the file, not the alphabet's
    assert [len(o) for o in loaders(kd_dataloaders(str(save()), bs=16, valid_pct=.3, device='cpu'))]==[140,60,30]

@pytest.mark.parametrize('shape', [(200,9,7), (200,9,7,1)])
def test_grey_images_become_three_equal_channels(save, arrays, shape):
    grey = dict(train_images=arrays['train_images'][...,0].reshape(shape), test_images=arrays['test_images'][...,0])
    dls = kd_dataloaders(save(**grey), bs=16, device='cpu')
    xb,_ = dls.one_batch()
    assert xb.shape==(16,3,9,7) and torch.equal(xb[:,0], xb[:,1]) and torch.equal(xb[:,0], xb[:,2])

def test_class_names_may_be_bytes_or_numbers(save):
    assert list(kd_dataloaders(save(class_names=np.array([b'a',b'b',b'c',b'd',b'e'])), bs=8, device='cpu').vocab)==list('abcde')
    assert list(kd_dataloaders(save(class_names=np.arange(5)), bs=8, device='cpu').vocab)==list('01234')


# batches

def test_batches(digits):
    for dl,n in zip(digits, (16,6,6)):
        bs = list(dl)
        assert len(bs)==len(dl)==n
        assert all(type(x) is TensorImage and type(y) is TensorCategory and x.dtype==torch.float32 and y.dtype==torch.int64 for x,y in bs)
    assert len(epoch(digits.train))==1024 and len(epoch(digits.valid))==360 # the last incomplete training batch is dropped
    assert epoch(digits.valid).tolist()==items(digits.valid)['label'].tolist()

def test_normalised_by_the_training_set():
    dls = kd_dataloaders('digits', bs=49, device='cpu') # 22·49 = 1078: every training image
    x = torch.cat([o for o,_ in dls.train])
    assert abs(x.mean())<1e-4 and abs(x.std()-1)<1e-3
    rec = items(dls.valid)['image'][:49]/255
    mean,std = channel_stats(items(dls.train)['image'])
    assert np.abs(dls.valid.one_batch()[0].numpy() - (rec-mean[:,None,None])/std[:,None,None]).max()<1e-5

def test_constant_channel_is_not_divided_by_zero(save, arrays):
    flat = arrays['train_images'].copy(); flat[...,1] = 80
    assert kd_dataloaders(save(train_images=flat), bs=16, device='cpu').one_batch()[0].isfinite().all()

def test_whole_batches_equal_single_items(digits):
    class Same(Transform):
        def encodes(self, x:TensorImage): return x
    by_item = digits.valid.new(after_item=[Same()])
    for (x,y),(x2,y2) in zip(digits.valid, by_item):
        assert torch.equal(x, x2) and torch.equal(y, y2) and (type(x),type(y))==(type(x2),type(y2))

def test_item_transforms_are_applied():
    class Invert(Transform):
        def encodes(self, x:TensorImage): return 255-x
    dls = kd_dataloaders('digits', device='cpu')
    before = dls.valid.one_batch()[0]
    dls.add_tfms([Invert()], 'after_item', 1)
    assert not torch.equal(dls.valid.one_batch()[0], before)

def test_order_comes_from_the_rng():
    def order(seed=None, set_rng=None):
        if seed is not None: set_seed(seed)
        dls = kd_dataloaders('digits', device='cpu')
        if set_rng is not None: dls.train.rng = random.Random(set_rng)
        return [epoch(dls.train).tolist() for _ in range(2)]
    first,second = order(seed=1)
    assert first!=second and order(seed=1)==[first,second] and order(seed=2)!=[first,second]
    assert order(set_rng=5)==order(set_rng=5)!=order(set_rng=6)

def test_workers_give_the_same_batches():
    def batches(n):
        dls = kd_dataloaders('digits', bs=256, device='cpu', num_workers=n)
        dls.train.rng = random.Random(0)
        return list(dls.train)
    for (x,y),(x2,y2) in zip(batches(0), batches(2), strict=True): assert torch.equal(x, x2) and torch.equal(y, y2)


# fastai's interface

def test_devices_and_copies(digits):
    for dls in digits.to('cpu'), digits.cpu(), digits.new_empty():
        assert len(dls.loaders)==3 and dls.test is dls[2] and dls.test_ds is dls[2].dataset
        assert all(str(o.device)=='cpu' for o in dls) and list(dls.vocab)==list('0123456789')
    assert type(digits.new_empty()) is type(digits)
    new = digits.train.new(bs=100, shuffle=False)
    assert len(new.one_batch()[1])==100 and new.one_batch()[1].tolist()==items(digits.train)['label'][:100].tolist()

def test_transforms_follow_the_device():
    dls = kd_dataloaders('digits', device='meta')
    assert all(o.one_batch()[0].device.type==o.after_batch[1].mean.device.type=='meta' for o in dls)

def test_show(digits):
    digits.show_batch(max_n=4)
    digits.test.show_batch(max_n=4)
    learn = linear(digits)
    with learn.no_bar(), learn.no_logging():
        learn.fit(1)
        learn.show_results(max_n=4)
        learn.show_results(ds_idx=2, max_n=4)
        Interpretation.from_learner(learn).plot_top_losses(4)
    matplotlib.pyplot.close('all')

def test_decoded_batch_is_the_image(digits):
    (img,label),*_ = digits.valid.decode_batch(digits.valid.one_batch())
    rec = items(digits.valid)[0]
    assert np.abs(img.numpy() - rec['image']).max()<=1 and label==str(rec['label'])

def test_learner_export_predict(digits, tmp_path):
    learn = linear(digits)
    with learn.no_bar(), learn.no_logging():
        learn.fit(5, 1e-2)
        assert learn.validate(dl=digits.test)[1] > .85
        probs,y = learn.get_preds(ds_idx=2)
        assert probs.shape==(359,10) and y.tolist()==items(digits.test)['label'].tolist()
    learn.path = tmp_path
    learn.export('m.pkl')
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        loaded = load_learner(tmp_path/'m.pkl')
    img = items(digits.test)['image'][0].transpose(1,2,0)
    Image.fromarray(img).save(tmp_path/'img.png')
    with learn.no_bar(), loaded.no_bar():
        want = learn.predict(img)
        assert torch.allclose(want[2], probs[0], atol=1e-6) and want[0]==digits.vocab[int(want[1])]
        for form in (img, img[...,0], img[...,:1], Image.fromarray(img), Image.fromarray(img[...,0]), PILImage.create(img),
                     tmp_path/'img.png', str(tmp_path/'img.png'), image_tensor(img), items(digits.test)[0]):
            got = loaded.predict(form)
            assert got[0]==want[0] and torch.equal(got[2], want[2])
        assert loaded.predict(img, with_input=True)[0].shape==(3,8,8)

def test_test_dl(digits):
    learn,close = linear(digits),partial(torch.allclose, atol=1e-6)    # a shorter last batch may differ in the last bits
    imgs = [Image.fromarray(o.transpose(1,2,0)) for o in items(digits.test)['image'][:70]]
    with learn.no_bar():
        want = learn.get_preds(ds_idx=2)[0][:70]
        assert close(learn.get_preds(dl=digits.test_dl(imgs))[0], want)
        assert close(learn.get_preds(dl=digits.test_dl(items(digits.test)[:70]))[0], want)
        preds,y = learn.get_preds(dl=digits.test_dl(items(digits.test)[:70], with_labels=True))
    assert close(preds, want) and y.tolist()==items(digits.test)['label'][:70].tolist()

def test_float_arrays_are_refused(digits):
    with pytest.raises(ValueError, match='uint8'): image_tensor(np.zeros((8,8)))

def test_exports_hold_no_images(save, tmp_path):
    rng = np.random.default_rng(0)
    big = dict(train_images=rng.integers(0, 256, (2000,16,16,3), dtype=np.uint8), train_labels=np.arange(2000)%5,
               test_images =rng.integers(0, 256, (100,16,16,3), dtype=np.uint8),  test_labels=np.arange(100)%5)
    dls = kd_dataloaders(save(**big), bs=64, device='cpu')
    for dl in dls: list(dl)
    assert len(pickle.dumps(dls.new_empty())) < 30_000 < items(dls.train).nbytes/10
    learn = linear(dls, 16)
    with learn.no_bar(), learn.no_logging(): learn.fit(1)
    learn.path = tmp_path
    learn.export('m.pkl')
    assert (tmp_path/'m.pkl').stat().st_size < 150_000


# other files

def cifar(root, k=100):
    "CIFAR's Python batches as its authors wrote them: planes of 1,024 bytes, protocol 2"
    rng = np.random.default_rng(0)
    x,y = rng.integers(0, 256, (6,k,3072), dtype=np.uint8),np.arange(6*k).reshape(6,k)%(10 if k==100 else 100)
    names = [f'n{i}' for i in range(y.max()+1)]
    root.mkdir(parents=True, exist_ok=True)
    def write(nm, o): (root/nm).write_bytes(pickle.dumps(o, protocol=2))
    if k==100:
        for i in range(5): write(f'data_batch_{i+1}', {b'data': x[i], b'labels': y[i].tolist(), b'batch_label': b'one', b'filenames': [b'a.png']*k})
        write('test_batch', {'data': x[5], 'labels': y[5].tolist()})
        write('batches.meta', {'label_names': names, 'num_vis': 3072})
    else:
        write('train', {'data': x[:5].reshape(-1,3072), 'fine_labels': y[:5].ravel().tolist(), 'coarse_labels': [0]*5*k})
        write('test', {'data': x[5], 'fine_labels': y[5].tolist()})
        write('meta', {'fine_label_names': names, 'coarse_label_names': ['all']})
    return x.reshape(6,k,3,32,32), y

@pytest.mark.parametrize('source,k', [('cifar10',100), ('cifar100',200)])
def test_cifar(source, k, tmp_path):
    x,y = cifar(tmp_path/'c', k)
    dls = kd_dataloaders(source, path=tmp_path/'c', bs=16, device='cpu')
    assert (items(dls.test)['image']==x[5]).all() and (items(dls.test)['label']==y[5]).all() and dls.vocab[1]=='n1'
    assert [len(o) for o in loaders(dls)]==[round(4.5*k), round(.5*k), k]
    assert dls.train.augment==Augment(flip=True, pad=4) and kd_dataloaders(source, path=tmp_path/'c', bs=16, device='cpu', augment=None).train.augment is None
    sets,_ = read_files(tmp_path/'c')
    assert (sets['train']['image']==x[:5].reshape(-1,3,32,32)).all() and (sets['train']['label']==y[:5].ravel()).all()
    assert kd_dataloaders(tmp_path/'c', bs=16, device='cpu').train.augment is None     # a path doesn't say what it is
    with tarfile.open(tmp_path/'c.tar.gz', 'w:gz') as t: t.add(tmp_path/'c', 'cifar-batches-py')
    packed = kd_dataloaders(source, path=tmp_path/'c.tar.gz', bs=16, device='cpu')
    assert packed.split==dls.split and (items(packed.train)==items(dls.train)).all()
    (tmp_path/'cut.tar.gz').write_bytes((tmp_path/'c.tar.gz').read_bytes()[:200_000])
    with pytest.raises(ValueError, match=r'cut\.tar\.gz: truncated or damaged archive'): read_files(tmp_path/'cut.tar.gz')
    other = 'cifar100' if k==100 else 'cifar10'
    with pytest.raises(ValueError, match=f'classes, but {other} has'): kd_dataloaders(other, path=tmp_path/'c')

class Evil:
    def __reduce__(self): return os.mkdir, ('/nonexistent/owned',)

@pytest.mark.parametrize('bad,why', [
    (pickle.dumps({'data': Evil(), 'labels': [0]}), r"has no 'data', uint8"),
    (b'hello',                                       'damaged or no CIFAR file'),
    (b'',                                            'damaged or no CIFAR file'),
    (pickle.dumps([1,2]),                            'a dict is expected, not a list'),
    (pickle.dumps({'data': np.zeros((3,9), np.uint8), 'labels': [0]*3}), r"has no 'data', uint8 \[N,3072\]"),
    (pickle.dumps({'data': np.zeros((3,3072), np.uint8), 'labels': [0]*2}), "has no 'labels', 3 whole numbers"),
    (None,                                           'no file data_batch_3')])
def test_bad_cifar(bad, why, tmp_path):
    cifar(tmp_path)
    if bad is None: (tmp_path/'data_batch_3').unlink()
    else: (tmp_path/'data_batch_3').write_bytes(bad)
    with pytest.raises(ValueError, match=f'{tmp_path.name}.*data_batch_3.*{why}' if bad is not None else why): kd_dataloaders('cifar10', path=tmp_path)

def idx_files(root, gz=True, n=200):
    rng = np.random.default_rng(0)
    root.mkdir(parents=True, exist_ok=True)
    out = {}
    for part,k in ('train',n),('t10k',50):
        for nm,a in ('images-idx3', rng.integers(0, 256, (k,28,28), dtype=np.uint8)),('labels-idx1', (np.arange(k)%10).astype(np.uint8)):
            b = bytes([0,0,8,a.ndim]) + np.array(a.shape, '>u4').tobytes() + a.tobytes()
            (root/f'{part}-{nm}-ubyte{".gz" if gz else ""}').write_bytes(gzip.compress(b) if gz else b)
            out[f'{part}-{nm}'] = a
    return out

@pytest.mark.parametrize('gz', [True, False])
def test_fashion_mnist(gz, tmp_path):
    a = idx_files(tmp_path, gz)
    dls = kd_dataloaders('fashion_mnist', path=tmp_path, bs=16, device='cpu')
    assert dls.vocab[9]=='Ankle boot' and dls.train.augment is None and (items(dls.test)['image']==a['t10k-images-idx3'][:,None]).all()
    assert list(kd_dataloaders(tmp_path, bs=16, device='cpu').vocab)==list('0123456789')
    f = tmp_path/f'train-labels-idx1-ubyte{".gz" if gz else ""}'
    f.write_bytes(f.read_bytes()[:-9])
    with pytest.raises(ValueError, match='train-labels.* is truncated'): kd_dataloaders('fashion_mnist', path=tmp_path)
    f.write_bytes(b'nothing')
    with pytest.raises(ValueError, match='no idx file of bytes'): kd_dataloaders('fashion_mnist', path=tmp_path)
    f.unlink()
    with pytest.raises(ValueError, match='no idx file for train_labels'): kd_dataloaders('fashion_mnist', path=tmp_path)

def test_downloads(tmp_path, monkeypatch):
    import torchvision
    asked = []
    def fetch(url):
        asked.append(url)
        cifar(tmp_path/'c')
        return tmp_path/'c'
    monkeypatch.setattr(data, 'untar_data', fetch)
    assert kd_dataloaders('cifar10', bs=16, device='cpu').c==10 and asked==[data.URLs.CIFAR]
    monkeypatch.setattr(data, 'fastai_path', lambda o: tmp_path)
    monkeypatch.setattr(torchvision.datasets, 'FashionMNIST', lambda root, download: idx_files(root/'FashionMNIST'/'raw') and asked.append(download))
    assert kd_dataloaders('fashion_mnist', bs=16, device='cpu').c==10 and asked[1:]==[True]

def folder(root, splits, n=30, size=(8,8), classes='ab'):
    rng = np.random.default_rng(0)
    for s in splits:
        for i in range(n):
            p = root/s/classes[i%len(classes)]
            p.mkdir(parents=True, exist_ok=True)
            Image.fromarray(rng.integers(0, 256, (*size,3), dtype=np.uint8)).save(p/f'{i:03}.png')
    return root

@pytest.mark.parametrize('splits,sizes,pct', [(['train','test'], [27,3,30], .1), (['train','valid'], [27,3,30], .1), (['train','val','test'], [30,30,30], None),
                                              ([''], [22,2,6], .1), (['top/train','top/test'], [27,3,30], .1)], ids=str)
def test_image_folder(splits, sizes, pct, tmp_path):
    dls = kd_dataloaders(folder(tmp_path/'f', splits), bs=4, device='cpu')
    assert [len(o) for o in loaders(dls)]==sizes and list(dls.vocab)==['a','b'] and dls.split['valid_pct']==pct
    first = sorted((tmp_path/'f').rglob('*.png'))[0]
    img = np.asarray(Image.open(first)).transpose(2,0,1)
    assert any((r['image']==img).all() for o in loaders(dls) for r in o)
    with zipfile.ZipFile(tmp_path/'f.zip', 'w') as z:
        for o in (tmp_path/'f').rglob('*.png'): z.write(o, o.relative_to(tmp_path))
    assert kd_dataloaders(tmp_path/'f.zip', bs=4, device='cpu').split==dls.split

def test_cifar_as_image_folders(tmp_path):
    "fastai's form of CIFAR-100 has a level of superclasses"
    for kind,first in ('big',0),('small',5): folder(tmp_path/'c', [f'train/{kind}',f'test/{kind}'], classes=[f'{first+i:02}' for i in range(5)])
    for i,o in enumerate(sorted((tmp_path/'c').rglob('*.png'))): Image.new('RGB', (8,8), (i,0,0)).save(o)
    assert kd_dataloaders('cifar10', path=tmp_path/'c', bs=4, device='cpu').train.augments

def test_image_sizes(tmp_path):
    folder(tmp_path, ['train','test'])
    Image.new('L', (20,10)).save(tmp_path/'train'/'a'/'x.png')
    with pytest.raises(ValueError, match=r'train/a/x\.png has 20×10 pixels, train/a/000\.png 8×8: give size='): kd_dataloaders(tmp_path)
    assert kd_dataloaders(tmp_path, size=6, bs=4, device='cpu').one_batch()[0].shape==(4,3,6,6)
    assert kd_dataloaders(tmp_path, size=(5,7), bs=4, device='cpu').one_batch()[0].shape==(4,3,5,7)
    for bad,e in (0,ValueError),((1,2,3),ValueError),('a',TypeError):
        with pytest.raises(e, match='size'): kd_dataloaders(tmp_path, size=bad)

def test_bad_image_folders(tmp_path):
    folder(tmp_path/'a', ['train'])
    (tmp_path/'a'/'train'/'b'/'z.png').write_bytes(b'no image')
    with pytest.raises(ValueError, match=r'z\.png is damaged or no image'): kd_dataloaders(tmp_path/'a')
    folder(tmp_path/'b', ['train']); folder(tmp_path/'b', ['test'], classes='abc')
    with pytest.raises(ValueError, match='test/c/.* is of a class that has no training image'): kd_dataloaders(tmp_path/'b')
    folder(tmp_path/'c', ['valid','test'])
    with pytest.raises(ValueError, match='no folder train'): kd_dataloaders(tmp_path/'c')
    folder(tmp_path/'d', ['train']); shutil.copy(tmp_path/'d'/'train'/'a'/'000.png', tmp_path/'d'/'train')
    with pytest.raises(ValueError, match=r'train/000\.png must lie in a folder'): kd_dataloaders(tmp_path/'d')
    folder(tmp_path/'e', ['train','valid','test'])
    with pytest.raises(ValueError, match='has a validation set of its own'): kd_dataloaders(tmp_path/'e', valid_pct=.2)

def test_arguments_that_do_not_fit(save):
    with pytest.raises(ValueError, match='path=.* goes with cifar10'): kd_dataloaders('digits', path='x')
    for o in 'digits', save():
        with pytest.raises(ValueError, match='size=8 is for image files only'): kd_dataloaders(o, size=8)
    with pytest.raises(TypeError, match="augment must be an Augment, 'auto' or None"): kd_dataloaders('digits', augment='flip')

def test_split_for_the_record():
    a,b,c,d = (kd_dataloaders('digits', device='cpu', bs=16, **kw).split for kw in ({}, {}, dict(seed=1), dict(train_subset=100)))
    assert a==b==json.loads(json.dumps(a)) and len({o['train_digest'] for o in (a,c,d)})==3
    assert {k:v for k,v in a.items() if k!='train_digest'}==dict(seed=0, valid_pct=.25, n_train=1078, n_valid=360, n_test=359)

def records(dl): return {r.tobytes() for r in items(dl)}

@pytest.mark.parametrize('pct', [0, 0.])
def test_nothing_held_out(pct, save, tmp_path):
    "The papers' protocol: all training images train, the test set validates"
    dls = kd_dataloaders(save(), bs=16, device='cpu', valid_pct=pct)
    assert [len(o) for o in loaders(dls)]==[200,30,30] and dls.split['valid_pct']==0 and dls.split['validated_on']=='the test set'
    usual = kd_dataloaders(save(), bs=16, device='cpu')
    assert 'validated_on' not in usual.split and dls.split['train_digest']!=usual.split['train_digest']
    assert records(dls.train)==records(usual.train)|records(usual.valid) and (items(dls.valid)==items(usual.test)).all()
    for (x,y),(x2,y2) in zip(dls.valid, dls.test, strict=True): assert torch.equal(x, x2) and torch.equal(y, y2)
    few,other = (kd_dataloaders(save(), bs=16, device='cpu', valid_pct=pct, train_subset=20, seed=s) for s in (0, 1))
    assert [len(o) for o in loaders(few)]==[20,20,30] and few.split['validated_on']=='20 images of the test set'
    assert records(few.valid)<records(few.test)==records(dls.test) and records(few.valid)!=records(other.valid)
    assert [len(o) for o in loaders(kd_dataloaders(save(), bs=16, device='cpu', valid_pct=pct, train_subset=100))]==[100,30,30]
    digits = kd_dataloaders('digits', device='cpu', valid_pct=pct)    # which have no test set of their own
    assert [len(o) for o in loaders(digits)]==[1438,359,359] and not records(digits.train)&records(digits.test)
    sub = kd_dataloaders('digits', device='cpu', valid_pct=pct, train_subset=200)
    assert [len(o) for o in loaders(sub)]==[200,200,359] and records(sub.train)<records(digits.train)
    assert json.loads(json.dumps(sub.split))==sub.split

def test_nothing_held_out_of_a_set_that_has_validation_images(tmp_path):
    folder(tmp_path, ['train','valid','test'], n=30)
    for i,o in enumerate(sorted(tmp_path.rglob('*.png'))): Image.new('RGB', (8,8), (i,0,0)).save(o)    # no two alike
    own,none = (kd_dataloaders(tmp_path, bs=4, device='cpu', valid_pct=o) for o in (None,0))
    assert own.split['valid_pct'] is None and none.split['valid_pct']==0
    assert [records(o) for o in none]==[records(own.train), records(own.test), records(own.test)]     # validation images are in none of them
    learn = linear(none)
    with learn.no_bar(), learn.no_logging(): assert learn.validate()==learn.validate(dl=none.test)


# bad input

def test_unknown_source():
    with pytest.raises(ValueError, match=r"source='cifar1000' is not known: use 'digits', or the path of an \.npz"): kd_dataloaders('cifar1000')
    for o in 3, None, ['digits']:
        with pytest.raises(TypeError, match='source must be'): kd_dataloaders(o)

def test_missing_file(tmp_path):
    for p in tmp_path/'none.npz', str(tmp_path/'none.npz'), tmp_path, 'none.npz', str(tmp_path/'none'):
        with pytest.raises(FileNotFoundError, match=f'{Path(p).name}: no such file'): kd_dataloaders(p)

@pytest.mark.parametrize('cut', [0, 10, 1000, -1, -30])
def test_truncated_file(save, cut):
    p = save()
    p.write_bytes(p.read_bytes()[:cut])
    with pytest.raises(ValueError, match=r'set\.npz: truncated or not an \.npz'): kd_dataloaders(p)

def test_not_an_npz(tmp_path):
    (tmp_path/'a.npz').write_text('hello'); np.save(tmp_path/'b.npy', np.zeros(3))
    for o in 'a.npz', 'b.npy':
        with pytest.raises(ValueError, match=f'{o}: truncated or not an .npz'): kd_dataloaders(tmp_path/o)

def test_damaged_array(save):
    p = save()
    b = bytearray(p.read_bytes()); b[5000:5010] = bytes(10); p.write_bytes(b)
    with pytest.raises(ValueError, match=r'set\.npz: train_images is truncated or damaged'): kd_dataloaders(p)

@pytest.mark.parametrize('nm', npz_arrays)
def test_missing_array(save, nm):
    with pytest.raises(ValueError, match=rf'set\.npz: no array {nm} in it, only '): kd_dataloaders(save(drop=[nm]))

def change(nm, f): return lambda a: {nm: f(a[nm])}

@pytest.mark.parametrize('changes,why', [
    (change('train_images', lambda o: o.astype(np.float32)), 'train_images must be uint8, not float32'),
    (change('test_images',  lambda o: o.astype(np.int64)),   'test_images must be uint8, not int64'),
    (change('train_images', lambda o: o[0,...,0]),           r'train_images must have shape .*, not \[9, 7\]'),
    (change('train_images', lambda o: o.transpose(0,3,1,2)), r'train_images must have shape .*, not \[200, 3, 9, 7\]'),
    (change('train_images', lambda o: o[:100]),              'train_labels holds 200 labels for 100 images'),
    (change('test_labels',  lambda o: o[:-1]),               'test_labels holds 29 labels for 30 images'),
    (change('train_images', lambda o: o[:0]),                'train_images is empty'),
    (change('test_images',  lambda o: o[:,:0]),              'test_images is empty'),
    (change('test_images',  lambda o: o[:,:5]),              'train_images are .*, test_images .* one size'),
    (change('train_labels', lambda o: o.astype(float)),      'train_labels must be integers, not float64'),
    (change('train_labels', lambda o: o.astype(str)),        'train_labels must be integers'),
    (change('train_labels', lambda o: np.eye(5, dtype=int)[o]), r'train_labels must have shape \[N\], not \[200, 5\]'),
    (change('train_labels', lambda o: o+1),                  r'train_labels\[4\] is 5, but class_names has 5 names, for labels 0 to 4'),
    (change('test_labels',  lambda o: o.astype(int)-1),      r'test_labels\[0\] is -1'),
    (change('class_names',  lambda o: o[:1]),                'class_names has 1 names, at least 2'),
    (change('class_names',  lambda o: np.array(list('aabcd'))), "class_names has 'a' more than once"),
    (change('class_names',  lambda o: np.arange(5.)),        'class_names must be a list of strings'),
    (change('class_names',  lambda o: o[None]),              'class_names must be a list of strings'),
    (change('class_names',  lambda o: o.astype(object)),     "class_names can't be read as a plain array")])
def test_bad_arrays(save, arrays, changes, why):
    with pytest.raises(ValueError, match=rf'set\.npz: {why}'): kd_dataloaders(save(**changes(arrays)))

@pytest.mark.parametrize('kw,error,why', [
    (dict(train_subset=1079), ValueError, 'train_subset=1079 must lie between the number of classes, 10, and that of the training images, 1078'),
    (dict(train_subset=9),    ValueError, 'train_subset=9 must lie'),
    (dict(train_subset=.5),   TypeError,  'train_subset must be a whole number'),
    (dict(bs=0),              ValueError, 'bs must be at least 1, got 0'),
    (dict(bs=1079),           ValueError, 'bs=1079 must lie'),
    (dict(bs=64.),            TypeError,  'bs must be a whole number'),
    (dict(seed='a'),          TypeError,  'seed must be a whole number'),
    (dict(seed=-1),           ValueError, 'seed must be at least 0'),
    (dict(valid_pct=-.1),     ValueError, r'valid_pct must be in \[0,1\), got -0.1'),
    (dict(valid_pct=1.),      ValueError, r'valid_pct must be in \[0,1\), got 1.0'),
    (dict(valid_pct='a'),     TypeError,  'valid_pct must be a number'),
    (dict(valid_pct=1e-5),    ValueError, 'leaves none for training or for validation')])
def test_bad_arguments(kw, error, why):
    with pytest.raises(error, match=why): kd_dataloaders('digits', device='cpu', **kw)


# real images beyond digits

@pytest.mark.skipif('FASTKDTF_CIFAR100' not in os.environ, reason='FASTKDTF_CIFAR100 names no .npz file')
def test_cifar100():
    path = os.environ['FASTKDTF_CIFAR100']
    train,test,names = read_npz(path)
    assert (len(train), len(test), len(names))==(50_000, 10_000, 100)
    mean,std = channel_stats(train['image'])
    assert np.abs(mean-[.5071,.4865,.4409]).max()<1e-4 and np.abs(std-[.2673,.2564,.2762]).max()<1e-4
    dls = kd_dataloaders(path, device='cpu', train_subset=5000)
    assert [len(o) for o in loaders(dls)]==[5000,5000,10_000]
    assert set(np.bincount(items(dls.train)['label']))=={50} and set(np.bincount(items(dls.valid)['label']))=={50}
    assert dls.one_batch()[0].shape==(128,3,32,32)
