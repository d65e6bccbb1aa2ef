import errno
import os
import subprocess
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml

from weighted_mtp import pipelines
from weighted_mtp.pipelines.cli.main import COMMANDS, main
from weighted_mtp.schemas.configs import Config, IterateConfig, ScoreConfig, TrainConfig
from weighted_mtp.schemas.errors import UserError

SCORE = ["score", "--input", "a", "--output", "b", "--reference", "c"]
PREPARE = ["prepare", "--input", "a", "--output", "b", "--tokenizer", "c"]
ITERATE = ["iterate", "--input", "a", "--output", "b", "--reference", "c", "--base", "d"]
TRAIN = ["train", "--input", "a", "--output", "b", "--model", "c"]


@pytest.fixture(autouse=True)
def _environment() -> Iterator[None]:
    before = dict(os.environ)
    os.environ.pop("WMTP_DEBUG", None)
    yield
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture
def replace_command(monkeypatch: pytest.MonkeyPatch) -> Callable[[str, Callable[[Config], None]], None]:
    """Put another `run` in the place of a command."""

    def replace(name: str, run: Callable[[Config], None]) -> None:
        module = types.ModuleType(f"weighted_mtp.pipelines.{name}")
        module.run = run  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, f"weighted_mtp.pipelines.{name}", module)
        monkeypatch.setattr(pipelines, name, module, raising=False)

    return replace


@pytest.fixture
def configured(replace_command: Callable[..., None]) -> Callable[[list[str]], Config]:
    """The settings that a command line gives to its command."""

    def parse(arguments: list[str]) -> Config:
        seen: list[Config] = []
        replace_command(arguments[0], seen.append)
        assert main(arguments) == 0
        return seen[0]

    return parse


def complaint(arguments: list[str], status: int, capsys: pytest.CaptureFixture[str]) -> str:
    """The one line on stderr of a command line that fails with `status`."""
    assert main(arguments) == status
    captured = capsys.readouterr()
    lines = captured.err.splitlines()
    assert captured.out == ""
    assert len(lines) == 1
    return lines[0]


def test_flags_become_settings(configured: Callable[[list[str]], Config]) -> None:
    config = configured([*SCORE, "--short_context", "512", "--dtype=float32"])
    expected = ScoreConfig(
        input=Path("a"), output=Path("b"), reference="c", short_context=512, dtype="float32", short_stride=None
    )
    assert config == expected


def test_flags_override_the_file(configured: Callable[[list[str]], Config], tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(
        "input: a\noutput: b\nmodel: c\nheads:\n  offsets: [1, 3]\nweights:\n  preset: sparse\n  fraction: 0.1\n"
    )
    config = configured(["train", "--config", str(file), "--weights.fraction", "0.2"])
    assert isinstance(config, TrainConfig)
    assert config.weights.preset == "sparse"
    assert config.weights.fraction == 0.2
    assert config.heads.offsets == (1, 3)
    assert config.input == (Path("a"),)


def test_a_switch_needs_no_value(configured) -> None:
    assert configured([*SCORE, "--dry_run", "--entropy"]).dry_run
    assert configured([*SCORE, "--dry_run", "--entropy"]).entropy
    assert not configured([*SCORE, "--dry_run", "false"]).dry_run
    live = configured([*TRAIN, "--weights.preset", "dense", "--weights.live", "--fsdp"])
    assert live.weights.live
    assert live.fsdp
    assert configured([*SCORE, "--entropy=true"]).entropy


def test_print_config_gives_a_file_with_the_same_settings(
    configured: Callable[[list[str]], Config], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [*TRAIN, "--heads.offsets", "[1,2]", "--trackers", "[tensorboard]", "--max_steps", "7"]
    with pytest.raises(SystemExit) as caught:
        main([*arguments, "--print_config"])
    assert caught.value.code == 0
    file = tmp_path / "run.yaml"
    file.write_text(capsys.readouterr().out)
    assert yaml.safe_load(file.read_text())["max_steps"] == 7
    assert configured(["train", "--config", str(file)]) == configured(arguments)


@pytest.mark.parametrize(
    ("argument", "expected"), [("a,b/c", ["a", "b/c"]), ("[a,b/c]", ["a", "b/c"]), ("x,y", ["x,y"]), ("a", ["a"])]
)
def test_several_sets_are_named_with_commas_or_as_a_list(
    argument: str,
    expected: list[str],
    configured: Callable[[list[str]], Config],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A directory with a comma in its name is one set. What is written down no longer depends on what is there."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x,y").mkdir()
    arguments = ["train", "--input", argument, "--eval_input", argument, "--output", "o", "--model", "m"]
    config = configured(arguments)
    assert isinstance(config, TrainConfig)
    assert config.input == config.eval_input == tuple(map(Path, expected))
    dump = config.model_dump(mode="json")
    assert dump["input"] == expected
    (tmp_path / "x,y").rmdir()
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(dump))
    assert configured(["train", "--config", "run.yaml"]) == config


def test_weights_of_several_sets(configured: Callable[[list[str]], Config], tmp_path: Path) -> None:
    expected = {"set": ["a", "s3://b/c"], "weights": {"preset": "sparse"}, "max_tokens": 7}
    arguments = ["weights", "a,s3://b/c", "--weights.preset", "sparse", "--max_tokens", "7"]
    assert configured(arguments) == COMMANDS["weights"].model_validate(expected)
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(expected))
    assert configured(["weights", "--config", str(tmp_path / "run.yaml")]) == configured(arguments)


def test_a_mixture_is_a_mapping_on_the_command_line_and_in_a_file(
    configured: Callable[[list[str]], Config], tmp_path: Path
) -> None:
    mix = {"scored/code.v1": 0.3, "s3://bucket/text": 0.25, "one,other": 0.1}
    config = configured([*TRAIN, "--mix", '{scored/code.v1: 0.3, s3://bucket/text: 0.25, "one,other": 0.1}'])
    assert isinstance(config, TrainConfig)
    assert config.mix == mix
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(config.model_dump(mode="json")))
    assert configured(["train", "--config", str(file)]) == config
    single = configured([*TRAIN, "--mix.scored/code", "0.3"])
    assert isinstance(single, TrainConfig)
    assert single.mix == {"scored/code": 0.3}


def test_settings_of_both_parts_of_a_round(configured: Callable[[list[str]], Config]) -> None:
    arguments = ["--score.engine", "transformers", "--train.weights.preset", "rho1-static", "--train.max_steps", "7"]
    config = configured([*ITERATE, *arguments, "--fresh"])
    assert isinstance(config, IterateConfig)
    assert config.fresh
    assert config.scoring(input="x", output="y", reference="z").engine == "transformers"
    training = config.training(input="x", output="y", model="z")
    assert (training.weights.preset, training.max_steps) == ("rho1-static", 7)


@pytest.mark.parametrize("name", ["inspect", "verify", "weights"])
def test_the_set_is_positional(name: str, configured: Callable[[list[str]], Config]) -> None:
    assert configured([name, "corpus"]) == COMMANDS[name].model_validate({"set": "corpus"})


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], "wmtp: error: no command given; choose from prepare, score"),
        (["scor"], "wmtp: error: unknown command 'scor'; choose from"),
        (["score", "--input", "a"], "wmtp score: error: --output missing; see 'wmtp score --help'"),
        (["inspect"], "wmtp inspect: error: SET missing"),
        ([*SCORE, "--short_contex", "5"], "--short_contex 5 (did you mean --short_context?)"),
        ([*SCORE, "--short"], "unknown argument --short"),
        ([*SCORE, "--short_context", "1"], "--short_context: should be greater than or equal to 2, not '1'"),
        ([*SCORE[:5], "--entropy"], "--reference missing; give a model to score with, there or in --conditions, or"),
        ([*SCORE[:5], "--contrasts", "{a: loss_b - loss_c}", "--entropy"], "--entropy needs --reference"),
        ([*SCORE[:5], "--conditions.one.model", "m", "--base", "b"], "--base needs --reference"),
        ([*SCORE, "--conditions", "{base: {model: m}}"], "--conditions: 'base' has flags of its own; choose another"),
        ([*SCORE, "--conditions", "{a-b: {model: m}}"], "--conditions: 'a-b' is no name for a column; use letters"),
        ([*SCORE, "--conditions", "{a: {modl: m}}"], "--conditions: Option 'modl' is not accepted"),
        ([*SCORE, "--contrasts", "{a: loss_b}"], "--contrasts: a should be the difference of two columns"),
        ([*SCORE, "--contrasts", "{excess_loss: a - b}"], "--contrasts: excess_loss is the name of another column"),
        ([*SCORE, "--short_stride", "5"], "--short_stride needs --short_context"),
        ([*SCORE, "--short_context", "5", "--short_stride", "5"], "--short_stride must be smaller than"),
        ([*SCORE, "--engine", "jax"], "--engine: should be one of 'auto', 'vllm', 'transformers', not 'jax'"),
        ([*SCORE, "--workers", "many"], "--workers: should be a valid integer"),
        ([*PREPARE, "--number_fields", "reward"], "--number_fields: should be a list such as '[a,b]', not 'reward'"),
        ([*PREPARE, "--number_fields", "[start]"], "--number_fields: 'start' is a name that wmtp uses itself;"),
        ([*PREPARE, "--label_fields", "[excess_loss_b]"], "'excess_loss_b' is a name that wmtp uses itself;"),
        ([*PREPARE, "--label_fields", "[gradient_x]"], "'gradient_x' is a name that wmtp uses itself; rename"),
        ([*PREPARE, "--label_fields", "[a-b]"], "--label_fields: 'a-b' is no name for a column; use letters"),
        ([*PREPARE, "--label_fields", "[class]"], "--label_fields: 'class' is a name that wmtp uses itself"),
        ([*PREPARE, "--number_fields", "[live]"], "--number_fields: 'live' is a name that wmtp uses itself;"),
        ([*PREPARE, "--label_fields", "[a,a]"], "--number_fields and --label_fields name 'a' twice"),
        ([*PREPARE, "--label_fields", "[a]", "--number_fields", "[a]"], "name 'a' twice; name each field once"),
        ([*SCORE, "--contrasts", "{live: loss_a - loss_b}"], "--contrasts: 'live' is a name that wmtp uses itself;"),
        ([*SCORE, "--contrasts", "{in: loss_a - loss_b}"], "--contrasts: 'in' is a name that wmtp uses itself; choose"),
        (["weights", "a", "--weights.preset", "rho1"], "name a column that stands for it, as --live_column loss_base"),
        (["weights", "a", "--live_column", "loss_base"], "--live_column: these weights do not depend on the model"),
        (["weights", "a,"], "SET: should have a path on both sides of every comma;"),
        (["weights"], "wmtp weights: error: SET missing"),
        ([*TRAIN, "--weights.fraction", "1.5"], "--weights.fraction: should be less than or equal to 1, not '1.5'"),
        ([*TRAIN, "--weights.fracton", "1"], "did you mean --weights.fraction?"),
        ([*TRAIN, "--heads.offsets", "[2]"], "--heads.offsets must start with 1"),
        ([*TRAIN, "--heads.offsets", "[1,0]"], "--heads.offsets: should be greater than 0"),
        ([*TRAIN, "--input", "a,"], "--input: should have a path on both sides of every comma;"),
        ([*TRAIN, "--seed", "x"], "--seed: should be a valid integer"),
        ([*TRAIN, "--mix", "{b: 0.5, c: 0.5}"], "--mix: shares should sum to less than 1"),
        ([*TRAIN, "--mix", "{b: 0}"], "--mix: should be greater than 0, not '0'"),
        ([*TRAIN, "--mix", "{tape://b: 0.5}"], "--mix: Unsupported filesystem: 'tape'"),
        ([*ITERATE, "--score.input", "a"], "--score.input: follows from the other settings; leave it out"),
        ([*ITERATE, "--score.short_contex", "5"], "--score.short_contex: no such setting; see 'wmtp score --help'"),
        ([*ITERATE, "--train.weights.preset", "rho2"], "--train.weights.preset: Input should be 'uniform', 'rho1'"),
        ([*ITERATE, "--train.ray_address", "x"], "--train: --ray_address needs --ray_workers"),
        (["score", "--config", "nowhere.yaml"], "--config: File does not exist"),
    ],
)
def test_wrong_usage_ends_in_one_line(arguments: list[str], expected: str, capsys: pytest.CaptureFixture[str]) -> None:
    line = complaint(arguments, 2, capsys)
    assert expected in line
    assert "Annotated" not in line
    assert "errors.pydantic.dev" not in line


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("inputt: a\n", "--config: unknown setting 'inputt' (did you mean --input?)"),
        ("input: [\n", "--config: not valid YAML"),
        ("short_context: -1\n", "--short_context: should be greater than or equal to 2, not '-1'"),
    ],
)
def test_a_wrong_file_ends_in_one_line(
    text: str, expected: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(text)
    assert expected in complaint(["score", "--config", str(file)], 2, capsys)


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (UserError("corpus: empty; add text"), "wmtp score: error: corpus: empty; add text"),
        (
            OSError(errno.ENOSPC, "No space left on device", "out/shard"),
            "wmtp score: error: out/shard: No space left on device; free some space and rerun the same command",
        ),
        (PermissionError(errno.EACCES, "Permission denied", "out"), "change the permissions or choose another path"),
        (OSError("can't load tokenizer\n\nfor 'x'"), "wmtp score: error: can't load tokenizer for 'x'"),
    ],
)
def test_what_the_user_can_fix_ends_in_one_line(
    error: Exception, expected: str, replace_command: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(_: Config) -> None:
        raise error

    replace_command("score", fail)
    assert complaint(SCORE, 1, capsys).endswith(expected)
    for debug in (["--debug", *SCORE], [*SCORE, "--debug"]):
        with pytest.raises(type(error)):
            main(debug)


def test_a_bug_shows_its_traceback(replace_command: Callable[..., None]) -> None:
    def fail(_: Config) -> None:
        raise ZeroDivisionError

    replace_command("score", fail)
    with pytest.raises(ZeroDivisionError):
        main(SCORE)


def test_an_interrupted_run_says_how_to_go_on(
    replace_command: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(_: Config) -> None:
        raise KeyboardInterrupt

    replace_command("score", interrupt)
    assert complaint(SCORE, 130, capsys) == "wmtp score: interrupted; rerun the same command to finish it"
    replace_command("verify", interrupt)
    assert complaint(["verify", "corpus"], 130, capsys) == "wmtp verify: interrupted"


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help_without_python_types(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main([name, "--help"])
    assert caught.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    assert COMMANDS[name].__doc__ in text
    for noise in ("Annotated", "<class", "Optional[", "default: None", "Field"):
        assert noise not in text


def test_help_loads_no_framework() -> None:
    script = (
        "import sys\n"
        "from weighted_mtp.pipelines.cli.main import main\n"
        "try:\n    main(['--help'])\n"
        "finally:\n    print([m for m in ('torch', 'transformers', 'ray', 'vllm', 'datasets') if m in sys.modules])"
    )
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert run.stdout.splitlines()[-1] == "[]"
    for command in COMMANDS:
        assert f"\n    {command} " in run.stdout


def test_the_console_script_of_a_set_that_is_not_there() -> None:
    wmtp = Path(sys.executable).with_name("wmtp")
    run = subprocess.run([wmtp, "verify", "nowhere"], capture_output=True, text=True, check=False)
    assert run.returncode == 1
    assert run.stderr == (
        "wmtp verify: error: nowhere: no such shard set; check the path or write it with 'wmtp prepare'\n"
    )


def test_a_closed_pipe_is_quiet() -> None:
    script = (
        "import sys, types; from weighted_mtp.pipelines.cli.main import main\n"
        "module = types.ModuleType('weighted_mtp.pipelines.verify')\n"
        "module.run = lambda config: print('line\\n' * 100_000)\n"
        "sys.modules['weighted_mtp.pipelines.verify'] = module\n"
        "sys.exit(main(['verify', 'corpus']))"
    )
    reader, writer = os.pipe()
    os.close(reader)
    run = subprocess.run([sys.executable, "-c", script], stdout=writer, stderr=subprocess.PIPE, text=True, check=False)
    os.close(writer)
    assert (run.returncode, run.stderr) == (1, "")
