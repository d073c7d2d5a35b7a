"""Wire protocols without sockets: one interface, one session class for each protocol."""
