"""Do the checks of `diagnose` fail when they must, and only then? `python -m hilbertcell.analyses.diagnostics_benchmark`.

Writes docs/diagnostics.md: what every check says of every planted fault, and how often checks raise an alarm where
nothing is wrong.
"""

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path

from hilbertcell.analyses.alarm_rates import NUM_SIMULATIONS, Rate, all_rates
from hilbertcell.analyses.diagnose import diagnose
from hilbertcell.analyses.planted_faults import FAULTS, honest
from hilbertcell.inference.diagnostics.result import Verdict

COMMAND = "python -m hilbertcell.analyses.diagnostics_benchmark"
_SHORT: dict[Verdict, str] = {"alarm": "**alarm**", "watch": "watch", "ok": ""}
_PAGE = """# Do the checks work?

[`hilbertcell diagnose`](howto/diagnose.md) examines a fit. This page examines `hilbertcell diagnose`: a check has to
speak when something is wrong, and to be silent when nothing is. All of it comes from `{command}`.

## Planted faults

The world has 12 donors, two tissues, a control and two drugs, 12 genes; eight donors are fitted, four predicted
(`analyses/planted_faults.py`). Each fault was planted, the screen fitted again where the fault lies in the data, and
everything examined by `diagnose` with draws and truth. The expected check is the one that the fault was planted for; the
other alarms show where else it is seen.

{faults}

{missed}Data all on the wrong scale are refused before any fit: whole numbers declared `log1p`, and fractions declared
`counts`, end with an error that names the cure. `importance` and `sensitivity` say "watch" of the
honest world already, as of most screens with few batches and variational inference, and never more: they are left out of the
table.

## Alarms where nothing is wrong

{number:,} simulations of the null law of each check, at the level of arrays, with the functions that `diagnose` calls. Nominal levels
are 1 % for an alarm and 5 % for an alarm or a watch; in brackets the binomial 99 % interval of the count. Where the null
is a region ("gains at most so much"), the edge of it was simulated: inside, alarms are rarer. The three checks against replicated
tables were given the true unknowns of the program; with fitted ones, which saw the table, alarms are rarer. The check of batch
labels is reversed: labels that mean nothing were simulated, and it counts how often they pass.

{rates}

What was simulated:

{simulated}

Thresholds without a p-value (Pareto k, contraction, sensitivity to the prior) never raise an alarm.
"""


def fault_table(verdicts: Mapping[str, Mapping[str, Verdict]]) -> str:
    """A row per fault: the expected check and what it said, and every other alarm and watch."""
    lines = ["| fault | expected of | said | other alarms | other watches |", "|---|---|---|---|---|"]
    for name, found in verdicts.items():
        expected = FAULTS[name].expected if name in FAULTS else ()
        said = ", ".join(_SHORT[found[check]] or "ok" for check in expected) or "-"
        others = {
            verdict: ", ".join(
                c
                for c, v in found.items()
                if v == verdict and c not in (*expected, "importance", "sensitivity")
            )
            for verdict in ("alarm", "watch")
        }
        row = [name, ", ".join(expected) or "nothing", said, others["alarm"] or "-", others["watch"] or "-"]
        lines.append(f"| {' | '.join(row)} |")
    return "\n".join(lines)


def rate_table(rates: Sequence[Rate]) -> str:
    """A row per check: counts beside their intervals."""
    lines = ["| check | alarms | alarms or watches | within |", "|---|---|---|---|"]
    for rate in rates:
        cells = [
            f"{count} [{low}, {high}]"
            for count, (low, high) in zip((rate.alarms, rate.flagged), rate.intervals, strict=True)
        ]
        lines.append(f"| {rate.check} | {cells[0]} | {cells[1]} | {'yes' if rate.holds else '**no**'} |")
    return "\n".join(lines)


def missed(verdicts: Mapping[str, Mapping[str, Verdict]]) -> list[str]:
    """Faults of which no expected check raised an alarm."""
    return [
        name
        for name, fault in FAULTS.items()
        if name in verdicts and not any(verdicts[name][check] == "alarm" for check in fault.expected)
    ]


def main() -> None:
    """Run the benchmark and write the page."""
    parser = argparse.ArgumentParser(prog="hilbertcell.analyses.diagnostics_benchmark", description=__doc__)
    parser.add_argument(
        "--simulations", type=int, default=NUM_SIMULATIONS, help="simulations of each null law"
    )
    parser.add_argument("--out", type=Path, default=Path("docs/diagnostics.md"), help="the page")
    options = parser.parse_args()
    world = honest()
    verdicts: dict[str, dict[str, Verdict]] = {}
    for name in ("none (the honest world)", *FAULTS):
        planted = FAULTS[name].make(world) if name in FAULTS else world
        found = diagnose(planted.fit, draws=planted.draws, truth=planted.truth)
        verdicts[name] = {finding.check: finding.result.verdict for finding in found.findings}
        print(
            name, {check: verdict for check, verdict in verdicts[name].items() if verdict != "ok"}, flush=True
        )
    rates = all_rates(options.simulations)
    lost = missed(verdicts)
    told = dict.fromkeys(f"- {rate.check}: {rate.simulated}" for rate in rates)
    options.out.write_text(
        _PAGE.format(
            command=COMMAND,
            faults=fault_table(verdicts),
            missed=f"Missed: {', '.join(lost)}.\n\n" if lost else "",
            number=options.simulations,
            rates=rate_table(rates),
            simulated="\n".join(told),
        ),
        encoding="utf-8",
    )
    print(f"written to {options.out}")


if __name__ == "__main__":
    main()
