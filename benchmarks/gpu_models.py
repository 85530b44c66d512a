"""What `benchmarks.gpu` carries to a CUDA machine: two bundles, and small graphs for single questions.

Needs torch, transformers and onnx; running them needs none of these.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
import torch
import transformers
from torch import nn

from tests.helpers.nets import adapter_for
from tpeft_deploy import Bundle, export_bundle

RANK = 8
LENGTH = 64
TYPES = {"f": "float", "i": "int64"}


def build(
    place: Path,
    *,
    layers: int = 6,
    width: int = 384,
    channels: int = 64,
    large: tuple[int, int] = (12, 768),
    wide: int = 2048,
) -> None:
    """Write all models.

    Args:
        place: directory, which must not have them yet.
        layers: layers of the small encoder.
        width: width of the small encoder, a multiple of 64.
        channels: channels of the conv net.
        large: layers and width of the large encoder.
        wide: width of an encoder of two layers.
    """
    encoder(place / "encoder", layers, width)
    encoder(place / "encoder_half", layers, width, dtype=torch.float16)
    encoder(place / "large", *large, tasks=("one",))
    encoder(place / "large_half", *large, tasks=("one",), dtype=torch.float16)
    encoder(place / "queries_half", *large, tasks=("one",), dtype=torch.float16, only=("query", "value"))
    encoder(place / "wide_half", 2, wide, tasks=("one",), dtype=torch.float16)
    convs(place / "convs", channels)
    graphs = place / "graphs"
    graphs.mkdir(parents=True)
    for name, text in (rank_graphs() | fold_graphs() | conv_graphs() | launch_graphs()).items():
        onnx.save(onnx.parser.parse_model(text), graphs / f"{name}.onnx")


def encoder(
    path: Path,
    layers: int,
    width: int,
    *,
    tasks: Sequence[str] = ("one", "two"),
    dtype: torch.dtype = torch.float32,
    only: Sequence[str] = ("",),
) -> Bundle:
    """A BERT with adapters on all its linear layers, or on those whose names end as one of `only`.

    All layers have equal weights, which the bundle stores once, and a wide layer repeats a block of numbers: it has to
    be carried to the other machine.
    """
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=500,
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=width // 64,
        intermediate_size=4 * width,
        max_position_embeddings=128,
    )
    module = transformers.BertForSequenceClassification(config).eval()
    first, *others = module.bert.encoder.layer
    for layer in others:
        layer.load_state_dict(first.state_dict())
    for part in module.bert.encoder.modules():
        if isinstance(part, nn.Linear) and width > 1024:
            block = part.weight.data[:256, :256]
            part.weight.data = block.repeat(part.out_features // 256, part.in_features // 256)
    module = module.to(dtype)
    linears = [name for name, part in module.bert.encoder.named_modules() if isinstance(part, nn.Linear)]
    names = [f"{name}.weight" for name in linears if name.endswith(tuple(only))]
    adapters = {
        task: adapter_for(module, {f"bert.encoder.{name}": (RANK, RANK) for name in names}, seed=seed)
        for seed, task in enumerate(tasks)
    }
    inputs = {"input_ids": torch.randint(0, 500, (2, 16)), "attention_mask": torch.ones(2, 16, dtype=torch.long)}
    shapes = {name: {0: "batch", 1: "sequence"} for name in inputs}
    # In 16 bits the last token of a small encoder changes nothing, so that its padding could not be proved.
    pads = dict.fromkeys(inputs, 0) if dtype == torch.float32 else {}
    return export_bundle(module, adapters, path, example_inputs=inputs, dynamic_shapes=shapes, padding=pads)


def convs(path: Path, channels: int) -> Bundle:
    """A stack of convs 3 x 3 with adapters, and a head."""
    torch.manual_seed(0)
    sizes = [3, *[channels] * 6]
    module = nn.Sequential(
        *[layer for i, o in itertools.pairwise(sizes) for layer in (nn.Conv2d(i, o, 3, padding=1), nn.ReLU())],
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(channels, 10),
    ).eval()
    ranks = {f"{2 * i}.weight": (RANK, RANK, 3, 3) for i in range(1, 6)}
    adapters = {task: adapter_for(module, ranks, seed=seed) for seed, task in enumerate(("one", "two"))}
    return export_bundle(module, adapters, path, example_inputs={"input": torch.randn(2, 3, 32, 32)})


def graph(inputs: dict[str, str], outputs: dict[str, str], nodes: str, domains: tuple[str, ...] = ()) -> str:
    """ONNX's text form; types as "f[A,B]" or "i[A]"."""

    def ports(named: dict[str, str]) -> str:
        return ", ".join(f"{TYPES[kind[0]]}{kind[1:]} {name}" for name, kind in named.items())

    imports = ", ".join(['"": 20', *(f'"{domain}": 1' for domain in domains)])
    return f"<ir_version: 9, opset_import: [{imports}]> g ({ports(inputs)}) => ({ports(outputs)}) {{{nodes}}}"


def rank_graphs() -> dict[str, str]:
    """y = x w plus a branch of rank R, which is given as 0 or 8, by every operator that our graphs end as."""
    linear = {"x": "f[N,64]", "w": "f[64,32]", "down": "f[64,R]", "up": "f[R,32]"}
    image = {"x": "f[N,16,8,8]", "w": "f[24,16,3,3]", "down": "f[R,16,1,1]", "core": "f[R,R,3,3]", "up": "f[24,R,1,1]"}
    banked = linear | {"x": "f[N,S,64]", "down": "f[T,64,R]", "up": "f[T,R,32]", "ids": "i[N]"}
    y, rows, images = {"y": "f[N,32]"}, {"y": "f[N,S,32]"}, {"y": "f[N,24,8,8]"}
    ones, threes = "<pads: ints = [0,0,0,0]>", "<pads: ints = [1,1,1,1]>"
    return {
        "rank_matmul": graph(linear, y, "a = MatMul(x, down) b = MatMul(a, up) c = MatMul(x, w) y = Add(c, b)"),
        "rank_gemm": graph(linear, y, "a = Gemm(x, down) c = Gemm(x, w) y = Gemm(a, up, c)"),
        "rank_fused": graph(
            linear,
            y,
            "a = com.microsoft.FusedMatMul<alpha: float = 1.0>(x, down)"
            "b = com.microsoft.FusedMatMul<alpha: float = 1.0>(a, up) c = MatMul(x, w) y = Add(c, b)",
            ("com.microsoft",),
        ),
        "rank_banked": graph(
            banked,
            rows,
            "d = Gather(down, ids) u = Gather(up, ids)a = MatMul(x, d) b = MatMul(a, u) c = MatMul(x, w) y = Add(c, b)",
        ),
        "rank_conv": graph(
            image,
            images,
            f"a = Conv{ones}(x, down) b = Conv{threes}(a, core) c = Conv{ones}(b, up)"
            f"d = Conv{threes}(x, w) y = Add(d, c)",
        ),
    }


def fold_graphs() -> dict[str, str]:
    """A model of eight products whose weights are fed, and the model that computes a fed weight."""
    weights = {f"w{i}": "f[512,512]" for i in range(8)}
    names = ["x", *(f"h{i}" for i in range(7)), "y"]
    nodes = " ".join(f"{names[i + 1]} = MatMul({names[i]}, w{i})" for i in range(8))
    sums = {f"v{i}": "f[512,512]" for i in range(8)}
    added = " ".join(f"d{i} = MatMul(down, up) v{i} = Add(w{i}, d{i})" for i in range(8))
    return {
        "fold_main": graph({"x": "f[N,512]", **weights}, {"y": "f[N,512]"}, nodes),
        "fold_fold": graph({"down": "f[512,R]", "up": "f[R,512]", **weights}, sums, added),
    }


def conv_graphs() -> dict[str, str]:
    """Six convs with constant weights (zeros would do as well), or with fed ones."""
    names = ["x", *(f"h{i}" for i in range(5)), "y"]
    pads = "<pads: ints = [1,1,1,1]>"
    nodes = " ".join(f"{names[i + 1]} = Conv{pads}({names[i]}, w{i})" for i in range(6))
    weights = {f"w{i}": "f[64,64,3,3]" for i in range(6)}
    filled = " ".join(f"w{i} = ConstantOfShape<value: tensor = float[1] {{0.01}}>(s)" for i in range(6))
    shape = "s = Constant<value_ints: ints = [64,64,3,3]>()"
    image = "f[N,64,32,32]"
    one = {"x": "f[N,C,32,32]", "w": "f[C,C,K,K]"}
    return {
        "conv_1": graph(one, {"y": "f[N,C,32,32]"}, "y = Conv(x, w)"),
        "conv_3": graph(one, {"y": "f[N,C,32,32]"}, f"y = Conv{pads}(x, w)"),
        "conv_fed": graph({"x": image, **weights}, {"y": image}, nodes),
        "conv_constant": graph({"x": image}, {"y": image}, f"{shape} {filled} {nodes}"),
    }


def launch_graphs(layers: int = 12, width: int = 384) -> dict[str, str]:
    """q, k and v of every layer: as one base, with two or three products each, or with their down-products packed."""
    weights = {f"w{i}{p}": f"f[{width},{width}]" for i in range(layers) for p in "qkv"}
    downs = {f"d{i}{p}": f"f[{width},R]" for i in range(layers) for p in "qkv"}
    ups = {f"u{i}{p}": f"f[R,{width}]" for i in range(layers) for p in "qkv"}
    cores = {f"c{i}{p}": "f[R,R]" for i in range(layers) for p in "qkv"}
    packed = {f"d{i}": f"f[{width},P]" for i in range(layers)}
    forms: dict[str, dict[str, str]] = {
        "base": weights,
        "two": weights | downs | ups,
        "three": weights | downs | cores | ups,
        "packed": weights | packed | ups,
    }
    return {f"launch_{form}": _launch(form, layers, width, fed) for form, fed in forms.items()}


def _launch(form: str, layers: int, width: int, fed: dict[str, str]) -> str:
    nodes, x = [], "x"
    for i in range(layers):
        if form == "packed":
            nodes.append(f"a{i} = MatMul({x}, d{i})")
            nodes.append(f"b{i}q, b{i}k, b{i}v = Split<axis: int = -1, num_outputs: int = 3>(a{i})")
        for p in "qkv":
            own = f"{i}{p}"
            base = f"y{own}" if form == "base" else f"p{own}"
            nodes.append(f"{base} = MatMul({x}, w{own})")
            if form in ("two", "three"):
                nodes.append(f"{'b' if form == 'two' else 'e'}{own} = MatMul({x}, d{own})")
            if form == "three":
                nodes.append(f"b{own} = MatMul(e{own}, c{own})")
            if form != "base":
                nodes.append(f"t{own} = MatMul(b{own}, u{own}) y{own} = Add(p{own}, t{own})")
        last = "y" if i == layers - 1 else f"x{i}"
        nodes.append(f"m{i} = Add(y{i}q, y{i}k) n{i} = Add(m{i}, y{i}v) {last} = Tanh(n{i})")
        x = last
    return graph({"x": f"f[N,{width}]", **fed}, {"y": f"f[N,{width}]"}, " ".join(nodes))


def largest(place: Path) -> tuple[Path, int]:
    """The largest file of what was built, and the bytes of all."""
    files = [file for file in place.rglob("*") if file.is_file()]
    return max(files, key=lambda file: file.stat().st_size), int(np.sum([file.stat().st_size for file in files]))
