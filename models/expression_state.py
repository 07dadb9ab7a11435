"""What the counts of a cell say about its rates: size factor x low-rank cell state x a gamma factor per gene.

The program (counts y of cell i, gene g; library size L_i):

    w_ik ~ Gamma(a, a / (L_i s_k))              weight of expression program k in the cell, around its share s_k
    e_ig ~ Gamma(r_g, r_g)                      what is left, gene by gene
    y_ig ~ Poisson(e_ig sum_k w_ik h_kg)

Given y the weights and the gene factors are gamma variables again, so rates can be *drawn*; a posterior mean would
shrink the spread between cells. Fitted by the updates of Poisson factorisation (Cemgil 2009, Comput. Intell. Neurosci. 785152;
Gopalan, Hofman and Blei 2015, UAI) with the programs shrunk towards the population's mean profile.
"""

from dataclasses import dataclass

import numpy as np
from scipy import sparse

PRIOR_WEIGHT = 2.0
PROFILE_COUNT = 50.0


@dataclass(frozen=True, eq=False)
class ExpressionState:
    weight_shape: np.ndarray  # (n,K)
    weight_rate: np.ndarray  # (n,K)
    programs: np.ndarray  # (K,G)
    shape: np.ndarray  # (G,)

    def draw_weights(self, rng):
        return rng.gamma(self.weight_shape) / self.weight_rate

    def mean_rates(self):
        return (self.weight_shape / self.weight_rate) @ self.programs


def fit_expression_state(counts, library_size, num_programs=5, num_steps=40, prior_shape=2.0, weight=10.0):
    y = sparse.csr_matrix(counts, dtype=np.float64)
    n, G = y.shape
    L = np.maximum(library_size, 1e-12)
    h = (np.asarray(y.sum(0)).ravel() + 0.5) / L.sum()
    tot = np.asarray(y.sum(1)).ravel()
    K = num_programs
    rows = np.repeat(np.arange(n), np.diff(y.indptr)); cols = y.indices
    if K == 1:
        W_shape = np.full((n, 1), 1e8); W_rate = 1e8 / L[:, None]; H = h[None]
    else:
        S = np.full(K, 1 / K)
        # start: cells ordered along leading principal components of the residuals
        R = y.copy(); R.data = np.sqrt(R.data); R = sparse.diags_array(1 / np.sqrt(L)) @ R
        R = np.asarray(R.todense()) if False else R.toarray() ; R = R - R.mean(0); 
        u, s, vt = np.linalg.svd(R, full_matrices=False)
        sc = u[:, : K - 1] * np.sign(vt[: K - 1].sum(1)); sc = sc / np.maximum(sc.std(0), 1e-12)
        logits = np.column_stack([np.zeros(n), sc]); Z = np.exp(1.0 * logits); Z /= Z.sum(1, keepdims=True)
        W = Z * L[:, None]
        Hn = np.asarray((y.T @ (W / L[:, None])).T) + PROFILE_COUNT * h / h.sum()
        H = Hn / Hn.sum(1, keepdims=True) * h.sum()
        for _ in range(num_steps):
            mu = np.einsum("ek,ek->e", W[rows], H[:, cols].T)
            Q = sparse.csr_matrix((y.data / mu, y.indices, y.indptr), shape=y.shape)
            A = W * (Q @ H.T)  # expected molecules per program
            S = W.sum(0) / W.sum()
            Wsh = PRIOR_WEIGHT + A; Wr = PRIOR_WEIGHT / (L[:, None] * S * 1) + H.sum(1)
            Hn = H * (Q.T @ W).T + PROFILE_COUNT * h / h.sum()
            W = Wsh / Wr
            # gene totals: mean profile kept
            H = Hn / (W.sum(0)[:, None] + PROFILE_COUNT / h.sum())
        W_shape, W_rate = Wsh, Wr
        m = (W_shape / W_rate) @ H
        H = H * ((h * L.sum()) / np.maximum(m.sum(0), 1e-12))
    m = (W_shape / W_rate) @ H
    resid = y.toarray() - m
    num = np.square(m).sum(0)
    den = (np.square(resid) - m).sum(0)
    base = weight * (h * L.mean()) ** 2
    phi = (np.maximum(den, 0) + base / prior_shape) / (num + base)
    return ExpressionState(W_shape, W_rate, H, 1 / phi)
