"""Pooling of a model of sentence embeddings, and the tokens that it takes, from the files of its directory."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any, get_args

from tpeft_deploy.bundle.text_files import Mode, Pooling
from tpeft_deploy.errors import UnsupportedBase

__all__ = ["most_tokens", "read_pooling"]

_log = logging.getLogger("tpeft_deploy.exporters")

_MODULES, _LIMITS = "modules.json", "sentence_bert_config.json"
_KNOWN = ("Transformer", "Pooling", "Normalize")
# Names in the configuration of sentence-transformers' Pooling.
_MODES: dict[str, Mode] = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_lasttoken": "last",
}
_SHORT: dict[str, Mode] = {"cls": "cls", "mean": "mean", "lasttoken": "last"}
_NO_LIMIT = 1 << 24  # transformers writes 1e30 for a tokenizer without a limit


def read_pooling(directory: Path, given: Pooling | Mode | None = None) -> Pooling | None:
    """Pooling of a model directory: the given one, or what sentence-transformers' files say.

    None, with a warning, where these ask for something else than pooling and a length of 1.

    Raises:
        UnsupportedBase: the given one is none.
    """
    if given is not None and not isinstance(given, Pooling):
        if given not in get_args(Mode):
            expected = f"one of {', '.join(get_args(Mode))}, or a Pooling"
            raise UnsupportedBase(f"read the pooling of {directory}", expected=expected, got=repr(given)[:80])
        given = Pooling(given)
    if given is not None or not (directory / _MODULES).is_file():
        return given
    modules = _read(directory / _MODULES, [])
    kinds = {str(own.get("type")).rpartition(".")[2]: directory / str(own.get("path")) for own in modules}
    problem = next((f"it has a module {kind}" for kind in kinds if kind not in _KNOWN), None)
    own = _read(kinds["Pooling"] / "config.json", {}) if "Pooling" in kinds else {}
    if _read(directory / _LIMITS, {}).get("do_lower_case"):
        problem = f"{_LIMITS} turns texts into lower case"
    modes = [name for name, value in own.items() if name.startswith("pooling_mode_") and value is True]
    mode = _SHORT.get(str(own.get("pooling_mode"))) or (_MODES.get(modes[0]) if len(modes) == 1 else None)
    if mode is None or problem is not None:
        problem = problem or f"its pooling is {', '.join(modes) or own.get('pooling_mode') or 'missing'}"
        _log.warning("%s: embeddings are not served: %s", directory, problem)
        return None
    prompt = _prompt(directory)
    if prompt and own.get("include_prompt") is False:
        _log.warning("%s: embeddings are not served: pooling leaves out the prompt", directory)
        return None
    cuts = _read(directory / "config.json", {}).get("matryoshka_dimensions") or ()
    return Pooling(mode, "Normalize" in kinds, prompt, tuple(size for size in cuts if isinstance(size, int)))


def most_tokens(directory: Path) -> int | None:
    """Tokens of a text at most: the least that the files of a directory state; None where none does.

    Models that number positions from behind the padding token have as many fewer.
    """
    config = _read(directory / "config.json", {})
    positions = config.get("max_position_embeddings")
    if isinstance(positions, int) and config.get("model_type") in _BEHIND_PADDING:
        positions -= 1 + int(config.get("pad_token_id") or 0)
    tokenizer = _read(directory / "tokenizer_config.json", {}).get("model_max_length")
    found = [positions, tokenizer, _read(directory / _LIMITS, {}).get("max_seq_length")]
    limits = [int(limit) for limit in found if isinstance(limit, int | float) and 0 < limit < _NO_LIMIT]
    return min(limits, default=None)


_BEHIND_PADDING = {"camembert", "data2vec-text", "esm", "ibert", "longformer", "mpnet", "roberta", "xlm-roberta"} | {
    *("luke", "mluke", "roberta-prelayernorm", "xlm-roberta-xl", "xmod")
}


def _prompt(directory: Path) -> str:
    config = _read(directory / "config_sentence_transformers.json", {})
    return str((config.get("prompts") or {}).get(config.get("default_prompt_name")) or "")


def _read(file: Path, default: Any) -> Any:
    """Content of a JSON file; the default where there is none, or it is of another type."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except OSError:
        return default
    except (ValueError, RecursionError) as error:
        raise UnsupportedBase(f"read {file}", expected="JSON", got=str(error)) from error
    return found if isinstance(found, type(default)) else default
