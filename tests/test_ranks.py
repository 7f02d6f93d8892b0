"""Several processes make one run: the same rows, none lost and none twice, whoever is killed."""

from __future__ import annotations

import dataclasses
import os
import re
import shutil
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import forked
import pytest
import torch
from test_end_to_end import METHODS, PROJECT, run
from test_end_to_end import config as config  # a fixture
from test_records import ROW
from test_results import META
from transformers import AutoTokenizer

from specsampling import edge, ranks
from specsampling.ranks import Ranks
from specsampling.results import shards
from specsampling.results.records import RecordsError, read_meta, read_rows
from specsampling.results.runfile import RunFile
from specsampling.runner import Job, all_jobs, share_of
from specsampling.tasks.task import Example, Prompt

OF_A_PROCESS = ("seconds", "rank", "device")  # fields that differ from process to process


def open_shard(output: Path, rank: int) -> RunFile:
    meta = shards.shard_meta(META, output, rank)
    return RunFile.open(shards.shard_path(output, rank), meta)


def launch(*arguments: object, num: int = 2) -> subprocess.Popen:
    """Start ranks, as `accelerate launch` does on GPUs."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    script = [str(PROJECT / "main_exp2.py"), *map(str, arguments)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [*torchrun, "--nproc-per-node", str(num), *script]
    return subprocess.Popen(command, cwd=PROJECT, env=environment, **pipes)


def rank_of(rank: int, script: str, *arguments: object, num: int, local: int, port: int):
    """Start a rank alone, as torchrun would start it; torchrun takes seconds itself."""
    given = {"WORLD_SIZE": num, "LOCAL_WORLD_SIZE": local, "OMP_NUM_THREADS": 1}
    given |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    given |= {"RANK": rank, "LOCAL_RANK": rank % local}
    return forked.start(script, *arguments, **{name: str(value) for name, value in given.items()})


def start_ranks(*arguments: object, script: str = "main_exp2.py", num: int = 2) -> list:
    """Ranks of one machine."""
    place = {"num": num, "local": num, "port": chance_port()}
    return [rank_of(rank, script, *arguments, **place) for rank in range(num)]


def finish_ranks(processes: list) -> tuple[int, str, str]:
    """The largest exit code, and all that the ranks have said."""
    said = [process.communicate(timeout=300) for process in processes]
    output, errors = ("".join(texts) for texts in zip(*said))
    return max(process.returncode for process in processes), output, errors


def without_process(path: Path) -> list[dict]:
    """The rows of a file in its order, without what depends on the process that made them."""
    return [
        {name: of for name, of in vars(row).items() if not any(map(name.count, OF_A_PROCESS))}
        for row in read_rows(path)
    ]


@pytest.fixture(scope="module")
def alone(config, tmp_path_factory) -> Path:
    """The file that one process writes, with two sampled texts for each problem."""
    output = tmp_path_factory.mktemp("alone") / "results2.jsonl"
    code, _, errors = run(*options(config, output))
    assert code == 0, errors
    return output


def options(config: Path, output: Path, *fields: str) -> list[object]:
    sampled = ("sampling.temperature=1", "sampling.num_samples=2", "run.threads=1")
    settings = [part for field in (*sampled, *fields) for part in ("--set", field)]
    return ["--config", config, "--limit", 5, "--output", output, *settings]


def test_two_processes_write_the_file_that_one_writes(config, alone, tmp_path):
    output = tmp_path / "results2.jsonl"
    code, printed, errors = finish_ranks([launch(*options(config, output))])
    assert code == 0, errors
    assert without_process(output) == without_process(alone)
    rows = read_rows(output)
    assert {row.rank for row in rows} == {0, 1} and all(row.device for row in rows)
    by_pair = {(row.example_id, row.sample_index, row.rank) for row in rows}
    assert len(by_pair) == 10  # all methods of a pair on the same rank
    assert errors.count("rows go to") == 1 and printed.count("speculative") >= 1
    assert "30/30" in errors  # the sum over ranks
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"results2.jsonl", "results2.meta.json", "results2.scores.jsonl"}
    assert read_meta(output).keys() == read_meta(alone).keys()
    assert read_rows(alone)[0].rank is None


def test_the_last_rank_to_arrive_sees_all_rows():
    """A bar ended at 28/30: rows that came just before the last arrival were not shown."""
    from torch.distributed import HashStore

    store, seen = HashStore(), []
    first, last = (Ranks.__new__(Ranks) for _ in range(2))
    for rank in (first, last):
        rank.count, rank._store, rank._num_meetings = 2, store, 0
    thread = threading.Thread(target=first.meet)
    thread.start()
    while not store.add("meeting 0", 0):
        time.sleep(0.01)
    last.count_rows(3)
    last.meet(lambda: seen.append(last.count_rows()))
    thread.join(10)
    assert seen[-1] == 3


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU changes what accelerate starts")
@pytest.mark.parametrize(
    ("launcher", "num"),
    [
        ("torch.distributed.run --nproc-per-node 2", 2),
        ("accelerate.commands.launch --num_processes 2", 1),
    ],
)
def test_on_a_processor_launchers_give_one_thread_and_hide_the_exit_code(launcher, num, tmp_path):
    """As docs/scale.md says of both."""
    script = tmp_path / "say.py"
    script.write_text("import os\nprint(os.environ['OMP_NUM_THREADS'])\nraise SystemExit(2)")
    command = [sys.executable, "-m", *launcher.split(), str(script)]
    given = not_launched()
    del given["OMP_NUM_THREADS"]
    done = subprocess.run(command, env=given, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1, done.stderr
    assert set(done.stdout.split()) == {"1"} and len(done.stdout.split()) <= num
    assert re.search(r"exitcode *: 2|exit status 2", done.stderr)


def test_machines_without_a_shared_disk(config, alone, tmp_path):
    """Two machines of one process each, which write into folders of their own."""
    outputs = [tmp_path / name / "results2.jsonl" for name in ("first", "second")]
    place = {"num": 2, "local": 1, "port": chance_port()}
    code, _, errors = finish_ranks(
        [
            rank_of(rank, "main_exp2.py", *options(config, output), **place)
            for rank, output in enumerate(outputs)
        ]
    )
    assert code == 0, errors
    assert without_process(outputs[0]) == without_process(alone)
    assert not list(outputs[1].parent.iterdir())


def chance_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


CHAT = """
import datetime, os, sys
sys.path.insert(0, {project!r})
from transformers.utils import chat_template_utils
from specsampling import provenance
from specsampling.models import tokenizer
from specsampling.console import exit_code

class Clock(datetime.datetime):  # a day for each rank
    @classmethod
    def now(cls, tz=None):
        return cls(2026, 4, 28 + int(os.environ["RANK"]), tzinfo=tz)

class module:
    datetime, timezone = Clock, datetime.timezone

provenance.datetime, chat_template_utils.datetime = module, Clock
{more}
import main_exp2
if __name__ == "__main__":
    raise SystemExit(exit_code(main_exp2.main))
"""
OTHERWISE = """
encode = tokenizer.encode_chat
def otherwise(tokenizer, message, now):
    return encode(tokenizer, message + "!" * int(os.environ["RANK"]), now)
from specsampling.models import load
load.encode_chat = otherwise
"""


@pytest.mark.parametrize("is_same", [True, False])
def test_ranks_of_two_days_have_the_same_prompts_or_refuse(
    model_folders, config, tmp_path, is_same
):
    """A rank whose clock or templates differ from rank 0's made rows of other prompts."""
    target = tmp_path / "target"
    shutil.copytree(model_folders["llama-target"], target)
    tokenizer = AutoTokenizer.from_pretrained(target)
    tokenizer.chat_template = "{{ strftime_now('%d %b') }}{{ messages[0]['content'] }}"
    tokenizer.save_pretrained(target)
    script = tmp_path / "main.py"
    script.write_text(CHAT.format(project=str(PROJECT), more="" if is_same else OTHERWISE))
    output = tmp_path / "results2.jsonl"
    chat = ["humaneval.prompt_style=chat", "humaneval.stop_strings=[]"]
    arguments = options(config, output, f"models.target={target}", *chat)
    code, _, errors = finish_ranks(start_ranks(*arguments, script=str(script)))
    assert (code == 0) is is_same, errors
    if not is_same:
        assert "error: rank 1 has another prompt or reference of HumanEval/0 than rank 0" in errors
        assert not output.read_bytes() and "Traceback" not in errors.partition("torch/")[0]
        return
    rows = read_rows(output)
    assert {row.rank for row in rows} == {0, 1}
    assert len({(row.example_id, row.prompt_hash) for row in rows}) == 5
    assert read_meta(output)["prompt_date"] == "2026-04-28T00:00:00"


@pytest.fixture
def output(tmp_path) -> Path:
    return tmp_path / "run.jsonl"


def test_shards_of_another_prompt_are_not_merged(output):
    """What another day's run had left went into the file, and was compared with its rows."""
    hashed = dataclasses.replace(ROW, prompt_hash="0123456789abcdef")
    with RunFile.open(output, META) as run_file:
        run_file.append(hashed)
    before = output.read_bytes()
    with open_shard(output, 1) as shard:
        shard.append(dataclasses.replace(hashed, method="reference", prompt_hash="f" * 16))
    with pytest.raises(RecordsError, match="one prompt of HumanEval/0 .*--fresh"):
        shards.take_in(output, None, fresh=False)
    assert output.read_bytes() == before
    assert shards.take_in(output, None, fresh=True) is False
    assert not shards.left_shards(output)


@pytest.mark.parametrize(
    ("mistake", "words"),
    [
        (("--set", "speculation.k=0"), "speculation.k must be"),
        (("--device", "cuda:1"), "models.device must be auto"),
    ],
)
def test_a_mistake_is_said_once(mistake, words, config, output):
    ranks = start_ranks("--config", config, *mistake, "--output", output)
    code, _, errors = finish_ranks(ranks)
    assert code != 0 and errors.count(words) == 1


class OneOf:
    """A rank that meets nobody."""

    def __init__(self, index: int, count: int):
        self.index, self.count, self.local_index = index, count, index


@pytest.mark.parametrize("count", [1, 2, 3, 7, 40])
def test_shares_are_disjoint_even_and_whole(count):
    prompts = [(Example(str(i), "", None, None), Prompt((1,))) for i in range(5)]
    jobs = all_jobs(prompts, METHODS, 3)
    shares = [share_of(jobs, OneOf(index, count)) for index in range(count)]
    assert sorted(job.key for share in shares for job in share) == sorted(job.key for job in jobs)
    pairs = [{(job.example.id, job.sample_index) for job in share} for share in shares]
    assert sum(map(len, pairs)) == 15
    assert max(map(len, pairs)) - min(map(len, pairs)) <= 1
    assert all(isinstance(job, Job) for job in jobs)


def test_what_a_stopped_run_left_is_taken_in(output):
    for index in (0, 2):
        with open_shard(output, index) as shard:
            shard.append(dataclasses.replace(ROW, sample_index=index))
    with shards.shard_path(output, 2).open("ab") as file:
        file.write(b'{"example_id": "torn')
    assert shards.take_in(output, None, fresh=False)
    assert [row.sample_index for row in read_rows(output)] == [0, 2]
    assert {path.name for path in output.parent.iterdir()} == {"run.jsonl", "run.meta.json"}
    assert not shards.take_in(output, None, fresh=False)


def test_what_another_process_still_writes_is_left_alone(output):
    with open_shard(output, 1) as shard:
        shard.append(ROW)
        with pytest.raises(RecordsError, match="being written by another process"):
            shards.take_in(output, None, fresh=True)
    assert shards.take_in(output, None, fresh=True) is False
    assert not list(output.parent.iterdir())


def test_rows_are_put_in_order(output):
    with RunFile.open(output, META) as run_file:
        for index in (3, 0, 2, 1):
            run_file.append(dataclasses.replace(ROW, sample_index=index))
        run_file.sort([(ROW.example_id, ROW.method, i) for i in (0, 1, 2)])
        run_file.append(dataclasses.replace(ROW, sample_index=9))
        with pytest.raises(RecordsError, match="another process"):
            RunFile.open(output, META)
    assert [row.sample_index for row in read_rows(output)] == [3, 0, 1, 2, 9]


@pytest.fixture
def launched(monkeypatch):
    """Finds out who launched a process of some environment, and which rank it is."""

    def found(given: dict[str, str]):
        for name in (*edge.LAUNCHED, *edge.LAUNCHED.values(), "SLURM_PTY_PORT"):
            monkeypatch.delenv(name, raising=False)
        for name, value in given.items():
            monkeypatch.setenv(name, value)
        return edge.launched_by(), edge.rank()

    return found


MEET = """
import sys
from specsampling.edge import exit_code, launched_by
from specsampling.ranks import Ranks
sys.exit(exit_code(lambda arguments: Ranks.of_launch(launched_by()).index))
"""
LOCAL = {"LOCAL_WORLD_SIZE": "2", "LOCAL_RANK": "0"}
HERE = {"MASTER_ADDR": "127.0.0.1"}
TAKEN = {**HERE, "MASTER_PORT": "taken"}
NO_ADDRESS = "`?MASTER_ADDR`?.*not set"
TORCH = "RANK", "WORLD_SIZE"
PMI = "PMI_RANK", "PMI_SIZE"
SLURM = "SLURM_PROCID", "SLURM_STEP_NUM_TASKS"
OPEN_MPI = "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"


@pytest.mark.parametrize(
    ("names", "number", "others", "why"),
    [
        (TORCH, 0, {}, NO_ADDRESS),
        (TORCH, 1, {}, NO_ADDRESS),
        (TORCH, 0, LOCAL, NO_ADDRESS),
        (TORCH, 0, {"MASTER_PORT": "29500"}, NO_ADDRESS),
        (TORCH, 0, TAKEN, "EADDRINUSE"),
        (TORCH, 0, TAKEN | LOCAL, "EADDRINUSE"),
        (TORCH, 0, {**HERE, "MASTER_PORT": "port"}, "'port'"),
        (TORCH, 0, {**HERE, "MASTER_PORT": "99999"}, "from 0 to 65535"),
        (TORCH, 5, HERE, "RANK must be below WORLD_SIZE, which is 2, and is 5"),
        (OPEN_MPI, 0, {}, NO_ADDRESS),
        (OPEN_MPI, 1, {"OMPI_COMM_WORLD_LOCAL_SIZE": "2"}, NO_ADDRESS),
        (OPEN_MPI, 0, TAKEN, "EADDRINUSE"),
        (PMI, 0, {}, NO_ADDRESS),
        (PMI, 0, TAKEN, "EADDRINUSE"),
        (PMI, 0, {"SLURM_PROCID": "0", "SLURM_NTASKS": "2"}, NO_ADDRESS),
        (("MV2_COMM_WORLD_RANK", "MV2_COMM_WORLD_SIZE"), 0, {}, NO_ADDRESS),
        (SLURM, 0, {}, NO_ADDRESS),
        (SLURM, 1, {"SLURM_LOCALID": "1"}, NO_ADDRESS),
        (SLURM, 0, TAKEN | {"SLURM_STEP_TASKS_PER_NODE": "2"}, "EADDRINUSE"),
    ],
)
def test_a_process_that_cannot_meet_the_others_says_so_in_one_line(
    names, number, others, why, tmp_path
):
    """A taken port, or variables without MASTER_ADDR, ended in a traceback and exit code 1."""
    script = tmp_path / "meet.py"
    script.write_text(MEET)
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        given = dict(zip(names, (str(number), "2"))) | others
        given = {name: port if value == "taken" else value for name, value in given.items()}
        process = forked.start(str(script), **given)
        errors = process.communicate(timeout=120)[1]
    assert process.returncode == 2, errors
    (line,) = errors.splitlines()
    assert re.search(why, line)
    index, size = names
    said = f"error: {index} and {size} say that this is one of several"
    assert line.startswith(f"rank {number}: {said}" if number else said)
    assert f"MASTER_PORT to rank 0's machine and a free port there, or unset {index} and" in line


def not_launched() -> dict[str, str]:
    """The environment of a process that nothing launched."""
    ours = ("RANK", "WORLD_SIZE", "LOCAL_", "MASTER_", "PMI_", "OMPI_", "MV2_", "SLURM_")
    quiet = {"OMP_NUM_THREADS": "1"}
    return {name: text for name, text in os.environ.items() if not name.startswith(ours)} | quiet


@pytest.mark.parametrize(
    "given",
    [
        {"SLURM_PROCID": "0", "SLURM_NTASKS": "4"},  # a batch script that reserved four
        {"SLURM_PROCID": "0", "SLURM_NTASKS": "4", "SLURM_STEP_NUM_TASKS": "1"},  # salloc's shell
        {"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "4", "SLURM_PTY_PORT": "9"},  # srun --pty
        {"SLURM_STEP_NUM_TASKS": "4"},
        {"RANK": "9" * 5000, "WORLD_SIZE": "9" * 5000},
        {"RANK": "abc", "WORLD_SIZE": "2"},
        {"RANK": "0", "WORLD_SIZE": "1"},
        {"RANK": "0", "WORLD_SIZE": "\N{SUPERSCRIPT TWO}"},
        {"RANK": "", "WORLD_SIZE": "2"},
        {"RANK": "-1", "WORLD_SIZE": "2"},
        *({}, {"RANK": "3"}, {"RANK": "3", "WORLD_SIZE": "1"}, {"WORLD_SIZE": "2"}),
        {"PMI_RANK": "0", "PMI_SIZE": "1"},
        {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"},
    ],
    ids=str,
)
def test_variables_that_count_no_others_leave_a_process_alone(given, launched):
    """WORLD_SIZE with a digit that is no number, a superscript say, was a traceback."""
    assert launched(given) == (None, 0)


def test_srun_with_several_tasks_is_a_launch(launched):
    """Each of the tasks took itself for the only process, and all wrote the same file."""
    assert launched({"RANK": "3", "WORLD_SIZE": "4"}) == (("RANK", "WORLD_SIZE"), 3)
    slurm = {"SLURM_PROCID": "4", "SLURM_STEP_NUM_TASKS": "7", "SLURM_NTASKS": "9"}
    slurm |= {"SLURM_LOCALID": "1", "SLURM_NODEID": "1", "SLURM_STEP_TASKS_PER_NODE": "3(x2),1"}
    assert launched(slurm) == (SLURM, 4)
    there = {"RANK": "4", "WORLD_SIZE": "7", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "3"}
    assert ranks._translated(slurm) == there


def test_a_bug_is_told_on_every_rank():
    """The traceback of all ranks but one went nowhere: they ended with exit code 1, no word."""
    code = "from specsampling.edge import exit_code; exit_code(lambda arguments: 1 / 0)"
    given = {"RANK": "1", "WORLD_SIZE": "2"}
    options = {"cwd": PROJECT, "env": not_launched() | given, "capture_output": True}
    done = subprocess.run([sys.executable, "-c", code], text=True, **options)
    assert done.returncode == 1 and "ZeroDivisionError" in done.stderr


def test_each_takes_a_gpu_of_its_own(monkeypatch):
    ranks = object.__new__(Ranks)
    ranks.local_index = 3
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    assert [ranks.device(name) for name in ("auto", "cuda", "cpu")] == ["cuda:3", "cuda:3", "cpu"]
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert ranks.device("auto") == "auto"
