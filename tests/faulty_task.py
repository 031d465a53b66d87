"""For an executor: its processes import this file and little else."""

import json

from dataset_builder.cluster import BuildTask


class Faulty(BuildTask):
    """A step whose second task raises what no one had thought of."""

    def __call__(self, data, rank, world_size):
        if rank == 1 and self.base_url == "overflow":
            int(float("inf"))
        if rank == 1 and self.base_url == "recursion":
            json.loads("[" * 100_000)
        return data
