"""Content fingerprint of a checkpoint, independent of its place: weight hashes, or hub name and commit.

Hashing a 7B checkpoint takes seconds, so the hash of each file is remembered by path, size and modification time.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

from im_lightning._utils.files import parse_json, write_json
from im_lightning._utils.hashing import digest_bytes, digest_json
from im_lightning._utils.progress import log
from im_lightning.errors import InstructMiningError, RequestError, message
from im_lightning.models.gguf import NOTE, PACKAGED, conversion, gguf_of, origin, packaged, write_checkpoint

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "vocab.txt",
    "spiece.model",
    "sentencepiece.bpe.model",
    "chat_template.jinja",
)
_PARTS = (".json", ".safetensors", ".bin", ".txt", ".model")
_NO_WEIGHTS = ("adapter_model", "training_args", "optimizer")
_OTHER_BACKENDS = {"onnx", "openvino"}
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.\-]*(/[A-Za-z0-9][\w.\-]*)?\Z")
_RECENT_NS = 2_000_000_000  # a file changed this lately may change again under the same time stamp
_ANNOUNCE_BYTES = 2 << 30


def cache_root(cache_dir: str | os.PathLike[str] | None = None) -> Path:
    """Where what can be computed again is kept: the argument, $IM_LIGHTNING_CACHE or ~/.cache/im_lightning."""
    chosen = cache_dir or os.environ.get("IM_LIGHTNING_CACHE") or "~/.cache/im_lightning"
    return Path(chosen).expanduser()


def local_folder(model: str | os.PathLike[str]) -> Path | None:
    """The folder that `model` names, or None if it is a hub id.

    A GGUF file, or a folder that holds one in place of weights, means the folder that it is dequantised into; smollm2
    and minilm mean the models that packages carry (`im_lightning.models.gguf`).

    Raises:
        RequestError: `model` is neither: a path that does not exist, another file, a text that no hub accepts as a
            name, or the name of a package's model that is not installed.
    """
    path = Path(model).expanduser()
    if not path.exists() and str(model) in PACKAGED:
        path = packaged(str(model))
    if path.is_dir() and any(any(path.glob(pattern)) for pattern in ("*.safetensors", "*.bin")):
        return path
    if path.exists() and (file := gguf_of(path)) is not None:
        return dequantised(file)
    if path.is_dir():
        return path
    if path.exists():
        remedy = "name the folder that holds it, or a .gguf file"
        raise RequestError(message(str(model), "is a file, not a checkpoint folder", remedy))
    if _HUB_ID.match(str(model)) is None:
        remedy = "check the path, or name a model as org/name of the hub"
        raise RequestError(message(str(model), "there is no such folder", remedy))
    return None


def checkpoint_identity(
    model: str | os.PathLike[str], revision: str | None = None, cache_dir: str | os.PathLike[str] | None = None
) -> dict[str, Any]:
    """Identity of a model and its tokenizer, a JSON-like dict that does not depend on the path.

    Returns:
        `{"weights": hash of weight files and config, "tokenizer": hash of the tokenizer's files}` for a folder,
        `{"name": id, "revision": commit}` for a hub id.

    Raises:
        RequestError: the folder holds no checkpoint, or the commit of a hub id cannot be found out.
    """
    folder = local_folder(model)
    if folder is None:
        return {"name": str(model), "revision": hub_commit(str(model), revision)}
    weights = weight_files(folder)
    tokenizer = [folder / name for name in TOKENIZER_FILES if (folder / name).is_file()]
    hashes = _hash_files(folder, [*weights, *tokenizer], cache_root(cache_dir) / "hashes")
    made = origin(folder, hashes) if (folder / NOTE).is_file() else None
    if made is not None:  # not of config.json, which differs between transformers' versions
        return {"weights": f"gguf {made['digest']}", "tokenizer": f"gguf {made['digest']}"}
    return {
        "weights": digest_json([_without_history(folder / "config.json"), [hashes[p.name] for p in weights]]),
        "tokenizer": digest_json({p.name: hashes[p.name] for p in tokenizer}),
    }


def folder_identity(model: str | os.PathLike[str], cache_dir: str | os.PathLike[str] | None = None) -> dict[str, Any]:
    """As `checkpoint_identity`, of one that has parts in subfolders (sentence-transformers): all weights, settings."""
    folder = local_folder(model)
    if folder is None:
        return {"name": str(model), "revision": hub_commit(str(model))}
    parts = [p for p in sorted(folder.rglob("*")) if p.suffix in _PARTS and p.is_file()]
    parts = [p for p in parts if not _OTHER_BACKENDS.intersection(p.relative_to(folder).parts)]
    if any(p.suffix == ".safetensors" for p in parts):
        parts = [p for p in parts if p.suffix != ".bin"]
    if not any(p.suffix in (".safetensors", ".bin") for p in parts):
        cause = "has no weights (*.safetensors or *.bin)"
        raise RequestError(message(str(folder), cause, "name a folder written by save_pretrained"))
    settings = [p for p in parts if p.suffix == ".json"]
    hashes = _hash_files(folder, [p for p in parts if p.suffix != ".json"], cache_root(cache_dir) / "hashes")
    contents = {str(p.relative_to(folder)): _without_history(p) for p in settings}
    return {"files": digest_json([hashes, contents])}


def dequantised(file: Path) -> Path:
    """The checkpoint folder in fp32 that the GGUF file stands for, in the cache; made if it is not there.

    It is named by a digest of the file (and of a tokenizer.json beside it, which is used in place of the file's own
    vocabulary). Processes that ask at the same time wait for the one that makes it.

    Raises:
        RequestError: as `gguf.write_checkpoint`.
        InstructMiningError: the cache cannot be written.
    """
    from filelock import FileLock

    beside = [p for name in TOKENIZER_FILES if (p := file.parent / name).is_file()]
    sources = [file, *(beside if (file.parent / "tokenizer.json").is_file() else [])]
    hashes = _hash_files(file.parent, sources, cache_root() / "hashes")
    version = conversion(file, len(sources) > 1)
    digest = digest_json([hashes[file.name], [hashes[p.name] for p in sources[1:]], version])
    folder = cache_root() / "gguf" / f"{file.stem}-{digest[:16]}"
    if folder.is_dir():
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(folder.with_name(f".{folder.name}.lock")):
            if not folder.is_dir():
                log(f"{file.name}: dequantising to fp32, once, into {folder}")
                _dequantise(file, len(sources) > 1, folder, digest)
    except OSError as error:
        cause = f"cannot be written ({error.strerror or error})"
        raise InstructMiningError(message(str(folder), cause, "free the disk, or set IM_LIGHTNING_CACHE")) from error
    return folder


def _dequantise(file: Path, own_tokenizer: bool, folder: Path, digest: str) -> None:
    """Writes the folder beside its place, then renames it: it is whole or not there."""
    for left in folder.parent.glob(f".{folder.name}.*"):  # by a killed writer: only one holds the lock
        if left.is_dir():
            shutil.rmtree(left)
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        write_checkpoint(file, own_tokenizer, temporary)
        written = sorted(temporary.iterdir())
        hashes = {path.name: _hash_file(path) for path in written}
        write_json(temporary / NOTE, {"file": file.name, "digest": digest, "files": hashes})
        temporary.replace(folder)
        log(f"  {sum(p.stat().st_size for p in folder.iterdir()) / 1e9:.2f} GB")
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def tokenizer_identity(identity: dict[str, Any]) -> Any:
    """The part of a checkpoint's identity that decides how text becomes tokens."""
    return identity.get("tokenizer", identity)


def weight_files(folder: Path) -> list[Path]:
    """The weight files that loading reads, in name order: safetensors where there are any, else `.bin`.

    Raises:
        RequestError: no `config.json`, or no weights.
    """
    if not (folder / "config.json").is_file():
        if (folder / "adapter_config.json").is_file():
            cause, remedy = "holds a LoRA adapter, not a model", "merge it into its base model, or name the base model"
        else:
            cause, remedy = "has no config.json", "name a folder written by save_pretrained, or a hub id"
        raise RequestError(message(str(folder), cause, remedy))
    for pattern in ("*.safetensors", "*.bin"):
        if files := sorted(p for p in folder.glob(pattern) if not p.name.startswith(_NO_WEIGHTS)):
            return files
    cause = "has a config.json but no weights (*.safetensors or *.bin)"
    raise RequestError(message(str(folder), cause, "finish the download or copy"))


def hub_commit(name: str, revision: str | None = None) -> str:
    """The commit that a hub id stands for: asked from the hub, or of the newest local copy where it is out of reach."""
    from huggingface_hub import HfApi, try_to_load_from_cache

    wanted = revision or "main"
    if re.fullmatch(r"[0-9a-f]{40}", wanted):
        return wanted
    try:
        if sha := HfApi().model_info(name, revision=revision, timeout=20).sha:
            return sha
        cause: str = "the hub names no commit"
    except Exception as error:  # the client raises many kinds: offline, HTTP, validation
        cause = f"the hub cannot be reached or has no such model ({type(error).__name__})"
    local = try_to_load_from_cache(name, "config.json", revision=wanted)
    if isinstance(local, str):
        return Path(local).parent.name
    remedy = "check the name and the connection, or name a local checkpoint folder"
    raise RequestError(message(f"{name} (revision {wanted})", f"{cause}, and there is no local copy", remedy))


def _without_history(path: Path) -> Any:
    """Settings of a checkpoint without what says where they came from."""
    try:
        settings = parse_json(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise RequestError(message(str(path), f"is not readable JSON ({error})", "copy the checkpoint anew")) from error
    if isinstance(settings, dict):
        for key in ("_name_or_path", "transformers_version", "__version__"):
            settings.pop(key, None)
    return settings


def _hash_files(folder: Path, files: list[Path], memory: Path) -> dict[str, str]:
    """Hash of each file by its path in `folder`; remembered in one JSON file per folder under `memory`."""
    note = memory / f"{digest_bytes(os.fsencode(folder.resolve()))}.json"
    try:
        known = parse_json(note.read_text())["files"]
    except (OSError, ValueError, KeyError, TypeError):
        known = {}
    hashes: dict[str, str] = {}
    entries: dict[str, list[Any]] = {}
    announced = False
    for path in files:
        name, stat = str(path.relative_to(folder)), path.stat()
        stamp = [stat.st_size, stat.st_mtime_ns]
        entry = known.get(name)
        if isinstance(entry, list) and len(entry) == 3 and entry[:2] == stamp:
            hashes[name] = entry[2]
        else:
            if stat.st_size > _ANNOUNCE_BYTES and not announced:
                log(f"{folder}: hashing the weight files, once")
                announced = True
            hashes[name] = _hash_file(path)
        if time.time_ns() - stat.st_mtime_ns > _RECENT_NS:
            entries[name] = [*stamp, hashes[name]]
    if any(known.get(name) != entry for name, entry in entries.items()):
        # the memory only saves time; a read-only cache is reported where values are to be kept
        with contextlib.suppress(InstructMiningError):
            write_json(note, {"folder": str(folder), "files": {**known, **entries}})
    return hashes


def _hash_file(path: Path) -> str:
    h = hashlib.blake2b(digest_size=16)
    try:
        with path.open("rb") as stream:
            while block := stream.read(1 << 22):
                h.update(block)
    except OSError as error:
        raise RequestError(message(str(path), f"cannot be read ({error.strerror})", "check its permissions")) from error
    return h.hexdigest()
