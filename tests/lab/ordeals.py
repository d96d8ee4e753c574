"""The faults of a soak: deaths, and what else may happen to a host while clients work. `KINDS` lists them all.

What is drawn is drawn from the scene's seed. After each there is a server, or one that can be started.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import httpx

from lab import audit, meddling
from lab.crashes import kill_helpers
from lab.faults import Step
from lab.grabber import grabbing
from lab.scene import Scene
from lab.server import FOREVER, Server, alive, box, eventually

STEP_IN = 1.5
"""Seconds for a step to come that a fault waits for."""
STEPS_FOR = 50
"""Faults until the steps are learned again."""


# -------------------------------------------------------------------------------------------------------------- deaths


def death_at_a_step(scene: Scene) -> bool:
    """Of somebody, at a step of all that the clients have been seen to cause; whether it has come."""
    if scene.tries % STEPS_FOR == 0:
        _learn_steps(scene)
    scene.tries += 1
    who = scene.random.choice(scene.victims)
    step = Step(scene.random.choice(scene.steps), scene.random.choice((1, 1, 2, 3)))
    scene.server.faults.arm(step, scene.server.victims(who))
    end = time.monotonic() + STEP_IN
    while not (came := scene.server.faults.came) and time.monotonic() < end:
        time.sleep(0.005)
    scene.deaths[f"{who} at a step"] += came
    return came


def _learn_steps(scene: Scene) -> None:
    scene.server.faults.record()
    time.sleep(2)
    scene.steps = sorted({*scene.steps, *(step.name for step in scene.server.faults.recorded())})


def death_at_any_moment(scene: Scene) -> None:
    """Whatever is going on. A server without zygote ends, later."""
    who = scene.random.choice(("server", "supervisor", "zygote", "both"))
    _pause(scene)
    victims = scene.server.victims(who)
    for pid in victims:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    eventually(lambda: not any(map(alive, victims)), "who was killed is dead")
    scene.deaths[f"{who} at a moment"] += 1


def stop_of_the_server(scene: Scene) -> None:
    _pause(scene)
    scene.server.stop()


def upgrade(scene: Scene) -> None:
    """The next server is of another release."""
    _pause(scene)
    scene.server.stop()
    scene.server.package = scene.releases[scene.server.package == scene.releases[0]]
    scene.server.start()
    _pause(scene)


def death_of_storage_daemons(scene: Scene) -> None:
    """What a container then reads is its own business."""
    _pause(scene)
    scene.deaths["storage daemon at a moment"] += len(kill_helpers(scene.server))


def _pause(scene: Scene) -> None:
    time.sleep(scene.random.uniform(0, 0.4))


# -------------------------------------------------------------------------------------------------------- the host


def loop_devices_grabbed(scene: Scene) -> None:
    """Another program takes the devices that are free next, again and again."""
    with grabbing():
        time.sleep(1)


def loop_devices_grabbed_and_a_death(scene: Scene) -> bool:
    with grabbing():
        return death_at_a_step(scene)


def full_run_directory(scene: Scene) -> None:
    """Its space, or its inodes: creates are refused until there is room; what ends and goes, does."""
    use_up = scene.random.choice((scene.filler.space, scene.filler.inodes))
    try:
        use_up()
        scene.die_besides()
        eventually(lambda: _is_refused(scene.server, use_up), "a create is refused for lack of room")
        _stay(use_up)
    finally:
        scene.filler.release()
    _make_and_delete(scene.server)


def _is_refused(server: Server, use_up: Callable[[], None]) -> bool:
    """Whether there is no room for a container. What clients delete makes some, for a moment."""
    use_up()
    answer = server.http.post("/container", json=box(FOREVER))
    if answer.status_code == 201:
        server.delete(f"/container/{answer.json()['id']}?force=true")
        return False
    assert answer.status_code == 503, answer.text
    assert "no space or no inodes are left in" in answer.json()["message"], answer.text
    return True


def _stay(use_up: Callable[[], None]) -> None:
    end = time.monotonic() + 0.7
    while time.monotonic() < end:
        use_up()
        time.sleep(0.02)


def silent_store(scene: Scene) -> None:
    """Ceph's monitor, or its OSD, says nothing: what does not need it goes on, and a server starts."""
    assert scene.cluster is not None
    silent = scene.random.choice((scene.cluster.silent_mon, scene.cluster.silent_osd))
    with silent():
        _go_on(scene)


def storage_daemons_that_hang(scene: Scene) -> None:
    """The same of those. One that is not waited for any more may have been ended."""
    pids = audit.storage_daemons(scene.server.run_dir)
    with contextlib.ExitStack() as stack:
        for pid in pids:
            stack.enter_context(_hanging(pid))
        _go_on(scene)


@contextlib.contextmanager
def _hanging(pid: int) -> Iterator[None]:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)


def _go_on(scene: Scene) -> None:
    """While something is silent, work that does not need it is done, for some seconds."""
    _pause(scene)
    scene.die_besides()
    for _ in range(3):
        _make_and_delete(scene.server)
    time.sleep(scene.random.uniform(0, 2))


def client_that_hangs_up(scene: Scene) -> None:
    """In the middle of a create; then it asks for the same again, until it has it."""
    for number in range(3):
        name = f"hasty-{scene.faults['client that hangs up']}-{number}"
        wanted = box(FOREVER, name=name) | {"mount": scene.random.choice(scene.mounts)}
        with scene.server.client() as client, contextlib.suppress(httpx.TimeoutException):
            client.post("/container", json=wanted, timeout=scene.random.uniform(0.001, 0.08))
        eventually(partial(_is_made, scene.server, wanted), f"{name} can be made")
        scene.server.delete(f"/container/byname/{name}?force=true")


def _is_made(server: Server, wanted: dict[str, Any]) -> bool:
    """Whether it could be made now: the name may be that of the one before still, which goes, or is deleted."""
    answer = server.http.post("/container", json=wanted)
    if answer.status_code == 201:
        return True
    assert answer.status_code == 409, answer.text
    removed = server.http.delete(f"/container/byname/{wanted['name']}?force=true")
    assert removed.status_code in (200, 404, 409), removed.text
    return False


def _make_and_delete(server: Server) -> None:
    """A container on the small image."""
    made = server.post("/container", box(FOREVER))
    server.delete(f"/container/{made['id']}?force=true")


# --------------------------------------------------------------------------------------------------------- the list


class Kind(NamedTuple):
    """How often a fault is drawn, for its share in all; what it is; which codes from 500 on clients may be answered
    meanwhile; and where it can be done. A fault that returns False has not come to pass."""

    share: int
    do: Callable[[Scene], bool | None]
    answers: tuple[int, ...] = ()
    possible: Callable[[Scene], bool] = lambda scene: True

    @property
    def name(self) -> str:
        return self.do.__name__.replace("_", " ")


def _has_ceph(scene: Scene) -> bool:
    return scene.cluster is not None


def _may_kill_helpers(scene: Scene) -> bool:
    return "helper" in scene.victims


OVER_A_DEATH = (500, 503)
"""What somebody is told whose request met a death."""

KINDS = (
    Kind(16, death_at_a_step, OVER_A_DEATH),
    Kind(6, death_at_any_moment, OVER_A_DEATH),
    Kind(4, death_of_storage_daemons, OVER_A_DEATH, _may_kill_helpers),
    Kind(4, stop_of_the_server),
    Kind(4, upgrade),
    Kind(2, loop_devices_grabbed),
    Kind(2, loop_devices_grabbed_and_a_death, OVER_A_DEATH),
    Kind(2, full_run_directory, (503,)),
    Kind(2, silent_store, (504,), _has_ceph),
    Kind(2, storage_daemons_that_hang, (504,), _has_ceph),
    Kind(2, client_that_hangs_up),
    *(Kind(1, harm) for harm in meddling.ALL),
)


def draw(scene: Scene) -> Kind:
    kinds = [kind for kind in KINDS if kind.possible(scene)]
    return scene.random.choices(kinds, [kind.share for kind in kinds])[0]
