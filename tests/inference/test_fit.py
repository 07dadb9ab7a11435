"""From populations to a fit and back from its folder; what leaks and what does not."""

import numpy as np
import pytest

from hilbertcell.data.splits import LeakError, check_no_leak, leave_one_batch_out
from hilbertcell.inference.checkpoints import read_fit
from hilbertcell.inference.fit import embed, fit, training_populations
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
