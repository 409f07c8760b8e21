"""What every worker process of this package does first. Never imports JAX."""

import multiprocessing
import os
import signal
import threading

from selfreg_jax.errors import EXIT_FAULT


def start_worker() -> None:
  """Leaves Ctrl-C to the main process, and ends the worker if that is killed: it would wait for work for ever."""
  signal.signal(signal.SIGINT, signal.SIG_IGN)
  threading.Thread(target=_exit_with_parent, daemon=True).start()


def _exit_with_parent() -> None:
  multiprocessing.parent_process().join()
  os._exit(EXIT_FAULT)
