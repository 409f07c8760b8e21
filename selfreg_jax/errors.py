"""Mistakes of the user's, told apart from faults of the program, and the exit codes that scripts can rely on."""

import sys
from collections.abc import Callable
from typing import Any, NoReturn

from absl import flags, logging

EXIT_OK = 0
EXIT_FAULT = 1
EXIT_USER_MISTAKE = 2
EXIT_RESUMABLE = 75


class UserError(Exception):
  """Something that the user can mend: the message names the file or field, says what is wrong and what to do.

  Commands print the message without a traceback and exit with code 2 (`run_command`).
  """


class FaultError(Exception):
  """Something that stops a run and is nobody's mistake: a full disk, a loss that is not finite, a lost process.

  Commands print the message without a traceback and exit with code 1 (`run_command`).
  """


def run_command(command: Callable[[], None]) -> int:
  """Runs a command's body and turns what it raises on purpose into one message on stderr and an exit code.

  Args:
    command: the body; anything it raises besides `UserError` and `FaultError` is a fault of the program and keeps its
      traceback.

  Returns:
    The exit code for `sys.exit`: 0, 2 after a user's mistake, or 1 after a fault.
  """
  try:
    command()
  except (UserError, FaultError) as error:
    print(f"error: {error}", file=sys.stderr, flush=True)
    return EXIT_USER_MISTAKE if isinstance(error, UserError) else EXIT_FAULT
  return EXIT_OK


def check_config_file(config_flag: Any) -> None:
  """Raises UserError where the file of a config flag could not be loaded, which ml_collections tells on first use."""
  try:
    list(config_flag.value)
  except OSError as error:
    raise UserError(f"--config: {str(error).rpartition('failure to load: ')[2]}") from error


def parse_flags(argv: list[str], *, most_arguments: int = 0) -> list[str]:
  """For `absl.app.run(flags_parser=...)`: a wrong flag or config field is one message and exit code 2, no traceback.

  Args:
    argv: of the process.
    most_arguments: how many arguments that are no flags the command takes.

  Returns:
    What is not a flag, the program's name first.
  """
  # Orbax reports each of its stages, and each of its errors several times with tracebacks before it raises them;
  # --verbosity=0 shows it all.
  logging.set_verbosity(logging.FATAL)
  try:
    rest = flags.FLAGS(argv)
  except (flags.Error, UserError) as error:  # a config file may refuse the argument behind its colon
    _exit(str(error))
  except (AttributeError, KeyError) as error:  # of ml_collections: it names the nearest field, if there is one
    message = str(error.args[0]) if error.args else str(error)
    _exit(f"config: no such field: {' '.join(message.split())}")
  except (OSError, TypeError, ValueError) as error:  # of ml_collections: a missing file, a value of another type
    _exit(f"config: {error}")
  except (ImportError, SyntaxError) as error:  # of the config file itself
    _exit(f"config: {type(error).__name__} in the config file: {error}")
  if len(rest) > 1 + most_arguments:
    _exit(f"unexpected argument {rest[1 + most_arguments]!r}; flags are written --name=value")
  return rest


def _exit(message: str) -> NoReturn:
  print(f"error: {message}", file=sys.stderr)
  sys.exit(EXIT_USER_MISTAKE)
