"""Settings of a PerturbDiff fit; defaults are the published recipe for PBMC from scratch."""

from typing import Literal, Self

from pydantic import Field, model_validator

from hilbertcell.inference.settings import TomlSettings
from hilbertcell.models.perturbdiff import Dropout, Recipe


class PerturbDiffSettings(TomlSettings):
    """Everything that a fit or its sampling can be told beside the data."""

    hidden: int = Field(512, ge=2, description="width of the network")
    depth: int = Field(8, ge=1, description="blocks")
    num_heads: int = Field(8, ge=1, description="attention heads; they divide twice the width")
    covariate_hidden: int = Field(128, ge=1, description="width of each branch of the covariate encoder")
    gene_features: int = Field(
        5120, ge=0, description="input of the published, unused gene map; 0 leaves it out"
    )
    batch_covariate: bool = Field(
        True, description="whether the batch conditions; false to predict new batches"
    )
    sources: tuple[str, ...] = Field((), description="data sets with embedders of their own")
    source: str | None = Field(None, description="the one of `sources` that the data are")
    start_at_mean: bool = Field(
        False, description="new networks answer the training mean; false as published"
    )
    set_size: int = Field(256, ge=2, description="cells of a set")
    cells_per_batch: int = Field(2048, ge=2, description="cells of a training step")
    max_steps: int = Field(200_000, gt=223, description="training steps")
    learning_rate: float = Field(2e-4, gt=0)
    weight_decay: float = Field(0.01, ge=0)
    average_every: int = Field(10, ge=1, description="steps between two updates of the weight average")
    energy_weight: float = Field(1.0, ge=0, description="lambda")
    drop_condition: float = Field(0.5, ge=0, le=1)
    drop_control: float = Field(0.0, ge=0, le=1)
    drop_self_condition: float = Field(0.5, ge=0, le=1)
    drop_level: Literal["batch", "set"] = Field(
        "batch", description="drops of a whole batch, as published, or set"
    )
    precision: Literal["float32", "bfloat16"] = Field("float32", description="of the network's arithmetic")
    checkpoint_every: int = Field(10_000, ge=1, description="steps between two saved states of a training")
    sampler: Literal["ddim", "dpm"] = Field("ddim", description="step rule; DDIM as published")
    start_time: int = Field(
        100, ge=2, le=1000, description="index of the chain that sampling starts below; 1000 is all of it"
    )
    sample_steps: int = Field(
        100, ge=2, le=1000, description="steps over these indices; as many, and each is visited"
    )
    guidance: float = Field(1.0, ge=0, description="w; 0 halves the network evaluations")

    @model_validator(mode="after")
    def _steps_fit(self) -> Self:
        if self.sample_steps > self.start_time:
            raise ValueError(
                f"sample_steps = {self.sample_steps} is more than the start_time = {self.start_time} indices there are"
            )
        return self

    @property
    def recipe(self) -> Recipe:
        """What the training step is told."""
        return Recipe(
            max_steps=self.max_steps,
            learning_rate=self.learning_rate,
            weight_decay=self.weight_decay,
            average_every=self.average_every,
            energy_weight=self.energy_weight,
            dropout=Dropout(
                self.drop_condition, self.drop_control, self.drop_self_condition, self.drop_level
            ),
            compute_dtype=self.precision,
        )

    @property
    def evaluations(self) -> int:
        """Network evaluations behind every generated cell."""
        return self.sample_steps * (2 if self.guidance else 1)
