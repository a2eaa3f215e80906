"Forged files: none runs code, none ends the process or takes its memory, each is one clear line"
import json, re, sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from forged import forged, main
from processes import said_by

@pytest.fixture(scope='module')
def said(tmp_path_factory):
    "What each reader said of each forged file, all read in one process"
    root = tmp_path_factory.mktemp('forged')
    code,told = said_by(main, root, file=tmp_path_factory.mktemp('told')/'said.txt')
    lines = {o['name']: o for o in map(json.loads, (line for line in told.splitlines() if line.startswith('{')))}
    assert code == 0, f'the process ended with {code} after {list(lines)[-1:]}: {told[-500:]}'
    assert not list(root.parent.glob('owned*')) and not Path('owned').exists()
    return lines

def test_there_are_many(said): assert len(said) == len(forged) >= 100

@pytest.mark.parametrize('name', forged)
def test_a_forged_file_is_refused_in_one_line_that_names_it(name, said):
    o = said[name]
    assert not o['owned'], 'code was run'
    assert o['error'] == 'ValueError' and '\n' not in o['said'].strip() and len(o['said']) < 1000, o
    assert re.search(re.escape(o['path'].split('.')[0]) + '|train|test|class', o['said']), o['said']
    assert ' object at 0x' not in o['said'] or 'ast.' in o['said'], o['said']

def test_none_takes_much_memory(said):
    assert {name: o['megabytes'] for name,o in list(said.items())[1:] if o['megabytes'] > 300} == {}
