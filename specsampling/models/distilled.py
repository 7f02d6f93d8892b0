"""A draft distilled from its target, with a few layers of its own and the target's embedding.

Such a draft is shipped without the embedding, and with its matrices in 8 bit. `assemble` joins it
with the target's embedding to an ordinary Hugging Face folder in bfloat16, which any tool can load.
The folder also lists the frequent tokens. `trimmed` lets the draft's head score only these, because
the head is most of a small model's work. The verifier still sees a distribution over the whole
vocabulary, in which the other tokens have probability 0, so outputs stay exact.

`training/distill.py` trains such a draft.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from specsampling.method.forward import Model

HEAD_TOKENS = "head_tokens.safetensors"
EMBEDDING = "model.embed_tokens.weight"
SCALE = ".scale"
TARGETS_OWN = ("model*.safetensors*", "config.json")  # files that are not copied from it


def assemble(target_folder: Path, shipped: Path, folder: Path) -> None:
    """Make a draft's Hugging Face folder, which must not exist.

    The target's folder must have its embedding tied to its head; `shipped` is a file of the draft's
    own tensors, as `shrink` makes them.
    """
    dtype = torch.bfloat16
    tensors, head_tokens = expand(load_file(shipped))
    config = AutoConfig.from_pretrained(target_folder)
    config.num_hidden_layers = 1 + max(
        int(name.split(".")[1]) for name in tensors if name.startswith("layers.")
    )
    with torch.device("meta"):
        draft = AutoModelForCausalLM.from_config(config, dtype=dtype)
    target = AutoModelForCausalLM.from_pretrained(target_folder, dtype=dtype)
    embedding = target.get_input_embeddings().weight.data
    state = {f"model.{name}": tensor.to(dtype) for name, tensor in tensors.items()}
    draft.load_state_dict(state | {EMBEDDING: embedding}, strict=False, assign=True)
    draft.tie_weights()
    shutil.copytree(target_folder, folder, ignore=shutil.ignore_patterns(*TARGETS_OWN))
    draft.save_pretrained(folder)
    save_file({"head_tokens": head_tokens}, folder / HEAD_TOKENS)


def shrink(tensors: dict[str, Tensor], head_tokens: Tensor) -> dict[str, Tensor]:
    """Turn a draft's matrices into int8 with a scale per row, and all else into float32.

    The tensors are `layers.*` and `norm.weight`; the head scores the ids `head_tokens`, [H].
    """
    shrunk = {"head_tokens": head_tokens.int()}
    for name, tensor in tensors.items():
        shrunk[name] = tensor.float()
        if tensor.dim() == 2:
            scale = shrunk[name].abs().amax(1, keepdim=True).clamp(min=1e-12) / 127  # [rows, 1]
            shrunk[name + SCALE] = scale
            shrunk[name] = (shrunk[name] / scale).round().to(torch.int8)
    return shrunk


def expand(shrunk: dict[str, Tensor]) -> tuple[dict[str, Tensor], Tensor]:
    """Undo `shrink`, up to its rounding. Return the tensors in float32, and the head's ids."""
    tensors = {
        name: tensor.float() * shrunk[name + SCALE] if name + SCALE in shrunk else tensor.float()
        for name, tensor in shrunk.items()
        if name != "head_tokens" and not name.endswith(SCALE)
    }
    return tensors, shrunk["head_tokens"].long()


class TrimmedHead(nn.Module):
    """A language model's head that scores some of the tokens; the others get -inf."""

    def __init__(self, head: nn.Linear, token_ids: Tensor):
        """Keep the rows `token_ids`, [H], of `head`, [V, d]."""
        super().__init__()
        self.out_features = head.out_features
        self.linear = nn.Linear(head.in_features, len(token_ids), bias=False)
        self.linear.weight = nn.Parameter(head.weight.data[token_ids], requires_grad=False)
        self.register_buffer("token_ids", token_ids, persistent=False)

    def forward(self, rows: Tensor) -> Tensor:
        """Score hidden states, [..., d] -> [..., V]."""
        scores = self.linear(rows)
        logits = scores.new_full((*scores.shape[:-1], self.out_features), -torch.inf)
        logits[..., self.token_ids] = scores
        return logits


def trimmed(model: PreTrainedModel, location: str) -> PreTrainedModel:
    """Give a model a head for its frequent tokens alone, if its folder lists them."""
    path = Path(location, HEAD_TOKENS)
    if path.is_file():
        token_ids = load_file(path)["head_tokens"].long().to(model.device)
        head = model.get_output_embeddings()
        assert isinstance(head, nn.Linear) and head.bias is None
        model.set_output_embeddings(TrimmedHead(head, token_ids))
    return model


def is_distilled(model: Model) -> bool:
    """Say whether a model's head is trimmed."""
    return isinstance(model.get_output_embeddings(), TrimmedHead)
