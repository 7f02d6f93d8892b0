"""articles.py: three columns of any name, read as the text that stands there, and no others."""

import csv
import datetime
import decimal
import json
import os
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from helpers import error_line
from pyarrow import parquet

from specsampling.config import XSumColumns
from specsampling.tasks.articles import load_articles
from specsampling.tasks.task import TaskError

# What pandas, PyYAML or a schema's guess makes something else of.
LITERALS = [
    *("007", "1.0", "1e5", "12345678901234567890123", "-0", "0x10", "1_000", "1,000", "3.140"),
    *("2024-05-01", "12:30", "2024-05-01T10:00:00Z", "1 Jan"),
    *("None", "NA", "N/A", "nan", "NaN", "null", "NULL", "inf", "-inf", "#N/A", "<NA>", "n/a"),
    *("true", "True", "False", "yes", "no", "42", "4.20", "$5", "50%", "=1+1", "{}", "[1]"),
    *('"', "'", "a;b", "a\tb", "a,b", "two\nlines", "a\rb", "a\r\nb", "\\n", "é", "東京", "🦊"),
    *("a\u2028b", "a\x85b", "\ufeffx", "# no comment", "-", "0"),
]


def write(path: Path, rows: list[dict[str, str]], **form: Any) -> Path:
    """Rows as the kind of file that the path's name says."""
    if path.suffix == ".jsonl":
        path.write_text("\n".join(map(json.dumps, rows)))
    elif path.suffix == ".csv":
        with path.open("w", newline="", encoding="utf-8") as file:
            csv.writer(file, **form).writerows([[*rows[0]], *([*row.values()] for row in rows)])
    else:
        write_parquet(path, **{name: [row[name] for row in rows] for name in rows[0]})
    return path


def write_parquet(path: Path, **columns) -> Path:
    parquet.write_table(pyarrow.table(columns), path)
    return path


def read(path: Path, **columns) -> list[tuple[str, str, str]]:
    articles = load_articles(str(path), "test", XSumColumns(**columns))
    return [(article.id, article.text, article.reference) for article in articles]


def error_of(path: Path | str, **columns) -> str:
    message = error_line(TaskError, load_articles, str(path), "test", XSumColumns(**columns))
    assert len(message) < 600
    return message


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".parquet"])
@pytest.mark.parametrize("text", LITERALS)
def test_a_text_is_never_taken_for_something_else(tmp_path, suffix, text):
    """Ids lost their zeros, and a summary "None" was a missing one."""
    row = {"id": text, "document": f"d {text}", "summary": text}
    form = {"quoting": csv.QUOTE_ALL} if suffix == ".csv" else {}
    path = write(tmp_path / f"a{suffix}", [row], **form)
    assert read(path) == [(text, f"d {text}".strip(), text.strip())]


@pytest.mark.parametrize(
    "text",
    ["7", "12345678901234567890123", "1.50", "1e5", "-0.0", "true", "false", "NaN", "-Infinity"]
    + ["9" * 5000],
)
def test_a_bare_json_value_is_the_text_it_is_written_with(tmp_path, text):
    path = tmp_path / "a.jsonl"
    path.write_text(f'{{"id": {text}, "document": {text}, "summary": {text}}}')
    assert read(path) == [(text, text, text)]


@pytest.mark.parametrize(
    ("values", "texts"),
    [
        (pyarrow.array([7, 8]), ["7", "8"]),
        (pyarrow.array([2**63, 1], pyarrow.uint64()), [str(2**63), "1"]),
        (pyarrow.array([1.5, 2.5]), ["1.5", "2.5"]),
        (pyarrow.array([True, False]), ["true", "false"]),
        (pyarrow.array([datetime.date(2024, 5, 1), datetime.date(2024, 5, 2)]), ["2024-05-01"]),
        (pyarrow.array([decimal.Decimal("0.10"), decimal.Decimal("2.00")]), ["0.10", "2.00"]),
        (pyarrow.array(["a", "b"], pyarrow.large_string()), ["a", "b"]),
        (pyarrow.array(["a", "b"], pyarrow.string_view()), ["a", "b"]),
        (pyarrow.array(["a", "b"]).dictionary_encode(), ["a", "b"]),
        (pyarrow.array([b"a", b"b"]), ["a", "b"]),
        (pyarrow.chunked_array([["a"], ["b"]]), ["a", "b"]),
    ],
    ids=lambda value: "",
)
def test_parquet_columns_of_other_types_become_text(tmp_path, values, texts):
    path = write_parquet(tmp_path / "a.parquet", id=values, document=["d", "d"], summary=["s", "s"])
    assert [row[0] for row in read(path)][: len(texts)] == texts


def test_other_json_columns_may_be_anything_and_change(tmp_path):
    """A schema guessed from the first rows failed on a later one."""
    odd = [
        *(1, "text", None, 1.5, True, [1, "a", None], {"a": {"b": []}}, [], {}, "x" * 300_000),
        *(list(range(50_000)), 10**400, {"document": 3}, [[[[]]]]),
    ]
    article = {"document": "d", "summary": "s"}
    rows = [{**article, "id": number, "extra": value} for number, value in enumerate(odd)]
    rows.append({**article, "id": "last", **{f"c{number}": number for number in range(3000)}})
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(json.dumps(row)[:-1] + ', "big": 1e999}' for row in rows))
    assert len(read(path)) == len(rows)


def test_other_csv_columns_may_be_anything(tmp_path):
    """The csv module refuses fields above 131,072 characters; a column that is ignored had one."""
    header = ["", "id", "odd", "document", "odd", "summary", "last"]
    rows = [
        ["", "1", "x" * 300_000, "d", "", "s", ""],
        ["7", "2", "{'a': 1}", "d", "a\nb,c", "s", "NaN"],
        ["", "3", "", "d", "", "s"],
    ]
    limit = csv.field_size_limit()
    with (tmp_path / "a.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([header, *rows])
    assert [row[0] for row in read(tmp_path / "a.csv")] == ["1", "2", "3"]
    assert csv.field_size_limit() == limit


def test_other_parquet_columns_are_not_read(tmp_path):
    odd = {
        "list": [[1], []],
        "struct": [{"document": 1}, {"document": 2}],
        "none": [None, None],
        "bytes": [b"\xff", b""],
        "nested": [[{"a": [1]}], None],
        "when": [datetime.datetime(2024, 1, 1), None],
        "id.x": ["a", "b"],
    }
    path = write_parquet(tmp_path / "a.parquet", document=["d", "e"], summary=["s", "s"], **odd)
    assert read(path) == [("0", "d", "s"), ("1", "e", "s")]


CNN = {"document": "article", "summary": "highlights"}


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".parquet"])
def test_columns_may_have_any_name(tmp_path, suffix):
    row = {"id": "7", "article": "d", "highlights": "s", "document": "no", "doc.id": "8"}
    form = {"delimiter": ";"} if suffix == ".csv" else {}
    path = write(tmp_path / f"a{suffix}", [row], **form)
    assert read(path, **CNN) == [("7", "d", "s")]
    assert read(path, **CNN, id="doc.id") == [("8", "d", "s")]
    assert read(path, **CNN, id=None) == [("0", "d", "s")]


@pytest.mark.parametrize(
    ("columns", "field", "end"),
    [
        ({}, "document", "here id, article, Highlights (got document); name one of them"),
        (CNN, "summary", "(got highlights); did you mean Highlights?"),
        ({**CNN, "summary": "Highlights", "id": "guid"}, "id", "(got guid)"),
    ],
)
@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".parquet"])
def test_a_missing_column_is_named_with_those_that_are_there(tmp_path, columns, field, end, suffix):
    """An id column that was asked for and is not there is no reason to number the rows."""
    row = {"id": "1", "article": "d", "Highlights": "s"}
    form = {"delimiter": ";"} if suffix == ".csv" else {}
    message = error_of(write(tmp_path / f"a{suffix}", [row], **form), **columns)
    assert message.startswith(f"xsum.columns.{field} must be a column of {tmp_path / 'a'}{suffix}")
    assert end in message


def test_ids_that_repeat_can_be_left_out(tmp_path):
    (tmp_path / "a.csv").write_text("id,document,summary\n1,d,s\n1,e,s\n")
    assert "set xsum.columns.id to null" in error_of(tmp_path / "a.csv")
    assert [row[0] for row in read(tmp_path / "a.csv", id=None)] == ["0", "1"]


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("bom.csv", b"\xef\xbb\xbfid,document,summary\r\n1,d,s\r\n"),
        ("bom.jsonl", b'\xef\xbb\xbf{"id": "1", "document": "d", "summary": "s"}\n'),
        ("semicolons.csv", b"id;document;summary\n1;d;s\n"),
        ("tabs.csv", b"id\tdocument\tsummary\n1\td\ts\n"),
        ("quoted.csv", b'"id","document","summary"\n"1","d","s"'),
        ("blank.csv", b"id,document,summary\n\n1,d,s\n\n\n"),
        ("blank.jsonl", b'\n{"id": "1", "document": "d", "summary": "s"}\n  \n\n'),
        ("crlf.jsonl", b'{"id": "1", "document": "d", "summary": "s"}\r\n'),
        ("spaces.jsonl", b'  {"id" : "1", "document" : " d ", "summary" : "s\\n"}  '),
        ("order.csv", b"summary,document,id\ns,d,1\n"),
        ("short.csv", b"id,document,summary,note\n1,d,s\n"),
    ],
)
def test_files_of_many_makers_hold_the_same(tmp_path, name, data):
    (tmp_path / name).write_bytes(data)
    assert read(tmp_path / name) == [("1", "d", "s")]


def test_fields_hold_quotes_delimiters_and_line_ends(tmp_path):
    (tmp_path / "a.csv").write_text('id,document,summary\n1,"a ""b"", c\n\nd","x;y"\n')
    assert read(tmp_path / "a.csv") == [("1", 'a "b", c\n\nd', "x;y")]


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("latin.csv", "id,document,summary\n1,é,s\n".encode("latin-1"), "not UTF-8 text"),
        ("wide.csv", "id,document,summary\n1,d,s\n".encode("utf-16"), "not UTF-8 text"),
        ("latin.jsonl", '{"document": "é"}'.encode("latin-1"), "not UTF-8 text: it has the byte"),
        ("binary.jsonl", bytes(range(256)), "not UTF-8 text"),
        ("nul.jsonl", b"\0\0\0\0", "line 1 is not JSON"),
        ("array.jsonl", b'[{"document": "d", "summary": "s"}]', "line 1, is not a JSON object"),
        ("number.jsonl", b"7\n", "line 1, is not a JSON object"),
        ("pretty.jsonl", b'{\n "document": "d"\n}', "line 1 is not JSON"),
        ("torn.jsonl", b'{"document": "d", "summary": "s"}\n{"docu', "line 2 is not JSON"),
        ("deep.jsonl", b'{"x": ' + b"[" * 100_000, "line 1 is n"),
        ("later.jsonl", b'{"document": "d", "summary": "s"}\n{"document": "d"}', "document (got"),
        ("case.jsonl", b'{"Document": "d", "Summary": "s"}', "; did you mean Document?"),
        ("null.jsonl", b'{"document": null, "summary": "s"}', "column document (got None in row"),
        ("dict.jsonl", b'{"document": "d", "summary": {"a": 1}}', "summary (got {'a': '1'} in row"),
        ("list.jsonl", b'{"id": [1], "document": "d", "summary": "s"}', "id (got ['1'] in row 0"),
        ("half.jsonl", b'{"document": "a\\ud800", "summary": "s"}', "document (got 'a\\ud800'"),
        ("some.jsonl", b'{"id": 1, "document": "d", "summary": "s"}\n'
         b'{"document": "d", "summary": "s"}', "column id (got None in row 1"),
        ("blank.jsonl", b'{"id": " ", "document": "d", "summary": "s"}', "id (got ' ' in row"),
        ("twice.jsonl", b'{"id": 1, "document": "d", "summary": "s"}\n'
         b'{"id": "1", "document": "d", "summary": "s"}', "(got 1 2 times in"),
        ("open.csv", b'id,document,summary\n1,"d,s\n2,d,s\n', "line 3: unexpected end of data"),
        ("after.csv", b'id,document,summary\n1,"d"x,s\n', "line 2: ',' expected after '\"'"),
        ("more.csv", b"id,document,summary\n1,d, with a comma,s\n", "line 2 has 4 fields"),
        ("less.csv", b"id,document,summary\n1,d\n", "column summary (got None in row"),
        ("header.csv", b"id,document\n1,d\n", "here id, document (got summary)"),
        ("columns.csv", b"document,summary,document\nd,s,d\n", "each column once (got document"),
        ("many.csv", ",".join(f"c{n}" for n in range(9999)).encode(), "c6, c7, ... (got document)"),
        ("colons.csv", b"id:document:summary\n1:d:s\n", "here id:document:summary (got"),
        ("nothing.csv", b"", "here none (got document)"),
        ("torn.parquet", b"PAR1\0\0\0\0PAR1", "cannot load xsum.dataset"),
        ("empty.parquet", b"", "cannot load xsum.dataset"),
        ("text.parquet", b"id,document,summary\n", "cannot load xsum.dataset"),
        ("archive.jsonl.gz", b"\x1f\x8b", "must end in .jsonl, .csv, .parquet"),
        ("articles.json", b"[]", "must end in .jsonl, .csv, .parquet"),
        ("articles", b"", "must end in .jsonl, .csv, .parquet"),
    ],
)  # fmt: skip
def test_a_file_that_will_not_do_is_one_short_line(tmp_path, name, data, message):
    (tmp_path / name).write_bytes(data)
    found = error_of(tmp_path / name)
    assert message in found
    assert name in found


@pytest.mark.parametrize(
    "values", [[["a"]], [{"a": 1}], [b"\xff"]], ids=["list", "struct", "bytes"]
)
def test_a_parquet_column_that_is_no_text_is_named(tmp_path, values):
    path = write_parquet(tmp_path / "a.parquet", document=values, summary=["s"])
    assert "column document holds " in error_of(path)


@pytest.mark.parametrize("value", ["none.jsonl", "none/test.csv", "x" * 300, "a\0b.jsonl", "\0"])
def test_a_path_that_leads_nowhere_is_one_line(tmp_path, value, monkeypatch):
    """A file name of 300 characters and NUL in a path were tracebacks."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.chdir(tmp_path)
    assert "xsum.dataset" in error_of(value)[:1000]


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "a.jsonl")
    assert "and be a file" in error_of(tmp_path / "a.jsonl")


def test_a_folder_with_a_broken_readme_is_one_line(tmp_path):
    """The YAML at its head is read by a library whose errors were not expected."""
    (tmp_path / "README.md").write_text("---\nconfigs: [\n---\n")
    (tmp_path / "test.jsonl").write_text('{"document": "d", "summary": "s"}\n')
    assert "cannot load xsum.dataset" in error_of(tmp_path)


def test_rows_of_several_files_are_numbered_through(tmp_path):
    for number in range(2):
        (tmp_path / f"test-{number}.csv").write_text("document,summary\nd,s\ne,s\n")
    assert [row[0] for row in read(tmp_path)] == ["0", "1", "2", "3"]


@pytest.mark.parametrize("name", ["a.jsonl", "a.csv", "a.parquet"])
def test_a_pointer_of_git_lfs_is_named(name, tmp_path):
    """ "must hold text in the column document", of a clone without git-lfs."""
    path = tmp_path / name
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n")
    with pytest.raises(TaskError, match=f"{name} is a Git LFS pointer.*git lfs pull"):
        read(path)
