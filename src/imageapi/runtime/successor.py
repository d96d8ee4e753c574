"""What a supervisor executes when it is upgraded in place: `python -m imageapi.runtime.successor SITE LOCK LISTENER`.

It is the interpreter and the package of the server that asks for it.
"""

from __future__ import annotations

import os
import sys

import msgspec

from imageapi.config import Site
from imageapi.runtime import supervisor
from imageapi.runtime.protocol import Upgrade


def order(site: Site) -> Upgrade:
    """The order to become a supervisor of this package. Nothing of the working directory is imported (-P)."""
    argv = [sys.executable, "-P", "-m", __name__, msgspec.json.encode(site).decode()]
    return Upgrade(argv, dict(os.environ))


if __name__ == "__main__":
    supervisor.succeed(msgspec.json.decode(sys.argv[1], type=Site), int(sys.argv[2]), int(sys.argv[3]))
