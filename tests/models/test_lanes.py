"""Batches side by side give the values of one after the other, in order, and leave the threads as they were."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from pools import make_pool

from im_lightning.models.device import Lanes
from im_lightning.scoring.api import score_examples


def test_results_come_in_order_whoever_is_first(two_threads: None) -> None:
    """A row that got another row's perplexity would poison the rule without a trace."""
    together = threading.Barrier(2, timeout=100)

    def work(item: int) -> tuple[int, int]:
        if item < 2:
            together.wait()  # passes only if two items are really worked on at once
        time.sleep(0.002 * (7 - item % 7))
        return item, torch.get_num_threads()

    with Lanes("cpu") as lanes:
        assert lanes.count == 2
        results = list(lanes.map(work, range(30)))
    assert [item for item, _ in results] == [result for _, (result, _) in results] == list(range(30))
    assert {threads for _, (_, threads) in results} == {1}
    assert torch.get_num_threads() == 2


def test_one_lane_on_an_accelerator_or_with_one_thread(two_threads: None) -> None:
    """A GPU must not be shared by threads; one core gains nothing by two."""
    main = threading.current_thread()
    for device, cores in (("cuda", None), ("cpu", 1)):
        with Lanes(device, cores) as lanes:
            assert lanes.count == 1
            assert list(lanes.map(lambda _: threading.current_thread(), "ab")) == [("a", main), ("b", main)]


@pytest.mark.parametrize(
    ("cores", "lanes"), [(2, 2), (7, 7), (9, 8), (11, 5), (12, 6), (15, 5), (16, 8), (23, 7), (64, 8)]
)
def test_cores_are_shared_out_so_that_hardly_one_is_idle(cores: int, lanes: int) -> None:
    """Eight lanes of twelve cores would have one core each, and four would do nothing."""
    assert Lanes("cpu", cores).count == lanes


def test_an_error_in_a_lane_is_raised_and_threads_are_given_back(two_threads: None) -> None:
    """Out of disk or Ctrl-C in a batch must end the scoring, and not leave the training on one thread."""

    def work(item: int) -> int:
        if item == 3:
            raise ValueError("batch 3")
        return item

    done = []
    with pytest.raises(ValueError, match="batch 3"), Lanes("cpu") as lanes:
        for item, _ in lanes.map(work, range(100)):
            done.append(item)
    assert done == [0, 1, 2] and torch.get_num_threads() == 2
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("lane")]


def test_scores_do_not_depend_on_the_lanes(two_threads: None, tiny_llama: str, tmp_path: Path) -> None:
    """Perplexities from a big machine and from a small one must fit the same rule."""
    names = ["ppl", "ppl_unconditional", "ifd", "knn_6"]
    two = score_examples(make_pool(), names, tiny_llama, cache_dir=tmp_path / "two", batch_tokens=120)
    torch.set_num_threads(1)
    one = score_examples(make_pool(), names, tiny_llama, cache_dir=tmp_path / "one", batch_tokens=120)
    assert one.reasons == two.reasons
    for name in names:
        np.testing.assert_allclose(two.values[name], one.values[name], rtol=1e-5)
