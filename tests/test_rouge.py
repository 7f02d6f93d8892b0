"""ROUGE must be rouge_score's own numbers, and need nothing but its packages."""

import json
import os
import subprocess
import sys
from pathlib import Path

import evaluate
import pytest
from rouge_score.rouge_scorer import RougeScorer

from specsampling.config import XSumColumns
from specsampling.tasks.articles import load_articles
from specsampling.tasks.rouge import Rouge

NAMES = ["rouge1", "rouge2", "rougeL"]
PAIRS = [  # prediction, reference
    ("The bridge was closed on Monday.", "A bridge has been closing since Monday, police said."),
    ("police close bridge", "Bridge closed by police"),
    ("", "An empty summary scores nothing."),
    ("naïve café in Zürich", "A café in Zürich, 3.5 miles away"),
    ("same words, same order", "same words, same order"),
    ("one\ntwo", "one two three two"),
]


def score(pairs=PAIRS, **options):
    predictions, references = zip(*pairs, strict=True)
    return Rouge().compute(predictions=predictions, references=references, **options)


def expected() -> dict[str, list[float]]:
    scorer = RougeScorer(NAMES, use_stemmer=True)
    scores = [scorer.score(reference, prediction) for prediction, reference in PAIRS]
    return {name: [score[name].fmeasure for score in scores] for name in NAMES}


def of_the_demo() -> dict[str, list[str]]:
    """The demo's articles; the first line of each stands for a prediction."""
    articles = load_articles("embedded:articles", "test", XSumColumns())
    return {
        "predictions": [article.text.partition("\n")[0] for article in articles],
        "references": [article.reference for article in articles],
    }


def test_samples_have_the_scores_of_the_scorer_itself():
    assert score(use_aggregator=False) == expected()
    metric = Rouge()
    for prediction, reference in PAIRS:  # batches may be added one after another
        metric.add_batch(predictions=[prediction], references=[reference])
    assert metric.compute(use_aggregator=False) == expected()


def test_the_mean_is_the_samples_own():
    """evaluate's own metric returns the middle of a random bootstrap, another one each time."""
    means = {name: sum(values) / len(PAIRS) for name, values in expected().items()}
    assert score() == pytest.approx(means, abs=1e-4)
    assert score() == score()


def test_words_are_stemmed_and_order_counts_where_it_should():
    found = score([("closed bridges", "closing bridge"), ("b a", "a b")], use_aggregator=False)
    assert found == {"rouge1": [1.0, 1.0], "rouge2": [1.0, 0.0], "rougeL": [1.0, 0.5]}


def test_the_stemmer_is_the_one_that_is_pinned():
    """Another stemmer moves every published score, and no other test would see it."""
    means = {"rouge1": 0.159544, "rouge2": 0.012498, "rougeL": 0.121220}
    assert Rouge().compute(**of_the_demo()) == pytest.approx(means, abs=1e-6)


@pytest.mark.network
def test_evaluates_own_rouge_agrees():
    """It is a script on the hub, which `evaluate` runs."""
    texts = of_the_demo()
    theirs = evaluate.load("rouge").compute(**texts, use_stemmer=True, use_aggregator=False)
    ours = Rouge().compute(**texts, use_aggregator=False)
    assert ours == {name: theirs[name] for name in NAMES}


def test_lm_evals_rouge_agrees():
    """It stems no words, and so do we if asked. It bootstraps, which leaves one pair as it is."""
    utils = pytest.importorskip("lm_eval.tasks.truthfulqa.utils", reason="needs lm-eval")
    texts = of_the_demo()
    ours = Rouge().compute(**texts, use_aggregator=False, use_stemmer=False)
    for number, (prediction, reference) in enumerate(zip(*texts.values(), strict=True)):
        theirs = utils.rouge([reference], [prediction])
        theirs["rougeL"] = theirs.pop("rougeLsum")  # the same for a text of one line
        assert {name: 100 * ours[name][number] for name in NAMES} == pytest.approx(theirs)


def test_a_missing_reference_is_an_error_and_not_a_shorter_mean():
    with pytest.raises(ValueError, match="Mismatch in the number"):
        Rouge().compute(predictions=["a", "b"], references=["a"])


def test_nothing_is_fetched_and_nothing_is_left_in_the_users_home(tmp_path):
    """`evaluate.load("rouge")` fetches a script, and a metric leaves a folder in the cache."""
    code = """
import json, socket
def refuse(*arguments):
    raise AssertionError("went to the network")
socket.socket.connect = socket.getaddrinfo = refuse
from specsampling.tasks.rouge import Rouge
print(json.dumps(Rouge().compute(predictions=["closed"], references=["closing"])))
"""
    home = tmp_path / "home"
    home.mkdir()
    variables = {name: os.environ[name] for name in os.environ if name[:3] not in ("HF_", "XDG")}
    variables |= {"HOME": str(home), "USERPROFILE": str(home)}
    options = {"env": variables, "cwd": Path(__file__).parents[1], "capture_output": True}
    done = subprocess.run([sys.executable, "-c", code], text=True, **options)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == {"rouge1": 1.0, "rouge2": 0.0, "rougeL": 1.0}
    assert list(home.rglob("*")) == []
