from weighted_mtp.pipelines.reports.tokens.token_text import printable


def test_printable_escapes_what_would_break_the_line() -> None:
    assert printable("a\tb\r\n\x1b[0m é") == "a\\tb\\r\\n\\x1b[0m é"
