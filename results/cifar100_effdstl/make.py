"""Efficient Distillation on ten classes of CIFAR-100, 150 training images each: methods beside each other, and the exploration of what a teacher transfers

    python results/cifar100_effdstl/make.py CIFAR100.npz

Eight epochs of resnet8 for each student, three seeds, in the exploration two; a weak teacher (resnet8, six epochs) and a strong one
(resnet20, 24 epochs). Run again to go on after an interrupt."""
import sys
from functools import partial
from pathlib import Path

import torch
from fastai.optimizer import OptimWrapper
from fastai.vision.all import *
from fastkdtf.all import *
from fastkdtf.lab.arms import Arm, with_controls
from fastkdtf.lab.measure import keep_freed_memory
from fastkdtf.lab.training import Campaign

classes = ['apple', 'bear', 'bottle', 'bus', 'chair', 'clock', 'dolphin', 'house', 'rose', 'tank']
n_epoch,seeds,lr = 8,3,.05
out = Path(__file__).parent
trained = out/'trained'
trained.mkdir(exist_ok=True)
keep_freed_memory()

def ten_classes(source, file):
    "The images of ten classes, as a file of the same format"
    if file.exists(): return file
    with np.load(source) as z: arrays = {k: z[k] for k in z.files}
    chosen = np.array([list(arrays['class_names']).index(o) for o in classes])
    new = dict(class_names=np.array(classes))
    for o in ('train', 'test'):
        keep = np.isin(arrays[f'{o}_labels'], chosen)
        new |= {f'{o}_images': arrays[f'{o}_images'][keep], f'{o}_labels': np.array([list(chosen).index(y) for y in arrays[f'{o}_labels'][keep]])}
    np.savez(file, **new)
    return file

sgd = partial(OptimWrapper, opt=torch.optim.SGD, momentum=.9)
def fit_cosine(learn, n_epoch, cbs=None): learn.fit_stages(Stage(n_epoch, lr=(lr, 1e-5), wd=4e-5, opt_func=sgd), cbs=cbs)

def teacher(arch, n_epoch):
    "A trained network, or the one kept"
    set_seed(7)
    learn,file = Learner(dls, create_model(arch, dls.c), metrics=accuracy, path=out, model_dir='trained'),trained/f'{arch}.pth'
    if not file.exists():
        with learn.no_bar(): fit_cosine(learn, n_epoch)
        learn.save(arch, with_opt=False)
    learn.load(arch)
    return NetworkTeacher(learn)

dls = kd_dataloaders(ten_classes(sys.argv[1], trained/'ten_classes.npz'), bs=64, train_subset=1500, augment=Augment(flip=True, pad=4))
student = partial(create_model, 'resnet8', dls.c)
weak,strong = teacher('resnet8', 6),teacher('resnet20', 24)

one = partial(effdstl_stages, n_epoch, weak, stage1=dict(lr=(lr, 1e-5)))
two = partial(one, stage2=dict(lr=(lr/10, lr/1000)))
methods = {'baseline': None, 'KD, weak teacher': lambda: KnowledgeDistillation(weak, alpha=.5, tau=2.),
           'KD, strong teacher': lambda: KnowledgeDistillation(strong, alpha=.5, tau=2.),
           'WSL, weak teacher': lambda: WSL(weak, .5, 2., weight_tau=2.), 'CKM, weak teacher': lambda: CKM(weak), 'CKM, strong teacher': lambda: CKM(strong),
           'two stages': two(strong), 'two stages, same teacher': two(), 'two stages, no CKM': two(strong, ckm=False), 'one stage': one(two_stages=False)}
entries = {name: Arm(*o) for name,o in with_controls(methods, dls.c).items()}
for name in ('baseline', 'KD, weak teacher'): entries[name].keep = 'last'
campaign = Campaign(entries, dls, student, n_epoch, seeds, fit_cosine, out=out/'methods')
campaign.compare()

plain = kd_dataloaders(trained/'ten_classes.npz', bs=64, train_subset=1500)   # not augmented: each teacher is asked once
weak,strong = (CachedTeacher(o, trained/f'{name} logits') for name,o in (('weak', weak), ('strong', strong)))
schemes = exploration_schemes(strong, smooth_to=.9, delta=.1)
subsets = {k: exploration_subsets[k] for k in ('all', 'regularization', 'reg & cor')}
explore(weak, strong, plain, student, n_epoch, schemes, subsets, 2, fit=fit_cosine, out=out/'exploration')
