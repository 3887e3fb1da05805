"""Command-line arguments whose errors say what was seen, what is nearest to it, and where to look."""

from __future__ import annotations

import difflib
import inspect
import itertools
import re
import sys
from collections.abc import Callable, Iterable
from importlib import import_module, resources
from pathlib import Path
from typing import Any, NoReturn

from jsonargparse import ActionConfigFile, ArgumentParser  # type: ignore[attr-defined]


def nearest(seen: str, known: Iterable[str]) -> str:
    """'; did you mean ...?', or nothing if nothing known is near."""
    matches = difflib.get_close_matches(seen, list(known), n=1, cutoff=0.6)
    return f"; did you mean {matches[0]!r}?" if matches else ""


def packaged_configs() -> dict[str, Path]:
    """The configurations that come with wngen, by name."""
    folder = Path(str(resources.files("wngen.configs")))
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def config_path(name_or_path: str) -> Path:
    """The file of a configuration, given its name among the packaged ones or its path.

    Raises:
        ValueError: it is neither.
    """
    if Path(name_or_path).is_file():
        return Path(name_or_path)
    known = packaged_configs()
    if name_or_path not in known:
        hint = nearest(name_or_path, known) or "; `wngen configs` lists the packaged ones"
        raise ValueError(f"--config {name_or_path}: neither a file nor a packaged configuration{hint}")
    return known[name_or_path]


def summary(function: Callable[..., Any] | type) -> str:
    """First line of the docstring."""
    return (inspect.getdoc(function) or "").partition("\n")[0]


def value_of(flag: str, argv: list[str]) -> str | None:
    """The value after `flag`, or behind its equals sign."""
    for word, following in zip(argv, [*argv, None][1:], strict=True):
        if word == flag:
            return following
        if word.startswith(f"{flag}="):
            return word.partition("=")[2]
    return None


def general_first(argv: list[str]) -> list[str]:
    """`argv` with each `--config` first, then each option such as `--data` of which there are parts, `--data.path`.

    In this order jsonargparse wants them: a configuration read later would undo what was said before it, and of a
    class not yet named it knows no options.
    """
    groups = {word.partition(".")[0] for word in argv if word.startswith("--") and "." in word.partition("=")[0]}
    configs: list[str] = []
    wholes: list[str] = []
    others: list[str] = []
    words = iter(argv)
    for word in words:
        flag, equals, _ = word.partition("=")
        place = configs if flag == "--config" else wholes if flag in groups else others
        place.append(word)
        if place is not others and not equals:
            place.extend(itertools.islice(words, 1))  # its value
    return configs + wholes + others


def build(options: Any, **more: Any) -> Any:
    """An object from its `class_path` and `init_args`, and more arguments."""
    module, _, name = options.class_path.rpartition(".")
    arguments = options.get("init_args") or {}
    return getattr(import_module(module), name)(**{**more, **dict(arguments)})


class Arguments(ArgumentParser):
    """A parser that explains a mistake in a line or two, and takes no abbreviations for options."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{"allow_abbrev": False, **kwargs})

    def add_config(self) -> None:
        """Add `--config`, which takes a name or a path; see `prepared`."""
        self.add_argument("--config", action=ActionConfigFile, help="A packaged configuration's name, or a YAML file.")

    def add_importance_samples(self, meaning: str) -> None:
        """Add `--importance-samples`, in either spelling."""
        self.add_argument("--importance-samples", "--importance_samples", type=int | None, help=meaning)

    def prepared(self, argv: list[str], default: str | None = None) -> list[str]:
        """What was typed, made ready to be parsed.

        Args:
            argv: the words; in whatever order, see `general_first`.
            default: the configuration where none is named.

        Returns:
            The words with the file of each configuration in place of its name.
        """
        if default is not None and value_of("--config", argv) is None:
            argv = ["--config", default, *argv]
        out = general_first(argv)
        for i, word in enumerate(out):
            flag, equals, value = word.partition("=")
            is_value = i > 0 and out[i - 1] == "--config"
            if is_value or (flag == "--config" and equals):
                try:
                    out[i] = str(config_path(word)) if is_value else f"--config={config_path(value)}"
                except ValueError as error:
                    self.error(str(error))
        return out

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Print what is wrong, with the nearest right name, and exit with status 2.

        Raises:
            ArgumentError: in a parser of nested options, whose mistakes the parser around it explains.
        """
        if not self.exit_on_error:
            super().error(message, ex)
        print(f"{self.prog}: error: {self.explain(message)}", file=sys.stderr)
        print(f"`{self.prog} --help` lists what there is.", file=sys.stderr)
        sys.exit(2)

    def explain(self, message: str) -> str:
        """Jsonargparse's message in fewer words, and with a guess at what was meant."""
        key = r"given class_path '(?:\w+\.)*(\w+)':\s+Parser key \"([^\"]+)\":\s+"
        if found := re.search(key + r"Expected an? (.+)\. Got value: (.*)", message):
            name, option, wanted, seen = found.groups()
            return f"{name} takes no {option}={seen}: wanted {_readable(wanted)}"
        if found := re.search(r"given class_path '([\w.]+)':\s+Option '([^']+)' is not accepted", message):
            class_path, option = found.groups()
            module, _, name = class_path.rpartition(".")
            options = inspect.signature(getattr(import_module(module), name)).parameters
            return f"{name} has no option {option!r}{nearest(option, options)}"
        if found := re.search(r"Expected a dot import path string: (\S+)", message):
            seen = found.group(1)
            return f"there is no {self._group_of(message)} called {seen!r}{nearest(seen, self._classes(message))}"
        if found := re.search(r"(?:Option|Key) '([^']+)' is not (?:accepted|expected)", message):
            return f"unknown key {found.group(1)!r}{nearest(found.group(1), self._keys())}"
        if found := re.search(r"Group '([^']+)' does not accept option '([^']+)'", message):
            key = ".".join(found.groups())
            return f"unknown key {key!r}{nearest(key, self._keys())}"
        if found := re.search(r"unrecognized arguments: (\S+)", message, re.IGNORECASE):
            flag = found.group(1).split("=")[0]
            return f"unknown argument {flag!r}{nearest(flag, (f'--{key}' for key in self._keys()))}"
        if "is abstract" in message:
            group = self._group_of(message)
            return (
                f"which {group}? Name one: --{group} {' | '.join(self._classes(message))}, or under class_path in YAML"
            )
        return re.sub(r"\s*\n\s*", " ", _readable(message)).replace("Parser key ", "")

    def _keys(self) -> list[str]:
        return [action.dest for action in self._actions if action.dest not in ("help", "==SUPPRESS==")]

    def _group_of(self, message: str) -> str:
        found = re.search(r'Parser key "(\w+)"', message)
        return found.group(1) if found else "class"

    def _classes(self, message: str) -> list[str]:
        """Names of the concrete classes of the type that the message is about."""
        found = re.search(r"Subtypes: \[<class '([\w.]+)'>", message)
        if not found:
            return []
        module, _, name = found.group(1).rpartition(".")
        return [cls.__name__ for cls in concrete_subclasses(getattr(import_module(module), name))]


def _readable(types: str) -> str:
    """Names of types as one writes them, without their modules."""
    return re.sub(r"<class '(?:\w+\.)*(\w+)'>", r"\1", re.sub(r"typing\.Literal\[([^\]]*)\]", r"one of \1", types))


def concrete_subclasses(base: type) -> list[type[Any]]:
    """All subclasses of a class, and theirs, that can be built."""
    found: list[type[Any]] = []
    subclasses: list[type[Any]] = base.__subclasses__()
    for cls in subclasses:
        found += [cls] if not inspect.isabstract(cls) else []
        found += concrete_subclasses(cls)
    return found
