"Every notebook runs from top to bottom, in a process of its own"
import os, subprocess, sys
from pathlib import Path

import pytest
from nbdev.config import get_config
from nbdev.doclinks import nbglob

root = Path(__file__).parents[1]
cfg = get_config(root)
notebooks = sorted(nbglob(cfg.nbs_path, as_path=True))
code = "import sys; from nbdev.test import test_nb; sys.exit(not test_nb(sys.argv[1], skip_flags=sys.argv[3:], basepath=sys.argv[2])[0])"

@pytest.mark.parametrize('nb', notebooks, ids=[nb.relative_to(cfg.nbs_path).as_posix() for nb in notebooks])
def test_notebook(nb):
    env = {**os.environ, 'MPLBACKEND': 'agg', 'HF_HUB_OFFLINE': '1', 'OMP_NUM_THREADS': '1'}    # sums of one thread are the same each time
    r = subprocess.run([sys.executable, '-c', code, nb, root, *cfg.tst_flags.split()], cwd=root, env=env, capture_output=True, text=True)
    assert r.returncode==0, r.stderr[-5000:]
