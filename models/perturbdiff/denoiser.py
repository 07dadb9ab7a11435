"""The denoiser: from a noised cell set, its controls and a condition to the clean cells.

    x = affine[X_t, X~_0] + v,   y = affine'[Y, 0] + v              tokens of both streams, v one learned vector
    c = timestep(t) + class(cov) [+ affine(u)]                       condition
    x, y <- blocks(x, y, c);     X^_0 = ReLU(head(x, c))

u, a microenvironment shared by the cells of a set, is an option that the published network has not. X~_0 is an
earlier estimate (self-conditioning), Y the control cells, never noised. Shapes: B sets, S cells, G genes,
H hidden width. Values are in model units: log1p of normalised counts divided by 10.
"""

from typing import ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from hilbertcell.models.perturbdiff import layers
from hilbertcell.models.perturbdiff.blocks import Block, Head, init_block, init_head
from hilbertcell.models.perturbdiff.layers import Affine, QKNorm

_LONGEST_PERIOD = 10_000.0  # of the timestep features, in units of 2 pi steps


class Timestep(eqx.Module):
    """Sinusoidal features of the integer step, then affine, SiLU, affine."""

    OFFICIAL: ClassVar[dict[str, str]] = {"first": "mlp.0", "second": "mlp.2"}

    first: Affine  # F -> H, F = 256
    second: Affine  # H -> H

    def features(self, t: Array) -> Array:
        """Cosines, then sines, of t at F/2 geometric frequencies from 1 down; (B,) -> (B, F)."""
        half = self.first.weight.shape[1] // 2
        dtype = jnp.promote_types(
            self.first.weight.dtype, jnp.float32
        )  # bfloat16 cannot tell t = 997 from 998
        # The exponent is rounded to float32 because checkpoints saw it so: at t = 999 it moves an angle by 5e-5.
        exponent = np.float32(-np.log(_LONGEST_PERIOD)) * np.arange(half, dtype=np.float32) / np.float32(half)
        angle = t.astype(dtype)[:, None] * jnp.asarray(np.exp(exponent.astype(np.float64)), dtype)
        return jnp.concatenate([jnp.cos(angle), jnp.sin(angle)], axis=-1)

    def __call__(self, t: Array) -> Array:
        """(B,) -> (B, H)."""
        features = self.features(t).astype(self.first.weight.dtype)
        return self.second(jax.nn.silu(self.first(features)))


class UnusedNorm(eqx.Module):
    """Weight and bias of a layer norm that the published default configuration stores and never applies."""

    OFFICIAL: ClassVar[dict[str, str]] = {"weight": "weight", "bias": "bias"}

    weight: Array  # (H,)
    bias: Array  # (H,)


class Denoiser(eqx.Module):
    """f(X_t, X~_0, Y, t, cov) -> X^_0; equivariant under joint permutations of (target, control) pairs."""

    OFFICIAL: ClassVar[dict[str, str]] = {
        "embed": "x_embedder",
        "embed_control": "x_control_embedder",
        "timestep": "t_embedder",
        "gene_map": "gene_embedding.gene_embedding",
        "token_vector": "gene_embedding.null_emb.weight",
        "gene_norm": "gene_embedding.layer_norm",
        "class_map": "class_embedding.emb",
        "null_class": "class_embedding.null_emb.weight",
        "blocks": "blocks",
        "head": "final_layer",
        "control_head": "control_final_layer",
        "microenvironment": "microenvironment_embedding",
    }

    embed: Affine | dict[str, Affine]  # 2G -> H; one per data source when there are several
    embed_control: Affine | dict[str, Affine]
    timestep: Timestep
    gene_map: Affine | None  # 5,120 -> H, never applied
    token_vector: Array  # (1, H) added to every token of both streams
    gene_norm: UnusedNorm
    class_map: Affine  # covariate width -> H
    null_class: Array  # (1, H) class vector where covariates are absent
    blocks: tuple[Block, ...]
    head: Head
    control_head: Head  # trained by nothing
    microenvironment: Affine | None  # K -> H; not published
    class_silu: bool = eqx.field(static=True)  # one SiLU on the condition

    @property
    def num_genes(self) -> int:
        """G."""
        return self.head.linear.weight.shape[0]

    @property
    def sources(self) -> tuple[str, ...]:
        """Names of the data sources that have their own embedders, sorted; empty when all share one."""
        return tuple(sorted(self.embed)) if isinstance(self.embed, dict) else ()

    @property
    def num_factors(self) -> int:
        """K, the length of the microenvironment that every set comes with; 0 for the published network."""
        return 0 if self.microenvironment is None else self.microenvironment.weight.shape[1]

    def condition(
        self, t: Array, covariates: Array | None, keep: Array | None = None, u: Array | None = None
    ) -> Array:
        """Timestep vector plus class vector, plus what the microenvironment says.

        Args:
            t: (B,) steps.
            covariates: (B, S, width), or (B, 1, width) when the cells of a set share them, or None: absent.
            keep: (B,) bool, where False the set's covariates are replaced by the null class; None keeps all.
            u: (B, K) microenvironment of each set; never dropped.

        Returns:
            (B, S, H), or (B, 1, H) when no cell differs from its set.
        """
        if covariates is None:
            classes = self.null_class[None]
        else:
            classes = self.class_map(jax.nn.silu(covariates.astype(self.null_class.dtype)))
            if keep is not None:
                classes = jnp.where(keep[:, None, None], classes, self.null_class)
        condition = self.timestep(t)[:, None, :] + classes
        if self.microenvironment is not None:
            assert u is not None  # see _check
            condition = condition + self.microenvironment(u.astype(self.null_class.dtype))[:, None, :]
        return jax.nn.silu(condition) if self.class_silu else condition

    def streams(
        self, target: Array, control: Array, c: Array, source: Array | None = None
    ) -> tuple[Array, Array]:
        """Tokens of both streams after the last block, each (B, S, H).

        Args:
            target: (B, S, 2G), the noised cells joined with the self-conditioning estimate.
            control: (B, S, 2G), or (B, S, G) when the second half is zero.
            c: (B, S, H) or (B, 1, H), from `condition`.
            source: (B,) index into `sources`, or None when there are no separate embedders.
        """
        dtype = self.null_class.dtype
        x = self._embed(self.embed, target.astype(dtype), source) + self.token_vector
        y = self._embed(self.embed_control, control.astype(dtype), source) + self.token_vector
        for block in self.blocks:
            x, y = jax.vmap(block)(x, y, c)
        return x, y

    def __call__(
        self,
        x_t: Array,
        previous_x0: Array,
        control: Array,
        t: Array,
        covariates: Array | None,
        *,
        keep: Array | None = None,
        source: Array | None = None,
        u: Array | None = None,
    ) -> Array:
        """Estimate the clean cells.

        Args:
            x_t: (B, S, G) noised cells, model units.
            previous_x0: (B, S, G) earlier estimate of the clean cells, zeros for none.
            control: (B, S, G) control cells; row i is the partner of row i of `x_t`.
            t: (B,) integer steps, 0..T-1.
            covariates: (B, S, width) or (B, 1, width) from the covariate encoder, or None: unconditional.
            keep: (B,) bool, sets whose covariates are used; None uses all.
            source: (B,) index into `sources`; needed exactly when the denoiser has several.
            u: (B, K) microenvironments; needed exactly when the denoiser has `num_factors`.

        Returns:
            (B, S, G) estimate of the clean cells, >= 0.

        Raises:
            ValueError: naming the argument whose shape does not fit.
        """
        self._check(x_t, previous_x0, control, t, covariates, source, u)
        c = self.condition(t, covariates, keep, u)
        x, _ = self.streams(jnp.concatenate([x_t, previous_x0], axis=-1), control, c, source)
        return jax.vmap(self.head)(x, c)

    def _embed(self, embed: Affine | dict[str, Affine], inputs: Array, source: Array | None) -> Array:
        if isinstance(embed, Affine):
            return embed(inputs)
        if source is None:
            raise ValueError(
                f"source: this denoiser has one embedder for each of {', '.join(self.sources)}; say which"
            )
        # Every map on every set, then a selection: dense products, and few sources. NaN for an unknown source.
        every = jnp.stack([embed[name](inputs) for name in self.sources], axis=1)
        one = every.at[jnp.arange(len(inputs)), source]
        return one.get(mode="fill", fill_value=jnp.nan, wrap_negative_indices=False)

    def _check(self, x_t, previous_x0, control, t, covariates, source, u) -> None:
        expected = (*x_t.shape[:2], self.num_genes)
        given = {"x_t": x_t, "previous_x0": previous_x0, "control": control}
        wrong = [
            f"{name} has shape {x.shape}, expected {expected}"
            for name, x in given.items()
            if x.shape != expected
        ]
        if t.shape != x_t.shape[:1]:
            wrong.append(f"t has shape {t.shape}, expected {x_t.shape[:1]}, one step per set")
        width = self.class_map.weight.shape[1]
        if covariates is not None and covariates.shape not in {(*x_t.shape[:2], width), (len(x_t), 1, width)}:
            wrong.append(f"covariates have shape {covariates.shape}, expected {(*x_t.shape[:2], width)}")
        if source is not None and not self.sources:
            wrong.append("source was given, but all sources share one embedder")
        if (() if u is None else u.shape) != ((len(x_t), self.num_factors) if self.num_factors else ()):
            wrong.append(
                f"u has shape {None if u is None else u.shape}, this denoiser has {self.num_factors} factors"
            )
        if wrong:
            raise ValueError("; ".join(wrong))


def init_denoiser(
    key: Array,
    num_genes: int,
    *,
    hidden: int = 512,
    depth: int = 8,
    num_heads: int = 8,
    covariate_width: int | None = None,
    num_timestep_features: int = 256,
    gene_features: int = 5120,
    sources: tuple[str, ...] = (),
    num_factors: int = 0,
    class_silu: bool = False,
    norm: QKNorm = "mean_square",
) -> Denoiser:
    """A new denoiser with the published initialisation.

    Xavier weights and zero biases; timestep MLP and the unused gene map N(0, 0.02^2); modulations zero; learned
    vectors N(0, 1).

    Args:
        key: random key.
        num_genes: G.
        hidden: H.
        depth: number of blocks.
        num_heads: attention heads; they share the joint width 2H.
        covariate_width: width of the covariate encoding; G when None, as published.
        num_timestep_features: F, even.
        gene_features: input width of the gene map that is stored and never applied; 0 leaves it out.
        sources: names of data sources with embedders of their own; empty for one shared pair.
        num_factors: K, length of the microenvironment that sets come with; 0 as published.
        class_silu: apply one SiLU to the condition.
        norm: form of the query/key normalisation, see `layers.qk_norm`.

    Raises:
        ValueError: if the heads do not divide 2H.
    """
    if 2 * hidden % num_heads:
        raise ValueError(f"num_heads = {num_heads} does not divide the joint width 2 * hidden = {2 * hidden}")
    keys = iter(jax.random.split(key, depth + 2 * max(1, len(sources)) + 8))

    def embedders() -> Affine | dict[str, Affine]:
        if not sources:
            return layers.xavier(next(keys), hidden, 2 * num_genes)
        return {source: layers.xavier(next(keys), hidden, 2 * num_genes) for source in sources}

    return Denoiser(
        embed=embedders(),
        embed_control=embedders(),
        timestep=Timestep(
            layers.normal(next(keys), hidden, num_timestep_features),
            layers.normal(next(keys), hidden, hidden),
        ),
        gene_map=layers.normal(next(keys), hidden, gene_features) if gene_features else None,
        token_vector=layers.gaussian(next(keys), 1, hidden),
        gene_norm=UnusedNorm(layers.constant(1, hidden), layers.constant(0, hidden)),
        class_map=layers.xavier(next(keys), hidden, covariate_width or num_genes),
        null_class=layers.gaussian(next(keys), 1, hidden),
        blocks=tuple(init_block(next(keys), hidden, num_heads, norm) for _ in range(depth)),
        head=init_head(next(keys), num_genes, hidden),
        control_head=init_head(next(keys), num_genes, hidden),
        microenvironment=layers.zeros(hidden, num_factors) if num_factors else None,
        class_silu=class_silu,
    )


def source_index(denoiser: Denoiser, dataset: str) -> int:
    """Index of the one source whose name occurs in a data set's name, whatever the case (published rule).

    Raises:
        ValueError: if no source, or more than one, matches.
    """
    matches = [i for i, source in enumerate(denoiser.sources) if source.lower() in dataset.lower()]
    if len(matches) != 1:
        raise ValueError(
            f"data set {dataset!r} matches {len(matches)} of the sources {', '.join(denoiser.sources) or '(none)'}; "
            "its name must contain exactly one of them"
        )
    return matches[0]
