"""What the columns of the published data sets of PerturbDiff mean, and what its experiments hide.

The files themselves are public (Parse 10M PBMC, Tahoe-100M, Replogle-Nadig) and not part of this project. A held-out
population is one whose context *and* whose perturbation are in the held-out lists: held-out perturbations are seen in
other contexts. The long lists of test perturbations are files of the published code; a preset holds the contexts, and
the perturbations are given with it or are all that the context has.
"""

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, Literal

import pandas as pd

from hilbertcell.data.populations import Populations
from hilbertcell.data.splits import Split, labels_hash
from hilbertcell.data.validation import DataError, listing


@dataclass(frozen=True)
class Preset:
    """One published data set.

    Attributes:
        name: what commands call it.
        keys: arguments of `read_populations`; X holds log1p of normalised counts.
        source: name of the data set in checkpoints: embedder, and prefix of batch names with an underscore.
        hidden_by: the column of labels whose values are held out.
        hidden: the values held out, less the word "donor", which files write in more than one way.
        validation: perturbations that are hidden in them for validation, where that list is short.
        num_genes: variable genes of the published gene space.
        settings: of the published recipe, other than the default ones.

    """

    name: str
    keys: dict[str, Any]
    source: str
    hidden_by: Literal["context", "batch"]
    hidden: tuple[str, ...]
    validation: tuple[str, ...]
    num_genes: int
    settings: dict[str, Any]

    @property
    def prefix(self) -> str:
        """Stands before batch names in checkpoints."""
        return f"{self.source}_"

    def split(self, labels: pd.DataFrame, perturbations: Collection[str] | None = None) -> Split:
        """Hide the perturbed populations of the held-out contexts or batches.

        Args:
            labels: as `Populations.labels`.
            perturbations: those to hide (the published list of the test), beside those of validation; all, where it is
                not given.

        Raises:
            DataError: no such population is here, or hiding them leaves a perturbation that is never seen.
        """
        values = labels[self.hidden_by].astype(str)
        bare = values.str.replace(r"(?i)^donor[\s_-]*", "", regex=True)
        hidden = ~labels["is_control"] & bare.isin(self.hidden)
        if perturbations is not None:
            hidden &= labels["perturbation"].isin([*perturbations, *self.validation])
        if not hidden.any():
            raise DataError(
                f"preset = {self.name!r}: hides {self.hidden_by} {listing(self.hidden)}, of which there is no perturbed "
                f"population; there are {listing(sorted(values.unique()))}"
            )
        unseen = set(labels["perturbation"][hidden]) - set(labels["perturbation"][~hidden])
        if unseen:
            raise DataError(
                f"preset = {self.name!r}: {listing(sorted(unseen))} would be hidden everywhere; the published test hides "
                "(context, perturbation) pairs whose perturbation is seen elsewhere"
            )
        names = tuple(labels.index[hidden].tolist())
        return Split("unseen_pair", 0, names, (), labels_hash(labels))

    def check_genes(self, populations: Populations) -> str | None:
        """A sentence if the file's gene space is not the published one; None if it is."""
        if len(populations.genes) == self.num_genes:
            return None
        return (
            f"{len(populations.genes):,} genes; the published experiment takes {self.num_genes:,} variable genes, and its "
            "checkpoints fit no other number"
        )


_RECIPE = {"set_size": 256, "cells_per_batch": 2048}
PRESETS = {
    preset.name: preset
    for preset in (
        Preset(
            "parse-pbmc",
            {"perturbation": "cytokine", "control": "PBS", "context": "cell_type", "batch": "donor", "scale": "log1p"},
            "pbmc",
            "batch",
            ("1", "4", "9", "12"),
            ("G-CSF", "IFN-beta", "M-CSF", "IGF-1"),
            2000,
            _RECIPE,
        ),
        Preset(
            "tahoe-100m",
            {
                "perturbation": "drugname_drugconc", "control": "[('DMSO_TF', 0.0, 'uM')]", "context": "cell_line",
                "batch": "plate", "scale": "log1p",
            },
            "tahoe100m",
            "context",
            ("CVCL_1097", "CVCL_1285", "CVCL_1098", "CVCL_0334", "CVCL_0480"),
            (),
            2000,
            _RECIPE,
        ),
        Preset(
            "replogle-nadig",
            {
                "perturbation": "gene", "control": "non-targeting", "context": "cell_line", "batch": "gem_group",
                "scale": "log1p",
            },
            "replogle",
            "context",
            ("hepg2",),
            (),
            2000,
            {"set_size": 32, "cells_per_batch": 128, "learning_rate": 2e-3},
        ),
    )
}  # fmt: skip


def preset(name: str) -> Preset:
    """The preset of that name. Raises: DataError that lists the known ones."""
    if name not in PRESETS:
        raise DataError(f"preset = {name!r}: is not known; choose one of {listing(PRESETS)}")
    return PRESETS[name]
