"""Tasks: prompts with counterfactuals, and how well a model does on them."""

from mechlens.analyses.tasks.task import Task, load_task

__all__ = ["Task", "load_task"]
