"""Parameters by official name: round trip, and refusals that list everything."""

import numpy as np
import pytest

from hilbertcell.models import perturbdiff


@pytest.fixture
def state(tiny):
    return perturbdiff.to_state_dict(*tiny)


@pytest.mark.parametrize("prefix", ["param/", "var/sep/param/"])
def test_round_trip_is_bit_exact(golden, prefix):
    given = golden.state(prefix)
    back = perturbdiff.to_state_dict(
        *perturbdiff.from_state_dict(given, num_heads=4 if prefix == "param/" else 2)
    )
    assert back.keys() == given.keys()
    for name, array in given.items():
        assert back[name].dtype == array.dtype, name
        np.testing.assert_array_equal(back[name], array, err_msg=name)


@pytest.mark.parametrize("name", ["cov_genept", "cov_drug"])
def test_round_trip_of_given_perturbation_tables(golden, tiny, name):
    given = golden.state(f"var/{name}/param/")
    encoder = perturbdiff.covariate_encoder_from_state(given)
    back = perturbdiff.to_state_dict(tiny[0], encoder)
    for key, array in given.items():
        assert back[f"cov_encoder.{key}"].dtype == array.dtype
        np.testing.assert_array_equal(back[f"cov_encoder.{key}"], array)


def test_new_networks_round_trip(state):
    again = perturbdiff.to_state_dict(*perturbdiff.from_state_dict(state, num_heads=2))
    assert again.keys() == state.keys()
    assert all(np.array_equal(again[name], state[name]) for name in state)


def test_the_prefix_of_the_network_may_be_absent(state):
    bare = {name.removeprefix("model."): array for name, array in state.items()}
    again = perturbdiff.to_state_dict(*perturbdiff.from_state_dict(bare, num_heads=2))
    assert again.keys() == state.keys()


def test_protein_tables_start_at_row_one(golden):
    state = golden.state("var/cov_genept/param/")
    published = perturbdiff.covariate_encoder_from_state(state)
    shifted = perturbdiff.covariate_encoder_from_state(state, perturbation_offset=1)
    np.testing.assert_array_equal(shifted([0, 1], [0, 0], [0, 0]), published([1, 2], [0, 0], [0, 0]))


def test_all_misfits_are_listed(state):
    del state["model.blocks.1.block.attn.proj.bias"]
    state["model.class_embedding.emb.bias"] = np.zeros(3, np.float32)
    state["model.x_embedder.weight"] = state["model.x_embedder.weight"].copy()
    state["model.x_embedder.weight"][0, :2] = np.nan
    state["model.t_embedder.mlp.2.bias"] = state["model.t_embedder.mlp.2.bias"].astype(np.float64)
    state["model.surprise"] = np.zeros(1, np.float32)
    with pytest.raises(perturbdiff.StateDictError) as error:
        perturbdiff.from_state_dict(state, num_heads=2)
    for line in (
        "model.blocks.1.block.attn.proj.bias: missing, shape (16,) expected",
        "model.class_embedding.emb.bias: shape (3,), expected (8,)",
        "model.x_embedder.weight: 2 values are not finite",
        "model.t_embedder.mlp.2.bias: float64, expected float32",
        "model.surprise: unknown to this network",
    ):
        assert line in str(error.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("model.final_layer.linear.weight"), "the sizes of the network are read off it"),
        (lambda s: s.pop("cov_encoder.celltype_encoder.0.weight"), "celltype_encoder.weight: missing"),
        (
            lambda s: s.update({"cov_encoder.batch_encoder.weight": np.zeros((2, 3), np.float32)}),
            r"takes 12 values, the branches give 4 \+ 4 \+ 3",
        ),
        (
            lambda s: s.update({"model.final_layer.linear.weight": np.zeros(5, np.float32)}),
            r"shape \(5,\), expected 2 axes",
        ),
        (
            lambda s: s.update(
                {
                    "cov_encoder.transform.weight": np.zeros((6, 12), np.float32),
                    "cov_encoder.transform.bias": np.zeros(6, np.float32),
                }
            ),
            "transform gives 6 values, model.class_embedding takes 5",
        ),
    ],
)
def test_sizes_that_do_not_fit(state, change, message):
    change(state)
    with pytest.raises(perturbdiff.StateDictError, match=message):
        perturbdiff.from_state_dict(state, num_heads=2)


def test_the_number_of_heads_is_checked(state):
    with pytest.raises(perturbdiff.StateDictError, match=r"num_heads = 4 was given, .* say 2"):
        perturbdiff.from_state_dict(state, num_heads=4)
