"""Write every table of results in README.md, docs/ and Results/ from the committed rows.

    python Benchmarks/report.py            write the pages
    python Benchmarks/report.py --check    only say which pages differ, with exit code 1
    python Benchmarks/report.py --notebooks    also run the committed notebooks over those rows
    python Benchmarks/report.py Results/results2.jsonl --html run.html    one run, as a page
    python Benchmarks/report.py Results/results2.jsonl --csv run.csv      its table, as numbers
    python Benchmarks/report.py Results/figure1/xsum-greedy.jsonl --csv out.csv --table figure1

A page holds a table between two comments. The first one names what is shown and of which file:

    <!-- table: run Results/results2.jsonl -->
    <!-- /table -->

Whatever stands between them is replaced. Words around a table are written by hand, numbers in it
never are.
"""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import pandas as pd

from Benchmarks import figure1, identity, methods, peers, quality, scale, table1
from Benchmarks.run_page import page_of
from specsampling.config import OLD_NAMES, ConfigError
from specsampling.console import PROJECT, Parser, exit_code
from specsampling.results import metrics, table_text, tables
from specsampling.results.meta import device_names
from specsampling.results.records import Run, read_run

TABLE = re.compile(r"(<!-- table: (\w+) (\S+) -->\n).*?(<!-- /table -->)", re.DOTALL)
PAGES = "README.md", "docs/*.md", "Results/README.md"
LEFT_OUT = [
    *("sampling", "n", "end-to-end speedup low", "end-to-end speedup high", "rouge2 low"),
    *("rouge2 high", "rougeL", "rougeL low", "rougeL high"),
]
TIMED = (
    *("tokens/s", "speedup", "speedup low", "speedup high", "end-to-end speedup"),
    "time outside forwards",
)
NUM_TEXTS = 16_400  # 100 samples of each problem
HEADLINE = {  # of the README
    "SmolLM2-135M with n-grams and a distilled draft": "smollm2/results2.jsonl",
    "the same in 8 bit": "smollm2-int8/results2.jsonl",
    "Qwen2.5-Coder 1.5B with n-grams and the 0.5B, in 8 bit": "qwen-coder-int8/results2.jsonl",
}

NOTEBOOKS = {  # what each committed notebook shows
    "bench1": "Results/published/smollm2/results1.jsonl",
    "bench2": "Results/published/smollm2/results2.jsonl",
    **dict.fromkeys(["figure1", "methods", "table1"], "Results/published/smollm2"),
}
PRECISIONS = {  # of Qwen2.5-Coder 1.5B, over all problems, eight texts at once
    "bfloat16": "qwen-coder-precision/bfloat16.jsonl",
    "int8": "qwen-coder-int8/results2-batch8.jsonl",
    "int4, the published file's blocks": "qwen-coder-precision/int4.jsonl",
}


class Table(NamedTuple):
    """A table of results: as numbers, as the text that pages show, and the words below it."""

    numbers: pd.DataFrame
    text: pd.DataFrame
    caption: str = ""


def main(arguments: Sequence[str] | None = None) -> int:
    parser = Parser(__doc__)
    add = parser.add_argument
    add("run", metavar="RUN", nargs="?", type=Path, help="rows, or a folder of rows, to show")
    add("--html", metavar="FILE", type=Path, help="write a page of the run RUN")
    add("--csv", metavar="FILE", type=Path, help="write a table of RUN")
    kind = f"which table --csv writes: {', '.join(KINDS)} (default: run)"
    add("--table", metavar="KIND", default="run", help=kind)
    add("--check", action="store_true", help="write nothing")
    add(
        "--notebooks",
        action="store_true",
        help="run the committed notebooks and write their figures",
    )
    options = parser.parse_args(arguments)
    files = options.html, options.csv
    if bool(options.run) != any(files):
        raise ConfigError("RUN belongs with --html FILE or --csv FILE (got one of them); give both")
    if options.run:
        for file in filter(None, files):
            file.parent.mkdir(parents=True, exist_ok=True)
        if options.html:
            options.html.write_text(page_of(options.run), encoding="utf-8")
        if options.csv:
            made(options.table, options.run).numbers.to_csv(options.csv, index=False)
        print(f"{' and '.join(map(str, filter(None, files)))} shows {options.run}")
        return 0
    different = []
    for page in sorted(path for pattern in PAGES for path in PROJECT.glob(pattern)):
        before = page.read_text()
        if (after := written(before)) != before:
            different.append(page.relative_to(PROJECT))
            if not options.check:
                page.write_text(after)
    for name in different:
        print(f"{name} {'differs from' if options.check else 'now has the tables of'} its rows")
    for notebook in NOTEBOOKS if options.notebooks and not options.check else ():
        print(f"running {notebook}.ipynb ...", file=sys.stderr, flush=True)
        text = run_notebook(notebook, PROJECT)
        (PROJECT / "Benchmarks" / f"{notebook}.ipynb").write_text(text)
    return 1 if options.check and different else 0


def run_notebook(name: str, project: Path) -> str:
    """Run a notebook of a project over its rows in `NOTEBOOKS`, and return it with its outputs."""
    import nbformat
    from nbclient import NotebookClient

    folder = project / "Benchmarks"
    notebook = nbformat.read(folder / f"{name}.ipynb", as_version=4)
    client = NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(folder)}})
    client.execute(env={**os.environ, "SPECSAMPLING_RESULTS": NOTEBOOKS[name]})
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)  # when it ran
    return nbformat.writes(notebook) + "\n"


def written(page: str) -> str:
    """A page with its tables made anew."""
    return TABLE.sub(lambda found: f"{found[1]}{table_of(found[2], found[3])}\n{found[4]}", page)


def table_of(kind: str, path: str) -> str:
    """The Markdown of one kind of table, over a file or folder of rows."""
    if kind == "terminal":
        return terminal_table(PROJECT / path)
    table = made(kind, PROJECT / path)
    return "\n\n".join(filter(None, (markdown(table.text), table.caption)))


def made(kind: str, path: Path) -> Table:
    if kind not in KINDS:
        raise ConfigError(f"a table must be one of {', '.join(KINDS)} (got {kind}); name one")
    return KINDS[kind](path)


def summary_of(run: Run) -> pd.DataFrame:
    sampling = tables.describe_sampling(run.meta["config"]["sampling"])
    return tables.summary_table(run.rows, run.scores, sampling)


def run_table(path: Path, left_out: Sequence[str] = ()) -> Table:
    """A run: a line per method, then what was run, on which machine, and by which command."""
    run = read_run(path)
    table = summary_of(run)
    shown = table.drop(columns=[*LEFT_OUT, *left_out], errors="ignore")
    return Table(table, table_text.printable(shown), caption(run))


def texts_table(path: Path) -> Table:
    """A run that was made beside other work: its texts and scores, and no speeds."""
    return run_table(path, TIMED)


def caption(run: Run) -> str:
    """What a run's table says of the run: texts, models, machine, command."""
    meta, config = run.meta, run.meta["config"]
    num = max(map(len, tables.shared_rows(run.rows).values()))
    sizes = config["run"].get("batch_size", 1)
    together = f", {sizes} texts at once" if sizes > 1 else ""
    command = meta["command"].replace("--fresh ", "")
    for old, new in OLD_NAMES.items():
        command = command.replace(f"--profile {old} ", f"--profile {new} ")
    return (
        f"{num} texts for each method, {tables.describe_sampling(config['sampling'])}, "
        f"{meta['precision']}{together}; {device_names(meta)}, {meta['date'][:10]}. "
        f"Command: `{command}`."
    )


def terminal_table(path: Path) -> str:
    """A run's table as the terminal shows it, without the lines below."""
    run = read_run(path)
    table = summary_of(run)
    table.attrs["notes"] = []
    return f"```text\n{table_text.format_table(table)}\n({device_names(run.meta)})\n```"


def headline_table(folder: Path) -> Table:
    """The runs of `HEADLINE`: how fast, and whether the texts are the same."""
    lines = []
    for name, file in HEADLINE.items():
        run = read_run(folder / file)
        rows = tables.shared_rows(run.rows)
        baseline, ours = rows[tables.BASELINE], rows["speculative"]
        same, num = metrics.count_identical(ours, rows.get("reference", baseline))
        lines.append(
            {
                "target and draft": name,
                "problems": str(num),
                "machine": f"{device_names(run.meta)}, {run.meta['precision']}",
                "baseline tokens/s": f"{metrics.tokens_per_second(baseline):.1f}",
                "speculative tokens/s": f"{metrics.tokens_per_second(ours):.1f}",
                "speedup": f"{metrics.speedup(baseline, ours).of_totals:.2f}",
                "identical outputs": f"{same} of {num}",
            }
        )
    return of_text(pd.DataFrame(lines))


def of_text(table: pd.DataFrame, caption: str = "") -> Table:
    return Table(table, table, caption)


def scores_table(folder: Path) -> Table:
    """The target's own pass@1 in each of `PRECISIONS`, and which texts are bfloat16's."""
    lines, exact = [], None
    for precision, file in PRECISIONS.items():
        run = read_run(folder / file)
        rows = tables.shared_rows(run.rows)[tables.BASELINE]
        exact = exact or rows
        scores = metrics.quality(tables.scores_of(rows, run.scores or []), "pass@1")
        lines.append(
            {
                "precision": precision,
                "problems": str(metrics.num_problems(rows)),
                "pass@1": f"{scores:.1%}",
                "texts equal to bfloat16's": "{} of {}".format(
                    *metrics.count_identical(rows, exact)
                ),
            }
        )
    return of_text(pd.DataFrame(lines))


def precision_table(path: Path) -> Table:
    rows = [quality.Quality(**json.loads(line)) for line in path.read_text().splitlines()]
    machines = ", ".join(dict.fromkeys(row.machine for row in rows))
    return of_text(quality.table_of(rows), f"Machine: {machines}.")


def peers_table(path: Path) -> Table:
    run = read_run(path)
    rows = tables.shared_rows([row for row in run.rows if not row.error])
    return of_text(peers.table_of(rows), f"{device_names(run.meta)}, {run.meta['date'][:10]}.")


def identity_table(folder: Path) -> Table:
    """What identity costs: each draft and rule, averaged over all settings."""
    chances = identity.read_chances(folder / identity.CHANCES)
    paths = identity.paths_of(folder)
    parts = [identity.identity_table(read_run(path), key, chances) for key, path in paths.items()]
    run = read_run(next(iter(paths.values())))
    whole = pd.concat(parts)
    words = (
        f"Up to {max(whole['n'])} problems in each of {len(paths)} settings, "
        f"{run.meta['precision']}; {device_names(run.meta)}, {run.meta['date'][:10]}."
    )
    return Table(whole, identity.over_settings(whole), words)


def scale_table(path: Path) -> Table:
    """Hours that the paper's 100 samples of each problem take, by a run's own seconds."""
    run = read_run(path)
    table = scale.table_of(run.rows, NUM_TEXTS, (1, 8, 64), 60)
    return of_text(table, f"Machine: {device_names(run.meta)}, {run.meta['precision']}.")


def methods_table(path: Path) -> Table:
    run = read_run(path)
    table = methods.methods_table(run)
    return Table(table, methods.methods_text(table), caption(run))


def figure1_table(path: Path) -> Table:
    run = read_run(path)
    table = figure1.over_k(run)
    return Table(table, figure1.figure1_table(table), caption(run))


def table1_table(folder: Path) -> Table:
    """The paper's Table 1: our cells that have rows, and the paper's own."""
    paths = table1.table1_paths(folder).values()
    runs = [read_run(path) for path in paths if path.is_file()]
    table = table1.table1(runs)
    text = table1.table1_beside_paper(table).reset_index()
    return Table(table, text, f"The paper's own lines are {table1.PAPER_SETUP}.")


def index_of_runs(folder: Path) -> Table:
    """Every run of a folder: what made it, and how many rows it has."""
    lines = []
    for beside in sorted(folder.rglob("*.meta.json")):
        path = beside.with_name(beside.name.replace(".meta.json", ".jsonl"))
        run = read_run(path)
        meta = run.meta
        rows = metrics.grouped((row.method, row) for row in run.rows)
        lines.append(
            {
                "run": f"`{path.relative_to(folder)}`",
                "rows": str(len(run.rows)),
                "methods": str(len(rows)),
                "machine": device_names(meta),
                "precision": meta["precision"],
                "commit": meta["git_commit"],
                "command": f"`{meta['command']}`",
            }
        )
    return of_text(pd.DataFrame(lines))


KINDS: dict[str, Callable[[Path], Table]] = {
    "headline": headline_table,
    "run": run_table,
    "texts": texts_table,
    "precision": precision_table,
    "scores": scores_table,
    "peers": peers_table,
    "identity": identity_table,
    "scale": scale_table,
    "methods": methods_table,
    "figure1": figure1_table,
    "table1": table1_table,
    "index": index_of_runs,
}


def markdown(text: pd.DataFrame) -> str:
    """A table of text in Markdown; "-" for an empty cell becomes an empty one."""
    text = text.rename(columns=table_text.HEADINGS)
    lines = [list(map(str, text.columns)), ["---"] * len(text.columns)]
    lines += [["" if cell == "-" else str(cell) for cell in line] for line in text.to_numpy()]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


if __name__ == "__main__":
    raise SystemExit(exit_code(main))
