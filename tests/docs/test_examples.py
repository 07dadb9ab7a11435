"""The how-tos and the README do what they say: every block is run, in order, in a folder with the files they speak of.

Fits take thirty steps here; nothing else differs from what a reader gets. Blocks marked `:class: not-run` (minutes of NUTS
or of a benchmark, published files) are only checked for commands and options that exist (`tests/analyses/test_cli.py`).
"""

import os
import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner

import hilbertcell.inference.fit as fit_module
from hilbertcell.analyses.benchmark_config import BenchmarkConfig
from hilbertcell.analyses.cli import app
from tests.docs.pages import ROOT, Block, blocks, commands

HOWTOS = sorted((ROOT / "docs/howto").glob("*.md"))
# Run by tests/inference/pyro/test_howto.py, which needs torch; lines to be written into the source.
ELSEWHERE = {"torch", "add_a_site"}
README = ROOT / "README.md"


def run(page_blocks: list[Block], folder: Path) -> None:
    """Run blocks in `folder`; Python blocks share their names. Captioned ones are files."""
    names: dict[str, object] = {"__name__": "page"}
    for block in page_blocks:
        if block.caption is not None:
            (folder / block.caption).write_text(block.text)
        elif block.runs and block.language == "sh":
            for words in commands(block.text):
                done = CliRunner().invoke(app, words, catch_exceptions=False)
                assert done.exit_code == 0, f"hilbertcell {' '.join(words)}\n{done.output}"
        elif block.runs and block.language == "python":
            exec(compile(block.text, "page", "exec"), names)  # noqa: S102 - to run it is the point


@pytest.fixture
def folder(world, tmp_path, monkeypatch):
    """A copy of the world, as the current folder; fits are short."""
    shutil.copytree(world, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(fit_module, "usual_steps", lambda observations: 30)
    return tmp_path


@pytest.mark.slow
@pytest.mark.parametrize("page", [p for p in HOWTOS if p.stem not in ELSEWHERE], ids=lambda page: page.stem)
def test_a_howto_runs(page, folder):
    run(blocks(page), folder)


@pytest.mark.slow
def test_the_readme_runs(folder):
    shutil.rmtree(folder / "fit")
    usable = [b for b in blocks(README) if b.language == "python" or "hilbertcell inspect" in b.text]
    assert len(usable) == 2
    run(usable, folder)


@pytest.mark.slow
def test_the_example_of_the_diffusion_runs(tmp_path):
    (example,) = [b for b in blocks(ROOT / "docs/models/hilbert_diffusion.md") if b.language == "python"]
    names: dict[str, object] = {}
    exec(compile(example.text, "page", "exec"), names)  # noqa: S102 - see above
    assert names["populations"].shape == (100, 5, 2)
    assert names["densities"].shape == (100, 5)


def test_a_line_that_is_no_command_is_not_passed_over():
    assert commands('keys="--a b"\nhilbertcell fit x $keys \\\n  --out y # a comment\n') == [
        ["fit", "x", "--a", "b", "--out", "y"]
    ]
    with pytest.raises(ValueError, match="is no hilbertcell command"):
        commands("make demo\n")


def test_the_grid_is_a_configuration(tmp_path, monkeypatch):
    """Running it takes minutes; `make bench-quick` runs such a grid."""
    monkeypatch.chdir(tmp_path)
    (grid,) = [b for b in blocks(ROOT / "docs/howto/benchmark_grid.md") if b.caption == "grid.toml"]
    (tmp_path / "grid.toml").write_text(grid.text)
    (tmp_path / "screen.h5ad").touch()
    assert BenchmarkConfig.from_toml("grid.toml").data_set[0].file == Path("screen.h5ad")


def test_every_howto_shows_something():
    for page in HOWTOS:
        assert blocks(page) or page.stem in ELSEWHERE, page.name
        assert len(page.read_text().splitlines()) <= 100, page.name


def test_a_failing_command_is_seen(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(AssertionError, match=r"absent\.h5ad"):
        run([Block("sh", "hilbertcell inspect absent.h5ad", None, True)], Path(os.curdir))
