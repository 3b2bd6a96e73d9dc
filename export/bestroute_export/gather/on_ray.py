"""The same work on a Ray cluster: Ray Data carries pieces to workers, and entries back."""

import asyncio
import itertools
import json
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any, Protocol

from bestroute_export.gather.journal import Entry

if TYPE_CHECKING:
    import pyarrow

Piece = dict[str, Any]


class RayFailed(Exception):
    """Ray Data is not installed, or a worker failed."""


class Station(Protocol):
    """Where pieces are worked on."""

    async def work(self, pieces: list[Piece], record: Callable[[Entry], None]) -> None:
        """Work on pieces and record what comes of them."""


def connect(workers: int) -> int:
    """Connect to the cluster that RAY_ADDRESS names, or start one on this machine.

    Args:
        workers: how many are asked for; 0 takes one per node.

    Returns:
        How many workers to run.

    Raises:
        RayFailed: says how to install it.
    """
    try:
        import ray
        import ray.data
    except ImportError as error:
        raise RayFailed("--ray needs Ray Data: pip install 'bestroute[ray]'") from error
    ray.init(ignore_reinit_error=True, log_to_driver=False)
    ray.data.DataContext.get_current().enable_progress_bars = False
    return workers or sum(node["Alive"] for node in ray.nodes())  # type: ignore[no-untyped-call]


def spread(
    pieces: Iterable[Piece],
    make: Callable[[], Station],
    *,
    workers: int,
    batch: int,
    gpu: bool = False,
) -> Iterator[Entry]:
    """Work on pieces in several processes of the cluster; gives the entries as batches end.

    A worker that dies ends the run: to repeat its batch would be to pay for it again.

    Args:
        pieces: as JSON has them.
        make: makes a worker's station; picklable.
        workers: how many.
        batch: pieces that one worker has under way at once; what a crash can lose.
        gpu: each worker wants a GPU, if the cluster has any.

    Raises:
        RayFailed: a worker raised an error, or died.
    """
    import ray
    import ray.data

    # Into the object store, from where Ray spills to disk: all pieces need not fit into memory.
    blocks = [ray.put(_table("piece", block)) for block in _blocks(pieces, batch)]
    if not blocks:
        return
    # Ray has two types of that name.
    entries = ray.data.from_arrow_refs(blocks).map_batches(  # type: ignore[arg-type]
        _Worker,
        fn_constructor_args=(make,),
        batch_size=batch,
        compute=ray.data.ActorPoolStrategy(size=workers),
        num_gpus=1 if gpu and _has_gpus() else 0,
        max_restarts=0,
        max_task_retries=0,
    )
    try:
        for row in entries.iter_rows():
            yield json.loads(row["entry"])
    except ray.exceptions.RayError as error:
        cause = getattr(error, "cause", None) or error
        raise RayFailed(
            f"a Ray worker failed: {cause}\nwhat came back before is kept; run the same again"
        ) from error


def _has_gpus() -> bool:
    import ray

    return "GPU" in ray.cluster_resources()  # type: ignore[no-untyped-call]


class _Worker:
    """A station in a process of its own, with an event loop that outlives the batches."""

    def __init__(self, make: Callable[[], Station]) -> None:
        self._runner = asyncio.Runner()
        self._station = make()

    def __call__(self, batch: dict[str, Any]) -> "pyarrow.Table":
        entries: list[Entry] = []
        pieces = [json.loads(piece) for piece in batch["piece"]]
        self._runner.run(self._station.work(pieces, entries.append))
        return _table("entry", entries)


def _blocks(pieces: Iterable[Piece], size: int) -> Iterator[list[Piece]]:
    rest = iter(pieces)
    while block := list(itertools.islice(rest, size)):
        yield block


def _table(column: str, rows: list[dict[str, Any]]) -> "pyarrow.Table":
    import pyarrow

    return pyarrow.table({column: pyarrow.array(map(json.dumps, rows), pyarrow.string())})
