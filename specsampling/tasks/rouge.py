"""Computes ROUGE (Lin 2004) behind evaluate's interface, with nothing fetched from the hub.

`evaluate.load("rouge")` runs a script from the hub. This class needs only the packages
`evaluate` and `rouge-score`. It knows texts, and neither rows nor files.

The scorer's tokenizer keeps the letters a to z and digits only. It drops a text in another script
whole, so two equal texts score 0. `num_unreadable` counts such texts.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterable, Sequence
from statistics import fmean
from typing import Any

import evaluate
from datasets import Features, Value
from rouge_score.rouge_scorer import RougeScorer

from specsampling.results.metrics import ROUGE_NAMES


class Rouge(evaluate.Metric):
    """The F1 of rouge1, rouge2 and rougeL, with stemmed words, as `rouge_score` computes them.

    `compute(predictions=..., references=...)` gives {"rouge1": mean over the samples, ...}, and
    with `use_aggregator=False` {"rouge1": [one per sample], ...}; all in [0, 1].

    Differs from `evaluate.load("rouge")`: words are stemmed unless `use_stemmer=False`. The mean
    is the samples' own, not the random middle of a bootstrap. There is no rougeLsum. A reference
    is one text.
    """

    def __init__(self) -> None:
        # evaluate makes its cache folder even if, as here, nothing is kept in it.
        with tempfile.TemporaryDirectory() as folder:
            super().__init__(keep_in_memory=True, cache_dir=folder)

    def add_batch(
        self, *, predictions: Sequence[str], references: Sequence[str], **options: Any
    ) -> None:
        """Add samples. A lone surrogate, which no encoding can hold, becomes a "?"."""
        super().add_batch(
            predictions=[_encodable(text) for text in predictions],
            references=[_encodable(text) for text in references],
            **options,
        )

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description="ROUGE F1 with Porter stemming",
            citation="Lin 2004, ROUGE: A Package for Automatic Evaluation of Summaries",
            features=Features({"predictions": Value("string"), "references": Value("string")}),
        )

    def _compute(
        self,
        predictions: Sequence[str],
        references: Sequence[str],
        use_aggregator: bool = True,
        use_stemmer: bool = True,
    ) -> dict[str, Any]:
        scorer = RougeScorer(list(ROUGE_NAMES), use_stemmer=use_stemmer)
        scores = [scorer.score(*pair) for pair in zip(references, predictions, strict=True)]
        samples: dict[str, list[float]] = {
            name: [score[name].fmeasure for score in scores] for name in ROUGE_NAMES
        }
        if not use_aggregator:
            return samples
        return {name: fmean(values) for name, values in samples.items()}


def num_unreadable(texts: Iterable[str]) -> int:
    """Count the texts of which the tokenizer drops more than half of the letters and digits."""
    return sum(
        2 * len(re.findall("[a-z0-9]", text.lower())) < sum(map(str.isalnum, text))
        for text in texts
    )


def _encodable(text: str) -> str:
    return text.encode(errors="replace").decode()
