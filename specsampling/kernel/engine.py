"""Models in the form that `step.c` decodes, and calls of `step.c`.

One call can take rows of different texts. A row's logits do not depend on the other rows: see
`step.c`. This module knows nothing of files or of transformers. `models/packing.py` makes the
models.
"""

from __future__ import annotations

import ctypes
import os
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from specsampling.kernel import checking
from specsampling.kernel.build import KernelError, build
from specsampling.kernel.weights import LANES, LinearStructure, Packed, padded

PROBLEMS = {-1: "number of rows", -2: "position", -3: "token id", -4: "memory"}


LINEARS = ("query", "key", "value", "output", "gate", "up", "down")
NORMS = ("norm1", "norm1_bias", "norm2", "norm2_bias", "query_norm", "key_norm")


class _Layer(ctypes.Structure):
    _fields_ = [
        *((name, LinearStructure) for name in LINEARS),
        *((name, ctypes.c_void_p) for name in NORMS),
        ("window", ctypes.c_int32),
    ]


POINTERS = ("norm", "norm_bias", "cos", "sin", "embedding", "learned_positions", "head_tokens")
SIZES = (
    *("num_layers", "vocabulary", "head_rows", "hidden", "hidden_padded", "inner"),
    *("heads", "key_heads", "head_dim", "head_padded"),
    *("positions", "embedding_format", "positions_format", "cache_format"),
)
CACHE_SIZES = ("key_heads", "head_dim", "head_padded", "cache_format")


class _Model(ctypes.Structure):
    _fields_ = [
        ("layers", ctypes.c_void_p),
        ("head", LinearStructure),
        *((name, ctypes.c_void_p) for name in POINTERS),
        *((name, ctypes.c_int32) for name in SIZES),
        *((name, ctypes.c_float) for name in ("epsilon", "score_scale")),
    ]


class _Cache(ctypes.Structure):
    _fields_ = [
        ("keys", ctypes.c_void_p),
        ("values", ctypes.c_void_p),
        ("capacity", ctypes.c_int32),
    ]


ROW = np.dtype([("cache", "u8"), ("logits", "u8"), ("token", "i4"), ("position", "i4")])


@cache
def library(folder: Path) -> ctypes.CDLL:
    """Load the compiled C files from a folder; compile them first if they are missing.

    Raises:
        KernelError: the files cannot be compiled or loaded.
    """
    try:
        found = ctypes.CDLL(str(build(folder)))
    except OSError as error:
        raise KernelError(f"the kernel cannot be loaded: {error}") from error
    found.kind.restype = ctypes.c_char_p
    found.open_pool.restype = ctypes.c_void_p
    found.close_pool.argtypes = [ctypes.c_void_p]
    found.step.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int]
    pointer, number = ctypes.c_void_p, ctypes.c_int
    found.pack_plain.argtypes = [
        *(number, pointer, number, number, pointer, pointer, number, number, number),
        *(pointer, pointer, pointer),
    ]
    found.pack_blocks.argtypes = [
        *(number, pointer, ctypes.c_int64, pointer, number, number, number),
        *(pointer, pointer, pointer),
    ]
    found.pack_blocks.restype = None
    for run in (found.race_of_floats, found.race_of_doubles):
        run.argtypes = [pointer, ctypes.c_uint64, pointer, pointer, ctypes.c_int64]
        run.restype = ctypes.c_int64
    return found


def race(
    library: ctypes.CDLL,
    key: tuple[int, int],
    position: int,
    tokens: np.ndarray | None,
    probs: np.ndarray,
) -> int:
    """Find the winner of an exponential race; see `race.c`.

    Args:
        library: the compiled C files.
        key: two words of 32 bits.
        position: where the token will stand in the text.
        tokens: [n] ids, ascending; None for 0 to n - 1.
        probs: [n] float32 or float64, none NaN and at least one above 0.
    """
    words, is_float = np.array(key, np.uint32), probs.dtype == np.float32
    masses = np.ascontiguousarray(probs, np.float32 if is_float else np.float64)
    ids = None if tokens is None else np.ascontiguousarray(tokens, np.uint32)
    run = library.race_of_floats if is_float else library.race_of_doubles
    address = None if ids is None else ids.ctypes.data
    winner: int = run(words.ctypes.data, position, address, masses.ctypes.data, len(masses))
    return winner


@dataclass(frozen=True)
class Parts:
    """One layer's parts, named as in the layer's C structure."""

    linears: dict[str, Packed]
    norms: dict[str, Tensor]
    window: int = 0


class Cache:
    """A text's keys and values. Only the part that was written takes memory."""

    def __init__(self, model: Model, capacity: int):
        sizes = model.sizes
        self.capacity = padded(capacity, LANES)
        self.num_layers = sizes["num_layers"]
        self.form = tuple(sizes[name] for name in CACHE_SIZES)
        heads = sizes["num_layers"] * sizes["key_heads"] * self.capacity
        dtype = torch.float16 if sizes["cache_format"] else torch.float32
        self._keys = torch.zeros(heads * sizes["head_dim"], dtype=dtype)
        self._values = torch.zeros(heads * sizes["head_padded"], dtype=dtype)
        self._structure = _Cache(self._keys.data_ptr(), self._values.data_ptr(), self.capacity)
        self.address = ctypes.addressof(self._structure)


class Request(NamedTuple):
    """Consecutive tokens of one text, to be fed in a call."""

    cache: Cache
    ids: Sequence[int]
    start: int  # the first token's position
    last: int  # how many of the last tokens are scored


@dataclass
class Model:
    """A model that `step.c` decodes.

    Attributes:
        library: the compiled C files.
        layers: the parts of each layer.
        head: the last linear layer.
        tensors: the tensors that the C structure points to, by name.
        sizes: the numbers in the C structure, by name.
        epsilon: the norms' epsilon.
        score_scale: the factor by which attention multiplies its products.
        rotation: makes the cosines and the sines of the first n positions, [n, head_dim / 2] each;
            None if positions are not rotated.
        size: the bytes of the linear layers' weights.
    """

    library: ctypes.CDLL
    layers: list[Parts]
    head: Packed
    tensors: dict[str, Tensor]
    sizes: dict[str, int]
    epsilon: float
    score_scale: float
    rotation: Callable[[int], tuple[Tensor, Tensor]] | None = None
    _kept: dict[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        layers = (_Layer * len(self.layers))()
        for layer, parts in zip(layers, self.layers):
            for name, packed in parts.linears.items():
                setattr(layer, name, packed.structure())
            for name, tensor in parts.norms.items():
                setattr(layer, name, tensor.data_ptr())
            layer.window = parts.window
        self._layers = layers
        self.sizes["num_layers"] = len(layers)
        checking.check_layers([parts.linears for parts in self.layers], self.sizes)
        checking.check_head(self.head, self.tensors.get("head_tokens"), self.sizes)
        self._structure = _Model(layers=ctypes.addressof(layers), head=self.head.structure())
        for name, tensor in self.tensors.items():
            setattr(self._structure, name, tensor.data_ptr())
        for name, size in self.sizes.items():
            setattr(self._structure, name, size)
        self._structure.epsilon, self._structure.score_scale = self.epsilon, self.score_scale
        self.size = sum(part.num_bytes for part in self.linears)

    @property
    def linears(self) -> list[Packed]:
        """Return all linear layers of the model."""
        return [self.head, *(part for layer in self.layers for part in layer.linears.values())]

    def first_layers(self, num_layers: int) -> Model:
        """Make a model of the first layers only, which shares the weights."""
        return Model(
            *(self.library, self.layers[:num_layers], self.head, self.tensors, dict(self.sizes)),
            *(self.epsilon, self.score_scale, self.rotation),
        )

    def make_cache(self, capacity: int) -> Cache:
        """Make the cache of a new text."""
        made = Cache(self, capacity)
        self._extend_tables(made)
        return made

    def _extend_tables(self, text: Cache) -> None:
        """Make the tables of positions at least as long as a text's cache.

        Raises:
            ValueError: the cache belongs to a model of another shape.
        """
        own = tuple(self.sizes[name] for name in CACHE_SIZES)
        if text.num_layers < len(self.layers) or text.form != own:
            raise ValueError("a cache must be of a model of the same shape")
        if self.rotation and text.capacity > self._structure.positions:
            num = padded(text.capacity, 1024)
            cos, sin = (table.float().contiguous() for table in self.rotation(num))
            self._kept = {"cos": cos, "sin": sin}
            self._structure.cos, self._structure.sin = cos.data_ptr(), sin.data_ptr()
            self._structure.positions = num

    def run(self, requests: Sequence[Request]) -> list[Tensor]:
        """Feed the tokens of several texts together.

        Returns:
            [last, vocabulary] float32 logits for each request.

        Raises:
            ValueError: a token, a position or the number of scored rows is out of range.
        """
        width = self.sizes["vocabulary"]
        for _, ids, _, last in requests:
            if not 0 <= last <= len(ids):
                raise ValueError(f"cannot score {last} of {len(ids)} tokens")
        num_scored = sum(request.last for request in requests)
        logits = torch.empty(num_scored, width)
        if "head_tokens" in self.tensors:
            logits.fill_(-torch.inf)
        rows = np.zeros(sum(len(request.ids) for request in requests), ROW)
        at = scored = 0
        for text, ids, start, last in requests:
            self._extend_tables(text)
            own = rows[at : at + len(ids)]
            own["token"] = checking.check_tokens(ids, start, text.capacity, width)
            own["cache"] = text.address
            own["position"] = np.arange(start, start + len(ids))
            if last:
                first = logits.data_ptr() + 4 * width * scored
                own["logits"][-last:] = first + 4 * width * np.arange(last, dtype=np.uint64)
            at, scored = at + len(ids), scored + last
        pool_of(self.library).step(self._structure, rows)
        return list(logits.split([request.last for request in requests]))


class Pool:
    """The threads that calls run on, one call at a time."""

    def __init__(self, library: ctypes.CDLL, num_threads: int):
        self.num_threads = num_threads
        self._library = library
        self._pool = library.open_pool(num_threads)
        if not self._pool:
            raise MemoryError("no memory for the kernel's threads")
        self._most = library.most_rows()
        self._lock = threading.Lock()

    def step(self, model: _Model, rows: np.ndarray) -> None:
        """Run rows through a model, in several calls if they are too many for one.

        Raises:
            ValueError: a row is out of range.
        """
        with self._lock:
            if self._pool is None:
                raise RuntimeError("the kernel's threads were ended by another thread")
            for start in range(0, len(rows), self._most):
                part = rows[start : start + self._most]
                problem = self._library.step(
                    self._pool, ctypes.byref(model), part.ctypes.data, len(part)
                )
                if problem == -4:
                    raise MemoryError("no memory for the rows of a call")
                if problem:
                    raise ValueError(f"a row's {PROBLEMS[problem]} is out of range")

    def close(self) -> None:
        with self._lock:
            self._library.close_pool(self._pool)
            self._pool = None


_pools: dict[int, Pool] = {}  # by the library's handle
_num_threads = 0


def set_num_threads(num: int) -> None:
    """Set how many threads calls run on; 0 means one for each core that this process may use.

    Raises:
        ValueError: the number is negative.
    """
    global _num_threads
    if num < 0:
        raise ValueError(f"the kernel needs 1 thread or more (got {num})")
    _num_threads = num
    for pool in _pools.values():
        pool.close()
    _pools.clear()


def num_threads() -> int:
    """Return how many threads calls run on: as set, else by OMP_NUM_THREADS, else one per core."""
    named = os.environ.get("OMP_NUM_THREADS", "")
    return _num_threads or (int(named) if named.isdecimal() else 0) or num_cores()


def num_cores() -> int:
    """Count the cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def pool_of(library: ctypes.CDLL) -> Pool:
    """Return this process's pool of threads, which the first call makes."""
    if library._handle not in _pools:
        _pools[library._handle] = Pool(library, num_threads())
    return _pools[library._handle]


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_pools.clear)  # a fork has none of its parent's threads
