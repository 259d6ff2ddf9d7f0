"""Which of its options a launch takes, by the shared memory of a GPU."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="kernels need Triton")

from visionattn.errors import UnsupportedError
from visionattn.ops.fused import launch
from visionattn.ops.fused.launch import Launch, Option, aligned
from visionattn.ops.fused.plan import Plan, smaller


class Compiled:
    """Stands in for a compiled kernel; it notes what it ran with."""

    def __init__(self, shared: int, ran: list[tuple[Any, ...]]) -> None:
        self.metadata, self.ran = SimpleNamespace(shared=shared), ran

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return lambda *arguments: self.ran.append((grid, *arguments[1:]))


class Kernel:
    """Stands in for a kernel of Triton: its programs need as many kB of shared memory as its first argument is."""

    def __init__(self) -> None:
        self.ran: list[tuple[Any, ...]] = []

    def warmup(self, x: Any, kilobytes: int, *, grid: tuple[int, ...], num_warps: int) -> Compiled:
        return Compiled(1024 * kilobytes, self.ran)


@pytest.fixture
def on_gpu() -> Any:
    return SimpleNamespace(is_cuda=True, device=torch.device("cuda", 0))


@pytest.mark.parametrize(("room", "taken"), [(227, 200), (163, 100), (64, 50)])
def test_the_first_option_that_fits_is_taken(
    room: int, taken: int, on_gpu: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launch, "shared_memory", lambda device: 1024 * room)
    kernel = Kernel()
    one = Launch(kernel, [Option((size,), (size,), 4) for size in (200, 100, 50)])
    one(on_gpu)
    one(on_gpu)
    assert kernel.ran == [((taken, 1, 1), taken)] * 2


def test_a_gpu_with_too_little_is_refused_with_numbers(on_gpu: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "shared_memory", lambda device: 48 * 1024)
    with pytest.raises(UnsupportedError, match=r"needs 51200 bytes .* has 49152; choose kernels\('eager'\)"):
        Launch(Kernel(), [Option((1,), (size,), 4) for size in (100, 50)])(on_gpu)


def test_smaller_plans_begin_with_the_best_and_end_with_blocks_of_16() -> None:
    plans = smaller(Plan(2, 2, 64, 128, 4, 3))
    assert plans[0] == Plan(2, 2, 64, 128, 4, 3)
    assert [plan.stages for plan in plans[:3]] == [3, 2, 1]
    assert (plans[-1].block, plans[-1].query_block, plans[-1].stages) == (16, 16, 1)
    assert len({(plan.chunks, plan.readers) for plan in plans}) == 1  # memory is laid out for them


def test_alignment_is_part_of_what_a_launch_is_remembered_by() -> None:
    x = torch.zeros(64, dtype=torch.float16)
    assert aligned(x, None, x[8:]) == 0b101
    assert aligned(x[1:], x, x[9:]) == 0b010
