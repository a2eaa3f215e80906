"Everything a notebook needs: `from fastkdtf.all import *`"
from fastkdtf.core import Step, TwoValued
from fastkdtf.data import *
from fastkdtf.describe import Description
from fastkdtf.distill import *
from fastkdtf.interpret import *
from fastkdtf.learner import *
from fastkdtf.losses import *
from fastkdtf.models import *
from fastkdtf.report import *
from fastkdtf.runs import *
from fastkdtf.targets import *
from fastkdtf.teachers import *
from fastkdtf.terms import LossTerm
