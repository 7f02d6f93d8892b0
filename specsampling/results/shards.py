"""Keeps a run's rows while several processes make them: a file for each, merged at the end.

A shard is a run file of its own, `name.rank0003.jsonl`, on the disk of the machine that writes it.
Its meta names the run and the rank. A file of such a name without such a meta is not ours.
The next run takes in the shards that a killed run has left.
"""

from __future__ import annotations

import glob
import re
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from specsampling.ranks import Ranks
from specsampling.results.files import RecordsError, clear_scratch
from specsampling.results.lines import Key
from specsampling.results.meta import changed_files, machine_of, meta_path, read_meta
from specsampling.results.records import Row, Source, read_rows
from specsampling.results.runfile import RunFile, check_output

Left = tuple[dict[str, Any], list[Row]]  # a shard's meta and rows

# Names that a run gives to the files beside its rows.
COMPANION = re.compile(r"\.(scores|rank\d+)\.jsonl$", re.IGNORECASE)


def shard_path(output: Path, rank: int) -> Path:
    return output.with_suffix(f".rank{rank:04d}.jsonl")


def require_own_name(output: Path) -> None:
    """Raise a RecordsError if an output has the name of another run's scores or shard."""
    if found := COMPANION.search(output.name):
        raise RecordsError(
            f"--output must not end in {found[0]}, as files beside a run's rows do (got {output}); "
            "choose another name"
        )


def shard_meta(meta: dict[str, Any], output: Path, rank: int) -> dict[str, Any]:
    """Add to a run's meta that a file is a rank's part of the run."""
    return {**meta, "shard_of": output.name, "rank": rank}


def is_shard(path: Path, output: Path) -> bool:
    """Tell whether a file is a rank's part: by its meta, or because it is empty without one."""
    with suppress(OSError, RecordsError):
        if not (meta_path(path).exists() or path.stat().st_size):
            return True
        meta = read_meta(path)
        if isinstance(rank := meta.get("rank"), int) and meta.get("shard_of") == output.name:
            return path.name == shard_path(output, rank).name
    return False


class Shard(AbstractContextManager):
    """A rank's part of a run file. Rank 0 keeps the whole file open, so no other run has it.

    `rows` are those of the whole file before this run, and the rank's own. `done` are their keys.
    """

    def __init__(
        self,
        output: Path,
        meta: dict[str, Any],
        fresh: bool,
        existing_rows: Sequence[Row],
        ranks: Ranks,
        device: str,
    ):
        """Open this rank's file; `take_in` has emptied the one of an earlier run.

        `existing_rows` stay in the run's file, whose `meta` and `fresh` are as for `RunFile.open`.
        `device` is the name of this process's device, for its rows.
        """
        self._ranks = ranks
        self._device = machine_of({**meta, "device_name": device})
        self._meta = meta
        self._facts: dict[str, Any] = {}
        self._whole = RunFile.open(output, meta, fresh) if ranks.index == 0 else None
        self._path = shard_path(output, ranks.index)
        if self._path.exists() and not is_shard(self._path, output):
            raise RecordsError(
                f"{self._path} must be a file of this run, because rank {ranks.index} writes there "
                "(got another file); move it, or choose another file with --output"
            )
        self._own = RunFile.open(self._path, shard_meta(meta, output, ranks.index), fresh=True)
        self.rows = list(existing_rows)
        self.done = {row.key for row in existing_rows}

    def require_same_examples(self, examples: Mapping[str, Source]) -> None:
        """Refuse examples as `RunFile` does, and files or examples that differ from rank 0's."""
        if self._whole:
            self._whole.require_same_examples(examples)
        (first_meta, first), *others = self._ranks.gather([(self._meta, dict(examples))])
        for rank, (meta, theirs) in enumerate(others, start=1):
            if names := changed_files(first_meta, meta):
                raise RecordsError(
                    f"rank {rank} has other files than rank 0 under the name of {names[0]}; give "
                    "every machine the same files"
                )
            for name in first:
                if theirs.get(name) != first[name]:
                    raise RecordsError(
                        f"rank {rank} has another prompt or reference of {name} than rank 0: "
                        "their data, tokenizers or chat templates differ; give every machine "
                        "the same files"
                    )

    def append(self, row: Row) -> None:
        """Append a row to the shard, with the rank and its machine."""
        row = replace(row, rank=self._ranks.index, device=self._device)
        self._own.append(row)
        self.rows.append(row)
        self.done.add(row.key)

    def note(self, **facts: Any) -> None:
        """Add facts to the meta of the whole file, once the file has gained rows."""
        self._facts |= facts
        if self._whole:
            self._whole.note(**self._facts)

    def merge(self, order: Sequence[Key]) -> None:
        """Put every rank's rows into the whole file, in the order of one process."""
        rows = self._ranks.gather(self._own.rows)
        if self._whole:
            _append_new(self._whole, rows)
            self._whole.sort(order)
            self.rows = self._whole.rows
        self._ranks.meet()
        self._own.close()
        _remove([self._path])

    def __exit__(self, *exception: object) -> None:
        self._own.close()
        if self._whole:
            self._whole.close()


def left_shards(output: Path) -> list[Path]:
    """List the shards of an output; raise a RecordsError if a process still writes one."""
    names = output.parent.glob(f"{glob.escape(output.stem)}.rank[0-9]*.jsonl")
    paths = sorted(path for path in names if is_shard(path, output))
    for path in paths:
        check_output(path)
    return paths


def take_in(output: Path, ranks: Ranks | None, fresh: bool) -> bool:
    """Move the rows of a stopped run's shards into its file, from every machine.

    With `fresh`, the shards are only deleted. On rank 0, the result tells whether rows were moved.
    `ranks` is None for a single process.
    """
    found = False
    if ranks is None or ranks.index == 0:
        paths = left_shards(output)
        found = _merge(output, [] if fresh else _left(paths))
        _remove(paths)
    if ranks:
        ranks.meet()  # on a shared disk, no shard is left now
        is_elsewhere = ranks.index > 0 and ranks.local_index == 0
        paths = left_shards(output) if is_elsewhere else []
        left = ranks.gather([] if fresh else _left(paths))
        if ranks.index == 0:
            found = _merge(output, left) or found
        ranks.meet()
        _remove(paths)
    return found


def _left(paths: Sequence[Path]) -> list[Left]:
    """Read the shards that have rows, with the meta of their whole run."""
    left = []
    for path in paths:
        if rows := read_rows(path):
            meta = read_meta(path)
            del meta["shard_of"], meta["rank"]
            left.append((meta, rows))
    return left


def _merge(output: Path, shards: Sequence[Left]) -> bool:
    for meta, rows in shards:
        with RunFile.open(output, meta) as run_file:
            _append_new(run_file, rows)
    return bool(shards)


def _append_new(run_file: RunFile, rows: Iterable[Row]) -> None:
    for row in rows:
        if row.key not in run_file.done:  # a run may have stopped before it removed its shards
            run_file.append(row)


def _remove(paths: Iterable[Path]) -> None:
    """Delete shards with their metas."""
    for path in paths:
        for file in (path, meta_path(path)):
            file.unlink(missing_ok=True)
            clear_scratch(file)
