"""Grad-CAM for segmentation at every block of a network: where does what a class is told by lie?

Gradients with respect to all blocks come from one forward pass and one backward pass a class.
Sources: Selvaraju et al., ICCV 2017, arXiv 1610.02391; Vinogradova et al., AAAI 2020, arXiv 2002.11434 (Seg-Grad-CAM).
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from selfreg_jax.analysis.taps import TappedNetwork

Array = jax.Array


@struct.dataclass
class GradCam:
  """What one forward pass and its backward passes gave.

  Attributes:
    logits: (B, H, W, classes).
    maps: block -> (B, h, w, C), its output.
    evidence: block -> (chosen classes, B, h, w) float32, the weighted sum of its channels; see `heatmap`.
  """

  logits: Array
  maps: dict[str, Array]
  evidence: dict[str, Array]


def grad_cam(
  network: TappedNetwork,
  variables: Any,
  images: Array,
  masks: Array | None = None,
  *,
  classes: Sequence[int] | None = None,
) -> GradCam:
  """Grad-CAM of chosen classes at every tapped block.

  For a class c with the mask M_c and a block's map A: weights alpha_k = mean over the map's positions of
  d(sum over M_c of the logit of c) / dA_k, and evidence = sum_k alpha_k A_k. The sum of several classes' evidence is
  that of the sum of their scores, since the backward pass is linear. May be jitted; slices of a batch do not touch
  each other as long as the network, in evaluation mode, keeps them apart.

  Args:
    network: with its taps.
    variables: of its module.
    images: (B, H, W, channels).
    masks: (B, H, W, classes), 1 where a class's logit counts; None for the network's own prediction.
    classes: ids of the classes; None for all but the background, 0.

  Returns:
    Logits, maps and evidence, from one forward pass.

  Raises:
    ValueError: masks that are not of the logits' shape; as `TappedNetwork`.
  """
  zeros = network.no_perturbations(variables, images)

  def forward(perturbations: Any) -> tuple[Array, tuple[Array, Any]]:
    logits, outputs = network(variables, images, perturbations)
    return logits, (logits, outputs)

  _, pullback, (logits, outputs) = jax.vjp(forward, zeros, has_aux=True)
  if masks is None:
    masks = jax.nn.one_hot(jnp.argmax(logits, axis=-1), logits.shape[-1], dtype=logits.dtype)
  if masks.shape != logits.shape:
    raise ValueError(f"masks must have the logits' shape {logits.shape}, got {masks.shape}")
  masks = masks.astype(logits.dtype)
  maps = network.maps(outputs)

  def one_class(class_id: Array) -> dict[str, Array]:
    chosen = jax.nn.one_hot(class_id, logits.shape[-1], dtype=logits.dtype)
    (gradients,) = pullback(masks * chosen)
    return {name: _weighted_sum(maps[name], gradient) for name, gradient in network.maps(gradients).items()}

  chosen_classes = jnp.asarray(range(1, logits.shape[-1]) if classes is None else classes, jnp.int32)
  return GradCam(logits, maps, jax.lax.map(one_class, chosen_classes))


def _weighted_sum(feature_map: Array, gradient: Array) -> Array:
  weights = gradient.astype(jnp.float32).mean(axis=(1, 2))  # (B, C)
  highest = jax.lax.Precision.HIGHEST
  return jnp.einsum("bhwc,bc->bhw", feature_map.astype(jnp.float32), weights, precision=highest)


def resized(evidence: Array, size: tuple[int, int]) -> Array:
  """Positive evidence at the size of the image: ReLU, then bilinear interpolation between the centres of pixels.

  Args:
    evidence: (..., h, w).
    size: (H, W) of the image.

  Returns:
    (..., H, W), not negative.
  """
  shape = (*evidence.shape[:-2], *size)
  return jax.image.resize(jax.nn.relu(evidence), shape, method="linear", precision=jax.lax.Precision.HIGHEST)


def heatmap(evidence: Array, size: tuple[int, int]) -> Array:
  """Grad-CAM as it is looked at: `resized`, then divided by its maximum.

  Args:
    evidence: (..., h, w); of all classes together, the sum of theirs.
    size: (H, W) of the image.

  Returns:
    (..., H, W) in [0, 1]; zero everywhere where there is no positive evidence.
  """
  positive = resized(evidence, size)
  largest = positive.max(axis=(-2, -1), keepdims=True)
  return positive / jnp.where(largest > 0, largest, 1)
