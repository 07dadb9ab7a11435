"""The how-to runs as it stands, block after block."""

import re
import runpy
from pathlib import Path

import numpy as np

from tests.untrained_law import with_law

from ..conftest import make_screen

PAGE = Path(__file__).resolve().parents[3] / "docs" / "howto" / "torch.md"
F = 0.5  # what the network of the fit says everywhere


def test_the_blocks_of_the_page_run(torch, without_d5, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with_law(without_d5, F).save(tmp_path / "fit")
    screen = make_screen()
    screen.write_h5ad(tmp_path / "screen.h5ad")
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    assert len(blocks) == 4
    names: dict = {}
    for number, block in enumerate(blocks, 1):
        (tmp_path / f"block{number}.py").write_text(block)
        names |= runpy.run_path(f"block{number}.py", names)
        if "v" in names:
            check_draws(names["v"].numpy(), *(leaf.numpy() for leaf in names["condition"][:3]))
    assert "network.blocks.0.inner.weight" in names["names"]
    labels = screen.obs[["tissue", "drug", "donor"]].agg(" | ".join, axis=1)
    for i, name in enumerate(names["labels"].index):
        expected = screen.X[(labels == name).to_numpy()].mean(0)
        np.testing.assert_allclose(names["means"][i], expected, atol=1e-5)


def check_draws(v: np.ndarray, mean: np.ndarray, vectors: np.ndarray, values: np.ndarray) -> None:
    """A constant F moves whitened points by F times the clock, pi / 2 in all, less what the gate keeps shut."""
    assert v.shape == (1000, len(mean))
    z = (v - mean) @ vectors / np.sqrt(values)
    moved = vectors @ z.mean(0) / (F * np.pi / 2)
    assert np.abs(np.cov(z.T) - np.eye(len(mean))).max() < 4.5 * np.sqrt(2 / len(v))
    assert np.abs(moved - 0.9).max() < 0.1 + 4.5 / (F * np.pi / 2) / np.sqrt(len(v))
