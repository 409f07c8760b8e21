"""JSON from outside: what is no object of bounded size is refused, and values come as the types that are asked for."""

import dataclasses

import pytest

from selfreg_jax.data import json_files


@pytest.mark.parametrize(
  ("content", "message"),
  [
    ("[]", "a JSON list, not an object"),
    ('{"a": ' * 100_000, "nested too deeply"),
    ('{"a": ' + "[" * 100_000 + "]" * 100_000 + "}", "nested too deeply"),
    ('{"a": 1, "b": {"c": 1, "c": 2}}', "names 'c' twice"),
    ('{"a": ' + "1" * 5000 + "}", "4300 digits"),
    ('{"a": 1', "cannot be read as JSON"),
    ('{"a": "' + "a" * (1 << 20) + '"}', "holds more than 1 MiB"),
  ],
)
def test_other_content_is_refused(tmp_path, content, message):
  (tmp_path / "a.json").write_text(content)
  with pytest.raises(ValueError, match=message):
    json_files.load_object(tmp_path / "a.json", 1 << 20)


def test_folders_missing_files_and_other_encodings_are_refused(tmp_path):
  with pytest.raises(ValueError, match="not a file"):
    json_files.load_object(tmp_path, 100)
  with pytest.raises(ValueError, match="No such file"):
    json_files.load_object(tmp_path / "none.json", 100)
  (tmp_path / "a.json").write_text("{}", encoding="utf-16")
  with pytest.raises(ValueError, match="decode"):
    json_files.load_object(tmp_path / "a.json", 100)


@dataclasses.dataclass(frozen=True)
class Inner:
  name: str
  size: float | None = None


@dataclasses.dataclass(frozen=True)
class Outer:
  pair: tuple[int, float]
  inner: dict[str, Inner]
  names: str | list[str]
  numbers: tuple[tuple[int, ...], ...] | None


GOOD = {"pair": [1, 2], "inner": {"a": {"name": "x"}}, "names": ["y"], "numbers": [[1], []]}


def test_values_become_the_types_of_the_fields():
  expected = Outer((1, 2), {"a": Inner("x")}, ["y"], ((1,), ()))
  assert json_files.as_type(GOOD, Outer, "it") == expected
  assert json_files.as_type(GOOD | {"numbers": None, "names": "y"}, Outer, "it").numbers is None


@pytest.mark.parametrize(
  ("change", "message"),
  [
    ({"pair": [1]}, "it.pair is a list of 1"),
    ({"pair": [True, 2]}, r"it.pair\[0\] is true, not int"),
    ({"pair": [1, "2"]}, r'it.pair\[1\] is "2", not float'),
    ({"pair": [1, float("nan")]}, "NaN, not float"),
    ({"pair": [1, 10**400]}, "not float"),
    ({"inner": {"a": {}}}, r"it.inner\['a'\] has no name"),
    ({"inner": {"a": {"name": "x", "colour": 1}}}, '"colour", which is not known'),
    ({"inner": []}, "it.inner is a list of 0"),
    ({"names": [1]}, "it.names"),
    ({"numbers": [[1], 2]}, "it.numbers"),
    ({"more": 1}, '"more", which is not known'),
  ],
)
def test_other_types_are_named_with_their_place(change, message):
  with pytest.raises(ValueError, match=message):
    json_files.as_type(GOOD | change, Outer, "it")
