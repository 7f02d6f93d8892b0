"""Fits a few of the target's layers to its final hidden states.

The loss is the Kullback-Leibler divergence to the target's next-token distribution over the
frequent tokens, which are all that the draft can propose. A little of the distance between the
hidden states is added. The target does not run, because its hidden states are in the shards.

Embedding and head are the target's and stay frozen. So a draft is its layers and its final norm.
"""

from __future__ import annotations

import copy
import itertools
import json
import math
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from tqdm import tqdm
from transformers import LlamaForCausalLM, PreTrainedModel

EVALUATIONS = ("eval-humaneval", "eval-articles", "eval-code")
EVALUATED_TOGETHER = 16
HEAD_ROWS = 256  # rows of logits computed at a time
CHUNK = 256  # sequences that are sorted by length together


@dataclass
class Sample:
    """One sequence: [n] tokens, [n - 1, d] hidden states, and the first row to learn from."""

    tokens: Tensor
    hidden: Tensor
    first_row: int


def load_samples(paths: list[Path]) -> list[Sample]:
    samples = []
    for path in paths:
        shard = load_file(path)
        lengths = shard["lengths"]
        if not len(lengths):
            continue
        tokens = shard["tokens"].split(lengths.tolist())
        hidden = shard["hidden"].split((lengths - 1).tolist())
        for row, num_prompt in enumerate(shard["num_prompt_tokens"].tolist()):
            samples.append(Sample(tokens[row], hidden[row], num_prompt - 1))
    return samples


def training_paths(folder: Path) -> list[Path]:
    return [p for p in sorted(folder.glob("*.safetensors")) if not p.name.startswith(EVALUATIONS)]


def frequent_tokens(samples: list[Sample], num: int, vocab_size: int) -> Tensor:
    """Return [num] ids, ascending: the most frequent tokens that the target wrote or read."""
    counts = torch.zeros(vocab_size, dtype=torch.long)
    for sample in samples:
        counts += torch.bincount(sample.tokens[sample.first_row + 1 :].long(), minlength=vocab_size)
    return counts.argsort(descending=True, stable=True)[:num].sort().values


def new_student(target: PreTrainedModel, layers: list[int]) -> Any:
    """Make a Llama of some of the target's layers, with its embedding, final norm and head."""
    config: Any = copy.deepcopy(target.config)
    config.num_hidden_layers = len(layers)
    student: Any = LlamaForCausalLM(config)
    student.to(target.device)
    student.model.embed_tokens.weight.data.copy_(target.model.embed_tokens.weight.data)
    student.model.norm.load_state_dict(target.model.norm.state_dict())
    for ours, theirs in enumerate(layers):
        student.model.layers[ours].load_state_dict(target.model.layers[theirs].state_dict())
    student.model.embed_tokens.requires_grad_(False)
    student.lm_head.requires_grad_(False)
    return student


def own_tensors(student: PreTrainedModel) -> dict[str, Tensor]:
    """Return the tensors of a draft that are not the target's: its layers and final norm."""
    state = student.model.state_dict()
    return {name: tensor for name, tensor in state.items() if not name.startswith("embed_tokens")}


def batches(
    samples: list[Sample], batch_tokens: int, seed: int, epoch: int
) -> Iterator[list[Sample]]:
    """Yield one epoch's batches: every sample once, together with others of about its length."""
    chance = random.Random(f"{seed} {epoch}")
    order = list(range(len(samples)))
    chance.shuffle(order)
    groups: list[list[Sample]] = []
    for at in range(0, len(order), CHUNK):
        group: list[Sample] = []
        chunk = sorted(order[at : at + CHUNK], key=lambda i: len(samples[i].tokens))
        for i in chunk:
            if group and (len(group) + 1) * len(samples[i].tokens) > batch_tokens:
                groups.append(group)
                group = []
            group.append(samples[i])
        groups.append(group)
    chance.shuffle(groups)
    yield from groups


def rows_of(student: PreTrainedModel, batch: list[Sample]) -> tuple[Tensor, Tensor, Tensor]:
    """Run a draft over a batch, and take the rows that count.

    Returns:
        [n, d] the draft's final hidden states, [n, d] the target's, [n] the ids that followed.
    """
    longest = max(len(sample.hidden) for sample in batch)
    ids = torch.zeros(len(batch), longest, dtype=torch.long)
    counts = torch.zeros(len(batch), longest, dtype=torch.bool)
    for row, sample in enumerate(batch):
        ids[row, : len(sample.hidden)] = sample.tokens[:-1]
        counts[row, sample.first_row : len(sample.hidden)] = True
    states = student.model(input_ids=ids.to(student.device), use_cache=False).last_hidden_state
    target_states = torch.cat([sample.hidden[sample.first_row :] for sample in batch])
    followed = torch.cat([sample.tokens[sample.first_row + 1 :] for sample in batch]).long()
    device = student.device
    return states[counts.to(device)], target_states.to(device), followed.to(device)


class Divergence(torch.autograd.Function):
    """The sum over rows of the Kullback-Leibler divergence KL(target, draft), in nats.

    The gradient by the draft's logits is the difference of the two distributions. The forward pass
    computes it too, for few rows at a time: full logits would not fit the processor's caches.
    """

    @staticmethod
    def forward(ctx: Any, states: Tensor, target_states: Tensor, head: Tensor) -> Tensor:
        """Map [n, d] states of draft and target, and [H, d] rows of the head, to a scalar."""
        gradient = torch.empty_like(states)
        divergence = states.new_zeros((), dtype=torch.float32)
        for at in range(0, len(states), HEAD_ROWS):
            rows = slice(at, at + HEAD_ROWS)
            target_log_probs = (target_states[rows] @ head.T).float().log_softmax(-1)
            log_probs = (states[rows] @ head.T).float().log_softmax(-1)
            target_probs = target_log_probs.exp()
            divergence += torch.dot(target_probs.view(-1), target_log_probs.view(-1))
            divergence -= torch.dot(target_probs.view(-1), log_probs.view(-1))
            gradient[rows] = log_probs.exp_().sub_(target_probs).to(head.dtype) @ head
        ctx.save_for_backward(gradient)
        return divergence

    @staticmethod
    def backward(ctx: Any, scale: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * scale.to(gradient.dtype), None, None


def loss_of(
    states: Tensor, target_states: Tensor, head: Tensor, hidden_weight: float
) -> tuple[Tensor, Tensor]:
    """Return the mean loss of some rows, and the mean divergence in it, in nats per token."""
    states = states.to(head.dtype)
    divergence = Divergence.apply(states, target_states.to(head.dtype), head) / len(states)
    distance = nn.functional.smooth_l1_loss(states, target_states.to(head.dtype))
    return divergence + hidden_weight * distance, divergence


@torch.no_grad()
def evaluate_rows(
    student: PreTrainedModel, samples: list[Sample], head_ids: Tensor
) -> list[list[bool]]:
    """Tell for each sample's answer tokens whether the draft's most probable token is the same."""
    head = student.model.embed_tokens.weight[head_ids].bfloat16()
    answers: list[list[bool]] = []
    for at in range(0, len(samples), EVALUATED_TOGETHER):
        batch = samples[at : at + EVALUATED_TOGETHER]
        with torch.autocast(student.device.type, torch.bfloat16):
            states, _, followed = rows_of(student, batch)
            chosen = head_ids.to(states.device)[(states @ head.T).argmax(-1)]
        lengths = [len(sample.hidden) - sample.first_row for sample in batch]
        answers += [right.tolist() for right in (chosen == followed).split(lengths)]
    return answers


def learning_rate(settings: dict[str, Any], step: int) -> float:
    """Return the rate of a step: a linear warm-up, then a cosine down to zero."""
    peak, warmup, steps = (settings[n] for n in ("learning_rate", "warmup_steps", "steps"))
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup)))


def train(settings: dict[str, Any], target: PreTrainedModel, work: Path) -> None:
    """Train to the last step, from the last checkpoint if there is one.

    Writes `checkpoint.pt`, `log.jsonl` (loss and agreement by step) and `draft.pt` to `work`.
    """
    options, seed = settings["training"], settings["seed"]
    samples = load_samples(training_paths(work / "data"))
    held_out = {
        name: load_samples(sorted((work / "data").glob(f"{name}-*.safetensors")))
        for name in EVALUATIONS
    }
    vocab_size = target.config.vocab_size
    head_ids = frequent_tokens(samples, settings["draft"]["head_size"], vocab_size)
    student = new_student(target, settings["draft"]["layers"])
    head = student.model.embed_tokens.weight[head_ids].to(torch.bfloat16)
    trained = [parameter for parameter in student.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, betas=(0.9, 0.95), weight_decay=options["weight_decay"])
    checkpoint, log = work / "checkpoint.pt", work / "log.jsonl"
    first_step = 0
    if checkpoint.exists():
        saved = torch.load(checkpoint, weights_only=True)
        student.model.load_state_dict(saved["student"], strict=False)
        optimizer.load_state_dict(saved["optimizer"])
        first_step = saved["step"]
    lines = log.read_text().splitlines() if log.exists() else []
    log.write_text("".join(f"{s}\n" for s in lines if json.loads(s)["step"] <= first_step))

    bar = tqdm(total=options["steps"], initial=first_step, desc="train", unit="step")
    sums, num_summed = 0.0, 0
    per_step = options["batches_per_step"]
    stream = all_batches(samples, options["batch_tokens"], seed)
    stream = itertools.islice(stream, first_step * per_step, None)
    for step in range(first_step, options["steps"]):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(options, step)
        for batch in itertools.islice(stream, per_step):
            with torch.autocast(target.device.type, torch.bfloat16):
                states, target_states, _ = rows_of(student, batch)
                loss, divergence = loss_of(states, target_states, head, options["hidden_weight"])
            (loss / per_step).backward()
            sums, num_summed = sums + divergence.item(), num_summed + 1
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        bar.update()
        done = step + 1
        if done % options["checkpoint_every"] == 0 or done == options["steps"]:
            line: dict[str, Any] = {"step": done, "divergence": sums / num_summed}
            for name, evaluation in held_out.items():
                rows = evaluate_rows(student, evaluation, head_ids)
                line[name] = sum(map(sum, rows)) / sum(map(len, rows))
            with log.open("a") as file:
                file.write(json.dumps(line) + "\n")
            bar.write(json.dumps(line))
            sums, num_summed = 0.0, 0
            state = {
                "student": own_tensors(student),
                "optimizer": optimizer.state_dict(),
                "step": done,
            }
            torch.save(state, checkpoint.with_suffix(".tmp"))
            checkpoint.with_suffix(".tmp").rename(checkpoint)
    torch.save({"student": own_tensors(student), "head_ids": head_ids}, work / "draft.pt")


def all_batches(samples: list[Sample], batch_tokens: int, seed: int) -> Iterator[list[Sample]]:
    for epoch in itertools.count():
        yield from batches(samples, batch_tokens, seed, epoch)
