"Networks by name: published parameter counts, structure, copies, errors."
import pickle
from copy import deepcopy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fastkdtf.models import BasicBlock, Bottleneck, CifarResNet, PlainCNN, ResBlock, create_model, model_names


def n_params(name, n_classes): return sum(p.numel() for p in create_model(name, n_classes).parameters())

def blocks(model): return [o for o in model.modules() if isinstance(o, ResBlock)]


@pytest.mark.parametrize('name,n_classes,digits,printed', [
    ('resnet32', 10, 2, .47), ('resnet50', 10, 2, .76), ('resnet110_bottleneck', 10, 2, 1.15),                # Zheng Tab. 1
    ('resnet20', 100, 1, .3), ('resnet32', 100, 1, .5), ('resnet56', 100, 1, .9), ('resnet110', 100, 1, 1.7), # Wang Tab. 1
    ('resnet164', 100, 1, 1.7)])
def test_published_parameter_counts(name, n_classes, digits, printed):
    assert round(n_params(name, n_classes)/1e6, digits)==printed

@pytest.mark.parametrize('name,ten,hundred', [
    ('resnet20', 272_474, 278_324), ('resnet32', 466_906, 472_756), ('resnet56', 855_770, 861_620), ('resnet110', 1_730_714, 1_736_564),
    ('resnet110_bottleneck', 1_147_738, 1_170_868), ('resnet164', 1_704_154, 1_727_284)])
def test_exact_parameter_counts(name, ten, hundred):
    assert (n_params(name, 10), n_params(name, 100))==(ten, hundred)

def test_plain_cnn_parameter_count():
    convs = sum(ni*nf*9 + nf + 2*nf for ni,nf in ((3,32), (32,64), (64,128)))
    assert n_params('plain_cnn', 10)==convs + 2048*128+128 + 2*128 + 128*10+10

@pytest.mark.parametrize('name,block,n', [
    ('resnet8', BasicBlock, 1), ('resnet20', BasicBlock, 3), ('resnet50', BasicBlock, 8), ('resnet56', BasicBlock, 9),
    ('resnet110', BasicBlock, 18), ('resnet164', Bottleneck, 18), ('resnet164_basic', BasicBlock, 27), ('resnet56_basic', BasicBlock, 9),
    ('resnet110_bottleneck', Bottleneck, 12), ('resnet20_bottleneck', Bottleneck, 2), ('resnet29', Bottleneck, 3), ('resnet47', Bottleneck, 5)])
def test_depth_decides_the_form(name, block, n):
    model = create_model(name, 10)
    assert isinstance(model, CifarResNet)
    assert [type(o) for o in blocks(model)]==[block]*(3*n)
    layers = sum(isinstance(m, (nn.Conv2d, nn.Linear)) for k,m in model.named_modules() if 'shortcut' not in k)
    assert f'resnet{layers}'==name.split('_')[0]

@pytest.mark.parametrize('name,size', [*((o, 8) for o in model_names), *((o, n) for o in ('resnet8', 'resnet11', 'plain_cnn') for n in (28,32,45))])
def test_logits_for_any_size(name, size):
    model = create_model(name, 7).eval()
    with torch.no_grad(): out = model(torch.randn(2, 3, size, size))
    assert out.shape==(2,7) and out.isfinite().all()

@pytest.mark.parametrize('block,nf', [(BasicBlock, 32), (Bottleneck, 128)])
@pytest.mark.parametrize('stride', [1, 2])
def test_block_is_relu_of_branch_plus_shortcut(block, nf, stride):
    b,x = block(16, 32, stride).eval(), torch.randn(2, 16, 8, 8)
    assert torch.equal(b(x), F.relu(b.branch(x) + b.shortcut(x)))
    assert b(x).shape==(2, nf, 8//stride, 8//stride)
    same = block(nf, 32).eval()
    assert isinstance(same.shortcut, nn.Identity)

def test_he_initialisation():
    torch.manual_seed(0)
    for model in create_model('resnet56', 10), create_model('plain_cnn', 10):
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

@pytest.mark.parametrize('name', ['resnet8', 'resnet11', 'plain_cnn'])
def test_copies(name):
    model,x = create_model(name, 10), torch.randn(4, 3, 8, 8)
    model(x).sum().backward()
    assert all(p.grad is not None for p in model.parameters())
    model.eval()
    for clone in deepcopy(model), pickle.loads(pickle.dumps(model)):
        assert torch.equal(clone(x), model(x))
        with torch.no_grad(): next(clone.parameters()).zero_()
        assert next(model.parameters()).any()

@pytest.mark.parametrize('name', ['resnet20', 'plain_cnn'])
def test_seed_decides_weights(name):
    def weights(seed): torch.manual_seed(seed); return torch.cat([p.flatten() for p in create_model(name, 10).parameters()])
    assert torch.equal(weights(1), weights(1)) and not torch.equal(weights(1), weights(2))

def test_timm():
    assert type(create_model('resnet18', 5)).__module__.startswith('timm')
    model = create_model('timm/resnet50', 5)
    assert type(model).__module__.startswith('timm') and model.fc.out_features==5
    assert create_model('resnet18', 5, in_chans=1).conv1.in_channels==1

@pytest.mark.parametrize('name,words', [
    ('resnet5b', ['resnet56']), ('plaincnn', ['plain_cnn']), ('ResNet56', ['resnet56']), ('mobilenet_v2', ['mobilenetv2_100']),
    ('resnet55', ['6n+2', '50 and 56', '9n+2', '47 and 56']), ('resnet2', ['8 and 14']),
    ('resnet32_bottleneck', ['9n+2', '29 and 38']), ('resnet47_basic', ['6n+2', '44 and 50']),
    ('timm/resnet56', ['timm/resnet50']), ('zzzzzz', ['timm.list_models'])])
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
    assert create_model('resnet20', np.int64(10)).fc.out_features==10
