"""JSON files that come from outside: one object each, of bounded size, of the types that are expected."""

import dataclasses
import functools
import json
import math
import pathlib
import types
import typing
from typing import Any


def load_object(path: pathlib.Path, most_bytes: int) -> dict[str, Any]:
  """Reads a file that holds one JSON object.

  Args:
    path: the file.
    most_bytes: that it may have; parsed JSON takes up to thirty times its length in memory.

  Returns:
    The object.

  Raises:
    ValueError: there is no such file, or it holds something else or a name twice; the message does not name the file.
  """
  try:
    if path.exists() and not path.is_file():
      raise ValueError("is not a file")
    if path.stat().st_size > most_bytes:
      raise ValueError(f"holds more than {most_bytes >> 20} MiB")
    content = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_without_repeats)
  except OSError as error:
    raise ValueError(f"cannot be read ({error.strerror or error})") from error
  except RecursionError as error:
    raise ValueError("cannot be read as JSON (nested too deeply)") from error
  except (json.JSONDecodeError, UnicodeDecodeError) as error:
    raise ValueError(f"cannot be read as JSON ({error})") from error
  if not isinstance(content, dict):
    raise ValueError(f"holds a JSON {type(content).__name__}, not an object")
  return content


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
  """The object of these pairs; JSON itself lets the last of equal names win."""
  content = dict(pairs)
  if len(content) < len(pairs):
    names = [name for name, _ in pairs]
    twice = next(name for name in names if names.count(name) > 1)
    raise ValueError(f"names {twice!r} twice")
  return content


def as_type(value: Any, kind: Any, where: str) -> Any:
  """Takes a parsed JSON value for the type that a dataclass's field is annotated with.

  Args:
    value: as `json` gives it.
    kind: a dataclass, `int`, `float`, `str`, `None`, or a tuple, list, dict or union of such.
    where: the value's place, for messages.

  Returns:
    The value; lists become tuples where these are asked for, objects become dataclasses.

  Raises:
    ValueError: it is of another type, or a number that is not finite.
  """
  if dataclasses.is_dataclass(kind):
    return _as_dataclass(value, kind, where)
  origin, arguments = typing.get_origin(kind), typing.get_args(kind)
  if origin is types.UnionType:
    return _as_one_of(value, arguments, where)
  if origin is dict and isinstance(value, dict):
    return {key: as_type(item, arguments[1], f"{where}[{key!r}]") for key, item in value.items()}
  if origin in (tuple, list) and isinstance(value, list):
    repeated = origin is list or arguments[-1] is Ellipsis
    kinds = arguments[:1] * len(value) if repeated else arguments
    if len(kinds) == len(value):
      pairs = enumerate(zip(value, kinds, strict=True))
      return origin(as_type(item, of, f"{where}[{index}]") for index, (item, of) in pairs)
  if type(value) is kind and (kind is not float or math.isfinite(value)):
    return value
  if kind is float and type(value) is int and abs(value) < 1 << 53:
    return value
  raise ValueError(f"{where} is {_shortened(value)}, not {getattr(kind, '__name__', kind) if origin is None else kind}")


def _as_one_of(value: Any, kinds: tuple[Any, ...], where: str) -> Any:
  faults = []
  for kind in kinds:
    try:
      return as_type(value, kind, where)
    except ValueError as error:
      faults.append(str(error))
  raise ValueError(faults[0])


def _as_dataclass(value: Any, kind: type, where: str) -> Any:
  if not isinstance(value, dict):
    raise ValueError(f"{where} is {_shortened(value)}, not an object")
  hints = _hints(kind)
  if missing := [field.name for field in dataclasses.fields(kind) if field.name not in value and _needed(field)]:
    raise ValueError(f"{where} has no {', '.join(missing)}")
  if strange := sorted({*value} - {*hints}):
    raise ValueError(f"{where} has {', '.join(map(_shortened, strange))}, which is not known")
  return kind(**{name: as_type(item, hints[name], f"{where}.{name}") for name, item in value.items()})


def _needed(field: dataclasses.Field) -> bool:
  return field.default is dataclasses.MISSING


@functools.cache
def _hints(kind: type) -> dict[str, Any]:
  hints = typing.get_type_hints(kind)
  return {field.name: hints[field.name] for field in dataclasses.fields(kind)}


def _shortened(value: Any) -> str:
  if isinstance(value, (dict, list)):
    return f"{'an object' if isinstance(value, dict) else 'a list'} of {len(value)}"
  text = json.dumps(value)
  return text if len(text) <= 60 else f"{text[:60]}..."
