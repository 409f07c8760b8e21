"""Weights that were trained elsewhere: to start from, as a workdir to predict with, and back as a PyTorch file."""

import os
import pathlib
from typing import Any

import flax.linen as nn
import jax
import ml_collections
import numpy as np

from selfreg_jax import config as configs
from selfreg_jax import workdir as workdirs
from selfreg_jax.data import manifest as manifests
from selfreg_jax.data import published
from selfreg_jax.data.manifest import DatasetInfo, Intensity
from selfreg_jax.errors import UserError
from selfreg_jax.models import pytorch, weight_files
from selfreg_jax.models.factory import build_model
from selfreg_jax.training.checkpoints import Checkpoints, Trained, load_trained


def load(
  source: str | os.PathLike, model: nn.Module, dataset: DatasetInfo, image_size: int, key: jax.Array
) -> tuple[dict[str, Any], list[str]]:
  """Variables for a network, from weights that may have been trained for something else.

  A head for another number of classes keeps initial values; the window's position biases and the first convolution's
  input channels are resized as `pytorch.from_pytorch` says; an ImageNet Swin encoder is taken as far as it goes.
  Everything else must fit.

  Args:
    source: a workdir of `train.py` or of `selfreg_jax.models.pretrained` (its best checkpoint), or a `.pth`,
      `.safetensors` or `.npz` file of PyTorch weights.
    model: the network to fill.
    dataset: what it will be trained on.
    image_size: pixels a side of what the network sees.
    key: PRNG key of the initial values where the weights give none.

  Returns:
    (variables, what is to be said about them, a line each).

  Raises:
    UserError: the source cannot be read, or its weights do not fit.
  """
  path = pathlib.Path(source)
  if not path.exists():
    raise UserError(f"config.init_from = {str(source)!r}: no such workdir or file")
  notes = []
  try:
    if path.is_dir():
      trained = load_trained(path)
      weights = _as_pytorch(trained)
      notes = [
        f"note     {name} of the weights: {before}; now {now}"
        for name, before, now in trained.dataset.differences(dataset)
      ]
    else:
      weights = path
    conversion = pytorch.convert(weights, model, image_size=image_size, channels=dataset.channels)
    pytorch.check_complete(conversion, model, but_head=True)
  except UserError as error:
    raise UserError(f"config.init_from = {str(source)!r}: {error}") from error
  return conversion.variables(key), [*_report(source, conversion), *notes]


def _as_pytorch(trained: Trained, prefix: str = "") -> dict[str, np.ndarray]:
  # PyTorch's names are the common tongue of all weights, so that one report and one set of rules serves them all.
  image_size = trained.config.data.image_size
  return pytorch.to_pytorch(jax.device_get(trained.variables), trained.model, image_size=image_size, prefix=prefix)


def _report(source: str | os.PathLike, conversion: pytorch.Conversion) -> list[str]:
  first, *others = conversion.lines() or [f"{len(conversion.filled)} tensors taken, all of them"]
  return [f"weights  {source}: {first}", *(f"         {line}" for line in others)]


def write_workdir(
  source: str | os.PathLike, workdir: str | os.PathLike, config: ml_collections.ConfigDict
) -> list[str]:
  """Makes a workdir of PyTorch weights, with which `eval.py` predicts and `config.init_from` starts.

  What prediction must know of the data comes from the prepared dataset in `config.data.dir` if there is one, else from
  the published facts of `config.data.name`.

  Args:
    source: a `.pth`, `.safetensors` or `.npz` file with the authors' names.
    workdir: the folder to write.
    config: describes the network and the image size.

  Returns:
    What is to be said, a line each.

  Raises:
    UserError: the config is unusable, the data are not known, the weights do not fit, or the workdir holds checkpoints.
  """
  configs.validate(config)
  config = configs.with_absolute_paths(config)
  dataset, origin = _dataset_facts(config)
  model = build_model(config.model, len(dataset.classes))
  conversion = pytorch.convert(source, model, image_size=config.data.image_size, channels=dataset.channels)
  if heads := [text for text in conversion.misfits if pytorch.is_head(text, model)]:
    raise UserError(
      f"{source}: the weights are for another number of classes than {origin}, {', '.join(dataset.classes)} "
      f"({heads[0]}); set config.data.dir or config.data.name to the data that they were trained on"
    )
  pytorch.check_complete(conversion, model)
  with workdirs.hold(workdir) as folder, Checkpoints(folder) as checkpoints:
    if checkpoints.latest_step() is not None:
      raise UserError(f"{folder}: holds checkpoints already; give another folder")
    config.init_from = os.path.abspath(source)
    checkpoints.save_weights(conversion.variables(), config, dataset)
    checkpoints.wait()
    workdirs.write_config(folder, config)
  return [
    *_report(source, conversion),
    f"data     {', '.join(dataset.classes)}; intensities {_described(dataset.intensity)}; according to {origin}",
    f"workdir  {workdir}",
  ]


def export(workdir: str | os.PathLike, path: str | os.PathLike, *, checkpoint: str = "best") -> list[str]:
  """Writes the weights of a workdir to a file that the authors' PyTorch code loads.

  A Swin-Unet's names get the prefix "swin_unet.", as in the authors' own checkpoints.

  Args:
    workdir: of `train.py` or of `selfreg_jax.models.pretrained`.
    path: the `.safetensors` or `.npz` file to write.
    checkpoint: "best" or "latest".

  Returns:
    What is to be said, a line each.

  Raises:
    UserError: no such workdir or checkpoint, or the file cannot be written.
  """
  weight_files.check_ending_for_writing(path)
  trained = load_trained(workdir, checkpoint=checkpoint)
  prefix = "swin_unet." if trained.config.model.name == "swin_unet" else ""
  tensors = _as_pytorch(trained, prefix)
  weight_files.write_weights(tensors, path)
  return [
    f"{path}: {len(tensors)} tensors of step {trained.step}",
    f'in PyTorch: model.load_state_dict(safetensors.torch.load_file("{path}"))'
    if str(path).endswith(".safetensors")
    else f'in PyTorch: model.load_state_dict({{k: torch.from_numpy(v) for k, v in numpy.load("{path}").items()}})',
  ]


def _dataset_facts(config: ml_collections.ConfigDict) -> tuple[DatasetInfo, str]:
  """What is known of the data, and where from."""
  if pathlib.Path(config.data.dir, manifests.FILE_NAME).is_file():
    return DatasetInfo.of(manifests.load(config.data.dir)), config.data.dir
  if config.data.name:
    return published.PUBLISHED[config.data.name], f"config.data.name = {config.data.name!r}"
  raise UserError(
    f"what were the weights trained on? {config.data.dir} is no prepared dataset and config.data.name is empty; "
    f"give --config.data.dir=PREPARED, or --config.data.name={'|'.join(published.PUBLISHED)}"
  )


def _described(intensity: Intensity) -> str:
  return f"window {intensity.low:g} to {intensity.high:g}" if intensity.kind == "window" else intensity.kind
