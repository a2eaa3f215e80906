"""Memory replay on 2,500 images of CIFAR-100, beside label smoothing, its controls, and with several intervals

    python results/cifar100_memory/make.py CIFAR100.npz

Eight epochs of resnet14, three seeds. Run again to go on after an interrupt."""
import sys
from functools import partial
from pathlib import Path

from fastkdtf.all import *
from fastkdtf.lab.measure import keep_freed_memory

out = Path(__file__).parent
keep_freed_memory()
dls = kd_dataloaders(sys.argv[1], bs=64, train_subset=2500, augment=Augment(flip=True, pad=4))
methods = {'LSR': partial(LsrKD, tau=1.), 'LsrKD': LsrKD, 'MrKD-1': partial(MemoryReplay, 1, 1), 'MrKD-3': partial(MemoryReplay, 3, 1),
           'MrKD-3-TC': partial(MemoryReplay, 3, 1, gamma=.025)}
methods |= {f'MrKD-3, κ={k:g}': partial(MemoryReplay, 3, k) for k in (.3, 3, 16)}
compare(methods, dls, partial(create_model, 'resnet14', dls.c), 8, 3, lr=1e-2, out=out, settings=dict(data='cifar100', arch='resnet14'))
