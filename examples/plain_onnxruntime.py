"""Run the factored form with ONNX Runtime alone, as an application in any of its languages can.

python plain_onnxruntime.py BUNDLE TASK
"""

import json
import sys
from pathlib import Path

import numpy as np
import onnxruntime

bundle, task = Path(sys.argv[1]), sys.argv[2]

options = onnxruntime.SessionOptions()
options.log_severity_level = 3  # otherwise one warning per optional input
session = onnxruntime.InferenceSession(bundle / "factored.onnx", options, providers=["CPUExecutionProvider"])

digest = (bundle / "adapters" / task / "current").read_text().strip()
adapter = onnxruntime.LoraAdapter()
adapter.Load(str(bundle / "adapters" / task / digest / "adapter.onnx_adapter"))
with_adapter = onnxruntime.RunOptions()
with_adapter.add_active_adapter(adapter)  # keep `adapter` alive as long as the options

feeds = {}
for port in json.loads((bundle / "manifest.json").read_text())["inputs"]:
    shape = [2 if isinstance(size, str) else size for size in port["shape"]]
    feeds[port["name"]] = np.zeros(shape, port["dtype"])
print("base:", session.run(None, feeds)[0])
print(f"{task}:", session.run(None, feeds, with_adapter)[0])
