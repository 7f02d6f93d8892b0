"""Imports point one way, and a notebook opens at once."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PROJECT = Path(__file__).resolve().parent.parent
PACKAGE = PROJECT / "specsampling"
SCRIPTS = {"autoregressive", "speculative", "main_exp1", "main_exp2"}
MODULES = sorted(path for path in PACKAGE.rglob("*.py"))


def imported(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module or "")
    return names


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.stem)
def test_the_package_never_imports_the_scripts(path):
    assert not {name.split(".")[0] for name in imported(path)} & SCRIPTS


@pytest.mark.parametrize("module", ["config", "records", "metrics", "report", "sandbox"])
def test_light_modules_import_neither_torch_nor_transformers(module):
    code = (
        f"import sys, specsampling.{module}; "
        "print([m for m in ('torch', 'transformers') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=PROJECT, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("module", ["sampling", "verify"])
def test_tensor_modules_know_only_tensors(module):
    ours = {name for name in imported(PACKAGE / f"{module}.py") if name.startswith("specsampling")}
    others = {name.split(".")[0] for name in imported(PACKAGE / f"{module}.py")}
    assert ours <= {"specsampling.sampling"}
    assert "transformers" not in others


@pytest.mark.parametrize("script", ["autoregressive.py", "speculative.py"])
def test_decoders_know_no_text(script):
    text = (PROJECT / script).read_text().split('if __name__ == "__main__"')[0]
    assert "tokenizer" not in text.replace("# tokenizer", "")
    names = {name for name in imported(PROJECT / script) if name.startswith("specsampling")}
    names.discard("specsampling.console")  # only under __main__
    assert names <= {
        f"specsampling.{name}" for name in ("decoding", "drafts", "sampling", "session", "verify")
    }


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
