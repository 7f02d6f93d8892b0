"""With `speculation.verifier: coupled` a seed has one text, however it is decoded."""

from __future__ import annotations

import pytest
from test_end_to_end import OURS, run, start
from test_end_to_end import config as config  # a fixture
from test_ranks import finish_ranks, start_ranks

from specsampling.config import ConfigError, config_hash, load_config
from specsampling.results.records import read_meta, read_rows

SAMPLED = (
    *("--set", "sampling.temperature=0.9", "--set", "sampling.top_p=0.95"),
    *("--set", "sampling.num_samples=2", "--set", "speculation.verifier=coupled"),
    *OURS,
)
METHODS = "autoregressive,speculative,speculative:ngram@3,speculative@auto,speculative@1"
LIMIT = 4


def decode(config, path, *more, limit=LIMIT, methods=METHODS):
    return ("--config", config, "--limit", limit, "--methods", methods, "--output", path, *more)


def texts(path, method):
    rows = [row for row in read_rows(path) if row.method == method]
    assert all(row.noise == "positional" for row in rows)
    return {row.sample: row.token_ids for row in rows}


def have_same_texts(path, whole):
    return all(texts(path, method) == texts(whole[0], method) for method in METHODS.split(","))


@pytest.fixture(scope="module")
def whole(config, tmp_path_factory):
    """A run's file, and what it printed."""
    path = tmp_path_factory.mktemp("whole") / "rows.jsonl"
    code, printed, errors = run(*decode(config, path, *SAMPLED))
    assert code == 0, errors
    return path, printed


def test_every_method_writes_the_baselines_texts(whole):
    path, printed = whole
    wanted = texts(path, "autoregressive")
    assert len(wanted) == 2 * LIMIT
    assert len({tuple(ids) for ids in wanted.values()}) > LIMIT  # samples are samples
    for method in METHODS.split(",")[1:]:
        assert texts(path, method) == wanted
        assert f"{method}: all {2 * LIMIT} sampled texts equal autoregressive's" in printed
    assert printed.count(f"{2 * LIMIT}/{2 * LIMIT}") == 4


@pytest.mark.parametrize(
    "settings",
    [
        ("run.batch_size=3",),
        ("run.threads=2",),
        ("speculation.k=2",),
        ("decoding.compile=off", "decoding.width=16"),
    ],
    ids=lambda settings: settings[0],
)
def test_how_it_is_decoded_changes_no_text(settings, whole, config, tmp_path):
    """On the PyTorch path bits are those of a fixed width, so `reference` is the baseline."""
    is_torch = "decoding.compile=off" in settings
    methods = "reference,speculative" if is_torch else "autoregressive,speculative"
    path = tmp_path / "rows.jsonl"
    more = (part for setting in settings for part in ("--set", setting))
    code, _, errors = run(*decode(config, path, *SAMPLED, *more, methods=methods))
    assert code == 0, errors
    baseline = methods.partition(",")[0]
    assert texts(path, "speculative") == texts(path, baseline)
    if not is_torch:
        assert texts(path, baseline) == texts(whole[0], "autoregressive")


def test_a_run_that_was_killed_goes_on_with_the_same_texts(whole, config, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.touch()
    for num_rows in (3, 11):
        process = start(*decode(config, path, *SAMPLED))
        while process.poll() is None and len(path.read_bytes().splitlines()) < num_rows:
            pass
        process.kill()
        process.wait()
    code, _, errors = run(*decode(config, path, *SAMPLED))
    assert code == 0, errors
    assert have_same_texts(path, whole)


def test_two_processes_write_the_same_texts(whole, config, tmp_path):
    path = tmp_path / "rows.jsonl"
    code, _, errors = finish_ranks(start_ranks(*decode(config, path, *SAMPLED)))
    assert code == 0, errors
    assert have_same_texts(path, whole)


def test_older_sampled_runs_go_on_as_they_began(config, tmp_path):
    """Rows from before have no noise; a resumed baseline draws in sequence, as they did."""
    path = tmp_path / "rows.jsonl"
    more = (*OURS, "--set", "sampling.temperature=0.9")
    first = (*more, "--set", "sampling.noise=sequential")
    assert run(*decode(config, path, *first, limit=1, methods="autoregressive"))[0] == 0
    assert "noise" not in path.read_text()
    code, _, errors = run(*decode(config, path, *more, limit=2, methods="autoregressive"))
    assert code == 0, errors
    assert [row.noise for row in read_rows(path)] == [None, None]
    assert read_meta(path)["config"]["sampling"]["noise"] == "sequential"


def test_noise_is_not_hashed_and_must_fit_the_rule(config):
    old = load_config(config, None, ["sampling.noise=sequential"])
    assert config_hash(old) == config_hash(load_config(config))
    with pytest.raises(ConfigError, match=r"sampling.noise must be positional for the rule"):
        load_config(config, None, ["sampling.noise=sequential", "speculation.verifier=coupled"])
    with pytest.raises(ConfigError, match=r"speculation.verifier must be one of"):
        load_config(config, None, ["speculation.verifier=couple"])
