"Networks and half precision as tests want them"
import torch
from fastai.callback.fp16 import MixedPrecision
from torch import nn

norms = nn.modules.batchnorm._BatchNorm

def lively(model):
    "Weights as after a training: no norm is trivial, no branch starts at zero"
    with torch.no_grad():
        for m in model.modules():
            if not isinstance(m, norms): continue
            if m.running_mean is not None:
                m.running_mean.normal_(0, .2)
                m.running_var.uniform_(.5, 1.5)
            if m.affine:
                m.weight.uniform_(.5, 1.5)
                m.bias.normal_(0, .2)
        for n,p in model.named_parameters():
            if 'gamma' in n or 'layer_scale' in n: p.uniform_(.5, 1.)
    return model

class Centred(nn.Module):
    "Centres its inputs, as networks do that bring their own normalisation; some do it in place, as `x.sub_(mean)` or an in-place ReLU at the front"
    def __init__(self, net, in_place):
        super().__init__()
        self.net,self.in_place = net,in_place
    def forward(self, x): return self.net(x.sub_(.5).mul_(3.) if self.in_place else (x-.5)*3.)

class CPUAutocast(MixedPrecision):
    "fastai's own does nothing without a GPU; this one is real on CPU"
    def before_fit(self):
        self.autocast,self.learn.scaler,self.scales = torch.autocast('cpu', dtype=torch.bfloat16),torch.amp.GradScaler('cpu', enabled=False),[]
    def before_step(self): pass
    def after_step(self): pass
