"""What became of each run of an ablation: a small file in the run's own workdir."""

import dataclasses
import json
import pathlib
import zlib

import ml_collections

from selfreg_jax import config as configs
from selfreg_jax.evaluation import report

FILE_NAME = "ablation.json"


@dataclasses.dataclass(frozen=True)
class Record:
  """What became of a run.

  Attributes:
    config: fingerprint of the config that it was trained with, see `fingerprint`.
    steps: that it took.
    seconds: of training and validation, over all starts; runs of one program share its seconds evenly.
    finished: whether it came to its end, by its last step or by early stopping.
    diverged: what was said when its loss was no longer finite; empty where it was.
    on_nonfinite: what its config had the run do about that, see `remedy`.
  """

  config: str
  steps: int = 0
  seconds: float = 0.0
  finished: bool = False
  diverged: str = ""
  on_nonfinite: str = ""

  @property
  def is_settled(self) -> bool:
    """Whether there is nothing left to train."""
    return self.finished or bool(self.diverged)


def fingerprint(config: ml_collections.ConfigDict) -> str:
  """Of the fields that decide about the numbers of a run."""
  fields = {name: value for name, value in configs.flatten(config).items() if name not in configs.HARMLESS}
  return f"{zlib.crc32(json.dumps(fields, sort_keys=True).encode()):08x}"


def remedy(config: ml_collections.ConfigDict) -> str:
  """With which fields a run that diverged may be tried again: nothing before its first bad step depends on them."""
  return f"{config.train.on_nonfinite}, {config.train.most_skips}"


def read(folder: pathlib.Path, config: ml_collections.ConfigDict) -> Record:
  """The record of a run; an empty one where there is none, it cannot be read, or it is of another config.

  A run that diverged is no longer settled when its config says to do something else about steps that are not finite.
  """
  try:
    record = Record(**json.loads((folder / FILE_NAME).read_text()))
  except (OSError, ValueError, TypeError):
    return Record(fingerprint(config))
  if record.config != fingerprint(config):
    return Record(fingerprint(config))
  if record.diverged and record.on_nonfinite != remedy(config):
    return dataclasses.replace(record, diverged="")
  return record


def write(folder: pathlib.Path, record: Record) -> None:
  """Writes the record of a run, whose workdir exists."""
  report.write_whole(folder / FILE_NAME, (json.dumps(dataclasses.asdict(record)) + "\n").encode())
