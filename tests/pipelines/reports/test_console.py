"""The console that commands print to."""

import io

from weighted_mtp.pipelines.reports.console import WIDTH, new_console


def test_text_is_printed_literally_and_never_wrapped() -> None:
    output = io.StringIO()
    line = "[bold] 1 " * WIDTH
    new_console(file=output).print(line)
    assert output.getvalue() == line + "\n"


def test_reports_wrap_at_a_fixed_width_outside_terminals() -> None:
    output = io.StringIO()
    new_console(soft_wrap=False, file=output).print("word " * WIDTH)
    assert max(map(len, output.getvalue().splitlines())) <= WIDTH
