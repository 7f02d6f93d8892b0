"""Benchmarks/identity.py: what theory expects of each rule, and the tables beside it."""

import math
from pathlib import Path

import numpy as np
import pytest
from conftest import make_model
from helpers import mistake
from test_end_to_end import run
from test_table1 import config as config  # a fixture

from autoregressive import autoregressive
from Benchmarks import identity, race
from specsampling.console import exit_code
from specsampling.method.drafts import DraftTerms, ModelDraft
from specsampling.method.noise import Noise
from specsampling.method.sampling import Sampling
from specsampling.method.verify import verify_coupled
from specsampling.results.records import read_rows
from speculative import speculative

PAIRS = [np.random.default_rng(seed).dirichlet(np.full(7, 0.4), size=2) for seed in range(20)]


def by_definition(p: np.ndarray, q: np.ndarray) -> float:
    """The sum as Daliri et al. write it, over the tokens that both distributions have."""
    total = 0.0
    for v in range(len(p)):
        if p[v] > 0 and q[v] > 0:
            total += 1 / sum(max(p[w] / p[v], q[w] / q[v]) for w in range(len(p)))
    return total


@pytest.mark.parametrize("cut", [0.0, 0.05], ids=["all", "nuclei"])
def test_sorted_sums_are_the_double_sum(cut):
    for pair in PAIRS:
        p, q = (np.where(probs < cut, 0, probs) for probs in pair)
        p, q = p / p.sum(), q / q.sum()
        assert math.isclose(identity.coupled_chance(p, q), by_definition(p, q), rel_tol=1e-12)
        assert identity.coupled_chance(p, q) <= identity.token_chance(p, q) + 1e-12


def test_chances_of_equal_and_of_disjoint_distributions():
    p, q = PAIRS[0]
    for chance in (identity.token_chance, identity.coupled_chance):
        assert chance(p, p) == pytest.approx(1)
        assert chance(np.array([1.0, 0.0]), np.array([0.0, 1.0])) == 0
    assert identity.greedy_chance(p, q) == p[q.argmax()]


def test_a_draft_may_be_greedy_where_the_target_samples():
    """Under `coupled` it changes no text; under `token` its distributions are one-hot."""
    target, draft = make_model("llama"), ModelDraft(make_model("llama", 1), is_greedy=True)
    sampling = Sampling(1.0)
    proposer = draft.start(DraftTerms.of(target, 32, sampling, None))
    proposer.prefill([7, 3])
    tokens, probs = proposer.propose([7, 3, 9], 3)
    assert [dict(of.probs) for of in probs] == [{token: 1.0} for token in tokens]
    for seed in range(5):
        options = {"max_new_tokens": 8, "sampling": sampling, "width": 8}
        options["generator"] = Noise.of(seed)
        wanted = autoregressive(target, [7, 3, 9], **options).token_ids
        found = speculative(target, draft, [7, 3, 9], k=3, verifier=verify_coupled, **options)
        assert found.token_ids == wanted


@pytest.fixture(scope="module")
def finished(config, tmp_path_factory) -> tuple[Path, str]:
    folder = tmp_path_factory.mktemp("identity")
    code, printed, errors = run(
        *("--config", config, "--limit", 1, "--k", 2, "--output-folder", folder),
        script="Benchmarks/identity.py",
    )
    assert code == 0, errors
    return folder, printed


def test_the_script_runs_every_rule_in_every_setting(finished, model_folders):
    folder, printed = finished
    model = model_folders["llama-draft"]
    for temperature, top_p in identity.SETTINGS:
        rows = read_rows(folder / "identity" / f"{temperature:g}-{top_p:g}.jsonl")
        assert {row.method for row in rows} == {
            "autoregressive",
            *(f"speculative:ngram@{rule}" for rule in ("token", "coupled")),
            *(
                f"speculative:{draft}@{rule}"
                for draft in (model, f"ngram+{model}")
                for rule in ("token", "block", "coupled")
            ),
            f"speculative:greedy:{model}@coupled",
        }
        texts = {tuple(r.token_ids) for r in rows if "token" not in r.method and r.noise}
        assert len(texts) == 1
    chances = identity.read_chances(folder / "identity" / identity.CHANCES)
    assert len(chances) == len(identity.SETTINGS)
    assert all(0 <= value <= 1.0001 for item in chances for value in item.coupled + item.token)
    assert "over all settings" in printed


def test_finished_rows_are_shown_without_models(finished, tmp_path, capsys):
    folder, printed = finished
    arguments = ["--show", "--output-folder", str(folder)]
    assert exit_code(identity.main, arguments) == 0
    assert capsys.readouterr().out.strip() in printed
    assert mistake(identity.main, ["--show", "--output-folder", tmp_path], capsys)


@pytest.mark.parametrize("arguments", [["--k", "0"], ["--k", "many"], ["--profile", "none"]])
def test_mistakes_are_one_line(arguments, tmp_path, capsys):
    name = arguments[0].strip("-")
    line = mistake(identity.main, [*arguments, "--output-folder", tmp_path / "x"], capsys)
    assert f"{name} must be" in line


def test_the_figure_of_the_race_is_the_one_that_its_script_draws(tmp_path, monkeypatch):
    monkeypatch.setattr(race, "PROJECT", tmp_path)
    assert exit_code(race.main, []) == 0
    committed = Path(race.__file__).parent.parent / "docs" / "race.svg"
    assert (tmp_path / "docs" / "race.svg").read_bytes() == committed.read_bytes()
    same, other = race.winners(0), race.winners(2)
    assert same[0] == same[1] and other[0] != other[1]
