"""JobSets: their text, the CRD's schema, and what a pod's shell makes of it."""

import os
import pathlib
import re
import subprocess
import sys

import pytest
import yaml

from experiments import sweep
from experiments.core import cli, config
from experiments.sweeps import jobset
from research.typing import UserError
from tests.golden import make_launchers

ROOT = pathlib.Path(__file__).resolve().parents[3]
CRD = pathlib.Path(
  os.environ.get(
    "HEPTAD_JOBSET_CRD", ROOT.parent / "shared" / "data" / "jobset_crd.yaml"
  )
)

# Hosts and chips of each, as GKE's machine types have them: ct5lp-hightpu-1t
# and -4t, ct5p-hightpu-4t, ct6e-standard-4t, a3-highgpu-8g.
PODS = {
  ("v5e:1x1", 1): (1, 1),
  ("v5e:2x2", 1): (1, 4),
  ("v5e:4x4", 1): (4, 4),
  ("v5e:16x16", 2): (64, 4),
  ("v5p:2x2x1", 1): (1, 4),
  ("v5p:2x2x4", 4): (4, 4),
  ("v5p:8x8x8", 1): (128, 4),
  ("v6e:2x4", 2): (2, 4),
  ("v6e:16x16", 1): (64, 4),
  ("h100:8", 1): (1, 8),
  ("h100:8", 4): (4, 8),
}


def documents(topology="v5e:4x4", slices=1, folder="/runs/a/units", **more):
  """Returns the parsed YAML of one unit: its ConfigMap and its JobSet."""
  given = {"volumes": ["runs:/runs"]} | more
  text = jobset.manifest(
    make_launchers.planned(pathlib.Path(folder))[:1],
    sweep="Mine, too",
    image="heptad",
    on=jobset.hardware(topology, slices),
    **given,
  )
  return list(yaml.safe_load_all(text))


def pod(document):
  (group,) = document["spec"]["replicatedJobs"]
  job = group["template"]["spec"]
  spec = job["template"]["spec"]
  (container,) = spec["containers"]
  return group, job, spec, container


@pytest.mark.parametrize("file", make_launchers.JOBSETS)
def test_the_text(file, monkeypatch):
  monkeypatch.setattr(sys, "executable", "python")
  text = make_launchers.texts()[file]
  assert text == (make_launchers.FOLDER / file).read_text()


@pytest.mark.parametrize(("topology", "slices"), PODS)
def test_hosts_and_chips(topology, slices):
  group, job, spec, container = pod(documents(topology, slices)[1])
  hosts, chips = PODS[topology, slices]
  assert job["parallelism"] == job["completions"] == hosts
  (limit,) = container["resources"]["limits"].values()
  assert limit == chips
  assert group["replicas"] == (1 if topology[0] == "h" else slices)
  labels = spec["nodeSelector"]
  assert labels.get("cloud.google.com/gke-tpu-topology") in (
    None,
    topology.partition(":")[2],
  )


@pytest.mark.parametrize(
  ("topology", "slices", "message"),
  [
    ("v5e:4x4x4", 1, "expected a slice of TPUs"),
    ("v5p:4x4", 1, "expected a slice of TPUs"),
    ("v9:4x4", 1, "expected a slice of TPUs"),
    ("v5e", 1, "expected a slice of TPUs"),
    ("h100:", 1, "expected a slice of TPUs"),
    ("v5e:3x3", 1, "found 9 chips, expected a multiple of 4"),
    ("v5e:2x2", 2, "a slice of one host"),
  ],
)
def test_topologies_that_are_none(topology, slices, message):
  with pytest.raises(UserError, match=message):
    jobset.hardware(topology, slices)


def test_where_files_are():
  configs, jobs = documents()
  (unit,) = make_launchers.planned(pathlib.Path("/runs/a/units"))[:1]
  assert configs["data"] == {"unit.gin": unit.text}
  _, _, spec, container = pod(jobs)
  mounts = {m["name"]: m["mountPath"] for m in container["volumeMounts"]}
  assert mounts == {"config": "/etc/heptad", "volume0": "/runs"}
  claim = spec["volumes"][1]["persistentVolumeClaim"]["claimName"]
  assert spec["volumes"][0]["configMap"]["name"] == configs["metadata"]["name"]
  assert claim == "runs"
  assert container["command"][5:] == [
    *("-m", "experiments.train", "--config=/etc/heptad/unit.gin"),
    "--workdir=/runs/a/units/RANK=1",
    "--result=/runs/a/units/RANK=1.json",
  ]
  with pytest.raises(UserError, match="pods would not find /elsewhere"):
    documents(folder="/elsewhere")
  with pytest.raises(UserError, match="--volume=runs: expected CLAIM:/path"):
    documents(volumes=["runs"])


# JobSet's webhook wants RFC 1035 (`IsDNS1035Label`) of the names that it makes.
DNS = r"[a-z]([-a-z0-9]*[a-z0-9])?"
LABEL = r"[A-Za-z0-9]([-A-Za-z0-9_.]*[A-Za-z0-9])?"


@pytest.mark.parametrize(
  "sweep", ["Ä sweep_of " + 40 * "many ", "2026_ranks", "_", 21 * "ab-" + "c"]
)
def test_names_are_labels_of_dns(sweep):
  """Those of pods add the group, job, pod and 5 letters."""
  folder = pathlib.Path("/runs/a/units")
  name = jobset.jobset_name(sweep, folder / "RANK=1")
  assert re.fullmatch(DNS, name) and len(name) <= 40
  assert name != jobset.jobset_name(sweep, folder / "RANK=2")
  # Nor has the same unit of a sweep in another directory this one's name.
  other = pathlib.Path("/runs/b/units") / "RANK=1"
  assert name != jobset.jobset_name(sweep, other)
  unit, *_ = make_launchers.planned(pathlib.Path("/runs/a/units"))
  on = jobset.hardware("v5e:4x4")
  text = jobset.manifest(
    [unit], sweep=sweep, image="heptad", on=on, volumes=["runs:/runs"]
  )
  for document in yaml.safe_load_all(text):
    (label,) = document["metadata"]["labels"].values()
    assert re.fullmatch(LABEL, label) and len(label) <= 63


SWEEP = """
from __gin__ import dynamic_registration
from experiments import sweeps
sweeps.Sweep.config = 'runs/quickstart.gin'
sweeps.Sweep.over = {'RANK': [1, 8]}
"""


def test_the_command(tmp_path, capsys):
  file = tmp_path / "mine.gin"
  file.write_text(SWEEP)
  out = tmp_path / "out"
  given = [f"--sweep={file}", f"--workdir={out}", "--launcher=jobset"]
  more = ["--topology=v5p:2x2x2", "--image=a", f"--volume=runs:{tmp_path}"]
  assert cli.call(sweep.main, ["sweep", *given, *more[:1]]) == 1
  assert "--image: is missing" in capsys.readouterr().err
  assert cli.call(sweep.main, ["sweep", *given, *more]) == 0
  found = list(yaml.safe_load_all((out / "jobset.yaml").read_text()))
  assert [x["kind"] for x in found] == ["ConfigMap", "JobSet"] * 2
  for rank, document in zip((1, 8), found[::2], strict=True):
    text = document["data"]["unit.gin"]
    assert f"\nRANK = {rank}\n" in text and config.parse(text).text == text


STALE = {
  "MEGASCALE_NUM_SLICES": "9",
  "MEGASCALE_SLICE_ID": "7",
  "MEGASCALE_COORDINATOR_ADDRESS": "old:8080",
  "MEGASCALE_PORT": "1",
}


def started(container, slice_number, host):
  """Returns the environment of a pod's command, after variables of before."""
  shell, option, start, *_ = container["command"]
  given = {e["name"]: e["value"] for e in container["env"] if "value" in e}
  done = subprocess.run(
    [shell, option, start, "unit", "env"],
    env={
      "PATH": os.environ["PATH"],
      **STALE,
      **given,
      "SLICE": str(slice_number),
      "JOB_COMPLETION_INDEX": str(host),
    },
    capture_output=True,
    text=True,
    check=True,
  )
  return dict(x.split("=", 1) for x in done.stdout.splitlines())


def test_processes_of_slices_are_numbered():
  """As jax's own detection numbers them: slice by slice."""
  _, jobs = documents("v6e:2x4", 2)
  container = pod(jobs)[3]
  name = jobs["metadata"]["name"]
  assert [x["name"] for x in container["env"] if "valueFrom" in x] == ["SLICE"]
  for number, (slice_number, host) in enumerate(
    [(0, 0), (0, 1), (1, 0), (1, 1)]
  ):
    found = started(container, slice_number, host)
    assert found["JAX_PROCESS_ID"] == str(number)
    assert found["JAX_NUM_PROCESSES"] == "4"
    first = f"{name}-slice-0-0.{name}"
    assert found["JAX_COORDINATOR_ADDRESS"] == f"{first}:8476"
    slices = {k: v for k, v in found.items() if k.startswith("MEGASCALE")}
    assert slices == {
      "MEGASCALE_NUM_SLICES": "2",
      "MEGASCALE_SLICE_ID": str(slice_number),
      "MEGASCALE_COORDINATOR_ADDRESS": f"{first}:8081",
      "MEGASCALE_PORT": "8081",
    }


@pytest.mark.parametrize("topology", ["v5e:4x4", "h100:8"])
def test_one_slice_has_none_of_several(topology):
  found = started(pod(documents(topology)[1])[3], 0, 3)
  assert not [name for name in found if name.startswith("MEGASCALE")]
  assert found["JAX_PROCESS_ID"] == "3"


def _strict(schema):
  """Returns a CRD's schema that refuses fields which it does not have.

  The server drops them without a word.
  """
  if isinstance(schema, list):
    return [_strict(x) for x in schema]
  if not isinstance(schema, dict):
    return schema
  found = {k: _strict(v) for k, v in schema.items()}
  properties = schema.get("properties")
  if isinstance(properties, dict) and "type" in schema:
    found.setdefault("additionalProperties", False)
  return found


@pytest.fixture(scope="module")
def validator():
  jsonschema = pytest.importorskip("jsonschema")
  if not CRD.is_file():
    pytest.skip(f"no {CRD.name}: set HEPTAD_JOBSET_CRD to JobSet's CRD")
  loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
  with CRD.open(encoding="utf-8") as file:
    crd = yaml.load(file, loader)
  (version,) = [v for v in crd["spec"]["versions"] if v["name"] == "v1alpha2"]
  schema = _strict(version["schema"]["openAPIV3Schema"])
  return jsonschema.Draft202012Validator(schema)


def test_the_schema_of_kubernetes_takes_them(validator):
  for topology, slices in PODS:
    _, found = documents(topology, slices)
    errors = [
      f"{'/'.join(map(str, e.absolute_path))}: {e.message[:200]}"
      for e in validator.iter_errors(found)
    ]
    assert errors == [], (topology, slices)


def test_the_schema_can_refuse(validator):
  for where, key, value in [
    (lambda x: x["spec"], "failurePolicies", {}),
    (lambda x: x["spec"]["failurePolicy"], "restartStrategy", "Now"),
    (lambda x: pod(x)[1], "parallelism", "4"),
    (lambda x: pod(x)[2], "restartPolicys", "Never"),
    (lambda x: pod(x)[3], "image", 3),
  ]:
    _, found = documents()
    where(found)[key] = value
    assert not validator.is_valid(found), key
