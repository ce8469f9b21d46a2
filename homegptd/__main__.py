"""`python -m homegptd` and the console script `homegptd`."""

import gc
import os
import sys

_CERTIFICATES = "SSL_CERT_FILE"


def main() -> int:
    """The imports of the daemon, without a quarter of what they cost, and then the daemon.

    Nothing that is imported is garbage, now or later: each full collection, in which all streams
    stand still, would look at it. And aiohttp reads the certificates of all authorities when it is
    imported, though nobody here speaks TLS.
    """
    given = os.environ.pop(_CERTIFICATES, None)
    os.environ[_CERTIFICATES] = os.devnull
    gc.disable()

    from homegptd.app import cli

    gc.freeze()
    gc.enable()
    del os.environ[_CERTIFICATES]
    if given is not None:
        os.environ[_CERTIFICATES] = given
    return cli.main()


if __name__ == "__main__":
    sys.exit(main())
