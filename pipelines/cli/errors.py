"""One-line error messages; own messages are shown, and library output is silenced except with --debug."""

import errno
import logging
import os
import sys
import warnings

from weighted_mtp.pipelines.cli.store_errors import describe_store_error, is_store_error
from weighted_mtp.pipelines.cli.usage import one_line
from weighted_mtp.schemas.configs import Config
from weighted_mtp.schemas.errors import UserError, lacks_memory
from weighted_mtp.schemas.text import printable

QUIET_ENVIRONMENT = {
    "ACCELERATE_LOG_LEVEL": "ERROR",
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_HUB_VERBOSITY": "error",
    "PYTHONWARNINGS": "ignore",
    "TOKENIZERS_PARALLELISM": "false",
    "TRANSFORMERS_VERBOSITY": "error",
    "VLLM_LOGGING_LEVEL": "ERROR",
}
OS_REMEDIES = {
    errno.ENOSPC: "free some space and rerun the same command",
    errno.EDQUOT: "free some space and rerun the same command",
    errno.EBADF: "open it, or redirect it to a file or to /dev/null",
    errno.EACCES: "change the permissions or choose another path",
    errno.EPERM: "change the permissions or choose another path",
    errno.EROFS: "choose a writable path",
    errno.ENOENT: "check the path",
    errno.EISDIR: "name a file instead of a directory",
    errno.ENOTDIR: "name a directory instead of a file",
}


def is_user_facing(error: Exception) -> bool:
    """Whether an exception comes from a user mistake or the environment, not from a bug."""
    return isinstance(error, (UserError, OSError)) or is_store_error(error) or lacks_memory(error)


def describe_error(error: Exception, config: Config | None) -> str:
    """Describe an error and its remedy in one line."""
    if not isinstance(error, UserError) and is_store_error(error):
        return describe_store_error(error, config)
    if lacks_memory(error):
        reason = one_line(str(error)) or "no reason given"
        return f"out of memory ({reason}); use smaller batches, free some memory, or raise the limit of 'ulimit -v'"
    if not isinstance(error, OSError) or error.errno is None:
        return one_line(str(error)) or type(error).__name__
    where = f"{error.filename}: " if error.filename else ""
    remedy = OS_REMEDIES.get(error.errno, "rerun with --debug for the traceback")
    return one_line(f"{where}{error.strerror}; {remedy}")


def debugging() -> bool:
    """Whether to show tracebacks and library logs."""
    return os.environ.get("WMTP_DEBUG", "0") not in ("", "0")


def silence_libraries() -> None:
    """Silence library logs, progress bars and warnings, also in workers. Keeps environment variables already set."""
    for variable, value in QUIET_ENVIRONMENT.items():
        os.environ.setdefault(variable, value)
    warnings.filterwarnings("ignore")
    for name in ("torchao", "torch.utils._pytree"):  # transformers imports torchao: kernels of other devices, old calls
        logging.getLogger(name).setLevel(logging.ERROR)


class MessageLines(logging.Handler):
    """Prints messages as plain lines on the stderr of the moment, which a Ray worker redirects."""

    def emit(self, record: logging.LogRecord) -> None:
        """Print a message."""
        print(printable(record.getMessage()), file=sys.stderr, flush=True)


def show_messages() -> None:
    """Show the messages of this project, which the Python API only logs."""
    logger = logging.getLogger("weighted_mtp")
    logger.setLevel(logging.INFO)
    if not logger.handlers:
        logger.addHandler(MessageLines())
