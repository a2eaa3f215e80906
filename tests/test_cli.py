"""The `fastkdtf` command: exit codes 0, 2 and 130, one clear line for each mistake, and nothing lost in `--out`"""
import json, os, re, signal, subprocess, sys, time
from pathlib import Path

import numpy as np, pandas as pd, pytest, torch
import matplotlib
matplotlib.use('agg')

import fastkdtf.training
from fastkdtf.cli import main


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
    monkeypatch.setattr(fastkdtf.training, 'train_run', forbidden)
    before = (finished/'results.jsonl').read_bytes()
    rc,out,err = compare(capsys, data, finished, '--methods', 'LsrKD', '--no-controls')
    assert rc == 0 and err == '' and (finished/'results.jsonl').read_bytes() == before
    for o in ('tiny, resnet8: 1 epochs', 'batch 18', 'baseline', 'LsrKD', 'last acc %', 'Δ last', 'NLL', 'ECE %', 's/epoch', 'table.csv', 'results.jsonl'): assert o in out, o

def test_compare_digits_with_every_method(tmp_path, capsys):
    rc,out,err = call(capsys, 'compare', '--arch', 'plain_cnn', '--epochs', 1, '--seeds', 1, '--train-subset', 20, '--bs', 20, '--out', tmp_path/'new'/'folder', '--device', 'cpu')
    assert rc == 0 and err == ''
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
    monkeypatch.setattr(fastkdtf.training, 'train_run', forbidden)
    before = {o: o.read_bytes() for o in finished.rglob('*') if o.is_file()}
    rc,out,err = call(capsys, *args)
    assert rc == 2
    assert re.fullmatch(r'fastkdtf: [^\n]+\n', err) and re.search(why, err), err
    assert 'Traceback' not in out+err
    assert before == {o: o.read_bytes() for o in before}

@pytest.mark.parametrize('args,why', [
    (['--arch', 'resnet7x'], "resnet7x.*close names"), (['--arch', 'resnet21'], 'resnet21.*20'), (['--arch', ''], 'name'),
    (['--train-subset', '1000'], 'train_subset=1000.*54'), (['--train-subset', '2'], 'train_subset=2.*3'), (['--train-subset', '0'], '--train-subset.*at least 1'),
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
    ('describe', dict(classes=10)), ('bench', dict(samples=128, classes=100, arch='resnet20', bs=128, size=32, rounds=20))])
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
    assert all(o in out for o in ('compare', 'describe', 'bench', 'distillation'))

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

def test_bench(capsys):
    rc,out,err = call(capsys, 'bench', '--samples', 4, '--classes', 5, '--rounds', 1, '--arch', 'resnet8', '--bs', 4, '--size', 8, '--device', 'cpu')
    assert rc == 0
    assert 'Losses, 4 × 5' in out and 'Training steps, resnet8, batch 4 of 8×8' in out and torch.__version__ in out
    losses,steps = out.split('Training steps')
    for o in ('LSR', 'LsrKD', 'LsrKD-TC', 'TfKDReg', 'F.cross_entropy', 'memory / logits', 'time / composed'): assert o in losses, o
    for o in ('plain', 'LSR', 'LsrKD-TC', 'TfKDReg-official', 'time / plain', 'memory / plain'): assert o in steps, o
    assert re.search(r'plain +1\.0+ +1\.0+ *\n', steps) and re.search(r'KD +\d', steps) and 'fasterai' in steps
    assert re.fullmatch(r'Medians of 1 interleaved round, in .+', out.splitlines()[-1])
    rc,out,_ = call(capsys, 'bench', '--samples', 4, '--classes', 5, '--rounds', 1, '--losses-only', '--device', 'cpu')
    assert rc == 0 and 'Training steps' not in out


# ---------------------------------------------------------------- report, JSON

def test_report(finished, capsys, tmp_path):
    rc,out,err = call(capsys, 'report', finished, '--out', tmp_path/'page.html')
    assert rc == 0 and err == '' and out.splitlines()[-1] == f"2 runs in 1 setting: {tmp_path/'page.html'}"
    page = (tmp_path/'page.html').read_text()
    assert 'LsrKD' in page and 'tiny, resnet8' in page

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

def test_a_bad_file_as_a_process(tmp_path):
    text(tmp_path)
    r = subprocess.run([*command, 'compare', '--data', 'bad.npz'], capture_output=True, text=True, env=env, cwd=tmp_path)
    assert r.returncode == 2 and 'Traceback' not in r.stderr and r.stderr.splitlines()[-1].startswith('fastkdtf: bad.npz: ')
    assert [o.name for o in tmp_path.iterdir()] == ['bad.npz']

@pytest.mark.skipif(os.name == 'nt', reason='needs SIGINT')
def test_ctrl_c_and_the_same_command_again(data, tmp_path, capsys):
    args = ['compare', '--data', str(data), *TINY, '--epochs', '20', '--methods', 'LsrKD', '--no-controls']
    out = tmp_path/'interrupted'
    p = subprocess.Popen([*command, *args, '--out', str(out)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env)
    deadline = time.monotonic()+120
    while not list(out.glob('unfinished/*.pt')) and p.poll() is None and time.monotonic() < deadline: time.sleep(.01)
    time.sleep(.1)
    p.send_signal(signal.SIGINT)
    stdout,stderr = p.communicate(timeout=60)
    assert p.returncode == 130, stderr
    assert 'Traceback' not in stdout+stderr and stderr.splitlines()[-1] == 'fastkdtf: interrupted; the same command goes on from here'
    assert not (out/'results.jsonl').exists() or len(lines(out)) < 2
    assert list(out.glob('unfinished/*.pt')), 'the run under way is kept'
    rc,said,_ = call(capsys, *args, '--out', out)
    assert rc == 0 and 'continuing after epoch' in said
    assert call(capsys, *args, '--out', tmp_path/'undisturbed')[0] == 0
    assert numbers(out) == numbers(tmp_path/'undisturbed') and len(lines(out)) == 2 and not list(out.glob('unfinished/*.pt'))
