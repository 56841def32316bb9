"""Promises that classes make of methods, and whether a subclass still keeps them."""


def is_kept(part: object, promise: str, *about: str) -> bool:
    """Whether what `promise` says still holds of `part`: nobody below its author has overridden what it is about.

    A class that says ``divergence = True`` says it of its own `layer_energy`. A subclass that writes another
    `layer_energy` and is silent about `divergence` inherits the attribute, as Python has it, and not its truth.

    Args:
        part: the object that is asked.
        promise: the attribute or method that says something of others.
        about: the methods that it says it of.
    """
    author = _author(part, promise)
    return all(author <= _author(part, name) for name in about)


def _author(part: object, name: str) -> int:
    """How far up the class is that defines the name: 0 is the object itself, 1 its class; bases come later."""
    levels = (part, *type(part).__mro__)
    return next((k for k, level in enumerate(levels) if name in getattr(level, "__dict__", ())), len(levels))
