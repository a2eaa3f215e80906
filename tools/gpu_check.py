"""The checks of tools/gpu_check.sh, which prepares the environment: `python tools/gpu_check.py OUT`, see there"""
import argparse, json, math, os, signal, statistics, subprocess, sys, tempfile, time
from importlib.util import find_spec
from pathlib import Path

root = Path(__file__).resolve().parents[1]
recipe = 'wang2020/T1/ResNet20/MrKD3'

def options():
    p = argparse.ArgumentParser(prog='tools/gpu_check.sh')
    p.add_argument('out', type=Path)
    p.add_argument('--wheels')   # read by gpu_check.sh
    p.add_argument('--data', type=Path, help='CIFAR-100 as .npz, or the folder of its pieces')
    p.add_argument('--seconds', type=float, default=480., help='for everything')
    p.add_argument('--row', type=Path, help='folder of the 200-epoch row, kept for a second call')
    p.add_argument('--seeds', type=int, default=5, help='of the row, as many as fit')
    p.add_argument('--tiny', action='store_true')
    return p.parse_args()

def run(command, seconds, **env):
    "Run a command; after `seconds` it is interrupted as by Ctrl-C. Return what it printed, its errors, and its exit code"
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        child = subprocess.Popen([sys.executable, *map(str, command)], stdout=out, stderr=err, cwd=root, env={**os.environ, **env})
        try: child.wait(max(seconds, 1))
        except subprocess.TimeoutExpired:
            child.send_signal(signal.SIGINT)
            try: child.wait(20)
            except subprocess.TimeoutExpired: child.kill()
            child.wait()
        texts = []
        for f in (out, err):
            f.seek(0)
            texts.append(f.read().decode(errors='replace'))
    return *texts, child.returncode

def fastkdtf(*args): return ['-c', 'import sys; from fastkdtf.cli import main; sys.exit(main())', *args]

def last_lines(text, n=4): return [line for line in text.splitlines() if line.strip()][-n:]

# ---------------------------------------------------------------- half precision, in a process of its own

def half_precision(device, tiny):
    "Train every listed method in half precision; print the last loss of each, or what went wrong"
    import torch
    from fastkdtf.callback.precision import fast_precision
    from fastkdtf.lab.bench import StepBench, listed_candidates
    from fastkdtf.vision.models import create_model
    steps,found = 2 if tiny else 30,{}
    precisions = ['bf16'] if device == 'cpu' else ['fp16', 'bf16']
    for precision in precisions:
        torch.manual_seed(0)
        teacher = create_model('resnet8', 10).to(device)
        batch = torch.randn(32, 3, 16, 16, device=device),torch.randint(0, 10, (32,), device=device)
        for name,c in {'plain': None, **listed_candidates(teacher, 10)}.items():
            try:
                step = StepBench(create_model('resnet8', 10).to(device), batch, 10, [] if c is None else [c.make()], precision)
                losses = [step().item() for _ in range(steps)]
                weights = all(p.isfinite().all().item() for p in step.learn.model.parameters())
                scale = step.learn.scaler.get_scale() if precision == 'fp16' else None
                good = math.isfinite(losses[-1]) and weights
                found[f'{name}, {precision}'] = dict(ok=good, first=losses[0], last=losses[-1], scale=scale)
            except Exception as e: found[f'{name}, {precision}'] = dict(ok=False, error=f'{type(e).__name__}: {e}'[:300])
    print(json.dumps(dict(methods=found, fastest=fast_precision(device))))

# ---------------------------------------------------------------- the checks

def environment(device):
    import platform, torch, torchvision
    from fastkdtf.lab.bench import machine
    out = dict(machine(device), python=platform.python_version(), torchvision=torchvision.__version__)
    out['stand_ins'] = [name for name in ('scipy', 'sklearn') if 'stand-in' in Path(find_spec(name).origin).read_text(encoding='utf-8')[:400]]
    return out

def tests(args, device, seconds):
    "Run the tests that need a GPU, and the matrix of all methods on it"
    if not find_spec('pytest'): return dict(left_out='pytest is not installed')
    if device == 'cpu' and not args.tiny: return dict(left_out='there is no GPU')
    which = ['tests/test_gpu.py', 'tests/test_loader.py::test_gpu_gives_the_same_bits', *([] if args.tiny else ['tests/test_matrix.py'])]
    several = ['-n', min(14, os.cpu_count())] if find_spec('xdist') else []
    out,err,code = run(['-m', 'pytest', '-q', '--tb=short', '-p', 'no:cacheprovider', *several, *which], seconds, FASTKDTF_TEST_DEVICE=device)
    (args.out/'tests.txt').write_text(out, encoding='utf-8')
    failed = [line for line in out.splitlines() if line.startswith(('FAILED', 'ERROR'))]
    return dict(ok=code == 0, said=last_lines(out, 1), errors=[*failed, *last_lines(err)] if code else [])

def halves(args, device, seconds):
    out,err,code = run([__file__, '--half', device, *(['--tiny'] if args.tiny else [])], seconds)
    if code: return dict(ok=False, errors=last_lines(err))
    found = json.loads(out.splitlines()[-1])
    wrong = {name: o for name,o in found['methods'].items() if not o['ok']}
    return dict(ok=not wrong, trained=len(found['methods']), wrong=wrong, **found)

def as_json(command, seconds):
    out,err,code = run(fastkdtf(*command, '--json'), seconds)
    return dict(ok=True, **json.loads(out)) if code == 0 else dict(ok=False, errors=last_lines(err))

def bench(args, device, seconds):
    size = ['--arch', 'resnet8', '--bs', '8', '--size', '16', '--rounds', '1', '--samples', '8'] if args.tiny else ['--rounds', '10']
    return as_json(['bench', '--device', device, *size], seconds)

def race(args, device, seconds, data):
    size = ['--data', data, '--arch', 'resnet8', '--bs', '32', '--epochs', '1', '--workers', '0'] if args.tiny else \
        ['--data', 'cifar100', '--path', data, '--train-subset', '20000', '--epochs', '3', '--arch', 'resnet20']
    return as_json(['bench', '--race', '--device', device, *size], seconds)

def row(args, device, seconds, data):
    "Train the row, and say what is finished when the time is over"
    folder = args.row or args.out/'row'
    size = ['--data', data, '--epochs', '1', '--scale', '.5', '--seeds', '1'] if args.tiny else ['--path', data, '--seeds', args.seeds]
    start = time.perf_counter()
    several = [] if args.tiny else ['--parallel', min(2*args.seeds, os.cpu_count())]   # two arms
    out,err,code = run(fastkdtf('run', recipe, *size, *several, '--no-controls', '--precision', 'auto', '--device', device, '--out', folder), seconds)
    file,done = folder/'results.jsonl',{}
    for line in file.read_text(encoding='utf-8').splitlines() if file.exists() else []:
        record = json.loads(line)
        done.setdefault(record['method'], []).append(record)
    arms = {name: dict(seeds=len(records), errors=[100*(1-r['last']['accuracy']) for r in records], seconds_per_epoch=[r['seconds_per_epoch'] for r in records])
            for name,records in done.items()}
    for arm in arms.values():
        arm['mean'] = statistics.mean(arm['errors'])
        arm['sd'] = statistics.stdev(arm['errors']) if arm['seeds'] > 1 else None
    ended = 'by itself' if code == 0 else 'when its time was over' if code == 130 else f'with {code}'
    # without scipy the report at the end has no intervals, and fails; the runs are what counts here
    return dict(ok=bool(arms) or code == 130, recipe=recipe, ended=ended, seconds=time.perf_counter()-start, arms=arms,
                unfinished=len(list(folder.glob('unfinished/*.pt'))), said=last_lines(err, 3))

def noise(path):
    "Write images of noise as an .npz with 100 classes"
    import numpy as np
    rng = np.random.default_rng(0)
    sets = {part: (rng.integers(0, 256, (n, 32, 32, 3), dtype=np.uint8), np.arange(n, dtype=np.uint8)%100) for part,n in (('train', 400), ('test', 100))}
    arrays = {f'{part}_{what}': array for part,both in sets.items() for what,array in zip(('images', 'labels'), both)}
    np.savez(path, **arrays, class_names=np.array([f'class {i}' for i in range(100)]))
    return path

# ---------------------------------------------------------------- what it says

def state_of(check): return f"left out: {check['left_out']}" if 'left_out' in check else 'good' if check['ok'] else 'wrong'

def markdown(found):
    def cell(v): return f'{v:.3g}' if isinstance(v, float) else '' if v is None else str(v)
    def table(rows):
        names = list(rows[0])
        return ['| '+' | '.join(names)+' |', '| '+' | '.join(['---']*len(names))+' |', *['| '+' | '.join(cell(r.get(n)) for n in names)+' |' for r in rows], '']
    e = found['environment']
    where = f"{e.get('device_name') or e['device']}, {e['processor']}, {e['cores']} cores; Python {e['python']}, torch {e['torch']}"
    lines = ['# fastkdtf on a GPU', '',
             f"{where}, fastai {e['fastai']}, timm {e['timm']}; {e['date'][:10]}, commit {str(e.get('commit'))[:12]}", '']
    if e['stand_ins']: lines += [f"Not installed, with empty modules in their place: {', '.join(e['stand_ins'])}.", '']
    checks = [name for name in ('tests', 'half precision', 'bench', 'race', 'row')]
    state = {name: state_of(found[name]) for name in checks}
    lines += table([dict(check=name, result=state[name], seconds=found[name]['took']) for name in checks])
    for name in checks:
        if state[name] != 'wrong': continue
        said = found[name].get('errors') or found[name].get('said') or found[name].get('wrong', {}).items()
        lines += [f'## {name}: what went wrong', '', '```', *map(str, said), '```', '']
    figures,rows = (found['bench'].get(name) for name in ('figures', 'rows'))
    if figures: lines += ['## Figures', '', *table(figures), *(table(rows) if rows else [])]
    if found['race'].get('race'): lines += ['## Race', '', *table(found['race']['race'])]
    if found['row'].get('arms'):
        lines += [f'## {recipe}', '', f"It ended {found['row']['ended']}; {found['row']['unfinished']} runs are unfinished. Errors in per cent.", '']
        lines += table([dict(arm=name, seeds=o['seeds'], mean=o['mean'], sd=o['sd'], errors=', '.join(f'{x:.2f}' for x in o['errors']))
                        for name,o in found['row']['arms'].items()])
    return '\n'.join(lines)

def main():
    import torch
    args = options()
    device,start = 'cuda' if torch.cuda.is_available() else 'cpu',time.perf_counter()
    if device == 'cpu' and not args.tiny: sys.exit('there is no GPU: give --tiny for a rehearsal on a processor')
    args.out.mkdir(parents=True, exist_ok=True)
    args.out,args.row = args.out.resolve(),args.row and args.row.resolve()
    found = dict(environment=environment(device))
    with tempfile.TemporaryDirectory() as tmp:
        data = args.data and args.data.resolve()
        if args.tiny and data is None: data = noise(Path(tmp)/'noise.npz')
        if data and data.is_dir(): data = Path(unpacked(data, Path(tmp)/'cifar100.npz'))
        left = lambda: args.seconds-(time.perf_counter()-start)
        without = dict(left_out='no images were given, with --data')
        slow = 4 if args.tiny else 1   # a rehearsal may run on a busy machine
        checks = {'tests': lambda: tests(args, device, min(120, left())), 'half precision': lambda: halves(args, device, min(60*slow, left())),
                  'bench': lambda: bench(args, device, min(100*slow, left())),
                  'race': lambda: race(args, device, min(120*slow, left()), data) if data else without,
                  'row': lambda: row(args, device, left()-10, data) if data else without}
        for name,check in checks.items():
            began = time.perf_counter()
            found[name] = dict(left_out='the time was over') if left() < 15 else check()
            found[name]['took'] = time.perf_counter()-began
            print(f"{name}: {state_of(found[name])}, {found[name]['took']:.0f} s", flush=True)
            (args.out/'check.json').write_text(json.dumps(found, indent=1), encoding='utf-8')
    (args.out/'check.md').write_text(markdown(found), encoding='utf-8')
    sys.exit(any(not o.get('ok', True) for o in found.values()))

def unpacked(folder, file):
    "Unpack the pieces of an image set"
    sys.path.insert(0, str(root/'tools'))
    from gpu_data import unpack
    unpack(folder, file)
    return file

if __name__ == '__main__':
    if sys.argv[1:2] == ['--half']: half_precision(sys.argv[2], '--tiny' in sys.argv)
    else: main()
