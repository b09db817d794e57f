"""Nothing that comes with a checkpoint is run: no pickled code, no Python files beside the weights.

If these failed, trying a downloaded model or resuming from a colleague's checkpoint could run anything at all.
"""

from __future__ import annotations

import ast
import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from fitting import make_world, trainer

import im_lightning
from im_lightning.errors import InstructMiningError, RequestError
from im_lightning.models.checkpoint import load_causal_lm, load_tokenizer

PACKAGE = Path(im_lightning.__file__).parent
CODE = (
    "open({mark!r}, 'w').close()\nclass Evil:\n    @classmethod\n    def from_pretrained(cls, *a, **k): return cls()\n"
)


class Runs:
    """Makes a file when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return (Path.touch, (self.mark,))


@pytest.fixture
def mark(tmp_path: Path) -> Path:
    return tmp_path / "code was run"


def calls() -> list[tuple[Path, ast.Call]]:
    found = []
    for path in PACKAGE.rglob("*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        found += [(path, node) for node in ast.walk(tree) if isinstance(node, ast.Call)]
    return found


def test_the_package_never_trusts_remote_code() -> None:
    for path, call in calls():
        for keyword in call.keywords:
            if keyword.arg == "trust_remote_code":
                value = keyword.value
                assert isinstance(value, ast.Constant) and value.value is False, f"{path}:{call.lineno}"


def test_the_package_unpickles_nothing() -> None:
    """`torch.load` only with weights_only=True, and nothing else that unpickles."""
    for path, call in calls():
        name = ast.unparse(call.func)
        if name == "torch.load" or name.endswith(".torch.load"):
            given = {k.arg: ast.unparse(k.value) for k in call.keywords}
            assert given.get("weights_only") == "True", f"{path}:{call.lineno}"
        assert name not in ("pickle.load", "pickle.loads", "joblib.load", "dill.load"), f"{path}:{call.lineno}"
        if name in ("np.load", "numpy.load"):
            allowed = {k.arg: ast.unparse(k.value) for k in call.keywords}.get("allow_pickle", "False")
            assert allowed == "False", f"{path}:{call.lineno}"


def test_pickled_code_among_weights_is_refused(tiny_llama: str, mark: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_llama, folder)
    for path in folder.glob("*.safetensors"):
        path.unlink()
    for content in (Runs(mark), {"lm_head.weight": Runs(mark)}):
        torch.save(content, folder / "pytorch_model.bin")
        with pytest.raises(InstructMiningError, match="Fix"):
            load_causal_lm(str(folder))
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Runs(mark)))
    with pytest.raises(InstructMiningError, match="Fix"):
        load_causal_lm(str(folder))
    assert not mark.exists()
    pickle.loads(pickle.dumps(Runs(mark)))  # it would have shown
    assert mark.exists()


def test_python_beside_the_weights_is_not_run(tiny_llama: str, mark: Path, tmp_path: Path) -> None:
    """A folder whose config names classes of its own is loaded as what it is, or refused."""
    folder = tmp_path / "model"
    shutil.copytree(tiny_llama, folder)
    (folder / "evil.py").write_text(CODE.format(mark=str(mark)))
    config = json.loads((folder / "config.json").read_text())
    auto = dict.fromkeys(("AutoConfig", "AutoModel", "AutoModelForCausalLM"), "evil.Evil")
    for model_type in ("llama", "evil"):
        changed = {**config, "model_type": model_type, "auto_map": auto}
        (folder / "config.json").write_text(json.dumps(changed))
        if model_type == "llama":
            load_causal_lm(str(folder))
        else:
            with pytest.raises(RequestError, match="Fix"):
                load_causal_lm(str(folder))
    (folder / "config.json").write_text(json.dumps(config))
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings |= {"auto_map": {"AutoTokenizer": ["evil.Evil", "evil.Evil"]}, "tokenizer_class": "Evil"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    try:
        load_tokenizer(str(folder))
    except InstructMiningError as error:
        assert "Fix" in str(error)
    assert not mark.exists()


def test_a_training_checkpoint_with_code_is_refused(small_base: str, mark: Path, tmp_path: Path) -> None:
    world = make_world(small_base, tmp_path)
    fit = trainer(world.root)
    fit.fit(world.tuner(), datamodule=world.data(rule=world.rule, budget=9))
    fit.save_checkpoint(tmp_path / "good.ckpt")
    state = torch.load(tmp_path / "good.ckpt", weights_only=True)
    torch.save({**state, "extra": Runs(mark)}, tmp_path / "evil.ckpt")
    with pytest.raises(Exception, match=r"[Ww]eights.only"):
        trainer(world.root, max_epochs=2).fit(
            world.tuner(), datamodule=world.data(rule=world.rule, budget=9), ckpt_path=tmp_path / "evil.ckpt"
        )
    assert not mark.exists()
