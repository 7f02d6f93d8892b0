"""Make a small draft model for the embedded target by distillation.

    python training/distill.py [data] [train] [export] [evaluate]

`data` lets the target answer prompts and read texts, and keeps its hidden state at each token.
`train` fits a few layers to these states. `export` writes the file that ships with the package.
`evaluate` counts how often the draft's most probable token is the target's. A stopped stage goes on
where it was, to the same result. The settings are in training/distill.yaml.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).resolve().parent
PROJECT = FOLDER.parent
sys.path[:0] = [str(PROJECT), str(FOLDER)]  # runs as a script, installed or not

if __name__ == "__main__":
    from specsampling.edge import catch_signals

    catch_signals()

import torch  # noqa: E402
from data import make_data  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402
from train import (  # noqa: E402
    EVALUATIONS,
    evaluate_rows,
    load_samples,
    new_student,
    train,
)
from transformers import AutoModelForCausalLM  # noqa: E402

from specsampling.config import ConfigError, read_blocks  # noqa: E402
from specsampling.console import Parser, exit_code  # noqa: E402
from specsampling.models.distilled import assemble, expand, shrink  # noqa: E402
from specsampling.models.load import model_location, resolve_device  # noqa: E402

DRAFT = "smollm2-135m-draft"
SHIPPED = "draft.safetensors"


def make_draft(settings: dict[str, Any], work: Path) -> None:
    """Train from the shards, and write the result to `work`/draft.pt."""
    train(settings, _target(settings), work)


def evaluate(settings: dict[str, Any], work: Path) -> None:
    """Write the exported draft's agreement on every evaluation set, and a figure, to `work`."""
    target = _target(settings)
    tensors, head_tokens = expand(load_file(work / SHIPPED))
    student = new_student(target, settings["draft"]["layers"])
    student.model.load_state_dict(tensors, strict=False)
    report: dict[str, Any] = {}
    for name in EVALUATIONS:
        samples = load_samples(sorted((work / "data").glob(f"{name}-*.safetensors")))
        rows = evaluate_rows(student, samples, head_tokens)
        report[name] = {
            "agreement": sum(map(sum, rows)) / sum(map(len, rows)),
            "num_tokens": sum(map(len, rows)),
            "num_texts": len(rows),
            "tokens_per_call": {k: tokens_per_call(rows, k) for k in (1, 2, 3, 4, 5, 6, 7)},
        }
    (work / "evaluation.json").write_text(json.dumps(report, indent=2) + "\n")
    print(json.dumps(report, indent=2))
    plot(work)


def tokens_per_call(rows: list[list[bool]], k: int) -> float:
    """Return greedy block efficiency with k drafted tokens, up to each cycle's first wrong one."""
    num_tokens = num_calls = 0
    for right in rows:
        at = 0
        while at < len(right):
            accepted = 0
            while accepted < k and at + accepted < len(right) and right[at + accepted]:
                accepted += 1
            at += accepted + 1
            num_calls += 1
        num_tokens += len(right)
    return num_tokens / num_calls


def plot(work: Path) -> None:
    """Plot loss and agreement by step to `work`/curve.png."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    log = [json.loads(line) for line in (work / "log.jsonl").read_text().splitlines()]
    steps = [line["step"] for line in log]
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.2), layout="constrained")
    left.plot(steps, [line["divergence"] for line in log], color="black")
    left.set(xlabel="step", ylabel="divergence (nats per token)", ylim=(0, None))
    for name, style in zip(EVALUATIONS, ("-", "--", ":"), strict=True):
        right.plot(steps, [100 * line[name] for line in log], style, color="black", label=name)
    right.set(xlabel="step", ylabel="greedy agreement (%)", ylim=(0, 100))
    right.legend()
    figure.savefig(work / "curve.png", dpi=150)


def export(settings: dict[str, Any], work: Path) -> None:
    """Write the draft's own tensors to `work`, in 8 bit, and the whole draft as a folder."""
    saved = torch.load(work / "draft.pt", weights_only=True)
    shipped, folder = work / SHIPPED, work / DRAFT
    shrunk = shrink(saved["student"], saved["head_ids"])
    save_file(shrunk, shipped, {"format": "pt", "target": settings["target"]})
    shutil.rmtree(folder, ignore_errors=True)
    assemble(Path(model_location(settings["target"])), shipped, folder)
    digest = hashlib.sha256(shipped.read_bytes()).hexdigest()
    print(f"{folder}: an ordinary Hugging Face folder, for --set models.draft={folder}")
    print(f"{shipped}: {shipped.stat().st_size / 1e6:.1f} MB, sha256 {digest}")
    print(f"To ship it: put it into specsampling/data/{DRAFT} and its sha256 into embedded.py")


def _target(settings: dict[str, Any]) -> Any:
    """Load the target by transformers: our `load_model` would fuse the layers to copy."""
    return AutoModelForCausalLM.from_pretrained(
        model_location(settings["target"]),
        dtype=torch.float32,
        device_map={"": resolve_device("auto")},
    )


STAGES = {"data": make_data, "train": make_draft, "export": export, "evaluate": evaluate}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = Parser(__doc__)
    parser.add_argument("stages", nargs="*", metavar="STAGE", help="default: all four")
    parser.add_argument("--config", type=Path, default=FOLDER / "distill.yaml")
    parser.add_argument("--work", type=Path, default=FOLDER / "work", help="where all files go")
    options = parser.parse_args(arguments)
    unknown = set(options.stages) - set(STAGES)
    if unknown:
        parser.error(f"STAGE must be one of {', '.join(STAGES)} (got {', '.join(unknown)})")
    try:
        settings = read_blocks(options.config)
        claim(options.work, settings)
        for stage in options.stages or STAGES:
            STAGES[stage](settings, options.work)
    except OSError as error:
        text = " ".join(str(error).split())
        raise ConfigError(
            f"{options.work} must be writable and hold what earlier stages made ({text}); run the "
            "stages in order: " + ", ".join(STAGES)
        ) from error
    return 0


def claim(work: Path, settings: dict[str, Any]) -> None:
    """Keep a work folder to one recipe, whose files others would otherwise take for theirs.

    Raises:
        ConfigError: the folder was begun with other settings.
    """
    work.mkdir(parents=True, exist_ok=True)
    begun, mine = work / "settings.json", json.dumps(settings, indent=1)
    if not begun.exists():
        begun.write_text(mine)
    elif begun.read_text() != mine:
        raise ConfigError(
            f"--work must be a folder for these settings (got {work}, begun with others: see "
            f"{begun}); choose another folder, or delete this one"
        )


if __name__ == "__main__":
    raise SystemExit(exit_code(main))
