"""JSON that comes with a model, read as untrusted input: whatever is wrong with it becomes one clear line."""

from __future__ import annotations

import json
import reprlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn, TypeGuard

from engine.errors import RillError

_brief = reprlib.Repr()
_brief.maxstring = _brief.maxother = _brief.maxlong = 80


def brief(value: object) -> str:
    """The value as one short printable line for an error message."""
    return _brief.repr(value)


def one_line(text: str) -> str:
    """A foreign message made fit for ours: its first line, printable, not endless."""
    line = "".join(c if c.isprintable() else "?" for c in (text.strip().splitlines() or [""])[0][:1000])
    return line if len(line) <= 200 else f"{line[:200]}..."


def read_bytes(path: Path, max_bytes: int) -> bytes:
    """The content of a regular file of at most `max_bytes`; anything else raises RillError naming it."""
    try:
        if path.exists() and not path.is_file():
            raise RillError(f"{path}: is not a regular file")  # opening a pipe would wait for ever
        with path.open("rb") as file:
            data = file.read(max_bytes + 1)
    except FileNotFoundError:
        raise RillError(f"{path}: no such file") from None
    except (OSError, ValueError) as error:
        raise RillError(f"{path}: cannot be read: {error}") from None
    if len(data) > max_bytes:
        raise RillError(f"{path}: is larger than {max_bytes:,} bytes, which no file of its kind is")
    return data


def parse_object(data: bytes, where: str) -> dict[str, Any]:
    """Parse UTF-8 JSON whose top is an object. Stricter than the standard library: a key that appears
    twice, NaN and Infinity are refused. Errors start with `where`."""
    try:
        value = json.loads(data.decode("utf-8"), object_pairs_hook=_unique, parse_constant=_no_constant)
    except UnicodeDecodeError as error:
        raise RillError(f"{where}: is not UTF-8 (byte {error.start})") from None
    except RecursionError:
        raise RillError(f"{where}: its JSON is nested too deeply") from None
    except ValueError as error:
        raise RillError(f"{where}: is not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise RillError(f"{where}: its JSON is not an object but {brief(value)}")
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for key, value in pairs:
        if key in values:
            raise ValueError(f"the key {brief(key)} appears twice")
        values[key] = value
    return values


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a JSON number")


class Fields:
    """A JSON object read field by field, each with its type and interval, as in
    `fields.integer("top_k", "[0, 1000]")`. A refusal names the file and the field. `null` counts as absent.

    A getter without a default (None) requires the field.
    """

    def __init__(self, where: str, values: Mapping[str, Any], prefix: str = "") -> None:
        self.where = where
        self.values = values
        self.prefix = prefix

    def has(self, name: str) -> bool:
        return self.values.get(name) is not None

    def is_null(self, name: str) -> bool:
        """True where the field says `null` itself, rather than being absent."""
        return name in self.values and self.values[name] is None

    def error(self, name: str, problem: str) -> RillError:
        return RillError(f"{self.where}: {self.prefix}{name}: {problem}")

    def expected(self, name: str, what: str) -> RillError:
        return self.error(name, f"must be {what}, found {brief(self.values.get(name))}")

    def boolean(self, name: str, default: bool | None = None) -> bool:
        value = self._value(name, default)
        if not isinstance(value, bool):
            raise self.expected(name, "true or false")
        return value

    def text(self, name: str, default: str | None = None) -> str:
        value = self._value(name, default)
        if not isinstance(value, str):
            raise self.expected(name, "a string")
        return value

    def integer(self, name: str, interval: str, default: int | None = None) -> int:
        value = self._value(name, default)
        if not _is_integer(value) or not _inside(value, interval):
            raise self.expected(name, f"an integer in {interval}")
        return value

    def number(self, name: str, interval: str, default: float | None = None) -> float:
        value = self._value(name, default)
        if not (_is_integer(value) or isinstance(value, float)) or not _inside(value, interval):
            raise self.expected(name, f"a number in {interval}")
        return float(value)

    def token_ids(self, name: str) -> frozenset[int]:
        """One token id or a list of them; empty where there are none."""
        value = self._value(name, [])
        ids = value if isinstance(value, list) else [value]
        if not all(_is_integer(i) and 0 <= i < 2**31 for i in ids):
            raise self.expected(name, "a token id or a list of token ids")
        return frozenset(ids)

    def inner(self, name: str) -> Fields:
        """The object inside a field; an empty one where there is none."""
        value = self._value(name, {})
        if not isinstance(value, dict):
            raise self.expected(name, "an object")
        return Fields(self.where, value, f"{self.prefix}{name}.")

    def _value(self, name: str, default: Any) -> Any:
        value = self.values.get(name)
        if value is None:
            value = default
        if value is None:
            raise self.error(name, "is missing")
        return value


def _is_integer(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool)


def _inside(value: float, interval: str) -> bool:
    """Whether a value lies in an interval with finite ends, written as in "(0, 1]"; NaN lies in none."""
    low, high = (float(end) for end in interval[1:-1].split(","))
    above = value > low if interval[0] == "(" else value >= low
    below = value < high if interval[-1] == ")" else value <= high
    return above and below
