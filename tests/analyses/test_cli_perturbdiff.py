"""PerturbDiff on the command line: what is refused at once, and one run through all its commands."""

import json

import anndata
import numpy as np
import pandas as pd
import pytest

from hilbertcell.inference.perturbdiff.storage import load_perturbdiff

QUICK = """
hidden = 16
depth = 1
num_heads = 2
covariate_hidden = 4
gene_features = 0
set_size = 8
cells_per_batch = 32
max_steps = 224
start_time = 1000
sample_steps = 4
"""


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--test-perturbations", "x.txt"), "says what a --preset hides"),
        ((), "are missing; or give --preset"),
        (("--preset", "parse-pbmc"), "'cytokine': is not a column of obs"),
    ],
)
def test_fit_refuses(words, message, screen_file, call, tmp_path):
    code, text = call("fit", screen_file, "--model", "perturbdiff", *words, "--out", tmp_path / "fit")
    assert code == 2, text
    assert message in text


def test_settings_of_the_program_are_not_those_of_perturbdiff(screen_file, keys, call, tmp_path):
    (tmp_path / "s.toml").write_text("num_factors = 2")
    common = ("fit", screen_file, *keys(), "--model", "perturbdiff", "--out", tmp_path / "fit")
    code, text = call(*common, "--settings", tmp_path / "s.toml")
    assert code == 2
    assert "num_factors: Extra inputs are not permitted" in text
    code, text = call(*common, "--inference", "nuts")
    assert code == 2
    assert "for the hidden-factor program" in text


def test_convert_refuses_what_is_no_checkpoint(torch, screen_file, call, tmp_path):
    code, text = call("convert", screen_file, "--out", tmp_path / "fit")
    assert code == 2, text
    assert "no zip archive" in text
    assert not (tmp_path / "fit").exists()


@pytest.mark.slow
def test_one_run(torch, screen, screen_file, keys, call, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "quick.toml").write_text(QUICK)
    (tmp_path / "targets.csv").write_text("context,perturbation,batch\nB,A,d1\nT,B,d2\n")

    code, text = call(
        "pretrain",
        screen_file,
        "--context",
        "cell_type",
        "--batch",
        "donor",
        "--settings",
        "quick.toml",
        "--out",
        "pre",
    )
    assert code == 0, text
    code, text = call("finetune", "pre", screen_file, *keys(), "--settings", "quick.toml", "--out", "tuned")
    assert code == 0, text
    code, text = call(
        "fit", screen_file, *keys(), "--model", "perturbdiff", "--settings", "quick.toml", "--out", "fit"
    )
    assert code == 0, text
    assert load_perturbdiff("fit").keys.perturbation == "drug"
    assert not (tmp_path / ".fit.streaming").exists()

    for folder in ("fit", "tuned"):
        code, text = call("generate", folder, screen_file, "--targets", "targets.csv", "--cells-per-population", "7",
                          "--sampler", "dpm", "--guidance", "0", "--out", f"{folder}.h5ad")  # fmt: skip
        assert code == 0, text
    code, text = call(
        "generate", "fit", screen_file, "--targets", "targets.csv", "--start-time", "3", "--out", "no.h5ad"
    )
    assert code == 2
    assert "sample_steps = 4 is more than the start_time = 3 indices there are" in " ".join(text.split())
    cells = anndata.read_h5ad("fit.h5ad")
    assert cells.shape == (14, 8)
    assert cells.obs["donor"].tolist() == ["d1"] * 7 + ["d2"] * 7
    assert cells.uns["provenance"]["evaluations_per_cell"] == 4
    assert np.isfinite(cells.X).all()

    code, text = call("predict", "fit", screen_file, "--out", "draws.nc")
    assert code == 2
    assert "use `hilbertcell generate`" in text

    code, text = call("convert", "fit", "--out", "fit.ckpt")
    assert code == 0, text
    (tmp_path / "genes.txt").write_text("\n".join(screen.var_names))
    code, text = call(
        "convert", "fit.ckpt", "--genes", "genes.txt", "--preset", "parse-pbmc", "--out", "again"
    )
    assert code == 0, text
    again, own = load_perturbdiff("again"), load_perturbdiff("fit")
    assert again.keys.control == "PBS"
    np.testing.assert_array_equal(again.networks[0].head.linear.weight, own.networks[0].head.linear.weight)


@pytest.mark.slow
def test_a_preset_is_the_published_experiment(call, tmp_path):
    """A small file of the layout of the PBMC data: nothing but the preset says what its columns mean."""
    rng = np.random.default_rng(0)
    rows = [
        (c, t, f"Donor{d}")
        for d in (1, 2, 3)
        for t in ("B", "T")
        for c in ("PBS", "IL-2", "IFN-beta")
        for _ in range(10)
    ]
    obs = pd.DataFrame(
        rows, columns=["cytokine", "cell_type", "donor"], index=[f"c{i}" for i in range(len(rows))]
    )
    x = np.log1p(rng.gamma(1.0, 1.0, (len(rows), 6))).astype(np.float32)
    anndata.AnnData(x, obs=obs, var=pd.DataFrame(index=[f"g{i}" for i in range(6)])).write_h5ad(
        tmp_path / "pbmc.h5ad"
    )
    (tmp_path / "quick.toml").write_text(QUICK)
    words = ("--preset", "parse-pbmc", "--model", "perturbdiff", "--settings", tmp_path / "quick.toml")
    code, text = call("fit", tmp_path / "pbmc.h5ad", *words, "--out", tmp_path / "fit")
    assert code == 0, text
    assert "2,000 variable genes" in text
    manifest = json.loads((tmp_path / "fit" / "manifest.json").read_text())
    assert {name.split(" | ")[2] for name in manifest["held_out"]} == {"Donor1"}
    assert manifest["settings"]["learning_rate"] == 2e-4
    assert manifest["settings"]["set_size"] == 8  # the file goes before the preset
    assert set(manifest["vocabulary"]["batch"]) == {"Donor1", "Donor2", "Donor3"}
