"""Checkpoints of a workdir with Orbax: the latest and the best, each one unit of state, config and checksums."""

import dataclasses
import os
import pathlib
import zlib
from typing import Any

import jax
import ml_collections
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers

from selfreg_jax import config as configs
from selfreg_jax.data.manifest import DatasetInfo, Manifest
from selfreg_jax.errors import UserError
from selfreg_jax.training.step import TrainState

METRIC = "val_dice"
FOLDER = "checkpoints"


class Checkpoints:
  """The checkpoints of one workdir.

  A checkpoint holds the items "variables" (parameters and running statistics: all that prediction needs), "training"
  (optimizer state, step, key; the position in the data is the step), "config", "dataset" (what prediction must know of
  the training data, and their fingerprint) and "checksums" (a CRC-32 per array, because Orbax restores flipped bytes
  without a word). It is complete in itself: nothing else in the workdir is needed to use it.
  """

  def __init__(self, workdir: str | os.PathLike, *, read_only: bool = False):
    self._directory = pathlib.Path(workdir).absolute() / FOLDER
    policy = checkpoint_managers.AnyPreservationPolicy(
      [
        checkpoint_managers.LatestN(1),
        checkpoint_managers.BestN(get_metric_fn=_metric, n=1, keep_checkpoints_without_metrics=False),
      ]
    )
    options = ocp.CheckpointManagerOptions(
      preservation_policy=policy,
      best_fn=_metric,
      cleanup_tmp_directories=not read_only,
      read_only=read_only,
      create=not read_only,
    )
    self._manager = ocp.CheckpointManager(self._directory, options=options)

  def latest_step(self) -> int | None:
    """Step of the newest checkpoint; None if there is none."""
    return self._manager.latest_step()

  def best_step(self) -> int | None:
    """Step of the checkpoint with the best validation Dice; the newest one where none was validated."""
    best = self._manager.best_step()
    return self.latest_step() if best is None else best

  def metric(self, step: int) -> float | None:
    """Mean foreground Dice on the validation cases at a step; None where there was no validation."""
    metrics = self._manager.metrics(step)
    return None if metrics is None else _metric(metrics)

  def save(
    self,
    state: TrainState,
    config: ml_collections.ConfigDict,
    manifest: Manifest,
    *,
    val_dice: float | None = None,
  ) -> None:
    """Saves in the background; only the latest and the best checkpoint are kept.

    Args:
      state: to save; its step names the checkpoint.
      config: of the run.
      manifest: of the prepared dataset.
      val_dice: mean foreground Dice on the validation cases, if validated.
    """
    step = int(state.step)
    items = _items(state)
    dataset = {**dataclasses.asdict(DatasetInfo.of(manifest)), "fingerprint": manifest.fingerprint()}
    saved = self._manager.save(
      step,
      args=ocp.args.Composite(
        variables=ocp.args.StandardSave(items["variables"]),
        training=ocp.args.StandardSave(items["training"]),
        config=ocp.args.JsonSave(configs.to_json(config)),
        dataset=ocp.args.JsonSave(dataset),
        checksums=ocp.args.JsonSave({name: _checksums(item) for name, item in items.items()}),
      ),
      metrics=None if val_dice is None else {METRIC: val_dice},
    )
    if not saved:
      raise RuntimeError(f"Orbax refused to save step {step}: the newest checkpoint is {self.latest_step()}")

  def config(self, step: int) -> ml_collections.ConfigDict:
    """The config that a checkpoint was trained with."""
    return configs.from_json(self._read(step, "config"))

  def dataset(self, step: int) -> tuple[DatasetInfo, str]:
    """What is known of the dataset that a checkpoint was trained on, and its fingerprint."""
    content = dict(self._read(step, "dataset"))
    fingerprint = content.pop("fingerprint")
    return DatasetInfo.from_json(content), fingerprint

  def restore(self, step: int, abstract_state: TrainState) -> TrainState:
    """Restores everything, bit for bit.

    Args:
      step: of the checkpoint.
      abstract_state: shapes, dtypes and shardings of the state.

    Returns:
      The state as it was saved.

    Raises:
      UserError: the checkpoint is damaged or of another network.
    """
    items = self._restore(step, _items(abstract_state))
    return abstract_state.replace(**items["variables"], **items["training"])

  def restore_variables(self, step: int, abstract_variables: dict[str, Any]) -> dict[str, Any]:
    """Restores parameters and running statistics only; see `restore`."""
    return self._restore(step, {"variables": abstract_variables})["variables"]

  def wait(self) -> None:
    """Blocks until everything is on disk."""
    self._manager.wait_until_finished()

  def __enter__(self) -> "Checkpoints":
    return self

  def __exit__(self, *exception) -> None:
    # Waits for what is being written, also when the run ends in an error: a checkpoint taken is a checkpoint kept.
    self._manager.close()

  def _read(self, step: int, item: str) -> dict[str, Any]:
    return self._restore_items(step, {item: ocp.args.JsonRestore()})[item]

  def _restore_items(self, step: int, args: dict[str, Any]) -> Any:
    try:
      return self._manager.restore(step, args=ocp.args.Composite(**args))
    except Exception as error:  # Orbax raises bare and undocumented types for damaged files and for other networks
      reason = (str(error).splitlines() or [type(error).__name__])[0]
      others = [other for other in self._manager.all_steps() if other != step]
      hint = f"; remove the folder to go on from step {max(others)}" if others else ""
      raise UserError(
        f"{self._directory / str(step)}: cannot be restored; it is damaged or of another network ({reason}){hint}"
      ) from error

  def _restore(self, step: int, abstract_items: dict[str, Any]) -> dict[str, Any]:
    path = self._directory / str(step)
    expected = self._read(step, "checksums")
    restored = self._restore_items(step, {n: ocp.args.StandardRestore(item) for n, item in abstract_items.items()})
    items = {name: restored[name] for name in abstract_items}
    for name, item in items.items():
      damaged = sorted(set(_checksums(item).items()) ^ set(expected[name].items()))
      if damaged:
        names = ", ".join(dict(damaged))
        raise UserError(f"{path}: the values of {names} differ from what was saved; the file is damaged")
    return items


def _metric(metrics: Any) -> float:
  return metrics[METRIC]


def _items(state: TrainState) -> dict[str, Any]:
  return {
    "variables": {"params": state.params, "batch_stats": state.batch_stats},
    "training": {
      "step": state.step,
      "opt_state": state.opt_state,
      "key": state.key,
      "nonfinite_step": state.nonfinite_step,
    },
  }


def _checksums(tree: Any) -> dict[str, str]:
  def checksum(leaf: jax.Array) -> str:
    data = jax.random.key_data(leaf) if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf
    return f"{zlib.crc32(np.ascontiguousarray(jax.device_get(data))):08x}"

  return {jax.tree_util.keystr(path): checksum(leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}
