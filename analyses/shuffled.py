"""A check that every benchmark can run beside itself: what remains when controls say nothing about their batch."""

from dataclasses import replace

import numpy as np

from hilbertcell.data.grouping import population_name
from hilbertcell.data.populations import Populations


def shuffle_batches(populations: Populations, seed: int = 0) -> Populations:
    """The same populations with the controls of each context handed on around a random circle of its batches.

    No control population keeps its own batch (unless it is the only one of its context), and contexts are shuffled apart, so that
    nothing links a batch's controls to its perturbed populations, in its own context or through another one. Labels
    only: `obs` still tells the batch of the file. What a model gains from controls must vanish: it must not beat
    'training means', which ignores them. It may still beat the null, which goes on trusting the wrong controls.
    """
    rng = np.random.default_rng(seed)
    labels = populations.labels.copy()
    for context in labels["context"].unique():
        rows = np.flatnonzero((labels["is_control"] & (labels["context"] == context)).to_numpy())
        rows = rng.permutation(rows)
        batch = labels["batch"].to_numpy(copy=True)
        batch[rows] = batch[np.roll(rows, 1)]
        labels["batch"] = batch
    columns = zip(labels["context"], labels["perturbation"], labels["dose"], labels["batch"], strict=True)
    labels.index = type(labels.index)(
        [population_name(*values) for values in columns], name=labels.index.name
    )
    order = np.argsort(
        labels.assign(perturbed=~labels["is_control"], place=np.arange(len(labels)))
        .sort_values(["context", "batch", "perturbed", "perturbation", "dose"])["place"]
        .to_numpy()
    )  # order[j]: where row j of the labels goes
    moved = np.append(order, -1)  # the last entry keeps -1, a cell that is not selected, at -1
    return replace(
        populations,
        labels=labels.iloc[np.argsort(order)],
        cell_population=moved[populations.cell_population],
    )
