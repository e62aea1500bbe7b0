"""Bulk jobs: a file of rows in, a file of records out, whatever the engine and the sampler.

    IN ---- source.Row ----> texts.Requests  (rows are requests; an engine decodes them together)  ----> results.Results
                       \\---> outputs.Outputs (rows are calls of `generate`: images, endpoints)     --/

A row is known by its id, and so is its seed: what a row gets depends neither on its place in the file, nor on the rows
beside it, nor on where a run stopped (but for rounding: a network's numbers differ in their last digits with the shape
of the batch, which now and then changes a token).
"""

from steer.bulk.job import Summary, run_job
from steer.bulk.outputs import Outputs
from steer.bulk.texts import Requests

__all__ = ["Outputs", "Requests", "Summary", "run_job"]
