"""Errors that users can fix end in one line, bugs in a traceback."""

import errno
import logging
from collections.abc import Callable

import pyarrow as pa
import pytest

from weighted_mtp.pipelines.cli.main import main
from weighted_mtp.schemas.configs import Config
from weighted_mtp.schemas.errors import UserError

MEMORY = "use smaller batches, free some memory, or raise the limit of 'ulimit -v'"
SCORE = ["score", "--input", "a", "--output", "b", "--reference", "c"]


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (UserError("corpus: empty; add text"), "wmtp score: error: corpus: empty; add text"),
        (
            OSError(errno.ENOSPC, "No space left on device", "out/shard"),
            "wmtp score: error: out/shard: No space left on device; free some space and rerun the same command",
        ),
        (PermissionError(errno.EACCES, "Permission denied", "out"), "change the permissions or choose another path"),
        (UserError("a\x1b]0;title\x07 b\u202e"), r"wmtp score: error: a\x1b]0;title\x07 b\u202e"),
        (MemoryError(), f"wmtp score: error: out of memory (no reason given); {MEMORY}"),
        (pa.ArrowMemoryError("malloc of size 8 failed"), f"out of memory (malloc of size 8 failed); {MEMORY}"),
        (RuntimeError("can't allocate memory: 8 bytes"), f"out of memory (can't allocate memory: 8 bytes); {MEMORY}"),
        (OSError("can't load tokenizer\n\nfor 'x'"), "wmtp score: error: can't load tokenizer for 'x'"),
    ],
)
def test_what_the_user_can_fix_ends_in_one_line(
    error: Exception, expected: str, replace_command: Callable[..., None], complaint: Callable[[list[str], int], str]
) -> None:
    def fail(_: Config) -> None:
        raise error

    replace_command("score", fail)
    assert complaint(SCORE, 1).endswith(expected)
    for debug in (["--debug", *SCORE], [*SCORE, "--debug"]):
        with pytest.raises(type(error)):
            main(debug)


def test_a_bug_shows_its_traceback(replace_command: Callable[..., None]) -> None:
    def fail(_: Config) -> None:
        raise ZeroDivisionError

    replace_command("score", fail)
    with pytest.raises(ZeroDivisionError):
        main(SCORE)


def test_commands_show_what_the_library_logs_once(
    replace_command: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    def note(_: Config) -> None:
        logging.getLogger("weighted_mtp").info("%s: continuing", "run")

    replace_command("score", note)
    for _ in range(2):
        assert main(SCORE) == 0
        assert capsys.readouterr().err == "run: continuing\n"
