"""Settings of the OpenAI-compatible HTTP API."""

from typing import Annotated

from pydantic import Field

from bestroute.config.base import Count, Section


class Gateway(Section):
    """The OpenAI-compatible HTTP API, and the web page.

    Attributes:
        listen: host:port, port 0 picks a free one, which is logged; unset: none.
        page: whether `/` is a web page to try it with.
        max_body_bytes: largest body of a request.
    """

    listen: Annotated[str | None, Field(pattern=r"^.+:\d+$")] = None
    page: bool = True
    max_body_bytes: Count = 16 * 1024 * 1024
