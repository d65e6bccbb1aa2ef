"""The process of `wmtp` and `python -m weighted_mtp`. It handles signals and closed streams before slow imports."""

import atexit
import os
import signal
import sys
from contextlib import suppress

from weighted_mtp.pipelines.cli.streams import open_standard_streams
from weighted_mtp.schemas.interruption import end_process, heeded_signals


def main() -> None:
    """Run the command line, and end the process with its exit status.

    The interpreter is not torn down: libraries abort there if their work was interrupted.
    """
    for number in heeded_signals():
        signal.signal(number, end_process)
    open_standard_streams()
    from weighted_mtp.pipelines.cli.main import main as run_command

    try:
        status = run_command()
    except SystemExit as error:  # --help, or a closed pipe
        status = int(error.code or 0)
    atexit._run_exitfuncs()
    with suppress(OSError):  # stdout may be full
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(status)


if __name__ == "__main__":
    main()
