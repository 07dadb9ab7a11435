"""Labels of populations to the ids of a covariate encoder: the numbering belongs to the fit or checkpoint."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Self

import numpy as np
import pandas as pd

from hilbertcell.data.validation import Problems, choose_from
from hilbertcell.models.perturbdiff import NO_PERTURBATION


def condition_labels(labels: pd.DataFrame) -> list[str]:
    """Perturbation with its dose, as one label of the encoder; the control label for controls."""
    doses = labels["dose"].to_numpy(dtype=float)
    names = labels["perturbation"].astype(str)
    return [name if np.isnan(dose) else f"{name} @ {dose:g}" for name, dose in zip(names, doses, strict=True)]


@dataclass(frozen=True)
class Vocabulary:
    """Ids by label.

    Attributes:
        perturbation: ids of conditions (see `condition_labels`); empty in marginal pretraining, which has none.
        context: ids of cell types.
        batch: ids of batches; empty for an encoder without a batch branch.
        prefix: stands before every batch name in `batch`; published checkpoints put the data set's name there.

    """

    perturbation: Mapping[str, int]
    context: Mapping[str, int]
    batch: Mapping[str, int]
    prefix: str = ""

    @classmethod
    def of(cls, labels: pd.DataFrame, *, perturbations: bool, batches: bool) -> Self:
        """Sorted names of a table of populations, numbered from 0, as published."""

        def numbered(names: list[str]) -> dict[str, int]:
            return {name: i for i, name in enumerate(sorted(set(names)))}

        return cls(
            numbered(condition_labels(labels)) if perturbations else {},
            numbered(labels["context"].astype(str).tolist()),
            numbered(labels["batch"].astype(str).tolist()) if batches else {},
        )

    def ids(self, labels: pd.DataFrame) -> np.ndarray:
        """Ids (P, 3) of perturbation, context and batch of every row; batch 0 where there is no batch branch.

        Raises:
            DataError: naming every label that has no id.
        """
        problems = Problems("the populations asked of a perturbdiff fit")
        batches = [f"{self.prefix}{name}" for name in labels["batch"].astype(str)]
        columns = (
            (
                "perturbation",
                condition_labels(labels),
                self.perturbation,
                NO_PERTURBATION,
                "fit with features of it",
            ),
            ("context", labels["context"].astype(str).tolist(), self.context, 0, "fit on cells of it"),
            ("batch", batches, self.batch, 0, "fit with batch_covariate = false to predict new batches"),
        )
        ids = np.empty((len(labels), 3), dtype=np.int32)
        for j, (name, found, known, absent, cure) in enumerate(columns):
            for label in sorted(set(found) - set(known)) if known else ():
                problems.add(
                    name, label, "has no id in this fit", f"{cure}, or {choose_from(label, list(known))}"
                )
            ids[:, j] = [known.get(label, absent) for label in found]
        problems.raise_if_any()
        return ids

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)
