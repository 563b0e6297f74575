from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
import torch
from choral.forms import patched, restored
from choral.messages import Form, VersionRef
from choral_server.version_forms import VersionForms, path_of
from safetensors.torch import save

ROUNDED = frozenset({"w"})


def written(folder: Path, number: int, value: float, size: int = 5000) -> tuple[VersionRef, Path]:
    content = save({"w": torch.full((size,), value)})
    path = folder / f"{number:06d}.safetensors"
    path.write_bytes(content)
    return VersionRef(number, hashlib.sha256(content).digest(), len(content)), path


def test_bf16_says_what_is_made_of_it(tmp_path: Path) -> None:
    version, path = written(tmp_path, 3, 1 / 3)
    (form,) = VersionForms("bf16", ROUNDED).make(version, path, None)
    made = path_of(path, "bf16")
    assert (form.name, form.size_bytes, form.base) == ("bf16", made.stat().st_size, b"")
    assert form.size_bytes < 0.51 * version.size_bytes
    with made.open("rb") as file:
        assert hashlib.sha256(b"".join(restored(file, ROUNDED))).digest() == form.digest != version.digest


def test_a_delta_is_to_the_version_before(tmp_path: Path) -> None:
    before, version = written(tmp_path, 2, 1.0), written(tmp_path, 3, 1.001)
    (form,) = VersionForms("delta", ROUNDED).make(*version, before)
    made = path_of(version[1], "delta")
    assert form == Form("delta", made.stat().st_size, version[0].digest, before[0].digest)
    with made.open("rb") as file, before[1].open("rb") as base:
        assert b"".join(patched(file, base)) == version[1].read_bytes()


def test_forms_of_older_versions_go(tmp_path: Path) -> None:
    forms = VersionForms("bf16", ROUNDED)
    for number in range(3):
        assert forms.make(*written(tmp_path, number, 0.1 * number), None)
    assert [path.name for path in tmp_path.glob(".*")] == [".000002.bf16.form"]


@pytest.mark.parametrize("before", ["none", "gone", "another model"])
def test_without_the_version_before_there_is_no_delta(tmp_path: Path, before: str) -> None:
    version, path = written(tmp_path, 3, 1.0)
    bases = {
        "none": None,
        "gone": (version, tmp_path / "gone"),
        "another model": written(tmp_path, 2, 1.0, size=4000),
    }
    assert VersionForms("delta", ROUNDED).make(version, path, bases[before]) == ()


def test_what_would_not_be_smaller_is_not_told_of(tmp_path: Path) -> None:
    version, path = written(tmp_path, 3, 1.0)
    assert VersionForms("bf16", frozenset()).make(version, path, None) == ()


def test_a_version_that_cannot_be_read_has_none(tmp_path: Path) -> None:
    version, path = written(tmp_path, 3, 1.0)
    path.write_bytes(b"damaged")
    assert VersionForms("bf16", ROUNDED).make(version, path, None) == ()
    path.unlink()
    assert VersionForms("bf16", ROUNDED).make(version, path, None) == ()


@pytest.mark.parametrize("name", ["", "..", "/etc/passwd", "../../bf16", "no", "bf16/../delta"])
def test_a_name_that_no_form_has_leads_nowhere(tmp_path: Path, name: str) -> None:
    assert path_of(tmp_path / "000003.safetensors", name) == tmp_path / ".000003.no.form"
