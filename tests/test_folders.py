"Which folder is a set and which a class: read right, or refused; never a test image in training"
import itertools, os, re, tarfile, warnings, zipfile
from pathlib import Path

import numpy as np, pytest
from hypothesis import given, settings, strategies as st
from PIL import Image

from fastkdtf.vision.data import kd_dataloaders
from fastkdtf.vision.loader import to_rgb
from fastkdtf.vision.readers import imagenet_files, read_files, shared_images

sets = ('train', 'valid', 'test')
count = itertools.count()

def put(path, part, label):
    "An image whose colours say its set and its class; no two are alike"
    path.parent.mkdir(parents=True, exist_ok=True)
    i = next(count)
    pixels = np.array([[sets.index(part), label, i%256], [i//256%256, i//65536, 0]], np.uint8)
    Image.fromarray(pixels[None].repeat(2, 0)).save(path)

def write(root, layout, classes=('cat', 'dog', 'eel'), n=2):
    "A tree of images, by pairs of set and pattern of a path"
    for part,pattern in layout:
        for label,name in enumerate(classes):
            for i in range(n): put(root/f'{pattern.format(c=name)}/{part}{label}{i}.png', part, label)
    return root

def is_right(found, n_classes=3):
    "True if each image lies in its set, with its class"
    records,names = found
    assert records['train']['image'].size and len(names)==n_classes
    return all((recs['image'][:,0,0,0]==sets.index(part)).all() and (recs['image'][:,1,0,0]==recs['label']).all() for part,recs in records.items())

read_right = {
    'usual':                  [('train', 'train/{c}'), ('test', 'test/{c}')],
    'three sets':             [('train', 'train/{c}'), ('valid', 'val/{c}'), ('test', 'test/{c}')],
    'capitals':               [('train', 'Train/{c}'), ('test', 'TEST/{c}')],
    "Kaggle's Intel scenes":  [('train', 'seg_train/seg_train/{c}'), ('test', 'seg_test/seg_test/{c}')],
    'with a word behind':     [('train', 'Train_split/{c}'), ('test', 'Test_split/{c}')],
    'with -':                 [('train', 'train-set/{c}'), ('valid', 'validation-set/{c}'), ('test', 'test-set/{c}')],
    'with a blank':           [('train', 'Training Data/{c}'), ('test', 'Testing Data/{c}')],
    'numbered':               [('train', 'train1/{c}'), ('test', 'test1/{c}')],
    'camels':                 [('train', 'TrainImages/{c}'), ('test', 'testImages/{c}')],
    'in one word':            [('train', 'trainset/{c}'), ('valid', 'valset/{c}'), ('test', 'testset/{c}')],
    'of a year':              [('train', 'train2017/{c}'), ('valid', 'val2017/{c}'), ('test', 'test2017/{c}')],
    'below a folder':         [('train', 'pets/images/train/{c}'), ('test', 'pets/images/test/{c}')],
    'below one that says so': [('train', 'my-test-data/train/{c}'), ('test', 'my-test-data/test/{c}')],
    'twice':                  [('train', 'train/train/{c}'), ('test', 'test/test/{c}')],
    'kinds above the sets':   [('train', 'animals/train/{c}'), ('test', 'animals/test/{c}')],
    'kinds below the sets':   [('train', 'train/animals/{c}'), ('test', 'test/animals/{c}')],
    'classes above the sets': [('train', '{c}/train'), ('test', '{c}/test')],
    'three of these':         [('train', '{c}/train'), ('valid', '{c}/val'), ('test', '{c}/test')],
    'only classes':           [('train', '{c}')],
    'only classes, deeper':   [('train', 'data/all/{c}')],
    'only training':          [('train', 'train/{c}')],
}

@pytest.mark.parametrize('name', read_right)
def test_each_image_is_in_its_set_with_its_class(name, tmp_path):
    root = write(tmp_path/'x', read_right[name])
    assert is_right(read_files(root))
    assert is_right(read_files(write_tar(root, tmp_path/'x.tar')))
    assert is_right(read_files(write_zip(root, tmp_path/'x.zip')))

def write_tar(root, path, mode='w'):
    with tarfile.open(path, mode) as t: t.add(root, root.name)
    return path

def write_zip(root, path, sep='/'):
    with zipfile.ZipFile(path, 'w') as z:
        for o in sorted(root.rglob('*.png')): z.writestr(o.relative_to(root).as_posix().replace('/', sep), o.read_bytes())
    return path

def test_a_zip_of_windows_programs_is_read_too(tmp_path):
    root = write(tmp_path/'x', read_right['usual'])
    path = write_zip(root, tmp_path/'x.zip', '\\')
    with zipfile.ZipFile(path) as z: assert all('\\' in info.orig_filename for info in z.infolist())
    assert is_right(read_files(path))

@pytest.mark.parametrize('names', [('test', 'exam', 'quiz'), ('train', 'car', 'plane'), ('val', 'test', 'train'), ('train_station', 'test_tube', 'quay')], ids='-'.join)
def test_a_class_may_have_any_name_in_folders_of_sets(names, tmp_path):
    names = sorted(names)
    assert is_right(read_files(write(tmp_path/'x', read_right['usual'], names)))

def test_words_of_classes_are_no_sets(tmp_path):
    assert is_right(read_files(write(tmp_path/'x', read_right['only classes'], sorted(('train_station', 'test_tube', 'valley')))))

refused = {
    'a set of another name':        ([('train', 'a/{c}'), ('test', 'b/{c}')], "class 'cat' lies in a and in b"),
    'in another language':          ([('train', 'entrenamiento/{c}'), ('test', 'prueba/{c}')], "class 'cat' lies in"),
    'folds':                        ([('train', 'fold1/{c}'), ('test', 'fold2/{c}')], "class 'cat' lies in fold1 and in fold2"),
    'one known, one not':           ([('train', 'train/{c}'), ('test', 'holdout/{c}')], 'lies in none of the folders that say'),
    'a set beside classes':         ([('train', '{c}'), ('test', 'test/{c}')], 'in none of the folders|must lie in a folder'),
    'both words':                   ([('train', 'trainval/train/{c}'), ('test', 'test/{c}')], "class 'cat' lies in"),
    'two sets over one':            ([('train', 'train/{c}'), ('test', 'train/test/{c}')], 'in none of the folders that say'),
    'masks':                        ([('train', 'images/{c}'), ('test', 'masks/{c}')], "class 'cat' lies in"),
    'domains':                      ([('train', 'amazon/images/{c}'), ('test', 'webcam/images/{c}')], "class 'cat' lies in"),
    'no classes':                   ([('train', 'train'), ('test', 'test')], "'test' may be a class or the test images"),
    'no classes, other words':      ([('train', 'seg_train'), ('test', 'seg_test')], 'look like sets without folders of classes'),
    'no classes, fillers':          ([('train', 'train_images'), ('test', 'test_images')], 'may be a class or the test images'),
    'images and classes':           ([('train', 'train/{c}'), ('test', 'train')], 'must lie in a folder with the name of its class'),
    'only the test':                ([('test', 'test/{c}')], 'no folder train with images, only test'),
    'no training':                  ([('valid', 'valid/{c}'), ('test', 'test/{c}')], 'no folder train with images'),
    'capitals of one class':        ([('train', 'a/{c}'), ('test', 'b/{c}')], 'lies in a and in b'),
    'unlabelled images beside':     ([('train', 'seg_train/seg_train/{c}'), ('test', 'seg_test/seg_test/{c}'), ('test', 'seg_pred/seg_pred')], 'lies in none of the folders'),
    'a folder within a class':      ([('train', '{c}'), ('test', 'cat/more')], 'must lie in a folder with the name of its class'),
}

@pytest.mark.parametrize('name', refused)
def test_what_is_not_clear_is_refused_with_the_reason(name, tmp_path):
    layout,why = refused[name]
    with pytest.raises(ValueError, match=f'x: .*(?:{why})'): read_files(write(tmp_path/'x', layout))

def test_one_class_in_two_spellings_is_refused(tmp_path):
    write(tmp_path/'x', [('train', 'a/{c}')], ('Cat', 'dog')), write(tmp_path/'x', [('test', 'b/{c}')], ('cat', 'eel'))
    with pytest.raises(ValueError, match="class 'cat' lies in a and in b"): read_files(tmp_path/'x')

@pytest.mark.parametrize('names', [('cat', 'dog', 'test'), ('bicycle', 'car', 'train'), ('cat', 'dog', 'test1')], ids='-'.join)
def test_a_folder_test_among_classes_is_refused_and_one_level_more_tells(names, tmp_path):
    with pytest.raises(ValueError, match='may be a class or the .* images.*put all folders of classes into a folder train'):
        read_files(write(tmp_path/'x', [('train', '{c}')], names))
    assert is_right(read_files(write(tmp_path/'y', [('train', 'train/{c}')], names)))

words = st.sampled_from(['train', 'test', 'val', 'a', 'b', 'data', 'seg_train', 'seg_test', 'Train_split', 'images', 'cat', 'dog', 'test1', 'trainval'])

@settings(max_examples=150, deadline=None)
@given(trees=st.lists(st.lists(words, max_size=3), min_size=1, max_size=4), classes=st.lists(st.sampled_from(['cat', 'dog', 'test', 'train']), min_size=1, max_size=3, unique=True))
def test_no_tree_puts_what_says_test_into_training(tmp_path_factory, trees, classes):
    "Whatever folders there are: an image under a folder that says test is not trained on, unless nothing else is there"
    root,told = tmp_path_factory.mktemp('x'),{}
    for tree in trees:
        for label in classes:
            path = root.joinpath(*tree, label, f'{next(count)}.png')
            put(path, 'test' if any('test' in folder.lower() for folder in tree) else 'train', 0)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        try: records,_ = read_files(root)
        except ValueError as e: assert str(e).count('\n')==0 and str(root) in str(e); return
    if all('test' in ''.join(tree).lower() for tree in trees): return
    assert (records['train']['image'][:,0,0,0]==0).all()


# the same image in two sets

def test_the_same_image_in_two_sets_is_reported(tmp_path):
    root = write(tmp_path/'x', read_right['three sets'], n=6)
    first,*_ = sorted((root/'train'/'cat').iterdir())
    (root/'test'/'dog'/'other.png').write_bytes(first.read_bytes())
    with pytest.warns(UserWarning, match=r'1 of 19 test images are training images too, such as number \d+, which is training image 0'):
        kd_dataloaders(root, bs=4, device='cpu')

def test_the_same_image_under_another_compression_is_found(tmp_path):
    root = write(tmp_path/'x', read_right['usual'], n=4)
    first,*_ = sorted((root/'train'/'cat').iterdir())
    Image.open(first).save(root/'test'/'cat'/'again.bmp')
    records,_ = read_files(root)
    assert len(shared_images(records['train'], records['test']))==1

def test_different_images_are_not_reported(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        kd_dataloaders(write(tmp_path/'x', read_right['three sets'], n=6), bs=4, device='cpu')

@settings(max_examples=30, deadline=None)
@given(st.integers(1, 30), st.integers(1, 30), st.integers(1, 4), st.integers(0, 2**32-1))
def test_shared_images_are_those_that_a_plain_search_finds(n, m, values, seed):
    rng = np.random.default_rng(seed)
    from fastkdtf.vision.loader import to_records
    a,b = (to_records(rng.integers(0, values, (k,1,2,3), dtype=np.uint8), np.zeros(k, int)) for k in (n, m))
    found = shared_images(a, b)
    for i,j in found: assert (b['image'][i]==a['image'][j]).all()
    assert [i for i,_ in found]==[i for i in range(m) if any((b['image'][i]==o).all() for o in a['image'])]


# links, and files that are none

needs_links = pytest.mark.skipif(os.name=='nt', reason='links need rights on Windows')

@needs_links
def test_links_to_folders_and_files_are_followed(tmp_path):
    real = write(tmp_path/'real', read_right['usual'])
    (tmp_path/'x').mkdir()
    for part in 'train','test': (tmp_path/'x'/part).symlink_to(real/part)
    assert is_right(read_files(tmp_path/'x'))
    for o in sorted(real.rglob('*.png')):
        (to := tmp_path/'y'/o.relative_to(real)).parent.mkdir(parents=True, exist_ok=True)
        to.symlink_to(o)
    assert is_right(read_files(tmp_path/'y'))

@needs_links
def test_a_test_folder_that_links_to_training_is_reported(tmp_path):
    root = write(tmp_path/'x', [('train', 'train/{c}')], n=4)
    (root/'test').symlink_to(root/'train')
    with pytest.warns(UserWarning, match=r'\d+ of 12 test images are training images too'): kd_dataloaders(root, bs=4, device='cpu')

@needs_links
@pytest.mark.parametrize('link,why', [(lambda o: (o/'train'/'cat'/'up').symlink_to(o), 'train/cat/up links to a folder that holds it'),
                                      (lambda o: (o/'train'/'cat'/'x.png').symlink_to(o/'nowhere'), r'train/cat/x\.png is a link to nothing'),
                                      (lambda o: os.mkfifo(o/'train'/'cat'/'x.png'), r'train/cat/x\.png is no file'),
                                      (lambda o: (o/'train'/'cat'/'x.png').symlink_to('/dev/zero'), r'train/cat/x\.png is a link to nothing')])
def test_links_that_lead_nowhere_are_named(tmp_path, link, why):
    link(write(tmp_path/'x', read_right['usual']))
    with pytest.raises(ValueError, match=why): read_files(tmp_path/'x')

@needs_links
def test_two_folders_that_link_to_each_other_end(tmp_path):
    root = write(tmp_path/'x', read_right['usual'])
    (root/'train'/'to').symlink_to(root/'test')
    (root/'test'/'back').symlink_to(root/'train')
    with pytest.raises(ValueError, match='links to a folder that holds it'): read_files(root)

@pytest.mark.skipif(not hasattr(os, 'geteuid') or os.geteuid()==0, reason='root may read everything')
def test_a_folder_that_may_not_be_read_is_not_left_out(tmp_path):
    root = write(tmp_path/'x', read_right['usual'])
    (root/'test').chmod(0)
    try:
        with pytest.raises(PermissionError, match='test'): read_files(root)
    finally: (root/'test').chmod(0o700)

def linked_tar(path, root, kind, name, target):
    with tarfile.open(path, 'w') as t:
        t.add(root, 'x')
        link = tarfile.TarInfo(name)
        link.type,link.linkname = kind,target
        t.addfile(link)
    return path

def test_links_in_a_tar_archive(tmp_path):
    root = write(tmp_path/'x', read_right['usual'])
    first = sorted((root/'train'/'cat').iterdir())[0].name
    for kind,target in ((tarfile.LNKTYPE, f'x/train/cat/{first}'), (tarfile.SYMTYPE, f'../../train/cat/{first}')):
        records,_ = read_files(linked_tar(tmp_path/'a.tar', root, kind, 'x/test/cat/link.png', target))
        assert len(records['test'])==7 and len(shared_images(records['train'], records['test']))==1
    for name,target in (('x/test/cat/link.png', 'nowhere.png'), ('x/test/eel', '../train/cat'), ('x/test/cat/link.png', '../../../../etc/passwd')):
        with pytest.raises(ValueError, match='is a link to a folder, or to nothing in it: unpack'):
            read_files(linked_tar(tmp_path/'a.tar', root, tarfile.SYMTYPE, name, target))

@pytest.mark.parametrize('mode', ['w', 'w:gz', 'w:bz2', 'w:xz'])
def test_a_tar_archive_that_was_cut_is_refused_wherever_it_was_cut(tmp_path, mode):
    "Also between two files, where nothing is missing but the end"
    path = write_tar(write(tmp_path/'x', read_right['usual']), tmp_path/'x.tar', mode)
    whole = path.read_bytes()
    assert is_right(read_files(path))
    cuts = range(512, len(whole)-10240 if mode=='w' else len(whole)-20, 512 if mode=='w' else max(1, len(whole)//40))
    for cut in cuts:
        path.write_bytes(whole[:cut])
        with pytest.raises(ValueError, match=r'x\.tar: truncated or damaged archive'): read_files(path)
    assert len(cuts)>10

def test_a_header_of_a_tar_archive_that_was_damaged_is_refused(tmp_path):
    path = write_tar(write(tmp_path/'x', read_right['usual']), tmp_path/'x.tar')
    whole = path.read_bytes()
    with tarfile.open(path) as t: offsets = [o.offset for o in t][1:]
    for offset in offsets:
        path.write_bytes(whole[:offset] + b'?' + whole[offset+1:])
        with pytest.raises(ValueError, match='truncated or damaged archive'): read_files(path)
    assert len(offsets)>10


# pixels

def folder_of(root, images):
    for i,im in enumerate(images):
        (root/'train'/'ab'[i%2]).mkdir(parents=True, exist_ok=True)
        im.save(root/'train'/'ab'[i%2]/f'{i}.{"tif" if im.mode in ("F", "I") else "png"}')
    return root

@pytest.mark.parametrize('mode', ['I;16', 'F', 'I', 'I;16B'])
def test_deep_images_are_scaled(mode, tmp_path):
    values = np.linspace(0, 1, 12).reshape(3,4)
    kinds = {'F': (values, np.float32), 'I;16': (values*65535, np.uint16), 'I': (values*65535, np.int32), 'I;16B': (values*65535, np.dtype('>u2'))}
    array,kind = kinds[mode]
    im = Image.fromarray(np.rint(array).astype(kind) if mode!='F' else array.astype(kind))
    got = np.asarray(to_rgb(im))
    assert np.abs(got.astype(float)-255*values[...,None]).max()<=.51
    records,_ = read_files(folder_of(tmp_path/'x', [im]*4))
    assert np.abs(records['train']['image'].astype(float)-255*values).max()<=.51

@pytest.mark.parametrize('array,why', [(np.float32([[0, 255]]), 'reach from 0 to 255; floats must lie in 0 to 1'), (np.float32([[-1, 1]]), 'floats must lie'),
                                       (np.float32([[0, np.nan]]), 'floats must lie'), (np.int32([[0, 2**20]]), 'whole numbers must lie in 0 to 65535')])
def test_values_of_unknown_range_are_refused(array, why, tmp_path):
    root = folder_of(tmp_path/'x', [Image.new('L', (2,1))]*2)
    Image.fromarray(array).save(root/'train'/'a'/'deep.tif')
    with pytest.raises(ValueError, match=rf'deep\.tif: its values reach.*{why}' if 'reach' not in why else why): read_files(root)

def test_eight_bits_in_files_of_sixteen_are_refused(tmp_path):
    images = [Image.fromarray(np.full((2,2), 40*i, np.uint16)) for i in range(6)]
    with pytest.raises(ValueError, match='hold no value above 200 of 65535 and would be black'): read_files(folder_of(tmp_path/'x', images))

def test_sizes_are_compared_before_anything_is_decoded(tmp_path, monkeypatch):
    root = folder_of(tmp_path/'x', [Image.new('L', (4,4))]*4)
    Image.new('L', (9000,9000)).save(root/'train'/'b'/'large.png')
    monkeypatch.setattr(Image.Image, 'load', lambda self: pytest.fail('decoded'))
    with pytest.raises(ValueError, match=r'large\.png has 9000×9000 pixels, train/a/0\.png 4×4: give size='):
        from fastkdtf.vision import readers
        monkeypatch.setattr(readers, '_pixels', lambda im, name, size: np.zeros((4,4,3), np.uint8))
        read_files(root)

def test_an_image_of_too_many_pixels_is_refused_before_it_is_decoded(tmp_path, monkeypatch):
    root = folder_of(tmp_path/'x', [Image.new('L', (4,4))]*4)
    Image.new('L', (300,300)).save(root/'train'/'b'/'large.png')
    monkeypatch.setattr(Image, 'MAX_IMAGE_PIXELS', 60_000)   # as 13,000×13,000 pixels are for the usual limit
    with pytest.raises(ValueError, match=r'large\.png has 300×300 pixels, more than PIL\.Image\.MAX_IMAGE_PIXELS'): read_files(root, size=4)

def test_more_memory_than_there_is_is_not_asked_for(tmp_path):
    root = folder_of(tmp_path/'x', [Image.new('L', (4,4))]*4)
    with pytest.raises(ValueError, match=r'4 images of 1000000×1000000 pixels \(see size=\) would take 12.0 TB'): read_files(root, size=10**6)


# CIFAR's binary form, and what lies beside data

def binary(root, k=10):
    rng = np.random.default_rng(k)
    root.mkdir(parents=True, exist_ok=True)
    n_labels = 1 if k==10 else 2
    def batch(name, n):
        x,y = rng.integers(0, 256, (n,3072), dtype=np.uint8),np.arange(n)%k
        rows = np.concatenate([np.full((n,n_labels-1), 3), y[:,None], x], 1).astype(np.uint8)
        (root/name).write_bytes(rows.tobytes())
        return x.reshape(-1,3,32,32),y
    batches = [batch(f'data_batch_{i}.bin', 20) for i in range(1,6)] if k==10 else [batch('train.bin', 200)]
    (root/('batches.meta.txt' if k==10 else 'fine_label_names.txt')).write_text('\n'.join(f'n{i}' for i in range(k))+'\n\n')
    return batches,batch('test_batch.bin' if k==10 else 'test.bin', 10)

@pytest.mark.parametrize('k', [10, 100])
def test_cifar_in_binary(k, tmp_path):
    batches,(x_test,y_test) = binary(tmp_path/'c', k)
    records,names = read_files(tmp_path/'c')
    assert (records['train']['image']==np.concatenate([x for x,_ in batches])).all() and (records['train']['label']==np.concatenate([y for _,y in batches])).all()
    assert (records['test']['image']==x_test).all() and (records['test']['label']==y_test).all() and len(names)==k and names[3]=='n3'
    assert kd_dataloaders(f'cifar{k}', path=write_tar(tmp_path/'c', tmp_path/'c.tar.gz', 'w:gz'), bs=4, device='cpu').c==k
    test = tmp_path/'c'/('test_batch.bin' if k==10 else 'test.bin')
    test.write_bytes(test.read_bytes()[:-1])
    with pytest.raises(ValueError, match=rf'{test.name} is truncated'): read_files(tmp_path/'c')
    test.unlink()
    with pytest.raises((ValueError, FileNotFoundError), match=f'no file {test.name}|no such files'): read_files(tmp_path/'c')

def test_a_stray_image_beside_batches_is_not_the_data(tmp_path):
    binary(tmp_path/'c')
    put(tmp_path/'c'/'preview.png', 'train', 0)
    assert len(read_files(tmp_path/'c')[0]['train'])==100

def test_batches_and_folders_of_images_are_not_chosen_between(tmp_path):
    binary(tmp_path/'c'), write(tmp_path/'c'/'pets', read_right['usual'])
    with pytest.raises(ValueError, match='CIFAR.*and folders of images, such as pets/test/cat'): read_files(tmp_path/'c')
    assert is_right(read_files(tmp_path/'c', layout='images'))

def test_two_copies_of_batches_are_not_mixed(tmp_path):
    binary(tmp_path/'c'/'a'), binary(tmp_path/'c'/'b')
    with pytest.raises(ValueError, match=r'a/batches\.meta\.txt and b/batches\.meta\.txt are there'): read_files(tmp_path/'c')

def test_idx_files_of_two_sets_are_not_mixed(tmp_path):
    from test_data import idx_files
    idx_files(tmp_path/'MNIST'/'raw'), idx_files(tmp_path/'FashionMNIST'/'raw')
    (tmp_path/'FashionMNIST'/'raw'/'t10k-labels-idx1-ubyte.gz').unlink()
    with pytest.raises(ValueError, match='idx files lie in FashionMNIST/raw and in MNIST/raw'): read_files(tmp_path)

def test_packed_and_unpacked_idx_files_side_by_side(tmp_path):
    "As torchvision leaves them"
    from test_data import idx_files
    idx_files(tmp_path), idx_files(tmp_path, gz=False)
    assert len(read_files(tmp_path)[0]['test'])==50


# ImageNet

def imagenet(root, flat=True):
    for i,name in enumerate(('n01', 'n02', 'n03')):
        for j in range(3): put(root/'ILSVRC/Data/CLS-LOC/train'/name/f'{name}_{j}.JPEG', 'train', i)
        put(root/'ILSVRC/Data/CLS-LOC/val'/('' if flat else name)/f'val_{i}.JPEG', 'test', i)
    return root

def test_the_flat_validation_images_of_imagenet_are_read_with_their_csv(tmp_path):
    root = imagenet(tmp_path/'imagenet')
    with pytest.raises(ValueError, match=r'val_0\.JPEG must lie in a folder .*LOC_val_solution\.csv'): imagenet_files(root)
    (root/'LOC_val_solution.csv').write_text('ImageId,PredictionString\nval_0,n03 1 2 3 4 n03 5 6 7 8 \nval_1,n01 1 2 3 4\nval_2,n02 0 0 1 1\n')
    records,names = imagenet_files(root)
    assert [names[o] for o in records['test']['label']]==['n03', 'n01', 'n02'] and len(records['train'])==9
    (root/'LOC_val_solution.csv').write_text('ImageId,PredictionString\nval_0,n03 1 2 3 4\nval_1,n01 1 2 3 4\n')
    with pytest.raises(ValueError, match=r'val_2\.JPEG must lie'): imagenet_files(root)

def test_flat_validation_images_have_their_classes_in_the_loaders(tmp_path, monkeypatch):
    from fastkdtf.vision import data
    root = imagenet(tmp_path/'imagenet')
    (root/'LOC_val_solution.csv').write_text('ImageId,PredictionString\nval_0,n03 1 2 3 4\nval_1,n01 1 2 3 4\nval_2,n02 0 0 1 1\n')
    monkeypatch.setitem(data._known_sets, 'imagenet', data._known_sets['imagenet']._replace(n_classes=3, pct=0.))
    dls = kd_dataloaders('imagenet', path=root, bs=2, size=8, device='cpu', num_workers=0, valid_pct=0)
    assert [y for _,y in dls.test_ds] and [int(y) for _,y in dls.test_ds]==[2, 0, 1]

@needs_links
def test_validation_images_of_imagenet_that_are_training_images_are_refused(tmp_path):
    root = imagenet(tmp_path/'a', flat=False)/'ILSVRC/Data/CLS-LOC'
    (root/'val'/'n01'/'n01_0.JPEG').write_bytes((root/'train'/'n01'/'n01_0.JPEG').read_bytes())
    with pytest.raises(ValueError, match=r'val/n01/n01_0\.JPEG is the training image'): imagenet_files(root)
    (tmp_path/'b').mkdir(), (tmp_path/'b'/'train').symlink_to(root/'train'), (tmp_path/'b'/'val').symlink_to(root/'train')
    with pytest.raises(ValueError, match='holds training and validation images'): imagenet_files(tmp_path/'b')
