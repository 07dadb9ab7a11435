"""Presets on small files of the published layouts: columns, control labels, what is hidden."""

import anndata
import numpy as np
import pandas as pd
import pytest

from hilbertcell.data.anndata_io import read_populations
from hilbertcell.data.presets import PRESETS, preset
from hilbertcell.data.splits import training_mask
from hilbertcell.data.unlabelled import read_unlabelled
from hilbertcell.data.validation import DataError


def small(perturbations, contexts, batches, columns) -> anndata.AnnData:
    """log1p values of 4 cells a population, 5 genes, with the published columns."""
    rng = np.random.default_rng(0)
    rows = [(p, c, b) for b in batches for c in contexts for p in perturbations for _ in range(4)]
    obs = pd.DataFrame(rows, columns=columns, index=[f"cell{i}" for i in range(len(rows))])
    var = pd.DataFrame(index=[f"g{i}" for i in range(5)])
    return anndata.AnnData(np.log1p(rng.gamma(1.0, 1.0, (len(rows), 5))).astype(np.float32), obs=obs, var=var)


FILES = {
    "parse-pbmc": (
        ("PBS", "IL-2", "IFN-beta"), ("B", "CD4 Naive"), ("Donor1", "Donor2", "Donor10", "Donor12"),
        ["cytokine", "cell_type", "donor"], {"B | IL-2 | Donor1", "CD4 Naive | IFN-beta | Donor12"}, "Donor10",
    ),
    "tahoe-100m": (
        ("[('DMSO_TF', 0.0, 'uM')]", "[('Drug A', 0.5, 'uM')]", "[('Drug A', 5.0, 'uM')]"), ("CVCL_1097", "CVCL_0001"),
        ("plate1", "plate2"), ["drugname_drugconc", "cell_line", "plate"],
        {"CVCL_1097 | [('Drug A', 5.0, 'uM')] | plate2"}, "CVCL_0001",
    ),
    "replogle-nadig": (
        ("non-targeting", "TP53", "MYC"), ("hepg2", "k562"), (1, 10), ["gene", "cell_line", "gem_group"],
        {"hepg2 | MYC | 10"}, "k562",
    ),
}  # fmt: skip


def read(name):
    file = FILES[name]
    return read_populations(small(*file[:4]), **preset(name).keys)


@pytest.mark.parametrize("name", FILES)
def test_what_is_hidden(name):
    populations = read(name)
    labels = populations.labels
    split = preset(name).split(labels)
    assert set(split.held_out) >= FILES[name][4]
    assert not any(FILES[name][5] in hidden for hidden in split.held_out)
    assert not labels.loc[list(split.held_out), "is_control"].any()
    trained = labels[training_mask(split, labels)]
    assert set(trained["context"]) == set(labels["context"])  # controls of held-out contexts are trained on
    assert trained["is_control"].sum() == labels["is_control"].sum()
    assert "the published experiment takes 2,000 variable genes" in preset(name).check_genes(populations)


def test_published_lists_hide_less_and_always_validation():
    labels = read("parse-pbmc").labels
    split = preset("parse-pbmc").split(labels, ["IL-2"])
    assert set(labels.loc[list(split.held_out), "perturbation"]) == {"IL-2", "IFN-beta"}
    none_of_them = preset("tahoe-100m").split(read("tahoe-100m").labels, ["[('Drug A', 5.0, 'uM')]"])
    assert none_of_them.held_out == (
        "CVCL_1097 | [('Drug A', 5.0, 'uM')] | plate1", "CVCL_1097 | [('Drug A', 5.0, 'uM')] | plate2",
    )  # fmt: skip


def test_other_files_are_refused():
    labels = read("parse-pbmc").labels
    with pytest.raises(DataError, match=r"hides batch '1', '4', '9', '12', of which there is no perturbed"):
        preset("parse-pbmc").split(labels[labels["batch"].isin(["Donor2", "Donor10"])])
    with pytest.raises(DataError, match="'IFN-beta', 'IL-2' would be hidden everywhere"):
        preset("parse-pbmc").split(labels[labels["batch"].isin(["Donor1", "Donor12"])])
    with pytest.raises(DataError, match=r"preset = 'pbmc': is not known; choose one of 'parse-pbmc'"):
        preset("pbmc")
    assert {p.prefix for p in PRESETS.values()} == {"pbmc_", "tahoe100m_", "replogle_"}


def test_unlabelled_cells(tmp_path):
    cells = small(("x",), ("B", "T"), ("d1", "d2"), ["anything", "cell_type", "donor_id"])
    cells.write_h5ad(tmp_path / "cells.h5ad")
    populations = read_unlabelled(
        tmp_path / "cells.h5ad", context=("cell_type",), batch="donor_id", scale="log1p"
    )
    assert len(populations.labels) == 4
    assert populations.labels["is_control"].all()
    np.testing.assert_allclose(populations.read_cells(np.arange(3)), cells.X[:3])
    (tmp_path / "bad.h5ad").write_text("no")
    with pytest.raises(DataError, match="cannot be read as h5ad"):
        read_unlabelled(tmp_path / "bad.h5ad", context=("cell_type",), batch="donor_id")
