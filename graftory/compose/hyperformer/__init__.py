"""Hyperformer and PHA: one generator that makes the adapters of many tasks."""

from graftory.compose.hyperformer.module import generate, hyper_config, new_hyperformer, task_adapter
from graftory.compose.hyperformer.training import add_task, hyperformer

__all__ = ["add_task", "generate", "hyper_config", "hyperformer", "new_hyperformer", "task_adapter"]
