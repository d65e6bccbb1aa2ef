"""The console that commands print to."""

import io
import shlex
from pathlib import Path

import pytest
from rich.table import Table
from rich.text import Text

from weighted_mtp.pipelines.reports.console import WIDTH, new_console, shell_command


def test_text_is_printed_literally_and_never_wrapped() -> None:
    output = io.StringIO()
    line = "[bold] 1 " * WIDTH
    new_console(file=output).print(line)
    assert output.getvalue() == line + "\n"


def test_reports_wrap_at_a_fixed_width_outside_terminals() -> None:
    output = io.StringIO()
    new_console(soft_wrap=False, file=output).print("word " * WIDTH)
    assert max(map(len, output.getvalue().splitlines())) <= WIDTH


def test_foreign_text_does_not_control_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    table = Table("a\x1b[2J", title="t\x9b31m", title_justify="left")
    table.add_row(Text("\x1b]0;x\x07 \u202e right", style="bold"))
    for shown in (table, "plain \x1b[31m\nnext line", Text("\x07")):
        new_console(force_terminal=True, width=80).print(shown, style="italic")
    printed = capsys.readouterr().out
    assert "\x1b[2J" not in printed
    assert "\x1b]0" not in printed
    assert not {"\x07", "\x9b", "\u202e"} & set(printed)
    assert "\\x1b[31m" in printed
    assert "\x1b[3m" in printed, "styles work"


def test_commands_can_be_copied_into_a_shell() -> None:
    paths = [Path("a b/$HOME"), "it's", "plain-1.0/x"]
    command = shell_command("next: wmtp train --input {} --model {} {}", *paths)
    assert command == "next: wmtp train --input 'a b/$HOME' --model 'it'\"'\"'s' plain-1.0/x"
    assert shlex.split(command)[3:] == ["--input", "a b/$HOME", "--model", "it's", "plain-1.0/x"]
