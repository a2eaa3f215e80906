"""What all tests share: one thread, no waiting for the disk, garbage that is not looked through again, the longest tests first,
and what is made once for all processes"""
import gc, os

import pytest
import torch
import unsynced   # noqa: F401, for what it changes
from filelock import FileLock

torch.set_num_threads(1)   # with tiny tensors threads only wait for each other, and their number decides the last bits
if not torch.accelerator.is_available():   # PyTorch would write down the stack for each kind of GPU that is not there: a tenth of all tests
    torch.manual_seed,torch.cuda.manual_seed_all = lambda seed: torch.default_generator.manual_seed(int(seed)),lambda seed: None

if os.environ.get('FASTKDTF_TEST_DEVICE', 'cpu') != 'cpu':   # the same bits each time, and float32 where it says so
    os.environ.setdefault('CUBLAS_WORKSPACE_CONFIG', ':4096:8')
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.backends.cudnn.benchmark,torch.backends.cudnn.allow_tf32 = False,False

longest = ['test_packaging.py', 'test_notebooks.py', 'test_readme.py', 'test_site.py', 'test_experiment.py', 'test_parallel.py', 'test_cli.py']

def pytest_collection_modifyitems(items):
    """Files of long tests come first, so that at the end no process waits for another's last test

    Packaging is before them, as it copies the notebooks, which should not run meanwhile."""
    items.sort(key=lambda o: longest.index(o.path.name) if o.path.name in longest else len(longest))

def pytest_collection_finish():
    "What is imported by now stays, so `gc.collect` need not look at its million objects again"
    gc.collect()
    gc.freeze()

@pytest.fixture(scope='session')
def once(tmp_path_factory):
    "`once(name, make)` is a folder that `make(folder)` has filled, for the first who asks of all processes that run tests"
    base = tmp_path_factory.getbasetemp()
    if 'PYTEST_XDIST_WORKER' in os.environ: base = base.parent
    def once(name, make):
        folder,made = base/name,base/f'{name}.made'
        with FileLock(base/f'{name}.lock'):
            if not made.exists():
                folder.mkdir(exist_ok=True)
                make(folder)
                made.touch()
        return folder
    return once

@pytest.fixture
def draws(): "The figures and the page of a comparison are really made"

@pytest.fixture
def no_drawing(request, monkeypatch):
    "Comparisons make no figures and an empty page: these take longer than small trainings. Not for tests that ask for `draws`"
    if 'draws' in request.fixturenames: return
    from matplotlib import pyplot as plt
    from fastkdtf.lab import page, report, reproduction   # noqa: F401, which would keep the empty page if it were first imported below
    for o in ('plot_accuracy', 'plot_curves'): monkeypatch.setattr(report.Comparison, o, lambda self: plt.figure(figsize=(1, 1)))
    monkeypatch.setattr(page, 'report_html', lambda *args, **kwargs: '<html></html>\n')
