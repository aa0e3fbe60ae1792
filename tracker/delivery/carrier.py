"""How does one message leave this machine? Run as a script: a request on standard input, a reply on standard output.

A process of its own, since notifiers draw from Python's global `random` and a resolver may hang for minutes; neither
may touch the training. It imports nothing of this package. Standard error is not read: it could hold a secret.
"""

from __future__ import annotations

import ipaddress
import json
import os
import socket
import ssl
import sys
from typing import Any
from urllib.parse import urlsplit

_REPLY_BYTES = 4096


class PrivateAddressError(Exception):
    """The peer is not in the open internet. No OSError: urllib3 would take it for a broken connection."""


def main() -> None:
    """Carries out one request and says how it went: `{"sent", "retry", "reason"}`."""
    request = json.loads(sys.stdin.readline())
    try:
        reply = {"webhook": post, "apprise": notify}[request["kind"]](request)
    except Exception as error:  # noqa: BLE001  the parent needs a reply whatever happened
        # The class alone: messages of HTTP and mail libraries quote addresses, and these may hold a key.
        reply = _failed(type(error).__name__, retry=True)
    sys.stdout.write(json.dumps(reply) + "\n")


def post(request: dict[str, Any]) -> dict[str, Any]:
    """Posts a body to an https address; the address that is really connected to is checked, redirects are not taken.

    Args:
        request: `url`, `body`, `headers`, `timeout` in seconds, `allow_private` (names of hosts that may be in a
            private network) and `ca_file` (None for the system's certificates).
    """
    import urllib3
    from urllib3.connection import HTTPSConnection
    from urllib3.connectionpool import HTTPSConnectionPool

    parts = urlsplit(request["url"])
    if parts.scheme != "https" or not parts.hostname:
        return _failed("the address is not https", retry=False)
    trusted = parts.hostname in request["allow_private"]

    class CheckedConnection(HTTPSConnection):
        """Looks at the peer before a byte is said: a name may resolve to another address than it did when checked."""

        def _new_conn(self) -> socket.socket:
            connected = super()._new_conn()
            peer = connected.getpeername()[0]
            if not trusted and not is_public(peer):
                connected.close()
                raise PrivateAddressError
            return connected

    class CheckedPool(HTTPSConnectionPool):
        ConnectionCls = CheckedConnection

    context = ssl.create_default_context(cafile=request.get("ca_file"))
    timeout = urllib3.Timeout(connect=request["timeout"], read=request["timeout"])
    pool = CheckedPool(parts.hostname, parts.port or 443, timeout=timeout, retries=False, ssl_context=context)
    target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
    try:
        answer = pool.urlopen(
            "POST", target, body=request["body"].encode(), headers=request["headers"], redirect=False,
            preload_content=False,
        )  # fmt: skip
    except PrivateAddressError:
        return _failed("the name resolves to an address in a private network", retry=False)
    answer.read(_REPLY_BYTES)
    answer.close()
    if 200 <= answer.status < 300:
        return {"sent": True, "retry": False, "reason": ""}
    if 300 <= answer.status < 400:
        return _failed(f"it answered with a redirect ({answer.status}), which is not followed", retry=False)
    again = answer.status >= 500 or answer.status in (408, 425, 429)
    return _failed(f"it answered with status {answer.status}", retry=again)


def is_public(address: str) -> bool:
    """Whether an address is one of the open internet: not loopback, private, link-local, multicast or reserved."""
    found = ipaddress.ip_address(address.split("%")[0])
    mapped = getattr(found, "ipv4_mapped", None)
    return (mapped or found).is_global and not (mapped or found).is_multicast


def notify(request: dict[str, Any]) -> dict[str, Any]:
    """Hands title and text to Apprise, whose addresses stand in an environment variable.

    Args:
        request: `env` (the variable's name; several addresses are separated by spaces), `title`, `text`.
    """
    import logging

    import apprise

    logging.disable(logging.CRITICAL)
    notifier = apprise.Apprise()
    if not all(notifier.add(address) for address in os.environ[request["env"]].split()):
        return _failed("Apprise does not understand an address", retry=False)
    kind = {"critical": apprise.NotifyType.FAILURE}.get(request["severity"], apprise.NotifyType.WARNING)
    if notifier.notify(title=request["title"], body=request["text"], notify_type=kind):
        return {"sent": True, "retry": False, "reason": ""}
    return _failed("the service did not take it", retry=True)


def _failed(reason: str, *, retry: bool) -> dict[str, Any]:
    return {"sent": False, "retry": retry, "reason": reason}


if __name__ == "__main__":
    main()
