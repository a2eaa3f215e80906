"The papers' sets from small files of their official formats, and what is said of files that are wrong"
import csv, json, random, shutil, tarfile, zipfile
from pathlib import Path

import matplotlib
matplotlib.use('Agg')
import numpy as np
import pytest
import torch
import torchvision.transforms as T
from fastai.data.core import Datasets, TfmdDL
from fastai.vision.all import CrossEntropyLossFlat, Learner, accuracy, nn
from PIL import Image

from fastkdtf.vision import readers
from fastkdtf.vision.augment import Augment
from fastkdtf.vision.data import kd_dataloaders
from fastkdtf.vision.loader import RecordDL, batch_info
from fastkdtf.vision.readers import check_size, imagenet_files, read_files

cpu = dict(bs=4, device='cpu')
def items(dl): return dl.dataset.items
def sizes(dls): return [len(o.dataset) for o in dls]
def noise(h, w, seed): return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (h,w,3), dtype=np.uint8))
def pixels(p): return np.asarray(Image.open(p).convert('RGB')).transpose(2,0,1)

def save(path, im, **kw):
    path.parent.mkdir(parents=True, exist_ok=True)
    im.save(path, **kw)

def pack(folder, name):
    "The folder as a zip or tar.gz, with its own name inside"
    path = folder.parent/name
    if name.endswith('.zip'):
        with zipfile.ZipFile(path, 'w') as z:
            for o in sorted(folder.rglob('*')): z.write(o, o.relative_to(folder.parent))
    else:
        with tarfile.open(path, 'w:gz') as t: t.add(folder, folder.name)
    return path

def same(a, b): return a.split==b.split and all((items(x)==items(y)).all() for x,y in zip(a, b, strict=True))


# CINIC-10

cinic_names = ['airplane', 'automobile', 'bird', 'cat', 'deer', 'dog', 'frog', 'horse', 'ship', 'truck']

@pytest.fixture
def cinic(tmp_path):
    root = tmp_path/'CINIC-10'
    for k,(split,n) in enumerate([('train',3),('valid',2),('test',1)]):
        for c,nm in enumerate(cinic_names):
            for i in range(n): save(root/split/nm/f'{"cifar10-" if i else ""}n0{c}_{i}.png', noise(32, 32, k*5000+c*100+i) if c or i else Image.new('L', (32,32), 9+k))
    (root/'README').write_text('CINIC-10'); (root/'imagenet-contributors.csv').write_text('a,b\n')
    return root

def test_cinic10(cinic):
    dls = kd_dataloaders('cinic10', path=cinic, **cpu)
    assert sizes(dls)==[30,20,10] and list(dls.vocab)==cinic_names and dls.train.augment==Augment(flip=True, pad=4)
    assert dls.split['valid_pct'] is None and 'validated_on' not in dls.split
    for dl,split in zip(dls, ('train','valid','test')):
        want = [(pixels(p), cinic_names.index(p.parent.name)) for p in sorted((cinic/split).rglob('*.png'))]
        assert (items(dl)['image']==np.stack([o for o,_ in want])).all() and items(dl)['label'].tolist()==[y for _,y in want]
    assert (items(dls.train)['image'][2]==9).all()    # a grey file
    assert same(kd_dataloaders('cinic10', path=pack(cinic, 'CINIC-10.tar.gz'), **cpu), dls)

@pytest.mark.parametrize('gone', ['train', 'valid', 'test'])
def test_cinic10_needs_its_three_folders(cinic, gone):
    shutil.rmtree(cinic/gone)
    with pytest.raises(ValueError, match=f'CINIC-10: no folder {gone} with images, only '): kd_dataloaders('cinic10', path=cinic)

def test_cinic10_needs_ten_classes(cinic):
    for o in 'train','valid','test': shutil.rmtree(cinic/o/'ship')
    with pytest.raises(ValueError, match='holds 9 classes, but cinic10 has 10'): kd_dataloaders('cinic10', path=cinic)

def test_empty_folder(tmp_path):
    for o in 'cinic10', 'tiny_imagenet', 'raf', 'fer2013':
        with pytest.raises(ValueError, match=f'{tmp_path.name}: no f'): kd_dataloaders(o, path=tmp_path)
    for o in 'cinic10', 'tiny_imagenet', 'raf', 'fer2013', 'imagenet':
        with pytest.raises(FileNotFoundError, match='none: no such f'): kd_dataloaders(o, path=tmp_path/'none')


# Tiny-ImageNet

wnids = [f'n{i:08}' for i in range(200)]

def tiny_files(root, per_class=2):
    rng = random.Random(0)
    for c,nm in enumerate(wnids):
        for i in range(per_class): save(root/'train'/nm/'images'/f'{nm}_{i}.JPEG', noise(64, 64, c*10+i))
        (root/'train'/nm/f'{nm}_boxes.txt').write_text(f'{nm}_0.JPEG\t0\t0\t63\t63\n')
    labels = [rng.choice(wnids) for _ in range(30)]
    for i in range(30): save(root/'val'/'images'/f'val_{i}.JPEG', noise(64, 64, 5000+i))
    save(root/'test'/'images'/'test_0.JPEG', noise(64, 64, 9000))
    (root/'val'/'val_annotations.txt').write_text(''.join(f'val_{i}.JPEG\t{o}\t0\t32\t44\t62\n' for i,o in enumerate(labels)))
    (root/'wnids.txt').write_text('\n'.join(rng.sample(wnids, 200))+'\n')
    (root/'words.txt').write_text(''.join(f'{o}\tthing {o}\n' for o in wnids))
    return labels

@pytest.fixture(scope='module')
def tiny_once(tmp_path_factory):
    root = tmp_path_factory.mktemp('t')/'tiny-imagenet-200'
    return root,tiny_files(root)

@pytest.fixture
def tiny(tiny_once, tmp_path): return Path(shutil.copytree(tiny_once[0], tmp_path/'tiny-imagenet-200'))

def test_tiny_imagenet(tiny_once):
    root,labels = tiny_once
    dls = kd_dataloaders('tiny_imagenet', path=root, valid_pct=.25, **cpu)
    assert sizes(dls)==[300,100,30] and list(dls.vocab)==wnids and dls.train.augment==Augment(flip=True, rotate=20)
    sets,_ = read_files(root)
    for i,r in enumerate(sets['train']): assert (r['image']==pixels(root/'train'/wnids[i//2]/'images'/f'{wnids[i//2]}_{i%2}.JPEG')).all() and r['label']==i//2
    assert (items(dls.test)['image']==np.stack([pixels(root/'val'/'images'/f'val_{i}.JPEG') for i in range(30)])).all()
    assert [wnids[o] for o in items(dls.test)['label']]==labels
    assert sizes(kd_dataloaders('tiny_imagenet', path=root, valid_pct=0, **cpu))==[400,30,30]
    assert kd_dataloaders('tiny_imagenet', path=root, size=32, **cpu).one_batch()[0].shape==(4,3,32,32)
    assert same(kd_dataloaders('tiny_imagenet', path=pack(root, 'tiny-imagenet-200.zip'), valid_pct=.25, **cpu), dls)

@pytest.mark.parametrize('spoil,why', [
    (lambda o: (o/'wnids.txt').unlink(),                                      'no file wnids.txt in it'),
    (lambda o: (o/'wnids.txt').write_text(''),                                "train/n00000000/images/.* is of class 'n00000000', which is not in wnids.txt"),
    (lambda o: (o/'val'/'val_annotations.txt').unlink(),                      'no file val/val_annotations.txt in it'),
    (lambda o: (o/'val'/'val_annotations.txt').write_text(''),                'no test image in it'),
    (lambda o: (o/'val'/'val_annotations.txt').write_text('val_0.JPEG\n'),    'val_annotations.txt, line 1: an image and its class expected'),
    (lambda o: (o/'val'/'val_annotations.txt').write_text('val_0.JPEG\tn9\n'), "val_0.JPEG is of class 'n9', which is not in wnids.txt"),
    (lambda o: (o/'val'/'images'/'val_7.JPEG').unlink(),                      'val_annotations.txt, line 8: there is no image val/images/val_7.JPEG'),
    (lambda o: (o/'train'/wnids[3]).rename(o/'train'/'n77'),                  "n00000003_0.JPEG is of class 'n77', which is not in wnids.txt"),
    (lambda o: shutil.rmtree(o/'train'/wnids[3]/'images'),                    'no image in train/n00000003/images'),
    (lambda o: save(o/'train'/wnids[0]/'images'/'x.JPEG', noise(64, 60, 1)),  r'x\.JPEG has 60×64 pixels, train/n00000000/images/n00000000_0\.JPEG 64×64: give size='),
    (lambda o: (o/'val'/'images'/'val_7.JPEG').write_bytes(b'\xff\xd8'),      r'val_7\.JPEG is damaged or no image')])
def test_bad_tiny_imagenet(tiny, spoil, why):
    spoil(tiny)
    with pytest.raises(ValueError, match=f'tiny-imagenet-200: ((val|train)/(.*/)?)?{why}'): kd_dataloaders('tiny_imagenet', path=tiny)

def test_many_images_come_by_threads_in_order(tmp_path, monkeypatch):
    "A bar for large sets, one array, and every image in its place"
    shown = []
    monkeypatch.setattr(readers, 'parallel', lambda *args, parallel=readers.parallel, **kw: shown.append(kw['progress']) or parallel(*args, **kw|dict(progress=False)))
    files = {f'{i}': readers.StoredFile(4, lambda i=i: i) for i in range(6000)}
    monkeypatch.setattr(readers, '_opened', lambda files, name: Image.new('RGB', (3,2), (files[name].read()%256,)*3))
    recs = readers._image_records(files, {o: int(o)%7 for o in files}, None, '0')
    assert shown==[True] and recs['image'].shape==(6000,3,2,3)
    assert (recs['image']==(np.arange(6000)%256)[:,None,None,None]).all() and (recs['label']==np.arange(6000)%7).all()


# FER-2013

def fer_rows(n=(14,7,7)):
    rng = np.random.default_rng(0)
    usage = [o for o,k in zip(('Training','PublicTest','PrivateTest'), n) for _ in range(k)]
    return [(i%7, rng.integers(0, 256, 48*48), o) for i,o in enumerate(usage)]

def write_fer(path, rows, header=('emotion','pixels','Usage')):
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, 'w', newline='') as f:
        w = csv.writer(f)
        w.writerow(header)
        for e,p,u in rows:
            d = dict(emotion=e, pixels=p if isinstance(p, str) else ' '.join(map(str, p)), Usage=u)
            w.writerow([d[o.strip()] for o in header])
    return path

def test_fer2013(tmp_path):
    rows = fer_rows()
    path = write_fer(tmp_path/'fer2013'/'fer2013.csv', rows)
    dls = kd_dataloaders('fer2013', path=path, **cpu)
    assert sizes(dls)==[14,7,7] and dls.vocab[0]=='Angry' and dls.vocab[6]=='Neutral' and dls.train.augment==Augment(flip=True, pad=4)
    got = [r for dl in dls for r in items(dl)]
    for r,(e,p,_) in zip(got, rows, strict=True):
        small = np.asarray(T.Resize((32,32))(Image.fromarray(p.astype(np.uint8).reshape(48,48))))    # torchvision's: bilinear, antialiased
        assert (r['image']==small).all() and r['label']==e
    native = read_files(path, size=48)[0]
    assert (native['valid']['image']==np.stack([p for _,p,o in rows if o=='PublicTest']).reshape(-1,1,48,48)).all()
    (path.parent/'README').write_text('x')
    for other in path.parent, pack(path.parent, 'fer2013.tar.gz'), pack(path.parent, 'fer.zip'): assert same(kd_dataloaders('fer2013', path=other, **cpu), dls)
    assert [len(o) for o in read_files(path.parent)[0].values()]==[14,7,7]    # known by the file's name
    spaced = write_fer(tmp_path/'k'/'icml_face_data.csv', rows, ('emotion',' Usage',' pixels'))
    for other in spaced, spaced.parent, shutil.copy(path, tmp_path/'mine.csv'): assert same(kd_dataloaders('fer2013', path=other, **cpu), dls)

ok = ' '.join(['7']*2304)
@pytest.mark.parametrize('row,why', [
    ((7, ok, 'Training'),                  r"line 30: emotion is '7', not 0 to 6"),
    (('sad', ok, 'Training'),              r"line 30: emotion is 'sad', not 0 to 6"),
    ((1, ok, 'Test'),                      r"line 30: Usage is 'Test', not Training, PublicTest, PrivateTest"),
    ((1, ok[:-2], 'Training'),             r'line 30: pixels holds 2303 numbers, not 48×48 = 2304'),
    ((1, '', 'Training'),                  r'line 30: pixels holds 0 numbers'),
    ((1, ok+' 8', 'Training'),             r'line 30: pixels holds 2305 numbers'),
    ((1, ok[:-1]+'256', 'Training'),       r'line 30: pixels must be whole numbers from 0 to 255'),
    ((1, ok[:-1]+'x', 'Training'),         r'line 30: pixels must be whole numbers from 0 to 255'),
    ((1, ok*40, 'Training'),               r'line 30: field larger than field limit')])
def test_bad_fer2013_rows(tmp_path, row, why):
    path = write_fer(tmp_path/'fer2013.csv', [*fer_rows(), row])
    with pytest.raises(ValueError, match=rf'fer2013\.csv: fer2013\.csv, {why}'): kd_dataloaders('fer2013', path=path)

def test_bad_fer2013_files(tmp_path):
    for n,missing in ((0,5,5),'Training'),((5,0,5),'PublicTest'),((5,5,0),'PrivateTest'):
        with pytest.raises(ValueError, match=f'has no row with Usage {missing}'): kd_dataloaders('fer2013', path=write_fer(tmp_path/'fer2013.csv', fer_rows(n)))
    with pytest.raises(ValueError, match=r'fer2013\.csv has no column pixels, only emotion, Usage'):
        kd_dataloaders('fer2013', path=write_fer(tmp_path/'fer2013.csv', fer_rows(), ('emotion','Usage')))
    (tmp_path/'fer2013.csv').write_text('')
    with pytest.raises(ValueError, match='has no column emotion, pixels, Usage, only nothing'): kd_dataloaders('fer2013', path=tmp_path)
    (tmp_path/'d').mkdir(); (tmp_path/'d'/'a.csv').write_text('x'); (tmp_path/'d'/'b.csv').write_text('x')
    with pytest.raises(ValueError, match=r'no file fer2013\.csv or icml_face_data\.csv in it'): kd_dataloaders('fer2013', path=tmp_path/'d')


# RAF-DB

raf_names = ['Surprise', 'Fear', 'Disgust', 'Happiness', 'Sadness', 'Anger', 'Neutral']

@pytest.fixture
def raf(tmp_path):
    root,lines = tmp_path/'basic',[]
    for split,n in ('train',70),('test',14):
        for i in range(1, n+1):
            lines.append(f'{split}_{i:05}.jpg {i%7+1}')
            save(root/'Image'/'aligned'/f'{split}_{i:05}_aligned.jpg', noise(100, 100, i+1000*(split=='test')))
            save(root/'Image'/'original'/f'{split}_{i:05}.jpg', noise(20, 30, i))
    (root/'EmoLabel').mkdir()
    random.Random(0).shuffle(lines)
    (root/'EmoLabel'/'list_patition_label.txt').write_text('\n'.join(lines)+'\n')
    return root

def test_raf(raf):
    dls = kd_dataloaders('raf', path=raf, **cpu)
    assert sizes(dls)==[63,7,14] and list(dls.vocab)==raf_names and dls.train.augment==Augment(flip=True, pad=4) and dls.split['valid_pct']==.1
    assert np.bincount(items(dls.valid)['label']).tolist()==[1]*7
    names = [o.split() for o in (raf/'EmoLabel'/'list_patition_label.txt').read_text().splitlines()]
    for r,(nm,label) in zip(items(dls.test), [o for o in names if o[0].startswith('test')], strict=True):
        face = Image.open(raf/'Image'/'aligned'/f'{Path(nm).stem}_aligned.jpg')
        assert (r['image']==np.asarray(T.Resize((32,32))(face)).transpose(2,0,1)).all() and r['label']==int(label)-1
    for o in raf/'..', pack(raf, 'raf.zip'): assert same(kd_dataloaders('raf', path=o, **cpu), dls)
    assert kd_dataloaders('raf', path=raf, size=100, **cpu).one_batch()[0].shape==(4,3,100,100)

def label_line(old, new):
    def _f(root):
        p = root/'EmoLabel'/'list_patition_label.txt'
        p.write_text(p.read_text().replace(old, new) if old else new)
    return _f

@pytest.mark.parametrize('spoil,why', [
    (lambda o: (o/'EmoLabel'/'list_patition_label.txt').unlink(),       r'no file list_patition_label\.txt in it'),
    (label_line('train_00001.jpg 2', 'train_00001.jpg 8'),              r"list_patition_label\.txt, line \d+: label '8' is not 1 to 7"),
    (label_line('train_00001.jpg 2', 'train_00001.jpg'),                r"list_patition_label\.txt, line \d+: an image and its label expected, not 'train_00001\.jpg'"),
    (label_line('train_00001.jpg 2', 'dev_00001.jpg 2'),                r'line \d+: dev_00001\.jpg is neither train_… nor test_…'),
    (label_line('test_', 'train_'),                                     r'no test image in it'),
    (label_line('', ''),                                                r'no train image in it'),
    (lambda o: (o/'Image'/'aligned'/'train_00003_aligned.jpg').unlink(), r'line \d+: there is no image train_00003_aligned\.jpg; is Image/aligned\.zip unpacked'),
    (lambda o: (o/'Image'/'aligned'/'train_00003_aligned.jpg').write_bytes(b''), r'train_00003_aligned\.jpg is damaged or no image')])
def test_bad_raf(raf, spoil, why):
    spoil(raf)
    with pytest.raises(ValueError, match=f'basic: .*{why}'): kd_dataloaders('raf', path=raf)

def test_one_set_is_not_taken_for_another(raf, tmp_path):
    "FER-2013 and RAF-DB have seven classes each"
    with pytest.raises(ValueError, match='no file fer2013'): kd_dataloaders('fer2013', path=raf)
    fer = write_fer(tmp_path/'f'/'fer2013.csv', fer_rows())
    with pytest.raises(ValueError, match='no file list_patition_label'): kd_dataloaders('raf', path=fer.parent)


# ImageNet

@pytest.fixture(scope='module')
def imagenet(tmp_path_factory):
    root,names = tmp_path_factory.mktemp('i'),[f'n{i:08}' for i in range(1000)]
    for c,nm in enumerate(names):
        for i in range(2): save(root/'train'/nm/f'{nm}_{i}.JPEG', Image.new('RGB', (30,20), (c%256,c//256,i*100)), quality=95)
        if c<50: save(root/'val'/nm/f'ILSVRC2012_val_{c:08}.JPEG', noise(9, 9, c).resize((300,260+5*c), Image.Resampling.BICUBIC) if c<8 else Image.new('L', (30,20)))
    return root

def test_imagenet(imagenet):
    dls = kd_dataloaders('imagenet', path=imagenet, bs=8, device='cpu', num_workers=0)
    assert sizes(dls)==[1920,80,50] and dls.split['valid_pct']==.04 and dls.c==1000 and dls.vocab[999]=='n00000999'
    assert all(isinstance(o, TfmdDL) and not isinstance(o, RecordDL) for o in dls)
    both = {*items(dls.train), *items(dls.valid)}
    assert both=={*(imagenet/'train').rglob('*.JPEG')} and {*items(dls.test)}=={*(imagenet/'val').rglob('*.JPEG')}
    for dl in dls:
        x,y = dl.one_batch()
        assert x.shape==(8,3,224,224) and [dls.vocab[o] for o in y]==[items(dl)[i].parent.name for i in batch_info(dl).idx]
    mean,std = torch.tensor([.485,.456,.406])[:,None,None],torch.tensor([.229,.224,.225])[:,None,None]
    theirs = T.Compose([T.Resize(256), T.CenterCrop(224), T.ToTensor()])
    for i,x in enumerate(dls.test.one_batch()[0]):
        want = (theirs(Image.open(items(dls.test)[i]).convert('RGB'))-mean)/std
        assert (x-want).abs().mean() < .1 < .5 < want.std()      # fastai cuts the square out first and scales it then: half a pixel of difference
    assert kd_dataloaders('imagenet', path=imagenet, bs=8, device='cpu', num_workers=0, size=(64,96)).one_batch()[0].shape==(8,3,64,96)

def test_imagenet_train_images_move_and_others_do_not(imagenet):
    patterned = sorted((imagenet/'val').rglob('*.JPEG'))[:8]
    for augment in 'auto', None:
        dls = kd_dataloaders('imagenet', path=imagenet, bs=8, device='cpu', num_workers=0, valid_pct=0, augment=augment)
        for i,dl in enumerate(dls):
            dl = dl.new(Datasets(patterned, dl.dataset.tfms, split_idx=dl.dataset.split_idx), shuffle=False, drop_last=False)
            (x,y),(x2,y2) = dl.one_batch(),dl.one_batch()
            assert torch.equal(x, x2)==(i>0 or augment is None) and torch.equal(y, y2)

def test_imagenet_protocols_and_subsets(imagenet):
    a,b = (kd_dataloaders('imagenet', path=imagenet, bs=8, device='cpu', num_workers=0, **o) for o in (dict(valid_pct=0), dict(train_subset=1000, seed=3)))
    assert sizes(a)==[2000,50,50] and items(a.valid)==items(a.test) and a.split['validated_on']=='the test set'
    assert sizes(b)==[1000,80,50] and len({o.parent.name for o in items(b.train)})==1000
    assert json.loads(json.dumps(b.split))==b.split==kd_dataloaders('imagenet', path=imagenet, bs=4, device='cpu', num_workers=0, train_subset=1000, seed=3).split

def test_imagenet_indices_with_workers(imagenet):
    dls = kd_dataloaders('imagenet', path=imagenet, bs=16, device='cpu', num_workers=2, size=32, train_subset=1000)
    seen = []
    for _,(x,y) in zip(range(3), dls.train):
        idx = batch_info(dls.train).idx
        assert [items(dls.train)[i].parent.name for i in idx]==[dls.vocab[o] for o in y]
        seen += idx.tolist()
    assert len({*seen})==48

def test_imagenet_learner(imagenet, tmp_path):
    dls = kd_dataloaders('imagenet', path=imagenet, bs=500, device='cpu', num_workers=0, size=8, train_subset=1000)
    learn = Learner(dls, nn.Sequential(nn.Flatten(), nn.Linear(192,1000)), loss_func=CrossEntropyLossFlat(), metrics=accuracy, path=tmp_path)
    with learn.no_bar(), learn.no_logging():
        learn.fit(1)
        preds,_ = learn.get_preds(ds_idx=2)
        assert torch.allclose(learn.predict(items(dls.test)[5])[2], preds[5], atol=1e-6)
    dls.show_batch(max_n=2)
    matplotlib.pyplot.close('all')
    learn.export('m.pkl')
    assert (tmp_path/'m.pkl').stat().st_size < 1_500_000

def test_imagenet_as_its_archive_unpacks(tmp_path):
    base = tmp_path/'ILSVRC'/'Data'/'CLS-LOC'
    for o in 'train/a/1.JPEG','train/b/2.JPEG','val/b/3.JPEG': save(base/o, Image.new('RGB', (9,9)))
    for root in tmp_path, tmp_path/'ILSVRC', base:
        sets,names = imagenet_files(root)
        assert names==['a','b'] and {k: [(p.name, y) for p,y in v] for k,v in sets.items()}==dict(train=[('1.JPEG',0), ('2.JPEG',1)], test=[('3.JPEG',1)])
    with pytest.raises(ValueError, match='holds 2 classes, but imagenet has 1000'): kd_dataloaders('imagenet', path=tmp_path)
    save(base/'val'/'4.JPEG', Image.new('RGB', (9,9)))
    with pytest.raises(ValueError, match=r'val/4\.JPEG must lie in a folder with the name of its class'): imagenet_files(tmp_path)
    shutil.rmtree(base/'val'); (base/'val').mkdir()
    with pytest.raises(FileNotFoundError, match='val: no images in it'): imagenet_files(tmp_path)
    shutil.rmtree(base/'val')
    with pytest.raises(FileNotFoundError, match='no folders train and val in it'): imagenet_files(tmp_path)
    with pytest.raises(FileNotFoundError, match='no such folder; imagenet is read from folders'): imagenet_files(tmp_path/'a.tar')

def test_imagenet_arguments(imagenet):
    with pytest.raises(ValueError, match='works on images in memory'): kd_dataloaders('imagenet', path=imagenet, augment=Augment(flip=True))
    with pytest.raises(ValueError, match='size must be at least 1'): kd_dataloaders('imagenet', path=imagenet, size=0)


# by hand

@pytest.mark.parametrize('name,words', [('cinic10', 'CINIC-10.tar.gz .*train, valid and test/<class>'), ('tiny_imagenet', 'tiny-imagenet-200.zip .*wnids.txt'),
                                        ('imagenet', 'ILSVRC 2012 .*val/<wnid>'), ('fer2013', 'fer2013.csv .*kaggle'), ('raf', 'RAF-DB .*list_patition_label.txt')])
def test_what_to_fetch_by_hand(name, words):
    with pytest.raises(ValueError, match=f"source='{name}' can't be downloaded from here: give path=, .*{words}"): kd_dataloaders(name)

def test_sizes():
    assert check_size(None) is None and check_size(32)==check_size([32,32])==(32,32) and check_size((np.int64(5),7))==(5,7)
    for bad,e in (0,ValueError),((1,2,3),ValueError),('a',TypeError),(3.,TypeError):
        with pytest.raises(e, match='size'): check_size(bad)

def test_layouts(tmp_path):
    with pytest.raises(ValueError, match="layout must be one of 'tiny_imagenet', 'raf', 'fer2013', 'cinic10', 'images', got 'jpeg'"): read_files(tmp_path, layout='jpeg')
