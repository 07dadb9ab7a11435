"""draft"""

import numpy as np
from scipy import sparse

TARGET_SUM = 1e4


def _clusters(rate, size_probability, rng):
    total = np.cumsum(rate, dtype=np.float64)
    number = rng.poisson(total[-1])
    where = np.searchsorted(total, np.sort(rng.random(number)) * total[-1], side="right")
    size = rng.logseries(size_probability[where])
    return np.repeat(where, size)


def draw_added(mean, y, shape, rise, rng):
    """mean (B,n) expected counts gene-major, y sparse (B,n) CSR or None -> flat positions of molecules (sorted)."""
    if shape is None:
        rate = (mean * rise[:, None]).ravel()
        total = np.cumsum(rate, dtype=np.float64)
        return np.searchsorted(total, np.sort(rng.random(rng.poisson(total[-1]))) * total[-1], side="right")
    odds = rise[:, None] * mean / (mean + shape[:, None])
    rate = shape[:, None] * np.log1p(odds)
    gene = np.repeat(np.arange(len(rise)), np.diff(y.indptr))
    rate[gene, y.indices] += y.data * np.log1p(odds[gene, y.indices])
    return _clusters(rate.ravel(), (odds / (1 + odds)).ravel(), rng)


class Molecules:
    """CSC-like entries with marked molecules."""

    def __init__(self, genes, cells, base, entry_of, marks, slots, n, G):
        self.gene, self.cell, self.base, self.marks, self.slots, self.n, self.G = genes, cells, base, marks, slots, n, G
        self.ptr = np.searchsorted(entry_of, np.arange(len(genes) + 1))

    def counts(self, thresholds):
        kept = np.zeros(len(self.marks) + 1, np.int64)
        np.cumsum(self.marks < thresholds[self.slots], out=kept[1:])
        return self.base + kept[self.ptr[1:]] - kept[self.ptr[:-1]]


def reveal(csc, state_mean, shape, down, rise_mult, rise_add, rng, block=64):
    n, G = csc.shape
    key = (np.repeat(np.arange(G, dtype=np.int64), np.diff(csc.indptr)) * n + csc.indices)
    keys, marks, slots = [], [], []
    y = csc.data.astype(np.int64)
    gene_of = np.repeat(np.arange(G), np.diff(csc.indptr))
    thin = down[gene_of]
    k = np.repeat(key[thin], y[thin])
    keys.append(k); marks.append(rng.random(len(k), dtype=np.float32)); slots.append((k // n).astype(np.int32))
    for kind, rise in enumerate((rise_mult, rise_add)):
        up = np.flatnonzero(rise > 0)
        for b in np.array_split(up, max(1, -(-len(up) // block))):
            if not len(b):
                continue
            sub = csc[:, b].T.tocsr()
            pos = draw_added(state_mean(b), sub, shape[b] if kind == 0 else None, rise[b], rng)
            g = b[pos // n]
            keys.append(g.astype(np.int64) * n + pos % n)
            u = rng.random(len(pos), dtype=np.float32)
            marks.append(u * rise[g] + (1 if kind == 0 else 0))
            slots.append((g + kind * G).astype(np.int32))
    keys, marks, slots = map(np.concatenate, (keys, marks, slots))
    allkeys = np.union1d(key, keys)
    base = np.zeros(len(allkeys), np.int64)
    base[np.searchsorted(allkeys, key[~thin])] = y[~thin]
    o = np.argsort(keys, kind="stable")
    keys, marks, slots = keys[o], marks[o], slots[o]
    return Molecules(allkeys // n, allkeys % n, base, np.searchsorted(allkeys, keys), marks, slots, n, G)


def transport(counts, library, target_mean, ratio, rng, mean=None, shape=None, target_sd=None, share=None, evals=40, rounds=5, log=None):
    """mean: (n,G) expected counts; share: initial additive share (G,)."""
    n, G = counts.shape
    csc = sparse.csc_matrix(counts)
    rest = ratio * (library - np.asarray(counts.sum(1)).ravel())
    rest[np.abs(rest) < 1e-6] = 0
    v0 = csc.copy().astype(float); v0.data = np.log1p(TARGET_SUM * v0.data / library[v0.indices])
    m0 = np.asarray(v0.mean(0)).ravel()
    t = np.maximum(target_mean, 0)
    jump = np.log1p(TARGET_SUM / np.median(library)) / n
    tiny = .5 * jump
    r1 = t / np.maximum(m0, tiny); r2 = np.expm1(t) / np.expm1(np.maximum(m0, tiny))
    lo = np.minimum(r1, r2) * min(ratio,1) * .8; hi = np.maximum(r1, r2) * max(ratio,1) * 1.25
    g = np.sqrt(np.maximum(r1 * r2, 1e-12)) * ratio
    a = np.zeros(G) if share is None else share.copy()
    solve_sd = np.zeros(G, bool) if target_sd is None else (g > 1.3)
    alo, ahi = np.zeros(G), np.ones(G)
    nev = 0
    for rnd in range(rounds):
        rise = np.maximum(hi - 1, 0)
        if solve_sd.any(): rm, ra = np.where((a<1)|solve_sd, rise, 0), np.where((a>0)|solve_sd, rise, 0)
        else: rm, ra = np.maximum((1-a)*rise,0), np.maximum(a*rise,0)
        mol = reveal(csc, lambda b: mean[:, b].T, shape, lo < 1, rm, ra, rng)
        if log is not None: log.setdefault('molecules',[]).append(len(mol.marks)/n)
        for it in range(evals if rnd==0 else 8):
            thr = np.concatenate([np.where(g > 1, 1 + (1 - a) * (g - 1), g), np.maximum(a * (g - 1), 0)])
            y = mol.counts(thr.astype(np.float32)); nev+=1
            L = rest + np.bincount(mol.cell, y, minlength=n)
            s = TARGET_SUM / np.maximum(L, 1e-9)
            v = np.log1p(y * s[mol.cell])
            m = np.bincount(mol.gene, v, minlength=G) / n
            slope = np.bincount(mol.gene, np.where(y == 1, v, np.where(y > 0, 1.25, 0)), minlength=G) / n
            q = np.bincount(mol.gene, v * v, minlength=G) / n
            sd = np.sqrt(np.maximum(q - m * m, 0) * n / (n - 1))
            err = t - m
            tol = np.maximum(.02 * sd / np.sqrt(n), .6 * jump)
            bad = np.abs(err) > tol
            stuck = ((g <= lo) & (err < -tol)) | ((g >= hi) & (err > tol))
            if log is not None: log.setdefault('bad',[]).append((rnd,int(bad.sum()),int(stuck.sum())))
            if rnd==0 and solve_sd.any() and it % 3 == 2 and it < 24:
                up = sd > target_sd
                alo = np.where(up, a, alo); ahi = np.where(up, ahi, a)
                a = np.where(solve_sd, np.where(up, (a + ahi) / 2, (alo + a) / 2), a)
            elif (bad == stuck).all() and (not solve_sd.any() or it >= 24 or rnd>0):
                break
            g = np.where(bad, np.clip(g * np.exp(np.clip(err / np.maximum(slope, jump), -1, 1)), lo, hi), g)
        if rnd>0 and not bad.any(): break
        wid = np.where(bad, 1.3, 1.08)
        lo, hi = np.where(stuck & (err<0), g/4, g/wid), np.where(stuck&(err>0), g*4, g*wid)
        solve_sd = np.zeros(G,bool)
    if log is not None: log |= dict(err=np.abs(err).max(), z=(np.abs(err)/np.maximum(sd/np.sqrt(n),jump)).max(), a=a, g=g, it=nev,sd=sd)
    out = sparse.csc_matrix((y.astype(np.float32), mol.cell, np.searchsorted(mol.gene, np.arange(G + 1))), shape=(n, G)).tocsr()
    out.eliminate_zeros()
    return out, L
