"""Captures a model's decode step on a GPU, for calls of a few sizes.

A decode call of a small model is hundreds of short operations, each launched on its own. Here the
whole step is captured as a CUDA graph, for each number of rows, and launched at once. The model
with its graphs is a runner (`method/forward.py`), so both decoders gain.
"""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel

from specsampling.method.batch import BLOCK
from specsampling.method.forward import Model, Runner, is_exact
from specsampling.method.session import Session
from specsampling.method.step import Buffers, decode_step, has_step
from specsampling.models.errors import ModelError, is_out_of_memory, reason
from specsampling.models.exactness import TOLERANCES
from specsampling.models.kernel_model import kernel_library

Mode = Literal["auto", "on", "off"]


def make_static(
    model: Model,
    mode: Mode,
    capacity: int,
    sizes: Collection[int],
    report: Callable[[str], None],
) -> tuple[Model, str]:
    """Put a model into a runner for calls of a few sizes, if that is asked for and possible.

    Args:
        model: on its device, its layers as they will stay.
        mode: "on" must succeed, "auto" says why it did not, "off" does nothing.
        capacity: the longest text to come, in tokens.
        sizes: numbers of rows; what a call feeds is padded to the next.
        report: is called with one line before each step that takes long.

    Returns:
        The runner and what was done, or the model and why nothing was done. With "on", the second
            is a ModelError.
    """
    if is_exact(model):
        return model, f"the CPU kernel ({kernel_library().kind().decode()})"
    assert isinstance(model, PreTrainedModel)
    start = time.perf_counter()
    problem = ""
    if mode == "off":
        problem = "decoding.compile: off"
    elif model.device.type != "cuda":
        problem = f"nothing is captured on {model.device.type}"
    elif not has_step(model):
        problem = f"{model.config.model_type} models keep transformers' forward"
    else:
        capacity = -(-(capacity + max(sizes)) // BLOCK) * BLOCK
        runner = GraphRunner(model, capacity, sizes)
        try:
            _prove(runner, report)
        except Exception as error:  # a capture can fail in any way
            if is_out_of_memory(error):
                raise
            problem = reason(error)
    if not problem:
        rows = " and ".join(map(str, sorted(sizes)))
        seconds = time.perf_counter() - start
        return runner, f"captured for calls of {rows} rows ({seconds:.0f} s, not counted)"
    if mode == "on":
        raise ModelError(
            f"decoding.compile on cannot be had ({problem}); choose auto, which decodes eagerly "
            "then, or off"
        )
    return model, f"eager ({problem})"


def _prove(runner: GraphRunner, report: Callable[[str], None]) -> None:
    """Make a runner ready. Raise a RuntimeError if its logits differ from the eager step's."""
    embeddings: Any = runner.get_input_embeddings()
    for size in runner.sizes:
        tokens = [(7919 * i + 1) % embeddings.num_embeddings for i in range(size)]
        eager = Session(runner.model, size, width=size).score(tokens, last=size).float()
        report(f"capturing calls of {size} rows ...")
        ours = Session(runner, size, width=size).score(tokens, last=size).float()
        is_scored = eager.isfinite()  # a trimmed head leaves tokens out
        away = (ours - eager).masked_fill(~is_scored, 0.0).norm()
        error = float(away / eager.masked_fill(~is_scored, 0.0).norm())
        if not error < TOLERANCES[torch.bfloat16]:
            raise RuntimeError(f"calls of {size} rows give other logits, by {error:.1%}")


@dataclass
class _Place:
    """Buffers at fixed addresses, the calls captured over them, and their present owner."""

    buffers: Buffers
    owner: weakref.ref
    calls: dict[int, Callable[[Tensor, Tensor], Tensor]] = field(default_factory=dict)


class GraphRunner(Runner):
    """A runner of CUDA graphs, one for each number of rows and each open text."""

    def __init__(self, model: PreTrainedModel, capacity: int, sizes: Collection[int]):
        super().__init__(model, capacity)
        self.sizes = sorted(sizes)
        self._places: list[_Place] = []

    def num_rows(self, needed: int) -> int:
        return next((size for size in self.sizes if size >= needed), self.sizes[-1])

    def buffers(self, capacity: int, owner: object) -> Buffers:
        for place in self._places:
            if place.owner() is None and place.buffers.keys[0].shape[2] == capacity:
                place.owner = weakref.ref(owner)
                for tensor in (*place.buffers.keys, *place.buffers.values):
                    tensor.zero_()  # a nan of the last text would remain
                return place.buffers
        self._places.append(_Place(Buffers.of(self.model, capacity), weakref.ref(owner)))
        return self._places[-1].buffers

    def __call__(self, ids: Tensor, positions: Tensor, buffers: Buffers) -> Tensor:
        place = next(place for place in self._places if place.buffers is buffers)
        if len(ids) not in place.calls:
            place.calls[len(ids)] = self._capture(ids, positions, buffers)
        return place.calls[len(ids)](ids, positions)

    def _capture(
        self, ids: Tensor, positions: Tensor, buffers: Buffers
    ) -> Callable[[Tensor, Tensor], Tensor]:
        """Capture a call of as many rows as `ids` has, over these buffers."""
        ids, positions = ids.clone(), positions.clone()
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2):  # kernels are chosen and workspaces made outside of the graph
                decode_step(self.model, ids, positions, buffers)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            logits = decode_step(self.model, ids, positions, buffers)

        def replay(new_ids: Tensor, new_positions: Tensor) -> Tensor:
            ids.copy_(new_ids)
            positions.copy_(new_positions)
            graph.replay()
            return logits.clone()  # the next replay writes over it

        return replay
