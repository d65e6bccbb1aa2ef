"""Selects the trainable parameters: all, the extra heads, or the heads and low-rank adapters (LoRA)."""

from typing import Any

from peft import LoraConfig
from peft.tuners.lora import LoraLayer, LoraModel
from torch import Tensor, nn

from weighted_mtp.schemas.configs import LoRAConfig, TrainConfig
from weighted_mtp.schemas.errors import UserError, first_line
from weighted_mtp.training.model.trunk import decoder_of

ADAPTER = "default"


def select_trainable(trunk: Any, config: TrainConfig) -> None:
    """Freeze the parameters of a trunk that are not trainable under `config`, and add adapters if configured.

    Raises:
        UserError: adapters cannot be added.
    """
    freeze_unused(trunk)
    if config.trainable == "heads":
        freeze_trunk(trunk)
    elif config.trainable == "lora":
        add_adapters(trunk, config.lora)
    if config.heads.dmtd.cycle > 1 and not config.from_scratch:
        freeze_embeddings(trunk)


def freeze_unused(trunk: Any) -> None:
    """Freeze what text does not pass through, such as a vision tower: processes would wait for its gradients."""
    used = {*decoder_of(trunk).parameters(), *trunk.get_output_embeddings().parameters()}
    for parameter in set(trunk.parameters()) - used:
        parameter.requires_grad_(False)


def freeze_trunk(trunk: nn.Module) -> None:
    """Freeze the trunk and train only heads, as in the first stage of L-MTP (arXiv 2505.17505) and in Medusa."""
    trunk.requires_grad_(False)


def freeze_embeddings(trunk: Any) -> None:
    """Freeze embeddings and unembedding, as in direct multi-token decoding (arXiv 2510.11958)."""
    for module in (trunk.get_input_embeddings(), trunk.get_output_embeddings()):
        module.requires_grad_(False)


def add_adapters(trunk: Any, config: LoRAConfig) -> None:
    """Freeze the trunk and add low-rank adapters in place (LoRA, arXiv 2106.09685).

    Raises:
        UserError: the trunk has no modules of these names, or some do not support adapters.
    """
    targets = "all-linear" if config.targets == ("all-linear",) else list(config.targets)
    settings = LoraConfig(
        r=config.rank,
        lora_alpha=config.alpha,
        lora_dropout=config.dropout,
        target_modules=targets,
        task_type="CAUSAL_LM",
    )
    names = ",".join(config.targets)
    decoder = decoder_of(trunk)
    freeze_trunk(trunk)
    try:
        LoraModel(decoder, settings, ADAPTER)
    except ValueError as error:
        raise UserError(f"--lora.targets {names}: {first_line(error)}; name other modules") from error
    for target in set(config.targets) - {"all-linear"}:
        if not any(isinstance(m, LoraLayer) and f".{n}".endswith(f".{target}") for n, m in decoder.named_modules()):
            raise UserError(f"--lora.targets {names}: no module of the layers is named '{target}'; name other modules")
    for name, module in decoder.named_modules():
        if isinstance(module, LoraLayer) and isinstance(module.base_layer, nn.Embedding):
            raise UserError(f"--lora.targets {names}: {name} is not a linear layer; name other modules")


def merge_adapters(trunk: nn.Module, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Merge adapters: return a state dict with the original names and `scale * B @ A` added to each matrix.

    Args:
        trunk: the module with adapters, left unchanged.
        state: its whole state dict.
    """
    merged = {name.replace(".base_layer.", "."): value for name, value in state.items() if ".lora_" not in name}
    layers: dict[str, Any] = {name: module for name, module in trunk.named_modules() if isinstance(module, LoraLayer)}
    for name, layer in layers.items():
        a, b = (state[f"{name}.lora_{factor}.{ADAPTER}.weight"] for factor in ("A", "B"))
        delta = (b.float() @ a.float()) * layer.scaling[ADAPTER]
        matrix = merged[f"{name}.weight"]
        delta = delta.T if layer.fan_in_fan_out else delta
        merged[f"{name}.weight"] = (matrix.float() + delta).to(matrix.dtype)
    return merged
