"""What tests of the running service have: a server of their own."""

from lab.server import server

__all__ = ["server"]
