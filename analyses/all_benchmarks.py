"""Every section of docs/benchmarks.md in one run: `python -m hilbertcell.analyses.all_benchmarks` (`make bench`).

What is measured in seconds runs alone; the rest one process per core. Sections made before are thrown away first, so
that the page holds the figures of this run, and says of each when it was made and how long it took.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from rich.console import Console

from hilbertcell.analyses.benchmark_page import BY_HAND, PARTS, TIMES, assemble, take_grid

_HERE = "hilbertcell.analyses"
GRID = (
    "grid",
    ("hilbertcell", "benchmark", "--config", "analyses/benchmarks/shared.toml", "--out", ".benchmark"),
)
BESIDE = (  # the longest first
    ("calibration", (f"{_HERE}.calibration_benchmark",)),
    ("bodenmiller", (f"{_HERE}.first_benchmarks", "--only", "bodenmiller", "--few-shot-draws", "5")),
    ("simulated_unseen_batch", (f"{_HERE}.simulated_benchmark", "--only", "unseen_batch", "--seeds", "1")),
    (
        "simulated_unseen_perturbation",
        (f"{_HERE}.simulated_benchmark", "--only", "unseen_perturbation", "--seeds", "1"),
    ),
    ("simulated_unseen_pair", (f"{_HERE}.simulated_benchmark", "--only", "unseen_pair", "--seeds", "1")),
    ("simulated_structure", (f"{_HERE}.simulated_benchmark", "--only", "structure", "--seeds", "1")),
    ("kang_cells", (f"{_HERE}.first_benchmarks", "--only", "kang")),
)
ALONE = (("count_transport", (f"{_HERE}.transport_benchmark",)), ("size", (f"{_HERE}.size_benchmark",)))
type Section = tuple[str, tuple[str, ...]]


def run_section(section: Section, log: Path) -> dict[str, Any]:
    """Run a module; when it began, its seconds and the load it met. Raises: CalledProcessError if it fails."""
    name, (module, *arguments) = section
    began, start, load = time.strftime("%Y-%m-%d %H:%M"), time.perf_counter(), os.getloadavg()[0]
    with (log / f"{name}.log").open("w") as file:
        command = [sys.executable, "-m", module, *arguments]
        subprocess.run(command, check=True, stdout=file, stderr=subprocess.STDOUT)
    return {"date": began, "seconds": round(time.perf_counter() - start, 1), "load": round(load, 1)}


def run_all(
    first: Sequence[Section], beside: Sequence[Section], alone: Sequence[Section], docs: Path, log: Path
) -> list[str]:
    """Run all sections and write their times; names of those that failed, whose output stands in `log`."""
    log.mkdir(parents=True, exist_ok=True)
    console = Console(stderr=True)
    times: dict[str, dict[str, Any]] = {}
    failed: list[str] = []

    def one(section: Section) -> None:
        try:
            times[section[0]] = run_section(section, log)
            console.print(f"{section[0]}: {times[section[0]]['seconds'] / 60:.1f} min")
        except subprocess.CalledProcessError:
            failed.append(section[0])
            console.print(f"{section[0]} failed: see {log / section[0]}.log")

    for together, number in ((first, 1), (beside, len(os.sched_getaffinity(0))), (alone, 1)):
        with ThreadPoolExecutor(number) as pool:
            list(pool.map(one, together))
    (docs / "_parts" / TIMES).write_text(json.dumps(times, indent=1) + "\n")
    return failed


def main() -> None:
    """Run everything, write the page; exit code 1 if a section failed."""
    parser = argparse.ArgumentParser(prog="hilbertcell.analyses.all_benchmarks", description=__doc__)
    parser.add_argument(
        "--log", type=Path, default=Path(".benchmark/log"), help="folder of the sections' output"
    )
    options = parser.parse_args()
    docs = Path("docs")
    (docs / "_parts").mkdir(parents=True, exist_ok=True)
    for part in PARTS:
        if part not in BY_HAND:
            (docs / "_parts" / f"{part}.md").unlink(missing_ok=True)
    failed = run_all([GRID], BESIDE, ALONE, docs, options.log)
    if "grid" not in failed:
        take_grid(Path(".benchmark"), docs)
    (docs / "benchmarks.md").write_text(assemble(docs))
    if failed:
        sys.exit(1)


if __name__ == "__main__":
    main()
