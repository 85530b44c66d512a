"""The devices that a runtime is asked to serve on."""

from __future__ import annotations

from collections.abc import Sequence

from tpeft_deploy.errors import ProviderUnavailable
from tpeft_deploy.runtime.sessions.providers import PROVIDERS, Choice, choose

__all__ = ["choose_devices"]


def choose_devices(provider: str, devices: Sequence[int] | None, *, allow_tf32: bool = False) -> list[Choice]:
    """Return the execution provider of each device.

    Args:
        provider: as for `choose`; without a number where `devices` are given.
        devices: numbers of the devices; by default the one that `provider` names.  On the CPU each stands for separate
            sessions and a separate bank.
        allow_tf32: as for `choose`.

    Raises:
        ProviderUnavailable: a number is given twice, or no such device works, or there are none, or the provider has
            one device only.
    """
    if devices is None:
        return [choose(provider, allow_tf32=allow_tf32)]
    numbers = list(devices)
    if not numbers or min(numbers) < 0 or len(set(numbers)) < len(numbers) or ":" in provider:
        raise ProviderUnavailable(
            "choose devices",
            expected="one number or more, each once, as 0 and 1, and a provider without a number",
            got=f"devices {numbers} of provider {provider!r}",
        )
    first = choose(provider, allow_tf32=allow_tf32)
    execution = first.execution
    if execution.divided:
        return [first for _ in numbers]
    if not execution.numbered:
        numbered = ", ".join(name for name, own in PROVIDERS.items() if own.numbered or own.divided)
        raise ProviderUnavailable(
            f"choose devices of {execution.label}",
            expected=f"a provider with several devices: {numbered}",
            got=f"devices {numbers} of provider {provider!r}",
            fix="Leave devices out.",
        )
    return [choose(f"{first.provider}:{number}", allow_tf32=allow_tf32) for number in numbers]
