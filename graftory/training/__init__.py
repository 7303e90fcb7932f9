"""Train, measure and use adapters on frozen models, with transformers' `Trainer`."""

from graftory.settings import TrainSettings
from graftory.training.base import LoadedBase, load_base
from graftory.training.company import ALONE, Company, Learnt, OtherTask
from graftory.training.evaluate import Job, evaluate
from graftory.training.losses import RowLosses, row_losses
from graftory.training.metrics import METRICS, measure
from graftory.training.predict import Prediction, Query, predict
from graftory.training.train import train, train_in_company
from graftory.training.trainer import NO_HOOKS, GradientHook, Hooks, LossTerm, StepContext, StepRoute

__all__ = [
    "ALONE",
    "METRICS",
    "NO_HOOKS",
    "Company",
    "GradientHook",
    "Hooks",
    "Job",
    "Learnt",
    "LoadedBase",
    "LossTerm",
    "OtherTask",
    "Prediction",
    "Query",
    "RowLosses",
    "StepContext",
    "StepRoute",
    "TrainSettings",
    "evaluate",
    "load_base",
    "measure",
    "predict",
    "row_losses",
    "train",
    "train_in_company",
]
