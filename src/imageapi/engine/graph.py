"""All records, and who stands on whom.

References are computed here from the edges in the specs and from `pinned`, and from nothing else. Nothing here waits,
writes or asks the kernel, so each method is one step of the event loop.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator
from typing import NamedTuple

import msgspec

from imageapi import spec
from imageapi.errors import NotFound
from imageapi.records import AnyRecord, Key, Phase, snapshot


class Picture(NamedTuple):
    """An object as it is at one moment, with all it stands on, all the way down, and the edges and references of each.
    The pictures of a list share the tables."""

    key: Key
    records: dict[Key, AnyRecord]
    edges: dict[Key, list[Key]]
    refs: dict[Key, int]

    @property
    def record(self) -> AnyRecord:
        return self.records[self.key]


def describe(record: AnyRecord) -> str:
    """How a message names an object: `mount 1 (overlay)`, `container 0 (web)`."""
    name = record.spec.name if isinstance(record.spec, spec.Container) else record.kind
    return f"{record.key} ({name})" if name else str(record.key)


def fingerprint(record: AnyRecord) -> bytes:
    """What is the same for two objects that were asked for alike in every field, secrets included."""
    return record.key.collection.encode() + msgspec.json.encode(record.spec, enc_hook=spec.revealing_hook)


class Graph:
    """The records of one server. Ids are counted per collection from `first_id`."""

    def __init__(self, first_id: int = 0) -> None:
        self._records: dict[str, dict[Key, AnyRecord]] = {collection: {} for collection in spec.COLLECTIONS}
        self._following = dict.fromkeys(spec.COLLECTIONS, first_id)
        self._unused: set[Key] = set()
        self._edges: dict[Key, list[Key]] = {}
        self._holders: defaultdict[Key, set[Key]] = defaultdict(set)
        self._alike: defaultdict[bytes, set[Key]] = defaultdict(set)
        self._names: dict[str, Key] = {}
        self._tokens: set[int] = set()
        self._hidden: set[Key] = set()
        self._awaited: set[Key] = set()
        self.aside: set[Key] = set()
        """The objects whose records cannot be read: what there is of them is left alone."""

    # ------------------------------------------------------------------------------------------------ reading

    def find(self, key: Key) -> AnyRecord | None:
        return self._records[key.collection].get(key)

    def get(self, key: Key) -> AnyRecord:
        """The record, whether its create has succeeded or not.

        Raises: NotFound.
        """
        record = self.find(key)
        if record is None and key in self.aside:
            raise NotFound(f"the record of {key} cannot be read; imageapi-server --check says what can be done")
        if record is None:
            raise NotFound(f"there is no {key}")
        return record

    def visible(self, key: Key) -> AnyRecord:
        """The record, if its create has succeeded.

        Raises: NotFound.
        """
        if key in self._hidden:
            raise NotFound(f"there is no {key}")
        return self.get(key)

    def is_shown(self, key: Key) -> bool:
        """Whether the object's create has succeeded, or it is seen because something is wrong with it."""
        return key not in self._hidden

    def named(self, name: str) -> Key | None:
        """The container that has taken `name`."""
        return self._names.get(name)

    def all(self, collection: str | None = None) -> list[AnyRecord]:
        """The records of a collection, or of all, in order of id."""
        chosen = (collection,) if collection else tuple(self._records)
        return [record for one in chosen for record in self._records[one].values()]

    def shown(self, collection: str) -> list[AnyRecord]:
        """The objects of a collection whose create has succeeded, in order of id."""
        return list(self._shown(collection).values())

    def holders(self, key: Key) -> list[AnyRecord]:
        """The objects that stand on `key`, in order."""
        return [self.get(holder) for holder in sorted(self._holders.get(key, ()))]

    def held(self, key: Key, but: Collection[Key] = ()) -> bool:
        """Whether anything needs the object: its own POST, be it done or still under way, or an object built on it
        that is not among `but`."""
        wanted = self.get(key).pinned or key in self._awaited
        return wanted or any(holder not in but for holder in self._holders.get(key, ()))

    def refs(self, key: Key) -> int:
        return len(self._holders.get(key, ())) + self.get(key).pinned

    def kinds(self, record: AnyRecord) -> set[str]:
        """Every kind a reference may name the object by: an attach-mount also goes by its attachment's."""
        found = {record.kind}
        if isinstance(record.definition, spec.Attach):
            found |= {below.kind for key in record.edges() if (below := self.find(key))}
        return found

    def alike(self, record: AnyRecord) -> list[AnyRecord]:
        """The objects that were asked for just as `record` was, the oldest first."""
        return [self.get(key) for key in sorted(self._alike.get(fingerprint(record), ()))]

    def below(self, *keys: Key) -> Iterator[AnyRecord]:
        """All else that the objects stand on, all the way down, each once.

        Raises: NotFound.
        """
        found = {key: self.get(key) for key in keys}
        yield from (record for key, record in self._down_from(found).items() if key not in found)

    def picture(self, key: Key) -> Picture:
        """The object as it is now.

        Raises: NotFound.
        """
        return self._pictures({key: self.visible(key)})[0]

    def still(self, key: Key) -> Picture:
        """The object and all below it, kept as they are now.

        Raises: NotFound.
        """
        now = self.picture(key)
        return now._replace(records={one: snapshot(other) for one, other in now.records.items()})

    def pictures(self, collection: str) -> list[Picture]:
        """The objects of a collection whose create has succeeded, in order of id."""
        return self._pictures(self._shown(collection))

    def _shown(self, collection: str) -> dict[Key, AnyRecord]:
        return {key: record for key, record in self._records[collection].items() if key not in self._hidden}

    def _down_from(self, chosen: dict[Key, AnyRecord]) -> dict[Key, AnyRecord]:
        """These, and all that they stand on, all the way down."""
        records = dict(chosen)
        waiting = [edge for key in chosen for edge in self._edges[key]]
        for edge in waiting:
            if edge not in records and (record := self.find(edge)):
                records[edge] = record
                waiting += self._edges[edge]
        return records

    def _pictures(self, chosen: dict[Key, AnyRecord]) -> list[Picture]:
        records = self._down_from(chosen)
        refs = {key: len(self._holders.get(key, ())) + record.pinned for key, record in records.items()}
        edges = {key: self._edges[key] for key in records}
        return [Picture(key, records, edges, refs) for key in chosen]

    # ----------------------------------------------------------------------------------------------- changing

    def following(self, collection: str) -> int:
        """The id that the next object of the collection gets."""
        return self._following[collection]

    def counters(self) -> dict[str, int]:
        return dict(self._following)

    def count_on(self, following: dict[str, int]) -> None:
        """Let ids continue from `following` where that is further."""
        for collection, number in following.items():
            self._following[collection] = max(self._following[collection], number)

    def set_aside(self, keys: Iterable[Key]) -> None:
        """Let these be of objects that may be there, though their records cannot be read: no other gets their ids."""
        for key in keys:
            self.count_on({key.collection: key.id + 1})
            self.aside.add(key)

    def token_taken(self, token: int) -> bool:
        return token in self._tokens

    def add(self, record: AnyRecord, *, hidden: bool = False) -> None:
        """Enter a record and its edges. A hidden one takes its name and holds what it stands on, but is not shown
        before `show`."""
        key = record.key
        self._records[key.collection][key] = record
        self.count_on({key.collection: key.id + 1})
        self._tokens.add(record.token)
        self._alike[fingerprint(record)].add(key)
        self._edges[key] = record.edges()
        for edge in self._edges[key]:
            self._holders[edge].add(key)
        if isinstance(record.spec, spec.Container) and record.spec.name:
            self._names[record.spec.name] = key
        if hidden:
            self._hidden.add(key)

    def begin(self, key: Key) -> None:
        """A POST of its own makes the object, and needs it until `end`."""
        self._awaited.add(key)

    def end(self, key: Key) -> None:
        """The object's own POST has come to its end, in one way or the other."""
        self._awaited.discard(key)

    def show(self, key: Key) -> None:
        """The object's create has succeeded, or it must be seen because something is wrong with it."""
        self._hidden.discard(key)

    def remove(self, key: Key) -> None:
        """Take a record out, with its edges and its name. An id that was never shown is free again once none
        counted after it is in use."""
        record = self._records[key.collection].pop(key)
        self._tokens.discard(record.token)
        self._discard(self._alike, fingerprint(record), key)
        for edge in self._edges.pop(key):
            self._discard(self._holders, edge, key)
        self.free_name(record)
        if key in self._hidden:
            self._hidden.discard(key)
            self._reuse(key)

    def free_name(self, record: AnyRecord) -> None:
        """Let another container take the name, if it is still this one's."""
        name = getattr(record.spec, "name", None)
        if name and self._names.get(name) == record.key:
            del self._names[name]

    def _reuse(self, key: Key) -> None:
        self._unused.add(key)
        last = Key(key.collection, self._following[key.collection] - 1)
        while last in self._unused:
            self._unused.discard(last)
            self._following[key.collection] = last.id
            last = Key(key.collection, last.id - 1)

    @staticmethod
    def _discard(index: defaultdict[bytes, set[Key]] | defaultdict[Key, set[Key]], at: object, key: Key) -> None:
        """Take `key` out of one set of an index, and the set when it is empty."""
        entries: set[Key] = index[at]  # type: ignore[index]
        entries.discard(key)
        if not entries:
            del index[at]  # type: ignore[arg-type]


def standing(record: AnyRecord) -> bool:
    """Whether the object is there to be built on."""
    return record.phase is Phase.LIVE and record.problem is None
