"""A fit's denoiser in torch is the one in its folder; folders without one say so."""

import importlib
import json
from types import ModuleType

import jax.numpy as jnp
import numpy as np
import pytest

from hilbertcell.inference.diffusion_law import see_populations
from tests.torch_parity import assert_close, tensor
from tests.untrained_law import with_law


@pytest.fixture
def twin(torch) -> ModuleType:
    """The module under test."""
    return importlib.import_module("hilbertcell.inference.pyro.checkpoints")


@pytest.fixture(scope="module")
def diffused(without_d5):
    return with_law(without_d5, 0.5)


@pytest.fixture
def folder(diffused, tmp_path):
    diffused.save(tmp_path / "fit")
    return tmp_path / "fit"


def test_a_stored_denoiser_equals_that_of_the_fit(torch, twin, diffused, folder):
    denoiser = twin.load_denoiser(folder)
    arrays = diffused.diffusion.to_arrays()
    stored = {name: array for name, array in arrays.items() if name.startswith("denoiser.")}
    found = denoiser.state_dict()
    assert {f"denoiser.{name}" for name in found} == set(stored)
    assert all(np.array_equal(found[name.removeprefix("denoiser.")], array) for name, array in stored.items())
    seen, _ = see_populations(diffused, diffused.moments, 0, diffused.diffusion.description)
    condition = seen.conditions.at(0, 3)
    v, sigma = condition.mean + 0.2, jnp.asarray(0.3)
    condition_in_torch = importlib.import_module("hilbertcell.models.pyro.denoisers").Condition(
        *(tensor(torch, leaf) for leaf in condition)
    )
    with torch.no_grad():
        estimate = denoiser(tensor(torch, v), tensor(torch, sigma), condition_in_torch)
    assert_close(estimate, diffused.diffusion.denoiser(v, sigma, condition), 1e-5)


def test_a_gaussian_law_holds_no_denoiser(twin, without_d5, tmp_path):
    without_d5.save(tmp_path / "fit")
    with pytest.raises(ValueError, match=r"law is gaussian .*fit with --law diffusion"):
        twin.load_denoiser(tmp_path / "fit")


@pytest.mark.parametrize("damage", ["absent", "truncated", "format"])
def test_what_is_not_a_fit_of_this_version_is_refused(twin, folder, damage):
    manifest, arrays = folder / "manifest.json", folder / "arrays.safetensors"
    if damage == "absent":
        manifest.unlink()
    elif damage == "truncated":
        arrays.write_bytes(arrays.read_bytes()[:1000])
    else:
        manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"format": 2}))
    with pytest.raises(ValueError, match="in format 2" if damage == "format" else "not a complete fit"):
        twin.load_denoiser(folder)
