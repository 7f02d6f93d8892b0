"""Every file of a run and of the cache x every mishap: the result is equal, or one line says why.

In each case no byte of the user's is gone, and of the run's rows none that was finished. The four
causes are held one by one in the tests of their modules; here is the matrix.
"""

from __future__ import annotations

import dataclasses
import io
import itertools
import json
import os
import shutil
import signal
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_records import ROW, SCORE
from test_results import META

from specsampling.disk import sampled_sha256
from specsampling.models import cache
from specsampling.models.cache import made_once
from specsampling.models.errors import ModelError
from specsampling.models.source import digest_of
from specsampling.results import files, shards
from specsampling.results.files import RecordsError
from specsampling.results.meta import machine_of
from specsampling.results.records import line_of, read_meta, read_rows
from specsampling.results.runfile import RunFile, check_output
from specsampling.results.scores import read_scores, write_scores

MADE = dataclasses.replace(ROW, device=machine_of(META))
ROWS = [dataclasses.replace(MADE, sample_index=number) for number in range(5)]
SCORES = [{**SCORE, "sample_index": row.sample_index} for row in ROWS]
NOTES = b"notes of somebody, which nobody else has\n"
EQUAL, ONE_LINE = "equal", "one line"


# --- mishaps: what befalls a file; the bytes that must be somewhere afterwards -----------


def killed(path: Path) -> bytes:
    """A process was killed while it wrote the file aside, or a row to its end."""
    whole = path.read_bytes()
    files.scratch_path(path).write_bytes(whole[: len(whole) // 2])
    if path.suffix == ".jsonl":
        with path.open("ab") as file:
            file.write(whole[:40])
    return b""


def copied(path: Path) -> bytes:
    """What `sed -i`, an editor or git do: a new file of the same content in its place."""
    copy = path.with_name("copy")
    shutil.copy(path, copy)
    copy.replace(path)
    return b""


def replaced(path: Path) -> bytes:
    (path.parent / "other").write_bytes(NOTES)
    (path.parent / "other").replace(path)
    return NOTES


def removed(path: Path) -> bytes:
    path.unlink()
    return b""


def truncated(path: Path) -> bytes:
    os.truncate(path, path.stat().st_size // 2)
    return b""


def emptied(path: Path) -> bytes:
    os.truncate(path, 0)
    return b""


def changed(path: Path) -> bytes:
    """One byte, a letter within a text; the file is still JSON."""
    data = path.read_bytes()
    at = next(data.index(text) for text in (b"HumanEval", b"Processor", b"weights") if text in data)
    path.write_bytes(data[:at] + b"X" + data[at + 1 :])
    return b""


def added(path: Path) -> bytes:
    """Somebody's text behind what was there."""
    with path.open("ab") as file:
        file.write(NOTES)
    return NOTES


def linked(path: Path) -> bytes:
    """The file lies elsewhere, and a link leads there."""
    elsewhere = path.parent / "elsewhere"
    elsewhere.mkdir()
    path.replace(elsewhere / path.name)
    path.symlink_to(elsewhere / path.name)
    return b""


def read_only(path: Path) -> bytes:
    path.chmod(0o444)
    return b""


MISHAPS = [
    *(killed, copied, replaced, removed, truncated),
    *(emptied, changed, added, linked, read_only),
]

# --- the files of a run ------------------------------------------------------------------

# What becomes of a mishap before the next start, and in the middle of a run.
BEFORE, DURING = "before", "during"
OUTCOMES: dict[str, dict[Callable, tuple[str, str]]] = {
    ".jsonl": {
        killed: (EQUAL, ""),
        copied: (EQUAL, EQUAL),
        replaced: (ONE_LINE, ONE_LINE),
        removed: (EQUAL, ONE_LINE),
        truncated: (EQUAL, EQUAL),
        emptied: (EQUAL, EQUAL),
        changed: (ONE_LINE, ONE_LINE),
        added: (ONE_LINE, ONE_LINE),
        linked: (EQUAL, EQUAL),
        read_only: (ONE_LINE, EQUAL),
    },
    ".meta.json": {
        killed: (EQUAL, ""),
        copied: (EQUAL, EQUAL),
        replaced: (ONE_LINE, ONE_LINE),
        removed: (ONE_LINE, EQUAL),
        truncated: (ONE_LINE, ONE_LINE),
        emptied: (ONE_LINE, EQUAL),
        changed: (ONE_LINE, ONE_LINE),
        added: (ONE_LINE, ONE_LINE),
        linked: (EQUAL, EQUAL),
        read_only: (EQUAL, EQUAL),
    },
    ".scores.jsonl": {
        killed: (EQUAL, ""),
        copied: (EQUAL, EQUAL),
        replaced: (ONE_LINE, ONE_LINE),
        removed: (EQUAL, EQUAL),
        truncated: (EQUAL, EQUAL),
        emptied: (EQUAL, EQUAL),
        changed: (EQUAL, EQUAL),
        added: (ONE_LINE, ONE_LINE),
        linked: (EQUAL, EQUAL),
        read_only: (EQUAL, EQUAL),
    },
    # A damaged shard is told. A shard whose meta does not name it is left alone, and its rows are
    # made again. Nobody writes to a shard in the middle of the run that takes it in.
    ".rank0001.jsonl": {
        mishap: (ONE_LINE if mishap in (replaced, changed, added, read_only) else EQUAL, "")
        for mishap in MISHAPS
    },
    ".rank0001.meta.json": dict.fromkeys(MISHAPS, (EQUAL, "")),
}
CASES = [
    (suffix, mishap, when, outcome)
    for suffix, by_mishap in OUTCOMES.items()
    for mishap, outcomes in by_mishap.items()
    for when, outcome in zip((BEFORE, DURING), outcomes)
    if outcome
]


@pytest.fixture
def folder() -> Iterator[Path]:
    """A folder that every user may write to; pytest's own are closed to others."""
    path = Path(tempfile.mkdtemp(prefix="durability-"))
    path.chmod(0o777)
    yield path
    shutil.rmtree(path)


def begin(output: Path) -> None:
    """An earlier process: two rows, scored, and a third in the shard of a rank that was killed."""
    with RunFile.open(output, META) as run:
        run.append(ROWS[0])
        run.append(ROWS[1])
    write_scores(output, SCORES[:2])
    with RunFile.open(shards.shard_path(output, 1), shards.shard_meta(META, output, 1)) as shard:
        shard.append(ROWS[2])
    for path in output.parent.iterdir():
        path.chmod(0o666)


def go_on(output: Path, meanwhile: Callable[[], object] = lambda: None) -> None:
    """The next process: all that is missing, and the scores."""
    check_output(output)
    shards.take_in(output, None, fresh=False)
    check_output(output, META)
    with RunFile.open(output, META) as run:
        for row in ROWS:
            if row.key not in run.done:
                run.append(row)
                if row is ROWS[3]:
                    meanwhile()
        run.note(peak_memory="1 GB")
        run.sort([row.key for row in ROWS])
    write_scores(output, SCORES)


def outcome_of(output: Path, act: Callable[[], object]) -> str:
    """What became of a run, once its rows were found whole."""
    try:
        act()
    except RecordsError as error:
        assert "\n" not in str(error) and str(output.parent) in str(error)
        return ONE_LINE
    assert read_rows(output) == ROWS
    assert read_meta(output)["config"] == META["config"]
    assert read_scores(output) == SCORES
    assert not list(output.parent.glob(f"*{files.UNFINISHED}"))
    return EQUAL


def as_nobody(act: Callable[[], str]) -> str:
    """Do something as a user for whom a file's rights count; for root they do not."""
    if os.geteuid():
        return act()
    reader, writer = os.pipe()
    if not (child := os.fork()):
        try:
            os.setgid(65534)
            os.setuid(65534)
            said = act()
        except BaseException as error:
            said = f"{type(error).__name__}: {error}"
        os.write(writer, said.encode())
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as file:
        said = file.read()
    os.waitpid(child, 0)
    return said


def everything_in(folder: Path) -> bytes:
    return b"".join(path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file())


@pytest.mark.parametrize(
    ("suffix", "mishap", "when", "expected"),
    CASES,
    ids=lambda value: getattr(value, "__name__", value),
)
def test_a_runs_file_meets_a_mishap(suffix, mishap, when, expected, folder):
    output = folder / "r.jsonl"
    path = output.with_suffix(suffix)
    begin(output)
    kept: list[bytes] = []

    def happen() -> None:
        kept.append(mishap(path))

    if when == BEFORE:
        happen()
    act = as_nobody if mishap is read_only and when == BEFORE else lambda act: act()
    meanwhile = happen if when == DURING else lambda: None
    assert act(lambda: outcome_of(output, lambda: go_on(output, meanwhile))) == expected
    left = everything_in(folder)
    assert all(user in left for user in kept)
    if mishap is linked and suffix != ".rank0001.jsonl" and suffix != ".rank0001.meta.json":
        assert path.is_symlink() and path.resolve().parent == (folder / "elsewhere").resolve()
    if when == DURING and expected == ONE_LINE and suffix == ".jsonl":
        assert all(line_of(row) in left for row in ROWS[:4])


@pytest.mark.parametrize("suffix", [".jsonl", ".meta.json", ".scores.jsonl"])
@pytest.mark.parametrize("nth", range(1, 4))
def test_a_full_disk_is_one_line_and_the_next_start_goes_on(suffix, nth, folder, monkeypatch):
    """The n-th time that the file is written there is room for half of it."""
    output = folder / "r.jsonl"
    path, was_full = output.with_suffix(suffix), []
    write_all = files.write_all
    number = itertools.count(1)
    begin(output)

    def full(file: io.FileIO, data: bytes) -> None:
        if Path(file.name) in (path, files.scratch_path(path)) and next(number) == nth:
            was_full.append(nth)
            write_all(file, data[: len(data) // 2])
            raise OSError(28, "No space left on device")
        write_all(file, data)

    with monkeypatch.context() as patch:
        patch.setattr(files, "write_all", full)
        assert outcome_of(output, lambda: go_on(output)) == (ONE_LINE if was_full else EQUAL)
    assert was_full or nth > 1
    assert outcome_of(output, lambda: go_on(output)) == EQUAL


# --- names that a run gives, and files of the user's that have them ----------------------


@pytest.mark.parametrize(
    "name", ["r.rank0002.jsonl", "r.rank2.jsonl", "r.rank0001.meta.json", "r.rank1.scores.jsonl"]
)
def test_notes_with_the_name_of_a_shard_stay(name, folder):
    """They were merged and deleted, exit code 0."""
    output = folder / "r.jsonl"
    (folder / name).write_bytes(NOTES)
    with RunFile.open(output, META) as run:
        run.append(ROWS[0])
    shards.take_in(output, None, fresh=False)
    shards.take_in(output, None, fresh=True)
    assert (folder / name).read_bytes() == NOTES


@pytest.mark.parametrize("name", ["r.rank0001.jsonl", "r.rank1.jsonl"])
def test_a_finished_run_with_the_name_of_a_shard_stays(name, folder):
    with RunFile.open(folder / name, META) as run:
        run.append(ROWS[0])
    before = everything_in(folder)
    for fresh in (False, True):
        assert not shards.take_in(folder / "r.jsonl", None, fresh)
    assert everything_in(folder) == before


def test_the_shard_of_another_run_stays(folder):
    """A copy under this run's name still says in its meta whose part it is."""
    other = folder / "other.jsonl"
    with RunFile.open(shards.shard_path(other, 1), shards.shard_meta(META, other, 1)) as shard:
        shard.append(ROWS[0])
    for suffix in (".rank0001.jsonl", ".rank0001.meta.json"):
        (folder / f"other{suffix}").rename(folder / f"r{suffix}")
    before = everything_in(folder)
    for fresh in (False, True):
        assert not shards.take_in(folder / "r.jsonl", None, fresh)
    assert everything_in(folder) == before


@pytest.mark.parametrize(
    "name", ["r.scores.jsonl", "r.rank1.jsonl", "r.rank0001.jsonl", "R.Scores.jsonl"]
)
def test_an_output_with_the_name_of_a_companion_is_refused(name, folder):
    with pytest.raises(RecordsError, match="must not end in"):
        shards.require_own_name(folder / name)
    shards.require_own_name(folder / name[2:])  # scores.jsonl and rank1.jsonl are names like others


@pytest.mark.parametrize("name", ["r.meta.json", "r.scores.jsonl", "r.jsonl"])
@pytest.mark.parametrize("fresh", [False, True])
def test_a_file_of_the_users_where_a_runs_goes_is_refused(name, fresh, folder):
    """Beside a meta, `--fresh` deleted completions of somebody else."""
    output = folder / "r.jsonl"
    if name == "r.jsonl":
        begin(output)
    (folder / name).write_bytes(NOTES)
    before = everything_in(folder)
    with pytest.raises(RecordsError):
        check_output(output, None if fresh else META)
        RunFile.open(output, META, fresh=fresh)
    with pytest.raises(RecordsError):
        RunFile.open(output, META, fresh=fresh)
    assert everything_in(folder) == before


# --- the cache ---------------------------------------------------------------------------

WEIGHTS = {"weights": os.urandom(100_000), "head_tokens.safetensors": b"weights" * 1000}


def make(folder: Path) -> Path:
    """Stands for a conversion."""
    with made_once(folder) as made:
        if made is not None:
            made.mkdir()
            for name, data in WEIGHTS.items():
                (made / name).write_bytes(data)
    return folder


def zeros_behind(path: Path) -> bytes:
    """What a power cut left of a file that was not waited for: its length, and zeros."""
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2] + bytes(len(data) - len(data) // 2))
    return b""


CACHE = [killed, copied, replaced, removed, truncated, emptied, added, linked, zeros_behind]


@pytest.mark.parametrize("name", [*WEIGHTS, cache.MANIFEST, cache.VERIFIED])
@pytest.mark.parametrize("mishap", CACHE, ids=lambda mishap: mishap.__name__)
def test_a_file_of_the_cache_meets_a_mishap(name, mishap, folder, capsys):
    """Zeros from 3 MB on, or one byte changed, were loaded: exit code 0, "confirmed"."""
    model = make(folder / "model")
    capsys.readouterr()
    user = mishap(model / name)
    make(model)
    errors = capsys.readouterr().err
    for kept, data in WEIGHTS.items():
        assert (model / kept).read_bytes() == data
    is_damage = name in WEIGHTS and mishap not in (killed, copied, linked)
    is_damage |= name == cache.MANIFEST and mishap not in (killed, copied, linked)
    assert (f"{model} is damaged (" in errors) == is_damage
    assert not cache.problem_of(model)
    assert user in (b"", NOTES)


def test_one_byte_of_the_cache_is_seen_at_the_next_look(folder, monkeypatch, capsys):
    """By its time at once; with its time put back, after the next boot or by --verify-cache."""
    model = make(folder / "model")
    weights = model / "weights"
    before = weights.stat()

    def change(keep_time: bool) -> None:
        data = bytearray(weights.read_bytes())
        data[50_000] ^= 1
        weights.write_bytes(data)
        if keep_time:
            os.utime(weights, ns=(before.st_atime_ns, before.st_mtime_ns))

    change(keep_time=False)
    assert "weights has another hash" in cache.problem_of(model)
    make(model)
    before = weights.stat()
    change(keep_time=True)
    assert not cache.problem_of(model)
    monkeypatch.setenv(cache.CACHE_VARIABLE, str(folder))
    cache.forget_verified()
    assert "weights has another hash" in cache.problem_of(model)
    make(model)
    before = weights.stat()
    change(keep_time=True)
    boot = cache.psutil.boot_time()
    monkeypatch.setattr(cache.psutil, "boot_time", lambda: boot + 1000)
    assert "weights has another hash" in cache.problem_of(model)


def test_a_folder_that_is_made_of_another_has_a_manifest_of_its_own(folder):
    """The draft's folder begins as a copy of its target's: it was damaged from the start."""
    model = make(folder / "model")
    with made_once(folder / "draft") as made:
        shutil.copytree(model, made)
        (made / "weights").write_bytes(b"others")
    manifest = json.loads((folder / "draft" / cache.MANIFEST).read_text())
    assert manifest.keys() == WEIGHTS.keys() and manifest["weights"][0] == 6
    assert not cache.problem_of(folder / "draft")


def test_a_file_of_the_users_in_a_damaged_folder_stays(folder):
    model = make(folder / "model")
    (model / "notes").write_bytes(NOTES)
    truncated(model / "weights")
    make(model)
    assert (model / "notes").read_bytes() == NOTES


def test_a_cache_that_others_keep_is_used(folder, capsys):
    model = make(folder / "model")
    for path in (*model.iterdir(), model, folder):
        path.chmod(0o555 if path.is_dir() else 0o444)
    assert as_nobody(lambda: cache.problem_of(model) or EQUAL) == EQUAL
    (model / cache.VERIFIED).unlink()
    assert as_nobody(lambda: cache.problem_of(model) or EQUAL) == EQUAL
    assert not (model / cache.VERIFIED).exists()
    folder.chmod(0o777)


def test_what_a_killed_conversion_left_is_cleared(folder):
    """257 MB stayed for good, for each kill."""
    if not (child := os.fork()):
        with made_once(folder / "model") as made:
            made.mkdir()
            (made / "weights").write_bytes(WEIGHTS["weights"])
            os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(child, 0)
    assert list(folder.glob(f"*{cache.SCRATCH}"))
    make(folder / "model")
    assert {path.name for path in folder.iterdir()} == {"model", "model.lock"}


def test_a_full_disk_while_the_cache_is_made_is_one_line(folder, monkeypatch):
    def full(path: Path) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(cache, "sha256_of", full)
        with pytest.raises(ModelError, match="No space left on device"):
            make(folder / "model")
    assert {path.name for path in folder.iterdir()} == {"model.lock"}
    make(folder / "model")


# --- other files under the same names ----------------------------------------------------


def other_weights(model: Path, model_folders: dict[str, Path]) -> None:
    shutil.copy(model_folders["llama-draft"] / "model.safetensors", model)


def one_tensor(model: Path, _: dict[str, Path]) -> None:
    tensors = load_file(model / "model.safetensors")
    tensors["model.norm.weight"] += 1
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})


def another_tokenizer(model: Path, _: dict[str, Path]) -> None:
    path = model / "tokenizer.json"
    path.write_text(path.read_text().replace("ByteLevel", "ByteLevel", 1) + "\n")


def a_readme(model: Path, _: dict[str, Path]) -> None:
    (model / "README.md").write_bytes(NOTES)


def other_pickles(model: Path, _: dict[str, Path]) -> None:
    """Nobody reads them where safetensors are."""
    (model / "pytorch_model.bin").write_bytes(NOTES)


@pytest.mark.parametrize(
    ("change", "is_other"),
    [
        (other_weights, True),
        (one_tensor, True),
        (another_tokenizer, True),
        (a_readme, False),
        (other_pickles, False),
    ],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_other_files_of_a_model_have_another_digest(change, is_other, model_folders, tmp_path):
    """Rows of two models went into one file, and all tokens were the target's argmax."""
    model = tmp_path / "model"
    shutil.copytree(model_folders["llama-target"], model)
    before = digest_of(str(model))
    assert digest_of(str(model)) == before
    change(model, model_folders)
    assert (digest_of(str(model)) != before) == is_other


@pytest.mark.parametrize("where", ["first", "middle", "last"])
def test_a_large_file_is_known_by_each_of_its_tensors(where, tmp_path):
    """One tensor that differs is found, however small beside the others."""
    tensors = {f"t{number}": torch.zeros(5 << 18) for number in range(5)} | {"small": torch.ones(3)}
    save_file(tensors, tmp_path / "a.safetensors")
    before = sampled_sha256([tmp_path / "a.safetensors"])
    tensors[{"first": "t0", "middle": "small", "last": "t4"}[where]][0] += 1
    save_file(tensors, tmp_path / "a.safetensors")
    assert sampled_sha256([tmp_path / "a.safetensors"]) != before


@pytest.mark.parametrize("suffix", [".gguf", ".bin"])
def test_a_large_file_of_another_kind_is_known_by_blocks(suffix, tmp_path):
    path = tmp_path / f"a{suffix}"
    path.write_bytes(bytes(40 << 20))
    before = sampled_sha256([path])
    with path.open("r+b") as file:
        file.seek(30 << 20)
        file.write(b"x" * (10 << 20))
    assert sampled_sha256([path]) != before


def test_a_resume_with_other_files_is_refused_by_name(folder):
    output = folder / "r.jsonl"
    meta = {**META, "files": {"models.target": "a", "data": "b"}}
    with RunFile.open(output, meta) as run:
        run.append(ROWS[0])
    before = everything_in(folder)
    other = {**meta, "files": {"models.target": "a", "data": "c"}}
    with pytest.raises(RecordsError, match="those of data have changed since; put them back, or"):
        RunFile.open(output, other)
    assert everything_in(folder) == before
    more = {**meta, "files": {**meta["files"], "draft ngram+x": "d"}}
    for same in (META, more):  # an older version's, and one with a method more
        RunFile.open(output, same).close()
