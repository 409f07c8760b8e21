"""The folder of a training run: who may write into it, and what it says about itself besides its checkpoints."""

import contextlib
import fcntl
import json
import os
import pathlib
from collections.abc import Iterator

import ml_collections

from selfreg_jax import config as configs
from selfreg_jax.errors import UserError

CONFIG_FILE = "config.json"
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
  with must_be_writable(folder):
    folder.mkdir(parents=True, exist_ok=True)
    lock = (folder / _LOCK_FILE).open("w")
  with lock:
    try:
      fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
      raise UserError(f"{folder}: another run is using this workdir; give each run its own --workdir") from error
    yield folder


@contextlib.contextmanager
def share(workdir: str | os.PathLike) -> Iterator[pathlib.Path]:
  """A workdir that the first process of a run holds, for its other processes, which only read in it."""
  yield pathlib.Path(workdir)


@contextlib.contextmanager
def must_be_writable(folder: pathlib.Path) -> Iterator[None]:
  """A body that prepares a workdir for writing; raises UserError where the file system does not let it."""
  try:
    yield
  except OSError as error:
    raise UserError(f"{folder}: cannot be used as a workdir ({error.strerror or error})") from error


def write_config(folder: pathlib.Path, config: ml_collections.ConfigDict) -> None:
  """Writes `config.json`, for people to read; what programs need is in each checkpoint. Whole or not at all."""
  temporary = folder / f"{CONFIG_FILE}.partial"
  temporary.write_text(json.dumps(configs.to_json(config), indent=1) + "\n")
  temporary.replace(folder / CONFIG_FILE)
