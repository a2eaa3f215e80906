"""Stochastic depth as a property of a model, against forwards written by hand and against the plain networks"""
import copy, io, math, pickle, warnings
from itertools import product

import pytest, timm, torch, torch.nn.functional as F, torchvision
from fastai.vision.models.xresnet import ResBlock as XResBlock, XResNet
from torch import nn

from fastkdtf.vision.cifar_nets import BasicBlock, Bottleneck, CifarResNet, InvertedResidual, PreActResNet, PreBasicBlock, PreBottleneck, SumBlock
from fastkdtf.teachers.frozen import FrozenCopy
from fastkdtf.vision.models import create_model
from fastkdtf.callback.survival import draw_bits, fixed_statistics, fold, register_block, residual_blocks, set_drawn, subnetwork, survival, survival_probs
from networks import lively, norms

@pytest.fixture(autouse=True)
def seed(): torch.manual_seed(0)

def close(a, b, tol=1e-9): torch.testing.assert_close(a, b, rtol=tol, atol=tol)


# ---------------------------------------------------------------- three blocks, by hand

def three_blocks(pre=False):
    net,block = (PreActResNet, PreBasicBlock) if pre else (CifarResNet, BasicBlock)
    return lively(net(block, 1, 5, widths=(4,6,8))).double() if pre else lively(net(block, 1, 5, widths=(4,6,8), stem=4)).double()

def normed(d, name, x, training):
    if training: mean,var = x.mean((0,2,3)),x.var((0,2,3), unbiased=False)
    else:        mean,var = d[f'{name}.running_mean'],d[f'{name}.running_var']
    c = lambda t: t.view(1,-1,1,1)
    return (x-c(mean))/(c(var)+1e-5).sqrt()*c(d[f'{name}.weight'])+c(d[f'{name}.bias'])

def by_hand(d, x, factors, pre=False, training=True):
    "Logits with branch `l` times `factors[l]`; a factor of 0 leaves the branch out. `d`: the state dict, or parameters with a graph"
    conv = lambda name, x, stride=1: F.conv2d(x, d[f'{name}.weight'], stride=stride, padding=d[f'{name}.weight'].shape[-1]//2)
    norm = lambda name, x: normed(d, name, x, training)
    x = conv('conv1', x) if pre else norm('bn1', conv('conv1', x)).relu()
    for i,f in enumerate(factors):
        s,stride = f'stages.{i}.' + ('1' if pre else '0'),2 if i else 1
        if pre: x = norm(f'stages.{i}.0.0', x).relu()   # a stage starts with its activation
        if f'{s}.shortcut.weight' in d: shortcut = conv(f'{s}.shortcut', x, stride)
        elif f'{s}.shortcut.0.weight' in d: shortcut = norm(f'{s}.shortcut.1', conv(f'{s}.shortcut.0', x, stride))
        else: shortcut = x
        if not f: branch = 0.
        elif pre: branch = conv(f'{s}.conv2', norm(f'{s}.act2.0', conv(f'{s}.conv1', x, stride)).relu())
        else: branch = norm(f'{s}.bn2', conv(f'{s}.conv2', norm(f'{s}.bn1', conv(f'{s}.conv1', x, stride)).relu()))
        x = f*branch+shortcut
        if not pre: x = x.relu()
    if pre: x = norm('act.0', x).relu()
    return x.mean((2,3)) @ d['fc.weight'].T + d['fc.bias']

probs = [1 - l/3*.6 for l in (1,2,3)]   # p_L = .4
images = torch.randn(6,3,8,8, generator=torch.Generator().manual_seed(3)).double()

@pytest.mark.parametrize('pre', [False, True])
@pytest.mark.parametrize('training', [False, True])
@pytest.mark.parametrize('bits', [None, *product((0,1), repeat=3)])
def test_equations_3_and_4(bits, training, pre):
    model = survival(three_blocks(pre), .4).train(training)
    other = copy.deepcopy(model)
    assert survival_probs(model) == pytest.approx(probs)
    if bits is None: z = model(images)
    else:
        with subnetwork(model, bits): z = model(images)
    d = {**dict(other.named_buffers()), **dict(other.named_parameters())}
    want = by_hand(d, images, probs if bits is None else bits, pre, training)
    close(z, want)
    for o in (z, want): o.square().sum().backward()
    for (name,p),q in zip(model.named_parameters(), other.parameters()):
        close(torch.zeros_like(p) if p.grad is None else p.grad, torch.zeros_like(q) if q.grad is None else q.grad)
        if bits is not None: assert (p.grad is None) == (q.grad is None), name   # a dropped branch has no graph

def test_evaluation_is_equation_4_whatever_was_drawn():
    model = survival(three_blocks(), .4)
    d = {**dict(model.named_buffers()), **dict(model.named_parameters())}
    set_drawn(model, [True, False, True])
    close(model.train()(images), by_hand(d, images, (1,0,1)))
    close(model.eval()(images), by_hand(d, images, probs, training=False))
    set_drawn(model, None)
    close(model.train()(images), by_hand(d, images, probs))

@pytest.mark.parametrize('name,n_params,n_additions', [('resnet32', .47, 15), ('resnet50', .76, 24), ('resnet110_bottleneck', 1.15, 36)])
def test_the_papers_networks(name, n_params, n_additions):
    model = create_model(name, 10)
    assert round(sum(p.numel() for p in model.parameters())/1e6, 2) == n_params
    p = survival_probs(survival(model))
    assert p == pytest.approx([1 - l/n_additions/2 for l in range(1, n_additions+1)])


# ---------------------------------------------------------------- every kind of block

def timm_model(name, **kwargs): return timm.create_model(name, num_classes=7, **kwargs)
def tv_model(name, **kwargs): return torchvision.models.get_model(name, num_classes=7, **kwargs)

one_each = dict(layers=(1,1,1,1), channels=(16,16,16,16))
nets = {   # name: how to make it, residual additions, blocks that cannot be folded
    'post-activation basic':     (lambda: create_model('resnet20', 7), 9, 0),
    'post-activation bottleneck':(lambda: create_model('resnet29', 7), 9, 0),
    'pre-activation basic':      (lambda: create_model('preresnet20', 7), 9, 0),
    'pre-activation bottleneck': (lambda: create_model('preresnet29', 7), 9, 0),
    'wide':                      (lambda: create_model('wrn_10_1', 7), 3, 0),
    'grouped':                   (lambda: CifarResNet(Bottleneck, 1, 7, widths=(4,8), groups=2), 2, 0),
    'inverted':                  (lambda: create_model('mobilenetv2', 7), 10, 0),
    'timm basic':                (lambda: timm_model('resnet18', **one_each), 4, 0),
    'timm bottleneck':           (lambda: timm_model('resnet50', **one_each), 4, 0),
    'timm resnext':              (lambda: timm_model('resnext50_32x4d', layers=(1,1)+(1,1), channels=(32,)*4), 4, 0),
    'timm SE basic':             (lambda: timm_model('seresnet18', **one_each), 4, 0),
    'timm SE bottleneck':        (lambda: timm_model('seresnet50', **one_each), 4, 0),
    'timm ECA':                  (lambda: timm_model('ecaresnet26t', layers=(1,1,1,1)), 4, 4),
    'timm SK basic':             (lambda: timm_model('skresnet18', **one_each), 4, 0),
    'timm SK bottleneck':        (lambda: timm_model('skresnet50', **one_each), 4, 0),
    'timm v2 basic':             (lambda: timm_model('resnetv2_18', **one_each), 4, 0),
    'timm v2 bottleneck':        (lambda: timm_model('resnetv2_50', layers=(1,2), channels=(32,32)), 3, 0),
    'timm v2 post':              (lambda: timm_model('resnetv2_50', layers=(1,2), channels=(32,32), preact=False), 3, 0),
    'timm weight-standardised':  (lambda: timm.models.resnetv2.ResNetV2((1,1), (128,128), num_classes=7), 2, 2),
    'timm regnetx':              (lambda: timm_model('regnetx_002'), 13, 0),
    'timm regnety (SE)':         (lambda: timm_model('regnety_002'), 13, 0),
    'timm regnetv (pre)':        (lambda: timm.models.regnet.RegNet(timm.models.regnet.RegNetCfg(depth=6, w0=16, wa=16, wm=2., group_size=8, preact=True), num_classes=7), None, 0),
    'timm convnext':             (lambda: timm_model('convnext_atto', depths=(1,1,1,1), dims=(8,8,16,16)), 4, 0),
    'timm convnext conv mlp':    (lambda: timm_model('convnext_atto', depths=(1,1,1,1), dims=(8,8,16,16), conv_mlp=True), 4, 0),
    'timm convnext v2':          (lambda: timm_model('convnextv2_atto', depths=(1,1,1,1), dims=(8,8,16,16)), 4, 0),
    'timm efficientnet':         (lambda: timm_model('efficientnet_b0'), 9, 0),
    'timm mobilenetv3':          (lambda: timm_model('mobilenetv3_small_100'), 6, 0),
    'timm mobilenetv4':          (lambda: timm_model('mobilenetv4_conv_small'), None, 0),
    'timm vit':                  (lambda: timm_model('vit_tiny_patch16_224', img_size=64, depth=2), 4, 0),
    'timm vit layer scale':      (lambda: timm_model('vit_tiny_patch16_224', img_size=64, depth=2, init_values=1e-2), 4, 0),
    'torchvision basic':         (lambda: tv_model('resnet18'), 8, 0),
    'torchvision bottleneck':    (lambda: torchvision.models.ResNet(torchvision.models.resnet.Bottleneck, (1,1,1,1), num_classes=7), 4, 0),
    'torchvision regnet':        (lambda: tv_model('regnet_y_400mf'), 16, 0),
    'torchvision mobilenetv2':   (lambda: tv_model('mobilenet_v2'), 10, 0),
    'torchvision mobilenetv3':   (lambda: tv_model('mobilenet_v3_small'), 6, 0),
    'torchvision mnasnet':       (lambda: tv_model('mnasnet0_5'), 10, 0),
    'torchvision efficientnet':  (lambda: tv_model('efficientnet_b0', stochastic_depth_prob=0.), 9, 0),
    'torchvision convnext':      (lambda: torchvision.models.ConvNeXt([torchvision.models.convnext.CNBlockConfig(8, 16, 1), torchvision.models.convnext.CNBlockConfig(16, None, 2)],
                                                                      stochastic_depth_prob=0., num_classes=7), 3, 0),
    'fastai xresnet':            (lambda: XResNet(XResBlock, 1, [1,1,1,1], n_out=7), 4, 0),
    'fastai xresnet SE':         (lambda: XResNet(XResBlock, 4, [1,1,1,1], n_out=7, reduction=4), 4, 0),
    'fastai xresnet attention':  (lambda: XResNet(XResBlock, 1, [1,1,1,1], n_out=7, sa=True), 4, 1),
}
every_net = pytest.mark.parametrize('net', nets)
x64 = torch.randn(2,3,64,64, generator=torch.Generator().manual_seed(1))
cache = {}

def make(net):
    "In float64 and evaluation mode"
    if net not in cache:
        torch.manual_seed(0)
        cache[net] = lively(nets[net][0]()).double().eval()
    return copy.deepcopy(cache[net])

@every_net
def test_all_bits_are_the_plain_network_and_names_stay(net):
    plain = make(net)
    model = survival(copy.deepcopy(plain))
    n = len(survival_probs(model))
    assert nets[net][1] in (None, n)
    with torch.no_grad(), subnetwork(model, [1]*n): assert torch.equal(model(x64.double()), plain(x64.double()))
    assert model.state_dict().keys() == plain.state_dict().keys()
    assert [(k, type(m).__name__, type(m).__module__) for k,m in model.named_modules()] == [(k, type(m).__name__, type(m).__module__) for k,m in plain.named_modules()]
    assert [k for k,_ in model.named_parameters()] == [k for k,_ in plain.named_parameters()]
    assert str(model) == str(plain)

outer = {'BasicBlock': 'act2 relu', 'Bottleneck': 'act3 relu', 'SelectiveKernelBasic': 'act', 'SelectiveKernelBottleneck': 'act', 'ResBottleneckBlock': 'activation', 'ResBlock': 'act'}

@every_net
def test_each_block_alone(net):
    "Without the outer activation a block is `shortcut + p·branch`; dropped, its branch's modules are not called"
    model = survival(make(net), .3)
    inputs = {}
    hooks = [m.register_forward_pre_hook(lambda m, args: inputs.__setitem__(m, args[0].clone())) for m in residual_blocks(model)]
    with torch.no_grad(): model(x64.double())
    for o in hooks: o.remove()
    for m in residual_blocks(model):
        if 'cifar_nets' in type(m).__module__:
            if not isinstance(m, SumBlock): continue   # relu is a function there; see the equations above
        for o in outer.get(type(m).__name__, '').split():
            if isinstance(getattr(m, o, None), nn.Module): setattr(m, o, nn.Identity())
        if type(m).__module__.startswith('torchvision.models.resnet') : m.relu = nn.Identity()
        k,x = len(m._survival),inputs[m]
        called = []
        hooks = [o.register_forward_hook(lambda o, a, b, n=n: called.append(n)) for n,o in m.named_modules() if n]
        with torch.no_grad(), subnetwork(m, [0]*k): dropped = m(x)
        branch = {n for names in m._branches for n in names}
        assert not [o for o in called if o.split('.')[0] in branch]
        for o in hooks: o.remove()
        with torch.no_grad():
            if k == 1:
                with subnetwork(m, [1]): kept = m(x)
                close(m(x), dropped + m._survival[0]*(kept-dropped))
            else:   # two additions: the second one alone
                p,q = m._survival
                with subnetwork(m, [1,0]): first = m(x)
                close(dropped, x)
                m._survival = (p, 1.)
                a = m(x)
                with subnetwork(m, [0,1]): second = m(x)
                m._survival = (1., q)
                with subnetwork(m, [1,1]): both = m(x)
                close(m(x), first + q*(both-first))
                mid = x + p*(first-x)   # what the first addition leaves
                with subnetwork(m, [0,1]): close(a, m(mid))
        if k == 1 and dropped.shape == x.shape and dropped.data_ptr() == x.data_ptr(): pytest.fail('the shortcut itself, not a copy')

@every_net
def test_fold(net):
    plain,model = make(net),survival(make(net), .4)
    n_kept = nets[net][2]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter('always')
        folded = fold(model)
    said = [str(o.message) for o in caught if 'multiply their branch explicitly' in str(o.message)]
    assert len(said) == bool(n_kept) and (not n_kept or said[0].count(',') == n_kept-1)
    assert sum(o != 1 for o in survival_probs(folded)) == n_kept
    with torch.no_grad(): z,want = folded(x64.double()),model(x64.double())
    close(z, want)
    assert (want-plain(x64.double())).abs().max() > 1e-6   # the probabilities do something
    if n_kept: return
    assert [(k, type(m)) for k,m in folded.named_modules()] == [(k, type(m)) for k,m in plain.named_modules()]
    assert vars(folded).keys() == vars(plain).keys() and all(vars(a).keys() == vars(b).keys() for a,b in zip(folded.modules(), plain.modules()))
    plain.load_state_dict(folded.state_dict())
    with torch.no_grad(): assert torch.equal(plain(x64.double()), z)

def test_fold_leaves_the_model_alone_and_is_exact_in_float32():
    model = survival(lively(create_model('resnet32', 10))).eval()
    before = {k: v.clone() for k,v in model.state_dict().items()}
    x = torch.randn(4,3,32,32)
    with torch.no_grad(): torch.testing.assert_close(fold(model)(x), model(x), rtol=1e-5, atol=1e-5)
    assert all(torch.equal(v, before[k]) for k,v in model.state_dict().items()) and survival_probs(model)[-1] == .5

def test_fold_in_training_mode():
    model = survival(three_blocks(True), .4).train()
    close(fold(model)(images), model(images))

class Own(nn.Module):
    def __init__(self, last, **kwargs):
        super().__init__()
        self.first,self.last = nn.Conv2d(3,3,3,padding=1),last
    def forward(self, x): return x + self.last(self.first(x).relu())

register_block(Own, 'first last')

shared = nn.Conv2d(3,3,1)
cannot = {'norm without weights': nn.BatchNorm2d(3, affine=False), 'weight norm': nn.utils.parametrizations.weight_norm(nn.Conv2d(3,3,1)), 'old weight norm': None,
          'activation': nn.Sequential(nn.Conv2d(3,3,1), nn.ReLU()), 'shared': shared, 'a subclass': type('MyConv', (nn.Conv2d,), {})(3,3,1),
          'SE on an activation': nn.Sequential(nn.GELU(), timm.layers.SEModule(3, rd_channels=2))}

@pytest.mark.parametrize('what', cannot)
def test_what_cannot_be_folded(what):
    last = cannot[what]
    if what == 'old weight norm':
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')
            last = nn.utils.weight_norm(nn.Conv2d(3,3,1))
    model = survival(nn.Sequential(Own(last), *([shared] if what == 'shared' else []))).eval()
    with pytest.warns(UserWarning, match='0 multiply'): folded = fold(model)
    with torch.no_grad(): assert torch.equal(folded(x64), model(x64))
    assert survival_probs(folded) == [.5]

can = {'linear layer': nn.Sequential(nn.Conv2d(3,3,1), nn.Dropout(.5), nn.Identity()), 'nested': nn.Sequential(nn.ReLU(), nn.Sequential(nn.Conv2d(3,3,1,bias=False))),
       'group norm': nn.GroupNorm(3,3), 'two SE': nn.Sequential(nn.Conv2d(3,3,1), timm.layers.SEModule(3, rd_channels=2), timm.layers.SEModule(3, rd_channels=2)),
       'effective SE': nn.Sequential(nn.Conv2d(3,3,1), timm.layers.EffectiveSEModule(3)), 'maximum in SE': nn.Sequential(nn.Conv2d(3,3,1), timm.layers.SEModule(3, rd_channels=2, add_maxpool=True)),
       "torchvision's SE": nn.Sequential(nn.Conv2d(3,3,1), torchvision.ops.SqueezeExcitation(3, 2)), 'layer scale': nn.Sequential(nn.ReLU(), timm.layers.LayerScale2d(3, .3, inplace=True))}

@pytest.mark.parametrize('what', can)
def test_what_can_be_folded(what):
    model = survival(nn.Sequential(Own(copy.deepcopy(can[what])))).double().eval()
    folded = fold(model)
    with torch.no_grad(): close(folded(x64.double()), model(x64.double()))
    assert not survival_probs(folded) and type(folded[0]) is Own


# ---------------------------------------------------------------- statistics, randomness

def test_a_dropped_blocks_statistics_stay():
    model = survival(three_blocks()).train()
    before = {k: v.clone() for k,v in model.state_dict().items()}
    with subnetwork(model, '101'): model(images)
    for k,v in model.state_dict().items():
        moved = 'running' in k or 'num_batches' in k
        if k.startswith('stages.1.0.bn'): moved = False   # its shortcut's norm does move
        assert torch.equal(v, before[k]) != moved, k

@pytest.mark.parametrize('make_model', [three_blocks, lambda: timm_model('resnetv2_18', **one_each).double()])
def test_fixed_statistics(make_model):
    model = survival(make_model()).train()
    before,x = {k: v.clone() for k,v in model.state_dict().items()},images.repeat(1,1,4,4)
    with fixed_statistics(model): fixed = model(x)
    assert all(torch.equal(v, before[k]) for k,v in model.state_dict().items())
    close(model(x), fixed)
    assert not torch.equal(model.state_dict()[k := next(k for k in before if 'running_mean' in k)], before[k])
    with pytest.raises(RuntimeError), fixed_statistics(model): raise RuntimeError
    assert all(m.track_running_stats for m in model.modules() if isinstance(m, norms))

def test_frequencies_of_the_draws():
    "χ² with one degree of freedom a block: the sum over 15 blocks exceeds 37.7 once in 1000 seeds; pairs are uncorrelated"
    model,n = survival(create_model('resnet32', 10)),4000
    generator,state = torch.Generator().manual_seed(7),torch.get_rng_state()
    draws = torch.tensor([draw_bits(model, generator) for _ in range(n)]).double()
    assert torch.equal(torch.get_rng_state(), state)
    p = torch.tensor([1 - l/30 for l in range(1,16)]).double()
    assert ((draws.sum(0)-n*p)**2/(n*p*(1-p))).sum() < 37.7
    r = torch.corrcoef(draws.T) - torch.eye(15)
    assert r.abs().max() < 4.5/math.sqrt(n)

def test_p_last_of_one_drops_nothing():
    plain = three_blocks()
    model = survival(copy.deepcopy(plain), 1)
    assert draw_bits(model) == [True]*3 and torch.equal(model(images), plain(images))


# ---------------------------------------------------------------- copies, errors

def test_copies_and_pickles():
    model = survival(lively(create_model('resnet20', 10)), .3).eval()
    x = torch.randn(2,3,32,32)
    want = model(x)
    set_drawn(model, [False]*9)
    with subnetwork(model, '0'*9): copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
    f = io.BytesIO()
    torch.save(model, f)
    f.seek(0)
    for o in (*copies, torch.load(f, weights_only=False)):
        assert survival_probs(o) == survival_probs(model) and torch.equal(o(x), want)
        set_drawn(model, None)
        assert torch.equal(o.train()(x), model.train()(x))   # what was drawn stayed behind
        model.eval()
    frozen = FrozenCopy(model)
    torch.testing.assert_close(frozen(x), model(x), rtol=1e-4, atol=1e-5)
    assert frozen.folded

def test_checkpoints_hold_unfolded_weights():
    plain = three_blocks()
    model = survival(copy.deepcopy(plain))
    assert all(torch.equal(v, plain.state_dict()[k]) for k,v in model.state_dict().items())
    survival(model, .5)   # again: replaced, not applied twice
    assert survival_probs(survival(model, .1))[-1] == pytest.approx(.1) and len(type(model.stages[0][0]).__mro__) == len(type(plain.stages[0][0]).__mro__)+2

def test_compiled_evaluation_and_refusal():
    model = survival(three_blocks().float()).eval()
    x = images.float()
    compiled = torch.compile(model, backend='eager')
    torch.testing.assert_close(compiled(x), model(x))
    with subnetwork(model, '101'): torch.testing.assert_close(compiled(x), model(x))
    with pytest.raises(ValueError, match='compile fold'): survival(compiled)
    with pytest.raises(ValueError, match='compile fold'): survival(nn.Sequential(compiled))
    model.compile(backend='eager')
    with pytest.raises(ValueError, match='compile fold'): survival(model)

class WithForward(BasicBlock):
    def forward(self, x): return F.relu(self.branch(x) - self.shortcut(x))
class WithoutForward(BasicBlock): pass

def test_subclasses():
    assert len(survival_probs(survival(nn.Sequential(WithoutForward(4,4), WithForward(4,4))))) == 1
    with pytest.raises(ValueError, match='no residual blocks'): survival(WithForward(4,4))
    assert survival_probs(survival(WithoutForward(4,4))) == [.5]   # a block is a model too

def test_errors():
    model = survival(three_blocks())
    for p in (0, -1, 1.5, '1', True):
        with pytest.raises((ValueError, TypeError), match='p_last'): survival(model, p)
    with pytest.raises(TypeError, match='learn.model'): survival('resnet18')
    with pytest.raises(ValueError, match=r"no residual blocks.*timm's BasicBlock.*register_block"): survival(create_model('plain_cnn', 10))
    with pytest.raises(ValueError, match='drop_path_rate=0'): survival(timm_model('resnet18', drop_path_rate=.1))
    with pytest.raises(ValueError, match='stochastic_depth_prob=0'): survival(tv_model('convnext_tiny'))
    checkpointed = timm_model('resnet18')
    checkpointed.set_grad_checkpointing()
    with pytest.raises(ValueError, match='set_grad_checkpointing'): survival(checkpointed)
    for bits in ('11', '1111', '121', [1,1]):
        with pytest.raises(ValueError, match='3 zeros and ones'), subnetwork(model, bits): pass
    with pytest.raises(ValueError, match='call survival'), subnetwork(three_blocks(), '111'): pass
    with pytest.raises(ValueError, match='nothing to fold'): fold(three_blocks())
    with pytest.raises(TypeError, match='cls'): register_block('Block', 'conv')
    with pytest.raises(ValueError, match='branches'): register_block(nn.Linear)

def test_an_error_inside_leaves_nothing_behind():
    model = survival(three_blocks())
    want = model.eval()(images)
    with pytest.raises(RuntimeError), subnetwork(model, '010'): model(images[:, :2])
    assert not any('bn2' in vars(m) for m in model.modules())
    assert torch.equal(model(images), want)
