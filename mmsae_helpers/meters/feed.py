"""One pass over tokens, many meters: the only loop of the package that encodes with several SAEs.

A meter is what is computed from one pass: it has ``sae``, ``layer`` and ``scale``, takes what it wants of each batch,
and gives a ``result()``. Several meters of one SAE share its encoding.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import nullcontext
from copy import deepcopy
from itertools import chain, groupby

import scipy.sparse as sp
import torch

from mmsae_helpers import scale
from mmsae_helpers.meters.features import encode_chunks, to_csr
from mmsae_helpers.saes import lent
from mmsae_helpers.workers import crew


class Meter:
    """Base of the meters: reads the features of ``sae`` on the residuals after block ``layer``, times ``scale``.

    A meter overrides ``add`` (csr features [N, d_sae] of a TokenBatch of N tokens, whole samples), or ``chunk``
    (residuals [n, d_in] as they come and scaled, dense features [n, d_sae]; n a part of the batch), or both.
    """

    def __init__(self, sae, layer: int, scale: float = 1.0):
        self.sae, self.layer, self.scale = sae, layer, float(scale)

    add = None
    chunk = None

    def result(self):
        """What the pass said."""
        return self


def feed(meters: Mapping, tokens: Iterable, *, device=None, together: int | None = None) -> dict:
    """Feed one pass over TokenBatches to every meter and return their results by key.

    Each SAE is encoded once a batch for all meters that read it at the same block and scale, several SAEs side by side;
    dense features exist for 2,048 tokens at a time. ``device`` lends a device to the SAEs, ``together`` at a time: then
    ``tokens`` must be fit for several passes. Where `scale.workers` are asked for and ``tokens`` are kept in a folder,
    as `cache.Tokens` may be, each reads them for its share of the SAEs. InputError where residuals are not finite.
    """
    order = sorted(meters.values(), key=_read)
    readers = [list(some) for _, some in groupby(order, _read)]
    if min(scale.workers(), len(readers)) > 1 and getattr(tokens, "folder", None):
        results = _by_workers(readers, tokens.at_rest(), device, together)
        return {key: results[id(meter)] for key, meter in meters.items()}
    n = together or len(readers) or 1
    for part in (readers[i : i + n] for i in range(0, len(readers), n)):
        saes = {id(some[0].sae): some[0].sae for some in part}
        with lent(device, *saes.values()) if device else nullcontext():
            with crew(device or getattr(part[0][0].sae, "device", "cpu")) as each:
                for batch in tokens:
                    each(lambda some, batch=batch: _add(some, batch), part)
    return {key: meter.result() for key, meter in meters.items()}


def _by_workers(readers: list[list[Meter]], tokens, device, together) -> dict[int, object]:
    """`feed` on `scale.workers`, an equal part of the SAEs on each: results by the meters' ids. The meters here become
    what theirs have become."""

    def fed(start: int, stop: int) -> list[tuple]:
        own = deepcopy(list(chain(*readers[start:stop])))  # what Ray sends is read-only
        found = feed(dict(enumerate(own)), tokens, device=device, together=together)
        states = ({name: value for name, value in vars(meter).items() if name != "sae"} for meter in own)
        return [(state, None if found[i] is own[i] else found[i]) for i, state in enumerate(states)]

    kind, results = torch.device(device or readers[0][0].sae.device).type, {}
    for part, found in scale.parts(fed, len(readers), kind):
        for meter, (state, result) in zip(chain(*readers[part]), found, strict=True):
            vars(meter).update(state)
            results[id(meter)] = meter if result is None else result
    return results


def _read(meter: Meter) -> tuple:
    return meter.layer, id(meter.sae), meter.scale


def _add(meters: list[Meter], batch) -> None:
    """One SAE's encoding of a batch for all meters that want it, dense a chunk at a time and sparse as a whole."""
    one, parts = meters[0], []
    wholes, chunks = ([m for m in meters if getattr(m, way)] for way in ("add", "chunk"))
    for raw, x, features in encode_chunks(one.sae, batch.acts[one.layer], one.scale):
        for meter in chunks:
            meter.chunk(raw, x, features)
        if wholes:
            parts.append(to_csr(features))
    for meter in wholes:
        meter.add(batch, parts[0] if len(parts) == 1 else sp.vstack(parts, format="csr"))
