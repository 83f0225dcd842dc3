"""The pruning loop: survey, then layer by layer and group by group, and nothing else."""

from llmprune.pipeline.loop import Pruned, Watcher, prune_layers
from llmprune.pipeline.sink import FinishedLayer, Sink
from llmprune.pipeline.survey import Survey, survey_model

__all__ = ["FinishedLayer", "Pruned", "Sink", "Survey", "Watcher", "prune_layers", "survey_model"]
