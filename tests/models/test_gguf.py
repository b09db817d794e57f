"""A GGUF file is a checkpoint like any other: the same numbers and tokens, made once, with an identity of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tiny_gguf import write_gguf

from im_lightning import cli
from im_lightning.data.score_table import ScoreTable
from im_lightning.errors import RequestError
from im_lightning.models.checkpoint import checkpoint_identity, load_causal_lm, load_tokenizer
from im_lightning.models.fingerprint import local_folder
from im_lightning.models.gguf import _with_scaled_positions, conversion

TEXTS = ["What are the three primary colors?", "a:\n\n1. x  12  ab", " Red, \tblue  and 2026."]
PRES = ["smollm", "llama-bpe", "qwen2"]


@pytest.fixture(scope="module")
def gguf_file(tiny_llama: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_gguf(tiny_llama, tmp_path_factory.mktemp("gguf") / "tiny.gguf")


def test_the_same_logits_and_tokens_as_the_checkpoint_it_was_written_from(tiny_llama: str, gguf_file: Path) -> None:
    import torch

    for text in TEXTS:
        ids = load_tokenizer(tiny_llama)(text, return_tensors="pt").input_ids
        assert load_tokenizer(gguf_file)(text, return_tensors="pt").input_ids.tolist() == ids.tolist()
        with torch.no_grad():
            wanted, got = (load_causal_lm(m)(input_ids=ids).logits for m in (tiny_llama, gguf_file))
        torch.testing.assert_close(got, wanted)


def test_quantised_weights_are_what_gguf_makes_of_them(tiny_llama: str, tmp_path: Path) -> None:
    import gguf
    import numpy as np

    kind = gguf.GGMLQuantizationType.Q8_0
    original = load_causal_lm(tiny_llama).state_dict()
    loaded = load_causal_lm(write_gguf(tiny_llama, tmp_path / "q8.gguf", quantised=True)).state_dict()
    for name in ("model.embed_tokens.weight", "lm_head.weight", "model.layers.1.mlp.down_proj.weight"):
        wanted = gguf.quants.dequantize(gguf.quants.quantize(original[name].numpy(), kind), kind)
        assert np.array_equal(loaded[name].numpy(), wanted) and not np.array_equal(wanted, original[name].numpy())


@pytest.mark.parametrize("pre", PRES)
def test_text_is_cut_as_the_vocabulary_was_learnt(tiny_llama: str, tmp_path: Path, pre: str) -> None:
    """The pieces of the models' own tokenizer.json files, which numbers and blank lines tell apart."""
    cut = load_tokenizer(write_gguf(tiny_llama, tmp_path / "tiny.gguf", pre=pre)).backend_tokenizer.pre_tokenizer
    pieces = [piece for piece, _ in cut.pre_tokenize_str("a\n\n12345  x")]
    assert (
        pieces
        == {
            "smollm": ["a", "ĊĊ", "1", "2", "3", "4", "5", "Ġ", "Ġx"],
            "llama-bpe": ["a", "ĊĊ", "123", "45", "Ġ", "Ġx"],
            "qwen2": ["a", "ĊĊ", "1", "2", "3", "4", "5", "Ġ", "Ġx"],
        }[pre]
    )


def test_a_vocabulary_like_llama_3s_takes_words_whole_and_begins_with_bos(tiny_llama: str, tmp_path: Path) -> None:
    """As llama.cpp and the models' own tokenizer.json do, though their files do not say so: without BOS, and with some
    words in pieces, all likelihoods and trainings would be those of other tokens."""
    vocabulary = load_tokenizer(tiny_llama).get_vocab()
    word = max((one for one in vocabulary if one.isascii() and one.isalpha()), key=len)
    made = {pre: write_gguf(tiny_llama, tmp_path / f"{pre}.gguf", pre=pre, bos=False, merges=1) for pre in PRES}
    assert len(word) > 2 and len(load_tokenizer(made["qwen2"])(word, add_special_tokens=False).input_ids) > 1
    assert load_tokenizer(made["llama-bpe"])(word).input_ids == [vocabulary["<s>"], vocabulary[word]]
    said = write_gguf(tiny_llama, tmp_path / "said.gguf", pre="llama-bpe")
    assert load_tokenizer(said)(word).input_ids == [vocabulary["<s>"], vocabulary[word]]
    # folders that come out as before keep their digests, and runs and scores their base
    assert [conversion(file, False) for file in made.values()] == [1, 2, 1]
    assert conversion(said, False) == 2 and conversion(said, True) == 1


SCALED = [
    {"rope_type": "linear", "factor": 4.0},
    {
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
]  # fmt: skip


@pytest.mark.parametrize("scaling", SCALED, ids=["linear", "llama3"])
def test_scaled_positions_are_those_of_the_checkpoint(scaling: dict[str, Any], tiny_llama: str, tmp_path: Path) -> None:
    """LLaMA 3.1 to 3.3: transformers reads their files as if no rotation were slowed down."""
    import torch

    plain = load_causal_lm(tiny_llama)
    frequencies = plain.model.rotary_emb.inv_freq.clone()
    if hasattr(plain.config, "rope_parameters"):
        plain.config.rope_parameters = {**plain.config.rope_parameters, **scaling}
    else:
        plain.config.rope_scaling = scaling
    plain.save_pretrained(tmp_path / "scaled")
    load_tokenizer(tiny_llama).save_pretrained(tmp_path / "scaled")
    scaled = load_causal_lm(str(tmp_path / "scaled"))
    divisors = frequencies / scaled.model.rotary_emb.inv_freq
    assert divisors.max() > 1.5
    of_file = {"divisors": divisors} if scaling["rope_type"] == "llama3" else {**scaling, "type": "linear"}
    file = write_gguf(str(tmp_path / "scaled"), tmp_path / "scaled.gguf", scaling=of_file)
    found = load_causal_lm(file)
    torch.testing.assert_close(found.model.rotary_emb.inv_freq, scaled.model.rotary_emb.inv_freq)
    ids = torch.arange(40)[None] % 30
    with torch.no_grad():
        torch.testing.assert_close(found(input_ids=ids).logits, scaled(input_ids=ids).logits)
    assert [conversion(file, own) for own in (True, False)] == [3, 3], "what was made without it is not taken for it"


@pytest.mark.parametrize(
    ("scaling", "said"),
    [
        ({"type": "yarn", "factor": 4.0}, r"\(yarn\)"),
        ({"divisors": [1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0]}, r"\(none, rope_freqs\.weight\)"),
    ],
)
def test_positions_scaled_otherwise_are_refused(
    scaling: dict[str, Any], said: str, tiny_llama: str, tmp_path: Path
) -> None:
    file = write_gguf(tiny_llama, tmp_path / "tiny.gguf", scaling=scaling)
    cause = rf"tiny\.gguf: its positions are scaled in a way that is not known here {said}\. Fix: name the original"
    with pytest.raises(RequestError, match=cause):
        load_causal_lm(file)


def test_scaled_positions_that_transformers_reads_are_left_to_it(tmp_path: Path) -> None:
    import gguf

    writer = gguf.GGUFWriter(tmp_path / "oss.gguf", "gpt-oss")
    writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
    writer.add_rope_scaling_factor(32.0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert conversion(tmp_path / "oss.gguf", False) == 1
    model = object()
    assert _with_scaled_positions(model, tmp_path / "oss.gguf") is model


def test_its_identity_is_that_of_the_file(tiny_llama: str, gguf_file: Path, tmp_path: Path) -> None:
    """By path, by folder and by the folder in the cache the same; another file or changed weights another."""
    identity = checkpoint_identity(gguf_file)
    folder = local_folder(gguf_file)
    assert folder is not None and identity["weights"].startswith("gguf ")
    assert identity == checkpoint_identity(gguf_file.parent) == checkpoint_identity(folder)
    assert identity["weights"] != checkpoint_identity(tiny_llama)["weights"]
    other = write_gguf(tiny_llama, tmp_path / "q8.gguf", quantised=True)
    assert checkpoint_identity(other)["weights"] != identity["weights"]
    load_causal_lm(tiny_llama).half().save_pretrained(folder)  # somebody trains in the cache
    assert not checkpoint_identity(folder)["weights"].startswith("gguf ")


def test_two_processes_make_it_once(gguf_file: Path, own_cache: Path) -> None:
    code = "import sys; from im_lightning.models.fingerprint import local_folder; print(local_folder(sys.argv[1]))"
    command = [sys.executable, "-c", code, str(gguf_file)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "env": dict(os.environ)}
    both = [subprocess.Popen(command, **pipes) for _ in range(2)]  # type: ignore[call-overload]
    answers = [process.communicate(timeout=250) for process in both]
    assert [process.returncode for process in both] == [0, 0], answers
    assert len({out for out, _ in answers}) == 1
    assert sum("dequantising to fp32, once" in err for _, err in answers) == 1
    assert len([p for p in (own_cache / "gguf").iterdir() if p.is_dir()]) == 1


def test_a_torn_file_leaves_nothing_behind(gguf_file: Path, tmp_path: Path, own_cache: Path) -> None:
    torn = tmp_path / "torn.gguf"
    torn.write_bytes(gguf_file.read_bytes()[: gguf_file.stat().st_size // 2])
    with pytest.raises(RequestError, match=r"torn\.gguf: .*\. Fix: "):
        local_folder(torn)
    assert not [p for p in (own_cache / "gguf").iterdir() if p.is_dir()]


def test_a_tokenizer_that_would_be_guessed_is_asked_for(tiny_llama: str, tmp_path: Path) -> None:
    file = write_gguf(tiny_llama, tmp_path / "odd.gguf", pre="odd-one")
    with pytest.raises(RequestError, match=r"tokenizer\.ggml\.pre is odd-one.*put the model's tokenizer\.json beside"):
        local_folder(file)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((Path(tiny_llama) / name).read_bytes())
    assert load_tokenizer(file)(TEXTS[1]).input_ids == load_tokenizer(tiny_llama)(TEXTS[1]).input_ids


def test_which_file_is_meant_is_asked(gguf_file: Path, tmp_path: Path) -> None:
    for name in ("a.gguf", "b.gguf"):
        (tmp_path / name).write_bytes(gguf_file.read_bytes())
    with pytest.raises(RequestError, match=r"holds 2 GGUF files.*name one of them, such as a\.gguf"):
        local_folder(tmp_path)
    part = tmp_path / "c-00001-of-00003.gguf"
    part.write_bytes(b"")
    with pytest.raises(RequestError, match=r"is one part of a GGUF.*--merge"):
        local_folder(part)


def test_scores_are_made_and_kept_under_it(gguf_file: Path, tiny_llama: str, tmp_path: Path) -> None:
    """The command takes the file as it takes a folder, and no score of the one is taken for the other's."""
    pool = tmp_path / "pool.jsonl"
    pool.write_text('{"instruction": "Give three tips.", "input": "", "output": "Eat, sleep and exercise."}\n')
    tables = []
    for model in (str(gguf_file), tiny_llama):
        out = tmp_path / "scores.parquet"
        given = ["--model", model, "--indicators", "ppl", "--out", str(out), "--device", "cpu", "--precision", "fp32"]
        assert cli.main(["score", str(pool), *given]) == 0
        tables.append(ScoreTable.read(out))
        out.unlink()
    first, second = tables
    assert first.values["ppl"] == pytest.approx(second.values["ppl"], rel=1e-5)
    assert first.keys["ppl"] != second.keys["ppl"]
