"""Files that are written whole or not at all."""

import errno
import os
from pathlib import Path
from threading import get_ident

from mmsae_helpers.errors import InputError


def write(path: Path, content: bytes) -> None:
    """Write atomically: a reader sees the whole file or none, and a failure leaves nothing behind."""
    temporary = path.with_name(f"{path.name}.tmp-{os.getpid()}-{get_ident()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        needs = f"needs {len(content) / 2**20:.1f} MiB; make room and run again (what is finished is kept)"
        raise InputError(f"disk full: {path} {needs}") from error
    finally:
        temporary.unlink(missing_ok=True)
