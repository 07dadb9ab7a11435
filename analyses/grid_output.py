"""Run a benchmark and write what people look at: table, tidy scores, figure."""

import json
from pathlib import Path

from hilbertcell.analyses.benchmark_config import BenchmarkConfig
from hilbertcell.analyses.benchmark_grid import Outcome, run_grid
from hilbertcell.analyses.grid_figure import grid_figure
from hilbertcell.analyses.grid_store import read_cells
from hilbertcell.analyses.grid_summary import grid_markdown, summarise_grid, tidy
from hilbertcell.analyses.law_summary import jsonable


def run_and_write(
    config: BenchmarkConfig, out: Path, workers: int | None = None, progress: bool = False
) -> Outcome:
    """`run_grid`, then under `out`: scores.nc (tidy), summary.json, table.md and figure.png, each whole or not at all.

    Raises: what `run_grid` raises, and ValueError if every cell failed.
    """
    out.mkdir(parents=True, exist_ok=True)
    outcome = run_grid(config, out, workers, progress)
    if not outcome.paths:
        raise ValueError(f"nothing was computed: {'; '.join(outcome.failed[:3])}")
    cells = list(read_cells(outcome.paths))
    rows = summarise_grid(cells)
    temporary = out / "scores.part.nc"
    tidy(cells).to_netcdf(temporary, engine="h5netcdf")
    temporary.replace(out / "scores.nc")
    _write(out / "summary.json", json.dumps(jsonable(rows), indent=1, allow_nan=False) + "\n")
    _write(out / "table.md", grid_markdown(rows, outcome.failed))
    grid_figure(rows, out / "figure.png")
    return outcome


def _write(path: Path, text: str) -> None:
    temporary = path.with_name(path.name + ".part")
    temporary.write_text(text)
    temporary.replace(path)
