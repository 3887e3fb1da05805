"""Models in files: checkpoints of training, and releases for sharing. Nothing that is read is ever run."""

from __future__ import annotations

import json
import os
import pickle
import re
import shutil
import tempfile
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from wngen.evaluation.card import model_card
from wngen.evaluation.evaluate import Evaluation
from wngen.evaluation.report import Report, Weights
from wngen.model import LikelihoodModel

CONFIG, WEIGHTS, CARD = "config.json", "model.safetensors", "README.md"
REPORT, PER_IMAGE = "report.json", "per_image.npz"
PREFIX = "model."  # of the model's own entries in a training checkpoint
BEST, LAST, PREVIOUS = "best.ckpt", "last.ckpt", "last-previous.ckpt"  # of a run, the one before `last.ckpt` too


@dataclass(frozen=True)
class Metadata:
    """What a file says about the model in it.

    Attributes:
        model: the name of its class as `model`, and its constructor's arguments.
        data: the same of the data module as `data`; None if there was none.
        training: the options of the training; None if none are stated.
        version: of the wngen that wrote the file; None if it does not say.
        processes: how many trained it; None if it does not say.
    """

    model: dict[str, Any]
    data: dict[str, Any] | None = None
    training: dict[str, Any] | None = None
    version: str | None = None
    processes: int | None = None


def load(where: Path | str, weights: Weights = "ema", device: torch.device | str = "cpu") -> LikelihoodModel:
    """Load a model, in eval mode.

    Args:
        where: the folder of a run (its `best.ckpt`, else `last.ckpt`, else `release/`), a `.ckpt` file, the folder
            of a release, or the id `user/name` of a model on the Hugging Face hub, if there is no such path.
        weights: of a checkpoint, the averaged (`ema`) or the `raw` ones. A release holds one set, and no other.
        device: where to put it.

    Raises:
        ValueError: there is no such model; or its file is damaged, carries code, or does not fit the model that it
            names. The message says what was seen and what was wanted, and nothing is loaded. Of a run with a damaged
            file it names those that are whole.
    """
    if weights not in ("ema", "raw"):
        raise ValueError(f"weights={weights!r}: wanted 'ema' or 'raw'")
    path = _locate(where)
    if path.is_dir():
        if weights == "raw":
            raise ValueError(f"{where} is a release, which holds the averaged weights alone: leave weights='raw' out")
        return _build(_read_config(path), _read_weights(path), None, path).to(device)
    content = _content(path)
    state = {name.removeprefix(PREFIX): t for name, t in content["state_dict"].items() if name.startswith(PREFIX)}
    average = content.get("ema")
    if weights == "ema" and not (average and isinstance(average, dict)):
        raise ValueError(f"{path} holds no averaged weights (ema); load it with weights='raw'")
    return _build(_metadata_of(content, path), state, average if weights == "ema" else None, path).to(device)


def read_metadata(where: Path | str) -> Metadata:
    """What is said of a model, its data and its training, without building it.

    Args:
        where: as for `load`.

    Raises:
        ValueError: as from `load`.
    """
    path = _locate(where)
    return _read_config(path) if path.is_dir() else _metadata_of(_content(path), path)


def newest_state(folder: Path | str) -> tuple[Path, Metadata, str | None]:
    """What a run goes on from: its `last.ckpt`, or the one before where that is damaged or missing.

    Returns:
        The file; what it says of itself; and what is wrong with the newest, or None if it is the newest.

    Raises:
        ValueError: neither is whole; the message says what is wrong with each.
    """
    wrong: list[str] = []
    for path in (Path(folder) / LAST, Path(folder) / PREVIOUS):
        try:
            content = _unpickle(path)
        except FileNotFoundError:
            wrong.append(f"{path} is missing")
        except ValueError as error:
            wrong.append(str(error))
        else:
            return path, _metadata_of(content, path), wrong[0] if wrong else None
    raise ValueError("; ".join(wrong))


def save_release(
    model: LikelihoodModel,
    folder: Path | str,
    report: Report | None = None,
    metadata: Metadata | None = None,
    evaluation: Evaluation | None = None,
) -> None:
    """Write a model for sharing: `config.json`, `model.safetensors`, a model card `README.md`, and its figures.

    They are written beside the folder, which is then renamed into place. In a folder that is there already these
    files are replaced, and others are kept.

    Args:
        model: what to release, the weights to release in place.
        folder: where to.
        report: its figures, for `report.json` and the card.
        metadata: as `read_metadata` gives it, so that the release tells what the model was trained on, and how.
        evaluation: the figures of each image, for `per_image.npz`.
    """
    folder = Path(folder).absolute()
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.parent) as beside:
        new, old = Path(beside) / "new", Path(beside) / "old"
        if folder.exists():
            shutil.copytree(folder, new, ignore=shutil.ignore_patterns(CONFIG, WEIGHTS, REPORT, PER_IMAGE, CARD))
        new.mkdir(exist_ok=True)
        about = {
            "version": version("wngen"),
            "data": metadata and metadata.data,
            "training": metadata and metadata.training,
        }
        model_card(model, folder.name, report).save(new / CARD)
        model.save_pretrained(new, config={**model.config, "wngen": about})
        shutil.copymode(new / CONFIG, new / WEIGHTS)  # safetensors lets nobody but the owner read it
        if report is not None:
            report.write(new / REPORT)
        if evaluation is not None:
            evaluation.write(new / PER_IMAGE)
        for name in (CARD, CONFIG, WEIGHTS):
            with (new / name).open("rb") as file:
                os.fsync(file.fileno())
        if folder.exists():
            folder.rename(old)
        try:
            new.rename(folder)
        except OSError:
            if old.exists():
                old.rename(folder)
            raise


def _locate(where: Path | str) -> Path:
    """The checkpoint file or the release folder that is meant, brought from the hub if need be."""
    path = Path(where)
    if path.is_file():
        return path
    if path.is_dir():
        checkpoints = [path / name for name in (BEST, LAST) if (path / name).is_file()]
        releases = [folder for folder in (path, path / "release") if (folder / WEIGHTS).is_file()]
        if found := checkpoints + releases:
            return found[0]
        names = ", ".join(sorted(entry.name for entry in path.iterdir())[:10]) or "nothing"
        raise ValueError(
            f"{path} holds no model: wanted best.ckpt, last.ckpt or release/ as in the folder of a run, or "
            f"{WEIGHTS} as in that of a release; it holds {names}"
        )
    if path.suffix == ".ckpt" or not re.fullmatch(r"\w[\w.-]*/[\w.-]+", str(where)):
        raise ValueError(
            f"there is no {path}: wanted the folder of a run or a release, a .ckpt file, or a hub id user/name"
        )
    try:
        return Path(snapshot_download(str(where), allow_patterns=[CONFIG, WEIGHTS]))
    except Exception as error:  # of the hub, of the network, or of its library
        reason = str(error).strip().split("\n")[0]
        raise ValueError(
            f"there is no file or folder {path}, and no model {where} could be had from the Hugging Face hub: {reason}"
        ) from error


def _content(path: Path) -> dict[str, Any]:
    """The content of a `.ckpt`, or an error that names the whole ones beside it."""
    try:
        return _unpickle(path)
    except ValueError as error:
        whole = [place for place in sorted(path.parent.glob("*.ckpt")) if place != path and _is_whole(place)]
        if (path.parent / "release" / WEIGHTS).is_file():
            whole.append(path.parent / "release")
        if not whole:
            raise
        raise ValueError(f"{error}. Beside it are whole: {', '.join(map(str, whole))}; name one of them") from error


def _is_whole(path: Path) -> bool:
    try:
        _unpickle(path)
    except (OSError, ValueError):
        return False
    return True


def _unpickle(path: Path) -> dict[str, Any]:
    """The content of a `.ckpt`, of which only tensors and plain containers are accepted."""
    try:
        if not zipfile.is_zipfile(path):
            raise ValueError(
                f"{path} ({path.stat().st_size:,} bytes) is cut short, or no checkpoint at all: wanted the zip archive "
                "that torch.save writes. Bare pickles are not opened, since they may carry code"
            )
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
        if damaged is not None:
            raise ValueError(f"{path} is damaged: {damaged} in it does not have the checksum it was written with")
        if code := torch.serialization.get_unsafe_globals_in_checkpoint(path):
            raise ValueError(
                f"{path} carries code and was not loaded: it names {', '.join(code)}, where only tensors and plain "
                "containers are wanted. A file from wngen never does; do not trust where this one is from"
            )
        content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise
    except UnicodeDecodeError as error:  # of the archive's own names
        raise ValueError(f"{path} is damaged: {error}") from error
    except (OSError, RuntimeError, EOFError, LookupError, pickle.UnpicklingError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path} is damaged, or no checkpoint: {error}") from error
    if not isinstance(content, dict) or "wngen" not in content or not isinstance(content.get("state_dict"), dict):
        seen = ", ".join(map(str, content)) if isinstance(content, dict) else type(content).__name__
        raise ValueError(f"{path} was not written by wngen: wanted a dict with 'wngen' and 'state_dict', got {seen}")
    return content


def _metadata_of(content: Mapping[str, Any], path: Path) -> Metadata:
    about = content["wngen"]
    try:
        rest = (about.get(name) for name in ("data", "training", "version", "processes"))
        return Metadata(dict(about["model"]), *rest)
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"{path} does not say which model it holds: {error!r}") from error


def _read_config(folder: Path) -> Metadata:
    path = folder / CONFIG
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        about = config.pop("wngen", {})
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} cannot be read as the configuration of a model: {error}") from error
    return _metadata_of({"wngen": {**about, "model": config}}, path)


def _read_weights(folder: Path) -> dict[str, Tensor]:
    path = folder / WEIGHTS
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{path} is missing, cut short or damaged: {error}") from error


def _build(
    metadata: Metadata, state: dict[str, Tensor], average: dict[str, Tensor] | None, path: Path
) -> LikelihoodModel:
    """A model with `state`, and `average` in place of its parameters, once all of it is known to fit."""
    from wngen import models  # here, since `import wngen` is not to import them all

    arguments = dict(metadata.model)
    kind = arguments.pop("model", None)
    if kind not in models.__all__:
        known = ", ".join(models.__all__)
        raise ValueError(f"{path} holds a model {kind!r}, wanted one of those in wngen.models: {known}")
    try:
        with torch.random.fork_rng(devices=[]):
            model: LikelihoodModel = getattr(models, kind)(**arguments)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path} describes a {kind} that cannot be built: {error}") from error
    entries = model.state_dict(keep_vars=True)
    # Of weights that stand under several names safetensors keeps one; the others are the same object.
    kept = {id(entry): state[name] for name, entry in entries.items() if name in state}
    state = {**{name: kept[id(entry)] for name, entry in entries.items() if id(entry) in kept}, **state}
    _check_fit(entries, state, f"{path} does not fit the {kind} that it describes")
    if average is not None:
        _check_fit(dict(model.named_parameters()), average, f"the averaged weights of {path} do not fit its {kind}")
        state |= average
    dtypes = {entry.dtype for entry in state.values() if entry.is_floating_point()}
    if len(dtypes) == 1:
        model.to(dtypes.pop())
    model.load_state_dict(state)
    return model.eval()


def _check_fit(wanted: Mapping[str, Tensor], seen: Mapping[str, Any], complaint: str) -> None:
    """Names and shapes must be those of the model."""
    shapes = {name: tuple(getattr(value, "shape", ())) for name, value in seen.items()}
    wrong = [n for n in wanted if n in seen and (shapes[n] != wanted[n].shape or not isinstance(seen[n], Tensor))]
    problems = {
        "missing": sorted(wanted.keys() - seen.keys()),
        "not expected": sorted(seen.keys() - wanted.keys()),
        "of another shape": [f"{n} {shapes[n]}, wanted {tuple(wanted[n].shape)}" for n in wrong],
    }
    if any(problems.values()):
        lists = (f"{what}: {_first(names)}" for what, names in problems.items() if names)
        raise ValueError(f"{complaint}; nothing was loaded. {'; '.join(lists)}")


def _first(names: list[str], count: int = 3) -> str:
    more = len(names) - count
    return ", ".join(names[:count]) + (f" and {more} more" if more > 0 else "")
