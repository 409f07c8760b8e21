"""`report.html` in headless Chromium, from file://: it draws, reacts and sorts, and the console stays empty.

Run by `make test-report`; needs Debian's packages chromium and chromium-driver.
"""

import shutil

import numpy as np
import pytest
from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import Select

from selfreg_jax.data import manifest as manifests
from selfreg_jax.data.prepare import PrepareOptions, prepare
from selfreg_jax.evaluation import html_report
from tests.evaluation import made_up

_FLAGS = (
  "--headless=new",
  "--no-sandbox",
  "--disable-gpu",
  "--no-first-run",
  "--disable-background-networking",
  "--disable-component-update",
  "--disable-sync",
  "--window-size=1300,1000",
)


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
  options = webdriver.ChromeOptions()
  options.binary_location = shutil.which("chromium")
  for flag in (*_FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('browser')}"):
    options.add_argument(flag)
  options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
  driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(shutil.which("chromedriver")))
  yield driver
  driver.quit()


@pytest.fixture(scope="module")
def volumes(tmp_path_factory):
  """A report on phantoms, each predicted worse than the one before; the third misses a class."""
  folder = tmp_path_factory.mktemp("phantom")
  options = PrepareOptions(
    dataset="phantom", output=folder / "prepared", phantom_train_cases=1, phantom_test_cases=3, workers=1
  )
  manifest = prepare(options)
  test_cases = manifest.split("test")
  manifest = made_up.make_manifest(test_cases, classes=manifest.classes, scale=manifest.scale)
  arrays = manifests.CaseArrays(folder / "prepared")

  def load_case(case_id):
    case, number = manifest.cases[case_id], list(manifest.cases).index(case_id)
    truth = np.asarray(arrays.label(case))
    prediction = np.roll(truth, (number + 1, -number), axis=(1, 2))
    if number == 2:
      prediction[prediction == manifest.classes.index("aorta")] = 0
    return arrays.image(case), truth, prediction

  html_report.write_report(folder / "report.html", **made_up.evaluation(manifest, load_case))
  return folder / "report.html", load_case


@pytest.fixture(scope="module")
def images(tmp_path_factory):
  path = tmp_path_factory.mktemp("images") / "report.html"
  html_report.write_report(path, **made_up.images_dataset(12))
  return path


class Page:
  """A report that is open in the browser."""

  def __init__(self, browser, path):
    self.browser = browser
    browser.get_log("browser")
    browser.get(path.as_uri())
    self.wait_for_picture()

  def wait_for_picture(self):
    """Drawing is asynchronous: returns when what the page wants to show is on the canvas."""
    self.browser.execute_async_script("const done = arguments[0]; drawSlice().then(done)")

  def picture(self):
    """The canvas as a string: equal pictures are equal strings."""
    self.wait_for_picture()
    return self.browser.execute_script("return element('canvas').toDataURL()")

  def press(self, *keys):
    self.browser.find_element(By.TAG_NAME, "body").send_keys(*keys)

  def click(self, selector):
    node = self.browser.find_element(By.CSS_SELECTOR, selector)
    self.browser.execute_script("arguments[0].scrollIntoView({block: 'center'})", node)
    node.click()

  def value(self, script):
    return self.browser.execute_script(f"return {script}")

  def column(self, number):
    cells = self.browser.find_elements(By.CSS_SELECTOR, f"#cases tbody tr > :nth-child({number + 1})")
    return [cell.text for cell in cells]

  def sort_directions(self):
    heads = self.browser.find_elements(By.CSS_SELECTOR, "#cases thead th")
    directions = {number: head.get_attribute("aria-sort") for number, head in enumerate(heads)}
    return {number: direction for number, direction in directions.items() if direction}

  def assert_silent(self):
    assert self.browser.get_log("browser") == []


@pytest.fixture
def volume_page(browser, volumes):
  page = Page(browser, volumes[0])
  yield page
  page.assert_silent()


@pytest.fixture
def image_page(browser, images):
  page = Page(browser, images)
  yield page
  page.assert_silent()


def test_the_slider_changes_the_picture(volume_page):
  before = volume_page.picture()
  slider = volume_page.browser.find_element(By.ID, "slice")
  slider.send_keys(Keys.HOME)
  assert volume_page.value("view.position") == 0
  first = volume_page.picture()
  slider.send_keys(Keys.ARROW_RIGHT)
  assert volume_page.value("view.position") == 1
  assert len({before, first, volume_page.picture()}) == 3
  assert "slice 1 of" in volume_page.browser.find_element(By.ID, "caption").text


@pytest.mark.parametrize("name", ["truth", "prediction", "difference"])
@pytest.mark.parametrize("kind", ["volume_page", "image_page"])
def test_toggles_change_the_picture_and_back(request, kind, name):
  page = request.getfixturevalue(kind)
  before = page.picture()
  page.click(f"#show-{name}")
  pressed = page.browser.find_element(By.ID, f"show-{name}").get_attribute("aria-pressed")
  assert pressed == str(name == "difference").lower()
  assert page.picture() != before
  page.click(f"#show-{name}")
  assert page.picture() == before


def test_without_overlays_the_picture_is_grey(volume_page):
  volume_page.press("t", "s")
  volume_page.picture()
  color = """(() => {
    const { width, height } = element("canvas");
    const context = new OffscreenCanvas(width, height).getContext("2d");
    context.drawImage(element("canvas"), 0, 0);
    const { data } = context.getImageData(0, 0, width, height);
    let most = 0;
    for (let i = 0; i < data.length; i += 4) most = Math.max(most, Math.abs(data[i] - data[i + 2]));
    return most;
  })()"""
  assert volume_page.value(color) <= 2
  volume_page.press("t")
  volume_page.picture()
  assert volume_page.value(color) > 60


def test_the_keyboard_moves_through_slices_and_cases(volume_page):
  start = volume_page.value("view.position")
  volume_page.press(Keys.ARROW_RIGHT)
  assert volume_page.value("view.position") == start + 1
  volume_page.press(Keys.ARROW_LEFT, Keys.ARROW_LEFT)
  assert volume_page.value("view.position") == start - 1
  volume_page.press("w")
  assert volume_page.value("view.position") == start
  before = volume_page.picture()
  volume_page.press("n")
  assert volume_page.value("view.case") == 1
  assert volume_page.picture() != before
  volume_page.press("n", "n", "n")
  assert volume_page.value("view.case") == 2
  volume_page.press("p", "p")
  assert volume_page.picture() == before
  for key, name in (("t", "truth"), ("s", "prediction"), ("d", "difference")):
    was = volume_page.value(f"view.{name}")
    volume_page.press(key)
    assert volume_page.value(f"view.{name}") is not was
    assert volume_page.picture() != before


def test_class_maps_arrive_in_the_browser_voxel_by_voxel(volume_page, volumes):
  case_id = volume_page.value("report.cases[view.case]")
  index = volume_page.value("view.pictures.indices[view.position]")
  _, truth, prediction = volumes[1](case_id)
  for name, expected in (("truth", truth), ("prediction", prediction)):
    script = f"const done = arguments[0]; decoded(view.position).then((slice) => done([...slice.{name}]))"
    classes = volume_page.browser.execute_async_script(script)
    turned = expected[index].T[::-1, ::-1]  # (R, A) to the radiological view
    np.testing.assert_array_equal(np.reshape(classes, turned.shape), turned)


def test_a_hidden_class_is_no_longer_painted(volume_page):
  volume_page.press("t")
  before = volume_page.picture()
  liver = volume_page.value("report.classes.findIndex(({ name }) => name === 'liver')")
  volume_page.click(f"#case-scores tbody tr:nth-child({liver}) button")
  assert volume_page.picture() != before
  volume_page.click(f"#case-scores tbody tr:nth-child({liver}) button")
  assert volume_page.picture() == before


def test_a_missed_class_is_named_beside_the_picture(volume_page):
  missed = volume_page.value("report.flags.missed.findIndex((counts) => counts.some(Boolean))")
  Select(volume_page.browser.find_element(By.ID, "case")).select_by_value(str(missed))
  volume_page.wait_for_picture()
  assert "missed" in volume_page.browser.find_element(By.ID, "case-scores").text


def test_sorting_sorts_numbers_in_both_directions_and_leaves_blanks_last(image_page):
  page = image_page
  page.value("(metric.values[3] = [null], drawCaseTable())")  # a case that was not scored
  assert page.sort_directions() == {1: "ascending"}
  rising = page.column(1)
  assert rising[-1] == "\N{EN DASH}"
  numbers = [float(text) for text in rising[:-1]]
  assert numbers == sorted(numbers)
  assert len(set(numbers)) > 5
  page.click("#cases thead th:nth-child(2) button")
  assert page.sort_directions() == {1: "descending"}
  falling = page.column(1)
  assert [float(text) for text in falling[:-1]] == numbers[::-1]
  assert falling[-1] == "\N{EN DASH}"
  page.click("#cases thead th:nth-child(1) button")
  assert page.column(0) == [f"image_{n}" for n in range(12)]  # by number: 2 before 10
  page.browser.switch_to.active_element.send_keys(Keys.ENTER)  # the keyboard sorts too
  assert page.column(0) == [f"image_{n}" for n in reversed(range(12))]
  assert page.sort_directions() == {0: "descending"}


def test_tables_follow_the_chosen_protocol_and_metric(volume_page):
  Select(volume_page.browser.find_element(By.ID, "metric")).select_by_value("hd95")
  assert "HD95 mm" in volume_page.browser.find_element(By.CSS_SELECTOR, "#cases thead").text
  Select(volume_page.browser.find_element(By.ID, "protocol")).select_by_value("paper")
  assert "HD95 voxel" in volume_page.browser.find_element(By.CSS_SELECTOR, "#cases thead").text
  expected = volume_page.value("report.protocols.paper[2].values.map(([aorta]) => aorta.toFixed(2))")
  assert sorted(volume_page.column(2)) == sorted(expected)


def test_a_case_opens_from_the_table_and_from_its_thumbnail(image_page):
  before = image_page.picture()
  image_page.click("#cases tbody tr:nth-child(4) button")
  assert image_page.value("view.case") == 3
  assert image_page.picture() != before
  assert image_page.value("document.querySelector('#cases [aria-current]').dataset.case") == "3"
  image_page.click("#strip button:nth-child(1)")
  assert image_page.picture() == before
  assert image_page.value("document.querySelector('#strip img').naturalWidth") == 90


@pytest.mark.parametrize(("shape", "spacing"), [((4, 30, 40), (5.0, 1.0, 0.2)), ((4, 30, 40), (5.0, 0.2, 1.0))])
@pytest.mark.parametrize("width", [1300, 500])
def test_anisotropic_slices_keep_their_proportions(browser, tmp_path, shape, spacing, width):
  arguments = made_up.volumes_dataset(1, shape=shape, spacing=spacing, axcodes=("S", "R", "A"))
  html_report.write_report(tmp_path / "report.html", **arguments)
  browser.set_window_size(width, 1000)
  page = Page(browser, tmp_path / "report.html")
  box = page.value("element('canvas').getBoundingClientRect().toJSON()")
  # The picture's columns are the array's rows, which run from right to left.
  assert box["width"] / box["height"] == pytest.approx(30 * spacing[1] / (40 * spacing[2]), rel=0.02)
  assert page.value("document.documentElement.scrollWidth <= window.innerWidth")
  browser.set_window_size(1300, 1000)
  page.assert_silent()


def test_images_have_no_slider(image_page):
  assert not image_page.browser.find_element(By.ID, "slice").is_displayed()
  assert not image_page.browser.find_element(By.CSS_SELECTOR, ".slice-keys").is_displayed()
  assert image_page.value("element('canvas').width / element('canvas').height") == pytest.approx(1.5)
  image_page.press(Keys.ARROW_RIGHT)
  assert image_page.value("view.position") == 0


def test_light_and_dark_follow_the_system(image_page):
  backgrounds = set()
  for scheme in ("light", "dark"):
    features = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
    image_page.browser.execute_cdp_cmd("Emulation.setEmulatedMedia", features)
    backgrounds.add(image_page.value("getComputedStyle(document.body).backgroundColor"))
  assert len(backgrounds) == 2
