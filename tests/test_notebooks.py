"Every notebook runs from top to bottom, in a process of its own"
import multiprocessing, os, sys
from pathlib import Path

import matplotlib.pyplot as plt
import pytest
from nbdev.config import get_config
from nbdev.doclinks import nbglob
from nbdev.test import test_nb as runs
from processes import processes

root = Path(__file__).parents[1]
cfg = get_config(root)
notebooks = sorted(nbglob(cfg.nbs_path, as_path=True))

def run(nb, said):
    "Run a notebook, and write what it says to a file"
    with open(said, 'w') as f:
        for stream in (1, 2): os.dup2(f.fileno(), stream)
    multiprocessing.set_start_method(None, force=True)   # the system's own, as a reader's notebook has
    os.chdir(root)
    os.environ.update(MPLBACKEND='agg', HF_HUB_OFFLINE='1', OMP_NUM_THREADS='1')   # sums of one thread are the same each time
    plt.switch_backend('agg')
    sys.exit(not runs(nb, skip_flags=cfg.tst_flags.split(), basepath=root)[0])

@pytest.mark.parametrize('nb', notebooks, ids=[nb.relative_to(cfg.nbs_path).as_posix() for nb in notebooks])
def test_notebook(nb, tmp_path):
    said = tmp_path/'said.txt'
    p = processes.Process(target=run, args=(nb, said))
    p.start()
    p.join()
    assert p.exitcode==0, said.read_text()[-5000:]
