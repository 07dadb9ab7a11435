"""Beginning a training at another fit: labels of the new data, numbered behind those that the fit knows."""

from dataclasses import replace

import jax
import numpy as np

from hilbertcell.data.populations import Populations
from hilbertcell.inference.perturbdiff.cell_sets import expression_of
from hilbertcell.inference.perturbdiff.fit import PerturbDiffFit, condition_features
from hilbertcell.inference.perturbdiff.settings import PerturbDiffSettings
from hilbertcell.inference.perturbdiff.vocabulary import Vocabulary
from hilbertcell.models.perturbdiff.finetuning import Changes, prepare


def begin_at(
    pretrained: PerturbDiffFit,
    populations: Populations,
    settings: PerturbDiffSettings,
    *,
    seed: int = 0,
    reset_modulation: bool = False,
) -> tuple[PerturbDiffFit, PerturbDiffSettings]:
    """What `fit_perturbdiff(start=, settings=)` takes to fine-tune `pretrained` on `populations`.

    Heads and the perturbation branch are new; so are the input maps if the genes are others. Cell types and batches that
    the fit knows keep their rows. Sizes of the network are those of `pretrained`, whatever `settings` say.

    Raises:
        ValueError: see `models.perturbdiff.finetuning.prepare`.
    """
    labels = populations.labels
    own = Vocabulary.of(labels, perturbations=True, batches=bool(pretrained.vocabulary.batch))
    features = condition_features(populations)
    perturbation = own.perturbation if features is None else {n: i for i, n in enumerate(features.index)}
    prefix = pretrained.vocabulary.prefix
    vocabulary = Vocabulary(
        perturbation,
        _continued(dict(pretrained.vocabulary.context), list(own.context)),
        _continued(dict(pretrained.vocabulary.batch), [f"{prefix}{name}" for name in own.batch]),
        prefix,
    )
    same_genes = pretrained.genes is not None and np.array_equal(pretrained.genes, populations.genes)
    networks = prepare(
        jax.random.key(seed),
        *pretrained.networks,
        Changes(
            len(perturbation) if features is None else features.to_numpy(np.float32),
            len(vocabulary.context),
            len(vocabulary.batch),
            None if same_genes else len(populations.genes),
            settings.source,
            reset_modulation,
        ),
    )
    sizes = ("hidden", "depth", "num_heads", "covariate_hidden", "gene_features", "batch_covariate")
    settings = settings.model_copy(
        update={name: getattr(pretrained.settings, name) for name in sizes} | {"sources": networks[0].sources}
    )
    start = replace(
        pretrained, networks=networks, current=None, genes=populations.genes, vocabulary=vocabulary,
        unit=expression_of(populations),
    )  # fmt: skip
    return start, settings


def _continued(known: dict[str, int], names: list[str]) -> dict[str, int]:
    """Ids with those of new names appended in their order."""
    for name in names:
        known.setdefault(name, len(known))
    return known
