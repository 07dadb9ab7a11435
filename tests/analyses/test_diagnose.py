"""The command `diagnose` from a tiny fit to terminal, page and JSON."""

import json
import re

import numpy as np
import pytest

from hilbertcell.analyses.diagnose import diagnose, summary_line
from hilbertcell.analyses.diagnose_words import CHECKS
from hilbertcell.data.anndata_io import read_populations
from hilbertcell.inference.fit import fit
from hilbertcell.inference.settings import Settings

KEYS = {"perturbation": "drug", "control": "DMSO", "context": "cell_type", "batch": "donor"}
SETTINGS = Settings(num_steps=200, num_random_features=0)


@pytest.fixture(scope="module")
def tiny():
    """A fit of three donors that differ; two cell types, A and B, five genes."""
    import anndata
    import pandas as pd

    rng = np.random.default_rng(5)
    rows = [(drug, kind, f"d{b}") for b in range(3) for kind in "TB" for drug in ("DMSO", "A", "B")]
    rates = np.exp(rng.normal(2.5, 0.4, 5) + 0.5 * rng.standard_normal((3, 1, 5)))
    cells = np.concatenate([rng.poisson(rates[int(donor[1])], (15, 5)) for _, _, donor in rows])
    obs = pd.DataFrame(np.repeat(np.array(rows), 15, axis=0), columns=["drug", "cell_type", "donor"])
    obs.index = obs.index.astype(str)
    var = pd.DataFrame(index=[f"g{i}" for i in range(5)])
    populations = read_populations(anndata.AnnData(cells.astype(np.float32), obs, var), **KEYS)
    return fit(populations, settings=SETTINGS)


def test_command_page_and_json(tiny, call, tmp_path):
    tiny.save(tmp_path / "fit")
    page = tmp_path / "page.html"
    code, text = call("diagnose", tmp_path / "fit", "--out", page)
    assert code == 0, text
    assert "A good fit raises an alarm by chance" in text
    assert "Not looked at: predictions of unseen batches" in text
    assert "page written to" in text
    found = json.loads(page.with_suffix(".json").read_text())
    checks = {finding["check"]: finding for finding in found["findings"]}
    assert set(checks) == set(CHECKS) - {"chains", "cover", "pit", "strength", "leak", "calibration"}
    assert sum(found["counts"].values()) == len(checks)
    assert checks["labels"]["verdict"] == "ok"  # donors differ
    order = [finding["verdict"] for finding in found["findings"]]
    assert order == sorted(order, key=["alarm", "watch", "ok"].index)
    html = page.read_text()
    assert "<script" not in html
    assert not re.search(r'(src|href)="(?!#)', html)  # nothing is loaded from elsewhere
    assert html.count("<svg") == html.count('aria-label="')
    assert found["summary"] in html
    code, text = call("diagnose", tmp_path / "fit", "--out", page)
    assert code == 2
    assert "--force" in text


def test_bad_calls_end_with_one_paragraph(tiny, call, tmp_path):
    tiny.save(tmp_path / "fit")
    for options, words in (
        (["--draws", "x.nc"], "give both or neither"),
        (["--out", tmp_path / "x.json"], "name the page"),
        (["--draws", "x.nc", "--truth", "y.h5ad", "--cross-validate"], "one at a time"),
    ):
        code, text = call("diagnose", tmp_path / "fit", *options)
        assert code == 2
        assert words in text
    with pytest.raises(ValueError, match="fewer than 50"):
        diagnose(tiny, calibrate=10)


def test_words_cover_every_check_and_say_what_to_do():
    for name, words in CHECKS.items():
        assert words.asks.endswith("?"), name
        assert words.act.endswith("."), name


def test_the_first_sentence_counts(tiny):
    found = diagnose(tiny, seed=1)
    alarms, watches = found.count("alarm"), found.count("watch")
    line = summary_line(found)
    assert line.startswith(f"{alarms} alarm") if alarms else line.startswith("No alarm")
    assert (f"{watches} finding" in line) == bool(watches and not alarms)
    assert {"posterior", "log_prior", "log_likelihood", "sample_stats"} <= set(found.tree.children)
