"""What a prompt was: the same for all rows of a run, whatever day or rank makes them."""

from __future__ import annotations

import json
import shutil
from datetime import datetime, timedelta, timezone
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import write_config
from helpers import error_line
from transformers import AutoTokenizer
from transformers.utils import chat_template_utils

import main_exp1
import main_exp2
from specsampling import provenance
from specsampling.config import ConfigError
from specsampling.console import exit_code
from specsampling.provenance import prompt_date
from specsampling.results import runfile
from specsampling.results.lines import unsealed
from specsampling.results.records import RecordsError, read_meta, read_rows

PROJECT = Path(__file__).resolve().parent.parent
DAY = "Today Date: {{ strftime_now('%d %b %Y') }}\n"
MESSAGES = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}assistant: "
START = datetime(2026, 4, 30, 12, 0, 1)


class Clock(datetime):
    """The time of day of everything that asks; it goes on by `pace` whenever somebody does."""

    time = START
    pace = timedelta(0)

    @classmethod
    def now(cls, tz=None):
        cls.time += cls.pace
        return cls.time if tz is None else cls.time.replace(tzinfo=tz)


@pytest.fixture
def clock(monkeypatch):
    """The run's and the templates' clock."""
    monkeypatch.setattr(Clock, "time", START)
    monkeypatch.setattr(Clock, "pace", timedelta(0))
    module = SimpleNamespace(datetime=Clock, timezone=timezone)
    monkeypatch.setattr(provenance, "datetime", module)
    monkeypatch.setattr(chat_template_utils, "datetime", Clock)
    return Clock


def set_template(folder: Path, template: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = template + MESSAGES
    tokenizer.save_pretrained(folder)


@pytest.fixture
def folders(model_folders, tmp_path) -> dict[str, Path]:
    """A copy of the target, whose template may change."""
    shutil.copytree(model_folders["llama-target"], tmp_path / "target")
    return model_folders | {"llama-target": tmp_path / "target"}


@pytest.fixture
def run_on(folders, tmp_path, clock, capsys):
    """Run a method over two problems asked in a chat template, at some time."""
    blocks = {
        "speculation": {"k": 4},
        "decoding": {"max_new_tokens": 6},
        "humaneval": {"prompt_style": "chat", "stop_strings": []},
    }
    config = write_config(tmp_path, "demo", "llama", folders, blocks)
    output = tmp_path / "results2.jsonl"

    def run(time: datetime, methods: str, template: str = DAY, limit: int = 2, *more: str):
        set_template(folders["llama-target"], template)
        clock.time = time
        arguments = ["--config", config, "--output", output, "--limit", limit]
        code = exit_code(main_exp2.main, list(map(str, [*arguments, "--methods", methods, *more])))
        return code, *capsys.readouterr()

    run.output = output
    return run


def date_of(output: Path) -> str:
    return read_meta(output)["prompt_date"]


def hashes(output: Path) -> dict[str, set[str]]:
    """The hashes of each example's rows."""
    found: dict[str, set[str]] = {}
    for row in read_rows(output):
        found.setdefault(row.example_id, set()).add(row.prompt_hash)
    return found


TIMES = {
    "the next day": (START, START + timedelta(days=1), DAY),
    "a shorter day's name": (START, datetime(2026, 5, 2), "{{ strftime_now('%-d %B') }}\n"),
    "a month later": (START, START + timedelta(days=31), "{{ strftime_now('%B %d, %Y') }}\n"),
    "a year later": (START, datetime(2027, 4, 30), DAY),
    "a second later": (START, START + timedelta(seconds=1), "{{ strftime_now('%H:%M:%S') }}\n"),
    "over midnight": (datetime(2026, 12, 31, 23, 59, 59), datetime(2027, 1, 1, 0, 0, 1), DAY),
    "the clock set back": (START, START - timedelta(days=3), DAY),
    "another weekday": (START, START + timedelta(days=1), "{{ strftime_now('%A') }}\n"),
    "microseconds": (START, START, "{{ strftime_now('%f') }}\n"),
    "llama 3.1": (START, datetime(2027, 1, 1), "{{ date_string | default('26 Jul 2024') }}\n"),
    "no date": (START, datetime(2027, 1, 1), ""),
}


@pytest.mark.parametrize("name", TIMES)
def test_methods_of_two_days_get_the_same_prompts(name, run_on):
    """The next day's texts had other prompts, or were refused as "the data have changed"."""
    first, then, template = TIMES[name]
    code, _, errors = run_on(first, "reference", template)
    assert code == 0, errors
    code, printed, errors = run_on(then, "reference,speculative", template)
    assert code == 0, errors
    assert "2/2" in printed  # identical outputs
    assert all(len(of_example) == 1 for of_example in hashes(run_on.output).values())
    assert date_of(run_on.output) == first.isoformat()
    (resumed,) = read_meta(run_on.output)["resumed"]
    assert "prompt_date" not in resumed


def test_a_run_that_starts_before_midnight_has_one_day(run_on, clock):
    """Each prompt was rendered with the clock: those after midnight had the next day."""
    clock.pace = timedelta(hours=7)
    assert run_on(datetime(2026, 4, 30, 17), "reference", DAY, 3)[0] == 0
    date = date_of(run_on.output)
    clock.pace = timedelta(0)
    assert run_on(START + timedelta(days=9), "reference,speculative", DAY, 3)[0] == 0
    assert date_of(run_on.output) == date
    assert [len(of_example) for of_example in hashes(run_on.output).values()] == [1, 1, 1]


def test_a_run_that_starts_over_has_a_day_of_its_own(run_on):
    run_on(START, "reference")
    before, old_rows = hashes(run_on.output), read_rows(run_on.output)
    later = START + timedelta(days=1)
    code, _, errors = run_on(later, "reference", DAY, 2, "--fresh")
    assert code == 0
    kept = run_on.output.with_name(f"{run_on.output.stem}.kept1.jsonl")
    assert read_rows(kept) == old_rows  # it deleted them, and error lines suggest it
    assert date_of(kept) == START.isoformat()
    assert f"kept in {kept}" in errors
    assert date_of(run_on.output) == later.isoformat()
    after = hashes(run_on.output)
    assert before.keys() == after.keys()
    assert not any(before[name] & after[name] for name in before)
    run_on.output.write_text("")  # stopped before its first row, a run leaves only a meta
    assert run_on(START, "reference")[0] == 0
    assert date_of(run_on.output) == START.isoformat()


def test_rows_that_lacked_memory_keep_their_runs_day(run_on):
    """They are made again; the meta that stays says when the run began."""
    run_on(START, "reference")
    failed = {"finish_reason": "error", "error": "out of memory (here)", "token_ids": []}
    lines = change_rows(run_on.output, **failed)
    assert run_on(START + timedelta(days=1), "reference")[0] == 0
    made = [row.prompt_hash for row in read_rows(run_on.output)]
    assert made == [line["prompt_hash"] for line in lines]
    assert date_of(run_on.output) == START.isoformat()


def error_of(run_on, was: str, now: str, change=lambda output: None) -> str:
    """What is said of rows that would have other prompts than the rows that are there."""
    run_on(START, "reference", was)
    change(run_on.output)
    before = run_on.output.read_bytes()
    code, printed, errors = run_on(START, "speculative", now)
    assert code == 2 and printed == "" and errors.splitlines()[-1].startswith("error: ")
    assert run_on.output.read_bytes() == before
    return errors.splitlines()[-1]


@pytest.mark.parametrize(
    ("was", "now"),
    [
        (DAY, DAY + "\n"),
        ("", DAY),
        ("Be brief.\n", "Be quick.\n"),
        ("{{ 'a' }}", "{{ 'b' }}"),
        ("a", "b"),
        ("{{ range(99999) | random }}\n", "{{ range(99999) | random }}\n"),
    ],
)
def test_rows_of_another_prompt_are_refused_in_one_line(was, now, run_on):
    """A prompt of other tokens, as many as before, went unseen into the file of the old one."""
    error = error_of(run_on, was, now, lambda output: change_meta(output, "files"))
    assert "rows of another prompt of HumanEval/0: " in error
    assert "chat template have changed since; start over with --fresh, or" in error


def test_files_that_have_changed_are_named(run_on):
    """Their digests are in the meta: the rows were of two models, and all the target's own."""
    error = error_of(run_on, "Be brief.\n", "Be quick.\n")
    assert "rows of other files" in error
    assert "models.target have changed since; put them back, or start over" in error


def change_meta(output: Path, *dropped: str, **changes: str) -> None:
    meta = read_meta(output) | changes
    kept = {name: value for name, value in meta.items() if name not in dropped}
    output.with_suffix(".meta.json").write_text(json.dumps(kept))


def change_rows(output: Path, *dropped: str, **changes: object) -> list[dict]:
    """Change every row of a file, and return the rows of before."""
    lines = [unsealed(json.loads(line))[0] for line in output.read_text().splitlines()]
    rows = [
        {name: value for name, value in (line | changes).items() if name not in dropped}
        for line in lines
    ]
    output.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return lines


def test_an_older_run_goes_on_with_the_day_of_its_start(run_on):
    run_on(START, "reference")
    made = hashes(run_on.output)
    change_rows(run_on.output, "prompt_hash")
    change_meta(run_on.output, "prompt_date", "files", date="2026-04-30T12:00:01+00:00")
    code, printed, errors = run_on(START + timedelta(days=1), "reference,speculative")
    assert code == 0, errors
    assert "2/2" in printed
    hashed = {"reference": set(), "speculative": set()}
    for row in read_rows(run_on.output):
        hashed[row.method].add(row.prompt_hash)
    assert hashed == {"reference": {None}, "speculative": set.union(*made.values())}
    meta = read_meta(run_on.output)
    assert "prompt_date" not in meta and meta["resumed"][0]["prompt_date"] == START.isoformat()
    scoring = ["--score", str(run_on.output), "--set", "humaneval.allow_weak_sandbox=true"]
    assert exit_code(main_exp2.main, scoring) == 0


COMMITTED = sorted(
    path.with_name(path.name.replace(".meta.json", ".jsonl"))
    for path in (PROJECT / "Results/published").rglob("*.meta.json")
)


@pytest.mark.parametrize("path", COMMITTED, ids=lambda path: str(path.relative_to(PROJECT)))
def test_committed_runs_are_read_as_they_are(path):
    """Older ones have no hashes: their start is the meta's date, and any prompt will do."""
    meta, rows = read_meta(path), read_rows(path)
    hashed = "prompt_date" in meta
    if not hashed:
        start = datetime.fromisoformat(meta["date"])
        assert prompt_date(meta) == start.replace(tzinfo=None)
    assert {row.prompt_hash is None for row in rows} == {not hashed}
    for row in rows[:3]:
        another = row.source._replace(prompt_hash="0123456789abcdef")
        assert row.source.has_prompt_of(another) is not hashed


@pytest.mark.parametrize(
    "meta",
    [
        *({"prompt_date": date} for date in ("yesterday", "", None, 20260430, ["2026-04-30"])),
        *({"prompt_date": "2026-02-30T00:00:00"}, {"date": "Monday"}, {}),
    ],
    ids=str,
)
def test_a_meta_without_a_date_is_refused(meta):
    message = error_line(ConfigError, prompt_date, meta)
    assert message.startswith("prompt_date in ") and "must be a date and time (got" in message


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("2026-04-30T12:00:01", START),
        ("2026-04-30T12:00:01+00:00", START),
        ("2026-04-30T12:00:01+09:00", START),
        ("2026-04-30", datetime(2026, 4, 30)),
    ],
)
def test_a_date_is_the_local_time_that_it_says(text, expected):
    """Another time zone's machine that resumes a run must not shift its day."""
    assert prompt_date({"prompt_date": text, "date": "2000-01-01"}) == expected


def test_articles_in_a_chat_template_have_one_day_too(folders, tmp_path, clock, capsys):
    """Experiment 1 cuts its documents by the rendered prompt's length."""
    set_template(folders["llama-target"], "{{ strftime_now('%-d %B') }}\n")
    blocks = {"decoding": {"max_new_tokens": 6}, "xsum": {"prompt_style": "chat"}}
    config = write_config(tmp_path, "demo", "llama", folders, blocks)
    output = tmp_path / "results1.jsonl"
    arguments = ["--config", str(config), "--limit", "2", "--output", str(output), "--methods"]
    assert exit_code(main_exp1.main, [*arguments, "reference"]) == 0
    clock.time = datetime(2026, 5, 2)
    assert exit_code(main_exp1.main, [*arguments, "reference,speculative"]) == 0
    assert "2/2" in capsys.readouterr().out
    assert [len(of_example) for of_example in hashes(output).values()] == [1, 1]


def test_what_cannot_be_kept_is_not_started_over(run_on, monkeypatch):
    """A full disk: the rows could not be copied, and were then deleted all the same."""
    run_on(START, "reference")
    before = run_on.output.read_bytes()

    def fail(path, rows, meta):
        raise RecordsError(f"{path} cannot be written (No space left on device)")

    monkeypatch.setattr(runfile, "_keep", fail)
    code, _, errors = run_on(START, "reference", DAY, 2, "--fresh")
    assert code == 2 and "No space left on device" in errors.splitlines()[-1]
    assert run_on.output.read_bytes() == before
