"""Properties of a model that follow from its Hugging Face config."""

from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, PreTrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES


def architectures(config: PreTrainedConfig) -> list[str]:
    """Class names of a checkpoint. If its config lists none, the causal language model of its model type."""
    if isinstance(config.architectures, list) and config.architectures:
        return [str(name) for name in config.architectures]
    return [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(config.model_type, config.model_type)]


def is_causal_lm(config: PreTrainedConfig) -> bool:
    """Whether a checkpoint holds a causal language model, of transformers or with Python code of its own."""
    own = getattr(config, "auto_map", None) or {}
    return (
        MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(config.model_type) in architectures(config)
        or "AutoModelForCausalLM" in own
    )


def is_recurrent(config: PreTrainedConfig) -> bool:
    """Whether a causal language model has a recurrent state in addition to the key-value cache.

    False for a model with code of its own that has not run yet.
    """
    return type(config) in MODEL_FOR_CAUSAL_LM_MAPPING and MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]._is_stateful
