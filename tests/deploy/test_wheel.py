"""The wheel: built from the tree, installed in a clean environment, run far away from the repository."""

from __future__ import annotations

import json
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("dist")
    subprocess.run([sys.executable, "-m", "build", "--wheel", "--outdir", out, REPOSITORY], check=True, capture_output=True)
    (built,) = out.glob("*.whl")
    return built


def test_it_holds_the_four_packages_and_their_data(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names if ".dist-info" not in name} == {
        "choral",
        "choral_client",
        "choral_deploy",
        "choral_server",
    }
    assert "choral/tasks/data/boston_housing.csv" in names
    assert "choral/py.typed" in names


def test_it_runs_the_demo_in_a_clean_environment(wheel: Path, tmp_path: Path) -> None:
    home = tmp_path / "venv"
    venv.create(home, with_pip=True)
    constraints = REPOSITORY / "deploy" / "constraints.txt"
    subprocess.run([home / "bin" / "pip", "install", "-q", "-c", constraints, wheel], check=True, capture_output=True)
    command = [home / "bin" / "choral", "demo", "--rounds", "2", "--json", "--out", "demo"]
    done = subprocess.run(command, check=True, capture_output=True, text=True, cwd=tmp_path, env={"PATH": "/usr/bin:/bin"})
    report = json.loads(done.stdout.splitlines()[-1])
    assert report["rounds"] == 2
    assert (tmp_path / report["checkpoint"]).stat().st_size > 4 * 1600
