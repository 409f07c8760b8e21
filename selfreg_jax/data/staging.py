"""The output folder while a dataset is being prepared: finished cases, who may write there, and who does which part.

    cases.partial/<id>.image.npy, <id>.label.npy    the arrays of a case, not to be trusted without its record
    cases.partial/<id>.done.json                    written last: the case is finished, from which files and options
    .prepare.lock                                   held by a preparation, shared by the shards of one
    .shard-0-of-3.lock                              held while that shard is prepared, kept until all is complete

Records let a run take over what an earlier one has finished, and let several machines fill one folder. When all cases
are there, the folder is renamed to `cases` and the manifest is written; the records and locks then go.
"""

import contextlib
import dataclasses
import fcntl
import os
import pathlib
import re
import shutil
from collections.abc import Collection, Iterator

from selfreg_jax.data import datasets, manifest
from selfreg_jax.data.manifest import Manifest
from selfreg_jax.errors import UserError

ARRAYS = "cases"
STAGING = "cases.partial"
KINDS = ("image", "label")
RECORD_ENDING = ".done.json"
UNFINISHED = ".partial"  # ends the name of a file that is being written and renamed when it is whole

_CASE_ENDINGS = (*(f".{kind}.npy" for kind in KINDS), RECORD_ENDING, RECORD_ENDING + UNFINISHED)
_LOCK = ".prepare.lock"
_SHARD = re.compile(r"(\d+)/(\d+)", re.ASCII)
_SHARD_LOCK = re.compile(r"\.shard-(\d+)-of-(\d+)\.lock", re.ASCII)


@dataclasses.dataclass(frozen=True)
class Shard:
  """A part of the cases that is prepared by itself.

  Attributes:
    index: which part, from 0.
    count: number of parts.
  """

  index: int
  count: int

  @classmethod
  def parse(cls, text: str) -> "Shard":
    """The shard that `--shard=i/n` names; raises UserError where that is none."""
    match = _SHARD.fullmatch(text)
    shard = cls(*map(int, match.groups())) if match else None
    if shard is None or shard.index >= shard.count:
      raise UserError(f"--shard={text}: i/n is needed, with i from 0 to n - 1; three shards are 0/3, 1/3 and 2/3")
    return shard

  def __str__(self) -> str:
    return f"{self.index}/{self.count}"

  @property
  def lock_name(self) -> str:
    """Name of the shard's lock file."""
    return f".shard-{self.index}-of-{self.count}.lock"

  def part(self, ids: Collection[str]) -> frozenset[str]:
    """The ids of the shard's cases: every `count`-th of the sorted ones, in whatever order files are listed."""
    return frozenset(sorted({*ids})[self.index :: self.count])


def case_files(staging: pathlib.Path, case_id: str) -> dict[str, pathlib.Path]:
  """The files of a case's arrays, by kind: "image" and "label"."""
  return {kind: staging / f"{case_id}.{kind}.npy" for kind in KINDS}


def foreign_files(output: pathlib.Path, own: Collection[str]) -> list[str]:
  """Names of what the output folder holds besides prepared datasets, finished or not.

  Args:
    output: an existing folder.
    own: further names that are expected there.
  """
  own = {manifest.FILE_NAME, manifest.FILE_NAME + UNFINISHED, ARRAYS, STAGING, *own}
  foreign = [path.name for path in output.iterdir() if path.name not in own and not path.name.startswith(".")]
  for folder in (output / ARRAYS, output / STAGING):
    entries = folder.iterdir() if folder.is_dir() else ()
    foreign += [f"{folder.name}/{path.name}" for path in entries if not path.name.endswith(_CASE_ENDINGS)]
  return sorted(foreign)


def begin(output: pathlib.Path) -> pathlib.Path:
  """Makes the staging folder, or finds it as an earlier run has left it; returns it."""
  staging, arrays = output / STAGING, output / ARRAYS
  complete = (output / manifest.FILE_NAME).exists()
  if not complete and not staging.exists() and any(arrays.glob("*" + RECORD_ENDING)):
    # `install` was stopped between its rename and the manifest. Of several shards that see this, one is the first.
    with contextlib.suppress(FileNotFoundError):
      arrays.rename(staging)
  staging.mkdir(exist_ok=True)
  return staging


def clear(staging: pathlib.Path, ids: Collection[str]) -> None:
  """Removes the files of these cases, whatever there is of them; the record goes first."""
  for case_id in ids:
    for ending in reversed(_CASE_ENDINGS):
      (staging / (case_id + ending)).unlink(missing_ok=True)


def clear_others(staging: pathlib.Path, ids: Collection[str]) -> None:
  """Removes the files of all cases but these."""
  wanted = {case_id + ending for case_id in ids for ending in _CASE_ENDINGS}
  for path in staging.iterdir():
    if path.name not in wanted:
      path.unlink()


def install(made: Manifest, output: pathlib.Path) -> None:
  """Puts the staged arrays in place. From the first line until the manifest is saved there is no prepared dataset."""
  (output / manifest.FILE_NAME).unlink(missing_ok=True)
  if (output / ARRAYS).exists():
    shutil.rmtree(output / ARRAYS)
  (output / STAGING).rename(output / ARRAYS)
  manifest.save(made, output)
  for path in (*(output / ARRAYS).glob("*" + RECORD_ENDING), *shard_locks(output).values()):
    path.unlink(missing_ok=True)


def shard_locks(output: pathlib.Path) -> dict[Shard, pathlib.Path]:
  """The lock files of shards that have been begun, in order."""
  matches = {path: _SHARD_LOCK.fullmatch(path.name) for path in output.glob(".shard-*.lock")}
  shards = {Shard(*map(int, match.groups())): path for path, match in matches.items() if match}
  return {shard: shards[shard] for shard in sorted(shards, key=dataclasses.astuple)}


@contextlib.contextmanager
def locked(output: pathlib.Path, shard: Shard | None = None) -> Iterator[None]:
  """Keeps other preparations out of the folder, but not the other shards of this one.

  The locks die with the process, however that ends. They are on files, as most network file systems lock nothing else,
  and some not even these: the locks only guard against haste.

  Args:
    output: the folder.
    shard: the part that is to be prepared; None for whatever needs the folder for itself.

  Raises:
    UserError: somebody else is at work there.
  """
  with contextlib.ExitStack() as held:
    path = output / _LOCK
    if not _lock(held, path, fcntl.LOCK_EX if shard is None else fcntl.LOCK_SH):
      shards = [str(other) for other, lock in shard_locks(output).items() if _is_held(lock)]
      what = f"shard {datasets.listed(shards)} of a preparation is" if shards else "another preparation is"
      raise UserError(f"{output}: {what} writing there; wait until it has finished")
    if shard is None:
      held.callback(path.unlink, missing_ok=True)
    else:
      _lock_shard(held, output, shard)
    yield


def _lock_shard(held: contextlib.ExitStack, output: pathlib.Path, shard: Shard) -> None:
  if not _lock(held, output / shard.lock_name, fcntl.LOCK_EX):
    raise UserError(f"{output}: another process is preparing --shard={shard}")
  for other, path in shard_locks(output).items():
    if other.count == shard.count:
      continue
    if _is_held(path):
      raise UserError(
        f"{output}: --shard={other} is being prepared there, and its cases are others than those of {shard.count} "
        f"shards; stop it or wait, or give shards of {other.count}"
      )
    path.unlink(missing_ok=True)  # of an earlier attempt; the merge is told by these files which shards there are


def _lock(held: contextlib.ExitStack, path: pathlib.Path, mode: int) -> bool:
  """Locks a file until `held` is closed, and makes it if need be; whether that was possible."""
  while True:
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    held.callback(os.close, descriptor)
    try:
      fcntl.flock(descriptor, mode | fcntl.LOCK_NB)
    except BlockingIOError:
      return False
    except OSError:
      return True  # cannot be locked on this file system
    with contextlib.suppress(FileNotFoundError):
      if os.path.samestat(os.fstat(descriptor), path.stat()):
        return True
    # Its last holder has removed the file before it was locked here: what is locked is no lock any more.


def _is_held(path: pathlib.Path) -> bool:
  with contextlib.ExitStack() as held:
    return not _lock(held, path, fcntl.LOCK_EX)
