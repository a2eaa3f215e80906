"""Self-guidance on 1,500 images of CIFAR-100: the rows of Zheng and Peng's Tab. 5–6, beside the cross-entropy of the same scale

    python results/cifar100_selfguide/make.py CIFAR100.npz

Five epochs of resnet32, three seeds. Run again to go on after an interrupt."""
import sys
from functools import partial
from pathlib import Path

from fastkdtf.all import *
from fastkdtf.lab.measure import keep_freed_memory

out = Path(__file__).parent
keep_freed_memory()
dls = kd_dataloaders(sys.argv[1], bs=32, valid_pct=.02, train_subset=1500, augment=Augment(flip=True, pad=4))
methods = {'SD': StochasticDepth, **{f'λ={o:g}': partial(SelfGuidance, lam=o) for o in (0., .1, .25, .5, 1.)},
           'without backward': partial(SelfGuidance, full_backward=False), 'CE ×2.75': partial(ScaledCE, 2.75)}
compare(methods, dls, partial(create_model, 'resnet32', dls.c), 5, 3, lr=1e-2, out=out, controls=False, settings=dict(data='cifar100', arch='resnet32'))
