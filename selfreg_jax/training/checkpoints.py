"""Checkpoints of a workdir with Orbax: the latest and the best, each one unit of state, config and checksums."""

import dataclasses
import os
import pathlib
import zlib
from typing import Any

import flax.linen as nn
import jax
import ml_collections
import numpy as np
import orbax.checkpoint as ocp
from jax.sharding import Mesh
from orbax.checkpoint import checkpoint_managers

from selfreg_jax import config as configs
from selfreg_jax import mesh as meshes
from selfreg_jax.data.manifest import DatasetInfo, Manifest
from selfreg_jax.errors import UserError
from selfreg_jax.models.factory import abstract_variables, build_model
from selfreg_jax.training.early_stopping import BestSoFar
from selfreg_jax.training.step import TrainState

METRIC = "val_dice"
FOLDER = "checkpoints"


class Checkpoints:
  """The checkpoints of one workdir.

  A checkpoint holds the items "variables" (parameters and running statistics: all that prediction needs), "training"
  (optimizer state, step, key; the position in the data is the step), "config", "dataset" (what prediction must know of
  the training data, and their fingerprint), "best" (the best validation so far) and "checksums" (a CRC-32 per array,
  because Orbax restores flipped bytes without a word). It is complete in itself: nothing else in the workdir is needed
  to use it.
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
    best: BestSoFar,
  ) -> None:
    """Saves in the background; only the latest and the best checkpoint are kept.

    Args:
      state: to save; its step names the checkpoint.
      config: of the run.
      manifest: of the prepared dataset.
      val_dice: mean foreground Dice on the validation cases, if validated.
      best: the best validation so far, this one included.
    """
    metrics = None if val_dice is None else {METRIC: val_dice}
    dataset, fingerprint = DatasetInfo.of(manifest), manifest.fingerprint()
    self._save(int(state.step), _items(state), config, dataset, fingerprint, metrics, best)

  def save_weights(self, variables: dict[str, Any], config: ml_collections.ConfigDict, dataset: DatasetInfo) -> None:
    """Saves weights that were not trained here, as step 0: enough to predict with or start from, not to continue.

    Args:
      variables: {"params": ..., "batch_stats": ...}.
      config: with the network and the image size that they belong to.
      dataset: what prediction must know of the data that they were trained on.
    """
    self._save(0, {"variables": variables}, config, dataset, fingerprint=None, metrics=None, best=BestSoFar())

  def can_continue(self, step: int) -> bool:
    """Whether training can go on from a checkpoint: one of `save_weights` has no state of an optimizer."""
    return self.dataset(step)[1] is not None

  def _save(
    self,
    step: int,
    items: dict[str, Any],
    config: ml_collections.ConfigDict,
    dataset: DatasetInfo,
    fingerprint: str | None,
    metrics: dict[str, float] | None,
    best: BestSoFar,
  ) -> None:
    arguments = {name: ocp.args.StandardSave(item) for name, item in items.items()}
    arguments["config"] = ocp.args.JsonSave(configs.to_json(config))
    arguments["dataset"] = ocp.args.JsonSave({**dataclasses.asdict(dataset), "fingerprint": fingerprint})
    arguments["best"] = ocp.args.JsonSave(best.to_json())
    arguments["checksums"] = ocp.args.JsonSave({name: _checksums(item) for name, item in items.items()})
    if not self._manager.save(step, args=ocp.args.Composite(**arguments), metrics=metrics):
      raise RuntimeError(f"Orbax refused to save step {step}: the newest checkpoint is {self.latest_step()}")

  def config(self, step: int) -> ml_collections.ConfigDict:
    """The config that a checkpoint was trained with."""
    return configs.from_json(self._read(step, "config"))

  def dataset(self, step: int) -> tuple[DatasetInfo, str | None]:
    """What is known of the dataset that a checkpoint was trained on, and its fingerprint; None if not trained here."""
    content = dict(self._read(step, "dataset"))
    fingerprint = content.pop("fingerprint")
    return DatasetInfo.from_json(content), fingerprint

  def best_so_far(self, step: int) -> BestSoFar:
    """The best validation of the run up to a checkpoint."""
    return BestSoFar(**self._read(step, "best"))

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


@dataclasses.dataclass(frozen=True)
class Trained:
  """A network as a checkpoint holds it, ready to predict.

  Attributes:
    config: that it was trained with.
    dataset: what prediction must know of the data that it was trained on.
    model: the Linen module.
    variables: its variables, a copy on every device of `mesh`.
    mesh: the devices.
    step: of the checkpoint; 0 for weights that were not trained here.
    val_dice: mean foreground Dice of the checkpoint on the validation cases; None where there were none.
  """

  config: ml_collections.ConfigDict
  dataset: DatasetInfo
  model: nn.Module
  variables: dict[str, Any]
  mesh: Mesh
  step: int
  val_dice: float | None


def load_trained(workdir: str | os.PathLike, *, checkpoint: str = "best") -> Trained:
  """Restores the network of a workdir on this process's devices.

  Args:
    workdir: of `train.py` or of `selfreg_jax.models.pretrained`.
    checkpoint: "best" (by validation Dice; the newest where none was validated) or "latest".

  Returns:
    The network.

  Raises:
    UserError: no workdir of a run, or no checkpoint in it yet, or a damaged one.
  """
  if checkpoint not in ("best", "latest"):
    raise ValueError(f"checkpoint must be 'best' or 'latest', got {checkpoint!r}")
  if not pathlib.Path(workdir, FOLDER).is_dir():
    raise UserError(f"{workdir}: not the workdir of a training run (it has no folder {FOLDER})")
  with Checkpoints(workdir, read_only=True) as checkpoints:
    step = checkpoints.best_step() if checkpoint == "best" else checkpoints.latest_step()
    if step is None:
      raise UserError(f"{workdir}: no checkpoint yet; train.py writes the first one at its first validation")
    config, (dataset, _) = checkpoints.config(step), checkpoints.dataset(step)
    model = build_model(config.model, len(dataset.classes))
    mesh = meshes.make_mesh(jax.local_devices())
    abstract = meshes.replicated_like(abstract_variables(model, config.data.image_size, dataset.channels), mesh)
    variables = checkpoints.restore_variables(step, abstract)
    return Trained(config, dataset, model, variables, mesh=mesh, step=step, val_dice=checkpoints.metric(step))


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
