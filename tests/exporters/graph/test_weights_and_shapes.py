from __future__ import annotations

from collections.abc import Iterable, Iterator

import onnx
import onnx.checker
import onnx.inliner

from tpeft_deploy import Bundle


def _domains(nodes: Iterable[onnx.NodeProto]) -> Iterator[str]:
    for node in nodes:
        yield node.domain
        for attribute in node.attribute:
            for graph in (attribute.g, *attribute.graphs):
                yield from _domains(graph.node)


def test_every_form_imports_the_domains_that_it_uses(conv_bundle: Bundle) -> None:
    """Also those of its functions: what inlines a function leaves its operators in the model's graph."""
    files = sorted(conv_bundle.path.rglob("*.onnx"))
    assert {"base.onnx", "factored.onnx", "banked.onnx", "banked.cuda.onnx", "two.onnx"} <= {
        file.name for file in files
    }
    used = set[str]()
    for file in files:
        onnx.checker.check_model(str(file))
        model = onnx.load(file, load_external_data=False)
        parts = (model.graph, *model.functions)
        domains = {domain for part in parts for domain in _domains(part.node)}
        assert domains <= {opset.domain for opset in model.opset_import}, file.name
        inlined = onnx.inliner.inline_local_functions(model)
        assert set(_domains(inlined.graph.node)) <= {opset.domain for opset in inlined.opset_import}, file.name
        used |= domains
    assert {"", "com.microsoft", "tpeft"} <= used
