"""Evaluation: scores of frozen features."""

from self_supervised.evaluation.validation import knn as knn
from self_supervised.evaluation.validation import linear_probe as linear_probe
from self_supervised.evaluation.validation import rank_me as rank_me
