"""Without the extra: the core works, the twin says what to install. Torch is blocked in a process of its own."""

import subprocess
import sys

import pytest

BLOCK = """
import sys
from importlib.abc import MetaPathFinder

class Block(MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("torch", "pyro"):
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, Block())
import importlib.util
found = importlib.util.find_spec
importlib.util.find_spec = lambda name, *a: None if name.split(".")[0] in ("torch", "pyro") else found(name, *a)
"""


def run(code: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", BLOCK + code], capture_output=True, text=True, check=False)


@pytest.mark.parametrize("twin", ["models.pyro.hidden_factors", "inference.pyro.fit"])
def test_asking_for_the_twin_gives_one_sentence(twin):
    done = run(f"import hilbertcell.{twin}")
    assert done.returncode
    assert done.stderr.splitlines()[-1] == (
        "ImportError: hilbertcell.models.pyro needs torch and Pyro: pip install 'hilbertcell[torch]'"
    )


def test_the_core_works():
    done = run(
        "import hilbertcell.inference.fit, hilbertcell.inference.draws, hilbertcell.models.response_program\n"
        "import hilbertcell.analyses.cli, hilbertcell.analyses.benchmark_page\n"
        "assert not {'torch', 'pyro'} & set(sys.modules)"
    )
    assert done.returncode == 0, done.stderr
