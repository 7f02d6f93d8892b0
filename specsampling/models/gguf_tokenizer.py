"""A GGUF file's tokenizer, with the splits that its header names.

A header holds a vocabulary, merges and, in `tokenizer.ggml.pre`, a name for how text is split
before it is merged. Another split gives other tokens, and the model then continues a text that
nobody wrote. So a name is looked up in `PRE_TOKENIZERS`, and one that is not there is refused.

Sources: llama.cpp's `src/llama-vocab.cpp`, which maps names to splits, and the `tokenizer.json` of
the model that the converter took each name from (`convert_hf_to_gguf_update.py`). The second
decides where they differ: llama.cpp leaves out normalisation, for example.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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

WAY_OUT = "set models.tokenizer to the model's folder or hub id"
SPACE = "\u2581"  # SentencePiece's
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


@dataclass(frozen=True)
class Splits:
    """How a byte-level tokenizer cuts text before merging.

    Attributes:
        patterns: regular expressions applied one after the other, or `EACH_DIGIT`, or `GPT2`.
        is_composed: whether text is put into Unicode's composed form (NFC) first.
        ignores_merges: whether a piece that is a token is taken whole.
        adds_begin: whether texts begin with the token of that name, if the header is silent.
    """

    patterns: tuple[str, ...]
    is_composed: bool = False
    ignores_merges: bool = False
    adds_begin: bool = False

    def pre_tokenizer(self) -> pre_tokenizers.PreTokenizer:
        """The same as an object of the `tokenizers` library."""
        steps: list[Any] = [
            pre_tokenizers.Digits(individual_digits=True)
            if pattern == EACH_DIGIT
            else pre_tokenizers.Split(Regex(pattern), behavior="isolated")
            for pattern in self.patterns
            if pattern != GPT2
        ]
        steps.append(
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=GPT2 in self.patterns)
        )
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
    """A GGUF file's tokenizer, as transformers uses it.

    Raises:
        ModelError: its header says what is not covered.
    """
    file = open_gguf(path)
    _require_covered(file)
    tokens = _tokens(file)
    kind = file.header["tokenizer.ggml.model"]
    splits = _splits(file) if kind == "gpt2" else None
    backend = _sentence_piece(file, tokens) if splits is None else _byte_level(file, tokens, splits)
    backend.add_special_tokens(_added(file, tokens, CONTROL))
    backend.add_tokens(_added(file, tokens, USER_DEFINED))
    named = {
        f"{name}_token": tokens[number]
        for name, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding"))
        if (number := file.header.get(f"tokenizer.ggml.{key}_token_id")) in tokens
    }
    _set_ends(file, backend, named, splits.adds_begin if splits else True)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **named)
    tokenizer.chat_template = file.header.get("tokenizer.chat_template")
    tokenizer.name_or_path = str(path)
    _require_same_ids(file, tokenizer, tokens)
    return tokenizer


def _require_covered(file: GgufFile) -> None:
    for key, value in file.header.items():
        if key.startswith("tokenizer.rwkv."):
            file.refuse(key, "is not read here", WAY_OUT)
        if not key.startswith("tokenizer.ggml."):
            continue
        name = key.removeprefix("tokenizer.ggml.")
        if name in READ or name.removesuffix("_token_id") in NAMES_ONLY:
            continue
        if value not in NEUTRAL.get(name, ()):
            file.refuse(key, "is not applied here", WAY_OUT)
    if file.header.get("tokenizer.ggml.model") not in ("gpt2", "llama"):
        file.refuse("tokenizer.ggml.model", "must be gpt2 or llama", WAY_OUT)


def _tokens(file: GgufFile) -> dict[int, str]:
    """Ids and tokens, without what the converter calls ids that have none: [PAD7], say."""
    written = file.header.get("tokenizer.ggml.tokens") or []
    if len(written) != len(_types(file)) or not written:
        file.refuse("tokenizer.ggml.token_type", "must be there for each token", WAY_OUT)
    tokens = {
        number: token
        for number, (token, kind) in enumerate(zip(written, _types(file)))
        if not (kind in (UNUSED, USER_DEFINED) and token == f"[PAD{number}]")
    }
    if len(set(tokens.values())) != len(tokens):
        file.refuse("tokenizer.ggml.tokens", "must not hold a token twice", WAY_OUT)
    return tokens


def _types(file: GgufFile) -> list[int]:
    return file.header.get("tokenizer.ggml.token_type") or []


def _splits(file: GgufFile) -> Splits:
    pre = file.header.get("tokenizer.ggml.pre")
    if pre not in PRE_TOKENIZERS:
        file.refuse("tokenizer.ggml.pre", f"must be one of {', '.join(PRE_TOKENIZERS)}", WAY_OUT)
    if file.header.get("tokenizer.ggml.add_space_prefix"):
        file.refuse("tokenizer.ggml.add_space_prefix", "must be false beside gpt2", WAY_OUT)
    return PRE_TOKENIZERS[pre]


def _byte_level(file: GgufFile, tokens: Mapping[int, str], splits: Splits) -> Tokenizer:
    """A tokenizer over bytes spelled as letters, as GPT-2's."""
    vocabulary = {token: number for number, token in tokens.items()}
    merges = file.header.get("tokenizer.ggml.merges")
    if not merges:
        file.refuse("tokenizer.ggml.merges", "must be there", WAY_OUT)
    backend = Tokenizer(
        models.BPE(
            vocabulary, [_pair(merge) for merge in merges], ignore_merges=splits.ignores_merges
        )
    )
    if splits.is_composed:
        backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = splits.pre_tokenizer()
    backend.decoder = decoders.ByteLevel()
    return backend


def _pair(merge: str) -> tuple[str, str]:
    """Two tokens that are joined; the first may itself be a blank."""
    first, _, second = merge[1:].partition(" ")
    return merge[0] + first, second


def _sentence_piece(file: GgufFile, tokens: Mapping[int, str]) -> Tokenizer:
    """A tokenizer over letters with bytes as a last resort, as Llama 2's.

    A blank is put before a text, and behind special tokens, as in Llama 2's tokenizer.json and in
    llama.cpp.
    """
    vocabulary = {token: number for number, token in tokens.items()}
    unknown = tokens.get(file.header.get("tokenizer.ggml.unknown_token_id", 0))
    merges = file.header.get("tokenizer.ggml.merges")
    pairs = [_pair(merge) for merge in merges] if merges else _merges_of_scores(file, tokens)
    backend = Tokenizer(
        models.BPE(vocabulary, pairs, unk_token=unknown, fuse_unk=True, byte_fallback=True)
    )
    replace = normalizers.Replace(" ", SPACE)
    has_prefix = file.header.get("tokenizer.ggml.add_space_prefix", True)
    blanks = [
        token.content for token in _added(file, tokens, USER_DEFINED) if token.content.isspace()
    ]
    if blanks and has_prefix:  # tokenizers put a blank behind such a token, SentencePiece does not
        file.refuse(
            "tokenizer.ggml.add_space_prefix", "must be false beside tokens of blanks", WAY_OUT
        )
    backend.normalizer = (
        normalizers.Sequence([normalizers.Prepend(SPACE), replace]) if has_prefix else replace
    )
    strip = [decoders.Strip(" ", 1, 0)] if has_prefix else []
    backend.decoder = decoders.Sequence(
        [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    return backend


def _merges_of_scores(file: GgufFile, tokens: Mapping[int, str]) -> list[tuple[str, str]]:
    """Merges in the order of a SentencePiece BPE vocabulary's scores: 0, -1, -2, ..."""
    scores = file.header.get("tokenizer.ggml.scores") or []
    types = _types(file)
    ranks = {
        tokens[number]: score
        for number, score in enumerate(scores)
        if number in tokens and types[number] == NORMAL
    }
    longer = [score for token, score in ranks.items() if len(token) > 1]
    if not longer or len(set(longer)) < len(longer) / 2:
        file.refuse("tokenizer.ggml.scores", "must order the tokens", WAY_OUT)
    if any(score != round(score) for score in longer):
        file.refuse("tokenizer.ggml.scores", "must be ranks, not a unigram model's", WAY_OUT)
    return generate_merges({token: number for number, token in tokens.items()}, ranks)


def _added(file: GgufFile, tokens: Mapping[int, str], kind: int) -> list[AddedToken]:
    """Tokens of one kind that are found in a text before it is split."""
    types = _types(file)
    return [
        AddedToken(token, normalized=False, special=kind == CONTROL)
        for number, token in tokens.items()
        if types[number] == kind
    ]


def _set_ends(
    file: GgufFile, backend: Tokenizer, named: Mapping[str, str], adds_begin: bool
) -> None:
    """Put tokens before and behind each text, where the header asks for it."""
    begin = file.header.get("tokenizer.ggml.add_bos_token", adds_begin)
    end = file.header.get("tokenizer.ggml.add_eos_token", False)
    for is_asked, name in ((begin, "bos"), (end, "eos")):
        if is_asked and f"{name}_token" not in named:
            file.refuse(f"tokenizer.ggml.{name}_token_id", "must name a token", WAY_OUT)
    used = [
        named[name] for name, is_asked in (("bos_token", begin), ("eos_token", end)) if is_asked
    ]
    if used:
        single = [*([named["bos_token"]] if begin else []), "$A"]
        single += [named["eos_token"]] if end else []
        backend.post_processor = processors.TemplateProcessing(
            single=single,
            special_tokens=[(token, backend.token_to_id(token)) for token in dict.fromkeys(used)],
        )


def _require_same_ids(
    file: GgufFile, tokenizer: PreTrainedTokenizerBase, tokens: Mapping[int, str]
) -> None:
    """Hold the tokenizer as it was made against the file's list."""
    made = tokenizer.get_vocab()
    if made != {token: number for number, token in tokens.items()}:
        file.refuse("tokenizer.ggml.tokens", "does not make a tokenizer of the same ids", WAY_OUT)
