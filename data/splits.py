"""Splits: pure functions of the labels and a seed. Populations are hidden whole, cells never one by one.

What each split hides is the table of `make_split`. A split carries a hash of the labels it was made for and is
checked wherever populations enter a fit: a leak is an error.
"""

import hashlib
import json
import os
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from hilbertcell.data.perturbations import split_combination
from hilbertcell.data.validation import listing


class SplitError(ValueError):
    """A split that cannot be made, read, or used with these data."""


class LeakError(SplitError):
    """Populations that a split hides were used to fit."""


@dataclass(frozen=True)
class Split:
    """Which populations are hidden from a fit.

    Attributes:
        name: one of `SPLITS`.
        seed: the seed it was made with.
        held_out: names of the populations to predict, never seen.
        given: names of perturbed populations of which some cells are given at prediction (few_shot only);
            they are no part of the fit either.
        labels_hash: `labels_hash` of the populations it was made for.

    """

    name: str
    seed: int
    held_out: tuple[str, ...]
    given: tuple[str, ...]
    labels_hash: str

    def save(self, path: str | Path) -> None:
        """Write as JSON, whole or not at all."""
        path = Path(path)
        temporary = path.with_name(path.name + ".part")
        with temporary.open("w") as file:
            file.write(json.dumps(asdict(self), indent=1, ensure_ascii=False) + "\n")
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)

    @classmethod
    def load(cls, path: str | Path) -> "Split":
        """The inverse of `save`. Raises: SplitError if the file is no split."""
        try:
            values = json.loads(Path(path).read_text())
            split = cls(
                name=str(values["name"]),
                seed=int(values["seed"]),
                held_out=tuple(map(str, values["held_out"])),
                given=tuple(map(str, values["given"])),
                labels_hash=str(values["labels_hash"]),
            )
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise SplitError(
                f"split = {str(path)!r}: is not a split ({error}); make one with `hilbertcell split`"
            ) from None
        _check_name(split.name)
        return split


def labels_hash(labels: pd.DataFrame) -> str:
    """SHA-256 of the names, kinds and cell numbers of populations, whatever their order."""
    rows = zip(labels.index, labels["is_control"], labels["num_cells"], strict=True)
    text = json.dumps(sorted([str(name), bool(control), int(num)] for name, control, num in rows))
    return hashlib.sha256(text.encode()).hexdigest()


def check_no_leak(split: Split, used: Iterable[str]) -> None:
    """Raise LeakError that names the populations among `used` which the split hides or only gives in part."""
    hidden = {*split.held_out, *split.given}
    leaked = sorted(hidden.intersection(used))
    if leaked:
        what = f"{len(leaked)} of {len(hidden)} hidden populations were used to fit: {listing(leaked)}"
        raise LeakError(f"split = {split.name!r}: {what}; fit on training_mask(split, labels) only")


def check_same_data(split: Split, labels: pd.DataFrame) -> None:
    """Raise SplitError unless the split was made for populations of these names, kinds and cell numbers."""
    if split.labels_hash != labels_hash(labels):
        absent = sorted({*split.held_out, *split.given}.difference(labels.index))
        detail = (
            f"it hides {listing(absent, 3)}, which are not here" if absent else "cells were added or removed"
        )
        raise SplitError(
            f"split = {split.name!r}: was made for other data ({detail}); make it again for this file"
        )


def training_mask(split: Split, labels: pd.DataFrame) -> np.ndarray:
    """Populations that may be fitted on, (P,) bool.

    Not the hidden ones; and where whole batches are hidden (unseen_batch, few_shot) not their controls either,
    which are given at prediction.
    """
    mask = ~labels.index.isin([*split.held_out, *split.given])
    if split.name in ("unseen_batch", "few_shot"):
        mask &= ~labels["batch"].isin(labels["batch"][~mask]).to_numpy()
    return mask


def make_split(labels: pd.DataFrame, name: str, seed: int = 0, fraction: float = 0.2) -> Split:
    """Hide a share of the batches, pairs, contexts or perturbations, chosen by hashes of their names.

    | name | hidden | chosen among |
    |---|---|---|
    | unseen_batch | all perturbed populations of some batches | batches with control and perturbed cells |
    | unseen_pair | (context, perturbation) pairs in all batches and doses | pairs whose perturbation stays in another context |
    | unseen_context | all perturbed populations of some contexts | contexts with control and perturbed cells |
    | unseen_perturbation | some single perturbations, in every combination and dose | all of them |
    | few_shot | as unseen_batch, except one perturbed population per batch, of which cells are given | batches with controls and two perturbed populations |

    Args:
        labels: as `Populations.labels`, P rows.
        name: see the table.
        seed: another seed, other choices; nothing else is random.
        fraction: share of the candidates to hide: rounded, at least one, never all.

    Raises:
        SplitError: if the name is unknown or there are too few candidates.

    """
    _check_name(name)
    if not 0 < fraction < 1:
        raise SplitError(f"fraction = {fraction}: must lie between 0 and 1; the default is 0.2")
    held_out, given = _MAKERS[name](labels, seed, fraction)
    return _split(labels, name, seed, held_out, given)


def leave_one_batch_out(labels: pd.DataFrame) -> list[Split]:
    """One unseen_batch split per batch that has control and perturbed cells, in the order of their names.

    Raises: SplitError if there are fewer than two such batches.
    """
    batches = _with_controls(labels, "batch", 1)
    _enough(batches, "batches with control and perturbed cells", "unseen_batch")
    perturbed = ~labels["is_control"].to_numpy()
    batch = labels["batch"].to_numpy()
    return [
        _split(labels, "unseen_batch", 0, perturbed & (batch == one), np.zeros(len(labels), bool))
        for one in batches
    ]


type Masks = tuple[np.ndarray, np.ndarray]  # held_out (P,), given (P,)


def _unseen_batch(labels: pd.DataFrame, seed: int, fraction: float) -> Masks:
    return _hide(labels, "batch", "unseen_batch", seed, fraction, 1), np.zeros(len(labels), bool)


def _unseen_context(labels: pd.DataFrame, seed: int, fraction: float) -> Masks:
    return _hide(labels, "context", "unseen_context", seed, fraction, 1), np.zeros(len(labels), bool)


def _few_shot(labels: pd.DataFrame, seed: int, fraction: float) -> Masks:
    hidden = _hide(labels, "batch", "few_shot", seed, fraction, 2)
    given = np.zeros(len(labels), bool)
    for batch in labels["batch"][hidden].unique():
        rows = np.flatnonzero(hidden & (labels["batch"] == batch).to_numpy())
        chosen = _shuffled(labels.index[rows].tolist(), seed, "few_shot given")[0]
        given[labels.index.get_loc(chosen)] = True
    return hidden & ~given, given


def _unseen_pair(labels: pd.DataFrame, seed: int, fraction: float) -> Masks:
    perturbed = labels[~labels["is_control"]]
    pairs = sorted(set(zip(perturbed["context"], perturbed["perturbation"], strict=True)))
    contexts_left: dict[str, set[str]] = {}
    perturbations_left: dict[str, set[str]] = {}
    for context, perturbation in pairs:
        contexts_left.setdefault(perturbation, set()).add(context)
        perturbations_left.setdefault(context, set()).add(perturbation)
    several = {context: len(found) > 1 for context, found in perturbations_left.items()}
    hidden: set[tuple[str, str]] = set()
    for context, perturbation in _shuffled(pairs, seed, "unseen_pair"):
        # A context that saw several perturbations keeps one, or it would be an unseen context.
        context_lost = several[context] and len(perturbations_left[context]) == 1
        if (
            len(contexts_left[perturbation]) > 1
            and not context_lost
            and len(hidden) < _number(pairs, fraction)
        ):
            hidden.add((context, perturbation))
            contexts_left[perturbation].discard(context)
            perturbations_left[context].discard(perturbation)
    if not hidden:
        raise SplitError(
            f"split = 'unseen_pair': every perturbation is in one context only ({len(pairs)} pairs);"
            " choose another split, or a finer context"
        )
    of_pair = list(zip(labels["context"], labels["perturbation"], strict=True))
    return np.array([pair in hidden for pair in of_pair]) & ~labels["is_control"].to_numpy(), np.zeros(
        len(labels), bool
    )


def _unseen_perturbation(labels: pd.DataFrame, seed: int, fraction: float) -> Masks:
    components = [() if control else split_combination(name) for name, control in _names_and_kinds(labels)]
    singles = sorted({part for parts in components for part in parts})
    _enough(singles, "single perturbations", "unseen_perturbation")
    hidden = set(_shuffled(singles, seed, "unseen_perturbation")[: _number(singles, fraction)])
    held_out = np.array([not hidden.isdisjoint(parts) for parts in components])
    if held_out[[bool(parts) for parts in components]].all():
        raise SplitError(
            f"split = 'unseen_perturbation': every population contains one of {listing(sorted(hidden))};"
            " hide a smaller fraction or use another seed"
        )
    return held_out, np.zeros(len(labels), bool)


_MAKERS: dict[str, Callable[[pd.DataFrame, int, float], Masks]] = {
    "unseen_batch": _unseen_batch,
    "unseen_pair": _unseen_pair,
    "unseen_context": _unseen_context,
    "unseen_perturbation": _unseen_perturbation,
    "few_shot": _few_shot,
}
SPLITS = tuple(_MAKERS)


def _check_name(name: str) -> None:
    if name not in SPLITS:
        raise SplitError(f"split = {name!r}: is not a split; choose one of {', '.join(map(repr, SPLITS))}")


def _split(labels: pd.DataFrame, name: str, seed: int, held_out: np.ndarray, given: np.ndarray) -> Split:
    names = labels.index
    return Split(
        name, int(seed), tuple(names[held_out].tolist()), tuple(names[given].tolist()), labels_hash(labels)
    )


def _names_and_kinds(labels: pd.DataFrame) -> Iterable[tuple[str, bool]]:
    return zip(labels["perturbation"], labels["is_control"], strict=True)


def _hide(labels: pd.DataFrame, column: str, name: str, seed: int, fraction: float, least: int) -> np.ndarray:
    """Perturbed populations of a share of the batches or contexts that have controls and `least` of them."""
    candidates = _with_controls(labels, column, least)
    plural = {"batch": "batches", "context": "contexts"}[column]
    needs = (
        "control and perturbed cells" if least == 1 else f"control cells and {least} perturbed populations"
    )
    _enough(candidates, f"{plural} with {needs}", name)
    hidden = _shuffled(candidates, seed, "unseen_batch" if name == "few_shot" else name)[
        : _number(candidates, fraction)
    ]
    return ~labels["is_control"].to_numpy() & labels[column].isin(hidden).to_numpy()


def _with_controls(labels: pd.DataFrame, column: str, least: int) -> list[str]:
    kinds = labels.groupby(column, sort=True)["is_control"].agg(["sum", "size"])
    return kinds.index[(kinds["sum"] > 0) & (kinds["size"] - kinds["sum"] >= least)].tolist()


def _enough(candidates: Sequence[object], what: str, name: str) -> None:
    if len(candidates) < 2:
        raise SplitError(
            f"split = {name!r}: needs at least two {what}, found {len(candidates)}; choose another split"
        )


def _number(candidates: Sequence[object], fraction: float) -> int:
    return min(max(1, round(fraction * len(candidates))), len(candidates) - 1)


def _shuffled[Item: Hashable](items: Sequence[Item], seed: int, purpose: str) -> list[Item]:
    """Items in an order that depends on their names, the seed and the purpose, not on their order."""
    return sorted(
        items, key=lambda item: hashlib.sha256(json.dumps([purpose, int(seed), item]).encode()).digest()
    )
