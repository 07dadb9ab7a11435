"""Code blocks of Markdown pages."""

import re
import shlex
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
FENCE = re.compile(r"^```(?:\{code-block\} )?(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
OPTION = re.compile(r"^:(\w+): (.*)\n", re.MULTILINE)


class Block(NamedTuple):
    """One fenced block: its language, what it says, the file it is (`:caption:`), whether it is to be run."""

    language: str
    text: str
    caption: str | None
    runs: bool


def blocks(page: Path) -> list[Block]:
    """All blocks of a page in order."""
    found = []
    for language, body in FENCE.findall(page.read_text()):
        options = dict(OPTION.findall(body)) if body.startswith(":") else {}
        text = OPTION.sub("", body).lstrip("\n") if options else body
        found.append(Block(language, text, options.get("caption"), options.get("class") != "not-run"))
    return found


def commands(text: str) -> list[list[str]]:
    """Words of the `hilbertcell` commands of a shell block; `name="value"` lines are variables.

    Raises: ValueError at anything else, so that no line is passed over.
    """
    variables: dict[str, str] = {}
    found = []
    for line in text.replace("\\\n", " ").splitlines():
        if assigned := re.fullmatch(r'(\w+)="(.*)"', line.strip()):
            variables[assigned[1]] = assigned[2]
            continue
        words = shlex.split(re.sub(r"\$(\w+)", lambda name: variables[name[1]], line), comments=True)
        if words and words[0] != "hilbertcell":
            raise ValueError(f"{line!r}: is no hilbertcell command; mark the block `:class: not-run`")
        if words:
            found.append(words[1:])
    return found
