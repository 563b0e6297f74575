"""Strict configuration: YAML into frozen pydantic values, with messages that name the file, the key, the value and the cure."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic_core import ErrorDetails

from choral.errors import ConfigError


class Settings(BaseModel):
    """Base of every configuration value: frozen, unknown keys refused, no silent conversion of types."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, use_attribute_docstrings=True)


S = TypeVar("S", bound=Settings)
_LONGEST_BYTES = 1 << 16
_DEEPEST = 32  # levels
_NUMBER_BITS = 63  # with the sign, what databases and torch can hold


def read(path: Path, kind: type[S]) -> S:
    """Read a YAML file as `kind`. Raises ConfigError: as `read_mapping`, or it holds an unknown key or a value not allowed."""
    return parse(read_mapping(path), kind, str(path))


def read_mapping(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file. Raises ConfigError: the file is missing, is not YAML, or holds something else."""
    try:
        with path.open("rb") as file:
            content_bytes = file.read(_LONGEST_BYTES + 1)
        text = content_bytes.decode("utf-8")
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror}): give the path of a YAML file") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: is not UTF-8 text (byte {error.start}): save it as UTF-8") from error
    if len(content_bytes) > _LONGEST_BYTES:
        raise ConfigError(f"{path}: is longer than {_LONGEST_BYTES} bytes: give the path of a configuration")
    try:
        content = yaml.load(text, _Loader)  # noqa: S506 - a SafeLoader that refuses more
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: is not valid YAML: {_one_line(error)}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: holds {_shown(content)}; a mapping of keys to values is expected")
    return content


def parse(content: dict[str, Any], kind: type[S], source: str) -> S:
    """Validate `content`, which came from `source`, as `kind`. Raises ConfigError."""
    try:
        return kind.model_validate(content)
    except ValidationError as error:
        raise ConfigError("\n".join(_explain(source, kind, one) for one in error.errors(include_url=False))) from None


class _Loader(yaml.SafeLoader):
    """Refuses a key that stands twice in one mapping, of which YAML would silently keep the last; and what no configuration needs.

    That is: a key that is no text, more than `_DEEPEST` levels, and aliases, with which a few lines become billions of values.
    """

    _depth = 0

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        """The next node of the file."""
        if self.check_event(yaml.AliasEvent):
            raise _refused("an alias (*) is not allowed here: write the value again", self.peek_event().start_mark)  # type: ignore[no-untyped-call]
        self._depth += 1
        if self._depth > _DEEPEST:
            raise _refused(f"more than {_DEEPEST} levels", self.peek_event().start_mark)  # type: ignore[no-untyped-call]
        node = super().compose_node(parent, index)
        self._depth -= 1
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """A mapping."""
        seen = set()
        for key_node, _ in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                raise _refused("a key must be a name", key_node.start_mark)
            if key_node.value in seen:
                raise _refused(f"the key {key_node.value} stands twice: remove one", key_node.start_mark)
            seen.add(key_node.value)
        return super().construct_mapping(node, deep)

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        """Any value. PyYAML's own readers of numbers and dates raise what they like."""
        try:
            value = super().construct_object(node, deep)
        except (ValueError, TypeError, LookupError, AttributeError, ArithmeticError) as error:
            raise _refused(f"this cannot be read ({error}): write it in quotes if it is meant as text", node.start_mark) from error
        if isinstance(value, int) and value.bit_length() > _NUMBER_BITS:
            raise _refused(f"a number of {value.bit_length()} bits; at most {_NUMBER_BITS} are possible", node.start_mark)
        if isinstance(value, str) and not (value.isprintable() or _is_text(value)):
            raise _refused("a text with a NUL, or half a character", node.start_mark)
        return value


def _is_text(value: str) -> bool:
    """Whether a file, a database or a terminal can hold it."""
    try:
        return b"\0" not in value.encode()
    except UnicodeEncodeError:
        return False


def _refused(what: str, mark: yaml.Mark) -> yaml.YAMLError:
    return yaml.constructor.ConstructorError(None, None, what, mark)


def _explain(source: str, kind: type[BaseModel], error: ErrorDetails) -> str:
    key = ".".join(str(part) for part in error["loc"])
    where = f"{source}: {key}" if key else source
    allowed = list(_fields_at(kind, error["loc"][:-1]))
    if error["type"] == "extra_forbidden":
        close = difflib.get_close_matches(str(error["loc"][-1]), allowed, n=1, cutoff=0.6)
        hint = f"did you mean {close[0]}? " if close else ""
        return f"{where}: unknown key; {hint}Allowed here: {', '.join(allowed)}"
    if error["type"] == "missing":
        return f"{where}: is missing{_meaning(kind, error['loc'])}"
    told = error["msg"].removeprefix("Value error, ").removeprefix("Input should be ")
    if isinstance(error["input"], str) and re.fullmatch(r"\d+[eE][-+]?\d+", error["input"]):
        told += "; YAML takes this for text: write 1.0e-3, with a point"
    if error["type"] == "value_error" and isinstance(error["input"], dict):
        return f"{where}: {told}"  # a combination of keys, which the message names
    return f"{where}: {_shown(error['input'])} is not allowed: {told}{_meaning(kind, error['loc'])}"


def _meaning(kind: type[BaseModel], loc: tuple[int | str, ...]) -> str:
    model = _model_at(kind, loc[:-1])
    field = model.model_fields.get(str(loc[-1])) if model and loc else None
    return f" ({' '.join(field.description.split())})" if field is not None and field.description else ""


def _fields_at(kind: type[BaseModel], loc: Iterable[int | str]) -> Iterable[str]:
    model = _model_at(kind, loc)
    return model.model_fields if model else ()


def _model_at(kind: type[BaseModel], loc: Iterable[int | str]) -> type[BaseModel] | None:
    model: type[BaseModel] | None = kind
    for part in loc:
        field = model.model_fields.get(str(part)) if model else None
        model = _settings_in(field.annotation) if field is not None else None
    return model


def _settings_in(annotation: Any) -> type[BaseModel] | None:
    candidates = [annotation, *getattr(annotation, "__args__", ())]
    return next((c for c in candidates if isinstance(c, type) and issubclass(c, BaseModel)), None)


def _shown(value: object) -> str:
    if isinstance(value, dict | list):
        return "a mapping" if isinstance(value, dict) else "a list"
    return "nothing" if value is None else repr(value)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
