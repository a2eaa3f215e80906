"Processes of their own, forked from a server that has imported the libraries and done nothing else: `needs_fork`, `processes`"
import multiprocessing, os

import pytest

processes = multiprocessing.get_context('forkserver') if hasattr(os, 'fork') else multiprocessing.get_context('spawn')
needs_fork = pytest.mark.skipif(not hasattr(os, 'fork'), reason='needs fork')
if hasattr(os, 'fork'):
    processes.set_forkserver_preload(['fastai.vision.all', 'fastai.text.all', 'fastai.tabular.all', 'hypothesis', 'nbdev.test', 'optuna', 'pytest',
                                      'sklearn.datasets'])
