"""Makes the tables of a finished run that the notebooks and the scripts show.

Tables are pandas frames of plain numbers (rates are fractions). `table_text.py` turns them into
text with percentages. This module knows rows, scores and a run's meta.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import astuple
from typing import Any, Literal

import pandas as pd

from specsampling.results import metrics
from specsampling.results.audit import audit, describe_partings, partings
from specsampling.results.lines import key_of
from specsampling.results.meta import device_names, starts_of
from specsampling.results.records import Row, Run
from specsampling.results.scores import Scores
from specsampling.results.table_text import interval_names, interval_text

METHODS = ("autoregressive", "reference", "speculative")  # shown first, in this order
FEW = 10  # examples, below which an interval over them means little
BASELINE = "autoregressive"  # the fastest baseline: speedups are measured against it

PUBLISHED = {  # by the earlier attempt at this reproduction, a line per method
    "xsum": [
        {"method": "autoregressive", "rouge1": 0.160},
        {"method": "speculative", "rouge1": 0.159, "speedup": 1.84, "draft acceptance rate": 0.32},
    ],
    "humaneval": [
        {"method": "autoregressive", "pass@1": 0.35},
        {"method": "speculative", "pass@1": 0.40, "speedup": 2.52, "draft acceptance rate": 0.75},
    ],
}


def summary_table(
    rows: Sequence[Row], scores: Scores | None = None, sampling: str = ""
) -> pd.DataFrame:
    """Make a table with a line per method, over the same (example, sample) pairs.

    Pairs that a method lacks, because its run stopped midway, are left out of all lines. If several
    machines made the rows, speeds stand in further lines, one per machine and method.
    `table.attrs["notes"]` is a list of sentences that belong under the table.

    Args:
        scores: pass or fail per row, or ROUGE; None leaves their columns out.
        sampling: how tokens were chosen, in the words of `describe_sampling`.
    """
    kept = shared_rows(rows)
    compared_with = "reference" if "reference" in kept else BASELINE
    notes = []
    if num_left_out := len(rows) - sum(map(len, kept.values())):
        notes.append(f"{num_left_out} rows are left out: another method lacks their example")
    lines = []
    for method, of_method in kept.items():
        num = metrics.num_problems(of_method)
        line: dict[str, Any] = {"method": method, "sampling": sampling, "n": num}
        if scores is not None:
            line |= _quality_columns(of_method, scores)
            if (num_scored := len(scores_of(of_method, scores))) < len(of_method):
                notes.append(f"{method}: only {num_scored} of {len(of_method)} rows are scored")
        line |= _speed_columns(kept.get(BASELINE, []), of_method)
        line["draft acceptance rate"] = metrics.draft_acceptance_rate(of_method)
        line["block efficiency"] = metrics.block_efficiency(of_method)
        line["time outside forwards"] = metrics.overhead_share(of_method)
        line["identical outputs"] = ""
        # Texts can be the same if both methods are greedy or draw with the same noise.
        others = kept.get(compared_with, [])
        has_noise = all(row.noise for row in (*of_method, *others))
        is_comparable = sampling in ("", "greedy") or has_noise
        if method.startswith("speculative") and others and is_comparable:
            num_identical, num_compared = metrics.count_identical(of_method, kept[compared_with])
            line["identical outputs"] = f"{num_identical}/{num_compared}"
            if has_noise and num_identical == num_compared:
                notes.append(
                    f"{method}: all {num_compared} sampled texts equal {compared_with}'s, token "
                    "for token"
                )
        lines.append(line)
    for name, groups in rows_by_machine([row for of in kept.values() for row in of]).items():
        for method, of_method in groups.items():
            line = {"method": f"{method} on {name}", "n": metrics.num_problems(of_method)}
            line |= _speed_columns(groups.get(BASELINE, []), of_method)
            line["time outside forwards"] = metrics.overhead_share(of_method)
            lines.append(line)
        machine = next(iter(groups.values()))[0].device
        notes.append(f"{name} is {machine or 'not recorded, so it has no speeds'}")
    if any(line.get("identical outputs") for line in lines):
        notes.append(f"identical outputs have the token ids of method {compared_with}")
    notes += [*_audit_notes(kept), *_theorem_notes(kept), *_difference_notes(kept, scores or [])]
    notes += few_notes(metrics.num_problems(row for of in kept.values() for row in of))
    if errors := [row for row in rows if row.error]:
        notes.append(f"{len(errors)} texts ended in an error. The first is: {errors[0].error}")
    if cut := {row.example_id for row in rows if row.num_cut_tokens}:
        notes.append(f"the number of documents cut to fit the context is {len(cut)}")
    table = pd.DataFrame(lines).fillna({"sampling": sampling, "identical outputs": ""})
    table.attrs["notes"] = notes
    return table


def few_notes(num_problems: int) -> list[str]:
    return [f"intervals over fewer than {FEW} problems mean little"] * (1 < num_problems < FEW)


def _theorem_notes(rows: Mapping[str, Sequence[Row]]) -> list[str]:
    """Say what theory predicts of each method whose draft is a model, beside what was measured."""
    notes = []
    for method, of_method in rows.items():
        predicted = metrics.predicted_speedup(of_method)
        if any(row.draft_call_seconds for row in of_method) and not math.isnan(predicted):
            measured = metrics.speedup(rows.get(BASELINE, []), of_method).of_totals
            notes.append(
                f"{method}: alpha is {metrics.per_token_acceptance(of_method):.1%}, and a draft "
                f"call takes {metrics.cost_ratio(of_method):.2f} of a target call's time. From "
                f"these, Theorem 3.8 of Leviathan et al. predicts a speedup of {predicted:.2f} "
                f"(measured: {interval_text('speedup', measured)}). Calls of several rows take "
                "longer than calls of one, which the theorem leaves out"
            )
    return notes


def _difference_notes(rows: Mapping[str, Sequence[Row]], scores: Scores) -> list[str]:
    """Say how far the quality of each speculative method is from the baselines'."""
    return [
        f"in {name}, {method} minus {other} is {interval_text(f'{name} difference', difference)}"
        for (method, other), differences in _differences(rows, scores).items()
        for name, difference in differences.items()
        if name not in ("rouge2", "rougeL")
    ]


def _audit_notes(rows: Mapping[str, Sequence[Row]]) -> list[str]:
    """Return each method's audit in a line, and one that compares the baseline with reference."""
    found = {method: audit(of_method) for method, of_method in rows.items()}
    notes = [f"{method}: {of_method}" for method, of_method in found.items() if of_method]
    if any("uniform p" in note for note in notes):
        notes.append("lossless means that neither p tells the tokens from samples of the target")
    if gaps := partings(rows.get(BASELINE, []), rows.get("reference", [])):
        notes.append(f"{BASELINE}: {describe_partings(gaps, len(rows[BASELINE]))}")
    return notes


def target_and_draft_table(run: Run, draft_alone: Run) -> pd.DataFrame:
    """Make a table of the target alone, the draft alone, and both together.

    `draft_alone` is a run over the same examples whose target is the draft.
    """
    parts = {
        "the target alone": (run, BASELINE),
        "the draft alone": (draft_alone, BASELINE),
        "both: speculative": (run, "speculative"),
    }
    kept = _shared(
        {
            name: [row for row in source.rows if row.method == method]
            for name, (source, method) in parts.items()
        }
    )
    lines = []
    for name, rows in kept.items():
        line: dict[str, Any] = {"who": name, "n": metrics.num_problems(rows)}
        if (scores := parts[name][0].scores) is not None:
            line |= _quality_columns(rows, scores)
        line["tokens/s"] = metrics.tokens_per_second(rows)
        line |= speedup_columns("speedup", kept["the target alone"], rows)
        lines.append(line)
    return pd.DataFrame(lines)


def published_table(task: Literal["xsum", "humaneval"]) -> pd.DataFrame:
    """Return a task's figures as the earlier attempt at this reproduction published them."""
    return pd.DataFrame(PUBLISHED[task])


def rouge_difference_table(rows: Sequence[Row], scores: Scores) -> pd.DataFrame:
    """Compare the ROUGE of each speculative method with that of the baselines, by sample."""
    lines = []
    for (method, other), differences in _differences(shared_rows(rows), scores).items():
        line: dict[str, Any] = {"method": method, "less": other}
        for name, difference in differences.items():
            line |= interval_columns(f"{name} difference", difference)
        lines.append(line)
    return pd.DataFrame(lines)


def example_table(
    rows: Sequence[Row],
    documents: Mapping[str, str],
    num_examples: int = 3,
    num_characters: int = 300,
) -> pd.DataFrame:
    """Show the first examples: the document's start, the reference, each method's first output.

    `documents` gives the texts of some or all examples by id. Each is cut at `num_characters`.
    """
    lines: dict[str, dict[str, str | None]] = {}
    for method, of_method in shared_rows(rows).items():
        for row in [row for row in of_method if row.sample_index == 0][:num_examples]:
            document = documents.get(row.example_id, "")
            start = textwrap.shorten(document, num_characters, placeholder=" ...")
            if start == "...":  # no word fits: a text without spaces is one word
                start = f"{document.strip()[: num_characters - 4]} ..."
            line = {"document": start, "reference summary": row.reference}
            lines.setdefault(row.example_id, line)[method] = row.completion
    return pd.DataFrame.from_dict(lines, orient="index")


def describe_sampling(sampling: Mapping[str, Any]) -> str:
    """Describe a config's `sampling` block: "greedy", or "temperature 0.8, top-p 0.95"."""
    if sampling["temperature"] == 0:
        return "greedy"
    words = [f"temperature {sampling['temperature']:g}"]
    if sampling["top_k"] > 0:
        words.append(f"top-k {sampling['top_k']}")
    if sampling["top_p"] < 1:
        words.append(f"top-p {sampling['top_p']:g}")
    return ", ".join(words)


def describe_run(meta: Mapping[str, Any]) -> str:
    """Describe what was run, on what, and by which command, from a run's meta."""
    config = meta["config"]
    k, model_k = (config["speculation"].get(name) for name in ("k", "model_k"))
    limit = f" (at most {model_k} from a model)" if model_k and k != "auto" else ""
    versions = ", ".join(f"{name} {version}" for name, version in meta["versions"].items())
    peaks = dict.fromkeys(of["peak_memory"] for of in starts_of(meta) if "peak_memory" in of)
    return f"""\
models:   target {config["models"]["target"]}, draft {config["models"]["draft"]}
decoding: k = {k}{limit}, {describe_sampling(config["sampling"])}, \
at most {config["decoding"]["max_new_tokens"]} new tokens
exact:    {meta["bit_exact"]}
machine:  {device_names(meta)} ({meta["device"]}), {meta["precision"]}, {meta["threads"]} threads\
{", peak memory " * bool(peaks)}{" or ".join(peaks)}
run:      profile {meta["profile"]}, config {meta["config_hash"]}, \
commit {meta["git_commit"]}, {meta["date"]}
command:  {meta["command"]}
versions: {versions}"""


def rows_by_method(rows: Sequence[Row]) -> dict[str, list[Row]]:
    groups = metrics.grouped((row.method, row) for row in rows)
    return {method: groups[method] for method in (*METHODS, *sorted(groups)) if method in groups}


def drafting_rows(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """Group rows by method, and keep the methods that drafted anything."""
    groups = rows_by_method(rows).items()
    return {name: group for name, group in groups if any(sum(row.drafted) for row in group)}


def rows_by_machine(rows: Sequence[Row]) -> dict[str, dict[str, list[Row]]]:
    """Group rows by machine, then by method as `shared_rows`; {} if all are of one machine."""
    if metrics.are_of_one_machine(rows):
        return {}
    groups = metrics.grouped((row.device or "", row) for row in rows).values()
    return {f"machine {i}": shared_rows(group) for i, group in enumerate(groups, start=1)}


def shared_rows(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """Group rows by method, and keep the (example, sample) pairs that every method has."""
    return _shared(rows_by_method(rows))


def _shared(groups: Mapping[str, list[Row]]) -> dict[str, list[Row]]:
    samples = [{row.sample for row in group} for group in groups.values()]
    return {
        name: [row for row in group if all(row.sample in of_group for of_group in samples)]
        for name, group in groups.items()
    }


def _is_rouge(scores: Scores) -> bool:
    return bool(scores) and "rouge1" in scores[0]


def scores_of(rows: Sequence[Row], scores: Scores) -> list[Any]:
    """Return the scores of `rows`, of either kind."""
    keys = {row.key for row in rows}
    return [score for score in scores if key_of(score) in keys]


def _quality_columns(rows: Sequence[Row], scores: Scores) -> dict[str, float]:
    """Return mean ROUGE, or pass@1 and each pass@k for which all problems have k samples."""
    scored = scores_of(rows, scores)
    columns: dict[str, float] = {}
    for name in _measures(scored, _is_rouge(scores)):
        columns |= interval_columns(name, metrics.quality(scored, name))
    return columns


def _measures(scored: Sequence[Any], is_rouge: bool) -> list[str]:
    ks = () if is_rouge else {1, *metrics.pass_at_k(scored)}
    return [f"pass@{k}" for k in sorted(ks)] or list(metrics.ROUGE_NAMES)


def _differences(
    by_method: Mapping[str, Sequence[Row]], scores: Scores
) -> dict[tuple[str, str], dict[str, metrics.Interval]]:
    """Subtract each baseline's quality from each other method's, by both and by measure."""
    scored = {method: scores_of(rows, scores) for method, rows in by_method.items()}
    return {
        (method, other): {
            name: metrics.quality_difference(ours, scored[other], name)
            for name in _measures(ours, _is_rouge(scores))
        }
        for method, ours in scored.items()
        for other in METHODS[:2]
        if ours and scored.get(other) and method not in METHODS[:2]
    }


def _speed_columns(baseline: Sequence[Row], rows: Sequence[Row]) -> dict[str, float]:
    return {
        "tokens/s": metrics.tokens_per_second(rows),
        **speedup_columns("speedup", baseline, rows),
        **speedup_columns("end-to-end speedup", baseline, rows, with_prefill=True),
    }


def speedup_columns(
    name: str, baseline: Sequence[Row], rows: Sequence[Row], *, with_prefill: bool = False
) -> dict[str, float]:
    compared = metrics.speedup(baseline, rows, with_prefill=with_prefill)
    return interval_columns(name, compared.of_totals)


def interval_columns(name: str, interval: metrics.Interval) -> dict[str, float]:
    return dict(zip(interval_names(name), astuple(interval), strict=True))
