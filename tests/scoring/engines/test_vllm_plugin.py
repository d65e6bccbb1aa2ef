import subprocess
import sys
from importlib.metadata import entry_points

import pytest

from weighted_mtp.scoring.engines.vllm_plugin import SCORE_TOKENS, register

HEAVY = ("numpy", "pandas", "polars", "pyarrow", "pydantic", "ray", "torch", "transformers", "vllm")


@pytest.mark.usefixtures("vllm_installed")
def test_plugin_does_nothing_by_default(monkeypatch):
    from vllm.model_executor.models import ModelRegistry

    monkeypatch.delenv(SCORE_TOKENS, raising=False)
    before = dict(ModelRegistry.models)
    register()
    assert ModelRegistry.models == before


def test_plugin_is_what_vllm_finds():
    (entry,) = entry_points(group="vllm.general_plugins", name="weighted_mtp")
    assert entry.load() is register


def test_plugin_imports_nothing_heavy_by_default(monkeypatch):
    """Every use of vLLM in the environment imports the plugin."""
    monkeypatch.delenv(SCORE_TOKENS, raising=False)
    script = (
        "import sys\nfrom weighted_mtp.scoring.engines.vllm_plugin import register\nregister()\n"
        f"print(*sorted(sys.modules.keys() & set({HEAVY})))"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert result.stdout.split() == []
