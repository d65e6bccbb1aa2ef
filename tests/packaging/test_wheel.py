"""The wheel and the sdist: what they install, and that it runs beside modules of the user with the same names."""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
from collections.abc import Callable
from pathlib import Path
from zipfile import ZipFile

import pytest

pytestmark = pytest.mark.integration

REPOSITORY = Path(__file__).parents[2]
FOLDERS = ("data", "pipelines", "schemas", "scoring", "training")
BUILD_SDIST = "import sys; from setuptools import build_meta; print(build_meta.build_sdist(sys.argv[1]))"
SHADOWING = "raise RuntimeError('a module of the user was imported')\n"


def call(*command: object, cwd: Path | None = None) -> str:
    """Run a command without the import path of this process; return what it printed."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(list(map(str, command)), cwd=cwd, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def modules(names: list[str]) -> set[str]:
    """The Python modules among paths, as paths inside the package `weighted_mtp`."""
    return {name[name.index("weighted_mtp/") :] for name in names if name.endswith(".py") and "weighted_mtp/" in name}


def build_wheel(source: Path, directory: Path) -> Path:
    call(sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index", "-w",
         directory, source)  # fmt: skip
    (wheel,) = directory.glob("*.whl")
    return wheel


def top_level(wheel: Path) -> set[str]:
    """The only names that a wheel may put into site-packages."""
    name, version, *_ = wheel.name.split("-")
    assert name == "weighted_mtp"
    return {name, f"{name}-{version}.dist-info"}


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the checkout, in which setuptools leaves its files."""
    copy = tmp_path_factory.mktemp("checkout")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(REPOSITORY / name, copy)
    for name in ("weighted_mtp", *FOLDERS):
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(REPOSITORY / name, copy / name, symlinks=True, ignore=ignored)
    return copy


@pytest.fixture(scope="module")
def wheel(checkout: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_wheel(checkout, tmp_path_factory.mktemp("wheel"))


def test_the_wheel_holds_every_module_under_one_name(wheel: Path) -> None:
    names = ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names} == top_level(wheel)
    expected = {"weighted_mtp/__init__.py", "weighted_mtp/__main__.py"}
    for folder in FOLDERS:
        expected |= {f"weighted_mtp/{path.relative_to(REPOSITORY)}" for path in (REPOSITORY / folder).rglob("*.py")}
    assert modules(names) == expected


def test_a_wheel_from_the_sdist_is_the_wheel_from_the_checkout(wheel: Path, checkout: Path, tmp_path: Path) -> None:
    call(sys.executable, "-c", BUILD_SDIST, tmp_path, cwd=checkout)
    (sdist,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        assert all(member.isfile() or member.isdir() for member in archive), "files instead of links"
        assert modules(archive.getnames()) == modules(ZipFile(wheel).namelist())
    rebuilt = build_wheel(sdist, tmp_path / "rebuilt")
    assert rebuilt.name == wheel.name
    contents = [{name: ZipFile(path).read(name) for name in ZipFile(path).namelist()} for path in (wheel, rebuilt)]
    assert contents[0] == contents[1]


@pytest.fixture(scope="module")
def bin_directory(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Programs of an environment with the wheel; its dependencies are those of this environment."""
    environment = tmp_path_factory.mktemp("environment")
    call(sys.executable, "-m", "venv", "--without-pip", environment)
    python = environment / "bin" / "python"
    site_packages = Path(call(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip())
    call(sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-deps", "--no-index", wheel)
    assert {path.name for path in site_packages.iterdir()} == top_level(wheel)
    # Files *.pth in a directory named by a .pth file are not read: an editable install there stays invisible.
    (site_packages / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return environment / "bin"


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A directory with modules of the user that have the names of folders of this project."""
    for name in ("data", "scoring"):
        (tmp_path / f"{name}.py").write_text(SHADOWING)
    for name in ("schemas", "training", "pipelines"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text(SHADOWING)
    return tmp_path


@pytest.mark.slow
def test_an_installed_wheel_prepares_scores_and_trains_beside_modules_of_the_same_names(
    bin_directory: Path,
    project: Path,
    tokenizer_dir: Path,
    make_model: Callable[..., Path],
    vllm_installed: None,
) -> None:
    def wmtp(*arguments: object) -> str:
        return call(bin_directory / "wmtp", *arguments, cwd=project)

    imported = call(bin_directory / "python", "-P", "-c", "import weighted_mtp; print(weighted_mtp.__file__)")
    assert Path(imported.strip()).is_relative_to(bin_directory.parent)
    corpus = [json.dumps({"text": f"Document {number} says that foxes jump over dogs."}) for number in range(40)]
    (project / "corpus.jsonl").write_text("\n".join(corpus))
    model = make_model()
    wmtp("prepare", "--input", "corpus.jsonl", "--tokenizer", tokenizer_dir, "--output", "tokens")
    wmtp("score", "--input", "tokens", "--output", "scored", "--reference", model, "--engine", "vllm")
    columns = json.loads((project / "scored" / "manifest.json").read_text())["columns"]
    assert columns["loss_reference"]["origin"]["engine"] == "vllm"
    wmtp("train", "--input", "scored", "--model", model, "--output", "run", "--max_steps", 2, "--batch_size", 2,
         "--sequence_length", 64, "--weights.formula", "top(loss_reference, 0.5)")  # fmt: skip
    assert json.loads((project / "run" / "summary.json").read_text())["steps"] == 2
