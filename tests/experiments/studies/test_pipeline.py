"""A study whose arms are commands."""

import dataclasses
import json
import pathlib
import re

import pytest

from experiments import study
from experiments.core import cli, config
from experiments.searching import running
from experiments.studies import protocol
from experiments.studies.claims import Claim
from experiments.studies.pipeline import Pipeline, Step
from experiments.studies.search import reports
from experiments.studies.search.systems import Comparison, System
from research.typing import UserError
from tests.experiments.searching import parity
from tests.research.prm import test_champ

TINY = str(pathlib.Path(parity.__file__).with_name("tiny.gin"))
GOLDEN = pathlib.Path(__file__).parents[2] / "golden" / "models"
MODEL = GOLDEN / "gguf_f32" / "model.gguf"
SCORED = (
  "VERIFIER=@verifiers.NewReward()",
  "CHOICE=@choose.BestOf()",
  "search_run.SearchRun.seed={seed}",
)
EVERY = Step(name="every", command="search", path=TINY, set=SCORED)
PAIRS = Step(
  name="pairs", command="search", path=TINY, set=(*SCORED, "N=2"), pool="every"
)
ALONE = Step(name="alone", command="search", path=TINY, seeds=1)
STUDY = Pipeline(
  steps=(EVERY, PAIRS, ALONE),
  shown=(System(step="every"), System(step="pairs"), System(step="alone")),
  comparisons=(
    Comparison(
      claim="c", first=System(step="every"), second=System(step="alone")
    ),
  ),
  curves=(System(step="every"),),
  seeds=2,
)


@pytest.mark.slow
def test_searches_run_and_choose_again_and_are_compared(tmp_path, monkeypatch):
  rows = {"every, seed 0": STUDY.run("every, seed 0", {}, tmp_path)}
  with monkeypatch.context() as patch:
    patch.setattr(
      running.sampling, "Search", lambda *_: pytest.fail("it samples")
    )
    rows["pairs, seed 0"] = STUDY.run("pairs, seed 0", {}, tmp_path)
  for arm in STUDY.arms[2:]:
    rows[arm] = STUDY.run(arm, {}, tmp_path)
  assert list(rows) == STUDY.arms
  every, pairs = rows["every, seed 0"], rows["pairs, seed 0"]
  assert every["n"] == 4 and pairs["n"] == 2 and every["flops_verifier"] > 0
  assert pairs["flops_per_problem"] < every["flops_per_problem"]
  assert every["accuracy"] == pytest.approx(
    sum(every["each"]) / len(every["each"]), abs=1e-6
  )
  wrong = sum(x["share"] for x in every["wrong"].values())
  right = sum(every["right"]) / sum(every["samples"])
  assert wrong == pytest.approx(1 - right)
  assert [line["samples"] for line in STUDY.table(rows)] == [4, 2, 4]
  (found,) = STUDY.verdicts(rows)
  assert re.search(
    "5 problems, 2 and 1 seeds, at 2.*times the FLOPs", found.found
  )
  STUDY.plot(rows, tmp_path, "title")
  assert (tmp_path / "title.png").stat().st_size > 10_000


def test_settings_are_those_of_all_that_an_arm_needs():
  longer = Step(name="policy", command="search", path=TINY, set=("COPIES=2",))
  user = Step(
    name="user",
    command="search",
    path=TINY,
    set=(
      "verifiers.TrainedReward.workdir={policy}",
      "VERIFIER=@verifiers.TrainedReward()",
    ),
  )
  one = Pipeline(steps=(longer, user), seeds=1)
  other = Pipeline(
    steps=(Step(name="policy", command="search", path=TINY), user), seeds=1
  )
  assert one.settings("user, seed 0") != other.settings("user, seed 0")
  again = Step(name="again", command="search", path=TINY, pool="user")
  three = Pipeline(steps=(longer, user, again), seeds=1)
  needed = [list(three.needs(arm)) for arm in three.arms]
  assert needed == [[], ["policy, seed 0"], ["user, seed 0"]]
  alone = Pipeline(steps=(longer, ALONE), seeds=1)
  again = Pipeline(steps=(Step(name="x", command="search", path=TINY), ALONE))
  assert alone.settings("alone, seed 0") == again.settings("alone, seed 0")


@pytest.mark.parametrize(
  "path, arm, setting",
  [
    ("llada/claims_ar", "blocks_4", "@block.BlockDiffusion()"),
    ("llada/claims_text", "next_token", "@objective.NextToken()"),
    ("llada/claims_reversal", "diffusion", "@infilling.Pairs()"),
    ("llada/claims_incontext", "converted", "trained.Trained"),
    ("llada/claims_policies", "factor", "policies.Factor.factor=0.5"),
    ("llada/claims_sft", "tuned", "@infilling.Orders()"),
    ("prm/claims_champ", "last", "SUPERVISION = @objective.last_step"),
    ("search/claims_countdown_ladder", "p96_pool", "WIDTH = 96"),
    ("lora/claims_capacity", "update", "--op=diagnose"),
    ("lora/claims_methods", "HiRA", "METHOD = @hira.HiRA()"),
    ("lora/claims_methods_markov", "EVA", "@heldout/synthetic.Markov()"),
    ("lora/claims_smollm2", "dora", "METHOD = @dora.DoRA()"),
    ("lora/claims_width", "rank_2", "RANK = 2"),
    ("tour/tour", "vision_frozen", "TRAINABLE = '^(vision|connector)/'"),
    ("vlm/claims_connectors", "pool_4", "QUERIES = 4"),
    ("vlm/claims_contrastive", "contrastive_digits", "SEED = 0"),
    ("vlm/claims_features", "before", "vit.Features.layers = (-2,)"),
    ("vlm/claims_hard", "shapes_hard", "KINDS = ('count', 'relation')"),
    ("vlm/claims_masks", "prefix", "MASK = @masks.BidirectionalPrompt()"),
    ("vlm/claims_shapes", "shapes", "SEED = 0"),
    ("vlm/claims_stages", "stage1", "staged.Stages.names = ('align',)"),
    ("vlm/claims_stages_smollm2", "stage2_smollm2", "SEED = 0"),
    ("vlm/claims_tiling", "tiles", "TILING = @nanovlm.NanoVLM()"),
    ("plan/table", "llada_8b_sample_v5e_2x4", "--fill=16x1024+256"),
    ("quant/claims_equal_bits", "gptq3", "BITS = 3"),
    ("quant/claims_equal_bits_smollm2", "free4", "iq4.IQ4NL()"),
    ("quant/claims_activations_smollm2", "w8a4", "bits = 4"),
    ("quant/claims_rotations", "learned", "spinquant.SpinQuant()"),
  ],
)
def test_an_experiment_has_what_its_claims_name(
  path, arm, setting, tmp_path, monkeypatch
):
  """Its arms can be configured, each after those that it needs."""
  test_champ.installed_as(tmp_path, monkeypatch)
  run = f"runs/{path}.gin"
  found = config.read(run, root=protocol.Run).experiment.study
  before = set()
  for step in found.steps:
    used = {x for line in step.set for x in re.findall(r"\{(\w+)\}", line)}
    assert used <= before | {"seed", step.name}, step.name
    assert step.pool is None or step.pool in before
    before.add(step.name)
  settings = {
    step.name: found.settings(f"{step.name}, seed 0") for step in found.steps
  }
  assert len(set(settings.values())) == len(settings)
  assert setting in settings[arm]


def test_without_columns_and_systems_there_is_no_picture(tmp_path):
  """Searches and trainings without a table of their own are studies, too."""
  rows = {"every, seed 0": {"accuracy": 0.5}}
  Pipeline(steps=(EVERY,), seeds=1).plot(rows, tmp_path, "title")
  assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize(
  "make, message",
  [
    (lambda: Step(name="a b", command="train", path=TINY), "expected one word"),
    (lambda: Pipeline(steps=(EVERY, EVERY)), "two are called 'every'"),
    (
      lambda: Pipeline(steps=(EVERY,), shown=(System(step="none"),)),
      "found a claim or a system of the step 'none'",
    ),
  ],
)
def test_what_does_not_fit_is_refused(make, message):
  with pytest.raises(UserError, match=message):
    make()


MARKOV = str(pathlib.Path(__file__).parents[2] / "multiprocess" / "tiny.gin")
ARMS = f"""
from __gin__ import dynamic_registration
from experiments.studies import pipeline
from experiments.studies import protocol
protocol.Run.study = @pipeline.Pipeline()
pipeline.Pipeline.seeds = 2
pipeline.Pipeline.steps = [
  {{'name': 'short', 'command': 'train', 'path': '{MARKOV}', 'seeds': 1,
   'set': ['SEED={{seed}}', 'STEPS=2'], 'title': '2 steps'}},
  {{'name': 'long', 'command': 'train', 'path': '{MARKOV}',
   'set': ['SEED={{seed}}'], 'tries': ('LEARNING_RATE', (1e-5, 1e-2)),
   'least': 'validation/loss'}},
  {{'name': 'packed', 'command': 'convert', 'seeds': 1,
   'set': ['--from={{long}}', '--to={{packed}}', '--format=orbax']}},
]
pipeline.Pipeline.columns = {{'loss': 'validation/loss'}}
pipeline.Pipeline.claims = [
  {{'claim': 'more steps help', 'metric': 'validation/loss', 'first': 'long',
   'second': 'short', 'holds': 'below'}},
]
"""


def test_a_run_file_lists_commands_and_claims(tmp_path):
  file = tmp_path / "arms.gin"
  file.write_text(ARMS)
  arguments = [f"--config={file}", f"--workdir={tmp_path / 'study'}"]
  assert cli.call(study.main, ["study", *arguments]) == 0
  result = json.loads((tmp_path / "study" / "result.json").read_text())
  (table,) = result["tables"]
  assert [row[0] for row in table["rows"]] == ["2 steps", "long"]
  stored = tmp_path / "study" / "arms" / "long_seed_1.json"
  row = json.loads(stored.read_text())["row"]
  assert row["at"] == 1e-2 and set(row["tried"]) == {"1e-05", "0.01"}
  assert not row["inside"]
  assert row["validation/loss"] == row["tried"]["0.01"] < row["tried"]["1e-05"]
  assert (tmp_path / "study" / "runs" / "packed_0").is_dir()
  (verdict,) = result["verdicts"]
  assert verdict["claim"] == "more steps help"


@pytest.mark.parametrize(
  "text, message",
  [
    ("'title': '2 steps'", "found the field 'tilte'.*did you mean 'title'"),
    ("'first': 'long'", "step 'lang'"),
    ("'command': 'convert'", "found 'covert', expected train, label"),
  ],
)
def test_a_field_that_is_misspelt_is_named(text, message, tmp_path, capsys):
  wrong = {"title": "tilte", "long'": "lang'", "convert": "covert"}
  (right,) = (x for x in wrong if x in text)
  file = tmp_path / "arms.gin"
  file.write_text(ARMS.replace(text, text.replace(right, wrong[right])))
  arguments = [f"--config={file}", f"--workdir={tmp_path / 'study'}"]
  assert cli.call(study.main, ["study", *arguments]) == 1
  assert re.search(message, capsys.readouterr().err)


SMALL = Pipeline(
  steps=(
    Step(
      name="int4",
      command="quantize",
      path="runs/quant/rtn_smollm2.gin",
      set=("--to={int4}", f"--set=MODEL='{MODEL}'", "--set=BLOCK=8"),
    ),
    Step(
      name="read",
      command="evaluate",
      set=("--model={int4}", f"--base={MODEL}", "--window=32", "--nolayers"),
    ),
  ),
  columns={"kl": "kl", "packed MB": "packed_bytes"},
  claims=(
    Claim(
      claim="c",
      metric="kl",
      first="read",
      second=9,
      holds="below",
      error="kl_se",
    ),
  ),
  seeds=None,
)


def test_a_model_is_quantized_and_compared_with_its_base(tmp_path):
  rows = {arm: SMALL.run(arm, {}, tmp_path) for arm in SMALL.arms}
  assert list(rows) == ["int4, seed 0", "read, seed 0"]
  row = rows["read, seed 0"]
  assert row["kl"] > 0 < row["kl_se"]
  # What was packed has no divergence, so the table has a line of the other.
  (line,) = SMALL.tables(rows)[0]
  mega = row["packed_bytes"] / 1e6
  assert line == {"step": "read", "kl": row["kl"], "packed MB": mega}
  (verdict,) = SMALL.verdicts(rows)
  assert verdict.state == "holds"


def test_a_probe_learns_what_people_marked(tmp_path, monkeypatch):
  """The smallest variant of a study: a tiny model, two steps, one arm."""
  prompts = [f"What is {i}n?" for i in range(40)]
  test_champ.installed_as(tmp_path, monkeypatch, prompts)
  tiny = (
    *(f"experiment.Pretrained.name='{MODEL}'", "STEPS=2", "WARMUP=1"),
    *("LENGTH=128", "BATCH=4"),
  )
  path = "runs/prm/claims_champ.gin"
  study = config.read(path, root=protocol.Run).experiment.study
  study = dataclasses.replace(study, overrides={"step_labels": tiny})
  row = study.run("step_labels, seed 0", {}, tmp_path)
  assert 0 <= row["auc"] <= 1 and row["auc_error"] >= 0
  rows = {arm: row for arm in study.arms}
  assert [x["step"] for x in study.tables(rows)[0]] == [
    *("step labels", "outcomes, every step", "outcomes, last step")
  ]
  like_outcomes, *_ = study.verdicts(rows)
  assert like_outcomes.state != "holds"


def test_settings_have_what_a_run_file_of_flags_says():
  """A row is of another run file, or of other bindings, where these are."""
  text = SMALL.settings("int4, seed 0")
  assert "affine.Affine.bits = %BITS" in text and "BLOCK = 8" in text


@pytest.mark.parametrize(
  "fields, message",
  [
    (dict(shown=["ever"]), "system of the step 'ever'.*did you mean 'every'"),
    (dict(overrides={"evry": []}), "overrides: found the step 'evry'"),
  ],
)
def test_a_name_that_no_step_or_system_has_is_refused(fields, message):
  with pytest.raises(UserError, match=message):
    Pipeline(steps=(EVERY,), **fields)


def test_systems_are_named_and_steps_overridden():
  listed = Pipeline(
    steps=[EVERY],
    systems=[{"title": "two", "step": "every", "checked": 2}],
    shown=["two", "every"],
    comparisons=[{"claim": "c", "first": "two", "second": "every"}],
    reports=[reports.Budgets(pools=["every"])],
    overrides={"every": ["N=2"]},
  )
  two = System(step="every", title="two", checked=2)
  assert listed.shown == (two, System(step="every"))
  assert listed.comparisons[0].first == two
  assert listed.reports[0].systems == (System(step="every"),)
  assert listed.steps[0].set == (*EVERY.set, "N=2")
  copy = dataclasses.replace(listed, seeds=1)
  assert copy.steps == listed.steps  # once
