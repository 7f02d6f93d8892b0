"""Reads `config.yaml`, which says what to run, strictly into frozen dataclasses.

The dataclasses are the schema: a field's type and its `Rule`s say which values are allowed. This
module checks the form of a value. It does not check whether a model or a GPU exists.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from specsampling.checking import (
    Block,
    ConfigError,
    Rule,
    block_of,
    build,
    mistake,
    nearest,
    parse_yaml,
    shown,
    shown_name,
    within,
)
from specsampling.draft_name import GREEDY, LOOKUPS, TARGET_LAYERS, DraftName

PROJECT = Path(__file__).resolve().parent.parent  # the folder of config.yaml
WIDTH_STEP = 8  # a row's bits stay the same at widths that are a multiple of this
MAX_FILE_BYTES = 200_000  # room for some hundred profiles; a larger file is of another kind
MAX_NAMES = 10  # profiles that an error lists

# Version 1 of the fields that decide a row's text, by block. All others choose which rows are made
# or limit their scoring. A run may gain samples, because each has its own randomness. The meta
# records the effect of `decoding.compile` in `steps`, and each row records its noise.
DECIDING = {
    "models": "target draft tokenizer dtype device target_quantization draft_quantization",
    "speculation": "k model_k min_confidence ngram_max ngram_min verifier",
    "decoding": "max_new_tokens bit_exact width",
    "sampling": "temperature top_k top_p seed",
    "run": "threads batch_size",
    "humaneval": "prompt_style stop_strings",
    "xsum": "dataset split columns prompt_style prompt_template num_shots stop_strings",
}
# A field that came after version 1 is left out at the value that all earlier rows had.
ADDED = {
    ("speculation", "verifier"): "token",
    ("run", "batch_size"): 1,
    ("xsum", "columns"): {"document": "document", "summary": "summary", "id": "id"},
}

TASKS = "humaneval", "xsum"  # blocks that a profile may lack
OLD_NAMES = {
    "demo": "smollm2-cpu",
    "exp2-cpu": "qwen-coder-cpu",
    "exp1-rtx3050": "gpt-neo-rtx3050",
    "exp2-t4": "deepseek-t4",
    "exp2-qwen-t4": "qwen-coder-t4",
    "exp2-qwen-24gb": "qwen-coder-24gb",
}

_BY_K = "0 chooses it from speculation.k"
_OURS = re.compile(
    rf"(({'|'.join(LOOKUPS)})\+)?({GREEDY})?(embedded:|{TARGET_LAYERS})"
    rf"|({'|'.join(LOOKUPS)})(\+|$)|{GREEDY}",
    re.IGNORECASE,
)
_SMALL = " with ngram, greedy:, target-layers: and embedded: in small letters"
Text = Annotated[str, Rule(" that is not empty", len)]
Spec = Annotated[
    Text,
    Rule(_SMALL, lambda spec: not (m := _OURS.match(spec)) or m[0].islower(), "mend them", True),
]
Device = Annotated[
    str,
    Rule(
        ": auto, cpu, cuda, cuda:N, mps, auto-split or auto-split-offload",
        re.compile(r"auto(-split(-offload)?)?|cpu|cuda(:[0-9]{1,2})?|mps").fullmatch,
        "N counts this machine's GPUs from 0; auto-split lays a target over all of them",
        is_word=True,
    ),
]
K = Annotated[int, within(1, 1024, "choose run.methods: [autoregressive] to draft nothing")]
Ngram = Annotated[int, within(1, 64, "each length is looked up, and long n-grams rarely repeat")]
Dtype = Literal["auto", "float32", "float16", "bfloat16"]
Quantization = Literal["none", "int8", "int4", "nf4"]
Compile = Literal["auto", "on", "off"]
MaxNewTokens = Annotated[int, within(1, 10_000_000, "no model's context is longer")]
Temperature = Annotated[float, within(0, 1000, "0 decodes greedily")]
TopK = Annotated[int, within(0, 10_000_000, "0 keeps every token")]
TopP = Annotated[float, Rule(" > 0 and <= 1", lambda p: 0 < p <= 1, "1 keeps every token")]
SPECULATIVE = re.compile(
    r"speculative(:(?P<draft>.+?(?<!(?i:@auto))(?<!(?i:@token|@block))(?<!(?i:@coupled))))?"
    r"(@(?P<k>[0-9]{1,4}|auto))?(@(?P<rule>token|block|coupled))?"
)
Method = Annotated[
    str,
    Rule(
        ": autoregressive, reference, speculative or speculative:DRAFT, each with @K or @block",
        lambda name: name in ("autoregressive", "reference") or SPECULATIVE.fullmatch(name),
        "K is auto, or at least 1 and at most speculation.k",
        is_word=True,
    ),
]
VerifierName = Literal["token", "block", "coupled"]
Noise = Literal["positional", "sequential"]
PromptStyle = Literal["completion", "chat"]


@dataclass(frozen=True)
class ModelsConfig(Block):
    """The two models and their precision. A `tokenizer` of None is the target's own."""

    target: Spec
    draft: Spec
    tokenizer: Spec | None
    dtype: Dtype
    device: Device
    target_quantization: Quantization
    draft_quantization: Quantization


@dataclass(frozen=True)
class SpeculationConfig(Block):
    """The settings of drafting: `ngram_*` for lookups, `m*` for models with a fixed k."""

    k: K | Literal["auto"]
    model_k: Annotated[int, within(1, 1024, "null means as many as k")] | None
    min_confidence: Annotated[float, Rule(" >= 0 and < 1", lambda p: 0 <= p < 1, "0 is off")]
    ngram_max: Ngram
    ngram_min: Ngram
    verifier: VerifierName = "token"


@dataclass(frozen=True)
class DecodingConfig(Block):
    """The end of decoding, and the form of its calls. A `width` of 0 is chosen from k."""

    max_new_tokens: MaxNewTokens
    bit_exact: bool
    width: Annotated[int, within(0, 2048, _BY_K)]
    compile: Compile = "off"


@dataclass(frozen=True)
class SamplingConfig(Block):
    """The warp of both models. A temperature of 0 is greedy, and a top_k of 0 is off."""

    temperature: Temperature
    top_k: TopK
    top_p: TopP
    seed: Annotated[int, within(0, 2**63 - 1, "a seed has 63 bits")]
    num_samples: Annotated[int, within(1, 10_000, "each of them is decoded for every example")]
    noise: Noise = "positional"


@dataclass(frozen=True)
class RunConfig(Block):
    """The rows to make. A `limit` of None takes all examples; 0 `threads` leave it to torch."""

    methods: Annotated[
        tuple[Method, ...],
        Rule(", at least one, none twice", lambda names: 0 < len(names) == len(set(names))),
    ]
    limit: Annotated[int, within(1, 1_000_000_000, "null runs every example")] | None
    warmup: Annotated[int, within(0, 1000, "each of them is decoded and thrown away")]
    threads: Annotated[int, within(0, 1024, "0 leaves the number to torch")]
    batch_size: Annotated[int, within(1, 1024, "1 decodes one text after the other")] = 1


@dataclass(frozen=True)
class HumanEvalConfig(Block):
    """The form of a prompt, the end of an answer, and the sandbox's limits."""

    prompt_style: PromptStyle
    stop_strings: tuple[Text, ...]
    timeout_seconds: Annotated[
        float,
        Rule(" > 0 and <= 86400", lambda s: 0 < s <= 86_400, "a program that hangs takes it all"),
    ]
    memory_mb: Annotated[int, within(64, 1_048_576, "a Python process needs 64 to start")]
    allow_weak_sandbox: bool = False


@dataclass(frozen=True)
class XSumColumns(Block):
    """The names of a data set's columns. An `id` of None numbers the rows."""

    document: Text = "document"
    summary: Text = "summary"
    id: Text | None = "id"


@dataclass(frozen=True)
class XSumConfig(Block):
    """The articles, the prompt that asks for a summary, and the summary's end."""

    dataset: Spec
    split: Text
    prompt_style: PromptStyle
    prompt_template: Annotated[
        str, Rule(" that holds {document}", lambda text: "{document}" in text)
    ]
    num_shots: Annotated[int, within(0, 1000, "each of them stands in every prompt")]
    stop_strings: tuple[Text, ...]
    columns: XSumColumns = XSumColumns()


@dataclass(frozen=True)
class _Profile(Block):
    """The blocks of one complete profile, with one for each task that it is for."""

    models: ModelsConfig
    speculation: SpeculationConfig
    decoding: DecodingConfig
    sampling: SamplingConfig
    run: RunConfig
    humaneval: HumanEvalConfig | None = None
    xsum: XSumConfig | None = None


@dataclass(frozen=True, kw_only=True)
class Config(_Profile):
    """One complete profile and its name."""

    profile: str

    @property
    def width(self) -> int:
        """Rows of a padded decode call: `decoding.width`, or the next multiple of 8 above k."""
        k = 0 if self.speculation.k == "auto" else self.speculation.k
        return self.decoding.width or (k // WIDTH_STEP + 1) * WIDTH_STEP

    @property
    def call_width(self) -> int | None:
        """Rows of every decode call; None if a call has a row for each new token only."""
        return self.width if self.decoding.bit_exact else self.decoding.width or None

    @property
    def largest_k(self) -> int:
        """The most tokens drafted in a cycle: k, or all that fit if k is auto."""
        return self.width - 1 if self.speculation.k == "auto" else self.speculation.k

    @property
    def coupled_methods(self) -> frozenset[str]:
        """The methods whose draft and target share their noise."""
        names = [name for name in self.run.methods if name.startswith("speculative")]
        return frozenset(name for name in names if method_parts(name, self).verifier == "coupled")

    def __post_init__(self) -> None:
        """Check the rules between fields; a ConfigError names the broken one."""
        ngrams, decoding, models = self.speculation, self.decoding, self.models
        if ngrams.ngram_min > ngrams.ngram_max:
            rule = f"<= speculation.ngram_max, here {ngrams.ngram_max}"
            way_out = "lower it, or raise speculation.ngram_max"
            raise mistake("speculation.ngram_min", rule, ngrams.ngram_min, way_out)
        if 0 < decoding.width <= max(1, self.largest_k):
            rule = f"0 or >= speculation.k + 1, here {self.largest_k + 1}"
            raise mistake("decoding.width", rule, decoding.width, _BY_K)
        if decoding.bit_exact and decoding.width % WIDTH_STEP:
            rule = f"a multiple of {WIDTH_STEP} for decoding.bit_exact: true"
            raise mistake("decoding.width", rule, decoding.width, _BY_K)
        if "reference" in self.run.methods and not decoding.bit_exact:
            way_out = "set it, or take reference out of run.methods"
            raise mistake("decoding.bit_exact", "true for the method reference", "false", way_out)
        for method in self.run.methods:
            if not 1 <= method_parts(method, self).k <= self.largest_k:
                rule = f"methods of K 1 to speculation.k, here {self.largest_k}"
                way_out = "choose such a K, or raise speculation.k"
                raise mistake("run.methods", rule, shown(method), way_out)
        if self.sampling.noise != "positional" and self.coupled_methods:
            rule = "positional for the rule coupled, which shares noise with the baseline"
            raise mistake("sampling.noise", rule, self.sampling.noise, "set it to positional")
        for name in (models.draft, *(method_parts(m, self).draft for m in self.run.methods)):
            spec = DraftName.parse(name).spec
            is_path = "/" in spec or ":" in spec or Path(spec).exists()
            if not is_path and (way_out := nearest(spec, LOOKUPS)):
                raise mistake("a draft", "a lookup, a model, or both", shown(name), way_out)
        if self.sampling.temperature == 0 and self.sampling.num_samples > 1:
            way_out = "set sampling.temperature, or take one"
            rule = "1 for a temperature of 0, which gives one text"
            raise mistake("sampling.num_samples", rule, self.sampling.num_samples, way_out)
        precision = models.draft_quantization
        if precision != "none" and not DraftName.parse(models.draft).spec:
            rule = f"none for the draft {models.draft}, which has no weights of its own"
            raise mistake("models.draft_quantization", rule, precision, "set it to none")
        if self.humaneval and self.humaneval.prompt_style == "chat" and self.humaneval.stop_strings:
            rule = "[] for humaneval.prompt_style: chat, because code may hold such strings"
            got = shown(self.humaneval.stop_strings)
            raise mistake("humaneval.stop_strings", rule, got, "set it to []")


def load_config(
    path: str | Path,
    profile: str | None = None,
    overrides: Sequence[str] = (),
) -> Config:
    """Read one profile of a configuration file, or raise a ConfigError.

    Args:
        path: a YAML file: `default: NAME`, `profiles: {NAME: {block: {key: value}}}`, and if you
            like `defaults: {block: {key: value}}` for what a profile does not state.
        profile: the profile's name; None takes the file's default.
        overrides: `key.path=value` each, with the value in YAML; later ones win.
    """
    file: _File = build(_File, read_blocks(path))
    name = file.default if profile is None else profile
    name = name if name in file.profiles else OLD_NAMES.get(name, name)
    if name not in file.profiles:
        way_out = nearest(name, file.profiles) or "name it with --profile"
        names = [shown_name(key) for key in file.profiles]
        known = ", ".join(names[:MAX_NAMES] + ["..."] * (len(names) > MAX_NAMES))
        raise mistake("profile", f"one of: {known}", shown(name), way_out)
    profile_blocks = block_of(file.profiles[name], f"profiles.{shown_name(name)}")
    blocks = _with_defaults(profile_blocks, file.defaults or {})
    for path_to, value in map(_parse_override, overrides):
        *parents, key = path_to.split(".")
        block = blocks
        for depth, parent in enumerate(parents, start=1):
            above = ".".join(map(shown_name, parents[:depth]))
            block = block_of(block.setdefault(parent, {}), above)
        block[key] = value
    config = Config(profile=name, **vars(build(_Profile, blocks)))
    if config.humaneval is None and config.xsum is None:
        rule = f"profile {name} must hold a humaneval or an xsum block (got neither)"
        raise ConfigError(f"{rule}; copy one from another profile")
    return config


def _with_defaults(profile: dict[str, Any], defaults: dict[str, Any]) -> dict[str, Any]:
    """Return a profile's blocks, filled with defaults. It has no task's block that it lacks."""
    blocks = {name: block for name, block in defaults.items() if name not in TASKS} | profile
    for name in blocks.keys() & defaults.keys():
        if isinstance(blocks[name], dict):
            blocks[name] = {**block_of(defaults[name], f"defaults.{name}"), **blocks[name]}
    return blocks


def require_task(config: Config, task: Literal["humaneval", "xsum"]) -> Any:
    """Return the task's block; a ConfigError if the profile is not for this task."""
    if (block := getattr(config, task)) is None:
        rule = f"a block of profile {config.profile} for this experiment"
        way_out = "choose another profile with --profile, or add the block"
        raise mistake(task, rule, "none", way_out)
    return block


def config_as_dict(config: Config) -> dict[str, Any]:
    """Return the configuration in dicts, lists and scalars, as JSON holds it."""
    return json.loads(json.dumps(asdict(config)))


def deciding(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields in `DECIDING` of a configuration's dict, which may be of an older version.

    A block that is None stays None. Version 1 has {} for humaneval then.
    """
    blocks = {block: values.get(block) for block in DECIDING}
    blocks["humaneval"] = blocks["humaneval"] or {}
    for block, fields in DECIDING.items():
        if isinstance(of := blocks[block], dict):
            known = [name for name in fields.split() if name in of]
            blocks[block] = {k: of[k] for k in known if of[k] != ADDED.get((block, k), ...)}
    return blocks


def config_hash(config: Config) -> str:
    """Return 16 hex digits of SHA-256 over the values that decide a row's text."""
    values = json.dumps(deciding(config_as_dict(config)), sort_keys=True)
    return hashlib.sha256(values.encode()).hexdigest()[:16]


@dataclass(frozen=True)
class MethodParts:
    """The parts of a method's name. Unnamed parts are the profile's; an unnamed draft is ""."""

    draft: str
    k: int
    is_adaptive: bool  # if so, k is the most that a cycle drafts
    verifier: VerifierName


def method_parts(method: str, config: Config) -> MethodParts:
    """Take `speculative:DRAFT@K@RULE` apart. A baseline has the profile's parts and uses none."""
    found: Any = SPECULATIVE.fullmatch(method)
    draft, k, rule = found.group("draft", "k", "rule") if found else (None, None, None)
    k = k or config.speculation.k
    largest = config.largest_k if k == "auto" else int(k)
    return MethodParts(draft or "", largest, k == "auto", rule or config.speculation.verifier)


@dataclass(frozen=True)
class _File(Block):
    default: Text
    profiles: dict[str, Any]
    defaults: dict[str, Any] | None = None


def read_blocks(path: str | Path) -> dict[str, Any]:
    """Return the keys and values of a YAML file, unchecked; or raise a ConfigError."""
    try:
        if Path(path).exists() and not Path(path).is_file():
            raise OSError(0, "not a file")  # reading a pipe or a device may never end
        with open(path, "rb") as file:
            data = file.read(MAX_FILE_BYTES + 1)
        if len(data) > MAX_FILE_BYTES:
            raise OSError(0, f"larger than {MAX_FILE_BYTES} bytes")
        text = data.decode("utf-8")
    except (OSError, ValueError) as error:
        is_binary = isinstance(error, UnicodeDecodeError)
        problem = "not UTF-8 text" if is_binary else getattr(error, "strerror", None) or error
        got = f"{path}: {problem}"
        raise mistake("config", "a YAML file", got, "name it with --config") from None
    return block_of(parse_yaml(text, str(path)), str(path))


def _parse_override(assignment: str) -> tuple[str, Any]:
    """Split `key.path=value` into field and value; an empty text stands for itself."""
    path, equals, text = assignment.partition("=")
    if not equals or not all(key.strip() for key in path.split(".")):
        way_out = "as in --set speculation.k=4"
        raise mistake("--set", "key.path=value", shown(assignment), way_out)
    field = path.strip()
    return field, parse_yaml(text, f"--set {shown_name(field)}") if text.strip() else ""
