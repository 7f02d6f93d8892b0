"""Coordinates the processes of one run, on all GPUs of a machine or on several machines.

`accelerate launch`, `torchrun`, `mpirun` or `srun` starts the processes, and accelerate connects
them. Each rank decodes its share of the (example, sample) pairs with all methods, into its own
shard beside the output. Rank 0 merges the shards. A rank waits by asking rank 0's store again and
again, because a collective call would give up after half an hour.
"""

from __future__ import annotations

import os
import re
import time
import warnings
from collections.abc import Callable, Mapping
from functools import cache

from specsampling.checking import ConfigError

POLL_SECONDS = 0.2
TASKS = re.compile(r"(\d+)(?:\(x(\d+)\))?")


class RanksError(RuntimeError):
    """A failure of the ranks to reach each other, in one line."""


class Ranks:
    """This process's place among all processes of the run.

    Its rank `index` is below `count`, the number of processes. `local_index` and `local_count` are
    the same for this machine's processes only.
    """

    @classmethod
    @cache
    def of_launch(cls, variables: tuple[str, str]) -> Ranks:
        """Return one object for the whole process, because the ranks number their meetings.

        The variables come from `edge.launched_by`. A RanksError says why the ranks cannot meet.
        """
        return cls(*variables)

    def __init__(self, index: str, size: str) -> None:
        """Meet the other processes; call `Ranks.of_launch` instead."""
        import torch
        from accelerate import PartialState
        from torch.distributed import PrefixStore, distributed_c10d

        try:
            number, count = (int(os.environ[name]) for name in (index, size))
            if number >= count:
                raise ValueError(f"{index} must be below {size}, which is {count}, and is {number}")
            if not os.environ.get("MASTER_ADDR"):
                raise ValueError("MASTER_ADDR is not set")
            if index == "SLURM_PROCID":
                os.environ.update(_translated(os.environ))
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # it warns about threads, which `run.threads` sets
                self._state = PartialState(cpu=not torch.cuda.is_available(), backend="gloo")
            store = distributed_c10d._get_default_store()
        except (OSError, OverflowError, RuntimeError, TypeError, ValueError) as error:
            why = (str(error) or type(error).__name__).splitlines()[0].rstrip(".")
            raise RanksError(
                f"{index} and {size} say that this is one of several processes, and it cannot meet "
                f"the others ({why}); start all of them with torchrun or accelerate launch, set "
                "MASTER_ADDR and MASTER_PORT to rank 0's machine and a free port there, or unset "
                f"{index} and {size} to run alone"
            ) from error
        self.index: int = self._state.process_index
        self.count: int = self._state.num_processes
        self.local_index: int = self._state.local_process_index
        self.local_count = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        self._store = PrefixStore("specsampling", store)
        self._num_meetings = 0

    def device(self, device: str) -> str:
        """Return the rank's own device for the configured one; refuse one that all would share."""
        import torch

        if device.startswith(("cuda:", "auto-split")):
            raise ConfigError(
                f"models.device must be auto, cuda or cpu for several processes (got {device}); "
                "each takes a GPU of its own"
            )
        if device == "cuda" or (device == "auto" and torch.cuda.is_available()):
            return f"cuda:{self.local_index}"
        return device

    def _add(self, name: str, amount: int) -> int:
        """Add to a number that rank 0 keeps, and return the sum."""
        try:
            return self._store.add(name, amount)
        except RuntimeError as error:  # torch's DistError is one
            raise RanksError(
                "rank 0 has ended; finished rows are kept, and the same command goes on"
            ) from error

    def count_rows(self, num_more: int = 0) -> int:
        """Add finished rows to the count of all ranks since they last met, and return the count."""
        return self._add(f"rows {self._num_meetings}", num_more)

    def meet(self, meanwhile: Callable[[], None] = lambda: None) -> None:
        """Wait without a time limit until every rank waits; call `meanwhile` again and again."""
        name = f"meeting {self._num_meetings}"
        num_here = self._add(name, 1)
        while num_here < self.count:
            meanwhile()
            time.sleep(POLL_SECONDS)
            num_here = self._add(name, 0)
        meanwhile()
        self._num_meetings += 1

    def gather(self, values: list) -> list:
        """Return all ranks' values on every rank, rank 0's first."""
        from accelerate.utils import gather_object

        self.meet()
        return gather_object(values)


def _translated(slurm: Mapping[str, str]) -> dict[str, str]:
    """Translate the variables of an `srun` to those that torch and accelerate read."""
    per_node = TASKS.findall(slurm.get("SLURM_STEP_TASKS_PER_NODE", ""))  # as in "2(x3),1"
    tasks = [number for number, times in per_node for _ in range(int(times or 1))]
    node = int(slurm.get("SLURM_NODEID", "0"))
    return {
        "RANK": slurm["SLURM_PROCID"],
        "WORLD_SIZE": slurm["SLURM_STEP_NUM_TASKS"],
        "LOCAL_RANK": slurm.get("SLURM_LOCALID", "0"),
        "LOCAL_WORLD_SIZE": tasks[node] if node < len(tasks) else "1",
    }
