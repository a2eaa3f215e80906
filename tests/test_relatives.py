"The later methods: their values and gradients, by hand in float64"
import math
from types import SimpleNamespace

import pytest, torch, torch.nn.functional as F
from torch import tensor

from fastkdtf.all import *
from fastkdtf.teachers.base import FunctionTeacher

Z  = tensor([[1., .5, -.5], [.2, -.3, .8]], dtype=torch.double)
ZT = tensor([[2., -.5, .5], [0., 1., .5]], dtype=torch.double)
Y  = tensor([0, 1])

class Network:
    "The least of a learner that a method needs to compute its loss: no data, no optimizer"

def first_batch(cb, z=Z, y=Y, epoch=0, n_epoch=1, idx=None, zt=ZT):
    "Value and gradient of the whole loss of a method, with `zt` as its teacher's logits"
    z = z.clone().requires_grad_()
    if zt is not None: cb.teacher = FunctionTeacher(lambda batch: zt)
    cb._find_teachers()
    cb.learn = SimpleNamespace(pct_train=epoch/n_epoch, epoch=epoch, n_epoch=n_epoch, pred=z, y=y, yb=(y,), loss_func=torch.nn.CrossEntropyLoss(), cbs=[], dl=None, xb=())
    cb._new_means()
    pct = cb.learn.pct_train
    hard,soft = cb.weights(pct)
    cb.batch = Batch(y, tau=cb.temperatures(pct), hard=hard, soft=soft, idx=idx)
    cb.ask(cb.batch, before_student=True)
    cb._label_matters = True
    hard,weight,soft = cb.contribution([(y, 1.)])
    loss = hard*F.cross_entropy(z, y) + weight*soft
    loss.backward()
    return [loss.item(), z.grad[0, 1].item(), z.grad[1, 1].item()]

def close(got, expected): assert got == pytest.approx(expected, abs=6e-7)

def test_pskd_mixes_the_label_with_the_last_prediction():
    cb = PSKD(.4)
    cb.taught = lambda batch: batch.y >= 0
    close(first_batch(cb), [1.139508, .153171, -.312846])

def test_dkd_weighs_the_label_and_the_others_apart():
    close(first_batch(DKD(ZT.mul, warmup=1)), [3.360278, 2.223754, -.583299])

def test_dkd_warms_up_by_whole_epochs():
    close(first_batch(DKD(ZT.mul), epoch=4, n_epoch=240), [1.716181, .680251, -.454487])
