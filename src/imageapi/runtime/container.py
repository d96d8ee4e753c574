"""One life of a container, as its supervisor sees it: cloned or adopted, executed, ended.

Everything is driven by descriptors that become readable, and nothing waits: the tie says how the exec went, the pidfd
that the process has ended, the FIFO that there is output. An end is read, written to disk, and only then reaped.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import time
from collections.abc import Callable, Sequence

import msgspec

from imageapi import errors
from imageapi.linux import cgroup, pidfd
from imageapi.runtime import entries, init, output
from imageapi.runtime.child import Child
from imageapi.runtime.clock import now
from imageapi.runtime.entries import Entry
from imageapi.runtime.groups import name_of
from imageapi.runtime.lender import Lender
from imageapi.runtime.loop import Timer
from imageapi.runtime.protocol import Answer, Ended, Failed, Life, LogTrouble, Start, Started, encode
from imageapi.runtime.surroundings import Surroundings

NOTE_AGAIN = 0.5
"""Seconds until an end that could not be written is tried again."""
NOTES = 16
"""How many messages of systemd's are taken in one turn."""
OPEN_GATE = b"\n"
KILLED_BEFORE = "its process was killed before it could execute the command, which dmesg may explain; ask again"
FAILED_BY_ITSELF = (BrokenPipeError,)
"""What one meets who orders a child that was just born and has failed; it has said why, which is read as ever."""


class Container:
    """A life. `tell` is called with its news: once when it is over and its end on disk, or with None for a start that
    failed, of which nothing is left; and when its log does not take what it prints, or does so again."""

    __slots__ = (
        *("_around", "_tell", "_answer", "_tie", "_deadline", "_problem", "_pidfd", "_output", "_notify", "_lender"),
        *("_ours", "_parked", "_unnoted", "_ended_before_gate", "entry"),
    )

    def __init__(self, around: Surroundings, tell: Callable[[Container, Ended | LogTrouble | None], None]) -> None:
        self._around = around
        self._tell = tell
        self._answer: Callable[[Answer], None] | None = None
        self._tie: socket.socket | None = None
        self._deadline: Timer | None = None
        self._problem: errors.Problem | None = None
        self._pidfd = -1
        self._output: output.Copier | None = None
        self._notify: socket.socket | None = None
        self._ours = self._parked = self._ended_before_gate = False
        self._lender: Lender | None = None
        self._unnoted: Timer | None = None
        self.entry: Entry

    @property
    def life(self) -> Life:
        return self.entry.life

    @property
    def open(self) -> bool:
        """Whether it lives, or its end is not on disk yet."""
        return self.life.running or self._unnoted is not None

    @property
    def starting(self) -> bool:
        """Whether somebody still waits to hear that the command was executed, or was not."""
        return self._answer is not None

    def told(self) -> Life:
        """The life as it is told to who asks what there is."""
        starting = self.starting or self._unexecuted
        return msgspec.structs.replace(self.life, starting=starting, log_trouble=self._log_trouble)

    @property
    def _unexecuted(self) -> bool:
        """Whether a life that another supervisor began has not executed its command, or has ended without."""
        life = self.life
        return life.starting and (not life.running or self._waits())

    def _waits(self) -> bool:
        return output.is_unexecuted(self._around.directory, self.entry.name)

    # -------------------------------------------------------------------------------------------------- a start

    def start(self, order: Start, place: Sequence[int], spare: Child | None, answer: Callable[[Answer], None]) -> None:
        """Have a child become the container, `spare` if it is of use. `place` are the descriptors that came with the
        order. `answer` is called when it has, or has failed to.

        Raises: OSError, errors.Problem, when there is no child; nothing is left then.
        """
        self._answer = answer
        orders = init.Orders(order, self._around.uuid(order.id))
        if order.systemd:
            self._bear_systemd(orders, place)
        elif spare is None or not self._order_spare(spare, orders, place):
            self._order(self._around.nursery.bear(), orders, place, forgiven=FAILED_BY_ITSELF)
        self._begin(order)

    def _order_spare(self, spare: Child, orders: init.Orders, place: Sequence[int]) -> bool:
        """Whether it has its orders now; if not, it is gone."""
        try:
            self._order(spare, orders, place)
        except OSError:
            return False
        return True

    def _bear_systemd(self, orders: init.Orders, place: Sequence[int]) -> None:
        """Order a child of its own cgroups."""
        groups, name = self._around.groups, name_of(f"{orders.start.mark}-{orders.start.attempt}")
        with contextlib.ExitStack() as passing, contextlib.ExitStack() as undo:
            undo.callback(groups.remove, groups.paths(name))
            born_in = groups.make_birthplace(name)
            passing.callback(os.close, born_in)
            child = self._around.nursery.bear(name, born_in)
            with contextlib.ExitStack() as alone:
                alone.callback(self._around.nursery.dismiss, child)
                place = (*place, self._open_host(child.name, passing, undo))
                alone.pop_all()
            self._order(child, orders, place, groups.paths(name), forgiven=FAILED_BY_ITSELF)
            undo.pop_all()

    def _open_host(self, name: str, passing: contextlib.ExitStack, undo: contextlib.ExitStack) -> int:
        """The directory that systemd gets to notify us, as a tree."""
        undo.callback(self._around.keep.drop_host, name)
        self._notify = self._around.keep.listen(name)
        undo.callback(self._notify.close)
        host = self._around.keep.host_tree(name)
        passing.callback(os.close, host)
        return host

    def rehearse(self, order: Start, child: Child) -> None:
        """Write down, for nobody, what a start of this child would."""
        encode(init.Orders(order, self._around.uuid(order.id)))
        entries.encode(self._entry(order, child, []))

    def _entry(self, order: Start, child: Child, groups: list[str]) -> Entry:
        return Entry(
            life=Life(id=order.id, attempt=order.attempt, pid=child.pid, start_time=_ticks()),
            name=child.name,
            boot_id=self._around.boot_id,
            born=child.born,
            inode=child.inode,
            logfile=order.logfile,
            groups=groups,
        )

    def _order(
        self,
        child: Child,
        orders: init.Orders,
        place: Sequence[int],
        groups: Sequence[str] = (),
        forgiven: Sequence[type[OSError]] = (),
    ) -> None:
        """Watch a child, and then give it its orders: once it has them it may wait for storage, and who ends it waits
        as well.

        Raises: OSError, and then it is gone.
        """
        with contextlib.ExitStack() as undo:
            undo.callback(self._dismiss, child)
            self._take(child, self._entry(orders.start, child, list(groups)))
            with contextlib.suppress(*forgiven):
                child.order(orders, place)
            undo.pop_all()

    def _take(self, child: Child, entry: Entry) -> None:
        self._ours, self._parked, self.entry = True, child.parked, entry
        self._pidfd, self._tie, self._lender = child.pidfd, child.tie, child.lender
        self._output = self._copier(child.output, 0)
        self._watch()
        self._around.loop.watch(child.tie.fileno(), self._on_tie)
        if child.lender is not None:
            self._around.loop.watch(child.lender.pidfd, self.end_lender)

    def _dismiss(self, child: Child) -> None:
        """Have nothing of a child that has no orders."""
        self._unwatch()
        self._pidfd, self._tie, self._lender, self._output = -1, None, None, None
        self._around.nursery.dismiss(child)

    def _begin(self, order: Start) -> None:
        """The child has its orders: put it on disk, and open its gate."""
        assert self._tie is not None
        self._deadline = self._around.loop.after(order.timeout, lambda: self._give_up(order))
        self._open_gate(self._tie)

    def _open_gate(self, tie: socket.socket) -> None:
        try:
            entries.save(self._around.directory, self.entry)
            tie.send(OPEN_GATE)
        except (BrokenPipeError, ConnectionResetError):
            self._ended_before_gate = True  # it has failed by itself, and said why, or was killed
        except OSError as error:
            self._fail(errors.from_oserror(error, "noting the container's process"))
        except MemoryError:
            self._fail(errors.no_memory("noting the container's process"))

    def end_lender(self) -> None:
        """Have no process but the container's own."""
        if self._lender is not None:
            self._around.loop.unwatch(self._lender.pidfd)
            self._lender.end()
            self._lender = None

    def _watch(self) -> None:
        loop = self._around.loop
        loop.watch(self._pidfd, self._on_end)
        if self._output is not None:
            loop.watch(self._output.end, self._output.copy)
        if self._notify is not None:
            loop.watch(self._notify.fileno(), self._on_notify)

    def _unwatch(self) -> None:
        """Watch nothing of what was watched of a child."""
        ends = {self._pidfd, -1 if self._lender is None else self._lender.pidfd}
        ends |= {channel.fileno() for channel in (self._tie, self._notify) if channel is not None}
        ends |= set() if self._output is None else {self._output.end}
        for descriptor in ends:
            self._around.loop.unwatch(descriptor)

    def _on_tie(self) -> None:
        """The child has executed, which closes its end, or says why it has not."""
        if self._tie is None:
            return
        said = self._listen_to(self._tie)
        if (trouble := init.trouble_in(said)) and self._output is not None:
            self._output.miss(trouble)
            return
        self._cut_tie()
        if self._problem is not None:
            return
        if said:
            self._problem = errors.from_dict(msgspec.json.decode(said))
        elif said is None or self._ended_before_gate or not pidfd.has_executed(self.life.pid):
            self._problem = errors.Problem(KILLED_BEFORE)
        else:
            life = msgspec.structs.replace(self.life, start_time=_ticks())
            self.entry = msgspec.structs.replace(self.entry, life=life)
            self._say(Started(life.id, life.attempt, life.pid, life.start_time, self._log_trouble or 0))
        self._hurry_lender()

    def _hurry_lender(self) -> None:
        if self._lender is not None:
            self._lender.hurry()

    @staticmethod
    def _listen_to(tie: socket.socket) -> bytes | None:
        """What the child says; b"" when it has passed the gate and closed its end, as an exec and its end do, None when
        it ended before it.

        A child that ends with our word unread leaves ECONNRESET, which is told before the word that it left for us.
        """
        try:
            return tie.recv(1 << 16)
        except ConnectionResetError:
            return tie.recv(1 << 16) or None

    def _cut_tie(self) -> None:
        if self._tie is not None:
            self._around.loop.unwatch(self._tie.fileno())
            self._tie.close()
            self._tie = None
        if self._deadline is not None:
            self._deadline.cancel()

    def _fail(self, problem: errors.Problem) -> None:
        """Give the start up; the answer is given when the child is gone."""
        self._problem = problem
        self._cut_tie()
        self.kill()

    def _give_up(self, order: Start) -> None:
        """The exec has not come back: answer, and let the process end when its storage lets it."""
        self._fail(
            errors.TimedOut(
                f"{order.argv[0]} could not be read from the image in {order.timeout:g}s; its storage does not answer: "
                "see to that, and ask again"
            )
        )
        self._say(self._failure())

    def _failure(self) -> Failed:
        assert self._problem is not None
        return Failed(self._problem.to_dict())

    def _say(self, answer: Answer) -> None:
        if self._answer is not None:
            self._answer(answer)
            self._answer = None

    # ------------------------------------------------------------------------------------------------- adoption

    def adopt(self, entry: Entry) -> None:
        """Take up a life that another supervisor began; it may have ended since."""
        self.entry = entry
        if not entry.life.running:
            self._around.groups.remove(entry.groups)
            return
        life = msgspec.structs.replace(entry.life, start_time=_ticks(), starting=self._waits())
        self.entry = msgspec.structs.replace(entry, life=life)
        found = self._around.keep.parked(entry.name)
        self._parked = found is not None
        if found is None:
            found = _open_same(entry)
        if found is None:
            self._finish(None)
            return
        self._pidfd, self._ours = found, pidfd.is_child(found)
        self._reopen()
        self._watch()
        if not self._parked:
            self.park()

    def park(self) -> None:
        """Have the next supervisor learn of the end, if the process has not ended yet and the kernel can."""
        if self.life.running:
            self._parked = self._around.keep.park(self._pidfd, self.entry.name)

    def _reopen(self) -> None:
        directory, name = self._around.directory, self.entry.name
        try:
            end = output.reopen(directory, name)
        except FileNotFoundError:
            end = output.recover(self.life.pid, name) or output.make(directory, name, output.EXECUTED)
        self._output = self._copier(end, None)
        if self.entry.groups:
            self._notify = self._around.keep.listen(self.entry.name)

    # -------------------------------------------------------------------------------------------- while it lives

    def signal(self, number: int) -> None:
        """Send the first process a signal; one that has ended needs none."""
        if self.life.running:
            with contextlib.suppress(ProcessLookupError):
                pidfd.send_signal(self._pidfd, number)

    def kill(self) -> None:
        """SIGKILL for the first process: the kernel ends all others with it. It reaches no frozen one."""
        self._thaw()
        self.signal(signal.SIGKILL)

    def _thaw(self) -> None:
        if self._around.freezer is None:
            return
        with contextlib.suppress(OSError):  # the process may be gone
            groups = cgroup.own_groups(self.life.pid)
            group = next((path for name, path in groups.items() if "freezer" in name.split(",")), "/")
            if group != "/":
                cgroup.thaw(self._around.freezer, group.lstrip("/"))

    def _copier(self, end: int, trouble: int | None) -> output.Copier:
        who = f"container({self.life.id})"
        return output.Copier(end, self._around.logs, self.entry.logfile, who, self._on_log_trouble, trouble)

    @property
    def _log_trouble(self) -> int | None:
        """The errno for which its log does not take what it prints, or 0; None while that is not known."""
        return 0 if self._output is None else self._output.trouble

    def _on_log_trouble(self, trouble: int) -> None:
        self._tell(self, LogTrouble(self.life.id, self.life.attempt, trouble))

    def _on_notify(self) -> None:
        """Take what systemd says off the socket: one that nobody reads blocks it for ever. A little in a turn: who
        says more than we can read is not to have all of us."""
        assert self._notify is not None
        with contextlib.suppress(BlockingIOError):
            for _ in range(NOTES):
                self._notify.recv(4096)

    # --------------------------------------------------------------------------------------------------- its end

    def _on_end(self) -> None:
        while self._tie is not None:
            self._on_tie()
        if self._ours:
            self._finish(self._wait(os.WEXITED | os.WNOWAIT))
            return
        status = pidfd.zombie_status(self.life.pid, self.entry.born)
        if status is None:
            status = pidfd.exit_info(self._pidfd)  # whoever is its parent has reaped it
        self._finish(None if status is None else _exit_code(status))

    def _wait(self, options: int) -> int:
        """The exit code of our child, which has ended."""
        found = os.waitid(os.P_PIDFD, self._pidfd, options)
        assert found is not None, "waitid(2) returns nothing only with WNOHANG"
        return found.si_status if found.si_code == os.CLD_EXITED else 128 + found.si_status

    def _finish(self, code: int | None) -> None:
        """The first process has ended, and so have all others: note it, tell of it, and reap it. What did not come to
        execute its command is told when nothing is left of it."""
        if not self.life.running:
            return
        if self._output is not None:
            self._output.drain()
        starting = self._unexecuted
        over = msgspec.structs.replace(self.life, running=False, exit_code=code, finished_at=now(), starting=starting)
        self.entry = msgspec.structs.replace(self.entry, life=over)
        failed = self._problem is not None and self._answer is not None
        if failed:
            with contextlib.suppress(OSError):  # whoever finds it asks for the process, which has ended
                entries.remove(self._around.directory, self.life.id)
        else:
            self._note()
            self._tell(self, Ended(over.id, over.attempt, code, over.finished_at or ""))
        if self._ours:
            self._wait(os.WEXITED)
        self._clear()
        if failed:
            self._say(self._failure())
            self._tell(self, None)

    def _note(self) -> None:
        """Write the end to disk, as soon as that takes it: nobody who waits for the end waits for that. Until then the
        pidfd stays parked, so that the next supervisor learns of the end, too."""
        try:
            entries.save(self._around.directory, self.entry)
        except OSError:
            self._unnoted = self._around.loop.after(NOTE_AGAIN, self._note_again)

    def _note_again(self) -> None:
        self._unnoted = None
        self._note()
        self._let_go()

    def _let_go(self) -> None:
        """Remove what is kept for the process, once its end is on disk."""
        if self._unnoted is None:
            self._around.nursery.clear(self.entry.name, parked=self._parked)

    def forget(self) -> None:
        """Nobody is to learn of the end any more.

        Raises: OSError, when what is on disk of it cannot be removed.
        """
        entries.remove(self._around.directory, self.life.id)
        self.give_way()

    def give_way(self) -> None:
        """Write nothing any more: the next life of the container has its entry."""
        if self._unnoted is not None:
            self._unnoted.cancel()
            self._unnoted = None
            self._let_go()

    def _clear(self) -> None:
        """Let go of all that only a living container needs."""
        around, loop = self._around, self._around.loop
        self._hurry_lender()
        if self._deadline is not None:
            self._deadline.cancel()
        for descriptor in (self._pidfd, -1 if self._output is None else self._output.end):
            if descriptor >= 0:
                loop.unwatch(descriptor)
                os.close(descriptor)
        self._pidfd, self._output = -1, None
        self._let_go()
        if self._notify is not None:
            loop.unwatch(self._notify.fileno())
            self._notify.close()
            self._notify = None
        if self.entry.groups:
            around.keep.drop_host(self.entry.name)
            around.groups.remove(self.entry.groups)


def _open_same(entry: Entry) -> int | None:
    """The pidfd of the very process an entry is about; None when that has ended and been reaped."""
    try:
        found = pidfd.pidfd_open(entry.life.pid)
    except ProcessLookupError:
        return None
    process = pidfd.look(entry.life.pid)
    if process is not None and process.began == entry.born and pidfd.inode(found) == entry.inode:
        return found
    os.close(found)
    return None


def _exit_code(status: int) -> int:
    """An exit code as the API shows it, from a wait status."""
    code = os.waitstatus_to_exitcode(status)
    return code if code >= 0 else 128 - code


def _ticks() -> int:
    """Clock ticks since the boot, as proc_pid_stat(5) counts them."""
    return int(time.clock_gettime(time.CLOCK_BOOTTIME) * os.sysconf("SC_CLK_TCK"))
