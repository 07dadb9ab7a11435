"""The command line as a user meets it: one run through all commands, refusals that need a fit, help, exit codes."""

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import anndata
import numpy as np
import pytest
import xarray as xr
from typer.main import get_command

from hilbertcell.analyses import cli, cli_support
from hilbertcell.analyses.cli import app

ROOT = Path(__file__).resolve().parents[2]
KEY_OPTIONS = {
    "--perturbation",
    "--control",
    "--context",
    "--batch",
    "--dose",
    "--library-size",
    "--layer",
    "--scale",
    "--perturbation-features",
}
OPTIONS = {
    "inspect": KEY_OPTIONS,
    "split": KEY_OPTIONS | {"--split", "--out", "--seed", "--force"},
    "fit": KEY_OPTIONS
    | {"--out", "--holdout", "--seed", "--settings", "--inference", "--law", "--force"}
    | {"--model", "--preset", "--test-perturbations"},
    "pretrain": {
        "--out",
        "--context",
        "--batch",
        "--scale",
        "--library-size",
        "--settings",
        "--seed",
        "--force",
    },
    "finetune": KEY_OPTIONS | {"--out", "--holdout", "--settings", "--reset-modulation", "--seed", "--force"},
    "generate": {"--out", "--targets", "--cells-per-population", "--sampler", "--sample-steps", "--guidance"}
    | {"--start-time", "--seed", "--force"},
    "convert": {"--out", "--preset", "--genes", "--force"},
    "predict": {"--out", "--targets", "--num-samples", "--seed", "--observe", "--new-batch", "--cells"}
    | {"--cells-per-population", "--draw-index", "--draws", "--force"},
    "evaluate": {"--cells", "--out", "--force"},
    "benchmark": KEY_OPTIONS | {"--split", "--config", "--out", "--seed", "--force"},
    "report": {"--scores", "--out", "--force"},
    "diagnose": {"--draws", "--truth", "--cross-validate", "--calibrate", "--out", "--seed", "--force"},
    "simulate": {"--out", "--seed", "--force"},
    "demo": KEY_OPTIONS | {"--out", "--force"},
}


@pytest.fixture(scope="module")
def workplace(tmp_path_factory) -> Path:
    """A folder that the commands of this file share."""
    return tmp_path_factory.mktemp("run")


@pytest.fixture
def fitted(workplace, screen, keys, call, monkeypatch) -> Path:
    """The workplace after inspect, split and fit; later tests find what the first one made."""
    monkeypatch.chdir(workplace)
    if not Path("fit").exists():
        screen.write_h5ad("screen.h5ad")
        Path("quick.toml").write_text("num_steps = 20\nnum_random_features = 8\nnum_components = 4\n")
        code, text = call("split", "screen.h5ad", *keys(), "--split", "unseen_batch", "--out", "split.json")
        assert code == 0, text
        options = ("--holdout", "split.json", "--settings", "quick.toml", "--out", "fit")
        code, text = call("fit", "screen.h5ad", *keys(), *options)
        assert code == 0, text
    return workplace


@pytest.fixture
def everything(fitted, call) -> Path:
    """Five draws of every perturbation for every batch of the screen, relative to the workplace."""
    path = Path("everything.nc")
    if not path.exists():
        code, text = call("predict", "fit", "screen.h5ad", "--num-samples", "5", "--out", path)
        assert code == 0, text
    return path


def test_inspect_says_what_is_there_and_what_is_missing(screen, keys, call, tmp_path):
    gone = (screen.obs["drug"] == "A") & (screen.obs["cell_type"] == "T") & (screen.obs["donor"] == "d2")
    screen[~gone].copy().write_h5ad(tmp_path / "screen.h5ad")
    code, text = call("inspect", tmp_path / "screen.h5ad", *keys())
    assert code == 0, text
    assert "204 cells x 8 genes, raw counts" in text
    assert "17 populations (6 of controls) of 12 to 12 cells" in text
    assert "B 36 72 3 2 " in text  # context, control cells, perturbed cells, batches, perturbations
    assert "A 60 5 2 3 " in text  # perturbation, cells, populations, contexts, batches
    assert "not in all 3 batches with perturbed cells: T | A (in 2)" in text


def test_one_run_through_all_commands(fitted, call):
    held_out = json.loads(Path("split.json").read_text())["held_out"]
    donor = held_out[0].split(" | ")[2]
    rows = [name.split(" | ") for name in held_out]
    table = ["context,perturbation,dose,batch", *(f"{row[0]},{row[1]},,{row[2]}" for row in rows)]
    Path("targets.csv").write_text("\n".join(table))

    options = (
        "--targets",
        "targets.csv",
        "--num-samples",
        "20",
        "--out",
        "draws.nc",
        "--cells",
        "cells.h5ad",
    )
    code, text = call("predict", "fit", "screen.h5ad", *options)
    assert code == 0, text
    assert "144 perturbed cells of screen.h5ad are ignored" in text
    with xr.open_datatree("draws.nc", engine="h5netcdf") as draws:
        assert draws["predictions"]["mean"].sizes == {"chain": 1, "draw": 20, "population": 4, "gene": 8}
        assert sorted(draws["predictions"]["population"].values) == sorted(held_out)
    cells = anndata.read_h5ad("cells.h5ad")
    assert cells.n_obs == 4 * 12  # as many as the controls of each context
    assert set(cells.obs["donor"]) == {donor}

    code, text = call("evaluate", "draws.nc", "screen.h5ad", "--cells", "cells.h5ad", "--out", "scores.json")
    assert code == 0, text
    assert set(json.loads(Path("scores.json").read_text())["targets"]) == set(held_out)

    code, text = call("report", "draws.nc", "--scores", "scores.json", "--out", "report.html")
    assert code == 0, text
    assert "Put to the test in donors hidden from training" in Path("report.html").read_text()
    code, text = call("report", "draws.nc", "--scores", "no.json", "--out", "other.html")
    assert code == 2
    assert "no.json" in text
    assert not Path("other.html").exists()
    assert not list(Path().glob(".*")), "temporary files are left"


def test_same_seed_same_draws(fitted, everything, call):
    means = []
    for options in (("--seed", "0"), ("--seed", "1"), ()):
        with xr.open_datatree(everything, engine="h5netcdf") as draws:
            means.append(draws["predictions"]["mean"].values)
        if options:
            words = ("--num-samples", "5", "--out", everything, "--force", *options)
            code, text = call("predict", "fit", "screen.h5ad", *words)
            assert code == 0, text
    first, same_seed, other_seed = means
    np.testing.assert_array_equal(first, same_seed)
    assert np.abs(first - other_seed).max() > 0


def test_an_output_that_exists_is_refused(fitted, everything, call):
    before = everything.read_bytes()
    code, text = call("predict", "fit", "screen.h5ad", "--num-samples", "5", "--out", everything)
    assert code == 2
    assert f"{everything}: exists already" in text
    assert "--force" in text
    assert everything.read_bytes() == before


def test_a_fit_may_be_replaced_but_no_other_folder(fitted):
    cli_support.check_output(Path("fit"), True, contents=cli.FIT_FILES)
    with pytest.raises(ValueError, match=r"holds screen\.h5ad"):
        cli_support.check_output(
            Path(), True, contents=cli.FIT_FILES | {p.name for p in Path().iterdir()} - {"screen.h5ad"}
        )


def test_training_populations_are_not_scored(fitted, everything, call, tmp_path):
    code, text = call("evaluate", everything, "screen.h5ad", "--out", tmp_path / "scores.json")
    assert code == 0, text
    scores = json.loads((tmp_path / "scores.json").read_text())
    assert set(scores["targets"]) == set(json.loads(Path("split.json").read_text())["held_out"])
    assert len(scores["observed"]) == 8  # two training donors x two cell types x two drugs
    assert "90 % cover" in text


@pytest.mark.slow
def test_benchmark_and_demo(screen_file, keys, call, tmp_path):
    code, text = call(
        "benchmark", screen_file, *keys(), "--split", "unseen_batch", "--out", tmp_path / "results.json"
    )
    assert code == 0, text
    assert {"null", "hilbertcell"} <= set(
        json.loads((tmp_path / "results.json").read_text())["law"]["models"]
    )
    out = tmp_path / "demo"
    code, text = call("demo", screen_file, *keys(), "--out", out)
    assert code == 0, text
    assert {path.name for path in out.iterdir()} == cli.DEMO_FILES - {"cells.h5ad"}
    assert call("demo", screen_file, *keys(), "--out", out)[0] == 2
    (out / "mine.txt").write_text("precious")
    code, text = call("demo", screen_file, *keys(), "--out", out, "--force")
    assert code == 2
    assert "holds mine.txt" in text
    (out / "mine.txt").unlink()
    (out / "report.html").write_text("old")
    assert call("demo", screen_file, *keys(), "--out", out, "--force")[0] == 0
    assert (out / "report.html").read_text() != "old"


BAD_PREDICTIONS = {
    "genes": (
        lambda screen: screen[:, :7].copy(),
        "",
        "missing 'gene7'",
        "subset the file to the genes of the fit",
    ),
    "scale": (
        lambda screen: anndata.AnnData(np.log1p(screen.X), obs=screen.obs, var=screen.var),
        "",
        "logged data",
        "layer= with the raw counts",
    ),
    "no_controls": (
        lambda screen: screen[screen.obs["drug"] != "DMSO"].copy(),
        "",
        "control = 'DMSO'",
        "'A', 'B'",
    ),
    "other_controls": (lambda screen: screen[7:].copy(), "", "'B | DMSO | d1'", "--new-batch"),
    "context": (
        lambda screen: screen,
        "NK,A,d1",
        "context 'NK' in batch 'd1' is not in the file",
        "'B | d1'",
    ),
    "perturbation": (lambda screen: screen, "B,C,d1", "perturbation = 'C'", "perturbation_features"),
    "control_target": (
        lambda screen: screen,
        "B,DMSO,d1",
        "'DMSO' is the control label",
        "ask for perturbed ones",
    ),
    "dose": (
        lambda screen: screen,
        "context,perturbation,dose,batch\nB,A,high,d1",
        "targets.csv",
        "doses as numbers",
    ),
    "target_columns": (
        lambda screen: screen,
        "context,drug,batch\nB,A,d1",
        "columns 'perturbation'",
        "add them",
    ),
    "too_few": (lambda screen: screen, "", "num_samples = 1", "500"),
}


@pytest.mark.parametrize("name", BAD_PREDICTIONS)
def test_bad_prediction(name, fitted, screen, call, tmp_path):
    change, row, culprit, cure = BAD_PREDICTIONS[name]
    change(screen).write_h5ad(tmp_path / "given.h5ad")
    words = ["predict", "fit", tmp_path / "given.h5ad", "--out", tmp_path / "draws.nc"]
    words += ["--num-samples", "1" if name == "too_few" else "5"]
    if row:
        table = row if row.startswith("context") else f"context,perturbation,batch\n{row}"
        (tmp_path / "targets.csv").write_text(f"{table}\n")
        words += ["--targets", tmp_path / "targets.csv"]
    before = sorted(tmp_path.iterdir())
    code, text = call(*words)
    assert code == 2, text
    assert culprit in text
    assert cure in text
    assert sorted(tmp_path.iterdir()) == before


def test_an_interrupted_output_leaves_nothing_and_keeps_the_old_one(tmp_path):
    target = tmp_path / "out.txt"
    target.write_text("old")

    def stopped(path: Path) -> None:
        path.write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), cli_support.whole_output(target) as path:
        stopped(path)
    assert target.read_text() == "old"
    assert list(tmp_path.iterdir()) == [target]


def test_unexpected_errors_end_in_one_line_and_code_1(screen_file, keys, call, monkeypatch):
    def broken(*_):
        np.ones(2) @ np.ones(3)  # a ValueError, but none that was written for the user

    monkeypatch.setattr("hilbertcell.analyses.inspection.print_summary", broken)
    code, text = call("inspect", screen_file, *keys())
    assert code == 1
    assert text.count("ValueError") == 1
    assert "--debug" in text
    assert "Traceback" not in text
    code, text = call("inspect", screen_file, *keys(), "--debug")
    assert code == 1
    assert "Traceback" in text
    assert "in broken" in text


def test_debug_shows_the_traceback_of_bad_input_too(keys, call):
    code, text = call("inspect", "absent.h5ad", *keys(), "--debug")
    assert code == 2
    assert "Traceback" in text


def test_commands_have_exactly_their_options():
    commands = get_command(app).commands
    found = {
        name: {flag for parameter in command.params for flag in parameter.opts if flag.startswith("--")}
        for name, command in commands.items()
    }
    assert {name: flags - {"--debug", "--help"} for name, flags in found.items()} == OPTIONS
    assert all("--debug" in flags for flags in found.values())


@pytest.mark.parametrize(
    "page", ["README.md", *sorted(str(p.relative_to(ROOT)) for p in ROOT.glob("docs/**/*.md"))]
)
def test_commands_in_the_documentation_exist(page):
    text = (ROOT / page).read_text()
    for line in re.findall(
        r"^(?:\$ )?(?:\.venv/bin/)?hilbertcell +(.*)$", text.replace("\\\n", " "), re.MULTILINE
    ):
        name, *words = shlex.split(line, comments=True)
        flags = {word for word in words if word.startswith("--")}
        assert flags <= OPTIONS[name] | {"--debug", "--help"}, f"{page}: hilbertcell {line}"


def test_python_in_the_readme_names_what_exists():
    code = re.search(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL).group(1)
    lines = [line for line in code.splitlines() if line.strip()]
    assert len(lines) == 5
    import hilbertcell

    compile(code, "README.md", "exec")
    assert set(re.findall(r"\bhc\.(\w+)", code)) <= set(hilbertcell.__all__)


@pytest.mark.parametrize(
    "command", [["-m", "hilbertcell"], ["-c", "from hilbertcell.analyses.cli import main; main()"]]
)
def test_a_fresh_process_exits_with_the_code(command):
    def run(*words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([sys.executable, *command, *words], capture_output=True, text=True, check=False)

    shown = run("--version")
    assert (shown.returncode, shown.stdout.split()[0]) == (0, "hilbertcell")
    refused = run("report", "draws.nc", "--out", "absent/report.html")
    assert refused.returncode == 2
    assert refused.stdout == ""
    assert "absent does not exist" in refused.stderr
