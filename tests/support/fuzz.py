"""Fuzzing in a process of its own: `python fuzz.py TARGET DIRECTORY LOG SEED SECONDS`.

Public operations get mutated input. Nothing but a `UserError` of one line may come out of them: no other exception, no
crash of the interpreter, no case longer than `CASE_SECONDS`, no memory beyond `MEMORY_BYTES`. `LOG` always names the
current case, for failures that end the process. Hypothesis shrinks the others.
"""

import faulthandler
import json
import os
import resource
import shutil
import sys
import time
from argparse import ArgumentError
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st
from mutations import HOSTILE_JSON, HOSTILE_TEXT, Mutation, hostile_json, mutate, set_mutations, table_mutations
from operations import NEW, OPERATIONS, shown_by

from weighted_mtp.pipelines.cli.parser import COMMANDS, parse_arguments
from weighted_mtp.pipelines.cli.usage import describe_usage_error, option_strings
from weighted_mtp.schemas.configs import ImportConfig, PrepareConfig, WeightsConfig
from weighted_mtp.schemas.errors import UserError
from weighted_mtp.schemas.shard_set.shard_set import ShardSet
from weighted_mtp.schemas.weights.functions import FUNCTIONS
from weighted_mtp.scoring.corpus.prepare import prepare
from weighted_mtp.scoring.imports.run import import_scores
from weighted_mtp.training.weighting.token_weights import token_weights

CASE_SECONDS = 60
MEMORY_BYTES = 1 << 30
"""Most memory that a process may need beyond that of its first cases."""
MOST_ADDRESSES = 1 << 35
"""Address space of a process, far more than it needs: a case that would fill the machine ends in a MemoryError."""
CASES = 20
"""Cases of a round; the time is checked between rounds."""
WARM_UP_ROUNDS = 3
Check = Callable[[Any], None]
Target = tuple[st.SearchStrategy, Check]


def sets(directory: Path, name: str = "good") -> Target:
    """Mutations of a set, and all operations on it."""
    good, path = directory / name, directory / "work" / "mutated"

    def check(case: tuple[list[Mutation], bool]) -> None:
        edits, signed = case
        shutil.rmtree(path, ignore_errors=True)
        shutil.copytree(good, path)
        mutate(path, edits, signed)
        for operation in OPERATIONS:
            try:
                shown = shown_by(operation, path, directory / "good")
                assert all(char.isprintable() or char == "\n" for char in shown), ascii(shown)
            except UserError as error:
                assert_one_line(str(error))

    return st.tuples(st.lists(set_mutations(good), min_size=1, max_size=3), st.booleans()), check


def old_sets(directory: Path) -> Target:
    """As `sets`, for the format that `wmtp upgrade` converts."""
    return sets(directory, "old")


def corpora(directory: Path) -> Target:
    """Mutations of files of text and of scores, and `prepare` and `import` on them."""
    good, path = directory / "files", directory / "work" / "files"

    def check(edits: list[Mutation]) -> None:
        shutil.rmtree(path, ignore_errors=True)
        shutil.copytree(good, path)
        mutate(path, edits, signed=False)
        for name in sorted({edit.file for edit in edits}):
            try:
                if name.startswith("corpus"):
                    fields = {} if ".txt" in name else {"number_fields": ("reward",), "label_fields": ("group",)}
                    prepare(
                        PrepareConfig(
                            input=str(path / name),
                            tokenizer=str(directory / "good" / "tokenizer"),
                            output=path / NEW,
                            max_length=3,
                            workers=1,
                            **fields,
                        )
                    )
                else:
                    import_scores(ImportConfig(input=directory / "good", scores=(str(path / name),), output=path / NEW))
                for sequence in ShardSet.open(path / NEW).sequences():
                    assert len(sequence.input_ids)
            except UserError as error:
                assert_one_line(str(error))
            shutil.rmtree(path / NEW, ignore_errors=True)

    return st.lists(table_mutations(good), min_size=1, max_size=3), check


NUMBERS = (
    "0",
    "1",
    "0.6",
    "-1",
    "1e-45",
    "1e38",
    "9" * 400,
    "1e999",
    "0x10",
    "1_0",
    "1j",
    "True",
    "None",
    "'a'",
    "...",
)
COLUMNS = ("loss_a", "loss_b", "gain", "reward", "group", "live", "start", "nothing", "λ", "__class__", "lambda")
SYMBOLS = ("+", "-", "*", "/", ">", ">=", "<", "<=", "==", "**", "//", "@", "and", "if", ":=", "%")


def formulas(directory: Path) -> Target:
    """Formulas of the weight language, and the weights of a set under them."""
    leaf = st.sampled_from([*COLUMNS, *NUMBERS])
    scope = st.sampled_from(["", ", by=sequence", ", by=batch", ", by=corpus", ", by=group", ", by=reward", ", by=1"])
    number = st.sampled_from(["", *(f", {number}" for number in NUMBERS), ", silent=1", ", 0, 5", ", lam=0.5"])

    def wider(inner: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
        operation = st.tuples(inner, st.sampled_from(SYMBOLS), inner).map(" ".join)
        call = st.tuples(st.sampled_from([*FUNCTIONS, "eval", "x.y"]), inner, number, scope)
        deep = st.tuples(st.sampled_from(["(", "-", "abs(", "1+", "[", "not "]), st.integers(1, 2000), inner)
        return st.one_of(
            operation.map(lambda text: f"({text})"),
            call.map(lambda parts: "{}({}{}{})".format(*parts)),
            deep.map(lambda parts: parts[0] * parts[1] + parts[2][:9000] + ")" * (parts[1] * ("(" in parts[0]))),
            st.tuples(inner, st.integers(2, 1500)).map(lambda parts: "+".join([parts[0][:1000]] * parts[1])[:20000]),
        )

    def check(case: tuple[str, str]) -> None:
        formula, control = case
        try:
            config = WeightsConfig(formula=formula, control=control)
            for weights in token_weights(str(directory / "good"), config):
                assert np.isfinite(weights).all()
        except UserError as error:
            assert_one_line(str(error))

    text = st.recursive(leaf, wider, max_leaves=8) | st.text(max_size=30) | st.sampled_from(HOSTILE_TEXT)
    return st.tuples(text, st.sampled_from(["none", "shuffled", "random"])), check


SETTINGS: dict[str, Any] = {
    "prepare": {"input": "a", "tokenizer": "b", "output": "c", "number_fields": ["reward"], "max_length": 10},
    "score": {
        "input": "a",
        "output": "b",
        "reference": "c",
        "conditions": {"one": {"model": "m", "prompt": "text"}},
        "contrasts": {"more": "loss_a - loss_b"},
        "engine_args": {"quantization": "fp8"},
    },
    "import": {"input": "a", "scores": ["b", "c"], "output": "d", "columns": ["e"]},
    "weights": {"set": "a,b", "mix": {"c": 0.5}, "weights": {"preset": "dense", "lam": 0.5}, "seed": 3},
    "train": {"input": ["a"], "model": "m", "output": "o", "weights": {"formula": "1"}, "heads": {"offsets": [1, 2]}},
    "inspect": {"set": "a", "samples": 3},
}
FRAGMENTS = (
    "a: &a [x, x]", "b: *a", "!!python/object/apply:os.system [true]", "{", "? [a]\n: b", "- - -", "%YAML 9.9", "\t",
    "2001-01-01", "0o17", "1:30", ".nan", "<<: {seed: 1}", "---\n---", "!!binary aaaa", "\x00", "&x [*x]", "=",
)  # fmt: skip


def settings_of_commands(directory: Path) -> Target:
    """Files of `--config` and arguments of commands. They are only parsed."""
    file = directory / "work" / "config.yaml"
    flags = {name: sorted(option_strings(config)) for name, config in COMMANDS.items()}
    hostile = st.integers(0, len(HOSTILE_JSON) - 1)
    arguments = st.lists(st.tuples(st.integers(0, 200), st.sampled_from(["=", " "]), hostile), max_size=2)
    fragments = st.lists(st.sampled_from(FRAGMENTS) | st.text(max_size=10), max_size=2)

    def check(case: tuple[str, list[tuple[int, int]], list[str], list[tuple[int, str, int]]]) -> None:
        command, edits, extra, given = case
        content = json.loads(json.dumps(SETTINGS[command]))
        for place, value in edits:
            key = [*content][place % len(content)] if content else "a"
            inner = content[key] if isinstance(content.get(key), dict) and place % 3 else content
            inner[[*inner][place % len(inner)] if inner else "a"] = hostile_json(value)
        text = "\n".join([*extra, yaml.dump(content) if len(extra) < 2 else json.dumps(content)])
        file.write_text(text, errors="surrogatepass")
        line = [command, "--config", str(file)]
        for number, between, value in given:
            shown = HOSTILE_JSON[value] if isinstance(HOSTILE_JSON[value], str) else json.dumps(HOSTILE_JSON[value])
            argument = flags[command][number % len(flags[command])] + between + shown
            line += argument.split(" ", 1) if between == " " else [argument]
        try:
            with redirect_stdout(StringIO()), redirect_stderr(StringIO()):
                parse_arguments(line)
        except ArgumentError as error:
            assert_one_line(describe_usage_error(error, line, command, COMMANDS))

    edits = st.lists(st.tuples(st.integers(0, 30), hostile), max_size=3)
    return st.tuples(st.sampled_from(sorted(SETTINGS)), edits, fragments, arguments), check


def assert_one_line(message: str) -> None:
    """Assert that a message is one line and not empty."""
    assert message, message
    assert "\n" not in message, ascii(message)


def crash(directory: Path) -> Target:
    """A crash of the interpreter, to test that it is found."""

    def check(case: str) -> None:
        os.abort()

    return st.just("a case of crash"), check


TARGETS: dict[str, Callable[[Path], Target]] = {
    "crash": crash,
    "sets": sets,
    "old_sets": old_sets,
    "corpora": corpora,
    "formulas": formulas,
    "settings": settings_of_commands,
}


def main(target: str, directory: str, log: str, first: str, seconds: str) -> None:
    """Check cases of a target for some time."""
    strategy, check = TARGETS[target](Path(directory))
    end, most = time.monotonic() + float(seconds), sys.maxsize
    faulthandler.enable()
    resource.setrlimit(resource.RLIMIT_AS, (MOST_ADDRESSES, MOST_ADDRESSES))
    for number in count():
        if time.monotonic() >= end:
            break
        if number == WARM_UP_ROUNDS:
            most = peak_bytes() + MEMORY_BYTES
        check_round(strategy, check, Path(log), int(first) + number, most)
    print(f"{target}: {number * CASES:,} cases, {peak_bytes() >> 20:,} MiB")


def check_round(strategy: st.SearchStrategy, check: Check, log: Path, number: int, most_bytes: int) -> None:
    """Check `CASES` cases with the seed `number`."""

    @seed(number)
    @settings(max_examples=CASES, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(strategy)
    def test(case: Any) -> None:
        log.write_text(repr(case))
        faulthandler.dump_traceback_later(CASE_SECONDS, exit=True)
        check(case)
        faulthandler.cancel_dump_traceback_later()
        assert peak_bytes() <= most_bytes, f"{peak_bytes():,} bytes of memory"

    test()


def peak_bytes() -> int:
    """Largest memory of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


if __name__ == "__main__":
    main(*sys.argv[1:])
