"""Run the compatibility matrix and keep its results for the documentation: `python tools/matrix.py`; arguments go to pytest.

Nothing is written unless every cell works, is refused as it should be, or says why it was left out. Run nbs/compatibility.ipynb afterwards."""
import csv, json, os, platform, re, subprocess, sys, tempfile
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

root = Path(__file__).resolve().parents[1]

def installed(name):
    try: return f'{name} {version(name)}'
    except PackageNotFoundError: return f'no {name}'

def environment():
    "What was tested with what, in one line"
    packages = [installed(o) for o in ('fastkdtf', 'fastai', 'torch', 'timm', 'accelerate', 'tensorboard')]
    return ', '.join([*packages, f'Python {platform.python_version()}', f'{platform.system()} {platform.machine()}'])

def own_words(result):
    "Without what fastai writes before an error in a callback"
    return re.sub(r'Exception occured in `\w+` when calling event `\w+`: ', '', result)

def write_table(rows, path):
    "Cells as a CSV table below the versions, in the matrix's order whatever order they ran in"
    with open(path, 'w', newline='', encoding='utf-8') as f:
        f.write(f'# {environment()}\n')
        out = csv.DictWriter(f, ['method', 'situation', 'result'], extrasaction='ignore', lineterminator='\n')
        out.writeheader()
        for o in sorted(rows, key=lambda o: o['at']): out.writerow({**o, 'result': own_words(o['result'])})

def main():
    with tempfile.TemporaryDirectory() as tmp:
        lines = Path(tmp)/'cells.jsonl'
        test = [sys.executable, '-m', 'pytest', '-q', 'tests/test_matrix.py::test_matrix', *sys.argv[1:]]
        r = subprocess.run(test, cwd=root, env={'OMP_NUM_THREADS': '1', **os.environ, 'FASTKDTF_MATRIX': str(lines)})
        if r.returncode: sys.exit('a cell failed: the table was left as it is')
        rows = [json.loads(o) for o in lines.read_text(encoding='utf-8').splitlines()]
    write_table(rows, root/'nbs'/'compatibility.csv')
    print(f'{len(rows)} cells in nbs/compatibility.csv')

if __name__=='__main__': main()
