"""Experiment 1: XSum with and without speculative sampling.

    python main_exp1.py                          the demo: our own articles, no GPU, no hub
    python main_exp1.py --profile qwen-coder-cpu       the same with Qwen2.5-Coder 1.5B and 0.5B
    python main_exp1.py --profile gpt-neo-rtx3050   GPT-Neo 1.3B with 125M on XSum
    python main_exp1.py --score FILE             score any JSONL with prediction and reference

Rows go to Results/results1.jsonl, or with --profile NAME to Results/NAME/results1.jsonl. ROUGE
scores go beside the rows. A rerun continues where the last one stopped. Benchmarks/bench1.ipynb
shows the result.
"""

from __future__ import annotations

if __name__ == "__main__":
    from specsampling.edge import catch_signals, check_address_space

    catch_signals()
    check_address_space(scoring_bytes=1_350_000_000)  # `evaluate` imports torch

import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from specsampling.config import require_task
from specsampling.console import exit_code, print_scores, read_experiment
from specsampling.results.foreign import read_objects
from specsampling.results.metrics import ROUGE_NAMES
from specsampling.results.records import RecordsError, is_run
from specsampling.results.scores import RougeScore
from specsampling.tasks.xsum import XSum


def main(arguments: Sequence[str] | None = None) -> int:
    options, config = read_experiment(__doc__, "xsum", "results1.jsonl", arguments)
    if options.score:
        print_scores(options.score, score_samples(options.score), summarise, describe)
        return 0
    task = XSum(require_task(config, "xsum"))

    from autoregressive import autoregressive
    from specsampling.experiment import run_experiment
    from speculative import speculative

    return run_experiment(config, task, options, autoregressive, speculative, score_samples)


def score_samples(path: Path) -> list[RougeScore]:
    """Return the ROUGE of every prediction in a file, in order.

    Our files hold the prediction in `completion`, other files in `prediction` or `completion`.
    """
    samples = read_objects(path, {"reference": str})
    if not samples:
        raise RecordsError(f"{path} must hold at least one row to score (got 0)")
    is_completion = "completion" in samples[0] and "prediction" not in samples[0]
    name = "completion" if is_completion else "prediction"
    read_objects(path, {name: str})

    from specsampling.tasks.rouge import Rouge, num_unreadable

    predictions = [sample[name] for sample in samples]
    references = [sample["reference"] for sample in samples]
    if num := num_unreadable([*predictions, *references]):
        print(
            f"rouge: {num} of {2 * len(samples)} texts are mostly in letters that the tokenizer "
            "drops (it keeps a to z and digits), so their scores say little",
            file=sys.stderr,
        )
    found = Rouge().compute(predictions=predictions, references=references, use_aggregator=False)
    ours = is_run(path)
    return [
        RougeScore(
            example_id=sample["example_id"] if ours else str(number),
            method=sample["method"] if ours else "",
            sample_index=sample["sample_index"] if ours else 0,
            rouge1=found["rouge1"][number],
            rouge2=found["rouge2"][number],
            rougeL=found["rougeL"][number],
        )
        for number, sample in enumerate(samples)
    ]


def summarise(scores: Sequence[RougeScore]) -> dict[str, Any]:
    """Return the mean ROUGE of one method's samples, and the number of examples behind it."""
    return {
        **{name: fmean(score[name] for score in scores) for name in ROUGE_NAMES},
        "num_examples": len({score["example_id"] for score in scores}),
    }


def describe(summary: dict[str, Any]) -> str:
    """Return a summary in one line."""
    rouge = ", ".join(f"{name} {summary[name]:.4f}" for name in ROUGE_NAMES)
    return f"{rouge} over {summary['num_examples']} examples"


if __name__ == "__main__":
    raise SystemExit(exit_code(main))
