"""Tables and figures of synthetic runs whose numbers are known."""

import math
import subprocess
import sys
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import matplotlib.colors
import matplotlib.pyplot as plt
import pandas as pd
import pytest
from test_metrics import make_rouge, make_row

from Benchmarks import table1 as grid
from specsampling.results import figures, metrics, table_text, tables, tokens
from specsampling.results.records import Row, Run
from specsampling.results.scores import RougeScore, Score

META = {
    "config": {
        "models": {"target": "embedded:smollm2-135m", "draft": "ngram"},
        "speculation": {"k": 5},
        "decoding": {"max_new_tokens": 256},
        "sampling": {"temperature": 0, "top_k": 0, "top_p": 1.0, "seed": 0, "num_samples": 1},
        "humaneval": {},
    },
    **{"config_hash": "0123456789abcdef", "profile": "demo", "git_commit": "abc1234"},
    **{"device": "cpu", "device_name": "A Processor", "precision": "bfloat16", "threads": 2},
    **{"date": "2030-01-02", "command": "python main_exp2.py"},
    "versions": {"torch": "2.13.0", "transformers": "5.23.0"},
    "bit_exact": "32 of 32 rows of logits were bitwise equal",
}
TOKENS_PER_SECOND = {"autoregressive": 40, "reference": 32, "speculative": 80}


def make_run(num_problems=12, num_samples=1, methods=tables.METHODS) -> list[Row]:
    """Rows of a lossless run: 40, 32 and 80 tokens/s, 2.5 tokens per call, 3 of 8 accepted."""
    return [
        make_row(
            f"HumanEval/{problem}",
            method,
            sample,
            num_tokens,
            task_id=f"HumanEval/{problem}",
            target_calls=num_tokens * 2 // 5 if method == "speculative" else num_tokens,
            accepted=[3, 0, 0] if method == "speculative" else [],
            drafted=[5, 0, 3] if method == "speculative" else [],
            prefill_seconds=0.5,
            decode_seconds=num_tokens / TOKENS_PER_SECOND[method],
            forward_seconds=0.5 + 0.9 * num_tokens / TOKENS_PER_SECOND[method],
        )
        for problem in range(num_problems)
        for num_tokens in [20 + 10 * (problem % 3)]
        for sample in range(num_samples)
        for method in methods
    ]


def score_every_fourth(rows: list[Row]) -> list[Score]:
    scores = []
    for row in rows:
        passed = int(row.example_id.split("/")[1]) % 4 == 0
        result = "passed" if passed else "failed: NameError"
        scores.append(Score(**row_key(row), passed=passed, result=result))
    return scores


def row_key(row: Row) -> dict:
    return dict(zip(("example_id", "method", "sample_index"), row.key))


def scored_table(rows: list[Row], sampling: str = "greedy") -> pd.DataFrame:
    return tables.summary_table(rows, score_every_fourth(rows), sampling)


def line_of(table: pd.DataFrame, method: str) -> pd.Series:
    return table.set_index("method").loc[method]


def notes_of(*arguments) -> list[str]:
    return tables.summary_table(*arguments).attrs["notes"]


def test_table_has_one_line_per_method_in_a_fixed_order():
    table = scored_table(make_run()[::-1])
    assert list(table["method"]) == ["autoregressive", "reference", "speculative"]
    assert list(table["n"]) == [12, 12, 12]
    assert list(table["pass@1"]) == [0.25, 0.25, 0.25]
    assert list(table["tokens/s"]) == pytest.approx([40, 32, 80])
    assert list(table["speedup"]) == pytest.approx([1, 0.8, 2])
    assert list(table["block efficiency"]) == pytest.approx([1, 1, 2.5])
    assert list(table["identical outputs"]) == ["", "", "12/12"]


def test_table_holds_fractions_and_text_holds_percentages():
    table = scored_table(make_run())
    assert line_of(table, "speculative")["draft acceptance rate"] == 3 / 8
    text = line_of(table_text.printable(table), "speculative")
    assert text["draft acceptance rate"] == "37.5%"
    assert text["pass@1"].startswith("25.0% [") and text["pass@1"].endswith("%]")
    assert text["speedup"] == "2.00 [2.00, 2.00]"
    assert text["sampling"] == "greedy"


def test_end_to_end_speedup_and_overhead_include_the_prefill():
    line = line_of(tables.summary_table(make_run(num_problems=3)), "speculative")
    # 20 + 30 + 40 tokens: 1.5 s of prefill beside 90/40 s and 90/80 s of decoding.
    assert line["end-to-end speedup"] == pytest.approx((1.5 + 2.25) / (1.5 + 1.125))
    assert line["time outside forwards"] == pytest.approx(0.1)


def test_outputs_are_compared_with_the_reference_or_else_the_baseline():
    """Sampled texts are not: each method has a random stream, and 0/12 would look like a bug."""
    rows = make_run()
    rows[-1] = replace(rows[-1], token_ids=[*rows[-1].token_ids[:-1], 99])
    for made, other, identical in (
        (rows, "reference", "11/12"),
        (make_run(methods=("autoregressive", "speculative")), "autoregressive", "12/12"),
    ):
        table = tables.summary_table(made)
        assert line_of(table, "speculative")["identical outputs"] == identical
        assert f"identical outputs have the token ids of method {other}" in table.attrs["notes"]
    table = tables.summary_table(rows, sampling="temperature 0.8")
    assert line_of(table, "speculative")["identical outputs"] == ""


def test_a_run_stopped_midway_compares_what_all_methods_have():
    """The baseline's last, slow problem has no partner: no line of the table may count it."""
    extra = make_row("HumanEval/163", "autoregressive", 0, 10, decode_seconds=1000.0)
    table = tables.summary_table([*make_run(), extra])
    pd.testing.assert_frame_equal(table, tables.summary_table(make_run()))
    assert "1 rows are left out: another method lacks their example" in table.attrs["notes"]


def test_without_the_baseline_there_is_no_speedup():
    table = tables.summary_table(make_run(methods=("speculative",)))
    line = line_of(table, "speculative")
    assert math.isnan(line["speedup"])
    assert line["identical outputs"] == ""
    assert line_of(table_text.printable(table), "speculative")["speedup"] == "-"


def test_unscored_rows_are_named():
    rows = make_run()
    assert "speculative: only 11 of 12 rows are scored" in notes_of(
        rows, score_every_fourth(rows)[:-1]
    )


def test_several_samples_add_pass_at_k():
    table = scored_table(make_run(num_problems=4, num_samples=10), "")
    assert list(table["pass@10"]) == [0.25, 0.25, 0.25]
    assert all(table["pass@10 low"] < 0.25) and all(table["pass@10 high"] > 0.25)
    assert "pass@100" not in table
    assert list(table["n"]) == [4, 4, 4]  # problems
    assert list(table["identical outputs"]) == ["", "", "40/40"]  # texts
    lines = table_text.format_table(table).splitlines()
    assert lines[5].count("25.0% [0.0%, 75.0%]") == 2
    assert max(map(len, lines)) <= 120


@pytest.mark.parametrize(("num_problems", "is_told"), [(1, 0), (2, 1), (9, 1), (10, 0)])
def test_few_problems_have_intervals_that_mean_little(num_problems, is_told):
    text = table_text.format_table(tables.summary_table(make_run(num_problems, num_samples=2)))
    assert text.count("intervals over fewer than 10 problems mean little") == is_told


def on_two_machines(rows: list[Row]) -> list[Row]:
    """The later half of the problems on another machine, where the baselines are slower."""
    half = max(int(row.example_id.split("/")[1]) for row in rows) // 2
    made = []
    for row in rows:
        is_late = int(row.example_id.split("/")[1]) > half
        factor = 10 if is_late and row.method != "speculative" else 1
        seconds = row.decode_seconds * factor
        made.append(replace(row, device="B" if is_late else "A", decode_seconds=seconds))
    return made


def test_speeds_of_two_machines_are_lines_of_their_own_and_no_ratio_joins_them():
    """A resumed run's speedup was a ratio of seconds of two machines."""
    rows = on_two_machines(make_run())
    table = scored_table(rows)
    assert list(table["method"]) == [*tables.METHODS] + [
        f"{method} on machine {number}" for number in (1, 2) for method in tables.METHODS
    ]
    for name in ("tokens/s", "speedup", "end-to-end speedup", "time outside forwards"):
        assert table[name][:3].isna().all() and table[name][3:].notna().all()
    assert list(table["speedup"][3:]) == pytest.approx([1, 0.8, 2, 1, 0.8, 20])
    assert list(table["n"]) == [12] * 3 + [6] * 6
    assert list(table["pass@1"][:3]) == [0.25] * 3  # texts do not depend on the machine
    assert line_of(table, "speculative")["identical outputs"] == "12/12"
    notes = table.attrs["notes"]
    assert "machine 1 is A" in notes and "machine 2 is B" in notes
    text = table_text.format_table(table)
    assert "speculative on machine 2" in text and "nan" not in text
    for draw in FIGURES:
        figure = draw(rows)
        figure.draw_without_rendering()
        labels = texts_of(figure.axes[0].get_yticklabels())
        assert draw is figures.accepted_figure or "speculative on machine 2" in labels


def test_a_method_added_on_another_machine_has_no_speedup():
    rows = [replace(row, device="B" if row.method == "speculative" else "A") for row in make_run()]
    table = tables.summary_table(rows)
    assert math.isnan(line_of(table, "speculative")["speedup"])
    assert math.isnan(line_of(table, "speculative on machine 2")["speedup"])
    assert line_of(table, "speculative on machine 2")["tokens/s"] == pytest.approx(80)
    assert line_of(table, "reference on machine 1")["speedup"] == pytest.approx(0.8)


def test_rows_of_an_unknown_machine_have_no_speeds():
    """A file that a second machine went on with: either could have made the older rows."""
    table = tables.summary_table([replace(row, device="") for row in make_run()])
    assert table["speedup"].isna().all() and table["tokens/s"].isna().all()
    assert "machine 1 is not recorded, so it has no speeds" in table.attrs["notes"]


def test_pass_rates_are_compared_for_every_k():
    """A table with pass@10 said nothing of how far the methods' pass@10 may be apart by chance."""
    rows = make_run(num_problems=4, num_samples=10, methods=("autoregressive", "speculative"))
    scores = score_every_fourth(rows)
    for score in scores:  # one more problem, in one of its ten samples
        if score["example_id"] == "HumanEval/1" and score["method"] == "speculative":
            score["passed"] |= score["sample_index"] == 3
    notes = notes_of(rows, scores)
    assert "in pass@1, speculative minus autoregressive is +2.5% [+0.0%, +7.5%]" in notes
    assert "in pass@10, speculative minus autoregressive is +25.0% [+0.0%, +75.0%]" in notes
    assert not any("pass@" in note for note in notes_of(rows))


def test_terminal_table_is_aligned_and_fits():
    lines = table_text.format_table(scored_table(make_run(num_problems=164))).splitlines()
    assert max(map(len, lines)) <= table_text.WIDTH
    speed, drafting = lines[5], lines[12]  # two blocks, because one would be too wide
    assert [line.split()[0] for line in (speed, drafting)] == ["speculative"] * 2
    assert "2.00 [2.00, 2.00]" in speed and "164/164" in drafting and "37.5%" in drafting
    assert all(len({len(line) for line in lines[at : at + 5]}) == 1 for at in (1, 8))
    assert lines[13] == "identical outputs have the token ids of method reference"
    assert table_text.format_table(tables.summary_table([])) == "no rows to show"


def test_a_wide_table_repeats_its_keys_in_each_block():
    table = pd.DataFrame({"a": ["1"], "b": ["2"], "what is counted": ["3"], "d": ["4"]})
    assert table_text.aligned(table, keys=2, width=14) == [
        *("      what is", "a  b  counted", "-------------", "1  2        3"),
        *("", "", "a  b  d", "-------", "1  2  4"),
    ]


def test_published_figures_stand_beside_ours_under_their_own_label():
    ours, published = tables.summary_table(make_run()), tables.published_table("humaneval")
    both = {"ours": ours.set_index("method"), "published": published.set_index("method")}
    text = table_text.printable(pd.concat(both))
    assert list(text.loc["published"]["pass@1"]) == ["35.0%", "40.0%"]
    assert list(text.loc["published"]["speedup"]) == ["-", "2.52"]
    assert list(text.loc["published"]["draft acceptance rate"]) == ["-", "75.0%"]
    assert list(text.loc["published"]["n"]) == ["-", "-"]
    assert list(text.loc["ours"]["n"]) == ["12", "12", "12"]
    text = table_text.printable(tables.published_table("xsum"))
    assert list(text["rouge1"]) == ["0.160", "0.159"]
    assert list(text["speedup"]) == ["-", "1.84"]
    assert list(text["draft acceptance rate"]) == ["-", "32.0%"]
    assert "pass@1" not in text


def test_a_pairs_prediction_stands_below_the_table():
    """alpha, the cost ratio and what Theorem 3.8 makes of them, beside what was measured."""
    rows = make_run()
    for i, row in enumerate(rows):
        if row.method == "speculative":
            calls = {"draft_calls": 8, "draft_call_seconds": 0.2, "target_call_seconds": 0.6}
            rows[i] = replace(row, **calls)
    (note,) = (note for note in notes_of(rows) if "Theorem 3.8" in note)
    alpha = metrics.per_token_acceptance([row for row in rows if row.method == "speculative"])
    assert note.startswith(f"speculative: alpha is {alpha:.1%}, and a draft call takes 0.")
    assert "(measured: 2.00 [2.00, 2.00]). Calls of several rows take longer than calls" in note
    assert not any("Theorem" in note for note in notes_of(make_run()))


@pytest.mark.parametrize("left_out", [0, 3])
def test_target_draft_and_both_stand_side_by_side(left_out):
    """Over the examples that both runs have: the target's score at a speed near the draft's."""
    rows = make_run()
    alone = [
        replace(row, decode_seconds=row.decode_seconds / 4)
        for row in make_run(12 - left_out, methods=("autoregressive",))
    ]
    fails = [Score(**{**score, "passed": False}) for score in score_every_fourth(alone)]
    table = tables.target_and_draft_table(
        Run(rows, META, score_every_fourth(rows)), Run(alone, META, fails)
    ).set_index("who")
    assert table["n"].tolist() == [12 - left_out] * 3
    pass_rate = 3 / (12 - left_out)
    assert table["pass@1"].tolist() == pytest.approx([pass_rate, 0, pass_rate])
    assert table["tokens/s"].tolist() == pytest.approx([40, 160, 80])
    assert table["speedup"].tolist() == pytest.approx([1, 4, 2])
    assert "pass@1" not in tables.target_and_draft_table(
        Run(rows, META, None), Run(alone, META, None)
    )


def make_rouge_scores(num_examples=12, **change_by_method: float) -> list[RougeScore]:
    """rouge1 of 0.1, 0.2, 0.3 over and over, changed by a method's own number."""
    scores = []
    for method in tables.METHODS:
        first = 0.1 + change_by_method.get(method, 0.0)
        values = {f"HumanEval/{i}": [first + 0.1 * (i % 3)] for i in range(num_examples)}
        scores += make_rouge(method, **values)
    return scores


def test_rouge_scores_make_rouge_columns_and_no_pass_rate():
    table = tables.summary_table(make_run(), make_rouge_scores(autoregressive=0.1), "greedy")
    assert list(table["rouge1"]) == pytest.approx([0.3, 0.2, 0.2])
    assert list(table["rouge2"]) == pytest.approx([0.15, 0.1, 0.1])
    assert list(table["rougeL"]) == pytest.approx([0.075, 0.05, 0.05])
    assert all(table["rouge1 low"] < table["rouge1"]) and all(table["rougeL high"] > 0.05)
    assert "pass@1" not in table
    assert line_of(table_text.printable(table), "speculative")["rouge1"].startswith("0.200 [0.1")
    notes = table.attrs["notes"]
    assert "in rouge1, speculative minus reference is +0.0000 [+0.0000, +0.0000]" in notes
    assert "in rouge1, speculative minus autoregressive is -0.1000 [-0.1000, -0.1000]" in notes


def test_rouge_differences_are_a_table_of_all_three_measures():
    table = tables.rouge_difference_table(make_run(), make_rouge_scores(autoregressive=0.1))
    text = table_text.printable(table.set_index("less"))
    assert list(text.pop("method")) == ["speculative"] * 2
    assert list(text.columns) == ["rouge1 difference", "rouge2 difference", "rougeL difference"]
    assert list(text.loc["autoregressive"]) == [
        f"{value} [{value}, {value}]" for value in ("-0.1000", "-0.0500", "-0.0250")
    ]
    assert text.loc["reference"].iloc[0] == "+0.0000 [+0.0000, +0.0000]"


@pytest.mark.filterwarnings("error")
def test_rouge_of_one_article_has_no_bounds_and_without_speculative_no_difference():
    notes = notes_of(make_run(num_problems=1), make_rouge_scores(1))
    assert "in rouge1, speculative minus reference is +0.0000" in notes
    assert notes_of(make_run(methods=("reference",)), make_rouge_scores()) == []


def test_a_rouge_table_of_a_whole_test_split_fits_the_terminal():
    table = tables.summary_table(make_run(), make_rouge_scores(), "greedy")
    table["n"], table["identical outputs"] = 11_334, "11334/11334"
    lines = table_text.format_table(table).splitlines()
    assert max(map(len, lines[:6])) <= 120
    assert "rouge1" in lines[0] and "rouge2" in lines[1]
    assert "0.200 [0.1" in lines[5] and "0.100" in lines[5]


def test_cut_documents_are_counted_below_the_table():
    rows = [
        replace(row, num_cut_tokens=9) if row.example_id[-1] in "12" else row
        for row in make_run(num_problems=10)
    ]
    assert "the number of documents cut to fit the context is 2" in notes_of(rows)
    assert not any("cut" in note for note in notes_of(make_run()))


def test_examples_stand_side_by_side_with_the_documents_start():
    """A document without spaces was one word that did not fit, and nothing of it was shown."""
    rows = [
        replace(row, completion=f"{row.method} of {row.example_id}", reference="Short.")
        for row in make_run(num_samples=2, methods=("autoregressive", "speculative"))
    ]
    documents = {
        f"HumanEval/{i}": text for i, text in enumerate(("word " * 100, "All.", "東" * 99))
    }
    table = tables.example_table(rows, documents, num_examples=3, num_characters=24)
    assert list(table.index) == [*documents]
    assert list(table["document"]) == ["word word word word ...", "All.", "東" * 20 + " ..."]
    assert list(table["reference summary"]) == ["Short."] * 3
    assert table.loc["HumanEval/1", "speculative"] == "speculative of HumanEval/1"
    assert table.columns[2] == "autoregressive"


GREEDY = {"temperature": 0, "top_k": 0, "top_p": 1.0}
XSUM_NUCLEUS = {"temperature": 1, "top_k": 0, "top_p": 0.8}
HUMANEVAL_NUCLEUS = {"temperature": 0.8, "top_k": 0, "top_p": 0.95}


def make_cell(task: str, sampling: dict, rows: list[Row], scores=None) -> Run:
    config = META["config"] | {"xsum": None, "humaneval": None, task: {}, "sampling": sampling}
    return Run(rows, META | {"config": config}, scores)


def make_grid() -> list[Run]:
    """Three cells, the paper's HumanEval one with 10 samples; only XSum's ROUGE moves, by 0.1."""
    sampled = make_run(num_samples=10, methods=("autoregressive", "speculative"))
    both = [row for row in make_run() if row.method != "reference"]
    rouge = [item for item in make_rouge_scores(speculative=0.2) if item["method"] != "reference"]
    return [
        make_cell("xsum", XSUM_NUCLEUS, both, rouge),
        make_cell("humaneval", HUMANEVAL_NUCLEUS, sampled, score_every_fourth(sampled)),
        make_cell("humaneval", GREEDY, make_run(), score_every_fourth(make_run())),
    ]


def cell_of(table: pd.DataFrame, benchmark: str, sampling: str) -> pd.DataFrame:
    is_cell = table["benchmark"].str.startswith(benchmark) & (table["sampling"] == sampling)
    return table[is_cell].set_index("method")


def test_table1_has_a_line_per_cell_and_method():
    """A decoder that is not lossless must stand out: its difference's interval does not hold 0."""
    table = grid.table1(make_grid())
    xsum = cell_of(table, "XSum", "temperature 1, top-p 0.8")
    assert list(xsum.index) == ["autoregressive", "speculative"]
    assert list(xsum["rouge2"]) == pytest.approx([0.1, 0.2])
    assert list(xsum["ms/token"]) == pytest.approx([25, 12.5])
    assert list(xsum["speedup"]) == pytest.approx([1, 2])
    assert xsum["pass@1"].isna().all()
    difference = xsum.loc["speculative", ["rouge2 difference low", "rouge2 difference high"]]
    assert list(difference) == pytest.approx([0.1, 0.1])
    assert math.isnan(xsum.loc["autoregressive", "rouge2 difference"])
    greedy = cell_of(table, "HumanEval", "greedy")
    assert list(greedy["pass@1"]) == [0.25] * 3
    assert list(greedy["pass@1 difference"])[1:] == [0, 0]
    assert greedy.loc["speculative", "identical outputs"] == "12/12"
    sampled = cell_of(table, "HumanEval", "temperature 0.8, top-p 0.95")
    assert list(sampled["n"]) == [12, 12]
    assert list(sampled["pass@10"]) == [0.25, 0.25]
    assert sampled.loc["speculative", "identical outputs"] == ""


def test_terminal_table1_keeps_the_papers_figures_apart():
    text = grid.format_table1(grid.table1(make_grid()))
    ours, theirs = text.split("published by Chen et al. 2023, not measured here:")
    assert "this run:" in ours and "Chinchilla 70B" in theirs and "16 TPU v4" in theirs
    lines = ours.splitlines()
    position = lines.index("XSum (ROUGE-2), temperature 1, top-p 0.8")
    speculative = lines[position + 2]
    for cell in ("0.200 [", "+0.1000 [+0.1000, +0.1000]", "12.50", "2.00 [2.00, 2.00]"):
        assert cell in speculative
    assert "+0.0% [+0.0%, +0.0%]" in ours
    assert [line.split()[1:] for line in theirs.splitlines() if "speculative " in line][:3] == [
        ["-", "0.114", "-", "7.52", "1.92", "-"],
        ["-", "0.156", "-", "7.00", "2.01", "-"],
        ["-", "47.0%", "-", "5.73", "2.46", "-"],
    ]
    xsum, humaneval = (f"{name}), " for name in ("XSum (ROUGE-2", "HumanEval (pass@1"))
    nucleus = [f"{xsum}temperature 1, top-p 0.8", f"{humaneval}temperature 0.8, top-p 0.95"]
    cells = [line for line in text.splitlines() if line.startswith((xsum, humaneval))]
    titles = [*nucleus, f"{humaneval}greedy", nucleus[0], f"{xsum}greedy", nucleus[1]]
    assert [cell for cell in cells if ": " not in cell] == titles
    assert max(len(line) for line in lines) <= 120


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("methods", [("autoregressive",), ("speculative",), tables.METHODS])
def test_table1_of_an_unfinished_grid_shows_what_there_is(methods):
    """Stopped in its first cell, before the scoring."""
    table = grid.table1([make_cell("xsum", GREEDY, make_run(methods=methods))])
    assert list(table["method"]) == list(methods)
    assert table["rouge2"].isna().all()
    assert "XSum (ROUGE-2), greedy" in grid.format_table1(table)
    grid.table1_figure(table).draw_without_rendering()


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p", "words"),
    [
        (0, 5, 0.9, "greedy"),
        (0.8, 0, 0.95, "temperature 0.8, top-p 0.95"),
        (1, 40, 1.0, "temperature 1, top-k 40"),
    ],
)
def test_sampling_in_words(temperature, top_k, top_p, words):
    sampling = {"temperature": temperature, "top_k": top_k, "top_p": top_p}
    assert tables.describe_sampling(sampling) == words


def test_run_in_words_names_hardware_precision_config_and_command():
    """A run whose k is found while decoding has no limit for models."""
    text = tables.describe_run(META)
    for part in ("A Processor", "bfloat16", "2 threads", "0123456789abcdef", "k = 5", "greedy"):
        assert part in text
    for part in ("python main_exp2.py", "torch 2.13.0", META["bit_exact"], "abc1234"):
        assert part in text
    assert "memory" not in text
    resumed = [{"peak_memory": "6.1 GB"}, {}, {"peak_memory": "5.9 GB"}]
    text = tables.describe_run({**META, "peak_memory": "5.9 GB", "resumed": resumed})
    assert "2 threads, peak memory 5.9 GB or 6.1 GB\n" in text
    for k, words in ((7, "k = 7 (at most 6 from a model), "), ("auto", "auto, ")):
        config = META["config"] | {"speculation": {"k": k, "model_k": 6}}
        assert words in tables.describe_run(META | {"config": config}).splitlines()[1]


FIGURES = [figures.speedup_figure, figures.accepted_figure, figures.tokens_per_second_figure]


def texts_of(labels) -> list[str]:
    return [label.get_text().strip().replace("\n", " ") for label in labels]


@pytest.mark.parametrize("draw", FIGURES)
@pytest.mark.parametrize("methods", [tables.METHODS, ("autoregressive",), ("speculative",)])
@pytest.mark.filterwarnings("error")
def test_figures_are_titled_and_labelled_whatever_was_run(draw, methods):
    figure = draw(make_run(methods=methods))
    (axes,) = figure.axes
    figure.draw_without_rendering()
    if axes.get_title().startswith("Nothing to draw: no "):
        assert not axes.axison and len(methods) == 1  # no axes from NaN to NaN
    else:
        assert axes.get_title() and axes.get_xlabel()
        assert axes.get_ylabel() or figure.get_supylabel()


SEVEN = (
    *("autoregressive", "reference", "speculative", "speculative:ngram"),
    "speculative:embedded:smollm2-135m-draft@auto@coupled",
    "speculative:ngram+embedded:smollm2-135m-draft@4",
    "speculative:target-layers:4@8@block",
)


@pytest.mark.parametrize("draw", FIGURES)
def test_seven_methods_have_labels_that_do_not_overlap(draw):
    """The names of the methods stood side by side below the boxes, one printed over the other."""
    rows = [
        replace(row, method=method)
        for method in SEVEN
        for row in make_run(methods=(method if method in tables.METHODS else "speculative",))
    ]
    figure = draw(rows)
    figure.draw_without_rendering()
    texts = [
        text
        for axes in figure.axes
        for text in (*axes.get_yticklabels(), *axes.texts, axes.title)
        if text.get_text()
    ]
    boxes = [text.get_window_extent() for text in texts]
    for number, box in enumerate(boxes):
        assert not any(box.overlaps(other) for other in boxes[:number]), texts[number]
        assert box.x0 >= 0 and box.x1 <= figure.bbox.width + 1, texts[number]


def test_speed_figures_show_every_problem_and_the_total():
    (axes,) = figures.speedup_figure(make_run()).axes
    assert texts_of(axes.get_yticklabels()) == ["reference", "speculative"]
    dots, totals = (
        [list(line.get_xdata()) for line in axes.get_lines() if line.get_marker() == marker]
        for marker in ".D"
    )
    assert dots == [pytest.approx([ratio] * 12) for ratio in (0.8, 2.0)]
    assert totals == [pytest.approx([0.8]), pytest.approx([2.0])]
    assert texts_of(axes.texts) == ["0.80; faster on 0 of 12", "2.00; faster on 12 of 12"]
    (axes,) = figures.tokens_per_second_figure(make_run()).axes
    assert texts_of(axes.get_yticklabels()) == list(tables.METHODS)
    assert texts_of(axes.texts) == ["40.0", "32.0", "80.0"]


def test_accepted_figure_has_a_bar_per_count_and_one_for_no_draft():
    (axes,) = figures.accepted_figure(make_run()).axes
    heights = [bar.get_height() for bar in axes.patches]
    assert texts_of(axes.get_xticklabels()) == ["no draft", "0", "1", "2", "3", "4", "5"]
    assert heights == pytest.approx([100 / 3, 100 / 3, 0, 0, 100 / 3, 0, 0])


def test_table1_figure_has_our_speedups_beside_the_papers():
    (axes,) = grid.table1_figure(grid.table1(make_grid())).axes
    ours, theirs = (line for line in axes.get_lines() if line.get_marker() in "Ds")
    assert list(ours.get_xdata()) == pytest.approx([2, 2, 2])
    assert list(theirs.get_xdata())[:2] == [1.92, 2.46]
    assert math.isnan(theirs.get_xdata()[2])  # the paper has no greedy HumanEval
    assert texts_of(axes.get_yticklabels())[0] == "XSum (ROUGE-2), temperature 1, top-p 0.8"
    assert texts_of(axes.texts) == ["2.00", "1.92", "2.00", "2.46", "2.00"]
    assert axes.get_title() and axes.get_xlabel() and axes.get_ylabel()


def test_colours_stay_apart_in_greyscale():
    shades = [
        sum(weight * part for weight, part in zip((0.299, 0.587, 0.114), rgb, strict=True))
        for rgb in map(matplotlib.colors.to_rgb, (figures.DARK, figures.MIDDLE, figures.LIGHT))
    ]
    assert shades[1] - shades[0] > 0.25 and shades[2] - shades[1] > 0.25


def test_figures_are_the_same_each_time_and_not_left_open(tmp_path):
    """Jupyter draws what pyplot holds at a cell's end, and git shows what a rerun changes."""
    before = plt.get_fignums()
    for folder in ("first", "second"):
        figures.save_figure(figures.accepted_figure(make_run()), tmp_path / folder, "accepted")
    for suffix in (".png", ".svg"):
        first, second = (tmp_path / folder / f"accepted{suffix}" for folder in ("first", "second"))
        assert first.read_bytes() == second.read_bytes()
    assert plt.get_fignums() == before


class TaggedText(HTMLParser):
    """The text of a page with the tags that it stands in: [("p b u", "text"), ...]."""

    def __init__(self, page: str):
        super().__init__()
        self.open_tags: list[str] = []
        self.texts: list[tuple[str, str]] = []
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.open_tags.append(tag)

    def handle_endtag(self, tag):
        assert self.open_tags.pop() == tag

    def handle_data(self, text):
        self.texts.append((" ".join(self.open_tags), text))


def letters(token_ids) -> str:
    return "".join(map(chr, token_ids))


def make_spoken_row(text: str, accepted: list[int], drafted: list[int]) -> Row:
    return make_row(token_ids=[ord(c) for c in text], accepted=accepted, drafted=drafted)


def test_tokens_are_marked_by_their_origin_without_colour_too():
    """Two accepted and a bonus; a rejection at once; nothing drafted; the last cycle is cut."""
    row = make_spoken_row("abcdefg", accepted=[2, 0, 0, 4], drafted=[2, 3, 0, 4])
    texts = TaggedText(tokens.tokens_html(row, letters)).texts
    assert [text for _, text in texts[:7]] == list("abcdefg")
    tags = ["p span", "p span", "p b i", "p b u", "p b i", "p span", "p span"]
    assert [tag for tag, _ in texts[:7]] == tags
    legend = "".join(text for _, text in texts[7:])
    assert "accepted (drafted and accepted): 4" in legend
    assert "correction (the target's, after a rejection): 1" in legend
    assert "bonus (the target's, with nothing rejected): 2" in legend
    assert "without a draft" not in legend
    page = tokens.tokens_html(make_spoken_row("ab", [], []), letters)
    legend = "".join(text for _, text in TaggedText(page).texts)
    assert "target (the target's, without a draft): 2" in legend


def test_text_is_escaped_in_html():
    """A model may write markup, and `{}`, and the page must show it."""
    words = ["<script>", "&lt;", "{}"]
    row = make_row(token_ids=[0, 1, 2], accepted=[3], drafted=[3])
    page = tokens.tokens_html(row, lambda ids: "".join(words[i] for i in ids))
    assert [text for _, text in TaggedText(page).texts[:3]] == words


def test_report_imports_no_model_library_and_no_matplotlib():
    code = "import sys, specsampling.results.tables; print(*sys.modules)"
    project = Path(__file__).parent.parent
    imported = subprocess.check_output([sys.executable, "-c", code], cwd=project, text=True)
    assert not {"torch", "transformers", "matplotlib"} & set(imported.split())
