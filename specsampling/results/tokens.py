"""A generation's text with its tokens coloured by their origin.

Knows ids, origins and a function that decodes; no tokenizer.
"""

from __future__ import annotations

import html
from collections import Counter
from collections.abc import Callable, Sequence

from specsampling.method.text import Generation
from specsampling.results.records import Row

TOKEN_MARKS = {  # a token by its origin; what is bold or underlined stays apart in greyscale
    "accepted": '<span style="color: #1b7837">{}</span>',
    "correction": '<b style="color: #b2182b"><u>{}</u></b>',
    "bonus": '<b style="color: #2166ac"><i>{}</i></b>',
    "target": "<span>{}</span>",
}

TOKEN_ORIGINS = {
    "accepted": "drafted and accepted",
    "correction": "the target's, after a rejection",
    "bonus": "the target's, with nothing rejected",
    "target": "the target's, without a draft",
}


def text_pieces(
    token_ids: Sequence[int], kinds: Sequence[str], decode: Callable[[Sequence[int]], str]
) -> list[tuple[str, str]]:
    """The text cut into its tokens: (kind, text) of each.

    A character made of several tokens belongs to the token that completes it.
    """
    pieces, shown = [], ""
    for i, kind in enumerate(kinds):
        text = decode(token_ids[: i + 1])
        if not text.endswith("\N{REPLACEMENT CHARACTER}"):
            pieces.append((kind, text[len(shown) :]))
            shown = text
    return pieces


def tokens_html(row: Row, decode: Callable[[Sequence[int]], str]) -> str:
    """A row's text as HTML, each token coloured by its origin, above a legend with counts.

    Args:
        row: of any method.
        decode: token ids -> text.
    """
    generation = Generation(row.token_ids, row.finish_reason, row.accepted, row.drafted)
    kinds = generation.kinds()
    pieces = text_pieces(row.token_ids, kinds, decode)
    text = "".join(TOKEN_MARKS[kind].format(html.escape(piece)) for kind, piece in pieces)
    counts = Counter(kinds)
    legend = "; ".join(
        f"{TOKEN_MARKS[kind].format(kind)} ({origin}): {counts[kind]}"
        for kind, origin in TOKEN_ORIGINS.items()
        if counts[kind]
    )
    style = "white-space: pre-wrap; background: white; color: black; padding: 0.5em"
    return f'<p style="{style}">{text}</p>\n<p style="{style}">{legend}</p>'
