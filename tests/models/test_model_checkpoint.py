"""Checkpoints: identity by content, loading, and messages for the folders people really have."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import torch

from im_lightning.errors import RequestError
from im_lightning.models import fingerprint as identity_module
from im_lightning.models.checkpoint import checkpoint_identity, load_causal_lm, load_tokenizer


def test_loads_in_eval_mode_and_wanted_type(tiny_llama: str) -> None:
    model = load_causal_lm(tiny_llama, dtype=torch.bfloat16)
    assert not model.training and next(model.parameters()).dtype == torch.bfloat16
    assert next(load_causal_lm(tiny_llama).parameters()).dtype == torch.float32
    assert load_tokenizer(tiny_llama).bos_token == "<s>"


def test_bin_weights_load_as_tensors_only(tiny_llama: str, tmp_path: Path) -> None:
    """Old checkpoints still work, but a pickle that runs code does not."""
    folder = tmp_path / "old"
    shutil.copytree(tiny_llama, folder)
    (folder / "model.safetensors").unlink()
    model = load_causal_lm(tiny_llama)
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    torch.testing.assert_close(load_causal_lm(folder).state_dict(), model.state_dict())

    class Evil:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return os.mkdir, (str(tmp_path / "evil"),)

    torch.save({"lm_head.weight": Evil()}, folder / "pytorch_model.bin")
    with pytest.raises(RequestError, match="cannot be loaded as a causal model"):
        load_causal_lm(folder)
    assert not (tmp_path / "evil").exists()


def test_missing_weights_are_refused(tiny_llama: str, tmp_path: Path) -> None:
    """transformers fills them with random numbers and only warns: every perplexity would be noise."""
    base = load_causal_lm(tiny_llama).model
    base.save_pretrained(tmp_path / "headless")
    with pytest.raises(RequestError, match=r"headless: 1 weights are missing .*lm_head.*with its head"):
        load_causal_lm(tmp_path / "headless")


def test_identity_follows_content_not_path(tiny_llama: str, tmp_path: Path) -> None:
    """Moving a checkpoint must not cost a day of scoring; changing it must not reuse old values."""
    moved = tmp_path / "moved"
    shutil.copytree(tiny_llama, moved)
    config = json.loads((moved / "config.json").read_text())
    (moved / "config.json").write_text(json.dumps({**config, "_name_or_path": "/old/place"}))
    first = checkpoint_identity(tiny_llama)
    assert first == checkpoint_identity(moved) and set(first) == {"weights", "tokenizer"}

    (moved / "config.json").write_text(json.dumps({**config, "rope_theta": 5.0}))
    assert checkpoint_identity(moved)["weights"] != first["weights"]
    assert checkpoint_identity(moved)["tokenizer"] == first["tokenizer"]
    (moved / "tokenizer.json").write_text((moved / "tokenizer.json").read_text().replace("healthy", "haelthy") + " ")
    assert checkpoint_identity(moved)["tokenizer"] != first["tokenizer"]
    weights = bytearray((moved / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    before = checkpoint_identity(moved)["weights"]
    (moved / "model.safetensors").write_bytes(weights)
    assert checkpoint_identity(moved)["weights"] != before


def test_hash_is_remembered_until_the_file_changes(
    tiny_llama: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Hashing a 7B checkpoint on every call would take longer than reading the scores."""
    folder = tmp_path / "model"
    shutil.copytree(tiny_llama, folder)
    for path in folder.iterdir():
        os.utime(path, (1_000_000_000, 1_000_000_000))
    hashed: list[str] = []
    real = identity_module._hash_file
    monkeypatch.setattr(identity_module, "_hash_file", lambda path: hashed.append(path.name) or real(path))
    first = checkpoint_identity(folder, cache_dir=tmp_path / "c")
    assert "model.safetensors" in hashed
    hashed.clear()
    assert checkpoint_identity(folder, cache_dir=tmp_path / "c") == first and hashed == []
    os.utime(folder / "model.safetensors", (1_000_000_001, 1_000_000_001))
    assert checkpoint_identity(folder, cache_dir=tmp_path / "c") == first and hashed == ["model.safetensors"]
    for note in (tmp_path / "c" / "hashes").iterdir():
        note.write_text("{torn")
    assert checkpoint_identity(folder, cache_dir=tmp_path / "c") == first


def test_messages_for_what_is_not_a_checkpoint(tmp_path: Path, tiny_llama: str) -> None:
    with pytest.raises(RequestError, match=r"/no/such: there is no such folder\. Fix: check the path, or name"):
        load_causal_lm("/no/such")
    with pytest.raises(RequestError, match="is a file, not a checkpoint folder"):
        checkpoint_identity(f"{tiny_llama}/config.json")
    (tmp_path / "empty").mkdir()
    with pytest.raises(RequestError, match=r"empty: has no config\.json.*save_pretrained"):
        checkpoint_identity(tmp_path / "empty")
    (tmp_path / "lora").mkdir()
    (tmp_path / "lora" / "adapter_config.json").write_text("{}")
    with pytest.raises(RequestError, match=r"holds a LoRA adapter.*name the base model"):
        load_causal_lm(tmp_path / "lora")
    (tmp_path / "part").mkdir()
    shutil.copy(f"{tiny_llama}/config.json", tmp_path / "part")
    with pytest.raises(RequestError, match=r"no weights.*finish the download"):
        checkpoint_identity(tmp_path / "part")
    with pytest.raises(RequestError, match=r"has no readable tokenizer.*save the tokenizer beside the model"):
        load_tokenizer(tmp_path / "part")
    with pytest.raises(RequestError, match=r"nobody/nothing \(revision main\): the hub.*local checkpoint folder"):
        checkpoint_identity("nobody/nothing")
    with pytest.raises(RequestError, match="nobody/nothing: there is no such folder, and the hub's model"):
        load_causal_lm("nobody/nothing")


def test_encoder_decoder_is_refused(tmp_path: Path) -> None:
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(vocab_size=32, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2, decoder_start_token_id=0)
    T5ForConditionalGeneration(config).save_pretrained(tmp_path / "t5")
    with pytest.raises(RequestError, match=r"encoder-decoder \(t5\)"):
        load_causal_lm(tmp_path / "t5")


def test_a_gated_model_says_what_opens_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its name and the connection are right: what is missing is the licence, accepted, and a token."""
    import transformers

    def gated(*_: object, **__: object) -> None:
        raise OSError("You are trying to access a gated repo.\nMake sure to have access to it.")

    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", gated)
    with pytest.raises(RequestError, match=r"accepted its licence .*gated repo.*Fix: accept it on .*hf auth login"):
        load_tokenizer("meta-llama/Llama-3.2-1B")
