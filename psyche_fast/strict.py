"""Strict decoding of what users and peers send: JSON text and plain objects into typed values.

`json.loads` alone takes NaN, Infinity and duplicate keys, and building a dataclass from a dict
takes wrong types. Each of these is one clear ValueError that names the field.
"""

from __future__ import annotations

import json
import math
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import msgspec

T = TypeVar("T")


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for key, value in pairs:
        if key in result:
            raise ValueError(f"key {key!r} appears twice")
        result[key] = value
    return result


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not a JSON number")


def loads(text: str | bytes, what: str) -> Any:
    """Parses standard JSON.

    Args:
        text: the JSON text.
        what: how to call it in an error, for example `"operation 12"`.

    Raises:
        ValueError: not JSON, a duplicate key, or one of NaN and Infinity.
    """
    try:
        return json.loads(text, object_pairs_hook=_unique_keys, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{what} is not valid JSON: {error}") from error


def load_toml(path: str, what: str) -> dict[str, Any]:
    """Reads a TOML file; a byte order mark is left out.

    Raises:
        ValueError: no such file, or not TOML.
    """
    try:
        return tomllib.loads(Path(path).read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise ValueError(f"{what}: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"{what} is not TOML: {error}") from error


def convert(obj: Any, kind: type[T], what: str) -> T:
    """Converts a plain object to `kind` without coercion beyond int to float.

    Raises:
        ValueError: an unknown or missing field, or a value of the wrong type, named with its path.
    """
    try:
        _refuse_non_finite(obj, what)  # 1e999 parses to inf without passing by `parse_constant`
    except RecursionError as error:
        raise ValueError(f"{what}: {error}") from error
    try:
        return msgspec.convert(obj, kind, strict=True)
    except (msgspec.ValidationError, RecursionError) as error:
        raise ValueError(f"{what}: {error}") from error


def read(text: str | bytes, kind: type[T], what: str) -> T:
    """`convert` of `loads`.

    Raises:
        ValueError: theirs.
    """
    return convert(loads(text, what), kind, what)


def tagged(obj: Any, forms: Mapping[str, type[T]], what: str) -> T:
    """Converts an externally tagged object, as serde writes them: `{"FORM": {fields}}`.

    Raises:
        ValueError: not exactly one of `forms`, or fields that `convert` refuses.
    """
    if not isinstance(obj, dict) or len(obj) != 1:
        raise ValueError(f"{what}: wanted an object with one of {', '.join(forms)}, got {obj!r}")
    ((name, fields),) = obj.items()
    if name not in forms:
        raise ValueError(f"{what}: unknown form {name!r}, known: {', '.join(forms)}")
    return convert(fields, forms[name], f"{what}.{name}")


def _refuse_non_finite(obj: Any, what: str) -> None:
    if isinstance(obj, float) and not math.isfinite(obj):
        raise ValueError(f"{what}: {obj} is not a finite number")
    if isinstance(obj, dict):
        for key, value in obj.items():
            _refuse_non_finite(value, f"{what}.{key}")
    elif isinstance(obj, list | tuple):
        for value in obj:
            _refuse_non_finite(value, what)
