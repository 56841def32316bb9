"""Misspelt options and classes of a fit: one line that says which word is wrong, and the nearest that is right."""

import difflib
import inspect
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import lightning as L
import torch
import yaml
from lightning.pytorch.cli import LightningArgumentParser

import lightning_ebm as ebm
from lightning_ebm import checked
from lightning_ebm.recipes import data, modules, nets
from lightning_ebm.recipes.offered import Offering, internals, is_internal

__all__ = ["Parser", "check_names", "in_one_line"]


def public(kind: type, *homes: Any) -> dict[str, type]:
    """The classes that a user may name, by their short names; abstract ones and internals are not among them."""
    found = {name: value for home in homes for name, value in vars(home).items() if not name.startswith("_")}
    return {
        name: value
        for name, value in sorted(found.items())
        if isinstance(value, type) and issubclass(value, kind) and value is not kind and not inspect.isabstract(value)
    }


def kinds() -> dict[str, dict[str, type]]:
    """What may stand behind an option that takes a class."""
    return {
        "--energy": public(ebm.Energy, ebm),
        "--nudge": public(ebm.Nudge, ebm),
        "--relaxer": public(ebm.Relaxer, ebm),
        "--free_relaxer": public(ebm.Relaxer, ebm),
        "--data": public(L.LightningDataModule, data),
        "--model": public(L.LightningModule, modules),
        "--model.net": public(torch.nn.Module, nets, torch.nn),
        "--model.optimizer": public(torch.optim.Optimizer, torch.optim),
    }


def check_names(arguments: Sequence[str]) -> None:
    """Classes given by a short name must exist, and options of theirs must be theirs.

    Raises:
        ConfigurationError: one does not; with the nearest that does.
    """
    words = [part for word in arguments for part in (word.split("=", 1) if word.startswith("--") else [word])]
    chosen: dict[str, type] = {}
    allowed = {"--relaxer": ["auto"], "--nudge": ["auto"]}
    for option, value in zip(words, [*words[1:], ""], strict=True):
        if option in (known := kinds()):
            special = [*allowed.get(option, []), "null", "None"]
            if value in known[option]:
                chosen[option] = known[option][value]
            elif is_internal(value):
                raise ebm.ConfigurationError(f"{option} {_INTERNAL.format(value)}{_listing(list(known[option]))}")
            elif re.fullmatch(r"[A-Za-z_]\w*", value) and value not in special and not Path(value).exists():
                offered = [*known[option], *allowed.get(option, [])]
                raise ebm.ConfigurationError(
                    f"{option} {value}: there is no such class.{nearest(value, offered)}{_listing(offered)} A class"
                    " of yours is given with its module, my_package.MyClass."
                )
            elif re.fullmatch(r"[-+.]?\d.*", value):
                name = next(iter(known[option]))
                raise ebm.ConfigurationError(
                    f"{option} {value}: expected the name of a class; its settings follow by their own names, as in"
                    f" {option} {name} {option}.NAME {value}.{_listing(list(known[option]))}"
                )
        owner, _, name = option.rpartition(".")
        if owner in chosen and re.fullmatch(r"\w+", name):
            _check_option(option, name, chosen[owner])


def _check_option(option: str, name: str, owner: type) -> None:
    parameters = inspect.signature(owner).parameters
    if any(p.kind is p.VAR_KEYWORD for p in parameters.values()) or name in parameters:
        return
    raise ebm.ConfigurationError(
        f"{option}: {owner.__name__} has no option {name!r}.{nearest(name, parameters)} It has:"
        f" {', '.join(parameters)}."
    )


def nearest(word: str, known: Iterable[str]) -> str:
    """A sentence with the nearest of the known words; nothing if none is near."""
    found = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f" Did you mean {found[0]!r}?" if found else ""


def _listing(names: Sequence[str]) -> str:
    return f" There are: {', '.join(names)}." if len(names) < 30 else ""


def read_mapping(path: Path, keys: Sequence[str]) -> dict[str, Any]:
    """A YAML file of keys and values.

    Raises:
        ConfigurationError: it is something else.
    """
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ebm.ConfigurationError(f"{path} is no YAML file: {' '.join(str(error).split())}") from error
    if not isinstance(found, dict):
        raise ebm.ConfigurationError(f"{path}: expected a mapping with {', '.join(keys)}.")
    return found


def check_kinds(where: str, found: Mapping[str, Any], kinds: Mapping[str, type]) -> None:
    """Values must be of the kinds that their keys have, where they are given.

    Raises:
        ConfigurationError: one is not.
    """
    for key, kind in kinds.items():
        if key in found and (not isinstance(found[key], kind) or isinstance(found[key], bool)):
            word = "a mapping" if kind is dict else _plain(f"{kind}")
            raise ebm.ConfigurationError(f"{where}{key}={checked.shown(found[key])}: expected {word}.")


def in_one_line(trainer: Callable[..., L.Trainer], **settings: Any) -> L.Trainer:
    """A Trainer; what Lightning says of its arguments, by errors of several kinds, is one of ours.

    Raises:
        ConfigurationError: it cannot be built.
    """
    try:
        return trainer(**settings)
    except (RuntimeError, TypeError, ValueError) as error:
        if isinstance(error, ebm.EBMError):
            raise
        raise ebm.ConfigurationError(f"The Trainer could not be built: {error}") from error


def say_what_there_is(monitor: str, trainer: L.Trainer) -> None:
    """A line where the figure to be told was never logged, with those that were."""
    logged = sorted(trainer.callback_metrics)
    if trainer.is_global_zero and monitor not in logged:
        there = f" Logged were: {', '.join(logged)}." if logged else ""
        line = f"--monitor {monitor}: no validation logged that, so there is no result.json.{nearest(monitor, logged)}"
        print(line + there, file=sys.stderr)


class Parser(LightningArgumentParser):
    """Lightning's, whose errors are one line instead of its usage and a tree of types."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{"formatter_class": Offering, **kwargs})

    def parse_args(self, *args: Any, **kwargs: Any) -> Any:
        """Lightning's; a file that is no text, and a class that is none of the user's business, are said to be."""
        try:
            found = super().parse_args(*args, **kwargs)
        except UnicodeDecodeError as error:
            self.error(f"--config: the file is no text, and so no YAML file: {error}")
        for path in internals(found):
            self.error(_INTERNAL.format(path))
        return found

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Ends the process with status 2."""
        print(f"error: {self._in_words(message)}", file=sys.stderr)
        sys.exit(2)

    def _in_words(self, message: str) -> str:
        own = [option.lstrip("-") for action in self._actions for option in action.option_strings]
        if message.startswith("unrecognized arguments: "):
            given = message.removeprefix("unrecognized arguments: ").split()[0]
            if not given.startswith("-"):
                return f"{given!r} stands alone: settings are written --name value, or name=value."
            word = given.partition("=")[0].lstrip("-")
            for parser in getattr(self._subcommands_action, "_name_parser_map", {}).values():
                own += [option.lstrip("-") for action in parser._actions for option in action.option_strings]
            own += [option.lstrip("-") for option in kinds()]
            parts = {name.rpartition(".")[2]: name for name in own}  # "optimizer" finds "model.optimizer"
            near = difflib.get_close_matches(word, own, n=1, cutoff=0.8)
            near = near or [parts[part] for part in difflib.get_close_matches(word, parts, n=1, cutoff=0.75)]
            hint = f" Did you mean --{near[0]}?" if near else ""
            return f"There is no option --{word}.{hint} lightning-ebm fit --help shows the usual ones."
        if message.startswith("Unexpected config"):
            return (
                "--config: the file holds no settings by name, such as algorithm: pc-nudge. lightning-ebm recipes show"
                " digits prints one that does."
            )
        if found := re.search(r"Option '([\w.]+)' is not accepted", message):
            names = [name for name in own if name not in ("h", "help", "config")]
            return f"There is no option {found[1]!r} here.{nearest(found[1], names)} There are: {', '.join(names)}."
        if found := re.fullmatch(r"the following arguments are required: (.*)", message):
            if inner := [name for name in found[1].split(", ") if not name.startswith("fit.")]:
                return (
                    f"A class that is named needs a value for {' and '.join(inner)}: settings of a class follow by"
                    f" name, as in --relaxer CLASS --relaxer.{inner[0]} VALUE, or stand under init_args in a file."
                )
            needed = " and ".join(f"--{name.removeprefix('fit.')}" for name in found[1].split(", "))
            return f"A fit needs {needed}, on the command line or in a file: --config FILE."
        if found := re.search(
            r'Parser key "(\w+)":.*is abstract.*NestedArg\(key=\'(\w+)\', val=(.*)\)', message, re.DOTALL
        ):
            option, name, value = f"--{found[1]}", found[2], found[3].strip("'")
            return (
                f"{option}.{name} {value}: no class is named that has this setting. Name it first: {option} CLASS"
                f" {option}.{name} {value}.{_listing(list(kinds().get(option, ())))}"
            )
        if found := re.search(r"NestedArg\(key='([\w.]+)', val=(.*?)\)\W", f"{message} "):
            key = re.search(r'Parser key "([\w.]+)"', message)
            option, name, value = f"--{key[1]}" if key else "It", found[1], found[2].strip("'\"")
            own_option = f" Write --{name} {value}." if f"--{name.partition('.')[0]}" in kinds() else ""
            return f"{option} is one value, and has no setting {name!r}.{own_option}"
        return self._of_a_value(message)

    def _of_a_value(self, message: str) -> str:
        """What was expected in the words of people, where only plain types were."""
        expected = re.findall(r"Expected an? (.+?)(?:\. Got.*)?$", message, re.MULTILINE)
        plain = [words for kind in expected if (words := _plain(kind))]
        key, value = (re.search(p, message) for p in (r'Parser key "([\w.]+)"', r"(?:Given|Got) value: (.*)"))
        if key and value and plain and len(plain) == len(expected):
            write = f' Write {key[1]}="[{value[1]}]".' if _PLAIN["<class 'list'>"] in plain else ""
            return f"{key[1]}={value[1]}: expected {' or '.join(plain)}.{write}"
        if key and value and (kind := re.search(r"does not correspond to a subclass of (\w+)", message)):
            ways = " or ".join([*dict.fromkeys(plain), f"a class of the kind {kind[1]}, by its path"])
            return f"{key[1]}={value[1]}: expected {ways}."
        if key and value and "is abstract" in message:
            return f"{key[1]}={value[1]}: expected a class that can be made; this one is abstract, to be subclassed."
        if key and value and "Expected a dot import path string" in message:
            ways = " or ".join([*dict.fromkeys(plain), "a class by its path, my_package.MyClass"])
            return f"{key[1]}={value[1]}: expected {ways}."
        useful = [line for line in message.splitlines() if not _NOISE.search(line)]
        return " ".join(" ".join(useful).split())


def _plain(kind: str) -> str:
    """A type as people would say it; nothing for one that is not plain."""
    if found := re.fullmatch(r"typing\.Literal\[(.*)\]", kind):
        return f"one of {found[1]}"
    return _PLAIN.get(kind, "")


_PLAIN = {
    "<class 'int'>": "a whole number", "<class 'float'>": "a number", "<class 'bool'>": "true or false",
    "<class 'list'>": "a list", "<class 'tuple'>": "a list", "<class 'NoneType'>": "null", "<class 'str'>": "text",
}  # fmt: skip
_INTERNAL = "{} is internal, and made by this library alone."
_NOISE = re.compile(
    r"Does not validate against any|Subtypes:|Errors:|- Expected a <class '\S+'>$|Given value type|a path but"
)
