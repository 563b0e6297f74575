from __future__ import annotations

import json
import subprocess
import sys
from datetime import datetime

CODE = """
from choral.logs import configure
import structlog
configure({style!r}, {level!r})
log = structlog.get_logger()
log.debug("too fine")
log.warning("round abandoned", round=3, reason="nobody – attends")
"""


def _logged(style: str, level: str) -> tuple[str, str]:
    """What a process writes to stdout and stderr: the set-up is for a whole process."""
    code = CODE.format(style=style, level=level)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, encoding="utf-8", check=True)
    return done.stdout, done.stderr


def test_json_is_one_object_a_line_on_standard_error() -> None:
    out, err = _logged("json", "info")
    assert out == ""
    (line,) = err.splitlines()
    said = json.loads(line)
    assert datetime.fromisoformat(said.pop("timestamp")).utcoffset() is not None
    assert said == {"event": "round abandoned", "level": "warning", "round": 3, "reason": "nobody – attends"}


def test_the_console_is_for_people_and_without_colours_in_a_file() -> None:
    out, err = _logged("console", "info")
    assert out == ""
    assert "round abandoned" in err
    assert "round=3" in err
    assert "\x1b" not in err


def test_the_level_decides_what_is_written() -> None:
    assert len(_logged("json", "debug")[1].splitlines()) == 2
    assert _logged("json", "error")[1] == ""


def test_a_reader_that_has_gone_away_stops_nobody_from_working() -> None:
    code = CODE.format(style="json", level="info") + "log.warning('again')\nprint('still at work')"
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stderr is not None
    process.stderr.close()
    assert process.stdout.read() == "still at work\n"
    process.stdout.close()
    process.wait()
