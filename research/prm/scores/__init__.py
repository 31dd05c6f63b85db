"""Scores of steps: aggregated over a trace, calibrated, evaluated."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
  __name__,
  submod_attrs={
    "aggregate": [
      "AGGREGATES",
      "Aggregate",
      "Geometric",
      "Last",
      "LastMean",
      "Max",
      "Mean",
      "Min",
      "Product",
      "check_final_selection",
      "default_aggregate",
    ],
    "biases": ["diversity", "length_bias", "segmentation_sensitivity"],
    "calibration": [
      "Isotonic",
      "Temperature",
      "auc",
      "auc_by",
      "auc_error",
      "brier",
      "by_index",
      "by_steps_to_go",
      "expected_calibration_error",
      "fit_isotonic",
      "fit_temperature",
    ],
    "every_error": ["StepCounts", "StepScores", "prmbench", "similarity"],
    "first_errors": [
      "FirstErrorScores",
      "first_error",
      "majority_index",
      "mean_f1",
      "processbench",
      "processbench_of_chance",
    ],
    "ranking": [
      "best_of_n",
      "min_at_last",
      "rank_correlation",
      "wrong_process_detection",
    ],
    "report": ["StepReport", "evaluate_steps"],
    "robustness": ["AttackReport", "attack_report"],
  },
)
