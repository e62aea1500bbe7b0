"""Bulk jobs on a Ray cluster: a class for `Dataset.map_batches`, and the job over it."""

from steer.adapters.ray.answers import Answers
from steer.adapters.ray.job import Cluster, run_on_ray

__all__ = ["Answers", "Cluster", "run_on_ray"]
