"""Where a task's code runs: the coordinator's second process, which alone has torch.

    python -m choral_server.task_host DESCRIPTOR

It does what it is asked over the socket with that number, one thing after the other, and ends with the coordinator, however that
ends. What the task's code prints goes where the coordinator's own output goes, and cannot be taken for an answer.
"""

from __future__ import annotations

import os
import queue
import signal
import socket
import sys
import threading
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Any

from choral.errors import ChoralError

from choral_server.task_process import received, send

if TYPE_CHECKING:
    from choral.metrics import Metric
    from choral.task import Task
    from torch import nn
    from torch.utils.data import Dataset

    from choral_server.blueprint import Blueprint


class TaskHost:
    """A task, its model with the initial weights of `seed`, and the test set, if the coordinator has one."""

    def __init__(self, task: Task, seed: int, test_set: Dataset[Any] | None = None) -> None:
        self._task = task
        self._seed = seed
        self._test_set = test_set
        self._initial: nn.Module | None = task.initial_model(seed)
        self._measured: nn.Module = self._initial

    def blueprint(self) -> Blueprint:
        """What the coordinator is to know. Raises TaskError: the model cannot be sent, or has two Standardize layers."""
        from choral.flat import describe
        from choral.standardize import standardize_of

        from choral_server.blueprint import Blueprint

        task, layer = self._task, standardize_of(self._measured)
        keep = layer.keep if layer is not None else ()
        ranges = tuple((float(low), float(high)) for low, high in task.ranges) if task.ranges is not None else None
        return Blueprint(task.name, task.version, tuple(task.metrics), task.training, describe(self._measured), keep, ranges)

    def write_initial(self, path: Path, metadata: dict[str, str]) -> None:
        """Write the initial weights as a safetensors file. Raises OSError."""
        from safetensors import SafetensorError
        from safetensors.torch import save_file

        model = self._initial or self._task.initial_model(self._seed)
        path.touch()
        mode = path.stat().st_mode
        try:
            save_file({name: tensor.clone().contiguous() for name, tensor in model.state_dict().items()}, path, metadata)
        except SafetensorError as error:  # a full disk, say
            raise OSError(str(error)) from error
        path.chmod(mode)  # as all files: safetensors makes one that only its owner can read

    def measure(self, path: Path) -> tuple[Metric, ...]:
        """Loss and metrics of a version on the test set. Raises TaskError: the task's code raised."""
        from choral.evaluation import evaluate
        from safetensors.torch import load_file

        assert self._test_set is not None, "only a coordinator with a test set measures"
        self._initial = None  # its weights are replaced
        self._measured.load_state_dict(load_file(path))
        return evaluate(self._task, self._measured, self._test_set)


def _answer(host: TaskHost | None, asked: dict[str, Any]) -> tuple[TaskHost, Any]:
    if asked["what"] == "open":
        from choral.task import load_task

        task, test_set = load_task(asked["task"]), asked["test_set"]
        host = TaskHost(task, asked["seed"], task.examples(Path(test_set)) if test_set is not None else None)
        return host, host.blueprint().to_json()
    assert host is not None, "it is opened first"
    if asked["what"] == "initial":
        host.write_initial(Path(asked["path"]), asked["metadata"])
        return host, None
    return host, [(metric.name, metric.value, metric.examples) for metric in host.measure(Path(asked["path"]))]


def _listen(connection: socket.socket, questions: queue.SimpleQueue[dict[str, Any]]) -> None:
    """Pass on what is asked; end the process with whoever asks, also in the middle of an answer."""
    while (asked := received(connection)) is not None:
        questions.put(asked)
    os._exit(0)


def main(descriptor: int) -> None:
    """Answer until nobody asks any more."""
    for number in (signal.SIGINT, signal.SIGTERM):  # also sent to the coordinator, which may let a round end
        signal.signal(number, signal.SIG_IGN)
    connection, host = socket.socket(fileno=descriptor), None
    questions: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
    threading.Thread(target=_listen, args=(connection, questions), daemon=True).start()
    import choral.task  # noqa: F401 - torch, while the coordinator still reads its configuration

    while True:
        asked = questions.get()
        try:
            host, answer = _answer(host, asked)
            told = {"answer": answer}
        except ChoralError as error:
            told = {"error": type(error).__name__, "message": str(error)}
        except OSError as error:
            told = {"error": "OSError", "message": str(error)}
        send(connection, told)


if __name__ == "__main__":
    try:
        main(int(sys.argv[1]))
    except BaseException as error:  # noqa: BLE001 - threads of the task's code must not keep a process that answers nobody
        if not isinstance(error, SystemExit):
            traceback.print_exc()
        sys.stderr.flush()
        os._exit(error.code if isinstance(error, SystemExit) and isinstance(error.code, int) else 1)
