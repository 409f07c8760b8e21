import json
import os
import pathlib
import subprocess
import sys

import jax
import pytest

from selfreg_jax import compilation_cache

_SETTINGS = (
  "jax_compilation_cache_dir",
  "jax_compilation_cache_max_size",
  "jax_enable_compilation_cache",
  "jax_persistent_cache_min_compile_time_secs",
  "jax_persistent_cache_enable_xla_caches",
)


def settings():
  return {name: getattr(jax.config, name) for name in _SETTINGS}


@pytest.fixture
def fresh_jax(monkeypatch, tmp_path):
  """JAX without a cache, whatever the tests use; the user's caches are at tmp_path/caches."""
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "caches"))
  before = settings()
  jax.config.update("jax_compilation_cache_dir", None)
  yield tmp_path
  for name, value in before.items():
    jax.config.update(name, value)


def test_the_folder_is_the_users_cache_folder():
  home = pathlib.Path.home()
  assert compilation_cache.default_folder({}, "linux") == home / ".cache/selfreg_jax/jax"
  assert compilation_cache.default_folder({}, "darwin") == home / "Library/Caches/selfreg_jax/jax"
  assert compilation_cache.default_folder({"XDG_CACHE_HOME": "/c"}, "linux") == pathlib.Path("/c/selfreg_jax/jax")
  assert compilation_cache.default_folder({"XDG_CACHE_HOME": "here"}, "linux") == home / ".cache/selfreg_jax/jax"


def test_the_cache_is_on_by_default_bounded_and_private(fresh_jax):
  folder = compilation_cache.use()
  assert folder == fresh_jax / "caches/selfreg_jax/jax"
  assert settings()["jax_compilation_cache_dir"] == str(folder)
  assert 0 < settings()["jax_compilation_cache_max_size"] <= 2**31
  assert folder.stat().st_mode & 0o777 == 0o700


def test_it_can_be_switched_off_or_moved(fresh_jax):
  assert compilation_cache.use(str(fresh_jax / "elsewhere")) == fresh_jax / "elsewhere"
  assert compilation_cache.use("off") is None
  assert not jax.config.jax_enable_compilation_cache
  assert not (fresh_jax / "caches").exists()


def test_what_jax_was_told_stays(fresh_jax):
  jax.config.update("jax_compilation_cache_dir", "given")
  before = settings()
  assert compilation_cache.use() is None
  assert settings() == before
  assert not (fresh_jax / "caches").exists()


def test_several_processes_need_a_folder_that_all_of_them_see(fresh_jax, monkeypatch):
  monkeypatch.setattr(jax.distributed, "is_initialized", lambda: True)
  assert compilation_cache.use() is None
  assert compilation_cache.use(str(fresh_jax / "shared")) == fresh_jax / "shared"


def test_a_folder_that_cannot_be_used_is_a_warning(fresh_jax, capsys):
  (fresh_jax / "caches").write_text("a file")
  assert compilation_cache.use() is None
  assert settings()["jax_compilation_cache_dir"] is None
  warning = capsys.readouterr().err
  assert warning.startswith("warning: compiled programs are not kept")
  assert warning.count("\n") == 1
  assert "--cache=off" in warning


def test_what_a_killed_process_left_unfinished_is_removed(fresh_jax):
  folder = compilation_cache.use()
  for name in ("whole-cache", "whole-atime", "cut-cache", "other"):
    (folder / name).write_bytes(b"1")
  compilation_cache.use("off")
  jax.config.update("jax_compilation_cache_dir", None)
  jax.config.update("jax_enable_compilation_cache", True)
  compilation_cache.use()
  assert {path.name for path in folder.iterdir()} == {"whole-cache", "whole-atime", "other", ".lockfile"}


_PROGRAM = """
import json, sys, jax
from selfreg_jax import compilation_cache
compilation_cache.use()
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
jax.config.update("jax_raise_persistent_cache_errors", True)
events = []
jax.monitoring.register_event_listener(lambda name, **_: events.append(name.rpartition("/")[2]))
for _ in range(2):
  jax.jit(lambda x: x * 2 + 1)(1.0)
  jax.clear_caches()
print(json.dumps([events.count("cache_misses") > 0, events.count("cache_hits") > 0]))
"""


def test_jax_finds_again_what_it_compiled(tmp_path):
  environment = {name: value for name, value in os.environ.items() if not name.startswith("JAX_COMPILATION_CACHE")}
  environment |= {"XDG_CACHE_HOME": str(tmp_path), "XLA_FLAGS": ""}
  result = subprocess.run(
    [sys.executable, "-c", _PROGRAM],
    cwd=pathlib.Path(__file__).parent.parent,
    env=environment,
    capture_output=True,
    text=True,
    check=False,
  )
  assert result.returncode == 0, result.stderr
  assert json.loads(result.stdout) == [True, True]
  names = [path.name for path in (tmp_path / "selfreg_jax/jax").iterdir()]
  assert any(name.endswith("-cache") for name in names)
