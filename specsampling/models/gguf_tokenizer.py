"""Makes a GGUF file's tokenizer, with the splits that its header names.

A header holds a vocabulary, merges and, in `tokenizer.ggml.pre`, a name for how text is split
before it is merged. Other splits give other tokens, which the model would continue badly. So a
name that is not in `PRE_TOKENIZERS` is refused.

Sources: llama.cpp's `src/llama-vocab.cpp`, which maps names to splits, and the `tokenizer.json` of
the model that the converter took each name from (`convert_hf_to_gguf_update.py`). If the two
differ, the second decides: llama.cpp leaves out normalisation, for example.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
)
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast
from transformers.tokenization_utils_base import generate_merges

from specsampling.models.gguf_file import GgufFile, open_gguf

GGML = "tokenizer.ggml."
WAY_OUT = "set models.tokenizer to the model's folder or hub id"
SPACE = "\u2581"  # SentencePiece's blank
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)  # gguf.TokenType

CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
BLANKS = r"\s*[\r\n]+|\s+(?!\S)|\s+"
UPPER, LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
CASED = rf"[^\r\n\p{{L}}\p{{N}}]?{UPPER}*{LOWER}+", rf"[^\r\n\p{{L}}\p{{N}}]?{UPPER}+{LOWER}*"
CL100K = rf"{CONTRACTIONS}|{WORDS}|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{BLANKS}"
QWEN2 = rf"{CONTRACTIONS}|{WORDS}|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{BLANKS}"
TEKKEN = rf"{CASED[0]}|{CASED[1]}|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{BLANKS}"
O200K = (
    rf"{CASED[0]}{CONTRACTIONS}?|{CASED[1]}{CONTRACTIONS}?|\p{{N}}{{1,3}}"
    rf"| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{BLANKS}"
)
DEEPSEEK_V3 = (
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
    rf"| ?[\p{{P}}\p{{S}}]+[\r\n]*|{BLANKS}"
)
DEEPSEEK_CJK = "[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+"
GPT2 = ""  # `ByteLevel`'s own expression
EACH_DIGIT = "digits"  # `Digits(individual_digits=True)`


class Splits(NamedTuple):
    """The way in which a byte-level tokenizer cuts text before merging."""

    patterns: tuple[str, ...]  # expressions applied one after the other, `EACH_DIGIT` or `GPT2`
    is_composed: bool = False  # whether text is put into Unicode's composed form (NFC) first
    ignores_merges: bool = False  # whether a piece that is a token is taken whole
    adds_begin: bool = False  # whether texts begin with the "bos" token, if the header is silent

    def pre_tokenizer(self) -> pre_tokenizers.PreTokenizer:
        """Make the splits as an object of the `tokenizers` library."""
        steps: list[Any] = [
            pre_tokenizers.Digits(individual_digits=True)
            if pattern == EACH_DIGIT
            else pre_tokenizers.Split(Regex(pattern), behavior="isolated")
            for pattern in self.patterns
            if pattern != GPT2
        ]
        use_regex = GPT2 in self.patterns
        steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=use_regex))
        return pre_tokenizers.Sequence(steps) if len(steps) > 1 else steps[0]


LLAMA3_SPLITS = Splits((CL100K,), ignores_merges=True, adds_begin=True)
DIGITS_SPLITS = Splits((EACH_DIGIT, GPT2))

# tokenizer.ggml.pre -> splits, with the model whose tokenizer.json has them.
PRE_TOKENIZERS = {
    "gpt-2": Splits((GPT2,)),  # openai-community/gpt2
    "phi-2": Splits((GPT2,)),  # microsoft/phi-2
    "mpt": Splits((GPT2,), is_composed=True),  # mosaicml/mpt-7b
    "olmo": Splits((GPT2,), is_composed=True),  # allenai/OLMo-1.7-7B-hf
    "smollm": DIGITS_SPLITS,  # HuggingFaceTB/SmolLM-135M
    "starcoder": DIGITS_SPLITS,  # bigcode/starcoder2-3b
    "refact": DIGITS_SPLITS,  # smallcloudai/Refact-1_6-base
    "llama-bpe": LLAMA3_SPLITS,  # meta-llama/Meta-Llama-3-8B
    "llama3": LLAMA3_SPLITS,
    "llama-v3": LLAMA3_SPLITS,
    "dbrx": Splits((CL100K,)),  # databricks/dbrx-base
    "smaug-bpe": Splits((CL100K,)),  # abacusai/Smaug-Llama-3-70B-Instruct
    "qwen2": Splits((QWEN2,), is_composed=True),  # Qwen/Qwen1.5-7B
    "tekken": Splits((TEKKEN,), ignores_merges=True, adds_begin=True),  # mistralai/Mistral-Nemo
    "gpt-4o": Splits((O200K,)),  # Xenova/gpt-4o
    "deepseek-coder": Splits(  # deepseek-ai/deepseek-coder-6.7b-base
        ("[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", DEEPSEEK_CJK, EACH_DIGIT)
    ),
    "deepseek-v3": Splits(  # deepseek-ai/DeepSeek-V3
        (r"\p{N}{1,3}", "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+", DEEPSEEK_V3)
    ),
}

# Keys under tokenizer.ggml that are read, or that change no token of a prompt.
READ = (
    *("model", "pre", "tokens", "token_type", "merges", "scores"),
    *("add_bos_token", "add_eos_token", "add_space_prefix"),
)
NAMES_ONLY = (
    *("bos", "eos", "eot", "eom", "unknown", "seperator", "padding", "mask", "cls"),
    *("prefix", "suffix", "middle"),
    *("fim_pre", "fim_suf", "fim_mid", "fim_pad", "fim_rep", "fim_sep"),
)
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "add_sep_token": (False,),
    "remove_extra_whitespaces": (False,),
    "token_type_count": (0, 1),
    "suppress_tokens": ([],),
}


def gguf_tokenizer(path: Path) -> PreTrainedTokenizerBase:
    """Make a GGUF file's tokenizer. A ModelError names what of its header is not covered."""
    file = open_gguf(path)
    _require_covered(file)
    tokens = _tokens(file)
    vocabulary = {token: number for number, token in tokens.items()}
    types = _value(file, "token_type")
    control, defined = (  # tokens that are found in a text before it is split
        [
            AddedToken(token, normalized=False, special=kind == CONTROL)
            for number, token in tokens.items()
            if types[number] == kind
        ]
        for kind in (CONTROL, USER_DEFINED)
    )
    adds_begin = True
    if _value(file, "model") == "gpt2":
        splits = _splits(file)
        adds_begin = splits.adds_begin
        backend = _byte_level(file, vocabulary, splits)
    else:
        has_blanks = any(token.content.isspace() for token in defined)
        backend = _sentence_piece(file, vocabulary, tokens, has_blanks)
    backend.add_special_tokens(control)
    backend.add_tokens(defined)
    named = {
        f"{name}_token": tokens[number]
        for name, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding"))
        if (number := _value(file, f"{key}_token_id")) in tokens
    }
    _set_ends(file, backend, named, adds_begin)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **named)
    tokenizer.chat_template = file.header.get("tokenizer.chat_template")
    tokenizer.name_or_path = str(path)
    if tokenizer.get_vocab() != vocabulary:
        _refuse(file, "tokens", "does not make a tokenizer of the same ids")
    return tokenizer


def _value(file: GgufFile, name: str, default: Any = None) -> Any:
    return file.header.get(GGML + name, default)


def _refuse(file: GgufFile, name: str, rule: str) -> NoReturn:
    file.refuse(GGML + name, rule, WAY_OUT)


def _require_covered(file: GgufFile) -> None:
    for key, value in file.header.items():
        if key.startswith("tokenizer.rwkv."):
            file.refuse(key, "is not read here", WAY_OUT)
        name = key.removeprefix(GGML)
        if name == key or name in READ or name.removesuffix("_token_id") in NAMES_ONLY:
            continue
        if value not in NEUTRAL.get(name, ()):
            _refuse(file, name, "is not applied here")
    if _value(file, "model") not in ("gpt2", "llama"):
        _refuse(file, "model", "must be gpt2 or llama")


def _tokens(file: GgufFile) -> dict[int, str]:
    """Map ids to tokens, without the converter's names of unused ids, such as [PAD7]."""
    written, types = _value(file, "tokens") or [], _value(file, "token_type") or []
    if len(written) != len(types) or not written:
        _refuse(file, "token_type", "must be there for each token")
    tokens = {
        number: token
        for number, (token, kind) in enumerate(zip(written, types))
        if not (kind in (UNUSED, USER_DEFINED) and token == f"[PAD{number}]")
    }
    if len(set(tokens.values())) != len(tokens):
        _refuse(file, "tokens", "must not hold a token twice")
    return tokens


def _splits(file: GgufFile) -> Splits:
    pre = _value(file, "pre")
    if pre not in PRE_TOKENIZERS:
        _refuse(file, "pre", f"must be one of {', '.join(PRE_TOKENIZERS)}")
    if _value(file, "add_space_prefix"):
        _refuse(file, "add_space_prefix", "must be false beside gpt2")
    return PRE_TOKENIZERS[pre]


def _byte_level(file: GgufFile, vocabulary: dict[str, int], splits: Splits) -> Tokenizer:
    """Make a tokenizer over bytes spelled as letters, like GPT-2's."""
    merges = _merges(file)
    if not merges:
        _refuse(file, "merges", "must be there")
    backend = Tokenizer(models.BPE(vocabulary, merges, ignore_merges=splits.ignores_merges))
    if splits.is_composed:
        backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = splits.pre_tokenizer()
    backend.decoder = decoders.ByteLevel()
    return backend


def _merges(file: GgufFile) -> list[tuple[str, str]]:
    """List the pairs of tokens that are joined. The first of a pair may be a blank."""
    ends = ((merge, merge.index(" ", 1)) for merge in _value(file, "merges") or ())
    return [(merge[:end], merge[end + 1 :]) for merge, end in ends]


def _sentence_piece(
    file: GgufFile, vocabulary: dict[str, int], tokens: dict[int, str], has_blanks: bool
) -> Tokenizer:
    """Make a tokenizer over letters with bytes as a last resort, like Llama 2's.

    A blank is put before a text and behind special tokens, as in llama.cpp.
    """
    unknown = tokens.get(_value(file, "unknown_token_id", 0))
    merges = _merges(file) or _merges_of_scores(file, vocabulary)
    backend = Tokenizer(
        models.BPE(vocabulary, merges, unk_token=unknown, fuse_unk=True, byte_fallback=True)
    )
    has_prefix = _value(file, "add_space_prefix", True)
    if has_blanks and has_prefix:  # only `tokenizers` puts a blank behind tokens of blanks
        _refuse(file, "add_space_prefix", "must be false beside tokens of blanks")
    prepend = [normalizers.Prepend(SPACE)] if has_prefix else []
    backend.normalizer = normalizers.Sequence([*prepend, normalizers.Replace(" ", SPACE)])
    strip = [decoders.Strip(" ", 1, 0)] if has_prefix else []
    backend.decoder = decoders.Sequence(
        [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    return backend


def _merges_of_scores(file: GgufFile, vocabulary: dict[str, int]) -> list[tuple[str, str]]:
    """List merges in the order of a SentencePiece BPE vocabulary's scores: 0, -1, -2, ..."""
    scores, types = _value(file, "scores") or [], _value(file, "token_type")
    ranks = {
        token: scores[number]
        for token, number in vocabulary.items()
        if number < len(scores) and types[number] == NORMAL
    }
    longer = [score for token, score in ranks.items() if len(token) > 1]
    if not longer or len(set(longer)) < len(longer) / 2:
        _refuse(file, "scores", "must order the tokens")
    if any(score != round(score) for score in longer):
        _refuse(file, "scores", "must be ranks, not a unigram model's")
    return generate_merges(vocabulary, ranks)


def _set_ends(
    file: GgufFile, backend: Tokenizer, named: Mapping[str, str], adds_begin: bool
) -> None:
    """Put tokens before and behind each text, if the header asks for them."""
    ends: list[list[str]] = []
    for name, is_usual in (("bos", adds_begin), ("eos", False)):
        is_asked = _value(file, f"add_{name}_token", is_usual)
        if is_asked and f"{name}_token" not in named:
            _refuse(file, f"{name}_token_id", "must name a token")
        ends.append([named[f"{name}_token"]] if is_asked else [])
    first, last = ends
    if first or last:
        backend.post_processor = processors.TemplateProcessing(
            single=[*first, "$A", *last],
            special_tokens=[
                (token, backend.token_to_id(token)) for token in sorted({*first, *last})
            ],
        )
