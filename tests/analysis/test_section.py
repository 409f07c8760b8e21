import json

import pytest

from selfreg_jax import workdir as workdirs
from selfreg_jax.analysis import section
from selfreg_jax.evaluation import html_report
from tests.evaluation import made_up


@pytest.fixture
def evaluated(tmp_path):
  """A workdir whose test split has been evaluated, and the summary of an analysis of it."""
  arguments = made_up.images_dataset(2)
  folder = tmp_path / "eval" / "test"
  folder.mkdir(parents=True)
  html_report.write_report(folder / "report.html", **arguments)
  (folder / "summary.json").write_text(json.dumps(arguments["summary"]))
  data = {name: arguments["summary"]["data"][name] for name in ("split", "fingerprint")}
  return tmp_path, {"data": data, "runs": [{"checkpoint": {"step": 900}}], "request": {"data": None}}


def test_a_report_that_is_there_gets_the_section_and_the_newest_one_only(evaluated):
  workdir, summary = evaluated
  page = workdir / "eval" / "test" / "report.html"
  assert section.register(workdir, "<p>first look</p>", summary).endswith("has a section of this")
  assert "<p>first look</p>" in page.read_text()
  section.register(workdir, "<p>second look</p>", summary)
  text = page.read_text()
  assert "<p>second look</p>" in text
  assert "first look" not in text
  assert "Made of something else" not in text
  summary["runs"][0]["checkpoint"]["step"] = 800
  section.register(workdir, "<p>third look</p>", summary)
  assert "checkpoint step 800, here 900.</p><p>third look</p>" in page.read_text()


def test_a_report_that_cannot_take_the_section_stays_as_it_is_and_that_is_said(evaluated):
  workdir, summary = evaluated
  folder = workdir / "eval" / "test"
  before = (folder / "report.html").read_text()
  with workdirs.hold(folder, what="evaluation", flag="--output"):
    assert "another evaluation is using this folder" in section.register(workdir, "<p>look</p>", summary)
  assert (folder / "report.html").read_text() == before
  (folder / "report.html").write_text("<html>of an older version</html>")
  assert "is of an older version" in section.register(workdir, "<p>look</p>", summary)
  assert (folder / "report.html").read_text() == "<html>of an older version</html>"
