"""``python -m loquent.clients.probe``: is the server of this machine alive? For health checks.

Reads port and TLS from the same variables as ``loquent serve``. Exit status 0 if it answers.
"""

from __future__ import annotations

import os
import ssl
import sys
import urllib.request


def main() -> int:
    """Ask ``/healthz``; returns the exit status."""
    # The certificate names the server's own host, which 127.0.0.1 need not be.
    context = ssl._create_unverified_context()
    scheme = "https" if os.environ.get("LOQUENT_TLS_CERT") else "http"
    url = f"{scheme}://127.0.0.1:{os.environ.get('LOQUENT_PORT', '8765')}/healthz"
    try:
        with urllib.request.urlopen(url, timeout=4, context=context) as answer:
            return 0 if answer.status == 200 else 1
    except OSError as exc:
        print(f"{url}: {exc}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
