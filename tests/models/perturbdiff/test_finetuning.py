"""What fine-tuning keeps and what it draws again."""

import jax
import numpy as np
import pytest

from hilbertcell.models import perturbdiff
from hilbertcell.models.perturbdiff.finetuning import Changes, prepare
from hilbertcell.models.perturbdiff.state_dict import named_arrays

KEY = jax.random.key(3)


def arrays(networks):
    return {name: np.asarray(a) for name, a in named_arrays(*networks).items()}


def changed(before, after):
    """Names of arrays that are new, gone or different."""
    a, b = arrays(before), arrays(after)
    return {n for n in a.keys() | b.keys() if n not in a or n not in b or not np.array_equal(a[n], b[n])}


def test_heads_and_perturbations_are_new(tiny):
    after = prepare(KEY, *tiny, Changes(perturbations=7))
    names = changed(tiny, after)
    heads = {f"model.{head}.{part}" for head in ("final_layer", "control_final_layer") for part in (
        "linear.weight", "linear.bias", "adaLN_modulation.1.weight", "adaLN_modulation.1.bias")}  # fmt: skip
    assert names == heads | {"cov_encoder.pert_encoder.weight"}
    new = arrays(after)
    assert new["cov_encoder.pert_encoder.weight"].shape == (8, 4)
    assert not new["model.final_layer.adaLN_modulation.1.weight"].any()
    assert not new["model.final_layer.linear.bias"].any()
    perturbdiff.from_state_dict(new, num_heads=2)  # still a network of the published kind


def test_another_gene_space(tiny):
    after = prepare(KEY, *tiny, Changes(perturbations=2, num_genes=9))
    new = arrays(after)
    assert new["model.x_embedder.weight"].shape == (8, 18)
    assert new["model.final_layer.linear.weight"].shape == (9, 8)
    assert np.abs(new["model.final_layer.linear.bias"]).max() <= 8**-0.5  # the framework's default
    assert new["model.final_layer.linear.bias"].any()
    assert not new["model.x_embedder.bias"].any()
    # The covariate path keeps the old width, and the blocks keep everything.
    assert not changed(tiny, after) & {
        n for n in arrays(tiny) if "blocks" in n or "class_embedding" in n or "transform" in n
    }
    again, _ = perturbdiff.from_state_dict(new, num_heads=2)
    assert again.num_genes == 9
    x = jax.numpy.zeros((1, 2, 9))
    assert again(x, x, x, jax.numpy.zeros(1, int), jax.numpy.zeros((1, 1, 5))).shape == (1, 2, 9)


def test_modulations_may_be_reset(tiny):
    after = prepare(KEY, *tiny, Changes(perturbations=2, reset_modulation=True))
    reset = {n for n, a in arrays(after).items() if "blocks" in n and not a.any()}
    assert reset == {n for n in arrays(tiny) if "blocks" in n and "adaLN" in n}


def test_sources():
    denoiser = perturbdiff.init_denoiser(
        KEY, 5, hidden=8, depth=1, num_heads=2, gene_features=0, sources=("a", "b")
    )
    encoder = perturbdiff.init_covariate_encoder(KEY, 5, perturbations=0, cell_types=2, batches=2, hidden=4)
    new = prepare(KEY, denoiser, encoder, Changes(2, source="c"))
    assert new[0].sources == ("a", "b", "c")
    assert not {n for n in changed((denoiser, encoder), new) if "_embedder.a" in n or "_embedder.b" in n}
    assert prepare(KEY, denoiser, encoder, Changes(2, source="a"))[0].sources == ("a", "b")
    wide = prepare(KEY, denoiser, encoder, Changes(2, source="a", num_genes=7))[0]
    assert {e.weight.shape for e in wide.embed.values()} == {(8, 14)}


def test_a_source_needs_separate_embedders(tiny):
    with pytest.raises(ValueError, match="all data sets share one embedder"):
        prepare(KEY, *tiny, Changes(2, source="c"))


def test_tables_grow_below_their_old_rows():
    denoiser = perturbdiff.init_denoiser(KEY, 5, hidden=8, depth=1, num_heads=2, gene_features=0)
    encoder = perturbdiff.init_covariate_encoder(KEY, 5, perturbations=3, cell_types=2, batches=3, hidden=4)
    _, new = prepare(KEY, denoiser, encoder, Changes(2, cell_types=4, batches=3))
    np.testing.assert_array_equal(new.cell_type.table[:2], encoder.cell_type.table)
    assert new.cell_type.table.shape == (4, 4)
    np.testing.assert_array_equal(new.batch.table, encoder.batch.table)


def test_a_given_cell_type_table_cannot_grow(tiny):
    with pytest.raises(ValueError, match="cell types: 3 labels, and the given table holds 2"):
        prepare(KEY, *tiny, Changes(2, cell_types=3))


def test_from_drugs_to_perturbations(golden):
    encoder = perturbdiff.covariate_encoder_from_state(golden.state("var/cov_drug/param/"))
    denoiser = perturbdiff.init_denoiser(KEY, 10, hidden=8, depth=1, num_heads=2, gene_features=0)
    _, new = prepare(KEY, denoiser, encoder, Changes(np.ones((3, 6), np.float32)))
    assert new.drug is None
    assert new.transform.weight.shape == (10, 12)
    np.testing.assert_array_equal(new.transform.weight[:, 4:], encoder.transform.weight[:, 8:])
    assert new([0, 2], [0, 1], [0, 2]).shape == (2, 10)
