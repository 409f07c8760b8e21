"""Compiled programs kept between runs (JAX's persistent compilation cache), by default in the user's cache folder.

An entry is found by the program, the compiler's version and flags and the machine's features. On a CPU a cached program
is the one that would be compiled. On a GPU the compiler tries several kernels and keeps the fastest, so a program that
is compiled anew may round otherwise than one from the cache; what the cache holds stays the same.
"""

import os
import pathlib
import sys
import tempfile
from collections.abc import Mapping

from absl import flags

# A training step takes 0.3 to 3 MB. Beyond this size JAX removes what has not been used for longest.
_MOST_BYTES = 2 * 2**30
_LOCK_FILE = ".lockfile"  # JAX's, which every reading and writing process holds while it does so
_LOCK_TIMEOUT = 10.0
_LEAST_SECONDS = 1.0  # of compiling; what is faster to compile is not worth a file


def define_flags() -> None:
  """Defines --cache; `from_flags` reads it."""
  flags.DEFINE_string(
    "cache",
    "on",
    "Where compiled programs are kept for the next start: on (selfreg_jax/jax in the user's cache folder; nowhere with "
    "several processes), off, or a folder (with several processes one that all of them see). Unless off, JAX's own "
    "JAX_COMPILATION_CACHE_DIR is used instead where it is set.",
  )


def from_flags() -> None:
  """Does what --cache says; must come before anything is compiled."""
  use(flags.FLAGS.cache)


def default_folder(environment: Mapping[str, str] = os.environ, platform: str = sys.platform) -> pathlib.Path:
  """selfreg_jax/jax in the user's cache folder: $XDG_CACHE_HOME, else ~/Library/Caches on a Mac, else ~/.cache.

  Args:
    environment: of the process.
    platform: as `sys.platform`.

  Returns:
    The folder, which need not exist.

  Raises:
    RuntimeError: the user has no home.
  """
  caches = environment.get("XDG_CACHE_HOME", "")
  if not os.path.isabs(caches):  # also where it is unset; the XDG specification has relative paths ignored
    caches = pathlib.Path.home() / ("Library/Caches" if platform == "darwin" else ".cache")
  return pathlib.Path(caches) / "selfreg_jax" / "jax"


def use(choice: str = "on") -> pathlib.Path | None:
  """Switches JAX's persistent compilation cache on or off.

  A folder that cannot be used is told on standard error: programs are then compiled anew at each start.

  Args:
    choice: "on" (the default folder; with several processes none), "off" or a folder. A folder that JAX was already
      given, such as by JAX_COMPILATION_CACHE_DIR, is left as it is, with JAX's settings for it, unless the choice is
      "off".

  Returns:
    The folder that is used from now on; None where there is none, or JAX had one before.
  """
  import jax  # a wrong flag is told before JAX has started

  if choice in ("off", ""):
    jax.config.update("jax_enable_compilation_cache", False)
    return None
  if jax.config.jax_compilation_cache_dir or not jax.config.jax_enable_compilation_cache:
    return None
  if choice == "on" and jax.distributed.is_initialized():
    # Only process 0 writes. Where the others do not see its folder, they would compile alone what it finds: on GPUs
    # they would wait for its part of the autotuning, or come to another program. So it takes a shared folder.
    return None
  try:
    folder = default_folder() if choice == "on" else pathlib.Path(choice).absolute()
    _make_usable(folder)
  except (OSError, RuntimeError) as error:  # Timeout of the lock is an OSError; no home is a RuntimeError
    print(
      f"warning: compiled programs are not kept for the next start ({error}); another folder: --cache=DIR, none: "
      "--cache=off",
      file=sys.stderr,
    )
    return None
  jax.config.update("jax_compilation_cache_dir", str(folder))
  jax.config.update("jax_compilation_cache_max_size", _MOST_BYTES)
  jax.config.update("jax_persistent_cache_min_compile_time_secs", _LEAST_SECONDS)
  # The autotuner's own files on GPU would lie in the same folder, beyond any bound.
  jax.config.update("jax_persistent_cache_enable_xla_caches", "none")
  return folder


def _make_usable(folder: pathlib.Path) -> None:
  """Creates a cache folder and removes entries that a killed process has left unfinished.

  JAX writes an entry, then the time of its last use, both under its lock. Where the second is missing, the first may be
  cut short; left there, it would be reported at every start and keep anything from ever being removed.

  Raises:
    OSError: it cannot be written or locked.
  """
  import filelock

  # What lies there is run: nobody else may write into it.
  folder.mkdir(mode=0o700, parents=True, exist_ok=True)
  with tempfile.TemporaryFile(dir=folder), filelock.FileLock(folder / _LOCK_FILE, timeout=_LOCK_TIMEOUT):
    for entry in folder.glob("*-cache"):
      if not entry.with_name(entry.name.removesuffix("-cache") + "-atime").exists():
        entry.unlink(missing_ok=True)
