"""Table: a CSV or Parquet file of numbers as tensors, checked cell by cell."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import TensorDataset

from choral.errors import DataError

if TYPE_CHECKING:
    import pandas as pd  # else imported by who reads a file: a coordinator has none, and waits for the import of its task

_COLUMNS, _LONGEST_LINE = 10_000, 1 << 20
_CLASSES = 2**31  # no network tells so many apart
_TOLD = 100  # of a file's columns, and of each name the characters
_CELL_BYTES = 8  # of a number or a reference
_ALWAYS_BYTES, _INFLATION = 1 << 30, 100  # whatever trains can hold the one; tables of measurements do not shrink by the other


@dataclass(frozen=True)
class Table:
    """Loads the `features` columns as float32 `(n, d)` and the `target` column.

    A target of `kind` "number" becomes float32 `(n, 1)`, of kind "class" int64 `(n,)`. Other columns of the file are ignored.
    Call it with a path. Raises DataError: the file is missing, empty or ragged, a column is missing, or a cell is empty,
    infinite or not a number; the row (counted from 1 after the header) and the column are named.
    """

    features: Sequence[str]
    target: str
    kind: Literal["number", "class"] = "number"

    def __call__(self, path: Path) -> TensorDataset:
        """Load the file."""
        frame = read_frame(path)
        numbers = self._numbers(frame, path)
        x = torch.from_numpy(numbers[:, :-1].astype(np.float32))
        y = numbers[:, -1]
        if self.kind == "number":
            return TensorDataset(x, torch.from_numpy(y.astype(np.float32)[:, None]))
        if (bad := (y != np.floor(y)) | (y < 0) | (y >= _CLASSES)).any():
            row = int(np.flatnonzero(bad)[0])
            raise DataError(f"{path}: row {row + 1}, column {self.target}: {y[row]} is no class; write 0, 1, 2, …")
        return TensorDataset(x, torch.from_numpy(y.astype(np.int64)))

    def _numbers(self, frame: pd.DataFrame, path: Path) -> NDArray[np.float64]:
        import pandas as pd

        columns = [*self.features, self.target]
        missing = [name for name in columns if name not in frame.columns]
        if missing:
            there = ", ".join(str(name)[:_TOLD] for name in frame.columns[:_TOLD])
            raise DataError(f"{path}: column {missing[0]} is missing; the file has {there}")
        if len(frame.columns) != len(set(frame.columns)):
            raise DataError(f"{path}: two of its columns have the same name: rename or remove one")
        try:
            numbers: NDArray[np.float64] = frame[columns].apply(pd.to_numeric, errors="coerce").to_numpy(np.float64)
        except (TypeError, ValueError, OverflowError) as error:  # lists, say, or dates
            raise DataError(f"{path}: a column holds what is no number ({error}): write numbers") from error
        with np.errstate(over="ignore"):
            bad = np.argwhere(~np.isfinite(numbers.astype(np.float32)))
        if len(bad):
            row, column = map(int, bad[0])
            cell = frame[columns].iat[row, column]
            shown = repr(cell[:_TOLD]) if isinstance(cell, str) else str(cell)[:_TOLD]
            what = "does not fit in float32" if np.isfinite(numbers[row, column]) else "is not a finite number"
            said = "is empty" if frame[columns].isna().iat[row, column] else f"holds {shown}, which {what}"
            raise DataError(f"{path}: row {row + 1}, column {columns[column]} {said}: fill it in or remove the row")
        return numbers


def read_frame(path: Path) -> pd.DataFrame:
    """The CSV or Parquet file at `path`, at least one row; of Parquet, columns of lists are left out. Raises DataError."""
    if not path.is_file():
        raise DataError(f"{path}: {'is not a file' if path.exists() else 'does not exist'}; give the path of a CSV or Parquet file")
    readers = {".csv": _read_csv, ".parquet": _read_parquet}
    reader = readers.get(path.suffix.lower())
    if reader is None:
        raise DataError(f"{path}: cannot tell the format from {path.suffix!r}; name the file .csv or .parquet")
    try:
        frame = reader(path)
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error})") from error
    if frame.empty:
        raise DataError(f"{path}: has no rows; at least one example is needed")
    return frame


def _read_csv(path: Path) -> pd.DataFrame:
    import pandas as pd

    with path.open("rb") as file:
        if file.readline(_LONGEST_LINE).count(b",") >= _COLUMNS:  # pandas takes for ever to tell apart so many of one name
            raise DataError(f"{path}: has more than {_COLUMNS} columns; is it a table?")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", pd.errors.ParserWarning)
            return pd.read_csv(path, index_col=False, skipinitialspace=True)
    except pd.errors.EmptyDataError as error:
        raise DataError(f"{path}: is empty; a header line and at least one row are needed") from error
    except (pd.errors.ParserError, pd.errors.ParserWarning) as error:
        raise DataError(
            f"{path}: its rows do not all have as many fields as the header ({' '.join(str(error).split())})"
        ) from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: is not UTF-8 text (byte {error.start}); save it as CSV in UTF-8") from error


def _read_parquet(path: Path) -> pd.DataFrame:
    import pandas as pd

    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError as error:
        raise DataError(f"{path}: reading Parquet needs pyarrow: pip install 'choral[parquet]'") from error
    try:
        with pq.ParquetFile(path) as file:
            metadata, columns = file.metadata, [field for field in file.schema_arrow if not pa.types.is_nested(field.type)]
        most, in_memory = max(_ALWAYS_BYTES, _INFLATION * path.stat().st_size), _decoded_bytes(metadata, columns)
        in_memory += _repeated_bytes(path, metadata, columns, most) if in_memory <= most else 0
        if in_memory <= most:
            return pd.read_parquet(path, engine="pyarrow", columns=[field.name for field in columns])
    except Exception as error:
        if isinstance(error, MemoryError):
            raise
        raise DataError(f"{path}: is not a Parquet file ({error})") from error
    raise DataError(
        f"{path}: would take {in_memory / 2**20:.0f} MiB of memory, over {_INFLATION} times as much as on the disk: "
        "is it the right file? If so, split it or leave out columns"
    )


def _row_groups(metadata: Any) -> list[Any]:
    """What is told of each. Their columns are never asked: there, Arrow ends the process if a file tells nonsense."""
    return [metadata.row_group(group) for group in range(metadata.num_row_groups)]


def _decoded_bytes(metadata: Any, columns: Sequence[Any]) -> int:
    """Memory that the values of a Parquet file take. What is packed is unpacked, and one value that is repeated written out."""
    import pyarrow as pa

    wide = [field.type.byte_width for field in columns if pa.types.is_fixed_size_binary(field.type)]
    row_bytes = _CELL_BYTES * len(columns) + sum(wide)
    return sum(max(group.total_byte_size, row_bytes * group.num_rows) for group in _row_groups(metadata))


def _repeated_bytes(path: Path, metadata: Any, columns: Sequence[Any], most: int) -> int:
    """Memory that texts take which a Parquet file has once and names often: looked at only if it could be more than `most`."""
    import pyarrow as pa
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    texts = [field.name for field in columns if _is_text(field.type)]
    if not texts or sum(group.total_byte_size * group.num_rows for group in _row_groups(metadata)) <= most:
        return 0
    size = 0
    with pq.ParquetFile(path, read_dictionary=texts) as file:
        for batch in file.iter_batches(columns=texts):
            for column in batch.columns:
                lengths = pc.binary_length(column.dictionary).cast(pa.int64())
                size += pc.sum(lengths.take(column.indices)).as_py() or 0
            if size > most:
                break
    return size


def _is_text(kind: Any) -> bool:
    """Whether its values are of no fixed length."""
    import pyarrow as pa

    return any(
        is_one(kind) for is_one in (pa.types.is_string, pa.types.is_binary, pa.types.is_large_string, pa.types.is_large_binary)
    )
