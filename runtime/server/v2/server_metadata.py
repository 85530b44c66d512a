"""Metadata of the server in the V2 protocol, with what the bundle does with text."""

from __future__ import annotations

import tpeft_deploy
from tpeft_deploy.bundle.directory import Bundle
from tpeft_deploy.bundle.image_facts import IMAGE
from tpeft_deploy.bundle.text_files import TextFacts
from tpeft_deploy.runtime.server.tenancy.access import Principal
from tpeft_deploy.runtime.server.v2.messages import Document

__all__ = ["ServerMetadata", "text_calls"]

_EXTENSIONS = ("binary_tensor_data", "model_configuration", "model_repository", "parameters", "statistics")


class ServerMetadata:
    """Metadata of the server.

    Args:
        bundle: the served bundle.
    """

    def __init__(self, bundle: Bundle) -> None:
        components = tuple(bundle.components)
        self._document: Document = {
            "name": "tpeft-deploy",
            "version": tpeft_deploy.__version__,
            "extensions": list(_EXTENSIONS),
            "bundle": bundle.manifest.name,
            "components": list(components) if len(components) > 1 else [],
            "text": text_calls(bundle),
        }

    def document(self, principal: Principal) -> Document:
        """Return name, version, extensions, bundle, components, calls for text, and tenant and role of the caller."""
        return {**self._document, "caller": {"tenant": principal.tenant, "role": principal.role.value}}


def text_calls(bundle: Bundle) -> list[str]:
    """Return what a bundle can be asked for with text, among chat, completions, images, embeddings and classify.

    Args:
        bundle: the bundle.
    """
    found: set[str] = set()
    for own in bundle.components.values():
        text = own.manifest.text
        if not text:
            continue
        facts = TextFacts.read(own)
        if own.manifest.decoder is not None:
            found.add("completions")
            found |= ({"chat"} if facts.templates else set()) | ({"images"} if IMAGE in text else set())
        else:
            labelled = any(port.name == "logits" and len(port.shape) == 2 for port in own.manifest.outputs)
            found |= ({"embeddings"} if facts.pooling else set()) | ({"classify"} if labelled else set())
    return sorted(found)
