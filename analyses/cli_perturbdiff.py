"""Commands of PerturbDiff: pretrain, finetune, generate, convert; and its part of `fit`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from hilbertcell.analyses.cli_options import (
    Cells,
    Force,
    Holdout,
    PresetName,
    SamplerName,
    Seed,
    file,
    flag,
    given,
    out,
)
from hilbertcell.analyses.cli_support import (
    KeyOptions,
    Scale,
    UsageProblem,
    check_output,
    command,
    existing,
    notices,
    read_file,
    read_targets,
    whole_output,
)

if TYPE_CHECKING:
    from hilbertcell.data.populations import Populations
    from hilbertcell.data.splits import Split
    from hilbertcell.inference.perturbdiff.fit import PerturbDiffFit
    from hilbertcell.inference.perturbdiff.settings import PerturbDiffSettings

FIT_FILES = frozenset({"manifest.json", "arrays.safetensors"})
SettingsFile = Annotated[Path | None, given("FILE.toml", "Settings other than the default ones.")]
FitFolder = Annotated[Path, file("FITDIR", "Folder with a PerturbDiff fit.")]


def from_preset(
    name: str, path: Path, keys: KeyOptions | None, hidden: "Split | None", listed: Path | None
) -> tuple["Populations", "Split"]:
    """Populations and hold-out of a preset, less what was given otherwise."""
    from hilbertcell.data.presets import preset

    chosen = preset(name)
    if keys is None:
        keys = KeyOptions(**(chosen.keys | {"scale": Scale(chosen.keys["scale"])}))
    names = None if listed is None else [line.strip() for line in existing(listed).read_text().splitlines()]
    populations = keys.read(path)
    if notice := chosen.check_genes(populations):
        notices.print(notice, highlight=False, markup=False)
    if hidden is None:
        hidden = chosen.split(populations.labels, names and [name for name in names if name])
    return populations, hidden


def fit_populations(
    populations: "Populations",
    preset: PresetName | None,
    hidden: "Split | None",
    seed: int,
    settings: Path | None,
    kept: Path,
) -> "PerturbDiffFit":
    """`fit --model perturbdiff`."""
    from hilbertcell.inference.perturbdiff.fit import fit_perturbdiff

    chosen = _settings(settings, preset)
    return fit_perturbdiff(
        populations, holdout=hidden, seed=seed, settings=chosen, resume=kept, progress=True
    )


def refuse_in_predict(folder: Path) -> None:
    """`predict` makes laws, of which PerturbDiff has none."""
    from hilbertcell.inference.perturbdiff.storage import is_perturbdiff

    if is_perturbdiff(folder):
        raise UsageProblem(
            f"{folder}: is a PerturbDiff fit, which has cells and no law; use `hilbertcell generate`"
        )


def register(app: typer.Typer) -> None:
    """Add the commands to the command line."""
    for function in (pretrain, finetune, generate, convert):
        command(app)(function)


def pretrain(
    file: Cells,
    out: Annotated[Path, out("FITDIR", "Folder the pretrained networks are written to.")],
    context: Annotated[
        str,
        typer.Option(
            metavar="KEY[,KEY]", help="Column, or several, of the kind of cell.", show_default=False
        ),
    ],
    batch: Annotated[
        str, typer.Option(metavar="KEY", help="Column of the donor, replicate or plate.", show_default=False)
    ],
    scale: Annotated[Scale | None, typer.Option(help="counts, log1p or other.", show_default=False)] = None,
    library_size: Annotated[
        str | None, given("KEY", "Column of each cell's total counts; without it, row sums.")
    ] = None,
    settings: SettingsFile = None,
    seed: Seed = 0,
    force: Force = False,
) -> None:
    """Pretrain PerturbDiff on unlabelled cells: contexts only, no controls, no perturbations."""
    check_output(out, force, file, contents=FIT_FILES)
    from hilbertcell.data.unlabelled import read_unlabelled
    from hilbertcell.inference.perturbdiff.fit import fit_perturbdiff

    populations = read_unlabelled(
        existing(file),
        context=tuple(key.strip() for key in context.split(",")),
        batch=batch,
        scale=None if scale is None else scale.value,
        library_size=library_size,
        progress=True,
    )
    chosen = _settings(settings, None).model_copy(update={"drop_control": 1.0})
    kept = out.with_name(f".{out.name}.streaming")
    fit_perturbdiff(populations, seed=seed, settings=chosen, resume=kept, progress=True).save(
        out, force=force
    )
    notices.print(f"pretrained networks written to {out}", highlight=False, markup=False)


def finetune(
    pretrained: FitFolder,
    file: Cells,
    keys: KeyOptions,
    out: Annotated[Path, out("FITDIR", "Folder the fit is written to.")],
    holdout: Holdout = None,
    settings: SettingsFile = None,
    reset_modulation: Annotated[
        bool, flag("--reset-modulation", "Begin with blocks that do nothing.")
    ] = False,
    seed: Seed = 0,
    force: Force = False,
) -> None:
    """Fine-tune pretrained PerturbDiff networks on perturbed cells: new heads, new perturbations, new genes if need be."""
    check_output(out, force, file, pretrained, contents=FIT_FILES)
    from hilbertcell.data.splits import Split
    from hilbertcell.inference.perturbdiff.finetuning import begin_at
    from hilbertcell.inference.perturbdiff.fit import fit_perturbdiff
    from hilbertcell.inference.perturbdiff.storage import load_perturbdiff

    hidden = None if holdout is None else Split.load(existing(holdout))
    start = load_perturbdiff(existing(pretrained))
    populations = keys.read(file)
    begun, chosen = begin_at(
        start, populations, _settings(settings, None), seed=seed, reset_modulation=reset_modulation
    )
    kept = out.with_name(f".{out.name}.streaming")
    fitted = fit_perturbdiff(
        populations, holdout=hidden, seed=seed, settings=chosen, start=begun, resume=kept, progress=True
    )
    fitted.save(out, force=force)
    notices.print(f"fit written to {out}", highlight=False, markup=False)


def generate(
    fit: FitFolder,
    file: Annotated[Path, file("FILE", "Control cells of the batches to predict for.")],
    out: Annotated[Path, out("CELLS.h5ad", "Where the cells are written, on the natural scale.")],
    targets: Annotated[
        Path, given("TARGETS.csv", "Columns context, perturbation, batch, and dose where there are doses.")
    ],
    cells_per_population: Annotated[
        int, typer.Option(min=1, metavar="N", help="Cells of each population.")
    ] = 256,
    sampler: Annotated[
        SamplerName | None, typer.Option(help="Other than the fit's.", show_default=False)
    ] = None,
    start_time: Annotated[
        int | None, given("T", "Index of the chain to start below; 1000 is all of it.", least=2)
    ] = None,
    sample_steps: Annotated[int | None, given("K", "Steps of the sampler.", least=2)] = None,
    guidance: Annotated[
        float | None, typer.Option(metavar="W", min=0.0, help="0 halves the cost.", show_default=False)
    ] = None,
    seed: Seed = 0,
    force: Force = False,
) -> None:
    """Generate cells of populations of which only the controls are known, by a PerturbDiff fit."""
    check_output(out, force, file, fit)
    from hilbertcell.analyses.generated_cells import generated_cells
    from hilbertcell.inference.perturbdiff.storage import load_perturbdiff

    wanted = read_targets(existing(targets))
    fitted = load_perturbdiff(existing(fit))
    if fitted.keys is None:
        raise UsageProblem(
            f"{fit}: does not say what the columns of a file mean; convert it again with --preset"
        )
    given = {
        "sampler": sampler and sampler.value,
        "start_time": start_time,
        "sample_steps": sample_steps,
        "guidance": guidance,
    }
    populations = read_file(file, **vars(fitted.keys), require=("control",))
    changes = {name: value for name, value in given.items() if value is not None}
    made = generated_cells(fitted, populations, wanted, cells_per_population, seed, **changes)
    with whole_output(out) as path:
        made.write_h5ad(path, compression="gzip")
    notices.print(f"{made.n_obs:,} cells written to {out}", highlight=False, markup=False)


def convert(
    file: Annotated[Path, file("FILE", "A torch checkpoint, or a folder with a PerturbDiff fit.")],
    out: Annotated[Path, out("PATH", "The folder, or the torch checkpoint, that is made of it.")],
    preset: Annotated[
        PresetName | None, typer.Option(help="The data set a checkpoint is of.", show_default=False)
    ] = None,
    genes: Annotated[
        Path | None, given("GENES.txt", "Genes of a checkpoint in its order, one a line.")
    ] = None,
    force: Force = False,
) -> None:
    """Turn a published torch checkpoint into a fit, or a fit into a torch checkpoint. Needs the extra torch."""
    from hilbertcell.inference.perturbdiff.storage import from_torch, load_perturbdiff, to_torch

    if existing(file).is_dir():
        check_output(out, force, file)
        with whole_output(out) as path:
            to_torch(load_perturbdiff(file), path)
    else:
        check_output(out, force, file, contents=FIT_FILES)
        keys, prefix, chosen = None, "", None
        if preset is not None:
            from hilbertcell.data import presets
            from hilbertcell.data.populations import Keys

            found = presets.preset(preset.value)
            keys = Keys(**(found.keys | {"context": (found.keys["context"],)}))
            prefix, chosen = found.prefix, _settings(None, preset)
        names = None
        if genes is not None:
            import numpy as np

            names = np.array(existing(genes).read_text().split(), dtype=str)
        from_torch(file, keys=keys, genes=names, prefix=prefix, settings=chosen).save(out, force=force)
    notices.print(f"{file} written as {out}", highlight=False, markup=False)


def _settings(path: Path | None, name: PresetName | None) -> "PerturbDiffSettings":
    """Settings of a file, before those of a preset, before the default ones."""
    from hilbertcell.inference.perturbdiff.settings import PerturbDiffSettings

    given = PerturbDiffSettings() if path is None else PerturbDiffSettings.from_toml(existing(path))
    if name is None:
        return given
    from hilbertcell.data.presets import preset

    recipe = preset(name.value).settings
    return PerturbDiffSettings(**(recipe | given.model_dump(include=given.model_fields_set)))
