"The visible blocks of README, run as a reader pastes them: in an empty folder, with nothing but the installed package"
import os, re, shutil, subprocess, sys
from pathlib import Path

import pytest
from fastcore.nbio import read_nb
from nbdev.config import get_config
from processes import said_by

root = Path(__file__).parents[1]
cfg = get_config(root)
readme = (root/'README.md').read_text(encoding='utf-8')
blocks = re.findall(r'^``` ?(\w+)\n(.*?)^```$', readme, re.M|re.S)
python = [code for lang,code in blocks if lang=='python']
shell = [line for lang,code in blocks if lang=='sh' for line in code.splitlines() if line.strip()]

@pytest.fixture(scope='module')
def installed(tmp_path_factory):
    "Environment of a user: the files of the wheel, and its command"
    there = tmp_path_factory.mktemp('installed')
    kept = lambda folder, names: [o for o in names if (Path(folder)/o).is_file() and Path(o).suffix not in ('.py', '.csv', '.css')]
    shutil.copytree(cfg.lib_path, there/'fastkdtf', ignore=kept)
    command = there/'bin'/'fastkdtf'
    command.parent.mkdir()
    command.write_text(f'#!{sys.executable}\nimport sys\nfrom fastkdtf.cli import main\nsys.exit(main())\n')
    command.chmod(0o755)
    return {**os.environ, 'PYTHONPATH': str(there), 'PATH': f'{command.parent}{os.pathsep}{os.environ["PATH"]}', 'MPLBACKEND': 'agg',
            'OMP_NUM_THREADS': '1', 'HF_HUB_OFFLINE': '1'}

@pytest.fixture(scope='module')
def folder(tmp_path_factory): return tmp_path_factory.mktemp('empty')

each = """
import multiprocessing, shlex, sys
import fastkdtf.all
from fastkdtf.cli import main
def run(line): sys.exit(main(shlex.split(line)[1:]))
for line in sys.argv[1:]:
    p = multiprocessing.get_context('fork').Process(target=run, args=(line,))
    print(f'$ {line}', flush=True)
    p.start()
    p.join()
    if p.exitcode: sys.exit(f'{line}: exit code {p.exitcode}')
"""

def run(cmd, folder, env):
    r = subprocess.run(cmd, cwd=folder, env=env, capture_output=True, text=True)
    assert r.returncode==0, r.stderr[-5000:]
    return r.stdout

def test_the_first_block_is_whole():
    "Pasted alone it brings its imports, makes its loaders, and trains a learner with a method"
    assert [o in python[0] for o in ('from fastai.vision.all import *', 'from fastkdtf.all import *', 'dls =', 'learn =', 'cbs=')]==[True]*5

@pytest.mark.skipif(os.name!='posix', reason='commands are for a shell')
def test_all_blocks_run_as_pasted(installed, folder):
    assert len(python)>=5 and not list(folder.iterdir())
    where = run([sys.executable, '-c', '\n'.join([*python, 'import fastkdtf; print(fastkdtf.__file__)'])], folder, installed).splitlines()[-1]
    assert Path(where).parents[1]==Path(installed['PYTHONPATH']), 'another fastkdtf than the installed one was imported'
    commands = [line for line in shell if not line.startswith('pip install')]
    assert len(commands)>=4 and all(line.startswith('fastkdtf ') for line in commands)
    quickest = next(line for line in commands if line.startswith('fastkdtf recipes '))
    assert run(['bash', '-c', quickest], folder, installed).strip()
    said = run([sys.executable, '-c', each, *commands], folder, installed)    # each in a fork of one process that has imported the libraries
    told = re.split(r'^\$ (fastkdtf .*)$', said, flags=re.M)
    assert told[1::2]==commands and all(o.strip() for o in told[2::2]), said

def run_hidden():
    "The front page's cells that README does not show"
    os.chdir(cfg.nbs_path)
    cells = [c.source for c in read_nb(cfg.readme_nb).cells if re.search(r'^#\| *(hide|echo: *false)', c.source, re.M)]
    assert len(cells)>=3
    exec('\n'.join(cells), {})

def test_cells_that_are_not_shown_run(tmp_path):
    code,said = said_by(run_hidden, file=tmp_path/'said.txt')
    assert code==0, said[-5000:]

def test_the_install_lines_name_the_repository():
    installs = [line for line in shell if line.startswith('pip install')]
    assert installs==[f'pip install git+{cfg.git_url}'] and f'git clone {cfg.git_url}' in readme

def test_nothing_needs_a_file_of_the_repository():
    for code in (*python, *shell): assert not re.search(r'\.\./|results/|nbs/|tests/', code), code

def test_the_table_defines_its_terms():
    "Each column of the results has a line below them, and each row says what it is"
    table = re.search(r'<table.*?</table>', readme, re.S)[0]
    defined = re.findall(r'^\| ([^|]+?) \| ', readme.split('| in the table |')[1].split('\n\n')[0], re.M)
    columns = re.findall(r'<th>([^<]+)</th>', table.split('</thead>')[0])
    rows = re.findall(r'<th>([^<]+)</th>\s*<td>([^<]*)</td>', table.split('</thead>')[1])
    assert len(rows)>=5 and columns[0]=='what it is'
    for name in (o for o in columns[1:] if o!='method'): assert name in defined, name
    for name,what in rows: assert what, name
