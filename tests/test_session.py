import random

import pytest
import torch
from conftest import ARCHITECTURES, CONTEXT, VOCAB_SIZE

from specsampling.method.session import Session
from specsampling.models.checkpoint import load_model

TOKENS = torch.randint(VOCAB_SIZE, (100,), generator=torch.Generator().manual_seed(3)).tolist()


class FilledPartSession(Session):
    """Calls of one width, but attention over the filled part of the cache only."""

    def _padded_call(self, ids):
        return self._forward.over_filled(ids, self.length, len(ids))


def uncached_logits(model, tokens):
    with torch.inference_mode():
        return model(input_ids=torch.tensor([tokens]), use_cache=False).logits[0]


def random_groups(total, largest, seed):
    chooser = random.Random(seed)
    groups = []
    while sum(groups) < total:
        groups.append(min(chooser.randint(1, largest), total - sum(groups)))
    return groups


def score_in_groups(session, num_prefilled, groups):
    session.prefill(TOKENS[:num_prefilled])
    end, rows = num_prefilled, []
    for size in groups:
        end += size
        rows.append(session.score(TOKENS[:end], last=size))
    return torch.cat(rows)


@pytest.mark.parametrize("width", [None, 8, 16])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_cached_logits_equal_uncached_logits(architecture, width, model_of):
    model = model_of(architecture)
    groups = random_groups(60, 8, seed=0)
    rows = score_in_groups(Session(model, 100, width), 20, groups)
    assert torch.allclose(rows, uncached_logits(model, TOKENS[:80])[20:], atol=1e-4, rtol=1e-4)


@pytest.mark.usefixtures("all_threads")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("width", [8, 16])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_rows_bits_do_not_depend_on_the_grouping(architecture, width, dtype, model_folders):
    """In 16 bit another call shape gives other bits, and greedy argmaxes flip at near-ties."""
    model = eager(model_folders, architecture, dtype)
    alone = score_in_groups(Session(model, 100, width), 37, [1] * 50)
    for seed in range(3):
        groups = random_groups(50, width, seed)
        assert torch.equal(alone, score_in_groups(Session(model, 100, width), 37, groups))


def eager(model_folders, architecture, dtype):
    """A model as it is loaded, its heads grouped."""
    folder = str(model_folders[f"{architecture}-target"])
    return load_model(folder, dtype, torch.device("cpu"), compile="off")


def test_another_number_of_keys_gives_other_bits(model_folders):
    """The negative control: attention over the filled part only is not independent of grouping."""
    model = eager(model_folders, "llama", torch.float32)
    alone = score_in_groups(FilledPartSession(model, 100, 8), 37, [1] * 50)
    grouped = score_in_groups(FilledPartSession(model, 100, 8), 37, random_groups(50, 8, 0))
    assert torch.allclose(alone, grouped, atol=1e-4)
    assert not torch.equal(alone, grouped)


@pytest.mark.parametrize("width", [None, 8])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_rolled_back_tokens_leave_no_trace(architecture, width, model_of):
    rows, start = [], TOKENS[:10]
    for fed in ([1, 2, 3, 4, 5], [1, 2]):
        session = Session(model_of(architecture), 60, width)
        session.prefill(start)
        session.score(start + fed, last=1)
        session.length = 12  # of the five, two were accepted
        rows.append(session.score(start + [1, 2, 7, 8], last=2))
    assert torch.allclose(*rows, atol=1e-5)
    assert width is None or torch.equal(*rows)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_padding_may_reach_beyond_the_last_position(architecture, model_of):
    """A padded last call asked learned position tables for rows that they do not have."""
    model = model_of(architecture)
    tokens = (TOKENS * 2)[:CONTEXT]
    session = Session(model, CONTEXT, width=8)
    session.prefill(tokens[:-2])
    row = session.score(tokens[:-1], last=1)
    assert torch.allclose(row[0], uncached_logits(model, tokens)[-2], atol=1e-4, rtol=1e-4)
    session.score(tokens, last=1)


def test_no_token_is_fed_twice_and_logits_are_computed_only_where_needed(llama):
    """Some baselines had no KV cache; some computed logits for the whole prompt."""
    fed, rows = [], []
    hooks = [
        llama.model.embed_tokens.register_forward_hook(lambda _, i, o: fed.append(i[0].shape[1])),
        llama.lm_head.register_forward_hook(lambda _, i, o: rows.append(o.shape[1])),
    ]
    session = Session(llama, 100)
    score_in_groups(session, 30, [1, 1, 3])
    for hook in hooks:
        hook.remove()
    assert fed == [30, 1, 1, 3] and rows == [1, 1, 3]
    assert session.num_calls == 3 and session.forward_seconds > 0


@pytest.mark.parametrize(("num_fed", "last"), [(0, 1), (9, 1), (2, 3)])
def test_impossible_calls_are_refused(num_fed, last, llama):
    """Nothing is fed, more than the width, or fewer than the rows that are asked for."""
    session = Session(llama, 40, width=8)
    session.prefill(TOKENS[:10])
    with pytest.raises(ValueError, match="cannot feed"):
        session.score(TOKENS[: 10 + num_fed], last)
