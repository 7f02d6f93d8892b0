"""Kills at random moments, in every form of a run: the result equals that of an undisturbed one.

`python -m pytest -m slow tests/test_kills.py` kills a hundred times; the default suite a few.
"""

from __future__ import annotations

import json
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import forked
import pytest
from conftest import write_config
from test_end_to_end_exp1 import ARTICLES
from test_folder import to_pickles
from test_ranks import chance_port, without_process

from specsampling.results.records import read_meta
from specsampling.results.scores import read_scores, scores_path

SAMPLED = ["--set", "sampling.temperature=1", "--set", "sampling.num_samples=2"]
AUTO = ["--set", "speculation.k=auto"]
BATCH = ["--set", "run.batch_size=3"]
SCORE = ["--score"]
# Each form has a script, its arguments, and a number of processes.
FORMS: dict[str, tuple[str, list[str], int]] = {
    "greedy": ("main_exp2.py", [], 1),
    "sampled": ("main_exp2.py", SAMPLED, 1),
    "k auto": ("main_exp2.py", AUTO, 1),
    "a batch": ("main_exp2.py", BATCH, 1),
    "articles": ("main_exp1.py", [], 1),
    "pickles converted": ("main_exp2.py", [], 1),
    "two ranks": ("main_exp2.py", SAMPLED, 2),
    "three ranks": ("main_exp2.py", SAMPLED, 3),
    "scoring": ("main_exp2.py", SCORE, 1),
    "compiled": ("main_exp2.py", ["--set", "decoding.compile=on"], 1),
}
DEFAULT = {"greedy": 2, "two ranks": 2}  # kills in the default suite
SLOW = dict.fromkeys(FORMS, 11) | {"compiled": 1}  # a hundred in all


@pytest.fixture(scope="module")
def arguments_of(tmp_path_factory, model_folders) -> Callable[[str], list[str]]:
    """What a form's command line begins with: a configuration over tiny models."""
    folder = tmp_path_factory.mktemp("configs")
    articles = folder / "articles.jsonl"
    articles.write_text("".join(json.dumps(article) + "\n" for article in ARTICLES))
    pickled = folder / "pickled"
    shutil.copytree(model_folders["llama-target"], pickled)
    to_pickles(pickled)

    def get(form: str) -> list[str]:
        blocks: dict = {
            "decoding": {"max_new_tokens": 12},
            "run": {"threads": 1},
            "speculation": {"k": 4},
        }
        profile, pair, folders = "demo", "llama", dict(model_folders)
        if form == "articles":
            profile, pair = "gpt-neo-rtx3050", "gpt_neo"
            blocks["xsum"] = {"dataset": str(articles), "num_shots": 1}
        else:
            blocks["humaneval"] = {"prompt_style": "completion", "stop_strings": ["\ndef"]}
        if form == "pickles converted":
            folders["llama-target"] = pickled
        place = folder / form.replace(" ", "-")
        place.mkdir(exist_ok=True)
        config = write_config(place, profile, pair, folders, blocks)
        return ["--config", str(config), "--limit", "4"]

    return get


def start(form: str, arguments: list[str], output: Path) -> list:
    """All processes of a run; each rank knows the others as torchrun would tell it."""
    script, options, num = FORMS[form]
    options = [*options, str(output)] if options is SCORE else [*options, "--output", str(output)]
    cache = {"SPECSAMPLING_CACHE": str(output.parent / "cache")}
    if num == 1:
        return [forked.start(script, *arguments, *options, **cache)]
    port = str(chance_port())
    return [
        forked.start(
            script,
            *arguments,
            *options,
            **cache,
            RANK=str(rank),
            LOCAL_RANK=str(rank),
            WORLD_SIZE=str(num),
            LOCAL_WORLD_SIZE=str(num),
            MASTER_ADDR="127.0.0.1",
            MASTER_PORT=port,
        )
        for rank in range(num)
    ]


def end(processes: list) -> None:
    """End the others as torchrun does: one that waits in torch's own code sees no SIGTERM."""
    for process in processes:
        process.send_signal(signal.SIGTERM)
    for process in processes:
        try:
            process.communicate(timeout=30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()


def finish(form: str, arguments: list[str], output: Path) -> None:
    processes = start(form, arguments, output)
    said = [process.communicate(timeout=300)[1] for process in processes]
    assert [process.returncode for process in processes] == [0] * len(processes), said


def result(form: str, output: Path) -> tuple:
    """What must be equal: rows but for clocks and places, the meta's facts, the scores."""
    meta = read_meta(output)
    facts = {name: meta[name] for name in ("config_hash", "files", "precision", "bit_exact")}
    rows = without_process(output)
    if form == "k auto":  # how many are drafted is found out by the clock
        rows = [{name: row[name] for name in ("example_id", "method", "token_ids")} for row in rows]
    return rows, facts, read_scores(output)


@pytest.mark.parametrize(
    ("form", "num_kills"),
    [
        *DEFAULT.items(),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in SLOW.items()),
    ],
)
def test_kills_lose_nothing_and_leave_nothing(form, num_kills, arguments_of, tmp_path):
    arguments = arguments_of(form)
    alone, output = tmp_path / "alone" / "r.jsonl", tmp_path / "killed" / "r.jsonl"
    for path in (alone, output):
        path.parent.mkdir()
        if FORMS[form][1] is SCORE:
            finish("greedy", arguments, path)
            scores_path(path).unlink()
    before = time.monotonic()
    finish(form, arguments, alone)
    seconds = time.monotonic() - before
    chance = random.Random(form)
    for _ in range(num_kills):
        processes = start(form, arguments, output)
        time.sleep(chance.uniform(0, seconds))
        chance.choice(processes).send_signal(signal.SIGKILL)
        end(processes)
    finish(form, arguments, output)
    assert result(form, output) == result(form, alone)
    names = [{path.name for path in folder.parent.rglob("*")} for folder in (alone, output)]
    assert names[0] == names[1]
