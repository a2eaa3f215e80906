"""`run_recipes`: what is shrunk is said, what is shared is trained once, and interrupts, failures and several processes change no number"""
import json, os, signal, socket, subprocess, sys, time, traceback, warnings
from functools import partial
from pathlib import Path

import numpy as np, pytest, torch
import matplotlib
matplotlib.use('agg')
from fastai.basics import Callback
from fastai.distributed import DistributedDL
from torch import nn

import fastkdtf.lab.experiment, fastkdtf.lab.training
from fastkdtf.vision.data import kd_dataloaders
from fastkdtf.lab.experiment import *
from fastkdtf.lab.recipes import Recipe, recipe
from fastkdtf.lab.reproduction import Reproduction
from fastkdtf.callback.checkpoint import Checkpoint
from fastkdtf.lab.one_run import LearnerParts, train_run
from fastkdtf.lab.training import Campaign, Arm
from processes import needs_fork, processes

torch.set_num_threads(1)   # in child processes too: the numbers of a run depend on it

REG,SELF = 'yuan2019/T8/MobileNetV2/TfKD_reg','yuan2019/F4a/MobileNetV2/TfKD_self'
REKD,DEKD = 'yuan2019/T1/ResNet18/ReKD/from MobileNetV2','yuan2019/T4/cifar100/MobileNetV2/DeKD/from ResNet50'
IMAGENET,TINY = 'yuan2019/T6/ResNet18/TfKD_self','wang2020/T1/ResNet20/LsrKD'


# ---------------------------------------------------------------- small networks, few images

def small(name, n_classes):
    "A network of a few weights, others for another name"
    w = 4 + sum(map(ord, name))%8
    return nn.Sequential(nn.Conv2d(3, w, 3, 2), nn.BatchNorm2d(w), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(.1), nn.Linear(w, n_classes))

def small_fn(self, n_classes=None, data=None, name=None): return partial(small, name or self.network, n_classes)

@pytest.fixture
def small_networks(monkeypatch): monkeypatch.setattr(Recipe, 'model_fn', small_fn)

def quick(ids, out, **kwargs):
    "On few of the digits, two epochs"
    return run_recipes(ids, out=out, **{'seeds': 1, 'epochs': 2, 'scale': .1, 'data': 'digits', 'device': 'cpu', **kwargs})

def lines(out, name='results'): return [json.loads(o) for o in (Path(out)/f'{name}.jsonl').read_text().splitlines()]
def numbers(record): return {k: record[k] for k in ('last', 'best', 'history')}
def ledger_numbers(out):
    "Of every run, none of which may be there twice"
    records = lines(out)
    assert len({r['key'] for r in records}) == len(records)
    return {r['key']: numbers(r) for r in records}
def weights(out): return {f.relative_to(out).as_posix(): torch.load(f) for f in sorted(Path(out).glob('weights/*/*.pt'))}
def same_weights(a, b):
    a,b = weights(a),weights(b)
    assert a.keys() == b.keys() and a
    for k in a: assert all(torch.equal(v, b[k][name]) for name,v in a[k].items()), k

@pytest.fixture(scope='module')
def few(tmp_path_factory):
    "A file of 200 training and 50 test images of 10 classes, as CIFAR-10"
    rng = np.random.default_rng(0)
    file = tmp_path_factory.mktemp('few')/'few.npz'
    image = lambda n: rng.integers(0, 256, (n, 8, 8, 3), dtype=np.uint8)
    np.savez(file, train_images=image(200), train_labels=np.arange(200)%10, test_images=image(50), test_labels=np.arange(50)%10, class_names=np.array(list('abcdefghij')))
    return file


# ---------------------------------------------------------------- how much

@pytest.mark.parametrize('kwargs,n_epoch,subset,words', [
    (dict(), 200, None, '200 epochs, 50,000 images'),
    (dict(scale=.05), 10, 2500, '10 of 200 epochs, 2,500 of 50,000 images'),
    (dict(scale=.05, epochs=200), 200, 2500, '200 epochs, 2,500 of 50,000 images'),
    (dict(epochs=3), 3, None, '3 of 200 epochs, 50,000 images'),
    (dict(epochs=300), 300, None, '300 instead of 200 epochs, 50,000 images'),
    (dict(scale=.001), 1, 80, '1 of 200 epochs, 80 of 50,000 images, batches of 8 instead of 128 with learning rates in proportion'),   # ten batches
    (dict(scale=.001, n_classes=200), 1, 200,
     '1 of 200 epochs, 200 of 50,000 images, batches of 16 instead of 128 with learning rates in proportion'),   # an image of each class
    (dict(scale=.5, n_train=60, n_classes=10), 100, None,
     '100 of 200 epochs, 60 images, batches of 8 instead of 128 with learning rates in proportion')])   # not even ten batches
def test_scaled(kwargs, n_epoch, subset, words): assert scaled(recipe(REG), **kwargs) == dict(n_epoch=n_epoch, train_subset=subset, words=words)

def test_every_network_of_a_miniature_makes_ten_steps_an_epoch_and_the_rates_of_sgd_shrink_with_its_batch():
    r = recipe('yuan2019/T2/ResNeXt29/ReKD/from ResNet18')   # itself in batches of 64, its teacher of 128
    for n in (80, 200, 1000, 3000):
        small = with_enough_steps(r, n)
        teacher,own = small.schedule_of('ResNet18'),small.schedule
        assert n >= 10*teacher.bs and (teacher.bs, own.bs) == (128*small.batch_share, 64*small.batch_share)
        assert teacher.lr/teacher.bs == pytest.approx(.1/128) and own.lr/own.bs == pytest.approx(.05/64)
        assert with_enough_steps(small, n) == small
    assert with_enough_steps(r, 50_000) == r and with_enough_steps(r, 1280) == r
    adam = recipe('yuan2019/T2/Plain CNN/baseline')
    assert with_enough_steps(adam, 200).schedule.lr == adam.schedule.lr == .01 and with_enough_steps(adam, 200).schedule.bs == 16

def test_a_second_training_has_one_of_equal_length_without_the_method_and_all_its_controls_start_where_it_does():
    arms = recipe_arms(recipe('song2023/T4b/ResNet18/MEALV2/after EffDstl'), 10, 8, data='digits')
    method,without = arms['MEALV2'],arms['as long without it']
    assert without.method is None and without.control_for == ['MEALV2'] and not without.named
    assert (without.start, without.n_epoch, without.bs) == (method.start, method.n_epoch, method.bs) == ('EffDstl', None, method.bs)
    for name,arm in arms.items(): assert arm.start == 'EffDstl' or 'MEALV2' not in arm.control_for, name

def test_no_arm_of_a_miniature_makes_a_single_step_an_epoch(few, tmp_path):
    runs = RecipeRuns(Plan(IMAGENET, (0,), .001, data=str(few), out=str(tmp_path), device='cpu'), {})
    sizes = {name: arm.bs for name,arm in runs.campaign.arms.items()}
    assert len(sizes) > 2 and len(runs.dls.train_ds) >= 80 and all(len(runs.dls.train_ds)//bs >= 10 for bs in sizes.values())
    assert f"batches of {runs.dls.bs} instead of 512" in runs.words and not runs.full

def test_stages_have_an_epoch_each():
    r = recipe('song2023/T1/ResNet18/EffDstl')
    assert scaled(r, 1e-4)['n_epoch'] == 2
    with pytest.raises(ValueError, match='epochs must be at least 2'): scaled(r, epochs=1)

@pytest.mark.parametrize('scale', [0, -1, 1.5, float('nan'), 'half'])
def test_bad_scale(scale):
    with pytest.raises((ValueError, TypeError), match='scale'): scaled(recipe(REG), scale)

def test_steps_scale_too(small_networks):
    "60, 120 and 160 of 200 epochs are 3, 6 and 8 of 10"
    rates = []
    class Rates(Callback):
        def before_step(self): rates.append(self.opt.hypers[0]['lr'])
    r = recipe(REG)
    dls = r.dataloaders(data='digits', train_subset=256, device='cpu')
    train_run(None, 0, LearnerParts(dls, r.model_fn(10)), 10, r.fit, cbs=[Rates()])
    lr = r.schedule.lr*np.array([1]*3 + [.2]*3 + [.04]*2 + [.008]*2)
    assert np.allclose(np.array(rates).reshape(10, 2), lr[:,None], rtol=1e-12)

def runs_of(few, id='yuan2019/T2/ResNet18/baseline', **kwargs): return RecipeRuns(Plan(id, (0,), **{'path': str(few), 'device': 'cpu', 'out': None, **kwargs}), {})

def test_full_is_full(few, small_networks, monkeypatch):
    assert not runs_of(few).full   # the file has 200 images
    monkeypatch.setitem(fastkdtf.lab.experiment.set_sizes, 'cifar10', (200, 50))
    assert runs_of(few).full and runs_of(few).words == '200 epochs, 200 images'
    assert runs_of(few, epochs=200, scale=1).full
    for less in (dict(epochs=199), dict(epochs=201), dict(scale=.9), dict(scale=.9, epochs=200), dict(data=str(few), path=None)): assert not runs_of(few, **less).full, less
    monkeypatch.setitem(fastkdtf.lab.experiment.set_sizes, 'cifar10', (200, 51))
    assert not runs_of(few).full


# ---------------------------------------------------------------- what is trained

def test_record(few, small_networks, tmp_path):
    "What the record says, against the runs it names"
    kwargs = dict(data=None, path=few, scale=.7, epochs=3, seeds=2, out=tmp_path)
    result = run_recipes('yuan2019/T2/ResNet18/ReKD/from MobileNetV2', device='cpu', **kwargs)
    assert isinstance(result, Reproduction) and result.failures == [] and len(result.table) == 1
    r, = lines(tmp_path, 'recipes')
    runs = {o['key']: o for o in lines(tmp_path)}
    assert (r['recipe'], r['data'], r['metric'], r['full']) == ('yuan2019/T2/ResNet18/ReKD/from MobileNetV2', 'cifar10', 'accuracy', False)
    assert (r['n_epoch'], r['epochs'], r['n_train'], r['n_train_full'], r['words']) == (3, 200, 140, 50_000, '3 of 200 epochs, 140 of 200 images, batches of 8 instead of 128 with learning rates in proportion')
    assert (r['baseline'], r['method']) == ('ResNet18 baseline', 'ReKD') and list(r['runs'])[:3] == ['ResNet18 baseline', 'MobileNetV2 baseline', 'ReKD']
    assert r['controls'] == list(r['runs'])[3:] and r['controls']
    assert {k for o in r['runs'].values() for k in o} == runs.keys()
    for name,keys in r['runs'].items(): assert [(runs[k]['method'], runs[k]['seed']) for k in keys] == [(name, 0), (name, 1)]
    validation = lambda name: np.median([runs[k]['validation_seconds'] for k in r['runs'][name]])
    own = np.median([runs[k]['seconds_per_epoch'] for k in r['runs']['ReKD']])
    assert r['seconds_per_epoch'] == pytest.approx(own) and r['full_hours'] == pytest.approx((own*50_000/140 + validation('ReKD')*10_000/50)*200/3600)
    every = sum(np.median([runs[k]['seconds_per_epoch'] for k in keys])*50_000/140 + validation(name)*10_000/50 for name,keys in r['runs'].items())
    assert r['full_hours_of_all'] == pytest.approx(every*200/3600)
    assert r['loading_share'] == pytest.approx(sum(sum(o['loading_seconds']) for o in runs.values())/sum(sum(o['epoch_seconds']) for o in runs.values()))
    before = (tmp_path/'results.jsonl').read_bytes(),(tmp_path/'recipes.jsonl').read_bytes()
    run_recipes('yuan2019/T2/ResNet18/ReKD/from MobileNetV2', device='cpu', **kwargs)
    assert before == ((tmp_path/'results.jsonl').read_bytes(), (tmp_path/'recipes.jsonl').read_bytes())

def test_networks_are_trained_once(small_networks, tmp_path):
    "The same network of another recipe, as student or as teacher; whatever the order, the numbers are those of a recipe alone"
    ids = [REG, SELF, REKD]
    quick(ids, tmp_path/'all')
    names = [(r['method'], r['seed']) for r in lines(tmp_path/'all')]
    assert names.count(('MobileNetV2 baseline', 0)) == 1 and names.count(('ResNet18 baseline', 0)) == 1
    assert len(lines(tmp_path/'all', 'recipes')) == 3
    by_recipe = {o['recipe']: o['runs'] for o in lines(tmp_path/'all', 'recipes')}
    assert by_recipe[REG]['MobileNetV2 baseline'] == by_recipe[SELF]['MobileNetV2 baseline'] == by_recipe[REKD]['MobileNetV2 baseline']
    quick(REKD, tmp_path/'alone')
    alone,together = ledger_numbers(tmp_path/'alone'),ledger_numbers(tmp_path/'all')
    assert alone == {k: together[k] for k in alone}

@pytest.mark.parametrize('id', ['yuan2019/T2/ResNeXt29/ReKD/from ResNet18', 'wang2020/T1/ResNet56/LsrKD-TC', 'yuan2019/T8/MobileNetV2/LSR'])
@pytest.mark.parametrize('bs', [16, 64])
def test_a_method_its_baseline_and_its_controls_have_one_batch_size_which_makes_steps(id, bs):
    "Whatever batches the loaders have that a sweep is given, of 64 images"
    from fastkdtf.lab.experiment import recipe_campaign
    r,dls = recipe(id),kd_dataloaders('digits', bs, train_subset=64, device='cpu', valid_pct=.2)
    campaign = recipe_campaign(r, dls, [0], 1, None, controls=True, settings={}, data='digits')
    method = list(campaign.arms)[list(campaign.arms).index(campaign.baseline)+1:]
    sizes = {name: campaign.runs[name, 0].settings['bs'] for name in (campaign.baseline, *[name for name in method if 'baseline' not in name])}
    assert len(sizes) >= 2 and len(set(sizes.values())) == 1 and 2*min(sizes.values()) <= 64

def test_batch_sizes_of_networks(tmp_path):
    "A network with another batch size is trained as in a campaign of its own, under the same key"
    dls = lambda bs: kd_dataloaders('digits', bs, train_subset=256, device='cpu', valid_pct=0)
    arm = dict(keep='best', settings=dict(data='digits'))
    mixed = Campaign({'a': Arm(bs=64, **arm), 'b': Arm(**arm)}, LearnerParts(dls(128), partial(small, 'net', 10)), 2, 1, out=tmp_path/'mixed')
    for name,bs in (('a', 64), ('b', 128)):
        own = Campaign({name: Arm(**arm)}, LearnerParts(dls(bs), partial(small, 'net', 10)), 2, 1, out=tmp_path/name)
        assert mixed.runs[name, 0].key == own.runs[name, 0].key
        ours,theirs = (c.train(name, 0)['history'] for c in (mixed, own))
        assert ours['train_loss'] == theirs['train_loss'] and ours['accuracy'] == theirs['accuracy']
        assert ours['valid_loss'] == pytest.approx(theirs['valid_loss'], rel=1e-5)   # validated in batches of another size
    assert mixed.dls.bs == 128

def test_poor_teacher(small_networks, tmp_path):
    "50 of 200 epochs are 2 of 8, on the schedule of 8"
    quick(DEKD, tmp_path, epochs=8, controls=False)
    runs = {r['method']: r for r in lines(tmp_path)}
    assert list(runs) == ['MobileNetV2 baseline', 'ResNet50, epoch 2', 'DeKD']
    poor = runs['ResNet50, epoch 2']
    assert [len(runs[o]['history']['accuracy']) for o in runs] == [8, 2, 8] and runs['DeKD']['teacher_accuracy'] == poor['last']['accuracy']
    r,kept = with_enough_steps(recipe(DEKD), 144),[]
    class Keep(Callback):
        def after_epoch(self): kept.append({k: v.clone() for k,v in self.model.state_dict().items()})
    dls = r.dataloaders(data='digits', train_subset=144, device='cpu')
    whole = train_run(None, 0, LearnerParts(dls, partial(small, 'resnet50_4stage', 10)), 8, r.schedule_of('ResNet50').fit, cbs=[Keep()])
    assert whole['history']['train_loss'][:2] == poor['history']['train_loss']
    saved = torch.load(tmp_path/'weights'/'last'/f"{poor['key'].rsplit('/', 1)[1]}.pt")
    assert all(torch.equal(saved[k], v) for k,v in kept[1].items())

def test_one_epoch_is_the_least():
    e = recipe_arms(recipe(DEKD), 100, n_epoch=1)
    assert {k: o.n_epoch for k,o in e.items() if o.n_epoch} == {'MobileNetV2 baseline': 1, 'ResNet50, epoch 1': 1}

def test_own_teacher(small_networks, tmp_path):
    "Tf-KD_self is taught by the best weights of its baseline, beside which it has been trained twice as long"
    quick(SELF, tmp_path, epochs=3)
    runs = {r['method']: r for r in lines(tmp_path)}
    assert runs['TfKD_self']['teacher_accuracy'] == runs['MobileNetV2 baseline']['best']['accuracy']
    assert [o for o in runs if 'TfKD_self' in runs[o]['control_for']] == list(runs)[2:] and list(runs)[-1] == 'twice as long'
    assert ['start from', 'best weights of MobileNetV2 baseline'] in runs['twice as long']['description']
    quick(SELF, tmp_path/'none', epochs=3, controls=False)
    assert [r['method'] for r in lines(tmp_path/'none')] == ['MobileNetV2 baseline', 'TfKD_self']

def test_second_training_starts_where_the_first_ended():
    "MEAL V2 after Efficient Distillation: 80 epochs after 300"
    r = recipe('song2023/T4b/ResNet18/MEALV2/after EffDstl')
    e = recipe_arms(r, 10, 8, data='digits')
    assert e['MEALV2'].start == 'EffDstl' and e['EffDstl'].keep == 'last' and e['EffDstl'].n_epoch == 30

def test_other_images(tmp_path):
    "ImageNet's networks get a small stem, its teachers are trained on the images there are, and the record says so"
    r = recipe(IMAGENET)
    e = recipe_arms(r, 10, 2, data='digits')
    assert e['ResNet18 baseline'].model_fn.keywords == dict(small_images=True) and e['TfKD_self'].teacher == ['ResNet18 baseline']
    there = recipe_arms(r, 1000, 2)
    assert there['ResNet18 baseline'].model_fn.keywords == {} and not there['TfKD_self'].teacher
    assert there['TfKD_self'].method.args == ('timm/resnet18.tv_in1k',)
    runs = RecipeRuns(Plan(IMAGENET, (0,), .05, data='digits', out=str(tmp_path), device='cpu'), {})
    assert runs.words == ('digits instead of imagenet, 4 of 90 epochs, 80 of 1,438 images, '
                          'batches of 8 instead of 512 with learning rates in proportion') and not runs.full
    z = runs.campaign.arms['ResNet18 baseline'].model_fn().eval()(torch.zeros(2, 3, 8, 8))
    assert z.shape == (2, 10)

def test_other_images_have_no_full_run(small_networks, tmp_path):
    quick(REG, tmp_path)
    r, = lines(tmp_path, 'recipes')
    assert r['data'] == 'digits' and r['full_hours'] is None and r['words'] == ('digits instead of cifar100, 2 of 200 epochs, 144 of 1,438 images, '
        'batches of 8 instead of 128 with learning rates in proportion')


# ---------------------------------------------------------------- mistakes

def test_mistakes(tmp_path, few, monkeypatch):
    for error,match,kwargs in [(ValueError, 'is no recipe; close ones', dict(ids='yuan2019/T8/MobileNetV2/TfKDreg')), (ValueError, 'cannot be run', dict(ids='song2023/T2/ResNet18d/as published')),
        (ValueError, 'engine', dict(engine='cloud')), (ValueError, "gpus is Ray's", dict(gpus=.5)), (ValueError, 'seeds must be at least 1', dict(seeds=0)),
        (ValueError, 'out must be a folder', dict(out=few)), (ValueError, 'scale must be a share', dict(scale=1.1))]:
        with pytest.raises(error, match=match): quick(**{'ids': REG, 'out': tmp_path/'x', **kwargs})
    assert not (tmp_path/'x'/'results.jsonl').exists()
    monkeypatch.setitem(sys.modules, 'ray', None)
    with pytest.raises(ImportError, match='pip install ray'): quick(REG, tmp_path, engine='ray')


# ---------------------------------------------------------------- failures

@pytest.fixture
def failing(small_networks, monkeypatch):
    "Runs that raise: arm of the method's name → how often"
    left,seen,train = {},[],Campaign._train
    def _train(self, run, cbs):
        seen.append(run.arm)
        if left.get(run.arm, 0):
            left[run.arm] -= 1
            raise RuntimeError(f"no memory left for {run.arm}")
        return train(self, run, cbs)
    monkeypatch.setattr(Campaign, '_train', _train)
    return left,seen

def test_tried_again(failing, tmp_path):
    left,seen = failing
    left['TfKD_reg'] = 1
    result = quick(REG, tmp_path, controls=False)
    assert seen == ['MobileNetV2 baseline', 'TfKD_reg', 'TfKD_reg'] and result.failures == []
    fail, = lines(tmp_path, 'failures')
    assert (fail['recipe'], fail['name'], fail['seed'], fail['attempt'], fail['error']) == (REG, 'TfKD_reg', 0, 1, 'RuntimeError: no memory left for TfKD_reg')
    assert 'in _train' in fail['traceback'] and fail['run'] in [r['key'] for r in lines(tmp_path)]

def test_others_go_on(failing, tmp_path):
    "A teacher that fails takes its student with it, and nothing else"
    left,seen = failing
    left['MobileNetV2 baseline'] = 3
    with pytest.warns(UserWarning, match='2 of 7 runs failed'): result = quick([REKD, 'yuan2019/T8/ResNet18/TfKD_reg'], tmp_path, retries=2)
    assert seen.count('MobileNetV2 baseline') == 3 and 'ReKD' not in seen
    assert [(o['name'], o['error']) for o in result.failures] == [('MobileNetV2 baseline', 'RuntimeError: no memory left for MobileNetV2 baseline'),
        ('ReKD', f"needs {result.failures[0]['run']}, which failed")]
    assert [o['recipe'] for o in lines(tmp_path, 'recipes')] == ['yuan2019/T8/ResNet18/TfKD_reg'] and [o['attempt'] for o in lines(tmp_path, 'failures')] == [1, 2, 3]
    assert quick([REKD, 'yuan2019/T8/ResNet18/TfKD_reg'], tmp_path).failures == []   # what failed is made up for

def test_nothing_worked(failing, tmp_path):
    failing[0]['MobileNetV2 baseline'] = 99
    with pytest.raises(RuntimeError, match='no recipe has both .* no memory left for MobileNetV2 baseline'): quick(REG, tmp_path)

def test_interrupt(small_networks, monkeypatch, tmp_path):
    def interrupted(*args): raise KeyboardInterrupt
    monkeypatch.setattr(Campaign, '_train', interrupted)
    with pytest.raises(KeyboardInterrupt): quick(REG, tmp_path)
    assert not (tmp_path/'failures.jsonl').exists()


# ---------------------------------------------------------------- kill -9, several processes

THREE = dict(epochs=3, controls=False)   # three runs

def child(ids, out, kill_at=None, barrier=None, **kwargs):
    "Run in a process of its own, which kills itself when it saves its checkpoint for the n-th time"
    torch.set_num_threads(1)
    Recipe.model_fn,save,n = small_fn,Checkpoint._save,0
    def _save(self, *args, **kw):
        nonlocal n
        save(self, *args, **kw)
        n += 1
        if n == kill_at: os.kill(os.getpid(), signal.SIGKILL)
    Checkpoint._save = _save
    if barrier: barrier.wait(60)
    quick(ids, out, **kwargs)

def in_process(*args, **kwargs):
    p = processes.Process(target=child, args=args, kwargs=kwargs)
    p.start()
    return p

def ended(p):
    p.join(120)
    return p.exitcode

@pytest.fixture(scope='module')
def undisturbed(tmp_path_factory):
    out = tmp_path_factory.mktemp('undisturbed')
    assert ended(in_process([SELF, REG], out, **THREE)) == 0
    return out

@needs_fork
@pytest.mark.parametrize('kill_at', [3, 8, 11])   # a run saves 4 times: at the start and after each of its epochs
def test_killed(kill_at, undisturbed, tmp_path, small_networks, capfd):
    assert ended(in_process([SELF, REG], tmp_path, kill_at, **THREE)) == -signal.SIGKILL
    there = len(lines(tmp_path)) if (tmp_path/'results.jsonl').exists() else 0
    assert there == (kill_at-1)//4
    epoch = (kill_at-1)%4
    capfd.readouterr()
    quick([SELF, REG], tmp_path, **THREE)
    assert capfd.readouterr().out.count(f'continuing after epoch {epoch} of 3') == (epoch in (1, 2))
    assert ledger_numbers(tmp_path) == ledger_numbers(undisturbed) and not list((tmp_path/'unfinished').glob('*.pt'))
    same_weights(tmp_path, undisturbed)
    assert all(len(r['epoch_seconds']) == 3 for r in lines(tmp_path))

@needs_fork
def test_killed_while_writing(undisturbed, tmp_path, small_networks):
    "Half a line, as an interrupt may leave it"
    quick([SELF], tmp_path, **THREE)
    ledger = tmp_path/'results.jsonl'
    ledger.write_bytes(ledger.read_bytes()[:-40])
    quick([SELF, REG], tmp_path, **THREE)
    assert ledger_numbers(tmp_path) == ledger_numbers(undisturbed)

@needs_fork
def test_two_processes_on_one_folder(undisturbed, tmp_path):
    "Two recipes that share a network, at the same time"
    barrier = processes.Barrier(2)
    ps = [in_process(o, tmp_path, barrier=barrier, **THREE) for o in ([SELF, REG], [REG])]
    assert [ended(p) for p in ps] == [0, 0]
    assert ledger_numbers(tmp_path) == ledger_numbers(undisturbed)
    same_weights(tmp_path, undisturbed)
    assert sorted(o['recipe'] for o in lines(tmp_path, 'recipes')) == sorted([SELF, REG])


# ---------------------------------------------------------------- Ray

RAY = '''
import os, signal, sys, threading, time, warnings
warnings.filterwarnings('ignore')
os.environ['RAY_USAGE_STATS_ENABLED'] = '0'
from pathlib import Path
import ray
from fastkdtf.lab.experiment import run_recipes
out,ids,kill = Path(sys.argv[1]),sys.argv[2].split(';'),sys.argv[3]

def workers():
    "Processes under this one that train"
    parents,names = {},{}
    for o in Path('/proc').iterdir():
        try:
            if o.name.isdigit(): parents[int(o.name)],names[int(o.name)] = int((o/'stat').read_text().rsplit(')', 1)[1].split()[1]),(o/'cmdline').read_text()
        except OSError: pass
    def mine(pid): return pid == os.getpid() or pid in parents and mine(parents[pid])
    return [pid for pid,name in names.items() if name.startswith('ray::_ray_run') and mine(pid)]

def shoot():
    "Wait until an epoch of a run is saved, then kill"
    first = {}
    while True:
        for f in (out/'unfinished').glob('*.pt'):
            stat = f.stat().st_mtime_ns if f.exists() else 0
            if stat and first.setdefault(f, stat) != stat: os.kill(os.getpid() if kill == 'all' else workers()[0], signal.SIGKILL); return
        time.sleep(.005)

ray.init(address='local', num_cpus=1 if kill == 'all' else 2, include_dashboard=False, object_store_memory=80*2**20, log_to_driver=False, logging_level='ERROR')
print('started', flush=True)
if kill != 'none': threading.Thread(target=shoot, daemon=True).start()
result = run_recipes(ids, seeds=2, epochs=5, scale=.01, data='digits', out=out, engine='ray', controls=False, device='cpu')
print('failures:', result.failures)
'''

def on_ray(out, ids, kill='none'):
    env = {**os.environ, 'OMP_NUM_THREADS': '1', 'RAY_worker_niceness': '0'}   # else workers wait for all other tests
    return subprocess.run([sys.executable, '-c', RAY, str(out), ';'.join(ids), kill], env=env, capture_output=True, text=True, timeout=500)

@pytest.mark.skipif(not sys.platform.startswith('linux'), reason='reads /proc')
def test_ray_killed(tmp_path):
    "The whole job, then one worker of its second try; the outcome is that of one process that was left alone"
    pytest.importorskip('ray')
    killed = on_ray(tmp_path/'ray', [TINY], 'all')
    if 'started' not in killed.stdout: pytest.skip(f"Ray cannot start here: {killed.stderr.strip().splitlines()[-1:]}")
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    done = ledger_numbers(tmp_path/'ray') if (tmp_path/'ray'/'results.jsonl').exists() else {}
    assert len(done) < 4 and list((tmp_path/'ray'/'unfinished').glob('*.pt'))
    again = on_ray(tmp_path/'ray', [TINY], 'one')
    assert again.returncode == 0 and 'failures: []' in again.stdout, again.stderr
    run_recipes(TINY, seeds=2, epochs=5, scale=.01, data='digits', out=tmp_path/'here', controls=False, device='cpu')
    assert ledger_numbers(tmp_path/'ray') == ledger_numbers(tmp_path/'here')
    same_weights(tmp_path/'ray', tmp_path/'here')
    assert len(lines(tmp_path/'ray', 'recipes')) == 1


def test_plans_make_each_network_once_and_without_weights(tmp_path, monkeypatch):
    made = []
    def counted(name, n_classes):
        net = small(name, n_classes)
        made.append((name, net[0].weight.device.type))
        return net
    monkeypatch.setattr(Recipe, 'model_fn', lambda self, n_classes=None, data=None, name=None: partial(counted, name or self.network, n_classes))
    loaders,keys = {},[]
    for id in (REG, SELF, REG):
        runs = RecipeRuns(Plan(id, (0, 1), .1, 2, 'digits', None, str(tmp_path), 'cpu'), loaders).campaign.runs
        keys.append([run.key for run in runs.values()])
    assert made == [('mobilenetv2', 'meta')] and keys[0] == keys[2] and set(keys[0]) & set(keys[1])

# ---------------------------------------------------------------- several processes for one run

def part(rank, port, out, extra=''):
    "One of two processes of a run, without a launcher; on the CPU, where fastai's loader asks for CUDA"
    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR='127.0.0.1', MASTER_PORT=str(port), RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE='2')
    def _broadcast(self, t, rank):
        t = torch.LongTensor(t)
        torch.distributed.broadcast(t, rank)
        return t.tolist()
    DistributedDL._broadcast,Recipe.model_fn,seen = _broadcast,small_fn,[]
    fit = DistributedLearner.fit
    def watched(self, *args, **kwargs):
        fit(self, *args, **kwargs)
        seen.append(dict(bs=self.dls.bs, steps=len(self.recorder.losses), weights={k: v.clone() for k,v in self.model.state_dict().items()}))
    DistributedLearner.fit = watched
    try:
        for _ in range(2): result = quick(SELF, out, epochs=3, controls=False)   # the second time nothing is trained
        torch.save((seen, [r['method'] for r in result.runs]), f'{out}/{rank}.pth')
        torch.distributed.destroy_process_group()
    except BaseException:
        Path(f'{out}/{rank}.error').write_text(traceback.format_exc())
        raise

@needs_fork
@pytest.mark.skipif(not (torch.distributed.is_available() and torch.distributed.is_gloo_available()), reason='needs gloo')
def test_two_processes_for_one_run(tmp_path):
    "Equal weights at both, half of each batch at each, and one of them writes"
    pytest.importorskip('accelerate')
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        port = s.getsockname()[1]
    ps = [processes.Process(target=part, args=(rank, port, str(tmp_path))) for rank in range(2)]
    for p in ps: p.start()
    for p in ps: p.join(200)
    for p in ps:
        if p.is_alive(): p.kill()
    errors = [f.read_text() for f in tmp_path.glob('*.error')]
    assert not errors, errors[0]
    (a,names),(b,others) = (torch.load(tmp_path/f'{rank}.pth') for rank in range(2))
    assert names == others == ['MobileNetV2 baseline', 'TfKD_self'] and len(a) == len(b) == 2
    trained = lambda w: {k: v for k,v in w.items() if 'running' not in k}
    for o,p in zip(a, b):
        assert o['bs'] == p['bs'] == 4 and o['steps'] == p['steps'] == 3*18   # batches of 8 of 144 images
        for k,v in trained(o['weights']).items(): assert torch.equal(v, p['weights'][k]), k
    runs = {r['method']: r for r in lines(tmp_path)}
    assert list(runs) == names and len(lines(tmp_path, 'recipes')) == 1 and not list((tmp_path/'unfinished').glob('*.pt'))
    assert runs['TfKD_self']['teacher_accuracy'] == runs['MobileNetV2 baseline']['best']['accuracy']
    kept, = weights(tmp_path).values()
    assert not any(k.startswith('module.') for k in kept)

def test_shares_of_a_batch(monkeypatch):
    dls = kd_dataloaders('digits', 129, train_subset=256, device='cpu')
    monkeypatch.setattr(fastkdtf.lab.experiment, 'num_distrib', lambda: 3)
    assert distributed_learner(dls, nn.Linear(1, 1)).dls.train.bs == 43
    monkeypatch.setattr(fastkdtf.lab.experiment, 'num_distrib', lambda: 2)
    with pytest.raises(ValueError, match='129 cannot be shared out equally among 2'): distributed_learner(dls, nn.Linear(1, 1))
    with pytest.raises(ValueError, match='accelerate launch'): quick(REG, 'nowhere', engine='ray')
