"""CLIP's text encoder: its layers were inside `text_model` before transformers 5.24, and are at the top since."""

__all__ = ["INNER", "NAMES", "RULES", "UNLESS"]

NAMES = frozenset({"embeddings.token_embedding", "text_model.embeddings.token_embedding"})
UNLESS = frozenset({"vision_model"})  # with a vision model the short names would be ambiguous

RULES = (
    (r"(?=(?:embeddings|encoder|final_layer_norm)\b)", "text_model."),
    (r"text_model\.(?=.)", ""),
)

INNER: tuple[tuple[str, str], ...] = ()
