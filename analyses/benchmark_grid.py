"""Data sets x splits x seeds x folds x models: run what is missing, keep every cell of the table.

One process per core takes one data set after the other: the file is read once, and all folds of a data set run in one
process, which compiles a program of their shape once.
"""

import os
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from rich.progress import Progress

from hilbertcell.analyses.benchmark import (
    MODEL,
    Embedding,
    cell_fold,
    fit_fold,
    law_fold,
    shared_embedding,
    training_source,
)
from hilbertcell.analyses.benchmark_config import BenchmarkConfig, DataSet
from hilbertcell.analyses.benchmark_folds import folds
from hilbertcell.analyses.bounds import CEILING, FLOOR, halves, replicate_ceiling, sampling_floor
from hilbertcell.analyses.grid_store import (
    cell_path,
    code_hash,
    file_hash,
    law_record,
    unit_record,
    write_cell,
)
from hilbertcell.analyses.neural_predictors import PERTURBDIFF, perturbdiff_fitter, perturbdiff_key
from hilbertcell.analyses.planted_frauds import SHUFFLED, planted
from hilbertcell.analyses.predictors import (
    Fitter,
    Predictor,
    Screen,
    baseline_fitters,
    hilbertcell_fitter,
)
from hilbertcell.analyses.shuffled import shuffle_batches
from hilbertcell.data.anndata_io import read_populations
from hilbertcell.data.populations import Populations
from hilbertcell.data.splits import Split, SplitError, labels_hash
from hilbertcell.data.workers import in_order
from hilbertcell.inference.settings import Settings

CELLS = "cells"  # the folder of the stored cells
# hilbertcell with another response law than its default: the setting `law` by the name of the row.
LAWS = {f"{MODEL}, {law}": law for law in ("diffusion", "auto")}


def settings_of(model: str, config: BenchmarkConfig) -> Settings:
    """Settings of the fits of one row of hilbertcell."""
    return config.settings.model_copy(update={"law": LAWS[model]} if model in LAWS else {})


def _own(model: str, config: BenchmarkConfig, seed: int) -> Fitter:
    return hilbertcell_fitter(config.num_samples, seed, settings_of(model, config))


# Rows that are made only where a configuration names them: what takes long. From configuration and seed to a fitter.
NAMED_ONLY: dict[str, Callable[[BenchmarkConfig, int], Fitter]] = {
    PERTURBDIFF: lambda config, seed: perturbdiff_fitter(config.num_samples, seed)
} | {model: partial(_own, model) for model in LAWS}


@dataclass(frozen=True)
class Outcome:
    """What a data set gave: where its cells are, how many were computed now, and which failed and why."""

    paths: tuple[Path, ...]
    computed: int
    failed: tuple[str, ...]


def model_names(config: BenchmarkConfig) -> list[str]:
    """Rows of the table, in order. Raises: ValueError for a model that is not known."""
    known = [MODEL, *baseline_fitters(2), CEILING, FLOOR]
    wanted = list(known if config.models is None else config.models)
    unknown = [name for name in wanted if name not in known and name not in NAMED_ONLY]
    if unknown:
        raise ValueError(
            f"models = {', '.join(unknown)}: not known; choose among {', '.join([*known, *NAMED_ONLY])}"
        )
    if not set(wanted) - {CEILING, FLOOR}:
        raise ValueError("models = only bounds, which nothing is compared with; add a baseline")
    return wanted


def run_grid(
    config: BenchmarkConfig, out: Path, workers: int | None = None, progress: bool = False
) -> Outcome:
    """Compute and store the cells that are missing under `out`/cells.

    A cell that exists is never computed again: its name is the hash of all it depends on (data, split, model, settings,
    seeds, version, source). A model that fails on a fold is named in `failed`, the others go on, and the next run
    tries it again. `workers` processes, by default one per core this process may use.

    Raises:
        DataError: a file cannot be read with its keys. SplitError: a split cannot be made with its labels.

    """
    model_names(config)
    workers = len(os.sched_getaffinity(0)) if workers is None else workers
    work = [(config, data_set, out / CELLS) for data_set in config.data_set]
    outcomes = []
    with Progress(transient=True, disable=not progress) as bar:
        task = bar.add_task(f"{len(work)} data sets", total=len(work))
        for outcome in in_order(run_data_set, work, workers):
            outcomes.append(outcome)
            bar.advance(task)
    return Outcome(
        tuple(path for one in outcomes for path in one.paths),
        sum(one.computed for one in outcomes),
        tuple(text for one in outcomes for text in one.failed),
    )


def run_data_set(work: tuple[BenchmarkConfig, DataSet, Path]) -> Outcome:
    """All cells of one data set; see `run_grid`."""
    config, data_set, folder = work
    assert config.folder is not None
    populations = read_data_set(data_set, config.folder)
    screen = Screen(populations)
    counts_alike = data_set.scale != "other"
    unit = np.ones(len(populations.genes)) if counts_alike else screen.table.total_sd()
    fixed = {
        "data_set": data_set.model_dump(mode="json", exclude={"splits", "file", "perturbation_features"}),
        "files": [file_hash(path) for path in config.model_copy(update={"data_set": (data_set,)}).files()],
        "labels_hash": labels_hash(populations.labels),
        "num_samples": config.num_samples,
        "version": version("hilbertcell"),
        "code": code_hash(),
    }
    paths: list[Path] = []
    failed: list[str] = []
    computed = 0
    for name, seed, fold, split in _every_fold(config, data_set, populations):
        place = {"data_set": data_set.name, "split": name, "seed": seed, "fold": fold}
        missing = {}
        for model in model_names(config):
            settings = perturbdiff_key() if model == PERTURBDIFF else None
            if model == MODEL or model in LAWS:
                settings = settings_of(model, config).model_dump(mode="json")
            hidden = {"held_out": split.held_out, "given": split.given}
            key = fixed | hidden | {"split": name, "seed": seed, "model": model, "settings": settings}
            path = cell_path(folder, key)
            paths.append(path)
            if not path.exists():
                missing[model] = (path, key)
        if not missing:
            continue
        source = training_source(screen, split, seed)
        embedding = shared_embedding(source, split, unit, seed)
        for model, (path, key) in missing.items():
            start = time.process_time()
            try:
                scores = score_fold(screen, source, split, model, config, embedding, seed)
            except Exception as error:  # noqa: BLE001 - one failing fit must not cost the others; it is reported
                reason = str(error).partition("\n")[0]
                failed.append(
                    f"{data_set.name}, {name}, fold {fold}, {model}: {type(error).__name__}: {reason}"
                )
                paths.remove(path)
                continue
            seconds = {"seconds": round(time.process_time() - start, 2)}
            write_cell(path, place | {"model": model, "key": key} | scores | seconds)
            computed += 1
    return Outcome(tuple(paths), computed, tuple(failed))


def read_data_set(data_set: DataSet, folder: Path) -> Populations:
    """Populations of one data set, without the contexts it leaves out. Raises: DataError as `read_populations`."""
    populations = read_populations(folder / data_set.file, **data_set.reading(folder))
    return populations.select((~populations.labels["context"].isin(data_set.without_context)).to_numpy())


def score_fold(
    screen: Screen,
    source: Screen,
    split: Split,
    model: str,
    config: BenchmarkConfig,
    embedding: Embedding,
    seed: int,
) -> dict[str, Any]:
    """Scores of one model on one fold, JSON-able: `law` where it has one, `cells` where it makes some for any unit.

    Those of hilbertcell hold `checks`: the same of each planted fraud, and of a fit to shuffled batches where the split
    leaves batches out.
    """
    truth = source
    if model == CEILING:
        first, second = halves(source.populations, list(split.held_out), seed)
        truth, predictor = Screen(second), replicate_ceiling(Screen(first), config.num_samples)
        screen = Screen(halves(screen.populations, list(split.held_out), seed)[1])
    elif model == FLOOR:
        predictor = sampling_floor(screen.table, config.num_samples)
    else:
        predictor = fit_fold(screen, split, _fitters(config, seed)[model], source)
    unit = embedding[1]
    record = _record(screen, truth, split, predictor, unit, seed, None if model == CEILING else embedding)
    if model == MODEL:
        targets = source.populations.labels.loc[list(split.held_out)]
        record["checks"] = {
            name: _record(screen, truth, split, fraud, unit, seed)
            for name, fraud in planted(predictor, targets).items()
        }
        if split.name == "unseen_batch":
            mixed = Screen(shuffle_batches(screen.populations, seed))
            again = replace(split, labels_hash=labels_hash(mixed.populations.labels))
            blind = replace(fit_fold(mixed, again, _fitters(config, seed)[MODEL]), cells=None)
            record["checks"][SHUFFLED] = _record(mixed, mixed, again, blind, unit, seed)
    return record


def _record(
    screen: Screen,
    truth: Screen,
    split: Split,
    predictor: Predictor,
    unit: np.ndarray,
    seed: int,
    embedding: Embedding | None = None,
) -> dict[str, Any]:
    """What is stored of a predictor; with an `embedding`, scores of whole populations too."""
    law, labels = law_fold(truth, split, {"": predictor}, unit, seed)
    units = cell_fold(screen, split, {"": predictor}, seed, embedding)
    record = {"law": law_record(law[""], labels)} if law else {}
    return record | ({"cells": unit_record(units[""])} if units else {})


def _fitters(config: BenchmarkConfig, seed: int) -> Mapping[str, Fitter]:
    named = {name: make(config, seed) for name, make in NAMED_ONLY.items() if name in model_names(config)}
    return baseline_fitters(config.num_samples) | {MODEL: _own(MODEL, config, seed)} | named


def _every_fold(
    config: BenchmarkConfig, data_set: DataSet, populations: Populations
) -> Iterator[tuple[str, int, int, Split]]:
    for name in data_set.splits:
        for seed in config.seeds:
            try:
                found = folds(populations.labels, name, seed, config.num_folds)
            except SplitError as error:
                raise SplitError(f"{data_set.name}: {error}") from None
            for fold, split in enumerate(found):
                yield name, seed, fold, split
