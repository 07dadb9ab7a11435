"""What a benchmark compares: a TOML file, checked before anything is read or computed."""

import os
import tomllib
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from hilbertcell.inference.settings import Settings

DATA = "HILBERTCELL_DATA"
type SplitName = Literal["unseen_batch", "unseen_pair", "unseen_context", "unseen_perturbation", "few_shot"]


class DataSet(BaseModel):
    """One file, the meaning of its columns as in `read_populations`, and the splits that are made of it."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str = Field(min_length=1, description="what tables call it")
    file: Path = Field(description="h5ad, relative to the folder of the data")
    perturbation: str
    control: str
    context: tuple[str, ...] = Field(min_length=1)
    batch: str
    dose: str | None = None
    library_size: str | None = None
    layer: str | None = None
    scale: Literal["counts", "log1p", "other"]
    perturbation_features: Path | None = Field(None, description="CSV, relative to the folder of the data")
    without_context: tuple[str, ...] = Field((), description="contexts that are left out")
    splits: tuple[SplitName, ...] = Field(min_length=1)

    @field_validator("context", mode="before")
    @classmethod
    def _one_or_several(cls, value: Any) -> Any:
        return tuple(key.strip() for key in value.split(",")) if isinstance(value, str) else value

    def reading(self, folder: Path) -> dict[str, Any]:
        """The arguments of `read_populations`, beside the source."""
        names = ("perturbation", "control", "context", "batch", "dose", "library_size", "layer", "scale")
        features = None if self.perturbation_features is None else folder / self.perturbation_features
        return {name: getattr(self, name) for name in names} | {"perturbation_features": features}


class BenchmarkConfig(BaseModel):
    """Data sets x splits x models x seeds."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    folder: Path | None = Field(None, description=f"of the data, relative to the file; without it, {DATA}")
    seeds: tuple[int, ...] = Field((0,), min_length=1)
    num_folds: int = Field(
        5, ge=1, description="split seeds of splits that do not leave out batch after batch"
    )
    num_samples: int = Field(500, ge=20, description="draws of each predicted law")
    models: tuple[str, ...] | None = Field(None, description="names of the table; without it, all")
    settings: Settings = Field(default_factory=Settings, description="of the fits of hilbertcell")
    data_set: tuple[DataSet, ...] = Field(min_length=1)

    @field_validator("data_set")
    @classmethod
    def _named_once(cls, value: tuple[DataSet, ...]) -> tuple[DataSet, ...]:
        names = [one.name for one in value]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"names {twice} are used twice; give each data set its own")
        return value

    @classmethod
    def from_toml(cls, path: str | Path) -> "BenchmarkConfig":
        """Read a configuration; raises ValueError naming every unknown or impossible entry.

        A relative `folder` is turned into one relative to the file; without one it is the environment's
        HILBERTCELL_DATA, or `../shared/data` beside the current folder.
        """
        path = Path(path)
        try:
            config = cls(**tomllib.loads(path.read_text()))
        except tomllib.TOMLDecodeError as error:
            raise ValueError(f"{path} is not valid TOML: {error}") from None
        except ValidationError as error:
            faults = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
            raise ValueError(f"{path}: {faults}. See docs/evaluation.md for an example") from None
        folder = (
            Path(os.environ.get(DATA, "../shared/data"))
            if config.folder is None
            else path.parent / config.folder
        )
        config = config.model_copy(update={"folder": folder.resolve()})
        absent = [str(file) for file in config.files() if not file.exists()]
        if absent:
            raise ValueError(
                f"{path}: {', '.join(absent)} do not exist; set `folder` in the file or {DATA} in the environment"
            )
        return config

    def files(self) -> list[Path]:
        """Every file that is read."""
        assert self.folder is not None
        named = [path for one in self.data_set for path in (one.file, one.perturbation_features)]
        return [self.folder / path for path in named if path is not None]
