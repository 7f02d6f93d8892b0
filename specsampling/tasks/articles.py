"""Reads articles with their summaries from the hub, from local files, or from the demo.

Only the columns that `xsum.columns` names are read, so odd columns do no harm. Each cell is
read as the text in the file: a guessed type would turn the id 007 into 7, and the summary "None"
into nothing.
"""

from __future__ import annotations

import csv
import json
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from specsampling.checking import nearest
from specsampling.config import XSumColumns
from specsampling.disk import pointer_problem
from specsampling.tasks.task import Example, TaskError

EMBEDDED = "embedded:"
DEMO_ARTICLES = Path(__file__).parent.parent / "data" / "articles.jsonl"  # embedded:articles
# The hub's own conversion. For XSum, main holds a script, which `datasets` does not run.
HUB_REVISION = "refs/convert/parquet"
HUB_FILES = "default/{split}/*.parquet"
DELIMITERS = ",;\t"  # a spreadsheet exports with its language's delimiter
MAX_NAMES = 8  # columns that an error lists

Cells = dict[str, Any]  # document, summary and perhaps id: text, or values to refuse


def load_articles(dataset: str, split: str, columns: XSumColumns) -> list[Example]:
    """Return the articles of one split, in the order of their file.

    The id of an article is the row's number (from 0) if there is no column of ids.

    Args:
        dataset: `embedded:articles`, a local .jsonl, .csv or .parquet file, a local folder of
            such files or with the layout of a hub repository, or a hub id.
        split: the split of a folder or a hub id; a single file is read whole.

    Raises:
        TaskError: the data set is missing, unreadable or empty. A column is missing or holds no
            text. An id is used twice, or only some rows have ids.
    """
    try:
        rows = [row for path in _files(dataset, split) for row in _rows(path, columns)]
    except TaskError:
        raise
    except (OSError, ValueError, RuntimeError) as error:
        raise TaskError(
            f"cannot load xsum.dataset {dataset}, split {split} ({_first_line(error)}); check the "
            "name, the split and the network, or give a local file"
        ) from error
    if not rows:
        raise TaskError(f"xsum.dataset must hold at least one article (got 0 in {dataset})")
    if all(row.get("id") is None for row in rows):
        rows = [{**row, "id": str(number)} for number, row in enumerate(rows)]
    for number, row in enumerate(rows):
        if wrong := next((field for field in vars(columns) if not _is_text(field, row)), None):
            raise TaskError(
                f"xsum.dataset must hold text in the column {getattr(columns, wrong)} (got "
                f"{row.get(wrong)!r:.60} in row {number} of {dataset}); mend the row"
            )
    (name, times), *_ = Counter(row["id"] for row in rows).most_common(1)
    if times > 1:
        raise TaskError(
            f"xsum.dataset must have a different id in every row (got {name[:60]} {times} times in "
            f"{dataset}); mend the column {columns.id}, or set xsum.columns.id to null"
        )
    return [
        Example(row["id"], row["document"].strip(), reference=row["summary"].strip())
        for row in rows
    ]


def _is_text(field: str, row: Cells) -> bool:
    value = row.get(field)
    return (
        isinstance(value, str)
        # No tokenizer accepts half a character (a lone surrogate).
        and not re.search(r"[\ud800-\udfff]", value)
        and (field != "id" or bool(value.strip()))
    )


def _first_line(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")


# --- the files of a data set ---------------------------------------------------------


def _files(dataset: str, split: str) -> Sequence[Path]:
    path = DEMO_ARTICLES if dataset == f"{EMBEDDED}articles" else Path(dataset)
    if dataset.startswith(EMBEDDED) and path != DEMO_ARTICLES:
        raise TaskError(
            f"xsum.dataset must be {EMBEDDED}articles or not embedded (got {dataset}); change it"
        )
    if path.is_dir():
        return _files_in_folder(path, split)
    if path.exists() or path.suffix in READERS:
        return [path]
    return _files_from_hub(dataset, split)


def _files_in_folder(folder: Path, split: str) -> list[Path]:
    """Find the files of a split as the hub does, by their names or by the README's list."""
    import datasets

    verbosity = datasets.logging.get_verbosity()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # its messages would repeat the error
    try:
        builder = datasets.load_dataset_builder(str(folder.resolve()))
    except Exception as error:  # the library, a README's YAML and the file system raise many kinds
        raise ValueError(_first_line(error)) from error
    finally:
        datasets.logging.set_verbosity(verbosity)
    splits = {str(name): files for name, files in builder.config.data_files.items()}
    if split not in splits:
        raise TaskError(
            f"xsum.split must be a split of {folder}, here {', '.join(splits)} (got {split})"
        )
    return [Path(file) for file in splits[split]]


def _files_from_hub(dataset: str, split: str) -> list[Path]:
    """Fetch the files of one split; fetched files are found again without a network."""
    from huggingface_hub import snapshot_download

    pattern = HUB_FILES.format(split=split)
    folder = snapshot_download(
        dataset, repo_type="dataset", revision=HUB_REVISION, allow_patterns=pattern
    )
    files = sorted(Path(folder).glob(pattern))
    if not files:
        raise TaskError(
            f"xsum.split must be a split of {dataset}, such as train, validation or test (got "
            f"{split}: the hub's {HUB_REVISION} has no {pattern})"
        )
    return files


# --- the contents of a file ----------------------------------------------------------


def _rows(path: Path, columns: XSumColumns) -> Iterator[Cells]:
    """Read a file's rows, with their cells under the names that `columns` gives them here."""
    if path.suffix not in READERS or (path.exists() and not path.is_file()):
        raise TaskError(
            f"xsum.dataset must end in {', '.join(READERS)} and be a file, or be a folder of such "
            f"files or a hub id (got {path}); convert it"
        )
    if problem := pointer_problem(path):
        raise TaskError(problem)
    try:
        yield from READERS[path.suffix](path, columns)
    except UnicodeDecodeError as error:
        byte = error.object[error.start]
        raise ValueError(f"{path.name} is not UTF-8 text: it has the byte 0x{byte:02x}") from None


def _read_json_lines(path: Path, columns: XSumColumns) -> Iterator[Cells]:
    with path.open(encoding="utf-8-sig") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                # Numbers stay as written: an id may have 23 digits, and a summary may be 42.0.
                row = json.loads(line, parse_int=str, parse_float=str, parse_constant=str)
            except RecursionError:
                raise ValueError(f"line {number} is nested too deeply") from None
            except ValueError as error:
                raise ValueError(f"line {number} is not JSON: {error}") from None
            if not isinstance(row, dict):
                raise ValueError(f"{path.name}, line {number}, is not a JSON object")
            cells = {field: row[name] for field, name in _found(path, [*row], columns).items()}
            yield {f: str(v).lower() if isinstance(v, bool) else v for f, v in cells.items()}


def _read_csv(path: Path, columns: XSumColumns) -> Iterator[Cells]:
    limit = csv.field_size_limit(2**31 - 1)  # the default refuses long texts
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            delimiter = _delimiter(file.readline(), columns)
            file.seek(0)
            reader = csv.DictReader(file, delimiter=delimiter, strict=True)
            names = _found(path, reader.fieldnames or [], columns)
            for row in reader:
                if None in row:  # the cells beyond the header's
                    width = len(reader.fieldnames or [])
                    raise ValueError(
                        f"line {reader.line_num} has {width + len(row[None])} fields, the first "
                        f"line {width}: a text with a comma or a line break needs quotes"
                    )
                yield {field: row[name] or None for field, name in names.items()}
    except csv.Error as error:
        raise ValueError(f"line {reader.reader.line_num}: {error}") from None
    finally:
        csv.field_size_limit(limit)


def _delimiter(header: str, columns: XSumColumns) -> str:
    """Return the delimiter that splits a file's first line best."""

    def fit(delimiter: str) -> tuple[bool, int]:
        cells = next(csv.reader([header], delimiter=delimiter))
        return columns.document in cells, len(cells)

    return max(DELIMITERS, key=fit)


def _read_parquet(path: Path, columns: XSumColumns) -> Iterator[Cells]:
    import pyarrow
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(path) as file:
            names = _found(path, file.schema_arrow.names, columns)
            table = file.read([*names.values()])
    except pyarrow.ArrowException as error:  # not all of these are ValueErrors
        raise ValueError(str(error)) from error
    cells = {}
    for field, name in names.items():
        try:
            cells[field] = table[name].cast(pyarrow.string())
        except pyarrow.ArrowException:
            raise ValueError(f"column {name} holds {table[name].type}, which is no text") from None
    yield from pyarrow.table(cells).to_pylist()


READERS: dict[str, Callable[[Path, XSumColumns], Iterator[Cells]]] = {
    ".jsonl": _read_json_lines,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
}


def _found(path: Path, names: Sequence[str], columns: XSumColumns) -> dict[str, str]:
    """Return the columns to read of those that are there; the column `id` may be missing."""
    found = {}
    for field, name in vars(columns).items():
        if name is None or (field == name == "id" and name not in names):
            continue
        if name not in names:
            some = ", ".join([*names[:MAX_NAMES], *["..."] * (len(names) > MAX_NAMES)])
            raise TaskError(
                f"xsum.columns.{field} must be a column of {path}, here {some or 'none':.200} (got "
                f"{name}); {nearest(name, names) or 'name one of them'}"
            )
        if names.count(name) > 1:
            raise TaskError(
                f"xsum.dataset must have each column once (got {name} twice in {path}); rename one"
            )
        found[field] = name
    return found
