"""Is half precision as accurate? The same runs in float32 and in bfloat16

    python results/precision/make.py cifar100.npz

10,000 images of CIFAR-100, five epochs of resnet8, five seeds, on one CPU core; the network that teaches is a resnet20 on the same
images. Run again to go on after an interrupt."""
import os, sys
os.environ.setdefault('OMP_NUM_THREADS', '1')
from functools import partial
from pathlib import Path

from fastai.vision.all import SGD
from fastkdtf.all import *
from fastkdtf.lab.compare import learner_parts
from fastkdtf.lab.measure import keep_freed_memory
from fastkdtf.lab.arms import Arm

out = Path(__file__).parent
keep_freed_memory()
dls = kd_dataloaders(sys.argv[1], bs=128, train_subset=10_000, augment=Augment(flip=True, pad=4), device='cpu')
def learners(arch): return learner_parts(dls, partial(create_model, arch, 100), opt_func=partial(SGD, mom=.9, wd=5e-4))

methods = {'LsrKD': LsrKD, 'KD': Arm(KnowledgeDistillation, teacher='teacher'), 'MrKD-1': partial(MemoryReplay, 1, 5/8), 'SelfGuidance': SelfGuidance}
for precision in ('32', 'bf16'):
    print(compare(methods, learners('resnet8'), 5, 5, controls=False, out=out/precision, lr=.2, teacher=learners('resnet20'),
                  settings=dict(data='cifar100', arch='resnet8'), precision=precision))
