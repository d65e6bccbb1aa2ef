from weighted_mtp.schemas.text import printable


def test_printable_escapes_what_would_break_the_line() -> None:
    assert printable("a\tb\r\n\x1b[0m é") == "a\\tb\\r\\n\\x1b[0m é"
    assert printable("a\nb\u202ec", kept="\n") == "a\nb\\u202ec"
