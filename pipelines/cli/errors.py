"""Exceptions as one line each, and libraries that stay silent unless the user is debugging."""

import errno
import os
import warnings

from weighted_mtp.pipelines.cli.store_errors import is_store_error, store_sentence
from weighted_mtp.pipelines.cli.usage import one_line
from weighted_mtp.schemas.configs import Config
from weighted_mtp.schemas.errors import UserError

QUIET = {
    "ACCELERATE_LOG_LEVEL": "ERROR",
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "PYTHONWARNINGS": "ignore",
    "TOKENIZERS_PARALLELISM": "false",
    "TRANSFORMERS_VERBOSITY": "error",
    "VLLM_LOGGING_LEVEL": "ERROR",
}
REMEDIES = {
    errno.ENOSPC: "free some space and rerun the same command",
    errno.EDQUOT: "free some space and rerun the same command",
    errno.EACCES: "change the permissions or choose another path",
    errno.EPERM: "change the permissions or choose another path",
    errno.EROFS: "choose a path that can be written",
    errno.ENOENT: "check the path",
    errno.EISDIR: "name a file instead of a directory",
    errno.ENOTDIR: "name a directory instead of a file",
}


def is_for_users(error: Exception) -> bool:
    """Whether an exception is a mistake of the user or the trouble of a machine, and no bug."""
    return isinstance(error, (UserError, OSError)) or is_store_error(error)


def describe(error: Exception, config: Config | None) -> str:
    """One line that says what is wrong and what to do about it."""
    if not isinstance(error, UserError) and is_store_error(error):
        return store_sentence(error, config)
    if not isinstance(error, OSError) or error.errno is None:
        return one_line(str(error)) or type(error).__name__
    where = f"{error.filename}: " if error.filename else ""
    remedy = REMEDIES.get(error.errno, "rerun with --debug to see where it happened")
    return f"{where}{error.strerror}; {remedy}"


def debugging() -> bool:
    """Whether the user wants to see tracebacks and library logs."""
    return os.environ.get("WMTP_DEBUG", "0") not in ("", "0")


def quieten_libraries() -> None:
    """Leave the terminal to this project's own output, here and in worker processes. Variables already set win."""
    for variable, value in QUIET.items():
        os.environ.setdefault(variable, value)
    warnings.filterwarnings("ignore")
