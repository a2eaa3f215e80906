"""Where teachers come from: files of other tools, folders of learners, names; and what is said where one cannot be read."""
import argparse, copy, os, warnings
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest, timm, torch, torch.nn.functional as F
from fastai.basics import Callback, CrossEntropyLossFlat, DataLoaders, Learner
from fastai.callback.all import ProgressCallback
from fastai.layers import Lambda
from torch import nn
from torch.optim.swa_utils import AveragedModel

from fastkdtf.callback.distill import KnowledgeDistillation
from fastkdtf.core import Batch
from fastkdtf.teachers.network import EnsembleTeacher, NetworkTeacher, as_teacher
from fastkdtf.teachers.sources import find_network, find_weights, without_prefix
from fastkdtf.vision.models import create_model

K = 8

@pytest.fixture(autouse=True)
def start(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)

class Items(list):
    def new_empty(self): return Items()   # for `export`

def loaders(path='.', channels=3, size=8):
    g = torch.Generator().manual_seed(0)
    items = Items((torch.rand(channels, size, size, generator=g), torch.tensor(i%K)) for i in range(16))
    dls = DataLoaders.from_dsets(items, Items(items[:8]), bs=8, device='cpu', num_workers=0, path=path)
    dls.c = K
    return dls

class Untouched(Callback):
    "Notes whether a batch reached the student"
    seen = 0
    def before_step(self): self.seen += 1

def student(cbs=(), path='.', channels=3, size=8):
    net = nn.Sequential(nn.Flatten(), nn.Linear(channels*size*size, K))
    return Learner(loaders(path, channels, size), net, loss_func=CrossEntropyLossFlat(), cbs=[*cbs, Untouched()], path=path).remove_cb(ProgressCallback)

def refused(teacher, error=ValueError, **kwargs):
    "What a fit with this teacher says, before the first step"
    learn = student([KnowledgeDistillation(teacher)], **kwargs)
    before = copy.deepcopy(learn.model.state_dict())
    with pytest.raises(error) as e, learn.no_logging(): learn.fit(1)
    assert learn.untouched.seen == 0 and all(torch.equal(v, learn.model.state_dict()[k]) for k,v in before.items())
    return str(e.value)

def says(teacher, x, learn=None):
    teacher.attach(learn or student())
    return teacher(Batch(None, xb=(x,)))

# ---------------------------------------------------------------- weights of other tools

def net(): return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(144, K))
def renamed(weights, prefix): return {prefix+name: value for name,value in weights.items()}

WRAPPINGS = {
    'state_dict': lambda w: dict(epoch=3, state_dict=w, optimizer=dict(state={0: dict(exp_avg=torch.ones(1))}, param_groups=[])),
    'model': lambda w: dict(model=w, args=argparse.Namespace(lr=.1)),
    'module.': lambda w: renamed(w, 'module.'), '_orig_mod.': lambda w: renamed(w, '_orig_mod.'), 'both': lambda w: dict(model=renamed(w, 'module._orig_mod.')),
    'lightning': lambda w: {'state_dict': {**renamed(w, 'model.'), 'loss.weight': torch.ones(3)}, 'epoch': 3, 'hyper_parameters': {'path': Path('x')}},
    'average': lambda w: dict(renamed(w, 'module.'), n_averaged=torch.tensor(4)), 'own name': lambda w: {'best': w, 'step': 3},
    'with a tensor beside': lambda w: {'state_dict': w, 'best': torch.ones(1)},
    'parts compiled': lambda w: {name.replace('3.', '3._orig_mod.'): value for name,value in w.items()},
    'ema beside': lambda w: {'state_dict_ema': {k: v*0 for k,v in w.items()}, 'state_dict': w},
    'of old': lambda w: {name: value for name,value in w.items() if 'num_batches' not in name}}

@pytest.mark.parametrize('wrapping', WRAPPINGS)
def test_weights_in_the_wrappings_of_other_tools(wrapping):
    source = net().eval()
    torch.save(WRAPPINGS[wrapping](source.state_dict()), 'w.pth')
    x = torch.rand(4, 3, 8, 8)
    torch.testing.assert_close(says(NetworkTeacher('w.pth', arch=net()), x), source(x).detach(), rtol=1e-4, atol=1e-5)

def test_weights_by_the_name_of_the_network():
    source = create_model('resnet20', K).eval()
    torch.save({'state_dict': renamed(source.state_dict(), 'module.')}, 'w.pth')
    assert all(torch.equal(a, b) for a,b in zip(find_network('w.pth', 'resnet20').network.state_dict().values(), source.state_dict().values(), strict=True))

def test_safetensors():
    from safetensors.torch import save_file
    source = net().eval()
    save_file(source.state_dict(), 'w.safetensors')
    x = torch.rand(4, 3, 8, 8)
    torch.testing.assert_close(says(NetworkTeacher('w.safetensors', arch=net()), x), source(x).detach(), rtol=1e-4, atol=1e-5)

def test_what_a_compiled_student_saved_is_read():
    learn = student()
    learn.model = torch.compile(net(), backend='eager')
    learn.create_opt()
    path = learn.save('w')
    assert '_orig_mod.0.weight' in torch.load(path, weights_only=False)['model']
    x = torch.rand(4, 3, 8, 8)
    torch.testing.assert_close(says(NetworkTeacher(path, arch=net()), x), learn.model.eval()(x).detach(), rtol=1e-4, atol=1e-5)

class Boom:
    "What runs code when it is read the usual way"
    def __reduce__(self): return os.system, ('touch ran',)

def test_no_code_of_a_file_runs():
    torch.save({'state_dict': net().state_dict(), 'config': Boom()}, 'w.pth')
    try: NetworkTeacher('w.pth', arch=net())
    except ValueError as e: assert 'w.pth' in str(e)
    assert not Path('ran').exists()

def test_several_networks_in_one_file_are_refused_by_name():
    torch.save({'generator': net().state_dict(), 'critic': net().state_dict()}, 'w.pth')
    with pytest.raises(ValueError, match='there are several: generator, critic; save the one that is meant'): NetworkTeacher('w.pth', arch=net())

def test_a_head_too_many_is_not_dropped():
    torch.save({**net().state_dict(), 'more.weight': torch.ones(2)}, 'w.pth')
    with pytest.raises(ValueError, match='does not hold the weights of this network.*more.weight'): NetworkTeacher('w.pth', arch=net())

def test_names_that_really_begin_so_stay():
    "A network with a layer called module"
    class Wraps(nn.Module):
        def __init__(self):
            super().__init__()
            self.module = net()
        def forward(self, x): return self.module(x)
    source = Wraps()
    assert without_prefix(source.state_dict(), list(source.state_dict())).keys() == source.state_dict().keys()
    assert without_prefix(renamed(source.state_dict(), 'module.'), list(source.state_dict())).keys() == source.state_dict().keys()

# ---------------------------------------------------------------- folders and names

@pytest.mark.parametrize('how', [lambda t: KnowledgeDistillation(t), lambda t: KnowledgeDistillation([t, net()])], ids=['alone', 'in a list'])
def test_an_exported_learner_is_found_below_the_students_path(how, tmp_path):
    (tmp_path/'data').mkdir()
    teacher = student(path=tmp_path/'data')
    teacher.export('t.pkl')
    assert (tmp_path/'data'/'t.pkl').exists() and not Path('t.pkl').exists()
    assert 'data/t.pkl is read like an exported learner' in refused('t.pkl', path=tmp_path/'data')
    learn = student([cb := how(NetworkTeacher('t.pkl', trust=True))], path=tmp_path/'data')
    with learn.no_logging(): learn.fit(1)
    x = torch.rand(4, 3, 8, 8)
    inner = getattr(cb.teacher, 'teachers', [cb.teacher])[0]
    torch.testing.assert_close(inner(Batch(None, xb=(x,))), teacher.model.eval()(x).detach())

def test_saved_weights_are_found_among_the_learners_models(tmp_path):
    teacher = student(path=tmp_path/'data')
    teacher.save('w', with_opt=False)
    learn = student([KnowledgeDistillation(NetworkTeacher('w.pth', arch=copy.deepcopy(teacher.model)))], path=tmp_path/'data')
    with learn.no_logging(): learn.fit(1)

def test_a_file_that_is_nowhere_is_refused_with_where_it_was_looked_for():
    said = refused('t.pkl', FileNotFoundError)
    assert 't.pkl: no such file, neither here nor in' in said and 'models' in said
    with pytest.raises(FileNotFoundError, match="no/t.pkl: no such file.*learn.export writes below learn.path: give learn.path/'t.pkl'"):
        NetworkTeacher('no/t.pkl')

@pytest.mark.parametrize('name,near', [('resnet5O', 'resnet50'), ('mobilenet_v3_large', 'mobilenetv3_large_100'), ('timm/efficientnetb0', 'efficientnet_b0'),
                                       ('vit_tiny_patch16', 'vit_tiny_patch16_224')])
def test_a_mistyped_name_is_answered_with_similar_ones(name, near):
    with pytest.raises(FileNotFoundError) as e: KnowledgeDistillation(name)
    assert near in str(e.value) and 'timm knows' in str(e.value)

def test_a_list_of_teachers_is_an_ensemble():
    a,b = net(),net()
    teacher = as_teacher([a, b])
    assert isinstance(teacher, EnsembleTeacher) and isinstance(KnowledgeDistillation((a, b)).teacher, EnsembleTeacher)
    x = torch.rand(4, 3, 8, 8)
    p = sum(says(NetworkTeacher(o), x).softmax(1) for o in (a, b))/2
    torch.testing.assert_close(teacher(Batch(None, xb=(x,))).softmax(1), p)   # nobody has attached it
    with pytest.raises(TypeError, match=r'several are one EnsembleTeacher\(\[…\]\)'): NetworkTeacher([a, b])
    with pytest.raises(ValueError, match='at least two'): as_teacher([a])

# ---------------------------------------------------------------- what is said before the first step

def test_a_timm_network_with_another_number_of_outputs_is_refused_when_the_fit_begins(monkeypatch):
    asked = []
    big = timm.create_model('test_resnet', pretrained=False)
    monkeypatch.setattr(type(big), 'forward', lambda self, x: asked.append(1))
    said = refused(NetworkTeacher(big, teacher_norm=None))
    assert "1000 outputs, and the student has 8 classes: that is not the student's shape" in said and 'vocab=' in said and 'Learner on the same data' in said and not asked

def test_another_number_of_outputs_is_refused_at_the_first_batch():
    assert "5 outputs, and the student has 8 classes: that is not the student's shape" in refused(nn.Sequential(nn.Flatten(), nn.Linear(192, 5)))

def test_a_student_whose_data_say_another_number_than_its_outputs_is_believed():
    learn = student()
    learn.dls.c = 3
    learn.add_cb(KnowledgeDistillation(net()))
    with learn.no_logging(): learn.fit(1)
    assert learn.untouched.seen == 2

def test_a_vision_transformer_of_another_size_says_its_size():
    vit = timm.create_model('test_vit', pretrained=False, num_classes=K)
    said = refused(NetworkTeacher(vit))
    assert "cannot read the student's images (8, 3, 8, 8)" in said and 'teacher_size=160' in said
    learn = student([KnowledgeDistillation(NetworkTeacher(vit, teacher_size=160))])
    with learn.no_logging(): learn.fit(1)
    import torchvision
    other = torchvision.models.VisionTransformer(16, 8, 1, 2, 16, 32, num_classes=K)
    assert 'teacher_size=16' in refused(other)

@pytest.mark.parametrize('its,ours,words', [(1, 3, 'x.mean(1, keepdim=True)'), (3, 1, 'x.expand(-1, 3, -1, -1)')])
def test_a_grey_teacher_and_a_grey_student(its, ours, words):
    teacher = nn.Sequential(nn.Conv2d(its, 4, 3), nn.Flatten(), nn.Linear(144, K))
    said = refused(teacher, channels=ours)
    assert f"takes images of {its} channel" in said and words in said
    advised = nn.Sequential(Lambda(eval(f'lambda x: {words}')), teacher)
    learn = student([KnowledgeDistillation(advised)], channels=ours)
    with learn.no_logging(): learn.fit(1)
    assert 'takes images of 5 channels' in refused(nn.Sequential(nn.Conv2d(5, 4, 3), nn.Flatten(), nn.Linear(144, K)))

def test_an_error_of_the_teachers_own_later_in_the_fit_stays_what_it_is():
    class Later(nn.Module):
        n = 0
        def forward(self, x):
            Later.n += 1
            if Later.n == 2: raise RuntimeError('the disk is full')
            return torch.zeros(len(x), K)
    learn = student([KnowledgeDistillation(NetworkTeacher(Later(), fast=False))])
    with pytest.raises(RuntimeError, match='the disk is full') as e: learn.fit(1)
    assert 'cannot read' not in str(e.value)

# ---------------------------------------------------------------- D4. timm's statistics

def timm_net():
    model = timm.create_model('test_resnet', pretrained=False, num_classes=1000)
    return model

def test_a_timm_network_that_may_have_been_trained_by_the_user_is_said_to_be_normalised_as_timms():
    "Its settings stay those of timm's pretraining, whatever it was trained on"
    model,batches = timm_net(),[(torch.rand(2, 3, 32, 32), torch.tensor([0, 1]))]
    learn = Learner(DataLoaders(batches, batches), nn.Linear(3072, 1000), loss_func=CrossEntropyLossFlat())
    mean,std = (list(model.pretrained_cfg[name]) for name in ('mean', 'std'))
    with pytest.warns(UserWarning, match=r'normalised as timm pretrains it: teacher_norm=.*or None where it reads what the student reads'):
        NetworkTeacher(model).attach(learn)
    torch.save(model.state_dict(), 'w.pth')
    with pytest.warns(UserWarning, match='as timm pretrains it'): NetworkTeacher('w.pth', arch='timm/test_resnet').attach(learn)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        NetworkTeacher(model, teacher_norm=(mean, std)).attach(learn)
        NetworkTeacher(model, teacher_norm=None).attach(learn)
        NetworkTeacher(Learner(DataLoaders(batches, batches), model, loss_func=CrossEntropyLossFlat())).attach(learn)   # whose loaders say it
        NetworkTeacher(timm.create_model('test_resnet', num_classes=K)).attach(learn)   # a head of its own: as the student sees

def test_a_name_is_pretrained_by_timm_and_needs_no_warning(monkeypatch):
    monkeypatch.setattr(timm, 'create_model', lambda name, pretrained=True, f=timm.create_model, **kwargs: f(name, pretrained=False, **kwargs))
    batches = [(torch.rand(2, 3, 32, 32), torch.tensor([0, 1]))]
    learn = Learner(DataLoaders(batches, batches), nn.Linear(3072, 1000), loss_func=CrossEntropyLossFlat())
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        (teacher := NetworkTeacher('test_resnet')).attach(learn)
    assert teacher.rescale is not None
