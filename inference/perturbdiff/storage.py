"""PerturbDiff fits as folders: official names in safetensors, the rest as JSON; and published checkpoints to and from."""

import json
import os
import shutil
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from hilbertcell.data.populations import Keys
from hilbertcell.inference.perturbdiff.cell_sets import Expression
from hilbertcell.inference.perturbdiff.fit import PerturbDiffFit
from hilbertcell.inference.perturbdiff.settings import PerturbDiffSettings
from hilbertcell.inference.perturbdiff.torch_archive import CheckpointError
from hilbertcell.inference.perturbdiff.torch_checkpoint import (
    TorchCheckpoint,
    read_checkpoint,
    write_checkpoint,
)
from hilbertcell.inference.perturbdiff.training_run import Networks
from hilbertcell.inference.perturbdiff.vocabulary import Vocabulary
from hilbertcell.models.perturbdiff import StateDictError, from_state_dict, to_state_dict

FORMAT = 2
MODEL = "perturbdiff"
_PACKAGES = ("hilbertcell", "jax", "equinox", "numpy")
_HEAD = "blocks.0.block.attn.q_norm.weight"


def is_perturbdiff(path: Path) -> bool:
    """Whether a folder is a fit of this model."""
    try:
        return json.loads((path / "manifest.json").read_text()).get("model") == MODEL
    except (OSError, ValueError, AttributeError):
        return False


def save_fit(fit: PerturbDiffFit, path: Path, *, force: bool = False) -> None:
    """Write a fit as the folder `path`, complete or not at all.

    Raises:
        FileExistsError: `path` exists and `force` is not set, or it is not a fit, which is never replaced.
    """
    if path.exists() and not force:
        raise FileExistsError(f"{path} exists; choose another folder or force its replacement")
    if path.exists() and not (path / "manifest.json").exists():
        raise FileExistsError(f"{path} exists and is not a fit; choose another folder")
    arrays = {"lowest": fit.unit.lowest, "losses": fit.losses}
    arrays |= {f"state.{name}": value for name, value in to_state_dict(*fit.networks).items()}
    if fit.current is not None:
        arrays |= {f"current.{name}": value for name, value in to_state_dict(*fit.current).items()}
    manifest = {
        "format": FORMAT,
        "model": MODEL,
        "versions": {package: version(package) for package in _PACKAGES},
        "keys": None if fit.keys is None else fit.keys.to_dict(),
        "genes": None if fit.genes is None else fit.genes.astype(str).tolist(),
        "vocabulary": fit.vocabulary.to_dict(),
        "settings": fit.settings.model_dump(),
        "options": _options(fit.networks),
        "seed": fit.seed,
        "split_hash": fit.split_hash,
        "held_out": list(fit.held_out),
        "origin": fit.origin,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as scratch:
        folder = Path(scratch) / "fit"
        folder.mkdir()
        save_file({n: np.ascontiguousarray(a) for n, a in arrays.items()}, folder / "arrays.safetensors")
        (folder / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n")
        for file in folder.iterdir():
            shutil.copymode(folder / "manifest.json", file)  # safetensors writes for the owner alone
            with file.open("rb") as handle:
                os.fsync(handle.fileno())
        if path.exists():
            shutil.rmtree(path)
        folder.rename(path)


def load_perturbdiff(path: str | Path) -> PerturbDiffFit:
    """Read a fit that `save_fit` wrote.

    Raises:
        ValueError: the folder is not a fit of this model, is incomplete or damaged, or has another format.
    """
    path = Path(path)
    try:
        manifest = json.loads((path / "manifest.json").read_text())
        arrays = load_file(path / "arrays.safetensors")
    except (OSError, json.JSONDecodeError, SafetensorError) as error:
        raise ValueError(
            f"{path} is not a complete fit ({error}); make one with `hilbertcell fit --model perturbdiff`"
        ) from None
    if manifest.get("model") != MODEL or manifest.get("format") != FORMAT:
        raise ValueError(
            f"{path} holds {manifest.get('model')!r} in format {manifest.get('format')}, expected {MODEL!r} in {FORMAT}"
        )
    current = _under(arrays, "current.")
    options = manifest["options"]
    return PerturbDiffFit(
        networks=_networks(_under(arrays, "state."), **options),
        current=_networks(current, **options) if current else None,
        keys=None if manifest["keys"] is None else Keys.from_dict(manifest["keys"]),
        genes=None if manifest["genes"] is None else np.array(manifest["genes"], dtype=str),
        vocabulary=Vocabulary(**manifest["vocabulary"]),
        unit=Expression(arrays["lowest"]),
        settings=PerturbDiffSettings(**manifest["settings"]),
        seed=manifest["seed"],
        split_hash=manifest["split_hash"],
        held_out=tuple(manifest["held_out"]),
        losses=arrays["losses"],
        origin=manifest["origin"],
    )


def from_torch(
    path: Path,
    *,
    keys: Keys | None = None,
    genes: np.ndarray | None = None,
    prefix: str = "",
    settings: PerturbDiffSettings | None = None,
    **options: Any,
) -> PerturbDiffFit:
    """Read a published torch checkpoint as a fit.

    Args:
        path: the file.
        keys: what the columns of files to predict for mean.
        genes: (G,) names in the order of the checkpoint's training data, which it does not hold.
        prefix: stands before batch names in its label map: the data set's name and an underscore.
        settings: set size and sampler; the sizes of the network are read off its arrays.
        options: `class_silu`, `norm`, `perturbation_offset` of `from_state_dict`: what no array says.

    Raises:
        CheckpointError: the file is refused; StateDictError: listing the arrays that do not fit.
    """
    checkpoint = read_checkpoint(path)
    networks = _networks(checkpoint.state, **options)
    denoiser, encoder = networks
    if genes is not None and len(genes) != denoiser.num_genes:
        raise CheckpointError(
            f"genes = {len(genes)} names: {path} has {denoiser.num_genes} genes; give those"
        )
    maps = {kind: checkpoint.labels(kind) or {} for kind in ("pert", "cell_type", "batch")}
    main = encoder.perturbation if encoder.drug is None else encoder.drug
    assert main is not None
    rows = {
        "pert": len(main.table) - main.offset,
        "cell_type": len(encoder.cell_type.table),
        "batch": 0 if encoder.batch is None else len(encoder.batch.table),
    }
    for kind, found in maps.items():
        if len(found) > rows[kind] and kind != "batch":
            raise CheckpointError(
                f"{path}: {kind}_dict has {len(found)} labels, the network {rows[kind]} rows"
            )
    settings = settings or PerturbDiffSettings()
    sizes = {
        "hidden": denoiser.null_class.shape[1],
        "depth": len(denoiser.blocks),
        "num_heads": _num_heads(checkpoint.state),
        "sources": denoiser.sources,
    }
    return PerturbDiffFit(
        networks,
        None if checkpoint.current is None else _networks(checkpoint.current, **options),
        keys,
        genes,
        Vocabulary(maps["pert"], maps["cell_type"], maps["batch"] if rows["batch"] else {}, prefix),
        Expression(np.zeros(denoiser.num_genes)),
        settings.model_copy(update=sizes),
        origin=checkpoint.settings,
    )


def to_torch(fit: PerturbDiffFit, path: Path) -> None:
    """Write a fit as a checkpoint that torch users load: names, shapes and label maps as published."""
    maps = {
        "pert_dict": dict(fit.vocabulary.perturbation),
        "cell_type_dict": dict(fit.vocabulary.context),
        "batch_dict": dict(fit.vocabulary.batch),
    }
    settings = fit.origin or {
        "cov_encoding_cfg": maps,
        "model_cfg": {
            "dit_num_heads": fit.settings.num_heads,
            "hidden_num": [len(fit.unit.lowest), fit.settings.hidden],
        },
    }
    current = None if fit.current is None else dict(to_state_dict(*fit.current))
    write_checkpoint(TorchCheckpoint(dict(to_state_dict(*fit.networks)), current, settings), path)


def _networks(state: dict[str, np.ndarray], **options: Any) -> Networks:
    denoiser, encoder = from_state_dict(state, num_heads=_num_heads(state), **options)
    if encoder is None:
        raise StateDictError("cov_encoder.*: missing; a fit needs the covariate encoder too")
    return denoiser, encoder


def _num_heads(state: dict[str, np.ndarray]) -> int:
    """Heads by the width of one; 1 where the arrays do not say, which `from_state_dict` then explains."""
    found = [np.shape(array) for name, array in state.items() if name.removeprefix("model.") == _HEAD]
    hidden = [
        np.shape(a) for n, a in state.items() if n.removeprefix("model.") == "class_embedding.null_emb.weight"
    ]
    sized = found and hidden and len(found[0]) == 1 and len(hidden[0]) == 2 and found[0][0]
    return 2 * hidden[0][1] // found[0][0] if sized else 1


def _options(networks: Networks) -> dict[str, Any]:
    """What `from_state_dict` cannot read off arrays."""
    denoiser, encoder = networks
    main = encoder.perturbation if encoder.drug is None else encoder.drug
    assert main is not None
    return {
        "class_silu": denoiser.class_silu,
        "norm": denoiser.blocks[0].attention.norm,
        "perturbation_offset": main.offset,
    }


def _under(arrays: dict[str, np.ndarray], prefix: str) -> dict[str, np.ndarray]:
    return {name.removeprefix(prefix): a for name, a in arrays.items() if name.startswith(prefix)}
