"""Self-guidance at several weights λ, stochastic depth and the scaled cross-entropy on 400 digits

    python results/digits_selfguidance/make.py

Six epochs of resnet32, three seeds. Run again to go on after an interrupt."""
from functools import partial
from pathlib import Path

from fastai.vision.all import *
from fastkdtf.all import *

set_seed(0)
dls = kd_dataloaders('digits', bs=32, train_subset=400)
methods = {'SD': StochasticDepth, **{f'λ={lam:g}': partial(SelfGuidance, lam=lam) for lam in (0., .1, .25, .5, 1.)},
           'without backward': partial(SelfGuidance, full_backward=False), 'CE ×2.75': partial(ScaledCE, 2.75)}
compare(methods, dls, partial(create_model, 'resnet32', dls.c), n_epoch=6, seeds=3, lr=1e-2, controls=False, out=Path(__file__).parent,
        settings=dict(data='digits', arch='resnet32'))
