"""XSum as a task: where articles come from, how a prompt is made, what is cut."""

from __future__ import annotations

import json
import os
from functools import partial
from pathlib import Path

import huggingface_hub
import pandas as pd
import pytest
from helpers import error_line
from huggingface_hub.errors import LocalEntryNotFoundError
from test_tasks import Letters

from specsampling.config import XSumColumns, XSumConfig
from specsampling.method.text import PromptError
from specsampling.tasks.task import Example, Prompt, TaskError
from specsampling.tasks.xsum import XSum

ROWS = [
    {"id": "11", "document": "First line.\nSecond, “quoted” line.", "summary": "One."},
    {"id": "22", "document": 'Braces {document} and {0}, a comma, a "quote".', "summary": "Two."},
    {"id": "33", "document": "Third.\n", "summary": " Three. "},
]
EXAMPLES = [
    Example(row["id"], row["document"].strip(), reference=row["summary"].strip()) for row in ROWS
]


def write(path: Path, rows=ROWS) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    elif path.suffix == ".csv":
        pd.DataFrame(rows).to_csv(path, index=False)
    else:
        pd.DataFrame(rows).to_parquet(path)
    return path


def task(dataset, *, split="test", style="completion", template="", num_shots=0, stops=()) -> XSum:
    template = template or "Summarise: {document}"
    return XSum(XSumConfig(str(dataset), split, style, template, num_shots, stops))


@pytest.fixture
def path(tmp_path) -> Path:
    return write(tmp_path / "articles.jsonl")


error_of = partial(error_line, TaskError, task)
"""The one line that a user sees."""


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".parquet"])
def test_files_of_every_kind_hold_the_same_articles(tmp_path, suffix):
    """Line breaks, quotes and braces in a document survive each of them."""
    assert task(write(tmp_path / f"articles{suffix}")).examples() == EXAMPLES


@pytest.mark.parametrize(
    "name", ["test.jsonl", "test/0000.csv", "data/test-00000-of-00001.parquet", "all_test.csv"]
)
def test_a_folder_is_read_by_split(tmp_path, name):
    folder = tmp_path / "folder"
    write(folder / name)
    write(folder / name.replace("test", "train"), ROWS[:1])
    assert task(folder).examples() == EXAMPLES
    assert len(task(folder, split="train").examples()) == 1
    assert "train" in error_of(folder, split="validation")


def test_a_folder_laid_out_as_a_hub_repository_is_read(tmp_path):
    write(tmp_path / "set" / "parts" / "a.parquet")
    where = "  - split: test\n    path: parts/a.parquet\n"
    readme = f"---\nconfigs:\n- config_name: default\n  data_files:\n{where}---"
    (tmp_path / "set" / "README.md").write_text(readme)
    assert task(tmp_path / "set").examples() == EXAMPLES


def test_rows_without_an_id_are_numbered_and_other_columns_are_ignored(tmp_path):
    rows = [{"document": row["document"], "summary": row["summary"]} for row in ROWS]
    examples = task(write(tmp_path / "a.jsonl", rows)).examples()
    assert [example.id for example in examples] == ["0", "1", "2"]
    rows = [{**row, "id": int(row["id"]), "source": "here"} for row in ROWS]
    assert task(write(tmp_path / "a.csv", rows)).examples() == EXAMPLES


def test_a_changed_file_is_read_anew(path):
    """A copy in a cache, known by size and time, would be scored instead of the file."""
    before = path.stat()
    task(path)
    write(path, [*ROWS[:2], {**ROWS[2], "document": "Turned\n"}])
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert path.stat().st_size == before.st_size
    assert task(path).examples()[2].text == "Turned"


def test_the_demo_articles_come_with_the_package():
    examples = task("embedded:articles").examples()
    assert len(examples) >= 20
    assert all(len(example.text) > len(example.reference) > 20 for example in examples)
    assert "must be embedded:articles" in error_of("embedded:xsum")


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("missing.jsonl", None, "No such file"),
        ("empty.jsonl", "", "must hold at least one article (got 0"),
        ("header.csv", "id,document,summary\n", "must hold at least one article (got 0"),
        ("broken.jsonl", '{"id": "1", "document": \n{{', "cannot load xsum.dataset"),
        ("broken.parquet", "no parquet", "cannot load xsum.dataset"),
        ("notes.txt", "notes", "must end in .jsonl, .csv, .parquet"),
        ("other.jsonl", '{"text": "a", "title": "b"}\n', "here text, title (got document"),
        ("null.csv", "id,document,summary\n7,,b\n", "text in the column document (got None in row"),
        ("list.jsonl", '{"document": ["a"], "summary": "b"}\n', "document (got ['a'] in row 0"),
        ("twice.csv", "id,document,summary\n7,a,b\n7,c,d\n", "(got 7 2 times in"),
    ],
)
def test_a_file_that_will_not_do_is_one_line(tmp_path, caplog, name, text, message):
    if text is not None:
        (tmp_path / name).write_text(text)
    found = error_of(tmp_path / name)
    assert message in found and name in found
    assert caplog.records == []  # `datasets` would print the same in its own words


def test_a_hub_set_may_name_its_columns_otherwise(tmp_path, monkeypatch):
    """SAMSum has dialogues, and CNN/DailyMail has highlights."""
    rows = [{"id": "1", "dialogue": "d", "summary": "s"}]
    write(tmp_path / "default" / "test" / "0000.parquet", rows)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: str(tmp_path))
    columns = XSumColumns(document="dialogue")
    settings = XSumConfig("knkarthick/samsum", "test", "chat", "{document}", 0, (), columns)
    assert XSum(settings).examples() == [Example("1", "d", reference="s")]
    assert "here id, dialogue, summary (got document)" in error_of("knkarthick/samsum")


def test_a_hub_id_is_read_from_the_converted_revision_and_one_split_only(tmp_path, monkeypatch):
    """The main branch of EdinburghNLP/xsum holds a script, which `datasets` no longer runs."""
    asked = {}

    def fetch(name, **options):
        asked.update(options, name=name)
        write(tmp_path / "default" / "test" / "0001.parquet", ROWS[2:])
        write(tmp_path / "default" / "test" / "0000.parquet", ROWS[:2])
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    assert task("EdinburghNLP/xsum").examples() == EXAMPLES
    assert asked == {
        "name": "EdinburghNLP/xsum",
        "repo_type": "dataset",
        "revision": "refs/convert/parquet",
        "allow_patterns": "default/test/*.parquet",
    }
    error = error_of("EdinburghNLP/xsum", split="tests")
    assert "xsum.split must be a split of EdinburghNLP/xsum" in error


def test_no_network_is_one_line(monkeypatch):
    def fail(*arguments, **options):
        raise LocalEntryNotFoundError("Got: ConnectError\nPlease check your internet connection.")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    message = error_of("EdinburghNLP/xsum")
    assert "cannot load xsum.dataset EdinburghNLP/xsum, split test (Got: ConnectError)" in message
    assert "local file" in message


def prompt_of(made: XSum, example: Example, max_tokens=1000) -> Prompt:
    return made.prompt(example, Letters(), max_tokens)


def text_of(made: XSum, example: Example) -> str:
    return Letters().decode(prompt_of(made, example).token_ids)


def test_the_document_stands_in_the_template_as_it_is(path):
    """str.format would fail on braces, in an article or in the template."""
    made = task(path, template='{"text": "{document}", "summary": "')
    whole = '{"text": "Braces {document} and {0}, a comma, a "quote".", "summary": "'
    assert text_of(made, EXAMPLES[1]) == whole
    assert text_of(task(path, style="chat"), EXAMPLES[2]) == "<Summarise: Third.>"


@pytest.mark.parametrize(("style", "frame"), [("completion", "{}"), ("chat", "<{}>")])
def test_shots_stand_solved_before_the_article(path, style, frame):
    made = task(path, style=style, template="Q: {document}\nA:", num_shots=2)
    assert made.examples() == EXAMPLES[:1]
    expected = (
        'Q: Braces {document} and {0}, a comma, a "quote".\nA: Two.\n\n'
        "Q: Third.\nA: Three.\n\n"
        "Q: First line.\nSecond, “quoted” line.\nA:"
    )
    assert text_of(made, EXAMPLES[0]) == frame.format(expected)


def test_a_template_that_ends_in_space_gets_no_other(path):
    made = task(path, template="Q: {document}\nA:\n", num_shots=1)
    assert "Q: Third.\nA:\nThree.\n\n" in text_of(made, EXAMPLES[0])


def test_an_article_is_never_its_own_shot(path):
    """Its summary would stand in its prompt."""
    made = task(path, num_shots=2)
    for example in made.examples():
        assert example.reference not in text_of(made, example)
    error = error_of(path, num_shots=3)  # nothing is left to evaluate
    assert "xsum.num_shots must be below the number of articles, here 3 (got 3)" in error


def test_a_document_that_fits_is_not_cut(path):
    made = task(path)
    whole = prompt_of(made, EXAMPLES[0])
    assert whole.num_cut_tokens == 0
    assert prompt_of(made, EXAMPLES[0], len(whole.token_ids)) == whole
    assert prompt_of(made, EXAMPLES[0], len(whole.token_ids) - 1).num_cut_tokens == 1
    with pytest.raises(PromptError, match="lower decoding.max_new_tokens"):
        task(path, template="{document}").prompt(EXAMPLES[0], Letters(), 0, 100)


@pytest.mark.parametrize(("style", "frame"), [("completion", "{}"), ("chat", "<{}>")])
def test_a_long_document_loses_its_end_and_never_the_instruction(path, style, frame):
    """Prompts cut from the left lose the instruction, from the right the cue for the answer."""
    made = task(path, style=style, template="Q: {document}\nA:", num_shots=1)
    long = Example("x", "0123456789" * 20, reference="r")
    around = frame.format("Q: Third.\nA: Three.\n\nQ: @\nA:")
    prompt = prompt_of(made, long, len(around) - 1 + 25)
    text = Letters().decode(prompt.token_ids)
    assert text == around.replace("@", "0123456789012345678901234")
    assert prompt.num_cut_tokens == 200 - 25


@pytest.mark.parametrize("style", ["completion", "chat"])
def test_cuts_fit_with_a_real_tokenizer(path, tokenizer, style):
    """A cut text has other tokens once it stands in its template, and may end inside a letter."""

    class Encoder(Letters):
        def encode(self, text):
            return tokenizer(text)["input_ids"]

        def encode_chat(self, message):
            return self.encode(f"user: {message}\nassistant: ")

        def decode(self, ids):
            return tokenizer.decode(ids)

    example = Example("x", "Zoë’s naïve 東京 café — returns a list of words. " * 20)
    made = task(path, style=style, template="Summarise:\n{document}\nSummary:")
    whole = len(Encoder().encode(example.text))
    for max_tokens in range(40, 90):
        prompt = made.prompt(example, Encoder(), max_tokens)
        assert max_tokens - 6 <= len(prompt.token_ids) <= max_tokens
        text = tokenizer.decode(prompt.token_ids)
        document = text.split("Summarise:\n")[1].split("\nSummary:")[0]
        assert document and example.text.startswith(document)
        assert whole - max_tokens < prompt.num_cut_tokens < whole


@pytest.mark.parametrize(
    ("max_tokens", "max_new_tokens", "num_shots", "why"),
    [
        (11, 100, 0, "max_new_tokens 100 leaves 11 tokens .* of 111, and .* alone takes 11; lower"),
        (5, 100, 0, "decoding.max_new_tokens 100 leaves 5 tokens .* of 105"),
        (5, 100, 1, "decoding.max_new_tokens 100 leaves 5 tokens"),
        (-3, 100, 0, "decoding.max_new_tokens 100 leaves 0 tokens .* of 97"),
        (10, 1, 0, "instruction alone takes 11 tokens .* of 11; shorten xsum.prompt_template"),
        (11, 1, 1, "instruction alone takes 11 tokens .* of 12; shorten"),
        (25, 9, 1, "xsum.num_shots 1 examples take 26 tokens, and the prompt may have 25"),
    ],
)
def test_a_document_that_is_cut_to_nothing_names_what_takes_its_room(
    path, max_tokens, max_new_tokens, num_shots, why
):
    """A longer context was the way out of whatever it was, and summaries of nothing were made."""
    made = task(path, num_shots=num_shots)
    with pytest.raises(PromptError, match=f"nothing is left of 11: .*{why}"):
        made.prompt(EXAMPLES[0], Letters(), max_tokens, max_new_tokens)


def test_the_summary_ends_at_a_stop_string_and_has_no_space_around_it(path):
    made = task(path, stops=("\n\n", "Article:"))
    assert made.stop_strings == ("\n\n", "Article:")
    summary = made.completion(EXAMPLES[0], " A bridge reopens.\nSoon. \n\nArticle: x")
    assert summary == "A bridge reopens.\nSoon."
    assert task(path).completion(EXAMPLES[0], "\nOne. \n") == "One."
