"""From torch modules and adapters to ONNX: folded models and bundles.  Needs torch, onnx and onnxscript."""

from tpeft_deploy.errors import MissingExtra

try:
    import onnx_ir  # noqa: F401
    import onnxruntime  # noqa: F401
    import onnxscript  # noqa: F401
    import torch  # noqa: F401
except ImportError as error:
    raise MissingExtra(
        "load the exporters",
        expected="torch, onnx, onnxscript and onnxruntime to be installed",
        got=str(error),
        fix="pip install 'tpeft-deploy[export,cpu]', or [export,gpu] on a CUDA machine.",
    ) from error

from tpeft_deploy.exporters.bases.component import Component
from tpeft_deploy.exporters.bundle import export_bundle
from tpeft_deploy.exporters.folded import export_folded
from tpeft_deploy.exporters.verify import verify_bundle

__all__ = ["Component", "export_bundle", "export_folded", "verify_bundle"]
