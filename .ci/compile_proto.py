"""Write the modules of inference.proto; needs grpcio-tools, which installing and serving do not.

    python .ci/compile_proto.py [FOLDER]

The messages get a descriptor pool of their own: clients of the protocol register messages of the same full names in
the default one, and a process that holds both a server and a client would otherwise fail on import.
"""

import base64
import importlib.resources
import sys
import tempfile
import textwrap
from pathlib import Path

from google.protobuf import descriptor_pb2
from grpc_tools import protoc

PROTO = Path(__file__).parent.parent / "runtime" / "server" / "rpc" / "inference.proto"
MODULE = '''"""Messages of inference.proto, in a descriptor pool of their own; written by `make proto`, not by hand."""

import base64

from google.protobuf import descriptor_pool, message_factory

_POOL = descriptor_pool.DescriptorPool()
DESCRIPTOR = _POOL.AddSerializedFile(
    base64.b64decode(
        """
{descriptor}
"""
    )
)
_CLASSES = message_factory.GetMessageClassesForFiles(["{name}"], _POOL)

{classes}
'''


def compile_proto(folder: Path) -> None:
    """Write inference_pb2.py and inference_pb2.pyi into a folder."""
    with tempfile.TemporaryDirectory() as scratch:
        found = Path(scratch) / "descriptors"
        include = importlib.resources.files("grpc_tools") / "_proto"
        asked = [f"-I{PROTO.parent}", f"-I{include}", f"--pyi_out={folder}", f"--descriptor_set_out={found}"]
        if protoc.main(["protoc", *asked, PROTO.name]) != 0:
            raise SystemExit("protoc refused inference.proto")
        (file,) = descriptor_pb2.FileDescriptorSet.FromString(found.read_bytes()).file
    classes = "\n".join(f'{m.name} = _CLASSES["{file.package}.{m.name}"]' for m in file.message_type)
    text = "\n".join(textwrap.wrap(base64.b64encode(file.SerializeToString(deterministic=True)).decode(), 116))
    (folder / "inference_pb2.py").write_text(MODULE.format(descriptor=text, name=file.name, classes=classes))


if __name__ == "__main__":
    compile_proto(Path(sys.argv[1]) if len(sys.argv) > 1 else PROTO.parent)
