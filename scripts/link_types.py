"""Make the git-ignored tree `.types/hilbertcell/`, the package as static checkers need to see it.

The top-level folders become sub-packages by the package map of pyproject.toml, which an editable install follows
with an import hook; mypy follows no hook, so it is given links instead.
"""

import shutil
import tomllib
from pathlib import Path

root = Path(__file__).resolve().parent.parent
tree = root / ".types"
package_map = tomllib.loads((root / "pyproject.toml").read_text())["tool"]["setuptools"]["package-dir"]

shutil.rmtree(tree, ignore_errors=True)
top = tree / "hilbertcell"
top.mkdir(parents=True)
for file in (root / package_map.pop("hilbertcell")).iterdir():
    if file.is_file():
        (top / file.name).symlink_to(file)
for package, folder in package_map.items():
    if package.count(".") == 1:  # a deeper package lies inside the folder of its parent
        (top / package.removeprefix("hilbertcell.")).symlink_to(root / folder)
