"""A fit from populations to generated cells and to disk; going on after a kill; conditioning on a microenvironment."""

import dataclasses
import json
import subprocess
import sys
import time
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pandas as pd
import pytest

from hilbertcell.data.splits import leave_one_batch_out, make_split
from hilbertcell.data.validation import DataError
from hilbertcell.inference.perturbdiff.cell_sets import Cells, Expression
from hilbertcell.inference.perturbdiff.fit import (
    at_mean,
    condition_features,
    fit_perturbdiff,
    mean_cell,
    new_networks,
)
from hilbertcell.inference.perturbdiff.storage import from_torch, load_perturbdiff, to_torch
from hilbertcell.inference.perturbdiff.vocabulary import Vocabulary
from hilbertcell.models.perturbdiff.state_dict import named_arrays


def weights(fitted) -> dict[str, np.ndarray]:
    return {name: np.asarray(a) for name, a in named_arrays(*fitted.networks).items()}


def same(first, second) -> bool:
    a, b = weights(first), weights(second)
    return a.keys() == b.keys() and all(np.array_equal(a[n], b[n]) for n in a)


def targets_of(populations, *names):
    return populations.labels.loc[list(names)]


def test_training_lowers_the_loss(screen, fitted):
    assert fitted.losses.shape == (240, 2)
    assert fitted.losses[-40:].sum(1).mean() < 0.7 * fitted.losses[:40].sum(1).mean()
    cells = fitted.generate(screen, targets_of(screen, "B | A | Donor2", "B | B | Donor2"), [300, 20])
    assert [x.shape for x in cells] == [(300, 8), (20, 8)]


@pytest.mark.slow
def test_the_effect_is_learned(make, settings):
    """A raises the first gene, B the second, eightfold; what is learned is closer to the own mean than to the other."""
    strong = make(factor=8.0)
    longer = {
        "max_steps": 3000,
        "sample_steps": 20,
        "start_at_mean": True,
        "guidance": 0.0,
        "average_every": 1,
    }
    fitted = fit_perturbdiff(strong, settings=settings.model_copy(update=longer))
    wanted = targets_of(strong, "B | A | Donor2", "B | B | Donor2")
    first, second = (x[:, :2].mean(0) for x in fitted.generate(strong, wanted, [200, 200]))
    unit = Cells(strong, fitted.unit)
    truth = [fitted.unit.to_natural(unit(strong.cells_of(name))).mean(0)[:2] for name in wanted.index]
    for i, made in enumerate((first, second)):
        assert np.abs(made - truth[i]).max() < 0.3 * np.abs(truth[0] - truth[1]).max()


def test_generated_cells_depend_on_seed_and_name_alone(screen, fitted):
    both = fitted.generate(screen, targets_of(screen, "B | A | Donor1", "T | B | Donor3"), [9, 5], seed=2)
    alone = fitted.generate(screen, targets_of(screen, "T | B | Donor3"), [5], seed=2)
    np.testing.assert_allclose(both[1], alone[0], rtol=1e-4, atol=1e-4)
    other = fitted.generate(screen, targets_of(screen, "T | B | Donor3"), [5], seed=3)
    assert np.abs(other[0] - alone[0]).max() > 0.01


@pytest.mark.parametrize(("sampler", "start_time"), [("ddim", 4), ("ddim", 1000), ("dpm", 100)])
def test_samplers(sampler, start_time, screen, fitted):
    cells = fitted.generate(
        screen, targets_of(screen, "B | A | Donor1"), [8], sampler=sampler, start_time=start_time, sample_steps=4,
        guidance=0.0,
    )  # fmt: skip
    assert np.isfinite(cells[0]).all()
    assert (cells[0] >= 0).all()


def test_a_fit_comes_back_from_its_folder(screen, fitted, tmp_path):
    fitted.save(tmp_path / "fit")
    again = load_perturbdiff(tmp_path / "fit")
    assert same(fitted, again)
    assert again.vocabulary == fitted.vocabulary
    assert again.settings == fitted.settings
    np.testing.assert_array_equal(again.losses, fitted.losses)
    np.testing.assert_array_equal(
        again.generate(screen, targets_of(screen, "B | A | Donor1"), [3])[0],
        fitted.generate(screen, targets_of(screen, "B | A | Donor1"), [3])[0],
    )
    with pytest.raises(FileExistsError, match="exists"):
        fitted.save(tmp_path / "fit")
    manifest = json.loads((tmp_path / "fit" / "manifest.json").read_text())
    (tmp_path / "fit" / "manifest.json").write_text(json.dumps(manifest | {"format": 99}))
    with pytest.raises(ValueError, match="in format 99"):
        load_perturbdiff(tmp_path / "fit")


def test_torch_and_back(torch, fitted, tmp_path):
    to_torch(fitted, tmp_path / "fit.ckpt")
    again = from_torch(tmp_path / "fit.ckpt", keys=fitted.keys, genes=fitted.genes)
    assert same(fitted, again)
    assert again.vocabulary == fitted.vocabulary
    assert again.settings.num_heads == 2
    again.save(tmp_path / "again")
    to_torch(load_perturbdiff(tmp_path / "again"), tmp_path / "again.ckpt")
    first, second = (torch.load(tmp_path / f"{n}.ckpt", weights_only=True) for n in ("fit", "again"))
    for part in ("state_dict", "current_model_state"):
        assert all(torch.equal(first[part][n], second[part][n]) for n in first[part])
    with pytest.raises(ValueError, match="genes = 3 names"):
        from_torch(tmp_path / "fit.ckpt", genes=np.array(["a", "b", "c"]))


def test_without_genes_nothing_is_generated(screen, fitted):
    with pytest.raises(DataError, match="does not say its genes"):
        dataclasses.replace(fitted, genes=None).generate(screen, targets_of(screen, "B | A | Donor1"), [3])


@pytest.mark.slow
def test_a_new_batch_needs_a_fit_without_batches(make, screen, fitted, settings):
    new = make(donors=4, seed=8)
    wanted = targets_of(new, "B | A | Donor4")
    with pytest.raises(DataError, match="batch = 'Donor4': has no id"):
        fitted.generate(new, wanted, [3])
    without = fit_perturbdiff(
        screen, settings=settings.model_copy(update={"batch_covariate": False, "max_steps": 224})
    )
    assert without.generate(new, wanted, [3])[0].shape == (3, 8)


@pytest.mark.slow
def test_hidden_populations_stay_hidden(screen, settings):
    split = leave_one_batch_out(screen.labels)[0]
    short = settings.model_copy(update={"max_steps": 224})
    fitted = fit_perturbdiff(screen, holdout=split, settings=short)
    assert set(fitted.vocabulary.batch) == {"Donor2", "Donor3"}
    pair = make_split(screen.labels, "unseen_pair", 0)
    fitted = fit_perturbdiff(screen, holdout=pair, settings=short)
    assert fitted.held_out == pair.held_out
    assert fitted.vocabulary.perturbation.keys() == {"A", "B", "PBS"}  # seen in the other context
    assert fitted.generate(screen, targets_of(screen, *pair.held_out), [2] * len(pair.held_out))[0].shape == (
        2,
        8,
    )


@pytest.mark.slow
def test_given_features_stand_in_the_place_of_a_table(make, settings):
    features = pd.DataFrame({"x": [1.0, 0.0, 4.0], "y": [0.0, 1.0, 2.0]}, index=["A", "B", "C"])
    populations = make({"perturbation_features": features})
    table = condition_features(populations)
    assert list(table.index) == ["A", "B", "C", "PBS"]
    np.testing.assert_allclose(table.loc["PBS"], 8 / 6)
    np.testing.assert_allclose(table.loc["C"], [4, 2])
    fitted = fit_perturbdiff(populations, settings=settings.model_copy(update={"max_steps": 224}))
    unseen = populations.labels.iloc[[1]].assign(perturbation="C")
    assert fitted.generate(populations, unseen, [3])[0].shape == (3, 8)


RUN = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from conftest import SETTINGS, make_screen, populations_of
from hilbertcell.inference.perturbdiff.cell_sets import Cells
from hilbertcell.inference.perturbdiff.fit import fit_perturbdiff
fitted = fit_perturbdiff(populations_of(make_screen()), seed=1, settings=SETTINGS, resume=Path(sys.argv[2]))
fitted.save(sys.argv[3])
"""


@pytest.mark.slow
def test_killed_and_gone_on(fitted, tmp_path):
    """kill -9 after the first saved state, then the same command again: the weights of an undisturbed training."""
    words = [
        sys.executable,
        "-c",
        RUN,
        str(Path(__file__).parent),
        str(tmp_path / "state"),
        str(tmp_path / "fit"),
    ]
    process = subprocess.Popen(words)
    while not (tmp_path / "state").exists() and process.poll() is None:
        time.sleep(0.01)
    process.kill()
    assert process.wait() == -9
    assert not (tmp_path / "fit").exists()
    assert (tmp_path / "state").exists()
    subprocess.run(words, check=True)
    again = load_perturbdiff(tmp_path / "fit")
    assert same(fitted, again)
    np.testing.assert_array_equal(again.losses, fitted.losses)
    assert not (tmp_path / "state").exists()


def test_new_networks_may_start_at_the_training_mean(screen, settings):
    vocabulary = Vocabulary.of(screen.labels, perturbations=True, batches=True)
    mean = mean_cell(screen)
    every = Cells(screen, Expression(np.zeros(8)))(np.arange(screen.num_cells))
    np.testing.assert_allclose(mean / 10, every.mean(axis=0), rtol=1e-5)
    networks = at_mean(new_networks(0, 8, vocabulary, settings), mean / 10)
    x = jnp.asarray(every[None, :5])
    answer = networks[0](x, 0 * x, x, jnp.array([300]), None)
    np.testing.assert_allclose(answer, np.broadcast_to(mean / 10, (1, 5, 8)), rtol=1e-5)


def test_a_state_of_another_training_is_refused(screen, settings, tmp_path):
    from safetensors.numpy import save_file

    save_file({"x": np.zeros(1)}, tmp_path / "state", {"training": '"other"'})
    with pytest.raises(ValueError, match="state of another training"):
        fit_perturbdiff(screen, settings=settings, resume=tmp_path / "state")
    (tmp_path / "state").write_bytes(b"rubbish")
    with pytest.raises(ValueError, match="not the state of a training"):
        fit_perturbdiff(screen, settings=settings, resume=tmp_path / "state")


@pytest.mark.slow
def test_a_microenvironment_is_an_input(screen, settings):
    u = pd.DataFrame({"u": [-1.0, 0.0, 1.0]}, index=["Donor1", "Donor2", "Donor3"])
    fitted = fit_perturbdiff(screen, settings=settings, u=u)
    assert fitted.networks[0].num_factors == 1
    wanted = targets_of(screen, "B | A | Donor1")
    low, high = (fitted.generate(screen, wanted, [16], u=np.array([[value]]))[0] for value in (-2.0, 2.0))
    assert np.abs(low - high).max() > 1e-3
    with pytest.raises(ValueError, match="this denoiser has 1 factors"):
        fitted.generate(screen, wanted, [3])
    with pytest.raises(DataError, match="none for Donor3"):
        fit_perturbdiff(screen, settings=settings, u=u.iloc[:2])


@pytest.mark.slow
def test_the_loss_must_stay_finite(screen, settings):
    wild = settings.model_copy(update={"learning_rate": 1e20, "max_steps": 224})
    with pytest.raises(FloatingPointError, match=r"not finite from step \d+ on: lower learning_rate"):
        fit_perturbdiff(screen, settings=wild)
