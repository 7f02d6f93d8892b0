"""Decodes every example with every method, and makes a row of each text.

This module sets seeds, order, timing and progress. It generates texts and does not score them. The
decoders are arguments.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import chain
from typing import Any, NamedTuple

import torch
from tqdm import tqdm

from specsampling.method.batch import decode_together
from specsampling.method.noise import Noise
from specsampling.method.sampling import Randomness
from specsampling.method.session import context_limit
from specsampling.method.text import Generation, PromptError
from specsampling.models.errors import is_out_of_memory, reason
from specsampling.models.kernel_model import fastest_race
from specsampling.models.load import Pair
from specsampling.models.memory import release_memory
from specsampling.ranks import Ranks
from specsampling.results.metrics import grouped
from specsampling.results.records import OUT_OF_MEMORY, Key, Row, Source
from specsampling.results.runfile import RunFile
from specsampling.results.shards import Shard
from specsampling.tasks.task import Example, Prompt, StopStrings, Task

MEMORY_WAYS_OUT = (
    "lower decoding.max_new_tokens or run.batch_size, choose int8 or nf4, or smaller models; a "
    "rerun tries again"
)
BLOCK = 4  # pairs for each place of a batch that a method decodes in one turn

# A method's decoder takes one prompt, a `generator` and a stop check `is_stop`.
Decode = Callable[..., Generation]


def encode_prompts(
    task: Task, pair: Pair, limit: int | None, max_new_tokens: int
) -> list[tuple[Example, Prompt]]:
    """Return the first `limit` examples with their prompts.

    If a task can cut a prompt, it cuts the prompt so that `max_new_tokens` fit into the target's
    context.

    Raises:
        PromptError: a prompt is empty, does not fit, or has ids that the target does not know.
    """
    context = context_limit(pair.target)
    if max_new_tokens >= context:
        raise PromptError(
            f"decoding.max_new_tokens must be below the target's context of {context} tokens, "
            f"which a prompt must fit too (got {max_new_tokens}); lower it"
        )
    prompts = [
        (example, task.prompt(example, pair, context - max_new_tokens, max_new_tokens))
        for example in task.examples()[:limit]
    ]
    for example, prompt in prompts:
        check_prompt(f"the prompt of {example.id}", prompt.token_ids, pair)
    return prompts


def check_prompt(name: str, token_ids: Sequence[int], pair: Pair) -> None:
    """Raise a PromptError that says why, if the target cannot decode a prompt."""
    context = context_limit(pair.target)
    if not token_ids:
        raise PromptError(
            f"{name} must have at least one token (got 0: the tokenizer drops all of its text); "
            "put words around it, or choose a model that begins its texts with a token"
        )
    if len(token_ids) >= context:
        raise PromptError(
            f"{name} must have at most {context - 1} tokens, the target's context of {context} "
            f"less one (got {len(token_ids)}); shorten it, or choose a model with a longer context"
        )
    embeddings: Any = pair.target.get_input_embeddings()
    if max(token_ids) >= embeddings.num_embeddings:
        raise PromptError(
            f"{name} must have token ids below {embeddings.num_embeddings}, the number of the "
            f"target's embeddings (got {max(token_ids)}); set models.tokenizer to the target's own"
        )


class Job(NamedTuple):
    """The work for one row of a run."""

    example: Example
    prompt: Prompt
    sample_index: int
    method: str

    @property
    def key(self) -> Key:
        return self.example.id, self.method, self.sample_index


def all_jobs(
    prompts: Sequence[tuple[Example, Prompt]], methods: Sequence[str], num_samples: int
) -> list[Job]:
    """Return a job for every row of a run, in order.

    The methods' order rotates from example to example, so that a slow moment slows all methods.
    """
    names = list(methods)
    return [
        Job(example, prompt, sample_index, name)
        for turn, (example, prompt) in enumerate(prompts)
        for sample_index in range(num_samples)
        for name in names[turn % len(names) :] + names[: turn % len(names)]
    ]


def _pairs(jobs: Iterable[Job]) -> list[list[Job]]:
    """Return the jobs of each (example, sample) pair."""
    return list(grouped(((job.example.id, job.sample_index), job) for job in jobs).values())


def share_of(jobs: Sequence[Job], ranks: Ranks) -> list[Job]:
    """Return a rank's jobs. Pairs of example and sample are dealt in turn, with all methods."""
    return [job for pair in _pairs(jobs)[ranks.index :: ranks.count] for job in pair]


def groups_of(jobs: Sequence[Job], batch_size: int) -> Iterator[list[Job]]:
    """Yield groups of jobs that are decoded together: one method over a block of pairs.

    A block has more pairs than a batch has places, because some texts end early.
    """
    pairs, size = _pairs(jobs), BLOCK * batch_size
    for start in range(0, len(pairs), size):
        block = chain(*pairs[start : start + size])
        yield from grouped((job.method, job) for job in block).values()


def run(
    pair: Pair,
    task: Task,
    prompts: Sequence[tuple[Example, Prompt]],
    methods: dict[str, Decode],
    run_file: RunFile | Shard,
    *,
    seed: int,
    num_samples: int = 1,
    warmup: int = 0,
    batch_size: int = 1,
    positional: Collection[str] = (),
    ranks: Ranks | None = None,
) -> None:
    """Decode every example with every method, and append a row for each as it is finished.

    Rows that the file already has are skipped. If memory runs out for a text, its row says so, and
    the run goes on.

    Args:
        pair, task, prompts: the models, and the texts that they decode.
        methods: the decoders by name, in the order of the table.
        seed: the seed of the whole run; see `sample_seed`.
        num_samples: texts per example and method.
        warmup: how many examples each method decodes before the run; these texts are discarded.
        batch_size: how many texts are decoded at once. They share the seconds equally.
        positional: the methods that draw each token with the noise of its position.
        ranks: this process's place among several; None for a single process.

    Raises:
        RecordsError: a row cannot be written, or the file has rows of other prompts or data.
    """
    run_file.require_same_examples(
        {example.id: Source.of(prompt.token_ids, example.reference) for example, prompt in prompts}
    )
    names = list(methods)
    jobs = all_jobs(prompts, names, num_samples)
    pending = [job for job in jobs if job.key not in run_file.done]
    mine = share_of(pending, ranks) if ranks else pending
    decode = partial(decode_row, pair, task, methods, seed, positional)
    progress = Progress(run_file.rows, names)
    num_existing = len(jobs) - len(pending)
    with tqdm(total=len(jobs), initial=num_existing, unit="row") as bar:
        if mine:
            bar.set_description("warm-up")
            for example, prompt in prompts[:warmup]:
                for name in names:
                    decode(Job(example, prompt, 0, name))
        for row in decode_rows(mine, decode, batch_size):
            bar.set_description(row.example_id)
            run_file.append(row)
            progress.add(row)
            bar.set_postfix_str(str(progress), refresh=False)
            bar.update(num_existing + ranks.count_rows(1) - bar.n if ranks else 1)
        if ranks:  # wait for the other ranks' rows
            ranks.meet(lambda: bar.update(num_existing + ranks.count_rows() - bar.n))


def source_of(
    device: torch.device, seed: int, name: str, method: str, sample_index: int, is_positional: bool
) -> Randomness:
    """Return a text's source of randomness. Positional noise does not depend on the method."""
    if is_positional:
        return Noise.of(seed, name, sample_index, race=fastest_race())
    return torch.Generator(device).manual_seed(sample_seed(seed, name, method, sample_index))


def decode_row(
    pair: Pair,
    task: Task,
    methods: Mapping[str, Decode],
    seed: int,
    positional: Collection[str],
    job: Job,
) -> Row:
    """Decode a text with its method. If memory runs out, the row says so."""
    is_positional = job.method in positional
    names = job.example.id, job.method, job.sample_index
    generator = source_of(pair.target.device, seed, *names, is_positional)
    show = partial(pair.decode, skip_special_tokens=False)  # a stop string may be a special token
    is_stop = StopStrings(task.stop_strings, show) if task.stop_strings else None
    error = ""
    try:
        generation = methods[job.method](job.prompt.token_ids, generator=generator, is_stop=is_stop)
    except (RuntimeError, MemoryError) as problem:
        if not is_out_of_memory(problem):
            raise
        error = f"{OUT_OF_MEMORY} ({reason(problem)}); {MEMORY_WAYS_OUT}"
    if error:  # the exception is gone, and with it the decoder's memory
        release_memory()
        generation = Generation([], "error", error=error)
    has_end = generation.finish_reason == "eos"  # an end token need not be special
    text_ids = generation.token_ids[:-1] if has_end else generation.token_ids
    return Row(
        example_id=job.example.id,
        method=job.method,
        sample_index=job.sample_index,
        completion=task.completion(job.example, pair.decode(text_ids)),
        seed=seed,
        task_id=job.example.task_id,
        noise="positional" if is_positional else None,
        num_cut_tokens=job.prompt.num_cut_tokens or None,
        **Source.of(job.prompt.token_ids, job.example.reference)._asdict(),
        **vars(generation),
    )


def decode_rows(
    jobs: Sequence[Job], decode: Callable[[Job], Row], batch_size: int
) -> Iterator[Row]:
    """Decode rows one by one or several at once, and yield each as it is finished."""
    if batch_size == 1:
        yield from map(decode, jobs)
        return
    for group in groups_of(jobs, batch_size):
        for done in decode_together((partial(decode, job) for job in group), batch_size):
            row = done.result
            seconds = {name: value for name, value in vars(row).items() if "_seconds" in name}
            yield replace(row, **{name: done.share * s for name, s in seconds.items() if s})


def sample_seed(seed: int, example_id: str, method: str, sample_index: int) -> int:
    """Return a text's seed, which limits, order and resuming do not change."""
    key = f"{seed}|{example_id}|{method}|{sample_index}"
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") >> 1


class Progress:
    """The running totals for the progress bar: each method's tokens/s, and the acceptance."""

    def __init__(self, rows: Sequence[Row], names: Sequence[str]):
        self._tokens = dict.fromkeys(names, 0)
        self._seconds = dict.fromkeys(names, 0.0)
        self._accepted = self._drafted = 0
        for row in rows:
            self.add(row)

    def add(self, row: Row) -> None:
        if row.method in self._tokens:
            self._tokens[row.method] += row.num_new_tokens
            self._seconds[row.method] += row.decode_seconds
        self._accepted += sum(row.accepted)
        self._drafted += sum(row.drafted)

    def __str__(self) -> str:
        rates = {name: self._tokens[name] / s for name, s in self._seconds.items() if s}
        parts = [f"{name} {rate:.1f} tok/s" for name, rate in rates.items()]
        if self._drafted:
            parts.append(f"accepted {self._accepted / self._drafted:.0%}")
        return ", ".join(parts)
