"""Arguments and files become settings."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from weighted_mtp.pipelines.cli.main import main
from weighted_mtp.pipelines.cli.parser import COMMANDS
from weighted_mtp.schemas.configs import Config, IterateConfig, ScoreConfig, TrainConfig

SCORE = ["score", "--input", "a", "--output", "b", "--reference", "c"]
ITERATE = ["iterate", "--input", "a", "--output", "b", "--reference", "c", "--base", "d"]
TRAIN = ["train", "--input", "a", "--output", "b", "--model", "c"]


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
    """A directory with a comma in its name is one set. Written settings no longer depend on existing directories."""
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


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help_without_python_types(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main([name, "--help"])
    assert caught.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    assert COMMANDS[name].__doc__ in text
    for noise in ("Annotated", "<class", "Optional[", "default: None", "Field"):
        assert noise not in text


def test_home_directories_are_expanded(
    configured: Callable[[list[str]], Config], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Shells expand `~` only at the beginning of a word."""
    monkeypatch.setenv("HOME", "/home/me")
    file = tmp_path / "run.yaml"
    file.write_text("input: ~/a,~/b\neval_input: [~/c]\nmix: {'~/d,~/e': 0.5}\nmodel: ~/m")
    config = configured(["train", f"--config={file}", "--output=~/run"])
    assert isinstance(config, TrainConfig)
    assert [str(path) for path in (*config.input, *config.eval_input)] == ["/home/me/a", "/home/me/b", "/home/me/c"]
    assert config.mix == {"/home/me/d,/home/me/e": 0.5}
    assert (config.model, str(config.output)) == ("/home/me/m", "/home/me/run")
    report = configured(["inspect", "~/a", "--html=~/page.html"])
    assert (str(report.set), str(report.html)) == ("/home/me/a", "/home/me/page.html")


def test_an_unknown_home_directory_is_an_error(complaint: Callable[[list[str], int], str]) -> None:
    message = "no home directory for '~nobody-here'; write './~nobody-here/a' for a name that starts with ~"
    assert complaint(["inspect", "~nobody-here/a"], 2) == (
        f"wmtp inspect: error: SET: {message}; see 'wmtp inspect --help'"
    )
    assert complaint(["evaluate", "--model=~nobody-here/a", "--input=b"], 2) == (
        f"wmtp evaluate: error: --model: {message}; see 'wmtp evaluate --help'"
    )


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
