"""Benchmarks/quality.py: what each precision of a model costs, over a tiny model."""

from __future__ import annotations

import json

import torch
from conftest import make_model

from Benchmarks import quality
from specsampling.console import exit_code
from specsampling.models.checkpoint import make_fast


def test_rows_are_kept_replaced_and_shown(tmp_path, monkeypatch, capsys):
    """The table ended in a traceback after minutes of reading."""
    ids = torch.arange(60).tolist()
    monkeypatch.setattr(quality, "texts_of", lambda model: [ids[:30], ids[30:]])
    monkeypatch.setattr(quality, "model_location", lambda spec: "folder")

    def load(spec, dtype, device, kind, compile):
        return make_fast(make_model("llama").to(torch.bfloat16), "int8" if kind == "none" else kind)

    monkeypatch.setattr(quality, "load_model", load)
    output = tmp_path / "deep" / "quality.jsonl"
    for model in ("smollm2-135m", "qwen2.5-coder-0.5b", "smollm2-135m"):
        assert exit_code(quality.main, ["--model", model, "--output", str(output)]) == 0
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    assert [row["model"] for row in rows] == ["qwen2.5-coder-0.5b"] * 4 + ["smollm2-135m"] * 4
    first = rows[0]
    assert first["kl"] == 0 and first["same_top"] == 1 and first["num_positions"] == 60
    assert all(row["kl"] >= -1e-6 for row in rows) and rows[2]["kl"] > 0  # 4 bit is not 8 bit
    printed = capsys.readouterr().out
    assert printed.count("qwen2.5-coder-0.5b") == 4 + 4 and "KL from" in printed
