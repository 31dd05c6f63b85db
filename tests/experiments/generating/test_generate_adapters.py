"""Several prompts, each with its adapter, from the command line."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from research import tree
from research.interop import load, peft, vision
from research.interop.gguf import adapter as gguf_adapter
from research.interop.loaded import Loaded
from research.interop.peft import names as peft_names
from research.lora import adapt
from research.lora.methods.dora import DoRA
from research.lora.methods.lora import LoRA
from tests import support_vlm
from tests.experiments import generated
from tests.experiments.generated import TINY


@pytest.fixture
def command(capsys):
  return generated.of_tiny(capsys)


@pytest.fixture(scope="module")
def places(tmp_path_factory):
  """Directories of adapters by name; `d` is one of DoRA."""
  root, base = tmp_path_factory.mktemp("adapters"), load.load_model(TINY)
  for seed, name in enumerate("abd"):
    method = DoRA(rank=2) if name == "d" else LoRA(rank=2 + seed)
    made = adapt.Adapt(method=method)(base.params, jax.random.key(seed))
    rng = np.random.default_rng(seed)

    def moved(path, x, rng=rng):
      if not path.endswith("trained/b"):
        return x
      return jnp.asarray(rng.standard_normal(x.shape), jnp.float32)

    made = tree.map_paths(moved, made)
    peft.save_adapter(root / name, made, base.model, str(TINY))
  return {name: f"--adapter={name}={root / name}" for name in "abd"}


def rows(done):
  status, lines, errors = done
  assert (status, errors) == (0, "")
  return json.loads(lines[-1])["rows"]


@pytest.mark.slow
def test_each_prompt_has_its_adapter(command, places):
  first, second = "--prompt=the cat", "--prompt=a dog ran"
  flags = places["a"], places["b"], "--adapter=a", "--adapter=__base__"
  got = rows(command(*flags, first, second, second, first))
  assert [row["adapter"] for row in got] == ["a", "b", "a", "__base__"]
  alone = [(places["a"],), (places["b"],), (places["a"],), ()]
  for row, adapter in zip(got, alone, strict=True):
    want = json.loads(command(*adapter, f"--prompt={row['prompt']}")[1][-1])
    for field in ("text", "tokens", "finish_reason", "prompt_tokens"):
      assert row[field] == want[field]
  texts = {row["text"] for row in got if row["prompt"] == "the cat"}
  assert len(texts) == 2


@pytest.mark.slow
def test_one_prompt_goes_to_all_and_one_adapter_to_all(command, places):
  got = rows(command(places["a"], places["b"], "--prompt=the cat"))
  assert [row["prompt"] for row in got] == ["the cat"] * 2
  assert got[0]["text"] != got[1]["text"]
  # One adapter alone may be of any method.
  got = rows(command(places["d"], "--prompt=a", "--prompt=the cat"))
  assert [row["adapter"] for row in got] == ["d", "d"]
  done = command("--prompt=a", "--prompt=the cat")
  assert [row["adapter"] for row in rows(done)] == [None, None]
  assert "--- prompt 2: the cat" in done[1]


@pytest.mark.parametrize(
  "flags, words",
  [
    (["--adapter=a"], "expected NAME=DIR"),
    (["a", "--adapter=a=."], "a is taken"),
    (["--adapter=__base__=."], "__base__ is taken"),
    (["a", "b", "--prompt=b", "--prompt=c"], "found 2 for 3 prompts"),
    (["a", "--adapter=x=nowhere"], "nowhere"),
    (["a", "b", "--image=."], "found 2, expected at most one with --image"),
  ],
  ids=str,
)
def test_errors(command, places, flags, words):
  flags = [places.get(flag, flag) for flag in flags]
  status, lines, errors = command("--prompt=a", *flags)
  assert (status, lines) == (1, [])
  assert errors.startswith("error: ") and words in errors
  assert len(errors.splitlines()) <= 3


@pytest.mark.slow
@pytest.mark.parametrize("others", [[], ["a"]], ids=["alone", "in a batch"])
@pytest.mark.sample(2)
def test_a_gguf_adapter_does_what_its_directory_does(
  others, command, places, tmp_path
):
  folder = places["b"].partition("=b=")[2]
  file, base = tmp_path / "b.gguf", load.load_model(TINY)
  params = peft.load_adapter(folder, base.params, base.model)
  gguf_adapter.save(file, params, base.model)
  rest = [places[name] for name in others]
  texts = []
  for place in (places["b"], f"--adapter=b={file}"):
    status, lines, errors = command("--prompt=def area", place, *rest)
    assert (status, errors) == (0, "")
    texts.append([r["text"] for r in json.loads(lines[-1]).get("rows", [])])
    texts[-1].append(json.loads(lines[-1]).get("text"))
  assert texts[0] == texts[1]


@pytest.mark.slow
@pytest.mark.parametrize("token", [60, support_vlm.IMAGE])
def test_an_adapter_of_the_embedding_leaves_images_as_they_are(
  token, tmp_path, capsys
):
  """As PEFT does, and `--model=`: they come in the place of embeddings."""
  base, folder, file = (tmp_path / x for x in ("base", "a", "image.png"))
  made = Loaded(
    dataclasses.replace(support_vlm.model(), image_token=token),
    support_vlm.params(),
    tokenizer=support_vlm.tokenizer(),
    source={},
    preprocessor=support_vlm.PREPROCESSOR,
  )
  vision.write_model(base, made, made.params)
  loaded = load.load_model(base)
  put = adapt.Adapt(method=LoRA(rank=2), targets=("embed",))
  params = tree.map_paths(
    lambda path, x: (
      jax.random.normal(jax.random.key(1), x.shape)
      if "/trained/" in path
      else x
    ),
    put(loaded.params, jax.random.key(0)),
  )
  naming = peft_names.naming_of_source(loaded.source)
  peft.save_adapter(folder, params, loaded.model, str(base), naming=naming)
  Image.fromarray(support_vlm.pixels(1, 1)[0, 0]).save(file)
  call, texts = generated.command(capsys), []
  for names in ([folder], [base, f"--adapter=a={folder}"]):
    flags = f"--image={file}", "--prompt=w5 w6", "--max_new_tokens=8"
    status, lines, errors = call(f"--model={names[0]}", *names[1:], *flags)
    assert status == 0, errors
    texts.append(json.loads(lines[-1])["text"])
  assert texts[0] == texts[1]
