"Killed at any step and started again: the same results, and no file left over. `tests/kills.py` does it at random moments, for more tasks"
import json, os, subprocess, sys
from pathlib import Path

import pytest

@pytest.mark.skipif(not hasattr(os, 'fork'), reason='needs fork')
def test_kills_change_nothing(tmp_path):
    "The last parts are those in which records are written and checkpoints deleted"
    r = subprocess.run([sys.executable, str(Path(__file__).with_name('kills.py')), str(tmp_path), '.1,.6,.95', 'cache', 'stages', 'compare'],
                       capture_output=True, text=True, env={**os.environ, 'OMP_NUM_THREADS': '1'})
    assert r.returncode == 0, r.stderr[-2000:]
    found = [json.loads(line) for line in r.stdout.splitlines() if line.startswith('{')]
    assert [o['task'] for o in found] == ['cache', 'stages', 'compare'] and sum(o['killed'] for o in found) >= 5
    for o in found: assert o['same'] and o['left'] == [] and o['steps'] > 20, o
