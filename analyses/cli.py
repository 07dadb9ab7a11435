"""The command line. Heavy packages are imported inside the commands, so that `--help` answers at once."""

import json
from importlib.metadata import version
from pathlib import Path
from typing import Annotated

import typer

from hilbertcell.analyses import cli_diagnose, cli_perturbdiff
from hilbertcell.analyses.cli_options import Cells, Draws, Force, Holdout, ModelName, PresetName, Seed
from hilbertcell.analyses.cli_options import file as _file
from hilbertcell.analyses.cli_options import flag as _flag
from hilbertcell.analyses.cli_options import given as _given
from hilbertcell.analyses.cli_options import out as _out
from hilbertcell.analyses.cli_support import (
    FIT_FILES,
    InferenceOption,
    KeyOptions,
    LawOption,
    SplitName,
    UsageProblem,
    check_output,
    chosen_settings,
    command,
    existing,
    notices,
    read_cells,
    read_file,
    read_targets,
    results,
    whole_output,
    write_json,
)

app = typer.Typer(
    help="Probabilistic programs for how cell populations respond to perturbations.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)

DEMO_FILES = frozenset(
    {
        "cells.h5ad",
        "split.json",
        "fit",
        "targets.csv",
        "draws.nc",
        "predicted.h5ad",
        "scores.json",
        "report.html",
    }
)


def _show_version(wanted: bool) -> None:
    if wanted:
        results.print(f"hilbertcell {version('hilbertcell')}", highlight=False)
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit."),
    ] = False,
) -> None:
    pass


@command(app)
def inspect(file: Cells, keys: KeyOptions) -> None:
    """Say which populations a file holds, what is missing, and what is wrong with it."""
    from hilbertcell.analyses.inspection import print_summary

    print_summary(keys.read(file), str(file), results)


@command(app)
def split(
    file: Cells,
    keys: KeyOptions,
    split: Annotated[SplitName, typer.Option(help="What is hidden.", show_default=False)],
    out: Annotated[Path, _out("SPLIT.json", "Where the split is written.")],
    seed: Seed = 0,
    force: Force = False,
) -> None:
    """Hide populations by a rule and a seed, to be predicted later."""
    from hilbertcell.data.splits import make_split

    check_output(out, force, file)
    made = make_split(keys.read(file).labels, split.value, seed=seed)
    with whole_output(out) as path:
        made.save(path)
    notices.print(f"{split.value} hides {len(made.held_out)} populations:", highlight=False)
    for name in made.held_out:
        results.print(name, markup=False, highlight=False, soft_wrap=True)


@command(app)
def fit(
    file: Cells,
    out: Annotated[Path, _out("FITDIR", "Folder the fit is written to.")],
    keys: KeyOptions | None = None,
    holdout: Holdout = None,
    seed: Seed = 0,
    settings: Annotated[Path | None, _given("FILE.toml", "Settings other than the default ones.")] = None,
    inference: InferenceOption = None,
    law: LawOption = None,
    model: Annotated[ModelName, typer.Option(help="What is fitted.")] = ModelName.hilbertcell,
    preset: Annotated[
        PresetName | None,
        typer.Option(help="Keys, hold-out and recipe of a published data set.", show_default=False),
    ] = None,
    test_perturbations: Annotated[
        Path | None, _given("NAMES.txt", "What the preset hides, one name a line; without it, everything.")
    ] = None,
    force: Force = False,
) -> None:
    """Fit the hidden-factor program, or PerturbDiff, to the populations of a file."""
    if preset is None and test_perturbations is not None:
        raise UsageProblem("--test-perturbations says what a --preset hides; without one, use --holdout")
    if keys is None and preset is None:
        raise UsageProblem("--perturbation, --control, --context and --batch are missing; or give --preset")
    check_output(out, force, file, contents=FIT_FILES)
    from hilbertcell.data.splits import Split

    hidden = None if holdout is None else Split.load(existing(holdout))
    if preset is not None:
        populations, hidden = cli_perturbdiff.from_preset(
            preset.value, file, keys, hidden, test_perturbations
        )
    else:
        assert keys is not None  # see above
        populations = keys.read(file)
    kept = out.with_name(f".{out.name}.streaming")
    if model is ModelName.perturbdiff:
        if inference is not None or law is not None:
            raise UsageProblem("--inference and --law are for the hidden-factor program")
        trained = cli_perturbdiff.fit_populations(populations, preset, hidden, seed, settings, kept)
        trained.save(out, force=force)
        notices.print(f"fit written to {out}", highlight=False, markup=False)
        return
    from hilbertcell.inference.fit import fit as fit_program

    chosen = chosen_settings(settings, inference=inference, law=law)
    fitted = fit_program(populations, holdout=hidden, seed=seed, settings=chosen, resume=kept, progress=True)
    fitted.save(out, force=force)
    for line in (*fitted.inference_notices, f"fit written to {out}"):
        notices.print(line, highlight=False, markup=False)


@command(app)
def predict(
    fit: Annotated[Path, _file("FITDIR", "Folder that `fit` wrote.")],
    file: Annotated[Path, _file("FILE", "Control cells of the batches to predict for, as h5ad or zarr.")],
    out: Annotated[Path, _out("DRAWS.nc", "Where the draws are written.")],
    targets: Annotated[
        Path | None,
        _given(
            "TARGETS.csv",
            "Columns context, perturbation, batch, and dose where there are doses. Without it, everything.",
        ),
    ] = None,
    num_samples: Annotated[int, typer.Option(help="Draws.", min=1, metavar="N")] = 500,
    seed: Seed = 0,
    observe: Annotated[bool, _flag("--observe", "Learn from the perturbed cells of FILE, too.")] = False,
    new_batch: Annotated[
        bool, _flag("--new-batch", "Batches of FILE are new, even where the fit knows their names.")
    ] = False,
    cells: Annotated[Path | None, _given("CELLS.h5ad", "Also sample predicted cells, written here.")] = None,
    cells_per_population: Annotated[
        int | None, _given("N", "Cells of each population; without it, as many as it has controls.", least=1)
    ] = None,
    draw_index: Annotated[
        int | None, _given("I", "Cells of drawn population I, not of the mean one.", least=0)
    ] = None,
    draws: Annotated[
        int | None, _given("R", "Cells of R drawn populations, labelled in obs['draw'].", least=1)
    ] = None,
    force: Force = False,
) -> None:
    """Draw response laws for batches of which only the controls are known."""
    check_output(out, force, file)
    _check_cells(
        cells, {"--cells-per-population": cells_per_population, "--draw-index": draw_index, "--draws": draws}
    )
    if cells is not None:
        check_output(cells, force, file, out)
    from hilbertcell.inference.fit import load_fit

    cli_perturbdiff.refuse_in_predict(existing(fit))
    wanted = None if targets is None else read_targets(existing(targets))
    fitted = load_fit(fit)
    populations = read_file(file, **vars(fitted.keys), require=() if observe else ("control",))
    unused = populations.labels.loc[~populations.labels["is_control"], "num_cells"].sum()
    if unused and not observe:
        notices.print(
            f"{unused:,} perturbed cells of {file} are ignored (--observe learns from them)", highlight=False
        )
    with whole_output(out) as path:
        drawn = fitted.predict(
            populations,
            targets=wanted,
            num_samples=num_samples,
            seed=seed,
            observe=observe,
            new_batch=new_batch,
            out=path,
            progress=True,
        )
        if cells is not None:
            sampled = fitted.sample_cells(
                drawn,
                populations,
                cells_per_population=cells_per_population,
                draw_index=draw_index,
                num_draws=draws,
                seed=seed,
            )
            with whole_output(cells) as cells_path:
                sampled.write_h5ad(cells_path, compression="gzip")
            notices.print(f"{sampled.n_obs:,} cells written to {cells}", highlight=False, markup=False)
        sizes = drawn["predictions"].sizes
        drawn.close()
    notices.print(
        f"{sizes['draw']:,} draws of {sizes['population']:,} populations written to {out}",
        highlight=False,
        markup=False,
    )


@command(app)
def evaluate(
    draws: Draws,
    truth: Annotated[Path, _file("TRUTH.h5ad", "Cells that hold the predicted populations.")],
    out: Annotated[Path, _out("SCORES.json", "Where the scores are written.")],
    cells: Annotated[Path | None, _given("CELLS.h5ad", "Predicted cells, scored as well.")] = None,
    force: Force = False,
) -> None:
    """Score draws, and cells, against the populations that were measured after all."""
    check_output(out, force, draws, truth)
    from hilbertcell.analyses.evaluate import evaluate as score
    from hilbertcell.analyses.scores_table import print_scores
    from hilbertcell.data.draws_io import read_draws
    from hilbertcell.data.populations import Keys

    drawn = read_draws(draws)
    keys = Keys.from_dict(json.loads(drawn.attrs["keys"]))
    sampled = None if cells is None else read_cells(existing(cells))
    scores = score(drawn, read_file(truth, **vars(keys), require=("perturbed",)), sampled)
    write_json(scores, out)
    print_scores(scores, results)


@command(app)
def benchmark(
    out: Annotated[Path, _out("PATH", "Where the results are written: JSON; with --config, a folder.")],
    file: Annotated[Path | None, _file("FILE", "Cells, as h5ad; or --config.")] = None,
    keys: KeyOptions | None = None,
    split: Annotated[SplitName | None, typer.Option(help="What is hidden.", show_default=False)] = None,
    config: Annotated[Path | None, _given("FILE.toml", "Data sets x splits x models x seeds.")] = None,
    seed: Seed = 0,
    force: Force = False,
) -> None:
    """Hide, fit, predict and score, beside the baselines that any model must beat.

    With --config, what the folder already holds is not computed again; exit code 1 if a model failed on a fold.
    """
    if config is not None:
        if file is not None or keys is not None or split is not None or seed:
            raise UsageProblem(
                "--config says what is compared: FILE, its keys, --split and --seed stand in it"
            )
        _benchmark_grid(existing(config), out)
        return
    if file is None or keys is None or split is None:
        raise UsageProblem(
            "missing: FILE with --perturbation, --control, --context, --batch and --split; or --config FILE.toml"
        )
    check_output(out, force, file)
    from hilbertcell.analyses.benchmark import benchmark as run_benchmark
    from hilbertcell.analyses.scores_table import print_scores

    scores = run_benchmark(keys.read(file), split.value, seed=seed, progress=True)
    write_json(scores, out)
    print_scores(scores, results)


def _benchmark_grid(config: Path, out: Path) -> None:
    if out.exists() and not out.is_dir():
        raise UsageProblem(f"{out}: is a file and the output is a folder; name another output")
    from hilbertcell.analyses.benchmark_config import BenchmarkConfig
    from hilbertcell.analyses.grid_output import run_and_write

    outcome = run_and_write(BenchmarkConfig.from_toml(config), out, progress=True)
    for text in outcome.failed:
        notices.print(f"failed: {text}", highlight=False, markup=False)
    notices.print(
        f"{outcome.computed:,} of {len(outcome.paths):,} cells computed now; tables and figure written to {out}",
        highlight=False,
        markup=False,
    )
    if outcome.failed:
        raise typer.Exit(1)


@command(app)
def report(
    draws: Draws,
    out: Annotated[Path, _out("REPORT.html", "Where the page is written.")],
    scores: Annotated[Path | None, _given("SCORES.json", "How they did, as `evaluate` wrote it.")] = None,
    force: Force = False,
) -> None:
    """Turn draws into a page that shows how far to trust them."""
    check_output(out, force, draws, *([] if scores is None else [existing(scores)]))
    from hilbertcell.analyses.report import report as write_report
    from hilbertcell.data.draws_io import read_draws

    with whole_output(out) as path:
        write_report(read_draws(draws), path, scores)
    notices.print(f"report written to {out}", highlight=False, markup=False)


@command(app)
def simulate(
    out: Annotated[Path, _out("FILE", "Where the cells are written, as h5ad.")],
    seed: Seed = 0,
    force: Force = False,
) -> None:
    """Write simulated donors with known microenvironments; the truth lies in uns['truth']."""
    check_output(out, force)
    from hilbertcell.analyses.simulated import simulate as simulate_cells

    cells = simulate_cells(seed)
    with whole_output(out) as path:
        cells.write_h5ad(path, compression="gzip")
    notices.print(
        f"{cells.n_obs:,} cells x {cells.n_vars:,} genes written to {out}", highlight=False, markup=False
    )


@command(app)
def demo(
    file: Annotated[Path | None, _file("FILE", "Cells, as h5ad; without it, simulated donors.")] = None,
    keys: KeyOptions | None = None,
    out: Annotated[Path, typer.Option(metavar="DIR", help="Folder for everything the demo makes.")] = Path(
        "demo"
    ),
    force: Force = False,
) -> None:
    """From cells to a report in one go: inspect, split, fit, predict, evaluate, report."""
    if (file is None) != (keys is None):
        raise UsageProblem(
            "a FILE needs --perturbation, --control, --context and --batch, and they need a FILE"
        )
    check_output(out, force, contents=DEMO_FILES)
    from hilbertcell.analyses.demo import run_demo

    run_demo(file, keys, out)


def _check_cells(cells: Path | None, options: dict[str, int | None]) -> None:
    given = [name for name, value in options.items() if value is not None]
    if given and cells is None:
        raise UsageProblem(
            f"{', '.join(given)} without --cells: name the file that the cells are to be written to"
        )
    if "--draw-index" in given and "--draws" in given:
        raise UsageProblem("--draw-index and --draws exclude each other: one drawn population, or several")


cli_diagnose.register(app)
cli_perturbdiff.register(app)


def main() -> None:
    """Run the command line."""
    app(prog_name="hilbertcell")
