"""Why a process could not be started, in words for the person who must act."""

import errno
import os
import shutil
from collections.abc import Mapping

from homegptd.core.model import ModelId
from homegptd.core.refusals import Fault


def cannot_start(model: ModelId, cause: str, *, lasting: bool, hint: str | None = None) -> Fault:
    return Fault(f'cannot start "{model}": {cause}', hint=hint, lasting=lasting)


def spawn_fault(
    model: ModelId, command: str, env: Mapping[str, str], error: OSError | ValueError
) -> Fault:
    if not isinstance(error, OSError):
        return cannot_start(model, f"{command}: {error}", lasting=True)
    found = shutil.which(command, mode=os.F_OK, path=env.get("PATH"))
    if isinstance(error, FileNotFoundError) and found is None:
        return cannot_start(
            model,
            f"command not found: {command}",
            lasting=True,
            hint=f"install it, or name it by its full path; looked in {env.get('PATH', '')}",
        )
    if isinstance(error, FileNotFoundError):
        cause = f"{found}: the interpreter in its first line is missing"
        return cannot_start(model, cause, lasting=True, hint=f"head -n 1 {found}")
    hint = f"ls -l {found}" if isinstance(error, PermissionError) and found else None
    return cannot_start(
        model, f"{found or command}: {words(error)}", lasting=is_lasting(error), hint=hint
    )


def is_lasting(error: OSError) -> bool:
    return error.errno not in {
        errno.EAGAIN, errno.ENOMEM, errno.ENOSPC, errno.EDQUOT, errno.EMFILE, errno.ENFILE,
        errno.EINTR, errno.EIO, errno.ETXTBSY,
    }  # fmt: skip


def words(error: OSError) -> str:
    return (error.strerror or str(error)).lower()
