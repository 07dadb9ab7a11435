"""A tiny screen, and the command line in this process, for the tests of the commands."""

import re
from collections.abc import Callable
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import pytest
from typer.testing import CliRunner

from hilbertcell.analyses.cli import app


@pytest.fixture
def screen() -> anndata.AnnData:
    """Counts of 3 donors x 2 cell types x (DMSO, A, B), 12 cells each, 8 genes; A doubles the first gene."""
    rng = np.random.default_rng(5)
    rows = [
        (drug, cell_type, donor)
        for donor in ("d1", "d2", "d3")
        for cell_type in ("B", "T")
        for drug in ("DMSO", "A", "B")
        for _ in range(12)
    ]
    obs = pd.DataFrame(rows, columns=["drug", "cell_type", "donor"])
    obs.index = pd.Index([f"cell{i}" for i in range(len(obs))], dtype=str)
    rate = np.full((len(obs), 8), 6.0)
    rate[:, 0] *= np.where(obs["drug"] == "A", 2.0, 1.0)
    var = pd.DataFrame(index=pd.Index([f"gene{i}" for i in range(8)], dtype=str))
    return anndata.AnnData(X=rng.poisson(rate).astype(np.float32), obs=obs, var=var)


@pytest.fixture
def screen_file(screen, tmp_path) -> Path:
    """The tiny screen as h5ad."""
    path = tmp_path / "screen.h5ad"
    screen.write_h5ad(path)
    return path


@pytest.fixture
def keys() -> Callable[..., list[str]]:
    """The key options of the tiny screen, with some changed or added (None takes one away)."""

    def options(**changes: object) -> list[str]:
        own = {"perturbation": "drug", "control": "DMSO", "context": "cell_type", "batch": "donor"} | changes
        return [
            text
            for name, value in own.items()
            if value is not None
            for text in (f"--{name.replace('_', '-')}", str(value))
        ]

    return options


@pytest.fixture
def call(monkeypatch) -> Callable[..., tuple[int, str]]:
    """Run the command line in this process: (exit code, its text without boxes and line breaks)."""
    monkeypatch.setenv("COLUMNS", "100")

    def run(*arguments: object) -> tuple[int, str]:
        result = CliRunner().invoke(app, [str(argument) for argument in arguments])
        return result.exit_code, re.sub(r"[\s│╭╮╰╯─]+", " ", result.output)

    return run
