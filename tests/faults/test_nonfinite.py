"""Losses that are not finite: the run stops with the batch that shows it, or leaves out as many updates as allowed."""

import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from selfreg_jax.features import COLLECTION, Features
from selfreg_jax.training import checkpoints, loop
from selfreg_jax.training.signals import TrainingInterruptedError
from selfreg_jax.training.step import make_loss
from tests.faults import harness

STEPS = 16
FIELDS = {"train__steps": STEPS, "train__validate_every": 8, "data__batch_size": 4}
RARE = 17  # a pixel value, as the network sees it, that makes the loss below NaN


def train(config, workdir):
  return loop.train_and_evaluate(config, workdir, devices=jax.devices()[:1])


def spoil(monkeypatch, places):
  """Makes the loss NaN for batches that hold a slice at one of these places of the stream."""
  make_input_fn = loop.make_input_fn

  def marking(config, scale):
    input_fn = make_input_fn(config, scale)

    def marked(key, batch):
      seen = input_fn(key, batch)
      bad = jnp.isin(batch["position"], jnp.asarray(places))
      return seen | {"image": jnp.where(bad[:, None, None, None], RARE, seen["image"])}

    return marked

  def spoiled(config):
    loss_fn = make_loss(config)

    def loss(logits, features, batch, key):
      total, terms = loss_fn(logits, features, batch, key)
      return jnp.where((batch["image"] == RARE).any(), jnp.nan, total), terms

    return loss

  monkeypatch.setattr(loop, "make_input_fn", marking)
  monkeypatch.setattr(loop, "make_loss", spoiled)


def test_stop_saves_the_batch_that_shows_it(prepared, tmp_path, monkeypatch):
  config = harness.make_config(prepared, **FIELDS)
  spoil(monkeypatch, [5 * 4 + 2])
  with pytest.raises(loop.TrainingDivergedError, match=r"at step 5: .*total nan.*nonfinite_step_0000005\.npz"):
    train(config, tmp_path)
  with np.load(tmp_path / "nonfinite_step_0000005.npz") as saved:
    batch = dict(saved)
  np.testing.assert_array_equal(batch["position"], [20, 21, 22, 23])
  assert [(image == RARE).all() for image in batch["image"]] == [False, False, True, False]
  trained = checkpoints.load_trained(tmp_path, checkpoint="latest")
  assert trained.step == 4
  loss_fn = loop.make_loss(config.loss)

  def loss_of(image):
    logits, updated = trained.model.apply(
      trained.variables, image, train=True, mutable=["batch_stats", COLLECTION], rngs={"dropout": jax.random.key(0)}
    )
    seen = {"image": image, "label": batch["label"]}
    return loss_fn(logits, Features.from_sown(updated[COLLECTION]), seen, jax.random.key(0))[0]

  assert not np.isfinite(loss_of(batch["image"]))
  assert np.isfinite(loss_of(np.where(batch["image"] == RARE, 0, batch["image"])))


def test_skip_leaves_updates_out(prepared, tmp_path, monkeypatch):
  config = harness.make_config(prepared, train__on_nonfinite="skip", train__most_skips=2, **FIELDS)
  spoil(monkeypatch, [5 * 4, 6 * 4, 10 * 4])
  state = train(config, tmp_path)
  assert (int(state.step), int(state.updates)) == (STEPS, STEPS - 3)
  skipped = [line["step"] for line in harness.metric_lines(tmp_path) if line.get("train/skipped")]
  assert skipped == [6, 7, 11]  # a line stands after its step
  assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state.variables))


def test_skip_stops_after_too_many_in_a_row_across_a_restart(prepared, tmp_path, monkeypatch):
  config = harness.make_config(prepared, train__on_nonfinite="skip", train__most_skips=2, **FIELDS)
  spoil(monkeypatch, [5 * 4, 6 * 4, 7 * 4])
  advance = loop.RunLogger.advance

  def interrupting(self, step):
    advance(self, step)
    if step == 7:  # two updates have been left out
      signal.raise_signal(signal.SIGTERM)

  with monkeypatch.context() as patch:
    patch.setattr(loop.RunLogger, "advance", interrupting)
    with pytest.raises(TrainingInterruptedError, match="after step 7"):
      train(config, tmp_path)
  with pytest.raises(loop.TrainingDivergedError, match="not finite at step 7"):
    train(config, tmp_path)
