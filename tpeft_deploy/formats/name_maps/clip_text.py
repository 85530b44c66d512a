"""CLIP's text encoder, whose layers were inside `text_model` before transformers 5.24 and are at the top since."""

__all__ = ["INNER", "NAMES", "RULES", "UNLESS"]

NAMES = frozenset({"embeddings.token_embedding", "text_model.embeddings.token_embedding"})
UNLESS = frozenset({"vision_model"})  # beside which the short names would be those of either

RULES = (
    (r"(?=(?:embeddings|encoder|final_layer_norm)\b)", "text_model."),
    (r"text_model\.(?=.)", ""),
)

INNER: tuple[tuple[str, str], ...] = ()
