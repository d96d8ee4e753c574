"""The options of an overlay, and whether the kernel has really taken them."""

from __future__ import annotations

from imageapi.errors import Invalid
from imageapi.linux.mountinfo import Mount
from imageapi.spec import Overlay, OverlayOptions

Options = list[tuple[str, str | None]]
"""Names and values as the kernel takes them; None for a flag."""

_PARAMETERS = "/sys/module/overlay/parameters"


def of(definition: Overlay) -> Options:
    """The options to mount with, but for the layers."""
    asked = definition.options or OverlayOptions()
    on = {"volatile": is_volatile(definition), "userxattr": asked.userxattr}
    flags: Options = [(name, None) for name in on if on[name]]
    switches = {"metacopy": _switch(asked.metacopy), "index": _switch(asked.index)}
    values = {**switches, "redirect_dir": asked.redirect_dir, "xino": asked.xino}
    return [*flags, *((name, value) for name, value in values.items() if value)]


def is_volatile(definition: Overlay) -> bool:
    """Whether nothing is synced to the upper: by default so, when it is thrown away."""
    asked = definition.options.volatile if definition.options else None
    return not definition.ro and (definition.upper is None if asked is None else asked)


def _switch(on: bool | None) -> str | None:
    return None if on is None else "on" if on else "off"


def check_taken(definition: Overlay, found: Mount) -> None:
    """Raises: errors.Invalid for an option that the kernel has turned off because a file system below cannot do it.
    It only logs that, and mounts; and shows in mountinfo what differs from its defaults."""
    shown = {name: value for name, _, value in (it.partition("=") for it in found.super_options.split(","))}
    for name in ("metacopy", "index", "xino"):
        if (name, "on") in of(definition) and shown.get(name, _default(name)) != "on":
            sentence = f"the file systems of these layers cannot do '{name}'; leave it out, or use others"
            raise Invalid(sentence, path=f"$.options.{name}")


def _default(name: str) -> str:
    """What holds where mountinfo shows nothing: `on` where the module's parameter says so. (`xino`, which is then
    `auto`, is never shown as such, nor turned on by default.)"""
    if name == "xino":
        return "auto"
    with open(f"{_PARAMETERS}/{name}") as file:
        return "on" if file.read().strip() == "Y" else "off"
