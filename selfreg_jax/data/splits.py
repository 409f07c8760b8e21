"""Which case goes into which split, and the folds of a cross-validation.

Cases of one group (as a rule the patient) stay together: two slides or two phases of one patient look alike, and a
network that has seen one of them is not tested by the other.
"""

import collections
import fnmatch
import itertools
import pathlib
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from selfreg_jax.data.datasets import listed, read_json
from selfreg_jax.data.manifest import SPLITS
from selfreg_jax.errors import UserError


def choose_splits(
  ids: Sequence[str],
  groups: Mapping[str, str] | None = None,
  *,
  folder_val_ids: Sequence[str] = (),
  folder_test_ids: Sequence[str] = (),
  val_cases: Sequence[str] | None = None,
  test_cases: Sequence[str] | None = None,
  val_fraction: float = 0.2,
  test_fraction: float = 0.0,
  seed: int = 0,
) -> dict[str, tuple[str, ...]]:
  """Deals the cases out to train, val and test without parting a group.

  Only the splits that the source folder itself marks may part groups, since they are not ours: see `notes_on_test`.

  Args:
    ids: all case ids.
    groups: case id -> group; a case that is not in it is a group of its own.
    folder_val_ids: ids that the source folder marks as validation cases, taken instead of a draw; `val_cases` replaces
      them.
    folder_test_ids: ids that the source folder marks as test cases; they stay so.
    val_cases: ids or shell patterns of the validation cases; None draws `val_fraction` of the training groups.
    test_cases: ids or shell patterns of further test cases; None draws `test_fraction` of the groups that are left.
    val_fraction: share of the groups of training cases, at least one group where there are two or more; 0 for none.
    test_fraction: the same for the test cases.
    seed: of the draws.

  Returns:
    Sorted case ids for each of `SPLITS`.

  Raises:
    UserError: a pattern matches no case, a case would be in two splits, or a group would be parted.
  """
  groups = _complete(ids, groups)
  rng = np.random.default_rng(seed)
  named_val = _match(ids, val_cases or (), "--val_cases")
  test = {*folder_test_ids, *_match(ids, test_cases or (), "--test_cases")}
  if both := sorted(named_val & test):
    raise UserError(f"case(s) in two splits, val and test: {listed(both)}")
  if test_cases is None:
    test |= _draw({*ids} - named_val - {*folder_val_ids} - test, groups, test_fraction, rng)
  if val_cases is None and folder_val_ids:
    val = {*folder_val_ids} - test
  else:
    val = named_val if val_cases is not None else _draw({*ids} - test, groups, val_fraction, rng)
  train = {*ids} - val - test
  splits = {name: tuple(sorted(split)) for name, split in zip(SPLITS, (train, val, test), strict=True)}
  flags = {"--val_cases": val_cases, "--test_cases": test_cases}
  exempt = (*folder_test_ids, *(folder_val_ids if val_cases is None else ()))
  _check_whole(splits, groups, exempt, " and ".join(flag for flag, cases in flags.items() if cases))
  return splits


def read_splits(
  path: pathlib.Path,
  ids: Sequence[str],
  groups: Mapping[str, str] | None = None,
  *,
  folder_test_ids: Sequence[str] = (),
) -> dict[str, tuple[str, ...]]:
  """Reads {"train": [ids], "val": [ids], "test": [ids]}; a split that is left out is empty.

  Args:
    path: the file.
    ids: all case ids.
    groups: case id -> group; a case that is not in it is a group of its own.
    folder_test_ids: ids that the source folder marks as test cases: where the file leaves them there, they may part
      groups.

  Returns:
    Sorted case ids for each of `SPLITS`.

  Raises:
    UserError: the file is something else, names unknown cases, names a case twice, leaves a case out or parts a group.
  """
  content = read_json(path)
  if unknown := sorted(set(content) - set(SPLITS)):
    raise UserError(f"{path}: {listed(unknown)} is no split; the splits are {', '.join(SPLITS)}")
  splits = {name: content.get(name, []) for name in SPLITS}
  for name, split in splits.items():
    if not isinstance(split, list) or not all(isinstance(case_id, str) for case_id in split):
      raise UserError(f"{path}: {name!r} is not a list of case ids")
  named = sorted(itertools.chain.from_iterable(splits.values()))
  mistakes = {
    "unknown case(s)": sorted({*named} - {*ids}),
    "case(s) named twice": sorted(
      {case_id for case_id, following in itertools.pairwise(named) if case_id == following}
    ),
    "case(s) in no split": sorted({*ids} - {*named}),
  }
  if found := [f"{what}: {listed(cases)}" for what, cases in mistakes.items() if cases]:
    raise UserError(f"{path}: " + "; ".join(found))
  splits = {name: tuple(sorted(split)) for name, split in splits.items()}
  _check_whole(splits, _complete(ids, groups), {*folder_test_ids} & {*splits["test"]}, str(path))
  return splits


def choose_folds(
  ids: Sequence[str], groups: Mapping[str, str] | None, folds: int, seed: int
) -> tuple[tuple[str, ...], ...]:
  """Deals whole groups out into folds of nearly equal numbers of cases, each case into exactly one.

  The groups are shuffled and dealt out largest first, each into the fold with the fewest cases so far. The folds' sizes
  then differ by no more than the largest group.

  Args:
    ids: the case ids to deal out.
    groups: case id -> group; a case that is not in it is a group of its own.
    folds: number of folds, 2 or more.
    seed: of the shuffle.

  Returns:
    The sorted case ids of each fold.

  Raises:
    UserError: there are fewer groups than folds, or fewer than two folds are asked for.
  """
  if folds < 2:
    raise UserError(f"--folds={folds}: a cross-validation needs at least 2")
  members = _by_group(ids, _complete(ids, groups))
  if len(members) < folds:
    raise UserError(
      f"--folds={folds}: there are only {len(members)} group(s) that can be dealt out whole ({len(ids)} case(s)); "
      "give fewer folds"
    )
  names = sorted(members)
  shuffled = [names[index] for index in np.random.default_rng(seed).permutation(len(names))]
  dealt: list[list[str]] = [[] for _ in range(folds)]
  for name in sorted(shuffled, key=lambda name: -len(members[name])):
    min(dealt, key=len).extend(members[name])
  return tuple(tuple(sorted(fold)) for fold in dealt)


def notes_on_test(splits: Mapping[str, Sequence[str]], groups: Mapping[str, str]) -> tuple[str, ...]:
  """What to know of a test set that the archive itself has cut: which groups it shares with the other cases.

  Args:
    splits: case ids for each of `SPLITS`.
    groups: case id -> group; a case that is not in it is a group of its own.

  Returns:
    One line, or none where every group is whole.
  """
  groups = _complete(itertools.chain.from_iterable(splits.values()), groups)
  test = {groups[case_id] for case_id in splits["test"]}
  rest = {groups[case_id] for name in ("train", "val") for case_id in splits[name]}
  if not (shared := sorted(test & rest)):
    return ()
  cases = sum(groups[case_id] in shared for case_id in splits["test"])
  return (
    f"{cases} of {len(splits['test'])} test case(s) share a group (the patient) with cases that are trained on: "
    f"{listed(shared)}. It is the archive's own test set; scores on it flatter",
  )


def _complete(ids: Iterable[str], groups: Mapping[str, str] | None) -> dict[str, str]:
  return {case_id: (groups or {}).get(case_id, case_id) for case_id in ids}


def _by_group(ids: Iterable[str], groups: Mapping[str, str]) -> dict[str, list[str]]:
  members = collections.defaultdict(list)
  for case_id in sorted(ids):
    members[groups[case_id]].append(case_id)
  return members


def _match(ids: Iterable[str], patterns: Iterable[str], flag: str) -> set[str]:
  matched = {pattern: {*fnmatch.filter(ids, pattern), *({pattern} & {*ids})} for pattern in patterns}
  if unknown := [pattern for pattern, found in matched.items() if not found]:
    raise UserError(f"{flag}: no case is called {listed(unknown)}; the cases are {listed(sorted(ids))}")
  return set().union(*matched.values())


def _draw(ids: Iterable[str], groups: Mapping[str, str], fraction: float, rng: np.random.Generator) -> set[str]:
  """The cases of a share of the groups."""
  members = _by_group(ids, groups)
  names = sorted(members)
  if fraction == 0 or len(names) < 2:
    return set()
  count = min(max(1, round(fraction * len(names))), len(names) - 1)
  return {case_id for index in rng.permutation(len(names))[:count] for case_id in members[names[index]]}


def _check_whole(
  splits: Mapping[str, Sequence[str]], groups: Mapping[str, str], exempt: Iterable[str], where: str
) -> None:
  """Raises UserError if cases of one group, the exempt ones aside, are in several splits."""
  exempt = {*exempt}
  parts = collections.defaultdict(dict)
  for name in SPLITS:
    for group, members in _by_group({*splits[name]} - exempt, groups).items():
      parts[group][name] = members
  parted = [
    f"{group}: " + "; ".join(f"{name} {listed(members)}" for name, members in by_split.items())
    for group, by_split in sorted(parts.items())
    if len(by_split) > 1
  ]
  if parted:
    raise UserError(
      f"{where}: {len(parted)} group(s) of cases that belong together (one patient) would be parted; put all cases of "
      "a group into one split:\n  " + "\n  ".join(parted)
    )
