"""Every claim about speed and memory, as a command that measures both sides in one run."""

import os

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # two frameworks share a GPU
