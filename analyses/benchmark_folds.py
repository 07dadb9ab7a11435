"""The folds of a split: what is hidden, one after the other, so that every score has several batches behind it."""

from dataclasses import replace

import numpy as np
import pandas as pd

from hilbertcell.data.splits import Split, SplitError, leave_one_batch_out, make_split


def folds(labels: pd.DataFrame, split: str, seed: int, number: int) -> list[Split]:
    """Folds of one seed.

    `unseen_batch` and `few_shot` leave out every batch once: the batch is the unit of replication, and a fifth of six
    donors would be one. Of few_shot each batch gives one perturbed population in part, chosen by the seed. The other splits
    are made `number` times, with seeds `seed * number + 0, 1, ...`; a choice that came up before is left out.
    Raises: SplitError if the split cannot be made with these labels.
    """
    if split == "unseen_batch":
        return leave_one_batch_out(labels)
    if split == "few_shot":
        several = [one for one in leave_one_batch_out(labels) if len(one.held_out) > 1]
        if not several:
            raise SplitError(
                "split = 'few_shot': no batch has two perturbed populations; choose another split"
            )
        return [_few_shot(one, seed, fold) for fold, one in enumerate(several)]
    made = [make_split(labels, split, seed * number + fold) for fold in range(number)]
    return list({one.held_out: one for one in reversed(made)}.values())[::-1]


def _few_shot(split: Split, seed: int, fold: int) -> Split:
    names = sorted(split.held_out)
    given = names[int(np.random.default_rng((seed, fold)).integers(len(names)))]
    held_out = tuple(name for name in split.held_out if name != given)
    return replace(split, name="few_shot", seed=seed, held_out=held_out, given=(given,))
