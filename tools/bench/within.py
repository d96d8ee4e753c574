"""Run in the guest, where a container's command and who waits for it have one clock:

python3 -m tools.bench.within SOCKET ROUNDS < DEFINITION

prints, for each round, the nanoseconds from the POST of a container until its command's first instruction.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

from tools.bench.client import Client, request
from tools.bench.service import stamps


def main() -> None:
    create = request("POST", "/container", json.load(sys.stdin))
    with Client(Path(sys.argv[1])) as client:
        for _ in range(int(sys.argv[2])):
            print(_round(client, create))


def _round(client: Client, create: bytes) -> int:
    sent = time.monotonic_ns()
    made = client.ask(create).json()
    client.await_state(made["id"], "exited", pause=0.005)
    (first,) = stamps(made["logfile"])
    client.ask(request("DELETE", f"/container/{made['id']}"))
    return first - sent


if __name__ == "__main__":
    main()
