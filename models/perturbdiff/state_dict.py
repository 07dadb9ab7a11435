"""Official parameter names to this package's modules and back.

Every module class carries its own piece of the map from our field names to the published ones (`OFFICIAL`); the name
of an array is its path through them, below `model.` for the denoiser and `cov_encoder.` for the covariate encoder.
Sizes are read off the shapes, never off stored settings, which need not agree with the tensors.
"""

from collections.abc import Callable, Mapping

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from hilbertcell.models.perturbdiff.covariates import CovariateEncoder, GivenTable, LearnedTable
from hilbertcell.models.perturbdiff.denoiser import Denoiser, init_denoiser
from hilbertcell.models.perturbdiff.layers import Affine, QKNorm

DENOISER_PREFIX = "model."
ENCODER_PREFIX = "cov_encoder."

State = Mapping[str, np.ndarray]


class StateDictError(ValueError):
    """A mapping of parameters that does not describe a network; the message lists every misfit."""


def from_state_dict(
    state: State,
    *,
    num_heads: int,
    class_silu: bool = False,
    norm: QKNorm = "mean_square",
    perturbation_offset: int | None = None,
) -> tuple[Denoiser, CovariateEncoder | None]:
    """Build the networks that hold the given parameters.

    Args:
        state: official names to float32 arrays in the layout of the checkpoints (weights are (out, in)). Denoiser
            names may come with or without `model.`. The gene map that is never applied may be absent.
        num_heads: attention heads; checked against the width of a head.
        class_silu: the checkpoint was trained with `use_class_silu`; no array says so.
        norm: "variance" for a checkpoint trained with timm before 1.0.13; no array says so.
        perturbation_offset: row of perturbation id 0. By default 1 for a one-hot table and 0 for a given table
            (gene embeddings); a given table of protein embeddings (`esm2`) needs 1, and no array says so.

    Returns:
        The denoiser, and the covariate encoder or None if there are no `cov_encoder.` names.

    Raises:
        StateDictError: listing all missing, unknown, misshaped, wrongly typed and non-finite entries.
    """
    encoder_state = {
        k.removeprefix(ENCODER_PREFIX): v for k, v in state.items() if k.startswith(ENCODER_PREFIX)
    }
    network_state = {
        k.removeprefix(DENOISER_PREFIX): v for k, v in state.items() if not k.startswith(ENCODER_PREFIX)
    }
    denoiser = _fill(
        _denoiser_skeleton(network_state, num_heads, class_silu, norm), network_state, DENOISER_PREFIX
    )
    if not encoder_state:
        return denoiser, None
    encoder = covariate_encoder_from_state(encoder_state, perturbation_offset=perturbation_offset)
    width, expected = encoder.transform.weight.shape[0], denoiser.class_map.weight.shape[1]
    if width != expected:
        raise StateDictError(
            f"cov_encoder.transform gives {width} values, model.class_embedding takes {expected}"
        )
    return denoiser, encoder


def covariate_encoder_from_state(state: State, *, perturbation_offset: int | None = None) -> CovariateEncoder:
    """Build a covariate encoder from its own names (without `cov_encoder.`); see `from_state_dict`."""
    return _fill(_encoder_skeleton(state, perturbation_offset), state, ENCODER_PREFIX)


def to_state_dict(denoiser: Denoiser, encoder: CovariateEncoder | None = None) -> dict[str, np.ndarray]:
    """The inverse of `from_state_dict`, bit for bit; stored dose ranks come back as int32."""
    return {name: np.asarray(array) for name, array in named_arrays(denoiser, encoder).items()}


def named_arrays(denoiser: Denoiser, encoder: CovariateEncoder | None = None) -> dict[str, Array]:
    """Arrays by official name, prefixes included; also of traced or abstract networks."""
    return {
        prefix + _official_name(module, path): leaf
        for prefix, module in ((DENOISER_PREFIX, denoiser), (ENCODER_PREFIX, encoder))
        for path, leaf in jax.tree_util.tree_leaves_with_path(module)
    }


def with_arrays[Encoder: CovariateEncoder | None](
    denoiser: Denoiser, encoder: Encoder, arrays: Mapping[str, Array]
) -> tuple[Denoiser, Encoder]:
    """The networks with the named arrays in place of their own."""

    def replace(prefix: str, module):
        def pick(path, leaf: Array) -> Array:
            return arrays.get(prefix + _official_name(module, path), leaf)

        return jax.tree_util.tree_map_with_path(pick, module)

    return replace(DENOISER_PREFIX, denoiser), replace(ENCODER_PREFIX, encoder)


def _official_name(module: eqx.Module, path: tuple) -> str:
    """Published dotted name of the leaf at a pytree path."""
    parts, node = [], module
    for key in path:
        if isinstance(key, jax.tree_util.GetAttrKey):
            parts.append(node.OFFICIAL[key.name])
            node = getattr(node, key.name)
        else:
            step = key.idx if isinstance(key, jax.tree_util.SequenceKey) else key.key
            parts.append(str(step))
            node = node[step]
    return ".".join(parts)


def _fill[Module: eqx.Module](skeleton: Module, state: State, prefix: str) -> Module:
    """Put the arrays of `state` into a tree of shapes, or list what does not fit."""
    problems, used = [], set()

    def take(path, leaf: jax.ShapeDtypeStruct):
        name = _official_name(skeleton, path)
        used.add(name)
        if name not in state:
            problems.append(f"{prefix}{name}: missing, shape {leaf.shape} expected")
            return leaf
        value = np.asarray(state[name])
        integer = jnp.issubdtype(leaf.dtype, jnp.integer)
        if value.shape != leaf.shape:
            problems.append(f"{prefix}{name}: shape {value.shape}, expected {leaf.shape}")
        elif not (np.issubdtype(value.dtype, np.integer) if integer else value.dtype == np.float32):
            problems.append(
                f"{prefix}{name}: {value.dtype}, expected {'an integer type' if integer else 'float32'}"
            )
        elif not np.isfinite(value).all():
            problems.append(f"{prefix}{name}: {np.sum(~np.isfinite(value))} values are not finite")
        else:
            return jnp.asarray(value, leaf.dtype)
        return leaf

    filled = jax.tree_util.tree_map_with_path(take, skeleton)
    problems += [f"{prefix}{name}: unknown to this network" for name in sorted(set(state) - used)]
    if problems:
        raise StateDictError("these parameters do not fit:\n  " + "\n  ".join(problems))
    return filled


def _denoiser_skeleton(state: State, num_heads: int, class_silu: bool, norm: QKNorm) -> Denoiser:
    """Shapes of a denoiser whose sizes are those of `state`."""
    shape = _shape_reader(state, DENOISER_PREFIX)
    num_genes, hidden = shape("final_layer.linear.weight", 2)
    head_width = shape("blocks.0.block.attn.q_norm.weight", 1)[0]
    if head_width * num_heads != 2 * hidden:
        raise StateDictError(
            f"num_heads = {num_heads} was given, but the joint width {2 * hidden} and the head width {head_width} "
            f"say {2 * hidden / head_width:g}"
        )
    gene_map = "gene_embedding.gene_embedding.weight"
    factors = "microenvironment_embedding.weight"
    return eqx.filter_eval_shape(
        init_denoiser,
        jax.random.key(0),
        num_genes,
        hidden=hidden,
        depth=len({name.split(".")[1] for name in state if name.startswith("blocks.")}),
        num_heads=num_heads,
        covariate_width=shape("class_embedding.emb.weight", 2)[1],
        num_timestep_features=shape("t_embedder.mlp.0.weight", 2)[1],
        gene_features=shape(gene_map, 2)[1] if gene_map in state else 0,
        sources=tuple(
            sorted({n.split(".")[1] for n in state if n.startswith("x_embedder.") and n.count(".") == 2})
        ),
        num_factors=shape(factors, 2)[1] if factors in state else 0,
        class_silu=class_silu,
        norm=norm,
    )


def _encoder_skeleton(state: State, perturbation_offset: int | None) -> CovariateEncoder:
    """Shapes of a covariate encoder whose branches and sizes are those of `state`."""
    shape = _shape_reader(state, ENCODER_PREFIX)
    output_width, input_width = shape("transform.weight", 2)

    def array(*sizes: int, dtype=jnp.float32) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(sizes, dtype)

    def affine(name: str) -> Affine:
        num_out, num_in = shape(f"{name}.weight", 2)
        return Affine(array(num_out, num_in), array(num_out))

    def given(name: str, offset: int) -> GivenTable:
        return GivenTable(array(*shape(f"{name}.0.weight", 2)), affine(f"{name}.1"), offset)

    def table(name: str, learned_offset: int, given_offset: int) -> LearnedTable | GivenTable:
        if f"{name}.0.weight" in state:
            return given(name, given_offset)
        return LearnedTable(array(*shape(f"{name}.weight", 2)), learned_offset)

    drug = "drug_encoder.0.weight" in state
    dose = "dose_encoder.weight" in state
    offsets = (1, 0) if perturbation_offset is None else (perturbation_offset, perturbation_offset)
    cell_type = table("celltype_encoder", 0, 0)
    batch = table("batch_encoder", 0, 0) if "batch_encoder.weight" in state else None
    perturbation = None if drug else table("pert_encoder", *offsets)
    skeleton = CovariateEncoder(
        perturbation=perturbation,
        drug=given("drug_encoder", offsets[1]) if drug else None,
        dose=table("dose_encoder", 0, 0) if dose else None,
        dose_rank=array(*shape("dose_indices", 1), dtype=jnp.int32) if dose else None,
        cell_type=cell_type,
        batch=batch,
        transform=Affine(array(output_width, input_width), array(output_width)),
    )
    branches = (skeleton.perturbation, skeleton.drug, skeleton.dose, cell_type, batch)
    widths = [
        branch.affine.weight.shape[0] if isinstance(branch, GivenTable) else branch.table.shape[1]
        for branch in branches
        if branch is not None
    ]
    if sum(widths) != input_width:
        raise StateDictError(
            f"{ENCODER_PREFIX}transform.weight takes {input_width} values, the branches give {' + '.join(map(str, widths))}"
        )
    return skeleton


def _shape_reader(state: State, prefix: str) -> Callable[[str, int], tuple[int, ...]]:
    """A look-up of shapes that fails by name."""

    def shape(name: str, rank: int) -> tuple[int, ...]:
        if name not in state:
            raise StateDictError(f"{prefix}{name}: missing; the sizes of the network are read off it")
        found = np.shape(state[name])
        if len(found) != rank:
            raise StateDictError(f"{prefix}{name}: shape {found}, expected {rank} axes")
        return found

    return shape
