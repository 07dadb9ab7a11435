"""From draws of many targets to a table: scores per target, mean per batch, ratio to the null with its error."""

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from hilbertcell.analyses import conformal
from hilbertcell.analyses.gene_table import GeneTable
from hilbertcell.analyses.law_scores import LEVELS, add_noise, energy_score, score_law, variogram_score
from hilbertcell.analyses.verdicts import bootstrap_ratio_upper, jackknife_ratio, verdicts

NULL = "null"
RATIOS = (
    "excess",
    "crps",
    "energy",
    "variogram",
    "width_90",
)  # scores that are compared as ratios to the null
JUDGED = ("crps", "energy")  # proper scores on which verdicts are given
VECTOR_DRAWS = (
    200  # draws for scores of vectors: their cost grows with the square, their fair form does not bias
)
VARIOGRAM_GENES = 64  # the variogram score costs the square of the number of genes
PIT_BINS = 10
_NOISE_STREAM = 1  # the truth's noise must be independent of draws that a model made with the same seed
VERDICT = "verdict on CRPS against the null"


@dataclass(frozen=True, eq=False)
class LawScores:
    """Scores of one model: `targets` has a row per target and a column per score, `pit` and `residual` are (T, G).

    `residual` is that of `score_law`; None where scores of several draws were averaged.
    """

    targets: pd.DataFrame
    pit: np.ndarray
    residual: np.ndarray | None = None


def score_targets(
    draws: np.ndarray | Iterable[np.ndarray], truth: GeneTable, unit: np.ndarray, seed: int = 0
) -> LawScores:
    """Score draws (S, T, G) of latent means, on the scale of the data, for the T observed populations `truth`.

    Draws that are too many to hold at once may come as blocks along T, in order. Everything is divided by `unit` (G,)
    first, so that genes of different scales may be averaged. Scalar scores
    (`score_law`) are means over genes; `energy` and `variogram` are those of the vector of gene means divided by
    sqrt(G) and by the number of ordered pairs, the variogram over the genes that vary most within populations. A target
    whose draws are not finite (no controls were given for it) has nan everywhere.
    """
    rng = np.random.default_rng((seed, _NOISE_STREAM))
    varying = np.argsort(-(truth.variance / unit**2).mean(0), kind="stable")[:VARIOGRAM_GENES]
    tables: list[pd.DataFrame] = []
    pits: list[np.ndarray] = []
    residuals: list[np.ndarray] = []
    start = 0
    for block in [draws] if isinstance(draws, np.ndarray) else draws:
        rows = slice(start, start + block.shape[1])
        start = rows.stop
        mean, noise = truth.mean[rows] / unit, truth.noise[rows] / unit**2
        columns, pit, residual = _score_block(block / unit, mean, noise, varying, rng)
        tables.append(pd.DataFrame(columns, index=truth.labels.index[rows]))
        pits.append(pit)
        residuals.append(residual)
    return LawScores(pd.concat(tables), np.concatenate(pits), np.concatenate(residuals))


def _score_block(
    draws: np.ndarray, mean: np.ndarray, noise: np.ndarray, varying: np.ndarray, rng: np.random.Generator
) -> tuple[dict[str, np.ndarray], np.ndarray, np.ndarray]:
    """Scores (T,) by name, PIT and residuals (T, G) of draws (S, T, G); all in units of the genes. See `score_targets`."""
    scalar = score_law(draws, mean, noise, rng)
    pit, residual = scalar.pop("pit"), scalar.pop("residual")
    columns = {name: _mean_over_genes(values) for name, values in scalar.items()}
    columns |= {"energy": np.full(len(mean), np.nan), "variogram": np.full(len(mean), np.nan)}
    for t in range(len(mean)):
        if np.isfinite(draws[:, t]).all() and np.isfinite(noise[t]).all():
            noisy = add_noise(draws[:VECTOR_DRAWS, t], noise[t], rng)
            columns["energy"][t] = energy_score(noisy, mean[t]) / np.sqrt(mean.shape[1])
            pairs = max(len(varying) * (len(varying) - 1), 1)
            columns["variogram"][t] = variogram_score(noisy[:, varying], mean[t, varying]) / pairs
    return columns, pit, residual


def summarise_law(
    scores: Mapping[str, LawScores], labels: pd.DataFrame, seed: int = 0, bounds: Collection[str] = ()
) -> dict[str, Any]:
    """Compare models on the targets (rows of `labels`) that all of them could predict.

    Models named in `bounds` know the truth (ceiling, floor): they have a row, but no verdict is against them and a
    target that they lack is kept.

    Per model: mean over batches of the batch means, the batch means, ratio to the null in the same batches where
    there is one (jackknife error over batches, upper 90 % bound of a paired bootstrap), the worst (context, batch), PIT counts,
    and verdicts on the proper scores against every other model. Raises: ValueError without a common target.
    """
    judged = [name for name in scores if name not in bounds]
    common = np.all([scores[name].targets["crps"].notna() for name in judged], axis=0)
    if not common.any():
        raise ValueError(f"none of {len(labels)} targets was predicted by every one of {', '.join(scores)}")
    labels = labels[common]
    by_batch = {
        name: model.targets[common].groupby(labels["batch"].to_numpy(), sort=True).mean()
        for name, model in scores.items()
    }
    first = judged[0]
    result: dict[str, Any] = {
        "num_targets": int(common.sum()),
        "not_scored": [str(name) for name in scores[first].targets.index[~common]],
        "batches": [str(name) for name in by_batch[first].index],
        "models": {},
    }
    for name, model in scores.items():
        table = by_batch[name]
        pit = model.pit[common]
        result["models"][name] = {
            "mean": table.mean().to_dict(),
            "per_batch": {column: table[column].tolist() for column in table},
            "relative_to_null": {
                column: ratio_to(table[column].to_numpy(), by_batch[NULL][column].to_numpy(), seed)
                for column in (RATIOS if NULL in scores else ())
            },
            "worst_group": _worst_group(model.targets[common], labels),
            "pit_counts": np.histogram(pit[np.isfinite(pit)], PIT_BINS, (0, 1))[0].tolist(),
            "verdicts": {
                column: {
                    other: vars(verdict)
                    for other, verdict in verdicts(
                        table[column].to_numpy(),
                        {key: by_batch[key][column].to_numpy() for key in judged if key != name},
                    ).items()
                }
                for column in (JUDGED if name in judged else ())
            },
            "conformal": _conformal(model, common, labels),
        }
    return result


def _conformal(model: LawScores, common: np.ndarray, labels: pd.DataFrame) -> dict[str, float]:
    if model.residual is None:
        return {}
    width = model.targets[f"width_{conformal.LEVEL}"].to_numpy()[common]
    return conformal.conformal_summary(model.residual[common], width, labels["batch"].to_numpy(dtype=str))


def ratio_to(numerator: np.ndarray, denominator: np.ndarray, seed: int = 0) -> dict[str, Any]:
    """Ratio of two positive scores (B,) with its errors and the ratios per batch; nan where the denominator is not > 0
    or a batch has no score.

    An excess squared error below zero means that the baseline's error is lost in the noise of the truth.
    """
    if not (denominator.mean() > 0 and np.isfinite(numerator).all()):
        return {"ratio": np.nan, "standard_error": np.nan, "upper_90": np.nan, "per_batch": []}
    ratio, error = jackknife_ratio(numerator, denominator)
    upper = bootstrap_ratio_upper(numerator, denominator, np.random.default_rng(seed))
    with np.errstate(divide="ignore", invalid="ignore"):
        per_batch = (numerator / denominator).tolist()
    return {"ratio": ratio, "standard_error": error, "upper_90": upper, "per_batch": per_batch}


def jsonable(value: Any) -> Any:
    """The same nested value in plain JSON types; nan and infinities, which JSON does not know, become None."""
    if isinstance(value, Mapping):
        return {str(key): jsonable(item) for key, item in value.items()}
    if isinstance(value, list | tuple | np.ndarray):
        return [jsonable(item) for item in value]
    if isinstance(value, float | np.floating):
        return float(value) if np.isfinite(value) else None
    return value.item() if isinstance(value, np.generic) else value


def law_rows(summary: Mapping[str, Any]) -> pd.DataFrame:
    """The comparison of `summarise_law` as text, one row per model: what a table in the documentation shows."""
    rows = {}
    for name, model in summary["models"].items():
        mean, relative = model["mean"], model["relative_to_null"]
        rows[name] = {
            "excess squared error": _number(mean["excess"], 4),
            "excess x null": _with_error(relative.get("excess")),
            "CRPS": _number(mean["crps"], 4),
            "CRPS x null": _with_error(relative.get("crps")),
            "upper 90 %": _number(relative["crps"]["upper_90"] if relative else None),
            "energy score x null": _with_error(relative.get("energy")),
            "variogram score x null": _with_error(relative.get("variogram")),
            **{f"cover of {level} %": _number(mean[f"covered_{level}"]) for level in LEVELS},
            "width of 90 %": _number(mean["width_90"]),
            VERDICT: model["verdicts"].get("crps", {}).get(NULL, {}).get("outcome", ""),
            "worst group": f"{model['worst_group']['group']}: {_number(model['worst_group']['crps'])}",
        }
    return pd.DataFrame.from_dict(rows, orient="index")


def _with_error(ratio: Mapping[str, Any] | None) -> str:
    if ratio is None:
        return "-"
    return f"{_number(ratio['ratio'])} ± {_number(ratio['standard_error'])}"


def _number(value: float | None, digits: int = 3) -> str:
    return "-" if value is None or not np.isfinite(value) else f"{value:.{digits}f}"


def _mean_over_genes(values: np.ndarray) -> np.ndarray:
    known = np.isfinite(values)
    number = known.sum(1)
    total = np.where(known, values, 0.0).sum(1)
    return np.divide(total, number, out=np.full(len(values), np.nan), where=number > 0)


def _worst_group(targets: pd.DataFrame, labels: pd.DataFrame) -> dict[str, Any]:
    """The (context, batch) with the largest CRPS, averaged over its targets."""
    group = labels["context"].astype(str) + " | " + labels["batch"].astype(str)
    means = targets.groupby(group.to_numpy())[["crps", "covered_90"]].mean()
    worst = means["crps"].idxmax()
    return {"group": str(worst), "crps": means["crps"][worst], "covered_90": means["covered_90"][worst]}
