__version__ = "0.2.0"

from . import _moved
