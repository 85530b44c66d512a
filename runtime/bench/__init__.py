"""What serving a bundle costs on this machine, measured against plain ONNX Runtime in one process."""

from tpeft_deploy.runtime.bench.bundled import bench_bundle
from tpeft_deploy.runtime.bench.page import render
from tpeft_deploy.runtime.bench.results import Benchmark

__all__ = ["Benchmark", "bench_bundle", "render"]
