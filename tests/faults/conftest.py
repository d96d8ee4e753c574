"""What tests of a service in trouble have: a server of their own."""

from lab.server import server

__all__ = ["server"]
