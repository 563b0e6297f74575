from __future__ import annotations

import subprocess
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_the_committed_stubs_are_what_the_protos_give(tmp_path: Path) -> None:
    made = subprocess.run([ROOT / "protos" / "generate.sh", tmp_path], capture_output=True, text=True, check=False)
    assert made.returncode == 0, made.stderr
    committed = {path.name: path.read_bytes() for path in (ROOT / "common/choral/v1").glob("*_pb2*")}
    generated = {path.name: path.read_bytes() for path in (tmp_path / "choral/v1").iterdir()}
    assert sorted(generated) == sorted(committed)
    differing = [name for name in generated if generated[name] != committed[name]]
    assert not differing, "run `make protos` and commit what it writes"
