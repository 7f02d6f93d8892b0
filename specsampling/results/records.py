"""Defines and reads rows: one line of JSON per generation, which `runfile.py` appends.

A run is three files: `name.jsonl` (rows), `name.meta.json` (what made them) and
`name.scores.jsonl` (`scores.py`). This module knows nothing of models and tasks.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, get_type_hints

from specsampling.results import lines
from specsampling.results.files import RecordsError, read_file
from specsampling.results.lines import Key, hash_of
from specsampling.results.meta import START_OVER, machines_of, read_meta
from specsampling.results.scores import Scores, read_scores, scores_path

OUT_OF_MEMORY = "out of memory"  # begins the error of a row that lacked memory
Sample = tuple[str, int]  # example_id and sample_index, by which methods are paired


class Source(NamedTuple):
    """The prompt and the reference that a row was made from."""

    num_prompt_tokens: int
    prompt_hash: str | None
    reference: str | None

    @classmethod
    def of(cls, token_ids: Sequence[int], reference: str | None) -> Source:
        """Return the source with these prompt ids, which are hashed."""
        return cls(len(token_ids), hash_of(list(token_ids)), reference)

    def has_prompt_of(self, other: Source) -> bool:
        """Tell whether the prompts are the same; without both hashes, compare their lengths."""
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
    prompt_hash: str | None = None  # of the prompt's ids; None if not recorded
    num_cut_tokens: int | None = None  # cut from a prompt that was too long; None if none
    target_call_seconds: float | None = None  # part of decode_seconds; None if not recorded
    draft_call_seconds: float | None = None
    transforms: list[float] | None = None  # one per new token: see method/evidence.py
    gaps: list[float] | None = None
    noise: str | None = None  # "positional", or None for numbers drawn in sequence
    error: str | None = None  # the reason, if finish_reason is error
    rank: int | None = None  # the process that made the row, if there are several
    device: str | None = None  # the machine, as `meta.machine_of` names it

    @property
    def lacked_memory(self) -> bool:
        """Whether memory was too small for the text. A later run decodes such a text again."""
        return self.error is not None and self.error.startswith(OUT_OF_MEMORY)

    @property
    def key(self) -> Key:
        return self.example_id, self.method, self.sample_index

    @property
    def sample(self) -> Sample:
        return self.example_id, self.sample_index

    @property
    def source(self) -> Source:
        return Source(self.num_prompt_tokens, self.prompt_hash, self.reference)

    @property
    def num_new_tokens(self) -> int:
        return len(self.token_ids)


@dataclass(frozen=True)
class Run:
    """The contents of a run's three files; `scores` is None before the scoring."""

    rows: list[Row]
    meta: dict[str, Any]
    scores: Scores | None


def line_of(row: Row) -> bytes:
    return lines.line_of({name: value for name, value in asdict(row).items() if value is not None})


def read_rows(path: str | Path) -> list[Row]:
    """Read the rows of a finished or a running run, without a torn last line."""
    return rows_in(Path(path), read_file(Path(path)))[0]


def read_run(path: str | Path) -> Run:
    """Read a finished or a running run, with its scores if they are there.

    A row that names no machine gets the run's, or "" if the run had several.
    """
    is_scored, meta = scores_path(path).exists(), read_meta(path)
    machine = found[0] if len(found := machines_of(meta)) == 1 else "" if found else None
    rows = [replace(row, device=row.device or machine) for row in read_rows(path)]
    return Run(rows, meta, read_scores(path) if is_scored else None)


def is_run(path: str | Path) -> bool:
    """Tell whether a file holds rows of a run, and not another tool's completions."""
    try:
        return bool(read_rows(path))
    except RecordsError:
        return False


def newest_run(folder: Path, task: str, published: Path) -> Path:
    """Return the newest rows of a task (xsum or humaneval) in a folder, or else `published`.

    What lies in a folder of the name published is left out.
    """
    metas = [beside.with_suffix("").with_suffix(".jsonl") for beside in folder.rglob("*.meta.json")]
    paths = [
        path
        for path in metas
        if path.exists() and "published" not in path.relative_to(folder).parts
    ]
    for path in sorted(paths, key=lambda path: path.stat().st_mtime, reverse=True):
        with suppress(RecordsError):
            meta = read_meta(path)
            is_of_task = meta.get("config", {}).get(task) is not None and "shard_of" not in meta
            if is_of_task and read_rows(path):
                return path
    return published


def rows_in(path: Path, data: bytes) -> tuple[list[Row], int]:
    """Parse a file into its rows and the number of bytes that they take."""
    values, num_bytes = lines.parse(path, data, get_type_hints(Row))
    rows = [Row(**value) for value in values]
    require_one_prompt(path, rows, {})
    return rows, num_bytes


def require_one_prompt(path: Path, rows: Iterable[Row], hashes: dict[str, str]) -> None:
    """Refuse different prompts for one example; note each example's hash in `hashes`."""
    for row in rows:
        ours = row.prompt_hash
        if ours and hashes.setdefault(row.example_id, ours) != ours:
            raise RecordsError(
                f"{path} must hold rows of one prompt of {row.example_id} (got two, and texts of "
                f"different prompts cannot be compared); {START_OVER}"
            )
