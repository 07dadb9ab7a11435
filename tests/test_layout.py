"""The house: package map, import direction, light start, file sizes, no pickle."""

import ast
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
ROOMS = ("models", "inference", "data", "analyses")
MAY_IMPORT = {
    "models": {"models"},
    "data": {"data"},
    "inference": {"inference", "models", "data"},
    "analyses": {"analyses", "inference", "models", "data"},
}
SOURCES = sorted(path for room in ROOMS for path in (ROOT / room).rglob("*.py"))
ALL_PYTHON = sorted(
    path for folder in ("hilbertcell", *ROOMS, "tests", "scripts") for path in (ROOT / folder).rglob("*.py")
)


def run(*arguments: str, cwd: Path | None = None) -> str:
    """Standard output of a fresh Python process, which must succeed."""
    done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, cwd=cwd, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def imported_modules(path: Path) -> set[str]:
    """Every module a file imports, at the top or inside a function, in the dotted form."""
    modules = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            modules |= {name.name for name in node.names}
        elif isinstance(node, ast.ImportFrom):
            start = "." * node.level + (node.module or "")
            modules |= {f"{start}.{name.name}" for name in node.names}
    return modules


def test_package_list_equals_the_tree():
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    folders = {ROOT / "hilbertcell"} | {path.parent for path in SOURCES}
    tree = {
        "hilbertcell"
        if folder.name == "hilbertcell"
        else f"hilbertcell.{folder.relative_to(ROOT)}".replace("/", ".")
        for folder in folders
    }
    assert set(settings["packages"]) == tree
    assert all((folder / "__init__.py").is_file() for folder in folders)
    for package in tree:
        parent = max(
            (name for name in settings["package-dir"] if f"{package}.".startswith(f"{name}.")), key=len
        )
        inside = package.removeprefix(parent).replace(".", "/")
        assert (ROOT / (settings["package-dir"][parent] + inside) / "__init__.py").is_file(), package


@pytest.mark.parametrize("room", ROOMS)
def test_imports_go_one_way(room):
    offences = [
        f"{path.relative_to(ROOT)} imports {module}"
        for path in SOURCES
        if path.relative_to(ROOT).parts[0] == room
        for module in imported_modules(path)
        if module.split(".")[0] == "hilbertcell" and module.split(".")[1] in set(ROOMS) - MAY_IMPORT[room]
    ]
    assert not offences


def test_no_import_is_relative():
    """A relative import hides the room it comes from."""
    assert not [path for path in SOURCES for name in imported_modules(path) if name.startswith(".")]


def test_anndata_ends_at_data():
    offences = [
        str(path.relative_to(ROOT))
        for path in (ROOT / "models").rglob("*.py")
        if any(module.split(".")[0] in {"anndata", "h5py", "xarray"} for module in imported_modules(path))
    ]
    assert not offences


def test_help_starts_light():
    code = (
        "import sys\nfrom hilbertcell.analyses.cli import main\n"
        "sys.argv = ['hilbertcell', 'fit', '--help']\n"
        "try:\n    main()\nexcept SystemExit as end:\n    assert not end.code, end.code\n"
        "heavy = {'jax', 'numpyro', 'arviz', 'anndata', 'xarray', 'pandas', 'scipy', 'matplotlib'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    assert "--perturbation" in run("-c", code)


def test_importing_the_package_imports_nothing_heavy():
    run(
        "-c",
        "import sys, hilbertcell; assert not {'jax', 'numpy', 'anndata'} & set(sys.modules); hilbertcell.__version__",
    )


def modules(*, twin: bool) -> list[str]:
    """Names of all modules, those of the torch twin only if asked for."""
    names = [f"hilbertcell.{path.relative_to(ROOT).with_suffix('')}".replace("/", ".") for path in SOURCES]
    return [name.removesuffix(".__init__") for name in names if twin or ".pyro" not in name]


WITHOUT_TORCH = """
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("torch", "pyro"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Absent())
"""


def test_the_core_needs_no_torch_and_importing_it_changes_no_global_flag():
    code = WITHOUT_TORCH + (
        "import importlib, warnings\nimport jax, matplotlib, numpy, numpyro, pandas, xarray, anndata\n"
        "def state(): return dict(jax.config.values), matplotlib.rcParams.copy(), numpy.geterr(), warnings.filters[:]\n"
        "before = state()\n"
        f"for name in {modules(twin=False)!r}: importlib.import_module(name)\n"
        "after = state()\n"
        "for b, a in zip(before, after): assert a == b, (b, a)\n"
        "import jax.numpy as jnp\n"
        "from hilbertcell.inference.samplers import split_sampler\n"
        "from hilbertcell.models.denoisers import Condition, gaussian_denoiser\n"
        "law = Condition(jnp.zeros(2), jnp.eye(2), jnp.ones(2), jnp.zeros(0))\n"
        "assert jnp.isfinite(split_sampler(jax.random.key(0), gaussian_denoiser, law, 0.0)).all()\n"
    )
    run("-c", code)


def test_without_torch_every_module_of_the_twin_says_what_it_needs():
    code = WITHOUT_TORCH + (
        "import importlib\n"
        f"for name in {sorted(set(modules(twin=True)) - set(modules(twin=False)))!r}:\n"
        "    try: importlib.import_module(name)\n"
        "    except ImportError as error: assert \"pip install 'hilbertcell[torch]'\" in str(error), (name, error)\n"
        "    else: raise AssertionError(f'{name} was imported without torch')\n"
    )
    run("-c", code)


def test_importing_the_twin_changes_no_flag(pyro):
    code = (
        "import importlib, jax, pyro, torch\n"
        "def state(): return dict(jax.config.values), torch.get_default_dtype(), torch.get_default_device(), torch.is_grad_enabled(), "
        "torch.get_num_threads(), torch.get_float32_matmul_precision(), torch.initial_seed()\n"
        "before = state()\n"
        f"for name in {sorted(set(modules(twin=True)) - set(modules(twin=False)))!r}: importlib.import_module(name)\n"
        "assert state() == before, (before, state())\n"
    )
    run("-c", code)


def test_bare_folders_are_not_importable_elsewhere(tmp_path):
    for room in ROOMS:
        run("-c", f"import importlib.util; assert importlib.util.find_spec({room!r}) is None", cwd=tmp_path)
    run("-c", "import hilbertcell.models, hilbertcell.data", cwd=tmp_path)


def test_no_bare_room_was_imported_by_the_tests():
    assert not set(ROOMS) & set(sys.modules)


def test_files_are_short():
    lengths = {str(path.relative_to(ROOT)): len(path.read_text().splitlines()) for path in ALL_PYTHON}
    assert {name: length for name, length in lengths.items() if length > 400} == {}


def test_no_pickle():
    forbidden = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve"}
    for path in ALL_PYTHON:
        if path == Path(__file__).resolve():
            continue
        assert not forbidden & {module.split(".")[0] for module in imported_modules(path)}, path
        assert "allow_pickle=True" not in path.read_text(), path


def test_every_public_name_resolves():
    run("-c", "import hilbertcell\nfor name in hilbertcell.__all__: getattr(hilbertcell, name)")


def test_unknown_public_name_lists_the_known_ones():
    import hilbertcell

    with pytest.raises(AttributeError, match=r"no attribute 'fitt'; it offers .*load_fit"):
        _ = hilbertcell.fitt
