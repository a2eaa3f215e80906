"The modules of 0.1.0, under their old names: what was pickled then names them"
import sys
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

# old module → the modules that its names went to
moved = {old: tuple(new.split()) for old,new in dict(
    augment='vision.augment', cifar_nets='vision.cifar_nets', data='vision.data', identity='vision.identity', loader='vision.loader',
    models='vision.models', readers='vision.readers',
    cache='teachers.cache', frozen='teachers.frozen', memory='teachers.memory', teachers='teachers.base teachers.network',
    distill='callback.distill callback.methods', effdstl='callback.effdstl', schedules='callback.schedules', selfguide='callback.selfguide lab.interpret',
    stages='callback.stages', survival='callback.survival', terms='callback.term', twostage='callback.twostage',
    bench='lab.bench', defective='lab.defective', draw='lab.draw', experiment='lab.experiment', explore='lab.explore',
    interpret='lab.interpret', learner='lab.compare', measure='lab.measure', page='lab.page', peers='lab.peers',
    procedures='lab.procedures lab.learners', recipes='lab.recipes', report='lab.report lab.statistics', reproduction='lab.reproduction',
    runs='lab.runs callback.checkpoint files', sweep='lab.sweep', training='lab.training lab.one_run lab.runs fingerprint').items()}

renamed = dict(Entry='Arm', stable_words='fingerprint', Gave='LastBatch', untouched='is_untouched')

def find(old:str, name:str):
    "The object that module `old` of 0.1.0 called `name`"
    for module in moved[old]:
        found = import_module(f'fastkdtf.{module}')
        if hasattr(found, name): return getattr(found, name)
        if hasattr(found, renamed.get(name, name)): return getattr(found, renamed[name])
    raise AttributeError(f"fastkdtf.{old} was parted into {', '.join('fastkdtf.'+o for o in moved[old])}, and none has {name!r}")

class _Moved(MetaPathFinder, Loader):
    "Makes a moved module importable; its names are looked up when they are asked for"
    def find_spec(self, fullname, path=None, target=None):
        package,_,old = fullname.rpartition('.')
        return ModuleSpec(fullname, self) if package == 'fastkdtf' and old in moved else None

    def create_module(self, spec):
        module,old = ModuleType(spec.name),spec.name.rpartition('.')[2]
        module.__getattr__ = lambda name: find(old, name)
        return module

    def exec_module(self, module): pass

sys.meta_path.append(_Moved())
