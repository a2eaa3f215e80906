"""Processes that are killed at any moment, and started again: the results are those of one that was not, and nothing is left over

As a program: `python tests/kills.py FOLDER 12` kills each task at twelve random moments, and prints what was left or other;
`python tests/kills.py FOLDER .3,.6 cache stages` kills at these parts of their steps."""
import json, os, random, shutil, signal, sys, time, warnings
from functools import partial
from pathlib import Path

import matplotlib
matplotlib.use('agg')
import numpy as np
import torch
from fastai.basics import Callback, CrossEntropyLossFlat, Learner, accuracy
from torch import nn

import fastkdtf.all as kd
from fastkdtf.cli import main
from fastkdtf.lab.runs import Ledger
from fastkdtf.callback.checkpoint import seed_run
from fastkdtf.teachers.cache import LogitStore

torch.set_num_threads(1)
recipe = 'wang2020/T1/ResNet20/LsrKD'

def images(folder):
    "A small data set, in which brightness says the class"
    rng = np.random.default_rng(0)
    def part(n):
        y = np.arange(n)%3
        return rng.integers(0, 60, (n,8,8,3), dtype=np.uint8) + (y*60).astype(np.uint8)[:,None,None,None],y
    (a,b),(c,d) = part(60),part(24)
    np.savez(folder/'tiny.npz', train_images=a, train_labels=b, test_images=c, test_labels=d, class_names=np.array(list('abc')))
    return str(folder/'tiny.npz')

def command(*args):
    rc = main(list(args))
    if rc: raise SystemExit(rc)

def compare(data, out): command('compare', '--data', data, '--arch', 'plain_cnn', '--epochs', '3', '--seeds', '2', '--bs', '18', '--device', 'cpu', '--methods', 'LsrKD', '--out', str(out))
def run(data, out):     command('run', recipe, '--data', 'digits', '--scale', '.01', '--epochs', '1', '--seeds', '1', '--device', 'cpu', '--no-controls', '--out', str(out))
def sweep(data, out):   command('sweep', recipe, '--data', 'digits', '--scale', '.01', '--epochs', '1', '--device', 'cpu', '--grid', 'alpha=.1,.3', '--out', str(out))

def learner(data, bs=6):
    dls = kd.kd_dataloaders(data, bs=bs, device='cpu')
    seed_run(3, dls)
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 16), nn.ReLU(), nn.Linear(16, 3))
    learn = Learner(dls, model, loss_func=CrossEntropyLossFlat(), metrics=accuracy)
    return learn

def cache(data, out):
    out.mkdir(exist_ok=True)
    seed_run(1)
    teacher = nn.Sequential(nn.Flatten(), nn.Linear(192, 3))
    LogitStore.chunk = 200   # bytes: a write for every few rows
    cached = kd.CachedTeacher(teacher, out/'logits')
    learn = learner(data)
    with learn.no_bar(): cached.fill(learn)
    if not (out/'results.jsonl').exists(): Ledger(out/'results.jsonl').append(dict(key='cache', rows=len(kd_rows(cached, learn))))

def kd_rows(cached, learn):
    cached.attach(learn)
    try: return cached.store.keys.tolist()
    finally: cached.detach()

def stages(data, out):
    out.mkdir(exist_ok=True)
    learn = learner(data)
    with learn.no_bar(), learn.no_logging(): learn.fit_stages([kd.Stage(2, cbs=kd.LsrKD()), kd.Stage(2, lr=.01)], cbs=[kd.Checkpoint(out/'run.pth')])
    weights = torch.cat([p.detach().flatten() for p in learn.model.parameters()]).tolist()
    Ledger(out/'results.jsonl').append(dict(key='stages', weights=weights, values=[list(map(float, row[:3])) for row in learn.recorder.values]))

tasks = dict(compare=compare, run=run, sweep=sweep, cache=cache, stages=stages)
_times = {'seal', 'seconds_per_epoch', 'epoch_seconds', 'loading_seconds', 'validation_seconds', 'date', 'full_hours', 'full_hours_of_all', 'loading_share'}

def numbers(out):
    "What a task found, without times, and the seals over them"
    def plain(record): return {k: v for k,v in record.items() if k not in _times}
    return {name: sorted((plain(json.loads(line)) for line in (out/name).read_text().splitlines()), key=lambda r: r['key'])
            for name in ('results.jsonl', 'recipes.jsonl') if (out/name).exists()}

def files(out): return sorted(o.relative_to(out).as_posix() for o in out.rglob('*') if o.is_file() and o.name != 'failures.jsonl')

class Killer:
    "Ends this process at the n-th of its steps: writing, renaming, deleting, a batch"
    def __init__(self, n=None): self.n,self.seen = n,0

    def step(self):
        self.seen += 1
        if self.seen == self.n: os.kill(os.getpid(), signal.SIGKILL)

    def watch(self):
        def counted(f, *args, **kwargs):
            self.step()
            result = f(*args, **kwargs)
            self.step()
            return result
        for name in ('fsync', 'replace', 'write', 'ftruncate'): setattr(os, name, partial(counted, getattr(os, name)))
        Path.unlink = (lambda unlink: lambda path, *a, **k: counted(unlink, path, *a, **k))(Path.unlink)
        Learner.one_batch = (lambda one: lambda learn, *a, **k: counted(one, learn, *a, **k))(Learner.one_batch)

def child(task, data, out, n=None, told=None):
    "Start a task in a process of its own, and return its number"
    pid = os.fork()
    if pid: return pid
    code = 1
    try:
        os.setsid()
        log = os.open(f'{out}.log', os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1), os.dup2(log, 2)
        warnings.simplefilter('ignore')
        killer = Killer(n)
        if n is not None or told: killer.watch()
        tasks[task](data, out)
        if told: Path(told).write_text(str(killer.seen))
        code = 0
    except BaseException:
        import traceback
        traceback.print_exc()
    finally: os._exit(code)

def ended(pid):
    "Wait for a process; return its exit code, negative for a signal"
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

def undisturbed(task, data, folder):
    "Return numbers and files of a task that nobody disturbs, and how many steps it has"
    out = folder/f'{task}-whole'
    assert ended(child(task, data, out, told=folder/'steps')) == 0, Path(f'{out}.log').read_text()[-2000:]
    return numbers(out),files(out),int((folder/'steps').read_text())

def after_kills(task, data, out, moments):
    "Numbers and files after kills at these steps, each of the process that goes on, and how many there were"
    killed = 0
    for n in moments: killed += ended(child(task, data, out, n)) == -signal.SIGKILL
    code = ended(child(task, data, out))
    assert code == 0, Path(f'{out}.log').read_text()[-3000:]
    return numbers(out),files(out),killed

def chosen_steps(folder, parts, names):
    "Kill each task at these parts of its steps, each time the process that goes on; print a line of JSON for each"
    data = images(folder)
    for task in names:
        expected,there,n = undisturbed(task, data, folder)
        found,left,killed = after_kills(task, data, folder/task, [max(1, round(part*n)) for part in parts])
        print(json.dumps(dict(task=task, steps=n, killed=killed, same=found == expected, left=sorted(set(left)^set(there)))), flush=True)

def random_moments(folder, n, names=tasks):
    data,wrong,killed = images(folder),0,0
    for task in names:
        start = time.perf_counter()
        expected,there,_ = undisturbed(task, data, folder)
        took = time.perf_counter()-start
        for i in range(n):
            out = folder/f'{task}-{i}'
            pid = child(task, data, out)
            time.sleep(random.uniform(0, took))
            try: os.kill(pid, signal.SIGKILL)
            except ProcessLookupError: pass
            was_killed = ended(pid) == -signal.SIGKILL
            killed += was_killed
            code = ended(child(task, data, out))
            same,left = code == 0 and numbers(out) == expected, sorted(set(files(out))-set(there))
            missing = sorted(set(there)-set(files(out)))
            if not same or left or missing: wrong += 1
            print(task, i, 'killed' if was_killed else 'was done', 'same' if same else 'OTHER', left, missing, flush=True)
            if same and not left: shutil.rmtree(out)
    print(f'{killed} kills, {wrong} with other results or files')

if __name__ == '__main__':
    folder,how,*names = sys.argv[1:]
    Path(folder).mkdir(parents=True, exist_ok=True)
    if how.isdigit(): random_moments(Path(folder), int(how), names or tasks)
    else: chosen_steps(Path(folder), list(map(float, how.split(','))), names or tasks)
