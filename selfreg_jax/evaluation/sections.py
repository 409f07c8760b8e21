"""Further sections of a report: what other commands have found out about a run, kept beside its evaluation.

A section is a file `sections/NAME.json` in the evaluation's folder. `eval.py` puts all that it finds there into
`report.html`, and leaves the files where they are, so that the next evaluation finds them again.
"""

import dataclasses
import html
import json
import pathlib
from collections.abc import Mapping
from typing import Any

from selfreg_jax.errors import UserError

FOLDER = "sections"


@dataclasses.dataclass(frozen=True)
class Section:
  """A section of a report.

  Attributes:
    title: plain text.
    content: trusted HTML that needs no network: pictures as data.
    made_of: what an evaluation's summary must hold for the section to be about the same network and data, such as
      {"checkpoint": {"step": 100}}.
  """

  title: str
  content: str
  made_of: Mapping[str, Mapping[str, Any]]

  def shown(self, summary: Mapping[str, Any]) -> tuple[str, str]:
    """Title and content for the report of an evaluation, with a remark where that is of something else."""
    differing = [
      f"{group} {name} {value}, here {summary.get(group, {}).get(name)}"
      for group, values in self.made_of.items()
      for name, value in values.items()
      if summary.get(group, {}).get(name) != value
    ]
    if not differing:
      return self.title, self.content
    remark = f"Made of something else than this evaluation: {'; '.join(differing)}."
    return self.title, f'<p class="bad">{html.escape(remark)}</p>{self.content}'


def write(folder: pathlib.Path, name: str, section: Section) -> None:
  """Puts a section beside an evaluation, in place of one of the same name; the file exists whole or not at all.

  Args:
    folder: of the evaluation, which need not be there yet.
    name: of the section's file.
    section: what is to be shown.

  Raises:
    OSError: it cannot be written.
  """
  path = folder / FOLDER / f"{name}.json"
  path.parent.mkdir(parents=True, exist_ok=True)
  temporary = path.with_name(path.name + ".partial")
  temporary.write_text(json.dumps(dataclasses.asdict(section)), encoding="utf-8")
  temporary.replace(path)


def read(folder: pathlib.Path) -> list[Section]:
  """The sections beside an evaluation, by name of their files; raises UserError where one cannot be read."""
  found = []
  for path in sorted((folder / FOLDER).glob("*.json")):
    try:
      found.append(Section(**json.loads(path.read_text(encoding="utf-8"))))
    except (OSError, ValueError, TypeError) as error:
      raise UserError(
        f"{path}: is no section of a report ({error}); remove the file, or make the section anew"
      ) from error
  return found
