"""Published checkpoints: what is read, that it comes back bit for bit, and that nothing hostile is run."""

import io
import logging
import os
import pickletools
import tarfile
import warnings
import zipfile
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest

from hilbertcell.inference.perturbdiff import stand_ins
from hilbertcell.inference.perturbdiff.torch_archive import CheckpointError, check_archive, read_program
from hilbertcell.inference.perturbdiff.torch_checkpoint import (
    TorchCheckpoint,
    read_checkpoint,
    write_checkpoint,
)
from hilbertcell.models import perturbdiff

LABELS = {"pert_dict": {"A": 0, "B": 1, "PBS": 2, "C": 3}, "cell_type_dict": {"B": 0, "T": 1}}


def content(torch, state):
    """Everything a published checkpoint holds beside what Lightning notes of its loops."""
    from omegaconf import OmegaConf

    tensors = OrderedDict((name, torch.from_numpy(a.copy())) for name, a in state.items())
    return {
        "state_dict": tensors,
        "current_model_state": OrderedDict((name, t + 1) for name, t in tensors.items()),
        "averaging_state": {"n_averaged": torch.tensor(3)},
        "hyper_parameters": {
            "cov_encoding_cfg": OmegaConf.create(
                LABELS | {"batch_dict": {"pbmc_Donor1": 0, "pbmc_Donor2": 1, "pbmc_Donor3": 2}}
            ),
            "model_cfg": OmegaConf.create({"hidden_num": [8, 8, 500], "path": "${oc.env:HOME}", "rate": 0.1}),
            "py_logger": logging.getLogger("train.logger"),
            "all_split_names": ["train", "test"],
        },
        "optimizer_states": [
            {"state": {0: {"exp_avg": torch.ones(2)}}, "param_groups": [{"betas": (0.9, 0.98)}]}
        ],
        "epoch": 2,
    }


@pytest.fixture
def published(torch, state, tmp_path) -> Path:
    path = tmp_path / "published.ckpt"
    torch.save(content(torch, state), path)
    return path


def equal(first, second) -> bool:
    return first.keys() == second.keys() and all(
        first[n].dtype == second[n].dtype and first[n].tobytes() == second[n].tobytes() for n in first
    )


def test_settings_labels_and_both_sets_of_weights(published, state):
    read = read_checkpoint(published)
    assert equal(read.state, state)
    np.testing.assert_array_equal(read.current["model.x_embedder.bias"], state["model.x_embedder.bias"] + 1)
    assert read.labels("pert") == LABELS["pert_dict"]
    assert read.labels("batch")["pbmc_Donor3"] == 2
    assert read.settings["model_cfg"] == {"hidden_num": [8, 8, 500], "path": "${oc.env:HOME}", "rate": 0.1}
    assert read.settings["py_logger"] == "train.logger"
    perturbdiff.from_state_dict(read.state, num_heads=2)


def test_round_trip_is_bit_exact(published, torch, tmp_path):
    read = read_checkpoint(published)
    write_checkpoint(read, tmp_path / "again.ckpt")
    again = read_checkpoint(tmp_path / "again.ckpt")
    assert equal(again.state, read.state)
    assert equal(again.current, read.current)
    assert again.settings == read.settings
    # Torch users load it without allowing anything.
    tensors = torch.load(tmp_path / "again.ckpt", weights_only=True)["state_dict"]
    assert all(torch.equal(tensors[n], torch.from_numpy(a)) for n, a in read.state.items())


def test_a_bare_state_dict_is_read(torch, state, tmp_path):
    torch.save({name: torch.from_numpy(a) for name, a in state.items()}, tmp_path / "bare.pt")
    assert equal(read_checkpoint(tmp_path / "bare.pt").state, state)


class Malice:
    def __init__(self, function, *args):
        self.made = function, args

    def __reduce__(self):
        return self.made


HOSTILE = {
    "system": (lambda path: Malice(os.system, f"touch {path}/owned"), r"names (posix|nt)\.system"),
    "eval": (lambda path: Malice(eval, f"open('{path}/owned', 'w')"), r"names builtins\.eval"),
    "file": (lambda path: Malice(open, f"{path}/owned", "w"), r"names (io|_io)\.open"),
}


@pytest.mark.parametrize("name", HOSTILE)
@pytest.mark.parametrize("place", ["state_dict", "hyper_parameters", "optimizer_states"])
def test_code_is_not_run(name, place, torch, state, tmp_path):
    make, message = HOSTILE[name]
    torch.save(content(torch, state) | {place: make(tmp_path)}, tmp_path / "hostile.ckpt")
    with pytest.raises(CheckpointError, match=message):
        read_checkpoint(tmp_path / "hostile.ckpt")
    assert not (tmp_path / "owned").exists()


def rewritten(
    path: Path, change=lambda name, data: data, compress=zipfile.ZIP_STORED, drop=(), extra=()
) -> Path:
    """The archive with some records changed, dropped or added."""
    out = path.with_name("changed.ckpt")
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(out, "w", compress) as new:
        for entry in old.infolist():
            if not entry.filename.endswith(drop or ("\0",)):
                new.writestr(entry.filename, change(entry.filename, old.read(entry)))
        for name, data in extra:
            new.writestr(name, data)
    return out


def claim_more(name: str, data: bytes) -> bytes:
    """The first storage of 8 numbers claims 200."""
    if not name.endswith("data.pkl"):
        return data
    ops = [(op.name, arg, at) for op, arg, at in pickletools.genops(data)]
    at = next(
        at for i, (op, arg, at) in enumerate(ops) if (op, arg) == ("BININT1", 8) and ops[i + 1][0] == "TUPLE"
    )
    return data[: at + 1] + b"\xc8" + data[at + 2 :]


def test_storages_that_claim_too_much(published):
    with pytest.raises(CheckpointError, match=r"claims 800 bytes and has a record of 32 bytes"):
        read_checkpoint(rewritten(published, claim_more))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"drop": ("data/0",)}, r"storage '0' claims \d+ bytes and has no record"),
        ({"drop": ("data.pkl",)}, "not one that torch wrote"),
        ({"compress": zipfile.ZIP_DEFLATED}, "is compressed"),
        ({"extra": [("elsewhere/data.pkl", b"")]}, "not one that torch wrote"),
        ({"change": lambda n, d: b"big" if n.endswith("byteorder") else d}, "not little-endian"),
        ({"change": lambda n, d: d[:-40] if n.endswith("data.pkl") else d}, "damaged"),
        ({"change": lambda n, d: b"." if n.endswith("data.pkl") else d}, "torch cannot load it"),
    ],
)
def test_damaged_archives(options, message, published):
    with pytest.raises(CheckpointError, match=message):
        read_checkpoint(rewritten(published, **options))


@pytest.mark.parametrize("share", [0.0, 0.3, 0.9, 0.999])
def test_half_a_file(share, published, tmp_path):
    data = published.read_bytes()
    (tmp_path / "half.ckpt").write_bytes(data[: int(share * len(data))])
    with pytest.raises(CheckpointError, match=r"half\.ckpt: is (no zip archive|a damaged archive)"):
        read_checkpoint(tmp_path / "half.ckpt")


def test_legacy_formats_are_refused_unread(torch, state, tmp_path):
    with tarfile.open(tmp_path / "legacy.tar", "w") as archive:
        for name in ("sys_info", "pickle", "storages", "tensors"):
            archive.addfile(tarfile.TarInfo(name), io.BytesIO())
    with pytest.raises(CheckpointError, match="tar archive"):
        read_checkpoint(tmp_path / "legacy.tar")
    hostile = Malice(os.system, f"touch {tmp_path}/owned")
    torch.save(hostile, tmp_path / "legacy.pt", _use_new_zipfile_serialization=False)
    with pytest.raises(CheckpointError, match="no zip archive"):
        read_checkpoint(tmp_path / "legacy.pt")
    assert not (tmp_path / "owned").exists()


def test_allowed_names_with_other_payloads(torch, state, tmp_path):
    from omegaconf import OmegaConf

    whole = content(torch, state)

    def refused(changed, message):
        torch.save(whole | changed, tmp_path / "odd.ckpt")
        with pytest.raises(CheckpointError, match=message):
            read_checkpoint(tmp_path / "odd.ckpt")

    config = OmegaConf.create({"a": 1})
    config.__dict__["_content"] = ["a"]
    refused({"hyper_parameters": {"model_cfg": config}}, "a DictConfig does not hold what one holds")
    node = OmegaConf.create({"a": 1})
    node.__dict__["_content"]["a"].__dict__["_val"] = torch.ones(1)
    refused({"hyper_parameters": {"model_cfg": node}}, r"model_cfg\.a: a AnyNode does not hold")
    loop = OmegaConf.create({"a": {"b": 1}})
    loop.__dict__["_content"]["a"].__dict__["_content"]["b"] = loop
    refused({"hyper_parameters": {"model_cfg": loop}}, "more than 32 deep")
    refused({"hyper_parameters": {"model_cfg": int}}, "expected a setting")
    refused({"hyper_parameters": [1]}, "expected a mapping")
    refused({"state_dict": logging.getLogger("x")}, "does not map names to arrays")
    refused(
        {"state_dict": Malice(torch._utils._rebuild_tensor_v2, "not", "a", "storage")}, "torch cannot load it"
    )
    refused({"state_dict": {"w": torch.zeros(1).expand(10**6, 10**6)}}, "more than its storage holds")
    refused(
        {"state_dict": {"w": torch.zeros(2, dtype=torch.bfloat16)}},
        r"w: torch\.bfloat16, expected torch\.float32",
    )
    refused({"state_dict": {"w": torch.zeros(2).to_sparse()}}, "names .*sparse")


def test_label_maps_number_from_zero(torch, state, tmp_path):
    odd = TorchCheckpoint(state, None, {"cov_encoding_cfg": {"pert_dict": {"A": 0, "B": 2}}})
    write_checkpoint(odd, tmp_path / "odd.ckpt")
    with pytest.raises(CheckpointError, match="pert_dict does not number its labels"):
        read_checkpoint(tmp_path / "odd.ckpt").labels("pert")
    assert read_checkpoint(tmp_path / "odd.ckpt").labels("batch") is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda s: s.pop("model.blocks.0.block.attn.proj.bias"),
            r"proj\.bias: missing, shape \(16,\) expected",
        ),
        (
            lambda s: s["model.x_embedder.weight"].fill(np.nan),
            r"x_embedder\.weight: 128 values are not finite",
        ),
        (
            lambda s: s.update({"model.t_embedder.mlp.2.bias": np.zeros(3, np.float32)}),
            r"shape \(3,\), expected \(8,\)",
        ),
    ],
)
def test_arrays_that_fit_no_network_are_listed(change, message, torch, state, tmp_path):
    state = {name: a.copy() for name, a in state.items()}
    change(state)
    write_checkpoint(TorchCheckpoint(state), tmp_path / "odd.ckpt")
    with pytest.raises(perturbdiff.StateDictError, match=message):
        perturbdiff.from_state_dict(read_checkpoint(tmp_path / "odd.ckpt").state, num_heads=2)


def test_every_allowed_name_has_a_reason_and_a_stand_in(published):
    assert all(len(why) > 5 for why in stand_ins.ALLOWED.values())
    assert not {"os", "sys", "subprocess", "posix"} & {name.split(".")[0] for name in stand_ins.ALLOWED}
    check_archive(published, stand_ins.ALLOWED)
    with pytest.raises(CheckpointError, match=r"names omegaconf\.dictconfig\.DictConfig"):
        check_archive(published, set(stand_ins.ALLOWED) - {"omegaconf.dictconfig.DictConfig"})


@pytest.mark.parametrize(
    "program", [b"\x80\x02cos\nsystem\nX\x00\x00\x00\x00\x85R.", b"\x80\x04\x8c\x02os\x8c\x06system\x93."]
)
def test_names_are_seen_whatever_opcode_looks_them_up(program):
    try:
        assert read_program(program, Path("p")).names == {"os.system"}
    except CheckpointError as error:
        assert "has no place in a checkpoint" in str(error)  # noqa: PT017 - either way it is not allowed


@pytest.mark.slow
def test_what_lightning_writes(torch, state, tmp_path):
    """A real training of two steps with weight averaging, stopped into a file."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        path = lightning_checkpoint(torch, state, tmp_path)
    read = read_checkpoint(path)
    assert read.state.keys() == read.current.keys() == state.keys()
    assert any((read.state[n] != read.current[n]).any() for n in state)
    assert read.labels("pert") == LABELS["pert_dict"]
    perturbdiff.from_state_dict(read.state, num_heads=2)


def lightning_checkpoint(torch, state, folder: Path) -> Path:
    import lightning
    from lightning.pytorch.callbacks import EMAWeightAveraging
    from omegaconf import OmegaConf

    class Module(lightning.LightningModule):
        def __init__(self, cov_encoding_cfg, model_cfg, py_logger, all_split_names):
            super().__init__()
            self.save_hyperparameters()
            for name, array in state.items():
                *path, last = name.split(".")
                node = self
                for part in path:
                    if part not in dict(node.named_children()):
                        node.add_module(part, torch.nn.Module())
                    node = node.get_submodule(part)
                node.register_parameter(last, torch.nn.Parameter(torch.from_numpy(array.copy())))

        def training_step(self, batch, index):
            return sum(p.square().sum() for p in self.parameters())

        def on_train_batch_end(self, outputs, batch, index):
            if index == 2:  # at the end of a training the weights are their average
                self.trainer.save_checkpoint(folder / "lightning.ckpt")

        def configure_optimizers(self):
            optimizer = torch.optim.AdamW(self.parameters(), lr=0.01)
            return {
                "optimizer": optimizer,
                "lr_scheduler": torch.optim.lr_scheduler.LambdaLR(optimizer, lambda n: 1.0),
            }

    configs = OmegaConf.create(LABELS), OmegaConf.create({"dit_num_heads": 2})
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(torch.zeros(4, 1)))
    trainer = lightning.Trainer(
        max_steps=4, logger=False, enable_progress_bar=False, enable_model_summary=False, accelerator="cpu",
        callbacks=[EMAWeightAveraging(decay=0.9)], default_root_dir=folder, enable_checkpointing=False,
    )  # fmt: skip
    trainer.fit(Module(*configs, logging.getLogger("train"), ["train"]), loader)
    return folder / "lightning.ckpt"
