"""The playground's scorer models: a reward model and a UniEval-type T5, trained here, kept as ordinary checkpoints.

The reward model is the base with a head of one label, trained to prefer right answers to spoilt ones (Bradley–Terry);
the T5 starts from nothing and learns to answer UniEval's three questions with Yes or No. Both read texts through the
code that reads them for real models, and learn from tasks and ways of spoiling that the pool does not have.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from im_lightning.data.example import Example
from im_lightning.data.loading import load_examples
from im_lightning.experiments.demo.playground.base import EOS, PAD, UNKNOWN
from im_lightning.experiments.demo.playground.corruptions import Row, answer_pairs, judged_rows
from im_lightning.experiments.demo.playground.text import vocabulary
from im_lightning.experiments.demo.playground.training import made, save_checkpoint, train, word_tokenizer
from im_lightning.indicators.base import get_indicator
from im_lightning.models.reward import RewardModel
from im_lightning.models.scorer import ScorerInput, padded
from im_lightning.models.unieval import Question, UniEvalModel

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

QUESTIONS = ("naturalness", "coherence", "understandability")
"""The indicators that the T5 answers."""

_TURNS = (0, 1, 2, 1)  # a step has one question, so texts of like length; coherence, the hardest, has every second


@dataclass(frozen=True)
class JudgeSettings:
    """Size and training of both models; the reward model has the base's size. `rows` are those of each question."""

    pairs: int = 8000
    reward_steps: int = 200
    reward_batch: int = 32
    reward_rate: float = 1e-3
    hidden: int = 64
    layers: int = 2
    heads: int = 4
    rows: int = 8000
    unieval_steps: int = 450
    unieval_batch: int = 32
    unieval_rate: float = 3e-3
    warmup: int = 30


def make_reward(
    path: str | os.PathLike[str], base: str | os.PathLike[str], settings: JudgeSettings, seed: int = 0
) -> dict[str, Any]:
    """Trains the reward model from the base on the CPU and saves it; the folder appears whole or not at all.

    Args:
        path: Folder to write; an older one is replaced.
        base: Folder of the base model, whose tokenizer and chat template it shares.
        settings: Training.
        seed: Of the pairs, the head's start and the order.

    Returns:
        parameters (weights), loss (nats per pair, mean of the last tenth of the steps).
    """
    import torch
    from transformers import AutoModelForSequenceClassification

    from im_lightning.models.checkpoint import load_causal_lm, load_config, load_tokenizer

    pairs = answer_pairs(settings.pairs, np.random.default_rng([seed, 20]))
    tokenizer: Any = load_tokenizer(base)
    config = load_config(base)
    config.num_labels = 1
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForSequenceClassification.from_config(config)
    model.base_model.load_state_dict(load_causal_lm(base).base_model.state_dict())
    judge = RewardModel(str(path), model.config, tokenizer, model)
    better, worse = (judge.encode(_examples([pair[side] for pair in pairs])) for side in (0, 1))
    order = _order(settings.pairs, settings.reward_steps * settings.reward_batch, np.random.default_rng([seed, 21]))

    def loss_of(step: int) -> Any:
        chosen = order[step * settings.reward_batch : (step + 1) * settings.reward_batch]
        batch = padded([*(better[i] for i in chosen), *(worse[i] for i in chosen)], tokenizer.pad_token_id)
        right, wrong = model(**batch).logits[:, 0].chunk(2)
        return -torch.nn.functional.logsigmoid(right - wrong).mean()

    losses = train(
        model, loss_of, settings.reward_steps, settings.reward_rate, settings.warmup, "training the reward model"
    )
    save_checkpoint(path, model, tokenizer)
    return made(model, losses)


def make_unieval(path: str | os.PathLike[str], settings: JudgeSettings, seed: int = 0) -> dict[str, Any]:
    """Trains the UniEval-type T5 on the CPU and saves it; the folder appears whole or not at all.

    Args:
        path: Folder to write; an older one is replaced.
        settings: Size and training.
        seed: Of the rows, the weights' start and the order.

    Returns:
        parameters (weights), loss (nats per answer, mean of the last tenth of the steps).
    """
    import torch
    from transformers import T5Config, T5ForConditionalGeneration

    tokenizer = make_unieval_tokenizer()
    vocab = tokenizer.get_vocab()
    config: Any = T5Config(
        vocab_size=len(vocab),
        d_model=settings.hidden,
        d_kv=settings.hidden // settings.heads,
        d_ff=2 * settings.hidden,
        num_layers=settings.layers,
        num_decoder_layers=1,
        num_heads=settings.heads,
        dropout_rate=0.0,
        pad_token_id=vocab[PAD],
        eos_token_id=vocab[EOS],
    )
    config.decoder_start_token_id = vocab[PAD]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = T5ForConditionalGeneration(config)
    _set_attention(model)
    judge = UniEvalModel(str(path), config, tokenizer, model)
    shown: list[tuple[list[ScorerInput], list[int], list[int]]] = []
    for number, indicator in enumerate(QUESTIONS):
        rows = judged_rows(indicator, settings.rows, np.random.default_rng([seed, 30 + number]))
        answers = [judge.yes if good else judge.no for _, good in rows]
        order = _order(
            len(rows), settings.unieval_steps * settings.unieval_batch, np.random.default_rng([seed, 40 + number])
        )
        shown.append((judge.encode(questions(indicator, [row for row, _ in rows])), answers, order))

    def loss_of(step: int) -> Any:
        inputs, answers, order = shown[_TURNS[step % len(_TURNS)]]
        chosen = order[step * settings.unieval_batch : (step + 1) * settings.unieval_batch]
        batch = padded([inputs[i] for i in chosen], vocab[PAD])
        return model(**batch, labels=torch.tensor([[answers[i]] for i in chosen])).loss

    losses = train(model, loss_of, settings.unieval_steps, settings.unieval_rate, settings.warmup, "training UniEval")
    save_checkpoint(path, model, tokenizer)
    return made(model, losses)


def _set_attention(model: Any) -> None:
    """Lets the encoder's heads start where T5s of this size arrive only after thousands of steps.

    By relative positions, which all blocks share, the first head prefers the word before, the second the word after,
    the third all later words, further ones all earlier words; from the third on, heads prefer the word that is their
    own (keys start as queries) and take away what it has in common with it (outputs start as minus the values).
    """
    import torch

    config, blocks = model.config, model.encoder.block
    later = config.relative_attention_num_buckets // 2  # buckets: the word itself, earlier ones, later ones
    with torch.no_grad():
        bias = blocks[0].layer[0].SelfAttention.relative_attention_bias.weight
        bias[1, 0] = bias[later + 1, 1] = 6.0
        bias[: later + 1, 2] = -6.0
        bias[0, 3:] = bias[later:, 3:] = -6.0
        for block in blocks:
            attention, first = block.layer[0].SelfAttention, 2 * config.d_kv
            attention.k.weight[first:] = attention.q.weight[first:] * config.d_kv**0.5
            attention.o.weight[:, first:] = -attention.v.weight[first:].T


def make_unieval_tokenizer() -> PreTrainedTokenizerFast:
    """One token per word of the playground and of the questions, split at white space; `</s>` ends a text."""
    row = {"instruction": "a", "input": "", "output": "a"}
    asked = {
        word for indicator in QUESTIONS for question in questions(indicator, [row]) for word in question.text.split()
    }
    special = (PAD, EOS, UNKNOWN)
    words = sorted({"Yes", "No", *asked, *vocabulary()} - set(special))
    named = {"pad_token": PAD, "eos_token": EOS, "unk_token": UNKNOWN}
    return word_tokenizer((*special, *words), f"$A {EOS}", EOS, **named)


def questions(indicator: str, rows: Sequence[Row]) -> list[Question]:
    """What the T5 is asked about each row, by the code of the indicator itself."""
    asks: Any = get_indicator(indicator)
    return [asks.judged(example) for example in _examples(rows)]


def _examples(rows: Sequence[Row]) -> list[Example]:
    return load_examples([dict(row) for row in rows], format="alpaca")


def _order(count: int, wanted: int, rng: np.random.Generator) -> list[int]:
    """`wanted` numbers below `count`, each as often as any other, give or take one."""
    return np.concatenate([rng.permutation(count) for _ in range(-(-wanted // count))])[:wanted].tolist()
