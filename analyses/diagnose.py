"""May a fit be believed? Runs the checks of `inference.diagnostics` and says in plain words what was found."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import xarray as xr

from hilbertcell.analyses.diagnose_words import CHECKS
from hilbertcell.data.populations import Populations
from hilbertcell.inference.diagnostics import batches as of_batches
from hilbertcell.inference.diagnostics import convergence, microenvironments
from hilbertcell.inference.diagnostics.cross_validation import from_draws, leave_batches_out
from hilbertcell.inference.diagnostics.guide_gradients import guide_gradients
from hilbertcell.inference.diagnostics.held_out import HeldOut, held_out_checks
from hilbertcell.inference.diagnostics.on_request import calibrate_fit
from hilbertcell.inference.diagnostics.posterior import posterior_draws, posterior_tree, sensitivity
from hilbertcell.inference.diagnostics.replicates import predictive_checks
from hilbertcell.inference.diagnostics.result import ALARM, Result, Verdict
from hilbertcell.inference.diagnostics.tables import (
    Table,
    covariates,
    pairs_between,
    rows_by_batch,
    scale_of_batches,
    table_of,
)
from hilbertcell.inference.nuts import INVARIANTS

if TYPE_CHECKING:
    from hilbertcell.inference.fit import Fit

NUM_DRAWS = 199  # replicated tables: the smallest two-sided p-value is 1 %
_SEVERITY: dict[Verdict, int] = {"alarm": 0, "watch": 1, "ok": 2}


@dataclass(frozen=True)
class Finding:
    """One check and what it says.

    Attributes:
        check: name of the check.
        result: verdict, statistic, p-value, culprit and details.
        title: the claim that the check examines.
        asks: the question.
        null: null law and level.
        meaning: what was found and what it means.
        action: what to do about it; "" where nothing is to be done.

    """

    check: str
    result: Result
    title: str
    asks: str
    null: str
    meaning: str
    action: str


class Diagnosis(NamedTuple):
    """All findings, most serious first, and what they rest on."""

    findings: list[Finding]
    notes: list[str]  # law and inference and why; what was not looked at
    tree: xr.DataTree  # draws for az.plot_*: posterior, log_prior, log_likelihood, sample_stats
    held_out: list[HeldOut]

    def count(self, verdict: Verdict) -> int:
        """Findings with a verdict."""
        return sum(finding.result.verdict == verdict for finding in self.findings)

    @property
    def num_tests(self) -> int:
        """Findings that are tests, each of which alarms by chance."""
        return sum(finding.result.p is not None for finding in self.findings)


def diagnose(
    fit: "Fit",
    *,
    draws: xr.DataTree | None = None,
    truth: Populations | None = None,
    cross_validate: bool = False,
    calibrate: int = 0,
    seed: int = 0,
    progress: Callable[[str], None] = lambda _: None,
) -> Diagnosis:
    """Examine a fit.

    Args:
        fit: the fit.
        draws: predictions made with it, to be judged on `truth`; both or neither.
        truth: measured populations that the predictions are of.
        cross_validate: fit again without each batch in turn, from the stored moments: as many fits as batches.
        calibrate: so many simulated screens for SBC and TARP, at least 50; 0 for none.
        seed: same seed, same findings.
        progress: told what is being done.

    Raises:
        DataError: draws of other genes; nothing of the truth was predicted.
        ValueError: draws without truth or the other way round; fewer than 50 simulations.
    """
    if (draws is None) != (truth is None):
        raise ValueError("draws are judged on truth: give both or neither")
    if 0 < calibrate < 50:
        raise ValueError(f"calibrate = {calibrate}: fewer than 50 simulations show nothing; ask for 200")
    rng = np.random.default_rng(seed)
    table = table_of(fit, fit.moments)
    progress("inference")
    results = inference_checks(fit, seed)
    progress("draws")
    drawn = posterior_draws(fit, table, NUM_DRAWS, seed)
    tree = posterior_tree(drawn, fit.table.batches)
    tree["sample_stats"] = xr.DataTree(fit.sample_stats)
    progress("batches")
    results |= table_checks(fit, table, rng)
    results["factors"] = microenvironments.known_factors(drawn.microenvironment)
    values, names = covariates(fit.moments)
    mean = drawn.microenvironment.mean(0)
    results["technical"] = microenvironments.explained_by(mean, values, names, rng)
    results |= predictive_checks(table.mean, drawn.replicates, table.kinds())
    results["sensitivity"] = sensitivity(tree, list(drawn.scalars))
    held: list[HeldOut] = []
    if draws is not None and truth is not None:
        progress("predictions and truth")
        held, results["leak"] = judge_draws(fit, draws, truth, seed)
    elif cross_validate:
        held = leave_batches_out(fit, seed, lambda batch: progress(f"fitting without {batch}"))
    if held:
        results |= held_out_checks(held, rng)
    if calibrate:
        progress(f"{calibrate} simulated screens")
        results["calibration"] = calibrate_fit(fit, calibrate, seed)
    findings = [_finding(name, result) for name, result in results.items()]
    findings.sort(key=lambda f: (_SEVERITY[f.result.verdict], 1.0 if f.result.p is None else f.result.p))
    return Diagnosis(findings, _notes(fit, bool(held), bool(calibrate)), tree, held)


def inference_checks(fit: "Fit", seed: int) -> dict[str, Result]:
    """Course of the bound and the guide of a variational fit; chains of one by NUTS."""
    if fit.sampling:
        rhat, ess, diverging = (fit.sampling[name] for name in ("rhat", "ess", "diverging"))
        return {"chains": convergence.chains(rhat, ess, diverging, INVARIANTS)}
    found = guide_gradients(fit, seed)
    number = found.score.shape[1]
    results = {
        "course": convergence.bound_drift(fit.losses, number),
        "importance": convergence.importance_tail(found.log_ratio, number),
    }
    if fit.settings.objective == "elbo":  # only there is the gradient of the ELBO to be zero
        results["guide_location"] = convergence.guide_location(found.score)
        results["guide_width"] = convergence.guide_width(found.width)
    return results


def table_checks(fit: "Fit", table: Table, rng: np.random.Generator) -> dict[str, Result]:
    """What the measured table says of its own labels, whatever the fit."""
    batch = table.labels["batch"].to_numpy()
    names = list(rows_by_batch(table.labels))
    everyone = np.ones(len(batch), dtype=bool)
    pairs = pairs_between(table.kind, batch, everyone, everyone)
    slopes = of_batches.response_slopes(*table.responses())
    return {
        "labels": of_batches.batch_labels(table.residual(), table.kind, batch, rng),
        "copies": of_batches.copied_cells(
            table.mean, table.noise_variance, pairs, table.noise(rng, NUM_DRAWS), list(table.labels.index)
        ),
        "response": of_batches.outlying_batch(slopes, names, rng),
        "scale": of_batches.outlying_batch(
            scale_of_batches(fit.moments, table.kind, len(fit.genes)), names, rng
        ),
    }


def judge_draws(
    fit: "Fit", draws: xr.DataTree, truth: Populations, seed: int
) -> tuple[list[HeldOut], Result]:
    """Predictions beside their truth, and whether training saw that truth under whatever name."""
    moments = fit.summarise(truth.match_genes(fit.genes))
    held = from_draws(fit, draws, moments, seed)
    judged = moments.select(moments.labels.index.isin(draws["predictions"]["population"].values.astype(str)))
    both = fit.moments.join(judged)
    table, new = table_of(fit, both), np.arange(len(both.n)) >= len(fit.moments.n)
    # Every row is a batch of its own here: the same name on both sides is the plainest leak.
    pairs = pairs_between(table.kind, np.arange(len(new)), ~new, new)
    noise = table.noise(np.random.default_rng(seed), NUM_DRAWS)
    leak = of_batches.copied_cells(table.mean, table.noise_variance, pairs, noise, list(table.labels.index))
    return held, leak


def _finding(check: str, result: Result) -> Finding:
    words = CHECKS[check]
    good = result.verdict == "ok"
    if np.isnan(result.statistic) and result.p is None and not result.details:
        return Finding(
            check, result, words.title, words.asks, words.null, "There is too little to judge by.", ""
        )
    meaning = f"{words.found(result)} {words.good if good else words.bad}"
    return Finding(check, result, words.title, words.asks, words.null, meaning, "" if good else words.act)


def _notes(fit: "Fit", held: bool, calibrated: bool) -> list[str]:
    method, reason = fit.inference
    learned = "NUTS" if method == "nuts" else "variational inference"
    notes = [f"Learned by {learned} ({reason}); response law: {fit.choice.name} ({fit.choice.reason})."]
    if not held:
        notes.append(
            f"Not looked at: predictions of unseen batches. --cross-validate fits {len(fit.table.batches)} times, each "
            "without one batch; --draws and --truth judge predictions that were made."
        )
    if not calibrated:
        notes.append(
            "Not looked at: whether the method recovers known truth (--calibrate 200; minutes on small screens)."
        )
    return notes


def summary_line(diagnosis: Diagnosis) -> str:
    """The first sentence a reader sees."""
    alarms, watches = diagnosis.count("alarm"), diagnosis.count("watch")
    if alarms:
        start = f"{alarms} alarm{'s' if alarms > 1 else ''}: do not rely on this fit before {'they are' if alarms > 1 else 'it is'} explained."
    elif watches:
        start = (
            f"No alarm. {watches} finding{'s' if watches > 1 else ''} to keep in mind when reading results."
        )
    else:
        start = "No alarm: nothing was found that speaks against this fit."
    chance = 1 - (1 - ALARM) ** diagnosis.num_tests
    return f"{start} A good fit raises an alarm by chance in about {100 * chance:.0f} of 100 cases."
