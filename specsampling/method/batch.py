"""Decodes several texts at once. Their decoders take turns, and share each call of a model.

Each text is decoded in a thread of its own, by the same functions as a single text. Only one thread
runs at a time. A thread that needs a call waits until all the others wait too. Then one call takes
the tokens of all texts. Each text has its own cache and length, so texts may accept different
numbers of tokens. When a text ends, the next one takes its place.

This module knows nothing of drafts, sampling or verifying.
"""

from __future__ import annotations

import threading
import time
import weakref
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor
from transformers import PreTrainedModel

from specsampling.method.forward import Runner
from specsampling.method.step import Buffers, decode_step

Result = TypeVar("Result")
BLOCK = 64  # capacities are multiples of it: whole blocks for the kernels


class Caller(Protocol):
    """A model that takes the calls of several texts as one."""

    size: int  # a measure by which a draft is smaller than its target

    def run(self, calls: list[Any]) -> list[Tensor]:
        """Answer each call."""


class Call(NamedTuple):
    """One text's rows in a call of a `BatchRunner`."""

    place: int
    ids: Tensor  # [rows]
    positions: Tensor  # [rows]


class Stopped(BaseException):
    """Tells a text's thread to end, because nobody waits for the text any more."""


def ask(caller: Caller, call: Any) -> Tensor:
    """Make a call, together with the calls of the other open texts, if there are any."""
    text = getattr(_own_thread, "text", None)
    return caller.run([call])[0] if text is None else text.ask(caller, call)


_own_thread = threading.local()  # its `text` is the one that the thread decodes


@dataclass(frozen=True, order=True)
class Done:
    """A text that has ended."""

    index: int  # the place of its job among the jobs
    result: Any  # what the job returned
    # The text's own part of the time between its start and its end. Each moment is divided equally
    # among the texts that were open then.
    share: float


class BatchRunner(Runner):
    """A model that decodes several texts at once; see `forward.Runner`.

    Args:
        model: one for which `step.has_step` is true.
        num_places: the most texts at once.
        longest: the number of tokens of the longest text.
        widest: the most rows that a text has in a call. The same number of positions stays free
            behind the longest text and the padding of its last call.
        width: rows per text in the calls that cover all places. In such calls a row's bits do not
            depend on how many texts are open. None if all calls are only as large as needed.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        num_places: int,
        longest: int,
        widest: int,
        width: int | None = None,
    ):
        capacity = -(-(longest + 2 * widest) // BLOCK) * BLOCK
        super().__init__(model, capacity)
        self.widest = widest
        self.width = width
        self.num_places = num_places
        config: Any = model.config
        self.size = config.num_hidden_layers * config.hidden_size**2  # see `Caller`
        self._all = Buffers.of(model, capacity, num_places)
        self._places = [
            Buffers(*([layer[i : i + 1] for layer in layers] for layers in self._all))
            for i in range(num_places)
        ]
        self._owners: list[weakref.ref | None] = [None] * num_places

    def num_rows(self, needed: int) -> int:
        return min(needed, self.widest)

    def buffers(self, capacity: int, owner: object) -> Buffers:
        """Return the buffers of a free place, and keep the place for `owner`."""
        for place, old in enumerate(self._owners):
            if old is None or old() is None:
                self._owners[place] = weakref.ref(owner)
                for tensor in (*self._places[place].keys, *self._places[place].values):
                    tensor.zero_()  # a nan of the last text would remain
                return self._places[place]
        raise RuntimeError(f"more than {self.num_places} texts at once")

    def __call__(self, ids: Tensor, positions: Tensor, buffers: Buffers) -> Tensor:
        place = next(i for i, known in enumerate(self._places) if known is buffers)
        return ask(self, Call(place, ids, positions))

    def run(self, calls: Collection[Call]) -> list[Tensor]:
        """Return the logits of each text's rows, [rows, V], from one call.

        Texts with fewer rows are padded behind their tokens. Padding is overwritten before any row
        sees it. The call covers the places up to the last one asked for, or all (see `width`). A
        place without a request is fed tokens at the very end of its cache, which texts never reach.
        """
        by_place = {call.place: call for call in calls}
        num_rows = max(len(call.ids) for call in calls)
        steps = torch.arange(num_rows, device=self.device)
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
        logits = decode_step(self.model, torch.stack(ids), torch.stack(positions), buffers)
        return [logits[call.place, : len(call.ids)] for call in calls]


class _Open:
    """A text under way, in a thread that runs only while it is resumed."""

    def __init__(self, index: int, job: Callable[[], Any]):
        self.index = index
        self.started = time.perf_counter()
        self.seconds = 0.0  # its own part of the time, as in `Done`
        self.asked: tuple[Caller, Any] | None = None
        self.result: Any = None
        self.error: BaseException | None = None
        self.is_over = False
        self._job = job
        self._answer: Tensor | BaseException | None = None
        self._may_run, self._has_paused = threading.Semaphore(0), threading.Semaphore(0)
        self._thread = threading.Thread(target=self._decode, daemon=True)
        self._thread.start()

    def resume(self, answer: Tensor | BaseException | None = None) -> None:
        """Let the thread go on with an answer, or an error, until it asks again or is over."""
        self.asked, self._answer = None, answer
        self._may_run.release()
        self._has_paused.acquire()
        if self.is_over:
            self._thread.join()

    def ask(self, caller: Caller, call: Any) -> Tensor:
        """Wait for a call's answer. This runs in the text's own thread."""
        self.asked = caller, call
        self._has_paused.release()
        self._may_run.acquire()
        answer, self._answer = self._answer, None
        try:
            if isinstance(answer, BaseException):
                raise answer
            assert answer is not None
            return answer
        finally:
            del answer  # else an error's traceback would keep the error and the text's cache

    def _decode(self) -> None:
        self._may_run.acquire()
        _own_thread.text = self
        try:
            if not isinstance(self._answer, Stopped):
                self.result = self._job()
        except BaseException as error:  # `decode_together` raises it
            self.error = error
        self.is_over = True
        self._has_paused.release()


def decode_together(jobs: Iterable[Callable[[], Result]], size: int) -> Iterator[Done]:
    """Run jobs whose models take several texts, up to `size` jobs at once.

    If texts wait for several models, the smallest model is called first. So a target is called only
    when all texts have drafted. An error in one job ends all jobs. Jobs are yielded in the order in
    which they end.
    """
    pending = enumerate(jobs)
    texts: list[_Open] = []
    clock = time.perf_counter()
    try:
        while True:
            while len(texts) < size and (following := next(pending, None)) is not None:
                texts.append(_Open(*following))
                texts[-1].resume()
            if not texts:
                return
            if all(text.asked for text in texts):
                _answer(texts)
                now = time.perf_counter()
                for text in texts:
                    text.seconds += (now - clock) / len(texts)
                clock = now
            for text in [text for text in texts if text.is_over]:
                texts.remove(text)
                if text.error is not None:
                    raise text.error
                share = text.seconds / (time.perf_counter() - text.started)
                yield Done(text.index, text.result, share)
    finally:
        for text in texts:
            if not text.is_over:
                text.resume(Stopped())


def _answer(texts: list[_Open]) -> None:
    """Make one call for all texts that wait for the smallest model, and let them go on."""
    asked = [(text, *text.asked) for text in texts if text.asked]
    caller = min((caller for _, caller, _ in asked), key=lambda caller: caller.size)
    asking = [(text, call) for text, whose, call in asked if whose is caller]
    try:
        with torch.inference_mode():
            logits = caller.run([call for _, call in asking])
    except (RuntimeError, MemoryError) as error:  # each decoder deals with it
        answers: list[Any] = [type(error)(str(error)) for _ in asking]
    else:
        answers = logits
    for text, _ in asking:
        text.resume(answers.pop(0))
