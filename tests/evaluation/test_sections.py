import pytest
from rich.console import Console

from selfreg_jax.errors import UserError
from selfreg_jax.evaluation import html_report, scoring, sections
from selfreg_jax.evaluation.sections import Section
from tests.evaluation import made_up
from tests.evaluation.made_datasets import write_image_dataset, write_run


def quiet():
  return Console(width=100, file=open("/dev/null", "w"))


def test_what_others_have_found_out_goes_into_every_report_of_a_run(tmp_path):
  write_image_dataset(tmp_path / "data", count=5)
  run = write_run(tmp_path / "data", tmp_path / "run")
  folder = scoring.default_output(run, "test", None)
  sections.write(folder, "blocks", Section("Blocks", "<p>their content</p>", {"checkpoint": {"step": 0}}))
  sections.write(folder, "older", Section("Older", "<p>of step 7</p>", {"checkpoint": {"step": 7}}))
  for _ in range(2):
    scoring.evaluate_workdir(run, scoring.Request(), console=quiet())
    page = (folder / "report.html").read_text()
    assert "<h2>Blocks</h2><p>their content</p></section>" in page
    assert "Made of something else than this evaluation: checkpoint step 7, here 0.</p><p>of step 7</p>" in page
  (folder / "sections" / "blocks.json").write_text("{")
  with pytest.raises(UserError, match=r"sections/blocks\.json: is no section"):
    scoring.evaluate_workdir(run, scoring.Request(), console=quiet())


def test_sections_of_a_page_are_replaced_and_the_rest_stays(tmp_path):
  arguments = made_up.images_dataset(2)
  path = tmp_path / "report.html"
  html_report.write_report(path, **arguments)
  plain = path.read_text()
  assert html_report.replace_sections(path, [("A", "<p>first</p>"), ("B <", "<p>second</p>")])
  page = path.read_text()
  assert "<h2>A</h2><p>first</p>" in page
  assert "<h2>B &lt;</h2><p>second</p>" in page
  html_report.write_report(
    tmp_path / "again.html", **arguments, sections=[("A", "<p>first</p>"), ("B <", "<p>second</p>")]
  )
  assert page == (tmp_path / "again.html").read_text()
  assert html_report.replace_sections(path, [])
  assert path.read_text() == plain
  path.write_text("<html>another page</html>")
  assert not html_report.replace_sections(path, [("A", "")])
  assert path.read_text() == "<html>another page</html>"


def test_a_page_of_sections_alone_needs_no_network(tmp_path):
  path = tmp_path / "page.html"
  html_report.write_page(path, title="a < b", sections=[("One", "<p>content</p>")])
  page = path.read_text()
  assert "<title>a &lt; b</title>" in page
  assert "<h2>One</h2><p>content</p>" in page
  assert "For research, not for clinical use." in page
  assert "{{" not in page
  assert "http" not in page.replace("http-equiv", "")
