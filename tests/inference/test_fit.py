"""From populations to a fit and back from its folder; what leaks and what does not."""

import json
from dataclasses import replace

import jax
import numpy as np
import pytest

from hilbertcell.data.splits import LeakError, check_no_leak, leave_one_batch_out
from hilbertcell.inference.checkpoints import read_fit
from hilbertcell.inference.fit import embed, fit, training_populations
from hilbertcell.inference.nuts import INVARIANTS
from hilbertcell.inference.settings import Settings

from .conftest import SETTINGS, make_screen, populations_of


def test_inference_improves_the_elbo_and_keeps_its_course(without_d5):
    assert len(without_d5.losses) == SETTINGS.num_steps
    assert without_d5.losses[-20:].mean() < without_d5.losses[:20].mean()


def test_same_seed_gives_the_same_fit_whatever_the_order_of_the_rows(screen):
    settings = Settings(**SETTINGS.model_dump() | {"num_steps": 20})
    shuffled = make_screen()
    shuffled = shuffled[np.random.default_rng(1).permutation(shuffled.n_obs)].copy()
    first, second = fit(screen, settings=settings), fit(populations_of(shuffled), settings=settings)
    other = fit(screen, settings=settings, seed=1)
    for name, value in first.params.items():
        # Sums over cells in another order differ by rounding, which twenty steps of Adam do not blow up.
        np.testing.assert_allclose(value, second.params[name], rtol=1e-6, atol=1e-8)
    assert not np.allclose(first.params["feature_loc"], other.params["feature_loc"])


def test_a_fit_survives_its_folder_bit_for_bit(without_d5, d5, tmp_path):
    without_d5.save(tmp_path / "fit")
    again = read_fit(tmp_path / "fit")
    one, two = (f.predict(d5, num_samples=10, seed=3) for f in (without_d5, again))
    for group in ("predictions", "posterior", "constant_data"):
        for name, values in one[group].data_vars.items():
            np.testing.assert_array_equal(values, two[group][name], err_msg=name)
    assert again.keys == without_d5.keys
    assert again.settings == without_d5.settings
    assert not any(path.suffix in {".pkl", ".pickle"} for path in (tmp_path / "fit").iterdir())


def test_a_fit_by_nuts_predicts_from_its_draws_and_survives_its_folder(without_d5, d5, tmp_path):
    """Draws stand in for chains: what matters is that they, and no guide, are what prediction uses."""
    with jax.enable_x64(True):
        sites, _ = without_d5.sample_globals(jax.random.split(jax.random.key(0), 6))
    posterior = {name: np.asarray(values).reshape(2, 3, *values.shape[1:]) for name, values in sites.items()}
    sampling = {
        "diverging": np.array([[False, True, False]] * 2),
        "acceptance_rate": np.full((2, 3), 0.9),
        "n_steps": np.full((2, 3), 7),
        "rhat": np.full(len(INVARIANTS), 1.2),
        "ess": np.full(len(INVARIANTS), 6.0),
    }
    fitted = replace(without_d5, params={}, losses=np.zeros(0), posterior=posterior, sampling=sampling)
    with jax.enable_x64(True):
        picked, _ = fitted.sample_globals(jax.random.split(jax.random.key(1), 40))
    slopes = np.asarray(sites["slope"])
    matches = (np.asarray(picked["slope"])[:, None] == slopes).all(-1)
    assert matches.any(1).all()
    assert matches.any(0).sum() >= 5  # 40 picks of 6 leave out two or more once in 500 seeds
    fitted.save(tmp_path / "fit")
    again = read_fit(tmp_path / "fit")
    one, two = (f.predict(d5, num_samples=10, seed=3) for f in (fitted, again))
    np.testing.assert_array_equal(one["predictions"]["mean"], two["predictions"]["mean"])
    for name, values in sampling.items():
        np.testing.assert_array_equal(two["sample_stats"][name], values)
        assert again.sampling[name].dtype == values.dtype
    assert any("r-hat 1.200" in text for text in json.loads(two["constant_data"].attrs["warnings"]))


def test_an_existing_folder_is_refused_and_replaced_only_when_forced(without_d5, tmp_path):
    without_d5.save(tmp_path / "fit")
    with pytest.raises(FileExistsError, match="exists"):
        without_d5.save(tmp_path / "fit")
    without_d5.save(tmp_path / "fit", force=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["fit"]
    (tmp_path / "home").mkdir()
    with pytest.raises(FileExistsError, match="not a fit"):
        without_d5.save(tmp_path / "home", force=True)


@pytest.mark.parametrize("damage", ["missing", "truncated", "manifest"])
def test_a_damaged_folder_is_refused(without_d5, tmp_path, damage):
    without_d5.save(tmp_path / "fit")
    arrays = tmp_path / "fit" / "arrays.safetensors"
    if damage == "missing":
        arrays.unlink()
    elif damage == "truncated":
        arrays.write_bytes(arrays.read_bytes()[:1000])
    else:
        (tmp_path / "fit" / "manifest.json").write_text("{")
    with pytest.raises(ValueError, match="not a complete fit"):
        read_fit(tmp_path / "fit")


def test_a_fit_of_another_format_is_refused(without_d5, tmp_path):
    without_d5.save(tmp_path / "fit")
    manifest = tmp_path / "fit" / "manifest.json"
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"format": 2}))
    with pytest.raises(ValueError, match="written in format 2, this version reads 3; fit again"):
        read_fit(tmp_path / "fit")


def test_a_hidden_batch_reaches_no_part_of_the_fit(screen):
    split = next(split for split in leave_one_batch_out(screen.labels) if "d5" in split.held_out[0])
    train = training_populations(screen, split)
    assert "d5" not in set(train.labels["batch"])
    settings = Settings(**SETTINGS.model_dump() | {"num_steps": 10})
    hidden = fit(screen, holdout=split, settings=settings)
    other = make_screen()
    other.X[(other.obs["donor"] == "d5").to_numpy()] += 100.0  # if d5 were used anywhere, this would show
    same = fit(populations_of(other), holdout=split, settings=settings)
    for name, value in hidden.params.items():
        np.testing.assert_array_equal(value, same.params[name])
    np.testing.assert_array_equal(hidden.coordinates.A, same.coordinates.A)


def test_coordinates_fitted_with_the_hidden_batch_are_caught(screen, without_d5):
    split = next(split for split in leave_one_batch_out(screen.labels) if "d5" in split.held_out[0])
    leaked = without_d5.summarise(screen)
    coordinates = embed(leaked, without_d5.prior, without_d5.names, 64)
    assert not np.allclose(
        coordinates.mean, without_d5.coordinates.mean
    )  # the leak would have changed the fit
    with pytest.raises(LeakError, match="d5"):
        check_no_leak(split, leaked.labels.index)
    check_no_leak(split, without_d5.moments.labels.index)


def test_too_little_to_learn_from_is_said(screen):
    one = screen.select((screen.labels["batch"] == "d0").to_numpy())
    with pytest.raises(ValueError, match="two batches"):
        fit(one, settings=SETTINGS)


def test_settings_name_the_unknown_entry(tmp_path):
    path = tmp_path / "settings.toml"
    path.write_text("num_step = 3\n")
    with pytest.raises(ValueError, match=r"num_step.*Known settings.*num_steps"):
        Settings.from_toml(path)
    path.write_text("num_steps = 123\n")
    assert Settings.from_toml(path).num_steps == 123
