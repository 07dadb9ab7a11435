"""Parity of the networks with the published classes, part by part, then as a whole."""

import jax.numpy as jnp
import pytest

from hilbertcell.models import perturbdiff
from hilbertcell.models.perturbdiff import layers

NETWORK = 2e-5  # float32, relative L2


@pytest.fixture(scope="module")
def inputs(golden, networks):
    covariates = networks[1](golden["in/cov_pert"], golden["in/cov_celltype"], golden["in/cov_batch"])
    return golden.jax("out/q_sample/batch_t"), golden.jax("in/control"), golden.jax("in/t"), covariates


def test_timestep_embedding(golden, networks):
    t = golden.jax("out/temb/t")
    golden.check("out/temb/sinusoid256", networks[0].timestep.features(t), NETWORK)
    golden.check("out/temb/mlp_out", networks[0].timestep(t), NETWORK)


def test_covariates(golden, networks, inputs):
    denoiser, encoder = networks
    covariates = inputs[-1]
    golden.check("out/cov/batch_emb", covariates, NETWORK)
    none = jnp.full((3, 6), perturbdiff.NO_PERTURBATION)
    golden.check(
        "out/cov/batch_emb_pert_non",
        encoder(none, golden["in/cov_celltype"], golden["in/cov_batch"]),
        NETWORK,
    )
    t = golden.jax("in/t")
    time = denoiser.timestep(t)[:, None]
    golden.check("out/cov/class_emb", denoiser.condition(t, covariates) - time, NETWORK)
    golden.check("out/cov/class_emb_null", denoiser.condition(t, None) - time, NETWORK)


@pytest.mark.parametrize("name", ["cov_genept", "cov_drug"])
def test_given_tables_for_perturbations(golden, name):
    encoder = perturbdiff.covariate_encoder_from_state(golden.state(f"var/{name}/param/"))
    ids = [golden[f"var/{name}/cov_{label}"] for label in ("pert", "celltype", "batch")]
    golden.check(f"var/{name}/out", encoder(*ids), NETWORK)


@pytest.mark.parametrize("variant", ["cond_selfcond", "cond_noselfcond", "null_selfcond", "null_noselfcond"])
def test_network(golden, networks, inputs, variant):
    x_t, control, t, covariates = inputs
    condition, previous = variant.split("_")
    covariates = covariates if condition == "cond" else None
    previous_x0 = golden.jax("in/selfcond") * (previous == "selfcond")
    golden.check(f"out/net/{variant}/x", networks[0](x_t, previous_x0, control, t, covariates), NETWORK)


def test_network_without_controls(golden, networks, inputs):
    x_t, control, t, covariates = inputs
    nothing = jnp.zeros_like(control)
    golden.check("out/net/cond_zerocontrol/x", networks[0](x_t, nothing, nothing, t, covariates), NETWORK)


@pytest.mark.parametrize("variant", ["selfcond", "noselfcond"])
def test_control_head(golden, networks, inputs, variant):
    x_t, control, t, covariates = inputs
    denoiser = networks[0]
    previous_x0 = golden.jax("in/selfcond") * (variant == "selfcond")
    c = denoiser.condition(t, covariates)
    _, y = denoiser.streams(jnp.concatenate([x_t, previous_x0], -1), control, c)
    golden.check(f"out/net/cond_{variant}/x_control", denoiser.control_head(y, c), NETWORK)


def test_inside_of_the_blocks(golden, networks, inputs):
    x_t, control, t, covariates = inputs
    denoiser = networks[0]
    c = denoiser.condition(t, covariates)
    x = denoiser.embed(jnp.concatenate([x_t, golden.jax("in/selfcond")], -1))
    y = denoiser.embed_control(control)
    golden.check("out/mid/x_embedder/0", x, NETWORK)
    golden.check("out/mid/x_control_embedder/0", y, NETWORK)
    x, y = x + denoiser.token_vector, y + denoiser.token_vector
    block = denoiser.blocks[0]
    modulation = block.modulation(jnp.asarray(c / (1 + jnp.exp(-c))))
    golden.check("out/mid/block0_adaLN/0", modulation, NETWORK)
    shift, scale = jnp.split(modulation, 6, -1)[3:5]
    golden.check("out/mid/block0_mlp/0", block.mlp(layers.modulate(x, shift, scale)), NETWORK)
    golden.check(
        "out/mid/block0_attn/0",
        jnp.stack([block.attention(tokens) for tokens in golden.jax("out/mid/block0_attn/in")]),
        NETWORK,
    )
    for i, block in enumerate(denoiser.blocks):
        x, y = map(jnp.stack, zip(*[block(*set_) for set_ in zip(x, y, c, strict=True)], strict=True))
        golden.check(f"out/mid/block{i}_out/0", x, NETWORK)
        golden.check(f"out/mid/block{i}_out/1", y, NETWORK)


def test_joint_attention_input(golden, networks, inputs):
    x_t, control, t, covariates = inputs
    denoiser = networks[0]
    block = denoiser.blocks[0]
    c = denoiser.condition(t, covariates)
    active = c / (1 + jnp.exp(-c))
    streams = (
        (denoiser.embed(jnp.concatenate([x_t, golden.jax("in/selfcond")], -1)), block.modulation),
        (denoiser.embed_control(control), block.control_modulation),
    )
    tokens = [
        layers.modulate(z + denoiser.token_vector, *jnp.split(modulation(active), 6, -1)[:2])
        for z, modulation in streams
    ]
    golden.check("out/mid/block0_attn/in", jnp.concatenate(tokens, -1), NETWORK)


def test_separate_embedders_and_class_silu(golden):
    denoiser, encoder = perturbdiff.from_state_dict(
        golden.state("var/sep/param/"), num_heads=2, class_silu=True
    )
    assert encoder is None
    assert denoiser.sources == ("pbmc", "replogle")
    source = jnp.array([perturbdiff.source_index(denoiser, str(name)) for name in golden["var/sep/ds_name"]])
    c = denoiser.condition(golden.jax("var/sep/t"), golden.jax("var/sep/batch_emb"))
    target, control = golden.jax("var/sep/x_input"), golden.jax("var/sep/control_input")
    x, y = denoiser.streams(target, control, c, source)
    golden.check("var/sep/x", denoiser.head(x, c), NETWORK)
    golden.check("var/sep/x_control", denoiser.control_head(y, c), NETWORK)
