"""One JSONL row per generation, appended as it is finished and resumed after a stop.

A run is three files: `name.jsonl` (rows), `name.meta.json` (what made them) and
`name.scores.jsonl` (what scoring said of them, always rewritten as a whole). Knows
nothing of models and tasks: a row is what the file says, its fields and types checked.
"""

from __future__ import annotations

import io
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypedDict, cast, get_args, get_origin, get_type_hints

from specsampling.results.files import (
    RecordsError,
    is_there,
    lock_alone,
    one_line_errors,
    replace_file,
    replaced,
    require_plain,
    require_writable_folder,
)

OUT_OF_MEMORY = "out of memory"  # begins such a row's error
Key = tuple[str, str, int]  # example_id, method, sample_index: unique in a file

# In the meta, for rows to share a file; no `steps` where these are eager.
_MUST_AGREE = ("config_hash", "precision", "device", "steps")
_START_OVER = "start over with --fresh, or choose another file with --output"


@dataclass(frozen=True)
class Row:
    """One generation. Tokens are the new ones, without the prompt's."""

    example_id: str
    method: str
    sample_index: int
    completion: str
    token_ids: list[int]
    finish_reason: str  # eos, stop, length, context or error
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
    target_call_seconds: float | None = None  # of decode_seconds; None in rows of before them
    draft_call_seconds: float | None = None
    transforms: list[float] | None = None  # one per new token: see method/evidence.py
    gaps: list[float] | None = None
    error: str | None = None  # why the text ended early, where finish_reason is error
    rank: int | None = None  # which of several processes made it, and where
    device: str | None = None

    @property
    def lacked_memory(self) -> bool:
        """Whether the text could not be decoded for want of memory: a later run tries again."""
        return self.error is not None and self.error.startswith(OUT_OF_MEMORY)

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
    form: str | None  # as what it passed, "" if it did not; None in older files


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

        A last line that was torn by a kill is dropped, and rows that lacked memory, which are to be
        made again. `meta` is written beside a new file;
        a resumed one keeps its own, and with the first new row gains an entry in its list
        `resumed`: what of `meta` is different this time (the date, a package's version).

        Args:
            path: ends in `.jsonl`; its folder is made.
            meta: plain values; those of `_MUST_AGREE` must agree to resume.
                If the hash does not, and there is a `config`, the error names the fields.
            fresh: drop the rows, meta and scores that are there.

        Raises:
            RecordsError: the rows are another configuration's, or broken, or without a meta;
                another process has the file open; it cannot be written.
        """
        path = Path(path)
        with one_line_errors(path, "written"):
            require_plain(path)
            path.parent.mkdir(parents=True, exist_ok=True)
            file = io.FileIO(path, "a+")
            try:
                return cls(path, file, meta, fresh)
            except BaseException:
                file.close()
                raise

    def __init__(self, path: Path, file: io.FileIO, meta: dict[str, Any], fresh: bool) -> None:
        """Take over a file that was just opened; `RunFile.open` is the way in."""
        lock_alone(path, file)
        if fresh:
            check_fresh(path)
        data = b"" if fresh else file.readall()
        resumed_meta = _resumed_meta(path, meta) if data else None
        values, num_bytes = _parse(path, data, get_type_hints(Row))
        if values:
            file.truncate(num_bytes)
        else:
            _start_over(path, file, meta)
        self.rows = [Row(**value) for value in values]
        self.done = {row.key for row in self.rows}
        self._path = path
        self._file = file
        self._meta = resumed_meta if values and resumed_meta else dict(meta)
        self._is_meta_saved = not values
        self._rewrite([row for row in self.rows if not row.lacked_memory])

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
        line = _line(row)
        with one_line_errors(self._path, "written"):
            if not self._is_meta_saved:
                self._save_meta()
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

    def note(self, **facts: Any) -> None:
        """Add to the meta what is known only after rows were appended, if any were.

        Where earlier processes have written rows, it goes into this one's entry in `resumed`.

        Raises:
            RecordsError: it cannot be written.
        """
        if self._is_meta_saved:
            (self._meta["resumed"][-1] if "resumed" in self._meta else self._meta).update(facts)
            with one_line_errors(self._path, "written"):
                self._save_meta()

    def sort(self, order: Sequence[Key]) -> None:
        """Put the rows into an order, all at once; those that it does not name come first.

        Raises:
            RecordsError: the file cannot be written.
        """
        places = {key: place for place, key in enumerate(order)}
        self._rewrite(sorted(self.rows, key=lambda row: places.get(row.key, -1)))

    def _rewrite(self, rows: list[Row]) -> None:
        """Put rows in the place of those that are there, all at once."""
        if rows == self.rows:
            return
        with one_line_errors(self._path, "written"):
            replace_file(self._path, b"".join(map(_line, rows)).decode())
            self._file.close()
            self._file = io.FileIO(self._path, "a+")
            lock_alone(self._path, self._file)
        self.rows = rows
        self.done = {row.key for row in rows}

    def _save_meta(self) -> None:
        replace_file(_meta_path(self._path), _meta_text(self._meta))
        self._is_meta_saved = True

    def close(self) -> None:
        """Close the file and let another process have it."""
        self._file.close()

    def __enter__(self) -> RunFile:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def _line(row: Row) -> bytes:
    values = {name: value for name, value in asdict(row).items() if value is not None}
    return json.dumps(values).encode() + b"\n"


def check_output(path: str | Path, meta: dict[str, Any] | None = None) -> None:
    """Raise the RecordsError that `RunFile.open` would raise, and change nothing.

    For before the minutes of loading; another process may still be faster than this one. Without
    a `meta` the rows that are there are not looked at: they are to be dropped, or not known yet.
    """
    path = Path(path)
    with one_line_errors(path, "written"):
        require_plain(path)
        require_writable_folder(path)  # the meta is written aside there, and moved
        if not is_there(path):
            return
        with io.FileIO(path, "r+") as file:
            lock_alone(path, file)
            if meta is not None and (data := file.readall()):
                _resumed_meta(path, meta)
                _parse(path, data, get_type_hints(Row))


def check_fresh(path: str | Path) -> None:
    """Raise a RecordsError if starting a file over would delete what no run has written."""
    path = Path(path)
    if (
        path.is_file()
        and path.stat().st_size
        and not _meta_path(path).exists()
        and not is_run(path)
    ):
        raise RecordsError(
            f"{path} holds no rows of a run, and --fresh would delete what it holds; "
            "choose another file with --output, or delete it yourself"
        )


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
    with one_line_errors(scores_path, "written"):
        replace_file(scores_path, "".join(json.dumps(score) + "\n" for score in scores))


def read_scores(path: str | Path) -> list[Score] | list[RougeScore]:
    """The scores of the rows in `path`; the first line says of which kind."""
    scores_path = Path(path).with_suffix(".scores.jsonl")
    data = _read(scores_path)
    if b'"rouge1"' in data.partition(b"\n")[0]:
        return cast("list[RougeScore]", _parse(scores_path, data, get_type_hints(RougeScore))[0])
    return cast("list[Score]", _parse(scores_path, data, get_type_hints(Score))[0])


def _parse(path: Path, data: bytes, hints: Mapping[str, Any]) -> tuple[list[dict[str, Any]], int]:
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


def _start_over(path: Path, file: io.FileIO, meta: dict[str, Any]) -> None:
    """Drop the rows that are there and their scores, once the new meta is sure to be written."""
    with replaced(_meta_path(path), _meta_text(meta)):
        file.truncate(0)
        path.with_suffix(".scores.jsonl").unlink(missing_ok=True)


def _meta_path(path: Path) -> Path:
    return path.with_suffix(".meta.json")


def _meta_text(meta: dict[str, Any]) -> str:
    return json.dumps(meta, indent=2) + "\n"


def _read(path: Path) -> bytes:
    with one_line_errors(path, "read"):
        return path.read_bytes()
