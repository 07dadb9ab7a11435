"""Which genes differ between two populations, and whether prediction and truth agree on it.

A truth and a prediction are each tested against the *same* reference: real control cells of the batch that were
not transported. The number of genes called depends on the number of cells, so both sides must have equally many.
"""

import numpy as np
from scipy.stats import false_discovery_control, mannwhitneyu, rankdata, spearmanr


def rank_sum(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Wilcoxon rank-sum test per gene of cells x (n, G) against y (m, G): two-sided p-values (G,), shifts of mean (G,).

    Normal approximation with tie correction and *with* the continuity correction of 1/2, as scipy's
    `mannwhitneyu(method="asymptotic")`. A gene with one and the same value in all cells has p = 1. The shift
    mean(x) - mean(y) stands for the log fold change: on log1p data it is one, in natural logarithms, and it stays
    finite where a gene is absent from one side.
    """
    constant = (x == x[:1]).all(0) & (y == x[:1]).all(0)
    pvalue = np.ones(x.shape[1])
    if not constant.all():
        varying = ~constant
        pvalue[varying] = mannwhitneyu(x[:, varying], y[:, varying], axis=0, method="asymptotic").pvalue
    return pvalue, x.mean(0) - y.mean(0)


def benjamini_hochberg(pvalue: np.ndarray) -> np.ndarray:
    """Adjusted p-values (G,): calling those <= q keeps the expected share of false calls below q.

    Benjamini and Hochberg (1995), J. R. Stat. Soc. B 57.
    """
    return false_discovery_control(pvalue, method="bh")


def de_summary(
    prediction: np.ndarray, truth: np.ndarray, reference: np.ndarray, false_discovery_rate: float = 0.05
) -> dict[str, float]:
    """Agreement in differentially expressed (DE) genes of predicted cells (n, G) and true cells (m, G).

    Both are tested against reference control cells (k, G), on the scale of the models (log1p for counts); what is
    returned is that of `de_agreement`.
    """
    return de_agreement(*rank_sum(prediction, reference), *rank_sum(truth, reference), false_discovery_rate)


def de_agreement(
    pvalue: np.ndarray,
    shift: np.ndarray,
    true_pvalue: np.ndarray,
    true_shift: np.ndarray,
    false_discovery_rate: float = 0.05,
) -> dict[str, float]:
    """Agreement of two tests per gene, p-values and shifts (G,) each; the truth's second.

    With the called genes of each side in the order of |shift|, as in cell-eval:

    - `called`, `true`: number of genes called on each side, `called_ratio` their ratio;
    - `overlap_at_N`: share of the N true DE genes that are among the N first called ones;
    - `precision_at_N`: share of the N called genes that are among the N first true ones;
    - `lfc_spearman`: rank correlation of the shifts over the true DE genes (`de_spearman_lfc_sig`);
    - `direction_match`: share of the true DE genes with the right sign of the shift (`de_direction_match`);
    - `auroc`, `auprc`: how well the predicted adjusted p-values rank the true DE genes (`roc_auc`, `pr_auc`). They
      are floored at 1e-10 as there, so that many predicted cells tie the genes that are plainly called.

    A share of no genes is 0 when the other side has some and nan when there is nothing to find.
    """
    called = _called(pvalue, shift, false_discovery_rate)
    true = _called(true_pvalue, true_shift, false_discovery_rate)
    known = true.size > 0
    varies = true.size > 2 and np.ptp(shift[true]) > 0 and np.ptp(true_shift[true]) > 0
    label = np.isin(np.arange(len(pvalue)), true)
    auroc, auprc = ranking_areas(-np.log10(np.clip(benjamini_hochberg(pvalue), 1e-10, 1.0)), label)
    return {
        "called": float(called.size),
        "true": float(true.size),
        "called_ratio": called.size / true.size if known else float("nan"),
        "overlap_at_N": _share(true, called, true.size),
        "precision_at_N": _share(called, true, called.size),
        "lfc_spearman": float(spearmanr(shift[true], true_shift[true]).statistic) if varies else float("nan"),
        "direction_match": (
            float((np.sign(shift[true]) == np.sign(true_shift[true])).mean()) if known else float("nan")
        ),
        "auroc": auroc,
        "auprc": auprc,
    }


def ranking_areas(score: np.ndarray, label: np.ndarray) -> tuple[float, float]:
    """Area under the ROC curve and average precision of scores (G,) for labels (G,) bool; nan without both labels.

    Ties count half in the first; in the second a threshold takes all of them at once, and areas are sums of steps
    (no interpolation, which flatters: Davis and Goadrich 2006, ICML).
    """
    positive = int(label.sum())
    negative = len(label) - positive
    if not positive or not negative:
        return float("nan"), float("nan")
    ranks = rankdata(score)
    auroc = (ranks[label].sum() - positive * (positive + 1) / 2) / (positive * negative)
    order = np.argsort(-score, kind="stable")
    last = np.append(np.diff(score[order]) != 0, True)  # of each group of equal scores
    found = np.cumsum(label[order])[last]
    precision = found / (np.flatnonzero(last) + 1)
    return float(auroc), float(np.sum(np.diff(found, prepend=0) * precision) / positive)


def _called(pvalue: np.ndarray, shift: np.ndarray, false_discovery_rate: float) -> np.ndarray:
    """Indices of the called genes, largest |shift| first; ties in the order of the genes."""
    order = np.argsort(-np.abs(shift), kind="stable")
    return order[benjamini_hochberg(pvalue)[order] < false_discovery_rate]


def _share(wanted: np.ndarray, found: np.ndarray, number: int) -> float:
    if number == 0:
        return float("nan") if found.size == 0 else 0.0
    return np.intersect1d(wanted[:number], found[:number]).size / number
