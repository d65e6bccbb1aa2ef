"""The trunk: loads a Hugging Face model, finds its layers, and checks the assumptions of training."""

import copy
import inspect
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from transformers.utils import is_flash_attn_2_available

from weighted_mtp.schemas.errors import UserError, first_line
from weighted_mtp.schemas.pretrained import load_causal_lm, load_config, load_error, settle_attention, short_length
from weighted_mtp.schemas.storage.locations import local_name

LAYER_NAMES = ("layers", "h")
NORM_NAMES = ("norm", "final_layernorm", "final_layer_norm", "ln_f")
ON_GPU_ONLY = ("flex_attention", "flash_attention_2", "flash_attention_3")
"""Attention implementations of transformers that cannot train on a CPU."""


@dataclass
class LayerCall:
    """Arguments of a decoder layer call, for calling another layer with the same arguments."""

    args: Sequence[Any] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)

    @property
    def hidden_states(self) -> Tensor:
        """The layer's input (B, T, D)."""
        return self.args[0] if self.args else self.kwargs["hidden_states"]

    def run(self, layer: nn.Module, hidden_states: Tensor) -> Tensor:
        """Run `layer` on other hidden states (B, T, D) with this call's masks and positions; returns (B, T, D)."""
        kwargs = {name: value for name, value in self.kwargs.items() if name != "hidden_states"}
        output = layer(hidden_states, *self.args[1:], **kwargs)
        return output[0] if isinstance(output, tuple) else output


def load_trunk(
    name: str,
    *,
    from_scratch: bool,
    less: int = 0,
    attention: str | None = None,
    trust_remote_code: bool = False,
) -> Any:
    """Load a causal language model in float32, from its weights or from its config alone.

    Args:
        name: directory, address in an object store, or Hugging Face id.
        from_scratch: start from random weights.
        less: number of last layers to leave out from scratch.
        attention: an attention implementation of transformers; None for the default, or `eager` where that leaves out
            a part of the model.
        trust_remote_code: whether Python code of the model may run.

    Raises:
        UserError: the model cannot be loaded, lacks weights, has too few layers or some that cannot be left out, or has
            a part that `attention` leaves out.
    """
    source = local_name(name)
    settings: dict[str, Any] = {"attention": attention, "trust_remote_code": trust_remote_code}
    try:
        if not from_scratch:
            return load_causal_lm(name, source, dtype=torch.float32, **settings)
        trunk = random_trunk(name, less=less, **settings)
        settle_attention(name, trunk, attention)
        return trunk
    except UserError:
        raise
    except Exception as error:
        if isinstance(error, ImportError) and attention is not None:
            raise UserError(f"--attention {attention}: cannot be used ({first_line(error)}); choose another") from error
        hint = "give the directory or id of a causal language model"
        if not from_scratch and (Path(source) / "config.json").exists():
            hint += ", or start from its config with 'wmtp train --from_scratch true'"
        raise load_error(error, source, f"{name}: cannot load the model", hint) from error


def random_trunk(name: str, *, less: int, attention: str | None, trust_remote_code: bool) -> Any:
    """A causal language model with random weights in float32, from its config alone; see `load_trunk`."""
    config = load_config(name, local_name(name), trust_remote_code=trust_remote_code)
    if less:
        config = without_layers(config, name, less)
    return AutoModelForCausalLM.from_config(
        config, dtype=torch.float32, attn_implementation=attention, trust_remote_code=trust_remote_code
    )


def choose_attention(wanted: str, device: torch.device) -> str | None:
    """The attention implementation for `--attention wanted` on a device; None for the default of transformers.

    Raises:
        UserError: the implementation cannot train on that device.
    """
    if wanted == "auto":
        return "flash_attention_2" if device.type == "cuda" and is_flash_attn_2_available() else None
    if device.type == "cpu" and wanted in ON_GPU_ONLY:
        raise UserError(f"--attention {wanted}: trains on a GPU only; use sdpa")
    return wanted


def decoder_of(trunk: Any) -> Any:
    """The part of a trunk that returns final hidden states. transformers does not find that of all architectures."""
    found = trunk.get_decoder()
    return getattr(trunk, "model", found) if found is trunk or isinstance(found, nn.Linear) else found


def decoder_parts(trunk: Any) -> tuple[nn.ModuleList, nn.Module]:
    """The decoder layers and the final norm of a trunk.

    Raises:
        UserError: the architecture uses unknown names for them.
    """
    decoder = decoder_of(trunk)
    layers = next((getattr(decoder, name) for name in LAYER_NAMES if hasattr(decoder, name)), None)
    norm = next((getattr(decoder, name) for name in NORM_NAMES if hasattr(decoder, name)), None)
    if layers is None or norm is None:
        raise UserError(
            f"{type(decoder).__name__}: decoder layers or final norm not found; use --heads.block residual without "
            "--fsdp, --compile and --activation_checkpointing, or use another architecture"
        )
    return layers, norm


@contextmanager
def recorded_call(module: nn.Module) -> Iterator[LayerCall]:
    """Record the arguments of the next call of `module`."""
    call = LayerCall()

    def record(_: nn.Module, args: Sequence[Any], kwargs: dict[str, Any]) -> None:
        call.args, call.kwargs = args, kwargs

    hook = module.register_forward_pre_hook(record, with_kwargs=True)
    try:
        yield call
    finally:
        hook.remove()


def make_layer(trunk: Any, *, from_scratch: bool) -> nn.Module:
    """Copy the trunk's last decoder layer; `from_scratch` with random weights of its own."""
    layers, _ = decoder_parts(trunk)
    layer = copy.deepcopy(layers[-1])
    if from_scratch:
        layer.apply(trunk._init_weights)
    return layer


def without_layers(config: Any, name: str, less: int) -> Any:
    """The Hugging Face config of a model without its last layers, as the saved model will have it.

    Raises:
        UserError: too few layers remain, or the config of such a model cannot be read.
    """
    total = config.get_text_config().num_hidden_layers
    if less >= total:
        raise UserError(f"--heads.offsets: {total} layers are too few for {less} decoder heads; use fewer")
    short = copy.deepcopy(config)
    try:
        shorten_config(short.get_text_config(), total - less)
        read = type(config).from_dict(json.loads(short.to_json_string()))
    except Exception as error:  # of any type, from the code of the config
        raise UserError(
            f"{name}: {type(config).__name__} does not allow {total - less} layers besides {less} decoder heads "
            f"({first_line(error)}); use --heads.block residual"
        ) from error
    read._name_or_path = config._name_or_path  # tells where its own code is
    return read


def shorten_config(config: Any, layers: int) -> None:
    """Reduce a Hugging Face config to its first `layers` layers, and all lists with an entry for each of them."""
    total = config.num_hidden_layers
    for name, value in vars(config).items():
        if isinstance(value, list | tuple) and len(value) == total and not name.endswith("token_id"):
            setattr(config, name, value[:layers])
    if hasattr(config, "attention_types"):  # of GPT-Neo, which computes `attention_layers` from it
        config.attention_types = [[config.attention_layers, 1]]
    config.num_hidden_layers = layers


def choose_factors_by_document(trunk: Any) -> None:
    """Let LongRoPE choose its factors for each packed document; transformers chooses them by the longest of a batch."""
    if (limit := short_length(trunk.config)) is not None:
        for name, module in trunk.named_modules():
            if name.endswith("rotary_emb"):
                module.register_forward_hook(partial(_mix_factors, limit), with_kwargs=True)


def _mix_factors(limit: int, rotary: Any, args: Any, kwargs: Any, output: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
    """Cosines and sines (B, T, D) of documents of at most `limit` tokens with short factors; `output` has one kind."""
    arguments = inspect.signature(rotary.forward).bind(*args, **kwargs).arguments
    positions = arguments["position_ids"]  # (B, T)
    documents = (positions == 0).cumsum(-1)
    documents -= documents[:, :1].clone()
    lengths = torch.zeros_like(positions).scatter_reduce(-1, documents, positions + 1, "amax")
    long = lengths.gather(-1, documents)[..., None] > limit  # (B, T, 1)
    short = rotary.forward(**arguments | {"position_ids": positions.clamp(max=limit - 1)})
    return tuple(torch.where(long, *pair) for pair in zip(output, short, strict=True))


@torch.no_grad()
def check_trunk(trunk: Any, name: str) -> None:
    """Check the assumptions of training on two short artificial documents.

    Attention that needs a GPU is tested on the GPU, in a two-layer trunk of the same shape with random weights.

    Raises:
        UserError: the logits are not `hidden @ unembedding.T` (plus bias, soft-cap), or packed documents are mixed.
    """
    attention = trunk.config._attn_implementation
    if attention in ON_GPU_ONLY:
        config = copy.deepcopy(trunk.config)
        text_config = config.get_text_config()
        shorten_config(text_config, min(2, text_config.num_hidden_layers))
        trunk = type(trunk)._from_config(config, dtype=torch.bfloat16, attn_implementation=attention).cuda()
    tolerance = 1e-3 if trunk.dtype == torch.float32 else 5e-2
    training = trunk.training
    trunk.eval()
    ids = torch.arange(12, device=trunk.device)[None] % trunk.config.get_text_config().vocab_size
    positions = torch.tensor([[0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 5, 6]], device=trunk.device)
    try:
        hidden = decoder_of(trunk)(input_ids=ids, position_ids=positions, use_cache=False).last_hidden_state
        alone = decoder_of(trunk)(input_ids=ids[:, 5:], use_cache=False).last_hidden_state
        logits = trunk(input_ids=ids[:, 5:], use_cache=False).logits
        unembedding = trunk.get_output_embeddings()
        own = nn.functional.linear(alone, unembedding.weight, unembedding.bias)
    except Exception as error:  # of any type: an architecture may have other parts, or its own code raises it
        reason = f"{type(error).__name__}: {first_line(error)}"
        raise UserError(
            f"{name}: {type(trunk).__name__} does not run on packed rows ({reason}); use another architecture"
        ) from error
    if (cap := softcap(trunk)) is not None:
        own = cap * torch.tanh(own / cap)
    trunk.train(training)
    if not logits.isfinite().all():
        raise UserError(f"{name}: predicts NaN or infinity; check its weights")
    if not torch.allclose(own, logits, rtol=tolerance, atol=tolerance):
        raise UserError(
            f"{name}: the logits of {type(trunk).__name__} are not its final hidden states times the unembedding; "
            "use another architecture"
        )
    if not torch.allclose(hidden[:, 5:], alone, rtol=tolerance, atol=tolerance):
        raise UserError(
            f"{name}: {type(trunk).__name__} does not separate packed documents with {attention} attention; "
            "use another attention implementation or architecture"
        )


def softcap(trunk: Any) -> float | None:
    """The soft-cap of the architecture's logits, or None."""
    return getattr(trunk.config.get_text_config(), "final_logit_softcapping", None)


def attention_width(config: Any) -> int:
    """Total dimension of all query heads of a layer, from a Hugging Face config."""
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return config.num_attention_heads * head_dim
