"Processes of their own, forked from a server that has imported the libraries and done nothing else: `needs_fork`, `processes`, `said_by`, `together`"
import multiprocessing, os, socket

import pytest
import unsynced   # noqa: F401, here and in each process that is started from here

processes = multiprocessing.get_context('forkserver') if hasattr(os, 'fork') else multiprocessing.get_context('spawn')
needs_fork = pytest.mark.skipif(not hasattr(os, 'fork'), reason='needs fork')
if hasattr(os, 'fork'):
    processes.set_forkserver_preload(['fastai.vision.all', 'fastai.text.all', 'fastai.tabular.all', 'hypothesis', 'nbdev.test', 'optuna', 'pytest',
                                      'sklearn.datasets'])

def _say(f, args, file):
    with open(file, 'w') as out:
        for stream in (1, 2): os.dup2(out.fileno(), stream)
    f(*args)

def said_by(f, *args, file):
    "Run `f` in a process of its own; return its exit code, and what it said, which is also in `file`"
    p = processes.Process(target=_say, args=(f, args, file))
    p.start()
    p.join()
    return p.exitcode,file.read_text()

def together(f, *args, n=2):
    "Run `f(rank, port, *args)` in `n` processes, which talk to each other through the port"
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        port = s.getsockname()[1]
    ps = [processes.Process(target=f, args=(rank, port, *args)) for rank in range(n)]
    for p in ps: p.start()
    for p in ps: p.join()
    assert [p.exitcode for p in ps] == [0]*n
