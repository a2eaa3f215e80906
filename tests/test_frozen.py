import copy
import gc
import weakref

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import nn

from fastkdtf.teachers.frozen import FrozenCopy, copy_model
from fastkdtf.vision.models import create_model
from networks import lively, norms

@pytest.fixture(autouse=True)
def seed(): torch.manual_seed(0)

def relative(a, b): return ((a.double()-b.double()).abs().max()/b.double().abs().max()).item()

def small(**kwargs):
    "Two folded convolutions, a norm that stays"
    return lively(nn.Sequential(nn.Conv2d(3,8,3,bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.BatchNorm2d(8), nn.Conv2d(8,4,3), nn.BatchNorm2d(4),
                                nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(.5), nn.Linear(4,5)))

x32 = torch.randn(4,3,32,32, generator=torch.Generator().manual_seed(1))

def by_hand(model, x):
    "`small` in evaluation mode in float64, without its modules"
    d = {k: v.double() for k,v in model.state_dict().items()}
    def norm(x, i):
        mean,var,w,b = (d[f'{i}.{o}'].view(1,-1,1,1) for o in ('running_mean', 'running_var', 'weight', 'bias'))
        return (x-mean)/(var+1e-5).sqrt()*w+b
    x = norm(norm(F.conv2d(x.double(), d['0.weight']), 1).relu(), 3)
    return norm(F.conv2d(x, d['4.weight'], d['4.bias']), 5).mean((2,3)) @ d['9.weight'].T + d['9.bias']

# outputs

nets = [(o, 32, n) for o,n in [('resnet20',21), ('resnet50',None), ('plain_cnn',4), ('timm/resnet18',20), ('mobilenetv2_100',52), ('efficientnet_b0',49),
                               ('convnext_atto',0), ('regnety_002',44)]]

@pytest.mark.parametrize('name,size,n_folded', nets)
def test_outputs(name, size, n_folded):
    model = lively(create_model(name, 10)).eval()
    frozen = FrozenCopy(model)
    assert frozen.folded is None
    z = frozen(x32)
    with torch.no_grad(): want = copy.deepcopy(model).double()(x32.double())
    assert relative(z, want) < 1e-4 and frozen.folded == (n_folded != 0)
    left = sum(isinstance(m, norms) for m in frozen.model.modules())
    if n_folded: assert left == 0 and len(frozen._pairs) == n_folded

@pytest.mark.parametrize('build', [lambda: torchvision.models.resnet18(num_classes=10), lambda: torchvision.models.shufflenet_v2_x0_5(num_classes=10),
                                   lambda: torchvision.models.mobilenet_v3_small(num_classes=10), lambda: create_model('vit_tiny_patch16_224', 10, img_size=32, patch_size=8)])
def test_other_networks(build):
    model = lively(build()).eval()
    with torch.no_grad(): assert relative(FrozenCopy(model)(x32), model(x32)) < 1e-4

def test_by_hand():
    model = small().train()
    frozen = FrozenCopy(model)
    assert relative(frozen(x32), by_hand(model, x32)) < 2e-6
    assert frozen.folded and sum(isinstance(m, norms) for m in frozen.model.modules()) == 1   # the one behind the ReLU

@pytest.mark.parametrize('layer,norm,shape', [(nn.Conv1d(3,4,3), nn.BatchNorm1d(4), (2,3,8)), (nn.Conv3d(3,4,3), nn.BatchNorm3d(4), (2,3,5,5,5)),
                                              (nn.Linear(3,4,bias=False), nn.BatchNorm1d(4), (6,3)), (nn.Conv2d(3,4,3,groups=1,padding=1,padding_mode='reflect'), nn.BatchNorm2d(4, affine=False), (2,3,8,8))])
def test_layers(layer, norm, shape):
    model = lively(nn.Sequential(layer, norm)).double().eval()
    x = torch.randn(shape, dtype=torch.float64)
    frozen = FrozenCopy(model)
    torch.testing.assert_close(frozen(x), model(x).detach(), rtol=1e-12, atol=1e-12)
    assert frozen.folded and frozen.model.state_dict().keys() == {'0.weight', '0.bias'}

def test_smaller_batches_and_other_sizes():
    model = lively(create_model('resnet20', 10)).eval()
    frozen = FrozenCopy(model)
    for x in (x32, x32[:1], torch.randn(3,3,24,40)):
        with torch.no_grad(): assert relative(frozen(x), model(x)) < 1e-5

def test_not_folded_where_it_would_be_wrong():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.shared,self.a,self.b = nn.Conv2d(3,3,1),nn.BatchNorm2d(3),nn.BatchNorm2d(3)
            self.used,self.c = nn.Conv2d(3,3,1),nn.BatchNorm2d(3)
            self.tied,self.d = nn.Conv2d(3,3,1),nn.BatchNorm2d(3)
            self.other = nn.Conv2d(3,3,1)
            self.other.weight = self.tied.weight
            self.free,self.e = nn.Conv2d(3,3,1),nn.BatchNorm2d(3, track_running_stats=False)
        def forward(self, x):
            x = self.b(self.shared(self.a(self.shared(x))))
            y = self.used(x)
            x = self.other(self.d(self.tied(y+self.c(y))))
            return self.e(self.free(x))
    model = lively(Net()).eval()
    frozen = FrozenCopy(model)
    torch.testing.assert_close(frozen(x32), model(x32).detach())
    assert frozen.folded is False

# the original

def snapshot(model):
    return ({k: v.clone() for k,v in model.state_dict().items()}, [m.training for m in model.modules()], [p.requires_grad for p in model.parameters()],
            [(p.grad is None, p.stride(), id(p)) for p in model.parameters()], [list(m._forward_hooks) for m in model.modules()])

@pytest.mark.parametrize('untrained', [False, True])
def test_original_is_left_alone(untrained):
    model = small()
    model[1].eval()
    model[0].weight.requires_grad_(False)
    model[2].register_forward_hook(lambda *a: None)
    before = snapshot(model)
    frozen = FrozenCopy(model, untrained=untrained)
    frozen(x32); frozen(x32.double()); frozen.refill(model); frozen(x32)
    after = snapshot(model)
    assert before[1:] == after[1:] and all(torch.equal(v, after[0][k]) for k,v in before[0].items())
    assert not {p.data_ptr() for p in model.parameters()} & {p.data_ptr() for p in frozen.model.parameters()}

def test_training_the_original_changes_nothing():
    model = small()
    frozen = FrozenCopy(model)
    z = frozen(x32)
    opt = torch.optim.SGD(model.parameters(), .1)
    model(x32).sum().backward()
    opt.step()
    assert torch.equal(frozen(x32), z)

@pytest.mark.filterwarnings('ignore:Full backward hook')
def test_hooks_do_not_fire():
    model,calls = small(),[]
    for m in (model, model[0], model[1]):
        m.register_forward_hook(lambda *a: calls.append('forward'))
        m.register_forward_pre_hook(lambda *a: calls.append('pre'))
        m.register_full_backward_hook(lambda *a: calls.append('backward'))
    owner = nn.Linear(2000,2000)
    model.register_forward_hook(lambda *a, o=owner: calls.append(o))
    for frozen in (FrozenCopy(model), FrozenCopy(model, fast=False)): frozen(x32)
    twin = copy_model(model)
    twin(x32).sum().backward()
    assert calls == [] and len(model._forward_hooks) == 2
    model(x32).sum().backward()
    assert len(calls) == 10

@pytest.mark.filterwarnings('ignore')
def test_hooks_that_compute_weights_come_along():
    model = nn.Sequential(nn.utils.weight_norm(nn.Conv2d(3,4,3)), nn.BatchNorm2d(4)).eval()
    frozen = FrozenCopy(model)
    torch.testing.assert_close(frozen(x32), model(x32).detach())
    with torch.no_grad(): model[0].weight_g.mul_(3)
    torch.testing.assert_close(frozen.refill(model)(x32), model(x32).detach())

# evaluation mode, autograd

def test_evaluation_mode_whatever_is_done():
    model = lively(create_model('plain_cnn', 5))   # with dropout
    for fast in (True, False):
        frozen = FrozenCopy(model, fast=fast)
        z = frozen(x32)
        frozen.model.train()
        state = {k: v.clone() for k,v in frozen.model.state_dict().items()}
        assert torch.equal(frozen(x32), z) and not any(m.training for m in frozen.model.modules())
        assert all(torch.equal(v, state[k]) for k,v in frozen.model.state_dict().items())
        assert not any(p.requires_grad for p in frozen.model.parameters())

def test_usable_by_autograd():
    model = small()
    frozen = FrozenCopy(model)
    for _ in range(2):
        z = frozen(x32.clone().requires_grad_())
        assert not z.requires_grad and not z.is_inference()
        F.kl_div(model(x32).log_softmax(1), z.softmax(1), reduction='batchmean').backward()
        (model[9].weight.sum()*z).sum().backward()   # saves z for backward
        z.add_(1)
    frozen.refill(model)
    with torch.inference_mode(): inside = FrozenCopy(model)
    assert torch.equal(inside(x32), frozen(x32)) and torch.equal(inside.refill(model)(x32), frozen(x32))

def test_output_is_not_the_input():
    x = x32.clone()
    z = FrozenCopy(nn.Identity())(x)
    assert torch.equal(z, x) and z.data_ptr() != x.data_ptr()

class Outputs(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3,4,3), nn.BatchNorm2d(4))
    def forward(self, x, y):
        h = self.body(x)
        return {'logits': h.mean((2,3)), 'more': (h, [y+1]), 'none': None}

def test_nested_outputs_and_integer_inputs():
    model = lively(Outputs()).eval()
    frozen = FrozenCopy(model)
    out,want = frozen(x32, torch.arange(4)),model(x32, torch.arange(4))
    assert frozen.folded and out.keys() == want.keys() and out['none'] is None and type(out['more']) is tuple
    torch.testing.assert_close(out['logits'], want['logits'].detach())
    assert torch.equal(out['more'][1][0], torch.arange(4)+1) and not out['more'][0].is_inference()

def test_text():
    model = nn.Sequential(nn.Embedding(7,4), nn.Flatten(), nn.Linear(12,4,bias=False), nn.BatchNorm1d(4))
    lively(model).eval()
    frozen,tokens = FrozenCopy(model),torch.randint(0, 7, (5,3))
    torch.testing.assert_close(frozen(tokens), model(tokens).detach())
    assert frozen.folded

def test_tensor_subclass():
    from fastai.torch_core import TensorImage
    assert type(FrozenCopy(small())(TensorImage(x32))) is torch.Tensor

def test_follows_dtype_and_autocast():
    model = small().eval()
    frozen = FrozenCopy(model)
    assert frozen(x32.double()).dtype == torch.float64
    assert relative(frozen.refill(model)(x32.double()), by_hand(model, x32)) < 1e-6
    assert relative(frozen(x32), by_hand(model, x32)) < 1e-5
    frozen = FrozenCopy(model)
    with torch.autocast('cpu', torch.bfloat16):
        z = frozen(x32)
        assert z.dtype == torch.bfloat16 and frozen.folded and frozen(x32.bfloat16()).dtype == torch.bfloat16
    assert next(frozen.model.parameters()).dtype == torch.float32 and relative(z, by_hand(model, x32)) < .1
    assert FrozenCopy(model)(x32.bfloat16()).dtype == torch.bfloat16

class Casting(nn.Module):
    "Brings its inputs to its own types: bfloat16 in the body, float32 in the head"
    def __init__(self):
        super().__init__()
        self.body,self.head = nn.Linear(6, 8).bfloat16(),nn.Linear(8, 3)
    def forward(self, meta, x): return self.head(self.body(x.bfloat16()).float()) + meta.float().mean(1, keepdim=True)

@pytest.mark.parametrize('fast', [True, False])
def test_a_network_that_casts_its_inputs_keeps_its_types(fast):
    model,meta,x = Casting(),torch.randn(4, 2),torch.randn(4, 6)
    frozen = FrozenCopy(model, fast)
    for a,b in ((torch.float64, torch.float32), (torch.float32, torch.float64), (torch.bfloat16, torch.bfloat16)):
        assert torch.equal(frozen(meta.to(a), x.to(b)), model(meta.to(a), x.to(b)))
        assert [p.dtype for p in frozen.model.parameters()] == [p.dtype for p in model.parameters()]
    assert torch.equal(frozen.refill(model)(meta.double(), x), model(meta.double(), x))

def test_wrapped_models():
    model = small().eval()
    want = FrozenCopy(model)(x32)
    class Compiled(nn.Module):   # what torch.compile returns, without compiling
        def __init__(self, model):
            super().__init__()
            self._orig_mod = model
    for wrapped in (nn.DataParallel(model), torch.compile(model, backend='eager'), nn.DataParallel(Compiled(model)), torch.fx.symbolic_trace(model)):
        frozen = FrozenCopy(wrapped)
        assert torch.equal(frozen(x32), want) and torch.equal(frozen.refill(wrapped)(x32), want)

# falling back

class Branching(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = small()
    def forward(self, x): return self.body(x) if x.sum() > 0 else self.body(-x)

class Counting(nn.Module):
    def __init__(self):
        super().__init__()
        self.body,self.n = small(),0
    def forward(self, x):
        self.n = self.n+1
        return self.body(x)*self.n

class Noisy(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = small()
    def forward(self, x): return self.body(x)+torch.rand(x.shape[0], 1)

@pytest.mark.parametrize('build', [Branching, Noisy])
def test_falls_back(build):
    model = build().eval()
    frozen = FrozenCopy(model)
    frozen(x32)
    assert frozen.folded is False and type(frozen.model) is build
    if build is Branching:
        for x in (x32, -x32): torch.testing.assert_close(frozen(x), model(x).detach())

def test_a_state_between_batches_is_kept():
    frozen = FrozenCopy(Counting().eval())
    frozen(x32)
    n,one = frozen.model.n,frozen(x32)
    assert frozen.folded is False and frozen.model.n == n+1
    torch.testing.assert_close(frozen(x32)/(n+2), one/(n+1))

def test_a_view_that_needs_contiguous_activations():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv,self.norm,self.fc = nn.Conv2d(3,4,3),nn.BatchNorm2d(4),nn.Linear(4*900,3)
        def forward(self, x): return self.fc(self.norm(self.conv(x)).view(x.size(0), -1))
    model = lively(Net()).eval()
    frozen = FrozenCopy(model)
    assert relative(frozen(x32), model(x32).detach()) < 1e-5 and frozen.folded

def test_what_disagrees_is_not_used(monkeypatch):
    import fastkdtf.teachers.frozen as frozen_module
    right = frozen_module._folded
    monkeypatch.setattr(frozen_module, '_folded', lambda *a: {k: v*1.001 for k,v in right(*a).items()})
    model = small().eval()
    frozen = FrozenCopy(model)
    torch.testing.assert_close(frozen(x32), model(x32).detach())
    assert frozen.folded is False

def test_nan_falls_back():
    model = small().eval()
    with torch.no_grad(): model[9].bias[0] = float('nan')
    frozen = FrozenCopy(model)
    assert frozen(x32).isnan().any() and frozen.folded is False

def test_errors_of_the_model_are_its_own():
    with pytest.raises(RuntimeError, match='channels'): FrozenCopy(small())(torch.randn(2,5,32,32))

# memory

def test_one_form_is_held():
    model = create_model('resnet20', 10)
    frozen = FrozenCopy(model)
    plain,bytes_plain = weakref.ref(frozen.model),frozen.n_bytes
    weights = [weakref.ref(p) for p in frozen.model.parameters()]
    assert bytes_plain == sum(t.nbytes for t in model.state_dict().values())
    frozen(x32)
    gc.collect()
    assert plain() is None and not any(o() is not None for o in weights) and frozen.n_bytes < bytes_plain
    frozen = FrozenCopy(Branching())
    before = frozen.n_bytes
    frozen(x32)
    assert frozen.n_bytes == before

def test_tied_weights():
    model = nn.Sequential(nn.Linear(4,4), nn.Linear(4,4))
    model[1].weight = model[0].weight
    assert (twin := copy_model(model))[1].weight is twin[0].weight and twin[0].weight is not model[0].weight
    frozen = FrozenCopy(model)
    frozen(torch.randn(2,4))
    assert frozen.model[1].weight is frozen.model[0].weight and frozen.n_bytes == (16+8)*4

# refill

def train(model, n=3):
    opt = torch.optim.SGD(model.train().parameters(), .002, momentum=.9)
    for i in range(n):
        opt.zero_grad()
        F.cross_entropy(model(torch.randn(8,3,32,32)), torch.randint(0, 5, (8,))).backward()
        opt.step()
    return lively(model) if len(list(model.modules())) > 150 else model   # a deep network's statistics are far off after three steps

@pytest.mark.parametrize('build', [small, lambda: create_model('resnet20', 5), lambda: create_model('mobilenetv2_100', 5), Branching])
def test_refill_is_a_fresh_copy(build):
    model = build()
    frozen = FrozenCopy(model)
    first = frozen(x32)
    graph = frozen.model
    for _ in range(2):
        train(model)
        z = frozen.refill(model)(x32)
        assert frozen.model is graph and not torch.equal(z, first)
        assert torch.equal(z, FrozenCopy(model)(x32))
        model.eval()
        with torch.no_grad(): assert relative(z, model(x32)) < 1e-4

def test_refill_before_the_first_call():
    a,b = small(),small()
    assert torch.equal(FrozenCopy(a).refill(b)(x32), FrozenCopy(b)(x32))

def test_refill_takes_buffers_that_no_file_holds():
    class Net(nn.Module):
        def __init__(self, v):
            super().__init__()
            self.register_buffer('factor', torch.tensor(v), persistent=False)
            self.conv,self.norm = nn.Conv2d(3,4,3),nn.BatchNorm2d(4)
        def forward(self, x): return self.norm(self.conv(x))*(self.factor*2)
    a,b = Net(1.),Net(5.)
    frozen = FrozenCopy(a)
    frozen(x32)
    assert frozen.folded and torch.equal(frozen.refill(b)(x32), FrozenCopy(b)(x32))

@pytest.mark.parametrize('called', [False, True])
def test_refill_refuses_other_architectures(called):
    frozen = FrozenCopy(create_model('resnet20', 5))
    if called: frozen(x32)
    with pytest.raises(ValueError, match='fc.weight'): frozen.refill(create_model('resnet20', 6))
    with pytest.raises(ValueError, match='missing'): frozen.refill(create_model('resnet32', 5))

# untrained weights

def test_untrained_normalises_with_the_batch():
    model = nn.Sequential(nn.Conv2d(3,4,3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4,5,3), nn.BatchNorm2d(5, momentum=None), nn.Dropout(.9)).double()
    x = torch.randn(6,3,9,9, dtype=torch.float64)
    frozen = FrozenCopy(model, untrained=True)
    def norm(x, m):
        mean,var = x.mean((0,2,3), keepdim=True),x.var((0,2,3), unbiased=False, keepdim=True)
        return (x-mean)/(var+m.eps).sqrt()*m.weight.view(1,-1,1,1)+m.bias.view(1,-1,1,1)
    want = norm(F.conv2d(norm(F.conv2d(x, model[0].weight, model[0].bias), model[1]).relu(), model[3].weight, model[3].bias), model[4]).detach()
    before = {k: v.clone() for k,v in frozen.model.named_buffers()}
    for _ in range(3): torch.testing.assert_close(frozen(x), want, rtol=1e-10, atol=1e-10)
    frozen.model.eval()
    torch.testing.assert_close(frozen(x), want, rtol=1e-10, atol=1e-10)
    assert frozen.folded is None and all(torch.equal(v, before[k]) for k,v in frozen.model.named_buffers()) and len(before) == 6

@pytest.mark.parametrize('name', ['resnet20', 'mobilenetv2_100'])
def test_untrained_then_refilled(name):
    model = create_model(name, 5)
    frozen = FrozenCopy(model, untrained=True)
    z = frozen(x32)
    twin = copy.deepcopy(model).eval()
    for m in twin.modules(): m.training = isinstance(m, norms)
    with torch.no_grad(): assert relative(z, twin(x32)) < 1e-4
    train(model)
    z = frozen.refill(model)(x32)
    assert not frozen.untrained and frozen.folded and torch.equal(z, FrozenCopy(model)(x32))
    plain = FrozenCopy(model, fast=False, untrained=True)
    plain(x32)
    assert torch.equal(plain.refill(model)(x32), FrozenCopy(model, fast=False)(x32))

# copies

def test_copy_with_a_history():
    from fastai.text.models.awdlstm import AWD_LSTM
    model = AWD_LSTM(20, 6, 8, 1)
    model(torch.randint(0, 20, (2,5)))
    with pytest.raises(Exception): copy.deepcopy(model)
    frozen = FrozenCopy(model)
    model.reset()
    model.eval()
    frozen.model.reset()
    tokens = torch.randint(0, 20, (2,5))
    torch.testing.assert_close(frozen(tokens), model(tokens).detach())
    first = model[0] if isinstance(model, nn.Sequential) else model.rnns[0]
    with torch.no_grad(): first.weight_hh_l0_raw.mul_(2)
    model.reset(); frozen.refill(model).model.reset()
    torch.testing.assert_close(frozen(tokens), model(tokens).detach())

def test_what_cannot_be_copied():
    import threading
    model = nn.Linear(2,2)
    model.lock = threading.Lock()
    with pytest.raises(TypeError, match='Linear.*cannot be copied.*__deepcopy__'): copy_model(model)
    with pytest.raises(TypeError, match='nn.Module'): FrozenCopy('resnet20')
