"""Every command of README.md, in a clone: it works as it stands, and leaves the clone clean.

Models are swapped for tiny ones, and long runs for a few texts. `GIVEN` says what each command
gets, so a new kind of command in the README needs a line there.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
import yaml
from conftest import PROJECT, write_config
from nbclient import NotebookClient

pytestmark = [
    pytest.mark.slow,  # each command is a process from nothing, with torch
    pytest.mark.skipif(not (PROJECT / ".git").exists(), reason="needs a git checkout to clone"),
]

README = (PROJECT / "README.md").read_text()
BLOCKS = re.findall(r"```bash\n(.*?)```", README, re.DOTALL)
WORDS = re.sub(r"```.*?```", "", README, flags=re.DOTALL).replace("\n", " ")
INLINE = re.findall(r"`((?:python|pip) [^`]+)`", WORDS)
COMMANDS = list(
    dict.fromkeys(
        command.strip()
        for text in [*"".join(BLOCKS).splitlines(), *INLINE]
        for command in text.split("&&")
    )
)
SNIPPET = re.search(r"```python\n(.*?)```", README, re.DOTALL)[1]
NOTEBOOKS = re.findall(r"`(Benchmarks/\w+\.ipynb)`", README)
CALL = re.search(r"`(speculative_generate\(.*?\))`", README)[1]

GIVEN = {  # the beginning of a command, and what it gets in addition
    "pip install -r requirements.txt": "--dry-run --no-index",
    "python -m pytest": "-n 0 tests/test_strict_yaml.py",
    "python main_exp2.py --score": "--config CONFIG",
    "python main_exp": "--config CONFIG --limit 2",
    "python speculative.py": "--config CONFIG",
    "python Benchmarks/plan.py": "--config CONFIG",
    "python Benchmarks/table1.py": "--config CONFIG",
    "python Benchmarks/figure1.py": "--config CONFIG --k 1",
    "python Benchmarks/report.py": "",
}
FETCHING = "pip install torch==", 'pip install ".[kernel]"'  # these need the network
PROFILES = "smollm2-cpu", "qwen-coder-cpu", "deepseek-t4"


@pytest.fixture(scope="module")
def clone(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("readme") / "clone"
    subprocess.run(["git", "clone", "--quiet", PROJECT, folder], check=True)
    heads = {git(each, "rev-parse", "HEAD") for each in (PROJECT, folder)}
    assert len(heads) == 1
    return folder


@pytest.fixture(scope="module")
def config(tmp_path_factory, model_folders) -> Path:
    """The README's profiles, each over the tiny pair."""
    folder = tmp_path_factory.mktemp("config")
    path = write_config(
        folder, "smollm2-cpu", "llama", model_folders, {"decoding": {"max_new_tokens": 8}}
    )
    values = yaml.safe_load(path.read_text())
    values["profiles"] = dict.fromkeys(PROFILES, values["profiles"]["smollm2-cpu"])
    path.write_text(yaml.safe_dump(values))
    return path


def git(folder: Path, *arguments: str) -> str:
    command = ["git", "-C", str(folder), *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def run(clone: Path, *command: object) -> str:
    """Run a command in the clone, which must work; return what it printed."""
    variables = {name: text for name, text in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, *map(str, command)],
        cwd=clone,
        env=variables | {"HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    return done.stdout


@pytest.mark.parametrize("command", [c for c in COMMANDS if not c.startswith(FETCHING)])
def test_a_command_works_in_a_clone(command, clone, config, model_folders, tmp_path):
    given = next(more for start, more in GIVEN.items() if command.startswith(start))
    completions = tmp_path / "completions.jsonl"
    completions.write_text(json.dumps({"task_id": "HumanEval/0", "completion": "    pass\n"}))
    swaps = [("CONFIG", config), ("FILE", completions)]
    swaps += [("NAME", model_folders[f"llama-{role}"]) for role in ("target", "draft")]
    text = f"{command} {given}"
    for name, path in swaps:
        text = re.sub(rf"\b{name}\b", str(path), text, count=1)
    program, *arguments = shlex.split(text)
    run(clone, *(["-m", "pip"] if program == "pip" else []), *arguments)


def test_the_code_works_in_a_clone(clone, model_folders):
    target, draft = (str(model_folders[f"llama-{role}"]) for role in ("target", "draft"))
    code = SNIPPET.replace("embedded:smollm2-135m-draft", draft)
    assert run(clone, "-c", code.replace("embedded:smollm2-135m", target)).strip()
    loads = f"""
from transformers import AutoModelForCausalLM as Auto, AutoTokenizer
from speculative_generate import speculative_generate
model, small = (Auto.from_pretrained(folder) for folder in ({target!r}, {draft!r}))
ids = AutoTokenizer.from_pretrained({target!r})("def f", return_tensors="pt").input_ids
print({CALL}.shape)"""
    assert "torch.Size" in run(clone, "-c", loads)


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_a_notebook_shows_the_run_that_was_made(name, clone, monkeypatch):
    monkeypatch.delenv("SPECSAMPLING_RESULTS", raising=False)
    notebook = nbformat.read(clone / name, as_version=4)
    resources = {"metadata": {"path": str((clone / name).parent)}}
    NotebookClient(notebook, timeout=120, resources=resources).execute()
    first = next(cell.outputs[0].text for cell in notebook.cells if cell.get("outputs"))
    assert first.startswith("The run: Results/") and "published" not in first.splitlines()[0]


def test_afterwards_the_clone_is_clean(clone):
    """A page that the README writes lay beside the code, and git named it."""
    assert (clone / "Results/results2.jsonl").exists()
    assert git(clone, "status", "--porcelain") == ""
