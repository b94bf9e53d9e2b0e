"""Settings of the whole suite. Must stay free of jax: the flags below only count before jax starts."""

import gc
import os
import shutil
import sys
import tempfile

FLAGS = (
    # Eight virtual CPU devices for the tests of tensor parallelism. Measured: they cost single-device tests nothing.
    "--xla_force_host_platform_device_count=8",
    # Without LLVM's optimisations: they are nearly half of what compiling an engine takes, and compiling is most of the
    # suite. XLA's own passes stay. The README's examples run with everything on.
    "--xla_backend_optimization_level=0",
)
"""Each counts where XLA_FLAGS does not set it already."""

given_flags = os.environ.get("XLA_FLAGS", "")
os.environ["XLA_FLAGS"] = " ".join([given_flags, *(f for f in FLAGS if f.split("=")[0] not in given_flags)]).strip()

from collections.abc import Iterator
from functools import partial
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


@pytest.fixture(autouse=True, scope="module")
def no_programs_of_other_files() -> Iterator[None]:
    """Frees the programs that a file compiled. Each maps memory of its own, 10 times or more, and a process with more
    than vm.max_map_count maps (65,530) dies: one that had half the suite behind it did.
    """
    yield
    if "jax" in sys.modules:
        sys.modules["jax"].clear_caches()
        gc.collect()


def pytest_configure(config: pytest.Config) -> None:
    """Gives the run a compile cache of its own, before any fixture starts an engine: equal engines of all files and
    workers compile once, and nobody reads or fills the user's. Loads count as compiles do (`CompileCounter`).
    """
    if hasattr(config, "workerinput"):  # a worker of pytest-xdist: it has the environment of the process that made it
        return
    folder = tempfile.mkdtemp(prefix="jaxinfer-compiled-")
    os.environ["JAXINFER_COMPILE_CACHE"] = folder
    config.add_cleanup(partial(shutil.rmtree, folder, ignore_errors=True))


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
