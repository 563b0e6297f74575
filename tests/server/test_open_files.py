from __future__ import annotations

import subprocess
import sys

SCRIPT = """
import resource
resource.setrlimit(resource.RLIMIT_NOFILE, (100, 400))
from choral_server.open_files import allow
print(allow({connections}), resource.getrlimit(resource.RLIMIT_NOFILE))
"""


def test_as_many_files_as_may_be_are_allowed() -> None:
    ran = subprocess.run([sys.executable, "-c", SCRIPT.format(connections=10)], capture_output=True, text=True, check=True)
    assert ran.stdout == "400 (400, 400)\n"


def test_too_few_for_the_connections_are_told_with_the_cure() -> None:
    ran = subprocess.run([sys.executable, "-c", SCRIPT.format(connections=200)], capture_output=True, text=True, check=True)
    assert "few open files" in ran.stdout
    assert "LimitNOFILE) to 456, or lower limits.connections" in ran.stdout
