"""What to run: `config.yaml`, read strictly into frozen dataclasses.

The dataclasses are the schema: a field's type says what may stand there, and a
`_Rule` in it narrows the values, in words and in code. Reading, checking and the
error messages all follow from these. Knows nothing of models, tasks or devices:
it checks how a value looks, not whether a model or a GPU is there.
"""

from __future__ import annotations

import hashlib
import json
import re
import sys
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import MISSING, asdict, dataclass, fields, is_dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import (
    Annotated,
    Any,
    Literal,
    NamedTuple,
    get_args,
    get_origin,
    get_type_hints,
    overload,
)

import yaml

WIDTH_STEP = 8  # a row's bits stay the same at widths that are a multiple of this

# What chooses which rows are made, or limits their scoring, but changes no row.
_NOT_HASHED = {
    "run": ("limit", "methods", "warmup"),
    "sampling": ("num_samples",),  # more of them continue a run: each has its own random stream
    "humaneval": ("timeout_seconds", "memory_mb", "allow_weak_sandbox"),
}


class ConfigError(ValueError):
    """A mistake in the configuration, in one line: field, rule, value, way out."""


class _Rule(NamedTuple):
    """What a value must hold beyond its type: in words that follow the type's, and as a test."""

    words: str
    check: Callable[[Any], object]
    way_out: str = ""


def _at_least(minimum: int, way_out: str = "") -> _Rule:
    return _Rule(f" >= {minimum}", lambda value: value >= minimum, way_out)


Text = Annotated[str, _Rule(" that is not empty", len)]
Count = Annotated[int, _at_least(1)]
Device = Annotated[
    str,
    _Rule(": auto, cpu, cuda, cuda:N or mps", re.compile(r"auto|cpu|cuda(:\d+)?|mps").fullmatch),
]
Dtype = Literal["auto", "float32", "float16", "bfloat16"]
Quantization = Literal["none", "int8", "nf4"]
Method = Annotated[
    str,
    _Rule(
        ": autoregressive, reference, speculative, or speculative:DRAFT",
        re.compile(r"autoregressive|reference|speculative(:.+)?").fullmatch,
    ),
]
PromptStyle = Literal["completion", "chat"]


@dataclass(frozen=True)
class ModelsConfig:
    """Which two models, and in which precision. `tokenizer` None is the target's own."""

    target: Text
    draft: Text
    tokenizer: Text | None
    dtype: Dtype
    device: Device
    target_quantization: Quantization
    draft_quantization: Quantization


@dataclass(frozen=True)
class SpeculationConfig:
    """How much is drafted. `ngram_*` matter to lookups only, the last two to models."""

    k: Annotated[int, _at_least(1, "choose run.methods: [autoregressive] to draft nothing")]
    model_k: Annotated[int, _at_least(1, "null is as many as k")] | None
    min_confidence: Annotated[float, _Rule(" >= 0 and < 1", lambda p: 0 <= p < 1, "0 is off")]
    ngram_max: Count
    ngram_min: Count


@dataclass(frozen=True)
class DecodingConfig:
    """Where decoding ends, and the shape of a decode call. `width` 0 is chosen from k."""

    max_new_tokens: Count
    bit_exact: bool
    width: Annotated[int, _at_least(0, "0 chooses it from speculation.k")]


@dataclass(frozen=True)
class SamplingConfig:
    """The warp, the same for both models. Temperature 0 is greedy, top_k 0 is off."""

    temperature: Annotated[float, _at_least(0, "0 decodes greedily")]
    top_k: Annotated[int, _at_least(0, "0 keeps every token")]
    top_p: Annotated[float, _Rule(" > 0 and <= 1", lambda p: 0 < p <= 1, "1 keeps every token")]
    seed: Annotated[int, _at_least(0)]
    num_samples: Count


@dataclass(frozen=True)
class RunConfig:
    """Which rows to make. `limit` None is every example, `threads` 0 is torch's choice."""

    methods: Annotated[
        tuple[Method, ...],
        _Rule(", at least one, none twice", lambda names: 0 < len(names) == len(set(names))),
    ]
    limit: Annotated[int, _at_least(1, "null runs every example")] | None
    warmup: Annotated[int, _at_least(0)]
    threads: Annotated[int, _at_least(0, "0 leaves the number to torch")]


@dataclass(frozen=True)
class HumanEvalConfig:
    """How a problem is asked, where the answer ends, and the sandbox's limits."""

    prompt_style: PromptStyle
    stop_strings: tuple[Text, ...]
    timeout_seconds: Annotated[float, _Rule(" > 0", lambda seconds: seconds > 0)]
    memory_mb: Annotated[int, _at_least(64, "a Python process needs that to start")]
    allow_weak_sandbox: bool = False


@dataclass(frozen=True)
class XSumConfig:
    """Which articles, how a summary is asked for, and where it ends."""

    dataset: Text
    split: Text
    prompt_style: PromptStyle
    prompt_template: Annotated[
        str, _Rule(" that holds {document}", lambda text: "{document}" in text)
    ]
    num_shots: Annotated[int, _at_least(0)]
    stop_strings: tuple[Text, ...]


@dataclass(frozen=True)
class Config:
    """One profile in full, with a block for each task it is for."""

    profile: str
    models: ModelsConfig
    speculation: SpeculationConfig
    decoding: DecodingConfig
    sampling: SamplingConfig
    run: RunConfig
    humaneval: HumanEvalConfig | None = None
    xsum: XSumConfig | None = None

    @property
    def width(self) -> int:
        """Tokens in a decode call, padding included; from k: the next multiple of 8 above it."""
        return self.decoding.width or (self.speculation.k // WIDTH_STEP + 1) * WIDTH_STEP

    def __post_init__(self) -> None:
        """Hold the rules between fields; a ConfigError names the one that is broken."""
        speculation, decoding = self.speculation, self.decoding
        if speculation.ngram_min > speculation.ngram_max:
            raise ConfigError(
                f"speculation.ngram_min must be <= speculation.ngram_max, here "
                f"{speculation.ngram_max} (got {speculation.ngram_min}); lower the one or raise "
                "the other"
            )
        if 0 < decoding.width <= speculation.k:
            raise ConfigError(
                f"decoding.width must be 0 or >= speculation.k + 1, here {speculation.k + 1} "
                f"(got {decoding.width}); 0 chooses it from speculation.k"
            )
        if decoding.bit_exact and decoding.width % WIDTH_STEP:
            raise ConfigError(
                f"decoding.width must be a multiple of {WIDTH_STEP} for decoding.bit_exact: true "
                f"(got {decoding.width}); 0 chooses it from speculation.k"
            )
        if "reference" in self.run.methods and not decoding.bit_exact:
            raise ConfigError(
                "decoding.bit_exact must be true for the method reference (got false); "
                "set it, or take reference out of run.methods"
            )
        models = self.models
        draft = models.draft.removeprefix("ngram+")
        has_model_draft = draft != "ngram" and not draft.startswith("target-layers:")
        if models.draft_quantization != "none" and not has_model_draft:
            raise ConfigError(
                f"models.draft_quantization must be none for the draft {models.draft}, which has "
                f"no weights of its own (got {models.draft_quantization}); set it to none"
            )
        if self.humaneval and self.humaneval.prompt_style == "chat" and self.humaneval.stop_strings:
            raise ConfigError(
                "humaneval.stop_strings must be [] for humaneval.prompt_style: chat, where the "
                f"code itself holds them (got {_show(self.humaneval.stop_strings)}); set it to []"
            )
        if self.humaneval is None and self.xsum is None:
            raise ConfigError(
                f"profile {self.profile} must hold a humaneval or an xsum block (got neither); "
                "copy one from another profile"
            )


def load_config(
    path: str | Path, profile: str | None = None, overrides: Sequence[str] = ()
) -> Config:
    """One profile of a configuration file.

    Args:
        path: a YAML file: `default: NAME` and `profiles: {NAME: {block: {key: value}}}`.
        profile: its name; None takes the file's default.
        overrides: `key.path=value` each, the value in YAML; the last one wins.

    Raises:
        ConfigError: the file, the profile, a key, a value or an override is wrong.
    """
    file: _File = _build(_File, _checked(dict, _parse_yaml(_read(path), str(path)), str(path)))
    name = file.default if profile is None else profile
    if name not in file.profiles:
        way_out = _nearest(name, file.profiles) or "name it with --profile"
        raise ConfigError(
            f"profile must be one of: {', '.join(file.profiles)} (got {_show(name)}); {way_out}"
        )
    blocks = _checked(dict, file.profiles[name], f"profiles.{name}")
    for assignment in overrides:
        _override(blocks, assignment)
    config: Config = _build(Config, blocks, profile=name)
    return config


@overload
def require_task(config: Config, task: Literal["humaneval"]) -> HumanEvalConfig: ...
@overload
def require_task(config: Config, task: Literal["xsum"]) -> XSumConfig: ...
def require_task(config: Config, task: str) -> HumanEvalConfig | XSumConfig:
    """The task's block; a ConfigError if the profile is not for this task."""
    block: HumanEvalConfig | XSumConfig | None = getattr(config, task)
    if block is None:
        raise ConfigError(
            f"{task} must be a block of profile {config.profile} for this experiment (got none); "
            "choose another profile with --profile, or add the block"
        )
    return block


def config_as_dict(config: Config) -> dict[str, Any]:
    """The configuration in dicts, lists and scalars, the same once read back from JSON."""
    plain: dict[str, Any] = json.loads(json.dumps(asdict(config)))
    return plain


def config_hash(config: Config) -> str:
    """16 hex digits of SHA-256 over every value that can change a row."""
    values = config_as_dict(config)
    del values["profile"]
    for block, keys in _NOT_HASHED.items():
        values[block] = {k: v for k, v in (values[block] or {}).items() if k not in keys}
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:16]


# Reading: YAML -> plain values -> dataclasses.


@dataclass(frozen=True)
class _File:
    default: Text
    profiles: dict[str, Any]


class _StrictLoader(yaml.SafeLoader):
    """YAML with words as keys, each once: plain YAML silently keeps a key's last value."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = key_node.value
            if key_node.tag != "tag:yaml.org,2002:str" or key in seen:
                problem = f"key {key} stands twice" if key in seen else f"key {key} is not a word"
                raise yaml.constructor.ConstructorError(None, None, problem, key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep=deep)


def _read(path: str | Path) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        problem = getattr(error, "strerror", None) or "not UTF-8 text"
        raise ConfigError(
            f"config must be a YAML file (got {path}: {problem}); name it with --config"
        ) from None


def _parse_yaml(text: str, source: str) -> Any:
    try:
        return yaml.load(text, Loader=_StrictLoader)
    except (yaml.YAMLError, ValueError) as error:  # ValueError: a date such as 2024-13-01
        mark = getattr(error, "problem_mark", None)
        line = f"line {mark.line + 1}: " if mark else ""
        problem = getattr(error, "problem", None) or " ".join(str(error).split())
        raise ConfigError(
            f"{source} must be valid YAML (got {line}{problem}); "
            "mend it, or put a text with special characters in quotes"
        ) from None


def _override(blocks: dict[str, Any], assignment: str) -> None:
    """Put one `key.path=value` into `blocks`; `_build` then checks the key and the value."""
    path, equals, text = assignment.partition("=")
    *parents, key = path.strip().split(".")
    if not equals or not all([*parents, key]):
        raise ConfigError(
            f"--set must be key.path=value (got {_show(assignment)}); as in --set speculation.k=4"
        )
    for depth, parent in enumerate(parents, start=1):
        blocks = _checked(dict, blocks.setdefault(parent, {}), ".".join(parents[:depth]))
    blocks[key] = _parse_yaml(text, f"--set {path}")


def _build(cls: Any, values: dict[str, Any], path: str = "", **given: Any) -> Any:
    """An instance of a config dataclass from its block; `given` fields come from elsewhere."""
    schema = {item.name: item for item in fields(cls) if item.name not in given}
    hints = get_type_hints(cls, include_extras=True)
    for key in values:
        if key not in schema:
            way_out = _nearest(key, schema, path) or f"the keys there are {', '.join(schema)}"
            raise ConfigError(f"{path}{key} is not a known key; {way_out}")
    for name, item in schema.items():
        if name in values:
            given[name] = _checked(hints[name], values[name], path + name)
        elif item.default is MISSING:
            raise ConfigError(f"{path}{name} is missing; it must be {_words(hints[name])}")
    return cls(**given)


class _Misfit(Exception):
    """A value does not fit its type hint; the text is the way out, where there is one."""


def _checked(hint: Any, value: Any, path: str) -> Any:
    try:
        return _convert(hint, value, path)
    except _Misfit as misfit:
        way_out = f"; {misfit}" if str(misfit) else ""
        rule = f"{path} must be {_words(hint)} (got {_show(value)})"
        raise ConfigError(rule + way_out) from None


def _convert(hint: Any, value: Any, path: str) -> Any:
    """`value` as the type hint holds it: lists become tuples, an int may stand for a float."""
    kind, args = get_origin(hint) or hint, get_args(hint)
    if kind is Annotated:
        converted = _convert(args[0], value, path)
        if not args[1].check(converted):
            raise _Misfit(args[1].way_out)
        return converted
    if type(None) in args:
        return None if value is None else _convert(args[0], value, path)
    if is_dataclass(kind):
        return _build(kind, _checked(dict, value, path), f"{path}.")
    if kind is tuple and type(value) is list:
        return tuple(_convert(args[0], item, path) for item in value)
    if kind is float and type(value) in (int, float) and abs(value) <= sys.float_info.max:
        return float(value)
    if kind is Literal and value in args:
        return value
    if kind in (str, int, bool, dict) and type(value) is kind:  # isinstance: True were an int
        return value
    raise _Misfit(_nearest(str(value), args) if kind is Literal else _TYPES[kind][1])


def _words(hint: Any) -> str:
    """A type hint in words: `null or an integer >= 1`."""
    kind, args = get_origin(hint) or hint, get_args(hint)
    if kind is Annotated:
        return f"{_words(args[0])}{args[1].words}"
    if type(None) in args:
        return f"null or {_words(args[0])}"
    if kind is Literal:
        return f"one of {', '.join(args)}"
    if kind is tuple:
        return f"a list, each item {_words(args[0])}"
    return _TYPES[dict if is_dataclass(kind) else kind][0]


_TYPES = {  # the type in words, and what may help where something else is given
    str: ("a string", "text in quotes is always a string"),
    int: ("an integer", "write digits only, without quotes"),
    float: ("a number", "write it as 0.5 or 1.0e-3, without quotes"),
    bool: ("true or false", "write it without quotes"),
    tuple: ("a list", "write it in brackets: [a, b]"),
    dict: ("a block of `key: value` lines", "indent its keys below it"),
}


def _nearest(word: str, known: Iterable[str], path: str = "") -> str:
    """A question for the one of `known` that was meant; empty when none is near."""
    return "".join(f"did you mean {path}{name}?" for name in get_close_matches(word, known, n=1))


def _show(value: Any) -> str:
    """A value as the file would have it, on one line, cut where it grows long."""
    text = json.dumps(value, default=str, ensure_ascii=False)
    return text if len(text) <= 80 else text[:77] + "..."
