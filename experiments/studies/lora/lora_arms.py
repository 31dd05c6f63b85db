"""The arms of the studies of LoRA's story: ranks, places, methods, pretraining.

Scales and starts are the authors'; where their best rate lies is swept, so
`first` only says where to begin.
"""

import dataclasses
import functools
from collections.abc import Sequence

from experiments.studies.lora import lora_terms, lr_grid
from experiments.studies.lora.lr_grid import Arm
from research.lora import adapt, adapt_eva, allocate, init_stats, wrap
from research.lora.adapt import Adapt
from research.lora.init_stats import CalibrationData
from research.lora.methods.adalora import AdaLoRA
from research.lora.methods.bdlora import BDLoRA
from research.lora.methods.c3a import C3A
from research.lora.methods.delora import DeLoRA
from research.lora.methods.dora import DoRA
from research.lora.methods.eva import EVA
from research.lora.methods.fourierft import FourierFT
from research.lora.methods.gralora import GraLoRA
from research.lora.methods.hira import HiRA
from research.lora.methods.ia3 import IA3
from research.lora.methods.kasa import KaSA
from research.lora.methods.loha import LoHa
from research.lora.methods.lokr import LoKr
from research.lora.methods.lora import LoRA
from research.lora.methods.miss import MiSS
from research.lora.methods.mora import MoRA
from research.lora.methods.one_factor import LoRAFA, MiCA
from research.lora.methods.qalora import QALoRA
from research.lora.methods.randlora import RandLoRA
from research.lora.methods.rotations import BOFT, HRA, OFT
from research.lora.methods.shira import SHiRA
from research.lora.methods.svd_init import CorDA, LoRAGA, OLoRA, PiSSA
from research.lora.methods.tinylora import TinyLoRA
from research.lora.methods.vera import VeRA
from research.lora.optim import loraplus, lorapro, relora, riemannian
from research.optim.low_rank import galore, subspace
from research.typing import Params, PRNGKey

ATTENTION = ("q", "k", "v", "o")
MLP = ("gate", "up", "down")
ALL = "all-linear"

FULL = Arm(name="full", trainable=".", group="full")


def _adapted(name, method, first=-7, targets=ALL, group="LoRA", **more):
  return Arm(
    name=name,
    transform=adapt.Adapt(method=method, targets=targets),
    first=first,
    group=group,
    **more,
  )


def capacity(ranks: Sequence[int] = (1, 4, 16, 64)) -> tuple[Arm, ...]:
  """Returns full training, ranks at alpha 32, places, and rsLoRA.

  Args:
    ranks: of LoRA on all linear layers; the last one for rsLoRA, too.
  """
  by_rank = [
    _adapted(f"LoRA r={r}", LoRA(rank=r, alpha=32.0), group="rank")
    for r in ranks
  ]
  last = ranks[-1]
  return (
    FULL,
    *by_rank,
    _adapted(
      "attention r=32", LoRA(rank=32, alpha=32.0), -6, ATTENTION, "place"
    ),
    _adapted("MLP r=16", LoRA(rank=16, alpha=32.0), -6, MLP, "place"),
    _adapted(
      f"rsLoRA r={last}",
      LoRA(rank=last, alpha=32.0, rslora=True),
      group="scale",
    ),
  )


def width(ranks: Sequence[int] = (2, 16)) -> tuple[Arm, ...]:
  """Returns full training and LoRA, for a base wider than the others.

  Args:
    ranks: of LoRA; the first one is about 1% of the parameters.
  """
  return (
    dataclasses.replace(FULL, first=-8),
    *(
      _adapted(f"LoRA r={r}", LoRA(rank=r, alpha=32.0), group="rank")
      for r in ranks
    ),
  )


def methods(steps: int) -> tuple[Arm, ...]:
  """Returns every method at about the parameters of LoRA of rank 4.

  But for activated LoRA, which is LoRA from its invocation on. TinyLoRA's rank
  is the least whose square exceeds what it trains; AdaLoRA begins with half as
  many terms again as its budget leaves, its authors' ratio.

  Args:
    steps: of each run, over which AdaLoRA's budget falls.
  """
  r, plain = 4, LoRA(rank=4, alpha=16.0)
  pairs = functools.partial(_adapted, method=plain, group="optimizer")
  start = dict(group="start")
  return (
    FULL,
    _adapted("LoRA", plain),
    _adapted("rsLoRA", LoRA(rank=r, alpha=16.0, rslora=True)),
    _adapted("DoRA", DoRA(rank=r, alpha=16.0)),
    _adapted("PiSSA", PiSSA(rank=r, alpha=4.0), -6, **start),
    _adapted(
      "MiLoRA", PiSSA(rank=r, alpha=4.0, part="smallest"), -6, **start
    ),
    _adapted("OLoRA", OLoRA(rank=r, alpha=4.0), -6, **start),
    _adapted(
      "CorDA",
      CorDA(rank=r, alpha=4.0),
      -6,
      init_stats=_covariances,
      **start,
    ),
    _adapted(
      "LoRA-GA", LoRAGA(rank=r, alpha=4.0), -6, init_stats=_slopes, **start
    ),
    Arm(name="EVA", transform=_eva(r), init_stats=_itself, **start),
    _adapted("KaSA", KaSA(rank=r, alpha=16.0), optimizer=_kasa, **start),
    _adapted(
      "AdaLoRA",
      AdaLoRA(rank=r + r // 2, alpha=24.0),
      -6,
      optimizer=functools.partial(_adalora, rank=r, steps=steps),
    ),
    _adapted("DeLoRA", DeLoRA(rank=r), -6, group="bound"),
    _adapted(
      "LoRA-FA",
      LoRAFA(rank=2 * r, alpha=16.0),
      -6,
      trainable=f"{wrap.TRAINABLE}|/fixed/a$",
      optimizer=riemannian.lora_fa,
    ),
    _adapted("MiCA", MiCA(rank=2 * r, alpha=16.0), -6, **start),
    _adapted("QA-LoRA", QALoRA(rank=6, alpha=16.0, group=4)),
    _adapted("BD-LoRA", BDLoRA(rank=6, alpha=16.0, blocks=2)),
    pairs("LoRA+", optimizer=_loraplus),
    pairs("LoRA-Pro", first=-6, optimizer=_lorapro),
    pairs("Riemannian", optimizer=_riemannian),
    _adapted("HiRA", HiRA(rank=r), -5, group="high rank"),
    _adapted("LoHa", LoHa(rank=r // 2), -6, group="high rank"),
    _adapted("LoKr", LoKr(rank=2 * r, factor=2), -6, group="high rank"),
    _adapted("MoRA", MoRA(rank=r), -6, group="high rank"),
    _adapted("MiSS", MiSS(rank=2 * r), -6, group="high rank"),
    _adapted("GraLoRA", GraLoRA(rank=r, alpha=8.0), -6, group="high rank"),
    _adapted("C3A", C3A(block=8), -3, group="high rank"),
    _adapted("SHiRA", SHiRA(rank=r, seed=-1), -5, group="high rank"),
    _adapted(
      "FourierFT", FourierFT(frequencies=622), -6, group="high rank"
    ),
    _adapted("RandLoRA", RandLoRA(rank=8, alpha=160.0), -7, group="high rank"),
    _adapted("TinyLoRA", TinyLoRA(rank=25, size=622), -6, group="high rank"),
    _adapted("OFT", OFT(block=16), -6, group="rotation"),
    _adapted("BOFT", BOFT(block=4, factors=2), -6, group="rotation"),
    _adapted("HRA", HRA(rank=2 * r), -4, group="rotation"),
    _adapted("VeRA", VeRA(rank=448), -4, group="few"),
    _adapted("IA3", IA3(), -5, group="few"),
  )  # fmt: skip


def _slopes(reading):
  return init_stats.Gradients(calibration=reading)


def _covariances(reading):
  return init_stats.Covariances(calibration=reading)


def _itself(reading):
  return reading


@dataclasses.dataclass(frozen=True)
class Spread:
  """EVA whose ranks go where inputs need them (`adapt_eva.AdaptEVA`).

  Attributes:
    adapt: what is adapted.
    init_stats: the data, as an arm gives it.
  """

  adapt: Adapt
  init_stats: CalibrationData | None = None

  def __call__(self, params: Params, key: PRNGKey) -> Params:
    """Returns `params` with fresh adapters, each of its own rank."""
    made = adapt_eva.AdaptEVA(
      adapt=self.adapt, calibration=self.init_stats, form="split"
    )
    return made(params, key)


def _eva(rank):
  return Spread(adapt.Adapt(method=EVA(rank=rank, alpha=4.0 * rank)))


def _kasa(schedule):
  return lora_terms.add_gradient(lora_terms.kasa, lr_grid.adam(schedule))


def _adalora(schedule, rank, steps):
  """A tenth of the steps to warm up, the last third with what is left."""
  budget = allocate.Budget(
    target=rank, steps=steps, warmup=steps // 10, final=steps // 3
  )
  return lora_terms.add_gradient(
    lora_terms.orthogonal,
    allocate.adalora_optimizer(lr_grid.adam(schedule), budget),
  )


def _loraplus(schedule):
  return loraplus.loraplus(schedule, clip=None)


def _lorapro(schedule):
  return lorapro.lorapro(schedule)


def _riemannian(schedule):
  return riemannian.riemannian(schedule)


ADAPTED = r"^(embed|head|final_norm)|norm/|/trained/"
"""All but the base's matrices: what LoRA learns from scratch with."""


def pretraining(
  steps: int, every: int = 200, ranks: Sequence[int] = (4, 16)
) -> tuple[Arm, ...]:
  """Returns ways to train from scratch: full, GaLore, LoRA, ReLoRA.

  LoRA and ReLoRA stand on random matrices that no gradient changes; all else
  is learned in full (research/lora/MATH.md 9.3).

  Args:
    steps: of each run.
    every: updates between ReLoRA's restarts.
    ranks: of GaLore and LoRA; the first one of ReLoRA.
  """
  low = ranks[0]
  restart = relora.Restart(every=every, until=steps)
  lora = functools.partial(
    _adapted, first=-6, trainable=ADAPTED, group="low rank"
  )
  base = lora(
    f"ReLoRA r={low}", LoRA(rank=low, alpha=float(low)), transformed="/w$"
  )
  return (
    dataclasses.replace(FULL, first=-6),
    *(
      Arm(
        name=f"GaLore r={r}",
        trainable=".",
        optimizer=functools.partial(_galore, rank=r),
        first=-6,
        group="low rank",
      )
      for r in ranks
    ),
    *(lora(f"LoRA r={r}", LoRA(rank=r, alpha=float(r))) for r in ranks),
    dataclasses.replace(
      base,
      state_transforms=(restart,),
      shape=relora.schedule(1.0, steps, every, 20, 20),
    ),
    dataclasses.replace(
      base,
      name=f"ReLoRA r={low}, no reset",
      state_transforms=(dataclasses.replace(restart, reset=_unchanged),),
    ),
  )


def _galore(schedule, rank):
  return galore.galore(schedule, subspace.Projection(rank=rank, every=100))


def _unchanged(moment, key):
  del key
  return moment


def policy(ranks: Sequence[int] = (1, 8)) -> tuple[Arm, ...]:
  """Returns full training and LoRA of small rank, for policy gradients."""
  return (
    dataclasses.replace(FULL, first=-8),
    *(
      _adapted(f"LoRA r={r}", LoRA(rank=r, alpha=32.0), -7, group="rank")
      for r in ranks
    ),
  )
