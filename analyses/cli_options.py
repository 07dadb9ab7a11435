"""Options and arguments that several commands share."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer


def out(metavar: str, text: str) -> object:
    """Where the result is written."""
    return typer.Option("--out", metavar=metavar, help=text, show_default=False)


def flag(name: str, text: str) -> object:
    """Something that is done or not."""
    return typer.Option(name, help=text, show_default=False)


def file(metavar: str, text: str) -> object:
    """A file that is read."""
    return typer.Argument(metavar=metavar, help=text, show_default=False)


def given(metavar: str, text: str, least: int | None = None) -> object:
    """A value that may be left out."""
    return typer.Option(metavar=metavar, help=text, show_default=False, min=least)


Cells = Annotated[Path, file("FILE", "Cells, as h5ad or zarr.")]
Draws = Annotated[Path, file("DRAWS.nc", "Draws that `predict` wrote.")]
Holdout = Annotated[Path | None, given("SPLIT.json", "Populations to leave out, as `split` wrote them.")]
Force = Annotated[bool, flag("--force", "Replace an output that exists.")]
Seed = Annotated[int, typer.Option(help="Same seed, same result.", min=0, metavar="N")]


class ModelName(StrEnum):
    """What `fit` fits."""

    hilbertcell = "hilbertcell"
    perturbdiff = "perturbdiff"


class PresetName(StrEnum):
    """The data sets of PerturbDiff; `data.presets.PRESETS`."""

    parse_pbmc = "parse-pbmc"
    tahoe_100m = "tahoe-100m"
    replogle_nadig = "replogle-nadig"


class SamplerName(StrEnum):
    """How PerturbDiff generates."""

    ddim = "ddim"
    dpm = "dpm"
