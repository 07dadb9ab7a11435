"""Settings of a fit: a TOML file, checked before anything is read or computed."""

import tomllib
from pathlib import Path
from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError


class TomlSettings(BaseModel):
    """Settings that are read from a TOML file."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    @classmethod
    def from_toml(cls, path: str | Path) -> Self:
        """Read settings; raises ValueError naming every unknown or impossible entry."""
        try:
            return cls(**tomllib.loads(Path(path).read_text()))
        except tomllib.TOMLDecodeError as error:
            raise ValueError(f"{path} is not valid TOML: {error}") from None
        except ValidationError as error:
            raise ValueError(
                f"{path}: {_faults(error)}. Known settings: {', '.join(cls.model_fields)}"
            ) from None

    def changed(self, **changes: object) -> Self:
        """The same with other values for some settings; raises ValueError naming every unknown or impossible one."""
        try:
            return type(self)(**(self.model_dump() | changes))
        except ValidationError as error:
            raise ValueError(_faults(error)) from None


def _faults(error: ValidationError) -> str:
    """What is wrong, setting by setting; a fault of several settings together has no place of its own."""
    places = [(".".join(map(str, e["loc"])), e["msg"].removeprefix("Value error, ")) for e in error.errors()]
    return "; ".join(f"{place}: {text}" if place else text for place, text in places)


class Settings(TomlSettings):
    """Everything a fit can be told beside the data; `fit` stores the values it ran with."""

    num_factors: int = Field(3, ge=0, le=32, description="upper bound on microenvironment factors")
    num_random_features: int = Field(48, ge=0, description="random Fourier features beside the genes")
    num_components: int = Field(16, ge=1, description="principal components that the random features see")
    max_pilot_cells: int = Field(
        20_000, ge=10, description="training cells that fix components and bandwidths"
    )
    noise_rank: int = Field(24, ge=1, le=128, description="rank of the within-population covariance")
    max_coordinates: int = Field(64, ge=1, description="upper bound on signal-ordered coordinates")
    inference: Literal["svi", "nuts", "auto"] = Field(
        "svi", description="variational, NUTS, or NUTS where it takes about two minutes at most"
    )
    law: Literal["gaussian", "diffusion", "auto"] = Field(
        "gaussian",
        description="response law: the program's, a diffusion around it, or what held-out batches prefer",
    )
    objective: Literal["elbo", "iwae", "renyi"] = Field("elbo", description="bound that svi maximises")
    num_steps: int | None = Field(
        None,
        ge=10,
        description="steps of variational inference; unset: 1,000 to 6,000, more for smaller tables",
    )
    learning_rate: float = Field(0.05, gt=0, description="largest step of Adam; decays along a cosine")
    num_particles: int = Field(1, ge=1, description="draws of the guide per step")
