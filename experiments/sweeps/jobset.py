"""Units as JobSets of Kubernetes: YAML, which `kubectl apply` takes.

A JobSet (jobset.x-k8s.io/v1alpha2) runs the processes of a unit: a job for each
TPU slice, with a pod for each of its hosts, or one job with a pod for each node
of GPUs. Pods find each other by the JobSet's headless service; `_START` tells
JAX where process 0 is, and which one each is.

Kubernetes ends a pod by SIGTERM, and kills it after its grace period. A run
then saves and exits with 42. The pod's failure ends its job for the reason
`PodFailurePolicy`, upon which the JobSet restarts all of its jobs and does not
count it; another failure is counted, and one restart is allowed. Jobs of the
try before are gone when new ones start (`BlockingRecreate`).
"""

import dataclasses
import hashlib
import math
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from experiments.sweeps.sweep_units import Planned
from experiments.sweeps.work import PREEMPTED, TERMINATED
from research.training.preemption import GRACE_VARIABLE
from research.typing import UserError

GRACE = 120
"""Seconds between SIGTERM and SIGKILL; what cloud providers leave a spot
machine is less, and ends the pod sooner."""

PORT, SLICE_PORT = 8476, 8081
"""Where process 0 listens, for JAX and for libtpu's own traffic of slices."""

CONFIG = "/etc/heptad"
"""Folder of the unit's configuration in a pod."""

TPUS = {
  "v5e": "tpu-v5-lite-podslice",
  "v5p": "tpu-v5p-slice",
  "v6e": "tpu-v6e-slice",
}
"""Name -> label of GKE's nodes."""

TPU_DIMENSIONS = {"v5e": 2, "v5p": 3, "v6e": 2}

GPUS = {
  "a100": "nvidia-a100-80gb",
  "h100": "nvidia-h100-80gb",
  "h200": "nvidia-h200-141gb",
  "b200": "nvidia-b200",
}
"""Name -> label of GKE's nodes."""

CHIPS_PER_HOST = 4
"""Of a slice that has more than one host."""

# Kubernetes leaves `$(...)` alone, unless it names a variable of the container.
_START = """\
# Those of other slices, before a restart: libtpu would wait for them.
unset MEGASCALE_NUM_SLICES MEGASCALE_SLICE_ID MEGASCALE_PORT
unset MEGASCALE_COORDINATOR_ADDRESS
first=$JOBSET-$GROUP-0-0.$JOBSET
if [ "$SLICES" -gt 1 ]; then
  export MEGASCALE_NUM_SLICES=$SLICES MEGASCALE_SLICE_ID=$SLICE
  export MEGASCALE_COORDINATOR_ADDRESS=$first:{slice_port}
  export MEGASCALE_PORT={slice_port}
fi
export JAX_COORDINATOR_ADDRESS=$first:{port}
export JAX_NUM_PROCESSES=$((SLICES * HOSTS))
export JAX_PROCESS_ID=$((SLICE * HOSTS + JOB_COMPLETION_INDEX))
exec "$@"
"""
"""What a pod's shell does before it becomes the unit's command."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Hardware:
  """What a unit runs on; `hardware` reads it.

  Attributes:
    slices: of TPUs; 1 for GPUs.
    hosts: of a slice, or nodes of GPUs; a process each.
    resource: what a host's chips are called.
    chips: of a host.
    selector: labels of the nodes.
  """

  slices: int
  hosts: int
  resource: str
  chips: int
  selector: Mapping[str, str]


def hardware(topology: str, slices: int = 1) -> Hardware:
  """Returns what a topology is made of.

  Args:
    topology: a slice of TPUs such as `v5e:4x4` or `v5p:2x2x4`, or a node of
      GPUs, `h100:8`.

  Raises:
    UserError: there is no such topology.
  """
  name, _, size = topology.partition(":")
  if name in GPUS and re.fullmatch(r"[1-9]\d*", size):
    selector = {"cloud.google.com/gke-accelerator": GPUS[name]}
    return Hardware(
      slices=1,
      hosts=slices,
      resource="nvidia.com/gpu",
      chips=int(size),
      selector=selector,
    )
  sides = size.split("x")
  dimensions = TPU_DIMENSIONS.get(name)
  if dimensions != len(sides) or not all(
    re.fullmatch(r"[1-9]\d*", side) for side in sides
  ):
    raise UserError(
      f"--topology={topology}: expected a slice of TPUs such as v5e:4x4,"
      f" v6e:16x16 or v5p:2x2x4,\nor GPUs of a node such as h100:8"
      f" ({', '.join(GPUS)})."
    )
  chips = math.prod(map(int, sides))
  if chips > CHIPS_PER_HOST and chips % CHIPS_PER_HOST:
    raise UserError(
      f"--topology={topology}: found {chips} chips, expected a multiple of"
      f" {CHIPS_PER_HOST}, those of a host."
    )
  hosts = max(1, chips // CHIPS_PER_HOST)
  if slices > 1 and hosts == 1:
    raise UserError(
      f"--topology={topology} --slices={slices}: a slice of one host cannot be"
      " one of several on GKE; expected a larger topology."
    )
  selector = {
    "cloud.google.com/gke-tpu-accelerator": TPUS[name],
    "cloud.google.com/gke-tpu-topology": size,
  }
  return Hardware(
    slices=slices,
    hosts=hosts,
    resource="google.com/tpu",
    chips=chips // hosts,
    selector=selector,
  )


def manifest(
  units: Sequence[Planned],
  *,
  sweep: str,
  image: str,
  on: Hardware,
  volumes: Sequence[str] = (),
) -> str:
  """Returns the YAML of a sweep: two documents a unit.

  Args:
    image: of the container, with Heptad and its Python first in PATH.
    volumes: `CLAIM:/path`: a PersistentVolumeClaim, and where it is mounted,
      here and in pods: one has the sweep's working directory.

  Raises:
    UserError: a volume is none, or pods would not find the directory.
  """
  mounts = [_volume(text) for text in volumes]
  for unit in units:
    if not any(unit.work.workdir.is_relative_to(path) for _, path in mounts):
      raise UserError(
        f"--workdir: pods would not find {unit.work.workdir}.\nExpected a"
        " directory on a volume that they mount at the same path:"
        " --volume=CLAIM:/path."
      )
  documents = []
  for unit in units:
    name = jobset_name(sweep, unit.work.workdir)
    labels = {"heptad/sweep": _label(sweep)}
    metadata = {
      "name": name,
      "labels": labels,
      "annotations": {"heptad/unit": unit.work.name},
    }
    documents += [
      {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": metadata,
        "data": {"unit.gin": unit.text},
      },
      _jobset(unit, metadata, image, on, mounts),
    ]
  return yaml.dump_all(documents, Dumper=_Dumper, sort_keys=False, width=1000)


def jobset_name(sweep: str, workdir: pathlib.Path) -> str:
  """Returns a name for a unit's JobSet that DNS takes, of 40 characters.

  The names of pods add up to 23, and must have 63 at most, the first of them a
  letter (RFC 1035). Units of another sweep, or of the same one in another
  directory, have other names: they would replace this unit's configuration.

  Args:
    sweep: its name, of which the beginning is kept.
    workdir: of the unit, which no other unit has.
  """
  digest = hashlib.sha256(str(workdir).encode()).hexdigest()[:8]
  name = _label(sweep)
  name = name if name[0].isalpha() else f"sweep-{name}"
  return f"{name[:31].rstrip('-')}-{digest}"


def _jobset(
  unit: Planned,
  metadata: Mapping[str, Any],
  image: str,
  on: Hardware,
  mounts: Sequence[tuple[str, str]],
) -> dict[str, Any]:
  """Returns the JobSet of a unit, whose only group of jobs is `slice`."""
  tpu = on.resource == "google.com/tpu"
  annotations = dict(metadata["annotations"])
  if tpu:  # a slice is a pool of nodes, which no other job may share
    key = "alpha.jobset.sigs.k8s.io/exclusive-topology"
    annotations[key] = "cloud.google.com/gke-nodepool"
  return {
    "apiVersion": "jobset.x-k8s.io/v1alpha2",
    "kind": "JobSet",
    "metadata": {**metadata, "annotations": annotations},
    "spec": {
      "network": {"enableDNSHostnames": True, "publishNotReadyAddresses": True},
      "failurePolicy": {
        "maxRestarts": 1,
        "restartStrategy": "BlockingRecreate",
        "rules": [
          {
            "name": "preempted",
            "action": "RestartJobSetAndIgnoreMaxRestarts",
            "onJobFailureReasons": ["PodFailurePolicy"],
          }
        ],
      },
      "replicatedJobs": [
        {
          "name": "slice",
          "replicas": on.slices,
          "template": {"spec": _job(unit, metadata, image, on, mounts)},
        }
      ],
    },
  }


def _job(
  unit: Planned,
  metadata: Mapping[str, Any],
  image: str,
  on: Hardware,
  mounts: Sequence[tuple[str, str]],
) -> dict[str, Any]:
  """Returns the job of one slice, or of all nodes of GPUs."""
  return {
    "parallelism": on.hosts,
    "completions": on.hosts,
    "completionMode": "Indexed",
    "backoffLimit": 0,
    "podFailurePolicy": {
      "rules": [
        {
          "action": "FailJob",
          "onExitCodes": {"operator": "In", "values": [PREEMPTED, TERMINATED]},
        },
        {
          "action": "FailJob",
          "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}],
        },
      ]
    },
    "template": {
      "metadata": {"labels": dict(metadata["labels"])},
      "spec": {
        "restartPolicy": "Never",
        "terminationGracePeriodSeconds": GRACE,
        # Else the command is process 1, which ignores SIGTERM as it begins.
        "shareProcessNamespace": True,
        "nodeSelector": dict(on.selector),
        "containers": [_container(unit, metadata["name"], image, on, mounts)],
        "volumes": [
          {"name": "config", "configMap": {"name": metadata["name"]}},
          *(
            {
              "name": f"volume{i}",
              "persistentVolumeClaim": {"claimName": claim},
            }
            for i, (claim, _) in enumerate(mounts)
          ),
        ],
      },
    },
  }


def _container(
  unit: Planned,
  name: str,
  image: str,
  on: Hardware,
  mounts: Sequence[tuple[str, str]],
) -> dict[str, Any]:
  """Returns the container of a host: a shell that becomes the command."""
  given = [
    f"--config={CONFIG}/unit.gin" if x.startswith("--config=") else x
    for x in unit.work.arguments
  ]
  start = _START.format(port=PORT, slice_port=SLICE_PORT)
  values = {
    "JOBSET": name,
    "GROUP": "slice",
    "SLICES": str(on.slices),
    "HOSTS": str(on.hosts),
    GRACE_VARIABLE: str(GRACE),
  }
  index = "metadata.annotations['jobset.sigs.k8s.io/job-index']"
  return {
    "name": "unit",
    "image": image,
    "command": ["/bin/sh", "-c", start, "unit", "python", *given],
    "env": [
      *({"name": k, "value": v} for k, v in values.items()),
      {"name": "SLICE", "valueFrom": {"fieldRef": {"fieldPath": index}}},
    ],
    "ports": [{"containerPort": port} for port in (PORT, SLICE_PORT)],
    "resources": {"limits": {on.resource: on.chips}},
    "volumeMounts": [
      {"name": "config", "mountPath": CONFIG, "readOnly": True},
      *(
        {"name": f"volume{i}", "mountPath": path}
        for i, (_, path) in enumerate(mounts)
      ),
    ],
  }


def _volume(text: str) -> tuple[str, str]:
  """Returns a claim, and the path that it is mounted at."""
  claim, _, path = text.partition(":")
  if not re.fullmatch(r"[a-z0-9]([a-z0-9.-]*[a-z0-9])?", claim) or not (
    path.startswith("/")
  ):
    raise UserError(
      f"--volume={text}: expected CLAIM:/path, a PersistentVolumeClaim and"
      " where pods mount it."
    )
  return claim, path


def _label(text: str) -> str:
  """Returns a text as a label of DNS: a-z, 0-9 and dashes in between."""
  label = re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")
  return label[:63].rstrip("-") or "sweep"


class _Dumper(yaml.SafeDumper):
  """Writes texts of several lines as they are read, and shares nothing."""

  def ignore_aliases(self, data: Any) -> bool:
    return True


def _text(dumper: yaml.SafeDumper, text: str) -> yaml.Node:
  style = "|" if "\n" in text else None
  return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _text)
