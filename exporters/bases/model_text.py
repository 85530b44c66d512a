"""Text of a Hugging Face model directory: its tokenizer, chat templates and generation defaults, for a bundle."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tpeft_deploy.bundle.text_files import Mode, Pooling, TextFacts
from tpeft_deploy.errors import UnsupportedBase, brief, requires
from tpeft_deploy.exporters.pooling import most_tokens, read_pooling
from tpeft_deploy.formats.read.saved import read_config
from tpeft_deploy.labels import HeadLabels

__all__ = ["has_tokenizer", "load_tokenizer", "read_text"]

_log = logging.getLogger("tpeft_deploy.exporters")

# Any of these files says that a directory has a tokenizer.
_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "vocab.json", "vocab.txt", "merges.txt", "tekken.json"),
    *("*.model", "*.spm", "*.bpe", "*.tiktoken"),
)
_FIX = "Save it as a fast tokenizer (tokenizer.json), or export a copy of the directory without its files."
# Parameters of transformers' generate that change which tokens it chooses, and that Sampling has not.
_NOT_SERVED = {
    "num_beams": 1,
    "typical_p": 1.0,
    "epsilon_cutoff": 0.0,
    "eta_cutoff": 0.0,
    "no_repeat_ngram_size": 0,
    "bad_words_ids": None,
    "suppress_tokens": None,
    "begin_suppress_tokens": None,
    "forced_bos_token_id": None,
    "forced_eos_token_id": None,
    "guidance_scale": None,
    "min_new_tokens": None,
}


def has_tokenizer(directory: Path) -> bool:
    """Whether a model directory holds files of a tokenizer."""
    return any(next(directory.glob(pattern), None) is not None for pattern in _FILES)


def read_text(directory: Path, pooling: Pooling | Mode | None = None) -> tuple[str, TextFacts]:
    """Text of tokenizer.json, and all other facts, of a directory with a tokenizer.

    transformers loads the tokenizer, and converts one of another format.  No code of the directory is run.

    Args:
        directory: a model directory.
        pooling: how embeddings are made; by default as sentence-transformers' files in the directory say.

    Raises:
        MissingExtra: transformers is not installed.
        UnsupportedBase: the tokenizer has no form that the package tokenizers reads.
    """
    tokenizer = load_tokenizer(directory)
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        kind = type(tokenizer).__name__
        raise _refused(directory, f"{kind}, which is written in Python and has no tokenizer.json")
    backend.no_truncation()
    backend.no_padding()
    generation = _generation(directory)
    bpe = type(backend.model).__name__ == "BPE"
    forced = getattr(tokenizer, "clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output", False)
    facts = TextFacts(
        special_tokens={name: _plain(value) for name, value in tokenizer.special_tokens_map.items()},
        templates=_templates(tokenizer),
        sampling=_sampling(generation),
        stop_tokens=_stop_tokens(generation, tokenizer),
        max_new_tokens=generation.get("max_new_tokens"),
        clean_up=bool(tokenizer.clean_up_tokenization_spaces and (forced or not bpe)),
        token_types="token_type_ids" in tokenizer.model_input_names,
        pooling=read_pooling(directory, pooling),
        labels=HeadLabels.of_config(read_config(directory / "config.json")),
        most_tokens=most_tokens(directory),
    )
    return backend.to_str(), facts


def load_tokenizer(directory: Path) -> Any:
    """Load the tokenizer of a model directory with transformers, without code of the directory.

    Raises:
        MissingExtra: transformers is not installed.
        UnsupportedBase: transformers does not load it.
    """
    with requires("transformers", "hf", f"read the tokenizer of {directory}"):
        from transformers import AutoTokenizer
    try:
        return AutoTokenizer.from_pretrained(str(directory), local_files_only=True, trust_remote_code=False)
    except Exception as error:  # of many types, by format
        raise _refused(directory, f"one that transformers does not load ({brief(error, 200)})") from error


def _refused(directory: Path, got: str) -> UnsupportedBase:
    return UnsupportedBase(
        f"read the tokenizer of {directory}", expected="one that the package tokenizers can run", got=got, fix=_FIX
    )


def _templates(tokenizer: Any) -> Mapping[str, str]:
    found = tokenizer.chat_template
    if isinstance(found, str):
        return {"default": found}
    return dict(found or {})


def _plain(value: Any) -> str | list[str]:
    return [str(item) for item in value] if isinstance(value, list | tuple) else str(value)


def _generation(directory: Path) -> dict[str, Any]:
    """Values of generation_config.json, or of an older config.json, that differ from transformers' defaults."""
    from transformers import AutoConfig, GenerationConfig

    try:
        config = GenerationConfig.from_pretrained(str(directory), local_files_only=True)
    except OSError:
        model = AutoConfig.from_pretrained(str(directory), local_files_only=True, trust_remote_code=False)
        config = GenerationConfig.from_model_config(model)
    values: dict[str, Any] = config.to_diff_dict()
    for name, neutral in _NOT_SERVED.items():
        if values.get(name) not in (None, neutral):
            _log.warning("%s: generation default %s=%r is left out: no such sampling", directory, name, values[name])
    return values


def _sampling(generation: Mapping[str, Any]) -> dict[str, Any]:
    """Values of `Sampling`, as generate samples with these defaults."""
    names = ["repetition_penalty", "stop_strings"]
    values: dict[str, Any] = {}
    if generation.get("do_sample"):
        values = {"temperature": 1.0, "top_k": 50}  # defaults of generate
        names += ["temperature", "top_k", "top_p", "min_p"]
    values |= {name: generation[name] for name in names if generation.get(name) is not None}
    if isinstance(values.get("stop_strings"), str):
        values["stop_strings"] = [values["stop_strings"]]
    return values


def _stop_tokens(generation: Mapping[str, Any], tokenizer: Any) -> tuple[int, ...]:
    found = generation.get("eos_token_id")
    if found is None:
        found = tokenizer.eos_token_id
    if found is None:
        return ()
    return tuple(found) if isinstance(found, list | tuple) else (int(found),)
