"""What all tests share: where the real data lie, what must not be skipped, and that no test changes jax for the next.

HILBERTCELL_DATA     the folder of real data sets, `../shared/data` beside the repository by default
HILBERTCELL_REQUIRE  things (commas or spaces between them) whose absence is a failure and not a skip: `data`,
                     `torch` (the extras `torch` and `torch-dev`), `browser` (the extra `browser` and a Chromium)
"""

import importlib.util
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

os.environ["MPLBACKEND"] = "Agg"  # before anything imports pyplot: no test may want a display

import pytest

ROOT = Path(__file__).resolve().parent.parent
OPTIONAL_THINGS = {"browser", "data", "torch"}
REQUIRED = set(re.split(r"[,\s]+", os.environ.get("HILBERTCELL_REQUIRE", ""))) - {""}


def pytest_configure() -> None:
    """A misspelt requirement would turn failures into skips, so it stops the run."""
    if unknown := REQUIRED - OPTIONAL_THINGS:
        raise pytest.UsageError(
            f"HILBERTCELL_REQUIRE names {', '.join(sorted(unknown))}; known: {', '.join(sorted(OPTIONAL_THINGS))}"
        )


def absent(thing: str, reason: str) -> None:
    """Skip the test for want of an optional thing, or fail it when the thing is required."""
    if thing in REQUIRED:
        pytest.fail(f"{reason} (required by HILBERTCELL_REQUIRE)", pytrace=False)
    pytest.skip(reason)


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """The folder of real data sets."""
    folder = Path(os.environ.get("HILBERTCELL_DATA", ROOT / "../shared/data")).resolve()
    if not any(folder.glob("*.h5ad")):
        absent("data", f"no h5ad files in {folder}; HILBERTCELL_DATA names the folder of real data sets")
    return folder


@pytest.fixture(scope="session")
def torch() -> ModuleType:
    """PyTorch, with what makes checkpoints as its users do."""
    missing = [name for name in ("torch", "omegaconf", "lightning") if importlib.util.find_spec(name) is None]
    if missing:
        absent("torch", f"no {', '.join(missing)}; install the extras torch and torch-dev")
    return importlib.import_module("torch")


@pytest.fixture(scope="session")
def pyro(torch: ModuleType) -> ModuleType:
    """Pyro."""
    if importlib.util.find_spec("pyro") is None:
        absent("torch", "no pyro-ppl; install the extra torch")
    torch.set_num_threads(1)  # tensors of tests are small: threads would only wait for each other
    return importlib.import_module("pyro")


@pytest.fixture(autouse=True)
def _jax_flags_unchanged() -> Iterator[None]:
    """Global flags are process-wide: a test that changes one changes the meaning of every later test."""
    before = dict(sys.modules["jax"].config.values) if "jax" in sys.modules else None
    yield
    if before is not None:
        after = sys.modules["jax"].config.values
        changed = [name for name, value in after.items() if before.get(name, value) != value]
        assert not changed, f"the test changed the jax flags {', '.join(changed)}"
