"A mistake on the command line: exit code 2 and one line, before anything is trained"
import re, sys
from pathlib import Path

import pytest
from fastai.basics import Learner

sys.path.insert(0, str(Path(__file__).parent))
from bad_commands import bases, commands
from bad_inputs import prepare
from test_bad_inputs import began
from fastkdtf.cli import main

@pytest.fixture(autouse=True)
def untrained(monkeypatch, tmp_path):
    monkeypatch.setattr(Learner, 'fit', began)
    monkeypatch.chdir(tmp_path)
    prepare(tmp_path)

def test_the_commands_work_as_they_are(tmp_path, capsys):
    for name,argv in bases(tmp_path).items():
        try: rc = main(argv)
        except AssertionError as e: rc = str(e)
        assert rc in ((0,) if name in ('report', 'recipes', 'describe', 'bench') else (1, 'a training began')), (name, capsys.readouterr().err)

def test_every_bad_value_is_one_line_and_exit_code_2(tmp_path, capsys):
    n,bad = 0,[]
    for argv in commands(tmp_path):
        try: rc = main(argv)
        except BaseException as e: rc = f'{type(e).__name__}: {e}'
        out,err = capsys.readouterr()
        own = [line for line in err.splitlines() if line.startswith('fastkdtf: ')]
        n += 1
        if rc != 2 or len(own) != 1 or 'Traceback' in err: bad.append((argv[:2], argv[-2:], rc, err[-200:]))
    assert bad == [] and n >= 700
