from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from transformers import GPT2Tokenizer, LlamaConfig, LlamaForCausalLM
from transformers.convert_slow_tokenizer import import_protobuf

from tests.helpers.runtime.chat_templates import TEMPLATES
from tests.helpers.runtime.tokenizers_of_styles import LINES, fast
from tpeft_deploy import export_bundle
from tpeft_deploy.bundle.directory import Bundle
from tpeft_deploy.bundle.text_files import TextFacts
from tpeft_deploy.cli import main
from tpeft_deploy.errors import InputError, IntegrityError, UnsupportedBase
from tpeft_deploy.exporters.bases.model_text import has_tokenizer, read_text
from tpeft_deploy.exporters.verify import verify_bundle
from tpeft_deploy.runtime.text.model_text import ModelText

CHAT = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hi, fox!"}]


def config(place: Path, **generation: Any) -> Path:
    LlamaConfig(vocab_size=400, eos_token_id=None, bos_token_id=None).save_pretrained(place)
    if generation:
        (place / "generation_config.json").write_text(json.dumps(generation))
    return place


def model_text(place: Path) -> ModelText:
    return ModelText(*read_text(place))


def test_a_directory_with_a_tokenizer_becomes_a_bundle_with_text(tmp_path: Path) -> None:
    sizes: Any = {"vocab_size": 402, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    heads: Any = {"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 128}
    model = LlamaForCausalLM(LlamaConfig(**sizes, **heads, eos_token_id=1, bos_token_id=0, pad_token_id=1))
    model.generation_config.update(do_sample=True, temperature=0.5, max_new_tokens=7)
    model.save_pretrained(tmp_path / "base")
    tokenizer = fast("byte-level", chat_template=TEMPLATES["chatml"])
    tokenizer.save_pretrained(tmp_path / "base")
    bundle = export_bundle(tmp_path / "base", {}, tmp_path / "bundle", generation=True)
    assert sorted(bundle.manifest.text) == ["text.json", "tokenizer.json"]
    text = ModelText.open(Bundle.open(bundle.path))
    assert text.chat(CHAT) == tokenizer.apply_chat_template(CHAT, add_generation_prompt=True, return_dict=False)
    assert text.encode(LINES[1]) == tokenizer.encode(LINES[1])
    assert text.facts == TextFacts(
        special_tokens=tokenizer.special_tokens_map,
        templates={"default": TEMPLATES["chatml"]},
        sampling={"temperature": 0.5, "top_k": 50},
        stop_tokens=(1,),
        max_new_tokens=7,
        most_tokens=128,
    )
    verify_bundle(bundle.path)
    check_generated(bundle.path, model, tokenizer)
    file = bundle.path / "text" / "tokenizer.json"
    file.write_text(file.read_text().replace("fox", "cat"))
    with pytest.raises(IntegrityError, match=r"'text/tokenizer\.json'"):
        ModelText.open(Bundle.open(bundle.path))
    with pytest.raises(IntegrityError, match=r"'text/tokenizer\.json'"):
        verify_bundle(bundle.path)
    file.unlink()
    with pytest.raises(IntegrityError, match=r"'text/tokenizer\.json'.*got no file"):
        Bundle.open(bundle.path)


def check_generated(path: Path, model: Any, tokenizer: Any) -> None:
    """The command line writes what `generate` and `decode` of transformers give."""
    ids = tokenizer.apply_chat_template(CHAT[1:], add_generation_prompt=True, return_tensors="pt", return_dict=False)
    new = model.generate(ids, do_sample=False, max_new_tokens=7)[0, ids.shape[1] :]
    args = ["generate", str(path), "--prompt", CHAT[1]["content"], "--chat", "--temperature", "0"]
    written = CliRunner().invoke(main, args)
    assert written.exit_code == 0, written.output
    assert written.stdout == tokenizer.decode(new, skip_special_tokens=True) + "\n"
    again = CliRunner().invoke(main, [*args, "--json"])
    [row] = json.loads(again.stdout)["results"]
    assert row["tokens"] == new.tolist()


def test_a_bundle_without_a_tokenizer_has_no_text(conv_bundle: Bundle) -> None:
    assert conv_bundle.manifest.text == {}
    with pytest.raises(InputError, match="it has no tokenizer"):
        ModelText.open(conv_bundle)


def test_older_formats_are_converted(tmp_path: Path) -> None:
    vocabulary = {token: index for index, token in enumerate([*"abcdĠ", "ab", "Ġab", "<|endoftext|>"])}
    tokenizer = GPT2Tokenizer(vocab=vocabulary, merges=[("a", "b"), ("Ġ", "ab")])
    tokenizer.save_pretrained(config(tmp_path))
    wanted = tokenizer.encode("ab ab cd")
    (tmp_path / "tokenizer.json").unlink()
    (tmp_path / "vocab.json").write_text(json.dumps(vocabulary))
    (tmp_path / "merges.txt").write_text("#version: 0.2\na b\nĠ ab\n")
    assert model_text(tmp_path).encode("ab ab cd") == wanted == [5, 6, 4, 2, 3]


def test_what_cannot_be_converted_is_refused(tmp_path: Path) -> None:
    config(tmp_path)
    assert not has_tokenizer(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(b"\x00 no model")
    assert has_tokenizer(tmp_path)
    with pytest.raises(UnsupportedBase, match="export a copy of the directory without its files"):
        read_text(tmp_path)
    (tmp_path / "tokenizer.model").unlink()
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "ByT5Tokenizer"}')
    with pytest.raises(UnsupportedBase, match="ByT5Tokenizer, which is written in Python"):
        read_text(tmp_path)


def test_greedy_models_sample_greedily_and_what_is_not_served_is_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    place = config(tmp_path, temperature=0.7, repetition_penalty=1.2, eos_token_id=[1, 2], no_repeat_ngram_size=3)
    fast("byte-level").save_pretrained(place)
    with caplog.at_level(logging.WARNING, "tpeft_deploy.exporters"):
        _, facts = read_text(place)
    assert facts.sampling == {"repetition_penalty": 1.2}
    assert facts.stop_tokens == (1, 2)
    assert "no_repeat_ngram_size=3 is left out" in caplog.text


def test_a_model_without_generation_defaults_stops_at_its_tokenizers_end(tmp_path: Path) -> None:
    templates = {"default": "a", "tool_use": "b"}
    fast("metaspace", chat_template=templates, clean_up_tokenization_spaces=True).save_pretrained(config(tmp_path))
    _, facts = read_text(tmp_path)
    assert facts == TextFacts(
        special_tokens=fast("metaspace").special_tokens_map,
        templates=templates,
        stop_tokens=(1,),
        clean_up=True,
        most_tokens=2048,
    )


def test_sentencepiece_models_are_converted(tmp_path: Path) -> None:
    messages = import_protobuf()
    model = messages.ModelProto()
    kinds = [("<unk>", 2), ("<s>", 3), ("</s>", 3), *((f"<0x{byte:02X}>", 6) for byte in range(256))]
    kinds += [(piece, 1) for piece in ("▁", "a", "b", "▁a", "▁ab", "ab")]
    for index, (piece, kind) in enumerate(kinds):
        model.pieces.add(piece=piece, score=-float(index), type=kind)
    model.trainer_spec.model_type, model.trainer_spec.byte_fallback = 2, True
    (config(tmp_path) / "tokenizer.model").write_bytes(model.SerializeToString())
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "LlamaTokenizer"}')
    text = model_text(tmp_path)
    tokens = text.encode("ab ab€")
    assert text.decode(tokens) == "ab ab€"
    assert len(tokens) < 10
