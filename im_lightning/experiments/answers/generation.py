"""`im-lightning generate`: a finetuned model's answers to an evaluation set, batch by batch, kept as they come."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from im_lightning._lightning import isolate_rng
from im_lightning._utils.files import parse_json
from im_lightning._utils.hashing import digest_bytes, digest_json
from im_lightning._utils.progress import log, progress
from im_lightning.data.example import Example
from im_lightning.data.loading import write_rows
from im_lightning.data.settings import Encoding
from im_lightning.data.tokenization import encode_examples
from im_lightning.errors import InstructMiningError, RequestError, message
from im_lightning.experiments.answers.prompts import Generating, answered_row
from im_lightning.models.batching import plan_batches
from im_lightning.models.checkpoint import hidden_width, load_causal_lm
from im_lightning.models.device import resolve_device, resolve_precision
from im_lightning.models.generation import Made, generate
from im_lightning.models.likelihood import padding_id
from im_lightning.training.adapters import without_known_warnings
from im_lightning.training.run.encoded_pool import Coding, coding_of

FORMAT = "im_lightning.generate/1"


@dataclass(frozen=True)
class Prompted:
    """An evaluation set's prompts as tokens, and what ends an answer under their template."""

    prompts: list[list[int]]
    ends: list[list[int]]
    cut: int
    """Prompts that lost their beginning."""


def prompted(examples: Sequence[Example], coding: Coding) -> Prompted:
    """The prompts as a finetune sees them, up to where the answer begins."""
    encoded = encode_examples(examples, coding.tokenizer, coding.template, coding.max_length)
    prompts, ends = [], set()
    for one in encoded:
        trained = int(one.loss_mask[::-1].cumprod().sum())  # the end of the last, empty answer
        tokens = one.input_ids.tolist()
        prompts.append(tokens[: len(tokens) - trained])
        ends.add(tuple(tokens[len(tokens) - trained :]))
    if coding.tokenizer.eos_token_id is not None:
        ends.add((int(coding.tokenizer.eos_token_id),))
    return Prompted(prompts, [list(end) for end in sorted(ends - {()})], sum(e.truncated_prompt > 0 for e in encoded))


def answer_with(network: Any, coding: Coding, of: Prompted, settings: Generating, rows: Sequence[int]) -> list[Made]:
    """The answers to a batch of the prompts."""
    with isolate_rng():
        torch.manual_seed(settings.seed + 1_000_003 * int(rows[0]))  # a batch is the same after a resume
        parts = [of.prompts[row] for row in rows]
        pad = padding_id(coding.tokenizer, coding.embeddings)
        return generate(network, parts, of.ends, pad, settings.max_new_tokens, settings.temperature)


def answer_all(network: Any, coding: Coding, prompts: Sequence[Example], settings: Generating) -> list[str]:
    """The answers of a model that is loaded, in the prompts' order."""
    of, texts = prompted(prompts, coding), dict[int, str]()
    for rows in _batches(of, settings):
        texts |= dict(zip(rows, _texts(answer_with(network, coding, of, settings, rows), coding), strict=True))
    return [texts[row] for row in range(len(prompts))]


def _batches(of: Prompted, settings: Generating) -> list[list[int]]:
    lengths = [len(ids) + settings.max_new_tokens for ids in of.prompts]
    return [rows.tolist() for rows in plan_batches(lengths, settings.batch_tokens)]


def _texts(made: Sequence[Made], coding: Coding) -> list[str]:
    return [coding.tokenizer.decode(one.tokens, skip_special_tokens=True).strip() for one in made]


def generate_answers(
    prompts: Sequence[Example], encoding: Encoding, adapter: str | None, settings: Generating, out: Path
) -> tuple[dict[str, Any], str]:
    """Answers every prompt and writes a row for each, in order; OUT.partial.jsonl keeps them until all are there.

    Returns:
        What was written: counts, and a line.

    Raises:
        RequestError: no model is named, it is none, or its positions do not suffice.
    """
    coding = coding_of(encoding)
    of = prompted(prompts, coding)
    inputs = {
        "model": coding.model,
        "adapter": adapter and adapter_identity(adapter),
        "coding": coding.digest,
        "settings": {k: v for k, v in asdict(settings).items() if k != "device"},
        "prompts": digest_json([one.prompt_id for one in prompts]),
    }
    kept = _Kept(out.with_name(f"{out.name}.partial.jsonl"), digest_json(inputs))
    answers = kept.read()
    batches = _batches(of, settings)
    left = [rows for rows in batches if any(row not in answers for row in rows)]
    if left:
        log(f"{len(prompts):,} prompts in {len(batches)} batches; {len(answers):,} are answered")
        network = load_answering(encoding, adapter, settings, max(map(len, of.prompts)) + settings.max_new_tokens)
        with progress("answering", sum(map(len, left)), "prompts") as bar:
            for rows in left:
                made = answer_with(network, coding, of, settings, rows)
                found = {r: (text, one.cut) for r, text, one in zip(rows, _texts(made, coding), made, strict=True)}
                kept.add(found)
                answers |= found
                bar.advance(len(rows))
    name = Path(adapter or str(encoding.model)).name
    write_rows(out, (answered_row(one, answers[row][0], f"{name}-{row}") for row, one in enumerate(prompts)))
    kept.path.unlink(missing_ok=True)
    cut, empty = sum(cut for _, cut in answers.values()), sum(not text for text, _ in answers.values())
    notes = [(cut, f"cut at {settings.max_new_tokens} tokens"), (empty, "empty"), (of.cut, "to a cut prompt")]
    noted = "".join(f"; {count:,} {what}" for count, what in notes if count)
    record = {"out": out, "model": name, "answers": len(prompts), "cut": cut, "empty": empty, "cut_prompts": of.cut}
    return record, f"wrote {out}: {len(prompts):,} answers of {name}{noted}"


def load_answering(encoding: Encoding, adapter: str | None, settings: Generating, longest: int) -> Any:
    """The base with its adapter, in evaluation mode, where it has positions for so many tokens."""
    device = resolve_device(settings.device)
    model = str(encoding.model)
    dtype = resolve_precision(settings.precision, device, hidden_width(model, encoding.revision)).dtype
    network: Any = load_causal_lm(model, encoding.revision, dtype, device)
    check_positions(network.config, model, longest, "lower --max-new-tokens or --max-length")
    if adapter is None:
        return network
    from peft import PeftModel

    try:
        with without_known_warnings():
            return PeftModel.from_pretrained(network, adapter).eval()
    except Exception as error:  # peft's, safetensors' and torch's, of many kinds
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        cause = f"it does not go on top of {model} ({reason})"
        raise RequestError(message(f"--adapter {adapter}", cause, "name the base that it was trained on")) from error


def check_positions(config: Any, model: str, longest: int, remedy: str) -> None:
    """Refuses a prompt that leaves the model no positions for its answer; together they may take `longest` tokens."""
    most = getattr(config.get_text_config(), "max_position_embeddings", None) or longest
    if longest > most:
        cause = f"prompt and answer may take {longest:,} tokens, and the model has {most:,} positions"
        raise RequestError(message(model, cause, remedy))


def adapter_identity(adapter: str) -> str:
    """Digest of an adapter's weights and settings.

    Raises:
        RequestError: there is no adapter.
    """
    folder = Path(adapter).expanduser()
    files = [folder / name for name in ("adapter_config.json", "adapter_model.safetensors")]
    if missing := [file.name for file in files if not file.is_file()]:
        cause, remedy = f"it has no {missing[0]}", "name a folder that fit --export adapter wrote"
        if (folder / "config.json").is_file():
            cause, remedy = "it holds a whole model and no adapter", f"pass --model {adapter} without --adapter"
        raise RequestError(message(f"--adapter {adapter}", cause, remedy))
    return digest_json([digest_bytes(file.read_bytes()) for file in files])


class _Kept:
    """Answers of one set of inputs as they come, in a file that goes when all are there."""

    def __init__(self, path: Path, inputs: str) -> None:
        self.path, self.inputs = path, inputs

    def read(self) -> dict[int, tuple[str, bool]]:
        """Row → answer; those of other inputs are dropped, and a line that a kill tore is passed over."""
        answers: dict[int, tuple[str, bool]] = {}
        if self.path.exists():
            lines = self.path.read_bytes().split(b"\n")
            head = _parsed(lines[0])
            head = head if isinstance(head, dict) else {}
            if head.get("format") != FORMAT and self.path.stat().st_size:
                cause, remedy = "it is no file of answers in the making", "move it away, or name another --out"
                raise RequestError(message(str(self.path), cause, remedy))
            if head.get("inputs") == self.inputs:
                found = [one for line in lines[1:] if (one := _parsed(line))]
                answers = {one["row"]: (one["answer"], one["cut"]) for one in found}
            else:
                log(f"{self.path}: answers of another model, set or setting; it is begun anew")
        self._write([{"format": FORMAT, "inputs": self.inputs}], "w")
        self.add(answers)
        return answers

    def add(self, answers: dict[int, tuple[str, bool]]) -> None:
        self._write([{"row": row, "answer": text, "cut": cut} for row, (text, cut) in answers.items()], "a")

    def _write(self, lines: list[dict[str, Any]], mode: str) -> None:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open(mode, encoding="utf-8") as stream:
                stream.write("".join(json.dumps(line) + "\n" for line in lines))
        except OSError as error:
            cause, remedy = f"cannot be written: {error.strerror}", "free some space or choose a writable folder"
            raise InstructMiningError(message(str(self.path), cause, remedy)) from error


def _parsed(line: bytes) -> Any:
    try:
        return parse_json(line)
    except ValueError:
        return None
