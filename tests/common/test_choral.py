from __future__ import annotations

import subprocess
import sys

import choral
import pytest


def _python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return done.stdout.strip()


def test_importing_choral_loads_neither_torch_nor_grpc() -> None:
    code = "import choral, sys; print({name.partition('.')[0] for name in sys.modules} & {'torch', 'grpc', 'numpy', 'pandas'})"
    assert _python(code) == "set()"


def test_what_a_task_needs_is_imported_on_first_use() -> None:
    assert _python("import choral, sys; choral.Training; print('torch' in sys.modules)") == "False"
    assert _python("from choral import Task; import sys; print('torch' in sys.modules, 'grpc' in sys.modules)") == "True False"


def test_every_public_name_is_there() -> None:
    assert {name: getattr(choral, name) is not None for name in choral.__all__} == dict.fromkeys(choral.__all__, True)
    with pytest.raises(AttributeError, match="module 'choral' has no attribute 'Tusk'"):
        choral.Tusk  # noqa: B018
