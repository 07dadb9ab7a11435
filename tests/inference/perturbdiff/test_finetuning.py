"""Pretraining without labels, then fine-tuning on other donors, types and genes."""

import numpy as np
import pytest

from hilbertcell.inference.perturbdiff.finetuning import begin_at
from hilbertcell.inference.perturbdiff.fit import fit_perturbdiff
from hilbertcell.models.perturbdiff.state_dict import named_arrays


@pytest.mark.slow
def test_pretrained_then_fine_tuned(make, settings):
    contexts_only = settings.model_copy(
        update={"drop_control": 1.0, "sources": ("cellxgene", "pbmc"), "source": "cellxgene"}
    )
    pretrained = fit_perturbdiff(make(), settings=contexts_only)
    assert pretrained.vocabulary.perturbation == {}
    encoder = pretrained.networks[1]
    assert encoder.perturbation.table.shape == (1, 4)  # one shared row: no perturbation
    assert pretrained.losses[-30:].sum(1).mean() < pretrained.losses[:30].sum(1).mean()

    other = make(donors=4, genes=6, seed=5)
    wanted = settings.model_copy(update={"source": "pbmc"})
    begun, chosen = begin_at(pretrained, other, wanted)
    assert chosen.sources == ("cellxgene", "pbmc")
    assert begun.vocabulary.batch == {"Donor1": 0, "Donor2": 1, "Donor3": 2, "Donor4": 3}
    assert begun.vocabulary.perturbation == {"A": 0, "B": 1, "PBS": 2}
    before, after = (dict(named_arrays(*fit.networks)) for fit in (pretrained, begun))
    kept = [n for n in before if "blocks" in n or "t_embedder" in n or "celltype" in n]
    assert all(np.array_equal(before[n], after[n]) for n in kept)
    assert after["model.final_layer.linear.weight"].shape == (6, 32)

    tuned = fit_perturbdiff(other, settings=chosen, start=begun)
    assert np.isfinite(tuned.losses).all()
    cells = tuned.generate(other, other.labels.loc[["B | A | Donor4"]], [5])
    assert cells[0].shape == (5, 6)


@pytest.mark.slow
def test_known_genes_keep_their_maps(make, screen, fitted, settings):
    begun, _ = begin_at(fitted, screen, settings)
    for name in ("embed", "embed_control"):
        np.testing.assert_array_equal(
            getattr(begun.networks[0], name).weight, getattr(fitted.networks[0], name).weight
        )
    begun, _ = begin_at(fitted, screen, settings, reset_modulation=True)
    assert not np.any(begun.networks[0].blocks[0].modulation.weight)
    shuffled = screen.match_genes(screen.genes[::-1])
    begun, _ = begin_at(fitted, shuffled, settings)  # as many genes, in another order
    assert np.any(np.asarray(begun.networks[0].embed.weight) != np.asarray(fitted.networks[0].embed.weight))
