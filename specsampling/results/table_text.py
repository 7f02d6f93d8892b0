"""Turns tables of plain numbers into text: for terminals, pages and notebooks."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping
from dataclasses import astuple
from typing import Any

import pandas as pd

from specsampling.results import metrics

WIDTH = 80  # characters in a line of a terminal

TERMINAL_HEADERS = {  # a header's two lines; other columns have their name on the second
    "pass@1": ("pass@1", "[95%]"),
    "rouge1": ("rouge1", "[95%]"),
    "speedup": ("speedup", "[95%]"),
    "end-to-end speedup": ("with", "prefill"),
    "draft acceptance rate": ("draft", "accepted"),
    "block efficiency": ("tokens", "/call"),
    "time outside forwards": ("outside", "calls"),
    "result": ("result", "[95%]"),
    "difference": ("less autoregressive's", "[95%]"),
    "ms/token": ("ms", "/token"),
}

HEADINGS = {  # the same in one line, for pages and notebooks
    name: " ".join(lines).replace(" /", "/")
    for name, lines in TERMINAL_HEADERS.items()
    if "[95%]" not in lines
}

FORMATS: dict[str, str] = {  # for columns that do not show two decimal places
    **dict.fromkeys(metrics.ROUGE_NAMES, ".3f"),
    "draft acceptance rate": ".1%",
    "time outside forwards": ".1%",
    "tokens/s": ".1f",
    "n": ".0f",
}


def printable(table: pd.DataFrame) -> pd.DataFrame:
    """Turn a table into text: percentages, "1.62 [1.51, 1.74]", "-" for an empty cell."""
    columns = {}
    for name in table.columns:
        if name.endswith((" low", " high")):
            continue
        if f"{name} low" in table:
            columns[name] = [interval_text(name, interval) for interval in _intervals(table, name)]
        else:
            columns[name] = [as_text(name, value) for value in table[name]]
    return pd.DataFrame(columns, index=table.index)


def formatted(table: pd.DataFrame, formats: Mapping[str, str]) -> pd.DataFrame:
    """Turn the columns in `formats` into text, with "" for an empty cell.

    A column with bounds becomes a column of intervals, and its name gains "[95%]".
    """
    text = {}
    for name, spec in formats.items():
        if f"{name} low" in table:
            values, heading = _intervals(table, name), f"{name} [95%]"
        else:
            values, heading = list(table[name]), name
        pairs = zip(values, table[name].isna())
        text[heading] = ["" if is_empty else format(value, spec) for value, is_empty in pairs]
    return pd.DataFrame(text)


def _intervals(table: pd.DataFrame, name: str) -> list[Any]:
    return [metrics.Interval(*line) for line in table[interval_names(name)].itertuples(index=False)]


def format_table(table: pd.DataFrame) -> str:
    """Format a `summary_table` for a terminal, with its notes below."""
    if table.empty:
        return "no rows to show"
    unseen = ["sampling", "rouge2 low", "rouge2 high", "rougeL"]
    unseen += ["end-to-end speedup low", "end-to-end speedup high"]
    text = printable(table.drop(columns=unseen, errors="ignore"))
    notes = [textwrap.fill(note, WIDTH, subsequent_indent="  ") for note in table.attrs["notes"]]
    return "\n".join([*aligned(text), *notes])


def aligned(text: pd.DataFrame, keys: int = 1, width: float = WIDTH) -> list[str]:
    """Return aligned lines: two lines of headers, a rule, and a line per row of `text`.

    Columns that do not fit into `width` characters stand in a second block below. Each block begins
    with the first `keys` columns.
    """
    columns = []
    for name in map(str, text):
        cells = [*(TERMINAL_HEADERS.get(name) or _in_two_lines(name)), *text[name]]
        side = "<" if name == "method" else ">"
        columns.append([f"{cell:{side}{max(map(len, cells))}}" for cell in cells])
    blocks = [columns[:keys]]
    for column in columns[keys:]:
        if sum(len(cells[0]) + 2 for cells in [*blocks[-1], column]) - 2 > width:
            blocks.append(columns[:keys])
        blocks[-1] = [*blocks[-1], column]
    lines: list[str] = []
    for block in blocks:
        of_block = ["  ".join(cells).rstrip() for cells in zip(*block, strict=True)]
        of_block.insert(2, "-" * max(map(len, of_block)))
        lines += [""] * bool(lines) + of_block
    return lines


def _in_two_lines(name: str) -> tuple[str, str]:
    """Break a long header where the longer line is shortest; a short one is the second line."""
    words = name.split()
    breaks = range(1, len(words)) if len(name) >= 12 else []
    halves = [(" ".join(words[:i]), " ".join(words[i:])) for i in breaks]
    return min(halves, key=lambda lines: max(map(len, lines)), default=("", name))


def interval_names(name: str) -> list[str]:
    return [name, f"{name} low", f"{name} high"]


def interval_text(name: str, interval: metrics.Interval) -> str:
    """Write an estimate of column `name`, and its bounds if it has any."""
    estimate, low, high = (as_text(name, value) for value in astuple(interval))
    return estimate if math.isnan(interval.low) else f"{estimate} [{low}, {high}]"


def as_text(name: str, value: Any) -> str:
    if value == "" or (isinstance(value, float) and math.isnan(value)):
        return "-"
    is_share = name.startswith("pass@")
    if name.endswith(" difference"):
        return f"{value:+.1%}" if is_share else f"{value:+.4f}"
    default = ".1%" if is_share else ".2f" if isinstance(value, float) else ""
    return format(value, FORMATS.get(name, default))
