"""Vision language models: from pixels to tokens that a language model reads.

`images/` makes of an image file what an encoder takes, without JAX; `encoders/`
and `connectors/` make soft tokens of that, which `splice` puts in the place of
a prompt's placeholders, or to which layers of the language model attend
(`cross_attention`). `contrastive/` trains encoders, `scenes/` draws questions
with known answers, `evaluation/` scores answers.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
  __name__,
  submod_attrs={
    "answering": ["Answerer", "Answers"],
    "arithmetic": ["describe_cost", "image_cost"],
    "buckets": ["Bucket", "BucketedQuestions"],
    "cached": ["CachedFeatures"],
    "cross_attention": ["LatestImage", "interleave"],
    "data": ["ImageQuestions", "Template"],
    "model": ["VisionLanguageModel"],
    "objective": ["WithImages"],
    "presets": ["PRESETS", "Preset", "preset"],
    "records": ["ImageRecords"],
    "image_conditioned": ["ImageConditioned"],
    "splice": ["Splice", "SplicedEmbedding", "with_features"],
    "within": ["Within"],
  },
)
