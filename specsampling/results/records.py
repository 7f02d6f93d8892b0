"""One JSONL row per generation, appended as it is finished and resumed after a stop.

A run is three files: `name.jsonl` (rows), `name.meta.json` (what made them) and
`name.scores.jsonl` (what scoring said of them, always rewritten as a whole). Knows
nothing of models and tasks: a row is what the file says, its fields and types checked.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypedDict, cast, get_type_hints

from specsampling.results.files import (
    RecordsError,
    is_there,
    lock_alone,
    one_line_errors,
    read_file,
    replace_file,
    replaced,
    require_plain,
    require_writable_folder,
)
from specsampling.results.lines import Key, parse
from specsampling.results.meta import START_OVER, meta_path, meta_text, read_meta, resumed_meta

OUT_OF_MEMORY = "out of memory"  # begins such a row's error


class Source(NamedTuple):
    """What a row is made from, as far as a row tells it."""

    num_prompt_tokens: int
    prompt_hash: str | None
    reference: str | None

    @classmethod
    def of(cls, token_ids: Sequence[int], reference: str | None) -> Source:
        """Where a prompt's ids are known, and so their hash."""
        digest = hashlib.sha256(json.dumps(list(token_ids)).encode()).hexdigest()[:16]
        return cls(len(token_ids), digest, reference)

    def has_prompt_of(self, other: Source) -> bool:
        """Whether both have the same prompt; without both hashes, one of the same length."""
        are_hashed = self.prompt_hash and other.prompt_hash
        return self[:2] == other[:2] if are_hashed else self[0] == other[0]


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
    prompt_hash: str | None = None  # of the prompt's ids; None in rows of before it
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
    def source(self) -> Source:
        return Source(self.num_prompt_tokens, self.prompt_hash, self.reference)

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
            meta: plain values; those of `meta.MUST_AGREE` must agree to resume.
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
        resumed = resumed_meta(path, meta) if data else None
        self.rows, num_bytes = _rows(path, data)
        if self.rows:
            file.truncate(num_bytes)
        else:
            _start_over(path, file, meta)
        self.done = {row.key for row in self.rows}
        self._path = path
        self._file = file
        self._meta = resumed if self.rows and resumed else dict(meta)
        self._is_meta_saved = not self.rows
        self._rewrite([row for row in self.rows if not row.lacked_memory])
        self._hashes = _prompt_hashes(path, self.rows)

    def require_same_examples(self, examples: Mapping[str, Source]) -> None:
        """Refuse to go on when the prompts or the data of rows that are there have changed since.

        Args:
            examples: id -> what its rows are made from now.

        Raises:
            RecordsError: a row was made from another prompt or reference.
        """
        for row in self.rows:
            now = examples.get(row.example_id, row.source)
            what, causes = "reference", "the data"
            if not now.has_prompt_of(row.source):
                what, causes = "prompt", "the data, the tokenizer or the chat template"
            elif now.reference == row.reference:
                continue
            raise RecordsError(
                f"{self._path} has rows of another {what} of {row.example_id}: {causes} have "
                f"changed since; {START_OVER}"
            )

    def append(self, row: Row) -> None:
        """Write a row; it is on the disk when this returns.

        Raises:
            RecordsError: its key is there already, or it cannot be written (the disk is
                full, say), and then no part of it stays in the file.
        """
        if row.key in self.done:
            raise RecordsError(f"{self._path} already holds a row for {row.key}")
        _require_one_prompt(self._path, row, self._hashes)
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
        replace_file(meta_path(self._path), meta_text(self._meta))
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
                resumed_meta(path, meta)
                _rows(path, data)


def check_fresh(path: str | Path) -> None:
    """Raise a RecordsError if starting a file over would delete what no run has written."""
    path = Path(path)
    if path.is_file() and path.stat().st_size and not meta_path(path).exists() and not is_run(path):
        raise RecordsError(
            f"{path} holds no rows of a run, and --fresh would delete what it holds; "
            "choose another file with --output, or delete it yourself"
        )


def read_rows(path: str | Path) -> list[Row]:
    """The rows of a finished or a running run, without a last line that is torn."""
    return _rows(Path(path), read_file(Path(path)))[0]


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
    data = read_file(scores_path)
    if b'"rouge1"' in data.partition(b"\n")[0]:
        return cast("list[RougeScore]", parse(scores_path, data, get_type_hints(RougeScore))[0])
    return cast("list[Score]", parse(scores_path, data, get_type_hints(Score))[0])


def _rows(path: Path, data: bytes) -> tuple[list[Row], int]:
    """A file's rows, and how many bytes they take."""
    values, num_bytes = parse(path, data, get_type_hints(Row))
    rows = [Row(**value) for value in values]
    _prompt_hashes(path, rows)
    return rows, num_bytes


def _prompt_hashes(path: Path, rows: Sequence[Row]) -> dict[str, str]:
    """The hash of each example's prompt, which its rows must share."""
    hashes: dict[str, str] = {}
    for row in rows:
        _require_one_prompt(path, row, hashes)
    return hashes


def _require_one_prompt(path: Path, row: Row, hashes: dict[str, str]) -> None:
    """Note a row's prompt, or refuse the row if its example has another one."""
    ours = row.prompt_hash
    if ours and hashes.setdefault(row.example_id, ours) != ours:
        raise RecordsError(
            f"{path} must hold rows of one prompt of {row.example_id} (got two, and texts of "
            f"different prompts cannot be compared); {START_OVER}"
        )


def _start_over(path: Path, file: io.FileIO, meta: dict[str, Any]) -> None:
    """Drop the rows that are there and their scores, once the new meta is sure to be written."""
    with replaced(meta_path(path), meta_text(meta)):
        file.truncate(0)
        path.with_suffix(".scores.jsonl").unlink(missing_ok=True)
