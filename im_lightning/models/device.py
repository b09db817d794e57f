"""Where to calculate and in what precision."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from im_lightning.errors import RequestError, message

if TYPE_CHECKING:
    import torch

PRECISIONS = ("auto", "fp32", "bf16")
CPU_BF16_WIDTH = 512  # below, what is not a product (norms, attention, softmax) takes most of the time


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


def resolve_precision(precision: str, device: torch.device, width: int = 0) -> Precision:
    """The number format for scoring.

    "auto" is bf16 where the hardware multiplies it faster: on a CUDA device by its capability; on a CPU with bf16
    instructions for models wide enough that multiplying is most of their work. It goes by what the processor has and
    not by a timing, so that the same machine always chooses the same.

    Args:
        precision: One of `PRECISIONS`.
        device: Where to calculate.
        width: Hidden width of the model; 0 if there is none or it is not known.

    Raises:
        RequestError: `precision` is none of `PRECISIONS`.
    """
    import torch

    if precision not in PRECISIONS:
        raise RequestError(message(f"precision {precision!r}", "is not known", f"give one of {', '.join(PRECISIONS)}"))
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
