"""JSON lines of ours: each an object with known fields of known types, a key, and a seal.

The seal is a hash of the line's other fields, written last: whoever reads a line sees whether it
was changed since. Lines of older versions have none.

Knows what a row or a score holds only by the type hints that it is given.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args, get_origin

from specsampling.results.files import RecordsError

BEGINNING = b'{"example_id": '  # of each line

SEAL = "sha256"  # the field that holds it
SEAL_LETTERS = 16
CHANGED = "was changed after it was written"

Key = tuple[str, str, int]  # example_id, method, sample_index: unique in a file


def line_of(values: Mapping[str, Any]) -> bytes:
    """An object as a line of ours."""
    return json.dumps(sealed(values)).encode() + b"\n"


def sealed(values: Mapping[str, Any]) -> dict[str, Any]:
    """An object with its seal as the last field."""
    return {**values, SEAL: _seal_of(values)}


def unsealed(values: Mapping[str, Any]) -> tuple[dict[str, Any], bool]:
    """An object without its seal, and whether that is its own; without one it counts as such."""
    others = {name: value for name, value in values.items() if name != SEAL}
    return others, values.get(SEAL, _seal_of(others)) == _seal_of(others)


def _seal_of(values: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(values).encode()).hexdigest()[:SEAL_LETTERS]


def parse(path: Path, data: bytes, hints: Mapping[str, Any]) -> tuple[list[dict[str, Any]], int]:
    """The objects of a JSONL file, and how many bytes they take, each with its line's end.

    Each must hold the fields in `hints`, no others, and no key a second time. A last line that
    begins as ours do and breaks off was torn by a kill, and does not count.
    """
    *lines, last = data.split(b"\n")
    if last and not is_torn(last):
        lines.append(last)
    values: list[dict[str, Any]] = []
    seen: set[Key] = set()
    num_bytes = 0
    for number, line in enumerate(lines, start=1):
        try:
            value = json.loads(line)
        except (ValueError, RecursionError):
            value = None
        is_whole = True
        if isinstance(value, dict) and SEAL in value:
            value, is_whole = unsealed(value)
        problem = _problem(value, hints) or ("" if is_whole else CHANGED)
        if not problem:
            key = value["example_id"], value["method"], value["sample_index"]
            problem = f"repeats the row for {key}" if key in seen else ""
            seen.add(key)
        if problem:
            raise RecordsError(f"{path}, line {number}, {problem}; mend or delete the line")
        values.append(value)
        num_bytes += len(line) + 1
    return values, num_bytes


def is_torn(line: bytes) -> bool:
    """Whether a line without an end is the beginning of one of ours, or what a power cut leaves."""
    if not line.strip(b"\0"):
        return True
    if not (line.startswith(BEGINNING) or BEGINNING.startswith(line)):
        return False
    try:
        json.loads(line)
    except ValueError:
        return True
    return False  # an editor took the last line's end away


def _problem(value: Any, hints: Mapping[str, Any]) -> str:
    """What keeps a line's value from being a row, in words; empty if nothing does."""
    if not isinstance(value, dict):
        return "is not a JSON object"
    unknown = [name for name in value if name not in hints]
    if unknown:
        return f"has a field that is not known: {', '.join(unknown)}"
    for name, hint in hints.items():
        if not fits(hint, value.get(name)):
            wrong = f"has a wrong {name}: {str(value.get(name))[:60]!r}"
            return wrong if name in value else f"has no {name}"
    return ""


def fits(hint: Any, value: Any) -> bool:
    """Whether a value of JSON is of a type: a plain one, one or None, a list, an object."""
    args = get_args(hint)
    if type(None) in args:
        return value is None or fits(args[0], value)
    if get_origin(hint) is list:
        return isinstance(value, list) and all(fits(args[0], item) for item in value)
    if get_origin(hint) is dict:
        return isinstance(value, dict)
    # type() and not isinstance(): True is no integer here.
    return type(value) is hint or (hint is float and type(value) is int)
