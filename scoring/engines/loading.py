"""Loading a checkpoint into an engine."""

from pathlib import Path

from weighted_mtp.scoring.engines.base import Engine, EngineConfig


def load_engine(model: Path, config: EngineConfig) -> Engine:
    """Load the checkpoint in directory `model` into the engine `config.name`."""
    if config.name == "vllm":
        from weighted_mtp.scoring.engines.vllm_engine import VllmEngine

        return VllmEngine(model, config)
    from weighted_mtp.scoring.engines.transformers_engine import TransformersEngine

    return TransformersEngine(model, config)
