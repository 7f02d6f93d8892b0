#!/usr/bin/env bash
# transformers 5.23.0 replaces the splits of tokenizer.json by those of a class.
#
# A folder of SmolLM2's and StarCoder2's layout: tokenizer.json cuts each digit off before GPT-2's
# splits, and tokenizer_config.json names GPT2Tokenizer. AutoTokenizer keeps the vocabulary and the
# merges and drops the digits' split, so that numbers get other tokens than the file says.
#
# Exits 0 while that is so, 1 once it has changed.
set -euo pipefail
work="$(mktemp -d)"
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet transformers==5.23.0 tokenizers==0.23.3
cd "$work"
"$work/venv/bin/python" - <<'PYTHON' 2>/dev/null
import json
import pathlib
import sys

import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer

tokenizer = Tokenizer(models.BPE())
tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
    [
        pre_tokenizers.Digits(individual_digits=True),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
    ]
)
tokenizer.decoder = decoders.ByteLevel()
trainer = trainers.BpeTrainer(
    vocab_size=320, special_tokens=["<|endoftext|>"], show_progress=False,
    initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
)
text = "numbers = [\n    1,\n    22]\n"
tokenizer.train_from_iterator([text * 50], trainer)
folder = pathlib.Path("model")
folder.mkdir()
tokenizer.save(str(folder / "tokenizer.json"))
(folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "GPT2Tokenizer"}))
(folder / "config.json").write_text(json.dumps({"model_type": "llama"}))

loaded = AutoTokenizer.from_pretrained(folder)
written = tokenizer.encode(text).tokens
found = loaded.convert_ids_to_tokens(loaded(text)["input_ids"])
print("transformers", transformers.__version__, type(loaded).__name__)
print("tokenizer.json:", written)
print("AutoTokenizer: ", found)
print("its splits:", loaded.backend_tokenizer.pre_tokenizer)
sys.exit(0 if found != written else 1)
PYTHON
