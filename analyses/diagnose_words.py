"""What each check asks, and what to say and do when it speaks: plain language, for readers who know no Bayes."""

from collections.abc import Callable
from typing import NamedTuple

from hilbertcell.inference.diagnostics.result import Result


class Words(NamedTuple):
    """The words of one check; `found` states the measured value, `bad` what a bad one means."""

    title: str
    asks: str
    null: str  # null law and level, one phrase
    found: Callable[[Result], str]
    good: str
    bad: str
    act: str


def _share(value: float) -> str:
    return f"{100 * value:.0f} %"


def _who(result: Result) -> str:
    return f" ({result.culprit})" if result.culprit else ""


HELD_OUT = "t statistic over held-out batches (from four on) among those of draws"

CHECKS: dict[str, Words] = {
    "course": Words(
        "Fitting had ended",
        "Was the fit still improving when it stopped?",
        "gain of at most 0.045 nats per unknown; rank test of the last two tenths of the steps",
        lambda r: f"The last tenth of the steps gained {r.statistic:.4f} nats per unknown.",
        "More steps would hardly change it.",
        "The fit was stopped while it still improved: its numbers would move if it went on.",
        "Fit again with more steps: num_steps in --settings, twice as many as now.",
    ),
    "chains": Words(
        "Chains agree",
        "Do independent runs of the sampler find the same answer?",
        "thresholds: r-hat 1.05, 1 % of divergences, 400 effective draws",
        lambda r: (
            f"Largest r-hat {r.statistic:.3f}{_who(r)}, smallest effective sample {r.details['smallest ess']:.0f}, "
            f"{100 * r.details['share diverging']:.1f} % divergences."
        ),
        "They do.",
        "The runs have not settled on one answer, or too few independent draws are left.",
        "Fit with another --seed; if that does not help, fit with --inference svi.",
    ),
    "guide_location": Words(
        "The fit lies where the data say",
        "Is the fitted distribution centred where it fits best?",
        "at most 0.3 sd from the optimum (root mean square); jackknife over draws",
        lambda r: f"It lies {r.statistic:.2f} of its own standard deviations from its best place.",
        "It is.",
        "Fitted values are biased: the stored fit is not the best one of its kind. It was stopped early or changed afterwards.",
        "Fit again, with more steps (num_steps in --settings) or a lower learning_rate.",
    ),
    "guide_width": Words(
        "The fit is as sure as it may be",
        "Is the fitted distribution as wide as it should be?",
        "widths between 0.8 and 1.25 of the best; t test over draws",
        lambda r: f"Its widths are {r.statistic:.2f} times those that fit best.",
        "It is.",
        "Uncertainties of the stored fit are too small (below 1) or too large (above 1).",
        "Fit again, with more steps (num_steps in --settings).",
    ),
    "importance": Words(
        "Draws could be made exact",
        "Is the fitted distribution so good that reweighting could make it exact?",
        "threshold: Pareto k 0.7; never an alarm",
        lambda r: f"Pareto k is {r.statistic:.2f} with {r.details['unknowns']:,.0f} unknowns.",
        "It is: the approximation is as good as exact.",
        "It is an approximation that reweighting cannot mend, as usual with hundreds of unknowns. Widths of single parameters "
        "are then somewhat too small; predictions have to be judged on batches left out.",
        "Run with --cross-validate; for small tables fit with --inference nuts.",
    ),
    "factors": Words(
        "Hidden conditions are known",
        "Did the data say anything about the hidden conditions (microenvironment) of batches?",
        "threshold: 20 % of the prior variance taken away; never an alarm",
        lambda r: "There are no hidden factors." if not r.details else f"The least known factor is {_share(r.statistic)} determined{_who(r)}.",
        "They did, where there are any.",
        "At least one hidden factor is hardly known: its values are assumptions, not findings. Predictions stay valid.",
        "Do not interpret that factor; fit with fewer (num_factors in --settings) or more batches.",
    ),
    "technical": Words(
        "Hidden conditions are not technical",
        "Are the hidden conditions just sequencing depth, cell numbers or composition?",
        "batches exchangeable; exact permutations, largest share over covariates",
        lambda r: (
            "There is nothing to compare." if not r.details else
            f"Hidden factors explain {_share(r.statistic)} of the differences in {r.culprit} between batches."
        ),
        "No more than chance would have it.",
        "What the fit calls microenvironment follows a technical quantity, and may be an artefact of it.",
        "Balance that quantity: downsample counts, or check the normalisation, then fit again; do not read the factor as biology.",
    ),
    "labels": Words(
        "Batch labels mean something",
        "Do populations of one batch have more in common than populations with exchanged labels?",
        "reversed: exchanged labels pass with probability 5 %",
        lambda r: f"Similarity within batches is {r.statistic:.3f} noise variances.",
        "They do.",
        "The batches are not told apart by the data: labels were mixed up, or batches do not differ.",
        "Check how cells were assigned to batches. If labels are right, a new batch's controls carry no information about it.",
    ),
    "copies": Words(
        "No cells are there twice",
        "Do two batches share cells?",
        "half of the cells shared; noise of means simulated",
        lambda r: f"The two closest populations are {r.statistic:.2f} noise variances apart; 1 is usual or less, 0 a copy{_who(r)}.",
        "No sign of it.",
        "Two populations that should be independent hold (largely) the same cells: batches are fewer than they seem.",
        "Remove one of the two from the file and fit again.",
    ),
    "response": Words(
        "Batches respond alike",
        "Does one batch respond far more, less, or the other way round?",
        "Grubbs: slopes of batches from one normal law",
        lambda r: "Too few batches to tell." if not r.details else (
            f"Batches respond {min(r.details.values()):.2f} to {max(r.details.values()):.2f} times as strongly as the others{_who(r)}."
        ),
        "None stands out.",
        "One batch responds unlike all others. Near -1: control and perturbed were exchanged; near 2 or 0: another dose, another "
        "scale, or treatment that failed.",
        "Look up how that batch was treated and labelled; correct it or leave it out.",
    ),
    "scale": Words(
        "Batches are on one scale",
        "Are the cells of one batch far more or less variable than those of others?",
        "Grubbs: log standard deviations of batches from one normal law",
        lambda r: "Too few batches to tell." if not r.details else (
            f"Log standard deviations of batches lie between {min(r.details.values()):+.2f} and {max(r.details.values()):+.2f}{_who(r)}."
        ),
        "None stands out.",
        "The cells of one batch differ in spread from all others, as data do that were logged twice, not at all, or normalised "
        "otherwise.",
        "Compare how the batches were processed; give all of them on one scale.",
    ),
    "spread between batches": Words(
        "The fit knows how batches differ",
        "Do tables made by the fit vary between batches as the measured one does?",
        "the fitted program; replicated tables (alarms rarer than nominal)",
        lambda r: f"Measured spread is {2.718281828 ** (r.statistic - r.details['expected']):.2f} times the expected one.",
        "They do.",
        "The fit expects batches to differ more, or less, than they do: its intervals are wrong by about this factor.",
        "Fit again; if it stays, widen or narrow intervals by that factor and run with --cross-validate.",
    ),
    "largest residual": Words(
        "No value is out of all proportion",
        "Is the most extreme population mean one that the fit would produce?",
        "the fitted program; replicated tables (alarms rarer than nominal)",
        lambda r: f"The largest deviation is {r.statistic:.1f} standard deviations; {r.details['expected']:.1f} are expected.",
        "It is.",
        "Some population mean is further out than the assumed bell curve allows: a batch that responds or does not, or a bad sample.",
        "Look for it in the data; with many batches try --law auto.",
    ),
    "slope on own baseline": Words(
        "Dependence on the baseline is right",
        "Do responses follow the untreated cells of their batch as the fit says?",
        "the fitted program; replicated tables (alarms rarer than nominal)",
        lambda r: f"The measured slope is {r.statistic:.2f}, the expected one {r.details['expected']:.2f}.",
        "They do.",
        "How responses follow the untreated cells is not what the fit assumes.",
        "Do not rely on differences between batches that come from their controls; check that controls and perturbed cells match.",
    ),
    "sensitivity": Words(
        "Answers do not hang on assumptions",
        "Would slightly stronger or weaker prior assumptions change the answers?",
        "threshold: power-scaling sensitivity 0.05; never an alarm",
        lambda r: f"Largest sensitivity to the prior: {r.statistic:.2f}{_who(r)}.",
        "Hardly.",
        "The named quantity leans on prior assumptions, as is usual with few batches: more batches would change it.",
        "Report it with its interval, and do not interpret it beyond that.",
    ),
    "cover": Words(
        "Intervals of new batches hold",
        "Do 90 % intervals hold 90 % of the means of batches that training did not see?",
        HELD_OUT,
        lambda r: f"They hold {_share(r.statistic)} of them in {len(r.details)} batches.",
        "About right.",
        "Stated uncertainty is wrong: below 90 % intervals are too narrow, above too wide.",
        "Trust the order of predictions more than their intervals; more batches, or --inference nuts, are the cure.",
    ),
    "pit": Words(
        "Predicted laws of new batches fit",
        "Do means of unseen batches fall evenly over their predicted laws?",
        HELD_OUT + ", place and spread, Holm",
        lambda r: f"The statistic that departs most is {r.statistic:.2f} (even: 0.5 for the place, 1 for the spread).",
        "About evenly.",
        "Predicted laws of unseen batches are shifted, too wide or too narrow.",
        "See the figure: one side only is a bias; both ends too often are laws too narrow.",
    ),
    "strength": Words(
        "Responses of new batches have the right size",
        "Are responses of unseen batches as strong as predicted?",
        HELD_OUT,
        lambda r: f"They are {r.statistic:.2f} times as strong as predicted.",
        "They are.",
        "Predicted responses are too strong (below 1), too weak (above 1) or have the wrong sign (below 0).",
        "Check scale and labels of training and new batches; do not use sizes of effects until it is explained.",
    ),
    "leak": Words(
        "Training did not see the answers",
        "Are the measured cells that judge the predictions among the training cells?",
        "half of the cells shared; noise of means simulated",
        lambda r: f"The closest training population is {r.statistic:.2f} noise variances away; 1 is usual, 0 a copy{_who(r)}.",
        "No sign of it.",
        "Populations that judge predictions were (largely) in the training data: every score is too good.",
        "Fit again with these cells left out: `hilbertcell split` and --holdout.",
    ),
    "calibration": Words(
        "The method recovers known truth",
        "On simulated screens laid out like this one, are the answers right as often as they claim?",
        "uniform ranks (SBC, TARP), Holm over quantities",
        lambda r: f"Smallest corrected p-value {r.statistic:.4f}{_who(r)}.",
        "They are.",
        "The named quantity is not known as well as the fit says, even where all assumptions hold.",
        "Do not interpret that quantity; predictions have an entry of their own. --inference nuts is exact.",
    ),
}  # fmt: skip
