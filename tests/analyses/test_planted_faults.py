"""Every planted fault raises the alarm that it should, and the honest world none."""

from dataclasses import replace

import numpy as np
import pytest

from hilbertcell.analyses import planted_faults as planted
from hilbertcell.analyses.alarm_rates import all_rates
from hilbertcell.analyses.diagnose import diagnose, inference_checks, judge_draws, table_checks
from hilbertcell.data.validation import DataError
from hilbertcell.inference.diagnostics.held_out import held_out_checks
from hilbertcell.inference.diagnostics.tables import table_of

GUIDE = [name for name, fault in planted.FAULTS.items() if fault.expected[0].startswith("guide")]
DRAWS = ["effect doubled in predictions", "variance of predictions shrunken"]
# Faults of data, seen in the table alone: what is done to the training screen, and the check that has to notice.
TABLE = {
    "swapped": (planted.swapped, "response"),
    "shuffled": (planted.shuffled, "labels"),
    "duplicated": (planted.duplicated, "copies"),
    "another scale": (lambda screen: planted.logged(screen, except_for="d3"), "scale"),
    "doubled": (lambda _: planted.split(planted.make_screen(double="d3"))[0], "response"),
}


def table_verdicts(fitted, training, **options):
    """Verdicts on another training table in the place of the fit's own."""
    changed = replace(fitted, moments=fitted.summarise(planted.read(training, **options)))
    results = table_checks(changed, table_of(changed, changed.moments), np.random.default_rng(0))
    return {name: result.verdict for name, result in results.items()}


@pytest.fixture(scope="module")
def world():
    return planted.honest()


@pytest.mark.slow
def test_the_honest_world_raises_no_alarm(world):
    found = diagnose(world.fit, draws=world.draws, truth=world.truth)
    assert [f.check for f in found.findings if f.result.verdict == "alarm"] == []


@pytest.mark.slow
@pytest.mark.parametrize("name", GUIDE)
def test_faults_of_the_guide(world, name):
    fault = planted.FAULTS[name]
    results = inference_checks(fault.make(world).fit, 0)
    assert results[fault.expected[0]].verdict == "alarm"


@pytest.mark.slow
@pytest.mark.parametrize("name", DRAWS)
def test_faults_of_predictions(world, name):
    fault = planted.FAULTS[name]
    changed = fault.make(world)
    held, leak = judge_draws(changed.fit, changed.draws, changed.truth, 0)
    results = held_out_checks(held, np.random.default_rng(0))
    assert "alarm" in {results[check].verdict for check in fault.expected}
    assert leak.verdict == "ok"


@pytest.mark.slow
def test_a_leak_is_found_under_another_name(world):
    training, _ = planted.split(planted.make_screen())
    leaky = replace(world.fit, moments=world.fit.summarise(planted.read(planted.leaky(training))))
    _, leak = judge_draws(leaky, world.draws, world.truth, 0)
    assert leak.verdict == "alarm"
    assert "e9" in leak.culprit


@pytest.mark.slow
@pytest.mark.parametrize("name", list(TABLE))
def test_faults_of_the_table(world, name):
    change, check = TABLE[name]
    training, _ = planted.split(planted.make_screen())
    options = {"scale": "log1p"} if name == "another scale" else {}
    assert table_verdicts(world.fit, change(training), **options)[check] == "alarm"


@pytest.mark.slow
def test_a_factor_that_is_library_size():
    fault = planted.FAULTS["factor is library size"]
    changed = fault.make(None)
    found = {f.check: f.result for f in diagnose(changed.fit).findings}
    assert found["technical"].verdict == "alarm"
    assert found["technical"].culprit == "library size"


def test_a_screen_on_the_wrong_scale_is_refused_at_the_door():
    training, _ = planted.split(planted.make_screen())
    with pytest.raises(DataError, match="whole number"):
        planted.read(training, scale="log1p")
    with pytest.raises(DataError, match="logged data"):
        planted.read(planted.logged(training), scale="counts")


@pytest.mark.slow
def test_alarm_rates_where_nothing_is_wrong():
    """Counts among 500 simulations lie in their binomial 99 % intervals, seed fixed."""
    found = all_rates(500)
    assert [(r.check, r.alarms, r.flagged, r.intervals) for r in found if not r.holds] == []
    assert {"course", "cover", "technical", "labels", "copies", "largest residual"} <= {
        r.check for r in found
    }
