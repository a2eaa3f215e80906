"Everything a notebook needs: `from fastkdtf.all import *`"
from fastkdtf.core import Batch, Step, TwoValued, first_output
from fastkdtf.describe import Description
from fastkdtf.divergence import SoftLoss
from fastkdtf.losses import *
from fastkdtf.targets import *
from fastkdtf.files import replacing, run_lock

from fastkdtf.vision.augment import Augment
from fastkdtf.vision.data import *
from fastkdtf.vision.loader import batch_info, with_index
from fastkdtf.vision.models import *
from fastkdtf.vision.samplers import Overlap, Pairs, arranged

from fastkdtf.teachers.base import *
from fastkdtf.teachers.cache import CachedTeacher
from fastkdtf.teachers.inputs import check_inputs, class_names, class_order, input_names, input_stats, renormalise
from fastkdtf.teachers.memory import MemoryTeacher
from fastkdtf.teachers.network import *
from fastkdtf.teachers.remembered import ClassMeans, EMATeacher, LastPrediction, PreviousBatch, SampleTable, label_logits

from fastkdtf.callback.checkpoint import *
from fastkdtf.callback.distill import *
from fastkdtf.callback.effdstl import CKM, WSL
from fastkdtf.callback.schedules import Schedule, fit_schedule
from fastkdtf.callback.selfguide import *
from fastkdtf.callback.memories import *
from fastkdtf.callback.relatives import *
from fastkdtf.callback.precision import HalfPrecision, fast_precision
from fastkdtf.callback.methods import find_method, register_method, teacher_free
from fastkdtf.callback.stages import Stage, scale_epochs
from fastkdtf.callback.survival import fold, register_block, subnetwork, survival, survival_probs
from fastkdtf.callback.term import LossTerm
from fastkdtf.callback.views import *
from fastkdtf.callback.twostage import effdstl_stages

from fastkdtf.lab.compare import *
from fastkdtf.lab.defective import *
from fastkdtf.lab.experiment import run_recipes
from fastkdtf.lab.explore import Exploration, confidence_change, exploration_schemes, exploration_subsets, explore, fgsm
from fastkdtf.lab.interpret import *
from fastkdtf.lab.one_run import LearnerParts, teacher_accuracy, train_run
from fastkdtf.lab.page import report_html, write_report
from fastkdtf.lab.learners import LearnerFrom, LearnerLike, copy_learner, own_callbacks
from fastkdtf.lab.procedures import Reversed, Taught
from fastkdtf.lab.recipes import recipe, recipes
from fastkdtf.lab.report import *
from fastkdtf.lab.reproduction import Reproduction
from fastkdtf.lab.runs import Ledger, run_environment
from fastkdtf.lab.statistics import *
from fastkdtf.lab.sweep import Sweep, paper_grid, sweep
from fastkdtf.lab.tune import Tuned, hold_out, tune
