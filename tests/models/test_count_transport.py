"""Transported counts against targets, and against fresh cells of the population that the target describes."""

import numpy as np
import pytest
from scipy import sparse

from hilbertcell.models import count_transport, gain_solver
from hilbertcell.models.count_transport import natural_mean, transport_counts
from hilbertcell.models.expression_state import fit_expression_state
from hilbertcell.models.gain_solver import LIBRARY_SLACK, PILOT_CELLS, TOLERANCE

GENES = 60
FOLD = np.ones(GENES)
FOLD[:12] = [0.0, 0.1, 0.3, 0.5, 0.7, 0.9, 1.2, 1.5, 2.0, 2.5, 3.0, 3.5]


def profile(seed=0):
    h = np.random.default_rng(seed).gamma(1.0, size=GENES) + 0.1
    h[:12] = 1.0  # the genes that FOLD changes
    return h / h.sum()


def cells(n, fold=1.0, depth=200.0, shape=4.0, seed=0, factor=None):
    """Gamma-Poisson counts (n, G) CSR with library sizes of their own; `factor` (n, G) multiplies the rates."""
    rng = np.random.default_rng(seed)
    share = profile() * fold * (1.0 if factor is None else factor)
    share = share / np.sum(share, axis=-1, keepdims=True) * np.ones((n, 1))
    rates = depth * rng.lognormal(0, 0.3, n)[:, None] * share
    return sparse.csr_matrix(rng.poisson(rates * rng.gamma(shape, size=rates.shape) / shape))


def row_sums(counts):
    return np.asarray(counts.sum(1), dtype=np.float64).ravel()


def natural(counts, library):
    return np.log1p(1e4 * counts.toarray() / np.maximum(library, 1e-9)[:, None])


def matched(counts, library, target):
    """Whether means match within the tolerance promised: of the Monte Carlo error, or one molecule of a small cell."""
    x = natural(counts, library)
    molecule = np.log1p(1e4 / np.quantile(library, 0.02)) / len(x)
    tolerance = np.maximum(1.2 * TOLERANCE * x.std(0) / np.sqrt(len(x)), 1.2 * molecule)
    return np.abs(x.mean(0) - target) < tolerance


@pytest.fixture(scope="module")
def control():
    return cells(600, seed=1)


@pytest.fixture(scope="module")
def perturbed():
    """Fresh cells of the perturbed population, library sizes 1.2 times those of controls."""
    return cells(600, FOLD, depth=240.0, seed=2)


@pytest.fixture(scope="module")
def moved(control, perturbed):
    target = natural_mean(perturbed, row_sums(perturbed))
    return transport_counts(control, row_sums(control), target, 1.2, np.random.default_rng(3))


def test_recomputed_means_match_the_target(moved, perturbed):
    counts, library = moved
    assert matched(counts, library, natural_mean(perturbed, row_sums(perturbed))).all()


def test_counts_stay_counts_and_library_sizes_their_sums(moved, control):
    counts, library = moved
    assert counts.dtype == control.dtype
    assert counts.shape == control.shape
    assert counts.has_canonical_format
    assert counts.data.min() >= 1
    np.testing.assert_array_equal(row_sums(counts), library)


def test_library_sizes_follow_the_ratio(moved, control, perturbed):
    ratio = np.log(moved[1]).mean() - np.log(row_sums(control)).mean()
    error = 0.3 * np.sqrt(2 / 600)  # of the mean log library sizes of both samples
    assert abs(ratio - np.log(1.2)) < 4 * error
    # deep cells stay deep
    assert np.corrcoef(np.log(moved[1]), np.log(row_sums(control)))[0, 1] > 0.8


def test_spread_and_zeros_are_those_of_fresh_perturbed_cells(moved, perturbed):
    x, truth = natural(*moved), natural(perturbed, row_sums(perturbed))
    n = len(x)
    # the Monte Carlo error of a variance is a matter of fourth moments: a few zeros make that of an abundant gene
    error = [np.square(np.square(z - z.mean(0))).mean(0) / n - np.square(z.var(0)) / n for z in (x, truth)]
    assert (np.abs(x.var(0) - truth.var(0)) <= 4.5 * np.sqrt(error[0] + error[1])).all()
    assert abs(x.var(0).sum() / truth.var(0).sum() - 1) < 0.04
    zeros, true_zeros = (x == 0).mean(0), (truth == 0).mean(0)
    assert (np.abs(zeros - true_zeros) < 5 * np.sqrt(0.5 / n)).all()


def test_genes_that_fall_are_thinned_cell_by_cell(moved, control):
    falling = FOLD * 1.2 < 0.9
    assert (moved[0].toarray()[:, falling] <= control.toarray()[:, falling]).all()


def test_cells_at_the_target_come_back_bit_for_bit(control):
    library = row_sums(control)
    counts, new = transport_counts(
        control, library, natural_mean(control, library), 1.0, np.random.default_rng(0)
    )
    np.testing.assert_array_equal(counts.toarray(), control.toarray())
    np.testing.assert_array_equal(new, library)


def test_rows_stay_with_their_cells_whatever_their_order(control, perturbed):
    target = natural_mean(perturbed, row_sums(perturbed))
    order = np.random.default_rng(5).permutation(600)
    counts, library = transport_counts(
        control[order], row_sums(control)[order], target, 1.2, np.random.default_rng(6)
    )
    assert matched(counts, library, target).all()
    falling = FOLD * 1.2 < 0.9
    assert (counts.toarray()[:, falling] <= control.toarray()[order][:, falling]).all()


def test_same_generator_same_bits_on_any_number_of_threads(control, perturbed, moved, monkeypatch):
    monkeypatch.setattr(count_transport, "NUM_THREADS", 1)
    target = natural_mean(perturbed, row_sums(perturbed))
    again = transport_counts(control, row_sums(control), target, 1.2, np.random.default_rng(3))
    np.testing.assert_array_equal(again[0].toarray(), moved[0].toarray())
    other = transport_counts(control, row_sums(control), target, 1.2, np.random.default_rng(4))
    assert (other[0] != moved[0]).nnz > 0


@pytest.fixture(scope="module")
def many():
    """Cells enough for a pilot: counts and their library sizes."""
    counts = cells(3 * PILOT_CELLS, depth=60.0, seed=20)
    return counts, row_sums(counts)


def test_many_cells_meet_the_target_after_a_pilot(many, monkeypatch):
    """Ranges of the gains are those of the pilot; where they are too narrow, marks are drawn anew."""
    truth = cells(3 * PILOT_CELLS, FOLD, depth=70.0, seed=21)
    target = natural_mean(truth, row_sums(truth))
    for least in (None, 0.0):
        if least is not None:  # a pilot that is sure of itself
            monkeypatch.setattr(gain_solver, "_width", lambda gain, molecules, _: np.ones_like(gain))
        counts, library = transport_counts(*many, target, 70 / 60, np.random.default_rng(0))
        assert matched(counts, library, target).all()
        np.testing.assert_array_equal(row_sums(counts), library)
        x, true = natural(counts, library), natural(truth, row_sums(truth))
        assert (np.abs((x == 0).mean(0) - (true == 0).mean(0)) < 5 * np.sqrt(0.5 / len(x))).all()
        falling = FOLD * 70 / 60 < 0.9
        assert (counts.toarray()[:, falling] <= many[0].toarray()[:, falling]).all()


def test_many_cells_at_the_target_come_back_bit_for_bit(many):
    counts, library = transport_counts(*many, natural_mean(*many), 1.0, np.random.default_rng(0))
    assert (counts != many[0]).nnz == 0
    np.testing.assert_array_equal(library, many[1])


def test_many_cells_give_the_same_bits_on_any_number_of_threads(many, monkeypatch):
    monkeypatch.setattr(gain_solver, "CHUNK_ENTRIES", 1 << 12)
    target = natural_mean(*many) * np.linspace(0.7, 1.3, GENES)
    moved = []
    for threads in (1, 3):
        monkeypatch.setattr(count_transport, "NUM_THREADS", threads)
        moved.append(transport_counts(*many, target, 1.0, np.random.default_rng(1)))
    assert (moved[0][0] != moved[1][0]).nnz == 0


def test_genes_absent_from_controls_get_a_floor_in_most_cells():
    control, truth = cells(400, seed=7).toarray(), cells(400, seed=8)
    control[:, 20:23] = 0
    control = sparse.csr_matrix(control)
    target = natural_mean(truth, row_sums(truth))
    counts, library = transport_counts(control, row_sums(control), target, 1.0, np.random.default_rng(9))
    assert matched(counts, library, target).all()
    zeros = (counts.toarray()[:, 20:23] == 0).mean(0)
    true_zeros = (truth.toarray()[:, 20:23] == 0).mean(0)
    assert (np.abs(zeros - true_zeros) < 0.1).all()  # not a few cells that carry everything


def test_a_gene_with_target_zero_or_below_disappears(control):
    library = row_sums(control)
    target = natural_mean(control, library)
    target[4], target[5] = 0.0, -0.3
    counts, _ = transport_counts(control, library, target, 1.0, np.random.default_rng(0))
    assert counts.toarray()[:, 4:6].sum() == 0


def test_induced_genes_keep_their_co_expression():
    """Genes 6..11 share a factor between cells; both populations have it, and so must the transported cells."""
    rng = np.random.default_rng(10)
    n, shared = 800, slice(6, 12)

    def sample(fold, seed):
        factor = np.ones((n, GENES))
        factor[:, shared] = rng.choice([0.2, 1.8], n)[:, None]
        rise = np.ones(GENES)
        rise[shared] = fold
        return cells(n, rise, depth=40.0, shape=20.0, seed=seed, factor=factor)

    control, truth = sample(1.0, 11), sample(3.0, 12)
    target = natural_mean(truth, row_sums(truth))
    counts, library = transport_counts(control, row_sums(control), target, 1.0, np.random.default_rng(13))

    true = correlation_of(natural(truth, row_sums(truth))[:, shared])
    kept = correlation_of(natural(counts, library)[:, shared])
    assert true > 0.3
    assert abs(kept - true) < 4 / np.sqrt(n)
    # and the molecules that came: independent ones would be correlated by depth alone, as the other genes' are not
    added = (counts - control).toarray()[:, shared]
    assert correlation_of(added) > 0.2


def correlation_of(x):
    return np.corrcoef(x.T)[np.triu_indices(x.shape[1], 1)].mean()


def test_totals_beyond_the_matrix_scale_with_the_ratio(control):
    library = row_sums(control) + 5000.0
    target = natural_mean(control, library)
    target[:5] *= 1.5
    counts, new = transport_counts(control, library, target, 0.9, np.random.default_rng(0))
    np.testing.assert_array_equal(new, np.rint(0.9 * 5000) + row_sums(counts))
    assert matched(counts, new, target).all()


def test_totals_below_the_matrix_change_in_proportion(control):
    library = 0.5 * row_sums(control)
    target = natural_mean(control, library)
    target[:5] *= 0.8
    counts, new = transport_counts(control, library, target, 1.0, np.random.default_rng(0))
    np.testing.assert_allclose(new, 0.5 * row_sums(counts), rtol=1e-12)
    assert matched(counts, new, target).all()


def test_contradictory_targets_end_in_errors_not_in_absurd_depths():
    """Deep counts of all genes cannot all have larger shares."""
    deep = cells(100, depth=6_000.0, seed=14)
    library = row_sums(deep)
    counts, new = transport_counts(
        deep, library, natural_mean(deep, library) + 0.5, 1.0, np.random.default_rng(0)
    )
    assert abs(np.log(new / library).mean()) < LIBRARY_SLACK + 0.05  # counts are whole, so not exactly
    assert np.isfinite(natural_mean(counts, new)).all()


@pytest.mark.parametrize("n", [1, 3])
def test_few_cells_and_cells_without_counts_are_legal(n):
    control = cells(n, seed=15).toarray()
    control = sparse.csr_matrix(np.vstack([control, np.zeros((1, GENES), int)]))
    target = np.full(GENES, 3.0)
    counts, library = transport_counts(control, row_sums(control), target, 1.0, np.random.default_rng(0))
    assert counts.shape == (n + 1, GENES)
    np.testing.assert_array_equal(row_sums(counts), library)


def test_one_state_serves_many_targets(control, moved, perturbed):
    library = row_sums(control)
    state = fit_expression_state(control, library)
    target = natural_mean(perturbed, row_sums(perturbed))
    counts, _ = transport_counts(control, library, target, 1.2, np.random.default_rng(3), state)
    np.testing.assert_array_equal(counts.toarray(), moved[0].toarray())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"counts": sparse.csr_matrix((0, GENES))}, "no cells to transport"),
        ({"library_size": np.ones(3)}, r"library_size \(600,\).*got \(3,\)"),
        ({"target_mean": np.ones(3)}, r"target_mean \(60,\), got \(600,\) and \(3,\)"),
        ({"target_mean": np.full(GENES, 300.0)}, "target_mean of gene 0 is 300.*another scale"),
        ({"target_mean": np.full(GENES, np.nan)}, "target_mean of gene 0 is nan"),
        ({"library_ratio": 0.0}, "library_ratio must be positive, got 0"),
    ],
)
def test_bad_input_is_named(control, change, message):
    given = {
        "counts": control,
        "library_size": row_sums(control),
        "target_mean": np.ones(GENES),
        "library_ratio": 1.0,
    } | change
    with pytest.raises(ValueError, match=message):
        transport_counts(**given, rng=np.random.default_rng(0))
