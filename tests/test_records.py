"""records.py: append, resume after a kill, refuse what does not belong, scores beside rows."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
from helpers import error_line

from specsampling.results import files
from specsampling.results.lines import unsealed
from specsampling.results.meta import meta_bytes
from specsampling.results.records import (
    RecordsError,
    Row,
    Source,
    is_run,
    line_of,
    read_meta,
    read_rows,
    read_run,
)
from specsampling.results.runfile import RunFile, check_fresh, check_output
from specsampling.results.scores import read_scores, write_scores

META = {"config_hash": "0123", "precision": "bfloat16", "device": "cpu", "date": "Monday"}
ROW = Row(
    example_id="HumanEval/0",
    method="speculative",
    sample_index=0,
    completion="    return 'é'\n",
    token_ids=[5, 6, 7],
    finish_reason="eos",
    num_prompt_tokens=120,
    accepted=[2, 0],
    drafted=[5, 5],
    target_calls=2,
    draft_calls=0,
    prefill_seconds=0.25,
    decode_seconds=0.125,
    forward_seconds=0.3,
    seed=0,
    task_id="HumanEval/0",
)
OTHER = dataclasses.replace(ROW, method="reference", accepted=[], drafted=[])
KEY = dict(zip(("example_id", "method", "sample_index"), ROW.key))
SCORE = {**KEY, "passed": False, "result": "failed: NameError"}
ROUGE_SCORE = {**KEY, "example_id": "article-01", "rouge1": 0.5, "rouge2": 0.25, "rougeL": 0.375}
HOLD_OPEN = """
import json, sys, time
from specsampling.results.records import Row
from specsampling.results.runfile import RunFile
run = RunFile.open(sys.argv[1], json.loads(sys.argv[2]))
run.append(Row(**json.loads(sys.argv[3])))
print("open", flush=True)
time.sleep(60)
"""


@pytest.fixture
def path(tmp_path):
    return tmp_path / "results.jsonl"


def write_run(path, *rows, meta=META):
    with RunFile.open(path, meta) as run:
        for row in rows:
            run.append(row)


error_of = partial(error_line, RecordsError)
"""The one line that a user sees."""


def resume(path):
    return RunFile.open(path, META)


def rewrite(path, values):
    """Put a line in place of all others."""
    path.write_text(json.dumps(values) + "\n")


def full_disk(*_):
    raise OSError(28, "No space left on device")


def test_rows_and_meta_come_back_as_they_were_written(tmp_path):
    path = tmp_path / "new" / "folder" / "results.jsonl"
    with RunFile.open(path, META) as run:
        run.append(ROW)
        assert read_rows(path) == [ROW]  # as soon as append returns
        run.append(OTHER)
    assert read_rows(path) == [ROW, OTHER]
    assert read_meta(path) == META
    assert path.with_name("results.meta.json").exists()
    fields = json.loads(path.read_text().splitlines()[0])
    assert "reference" not in fields and fields["task_id"] == "HumanEval/0"
    assert ROW.key == ("HumanEval/0", "speculative", 0) and ROW.num_new_tokens == 3


def test_resume_knows_the_rows_that_are_there_and_appends(path):
    write_run(path, ROW)
    with RunFile.open(path, META) as run:
        assert run.rows == [ROW] and run.done == {ROW.key}
        message = error_of(run.append, ROW)  # a key is written once
        assert "already holds a row for ('HumanEval/0', 'speculative', 0)" in message
        run.append(OTHER)
        assert run.done == {ROW.key, OTHER.key}
    assert read_rows(path) == [ROW, OTHER]


def test_fresh_drops_rows_meta_and_scores(path):
    """Scores of the old rows would be counted for new rows with the same keys."""
    write_run(path, ROW, OTHER)
    write_scores(path, [SCORE])
    with RunFile.open(path, {**META, "config_hash": "4567"}, fresh=True) as run:
        assert run.rows == [] and run.done == set()
        run.append(OTHER)
    assert read_rows(path) == [OTHER]
    assert read_meta(path)["config_hash"] == "4567"
    assert "cannot be read" in error_of(read_scores, path)
    path.with_suffix(".meta.json").unlink()  # the way out that a run without its meta names
    with RunFile.open(path, META, fresh=True) as run:
        assert run.rows == []


def test_the_meta_keeps_what_made_the_first_rows_and_notes_what_changed_since(path):
    """Printing the table of a finished run must not change its committed files."""
    tuesday = {**META, "date": "Tuesday"}
    write_run(path, ROW)
    write_run(path, meta=tuesday)
    assert read_meta(path) == META
    write_run(path, OTHER, meta=tuesday)
    assert read_meta(path) == {**META, "resumed": [{"date": "Tuesday"}]}


def test_a_note_goes_to_the_start_whose_rows_it_is_about(path):
    for row, peak in ((ROW, "5 GB"), (OTHER, "6 GB"), (None, "7 GB")):
        with RunFile.open(path, META) as run:
            if row:
                run.append(row)
            run.note(peak_memory=peak)
    assert read_meta(path) == {**META, "peak_memory": "5 GB", "resumed": [{"peak_memory": "6 GB"}]}
    assert len(read_rows(path)) == 2


@pytest.mark.parametrize("tail", [b'{"example_id": "Hum', b'{"exam', b"{", b"\0\0\0\0", None])
def test_a_torn_last_line_is_dropped_from_the_file(path, tail):
    """A last row whose line end an editor took away stays."""
    write_run(path, ROW)
    whole = path.read_bytes()
    left = whole[:-1] if tail is None else whole + tail
    path.write_bytes(left)
    assert read_rows(path) == [ROW]
    assert path.read_bytes() == left  # reading changes nothing
    write_run(path, OTHER)
    assert path.read_bytes().startswith(whole)
    assert read_rows(path) == [ROW, OTHER]


@pytest.mark.parametrize(
    ("tail", "problem"),
    [
        *((tail, "") for tail in (b"hello", b"hello\n", b"{}", b'{"exam\n', b'{"id": 1')),
        (b"{broken\n{torn", "is not a JSON object"),  # a kill tears one line
        (b"{broken\n" + line_of(OTHER), "is not a JSON object"),
        (line_of(ROW), "repeats the row for ('HumanEval/0', 'speculative', 0)"),
    ],
)
def test_a_foreign_last_line_is_not_dropped_as_if_torn(path, tail, problem):
    """What a kill leaves is the beginning of a row, without a line's end; all else is a mistake."""
    write_run(path, ROW)
    path.write_bytes(path.read_bytes() + tail)
    before = path.read_bytes()
    for opened in (read_rows, resume):
        assert f"{path}, line 2, {problem}" in error_of(opened, path)
    assert path.read_bytes() == before


def test_a_torn_first_line_starts_over(path):
    write_run(path, ROW)
    path.write_bytes(path.read_bytes()[:-2])
    write_run(path, ROW)
    assert read_rows(path) == [ROW]


@pytest.mark.parametrize("name", ["completion", "seed", "decode_seconds"])
def test_a_row_that_was_changed_later_is_told(path, name):
    """One byte of a number or a text still makes a row, of another model."""
    write_run(path, ROW, OTHER)
    text = path.read_text()
    value = json.dumps(getattr(ROW, name))
    changed = text.replace(f'"{name}": {value[:-1]}', f'"{name}": {value[:-1]}1', 1)
    assert changed != text
    path.write_text(changed)
    message = error_of(read_rows, path)
    assert "line 1, was changed after it was written; mend or delete the line" in message


def test_rows_and_metas_of_before_there_was_a_seal_are_read(path):
    write_run(path, ROW)
    for file in (path, path.with_suffix(".meta.json")):
        rewrite(file, unsealed(json.loads(file.read_text()))[0])
    assert read_rows(path) == [ROW]
    assert read_meta(path) == META


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"speed": 3}, "has a field that is not known: speed"),
        ({"seed": None}, "has a wrong seed"),
        ({"sample_index": True}, "has a wrong sample_index: 'True'"),
        ({"accepted": [1.5]}, "has a wrong accepted: '[1.5]'"),
        ({"completion": 7}, "has a wrong completion: '7'"),
        ({"decode_seconds": ...}, "has no decode_seconds"),
        *(({"prompt_hash": value}, "has a wrong prompt_hash") for value in (7, ["0123"], True)),
    ],
)
def test_a_line_that_is_no_row_is_refused(path, change, problem):
    write_run(path, ROW)
    fields = {**json.loads(path.read_text()), **change}
    rewrite(path, {name: value for name, value in fields.items() if value is not ...})
    assert f"line 1, {problem}" in error_of(read_rows, path)


HASHED = dataclasses.replace(ROW, prompt_hash="0123456789abcdef")
ANOTHER = dataclasses.replace(OTHER, prompt_hash="fedcba9876543210")


def test_a_row_of_another_prompt_of_its_example_is_not_appended(path):
    """Shards of two days were merged, and their texts compared as if they answered one prompt."""
    with RunFile.open(path, META) as run:
        run.append(HASHED)
        message = error_of(run.append, ANOTHER)
        assert "must hold rows of one prompt of HumanEval/0" in message and "--output" in message
        run.append(dataclasses.replace(ANOTHER, prompt_hash=HASHED.prompt_hash))
    assert len(read_rows(path)) == 2
    with RunFile.open(path, META) as run:  # and a later process knows it
        error_of(run.append, dataclasses.replace(ANOTHER, sample_index=1))
        run.append(dataclasses.replace(ANOTHER, example_id="HumanEval/1"))


@pytest.mark.parametrize("read", [read_rows, read_run, resume])
def test_a_file_of_two_prompts_is_told_whoever_reads_it(path, read):
    """Two files put into one by hand had a column "identical outputs"."""
    write_run(path, HASHED)
    write_run(path.with_name("other.jsonl"), ANOTHER)
    path.write_bytes(path.read_bytes() + path.with_name("other.jsonl").read_bytes())
    assert "must hold rows of one prompt of HumanEval/0 (got two" in error_of(read, path)
    assert "one prompt" in error_of(check_output, path, META)


def test_rows_of_before_there_was_a_hash_stand_beside_others(path):
    write_run(path, ROW)
    write_run(path, dataclasses.replace(ANOTHER, sample_index=1), ANOTHER)
    assert [row.prompt_hash for row in read_rows(path)] == [None, *[ANOTHER.prompt_hash] * 2]
    write_run(path.with_name("empty.jsonl"), dataclasses.replace(ROW, prompt_hash=""))
    assert read_rows(path.with_name("empty.jsonl"))


OTHER_IDS = [[1, 2, 4], [3, 2, 1], [1, 2], [1, 2, 3, 3], [12, 3], [1, 23], [1, 2, 30], []]


def test_prompts_are_told_apart_by_their_ids():
    """An older row has no hash, so its length is all that it tells."""
    source = Source.of([1, 2, 3], "r")
    for same in (source, Source.of((1, 2, 3), "another"), Source(3, None, "r")):
        assert source.has_prompt_of(same) and same.has_prompt_of(source)
    for other in (Source(4, None, "r"), *(Source.of(ids, "r") for ids in OTHER_IDS)):
        assert not source.has_prompt_of(other) and not other.has_prompt_of(source)


@pytest.mark.parametrize("name", ["config_hash", "precision", "device"])
def test_rows_made_with_something_else_are_refused(path, name):
    write_run(path, ROW)
    before = path.read_bytes()
    message = error_of(RunFile.open, path, {**META, name: "other"})
    assert f'{name} was "{META[name]}", is now "other"' in message
    assert "--fresh" in message and "--output" in message
    assert path.read_bytes() == before
    with RunFile.open(path, META) as run:  # a file that was refused is let go
        assert run.rows == [ROW]


MACHINE = {**META, "device_name": "A Processor, 2 cores", "threads": 2, "versions": {"torch": "2"}}


def test_rows_name_their_machine_and_older_rows_get_the_runs(path):
    """Rows of before name none: they are the one machine's, or nobody knows whose."""
    write_run(path, ROW)
    path.with_suffix(".meta.json").write_bytes(meta_bytes(MACHINE))
    name = "A Processor, 2 cores, 2 threads, bfloat16, torch 2"
    assert read_run(path).rows == [dataclasses.replace(ROW, device=name)]
    with RunFile.open(path, {**MACHINE, "device_name": "Another"}) as run:
        run.append(dataclasses.replace(ROW, sample_index=9))
    another = "Another, 2 threads, bfloat16, torch 2"
    assert [row.device for row in read_rows(path)] == [None, another]
    assert [row.device for row in read_run(path).rows] == ["", another]


def test_only_fields_that_decide_a_text_are_named(path):
    """The message also named run.limit, run.methods and what else differed."""
    was = {"sampling": {"seed": 1, "num_samples": 1}, "run": {"limit": 3, "threads": 2}}
    now = {"sampling": {"seed": 2, "num_samples": 5}, "run": {"limit": 4, "threads": 2}}
    same = {"speculation": {"k": 5}}
    write_run(path, ROW, meta={**META, "config": was | same})
    message = error_of(RunFile.open, path, {**META, "config_hash": "4", "config": now | same})
    assert "another run: sampling.seed was 1, is now 2; start over" in message


@pytest.mark.parametrize("meta", [None, "", "[]", "{torn"])
def test_rows_without_a_readable_meta_are_refused(path, meta):
    write_run(path, ROW)
    meta_path = path.with_suffix(".meta.json")
    meta_path.unlink()
    if meta is not None:
        meta_path.write_text(meta)
    message = error_of(resume, path)
    assert "results.meta.json" in message and ("move it away" if meta else "--fresh") in message
    assert read_rows(path) == [ROW]


def test_a_missing_file_to_read_is_one_line(path):
    for read in (read_rows, read_meta, read_scores):
        assert "cannot be read (No such file" in error_of(read, path)


def test_a_full_disk_leaves_no_part_of_a_row(path):
    """The half row would stand in the middle once later rows are appended."""
    import resource

    with RunFile.open(path, META) as run:
        run.append(ROW)
        whole = path.read_bytes()
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(whole) + 10, hard))
        try:
            message = error_of(run.append, OTHER)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert "cannot be written" in message
        assert path.read_bytes() == whole
        run.append(OTHER)
    assert read_rows(path) == [ROW, OTHER]


NO_FILE = "must be a file that ends in .jsonl"


@pytest.mark.parametrize("fresh", [False, True])
@pytest.mark.parametrize(
    ("command", "name", "message"),
    [
        ("touch file", "file/a.jsonl", "cannot be written (Not a directory)"),
        ("mkdir a.jsonl", "a.jsonl", NO_FILE),
        ("ln -s b.jsonl a.jsonl; ln -s a.jsonl b.jsonl", "a.jsonl", "(Too many levels of symbolic"),
        ("mkfifo a.jsonl", "a.jsonl", NO_FILE),
        ("mkdir a.scores.jsonl", "a.jsonl", "a.scores.jsonl must be a file beside the rows"),
        ("mkdir a.meta.json", "a.jsonl", "a.meta.json must be a file beside the rows"),
        ("", "a\0b.jsonl", "embedded null byte"),
        ("", f"{'x' * 300}.jsonl", "File name too long"),
        *(("", name, NO_FILE) for name in ("a.json", ".", "", "/dev/null")),
        ("", "/proc/none/a.jsonl", "cannot be written"),
    ],
)
def test_an_output_that_cannot_be_is_told_beforehand(tmp_path, command, name, message, fresh):
    """Each of them was told after minutes of loading, or when the old rows were gone."""
    if "scores" in command:
        write_run(tmp_path / name, ROW)
    subprocess.run(command, shell=True, cwd=tmp_path, check=True)
    path = tmp_path / name if name else ""
    before = {file: file.stat().st_size for file in tmp_path.iterdir() if file.is_file()}
    assert message in error_of(check_output, path, None if fresh else META)
    assert message in error_of(RunFile.open, path, META, fresh)
    assert before == {f: f.stat().st_size for f in tmp_path.iterdir() if f.is_file()}


def test_looking_at_an_output_leaves_nothing_behind(tmp_path):
    check_output(tmp_path / "new" / "folder" / "a.jsonl", META)
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "link.jsonl").symlink_to(tmp_path / "later" / "a.jsonl")
    check_output(tmp_path / "link.jsonl", META)


def test_rows_that_cannot_be_resumed_are_told_beforehand_and_fresh_may_drop_them(path):
    write_run(path, ROW)
    assert "device was" in error_of(check_output, path, {**META, "device": "cuda"})
    path.write_bytes(b"{broken\n" + path.read_bytes() + b"{torn")
    before = path.read_bytes()
    assert "line 1, is not a JSON object" in error_of(check_output, path, META)
    check_output(path)
    assert path.read_bytes() == before


@pytest.mark.parametrize("text", ["my notes", '{"id": 1, "document": "d", "summary": "s"}\n'])
def test_fresh_deletes_no_file_of_another_kind(path, text):
    """`--output articles.jsonl --fresh` emptied the data set that the run was to read."""
    path.write_text(text)
    assert "--output" in error_of(resume, path)  # it is not cut as if torn
    assert "holds lines that are no rows" in error_of(check_fresh, path)
    assert "holds lines that are no rows" in error_of(RunFile.open, path, META, fresh=True)
    assert path.read_text() == text


def test_fresh_keeps_the_old_rows_if_the_new_meta_cannot_be_written(path, monkeypatch):
    """The rows were dropped first, and then the disk was full."""
    write_run(path, ROW)
    write_scores(path, [SCORE])
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full_disk)
        assert "No space left" in error_of(RunFile.open, path, META, fresh=True)
    assert read_rows(path) == [ROW]
    assert read_scores(path) == [SCORE]
    assert len(list(path.parent.iterdir())) == 3


@pytest.fixture
def holder(path):
    """Another process that has appended `OTHER` and keeps the file open."""
    command = [sys.executable, "-c", HOLD_OPEN, str(path), json.dumps(META)]
    command.append(json.dumps(dataclasses.asdict(OTHER)))
    options = {"stdout": subprocess.PIPE, "text": True, "cwd": Path(__file__).parents[1]}
    with subprocess.Popen(command, **options) as process:
        assert process.stdout.readline() == "open\n"
        yield process
        process.kill()


@pytest.mark.parametrize("fresh", [False, True])
def test_a_second_process_is_refused_and_may_read(path, holder, fresh):
    is_written = "is being written by another process"
    assert is_written in error_of(RunFile.open, path, META, fresh=fresh)
    assert is_written in error_of(check_output, path, None if fresh else META)
    assert read_rows(path) == [OTHER]


def test_a_killed_process_leaves_no_lock(path, holder):
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    with RunFile.open(path, META) as run:
        assert run.rows == [OTHER]
        run.append(ROW)


def test_the_same_process_cannot_open_a_file_twice(path):
    with RunFile.open(path, META):
        assert "another process" in error_of(RunFile.open, path, META)
    RunFile.open(path, META).close()


@pytest.mark.parametrize("score", [SCORE, ROUGE_SCORE])
def test_scores_come_back_as_they_were_written_and_are_replaced_as_a_whole(path, score):
    """Files of before the field `form` came are part of the repository."""
    scores = [score, {**score, "method": "reference"}]
    if score is SCORE:
        scores[1]["form"] = "as given"
    else:
        scores[1]["rouge1"] = 0
    write_scores(path, scores)
    assert read_scores(path) == scores
    assert path.with_name("results.scores.jsonl").exists()
    write_scores(path, scores[1:])
    assert read_scores(path) == scores[1:]


def test_a_rewrite_that_fails_leaves_the_old_scores_and_no_litter(path, monkeypatch):
    write_scores(path, [SCORE])
    monkeypatch.setattr(files.os, "fsync", full_disk)
    assert "No space left on device" in error_of(write_scores, path, [])
    assert read_scores(path) == [SCORE]
    assert [file.name for file in path.parent.iterdir()] == ["results.scores.jsonl"]


@pytest.mark.parametrize(
    ("scores", "problem"),
    [
        ([{**SCORE, "form": 1}], "line 1, has a wrong form: '1'"),
        ([{**SCORE, "passed": "yes"}], "line 1, has a wrong passed: 'yes'"),
        ([{**ROUGE_SCORE, "rougeL": None}], "line 1, has a wrong rougeL"),
        ([ROUGE_SCORE, SCORE], "line 2, has a field that is not known: passed"),
        ([SCORE, ROUGE_SCORE], "line 2, has a field that is not known: rouge1"),
    ],
)
def test_a_score_of_the_wrong_type_or_kind_is_refused(path, scores, problem):
    """A mean over rows of which half have no such score is the mean of something else."""
    write_scores(path, scores)
    assert problem in error_of(read_scores, path)


def test_rows_of_a_run_are_told_from_other_files(path, tmp_path):
    write_run(path, ROW)
    (tmp_path / "other.jsonl").write_text('{"task_id": "HumanEval/0", "completion": "pass"}\n')
    assert is_run(path)
    assert not is_run(tmp_path / "other.jsonl") and not is_run(tmp_path / "missing.jsonl")
