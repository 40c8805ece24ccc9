"""What `dilate` does before there is a network: imports, and beside them all work that needs the model's file only."""

from __future__ import annotations

import contextlib
import importlib
import threading
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

from dqtool.core.allocator import keep_freed_memory
from dqtool.errors import DqtoolError
from dqtool.models.sources import ModelSource

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["channel_slacks", "file_tensors", "importing"]

STAGE = (
    "dqtool.models.companions",
    "dqtool.models.families",
    "dqtool.models.loading",
    "dqtool.scaling.folding",
    "dqtool.scaling.divided_inputs",
    "dqtool.scaling.records",
)
"""What the stage imports when it comes to its work."""


@contextlib.contextmanager
def importing(class_name: str) -> Iterator[None]:
    """Import what a network of this diffusers class needs in a thread, which has ended when the block is left.

    The block must import nothing and ask for Python's lock seldom: whoever waits for it there makes the imports wait too.
    What can't be imported is left for the stage to find out.
    """

    def work() -> None:
        import diffusers

        for name in STAGE:
            importlib.import_module(name)
        getattr(diffusers, class_name, None)

    def quietly() -> None:
        with contextlib.suppress(ImportError, RuntimeError):
            work()

    thread = threading.Thread(target=quietly)
    thread.start()
    try:
        yield
    finally:
        thread.join()


def file_tensors(source: ModelSource) -> dict[str, Tensor]:
    """The network's tensors as they are in its files, mapped; none where loading changes or refuses them."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if source.layout is not None or source.loras:
        return {}
    try:
        return {name: tensor for path in source.weights for name, tensor in load_file(path).items()}
    except (SafetensorError, OSError):
        return {}


def channel_slacks(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`channel_slack` of everything that has the form of an ungrouped weight, and is finite, by name."""
    import torch

    from dqtool.core.dilation import channel_slack
    from dqtool.core.threads import operation_threads

    keep_freed_memory()
    threads = torch.get_num_threads()

    def slack(name: str) -> Tensor | None:
        with operation_threads(1, then=threads):
            try:
                return channel_slack(tensors[name])
            except DqtoolError:
                return None

    names = [name for name, tensor in tensors.items() if tensor.is_floating_point() and tensor.dim() > 1]
    with ThreadPoolExecutor(threads) as pool:
        found = dict(zip(names, pool.map(slack, names), strict=True))
    return {name: each for name, each in found.items() if each is not None}
