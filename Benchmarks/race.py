"""Draw docs/race.svg: how target and draft run the same race for one position.

    python Benchmarks/race.py

Two positions of one text, with the same two distributions at both. The noise is the one that a run
draws with (`specsampling/method/noise.py`).
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np

from specsampling.console import PROJECT, Parser, exit_code
from specsampling.method.distribution import Few
from specsampling.method.noise import Noise, uniforms_at
from specsampling.results.figures import DARK, LIGHT, MIDDLE, new_figure, save_figure

WORDS = ["the", "a", "its", "one", "two"]
TARGET = np.array([0.40, 0.28, 0.16, 0.10, 0.06])
DRAFT = np.array([0.24, 0.40, 0.10, 0.20, 0.06])
NOISE = Noise.of("docs", "race", 0)
MOST = 8  # positions looked at for an example


def times_at(position: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """E(v), E(v) / p(v) and E(v) / q(v) of every token."""
    tokens = np.arange(len(WORDS), dtype=np.uint64)
    noise = -np.log1p(-uniforms_at(NOISE.key, position, tokens))
    return noise, noise / TARGET, noise / DRAFT


def winners(position: int) -> tuple[int, int]:
    """Which token the target draws there, and which one the draft does."""
    found = [NOISE.winner(Few(dict(enumerate(p.tolist()))), position) for p in (TARGET, DRAFT)]
    return found[0], found[1]


def main(arguments: Sequence[str] | None = None) -> int:
    Parser(__doc__).parse_args(arguments)
    is_same = [winners(position)[0] == winners(position)[1] for position in range(MOST)]
    figure, _ = new_figure(3)
    figure.clear()
    figure.set_size_inches(10, 5.6)
    panels = figure.subplots(2, 3, sharey="col")
    for row, position in zip(panels, (is_same.index(True), is_same.index(False))):
        noise, target, draft = times_at(position)
        by_target, by_draft = winners(position)
        bars = [(TARGET, DRAFT), (noise,), (target, draft)]
        for axes, values in zip(row, bars):
            for i, (heights, colour) in enumerate(zip(values, (DARK, MIDDLE))):
                places = np.arange(len(WORDS)) + (0.4 * i - 0.2 if len(values) > 1 else 0)
                name = ("target", "draft")[i] if len(values) > 1 else "both"
                fill = colour if len(values) > 1 else LIGHT
                axes.bar(places, heights, 0.4, color=fill, edgecolor=DARK, label=name)
            axes.set_xticks(range(len(WORDS)), WORDS)
            axes.spines[["top", "right"]].set_visible(False)
        row[2].set_yscale("log")
        for token, times, shift in ((by_target, target, -0.2), (by_draft, draft, 0.2)):
            row[2].plot(token + shift, times[token], "v", color="black", markersize=8)
        verdict = "accepted" if by_target == by_draft else "replaced"
        row[2].set_xlabel(f"target: {WORDS[by_target]}, draft: {WORDS[by_draft]}; {verdict}")
        row[0].set_ylabel(f"position {position}")
    for axes, title in zip(
        panels[0], ("probability", "noise E, the same for both", "time E / probability; ▼ wins")
    ):
        axes.set_title(title, fontsize="medium")
    panels[0][0].legend(frameon=False)
    save_figure(figure, PROJECT / "docs", "race")
    return 0


if __name__ == "__main__":
    raise SystemExit(exit_code(main))
