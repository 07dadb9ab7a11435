"""Reference pages that are written from the code: the command line from typer, the settings from pydantic."""

from enum import Enum
from pathlib import Path

from sphinx.application import Sphinx
from typer.main import get_command

from hilbertcell.analyses.cli import app as command_line
from hilbertcell.inference.perturbdiff.settings import PerturbDiffSettings
from hilbertcell.inference.settings import Settings, TomlSettings

PAGES = "reference/_generated"


def command_page() -> str:
    """All commands with their arguments and options, as `--help` has them."""
    lines = [
        "# The command line",
        "",
        "Written from the program itself, as `hilbertcell COMMAND --help` shows it. Exit code 2 is bad input, 1 a failure of",
        "ours; `--debug` shows the traceback of either.",
        "",
    ]
    for name, command in sorted(get_command(command_line).commands.items()):
        rows = []
        for parameter in command.params:
            if parameter.name in ("debug", "help"):
                continue
            option = parameter.opts[0].startswith("--")
            shown = f"`{parameter.opts[0]}`" if option else f"`{parameter.metavar}`"
            kind = parameter.type_descriptor.annotation
            if isinstance(kind, type) and issubclass(kind, Enum):
                value = ", ".join(f"`{one.value}`" for one in kind)
            else:
                value = parameter.metavar if option and parameter.metavar else ""
            default = "required" if parameter.required else ""
            rows.append((shown, _cell(value), _cell(parameter.help or ""), default))
        lines += [f"## {name}", "", _cell(command.help or ""), "", *_table(("", "value", "", ""), rows), ""]
    return "\n".join(lines)


def settings_page() -> str:
    """Every setting of both models with its default."""
    lines = [
        "# Settings",
        "",
        "A TOML file for `fit --settings FILE.toml`; what is not in it keeps its default.",
        "",
    ]
    for title, model in (("The hidden-factor program", Settings), ("PerturbDiff", PerturbDiffSettings)):
        lines += [f"## {title}", "", f"`{model.__module__}.{model.__name__}`", "", *_settings(model), ""]
    return "\n".join(lines)


def _settings(model: type[TomlSettings]) -> list[str]:
    rows = [
        (f"`{name}`", f"`{field.default!r}`", _cell(field.description or ""), "")
        for name, field in model.model_fields.items()
    ]
    return _table(("setting", "default", "", ""), rows)


def _table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> list[str]:
    return [f"| {' | '.join(row)} |" for row in (head, ("---",) * len(head), *rows)]


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def write(app: Sphinx) -> None:
    """Write the pages where they changed, so that Sphinx reads them again only then."""
    folder = Path(app.srcdir) / PAGES
    folder.mkdir(exist_ok=True)
    for name, text in (("cli", command_page()), ("settings", settings_page())):
        path = folder / f"{name}.md"
        if not path.exists() or path.read_text() != text:
            path.write_text(text)


def setup(app: Sphinx) -> dict[str, bool]:
    """Write them before Sphinx looks for sources."""
    app.connect("builder-inited", write)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
