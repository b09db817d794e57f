"""Loading checkpoints: tokenizers and causal language models, from a folder or the hub, with errors that help."""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING, Any

from im_lightning._utils.progress import without_bars
from im_lightning.errors import RequestError, first_line, message
from im_lightning.models.device import dtype_argument
from im_lightning.models.fingerprint import checkpoint_identity as checkpoint_identity
from im_lightning.models.fingerprint import local_folder, weight_files

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def load_tokenizer(model: str | os.PathLike[str], revision: str | None = None) -> PreTrainedTokenizerBase:
    """The tokenizer of a checkpoint; code that comes with it is never run. A RequestError where there is none."""
    from transformers import AutoTokenizer

    folder = local_folder(model)
    try:
        return AutoTokenizer.from_pretrained(str(folder or model), revision=revision, trust_remote_code=False)
    except Exception as error:  # transformers raises OSError, ValueError, KeyError, ImportError, tokenizers' own
        remedy = "save the tokenizer beside the model"
        raise _refused(model, revision, error, "has no readable tokenizer", remedy) from error


def load_config(model: str | os.PathLike[str], revision: str | None = None) -> Any:
    """The configuration of a checkpoint (layers, vocabulary, positions) without its weights.

    Raises:
        RequestError: no readable `config.json`, an architecture that transformers does not know, or no connection.
    """
    from transformers import AutoConfig

    folder = local_folder(model)
    if folder is not None:
        weight_files(folder)
    try:
        return AutoConfig.from_pretrained(str(folder or model), revision=revision, trust_remote_code=False)
    except Exception as error:
        raise _refused(model, revision, error, "its config.json is not understood") from error


def vocabulary(model: str | os.PathLike[str], revision: str | None = None) -> int:
    """How many tokens a model has embeddings for, from its configuration alone."""
    return int(load_config(model, revision).get_text_config().vocab_size)


def hidden_width(model: str | os.PathLike[str], revision: str | None = None) -> int:
    """Channels of a model's hidden states, from its configuration alone; 0 where it does not say."""
    folder = local_folder(model)
    if folder is None:
        from transformers import PretrainedConfig

        try:  # not AutoConfig: the family need not be one of transformers
            settings: Any = PretrainedConfig.get_config_dict(str(model), revision=revision)[0]
        except Exception:  # transformers' and the hub's, of many kinds
            return 0
    else:
        weight_files(folder)
        try:  # read plainly: transformers takes seconds to import, and often nothing has to be computed
            settings = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return 0  # loading the model says it better
    found = next((settings[k] for k in _WIDTHS if isinstance(settings, dict) and settings.get(k)), 0)
    return found if isinstance(found, int) else 0


def load_causal_lm(
    model: str | os.PathLike[str],
    revision: str | None = None,
    dtype: torch.dtype | None = None,
    device: str | torch.device = "cpu",
    quantization_config: Any = None,
) -> PreTrainedModel:
    """A causal language model in evaluation mode.

    Safetensors first; older `.bin` files only as plain tensors (`weights_only`); code that comes with a checkpoint is
    never run.

    Args:
        model: A checkpoint folder or a hub id.
        revision: Branch, tag or commit of a hub id.
        dtype: Type of the weights; float32 by default.
        device: Where the weights go.
        quantization_config: Of transformers, for weights that are quantised while they are loaded.

    Raises:
        RequestError: not a checkpoint of a causal language model, weights missing from it, or no connection.
    """
    from transformers import AutoModelForCausalLM

    config = load_config(model, revision)
    if getattr(config, "is_encoder_decoder", False):
        cause = f"is an encoder-decoder ({config.model_type}), not a causal model"
        raise RequestError(message(str(model), cause, "name a decoder such as LLaMA, Qwen, GPT-2"))
    auto, kind = AutoModelForCausalLM, "causal model"
    return load_weights(auto, model, revision, config, dtype, device, kind, quantization_config)


def load_weights(
    auto: Any,
    model: str | os.PathLike[str],
    revision: str | None,
    config: Any,
    dtype: torch.dtype | None,
    device: str | torch.device,
    kind: str,
    quantization_config: Any = None,
) -> PreTrainedModel:
    """A model of one of transformers' Auto classes, in evaluation mode, with every weight from the checkpoint.

    Arguments as of `load_causal_lm`; `config` is the model's (`load_config`), `kind` what it is to be, for messages.

    Raises:
        RequestError: not a checkpoint of that kind, weights missing from it, or no connection.
    """
    import torch

    folder = local_folder(model)
    quantized: dict[str, Any] = {}
    if quantization_config is not None:  # quantised on the device: such weights cannot be moved
        quantized = {"quantization_config": quantization_config, "device_map": {"": device}}
    try:
        with without_bars():
            answer: Any = auto.from_pretrained(
                str(folder or model),
                config=config,
                revision=revision,
                trust_remote_code=False,
                weights_only=True,
                output_loading_info=True,
                **{dtype_argument(): dtype or torch.float32},
                **quantized,
            )
    except Exception as error:
        raise _refused(model, revision, error, f"cannot be loaded as a {kind}") from error
    loaded, info = answer
    absent = sorted(str(key) for key in [*info["missing_keys"], *info.get("mismatched_keys", ())])
    if absent:  # transformers would fill them with random numbers and only warn
        cause = f"{len(absent)} weights are missing or of the wrong shape (the first is {absent[0]})"
        raise RequestError(message(str(model), cause, f"name the checkpoint of the full {kind}, with its head"))
    return (loaded if quantized else loaded.to(device)).eval()


_WIDTHS = ("hidden_size", "n_embd", "d_model")
_KNOWN_ARCHITECTURE = "name a checkpoint whose architecture transformers has, or install a newer transformers"


def _refused(
    model: str | os.PathLike[str], revision: str | None, error: Exception, cause: str, remedy: str = _KNOWN_ARCHITECTURE
) -> RequestError:
    """What to say of a model that cannot be loaded: `cause` and `remedy` are those of a folder."""
    name = str(model)
    if local_folder(model) is None:
        name = name if revision is None else f"{name} (revision {revision})"
        cause = "there is no such folder, and the hub's model of that name could not be loaded"
        remedy = "check the name and the connection, or name a local checkpoint folder"
        if "gated" in str(error).lower():
            cause = "the hub gives this model only to those who have accepted its licence"
            remedy = "accept it on the model's page and log in (hf auth login, or HF_TOKEN), or name another model"
    return RequestError(message(name, f"{cause} ({first_line(error)})", remedy))
