"""What every kind of attachment and mount provides: three verbs, six where a helper serves its objects, and what the
engine must know before it acts.

A driver is a module `drivers/attach/<kind>.py` or `drivers/mount/<kind>.py` with a class `Driver`. Its verbs run in a
worker process, where they may block; they hold nothing in memory between calls. `release` needs only the record, may
run days later, and is idempotent: it undoes a whole acquire, half of one, or nothing.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Sequence
from functools import cache
from typing import Any, Protocol

from imageapi.config import Site
from imageapi.drivers.audit import Host, Wrong, gone
from imageapi.errors import Unsupported
from imageapi.records import AnyRecord, Facts


class Driver(Protocol):
    """One kind."""

    def acquire(self, record: AnyRecord, inputs: Sequence[AnyRecord], site: Site) -> Facts:
        """Make the object in the kernel. `inputs` are the live records it stands on, in the order of its spec's
        `needs`. Leaves nothing when it fails.

        Raises: errors.Problem with the remedy; OSError for what only the kernel can explain.
        """
        ...

    def release(self, record: AnyRecord, site: Site) -> None:
        """Undo all that acquire made, and prove it: it returns only when the kernel has let go.

        Raises: errors.Conflict naming who holds it.
        """
        ...

    def observe(self, record: AnyRecord, site: Site) -> Facts | None:
        """What of the object stands in the kernel now; None when it is gone."""
        ...

    def audit(self, record: AnyRecord, site: Site, host: Host) -> Wrong | None:
        """What is wrong with a live object, if anything is: it is gone, or was changed by somebody else. Asks no
        storage, since it is done for all objects in one go."""
        ...

    def read_only(self, definition: Any) -> bool:
        """Whether nothing can be written through the object, so that it may be shared."""
        ...

    def identities(self, definition: Any) -> frozenset[object]:
        """What the image is known by. Two attachments that have one of these in common are of one image, and a second
        read-write one is refused; none where the kind has no such rule.

        Raises: errors.Invalid, about the definition.
        """
        ...

    def forced(self, definition: Any) -> bool:
        """Whether the definition asks to be attached beside a writer all the same."""
        ...

    def store(self, definition: Any) -> str:
        """The store whose failure would make this object's verbs hang: a limit on workers applies to each. A kind
        whose objects are copies, which need it only to be made, has a `copies` that is true."""
        ...


class HelpedDriver(Driver, Protocol):
    """A kind whose objects may have a `helper` in their facts: a process without which they are nothing."""

    def mend(self, record: AnyRecord, site: Site) -> tuple[Facts, str | None]:
        """Make the object work again, for those who stand on it, when its helper has ended or it was severed: what it
        is now, and a sentence about what cannot be made good.

        Raises: errors.Conflict when it never can be; any other problem when it may be tried again.
        """
        ...

    def sever(self, record: AnyRecord, site: Site) -> bool:
        """If the object's store is silent, have all that waits for it fail at once, so that its users can be ended; it
        is mended after that. False, and nothing done, where it answers, or something written might be lost."""
        ...

    def stands(self, record: AnyRecord, site: Site) -> bool:
        """Whether the kernel has the object still, though `observe` finds that nobody serves it."""
        ...


LOCAL_STORE = "local"


class Audited:
    """The audit of a kind whose `observe` asks no storage."""

    def audit(self: Driver, record: AnyRecord, site: Site, host: Host) -> Wrong | None:
        return gone() if self.observe(record, site) is None else None


class LocalDriver(Audited):
    """The defaults of a kind that touches this host alone."""

    def read_only(self, definition: Any) -> bool:
        return bool(getattr(definition, "ro", False))

    def identities(self, definition: Any) -> frozenset[object]:
        return frozenset()

    def forced(self, definition: Any) -> bool:
        return False

    def store(self, definition: Any) -> str:
        return LOCAL_STORE


@cache
def driver(collection: str, kind: str) -> Driver:
    """The driver of a kind.

    Raises: errors.Unsupported when this build has none.
    """
    name = f"imageapi.drivers.{collection}.{kind}"
    if importlib.util.find_spec(name) is None:
        raise Unsupported(f"the {collection} kind '{kind}' has no driver yet")
    found: Driver = importlib.import_module(name).Driver()
    return found
