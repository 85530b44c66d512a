"""Readers of PEFT's low-rank methods with projections or vectors that layers share."""

from __future__ import annotations

import numpy as np

from tpeft_deploy.algebra import widen
from tpeft_deploy.errors import FormatError
from tpeft_deploy.formats.peft.config import (
    diagonal_delta,
    is_type,
    matrix_delta,
    number,
    stored_transposed,
    weight_shape,
)
from tpeft_deploy.formats.peft.dense import (
    Linear,
    dense_change,
    indices,
    linear_layer,
    no_projection,
    require_values,
    whole_number,
)
from tpeft_deploy.formats.read.module import Change, Checkpoint, Module
from tpeft_deploy.formats.reader import About, reader
from tpeft_deploy.tucker import Array

__all__ = ["read_randlora", "read_tinylora", "read_unilora", "read_vblora", "read_vera"]

_VERA_KINDS = {"VERA": "vera", "PVERA": "pvera"}


def _is_vera(module: Module) -> bool:
    """Whether a PEFT file of type VERA or PVERA has a vector for the module."""
    return any(
        is_type(module.checkpoint, kind) and f"{name}_lambda_d" in module.tensors for kind, name in _VERA_KINDS.items()
    )


@reader(
    "peft-vera",
    About(
        "PEFT",
        "VeRA, PVeRA",
        "linear, Conv1D",
        "yes",
        "low-rank",
        "saved with save_projection",
        types=("VERA", "PVERA"),
    ),
    {f"{kind}_lambda_{vector}" for kind in _VERA_KINDS.values() for vector in "bd"},
    matches=_is_vera,
    shared={f"base_model.{kind}_{letter}" for kind in _VERA_KINDS.values() for letter in "AB"},
)
def read_vera(module: Module) -> Change:
    """VeRA and PVeRA as PEFT saves them: two shared projections, and two vectors per layer (arXiv 2310.11454).

        dW = (b B[:O]) (d A[:, :I])        vera_lambda_b (O,), vera_lambda_d (r,)
                                           base_model.vera_A (r, I_max), base_model.vera_B (O_max, r)

    PVeRA samples the input of B in training, with mean and variance from the halves of A and d; in evaluation it uses
    the mean, that is the first half of A and d.

    Without save_projection the projections are regenerated from `projection_prng_key` with torch's generator, which
    according to PEFT is not accurate on all systems: such files are refused.
    """
    module.no_scale()
    kind = _VERA_KINDS[module.checkpoint.config["peft_type"]]
    outer, inner = module.take(f"{kind}_lambda_b"), module.take(f"{kind}_lambda_d")
    first, last = (_vera_projection(module, f"base_model.{kind}_{letter}") for letter in "AB")
    shape = module.base_array("weight", "VeRA's projections do not record a layer's inputs").shape
    with module.reporting():
        outputs = outer.size
        inputs = int(np.prod(shape)) // outputs
        fits = outer.ndim == 1 and first.ndim == last.ndim == 2 and len(shape) == 2 and outputs in shape
        if not fits or inputs > first.shape[1] or outputs > last.shape[0]:
            expected = f"projections at least as large as the weight {shape}, of {outputs} outputs"
            raise module.misfit(expected, f"{first.shape} and {last.shape}")
        if kind == "pvera":
            inner, first = inner[: len(inner) // 2], first[: len(first) // 2]
        transposed = stored_transposed(module, outputs, inputs)
        up, down = outer[:, None] * last[:outputs], first[:, :inputs]
        delta = diagonal_delta(up, inner, down, 1.0, transposed=transposed)
    return Change(deltas={f"{module.name}.weight": delta})


def _vera_projection(module: Module, key: str) -> Array:
    if key not in module.checkpoint.shared:
        raise no_projection(module, f"the shared projection {key}")
    return module.checkpoint.shared[key]


_TINYLORA_A, _TINYLORA_B, _TINYLORA_P = "tinylora_A", "tinylora_B", "tinylora_P"
_VECTOR = "base_model.tinylora_v."
_TINYLORA_NAME = "peft-tinylora"
_ORDER = f"{_TINYLORA_NAME} order"  # memo key: order of the targeted modules
_TINYLORA_KINDS = {"Linear", "NonDynamicallyQuantizableLinear", "Conv1D", "Embedding"}


@reader(
    _TINYLORA_NAME,
    About(
        "PEFT",
        "TinyLoRA",
        "linear, Conv1D, embedding",
        "for more than one group of layers",
        "low-rank",
        "the file must hold its projections",
        types=("TINYLORA",),
    ),
    {_TINYLORA_A, _TINYLORA_B, _TINYLORA_P},
    marks={_TINYLORA_A},
    shared={f"{_VECTOR}{group}" for group in range(10_000)},
)
def read_tinylora(module: Module) -> Change:
    """TinyLoRA as PEFT saves it: LoRA-XS with a small core that is a random projection of a few trained numbers.

        dW = B R A        R = sum_i v[i] P[i]

    tinylora_A (r, I), tinylora_B (O, r) and tinylora_P (u, r, r) are the module's; base_model.tinylora_v.<group> (u,)
    is shared by the modules of a group, which are consecutive in the model's order.  The file does not record a
    module's group: with several groups it follows from the base's order of the targeted modules.
    """
    module.no_scale()
    down, up = module.take(_TINYLORA_A), module.take(_TINYLORA_B)
    if _TINYLORA_P not in module.tensors:
        raise no_projection(module, f"the projections {_TINYLORA_P}")
    projections, vector = module.take(_TINYLORA_P), _tinylora_vector(module)
    with module.reporting():
        core = np.einsum("i,ijk->jk", vector, projections)
        transposed = stored_transposed(module, up.shape[0], down.shape[1])
        delta = matrix_delta(up, down, 1.0, transposed=transposed, core=core)
    return Change(deltas={f"{module.name}.weight": delta})


def _tinylora_vector(module: Module) -> Array:
    if _TINYLORA_NAME not in module.checkpoint.memo:
        module.checkpoint.memo[_TINYLORA_NAME] = sum(key.startswith(_VECTOR) for key in module.checkpoint.shared)
    groups: int = module.checkpoint.memo[_TINYLORA_NAME]
    group = 0 if groups == 1 else _tinylora_group(module, groups)
    vector = module.checkpoint.shared.get(f"{_VECTOR}{group}")
    if vector is None:
        raise FormatError(module.doing, expected=f"a shared tensor {_VECTOR}{group}", got=f"{groups} shared tensors")
    return vector


def _tinylora_group(module: Module, groups: int) -> int:
    """Group of the module, counted as in TinyLoraModel._create_and_replace."""
    if module.checkpoint.base is None:
        raise module.needs_base("which trained numbers a module has depends on the order of modules")
    if _ORDER not in module.checkpoint.memo:
        known = [
            name
            for name, kind in module.checkpoint.base.kinds.items()
            if kind in _TINYLORA_KINDS and _targets(module.checkpoint, name)
        ]
        module.checkpoint.memo[_ORDER] = {name: place for place, name in enumerate(known)}
    targeted: dict[str, int] = module.checkpoint.memo[_ORDER]
    expected = max(1, round(len(targeted) * (1 - number(module.checkpoint, "weight_tying"))))
    if module.name not in targeted or expected != groups or module.checkpoint.part:
        raise FormatError(
            module.doing,
            expected=f"{expected} groups for the {len(targeted)} targeted modules of {module.checkpoint.base.name}",
            got=f"{groups} shared tensors, so that the module's group is ambiguous",
            fix="Give base= as a torch module and whole, without part=, or train with weight_tying=1.",
        )
    return min(targeted[module.name] // max(1, len(targeted) // groups), groups - 1)


def _targets(checkpoint: Checkpoint, name: str) -> bool:
    targets = checkpoint.config.get("target_modules") or ()
    if isinstance(targets, str):
        return checkpoint.matcher("target_modules", whole=True).first(name) is not None
    return checkpoint.endings("target_modules").end_module(name)


_LAMBDA, _GAMMA = "randlora_lambda", "randlora_gamma"
_PROJECTIONS = ("randlora_A", "randlora_B")


@reader(
    "peft-randlora",
    About("PEFT", "RandLoRA", "linear, Conv1D", "yes", "dense", "saved with save_projection", types=("RANDLORA",)),
    {_LAMBDA, _GAMMA, *_PROJECTIONS},
    marks={_LAMBDA},
    shared={f"base_model.{name}" for name in _PROJECTIONS},
)
def read_randlora(module: Module) -> Change:
    """RandLoRA as PEFT saves it: a sum of random bases, scaled by trained numbers, of full rank (arXiv 2502.00987).

        dW = s sum_j b_j a_j^T, or its transpose if the layer has fewer outputs than inputs; s = alpha / r
        b_j: column j of randlora_B[:max, :n] (max, n, r), flattened to (max, n r)
        a_j: row j of lambda[:, :, None] A[:, :, :min] gamma (r, n, min), flattened to (r n, min)

    randlora_lambda (r, n) and randlora_gamma (n, min) are the module's; randlora_A (r, 1, min of all layers) and
    randlora_B (max of all layers, N, r) are shared, and repeated in the file for every module.  min and max are those
    of (O, I).

    Without save_projection PEFT regenerates A and B from `projection_prng_key`, in bfloat16 or float16 depending on the
    device: such files are refused.
    """
    module.no_scale()
    outer, inner = module.take(_LAMBDA), module.take(_GAMMA)
    small, large = (_randlora_projection(module, name) for name in _PROJECTIONS)
    layer = linear_layer(module, "RandLoRA's bases do not record the size of a layer")
    _randlora_check(module, layer, outer, inner, small, large)
    rank = number(module.checkpoint, "r")
    if rank != outer.shape[0]:
        raise module.misfit(f"tensors of rank {rank:g}, as in adapter_config.json", outer.shape[0])
    scale = number(module.checkpoint, "randlora_alpha") / rank
    with module.reporting():
        smallest, largest = sorted((layer.outputs, layer.inputs))
        scaled = outer[:, :, None].astype(np.float64) * small[:, :, :smallest] * inner
        bases = large[:largest, : inner.shape[0]].reshape(largest, -1)
        change = np.matmul(bases, scaled.reshape(-1, smallest)) * scale
        change = change.astype(widen(outer[:0]).dtype)
    return dense_change(module, change if layer.outputs == largest else change.T, transposed=layer.transposed)


def _randlora_check(module: Module, layer: Linear, outer: Array, inner: Array, small: Array, large: Array) -> None:
    smallest, largest = sorted((layer.outputs, layer.inputs))
    if outer.ndim == 2 and outer.size and small.ndim == large.ndim == 3:
        rank, bases = outer.shape
        if (
            bases == -(-smallest // rank)
            and inner.shape == (bases, smallest)
            and small.shape[:2] == (rank, 1)
            and small.shape[2] >= smallest
            and large.shape[0] >= largest
            and large.shape[1] >= bases
            and large.shape[2] == rank
        ):
            return
    raise module.misfit(
        f"scales (r, n) and (n, {smallest}) with n r at least {smallest}, and bases at least as large as the weight",
        f"{outer.shape} and {inner.shape}, {small.shape} and {large.shape}",
    )


def _randlora_projection(module: Module, name: str) -> Array:
    """The projection, from the module's copy or from the shared tensors, which are equal."""
    copies = [module.tensors.pop(name, None), module.checkpoint.shared.get(f"base_model.{name}")]
    found = [copy for copy in copies if copy is not None]
    if not found:
        raise no_projection(module, f"the shared projection base_model.{name}")
    if not np.array_equal(found[0], found[-1]):
        raise module.misfit(f"one {name} for all modules", "one that differs")
    return found[-1]


_NUMBERS = "base_model.unilora_theta_d"


@reader(
    "peft-unilora",
    About("PEFT", "Uni-LoRA", "linear, Conv1D", "no", "low-rank", "saved with save_indices", types=("UNILORA",)),
    {f"unilora_{what}_{letter}" for what in ("indices", "scales") for letter in "AB"},
    shared={_NUMBERS},
)
def read_unilora(module: Module) -> Change:
    """Uni-LoRA as PEFT saves it: LoRA with elements from a small set of trained numbers (arXiv 2506.00799).

        dW = B A        A = t[i_A] s_A, B = t[i_B] s_B, elementwise

    base_model.unilora_theta_d is t, for all layers; unilora_indices_A and unilora_scales_A (r, I), unilora_indices_B
    and unilora_scales_B (O, r) are the module's.  Without save_indices, the default in PEFT, the file has t alone, and
    the indices depend on the order in which PEFT visited the layers: `refusals` refuses such files.
    """
    module.no_scale()
    if _NUMBERS not in module.checkpoint.shared:
        raise FormatError(module.doing, expected=f"the shared tensor {_NUMBERS}", got="none")
    numbers = widen(module.checkpoint.shared[_NUMBERS].reshape(-1))
    down, up = (_unilora_factor(module, letter, numbers) for letter in "AB")
    if down.shape[0] != up.shape[1]:
        raise module.misfit("indices of one rank", f"{down.shape} and {up.shape}")
    transposed = stored_transposed(module, up.shape[0], down.shape[1])
    return Change(deltas={f"{module.name}.weight": matrix_delta(up, down, 1.0, transposed=transposed)})


def _unilora_factor(module: Module, letter: str, numbers: Array) -> Array:
    chosen = module.take(f"unilora_indices_{letter}")
    scales = module.take(f"unilora_scales_{letter}")
    require_values(module, scales=scales)
    if chosen.ndim != 2 or scales.shape != chosen.shape:
        raise module.misfit("a scale for each index of a matrix", f"{scales.shape} and {chosen.shape}")
    factor: Array = numbers[indices(module, chosen, numbers.size)] * scales
    return factor.astype(np.result_type(numbers, np.float32))


_BANK = "base_model.vblora_vector_bank"
_LOGITS = ("vblora_logits_A", "vblora_logits_B")
_INDICES, _WEIGHTS = "_topk_indices", "_topk_weights"
_RANK = 64  # ranks allowed in addition to the smaller side of a weight: tiny layers may have such ranks


@reader(
    "peft-vblora",
    About("PEFT", "VB-LoRA", "linear, Conv1D", "no", "low-rank", types=("VBLORA",)),
    {f"{logits}{part}" for logits in _LOGITS for part in ("", _INDICES, _WEIGHTS)},
    shared={_BANK},
)
def read_vblora(module: Module) -> Change:
    """VB-LoRA as PEFT saves it: factors composed of vectors from a bank that all layers share (arXiv 2405.15179).

        dW = B A        each part of L numbers of a row of A, or of a column of B, is sum_k w_k V[i_k]

    base_model.vblora_vector_bank is V (N, L).  i and w are the largest `topk` of vblora_logits_A (r, I / L, N) and
    vblora_logits_B (O / L, r, N), and their softmax; with save_only_topk_weights the file has *_topk_indices and
    *_topk_weights instead, without the last weight, as weights add up to 1.
    """
    module.no_scale()
    if _BANK not in module.checkpoint.shared:
        raise FormatError(module.doing, expected=f"the shared tensor {_BANK}", got="none")
    bank = widen(module.checkpoint.shared[_BANK])
    if bank.ndim != 2:
        raise module.misfit("a bank (N, L)", bank.shape)
    require_values(module, **{_BANK: bank})
    _vblora_check_sizes(module, bank.shape[1])
    first, last = (_vblora_parts(module, logits, bank) for logits in _LOGITS)  # (r, I/L, L), (O/L, r, L)
    if first.shape[0] != last.shape[1]:
        raise module.misfit("logits of one rank", f"{first.shape[0]} and {last.shape[1]}")
    down = first.reshape(first.shape[0], -1)
    up = np.swapaxes(last, 1, 2).reshape(-1, last.shape[1])
    transposed = stored_transposed(module, up.shape[0], down.shape[1])
    return Change(deltas={f"{module.name}.weight": matrix_delta(up, down, 1.0, transposed=transposed)})


def _vblora_check_sizes(module: Module, length: int) -> None:
    """Check logits against the weight, before they are expanded with the bank's vectors."""
    shape = weight_shape(f"{module.name}.weight", module.checkpoint)
    if shape is None:
        return
    first, last = (
        next((module.tensors[n].shape for n in (logits, f"{logits}{_INDICES}") if n in module.tensors), (0, 0, 0))
        for logits in _LOGITS
    )
    sizes = sorted((last[0] * length, first[1] * length)) if len(first) == len(last) == 3 else []
    if sizes != sorted(shape) or first[0] > max(_RANK, min(shape)):
        raise module.misfit(
            f"vectors of length {length} for a weight {shape}, of rank {max(_RANK, min(shape))} at most",
            f"logits {first} and {last}",
        )


def _vblora_parts(module: Module, logits: str, bank: Array) -> Array:
    """The weighted sums of vectors, (a, b, L)."""
    if logits in module.tensors:
        chosen, weights = _largest(module, module.take(logits), len(bank))
    else:
        chosen = module.take(f"{logits}{_INDICES}")
        saved = module.take(f"{logits}{_WEIGHTS}").astype(np.float64)
        require_values(module, **{f"{logits}{_INDICES}": chosen, _BANK: bank})
        count = whole_number(module.checkpoint, "topk")
        if chosen.ndim != 3 or chosen.shape[2] != count or saved.shape != (*chosen.shape[:2], chosen.shape[2] - 1):
            raise module.misfit(f"{count} indices, and one weight fewer", f"{saved.shape} and {chosen.shape}")
        weights = np.concatenate([saved, 1 - saved.sum(-1, keepdims=True)], axis=-1)
    chosen = indices(module, chosen, len(bank))
    if (np.diff(np.sort(chosen, axis=-1), axis=-1) == 0).any():
        raise module.misfit("distinct indices", "a duplicate")
    parts = np.zeros((*chosen.shape[:2], bank.shape[1]))
    for place in range(chosen.shape[2]):
        parts += weights[:, :, place, None] * bank[chosen[:, :, place]]
    return parts.astype(bank.dtype)


def _largest(module: Module, logits: Array, vectors: int) -> tuple[Array, Array]:
    """Indices of the largest logits, and their softmax."""
    require_values(module, logits=logits)
    count = whole_number(module.checkpoint, "topk")
    if logits.ndim != 3 or logits.shape[2] != vectors or not 0 < count <= vectors:
        raise module.misfit(f"logits of {vectors} vectors, and topk of 1 to as many", logits.shape)
    chosen = np.argpartition(logits, vectors - count, axis=-1)[..., vectors - count :]
    largest = np.take_along_axis(logits, chosen, axis=-1).astype(np.float64)
    powers = np.exp(largest - largest.max(axis=-1, keepdims=True))
    return chosen, powers / powers.sum(axis=-1, keepdims=True)
