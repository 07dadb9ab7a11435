"""The bad-input table: each broken file or call ends with exit code 2, names the culprit and the cure, leaves nothing."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest


class BadFile(NamedTuple):
    """How a sound screen is broken, the keys it is read with, and what the message must say."""

    name: str
    spoil: Callable
    keys: dict
    culprit: str
    cure: str


def entry(value: float) -> Callable:
    """One entry of X, of gene2 in cell7, set to `value`."""

    def spoil(screen):
        screen.X[7, 2] = value

    return spoil


def label(column: str, value: object) -> Callable:
    """The label of cell7 in an obs column set to `value`."""

    def spoil(screen):
        screen.obs.loc["cell7", column] = value

    return spoil


def nothing(screen) -> None:
    """Leave the screen sound."""


def logged(screen) -> None:
    screen.X = np.log1p(screen.X)


def measured(screen) -> None:
    screen.X = np.arcsinh(screen.X) - 1.0


def same_genes(screen) -> None:
    screen.var_names = ["gene0", "gene1", "gene1", *screen.var_names[3:]]


def same_cells(screen) -> None:
    screen.obs_names = ["cell1", *screen.obs_names[1:]]


def only_controls(screen) -> None:
    screen.obs["drug"] = "DMSO"


def cased(screen) -> None:
    screen.obs.loc["cell20", "drug"] = "a"


def text_dose(screen) -> None:
    screen.obs["dose"] = "high"


def column(name: str, value: float) -> Callable:
    """A numeric obs column that is 100 except for cell20, a perturbed one."""

    def spoil(screen):
        screen.obs[name] = np.where(screen.obs_names == "cell20", value, 100.0)

    return spoil


BAD_FILES = [
    BadFile(
        "perturbation_key", nothing, {"perturbation": "drgu"}, "perturbation = 'drgu'", "did you mean 'drug'"
    ),
    BadFile(
        "batch_key", nothing, {"batch": "plate"}, "batch = 'plate'", "there are 'drug', 'cell_type', 'donor'"
    ),
    BadFile(
        "second_context_key",
        nothing,
        {"context": "cell_type,tissue"},
        "context = 'tissue'",
        "there are 'drug'",
    ),
    BadFile("one_key_twice", nothing, {"context": "donor"}, "'donor'", "name a column of its own"),
    BadFile(
        "control_label", nothing, {"control": "vehicle"}, "control = 'vehicle'", "there are 'A', 'B', 'DMSO'"
    ),
    BadFile("only_controls", only_controls, {}, "no perturbed cells", "add perturbed cells"),
    BadFile("missing_label", label("donor", np.nan), {}, "batch = 'donor'", "'cell7'"),
    BadFile("case", cased, {}, "'A', 'a'", "case"),
    BadFile("spaces", label("donor", "d1 "), {}, "'d1', 'd1 '", "spaces"),
    BadFile("nan", entry(np.nan), {}, "cell 'cell7', gene 'gene2'", "remove these cells or genes"),
    BadFile(
        "inf", entry(np.inf), {"scale": "other"}, "cell 'cell7', gene 'gene2'", "remove these cells or genes"
    ),
    BadFile("negative_counts", entry(-3), {"scale": "counts"}, "X = -3.0", "repair the counts"),
    BadFile("negative_whole", entry(-3), {"scale": "other"}, "X = -3.0", "repair the counts"),
    BadFile("negative_log1p", measured, {"scale": "log1p"}, "log1p cannot be negative", "scale='other'"),
    BadFile("fractional_counts", entry(80.5), {"scale": "counts"}, "X = 80.5", "layer="),
    BadFile("logged_as_counts", logged, {"scale": "counts"}, "logged data", "scale='log1p'"),
    BadFile("counts_as_log1p", nothing, {"scale": "log1p"}, "scale = 'log1p'", "scale='counts'"),
    BadFile("undeclared_scale", measured, {}, "scale = None", "scale='other'"),
    BadFile("gene_twice", same_genes, {}, "gene names = 'gene1'", "var_names_make_unique()"),
    BadFile("cell_twice", same_cells, {}, "cell names = 'cell1'", "obs_names_make_unique()"),
    BadFile("layer", nothing, {"layer": "raw"}, "layer = 'raw'", "is not a layer"),
    BadFile("text_dose", text_dose, {"dose": "dose"}, "dose = 'dose'", "store numbers"),
    BadFile(
        "missing_dose", column("dose", np.nan), {"dose": "dose"}, "dose = 'dose'", "give every perturbed cell"
    ),
    BadFile(
        "no_library",
        column("total", 0.0),
        {"library_size": "total"},
        "library_size = 'total'",
        "total counts",
    ),
    BadFile(
        "library_of_log1p",
        logged,
        {"scale": "log1p", "library_size": "donor"},
        "library_size = 'donor'",
        "leave library_size out",
    ),
    BadFile(
        "features_file", nothing, {"perturbation_features": "absent.csv"}, "'absent.csv'", "give a CSV file"
    ),
]


def listing(folder: Path) -> dict[str, bytes]:
    """Everything in a folder, with its content."""
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("bad", BAD_FILES, ids=lambda bad: bad.name)
def test_bad_file(bad, screen, keys, call, tmp_path):
    bad.spoil(screen)
    file = tmp_path / "bad.h5ad"
    screen.write_h5ad(file)
    before = listing(tmp_path)
    code, text = call(
        "split", file, *keys(**bad.keys), "--split", "unseen_batch", "--out", tmp_path / "split.json"
    )
    assert code == 2, text
    assert bad.culprit in text
    assert bad.cure in text
    assert "bad.h5ad" in text
    assert "Traceback" not in text
    assert listing(tmp_path) == before


class BadCall(NamedTuple):
    """A call in a folder with a sound screen.h5ad; KEYS stands for its keys."""

    name: str
    call: str
    culprit: str
    cure: str


BAD_CALLS = [
    BadCall("no_file", "inspect absent.h5ad KEYS", "absent.h5ad", "there is no such file"),
    BadCall(
        "folder_as_file", "inspect folder KEYS", "'folder': is a folder", "give the path of an .h5ad file"
    ),
    BadCall("text_as_h5ad", "inspect text.txt KEYS", "text.txt", "give an .h5ad file that is whole"),
    BadCall("truncated", "inspect truncated.h5ad KEYS", "truncated.h5ad", "give an .h5ad file that is whole"),
    BadCall("no_keys", "inspect screen.h5ad", "Missing option '--perturbation'", "--help"),
    BadCall(
        "scale_name",
        "inspect screen.h5ad KEYS --scale raw",
        "'raw' is not one of",
        "'counts', 'log1p', 'other'",
    ),
    BadCall(
        "split_name",
        "split screen.h5ad KEYS --split cells --out s.json",
        "'cells' is not one of",
        "'unseen_batch'",
    ),
    BadCall(
        "split_seed",
        "split screen.h5ad KEYS --split few_shot --seed -1 --out s.json",
        "--seed",
        "greater than or equal to 0",
    ),
    BadCall(
        "output_exists",
        "split screen.h5ad KEYS --split few_shot --out text.txt",
        "text.txt: exists",
        "--force",
    ),
    BadCall(
        "no_folder", "split screen.h5ad KEYS --split few_shot --out no/s.json", "no/s.json", "make it first"
    ),
    BadCall(
        "over_input",
        "split screen.h5ad KEYS --split few_shot --out screen.h5ad --force",
        "is another file",
        "another",
    ),
    BadCall(
        "over_folder",
        "split screen.h5ad KEYS --split few_shot --out folder --force",
        "folder: is a folder",
        "another",
    ),
    BadCall("unknown_command", "train screen.h5ad", "No such command 'train'", "--help"),
    BadCall(
        "settings_key", "fit screen.h5ad KEYS --out fit --settings typo.toml", "num_factor:", "num_factors,"
    ),
    BadCall(
        "settings_value",
        "fit screen.h5ad KEYS --out fit --settings value.toml",
        "num_steps: ",
        "greater than",
    ),
    BadCall(
        "settings_syntax", "fit screen.h5ad KEYS --out fit --settings text.txt", "text.txt", "not valid TOML"
    ),
    BadCall(
        "settings_file",
        "fit screen.h5ad KEYS --out fit --settings no.toml",
        "no.toml",
        "there is no such file",
    ),
    BadCall("no_split", "fit screen.h5ad KEYS --out fit --holdout text.txt", "text.txt", "hilbertcell split"),
    BadCall(
        "split_of_others",
        "fit screen.h5ad KEYS --out fit --holdout other.json",
        "other data",
        "make it again",
    ),
    BadCall("no_fit", "predict folder screen.h5ad --out d.nc", "folder", "hilbertcell fit"),
    BadCall("fit_is_file", "predict text.txt screen.h5ad --out d.nc", "text.txt", "hilbertcell fit"),
    BadCall(
        "cells_options",
        "predict folder screen.h5ad --out d.nc --draws 3",
        "--draws without --cells",
        "name the file",
    ),
    BadCall(
        "draws_and_index",
        "predict folder screen.h5ad --out d.nc --cells c.h5ad --draws 3 --draw-index 1",
        "--draw-index and --draws",
        "exclude each other",
    ),
    BadCall(
        "two_outputs", "predict folder screen.h5ad --out d.nc --cells d.nc", "d.nc", "name another output"
    ),
    BadCall("report_of_text", "report text.txt --out r.html", "text.txt", "hilbertcell predict"),
    BadCall("report_of_cells", "report screen.h5ad --out r.html", "screen.h5ad", "hilbertcell predict"),
    BadCall("evaluate_nothing", "evaluate no.nc screen.h5ad --out s.json", "no.nc", "there is no such file"),
    BadCall("demo_without_keys", "demo screen.h5ad", "a FILE needs --perturbation", "--batch"),
    BadCall("demo_without_file", "demo KEYS", "they need a FILE", "--batch"),
    BadCall(
        "demo_half_keys",
        "demo screen.h5ad --batch donor --control DMSO",
        "--perturbation, --context missing",
        "",
    ),
    BadCall("demo_over_folder", "demo --out folder --force", "folder: holds notes.txt", "another"),
    BadCall(
        "fit_over_folder", "fit screen.h5ad KEYS --out folder --force", "folder: holds notes.txt", "another"
    ),
]


@pytest.fixture
def workplace(screen_file, tmp_path, monkeypatch) -> Path:
    """A folder with a sound screen and things that are no screen."""
    whole = screen_file.read_bytes()
    (tmp_path / "truncated.h5ad").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "text.txt").write_text("not what you think\n")
    (tmp_path / "typo.toml").write_text("num_factor = 2\n")
    (tmp_path / "value.toml").write_text("num_steps = 0\n")
    other = {"name": "unseen_batch", "seed": 0, "held_out": ["X | A | d9"], "given": [], "labels_hash": "0"}
    (tmp_path / "other.json").write_text(json.dumps(other))
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "notes.txt").write_text("precious\n")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("bad", BAD_CALLS, ids=lambda bad: bad.name)
def test_bad_call(bad, workplace, keys, call):
    before = listing(workplace)
    words = [word for part in bad.call.split() for word in (keys() if part == "KEYS" else [part])]
    code, text = call(*words)
    assert code == 2, text
    assert bad.culprit in text
    assert bad.cure in text
    assert "Traceback" not in text
    assert listing(workplace) == before
