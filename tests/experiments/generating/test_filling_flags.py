"""Every option of every sampler has a flag, and the flag sets that option."""

import dataclasses
import inspect

import pytest
from absl import flags

from experiments.generating import filling, filling_flags, filling_wanted
from research.diffusion.sampling import policies
from research.diffusion.sampling.candidates import Options
from research.diffusion.sampling.credit import Credited
from research.diffusion.sampling.delayed import Delayed
from research.diffusion.sampling.denoiser import Cached
from research.diffusion.sampling.growth import Growth
from research.diffusion.sampling.guided import Guided
from research.diffusion.sampling.policies import (
  Factor,
  Hierarchy,
  Quota,
  Threshold,
)
from research.diffusion.sampling.remask import Remask
from research.interop.diffusion.spec import Spec
from research.interop.loaded import Loaded
from research.typing import UserError
from tests import support

SPEC = Spec(mask_id=9, end=(3,))
CHANCE = "--plan=chance --select=random --remask=cap:0.1"

FLAGS = [
  (Options, "block", "--block=4", 4),
  (Options, "steps", "--steps=8", 8),
  (Options, "plan", "--plan=cosine", "cosine"),
  (Options, "policy", "--policy=factor:1", Factor(factor=1.0)),
  (Options, "select", "--select=margin", "margin"),
  (Options, "place_temperature", "--place_temperature=0.4", 0.4),
  (Options, "tempered", "--tempered", True),
  (Options, "never_end", "--ends=never", True),
  (Options, "end_last", "--ends=last", True),
  (Options, "stop", "--nostop_early", False),
  (Options, "edit", "--edit=0.7", 0.7),
  (Options, "edit_steps", "--edit=0.7 --edit_steps=3", 3),
  (Options, "remask", CHANCE, Remask(kind="cap", eta=0.1)),
  (Threshold, "threshold", "--policy=threshold:0.7", 0.7),
  (Threshold, "quota_first", "--policy=quota+threshold:0.7", True),
  (Factor, "factor", "--policy=factor:0.5", 0.5),
  (Hierarchy, "low", "--policy=hierarchy,low=0.3", 0.3),
  (Hierarchy, "threshold", "--policy=hierarchy:0.8", 0.8),
  (Remask, "kind", CHANCE.replace("cap", "rescale"), "rescale"),
  (Remask, "eta", CHANCE, 0.1),
  (Remask, "start", CHANCE + ",start=0.6", 0.6),
  (Remask, "stop", CHANCE + ",start=0.6,stop=0.2", 0.2),
  (Credited, "alpha", "--policy=credit:0.9,alpha=0.3", 0.3),
  (Credited, "beta", "--policy=credit:0.9,beta=0.3", 0.3),
  (Credited, "gamma", "--policy=credit:0.9,gamma=0.3", 0.3),
  (Guided, "weight", "--guidance=1.5", 1.5),
  (Cached, "before", "--cache=vicinity:5", 5),
  (Cached, "after", "--cache=vicinity:5,after=2", 2),
  (Delayed, "refresh", "--cache=delayed:5", 5),
  (Delayed, "halvings", "--cache=delayed,halvings=1", 1),
  (Growth, "start", "--canvas=auto:6", 6),
  (Growth, "by", "--canvas=auto,by=3", 3),
  (Growth, "window", "--canvas=auto,window=4", 4),
  (Growth, "begin", "--canvas=auto:2,begin=0.25", 0.25),
  (Growth, "ready", "--canvas=auto,ready=0.25", 0.25),
  (Growth, "low", "--canvas=auto,low=0.25", 0.25),
  (Growth, "ends", "--canvas=auto,ends=2", 2),
]

ELSEWHERE = {
  Options: {"mask_id", "end", "length"},  # the model's; --max_new_tokens
  Credited: {"inner", "mask_id"},
  Guided: {"inner", "mask_id", "prompt"},
  Cached: {"model", "shift", "told"},
  Delayed: {"model", "mask_id", "shift", "told"},
}
"""Fields that the model or the prompt decides about."""


def wanted(*arguments):
  values = flags.FlagValues()
  filling_flags.define(values)
  values(["command", *arguments])
  given = {name: values[name].value for name in filling_flags.NAMES}
  return filling.Wanted(length=8, **given)


def built(*arguments):
  """Returns whatever flags make, by its class."""
  it = wanted(*arguments)
  it.check(1)
  model = support.model()
  options = filling.begun([[1, 2]], [0], SPEC, it).options
  loaded = Loaded(model, {}, None, {})
  found = {Options: options, Growth: filling_wanted.growth_of(it)}
  asked = filling.denoiser_of(loaded, SPEC, it)
  while asked is not None:
    found[type(asked)] = asked
    asked = getattr(asked, "inner", None)
  for more in (options.policy, options.remask):
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


def test_flags_are_what_is_wanted():
  names = {f.name for f in dataclasses.fields(filling.Wanted)}
  assert names == {*filling_flags.NAMES, "length", "seed"}
  plain = filling.Wanted(length=8)
  for name in filling_flags.NAMES:
    got, want = getattr(wanted(), name), getattr(plain, name)
    assert got == want or (name == "infill" and list(got) == list(want))


@pytest.mark.parametrize(
  ("given", "words"),
  [
    ("--policy=hierarchy:0.9,high=1", "hierarchy:0.9,high=1: found high=, exp"),
    ("--policy=hierarchy,low=2", "expected quota, hierarchy"),
    ("--policy=threshold:0.9,low=0.1", "found low=, expected nothing"),
    ("--policy=credit:0.9,alpha=x", "alpha is 'x', expected a number"),
    ("--policy=credit:0.9,beta=1", "beta from 0 to below 1"),
    ("--policy=credit:0.9,alpha=-1", "alpha and gamma of at least 0"),
    ("--cache=vicinity:2,before=1", "found before=, expected after"),
    ("--cache=vicinity:2,after", "expected none, prefix"),
    ("--cache=delayed,halvings=0.5", "halvings is '0.5', expected a whole"),
    ("--cache=dual,halvings=1", "expected none, prefix"),
    (CHANCE + ",start=0.2,stop=0.6", "start=0.2,stop=0.6: Remask: start is"),
    ("--canvas=auto,by=1", "--canvas=auto,by=1: Growth: by is 1"),
    ("--canvas=auto,by=2,by=3", "then perhaps ,by=8"),
    ("--canvas=auto,start=3", "found start=, expected by or window"),
    ("--place_temperature=0", "expected more than 0"),
    ("--place_temperature=nan", "expected more than 0"),
    ("--place_temperature=1 --policy=factor:1", "expected --policy=quota"),
    (
      "--policy=threshold:0.9 --select=random",
      "--select=random: --policy=threshold:0.9 compares how sure",
    ),
    (
      "--policy=quota+threshold:0.9 --select=entropy --steps=4",
      "--select=entropy: --policy=quota+threshold:0.9 compares how sure",
    ),
    (
      "--policy=factor:1 --select=entropy",
      "expected --select=candidate, max or margin, or --policy=quota",
    ),
    ("--policy=credit:0.9 --select=random", "--policy=credit:0.9 compares"),
    ("--policy=hierarchy --select=entropy", "--policy=hierarchy compares"),
    (
      "--place_temperature=1 --select=random",
      "--place_temperature=1.0: has no effect with --select=random",
    ),
    ("--edit_steps=3", "has no effect without --edit"),
    ("--infill=[[2]] --canvas=auto", "leave one of them out"),
  ],
)
def test_mistakes(given, words):
  with pytest.raises(UserError) as found:
    wanted(*given.split()).check(1)
  assert words in str(found.value)
