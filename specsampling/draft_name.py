"""A draft by its name, as configurations and methods write it. It imports no torch.

ngram                     a lookup in the text so far
embedded:smollm2-135m     a model, by a spec that `models.load` takes
target-layers:4           a model that is the target's first layers
greedy:MODEL              a model that proposes its most probable tokens, also when sampling
ngram+MODEL               a lookup, and where it finds nothing a model
"""

from __future__ import annotations

from typing import NamedTuple

# By its name, where a lookup's class is. It is made with speculation.ngram_max and ngram_min.
LOOKUPS = {
    "ngram": "specsampling.method.drafts:NgramDraft",
}
TARGET_LAYERS = "target-layers:"
GREEDY = "greedy:"


class DraftName(NamedTuple):
    """The parts of a draft's name."""

    lookup: str  # a key of `LOOKUPS`, or ""
    model: str  # a model's spec, `target-layers:N`, or ""
    is_greedy: bool  # whether the model proposes its most probable tokens also when sampling

    @classmethod
    def parse(cls, name: str) -> DraftName:
        lookup, plus, model = name.partition("+")
        if lookup not in LOOKUPS or (plus and not model):
            lookup, model = "", name
        return cls(lookup, model.removeprefix(GREEDY), model.startswith(GREEDY))

    @property
    def spec(self) -> str:
        """The spec of the model that is loaded for this draft; "" if none is."""
        return "" if self.model.startswith(TARGET_LAYERS) else self.model
