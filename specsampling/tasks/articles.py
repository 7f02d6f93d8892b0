"""Reads articles with their summaries from the hub, from local files, or from the demo.

Only the columns `id`, `document` and `summary` are read, so odd columns do no harm. Each cell is
read as the text in the file: a guessed type would turn the id 007 into 7, and the summary "None"
into nothing.
"""

from __future__ import annotations

import contextlib
import csv
import json
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from specsampling.disk import pointer_problem
from specsampling.tasks.task import Example, TaskError

EMBEDDED = "embedded:"
DEMO_ARTICLES = Path(__file__).parent.parent / "data" / "articles.jsonl"  # embedded:articles
# The hub's own conversion. For XSum, main holds a script, which `datasets` does not run.
HUB_REVISION = "refs/convert/parquet"
HUB_FILES = "default/{split}/*.parquet"
COLUMNS = ("id", "document", "summary")
NEEDED = ("document", "summary")
DELIMITERS = ",;\t"  # a spreadsheet exports with its language's delimiter

Cells = Mapping[str, Any]  # a row's values in COLUMNS: text, or values to refuse


def load_articles(dataset: str, split: str) -> list[Example]:
    """Return the articles of one split, in the order of their file.

    The id of an article is the column `id`, or the row's number (from 0) if there is none.

    Args:
        dataset: `embedded:articles`, a local .jsonl, .csv or .parquet file, a local folder of
            such files or with the layout of a hub repository, or a hub id.
        split: the split of a folder or a hub id; a single file is read whole.

    Raises:
        TaskError: the data set is missing, unreadable or empty. A column is missing or holds no
            text. An id is used twice, or only some rows have ids.
    """
    try:
        paths = _files(dataset, split)
        for path in paths:
            if problem := pointer_problem(path):
                raise TaskError(problem)
        rows = [row for path in paths for row in READERS[path.suffix](path)]
    except TaskError:
        raise
    except (OSError, ValueError, RuntimeError) as error:
        raise TaskError(
            f"cannot load xsum.dataset {dataset}, split {split} ({_first_line(error)}); check the "
            "name, the split and the network, or give a local file"
        ) from error
    if not rows:
        raise TaskError(f"xsum.dataset must hold at least one article (got 0 in {dataset})")
    has_ids = any(row.get("id") is not None for row in rows)
    articles = [_article(dataset, number, row, has_ids) for number, row in enumerate(rows)]
    (name, times), *_ = Counter(article.id for article in articles).most_common(1)
    if times > 1:
        raise TaskError(
            f"xsum.dataset must have a different id in every row (got {name[:60]} {times} times in "
            f"{dataset}); mend the column id, or leave it out to number the rows"
        )
    return articles


def _article(dataset: str, number: int, row: Cells, has_ids: bool) -> Example:
    texts = {}
    for column in COLUMNS if has_ids else NEEDED:
        value = row.get(column)
        # No tokenizer accepts half a character (a lone surrogate).
        is_torn = isinstance(value, str) and re.search(r"[\ud800-\udfff]", value)
        if not isinstance(value, str) or is_torn or (column == "id" and not value.strip()):
            raise TaskError(
                f"xsum.dataset must hold text in the column {column} (got {value!r:.60} in "
                f"row {number} of {dataset}); mend the row"
            )
        texts[column] = value
    document, summary = texts["document"].strip(), texts["summary"].strip()
    return Example(texts.get("id", str(number)), document, reference=summary)


# --- the files of a data set ---------------------------------------------------------


def _files(dataset: str, split: str) -> Sequence[Path]:
    path = DEMO_ARTICLES if dataset == f"{EMBEDDED}articles" else Path(dataset)
    if dataset.startswith(EMBEDDED) and path != DEMO_ARTICLES:
        raise TaskError(
            f"xsum.dataset must be {EMBEDDED}articles or not embedded (got {dataset}); change it"
        )
    if path.is_dir():
        return _files_in_folder(path, split)
    is_readable = path.suffix in READERS
    if not path.exists():
        if not is_readable:
            return _files_from_hub(dataset, split)
        raise ValueError("Unable to find the file")
    if not is_readable or not path.is_file():
        raise TaskError(
            f"xsum.dataset must end in {', '.join(READERS)} and be a file, if it is no folder and "
            f"no hub id (got {dataset}); convert it"
        )
    return [path]


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
    files = [Path(file) for file in splits[split]]
    for file in files:
        if file.suffix not in READERS:
            raise TaskError(
                f"xsum.dataset must be a folder of files that end in {', '.join(READERS)} (got "
                f"{file}); convert it"
            )
    return files


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


def _read_json_lines(path: Path) -> Iterator[Cells]:
    with _open_text(path) as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                # Numbers stay as written: an id may have 23 digits, and a summary may be 42.0.
                value = json.loads(line, parse_int=str, parse_float=str, parse_constant=str)
            except RecursionError:
                raise ValueError(f"line {number} is nested too deeply") from None
            except ValueError as error:
                raise ValueError(f"line {number} is not JSON: {error}") from None
            if not isinstance(value, dict):
                raise ValueError(f"{path.name}, line {number}, is not a JSON object")
            _require_columns(path, value)
            cells = {name: value[name] for name in COLUMNS if name in value}
            yield {n: str(v).lower() if isinstance(v, bool) else v for n, v in cells.items()}


def _read_csv(path: Path) -> Iterator[Cells]:
    before = csv.field_size_limit(min(sys.maxsize, 2**31 - 1))  # the default refuses long texts
    try:
        with _open_text(path) as file:
            yield from _rows_of_csv(path, file)
    finally:
        csv.field_size_limit(before)


def _rows_of_csv(path: Path, file: Any) -> Iterator[Cells]:
    fitting = DELIMITERS[0]  # the delimiter that splits the first row into the columns
    for delimiter in reversed(DELIMITERS):
        with contextlib.suppress(csv.Error):
            if set(NEEDED) <= set(next(csv.reader(file, delimiter=delimiter), [])):
                fitting = delimiter
        file.seek(0)
    reader = csv.reader(file, delimiter=fitting, strict=True)
    try:
        header = next(reader, None)
        if header is None:
            return
        _require_columns(path, header)
        positions = {name: header.index(name) for name in COLUMNS if name in header}
        for cells in reader:
            if len(cells) > len(header):
                raise ValueError(
                    f"line {reader.line_num} has {len(cells)} fields, the first line "
                    f"{len(header)}: a text with a comma or a line break needs quotes"
                )
            if cells:  # a blank line has none
                # An empty or a missing cell means that there is no value.
                yield {name: "".join(cells[at : at + 1]) or None for name, at in positions.items()}
    except csv.Error as error:
        raise ValueError(f"line {reader.line_num}: {error}") from None


def _read_parquet(path: Path) -> Iterator[Cells]:
    import pyarrow
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(path) as file:
            names = file.schema_arrow.names
            _require_columns(path, names)
            for batch in file.iter_batches(columns=[n for n in COLUMNS if n in names]):
                columns = {}
                for name, column in zip(batch.schema.names, batch.columns):
                    try:
                        columns[name] = column.cast(pyarrow.string())
                    except pyarrow.ArrowException:
                        problem = f"column {name} holds {column.type}, which is no text"
                        raise ValueError(problem) from None
                yield from pyarrow.RecordBatch.from_pydict(columns).to_pylist()
    except pyarrow.ArrowException as error:  # not all of these are ValueErrors
        raise ValueError(_first_line(error)) from error


READERS: dict[str, Callable[[Path], Iterator[Cells]]] = {
    ".jsonl": _read_json_lines,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
}


@contextlib.contextmanager
def _open_text(path: Path) -> Iterator[Any]:
    """Open a UTF-8 file with or without a byte order mark, and keep its line ends."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            yield file
    except UnicodeDecodeError as error:
        byte = error.object[error.start]
        raise ValueError(f"{path.name} is not UTF-8 text: it has the byte 0x{byte:02x}") from None


def _require_columns(path: Path, names: Iterable[str]) -> None:
    found = list(names)
    if not set(NEEDED) <= set(found):
        some = ", ".join([*found[:8], *["..."] * (len(found) > 8)])
        raise TaskError(
            f"xsum.dataset must have the columns document and summary (got {some:.200} in {path}); "
            "rename them"
        )
    twice = [name for name in COLUMNS if found.count(name) > 1]
    if twice:
        raise TaskError(
            f"xsum.dataset must have each column once (got {twice[0]} twice in {path}); rename one"
        )


def _first_line(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
