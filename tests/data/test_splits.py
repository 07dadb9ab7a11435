"""What every split must hide, that it depends on names and seed only, and that leaks are caught."""

import itertools

import numpy as np
import pandas as pd
import pytest

from hilbertcell.data.grouping import population_name
from hilbertcell.data.splits import (
    SPLITS,
    LeakError,
    Split,
    SplitError,
    check_no_leak,
    check_same_data,
    labels_hash,
    leave_one_batch_out,
    make_split,
    training_mask,
)


def table(batches=5, contexts=4, perturbations=("A", "B", "C", "D", "A+B"), doses=(1.0, 2.0)):
    rows = []
    for c, b in itertools.product(range(contexts), range(batches)):
        rows.append((f"c{c}", "control", np.nan, f"b{b}", 30 + b, True))
        rows += [(f"c{c}", p, d, f"b{b}", 20 + c, False) for p in perturbations for d in doses]
    labels = pd.DataFrame(
        rows, columns=["context", "perturbation", "dose", "batch", "num_cells", "is_control"]
    )
    labels.index = [population_name(*row[:4]) for row in rows]
    return labels


def hidden(labels, split):
    return labels.loc[[*split.held_out, *split.given]]


@pytest.mark.parametrize("name", SPLITS)
@pytest.mark.parametrize("seed", range(5))
def test_laws_of_every_split(name, seed, tmp_path):
    labels = table()
    split = make_split(labels, name, seed)
    out = hidden(labels, split)
    assert split.held_out
    assert not out["is_control"].any(), "controls are never hidden"
    assert not set(split.held_out) & set(split.given)
    assert out.index.is_unique
    training = labels[training_mask(split, labels)]
    assert not training["is_control"].all()
    assert not set(training.index) & set(out.index)
    check_no_leak(split, training.index)
    check_same_data(split, labels)
    shuffled = labels.sample(frac=1, random_state=seed + 1)
    assert set(make_split(shuffled, name, seed).held_out) == set(split.held_out)
    split.save(tmp_path / "split.json")
    assert Split.load(tmp_path / "split.json") == split
    assert [path.name for path in tmp_path.iterdir()] == ["split.json"]


@pytest.mark.parametrize("name", SPLITS)
def test_seed_and_fraction_change_the_choice(name):
    labels = table(batches=8, contexts=8, perturbations=tuple("ABCDEFGH"))
    assert len({make_split(labels, name, seed).held_out for seed in range(6)}) > 1
    assert len(make_split(labels, name, fraction=0.5).held_out) > len(
        make_split(labels, name, fraction=0.2).held_out
    )


@pytest.mark.parametrize(("fraction", "number"), [(0.01, 1), (0.2, 1), (0.4, 2), (0.99, 4)])
def test_unseen_batch_hides_all_responses_of_its_batches(fraction, number):
    labels = table()
    split = make_split(labels, "unseen_batch", fraction=fraction)
    batches = set(hidden(labels, split)["batch"])
    assert len(batches) == number
    expected = labels[labels["batch"].isin(batches) & ~labels["is_control"]]
    assert set(split.held_out) == set(expected.index)
    assert not set(labels[training_mask(split, labels)]["batch"]) & batches, (
        "their controls are given, not fitted"
    )


def test_unseen_context_hides_all_responses_of_its_contexts():
    labels = table()
    split = make_split(labels, "unseen_context", fraction=0.5)
    contexts = set(hidden(labels, split)["context"])
    assert len(contexts) == 2
    expected = labels[labels["context"].isin(contexts) & ~labels["is_control"]]
    assert set(split.held_out) == set(expected.index)
    kept = labels[training_mask(split, labels)]
    assert set(kept[kept["is_control"]]["context"]) == {"c0", "c1", "c2", "c3"}, "its controls are given"


@pytest.mark.parametrize("seed", range(4))
def test_unseen_perturbation_hides_it_in_combinations_and_doses(seed):
    labels = table()
    split = make_split(labels, "unseen_perturbation", seed, fraction=0.25)
    out = hidden(labels, split)
    singles = {name for name in out["perturbation"] if "+" not in name}
    assert len(singles) == 1
    parts = labels["perturbation"].str.split("+")
    contain = np.array([not singles.isdisjoint(p) for p in parts])
    assert set(split.held_out) == set(labels.index[contain])


@pytest.mark.parametrize("seed", range(4))
def test_unseen_pair_hides_pairs_everywhere_and_leaves_each_half_elsewhere(seed):
    labels = table()
    split = make_split(labels, "unseen_pair", seed, fraction=0.4)
    out = hidden(labels, split)
    pairs = set(zip(out["context"], out["perturbation"], strict=True))
    assert len(pairs) == 8
    of_pair = [pair in pairs for pair in zip(labels["context"], labels["perturbation"], strict=True)]
    assert set(split.held_out) == set(labels.index[of_pair])
    kept = labels[training_mask(split, labels) & ~labels["is_control"]]
    for context, perturbation in pairs:
        assert (kept["perturbation"] == perturbation).any()
        assert (kept["context"] == context).any()


def test_unseen_pair_leaves_every_context_a_perturbation():
    labels = table(contexts=6, perturbations=("A", "B"))
    for seed in range(4):
        kept = labels[training_mask(make_split(labels, "unseen_pair", seed, fraction=0.9), labels)]
        assert set(kept[~kept["is_control"]]["context"]) == set(labels["context"])


def test_few_shot_gives_one_population_per_hidden_batch():
    labels = table()
    split = make_split(labels, "few_shot", fraction=0.4)
    assert sorted(labels.loc[list(split.given), "batch"]) == sorted(
        set(labels.loc[list(split.held_out), "batch"])
    )
    batches = set(hidden(labels, split)["batch"])
    expected = labels[labels["batch"].isin(batches) & ~labels["is_control"]]
    assert {*split.held_out, *split.given} == set(expected.index)
    with pytest.raises(LeakError, match="1 of 80 hidden"):
        check_no_leak(split, split.given[:1])


def test_leave_one_batch_out_hides_each_batch_once():
    labels = table()
    splits = leave_one_batch_out(labels)
    assert [set(labels.loc[list(s.held_out), "batch"]) for s in splits] == [{f"b{b}"} for b in range(5)]
    out = [name for split in splits for name in split.held_out]
    assert sorted(out) == sorted(labels.index[~labels["is_control"]])
    assert {split.name for split in splits} == {"unseen_batch"}


def test_batches_without_controls_or_responses_are_not_hidden():
    labels = table(perturbations=("A",))
    some = labels[~((labels["batch"] == "b0") & labels["is_control"])]
    some = some[~((some["batch"] == "b1") & ~some["is_control"])]
    assert [set(some.loc[list(s.held_out), "batch"]) for s in leave_one_batch_out(some)] == [
        {"b2"},
        {"b3"},
        {"b4"},
    ]
    assert set(some.loc[list(make_split(some, "unseen_batch", fraction=0.9).held_out), "batch"]) < {
        "b2",
        "b3",
        "b4",
    }


@pytest.mark.parametrize(
    ("name", "labels", "message"),
    [
        ("unseen_batch", table(batches=1), "two batches with control and perturbed cells, found 1"),
        ("unseen_context", table(contexts=1), "two contexts"),
        ("unseen_pair", table(contexts=1), "one context only"),
        ("unseen_perturbation", table(perturbations=("A",)), "two single perturbations, found 1"),
        ("unseen_perturbation", table(perturbations=("A+B",)), "every population contains one of"),
        ("few_shot", table(contexts=1, perturbations=("A",), doses=(1.0,)), "two batches .* 2 perturbed"),
        ("unseen_cell", table(), "choose one of 'unseen_batch'"),
    ],
)
def test_impossible_splits_say_why(name, labels, message):
    with pytest.raises(SplitError, match=message):
        make_split(labels, name)


def test_fraction_must_be_a_share():
    with pytest.raises(SplitError, match="between 0 and 1"):
        make_split(table(), "unseen_batch", fraction=1.0)


def test_a_leak_is_named():
    labels = table()
    split = make_split(labels, "unseen_batch")
    with pytest.raises(LeakError, match=split.held_out[3].replace("|", r"\|")):
        check_no_leak(split, [*labels.index[training_mask(split, labels)], split.held_out[3]])


def test_hash_detects_other_data():
    labels = table()
    split = make_split(labels, "unseen_pair")
    changes = {
        "cells": labels.assign(num_cells=labels["num_cells"] + (np.arange(len(labels)) == 7)),
        "kind": labels.assign(is_control=labels["is_control"] | (np.arange(len(labels)) == 7)),
        "name": labels.rename(index={labels.index[7]: "other"}),
        "fewer": labels.drop(labels.index[7]),
    }
    for change in changes.values():
        assert labels_hash(change) != labels_hash(labels)
        with pytest.raises(SplitError, match="other data"):
            check_same_data(split, change)
    with pytest.raises(SplitError, match="which are not here"):
        check_same_data(split, labels.drop(split.held_out[0]))
    assert labels_hash(labels.iloc[::-1]) == labels_hash(labels)


@pytest.mark.parametrize("text", ["", "{}", "[1]", '{"name": "unseen_batch"}'])
def test_files_that_are_no_split(text, tmp_path):
    (tmp_path / "split.json").write_text(text)
    with pytest.raises(SplitError, match=r"split\.json.*hilbertcell split"):
        Split.load(tmp_path / "split.json")
    with pytest.raises(SplitError, match="hilbertcell split"):
        Split.load(tmp_path / "absent.json")
