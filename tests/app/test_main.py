"""What the program does around the imports of the daemon leaves no trace."""

import os
import subprocess
import sys

import pytest

LOOK = """
import gc, os, sys
from homegptd.__main__ import main
looked = gc.get_stats()[0]["collections"]
sys.argv = ["homegptd", "--version"]
try:
    main()
except SystemExit:
    pass
from aiohttp.connector import _SSL_CONTEXT_VERIFIED as context
looked = gc.get_stats()[0]["collections"] - looked
print(os.environ.get("SSL_CERT_FILE"), gc.isenabled(), gc.get_freeze_count() > 10_000)
print(context.cert_store_stats()["x509_ca"], looked < 10)
"""


@pytest.mark.parametrize("given", [None, "/etc/ssl/mine.pem"])
def test_no_certificates_and_no_garbage_of_imports(given: str | None) -> None:
    env = {name: text for name, text in os.environ.items() if name != "SSL_CERT_FILE"}
    if given is not None:
        env["SSL_CERT_FILE"] = given
    done = subprocess.run(
        [sys.executable, "-c", LOOK], env=env, capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines()[1:] == [f"{given} True True", "0 True"]
