"""lm-evaluation-harness over speculative sampling: its model `specsampling`.

    python -m speculative_lm_eval --model specsampling --model_args target=NAME,k=4 --tasks gsm8k

lm-eval finds no models of other packages by itself. This command registers ours, and from there on
it is the command `lm_eval`. In Python, `import speculative_lm_eval` registers it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from lm_eval.__main__ import cli_evaluate
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils import normalize_gen_kwargs
from torch import Tensor

from specsampling import loading
from specsampling.checking import Block, ConfigError, build, mistake, nearest, shown
from specsampling.config import Config, MaxNewTokens, Temperature, TopK, TopP
from specsampling.edge import MISTAKE, one_line
from specsampling.method.sampling import Sampling
from specsampling.method.session import Session, context_limit
from specsampling.method.text import PromptError
from specsampling.method.verify import RULES
from specsampling.models.errors import ModelError, say
from specsampling.runner import source_of
from specsampling.tasks.task import StopStrings
from speculative import speculative

# The fields of config.yaml that model_args may set beside the target, and their defaults.
FIELDS: dict[str, dict[str, Any]] = {
    "models": {"draft": "ngram", "tokenizer": None, "dtype": "auto", "device": "auto"}
    | {"target_quantization": "none", "draft_quantization": "none"},
    "speculation": {"k": "auto", "model_k": 6, "min_confidence": 0.4, "verifier": "block"}
    | {"ngram_max": 3, "ngram_min": 2},
    "decoding": {"bit_exact": True, "width": 0, "compile": "auto"},
    "run": {"threads": 0},
}
# What lm-eval decides, or each request; `max_new_tokens` serves the estimate of memory.
FIXED: dict[str, dict[str, Any]] = {
    "decoding": {"max_new_tokens": 256},
    "sampling": {"temperature": 0.0, "top_k": 0, "top_p": 1.0, "seed": 0, "num_samples": 1},
    "run": {"methods": ["speculative"], "limit": None, "warmup": 0},
}
NUM_PROMPT_TOKENS = 2048  # for which memory is estimated: some examples and a question
LM_EVAL_DEVICE = "device", "cuda:0"  # what lm-eval passes if the user named no device


@dataclass(frozen=True)
class Request(Block):
    """The settings of a text, as gen_kwargs name them; 0.0 is lm-eval's greedy temperature."""

    max_gen_toks: MaxNewTokens
    until: tuple[str, ...]
    do_sample: bool
    temperature: Temperature = 0.0
    top_k: TopK = 0
    top_p: TopP = 1.0

    @classmethod
    def of(cls, gen_kwargs: Mapping[str, Any]) -> Request:
        """Check gen_kwargs; a ConfigError names what is unknown or out of range."""
        try:
            values = dict(normalize_gen_kwargs(dict(gen_kwargs)))
        except (TypeError, ValueError) as error:
            raise mistake("gen_kwargs", "numbers where numbers are due", error) from None
        try:
            request: Request = build(cls, values)
        except ConfigError as error:
            raise ConfigError(f"gen_kwargs.{error}") from None
        if request.do_sample and not request.temperature:
            raise mistake("gen_kwargs.temperature", "above 0 for do_sample: true", 0, "set it")
        return request


@register_model("specsampling")
class SpecSampling(HFLM):
    """lm-eval's own `hf` model, with texts from the speculative decoder.

    Prompts, the ends of texts and log-likelihoods follow the rules of `hf`.
    """

    def __init__(self, batch_size: int | str = 1, **model_args: Any):
        """Load a pair; `FIELDS` names the `model_args`.

        Raises:
            ConfigError: a key is unknown or missing, or a value is out of range.
            ModelError: a model cannot be loaded.
        """
        if str(batch_size) != "1":
            raise mistake("batch_size", "1: a text at a time", shown(batch_size), "leave it out")
        config = _config(model_args)
        _, planned = loading.outline_models(config)
        device_map, _ = loading.settle_memory(config, planned, NUM_PROMPT_TOKENS)
        pair = loading.load_configured_pair(config, device_map)
        loading.self_check(config, pair, NUM_PROMPT_TOKENS)
        super().__init__(
            pair.target,
            backend="causal",
            tokenizer=pair.tokenizer,
            max_length=context_limit(pair.target),
            softmax_dtype="float32",
        )
        named, chosen = pair.target.generation_config.eos_token_id, config.speculation
        ends = {*(named if isinstance(named, list) else [named]), self.eot_token_id} - {None}
        self._decode = partial(
            speculative,
            pair.target,
            loading.load_drafts(config, pair)["", chosen.k == "auto"],
            k=config.largest_k,
            width=config.call_width,
            verifier=RULES[chosen.verifier],
            eos_ids=ends,  # those of `hf`, so that scores can be compared
        )
        self._has_noise = chosen.verifier == "coupled"
        self._num_texts, self._costs = Counter[str](), Counter[str]()  # by prompt; of all texts

    @classmethod
    def create_from_arg_obj(
        cls, arg_dict: dict[str, Any], additional_config: dict[str, Any] | None = None
    ) -> SpecSampling:
        """Load a pair; what `model_args` say wins over lm-eval's options."""
        given = (additional_config or {}).items()
        options = {k: v for k, v in given if v is not None and (k, v) != LM_EVAL_DEVICE}
        return cls(**options | arg_dict)

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Decode texts. The settings of all are checked before the first is decoded."""
        for request in requests:
            num_tokens = Request.of(request.args[1]).max_gen_toks
            if num_tokens >= self.max_length:
                rule = f"below the target's context of {self.max_length} tokens"
                raise mistake("gen_kwargs.max_gen_toks", rule, num_tokens, "lower it")
        return super().generate_until(requests, disable_tqdm)

    def _model_generate(
        self, context: Tensor, max_length: int, stop: list[str], **gen_kwargs: Any
    ) -> Tensor:
        """Continue one prompt, [1, n] -> [1, n + m], to a stop string or `max_length` tokens."""
        del gen_kwargs["attention_mask"]  # ones, for there is one prompt
        (prompt,) = context.tolist()
        request, show = Request.of(gen_kwargs), partial(self.tok_decode, skip_special_tokens=False)
        name, seed = str(prompt), torch.initial_seed()  # lm-eval has set the seed
        source = source_of(self.device, seed, name, "", self._num_texts[name], self._has_noise)
        self._num_texts[name] += 1
        generation = self._decode(
            prompt,
            max_new_tokens=max_length - len(prompt),
            sampling=Sampling(request.temperature, request.top_k, request.top_p),
            generator=source,
            is_stop=StopStrings(stop, show),
        )
        if generation.error:
            raise ModelError(f"{generation.error}; choose another dtype")
        self._costs.update(
            num_new_tokens=len(generation.token_ids),
            target_calls=generation.target_calls,
            drafted=sum(generation.drafted),
            accepted=sum(generation.accepted),
        )
        return torch.tensor([prompt + generation.token_ids])

    def _model_call(self, inps: Tensor) -> Tensor:
        """Return the target's logits, [1, n] -> [1, n, V]."""
        (ids,) = inps.tolist()
        return Session(self.model, len(ids)).score(ids, last=len(ids))[None]

    def get_model_info(self) -> dict[str, Any]:
        """Tell what all texts cost; lm-eval writes it into its results."""
        return super().get_model_info() | self._costs


def _config(model_args: Mapping[str, Any]) -> Config:
    """Return the configuration of `model_args`, whose keys are fields without their block."""
    blocks = {name: FIELDS.get(name, {}) | FIXED.get(name, {}) for name in FIELDS | FIXED}
    places = {"target": "models"} | {key: name for name in FIELDS for key in FIELDS[name]}
    for key, value in model_args.items():
        if key not in places:
            way_out = nearest(key, places) or f"the keys are {', '.join(places)}"
            raise ConfigError(f"model_args: {key} is not a known key; {way_out}")
        blocks[places[key]][key] = value
    return build(Config, {"profile": "lm-eval", **blocks})


def main() -> int:
    """Run lm-eval's command line; a user's mistake is one line and exit code 2."""
    try:
        cli_evaluate()
    except (ConfigError, ModelError, PromptError) as error:
        say(f"error: {one_line(str(error))}")
        return MISTAKE
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
