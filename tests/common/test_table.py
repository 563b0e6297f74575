from __future__ import annotations

import tracemalloc
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from choral.errors import DataError
from choral.table import Table, read_frame

NUMBERS = Table(["rooms", "age"], target="price")
CLASSES = Table(["rooms"], target="kind", kind="class")


def _file(folder: Path, text: str, name: str = "shard.csv") -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def _refusal(path: Path, table: Table = NUMBERS) -> str:
    with pytest.raises(DataError) as refused:
        table(path)
    told = str(refused.value)
    assert told.startswith(f"{path}: ")
    return told.removeprefix(f"{path}: ")


def test_loads_the_columns_in_the_order_asked_for(tmp_path: Path) -> None:
    path = _file(tmp_path, "price,street,age,rooms\n24,Elm,65.5,6\n21.6,Oak,78.25,5\n")
    x, y = NUMBERS(path).tensors
    assert x.dtype is torch.float32
    assert x.tolist() == [[6.0, 65.5], [5.0, 78.25]]
    assert y.dtype is torch.float32
    assert y.tolist() == [[24.0], [pytest.approx(21.6)]]


def test_class_targets_are_whole_numbers(tmp_path: Path) -> None:
    y = CLASSES(_file(tmp_path, "rooms,kind\n1,2\n2,0\n3,11\n")).tensors[1]
    assert y.dtype is torch.int64
    assert y.tolist() == [2, 0, 11]


def test_parquet_gives_the_same_tensors_as_csv(tmp_path: Path) -> None:
    frame = pd.DataFrame(
        {"rooms": [6, 5], "age": [65.5, 78.25], "price": np.array([24, 21.6], np.float32), "street": ["Elm", "Oak"]}
    )
    frame.to_parquet(tmp_path / "shard.parquet")
    frame.to_csv(tmp_path / "shard.csv", index=False)
    for a, b in zip(NUMBERS(tmp_path / "shard.parquet").tensors, NUMBERS(tmp_path / "shard.csv").tensors, strict=True):
        assert torch.equal(a, b)


def test_spaces_and_capitals_in_the_suffix_do_no_harm(tmp_path: Path) -> None:
    path = _file(tmp_path, "rooms, age, price\n6, 65.5, 24\n", "SHARD.CSV")
    assert NUMBERS(path).tensors[0].tolist() == [[6.0, 65.5]]


def test_refuses_what_is_no_file(tmp_path: Path) -> None:
    assert _refusal(tmp_path / "none.csv") == "does not exist; give the path of a CSV or Parquet file"
    assert _refusal(tmp_path) == "is not a file; give the path of a CSV or Parquet file"
    assert _refusal(_file(tmp_path, "x", "shard.xlsx")) == "cannot tell the format from '.xlsx'; name the file .csv or .parquet"


@pytest.mark.parametrize(
    ("text", "told"),
    [
        # nothing in it
        ("", "is empty; a header line and at least one row are needed"),
        ("\n\n", "is empty; a header line and at least one row are needed"),
        ("rooms,age,price\n", "has no rows; at least one example is needed"),
        # ragged: a row too short is a row with an empty cell
        ("rooms,age,price\n6,65,24\n5,78\n", "row 2, column price is empty: fill it in or remove the row"),
        # a column that is not there
        ("rooms,years,price\n6,65,24\n", "column age is missing; the file has rooms, years, price"),
        ("rooms;age;price\n6;65;24\n", "column rooms is missing; the file has rooms;age;price"),
        # cells that are no number, first of several
        ("rooms,age,price\n6,65,24\n5,old,21\n", "row 2, column age holds 'old', which is not a finite number"),
        ("rooms,age,price\n6,65,24\n5,7 8,high\n", "row 2, column age holds '7 8', which is not a finite number"),
        ("rooms,age,price\n6,65,\n", "row 1, column price is empty"),
        ("rooms,age,price\n6,NaN,24\n", "row 1, column age is empty"),
        ("rooms,age,price\n6,65,24\n,,21\n", "row 2, column rooms is empty"),
        ("rooms,age,price\n6,65,24\n5,inf,21\n", "row 2, column age holds inf, which is not a finite number"),
        ("rooms,age,price\n6,65,24\n5,78,-inf\n", "row 2, column price holds -inf, which is not a finite number"),
        ("rooms,age,price\n6,old,24\n5,inf,21\n", "row 1, column age holds 'old', which is not a finite number"),
    ],
)
def test_refuses_what_cannot_be_trained_on_and_says_where(tmp_path: Path, text: str, told: str) -> None:
    assert _refusal(_file(tmp_path, text)).startswith(told)


@pytest.mark.parametrize(
    "text",
    [
        "rooms,age,price\n6,65,24\n5,78,21,3\n",
        "rooms,age,price\n6,65,24,9\n5,78,21\n",
        "rooms,age,price\n6,65,24,9\n5,78,21,9\n",
        'rooms,age,price\n6,"65,24\n',
    ],
)
def test_refuses_rows_longer_than_the_header(tmp_path: Path, text: str) -> None:
    assert _refusal(_file(tmp_path, text)).startswith("its rows do not all have as many fields as the header (")


@pytest.mark.parametrize("cell", ["1e39", "-3.5e38"])
def test_refuses_a_number_that_float32_cannot_hold(tmp_path: Path, cell: str) -> None:
    """It would become infinite in the tensor."""
    path = _file(tmp_path, f"rooms,age,price\n6,65,24\n5,{cell},21\n")
    assert _refusal(path).startswith("row 2, column age holds")
    path = _file(tmp_path, f"rooms,age,price\n6,65,{cell}\n")
    assert _refusal(path).startswith("row 1, column price holds")
    assert "does not fit in float32" in _refusal(path)


@pytest.mark.parametrize(
    ("cell", "told"),
    [
        ("1.5", "row 2, column kind: 1.5 is no class; write 0, 1, 2, …"),
        ("-1", "row 2, column kind: -1.0 is no class; write 0, 1, 2, …"),
        ("cat", "row 2, column kind holds 'cat', which is not a finite number"),
        ("inf", "row 2, column kind holds"),
    ],
)
def test_refuses_what_is_no_class(tmp_path: Path, cell: str, told: str) -> None:
    assert _refusal(_file(tmp_path, f"rooms,kind\n1,0\n2,{cell}\n3,-7\n"), CLASSES).startswith(told)


def test_refuses_text_in_another_encoding(tmp_path: Path) -> None:
    path = tmp_path / "shard.csv"
    path.write_bytes("rooms,age,price,größe\n6,65,24,1\n".encode("latin-1"))
    assert _refusal(path).startswith("is not UTF-8 text")


def test_refuses_what_only_claims_to_be_parquet(tmp_path: Path) -> None:
    assert _refusal(_file(tmp_path, "rooms,age,price\n6,65,24\n", "shard.parquet")).startswith("is not a Parquet file")


def test_refuses_empty_cells_and_rows_in_parquet_too(tmp_path: Path) -> None:
    path = tmp_path / "shard.parquet"
    pd.DataFrame({"rooms": [6.0, None], "age": [65.0, 78.0], "price": [24.0, 21.0]}).to_parquet(path)
    assert _refusal(path).startswith("row 2, column rooms is empty")
    pd.DataFrame({"rooms": [], "age": [], "price": []}).to_parquet(path)
    assert _refusal(path).startswith("has no rows")


@pytest.mark.parametrize("repeated", [False, True])
def test_refuses_parquet_that_is_far_larger_in_memory_than_on_the_disk(tmp_path: Path, repeated: bool) -> None:
    """Zeros that are packed; or one long text, which the file has once and each of its rows names."""
    path = tmp_path / "bomb.parquet"
    zeros, text = pa.array(np.zeros(1_000_000)), pa.DictionaryArray.from_arrays(np.zeros(2_000, np.int32), ["x" * 1_000_000])
    with pq.ParquetWriter(path, pa.schema({"a": text.type if repeated else pa.float64()}), store_schema=False) as writer:
        for _ in range(1 if repeated else 140):
            writer.write_table(pa.table({"a": text if repeated else zeros}))
    tracemalloc.start()
    before = pa.default_memory_pool().max_memory()
    with pytest.raises(DataError, match=r"would take .* MiB of memory, over 100 times as much as on the disk"):
        read_frame(path)
    assert pa.default_memory_pool().max_memory() - before < 64 << 20
    assert tracemalloc.get_traced_memory()[1] < 64 << 20
    tracemalloc.stop()


def test_parquet_that_tells_nonsense_of_a_column_is_refused_and_ends_no_process(tmp_path: Path) -> None:
    """As fuzzing found it: the histogram of a column has another number of levels than the column."""
    path = tmp_path / "shard.parquet"
    pd.DataFrame({"a": [0.5, 1.5, 2.0]}).to_parquet(path, compression=None)
    content = path.read_bytes()
    metadata, length = content[:-8], int.from_bytes(content[-8:-4], "little")
    nonsense = metadata.replace(b"\x19\x26\x00\x06\x00", b"\x19\x36\x00\x06\x00\x00")  # three levels, where there are two
    assert len(nonsense) == len(metadata) + 1
    path.write_bytes(nonsense + (length + 1).to_bytes(4, "little") + content[-4:])
    with pytest.raises(DataError, match="is not a Parquet file"):
        read_frame(path)


def test_columns_of_lists_are_left_out(tmp_path: Path) -> None:
    pd.DataFrame({"a": [1.0, 2.0], "b": [[1], [2]]}).to_parquet(tmp_path / "lists.parquet")
    assert list(read_frame(tmp_path / "lists.parquet").columns) == ["a"]


def test_one_text_in_many_rows_is_read(tmp_path: Path) -> None:
    frame = pd.DataFrame({"street": ["Elm" * 20] * 5_000, "price": range(5_000)})
    frame.to_parquet(tmp_path / "streets.parquet")
    assert read_frame(tmp_path / "streets.parquet").equals(frame)


def test_a_frame_holds_all_columns(tmp_path: Path) -> None:
    frame = read_frame(_file(tmp_path, "price,street\n24,Elm\n"))
    assert frame.to_dict("records") == [{"price": 24, "street": "Elm"}]


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("a,b,y\n1,2,1e30\n", "is no class"),
        (",".join(["c"] * 20_000) + "\n1\n", "has more than 10000 columns"),
    ],
)
def test_a_hostile_table_is_refused(tmp_path: Path, content: str, told: str) -> None:
    path = tmp_path / "hostile.csv"
    path.write_text(content)
    with pytest.raises(DataError, match=told):
        Table(["a", "b"], target="y", kind="class")(path)


def test_what_a_table_holds_is_told_in_few_words(tmp_path: Path) -> None:
    path = tmp_path / "hostile.csv"
    path.write_text(f"a,b,y\n{'x' * 100_000},2,0\n")
    with pytest.raises(DataError) as refused:
        Table(["a", "b"], target="y")(path)
    assert len(str(refused.value)) < 1000
