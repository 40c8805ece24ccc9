"""Exchange between the processes of a command. All of them must call the same functions in the same order."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from dqtool.distributed.world import is_main, rank, reduction_group, world_size
from dqtool.errors import EnvironmentFault

if TYPE_CHECKING:
    from torch import Tensor

__all__ = [
    "LostPeer",
    "add_up",
    "barrier",
    "broadcast",
    "by_rows",
    "copy_main",
    "gather",
    "gather_rows",
    "row_counts",
    "shared_batches",
]

T = TypeVar("T")


class LostPeer(EnvironmentFault):
    """Another process of this command has ended. Its own error, if it could report one, is the cause."""


@contextlib.contextmanager
def _together() -> Iterator[Any]:
    """Yield `torch.distributed`. Raise `LostPeer` where another process ends inside."""
    import torch.distributed as dist

    try:
        yield dist
    except RuntimeError as error:
        raise LostPeer(
            "Another process of this command has ended, and the work can't go on without it",
            fix="The same command goes on from the finished pieces, with any number of processes",
        ) from error


def broadcast(value: T) -> T:
    """Return the main process's `value`; that of other processes is ignored."""
    if world_size() == 1:
        return value
    box = [value if is_main() else None]
    with _together() as dist:
        dist.broadcast_object_list(box, src=0)
    result: Any = box[0]
    return result  # type: ignore[no-any-return]


def gather(value: T) -> list[T]:
    """Return the values of all processes, by rank."""
    if world_size() == 1:
        return [value]
    found: list[Any] = [None] * world_size()
    with _together() as dist:
        dist.all_gather_object(found, value)
    return found


def barrier() -> None:
    """Wait for all processes."""
    if world_size() > 1:
        with _together() as dist:
            dist.barrier()


def row_counts(rows: int) -> list[int]:
    """Return how many of `rows` rows each process takes, by rank. They differ by 1 at most, and parts are contiguous."""
    each, more = divmod(rows, world_size())
    return [each + (index < more) for index in range(world_size())]


def by_rows(function: Callable[..., T], *arguments: Any, rows: int) -> T:
    """Return `function(*arguments)`, computed by all processes, each on its part of the rows.

    Tensors in the arguments whose first dimension is `rows` are split, all others are passed as they are. The tensors of the
    result must have one row for each row of the arguments. Fewer rows than processes are computed by every process.
    """
    if world_size() == 1 or rows < world_size():
        return function(*arguments)
    from torch import Tensor
    from torch.utils._pytree import tree_map

    counts = row_counts(rows)
    start = sum(counts[: rank()])
    mine = slice(start, start + counts[rank()])

    def part(value: Any) -> Any:
        return value[mine] if isinstance(value, Tensor) and value.dim() and len(value) == rows else value

    result = function(*tree_map(part, arguments))
    whole: T = tree_map(lambda each: gather_rows(each, counts) if isinstance(each, Tensor) else each, result)
    return whole


def gather_rows(mine: Tensor, counts: Sequence[int]) -> Tensor:
    """Return the rows of all processes, `[sum(counts), ...]`, on the device of `mine` `[counts[rank], ...]`."""
    if world_size() == 1:
        return mine
    import torch

    most = max(counts)
    # Sent as bytes, since gloo does not know every type.
    sent = torch.zeros((most, *mine.shape[1:]), dtype=mine.dtype)
    sent[: len(mine)] = mine.detach()
    found = [torch.empty_like(sent) for _ in counts]
    with _together() as dist:
        dist.all_gather([_bytes(each) for each in found], _bytes(sent))
    return torch.cat([each[:count] for each, count in zip(found, counts, strict=True)]).to(mine.device)


def _bytes(tensor: Tensor) -> Tensor:
    """Return the memory of a contiguous tensor as uint8 `[n]`."""
    import torch

    return tensor.view(-1).view(torch.uint8)


def add_up(tensors: Sequence[Tensor], value: float = 0.0) -> float:
    """Replace float tensors by their sums over all processes, in place, and return the sum of `value`.

    All processes get the same bits.
    """
    if world_size() == 1:
        return value
    import torch

    group = reduction_group() if tensors and tensors[0].device.type == "cuda" else None
    number = torch.tensor([value], dtype=torch.float32)
    device = tensors[0].device if group is not None else number.device
    flat = torch.cat([each.detach().reshape(-1).to(device, torch.float32) for each in (*tensors, number)])
    with _together() as dist:
        dist.all_reduce(flat, group=group)
    start = 0
    with torch.no_grad():
        for each in tensors:
            each.copy_(flat[start : start + each.numel()].view(each.shape))
            start += each.numel()
    return float(flat[-1])


def copy_main(tensors: Iterable[Tensor], source: int = 0) -> None:
    """Replace tensors by those of the main process, or of the process `source`, in place."""
    if world_size() == 1:
        return
    import torch

    with _together() as dist, torch.no_grad():
        for tensor in tensors:
            sent = tensor.detach().cpu().contiguous()
            if sent.numel():
                dist.broadcast(_bytes(sent), src=source)
                tensor.copy_(sent)


def shared_batches(batches: Iterable[T]) -> Iterator[T]:
    """Yield the main process's batches to every process; those of other processes are not looked at."""
    if world_size() == 1:
        yield from batches
        return
    if is_main():
        for batch in batches:
            broadcast((batch,))
            yield batch
        broadcast(None)
        return
    while True:
        box: tuple[T] | None = broadcast(None)
        if box is None:
            return
        yield box[0]
