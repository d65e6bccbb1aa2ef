"""What learns: everything, the extra heads alone, or these and low-rank adapters of the trunk."""

from typing import Any

from peft import LoraConfig
from peft.tuners.lora import LoraLayer, LoraModel
from torch import Tensor, nn

from weighted_mtp.schemas.configs import LoRAConfig
from weighted_mtp.schemas.errors import UserError, first_line

ADAPTER = "default"


def freeze_trunk(trunk: nn.Module) -> None:
    """Let the trunk stay as it is; heads learn alone, as in the first stage of L-MTP (arXiv 2505.17505) and Medusa."""
    trunk.requires_grad_(False)


def freeze_embeddings(trunk: Any) -> None:
    """Let embeddings and unembedding stay as they are, as in direct multi-token decoding (arXiv 2510.11958)."""
    for module in (trunk.get_input_embeddings(), trunk.get_output_embeddings()):
        module.requires_grad_(False)


def add_adapters(trunk: Any, config: LoRAConfig) -> None:
    """Freeze the trunk and put low-rank adapters into it, in place (LoRA, arXiv 2106.09685).

    Raises:
        UserError: it has no modules of these names, or some that cannot have an adapter.
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
    try:
        LoraModel(trunk, settings, ADAPTER)
    except ValueError as error:
        raise UserError(f"--lora.targets {names}: {first_line(error)}; name other modules") from error
    for target in set(config.targets) - {"all-linear"}:
        if not any(isinstance(m, LoraLayer) and f".{n}".endswith(f".{target}") for n, m in trunk.named_modules()):
            raise UserError(f"--lora.targets {names}: there is no '{target}'; name other modules")
    decoder = set(trunk.get_decoder().modules())
    for name, module in trunk.named_modules():
        if isinstance(module, LoraLayer) and (module not in decoder or isinstance(module.base_layer, nn.Embedding)):
            raise UserError(f"--lora.targets {names}: {name} is no linear layer of the decoder; name other modules")


def merge_adapters(trunk: nn.Module, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The state dict of the trunk as it was before `add_adapters`, with `scale * B @ A` added to each matrix.

    Args:
        trunk: the module with adapters, which is not changed.
        state: its whole state dict.
    """
    merged = {name.replace(".base_layer.", "."): value for name, value in state.items() if ".lora_" not in name}
    layers: dict[str, Any] = {name: module for name, module in trunk.named_modules() if isinstance(module, LoraLayer)}
    for name, layer in layers.items():
        low, high = (state[f"{name}.lora_{part}.{ADAPTER}.weight"] for part in ("A", "B"))
        delta = (high.float() @ low.float()) * layer.scaling[ADAPTER]
        matrix = merged[f"{name}.weight"]
        delta = delta.T if layer.fan_in_fan_out else delta
        merged[f"{name}.weight"] = (matrix.float() + delta).to(matrix.dtype)
    return merged
