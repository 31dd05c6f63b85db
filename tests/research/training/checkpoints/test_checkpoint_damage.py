"""Damaged checkpoints: detected, reported, moved aside, and skipped."""

import dataclasses
import json
import random
import shutil

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.data import pipeline
from research.optim import optim
from research.training import state
from research.training.checkpoints import checksums
from research.training.checkpoints.checkpoint import Checkpoints
from research.typing import UserError

TX = optim.adamw(1e-3)

# Orbax leaves coroutines behind when it fails.
pytestmark = pytest.mark.filterwarnings(
  "ignore::pytest.PytestUnraisableExceptionWarning"
)


@dataclasses.dataclass(frozen=True)
class Sentences:
  def __len__(self):
    return 20

  def __getitem__(self, index):
    return "abc" * (index + 1)


class Letters:
  def encode(self, text):
    return [ord(c) for c in text]


DATA = pipeline.Pipeline(source=Sentences(), length=16, batch_size=4, seed=1)


def batches():
  return iter(DATA.training(Letters()))


def at(step):
  rng = np.random.default_rng(step)
  params = {
    "a": jnp.ones((4, 4)),
    "b": jnp.asarray(rng.normal(size=3000), jnp.float32),
  }
  return dataclasses.replace(
    state.create(params, ".", TX), step=jnp.int32(step)
  )


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
  """Steps 3 and 4, one batch apart."""
  folder = tmp_path_factory.mktemp("saved")
  data = batches()
  next(data)
  with Checkpoints(folder) as checkpoints:
    for step in (3, 4):
      next(data)
      checkpoints.save(at(step), data, {"validation/loss": 1 / step})
  return folder


FILES = (
  *("_CHECKPOINT_METADATA", "commit_success.txt", "files.json"),
  *("data/commit_success.txt", "data/place.json"),
  *("metrics/commit_success.txt", "metrics/metrics"),
  *("state/_METADATA", "state/_sharding", "state/commit_success.txt"),
  *("state/array_metadatas/process_0", "state/manifest.ocdbt"),
  *("state/d/*", "state/ocdbt.process_0/d/*"),
  "state/ocdbt.process_0/manifest.ocdbt",
)


def test_the_files_are_all_that_there_are(saved):
  """A file that Orbax writes in another version must be damaged, too."""
  step = saved / "4"
  found = {p for p in step.rglob("*") if p.is_file()}
  assert found == {path for name in FILES for path in step.glob(name)}


def remove(path):
  path.unlink()


def truncate(path):
  path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip(path):
  data = bytearray(path.read_bytes())
  # A file in `d` has another name each time, and would have another bit: few
  # are in no array.
  fixed = "d" if path.parent.name == "d" else path.name
  bit = random.Random(fixed).randrange(8 * len(data))
  data[bit // 8] ^= 1 << (bit % 8)
  path.write_bytes(data)


def restored(folder):
  """Returns (step, next data position) after checking the state."""
  data = batches()
  with Checkpoints(folder, sweep=True) as checkpoints:
    found, step = checkpoints.restore_latest(at(0), data)
  chex.assert_trees_all_equal(found, at(step))
  return step, data.get_state()["next_index"]


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", [remove, truncate, flip])
@pytest.mark.cover(1)
@pytest.mark.sample(4)
def test_any_damaged_file_is_seen(saved, tmp_path, capsys, damage, name):
  folder = tmp_path / "checkpoints"
  shutil.copytree(saved, folder)
  (path,) = (folder / "4").glob(name)
  damage(path)
  if (damage, name) == (remove, "files.json"):
    assert restored(folder) == (4, 3)  # the sums are enough
    return
  assert restored(folder) == (3, 2)
  said = capsys.readouterr().err
  assert f"{folder}/4: damaged checkpoint, not used: " in said
  if name != "files.json":  # a wrong list finds others wrong
    assert str(path.relative_to(folder / "4")) in said
  assert sorted(p.name for p in folder.iterdir()) == ["3", "4.damaged"]
  # The next start knows nothing of it, and step 4 can be saved again.
  assert restored(folder) == (3, 2)
  assert capsys.readouterr().err == ""
  with Checkpoints(folder, sweep=True) as checkpoints:
    checkpoints.save(at(4))
    assert checkpoints.steps == [3, 4]


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", [remove, truncate, flip])
@pytest.mark.cover(1)
@pytest.mark.sample(4)
def test_without_the_list_nothing_wrong_is_used(saved, tmp_path, damage, name):
  """As after a crash before the list is written: checksums must suffice."""
  folder = tmp_path / "checkpoints"
  shutil.copytree(saved, folder)
  (path,) = (folder / "4").glob(name)
  (folder / "4" / "files.json").unlink()
  if path.exists():
    damage(path)
  assert restored(folder) in [(3, 2), (4, 3)]  # and bitwise what was saved
  arrays = ("state/ocdbt.process_0/d/*", "state/_METADATA", "data/place.json")
  if name in arrays:
    assert (folder / "4.damaged").exists()


@pytest.mark.parametrize("part", ["", "state", "data", "metrics"])
def test_an_emptied_directory(saved, tmp_path, part):
  folder = tmp_path / "checkpoints"
  shutil.copytree(saved, folder)
  shutil.rmtree(folder / "4" / part)
  (folder / "4" / part).mkdir()
  assert restored(folder) == (3, 2)


@pytest.mark.slow
def test_many_flipped_bits_of_the_arrays(saved, tmp_path, capsys):
  """Orbax's files have no checksum of their own: it restores wrong numbers."""
  (path,) = (saved / "4").glob("state/ocdbt.process_0/d/*")
  data, r = path.read_bytes(), random.Random(0)
  seen = 0
  for i in range(12):
    folder = tmp_path / str(i)
    shutil.copytree(saved, folder)
    (folder / "4" / "files.json").unlink()
    wrong = bytearray(data)
    bit = r.randrange(8 * len(data))
    wrong[bit // 8] ^= 1 << (bit % 8)
    (folder / "4" / path.relative_to(saved / "4")).write_bytes(wrong)
    step, _ = restored(folder)
    seen += step == 3
  assert seen >= 10
  assert (
    "state: trainable/b differs from its checksum" in capsys.readouterr().err
  )


def test_only_damaged_ones_are_no_fresh_start(saved, tmp_path):
  folder = tmp_path / "checkpoints"
  shutil.copytree(saved, folder)
  for step in ("3", "4"):
    remove(folder / step / "state" / "_METADATA")
  for _ in range(2):  # they are aside the second time
    with (
      Checkpoints(folder, sweep=True) as checkpoints,
      pytest.raises(UserError, match="all of its 2 checkpoints are damaged"),
    ):
      checkpoints.restore_latest(at(0))
  with Checkpoints(tmp_path / "none") as checkpoints:
    start = at(0)
    found, step = checkpoints.restore_latest(start)
    assert found is start and step is None


def test_another_structure_is_not_damage(saved, tmp_path):
  """The user's configuration differs: nothing is skipped."""
  folder = tmp_path / "checkpoints"
  shutil.copytree(saved, folder)
  other = state.create({"a": jnp.ones((4, 5)), "b": jnp.ones(3000)}, ".", TX)
  with (
    Checkpoints(folder, sweep=True) as checkpoints,
    pytest.raises(UserError, match="does not fit this model or optimizer"),
  ):
    checkpoints.restore_latest(other)
  assert sorted(p.name for p in folder.iterdir()) == ["3", "4"]


def test_who_only_reads_moves_nothing(saved, tmp_path, capsys):
  folder = tmp_path / "checkpoints"
  shutil.copytree(saved, folder)
  flip(folder / "4" / "data" / "place.json")
  with Checkpoints(folder) as checkpoints:
    with pytest.raises(
      UserError, match=r"damaged: data/place.json.*\nUse.*found \[3\]"
    ):
      checkpoints.restore(at(0), step=4)
    assert checkpoints.restore_latest(at(0))[1] == 3
    assert checkpoints.steps == [3, 4]
  assert "damaged checkpoint, not used" in capsys.readouterr().err
  (folder / "4" / "metrics" / "metrics").write_text("{")
  with pytest.raises(UserError, match="is damaged, expected a metric"):
    Checkpoints(folder)


def test_checkpoints_of_before_there_were_sums(saved, tmp_path, capsys):
  """As the first version wrote them: Grain's own file, no checksums."""
  folder = tmp_path / "checkpoints"
  shutil.copytree(saved, folder)
  step = folder / "4"
  (step / "files.json").unlink()
  (step / "data/place.json").rename(step / "data/process_0-of-1.json")
  note = json.loads((step / "_CHECKPOINT_METADATA").read_text())
  note["custom_metadata"] = {}
  (step / "_CHECKPOINT_METADATA").write_text(json.dumps(note))
  assert restored(folder) == (4, 3)
  said = capsys.readouterr().err
  assert said == f"warning: {step}: has no checksums, so it was not verified\n"


def test_a_machine_without_memory_is_no_damage(saved, monkeypatch):
  """Errors unrelated to the checkpoint must not move it aside."""

  def fail(*_):
    raise MemoryError

  with Checkpoints(saved) as checkpoints:
    monkeypatch.setattr(checksums, "damaged_file", fail)
    with pytest.raises(MemoryError):
      checkpoints.restore_latest(at(0))
  assert jax.process_count() == 1
