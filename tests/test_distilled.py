"""The shipped draft: joined with its target's embedding, a trimmed head, its hash."""

import hashlib

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from autoregressive import autoregressive
from specsampling.method.drafts import CompositeDraft, DraftTerms, ModelDraft, NgramDraft
from specsampling.method.sampling import Sampling, probs_from_logits
from specsampling.method.session import Session
from specsampling.models import embedded
from specsampling.models.cache import made_once
from specsampling.models.checkpoint import load_model
from specsampling.models.distilled import HEAD_TOKENS, TrimmedHead, assemble, expand, shrink
from specsampling.models.embedded import DRAFTS, embedded_folder
from specsampling.models.errors import ModelError
from specsampling.models.kernel_model import KernelModel
from specsampling.models.load import load_pair
from speculative import speculative

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folders(tmp_path_factory, tokenizer):
    """A tied target as `embedded:smollm2-135m` is one, and the draft made of its first layer."""
    root = tmp_path_factory.mktemp("distilled")
    sizes = {"vocab_size": len(tokenizer), "hidden_size": 64, "intermediate_size": 128}
    sizes |= {"num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2}
    sizes |= {"max_position_embeddings": 512, "tie_word_embeddings": True}
    torch.manual_seed(0)
    target = LlamaForCausalLM(LlamaConfig(**sizes, initializer_range=0.3))
    target.generation_config.eos_token_id = tokenizer.eos_token_id
    target.save_pretrained(root / "target")
    tokenizer.save_pretrained(root / "target")
    state = target.model.state_dict()
    own = {n: t.clone() for n, t in state.items() if n.startswith("layers.0.")}
    own |= {"norm.weight": state["norm.weight"].clone()}
    shrunk = shrink(own, torch.arange(0, len(tokenizer), 3))
    save_file(shrunk, root / "draft.safetensors", {"format": "pt"})
    assemble(root / "target", root / "draft.safetensors", root / "draft")
    return root


def load(folders, draft: str, **options):
    return load_pair(str(folders / "target"), draft, device="cpu", **options)


def test_the_assembled_folder_is_an_ordinary_one(folders):
    """Any tool can load it: the target's embedding, tokenizer and end, the draft's own layers."""
    target = AutoModelForCausalLM.from_pretrained(folders / "target")
    draft = AutoModelForCausalLM.from_pretrained(folders / "draft", dtype=torch.float32)
    assert draft.config.num_hidden_layers == 1
    embedding = target.model.embed_tokens.weight.bfloat16().float()
    assert torch.equal(draft.model.embed_tokens.weight, embedding)
    assert torch.equal(draft.lm_head.weight, embedding)
    for name, tensor in target.model.layers[0].state_dict().items():
        ours = draft.model.layers[0].state_dict()[name].float()
        torch.testing.assert_close(ours, tensor, atol=float(tensor.abs().max()) / 90, rtol=0)
    tokenizers = [AutoTokenizer.from_pretrained(folders / name) for name in ("target", "draft")]
    assert tokenizers[0]("def f(x):") == tokenizers[1]("def f(x):")
    ids = torch.tensor([[5, 6, 7]])
    options = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    plain = target.generate(ids, **options)
    assert torch.equal(target.generate(ids, assistant_model=draft, **options), plain)


def test_8_bit_matrices_are_off_by_half_a_step_at_most():
    own = {"layers.0.w.weight": torch.randn(6, 40) * torch.logspace(-3, 2, 6)[:, None]}
    own |= {"layers.0.z.weight": torch.zeros(2, 3), "norm.weight": torch.randn(40)}
    shrunk = shrink(own, torch.tensor([1, 5]))
    assert shrunk["layers.0.w.weight"].dtype == torch.int8
    tensors, head_tokens = expand(shrunk)
    assert tensors.keys() == own.keys() and head_tokens.tolist() == [1, 5]
    assert torch.equal(tensors["norm.weight"], own["norm.weight"])
    assert torch.equal(tensors["layers.0.z.weight"], own["layers.0.z.weight"])
    wide = own["layers.0.w.weight"]
    step = wide.abs().amax(1, keepdim=True) / 127
    assert ((tensors["layers.0.w.weight"] - wide).abs() <= step * 0.501).all()


def test_a_trimmed_head_scores_as_the_full_one_and_nothing_else():
    head = torch.nn.Linear(8, 50, bias=False)
    token_ids = torch.tensor([3, 4, 11, 49])
    rows = torch.randn(2, 5, 8)
    logits, expected = TrimmedHead(head, token_ids)(rows), head(rows)
    assert logits.shape == expected.shape
    torch.testing.assert_close(logits[..., token_ids], expected[..., token_ids])
    others = torch.ones(50, dtype=torch.bool)
    others[token_ids] = False
    assert (logits[..., others] == -torch.inf).all()
    for sampling in (Sampling(), Sampling(1.0), Sampling(0.7, top_k=10), Sampling(1.0, top_p=0.8)):
        rows = probs_from_logits(logits.view(10, 50), sampling)
        probs = torch.stack([row.dense(50) for row in rows])
        assert (probs[:, others] == 0).all()
        torch.testing.assert_close(probs.sum(-1), torch.ones(10))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_loading_the_folder_trims_the_head(dtype, folders):
    draft = load_model(str(folders / "draft"), dtype, CPU)
    assert isinstance(draft.get_output_embeddings(), TrimmedHead)
    assert isinstance(draft, KernelModel) and draft.engine.head.format == "int8"
    full = AutoModelForCausalLM.from_pretrained(folders / "draft", dtype=dtype)
    token_ids = load_file(folders / "draft" / HEAD_TOKENS)["head_tokens"].long()
    logits = Session(draft, 16).score([1, 2, 3], last=3)
    with torch.inference_mode():
        expected = full(torch.tensor([[1, 2, 3]])).logits[0]
    error = (logits[:, token_ids].float() - expected[:, token_ids].float()).abs().mean()
    assert error < 0.05 * expected.float().std()  # of 8 bit
    assert logits.isneginf().sum() == 3 * (logits.shape[1] - len(token_ids))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("lookup", ["", "ngram+"])
def test_greedy_outputs_do_not_depend_on_the_head(lookup, dtype, folders):
    """Most of what the target wants is outside the trimmed head: all of it must come out."""
    pair = load(folders, f"{lookup}{folders / 'draft'}", dtype=dtype)
    outside = 0
    for prompt in ([5], [7, 3, 9, 3, 9, 3], list(range(20, 50))):
        options = {"max_new_tokens": 60, "width": 8, "eos_ids": pair.eos_ids}
        expected = autoregressive(pair.target, prompt, **options).token_ids
        assert speculative(pair.target, pair.draft, prompt, k=5, **options).token_ids == expected
        outside += sum(token % 3 != 0 for token in expected)
    assert outside > 30


def test_composite_asks_the_model_where_the_text_has_no_answer(folders):
    sizes = {"ngram_max": 3, "ngram_min": 2, "model_k": 2}
    pair = load(folders, f"ngram+{folders / 'draft'}", dtype="float32", **sizes)
    assert isinstance(pair.draft, CompositeDraft)
    assert pair.draft.lookup == NgramDraft(3, 2) and isinstance(pair.draft.model, ModelDraft)
    proposer = pair.draft.start(DraftTerms.of(pair.target, 64, Sampling(), None))
    known = [1, 2, 3, 4, 5, 1, 2]
    proposer.prefill(known[:-1])
    proposed, probs = proposer.propose(known, 4)
    assert (proposed, proposer.num_calls) == ([3, 4, 5, 1], 0)  # looked up, with the larger k
    assert [of.at(token) for of, token in zip(probs, proposed, strict=True)] == [1] * 4
    proposer.rollback(6)
    proposed, probs = proposer.propose([*known, 9, 8], 4)
    assert (len(proposed), proposer.num_calls) == (2, 2)  # the model, with its own
    assert [of.at(token) for of, token in zip(probs, proposed, strict=True)] == [1, 1]
    alone = pair.draft.model.start(DraftTerms.of(pair.target, 64, Sampling(), None))
    assert alone.propose([*known, 9, 8], 2)[0] == proposed  # what was looked up is in its cache


def test_the_shipped_file_is_checked(tmp_path, monkeypatch):
    """A file that was changed or cut is told, and not decoded with."""
    shipped = tmp_path / "a-draft" / "draft.safetensors"
    shipped.parent.mkdir()
    shipped.write_bytes(b"weights")
    monkeypatch.setattr(embedded, "DATA", tmp_path)
    entry = DRAFTS["smollm2-135m-draft"]._replace(sha256=hashlib.sha256(b"weights").hexdigest())
    monkeypatch.setitem(DRAFTS, "a-draft", entry)
    monkeypatch.setenv("SPECSAMPLING_CACHE", str(tmp_path / "cache"))
    calls = []

    def convert(gguf, folder):
        raise AssertionError("the target is there already")

    def make(target, path, folder):
        calls.append((target.name, path))
        folder.mkdir()

    there = embedded.cached_folder(entry.target, embedded.MODELS[entry.target].source.sha256)
    with made_once(there) as made:
        made.mkdir()
    for _ in range(2):
        assert embedded_folder("a-draft", convert, make).is_dir()
    assert calls == [(there.name, shipped)]
    shipped.write_bytes(b"weightz")
    with pytest.raises(ModelError, match="draft.safetensors has sha256 .* reinstall the package"):
        embedded_folder("a-draft", convert, make)
    shipped.unlink()
    with pytest.raises(ModelError, match="cannot read draft.safetensors"):
        embedded_folder("a-draft", convert, make)


def test_the_shipped_draft_is_small_and_whole():
    """What is in the package is what `embedded.py` names, within the 25 MB we promise."""
    shipped = embedded.DATA / "smollm2-135m-draft" / "draft.safetensors"
    assert shipped.stat().st_size < 25e6
    digest = hashlib.sha256(shipped.read_bytes()).hexdigest()
    assert digest == DRAFTS["smollm2-135m-draft"].sha256
    tensors, head_tokens = expand(load_file(shipped))
    assert head_tokens.unique().shape == head_tokens.shape == (8192,)
    assert "norm.weight" in tensors and not any("embed" in name for name in tensors)
    assert all(tensor.isfinite().all() for tensor in tensors.values())
