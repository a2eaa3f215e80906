"Killed at any step and started again: the same results, and no file left over. `tests/kills.py` does it at random moments, for more tasks"
import json

from kills import chosen_steps
from processes import needs_fork, said_by

@needs_fork
def test_kills_change_nothing(tmp_path):
    "The last parts are those in which records are written and checkpoints deleted"
    code,said = said_by(chosen_steps, tmp_path, (.1, .6, .95), ('cache', 'stages', 'compare'), file=tmp_path/'said.txt')
    assert code == 0, said[-2000:]
    found = [json.loads(line) for line in said.splitlines() if line.startswith('{')]
    assert [o['task'] for o in found] == ['cache', 'stages', 'compare'] and sum(o['killed'] for o in found) >= 5
    for o in found: assert o['same'] and o['left'] == [] and o['steps'] > 20, o
