"""What the benches share: types of options, where `--device` leads, and a file that a later run goes on with."""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

__all__ = ["need_json", "positive", "positives", "refuse", "regex", "resumed", "shares", "some_of",
           "split_device"]  # fmt: skip


def split_device(arguments: Sequence[str]) -> tuple[str, list[str]]:
    """`--device`, and the other arguments: which of them there are depends on it."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    found, others = parser.parse_known_args(arguments)
    return str(found.device), others


def refuse(parser: argparse.ArgumentParser, device: str, *names: str) -> None:
    """Options that only `--device device` has: an error that says so."""

    class Refused(argparse.Action):
        def __call__(self, parser: argparse.ArgumentParser, _: Any, values: Any, option_string: Any = None) -> None:
            parser.error(f"{option_string} is an option of --device {device} only")

    for name in names:
        parser.add_argument(name, action=Refused, nargs="?", help=argparse.SUPPRESS)


def regex(text: str) -> re.Pattern[str]:
    try:
        return re.compile(text)
    except re.error as error:
        raise argparse.ArgumentTypeError(f"{text!r} is no regular expression: {error}") from None


def shares(text: str) -> list[float]:
    try:
        found = sorted({float(part) for part in text.split(",")})
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}: expected numbers, separated by commas") from None
    for share in found:
        if not 0 <= share < 1:
            raise argparse.ArgumentTypeError(f"{share} is not in [0, 1)")
    return found


def positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive whole number")
    return int(text)


def positives(text: str) -> list[int]:
    return list(dict.fromkeys(positive(part) for part in text.split(",")))


def some_of(*names: str) -> Callable[[str], list[str]]:
    """Of these names some, separated by commas."""

    def parse(text: str) -> list[str]:
        for part in text.split(","):
            if part not in names:
                raise argparse.ArgumentTypeError(f"{part!r} is none of {', '.join(names)}")
        return list(dict.fromkeys(text.split(",")))

    return parse


def need_json(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    """`--resume` with a file, and files in folders that exist: it would be a pity to find out at the end."""
    if options.resume and not options.json:
        parser.error("--resume needs --json")
    if options.json and not options.json.absolute().parent.is_dir():
        parser.error(f"{options.json.parent} is not a folder")


def resumed(options: argparse.Namespace, settings: dict[str, Any]) -> dict[str, Any] | None:
    """What `--json` holds, where `--resume` asks for it. Exits where that was measured otherwise."""
    path: Path | None = options.json
    if not options.resume or path is None or not path.exists():
        return None
    document: dict[str, Any] = json.loads(path.read_text())
    if document["settings"] != settings:
        raise SystemExit(f"--resume: {path} was measured with other settings: {document['settings']}")
    return document
