"""The kernel's builds: the same bits for every processor, formats, compilers that fail."""

from __future__ import annotations

import hashlib
import importlib.util
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from kernel_models import (
    CONFIGS,
    PLAIN_FORMATS,
    VARIANTS,
    always,
    compiled,
    environment,
    feed,
    make_model,
    pack,
    processor_flags,
    random_ids,
    random_widths,
    same_bits,
)

from specsampling.kernel import build, engine, weights
from specsampling.kernel.build import FLAGS, KernelError
from specsampling.kernel.checking import BLOCKS

HERE = Path(__file__).parent
SOURCES = [HERE / "kernel_check.c", Path(build.__file__).parent / "pack.c"]
NEON = ["-march=armv8.2-a+dotprod", "-static"]
DEFAULT = ("AVX2", "plain C")


@pytest.fixture(autouse=True)
def two_threads():
    engine.set_num_threads(2)
    yield
    engine.set_num_threads(0)


@pytest.fixture(scope="module")
def native_logits(library):
    """Logits of each format and each architecture, by this processor's own build."""
    return logits_of(library)


def logits_of(library) -> dict[tuple[str, str], torch.Tensor]:
    found = {}
    for name in ("llama-biases", "qwen3", "gpt_neo"):
        original = make_model(CONFIGS[name])
        for format in PLAIN_FORMATS:
            model = pack(original, library, format)
            ids = random_ids(model, 70)
            alone = feed(model, ids, always(1))
            for widths in (random_widths(np.random.default_rng(0)), always(70)):
                assert same_bits(feed(model, ids, widths), alone)
            found[name, format] = alone
    return found


def variants() -> list:
    here = processor_flags()
    made = []
    for name, (flags, needed) in VARIANTS.items():
        kind = name.partition(",")[0].removesuffix(" without AMX").encode()
        marks = [] if name in DEFAULT else [pytest.mark.slow]
        if not needed <= here:
            marks.append(pytest.mark.skip(f"this processor has no {', '.join(needed - here)}"))
        made.append(pytest.param(flags, kind, id=name, marks=marks))
    return made


@pytest.mark.parametrize("flags, kind", variants())
def test_every_processors_build_gives_the_same_bits(native_logits, tmp_path_factory, flags, kind):
    """Calls of more than 16 rows too, where AMX multiplies."""
    other = compiled(tmp_path_factory.mktemp("variant"), flags)
    assert other.kind() == kind
    for key, logits in logits_of(other).items():
        assert same_bits(logits, native_logits[key]), key


# --- the kernel without Python ---------------------------------------------------------------


def check(command: list[str], program: Path, runner: tuple[str, ...] = ()) -> str:
    """Compile kernel_check.c and run it: what it prints."""
    flags = [flag for flag in FLAGS if flag[:2] != "-O" or "-O1" not in command]
    run = [*command, *flags, f"-I{SOURCES[1].parent}", *map(str, SOURCES)]
    made = subprocess.run(
        [*run, "-o", str(program), "-lpthread", "-lm"], capture_output=True, text=True
    )
    assert made.returncode == 0, made.stderr
    ran = subprocess.run([*runner, str(program)], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    assert "ERROR" not in ran.stderr and "WARNING" not in ran.stderr, ran.stderr
    assert len(ran.stdout.splitlines()) == len(weights.FORMATS)
    print(ran.stderr)
    return ran.stdout


def test_other_bits_have_another_version(tmp_path):
    """A run that went on with another kernel had rows of two arithmetics, and "texts differ".

    If this fails, raise `build.ARITHMETIC` and write down the new digest. All processors agree.
    """
    printed = check([*build.find_compiler(), "-march=native"], tmp_path / "native")
    digest = hashlib.sha256(printed.encode()).hexdigest()[:16]
    assert {2: "f7a81f8a3ef4ce4a"}[build.ARITHMETIC] == digest


@pytest.mark.slow
def test_neon_gives_the_same_bits(tmp_path):
    """An emulated ARM processor with dot products, by a cross compiler of gcc or clang."""
    runner = shutil.which("qemu-aarch64")
    if not runner:
        pytest.skip("needs qemu-aarch64 (Debian's qemu-user)")
    compilers = []
    if shutil.which("aarch64-linux-gnu-gcc"):
        compilers.append(["aarch64-linux-gnu-gcc", *NEON])
    if importlib.util.find_spec("ziglang"):
        target = ["-target", "aarch64-linux-musl", "-mcpu=generic+dotprod"]
        compilers.append([sys.executable, "-m", "ziglang", "cc", *target])
    if not compilers:
        pytest.skip("needs aarch64-linux-gnu-gcc (Debian's gcc-aarch64-linux-gnu) or ziglang")
    expected = check([*build.find_compiler(), "-march=native"], tmp_path / "native")
    for i, compiler in enumerate(compilers):
        assert check(compiler, tmp_path / f"arm{i}", (runner,)) == expected


@pytest.mark.slow
@pytest.mark.parametrize("flags", ["-march=native", "-march=haswell"])
@pytest.mark.parametrize("sanitizer", ["address,undefined", "thread"])
def test_sanitizers_find_nothing(tmp_path, sanitizer, flags):
    if not shutil.which("gcc"):
        pytest.skip("needs gcc")
    if sanitizer == "thread" and flags != "-march=native":
        pytest.skip("threads are the same in all builds")
    command = ["gcc", *flags.split(), "-g", "-O1", f"-fsanitize={sanitizer}"]
    check([*command, "-fno-sanitize-recover=undefined"], tmp_path / "checked")


# --- formats ---------------------------------------------------------------------------------


def weights_of(library, packed: engine.Packed, num_outputs: int, num_inputs: int) -> np.ndarray:
    """A layer's weights, [outputs, inputs]: logits of a model without layers, whose tokens are
    one-hot inputs.

    The norm makes a one-hot row sqrt(inputs) of itself, which its weight takes back.
    """
    wide = engine.padded(num_inputs, 32)
    sizes = {
        **dict.fromkeys(("heads", "key_heads"), 1),
        **dict.fromkeys(("head_dim", "head_padded", "inner"), 32),
        **dict.fromkeys(("positions", "positions_format", "embedding_format", "cache_format"), 0),
        **{"hidden": num_inputs, "hidden_padded": wide},
        **{"vocabulary": max(num_inputs, num_outputs), "head_rows": num_outputs},
    }
    embedding = torch.zeros(sizes["vocabulary"], wide)
    embedding[:num_inputs, :num_inputs] = torch.eye(num_inputs)
    norm = torch.full((wide,), num_inputs**-0.5)
    tensors = {"embedding": embedding, "norm": norm}
    if sizes["vocabulary"] != num_outputs:
        tensors["head_tokens"] = torch.arange(num_outputs, dtype=torch.int32)
    model = engine.Model(library, [], packed, tensors, sizes, epsilon=0.0, score_scale=1.0)
    logits = torch.cat([feed(model, [i], always(1)) for i in range(num_inputs)])
    return logits[:, :num_outputs].T.numpy()


EXTREME = [0x0000, 0x8000, 0x0001, 0x8001, 0x03FF, 0x0400, 0x7BFF, 0xFBFF, 0x3C00, 0xB155]


@pytest.mark.parametrize("format", BLOCKS)
def test_weights_of_a_gguf_file_are_those_it_defines(library, format):
    """All bytes, and scales that are 0, subnormal, negative and the largest there are."""
    import gguf

    kind = gguf.GGMLQuantizationType[format]
    inputs, outputs = 256, 37
    numbers, num_bytes = BLOCKS[format]
    rng = np.random.default_rng(0)
    data = rng.integers(0, 256, (outputs, inputs // numbers, num_bytes)).astype(np.uint8)
    values = np.arange(outputs * inputs // numbers * (num_bytes - 4)).astype(np.uint8)
    if format == "Q8_0":
        data[..., 2 : 2 + num_bytes - 4] = values.reshape(*data.shape[:2], -1)
    scales = rng.choice(EXTREME, (*data.shape[:2], 2)).astype(np.uint16).view(np.uint8)
    if format == "Q6_K":
        data[..., 208:] = scales[..., :2]
    else:
        size = 4 if format in ("Q4_1", "Q4_K") else 2
        data[..., :size] = scales[..., :size]
    data = data.reshape(outputs, -1)
    expected = gguf.dequantize(data, kind)
    packed = weights.Packer(library, 2).blocks(data, format, inputs)
    found = weights_of(library, packed, outputs, inputs)
    # A minimum and a scale are rounded apart from each other, so what they cancel to is not exact.
    has_minimum = format in ("Q4_1", "Q4_K")
    atol = 1e-6 * float(np.abs(expected).max()) if has_minimum else 0.0
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=atol)


@pytest.mark.parametrize("format", BLOCKS)
def test_rows_of_a_gguf_files_blocks_never_meet(library, format):
    """Calls of more than 8 rows go through AMX where there is one: no test had those of Q6_K."""
    inputs, outputs, num_rows = 768, 37, 40
    numbers, num_bytes = BLOCKS[format]
    rng = np.random.default_rng(1)
    data = rng.integers(0, 256, (outputs, inputs // numbers, num_bytes)).astype(np.uint8)
    scales = rng.uniform(0.01, 0.02, (*data.shape[:2], 2)).astype(np.float16).view(np.uint8)
    if format == "Q6_K":
        data[..., 208:] = scales[..., :2]
    else:
        size = 4 if format in ("Q4_1", "Q4_K") else 2
        data[..., :size] = scales[..., :size]
    packed = weights.Packer(library, 2).blocks(data.reshape(outputs, -1), format, inputs)
    sizes = {
        **dict.fromkeys(("heads", "key_heads"), 1),
        **dict.fromkeys(("head_dim", "head_padded", "inner"), 32),
        **dict.fromkeys(("positions", "positions_format", "embedding_format", "cache_format"), 0),
        **{"hidden": inputs, "hidden_padded": inputs, "vocabulary": 40, "head_rows": outputs},
    }
    torch.manual_seed(0)
    tensors = {"embedding": torch.randn(40, inputs), "norm": torch.ones(inputs)}
    tensors["head_tokens"] = torch.arange(outputs, dtype=torch.int32)
    model = engine.Model(library, [], packed, tensors, sizes, epsilon=0.0, score_scale=1.0)
    alone = torch.cat([feed(model, [i], always(1)) for i in range(num_rows)])[:, :outputs]
    assert alone.isfinite().all()
    for width in (2, 7, 8, 9, 16, 17, 40):
        together = feed(model, list(range(num_rows)), always(width))[:, :outputs]
        assert torch.equal(together, alone), width


@pytest.mark.parametrize("format", BLOCKS)
def test_gguf_data_of_another_length_is_an_error(library, format):
    numbers, num_bytes = BLOCKS[format]
    packer = weights.Packer(library, 1)
    for width, inputs in (
        (num_bytes - 1, numbers),
        (num_bytes, 2 * numbers),
        (2 * num_bytes, numbers),
    ):
        with pytest.raises(ValueError, match="bytes a row"):
            packer.blocks(np.zeros((16, width), np.uint8), format, inputs)
    with pytest.raises(ValueError, match="multiple of"):
        packer.blocks(np.zeros((16, num_bytes), np.uint8), format, numbers - 1)
    with pytest.raises(ValueError, match="rows must be"):
        packer.blocks(np.zeros((16, num_bytes), np.uint8), format, numbers, rows=torch.tensor([16]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_plain_formats_round_as_they_say(library, dtype):
    torch.manual_seed(0)
    weight = torch.randn(37, 64).mul_(torch.logspace(-6, 3, 37)[:, None]).to(dtype)
    packer = weights.Packer(library, 2)
    float32 = weight.float()
    largest = float32.abs().amax(1, keepdim=True)
    expected = {
        "float32": float32,
        "float16": float32.half().float(),
        "bfloat16": float32.bfloat16().float(),
        "int8": (float32 * (127 / largest)).round() * (largest / 127),
    }
    for format, rounded in expected.items():
        found = torch.from_numpy(weights_of(library, packer.plain(weight, format), 37, 64).copy())
        torch.testing.assert_close(found, rounded, rtol=1e-6, atol=0, msg=format)


def test_4_bit_weights_have_the_best_of_19_scales(library):
    """The same rule in numpy, and at most the error of the file format's own rule."""
    import gguf

    rng = np.random.default_rng(0)
    weight = rng.standard_normal((32, 64)).astype(np.float32)
    found = weights_of(
        library, weights.Packer(library, 1).plain(torch.from_numpy(weight), "Q4_0"), 32, 64
    )
    groups = weight.reshape(32, 2, 32).astype(np.float64)
    largest = np.take_along_axis(groups, np.abs(groups).argmax(-1, keepdims=True), -1)
    best = np.full((32, 2, 1), np.inf)
    expected = np.zeros_like(groups)
    for step in range(-9, 10):
        whole = np.clip(np.rint(groups * -(8 + 0.1 * step) / largest), -8, 7)
        scale = (groups * whole).sum(-1, keepdims=True) / (whole * whole).sum(-1, keepdims=True)
        error = ((groups - scale * whole) ** 2).sum(-1, keepdims=True)
        rounded = scale.astype(np.float16).astype(np.float64) * whole
        expected = np.where(error < best, rounded, expected)
        best = np.minimum(error, best)
    np.testing.assert_allclose(found, expected.reshape(32, 64), rtol=1e-6)
    kind = gguf.GGMLQuantizationType.Q4_0
    usual = gguf.dequantize(gguf.quantize(weight, kind), kind)
    assert ((found - weight) ** 2).sum() < 0.95 * ((usual - weight) ** 2).sum()


@pytest.mark.parametrize("format", PLAIN_FORMATS)
def test_weights_next_to_nothing_are_packed(library, format):
    """Subnormal weights beside zeros became nan in 4 bit: 8 over the largest was infinite."""
    weight = torch.zeros(16, 64)
    weight[0, 3], weight[1, 40], weight[2, :] = 1e-45, -1e-39, 1e-37
    packed = weights.Packer(library, 1).plain(weight, format)
    found = weights_of(library, packed, 16, 64)
    assert np.isfinite(found).all() and np.abs(found).max() <= 1.01e-37


# --- making a build --------------------------------------------------------------------------


def test_no_compiler_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr(build.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(KernelError, match="no C compiler; install gcc") as raised:
        build.build(tmp_path)
    assert "\n" not in str(raised.value)


def test_a_compiler_that_is_not_there_is_one_line(tmp_path, monkeypatch):
    """It was passed over in silence, and another compiler made the build."""
    monkeypatch.setenv("CC", "no-such-compiler -O2")
    with pytest.raises(KernelError, match="CC must name a C compiler .got no-such-compiler."):
        build.build(tmp_path)


@pytest.mark.parametrize(
    "script, message",
    [
        ("echo some words >&2; echo an error: no memory >&2; exit 1", "an error: no memory"),
        ("exit 3", "exit code 3"),
        ("exit 0", "No such file"),
    ],
    ids=["says why", "says nothing", "makes nothing"],
)
def test_a_compiler_that_fails_is_one_line(tmp_path, monkeypatch, script, message):
    compiler = tmp_path / "failing-cc"
    compiler.write_text(f"#!/bin/sh\n{script}\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("CC", str(compiler))
    with pytest.raises(KernelError, match=message) as raised:
        build.build(tmp_path / "made")
    assert "\n" not in str(raised.value)
    assert not list((tmp_path / "made").iterdir())


def test_a_library_that_was_cut_off_is_made_anew(tmp_path):
    """An empty file could not be loaded, and a longer one ended the process."""
    with environment(SPECSAMPLING_KERNEL_FLAGS="-O0 -DPLAIN_C"):
        made = build.build(tmp_path)
        content = made.read_bytes()
        for size in (0, len(content) - 1):
            made.unlink()
            made.write_bytes(content[:size])
            (made,) = {build.build(tmp_path), build.build(tmp_path)}
            assert list(tmp_path.iterdir()) == [made]
            assert len(made.read_bytes()) == len(content)


def test_a_build_is_made_once(kernel_folder, library):
    (whole,) = kernel_folder.glob("step-*.so")
    before = whole.stat().st_mtime_ns
    assert build.build(kernel_folder) == whole
    assert whole.stat().st_mtime_ns == before
    with environment(PATH=str(kernel_folder), CC=""):  # a build that is there needs no compiler
        assert build.build(kernel_folder) == whole


def test_processes_may_build_at_the_same_time(tmp_path):
    script = "import sys; from pathlib import Path; from specsampling.kernel.build import build; "
    script += "print(build(Path(sys.argv[1])))"
    command = [sys.executable, "-c", script, str(tmp_path / "made")]
    with environment(SPECSAMPLING_KERNEL_FLAGS="-O0 -DPLAIN_C"), ThreadPoolExecutor(3) as threads:
        runs = list(
            threads.map(
                lambda _: subprocess.run(command, capture_output=True, text=True, cwd=HERE.parent),
                range(3),
            )
        )
    assert [run.returncode for run in runs] == [0] * 3, runs
    assert len(list((tmp_path / "made").iterdir())) == 1
    assert engine.ctypes.CDLL(runs[0].stdout.strip()).most_rows() == 128


@pytest.mark.slow
def test_zig_compiles_it(tmp_path, native_logits):
    """The compiler of the package ziglang, where there is no other one."""
    if not importlib.util.find_spec("ziglang"):
        pytest.skip("needs the package ziglang")
    with environment(CC=f"{sys.executable} -m ziglang cc -fno-sanitize=undefined"):
        other = engine.library(tmp_path)
    for key, logits in logits_of(other).items():
        assert same_bits(logits, native_logits[key]), key
