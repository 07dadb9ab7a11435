"""The benchmark of decoders: who gets which cells, what a target holds, what the ceiling is."""

import anndata
import numpy as np
import pandas as pd
import pytest
from scipy import sparse

from hilbertcell.analyses import transport_benchmark as bench
from hilbertcell.analyses.transport_speed import simulated_counts, speed
from hilbertcell.data.anndata_io import read_populations

GENES = 40
CONTROLS, PERTURBED = np.arange(160), np.arange(160, 240)


@pytest.fixture(scope="module")
def knockouts():
    """160 controls and 80 cells of one knock-out that doubles genes 0..9."""
    rng = np.random.default_rng(0)
    fold = np.ones((240, GENES))
    fold[PERTURBED, :10] = 2.0
    counts = rng.poisson(rng.lognormal(0, 0.3, (240, 1)) * np.linspace(0.5, 5, GENES) * fold)
    obs = pd.DataFrame(
        {"gene": np.repeat(["none", "KO"], [160, 80]), "line": "THP1", "plate": "p1", "total": counts.sum(1)},
        index=[f"c{i:03d}" for i in range(240)],
    )
    screen = anndata.AnnData(
        sparse.csr_matrix(counts.astype(np.float32)), obs, pd.DataFrame(index=[f"g{i}" for i in range(GENES)])
    )
    return read_populations(
        screen, perturbation="gene", control="none", context="line", batch="plate", library_size="total"
    )


def natural(populations, cells):
    counts = populations.read_cells(cells).toarray()
    return np.log1p(1e4 * counts / populations.library_size[cells][:, None])


def rows_of(found, among):
    """Positions in `among` (m, G) of the rows of found (n, G)."""
    return {int(np.abs(among - row).max(1).argmin()) for row in found}


def test_source_and_reference_are_disjoint_and_the_truth_is_what_the_effect_is_of(knockouts):
    task = bench.make_task(knockouts, CONTROLS, PERTURBED, 0)
    controls, perturbed = natural(knockouts, CONTROLS), natural(knockouts, PERTURBED)
    source, reference = rows_of(task.source, controls), rows_of(task.reference, controls)
    assert (len(source), len(reference)) == (80, 80)
    assert not source & reference
    assert rows_of(task.truth, perturbed) == set(range(80))
    np.testing.assert_allclose(bench.other_perturbed(task, None, None), task.truth)


def test_other_cells_are_not_the_truth(knockouts):
    task = bench.make_task(knockouts, CONTROLS, PERTURBED, 0, other_cells=True)
    perturbed = natural(knockouts, PERTURBED)
    truth, others = (
        rows_of(task.truth, perturbed),
        rows_of(bench.other_perturbed(task, None, None), perturbed),
    )
    assert (len(truth), len(others), len(task.source)) == (40, 40, 40)
    assert not truth & others
    assert not np.allclose(task.target(bench.CONTROL_EFFECTS + bench.OTHERS), task.target(bench.TRUE_MEANS))


def test_targets_are_what_their_words_say(knockouts):
    task = bench.make_task(knockouts, CONTROLS, PERTURBED, 0)
    controls = natural(knockouts, CONTROLS).mean(0)
    effect = natural(knockouts, PERTURBED).mean(0) - controls
    np.testing.assert_allclose(task.target(bench.TRUE_MEANS), controls + effect)
    np.testing.assert_allclose(task.target(bench.SOURCE_EFFECTS), task.source.mean(0) + effect)
    # all that was given are the 80 source cells here
    np.testing.assert_allclose(task.target(bench.CONTROL_EFFECTS), task.source.mean(0) + effect)


@pytest.mark.parametrize("kind", [bench.TRUE_MEANS, bench.SOURCE_EFFECTS + bench.OTHERS])
def test_every_decoder_has_a_row_and_transport_finds_the_induced_genes(knockouts, kind):
    rows = bench.table(knockouts, [("KO", CONTROLS, PERTURBED)], kind, 2)
    ceiling = set(bench.CEILING) if kind.endswith(bench.OTHERS) else set()
    assert set(rows["decoder"]) == set(bench.DECODERS) | ceiling
    assert rows.groupby("decoder").size().eq(2).all()
    both = rows.groupby("decoder")["both"].mean()
    assert both["no change"] <= 1
    assert both["count transport"] >= 3  # of ten doubled genes, the first of which are rare
    assert both["ceiling: the perturbed cells, brought to the target"] >= 3
    text = bench.summarised(rows)
    assert list(text.index) == list(dict.fromkeys(rows["decoder"]))
    assert "±" in text.loc["count transport", "DE precision"]


def test_precision_is_of_units_with_calls_and_of_all_calls():
    rows = pd.DataFrame(
        {
            "called": [10.0, 0.0, 30.0],
            "true": [10.0, 5.0, 10.0],
            "both": [5.0, 0.0, 6.0],
            "cells": [200, 200, 20],
        }
    ).assign(lfc=1.0, energy=0.0, zeros=0.0, variance=1.0, correlation=0.0, true_correlation=0.0)
    found = bench._summary(rows)
    assert found["precision"] == pytest.approx((0.5 + 0.2) / 2)
    assert found["precision_many"] == pytest.approx(0.5)
    assert found["pooled"] == pytest.approx(11 / 40)
    assert found["overlap"] == pytest.approx((5 / 15 + 0 + 6 / 34) / 3)


def test_simulated_counts_have_the_density_and_speed_reports_both_clocks():
    counts = simulated_counts(300, 200, 0.1, np.ones(200), 0)
    assert counts.nnz / np.prod(counts.shape) == pytest.approx(0.1, abs=0.02)
    found = speed(200, 100, repeats=1)
    assert all(
        len(found[f"cells/s, rates {state}: wall, process"].split(", ")) == 2 for state in ("known", "fitted")
    )
