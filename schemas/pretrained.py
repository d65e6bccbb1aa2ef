"""Loading pretrained causal language models and tokenizers for both stages.

Python code of a checkpoint runs only if the caller says so. transformers would ask on the terminal.

Models are complete, and computed as their authors mean it, which transformers does not ensure. Parameters that a
checkpoint lacks get random values. An attention kernel ignores arguments that it does not know: `sdpa` leaves out the
soft-cap of Gemma 2.
"""

import copy
import json
import re
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from textwrap import shorten
from typing import Any

import torch
from huggingface_hub import try_to_load_from_cache
from safetensors import safe_open
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase
from transformers.utils import find_adapter_config_file, logging

from weighted_mtp.schemas.errors import MOST_REASON, NO_CONFIG, TokenizerError, UserError, tokenizer_errors
from weighted_mtp.schemas.storage.locations import is_missing_directory
from weighted_mtp.schemas.text import printable, shortened

PROBE_TOKENS = 16
PROBED_LAYERS = 2
"""Attention layers that are compared; models with two kinds of layers alternate them."""
LAYER = re.compile(r"(?:^|\.)(?:layers|h)\.(\d+)\.")
OLD_BUFFER = re.compile(r"rotary|inv_freq|masked_bias$|causal_mask$|(?:attn|attention)\.bias$")
"""Tensors in layers that older versions of transformers saved, and that newer ones compute."""
NATIVE_HEADS = (
    "num_nextn_predict_layers",
    "num_mtp_layers",
    "mtp_num_hidden_layers",
    "mtp_num_layers",
    "num_mtp_modules",
)
"""Config entries with the number of multi-token-prediction layers of a checkpoint."""
NATIVE_WEIGHT = re.compile(r"(?:^|\.)mtp[._]")
"""Names of weights of such layers. Not all configs announce them."""
LIMITS = (
    (re.compile(r"(?:^|_)(?:layers?|blocks|depth)$"), 1 << 10),
    (re.compile(r"(?:^|_)experts$"), 1 << 16),
    (re.compile(r"(?:size|dim|embd|heads)$"), 1 << 24),
)
"""Largest values of config entries, by their names. Thousands of layers take minutes to build, even without weights."""
MOST_TOKEN_ID = 1 << 24
"""Largest token id of a tokenizer that is loaded. transformers lists all smaller ids that no token has."""
HUB_EXPERTS = ("deepgemm", "deepgemm_megamoe", "sonicmoe")
"""Implementations of experts that transformers downloads from the Hugging Face hub."""
SHARPENING = 1000.0
"""Factor on the attention scores of a probe, without which small weights would hide a soft-cap."""


class OwnCodeError(UserError):
    """A checkpoint needs Python code of its own, which may not run."""


def check_sizes(config: Mapping[str, Any]) -> None:
    """Raise ValueError if a config, or one inside it, has more layers or larger ones than any model, or no keys."""
    if config.get("num_key_value_heads") == 0:
        raise ValueError("num_key_value_heads is 0, and at least 1 is needed")
    for name, value in config.items():
        if isinstance(value, Mapping):
            check_sizes(value)
        elif isinstance(value, int):
            most = min((limit for pattern, limit in LIMITS if pattern.search(str(name))), default=value)
            if value > most:
                raise ValueError(f"{name} is {value:,}, and at most {most:,} are possible")


def load_error(error: Exception, source: str | Path, problem: str, remedy: str) -> UserError:
    """The message for an exception of transformers while it loads something, which has any type.

    Args:
        error: the exception.
        source: local directory or Hugging Face id.
        problem: beginning of the message.
        remedy: end of the message, unless it follows from the exception.
    """
    if "trust_remote_code" in str(error):
        return OwnCodeError(f"{problem} (it needs Python code of its own); if you trust it, add --trust_remote_code")
    kind = "" if isinstance(error, OSError | ValueError) else f"{type(error).__name__}: "
    reason = shorten(kind + str(error), MOST_REASON, placeholder="...")
    if isinstance(error, ImportError):
        remedy = "install what it needs, or remove that from its config.json, such as '_attn_implementation'"
    where = "" if Path(source).is_dir() else "no such directory, and not from the Hugging Face hub: "
    return UserError(f"{problem} ({where}{reason}); {remedy}")


def load_config(name: str, source: str | Path, *, trust_remote_code: bool = False) -> Any:
    """The config of a checkpoint.

    Args:
        name: the model in messages, with its flag.
        source: local directory or Hugging Face id.
        trust_remote_code: whether Python code of the checkpoint may run.

    Raises:
        UserError: there is none, it is damaged, it needs code that may not run, or it has an adapter, with which
            transformers would combine it or load another model.
    """
    if is_missing_directory(source):
        raise UserError(f"{name}: no such directory; check the path")
    try:
        if find_adapter_config_file(str(source)):
            raise UserError(
                f"{name}: is an adapter (adapter_config.json); merge it into its base model, and save that without "
                "adapter_config.json"
            )
        if Path(source).is_dir() and not (Path(source) / "config.json").exists():
            raise UserError(f"{name}: {NO_CONFIG}")
        config = AutoConfig.from_pretrained(source, trust_remote_code=trust_remote_code)
        check_sizes(config.to_dict())
    except UserError:
        raise
    except Exception as error:
        remedy = "restore the checkpoint" if Path(source).is_dir() else "check the name and the connection"
        raise load_error(error, source, f"{name}: config.json cannot be read", remedy) from error
    if not trust_remote_code and (kernel := hub_kernel(config)):
        raise UserError(
            f"{name}: config.json wants the kernel {printable(shortened(kernel))}, which is code from the Hugging Face "
            "hub; if you trust it, add --trust_remote_code, else remove that from config.json"
        )
    return config


def hub_kernel(config: Any) -> str | None:
    """The first kernel in a config, or in one inside it, that transformers would download from the hub and run."""
    attention, experts = str(config._attn_implementation), str(config._experts_implementation)
    if "/" in attention:
        return attention
    if experts in HUB_EXPERTS:
        return experts
    parts = (getattr(config, name, None) for name in config.sub_configs)
    return next((kernel for part in parts if part is not None and (kernel := hub_kernel(part))), None)


def load_tokenizer(
    source: str | Path, problem: str, remedy: str, *, trust_remote_code: bool = False
) -> PreTrainedTokenizerBase:
    """Load a tokenizer.

    Args:
        source: local directory or Hugging Face id.
        problem: beginning of the error message.
        remedy: end of the error message.
        trust_remote_code: whether Python code in its directory may run.

    Raises:
        UserError: the tokenizer is missing, is damaged, or needs code that may not run.
    """
    if is_missing_directory(source):
        raise UserError(f"{problem} (no such directory); check the path")
    try:
        check_token_ids(Path(source) / "tokenizer.json")
        with tokenizer_errors():
            tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=trust_remote_code)
            tokenizer.decode(tokenizer("a")["input_ids"])  # some damage to its files shows only in use
    except TokenizerError as error:
        raise UserError(f"{problem} ({error.reason}); {remedy}") from error
    except Exception as error:
        raise load_error(error, source, problem, remedy) from error
    return tokenizer


def check_token_ids(file: Path) -> None:
    """Raise ValueError if a tokenizer file, which may be missing, has an id beyond `MOST_TOKEN_ID`."""
    if not file.exists():
        return
    content = json.loads(file.read_bytes())
    vocabulary = content["model"].get("vocab", {})
    ids = [*(vocabulary.values() if isinstance(vocabulary, dict) else ())]
    ids += [token["id"] for token in content.get("added_tokens") or ()]
    if max(ids, default=0) > MOST_TOKEN_ID:
        raise ValueError(f"it has the token id {max(ids):,}, and at most {MOST_TOKEN_ID:,} is possible")


def load_causal_lm(
    name: str,
    source: str | Path,
    *,
    dtype: torch.dtype,
    attention: str | None = None,
    trust_remote_code: bool = False,
) -> Any:
    """Load all weights of a causal language model, with an attention kernel that computes all of its attention.

    The shapes of its weights are compared with its config before memory is allocated.

    Args:
        name: the model in messages, with its flag.
        source: local directory or Hugging Face id.
        dtype: dtype of the parameters.
        attention: an attention implementation of transformers. None is the default of transformers, or `eager` if the
            default leaves out a part of the model.
        trust_remote_code: whether Python code of the checkpoint may run.

    Raises:
        UserError: the model lacks weights, or `attention` leaves out a part of it.
        Exception: the model cannot be loaded; see `load_error`.
    """
    # First as shapes alone, which needs no memory. Quantised models have other shapes until they are loaded.
    config = load_config(name, source, trust_remote_code=trust_remote_code)
    quantised = getattr(config, "quantization_config", None)
    for device_map in (None,) if quantised else ("meta", None):
        with quiet_transformers():
            model, report = AutoModelForCausalLM.from_pretrained(
                source,
                dtype=dtype,
                attn_implementation=attention,
                device_map=device_map,
                trust_remote_code=trust_remote_code,
                output_loading_info=True,
                ignore_mismatched_sizes=True,
            )
        check_code(name, source, model)
        check_complete(name, report, model)
    settle_attention(name, model, attention)
    check_causal(name, model)
    return model


def check_code(name: str, source: str | Path, model: Any) -> None:
    """Check that a loaded model runs the code in its directory, if it has code of its own.

    transformers keeps one model class for each config class in a process. Two models may share the code of their
    configs and differ in that of their layers.

    Raises:
        UserError: it runs that of another model.
    """
    file = Path(str(sys.modules[type(model).__module__].__file__))
    own = Path(source) / file.name
    if model.is_remote_code() and own.exists() and own.read_bytes() != file.read_bytes():
        raise UserError(
            f"{name}: another model of this process has the same config class and other code; use them in separate runs"
        )


def check_complete(name: str, report: Mapping[str, Any], model: Any) -> None:
    """Compare a checkpoint with its model, by the loading report of transformers.

    Raises:
        UserError: a parameter is missing or has another shape, there are more layers than the config says, or the
            layers do not use all of their weights.
    """
    if missing := sorted(report["missing_keys"]):
        raise UserError(f"{name}: checkpoint lacks {missing[0]}; give one with all weights of a causal LM")
    for parameter, found, expected in sorted(report["mismatched_keys"])[:1]:
        raise UserError(
            f"{name}: {parameter} has shape {tuple(found)} in the checkpoint and {tuple(expected)} by its config.json; "
            "restore the checkpoint"
        )
    prefix = f"{model.base_model_prefix}."
    modules = {part.removeprefix(prefix): module for part, module in model.named_modules()}
    layers = model.config.get_text_config().num_hidden_layers + native_heads(model.config)
    unused = []
    for parameter in sorted(report["unexpected_keys"]):
        path = parameter.removeprefix(prefix)
        found = LAYER.search(path)
        if found and int(found[1]) >= layers and path[: found.start(1) - 1] in modules:
            raise UserError(
                f"{name}: has {parameter}, but its config.json says that it has {layers} layers; restore the checkpoint"
            )
        parents = [path[: dot.start()] for dot in re.finditer(r"\.", path)]
        in_layer = found and path[: found.end(1)] in modules and not OLD_BUFFER.search(path)
        if in_layer or any(hasattr(modules.get(parent), "weight") for parent in parents):
            unused.append(parameter)
    if unused and not getattr(model.config, "quantization_config", None):
        others = f" and {len(unused) - 1} other weights" if len(unused) > 1 else ""
        raise UserError(
            f"{name}: has {unused[0]}{others}, which {type(model).__name__} does not use with its config.json; "
            "correct the config.json, or remove them from the checkpoint"
        )


def native_heads(config: Any) -> int:
    """Number of multi-token-prediction layers that a config announces. transformers does not load them."""
    return max(int(getattr(config.get_text_config(), name, None) or 0) for name in NATIVE_HEADS)


def most_positions(config: Any) -> int | None:
    """Tokens in the longest sequence that a model reads; None if unlimited, for which XLNet has -1."""
    found = getattr(config.get_text_config(), "max_position_embeddings", None)
    return found if found is not None and found > 0 else None


def native_weights(source: str | Path) -> list[str]:
    """Names of the weights of multi-token-prediction layers in the safetensors files of a loaded checkpoint.

    Args:
        source: local directory or Hugging Face id.
    """
    directory = Path(source)

    def find(file: str) -> str | None:
        path = directory / file if directory.is_dir() else try_to_load_from_cache(str(source), file)
        return str(path) if isinstance(path, str | Path) and Path(path).exists() else None

    names: list[str] = []
    if weights := find("model.safetensors"):  # transformers prefers it, too
        with safe_open(weights, "pt") as tensors:
            names = tensors.keys()
    elif index := find("model.safetensors.index.json"):
        names = json.loads(Path(index).read_bytes())["weight_map"]
    return sorted(name for name in names if NATIVE_WEIGHT.search(name))


def short_length(config: Any) -> int | None:
    """Largest length of sequences for which LongRoPE uses its short factors; None for other positions.

    The long factors change all positions of a longer sequence. transformers chooses the factors once for a batch.
    """
    parameters = getattr(config.get_text_config(), "rope_parameters", None) or {}
    of_layers = [parameters, *(value for value in parameters.values() if isinstance(value, dict))]
    longrope = [one for one in of_layers if "longrope" in (one.get("rope_type"), one.get("type"))]
    return min((one["original_max_position_embeddings"] for one in longrope), default=None)


@torch.no_grad()
def check_causal(name: str, model: Any) -> None:
    """Raise UserError if the logits of a token depend on tokens after it, as in an encoder or a diffusion model."""
    ids = torch.arange(PROBE_TOKENS, device=model.device)[None] % model.config.get_text_config().vocab_size
    changed = ids.clone()
    changed[0, -1] = ids[0, 0]
    before, after = (model(input_ids=tokens, use_cache=False).logits[0].float() for tokens in (ids, changed))
    *earlier, last = (after - before).abs().amax(-1).nan_to_num().tolist()
    # Only rounding in the experts of a mixture differs in a causal model.
    if max(earlier) > (1e-3 if model.dtype == torch.float32 else 5e-2) * last:
        raise UserError(
            f"{name}: the prediction of a token depends on later tokens; give a causal language model, and check "
            "'is_decoder' in its config.json"
        )


def settle_attention(name: str, model: Any, wanted: str | None) -> None:
    """Switch a model to eager attention if its own leaves out a part, unless that was `wanted`.

    Raises:
        UserError: the wanted implementation leaves out a part of the model.
    """
    if not drops_part(model):
        return
    if wanted is not None:
        raise UserError(
            f"{name}: {type(model).__name__} has a part, such as a soft-cap, that {wanted} attention leaves out; "
            "use eager attention"
        )
    model.set_attn_implementation("eager")


@torch.no_grad()
def drops_part(model: Any) -> bool:
    """Whether `sdpa` attention leaves out a part of a model's attention, such as a soft-cap.

    Compares the first attention layers with their eager form in float32, on sharpened scores. The other kernels of
    transformers know soft-caps and sinks.
    """
    layers = [module for module in model.modules() if isinstance(getattr(module, "scaling", None), float)]
    if model.config._attn_implementation != "sdpa" or not layers:
        return False
    ids = torch.arange(PROBE_TOKENS, device=model.device)[None] % model.config.get_text_config().vocab_size
    with recorded_calls(layers[:PROBED_LAYERS]) as calls:
        model(input_ids=ids, use_cache=False)
    return any(not same_attention(layer, *call) for layer, call in calls.items())


@contextmanager
def recorded_calls(modules: list[nn.Module]) -> Iterator[dict[nn.Module, tuple[Any, Any]]]:
    """Record the arguments of calls of the modules."""
    calls: dict[nn.Module, tuple[Any, Any]] = {}

    def record(module: nn.Module, args: Any, kwargs: Any) -> None:
        calls[module] = args, kwargs

    hooks = [module.register_forward_pre_hook(record, with_kwargs=True) for module in modules]
    try:
        yield calls
    finally:
        for hook in hooks:
            hook.remove()


def same_attention(layer: nn.Module, args: Any, kwargs: dict[str, Any]) -> bool:
    """Whether an attention layer and its eager form give the same for the arguments of a call.

    A layer with several masks, as in ZAYA, is not compared, and counts as different.
    """
    if isinstance(kwargs.get("attention_mask"), dict):
        return False
    sharp: Any = copy.deepcopy(layer).float()
    sharp.scaling *= SHARPENING
    args, kwargs = as_float32(args), as_float32(kwargs)
    own = sharp(*args, **kwargs)[0]
    sharp.config._attn_implementation = "eager"
    eager = sharp(*args, **kwargs | {"attention_mask": additive_mask(kwargs.get("attention_mask"), own)})[0]
    # NaN of damaged weights is reported where losses are computed.
    return torch.allclose(own, eager, rtol=1e-2, atol=1e-2 * float(eager.abs().nan_to_num().max()), equal_nan=True)


def additive_mask(mask: Tensor | None, like: Tensor) -> Tensor:
    """A mask for eager attention: the given one (1, 1, T, T), bool or additive, or a causal one; float32."""
    if mask is None:
        mask = torch.ones(PROBE_TOKENS, PROBE_TOKENS, dtype=torch.bool, device=like.device).tril()[None, None]
    if mask.dtype == torch.bool:
        return torch.zeros(mask.shape, device=mask.device).masked_fill(~mask, torch.finfo(torch.float32).min)
    return mask.float()


def as_float32(value: Any) -> Any:
    """Nested tuples, lists and dicts with their floating point tensors in float32."""
    if isinstance(value, dict):
        return {name: as_float32(entry) for name, entry in value.items()}
    if isinstance(value, tuple | list):
        return type(value)(map(as_float32, value))
    return value.float() if isinstance(value, Tensor) and value.is_floating_point() else value


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Switch off the progress bars and warnings of transformers, which every process would show."""
    bars, verbosity = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
