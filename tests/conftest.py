"""Settings of the whole suite. Must stay free of jax: the flags below only count before jax starts."""

import gc
import os
import sys

# Eight virtual CPU devices for the tests of tensor parallelism. Measured: they cost single-device tests nothing.
DEVICES_FLAG = "--xla_force_host_platform_device_count=8"
if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {DEVICES_FLAG}".strip()

from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

# Compiling makes the first example slow, so no deadline. "ci" repeats the same examples; "dev" looks for new ones.
settings.register_profile("ci", deadline=None, derandomize=True, database=None)
settings.register_profile("dev", deadline=None)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))

REPOSITORY = Path(__file__).resolve().parent.parent


# Beside the tests that carry the mark themselves: what leans most on jax, in files that are quick.
SMOKE_FILES = (
    "checkpoints/test_orbax_store.py",
    "jaxinfer/test_engine.py",
    "jaxinfer/test_parity.py",
    "pallas_kernels/ragged_paged_attention/test_cases.py",
)


@pytest.fixture(scope="session")
def repository() -> Path:
    """The root of the source tree."""
    return REPOSITORY


@pytest.fixture(autouse=True)
def private_compile_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    """No test reads or fills the user's own compile cache; a test that is about the cache names its folder."""
    monkeypatch.setenv("JAXINFER_COMPILE_CACHE", "off")


@pytest.fixture(autouse=True, scope="module")
def no_programs_of_other_files() -> Iterator[None]:
    """Frees the programs that a file compiled. Each maps memory of its own, 10 times or more, and a process with more
    than vm.max_map_count maps (65,530) dies: one that had half the suite behind it did.
    """
    yield
    if "jax" in sys.modules:
        sys.modules["jax"].clear_caches()
        gc.collect()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Adds `smoke` to SMOKE_FILES, and skips `hardware` where there is none.

    Asking jax for its devices starts it, so that happens only when such a test was collected.
    """
    for item in items:
        if str(item.path).endswith(SMOKE_FILES):
            item.add_marker(pytest.mark.smoke)
    marked = [item for item in items if item.get_closest_marker("hardware")]
    if not marked:
        return
    import jax

    if jax.default_backend() == "cpu":
        skip = pytest.mark.skip(reason="needs a TPU or a GPU; jax found only a CPU")
        for item in marked:
            item.add_marker(skip)
