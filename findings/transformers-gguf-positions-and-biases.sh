#!/usr/bin/env bash
# transformers 5.23.0 loads a llama GGUF file without its scaled positions and its biases.
#
# A tiny llama is written twice: as a folder, and as the GGUF file that llama.cpp's converter writes
# for it. Its positions are stretched by 4 (`llama.rope.scaling.type` linear, as for DeepSeek-Coder)
# and its attention has biases. Loaded from the file, the configuration has plain positions and no
# biases, the loading report is empty, and the logits are those of another model.
#
# Exits 0 while that is so, 1 once it has changed.
set -euo pipefail
work="$(mktemp -d)"
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet torch==2.13.0 transformers==5.23.0 gguf==0.19.0 accelerate==1.15.0
cd "$work"
"$work/venv/bin/python" - <<'PYTHON' 2>/dev/null
import sys

import gguf
import torch
import transformers
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

torch.manual_seed(0)
sizes = dict(vocab_size=300, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
             num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=512)
scaled = {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0}
config = LlamaConfig(**sizes, attention_bias=True, rope_parameters=scaled, initializer_range=0.2)
model = LlamaForCausalLM(config).eval()
for name, parameter in model.named_parameters():
    if name.endswith("bias"):
        torch.nn.init.normal_(parameter, std=0.2)

writer = gguf.GGUFWriter("model.gguf", "llama")
writer.add_block_count(2)
writer.add_context_length(512)
writer.add_embedding_length(64)
writer.add_feed_forward_length(96)
writer.add_head_count(4)
writer.add_head_count_kv(4)
writer.add_layer_norm_rms_eps(config.rms_norm_eps)
writer.add_vocab_size(300)
writer.add_rope_dimension_count(16)
writer.add_rope_freq_base(10000.0)
writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
writer.add_rope_scaling_factor(4.0)
writer.add_tokenizer_model("gpt2")
writer.add_token_list([f"t{number}" for number in range(300)])
names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 2)
for name, tensor in model.state_dict().items():
    stem, _, suffix = name.rpartition(".")
    if ".q_proj." in name or ".k_proj." in name:  # the converter's order of a head's rows
        tensor = tensor.reshape(4, 2, 8, *tensor.shape[1:]).swapaxes(1, 2).reshape(tensor.shape)
    writer.add_tensor(f"{names.get_name(stem)}.{suffix}", tensor.contiguous().numpy())
writer.write_header_to_file()
writer.write_kv_data_to_file()
writer.write_tensors_to_file()
writer.close()

loaded, report = AutoModelForCausalLM.from_pretrained(
    ".", gguf_file="model.gguf", dtype=torch.float32, output_loading_info=True
)
tokens = torch.randint(300, (1, 200), generator=torch.Generator().manual_seed(1))
with torch.inference_mode():
    expected, found = (one(input_ids=tokens).logits for one in (model, loaded))
away = float((found - expected).norm() / expected.norm())
print("transformers", transformers.__version__, "gguf file with linear positions and biases")
print("positions:", loaded.config.rope_parameters, "biases:", loaded.config.attention_bias)
print("report:", {name: len(found) for name, found in report.items()})
print(f"logits: {away:.2f} away from the folder's, relative to their norm")
is_silent = not any(report.values()) and loaded.config.rope_parameters["rope_type"] == "default"
sys.exit(0 if is_silent and away > 0.5 else 1)
PYTHON
