"Every notebook runs from top to bottom, in a process of its own; where there is a shell, `test_readme.py` runs the front page"
import multiprocessing, os, sys
from pathlib import Path

import matplotlib.pyplot as plt
import pytest
from nbdev.config import get_config
from nbdev.doclinks import nbglob
from nbdev.test import test_nb as runs
from processes import said_by

root = Path(__file__).parents[1]
cfg = get_config(root)
notebooks = [nb for nb in sorted(nbglob(cfg.nbs_path, as_path=True)) if nb.name!=cfg.readme_nb or os.name!='posix']

def run(nb):
    multiprocessing.set_start_method(None, force=True)   # the system's own, as a reader's notebook has
    os.chdir(root)
    os.environ.update(MPLBACKEND='agg', HF_HUB_OFFLINE='1', OMP_NUM_THREADS='1')   # sums of one thread are the same each time
    plt.switch_backend('agg')
    sys.exit(not runs(nb, skip_flags=cfg.tst_flags.split(), basepath=root)[0])

@pytest.mark.parametrize('nb', notebooks, ids=[nb.relative_to(cfg.nbs_path).as_posix() for nb in notebooks])
def test_notebook(nb, tmp_path):
    code,said = said_by(run, nb, file=tmp_path/'said.txt')
    assert code==0, said[-5000:]
