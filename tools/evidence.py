"""Train the records that the documentation rests on: `nice -n 19 python tools/evidence.py PART IMAGES`

PART is `methods` (CIFAR-100, resnet8), `self_guidance` (CIFAR-100, resnet20) or `paper` (Wang et al. 2020, Table 1, ResNet20,
at full scale). IMAGES is an .npz file of CIFAR-100, or for `paper` the folder of its files. Finished runs are in `results/`;
the same command goes on after any interrupt, and trains nothing once everything is there. Several processes may share the work, on
one GPU too. Which seeds are trained depends on the device, so that runs that are compared are of one device."""
import os, sys
os.environ.setdefault('OMP_NUM_THREADS', '1')   # one core, so that others can work beside it
from functools import partial
from pathlib import Path

from fastai.vision.all import SGD, default_device
from fastkdtf.all import *
from fastkdtf.callback.methods import find_method
from fastkdtf.lab.arms import Arm
from fastkdtf.lab.compare import learner_parts
from fastkdtf.lab.measure import keep_freed_memory

results = Path(__file__).parent.parent/'results'
n_epoch,lr = 18,.2   # one-cycle; decided from the time of an epoch on one core
device = default_device()
seeds = [0, 1] if device.type == 'cuda' else [2, 3]

def loaders(images):
    "Return all 50,000 training images, 5,000 of them for validation, and the test set"
    return kd_dataloaders(images, bs=128, valid_pct=.1, augment=Augment(flip=True, pad=4), device=device)

def named(*names): return {name: Arm(find_method(name).maker(100)) for name in names}
def taught(*names): return {name: Arm(find_method(name).maker(100), teacher='teacher') for name in names}

def learners(dls, arch): return learner_parts(dls, partial(create_model, arch, 100), opt_func=partial(SGD, mom=.9, wd=5e-4))

def methods(images):
    "Compare the methods and their controls on resnet8: one seed of the most wanted first, so that an unfinished folder holds a table"
    dls = loaders(images)
    interval = n_epoch/8   # the paper's share of the training, Wang et al. 2020, §4.1
    parts = [{**named('LSR', 'LsrKD'), 'TfKDSelf': Arm(KnowledgeDistillation, teacher='baseline')},
             taught('KD'),
             {**named('TfKDReg'), 'MrKD-1': Arm(partial(MemoryReplay, 1, interval, alpha=.25, tau=3.))},
             {**named('LsrKD-TC', 'TfKDReg-official'), 'MrKD-3': Arm(partial(MemoryReplay, 3, interval, alpha=.25, tau=3.)),
              **named('PSKD', 'OnlineLabelSmoothing'), **taught('DKD', 'WSL')}]
    portions = [(parts[:i+1], seeds[:n+1]) for n in range(len(seeds)) for i in range(len(parts))]
    if device.type == 'cuda': portions = portions[-1:]   # all at once, for many processes
    for some,own in portions:
        arms = {name: arm for part in some for name,arm in part.items()}
        teacher = learners(dls, 'resnet20') if 'KD' in arms else None
        comparison = compare(arms, learners(dls, 'resnet8'), n_epoch, own, out=results/'cifar100', lr=lr, teacher=teacher,
                             settings=dict(data='cifar100', arch='resnet8'), precision='bf16')
    return comparison

def self_guidance(images):
    """Compare self-guidance and stochastic depth on resnet20, which has blocks to drop

    The rate is twice that of `methods`, where a larger loss alone gained two points: a baseline should leave its controls less."""
    return compare(named('StochasticDepth', 'SelfGuidance'), learners(loaders(images), 'resnet20'), n_epoch, seeds, out=results/'cifar100_resnet20',
                   lr=2*lr, settings=dict(data='cifar100', arch='resnet20'), precision='bf16')

def paper(images):
    "Train the paper's own schedule of 200 epochs"
    ids = [f'wang2020/T1/ResNet20/{name}' for name in ('LSR', 'LsrKD', 'MrKD1')]
    return run_recipes(ids, 1, path=images, out=results/'paper', controls=False, device=str(device), precision='bf16')

if __name__ == '__main__':
    parts = dict(methods=methods, self_guidance=self_guidance, paper=paper)
    if len(sys.argv) != 3 or sys.argv[1] not in parts: sys.exit(__doc__)
    keep_freed_memory()
    print(parts[sys.argv[1]](sys.argv[2]))
