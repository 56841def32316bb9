"""Arguments that can be meant: each is checked where it is written, and refused in words.

`number`, `count`, `choice`, `flag` and `instance` return the value as the rest of the library wants it, so that a NumPy
scalar or a tensor of one number becomes a float or an int. The owner of an argument is an object, or a name.
"""

import difflib
import inspect
import math
import numbers
import sys
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any, NoReturn

from torch import Tensor

from lightning_ebm.errors import ConfigurationError

_LARGEST, _SMALLEST = 3.4e38, 1.2e-38
"""Of the numbers other than 0 that float32 holds with all of their digits: the states are no finer."""


def nearest(name: object, known: Collection[str]) -> list[str]:
    """Up to three names that a mistaken one may stand for: by its end ("1" for "net.1"), else by its letters."""
    ends = [one for one in known if f".{one}".endswith(f".{name}") or f".{name}".endswith(f".{one}")]
    return (ends or difflib.get_close_matches(str(name), known, n=3))[:3]


def number(
    owner: object,
    name: str,
    value: Any,
    wanted: str,
    *,
    above: float = -math.inf,
    least: float = -math.inf,
    most: float = math.inf,
    below: float = math.inf,
) -> float:
    """`value` as a float with above < value < below and least <= value <= most, finite and within float32.

    Args:
        owner: whose argument it is.
        name: of the argument.
        value: what came.
        wanted: what was expected, for the message: "a positive step size, such as 0.1".
        above: bound from below, itself left out.
        least: bound from below.
        most: bound from above.
        below: bound from above, itself left out.

    Raises:
        ConfigurationError: it is no number, or none within the bounds.
    """
    found = _real(value)
    if found is None:
        refuse(owner, name, value, f"{wanted}{_hint(value)}")
    if not (above < found < below and least <= found <= most):  # nan is not
        refuse(owner, name, value, wanted)
    if not math.isfinite(found) or (found and not _SMALLEST <= abs(found) <= _LARGEST):
        refuse(owner, name, value, f"{wanted}; float32, in which states are computed, holds no such number")
    return found


def count(owner: object, name: str, value: Any, least: int = 1, most: int = sys.maxsize, why: str = "") -> int:
    """`value` as an int, least <= value <= most.

    Args:
        owner: whose argument it is.
        name: of the argument.
        value: what came.
        least: the smallest that is allowed.
        most: the largest that is allowed.
        why: added to the message.

    Raises:
        ConfigurationError: it is no whole number, or none within the bounds.
    """
    number_of_one = value.item() if _is_number_tensor(value) else value
    whole = isinstance(number_of_one, numbers.Integral) and not isinstance(number_of_one, bool)
    if not whole or not least <= int(number_of_one) <= most:
        bounds = f"at least {least}" if most == sys.maxsize else f"at least {least} and at most {most}"
        refuse(owner, name, value, f"a whole number of {bounds}{why}{'' if whole else _hint(value)}")
    return int(number_of_one)


def handed_on(
    owner: object, given: Mapping[str, Any], *callables: Callable[..., Any], besides: Collection[str] = ()
) -> None:
    """Options that are handed on must be those of one of some callables; what is on or off there must be here.

    Args:
        owner: who takes them.
        given: the options.
        callables: who they are handed on to.
        besides: arguments of theirs that the owner gives itself.

    Raises:
        ConfigurationError: one is not.
    """
    taken = {name: one for made in reversed(callables) for name, one in inspect.signature(made).parameters.items()}
    known = {n: one for n, one in taken.items() if one.kind is not one.VAR_KEYWORD and n not in {"self", *besides}}
    for name, value in given.items():
        if name not in known:
            near = nearest(name, known)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            whose = type(owner).__name__
            raise ConfigurationError(f"{whose} has no option {name!r}.{hint} It hands on: {', '.join(known)}.")
        if isinstance(known[name].default, bool):
            flag(owner, name, value)


def choice(owner: object, name: str, value: Any, options: Iterable[str], why: str = "") -> Any:
    """`value`, one of the words.

    Raises:
        ConfigurationError: it is none of them.
    """
    words = [f'"{option}"' for option in options]
    if not isinstance(value, str) or f'"{value}"' not in words:
        refuse(owner, name, value, f"{', '.join(words[:-1])} or {words[-1]}{why}")
    return value


def flag(owner: object, name: str, value: Any) -> bool:
    """`value`, True or False; also NumPy's.

    Raises:
        ConfigurationError: it is something else, whose truth nobody has thought of.
    """
    if type(value).__name__ in ("bool", "bool_") and type(value).__module__ in ("builtins", "numpy"):
        return bool(value)
    refuse(owner, name, value, "True or False")


def instance(owner: object, name: str, value: Any, kind: type | tuple[type, ...], wanted: str) -> Any:
    """`value`, of a kind.

    Raises:
        ConfigurationError: it is something else.
    """
    if not isinstance(value, kind):
        refuse(owner, name, value, f"{wanted}, not {_kind(value)}")
    return value


def function(owner: object, name: str, value: Any, wanted: str) -> Any:
    """`value`, which can be called.

    Raises:
        ConfigurationError: it cannot.
    """
    if not callable(value):
        refuse(owner, name, value, f"{wanted}, not {_kind(value)}")
    return value


def is_word(value: Any, word: str) -> bool:
    """Whether it is that string: arrays answer `==` with arrays."""
    return isinstance(value, str) and value == word


def refuse(owner: object, name: str, value: Any, wanted: str) -> NoReturn:
    """Raises what all of these raise: `Owner(name=value): expected ...`."""
    argument = f"{name}={shown(value)}"
    whose = owner if isinstance(owner, str) else type(owner).__name__
    raise ConfigurationError(f"{f'{whose}({argument})' if whose else argument}: expected {wanted}.")


def shown(value: Any, most: int = 120) -> str:
    """A value as text, on one line and cut where it is long."""
    text = " ".join(repr(value).split())
    return text if len(text) <= most else f"{text[: most - 3]}..."


def keep(owner: object, **values: Any) -> None:
    """Sets attributes of a frozen dataclass, to what was checked."""
    for name, value in values.items():
        object.__setattr__(owner, name, value)


def _is_number_tensor(value: Any) -> bool:
    """Whether it is a tensor of one real number and no function of anything, whose gradient would be lost."""
    if not isinstance(value, Tensor) or value.ndim or value.requires_grad or value.is_complex():
        return False
    return value.device.type != "meta"


def _real(value: Any) -> float | None:
    """As a float; None where it is no real number."""
    value = value.item() if _is_number_tensor(value) else value
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        return None
    try:
        return float(value)
    except OverflowError:
        return math.inf


def _hint(value: Any) -> str:
    """What came, and what to write instead where that can be told."""
    if isinstance(value, str):
        try:
            meant = float(value)
        except ValueError:
            meant = math.nan
        if not math.isfinite(meant):
            return ", not text"
        mantissa, _, exponent = f"{meant:.12e}".partition("e")
        plain = f" or {meant:.15g}" if 1e-4 <= abs(meant) < 1e9 else ""
        written = f"{float(mantissa)}e{int(exponent):+d}{plain}" if "e" in value.lower() else f"{meant:.15g}"
        return f", not text. Write {written}, without quotation marks: YAML takes 1e-3, which has no point, for text"
    if isinstance(value, float) and value.is_integer():
        return f", not a float. Write {int(value)}"
    if isinstance(value, Tensor) and value.requires_grad:
        return ". This tensor has a gradient, which would be lost: give value.item()"
    return f", not {_kind(value)}"


def _kind(value: Any) -> str:
    if isinstance(value, type):
        return f"the class {value.__name__}"
    return "None" if value is None else type(value).__name__
