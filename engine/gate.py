"""Who may come in: origins, API keys and sessions per client, before any session is made.

    peer address, Handshake -> Gate.admit -> Visitor, or Refused with an HTTP status

Knows neither sockets nor protocols. The rule of origins is in `loquent.engine.web`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import ipaddress
from collections.abc import Collection, Iterator
from http import HTTPStatus

from loquent.engine import web
from loquent.engine.auth import Keys
from loquent.engine.limits import Limits, Seats
from loquent.engine.wire.session import Handshake, Refused


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Visitor:
    """Who was let in: its address, and the name of its key (None where none are needed)."""

    address: str
    key: str | None

    @property
    def household(self) -> str | None:
        """What counts as one client among the addresses; None for this machine itself."""
        address = _parse(self.address)
        if address is None:
            return self.address
        if address.is_loopback:
            return None
        bits = 64 if address.version == 6 else 32
        return str(ipaddress.ip_network((address, bits), strict=False))


class Gate:
    """Lets clients in.

    Args:
        keys: those that open it; none for an open house.
        limits: see `Limits`.
        allow_origins: see `web.origin_allowed`.
        trusted_proxies: addresses whose ``X-Forwarded-For`` is believed.
        local: the server listens on this machine's own address only. A page of a stranger whose
            name leads here (DNS rebinding) is then not taken for one of ours.
    """

    def __init__(
        self,
        *,
        keys: Keys,
        limits: Limits,
        allow_origins: Collection[str] = (),
        trusted_proxies: Collection[str] = (),
        local: bool = False,
    ) -> None:
        self.keys = keys  # may be replaced while it works
        self._allow_origins = allow_origins
        self._proxies = frozenset(trusted_proxies)
        self._local = local
        self._by_key = Seats(limits.sessions_per_key)
        self._by_address = Seats(limits.sessions_per_address)

    def address_of(self, peer: str, handshake: Handshake) -> str:
        """The client's own address, also when a trusted proxy stands between."""
        forwarded = handshake.headers.get("x-forwarded-for")
        if peer not in self._proxies or not forwarded:
            return peer
        # The last one is what our own proxy saw; those before it anybody may have written.
        return forwarded.rpartition(",")[2].strip()

    def admit(self, peer: str, handshake: Handshake, *, seated: bool = False) -> Visitor:
        """Look at a request for a session.

        `seated`: nobody asks for its seat now, as it has one already or is told later that there is
        none: see `full`.

        Raises Refused with 403, 401 or 429.
        """
        if not self.origin_allowed(peer, handshake):
            raise Refused(
                HTTPStatus.FORBIDDEN,
                f"Pages from {handshake.headers.get('origin')} may not connect; start the server "
                "with --allow-origin.",
            )
        visitor = Visitor(address=self.address_of(peer, handshake), key=self._identify(handshake))
        if not seated:
            self.check(visitor)
        return visitor

    def origin_allowed(self, peer: str, handshake: Handshake) -> bool:
        """Whether a page that sends this request may do so; true of what is no page."""
        origin, host = handshake.headers.get("origin"), handshake.headers.get("host")
        if self._local and peer not in self._proxies and not web.is_loopback(web.host_name(host)):
            host = None
        return web.origin_allowed(origin, host, self._allow_origins)

    def check(self, visitor: Visitor) -> None:
        """Raises Refused with 429 where the visitor has no free seat."""
        if why := self.full(visitor):
            raise Refused(HTTPStatus.TOO_MANY_REQUESTS, why, {"Retry-After": "10"})

    def full(self, visitor: Visitor) -> str | None:
        """Why there is no seat for one more session of the visitor's, None if there is."""
        if visitor.key is not None and not self._by_key.free(visitor.key):
            return f"The key {visitor.key} has all the sessions open that it may have; try later."
        if visitor.household is not None and not self._by_address.free(visitor.household):
            return "Your address has all the sessions open that it may have; try later."
        return None

    @contextlib.contextmanager
    def seat(self, visitor: Visitor) -> Iterator[None]:
        """Count the visitor's session for as long as the block runs."""
        with contextlib.ExitStack() as stack:
            if visitor.key is not None:
                stack.enter_context(self._by_key.seat(visitor.key))
            if visitor.household is not None:
                stack.enter_context(self._by_address.seat(visitor.household))
            yield

    def _identify(self, handshake: Handshake) -> str | None:
        if not self.keys:
            return None
        name = self.keys.name_of(handshake.credentials)
        if name is None:
            given = "this one is not known" if handshake.credentials else "the request has none"
            message = f"An API key is needed, and {given}: send Authorization: Bearer KEY."
            headers = {"WWW-Authenticate": 'Bearer realm="loquent"'}
            if handshake.path == "/v1/listen":
                headers["dg-error"] = message
            raise Refused(HTTPStatus.UNAUTHORIZED, message, headers)
        return name


def _parse(text: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        address = ipaddress.ip_address(text.partition("%")[0])
    except ValueError:
        return None
    return getattr(address, "ipv4_mapped", None) or address
