"""Means over cases and paired differences of what was measured, with bootstrap intervals."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from selfreg_jax.analysis.measuring import Key
from selfreg_jax.evaluation import protocols

Values = Mapping[str, Mapping[Key, float]]  # case id -> what was measured on it


def means(
  values: Values, pooled: Mapping[Key, float], *, resamples: int = 10_000, seed: int = 0
) -> list[dict[str, Any]]:
  """Means over cases with 95 % percentile intervals over resamples of the cases.

  Args:
    values: of every case, the same keys.
    pooled: key -> value over all cases together, of some keys.
    resamples: number of bootstrap resamples.
    seed: of the resampling.

  Returns:
    For each key {"block", "quantity", "class", "mean", "interval", "n"} and, where there is one, "pooled"; None stands
    for what is undefined. Cases in which a value is undefined do not count.
  """
  keys, table = _table(values)
  rows = _rows(keys, table, resamples, seed, "mean")
  for key, row in zip(keys, rows, strict=True):
    if key in pooled:
      row["pooled"] = protocols.json_number(pooled[key])
  return rows


def differences(ours: Values, other: Values, *, resamples: int = 10_000, seed: int = 0) -> list[dict[str, Any]]:
  """Paired differences over cases, ours less other, with intervals as of `means`.

  Args:
    ours: of every case, the same keys.
    other: of another run, on the same cases, the same keys.
    resamples: number of bootstrap resamples.
    seed: of the resampling.

  Returns:
    For each key {"block", "quantity", "class", "ours", "other", "difference", "interval", "n"}; a case counts where the
    value is defined in both.
  """
  keys, first = _table(ours)
  other_keys, second = _table({case_id: other[case_id] for case_id in ours})
  if keys != other_keys:
    raise ValueError("the two runs were not measured by the same quantities")
  paired = ~np.isnan(first) & ~np.isnan(second)
  rows = _rows(keys, first - second, resamples, seed, "difference")
  for name, table in (("ours", first), ("other", second)):
    for row, value in zip(rows, protocols.mean_scored(np.where(paired, table, np.nan), axis=0), strict=True):
      row[name] = protocols.json_number(value)
  return rows


def _table(values: Values) -> tuple[list[Key], np.ndarray]:
  keys = list(next(iter(values.values())))
  return keys, np.array([[case[key] for key in keys] for case in values.values()], np.float64)


def _rows(keys: list[Key], table: np.ndarray, resamples: int, seed: int, name: str) -> list[dict[str, Any]]:
  samples = protocols.bootstrap_means(table[:, :, None], resamples=resamples, seed=seed)[:, :, 0]
  numbers = (~np.isnan(table)).sum(axis=0)
  rows = []
  for index, (key, mean) in enumerate(zip(keys, protocols.mean_scored(table, axis=0), strict=True)):
    rows.append(
      dict(zip(("block", "quantity", "class"), key, strict=True))
      | {
        name: protocols.json_number(mean),
        "interval": protocols.interval(samples[:, index], numbers[index]),
        "n": int(numbers[index]),
      }
    )
  return rows


def find(rows: list[dict[str, Any]], block: str, quantity: str, class_name: str = "") -> dict[str, Any]:
  """The row of a key."""
  key = (block, quantity, class_name)
  return next(row for row in rows if (row["block"], row["quantity"], row["class"]) == key)
