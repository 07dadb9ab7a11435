"""Within-population covariance of the features: C_j = loadings F_j loadings^T + diag(rest_j), shrunk to its class.

A class is a context, control or perturbed. Small populations lean on their class, small classes on the pool of
all; one cell is enough, its population then has the covariance of its class.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import numpy as np
from scipy.optimize import nnls

from hilbertcell.models.feature_maps import leading_directions

# Up to here the covariances are kept whole: with 24 markers and 96 random features, 32 factors misjudge the noise of
# single coordinates by up to 40 %. Beyond, P x D x D would not fit in memory (with 300 to 600 genes: 10-30 %).
EXACT_FEATURES = 128
# The part of a feature's variance that stays its own, however well the factors explain it: keeps C_j invertible.
MIN_UNIQUE = 1e-6
# With populations of (nearly) equal size, sampling error and true spread of variances cannot be told apart;
# one pseudo-observation of weight 1 at the Gaussian value, relative variance 2/(n - 1), then decides.
GAUSSIAN_EXCESS = 2.0


@dataclass(frozen=True, eq=False)
class WithinPrior:
    """What small populations lean on: the covariance of each class and of the pool, and how much to lean."""

    scores: np.ndarray
    """(D, L) the loadings that the streaming pass scored cells with: z = (phi - center) @ scores."""
    loadings: np.ndarray
    """(D, L) V scores (scores^T V scores)^-1, V = diag(pooled variance): maps factors back to features."""
    class_variance: np.ndarray
    """(K, D) variances of the classes, themselves shrunk to the pool."""
    class_scores: np.ndarray
    """(K, L, L) covariances of the scores, likewise."""
    pooled_variance: np.ndarray
    """(D,) pooled over all populations; positive."""
    pooled_scores: np.ndarray
    """(L, L) pooled over all populations."""
    population_df: np.ndarray
    """() degrees of freedom that a population's class counts for against the population's own n - 1."""
    class_df: np.ndarray
    """() degrees of freedom that the pool counts for against those of a class."""

    def shrink(
        self, n: np.ndarray, variance: np.ndarray, factor_covariance: np.ndarray, codes: np.ndarray
    ) -> WithinCovariance:
        """Covariances of populations, of the fit or new ones.

        n (P,) cells; variance (P, D) and factor_covariance (P, L, L) unbiased, ignored (may be nan) where n < 2;
        codes (P,) the class of each, -1 for a class that the fit has not seen: it leans on the pool.
        S_j* = (d0 S_class + (n_j - 1) S_j) / (d0 + n_j - 1), d0 = `population_df`.
        """
        n = np.asarray(n, np.float64)
        variance = self.shrink_variance(n, variance, codes)
        class_scores = np.concatenate([self.class_scores, self.pooled_scores[None]])[codes]
        scores_covariance = _blend(self._own(n), factor_covariance, class_scores)
        factor, rest = split_unique(variance, scores_covariance, self.scores, self.loadings)
        return WithinCovariance(n, variance, self.loadings, factor, rest)

    def shrink_variance(self, n: np.ndarray, variance: np.ndarray, codes: np.ndarray) -> np.ndarray:
        """The variances (P, D) of `shrink` alone; the same arguments, the same error."""
        codes = np.asarray(codes)
        if codes.min(initial=-1) < -1 or codes.max(initial=-1) >= len(self.class_variance):
            raise ValueError(
                f"class codes run from {codes.min()} to {codes.max()}, the fit has {len(self.class_variance)} "
                "classes: give codes of the fit, or -1 for a class it has not seen"
            )
        class_variance = np.concatenate([self.class_variance, self.pooled_variance[None]])[codes]
        return _blend(self._own(n), variance, class_variance)

    def _own(self, n: np.ndarray) -> np.ndarray:
        df = np.maximum(np.asarray(n, np.float64) - 1, 0)
        return df / (self.population_df + df)

    def pooled(self) -> WithinCovariance:
        """The pooled covariance C, as a single population of one cell."""
        factor, rest = split_unique(
            self.pooled_variance[None], self.pooled_scores[None], self.scores, self.loadings
        )
        return WithinCovariance(np.ones(1), self.pooled_variance[None], self.loadings, factor, rest)

    def to_arrays(self) -> dict[str, np.ndarray]:
        """Named arrays, ready for safetensors."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    @classmethod
    def from_arrays(cls, arrays: dict[str, np.ndarray]) -> WithinPrior:
        """Inverse of `to_arrays`."""
        return cls(**{field.name: arrays[field.name] for field in fields(cls)})


@dataclass(frozen=True, eq=False)
class WithinCovariance:
    """C_j = loadings factor_j loadings^T + diag(rest_j), j = 1 ... P, in the units of the features squared."""

    n: np.ndarray
    """(P,) numbers of cells."""
    diagonal: np.ndarray
    """(P, D) total variances of the features within each population, after shrinkage."""
    loadings: np.ndarray
    """(D, L) shared by all populations."""
    factor: np.ndarray
    """(P, L, L) covariance of the factors, positive semi-definite."""
    rest: np.ndarray
    """(P, D) variance that the factors leave, positive."""

    @property
    def noise_variance(self) -> np.ndarray:
        """(P, D) variance of the observed mean of each feature around the population's own: diagonal / n."""
        return self.diagonal / self.n[:, None]

    def dense(self, j: int) -> np.ndarray:
        """(D, D) the covariance C_j of population j."""
        return self.loadings @ self.factor[j] @ self.loadings.T + np.diag(self.rest[j])

    def apply(self, j: int, x: np.ndarray) -> np.ndarray:
        """(D, Q) C_j x for x (D, Q), without forming C_j."""
        return self.loadings @ (self.factor[j] @ (self.loadings.T @ x)) + self.rest[j][:, None] * x

    def project(self, A: np.ndarray) -> np.ndarray:
        """(P, Q, Q) W_j = A^T C_j A for A (D, Q): the within covariance of linear functions of the features."""
        outer = np.einsum("dq,dr->dqr", A, A).reshape(len(A), -1)
        unique = (self.rest @ outer).reshape(-1, A.shape[1], A.shape[1])
        factors = A.T @ self.loadings
        return factors @ self.factor @ factors.T + unique

    def select(self, keep: np.ndarray) -> WithinCovariance:
        """The populations of a mask or an index array."""
        return WithinCovariance(
            self.n[keep], self.diagonal[keep], self.loadings, self.factor[keep], self.rest[keep]
        )

    def to_arrays(self) -> dict[str, np.ndarray]:
        """Named arrays, ready for safetensors."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    @classmethod
    def from_arrays(cls, arrays: dict[str, np.ndarray]) -> WithinCovariance:
        """Inverse of `to_arrays`."""
        return cls(**{field.name: arrays[field.name] for field in fields(cls)})


def fit_loadings(phi: np.ndarray, codes: np.ndarray, rank: int = 32) -> tuple[np.ndarray, np.ndarray]:
    """Loadings (D, L) and center (D,) for scoring cells in the streaming pass: z = (phi - center) @ loadings.

    phi (m, D) features of pilot cells, codes (m,) their populations. The leading principal directions U of the
    deviations from population means, every feature divided by its within-population sd s, because factors should
    couple features whatever their units; loadings = U / s, so that z has orthonormal loadings on standardised features.
    With D <= max(rank, 128) the loadings are the identity, and the covariances of the scores are those of the
    features, exact. Raises ValueError when no population has two pilot cells.
    """
    phi, (_, codes) = np.asarray(phi, np.float64), np.unique(codes, return_inverse=True)
    center = phi.mean(0)
    if phi.shape[1] <= max(rank, EXACT_FEATURES):
        return np.eye(phi.shape[1]), center
    counts = np.bincount(codes)
    degrees = len(phi) - len(counts)
    if degrees < 1:
        raise ValueError(
            f"none of the {len(counts)} pilot populations has two cells: a within-population covariance needs "
            "replicate cells; check the batch and context keys"
        )
    sums = np.zeros((len(counts), phi.shape[1]))
    np.add.at(sums, codes, phi)
    deviations = phi - (sums / counts[:, None])[codes]
    sd = np.sqrt((deviations**2).sum(0) / degrees)
    inverse_sd = np.divide(1.0, sd, out=np.zeros_like(sd), where=sd > 1e-12 * sd.max())
    # A fixed seed: the subspace iteration converges to the same directions from any start.
    directions, _ = leading_directions(deviations * inverse_sd, rank, np.random.default_rng(0))
    return directions * inverse_sd[:, None], center


def fit_within_prior(
    n: np.ndarray,
    variance: np.ndarray,
    factor_covariance: np.ndarray,
    codes: np.ndarray,
    loadings: np.ndarray,
) -> WithinPrior:
    """Class and pooled covariances, and how far populations lean on them, from training populations.

    n (P,) cells; variance (P, D), factor_covariance (P, L, L) unbiased (nan where n = 1), codes (P,) classes
    0 ... K-1; loadings (D, L) as given to the streaming pass. Raises ValueError if no population has two cells.
    """
    n, codes = np.asarray(n, np.float64), np.asarray(codes)
    df = n - 1
    if not (df > 0).any():
        raise ValueError(
            f"none of the {len(n)} populations has two cells: their covariances are unknown; check the keys"
        )
    membership = np.eye(codes.max() + 1)[codes]
    usable = df > 0
    variance = np.where(usable[:, None], variance, 0.0)
    factor_covariance = np.where(usable[:, None, None], factor_covariance, 0.0)

    class_df = df @ membership
    class_weights = (df[:, None] * membership / np.maximum(class_df, 1)).T
    class_variance = class_weights @ variance
    class_scores = np.tensordot(class_weights, factor_covariance, 1)
    pool_weights = class_df / class_df.sum()
    pooled_variance = pool_weights @ class_variance
    pooled_scores = np.tensordot(pool_weights, class_scores, 1)
    # A gene that never varies within a population gets a variance far below that of any other, not zero.
    pooled_variance = np.maximum(
        pooled_variance, MIN_UNIQUE * np.median(pooled_variance[pooled_variance > 0])
    )

    excess, spread = _spread_of_variances(variance[usable], df[usable], codes[usable], class_variance)
    population_df = excess / max(spread, 1e-6)
    seen = class_df > 0
    _, class_spread = _spread_of_variances(
        class_variance[seen], class_df[seen], np.zeros(seen.sum(), int), pooled_variance[None], excess
    )
    pool_df = excess / max(class_spread, 1e-6)
    own = class_df / (pool_df + class_df)
    class_variance = _blend(own, class_variance, pooled_variance)
    class_scores = _blend(own, class_scores, pooled_scores)

    weighted = pooled_variance[:, None] * loadings
    back = np.linalg.solve(loadings.T @ weighted, weighted.T).T
    return WithinPrior(
        loadings,
        back,
        class_variance,
        class_scores,
        pooled_variance,
        pooled_scores,
        np.asarray(population_df),
        np.asarray(pool_df),
    )


def _spread_of_variances(
    variance: np.ndarray,
    df: np.ndarray,
    codes: np.ndarray,
    class_variance: np.ndarray,
    excess: float | None = None,
) -> tuple[float, float]:
    """(k, tau^2): relative variance of s^2 is k / df by sampling plus tau^2 between populations of a class.

    Credibility theory (Buhlmann and Straub, 1970): the best linear estimate of a variance from its own s^2 and
    its class gives the class k / tau^2 degrees of freedom, whatever the distributions. (For Gaussian cells
    with inverse-gamma variances, as in Smyth, 2004, it is the posterior mean; zero-inflated genes have k far above 2.)
    Squared deviations of s^2 / class variance from 1, averaged over features, are regressed on their expectation,
    which allows for the population's own weight in its class. `excess` fixes k instead.
    """
    total = np.bincount(codes, df)[codes]
    share = df / total
    squared_shares = np.bincount(codes, share**2)[codes]
    known = class_variance > 0
    ratio = np.divide(variance, class_variance[codes], out=np.ones_like(variance), where=known[codes])
    deviation = ((ratio - 1) ** 2).sum(1) / np.maximum(known[codes].sum(1), 1)
    by_sampling, by_spread = (1 - share) / df, 1 - 2 * share + squared_shares
    # The sd of a squared deviation is proportional to its expectation. A small tau^2 here lets the large populations
    # decide, where little but true spread is left; 0.01 predicted the variances of held-out cells best.
    precision = 1 / (0.01 + GAUSSIAN_EXCESS / df)
    if excess is None:
        design = np.column_stack([by_sampling, by_spread]) * precision[:, None]
        design = np.vstack([design, [1.0, 0.0]])
        target = np.append(deviation * precision, GAUSSIAN_EXCESS)
        k, tau2 = nnls(design, target)[0]
        return max(float(k), 1e-3), float(tau2)
    weights = precision * by_spread
    surplus = weights @ (deviation - excess * by_sampling)
    return excess, max(0.0, float(surplus / max(weights @ by_spread, 1e-12)))


def _blend(own: np.ndarray, value: np.ndarray, fallback: np.ndarray) -> np.ndarray:
    """own * value + (1 - own) * fallback along the first axis, with value ignored (may be nan) where own = 0."""
    own = own.reshape(-1, *[1] * (np.ndim(value) - 1))
    return own * np.where(own > 0, value, 0.0) + (1 - own) * fallback


def split_unique(
    variance: np.ndarray, scores_covariance: np.ndarray, scores: np.ndarray, loadings: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Factor covariances (P, L, L) and unique variances (P, D) with the given variances and score covariances.

    Both conditions, diag(B F B^T) + rest = variance and S^T (B F B^T + diag(rest)) S = scores_covariance with
    S^T B = I, are linear in (F, rest): (I - K*K) rest = variance - diag(B Z B^T), K = B S^T, * entrywise. One
    factorisation serves all populations. The unique variance that scores pick up is thereby taken out of F, which
    principal components would count as co-variation. Where that is impossible (negative variance) the nearest
    admissible values are taken; the diagonal of C_j may then exceed `variance`.
    """
    num_features, rank = loadings.shape
    outer = np.einsum("dl,dk->dlk", loadings, loadings).reshape(num_features, rank * rank)
    score_outer = np.einsum("dl,dk->dlk", scores, scores).reshape(num_features, rank * rank)
    missing = variance - scores_covariance.reshape(-1, rank * rank) @ outer.T
    # A feature that lies wholly in the span of the scores has a zero row here and nothing missing there.
    system = np.eye(num_features) * (1 + 1e-8) - (loadings @ scores.T) ** 2
    rest = np.clip(np.linalg.solve(system, missing.T).T, 0.0, variance)
    factor = scores_covariance - (rest @ score_outer).reshape(-1, rank, rank)
    values, vectors = np.linalg.eigh(factor)
    factor = (vectors * np.maximum(values, 0.0)[:, None, :]) @ vectors.transpose(0, 2, 1)
    rest = variance - factor.reshape(-1, rank * rank) @ outer.T
    return factor, np.maximum(rest, MIN_UNIQUE * variance)
