"""XSum: one-sentence summaries of news articles (Narayan et al. 2018, arXiv 1808.08745).

`articles.py` reads the articles, and `rouge.py` scores the summaries with ROUGE.
"""

from __future__ import annotations

from specsampling.config import XSumConfig
from specsampling.method.text import PromptError
from specsampling.tasks.articles import load_articles
from specsampling.tasks.task import Encoder, Example, Prompt, TaskError, cut_at


class XSum:
    """The articles to summarise: `completion` continues the prompt, `chat` answers it.

    With `num_shots` N, the data set's last N articles stand with their summaries in every prompt,
    and are never evaluated themselves.
    """

    def __init__(self, settings: XSumConfig):
        """Read the articles, or raise TaskError if they break a rule."""
        self._settings = settings
        articles = load_articles(settings.dataset, settings.split, settings.columns)
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

    def prompt(
        self, example: Example, encoder: Encoder, max_tokens: int, max_new_tokens: int = 0
    ) -> Prompt:
        """Return the solved articles and the request. A document that is too long loses its end.

        The document is cut between tokens until the whole fits. One cut may not be enough, because
        a text may have a few tokens more or less inside its template.

        Raises:
            PromptError: nothing is left of a document. The error names the setting to change.
        """
        is_chat = self._settings.prompt_style == "chat"
        encode = encoder.encode_chat if is_chat else encoder.encode
        prompt = encode(self._solved + self._request(example.text))
        if len(prompt) <= max_tokens:
            return Prompt(prompt)
        document = encoder.encode(example.text)
        num_kept = len(document)
        while len(prompt) > max_tokens:
            num_kept = max(num_kept - (len(prompt) - max_tokens), 0)
            text = encoder.decode(document[:num_kept]).rstrip("\N{REPLACEMENT CHARACTER}")
            if not num_kept or not text.strip():
                empty = self._request("")
                lengths = len(encode(empty)), len(encode(self._solved + empty))
                why = self._no_room(*lengths, max_tokens, max_new_tokens)
                raise PromptError(f"nothing is left of {example.id}: {why}")
            prompt = encode(self._solved + self._request(text))
        return Prompt(prompt, len(document) - num_kept)

    def _no_room(self, request: int, solved: int, max_tokens: int, max_new_tokens: int) -> str:
        """Name the setting that takes the document's place, and the way out.

        `request` counts the tokens of a request without a document, and `solved` adds those of
        the solved articles.
        """
        context = max_tokens + max_new_tokens
        if request >= context - 1:  # a document and an answer need a token each
            return (
                f"the instruction alone takes {request} tokens of the target's context of "
                f"{context}; shorten xsum.prompt_template, or choose a model with a longer context"
            )
        if request < max_tokens and solved > request:
            return (
                f"xsum.num_shots {self._settings.num_shots} examples take {solved - request} "
                f"tokens, and the prompt may have {max_tokens}, the target's context of {context} "
                "less decoding.max_new_tokens; lower xsum.num_shots"
            )
        return (
            f"decoding.max_new_tokens {max_new_tokens} leaves {max(max_tokens, 0)} tokens of the "
            f"target's context of {context}, and the instruction alone takes {request}; lower "
            "decoding.max_new_tokens"
        )

    def completion(self, example: Example, text: str) -> str:
        """Return the summary: the new text up to a stop string."""
        return cut_at(text, self.stop_strings).strip()

    def _request(self, document: str) -> str:
        return self._settings.prompt_template.replace("{document}", document)

    def _solve(self, shot: Example) -> str:
        """Return a request, its summary after a space, and a blank line."""
        request = self._request(shot.text)
        gap = "" if request[-1].isspace() else " "
        return f"{request}{gap}{shot.reference}\n\n"
