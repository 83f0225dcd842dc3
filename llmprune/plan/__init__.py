"""`llmprune plan`: what a run would do, before it does anything. Configuration and headers are read, never a weight.

    source ──► sketch ──► planned weights ──► sizes ──┐
    (config,   (hollow model, zeros in one            ├──► forecast ──► show, JSON
     headers)   layer of each kind, survey)           │
                       └──► workload ──► memory, duration

source.py      configuration and headers, of a directory, a GGUF file or the Hub
sketch.py      the model without weights, surveyed as a run surveys it
sizes.py       zeros of every weight, bytes of the files, dense and packed
counting.py    what a computation takes, counted on a small instance of it
workload.py    forwards, statistics and solves of every layer
memory.py      the terms of a run's peak
speed.py       what this machine does in a second
duration.py    the terms of a run's time
gains.py       whether the result will be smaller or faster, and where
overview.py    all of it together
show.py        a plan on the screen
"""

from __future__ import annotations

from llmprune.plan.overview import Forecast, Request, forecast
from llmprune.plan.show import show_forecast

__all__ = ["Forecast", "Request", "forecast", "show_forecast"]
