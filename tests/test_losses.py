import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from scipy import optimize

import selfreg_jax as sr
from selfreg_jax import losses
from tests.conftest import integers, nhwc, normal

UNET_NAMES = {f"enc{i}": f"encoder_{i}" for i in (1, 2, 3, 4)} | {f"dec{i}": f"decoder_{i}" for i in (1, 2, 3)}
SWIN_NAMES = {
  f"{old}_block{block}": f"{new}/{position}"
  for old, new in UNET_NAMES.items()
  for block, position in ((0, "first"), (1, "last"))
}


def golden_features(arrays, blocks):
  def stage(name):
    return tuple(jnp.asarray(nhwc(arrays[f"{name}{block}"])) for block in blocks)

  return sr.Features(
    encoder=tuple(stage(f"enc{i}") for i in (1, 2, 3, 4)),
    decoder=tuple(stage(f"dec{i}") for i in (1, 2, 3)),
    final=jnp.asarray(nhwc(arrays["final"])),
  )


def golden_channels(arrays, names):
  return {new: (arrays[f"{old}/student_channels"], arrays[f"{old}/target_channels"]) for old, new in names.items()}


def assert_gradients(gradients, arrays, blocks):
  for side in ("encoder", "decoder"):
    for i, stage in enumerate(getattr(gradients, side), 1):
      for block, gradient in zip(blocks, stage, strict=True):
        expected = nhwc(arrays[f"grad/{side[:3]}{i}{block}"])
        np.testing.assert_allclose(gradient, expected, rtol=1e-5, atol=1e-6 * np.abs(expected).max())
  assert not np.any(gradients.final)


@pytest.mark.parametrize(
  ("file", "blocks", "names"), [("unet", ("",), UNET_NAMES), ("swin", ("_block0", "_block1"), SWIN_NAMES)]
)
def test_total_and_gradients_equal_the_authors(golden, file, blocks, names):
  arrays = golden(f"selfreg_loss_{file}")
  features, channels = golden_features(arrays, blocks), golden_channels(arrays, names)
  weight = float(arrays["lambda"])

  @jax.jit
  @functools.partial(jax.value_and_grad, has_aux=True)
  def loss_and_gradients(features):
    return sr.self_regularization(features, None, channels=channels, scr_weight=weight, ifd_weight=weight)

  (loss, terms), gradients = loss_and_gradients(features)
  np.testing.assert_allclose(loss, arrays["total"], rtol=1e-6)
  np.testing.assert_allclose(weight * (terms["scr"] + terms["ifd"]), loss, rtol=1e-6)
  assert_gradients(gradients, arrays, blocks)
  for old, new in names.items():
    if f"ifd/{old}" in arrays:
      np.testing.assert_allclose(terms[f"ifd/{new}"], arrays[f"ifd/{old}"], rtol=1e-6)
      np.testing.assert_allclose(terms[f"scr/{new}"], arrays[f"scr/{old}"], rtol=1e-6)


def test_cross_entropy_and_dice_equal_the_authors(golden):
  arrays = golden("ce_dice")
  logits, labels = jnp.asarray(nhwc(arrays["logits"])), jnp.asarray(arrays["labels"])
  np.testing.assert_allclose(sr.cross_entropy(logits, labels), arrays["ce"], rtol=5e-6)
  np.testing.assert_allclose(sr.soft_dice(logits, labels), arrays["dice"], rtol=5e-6)

  def total(logits):
    return 0.4 * sr.cross_entropy(logits, labels) + 0.6 * sr.soft_dice(logits, labels)

  expected = nhwc(arrays["grad"])
  np.testing.assert_allclose(total(logits), arrays["total_04_06"], rtol=5e-6)
  np.testing.assert_allclose(jax.grad(total)(logits), expected, atol=1e-6 * np.abs(expected).max())


def random_map(seed, *shape):
  return normal(seed, shape)


def example_features(seed=0, batch=8):
  return sr.Features(
    encoder=((random_map(seed, batch, 8, 8, 12),), (random_map(seed + 1, batch, 4, 4, 6),)),
    decoder=((random_map(seed + 2, batch, 8, 8, 5),),),
    final=random_map(seed + 3, batch, 16, 16, 8),
  )


def test_bfloat16_inputs_are_reduced_in_float32():
  # Summed in bfloat16, 8 * 64 * 64 equal terms would stop growing at 256 times a term.
  features = jnp.full((8, 64, 64, 2), 0.5, jnp.bfloat16).at[..., 1].set(0.25)
  value = sr.internal_feature_distillation(features)
  assert value.dtype == jnp.float32
  np.testing.assert_allclose(value, 0.0625, rtol=1e-6)
  scr = sr.semantic_consistency(features, features * 0, jax.random.key(0))
  np.testing.assert_allclose(scr, (0.25 + 0.0625) / 2, rtol=1e-6)
  logits = random_map(0, 4, 64, 64, 3).astype(jnp.bfloat16)
  labels = integers(1, (4, 64, 64), 3)
  for loss in (sr.cross_entropy, sr.soft_dice):
    exact = loss(logits.astype(jnp.float32), labels)
    assert loss(logits, labels).dtype == jnp.float32
    np.testing.assert_allclose(loss(logits, labels), exact, rtol=1e-6)


@pytest.mark.parametrize("loss", [sr.cross_entropy, sr.soft_dice])
def test_ignored_pixels_do_not_count(loss):
  logits = random_map(0, 2, 6, 6, 4)
  labels = integers(1, (2, 6, 6), 4)
  masked = labels.at[:, :2].set(255)
  value = loss(logits, masked, ignore_label=255)
  np.testing.assert_allclose(value, loss(logits[:, 2:], labels[:, 2:]), rtol=1e-6)
  gradient = jax.grad(lambda x: loss(x, masked, ignore_label=255))(logits)
  assert not np.any(gradient[:, :2])
  assert np.any(gradient[:, 2:])
  assert np.isfinite(loss(logits, jnp.full_like(labels, 255), ignore_label=255))


def losses_by_name(axis_name=None):
  def base(data, loss):
    return loss(data["logits"], data["labels"], ignore_label=3, axis_name=axis_name)

  key = jax.random.key(7)
  return {
    "cross_entropy": lambda data: base(data, sr.cross_entropy),
    "soft_dice": lambda data: base(data, sr.soft_dice),
    "ifd": lambda data: sr.internal_feature_distillation(data["features"].encoder[0][0], axis_name=axis_name),
    "scr": lambda data: sr.semantic_consistency(
      data["features"].encoder[0][0], data["features"].final, key, axis_name=axis_name
    ),
    "self_regularization": lambda data: sr.self_regularization(data["features"], key, axis_name=axis_name)[0],
  }


def example_batch():
  labels = integers(1, (8, 6, 6), 4)
  # Uneven shares of ignored pixels: a mean of the devices' means would be wrong.
  labels = labels.at[:3].set(3)
  return {"logits": random_map(0, 8, 6, 6, 4), "labels": labels, "features": example_features()}


@pytest.mark.parametrize("name", list(losses_by_name()))
def test_losses_are_global_under_pmap_and_shard_map(name):
  data = example_batch()
  expected, expected_gradient = jax.value_and_grad(losses_by_name()[name], allow_int=True)(data)
  sharded = losses_by_name("devices")[name]

  by_pmap = jax.pmap(sharded, axis_name="devices")(jax.tree.map(lambda x: x[:, None], data))
  np.testing.assert_allclose(by_pmap, np.full(8, expected), rtol=2e-6)

  mesh = Mesh(np.array(jax.devices()), ("devices",))
  by_shard_map = jax.jit(jax.shard_map(sharded, mesh=mesh, in_specs=P("devices"), out_specs=P()))
  np.testing.assert_allclose(by_shard_map(data), expected, rtol=2e-6)
  gradient = jax.grad(by_shard_map, allow_int=True)(data)
  for ours, theirs in zip(jax.tree.leaves(gradient), jax.tree.leaves(expected_gradient), strict=True):
    if ours.dtype == jnp.float32:
      np.testing.assert_allclose(ours, theirs, atol=1e-6 * np.abs(theirs).max() + 1e-12, rtol=1e-5)


def test_gradients_inside_a_mapped_function_average_to_the_global_gradient():
  data = example_batch()
  weight = jnp.float32(1.5)

  def loss(weight, data, axis_name=None):
    features = jax.tree.map(lambda x: x * weight, data["features"])
    regularization = sr.self_regularization(features, jax.random.key(7), axis_name=axis_name)[0]
    return regularization + sr.soft_dice(weight * data["logits"], data["labels"], axis_name=axis_name)

  def gradient(weight, data):
    return jax.lax.pmean(jax.grad(loss)(weight, data, "devices"), "devices")

  expected = jax.grad(loss)(weight, data)
  sharded = jax.pmap(gradient, axis_name="devices", in_axes=(None, 0))(weight, jax.tree.map(lambda x: x[:, None], data))
  np.testing.assert_allclose(sharded, np.full(8, expected), rtol=1e-5)


def test_losses_work_under_vmap():
  maps = random_map(0, 3, 2, 4, 4, 6)
  values = jax.vmap(sr.internal_feature_distillation)(maps)
  np.testing.assert_allclose(values, [sr.internal_feature_distillation(x) for x in maps], rtol=1e-6)
  weights = jnp.array([0.0, 0.1])
  features = example_features()
  totals = jax.vmap(lambda w: sr.self_regularization(features, jax.random.key(0), scr_weight=w, ifd_weight=w)[0])(
    weights
  )
  terms = sr.self_regularization(features, jax.random.key(0))[1]
  np.testing.assert_allclose(totals, [0, 0.1 * (terms["scr"] + terms["ifd"])], rtol=1e-5)


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 2**31), st.integers(1, 9), st.integers(1, 9))
def test_scr_has_no_gradient_to_the_final_map_and_equals_the_direct_formula(seed, student_channels, target_channels):
  rng = np.random.default_rng(seed)
  feature_map = rng.standard_normal((2, 4, 4, student_channels)).astype(np.float32)
  final = rng.standard_normal((2, 8, 8, target_channels)).astype(np.float32)
  count = min(student_channels, target_channels)
  channels = (rng.permutation(student_channels)[:count], rng.permutation(target_channels)[:count])

  def scr(feature_map, final):
    return sr.semantic_consistency(feature_map, final, channels=channels)

  value, (_, to_final) = jax.value_and_grad(scr, argnums=(0, 1))(feature_map, final)
  pooled = final.astype(np.float64).reshape(2, 4, 2, 4, 2, target_channels).mean((2, 4))
  expected = np.mean((feature_map[..., channels[0]] - pooled[..., channels[1]]) ** 2)
  np.testing.assert_allclose(value, expected, rtol=2e-6)
  assert not np.any(to_final)


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 2**31), st.integers(2, 13))
def test_ifd_does_not_depend_on_the_order_of_the_channels(seed, channels):
  rng = np.random.default_rng(seed)
  # Scores far apart: near-ties may swap by rounding.
  feature_map = rng.standard_normal((2, 5, 5, channels)) + 3 * rng.permutation(channels)
  feature_map = feature_map.astype(np.float32)
  permuted = feature_map[..., rng.permutation(channels)]
  value = sr.internal_feature_distillation(jnp.asarray(feature_map))
  np.testing.assert_allclose(sr.internal_feature_distillation(jnp.asarray(permuted)), value, rtol=1e-5)
  assert value > 0


def test_ifd_by_index_and_by_function_and_other_p():
  feature_map = random_map(0, 2, 3, 3, 4)
  halves = np.asarray(feature_map[..., :2]), np.asarray(feature_map[..., 2:])
  by_index = sr.internal_feature_distillation(feature_map, order="index")
  np.testing.assert_allclose(by_index, np.mean((halves[0] - halves[1]) ** 2), rtol=1e-6)
  cubed = sr.internal_feature_distillation(feature_map, order="index", p=3)
  np.testing.assert_allclose(cubed, np.mean(np.abs(halves[0] - halves[1]) ** 3), rtol=1e-6)
  by_function = sr.internal_feature_distillation(feature_map, lambda x, axis_name: jnp.array([1.0, 0.0, 3.0, 2.0]))
  expected = np.mean((feature_map[..., [2, 3]] - feature_map[..., [0, 1]]) ** 2)
  np.testing.assert_allclose(by_function, expected, rtol=1e-6)


@pytest.mark.parametrize(("size", "pooled"), [((7, 5), (3, 4)), ((8, 6), (4, 2)), ((9, 9), (4, 9)), ((5, 4), (1, 3))])
def test_pooling_follows_the_definition_of_adaptive_average_pooling(size, pooled):
  final = np.asarray(random_map(0, 2, *size, 3))
  expected = np.zeros((2, *pooled, 3))
  for i in range(pooled[0]):
    for j in range(pooled[1]):
      rows = slice(int(np.floor(i * size[0] / pooled[0])), int(np.ceil((i + 1) * size[0] / pooled[0])))
      columns = slice(int(np.floor(j * size[1] / pooled[1])), int(np.ceil((j + 1) * size[1] / pooled[1])))
      expected[:, i, j] = final[:, rows, columns].mean((1, 2))
  student = np.zeros((2, *pooled, 3), np.float32)
  channels = (np.arange(3), np.arange(3))
  value = sr.semantic_consistency(student, final, channels=channels)
  np.testing.assert_allclose(value, np.mean(expected**2), rtol=1e-5)
  # And the other way round: a feature map larger than the final one is the one that is pooled.
  np.testing.assert_allclose(sr.semantic_consistency(final, student, channels=channels), value, rtol=1e-6)


@pytest.mark.parametrize(("student", "target"), [(5, 3), (3, 5), (4, 4)])
def test_pairs_are_drawn_without_replacement_and_uniformly(student, target):
  from selfreg_jax.losses import random_pairing

  draws = 4000
  keys = jax.random.split(jax.random.key(0), draws)
  maps = (jnp.zeros((1, 1, 1, channels)) for channels in (student, target))
  students, targets = jax.vmap(functools.partial(random_pairing, student=next(maps), target=next(maps)))(keys)
  students, targets = (np.broadcast_to(x, (draws, min(student, target))) for x in (students, targets))
  for drawn in (students, targets):
    assert all(len(set(row)) == min(student, target) for row in drawn)
  counts = np.zeros((student, target))
  np.add.at(counts, (students.ravel(), targets.ravel()), 1)
  # Each pair occurs with probability k / (C_s C_t) a draw; six standard deviations of a binomial count.
  probability = min(student, target) / (student * target)
  deviation = np.sqrt(draws * probability * (1 - probability))
  assert np.abs(counts - draws * probability).max() < 6 * deviation


def test_pairs_are_new_for_each_step_and_map():
  same = random_map(0, 2, 4, 4, 16)
  features = sr.Features(encoder=((same,), (same,)), decoder=((same,),), final=random_map(1, 2, 4, 4, 16))
  values = []
  for step in range(2):
    terms = sr.self_regularization(features, jax.random.fold_in(jax.random.key(0), step))[1]
    values += [float(value) for name, value in terms.items() if name.startswith("scr/")]
  assert len(set(values)) == 6


def test_the_papers_wording_gives_no_gradient_to_the_top_half():
  feature_map = normal(0, (2, 3, 3, 5)) + jnp.asarray([4.0, 0, 3, 1, -2])

  def value_and_gradient(stop_gradient):
    loss = functools.partial(sr.internal_feature_distillation, stop_gradient=stop_gradient)
    return jax.value_and_grad(loss)(feature_map)

  (both, to_both), (bottom_only, to_bottom) = value_and_gradient("none"), value_and_gradient("top")
  np.testing.assert_allclose(bottom_only, both, rtol=1e-6)
  top, bottom = [0, 2], [3, 1]  # by descending mean; the lowest of five has no partner
  assert not np.any(to_bottom[..., [*top, 4]])
  np.testing.assert_allclose(to_bottom[..., bottom], to_both[..., bottom], rtol=1e-6)
  assert np.abs(to_both[..., top]).max() > 0


def test_a_traced_exponent_and_traced_weights_give_the_numbers_of_python_ones():
  features, key = example_features(), jax.random.key(0)

  def loss(scr_weight, ifd_weight, p):
    return sr.self_regularization(features, key, scr_weight=scr_weight, ifd_weight=ifd_weight, p=p)[0]

  for numbers in ((0.3, 0.2, 2.0), (0.3, 0.0, 3.0), (0.0, 0.1, 1.5)):
    np.testing.assert_allclose(jax.jit(loss)(*numbers), loss(*numbers), rtol=1e-6)


def best_pairs(student, target):
  """Cosine similarities over positions and batch, and the largest sum that an assignment reaches; in float64."""
  vectors = [np.asarray(x, np.float64).reshape(-1, x.shape[-1]) for x in (student, target)]
  vectors = [x / np.linalg.norm(x, axis=0) for x in vectors]
  similarity = vectors[0].T @ vectors[1]
  return similarity, similarity[optimize.linear_sum_assignment(similarity, maximize=True)].sum()


@pytest.mark.parametrize(("student", "target"), [(7, 4), (4, 7), (6, 6)])
def test_cosine_pairing_is_the_best_assignment(student, target):
  for seed in range(3):
    maps = random_map(seed, 2, 3, 4, student), random_map(seed + 10, 2, 3, 4, target)
    pairs = jax.jit(lambda s, t: losses.cosine_pairing(None, s, t))(*maps)
    similarity, best = best_pairs(*maps)
    assert all(len(np.unique(index)) == len(index) == min(student, target) for index in pairs)
    np.testing.assert_allclose(similarity[tuple(map(np.asarray, pairs))].sum(), best, rtol=1e-5)


def test_cosine_pairing_finds_a_permutation_again_and_passes_no_gradient():
  target, order = random_map(0, 2, 4, 4, 6), np.asarray([3, 5, 0, 1, 4, 2])
  student = 3 * target[..., order] + 0.01 * random_map(1, 2, 4, 4, 6)
  students, targets = losses.cosine_pairing(None, student, target)
  np.testing.assert_array_equal(order[students], targets)

  def scr(student, channels=None):
    return sr.semantic_consistency(student, target, pairing=losses.cosine_pairing, channels=channels)

  fixed = jax.value_and_grad(scr)(student, (students, targets))
  np.testing.assert_allclose(jax.grad(scr)(student), fixed[1], rtol=1e-6)


def test_cosine_pairing_is_that_of_the_global_batch():
  student, target = random_map(0, 8, 3, 3, 5), random_map(1, 8, 3, 3, 6)
  mesh = Mesh(np.asarray(jax.devices()), ("devices",))

  def scr(student, target, axis_name=None):
    return sr.semantic_consistency(student, target, pairing=losses.cosine_pairing, axis_name=axis_name)

  sharded = jax.shard_map(
    functools.partial(scr, axis_name="devices"), mesh=mesh, in_specs=P("devices"), out_specs=P(), check_vma=False
  )
  np.testing.assert_allclose(jax.jit(sharded)(student, target), scr(student, target), rtol=2e-6)


@pytest.mark.parametrize(("student", "target"), [(5, 3), (3, 5)])
def test_index_pairing_compares_channels_of_the_same_number(student, target):
  maps = random_map(0, 2, 3, 3, student), random_map(1, 2, 3, 3, target)
  value = sr.semantic_consistency(*maps, pairing=losses.index_pairing)
  np.testing.assert_allclose(value, np.mean((maps[0][..., :3] - maps[1][..., :3]) ** 2), rtol=1e-6)


def test_another_teacher_supervises_all_maps_but_itself():
  features = sr.Features(
    encoder=((random_map(0, 2, 8, 8, 4),), (random_map(1, 2, 4, 4, 4),)),
    decoder=((random_map(2, 2, 4, 4, 4), random_map(3, 2, 4, 4, 4)), (random_map(4, 2, 8, 8, 4),)),
    final=random_map(5, 2, 16, 16, 4),
  )

  def loss(features):
    return sr.self_regularization(
      features,
      None,
      teacher=losses.deepest_decoder_map,
      pairing=losses.index_pairing,
      scr_weight=1.0,
      ifd_weight=0,
    )

  (value, terms), gradients = jax.value_and_grad(loss, has_aux=True)(features)
  teacher = np.asarray(features.decoder[0][1])

  def scr(student):  # the teacher has the smallest size: the students are pooled to it
    student = np.asarray(student)
    factor = student.shape[1] // 4
    return np.mean((student.reshape(2, 4, factor, 4, factor, 4).mean((2, 4)) - teacher) ** 2)

  students = {
    "encoder_1": features.encoder[0][0],
    "encoder_2": features.encoder[1][0],
    "decoder_1/first": features.decoder[0][0],
    "decoder_2": features.decoder[1][0],
  }
  assert set(terms) == {"scr"} | {f"scr/{name}" for name in students}
  for name, student in students.items():
    np.testing.assert_allclose(terms[f"scr/{name}"], scr(student), rtol=1e-5)
  # The position "last" has no map besides the teacher, and so no part in the sum.
  np.testing.assert_allclose(value, np.mean([scr(student) for student in students.values()]), rtol=1e-5)
  assert not np.any(gradients.decoder[0][1])
  assert not np.any(gradients.final)


def test_deep_supervision_weights_halve_with_depth_and_labels_are_sampled():
  labels = integers(0, (2, 12, 12), 3)
  auxiliary = tuple(random_map(seed, 2, size, size, 3) for seed, size in enumerate((3, 6, 12)))
  value, terms = losses.deep_supervision(auxiliary, labels, sr.cross_entropy)
  expected = []
  for logits in auxiliary:
    size = logits.shape[1]
    small = np.zeros((2, size, size), int)
    for i, j in itertools.product(range(size), repeat=2):
      small[:, i, j] = labels[:, int((i + 0.5) * 12 / size), int((j + 0.5) * 12 / size)]
    log_probabilities = np.log(np.exp(logits) / np.exp(logits).sum(-1, keepdims=True))
    expected.append(-np.mean(np.take_along_axis(log_probabilities, small[..., None], -1)))
  np.testing.assert_allclose([terms[f"decoder_{i}"] for i in (1, 2, 3)], expected, rtol=1e-5)
  np.testing.assert_allclose(value, (expected[0] + 2 * expected[1] + 4 * expected[2]) / 7, rtol=1e-5)
  with pytest.raises(ValueError, match="needs heads"):
    losses.deep_supervision((), labels, sr.cross_entropy)


def test_final_map_is_pooled_once_per_resolution():
  pooled = []

  def pool(feature_map, size):
    if feature_map.shape[1:3] != size:
      pooled.append(size)
    return sr.losses.adaptive_average_pool(feature_map, size)

  sr.self_regularization(example_features(), jax.random.key(0), pool=pool)
  assert sorted(pooled) == [(4, 4), (8, 8)]


def test_a_weight_of_zero_skips_its_loss():
  features = example_features()
  loss, terms = sr.self_regularization(features, None, scr_weight=0, ifd_weight=0.5)
  assert not any(name.startswith("scr") for name in terms)
  np.testing.assert_allclose(loss, 0.5 * terms["ifd"])
  loss, terms = sr.self_regularization(features, None, scr_weight=0, ifd_weight=0)
  assert loss == 0
  assert terms == {}


BAD_CALLS = {
  "rank of a map": (lambda: sr.internal_feature_distillation(jnp.zeros((4, 4, 2))), ValueError, "B, h, w, C"),
  "one channel": (lambda: sr.internal_feature_distillation(jnp.zeros((1, 4, 4, 1))), ValueError, "C = 1"),
  "integer map": (lambda: sr.internal_feature_distillation(jnp.zeros((1, 4, 4, 2), int)), TypeError, "floating"),
  "unknown stop gradient": (
    lambda: sr.internal_feature_distillation(jnp.zeros((1, 4, 4, 2)), stop_gradient="bottom"), ValueError, "'top'",
  ),
  "unknown order": (lambda: sr.internal_feature_distillation(jnp.zeros((1, 4, 4, 2)), "best"), ValueError, "response"),
  "no key": (
    lambda: sr.semantic_consistency(jnp.zeros((1, 4, 4, 2)), jnp.zeros((1, 4, 4, 2))), ValueError, "give a key",
  ),
  "batch sizes": (
    lambda: sr.semantic_consistency(jnp.zeros((2, 4, 4, 2)), jnp.zeros((1, 4, 4, 2)), jax.random.key(0)),
    ValueError, "batch sizes",
  ),
  "empty stages": (
    lambda: sr.self_regularization(sr.Features((), ((jnp.ones((1, 2, 2, 2)),),), jnp.ones((1, 2, 2, 2))), None),
    ValueError, "at least one",
  ),
  "stage without blocks": (
    lambda: sr.self_regularization(sr.Features(((),), ((jnp.ones((1, 2, 2, 2)),),), jnp.ones((1, 2, 2, 2))), None),
    ValueError, "at least one",
  ),
  "wrong channel names": (
    lambda: sr.self_regularization(example_features(), None, channels={"enc1": ([0], [0])}), ValueError, "encoder_1",
  ),
  "float labels": (lambda: sr.cross_entropy(jnp.zeros((1, 2, 2, 3)), jnp.zeros((1, 2, 2))), TypeError, "integer"),
  "integer logits": (
    lambda: sr.soft_dice(jnp.zeros((1, 2, 2, 3), int), jnp.zeros((1, 2, 2), int)), TypeError, "floating",
  ),
  "label shape": (lambda: sr.soft_dice(jnp.zeros((1, 2, 2, 3)), jnp.zeros((1, 2), int)), ValueError, "last axis"),
}  # fmt: skip


@pytest.mark.parametrize("name", list(BAD_CALLS))
def test_bad_arguments_are_refused_at_trace_time(name):
  call, error, message = BAD_CALLS[name]
  with pytest.raises(error, match=message):
    jax.eval_shape(call)


def test_channels_selected_by_a_product_are_those_that_are_gathered():
  """The way of processors and the way of all other devices give the same numbers and gradients."""
  x = normal(0, (2, 3, 4, 8))
  weights = normal(1, (2, 3, 4, 5))
  first, second = jnp.asarray([7, 0, 3, -2, 1]), jnp.asarray([2, 4, 5, 6, 0])
  ways = {
    "selected": (lambda x: losses._channels(x, first), lambda x: jnp.take(x, first, axis=-1)),
    "difference": (
      lambda x: losses._channel_difference(x, first, second),
      lambda x: jnp.take(x, first, axis=-1) - jnp.take(x, second, axis=-1),
    ),
  }
  for ours, plain in ways.values():
    assert " gather(" not in jax.jit(ours).lower(x).compile().as_text()
    np.testing.assert_array_equal(ours(x), plain(x))
    gradients = [jax.grad(lambda x, way=way: jnp.sum(way(x) * weights))(x) for way in (ours, plain)]
    np.testing.assert_allclose(*gradients, rtol=1e-6)
  assert losses._channels(x, np.arange(8)) is x
  missing = losses._channels(x, jnp.asarray([0, 8]))
  np.testing.assert_array_equal(np.isnan(missing).any(axis=(0, 1, 2)), [False, True])
