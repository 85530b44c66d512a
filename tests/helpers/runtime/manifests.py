from __future__ import annotations

from tpeft_deploy.bundle.manifest import Manifest, Port


def manifest(inputs: tuple[Port, ...], outputs: tuple[Port, ...]) -> Manifest:
    """Of a model without weights."""
    return Manifest(
        name="m",
        producer="a test",
        weights={},
        aliases={},
        targets=(),
        rows="each",
        rows_reason="",
        inputs=inputs,
        outputs=outputs,
        files={},
    )
