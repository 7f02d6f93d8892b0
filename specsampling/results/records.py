"""One JSONL row per generation, appended as it is finished and resumed after a stop.

A run is three files: `name.jsonl` (rows), `name.meta.json` (what made them) and
`name.scores.jsonl` (what scoring said of them, always rewritten as a whole). Knows
nothing of models and tasks: a row is what the file says, its fields and types checked.
"""

from __future__ import annotations

import io
import json
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypedDict, cast, get_args, get_origin, get_type_hints

Key = tuple[str, str, int]  # example_id, method, sample_index: unique in a file

_MUST_AGREE = ("config_hash", "precision", "device")  # in the meta, for rows to share a file
_START_OVER = "start over with --fresh, or choose another file with --output"


class RecordsError(ValueError):
    """A file that cannot be read, written or resumed, in one line with the way out."""


@dataclass(frozen=True)
class Row:
    """One generation. Tokens are the new ones, without the prompt's."""

    example_id: str
    method: str
    sample_index: int
    completion: str
    token_ids: list[int]
    finish_reason: str  # eos, stop, length or context
    num_prompt_tokens: int
    accepted: list[int]  # one entry per cycle, and so is `drafted`; empty for the baselines
    drafted: list[int]
    target_calls: int  # after the prefill
    draft_calls: int
    prefill_seconds: float
    decode_seconds: float
    forward_seconds: float  # the part of prefill and decode that models' forwards took
    seed: int
    task_id: str | None = None
    reference: str | None = None
    num_cut_tokens: int | None = None  # left out of a prompt that was too long; None for none

    @property
    def key(self) -> Key:
        return self.example_id, self.method, self.sample_index

    @property
    def num_new_tokens(self) -> int:
        return len(self.token_ids)


class ScoredRow(TypedDict):
    """Which row a score is of."""

    example_id: str
    method: str
    sample_index: int


class Score(ScoredRow):
    """Pass or fail of one row; `result` is `passed`, `timed out`, `failed: NameError`."""

    passed: bool
    result: str


class RougeScore(ScoredRow):
    """ROUGE F1 of one row, in [0, 1]."""

    rouge1: float
    rouge2: float
    rougeL: float


Scores = Sequence[Score] | Sequence[RougeScore]  # of one run: its task says which


@dataclass(frozen=True)
class Run:
    """A run as its three files hold it; `scores` is None before the scoring."""

    rows: list[Row]
    meta: dict[str, Any]
    scores: Scores | None


class RunFile:
    """The rows of a run, open for appending in one process at a time.

    Attributes:
        rows: the rows in the file, in its order.
        done: their keys.
    """

    @classmethod
    def open(cls, path: str | Path, meta: dict[str, Any], fresh: bool = False) -> RunFile:
        """Open a run to append to it, in a new file or where an earlier process stopped.

        A last line that was torn by a kill is dropped. `meta` is written beside a new file;
        a resumed one keeps its own, and with the first new row gains an entry in its list
        `resumed`: what of `meta` is different this time (the date, a package's version).

        Args:
            path: ends in `.jsonl`; its folder is made.
            meta: plain values; `config_hash`, `precision` and `device` must agree to resume.
                If the hash does not, and there is a `config`, the error names the fields.
            fresh: drop the rows, meta and scores that are there.

        Raises:
            RecordsError: the rows are another configuration's, or broken, or without a meta;
                another process has the file open; it cannot be written.
        """
        path = Path(path)
        with _one_line_errors(path, "written"):
            if path.suffix != ".jsonl" or (path.exists() and not path.is_file()):
                raise RecordsError(
                    f"--output must be a file that ends in .jsonl (got {path}); "
                    "for example Results/results.jsonl"
                )
            path.parent.mkdir(parents=True, exist_ok=True)
            file = io.FileIO(path, "a+")
            try:
                return cls(path, file, meta, fresh)
            except BaseException:
                file.close()
                raise

    def __init__(self, path: Path, file: io.FileIO, meta: dict[str, Any], fresh: bool) -> None:
        """Take over a file that was just opened; `RunFile.open` is the way in."""
        try:
            _lock(file)
        except (BlockingIOError, PermissionError):
            raise RecordsError(
                f"{path} is being written by another process; "
                "wait for it to end, or choose another file with --output"
            ) from None
        file.seek(0)
        data = b"" if fresh else file.readall()
        resumed_meta = _resumed_meta(path, meta) if data else None
        values, num_bytes = _parse(path, data, get_type_hints(Row))
        file.truncate(num_bytes)
        if not values:
            path.with_suffix(".scores.jsonl").unlink(missing_ok=True)
            _write_meta(path, meta)
        self.rows = [Row(**value) for value in values]
        self.done = {row.key for row in self.rows}
        self._path = path
        self._file = file
        self._unsaved_meta = resumed_meta if values else None

    def require_same_examples(self, examples: Mapping[str, tuple[int, str | None]]) -> None:
        """Refuse to go on when the data of rows that are there have changed since.

        Args:
            examples: id -> tokens of the prompt and reference, as they are now.

        Raises:
            RecordsError: a row was made from another prompt length or reference.
        """
        for row in self.rows:
            was = row.num_prompt_tokens, row.reference
            if examples.get(row.example_id, was) != was:
                raise RecordsError(
                    f"{self._path} has rows of another {row.example_id}: "
                    f"the data have changed since; {_START_OVER}"
                )

    def append(self, row: Row) -> None:
        """Write a row; it is on the disk when this returns.

        Raises:
            RecordsError: its key is there already, or it cannot be written (the disk is
                full, say), and then no part of it stays in the file.
        """
        if row.key in self.done:
            raise RecordsError(f"{self._path} already holds a row for {row.key}")
        values = {name: value for name, value in asdict(row).items() if value is not None}
        line = json.dumps(values).encode() + b"\n"
        with _one_line_errors(self._path, "written"):
            if self._unsaved_meta is not None:
                _write_meta(self._path, self._unsaved_meta)
                self._unsaved_meta = None
            end = self._file.seek(0, os.SEEK_END)
            try:
                while line:
                    line = line[self._file.write(line) :]
                os.fsync(self._file.fileno())
            except OSError:
                with suppress(OSError):
                    self._file.truncate(end)
                raise
        self.rows.append(row)
        self.done.add(row.key)

    def close(self) -> None:
        """Close the file and let another process have it."""
        self._file.close()

    def __enter__(self) -> RunFile:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def require_resumable(path: str | Path, meta: dict[str, Any]) -> None:
    """Raise the RecordsError that `RunFile.open` would raise for another run's rows."""
    path = Path(path)
    with _one_line_errors(path, "read"):
        has_rows = path.is_file() and path.stat().st_size > 0
    if has_rows:
        _resumed_meta(path, meta)


def read_rows(path: str | Path) -> list[Row]:
    """The rows of a finished or a running run, without a last line that is torn."""
    values, _ = _parse(Path(path), _read(Path(path)), get_type_hints(Row))
    return [Row(**value) for value in values]


def read_meta(path: str | Path) -> dict[str, Any]:
    """What the rows in `path` were made with."""
    meta_path = Path(path).with_suffix(".meta.json")
    data = _read(meta_path)
    with suppress(ValueError):
        meta = json.loads(data)
        if isinstance(meta, dict):
            return meta
    raise RecordsError(f"{meta_path} must hold one JSON object (got {data[:40]!r})")


def read_run(path: str | Path) -> Run:
    """A finished or a running run, with its scores if they are there."""
    is_scored = Path(path).with_suffix(".scores.jsonl").exists()
    return Run(read_rows(path), read_meta(path), read_scores(path) if is_scored else None)


def is_run(path: str | Path) -> bool:
    """Whether a file holds rows of a run, and not somebody else's completions."""
    try:
        return bool(read_rows(path))
    except RecordsError:
        return False


def write_scores(path: str | Path, scores: Scores) -> None:
    """Put the scores of the rows in `path` beside them, in place of earlier ones."""
    scores_path = Path(path).with_suffix(".scores.jsonl")
    with _one_line_errors(scores_path, "written"):
        _replace(scores_path, "".join(json.dumps(score) + "\n" for score in scores))


def read_scores(path: str | Path) -> list[Score] | list[RougeScore]:
    """The scores of the rows in `path`; the first line says of which kind."""
    scores_path = Path(path).with_suffix(".scores.jsonl")
    data = _read(scores_path)
    if b'"rouge1"' in data.partition(b"\n")[0]:
        return cast("list[RougeScore]", _parse(scores_path, data, get_type_hints(RougeScore))[0])
    return cast("list[Score]", _parse(scores_path, data, get_type_hints(Score))[0])


def _parse(
    path: Path, data: bytes, hints: Mapping[str, Any], exact: bool = True
) -> tuple[list[dict[str, Any]], int]:
    """The objects of a JSONL file, and how many bytes they take: less than all if it is torn.

    Each must hold the fields in `hints`; if `exact`, no others, and no key a second time.
    """
    *lines, torn = data.split(b"\n")
    values: list[dict[str, Any]] = []
    seen: set[Key] = set()
    num_bytes = 0
    for number, line in enumerate(lines, start=1):
        if not exact and not line.strip():
            continue
        try:
            value = json.loads(line)
        except ValueError:
            if exact and number == len(lines) and not torn:
                break
            value = None
        problem = _problem(value, hints, exact)
        if exact and not problem:
            key = value["example_id"], value["method"], value["sample_index"]
            problem = f"repeats the row for {key}" if key in seen else ""
            seen.add(key)
        if problem:
            raise RecordsError(f"{path}, line {number}, {problem}; mend or delete the line")
        values.append(value)
        num_bytes += len(line) + 1
    return values, num_bytes


def _problem(value: Any, hints: Mapping[str, Any], exact: bool) -> str:
    """What keeps a line's value from being a row, in words; empty if nothing does."""
    if not isinstance(value, dict):
        return "is not a JSON object"
    unknown = [name for name in value if name not in hints]
    if exact and unknown:
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


def _resumed_meta(path: Path, meta: dict[str, Any]) -> dict[str, Any]:
    """The file's own meta with what is different now, if its rows can go on under `meta`."""
    try:
        old = read_meta(path)
    except RecordsError as error:
        raise RecordsError(f"{path} has rows, but {error}; {_START_OVER}") from None
    if any(old.get(name) != meta.get(name) for name in _MUST_AGREE):
        names = (*_MUST_AGREE, "config")
        was, now = ({name: values.get(name) for name in names} for values in (old, meta))
        raise RecordsError(
            f"{path} is another run's: {', '.join(_differences(was, now))}; {_START_OVER}"
        )
    changes = {name: value for name, value in meta.items() if old.get(name) != value}
    return {**old, "resumed": [*old.get("resumed", []), changes]}


def _differences(old: Any, new: Any, path: str = "") -> Iterator[str]:
    if isinstance(old, dict) and isinstance(new, dict):
        for name in {**old, **new}:
            yield from _differences(old.get(name), new.get(name), f"{path}.{name}".lstrip("."))
    elif old != new:
        yield f"{path} was {json.dumps(old)}, is now {json.dumps(new)}"


def _write_meta(path: Path, meta: dict[str, Any]) -> None:
    _replace(path.with_suffix(".meta.json"), json.dumps(meta, indent=2) + "\n")


def _read(path: Path) -> bytes:
    with _one_line_errors(path, "read"):
        return path.read_bytes()


def _replace(path: Path, text: str) -> None:
    """Write a whole file so that at any moment either the old or the new one is there."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(text.encode())
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def _one_line_errors(path: Path, done: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise RecordsError(
            f"{path} cannot be {done} ({error.strerror or error}); "
            "check the path, your rights to it, and the space on the disk"
        ) from None


if sys.platform == "win32":
    import msvcrt

    def _lock(file: io.FileIO) -> None:
        """Lock a byte beyond any row, so that others can still read the rows."""
        file.seek(2**30)
        msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)

else:
    import fcntl

    def _lock(file: io.FileIO) -> None:
        """Lock the file; the system lets go of it when the process ends, however it ends."""
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
