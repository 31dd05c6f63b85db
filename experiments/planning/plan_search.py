"""Plans a search: a policy that writes, and a verifier that scores.

Both models stay on the devices. The policy reads each problem once and writes
its copies together; the verifier reads whole solutions. A verifier that scores
every step and keeps what it has read (`search.cached_verifier`) reads no token
twice, so it costs no less than this one pass. No flags, no gin;
`experiments.plan --search=` is the command.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from experiments.core import cli
from experiments.core.experiment import Experiment
from experiments.planning import abstract_step, plan_decoding
from experiments.planning.calls import (
  Planner,
  Rows,
  batch_shape,
  rows,
  served,
)
from research import sharding
from research.generation.paging import Paging
from research.planning.chips import Topology
from research.planning.text import format_bytes
from research.prm.model import GenerativeReward, RewardModel
from research.typing import UserError

STEPS = 16
"""Steps of a solution that a verifier scores; their number costs nothing."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class SearchRows:
  """A search.

  Attributes:
    rows: problems at once, their tokens and those of a solution.
  """

  rows: Rows
  copies: int


def parse_search(given: str) -> SearchRows:
  """Returns what `8x16x512+1024` stands for.

  That is problems, copies of each, tokens of a problem and of a solution.

  Raises:
    UserError: it stands for nothing.
  """
  problems, _, rest = given.partition("x")
  copies, _, tokens = rest.partition("x")
  try:
    found = rows(f"{problems}x{tokens}", "search")
    if not (copies.isdecimal() and 0 < int(copies) < 10**6):
      raise UserError("COPIES")
  except UserError as error:
    raise UserError(
      f"--search={given}: expected PROBLEMSxCOPIESxPROMPT+LENGTH, e.g."
      " 8x16x512+1024"
    ) from error
  return SearchRows(rows=found, copies=int(copies))


def plan(
  policy: Experiment,
  verifier: Experiment | None,
  topology: Topology,
  search: SearchRows,
  batch: int | None = None,
  paging: Paging | None = None,
) -> dict[str, Any]:
  """Returns what a search costs on `topology`, and prints it.

  Args:
    batch: solutions that the verifier reads at once; by default all.
    paging: of the policy's cache, see `plan_decoding.plan`.

  Raises:
    UserError: the policy is no language model, the verifier no reward model, or
      `batch` does not divide the solutions.
  """
  model = plan_decoding.policy(policy, topology)
  out: dict[str, Any] = {
    **model.planner.devices,
    "problems": search.rows.count,
    "copies": search.copies,
    "policy": plan_decoding.calls(model, search.rows, search.copies, paging),
  }
  solutions = search.rows.count * search.copies
  seconds = [out["policy"].get("seconds")]
  resident = [_resident(model.params)]
  needs = [out["policy"].get(n, {}) for n in ("prefill", "decode")]
  if verifier is not None:
    length = search.rows.prompt + search.rows.length
    batch = batch or solutions
    if solutions % batch:
      raise UserError(
        f"--scored={batch}: expected a divisor of the {solutions} solutions"
      )
    found, kept = score(verifier, topology, batch, length)
    out["verifier"] = found | {"passes": solutions // batch}
    one = found.get("seconds")
    seconds.append(None if one is None else one * (solutions // batch))
    resident.append(kept)
    needs.append(found)
  out |= all_resident(resident, needs, topology)
  if None not in seconds:
    out["seconds"] = sum(seconds)
    out["solutions_per_s"] = solutions / out["seconds"]
  cli.say(_summary(out, solutions))
  return out


def score(
  verifier: Experiment, topology: Topology, count: int, length: int
) -> tuple[dict[str, Any], int]:
  """Returns the cost of scoring solutions, and the verifier's bytes a device.

  Raises:
    UserError: its model is no reward model.
  """
  taken = abstract_step.build(verifier, topology.devices)
  model = taken.objective.model
  if not isinstance(model, RewardModel | GenerativeReward):
    model = taken.loaded.model
  if not isinstance(model, RewardModel | GenerativeReward):
    raise UserError(
      f"--verifier: the model is a {type(model).__name__}, expected a reward"
      " model, such as rewards.WithHead makes of a language model"
    )
  params = served(taken.state.params)
  whole = verifier.mesh.batch(taken.mesh)
  found, _ = Planner(mesh=taken.mesh, topology=topology).plan(
    f"scores of {count} solutions of {length} tokens",
    lambda params, tokens, steps: model.scores(params, tokens, steps),
    params,
    batch_shape((count, length), whole),
    jax.ShapeDtypeStruct((count, STEPS), jnp.int32),
    tokens=count * length,
  )
  return found, _resident(params)


def all_resident(
  resident: list[int], needs: list[dict[str, Any]], topology: Topology
) -> dict[str, Any]:
  """Returns the bytes of a device that holds all models during each call.

  Args:
    resident: bytes of each model's weights: the policy's, and the verifier's.
    needs: costs of the policy's calls, then of the verifier's.
  """
  totals = []
  for i, need in enumerate(needs):
    if "total_bytes" not in need:
      return {"fits": False}
    # Each call counts its own weights; the other model's are there, too.
    own = 0 if i < 2 else 1
    others = sum(x for j, x in enumerate(resident) if j != own)
    totals.append(need["total_bytes"] + others)
  limit = int(topology.chip.memory)
  most = max(totals)
  return {"total_bytes": most, "limit_bytes": limit, "fits": most <= limit}


def _resident(params: Any) -> int:
  leaves = jax.tree.leaves(params)
  return sharding.bytes_per_device(leaves, [x.sharding for x in leaves])


def _summary(out: dict[str, Any], solutions: int) -> str:
  words = [f"a search of {out['problems']} problems, {solutions} solutions:"]
  if "total_bytes" in out:
    words.append(
      f"{format_bytes(out['total_bytes'])} of"
      f" {format_bytes(out['limit_bytes'])} a device,"
    )
  words.append("fits" if out["fits"] else "DOES NOT FIT")
  if "seconds" in out:
    words.append(f"and takes {out['seconds']:.3g} s at least")
  return " ".join(words)
