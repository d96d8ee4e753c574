"""The supervisor: the parent of every container of one run directory. It outlives the server, and its own death.

One thread, one loop, no call that may wait for storage. It works in a nearly empty mount namespace and reaches the
host through the descriptors it opened before. What it must know of a container is on disk, so that another supervisor
can take its place at any moment; what became of those that ended meanwhile is asked of the kernel.
"""

from __future__ import annotations

import contextlib
import gc
import os
import resource
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable
from typing import Any, NoReturn

import msgspec

from imageapi import errors
from imageapi.config import Site
from imageapi.linux import memory, process, scope
from imageapi.runtime import claim, entries, output, protocol, surroundings
from imageapi.runtime.child import Child
from imageapi.runtime.container import Container
from imageapi.runtime.entries import Entry
from imageapi.runtime.groups import name_of
from imageapi.runtime.protocol import (
    Answer,
    Call,
    Done,
    Ended,
    Failed,
    Forget,
    Hello,
    Kill,
    List,
    Lives,
    LogTrouble,
    Quit,
    Reply,
    Signal,
    Start,
    Started,
    Upgrade,
    Welcome,
)
from imageapi.runtime.surroundings import Surroundings

BACKLOG = 16
LONGEST_LOG = 1 << 20
"""Bytes of bug reports that are kept from one supervisor to the next."""
FIRST_CLIENT = 10.0
"""Seconds for the server that had us launched to come."""
IDLE = 0.2
"""Seconds without a client and without a living container, until there is no use in a supervisor."""
ACCEPT_AGAIN = 0.1
"""Seconds until a server is let in that could not be."""
SPARE = 0.005
"""Seconds from a start to the next child in waiting: the one that has just executed is to have the processors."""
_EXAMPLE = protocol.encode(Call(0, Start(id=0, attempt=0, root="", argv=["/"], logfile="", mark="")))
_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC


def run(site: Site) -> NoReturn:
    """Be the supervisor of a site, in a process that is detached and has one thread. Where one works already, end."""
    status = 1
    try:
        process.close_all_but()
        with contextlib.suppress(FileExistsError):
            os.mkdir(site.supervisor_dir, 0o700)  # in a run directory that is gone there is nothing to supervise
        _open_standard_files(site)
        directory = os.open(site.supervisor_dir, _DIRECTORY)
        if not claim.recall(directory, surroundings.mark(site)) and (lock := claim.lock(directory)) is not None:
            _leave_service(site)
            _work(site, lock, claim.listen(directory))
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(status)


def succeed(site: Site, lock: int, listener: int) -> NoReturn:
    """Be the supervisor of a site in the process that was it until now, and has executed this program (Upgrade): it
    has the lock, and the socket, and the containers are its children."""
    status = 1
    try:
        process.name(claim.NAME)
        process.close_all_but(lock, listener)
        _work(site, lock, socket.socket(fileno=listener))
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(status)


def _open_standard_files(site: Site) -> None:
    """No input; what goes to stdout and stderr is for whoever looks for a bug."""
    null = os.open(os.devnull, os.O_RDONLY)
    log = os.open(f"{site.supervisor_dir}/{protocol.LOG}", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    if os.fstat(log).st_size > LONGEST_LOG:
        os.truncate(log, 0)
    for ours, number in ((null, 0), (log, 1), (log, 2)):
        os.dup2(ours, number)
    process.close_all_but()


def _leave_service(site: Site) -> None:
    """Be in no unit that ends before the host does. Where that fails, its KillMode= decides over the containers."""
    try:
        scope.join(site.scope, os.getpid())
    except OSError as error:
        print(f"{site.scope}: {error}; containers stay in the control group of the server", file=sys.stderr, flush=True)


def _work(site: Site, lock: int, listener: socket.socket) -> None:
    """Become what a supervisor is, and serve."""
    os.umask(0o022)
    os.chdir("/")
    time.localtime()  # the time zone's file is out of sight soon
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    process.renounce()
    for descriptor in (lock, listener.fileno()):
        os.set_inheritable(descriptor, False)
    listener.setblocking(False)
    supervisor = Supervisor(surroundings.open_all(site), lock, listener)
    supervisor.adopt()
    listener.listen(BACKLOG)
    gc.collect()
    gc.freeze()
    supervisor.serve()


class Client:
    """A server's connection. One that does not take what it is told is dropped: it can come again and ask."""

    def __init__(self, channel: socket.socket, drop: Callable[[Client], None]) -> None:
        channel.setblocking(False)
        self.channel = channel
        self.greeted = False
        self._drop = drop

    def tell(self, number: int, answer: Answer) -> None:
        try:
            self.channel.send(protocol.encode(Reply(number, answer)))
        except OSError:
            self._drop(self)


class Supervisor:
    """The containers of a site, and the servers that ask about them."""

    def __init__(self, around: Surroundings, lock: int, listener: socket.socket) -> None:
        self._around = around
        self._lock = lock
        self._loop = around.loop
        self._loop.at_rest = self._at_rest
        self._listener = listener
        self._clients: set[Client] = set()
        self._containers: dict[int, Container] = {}
        self._spare: Child | None = None
        self._verbs: dict[type[Any], Callable[[Any], Answer]] = {
            Hello: self._hello,
            Upgrade: self._upgrade,
            List: self._list,
            Signal: self._signal,
            Kill: self._kill,
            Forget: self._forget,
            Quit: self._quit,
        }

    def adopt(self) -> None:
        """Take up the lives that another supervisor noted, and clear away what it left of others."""
        for entry in entries.load(self._around.directory, self._around.boot_id):
            self._adopt(entry)
        living = {one.entry.name for one in self._containers.values() if one.open}
        output.sweep(self._around.directory, living)
        for name in self._around.keep.names():
            if name not in living:
                self._around.keep.unpark(name)
                self._around.keep.drop_host(name)
        used = {group for one in self._containers.values() if one.life.running for group in one.entry.groups}
        self._around.groups.sweep(name_of(self._around.mark_prefix), used)

    def _adopt(self, entry: Entry) -> None:
        container = Container(self._around, self._on_news)
        self._containers[entry.life.id] = container
        container.adopt(entry)

    def serve(self) -> None:
        """Serve until somebody says Quit, or nobody is left to serve."""
        self._watch_listener()
        self._loop.on_signal(signal.SIGHUP, self._restore)
        self._loop.after(FIRST_CLIENT, self._rest)
        self._bear_spare()
        self._loop.run()

    def _running(self) -> list[int]:
        return [container.life.id for container in self._containers.values() if container.open]

    def _rest(self) -> None:
        """End when there is nothing to do: what is known of ended lives is on disk."""
        if not self._clients and not self._running():
            self._end()

    def _bear_spare(self) -> None:
        """Have a child in waiting for the next start; without one that takes longer. One that ends is cleared away."""
        if self._spare is None:
            with contextlib.suppress(OSError):
                self._spare = self._around.nursery.bear()
                self._loop.watch(self._spare.pidfd, self._dismiss_spare)
                self._rehearse(self._spare)

    def _at_rest(self) -> None:
        """Give back what only a start that comes soon is the faster for."""
        if self._spare is not None and self._spare.lender is not None:
            self._spare.lender.end()
            self._spare = self._spare._replace(lender=None)
        memory.forget_code(self._around.nursery.given.code)

    def _dismiss_spare(self) -> None:
        spare, self._spare = self._spare, None
        if spare is not None:
            self._loop.unwatch(spare.pidfd)
            self._around.nursery.dismiss(spare)

    def _rehearse(self, spare: Child) -> None:
        """Do once what a start does to memory: after the clone of a child each page is copied when it is first written
        to, and nobody waits for that now."""
        order = protocol.decode_call(_EXAMPLE).body
        assert isinstance(order, Start)
        Container(self._around, self._on_news).rehearse(order, spare)
        protocol.encode(Reply(0, Started(0, 0, 0, 0)))

    def _end(self) -> None:
        self._loop.stop()
        self._dismiss_spare()
        with contextlib.suppress(OSError):  # whoever has removed it by hand keeps nobody alive by that
            os.unlink(protocol.SOCKET, dir_fd=self._around.directory)
        self._around.keep.remove()

    # -------------------------------------------------------------------------------------------------- clients

    def _watch_listener(self) -> None:
        self._loop.watch(self._listener.fileno(), self._accept)

    def _accept(self) -> None:
        """Let a server in. Where there is nothing left to do that with (EMFILE, ENOMEM), it waits a little."""
        try:
            self._let_in(self._listener.accept()[0])
        except (BlockingIOError, ConnectionAbortedError):
            pass
        except OSError:
            self._loop.unwatch(self._listener.fileno())
            self._loop.after(ACCEPT_AGAIN, self._watch_listener)

    def _let_in(self, channel: socket.socket) -> None:
        client = Client(channel, self._drop)
        self._loop.watch(channel.fileno(), lambda: self._hear(client))
        self._clients.add(client)

    def _drop(self, client: Client) -> None:
        if client in self._clients:
            self._clients.discard(client)
            self._loop.unwatch(client.channel.fileno())
            client.channel.close()
            self._restore()
            self._loop.after(IDLE, self._rest)

    def _restore(self) -> None:
        """Make again what somebody has removed: the logs' directory, and that without which the next server, or
        supervisor, would not find us and the containers. The child in waiting has what was removed, too."""
        with contextlib.suppress(OSError):
            renewed = self._restore_keep() | self._around.logs.renew_if_gone()
            if not claim.stands(self._around.directory, self._lock):
                renewed |= self._claim_again(self._around.directory)
            if renewed:
                self._dismiss_spare()
                self._bear_spare()

    def _restore_keep(self) -> bool:
        """Whether there was anything to be made again. Raises: OSError."""
        keep = self._around.keep
        if keep.is_whole():
            return False
        keep.restore()
        for container in self._containers.values():
            container.park()
        return True

    def _claim_again(self, directory: int) -> bool:
        """False where another supervisor was quicker, which has all then. Raises: OSError."""
        if (lock := claim.renew(directory, self._lock)) is None:
            return False
        self._lock = lock
        self._loop.unwatch(self._listener.fileno())
        self._listener.close()
        self._listener = claim.listen(directory)
        self._listener.setblocking(False)
        self._listener.listen(BACKLOG)
        self._watch_listener()
        for container in self._containers.values():
            if not container.starting:
                entries.save(directory, container.entry)
        return True

    def _hear(self, client: Client) -> None:
        try:
            data, descriptors = protocol.receive(client.channel)
        except BlockingIOError:
            return
        except ConnectionResetError:
            data, descriptors = b"", []
        try:
            if data:
                self._take(client, data, descriptors)
            else:
                self._drop(client)
        finally:
            for descriptor in descriptors:
                os.close(descriptor)

    def _take(self, client: Client, data: bytes, descriptors: list[int]) -> None:
        """Do what a packet asks for, and answer it."""
        try:
            call = protocol.decode_call(data)
        except msgspec.MsgspecError:
            self._drop(client)
            return
        try:
            self._answer(client, call, descriptors)
        except errors.Problem as problem:
            client.tell(call.number, Failed(problem.to_dict()))
        except OSError as error:
            step = f"{type(call.body).__name__.lower()} of a container"
            client.tell(call.number, Failed(errors.from_oserror(error, step).to_dict()))
        except MemoryError:
            client.tell(call.number, Failed(errors.no_memory("the supervisor").to_dict()))
        except Exception as bug:
            traceback.print_exc()
            client.tell(call.number, Failed(errors.Problem(f"the supervisor has a bug: {bug!r}").to_dict()))

    def _answer(self, client: Client, call: Call, descriptors: list[int]) -> None:
        if isinstance(call.body, Start):
            self._start(client, call.number, call.body, descriptors)
            return
        answer = self._verbs[type(call.body)](call.body)
        client.greeted |= isinstance(call.body, Hello) and call.body.version == protocol.VERSION
        client.tell(call.number, answer)

    # ---------------------------------------------------------------------------------------------------- verbs

    def _hello(self, hello: Hello) -> Answer:
        self._around.logs.limit = hello.log_limit
        self._restore()
        return Welcome(protocol.VERSION, os.getpid(), protocol.RELEASE)

    def _upgrade(self, order: Upgrade) -> Answer:
        """Become another program, whose children the containers still are; what it must know of them is on disk.

        Raises: errors.Problem, and then all is as before.
        """
        if starting := [container.life.id for container in self._containers.values() if container.starting]:
            raise errors.Conflict(f"containers are being started: {', '.join(map(str, starting))}")
        self._dismiss_spare()
        for container in self._containers.values():
            container.end_lender()
        handed_on = (self._lock, self._listener.fileno())
        try:
            with self._around.keep.outside():
                for descriptor in handed_on:
                    os.set_inheritable(descriptor, True)
                os.execve(order.argv[0], [*order.argv, *map(str, handed_on)], order.environment)
        except OSError as error:
            for descriptor in handed_on:
                os.set_inheritable(descriptor, False)
            self._bear_spare()
            raise errors.from_oserror(error, f"upgrading the supervisor to {order.argv[0]}") from None

    def _start(self, client: Client, number: int, order: Start, descriptors: list[int]) -> None:
        if len(descriptors) != 2:
            raise errors.Problem(
                f"a start needs a mount namespace and a directory, and had {len(descriptors)} descriptors"
            )
        found = self._containers.get(order.id)
        if found is not None and found.life.running:
            raise errors.Conflict(f"container {order.id} has a process already: {found.life.pid}")
        if not self._around.keep.is_whole():
            self._restore()
        container = Container(self._around, self._on_news)
        spare, self._spare = (None, self._spare) if order.systemd else (self._spare, None)
        try:
            container.start(order, descriptors, spare, lambda answer: self._on_started(client, number, answer))
        except BaseException:
            self._bear_spare()
            raise
        if found is not None:
            found.give_way()
        self._containers[order.id] = container

    def _on_started(self, client: Client, number: int, answer: Answer) -> None:
        client.tell(number, answer)
        self._loop.after(SPARE, self._bear_spare)

    def _list(self, order: List) -> Answer:
        found = sorted(number for number in self._containers if number > order.above)
        lives = [self._containers[number].told() for number in found[: protocol.PAGE]]
        return Lives(lives, more=len(found) > protocol.PAGE)

    def _signal(self, order: Signal) -> Answer:
        self._living(order).signal(order.signal)
        return Done()

    def _kill(self, order: Kill) -> Answer:
        self._living(order).kill()
        return Done()

    def _living(self, order: Signal | Kill) -> Container:
        """The life that an order is about. One that has ended takes every order: it has nothing to do.

        Raises: errors.NotFound.
        """
        found = self._containers.get(order.id)
        if found is None or found.life.attempt != order.attempt:
            raise errors.NotFound(f"container {order.id} has no start {order.attempt}")
        return found

    def _forget(self, order: Forget) -> Answer:
        found = self._containers.get(order.id)
        if found is None:
            entries.remove(self._around.directory, order.id)  # that of a start that failed, and could not be removed
        if found is None or found.life.attempt != order.attempt:
            return Done()
        if found.life.running:
            raise errors.Conflict(f"container {order.id} runs, as process {found.life.pid}")
        found.forget()
        del self._containers[order.id]
        return Done()

    def _quit(self, _: Quit) -> Answer:
        if running := self._running():
            raise errors.Conflict(f"containers run: {', '.join(map(str, running))}")
        self._end()
        return Done()

    def _on_news(self, container: Container, news: Ended | LogTrouble | None) -> None:
        if not self._clients:
            self._loop.after(IDLE, self._rest)
        if news is None:
            if self._containers.get(container.life.id) is container:
                del self._containers[container.life.id]
            return
        for client in [one for one in self._clients if one.greeted]:
            client.tell(0, news)
