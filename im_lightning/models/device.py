"""Where to calculate, in what precision, on how many lanes, and how fast that is beside what the machine can do.

Useful work of a causal model = body weights x real tokens + head weights x predicted tokens + causal attention; padding
and logits that nobody asked for are no work. It is compared with the measured rate of matrix products.
"""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from im_lightning.errors import RequestError, message

if TYPE_CHECKING:
    import torch
    from numpy.typing import NDArray
    from torch import nn

PRECISIONS = ("auto", "fp32", "bf16")
CPU_BF16_WIDTH = 512  # below, what is not a product (norms, attention, softmax) takes most of the time
TRAINING_TOKENS = {"cpu": 1024}  # of a micro-batch: enough that the weights are read seldom, few enough for the cache
MOST_TRAINING_TOKENS = 16384
MEMORY_SHARE = 0.6  # of what is there, for the activations of a micro-batch
MOST_LANES = 8  # every lane reads the weights and keeps a batch's states
_ROWS = 2048
_In = TypeVar("_In")
_Out = TypeVar("_Out")


@dataclass(frozen=True)
class Precision:
    """A choice of number format: its name ("fp32", "bf16"), the torch type, and why it was chosen."""

    name: str
    dtype: torch.dtype
    why: str


def resolve_device(device: str | torch.device = "auto") -> torch.device:
    """The named device; "auto" is the first CUDA device if there is one, else the CPU.

    Raises:
        RequestError: the device is unknown or not there.
    """
    import torch

    if str(device) == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        found = torch.device(device)
        torch.empty(1, device=found)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        cause = f"cannot be used here ({str(error).splitlines()[0][:120]})"
        raise RequestError(message(f"device {str(device)!r}", cause, "name cpu, or leave it at auto")) from error
    return found


def check_precision(precision: str) -> None:
    """Validates the name of a number format."""
    if precision not in PRECISIONS:
        raise RequestError(message(f"precision {precision!r}", "is not known", f"give one of {', '.join(PRECISIONS)}"))


def resolve_precision(precision: str, device: torch.device, width: int = 0) -> Precision:
    """The number format for scoring a model of that hidden width (0 if it has none or it is not known).

    "auto" is bf16 where the hardware multiplies it faster: on a CUDA device by its capability; on a CPU with bf16
    instructions for models wide enough that multiplying is most of their work. It goes by what the processor has and
    not by a timing, so that the same machine always chooses the same.

    Raises:
        RequestError: `precision` is none of `PRECISIONS`.
    """
    import torch

    check_precision(precision)
    if precision == "bf16":
        return Precision("bf16", torch.bfloat16, "asked for")
    if precision == "fp32":
        return Precision("fp32", torch.float32, "asked for")
    if device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False):
        return Precision("bf16", torch.bfloat16, "the device multiplies it natively")
    if device.type == "cpu" and cpu_multiplies_bf16():
        if not width:
            return Precision("fp32", torch.float32, "exact on this device")
        if width >= CPU_BF16_WIDTH:
            return Precision("bf16", torch.bfloat16, "the processor multiplies it natively; --precision fp32 is exact")
        return Precision("fp32", torch.float32, "exact, and as fast as bf16 for a model so narrow")
    return Precision("fp32", torch.float32, "exact, and the fastest on this device")


def cpu_multiplies_bf16() -> bool:
    """Whether this processor has instructions for bf16 products (AVX512_BF16 or AMX) and torch uses them."""
    import torch

    found = (getattr(torch.cpu, name, None) for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"))
    return torch.backends.mkldnn.is_available() and any(bool(ask()) for ask in found if ask is not None)


def dtype_argument() -> str:
    """transformers 4.56 renamed `torch_dtype` to `dtype`."""
    from importlib.metadata import version

    major, minor = (int(part) for part in version("transformers").split(".")[:2])
    return "dtype" if (major, minor) >= (4, 56) else "torch_dtype"


class Lanes:
    """How many batches go through a model side by side: a context in which `map` works on `count` items at once.

    On a CPU several run at once, each on threads of its own: one batch on all cores waits at the end of every small
    operation for the slowest of them; two batches on half the cores each do not. On an accelerator, or with one thread,
    there is one lane and no extra thread. All lanes share `cores` threads, by default torch's number of threads.
    There are `most` lanes at most.
    """

    def __init__(self, device: str, cores: int | None = None, most: int = MOST_LANES) -> None:
        import torch

        self._cores = torch.get_num_threads() if cores is None else cores
        few = min(self._cores, most) if device == "cpu" else 1
        able = range((few + 1) // 2, few + 1)  # of these the number that leaves the fewest cores idle
        self.count = max(able, key=lambda lanes: (self._cores // lanes * lanes, lanes))
        self._pool: ThreadPoolExecutor | None = None

    def __enter__(self) -> Lanes:
        if self.count > 1:
            import torch

            self._before = torch.get_num_threads()
            torch.set_num_threads(self._cores // self.count)  # threads started from here on take it over
            self._pool = ThreadPoolExecutor(self.count, "lane")
        return self

    def __exit__(self, *_: object) -> None:
        if self._pool is not None:
            import torch

            self._pool.shutdown(cancel_futures=True)
            self._pool = None
            torch.set_num_threads(self._before)

    def map(
        self, work: Callable[[_In], _Out], items: Iterable[_In], ahead: int | None = None
    ) -> Iterator[tuple[_In, _Out]]:
        """Items with their results, in order; `ahead` items before the caller (two for each lane), so that results do
        not pile up.

        `work` is called in several threads at once, under the caller's autocast and with gradients where it has them;
        an error of it is raised here.
        """
        if self._pool is None:
            for item in items:
                yield item, work(item)
            return
        here = _as_here(work)
        ahead = 2 * self.count if ahead is None else ahead
        waiting: deque[tuple[_In, Future[_Out]]] = deque()
        for item in items:
            waiting.append((item, self._pool.submit(here, item)))
            if len(waiting) > ahead:
                first, result = waiting.popleft()
                yield first, result.result()
        while waiting:
            first, result = waiting.popleft()
            yield first, result.result()


def _as_here(work: Callable[[_In], _Out]) -> Callable[[_In], _Out]:
    """The work in the caller's modes, which torch keeps by thread: inference, gradients and a CPU's autocast."""
    import torch

    inference, grad = torch.is_inference_mode_enabled(), torch.is_grad_enabled()
    dtype, cast = torch.get_autocast_dtype("cpu"), torch.is_autocast_enabled("cpu")

    def run(item: _In) -> _Out:
        modes = torch.inference_mode(inference), torch.set_grad_enabled(grad), torch.autocast("cpu", dtype, cast)
        with modes[0], modes[1], modes[2]:
            return work(item)

    return run


@dataclass(frozen=True)
class ModelWork:
    """Weights of a causal model that tokens are multiplied with.

    Args:
        body: Per token.
        head: Per predicted token, beside.
        attention: Layers x width: twice that per token and token it looks back to, averaged over the triangle.
        layers: How many there are: each costs time of its own per call, however few the tokens.
    """

    body: int
    head: int
    attention: int
    layers: int = 0

    @property
    def parameters(self) -> int:
        """That a token is multiplied with."""
        return self.body + self.head

    def flops(self, lengths: NDArray[np.int64], predicted: int) -> float:
        """Useful floating-point operations of rows of `lengths` tokens, `predicted` tokens of them all together."""
        tokens = np.asarray(lengths, dtype=np.float64)
        return float(2 * self.body * tokens.sum() + 2 * self.head * predicted + 2 * self.attention * (tokens**2).sum())


def model_work(model: nn.Module) -> ModelWork | None:
    """The work of a dense decoder; None for families whose tokens use only some of the weights (experts)."""
    from torch import nn

    config: Any = getattr(model, "config", None)
    if config is None or any((getattr(config, n, 0) or 0) > 1 for n in ("num_local_experts", "num_experts")):
        return None
    head = getattr(model.get_output_embeddings(), "weight", None)  # type: ignore[operator]
    tables = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    body = sum(p.numel() for p in model.parameters() if p.dim() == 2 and id(p) not in tables and p is not head)
    layers, width = (int(getattr(config, name, 0) or 0) for name in ("num_hidden_layers", "hidden_size"))
    return ModelWork(body, 0 if head is None else head.numel(), layers * width, layers) if body else None


@lru_cache(maxsize=16)
def matmul_rate(dtype: torch.dtype, device: torch.device, width: int = 1024, seconds: float = 0.4) -> float:
    """Floating-point operations per second of [2048, width] x [width, 4 width], best of several; once per process."""
    import torch

    left = torch.randn(_ROWS, width, device=device).to(dtype)
    right = torch.randn(4 * width, width, device=device).to(dtype)

    def once() -> float:
        start = time.perf_counter()
        torch.nn.functional.linear(left, right)
        if left.is_cuda:
            torch.cuda.synchronize(left.device)
        return time.perf_counter() - start

    with torch.inference_mode():
        once()
        begun, best = time.perf_counter(), once()
        while time.perf_counter() - begun < seconds:
            best = min(best, once())
    return 2.0 * _ROWS * width * 4 * width / best


def training_tokens(network: nn.Module, device: torch.device, lanes: int = 1) -> int:
    """Tokens of a micro-batch that the device has memory for, `lanes` of them at once, by the shape of a LLaMA.

    Kept for the backward pass, per token: in each layer 18 states of the width and 6 of the inner width, or with
    gradient checkpointing the layer's input alone; and the logits, at most of every token, four times in fp32. Beside
    them the optimiser's two moments and the gradients in fp32.
    """
    most = TRAINING_TOKENS.get(device.type, MOST_TRAINING_TOKENS)
    config: Any = getattr(network, "config", None)
    width, inner, layers, vocabulary = (
        int(getattr(config, name, 0) or 0)
        for name in ("hidden_size", "intermediate_size", "num_hidden_layers", "vocab_size")
    )
    free = _memory(device)
    if not (width and layers and free):
        return min(most, 4096)
    floats = 18 * width + 6 * (inner or 4 * width)
    if any(getattr(module, "gradient_checkpointing", False) for module in network.modules()):
        floats += layers * width
    else:
        floats *= layers
    trained = sum(p.numel() for p in network.parameters() if p.requires_grad)
    left = MEMORY_SHARE * (free - 12 * trained) / lanes
    size = min(p.element_size() for p in network.parameters() if p.is_floating_point())
    return int(min(most, max(1.0, left / (floats * size + 16 * vocabulary))))


def _memory(device: torch.device) -> int:
    """Bytes for what a fit still has to make; 0 where they are not known."""
    import torch

    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    if device.type == "cpu" and hasattr(os, "sysconf"):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
    return 0
