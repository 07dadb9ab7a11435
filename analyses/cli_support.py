"""What every command shares: the options that name the columns, one door for errors, outputs that appear whole."""

import inspect
import json
import shlex
import shutil
import tempfile
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

import typer
from rich.console import Console

if TYPE_CHECKING:
    import anndata
    import pandas as pd

    from hilbertcell.data.populations import Populations
    from hilbertcell.inference.settings import Settings

results = Console()
notices = Console(stderr=True)

PANEL = "What the columns of obs mean"


class UsageProblem(ValueError):
    """A call that cannot be carried out as it was written; the message says why and what to write instead."""


class Scale(StrEnum):
    """The scale of X, as `read_populations` takes it."""

    counts = "counts"
    log1p = "log1p"
    other = "other"


class InferenceName(StrEnum):
    """How a program is learned; the setting `inference`."""

    svi = "svi"
    nuts = "nuts"
    auto = "auto"


InferenceOption = Annotated[
    InferenceName | None,
    typer.Option(
        "--inference", help="auto: nuts where it takes about two minutes at most.", show_default=False
    ),
]


class LawName(StrEnum):
    """The response law; the setting `law`."""

    gaussian = "gaussian"
    diffusion = "diffusion"
    auto = "auto"


LawOption = Annotated[
    LawName | None,
    typer.Option("--law", help="auto: what batches left out for the purpose prefer.", show_default=False),
]


def chosen_settings(path: Path | None, **flags: StrEnum | None) -> "Settings":
    """Settings of a TOML file, or the default ones; flags, by the name of their setting, go before the file."""
    from hilbertcell.inference.settings import Settings

    chosen = Settings() if path is None else Settings.from_toml(existing(path))
    given = {name: flag.value for name, flag in flags.items() if flag is not None}
    return chosen.model_copy(update=given)


FIT_FILES = frozenset({"manifest.json", "arrays.safetensors", "inference.nc"})


class SplitName(StrEnum):
    """The five ways to hide populations."""

    unseen_batch = "unseen_batch"
    unseen_pair = "unseen_pair"
    unseen_context = "unseen_context"
    unseen_perturbation = "unseen_perturbation"
    few_shot = "few_shot"


def _key(text: str, name: str | None = None, metavar: str = "KEY") -> Any:
    names = [] if name is None else [name]
    return typer.Option(*names, help=text, metavar=metavar, rich_help_panel=PANEL, show_default=False)


@dataclass(frozen=True, kw_only=True)
class KeyOptions:
    """The arguments of `read_populations` as options of a command, the same for every command that reads a file."""

    perturbation: Annotated[str, _key("Column that says what was done to the cell.")]
    control: Annotated[str, _key("The label in that column that means 'control'.", metavar="LABEL")]
    context: Annotated[str, _key("Column, or several with commas, of the kind of cell.", metavar="KEY[,KEY]")]
    batch: Annotated[str, _key("Column of the donor, replicate or plate.")]
    dose: Annotated[str | None, _key("Column of the dose.")] = None
    library_size: Annotated[str | None, _key("Column of each cell's total counts; without it, row sums.")] = (
        None
    )
    layer: Annotated[str | None, _key("Layer to read in place of X.", metavar="NAME")] = None
    scale: Annotated[Scale | None, _key("counts, log1p or other.", metavar="SCALE")] = None
    perturbation_features: Annotated[
        Path | None, _key("Table of features, one row per perturbation.", metavar="CSV")
    ] = None

    def read(self, file: Path) -> "Populations":
        """Validated populations of `file`; raises DataError with every problem of the file at once."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        values["context"] = tuple(key.strip() for key in self.context.split(","))
        values["scale"] = None if self.scale is None else self.scale.value
        return read_file(file, **values)

    def __str__(self) -> str:
        """The options as one types them."""
        given = [(field.name.replace("_", "-"), getattr(self, field.name)) for field in fields(self)]
        return " ".join(f"--{name} {shlex.quote(str(value))}" for name, value in given if value is not None)


def read_file(file: Path, **values: Any) -> "Populations":
    """`read_populations` with a progress bar, for a file that exists."""
    existing(file)
    from hilbertcell.data.anndata_io import read_populations

    return read_populations(file, progress=True, **values)


def command(app: typer.Typer) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Register a function as a command: adds `--debug`, and the nine key options where it takes `keys`.

    `keys: KeyOptions` makes the first four required; `keys: KeyOptions | None` makes all optional and passes None
    when none is given. Whatever the function raises ends in one paragraph and an exit code, see `fail`.
    """

    def register(function: Callable[..., None]) -> Callable[..., None]:
        hints = get_type_hints(function, include_extras=True)
        own = [
            parameter.replace(annotation=hints[name], kind=inspect.Parameter.KEYWORD_ONLY)
            for name, parameter in inspect.signature(function).parameters.items()
        ]
        optional = hints.get("keys") != KeyOptions
        if "keys" in hints:
            own = [parameter for parameter in own if parameter.name != "keys"] + _key_parameters(optional)
        debug = typer.Option("--debug", help="Show the traceback of an error.", show_default=False)
        own.append(
            inspect.Parameter(
                "debug", inspect.Parameter.KEYWORD_ONLY, default=False, annotation=Annotated[bool, debug]
            )
        )

        def run(debug: bool, **values: Any) -> None:
            try:
                if "keys" in hints:
                    values = _gather_keys(values, optional)
                function(**values)
            except (typer.Exit, typer.Abort):
                raise
            except Exception as error:  # noqa: BLE001 - the one door: every error becomes a message and a code
                fail(error, debug)

        run.__name__, run.__doc__ = function.__name__, function.__doc__
        run.__signature__ = inspect.Signature(own)  # type: ignore[attr-defined]
        run.__annotations__ = {}
        app.command(name=function.__name__)(run)
        return function

    return register


def _key_parameters(optional: bool) -> list[inspect.Parameter]:
    parameters = []
    for name, parameter in inspect.signature(KeyOptions).parameters.items():
        hint = get_type_hints(KeyOptions, include_extras=True)[name]
        if optional and parameter.default is inspect.Parameter.empty:
            hint, parameter = Annotated[str | None, *hint.__metadata__], parameter.replace(default=None)
        parameters.append(parameter.replace(annotation=hint))
    return parameters


def _gather_keys(values: dict[str, Any], optional: bool) -> dict[str, Any]:
    names = [field.name for field in fields(KeyOptions)]
    given = {name: values.pop(name) for name in names}
    if optional and all(value is None for value in given.values()):
        return values | {"keys": None}
    missing = [f"--{name}" for name in names[:4] if given[name] is None]
    if missing:
        raise UsageProblem(f"{', '.join(missing)} missing: they say what the columns of the file mean")
    return values | {"keys": KeyOptions(**given)}


def fail(error: Exception, debug: bool) -> None:
    """End the command: 2 and the message for bad input, 1 and one line for anything else.

    Bad input is what the file system refuses and any ValueError that our own code raised, since its message is
    written for the user; a ValueError out of the depths of a library is a defect of ours.
    """
    if debug:
        notices.print(
            "".join(traceback.format_exception(error)), markup=False, highlight=False, soft_wrap=True
        )
    if _is_bad_input(error):
        notices.print("[bold red]error:[/]", end=" ")
        notices.print(_plain(error), markup=False, highlight=False, soft_wrap=True)
        raise typer.Exit(2)
    notices.print("[bold red]failed:[/]", end=" ")
    text = f"{type(error).__name__}: {str(error).partition('\n')[0]}"
    cure = "" if debug else " (repeat the command with --debug to see where)"
    notices.print(text + cure, markup=False, highlight=False, soft_wrap=True)
    raise typer.Exit(1)


def _is_bad_input(error: Exception) -> bool:
    if isinstance(error, OSError):
        return error.filename is not None
    if not isinstance(error, ValueError):
        return False
    last = error.__traceback__
    while last is not None and last.tb_next is not None:
        last = last.tb_next
    return last is not None and last.tb_frame.f_globals["__name__"].startswith("hilbertcell.")


def _plain(error: Exception) -> str:
    if isinstance(error, OSError):
        return f"{error.filename}: {error.strerror}"
    return str(error)


def existing(path: Path) -> Path:
    """`path`, or a UsageProblem when nothing is there."""
    if not path.exists():
        raise UsageProblem(f"{path}: there is no such file; the current folder is {Path.cwd()}")
    return path


def check_output(path: Path, force: bool, *inputs: Path, contents: frozenset[str] | None = None) -> None:
    """Refuse, before any work is done, an output that could not be written or would replace what it should not.

    Args:
        path: the output, a file unless `contents` is given.
        force: whether it may replace what is there.
        inputs: what the command reads or also writes.
        contents: the names in a folder of this kind; a folder that holds anything else is never replaced.

    """
    if any(path.resolve() == given.resolve() for given in inputs):
        raise UsageProblem(f"{path}: is another file of this command; name another output")
    if path.exists() and not force:
        raise UsageProblem(f"{path}: exists already; name another output, or give --force to replace it")
    if path.is_dir() and contents is None:
        raise UsageProblem(f"{path}: is a folder and the output is a file; name another output")
    if path.exists() and contents is not None:
        strangers = (
            sorted({found.name for found in path.iterdir()} - contents) if path.is_dir() else [path.name]
        )
        if strangers:
            raise UsageProblem(f"{path}: holds {strangers[0]}, so it is not replaced; name another output")
    if not path.resolve().parent.is_dir():
        raise UsageProblem(f"{path}: the folder {path.resolve().parent} does not exist; make it first")


@contextmanager
def whole_output(path: Path) -> Iterator[Path]:
    """A temporary path beside `path` that takes its place when the block ends well and vanishes when it does not."""
    folder = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.resolve().parent))
    try:
        yield folder / path.name
        if path.is_dir():
            path.rename(folder / "replaced")
        (folder / path.name).replace(path)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def read_targets(path: Path) -> "pd.DataFrame":
    """Targets as a table. Raises: UsageProblem if the file is not one."""
    import pandas as pd

    try:
        table = pd.read_csv(path, dtype=str, keep_default_na=False)  # a perturbation may be called NA
        if "dose" in table:
            table["dose"] = pd.to_numeric(table["dose"].where(table["dose"] != ""))
    except ValueError as error:
        raise UsageProblem(
            f"{path}: is not a table of targets ({error}); write CSV, doses as numbers or empty"
        ) from None
    return table


def read_cells(path: Path) -> "anndata.AnnData":
    """Cells that `predict` wrote."""
    import anndata

    try:
        return anndata.read_h5ad(path)
    # What the reader raises depends on what is broken inside.
    except (OSError, KeyError, ValueError, TypeError, AttributeError) as error:
        reason = str(error).partition("\n")[0]
        raise UsageProblem(
            f"{path}: cannot be read as h5ad ({reason}); give cells that `predict` wrote"
        ) from None


def write_json(scores: dict, out: Path) -> None:
    """Write scores whole, and say where."""
    with whole_output(out) as path:
        path.write_text(json.dumps(scores, indent=1, ensure_ascii=False, allow_nan=False) + "\n")
    notices.print(f"scores written to {out}", highlight=False, markup=False)
