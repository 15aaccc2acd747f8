"""Zero-shot scores of Meta's OPT models as EleutherAI published them with lm-eval, to compare a run with.

Source: https://github.com/EleutherAI/lm-evaluation-harness, `results/opt/opt-SIZE/README.md` and the JSON files there
(num_fewshot 0, no limit). The tasks had version 0 then and may have changed since; OPT-175B is not among them.
"""

from __future__ import annotations

SOURCE = "https://github.com/EleutherAI/lm-evaluation-harness, results/opt/*/README.md"
SIZES = ("125m", "350m", "1.3b", "2.7b", "6.7b", "13b", "30b", "66b")

# (task, metric) -> the score of each size: accuracies in percent, perplexities as they are.
# fmt: off
SCORES: dict[tuple[str, str], tuple[float, ...]] = {
    #                                   125m   350m   1.3b   2.7b   6.7b    13b    30b    66b
    ("lambada_openai", "perplexity"): (26.02, 16.40,  6.64,  5.12,  4.25,  4.04,  3.63,  3.29),
    ("lambada_openai", "acc"):        (37.90, 45.16, 57.93, 63.59, 67.71, 68.64, 71.45, 73.90),
    ("piqa", "acc"):                  (63.00, 64.36, 71.71, 73.88, 76.28, 75.95, 77.58, 78.78),
    ("piqa", "acc_norm"):             (62.02, 64.74, 72.47, 74.81, 76.44, 76.82, 78.13, 79.87),
    ("sciq", "acc"):                  (75.10, 74.80, 84.50, 85.80, 90.10, 90.80, 91.10, 92.60),
    ("sciq", "acc_norm"):             (66.90, 66.90, 76.50, 79.00, 85.20, 86.60, 88.20, 87.30),
    ("winogrande", "acc"):            (50.28, 52.33, 59.75, 61.01, 65.27, 65.19, 68.19, 68.75),
    ("logiqa", "acc"):                (22.73, 21.04, 22.27, 21.04, 23.50, 22.73, 21.66, 22.73),
    ("logiqa", "acc_norm"):           (27.96, 28.57, 27.19, 25.96, 28.73, 28.57, 28.42, 28.73),
}
# fmt: on


def is_percentage(metric: str) -> bool:
    """Whether a metric is an accuracy, which lm-eval itself now reports as a fraction of 1."""
    return metric.startswith("acc")
