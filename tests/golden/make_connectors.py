"""Writes what transformers' own connectors compute, with weights drawn by name.

  .venv-peers/bin/python tests/golden/make_connectors.py [NAME ...]

For each a folder in tests/golden/connectors with tensors.json (name -> shape;
the values are drawn by name, see vlm_weights.py) and golden.npz. All is
computed in fp64 and rounded; what the arrays are is said where they are made.
"""

import argparse
import json
import pathlib
import sys

import numpy as np
import torch
import transformers
from transformers.models.bert import modeling_bert
from transformers.models.idefics import modeling_idefics, perceiver
from transformers.models.molmo2 import modeling_molmo2
from transformers.models.qwen2_vl import modeling_qwen2_vl

sys.path.insert(0, str(pathlib.Path(__file__).parent))
import make_models  # noqa: E402
import vlm_weights  # noqa: E402

FOLDER = pathlib.Path(__file__).parent / "connectors"
VOCAB = 31
QUERIES = 5

QFORMER = dict(
  vocab_size=VOCAB,
  hidden_size=24,
  num_hidden_layers=4,
  num_attention_heads=3,
  intermediate_size=28,
  max_position_embeddings=9,
)
BLIP2 = dict(
  vision_config=dict(
    hidden_size=20,
    intermediate_size=28,
    num_hidden_layers=1,
    num_attention_heads=2,
    image_size=16,
    patch_size=8,
  ),
  text_config=dict(
    model_type="llama",
    vocab_size=67,
    hidden_size=40,
    intermediate_size=44,
    num_hidden_layers=1,
    num_attention_heads=5,
  ),
  num_query_tokens=QUERIES,
  image_text_hidden_size=16,
)


def drawn(module, prefix: str = ""):
  """Returns the module in fp64 with drawn weights, and their shapes."""
  shapes = {}
  for name, x in module.state_dict().items():
    if not x.dtype.is_floating_point:
      continue
    shapes[name] = list(x.shape)
    x.copy_(torch.from_numpy(vlm_weights.draw(prefix + name, tuple(x.shape))))
  return module.double().eval(), shapes


def values(*shape: int, seed: int = 3) -> torch.Tensor:
  """Returns random activations that fp32 represents."""
  drawn = np.random.default_rng(seed).normal(size=shape)
  return torch.from_numpy(drawn.astype(np.float32)).double()


def _blip2(kind, texts: bool):
  config = transformers.Blip2Config(
    qformer_config=QFORMER | dict(use_qformer_text_input=texts), **BLIP2
  )
  config._attn_implementation = "eager"
  model, shapes = drawn(kind(config))
  return model, shapes, config.to_dict()


def qformer():
  """BLIP-2's connector.

  features [3, N, C] of the encoder, soft [3, Q, D] in the language model.
  """
  model, shapes, _ = _blip2(transformers.Blip2ForConditionalGeneration, False)
  pixels = values(3, 3, 16, 16)
  features = model.vision_model(pixels).last_hidden_state
  soft = model.get_image_features(pixels).pooler_output
  ours = ("query_tokens", "qformer.", "language_projection.")
  shapes = {k: v for k, v in shapes.items() if k.startswith(ours)}
  return shapes, dict(features=features, soft=soft)


def _captions(model, features, tokens, mask):
  """Returns the logits of a causal text that sees all queries, and shapes.

  The mask is written out; the head is BERT's, over the word embeddings.
  """
  rows, length = tokens.shape
  total = QUERIES + length
  seen = torch.zeros(rows, total, total, dtype=torch.bool)
  seen[:, :, :QUERIES] = True
  seen[:, QUERIES:, QUERIES:] = torch.ones(length, length).tril().bool()
  seen[:, QUERIES:, QUERIES:] &= mask[:, None].bool()
  queries = model.query_tokens.expand(rows, -1, -1)
  hidden = model.qformer(
    query_embeds=model.embeddings(input_ids=tokens, query_embeds=queries),
    query_length=QUERIES,
    attention_mask=torch.where(seen, 0.0, -1e9).double()[:, None],
    encoder_hidden_states=features,
  ).last_hidden_state
  config = transformers.BertConfig(
    vocab_size=VOCAB,
    hidden_size=QFORMER["hidden_size"],
    hidden_act="gelu",
    layer_norm_eps=1e-12,
  )
  prefix = "cls.predictions."
  head, shapes = drawn(modeling_bert.BertLMPredictionHead(config), prefix)
  head.decoder.weight = model.embeddings.word_embeddings.weight
  head.decoder.bias = head.bias
  named = {prefix + k: v for k, v in shapes.items() if "decoder" not in k}
  return head(hidden[:, QUERIES:]), named


def qwen_merger():
  """Qwen2-VL's: x [1, 16, C] of a 4 x 4 grid row by row, soft [1, 4, D]."""
  module, shapes = drawn(modeling_qwen2_vl.PatchMerger(20, 12))
  x = values(4, 4, 12)
  squares = x.reshape(2, 2, 2, 2, 12).permute(0, 2, 1, 3, 4).reshape(16, 12)
  return shapes, dict(x=x.reshape(1, 16, 12), soft=module(squares)[None])


def molmo():
  """Molmo 2's adapter: x [2, 16, C] of 4 x 4 grids, soft [2, 4, D].

  Its pooling is Molmo's; squares are named by the indices of their patches.
  """
  config = transformers.models.molmo2.configuration_molmo2.Molmo2AdapterConfig(
    vision_feature_layer=[-2, -9],
    hidden_size=12,
    num_attention_heads=2,
    num_key_value_heads=2,
    head_dim=6,
    intermediate_size=18,
    text_hidden_size=20,
  )
  config._attn_implementation = "eager"
  module, shapes = drawn(modeling_molmo2.Molmo2Adapter(config))
  x = values(2, 16, 24)
  index = torch.arange(32).reshape(2, 2, 2, 2, 2).permute(0, 1, 3, 2, 4)
  soft = module(x, index.reshape(8, 4)).last_hidden_state
  return shapes, dict(x=x, soft=soft.reshape(2, 4, 20))


IDEFICS = dict(
  hidden_size=24,
  intermediate_size=28,
  num_attention_heads=3,
  num_hidden_layers=1,
  rms_norm_eps=1e-5,
  qk_layer_norms=False,
  alpha_type="float",
  alpha_initializer="zeros",
  vision_config=dict(embed_dim=20),
  perceiver_config=dict(qk_layer_norms_perceiver=False),
)


def resampler():
  """Idefics' perceiver resampler, with ReLU: x [2, 7, C], soft [2, 3, C]."""
  module, shapes = drawn(
    perceiver.IdeficsPerceiverResampler(
      transformers.IdeficsConfig(**IDEFICS), 20, 2, 3, 5, 3
    )
  )
  x = values(2, 7, 20)
  return shapes, dict(x=x, soft=module(x))


def gated():
  """Idefics' gated layer: x [2, 8, D], media [2, 6, C] of images of 3 latents.

  images [2, 8] says which image a token sees, -1 for none; y [2, 8, D].
  """
  config = transformers.IdeficsConfig(**IDEFICS)
  config._attn_implementation = "eager"
  module, shapes = drawn(
    modeling_idefics.IdeficsGatedCrossAttentionLayer(config, 0)
  )
  x, media = values(2, 8, 24), values(2, 6, 20, seed=4)
  images = torch.tensor(
    [[-1, -1, 0, 0, 0, 1, 1, 1], [0, 0, 0, 0, -1, -1, 1, 1]]
  )
  seen = images[:, :, None] == torch.arange(6) // 3
  y = module(
    x,
    image_hidden_states=media,
    image_attention_mask=torch.where(seen, 0.0, -1e9).double()[:, None],
    cross_attention_gate=(images >= 0).double(),
  )
  return shapes, dict(x=x, media=media, images=images, y=y)


MAKERS = {
  f.__name__: f for f in (qformer, qwen_merger, molmo, resampler, gated)
}


def main() -> None:
  parser = argparse.ArgumentParser()
  parser.add_argument("names", nargs="*", default=list(MAKERS))
  for name in parser.parse_args().names or MAKERS:
    with torch.no_grad(), make_models.float64():
      shapes, arrays = MAKERS[name]()
    to = FOLDER / name
    to.mkdir(parents=True, exist_ok=True)
    text = json.dumps(dict(sorted(shapes.items())), indent=0)
    (to / "tensors.json").write_text(text + "\n")
    arrays = {k: np.asarray(v) for k, v in arrays.items()}
    for k, v in arrays.items():
      kind = np.float32 if v.dtype.kind == "f" else np.int32
      arrays[k] = v.astype(kind)
      print(name, k, v.shape, float(np.abs(v).max()))
    np.savez_compressed(to / "golden.npz", **arrays)


if __name__ == "__main__":
  main()
