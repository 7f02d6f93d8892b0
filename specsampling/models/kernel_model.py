"""A model in the CPU kernel, as decoders see it.

Rows never meet in the kernel (`kernel/step.c`). So a call has only as many rows as needed, and
every width, every batch and every number of threads gives the same bits.
"""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from specsampling.kernel import engine, weights
from specsampling.kernel.build import ARITHMETIC, KernelError
from specsampling.method.batch import ask
from specsampling.method.noise import Race, race
from specsampling.models.cache import cache_folder
from specsampling.models.distilled import TrimmedHead
from specsampling.models.errors import ModelError
from specsampling.models.gguf_file import GgufFile
from specsampling.models.gguf_model import tensors_of
from specsampling.models.packing import Pack, pack_model, why_not

KERNEL = f"kernel {ARITHMETIC}"  # what decoded a run's rows
INT4 = "Q4_0"  # a format of GGUF files: groups of 32 weights with a scale
FOUR_BIT = ("Q4_0", "Q4_1", "Q4_K", "Q6_K")  # Q6_K: some layers of files that are mostly Q4_K


class KernelModel:
    """A model that the kernel decodes; see `method/forward.py`, ExactModel.

    Args:
        outline: the model without weights, which keeps its configuration and shapes.
        dtype: the type of the weights that are not quantised.
        made: the model in the kernel's form.
    """

    def __init__(self, outline: PreTrainedModel, dtype: torch.dtype, made: engine.Model):
        self.config: Any = outline.config
        self.generation_config: Any = outline.generation_config
        self.name_or_path = str(outline.name_or_path)
        self.device = torch.device("cpu")
        self.dtype = dtype
        self.engine = made
        self._outline = outline

    @property
    def precision(self) -> str:
        """The format of most of its weights: "bfloat16", "int8", or a GGUF block's type."""
        sizes: dict[str, int] = defaultdict(int)
        for packed in self.engine.linears:
            sizes[packed.format] += packed.outputs * packed.inputs
        return max(sizes, key=sizes.__getitem__)

    def get_input_embeddings(self) -> Any:
        return self._outline.get_input_embeddings()  # without weights, like the head

    def get_output_embeddings(self) -> Any:
        return self._outline.get_output_embeddings()

    def make_forward(self, capacity: int) -> KernelForward:
        return KernelForward(self.engine, capacity)

    def first_layers(self, num_layers: int) -> KernelModel:
        """Make a shallow model over the same weights."""
        outline = copy.copy(self._outline)
        outline.config = copy.deepcopy(self.config)
        outline.config.num_hidden_layers = num_layers
        return KernelModel(outline, self.dtype, self.engine.first_layers(num_layers))


class KernelForward:
    """The kernel's forward over one text; see `method/forward.py`, Forward."""

    def __init__(self, model: engine.Model, capacity: int):
        self._model = model
        self._cache = model.make_cache(capacity)

    def prefill(self, ids: list[int]) -> None:
        self.over_filled(ids, 0, 0)

    def over_capacity(self, ids: list[int], start: int) -> Tensor:
        return self.over_filled(ids, start, len(ids))

    def over_filled(self, ids: list[int], start: int, last: int) -> Tensor:
        return ask(self._model, engine.Request(self._cache, ids, start, last))


def kernel_library() -> Any:
    """Return the compiled kernel, or raise a KernelError that says why there is none."""
    found = _look_for_kernel()
    if isinstance(found, str):
        raise KernelError(found)
    return found


@cache
def _look_for_kernel() -> Any:
    """Return the compiled kernel, or why there is none. A process looks only once."""
    try:
        return engine.library(cache_folder() / "kernel")
    except (KernelError, ModelError) as error:  # a ModelError if there is no cache folder
        return str(error)


def fastest_race() -> Race:
    """Return the compiled race, or NumPy's without a kernel. Both find the same winners."""
    return race if why_no_kernel() else partial(engine.race, kernel_library())


def why_no_kernel() -> str:
    """Say in one line why there is no kernel on this machine; "" if there is one."""
    try:
        kernel_library()
    except KernelError as error:
        return str(error)
    return ""


def to_kernel(
    model: PreTrainedModel, quantization: str, file: GgufFile | None = None
) -> KernelModel:
    """Bring a model into the kernel, and free the model's own weights.

    Args:
        model: on the CPU, as it was loaded.
        quantization: "none", "int8" or "int4" (then the head is int8).
        file: the GGUF file that the model came from. Its blocks stay as they are. With int4, only
            blocks of about 4 bit do.

    Raises:
        KernelError: the kernel is missing, or does not know such a model.
        ValueError: a weight is not finite.
    """
    if problem := why_not(model):
        raise KernelError(problem)
    library, dtype = kernel_library(), model.dtype
    packer = weights.Packer(library, engine.num_threads())
    pack: Pack = partial(_pack, packer, quantization, dtype)
    if file is not None and quantization != "int8":
        kinds = FOUR_BIT if quantization == "int4" else tuple(weights.SCALES)
        pack = partial(_pack_tensor, packer, tensors_of(file, model), kinds, pack)
    head: Any = model.get_output_embeddings()
    heads = (head.linear, head.token_ids) if isinstance(head, TrimmedHead) else (head,)
    made = pack_model(model, library, pack, *heads)
    nn.Module.to(model, "meta")
    return KernelModel(model, dtype, made)


def _pack(
    packer: weights.Packer,
    quantization: str,
    dtype: torch.dtype,
    name: str,
    linear: nn.Linear,
    rows: Tensor | None = None,
    columns: Tensor | None = None,
) -> weights.Packed:
    """Pack a layer in the precision asked for."""
    format = {"int8": "int8", "int4": INT4}.get(quantization, str(dtype).removeprefix("torch."))
    if quantization == "int4" and name == "lm_head":
        format = "int8"
    bias = None if linear.bias is None else linear.bias.data
    return packer.plain(linear.weight.data, format, bias, rows, columns)


def _pack_tensor(
    packer: weights.Packer,
    find: Callable[[str], tuple[Any, Tensor]],
    kinds: tuple[str, ...],
    pack_rounded: Pack,
    name: str,
    linear: nn.Linear,
    rows: Tensor | None = None,
    columns: Tensor | None = None,
) -> weights.Packed:
    """Pack a layer as its GGUF file has it, if the type of its blocks is one of `kinds`."""
    tensor, order = find(name)
    kind = tensor.tensor_type.name
    if kind not in kinds or rows is not None or columns is not None:
        return pack_rounded(name, linear, rows, columns)
    bias = None
    if linear.bias is not None:  # a module's biases are in its own order
        bias = torch.zeros(len(order)).index_put((order,), linear.bias.data.float())
    return packer.blocks(tensor.data, kind, linear.in_features, bias, order)
