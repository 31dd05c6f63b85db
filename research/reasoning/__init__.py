"""Problems with real verifiers: what search and reward models are judged by.

`tasks/` has the problems, one kind a file. `extraction` finds the answer in a
text, `grading` compares it, `isolation` bounds what a verifier may take, and
`segmentation` splits a solution into steps. Pure Python: nothing imports JAX.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
  __name__,
  submod_attrs={
    "grading": ["ExactMatch", "Grader", "Ladder", "MathVerify", "judge"],
    "isolation": ["Guarded", "Isolated"],
    "problem": [
      "Problem",
      "StepVerdict",
      "StepVerifier",
      "Verdict",
      "Verifier",
      "first_error",
    ],
    "prompting": ["Prompting", "PromptWithArrays", "arrays_of", "as_text"],
    "rates": ["Rates", "measure"],
    "sample_logs": ["SampleLog", "read_samples", "write_samples"],
    "segmentation": ["SEGMENTERS", "Segmenter", "steps_of"],
    "trace": ["Finish", "MonteCarlo", "Sampler", "Step", "Trace"],
  },
)
