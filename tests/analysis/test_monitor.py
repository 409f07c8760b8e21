import json

import jax
import numpy as np
import pytest
from scipy import ndimage

import selfreg_jax as sr
from selfreg_jax.analysis import grad_cam
from selfreg_jax.analysis.monitor import Monitor
from selfreg_jax.analysis.taps import TappedNetwork
from selfreg_jax.data import manifest as manifests
from selfreg_jax.data.augment import spline_matrix
from selfreg_jax.errors import UserError
from selfreg_jax.training.loop import train_and_evaluate
from tests.conftest import make_prepared


def test_training_writes_the_redundancy_of_every_block(small_config, tmp_path):
  small_config.train.analyze_every = 3
  state = train_and_evaluate(small_config, tmp_path / "run", devices=jax.devices()[:1])
  lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
  found = [line for line in lines if any(name.startswith("analysis/") for name in line)]
  assert [line["step"] for line in found] == [3, 6]
  # The same slices, by hand: every slice with foreground of both validation cases, which are no more than 16.
  manifest = manifests.load(small_config.data.dir)
  arrays = manifests.CaseArrays(small_config.data.dir)
  model = sr.UNet(num_classes=3, widths=(4, 6, 8))
  run = jax.jit(lambda variables, images: model.apply(variables, images, train=False, mutable=["features"]))
  network = TappedNetwork.of(model)
  explain = jax.jit(lambda variables, images, masks: grad_cam.grad_cam(network, variables, images, masks))
  maps, shares = [], []
  for case in manifest.split("val"):
    images = arrays.image(case)[list(case.foreground_slices)] * np.float32(manifest.scale)
    rows, columns = (spline_matrix(length, 32) for length in case.shape[1:3])
    images = np.einsum("ih,bhwc,jw->bijc", rows, images, columns)
    _, updated = run(jax.device_get(state.evaluated), images)
    maps.append(np.asarray(updated["features"]["encoder_2"][0], float).reshape(-1, 8))
    truth = arrays.label(case)[list(case.foreground_slices)]
    truth = np.stack([ndimage.zoom(one, 32 / np.array(one.shape), order=0) for one in truth])
    evidence = explain(jax.device_get(state.evaluated), images, jax.nn.one_hot(truth, 3)).evidence["encoder_2"]
    heat = np.asarray(grad_cam.heatmap(evidence.sum(axis=0), (32, 32)))
    shares += [(one * mask).sum() / one.sum() for one, mask in zip(heat, truth > 0, strict=True) if one.any()]
  channels = np.concatenate(maps)
  alive = channels[:, channels.std(axis=0) > 0]
  r = np.abs(np.corrcoef(alive.T))
  expected = r[~np.eye(len(r), dtype=bool)].mean()
  assert found[-1]["analysis/mean_abs_correlation/encoder_2"] == pytest.approx(expected, rel=1e-3)
  eigenvalues = np.linalg.eigvalsh(np.cov(alive.T))
  assert found[-1]["analysis/effective_rank/encoder_2"] == pytest.approx(
    eigenvalues.sum() ** 2 / np.sum(eigenvalues**2), rel=1e-3
  )
  assert found[-1]["analysis/cam_inside/encoder_2"] == pytest.approx(np.mean(shares), rel=1e-3)


def test_without_validation_cases_it_is_refused(small_config, tmp_path):
  small_config.data.dir = str(make_prepared(tmp_path, val="", test="7"))
  small_config.train.analyze_every = 2
  manifest = manifests.load(small_config.data.dir)
  with pytest.raises(UserError, match=r"config\.train\.analyze_every = 2: .*validation"):
    Monitor(small_config, manifest, sr.UNet(num_classes=3, widths=(4, 6, 8)), None)
