"""The folder of a training run: who may write into it, and what it says about itself besides its checkpoints."""

import contextlib
import fcntl
import json
import os
import pathlib
import socket
import time
import uuid
from collections.abc import Iterator

import ml_collections

from selfreg_jax import config as configs
from selfreg_jax.errors import UserError

CONFIG_FILE = "config.json"
_LOCK_FILE = ".lock"
_SECONDS_TO_SEE = 30


@contextlib.contextmanager
def hold(workdir: str | os.PathLike, *, what: str = "run", flag: str = "--workdir") -> Iterator[pathlib.Path]:
  """Creates a workdir and holds it for this process: a second run in it would mix two histories.

  The lock dies with the process, also after kill -9. Where the file system has no locks, nothing is held.

  Args:
    workdir: the folder.
    what: is done there, for messages.
    flag: that names the folder, for messages.

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
    except BlockingIOError as error:
      raise UserError(f"{folder}: another {what} is using this folder; give each {what} its own {flag}") from error
    except OSError:
      pass  # a file system without locks
    lock.write(_token())
    lock.flush()
    yield folder


def check_shared(folder: pathlib.Path, token: str) -> None:
  """Raises UserError unless this process sees the workdir that the first process of the run holds.

  Args:
    folder: the workdir, as this process knows it.
    token: what `read_token` gave in the first process.
  """
  deadline = time.monotonic() + _SECONDS_TO_SEE
  while read_token(folder) != token:  # a network file system may show what is new with a delay
    if time.monotonic() > deadline:
      raise UserError(f"{folder}: is not the workdir that process 0 sees; all processes of a run must share it")
    time.sleep(0.1)


def read_token(folder: pathlib.Path) -> str:
  """What the run that holds a workdir has written into its lock; empty where nothing can be read."""
  try:
    return (folder / _LOCK_FILE).read_text()
  except OSError:
    return ""


def _token() -> str:
  return f"{socket.gethostname()} {os.getpid()} {uuid.uuid4()}\n"


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
