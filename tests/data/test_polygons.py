"""ImageScope outlines to masks, against shapes counted by hand and another implementation."""

import numpy as np
import pytest
from matplotlib.path import Path as Outline

from selfreg_jax.data import polygons
from selfreg_jax.data.cases import CaseError


def write_xml(path, *outlines, region_attributes=""):
  regions = "".join(
    f'<Region Id="{number}" {region_attributes}><Attributes/><Vertices>'
    + "".join(f'<Vertex X="{x}" Y="{y}" Z="0"/>' for x, y in outline)
    + "</Vertices></Region>"
    for number, outline in enumerate(outlines, 1)
  )
  path.write_text(
    '<Annotations MicronsPerPixel="0.252"><Annotation Id="1"><Attributes/>'
    f"<Regions><RegionAttributeHeaders/>{regions}</Regions><Plots/></Annotation></Annotations>"
  )
  return path


def mask(*outlines, shape=(6, 8)):
  return polygons.rasterize([np.array(outline, float) for outline in outlines], shape)


def test_a_rectangle_covers_the_pixels_whose_centres_it_holds():
  expected = np.zeros((6, 8), bool)
  expected[1:4, 2:7] = True
  np.testing.assert_array_equal(mask([(2, 1), (7, 1), (7, 4), (2, 4)]), expected)
  np.testing.assert_array_equal(mask([(1.6, 0.6), (6.6, 0.6), (6.6, 4.4), (1.6, 4.4)]), expected)
  assert not mask([(2.6, 2.6), (3.4, 2.6), (3.4, 3.4), (2.6, 3.4)]).any()


def test_a_diagonal_cuts_where_it_should():
  triangle = mask([(0, 0), (6, 0), (0, 6)], shape=(6, 6))
  rows, columns = np.indices((6, 6)) + 0.5
  np.testing.assert_array_equal(triangle, rows + columns < 6)


def test_holes_of_self_crossing_outlines_and_unions_of_several():
  angles = np.pi / 2 + np.arange(5) * 4 * np.pi / 5
  star = np.stack([50 + 45 * np.cos(angles), 50 + 45 * np.sin(angles)], axis=1)
  drawn = mask(star, shape=(100, 100))
  assert not drawn[50, 50]  # even-odd: the inner pentagon is outside
  assert drawn[85, 50]
  square = [(40, 40), (60, 40), (60, 60), (40, 60)]
  assert mask(star, square, shape=(100, 100))[50, 50]
  assert mask(square, square, shape=(100, 100)).sum() == 400  # a union, not even-odd over polygons


def test_random_outlines_agree_with_matplotlib():
  rng = np.random.default_rng(1)
  centers = np.stack(np.meshgrid(np.arange(60) + 0.5, np.arange(50) + 0.5), axis=-1).reshape(-1, 2)
  for _ in range(20):
    angles = np.sort(rng.uniform(0, 2 * np.pi, 30))
    radii = rng.uniform(5, 30, 30)
    outline = rng.uniform(15, 40, 2) + radii[:, None] * np.stack([np.cos(angles), np.sin(angles)], axis=1)
    expected = Outline(np.vstack([outline, outline[:1]])).contains_points(centers).reshape(50, 60)
    np.testing.assert_array_equal(mask(outline, shape=(50, 60)), expected)


def test_outlines_over_the_border_are_cut_and_far_ones_refused():
  assert mask([(-3, -2), (9, -2), (9, 8), (-3, 8)]).all()
  assert mask([(3, 3)], [(1, 1), (5, 5)]).sum() == 0  # clicks without an outline
  with pytest.raises(CaseError, match=r"region 2 reaches to \(5000, 10\); the image has 8 x 6"):
    mask([(0, 0), (1, 0), (1, 1)], [(0, 0), (5000, 10), (3, 3)])


def test_vertices_are_read_in_order(tmp_path):
  first, second = [(1.5, 2), (3, 4.25), (0, 5)], [(7, 7), (8, 7), (8, 8), (7, 8)]
  read = polygons.read_polygons(write_xml(tmp_path / "a.xml", first, second))
  assert [polygon.tolist() for polygon in read] == [[list(map(float, v)) for v in o] for o in (first, second)]


def test_unusable_files_are_refused(tmp_path):
  path = write_xml(tmp_path / "a.xml", [(0, 0), (1, 0), (1, 1)])
  good = path.read_text()
  for content, match in [
    (good[:-40], "no XML"),
    ("", "empty"),
    ("<Annotations/>", "holds no Annotations"),
    ("<svg><Annotation><Regions><Region/></Regions></Annotation></svg>", "holds no Annotations"),
    (good.replace('X="1"', 'X="one"', 1), "region 1: a vertex without"),
    (good.replace('X="1"', "", 1), "region 1: a vertex without"),
    (good.replace('X="1"', 'X="inf"', 1), "not finite"),
    ('<?xml version="1.0" encoding="klingon"?>' + good, "no XML"),
    ('<!DOCTYPE a [<!ENTITY b "c">]>' + good, "document type"),
    ('<!DOCTYPE a SYSTEM "file:///etc/passwd">' + good, "document type"),
  ]:
    path.write_text(content)
    with pytest.raises(CaseError, match=match):
      polygons.read_polygons(path)
  with pytest.raises(CaseError, match="NegativeROA"):
    polygons.read_polygons(write_xml(path, [(0, 0), (1, 0), (1, 1)], region_attributes='NegativeROA="1"'))


def test_files_regions_and_vertices_beyond_any_image_are_refused(tmp_path, monkeypatch):
  path = write_xml(tmp_path / "a.xml", [(0, 0), (1, 0), (1, 1)], [(4, 4), (5, 4), (5, 5)])
  for name, most, match in [
    ("_MOST_VERTICES", 2, "region 1 has 3 vertices"),
    ("_MOST_REGIONS", 1, "holds 2 regions"),
    ("_MOST_BYTES", 100, "holds more than"),
  ]:
    with monkeypatch.context() as patch:
      patch.setattr(polygons, name, most)
      with pytest.raises(CaseError, match=match):
        polygons.read_polygons(path)


def test_outlines_of_everything_over_and_over_are_refused():
  everything = [(0, 0), (8, 0), (8, 6), (0, 6)]
  assert mask(*[everything] * 16).all()
  with pytest.raises(CaseError, match="more than 16 times"):
    mask(*[everything] * 17)
