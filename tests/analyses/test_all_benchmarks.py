"""One run of all sections: what ran, what failed, and what the page says of it."""

import json

from hilbertcell.analyses.all_benchmarks import ALONE, BESIDE, GRID, run_all
from hilbertcell.analyses.benchmark_page import BY_HAND, PARTS, TIMES, assemble


def test_sections_leave_their_times_and_failures_are_named(tmp_path):
    (tmp_path / "_parts").mkdir()
    (tmp_path / "_parts/size.md").write_text("12 s\n")
    good, bad = ("size", ("platform",)), ("grid", ("no_such_module",))
    assert run_all([good], [bad], [], tmp_path, tmp_path / "log") == ["grid"]
    assert "no_such_module" in (tmp_path / "log/grid.log").read_text()
    times = json.loads((tmp_path / "_parts" / TIMES).read_text())
    assert list(times) == ["size"]
    page = assemble(tmp_path)
    assert f"12 s\n\nMade on {times['size']['date']} in" in page
    assert page.count("Made on") == 1
    (tmp_path / "_parts/kang_cells.md").write_text("old\n")
    assert "old\n\nMade by itself on 20" in assemble(tmp_path)


def test_every_part_of_the_page_has_a_section_that_makes_it():
    made = {name for name, _ in (GRID, *BESIDE, *ALONE)}
    assert {part for part in PARTS if not part.startswith("bodenmiller")} - made == BY_HAND
    assert "bodenmiller" in made
