"""Checkpoints of a workdir with Orbax: the latest and the best, each one unit of state, config and checksums.

A checkpoint is a folder `checkpoints/STEP` that holds the items "variables" (parameters and running statistics), "ema"
(their moving average, where one is kept), "training" (optimizer state, step, key; the position in the data is the
step), "config", "dataset" (what prediction must know of the training data, and their fingerprint), "best" (the best
validation so far) and "checksums" (a CRC-32 per array and document, because Orbax restores flipped bytes without a
word). It is complete in itself: nothing else in the workdir is needed to use it.

With several processes process 0 writes, which has it all, and every process reads for itself: they need not meet.
"""

import contextlib
import dataclasses
import functools
import json
import os
import pathlib
import shutil
import sys
import zlib
from collections.abc import Callable, Sequence
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
from selfreg_jax import processes
from selfreg_jax.data.manifest import DatasetInfo, Manifest
from selfreg_jax.errors import FaultError, UserError
from selfreg_jax.models.factory import abstract_variables, build_model
from selfreg_jax.training.early_stopping import BestSoFar
from selfreg_jax.training.step import TrainState

METRIC = "val_dice"
FOLDER = "checkpoints"
DAMAGED_FOLDER = "damaged_checkpoints"
# Checkpoints on their way out are moved here, inside of `checkpoints/`, before their files are deleted one by one: a
# kill in between must not leave half of one among the whole ones.
SUPERSEDED_FOLDER = "superseded"

_FORGOTTEN_FOLDER = "forgotten_checkpoints"

# The newest, and the one before it in case the newest turns out to be damaged.
_LATEST_KEPT = 2


class SaveError(FaultError):
  """A checkpoint could not be written; those before it are whole."""


class DamagedError(UserError):
  """A checkpoint is not what was saved: files are missing, cut short or changed."""


class Checkpoint:
  """One checkpoint on disk.

  Attributes:
    path: its folder.
    step: steps taken when it was saved; 0 for weights that were not trained here.
  """

  def __init__(self, path: pathlib.Path):
    self.path = path
    self.step = int(path.name)

  @property
  def config(self) -> ml_collections.ConfigDict:
    """The config that it was trained with."""
    return configs.from_json(self._documents["config"])

  @property
  def dataset(self) -> DatasetInfo:
    """What is known of the dataset that it was trained on."""
    return DatasetInfo.from_json({k: v for k, v in self._documents["dataset"].items() if k != "fingerprint"})

  @property
  def fingerprint(self) -> str | None:
    """Of the dataset; None if it was not trained here."""
    return self._documents["dataset"]["fingerprint"]

  @property
  def can_continue(self) -> bool:
    """Whether training can go on from it: weights that were not trained here have no state of an optimizer."""
    return self.fingerprint is not None

  @property
  def best(self) -> BestSoFar:
    """The best validation of the run up to it."""
    return BestSoFar(**self._documents["best"])

  @property
  def val_dice(self) -> float | None:
    """Mean foreground Dice on the validation cases at this step; None where there was no validation."""
    return self._documents["metrics"].get(METRIC)

  def check_documents(self) -> None:
    """Raises DamagedError where anything but the arrays is not what was saved."""
    _ = self._documents

  @functools.cached_property
  def _checksums(self) -> dict[str, Any]:
    return self._read_json("checksums")

  @functools.cached_property
  def _documents(self) -> dict[str, Any]:
    documents = {name: self._read_json(name) for name in ("config", "dataset", "best", "metrics")}
    for name, content in documents.items():
      if self._checksums.get("documents", {}).get(name) != _json_checksum(content):
        raise DamagedError(f"{self.path / name}: differs from what was saved; the file is damaged")
    return documents

  def _read_json(self, name: str) -> Any:
    if name == "metrics" and not (self.path / name).exists():
      return {}  # Orbax writes none where there was no validation
    try:
      return ocp.JsonCheckpointHandler(filename=name if name == "metrics" else None).restore(self.path / name)
    except Exception as error:  # damage shows in many ways
      raise DamagedError(f"{self.path / name}: cannot be read; the file is damaged ({_one_line(error)})") from error

  def read(self, abstract_state: TrainState) -> TrainState:
    """Reads everything, bit for bit, into the host's memory.

    Args:
      abstract_state: shapes and dtypes of the state.

    Returns:
      The state as it was saved, in NumPy arrays, its key as raw data; see `place`.

    Raises:
      DamagedError: some of it is not what was saved.
    """
    items = self._restore(_items(abstract_state))
    return abstract_state.replace(**items["variables"], **items["training"], ema=items.get("ema", {}))

  def restore_variables(self, abstract_variables: dict[str, Any]) -> dict[str, Any]:
    """Restores what prediction needs: the moving average where one was kept, else the variables; see `read`."""
    item = "ema" if "ema" in self._checksums else "variables"
    sharding = jax.tree.map(lambda leaf: leaf.sharding, abstract_variables)
    return jax.device_put(self._restore({item: abstract_variables})[item], sharding)

  def _restore(self, abstract_items: dict[str, Any]) -> dict[str, Any]:
    """Items as NumPy arrays."""
    restored = {}
    for name, item in abstract_items.items():
      abstract = jax.tree.map(lambda leaf: np.empty(leaf.shape, leaf.dtype), item)
      handler = ocp.StandardCheckpointHandler(multiprocessing_options=_alone())
      try:
        restored[name] = handler.restore(self.path / name, args=ocp.args.StandardRestore(abstract))
      except Exception as error:  # Orbax raises bare and undocumented types for damaged files
        raise DamagedError(f"{self.path / name}: cannot be restored; it is damaged ({_one_line(error)})") from error
      wrong = sorted(set(_checksums_of(restored[name]).items()) ^ set(self._checksums.get(name, {}).items()))
      if wrong:
        names = ", ".join(sorted(dict(wrong)))
        raise DamagedError(f"{self.path / name}: the values of {names} differ from what was saved; it is damaged")
    return restored

  def set_aside(self) -> pathlib.Path:
    """Moves it out of the way without deleting anything; returns its new place."""
    folder = self.path.parent.parent / DAMAGED_FOLDER
    folder.mkdir(exist_ok=True)
    target, number = folder / self.path.name, 1
    while target.exists():
      target, number = folder / f"{self.path.name}.{number}", number + 1
    return self.path.rename(target)


def place(host_state: TrainState, mesh: Mesh) -> TrainState:
  """A state that `Checkpoint.read` gave, with a copy on every device of a mesh."""
  state = meshes.replicate(host_state, mesh)
  wrap = jax.jit(jax.random.wrap_key_data, out_shardings=meshes.replicated(mesh))
  return state.replace(key=wrap(state.key))


def find(workdir: str | os.PathLike, folder_name: str = FOLDER) -> list[Checkpoint]:
  """The complete checkpoints of a workdir, oldest first; a folder that is being written has another name."""
  folder = pathlib.Path(workdir).absolute() / folder_name
  names = [path for path in folder.iterdir() if path.name.isdigit()] if folder.is_dir() else []
  return sorted(map(Checkpoint, names), key=lambda checkpoint: checkpoint.step)


def best_of(checkpoints: Sequence[Checkpoint]) -> Checkpoint:
  """The checkpoint with the best validation Dice, the later one of equals; the newest where none was validated.

  Only those count that were validated on the dataset of the newest one: a run may have gone on with another.
  """
  newest = checkpoints[-1]
  validated = [one for one in checkpoints if one.val_dice is not None and one.fingerprint == newest.fingerprint]
  return max(validated or [newest], key=lambda checkpoint: (checkpoint.val_dice or 0, checkpoint.step))


def latest_whole(
  workdir: str | os.PathLike, use: Callable[[Checkpoint], Any], say: Callable[[str], None]
) -> Any | None:
  """What can be made of the newest checkpoint that is whole; damaged ones are set aside.

  Of checkpoints that are older than it only the documents are checked, not the arrays.

  Args:
    workdir: the folder.
    use: what is made of a checkpoint; raises DamagedError where it cannot be.
    say: told of every checkpoint that is set aside.

  Returns:
    What `use` returned; None where there is no checkpoint.

  Raises:
    DamagedError: there are checkpoints, but none is whole; they stay where they are.
  """
  damaged: list[tuple[Checkpoint, DamagedError]] = []
  newest, result = None, None
  _put_back(workdir)
  for checkpoint in reversed(find(workdir)):
    try:
      if newest is None:
        newest, result = checkpoint, use(checkpoint)
      else:
        checkpoint.check_documents()  # which Orbax reads of all checkpoints, and stops at
    except DamagedError as error:
      newest = None if newest is checkpoint else newest
      damaged.append((checkpoint, error))
  if damaged and newest is None:
    raise DamagedError(
      f"{workdir}: none of the {len(damaged)} checkpoint(s) is whole; restore them from a copy, or give another "
      "--workdir to start anew:\n  " + "\n  ".join(str(error) for _, error in damaged)
    )
  for bad, error in damaged:
    say(f"damaged  {error}\n         set aside as {bad.set_aside()}; going on from step {newest.step}")
  return result


def forget_after(workdir: str | os.PathLike, step: int) -> None:
  """Removes the checkpoints of later steps, each whole or not at all, for a run that is to go on from this one.

  Args:
    workdir: the folder, which no run is writing into.
    step: of the newest checkpoint to keep; 0 keeps none.
  """
  shutil.rmtree(pathlib.Path(workdir, FOLDER, SUPERSEDED_FOLDER), ignore_errors=True)
  forgotten = pathlib.Path(workdir, _FORGOTTEN_FOLDER)
  for checkpoint in find(workdir):
    if checkpoint.step > step:
      forgotten.mkdir(exist_ok=True)
      checkpoint.path.rename(forgotten / checkpoint.path.name)
      shutil.rmtree(forgotten, ignore_errors=True)


def _put_back(workdir: str | os.PathLike) -> None:
  """Restores a checkpoint that was to be replaced by one of the same step, where a kill or a fault came in between."""
  found = find(workdir)
  for checkpoint in find(pathlib.Path(workdir, FOLDER), SUPERSEDED_FOLDER):
    if not found or checkpoint.step > found[-1].step:  # else it made room for newer ones
      checkpoint.path.rename(pathlib.Path(workdir, FOLDER, checkpoint.path.name))


class CheckpointWriter:
  """Writes checkpoints in the background; the latest two and the best one are kept.

  In other processes than the first it does nothing.
  """

  def __init__(self, workdir: str | os.PathLike, fingerprint: str | None = None):
    """Opens a workdir.

    Args:
      workdir: the folder.
      fingerprint: of the dataset that is trained on, if any; a best checkpoint of another one need not be kept.
    """
    self._workdir = pathlib.Path(workdir).absolute()
    self._fingerprint = fingerprint
    self._writes = jax.process_index() == 0
    self._saving: int | None = None
    self._manager = self._open() if self._writes else None

  def _open(self) -> ocp.CheckpointManager:
    policy = checkpoint_managers.AnyPreservationPolicy(
      [
        checkpoint_managers.LatestN(_LATEST_KEPT),
        checkpoint_managers.BestN(get_metric_fn=self._rank, n=1, keep_checkpoints_without_metrics=False),
      ]
    )
    options = ocp.CheckpointManagerOptions(
      preservation_policy=policy,
      best_fn=self._rank,
      cleanup_tmp_directories=True,
      todelete_subdir=SUPERSEDED_FOLDER,
      multiprocessing_options=_alone(),
      # Orbax creates the folder for all processes together, and asks for it to be there where only one takes part.
      create=jax.process_count() == 1,
    )
    (self._workdir / FOLDER).mkdir(exist_ok=True)
    _put_back(self._workdir)
    self._delete_superseded()
    return ocp.CheckpointManager(self._workdir / FOLDER, options=options)

  def _rank(self, metrics: dict[str, Any]) -> float:
    """The validation Dice; below every other one where it was reached on other data."""
    return metrics[METRIC] if metrics.get("fingerprint") == self._fingerprint else -1.0

  def save(
    self,
    state: TrainState,
    config: ml_collections.ConfigDict,
    manifest: Manifest,
    *,
    val_dice: float | None = None,
    best: BestSoFar,
  ) -> None:
    """Saves in the background; `settle` says whether it worked.

    Args:
      state: to save; its step names the checkpoint.
      config: of the run.
      manifest: of the prepared dataset.
      val_dice: mean foreground Dice on the validation cases, if validated.
      best: the best validation so far, this one included.

    Raises:
      SaveError: it could not be begun.
    """
    if self._writes:
      metrics = {} if val_dice is None else {METRIC: val_dice, "fingerprint": self._fingerprint}
      dataset = {**dataclasses.asdict(DatasetInfo.of(manifest)), "fingerprint": self._fingerprint}
      self._save(int(state.step), _items(state), config, dataset, metrics, best)

  def save_weights(self, variables: dict[str, Any], config: ml_collections.ConfigDict, dataset: DatasetInfo) -> None:
    """Saves weights that were not trained here, as step 0: enough to predict with or start from, not to continue.

    Args:
      variables: {"params": ..., "batch_stats": ...}.
      config: with the network and the image size that they belong to.
      dataset: what prediction must know of the data that they were trained on.

    Raises:
      SaveError: it could not be begun.
    """
    content = {**dataclasses.asdict(dataset), "fingerprint": None}
    self._save(0, {"variables": variables}, config, content, metrics={}, best=BestSoFar())

  def _save(
    self,
    step: int,
    items: dict[str, Any],
    config: ml_collections.ConfigDict,
    dataset: dict[str, Any],
    metrics: dict[str, Any],
    best: BestSoFar,
  ) -> None:
    documents = {"config": configs.to_json(config), "dataset": dataset, "best": best.to_json()}
    # A copy on the host: the arrays on the devices are given away to the next step while this is being written.
    items = jax.tree.map(lambda leaf: np.array(leaf), items)
    checksums = {name: _checksums_of(item) for name, item in items.items()}
    checksums["documents"] = {
      name: _json_checksum(content) for name, content in (documents | {"metrics": metrics}).items()
    }
    arguments = {name: ocp.args.StandardSave(item) for name, item in items.items()}
    arguments |= {name: ocp.args.JsonSave(content) for name, content in documents.items()}
    arguments["checksums"] = ocp.args.JsonSave(checksums)
    self._saving = step
    try:
      if step in self._manager.all_steps():
        self._manager.delete(step)  # saved by an interrupted run before it was validated
      saved = self._manager.save(step, args=ocp.args.Composite(**arguments), metrics=metrics or None)
    except Exception as error:  # of the file system, through several layers
      raise self._failure(error) from error
    if not saved:
      raise RuntimeError(f"Orbax refused to save step {step}: the newest checkpoint is {self._manager.latest_step()}")

  def settle(self) -> None:
    """Waits until everything is on disk; does nothing where nothing is being written.

    Raises:
      SaveError: the checkpoint that was being written could not be.
    """
    if self._manager is None:
      return
    try:
      self._manager.wait_until_finished()
    except Exception as error:  # of the file system, through several layers
      raise self._failure(error) from error
    self._delete_superseded()

  def _delete_superseded(self) -> None:
    shutil.rmtree(self._workdir / FOLDER / SUPERSEDED_FOLDER, ignore_errors=True)

  def _failure(self, error: Exception) -> SaveError:
    """What to say of a failed save; the writer is then as new, and nothing half-written is left."""
    what = f"{self._workdir / FOLDER}: the checkpoint of step {self._saving} could not be written ({_reason(error)})"
    with contextlib.suppress(Exception):  # it has told what it has to tell
      self._manager.close()
    try:
      for path in (self._workdir / FOLDER).iterdir():
        if not path.name.isdigit() and path.name != SUPERSEDED_FOLDER:
          shutil.rmtree(path, ignore_errors=True)
      self._manager = self._open()
    except OSError as another:
      return SaveError(f"{what}, and the folder cannot be used any more ({another.strerror or another})")
    whole = self._manager.latest_step()
    before = "there is none before it" if whole is None else f"that of step {whole} is intact"
    return SaveError(f"{what}; {before}")

  def __enter__(self) -> "CheckpointWriter":
    self._unraisablehook, sys.unraisablehook = sys.unraisablehook, _quiet(sys.unraisablehook)
    return self

  def __exit__(self, *exception) -> None:
    sys.unraisablehook = self._unraisablehook
    # Waits for what is being written, also when the run ends in an error: a checkpoint taken is a checkpoint kept.
    if self._manager is not None:
      try:
        self.settle()
      finally:
        self._manager.close()


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
  with processes.together():
    chosen = choose(workdir, checkpoint) if processes.is_first() else None
  # A run may be writing there: all processes take the one that the first has chosen.
  step = processes.gather_texts(str(chosen.step) if chosen else "")[0]
  with processes.together():
    return _load(chosen or Checkpoint(pathlib.Path(workdir).absolute() / FOLDER / step))


def _load(chosen: Checkpoint) -> Trained:
  try:
    config, dataset = chosen.config, chosen.dataset
    model = build_model(config.model, len(dataset.classes))
    mesh = meshes.make_mesh(jax.local_devices())
    abstract = meshes.replicated_like(abstract_variables(model, config.data.image_size, dataset.channels), mesh)
    variables = chosen.restore_variables(abstract)
  except DamagedError as error:
    others = [str(other.step) for other in find(chosen.path.parent.parent) if other.step != chosen.step]
    hint = f" (there are also those of step {', '.join(others)}: see --checkpoint)" if others else ""
    raise DamagedError(f"{error}{hint}") from error
  return Trained(config, dataset, model, variables, mesh=mesh, step=chosen.step, val_dice=chosen.val_dice)


def choose(workdir: str | os.PathLike, checkpoint: str) -> Checkpoint:
  """The "best" or the "latest" checkpoint of a workdir; raises UserError where there is none."""
  if not pathlib.Path(workdir, FOLDER).is_dir():
    raise UserError(f"{workdir}: not the workdir of a training run (it has no folder {FOLDER})")
  found = find(workdir)
  if not found:
    raise UserError(f"{workdir}: no checkpoint yet; train.py writes the first one at its first validation")
  return best_of(found) if checkpoint == "best" else found[-1]


def _alone() -> ocp.options.MultiprocessingOptions:
  """Orbax as if this process were the only one."""
  if jax.process_count() == 1:
    return ocp.options.MultiprocessingOptions()
  own = jax.process_index()
  return ocp.options.MultiprocessingOptions(
    primary_host=own, active_processes={own}, barrier_sync_key_prefix=f"process{own}"
  )


def _items(state: TrainState) -> dict[str, Any]:
  key_data = jax.eval_shape(jax.random.key_data, state.key)
  if not isinstance(state.key, jax.ShapeDtypeStruct):
    key_data = jax.random.key_data(state.key)
  items = {
    "variables": state.variables,
    "training": {
      "step": state.step,
      "updates": state.updates,
      "opt_state": state.opt_state,
      "key": key_data,
      "skips": state.skips,
      "nonfinite_step": state.nonfinite_step,
    },
  }
  return items | ({"ema": state.ema} if state.ema else {})


def _checksums_of(tree: Any) -> dict[str, str]:
  return {
    jax.tree_util.keystr(path): f"{zlib.crc32(np.ascontiguousarray(leaf)):08x}"
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
  }


def _json_checksum(content: Any) -> str:
  return f"{zlib.crc32(json.dumps(content, sort_keys=True).encode()):08x}"


def _reason(error: BaseException) -> str:
  """The operating system's words where they can be found in an error of Orbax or TensorStore, else its first line."""
  found: BaseException | None = error
  while found is not None:
    if isinstance(found, OSError) and found.strerror:
      return found.strerror
    for words in ("No space left on device", "Disk quota exceeded", "File too large", "Read-only file system"):
      if words in str(found):
        return words
    found = found.__cause__ or found.__context__
  return _one_line(error)


def _quiet(hook: Callable[[Any], None]) -> Callable[[Any], None]:
  """A `sys.unraisablehook` without the tracebacks, one a file, of writes that fail after Orbax has given up a save."""

  def report(unraisable: Any) -> None:
    if str(unraisable.exc_value) != "Event loop is closed":
      hook(unraisable)

  return report


def _one_line(error: BaseException) -> str:
  return " ".join(str(error).split())[:300] or type(error).__name__
