"""config.py: strict reading, one-line errors, overrides, the hash; and the shipped config.yaml."""

import dataclasses
import json
from pathlib import Path
from typing import Annotated, get_args, get_origin, get_type_hints

import pytest
from conftest import shipped_profile
from helpers import error_line

from specsampling.checking import Rule
from specsampling.config import (
    DECIDING,
    OLD_NAMES,
    Config,
    ConfigError,
    config_as_dict,
    config_hash,
    load_config,
    require_task,
)
from specsampling.results.records import read_meta

PROJECT = Path(__file__).parents[1]
SHIPPED = PROJECT / "config.yaml"
DEMO = shipped_profile("demo")


def demo(*overrides):
    return load_config(SHIPPED, "demo", overrides)


def error_of(*overrides, path=SHIPPED, profile="demo"):
    """The one line that a user sees."""
    return error_line(ConfigError, load_config, path, profile, overrides)


def write(folder, text):
    path = folder / "config.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def test_an_error_names_the_field_the_rule_the_value_and_the_way_out():
    assert error_of("speculation.k=0") == (
        "speculation.k must be an integer >= 1 and <= 1024 or auto (got 0); "
        "choose run.methods: [autoregressive] to draft nothing"
    )
    assert error_of("models.dtype=8") == (
        "models.dtype must be one of auto, float32, float16, bfloat16 (got 8)"
    )


LIMIT = "null or an integer >= 1 and <= 1000000000"
DEVICES = "auto, cpu, cuda, cuda:N, mps, auto-split or auto-split-offload"
K = "an integer >= 1 and <= 1024 or auto"
BROKEN = {  # what the message must contain: values that break the rule
    # The value has another type.
    **{f'{LIMIT} (got "{value}")': [f"run.limit={value}"] for value in ("010:00", "1,000", "all")},
    '>= 0 and <= 9223372036854775807 (got "2024-05-01")': ["sampling.seed=2024-05-01"],
    'a number > 0 and <= 1 (got "1:30")': ["sampling.top_p=1:30"],
    'true or false (got "yes")': ["decoding.bit_exact=yes"],
    "true or false (got 1)": ["decoding.bit_exact=1"],
    **{f"{K} (got {value})": [f"speculation.k={value}"] for value in ("true", "5.0", "null")},
    f'{K} (got "5")': ["speculation.k='5'"],
    "a block of `key: value` lines (got 5)": ["speculation=5"],
    'a number >= 0 and <= 1000 (got "0.5")': ["sampling.temperature='0.5'"],
    "a number >= 0 and <= 1000 (got true)": ["sampling.temperature=true"],
    "a string that is not empty (got 5)": ["models.target=5"],
    'a string that is not empty (got "")': ["models.target="],
    "a string that is not empty (got null)": ["models.target=null"],
    "a list, each item a string: autoregressive": ["run.methods=speculative"],
    "each item a string that is not empty (got [1])": ["humaneval.stop_strings=[1]"],
    # Out of range.
    "one of auto, float32, float16, bfloat16": ["models.dtype=float8"],
    DEVICES: ["models.device=gpu", "models.device='cuda:'"],
    "one of none, int8, int4, nf4": ["models.draft_quantization=int5"],
    "an integer >= 0": [
        *("decoding.width=-8", "sampling.top_k=-1", "sampling.seed=-1", "run.warmup=-1"),
        "xsum.num_shots=-1",
    ],
    "an integer >= 1": [
        *("speculation.ngram_min=0", "decoding.max_new_tokens=0", "sampling.num_samples=0"),
        *("run.batch_size=0", "run.limit=0", "speculation.model_k=0"),
    ],
    "an integer >= 64": ["humaneval.memory_mb=63"],
    "a number >= 0 and < 1": ["speculation.min_confidence=1"],
    "a number >= 0": ["sampling.temperature=-0.1", "sampling.temperature=.nan"],
    "a number > 0 and <= 1": ["sampling.top_p=0", "sampling.top_p=1.1"],
    "a number > 0": ["humaneval.timeout_seconds=0"],
    "a number >= 0 and <= 1000 (got Infinity)": ["sampling.temperature=1e999"],
    "and <= 1000 (got 1e+300)": ["sampling.temperature=1e300"],
    "and <= 86400 (got 1e+300)": ["humaneval.timeout_seconds=1e300"],
    "token": ["speculation.verifier=tokens"],
    "or speculative:DRAFT": ["run.methods=['speculative:']"],
    "methods of K 1 to speculation.k, here 7": ["run.methods=['speculative@0']"],
    '(got "speculative:ngram@8"); choose such a K': ["run.methods=['speculative:ngram@8']"],
    "each with @K or @block": ["run.methods=['speculative@both']"],
    "at least one, none twice": ["run.methods=[]", "run.methods=[speculative, speculative]"],
    "autoregressive, reference, speculative or speculative:DRAFT": ["run.methods=[greedy]"],
    "a string that is not empty": ["humaneval.stop_strings=['']"],
    "that holds {document}": ["xsum.prompt_template=Summarise:"],
}


@pytest.mark.parametrize(
    ("override", "rule"),
    [(override, rule) for rule, overrides in BROKEN.items() for override in overrides],
)
def test_a_value_that_breaks_its_rule_is_refused(override, rule):
    message = error_of(override)
    assert message.startswith(f"{override.partition('=')[0]} must be ")
    assert rule in message


WAYS_OUT = {
    "did you mean auto?": [f"speculation.k={text}" for text in ("Auto", "' auto '", "automatic")],
    "write digits 0 to 9 only, without quotes, or auto": ["speculation.k=best"],
    "write digits 0 to 9 only, without quotes, or null": ["run.limit=None"],
    "did you mean null?": ["run.limit=Nul"],
    "did you mean speculative?": ["run.methods=[Speculative]"],
    "did you mean speculative:ngram@auto?": ["run.methods=[speculative:ngram@Auto]"],
    "did you mean cuda:0?": ["models.device=CUDA:0"],
    "did you mean bfloat16?": ["models.dtype=BFLOAT16"],
    "did you mean ngram?": ["models.draft=NGRAM"],
    "embedded: in small letters (got": ["models.draft=NGRAM+Qwen/X"],
    "did you mean embedded:smollm2-135m?": ["models.target=Embedded:smollm2-135m"],
    "did you mean off?": ["decoding.compile=OFF"],
    "write one of these two words": ["decoding.bit_exact=Yes"],
    "did you mean speculation.k?": ["speculation.K=3"],
}


@pytest.mark.parametrize("way_out", WAYS_OUT)
def test_the_way_out_is_the_broken_rules_own(way_out):
    """`k=Auto` was told to write digits only; a draft NGRAM was looked for on the hub."""
    assert all(way_out in error_of(override) for override in WAYS_OUT[way_out])


def test_an_integer_may_stand_for_a_number():
    assert type(demo("sampling.temperature=1").sampling.temperature) is float


def test_a_long_value_is_cut():
    assert len(error_of(f"speculation.k={'x' * 10_000}")) < 300


@pytest.mark.parametrize("device", ["auto", "cpu", "cuda", "cuda:0", "cuda:11", "mps"])
def test_every_device_form_is_read(device):
    assert demo(f"models.device={device}").models.device == device


@pytest.mark.parametrize(
    ("key", "nearest"),
    [
        ("speculation.kk", "did you mean speculation.k?"),
        ("decoding.max_tokens", "did you mean decoding.max_new_tokens?"),
        ("speculaton.k", "did you mean speculation?"),
        *((key, "the keys there are models, speculation, decoding") for key in ("k", "profile")),
    ],
)
def test_an_unknown_key_is_refused_with_the_nearest(key, nearest):
    message = error_of(f"{key}=3")
    assert "is not a known key" in message and nearest in message


def test_an_unknown_profile_is_refused_with_the_nearest():
    message = error_of(profile="deepseek-t5")
    assert "smollm2-cpu, qwen-coder-cpu, gpt-neo-rtx3050, deepseek-t4, qwen-coder-t4, " in message
    assert "did you mean deepseek-t4?" in message


def test_a_missing_key_or_block_is_named(tmp_path):
    text = json.dumps({"default": "mine", "profiles": {"mine": DEMO}})
    path = write(tmp_path, text.replace('"k": "auto", ', ""))
    assert error_of(path=path, profile=None) == (
        "speculation.k is missing; it must be an integer >= 1 and <= 1024 or auto"
    )

    blocks = {name: block for name, block in DEMO.items() if name != "sampling"}
    path = write(tmp_path, json.dumps({"default": "mine", "profiles": {"mine": blocks}}))
    assert error_of(path=path, profile=None).startswith("sampling is missing")


FREE = ("run.methods=[speculative]", "decoding.bit_exact=false")


@pytest.mark.parametrize(
    ("overrides", "rule"),
    [
        (["speculation.ngram_min=4"], "speculation.ngram_min must be <= speculation.ngram_max"),
        (["decoding.width=12"], "decoding.width must be a multiple of 8"),
        (["speculation.k=8", "decoding.width=8"], "must be 0 or >= speculation.k + 1, here 9"),
        ([*FREE, "speculation.k=7", "decoding.width=5"], "must be 0 or >= speculation.k + 1, here"),
        ([FREE[1], "run.methods=[reference]"], "bit_exact must be true for the method reference"),
        (["humaneval.stop_strings=['\\ndef']"], "must be [] for humaneval.prompt_style: chat"),
        (
            ["models.draft=ngram", "models.draft_quantization=int8"],
            "models.draft_quantization must be none",
        ),
        (["models.draft=ngarm"], "did you mean ngram?"),
        (["run.methods=[autoregressive, speculative:ngrma@auto]"], "did you mean ngram?"),
        (["sampling.num_samples=10"], "sampling.num_samples must be 1 for a temperature of 0"),
        (["humaneval=null", "xsum=null"], "smollm2-cpu must hold a humaneval or an xsum block"),
    ],
)
def test_fields_that_contradict_each_other_are_refused(overrides, rule):
    assert rule in error_of(*overrides)


@pytest.mark.parametrize(("k", "width"), [(1, 8), (5, 8), (7, 8), (8, 16), (15, 16), (16, 24)])
def test_width_0_is_the_next_multiple_of_8_above_k(k, width):
    assert demo(f"speculation.k={k}").width == width


def test_a_width_that_is_set_is_kept():
    assert demo("decoding.width=24").width == 24
    assert demo(*FREE, "decoding.width=9").width == 9


def test_overrides_are_read_as_yaml_the_last_one_wins_and_the_rest_stays():
    changed = config_as_dict(
        demo(
            "models.draft=target-layers:4",
            "models.tokenizer=null",
            "humaneval.prompt_style=completion",
            r'humaneval.stop_strings=["\ndef", "a=b"]',
            "speculation.k=3",
            "speculation.k=4",
        )
    )
    plain = config_as_dict(demo())
    plain["models"] |= {"draft": "target-layers:4", "tokenizer": None}
    plain["humaneval"] |= {"prompt_style": "completion", "stop_strings": ["\ndef", "a=b"]}
    plain["speculation"]["k"] = 4
    assert changed == json.loads(json.dumps(plain)) == json.loads(json.dumps(changed))


@pytest.mark.parametrize(
    ("override", "start"),
    [
        *((form, "--set must be key.path=value (got ") for form in ("k", "=3", "k.=3", ".k=3", "")),
        ("speculation.k.x=3", "speculation.k must be a block"),
        ("run.methods=[a", "--set run.methods must be valid YAML (got "),
    ],
)
def test_an_override_that_is_none_is_refused(override, start):
    assert error_of(override).startswith(start)


def test_a_missing_file_and_a_folder_are_one_line(tmp_path):
    message = error_of(path="nowhere.yaml")
    assert message.startswith("config must be a YAML file (got nowhere.yaml: No such file")
    assert "must be a YAML file" in error_of(path=tmp_path)


@pytest.mark.parametrize(
    ("data", "problem"),
    [
        (b"default: demo\n# " + b"x" * 300_000, "larger than 200000 bytes"),
        ("default: demo".encode("utf-16"), "not UTF-8"),
        (b"default: d\xe9mo", "not UTF-8"),
        (b"\xff\xfe\x00", "not UTF-8"),
        (b"\x7fELF\x02\x01\x01", "unacceptable character"),
        (b'{"default": "demo"}', "profiles is missing"),
        (b"\xef\xbb\xbfdefault: demo", "profiles is missing"),
        (b"profiles: &a {demo: *a}", "Circular reference detected"),
        (b"default: demo\nprofiles: {demo: {models: " + b"[" * 9000, "nested too deep"),
        (b"default: demo\nprofiles: {'a\\nb': 1}", "profile must be one of: a"),
        (b'default: demo\nprofiles: {"a\\nb": 1}', "profile must be one of: a\\nb"),
        (b'"a\\nb": 1', "a\\nb is not a known key"),
        (b"k" * 100_000 + b": 1", "line 1: "),
        (b"default: demo\nprofiles: {}\ndefault: other\n", 'line 3: found duplicate key "default"'),
        (b"default: demo\nprofiles:\n  demo: [\n", "must be valid YAML (got line 4: "),
        (b"", "must be a block"),
        (b"- a", "must be a block"),
        (b"default: demo", "profiles is missing"),
        (b"default: demo\nprofile: {}", "did you mean profiles?"),
        (b"default: 3\nprofiles: {}", "default must be a string"),
        (b"default: demo\nprofiles: {demo: 3}", "profiles.demo must be a block"),
        (b"default: demo\nprofiles: {[1]: {}}", "keys must be str"),
        (b"default: demo\nprofiles: {demo: {}}\ndefaults: 3", "defaults must be null or a block"),
        (
            b"profiles: {smollm2-cpu: {models: {}}}\ndefaults: {models: 3}",
            "defaults.models must be",
        ),
        (b"profiles: {smollm2-cpu: {}}\ndefaults: {model: {}}", "did you mean models?"),
    ],
    ids=lambda value: "",
)
def test_a_file_of_another_kind_is_one_short_line(tmp_path, data, problem):
    """A key with a line break made two lines of the message."""
    path = tmp_path / "config.yaml"
    path.write_bytes(data + b"\ndefault: a" * (b"smollm2" in data))
    message = error_of(path=path)
    assert problem in message and len(message) < 500


def test_profiles_may_share_a_block_by_an_alias(tmp_path):
    profiles = f"{{mine: &mine {json.dumps(DEMO)}, yours: *mine}}"
    path = write(tmp_path, f"default: mine\nprofiles: {profiles}")
    assert load_config(path, "yours").speculation == load_config(path, "mine").speculation


def integers(hint):
    """Every `int` in a type hint, with its rules."""
    if dataclasses.is_dataclass(hint):
        for name, inner in get_type_hints(hint, include_extras=True).items():
            for below, rules in integers(inner):
                yield below or f"{hint.__name__}.{name}", rules
    elif get_origin(hint) is Annotated and get_args(hint)[0] is int:
        yield "", [rule for rule in get_args(hint) if isinstance(rule, Rule)]
    elif hint is int:
        yield "", ()
    else:
        for inner in get_args(hint):
            yield from integers(inner)


def test_every_integer_has_an_upper_bound_and_a_way_out():
    """k=65536 hung, num_samples of 20 digits filled the memory with a list of what to do."""
    found = dict(integers(Config))
    assert len(found) >= 14
    for name, rules in found.items():
        assert any(" <= " in rule.words and rule.way_out for rule in rules), name
        assert not all(rule.check(10**20) for rule in rules), name


@pytest.mark.parametrize(("old", "new"), OLD_NAMES.items())
def test_old_names_of_profiles_still_mean_them(old, new):
    """Committed runs and habits name them so."""
    assert load_config(SHIPPED, old) == load_config(SHIPPED, new)
    assert load_config(SHIPPED, old).profile == new


def test_a_profile_states_what_differs_from_the_defaults(tmp_path):
    blocks = {name: block for name, block in DEMO.items() if name != "xsum"}
    profiles = {"a": {"models": {"draft": "ngram"}, "xsum": {}}, "b": {"humaneval": {}}}
    values = {"default": "a", "defaults": DEMO, "profiles": profiles}
    path = write(tmp_path, json.dumps(values))
    first, second = load_config(path), load_config(path, "b")
    assert first.models.draft == "ngram" and first.humaneval is None
    assert first.xsum == load_config(SHIPPED).xsum
    assert second.models == load_config(SHIPPED).models and second.xsum is None
    complete = write(tmp_path, json.dumps({"default": "b", "profiles": {"b": blocks}}))
    assert load_config(complete) == second


def test_a_task_without_a_block_is_refused():
    assert require_task(demo(), "humaneval").prompt_style == "chat"
    with pytest.raises(ConfigError, match="xsum must be a block of profile smollm2-cpu"):
        require_task(demo("xsum=null"), "xsum")


def test_the_hash_ignores_what_changes_no_row(tmp_path):
    renamed = write(tmp_path, json.dumps({"default": "mine", "profiles": {"mine": DEMO}}))
    assert config_hash(load_config(renamed)) == config_hash(demo())
    for override in (
        *("sampling.temperature=0.0", "speculation.k=auto"),  # the values that are there
        *("run.limit=3", "run.methods=[speculative]", "run.warmup=0"),
        *("humaneval.timeout_seconds=9", "humaneval.memory_mb=512"),
        *("humaneval.allow_weak_sandbox=true", "xsum.columns={document: document}"),
    ):
        assert config_hash(demo(override)) == config_hash(demo()), override
    sampled = "sampling.temperature=1"
    assert config_hash(demo(sampled, "sampling.num_samples=2")) == config_hash(demo(sampled))


def test_the_hash_changes_with_what_changes_rows():
    overrides = (
        *("models.target=other", "models.draft=target-layers:2", "models.dtype=float32"),
        *("models.target_quantization=int8", "speculation.k=4", "speculation.ngram_max=4"),
        *("speculation.model_k=2", "speculation.min_confidence=0.5"),
        *("decoding.max_new_tokens=64", "decoding.width=16", "sampling.temperature=0.5"),
        *("sampling.seed=1", "run.threads=1", "humaneval.prompt_style=completion"),
        *("xsum.columns={document: article}", "xsum.columns={id: null}"),
    )
    hashes = {config_hash(demo(override)) for override in overrides}
    stops = ("humaneval.prompt_style=completion", 'humaneval.stop_strings=["\\ndef"]')
    hashes |= {config_hash(demo()), config_hash(demo(*stops))}
    assert len(hashes) == len(overrides) + 2 and {len(of) for of in hashes} == {16}


def test_an_added_block_changes_no_hash():
    """A field of a task that came later made every old run another run."""

    @dataclasses.dataclass(frozen=True)
    class Later(Config):
        chess: tuple[str, ...] | None = None

    now = {field.name: getattr(demo(), field.name) for field in dataclasses.fields(Config)}
    assert config_hash(Later(**now, chess=("e4",))) == config_hash(demo())


def test_every_field_of_the_configuration_decides_a_text_or_is_known_not_to():
    """A new field must be put into `DECIDING`, or here: else runs of two values would be one."""
    values = config_as_dict(demo())
    fields = {f"{block}.{key}" for block in DECIDING for key in values[block]}
    deciding = {f"{block}.{key}" for block, keys in DECIDING.items() for key in keys.split()}
    assert fields - deciding == {
        *("run.limit", "run.methods", "run.warmup", "decoding.compile", "sampling.num_samples"),
        *("sampling.noise", "humaneval.timeout_seconds", "humaneval.memory_mb"),
        "humaneval.allow_weak_sandbox",
    }
    assert deciding < fields and set(values) == {"profile", *DECIDING}


COMMITTED = [
    path.with_name(path.name.replace(".meta.json", ".jsonl"))
    for path in sorted((PROJECT / "Results/published").rglob("*.meta.json"))
    if b'"compiled"' not in path.read_bytes()  # steps that nothing makes any more
]


@pytest.mark.parametrize("path", COMMITTED, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_committed_runs_can_be_continued(path, tmp_path):
    """A key that moved or came into the hash would leave the shipped rows to nobody."""
    meta = read_meta(path)
    blocks = {name: block for name, block in meta["config"].items() if block is not None}
    profile = blocks.pop("profile")
    run = write(tmp_path, json.dumps({"default": profile, "profiles": {profile: blocks}}))
    assert config_hash(load_config(run)) == meta["config_hash"]


QWEN = {"target": "Qwen/Qwen2.5-Coder-7B-Instruct", "draft": "ngram+Qwen/Qwen2.5-Coder-0.5B-Instruct"}  # fmt: skip # noqa: E501
SHIPPED_PROFILES = {
    "smollm2-cpu": {
        "models": {"target": "embedded:smollm2-135m", "tokenizer": None, "dtype": "auto"}
        | {"device": "auto"},
        "decoding": {"bit_exact": True, "max_new_tokens": 256},
        "sampling": {"temperature": 0},
        "run": {"methods": ("autoregressive", "speculative"), "limit": None},
        "humaneval": {"prompt_style": "chat", "stop_strings": ()},
        "xsum": {"dataset": "embedded:articles", "prompt_style": "chat"},
    },
    "qwen-coder-cpu": {
        "models": {"target": "embedded:qwen2.5-coder-1.5b", "dtype": "auto", "device": "cpu"}
        | {"draft": "ngram+embedded:qwen2.5-coder-0.5b"}
        | {"target_quantization": "int8", "draft_quantization": "int8"},
        "speculation": {"k": "auto"},
        "decoding": {"width": 16, "bit_exact": True},
        "sampling": {"temperature": 0},
        "humaneval": {"prompt_style": "chat"},
        "xsum": {"dataset": "embedded:articles"},
    },
    "qwen-coder-t4": {
        "models": QWEN | {"dtype": "float16", "target_quantization": "int8"},
        "decoding": {"bit_exact": False},
        "run": {"methods": ("autoregressive", "speculative")},
    },
    "qwen-coder-24gb": {
        "models": QWEN | {"dtype": "bfloat16", "target_quantization": "none"},
        "decoding": {"bit_exact": True},
        "run": {"methods": ("autoregressive", "reference", "speculative")},
    },
    "gpt-neo-rtx3050": {
        "models": {"target": "mia-llm/gpt-neo-1.3B-xsum-roya", "dtype": "float16"}
        | {"draft": "mia-llm/gpt-neo-125m-xsum-roya", "tokenizer": "EleutherAI/gpt-neo-125m"}
        | {"device": "cuda"},
        "speculation": {"k": 5},
        "decoding": {"max_new_tokens": 256},
        "sampling": {"temperature": 0},
        "xsum": {"dataset": "EdinburghNLP/xsum", "split": "test", "prompt_style": "completion"}
        | {"prompt_template": "Generate a short Summary for this article: {document}"}
        | {"num_shots": 0},
    },
    "deepseek-t4": {
        "models": {"target": "deepseek-ai/deepseek-coder-6.7b-base", "dtype": "float16"}
        | {"draft": "deepseek-ai/deepseek-coder-1.3b-base", "device": "cuda"}
        | {"target_quantization": "int8", "draft_quantization": "none"},
        "speculation": {"k": 5},
        "decoding": {"max_new_tokens": 256, "bit_exact": False},
        "run": {"methods": ("autoregressive", "speculative")},
        "humaneval": {"prompt_style": "completion"}
        | {"stop_strings": ("\nclass", "\ndef", "\n#", "\nif", "\nprint")},
    },
}


@pytest.mark.parametrize("name", SHIPPED_PROFILES)
def test_a_shipped_profile_says_what_the_documents_promise(name):
    config = load_config(SHIPPED, name)
    for block, values in SHIPPED_PROFILES[name].items():
        assert {key: getattr(getattr(config, block), key) for key in values} == values
    assert (config.humaneval is None) == (name == "gpt-neo-rtx3050")


def test_the_first_profile_is_the_default():
    assert load_config(SHIPPED) == load_config(SHIPPED, "smollm2-cpu")
