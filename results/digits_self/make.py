"""Methods by which a network teaches itself, on 400 digits, each beside its controls

    python results/digits_self/make.py

Twelve epochs of two layers with dropout, five seeds. DLB's epoch has twice as many steps, so it and its controls train for six, in `dlb`.
Run again to go on after an interrupt."""
from functools import partial
from pathlib import Path

from fastai.vision.all import *
from fastkdtf.all import *

out = Path(__file__).parent
set_seed(0)
dls = kd_dataloaders('digits', bs=32, train_subset=400)

def network(): return nn.Sequential(nn.Flatten(), nn.Linear(192, 64), nn.BatchNorm1d(64), nn.ReLU(), nn.Dropout(.3), nn.Linear(64, dls.c))

family = {'LSR': partial(LsrKD, tau=1.), 'PSKD': PSKD, 'OLS': OnlineLabelSmoothing, 'MaxSup': MaxSup, 'CSKD': CSKD,
          'MeanTeacher': partial(MeanTeacher, .95, rampup=2), 'RDrop': RDrop}
settings = dict(lr=1e-2, settings=dict(data='digits', arch='two layers'))
compare(family, dls, network, 12, 5, out=out/'methods', **settings)
compare({'DLB': DLB}, dls, network, 6, 5, out=out/'dlb', **settings)
