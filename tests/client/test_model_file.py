"""Versions are fetched into a file, from a transport that the test writes."""

from __future__ import annotations

import asyncio
import hashlib
import importlib.util
import io
import pickle
import random
import re
from collections.abc import AsyncGenerator
from contextlib import aclosing, suppress
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from choral.errors import ChoralError, CorruptTransfer, Declined, UnknownVersion, Unreachable
from choral.forms import difference, halved, restored
from choral.manifest import Entry, EntryKind, Manifest
from choral.messages import Form, Receipt, UploadHeader, VersionRef
from choral.wire import CHUNK_BYTES
from choral_client.backoff import Patience
from choral_client.checkpoint import Expected, Place
from choral_client.model_file import ModelFile
from safetensors.torch import save

_ANY = random.Random(5)
SMALL = _ANY.randbytes(100)
LARGE = _ANY.randbytes(5 * CHUNK_BYTES + 7)


def version(content: bytes, number: int = 3) -> VersionRef:
    return VersionRef(number, hashlib.sha256(content).digest(), len(content))


def part_of(folder: Path, version: VersionRef) -> Path:
    return folder / f"model.{version.digest.hex()[:16]}.part"


class AtOnce(random.Random):
    def uniform(self, a: float, b: float) -> float:
        return a


class Source:
    """Sends `content`; attempt for attempt, it breaks with one of `breaks` after so many pieces."""

    def __init__(self, content: bytes, *breaks: tuple[int, ChoralError]) -> None:
        self.content = content
        self.breaks = list(breaks)
        self.offsets: list[int] = []
        self.sent = 0
        self.waiting = asyncio.Event()

    async def download(self, version: VersionRef, offset: int, form: Form | None = None) -> AsyncGenerator[bytes, None]:
        self.offsets.append(offset)
        pieces, error = self.breaks.pop(0) if self.breaks else (-1, None)
        for begin in range(offset, len(self.content), CHUNK_BYTES):
            if pieces == 0:
                break
            piece = self.content[begin : begin + CHUNK_BYTES]
            self.sent += len(piece)
            yield piece
            pieces -= 1
        if isinstance(error, Hang):
            self.waiting.set()
            await asyncio.Event().wait()
        if error is not None:
            raise error

    def attend(self, hello: object) -> None: ...

    async def upload(self, header: UploadHeader, payload: memoryview) -> Receipt:
        raise AssertionError

    async def resume(self, header: UploadHeader) -> int | Receipt:
        raise AssertionError


class Hang(ChoralError):
    """Not raised: the download stands still there."""


def model_file(source: Source, folder: Path) -> ModelFile:
    return ModelFile(source, folder, Patience(AtOnce()), ANYTHING)  # type: ignore[arg-type]


class Anything(Expected):
    """These tests are about bytes, whatever they mean."""

    largest_bytes = 1 << 30

    def places(self, file: io.BufferedIOBase) -> dict[str, Place]:
        return {}


ANYTHING = Anything(Manifest(()))


async def read(models: ModelFile, version: VersionRef) -> bytes:
    with await models.obtain(version) as file:
        return file.read()


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("content", [SMALL, LARGE[:CHUNK_BYTES], LARGE[: CHUNK_BYTES + 1], LARGE])
async def test_a_version_is_fetched_once(tmp_path: Path, content: bytes) -> None:
    source = Source(content)
    models = model_file(source, tmp_path)
    assert not models.holds(version(content))
    assert await asyncio.gather(*(read(models, version(content)) for _ in range(3))) == [content] * 3
    assert models.holds(version(content))
    assert source.offsets == [0]
    assert (tmp_path / "model.safetensors").read_bytes() == content
    assert names(tmp_path) == ["model.safetensors"]


async def test_what_an_earlier_start_has_left_is_not_fetched_again(tmp_path: Path) -> None:
    source = Source(LARGE)
    (tmp_path / "model.safetensors").write_bytes(LARGE)
    assert await read(model_file(source, tmp_path), version(LARGE)) == LARGE
    assert source.offsets == []


async def test_a_model_of_the_same_length_is_not_the_model(tmp_path: Path) -> None:
    source = Source(SMALL)
    (tmp_path / "model.safetensors").write_bytes(SMALL[::-1])
    assert await read(model_file(source, tmp_path), version(SMALL)) == SMALL


async def test_a_download_goes_on_where_the_link_broke(tmp_path: Path) -> None:
    gone = Unreachable("gone")
    source = Source(LARGE, (1, gone), (2, gone), (0, gone), (1, gone))
    assert await read(model_file(source, tmp_path), version(LARGE)) == LARGE
    assert source.offsets == [pieces * CHUNK_BYTES for pieces in (0, 1, 3, 3, 4)]
    assert source.sent == len(LARGE)


async def test_a_download_goes_on_after_a_restart_of_the_client(tmp_path: Path) -> None:
    source = Source(LARGE, (3, Hang()))
    obtaining = asyncio.create_task(model_file(source, tmp_path).obtain(version(LARGE)))
    await source.waiting.wait()
    obtaining.cancel()
    with suppress(asyncio.CancelledError):
        await obtaining
    assert part_of(tmp_path, version(LARGE)).stat().st_size == 3 * CHUNK_BYTES
    assert await read(model_file(source, tmp_path), version(LARGE)) == LARGE
    assert source.offsets == [0, 3 * CHUNK_BYTES]
    assert names(tmp_path) == ["model.safetensors"]


async def test_a_part_that_only_lacked_its_name(tmp_path: Path) -> None:
    part_of(tmp_path, version(LARGE)).write_bytes(LARGE)
    source = Source(LARGE)
    assert await read(model_file(source, tmp_path), version(LARGE)) == LARGE
    assert source.sent == 0


@pytest.mark.parametrize("part", [LARGE[:10] + b"?", LARGE + b"?", bytes(CHUNK_BYTES)])
async def test_a_damaged_part_is_found_and_fetched_again(tmp_path: Path, part: bytes) -> None:
    part_of(tmp_path, version(LARGE)).write_bytes(part)
    source = Source(LARGE)
    assert await read(model_file(source, tmp_path), version(LARGE)) == LARGE
    assert source.offsets[-1] == 0
    assert names(tmp_path) == ["model.safetensors"]


async def test_parts_of_other_versions_are_removed(tmp_path: Path) -> None:
    part_of(tmp_path, version(SMALL)).write_bytes(b"x")
    (tmp_path / "model.part").write_bytes(b"of a release before")
    source = Source(LARGE, *[(0, Unreachable("gone"))] * 4)
    with pytest.raises(Unreachable):
        await model_file(source, tmp_path).obtain(version(LARGE))
    assert names(tmp_path) == []


async def test_a_source_that_sends_something_else_is_given_up(tmp_path: Path) -> None:
    source = Source(LARGE[::-1])
    with pytest.raises(CorruptTransfer, match="version 3 arrived with another digest than was announced: fetch it again"):
        await model_file(source, tmp_path).obtain(version(LARGE))
    assert source.offsets == [0] * 4
    assert names(tmp_path) == []


async def test_it_is_given_up_when_four_attempts_bring_nothing(tmp_path: Path) -> None:
    gone = [(pieces, Unreachable(f"gone {attempt}")) for attempt, pieces in enumerate([0, 1, 0, 1, 0, 1, 0, 0])]
    source = Source(LARGE, *gone)
    models = model_file(source, tmp_path)
    with pytest.raises(Unreachable, match="gone 6"):
        await models.obtain(version(LARGE))
    source.breaks.clear()
    assert await read(models, version(LARGE)) == LARGE
    assert source.sent == len(LARGE)


async def test_a_refusal_ends_it_at_once(tmp_path: Path) -> None:
    source = Source(LARGE, (0, UnknownVersion("version 3 is not kept any more")))
    with pytest.raises(UnknownVersion):
        await model_file(source, tmp_path).obtain(version(LARGE))
    assert source.offsets == [0]


@pytest.mark.parametrize("content", [SMALL, LARGE])
async def test_a_disk_that_cannot_be_written_is_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "model.safetensors").mkdir()  # nothing can take its place
    with pytest.raises(Declined, match=r"version 3 cannot be kept in .* \(.*directory.*\): make room there"):
        await model_file(Source(content), tmp_path).obtain(version(content))


# What is not the installed model's

MANIFEST = Manifest((Entry("weight", "F32", (2, 1), 0, EntryKind.AVERAGED), Entry("steps", "I64", (), 0, EntryKind.COUNTER)))
GOOD = {"weight": torch.zeros(2, 1), "steps": torch.tensor(0)}
ROOM = (1 << 20) + 2 * 1024


async def obtained(folder: Path, content: bytes) -> bytes:
    models = ModelFile(Source(content), folder, Patience(AtOnce()), Expected(MANIFEST))  # type: ignore[arg-type]
    return await read(models, version(content))


async def test_the_models_own_tensors_are_kept_in_whatever_order(tmp_path: Path) -> None:
    for state in (GOOD, dict(reversed(GOOD.items()))):
        assert await obtained(tmp_path, save(state)) == save(state)


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (pickle.dumps(GOOD), "the version is no safetensors file"),
        (b"", "the version is no safetensors file"),
        (b"\xff" * 8 + b"{}", "the version is no safetensors file"),
        (save(GOOD)[:-1], "the version is no safetensors file"),
        (save({"weight": torch.zeros(2, 1)}), "tensor 'steps' is missing where I64 [] is expected"),
        (save(GOOD | {"more": torch.zeros(1)}), "tensor 'more' is F32 [1] where nothing is expected"),
        (save(GOOD | {"weight": torch.zeros(1, 2)}), "tensor 'weight' is F32 [1, 2] where F32 [2, 1] is expected"),
        (save(GOOD | {"weight": torch.zeros(2, 1).double()}), "tensor 'weight' is F64 [2, 1] where F32 [2, 1] is expected"),
        (save(GOOD | {"weight": torch.zeros(2, 1).to(torch.complex64)}), "where F32 [2, 1] is expected"),
    ],
)
async def test_another_file_does_not_take_the_models_place(tmp_path: Path, content: bytes, told: str) -> None:
    await obtained(tmp_path, save(GOOD))
    with pytest.raises(Declined, match=re.escape(told)):
        await obtained(tmp_path, content)
    with pytest.raises(Declined, match=re.escape(told)):
        Expected(MANIFEST).places(io.BytesIO(content))
    assert names(tmp_path) == ["model.safetensors"]
    assert (tmp_path / "model.safetensors").read_bytes() == save(GOOD)


@pytest.mark.parametrize(("size_bytes", "fetched"), [(16 + ROOM, True), (17 + ROOM, False), (2**62, False)])
async def test_a_version_that_cannot_be_so_large_is_not_begun(tmp_path: Path, size_bytes: int, fetched: bool) -> None:
    """The tensors have 2 · 4 and 8 bytes. What fits, and yet is not of that length, is another model."""
    source = Source(b"x" * size_bytes if fetched else b"")
    models = ModelFile(source, tmp_path, Patience(AtOnce()), Expected(MANIFEST))  # type: ignore[arg-type]
    told = "no safetensors file" if fetched else rf"announced with {size_bytes} bytes; .* has at most {16 + ROOM}"
    with pytest.raises(Declined, match=told):
        await models.obtain(VersionRef(3, hashlib.sha256(source.content).digest(), size_bytes))
    assert source.offsets == ([0] if fetched else [])
    assert names(tmp_path) == []


# In fewer bytes

ONE_TENSOR = Manifest((Entry("w", "F32", (5000,), 0, EntryKind.AVERAGED),))
WEIGHTS = torch.linspace(-1, 1, 5000)
BEFORE, AFTER = (save({"w": WEIGHTS + step}) for step in (0.0, 1e-4))
DELTA = b"".join(difference(io.BytesIO(AFTER), io.BytesIO(BEFORE)))
HALVED = b"".join(halved(io.BytesIO(AFTER), {"w"}))
ROUNDED = b"".join(restored(io.BytesIO(HALVED), {"w"}))


def sha256(content: bytes) -> bytes:
    return hashlib.sha256(content).digest()


BF16_FORM, DELTA_FORM = Form("bf16", len(HALVED), sha256(ROUNDED)), Form("delta", len(DELTA), sha256(AFTER), sha256(BEFORE))


class Forms(Source):
    """Sends each form that it has, and says that others are not kept any more."""

    def __init__(self, *breaks: tuple[int, ChoralError], **files: bytes) -> None:
        super().__init__(b"", *breaks)
        self.files = {"": AFTER} | files
        self.asked: list[str] = []

    async def download(self, version: VersionRef, offset: int, form: Form | None = None) -> AsyncGenerator[bytes, None]:
        name = form.name if form is not None else ""
        self.asked.append(name)
        if version.digest == sha256(BEFORE):
            self.content = BEFORE
        elif name in self.files:
            self.content = self.files[name]
        else:
            raise UnknownVersion("not kept any more")
        async with aclosing(super().download(version, offset)) as pieces:
            async for piece in pieces:
                yield piece


def expecting(source: Source, folder: Path) -> ModelFile:
    return ModelFile(source, folder, Patience(AtOnce()), Expected(ONE_TENSOR))


async def test_bf16_is_fetched_expanded_and_known_again(tmp_path: Path) -> None:
    source, wanted = Forms(bf16=HALVED), replace(version(AFTER), forms=(BF16_FORM,))
    assert await read(expecting(source, tmp_path), wanted) == ROUNDED
    assert (tmp_path / "model.safetensors").read_bytes() == ROUNDED
    assert await read(expecting(source, tmp_path), wanted) == ROUNDED
    assert source.asked == ["bf16"]  # once: the next start of the client found it
    assert await read(expecting(source, tmp_path), version(AFTER)) == AFTER  # where it is not to be had rounded any more


async def exactly(models: ModelFile, wanted: VersionRef) -> bytes:
    with await models.obtain(wanted, exactly=True) as file:
        return file.read()


@pytest.mark.parametrize("restarted", [True, False])
async def test_where_the_digest_is_signed_nothing_rounded_will_do_also_if_it_is_here(tmp_path: Path, restarted: bool) -> None:
    """A coordinator could give each client another rounded form, and all would sign the digest of the same version."""
    source, wanted = Forms(bf16=HALVED), replace(version(AFTER), forms=(BF16_FORM,))
    assert await exactly(expecting(source, tmp_path), wanted) == AFTER
    assert source.asked == [""]
    (tmp_path / "model.safetensors").unlink()
    models = expecting(source, tmp_path)
    assert await read(models, wanted) == ROUNDED
    models = expecting(source, tmp_path) if restarted else models
    assert await exactly(models, wanted) == AFTER
    assert await exactly(models, wanted) == AFTER
    assert source.asked == ["", "bf16", ""]


async def test_a_delta_that_makes_the_very_version_will_do(tmp_path: Path) -> None:
    source = Forms(delta=DELTA)
    models, wanted = expecting(source, tmp_path), replace(version(AFTER, 4), forms=(DELTA_FORM,))
    await models.obtain(version(BEFORE))
    assert await exactly(models, wanted) == AFTER
    assert source.asked == ["", "delta"]


@pytest.mark.parametrize("restarted", [True, False])
async def test_a_delta_is_fetched_by_who_has_its_base(tmp_path: Path, restarted: bool) -> None:
    source = Forms(delta=DELTA)
    models, wanted = expecting(source, tmp_path), replace(version(AFTER, 4), forms=(DELTA_FORM,))
    await models.obtain(version(BEFORE))
    if restarted:
        models = expecting(source, tmp_path)
    assert await read(models, wanted) == AFTER
    assert source.asked == ["", "delta"]
    assert (tmp_path / "model.safetensors").read_bytes() == AFTER
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]


async def test_who_has_not_the_base_fetches_the_version(tmp_path: Path) -> None:
    source = Forms(delta=DELTA)
    assert await read(expecting(source, tmp_path), replace(version(AFTER), forms=(DELTA_FORM,))) == AFTER
    assert source.asked == [""]


async def test_who_has_no_zstandard_fetches_the_version(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = Forms(delta=DELTA)
    models = expecting(source, tmp_path)
    await models.obtain(version(BEFORE))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert await read(models, replace(version(AFTER), forms=(DELTA_FORM,))) == AFTER
    assert source.asked == ["", ""]


@pytest.mark.parametrize(
    ("form", "files"),
    [
        (DELTA_FORM, {}),
        (DELTA_FORM, {"delta": b"nonsense"}),
        (DELTA_FORM, {"delta": DELTA[:-1]}),
        (DELTA_FORM, {"delta": b"".join(difference(io.BytesIO(BEFORE), io.BytesIO(AFTER)))}),
        (BF16_FORM, {"bf16": HALVED + b"x"}),
        (BF16_FORM, {"bf16": b"".join(halved(io.BytesIO(BEFORE), {"w"}))}),
        (replace(BF16_FORM, digest=bytes(32)), {"bf16": HALVED}),
        (replace(BF16_FORM, name="of tomorrow"), {}),
        (replace(BF16_FORM, size_bytes=0), {}),
        (replace(BF16_FORM, size_bytes=2**62), {}),
    ],
)
async def test_whatever_is_wrong_with_a_form_the_version_itself_is_fetched(
    tmp_path: Path, form: Form, files: dict[str, bytes]
) -> None:
    source = Forms(**files)
    models = expecting(source, tmp_path)
    await models.obtain(version(BEFORE))
    assert await read(models, replace(version(AFTER), forms=(form,))) == AFTER
    assert source.asked.count("") == 2
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]


async def test_a_form_that_breaks_is_gone_on_with(tmp_path: Path) -> None:
    content = save({"w": torch.randn(3 * CHUNK_BYTES // 4)})
    small = b"".join(halved(io.BytesIO(content), {"w"}))
    rounded = b"".join(restored(io.BytesIO(small), {"w"}))
    source = Forms((1, Unreachable("cut")), bf16=small)
    manifest = Manifest((Entry("w", "F32", (3 * CHUNK_BYTES // 4,), 0, EntryKind.AVERAGED),))
    models = ModelFile(source, tmp_path, Patience(AtOnce()), Expected(manifest))
    form = Form("bf16", len(small), sha256(rounded))
    assert await read(models, replace(version(content), forms=(form,))) == rounded
    assert (source.asked, source.offsets) == (["bf16", "bf16"], [0, CHUNK_BYTES])
