"Networks by name: published parameter counts, structure, a training step, stems for small images, errors."
import pickle
from copy import deepcopy

import fastai.callback.progress    # patches Learner.no_bar
import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision
from fastai.data.core import DataLoaders
from fastai.learner import Learner
from torch import nn

from fastkdtf.vision.cifar_nets import (BasicBlock, Bottleneck, CifarResNet, InvertedResidual, PreActResNet, PreBasicBlock, PreBottleneck,
                                 ResBlock, ShuffleUnit, SumBlock)
from fastkdtf.vision.models import create_model, model_names, small_stem


def n_params(name, n_classes, **kwargs):
    with torch.device('meta'): return sum(p.numel() for p in create_model(name, n_classes, **kwargs).parameters())

def blocks(model): return [o for o in model.modules() if isinstance(o, ResBlock)]

# parameter counts

@pytest.mark.parametrize('name,n_classes,printed', [
    ('resnet32', 10, '0.47'), ('resnet50', 10, '0.76'), ('resnet110_bottleneck', 10, '1.15'),                     # Zheng Tab. 1
    ('resnet20', 100, '0.3'), ('resnet32', 100, '0.5'), ('resnet44', 100, '0.7'), ('resnet56', 100, '0.9'),       # Wang Tab. 1
    ('resnet110', 100, '1.7'), ('preresnet110', 100, '1.7'), ('resnet164', 100, '1.7'), ('preresnet164', 100, '1.7'),
    ('wrn_40_4', 100, '9.0'), ('wrn_16_8', 100, '11.0'), ('wrn_28_10', 100, '36.5'), ('resnext29_8x64d', 100, '34.5'),
    ('resnext29_8x64d', 100, '34.52'),                                                                            # Yuan Tab. 12
    ('resnet18', 100, '11.22'), ('resnet50_4stage', 100, '23.71'), ('mobilenetv2', 100, '2.37'), ('shufflenetv2', 100, '1.36'), # its CIFAR forms
    ('googlenet', 100, '6.26'), ('densenet121', 100, '7.05'),
    ('timm/mobilenetv2_100', 1000, '3.50'), ('torchvision/shufflenet_v2_x1_0', 1000, '2.28'), ('timm/resnet18', 1000, '11.69'), # Yuan Tab. 12
    ('timm/resnet50', 1000, '25.56'), ('timm/densenet121', 1000, '7.98'), ('timm/resnext101_32x8d', 1000, '88.79'),
    ('timm/mobilenetv3_small_075', 1000, '2.04'), ('timm/resnet18d', 1000, '11.71'), ('timm/skresnet18', 1000, '11.96'),       # Song Tab. 2
    ('timm/resnet34', 1000, '21.80'), ('timm/resnet34d', 1000, '21.82'), ('timm/mobilenetv3_small_100', 1000, '2.54'), ('timm/skresnet34', 1000, '22.28'),
    ('timm/mobilenetv1_100', 1000, '4.2')])                                                                       # Howard et al. 2017, Tab. 8
def test_published_parameter_counts(name, n_classes, printed):
    assert f"{n_params(name, n_classes)/1e6:.{len(printed.split('.')[1])}f}"==printed

def test_googlenet_counts_with_its_auxiliary_heads():
    assert f"{n_params('torchvision/googlenet', 1000, aux_logits=True)/1e6:.1f}"=='13.0'    # Yuan Tab. 12

@pytest.mark.parametrize('name,ten,hundred', [
    ('resnet20', 272_474, 278_324), ('resnet32', 466_906, 472_756), ('resnet56', 855_770, 861_620), ('resnet110', 1_730_714, 1_736_564),
    ('resnet110_bottleneck', 1_147_738, 1_170_868), ('resnet164', 1_704_154, 1_727_284)])
def test_exact_parameter_counts(name, ten, hundred):
    assert (n_params(name, 10), n_params(name, 100))==(ten, hundred)

def test_plain_cnn_parameter_count():
    convs = sum(ni*nf*9 + nf + 2*nf for ni,nf in ((3,32), (32,64), (64,128)))
    assert n_params('plain_cnn', 10)==convs + 2048*128+128 + 2*128 + 128*10+10

@pytest.mark.parametrize('depth,k', [(10,1), (40,4), (16,8), (28,10)])
def test_wide_resnet_parameter_count(depth, k):
    total,ni = 3*16*9,16
    for width in (16*k, 32*k, 64*k):
        for j in range((depth-4)//6):
            total += 2*ni + ni*width*9 + 2*width + width*width*9
            if ni!=width: total += ni*width
            ni = width
    assert n_params(f'wrn_{depth}_{k}', 10)==total + 2*ni + ni*10+10

def test_mobilenet_parameter_count():
    total,ni = 3*32*9+32 + 2*32,32
    for t,c,n in ((1,16,1), (6,24,2), (6,32,3), (6,64,4), (6,96,3), (6,160,3), (6,320,1)):    # Sandler et al., Tab. 2
        for _ in range(n):
            h = t*ni
            if t>1: total += ni*h+h + 2*h
            total += h*9+h + 2*h + h*c+c + 2*c
            ni = c
    assert n_params('mobilenetv2', 100)==total + ni*1280+1280 + 2*1280 + 1280*100+100

def test_shufflenet_parameter_count():
    "The paper's network, for which torchvision's stands: only the stem's stride and pooling differ."
    assert n_params('shufflenetv2', 100)==n_params('torchvision/shufflenet_v2_x1_0', 100)

def test_four_stage_parameter_counts():
    for ours,timms in (('resnet18', 'resnet18'), ('resnet50_4stage', 'resnet50')):
        assert n_params(ours, 10)==n_params(f'timm/{timms}', 10) - 3*64*(49-9)
    assert n_params('resnet18_4stage', 10)==n_params('resnet18', 10)

def test_densenet_parameter_count():
    "timm's without the BatchNorm after the stem, and a 3×3 stem."
    assert n_params('densenet121', 10)==n_params('timm/densenet121', 10) - 2*64 - 3*64*(49-9)

# structure

@pytest.mark.parametrize('name,block,n', [
    ('resnet8', BasicBlock, 1), ('resnet20', BasicBlock, 3), ('resnet50', BasicBlock, 8), ('resnet56', BasicBlock, 9),
    ('resnet110', BasicBlock, 18), ('resnet164', Bottleneck, 18), ('resnet164_basic', BasicBlock, 27), ('resnet56_basic', BasicBlock, 9),
    ('resnet110_bottleneck', Bottleneck, 12), ('resnet20_bottleneck', Bottleneck, 2), ('resnet29', Bottleneck, 3), ('resnet47', Bottleneck, 5),
    ('preresnet8', PreBasicBlock, 1), ('preresnet110', PreBasicBlock, 18), ('preresnet164', PreBottleneck, 18), ('preresnet29', PreBottleneck, 3),
    ('preresnet110_bottleneck', PreBottleneck, 12)])
def test_depth_decides_the_form(name, block, n):
    with torch.device('meta'): model = create_model(name, 10)
    assert isinstance(model, PreActResNet if name.startswith('pre') else CifarResNet)
    assert [type(o) for o in blocks(model)]==[block]*(3*n)
    layers = sum(isinstance(m, (nn.Conv2d, nn.Linear)) for k,m in model.named_modules() if 'shortcut' not in k)
    assert f'resnet{layers}'==name.removeprefix('pre').split('_')[0]

@pytest.mark.parametrize('name,n,widest', [('wrn_10_1', 1, 64), ('wrn_16_8', 2, 512), ('wrn_40_4', 6, 256), ('wrn_28_10', 4, 640)])
def test_wide_resnets(name, n, widest):
    with torch.device('meta'): model = create_model(name, 10)
    assert [type(o) for o in blocks(model)]==[PreBasicBlock]*(3*n) and model.fc.in_features==widest
    convs = sum(isinstance(m, nn.Conv2d) for m in model.modules())
    assert name.split('_')[1]==str(convs + (widest==64))    # depth counts a projection in each stage; with width 1 the first has none

@pytest.mark.parametrize('name', model_names)
def test_logits_for_small_and_odd_sizes(name):
    with torch.device('meta'):
        model = create_model(name, 7).eval()
        for size in (8,45): assert model(torch.randn(2, 3, size, size)).shape==(2,7)

@pytest.mark.parametrize('block,nf', [(BasicBlock, 32), (Bottleneck, 128)])
@pytest.mark.parametrize('stride', [1, 2])
def test_block_is_relu_of_branch_plus_shortcut(block, nf, stride):
    b,x = block(16, 32, stride).eval(), torch.randn(2, 16, 8, 8)
    assert torch.equal(b(x), F.relu(b.branch(x) + b.shortcut(x)))
    assert b(x).shape==(2, nf, 8//stride, 8//stride)
    same = block(nf, 32).eval()
    assert isinstance(same.shortcut, nn.Identity)

@pytest.mark.parametrize('block,nf', [(PreBasicBlock, 32), (PreBottleneck, 128)])
@pytest.mark.parametrize('stride', [1, 2])
@pytest.mark.parametrize('activated', [False, True])
def test_pre_activation_block_is_a_plain_sum(block, nf, stride, activated):
    b,x = block(16, 32, stride, activated).eval(), torch.randn(2, 16, 8, 8)
    assert isinstance(b, SumBlock) and torch.equal(b(x), b.branch(x) + b.shortcut(x))
    assert b(x).shape==(2, nf, 8//stride, 8//stride) and b(x).min()<0
    first = x if activated else F.relu(b.act1[0](x))
    convs = [m for k,m in b.named_modules() if isinstance(m, nn.Conv2d) and 'shortcut' not in k]
    assert torch.equal(b.act1(x), first) and convs[0].in_channels==16 and isinstance(b.shortcut, nn.Conv2d)
    assert isinstance(block(nf, 32).shortcut, nn.Identity)

def test_pre_activation_network_by_hand():
    "conv, then per stage: activate, split; at the end BatchNorm and ReLU once (He et al. 2016b)."
    m,x = create_model('preresnet14', 5).eval(), torch.randn(2, 3, 16, 16)
    def act(s, x): return F.relu(F.batch_norm(x, s[0].running_mean, s[0].running_var, s[0].weight, s[0].bias))
    h = m.conv1(x)
    for a,first,second in m.stages:
        h = act(a, h)
        h = first.conv2(act(first.act2, first.conv1(h))) + first.shortcut(h)
        h = h + second.conv2(act(second.act2, second.conv1(act(second.act1, h))))
    assert torch.allclose(m(x), m.fc(act(m.act, h).mean((2,3))), atol=1e-5)

def test_residual_blocks_without_a_shortcut_are_none():
    "Everything that is a ResBlock can be skipped: what comes out has the shape of what its shortcut gives."
    model = create_model('mobilenetv2', 10)
    assert [type(o) for o in blocks(model)]==[InvertedResidual]*10    # 17 units, of which 7 change the shape
    for o in blocks(model): assert isinstance(o.shortcut, nn.Identity)

def test_inverted_residual_is_linear_at_its_end():
    b,x = InvertedResidual(8).eval(), torch.randn(2, 8, 4, 4)
    assert torch.equal(b(x), b.branch(x) + x) and (b.branch(x)<0).any()
    assert [(m.in_channels, m.out_channels, m.groups) for m in b.modules() if isinstance(m, nn.Conv2d)]==[(8,48,1), (48,48,48), (48,8,1)]

def test_shuffle_unit():
    "Half of the channels pass unchanged, to every other place"
    u,x = ShuffleUnit(8, 8).eval(), torch.randn(2, 8, 4, 4)
    assert torch.equal(u(x)[:, ::2], x[:, :4]) and torch.equal(u(x)[:, 1::2], u.branch(x[:, 4:]))
    assert ShuffleUnit(6, 16)(x[:, :6]).shape==(2,16,2,2)

@pytest.mark.parametrize('name,size', [
    ('resnet20', 8), ('preresnet20', 8), ('wrn_10_1', 8), ('resnet18', 4), ('resnet50_4stage', 4), ('resnext29_8x64d', 8), ('mobilenetv2', 4),
    ('shufflenetv2', 4), ('densenet121', 4), ('googlenet', 8)])
def test_size_before_the_pooling(name, size):
    with torch.device('meta'):
        model,seen = create_model(name, 10),[]
        model.pool.register_forward_pre_hook(lambda m, inp: seen.append(tuple(inp[0].shape[2:])))
        model(torch.randn(2, 3, 32, 32))
    assert seen==[(size,size)]

@pytest.mark.parametrize('name,theirs', [
    ('resnet18', 'timm/resnet18'), ('resnet50_4stage', 'torchvision/resnet50'), ('shufflenetv2', 'torchvision/shufflenet_v2_x1_0')])
def test_same_function_as_others_with_a_small_stem(name, theirs):
    torch.manual_seed(0)
    ours,other,x = create_model(name, 5),create_model(theirs, 5, small_images=True),torch.randn(4, 3, 16, 16)
    other.load_state_dict(dict(zip(other.state_dict(), ours.state_dict().values(), strict=True)))
    assert torch.allclose(ours(x), other(x), atol=1e-4)    # with the batch's statistics
    with torch.no_grad(): assert torch.allclose(ours.eval()(x), other.eval()(x), atol=1e-4)

def test_he_initialisation():
    torch.manual_seed(0)
    for model in create_model('resnet56', 10), create_model('preresnet20', 10), create_model('plain_cnn', 10):
        for m in model.modules():
            if not isinstance(m, nn.Conv2d): continue
            fan_out = m.out_channels*m.kernel_size[0]*m.kernel_size[1]
            assert m.weight.std().item()==pytest.approx((2/fan_out)**.5, rel=.15)
            assert m.bias is None or not m.bias.any()

def test_plain_cnn_layers():
    model = create_model('plain_cnn', 10).eval()
    assert [type(o).__name__ for o in model.features]==['Conv2d', 'BatchNorm2d', 'MaxPool2d', 'ReLU']*3
    assert [type(o).__name__ for o in model.head]==['Linear', 'BatchNorm1d', 'ReLU', 'Dropout', 'Linear']
    assert model.head[3].p==.5
    x = torch.randn(2, 3, 32, 32)
    assert torch.equal(model(x), model.head(model.features(x).flatten(1)))  # the pooling is an identity at 32×32

# training

@pytest.mark.parametrize('name', model_names)
def test_one_training_step(name):
    def make(seed): torch.manual_seed(seed); return create_model(name, 7)
    model,again = make(0),make(0)
    assert all(torch.equal(a, b) for a,b in zip(model.state_dict().values(), again.state_dict().values(), strict=True))
    del again
    torch.manual_seed(1)
    x,y = torch.randn(2, 3, 32, 32),torch.tensor([0,3])
    out = model(x)
    assert out.shape==(2,7)
    F.cross_entropy(out, y).backward()
    for k,p in model.named_parameters():
        assert p.grad is not None and p.grad.isfinite().all(), k
        if p.ndim>1: assert p.grad.any(), k
    before = model.fc.weight.clone() if hasattr(model, 'fc') else model.head[-1].weight.clone()
    torch.optim.SGD(model.parameters(), lr=.01).step()
    after = model.fc.weight if hasattr(model, 'fc') else model.head[-1].weight
    assert not torch.equal(before, after)

@pytest.mark.parametrize('name', ['resnet8', 'resnet11', 'preresnet8', 'wrn_10_1', 'mobilenetv2', 'shufflenetv2', 'plain_cnn'])
def test_copies(name):
    model,x = create_model(name, 10), torch.randn(4, 3, 8, 8)
    model(x).sum().backward()
    model.eval()
    for clone in deepcopy(model), pickle.loads(pickle.dumps(model)):
        assert torch.equal(clone(x), model(x))
        with torch.no_grad(): next(clone.parameters()).zero_()
        assert next(model.parameters()).any()

@pytest.mark.parametrize('name', ['resnet20', 'preresnet20', 'shufflenetv2', 'googlenet', 'plain_cnn'])
def test_seed_decides_weights(name):
    def weights(seed): torch.manual_seed(seed); return torch.cat([p.flatten() for p in create_model(name, 10).parameters()])
    assert torch.equal(weights(1), weights(1)) and not torch.equal(weights(1), weights(2))

@pytest.mark.parametrize('name', ['preresnet8', 'wrn_10_1', 'shufflenetv2', 'timm/resnet18', 'torchvision/shufflenet_v2_x0_5'])
def test_learner_trains_it(name):
    torch.manual_seed(0)
    ds = [(torch.randn(3, 16, 16), torch.tensor(i%3)) for i in range(8)]
    dls = DataLoaders.from_dsets(ds, ds, bs=4, num_workers=0, device='cpu')
    learn = Learner(dls, create_model(name, 3, small_images=True), loss_func=nn.CrossEntropyLoss())
    before = [p.detach().clone() for p in learn.model.parameters()]
    with learn.no_bar(), learn.no_logging(): learn.fit(1, 1e-2)
    assert np.isfinite(learn.recorder.values[-1]).all()
    assert not any(torch.equal(a, b) for a,b in zip(before, learn.model.parameters()) if b.ndim>1)

# other libraries

def test_timm():
    assert type(create_model('resnet34', 5)).__module__.startswith('timm')
    model = create_model('timm/resnet18', 5)
    assert type(model).__module__.startswith('timm') and model.fc.out_features==5
    assert create_model('resnet34', 5, in_chans=1).conv1.in_channels==1

def test_torchvision():
    model = create_model('torchvision/shufflenet_v2_x0_5', 5)
    assert isinstance(model, torchvision.models.ShuffleNetV2) and model.fc.out_features==5

@pytest.mark.parametrize('name', ['googlenet', 'inception_v3'])
def test_no_auxiliary_heads_unless_asked(name, recwarn):
    with torch.device('meta'):
        model = create_model(f'torchvision/{name}', 5)
        out = model(torch.randn(2, 3, 128, 128))
        assert isinstance(out, torch.Tensor) and out.shape==(2,5)
        full = create_model(f'torchvision/{name}', 5, aux_logits=True)
        assert isinstance(full(torch.randn(2, 3, 299, 299)), tuple)
    assert not [o for o in recwarn if 'init' in str(o.message)]

@pytest.mark.parametrize('name', [
    'timm/resnet18', 'timm/resnet18d', 'timm/resnet50', 'timm/resnet34', 'timm/resnet34d', 'timm/mobilenetv1_100', 'timm/mobilenetv2_100', 'timm/mobilenetv3_large_100', 'timm/mobilenetv3_small_075',
    'timm/skresnet18', 'timm/densenet121', 'timm/resnext101_32x8d', 'torchvision/shufflenet_v2_x1_0', 'torchvision/googlenet'])
def test_the_224_pixel_networks_build(name):
    with torch.device('meta'):
        for small,size in ((False,224), (True,32)):
            out = create_model(name, 9, small_images=small).eval()(torch.randn(2, 3, size, size))
            assert out.shape==(2,9)

SMALL = [('timm/resnet18', 4), ('timm/resnet18d', 4), ('timm/skresnet18', 4), ('timm/densenet121', 4), ('timm/regnetx_002', 2), ('timm/convnext_atto', 4),
         ('timm/efficientnet_b0', 2), ('timm/tf_efficientnet_b0', 2), ('timm/mobilenetv1_100', 2), ('timm/mobilenetv3_small_050', 2), ('timm/resnetaa50', 4),
         ('torchvision/resnet18', 4), ('torchvision/densenet121', 4), ('torchvision/regnet_x_400mf', 2), ('torchvision/convnext_tiny', 4),
         ('torchvision/efficientnet_b0', 2), ('torchvision/mobilenet_v2', 2), ('torchvision/mobilenet_v3_small', 2), ('torchvision/mnasnet0_5', 2),
         ('torchvision/shufflenet_v2_x0_5', 4), ('torchvision/googlenet', 4)]

def convs(model, size):
    "The stem's first convolution and what it and the last one before the head give for an image of `size`."
    found,shapes = [m for m in model.modules() if isinstance(m, nn.Conv2d)],[]
    for m in found: m.register_forward_hook(lambda m, i, o: shapes.append(o.shape[-1]) if o.shape[-1]>1 else None)
    model(torch.randn(2, 3, size, size))
    return found[0],shapes[0],shapes[-1]

@pytest.mark.parametrize('name,last', SMALL)
def test_small_stem(name, last):
    device = 'cpu' if 'regnet' in name else 'meta'    # torchvision's RegNet reads a weight while it is built, timm's did
    with torch.device(device):
        plain,small = create_model(name, 10).eval(),create_model(name, 10, small_images=True).eval()
        first,start,end = convs(small, 32)
        assert (start,end)==(32,last) and first.kernel_size==(3,3) and first.stride==(1,1)
    own,changed = plain.state_dict(),small.state_dict()
    assert own.keys()==changed.keys()
    differ = [k for k in own if own[k].shape!=changed[k].shape]
    assert len(differ)<=1 and all(changed[k].shape[-2:]==(3,3) for k in differ)

@pytest.mark.parametrize('name', ['timm/resnet18', 'timm/convnext_atto', 'torchvision/densenet121'])
def test_small_stem_keeps_weights(name):
    torch.manual_seed(0)
    model = create_model(name, 10)
    own = deepcopy(model.state_dict())
    assert small_stem(model) is model
    once = deepcopy(model.state_dict())
    for k,v in once.items():
        a = (own[k].shape[-1]-3)//2 if v.shape!=own[k].shape else 0
        assert torch.equal(v, own[k] if v.shape==own[k].shape else own[k][:, :, a:a+3, a:a+3]), k
    small_stem(model)
    assert all(torch.equal(v, once[k]) for k,v in model.state_dict().items())
    model(torch.randn(2, 3, 32, 32)).sum().backward()
    assert all(p.grad is not None for p in model.parameters())

@pytest.mark.parametrize('name', ['timm/vgg11', 'timm/vit_tiny_patch16_224', 'torchvision/alexnet', 'torchvision/squeezenet1_1', 'torchvision/inception_v3'])
def test_unknown_stems_are_refused(name):
    with torch.device('meta'), pytest.raises(ValueError, match="timm's ResNet, .*torchvision's ResNet, .*ShuffleNetV2"): create_model(name, 10, small_images=True)
    with pytest.raises(ValueError, match="torch's Linear"): small_stem(nn.Linear(2, 2))

def test_small_images_leaves_ours():
    assert n_params('resnet20', 10, small_images=True)==n_params('resnet20', 10)

def test_timm_weights_stay(tmp_path):
    torch.manual_seed(0)
    source = timm.create_model('resnet18')
    torch.save(source.state_dict(), tmp_path/'w.pth')
    model = create_model('timm/resnet18', 10, small_images=True, pretrained=True, pretrained_cfg_overlay=dict(file=str(tmp_path/'w.pth')))
    want = source.state_dict()
    for k,v in model.state_dict().items():
        if k=='conv1.weight': assert torch.equal(v, want[k][..., 2:5, 2:5])
        elif not k.startswith('fc'): assert torch.equal(v, want[k]), k
    assert model.fc.out_features==10

@pytest.mark.parametrize('arch,head,stem', [('shufflenet_v2_x0_5', 'fc', None), ('mobilenet_v3_small', 'classifier.3', None), ('resnet18', 'fc', 'conv1.weight')])
def test_torchvision_weights_stay(arch, head, stem, monkeypatch):
    torch.manual_seed(0)
    want = torchvision.models.get_model(arch).state_dict()
    monkeypatch.setattr(torchvision.models.WeightsEnum, 'get_state_dict', lambda self, *args, **kwargs: want)
    for n in 10,1000:
        model = create_model(f'torchvision/{arch}', n, weights='IMAGENET1K_V1', small_images=True)
        for k,v in model.state_dict().items():
            if k==stem: assert torch.equal(v, want[k][..., 2:5, 2:5])
            elif not k.startswith(head) or n==1000: assert torch.equal(v, want[k]), k
        assert model(torch.randn(2, 3, 32, 32)).shape==(2,n)

@pytest.mark.parametrize('arch,heads', [('googlenet', ('aux1.fc2', 'aux2.fc2')), ('inception_v3', ('AuxLogits.fc',))])
@pytest.mark.filterwarnings('ignore:auxiliary heads')
def test_auxiliary_heads_of_pretrained_networks(arch, heads, monkeypatch):
    with torch.device('meta'): want = torchvision.models.get_model(arch, init_weights=False).state_dict()
    monkeypatch.setattr(torchvision.models.WeightsEnum, 'get_state_dict', lambda self, *args, **kwargs: want)
    with torch.device('meta'):
        for n in 7,1000:
            plain,full = create_model(f'torchvision/{arch}', n, weights='DEFAULT'),create_model(f'torchvision/{arch}', n, weights='DEFAULT', aux_logits=True)
            assert plain(torch.randn(2, 3, 96, 96)).shape==(2,n) and plain.transform_input
            assert not any('aux' in k.lower() for k in plain.state_dict()) and plain.fc.out_features==n
            assert [full.get_submodule(o).out_features for o in ('fc', *heads)]==[n]*(1+len(heads))

def test_torchvision_weights_without_a_linear_head(monkeypatch):
    want = torchvision.models.get_model('squeezenet1_1').state_dict()
    monkeypatch.setattr(torchvision.models.WeightsEnum, 'get_state_dict', lambda self, *args, **kwargs: want)
    with pytest.raises(ValueError, match='SqueezeNet has no linear layer'): create_model('torchvision/squeezenet1_1', 10, weights='DEFAULT')

# errors

@pytest.mark.parametrize('name,words', [
    ('resnet5b', ['resnet56']), ('plaincnn', ['plain_cnn']), ('ResNet56', ['resnet56']), ('mobilenet_v2', ['mobilenetv2_100', 'mobilenetv2']),
    ('resnet55', ['6n+2', '50 and 56', '9n+2', '47 and 56']), ('resnet2', ['8 and 14']), ('preresnet111', ['6n+2', '110 and 116', '110 and 119']),
    ('resnet32_bottleneck', ['9n+2', '29 and 38']), ('resnet47_basic', ['6n+2', '44 and 50']),
    ('wrn_29_10', ['6n+4', '28 and 34']), ('wrn_4_1', ['10 and 16']), ('wrn_28', ['wrn_28_10']),
    ('timm/resnet56', ['timm/resnet50']), ('torchvision/resnet56', ['torchvision/resnet50']), ('zzzzzz', ['timm.list_models']), ('shufflenet_v2_x1_0', ["torchvision's is 'torchvision/shufflenet_v2_x1_0'"]),
    ('torchvision/zzzzzz', ['it has alexnet']), ('torchvision/fasterrcnn_resnet50_fpn', ['no such classifier'])])
def test_unknown_names_say_what_is_near(name, words):
    with pytest.raises(ValueError) as e: create_model(name, 10)
    assert f'name={name!r}' in str(e.value) and all(o in str(e.value) for o in words)

def test_bad_arguments():
    for n in 1, 0, -3:
        with pytest.raises(ValueError, match=f'n_classes={n}'): create_model('resnet20', n)
    for n in 10., '10', None:
        with pytest.raises(TypeError, match='n_classes must be an integer'): create_model('resnet20', n)
    with pytest.raises(TypeError, match='name must be a string'): create_model(20, 10)
    with pytest.raises(TypeError, match="no pretrained; timm's network of that name is 'timm/resnet50'"): create_model('resnet50', 10, pretrained=True)
    with pytest.raises(TypeError, match="'plain_cnn' is built here"): create_model('plain_cnn', 10, p=.1)
    with pytest.raises(TypeError, match="weights='DEFAULT'"): create_model('torchvision/resnet18', 10, pretrained=True)
    with pytest.raises(ValueError, match="weights='V1': resnet18 has IMAGENET1K_V1"): create_model('torchvision/resnet18', 10, weights='V1')
    assert create_model('resnet20', np.int64(10)).fc.out_features==10
