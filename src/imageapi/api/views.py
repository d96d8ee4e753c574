"""From a picture of an object to its JSON, in either form: pure functions, secrets masked.

The collection form shows everything an object stands on whole, all the way down; the kind form is flat, with plain ids.
"""

from __future__ import annotations

from typing import Any

import msgspec

from imageapi import spec
from imageapi.engine.graph import Picture
from imageapi.records import AnyRecord, Key, Run
from imageapi.spec import Attach, Attachment, Container, Mount, Spec

View = dict[str, Any]


def whole(picture: Picture) -> View:
    """The collection form."""
    return _whole(picture, picture.record)


def flat(picture: Picture, kind: str) -> View:
    """The form of the routes of `kind`: its own, or for an attach-mount its attachment's."""
    record = picture.record
    part = record.definition
    if isinstance(part, Attach) and kind != record.kind:
        view = _fields(record, lambda key: key.id)
        return {"id": record.id, f"{kind}_id": view.pop("attach"), **view, **_facts(picture, record)}
    return {"id": record.id, **_fields(record, lambda key: key.id), **_facts(picture, record)}


def _whole(picture: Picture, record: AnyRecord) -> View:
    def child(key: Key) -> Any:
        below = picture.below.get(key)
        return {"id": key.id} if below is None else _whole(picture, below)

    if isinstance(record.spec, Container):
        return _container(picture, record, child)
    fields = _fields(record, child)
    return {"id": record.id, "kind": record.kind, record.kind: fields, **_facts(picture, record)}


def _container(picture: Picture, record: AnyRecord, child: Any) -> View:
    asked, run = record.spec, record.run or Run()
    name = {"name": asked.name} if asked.name else {}
    return {
        "id": record.id,
        **name,
        "mount": child(record.edges()[0]),
        "command": asked.command,
        "systemd": asked.systemd,
        "state": run.state,
        "namespaces": asked.namespaces,
        "logfile": run.logfile,
        "refs": picture.refs[record.key],
        "pid": run.pid,
        "exit_code": run.exit_code,
        "created_at": run.created_at,
        "started_at": run.started_at,
        "finished_at": run.finished_at,
        **_problem(record),
    }


def _fields(record: AnyRecord, child: Any) -> View:
    """The kind's own object as it was asked for, what the server has learnt of it included."""
    part: Spec = record.definition
    view: View = {}
    for field in part.__struct_fields__:
        value = getattr(part, field)
        if field in spec.server_fields(type(part)):
            value = getattr(record.facts, field, None)
        if _is_said(part, field, value):
            view[field] = _value(value, child)
    return view


def _is_said(part: Any, field: str, value: Any) -> bool:
    """Whether a field has something to say: it is required, or differs from its default."""
    fields = type(part).__struct_fields__
    optional = fields[len(fields) - len(type(part).__struct_defaults__) :]
    if field not in optional:
        return True
    return bool(value != type(part).__struct_defaults__[optional.index(field)])


def _value(value: Any, child: Any) -> Any:
    if isinstance(value, Attachment | Mount):
        return child(Key(value.COLLECTION, value.id or 0))
    if isinstance(value, list):
        return [_value(item, child) for item in value]
    return msgspec.to_builtins(value, enc_hook=spec.masking_hook)


def _facts(picture: Picture, record: AnyRecord) -> View:
    place = "device_file" if record.key.collection == Attachment.COLLECTION else "mountpoint"
    found = getattr(record.facts, place)
    return {**({place: found} if found else {}), "refs": picture.refs[record.key], **_problem(record)}


def _problem(record: AnyRecord) -> View:
    return {"problem": record.problem} if record.problem else {}
