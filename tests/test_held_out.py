"What people bring to `tune` and `compare`: photos in folders, of which a part is held out, teachers of pixels, networks of other libraries"
import numpy as np
import pytest
import torch
from fastai.data.core import DataLoaders
from fastai.data.load import DataLoader
from fastai.learner import Learner
from fastai.losses import CrossEntropyLossFlat
from fastai.metrics import accuracy
from fastai.vision.augment import Resize
from fastai.vision.core import PILImage
from fastai.vision.data import ImageDataLoaders
from PIL import Image
from torch import nn
from torch.utils.data import Subset

from fastkdtf.callback.distill import LsrKD
from fastkdtf.fingerprint import fingerprint, is_of_library, samples_fingerprint
from fastkdtf.lab.compare import compare
from fastkdtf.lab.one_run import teacher_accuracy
from fastkdtf.lab.tune import hold_out, tune

@pytest.fixture
def photos(tmp_path):
    "Forty photos of two classes"
    rng = np.random.default_rng(0)
    for name in ('a', 'b'):
        (tmp_path/'photos'/name).mkdir(parents=True)
        for i in range(20): Image.fromarray(rng.integers(0, 255, (9, 12, 3), dtype=np.uint8)).save(tmp_path/'photos'/name/f'{i}.png')
    return tmp_path/'photos'

def loaders(path, bs=8): return ImageDataLoaders.from_folder(path, valid_pct=.4, seed=0, item_tfms=Resize(8), bs=bs, num_workers=0)
def learner(dls): return Learner(dls, nn.Sequential(nn.Flatten(), nn.Linear(3*8*8, 2)), metrics=accuracy)

@pytest.mark.parametrize('part', [hold_out, lambda dls: DataLoaders(*[dl.new(Subset(dl.dataset, range(8))) for dl in dls.loaders])],
                         ids=['held out', 'Subset'])
def test_a_part_of_a_folder_is_told_by_its_files(photos, part, monkeypatch):
    "The same for the same photos, another for others; what is opened is a batch for the transforms, not every photo"
    opened = []
    create = PILImage.create
    monkeypatch.setattr(PILImage, 'create', classmethod(lambda cls, fn, **kwargs: opened.append(fn) or create.__func__(cls, fn, **kwargs)))
    def words(**kwargs): return str(samples_fingerprint(part(loaders(photos, bs=2)).train))
    before = words()
    opened.clear()
    assert words()==before and len(opened) < 15
    changed = loaders(photos).train.items[0]
    Image.new('RGB', (12, 9)).save(changed)
    assert words()!=before

def test_other_samples_held_out_are_another_experiment(photos):
    dls = loaders(photos)
    assert samples_fingerprint(hold_out(dls, seed=0).train)!=samples_fingerprint(hold_out(dls, seed=1).train)

def test_tune_goes_on_with_the_photos_of_a_folder(photos, tmp_path):
    "fastai's own loaders have no third set: a part is held out, and the second call trains nothing"
    dls = loaders(photos)
    def again(): return tune('LsrKD', lambda: learner(dls), 1, dict(alpha=[.05, .3]), confirm=1, out=tmp_path/'tuned')
    found = again()
    kept = (tmp_path/'tuned'/'results.jsonl').read_text()
    assert len(found.table)==2 and again().table.equals(found.table)
    assert (tmp_path/'tuned'/'results.jsonl').read_text()==kept

def dense(n_classes, channels):
    def batch(): return torch.randn(3, 4, 4),torch.randint(n_classes, (4, 4))
    torch.manual_seed(0)
    dls = DataLoaders(*[DataLoader([batch() for _ in range(8)], bs=4) for _ in range(2)])
    dls.c = n_classes
    def overlap(pred, targ): return (pred.argmax(1)==targ).float().mean()
    return Learner(dls, nn.Conv2d(3, channels, 1), CrossEntropyLossFlat(axis=1), metrics=overlap)

def test_a_teacher_of_pixels_has_no_accuracy_and_teaches_in_a_comparison():
    learn,teacher = dense(3, 3),nn.Conv2d(3, 3, 1)
    assert teacher_accuracy(teacher, learn) is None
    c = compare(['KD:alpha=.5'], learn, 1, seeds=1, teacher=teacher, metric='overlap', higher=True)
    assert c.names[:2]==['baseline', 'KD(alpha=0.5)'] and len(c.runs('KD(alpha=0.5)'))==1

class Lazy(dict):
    "As transformers' lists of models: it imports what is asked for"
    def items(self): raise ImportError('no module of that name')

def test_a_mapping_that_cannot_give_its_values_is_refused_in_words_where_runs_are_kept():
    with pytest.raises(ValueError, match='cannot be told from another Lazy in a later process'): fingerprint(Lazy(a=1))
    lazy = Lazy(a=1)
    assert fingerprint(lazy, refuse=False)==fingerprint(lazy, refuse=False)!=fingerprint(Lazy(a=1), refuse=False)

def test_a_library_is_one_wherever_it_is_installed(tmp_path, monkeypatch):
    "Such as by `pip install --target`, found by PYTHONPATH; the user's own module is none"
    for folder,name in (('site-packages', 'some_library'), ('mine', 'my_module')):
        (tmp_path/folder).mkdir()
        (tmp_path/folder/f'{name}.py').write_text('class Net: pass\n')
        monkeypatch.syspath_prepend(str(tmp_path/folder))
    import my_module, some_library
    assert is_of_library(some_library.Net) and not is_of_library(my_module.Net)
