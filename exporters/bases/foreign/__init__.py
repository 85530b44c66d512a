"""ONNX files that somebody else exported: which initializer is which weight, and the graph as if freshly exported.

An exporter may transpose, rename and merge weights, and fold a BatchNorm into a conv under the conv's own name.  Here
that is undone, with values as evidence, so that all else works on it as on a raw export.
"""
