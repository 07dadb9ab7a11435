"""Label ids never fall on a neighbour's row, and given tables are not trained."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hilbertcell.models import perturbdiff


def test_row_of_an_id(tiny):
    encoder = tiny[1]
    rows = np.asarray(encoder.perturbation.table)
    np.testing.assert_array_equal(encoder.perturbation(jnp.array([-1, 0, 2])), rows[[0, 1, 3]])
    expected = np.asarray(encoder.cell_type.table) @ np.asarray(encoder.cell_type.affine.weight).T
    expected = expected + np.asarray(encoder.cell_type.affine.bias)
    np.testing.assert_allclose(encoder.cell_type(jnp.array([1, 0])), expected[[1, 0]], rtol=1e-5)


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (([3], [0], [0]), r"perturbation: ids 3..3 given, the table holds -1..2"),
        (([-2], [0], [0]), r"perturbation: ids -2..-2 given"),
        (([0], [-1], [0]), r"cell_type: ids -1..-1 given, the table holds 0..1"),
        (([0], [0], [2]), r"batch: ids 2..2 given, the table holds 0..1"),
    ],
)
def test_unknown_ids(tiny, ids, message):
    with pytest.raises(ValueError, match=message):
        tiny[1](*ids)
    traced = jax.jit(lambda *ids: tiny[1](*ids))(*map(jnp.array, ids))
    assert np.isnan(traced).all()


def test_unknown_drug_is_not_given_a_neighbours_dose(golden):
    encoder = perturbdiff.covariate_encoder_from_state(golden.state("var/cov_drug/param/"))
    with pytest.raises(ValueError, match=r"perturbation: ids 4..4 given, the table holds 0..3"):
        encoder([4], [0], [0])
    assert np.isnan(jax.jit(lambda p: encoder(p, jnp.array([0]), jnp.array([0])))(jnp.array([4]))).all()


def test_an_encoder_without_a_batch_branch():
    encoder = perturbdiff.init_covariate_encoder(
        jax.random.key(0), 7, perturbations=3, cell_types=2, batches=0, hidden=4
    )
    assert encoder.transform.weight.shape == (7, 8)
    np.testing.assert_array_equal(encoder([0], [1], [0]), encoder([0], [1], [99]))


def test_given_tables_have_no_gradient(tiny):
    gradient = jax.grad(
        lambda encoder: encoder(jnp.array([0]), jnp.array([1]), jnp.array([1])).sum(), allow_int=True
    )(tiny[1])
    assert not np.any(gradient.cell_type.table)
    assert np.any(gradient.cell_type.affine.weight)
    assert np.any(gradient.perturbation.table)
