"""Benchmarks/scale.py: the slowest process ends the run."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from helpers import refused
from test_notebooks import write_results
from test_records import ROW

from Benchmarks import scale

SECONDS = {"token_ids": [1] * 10, "prefill_seconds": 1.0}
ROWS = [
    dataclasses.replace(ROW, example_id=str(i), decode_seconds=2.0 + i, **SECONDS, **method)
    for method in (
        {"method": "autoregressive", "target_calls": 10, "draft_calls": 0},
        {"method": "speculative", "target_calls": 4, "draft_calls": 12},
    )
    for i in range(3)
]


def test_texts_are_dealt_and_the_slowest_ends_the_run():
    seconds = np.full(5, 3600.0)
    assert scale.hours_of(seconds, 10, 1, 0) == (10, 0)
    assert scale.hours_of(seconds, 10, 4, 3600) == (4, pytest.approx(1 - 3.5 / 4))
    assert scale.hours_of(seconds, 3, 64, 0)[0] == 1


def test_measured_or_simulated(tmp_path, capsys):
    path = write_results(tmp_path, ROWS, "results2")
    assert scale.main([str(path), "--texts", "100"]) == 0
    printed = capsys.readouterr().out
    assert "seconds are measured" in printed and "900" in printed  # 3600 / (1 + 2 + 1)
    assert scale.main([str(path), "--target-ms", "100", "--draft-ms", "50"]) == 0
    printed = capsys.readouterr().out
    assert "simulated" in printed
    assert f"{3600 / 1.1:.0f}" in printed and f"{3600 / (0.5 + 0.65):.0f}" in printed


def test_longer_texts_go_on_at_their_pace():
    rows = [row for row in ROWS if row.method == "speculative"]  # 10 tokens each
    assert list(scale.seconds_of(rows, None, 20)) == [1 + 2 * (2.0 + i) for i in range(3)]
    assert scale.seconds_of(rows, (100, 50), 20) == pytest.approx(0.1 * 9 + 0.05 * 25)


@pytest.mark.parametrize("option", ["--texts", "--tokens", "--processes", "--target-ms", "--start"])
def test_a_wrong_number_is_one_line(option, tmp_path, capsys):
    path = write_results(tmp_path, ROWS, "results2")
    assert refused(scale.main, [path, option, "-1"], capsys)
