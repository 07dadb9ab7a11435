"""The denoiser: symmetry, conditioning, published sizes and initialisation, errors."""

import re

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hilbertcell.models import perturbdiff
from hilbertcell.models.perturbdiff import layers
from hilbertcell.models.perturbdiff.state_dict import named_arrays


@pytest.fixture
def inputs():
    keys = jax.random.split(jax.random.key(1), 4)
    x_t, previous, control = (jax.random.normal(key, (2, 4, 5)) for key in keys[:3])
    return x_t, previous, control, jnp.array([7, 700]), jax.random.normal(keys[3], (2, 4, 5))


def test_commutes_with_permutations_of_the_pairs(tiny, inputs):
    x_t, previous, control, t, covariates = inputs
    order = jnp.array([2, 0, 3, 1])
    x0 = tiny[0](x_t, previous, control, t, covariates)
    together = tiny[0](x_t[:, order], previous[:, order], control[:, order], t, covariates[:, order])
    np.testing.assert_allclose(together, x0[:, order], rtol=1e-4, atol=1e-5)
    # The pairing itself matters: a control is not a member of a bag.
    alone = tiny[0](x_t, previous, control[:, order], t, covariates)
    assert np.abs(alone - x0).max() > 1e-2


def test_sets_do_not_see_each_other(tiny, inputs):
    both = tiny[0](*inputs)
    one = tiny[0](*(x[1:] for x in inputs))
    np.testing.assert_allclose(both[1:], one, rtol=1e-4, atol=1e-6)


def test_arguments_are_not_interchangeable(tiny, inputs):
    """Levels far apart per argument, so that two equal-shaped arrays that were swapped could not pass."""
    _, _, _, t, covariates = inputs
    levels = [jnp.full((2, 4, 5), value) for value in (3.0, -2.0, 1.0)]
    results = [
        tiny[0](*order, t, covariates) for order in (levels, levels[::-1], [levels[i] for i in (1, 0, 2)])
    ]
    assert all(np.abs(results[0] - other).max() > 1e-2 for other in results[1:])


def test_shared_covariates_equal_repeated_ones(tiny, inputs):
    x_t, previous, control, t, covariates = inputs
    shared = covariates[:, :1]
    repeated = jnp.broadcast_to(shared, covariates.shape)
    np.testing.assert_allclose(
        tiny[0](x_t, previous, control, t, shared),
        tiny[0](x_t, previous, control, t, repeated),
        rtol=1e-4,
        atol=1e-6,
    )


def test_keep_drops_the_covariates_of_single_sets(tiny, inputs):
    x_t, previous, control, t, covariates = inputs
    mixed = tiny[0](x_t, previous, control, t, covariates, keep=jnp.array([True, False]))
    np.testing.assert_allclose(mixed[0], tiny[0](*inputs)[0], rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(mixed[1], tiny[0](x_t, previous, control, t, None)[1], rtol=1e-4, atol=1e-6)
    assert np.abs(mixed[1] - tiny[0](*inputs)[1]).max() > 1e-2


def test_takes_numpy_arrays(tiny, inputs):
    given = [np.asarray(x) for x in inputs]
    np.testing.assert_array_equal(tiny[0](*given), tiny[0](*inputs))


def test_qk_norm_forms():
    x, weight = np.random.default_rng(0).normal(1.0, 1.0, (3, 2, 6)).astype(np.float32), np.arange(6.0)
    with jax.enable_x64(True):
        mean_square = layers.qk_norm(jnp.asarray(x), jnp.asarray(weight), "mean_square")
        variance = layers.qk_norm(jnp.asarray(x), jnp.asarray(weight), "variance")
    np.testing.assert_allclose(mean_square, x / np.sqrt((x**2).mean(-1, keepdims=True)) * weight, rtol=1e-5)
    np.testing.assert_allclose(variance, x / x.std(-1, ddof=1, keepdims=True) * weight, rtol=1e-5)


@pytest.mark.parametrize(
    ("sizes", "count"),
    [
        ({"num_genes": 2000}, 103_642_016),
        ({"num_genes": 12_626}, 141_746_852),
        ({"num_genes": 12_626, "sources": ("pbmc", "tahoe100m", "replogle", "cellxgene")}, 219_324_068),
        ({"num_genes": 2000, "hidden": 256}, 28_426_656),
        ({"num_genes": 2000, "hidden": 768}, 225_650_080),
    ],
)
def test_published_parameter_counts(sizes, count):
    denoiser = eqx.filter_eval_shape(perturbdiff.init_denoiser, jax.random.key(0), **sizes)
    assert sum(leaf.size for leaf in jax.tree.leaves(denoiser)) == count


def test_published_names_and_shapes():
    """The list of the default PBMC model, 175 entries with its covariate encoder (text width 64 here)."""
    network = """
    x_embedder.weight 512 4000; x_embedder.bias 512; x_control_embedder.weight 512 4000; x_control_embedder.bias 512
    t_embedder.mlp.0.weight 512 256; t_embedder.mlp.0.bias 512; t_embedder.mlp.2.weight 512 512
    t_embedder.mlp.2.bias 512; gene_embedding.gene_embedding.weight 512 5120; gene_embedding.gene_embedding.bias 512
    gene_embedding.null_emb.weight 1 512; gene_embedding.layer_norm.weight 512; gene_embedding.layer_norm.bias 512
    class_embedding.emb.weight 512 2000; class_embedding.emb.bias 512; class_embedding.null_emb.weight 1 512
    final_layer.linear.weight 2000 512; final_layer.linear.bias 2000; final_layer.adaLN_modulation.1.weight 1024 512
    final_layer.adaLN_modulation.1.bias 1024; control_final_layer.linear.weight 2000 512
    control_final_layer.linear.bias 2000; control_final_layer.adaLN_modulation.1.weight 1024 512
    control_final_layer.adaLN_modulation.1.bias 1024"""
    block = """
    attn.qkv.weight 3072 1024; attn.qkv.bias 3072; attn.q_norm.weight 128; attn.k_norm.weight 128
    attn.proj.weight 1024 1024; attn.proj.bias 1024; mlp.fc1.weight 2048 512; mlp.fc1.bias 2048
    mlp.fc2.weight 512 2048; mlp.fc2.bias 512; control_mlp.fc1.weight 2048 512; control_mlp.fc1.bias 2048
    control_mlp.fc2.weight 512 2048; control_mlp.fc2.bias 512; adaLN_modulation.1.weight 3072 512
    adaLN_modulation.1.bias 3072; control_adaLN_modulation.1.weight 3072 512; control_adaLN_modulation.1.bias 3072"""
    covariates = """
    pert_encoder.weight 92 128; celltype_encoder.0.weight 18 64; celltype_encoder.1.weight 128 64
    celltype_encoder.1.bias 128; batch_encoder.weight 12 128; transform.weight 2000 384; transform.bias 2000"""

    def table(text, prefix):
        entries = (entry.split() for entry in re.split(r"[;\n]", text) if entry.strip())
        return {prefix + name: tuple(map(int, shape)) for name, *shape in entries}

    expected = table(network, "model.") | table(covariates, "cov_encoder.")
    for i in range(8):
        expected |= table(block, f"model.blocks.{i}.block.")
    assert len(expected) == 175

    denoiser = eqx.filter_eval_shape(perturbdiff.init_denoiser, jax.random.key(0), 2000)
    encoder = eqx.filter_eval_shape(
        perturbdiff.init_covariate_encoder, jax.random.key(0), 2000, perturbations=91,
        cell_types=np.zeros((18, 64), np.float32), batches=12,
    )  # fmt: skip
    assert {name: leaf.shape for name, leaf in named_arrays(denoiser, encoder).items()} == expected


@pytest.fixture(scope="module")
def fresh():
    """A network as it starts its training."""
    return eqx.filter_jit(perturbdiff.init_denoiser)(
        jax.random.key(0), 30, hidden=64, depth=1, num_heads=2, gene_features=50
    )


def test_new_blocks_are_the_identity(fresh):
    x, y, c = jnp.asarray(np.random.default_rng(0).normal(size=(3, 4, 64)), jnp.float32)
    new_x, new_y = eqx.filter_jit(fresh.blocks[0])(x, y, c)
    np.testing.assert_array_equal(new_x, x)
    np.testing.assert_array_equal(new_y, y)


def test_published_initialisation(fresh):
    arrays = {n.removeprefix("model."): np.asarray(a) for n, a in named_arrays(fresh).items()}
    for name in ("x_embedder", "class_embedding.emb", "final_layer.linear", "blocks.0.block.attn.qkv"):
        weight = arrays[f"{name}.weight"]
        bound = np.sqrt(6 / sum(weight.shape))
        assert np.abs(weight).max() <= bound
        # A uniform law on +-bound: its sd, within four standard errors (excess kurtosis -1.2).
        assert abs(weight.std() * np.sqrt(3) / bound - 1) < 4 * np.sqrt(0.2 / weight.size)
    for name in ("t_embedder.mlp.0", "gene_embedding.gene_embedding"):
        assert abs(arrays[f"{name}.weight"].std() / 0.02 - 1) < 4 / np.sqrt(2 * arrays[f"{name}.weight"].size)
    zero = [name for name, a in arrays.items() if not a.any()]
    assert {name for name in arrays if name.endswith(".bias") or "adaLN" in name} == set(zero)


def test_errors_name_the_argument(tiny, inputs):
    x_t, previous, control, t, covariates = inputs
    with pytest.raises(ValueError, match=r"control has shape \(2, 3, 5\), expected \(2, 4, 5\)"):
        tiny[0](x_t, previous, control[:, :3], t, covariates)
    with pytest.raises(ValueError, match=r"t has shape \(\), expected \(2,\)"):
        tiny[0](x_t, previous, control, t[0], covariates)
    with pytest.raises(ValueError, match=r"covariates have shape \(2, 4, 4\), expected \(2, 4, 5\)"):
        tiny[0](x_t, previous, control, t, covariates[..., :4])
    with pytest.raises(ValueError, match="all sources share one embedder"):
        tiny[0](x_t, previous, control, t, covariates, source=jnp.zeros(2, int))
    with pytest.raises(ValueError, match="num_heads = 3 does not divide"):
        perturbdiff.init_denoiser(jax.random.key(0), 5, hidden=8, num_heads=3)


def test_sources(inputs):
    sources = ("tahoe", "pbmc")
    denoiser = perturbdiff.init_denoiser(
        jax.random.key(0), 5, hidden=8, depth=1, num_heads=2, gene_features=0, sources=sources
    )
    assert perturbdiff.source_index(denoiser, "Parse_10M_PBMC") == 0
    with pytest.raises(ValueError, match="matches 0 of the sources pbmc, tahoe"):
        perturbdiff.source_index(denoiser, "replogle")
    with pytest.raises(ValueError, match="one embedder for each of pbmc, tahoe"):
        denoiser(*inputs)
    mixed = denoiser(*inputs, source=jnp.array([1, 0]))
    for i, source in enumerate((1, 0)):
        alone = denoiser(*(x[i : i + 1] for x in inputs), source=jnp.array([source]))
        np.testing.assert_allclose(mixed[i : i + 1], alone, rtol=1e-4, atol=1e-6)
    assert np.isnan(denoiser(*inputs, source=jnp.array([0, 2]))[1]).all()
