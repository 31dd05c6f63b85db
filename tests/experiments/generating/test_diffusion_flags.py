"""Every option of every sampler has a flag, and the flag sets that option."""

import dataclasses
import inspect

import pytest
from absl import flags
from hypothesis import given as drawn
from hypothesis import strategies as st

from experiments.core import config as gin
from experiments.core import flags_from
from experiments.generating import diffusion
from experiments.generating.prepared_rows import prepare
from research.diffusion.sampling import config as settings
from research.diffusion.sampling import policies
from research.diffusion.sampling.classifier_free_guidance import (
  ClassifierFreeGuidance,
)
from research.diffusion.sampling.config import (
  Delayed,
  Growth,
  SamplerConfig,
  Vicinity,
)
from research.diffusion.sampling.credit import Credited
from research.diffusion.sampling.delayed_kv_cache import DelayedKVCache
from research.diffusion.sampling.denoiser import BlockCache
from research.diffusion.sampling.make_denoiser import make_denoiser
from research.diffusion.sampling.policies import (
  Credit,
  Factor,
  Hierarchy,
  Quota,
  Threshold,
)
from research.diffusion.sampling.remask import Remask
from research.interop.diffusion.spec import Spec
from research.typing import UserError
from tests import support

SPEC = Spec(mask_id=9, end=(3,))
CHANCE = "--plan=chance --select=random --remask=cap:0.1"

FLAGS = [
  (SamplerConfig, "block", "--block=4", 4),
  (SamplerConfig, "steps", "--steps=8", 8),
  (SamplerConfig, "plan", "--plan=cosine", "cosine"),
  (SamplerConfig, "policy", "--policy=factor:1", Factor(factor=1.0)),
  (SamplerConfig, "select", "--select=margin", "margin"),
  (SamplerConfig, "place_temperature", "--place_temperature=0.4", 0.4),
  (SamplerConfig, "tempered", "--tempered", True),
  (SamplerConfig, "ends", "--ends=never", "never"),
  (SamplerConfig, "stop_early", "--nostop_early", False),
  (SamplerConfig, "edit", "--edit=0.7", 0.7),
  (SamplerConfig, "edit_steps", "--edit=0.7 --edit_steps=3", 3),
  (SamplerConfig, "remask", CHANCE, Remask(kind="cap", eta=0.1)),
  (SamplerConfig, "cache", "--cache=delayed:5", Delayed(refresh=5)),
  (SamplerConfig, "guidance", "--guidance=1.5", 1.5),
  (SamplerConfig, "canvas", "--canvas=auto:6", Growth(start=6)),
  (Threshold, "threshold", "--policy=threshold:0.7", 0.7),
  (Threshold, "quota_first", "--policy=quota+threshold:0.7", True),
  (Factor, "factor", "--policy=factor:0.5", 0.5),
  (Hierarchy, "low", "--policy=hierarchy,low=0.3", 0.3),
  (Hierarchy, "threshold", "--policy=hierarchy:0.8", 0.8),
  (Remask, "kind", CHANCE.replace("cap", "rescale"), "rescale"),
  (Remask, "eta", CHANCE, 0.1),
  (Remask, "start", CHANCE + ",start=0.6", 0.6),
  (Remask, "stop", CHANCE + ",start=0.6,stop=0.2", 0.2),
  (Credit, "threshold", "--policy=credit:0.8", 0.8),
  (Credit, "alpha", "--policy=credit:0.9,alpha=0.3", 0.3),
  (Credit, "beta", "--policy=credit:0.9,beta=0.3", 0.3),
  (Credit, "gamma", "--policy=credit:0.9,gamma=0.3", 0.3),
  (Credited, "credit", "--policy=credit:0.8", Credit(threshold=0.8)),
  (ClassifierFreeGuidance, "weight", "--guidance=1.5", 1.5),
  (BlockCache, "before", "--cache=vicinity:5", 5),
  (BlockCache, "after", "--cache=vicinity:5,after=2", 2),
  (DelayedKVCache, "refresh", "--cache=delayed:5", 5),
  (DelayedKVCache, "halvings", "--cache=delayed,halvings=1", 1),
  (Growth, "start", "--canvas=auto:6", 6),
  (Growth, "by", "--canvas=auto,by=3", 3),
  (Growth, "window", "--canvas=auto,window=4", 4),
  (Growth, "eos_threshold", "--canvas=auto:2,eos_threshold=0.25", 0.25),
  (Growth, "expand_threshold", "--canvas=auto,expand_threshold=0.25", 0.25),
  (Growth, "low_threshold", "--canvas=auto,low_threshold=0.25", 0.25),
  (Growth, "ends", "--canvas=auto,ends=2", 2),
]

ELSEWHERE = {
  SamplerConfig: {"mask_id", "end", "length"},  # the model's; rows' own
  Credit: {"quota_first"},  # of its parent
  Credited: {"inner", "mask_id"},
  ClassifierFreeGuidance: {"inner", "mask_id", "prompt"},
  BlockCache: {"model", "shift", "time"},
  DelayedKVCache: {"model", "mask_id", "shift", "time"},
}
"""Fields that the model or the prompt decides about."""


def wanted(*arguments):
  values = flags.FlagValues()
  flags_from.define(SamplerConfig, values)
  values(["command", "--max_new_tokens=8", *arguments])
  return flags_from.build(SamplerConfig, values)


def built(*arguments):
  """Returns whatever flags make, by its class."""
  config = prepare([[1, 2]], [0], SPEC, wanted(*arguments)).config
  found = {SamplerConfig: config}
  asked = make_denoiser(config, support.model())
  while asked is not None:
    found[type(asked)] = asked
    asked = getattr(asked, "inner", None)
  for more in (config.policy, config.remask, config.canvas):
    found[type(more)] = more
  return found


@pytest.mark.parametrize(("what", "name", "given", "value"), FLAGS)
def test_a_flag_sets_an_option(what, name, given, value):
  got = getattr(built(*given.split())[what], name)
  assert got == value
  # What it would be anyway says nothing.
  [field] = [f for f in dataclasses.fields(what) if f.name == name]
  assert field.default != value


def options_of(what):
  fields = {f.name for f in dataclasses.fields(what) if f.init}
  return fields - ELSEWHERE.get(what, set())


@pytest.mark.parametrize("what", list(dict.fromkeys(row[0] for row in FLAGS)))
def test_no_option_is_forgotten(what):
  assert options_of(what) == {name for it, name, *_ in FLAGS if it is what}


def test_no_policy_is_forgotten():
  found = {
    it
    for _, it in inspect.getmembers(policies, inspect.isclass)
    if hasattr(it, "commit") and it is not policies.Policy
  }
  assert found - {what for what, *_ in FLAGS} == {Quota}
  assert not options_of(Quota)


def test_flags_that_are_not_given_are_the_defaults():
  assert wanted() == SamplerConfig(length=8)


def test_gin_binds_what_flags_set():
  text = """
from __gin__ import dynamic_registration
from research.diffusion.sampling import config
from research.diffusion.sampling import policies
config.SamplerConfig.length = 8
config.SamplerConfig.policy = @policies.Threshold()
policies.Threshold.threshold = 0.7
config.SamplerConfig.cache = @config.Vicinity()
config.Vicinity.before = 5
"""
  found = gin.parse(text, root=SamplerConfig).experiment
  assert found == wanted("--policy=threshold:0.7", "--cache=vicinity:5")
  with pytest.raises(
    UserError, match="steps=2: policy=threshold:0.7 chooses the number"
  ):
    gin.parse(text, ["config.SamplerConfig.steps = 2"], root=SamplerConfig)


SHARE = st.floats(0, 1, exclude_min=True)
POSITIVE = st.floats(0, 1e9, exclude_min=True)
COUNT = st.integers(1, 999_999)
VALUES = [
  (settings.POLICIES, st.just(Quota())),
  (
    settings.POLICIES,
    st.builds(Threshold, threshold=SHARE, quota_first=st.booleans()),
  ),
  (settings.POLICIES, st.builds(Factor, factor=POSITIVE)),
  (settings.POLICIES, st.builds(Hierarchy, threshold=SHARE, low=SHARE)),
  (
    settings.POLICIES,
    st.builds(
      Credit,
      threshold=SHARE,
      quota_first=st.just(False),
      alpha=POSITIVE,
      beta=st.floats(0, 1, exclude_max=True),
      gamma=POSITIVE,
    ),
  ),
  (settings.CACHES, st.none() | st.builds(settings.Prefix)),
  (settings.CACHES, st.builds(settings.Dual)),
  (settings.CACHES, st.builds(Vicinity, before=COUNT, after=st.none() | COUNT)),
  (
    settings.CACHES,
    st.builds(Delayed, refresh=st.none() | COUNT, halvings=COUNT),
  ),
  (
    settings.REMASKS,
    st.builds(
      Remask,
      kind=st.sampled_from(["cap", "rescale", "confidence"]),
      eta=st.floats(0, 1),
      start=st.floats(0.5, 1),
      stop=st.floats(0, 0.5),
    ),
  ),
  (
    settings.CANVASES,
    st.builds(
      Growth,
      start=st.none() | COUNT,
      by=st.integers(2, 999),
      window=COUNT,
      eos_threshold=SHARE,
      expand_threshold=SHARE,
      low_threshold=SHARE,
      ends=COUNT,
    ),
  ),
]


@pytest.mark.parametrize(("forms", "values"), VALUES)
def test_a_value_with_structure_is_what_its_text_says(forms, values):
  @drawn(values)
  def check(value):
    assert forms.parse(forms.text(value)) == value

  check()


@pytest.mark.parametrize(
  ("given", "words"),
  [
    ("--policy=hierarchy:0.9,high=1", "hierarchy:0.9,high=1: found high=, exp"),
    ("--policy=hierarchy,low=2", "Hierarchy.low: found 2.0, expected above 0"),
    ("--policy=threshold:0.9,low=0.1", "found low=, expected nothing"),
    ("--policy=credit:0.9,alpha=x", "alpha is 'x', expected a number"),
    (
      "--policy=credit:0.9,beta=1",
      "beta: found 1.0, expected at least 0 and below 1",
    ),
    ("--policy=credit:0.9,alpha=-1", "alpha: found -1.0, expected at least 0"),
    ("--cache=vicinity:2,before=1", "found before=, expected after"),
    ("--cache=vicinity:2,after", "expected none, prefix"),
    ("--cache=delayed,halvings=0.5", "halvings is '0.5', expected a whole"),
    ("--cache=dual,halvings=1", "found halvings=, expected nothing"),
    (CHANCE + ",start=0.2,stop=0.6", "start=0.2,stop=0.6: Remask: start is"),
    ("--canvas=auto,by=1", "--canvas=auto,by=1: Growth.by: found 1"),
    ("--canvas=auto,by=2,by=3", "expected fixed or auto[:START][,by=BY]"),
    ("--canvas=auto,start=3", "found start=, expected by or window"),
    ("--place_temperature=0", "expected more than 0"),
    ("--place_temperature=nan", "expected more than 0"),
    ("--place_temperature=1 --policy=factor:1", "expected --policy=quota"),
    (
      "--policy=threshold:0.9 --select=random",
      "--select=random: --policy=threshold:0.9 compares conf",
    ),
    (
      "--policy=quota+threshold:0.9 --select=entropy --steps=4",
      "--select=entropy: --policy=quota+threshold:0.9 compares conf",
    ),
    (
      "--policy=factor:1 --select=entropy",
      "expected --select=candidate, max or margin, or --policy=quota",
    ),
    ("--policy=credit:0.9 --select=random", "--policy=credit:0.9 compares"),
    ("--policy=hierarchy --select=entropy", "--policy=hierarchy:0.92 compares"),
    (
      "--place_temperature=1 --select=random",
      "--place_temperature=1.0: has no effect with --select=random",
    ),
    ("--edit_steps=3", "has no effect without --edit"),
  ],
)
def test_mistakes(given, words):
  with pytest.raises(UserError) as found:
    wanted(*given.split())
  assert words in str(found.value)


@pytest.mark.parametrize(
  ("config", "infills", "count", "words"),
  [
    (
      SamplerConfig(canvas=Growth()),
      ["[[2]]"],
      1,
      "=auto lets the model",
    ),
    (SamplerConfig(stop_early=False), ["[[2]]"], 1, "--nostop_early: has no"),
    (SamplerConfig(), ["none"], 1, "found no gap"),
    (SamplerConfig(), [], 2, "--gif: found 2 prompts, expected one"),
  ],
)
def test_what_the_command_cannot_do(config, infills, count, words):
  with pytest.raises(UserError, match=words):
    diffusion.check(config, infills, count, diffusion.Pictures(gif="a.gif"))
