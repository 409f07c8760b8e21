import pathlib
import runpy

import pytest

from selfreg_jax import config as configs
from selfreg_jax.analysis.ablation.design import ablation_config, expand, load_run
from selfreg_jax.analysis.ablation.grouping import group_runs
from selfreg_jax.errors import UserError

CONFIGS = pathlib.Path(__file__).parents[3] / "configs"


def base_run():
  run = configs.base_config()
  run.data.dir = "somewhere"
  return run


def design(**fields):
  return expand(ablation_config(base_run(), **{"seeds": (3, 4), "reference": "none", **fields}))


TERMS = {"none": {"loss.scr_weight": 0.0, "loss.ifd_weight": 0.0}, "both": {}}


def test_every_variant_is_run_with_every_seed_in_the_same_order_of_slices():
  made = design(variants=TERMS)
  assert [run.name for run in made.runs] == ["none/seed_3", "both/seed_3", "none/seed_4", "both/seed_4"]
  assert [run.config.seed for run in made.runs] == [3, 3, 4, 4]
  assert {run.config.data.order_seed for run in made.runs} == {0}
  assert made.runs[0].config.loss.scr_weight == 0
  assert made.runs[1].config.loss.scr_weight == base_run().loss.scr_weight


def test_a_grid_is_the_product_of_its_values_with_every_variant():
  grid = {"loss.scr_weight": (0.1, 0.2), "model.widths": ((4, 6, 8), (8, 8, 8))}
  made = design(grid=grid, reference="scr_weight=0.1,widths=4-6-8")
  assert len(made.variants) == 4
  assert made.runs[3].config.model.widths == (8, 8, 8)
  assert made.runs[3].config.loss.scr_weight == 0.2
  crossed = design(variants=TERMS, grid={"optimizer.learning_rate": (0.1, 0.2)}, reference="both+learning_rate=0.2")
  assert len(crossed.runs) == 2 * 2 * 2


def test_values_that_cannot_be_folders_are_named_so_that_they_can():
  made = design(
    grid={"loss.scr_pairing": ("index", "selfreg_jax.losses:cosine_pairing")}, reference="scr_pairing=index"
  )
  assert list(made.variants) == ["scr_pairing=index", "scr_pairing=selfreg_jax.losses-cosine_pairing"]
  assert made.runs[1].config.loss.scr_pairing == "selfreg_jax.losses:cosine_pairing"


def test_runs_that_shuffle_by_their_own_seeds_do_not_share_batches():
  made = design(variants={**TERMS, "shuffled": {"data.order_seed": -1}})
  assert [run.config.data.order_seed for run in made.runs] == [0, 0, 3, 0, 0, 4]
  assert [len(group.runs) for group in group_runs(made.runs)] == [4, 1, 1]


def test_a_seed_of_the_base_is_refused_since_it_would_have_no_effect():
  run = base_run()
  run.seed = 7
  with pytest.raises(UserError, match=r"config.run.seed = 7: .*config.seeds"):
    expand(ablation_config(run, variants=TERMS, reference="none"))


def test_a_variant_may_be_another_network():
  made = design(variants={**TERMS, "swin": {"model.name": "swin_unet", "model.drop_path": 0.1}})
  swin = made.runs[2].config.model
  assert (swin.name, swin.drop_path, swin.embed_dim) == ("swin_unet", 0.1, 96)


@pytest.mark.parametrize(
  ("fields", "message"),
  [
    (
      {"variants": {**TERMS, "typo": {"loss.scr_wieght": 1.0}}},
      "'typo': there is no field loss.scr_wieght .*scr_weight",
    ),
    ({"variants": {**TERMS, "bad": {"loss.scr_weight": -1.0}}}, "'bad': .*config.loss.scr_weight = -1.0"),
    ({"variants": {**TERMS, "text": {"loss.scr_weight": "much"}}}, "'text': .*must be a float"),
    ({"variants": {**TERMS, "same": {"loss.scr_weight": 0.015}}}, "'both' and 'same' are the same config"),
    ({"variants": {**TERMS, "seeded": {"seed": 3}}}, "'seeded': seed: is set by .* `seeds`"),
    ({"variants": {**TERMS, "a/b": {"seed": 3}}}, "'a/b': names hold letters"),
    ({"variants": TERMS, "reference": "nothing"}, "reference = 'nothing' is none of the variants none, both"),
    ({"variants": TERMS, "seeds": (1, 1)}, "config.seeds = .*none of them twice"),
    ({"variants": TERMS, "seeds": ()}, "one or more whole numbers"),
    ({"variants": TERMS, "split": "all"}, "config.split = 'all'"),
    ({"grid": {"loss.scr_weight": ()}}, "loss.scr_weight has no values"),
    ({"grid": {"loss.scr_weight": (0.1, 0.2, 0.1)}}, "loss.scr_weight has 0.1 twice"),
    ({}, "nothing to compare"),
  ],
)
def test_mistakes_are_told_before_anything_is_computed(fields, message):
  with pytest.raises(UserError, match=f"(?s){message}"):
    design(**fields)


def test_the_config_of_a_run_is_not_that_of_an_ablation():
  with pytest.raises(UserError, match="is the config of a run, not that of an ablation"):
    expand(base_run())


def test_runs_that_differ_in_numbers_share_a_program_and_others_do_not():
  variants = {
    **TERMS,
    "rate": {"optimizer.learning_rate": 0.02},
    "index": {"loss.ifd_order": "index"},
    "heads": {"model.deep_supervision": True, "loss.deep_supervision_weight": 1.0},
  }
  groups = group_runs(design(variants=variants).runs)
  names = [sorted({run.variant for run in group.runs}) for group in groups]
  assert names == [["both", "none", "rate"], ["index"], ["heads"]]
  first = groups[0]
  assert set(first.numbers) == {"loss.scr_weight", "loss.ifd_weight", "optimizer.learning_rate"}
  assert first.numbers["loss.scr_weight"] == (0, 0.015, 0.015, 0, 0.015, 0.015)
  assert groups[1].numbers == {}


def load(name):
  file_name, _, argument = name.partition(":")
  get_config = runpy.run_path(str(CONFIGS / file_name))["get_config"]
  return get_config(*([argument] if argument else []))


@pytest.mark.parametrize("base", ["", ":glas_narrow", ":monuseg_narrow", ":glas_unet", ":folder:swin"])
@pytest.mark.parametrize(("name", "variants"), [("terms", 5), ("lambda", 13), ("design", 8)])
def test_the_shipped_ablations_are_usable_on_any_base(name, variants, base):
  config = load(f"ablation_{name}.py{base}")
  config.run.data.dir = config.run.data.dir or "somewhere"
  made = expand(config)
  assert len(made.variants) == variants
  assert len(made.runs) == 3 * variants
  if name == "lambda":
    assert len(group_runs(made.runs)) == 1


def test_a_base_that_does_not_exist_is_refused():
  with pytest.raises(UserError, match=r"no_such.*there are .*glas_unet"):
    load_run(str(CONFIGS / "ablation_terms.py"), "no_such")
  with pytest.raises(UserError, match="is an ablation itself"):
    load_run(str(CONFIGS / "ablation_terms.py"), "ablation_design")
