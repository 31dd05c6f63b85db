"""Models in other programs' files: read, converted and written.

load          any model by name, what `--model=` takes; `loaded` what it is
sources       the same, opened but unread; `parts` their parameters one by one
convert       a source into any format
adapters      adapters of either format by name
rewards       reward models: a language model with a new head, or one from files
native        our own checkpoint of a model

hf gguf peft  a format each. `config` has the fields of its configuration, both
              ways, `names` the names of its tensors, `read` and `write` its
              files; a new family of Hugging Face's is a row of `hf.families`, a
              new one of llama.cpp's of `gguf.architectures`
quantized     Hugging Face directories that other tools have quantized
diffusion     what a checkpoint says of its mask; models made to fill in masks
lm_eval       models as lm-evaluation-harness asks them
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
  __name__,
  submod_attrs={
    "load": ["load_model"],
    "loaded": ["Loaded"],
  },
)
