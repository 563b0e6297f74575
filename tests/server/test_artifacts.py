"""The same for both stores: a folder, and a real object store that speaks S3."""

from __future__ import annotations

import asyncio
import random
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import obstore
import pytest
from choral.errors import ArtifactsGone, ConfigError, UnknownArtifact
from choral_server.artifacts import Artifacts, FolderArtifacts, open_artifacts
from choral_server.patience import patiently
from choral_server.s3 import S3Artifacts
from choral_server.troubles import Troubles
from proxy import Proxy
from server.object_store import ObjectStore

KEY = "runs/run/versions/000001.safetensors"
LARGE = random.Random(5).randbytes(21 << 20)


@dataclass(frozen=True)
class Opened:
    """A store in which there is nothing yet, and what people call it."""

    store: Artifacts
    shown: str


@pytest.fixture(params=["folder", "s3"])
async def opened(request: pytest.FixtureRequest, tmp_path: Path) -> Opened:
    if request.param == "folder":
        return Opened(await open_artifacts(None, tmp_path / "state"), str(tmp_path / "state"))
    url: str = request.getfixturevalue("bucket_url")
    return Opened(await open_artifacts(url, tmp_path / "state"), url.partition("?")[0])


@pytest.fixture
def artifacts(opened: Opened) -> Artifacts:
    return opened.store


@pytest.mark.parametrize("content", [b"", b"x", bytes(range(256)) * 1000, LARGE], ids=["none", "one", "some", "much"])
async def test_what_was_put_comes_back(artifacts: Artifacts, content: bytes) -> None:
    await artifacts.put(KEY, content)
    assert await artifacts.get(KEY) == content


@pytest.mark.parametrize("content", [b"", b"x", LARGE], ids=["none", "one", "much"])
async def test_a_file_that_was_put_comes_back_as_a_file(artifacts: Artifacts, tmp_path: Path, content: bytes) -> None:
    folder = (artifacts.local(KEY) or tmp_path / "elsewhere").parent
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / ".aside"
    for number in range(2):  # again, in its place
        path.write_bytes(content + bytes(number))
        await artifacts.put_file(KEY, path)
        await artifacts.get_file(KEY, tmp_path / "back")
        assert (tmp_path / "back").read_bytes() == await artifacts.get(KEY) == content + bytes(number)
    assert path.exists() is (artifacts.local(KEY) is None)
    with pytest.raises(UnknownArtifact, match="does not exist"):
        await artifacts.get_file("nothing", tmp_path / "back")


async def test_a_new_store_is_empty(artifacts: Artifacts) -> None:
    assert await artifacts.list("") == []
    assert await artifacts.list("runs/run/versions/") == []


async def test_what_was_put_again_replaces_it(artifacts: Artifacts) -> None:
    for content in (b"long before", LARGE, b"short"):
        await artifacts.put(KEY, content)
    assert await artifacts.get(KEY) == b"short"
    assert await artifacts.list("runs/run/versions/") == [KEY]


@pytest.mark.parametrize("key", [KEY, "nothing"])
async def test_what_was_never_put_is_unknown(artifacts: Artifacts, key: str) -> None:
    await artifacts.put("runs/other/versions/1", b"x")
    with pytest.raises(UnknownArtifact, match="does not exist"):
        await artifacts.get(key)


async def test_deleted_is_gone_and_deleted_twice_is_fine(artifacts: Artifacts) -> None:
    await artifacts.put(KEY, b"x")
    for _ in range(2):
        await artifacts.delete(KEY)
        with pytest.raises(UnknownArtifact):
            await artifacts.get(KEY)
    await artifacts.delete("nothing/like/that")


async def test_keys_below_a_prefix(artifacts: Artifacts) -> None:
    keys = [f"runs/{run}/versions/{number:06d}.safetensors" for run in ("a", "ab") for number in (10, 2, 1_000_000)]
    for key in keys:
        await artifacts.put(key, b"x")
    assert await artifacts.list("runs/a/versions/") == sorted(keys[:3])
    assert await artifacts.list("runs/a/") == sorted(keys[:3])
    assert await artifacts.list("runs/") == sorted(keys)
    assert await artifacts.list("runs/b/") == []


async def test_more_keys_than_one_page_of_a_list(artifacts: Artifacts) -> None:
    keys = [f"many/{number:04d}" for number in range(1100)]
    for start in range(0, len(keys), 50):
        await asyncio.gather(*(artifacts.put(key, b"") for key in keys[start : start + 50]))
    assert await artifacts.list("many/") == keys


async def test_people_are_told_where_it_is(opened: Opened) -> None:
    assert opened.store.location(KEY) == f"{opened.shown}/{KEY}"


async def test_what_is_kept_is_there_when_the_store_is_opened_again(
    object_store: ObjectStore, bucket_url: str, tmp_path: Path
) -> None:
    for where in (None, bucket_url):
        await (await open_artifacts(where, tmp_path)).put(KEY, LARGE)
    object_store.restart()
    for where in (None, bucket_url):
        assert await (await open_artifacts(where, tmp_path)).get(KEY) == LARGE


async def test_only_a_folder_has_files(tmp_path: Path, bucket_url: str) -> None:
    folder = await open_artifacts(None, tmp_path)
    await folder.put(KEY, b"x")
    assert folder.local(KEY) == tmp_path / KEY
    assert (tmp_path / KEY).read_bytes() == b"x"
    assert (await open_artifacts(bucket_url, tmp_path)).local(KEY) is None


# A folder


async def test_a_folder_that_cannot_be_used_says_why(tmp_path: Path) -> None:
    (tmp_path / "runs").write_text("a file where a folder should be")
    folder = FolderArtifacts(tmp_path)
    with pytest.raises(ArtifactsGone, match=r"000001.safetensors cannot be written \(.*\)"):
        await folder.put(KEY, b"x")
    with pytest.raises(ArtifactsGone, match=r"000001.safetensors cannot be read \(Not a directory\)"):
        await folder.get(KEY)
    (tmp_path / "runs").unlink()
    await folder.put(KEY, b"x")
    with pytest.raises(ArtifactsGone, match=r"versions cannot be deleted \(.*\)"):
        await folder.delete("runs/run/versions")
    assert await folder.get(KEY) == b"x"


async def test_a_file_that_has_its_name_already_stays(tmp_path: Path) -> None:
    """As when an earlier attempt could not make the name durable."""
    folder = FolderArtifacts(tmp_path)
    await folder.put(KEY, b"x")
    await folder.put_file(KEY, tmp_path / KEY)
    assert await folder.get(KEY) == b"x"


async def test_what_is_half_written_and_what_is_a_name_does_not_count(tmp_path: Path) -> None:
    folder = FolderArtifacts(tmp_path)
    await folder.put(KEY, b"x")
    versions = (tmp_path / KEY).parent
    (versions / ".000002.safetensors.aside").write_bytes(b"half a ver")
    (versions / "latest.safetensors").symlink_to("000001.safetensors")
    assert await folder.list("runs/run/versions/") == [KEY]


@pytest.mark.parametrize("size", [600_000, 200_000], ids=["large", "small"])  # written in a thread, and not
async def test_a_full_disk_leaves_nothing_half_done_and_is_waited_for(small_disk: Path, size: int) -> None:
    folder = FolderArtifacts(small_disk)
    keys = [f"v/{number}" for number in range(1_000_000 // size)]
    for key in keys:
        await folder.put(key, key.encode() * (size // len(key)))
    for key in ("v/new", keys[0]):  # a new file, and one that is there
        with pytest.raises(ArtifactsGone, match=r"cannot be written \(No space left on device\)"):
            await folder.put(key, b"n" * size)
    assert sorted(path.name for path in (small_disk / "v").iterdir()) == [key.removeprefix("v/") for key in keys]
    assert await folder.get(keys[0]) == keys[0].encode() * (size // len(keys[0]))

    troubles, news = Troubles(), asyncio.Event()
    troubles.on_change = news.set
    writing = asyncio.create_task(patiently(troubles, "artifacts", lambda: folder.put("v/new", b"n" * size)))
    await news.wait()
    assert list(troubles.present) == ["artifacts"]
    assert troubles.present["artifacts"] == f"{small_disk}/v/new cannot be written (No space left on device)"
    await folder.delete(keys[-1])
    await writing
    assert troubles.present == {}
    assert await folder.get("v/new") == b"n" * size


# S3


@contextmanager
def gone(server: ObjectStore) -> Iterator[None]:
    """Meanwhile nobody answers, unless the test itself starts it again."""
    server.stop()
    try:
        yield
    finally:
        if not server.running:
            server.start()


def over(port: int, url: str) -> str:
    """The same through a proxy."""
    return re.sub(r"127\.0\.0\.1:\d+", f"127.0.0.1:{port}", url)


def port_of(server: ObjectStore) -> int:
    return int(server.endpoint.rpartition(":")[2])


async def test_a_store_that_is_gone_for_a_while_is_waited_for(object_store: ObjectStore, bucket_url: str, tmp_path: Path) -> None:
    store = await open_artifacts(bucket_url, tmp_path)
    await store.put("before", b"b")
    troubles, news = Troubles(), asyncio.Event()
    troubles.on_change = news.set
    with gone(object_store):
        writing = asyncio.create_task(patiently(troubles, "artifacts", lambda: store.put(KEY, LARGE)))
        await news.wait()
        assert "cannot be written" in troubles.present["artifacts"]
        assert not writing.done()
    await writing
    assert troubles.present == {}
    assert (await store.get(KEY), await store.get("before")) == (LARGE, b"b")


async def test_every_request_to_a_store_that_is_gone_says_so_in_the_same_words(
    object_store: ObjectStore, bucket_url: str, tmp_path: Path
) -> None:
    """Otherwise each attempt would be a new trouble."""
    store = await open_artifacts(bucket_url, tmp_path)
    shown, file = bucket_url.partition("?")[0], tmp_path / "file"
    file.write_bytes(b"x")
    with gone(object_store):
        for _ in range(2):
            for work, what, done in (
                (store.put(KEY, b"x"), KEY, "written"),
                (store.put_file(KEY, file), KEY, "written"),
                (store.get(KEY), KEY, "read"),
                (store.get_file(KEY, file), KEY, "read"),
                (store.delete(KEY), KEY, "deleted"),
                (store.list("runs/"), "runs/", "listed"),
            ):
                with pytest.raises(ArtifactsGone) as raised:
                    await work
                told = f"{shown}/{what} cannot be {done} at {object_store.endpoint} (HTTP error: error sending request)"
                assert str(raised.value) == told


async def test_a_bucket_that_vanished_is_gone_and_not_empty(bucket_url: str) -> None:
    """Otherwise a version whose optimizer's state cannot be had would seem to have none."""
    store = S3Artifacts.at(bucket_url.replace("s3://", "s3://never-made-"))
    for work in (store.put(KEY, b"x"), store.get(KEY), store.delete(KEY), store.list("runs/")):
        with pytest.raises(ArtifactsGone, match="NoSuchBucket: The specified bucket does not exist"):
            await work


@pytest.mark.parametrize("size", [1 << 20, len(LARGE)], ids=["one piece", "several"])
async def test_a_link_that_breaks_leaves_what_was_there(
    object_store: ObjectStore, bucket_url: str, tmp_path: Path, size: int
) -> None:
    with Proxy(port_of(object_store)) as proxy:
        store = await open_artifacts(over(proxy.port, bucket_url), tmp_path)
        await store.put(KEY, b"before")
        proxy.cut_at(up=[proxy.up + size // 2])
        with pytest.raises(ArtifactsGone, match="cannot be written"):
            await store.put(KEY, LARGE[:size])
        assert await patiently(Troubles(), "artifacts", lambda: store.get(KEY)) == b"before"
        await patiently(Troubles(), "artifacts", lambda: store.put(KEY, LARGE[:size]))
        proxy.cut_at(down=[proxy.down + size // 2])
        with pytest.raises(ArtifactsGone, match="cannot be read"):
            await store.get(KEY)
        # other connections were cut too, and the first request on each of them tells
        assert await patiently(Troubles(), "artifacts", lambda: store.get(KEY)) == LARGE[:size]


async def test_a_store_that_says_nothing_is_gone(object_store: ObjectStore, bucket_url: str) -> None:
    with Proxy(port_of(object_store)) as proxy:
        store = S3Artifacts.at(over(proxy.port, bucket_url), silent_s=0.5)
        proxy.hang()
        for work in (store.put(KEY, b"x"), store.get(KEY), store.delete(KEY), store.list("runs/")):
            with pytest.raises(ArtifactsGone, match="cannot be"):
                await work


async def test_what_another_prefix_has_is_not_seen(bucket_url: str, tmp_path: Path) -> None:
    stores = [
        await open_artifacts(bucket_url.replace("/some/prefix", prefix), tmp_path) for prefix in ("/one", "/two", "", "/deep/er/")
    ]
    for number, store in enumerate(stores):
        await store.put(KEY, bytes([number]))
    assert [await store.get(KEY) for store in stores] == [bytes([number]) for number in range(4)]
    assert await stores[0].list("runs/") == [KEY]
    bucket = bucket_url.partition("/some")[0]
    assert [store.location("k") for store in stores] == [f"{bucket}{prefix}/k" for prefix in ("/one", "/two", "", "/deep/er")]


async def test_opening_leaves_nothing(object_store: ObjectStore, bucket_url: str, tmp_path: Path) -> None:
    await open_artifacts(bucket_url, tmp_path)
    assert object_store.keys(bucket_url) == []


# What cannot be opened


@pytest.mark.parametrize(
    ("url", "told"),
    [
        ("gs://bucket/prefix", "'gs' is not known; give s3://bucket/prefix, or nothing for the state folder"),
        ("/data/versions", "'/data/versions' is not known"),
        ("", "'' is not known"),
        ("user:secret@s3", "what is given is not known"),
        ("s3:///prefix", "names no bucket; give s3://bucket/prefix"),
        ("s3://[bucket/prefix", "is no URL: give s3://bucket/prefix"),
        ("s3://user:secret@bucket/prefix", "the URL holds credentials: give AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY instead"),
        ("s3://user@bucket/prefix", "the URL holds credentials"),
        ("s3://bucket?endpoint=https://user:secret@host", "the URL holds credentials"),
        ("s3://bucket?secret_access_key=secret", "'secret_access_key' is not known in the URL; allowed are endpoint and region"),
        ("s3://bucket?endpoint=", "give each of endpoint and region once and with a value"),
        ("s3://bucket?region=a&region=b", "give each of endpoint and region once and with a value"),
        ("s3://bucket/prefix#1", "and no #"),
        ("s3://bucket?endpoint=127.0.0.1:9000", "endpoint '127.0.0.1:9000' is no address; give https://host:port"),
        ("s3://bucket?endpoint=ftp://host", "endpoint 'ftp://host' is no address"),
        ("s3://bucket?endpoint=https://host:many", "is no URL"),
    ],
)
async def test_a_wrong_url_is_refused_with_the_cure(tmp_path: Path, url: str, told: str) -> None:
    with pytest.raises(ConfigError) as refused:
        await open_artifacts(url, tmp_path)
    assert str(refused.value).startswith("artifacts: ")
    assert told in str(refused.value)
    assert "user:secret" not in str(refused.value)
    assert "=secret" not in str(refused.value)


async def test_a_bucket_that_does_not_exist_is_refused_at_the_start(bucket_url: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"NoSuchBucket.*see that the bucket exists"):
        await open_artifacts(bucket_url.replace("s3://", "s3://never-made-"), tmp_path)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        (ObjectStore.credentials("reader"), "cannot be written .*AccessDenied"),
        ({"AWS_SECRET_ACCESS_KEY": "wrong"}, "SignatureDoesNotMatch"),
        ({"AWS_ACCESS_KEY_ID": "nobody"}, "InvalidAccessKeyId"),
    ],
)
async def test_credentials_that_do_not_suffice_are_refused_at_the_start(
    bucket_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, str], told: str
) -> None:
    for name, value in changes.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=told) as refused:
        await open_artifacts(bucket_url, tmp_path)
    assert "the AWS_* credentials may read, write and delete in it" in str(refused.value)


async def test_a_store_that_is_gone_is_refused_at_the_start(object_store: ObjectStore, bucket_url: str, tmp_path: Path) -> None:
    with gone(object_store), pytest.raises(ConfigError, match=r"cannot be written at http://127.0.0.1:.*error sending request"):
        await open_artifacts(bucket_url, tmp_path)


async def test_an_endpoint_that_speaks_no_tls_is_not_spoken_to_without(bucket_url: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be written at https://"):
        await open_artifacts(bucket_url.replace("http://", "https://"), tmp_path)


def test_the_region_of_the_environment_counts_where_the_url_has_none(bucket_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is part of what requests are signed with."""
    monkeypatch.setenv("AWS_REGION", "eu-central-1")
    for url, region in ((bucket_url, "eu-central-1"), (f"{bucket_url}&region=us-west-2", "us-west-2")):
        assert f"%2F{region}%2Fs3%2F" in obstore.sign(S3Artifacts.at(url)._store, "GET", KEY, timedelta(minutes=1))


def test_without_obstore_folders_work_and_s3_names_the_cure(tmp_path: Path) -> None:
    code = f"""
import asyncio, pathlib, sys
sys.modules["obstore"] = None
from choral.errors import ConfigError
from choral_server.artifacts import open_artifacts
asyncio.run(asyncio.run(open_artifacts(None, pathlib.Path({str(tmp_path)!r}))).put("k", b"x"))
try:
    asyncio.run(open_artifacts("s3://bucket", pathlib.Path(".")))
except ConfigError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout == "artifacts: S3 needs obstore: pip install 'choral[s3]'\n"
    assert (tmp_path / "k").read_bytes() == b"x"
