"""Tasks over many items: as many at a time as keep a cluster busy, also one that has yet to grow."""

from __future__ import annotations

import pytest
import ray

from mm_core.errors import DataError
from pipelines.tasks import processors, run_tasks


def doubled(item: int) -> int:
    if item == 13:
        raise DataError("13 is unlucky")
    return 2 * item


@pytest.mark.usefixtures("ray_cluster")
def test_every_item_is_done_once() -> None:
    assert sorted(run_tasks(doubled, range(12))) == [(n, 2 * n) for n in range(12)]


@pytest.mark.usefixtures("ray_cluster")
def test_an_error_comes_as_it_was_raised() -> None:
    with pytest.raises(DataError, match=r"^13 is unlucky$"):
        list(run_tasks(doubled, [12, 13]))


@pytest.mark.parametrize(
    ("address", "there", "counted"), [(None, 4.0, 4), (None, 0.0, 1), ("10.0.0.5:6379", 0.0, 32), ("10.0.0.5:6379", 512.0, 512)]
)
def test_a_cluster_that_may_grow_is_asked(address: str | None, there: float, counted: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """An autoscaler makes nodes for what waits; one that has taken all of them away shows no processor."""
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": there})
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    if address:
        monkeypatch.setenv("RAY_ADDRESS", address)
    assert processors() == counted
