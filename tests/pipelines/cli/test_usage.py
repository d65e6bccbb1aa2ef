"""Wrong usage ends in one line."""

from collections.abc import Callable
from pathlib import Path

import pytest

SCORE = ["score", "--input", "a", "--output", "b", "--reference", "c"]
PREPARE = ["prepare", "--input", "a", "--output", "b", "--tokenizer", "c"]
ITERATE = ["iterate", "--input", "a", "--output", "b", "--reference", "c", "--base", "d"]
TRAIN = ["train", "--input", "a", "--output", "b", "--model", "c"]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], "wmtp: error: no command given; choose from prepare, score"),
        (["scor"], "wmtp: error: unknown command 'scor'; choose from"),
        (["score", "--input", "a"], "wmtp score: error: --output missing; see 'wmtp score --help'"),
        (["inspect"], "wmtp inspect: error: SET missing"),
        ([*SCORE, "--short_contex", "5"], "--short_contex (did you mean --short_context"),
        ([*SCORE, "--short"], "unknown argument --short"),
        ([*SCORE, "--short_context", "1"], "--short_context: should be greater than or equal to 2, not '1'"),
        ([*SCORE[:5], "--entropy"], "--reference missing; give a scoring model there or in --conditions, or"),
        ([*SCORE[:5], "--contrasts", "{a: loss_b - loss_c}", "--entropy"], "--entropy needs --reference"),
        ([*SCORE[:5], "--conditions.one.model", "m", "--base", "b"], "--base needs --reference"),
        ([*SCORE, "--conditions", "{base: {model: m}}"], "--conditions: 'base' has its own flags; choose a name other"),
        ([*SCORE, "--conditions", "{a-b: {model: m}}"], "--conditions: 'a-b' is not a valid column name; use letters"),
        ([*SCORE, "--conditions", "{a: {modl: m}}"], "--conditions: Option 'modl' is not accepted"),
        ([*SCORE, "--contrasts", "{a: loss_b}"], "--contrasts: a should be the difference of two columns"),
        ([*SCORE, "--contrasts", "{excess_loss: a - b}"], "--contrasts: excess_loss is the name of another column"),
        ([*SCORE, "--short_stride", "5"], "--short_stride needs --short_context"),
        ([*SCORE, "--short_context", "5", "--short_stride", "5"], "--short_stride must be smaller than"),
        ([*SCORE, "--engine", "jax"], "--engine: should be one of 'auto', 'vllm', 'transformers', not 'jax'"),
        ([*SCORE, "--workers", "many"], "--workers: should be a valid integer"),
        ([*PREPARE, "--number_fields", "reward"], "--number_fields: should be a list such as '[a,b]', not 'reward'"),
        ([*PREPARE, "--number_fields", "[start]"], "--number_fields: 'start' is reserved by wmtp;"),
        ([*PREPARE, "--label_fields", "[excess_loss_b]"], "'excess_loss_b' is reserved by wmtp;"),
        ([*PREPARE, "--label_fields", "[gradient_x]"], "'gradient_x' is reserved by wmtp; rename"),
        ([*PREPARE, "--label_fields", "[a-b]"], "--label_fields: 'a-b' is not a valid column name; use letters"),
        ([*PREPARE, "--label_fields", "[class]"], "--label_fields: 'class' is reserved by wmtp"),
        ([*PREPARE, "--number_fields", "[live]"], "--number_fields: 'live' is reserved by wmtp;"),
        ([*PREPARE, "--label_fields", "[a,a]"], "--number_fields and --label_fields name 'a' twice"),
        ([*PREPARE, "--label_fields", "[a]", "--number_fields", "[a]"], "name 'a' twice; name each field once"),
        ([*SCORE, "--contrasts", "{live: loss_a - loss_b}"], "--contrasts: 'live' is reserved by wmtp;"),
        ([*SCORE, "--contrasts", "{in: loss_a - loss_b}"], "--contrasts: 'in' is reserved by wmtp; choose"),
        (
            ["weights", "a", "--weights.preset", "rho1"],
            "to use instead, such as --live_column loss_base",
        ),
        (["weights", "a", "--live_column", "loss_base"], "--live_column: these weights do not depend on the model"),
        (["weights", "a,"], "SET: should have a path on both sides of every comma;"),
        (["weights"], "wmtp weights: error: SET missing"),
        ([*TRAIN, "--dry_run", "--plan.memory_gib", "inf"], "--plan.memory_gib: should be a finite number, not 'inf'"),
        ([*TRAIN, "--optimizer.learning_rate", "1e400"], "--optimizer.learning_rate: should be a finite number, not"),
        ([*TRAIN, "--plan", "{processes: 2, foo: 1}"], "error: --plan: unknown setting 'plan.foo'"),
        ([*TRAIN, "--weights.fraction", "1.5"], "--weights.fraction: should be less than or equal to 1, not '1.5'"),
        ([*TRAIN, "--weights.fracton", "1"], "did you mean --weights.fraction"),
        ([*TRAIN, "--heads.offsets", "[2]"], "--heads.offsets must start with 1"),
        ([*TRAIN, "--heads.offsets", "[1,0]"], "--heads.offsets: should be greater than 0"),
        ([*TRAIN, "--input", "a,"], "--input: should have a path on both sides of every comma;"),
        ([*TRAIN, "--seed", "x"], "--seed: should be a valid integer"),
        ([*TRAIN, "--mix", "{b: 0.5, c: 0.5}"], "--mix: shares should sum to less than 1"),
        ([*TRAIN, "--mix", "{b: 0}"], "--mix: should be greater than 0, not '0'"),
        ([*TRAIN, "--mix", "{tape://b: 0.5}"], "--mix: 'tape://b' is neither a path nor an address"),
        ([*SCORE, "--base", "hf://gpt2"], "score: error: --base: hf://gpt2 should name an owner, such as hf://owner/"),
        ([*SCORE, "--base", "caf\udce9"], "score: error: --base: should be in UTF-8; see 'wmtp score --help'"),
        (["list", "a", "s3://"], "list: error: DIRECTORIES: s3:// should have a bucket or a host after '://'; see"),
        (["inspect", "a", "--html", "s3://b/c"], "inspect: error: --html: s3://b/c should be a path on this machine;"),
        (["demo", "--output", "zip://a"], "demo: error: --output: 'zip://a' is neither a path nor an address with"),
        ([*ITERATE, "--score.input", "a"], "--score.input: is set by 'wmtp iterate'; leave it out"),
        ([*ITERATE, "--score.short_contex", "5"], "--score.short_contex: no such setting; see 'wmtp score --help'"),
        ([*ITERATE, "--train.weights.preset", "rho2"], "--train.weights.preset: should be 'uniform', 'rho1'"),
        ([*ITERATE, "--train.ray_address", "x"], "--train: --ray_address needs --ray_workers"),
        (["score", "--config", "nowhere.yaml"], "error: --config nowhere.yaml: file does not exist; check the path"),
        ([*TRAIN, "--save_every", "3"], "unknown argument --save_every (did you mean --eval_every"),
        (["inspect", "a", "--set=b"], "unknown argument --set; see 'wmtp inspect --help'"),
        ([*TRAIN, "--save_every=3"], "unknown argument --save_every (did you mean"),
        (
            [*TRAIN, "--weights.formula", "a < b < c"],
            "'a < b < c': a comparison has two sides; write (0 < x) * (x < 1)",
        ),
        (
            [*TRAIN, "--weights.formula", "a if b else c"],
            "--weights.formula: 'a if b else c' is not part of the language, which",
        ),
        ([*TRAIN, "--weights.formula", "2 * (a if b else c)"], "'a if b else c' is not part of the language, which"),
        ([*TRAIN, "--weights.formula", "kept(a)"], "no function kept(); choose from abs, clip"),
    ],
)
def test_wrong_usage_ends_in_one_line(
    arguments: list[str], expected: str, complaint: Callable[[list[str], int], str]
) -> None:
    line = complaint(arguments, 2)
    assert expected in line
    assert "Annotated" not in line
    assert "errors.pydantic.dev" not in line


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("inputt: a\n", "run.yaml: unknown setting 'inputt' (did you mean --input?)"),
        ("input: a\noutput: [\n", "run.yaml: not valid YAML (line 3: "),
        ("input: \ud800\n", "run.yaml: not valid YAML (UnicodeDecodeError); correct the file"),
        (
            "input: " + "[" * 5000 + "]" * 5000,
            "run.yaml: not valid YAML (line 1: nested more than 100 deep); correct the file",
        ),
        ("- input\n", "run.yaml: holds no settings, such as 'seed: 1'; correct the file"),
        ("", "run.yaml: holds no settings, such as 'seed: 1'; correct the file"),
        ("short_context: -1\n", "run.yaml: short_context: should be greater than or equal to 2, not '-1'"),
    ],
)
def test_a_wrong_file_ends_in_one_line(
    text: str, expected: str, tmp_path: Path, complaint: Callable[[list[str], int], str]
) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(text, errors="surrogatepass")
    assert expected in complaint(["score", "--config", str(file)], 2)
