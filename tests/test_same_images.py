"All arms of a seed see the same images; a checkpoint belongs to one training; batches exist before anything is trained"
from functools import partial
from pathlib import Path

import numpy as np, pytest, torch
from fastai.vision.all import (Callback, CutMix, DataLoaders, Flip, ImageDataLoaders, Learner, LabelSmoothingCrossEntropyFlat, MixUp, PILImage, RandomCrop,
                               RandomErasing, RandomResizedCrop, Resize, Rotate, SGD, accuracy, aug_transforms, nn)
from hypothesis import HealthCheck, given, settings, strategies as st

from fastkdtf.all import (Augment, Checkpoint, Distill, KnowledgeDistillation, LsrKD, MemoryReplay, compare, kd_dataloaders, seed_run, train_run,
                          LearnerParts, with_index)

@pytest.fixture(scope='module')
def photos(tmp_path_factory):
    folder = tmp_path_factory.mktemp('photos')
    for label in 'ab':
        (folder/label).mkdir()
        for i in range(10): PILImage.create(np.random.default_rng(i).integers(0, 255, (20, 24, 3)).astype(np.uint8)).save(folder/label/f'{i}.png')
    return folder

class Seen(Callback):
    "Note the sum of each batch's images as the loader made them, before any callback"
    order,batches = -100,None
    def before_fit(self): self.batches = []
    def before_batch(self): self.batches.append((self.training, self.xb[0].double().sum().item()))

class Drawing(Callback):
    "A method that draws, with every generator, in many places"
    def __init__(self, n): self.n = n
    def _draw(self): random_numbers(self.n)
    def before_batch(self): self._draw()
    def after_pred(self): self._draw()
    def after_batch(self): self._draw()
    def after_epoch(self): self._draw()

def random_numbers(n):
    import random
    return [random.random() for _ in range(n)],np.random.rand(n),torch.rand(n)

def net(): return nn.Sequential(nn.Flatten(), nn.Dropout(.5), nn.Linear(3*12*12, 2))
teacher = nn.Sequential(nn.Flatten(), nn.Linear(3*12*12, 2))
arms = dict(baseline=None, drawing=partial(Drawing, 3), more=partial(Drawing, 10), MixUp=MixUp, CutMix=CutMix, LsrKD=LsrKD,
            KD=partial(KnowledgeDistillation, teacher), MrKD=partial(MemoryReplay, 1, interval_steps=2), both=[MixUp, LsrKD])

def images_of(dls, method, seed=0, n_epoch=2):
    seen = Seen()
    train_run(method, seed, LearnerParts(dls, net), n_epoch, fit='fit', cbs=[seen])
    return seen.batches

item_tfms = dict(resize=lambda: [Resize(12)], crop=lambda: [Resize(16), RandomCrop(12)], zoom=lambda: [RandomResizedCrop(12)], none=lambda: [Resize(12, method='squish')])
batch_tfms = dict(none=lambda: [], flip=lambda: [Flip()], rotate=lambda: [Rotate(30, p=.5), Flip(.3)], all=lambda: aug_transforms(size=12), erase=lambda: [RandomErasing(p=.5)])

@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.sampled_from(list(item_tfms)), st.sampled_from(list(batch_tfms)), st.sampled_from([0, 0, 0, 1]), st.sampled_from(list(arms)[1:]), st.integers(0, 99), st.booleans())
def test_all_arms_of_a_seed_see_the_same_images(photos, item, batch, n_workers, arm, seed, indexed):
    dls = ImageDataLoaders.from_folder(photos, valid_pct=.3, seed=1, item_tfms=item_tfms[item](), batch_tfms=batch_tfms[batch](), bs=4, num_workers=n_workers)
    if indexed: with_index(dls)
    plain,own = (images_of(dls, arms[name], seed) for name in ('baseline', arm))
    assert len(plain) == 2*(3+2) and own == plain

@pytest.mark.parametrize('arm', list(arms)[1:])
def test_our_own_loaders_too(arm):
    dls = kd_dataloaders('digits', bs=64, train_subset=256, augment=Augment(flip=True, pad=1), device='cpu')
    small = lambda: nn.Sequential(nn.Flatten(), nn.Dropout(.5), nn.LazyLinear(10))
    def made():
        model = small()
        model(torch.zeros(2, 3, 8, 8))
        return model
    seen = {}
    for name in ('baseline', arm):
        note = Seen()
        method = arms[name] if name != 'KD' else partial(KnowledgeDistillation, made())
        train_run(method, 3, LearnerParts(dls, made), 2, fit='fit', cbs=[note])
        seen[name] = note.batches
    assert seen[arm] == seen['baseline'] and len(seen[arm]) > 10

def test_other_seeds_epochs_and_fits_see_other_images(photos):
    dls = ImageDataLoaders.from_folder(photos, valid_pct=.3, seed=1, item_tfms=Resize(12), batch_tfms=[Rotate(30, p=1.)], bs=4, num_workers=0)
    one,two = images_of(dls, None, 0),images_of(dls, None, 1)
    first,second = [batch for training,batch in one if training][:3],[batch for training,batch in one if training][3:]
    assert len(first) == len(second) == 3 and set(first).isdisjoint(second) and one != two

def test_mixtures_of_a_seed_are_the_same_beside_methods_that_draw(photos):
    class Mixed(Seen):
        order = 4.95
        def before_batch(self): self.batches.append(self.xb[0].double().sum().item())
    dls = ImageDataLoaders.from_folder(photos, valid_pct=.3, seed=1, item_tfms=Resize(12), batch_tfms=[Flip()], bs=4, num_workers=0)
    seen = []
    for method in (MixUp, [MixUp, partial(Drawing, 5)], [MixUp, LsrKD]):
        note = Mixed()
        train_run(method, 0, LearnerParts(dls, net), 2, fit='fit', cbs=[note])
        seen.append(note.batches)
    assert len(seen[0]) > 5 and seen[0] == seen[2] and seen[0][0] == seen[1][0]

# a loader without a batch

def test_a_loader_without_a_batch_is_refused_before_training():
    items = [(torch.rand(3, 12, 12), i%2) for i in range(64)]
    dls = DataLoaders.from_dsets(items, items[:8], bs=128, num_workers=0)
    dls.c = 2
    with pytest.raises(ValueError, match='no batch.*64.*128|64.*no batch of 128'): compare({'LsrKD': LsrKD}, dls, net, 1, 1, loss_func=nn.CrossEntropyLoss())

# a checkpoint of another training

def digits(**kwargs): return kd_dataloaders('digits', bs=64, **{'train_subset': 128, 'device': 'cpu', **kwargs})
def flat(): return nn.Sequential(nn.Flatten(), nn.Linear(3*8*8, 10))
def taught(alpha=.3, tau=4., seed=5, **kwargs):
    torch.manual_seed(seed)
    return KnowledgeDistillation(flat(), alpha=alpha, tau=tau, **kwargs)
def trained(path, cbs=None, dls=None, fit='fit_one_cycle', lr=1e-2, n_epoch=1, seed=0, **kwargs):
    dls = dls or digits()
    seed_run(seed, dls)
    learn = Learner(dls, flat(), metrics=accuracy, cbs=cbs or taught(), **kwargs)
    with learn.no_bar(), learn.no_logging(): getattr(learn, fit)(n_epoch, lr, cbs=Checkpoint(path))
    return learn

others = dict(alpha=lambda p: trained(p, taught(alpha=.4)), tau=lambda p: trained(p, taught(tau=2.)), teacher=lambda p: trained(p, taught(seed=6)),
              scale=lambda p: trained(p, taught(scale=1)), schedule=lambda p: trained(p, taught(alpha=lambda pct: .3)), lr=lambda p: trained(p, lr=2e-2),
              constant_lr=lambda p: trained(p, fit='fit'), loss=lambda p: trained(p, loss_func=LabelSmoothingCrossEntropyFlat()),
              loss_setting=lambda p: trained(p, loss_func=LabelSmoothingCrossEntropyFlat(.2)), optimizer=lambda p: trained(p, opt_func=partial(SGD, mom=.9)),
              split=lambda p: trained(p, dls=digits(seed=3)), decay=lambda p: trained(p, wd=.3), augmentation=lambda p: trained(p, dls=digits(augment=Augment(flip=True))),
              method=lambda p: trained(p, LsrKD(alpha=.3, tau=4.)))

@pytest.mark.parametrize('other', others)
def test_a_checkpoint_of_another_training_is_refused(tmp_path, other, capsys):
    first = trained(tmp_path/'ck.pth')
    with pytest.raises(ValueError, match='belongs to another training'): others[other](tmp_path/'ck.pth')
    again = trained(tmp_path/'ck.pth')
    assert 'this training is complete' in capsys.readouterr().out
    for a,b in zip(first.model.state_dict().values(), again.model.state_dict().values()): assert torch.equal(a, b)

def test_another_seed_is_said_aloud(tmp_path):
    trained(tmp_path/'ck.pth')
    with pytest.warns(UserWarning, match='began with other weights'): trained(tmp_path/'ck.pth', seed=1)

def test_a_message_names_the_value(tmp_path):
    trained(tmp_path/'ck.pth')
    with pytest.raises(ValueError, match=r'knowledge_distillation.alpha: 0.3 in the file, 0.4 here'): trained(tmp_path/'ck.pth', taught(alpha=.4))
