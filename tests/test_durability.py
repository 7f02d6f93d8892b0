"""Every file of a run and of the cache x every mishap: the result is equal, or one line says why.

In each case no byte of the user's is gone, and of the run's rows none that was finished. The four
causes are held one by one in the tests of their modules; here is the matrix.
"""

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


def killed(path: Path) -> None:
    """A process was killed while it wrote the file aside, or a row to its end."""
    whole = path.read_bytes()
    files.scratch_path(path).write_bytes(whole[: len(whole) // 2])
    if path.suffix == ".jsonl":
        with path.open("ab") as file:
            file.write(whole[:40])


def copied(path: Path) -> None:
    """What `sed -i`, an editor or git do: a new file of the same content in its place."""
    copy = path.with_name("copy")
    shutil.copy(path, copy)
    copy.replace(path)


def replaced(path: Path) -> bytes:
    (path.parent / "other").write_bytes(NOTES)
    (path.parent / "other").replace(path)
    return NOTES


def removed(path: Path) -> None:
    path.unlink()


def truncated(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def emptied(path: Path) -> None:
    os.truncate(path, 0)


def changed(path: Path) -> None:
    """One byte, a letter within a text; the file is still JSON."""
    data = path.read_bytes()
    at = next(data.index(text) for text in (b"HumanEval", b"Processor", b"weights") if text in data)
    path.write_bytes(data[:at] + b"X" + data[at + 1 :])


def added(path: Path) -> bytes:
    """Somebody's text behind what was there."""
    with path.open("ab") as file:
        file.write(NOTES)
    return NOTES


def linked(path: Path) -> None:
    """The file lies elsewhere, and a link leads there."""
    elsewhere = path.parent / "elsewhere"
    elsewhere.mkdir()
    path.replace(elsewhere / path.name)
    path.symlink_to(elsewhere / path.name)


def read_only(path: Path) -> None:
    path.chmod(0o444)


MISHAPS = [killed, copied, replaced, removed, truncated, emptied, changed, added, linked, read_only]

BEFORE, DURING = "before", "during"
# A mishap happens before the next start, or in the middle of a run. Then the result is equal (=),
# or one line says why it is not (!). A dash means that the mishap does not happen then. A damaged
# shard is reported. A shard whose meta does not name it stays, and its rows are made again. Nobody
# writes to a shard in the middle of the run that takes it in.
OUTCOMES = """
mishap     .jsonl .meta.json .scores.jsonl .rank0001.jsonl .rank0001.meta.json
killed     =-     =-         =-            =-              =-
copied     ==     ==         ==            =-              =-
replaced   !!     !!         !!            !-              =-
removed    =!     !=         ==            =-              =-
truncated  ==     !!         ==            =-              =-
emptied    ==     !=         ==            =-              =-
changed    !!     !!         ==            !-              =-
added      !!     !!         !!            !-              =-
linked     ==     ==         ==            =-              =-
read_only  !=     ==         ==            !-              =-
"""
_, *SUFFIXES = OUTCOMES.split("\n")[1].split()
CASES = [
    (suffix, mishap, when, {"=": EQUAL, "!": ONE_LINE}[sign])
    for mishap, line in zip(MISHAPS, OUTCOMES.split("\n")[2:])
    for suffix, signs in zip(SUFFIXES, line.split()[1:])
    for when, sign in zip((BEFORE, DURING), signs)
    if sign != "-"
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
        kept.append(mishap(path) or b"")

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


def a_finished_run(folder: Path, name: str) -> None:
    with RunFile.open(folder / name, META) as run:
        run.append(ROWS[0])


def another_runs_shard(folder: Path, name: str) -> None:
    """A copy under this run's name still says in its meta whose part it is."""
    other = folder / "other.jsonl"
    with RunFile.open(shards.shard_path(other, 1), shards.shard_meta(META, other, 1)) as shard:
        shard.append(ROWS[0])
    for suffix in (".rank0001.jsonl", ".rank0001.meta.json"):
        (folder / f"other{suffix}").rename(folder / f"r{suffix}")


def notes(folder: Path, name: str) -> None:
    (folder / name).write_bytes(NOTES)


@pytest.mark.parametrize(
    ("make", "name"),
    [
        *((notes, f"r.{part}") for part in ("rank0002.jsonl", "rank2.jsonl")),
        *((notes, f"r.{part}") for part in ("rank0001.meta.json", "rank1.scores.jsonl")),
        *((a_finished_run, f"r.{part}") for part in ("rank0001.jsonl", "rank1.jsonl")),
        (another_runs_shard, ""),
    ],
)
def test_files_with_the_name_of_a_shard_stay(make, name, folder):
    """Notes were merged and deleted, exit code 0."""
    make(folder, name)
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
        RunFile.open(output, META, fresh=fresh)
    with pytest.raises(RecordsError):
        check_output(output, None if fresh else META)
        RunFile.open(output, META, fresh=fresh)
    assert everything_in(folder) == before


WEIGHTS = {"weights": os.urandom(100_000), "head_tokens.safetensors": b"weights" * 1000}


def make(folder: Path) -> Path:
    """Stands for a conversion."""
    with made_once(folder) as made:
        if made is not None:
            made.mkdir()
            for name, data in WEIGHTS.items():
                (made / name).write_bytes(data)
    return folder


def zeros_behind(path: Path) -> None:
    """What a power cut left of a file that was not waited for: its length, and zeros."""
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2] + bytes(len(data) - len(data) // 2))


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
    assert user in (None, NOTES)


def change_a_byte(path: Path, keep_time: bool) -> None:
    before, data = path.stat(), bytearray(path.read_bytes())
    data[50_000] ^= 1
    path.write_bytes(data)
    if keep_time:
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


@pytest.mark.parametrize("how", ["by its time", "by --verify-cache", "after the next boot"])
def test_one_byte_of_the_cache_is_seen_at_the_next_look(how, folder, monkeypatch):
    model = make(folder / "model")
    change_a_byte(model / "weights", keep_time=how != "by its time")
    if how != "by its time":
        assert not cache.problem_of(model)
    monkeypatch.setenv(cache.CACHE_VARIABLE, str(folder))
    if how == "by --verify-cache":
        cache.forget_verified()
    elif how == "after the next boot":
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


OTHERS = {  # what is done to a model's folder, and whether the model is another one then
    "weights": (lambda model, draft: shutil.copy(draft / "model.safetensors", model), True),
    "one tensor": (lambda model, draft: one_tensor(model), True),
    "a line of the tokenizer": (lambda model, draft: append(model / "tokenizer.json", "\n"), True),
    "a readme": (lambda model, draft: append(model / "README.md", "notes"), False),
    "pickles beside": (lambda model, draft: append(model / "pytorch_model.bin", "x"), False),
}


def append(path: Path, text: str) -> None:
    with path.open("a") as file:
        file.write(text)


def one_tensor(model: Path) -> None:
    tensors = load_file(model / "model.safetensors")
    tensors["model.norm.weight"] += 1
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("what", OTHERS)
def test_other_files_of_a_model_have_another_digest(what, model_folders, tmp_path):
    """Rows of two models went into one file, and all tokens were the target's argmax."""
    model, (change, is_other) = tmp_path / "model", OTHERS[what]
    shutil.copytree(model_folders["llama-target"], model)
    before = digest_of(str(model))
    assert digest_of(str(model)) == before
    change(model, model_folders["llama-draft"])
    assert (digest_of(str(model)) != before) == is_other


@pytest.mark.parametrize("where", ["t0", "small", "t4"])
def test_a_large_file_is_known_by_each_of_its_tensors(where, tmp_path):
    """One tensor that differs is found, however small beside the others."""
    path = tmp_path / "a.safetensors"
    tensors = {f"t{number}": torch.zeros(5 << 18) for number in range(5)} | {"small": torch.ones(3)}
    save_file(tensors, path)
    before = sampled_sha256([path])
    tensors[where][0] += 1
    save_file(tensors, path)
    assert sampled_sha256([path]) != before


@pytest.mark.parametrize("suffix", [".gguf", ".bin"])
def test_a_large_file_of_another_kind_is_known_by_blocks(suffix, tmp_path):
    path = tmp_path / f"a{suffix}"
    path.write_bytes(bytes(40 << 20))
    before = sampled_sha256([path])
    path.write_bytes(bytes(30 << 20) + b"x" * (10 << 20))
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
