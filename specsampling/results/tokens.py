"""Writes a generation's text with its tokens coloured by their origin."""

from __future__ import annotations

import html
from collections.abc import Callable, Sequence

from specsampling.method.text import Generation
from specsampling.results.records import Row

# A token's mark and meaning by its origin. Bold and underlined text is distinct in greyscale.
TOKEN_MARKS = {
    "accepted": ('<span style="color: #1b7837">{}</span>', "drafted and accepted"),
    "correction": ('<b style="color: #b2182b"><u>{}</u></b>', "the target's, after a rejection"),
    "bonus": ('<b style="color: #2166ac"><i>{}</i></b>', "the target's, with nothing rejected"),
    "target": ("<span>{}</span>", "the target's, without a draft"),
}


def text_pieces(
    token_ids: Sequence[int], kinds: Sequence[str], decode: Callable[[Sequence[int]], str]
) -> list[tuple[str, str]]:
    """Return a pair (kind, text) for each token.

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
    """Write a row's text as HTML, its tokens coloured by origin, above a legend with counts."""
    kinds = Generation(row.token_ids, row.finish_reason, row.accepted, row.drafted).kinds()
    pieces = text_pieces(row.token_ids, kinds, decode)
    text = "".join(TOKEN_MARKS[kind][0].format(html.escape(piece)) for kind, piece in pieces)
    legend = "; ".join(
        f"{mark.format(kind)} ({origin}): {count}"
        for kind, (mark, origin) in TOKEN_MARKS.items()
        if (count := kinds.count(kind))
    )
    style = "white-space: pre-wrap; background: white; color: black; padding: 0.5em"
    return f'<p style="{style}">{text}</p>\n<p style="{style}">{legend}</p>'
