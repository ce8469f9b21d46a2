"""The dashboard: one page that holds nothing; what it shows, it asks of `overview` with a key.

Three files beside this one are put together when the page is asked for, so they cost no memory and
a package upgrade shows at the next reload. The page may run this script and look like this style,
by their hashes, and talk to this daemon; nothing else, whatever a model's name or an error says.
"""

from __future__ import annotations

from base64 import b64encode
from hashlib import sha256
from pathlib import Path

from aiohttp import web

_HERE = Path(__file__)
_POLICY = (
    "default-src 'none'; script-src '{script}'; style-src '{style}'; img-src data:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
    "require-trusted-types-for 'script'; trusted-types 'none'"
)
"""The last two: no script can turn text into HTML."""


async def page(request: web.BaseRequest, rest: str) -> web.StreamResponse:
    """The page, for everybody."""
    text, policy = assembled()
    headers = {
        "Content-Security-Policy": policy,
        "X-Content-Type-Options": "nosniff",
        "Referrer-Policy": "no-referrer",
        "Cache-Control": "no-cache",
    }
    return web.Response(text=text, content_type="text/html", charset="utf-8", headers=headers)


def assembled() -> tuple[str, str]:
    """The page, and its Content-Security-Policy."""
    html, style, script = (_HERE.with_suffix(kind).read_text() for kind in (".html", ".css", ".js"))
    text = html.replace("/* style */", style).replace("/* script */", script)
    return text, _POLICY.format(script=_hash(script), style=_hash(style))


def _hash(text: str) -> str:
    return f"sha256-{b64encode(sha256(text.encode()).digest()).decode()}"
