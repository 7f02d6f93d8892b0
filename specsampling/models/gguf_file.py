"""Opens a GGUF file: its header's keys and its tensors, or a refusal in one line.

This module refuses what no language model's file may hold. `gguf_model` and `gguf_tokenizer` know
what the keys mean. The `gguf` package, llama.cpp's own, reads the file.
"""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any, NoReturn

import gguf
import numpy as np

from specsampling.models.errors import ModelError

WAY_OUT = "choose the model's folder or hub id instead, or a file that was converted from it anew"

# Namespaces of keys, apart from those of architectures, that change the model in llama.cpp.
OTHER_PARTS = ("adapter", "clip", "control_vector")


class Reader(gguf.GGUFReader):
    """The package's reader over a plain array, which is ten times as fast as over a memmap."""

    @property
    def data(self) -> Any:
        """The whole file."""
        return self._plain

    @data.setter
    def data(self, mapped: Any) -> None:
        self._plain = np.asarray(mapped)


class GgufFile:
    """A GGUF file's header, by its keys, and tensors, by name, as the `gguf` package reads them.

    A ModelError says that a file is damaged, is a part of a whole, or holds no language model.
    """

    def __init__(self, path: Path):
        self.path = path
        try:
            reader = Reader(path)
        except (ValueError, IndexError, KeyError, OverflowError) as error:
            raise ModelError(
                f"cannot load {path}: it is cut off, or no GGUF file ({error}); download it again"
            ) from error
        if reader.byte_order != "I":
            self.refuse_file("is written in the byte order of another kind of processor")
        self.header: dict[str, Any] = {
            key: value.contents() for key, value in reader.fields.items() if value.types
        }
        self.tensors = {tensor.name: tensor for tensor in reader.tensors}
        if len(self.tensors) != len(reader.tensors):
            self.refuse_file("holds two tensors of one name")
        # llama.cpp's name for the kind of model
        self.architecture = str(self.header.get("general.architecture", ""))
        if not self.architecture:
            self.refuse("general.architecture", "must be there")
        if self.header.get("general.type", "model") != "model":
            self.refuse("general.type", 'must be "model"')
        if self.header.get("split.count", 1) > 1:
            self.refuse("split.count", "must be 1", "join its parts with llama-gguf-split --merge")
        others = {*gguf.MODEL_ARCH_NAMES.values(), *OTHER_PARTS} - {self.architecture}
        for key in self.header:
            if key.partition(".")[0] in others:
                self.refuse(key, f"does not belong to a {self.architecture} model")

    def own(self, key: str, default: Any = None) -> Any:
        """Return the value of a key of the architecture."""
        return self.header.get(f"{self.architecture}.{key}", default)

    def refuse(self, key: str, rule: str, way_out: str = WAY_OUT) -> NoReturn:
        """Refuse the file for one key of its header, with its value."""
        value = str(self.header.get(key, "missing"))
        shown = value if len(value) < 60 else f"{value[:57]}..."
        raise ModelError(f"cannot load {self.path}: {key} {rule} (got {shown}); {way_out}")

    def refuse_own(self, key: str, rule: str) -> NoReturn:
        """Refuse the file for one key of its architecture; see `refuse`."""
        self.refuse(f"{self.architecture}.{key}", rule)

    def refuse_file(self, problem: str, names: list[str] | None = None) -> NoReturn:
        """Refuse the file for what it holds, or for some of its tensors."""
        shown = ""
        if names:
            shown = f" ({len(names)}: {', '.join(names[:3])}{' ...' if len(names) > 3 else ''})"
        raise ModelError(f"cannot load {self.path}: it {problem}{shown}; {WAY_OUT}")

    def values(self, name: str) -> np.ndarray:
        """Return a tensor's values in float32. Refuse types that `gguf` cannot dequantise."""
        tensor = self.tensors[name]
        try:
            return np.array(gguf.dequantize(tensor.data, tensor.tensor_type), dtype=np.float32)
        except NotImplementedError:
            self.refuse_file(f"holds tensors of type {tensor.tensor_type.name}", [name])


@lru_cache(maxsize=2)
def _open(path: Path, size: int, modified: int) -> GgufFile:
    return GgufFile(path)


def open_gguf(path: Path) -> GgufFile:
    """Open a file, or raise a ModelError. A large vocabulary takes seconds, so files are kept."""
    status = path.stat()
    return _open(path, status.st_size, status.st_mtime_ns)
