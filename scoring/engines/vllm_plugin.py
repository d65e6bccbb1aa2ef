"""The vLLM plugin that lets an engine return token losses; vLLM calls `register` in each of its processes.

The environment variable `WMTP_SCORE_TOKENS` names the architectures to replace in vLLM's registry, under their own
names, by classes that compute token losses inside the engine (see `scoring.engines.vllm_scorer`). Where it is not set
the plugin does nothing: it is installed for all uses of vLLM in an environment.
"""

import os

SCORE_TOKENS = "WMTP_SCORE_TOKENS"
TRANSFORMERS_BACKEND = ("TransformersForCausalLM", "TransformersMoEForCausalLM")
"""What vLLM runs an architecture with that it has no class of its own for, or is told to run any with."""


def register() -> None:
    """Entry point of the group `vllm.general_plugins`; may be called any number of times."""
    if not (wanted := os.environ.get(SCORE_TOKENS)):
        return
    from vllm.model_executor.models import ModelRegistry

    from weighted_mtp.scoring.engines.vllm_scorer import scoring_class

    for name in ModelRegistry.models.keys() & {*wanted.split(","), *TRANSFORMERS_BACKEND}:
        model_class = ModelRegistry.models[name].load_model_cls()
        ModelRegistry.register_model(name, scoring_class(model_class))
