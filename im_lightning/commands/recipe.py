"""`im-lightning recipe`: the settings of `fit` and `sweep` that come with the package, to read and to copy."""

from __future__ import annotations

from pathlib import Path

from im_lightning._utils.answer import answer
from im_lightning._utils.text_tables import term_list, terminal_width, wrapped

SUMMARY = "print one of the recipes that come with the package, or write them all into a folder"
EXAMPLE = "im-lightning recipe designed_run > designed.yaml"
POSITIONAL = ("name",)


def run(name: str | None = None, out: str | None = None) -> int:
    """Prints a recipe: the settings of `fit` or `sweep` as YAML, with a comment at each key. Without a name it lists
    them.

    Args:
        name: A recipe by its file's name, with or without its folder (`designed_run`, `models/llama-2-7b`).
        out: Write all recipes, with their pages, into this folder instead, as the README's commands expect them in
            `recipes`. A file that is there already must be the same.
    """
    from im_lightning.errors import RequestError, message

    if out is not None and name is not None:
        cause, remedy = "all recipes are written there, and one is named", "leave out its name, or --out to print it"
        raise RequestError(message(f"recipe {name} --out {out}", cause, remedy))
    root = folder()
    files = sorted(path for path in root.rglob("*") if path.suffix in (".yaml", ".md"))
    if out is not None:
        _write_all(root, files, Path(out))
        return 0
    recipes = by_name()
    if name is None:
        titles = {key: _title(path) for key, path in recipes.items()}
        width = terminal_width()
        how = "im-lightning recipe NAME prints one, im-lightning recipe --out recipes writes them all."
        answer({"recipes": titles}, f"{term_list(list(titles.items()), width)}\n\n{wrapped(how, width)}")
        return 0
    found = [path for key, path in recipes.items() if name.removesuffix(".yaml") in (key, path.stem)]
    if not found:
        stems = ", ".join(path.stem for path in recipes.values())
        raise RequestError(message(f"recipe {name!r}", "there is none of this name", f"take one of {stems}"))
    text = found[0].read_text(encoding="utf-8")
    answer({"path": found[0], "yaml": text}, text.removesuffix("\n"))
    return 0


def folder() -> Path:
    """Where the recipes lie: in the installed package, or beside it in a checkout."""
    package = Path(__file__).parents[1]
    return next(path for path in (package / "recipes", package.parent / "recipes") if path.is_dir())


def by_name() -> dict[str, Path]:
    """Name, with its folder → file of each recipe."""
    root = folder()
    return {path.relative_to(root).with_suffix("").as_posix(): path for path in sorted(root.rglob("*.yaml"))}


def _title(path: Path) -> str:
    """The first sentence of the comment in its first line."""
    return path.read_text(encoding="utf-8").partition("\n")[0].removeprefix("# ").partition(". ")[0].rstrip(".")


def _write_all(root: Path, files: list[Path], out: Path) -> None:
    """Copies the recipes; nothing is written if a file of the user's has one of the names."""
    from im_lightning._utils.files import write_text
    from im_lightning.errors import RequestError, message

    new = {out / path.relative_to(root): path.read_text(encoding="utf-8") for path in files}
    for target, text in new.items():
        if target.exists() and target.read_text(encoding="utf-8") != text:
            cause = "it is there and is not the recipe that would be written"
            raise RequestError(message(str(target), cause, "name another folder with --out, or move it"))
    for target, text in new.items():
        write_text(target, text)
    answer({"out": out, "files": list(new)}, f"{len(new)} files in {out}")
