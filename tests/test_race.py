"A race: the same recipe in every loop, and what it says"
import json

import numpy as np
import pytest
import torch
from fastai.basics import set_seed

from fastkdtf.cli import main
from fastkdtf.lab.race import BoxLoop, Course, LearnerLoop, PILImages, Race, TaskLoop, contenders, race, transforms_of_torchvision
from fastkdtf.vision.augment import Augment
from fastkdtf.vision.data import channel_stats, kd_dataloaders
from fastkdtf.vision.models import create_model

def course(n_epoch=4, **kwargs):
    set_seed(0)
    dls = kd_dataloaders('digits', 32, train_subset=96, device='cpu', augment=Augment(flip=True, pad=1))
    return Course(dls, create_model('resnet8', 10), create_model('resnet8', 10).eval(), n_epoch, 32, **kwargs)

def rate(loop):
    if isinstance(loop, LearnerLoop): return loop.learn.opt.hypers[-1]['lr']
    return (loop.box.optimizer if isinstance(loop, BoxLoop) else loop.opt).param_groups[0]['lr']

def test_all_loops_train_with_the_same_learning_rates_momentum_and_weight_decay():
    loops = {name: make(course()) for name,make in contenders('32').items()}
    seen = {name: [] for name in loops}
    for i in range(4):
        for name,loop in loops.items():
            before = rate(loop)   # a plain loop sets it between epochs, a learner before each step
            assert np.isfinite(float(loop.epoch(i)))
            seen[name].append(rate(loop) if isinstance(loop, LearnerLoop) else before)
    assert len(seen) >= 2 and all(np.allclose(rates, [.1, .1, .01, .001]) for rates in seen.values()), seen
    for loop in loops.values():
        opt = loop.learn.opt.opt if isinstance(loop, LearnerLoop) else loop.box.optimizer if isinstance(loop, BoxLoop) else loop.opt
        assert all((group['momentum'], group['weight_decay'], group['nesterov']) == (.9, 5e-4, False) for group in opt.param_groups), type(loop)
        loop.close()

def test_an_epoch_at_a_time_is_the_whole_fit():
    c = course()
    torch.manual_seed(3)
    loop = LearnerLoop(c.learner(c.dls, []), 4)
    for i in range(4): loop.epoch(i)
    d = course()
    torch.manual_seed(3)
    learn = d.learner(d.dls, [])
    with learn.no_bar(), learn.no_logging(): learn.fit(4, .1)
    pairs = list(zip(loop.model.parameters(), learn.model.parameters()))
    assert pairs and all(torch.equal(a, b) for a,b in pairs)

def test_the_other_loaders_give_what_ours_gives():
    "Without augmentation the images are ours, and an augmented one is a shifted, maybe mirrored, image with a black border"
    from torchvision import transforms as T
    dls = kd_dataloaders('digits', 32, device='cpu', augment=None)
    items = dls.train.dataset.items
    stats = channel_stats(items['image'])
    plain = PILImages(items['image'], items['label'], transforms_of_torchvision(None, 8, [T.ToTensor(), T.Normalize(*stats)]))
    ours = dls.train.new(shuffle=False, drop_last=False).one_batch()[0]
    assert torch.allclose(torch.stack([plain[i][0] for i in range(32)]), ours.as_subclass(torch.Tensor), atol=1e-5)
    moved = PILImages(items['image'], items['label'], transforms_of_torchvision(Augment(flip=True, pad=1), 8, [T.ToTensor()]))
    torch.manual_seed(0)
    image = torch.nn.functional.pad(T.ToTensor()(T.ToPILImage()(torch.from_numpy(items['image'][0]))), (1, 1, 1, 1))
    views = [view for crop in [image[:, dy:dy+8, dx:dx+8] for dy in range(3) for dx in range(3)] for view in (crop, crop.flip(2))]
    def which(given): return next(i for i,view in enumerate(views) if torch.allclose(view, given))
    seen = {which(moved[0][0]) for _ in range(60)}
    assert len(seen) > 5
    with pytest.raises(ValueError, match='turns no images'): transforms_of_torchvision(Augment(rotate=5), 8, [])

@pytest.mark.parametrize('make', [BoxLoop, TaskLoop])
def test_the_first_loss_of_another_loop_is_ours(make):
    "The same network, teacher and images: with all samples in one batch, and none of them augmented, the order does not matter"
    pytest.importorskip('torchdistill' if make is BoxLoop else 'timm.task')
    def one_batch():
        set_seed(0)
        dls = kd_dataloaders('digits', 96, train_subset=96, device='cpu', augment=None)
        return Course(dls, create_model('resnet8', 10), create_model('resnet8', 10).eval(), 1, 96)
    ours,theirs = contenders('32')['fastkdtf, plain'](one_batch()),make(one_batch())
    assert float(ours.epoch(0)) == pytest.approx(float(theirs.epoch(0)), rel=1e-4)

def test_a_race_prints_a_table_and_what_is_left_out(capsys):
    assert main(['bench', '--race', '--arch', 'resnet8', '--bs', '64', '--epochs', '1', '--train-subset', '128', '--workers', '0', '--device', 'cpu', '--json']) == 0
    found = json.loads(capsys.readouterr().out)
    assert {'machine', 'sizes', 'race'} <= set(found) and {'fastkdtf, fast', 'fastkdtf, plain'} <= {row['loop'] for row in found['race']}
    assert all(row['seconds'] > 0 and 0 <= row['accuracy'] <= 100 for row in found['race'])
    assert found['sizes']['n_train'] == 128 and found['time_over_best_peer'] > 0

def test_a_race_of_ours_alone_has_no_peer():
    r = race('digits', 'resnet8', 1, 64, n_train=128, precision='32', workers=0, only=('fastkdtf, fast', 'fastkdtf, plain'))
    assert r.figures == {} and 'Not installed' in str(r)

@pytest.mark.parametrize('args', [['--epochs', '2'], ['--data', 'digits'], ['--race', '--losses-only'], ['--workers', '0']])
def test_options_of_the_tables_and_of_a_race_do_not_go_together(args, capsys):
    assert main(['bench', *args]) == 2
    said = capsys.readouterr().err
    assert args[-1 if '--race' in args else 0] in said and '--race' in said
