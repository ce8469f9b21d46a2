"""The newest lines of the journal, for a message about a failure; never on the way of an order.

Needs group systemd-journal or adm; without it there is nothing to read, and that is no error.
"""

import asyncio
import logging
from contextlib import suppress

log = logging.getLogger(__name__)

READ_S = 3.0


async def newest_lines(lines: int, *matches: str) -> tuple[str, ...]:
    """Non-empty messages, oldest first, that fit all `matches` (`_COMM=podman`). Never raises."""
    try:
        process = await asyncio.create_subprocess_exec(
            *("journalctl", "--quiet", "--no-pager", "--output=cat", f"--lines={lines}", *matches),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.DEVNULL,
        )
    except OSError as error:
        log.info("cannot read the journal: %s", error)
        return ()
    try:
        async with asyncio.timeout(READ_S):
            out, _ = await process.communicate()
    except TimeoutError:
        return ()
    finally:
        if process.returncode is None:
            with suppress(ProcessLookupError):
                process.kill()
            await process.wait()
    texts = (line.strip() for line in out.decode(errors="replace").splitlines())
    return tuple(text for text in texts if text)
