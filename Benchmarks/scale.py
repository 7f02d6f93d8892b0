"""Predict how long a long run takes on 1, 8 or 64 processes, from the rows of a short one.

    python Benchmarks/scale.py Results/published/qwen-coder-int8/results2.jsonl
    python Benchmarks/scale.py Results/results2.jsonl --tokens 512 --target-ms 13.8 --draft-ms 9

Texts are drawn from the rows and dealt to the processes as `specsampling/runner.py` deals them. The
slowest process ends the run. A text takes its row's measured seconds. With --target-ms and
--draft-ms, it takes its row's numbers of calls times these: another machine is simulated. With
--tokens, every text has this many tokens, at its row's pace.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

if __name__ == "__main__":
    from specsampling.edge import catch_signals

    catch_signals()

import numpy as np
import pandas as pd

from specsampling.config import ConfigError
from specsampling.console import Parser, exit_code
from specsampling.results.records import Row, read_rows
from specsampling.results.table_text import aligned
from specsampling.results.tables import rows_by_method


def main(arguments: Sequence[str] | None = None) -> int:
    parser = Parser(__doc__)
    parser.add_argument("rows", metavar="FILE", type=Path, help="rows of a run")
    parser.add_argument("--texts", metavar="N", default="16400", help="texts of each method")
    parser.add_argument("--tokens", metavar="N", help="tokens of each text (default: its row's)")
    parser.add_argument("--processes", metavar="A,B", default="1,8,64")
    parser.add_argument("--target-ms", metavar="MS", help="simulate: time of a target call")
    parser.add_argument("--draft-ms", metavar="MS", help="simulate: time of a draft call")
    parser.add_argument("--start", metavar="S", default="60", help="seconds until models are ready")
    options = parser.parse_args(arguments)
    milliseconds = None
    if options.target_ms is not None or options.draft_ms is not None:
        milliseconds = tuple(
            number(f"--{name}-ms", getattr(options, f"{name}_ms") or "0", 0)
            for name in ("target", "draft")
        )
    num_texts = int(number("--texts", options.texts, 1))
    tokens = None if options.tokens is None else int(number("--tokens", options.tokens, 1))
    counts = [int(number("--processes", count, 1)) for count in options.processes.split(",")]
    start = number("--start", options.start, 0)
    kind = "measured" if milliseconds is None else "simulated from the rows' numbers of calls"
    print(f"{num_texts:,} texts of each method; seconds are {kind}")
    rows = read_rows(options.rows)
    table = table_of(rows, num_texts, counts, start, milliseconds, tokens)
    print("\n".join(aligned(table)))
    return 0


def table_of(
    all_rows: Sequence[Row],
    num_texts: int,
    counts: Sequence[int],
    start: float,
    milliseconds: tuple[float, ...] | None = None,
    tokens: int | None = None,
) -> pd.DataFrame:
    """Make a table of text with a line per method; see the options of the same names."""
    lines = []
    for method, rows in rows_by_method(all_rows).items():
        rows = [row for row in rows if row.num_new_tokens]
        seconds = seconds_of(rows, milliseconds, tokens)
        line = {
            "method": method,
            "rows": str(len(rows)),
            "tokens/text": f"{tokens or np.mean([row.num_new_tokens for row in rows]):.0f}",
            "texts/hour": f"{3600 / seconds.mean():.0f}",
        }
        for count in counts:
            hours, idle = hours_of(seconds, num_texts, count, start)
            line[f"hours on {count}"] = f"{hours:.2f} ({idle:.0%} idle)"
        lines.append(line)
    return pd.DataFrame(lines)


def seconds_of(
    rows: Sequence[Row], milliseconds: tuple[float, ...] | None, tokens: int | None
) -> np.ndarray:
    """Return [n] seconds of each text. A simulated prefill is one more call of each model."""
    lengths = np.array([row.num_new_tokens for row in rows])
    longer = 1 if tokens is None else tokens / lengths
    if milliseconds is None:
        prefills = np.array([row.prefill_seconds for row in rows])
        return prefills + longer * np.array([row.decode_seconds for row in rows])
    target, draft = (each / 1000 for each in milliseconds)
    target_calls = longer * np.array([row.target_calls for row in rows])
    draft_calls = longer * np.array([row.draft_calls for row in rows])
    return target * (target_calls + 1) + draft * (draft_calls + (draft_calls > 0))


def hours_of(
    seconds: np.ndarray, num_texts: int, num_processes: int, start: float
) -> tuple[float, float]:
    """Return the hours until the last process ends, and the idle share of all processes' time."""
    texts = np.random.default_rng(0).choice(seconds, num_texts)
    of_process = np.array([texts[i::num_processes].sum() for i in range(num_processes)]) + start
    return float(of_process.max()) / 3600, float(1 - of_process.mean() / of_process.max())


def number(name: str, text: str, least: float) -> float:
    try:
        value = float(text)
    except ValueError:
        value = float("nan")
    if not least <= value < 1e9:
        raise ConfigError(f"{name} must be a number >= {least:g} (got {text}); mend it")
    return value


if __name__ == "__main__":
    raise SystemExit(exit_code(main))
