"""`m2f2 serve` as a process whose downloads stay here: names come from a table, the web is a test site."""

from __future__ import annotations

import ssl
import sys
import threading
from functools import partial
from http.server import ThreadingHTTPServer

import trustme
from test_serve_fetch import HOST, Loopback, Site, fake_resolver

from llava.cli import main
from llava.serve import api
from llava.serve.fetch import Fetcher


def test_site(authority: trustme.CA) -> int:
    """Start the site that test_serve_fetch uses; gives its port."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Site)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert(HOST, "other.example.org").configure_cert(context)
    server.socket = context.wrap_socket(server.socket, server_side=True)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return int(server.server_address[1])


if __name__ == "__main__":
    authority = trustme.CA()
    wire = Loopback(test_site(authority), authority)
    api.Fetcher = partial(Fetcher, resolver=fake_resolver, transport=wire)  # type: ignore[misc]
    sys.exit(main(["serve", *sys.argv[1:]]))
