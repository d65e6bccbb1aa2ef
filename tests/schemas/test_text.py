from weighted_mtp.schemas.text import describe_files, printable


def test_printable_escapes_what_would_break_the_line() -> None:
    assert printable("a\tb\r\n\x1b[0m é") == "a\\tb\\r\\n\\x1b[0m é"
    assert printable("a\nb\u202ec", kept="\n") == "a\nb\\u202ec"


def test_files_are_described_by_number_suffixes_and_first_names() -> None:
    assert describe_files(["notes.txt"]) == "1 file (1 .txt): notes.txt"
    assert describe_files(["a/b.MD", "c.md", "d"]) == "3 files (2 .md, 1 without suffix): a/b.MD, c.md, d"


def test_the_description_of_files_is_bounded() -> None:
    names = [f"{'n' * 300}{number}.{number}{'s' * 300}" for number in range(2000)]
    described = describe_files(names)
    assert described.startswith("2,000 files (1 .0sss")
    assert len(described) < 800
    assert described.count("n...") == 5
