"""The page beside an exported adapter: what it was trained on top of, and how it is merged into that."""

from __future__ import annotations

from typing import Any

from im_lightning.models.fingerprint import local_folder
from im_lightning.models.gguf import note_of


def adapter_card(network: Any, model: str, revision: str | None, template: str | None) -> str:
    """The text of its README.md.

    Args:
        network: The `peft.PeftModel`.
        model: Base model, as it was named.
        revision: Of a model on the hub.
        template: Name of the template that the rows were trained in, where it is known.
    """
    folder = local_folder(model)
    note = None if folder is None else note_of(folder)
    base = model if revision is None else f"{model} (revision {revision})"
    lines = [
        f"# LoRA adapter for {base}",
        "",
        "Trained with im_lightning. The tokenizer, with its chat template, is beside it.",
    ]
    if template is not None:
        lines.append(f"The rows were written in the template {template}.")
    load = f"base = AutoModelForCausalLM.from_pretrained({str(folder or model)!r}"
    load += f", revision={revision!r})" if revision else ")"
    imports = ["from peft import PeftModel", "from transformers import AutoModelForCausalLM"]
    if note is not None:
        lines += [
            "",
            f"The base is the GGUF file {note['file']} (digest {note['digest']}), dequantised to fp32; merged,",
            "the weights are floats, no longer those of the file. Where the folder below is not there, load the file:",
            f"`from_pretrained(FOLDER, gguf_file={note['file']!r}, quantization_config=GgufConfig(dequantize=True))`.",
        ]
    untie: list[str] = []
    if trains_tied_head(network):
        imports.append("from torch import nn")
        untie = [
            "base.lm_head.weight = nn.Parameter(base.lm_head.weight.detach().clone())  # the inputs keep their own",
            "base.config.tie_word_embeddings = False",
        ]
        lines += ["", "The adapter changes the output layer, tied to the input embeddings: untie them first."]
    code = [
        *imports, "", load, *untie,
        "merged = PeftModel.from_pretrained(base, '.').merge_and_unload()  # '.': this folder",
        "merged.save_pretrained('merged')",
    ]  # fmt: skip
    return "\n".join(["---", "library_name: peft", "---", "", *lines, "", "```python", *code, "```", ""])


def trains_tied_head(network: Any) -> bool:
    """Whether an adapter sits on an output layer that shares its weights with the input embeddings."""
    base = network.get_base_model()
    head = base.get_output_embeddings()
    return bool(getattr(base.config, "tie_word_embeddings", False)) and hasattr(head, "lora_A")
