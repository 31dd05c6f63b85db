"""Metrics of published benchmarks, and reports that show their baselines."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
  __name__,
  submod_attrs={
    "answers": ["evalai_normalize", "vqa_normalize"],
    "grounding": [
      "box_iou",
      "box_score",
      "grounding_accuracy",
      "mask_iou",
      "parse_box",
    ],
    "parsers": [
      "Parser",
      "exact_choice",
      "first_choice",
      "llava_yes_no",
      "mme_yes_no",
    ],
    "protocol": ["AnswerFn", "evaluate", "shuffled_images"],
    "report": ["Margin", "Report", "Result"],
    "retrieval": ["classify", "recall_at", "zero_shot_weights"],
    "scores": [
      "Score",
      "anls",
      "exact_match",
      "relaxed_accuracy",
      "vqa_accuracy",
    ],
    "yes_no": ["MME", "YesNoScores", "mme_scores", "yes_no_scores"],
  },
)
