"""Mistakes of the user's, told apart from faults of the program, and the exit codes that scripts can rely on."""

import sys
from collections.abc import Callable

from absl import flags, logging

EXIT_OK = 0
EXIT_FAULT = 1
EXIT_USER_MISTAKE = 2
EXIT_RESUMABLE = 75


class UserError(Exception):
  """Something that the user can mend: the message names the file or field, says what is wrong and what to do.

  Commands print the message without a traceback and exit with code 2 (`run_command`).
  """


def run_command(command: Callable[[], None]) -> int:
  """Runs a command's body and turns a `UserError` into one message on stderr and exit code 2.

  Args:
    command: the body; anything it raises besides `UserError` is a fault of the program and keeps its traceback.

  Returns:
    The exit code for `sys.exit`: 0, or 2 after a user's mistake.
  """
  try:
    command()
  except UserError as error:
    print(f"error: {error}", file=sys.stderr, flush=True)
    return EXIT_USER_MISTAKE
  return EXIT_OK


def parse_flags(argv: list[str]) -> list[str]:
  """For `absl.app.run(flags_parser=...)`: a wrong flag or config field is one message and exit code 2, no traceback.

  Args:
    argv: of the process.

  Returns:
    What is not a flag, the program's name first.
  """
  # Orbax and JAX report each of their stages; --verbosity=0 shows them.
  logging.set_verbosity(logging.ERROR)
  try:
    rest = flags.FLAGS(argv)
  except (flags.Error, AttributeError, KeyError, OSError, TypeError, ValueError) as error:
    # ml_collections raises the latter for unknown fields (naming the nearest one), wrong types and missing files.
    print(f"error: {error}", file=sys.stderr)
    sys.exit(EXIT_USER_MISTAKE)
  if len(rest) > 1:
    print(f"error: unexpected argument {rest[1]!r}; flags are written --name=value", file=sys.stderr)
    sys.exit(EXIT_USER_MISTAKE)
  return rest
