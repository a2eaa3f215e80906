"""The `fastkdtf` command: exit codes 0, 1, 2 and 130, one clear line for each mistake, and nothing lost in `--out`"""
import json, os, re, shlex, signal, subprocess, sys
from functools import partial
from pathlib import Path

import numpy as np, pandas as pd, pytest, torch
import matplotlib
matplotlib.use('agg')

import fastkdtf.lab.training
from fastkdtf.cli import main


pytestmark = pytest.mark.usefixtures('no_drawing')
script = Path(sys.executable).with_name('fastkdtf')
command = [str(script)] if script.exists() else [sys.executable, '-c', 'import sys; from fastkdtf.cli import main; sys.exit(main())']
env = {**os.environ, 'OMP_NUM_THREADS': '1', 'MPLBACKEND': 'agg'}


def arrays(n_train=60, n_test=24, k=3, size=8, seed=0):
    "Images whose brightness says the class, with noise"
    rng = np.random.default_rng(seed)
    def part(n):
        y = np.arange(n)%k
        return rng.integers(0, 60, (n, size, size, 3), dtype=np.uint8) + (y*60).astype(np.uint8)[:,None,None,None],y
    (a,b),(c,d) = part(n_train),part(n_test)
    return dict(train_images=a, train_labels=b, test_images=c, test_labels=d, class_names=np.array([f'class {i}' for i in range(k)]))

@pytest.fixture(scope='module')
def data(tmp_path_factory):
    path = tmp_path_factory.mktemp('data')/'tiny.npz'
    np.savez(path, **arrays())
    return path

TINY = ['--arch', 'resnet8', '--epochs', '1', '--seeds', '1', '--bs', '18', '--device', 'cpu']

def call(capsys, *args):
    "Exit code, output and error of one command, in this process"
    rc = main([str(o) for o in args])
    out,err = capsys.readouterr()
    return rc,out,err

def compare(capsys, data, out, *args): return call(capsys, 'compare', '--data', data, *TINY, '--out', out, *args)
def lines(out): return [json.loads(o) for o in (out/'results.jsonl').read_text().splitlines()]
def numbers(out): return {r['key']: {k: r[k] for k in ('last', 'best', 'history')} for r in lines(out)}

@pytest.fixture(scope='module')
def finished(tmp_path_factory, data):
    "A folder with a finished comparison of two runs"
    out = tmp_path_factory.mktemp('finished')
    assert main(['compare', '--data', str(data), *TINY, '--methods', 'LsrKD', '--no-controls', '--out', str(out)]) == 0
    return out

def forbidden(*args, **kwargs): raise AssertionError('something is trained')


# ---------------------------------------------------------------- compare

def test_compare(finished, data, capsys, monkeypatch):
    assert [r['method'] for r in lines(finished)] == ['baseline', 'LsrKD']
    s = lines(finished)[0]['settings']
    assert (s['data'], s['arch'], s['n_epoch'], s['bs'], s['lr'], s['n_classes']) == ('tiny', 'resnet8', 1, 18, .01, 3) and lines(finished)[0]['evaluated_on'] == 'test'
    assert list(pd.read_csv(finished/'table.csv').method) == ['baseline', 'LsrKD'] and (finished/'accuracy.png').exists() and (finished/'curves.png').exists()
    monkeypatch.setattr(fastkdtf.lab.training, 'train_run', forbidden)
    before = (finished/'results.jsonl').read_bytes()
    rc,out,err = compare(capsys, data, finished, '--methods', 'LsrKD', '--no-controls')
    assert rc == 0 and err == '' and (finished/'results.jsonl').read_bytes() == before
    for o in ('tiny, resnet8: 1 epochs', 'batch 18', 'baseline', 'LsrKD', 'last acc %', 'Δ last', 'NLL', 'ECE %', 's/epoch', 'table.csv', 'results.jsonl'): assert o in out, o

def test_compare_digits_with_every_method(tmp_path, capsys):
    rc,out,err = call(capsys, 'compare', '--arch', 'plain_cnn', '--epochs', 1, '--seeds', 1, '--train-subset', 20, '--bs', 20, '--out', tmp_path/'new'/'folder', '--device', 'cpu')
    assert rc == 0 and re.fullmatch(r'(precision \w+ would train .* faster here.*\n)?(run \d+ of 10, .+: accuracy \d+\.\d\d %, \d+\.\d s\n){10}', err)   # no terminal: a line for each run
    table = pd.read_csv(tmp_path/'new'/'folder'/'table.csv', index_col='method')
    assert {'baseline', 'LSR', 'LsrKD', 'LsrKD-TC', 'TfKDReg', 'TfKDReg-official'} < set(table.index)
    assert table.control_for.notna().sum() >= 3 and 'digits, plain_cnn' in out and (table.seeds == 1).all()
    assert lines(tmp_path/'new'/'folder')[0]['settings']['n_train'] == 20

def test_add_a_seed_and_a_method(finished, data, capsys, tmp_path):
    (tmp_path/'results.jsonl').write_bytes((finished/'results.jsonl').read_bytes())
    before = (tmp_path/'results.jsonl').read_bytes()
    rc,*_ = compare(capsys, data, tmp_path, '--methods', 'LsrKD,TfKDReg, baseline', '--no-controls', '--seeds', '2')
    assert rc == 0 and (tmp_path/'results.jsonl').read_bytes().startswith(before) and len(lines(tmp_path)) == 6

def test_another_file_of_the_same_name(finished, capsys, tmp_path):
    (tmp_path/'out').mkdir(), (tmp_path/'other').mkdir()
    (tmp_path/'out'/'results.jsonl').write_bytes((finished/'results.jsonl').read_bytes())
    np.savez(tmp_path/'other'/'tiny.npz', **arrays(seed=1))
    rc,*_ = compare(capsys, tmp_path/'other'/'tiny.npz', tmp_path/'out', '--methods', 'LsrKD', '--no-controls')
    assert rc == 0 and len(lines(tmp_path/'out')) == 4


# ---------------------------------------------------------------- mistakes

def npz(change):
    "Write the tiny arrays, changed, to a file"
    def write(folder):
        a = arrays()
        change(a)
        np.savez(folder/'bad.npz', **a)
    return write

def truncated(folder):
    np.savez(folder/'bad.npz', **arrays())
    whole = (folder/'bad.npz').read_bytes()
    (folder/'bad.npz').write_bytes(whole[:len(whole)//2])

def text(folder): (folder/'bad.npz').write_text('no images')
def folder_instead(folder): (folder/'bad.npz').mkdir()
def nothing(folder): pass

@pytest.mark.parametrize('write,why', [
    (nothing, 'no such file'), (truncated, 'truncated'), (text, 'truncated or not an .npz'), (folder_instead, 'bad.npz'),
    (npz(lambda a: a.pop('test_labels')), 'test_labels'),
    (npz(lambda a: a.update(train_images=a['train_images'][...,:2])), r'train_images must have shape .* not \[60, 8, 8, 2\]'),
    (npz(lambda a: a.update(train_images=a['train_images']/255)), 'train_images must be uint8'),
    (npz(lambda a: a.update(train_labels=a['train_labels'][:-1])), 'train_labels holds 59 labels for 60 images'),
    (npz(lambda a: a.update(test_labels=a['test_labels']+1)), r'test_labels\[2\] is 3'),
    (npz(lambda a: a.update(test_images=a['test_images'][:,:4])), 'one size')])
def test_bad_data_files(finished, capsys, monkeypatch, tmp_path, write, why):
    write(tmp_path)
    check_mistake(finished, capsys, monkeypatch, ['compare', '--data', str(tmp_path/'bad.npz'), *TINY, '--out', str(finished)], 'bad.npz.*'+why if why != 'bad.npz' else why)

def check_mistake(finished, capsys, monkeypatch, args, why):
    "Exit code 2, one line that says why, and the folder as it was"
    monkeypatch.setattr(fastkdtf.lab.training, 'train_run', forbidden)
    before = {o: o.read_bytes() for o in finished.rglob('*') if o.is_file()}
    rc,out,err = call(capsys, *args)
    assert rc == 2
    assert re.fullmatch(r'fastkdtf: [^\n]+\n', err) and re.search(why, err), err
    assert 'Traceback' not in out+err
    assert before == {o: o.read_bytes() for o in before}

@pytest.mark.parametrize('args,why', [
    (['--arch', 'resnet7x'], "resnet7x.*close names"), (['--arch', 'resnet21'], 'resnet21.*20'), (['--arch', ''], 'name'),
    (['--arch', 'resnt18', '--fit', 'fine_tune'], "resnt18.*close names: resnet18"), (['--arch', 'resnt18', '--pretrained'], "resnt18.*close names: resnet18"),
    (['--arch', 'resnet8', '--pretrained'], 'resnet8 --pretrained: there are no weights'), (['--train-subset', '1000'], 'train_subset=1000.*54'), (['--train-subset', '2'], 'train_subset=2.*3'), (['--train-subset', '0'], '--train-subset.*at least 1'),
    (['--bs', '500'], 'bs=500.*54'), (['--bs', '0'], '--bs'), (['--bs', '19', '--train-subset', '18'], 'bs=19.*18'),
    (['--seeds', '0'], '--seeds.*at least 1'), (['--seeds', 'two'], "--seeds.*'two' is not a whole number"), (['--epochs', '0'], '--epochs'), (['--epochs', '1.5'], '--epochs'),
    (['--lr', '0'], '--lr'), (['--lr', 'nan'], '--lr'), (['--lr', 'inf'], '--lr'), (['--lr', 'fast'], '--lr.*not a number'),
    (['--methods', 'LsrKD,Nonsense'], 'Nonsense is not one of LSR, LsrKD'), (['--methods', ''], '--methods'), (['--methods', ','], '--methods'),
    (['--device', 'abacus'], '--device abacus'), (['--colour'], '--colour'), (['--out'], '--out')])
def test_bad_arguments(finished, data, capsys, monkeypatch, args, why):
    check_mistake(finished, capsys, monkeypatch, ['compare', '--data', str(data), *TINY, '--out', str(finished), *args], why)

@pytest.mark.parametrize('args,why', [
    ([], 'COMMAND'), (['train'], "'train'"), (['describe'], 'method'), (['describe', 'Nonsense'], 'Nonsense is not one of'), (['describe', 'LsrKD', 'alpha'], "'alpha' is not of the form"),
    (['describe', 'LsrKD', 'alpha=2'], 'alpha must be in'), (['describe', 'LsrKD', 'alpha=big'], 'alpha must be a number'), (['describe', 'LsrKD', 'speed=2'], 'speed'),
    (['describe', 'TfKDReg', 'tau=0'], 'tau'), (['describe', 'TfKDReg', 'multiplier=5'], 'multiplier'), (['describe', 'LsrKD', '--classes', '1'], '--classes.*at least 2'),
    (['bench', '--arch', 'nonsense', '--rounds', '1', '--samples', '2', '--bs', '2', '--size', '8'], 'nonsense'), (['bench', '--rounds', '0'], '--rounds'),
    (['compare', '--data', 'nonsense'], "'nonsense' is not known.*digits"), (['compare', '--data', 'nowhere/cifar.npz'], 'nowhere/cifar.npz: no such file')])
def test_other_mistakes(finished, capsys, monkeypatch, tmp_path, args, why):
    monkeypatch.chdir(tmp_path)
    check_mistake(finished, capsys, monkeypatch, args, why)
    assert not list(tmp_path.iterdir()), 'nothing is made for a command that cannot run'

def test_out_is_a_file(finished, data, capsys, monkeypatch, tmp_path):
    (tmp_path/'file').write_text('mine')
    check_mistake(finished, capsys, monkeypatch, ['compare', '--data', str(data), *TINY, '--out', str(tmp_path/'file')], 'out must be a folder.*file')
    assert (tmp_path/'file').read_text() == 'mine'

def test_out_is_below_a_file(finished, data, capsys, monkeypatch, tmp_path):
    (tmp_path/'file').write_text('mine')
    check_mistake(finished, capsys, monkeypatch, ['compare', '--data', str(data), *TINY, '--out', str(tmp_path/'file'/'below')], 'file')

def test_damaged_results(finished, data, capsys, monkeypatch, tmp_path):
    good = (finished/'results.jsonl').read_text().splitlines()
    damaged = f'{good[0]}\n{good[1][:100]}\n{good[1]}\n'
    (tmp_path/'results.jsonl').write_text(damaged)
    check_mistake(finished, capsys, monkeypatch, ['compare', '--data', str(data), *TINY, '--out', str(tmp_path)], r'results\.jsonl, line 2 ')
    assert (tmp_path/'results.jsonl').read_text() == damaged

def test_results_is_a_folder(finished, data, capsys, monkeypatch, tmp_path):
    (tmp_path/'results.jsonl').mkdir()
    check_mistake(finished, capsys, monkeypatch, ['compare', '--data', str(data), *TINY, '--out', str(tmp_path)], 'results.jsonl')

def test_torn_last_line_is_trained_again(finished, data, capsys, tmp_path):
    good = (finished/'results.jsonl').read_bytes().splitlines(keepends=True)
    (tmp_path/'results.jsonl').write_bytes(good[0] + good[1][:200])
    rc,*_ = compare(capsys, data, tmp_path, '--methods', 'LsrKD', '--no-controls')
    assert rc == 0 and numbers(tmp_path) == numbers(finished) and (tmp_path/'results.jsonl').read_bytes().startswith(good[0])

@pytest.mark.skipif(not hasattr(os, 'geteuid') or os.geteuid() == 0, reason='root may write everywhere')
def test_read_only_folder(finished, data, capsys, monkeypatch, tmp_path):
    folder = tmp_path/'locked'
    folder.mkdir()
    folder.chmod(0o500)
    try: check_mistake(finished, capsys, monkeypatch, ['compare', '--data', str(data), *TINY, '--out', str(folder)], 'locked')
    finally: folder.chmod(0o700)


# ---------------------------------------------------------------- help, describe, bench

@pytest.mark.parametrize('name,defaults', [
    ('compare', dict(data='digits', arch='resnet20', methods='all', seeds=3, epochs=10, bs=128, lr=.01, out='kd_runs')),
    ('run', dict(seeds=3, scale='1.0', out='kd_runs', engine='local')), ('sweep', dict(grid='paper', seeds=1, out='kd_sweep')), ('report', dict(out='report.html')), ('describe', dict(classes=10)), ('bench', dict(samples=128, classes=100, arch='resnet20', bs=128, size=32, rounds=20))])
def test_help_mentions_defaults(capsys, name, defaults):
    with pytest.raises(SystemExit) as e: main([name, '--help'])
    assert e.value.code == 0
    text = ' '.join(capsys.readouterr().out.split())
    for option,value in defaults.items(): assert re.search(rf'--{option}\b.*?\(default: {value}\)', text), option
    if name == 'compare':
        for o in ('--train-subset', '--device', '--no-controls', 'train_images', 'LsrKD-TC', 'timm'): assert o in text, o

def test_help(capsys):
    with pytest.raises(SystemExit) as e: main(['--help'])
    assert e.value.code == 0
    out = capsys.readouterr().out
    assert all(o in out for o in ('compare', 'recipes', 'run', 'sweep', 'report', 'describe', 'bench', 'distillation'))

def test_describe(capsys):
    rc,out,err = call(capsys, 'describe', 'TfKDReg', 'alpha=.95', 'tau=40', 'variant=official', '--classes', 100)
    assert rc == 0 and err == '' and 'exact' in out
    for o in ('0.160', '0.0595', '0.010248', '100 classes', 'LS 0.16 ×0.0595'): assert o in out, o
    rc,out,_ = call(capsys, 'describe', 'TfKDReg', 'variant=official', 'multiplier=100', '--classes', 100)
    assert rc == 0 and '0.100 (exact)' in out and re.search(r'scale of the loss +1\n', out)

@pytest.mark.parametrize('args', [['LSR'], ['LsrKD'], ['LsrKD-TC'], ['TfKDReg'], ['TfKDReg-official'], ['ScaledCE', 'factor=2'], ['ScaledLS', 'epsilon=0.2'], ['LsrKD', 'gamma=None'], ['LSR', 'alpha=.3']])
def test_describe_each(capsys, args):
    rc,out,err = call(capsys, 'describe', *args)
    assert rc == 0 and err == '' and '10 classes' in out and 'scale of the loss' in out

@pytest.mark.filterwarnings('ignore:the network says the same in both passes')
@pytest.mark.filterwarnings('ignore:DIST correlates the samples')
def test_bench(capsys):
    rc,out,err = call(capsys, 'bench', '--samples', 4, '--classes', 5, '--rounds', 1, '--arch', 'resnet8', '--bs', 4, '--size', 8, '--device', 'cpu')
    assert rc == 0
    assert 'Losses, 4 × 5' in out and 'Training steps, resnet8, batch 4 of 8×8' in out and torch.__version__.split('+')[0] in out
    losses,steps = out.split('Training steps')
    for o in ('LSR', 'LsrKD', 'LsrKD-TC', 'TfKDReg', 'F.cross_entropy', 'memory / logits', 'time / composed'): assert o in losses, o
    for o in ('plain', 'LSR', 'LsrKD-TC', 'TfKDReg-official', 'time / plain', 'memory / plain'): assert o in steps, o
    assert re.search(r'plain +1\.0+ +1\.0+ +1\.0+ *\n', steps) and re.search(r'KD +\d', steps) and 'fasterai' in steps and re.search(r'KD, timm: losses of 5 steps differ from ours by \S+e-0[6-9]', steps)
    assert re.fullmatch(r'Medians of 1 interleaved round, in .+', out.splitlines()[-1])
    rc,out,_ = call(capsys, 'bench', '--samples', 4, '--classes', 5, '--rounds', 1, '--losses-only', '--device', 'cpu')
    assert rc == 0 and 'Training steps' not in out


# ---------------------------------------------------------------- recipes

def test_list_recipes(capsys):
    rc,out,err = call(capsys, 'recipes', '--paper', 'yuan2019', '--table', 'T8', '--method', 'TfKD_reg')
    assert rc == 0 and err == '' and out.splitlines()[-1] == '4 recipes, 4 that can be run'
    line, = [o for o in out.splitlines() if o.startswith('yuan2019/T8/MobileNetV2/TfKD_reg')]
    assert line.split()[1:] == ['accuracy', '70.88', '2.50', 'yes']

def test_recipes_by_pattern(capsys):
    rc,out,_ = call(capsys, 'recipes', 'yuan2019/T8/*/TfKD_reg', '--json')
    assert rc == 0 and [o['id'] for o in json.loads(out)['recipes']] == [f'yuan2019/T8/{o}/TfKD_reg' for o in ('MobileNetV2', 'ShuffleNetV2', 'ResNet18', 'GoogLeNet')]
    rc,out,_ = call(capsys, 'recipes', '--runnable', '--json')
    few,all_ = len(json.loads(out)['recipes']),len(json.loads(call(capsys, 'recipes', '--json')[1])['recipes'])
    assert 100 < few < all_

def test_one_recipe(capsys):
    rc,out,_ = call(capsys, 'recipes', 'yuan2019/T1/MobileNetV2/KD/from ResNet18')
    assert rc == 0 and '71.05 ± 0.16 (+2.67)' in out and 'ResNet18' in out and '@misc{yuan2019' in out
    rc,out,_ = call(capsys, 'recipes', 'yuan2019/T1/MobileNetV2/KD/from ResNet18', '--json')
    told = json.loads(out)
    assert rc == 0 and (told['value'], told['sd'], told['gain'], told['data'], told['runnable'], told['teacher_networks']) == (71.05, .16, 2.67, 'cifar100', True, ['resnet18'])
    assert told['schedule']['epochs'] == 200 and set(told['sources']) == set(told['settings'])


# ---------------------------------------------------------------- run

def recipe_record(**accs):
    "What `run_recipes` writes of a recipe on digits, with runs by method and seed"
    id = 'yuan2019/T8/MobileNetV2/TfKD_reg'
    runs = [dict(key=f'{name}/seed{s}', method=name, rank=0, seed=s, control_for=[], setting='made up', evaluated_on='test', last=dict(accuracy=a, nll=1., ece=.1), best=dict(accuracy=a), seconds_per_epoch=1.,
                 history=dict(train_loss=[1.], valid_loss=[1.], accuracy=[a]), callbacks=[]) for name,values in accs.items() for s,a in enumerate(values)]
    record = dict(key=id, recipe=id, data='digits', n_epoch=1, n_train=100, full=False, words='digits instead of cifar100, 1 of 200 epochs', runs={n: [r['key'] for r in runs if r['method'] == n] for n in accs},
                  method='TfKD_reg', baseline='baseline', controls=[], loading_share=None, full_hours=None)
    return record,runs

def made_up_reproduction(failures=()):
    from fastkdtf.lab.reproduction import Reproduction
    record,runs = recipe_record(baseline=[.5, .6], TfKD_reg=[.6, .71])
    return Reproduction([record], runs, failures)

@pytest.fixture
def asked(monkeypatch):
    "What `run` asks of `run_recipes`, which trains nothing"
    import fastkdtf.lab.experiment
    calls = []
    def run_recipes(ids, seeds=3, epochs=None, scale=1., data=None, path=None, out='kd_runs', engine='local', device=None, controls=True, retries=1, gpus=None, precision='32'):
        calls.append(dict(locals()))
        return made_up_reproduction(asked.failures)
    def asked(): return calls
    asked.failures = ()
    monkeypatch.setattr(fastkdtf.lab.experiment, 'run_recipes', run_recipes)
    return asked

def test_run(asked, capsys, tmp_path):
    rc,out,err = call(capsys, 'run', 'yuan2019/T8/MobileNetV2/TfKD_reg', '--out', tmp_path/'runs', '--device', 'cpu')
    call1, = asked()
    assert rc == 0 and err == '' and {k: call1[k] for k in ('ids', 'seeds', 'epochs', 'scale', 'data', 'path', 'out', 'engine', 'device', 'controls', 'gpus', 'precision')} == dict(
        ids=['yuan2019/T8/MobileNetV2/TfKD_reg'], seeds=3, epochs=None, scale=1., data=None, path=None, out=tmp_path/'runs', engine='local', device='cpu', controls=True, gpus=None, precision='32')
    assert 'shrunk: same sign' in out and re.fullmatch(r'1 recipe in .* s: .*reproduction.html, .*reproduction.md, .*reproduction.csv', out.splitlines()[-1])
    assert sorted(o.name for o in (tmp_path/'runs').iterdir()) == ['reproduction.csv', 'reproduction.html', 'reproduction.md']

def test_run_options(asked, capsys, tmp_path):
    rc,out,_ = call(capsys, 'run', 'yuan2019/T8/*/TfKD_reg', 'yuan2019/T8/ResNet18/*', '--seeds', 2, '--epochs', 5, '--scale', .05, '--data', 'digits', '--path', 'there', '--out', tmp_path, '--engine', 'ray', '--gpus', .5,
                    '--no-controls', '--json', '--precision', 'bf16')
    call1, = asked()
    nets = 'MobileNetV2 ShuffleNetV2 ResNet18 GoogLeNet'.split()
    assert rc == 0 and call1['ids'][:4] == [f'yuan2019/T8/{o}/TfKD_reg' for o in nets] and len(call1['ids']) == len(set(call1['ids'])) and set(call1['ids'][4:]) == {f'yuan2019/T8/ResNet18/{o}' for o in ('baseline', 'KD/from ResNet50', 'LSR')}
    assert [call1[k] for k in ('seeds', 'epochs', 'scale', 'data', 'path', 'engine', 'device', 'controls', 'gpus', 'precision')] == [2, 5, .05, 'digits', 'there', 'ray', None, False, .5, 'bf16']
    told = json.loads(out, parse_constant=lambda o: pytest.fail(f'{o} is not JSON'))
    assert told['failed'] == [] and told['table'][0]['recipe'] == 'yuan2019/T8/MobileNetV2/TfKD_reg' and told['table'][0]['full'] is False and abs(told['table'][0]['gain']-10.5) < 1e-6 and 'caption' in told

def test_a_pattern_takes_what_can_be_run(asked, capsys, tmp_path):
    assert call(capsys, 'run', 'song2023/T2/*', '--out', tmp_path, '--device', 'cpu')[0] == 0
    ids = asked()[0]['ids']
    assert ids and all(o.endswith('/EffDstl') for o in ids), 'the networks that are only compared with are left out'

def test_failed_runs_are_told(asked, capsys, tmp_path):
    asked.failures = [dict(run='TfKD_reg/seed1/0a', recipe='yuan2019/T8/MobileNetV2/TfKD_reg', name='TfKD_reg', seed=1, error='RuntimeError: out of\nmemory')]
    rc,out,err = call(capsys, 'run', 'yuan2019/T8/MobileNetV2/TfKD_reg', '--out', tmp_path, '--device', 'cpu')
    assert rc == 1 and err == 'fastkdtf: failed: TfKD_reg/seed1/0a: RuntimeError: out of memory\n' and 'shrunk' in out
    rc,out,err = call(capsys, 'run', 'yuan2019/T8/MobileNetV2/TfKD_reg', '--out', tmp_path, '--device', 'cpu', '--json')
    assert rc == 1 and json.loads(out)['failed'] == ['TfKD_reg/seed1/0a: RuntimeError: out of\nmemory']

def test_all_runs_failed(asked, capsys, tmp_path, monkeypatch):
    class RunsFailed(RuntimeError): failures = [dict(run='baseline/seed0/0a', recipe='r', error='ValueError: no'), dict(run='KD/seed0/0b', recipe='r', error='needs baseline')]
    def run_recipes(*args, **kwargs): raise RunsFailed('none')
    monkeypatch.setattr('fastkdtf.lab.experiment.run_recipes', run_recipes)
    rc,out,err = call(capsys, 'run', 'yuan2019/T8/MobileNetV2/TfKD_reg', '--out', tmp_path, '--device', 'cpu')
    assert rc == 1 and err.splitlines() == ['fastkdtf: failed: baseline/seed0/0a: ValueError: no', 'fastkdtf: failed: KD/seed0/0b: needs baseline'] and 'Traceback' not in out+err

def test_an_interrupted_run(asked, capsys, tmp_path, monkeypatch):
    def run_recipes(*args, **kwargs): raise KeyboardInterrupt
    monkeypatch.setattr('fastkdtf.lab.experiment.run_recipes', run_recipes)
    rc,_,err = call(capsys, 'run', 'yuan2019/T8/MobileNetV2/TfKD_reg', '--out', tmp_path, '--device', 'cpu')
    assert rc == 130 and err.splitlines()[-1] == 'fastkdtf: interrupted; the same command goes on from here'

def test_a_bug_is_not_a_mistake_of_the_user(asked, capsys, tmp_path, monkeypatch):
    def run_recipes(*args, **kwargs): raise RuntimeError('a bug')
    monkeypatch.setattr('fastkdtf.lab.experiment.run_recipes', run_recipes)
    with pytest.raises(RuntimeError, match='a bug'): main(['run', 'yuan2019/T8/MobileNetV2/TfKD_reg', '--out', str(tmp_path), '--device', 'cpu'])

def test_run_digits(capsys, tmp_path):
    args = ['run', 'wang2020/T1/ResNet20/LSR', '--data', 'digits', '--scale', '.05', '--epochs', '1', '--seeds', '2',
            '--no-controls', '--device', 'cpu', '--out', tmp_path]
    rc,out,err = call(capsys, *args)
    assert rc == 0, err
    assert '1 of 200 epochs' in out and 'digits instead of cifar100' in out and 'shrunk' in out
    before = (tmp_path/'results.jsonl').read_bytes()
    accs = {(r['method'], r['seed']): 100*r['best']['accuracy'] for r in lines(tmp_path)}
    assert set(accs) == {(m, s) for m in ('ResNet20 baseline', 'LSR') for s in (0, 1)} and len(lines(tmp_path)) == 4
    table = pd.read_csv(tmp_path/'reproduction.csv')
    gains = [accs['LSR', s]-accs['ResNet20 baseline', s] for s in (0, 1)]
    assert table.compatible.isna().all() and not table.full.any() and abs(table.gain[0]-np.mean(gains)) < 1e-6 and table.seeds[0] == 2
    assert call(capsys, *args)[0] == 0 and (tmp_path/'results.jsonl').read_bytes() == before, 'nothing is trained twice'
    rc,out,_ = call(capsys, 'report', tmp_path, '--out', tmp_path/'page.html')
    assert rc == 0 and out.startswith('Shrunk (1)') and (tmp_path/'page.csv').read_text() == (tmp_path/'reproduction.csv').read_text()


# ---------------------------------------------------------------- sweep

@pytest.fixture
def swept(monkeypatch):
    "What `sweep` is asked, which trains nothing"
    import fastkdtf.lab.sweep
    calls = []
    def sweep(recipe, dls=None, **kwargs):
        calls.append(dict(recipe=recipe.id, **kwargs))
        table = pd.DataFrame(dict(alpha=[.1, .5], error=[.2, .3]), index=pd.Index([0, 1], name='trial'))
        return type('Swept', (), dict(table=table, finished=table, parameters=['alpha'], best_settings=dict(alpha=.1), caption='Swept', __str__=lambda s: 'Swept'))()
    monkeypatch.setattr(fastkdtf.lab.sweep, 'sweep', sweep)
    return lambda: calls

def test_sweep(swept, capsys, tmp_path):
    rc,out,err = call(capsys, 'sweep', 'yuan2019/T8/MobileNetV2/LSR', '--out', tmp_path, '--device', 'cpu')
    assert rc == 0 and err == '' and re.fullmatch(r'2 trials in .* s, smallest error with alpha=0.1: .*sweep.csv, .*alpha.png', out.splitlines()[-1])
    assert swept() == [dict(recipe='yuan2019/T8/MobileNetV2/LSR', grid='paper', tpe=None, seeds=1, n_epoch=None, out=str(tmp_path), path=None, data=None, device='cpu', precision='32')]

def test_sweep_options(swept, capsys, tmp_path):
    base = ['sweep', 'yuan2019/T8/MobileNetV2/LSR', '--out', tmp_path, '--device', 'cpu', '--json']
    rc,out,_ = call(capsys, *base, '--grid', 'alpha=.1,.5', 'scale=tau2,1', 'interval=1/4,25', '--seeds', 2, '--epochs', 7, '--data', 'digits')
    assert rc == 0 and json.loads(out)['best'] == dict(alpha=.1) and [o['error'] for o in json.loads(out)['table']] == [.2, .3]
    assert swept()[0]['grid'] == dict(alpha=[.1, .5], scale=['tau2', 1], interval=[.25, 25]) and (swept()[0]['seeds'], swept()[0]['n_epoch'], swept()[0]['data']) == (2, 7, 'digits')
    assert call(capsys, *base, '--tpe', 9, '--grid', 'alpha=.01:.9:log', 'tau=1:20', 'n_copies=1,3')[0] == 0
    assert swept()[1]['tpe'] == 9 and swept()[1]['grid'] == dict(alpha=(.01, .9, 'log'), tau=(1, 20), n_copies=[1, 3])

def test_sweep_at_a_scale(swept, capsys, tmp_path, data):
    rc,*_ = call(capsys, 'sweep', 'yuan2019/T8/MobileNetV2/LSR', '--out', tmp_path, '--device', 'cpu', '--data', 'digits', '--scale', .1)
    from fastkdtf.vision.data import kd_dataloaders
    n = len(kd_dataloaders('digits', device='cpu').train_ds)
    assert rc == 0 and swept()[0]['n_epoch'] == 20 and swept()[0]['train_subset'] == max(80, round(.1*n))


# ---------------------------------------------------------------- mistakes about recipes

@pytest.mark.parametrize('args,why', [
    (['recipes', 'yuan2019/T8/MobileNet/LSR'], 'close ones: .*yuan2019/T8/MobileNetV2/LSR'), (['recipes', '--paper', 'hinton2015'], 'hinton2015.*yuan2019'), (['recipes', 'nothing/*'], r'nothing/\*: no recipe fits'),
    (['recipes', '--paper', 'song2023', '--table', 'T8'], 'T8.*no such result'), (['recipes', '--method', 'RKD', '--runnable'], 'no recipe with method=RKD can be run'), (['run'], 'ID'), (['run', 'yuan2019/T8/MobileNet/LSR'], 'close ones'), (['run', 'yuan2019/T99/*'], 'no recipe fits'),
    (['run', 'song2023/T2/GhostNet/as published'], 'cannot be run'), *[(['run', 'yuan2019/T8/MobileNetV2/LSR', *o], why) for o,why in (
        (['--scale', '0'], 'at least'), (['--scale', '1.5'], 'at most 1'), (['--seeds', '0'], 'at least 1'), (['--epochs', '0'], 'at least 1'), (['--engine', 'slurm'], 'slurm'), (['--device', 'abacus'], '--device abacus'),
        (['--gpus', '1'], 'gpus.*ray'), (['--colour'], '--colour'))],
    (['sweep', 'yuan2019/T8/MobileNetV2/nothing'], 'close ones'), (['sweep', 'yuan2019/T8/MobileNetV2/LSR', '--grid', 'alpha'], 'name=value'), (['sweep', 'yuan2019/T8/MobileNetV2/LSR', '--grid', 'alpha=.1,'], 'name=value'),
    (['sweep', 'yuan2019/T8/MobileNetV2/LSR', '--tpe', '0'], 'at least 1'), (['sweep', 'yuan2019/T8/MobileNetV2/baseline'], 'no grid'), (['sweep', 'yuan2019/T8/MobileNetV2/LSR', '--tpe', '3', '--grid', 'alpha=.9:.1'], 'low must be below high')])
def test_mistakes_about_recipes(finished, capsys, monkeypatch, tmp_path, args, why):
    monkeypatch.chdir(tmp_path)
    check_mistake(finished, capsys, monkeypatch, args, why)

def test_help_loads_nothing():
    code = """import sys
from fastkdtf.cli import main
for o in ('', 'recipes', 'run', 'sweep', 'report', 'compare'):
    try: main([*o.split(), '--help'])
    except SystemExit as e: assert e.code == 0
print(sorted({'torch', 'pandas', 'fastai', 'optuna', 'ray', 'matplotlib'} & set(sys.modules)))"""
    r = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, env=env)
    assert r.returncode == 0 and r.stdout.splitlines()[-1] == '[]', r.stderr


# ---------------------------------------------------------------- report, JSON

def test_report(finished, capsys, tmp_path, draws):
    rc,out,err = call(capsys, 'report', finished, '--out', tmp_path/'page.html')
    assert rc == 0 and err == '' and out.splitlines()[-1] == f"2 runs in 1 setting: {tmp_path/'page.html'}"
    page = (tmp_path/'page.html').read_text()
    assert 'LsrKD' in page and 'tiny, resnet8' in page

def test_report_of_recipes(capsys, tmp_path, finished, draws):
    record,runs = recipe_record(baseline=[.5, .6], TfKD_reg=[.6, .71])
    (tmp_path/'results.jsonl').write_text(''.join(json.dumps(o)+'\n' for o in runs))
    (tmp_path/'recipes.jsonl').write_text(json.dumps(record)+'\n')
    rc,out,err = call(capsys, 'report', tmp_path, finished, '--out', tmp_path/'page.html')
    assert rc == 0 and err == '' and out.startswith('Shrunk (1), where only the sign') and 'LsrKD' in out
    assert out.splitlines()[-1] == f"6 runs in 2 settings: {', '.join(str(tmp_path/f'page.{o}') for o in ('html', 'md', 'csv'))}"
    page = (tmp_path/'page.html').read_text()
    assert page.index('Paper against ours') < page.index('id="s0"') and 'tiny, resnet8' in page and 'yuan2019/T8/MobileNetV2/TfKD_reg' in (tmp_path/'page.md').read_text()
    assert abs(pd.read_csv(tmp_path/'page.csv').gain[0]-10.5) < 1e-6
    rc,out,_ = call(capsys, 'report', tmp_path, '--out', tmp_path, '--json')
    assert rc == 0 and json.loads(out)['file'] == str(tmp_path/'report.html') and len(json.loads(out)['files']) == 3 and json.loads(out)['recipes'][0]['sign'] == 'same'

def test_splits(capsys, data, tmp_path):
    rc,out,_ = compare(capsys, data, tmp_path, '--methods', 'LsrKD', '--no-controls', '--seeds', '2', '--splits', '2', '--json')
    told = json.loads(out)
    assert rc == 0 and '2 splits of the data and 2 seeds' in told['covers']
    assert len({json.dumps(r['settings']['split'], sort_keys=True) for r in lines(tmp_path)}) == 2

def test_report_of_nothing(capsys, tmp_path, finished, monkeypatch):
    check_mistake(finished, capsys, monkeypatch, ['report', str(tmp_path)], 'holds no results.jsonl')

@pytest.mark.parametrize('args,keys', [
    (['describe', 'TfKDReg'], {'epsilon', 'scale', 'controls', 'settings'}),
    (['bench', '--samples', '4', '--classes', '5', '--rounds', '1', '--losses-only', '--device', 'cpu'], {'machine', 'losses'}),
    (['report'], {'runs', 'settings', 'file'}), (['compare'], {'caption', 'table', 'runs', 'trained_now', 'files'})])
def test_json_is_all_there_is(finished, data, capsys, tmp_path, args, keys):
    extra = {'report': [finished, '--out', tmp_path/'page.html'], 'compare': ['--data', data, *TINY, '--out', tmp_path/'runs', '--methods', 'LSR', '--no-controls']}
    rc,out,_ = call(capsys, *args, *extra.get(args[0], []), '--json')
    told = json.loads(out, parse_constant=lambda o: pytest.fail(f'{o} is not JSON'))
    assert rc == 0 and keys <= set(told)
    if args[0] == 'report': told['table'] = told['comparisons'][0]['table']
    if args[0] in ('report', 'compare'):
        row = told['table'][1]
        assert row['seeds'] == 1 and 0 <= row['last'] <= 1 and row['low'] is None and abs(row['difference']-(row['last']-told['table'][0]['last'])) < 1e-9
        for one in told.get('comparisons', [told]):
            assert one['verdicts'][0]['rival'] == 'baseline' and one['verdicts'][0]['verdict'] == 'open' and one['headline'][0].endswith('(0 of 1).') and one['covers']
    if args[0] == 'compare': assert told['trained_now'] == told['runs'] == 2 and [r['method'] for r in told['table']] == ['baseline', 'LSR']


# ---------------------------------------------------------------- as processes

@pytest.mark.skipif(os.name == 'nt', reason='needs a shell')
def test_a_reader_that_stops():
    r = subprocess.run(['bash', '-c', 'set -o pipefail; "$@" describe LsrKD | true', '-', *command], capture_output=True, text=True, env=env)
    assert r.returncode in (0, 141) and r.stderr == ''

def test_a_mistake_as_a_process():
    r = subprocess.run([*command, 'compare', '--epochs', '0'], capture_output=True, text=True, env=env)
    assert r.returncode == 2 and r.stdout == '' and re.fullmatch(r'fastkdtf: .*--epochs.*\n', r.stderr)
    r = subprocess.run([*command, '--help'], capture_output=True, text=True, env=env)
    assert r.returncode == 0 and 'compare' in r.stdout and r.stderr == ''

def test_a_bad_file_makes_no_folder(tmp_path, capsys, monkeypatch):
    text(tmp_path)
    monkeypatch.chdir(tmp_path)
    rc,out,err = call(capsys, 'compare', '--data', 'bad.npz')
    assert rc == 2 and out == '' and err.startswith('fastkdtf: bad.npz: ') and err.count('\n') == 1
    assert [o.name for o in tmp_path.iterdir()] == ['bad.npz']

presses_ctrl_c = """
import os, signal
from pathlib import Path
from fastkdtf.callback.distill import LsrKD

class Presses(LsrKD):
    "Ctrl-C in the third epoch, once"
    def before_batch(self):
        super().before_batch()
        once = Path(__file__).with_name('pressed')
        if self.epoch < 2 or once.exists(): return
        once.touch()
        os.kill(os.getpid(), signal.SIGINT)
"""

@pytest.mark.skipif(os.name == 'nt', reason='needs SIGINT')
def test_ctrl_c_and_the_same_command_again(data, tmp_path, capsys):
    (tmp_path/'presses.py').write_text(presses_ctrl_c)
    args = ['compare', '--data', str(data), *TINY, '--epochs', '5', '--methods', f'{tmp_path/"presses.py"}:Presses', '--no-controls']
    out = tmp_path/'interrupted'
    heard = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)   # where the tests run in the background, Ctrl-C is ignored, and so by what they start
    p = subprocess.run([*command, *args, '--out', str(out)], capture_output=True, text=True, env=env, preexec_fn=heard)
    assert p.returncode == 130, p.stderr
    assert 'Traceback' not in p.stdout+p.stderr and p.stderr.splitlines()[-1] == 'fastkdtf: interrupted; the same command goes on from here'
    assert len(lines(out)) == 1 and list(out.glob('unfinished/*.pt')), 'the run under way is kept'
    rc,said,_ = call(capsys, *args, '--out', out)
    assert rc == 0 and 'continuing after epoch' in said
    assert call(capsys, *args, '--out', tmp_path/'undisturbed')[0] == 0
    assert numbers(out) == numbers(tmp_path/'undisturbed') and len(lines(out)) == 2 and not list(out.glob('unfinished/*.pt'))


# ---------------------------------------------------------------- your own photos, every method

@pytest.fixture(scope='module')
def photos(tmp_path_factory):
    "Photos of mixed sizes, some of them grey, in a folder for each of three classes"
    from PIL import Image
    rng,root = np.random.default_rng(0),tmp_path_factory.mktemp('photos')/'mine'
    for k,name in enumerate(('ash', 'birch', 'cedar')):
        (root/name).mkdir(parents=True)
        for i in range(14):
            h,w = rng.integers(9, 30, 2)
            pixels = rng.integers(0, 60, (h, w, 3)) + 90*k
            Image.fromarray(pixels.astype(np.uint8)).convert('L' if i % 5 == 0 else 'RGB').save(root/name/f'{i}.{"png" if i % 2 else "jpg"}')
    return root

OWN = """from fastkdtf.callback.distill import LsrKD
class Mine(LsrKD):
    "A method of one's own"
"""

def on_photos(photos, *args): return ['--data', photos, '--size', 8, '--arch', 'resnet8', '--epochs', 1, '--seeds', 1, '--bs', 9, '--device', 'cpu', *args]

def test_every_kind_of_method_on_photos_of_mixed_sizes(photos, capsys, tmp_path):
    (tmp_path/'own.py').write_text(OWN)
    methods = f'LsrKD,KD:alpha=.5,tau=2,MemoryReplay,SelfGuidance:lam=.5,TfKDSelf,WSL,CKM,EffDstl,{tmp_path/"own.py"}:Mine'
    rc,out,err = call(capsys, 'compare', *on_photos(photos, '--methods', methods, '--teacher', 'resnet14', '--epochs', 2, '--no-controls', '--out', tmp_path/'out', '--json'))
    assert rc == 0, err
    told = json.loads(out, parse_constant=lambda o: pytest.fail(f'{o} is not JSON'))
    rows = {row['method']: row for row in told['table']}
    assert list(rows) == ['teacher', 'baseline', 'LsrKD', 'KD(alpha=0.5, tau=2)', 'MemoryReplay', 'SelfGuidance(lam=0.5)', 'TfKDSelf', 'WSL', 'CKM', 'EffDstl', 'Mine']
    assert [name for name,row in rows.items() if row['teacher'] is not None] == ['KD(alpha=0.5, tau=2)', 'TfKDSelf', 'WSL', 'CKM', 'EffDstl']
    assert rows['KD(alpha=0.5, tau=2)']['teacher'] == rows['teacher']['best'] and told['caption'].startswith('mine, resnet8')
    assert len([line for line in err.splitlines() if line.startswith('run ')]) == len(rows), 'without a terminal a line for each run'
    assert not any(str(photos.parent) in json.dumps(r) for r in lines(tmp_path/'out')), 'a record holds no absolute path'

def test_photos_of_mixed_sizes_ask_for_a_size(photos, capsys, tmp_path):
    rc,out,err = call(capsys, 'compare', '--data', photos, *TINY, '--out', tmp_path/'out')
    assert rc == 2 and re.search(r'--size', err) and err.count('\n') == 1 and not (tmp_path/'out').exists()

def test_weights_in_a_file_teach(photos, capsys, tmp_path):
    from fastkdtf.vision.models import create_model
    torch.save(create_model('resnet14', 3).state_dict(), tmp_path/'teacher.pth')
    rc,out,err = call(capsys, 'compare', *on_photos(photos, '--methods', 'KD', '--teacher', tmp_path/'teacher.pth', '--teacher-arch', 'resnet14', '--no-controls', '--out', tmp_path/'out', '--json'))
    assert rc == 0, err
    assert [row['method'] for row in json.loads(out)['table']] == ['baseline', 'KD'] and json.loads(out)['table'][1]['teacher'] is not None

def test_fine_tune_freezes_a_torchvision_network_for_an_epoch(photos, capsys, tmp_path):
    rc,out,err = call(capsys, 'compare', *on_photos(photos, '--size', 32, '--arch', 'resnet18', '--fit', 'fine_tune', '--methods', 'LsrKD', '--no-controls', '--metric', 'error_rate', '--out', tmp_path/'out'))
    assert rc == 0, err
    for r in lines(tmp_path/'out'):
        assert len(r['history']['error_rate']) == 2 and r['settings']['fit'] == 'fine_tune' and r['settings']['arch'] == 'resnet18' and r['metric'] == 'error_rate'
        assert 'frozen' or r['settings']['n_trainable'] > 0

def test_tune_on_photos(photos, capsys, tmp_path):
    args = ['tune', 'KD:tau=2', '--grid', 'alpha=.3,.6', '--teacher', 'resnet14', *on_photos(photos, '--confirm', 1, '--out', tmp_path/'out')]
    rc,out,err = call(capsys, *args, '--json')
    assert rc == 0, err
    told = json.loads(out)
    assert told['best']['alpha'] in (.3, .6) and len(told['table']) == 2 and 'Chosen: alpha=' in told['verdict'] and {'baseline', 'teacher'} < {row['method'] for row in told['confirmed']}
    assert all(Path(file).exists() for file in told['files'])
    before = (tmp_path/'out'/'results.jsonl').read_bytes()
    assert call(capsys, *args)[0] == 0 and (tmp_path/'out'/'results.jsonl').read_bytes() == before

@pytest.mark.parametrize('args,why', [
    (['compare', '--methods', 'lsrkd'], 'did you mean LsrKD'), (['compare', '--methods', 'LsrKD,KD:alpha'], 'KD:alpha is not one of'), (['compare', '--methods', 'KD'], 'KD needs a teacher: give --teacher'),
    (['compare', '--methods', 'LsrKD:alpha=.1,alpha=.2'], 'alpha is given twice'), (['compare', '--methods', 'alpha=.1,LsrKD'], 'comes before the method'), (['compare', '--methods', 'nowhere.py:Mine'], 'nowhere.py: no such file'),
    (['compare', '--methods', 'KD', '--teacher', 'nowhere.pth'], 'nowhere.pth: no such file'), (['compare', '--data', 'nowhere/photos'], 'no such file or folder'), (['tune', 'Nonsense', '--grid', 'alpha=1'], 'Nonsense is not one of'),
    (['tune', 'LsrKD'], '--grid'), (['tune', 'LsrKD', '--grid', 'alpha'], 'name=value'), (['tune', 'LsrKD', '--grid', 'paper'], 'name=value'), (['tune', 'LsrKD', '--tpe', '3', '--grid', 'alpha=.1:.5:foo'], 'low:high'), (['describe', 'nonsense'], 'nonsense is not one of')])
def test_names_are_checked_before_pytorch_is_loaded(args, why, tmp_path):
    code = f"""import sys
from fastkdtf.cli import main
code = main({args!r})
print(code, sorted({{'torch', 'pandas', 'fastai', 'numpy'}} & set(sys.modules)))"""
    r = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, env=env, cwd=tmp_path)
    assert r.stdout.splitlines()[-1] == '2 []' and why in r.stderr and r.stderr.count('\n') == 1, r.stderr

def test_a_file_without_the_name_is_told_before_anything_is_loaded(tmp_path, capsys):
    (tmp_path/'own.py').write_text(OWN)
    rc,out,err = call(capsys, 'compare', '--methods', f'{tmp_path/"own.py"}:Other')
    assert rc == 2 and "defines no class or function 'Other': it has Mine, LsrKD" in err

def all_methods():
    from fastkdtf.names import method_names
    return list(method_names())

@pytest.mark.parametrize('name', all_methods())
def test_every_method_is_described(name, capsys):
    rc,out,err = call(capsys, 'describe', name)
    assert rc == 0 and err == '' and '10 classes' in out and 'hard term' in out
    assert call(capsys, 'describe', name, '--json')[0] == 0

@pytest.mark.parametrize('settings', [['tau=1e-3'], ['tau=1e308'], ['alpha=[1]'], ['alpha=None'], ['alpha=1e400'], ['tau={}'], ['tau=-1'], ['9=1'], ['alpha="x"']])
def test_settings_that_make_no_sense_are_one_line(settings, capsys):
    rc,out,err = call(capsys, 'describe', 'LsrKD', *settings)
    assert rc in (0, 2) and (rc == 0 or err.count('\n') == 1) and 'Traceback' not in out+err

@pytest.mark.parametrize('name', all_methods())
@pytest.mark.parametrize('setting', ['colour', 'teacher', 'n_classes', 'settings'])
def test_a_setting_that_a_method_does_not_have_is_one_line(name, setting, capsys, tmp_path):
    "What makes arms has arguments of its own, which are no settings of a method"
    said = f"there is no setting '{setting}'; choose from "
    rc,out,err = call(capsys, 'describe', name, f'{setting}=1')
    assert rc == 2 and err.startswith(f'fastkdtf: {name}: {said}') and err.count('\n') == 1
    assert not {'teacher', 'n_epoch'} & set(re.findall(r'\w+', err.partition('choose from')[2]))
    rc,out,err = call(capsys, 'compare', '--data', 'digits', '--methods', f'{name}:{setting}=1', '--teacher', 'resnet14', '--out', str(tmp_path/'out'))
    assert rc == 2 and f'{name}:{setting}=1: {said}' in err and err.count('\n') == 1 and not (tmp_path/'out').exists()

def test_every_command_in_the_documentation_is_one():
    "Names, options and their values; nothing is run"
    nbs = Path(__file__).parents[1]/'nbs'
    cells = [c for path in nbs.rglob('*.ipynb') for c in json.loads(path.read_text(encoding='utf-8'))['cells'] if c['cell_type'] == 'markdown']
    start = 'fastkdtf (?:compare|tune|recipes|run|report|sweep|bench|describe) '
    texts = [''.join(c['source']) for c in cells]
    lines = {o for text in texts for o in re.findall(f'(?:^ *|`)({start}[^`\n>&]+)', text, re.M) if '…' not in o}
    parser = fastkdtf.cli._parser()
    for line in lines: parser.parse_args(shlex.split(line)[1:])
    assert len(lines) > 20

def test_the_page_of_the_command_lists_every_option():
    import fastkdtf.cli
    page = json.loads((Path(__file__).parent.parent/'nbs'/'50_cli.ipynb').read_text())
    shown = ''.join(''.join(o.get('text', '')) for cell in page['cells'] for o in cell.get('outputs', ()))
    parser = fastkdtf.cli._parser()
    commands = next(action for action in parser._actions if hasattr(action, 'choices') and action.choices).choices
    options = {(name, option) for name,command in commands.items() for action in command._actions for option in action.option_strings}
    sections = {name: shown[shown.index(f'usage: fastkdtf {name} '):] for name in commands}
    assert len(options) > 60 and not [(name, option) for name,option in options if option not in sections[name].split('————')[0]]

def test_help_is_grouped_and_has_examples(capsys):
    with pytest.raises(SystemExit): main(['--help'])
    out = capsys.readouterr().out
    assert all(o in out for o in ('your own images:', "papers' results:", 'examples:', 'fastkdtf tune LsrKD'))
    with pytest.raises(SystemExit): main(['compare', '--help'])
    out = capsys.readouterr().out
    assert all(o in out for o in ('images:', 'network:', 'training:', 'examples:', '--pretrained', '--size', 'EffDstl'))
