"""Where can an alert be sent, and how is that said without a secret in any file?

Secrets stand in environment variables, named in the settings. They reach the process that sends and nothing else: no
journal, log, report or error.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable
from urllib.parse import urlsplit

from diffing.errors import InputError
from tracker.delivery import carrier
from tracker.delivery.message import Message

SIGNATURE_HEADER, TIME_HEADER, ID_HEADER = "X-Palimpsest-Signature", "X-Palimpsest-Timestamp", "X-Palimpsest-Id"


@dataclass(frozen=True)
class Outcome:
    """How sending one message went.

    Attributes:
        sent: the receiver has it.
        retry: another try may do it; False where nothing will but a person (a wrong address, a refused key).
        reason: why not, without secrets.
    """

    sent: bool
    retry: bool = False
    reason: str = ""


@runtime_checkable
class Receiver(Protocol):
    """Somebody who is told of alerts."""

    @property
    def name(self) -> str:
        """As rules call it; also the name of its place in the journal."""
        ...

    def send(self, message: Message, timeout: float) -> Outcome:
        """Tries once, for at most so many seconds; called from a thread of its own, never raises for a failure."""
        ...


@dataclass(frozen=True)
class WebhookReceiver:
    """A signed JSON message to an https address.

    Refused: anything but https, redirects, and addresses in private networks as seen on the connection itself, so that
    a name cannot lead elsewhere than it did when it was looked at. The signature is
    HMAC-SHA256(secret, timestamp + "." + body) in hexadecimal behind `sha256=`; a receiver should refuse old
    timestamps, and may drop an `X-Palimpsest-Id` that it has seen.

    Attributes:
        name: as rules call it.
        url: where to; no user or password in it. Empty where `url_env` names it.
        url_env: environment variable that holds the address, for one that is a secret itself.
        secret_env: environment variable that holds the secret of the signature; empty for an unsigned message.
        allow_private: host names that may lie in a private network.
        ca_file: certificates to trust instead of the system's.

    Raises:
        InputError: the address is not usable, or the variable is not set.
    """

    name: str
    url: str = ""
    url_env: str = ""
    secret_env: str = ""
    allow_private: tuple[str, ...] = ()
    ca_file: Path | None = None

    def __post_init__(self) -> None:
        if bool(self.url) == bool(self.url_env):
            raise InputError(f"Expected url or url_env for receiver {self.name!r}, and not both. Name one.")
        _check_set(self.name, self.url_env)
        parts = urlsplit(self._address)
        if parts.scheme != "https" or not parts.hostname:
            shown = f"another in {self.url_env}" if self.url_env else _shown(self.url)
            raise InputError(f"Expected an https address for receiver {self.name!r}, got {shown}. Use https.")
        if parts.username or parts.password:
            raise InputError(
                f"Expected no user or password in the address of receiver {self.name!r}, got one. "
                "Take it out; sign with secret_env."
            )
        _check_set(self.name, self.secret_env)

    @property
    def _address(self) -> str:
        return self.url or os.environ.get(self.url_env, "")

    def send(self, message: Message, timeout: float) -> Outcome:
        """Tries once."""
        body, moment = message.to_json(), str(int(time.time()))
        headers = {"Content-Type": "application/json", ID_HEADER: message.id, TIME_HEADER: moment}
        if self.secret_env:
            headers[SIGNATURE_HEADER] = sign(os.environ.get(self.secret_env, ""), moment, body)
        ca_file = None if self.ca_file is None else str(self.ca_file)
        request = {"kind": "webhook", "url": self._address, "body": body, "headers": headers, "ca_file": ca_file}
        return carry({**request, "allow_private": list(self.allow_private)}, timeout)


@dataclass(frozen=True)
class AppriseReceiver:
    """Mail, Slack, PagerDuty and a hundred more, through Apprise (`pip install 'palimpsest[alerts]'`).

    Attributes:
        name: as rules call it.
        url_env: environment variable with Apprise's addresses, separated by spaces. They hold keys, and are therefore
            never written into a file of ours.

    Raises:
        InputError: the variable is not set, or Apprise is not installed.
    """

    name: str
    url_env: str

    def __post_init__(self) -> None:
        import importlib.util

        if importlib.util.find_spec("apprise") is None:
            raise InputError(
                f"Expected Apprise for receiver {self.name!r}, it is not installed. pip install 'palimpsest[alerts]'."
            )
        _check_set(self.name, self.url_env)

    def send(self, message: Message, timeout: float) -> Outcome:
        """Tries once."""
        said = {"title": message.title, "text": message.text, "severity": message.severity}
        return carry({"kind": "apprise", "env": self.url_env, **said}, timeout)


def sign(secret: str, moment: str, body: str) -> str:
    """The signature of a body sent at a moment (seconds since the epoch, as text)."""
    return "sha256=" + hmac.new(secret.encode(), f"{moment}.{body}".encode(), hashlib.sha256).hexdigest()


def carry(request: dict[str, Any], timeout: float) -> Outcome:
    """Has a process of its own carry out a request; it is killed when its time is up."""
    command = [sys.executable, "-P", str(Path(carrier.__file__))]
    try:
        done = subprocess.run(
            command,
            input=json.dumps({**request, "timeout": timeout}) + "\n",
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            timeout=timeout + 5.0,
            text=True,
            check=False,
        )
        return Outcome(**json.loads(done.stdout))
    except subprocess.TimeoutExpired:
        return Outcome(False, retry=True, reason=f"no answer within {timeout:g} s")
    except (OSError, ValueError, TypeError) as error:
        return Outcome(False, retry=True, reason=f"the sending process failed ({type(error).__name__})")


def _check_set(name: str, variable: str) -> None:
    if variable and not os.environ.get(variable):
        raise InputError(
            f"Expected environment variable {variable} for receiver {name!r}, it is not set. "
            f"export {variable}=… before the training starts."
        )


def _shown(url: str) -> str:
    parts = urlsplit(url)
    return f"{parts.scheme or 'no scheme'}://{parts.hostname or ''}"
