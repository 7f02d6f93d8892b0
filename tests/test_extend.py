"""docs/extend.md: the draft and the task that it shows work as they stand there."""

import json
import re
import sys

import numpy as np
import pytest
from test_end_to_end import OURS
from test_end_to_end import config as config  # a fixture

import main_exp2
from specsampling.config import PROJECT
from specsampling.console import exit_code
from specsampling.draft_name import LOOKUPS
from specsampling.results.records import read_rows, read_run

BLOCKS = re.findall(r"```python\n(.*?)```", (PROJECT / "docs/extend.md").read_text(), re.DOTALL)
DRAFT, LINE, TASK = BLOCKS


@pytest.fixture
def extended(tmp_path, monkeypatch):
    """The files of the page beside each other, and its line in the registry."""
    assert len([line for line in DRAFT.splitlines() if line.strip()]) <= 60
    (tmp_path / "suffix_of_docs.py").write_text(DRAFT)
    (tmp_path / "questions_of_docs.py").write_text(TASK)
    monkeypatch.syspath_prepend(str(tmp_path))
    name, where = re.fullmatch(r'\s*"(\w+)": "(.+)",\s*', LINE).groups()
    assert where == "specsampling.method.suffix:SuffixDraft"
    monkeypatch.setitem(LOOKUPS, name, "suffix_of_docs:SuffixDraft")
    yield tmp_path
    for module in ("suffix_of_docs", "questions_of_docs"):
        sys.modules.pop(module, None)


def test_the_draft_decodes_alone_and_before_a_model(extended, config, model_folders, tmp_path):
    model = model_folders["llama-draft"]
    drafts = ("suffix", "suffix@auto", f"suffix+{model}", f"suffix+{model}@auto")
    methods = ",".join(["autoregressive", *(f"speculative:{draft}" for draft in drafts)])
    path = tmp_path / "rows.jsonl"
    arguments = ["--config", config, "--limit", 3, "--methods", methods, "--output", path, *OURS]
    assert exit_code(main_exp2.main, list(map(str, arguments))) == 0
    texts = {}
    for row in read_rows(path):
        texts.setdefault(row.example_id, set()).add(tuple(row.token_ids))
    assert len(texts) == 3 and all(len(of) == 1 for of in texts.values())
    assert sum(sum(row.accepted) for row in read_rows(path) if row.method.endswith("suffix")) > 0


def by_search(tokens: list[int], longest: int, shortest: int) -> int:
    """The length of the longest end that was there before, with a token behind it."""
    for n in range(min(longest, len(tokens) - 1), shortest - 1, -1):
        end = tokens[-n:]
        if any(tokens[i : i + n] == end for i in range(len(tokens) - n)):
            return n
    return 0


def test_the_automaton_finds_the_longest_end(extended):
    from suffix_of_docs import SuffixProposer

    random = np.random.default_rng(0)
    for _ in range(200):
        proposer = SuffixProposer(6, 2)
        tokens: list[int] = []
        for token in random.integers(0, 3, 40).tolist():
            tokens.append(token)
            proposer.prefill(tokens)
            matched, follower = proposer.find(tokens)
            assert matched == by_search(tokens, 6, 2)
            if matched:
                assert tokens[follower - matched : follower] == tokens[-matched:]
                assert follower < len(tokens)


def test_the_task_runs_and_is_scored(extended, config, tmp_path, monkeypatch, capsys):
    questions = tmp_path / "questions.jsonl"
    lines = [{"question": f"What is {i} + {i}?", "answer": f"#### {2 * i}"} for i in range(10)]
    questions.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    monkeypatch.setenv("QUESTIONS", str(questions))
    import questions_of_docs

    path = tmp_path / "rows.jsonl"
    arguments = ["--config", config, "--limit", 10, "--output", path, "--methods"]
    arguments += ["autoregressive,speculative:ngram"]
    assert exit_code(questions_of_docs.main, list(map(str, arguments))) == 0
    run = read_run(path)
    assert len(run.rows) == 20 and len(run.scores) == 20
    assert "pass@1" in capsys.readouterr().out
    assert questions_of_docs.last_number("so 1,204 is it.") == "1204"
