"""Memory replay with memories of different size and interval, label smoothing and LsrKD beside their controls on 400 digits

    python results/digits_memory/make.py

Eight epochs of resnet8, three seeds. Run again to go on after an interrupt."""
from functools import partial
from pathlib import Path

from fastai.vision.all import *
from fastkdtf.all import *

set_seed(0)
dls = kd_dataloaders('digits', bs=32, train_subset=400)
memory = partial(MemoryReplay, alpha=.1)
methods = {'LSR': LsrKD(tau=1.), 'LsrKD': LsrKD, 'MrKD-1': partial(memory, 1, 1), 'MrKD-3': partial(memory, 3, 1),
           'MrKD-3-TC': partial(memory, 3, 1, gamma=.25)}
methods |= {f'MrKD-3 κ={k:g}': partial(memory, 3, k) for k in (.25, 3, 16)}
compare(methods, dls, partial(create_model, 'resnet8', dls.c), n_epoch=8, seeds=3, lr=1e-2, out=Path(__file__).parent,
        settings=dict(data='digits', arch='resnet8'))
