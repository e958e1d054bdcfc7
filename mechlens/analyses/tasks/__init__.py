"""Tasks: prompts with counterfactuals, how well a model does them, and which components carry them."""

from mechlens.analyses.tasks.built_in import load_task
from mechlens.analyses.tasks.task import Task

__all__ = ["Task", "load_task"]
