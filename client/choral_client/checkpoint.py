"""What a checkpoint may be on this device: a safetensors file of the installed model's tensors, whatever the coordinator sends."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from choral.errors import Declined
from choral.flat import DTYPES
from choral.forms import rounded_names
from choral.manifest import Manifest
from choral.wire import brief
from safetensors import SafetensorError, safe_open
from safetensors.torch import load
from torch import Tensor

_HEADER_BYTES = 1 << 20  # room for the file's own header,
_ENTRY_BYTES = 1 << 10  # which tells this much of each tensor
_ITEM_BYTES = {name: dtype.itemsize for dtype, name in DTYPES.items()}


class Expected:
    """What is expected of each checkpoint: the tensors in `manifest`, no more and no others."""

    def __init__(self, manifest: Manifest) -> None:
        self.manifest = manifest
        self.rounded = rounded_names(manifest)
        self._told = {entry.name: f"{entry.dtype} {list(entry.shape)}" for entry in manifest.entries}

    @property
    def largest_bytes(self) -> int:
        """Length of the longest file that can be one."""
        tensors = sum(entry.size * _ITEM_BYTES[entry.dtype] for entry in self.manifest.entries)
        return tensors + _HEADER_BYTES + _ENTRY_BYTES * len(self.manifest.entries)

    def check(self, path: Path) -> None:
        """Look at a file's header, as cheap as it is. Raises Declined: it is no safetensors file, or one of another model."""
        try:
            with safe_open(path, "pt") as file:
                slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 - it is no mapping
                self._compare({name: f"{one.get_dtype()} {list(one.get_shape())}" for name, one in slices.items()})
        except (SafetensorError, FileNotFoundError) as error:  # a version of no bytes leaves no file
            raise _not_safetensors(error) from error

    def read(self, content: bytes) -> dict[str, Tensor]:
        """The tensors. Nothing in the file is run: it is never unpickled. Raises Declined as `check`."""
        try:
            tensors = load(content)
        except (SafetensorError, KeyError, TypeError, ValueError, RuntimeError) as error:  # of a type that torch lacks, or a size
            raise _not_safetensors(error) from error
        self._compare({name: f"{DTYPES.get(one.dtype, one.dtype)} {list(one.shape)}" for name, one in tensors.items()})
        return tensors

    def _compare(self, theirs: Mapping[str, str]) -> None:
        for name in sorted(self._told.keys() | theirs.keys()):
            if self._told.get(name) != theirs.get(name):
                raise Declined(
                    f"the version is of another model than the task installed here: tensor {name[:100]!r} is "
                    f"{theirs.get(name, 'missing')} where {self._told.get(name, 'nothing')} is expected"
                )


def _not_safetensors(error: Exception) -> Declined:
    return Declined(f"the version is no safetensors file ({brief(str(error))}): nothing else is opened here")
