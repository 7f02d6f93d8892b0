"""Opens a run's file for appending, in one process at a time, and resumes it after a stop.

Another program may change the file at the path, or replace it, at any moment. If the file at the
path still holds our rows, new rows go there. If not, our rows are kept in a file beside it.
"""

from __future__ import annotations

import io
import itertools
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from specsampling.results import files
from specsampling.results.files import RecordsError, is_there, one_line_errors, open_alone
from specsampling.results.lines import Key
from specsampling.results.meta import (
    START_OVER,
    machine_of,
    meta_bytes,
    meta_path,
    read_meta,
    require_own_meta,
    resumed_meta,
)
from specsampling.results.records import Row, Source, line_of, require_one_prompt, rows_in
from specsampling.results.scores import require_own_scores, scores_path


class RunFile:
    """A run's `rows` in their order and their keys, `done`, open for appending in one process."""

    @classmethod
    def open(cls, path: str | Path, meta: dict[str, Any], fresh: bool = False) -> RunFile:
        """Open a run to append to it, in a new file or where an earlier process stopped.

        A last line that was torn by a kill is dropped, and so are rows that lacked memory. With
        `fresh`, all rows, the meta and the scores are dropped. `meta` is written beside a new file.
        A resumed file keeps its own meta, which must agree with `meta` in `meta.MUST_AGREE`; the
        differences join its list `resumed`.

        Raises:
            RecordsError: the rows cannot go on under `meta`, another process has the file open,
                or it cannot be written.
        """
        path = Path(path)
        with one_line_errors(path, "written"):
            files.require_plain(path)
            path.parent.mkdir(parents=True, exist_ok=True)
            file = open_alone(path)
            try:
                return cls(path, file, meta, fresh)
            except BaseException:
                file.close()
                raise

    def __init__(self, path: Path, file: io.FileIO, meta: dict[str, Any], fresh: bool) -> None:
        """Take over a file that was just opened; call `RunFile.open` instead."""
        for mine in (path, meta_path(path), scores_path(path)):
            files.clear_scratch(mine)
        if fresh:
            check_fresh(path)
        require_own_meta(path)
        require_own_scores(path)
        data = b"" if fresh else file.readall()
        resumed = resumed_meta(path, meta) if data else None
        self.rows, num_bytes = rows_in(path, data)
        self._path = path
        self._file = file
        self._is_lost = False
        if self.rows:
            files.end_at(file, num_bytes)
            self._meta_on_disk = files.read_file(meta_path(path))
        else:
            self._meta_on_disk = meta_bytes(meta)
            with files.replaced(meta_path(path), self._meta_on_disk) as new:
                file.truncate(0)  # once the new meta is sure to be written
                scores_path(path).unlink(missing_ok=True)
            new.close()
        self.done = {row.key for row in self.rows}
        self._meta = resumed if self.rows and resumed else dict(meta)
        self._machine = machine_of(meta)
        self._is_meta_saved = not self.rows
        self._state = files.state_of(file.fileno())
        self._rewrite([row for row in self.rows if not row.lacked_memory])
        self._hashes: dict[str, str] = {}
        require_one_prompt(path, self.rows, self._hashes)

    def require_same_examples(self, examples: Mapping[str, Source]) -> None:
        """Refuse to go on if a row was made from another source than `examples` (by id) has."""
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
        """Write a row with its machine, and return when the row is on the disk.

        A RecordsError says that the file has a row of this key, or that the row cannot be written
        whole. No part of the row then stays in the file.
        """
        if row.key in self.done:
            raise RecordsError(f"{self._path} already holds a row for {row.key}")
        require_one_prompt(self._path, [row], self._hashes)
        row = replace(row, device=row.device or self._machine)
        self._check_path(row)
        with one_line_errors(self._path, "written"):
            if not self._is_meta_saved:
                self._save_meta()
            self._write([row])
        self.rows.append(row)
        self.done.add(row.key)

    def _write(self, rows: Sequence[Row]) -> None:
        end = self._file.seek(0, os.SEEK_END)
        try:
            files.write_all(self._file, _lines(rows))
            os.fsync(self._file.fileno())
        except OSError:
            with suppress(OSError):
                self._file.truncate(end)
            raise
        finally:
            self._state = files.state_of(self._file.fileno())

    def _check_path(self, *more: Row) -> None:
        """Compare the open file with the one at the path, before rows are added or sorted.

        An editor, `git checkout` or `mv` may put another file there. If the new file holds our
        rows, or the first of them, later rows go there. Otherwise our rows and `more` are kept in
        one more file, which the RecordsError names.
        """
        if files.state_of(self._path) == self._state:
            return
        self._file.close()
        what = "deleted"
        if is_there(self._path):
            what = "replaced or changed"
            with suppress(OSError, RecordsError):
                self._file = open_alone(self._path, "a+")
                rows, num_bytes = rows_in(self._path, self._file.readall())
                if _lines(rows) == _lines(self.rows[: len(rows)]):
                    files.end_at(self._file, num_bytes)
                    self._write(self.rows[len(rows) :])
                    return
            self._file.close()
        self._is_lost = True
        if not (rows := [*self.rows, *more]):
            raise RecordsError(f"{self._path} was {what} while the run had it; start the run again")
        kept = _keep(self._path, rows, self._meta)
        raise RecordsError(
            f"{self._path} was {what} while this run wrote to it, and is left unchanged; the run's "
            f"{len(rows)} rows are in {kept}, with their meta beside it: move both back to go on"
        )

    def note(self, **facts: Any) -> None:
        """Add facts to the meta (in a resumed file to this run's entry), if rows were appended."""
        if self._is_meta_saved and not self._is_lost:
            self._check_path()
            (self._meta["resumed"][-1] if "resumed" in self._meta else self._meta).update(facts)
            with one_line_errors(self._path, "written"):
                self._save_meta()

    def sort(self, order: Sequence[Key]) -> None:
        """Put the rows into an order in one step; rows that it does not name come first."""
        places = {key: place for place, key in enumerate(order)}
        self._rewrite(sorted(self.rows, key=lambda row: places.get(row.key, -1)))

    def _rewrite(self, rows: list[Row]) -> None:
        """Replace all rows of the file in one step."""
        if rows == self.rows:
            return
        self._check_path()
        with one_line_errors(self._path, "written"):
            with files.replaced(self._path, _lines(rows)) as file:
                self._file.close()
            self._file = file
        self._state = files.state_of(self._file.fileno())
        self.rows = rows
        self.done = {row.key for row in rows}

    def _save_meta(self) -> None:
        """Write the meta beside the rows; refuse if another program has changed the meta there."""
        beside, data = meta_path(self._path), meta_bytes(self._meta)
        if is_there(beside) and files.read_file(beside) not in (b"", self._meta_on_disk):
            raise RecordsError(
                f"{beside} was changed while this run had it; move it away, and the same command "
                "goes on"
            )
        files.replace_file(beside, data)
        self._meta_on_disk = data
        self._is_meta_saved = True

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> RunFile:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def check_output(path: str | Path, meta: dict[str, Any] | None = None) -> None:
    """Raise the RecordsError that `RunFile.open` would raise; change nothing.

    Without a `meta`, existing rows are not checked.
    """
    path = Path(path)
    with one_line_errors(path, "written"):
        files.require_plain(path)
        require_own_meta(path)
        require_own_scores(path)
        files.require_writable_folder(path)  # the meta is written there, then moved
        if not is_there(path):
            return
        with open_alone(path, "r+") as file:
            if meta is not None and (data := file.readall()):
                resumed_meta(path, meta)
                rows_in(path, data)


def check_fresh(path: str | Path) -> None:
    """Raise a RecordsError if starting a file over would delete what no run has written."""
    path = Path(path)
    try:
        if path.is_file():
            rows_in(path, files.read_file(path))
    except RecordsError as error:
        raise RecordsError(
            f"{path} holds lines that are no rows, and --fresh would delete them ({error}); choose "
            "another file with --output, or delete it yourself"
        ) from None


def keep_rows(path: Path) -> Path | None:
    """Write a run's rows and meta to new files beside it, before it starts over.

    Returns the new file of rows, or None if there are no rows. A RecordsError says that they cannot
    be read or written, so nothing may start over.
    """
    if not is_there(path) or not (rows := rows_in(path, files.read_file(path))[0]):
        return None
    meta: dict[str, Any] = {}
    with suppress(RecordsError):  # a damaged meta says nothing, and the rows are kept without it
        meta = read_meta(path)
    return _keep(path, rows, meta)


def _keep(path: Path, rows: Sequence[Row], meta: dict[str, Any]) -> Path:
    """Write rows and their meta to new files beside `path`; return the path of the rows."""
    for number in itertools.count(1):
        kept = path.with_name(f"{path.stem}.kept{number}.jsonl")
        with one_line_errors(kept, "written"), suppress(FileExistsError):
            with io.FileIO(kept, "x") as file:
                files.write_all(file, _lines(rows))
                os.fsync(file.fileno())
            files.replace_file(meta_path(kept), meta_bytes(meta))
            return kept
    raise AssertionError  # the count has no end


def _lines(rows: Sequence[Row]) -> bytes:
    return b"".join(map(line_of, rows))
