"""A figure with its uncertainty and its protocol: as JSON, and as a table."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from rich.box import SIMPLE_HEAD
from rich.console import RenderableType
from rich.table import Table
from torch import nn

from wngen.evaluation.annealing.check import check_line
from wngen.evaluation.evaluate import Evaluation
from wngen.evaluation.layers import layer_names, layer_title
from wngen.evaluation.statistics import CONFIDENCE, RESAMPLES, Estimate, estimate
from wngen.latent import LatentVariableModel
from wngen.model import LikelihoodModel

SCHEMA = 1
ROUNDING_NATS = 1e-3  # by which sums of rounded log-probabilities may pass 0

Weights = Literal["ema", "raw"]


@dataclass(frozen=True)
class Report:
    """What was measured, and how.

    Figures go by the names `elbo`, `distortion`, `rate`, `kl_layer_1` and so on, and `log_likelihood`, which is exact
    or the importance-weighted bound, as `protocol["estimator"]` says. An exact model has `log_likelihood` alone.

    Attributes:
        model: the model's configuration.
        nats: figures in nats per image, averaged over images.
        bits_per_dim: the same as costs in bits per sub-pixel: of `elbo` and `log_likelihood` the negative.
        protocol: `data` (the data set's protocol), `images`, `weights` (`ema` or `raw`), `weights_sha256`, `dtype` of
            the evaluation, `training_precision` (None, or absent from older reports, if it is not known), `seed`,
            `estimator`, `importance_samples` (K, or None), `latent_shapes` of the stochastic layers, the topmost first
            (absent from older reports), `confidence` and `resamples` of the bootstrap, `versions`, `device`,
            `wall_seconds`.
        annealing: what annealed importance sampling says of the bound, as `bound_check` gives it; None where it was not
            asked for (absent from older reports).
        schema: version of this form.
    """

    model: dict[str, Any]
    nats: dict[str, Estimate]
    bits_per_dim: dict[str, Estimate]
    protocol: dict[str, Any]
    annealing: dict[str, Any] | None = None
    schema: int = SCHEMA

    @classmethod
    def of(
        cls,
        evaluation: Evaluation,
        model: LikelihoodModel,
        data: Mapping[str, Any],
        weights: Weights,
        training_precision: str | None = None,
    ) -> Report:
        """Sum an evaluation up.

        Args:
            evaluation: of `model`.
            model: what was evaluated; its weights are hashed.
            data: what the images were, a JSON-able protocol that says how many in `images`.
            weights: whether the model held the averaged or the raw weights.
            training_precision: such as `bf16-mixed`, in which the model was trained; None if it is not known.

        Raises:
            ValueError: the data's protocol speaks of another number of images, or the model gives an image more
                probability than 1: it is a density, and says nothing in bits per dimension.
        """
        n = len(evaluation.index)
        if data.get("images", n) != n:
            raise ValueError(f"{n} images were evaluated, but the data's protocol says {data['images']}")
        _check_probabilities(evaluation)
        figures = {}
        if not evaluation.is_exact:
            layers = {f"kl_layer_{i + 1}": kl for i, kl in enumerate(evaluation.layer_kl_nats.T)}
            figures = {
                "elbo": evaluation.elbo_nats,
                "distortion": evaluation.distortion_nats,
                "rate": evaluation.rate_nats,
                **layers,
            }
        if evaluation.log_likelihood_nats is not None:
            figures["log_likelihood"] = evaluation.log_likelihood_nats
        nats = estimate(figures)
        per_nat = model.spec.bits_per_dim(1.0)
        gains = ("elbo", "log_likelihood")
        shapes = model.latent_shapes if isinstance(model, LatentVariableModel) else ()
        return cls(
            model=json.loads(json.dumps(model.config)),  # tuples become the lists that they are once read back
            nats=nats,
            bits_per_dim={name: e.times(-per_nat if name in gains else per_nat) for name, e in nats.items()},
            protocol={
                "data": dict(data),
                "images": n,
                "weights": weights,
                "weights_sha256": weights_sha256(model),
                "dtype": evaluation.dtype,
                "training_precision": training_precision,
                "seed": evaluation.seed,
                "estimator": evaluation.estimator,
                "importance_samples": evaluation.importance_samples,
                "latent_shapes": [list(shape) for shape in shapes],
                "confidence": CONFIDENCE,
                "resamples": RESAMPLES,
                "versions": {"wngen": version("wngen"), "torch": torch.__version__},
                "device": evaluation.device,
                "wall_seconds": round(evaluation.wall_seconds, 3),
            },
        )

    def write(self, path: Path | str) -> None:
        """Write `report.json`, beside its target first, so that no half of it is ever there."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f".{path.name}.partial")
        partial.write_text(json.dumps(asdict(self), indent=2, allow_nan=False) + "\n", encoding="utf-8")
        partial.replace(path)

    @classmethod
    def read(cls, path: Path | str) -> Report:
        """Read what `write` wrote.

        Raises:
            ValueError: no JSON, another schema, or something missing.
        """
        try:
            content = json.loads(Path(path).read_text(encoding="utf-8"))
            if content["schema"] != SCHEMA:
                raise ValueError(f"schema {content['schema']!r}, this version of wngen reads {SCHEMA}")
            for unit in ("nats", "bits_per_dim"):
                content[unit] = {name: Estimate(**figure) for name, figure in content[unit].items()}
            return cls(**content)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path} is not a report: {error!r}") from error

    @property
    def headings(self) -> tuple[str, ...]:
        """Of the columns of `rows`."""
        interval = f"{self.protocol['confidence']:.0%} interval"
        return "", "nats", interval, "bits/dim", interval

    @property
    def rows(self) -> list[tuple[str, ...]]:
        """For each figure its title, nats with standard error, the interval, and both in bits per dimension."""
        single_layer = "kl_layer_2" not in self.nats  # whose KL is the rate
        rows: list[tuple[str, ...]] = []
        for name, nats in self.nats.items():
            bits = self.bits_per_dim[name]
            if not (single_layer and name == "kl_layer_1"):
                rows.append(
                    (
                        self.title(name),
                        f"{nats.mean:.2f} ± {nats.standard_error:.2f}",
                        f"{nats.low:.2f} to {nats.high:.2f}",
                        f"{bits.mean:.4f} ± {bits.standard_error:.4f}",
                        f"{bits.low:.4f} to {bits.high:.4f}",
                    )
                )
        return rows

    def title(self, name: str) -> str:
        """What a figure is called for readers."""
        if name.startswith("kl_layer_"):
            return f"KL of {layer_title(self.layers[int(name.removeprefix('kl_layer_')) - 1])}"
        if name != "log_likelihood":
            return {"elbo": "ELBO"}.get(name, name)
        k = self.protocol["importance_samples"]
        return "log-likelihood (exact)" if k is None else f"importance-weighted, K = {k:,}"

    @property
    def layers(self) -> tuple[str, ...]:
        """Names of the stochastic layers, the topmost first; see `layer_names`."""
        unknown: list[list[int]] = [[] for name in self.nats if name.startswith("kl_layer_")]
        return layer_names(self.protocol.get("latent_shapes", unknown))

    @property
    def data_line(self) -> str:
        """What the images were, in a few words."""
        data, n = self.protocol["data"], self.protocol["images"]
        of = data.get("split_images", n)
        binarization = data.get("binarization", "none")
        parts = [
            f"{data.get('name', 'images')} {data.get('split', '')}".strip(),
            "given their classes" if self.model.get("num_classes") else "",
            "" if binarization == "none" else f"{binarization} binarization",
            f"{n:,} images" if of == n else f"{n:,} of {of:,} images",
            "" if data.get("seed") is None else f"drawn with seed {data['seed']}",
        ]
        return ", ".join(part for part in parts if part)

    @property
    def protocol_line(self) -> str:
        """How the figures were measured, in a sentence."""
        p = self.protocol
        weights = "EMA" if p["weights"] == "ema" else p["weights"]
        images = p["data"].get("sha256")
        trained = f" (trained in {p['training_precision']})" if p.get("training_precision") else ""
        hashes = f"weights {p['weights_sha256'][:12]}" + (f", images {images[:12]}" if images else "")
        return (
            f"{weights} weights, {p['dtype']}{trained}, noise seed {p['seed']}; mean ± standard error over images, "
            f"{p['confidence']:.0%} bootstrap interval. SHA-256: {hashes}. wngen {p['versions']['wngen']}, "
            f"torch {p['versions']['torch']}, {p['device']}, {p['wall_seconds']:,.0f} s."
        )

    @property
    def annealing_line(self) -> str:
        """What annealed importance sampling says of the bound; empty where it was not asked for."""
        best = "log_likelihood" if "log_likelihood" in self.nats else "elbo"
        return "" if self.annealing is None else check_line(self.annealing, self.title(best))

    def __rich__(self) -> RenderableType:
        """The figures as a table that fits a terminal of 80 columns, with the protocol below it."""
        table = Table(
            title=f"{self.model['model']} on {self.data_line}",
            title_justify="left",
            caption="\n".join(line for line in (self.annealing_line, self.protocol_line) if line),
            caption_justify="left",
            box=SIMPLE_HEAD,
        )
        _, nats, interval, bits, _ = self.headings
        table.add_column()
        table.add_column("mean", justify="right", no_wrap=True)
        table.add_column(interval, justify="right", no_wrap=True)
        table.add_column()
        for title, *cells in self.rows:
            table.add_row(
                title.replace(", ", ",\n"), f"{cells[0]}\n{cells[2]}", f"{cells[1]}\n{cells[3]}", f"{nats}\n{bits}"
            )
        return table


def weights_sha256(model: nn.Module) -> str:
    """SHA-256 over the name, dtype, shape and bytes of each tensor in a model's state, in the order of the names."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def per_image_path(report: Path | str) -> Path:
    """Where the figures of each image lie beside a report: `per_image.npz` beside `report.json`, and so on."""
    report = Path(report)
    return report.with_name(f"{report.stem.replace('report', 'per_image')}.npz")


def _check_probabilities(evaluation: Evaluation) -> None:
    """Of integer levels no image can have more probability than 1, whatever its latents; a density has no such limit.

    Raises:
        ValueError: an image has; the message names it.
    """
    most = int(np.argmin(evaluation.distortion_nats))
    if evaluation.distortion_nats[most] < -ROUNDING_NATS:
        what = "log p(x)" if evaluation.is_exact else "log p(x | z)"
        raise ValueError(
            f"{what} of the image with index {evaluation.index[most]} is {-evaluation.distortion_nats[most]:.6g} nats, "
            "and of probabilities of integer levels it cannot be above 0: this model gives a density. On data that was "
            "not dequantized a density can be as high as one likes, and bits per dimension of it mean nothing. Use a "
            "likelihood of levels, such as discretized logistics"
        )
