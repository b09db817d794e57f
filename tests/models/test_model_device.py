"""Device and precision: what "auto" means, and that a wrong name is refused before the work."""

from __future__ import annotations

import pytest
import torch

from im_lightning.errors import RequestError
from im_lightning.models import device
from im_lightning.models.device import resolve_device, resolve_precision


def test_auto_on_a_cpu_follows_what_it_multiplies(monkeypatch: pytest.MonkeyPatch) -> None:
    """bf16 halves the time of a wide model where the processor has it; a narrow one stays exact, and so do others."""
    cpu = torch.device("cpu")
    monkeypatch.setattr(device, "cpu_multiplies_bf16", lambda: True)
    assert resolve_precision("auto", cpu, 2048).name == "bf16"
    assert "natively" in resolve_precision("auto", cpu, 2048).why
    assert resolve_precision("auto", cpu, 128).name == "fp32"
    assert resolve_precision("auto", cpu).name == "fp32"
    monkeypatch.setattr(device, "cpu_multiplies_bf16", lambda: False)
    assert resolve_precision("auto", cpu, 2048).name == "fp32"
    assert resolve_precision("fp32", cpu, 2048).dtype == torch.float32
    assert resolve_precision("bf16", cpu).dtype == torch.bfloat16
    assert resolve_precision("fp32", torch.device("cuda")).name == "fp32"


def test_auto_on_a_gpu_follows_what_it_multiplies(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: True)
    assert resolve_precision("auto", torch.device("cuda")).name == "bf16"
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: False)
    assert resolve_precision("auto", torch.device("cuda")).name == "fp32"


def test_wrong_names_are_refused() -> None:
    assert resolve_device("cpu").type == "cpu"
    with pytest.raises(RequestError, match=r"device 'warp': cannot be used here.*name cpu"):
        resolve_device("warp")
    with pytest.raises(RequestError, match=r"precision 'fp8': is not known.*auto, fp32, bf16"):
        resolve_precision("fp8", torch.device("cpu"))
