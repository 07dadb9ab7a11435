"""From labelled moments of populations to the padded arrays that programs take, and back to names."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from hilbertcell.data.moments import Moments
from hilbertcell.data.perturbations import PerturbationTable
from hilbertcell.models.effects import Conditions
from hilbertcell.models.microenvironment import Observations
from hilbertcell.models.within_covariance import WithinCovariance, WithinPrior

# Slots without an observation need finite filler so that gradients through the mask stay finite.
_FILLER_NOISE = 1.0
# Noise below this share of a feature's variance is numerically zero (a feature constant in one population).
_MIN_NOISE = 1e-9

Condition = tuple[str, str, float]  # context, perturbation, dose (nan: none)


def condition_of(labels: pd.DataFrame) -> list[Condition]:
    """(context, perturbation, dose) of each row; doses compare equal when both are absent."""
    doses = labels["dose"].fillna(-1.0)
    return list(zip(labels["context"], labels["perturbation"], doses, strict=True))


@dataclass(frozen=True)
class Vocabulary:
    """Names behind the indices of a program: contexts, conditions, and the levels that share a strength."""

    contexts: list[str]
    conditions: list[Condition]  # dose -1 where there is none

    @property
    def levels(self) -> list[tuple[str, float]]:
        """Distinct (perturbation, dose) in order of first appearance."""
        return list(dict.fromkeys((perturbation, dose) for _, perturbation, dose in self.conditions))

    def level_index(self) -> np.ndarray:
        """(E,) index of each condition's level."""
        position = {level: i for i, level in enumerate(self.levels)}
        return np.array(
            [position[perturbation, dose] for _, perturbation, dose in self.conditions], dtype=int
        )

    def extend(self, conditions: Sequence[Condition]) -> "Vocabulary":
        """The same names with unseen conditions appended; known ones keep their indices."""
        return Vocabulary(self.contexts, list(dict.fromkeys([*self.conditions, *conditions])))

    def structure(self, perturbations: PerturbationTable) -> Conditions:
        """Conditions as structure; `perturbations` holds every perturbation of the conditions."""
        context = {name: i for i, name in enumerate(self.contexts)}
        place = {name: i for i, name in enumerate(perturbations.names)}
        row = [place[perturbation] for _, perturbation, _ in self.conditions]
        return Conditions(
            context=np.array([context[name] for name, _, _ in self.conditions], dtype=int),
            components=perturbations.design[row],
            dose=np.array([dose if dose > 0 else np.nan for _, _, dose in self.conditions]),
            features=None if perturbations.features is None else perturbations.features[row],
        )


def vocabulary(labels: pd.DataFrame) -> Vocabulary:
    """Names in a table of populations, sorted, so that the order of rows does not matter."""
    perturbed = labels[~labels["is_control"]]
    return Vocabulary(sorted(labels["context"].unique()), sorted(set(condition_of(perturbed))))


@dataclass(frozen=True)
class Standardisation:
    """Per-feature origin and unit in which programs see embeddings."""

    center: np.ndarray  # (D,)
    scale: np.ndarray  # (D,)

    def apply(self, mean: np.ndarray) -> np.ndarray:
        """Features to standardised features; nothing else is changed."""
        return (mean - self.center) / self.scale

    def undo(self, mean: np.ndarray) -> np.ndarray:
        """Standardised features back to the scale of the feature map."""
        return self.center + mean * self.scale


def within_codes(labels: pd.DataFrame, contexts: Sequence[str]) -> np.ndarray:
    """Class of each population, context x (control, perturbed); -1 for a context that is not in `contexts`."""
    position = {name: i for i, name in enumerate(contexts)}
    codes = labels["context"].map(position).fillna(-1).to_numpy(dtype=int)
    return np.where(codes < 0, -1, 2 * codes + (~labels["is_control"].to_numpy(dtype=bool)).astype(int))


def shrunken_covariance(moments: Moments, prior: WithinPrior, contexts: Sequence[str]) -> WithinCovariance:
    """Within-population covariances of `moments`, each leaning on its class."""
    codes = within_codes(moments.labels, contexts)
    codes = np.where(codes < len(prior.class_variance), codes, -1)  # a class that training did not see
    return prior.shrink(moments.n, moments.variance, moments.factor_covariance, codes)


@dataclass(frozen=True)
class ProgramTable:
    """Populations of several batches as padded slots: C control slots, then J perturbed ones."""

    batches: list[str]
    observations: Observations  # numpy arrays with leading axis B
    rows: np.ndarray  # (B, C + J) row of the population in each slot, -1 for none

    def batch(self, name: str) -> Observations:
        """Slots of one batch, without the leading axis."""
        i = self.batches.index(name)
        return Observations(*(field[i] for field in self.observations))


def program_table(
    labels: pd.DataFrame, mean: np.ndarray, noise: np.ndarray, names: Vocabulary, unit: Standardisation
) -> ProgramTable:
    """Lay out populations by batch.

    Args:
        labels: (P rows) context, perturbation, dose, batch, is_control.
        mean: (P, D) embedding means on the scale of the feature map.
        noise: (P, D) variances of their sampling noise.
        names: every context and condition of `labels`.
        unit: standardisation of the features.
    """
    contexts = {name: i for i, name in enumerate(names.contexts)}
    conditions = {name: i for i, name in enumerate(names.conditions)}
    batches = sorted(labels["batch"].unique())
    control = labels["is_control"].to_numpy(dtype=bool)
    width = int(max((~control & (labels["batch"] == batch).to_numpy()).sum() for batch in batches))
    num_contexts, num_features = len(contexts), mean.shape[1]
    rows = np.full((len(batches), num_contexts + width), -1)
    condition = np.zeros((len(batches), width), dtype=int)
    context = np.zeros((len(batches), width), dtype=int)
    keys = condition_of(labels)
    label_context, label_batch = labels["context"].to_numpy(), labels["batch"].to_numpy()
    position = {batch: i for i, batch in enumerate(batches)}
    filled = np.zeros(len(batches), dtype=int)
    for j in range(len(labels)):
        b = position[label_batch[j]]
        if control[j]:
            rows[b, contexts[label_context[j]]] = j
        else:
            slot = filled[b]
            rows[b, num_contexts + slot] = j
            condition[b, slot], context[b, slot] = conditions[keys[j]], contexts[label_context[j]]
            filled[b] += 1
    observed = rows >= 0
    slots = np.zeros((*rows.shape, num_features))
    slot_noise = np.full_like(slots, _FILLER_NOISE)
    slots[observed] = unit.apply(mean)[rows[observed]]
    slot_noise[observed] = np.maximum(noise / unit.scale**2, _MIN_NOISE)[rows[observed]]
    return ProgramTable(batches, Observations(slots, slot_noise, observed, condition, context), rows)
