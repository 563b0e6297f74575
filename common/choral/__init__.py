"""Choral: federated learning for PyTorch.

What a task author needs is here: `Task`, `Training`, `Table`, `Standardize` and `load_task`. They are
imported on first use, so that `import choral` costs nothing and torch is loaded only by who needs it.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

__version__ = "0.1.0"

if TYPE_CHECKING:
    from choral.plan import Training as Training
    from choral.standardize import Standardize as Standardize
    from choral.table import Table as Table
    from choral.task import Task as Task
    from choral.task import load_task as load_task

_HOME = {
    "Standardize": "choral.standardize",
    "Table": "choral.table",
    "Task": "choral.task",
    "Training": "choral.plan",
    "load_task": "choral.task",
}
__all__ = ["Standardize", "Table", "Task", "Training", "__version__", "load_task"]


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module 'choral' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)
