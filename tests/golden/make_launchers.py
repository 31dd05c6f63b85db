"""Writes what the launchers of clusters render for a sweep of two units.

  .venv/bin/python -m tests.golden.make_launchers

These texts are ours: they change when the launchers do. bash, Slurm itself and
the schema of Kubernetes' JobSet judge them in the tests.
"""

import pathlib
import sys

from experiments.sweeps import jobset, slurm
from experiments.sweeps.sweep_units import Planned
from experiments.sweeps.work import Work

FOLDER = pathlib.Path(__file__).parent / "launchers"
SWEEP = pathlib.Path("/runs/my sweep")

JOBSETS = {
  "v5e_two_slices.yaml": jobset.hardware("v5e:4x4", 2),
  "h100_two_nodes.yaml": jobset.hardware("h100:8", 2),
}


def units(folder: pathlib.Path, **more) -> list[Work]:
  """Returns two units, without configurations, in a sweep's folder."""
  return [
    Work(
      name=name,
      config=folder / f"{name}.gin",
      workdir=folder / name,
      log=folder / f"{name}.log",
      **more,
    )
    for name in ("RANK=1", "RANK=8")
  ]


def planned(folder: pathlib.Path) -> list[Planned]:
  """Returns these units with configurations."""
  return [
    Planned(unit={}, text=f"{work.name.replace('=', ' = ')}\n", work=work)
    for work in units(folder)
  ]


def texts() -> dict[str, str]:
  """Returns the texts, by the names of their files."""
  return {
    "array.sh": slurm.script(
      units(SWEEP / "units", options=("--devices=2",)),
      name="quickstart_rank",
      folder=SWEEP / "slurm",
      options=["--nodes=2", "--time=8:00:00"],
    ),
    **{
      file: jobset.manifest(
        planned(SWEEP / "units")[:1],
        sweep="quickstart_rank",
        image="registry/heptad:1",
        on=on,
        volumes=["runs:/runs"],
      )
      for file, on in JOBSETS.items()
    },
  }


if __name__ == "__main__":
  sys.executable = "python"
  FOLDER.mkdir(exist_ok=True)
  for file, text in texts().items():
    (FOLDER / file).write_text(text)
