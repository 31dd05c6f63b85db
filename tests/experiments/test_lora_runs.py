"""Run files of adapters on SmolLM2 do what their headers say."""

import re

import pytest

from experiments.core import config, train_eval
from research.training.checkpoints import workdir

RUNS = sorted(
  str(path.relative_to(config.CONFIGS))
  for path in config.CONFIGS.glob("runs/lora/*_smollm2.gin")
  if "adapters/smollm2_short.gin" in path.read_text("utf-8")
)


@pytest.mark.slow
@pytest.mark.parametrize("run", RUNS)
def test_a_run_file_gives_the_numbers_of_its_header(run, tmp_path):
  header = (config.CONFIGS / run).read_text("utf-8")
  said = re.search(
    r"perplexity_before ([\d.]+), perplexity_after ([\d.]+)\.", header
  )
  experiment, text = config.read(run)
  result = train_eval.train(
    experiment, workdir.claim_workdir(tmp_path / "run", text)
  )
  if said is None:  # a run that says no more than its claim
    assert "perplexity_after below perplexity_before" in header
    assert result["perplexity_after"] < result["perplexity_before"]
    return
  before, after = (float(x) for x in said.groups())
  # The texts are Python's own documentation, of which each release has another:
  # the headers' numbers are of 3.13.5.
  assert result["perplexity_before"] == pytest.approx(before, rel=0.005)
  # Another machine rounds another way, which 24 steps amplify.
  assert result["perplexity_after"] == pytest.approx(after, rel=0.02)
