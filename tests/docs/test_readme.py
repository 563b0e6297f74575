"""The task in the README works as it stands there, with the commands that stand there."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import yaml

README = Path(__file__).parents[2] / "README.md"
CHORAL = [sys.executable, "-m", "choral_deploy.cli"]


def test_the_task_is_under_thirty_lines_and_federates(tmp_path: Path) -> None:
    source = re.search(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    assert source is not None
    assert len(source[1].splitlines()) < 30
    (tmp_path / "my_task.py").write_text(source[1])
    for index, name in enumerate(["alice", "bob"]):
        x = np.random.default_rng(index).normal(size=(50, 3))
        frame = pd.DataFrame(x, columns=["age", "dose", "weight"]).assign(response=x @ [1.0, -2.0, 0.5])
        frame.to_csv(tmp_path / f"{name}.csv", index=False)

    init = ["server", "init", "site", "--host", "localhost", "--task", "my_task:task", "--clients", "2", "--rounds", "3"]
    subprocess.run([*CHORAL, *init], cwd=tmp_path, check=True, capture_output=True)
    path = tmp_path / "site" / "choral.yaml"
    config = yaml.safe_load(path.read_text()) | {"listen": "127.0.0.1:0", "exit_when_done": True}
    path.write_text(yaml.safe_dump(config))

    server = subprocess.Popen(
        [*CHORAL, "server", "--config", "site/choral.yaml", "--log-format", "json"], cwd=tmp_path, stderr=subprocess.PIPE, text=True
    )
    clients = []
    try:
        assert server.stderr is not None
        ready = next(line for line in server.stderr if "coordinator ready" in line)
        port = re.search(r'"address": "127\.0\.0\.1:(\d+)"', ready)
        assert port is not None
        for name in ("alice", "bob"):
            ask = [*CHORAL, "server", "token", name, "--config", "site/choral.yaml"]
            token = subprocess.run(ask, cwd=tmp_path, check=True, capture_output=True, text=True).stdout.strip()
            enrol = [*CHORAL, "client", "enrol", token, "--server", f"localhost:{port[1]}"]
            subprocess.run(enrol, cwd=tmp_path, check=True, capture_output=True)
            flags = ["--task", "my_task:task", "--data", f"{name}.csv"]
            clients.append(subprocess.Popen([*CHORAL, "client", "--name", name, *flags], cwd=tmp_path, stderr=subprocess.DEVNULL))
        server.stderr.read()  # to its end
        assert [server.wait(60), *(client.wait(60) for client in clients)] == [0, 0, 0]
    finally:
        for process in (server, *clients):
            process.kill()
            process.wait()
    latest = tmp_path / "site" / "state" / "runs" / "run" / "versions" / "latest.safetensors"
    assert (tmp_path / "choral-alice" / "model.safetensors").read_bytes() == latest.read_bytes()
