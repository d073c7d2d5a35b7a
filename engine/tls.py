"""TLS in process: a certificate and its key made into a server's context, and both tried out."""

from __future__ import annotations

import ssl
from datetime import UTC, datetime
from pathlib import Path

from loquent.engine.auth import check_private
from loquent.engine.errors import ConfigError


def server_context(certificate: Path, key: Path) -> ssl.SSLContext:
    """TLS 1.2 and 1.3, with forward secrecy and authenticated encryption only.

    Args:
        certificate: PEM, the server's own first, then those that lead to the authority.
        key: PEM, without a password, for nobody else to read.

    Raises:
        ConfigError: they are no certificate and key, or do not belong together.
        OSError: a file cannot be read.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.set_ciphers("ECDHE+AESGCM:ECDHE+CHACHA20")
    context.options |= ssl.OP_NO_COMPRESSION | ssl.OP_NO_RENEGOTIATION
    context.set_alpn_protocols(["http/1.1"])
    load(context, certificate, key)
    return context


def load(context: ssl.SSLContext, certificate: Path, key: Path) -> None:
    """Put certificate and key into a context; new connections use them at once. Raises as above."""
    certificate.open().close()  # an error of OpenSSL would not name the file
    check_private(key)
    try:
        context.load_cert_chain(certificate, key, password=_no_password)
    except ssl.SSLError as exc:
        reason = (exc.reason or str(exc)).lower().replace("_", " ")
        raise ConfigError(
            f"{certificate} with {key}: not a PEM certificate and its key without a password "
            f"({reason})"
        ) from exc


def expiry(context: ssl.SSLContext, certificate: Path) -> datetime:
    """When the certificate ends, found in a handshake with ourselves.

    Raises ConfigError if a client would not take it: not valid yet, expired, made for other uses.
    """
    client = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    client.check_hostname = False
    client.load_verify_locations(certificate)
    client.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN  # its issuer may be unknown here
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    ours = context.wrap_bio(to_server, to_client, server_side=True)
    theirs = client.wrap_bio(to_client, to_server)
    try:
        for _ in range(3):  # a round trip, and one more for the end of it
            for side in (theirs, ours):
                try:
                    side.do_handshake()
                except ssl.SSLWantReadError:
                    continue
    except ssl.SSLCertVerificationError as exc:
        raise ConfigError(f"{certificate}: {exc.verify_message}") from exc
    except ssl.SSLError as exc:
        raise ConfigError(f"{certificate}: a TLS handshake with it fails ({exc.reason})") from exc
    ends = (theirs.getpeercert() or {}).get("notAfter")
    assert isinstance(ends, str), "the handshake is complete"
    return datetime.fromtimestamp(ssl.cert_time_to_seconds(ends), UTC)


def _no_password() -> str:
    return ""  # or OpenSSL would ask at the terminal
