"""Where to calculate and in what precision."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from im_lightning.errors import RequestError, message

if TYPE_CHECKING:
    import torch

PRECISIONS = ("auto", "fp32", "bf16")


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


def resolve_precision(precision: str, device: torch.device) -> Precision:
    """The number format for scoring.

    "auto" is bf16 on a CUDA device that multiplies it natively, and fp32 elsewhere: on a CPU the scores are then equal
    to the plain fp32 loop.

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
    return Precision("fp32", torch.float32, "exact on this device")
