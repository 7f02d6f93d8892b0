"""JSON lines of ours: each an object with known fields of known types, and a key.

Knows what a row or a score holds only by the type hints that it is given.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args, get_origin

from specsampling.results.files import RecordsError

Key = tuple[str, str, int]  # example_id, method, sample_index: unique in a file


def parse(path: Path, data: bytes, hints: Mapping[str, Any]) -> tuple[list[dict[str, Any]], int]:
    """The objects of a JSONL file, and how many bytes they take: less than all if it is torn.

    Each must hold the fields in `hints`, no others, and no key a second time.
    """
    *lines, torn = data.split(b"\n")
    values: list[dict[str, Any]] = []
    seen: set[Key] = set()
    num_bytes = 0
    for number, line in enumerate(lines, start=1):
        try:
            value = json.loads(line)
        except (ValueError, RecursionError):
            if number == len(lines) and not torn:
                break
            value = None
        problem = _problem(value, hints)
        if not problem:
            key = value["example_id"], value["method"], value["sample_index"]
            problem = f"repeats the row for {key}" if key in seen else ""
            seen.add(key)
        if problem:
            raise RecordsError(f"{path}, line {number}, {problem}; mend or delete the line")
        values.append(value)
        num_bytes += len(line) + 1
    return values, num_bytes


def _problem(value: Any, hints: Mapping[str, Any]) -> str:
    """What keeps a line's value from being a row, in words; empty if nothing does."""
    if not isinstance(value, dict):
        return "is not a JSON object"
    unknown = [name for name in value if name not in hints]
    if unknown:
        return f"has a field that is not known: {', '.join(unknown)}"
    for name, hint in hints.items():
        if not _fits(hint, value.get(name)):
            wrong = f"has a wrong {name}: {str(value.get(name))[:60]!r}"
            return wrong if name in value else f"has no {name}"
    return ""


def _fits(hint: Any, value: Any) -> bool:
    args = get_args(hint)
    if type(None) in args:
        return value is None or _fits(args[0], value)
    if get_origin(hint) is list:
        return isinstance(value, list) and all(_fits(args[0], item) for item in value)
    # type() and not isinstance(): True is no integer here.
    return type(value) is hint or (hint is float and type(value) is int)
