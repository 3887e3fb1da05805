"""Figures of images from several processes, and what an interruption leaves of them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from forked import forked
from torch import Tensor

from wngen.evaluation import Evaluation, evaluate
from wngen.evaluation.processes import joined
from wngen.evaluation.rows import Rows, Unfinished, merged
from wngen.image import Batch
from wngen.models import ConvVAE
from wngen.nn import data_dependent_init

IMAGES = 23
TINY: dict[str, Any] = {
    "height": 4,
    "width": 4,
    "widths": [4],
    "blocks": 1,
    "hidden": 8,
    "latent_dim": 3,
    "iaf_width": 8,
}
KEY = {"weights": "ab", "k": 3}


@pytest.fixture(scope="module")
def model() -> ConvVAE:
    torch.manual_seed(0)
    model = ConvVAE(**TINY).double()
    data_dependent_init(model, batch(torch.arange(64)).image)
    return model


def batch(index: Tensor) -> Batch:
    image = torch.stack([(torch.arange(16) * (int(i) + 3) % 7 > 3).byte().view(1, 4, 4) for i in index])
    return Batch(image, None, index)


def batches(rank: int = 0, count: int = 1, size: int = 4, last: int = IMAGES) -> Iterator[Batch]:
    for part in torch.arange(last)[rank::count].split(size):
        if len(part):
            yield batch(part)


def tables(e: Evaluation) -> dict[str, Any]:
    return {name: value for name, value in vars(e).items() if isinstance(value, np.ndarray)}


def same(a: Evaluation, b: Evaluation) -> None:
    assert tables(a).keys() == tables(b).keys()
    for name, table in tables(a).items():
        np.testing.assert_allclose(table, tables(b)[name], rtol=0, atol=1e-9, err_msg=name)


def one_of(rank: int, count: int, images: int, model: ConvVAE) -> Evaluation:
    with joined() as processes:
        assert (processes.rank, processes.count) == (rank, count)
        return evaluate(model, batches(rank, count, last=images), images, 3, chunk=5, processes=processes)


@pytest.mark.parametrize(("count", "images"), [(2, IMAGES), (3, IMAGES), (3, 2)])
def test_several_processes_give_the_figures_of_one(model: ConvVAE, count: int, images: int):
    """Also where their number does not divide that of the images, and where one of them has none."""
    alone = evaluate(model, batches(last=images), images, 3)
    for result in forked(count, one_of, count, images, model):
        same(result, alone)


def test_the_number_of_threads_changes_nothing(model: ConvVAE):
    alone = evaluate(model, batches(), IMAGES, 3)
    threads = torch.get_num_threads()
    try:
        for number in (2, 3):
            torch.set_num_threads(number)
            same(evaluate(model, batches(), IMAGES, 3), alone)
    finally:
        torch.set_num_threads(threads)


def test_without_torchrun_a_process_is_alone(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with joined() as processes:
        assert (processes.rank, processes.count) == (0, 1)
        assert processes.gather("x") == ["x"]


class Interrupted(Exception):
    pass


def breaking_off(after: int) -> Iterator[Batch]:
    for number, part in enumerate(batches()):
        if number == after:
            raise Interrupted
        yield part


@pytest.mark.parametrize("after", [0, 1, 4])
def test_an_interrupted_evaluation_goes_on(model: ConvVAE, tmp_path: Path, after: int):
    path = tmp_path / "per_image.npz"
    with pytest.raises(Interrupted):
        evaluate(model, breaking_off(after), IMAGES, 3, unfinished=Unfinished(path, KEY))
    seen: list[int] = []

    class Counting(ConvVAE):
        def encode(self, x: Tensor, y: Tensor | None = None) -> tuple[Tensor, ...]:
            seen.append(len(x))
            return super().encode(x, y)

    counting = Counting(**TINY).double()
    counting.load_state_dict(model.state_dict())
    unfinished = Unfinished(path, KEY)
    result = evaluate(counting, batches(), IMAGES, 3, unfinished=unfinished)
    same(result, evaluate(model, batches(), IMAGES, 3))
    assert sum(seen) == 2 * (IMAGES - 4 * after)  # encoded for the bound and for the importance-weighted one
    assert list(tmp_path.iterdir())
    unfinished.remove()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("first", [0, 1, 4])
@pytest.mark.parametrize("second", [0, 2])
def test_interruptions_within_a_batch_lose_no_bound(
    model: ConvVAE, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, first: int, second: int
):
    """Twice, each after so many parts of the importance-weighted bound, also before any is there."""
    whole = evaluate(model, batches(), IMAGES, 3)
    log_likelihood = ConvVAE.log_likelihood
    for parts in (first, second):
        left = iter(range(parts))

        def broken(self: ConvVAE, *args: Any, left: Iterator[int] = left, **kwargs: Any) -> Tensor:
            if next(left, None) is None:
                raise Interrupted
            return log_likelihood(self, *args, **kwargs)

        monkeypatch.setattr(ConvVAE, "log_likelihood", broken)
        with pytest.raises(Interrupted):
            evaluate(model, batches(), IMAGES, 3, chunk=6, unfinished=Unfinished(tmp_path / "x[1].npz", KEY))
        monkeypatch.undo()
    result = evaluate(model, batches(), IMAGES, 3, unfinished=Unfinished(tmp_path / "x[1].npz", KEY))
    same(result, whole)


def test_what_was_kept_for_another_evaluation_or_damaged_is_not_taken_up(model: ConvVAE, tmp_path: Path):
    path = tmp_path / "per_image.npz"
    with pytest.raises(Interrupted):
        evaluate(model, breaking_off(3), IMAGES, 3, unfinished=Unfinished(path, KEY))
    assert len(Unfinished(path, KEY).read()["index"]) == 12
    assert Unfinished(path, {**KEY, "k": 4}).read() == {}
    (file,) = tmp_path.iterdir()
    file.write_bytes(file.read_bytes()[:-100])
    assert Unfinished(path, KEY).read() == {}


def test_files_of_several_processes_are_taken_over_by_the_first(model: ConvVAE, tmp_path: Path):
    """Two processes were interrupted, one of them after the first had taken over what both had kept."""
    path = tmp_path / "per_image.npz"
    whole = tables(evaluate(model, batches(), IMAGES, 3))
    for rank, rows in ((0, slice(0, 9)), (1, slice(9, 15)), (2, slice(5, 12))):
        Unfinished(path, KEY, rank).write({name: table[rows] for name, table in whole.items()})
    first = Unfinished(path, KEY)
    kept = first.read()
    np.testing.assert_array_equal(kept["index"], np.arange(15))
    np.testing.assert_array_equal(kept["distortion_nats"], whole["distortion_nats"][:15])
    first.take_over(kept)
    assert len(list(tmp_path.iterdir())) == 1
    np.testing.assert_array_equal(first.read()["index"], np.arange(15))


def test_an_image_that_two_processes_have_is_named():
    parts = [{"index": np.array(index), "distortion_nats": np.ones(len(index))} for index in ([4, 0], [1, 4])]
    with pytest.raises(ValueError, match="index 4 came twice"):
        merged(parts)
    with pytest.raises(ValueError, match="2 images came, wanted 4; missing are the indices 1, 2"):
        merged([{"index": np.array([3])}, {}, {"index": np.array([0])}], 4)


def test_rows_are_complete_once_every_figure_is_there():
    rows = Rows(3)
    rows.put(torch.tensor([2, 0]), "a", torch.tensor([2.0, 0.0]))
    rows.put(torch.tensor([0, 1]), "b", torch.tensor([10.0, 11.0]))
    tables = rows.tables()
    assert {name: table.tolist() for name, table in tables.items()} == {"index": [0], "a": [0.0], "b": [10.0]}
    assert Rows(3).tables() == {}


def test_an_evaluation_is_read_as_it_was_written(model: ConvVAE, tmp_path: Path):
    for k in (None, 2):
        written = evaluate(model, batches(), IMAGES, k)
        written.write(tmp_path / "new" / "per_image.npz")
        read = Evaluation.read(tmp_path / "new" / "per_image.npz")
        for name, value in vars(written).items():
            np.testing.assert_array_equal(value, getattr(read, name), err_msg=name)
        np.testing.assert_array_equal(read.best_nats, written.elbo_nats if k is None else written.log_likelihood_nats)


def test_what_is_no_evaluation_is_refused(model: ConvVAE, tmp_path: Path):
    path = tmp_path / "per_image.npz"
    with pytest.raises(ValueError, match=r"does not hold figures of images.*FileNotFound"):
        Evaluation.read(path)
    evaluate(model, batches(), IMAGES).write(path)
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match="does not hold figures of images"):
        Evaluation.read(path)
    np.savez(path, about=np.array("{}"), index=np.arange(3))
    with pytest.raises(ValueError, match=r"does not hold the figures of an evaluation.*distortion_nats"):
        Evaluation.read(path)
    np.savez(path, about=np.array("{}"), index=np.arange(3), distortion_nats=np.ones(2))
    with pytest.raises(ValueError, match="different lengths"):
        Evaluation.read(path)
