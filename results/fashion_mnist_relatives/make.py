"""The later methods on 5,000 images of Fashion-MNIST, each beside its controls

    python results/fashion_mnist_relatives/make.py fashion_mnist.npz

Ten epochs of resnet8, five seeds; the network that teaches is a resnet20 on the same images. DLB's epoch has twice as many steps, so it
and its controls of equal batches train for half as many epochs in a campaign of their own, `dlb`; R-Drop needs dropout, so it trains the
plain CNN beside that network's baseline, in `rdrop`. Run again to go on after an interrupt, also in several processes at once."""
import os, sys
os.environ.setdefault('OMP_NUM_THREADS', '1')
from functools import partial
from pathlib import Path

from fastai.vision.all import *
from fastkdtf.all import *
from fastkdtf.lab.measure import keep_freed_memory

out = Path(__file__).parent
keep_freed_memory()
dls = kd_dataloaders(sys.argv[1], train_subset=5000)
settings = dict(data='fashion_mnist', arch='resnet8')

set_seed(7)
teacher = Learner(dls, create_model('resnet20', dls.c), metrics=accuracy, path=out, model_dir='trained').to_fast()
if (out/'trained/teacher.pth').exists(): teacher.load('teacher')
else:
    with teacher.no_bar(): teacher.fit_one_cycle(15, 1e-2)
    teacher.save('teacher', with_opt=False)

student = partial(create_model, 'resnet8', dls.c)
alone = {'LSR': partial(LsrKD, tau=1.), 'PSKD': PSKD, 'OLS': OnlineLabelSmoothing, 'CSKD': CSKD, 'MaxSup': MaxSup,
         'MeanTeacher': partial(MeanTeacher, .99, rampup=2)}
taught = {'KD': lambda: KnowledgeDistillation(teacher), 'DKD': lambda: DKD(teacher, warmup=2), 'NKD': lambda: NKD(teacher),
          'DIST': lambda: DIST(teacher, tau=4.), 'StandardisedKD': lambda: StandardisedKD(teacher)}
compare({**alone, **taught}, dls, student, 10, 5, lr=1e-2, out=out/'methods', settings=settings, precision='bf16')
compare({'DLB': DLB}, dls, student, 5, 5, lr=1e-2, out=out/'dlb', settings=settings, precision='bf16')
compare({'RDrop': RDrop}, dls, partial(create_model, 'plain_cnn', dls.c), 10, 5, lr=1e-2, out=out/'rdrop', settings={**settings, 'arch': 'plain_cnn'},
        precision='bf16')
