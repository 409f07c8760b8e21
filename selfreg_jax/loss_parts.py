"""The parts of SCR that a config names: shipped ones by a short name, the user's own as "package.module:function"."""

import importlib
from collections.abc import Callable
from typing import Any

from selfreg_jax.errors import UserError

_HOME = "selfreg_jax.losses"

# By field of the section `loss`: short name -> function of `selfreg_jax.losses`.
SHIPPED: dict[str, dict[str, str]] = {
  "scr_teacher": {"final": "final_map", "deepest_decoder": "deepest_decoder_map"},
  "scr_pairing": {"random": "random_pairing", "index": "index_pairing", "cosine": "cosine_pairing"},
  "scr_pool": {"average": "adaptive_average_pool"},
}


def resolve(field: str, name: str) -> Callable[..., Any]:
  """The function that a field names.

  Args:
    field: a key of `SHIPPED`.
    name: a short name of it, or "package.module:function" of any module that Python finds.

  Returns:
    The function; what it is called with is said at `selfreg_jax.losses.self_regularization`.

  Raises:
    UserError: there is no such short name, or no such module, or no such function in it.
  """
  where = f"config.loss.{field} = {name!r}"
  if name in SHIPPED[field]:
    module_name, function_name = _HOME, SHIPPED[field][name]
  else:
    module_name, separator, function_name = name.partition(":")
    if not (separator and module_name and function_name):
      raise UserError(f"{where}: give one of {', '.join(SHIPPED[field])}, or your own as package.module:function")
  try:
    function = getattr(importlib.import_module(module_name), function_name)
  except Exception as error:  # a user's module may fail in any way while it is imported
    raise UserError(
      f"{where}: cannot be imported ({type(error).__name__}: {error}); Python looks for modules along PYTHONPATH"
    ) from error
  if not callable(function):
    raise UserError(f"{where}: is a {type(function).__name__}, not a function")
  return function
