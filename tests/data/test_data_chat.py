"""Chat templates: the mask must cover the assistant's words exactly, whatever the template writes around them."""

from __future__ import annotations

import json

import numpy as np
import pytest
from tiny import CHATML, chat_tokenizer, make_tokenizer

from im_lightning.data.example import Example, Message
from im_lightning.data.tokenization import (
    encode_examples,
    encode_unconditional,
    resolve_template,
    unconditional_start,
)
from im_lightning.errors import RequestError

LLAMA2 = (
    "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system turn') }}{% endif %}"
    "{% if m.role == 'user' %}{{ bos_token + '[INST] ' + m.content | trim + ' [/INST]' }}"
    "{% else %}{{ ' ' + m.content | trim + ' ' + eos_token }}{% endif %}{% endfor %}"
)
ZEPHYR = (  # the generation prompt lacks the newline that the turn has
    "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + eos_token + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
THINKING = (  # as Qwen3: the last answer gets an empty thought, earlier ones none
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
    "{% if m.role == 'assistant' and loop.last %}{{ '<think>\n\n</think>\n\n' }}{% endif %}"
    "{{ m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
REASONING = (  # as DeepSeek-R1: the generation prompt opens a thought that the turn does not have
    "{{ bos_token }}{% for m in messages %}{{ '<|' + m.role + '|>' + m.content }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|><think>\n' }}{% endif %}"
)
PLAIN = (
    "{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)


def conversation(*texts: str, system: str | None = None) -> Example:
    turns = [Message(("user", "assistant")[i % 2], text) for i, text in enumerate(texts)]
    return Example((*([Message("system", system)] if system is not None else []), *turns))


def shown(tokenizer, example: Example):
    """The encoded example with its texts: whole, runs of the response mask, runs of the loss mask."""
    (encoded,) = encode_examples([example], tokenizer, "auto", 4096)

    def runs(mask: np.ndarray) -> list[str]:
        edges = np.flatnonzero(np.diff(np.concatenate([[0], mask.astype(int), [0]])))
        return [tokenizer.decode(encoded.input_ids[a:b]) for a, b in edges.reshape(-1, 2)]

    return encoded, tokenizer.decode(encoded.input_ids), runs(encoded.response_mask), runs(encoded.loss_mask)


EXAMPLES = [
    conversation("Name colors.", "red, blue"),
    conversation("Hi", "Hello", "Name colors.", "red\n\nblue", system="Be brief."),
    conversation("assistant", "assistant"),
    conversation("Hi", ""),
    conversation("", "<|im", "im_end", "a"),
]


@pytest.mark.parametrize("example", EXAMPLES)
def test_chatml_is_the_whole_conversation(example: Example):
    """Compared with `apply_chat_template(tokenize=True)`: special tokens part the pieces, so nothing can merge."""
    tokenizer = chat_tokenizer(CHATML)
    encoded, _, responses, losses = shown(tokenizer, example)
    turns = [{"role": m.role, "content": m.content} for m in example.messages]
    whole = tokenizer.apply_chat_template(turns, tokenize=True, return_dict=False)
    newline = len(tokenizer("\n", add_special_tokens=False)["input_ids"])
    assert encoded.input_ids.tolist() == [tokenizer.bos_token_id, *whole[:-newline]]  # the newline opens the next turn
    answers = [m.content for m in example.messages if m.role == "assistant"]
    assert responses == [text for text in answers if text]
    assert losses == [f"{text}<|im_end|>" for text in answers]


def test_bos_in_the_template_is_not_doubled():
    """Two BOS tokens are a text no model has seen."""
    bare, own = chat_tokenizer(CHATML), chat_tokenizer("{{ bos_token }}" + CHATML)
    (first,), (second,) = (encode_examples(EXAMPLES[:1], t, "chat") for t in (bare, own))
    assert np.array_equal(first.input_ids, second.input_ids)
    assert first.input_ids[:2].tolist() == [bare.bos_token_id, bare.convert_tokens_to_ids("<|im_start|>")]
    none = chat_tokenizer("{{ '<|im_start|>' }}" + CHATML, bos=False)
    assert encode_examples(EXAMPLES[:1], none, "chat")[0].input_ids[0] == none.convert_tokens_to_ids("<|im_start|>")


def test_bos_of_the_template_outlives_truncation():
    """BOS is the attention sink of LLaMA-like models: without it the likelihoods of long rows are another model's."""
    tokenizer = chat_tokenizer("{{ bos_token }}" + CHATML)
    long = [conversation("1 " * 200, "2"), conversation("1 " * 200, "2", "3", "4"), conversation("1", "2 " * 200)]
    for example, encoded in zip(long, encode_examples(long, tokenizer, "chat", 64), strict=True):
        assert encoded.input_ids[0] == tokenizer.bos_token_id != encoded.input_ids[1]
        assert len(encoded.input_ids) <= 64 and encoded.truncated_prompt + encoded.truncated_response > 0
        assert tokenizer.decode(encoded.input_ids[encoded.response_mask]).strip() in example.response


def test_llama2_style_spaces_and_trimming():
    """The space before the answer belongs to its first word, as the model writes it; trimmed text is what is scored."""
    tokenizer = chat_tokenizer(LLAMA2)
    _, text, responses, losses = shown(tokenizer, conversation(" Hi ", " Hello\n", "Colors?", "red"))
    assert text == "<s>[INST] Hi [/INST] Hello </s><s>[INST] Colors? [/INST] red </s>"
    assert responses == [" Hello", " red"] and losses == [" Hello </s>", " red </s>"]
    encoded = shown(tokenizer, conversation("Hi", "Hello"))[0]
    assert encoded.length_output == len(tokenizer("Hello", add_special_tokens=False)["input_ids"])


def test_other_shapes_of_templates():
    """What the generation prompt lacks or has too much must not shift the mask."""
    _, text, responses, losses = shown(chat_tokenizer(ZEPHYR), conversation("Hi", "Hello", system="s"))
    assert text == "<s><|system|>\ns</s>\n<|user|>\nHi</s>\n<|assistant|>\nHello</s>"
    assert responses == ["Hello"] and losses == ["Hello</s>"]
    _, text, responses, losses = shown(chat_tokenizer(REASONING), conversation("assistant", "s", "a", "assistant"))
    assert text == "<s><|user|>assistant<|assistant|>s</s><|user|>a<|assistant|>assistant</s>"
    assert responses == ["s", "assistant"] and losses == ["s</s>", "assistant</s>"]
    _, text, responses, losses = shown(chat_tokenizer(PLAIN), conversation("Hi", "Hello", "a", "b"))
    assert text == "<s>user: Hi\nassistant: Hello</s>\nuser: a\nassistant: b</s>"
    assert responses == ["Hello", "b"] and losses == ["Hello</s>", "b</s>"]
    _, text, responses, losses = shown(chat_tokenizer(THINKING), conversation("Hi", "Hello"))
    assert text.endswith("<|im_start|>assistant\n<think>\n\n</think>\n\nHello<|im_end|>")
    assert responses == ["Hello"] and losses == ["Hello<|im_end|>"]


def spacing_tokenizer(template: str):
    """Like LLaMA's: a space, written "▁", goes before each text and each word."""
    from tokenizers import Tokenizer, decoders, models, normalizers
    from transformers import PreTrainedTokenizerFast

    words = ["<unk>", "<s>", "</s>", "\n", *(f"▁{w}" for w in ("Hi", "Hello", "[INST]", "[/INST]", "")), "Hello", "Hi"]
    characters = sorted(set("".join(words)) - set(words))
    vocabulary = {word: i for i, word in enumerate([*words, *characters])}
    merges: list[tuple[str, str]] = []
    for word in words[4:]:
        for i in range(1, len(word)):
            for part in (word[:i], word[i], word[: i + 1]):
                vocabulary.setdefault(part, len(vocabulary))
            merges.append((word[:i], word[i]))
    backend = Tokenizer(models.BPE(vocabulary, list(dict.fromkeys(merges)), unk_token="<unk>"))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse()])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    tokenizer.chat_template = template
    return tokenizer


def test_tokenizers_that_put_a_space_before_each_text():
    """Pieces of one text must not each get LLaMA's leading space: they must be the tokens of the whole text."""
    tokenizer = spacing_tokenizer(LLAMA2.replace("' ' + eos_token", "eos_token"))
    (encoded,) = encode_examples([conversation("Hi", "Hello", "Hi", "Hi")], tokenizer, "chat")
    assert tokenizer.convert_ids_to_tokens(encoded.input_ids[encoded.response_mask]) == ["▁Hello", "▁Hi"]
    turn = ["▁Hi", "▁[/INST]"]
    tokens = tokenizer.convert_ids_to_tokens(encoded.input_ids)
    assert [t for t in tokens if t not in ("▁", "▁[INST]", "[INST]", "[", "I", "N", "S", "T", "]", "<s>", "</s>")] == [
        *turn, "▁Hello", *turn, "▁Hi",
    ]  # fmt: skip
    plain = tokenizer("Hi", add_special_tokens=False)["input_ids"]
    assert tokenizer.convert_ids_to_tokens(plain) == ["▁Hi"] and encoded.length_output == 1


def test_todays_date_does_not_change_the_text():
    """Llama 3.1's template prints the date: scores of today and of tomorrow would differ under one key."""
    of_llama = "date_string if date_string is defined else strftime_now('%d %b %Y')"
    for expression in ("strftime_now('%d %b %Y')", of_llama):
        _, text, _, _ = shown(chat_tokenizer("{{ (" + expression + ") + '\n' }}" + CHATML), conversation("Hi", "Hello"))
        assert text.startswith("<s>26 Jul 2024\n<|im_start|>")
    dated = chat_tokenizer("  {% if true %}{{ strftime_now('%A, %Y-%m-%d') }}{% endif %}" + CHATML)
    assert shown(dated, conversation("Hi", "Hello"))[1].startswith("<s>Friday, 2024-07-26<|im_start|>")


def test_identity_follows_what_determines_the_text():
    """Equal texts must share stored scores, unequal ones must not."""
    identity = resolve_template("auto", chat_tokenizer(CHATML)).identity
    assert resolve_template("chat", chat_tokenizer(CHATML, vocab_size=300)).identity == identity
    padded = chat_tokenizer(CHATML)
    padded.pad_token = padded.eos_token
    assert resolve_template("chat", padded).identity == identity
    assert resolve_template("chat", chat_tokenizer(CHATML + " ")).identity != identity
    assert resolve_template("alpaca", chat_tokenizer(CHATML)).identity != identity
    ends = chat_tokenizer(LLAMA2)
    before = resolve_template("chat", ends).identity
    ends.eos_token = "<|im_end|>"
    assert resolve_template("chat", ends).identity != before


def test_named_templates():
    """A tokenizer with several templates is used with its default one, or says that it has none."""
    tokenizer = chat_tokenizer(CHATML)
    expected = resolve_template("auto", tokenizer).identity
    tokenizer.chat_template = {"default": CHATML, "tool_use": ZEPHYR}
    assert resolve_template("auto", tokenizer).identity == expected
    tokenizer.chat_template = {"rag": CHATML, "tool_use": ZEPHYR}
    with pytest.raises(RequestError, match=r"template 'chat': .*Fix: use --template alpaca"):
        resolve_template("auto", tokenizer)


def test_same_tokens_whatever_was_rendered_before():
    """The order of rows must not matter."""
    tokenizer = chat_tokenizer(ZEPHYR)
    forward = encode_examples(EXAMPLES[:3], tokenizer, "chat")
    backward = encode_examples(EXAMPLES[2::-1], tokenizer, "chat")[::-1]
    assert all(np.array_equal(a.input_ids, b.input_ids) for a, b in zip(forward, backward, strict=True))


REFUSED = [
    (
        LLAMA2,
        conversation("a", "b", system="s"),
        r"it cannot render the conversation \(TemplateError: no system turn\)",
    ),
    (
        CHATML.replace("m.content", "m.content | upper"),
        conversation("a", "b"),
        "it leaves out the response, or its text",
    ),
    (
        CHATML.replace("m.content", "m.content | replace('b', 'c')"),
        conversation("a", "b"),
        "it rewrites the text of the",
    ),
    ("{{ messages[0].content }}", conversation("a", "b"), "it leaves out the response"),
    (
        "{{ nothing.there }}",
        conversation("a", "b"),
        r"it cannot render the conversation \(UndefinedError: 'nothing' is",
    ),
]


@pytest.mark.parametrize(("template", "example", "cause"), REFUSED)
def test_refused_conversations_are_named(template: str, example: Example, cause: str):
    """A mask that is a little wrong is worse than none: such rows are refused, with their place and a way out."""
    tokenizer = chat_tokenizer(template)
    good = conversation("x", "y")
    remedy = "Fix: use --template alpaca, or leave such rows out."
    with pytest.raises(RequestError, match=rf"chat template, the example [0-9a-f]{{32}} \(.* …\): .*{cause}.*{remedy}"):
        encode_examples([good, example], tokenizer, "chat")


# templates that write the last answer otherwise than earlier ones

PHI3 = (  # EOS closes the conversation, and no turn before
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% else %}{{ eos_token }}{% endif %}"
)
GLM = (  # nothing closes an answer but the role of the next turn
    "{% for m in messages %}{{ ('<|im_start|>' if m.role == 'user' else '<|im_end|>') + m.content }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_end|>' }}{% endif %}"
)
PARTS = (  # as those of multimodal models: a content is a list of parts
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
    "{% for part in m.content %}{{ part.text }}{% endfor %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@pytest.mark.parametrize(("template", "end"), [(THINKING, "<|im_end|>"), (PHI3, "<|im_end|></s>")])
def test_the_last_answer_alone_where_turns_do_not_nest(
    template: str, end: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Earlier answers do not stand there as the model would have written them; the last one does. It is said."""
    tokenizer = chat_tokenizer(template)
    _, text, responses, losses = shown(tokenizer, conversation("Hi", "b", "c", "b"))
    turns = [{"role": r, "content": c} for r, c in zip(("user", "assistant") * 2, ["Hi", "b", "c", "b"], strict=True)]
    whole = tokenizer.apply_chat_template(turns, tokenize=False)
    assert text == "<s>" + whole.rstrip() and responses == ["b"] and losses == ["b" + end]
    said = capsys.readouterr().err
    assert "of 1 of 1 conversations only the last answer counts: the chat template writes earlier answers" in said
    encode_examples([conversation("Hi", "Hello")], tokenizer, "chat")
    assert "only the last answer" not in capsys.readouterr().err


def test_an_answer_that_holds_its_reasoning_is_trained_whole() -> None:
    """A template that adds an empty thought to an answer without one leaves an answer with one alone."""
    thought = (
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' }}"
        "{% if m.role == 'assistant' and '</think>' not in m.content %}{{ '<think>\\n\\n</think>\\n\\n' }}{% endif %}"
        "{{ m.content + '<|im_end|>\\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
    )
    answer = "<think>\ntwo and two\n</think>\n\n4"
    _, text, responses, losses = shown(chat_tokenizer(thought), conversation("2+2?", answer))
    assert responses == [answer] and losses == [answer + "<|im_end|>"]
    assert text.startswith("<s><|im_start|>user\n2+2?<|im_end|>\n<|im_start|>assistant\n<think>\ntwo")


def test_something_closes_every_answer(capsys: pytest.CaptureFixture[str]) -> None:
    """A model that never sees an answer end does not stop. The next role's marker closes it where nothing else does."""
    _, text, responses, losses = shown(chat_tokenizer(GLM), conversation("Hi", "Hello", "a", "b"))
    assert text == "<s><|im_start|>Hi<|im_end|>Hello<|im_start|>a<|im_end|>b<|im_start|>"
    assert responses == ["Hello", "b"] and losses == ["Hello<|im_start|>", "b<|im_start|>"]
    plain = chat_tokenizer(PLAIN.replace("+ '\n'", ""), eos=False)
    _, _, responses, losses = shown(plain, conversation("Hi", "Hello"))
    assert responses == losses == ["Hello"]
    assert "the tokenizer has no EOS: nothing teaches the model to stop" in capsys.readouterr().err


def test_contents_in_parts() -> None:
    _, text, responses, losses = shown(chat_tokenizer(PARTS), conversation("Hi", "Hello", "a", "b"))
    assert text == shown(chat_tokenizer(CHATML), conversation("Hi", "Hello", "a", "b"))[1]
    assert responses == ["Hello", "b"] and losses == ["Hello<|im_end|>", "b<|im_end|>"]


def test_answers_that_a_template_marks_are_all_trained(capsys: pytest.CaptureFixture[str]) -> None:
    """Earlier answers stand without the empty thought of the last one; the template says that they count too."""
    marked = THINKING.replace(
        "{{ m.content + '<|im_end|>\n' }}",
        "{% if m.role == 'assistant' %}{% generation %}{{ m.content + '<|im_end|>\n' }}{% endgeneration %}"
        "{% else %}{{ m.content + '<|im_end|>\n' }}{% endif %}",
    )
    assert marked != THINKING
    talk = conversation("Hi", "Hello", "a", "b")
    _, text, responses, losses = shown(chat_tokenizer(marked), talk)
    assert text == chat_tokenizer(THINKING).apply_chat_template(
        [{"role": m.role, "content": m.content} for m in talk.messages], tokenize=False
    ).rstrip().join(["<s>", ""])
    assert responses == ["Hello", "b"] and losses == ["Hello<|im_end|>", "b<|im_end|>"]
    assert "only the last answer" not in capsys.readouterr().err
    trimmed = marked.replace("m.content + '<|im_end|>\n' }}{% endgen", "m.content[1:] + '<|im_end|>\n' }}{% endgen")
    with pytest.raises(RequestError, match=r"do not nest|leaves out|rewrites"):
        shown(chat_tokenizer(trimmed), talk)


# marks, tools, reasoning

TOOLS = (  # as Qwen's: tools in front, calls as JSON, reasoning as a thought
    "{% if tools %}{{ '<|im_start|>system\\n' + (tools | tojson) + '<|im_end|>\\n' }}{% endif %}"
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' }}"
    "{% if m.reasoning_content %}{{ '<think>' + m.reasoning_content + '</think>\\n' }}{% endif %}{{ m.content }}"
    "{% for call in m.tool_calls or [] %}{{ '<call>' + (call.function.arguments | tojson) + '</call>' }}{% endfor %}"
    "{{ '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
CALLS = json.dumps({"tool_calls": [{"function": {"name": "weather", "arguments": {"city": "Oslo"}}}]})
THOUGHT = json.dumps({"reasoning_content": "The tool says so."})
CALLING = Example(
    (
        Message("user", "Weather?"),
        Message("assistant", "", fields=CALLS),
        Message("tool", "4 degrees"),
        Message("assistant", "It is 4.", fields=THOUGHT),
    ),
    tools='[{"name": "weather"}]',
)


def test_an_answer_that_is_marked_out_is_context_alone() -> None:
    """It stands in the text and in no mask, under either template; so neither loss nor perplexity hears of it."""
    (a, b), (c, d) = (("user", "2+2?"), ("assistant", "5")), (("user", "Sure?"), ("assistant", "4"))
    marked = Example((Message(*a), Message(*b, trained=False), Message(*c), Message(*d)))
    whole = conversation("2+2?", "5", "Sure?", "4")
    tokenizer = chat_tokenizer(CHATML)
    assert shown(tokenizer, marked)[1:] == (shown(tokenizer, whole)[1], ["4"], ["4<|im_end|>"])
    (one,), (other,) = (encode_examples([e], make_tokenizer(), "alpaca") for e in (marked, whole))
    assert np.array_equal(one.input_ids, other.input_ids)
    assert 0 < one.loss_mask.sum() < other.loss_mask.sum() and one.loss_mask[-1]


def test_calls_and_reasoning_are_what_the_model_learns_to_write() -> None:
    _, text, responses, losses = shown(chat_tokenizer(TOOLS), CALLING)
    assert text.startswith('<s><|im_start|>system\n[{"name": "weather"}]<|im_end|>\n<|im_start|>user\nWeather?')
    assert responses == ['<call>{"city": "Oslo"}</call>', "<think>The tool says so.</think>\nIt is 4."]
    assert losses == [response + "<|im_end|>" for response in responses]


@pytest.mark.parametrize(
    ("template", "example", "cause"),
    [
        (CHATML, CALLING, "it leaves out the tools"),
        (TOOLS.replace("m.tool_calls or []", "[]"), CALLING, "it leaves out the field 'tool_calls' of an answer"),
        (
            TOOLS.replace("m.reasoning_content", "m.thought"),
            CALLING,
            "it leaves out the field 'reasoning_content' of an",
        ),
    ],
)
def test_a_template_without_a_place_for_them_refuses_the_row(template: str, example: Example, cause: str) -> None:
    """Trained without its call, an answer that reports what the tool said teaches to make results up."""
    with pytest.raises(RequestError, match=rf"chat template, the example [0-9a-f]{{32}} \('Weather\?' …\): {cause}"):
        encode_examples([example], chat_tokenizer(template), "chat")


def test_a_template_that_leaves_out_a_turn_refuses_the_row() -> None:
    """Phi-3's first template wrote no system turn, and none of a tool, and said nothing: the answers would have been
    trained without what they follow. One that writes a turn otherwise, as JSON, has not left it out."""
    phi3 = (
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}"
        "{{ '<|im_start|>' + m.content + '<|im_end|>\\n' }}"
        "{% elif m.role == 'assistant' %}{{ m.content + '<|im_end|>\\n' }}{% endif %}{% endfor %}"
    )
    read = (Message("user", "a"), Message("assistant", "b"), Message("tool", "c d"), Message("assistant", "e"))
    later = (*read[:2], Message("system", "Be brief."), Message("user", "f"), Message("assistant", "g"))
    with_system = conversation("a", "b", system="Be terse.")
    for example, role in ((with_system, "system"), (Example(read), "tool"), (Example(later), "system")):
        cause = rf"it leaves out what a turn of the role '{role}' says\. Fix: use --template alpaca"
        with pytest.raises(RequestError, match=cause):
            encode_examples([conversation("a", "b"), example], chat_tokenizer(phi3), "chat")
    lines = 'Line 1\nsays "no".'
    for template in (CHATML.replace("m.content", "(m.content | tojson if m.role == 'system' else m.content)"), CHATML):
        assert shown(chat_tokenizer(template), conversation("a", "b", system=lines))[2] == ["b"]


def test_the_alpaca_template_has_no_place_for_tools() -> None:
    with pytest.raises(
        RequestError, match=r"alpaca template, the example .*: it has no place for tools, tool calls or"
    ):
        encode_examples([CALLING], make_tokenizer(), "alpaca")


def marker_tokenizer():
    """As SmolLM2's and other ChatML tokenizers: BOS is the marker that opens a turn."""
    tokenizer = chat_tokenizer(CHATML)
    tokenizer.bos_token, tokenizer.eos_token = "<|im_start|>", "<|im_end|>"
    return tokenizer


def test_unconditional_likelihoods_do_not_start_from_a_marker_of_the_chat(capsys, monkeypatch):
    """After `<|im_start|>` the model expects a speaker's name, not an answer: ifd would be far too low."""
    monkeypatch.setattr("im_lightning.data.tokenization._said", set())
    tokenizer = marker_tokenizer()
    example = conversation("Name a colour.", "red, blue")
    (encoded,) = encode_unconditional([example], tokenizer, 64)
    opening = tokenizer("<|im_start|>assistant\n", add_special_tokens=False).input_ids
    response = tokenizer("red, blue", add_special_tokens=False).input_ids
    assert encoded.input_ids.tolist() == [*opening, *response]
    assert encoded.response_mask.tolist() == [False] * len(opening) + [True] * len(response)
    assert (
        "BOS <|im_start|> opens turns of a chat: unconditional likelihoods start from the answer's"
        in capsys.readouterr().err
    )
    (encoded,) = encode_unconditional([example], tokenizer, 64, "alpaca")
    assert encoded.input_ids[0] == tokenizer.eos_token_id
    for template in (
        CHATML,
        "{{ bos_token }}" + CHATML,
        "{% for m in messages %}{{ bos_token + m.content }}{% endfor %}",
    ):
        tokenizer = chat_tokenizer(template)  # LLaMA-2 writes BOS before every exchange, and no answer begins with it
        assert unconditional_start(tokenizer, resolve_template("chat", tokenizer)) == ([tokenizer.bos_token_id], "bos")


def test_the_length_of_an_answer_counts_its_call_and_its_reasoning() -> None:
    """Budgets in tokens, `longest` and the rule's regressor took such answers for empty, or without their thought."""
    tokenizer, called = chat_tokenizer(TOOLS), Example(CALLING.messages[:2], tools=CALLING.tools)
    (encoded,) = encode_examples([called], tokenizer, "auto", 4096)
    assert encoded.length_output == int(encoded.response_mask.sum()) > 0
    (encoded,) = encode_examples([CALLING], tokenizer, "auto", 4096)
    written = tokenizer("<think>The tool says so.</think>\nIt is 4.", add_special_tokens=False).input_ids
    assert encoded.length_output == len(written)
    (plain,) = encode_examples([conversation("Hi", "Hello you")], tokenizer, "auto")
    assert plain.length_output == len(tokenizer("Hello you").input_ids[1:])
