"""Makes one run from a configuration: resolves it, loads the models, decodes, and reports.

The decoders are arguments. The scripts import this module, and torch with it, only after they have
read the configuration. So a mistake in the configuration is reported at once.
"""

from __future__ import annotations

import datetime
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from specsampling import loading
from specsampling.config import Config, method_parts
from specsampling.edge import launched_by, rank
from specsampling.loading import Drafts
from specsampling.method.sampling import Sampling
from specsampling.method.verify import RULES
from specsampling.models.errors import say
from specsampling.models.estimate import Planned
from specsampling.models.load import Pair
from specsampling.provenance import device_name, peak_memory, prompt_date, run_meta
from specsampling.ranks import Ranks
from specsampling.results import table_text, tables
from specsampling.results.audit import Audit, audit
from specsampling.results.meta import device_names, machine_of, machines_of
from specsampling.results.records import RecordsError, Row, Run, read_meta, read_rows, read_run
from specsampling.results.runfile import RunFile, check_fresh, check_output, keep_rows
from specsampling.results.scores import Scores, write_scores
from specsampling.results.shards import Shard, take_in
from specsampling.runner import Decode, Job, all_jobs, encode_prompts, run
from specsampling.tasks.task import Example, Prompt, Task


@dataclass(frozen=True)
class Plan:
    """A run before its models are loaded."""

    config: Config  # as this process decodes it
    task: Task
    output: Path
    fresh: bool  # whether to start the output file over
    ranks: Ranks | None  # this process's place among several; None if it is the only process
    was_stopped: bool  # whether several processes were stopped before their rows were merged
    existing_run: Run | None  # what an earlier process left
    meta: dict[str, Any]  # what new rows are made with
    planned: Sequence[Planned]  # the models as they will be loaded, the target first
    prompts: Sequence[tuple[Example, Prompt]]
    why_eager: str  # why decode calls run PyTorch's operations one by one, if they do

    @property
    def jobs(self) -> list[Job]:
        """Return a job for each row of the run, in order."""
        return all_jobs(self.prompts, self.config.run.methods, self.config.sampling.num_samples)

    @property
    def longest_prompt(self) -> int:
        return max(len(prompt.token_ids) for _, prompt in self.prompts)

    @property
    def longest_text(self) -> int:
        return self.longest_prompt + self.config.decoding.max_new_tokens

    @property
    def existing_rows(self) -> Sequence[Row]:
        return self.existing_run.rows if self.existing_run else []

    @property
    def is_finished(self) -> bool:
        """True if every row of the run is in the file already."""
        return {job.key for job in self.jobs} <= {row.key for row in self.existing_rows}


def run_experiment(
    config: Config,
    task: Task,
    options: Any,
    autoregressive: Callable,
    speculative: Callable,
    score: Callable[[Path], Scores],
) -> int:
    """Decode every example with every method, score, and print the table.

    `config` and `options` come from `read_experiment`, and `score` scores a finished file. The exit
    code is 1 if a text ended in an error or if tokens are not the target's own.
    """
    plan = resolve(config, task, options.output, options.fresh)
    if not options.on_another_machine:
        require_same_machine(plan)
    if plan.is_finished and plan.existing_run:
        meta = plan.existing_run.meta
        made = f"{device_names(meta)}, {meta.get('date', '')[:10]}"
        say(f"Nothing is left to decode. The rows were made on {made}.")
    pair, drafts, expected = load(plan)
    decoders = bind_decoders(plan.config, pair, drafts, autoregressive, speculative)
    audits = decode(plan, pair, decoders, expected)
    if rank():
        return 0  # rank 0 has all rows
    return report(plan, audits, score)


def resolve(config: Config, task: Task, output: Path, fresh: bool) -> Plan:
    """Settle all that needs no weights, so that a mistake is reported before minutes of loading."""
    ranks = Ranks.of_launch(variables) if (variables := launched_by()) else None
    models = config.models
    if ranks:
        models = replace(models, device=ranks.device(models.device))
    was_stopped = take_in(output, ranks, fresh)
    existing_run, now = read_existing_run(output, fresh, ranks)
    mode, why_eager = loading.settle_steps(config, existing_run)
    meta = run_meta(config, mode, now)
    meta["files"] = loading.digest_files(config, task.examples())
    if rank() == 0:
        check_fresh(output) if fresh else check_output(output, meta)
    config = replace(config, models=models, decoding=replace(config.decoding, compile=mode))
    outline, planned = loading.outline_models(config)
    outline, max_new_tokens = replace(outline, now=now), config.decoding.max_new_tokens
    prompts = encode_prompts(task, outline, config.run.limit, max_new_tokens)
    settled = was_stopped, existing_run, meta, planned, prompts, why_eager
    return Plan(config, task, output, fresh, ranks, *settled)


def require_same_machine(plan: Plan) -> None:
    """Refuse to add this machine's rows to another machine's, whose speeds cannot be compared."""
    if plan.existing_run is None or plan.is_finished:
        return
    ours = machine_of(plan.meta)
    if others := [name for name in machines_of(plan.existing_run.meta) if name != ours]:
        raise RecordsError(
            f"{plan.output} has rows of another machine ({'; '.join(others)}; this is {ours}), and "
            "speeds of two machines cannot be compared; choose another file with --output, or add "
            "--on-another-machine"
        )


def load(plan: Plan) -> tuple[Pair, Drafts, str]:
    """Load and check a plan's models and drafts; also return the expected peak of memory."""
    config, meta = plan.config, plan.meta
    sizes = plan.longest_prompt, plan.ranks.local_count if plan.ranks else 1
    device_map, expected = loading.settle_memory(config, plan.planned, *sizes)
    pair = loading.load_configured_pair(config, device_map)
    drafts = loading.load_drafts(config, pair)
    if config.decoding.compile == "off":
        say(f"  decode calls: eager ({plan.why_eager})")
    elif not plan.is_finished:
        pair, drafts, is_static = loading.make_steps(config, pair, drafts, plan.longest_text)
        if not is_static:
            meta.pop("steps", None)
    if config.run.batch_size > 1:
        pair, drafts = loading.make_batch(config, pair, drafts, plan.longest_text)
    meta["bit_exact"] = loading.self_check(config, pair, plan.longest_text)
    return pair, drafts, expected


def decode(
    plan: Plan, pair: Pair, decoders: dict[str, Decode], expected_memory: str
) -> Mapping[str, Audit | None]:
    """Decode the missing rows. On rank 0, return each method's audit over all rows."""
    config, ranks, device = plan.config, plan.ranks, pair.target.device
    start = plan.output, plan.meta, plan.fresh
    existing, name = plan.existing_rows, device_name(device)
    audits: dict[str, Audit | None] = {}
    if plan.fresh and not rank() and (kept := keep_rows(plan.output)):
        say(f"  the rows that were there are kept in {kept}")
    with Shard(*start, existing, ranks, name) if ranks else RunFile.open(*start) as run_file:
        num_rows = len(run_file.rows)
        more = f" (it has {num_rows} already; --fresh starts over)" if num_rows else ""
        say(f"  rows go to {plan.output}{more}")
        try:
            run(
                *(pair, plan.task, plan.prompts, decoders, run_file),
                seed=config.sampling.seed,
                num_samples=config.sampling.num_samples,
                warmup=config.run.warmup,
                batch_size=config.run.batch_size,
                positional=loading.settle_noise(config, plan.existing_run),
                ranks=ranks,
            )
        finally:  # so that a stopped run also records its peak of memory
            peak = peak_memory(device)
            run_file.note(peak_memory=peak, expected_memory=expected_memory)
        order = [job.key for job in plan.jobs]
        if isinstance(run_file, Shard):
            run_file.merge(order)
        elif plan.was_stopped:
            run_file.sort(order)
        if rank() == 0:
            by_method = tables.rows_by_method(run_file.rows)
            audits = {method: audit(of_method) for method, of_method in by_method.items()}
            run_file.note(audit={method: str(found) for method, found in audits.items() if found})
            more = f" (expected {expected_memory})" if expected_memory else ""
            say(f"  peak memory: {peak}{more}")
    return audits


def report(
    plan: Plan,
    audits: Mapping[str, Audit | None],
    score: Callable[[Path], Scores],
) -> int:
    """Score the file, print the table of the plan's texts, and return the exit code."""
    scores = score(plan.output)
    write_scores(plan.output, scores)
    rows = read_run(plan.output).rows
    samples = {(job.example.id, job.sample_index) for job in plan.jobs}
    shown = [row for row in rows if row.sample in samples]
    sampling = tables.describe_sampling(vars(plan.config.sampling))
    print(table_text.format_table(tables.summary_table(shown, scores, sampling)))
    is_lossless = all(found.is_lossless for found in audits.values() if found)
    return 1 if not is_lossless or any(row.error for row in rows) else 0


def read_existing_run(
    output: Path, fresh: bool, ranks: Ranks | None = None
) -> tuple[Run | None, datetime.datetime]:
    """Return what an earlier process left of a run, and the run's `prompt_date`.

    Every rank gets rank 0's values. If the files are damaged, `check_output` says so later.
    """
    existing_run = None
    if not fresh and not rank() and output.is_file():
        with suppress(RecordsError):
            if rows := read_rows(output):
                kept = [row for row in rows if not row.lacked_memory]
                existing_run = Run(kept, read_meta(output), None)
    now = prompt_date(existing_run.meta if existing_run else None)
    return ranks.gather([(existing_run, now)])[0] if ranks else (existing_run, now)


def bind_decoders(
    config: Config, pair: Pair, drafts: Drafts, autoregressive: Callable, speculative: Callable
) -> dict[str, Decode]:
    """Return each method's decoder, bound to its models and settings."""
    warp = config.sampling
    shared: dict[str, Any] = {
        "max_new_tokens": config.decoding.max_new_tokens,
        "sampling": Sampling(warp.temperature, warp.top_k, warp.top_p),
        "eos_ids": pair.eos_ids,
    }
    baseline = partial(autoregressive, pair.target, **shared)
    decoders: dict[str, Decode] = {"autoregressive": baseline}
    decoders["reference"] = partial(baseline, width=config.call_width)
    for method in {*config.run.methods} - decoders.keys():
        parts = method_parts(method, config)
        decoders[method] = partial(
            speculative,
            pair.target,
            drafts[parts.draft, parts.is_adaptive],
            k=parts.k,
            width=config.call_width,
            verifier=RULES[parts.verifier],
            **shared,
        )
    return {method: decoders[method] for method in config.run.methods}
