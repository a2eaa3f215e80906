"What changes the numbers of a training changes its fingerprint; how a setting is written does not"
import os, subprocess, sys, threading
from copy import deepcopy
from fractions import Fraction
from functools import partial
from pathlib import Path

import numpy as np, pandas as pd, pytest, torch
import torch.nn.functional as F
from fastai.vision.all import (Adam, CrossEntropyLossFlat, DataLoaders, Datasets, Flip, ImageDataLoaders, MixUp, Normalize, PILImage, Resize, SGD,
                               Transform, aug_transforms, imagenet_stats, set_seed)
from fastai.data.load import DataLoader as FastaiLoader
from hypothesis import given, settings as hypothesis_settings, strategies as st
from torch import nn

from fastkdtf.all import (Augment, Batch, Checkpoint, Correct, Distill, FunctionTeacher, KnowledgeDistillation, LsrKD, NetworkTeacher, Replace,
                          TeacherCorrection, UniformTeacher, compare, create_model, kd_dataloaders)
from fastkdtf.fingerprint import fingerprint, settings_digest
from fastkdtf.lab.arms import method_identity
from fastkdtf.lab.one_run import LearnerParts
from fastkdtf.lab.training import Arm, Campaign

pytestmark = pytest.mark.usefixtures('no_drawing')

class Cut:
    def __init__(self, size): self.size = size
class Steps:
    def __init__(self, *steps): self.steps = steps
class Named:
    def __init__(self, identity): self.identity = identity
class Slotted:
    __slots__ = 'size',
    def __init__(self, size): self.size = size
class Mine(LsrKD):
    def __init__(self, gain=1., **kwargs):
        super().__init__(**kwargs)
        self._gain = gain

@pytest.mark.parametrize('x,words', [
    (None, None), (3, 3), (.5, .5), ('a', 'a'), (True, True), (3., 3), (np.float32(3), 3), (torch.tensor(3), 3), (float('nan'), 'nan'),
    ({1: (2, [3])}, {'1': [2, [3]]}), ({'b', 'a'}, ['a', 'b']), (nn.Linear, 'torch.nn.modules.linear.Linear'),
    (partial(torch.optim.SGD, momentum=.9), ['torch.optim.sgd.SGD', [], {'momentum': .9}]),
    (Named('resnet8'), 'resnet8'), (UniformTeacher(), 'UniformTeacher()')])
def test_words(x, words): assert fingerprint(x) == words

def test_an_address_is_no_identity():
    assert fingerprint(Named('<f at 0x7f3c>'))[1] == {'identity': '<f at 0x7f3c>'}
    assert '0x' not in str(fingerprint(object()))

def test_classes_go_by_what_they_are_whatever_identity_they_have():
    class Teaches:
        identity = 'always the same'
    assert fingerprint(Teaches()) == 'always the same' != fingerprint(Teaches)
    assert fingerprint(NetworkTeacher) == 'fastkdtf.teachers.network.NetworkTeacher'

def test_tensors_go_by_value_and_shape():
    x = torch.tensor([1., 2.])
    assert fingerprint(x) == fingerprint(x.long()) == fingerprint(x.half()) == fingerprint(x.numpy()) != fingerprint(x+1)
    assert fingerprint(x) != fingerprint(x[None]) and fingerprint(torch.tensor([2**60])) != fingerprint(torch.tensor([2**60+1]))

def test_networks_that_teach_go_by_their_weights():
    torch.manual_seed(0)
    a,b = nn.Linear(2, 3),nn.Linear(2, 3)
    words = [fingerprint(NetworkTeacher(net, teacher_norm=None)) for net in (a, b, a)]
    assert words[0] == words[2] != words[1]

def test_objects_that_hold_themselves_end_somewhere():
    ring = Named(None)
    ring.next = ring
    assert fingerprint(ring) == fingerprint(deepcopy(ring)) and len(str(fingerprint(ring))) < 10_000

def test_the_digits_of_0_1_0():
    assert settings_digest(dict(alpha=.1, tau=3.)) == settings_digest(dict(tau=3., alpha=.1)) == 'aeda755dd0a2' != settings_digest(dict(alpha=.2, tau=3.))
    with pytest.raises(TypeError): settings_digest(dict(model=nn.Linear(2, 2)))

def test_another_process_says_the_same():
    code = '''
from functools import partial
from fastkdtf.callback.distill import LsrKD
from fastkdtf.fingerprint import fingerprint, settings_digest
from fastkdtf.targets import Correct
k = .5
said = settings_digest(dict(x=fingerprint([{'a', 'b', 'c', 'd'}, partial(LsrKD, alpha=.2), ~Correct(), print, lambda pct: k*pct])))
print(said)'''
    here,other = dict(__name__='__main__'),'1' if os.environ.get('PYTHONHASHSEED') != '1' else '2'
    exec(code, here)
    told = subprocess.run([sys.executable, '-c', code], env={**os.environ, 'PYTHONHASHSEED': other}, capture_output=True, text=True).stdout.strip()
    assert told == here['said'] != settings_digest(dict(x=fingerprint([])))

# what cannot be told

@pytest.mark.parametrize('make', [lambda: open(os.devnull), lambda: (i for i in range(3)), threading.Lock, lambda: [dict(log=open(os.devnull))],
                                  lambda: partial(print, file=open(os.devnull))])
def test_what_another_process_cannot_tell_apart_is_refused(make):
    with pytest.raises(ValueError, match='cannot be told from another .* keep nothing'): fingerprint(make())
    fingerprint(make(), refuse=False)

def test_a_function_over_an_open_file_is_refused():
    file = open(os.devnull)
    with pytest.raises(ValueError, match='cannot be told'): fingerprint(lambda: file.read())

def test_values_of_every_kind_of_python_are_told():
    from collections import Counter, OrderedDict, deque, namedtuple
    from datetime import datetime
    from decimal import Decimal
    import re
    image = PILImage.create(np.zeros((4, 4, 3), np.uint8))
    other = PILImage.create(np.ones((4, 4, 3), np.uint8))
    pairs = [(b'a', b'b'), (bytearray(b'a'), bytearray(b'b')), (1j, 2j), (range(3), range(4)), (slice(1), slice(2)), (Decimal('1.5'), Decimal('2.5')),
             (datetime(2020, 1, 1), datetime(2020, 1, 2)), (deque([1]), deque([2])), (re.compile('a'), re.compile('b')), (Counter('aa'), Counter('ab')),
             (namedtuple('P', 'x')(1), 2), (image, other), (np.random.default_rng(0), np.random.default_rng(1)), (Slotted(1), Slotted(2)), (..., None),
             (lambda: image, lambda: other), (torch.Generator().manual_seed(0), 'generator')]
    told = 0
    for a,b in pairs:
        try: assert fingerprint(a) == fingerprint(a) != fingerprint(b), a
        except ValueError as e:
            assert 'cannot be told' in str(e)
            continue
        told += 1
    assert told >= 15

# functions and classes

def weight(share): return lambda pct: share*pct
bound = .1
def bounded(pct): return min(pct, bound)

def test_functions_go_by_what_they_do():
    def a(pct):
        "With words"
        number = pct + 1   # and a comment
        return number
    def b(pct):
        other = pct + 1
        return other
    assert fingerprint(weight(.5)) == fingerprint(weight(.5)) != fingerprint(weight(.6))
    assert fingerprint(a).split()[1] == fingerprint(b).split()[1]
    assert fingerprint(lambda p, q=1: p) != fingerprint(lambda p, q=2: p) and fingerprint(lambda p, *, q=1: p) != fingerprint(lambda p, *, q=2: p)

def test_a_global_that_a_function_reads_counts(monkeypatch):
    before = fingerprint(bounded)
    monkeypatch.setitem(globals(), 'bound', .2)
    assert fingerprint(bounded) != before

def test_a_function_that_a_function_calls_counts():
    def outer(step): return lambda pct: step(pct)
    assert fingerprint(outer(lambda p: p)) != fingerprint(outer(lambda p: 2*p))

def test_libraries_go_by_name_and_two_of_one_name_differ():
    assert fingerprint(F.cross_entropy) == 'torch.nn.functional.cross_entropy'
    assert fingerprint(SGD) != fingerprint(torch.optim.SGD)

def made(body, **names):
    exec(f'class Own:\n    rate = .5\n    def __call__(self, x): return {body}', names)
    return names['Own']
def test_a_class_goes_by_its_methods():
    assert fingerprint(made('x+1')) == fingerprint(made('x + 1')) != fingerprint(made('x+2'))
    assert fingerprint(made('x+1')()) != fingerprint(made('x+2')())

# networks

def net(p=.1, act=nn.ReLU, seed=0, hook=None, gain=None, tied=False):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(4, 4), act(), nn.Dropout(p), nn.Linear(4, 4))
    if hook: model[0].register_forward_hook(hook)
    if gain: model.gain = gain
    if tied: model[3].weight = model[0].weight
    return model

def test_networks_go_by_structure_attributes_hooks_and_weights():
    changed = [dict(p=.2), dict(act=nn.Tanh), dict(seed=1), dict(hook=lambda m, x, y: y*2), dict(hook=lambda m, x, y: y*3), dict(gain=2.), dict(tied=True)]
    words = [fingerprint(net(**change)) for change in [{}, *changed]]
    assert len(set(words)) == 8 and fingerprint(net()) == words[0] == fingerprint(deepcopy(net()).eval())
    frozen = net()
    frozen[0].weight.requires_grad_(False)
    assert fingerprint(frozen) not in words and fingerprint(net().double()) not in words

# loaders

@pytest.fixture(scope='module')
def photos(tmp_path_factory):
    folder = tmp_path_factory.mktemp('photos')
    for name in 'ab':
        (folder/name).mkdir()
        for i in range(8): PILImage.create(np.random.default_rng(i).integers(0, 255, (20, 24, 3)).astype(np.uint8)).save(folder/name/f'{i}.png')
    return folder

def from_folder(folder, items=None, batches=(), bs=4, **kwargs):
    return ImageDataLoaders.from_folder(folder, valid_pct=.25, seed=1, item_tfms=items or Resize(16), batch_tfms=list(batches), bs=bs,
                                        **{'num_workers': 0, **kwargs})

def test_a_loader_that_was_used_is_the_same_loader(photos):
    dls = from_folder(photos, batches=aug_transforms())
    first = fingerprint(dls)
    for _ in range(2): list(dls.train), list(dls.valid)
    assert fingerprint(dls) == first == fingerprint(from_folder(photos, batches=aug_transforms()))
    assert first == fingerprint(from_folder(photos, batches=aug_transforms(), num_workers=2))

def test_telling_a_loader_changes_no_draw(photos):
    def batch(tell):
        dls = from_folder(photos, batches=aug_transforms())
        dls.train.rng.seed(0)
        set_seed(0)
        if tell: fingerprint(dls)
        return dls.one_batch()[0]
    assert torch.equal(batch(True), batch(False))

def test_loaders_go_by_samples_transforms_and_batches(photos, tmp_path):
    import shutil
    for change in ('replaced', 'renamed', 'moved'): shutil.copytree(photos, tmp_path/change)
    PILImage.create(np.zeros((20, 24, 3), np.uint8)).save(tmp_path/'replaced'/'b'/'7.png')
    (tmp_path/'renamed'/'b').rename(tmp_path/'renamed'/'c')
    class Brighter(Transform):
        def __init__(self, by): self.by = by
        def encodes(self, x:PILImage): return x
    others = [from_folder(tmp_path/'replaced'), from_folder(tmp_path/'renamed'), from_folder(photos, Resize(18)), from_folder(photos, Resize(16, method='squish')),
              from_folder(photos, bs=5), from_folder(photos, batches=[Flip()]), from_folder(photos, batches=[Flip(p=.4)]),
              from_folder(photos, batches=[Normalize.from_stats(*imagenet_stats)]), from_folder(photos, batches=aug_transforms(max_rotate=11)),
              from_folder(photos, [Resize(16), Brighter(1)]), from_folder(photos, [Resize(16), Brighter(2)]), from_folder(photos, shuffle=False)]
    words = [json_of(fingerprint(dls)) for dls in [from_folder(photos), *others]]
    assert len(set(words)) == len(words) == 13
    assert json_of(fingerprint(from_folder(tmp_path/'moved'))) == words[0]

def json_of(words): return str(words)

def test_files_that_a_table_names_count_by_content(photos, tmp_path):
    import shutil
    shutil.copytree(photos, tmp_path/'photos')
    table = pd.DataFrame([[f'{label}/{i}.png', label] for label in 'ab' for i in range(8)])
    def loaders(): return ImageDataLoaders.from_df(table, tmp_path/'photos', seed=1, item_tfms=Resize(16), bs=4, num_workers=0)
    before = fingerprint(loaders())
    assert fingerprint(loaders()) == before
    PILImage.create(np.zeros((20, 24, 3), np.uint8)).save(tmp_path/'photos'/'a'/'3.png')
    assert fingerprint(loaders()) != before

def test_other_data_sets_go_by_what_they_hold():
    class Own(torch.utils.data.Dataset):
        def __init__(self, x, flip=False): self.x,self.flip = x,flip
        def __len__(self): return len(self.x)
        def __getitem__(self, i): return self.x[i],i%2
    def loaders(dataset): return DataLoaders.from_dsets(dataset, dataset, bs=4, num_workers=0)
    x = torch.arange(32.).reshape(8, 4)
    y = x.clone()
    y[5, 2] += 1
    words = [str(fingerprint(loaders(dataset))) for dataset in (Own(x), Own(y), Own(x, True), Own(x[:7]), list(zip(x, range(8))), list(zip(y, range(8))))]
    assert len(set(words)) == 6 and str(fingerprint(loaders(Own(x.clone())))) == words[0]

def doubled(by, of):
    "A data set of a class of the user's that has `items` and changes what it gives"
    class Own(of):
        def __getitem__(self, i): return super().__getitem__(i)*by
    return Own

class Held:
    def __init__(self, items): self.items = items
    def __len__(self): return len(self.items)
    def __getitem__(self, i): return self.items[i]

def test_what_a_class_of_data_sets_and_functions_of_a_loader_do_counts():
    def words(dataset, **kwargs): return str(fingerprint(FastaiLoader(dataset, bs=2, **kwargs)))
    items = [1., 2., 3., 4.]
    changes = [dict(), dict(after_item=lambda x: x*2), dict(after_item=lambda x: x*3), dict(after_batch=lambda b: b*2), dict(before_batch=lambda b: b[::-1]), dict(n=3)]
    found = [words(items, **change) for change in changes] + [words(doubled(by, Held)(items)) for by in (2, 3)]
    found += [words(doubled(by, Datasets)(items, [[lambda x: x]])) for by in (2, 3)]
    assert len(found) == 10 and len(set(found)) == 10 and words(list(items), n=4) == found[0] and words(doubled(2, Held)(items)) == found[6]

def test_pytorchs_loaders_go_by_samples_order_and_batches_whatever_their_generators_state():
    from torch.utils.data import DataLoader, SubsetRandomSampler, TensorDataset, WeightedRandomSampler
    x = torch.arange(32.).reshape(8, 4)
    def loaders(x=x, bs=4, valid_bs=4, seed=0, **kwargs):
        dataset = TensorDataset(x)
        return DataLoaders(DataLoader(dataset, bs, generator=torch.Generator().manual_seed(seed), **kwargs), DataLoader(dataset, valid_bs))
    used = loaders(shuffle=True)
    before = str(fingerprint(used))
    assert len([*used.train]) == 2
    same = used,loaders(shuffle=True, seed=1),loaders(shuffle=True, num_workers=2),loaders(shuffle=True, valid_bs=8),loaders(x.clone(), shuffle=True)
    assert all(str(fingerprint(dls)) == before for dls in same)
    weighted = [WeightedRandomSampler(weights, 8) for weights in (torch.ones(8), torch.arange(8.))]
    others = [loaders(), loaders(x+1, shuffle=True), loaders(bs=2, shuffle=True), loaders(shuffle=True, drop_last=True), loaders(shuffle=True, collate_fn=list),
              *[loaders(sampler=sampler) for sampler in (*weighted, SubsetRandomSampler(range(4)))]]
    assert len({before, *[str(fingerprint(dls)) for dls in others]}) == 9

def test_loaders_that_are_made_twice_and_used_are_one():
    "Whatever PyTorch's samplers, batches, workers and splits; the numbers that were drawn meanwhile are no setting"
    from fastai.callback.data import WeightedDL
    from torch.utils.data import BatchSampler, ConcatDataset, DataLoader, IterableDataset, RandomSampler, Subset, SubsetRandomSampler, TensorDataset, random_split
    x,y = torch.arange(64.).reshape(16, 4),torch.arange(16)%3
    class Stream(IterableDataset):
        def __iter__(self): return iter(zip(x, y))
        def __len__(self): return 16
    data,pairs = lambda: TensorDataset(x, y),list(zip(x, y))
    ways = dict(plain=lambda: DataLoader(data(), 4), shuffled=lambda: DataLoader(data(), 4, shuffle=True), drop=lambda: DataLoader(data(), 4, drop_last=True),
                replacement=lambda: DataLoader(data(), 4, sampler=RandomSampler(data(), True, 8)), some=lambda: DataLoader(data(), 4, sampler=SubsetRandomSampler(range(8))),
                batches=lambda: DataLoader(data(), batch_sampler=BatchSampler(RandomSampler(data(), generator=torch.Generator()), 4, False)),
                subset=lambda: DataLoader(Subset(data(), range(8)), 4), twice=lambda: DataLoader(ConcatDataset([data()]*2), 4), stream=lambda: DataLoader(Stream(), 4),
                split=lambda: DataLoader(random_split(data(), [12, 4], torch.Generator().manual_seed(1))[0], 4), other_split=lambda: DataLoader(random_split(data(), [12, 4], torch.Generator().manual_seed(2))[0], 4),
                collated=lambda: DataLoader(data(), 4, collate_fn=lambda b: [torch.stack(o) for o in zip(*b)]), weighted=lambda: WeightedDL(pairs, wgts=range(1, 17), bs=4), pairs=lambda: FastaiLoader(pairs, 4, shuffle=True))
    told = {}
    for name,make in ways.items():
        torch.manual_seed(len(told))
        first = fingerprint(DataLoaders(make(), make()))
        torch.rand(5)
        used = DataLoaders(make(), make())
        assert len([*used.train]) > 1 and len([*used.valid]) > 1
        assert fingerprint(used) == first == fingerprint(DataLoaders(make(), make())), name
        told[name] = str(first)
    assert len(set(told.values())) == len(ways) == 14
    assert str(fingerprint(DataLoaders(DataLoader(data(), 4, num_workers=2, prefetch_factor=4, persistent_workers=True), ways['plain']()))) == told['plain']

def three_to_two(seed):
    torch.manual_seed(seed)
    return nn.Linear(3, 2)

class Asks:
    def __init__(self, net): self.net = net
    def __call__(self, batch): return self.net(batch.xb[0])

class AsksAndForgets(Asks):
    def __getstate__(self): return {}

class Own(FunctionTeacher):
    def __init__(self, net, factor=1.):
        super().__init__(lambda batch: factor*net(batch.xb[0]))
        self.factor = factor

FUNCTIONS = {
    'closure': lambda net: FunctionTeacher(lambda batch: net(batch.xb[0])),
    'partial': lambda net: FunctionTeacher(partial(lambda n, batch: n(batch.xb[0]), net)),
    'object': lambda net: FunctionTeacher(Asks(net)), 'forgetful': lambda net: FunctionTeacher(AsksAndForgets(net)), 'subclass': Own,
    'method': lambda net: FunctionTeacher(Asks(net).__call__), 'rewrite': lambda net: Distill(UniformTeacher(), rewrite=Replace(Asks(net))),
    'KD': lambda net: KnowledgeDistillation(lambda batch: net(batch.xb[0]))}

@pytest.mark.parametrize('kind', FUNCTIONS)
def test_functions_that_teach_go_by_what_they_do_and_the_networks_they_read(kind):
    def told(seed, asked=False):
        cb = FUNCTIONS[kind](three_to_two(seed))
        if asked and isinstance(cb, FunctionTeacher): cb(Batch(torch.zeros(2), xb=(torch.zeros(2, 3),)))
        return method_identity(cb) if isinstance(cb, Distill) else fingerprint(cb)
    assert told(1) == told(1) == told(1, asked=True) != told(2)

def test_the_code_of_a_function_that_teaches_counts():
    net = three_to_two(1)
    first,second,third = (fingerprint(FunctionTeacher(f)) for f in (lambda b: net(b.xb[0]), lambda b: net(b.xb[0]), lambda b: -net(b.xb[0])))
    assert first == second != third and fingerprint(Own(net)) != fingerprint(Own(net, 2.))

def test_another_function_that_teaches_is_another_run(dls, tmp_path, capsys):
    nets = [nn.Sequential(nn.Flatten(), nn.Linear(3*8*8, 10)) for _ in range(2)]
    parts = LearnerParts(dls, lambda: nn.Sequential(nn.Flatten(), nn.Linear(3*8*8, 10)))
    taught = [compare({'KD': KnowledgeDistillation(lambda batch, net=net: net(batch.xb[0]))}, parts, 1, seeds=1, controls=False, out=tmp_path/'out')
              for net in nets]
    assert len({c.runs('KD')[0]['key'] for c in taught}) == 2 and len((tmp_path/'out'/'results.jsonl').read_text().splitlines()) == 3   # with a baseline
    def train(net):
        learn = parts(0)
        with learn.no_bar(), learn.no_logging(): learn.fit(1, cbs=[KnowledgeDistillation(lambda batch: net(batch.xb[0])), Checkpoint(tmp_path/'run.pt')])
        return ''.join(capsys.readouterr())
    assert 'nothing is trained' not in train(nets[0]) and 'nothing is trained' in train(nets[0])
    with pytest.raises(ValueError, match='run.pt'): train(nets[1])

def test_functions_behind_a_cache_or_a_compiler_go_by_what_they_do():
    from functools import cache, lru_cache, wraps
    def made(n):
        def f(x): return x+n
        return f
    for wrap in (lru_cache(3), cache, partial(torch.compile, backend='eager'), lambda f: wraps(f)(lambda *a: f(*a))):
        assert fingerprint(wrap(made(1))) == fingerprint(wrap(made(1))) != fingerprint(wrap(made(2)))
    compiled = lambda **kwargs: torch.compile(net(**kwargs), backend='eager')
    assert fingerprint(compiled()) == fingerprint(compiled()) != fingerprint(compiled(p=.2)) and fingerprint(compiled()) != fingerprint(net())
    assert fingerprint(nn.Sequential(compiled())) == fingerprint(nn.Sequential(compiled())) != fingerprint(nn.Sequential(compiled(seed=1)))
    assert NetworkTeacher(compiled()).identity == NetworkTeacher(net()).identity != NetworkTeacher(compiled(seed=1)).identity

@pytest.mark.filterwarnings('ignore:.*quantize')
@pytest.mark.filterwarnings('ignore:.*CSR')
def test_tensors_of_other_layouts_go_by_value():
    x = torch.eye(3)
    assert fingerprint(x.to_sparse()) == fingerprint(x.to_sparse_csr()) == fingerprint(x) != fingerprint((2*x).to_sparse())
    q = torch.quantize_per_tensor(x, .5, 0, torch.qint8)
    assert fingerprint(q) == fingerprint(x) != fingerprint(torch.quantize_per_tensor(2*x, .5, 0, torch.qint8))

def test_paths_go_by_what_lies_there(tmp_path, monkeypatch):
    (tmp_path/'imgs').mkdir()
    (tmp_path/'imgs'/'a.txt').write_text('1')
    monkeypatch.chdir(tmp_path)
    told = {str(fingerprint(path)) for path in (Path('imgs'), Path('./imgs'), Path('imgs/../imgs'), tmp_path/'imgs')}
    assert len(told) == 1
    (tmp_path/'imgs'/'a.txt').write_text('2')
    assert str(fingerprint(Path('imgs'))) not in told and str(tmp_path) not in str(told)

# campaigns

small = partial(create_model, 'resnet8', 10)
@pytest.fixture(scope='module')
def dls(): return kd_dataloaders('digits', bs=64, train_subset=128, device='cpu')

def dropped(p):
    torch.manual_seed(3)
    return nn.Sequential(nn.Flatten(), nn.Dropout(p), nn.Linear(3*8*8, 10))

def key(dls, method=LsrKD, model_fn=small, n_epoch=1, seed=0, fit='fit', lr=1e-3, settings=None, out=None, precision='32', **arm):
    campaign = Campaign({'baseline': Arm(), 'm': Arm(method, **arm)}, LearnerParts(dls, model_fn), n_epoch, [seed], fit, lr, out, settings=settings, precision=precision)
    return campaign.runs['m', seed].key

def constant(learn, n_epoch, lr=.1, cbs=()): learn.fit(n_epoch, lr, cbs=cbs)

def test_forty_single_changes_make_forty_other_runs(dls, photos):
    a,b = (NetworkTeacher(net_, teacher_norm=None) for net_ in (small(), small()))
    changes = [dict(n_epoch=2), dict(seed=1), dict(fit='fit_one_cycle'), dict(fit=constant), dict(fit=partial(constant, lr=.2)), dict(lr=2e-3), dict(lr=None),
               dict(model_fn=partial(create_model, 'wrn_16_1', 10)), dict(model_fn=partial(create_model, 'resnet14', 10)),
               dict(model_fn=partial(dropped, 0.)), dict(model_fn=partial(dropped, .9)), dict(bs=32), dict(settings=dict(note=1)), dict(settings=dict(opt=SGD)),
               dict(settings=dict(opt=lambda p, lr: SGD(p, lr, mom=0.))), dict(settings=dict(opt=lambda p, lr: SGD(p, lr, mom=.99))), dict(method=MixUp),
               dict(method=partial(MixUp, .3)), dict(method=Mine), dict(method=partial(Mine, gain=2.)), dict(method=None),
               dict(method=lambda: LsrKD(alpha=.2)), dict(method=partial(LsrKD, tau=2.)), dict(method=partial(LsrKD, gamma=.5)),
               dict(method=partial(LsrKD, alpha=lambda pct: .1)), dict(method=partial(LsrKD, alpha=lambda pct: .9)), dict(method=partial(LsrKD, alpha=weight(.5))),
               dict(method=lambda: Distill(UniformTeacher(), alpha=.1, tau=3.)), dict(method=lambda: Distill(UniformTeacher(), alpha=.1, tau=3., scale=1)),
               dict(method=lambda: Distill(UniformTeacher(), alpha=.1, tau=3., rewrite=TeacherCorrection(.5))), dict(method=lambda: Distill(a)), dict(method=lambda: Distill(b)),
               dict(method=lambda: Distill(lambda step: step.z.detach())), dict(method=lambda: Distill(lambda step: -step.z.detach())),
               dict(method=[LsrKD, MixUp]), dict(precision='bf16')]
    loaders = [kd_dataloaders('digits', bs=64, train_subset=127, device='cpu'), kd_dataloaders('digits', bs=64, train_subset=128, device='cpu', seed=1),
               kd_dataloaders('digits', bs=64, train_subset=128, device='cpu', augment=Augment(flip=True)), kd_dataloaders('digits', bs=60, train_subset=128, device='cpu')]
    digits = [run.rsplit('/')[-1] for run in [key(dls), *[key(dls, **change) for change in changes], *map(key, loaders)]]
    assert len(digits) == 41 and len(set(digits)) == 41, [n for n in range(41) if digits.count(digits[n]) > 1]

def test_twenty_ways_to_write_one_run(dls, tmp_path):
    ways = [dict(), dict(method=LsrKD()), dict(method=[LsrKD]), dict(method=(LsrKD(),)), dict(method=lambda: LsrKD()), dict(method=partial(LsrKD)),
            dict(method=partial(LsrKD, alpha=.1)), dict(method=partial(LsrKD, tau=3)), dict(method=lambda: [LsrKD(tau=3.)]),
            dict(method=partial(LsrKD, tau=np.float32(3))), dict(method=partial(LsrKD, tau=np.int64(3))), dict(method=partial(LsrKD, alpha=np.float64(.1))),
            dict(lr=.001), dict(lr=np.float64(1e-3)), dict(model_fn=lambda: create_model('resnet8', 10)), dict(model_fn=partial(create_model, 'resnet8', n_classes=10)),
            dict(bs=64), dict(out=tmp_path), dict(settings={}), dict(precision='32')]
    keys = [key(dls, **way) for way in ways] + [key(kd_dataloaders('digits', bs=64, train_subset=128, device='cpu'))]
    assert len(keys) == 21 and len(set(keys)) == 1, [i for i,k in enumerate(keys) if k != keys[0]]

def trained(dls, method=LsrKD, model_fn=small, n_epoch=1, seed=0, fit='fit', lr=1e-3, settings=None, out=None, **arm):
    campaign = Campaign({'baseline': Arm(), 'm': Arm(method, **arm)}, LearnerParts(dls, model_fn), n_epoch, [seed], fit, lr, out, settings=settings)
    record = campaign.train('m', seed)
    return campaign.runs['m', seed].key,{what: record[what] for what in ('last', 'best', 'history')}

def taught(): return Distill(NetworkTeacher(small_teacher, teacher_norm=None), alpha=.5)
torch.manual_seed(5)
small_teacher = nn.Sequential(nn.Flatten(), nn.Linear(192, 10))

@pytest.mark.parametrize('ways', [
    [dict(), dict(method=LsrKD()), dict(method=lambda: [LsrKD(tau=3.)]), dict(method=partial(LsrKD, alpha=np.float64(.1)), bs=64, lr=np.float64(1e-3))],
    [dict(method=MixUp), dict(method=[MixUp()]), dict(method=lambda: MixUp(.4))],
    [dict(method=taught), dict(method=lambda: Distill(NetworkTeacher(deepcopy(small_teacher).eval(), teacher_norm=None), alpha=(.5, .5)))][:1]*2,
    [dict(model_fn=partial(create_model, 'wrn_16_1', 10), fit='fit_one_cycle', seed=3), dict(model_fn=lambda: create_model('wrn_16_1', n_classes=10), fit='fit_one_cycle', seed=np.int64(3))]])
def test_runs_of_one_fingerprint_are_one_bit_for_bit(ways):
    "On loaders that were made anew, and whatever was drawn meanwhile"
    told = []
    for i,way in enumerate(ways):
        torch.rand(i), np.random.rand(i)
        told.append(trained(kd_dataloaders('digits', bs=64, train_subset=128, device='cpu', augment=Augment(flip=True, pad=1)), **way))
    assert len(told) > 1 and len({key for key,_ in told}) == 1
    for _,numbers in told[1:]: assert numbers == told[0][1]
    assert told[0][1]['history']['train_loss'][0] > 0

@pytest.mark.filterwarnings('ignore:the network says the same in both passes')
@pytest.mark.parametrize('arm', ['LsrKD', 'KD', 'MemoryReplay', 'SelfGuidance', 'RDrop', 'PSKD'])
def test_runs_of_one_fingerprint_are_one_for_methods_that_draw_and_remember(arm):
    from fastkdtf.all import KnowledgeDistillation, MemoryReplay, PSKD, RDrop, SelfGuidance
    make = dict(LsrKD=LsrKD, KD=partial(KnowledgeDistillation, small_teacher), MemoryReplay=partial(MemoryReplay, 2, interval_steps=1), SelfGuidance=SelfGuidance, RDrop=RDrop, PSKD=PSKD)[arm]
    a,b = (trained(kd_dataloaders('digits', bs=64, train_subset=128, device='cpu'), make, n_epoch=2) for _ in range(2))
    assert a == b

@pytest.mark.filterwarnings('ignore:.*training images too')
def test_a_folder_read_at_another_size_is_another_data_set(photos):
    assert len({str(fingerprint(kd_dataloaders(photos, size=size, bs=4, device='cpu'))) for size in (8, 32, 8)}) == 2

@pytest.mark.filterwarnings('ignore:.*training images too')
def test_records_name_the_machine_and_hold_no_path_and_no_user(photos, tmp_path, monkeypatch):
    import getpass, json
    from fastkdtf.all import CachedTeacher, KnowledgeDistillation, with_index
    dls = kd_dataloaders(photos, size=8, bs=4, device='cpu')
    two = lambda: nn.Sequential(nn.Flatten(), nn.Linear(192, 2))
    make = lambda: KnowledgeDistillation(CachedTeacher(two_teacher, tmp_path/'cache'))
    torch.manual_seed(1)
    two_teacher = two()
    torch.save(two_teacher.state_dict(), tmp_path/'weights.pth')
    from_file = [lambda path=path: KnowledgeDistillation(NetworkTeacher(path, arch=two())) for path in (tmp_path/'weights.pth', str(tmp_path/'weights.pth'))]
    campaign = Campaign({'baseline': Arm(), 'm': Arm(make), 'path': Arm(from_file[0]), 'text': Arm(from_file[1])}, LearnerParts(dls, two), 1, [0], 'fit', 1e-3, tmp_path/'out')
    campaign.compare()
    written = [path.read_text() for path in (tmp_path/'out').iterdir() if path.suffix in ('.jsonl', '.csv', '.html')]
    assert len(written) == 3
    for text in written:
        for private in (str(tmp_path), str(photos), str(Path.home())+os.sep, os.getcwd()): assert private not in text
    record = json.loads(written[[path.suffix for path in (tmp_path/'out').iterdir() if path.suffix in ('.jsonl', '.csv', '.html')].index('.jsonl')].splitlines()[0])
    assert record['device'] == 'cpu' and record['threads'] == torch.get_num_threads() and record['processor'] and str(torch.__version__).startswith(record['torch'])

def test_settings_are_one_however_their_numbers_and_paths_are_written(dls, tmp_path):
    (tmp_path/'imgs').mkdir(), (tmp_path/'x').mkdir()
    for a,b in [(3, 3.), (1, np.float32(1)), (tmp_path/'imgs', tmp_path/'x'/'..'/'imgs'), ((1, 2), [1, 2]), ({'a', 'b'}, {'b', 'a'})]:
        assert key(dls, settings=dict(x=a)) == key(dls, settings=dict(x=b))

def test_runs_of_a_campaign_that_keeps_nothing_may_hold_what_cannot_be_told(dls, tmp_path):
    file = open(os.devnull)
    def teacher(step): return step.z.detach()+len(file.name)
    assert key(dls, method=lambda: Distill(teacher))
    with pytest.raises(ValueError, match='cannot be told'): key(dls, method=lambda: Distill(teacher), out=tmp_path)

@hypothesis_settings(max_examples=40, deadline=None)
@given(st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.builds(Fraction, st.integers(), st.integers(1)),
                    lambda parts: st.lists(parts) | st.dictionaries(st.text(), parts) | st.builds(Cut, parts) | st.builds(Slotted, parts), max_leaves=8))
def test_a_copy_has_the_same_fingerprint_and_json_holds_it(x):
    words = fingerprint(x)
    assert settings_digest(dict(x=words)) == settings_digest(dict(x=fingerprint(deepcopy(x)))) == settings_digest(dict(x=fingerprint(words)))
