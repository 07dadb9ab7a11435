"""Draws too large to hold: made in pieces, stored as coordinates, made again gene by gene."""

import numpy as np
import pytest

from hilbertcell.data.draws_io import read_draws
from hilbertcell.data.validation import DataError
from hilbertcell.inference import draws as module
from hilbertcell.inference.gene_draws import fit_gene_map, gene_draws

NUM_DRAWS = 400


@pytest.fixture(scope="module")
def whole(without_d5, d5):
    return without_d5.predict(d5, num_samples=NUM_DRAWS, seed=3)


@pytest.fixture(scope="module")
def pieces(without_d5, d5, tmp_path_factory):
    out = tmp_path_factory.mktemp("draws") / "draws.nc"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "MAX_BYTES", 60_000)  # 4 populations of 5 genes take 64,000
        return without_d5.predict(d5, num_samples=NUM_DRAWS, seed=3, out=out)


def test_pieces_hold_coordinates_and_no_genes(pieces, whole):
    predictions = pieces["predictions"]
    assert not {"mean", "shift"} & set(predictions.data_vars)
    assert predictions.sizes["map"] > 1
    # The same draws, whatever else is drawn beside them.
    np.testing.assert_allclose(
        predictions["embedding"], whole["predictions"]["embedding"], rtol=1e-5, atol=1e-6
    )
    for group in ("posterior", "log_likelihood", "constant_data", "observed_data", "posterior_predictive"):
        assert set(pieces[group].data_vars) == set(whole[group].data_vars)
        for name, values in whole[group].data_vars.items():
            np.testing.assert_allclose(pieces[group][name], values, rtol=1e-5, atol=1e-5)
            assert pieces[group][name].dims == values.dims
    assert pieces["constant_data"].attrs == whole["constant_data"].attrs
    assert predictions.attrs == whole["predictions"].attrs
    assert dict(pieces.attrs) == dict(whole.attrs)


def test_genes_made_again_keep_means_spread_and_what_coordinates_express(pieces, whole):
    for population in whole["predictions"]["population"].values:
        both = {q: [gene_draws(tree, q, population) for tree in (whole, pieces)] for q in ("mean", "shift")}
        for told, made in both.values():
            error = told.std(0) / np.sqrt(NUM_DRAWS)
            assert (np.abs(made.mean(0) - told.mean(0)) < 4 * error).all()
            # Standard error of a log standard deviation, twice: the draws' and the rest's.
            assert (np.abs(np.log(made.std(0) / told.std(0))) < 4 / np.sqrt(NUM_DRAWS)).all()
        control = [both["mean"][i] - both["shift"][i] for i in range(2)]
        assert (np.abs(np.log(control[1].std(0) / control[0].std(0))) < 5 / np.sqrt(NUM_DRAWS)).all()
        np.testing.assert_array_equal(both["mean"][1], gene_draws(pieces, "mean", population))


def test_a_gene_map_recovers_a_linear_law_with_correlated_rests():
    rng = np.random.default_rng(0)
    S, T, Q, G = 2000, 3, 2, 4
    v, back = rng.standard_normal((S, T, Q)), rng.standard_normal((Q, G))
    rest = rng.standard_normal((2, S, T, G))
    mean = 5 + v @ back + 0.5 * rest[0]
    shift = 1 - v @ back + 0.5 * (0.6 * rest[0] + 0.8 * rest[1])
    fitted = fit_gene_map(mean, shift, v)
    error = 0.5 / np.sqrt(S * T)
    np.testing.assert_allclose(fitted.maps, np.stack([back, -back]), atol=4.5 * error)
    np.testing.assert_allclose(fitted.sd, 0.5, rtol=4 / np.sqrt(2 * S))
    np.testing.assert_allclose(fitted.correlation, 0.6, atol=4 * (1 - 0.36) / np.sqrt(S))
    np.testing.assert_allclose(fitted.center[0], mean.mean(0))


def test_no_piece_is_larger_than_its_share_of_the_limit(without_d5, d5, tmp_path, monkeypatch):
    limit, sizes = 60_000, []
    monkeypatch.setattr(module, "MAX_BYTES", limit)
    monkeypatch.setattr(module, "_PIECES", 2)

    def watched(mean, shift, embedding):
        sizes.append(mean.nbytes + shift.nbytes)
        return fit_gene_map(mean, shift, embedding)

    monkeypatch.setattr(module, "fit_gene_map", watched)
    drawn = without_d5.predict(d5, num_samples=NUM_DRAWS, out=tmp_path / "draws.nc")
    assert sum(sizes) == 2 * 4 * NUM_DRAWS * 4 * 5 > limit
    assert max(sizes) <= limit // 2
    assert drawn["predictions"].sizes["population"] == 4


def test_large_draws_need_a_file_and_never_replace_one(without_d5, d5, tmp_path, monkeypatch):
    out = tmp_path / "draws.nc"
    without_d5.predict(d5, num_samples=2, out=out).close()
    assert read_draws(out)["predictions"]["mean"].shape[1] == 2
    with pytest.raises(DataError, match=r"draws\.nc.*exists"):
        without_d5.predict(d5, num_samples=2, out=out)
    monkeypatch.setattr(module, "MAX_BYTES", 10)
    with pytest.raises(DataError, match=r"2 x 4 x 5.*\(out\)"):
        without_d5.predict(d5, num_samples=2)
