"""A run as its config, its data and its devices describe it: checked before any compute is spent."""

import dataclasses
import math
import os
import pathlib
from collections.abc import Sequence
from typing import Any

import jax
import ml_collections
from jax.sharding import Mesh

import selfreg_jax
from selfreg_jax import config as configs
from selfreg_jax import mesh as meshes
from selfreg_jax.data import manifest as manifests
from selfreg_jax.data import pipeline, published
from selfreg_jax.data.manifest import Manifest
from selfreg_jax.errors import UserError
from selfreg_jax.training import checkpoints, warm_start

# Fields that each process of a run may have its own way: where its data lie and how it reads them. Any other decides
# what is computed, or when the processes meet.
_OF_A_PROCESS = ("data.dir", "data.verify", "data.threads", "data.prefetch", "data.timeout")


@dataclasses.dataclass(frozen=True, eq=False)
class Plan:
  """A run as its config and its data describe it, checked before any compute.

  Attributes:
    config: of the run, its paths absolute.
    manifest: of the dataset, as the run's fold sees it.
    mesh: the devices, of all processes.
    dataset: the training slices.
    sampling: how batches are drawn from them.
    steps: of the whole run.
    steps_per_epoch: ceil(slices / batch size).
    validate_every: steps between validations.
    patience: steps without a better validation after which to stop; 0: never.
  """

  config: ml_collections.ConfigDict
  manifest: Manifest
  mesh: Mesh
  dataset: pipeline.SliceDataset
  sampling: pipeline.Sampling
  steps: int
  steps_per_epoch: int
  validate_every: int
  patience: int

  def facts(self) -> dict[str, Any]:
    """What all processes of a run must have in common."""
    fields = configs.flatten(self.config).items()
    common = {f"config.{name}": value for name, value in fields if name not in _OF_A_PROCESS}
    dataset = f"{self.manifest.dataset} {self.manifest.fingerprint()}"
    return common | {"the dataset": dataset, "jax": jax.__version__, "selfreg_jax": selfreg_jax.__version__}

  def validates_at(self, step: int) -> bool:
    """Whether there is a validation after so many steps."""
    return step % self.validate_every == 0 or step == self.steps

  def stream(self, *, whole: bool = False) -> Any:
    """This process's part of every global batch, or the whole of it."""
    share = {} if whole else {"process_index": jax.process_index(), "process_count": jax.process_count()}
    return pipeline.batches(self.dataset, self.sampling, **share)

  def case_names(self, step: int) -> str:
    """The slices of a step's batch; nothing of them is read."""
    records = pipeline.records(self.dataset, self.sampling)
    first = step * self.sampling.batch_size
    located = [self.dataset.locate(int(records[first + place])) for place in range(self.sampling.batch_size)]
    return ", ".join(sorted({f"{case.id} slice {index}" for case, index in located}))


def make_plan(
  config: ml_collections.ConfigDict, workdir: str | os.PathLike, devices: Sequence[jax.Device] | None
) -> Plan:
  """Checks a config against itself, the devices and the data; raises UserError where they do not go together."""
  configs.validate(config)
  config = configs.with_absolute_paths(config)
  if not pathlib.Path(workdir, checkpoints.FOLDER).exists():  # a run that is continued needs these weights no more
    warm_start.check_exists(config.init_from)
  mesh = meshes.make_mesh(devices)
  meshes.check_batch_size(config.data.batch_size, mesh, config.train.accumulate)
  manifest = manifests.load(config.data.dir, verify=config.data.verify).with_fold(config.data.fold)
  if config.train.patience and not manifest.splits["val"]:
    raise UserError("config.train.patience stops by the validation Dice, but the validation split is empty; give 0")
  check_published_classes(config, manifest)
  dataset = pipeline.SliceDataset(config.data.dir, manifest)
  order_seed = config.seed if config.data.order_seed < 0 else config.data.order_seed
  sampling = pipeline.Sampling(config.data.batch_size, order_seed, config.data.foreground_fraction)
  pipeline.records(dataset, sampling)  # raises where there is no foreground to draw
  steps_per_epoch = math.ceil(len(dataset) / config.data.batch_size)
  return Plan(
    config=config,
    manifest=manifest,
    mesh=mesh,
    dataset=dataset,
    sampling=sampling,
    steps=config.train.steps or config.train.epochs * steps_per_epoch,
    steps_per_epoch=steps_per_epoch,
    validate_every=config.train.validate_every or steps_per_epoch,
    patience=config.train.patience * steps_per_epoch,
  )


def check_published_classes(config: ml_collections.ConfigDict, manifest: Manifest) -> None:
  """Raises UserError where the recipe is for a published dataset and the prepared one has other classes."""
  if config.data.name and manifest.classes != published.PUBLISHED[config.data.name].classes:
    raise UserError(
      f"{config.data.dir}: holds the classes {', '.join(manifest.classes)}, but config.data.name = "
      f"{config.data.name!r} has {', '.join(published.PUBLISHED[config.data.name].classes)}; prepare the dataset with "
      "these, or train on your own classes with --config.data.name=''"
    )
