#!/usr/bin/env bash
# transformers 5.23.0 loads an fp8 checkpoint on a CPU in two types, whatever type was asked for.
#
# On a machine without a GPU, `quant_method: fp8` is dequantised while it is read. With
# dtype=torch.bfloat16 the matrices that had scales come in bfloat16, and all that was stored without
# scales keeps the file's own type, float32 here. The first product of both raises an error. Without
# a quantisation, the same dtype turns all of the weights into bfloat16.
#
# Exits 0 while that is so, 1 once it has changed, 2 where there is a GPU.
set -euo pipefail
work="$(mktemp -d)"
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet torch==2.13.0 transformers==5.23.0 accelerate==1.15.0
cd "$work"
"$work/venv/bin/python" - <<'PYTHON' 2>/dev/null
import json
import pathlib
import sys
from collections import Counter

import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig

if torch.cuda.is_available():
    sys.exit(2)
torch.manual_seed(0)
config = LlamaConfig(vocab_size=300, hidden_size=64, intermediate_size=96, num_hidden_layers=1,
                     num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=128)
AutoModelForCausalLM.from_config(config).save_pretrained("model")
plain = AutoModelForCausalLM.from_pretrained("model", dtype=torch.bfloat16)

path = pathlib.Path("model/model.safetensors")
stored = {}
for name, tensor in load_file(path).items():
    stored[name] = tensor
    if "_proj" in name:
        scale = tensor.abs().max() / 448
        stored[name] = (tensor / scale).to(torch.float8_e4m3fn)
        stored[name + "_scale_inv"] = scale.reshape(1, 1)
save_file(stored, path, metadata={"format": "pt"})
settings = json.loads(pathlib.Path("model/config.json").read_text())
settings["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [128, 128]}
pathlib.Path("model/config.json").write_text(json.dumps(settings))
loaded = AutoModelForCausalLM.from_pretrained("model", dtype=torch.bfloat16)

kinds = [dict(Counter(str(p.dtype) for p in model.parameters())) for model in (plain, loaded)]
try:
    loaded(input_ids=torch.tensor([[1, 2, 3]]))
    says = "a forward pass works"
except RuntimeError as error:
    says = f"a forward pass raises: {error}"
print("transformers", transformers.__version__, "dtype=torch.bfloat16 on a CPU")
print("plain checkpoint:", kinds[0])
print("fp8 checkpoint:  ", kinds[1])
print(says)
sys.exit(0 if len(kinds[0]) == 1 and len(kinds[1]) == 2 and "raises" in says else 1)
PYTHON
