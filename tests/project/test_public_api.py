import importlib

import pytest

import tpeft_deploy

DOCUMENTED = {
    "tpeft_deploy": [
        "Adapter",
        "AsyncClient",
        "Bundle",
        "Client",
        "Component",
        "Runtime",
        "Sampling",
        "TpeftError",
        "TuckerDelta",
        "export_bundle",
        "export_folded",
        "load_adapter",
        "verify_bundle",
    ],
    "tpeft_deploy.client": ["AsyncClient", "Client"],
    "tpeft_deploy.exporters": ["Component", "export_bundle", "export_folded", "verify_bundle"],
    "tpeft_deploy.runtime": ["Limits", "Runtime", "Source"],
    "tpeft_deploy.training": [
        "PEFT_TYPE",
        "TuckerConfig",
        "TuckerConv",
        "TuckerConvTranspose",
        "TuckerEmbedding",
        "TuckerLayer",
        "TuckerLinear",
        "TuckerModel",
        "TuckerTransposedLinear",
    ],
}


@pytest.mark.parametrize("module", DOCUMENTED)
def test_the_public_names_are_exactly_the_documented_ones(module: str) -> None:
    found = importlib.import_module(module)
    assert sorted(found.__all__) == DOCUMENTED[module]
    for name in found.__all__:
        assert getattr(getattr(found, name), "__name__", name) == name


def test_the_root_offers_nothing_else() -> None:
    assert dir(tpeft_deploy) == sorted([*DOCUMENTED["tpeft_deploy"], "__version__"])
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        tpeft_deploy.nothing  # noqa: B018
