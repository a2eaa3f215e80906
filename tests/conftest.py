"Tiny tensors: threads only wait for each other, for minutes on a busy machine, and their number decides the last bits"
import pytest, torch

torch.set_num_threads(1)

@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    "A file's tests share their fixtures and stay in one process (`--dist loadgroup`); each notebook has its own anyway"
    for o in items:
        if o.path.stem!='test_notebooks': o.add_marker(pytest.mark.xdist_group(o.path.stem))
