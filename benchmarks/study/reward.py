"""A reward model of the study's own: SmolLM2 that tells a row's answer from another row's, or from a part of it.

No people's preferences can be had here, so this `reward` is no more than that: does the answer fit its prompt, and
is it whole? The pairs are of rows outside the pool and all sets.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from im_lightning._utils.files import write_text
from im_lightning.data.loading import load_examples

if TYPE_CHECKING:
    from datasets import Dataset

EPOCHS, BATCH, AT_ONCE, RATE = 1, 8, 2, 2e-4
TESTED = 0.2
"""Share of the pairs that the model is tried on and not trained on."""


def pairs_of(rows: list[tuple[str, str, str]], seed: int = 0) -> list[tuple[str, str, str]]:
    """(prompt, the row's answer, a worse one) of (source, prompt, answer) rows.

    The worse one is by turns the next answer of the same source, or the row's own cut after a third to two thirds of
    its words; where both are the same, or there is no word to cut, the row is left out.

    >>> pairs_of([("a", "2+2?", "It is 4."), ("a", "Hi", "Hello there, you.")])
    [('2+2?', 'It is 4.', 'Hello there, you.'), ('Hi', 'Hello there, you.', 'Hello')]
    """
    rng, out = np.random.default_rng(seed), []
    by_source: dict[str, list[str]] = {}
    for source, _, answer in rows:
        by_source.setdefault(source, []).append(answer)
    at = dict.fromkeys(by_source, 0)
    for k, (source, prompt, answer) in enumerate(rows):
        others = by_source[source]
        at[source] += 1
        words = answer.split(" ")
        share = rng.uniform(1 / 3, 2 / 3)
        worse = " ".join(words[: max(1, int(share * len(words)))]) if k % 2 else others[at[source] % len(others)]
        if worse != answer:
            out.append((prompt, answer, worse))
    return out


def train(rows: Path, base: Path, out: Path, max_length: int = 512) -> None:
    """Writes the reward model to the folder `out`, and beside it `OUT.json`: pairs, and the share it ranks right."""
    from peft import LoraConfig
    from transformers import AutoModelForSequenceClassification, AutoTokenizer
    from trl import RewardConfig, RewardTrainer

    found = pairs_of([(e.source or "", e.prompt, e.response) for e in load_examples(rows)])
    order = np.random.default_rng(1).permutation(len(found))
    held = max(1, round(TESTED * len(found)))
    tested, trained = ([found[i] for i in part] for part in (order[:held], order[held:]))
    tokenizer = AutoTokenizer.from_pretrained(base)
    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1, dtype=torch.float32)
    model.config.pad_token_id = tokenizer.pad_token_id
    work = out.with_name(f"{out.name}.work")
    trainer = RewardTrainer(
        model=model,
        args=RewardConfig(
            str(work / "trainer"), per_device_train_batch_size=AT_ONCE, per_device_eval_batch_size=AT_ONCE,
            gradient_accumulation_steps=BATCH // AT_ONCE, num_train_epochs=EPOCHS, learning_rate=RATE,
            max_length=max_length, use_cpu=not torch.cuda.is_available(), bf16=True, gradient_checkpointing=False,
            save_strategy="no", report_to="none", seed=0, logging_steps=1, disable_tqdm=True,
        ),
        train_dataset=_conversations(trained), eval_dataset=_conversations(tested), processing_class=tokenizer,
        peft_config=LoraConfig("SEQ_CLS", r=16, target_modules="all-linear", modules_to_save=["score"]),
    )  # fmt: skip
    trainer.train()
    accuracy = float(trainer.evaluate()["eval_accuracy"])
    merged: Any = trainer.model
    merged.merge_and_unload().save_pretrained(work / "model")
    tokenizer.save_pretrained(work / "model")
    write_text(Path(f"{out}.json"), json.dumps({"trained": len(trained), "tested": len(tested), "accuracy": accuracy}))
    (work / "model").rename(out)
    shutil.rmtree(work)


def _conversations(pairs: list[tuple[str, str, str]]) -> Dataset:
    from datasets import Dataset

    def turns(prompt: str, answer: str) -> list[dict[str, str]]:
        return [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]

    return Dataset.from_list([{"chosen": turns(p, best), "rejected": turns(p, worse)} for p, best, worse in pairs])
