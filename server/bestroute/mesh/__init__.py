"""Messages that are exchanged with the proxies of a mesh."""
