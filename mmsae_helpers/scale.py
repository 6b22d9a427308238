"""Passes spread over workers, of this machine or of a cluster, as Ray Data jobs; Ray itself is extra ``[scale]``.

MMSAE_WORKERS says how many (0, the default: all in this process, without Ray), RAY_ADDRESS on which cluster.
"""

import logging
import os
import pickle
import socket
from collections.abc import Callable, Iterable, Iterator

import numpy as np

from mmsae_helpers.errors import InputError, first_line


def workers() -> int:
    """MMSAE_WORKERS, by default 0; raises InputError where it is no number."""
    given = os.environ.get("MMSAE_WORKERS", "0")
    if not given.isdecimal():
        raise InputError(f"MMSAE_WORKERS is {given!r}: give a number of workers, or 0 for none")
    return int(given)


def parts(function: Callable[[int, int], object], n: int, device: str = "cpu") -> Iterator[tuple[slice, object]]:
    """``function(start, stop)`` of equal parts of ``n`` items, one a worker, or of all of them here where there are no
    workers: yields each part and what was returned. Raises as `spread`."""
    if not (k := min(workers(), n)):
        yield slice(0, n), function(0, n)
        return

    def packed(start: int, stop: int) -> dict[str, np.ndarray]:
        return {"packed": np.frombuffer(pickle.dumps(function(start, stop)), np.uint8)[None]}

    cuts = np.linspace(0, n, k + 1).astype(int).tolist()
    items = list(zip(cuts[:-1], cuts[1:], strict=True))
    for item, found in zip(items, spread(packed, items, k, device), strict=True):
        yield slice(*item), pickle.loads(found["packed"][0].tobytes())


class _Worker:
    def __init__(self, function):
        import ray

        os.environ["MMSAE_WORKERS"] = "0"  # it has none of its own
        self.function = ray.get(function)

    def __call__(self, block: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        try:
            return self.function(*map(int, block["item"][0]))
        except InputError as error:  # which Ray would hide in its own
            return {"error": np.array([str(error)])}


def spread(
    function: Callable[[int, int], dict[str, np.ndarray]], items: Iterable[tuple[int, int]], n: int, device: str = "cpu"
) -> Iterator[dict[str, np.ndarray]]:
    """``function(start, stop)`` of every item by ``n`` workers: columns of one length, in the order of the items.

    A worker has a copy of ``function`` and all that hangs on it, and one core, or on "cuda" one GPU, of its own; one
    that is killed is replaced, and does its item again. No columns come of what has no rows. Raises InputError where
    Ray is missing, its cluster does not answer or has less than that; and one that ``function`` raises.
    """
    ray = _ray(n, device)
    logging.getLogger("ray.data").setLevel(logging.WARNING)
    context = ray.data.DataContext.get_current()
    context.execution_options.preserve_order = True
    context.target_max_block_size = None  # what one call gives stays together
    context.enable_progress_bars = context.print_on_execution_start = False
    try:
        copies = ray.put(function)  # held here as long as a worker may be replaced
    except (TypeError, AttributeError) as error:  # as pictures that 06 remembers
        how = f"set MMSAE_WORKERS=0, or 06's remembered: 0 ({first_line(error.__cause__ or error)})"
        raise InputError(f"this pass cannot be sent to workers: {how}") from None
    items = [{"item": np.array(item)} for item in items]
    pool = ray.data.ActorPoolStrategy(size=max(1, min(n, len(items))))
    own = {"num_cpus": 1, "num_gpus": int(device == "cuda")}
    jobs = ray.data.from_items(items, override_num_blocks=max(1, len(items)))
    jobs = jobs.map_batches(_Worker, fn_constructor_args=[copies], batch_size=None, compute=pool, **own)
    for columns in jobs.iter_batches(batch_size=None, prefetch_batches=0):
        if "error" in columns:
            raise InputError(str(columns["error"][0]))
        yield columns


def _ray(n: int, device: str):
    """Ray, connected; a cluster of this process alone where RAY_ADDRESS names none."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # tells nobody
    try:
        import ray
        import ray.data
    except ImportError as error:
        raise InputError(f"MMSAE_WORKERS needs Ray: pip install -e '.[scale]' ({first_line(error)})") from None
    address, wanted = os.environ.get("RAY_ADDRESS", "local"), {"cuda": "GPU"}.get(device, "CPU")
    if not ray.is_initialized():
        here = {"num_cpus": n, "include_dashboard": False} if address == "local" else {}
        host, _, port = address.removeprefix("ray://").rpartition(":")
        try:
            if port.isdecimal():  # Ray itself tries for minutes
                socket.create_connection((host, int(port)), 10).close()
            ray.init(address, log_to_driver=False, logging_level="ERROR", **here)
        except Exception as error:  # a timeout, a refused connection, another version of Ray
            raise InputError(f"no Ray cluster at {address}: {first_line(error)}; see to RAY_ADDRESS") from error
    if (there := int(ray.cluster_resources().get(wanted, 0))) < n:
        raise InputError(f"MMSAE_WORKERS is {n}, but {address} has {there} {wanted}s, of which each worker takes one")
    return ray
