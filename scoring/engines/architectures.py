"""Properties of a model that follow from its Hugging Face config."""

from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, PreTrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES


def architectures(config: PreTrainedConfig) -> list[str]:
    """Class names of a checkpoint. If its config lists none, the causal language model of its model type."""
    return config.architectures or [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(config.model_type, config.model_type)]


def is_causal_lm(config: PreTrainedConfig) -> bool:
    """Whether a checkpoint holds a causal language model."""
    return MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(config.model_type) in architectures(config)


def is_recurrent(config: PreTrainedConfig) -> bool:
    """Whether a causal language model has a recurrent state in addition to the key-value cache."""
    return MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]._is_stateful
