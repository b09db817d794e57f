"""`im-lightning clean`: lists what the other commands and fits keep beside their outputs, and removes it when asked."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

SUMMARY = "list what fits and commands keep beside their outputs; --remove removes it"
EXAMPLE = "im-lightning clean --folder . --remove"


def run(folder: str = ".", remove: bool = False) -> int:
    """Lists the files that im_lightning makes of its own accord: nothing in them that could not be made again.

    These are the frozen inputs of fits (im-lightning/DIGEST/ in the Trainer's folder: scores, rule and weights, which a
    resumed fit takes), notes of what scoring cost (scores.parquet.cost.json), and temporary files that a killed process
    left. Rules, ledgers, score tables, checkpoints and the score store ($IM_LIGHTNING_CACHE) are not touched.

    Args:
        folder: Where to look, with its subfolders; hidden ones are passed over.
        remove: Remove what is listed.
    """
    import shutil

    from im_lightning._utils.answer import answer
    from im_lightning._utils.progress import log
    from im_lightning.errors import InstructMiningError, RequestError, message

    root = Path(folder)
    if not root.is_dir():
        raise RequestError(message(f"--folder {folder}", "there is no such folder", "name one that is there"))
    files = [(path, _size(path), what) for path, what in found(root)]
    record = [dict(zip(("path", "bytes", "what"), one, strict=True)) for one in files]
    lines = [f"{path}  {size / 1e6:.2f} MB, {what}" for path, size, what in files]
    answer({"files": record, "remove": remove}, "\n".join(lines) or None)
    total, count = sum(size for _, size, _ in files), len(files)
    if remove:
        for path, _, _ in files:
            try:
                if path.is_file():
                    path.unlink()
                else:
                    shutil.rmtree(path)
                    if not any(path.parent.iterdir()):
                        path.parent.rmdir()
            except OSError as error:
                remedy = "remove it by hand, or make its folder writable"
                raise InstructMiningError(message(str(path), f"it cannot be removed: {error}", remedy)) from error
    done = "removed" if remove else "found; --remove removes it"
    log(
        f"{folder}: {count} of im_lightning's own, {total / 1e6:.2f} MB, {done}"
        if count
        else f"{folder}: nothing found"
    )
    return 0


def _size(path: Path) -> int:
    """Bytes of a file, or of all files of a folder."""
    return sum(p.stat().st_size for p in ([path] if path.is_file() else path.rglob("*")) if p.is_file())


def found(root: Path) -> Iterator[tuple[Path, str]]:
    """What may be removed under a folder, each with what it is."""
    import re
    import time

    from im_lightning._utils.files import LEFT_SECONDS
    from im_lightning.models.cost import is_note
    from im_lightning.training.run.run_folder import FOLDER

    for path in sorted(root.iterdir()):
        if path.is_symlink():
            continue
        if path.is_dir():
            frozen = root.name == FOLDER or root.resolve().name == FOLDER
            if frozen and re.fullmatch("[0-9a-f]{32}", path.name) and (path / "inputs.json").is_file():
                yield path, "inputs of a fit, frozen"
            elif not path.name.startswith("."):
                yield from found(path)
        elif _is(path, is_note):
            yield path, "what scoring cost; compare tells it"
        elif re.fullmatch(r"\..+\.tmp", path.name) and time.time() - path.stat().st_mtime > LEFT_SECONDS:
            yield path, "left by a killed process"


def _is(path: Path, ours: Callable[[Path], bool]) -> bool:
    try:
        return ours(path)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False
