"""What an ablation compares, written down in an ml_collections config and checked before any compute.

Config files import this module: it does not import JAX.
"""

import dataclasses
import itertools
import json
import pathlib
import re
import runpy
from collections.abc import Mapping, Sequence
from typing import Any

import ml_collections

from selfreg_jax import config as configs
from selfreg_jax.errors import UserError

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.,=+-]*")  # names become folders
_FIELDS = ("run", "variants", "grid", "seeds", "reference", "split")
_SPLITS = ("train", "val", "test")
_ORDER_SEED = 0  # not one of `seeds`: a grid may be dealt to several commands by its seeds


@dataclasses.dataclass(frozen=True)
class Run:
  """One training of an ablation.

  Attributes:
    variant: its name.
    seed: of the run.
    config: complete config of the run.
  """

  variant: str
  seed: int
  config: ml_collections.ConfigDict

  @property
  def name(self) -> str:
    """VARIANT/seed_S: for people, and its folder under DIR/runs."""
    return f"{self.variant}/seed_{self.seed}"


@dataclasses.dataclass(frozen=True)
class Design:
  """A whole ablation.

  Attributes:
    variants: name -> the fields that the variant changes.
    seeds: of every variant.
    reference: name of the variant that the others are compared with.
    split: whose cases are scored.
    runs: one for each variant and seed: all variants of the first seed, then those of the next one.
  """

  variants: dict[str, dict[str, Any]]
  seeds: tuple[int, ...]
  reference: str
  split: str
  runs: tuple[Run, ...]


def ablation_config(
  run: ml_collections.ConfigDict,
  *,
  variants: Mapping[str, Mapping[str, Any]] | None = None,
  grid: Mapping[str, Sequence[Any]] | None = None,
  seeds: Sequence[int] = (0, 1, 2),
  reference: str,
  split: str = "test",
) -> ml_collections.ConfigDict:
  """The config of an ablation, as a file of `configs/ablation_*.py` returns it.

  Args:
    run: complete config of a run, such as another config file gives.
    variants: name -> {dotted field: value}, what the variant changes in `run`.
    grid: dotted field -> values; their product is tried with each variant, or alone where there are no variants. Its
      points are named after the last part of the fields: "scr_weight=0.01,ifd_weight=0.1".
    seeds: each variant is trained with each of them.
    reference: name of the variant that the others are compared with.
    split: "test", "val" or "train": whose cases are scored.

  Returns:
    The config; `--config.run.data.dir=...` and the like override it. Its `variants` and `grid` are tuples of pairs,
    because field names with dots cannot be names of a ConfigDict.
  """
  config = ml_collections.ConfigDict()
  config.run = run
  config.variants = tuple((name, tuple(changes.items())) for name, changes in (variants or {}).items())
  config.grid = tuple((field, tuple(values)) for field, values in (grid or {}).items())
  config.seeds = tuple(seeds)
  config.reference = reference
  config.split = split
  return config


def load_run(beside: str, name: str) -> ml_collections.ConfigDict:
  """The config of a run that another config file gives.

  Args:
    beside: path of a file in the same folder: `__file__` of the one that asks.
    name: of the other file without `.py`, and behind a colon what that one takes: "glas_unet", "folder:swin".

  Returns:
    The config.

  Raises:
    UserError: there is no such file, or it gives an ablation.
  """
  folder = pathlib.Path(beside).parent
  file_name, _, argument = name.partition(":")
  path = folder / f"{file_name}.py"
  if not path.is_file():
    known = sorted(other.stem for other in folder.glob("*.py") if not other.stem.startswith("ablation"))
    raise UserError(
      f"{pathlib.Path(beside).name}:{name}: there is no {path}; beside {pathlib.Path(beside).name}, where it is looked "
      f"for, there are {', '.join(known)}"
    )
  config = runpy.run_path(str(path))["get_config"](*([argument] if argument else []))
  if "variants" in config:
    raise UserError(f"{pathlib.Path(beside).name}:{name}: is an ablation itself, not a run")
  return config


def expand(config: ml_collections.ConfigDict) -> Design:
  """All runs of an ablation, each with a config that was checked.

  The order of the stream of slices is the same in all runs (`data.order_seed`, unless a variant changes it: that of
  `run`, or 0), so that variants differ in nothing but what they change, and can share batches.

  Args:
    config: of the ablation, as `ablation_config` makes it.

  Returns:
    The design.

  Raises:
    UserError: all that is wrong, a line each.
  """
  _check(config)
  variants = _with_grid(dict(config.variants), dict(config.grid))
  problems = [
    f"variant {name!r}: names hold letters, digits and _ . , = + - only"
    for name in variants
    if not _NAME.fullmatch(name)
  ]
  if config.reference not in variants:
    problems.append(f"reference = {config.reference!r} is none of the variants {', '.join(variants)}")
  made_of, twins = {}, {}
  for name, changes in variants.items():
    try:
      made = _variant_config(config.run, changes)
      configs.validate(made)
    except UserError as error:
      problems.append(f"variant {name!r}: {error}")
      continue
    twin = twins.setdefault(json.dumps(configs.flatten(made), sort_keys=True), name)
    if twin != name:
      problems.append(f"variants {twin!r} and {name!r} are the same config")
    made_of[name] = made
  if problems:
    raise UserError("the ablation cannot be run:\n  " + "\n  ".join(problems))
  return Design(
    variants=variants,
    seeds=tuple(config.seeds),
    reference=config.reference,
    split=config.split,
    runs=tuple(_run(seed, name, made) for seed in config.seeds for name, made in made_of.items()),
  )


def _check(config: ml_collections.ConfigDict) -> None:
  """Raises UserError unless the config has the form of an ablation's."""
  if {"model", "loss"} <= set(config):
    raise UserError(
      "--config: is the config of a run, not that of an ablation; name an ablation and behind a colon what it is of: "
      "--config=configs/ablation_terms.py:glas_narrow"
    )
  unknown = sorted(set(config) - set(_FIELDS)) + [name for name in _FIELDS if name not in config]
  if unknown:
    raise UserError(
      f"--config: not the config of an ablation ({', '.join(unknown)} unknown or missing); build it with "
      "selfreg_jax.analysis.ablation.design.ablation_config"
    )
  seeds = config.seeds
  if not seeds or len(set(seeds)) < len(seeds) or not all(isinstance(seed, int) for seed in seeds):
    raise UserError(f"config.seeds = {tuple(seeds)!r}: one or more whole numbers are needed, none of them twice")
  if config.split not in _SPLITS:
    raise UserError(f"config.split = {config.split!r} must be one of {', '.join(_SPLITS)}")
  if not config.variants and not config.grid:
    raise UserError("config.variants and config.grid are both empty: there is nothing to compare")
  for field, values in config.grid:
    if not isinstance(values, tuple) or not values:
      raise UserError(f"config.grid: {field} has no values")
    names = [_short(value) for value in values]
    for value, name in zip(values, names, strict=True):
      if names.count(name) > 1:
        raise UserError(f"config.grid: {field} has {value!r} twice, or another value that is called {name!r} too")
  if config.run.seed:
    raise UserError(f"config.run.seed = {config.run.seed}: runs take their seeds from config.seeds; leave it 0")


def _with_grid(
  variants: Mapping[str, Sequence[tuple[str, Any]]], grid: Mapping[str, Sequence[Any]]
) -> dict[str, dict[str, Any]]:
  """Each variant with each point of the grid."""
  if not grid:
    return {name: dict(changes) for name, changes in variants.items()}
  points = [dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())]
  named = {",".join(f"{field.split('.')[-1]}={_short(v)}" for field, v in point.items()): point for point in points}
  if not variants:
    return named
  return {
    f"{name}+{point_name}": dict(changes) | point
    for (name, changes), (point_name, point) in itertools.product(variants.items(), named.items())
  }


def _short(value: Any) -> str:
  """A value as part of a name, which becomes a folder."""
  text = "-".join(map(str, value)) if isinstance(value, tuple | list) else str(value)
  return re.sub(r"[^A-Za-z0-9_.,=+-]+", "-", text).strip("-") if isinstance(value, str) else text


def _variant_config(run: ml_collections.ConfigDict, changes: Mapping[str, Any]) -> ml_collections.ConfigDict:
  """The config of a run with a variant's changes; raises UserError where a field does not exist."""
  if "seed" in changes:
    raise UserError("seed: is set by the ablation's own field `seeds`")
  config = run.copy_and_resolve_references()
  with config.ignore_type(), config.unlocked():
    network = changes.get("model.name", config.model.name)
    if network != config.model.name and network in configs.NETWORKS:
      config.model = configs.base_config(network).model
    if config.data.order_seed < 0:
      config.data.order_seed = _ORDER_SEED
    fields = configs.flatten(config)
    unknown = [field for field in changes if field not in fields]
    if unknown:
      raise UserError("; ".join(f"there is no field {field} ({_nearest(field, config)})" for field in unknown))
    for field, value in changes.items():
      *path, last = field.split(".")
      section = config
      for part in path:
        section = section[part]
      section[last] = tuple(value) if isinstance(value, list) else value
  return config


def _nearest(field: str, config: ml_collections.ConfigDict) -> str:
  section, _, _ = field.rpartition(".")
  there = [name for name in configs.flatten(config) if name.rpartition(".")[0] == section]
  return (
    f"there are {', '.join(there)}"
    if there
    else "sections are "
    + ", ".join(name for name, value in config.items() if isinstance(value, ml_collections.ConfigDict))
  )


def _run(seed: int, name: str, config: ml_collections.ConfigDict) -> Run:
  config = config.copy_and_resolve_references()
  config.seed = seed
  if config.data.order_seed < 0:  # a variant says so; written down, lest runs of several orders share their batches
    config.data.order_seed = seed
  return Run(name, seed, config)
