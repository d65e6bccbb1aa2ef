"""Settings, markers and order of all tests. Shared fixtures are in `support`; they download nothing."""

import signal

import pytest
from hypothesis import settings

pytest_plugins = ["model_fixtures", "process_fixtures", "shard_set_fixtures", "store_fixtures", "text_sets"]

LONG_FILES = {
    "test_network.py", "test_end_to_end.py", "test_run.py", "test_driver.py", "test_distributed.py", "test_train.py",
}  # fmt: skip
LOADING_VLLM = {"test_real_model.py", "test_vllm_engine.py", "test_vllm_scorer.py"}
INTEGRATION_FIXTURES = {
    "_running_ray", "running_ray", "cluster", "scoring", "vllm_installed", "bucket", "start_process", "launch"
}  # fmt: skip

settings.register_profile("default", deadline=None)  # a busy machine is not a failure
settings.load_profile("default")

# Processes that a shell starts in the background ignore SIGINT, as do their children, but tests send them SIGINT.
signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the option that `make gpu ARGS=--rehearse` uses."""
    parser.addoption("--rehearse", action="store_true", help="run the tests marked gpu on the CPU, in small")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Add markers derived from other markers, fixtures or parameters, and order the files.

    Slow files come first, to keep parallel processes busy until the end. Files that load vLLM in the process of the
    tests come last: it permanently modifies classes of transformers, and keeps a process group.
    """
    for item in items:
        if item.get_closest_marker("soak"):
            item.add_marker("slow")
        parameters = item.callspec.params.values() if hasattr(item, "callspec") else ()
        if not INTEGRATION_FIXTURES.isdisjoint(item.fixturenames) or any("vllm" in str(value) for value in parameters):
            item.add_marker("integration")
    order = dict.fromkeys(LONG_FILES, 0) | dict.fromkeys(LOADING_VLLM, 2)
    items.sort(key=lambda item: order.get(item.path.name, 1))
