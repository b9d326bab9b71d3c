"""Real processes for the tests of distributed training: started, bounded in time, never left behind."""

from __future__ import annotations

import faulthandler
import os
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch.multiprocessing.spawn import spawn

RANKS = 2
LIMIT = 180.0  # seconds; on an idle machine ranks take 5 to 15, most of it imports
_SAVED = "{}.pt"


def run_ranks(work: Callable[[int], Any], folder: Path, limit: float = LIMIT) -> list[Any]:
    """Run ``work(rank)`` in two processes that share a gloo group, and return what each of them gave.

    A rank that does not finish prints the stacks of its threads and ends, and the test fails, so that nothing waits
    for ever. The group is met through a file, since a port that was free a moment ago may be taken.

    Raises:
        torch.multiprocessing.ProcessRaisedException: Where a rank raised; it holds the rank's traceback.
        torch.multiprocessing.ProcessExitedException: Where a rank did not finish in time.
    """
    context = spawn(_rank, args=(work, str(folder), limit), nprocs=RANKS, join=False)
    end = time.monotonic() + limit + 30
    try:
        while not context.join(timeout=1.0):
            assert time.monotonic() < end, f"a rank was still there {limit + 30:.0f} s after its start"
    finally:
        for process in context.processes:
            process.kill()
    return [torch.load(folder / _SAVED.format(rank)) for rank in range(RANKS)]


def _rank(rank: int, work: Callable[[int], Any], folder: str, limit: float) -> None:
    """Join the group, work, save what came of it, and leave at once."""
    faulthandler.dump_traceback_later(limit, exit=True)
    torch.distributed.init_process_group(
        "gloo",
        init_method=f"file://{folder}/meeting",
        rank=rank,
        world_size=RANKS,
        timeout=timedelta(seconds=limit / 2),
    )
    torch.set_num_threads(1)
    torch.save(work(rank), Path(folder) / _SAVED.format(rank))
    torch.distributed.destroy_process_group()
    # An interpreter that shuts down can wait for ever for gloo's threads: pytorch/pytorch#190489.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
