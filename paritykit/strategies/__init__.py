"""Hypothesis strategies for parity: workloads around what breaks engines, ways to run them, and models to run.

::

    from paritykit.strategies import conditions, models, workloads

    @given(workload=workloads(block_size=16))
    def test_batching(parity, workload):
        parity.hold("batching", workload)

What they draw is small when shrunk: one request or two, the shortest texts that still show the difference, a family's
own defaults but for what it takes; and named so that ``paritykit run`` takes it.
"""

from paritykit.sized import case_name
from paritykit.strategies.conditions import conditions
from paritykit.strategies.models import models
from paritykit.strategies.workloads import edges, lengths, workloads

__all__ = ["case_name", "conditions", "edges", "lengths", "models", "workloads"]
