"""Workdirs from PyTorch weights, and PyTorch weights from workdirs: what `selfreg_jax.models.pretrained` does."""

import os
import pathlib

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
from selfreg_jax.training.checkpoints import CheckpointWriter, Trained, find, load_trained


def write_workdir(
  source: str | os.PathLike, workdir: str | os.PathLike, config: ml_collections.ConfigDict
) -> list[str]:
  """Makes a workdir of PyTorch weights, with which `eval.py` predicts and `config.init_from` starts.

  What prediction must know of the data are the published facts of `config.data.name`, else those of the prepared
  dataset in `config.data.dir`; where both are there, they must agree.

  Args:
    source: a `.pth`, `.safetensors` or `.npz` file with the authors' names.
    workdir: the folder to write.
    config: describes the network and the image size.

  Returns:
    What is to be said, a line each.

  Raises:
    UserError: the config is unusable, the data are not known, the weights do not fit or are of an encoder only, or the
      workdir holds checkpoints.
  """
  configs.validate(config, needs_data=False)
  config = configs.with_absolute_paths(config)
  dataset, origin = _dataset_facts(config)
  model = build_model(config.model, len(dataset.classes))
  conversion = pytorch.convert(source, model, image_size=config.data.image_size, channels=dataset.channels)
  if conversion.mirrored is not None:
    raise UserError(
      f"{source}: weights without a decoder and a head, as of ImageNet, cannot predict; "
      f"start a training from them: train.py --config.init_from={source}"
    )
  if heads := [change for change in conversion.misfits if pytorch.is_head(change, model)]:
    raise UserError(
      f"{source}: the weights are for {heads[0].found[0]} classes with the background, {origin} has "
      f"{len(dataset.classes)}: {', '.join(dataset.classes)}; set config.data.dir or config.data.name to the data that "
      "they were trained on"
    )
  pytorch.check_complete(conversion, model)
  config.init_from = os.path.abspath(source)
  with workdirs.hold(workdir) as folder:
    if find(folder):
      raise UserError(f"{folder}: holds checkpoints already; give another folder")
    with CheckpointWriter(folder) as writer:
      writer.save_weights(conversion.variables(), config, dataset)
    workdirs.write_config(folder, config)
  return [
    *report_lines(source, conversion),
    f"data     {', '.join(dataset.classes)}",
    f"         intensities {_described(dataset.intensity)}, orientation {dataset.orientation}, slices along axis "
    f"{dataset.axis}; according to {origin}",
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
  tensors = state_dict(trained, prefix="swin_unet." if trained.config.model.name == "swin_unet" else "")
  weight_files.write_weights(tensors, path)
  loading = {
    ".safetensors": f'model.load_state_dict(safetensors.torch.load_file("{path}"))',
    ".npz": f'model.load_state_dict({{k: torch.from_numpy(v) for k, v in numpy.load("{path}").items()}})',
  }
  return [
    f"{path}: {len(tensors)} tensors of step {trained.step}",
    f"in PyTorch: {loading[pathlib.Path(path).suffix.lower()]}",
  ]


def state_dict(trained: Trained, *, prefix: str = "") -> dict[str, np.ndarray]:
  """A restored network's weights under the authors' PyTorch names."""
  image_size = trained.config.data.image_size
  return pytorch.to_pytorch(jax.device_get(trained.variables), trained.model, image_size=image_size, prefix=prefix)


def report_lines(source: str | os.PathLike, conversion: pytorch.Conversion) -> list[str]:
  """What became of weights, for a log."""
  first, *others = conversion.lines()
  return [f"weights  {source}: {first}", *(f"         {line}" for line in others)]


def _dataset_facts(config: ml_collections.ConfigDict) -> tuple[DatasetInfo, str]:
  """What is known of the data, and where from."""
  directory, name = config.data.dir, config.data.name
  is_prepared = bool(directory) and pathlib.Path(directory, manifests.FILE_NAME).is_file()
  prepared = DatasetInfo.of(manifests.load(directory)) if is_prepared else None
  facts = published.PUBLISHED[name] if name else prepared
  if facts is None:
    raise UserError(
      "what were the weights trained on? config.data.name is empty and "
      + (f"config.data.dir = {directory!r} is no prepared dataset" if directory else "config.data.dir, too")
      + f"; give --config.data.dir=PREPARED, or --config.data.name={'|'.join(published.PUBLISHED)}"
    )
  if name and prepared is not None and (differing := facts.differences(prepared)):
    raise UserError(
      f"{directory}: is not prepared as config.data.name = {name!r} is known to be:\n  "
      + "\n  ".join(f"{field}: {known} is known, the dataset has {found}" for field, known, found in differing)
      + "\nPrepare it so, or say which holds: --config.data.dir= (what is known) or --config.data.name= (the dataset)."
    )
  if not name:
    return facts, directory
  return facts, f"config.data.name = {name!r}" + (f" ({directory} is no prepared dataset)" if not is_prepared else "")


def _described(intensity: Intensity) -> str:
  return f"window {intensity.low:g} to {intensity.high:g}" if intensity.kind == "window" else intensity.kind
