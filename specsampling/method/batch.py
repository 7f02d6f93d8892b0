"""Several texts at once: their decoders take turns, and what they ask of one model is one call.

Each text has a decoder of its own, the same functions as for one text, running as a greenlet: where
it would call a model, it is set aside until the others wait too, and then their tokens go through
the model together, each text over its own part of the cache and at its own length. So texts accept
different numbers of tokens, and end when they end; the next one takes the place.

Knows nothing of drafts, sampling or verifying.
"""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, TypeVar

import torch
from greenlet import getcurrent, greenlet
from torch import Tensor
from transformers import PreTrainedModel

from specsampling.method.forward import RUNNER
from specsampling.method.step import Buffers, decode_step

Result = TypeVar("Result")
BLOCK = 64  # capacities are multiples of it: whole blocks for the kernels


class Request(NamedTuple):
    """A call that a text waits for."""

    runner: BatchRunner
    place: int
    ids: Tensor  # [rows]
    positions: Tensor  # [rows]


@dataclass(frozen=True, order=True)
class Done:
    """A text that has ended.

    Attributes:
        index: of its job.
        result: what the job returned.
        share: of the time between its start and its end, what is its own: each moment belongs to
            the texts that were open then, in equal parts.
    """

    index: int
    result: Any
    share: float


class BatchRunner:
    """A model's decode step for several texts; see `forward.Runner`.

    Attributes:
        capacity: of each text's part of the cache.
        num_places: how many texts there can be at once.
        widest: of their calls, in rows.
        width: rows of calls that always cover all places, so that a row's bits do not depend on how
            many texts are open; None for calls that are as large as need be.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        num_places: int,
        capacity: int,
        widest: int,
        width: int | None = None,
    ):
        self.capacity = capacity
        self.widest = widest
        self.width = width
        self.num_places = num_places
        config: Any = model.config
        self.size = config.num_hidden_layers * config.hidden_size**2  # its calls' order
        self._model = model
        self._all = Buffers.of(model, capacity, num_places)
        self._places = [
            Buffers(*([layer[i : i + 1] for layer in layers] for layers in self._all))
            for i in range(num_places)
        ]
        self._owners: list[weakref.ref | None] = [None] * num_places

    def num_rows(self, needed: int) -> int:
        return min(needed, self.widest)

    def buffers(self, capacity: int, owner: object) -> Buffers:
        """A free place's."""
        for place, old in enumerate(self._owners):
            if old is None or old() is None:
                self._owners[place] = weakref.ref(owner)
                for tensor in (*self._places[place].keys, *self._places[place].values):
                    tensor.zero_()  # a nan of the last text's would outlive it
                return self._places[place]
        raise RuntimeError(f"more than {self.num_places} texts at once")

    def __call__(self, ids: Tensor, positions: Tensor, buffers: Buffers) -> Tensor:
        place = next(i for i, known in enumerate(self._places) if known is buffers)
        request = Request(self, place, ids, positions)
        hub = getcurrent().parent
        return self.run([request])[0] if hub is None else hub.switch(request)

    def run(self, requests: Collection[Request]) -> list[Tensor]:
        """Logits of each request, [rows, V], from one call.

        Requests of fewer rows are padded behind their tokens, which is overwritten before any row
        sees it. Places without a request, up to the last that has one or all of them (see `width`),
        are fed a token at the very end of their part of the cache, where no text's tokens come (see
        `install`).
        """
        by_place = {request.place: request for request in requests}
        num_rows = max(len(request.ids) for request in requests)
        steps = torch.arange(num_rows, device=self._model.device)
        ids, positions = [], []
        is_whole = num_rows == self.width
        for place in range(self.num_places if is_whole else max(by_place) + 1):
            if place in by_place:
                asked = by_place[place]
                start = asked.positions[0]
                padding = asked.ids[-1:].expand(num_rows - len(asked.ids))
                ids.append(torch.cat([asked.ids, padding]))
            else:
                start = torch.tensor(self.capacity - num_rows, device=steps.device)
                ids.append(torch.zeros_like(steps))
            positions.append(start + steps)
        buffers = Buffers(*([layer[: len(ids)] for layer in layers] for layers in self._all))
        logits = decode_step(self._model, torch.stack(ids), torch.stack(positions), buffers)
        return [logits[request.place, : len(request.ids)] for request in requests]


def install(
    model: PreTrainedModel,
    num_places: int,
    longest: int,
    widest: int,
    width: int | None = None,
) -> BatchRunner:
    """Give a model a runner for several texts, in place of any that it has.

    Args:
        model: one that `step.has_step`.
        num_places: how many texts there can be at once.
        longest: of them, in tokens.
        widest: of their calls, in rows. So many positions stay free behind the longest text and
            the padding of its last call.
        width: rows of calls that are made bit-exact, if any.
    """
    capacity = -(-(longest + 2 * widest) // BLOCK) * BLOCK
    runner = BatchRunner(model, num_places, capacity, widest, width)
    model.__dict__[RUNNER] = runner
    return runner


class _Open:
    """A text under way."""

    def __init__(self, index: int, job: Callable[[], Any]):
        self.index = index
        self.turn = greenlet(job)
        self.started = time.perf_counter()
        self.seconds = 0.0  # its own
        self.request: Request | None = None


def decode_together(jobs: Iterable[Callable[[], Result]], size: int) -> Iterator[Done]:
    """Run jobs, up to `size` at once, whose models' runners are `BatchRunner`s.

    Which model is called when several are waited for: the smallest, so that a target is called
    when all texts have drafted.

    Args:
        jobs: each decodes a text.
        size: how many are open at once.

    Returns:
        What became of each, in the order in which they ended.
    """
    pending = enumerate(jobs)
    texts: list[_Open] = []
    clock = time.perf_counter()
    while True:
        ended: list[Done] = []
        while len(texts) < size and (following := next(pending, None)) is not None:
            texts.append(_Open(*following))
            ended += _resume(texts, texts[-1], texts[-1].turn.switch)
        if not texts and not ended:
            return
        if texts and all(text.request for text in texts):
            answers = _answers(texts)
            now = time.perf_counter()
            for text in texts:
                text.seconds += (now - clock) / len(texts)
            clock = now
            for text, answer in answers:
                ended += _resume(texts, text, answer)
            del answers
        yield from ended


def _answers(texts: list[_Open]) -> list[tuple[_Open, Callable[[], Any]]]:
    """Make one call for all who wait for the smallest model; how each of these goes on."""
    runners = {text.request.runner for text in texts if text.request}
    runner = min(runners, key=lambda runner: runner.size)
    asking = [text for text in texts if text.request and text.request.runner is runner]
    try:
        with torch.inference_mode():
            logits = runner.run([text.request for text in asking if text.request])
    except (RuntimeError, MemoryError) as error:  # each decoder's to deal with
        return [(text, partial(text.turn.throw, type(error), str(error))) for text in asking]
    return [(text, partial(text.turn.switch, rows)) for text, rows in zip(asking, logits)]


def _resume(texts: list[_Open], text: _Open, go_on: Callable[[], Any]) -> list[Done]:
    """Let a text go on until it waits again, or has ended."""
    with torch.inference_mode():  # of the thread, not of the greenlet: the same for all of them
        given = go_on()
    if not text.turn.dead:
        text.request = given
        return []
    texts.remove(text)
    return [Done(text.index, given, text.seconds / (time.perf_counter() - text.started))]
