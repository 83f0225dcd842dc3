"""The safe points of a run of several processes: rank 0 writes and reads them, and all of them go by what it does.

So only rank 0 needs to see the output's disk. Layers that an earlier run had finished are sent to the others, and a
request to stop that any process has heard stops all of them after the same layer.
"""

from __future__ import annotations

from torch import nn

from llmprune.distributed import Team
from llmprune.job.stop import Stop
from llmprune.pipeline import FinishedLayer, Sink

__all__ = ["SharedSink"]


class SharedSink(Sink):
    """Rank 0's sink, as every process of a team sees it.

    Parameters
    ----------
    sink : rank 0's; what another process gives is not asked
    stop : what this process has heard
    """

    def __init__(self, team: Team, sink: Sink, stop: Stop | None) -> None:
        self.team, self.sink, self.stop = team, sink, stop

    def earlier(self, index: int) -> FinishedLayer | None:
        """What an earlier run made of this layer."""
        return self.team.decided(lambda: self.sink.earlier(index))

    def restore(self, index: int, layer: nn.Module) -> None:
        """Give the layer its final weights in every process."""
        self._agree()
        self.team.decided(lambda: self.sink.restore(index, layer))
        self.team.send(*(parameter.data for parameter in layer.parameters()))

    def finished(self, index: int, layer: nn.Module, done: FinishedLayer) -> None:
        """Let rank 0 take note of a layer; whatever it raises, all raise."""
        self._agree()
        self.team.decided(lambda: self.sink.finished(index, layer, done))

    def all_finished(self) -> None:
        """Every layer is final."""
        self.team.decided(self.sink.all_finished)

    def _agree(self) -> None:
        """Whether to stop here: if anyone was asked to."""
        heard = self.stop.code if self.stop is not None else None
        asked = -self.team.least(-(heard or 0))
        if asked and self.stop is not None:
            self.stop.code = asked
