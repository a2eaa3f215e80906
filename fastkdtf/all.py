"Everything a notebook needs: `from fastkdtf.all import *`"
from fastkdtf.augment import Augment
from fastkdtf.cache import CachedTeacher
from fastkdtf.core import Step, TwoValued
from fastkdtf.data import *
from fastkdtf.defective import *
from fastkdtf.describe import Description
from fastkdtf.distill import *
from fastkdtf.effdstl import CKM, WSL
from fastkdtf.experiment import run_recipes
from fastkdtf.explore import Exploration, confidence_change, exploration_schemes, exploration_subsets, explore, fgsm
from fastkdtf.interpret import *
from fastkdtf.learner import *
from fastkdtf.loader import batch_info, with_index
from fastkdtf.losses import *
from fastkdtf.memory import MemoryTeacher
from fastkdtf.models import *
from fastkdtf.page import report_html, write_report
from fastkdtf.procedures import Reversed, Taught, own_callbacks, teacher_accuracy
from fastkdtf.recipes import recipe, recipes
from fastkdtf.report import *
from fastkdtf.reproduction import Reproduction
from fastkdtf.runs import *
from fastkdtf.schedules import Schedule, fit_schedule
from fastkdtf.selfguide import *
from fastkdtf.survival import fold, register_block, subnetwork, survival, survival_probs
from fastkdtf.stages import Stage, scale_epochs
from fastkdtf.sweep import Sweep, paper_grid, sweep
from fastkdtf.targets import *
from fastkdtf.teachers import *
from fastkdtf.terms import LossTerm
from fastkdtf.training import train_run
from fastkdtf.twostage import effdstl_stages
