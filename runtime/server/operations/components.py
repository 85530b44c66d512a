"""Components of the bundle in model names: `MODEL/COMPONENT`, or a parameter `component` beside the name `MODEL`."""

from __future__ import annotations

from tpeft_deploy.bundle.directory import Bundle
from tpeft_deploy.bundle.manifest import Manifest
from tpeft_deploy.errors import NotFound, ProtocolError

__all__ = ["Components"]


class Components:
    """Names and manifests of the components of a bundle.

    Args:
        bundle: the served bundle.

    Attributes:
        manifests: component -> manifest.
        several: names of the components; empty if the bundle has one graph, so that names need no suffix.
    """

    def __init__(self, bundle: Bundle) -> None:
        self.manifests = {name: part.manifest for name, part in bundle.components.items()}
        self.several: tuple[str, ...] = tuple(self.manifests) if len(self.manifests) > 1 else ()
        self._only = next(iter(self.manifests))

    def split(self, name: str, parameter: str | None = None) -> tuple[str, str | None]:
        """Split the name of a model into the name of a task, of `base` or of the bundle, and a component.

        Args:
            name: name given by the client.
            parameter: component named beside it.

        Raises:
            NotFound: there is no such component.
            ProtocolError: name and parameter differ.
        """
        model, slash, suffix = name.partition("/")
        found = suffix if slash else parameter
        if found is None:
            return model, None
        if found not in self.manifests:
            raise NotFound(
                f"find model {name!r}" if slash else f"run model {name!r}, parameter 'component'",
                expected=f"a component among {', '.join(self.manifests)}",
                got=repr(found),
            )
        if parameter is not None and parameter != found:
            raise ProtocolError(
                f"run model {name!r}", expected="one component", got=f"{parameter!r} as parameter", fix="Name it once."
            )
        return model, found

    def one(self, model: str, component: str | None) -> str:
        """Return the component, or the only one for None.

        Raises:
            ProtocolError: none is given, and there are several.
        """
        if component is None and self.several:
            raise ProtocolError(
                f"find the component of model {model!r}",
                expected=f"one of the models {', '.join(self.names(model))}, or a parameter 'component'",
                got="neither",
            )
        return self._only if component is None else component

    def names(self, model: str, component: str | None = None) -> list[str]:
        """Return the names under which a component of a model is listed, or all of them."""
        if not self.several:
            return [model]
        return [f"{model}/{name}" for name in (self.several if component is None else [component])]

    def manifest(self, model: str, component: str | None) -> Manifest:
        """Return the manifest of `one`."""
        return self.manifests[self.one(model, component)]
