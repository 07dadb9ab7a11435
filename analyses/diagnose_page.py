"""A diagnosis on the terminal, as a page and as JSON."""

import json
import math
from pathlib import Path
from statistics import median
from typing import Any

import jinja2
from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from hilbertcell.analyses import diagnose_plots as plots
from hilbertcell.analyses.diagnose import Diagnosis, Finding, summary_line
from hilbertcell.analyses.page_parts import inline_svg
from hilbertcell.inference.diagnostics.held_out import LEVEL

SIGNS = {"alarm": ("✗", "bold red"), "watch": ("!", "yellow"), "ok": ("✓", "green")}


def print_diagnosis(diagnosis: Diagnosis, console: Console) -> None:
    """The findings, most serious first: in full what needs attention, in one line each what does not."""
    console.print(Text(summary_line(diagnosis), style="bold"))
    for finding in diagnosis.findings:
        if finding.result.verdict == "ok":
            continue
        sign, colour = SIGNS[finding.result.verdict]
        head = Text.assemble(
            (f"{sign} {finding.result.verdict}: ", colour), (finding.title, "bold"), f"  {_p(finding)}"
        )
        body = f"{finding.meaning}\n→ {finding.action}" if finding.action else finding.meaning
        console.print(Padding(head, (1, 0, 0, 0)))
        console.print(Padding(Text(body), (0, 0, 0, 2)))
    passed = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), show_header=False)
    for finding in diagnosis.findings:
        if finding.result.verdict == "ok":
            passed.add_row(
                Text(f"✓ {finding.title}", style="green", no_wrap=True), Text(_p(finding), style="dim")
            )
    console.print(Padding(passed, (1, 0, 0, 0)))
    for note in diagnosis.notes:
        console.print(Padding(Text(note, style="dim"), (1, 0, 0, 0)))


def _p(finding: Finding) -> str:
    p = finding.result.p
    return "" if p is None else f"(p = {p:.3f})" if p >= 0.001 else "(p < 0.001)"


def to_json(diagnosis: Diagnosis, manifest: dict[str, Any]) -> dict[str, Any]:
    """Everything for machines; values that are not finite are null."""

    def number(value: float | None) -> float | None:
        return None if value is None or not math.isfinite(value) else float(value)

    return {
        "summary": summary_line(diagnosis),
        "counts": {verdict: diagnosis.count(verdict) for verdict in SIGNS},  # type: ignore[arg-type]
        **manifest,
        "findings": [
            {
                "check": f.check, "verdict": f.result.verdict, "title": f.title, "asks": f.asks, "null": f.null,
                "statistic": number(f.result.statistic), "p": number(f.result.p), "culprit": f.result.culprit,
                "meaning": f.meaning, "action": f.action,
                "details": {name: number(value) for name, value in f.result.details.items()},
            }
            for f in diagnosis.findings
        ],
        "notes": diagnosis.notes,
    }  # fmt: skip


def write_json(diagnosis: Diagnosis, path: Path, manifest: dict[str, Any]) -> None:
    """Write `to_json`."""
    path.write_text(json.dumps(to_json(diagnosis, manifest), indent=1) + "\n", encoding="utf-8")


def write_page(diagnosis: Diagnosis, path: Path, manifest: dict[str, Any]) -> None:
    """Write one self-contained HTML page: figures inside, nothing loaded from elsewhere, no script.

    `manifest` says what was examined: fit, data, version, seed.
    """
    loader = jinja2.FileSystemLoader(Path(__file__).with_name("templates"))
    environment = jinja2.Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True)
    page = environment.get_template("diagnostics.html").render(
        summary=summary_line(diagnosis),
        tiles=[
            {"value": diagnosis.count("alarm"), "label": "alarms: explain before use", "kind": "bad" if diagnosis.count("alarm") else ""},
            {"value": diagnosis.count("watch"), "label": "to keep in mind", "kind": "watch" if diagnosis.count("watch") else ""},
            {"value": diagnosis.count("ok"), "label": "checks passed", "kind": ""},
        ],
        findings=diagnosis.findings,
        p_of=_p,
        notes=diagnosis.notes,
        figures=_figures(diagnosis),
        manifest=manifest,
        signs={name: sign for name, (sign, _) in SIGNS.items()},
    )  # fmt: skip
    path.write_text(page, encoding="utf-8")


def _figures(diagnosis: Diagnosis) -> list[dict[str, Any]]:
    found = {finding.check: finding.result for finding in diagnosis.findings}
    figures: list[dict[str, Any]] = []

    def add(name: str, figure: Any, alt: str, caption: str) -> None:
        figures.append({"svg": inline_svg(figure, alt, name), "caption": caption})

    strengths = [value for value in found["response"].details.values() if math.isfinite(value)]
    if strengths:
        middle = median(strengths)
        add(
            "response",
            plots.by_batch(found["response"], middle, "strength of the response, relative to other batches"),
            f"Strength of the response of {len(strengths)} batches; half of them lie below {middle:.2f}.",
            "How strongly each batch responds, measured on the mean response of the others, whose own noise draws the numbers a "
            "little below 1. The line is the median; orange stands out.",
        )
    if "elbo" in diagnosis.tree["sample_stats"]:
        elbo = diagnosis.tree["sample_stats"]["elbo"].values[0]
        add(
            "course",
            plots.course(elbo),
            f"ELBO over {len(elbo)} steps, ending at {elbo[-len(elbo) // 10 :].mean():,.0f}.",
            "The course of fitting. The two grey bands are compared: the line should be level there.",
        )
    if diagnosis.held_out:
        cover = found["cover"]
        add(
            "pit",
            plots.pit(diagnosis.held_out),
            f"PIT plot of {len(diagnosis.held_out)} batches that training did not see.",
            "Thin lines: batches; thick: all. Level with zero is right. First below, then above zero: laws too wide; "
            "first above, then below: too narrow; on one side only: a bias.",
        )
        add(
            "cover",
            plots.by_batch(cover, LEVEL, "share of means inside their 90 % interval"),
            f"Cover of 90 % intervals by batch; {100 * cover.statistic:.0f} % on average.",
            "Each dot is a batch that training did not see; the line is what is promised.",
        )
    return figures
