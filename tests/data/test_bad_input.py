"""Every kind of broken input is refused by name, with a cure, and never with a traceback of another library."""

import h5py
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp

from hilbertcell.data.validation import DataError


def with_values(change):
    """Change the counts: `change(x)` gets the dense array and edits it."""

    def edit(adata):
        x = adata.X.toarray()
        change(x)
        adata.X = sp.csr_matrix(x)

    return edit


def put(row, gene, value):
    def change(x):
        x[row, gene] = value

    return with_values(change)


def logged(x):
    x[...] = np.log1p(1e4 * x / np.maximum(x.sum(axis=1, keepdims=True), 1))


def half(x):
    x[...] = x * 25.5


def texts(column, change):
    """Rewrite the labels of an obs column, as plain strings."""

    def edit(adata):
        adata.obs[column] = change(adata.obs[column].astype(str).to_numpy(dtype=object))

    return edit


def first(value):
    def change(labels):
        labels[0] = value
        return labels

    return change


def replaced(old, new):
    return lambda labels: np.where(labels == old, new, labels)


def some(old, new):
    """Every second label `old` becomes `new`."""

    def change(labels):
        labels[np.flatnonzero(labels == old)[::2]] = new
        return labels

    return change


def column(name, value):
    def edit(adata):
        adata.obs[name] = value

    return edit


def twice_named(axis):
    def edit(adata):
        frame = getattr(adata, axis)
        frame.index = [frame.index[1], *frame.index[1:]]

    return edit


def only(label):
    return lambda adata: adata[adata.obs["treatment"] == label].copy()


def nothing(adata):
    return None


FEATURES = pd.DataFrame({"f": [1.0, 2.0]}, index=["IFNb", "TNF"])

# what is broken: (how, keywords, culprits named, cure offered)
BROKEN = {
    "missing perturbation key": (nothing, {"perturbation": "treatmnt"}, ["treatmnt"], "did you mean 'treatment'"),
    "missing context key": (nothing, {"context": ("cell_type", "organ")}, ["organ"], "there are 'cell_type'"),
    "missing batch key": (nothing, {"batch": "patient"}, ["batch", "patient"], "there are"),
    "missing dose key": (nothing, {"dose": "uM"}, ["dose", "uM"], "there are"),
    "missing library size key": (nothing, {"library_size": "n_umi"}, ["n_umi"], "there are"),
    "no context key": (nothing, {"context": ()}, ["context"], "name at least one"),
    "one key in two roles": (nothing, {"batch": "cell_type"}, ["cell_type", "context"], "a column of its own"),
    "missing layer": (nothing, {"layer": "raw"}, ["layer", "raw"], "there are none"),
    "absent control label": (nothing, {"control": "DMSO"}, ["DMSO"], "'IFNb', 'IFNb+TNF', 'TNF', 'vehicle'"),
    "no control cells": (only("TNF"), {}, ["control", "vehicle"], "there are 'TNF'"),
    "no perturbed cells": (only("vehicle"), {}, ["treatment"], "add perturbed cells"),
    "missing label": (texts("donor", first(np.nan)), {}, ["donor", "1 cell without a label"], "label these cells"),
    "label written nan": (texts("cell_type", first("nan")), {}, ["cell_type", "without a label"], "label these"),
    "empty label": (texts("treatment", first(" ")), {}, ["treatment", "without a label"], "label these cells"),
    "labels differ by case": (texts("treatment", some("TNF", "tnf")), {}, ["'TNF'", "'tnf'"], "use one"),
    "labels differ by spaces": (texts("donor", some("d1", "d1 ")), {}, ["'d1'", "'d1 '"], "use one"),
    "control differs by case": (texts("treatment", some("vehicle", "Vehicle")), {}, ["'Vehicle'"], "use one"),
    "combination with an empty part": (texts("treatment", replaced("TNF", "TNF+")), {}, ["'TNF+'"], "'A+B'"),
    "combination with the control": (
        texts("treatment", replaced("TNF", "TNF+vehicle")),
        {},
        ["'TNF+vehicle'", "control"],
        "each part once",
    ),
    "one combination in two orders": (
        texts("treatment", some("IFNb+TNF", "TNF+IFNb")),
        {},
        ["'IFNb+TNF'", "'TNF+IFNb'"],
        "use one",
    ),
    "parts differ by case": (texts("treatment", replaced("IFNb+TNF", "ifnb+TNF")), {}, ["'ifnb'", "'IFNb'"], "use one"),
    "dose of text": (column("dose", "10uM"), {"dose": "dose"}, ["dose", "'10uM'"], "store numbers"),
    "dose missing": (column("dose", np.nan), {"dose": "dose"}, ["dose", "without a finite dose"], "a number"),
    "doses that print alike": (
        lambda adata: column("dose", 1 + 1e-9 * np.arange(len(adata)))(adata),
        {"dose": "dose"},
        ["@ 1 |"],
        "round the doses",
    ),
    "nan": (put(3, 2, np.nan), {"scale": "counts"}, ["X = nan", "gene 'g2'"], "remove these cells"),
    "inf in other scale": (put(3, 2, np.inf), {"scale": "other"}, ["X = inf", "gene 'g2'"], "remove these cells"),
    "negative count": (put(5, 1, -2), {}, ["-2.0", "gene 'g1'"], "repair the counts"),
    "negative count in other scale": (put(5, 1, -2), {"scale": "other"}, ["-2.0"], "repair the counts"),
    "negative log1p": (with_values(lambda x: logged(x) or x.__setitem__((0, 0), -0.5)), {"scale": "log1p"}, ["-0.5"], "scale='other'"),
    "fractions as counts": (with_values(half), {"scale": "counts"}, ["X = ", "whole numbers"], "layer="),
    "logged as counts": (with_values(logged), {"scale": "counts"}, ["logged data"], "scale='log1p'"),
    "counts as log1p": (nothing, {"scale": "log1p"}, ["scale = 'log1p'", "whole number"], "scale='counts'"),
    "scale not declared": (with_values(logged), {}, ["scale = None", "values from 0 to "], "pass scale='log1p'"),
    "unknown scale": (nothing, {"scale": "cpm"}, ["'cpm'"], "'counts', 'log1p', 'other'"),
    "duplicate genes": (twice_named("var"), {}, ["gene names", "'g1'"], "var_names_make_unique"),
    "duplicate cells": (twice_named("obs"), {}, ["cell names", "'cell"], "obs_names_make_unique"),
    "library size of log data": (with_values(logged), {"scale": "log1p", "library_size": "total"}, ["total"], "leave library_size out"),
    "library size of zero": (column("total", 0.0), {"library_size": "total"}, ["total"], "a column of total counts"),
    "library size of text": (column("total", "many"), {"library_size": "total"}, ["'many'"], "total counts"),
    "features of too few": (nothing, {"perturbation_features": FEATURES[:1]}, ["'TNF'"], "add a row for each"),
    "features with nan": (nothing, {"perturbation_features": FEATURES * np.nan}, ["'IFNb'"], "fill in"),
    "features of text": (nothing, {"perturbation_features": FEATURES.astype(str)}, ["'f'"], "encode them"),
    "features twice": (nothing, {"perturbation_features": FEATURES.iloc[[0, 0, 1]]}, ["'IFNb'"], "one row per"),
    "features that are not there": (nothing, {"perturbation_features": "no.csv"}, ["no.csv"], "give a CSV file"),
    "column-major": (lambda adata: setattr(adata, "X", adata.X.tocsc()), {}, ["csc_matrix"], "tocsr()"),
    "no cells": (lambda adata: adata[:0].copy(), {}, ["0 cells"], "a file with cells"),
}  # fmt: skip


@pytest.mark.parametrize("how", BROKEN)
def test_broken_file_is_refused_with_its_cure(how, make_screen, read, tmp_path):
    change, keywords, culprits, cure = BROKEN[how]
    adata = make_screen()
    changed = change(adata)  # edits in place, or returns another AnnData
    adata = adata if changed is None else changed
    path = tmp_path / "broken.h5ad"
    adata.write_h5ad(path)
    with pytest.raises(DataError) as error:
        read(path, **keywords)
    message = str(error.value)
    for text in (*culprits, cure):
        assert text in message
    assert str(path) in message.splitlines()[0] or "source" in message
    problems = message.splitlines()[1:]
    assert message.startswith(f"{len(problems)} problem")
    assert all(line.startswith("  ") and ": " in line and "; " in line for line in problems)


def test_a_missing_layer_of_an_anndata_lists_those_there_are(make_screen, read):
    adata = make_screen()
    with pytest.raises(DataError, match="layer = 'raw': is not a layer of AnnData; there are none"):
        read(adata, layer="raw")
    adata.layers["spliced"] = adata.X
    with pytest.raises(DataError, match=r"there are 'spliced'$"):
        read(adata, layer="raw")


def test_labels_of_two_types_are_refused(make_screen, read):
    adata = make_screen()
    donors = adata.obs["donor"].astype(str).to_numpy(dtype=object)
    donors[donors == "d0"], donors[donors == "d1"] = 1, "1"
    adata.obs["donor"] = donors
    with pytest.raises(DataError, match=r"batch = 'donor': labels of different types .* '1'; use one type"):
        read(adata)


def test_all_problems_are_reported_together(make_screen, read):
    adata = make_screen()
    put(3, 2, -1)(adata)
    texts("donor", first(np.nan))(adata)
    column("dose", "high")(adata)
    with pytest.raises(DataError) as error:
        read(adata, control="DMSO", dose="dose", library_size="n_umi", context="organ")
    message = str(error.value)
    assert message.startswith("6 problems in AnnData:\n")
    for text in (
        "context = 'organ'",
        "library_size = 'n_umi'",
        "batch = 'donor'",
        "control = 'DMSO'",
        "'high'",
        "X = -1.0",
    ):
        assert text in message


def test_unreadable_files(make_screen, read, tmp_path):
    whole = tmp_path / "whole.h5ad"
    make_screen(genes=200).write_h5ad(whole, compression="gzip")
    size = whole.stat().st_size
    for kept in (0, 100, size // 2, size - 1000):
        path = tmp_path / f"cut{kept}.h5ad"
        path.write_bytes(whole.read_bytes()[:kept])
        with pytest.raises(DataError, match=f"cut{kept}"):
            read(path)
    (tmp_path / "text.h5ad").write_text("gene,cell\n")
    with pytest.raises(DataError, match=r"text\.h5ad.*cannot be read"):
        read(tmp_path / "text.h5ad")
    with pytest.raises(DataError, match=r"none\.h5ad.*does not exist"):
        read(tmp_path / "none.h5ad")
    with pytest.raises(DataError, match="is a folder"):
        read(tmp_path)
    with pytest.raises(DataError, match="names no file"):
        read([])


def test_damage_inside_a_file(make_screen, read, tmp_path):
    """Blocks of bytes overwritten inside the compressed values: the pass finds them, as a DataError."""
    path = tmp_path / "damaged.h5ad"
    make_screen(genes=200).write_h5ad(path, compression="gzip")
    with h5py.File(path) as file:
        chunk = file["X/data"].id.get_chunk_info(0)
    raw = bytearray(path.read_bytes())
    raw[chunk.byte_offset + 10 : chunk.byte_offset + chunk.size - 10] = b"\0" * (chunk.size - 20)
    path.write_bytes(raw)
    with pytest.raises(DataError, match=r"cannot read 'X'.*damaged\.h5ad"):
        read(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda file: file.__delitem__("X"), "holds no X"),
        (lambda file: file.__delitem__("obs"), "holds no obs"),
        (lambda file: file["X/indices"].__setitem__(0, 99), "damaged"),
        (lambda file: file["X/indptr"].__setitem__(1, -5), "damaged"),
        (lambda file: file["X"].attrs.__setitem__("shape", [3, 7]), r"has shape \(3, 7\)"),
        (lambda file: file["obs/donor"].__delitem__("codes"), "cannot be read as h5ad"),
    ],
)
def test_unsound_h5ad(change, message, make_screen, read, tmp_path):
    path = tmp_path / "unsound.h5ad"
    make_screen().write_h5ad(path)
    with h5py.File(path, "r+") as file:
        change(file)
    with pytest.raises(DataError, match=message):
        read(path)


def test_files_that_do_not_go_together(make_screen, read, tmp_path):
    one, other = make_screen(), make_screen(seed=1)
    other.obs_names = "other-" + other.obs_names
    with pytest.raises(DataError, match=r"cell names = 'cell.*prefix per file"):
        read([one, one])
    with pytest.raises(DataError, match=r"genes differ .* missing 'g6', extra none"):
        read([one, other[:, :6].copy()])
    other.obs = other.obs.rename(columns={"donor": "patient"})
    other.write_h5ad(tmp_path / "other.h5ad")
    with pytest.raises(DataError, match=r"batch = 'donor': is not a column of obs of .*other\.h5ad"):
        read([one, tmp_path / "other.h5ad"])


def test_backed_views_are_refused(make_screen, read, tmp_path):
    import anndata

    make_screen().write_h5ad(tmp_path / "a.h5ad")
    backed = anndata.read_h5ad(tmp_path / "a.h5ad", backed="r")
    with pytest.raises(DataError, match=r"view of a backed AnnData; call to_memory\(\)"):
        read(backed[:10])
    backed.file.close()
