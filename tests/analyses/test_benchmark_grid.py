import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import xarray as xr
from anndata import AnnData

from hilbertcell.analyses import benchmark_grid, grid_output, grid_store
from hilbertcell.analyses.benchmark_config import BenchmarkConfig
from hilbertcell.analyses.benchmark_folds import folds
from hilbertcell.analyses.benchmark_grid import Outcome
from hilbertcell.analyses.bounds import halves, replicate_ceiling, sampling_floor
from hilbertcell.analyses.grid_output import run_and_write
from hilbertcell.analyses.grid_summary import grid_markdown, losses, summarise_grid
from hilbertcell.analyses.law_summary import LawScores, jsonable
from hilbertcell.analyses.predictors import Screen, sampled_populations
from hilbertcell.data.anndata_io import read_populations
from hilbertcell.data.splits import SplitError

GENES = 10
KEYS = {"perturbation": "drug", "control": "no", "context": "kind", "batch": "donor", "scale": "other"}
MODELS = ["null", "training cells", "own-baseline slope", "replicate ceiling", "sampling floor"]


def cells(seed=0, num_batches=5, num_cells=90):
    """Two drugs in two kinds of cells; the response leans on the donor's own control level."""
    rng = np.random.default_rng(seed)
    blocks, obs = [], []
    for kind in ("B", "T"):
        level, *effects = rng.normal(size=(3, GENES)) * 2
        for donor in range(num_batches):
            own = rng.normal(size=GENES)
            rest = 0.1 * rng.normal(size=(2, GENES))
            means = [level + own, *(level + e + 0.3 * own + r for e, r in zip(effects, rest, strict=True))]
            for drug, mean in zip(("no", "x", "y"), means, strict=True):
                blocks.append(mean + 0.5 * rng.normal(size=(num_cells, GENES)))
                obs += [(drug, kind, f"d{donor}")] * num_cells
    frame = pd.DataFrame(obs, columns=["drug", "kind", "donor"], index=[f"c{i}" for i in range(len(obs))])
    return AnnData(np.concatenate(blocks), obs=frame, var=pd.DataFrame(index=[f"g{i}" for i in range(GENES)]))


@pytest.fixture(scope="module")
def populations():
    return read_populations(cells(), **KEYS)


TOML = """
folder = "."
models = {models}
num_samples = 40
num_folds = 3
[[data_set]]
name = "tiny"
file = "tiny.h5ad"
perturbation = "drug"
control = "no"
context = "kind"
batch = "donor"
scale = "other"
splits = ["unseen_batch", "unseen_pair"]
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("grid")
    cells().write_h5ad(folder / "tiny.h5ad")
    (folder / "grid.toml").write_text(TOML.format(models=json.dumps(MODELS)))
    return folder


@pytest.fixture(scope="module")
def config(folder):
    return BenchmarkConfig.from_toml(folder / "grid.toml")


@pytest.fixture(scope="module")
def run(config, folder):
    return run_and_write(config, folder / "out", workers=1)


def test_the_grid_writes_tables_scores_and_a_figure(run, folder):
    assert run.failed == ()
    assert run.computed == len(run.paths) == len(MODELS) * (5 + 3)
    rows = json.loads((folder / "out/summary.json").read_text())
    assert [(row["split"], row["folds"]) for row in rows] == [("unseen_batch", 5), ("unseen_pair", 3)]
    law = rows[0]["law"]
    assert list(law["models"]) == MODELS
    assert law["num_targets"] == 20
    assert law["models"]["null"]["relative_to_null"]["crps"]["ratio"] == 1.0
    assert law["models"]["own-baseline slope"]["verdicts"]["crps"]["null"]["outcome"] == "wins"
    assert law["models"]["sampling floor"]["verdicts"] == {}  # it knows the truth
    assert "sampling floor" not in law["models"]["null"]["verdicts"]["crps"]
    assert law["models"]["null"]["worst_group"]["group"][:4] in ("B | ", "T | ")
    mean = rows[0]["cells"]["models"]["null"]["mean"]
    assert mean["discrimination_l1"] > 0.9  # the two drugs are told apart
    slope = rows[0]["cells"]["models"]["own-baseline slope"]
    assert slope["verdicts"]["energy_distance"]["null"]["outcome"] == "wins"

    assert mean["between_16"] == pytest.approx(mean["between_4096"], rel=0.2)
    assert 0.4 < mean["between_4096"] / mean["between_true"] < 2.5
    assert slope["mean"]["population_energy"] < mean["population_energy"]
    pool = rows[0]["cells"]["models"]["training cells"]["mean"]  # one population, which has no spread
    assert abs(pool["between_4096"]) < 0.02 * mean["between_4096"]
    assert "between_16" not in rows[0]["cells"]["models"]["replicate ceiling"]["mean"]

    text = (folder / "out/table.md").read_text()
    assert text.count("### `tiny`") == 2
    assert "Frauds" not in text, "they are planted in hilbertcell, which is not here"
    assert "own-baseline slope" in text
    assert (folder / "out/figure.png").read_bytes()[:4] == b"\x89PNG"
    with xr.open_dataset(folder / "out/scores.nc", engine="h5netcdf") as scores:
        frame = scores.to_dataframe()
    one = frame[(frame["model"] == "null") & (frame["split"] == "unseen_batch")]
    assert len(one) == 20
    expected = one.groupby("batch")["crps"].mean().mean()
    assert law["models"]["null"]["mean"]["crps"] == pytest.approx(expected)
    assert not list((folder / "out").glob("*part*"))


def test_a_second_run_computes_only_what_is_missing(run, config, folder, monkeypatch):
    before = {path: path.stat().st_mtime_ns for path in run.paths}
    run.paths[7].unlink()
    asked = []
    real = benchmark_grid.score_fold

    def counting(screen, source, split, model, *rest):
        asked.append(model)
        return real(screen, source, split, model, *rest)

    monkeypatch.setattr(benchmark_grid, "score_fold", counting)
    again = benchmark_grid.run_grid(config, folder / "out", workers=1)
    assert (again.computed, len(asked)) == (1, 1)
    assert again.paths == run.paths
    kept = {path: path.stat().st_mtime_ns for path in again.paths if path != run.paths[7]}
    assert kept == {path: time for path, time in before.items() if path != run.paths[7]}


def test_a_model_that_only_makes_cells_has_populations_of_as_many_seeds():
    def cells(given, targets, number, seed):
        return [np.full((n, 2), 10.0 * seed + t) for t, n in enumerate(number)]

    drawn = sampled_populations(cells)(None, pd.DataFrame(index=["a", "b"]), 3, 5)
    assert not drawn.whole
    assert [one.shape for one in drawn.cells] == [(3, 64, 2)] * 2
    np.testing.assert_array_equal(drawn.cells[1][:, 0, 0], [61.0, 71.0, 81.0])


@pytest.mark.slow
def test_frauds_stand_beside_the_table_of_hilbertcell(folder, tmp_path):
    names = json.dumps(["hilbertcell", "null", "training means", "training cells", "replicate ceiling"])
    text = TOML.format(models=names).replace(', "unseen_pair"', "").replace('"."', f'"{folder}"')
    (tmp_path / "one.toml").write_text(
        text.replace("[[data_set]]", "[settings]\nnum_steps = 300\n[[data_set]]")
    )
    run_and_write(BenchmarkConfig.from_toml(tmp_path / "one.toml"), tmp_path / "out", workers=1)
    row = json.loads((tmp_path / "out/summary.json").read_text())[0]
    mean = {
        name: {score: np.mean(values) for score, values in scores.items() if None not in values}
        for name, scores in row["frauds"]["scores"].items()
    }
    honest = mean["hilbertcell"]
    for name in ("effect x 0.5", "effect x 2", "perturbation labels moved on"):
        assert mean[name]["crps"] > honest["crps"], name
        assert mean[name]["energy_distance"] > honest["energy_distance"], name
    assert mean["spread of cells x 0.6"]["within_variance_ratio"] < 0.5
    assert mean["batch labels shuffled"]["crps"] > 0.9 * mean["training means"]["crps"]
    assert mean["truth with fresh cells"]["crps"] < honest["crps"]
    between = row["cells"]["models"]["hilbertcell"]["mean"]
    assert between["between_16"] == pytest.approx(between["between_4096"], rel=0.2)
    assert "| batch labels shuffled | " in (tmp_path / "out/table.md").read_text()


def test_cells_are_named_by_all_they_depend_on(run, config, folder, monkeypatch):
    key = json.loads(run.paths[0].read_text())["key"]
    others = [
        key | change
        for change in (
            {"seed": 1}, {"model": "other"}, {"num_samples": 41}, {"version": "9"}, {"code": "x"}, {"files": []},
            {"labels_hash": "x"}, {"held_out": []}, {"given": ["x"]}, {"settings": {"num_steps": 2}},
        )
    ]  # fmt: skip
    names = {grid_store.cell_path(folder, one) for one in (key, *others)}
    assert len(names) == len(others) + 1
    assert grid_store.cell_path(folder, dict(reversed(key.items()))) == grid_store.cell_path(folder, key)


def test_a_failing_model_is_reported_and_does_not_stop_the_others(config, folder, monkeypatch):
    real = benchmark_grid.score_fold

    def broken(screen, source, split, model, *rest):
        if model == "own-baseline slope" and split.name == "unseen_batch":
            raise FloatingPointError("no slope today")
        return real(screen, source, split, model, *rest)

    monkeypatch.setattr(benchmark_grid, "score_fold", broken)
    outcome = benchmark_grid.run_grid(config, folder / "broken", workers=1)
    assert len(outcome.failed) == 5
    assert (
        "tiny, unseen_batch, fold 0, own-baseline slope: FloatingPointError: no slope today" in outcome.failed
    )
    rows = summarise_grid(list(grid_store.read_cells(outcome.paths)))
    assert "own-baseline slope" not in rows[0]["law"]["models"]
    assert "own-baseline slope" in rows[1]["law"]["models"]
    assert "no slope today" in grid_markdown(rows, outcome.failed)


def test_losses_of_the_suite_come_first_and_in_red():
    def verdict(outcome):
        return {"outcome": outcome}

    def model(**verdicts):
        return {
            "mean": {}, "relative_to_null": {}, "conformal": {}, "verdicts": verdicts,
            "worst_group": {"group": "B | d1", "crps": 1.0},
        }  # fmt: skip

    suite = model(crps={"null": verdict("loses"), "ridge": verdict("wins")})
    law = {"models": {"null": model(), "ridge": model(), "hilbertcell": suite}, "batches": ["d1"]}
    row = {"data_set": "tiny", "split": "few_shot", "folds": 1, "incomplete": [], "law": law}
    assert losses([row]) == ["tiny, few_shot: CRPS against null"]
    text = grid_markdown([row])
    assert text.startswith(
        'Rows that hilbertcell loses: <span style="color:#c62828">tiny, few_shot: CRPS against null'
    )
    suite["verdicts"] = {}
    assert grid_markdown([row]).startswith("Rows that hilbertcell loses: nowhere.")


def test_folds_leave_out_every_batch_once(populations):
    labels = populations.labels
    for name in ("unseen_batch", "few_shot"):
        made = folds(labels, name, 0, 2)
        hidden = [{*labels.loc[[*one.held_out, *one.given], "batch"]} for one in made]
        assert hidden == [{f"d{i}"} for i in range(5)]
    given = [one.given for one in folds(labels, "few_shot", 0, 2)]
    assert all(len(names) == 1 for names in given)
    assert given != [one.given for one in folds(labels, "few_shot", 1, 2)]
    for one in folds(labels, "few_shot", 0, 2):
        assert not {*one.given}.intersection(one.held_out)
    pairs = folds(labels, "unseen_pair", 0, 4)
    assert len({one.held_out for one in pairs}) == len(pairs) > 1
    with pytest.raises(SplitError, match="two perturbed populations"):
        folds(labels[labels["is_control"] | (labels.index.str.startswith("B | x"))], "few_shot", 0, 2)


def test_halves_share_no_cell_and_the_floor_is_one(populations):
    names = [name for name in populations.labels.index if "| x |" in name]
    first, second = halves(populations, names, seed=3)
    for name in populations.labels.index:
        one, two = ({*part.cells_of(name)} for part in (first, second))
        whole = {*populations.cells_of(name)}
        if name in names:
            assert not one & two
            assert one | two == whole
            assert len(one) == first.labels.loc[name, "num_cells"] == 45
            assert len(two) == second.labels.loc[name, "num_cells"] == 45
        else:
            assert one == two == whole
    table = Screen(populations).table
    targets = table.rows(pd.Index(names)).labels
    draws = sampling_floor(table, 3).law(None, targets, 0)
    assert np.ptp(draws, axis=0).max() == 0  # a point: the noise of the cells is added when it is scored
    z = (draws[0] - table.rows(targets.index).mean) / np.sqrt(table.rows(targets.index).noise)
    assert abs(z.std() - 1) < 4 / np.sqrt(2 * z.size)
    ceiling = replicate_ceiling(Screen(first), 400).law(None, targets, 0)
    own = Screen(first).table.rows(targets.index)
    np.testing.assert_allclose(ceiling.mean(0), own.mean, atol=5 * np.sqrt(own.noise.max() / 400))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("scale = \"other\"", "scale = \"raw\""), "data_set.0.scale"),
        (("splits", "spits"), "data_set.0.spits"),
        (("tiny.h5ad", "absent.h5ad"), "absent.h5ad do not exist"),
        (("num_samples = 40", "num_samples = "), "is not valid TOML"),
    ],
)  # fmt: skip
def test_a_configuration_is_checked_at_the_door(folder, tmp_path, change, message):
    (tmp_path / "tiny.h5ad").symlink_to(folder / "tiny.h5ad")
    (tmp_path / "bad.toml").write_text(TOML.format(models='["null"]').replace(*change))
    with pytest.raises(ValueError, match=message):
        BenchmarkConfig.from_toml(tmp_path / "bad.toml")


def test_unknown_models_and_doubled_names_are_refused(config):
    with pytest.raises(ValueError, match="models = magic: not known"):
        benchmark_grid.model_names(config.model_copy(update={"models": ("null", "magic")}))
    with pytest.raises(ValueError, match="only bounds"):
        benchmark_grid.model_names(config.model_copy(update={"models": ("sampling floor",)}))
    with pytest.raises(ValueError, match=r"\['tiny'\] are used twice"):
        BenchmarkConfig(data_set=config.data_set * 2)


def test_the_shared_configuration_names_every_shared_screen(monkeypatch):
    path = Path(benchmark_grid.__file__).parent / "benchmarks/shared.toml"
    monkeypatch.setattr(BenchmarkConfig, "files", lambda self: [])  # the data may not be here
    config = BenchmarkConfig.from_toml(path)
    assert {one.name for one in config.data_set} == {
        "papalexi_eccite_crispr", "kang_ifnb_wide", "bodenmiller_bcrxl_cytof", "ova_activation_flow",
        "glioblastoma_panobinostat",
    }  # fmt: skip
    assert {split for one in config.data_set for split in one.splits} == {
        "unseen_batch", "unseen_pair", "unseen_perturbation", "few_shot",
    }  # fmt: skip
    assert len(benchmark_grid.model_names(config)) == 11


def test_the_command_runs_resumes_and_refuses(folder, call, tmp_path):
    path = tmp_path / "one.toml"
    path.write_text(TOML.format(models='["null", "additive"]').replace(', "unseen_pair"', ""))
    (tmp_path / "tiny.h5ad").symlink_to(folder / "tiny.h5ad")
    code, text = call("benchmark", "--config", path, "--out", tmp_path / "out")
    assert (code, "10 of 10 cells computed now" in text) == (0, True), text
    code, text = call("benchmark", "--config", path, "--out", tmp_path / "out")
    assert (code, "0 of 10 cells computed now" in text) == (0, True), text
    code, text = call("benchmark", "--config", path, "--out", path)
    assert (code, "is a file and the output is a folder" in text) == (2, True), text
    code, text = call("benchmark", "--config", path, "--split", "few_shot", "--out", tmp_path / "out")
    assert (code, "--config says what is compared" in text) == (2, True), text
    code, text = call("benchmark", "--out", tmp_path / "x.json")
    assert (code, "or --config FILE.toml" in text) == (2, True), text


def test_a_failed_fold_is_told_by_the_exit_code(folder, call, tmp_path, monkeypatch):
    path = tmp_path / "one.toml"
    path.write_text(TOML.format(models='["null"]'))
    (tmp_path / "tiny.h5ad").symlink_to(folder / "tiny.h5ad")
    outcome = Outcome((), 0, ("tiny, unseen_batch, fold 0, null: ValueError: no",))
    monkeypatch.setattr(grid_output, "run_and_write", lambda *args, **kwargs: outcome)
    code, text = call("benchmark", "--config", path, "--out", tmp_path / "out")
    assert (code, "failed: tiny, unseen_batch, fold 0" in text) == (1, True), text


def test_stored_scores_come_back(populations):
    table = Screen(populations).table
    index = populations.labels.index[:3]
    residual = np.array([[0.123456, np.inf], [np.nan, 2.0], [1.0, 0.0]])
    scores = LawScores(pd.DataFrame({"crps": [1.0, np.nan, 2.0]}, index=index), residual / 3, residual)
    record = json.loads(json.dumps(jsonable(grid_store.law_record(scores, table.labels.loc[index]))))
    back, labels = grid_store.law_scores(record)
    np.testing.assert_allclose(back.residual, residual, atol=1e-4)  # an interval of no width stays infinite
    pd.testing.assert_frame_equal(back.targets, scores.targets, check_names=False)
    assert labels["batch"].tolist() == table.labels.loc[index, "batch"].tolist()
