import numpy as np
import pytest

from hilbertcell.analyses.differential_expression import ranking_areas
from hilbertcell.analyses.discrimination import count_spearman, discrimination

GENES = [f"g{i}" for i in range(6)]


def test_ranks_by_hand():
    true = np.array([[0.0, 0], [1, 0], [5, 0]])
    genes, names = ["a", "b"], ["x", "y", "z"]
    np.testing.assert_allclose(discrimination(true, true, genes, names), 1.0)
    predicted = np.array([[0.9, 0], [0.9, 0], [0.9, 0]])  # nearest to y, then x, then z
    np.testing.assert_allclose(discrimination(predicted, true, genes, names), [2 / 3, 1, 1 / 3])
    tied = np.array([[0.5, 0], [0.5, 0], [3.0, 0]])  # x and y tie for the first two; y and z tie for z
    np.testing.assert_allclose(discrimination(tied, true, genes, names), [5 / 6, 5 / 6, 5 / 6])


def test_the_target_gene_does_not_count():
    rng = np.random.default_rng(0)
    with_gene, without = [], []
    for _ in range(200):  # a knock-out that is known by its own gene and by nothing else
        true, predicted = rng.normal(size=(2, 6, 6))
        true[0, 0] = predicted[0, 0] = -50.0
        with_gene.append(discrimination(predicted, true, GENES, ["-"] * 6)[0])
        without.append(discrimination(predicted, true, GENES, ["g0", *"-----"])[0])
    assert min(with_gene) == 1.0
    assert abs(np.mean(without) - 7 / 12) < 4 * np.sqrt(1 / 12 / 200)  # chance among six


def test_random_predictions_score_half_and_scale_matters_but_not_to_the_cosine():
    rng = np.random.default_rng(1)
    true = rng.normal(size=(40, 30))
    genes, names = [f"g{i}" for i in range(30)], [f"p{i}" for i in range(40)]
    for norm in ("l1", "l2", "cosine"):
        scores = discrimination(rng.normal(size=(40, 30)), true, genes, names, norm)
        chance = (40 + 1) / 80
        assert abs(scores.mean() - chance) < 4 * np.sqrt(1 / 12 / 40)
    noisy = true + rng.normal(size=true.shape)
    one, ten = (discrimination(f * noisy, true, genes, names, "cosine") for f in (1.0, 10.0))
    np.testing.assert_allclose(one, ten)
    with pytest.raises(ValueError, match="norm = 'max'"):
        discrimination(true, true, genes, names, "max")
    with pytest.raises(ValueError, match=r"\(39, 30\)"):
        discrimination(true[1:], true, genes, names)
    assert np.isnan(discrimination(0 * true, true, genes, names, "cosine")).all()


def test_counts_of_de_genes_are_compared_where_there_are_some():
    assert count_spearman(np.array([1, 5, 9, 7]), np.array([2, 3, 4, 0])) == pytest.approx(1.0)
    assert np.isnan(count_spearman(np.array([1, 5, 9]), np.array([2, 0, 4])))


def test_ranking_areas_by_hand():
    label = np.array([True, False, True, False])
    auroc, auprc = ranking_areas(np.array([4.0, 3.0, 2.0, 1.0]), label)
    assert auroc == pytest.approx(3 / 4)
    assert auprc == pytest.approx((1 + 2 / 3) / 2)
    auroc, auprc = ranking_areas(np.ones(4), label)  # nothing is ranked
    assert (auroc, auprc) == (0.5, 0.5)
    assert np.isnan(ranking_areas(np.ones(4), np.ones(4, bool))).all()
