"""XSum: one-sentence summaries of news articles (Narayan et al. 2018, arXiv 1808.08745).

The articles come from the hub, from local files, or are the demo articles of this project:
anything with the columns `document` and `summary`. Summaries are scored with ROUGE, in
`specsampling/tasks/rouge.py`.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from specsampling.config import XSumConfig
from specsampling.method.text import PromptError
from specsampling.tasks.task import Encoder, Example, Prompt, TaskError, cut_at

EMBEDDED = "embedded:"
DEMO_ARTICLES = Path(__file__).parent.parent / "data" / "articles.jsonl"  # embedded:articles
BUILDERS = {".jsonl": "json", ".csv": "csv", ".parquet": "parquet"}
# The hub's own conversion: main holds a script for XSum, which `datasets` no longer runs.
HUB_REVISION = "refs/convert/parquet"
HUB_FILES = "default/{split}/*.parquet"


class XSum:
    """Articles to summarise: `completion` continues the prompt, `chat` answers it.

    With `num_shots` N, the set's last N articles stand solved before every other one, and are
    never evaluated themselves.
    """

    def __init__(self, settings: XSumConfig):
        """Read the articles.

        Raises:
            TaskError: they cannot be had, or are not what they must be.
        """
        self._settings = settings
        articles = load_articles(settings.dataset, settings.split)
        num_evaluated = len(articles) - settings.num_shots
        if num_evaluated < 1:
            raise TaskError(
                f"xsum.num_shots must be below the number of articles, here {len(articles)} "
                f"(got {settings.num_shots}); lower it"
            )
        self._examples = articles[:num_evaluated]
        self._solved = "".join(self._solve(shot) for shot in articles[num_evaluated:])

    @property
    def stop_strings(self) -> tuple[str, ...]:
        return self._settings.stop_strings

    def examples(self) -> list[Example]:
        return list(self._examples)

    def prompt(self, example: Example, encoder: Encoder, max_tokens: int) -> Prompt:
        """The solved articles and the request; a document that is too long loses its end.

        The cut is made between the document's tokens and repeated until the whole fits, for
        text may have a few tokens more or less once it stands in its template.

        Raises:
            PromptError: the prompt without any of the document is too long.
        """
        encode = encoder.encode_chat if self._is_chat else encoder.encode
        prompt = encode(self._solved + self._request(example.text))
        if len(prompt) <= max_tokens:
            return Prompt(prompt)
        document = encoder.encode(example.text)
        num_kept = len(document)
        while len(prompt) > max_tokens:
            if num_kept == 0:
                raise PromptError(
                    f"the prompt of {example.id} without its document must have at most "
                    f"{max_tokens} tokens, the target's context less decoding.max_new_tokens (got "
                    f"{len(prompt)}); lower decoding.max_new_tokens or xsum.num_shots"
                )
            num_kept = max(num_kept - (len(prompt) - max_tokens), 0)
            text = encoder.decode(document[:num_kept]).rstrip("\N{REPLACEMENT CHARACTER}")
            prompt = encode(self._solved + self._request(text))
        return Prompt(prompt, len(document) - num_kept)

    def completion(self, example: Example, text: str) -> str:
        """The summary: the new text up to a stop string."""
        return cut_at(text, self.stop_strings).strip()

    @property
    def _is_chat(self) -> bool:
        return self._settings.prompt_style == "chat"

    def _request(self, document: str) -> str:
        return self._settings.prompt_template.replace("{document}", document)

    def _solve(self, shot: Example) -> str:
        """A request, its summary behind a space, and a blank line."""
        request = self._request(shot.text)
        gap = "" if request[-1].isspace() else " "
        return f"{request}{gap}{shot.reference}\n\n"


def load_articles(dataset: str, split: str) -> list[Example]:
    """The articles of one split, in the order of their file.

    Args:
        dataset: `embedded:articles`, a local .jsonl, .csv or .parquet file, a local folder of
            such files or laid out as a hub repository, or a hub id.
        split: of a folder or a hub id; a single file is taken whole, whatever the split.

    Returns:
        One example per row: `document` as text, `summary` as reference, and as id the column
        `id`, or the row's number (from 0) where there is none.

    Raises:
        TaskError: nothing is there, it cannot be read, it is empty, a column is missing or
            holds no text, or an id stands twice.
    """
    import datasets

    try:
        with _quiet_datasets():
            # Streamed, files are read where they lie: no second copy in the user's cache.
            stream: Any = datasets.load_dataset(
                **_source(dataset, split), split=split, streaming=True
            )
            rows = list(stream)
    except StopIteration:  # how `datasets` takes an empty file
        rows = []
    except TaskError:
        raise
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        raise TaskError(
            f"cannot load xsum.dataset {dataset}, split {split} ({_first_line(error)}); check the "
            "name, the split and the network, or give a local file"
        ) from error
    if not rows:
        raise TaskError(f"xsum.dataset must hold at least one article (got 0 in {dataset})")
    articles = [_article(dataset, number, row) for number, row in enumerate(rows)]
    (name, times), *_ = Counter(article.id for article in articles).most_common(1)
    if times > 1:
        raise TaskError(
            f"xsum.dataset must have another id in every row (got {name} {times} times in "
            f"{dataset}); mend the column id, or leave it out to number the rows"
        )
    return articles


def _source(dataset: str, split: str) -> dict[str, Any]:
    """What `datasets.load_dataset` takes to read local files; a hub id's are fetched first."""
    path = DEMO_ARTICLES if dataset == f"{EMBEDDED}articles" else Path(dataset)
    if dataset.startswith(EMBEDDED) and path != DEMO_ARTICLES:
        raise TaskError(
            f"xsum.dataset must be {EMBEDDED}articles, the one embedded (got {dataset})"
        )
    if path.is_dir():
        return {"path": str(path.resolve())}
    if path.is_file() or path.suffix in BUILDERS:
        if path.suffix not in BUILDERS:
            raise TaskError(f"xsum.dataset must end in {', '.join(BUILDERS)} (got {dataset})")
        return {"path": BUILDERS[path.suffix], "data_files": {split: str(path)}}
    from huggingface_hub import snapshot_download

    # One split only, and what was fetched once is found again without a network.
    pattern = HUB_FILES.format(split=split)
    folder = snapshot_download(
        dataset, repo_type="dataset", revision=HUB_REVISION, allow_patterns=pattern
    )
    files = sorted(str(file) for file in Path(folder).glob(pattern))
    if not files:
        raise TaskError(
            f"xsum.split must be a split of {dataset}, such as train, validation or test (got "
            f"{split}: the hub's {HUB_REVISION} has no {pattern})"
        )
    return {"path": "parquet", "data_files": {split: files}}


def _article(dataset: str, number: int, row: Mapping[str, Any]) -> Example:
    for column in ("document", "summary"):
        if column not in row:
            raise TaskError(
                f"xsum.dataset must have the columns document and summary (got {', '.join(row)} "
                f"in {dataset}); rename them"
            )
        if not isinstance(row[column], str):
            raise TaskError(
                f"xsum.dataset must hold text in the column {column} (got {row[column]!r:.60} in "
                f"row {number} of {dataset}); mend the row"
            )
    name = number if row.get("id") is None else row["id"]
    return Example(id=str(name), text=row["document"].strip(), reference=row["summary"].strip())


@contextlib.contextmanager
def _quiet_datasets() -> Iterator[None]:
    """Keep `datasets` from printing what the error says."""
    from datasets import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity(logging.CRITICAL)
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
