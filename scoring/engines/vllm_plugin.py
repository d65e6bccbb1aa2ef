"""The vLLM plugin that makes an engine return token losses. vLLM calls `register` in each of its processes.

The environment variable `WMTP_SCORE_TOKENS` lists architectures. The plugin replaces their classes in vLLM's registry
by classes that compute token losses inside the engine (see `scoring.engines.vllm_scorer`). The plugin is installed for
every use of vLLM in an environment, so without the variable it does nothing and imports nothing.
"""

import os

SCORE_TOKENS = "WMTP_SCORE_TOKENS"
TRANSFORMERS_BACKEND = ("TransformersForCausalLM", "TransformersMoEForCausalLM")
"""vLLM runs these for architectures without a vLLM class, or if `model_impl` selects them."""


def register() -> None:
    """Entry point of the group `vllm.general_plugins`; may be called any number of times."""
    if not (architectures := os.environ.get(SCORE_TOKENS)):
        return
    from vllm.model_executor.models import ModelRegistry

    from weighted_mtp.scoring.engines.vllm_scorer import scoring_class

    for name in ModelRegistry.models.keys() & {*architectures.split(","), *TRANSFORMERS_BACKEND}:
        model_class = ModelRegistry.models[name].load_model_cls()
        ModelRegistry.register_model(name, scoring_class(model_class))
