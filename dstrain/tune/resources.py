"""What one trial takes, what there is to take, and the Ray cluster that gives it."""

from __future__ import annotations

import logging
import os
import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dstrain.search import Search
    from dstrain.settings import ResourceSettings


@dataclass(frozen=True)
class Needs:
    """What one trial takes: `ranks` bundles of this many CPUs and GPUs."""

    ranks: int
    cpus: float
    gpus: float
    together: bool = False
    """Whether all ranks must lie on one node."""

    @classmethod
    def of(cls, resources: ResourceSettings, gpu: bool) -> Needs:
        """A rank's share of the settings, with what they leave to the machine filled in."""
        ranks = resources.num_ranks
        gpus = float(gpu) if resources.gpus == "auto" else resources.gpus / ranks
        cpus = (4.0 if gpus else 1.0) if resources.cpus == "auto" else resources.cpus / ranks
        return cls(ranks, cpus, gpus, resources.nodes == "one")

    @property
    def bundle(self) -> dict[str, float]:
        """One rank's share, as Ray takes it."""
        return {"CPU": self.cpus, **({"GPU": self.gpus} if self.gpus else {})}

    def describe(self) -> str:
        """In words."""
        return f"each takes {self.ranks} rank(s) of {self.cpus:g} CPU(s)" + (
            f" and {self.gpus:g} GPU(s)" if self.gpus else ""
        )


@dataclass(frozen=True)
class Room:
    """What there is to take: (CPUs, GPUs) of every node."""

    nodes: tuple[tuple[float, float], ...]

    @classmethod
    def here(cls) -> Room:
        """This machine, or what its SLURM job was given of it."""
        import torch

        return cls(((float(len(os.sched_getaffinity(0))), float(torch.cuda.device_count())),))

    @classmethod
    def of_cluster(cls) -> Room:
        """The living nodes of the connected Ray cluster."""
        import ray

        there = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        return cls(tuple((node.get("CPU", 0.0), node.get("GPU", 0.0)) for node in there))

    def concurrent(self, needs: Needs, bound: int | None) -> int:
        """How many trials fit at once."""
        ranks = [self._ranks_on(node, needs) for node in self.nodes]
        fit = sum(one // needs.ranks for one in ranks) if needs.together else sum(ranks) // needs.ranks
        return min(fit, bound) if bound else fit

    def ranks_on_a_node(self, needs: Needs, bound: int) -> int:
        """How many ranks of at most `bound` trials may come to share a node."""
        most = max((self._ranks_on(node, needs) for node in self.nodes), default=0)
        return max(1, min(most, self.concurrent(needs, bound) * needs.ranks))

    @staticmethod
    def _ranks_on(node: tuple[float, float], needs: Needs) -> int:
        shares = [had / taken for had, taken in zip(node, (needs.cpus, needs.gpus), strict=True) if taken]
        return int(min(shares, default=1.0) + 1e-9)

    def check(self, needs: Needs, search: Search) -> None:
        """Raises UserError when not even one trial fits: Ray would wait for ever."""
        from dstrain.schema import UserError

        if self.concurrent(needs, None) < 1:
            where = " on one node" if needs.together else ""
            raise UserError(
                f"{search.document.source}: search.resources: {needs.describe()}{where}, and there are "
                f"{self.describe()}; ask for less, or start on more"
            )

    def describe(self) -> str:
        """In words."""
        cpus, gpus = (sum(amounts) for amounts in zip(*self.nodes, strict=True)) if self.nodes else (0.0, 0.0)
        nodes = f" on {len(self.nodes)} nodes" if len(self.nodes) > 1 else ""
        return f"{cpus:g} CPUs and {gpus:g} GPUs{nodes}"


class ray_cluster:
    """The cluster that RAY_ADDRESS names, or one of our own on this machine that ends with the search."""

    def __init__(self, room: Room) -> None:
        self._room = room

    def __enter__(self) -> None:
        # Trials write to their folders; Ray's own reports and usage statistics would only stand in the way.
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        os.environ["RAY_AIR_NEW_OUTPUT"] = "0"  # under the new one Tune has no use for callbacks like our Events
        os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
        os.environ.setdefault("TUNE_DISABLE_STRICT_METRIC_CHECKING", "1")
        os.environ.setdefault("TUNE_MAX_PENDING_TRIALS_PG", "1000")  # of 1: the agenda hands out no more than fit
        os.environ.setdefault("TUNE_PRINT_ALL_TRIAL_ERRORS", "0")
        logging.getLogger("ray.tune").setLevel(logging.CRITICAL)  # the desk says how each trial ended, in one line
        os.environ.setdefault("TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S", "0")
        os.environ.setdefault("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")  # three files a trial that nobody reads
        # Nothing reads Tune's own state back. It holds every trial that ever was and may take a twentieth of a core to write.
        os.environ.setdefault("TUNE_GLOBAL_CHECKPOINT_S", "inf")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import ray

            if "RAY_ADDRESS" in os.environ:
                ray.init(address=os.environ["RAY_ADDRESS"], log_to_driver=False, logging_level=logging.ERROR)
            else:
                ((cpus, gpus),) = self._room.nodes
                ray.init(
                    address="local", num_cpus=int(cpus), num_gpus=int(gpus), include_dashboard=False,
                    log_to_driver=False, logging_level=logging.ERROR, object_store_memory=100_000_000,
                )  # fmt: skip

    def __exit__(self, *error: object) -> None:
        import ray

        ray.shutdown()
