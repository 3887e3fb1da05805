"""What the commands on a trained model take: the model, and images."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch

from wngen.arguments import Arguments, build, summary, value_of
from wngen.checkpoint import load, read_metadata
from wngen.cli.subject import Subject
from wngen.data import ImageDataModule
from wngen.model import LikelihoodModel


def model_parser(command: Callable[[list[str]], None], several: bool = False) -> Arguments:
    """A parser of what every command on a trained model takes, or on several as `checkpoints`."""
    parser = Arguments(prog=f"wngen {command.__name__}", description=summary(command))
    what = "A run folder, a .ckpt, a release folder, or a hub id"
    if several:
        parser.add_argument("checkpoints", type=str, nargs="+", help=f"{what}; several are compared.")
    else:
        parser.add_argument("checkpoint", type=str, help=f"{what}.")
    parser.add_argument("--weights", type=Literal["ema", "raw"], default="ema", help="Averaged or raw, of a .ckpt.")
    parser.add_argument("--device", type=str, default="auto", help="Such as cpu or cuda:1.")
    return parser


def add_data(parser: Arguments) -> None:
    """Add what a command on a model and images takes; see `parse`."""
    parser.add_config()
    parser.add_subclass_arguments(
        ImageDataModule, "data", required=False, help="By default what the model was trained on."
    )
    parser.add_argument("--split", type=Literal["train", "val", "test"], default="test", help="Of the data.")


def loaded(options: Any, checkpoint: str | None = None) -> LikelihoodModel:
    """The model that the options of `model_parser` name, or another in its place, where they want it."""
    device = options.device
    if device == "auto":
        rank, gpus = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
        device = f"cuda:{rank % gpus}" if gpus else "cpu"
    return load(checkpoint or options.checkpoint, options.weights, device)


def parse_with_data(parser: Arguments, argv: list[str]) -> tuple[Any, Subject]:
    """The options, and the model with its data."""
    options, training = parse(parser, argv)
    return options, subject_of(parser, options, training)


def parse(parser: Arguments, argv: list[str]) -> tuple[Any, Mapping[str, Any] | None]:
    """The options, with the data that the model was trained on where they name no other, and how it was trained."""
    argv = parser.prepared(argv)
    # The first word that is neither an option nor, as each of them takes one, an option's value.
    before = ["", *argv]
    values = {i for i, word in enumerate(argv) if before[i].startswith("-") and "=" not in before[i]}
    where = next((word for i, word in enumerate(argv) if i not in values and not word.startswith("-")), None)
    training = None
    if where is not None and not {"-h", "--help"} & set(argv):
        metadata = read_metadata(where)
        stored, training = metadata.data, metadata.training
        if stored is not None and value_of("--data", argv) in (None, stored["data"]) and not value_of("--config", argv):
            arguments = {name: value for name, value in stored.items() if name != "data"}
            parser.set_defaults({"data": {"class_path": f"wngen.data.{stored['data']}", "init_args": arguments}})
    return parser.parse_args(argv), training


def subject_of(parser: Arguments, options: Any, training: Mapping[str, Any] | None) -> Subject:
    """The model together with its data."""
    return Subject(loaded(options), data_of(parser, options, options.checkpoint), training, options.weights)


def data_of(parser: Arguments, options: Any, checkpoint: str) -> ImageDataModule:
    """The data that is named, or that the model was trained on."""
    if options.data is None:
        parser.error(f"{checkpoint} does not say what it was trained on: name the data by --data")
    data = build(options.data)
    assert isinstance(data, ImageDataModule)
    return data
