"""config.py: strict reading, one-line errors, overrides, the hash; and the shipped config.yaml."""

import dataclasses
import json
from pathlib import Path
from typing import Annotated, get_args, get_origin, get_type_hints

import pytest
from conftest import shipped_profile

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
    with pytest.raises(ConfigError) as caught:
        load_config(path, profile, overrides)
    message = str(caught.value)
    assert "\n" not in message
    return message


def write(folder, text):
    path = folder / "config.yaml"
    path.write_text(text, encoding="utf-8")
    return path


# --- one value ---------------------------------------------------------------------


def test_an_error_names_the_field_the_rule_the_value_and_the_way_out():
    assert error_of("speculation.k=0") == (
        "speculation.k must be an integer >= 1 and <= 1024 or auto (got 0); "
        "choose run.methods: [autoregressive] to draft nothing"
    )
    assert error_of("models.dtype=8") == (
        "models.dtype must be one of auto, float32, float16, bfloat16 (got 8)"
    )


@pytest.mark.parametrize(
    ("override", "rule"),
    [
        (
            "run.limit=010:00",
            'null or an integer >= 1 and <= 1000000000 (got "010:00")',
        ),
        (
            "run.limit=1,000",
            'null or an integer >= 1 and <= 1000000000 (got "1,000")',
        ),
        ("sampling.seed=2024-05-01", '>= 0 and <= 9223372036854775807 (got "2024-05-01")'),
        ("sampling.top_p=1:30", 'a number > 0 and <= 1 (got "1:30")'),
        ("decoding.bit_exact=yes", 'true or false (got "yes")'),
        ("decoding.bit_exact=off", 'true or false (got "off")'),
        (
            "speculation.k=true",
            "an integer >= 1 and <= 1024 or auto (got true)",
        ),
        (
            "speculation.k='5'",
            'an integer >= 1 and <= 1024 or auto (got "5")',
        ),
        (
            "speculation.k=5.0",
            "an integer >= 1 and <= 1024 or auto (got 5.0)",
        ),
        (
            "speculation.k=null",
            "an integer >= 1 and <= 1024 or auto (got null)",
        ),
        ("speculation=5", "a block of `key: value` lines (got 5)"),
        (
            "sampling.temperature='0.5'",
            'a number >= 0 and <= 1000 (got "0.5")',
        ),
        (
            "sampling.temperature=true",
            "a number >= 0 and <= 1000 (got true)",
        ),
        ("decoding.bit_exact=1", "true or false (got 1)"),
        ("models.target=5", "a string that is not empty (got 5)"),
        ("models.target=", 'a string that is not empty (got "")'),
        ("models.target=null", "a string that is not empty (got null)"),
        (
            "run.limit=all",
            'null or an integer >= 1 and <= 1000000000 (got "all")',
        ),
        (
            "run.methods=speculative",
            "a list, each item a string: autoregressive",
        ),
        ("humaneval.stop_strings=[1]", "each item a string that is not empty (got [1])"),
    ],
)
def test_a_value_of_the_wrong_type_is_refused(override, rule):
    message = error_of(override)
    assert message.startswith(f"{override.partition('=')[0]} must be ")
    assert rule in message


@pytest.mark.parametrize(
    ("override", "rule"),
    [
        ("models.target=''", "a string that is not empty"),
        ("models.dtype=float8", "one of auto, float32, float16, bfloat16"),
        ("models.device=gpu", "auto, cpu, cuda, cuda:N, mps, auto-split or auto-split-offload"),
        ("models.device='cuda:'", "auto, cpu, cuda, cuda:N, mps, auto-split or auto-split-offload"),
        ("models.draft_quantization=int5", "one of none, int8, int4, nf4"),
        ("speculation.ngram_min=0", "an integer >= 1"),
        ("speculation.model_k=0", "null or an integer >= 1"),
        ("speculation.min_confidence=1", "a number >= 0 and < 1"),
        ("run.methods=['speculative:']", "or speculative:DRAFT"),
        ("run.methods=['speculative@0']", "methods of K 1 to speculation.k, here 7"),
        ("run.methods=['speculative:ngram@8']", '(got "speculative:ngram@8"); choose such a K'),
        ("run.methods=['speculative@both']", "each with @K or @block"),
        ("speculation.verifier=tokens", "token"),
        ("decoding.max_new_tokens=0", "an integer >= 1"),
        ("decoding.width=-8", "an integer >= 0"),
        ("sampling.temperature=-0.1", "a number >= 0"),
        ("sampling.temperature=.nan", "a number >= 0"),
        ("sampling.temperature=.inf", "a number >= 0"),
        ("sampling.top_k=-1", "an integer >= 0"),
        ("sampling.top_p=0", "a number > 0 and <= 1"),
        ("sampling.top_p=1.1", "a number > 0 and <= 1"),
        ("sampling.seed=-1", "an integer >= 0"),
        ("sampling.num_samples=0", "an integer >= 1"),
        ("run.methods=[]", "at least one, none twice"),
        ("run.methods=[speculative, speculative]", "at least one, none twice"),
        ("run.methods=[greedy]", "autoregressive, reference, speculative or speculative:DRAFT"),
        ("run.limit=0", "null or an integer >= 1"),
        ("run.warmup=-1", "an integer >= 0"),
        ("humaneval.stop_strings=['']", "a string that is not empty"),
        ("humaneval.timeout_seconds=0", "a number > 0"),
        ("humaneval.memory_mb=63", "an integer >= 64"),
    ],
)
def test_a_value_out_of_range_is_refused(override, rule):
    field = override.partition("=")[0]
    message = error_of(override)
    assert message.startswith(f"{field} must be ")
    assert rule in message


@pytest.mark.parametrize(
    ("override", "way_out"),
    [
        ("speculation.k=Auto", "did you mean auto?"),
        ("speculation.k=AUTO", "did you mean auto?"),
        ("speculation.k=' auto '", "did you mean auto?"),
        ("speculation.k=automatic", "did you mean auto?"),
        ("speculation.k=best", "write digits 0 to 9 only, without quotes, or auto"),
        ("run.limit=None", "write digits 0 to 9 only, without quotes, or null"),
        ("run.limit=Nul", "did you mean null?"),
        ("run.methods=[Speculative]", "did you mean speculative?"),
        ("run.methods=[speculative:ngram@Auto]", "did you mean speculative:ngram@auto?"),
        ("models.device=CUDA:0", "did you mean cuda:0?"),
        ("models.dtype=BFLOAT16", "did you mean bfloat16?"),
        ("models.draft=NGRAM", "did you mean ngram?"),
        ("models.draft=NGRAM+Qwen/X", "embedded: in small letters (got"),
        ("models.target=Embedded:smollm2-135m", "did you mean embedded:smollm2-135m?"),
        ("decoding.compile=OFF", "did you mean off?"),
        ("decoding.bit_exact=Yes", "write one of these two words"),
        ("speculation.K=3", "did you mean speculation.k?"),
    ],
)
def test_the_way_out_is_the_broken_rules_own(override, way_out):
    """`k=Auto` was told to write digits only; a draft NGRAM was looked for on the hub."""
    assert way_out in error_of(override)


def test_a_prompt_template_must_hold_the_document():
    template = "xsum.prompt_template=Summarise:"
    assert "that holds {document}" in error_of(template, profile="gpt-neo-rtx3050")


def test_an_integer_may_stand_for_a_number_but_stays_no_integer():
    temperature = demo("sampling.temperature=1").sampling.temperature
    assert temperature == 1
    assert type(temperature) is float


def test_numbers_are_read_as_yaml_1_2_reads_them():
    """010 was 8, and 1e-3 was text."""
    config = demo("run.limit=010", "sampling.temperature=1e-3", "sampling.seed=0x10")
    assert (config.run.limit, config.sampling.temperature, config.sampling.seed) == (10, 0.001, 16)


def test_a_long_value_is_cut():
    assert len(error_of(f"speculation.k={'x' * 10_000}")) < 300


@pytest.mark.parametrize("device", ["auto", "cpu", "cuda", "cuda:0", "cuda:11", "mps"])
def test_every_device_form_is_read(device):
    assert demo(f"models.device={device}").models.device == device


# --- keys --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "nearest"),
    [
        ("speculation.kk", "did you mean speculation.k?"),
        ("decoding.max_tokens", "did you mean decoding.max_new_tokens?"),
        ("speculaton.k", "did you mean speculation?"),
        ("k", "the keys there are models, speculation, decoding"),
        ("profile", "the keys there are models, speculation, decoding"),
    ],
)
def test_an_unknown_key_is_refused_with_the_nearest(key, nearest):
    message = error_of(f"{key}=3")
    assert "is not a known key" in message
    assert nearest in message


def test_a_missing_key_is_named_with_its_rule(tmp_path):
    text = json.dumps({"default": "mine", "profiles": {"mine": DEMO}})
    path = write(tmp_path, text.replace('"k": "auto", ', ""))
    assert error_of(path=path, profile=None) == (
        "speculation.k is missing; it must be an integer >= 1 and <= 1024 or auto"
    )


def test_a_missing_block_is_named(tmp_path):
    blocks = {name: block for name, block in DEMO.items() if name != "sampling"}
    path = write(tmp_path, json.dumps({"default": "mine", "profiles": {"mine": blocks}}))
    assert error_of(path=path, profile=None).startswith("sampling is missing")


def test_a_key_that_stands_twice_is_refused_with_its_line(tmp_path):
    """PyYAML keeps the last one without a word."""
    path = write(tmp_path, "default: demo\nprofiles: {}\ndefault: other\n")
    assert 'line 3: found duplicate key "default"' in error_of(path=path)


# --- rules between fields ----------------------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "rule"),
    [
        (["speculation.ngram_min=4"], "speculation.ngram_min must be <= speculation.ngram_max"),
        (["decoding.width=12"], "decoding.width must be a multiple of 8"),
        (["speculation.k=8", "decoding.width=8"], "must be 0 or >= speculation.k + 1, here 9"),
        (
            [
                *("run.methods=[speculative]", "decoding.bit_exact=false"),
                *("speculation.k=7", "decoding.width=5"),
            ],
            "must be 0 or >= speculation.k + 1, here 8",
        ),
        (
            ["decoding.bit_exact=false", "run.methods=[reference]"],
            "decoding.bit_exact must be true for the method reference",
        ),
        (
            ["humaneval.stop_strings=['\\ndef']"],
            "humaneval.stop_strings must be [] for humaneval.prompt_style: chat",
        ),
        (
            ["models.draft=ngram", "models.draft_quantization=int8"],
            "models.draft_quantization must be none",
        ),
        (["models.draft=ngarm"], "did you mean ngram?"),
        (["run.methods=[autoregressive, speculative:ngrma@auto]"], "did you mean ngram?"),
        (["sampling.num_samples=10"], "sampling.num_samples must be 1 for a temperature of 0"),
        (
            ["humaneval=null", "xsum=null"],
            "profile smollm2-cpu must hold a humaneval or an xsum block",
        ),
    ],
)
def test_fields_that_contradict_each_other_are_refused(overrides, rule):
    assert rule in error_of(*overrides)


@pytest.mark.parametrize(("k", "width"), [(1, 8), (5, 8), (7, 8), (8, 16), (15, 16), (16, 24)])
def test_width_0_is_the_next_multiple_of_8_above_k(k, width):
    assert demo(f"speculation.k={k}").width == width


def test_a_width_that_is_set_is_kept():
    assert demo("decoding.width=24").width == 24
    free = ("run.methods=[speculative]", "decoding.bit_exact=false", "decoding.width=9")
    assert demo(*free).width == 9


# --- overrides ---------------------------------------------------------------------


def test_overrides_are_read_as_yaml_and_the_last_one_wins():
    config = demo(
        "run.methods=[autoregressive, speculative]",
        "run.limit=10",
        "models.draft=target-layers:4",
        "models.tokenizer=null",
        "humaneval.prompt_style=completion",
        r'humaneval.stop_strings=["\ndef", "a=b"]',
        "speculation.k=3",
        "speculation.k=4",
    )
    assert config.run.methods == ("autoregressive", "speculative")
    assert config.run.limit == 10
    assert config.models.draft == "target-layers:4"
    assert config.models.tokenizer is None
    assert config.humaneval.stop_strings == ("\ndef", "a=b")
    assert config.speculation.k == 4


def test_overrides_leave_the_other_values_alone():
    changed = config_as_dict(demo("speculation.k=4"))
    changed["speculation"]["k"] = "auto"
    assert changed == config_as_dict(demo())


@pytest.mark.parametrize("override", ["speculation.k", "=3", "speculation.=3", ".k=3", ""])
def test_an_override_without_key_and_value_is_refused(override):
    assert error_of(override).startswith("--set must be key.path=value (got ")


def test_an_override_below_a_value_is_refused():
    assert error_of("speculation.k.x=3").startswith("speculation.k must be a block")


def test_an_override_that_is_not_yaml_is_refused():
    assert error_of("run.methods=[a").startswith("--set run.methods must be valid YAML (got ")


# --- the file ----------------------------------------------------------------------


def test_a_missing_file_is_one_line():
    message = error_of(path="nowhere.yaml")
    assert message.startswith("config must be a YAML file (got nowhere.yaml: No such file")


def test_a_folder_and_a_binary_file_are_one_line(tmp_path):
    assert "must be a YAML file" in error_of(path=tmp_path)
    binary = tmp_path / "config.yaml"
    binary.write_bytes(b"\xff\xfe\x00")
    assert "not UTF-8" in error_of(path=binary)


@pytest.mark.parametrize(
    ("data", "problem"),
    [
        (b"default: demo\n# " + b"x" * 300_000, "larger than 200000 bytes"),
        ("default: demo".encode("utf-16"), "not UTF-8"),
        (b"default: d\xe9mo", "not UTF-8"),
        (b"default: demo\0", "unacceptable character"),
        (b"\x7fELF\x02\x01\x01", "unacceptable character"),
        (b"PK\x03\x04", "unacceptable character"),
        (b'{"default": "demo"}', "profiles is missing"),
        (b"\xef\xbb\xbfdefault: demo", "profiles is missing"),
        (b"default: &a [*a]", "Circular reference detected"),
        (b"profiles: &a {demo: *a}", "Circular reference detected"),
        (b"default: demo\nprofiles: {demo: {models: " + b"[" * 9000, "nested too deep"),
        (b"default: demo\nprofiles: {'a\\nb': 1}", "profile must be one of: a"),
        (b'default: demo\nprofiles: {"a\\nb": 1}', "profile must be one of: a\\nb"),
        (b'"a\\nb": 1', "a\\nb is not a known key"),
        (b"k" * 100_000 + b": 1", "is not a known key"),
        (b'default: "\\ud800"\nprofiles: {}', "surrogates not allowed"),
        (b"default: demo\n---\ndefault: demo", "found another document"),
    ],
    ids=lambda value: "",
)
def test_a_file_of_another_kind_is_one_short_line(tmp_path, data, problem):
    """A key with a line break made two lines of the message; a bomb of aliases took 11 GB."""
    path = tmp_path / "config.yaml"
    path.write_bytes(data)
    message = error_of(path=path)
    assert problem in message or "line " in message and "key" in problem
    assert len(message) < 500


def test_an_alias_bomb_is_not_expanded_for_its_error_message(tmp_path):
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 10)]
    path = write(tmp_path, "\n".join([*lines, "default: *a9", "profiles: {}"]))
    assert "too many values" in error_of(path=path)


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


def test_a_syntax_error_names_the_line(tmp_path):
    path = write(tmp_path, "default: demo\nprofiles:\n  demo: [\n")
    message = error_of(path=path)
    assert f"{path} must be valid YAML (got line 4: " in message


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "must be a block"),
        ("- a", "must be a block"),
        ("default: demo", "profiles is missing"),
        ("default: demo\nprofile: {}", "did you mean profiles?"),
        ("default: 3\nprofiles: {}", "default must be a string"),
        ("default: demo\nprofiles: {demo: 3}", "profiles.demo must be a block"),
        ("default: demo\nprofiles: {[1]: {}}", "keys must be str"),
    ],
)
def test_a_file_of_another_shape_is_refused(tmp_path, text, problem):
    assert problem in error_of(path=write(tmp_path, text))


def test_an_unknown_profile_is_refused_with_the_nearest():
    message = error_of(profile="deepseek-t5")
    names = "smollm2-cpu, qwen-coder-cpu, gpt-neo-rtx3050, deepseek-t4, qwen-coder-t4, "
    assert f"{names}qwen-coder-24gb" in message
    assert "did you mean deepseek-t4?" in message


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


@pytest.mark.parametrize(
    ("defaults", "problem"),
    [
        ("3", "defaults must be null or a block"),
        ("{models: 3}", "defaults.models must be a block"),
        ("{model: {}}", "did you mean models?"),
    ],
)
def test_defaults_of_another_shape_are_refused(tmp_path, defaults, problem):
    text = f"default: a\ndefaults: {defaults}\nprofiles: {{a: {{models: {{}}}}}}"
    assert problem in error_of(path=write(tmp_path, text), profile=None)


def test_a_task_without_a_block_is_refused():
    assert require_task(demo(), "humaneval").prompt_style == "chat"
    with pytest.raises(ConfigError, match="xsum must be a block of profile smollm2-cpu"):
        require_task(demo("xsum=null"), "xsum")


# --- the hash ----------------------------------------------------------------------


def test_the_dict_survives_json():
    plain = config_as_dict(demo())
    assert json.loads(json.dumps(plain)) == plain


def test_the_hash_is_the_same_for_the_same_values():
    same = demo("sampling.temperature=0.0", "speculation.k=auto")
    assert config_hash(demo()) == config_hash(same)
    assert len(config_hash(demo())) == 16


def test_the_hash_ignores_what_changes_no_row(tmp_path):
    renamed = write(tmp_path, json.dumps({"default": "mine", "profiles": {"mine": DEMO}}))
    assert config_hash(load_config(renamed)) == config_hash(demo())
    for override in (
        "run.limit=3",
        "run.methods=[speculative]",
        "run.warmup=0",
        "humaneval.timeout_seconds=9",
        "humaneval.memory_mb=512",
        "humaneval.allow_weak_sandbox=true",
        "xsum.columns={document: document}",
    ):
        assert config_hash(demo(override)) == config_hash(demo()), override
    sampled = "sampling.temperature=1"
    assert config_hash(demo(sampled, "sampling.num_samples=2")) == config_hash(demo(sampled))


def test_the_hash_changes_with_what_changes_rows():
    overrides = (
        "models.target=other",
        "models.draft=target-layers:2",
        "models.dtype=float32",
        "models.target_quantization=int8",
        "speculation.k=4",
        "speculation.ngram_max=4",
        "speculation.model_k=2",
        "speculation.min_confidence=0.5",
        "decoding.max_new_tokens=64",
        "decoding.width=16",
        "sampling.temperature=0.5",
        "sampling.seed=1",
        "run.threads=1",
        "humaneval.prompt_style=completion",
        "xsum.columns={document: article}",
        "xsum.columns={id: null}",
    )
    hashes = {config_hash(demo(override)) for override in overrides}
    stops = ("humaneval.prompt_style=completion", 'humaneval.stop_strings=["\\ndef"]')
    hashes |= {config_hash(demo()), config_hash(demo(*stops))}
    assert len(hashes) == len(overrides) + 2


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


# --- the shipped file --------------------------------------------------------------


def test_shipped_demo_is_the_default_and_needs_no_hub():
    config = load_config(SHIPPED)
    assert config.profile == "smollm2-cpu"
    assert config.models.target == "embedded:smollm2-135m"
    assert config.models.tokenizer is None
    assert (config.models.dtype, config.models.device) == ("auto", "auto")
    assert config.decoding.bit_exact
    assert config.decoding.max_new_tokens == 256
    assert config.sampling.temperature == 0
    assert config.run.methods == ("autoregressive", "speculative")
    assert config.run.limit is None
    assert config.humaneval is not None
    assert config.humaneval.prompt_style == "chat"
    assert config.humaneval.stop_strings == ()
    assert config.xsum is not None
    assert (config.xsum.dataset, config.xsum.prompt_style) == ("embedded:articles", "chat")


def test_shipped_exp2_cpu_is_the_published_pair_for_both_experiments():
    config = load_config(SHIPPED, "qwen-coder-cpu")
    assert config.models.target == "embedded:qwen2.5-coder-1.5b"
    assert config.models.draft == "ngram+embedded:qwen2.5-coder-0.5b"
    assert (config.models.dtype, config.models.device) == ("auto", "cpu")
    assert (config.models.target_quantization, config.models.draft_quantization) == ("int8", "int8")
    assert (config.speculation.k, config.width, config.decoding.bit_exact) == ("auto", 16, True)
    assert config.sampling.temperature == 0
    assert config.humaneval is not None and config.humaneval.prompt_style == "chat"
    assert config.xsum is not None and config.xsum.dataset == "embedded:articles"


@pytest.mark.parametrize(
    "profile, dtype, quantization, is_exact",
    [("qwen-coder-t4", "float16", "int8", False), ("qwen-coder-24gb", "bfloat16", "none", True)],
)
def test_the_same_family_has_profiles_for_two_sizes_of_gpu(profile, dtype, quantization, is_exact):
    config = load_config(SHIPPED, profile)
    assert config.models.target == "Qwen/Qwen2.5-Coder-7B-Instruct"
    assert config.models.draft == "ngram+Qwen/Qwen2.5-Coder-0.5B-Instruct"
    assert (config.models.dtype, config.models.target_quantization) == (dtype, quantization)
    assert config.decoding.bit_exact == is_exact
    assert ("reference" in config.run.methods) == is_exact


def test_shipped_exp1_is_xsum_with_the_two_gpt_neos():
    config = load_config(SHIPPED, "gpt-neo-rtx3050")
    assert config.models.target == "mia-llm/gpt-neo-1.3B-xsum-roya"
    assert config.models.draft == "mia-llm/gpt-neo-125m-xsum-roya"
    assert config.models.tokenizer == "EleutherAI/gpt-neo-125m"
    assert (config.models.dtype, config.models.device) == ("float16", "cuda")
    assert (config.speculation.k, config.decoding.max_new_tokens) == (5, 256)
    assert config.sampling.temperature == 0
    assert config.humaneval is None
    assert config.xsum is not None
    assert (config.xsum.dataset, config.xsum.split) == ("EdinburghNLP/xsum", "test")
    assert config.xsum.prompt_style == "completion"
    template = "Generate a short Summary for this article: {document}"
    assert (config.xsum.prompt_template, config.xsum.num_shots) == (template, 0)


def test_shipped_exp2_is_humaneval_with_an_8_bit_target():
    config = load_config(SHIPPED, "deepseek-t4")
    assert config.models.target == "deepseek-ai/deepseek-coder-6.7b-base"
    assert config.models.draft == "deepseek-ai/deepseek-coder-1.3b-base"
    assert config.models.target_quantization == "int8"
    assert config.models.draft_quantization == "none"
    assert (config.models.dtype, config.models.device) == ("float16", "cuda")
    assert (config.speculation.k, config.decoding.max_new_tokens) == (5, 256)
    assert not config.decoding.bit_exact
    assert config.run.methods == ("autoregressive", "speculative")
    assert config.humaneval is not None
    assert config.humaneval.prompt_style == "completion"
    assert config.humaneval.stop_strings == ("\nclass", "\ndef", "\n#", "\nif", "\nprint")
