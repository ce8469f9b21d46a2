"""Requests in absolute form (`GET http://host:9000/v1/models HTTP/1.1`), as to a proxy.

Servers must accept them (RFC 9112, 3.2.2), and then the host of the target counts and not that of
the header. So they are turned into the ordinary form before anything looks at them, and pass the
same checks. What could be read in two ways is refused.
"""

from __future__ import annotations

import re

from aiohttp import web
from multidict import CIMultiDict
from yarl import URL

from . import errors
from .errors import Denied

_FORM = re.compile(
    r"(?i:http)://"
    r"(?P<host>(?:[A-Za-z0-9_.-]{1,253}|\[[0-9A-Fa-f:.]{2,45}\])(?::[0-9]{1,5})?)"
    r"(?P<path>/(?!/)[!-\"$->@-~]*)"
    r"(?:\?(?P<query>[!-\"$-~]*))?"
)
"""No user before the host, no fragment, no other scheme, no path that could be another host."""


def in_origin_form(request: web.BaseRequest) -> web.BaseRequest:
    """The same request as if it had been sent to the host it names. Raises: Denied."""
    target = _FORM.fullmatch(request.raw_path)
    if target is None:
        raise Denied(errors.bad_request("the target must be a path, or http://HOST/PATH"))
    headers = CIMultiDict(request.headers)
    headers["Host"] = target["host"]
    url = URL.build(path=target["path"], query_string=target["query"] or "", encoded=True)
    try:
        return request.clone(rel_url=url, headers=headers)
    except UnicodeEncodeError:
        raise Denied(errors.bad_request("a header is not UTF-8")) from None
