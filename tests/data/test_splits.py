"""Splits and folds: every case once, no group parted, the same for the same seed."""

import collections
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from selfreg_jax.data import splits
from selfreg_jax.data.manifest import SPLITS
from selfreg_jax.errors import UserError

IDS = tuple(f"c{index}" for index in range(10))
PATIENTS = {f"c{index}": f"p{index // 2}" for index in range(10)}  # two cases each

# Case ids with the group of each; some are in no group of their own.
grouped = st.dictionaries(
  st.integers(0, 99).map("case_{:02d}".format), st.none() | st.sampled_from("PQRSTUVW"), min_size=1, max_size=40
).map(lambda groups: (sorted(groups), {case_id: group for case_id, group in groups.items() if group}))


def homes(parts, groups):
  """Group -> names of the parts that hold its cases."""
  found = collections.defaultdict(set)
  for name, ids in parts.items():
    for case_id in ids:
      found[groups.get(case_id, case_id)].add(name)
  return found


# Splits that are drawn.


def test_fractions_are_drawn_from_the_rest():
  dealt = splits.choose_splits(IDS, folder_test_ids=("c0", "c1"), seed=1)
  assert [len(dealt[name]) for name in SPLITS] == [6, 2, 2]
  assert dealt["test"] == ("c0", "c1")
  assert dealt == splits.choose_splits(IDS, folder_test_ids=("c0", "c1"), seed=1)
  assert any(dealt != splits.choose_splits(IDS, folder_test_ids=("c0", "c1"), seed=seed) for seed in range(2, 5))
  dealt = splits.choose_splits(IDS, test_fraction=0.3, val_fraction=0.0)
  assert [len(dealt[name]) for name in SPLITS] == [7, 0, 3]
  assert len(splits.choose_splits(("a", "b"))["val"]) == 1
  assert splits.choose_splits(("a",)) == {"train": ("a",), "val": (), "test": ()}
  assert len(splits.choose_splits(("a", "b"), val_fraction=0.99)["train"]) == 1


def test_fractions_count_groups():
  groups = dict.fromkeys(IDS[:6], "large") | {"c6": "small"}
  dealt = splits.choose_splits(IDS, groups, val_fraction=0.4)  # of 5 groups: large, small and three cases alone
  assert len(homes(dealt, groups)) == 5
  assert sum(parts == {"val"} for parts in homes(dealt, groups).values()) == 2


@given(grouped, st.floats(0, 0.99), st.floats(0, 0.99), st.integers(0, 99))
def test_no_group_is_ever_parted_and_every_case_is_dealt_once(cases, val_fraction, test_fraction, seed):
  ids, groups = cases
  options = {"val_fraction": val_fraction, "test_fraction": test_fraction, "seed": seed}
  dealt = splits.choose_splits(ids, groups, **options)
  assert sorted(case_id for name in SPLITS for case_id in dealt[name]) == ids
  assert all(list(dealt[name]) == sorted(dealt[name]) for name in SPLITS)
  assert all(len(parts) == 1 for parts in homes(dealt, groups).values())
  assert dealt["train"]
  assert dealt == splits.choose_splits(list(reversed(ids)), groups, **options)


@given(grouped, st.data())
def test_a_test_set_of_the_archive_stays_and_the_rest_of_its_groups_stays_whole(cases, data):
  ids, groups = cases
  own_test = data.draw(st.sets(st.sampled_from(ids)))
  dealt = splits.choose_splits(ids, groups, folder_test_ids=sorted(own_test), test_fraction=0.2)
  assert own_test <= {*dealt["test"]}
  rest = {name: {*dealt[name]} - own_test for name in SPLITS}
  assert all(len(parts) == 1 for parts in homes(rest, groups).values())
  shared = [group for group, parts in homes(dealt, groups).items() if "test" in parts and len(parts) > 1]
  notes = splits.notes_on_test(dealt, groups)
  assert len(notes) == bool(shared)
  assert all(group in notes[0] for group in shared[:8])


# Splits that are named.


def test_cases_can_be_named_or_matched():
  dealt = splits.choose_splits(IDS, val_cases=("c1", "c[23]"), test_cases=("c9",))
  assert dealt == {"train": ("c0", "c4", "c5", "c6", "c7", "c8"), "val": ("c1", "c2", "c3"), "test": ("c9",)}
  assert splits.choose_splits(IDS, val_cases=())["val"] == ()
  assert splits.choose_splits(("a[1]", "b"), val_cases=("a[1]",))["val"] == ("a[1]",)
  with pytest.raises(UserError, match="two splits, val and test: c1"):
    splits.choose_splits(IDS, val_cases=("c1",), test_cases=("c*",))
  with pytest.raises(UserError, match=r"--test_cases: no case is called x\*"):
    splits.choose_splits(IDS, test_cases=("c1", "x*"))


def test_named_cases_may_not_part_a_group():
  dealt = splits.choose_splits(IDS, PATIENTS, val_cases=("c2", "c3"), test_cases=("c8", "c9"))
  assert dealt["train"] == ("c0", "c1", "c4", "c5", "c6", "c7")
  with pytest.raises(UserError, match=r"--val_cases: 1 group.*\n  p1: train c3; val c2$"):
    splits.choose_splits(IDS, PATIENTS, val_cases=("c2",))
  with pytest.raises(UserError, match=r"--val_cases and --test_cases: 2 group.*\n  p1: val c2; test c3\n  p4: "):
    splits.choose_splits(IDS, PATIENTS, val_cases=("c2",), test_cases=("c3", "c8"))
  with pytest.raises(UserError, match=r"--test_cases: 1 group.*\n  p0: "):
    splits.choose_splits(IDS, PATIENTS, test_cases=("c0",))


def test_a_test_set_of_the_archive_that_parts_a_group_is_only_noted():
  dealt = splits.choose_splits(IDS, PATIENTS, folder_test_ids=("c0", "c8", "c9"))
  assert dealt["test"] == ("c0", "c8", "c9")
  (note,) = splits.notes_on_test(dealt, PATIENTS)
  assert note.startswith("1 of 3 test case(s)")
  assert "p0" in note
  assert "p4" not in note
  assert splits.notes_on_test(splits.choose_splits(IDS, PATIENTS, test_cases=("c8", "c9")), PATIENTS) == ()


# Splits from a file.


@pytest.mark.parametrize(
  ("content", "match"),
  [
    ({"train": ["a", "b"], "val": ["b"], "test": ["c"]}, r"named twice: b"),
    ({"train": ["a", "b", "z"], "val": ["c"]}, r"unknown case\(s\): z"),
    ({"train": ["a"], "val": ["c"]}, r"in no split: b"),
    ({"train": ["a", "b"], "valid": ["c"]}, "valid is no split"),
    ({"train": "abc"}, "not a list"),
    ([{"train": ["a"], "val": ["b"]}], "not an object"),
    ({"train": ["a", "c"], "val": ["b"]}, r"splits\.json: 1 group.*\n  twins: train a; val b$"),
  ],
)
def test_split_files_must_deal_out_each_case_once_and_each_group_whole(tmp_path, content, match):
  path = tmp_path / "splits.json"
  path.write_text(json.dumps(content))
  with pytest.raises(UserError, match=match):
    splits.read_splits(path, ("a", "b", "c"), {"a": "twins", "b": "twins"})


def test_a_split_file_may_keep_the_test_set_of_the_archive(tmp_path):
  path = tmp_path / "splits.json"
  path.write_text(json.dumps({"train": ["c"], "val": ["a"], "test": ["b"]}))
  twins = {"a": "twins", "b": "twins"}
  dealt = splits.read_splits(path, ("a", "b", "c"), twins, folder_test_ids=("b",))
  assert dealt == {"train": ("c",), "val": ("a",), "test": ("b",)}
  assert splits.notes_on_test(dealt, twins)
  with pytest.raises(UserError, match="twins: val a; test b"):
    splits.read_splits(path, ("a", "b", "c"), twins, folder_test_ids=("c",))


# Folds.


@given(grouped, st.integers(2, 8), st.integers(0, 99))
def test_folds_hold_whole_groups_every_case_once_and_nearly_equal_numbers(cases, number, seed):
  ids, groups = cases
  sizes = collections.Counter(groups.get(case_id, case_id) for case_id in ids)
  if len(sizes) < number:
    with pytest.raises(UserError, match=f"--folds={number}: there are only {len(sizes)} group"):
      splits.choose_folds(ids, groups, number, seed)
    return
  folds = splits.choose_folds(ids, groups, number, seed)
  assert len(folds) == number
  assert sorted(case_id for fold in folds for case_id in fold) == ids
  assert all(list(fold) == sorted(fold) for fold in folds)
  assert all(len(parts) == 1 for parts in homes(dict(enumerate(folds)), groups).values())
  lengths = [len(fold) for fold in folds]
  assert min(lengths) > 0
  assert max(lengths) - min(lengths) <= max(sizes.values())
  assert folds == splits.choose_folds(list(reversed(ids)), groups, number, seed)


def test_folds_of_single_cases_differ_by_one_at_most_and_with_the_seed():
  assert sorted(len(fold) for fold in splits.choose_folds(IDS, None, 4, 0)) == [2, 2, 3, 3]
  assert len({splits.choose_folds(IDS, None, 4, seed) for seed in range(5)}) > 1
  with pytest.raises(UserError, match="at least 2"):
    splits.choose_folds(IDS, None, 1, 0)
