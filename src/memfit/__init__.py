"""Give memfit a language model and a memory budget: it makes the model fit, and proves it.

account   who will hold which bytes, when; no weights read
plan      what to do to fit a budget, to run or to train, and what it will cost
train     a model on data, within a budget
train_step  a step of training as planned, for a loop of one's own
fit       do it, measure it, report it
evaluate  quality and speed of a fitted model beside the original
measure   the task on the real model, in a fresh process
load      a fitted model, running from its packed weights
make_cache  a KV cache of few bits, for a loop of one's own
"""

import os
import sys

__version__ = "0.1.0"

if "torch" not in sys.modules:
    # Threads that wait sleep: spinning at every barrier made steps up to 90 times slower beside other work. OpenMP
    # reads this once, when torch is loaded.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")

from memfit.account.account import Account, Entry, Phase, compare
from memfit.errors import (
    BrokenInput,
    DoesNotFit,
    Interrupted,
    MemfitError,
    OverBudget,
    QualityMissed,
    UsageError,
)
from memfit.fit import Text, account, fit, load, plan
from memfit.measuring import evaluate, measure
from memfit.packed.cache import make_cache
from memfit.packed.forms import Sparse
from memfit.plan.allowed import Allowed
from memfit.plan.plan import Plan
from memfit.report.report import Report
from memfit.task.infer import Infer
from memfit.technique.adapters import Adapters
from memfit.technique.distil import Distil
from memfit.technique.narrow import Narrow
from memfit.train.hyper import Hyper
from memfit.train.plan import TrainPlan
from memfit.train.recipe import Recipe
from memfit.train.step import LossNotFinite, TrainStep
from memfit.train.task import Train, train_step
from memfit.train_planning import plain_training
from memfit.training import Options, train

__all__ = [
    "Account",
    "Adapters",
    "Allowed",
    "BrokenInput",
    "Distil",
    "DoesNotFit",
    "Entry",
    "Hyper",
    "Infer",
    "Interrupted",
    "LossNotFinite",
    "MemfitError",
    "Narrow",
    "Options",
    "OverBudget",
    "Phase",
    "Plan",
    "QualityMissed",
    "Recipe",
    "Report",
    "Sparse",
    "Text",
    "Train",
    "TrainPlan",
    "TrainStep",
    "UsageError",
    "account",
    "compare",
    "evaluate",
    "fit",
    "load",
    "make_cache",
    "measure",
    "plain_training",
    "plan",
    "train",
    "train_step",
]
