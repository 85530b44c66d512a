"""Adapters of a replica by digest."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from tests.helpers import nets
from tpeft_deploy import Bundle, Runtime
from tpeft_deploy.runtime.cluster.adapter_files import AdapterNames
from tpeft_deploy.runtime.cluster.wire import digest_of, local_name
from tpeft_deploy.runtime.server.registry.files.blobs import Blobs

PIXELS = np.zeros((1, 1, 12, 14), np.float32)


def test_the_runtime_knows_what_was_named_last_and_what_is_pinned(conv_bundle: Bundle, tmp_path: Path) -> None:
    blobs = Blobs(tmp_path)
    names = []
    for seed in range(4):
        adapter = nets.adapter_for(nets.conv_net()[0], {"up.weight": (2, 2)}, seed=seed)
        names.append(local_name(blobs.write(adapter.to_bytes())))
    assert len({digest_of(name) for name in names}) == 4
    with Runtime(conv_bundle.path, provider="cpu", threads=1, preload=False) as runtime:
        own = AdapterNames(runtime, blobs.read, most=2)
        own.know([names[0], "two", "base"])
        runtime.pin(names[0])
        for name in names[1:]:
            own.know([name])
            runtime.run({"pixels": PIXELS}, name)
        assert {*runtime.tasks} >= {names[0], names[3]}
        assert not {*runtime.tasks} & {names[1], names[2]}
        assert [name for name, _ in own.last(10)] == [names[0], names[3]]
        own.know_task({names[1]: 0.5, names[3]: 0.5})
        assert names[1] in runtime.tasks
