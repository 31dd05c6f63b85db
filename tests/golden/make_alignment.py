"""Writes what TRL's GRPOTrainer says of log-probabilities and rewards.

  pip install --target=DIR --no-deps trl==1.16.0 datasets pandas pyarrow dill \
    xxhash multiprocess
  PYTHONPATH=DIR .venv-peers/bin/python tests/golden/make_alignment.py

Its `_compute_loss` is called on a stand-in for the trainer, whose model's log p
are the numbers below, so that nothing but the loss is computed. alignment.npz:

  new, old, reference  fp64 [B, T]  log p of each token
  advantage            fp64 [B], and `token_advantage` [B, T]
  answer               bool [B, T]  the completion's mask
  NAME/loss            fp64         of each case below
  NAME/gradient        fp64 [B, T]  with respect to `new`
  overlong             fp64 [n]     DAPO's punishment of 1 to n tokens

Only NumPy draws numbers.
"""

import argparse
import collections
import pathlib
import types

import numpy as np
import torch
from trl.rewards.other_rewards import get_soft_overlong_punishment
from trl.trainer.grpo_trainer import GRPOTrainer

TO = pathlib.Path(__file__).parent / "alignment.npz"
B, T = 6, 7
LENGTHS = 7, 3, 5, 1, 6, 4
CASES = {
  "grpo": dict(loss_type="grpo", beta=0.04),
  "dr_grpo": dict(loss_type="dr_grpo"),
  "dapo": dict(loss_type="dapo", epsilon_high=0.28),
  "gspo": dict(
    loss_type="grpo",
    importance_sampling_level="sequence",
    epsilon_low=0.05,
    epsilon_high=0.1,
  ),
  "most": dict(loss_type="dapo", delta=1.5, beta=0.1),
  "tokens": dict(loss_type="grpo", advantage="token_advantage"),
}
LIMIT, BUFFER, COUNT = 20, 8, 25


def numbers():
  """Returns the log-probabilities, advantages and mask of all cases."""
  rng = np.random.default_rng(0)
  new = -rng.gamma(1.0, 1.5, (B, T))
  return {
    "new": new,
    "old": np.minimum(new + rng.normal(0, 0.4, (B, T)), -1e-3),
    "reference": np.minimum(new + rng.normal(0, 0.7, (B, T)), -1e-3),
    "advantage": np.array([1.3, -0.7, 0.4, -1.1, 0.9, -0.2]),
    "token_advantage": rng.normal(0, 1, (B, T)),
    "answer": np.arange(T) < np.array(LENGTHS)[:, None],
  }


def stand_in(new, how):
  """Returns what `_compute_loss` reads of a trainer."""
  same = types.SimpleNamespace(
    gather=lambda x: x, reduce=lambda x, reduction: x, num_processes=1
  )
  entropies = torch.zeros(new.shape, dtype=new.dtype)
  return types.SimpleNamespace(
    _get_per_token_logps_and_entropies=lambda *a, **k: (new, entropies, None),
    aux_loss_enabled=False,
    top_entropy_quantile=1.0,
    off_policy_mask_threshold=None,
    importance_sampling_level=how.get("importance_sampling_level", "token"),
    beta=how.get("beta", 0.0),
    loss_type=how["loss_type"],
    epsilon_low=how.get("epsilon_low", 0.2),
    epsilon_high=how.get("epsilon_high", 0.2),
    use_vllm=False,
    max_completion_length=T,
    _entropy_bonus_enabled=False,
    _metrics={"eval": collections.defaultdict(list)},
    args=types.SimpleNamespace(
      use_bias_correction_kl=False, delta=how.get("delta")
    ),
    model=types.SimpleNamespace(training=False),
    accelerator=same,
  )


def case(given, how):
  """Returns the loss and its gradient."""
  new = torch.tensor(given["new"], requires_grad=True)
  ids = torch.zeros((B, T), dtype=torch.long)
  prompt = torch.zeros((B, 1), dtype=torch.long)
  inputs = {
    "prompt_ids": prompt,
    "prompt_mask": prompt + 1,
    "completion_ids": ids,
    "completion_mask": torch.tensor(given["answer"]).long(),
    "advantages": torch.tensor(given[how.get("advantage", "advantage")]),
    "old_per_token_logps": torch.tensor(given["old"]),
    "ref_per_token_logps": torch.tensor(given["reference"]),
    "num_items_in_batch": torch.tensor(given["answer"]).sum(),
  }
  loss = GRPOTrainer._compute_loss(stand_in(new, how), None, inputs)
  loss.backward()
  return loss.item(), new.grad.numpy()


def main():
  parser = argparse.ArgumentParser()
  parser.add_argument("--to", type=pathlib.Path, default=TO)
  to = parser.parse_args().to
  given = numbers()
  found = dict(given)
  for name, how in CASES.items():
    found[f"{name}/loss"], found[f"{name}/gradient"] = case(given, how)
  punish = get_soft_overlong_punishment(LIMIT, BUFFER)
  found["overlong"] = punish([[0] * n for n in range(1, COUNT + 1)])
  np.savez_compressed(to, **{k: np.asarray(v) for k, v in found.items()})


if __name__ == "__main__":
  main()
