"""The folder of a training run: who may write into it, and what it says about itself besides its checkpoints."""

import contextlib
import dataclasses
import fcntl
import json
import os
import pathlib
from collections.abc import Iterator

import ml_collections

from selfreg_jax import config as configs
from selfreg_jax.data.manifest import DatasetInfo
from selfreg_jax.errors import UserError

CONFIG_FILE = "config.json"
DATASET_FILE = "dataset.json"
_LOCK_FILE = ".lock"


@contextlib.contextmanager
def hold(workdir: str | os.PathLike) -> Iterator[pathlib.Path]:
  """Creates a workdir and holds it for this process: a second run in it would mix two histories.

  The lock dies with the process, also after kill -9.

  Args:
    workdir: the folder.

  Yields:
    Its path.

  Raises:
    UserError: it cannot be written, or another run holds it.
  """
  folder = pathlib.Path(workdir)
  try:
    folder.mkdir(parents=True, exist_ok=True)
    lock = (folder / _LOCK_FILE).open("w")
  except OSError as error:
    raise UserError(f"{folder}: cannot be used as a workdir ({error.strerror})") from error
  with lock:
    try:
      fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
      raise UserError(f"{folder}: another run is using this workdir; give each run its own --workdir") from error
    yield folder


def write_run(folder: pathlib.Path, config: ml_collections.ConfigDict, dataset: DatasetInfo) -> None:
  """Writes what prediction needs besides the weights: `config.json` and `dataset.json`, each whole or not at all."""
  contents = {CONFIG_FILE: configs.to_json(config), DATASET_FILE: dataclasses.asdict(dataset)}
  for name, content in contents.items():
    temporary = folder / f"{name}.partial"
    temporary.write_text(json.dumps(content, indent=1) + "\n")
    temporary.replace(folder / name)


def read_run(workdir: str | os.PathLike) -> tuple[ml_collections.ConfigDict, DatasetInfo]:
  """Reads what `write_run` wrote.

  Args:
    workdir: the folder of a run.

  Returns:
    (config, what is known of the training data).

  Raises:
    UserError: no workdir of a run, or a damaged one.
  """
  folder = pathlib.Path(workdir)
  try:
    config = configs.from_json(json.loads((folder / CONFIG_FILE).read_text()))
    dataset = DatasetInfo.from_json(json.loads((folder / DATASET_FILE).read_text()))
  except FileNotFoundError as error:
    missing = pathlib.Path(error.filename).name
    raise UserError(f"{folder}: not the workdir of a training run (no {missing})") from error
  except (ValueError, KeyError, TypeError, AttributeError) as error:
    raise UserError(f"{folder}: {CONFIG_FILE} or {DATASET_FILE} is damaged ({error})") from error
  return config, dataset
