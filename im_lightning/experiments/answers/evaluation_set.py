"""`im-lightning make-eval`: reference outputs of a model behind an endpoint, several per instruction."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from im_lightning._utils.progress import log
from im_lightning.data.example import Example
from im_lightning.data.loading import write_rows
from im_lightning.endpoint.client import Ask, ask, estimate
from im_lightning.endpoint.settings import Caps, Endpoint
from im_lightning.errors import InstructMiningError, RequestError, message
from im_lightning.experiments.answers.prompts import answered_row, chat


def requests_for(prompts: Sequence[Example], outputs: int, endpoint: Endpoint, temperature: float) -> list[Ask]:
    """`outputs` requests per prompt, prompt by prompt.

    Raises:
        RequestError: fewer than one output; a temperature that would not be sent.
    """
    if outputs < 1:
        raise RequestError(message(f"--outputs {outputs}", "is less than one per instruction", "give 1 or more"))
    if endpoint.omit_temperature and temperature != 1:
        cause = "no temperature is sent with --omit-temperature"
        raise RequestError(message(f"--temperature {temperature:g}", cause, "leave one of them out"))
    return [
        Ask(endpoint.body(chat(prompt), temperature), {"prompt": prompt.prompt_id, "output": k}, k)
        for prompt in prompts
        for k in range(outputs)
    ]


def make_evaluation_set(
    prompts: Sequence[Example], outputs: int, endpoint: Endpoint, caps: Caps, temperature: float, out: Path
) -> tuple[dict[str, Any], str]:
    """Asks for what is missing and writes the set, a row per output; requests and answers lie in OUT.requests.jsonl.

    Returns:
        What was written: counts, and a line.

    Raises:
        InstructMiningError: a cap is reached, or the endpoint failed; the same call goes on.
    """
    asks = requests_for(prompts, outputs, endpoint, temperature)
    answers = ask(asks, endpoint, caps, requests_path(out), "reference outputs")
    rows, refused, cut, thoughts = [], [], 0, 0
    texts: dict[int, list[str]] = {}
    for number, one in enumerate(asks):
        answer = answers[one.key]
        if answer.refusal:
            refused.append(answer.refusal)
        elif answer.cut:
            cut += 1
        elif not answer.final:
            refused.append("the answer holds thoughts alone")
        else:
            id = f"{endpoint.api_model}-{number // outputs}-{one.number}"
            thoughts += answer.final != answer.text
            texts.setdefault(number // outputs, []).append(answer.final)
            rows.append(answered_row(prompts[number // outputs], answer.final, id))
    if thoughts:
        log(f"{thoughts:,} outputs begin with the model's thoughts, up to </think>, which are left out")
    if refused:
        log(f"left out: {len(refused):,} outputs that were refused, the first: {refused[0]}")
    if cut:
        log(f"left out: {cut:,} outputs cut at {endpoint.max_answer_tokens} tokens; raise --max-answer-tokens")
    if not rows:
        cause = f"none of the {len(asks):,} outputs can be used"
        raise InstructMiningError(message(str(out), cause, "see the lines above, and mend what they name"))
    several = [found for found in texts.values() if len(found) > 1]
    if temperature > 0 and len(several) > 1 and all(len(set(found)) == 1 for found in several):
        cause = "the outputs to each instruction are the same text, as of an endpoint that always answers greedily"
        log(f"warning: {cause}: {outputs} reference outputs tell no more than one")
    count = write_rows(out, rows)
    by = {"model": endpoint.api_model, "instructions": len(prompts), "outputs": count}
    text = f"wrote {out}: {count:,} reference outputs to {len(prompts):,} instructions, by {endpoint.api_model}"
    return {"out": out, **by, "refused": len(refused), "cut": cut}, text


def requests_path(out: Path) -> Path:
    """The file beside an output that keeps requests and answers."""
    return out.with_name(f"{out.name}.requests.jsonl")


def cost_of(
    prompts: Sequence[Example], outputs: int, endpoint: Endpoint, caps: Caps, temperature: float
) -> dict[str, Any]:
    """What the set would take, without asking."""
    return estimate(requests_for(prompts, outputs, endpoint, temperature), endpoint, caps)
