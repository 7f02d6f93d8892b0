"""Test whether a row's bits depend on how tokens are grouped into calls, for `bit_exact`.

    python Benchmarks/exactness.py

The script feeds the same tokens one by one and in random groups, in calls of one width. It counts
the rows of logits that are bitwise equal, with attention over the cache's whole capacity as in the
sessions. Attention over the filled part only shows what breaks equality. The models are the
embedded target and four architectures with random weights, and PyTorch decodes them. A run takes
minutes on two cores. The rows go to Results/exactness.jsonl.
"""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

if __name__ == "__main__":
    from specsampling.edge import catch_signals

    catch_signals()

import torch
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPTNeoConfig,
    LlamaConfig,
    Qwen2Config,
)

from specsampling.console import Parser, exit_code
from specsampling.method.forward import Model
from specsampling.method.session import Session
from specsampling.models.attention import group_heads
from specsampling.models.checkpoint import load_model
from specsampling.models.load import resolve_device
from specsampling.provenance import device_name

OUTPUT = Path("Results/exactness.jsonl")
VOCAB = 1000
NUM_ROWS = 40
CONTEXTS = (37, 300, 505, 700)
CONFIGS = {
    "Llama, 2,048 wide": LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=2048,
        intermediate_size=5632,
        num_hidden_layers=2,
        num_attention_heads=32,
        num_key_value_heads=4,
    ),
    "Qwen2, 896 wide": Qwen2Config(
        vocab_size=VOCAB,
        hidden_size=896,
        intermediate_size=4864,
        num_hidden_layers=3,
        num_attention_heads=14,
        num_key_value_heads=2,
    ),
    "GPT-Neo, 768 wide": GPTNeoConfig(
        vocab_size=VOCAB,
        hidden_size=768,
        num_layers=4,
        num_heads=12,
        attention_types=[[["global", "local"], 2]],
        bos_token_id=None,
        eos_token_id=None,
    ),
    "GPT-2, 768 wide": GPT2Config(
        vocab_size=VOCAB, n_layer=3, bos_token_id=None, eos_token_id=None
    ),
}


class FilledPartSession(Session):
    """A session that attends over the filled part of the cache, which grows with every call."""

    def _padded_call(self, ids: list[int]) -> torch.Tensor:
        return self._forward.over_filled(ids, self.length, len(ids))


def score(session: Session, tokens: list[int], context: int, groups: list[int]) -> torch.Tensor:
    """Return [NUM_ROWS, V] logits of the tokens after `context`, scored in these groups."""
    session.prefill(tokens[:context])
    rows, end = [], context
    for size in groups:
        end += size
        rows.append(session.score(tokens[:end], last=size))
    return torch.cat(rows)


def count_equal(model: Model, kind: type[Session], width: int) -> int:
    """Count the rows that have the same bits alone and in random groups."""
    chooser, num_equal = random.Random(0), 0
    for context in CONTEXTS:
        generator = torch.Generator().manual_seed(context)
        tokens = torch.randint(VOCAB, (context + NUM_ROWS,), generator=generator).tolist()
        groups: list[int] = []
        while sum(groups) < NUM_ROWS:
            groups.append(min(chooser.randint(1, width), NUM_ROWS - sum(groups)))
        capacity = context + NUM_ROWS
        alone = score(kind(model, capacity, width), tokens, context, [1] * NUM_ROWS)
        grouped = score(kind(model, capacity, width), tokens, context, groups)
        num_equal += int((alone == grouped).all(dim=-1).sum())
    return num_equal


def models(dtype: torch.dtype, device: torch.device) -> Iterator[tuple[str, Model]]:
    """Models on PyTorch's path: rows of the CPU kernel never meet in any case."""
    yield "SmolLM2-135M-Instruct", load_model("embedded:smollm2-135m", dtype, device, compile="off")
    for name, config in CONFIGS.items():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config).to(device, dtype).eval()
        group_heads(model)
        yield name, model


def main(arguments: Sequence[str] | None = None) -> int:
    parser = Parser(__doc__)
    parser.add_argument("--output", type=Path, default=OUTPUT, help=f"rows (default: {OUTPUT})")
    options = parser.parse_args(arguments)
    device = resolve_device("auto")
    rows = []
    for dtype in (torch.bfloat16, torch.float32):
        for name, model in models(dtype, device):
            for width in (8, 16):
                row = {
                    "model": name,
                    "precision": str(dtype).removeprefix("torch."),
                    "width": width,
                    "whole capacity": count_equal(model, Session, width),
                    "filled part only": count_equal(model, FilledPartSession, width),
                    "of": NUM_ROWS * len(CONTEXTS),
                    "machine": f"{device_name(device)}, torch {torch.__version__}",
                }
                rows.append(row)
                print(*row.values(), sep="  ", flush=True)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return 0


if __name__ == "__main__":
    raise SystemExit(exit_code(main))
