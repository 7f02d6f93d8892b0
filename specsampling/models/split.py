"""Splits a target over several GPUs if the first one cannot hold it.

accelerate chooses the GPU of each layer, and moves what passes from one GPU to the next. It is told
the free memory, less the memory that the caches and the draft will take. Layers in the machine's
own memory are read anew for each call, which is very slow, so they stay there only on request.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from transformers import PreTrainedModel

from specsampling.models.errors import ModelError
from specsampling.models.estimate import Lengths, Planned, need_of
from specsampling.models.memory import available_bytes, gigabytes

SPLIT = "auto-split"
SPLIT_OFFLOAD = "auto-split-offload"


def split_target(
    target: Planned,
    drafts: Sequence[Planned],
    lengths: Lengths,
    free: Mapping[int, int],
    asked: str,
) -> dict[str, int | str] | None:
    """Choose where each part of a target goes; None if the first GPU holds target and drafts.

    Args:
        target, drafts, lengths: as `estimate.need_of` takes them.
        free: bytes of each GPU. A target that they cannot hold is a ModelError.
        asked: `SPLIT` or `SPLIT_OFFLOAD`.
    """
    device = torch.device("cuda", min(free))
    alone = need_of(target, [], device, lengths)
    beside = need_of(target, drafts, device, lengths)
    places = device_map(
        target.outline,
        free,
        reserved=beside.total - alone.weights - alone.caches,
        caches=alone.caches,
        weights=alone.weights,
        machine=available_bytes() if asked == SPLIT_OFFLOAD else 0,
    )
    return None if set(places.values()) == {min(free)} else places


def device_map(
    model: PreTrainedModel,
    free: Mapping[int, int],
    reserved: int,
    caches: int,
    weights: int,
    machine: int = 0,
) -> dict[str, int | str]:
    """Choose where each part of a target goes.

    Args:
        model: the target's `estimate.outline`.
        free: bytes of each GPU.
        reserved: bytes of the first GPU for the draft and calls.
        caches, weights: bytes of the target's caches and weights, in the precision to come.
        machine: bytes of the machine's own memory that layers may take; 0 allows none.

    Raises:
        ModelError: the GPUs cannot hold the target.
    """
    from accelerate import infer_auto_device_map

    share = weights / (weights + caches)  # the weights' share of a layer's bytes
    limits: dict[int | str, float] = {
        gpu: share * max(0, size - (reserved if gpu == min(free) else 0))
        for gpu, size in free.items()
    }
    unquantized = sum(part.numel() * part.element_size() for part in set(model.parameters()))
    scale = unquantized / weights  # accelerate counts the outline's own precision
    places: dict[str, int | str] = infer_auto_device_map(
        model,
        {where: int(size * scale) for where, size in (limits | {"cpu": machine}).items()},
        list(model._no_split_modules or ()),
    )
    used = set(places.values())
    if "disk" in used or ("cpu" in used and not machine):
        raise ModelError(
            f"models.device {SPLIT}: the target needs {gigabytes(weights + caches)} with caches, "
            f"and the GPUs have {gigabytes(sum(free.values()) - reserved)} free beside the draft; "
            f"choose int8 or nf4, shorter texts, or {SPLIT_OFFLOAD}, which keeps the rest in "
            "the machine's memory and is many times as slow"
        )
    return places
