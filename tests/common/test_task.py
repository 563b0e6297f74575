from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from choral.errors import DataError, TaskError
from choral.plan import Training
from choral.table import Table
from choral.task import Task, load_task, user_code
from torch import nn
from torch.nn.functional import mse_loss

SOURCE = """
from choral import Table, Task
from torch import nn
from torch.nn.functional import mse_loss

task = Task(name="line", model=lambda: nn.Linear(1, 1), loss=mse_loss, load=Table(["x"], target="y"))
other = Task(name="plane", model=lambda: nn.Linear(2, 1), loss=mse_loss, load=Table(["x", "z"], target="y"))
number = 7
"""


@pytest.fixture
def desk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A working directory with a user's modules, forgotten afterwards."""
    known = set(sys.modules)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    yield tmp_path
    for name in set(sys.modules) - known:
        if name.startswith("desk_"):
            del sys.modules[name]


def _task(**changes: object) -> Task:
    parts = {"name": "line", "model": lambda: nn.Linear(2, 1), "loss": mse_loss, "load": Table(["x"], target="y")}
    return Task(**{**parts, **changes})  # type: ignore[arg-type]


def test_finds_a_task_in_the_working_directory_and_in_packages(desk: Path) -> None:
    (desk / "desk_a.py").write_text(SOURCE, encoding="utf-8")
    assert load_task("desk_a:task").name == "line"
    assert load_task("desk_a:other").name == "plane"
    assert load_task("choral.tasks.boston_housing:task").name == "boston_housing"


@pytest.mark.parametrize("reference", ["", "desk_a", "desk_a:", ":task", "choral/tasks/boston_housing.py"])
def test_refuses_a_malformed_reference(desk: Path, reference: str) -> None:
    with pytest.raises(TaskError, match="write it as module:attribute, for example choral") as refused:
        load_task(reference)
    assert repr(reference) in str(refused.value)


def test_says_where_a_missing_module_was_looked_for(desk: Path) -> None:
    with pytest.raises(TaskError) as refused:
        load_task("desk_none.deeper:task")
    assert (
        str(refused.value) == f"task 'desk_none.deeper:task': no module desk_none.deeper in {desk} or among the installed packages"
    )


def test_names_the_tasks_of_a_module_without_the_one_asked_for(desk: Path) -> None:
    (desk / "desk_b.py").write_text(SOURCE, encoding="utf-8")
    with pytest.raises(TaskError, match=r"'desk_b:tusk': desk_b has no attribute tusk; tasks in it: task, other$"):
        load_task("desk_b:tusk")
    (desk / "desk_c.py").write_text("", encoding="utf-8")
    with pytest.raises(TaskError, match=r"desk_c has no attribute task; tasks in it: none$"):
        load_task("desk_c:task")


def test_refuses_what_is_no_task(desk: Path) -> None:
    (desk / "desk_d.py").write_text(SOURCE, encoding="utf-8")
    with pytest.raises(TaskError, match=r"'desk_d:number': is a int; a choral\.Task is expected"):
        load_task("desk_d:number")


@pytest.mark.parametrize(
    ("source", "told"),
    [
        ("import desk_not_installed", "importing desk_e raised ModuleNotFoundError: No module named 'desk_not_installed'"),
        ("1 / 0", "importing desk_e raised ZeroDivisionError: division by zero"),
        ("def f(:", "importing desk_e raised SyntaxError"),
    ],
)
def test_says_what_a_module_raised(desk: Path, source: str, told: str) -> None:
    (desk / "desk_e.py").write_text(source, encoding="utf-8")
    with pytest.raises(TaskError) as refused:
        load_task("desk_e:task")
    assert str(refused.value).startswith(f"task 'desk_e:task': {told}")
    assert refused.value.__cause__ is not None


def test_refuses_a_relative_module(desk: Path) -> None:
    with pytest.raises(TaskError, match=r"importing \.desk raised TypeError"):
        load_task(".desk:task")


def test_initial_weights_are_a_function_of_the_seed_and_touch_no_other_randomness() -> None:
    task = _task()
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    first, same, other = (task.initial_model(seed).state_dict()["weight"] for seed in (1, 1, 2))
    assert torch.equal(first, same)
    assert not torch.equal(first, other)
    assert torch.equal(torch.rand(3), expected)


def test_says_what_a_model_raised() -> None:
    def model() -> nn.Module:
        raise RuntimeError("no such layer")

    with pytest.raises(TaskError, match=r"^task line: model\(\) raised RuntimeError: no such layer$"):
        _task(model=model).initial_model(0)


def test_says_what_a_loader_raised(tmp_path: Path) -> None:
    def load(path: Path) -> None:
        raise KeyError(path.name)

    with pytest.raises(TaskError) as refused:
        _task(load=load).examples(tmp_path / "shard.csv")
    assert str(refused.value) == f"task line: load({str(tmp_path / 'shard.csv')!r}) raised KeyError: 'shard.csv'"


def test_an_error_of_ours_passes_through_user_code(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="does not exist"):
        _task().examples(tmp_path / "none.csv")


def test_an_interrupt_passes_through_user_code() -> None:
    with pytest.raises(KeyboardInterrupt), user_code("waiting"):
        raise KeyboardInterrupt


def test_defaults() -> None:
    task = _task()
    assert (task.version, dict(task.metrics), task.training) == ("1", {}, Training(epochs=1, batch_size=8, learning_rate=0.001))
    model = task.initial_model(0)
    optimizer = task.optimizer(model.parameters(), 0.5)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    sum(parameter.sum() for parameter in model.parameters()).backward()  # type: ignore[union-attr]
    optimizer.step()
    assert all(torch.equal(now, then - 0.5) for now, then in zip(model.parameters(), before, strict=True))
