"""How this machine computes: several SAEs at a time, one thread on each, and the type that it multiplies fast."""

from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import torch


@contextmanager
def crew(device="cpu"):
    """Yields each(function, items) -> list: on a CPU as many items at a time as torch has threads, one on each."""
    n_threads = torch.get_num_threads()

    def each(function, items):
        torch.set_num_threads(1)
        try:
            return list(pool.map(function, items))
        finally:  # between calls the caller's own work, such as a model's forward, has all threads
            torch.set_num_threads(n_threads)

    n_workers = n_threads if torch.device(device).type == "cpu" else 1
    with ThreadPoolExecutor(n_workers, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        yield each


def autocast(device="cpu", wanted: bool = True):
    """Context in which products are in bfloat16, where `wanted` and the processor has it: without, it is emulated, 17
    times slower than float32 on a CPU with AVX2 alone."""
    kind = torch.device(device).type
    native = torch.cuda.is_bf16_supported() if kind == "cuda" else products() == "bfloat16"
    return torch.autocast(kind, torch.bfloat16, enabled=wanted and native)


def products() -> str:
    """The fastest type this CPU multiplies natively: "bfloat16" or "float32"."""
    asked = (getattr(torch.cpu, f"_is_{name}_supported", bool)() for name in ("avx512_bf16", "amx_tile"))
    return "bfloat16" if any(asked) else "float32"
