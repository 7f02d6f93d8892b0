"""Reads and writes our JSON lines: objects with known fields of known types, a key and a seal.

The seal is a hash of the line's other fields and is written last. A reader sees by the seal whether
the line was changed since. A line without a seal is read, too. This module knows what a row or a
score holds only by the type hints that it is given.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args, get_origin

from specsampling.results.files import RecordsError

BEGINNING = b'{"example_id": '  # the beginning of each line

SEAL = "sha256"  # the field that holds the seal
CHANGED = "was changed after it was written"

Key = tuple[str, str, int]  # example_id, method, sample_index: unique in a file


def key_of(values: Mapping[str, Any]) -> Key:
    return values["example_id"], values["method"], values["sample_index"]


def hash_of(value: Any) -> str:
    """Return a hash of plain values, in 16 hexadecimal digits."""
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:16]


def sealed(values: Mapping[str, Any]) -> dict[str, Any]:
    """Add an object's seal as its last field."""
    return {**values, SEAL: hash_of(values)}


def unsealed(values: Mapping[str, Any]) -> tuple[dict[str, Any], bool]:
    """Return an object without its seal, and whether the seal is right or missing."""
    others = {name: value for name, value in values.items() if name != SEAL}
    return others, SEAL not in values or values[SEAL] == hash_of(others)


def line_of(values: Mapping[str, Any]) -> bytes:
    return json.dumps(sealed(values)).encode() + b"\n"


def parse(path: Path, data: bytes, hints: Mapping[str, Any]) -> tuple[list[dict[str, Any]], int]:
    """Parse a JSONL file into its objects and the number of bytes of their lines.

    Each object must hold the fields in `hints` and no others, and a key of its own. A last line
    that begins as ours do and breaks off was torn by a kill. Such a line is left out.
    """
    *lines, last = data.split(b"\n")
    if last and not is_torn(last):
        lines.append(last)
    values: list[dict[str, Any]] = []
    seen: set[Key] = set()
    for number, line in enumerate(lines, start=1):
        try:
            value = json.loads(line)
        except (ValueError, RecursionError):
            value = None
        is_whole = True
        if isinstance(value, dict):
            value, is_whole = unsealed(value)
        problem = _problem(value, hints) or ("" if is_whole else CHANGED)
        if not problem:
            key = key_of(value)
            problem = f"repeats the row for {key}" if key in seen else ""
            seen.add(key)
        if problem:
            raise RecordsError(f"{path}, line {number}, {problem}; mend or delete the line")
        values.append(value)
    return values, sum(len(line) + 1 for line in lines)


def is_torn(line: bytes) -> bool:
    """Tell whether a last line is a part of one of ours, or the NULs that a power cut leaves."""
    if not line.strip(b"\0"):
        return True
    if not (line.startswith(BEGINNING) or BEGINNING.startswith(line)):
        return False
    try:
        json.loads(line)
    except ValueError:
        return True
    return False  # the line is whole: an editor removed its newline


def _problem(value: Any, hints: Mapping[str, Any]) -> str:
    """Say why a line's value is not a row; "" if it is a row."""
    if not isinstance(value, dict):
        return "is not a JSON object"
    if unknown := [name for name in value if name not in hints]:
        return f"has a field that is not known: {', '.join(unknown)}"
    for name, hint in hints.items():
        if not fits(hint, value.get(name)):
            wrong = f"has a wrong {name}: {str(value.get(name))[:60]!r}"
            return wrong if name in value else f"has no {name}"
    return ""


def fits(hint: Any, value: Any) -> bool:
    """Tell whether a JSON value has a type: plain, optional, a list or an object."""
    args = get_args(hint)
    if type(None) in args:
        return value is None or fits(args[0], value)
    if get_origin(hint) is list:
        return isinstance(value, list) and all(fits(args[0], item) for item in value)
    if get_origin(hint) is dict:
        return isinstance(value, dict)
    # type() and not isinstance(): True is no integer here.
    return type(value) is hint or (hint is float and type(value) is int)
