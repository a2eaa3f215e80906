"""The methods on 5,000 images of Fashion-MNIST, each beside its controls

    python results/fashion_mnist/make.py fashion_mnist.npz

Ten epochs of resnet8, five seeds; the network that teaches is a resnet20 on the same images. Run again to go on after an interrupt, also
in several processes at once."""
import sys
from functools import partial
from pathlib import Path

from fastai.vision.all import *
from fastkdtf.all import *
from fastkdtf.lab.measure import keep_freed_memory

out = Path(__file__).parent
keep_freed_memory()
dls = kd_dataloaders(sys.argv[1], train_subset=5000)

set_seed(7)
teacher = Learner(dls, create_model('resnet20', dls.c), metrics=accuracy, path=out, model_dir='trained')
if (out/'trained/teacher.pth').exists(): teacher.load('teacher')
else:
    with teacher.no_bar(): teacher.fit_one_cycle(15, 1e-2)
    teacher.save('teacher', with_opt=False)

methods = {'LSR': partial(LsrKD, tau=1.), 'LsrKD': LsrKD, 'Tf-KD_reg': TfKDReg, 'MrKD': partial(MemoryReplay, interval=1),
           'KD': lambda: KnowledgeDistillation(teacher)}
compare(methods, dls, partial(create_model, 'resnet8', dls.c), 10, 5, lr=1e-2, out=out, settings=dict(data='fashion_mnist', arch='resnet8'))
