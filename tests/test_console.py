from specsampling.console import COLOURS, PLAIN, coloured
from specsampling.method.text import Generation


def test_each_token_has_its_origins_colour():
    generation = Generation(
        token_ids=[ord(c) for c in "abcdefg"],
        finish_reason="length",
        accepted=[2, 0, 2],
        drafted=[2, 2, 3],
    )
    kinds = generation.kinds()
    assert kinds == ["accepted", "accepted", "bonus", "correction", *["accepted"] * 2, "correction"]
    text = coloured(generation.token_ids, kinds, lambda ids: "".join(map(chr, ids)))
    assert text == "".join(
        f"{COLOURS[kind]}{letter}{PLAIN}" for kind, letter in zip(kinds, "abcdefg", strict=True)
    )


def test_a_character_of_several_tokens_is_shown_once_it_is_whole(tokenizer):
    ids = tokenizer("é東x")["input_ids"]
    assert len(ids) > 3
    text = coloured(ids, ["accepted"] * len(ids), tokenizer.decode)
    for code in (*COLOURS.values(), PLAIN):
        text = text.replace(code, "")
    assert text == "é東x"


def test_a_text_cut_in_its_last_cycle_keeps_its_kinds():
    generation = Generation([1, 2], "eos", accepted=[4], drafted=[4])
    assert generation.kinds() == ["accepted", "accepted"]


def test_without_a_draft_every_token_is_the_targets():
    assert Generation([1, 2], "eos").kinds() == ["target", "target"]
