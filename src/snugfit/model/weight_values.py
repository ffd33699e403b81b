"""Values of stored weights, some output features at a time: magnitudes, scales, and distances to another weight.

Sums are fp64, so that they do not depend on how a weight is cut.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from snugfit.dialects.dialect import GLOBAL_SCALES, Dialect
from snugfit.formats.grids import powers_of_two
from snugfit.formats.quantized_weight import dequantize
from snugfit.formats.spec import TensorFormat
from snugfit.model.assemble import OUTPUTS, read_single
from snugfit.model.logical_weights import LogicalWeights
from snugfit.storage.checkpoint import Checkpoint, read_range, read_tensor
from snugfit.storage.safetensors_header import StoredTensor, dtype_of

_WHOLE = frozenset({*GLOBAL_SCALES, "weight_shape", "weight_g_idx"})  # they concern all output features
# rows that are looked for in another weight: their number, the cosine of equal ones, the share that must be found
_PROBES, _ALIKE, _MOST = 32, 0.9, 0.9

Slices = Iterator[Tensor]  # fp32 [some out_features, K], in order


@dataclass(frozen=True, kw_only=True)
class ScaleValues:
    """What a tensor of scales holds: numbers of its values of some kinds."""

    elements: int
    not_finite: int
    zeros: int
    negative: int
    ones: int


@dataclass(frozen=True, kw_only=True)
class Magnitudes:
    """Largest magnitude of a weight; `finite` False where some value is not."""

    amax: float
    finite: bool


def read_scales(checkpoint: Checkpoint, name: str) -> ScaleValues:
    """The values of a tensor of scales; plain bytes are exponents (E8M0)."""
    stored = read_tensor(checkpoint, name)
    exponents = checkpoint.tensors[name].dtype in ("U8", "F8_E8M0")
    values = powers_of_two(stored) if exponents else stored.float()
    return ScaleValues(
        elements=values.numel(),
        not_finite=int((~values.isfinite()).sum()),
        zeros=int((values == 0).sum()),
        negative=int((values < 0).sum()),
        ones=int((values == 1).sum()),
    )


def stored_slices(
    checkpoint: Checkpoint, dialect: Dialect, module: str, fmt: TensorFormat, suffixes: Iterable[str]
) -> Slices:
    """The dequantized weight of a module that the file stores as codes; scales are taken as they are, NaN too."""
    parts = {suffix: checkpoint.tensors[f"{module}.{suffix}"] for suffix in suffixes}
    codes = next(iter(parts.values()))
    block = 1 if fmt.weight_block is None else fmt.weight_block[0]
    step = max(1, OUTPUTS // block) * block
    assert dialect.file_format is not None
    for start in range(0, codes.shape[0], step):
        stop = min(start + step, codes.shape[0])
        found = {
            suffix: _cut(checkpoint, suffix, part, codes.shape[0], block, start, stop) for suffix, part in parts.items()
        }
        if "weight_shape" in found:
            found["weight_shape"] = torch.tensor([stop - start, int(found["weight_shape"].flatten()[1])])
        quantized, _ = dialect.file_format.decode(fmt, found)
        yield dequantize(quantized)


def _cut(
    checkpoint: Checkpoint, suffix: str, part: StoredTensor, rows: int, block: int, start: int, stop: int
) -> Tensor:
    """What a slice of output features needs of one of a module's tensors, whose scales are of `block` features."""
    side = part.shape[0] if part.shape else 1
    if suffix in _WHOLE or side == 1 < rows or not part.shape:
        return read_tensor(checkpoint, part.name)
    ratio = block if suffix in ("weight_scale", "weight_scale_inv") else 1
    if suffix == "weight_zero_point":  # packed along the outputs
        ratio = 1 << (-(-rows // side) - 1).bit_length()
    return _read_rows(checkpoint, part, start // ratio, -(-stop // ratio))


def _read_rows(checkpoint: Checkpoint, tensor: StoredTensor, start: int, stop: int) -> Tensor:
    """Entries `start` to `stop` along the first axis of a tensor of the file."""
    row = tensor.bytes // max(1, tensor.shape[0])
    buffer = torch.empty(row * (stop - start), dtype=torch.uint8)
    read_range(checkpoint, tensor, row * start, memoryview(buffer.numpy()))  # type: ignore[arg-type]
    return buffer.view(dtype_of(tensor)).view(stop - start, *tensor.shape[1:])


def plain_slices(checkpoint: Checkpoint, name: str) -> Slices:
    """A plain tensor of the file as fp32 [rows, everything else]."""
    tensor = checkpoint.tensors[name]
    if not tensor.shape:
        yield read_tensor(checkpoint, name).reshape(1, 1).float()
        return
    rows = tensor.shape[0]
    width = max(1, tensor.elements // max(1, rows))
    step = max(1, OUTPUTS * 8192 // width)
    for start in range(0, rows, step):
        yield _read_rows(checkpoint, tensor, start, min(start + step, rows)).reshape(-1, width).float()


def logical_slices(weights: LogicalWeights, name: str) -> Slices:
    """A logical weight: dequantized where the file stores codes, cut out of a tensor of all experts."""
    origin = weights.origins.get(name)
    if origin is None:
        return plain_slices(weights.checkpoint, name)
    if origin.part is not None or origin.format is None:
        return iter([read_single(weights, name).float()])
    module = name.removesuffix(".weight")
    return stored_slices(weights.checkpoint, weights.dialect, module, origin.format, origin.parts)


def magnitudes(slices: Slices) -> Magnitudes:
    """The largest magnitude of the finite values."""
    largest, finite = 0.0, True
    for part in slices:
        sound = part.isfinite()
        if not bool(sound.all()):
            finite = False
            part = torch.where(sound, part, 0.0)  # noqa: PLW2901
        largest = max(largest, float(part.abs().max())) if part.numel() else largest
    return Magnitudes(amax=largest, finite=finite)


@dataclass(frozen=True, kw_only=True)
class Distance:
    """How far a weight A is from B of the same shape.

    `plain` is |A - B| / |B|. The others are what is left, relative to |A|, where B may be multiplied by one number
    (`scaled`, by `gain`), by one for each input feature (`columns`), by one for each output feature (`rows`), or both
    (`both`): least squares, the rows' after the columns'.
    """

    plain: float
    scaled: float
    gain: float
    columns: float
    rows: float
    both: float


def distance(first: Callable[[], Slices], second: Callable[[], Slices], *, within: float) -> Distance:
    """The distance of A (`first`) to B, each read anew by a call; ValueError for weights of unlike shapes.

    What may be multiplied is only looked at where `plain` is beyond `within`.
    """
    apart = rows_left = 0.0
    sums: list[Tensor] = []
    for a32, b32 in _aligned(first(), second()):
        a, b = a32.double(), b32.double()
        apart += float((a - b).square().sum())
        squares = a.square(), a * b, b.square()
        rows_left += float(_left(*(part.sum(1) for part in squares)))
        columns = [part.sum(0) for part in squares]
        sums = columns if not sums else [old + new for old, new in zip(sums, columns, strict=True)]
    if not sums:
        return Distance(plain=0.0, scaled=0.0, gain=1.0, columns=0.0, rows=0.0, both=0.0)
    aa, ab, bb = (float(part.sum()) for part in sums)
    plain = math.sqrt(apart / bb) if bb else (0.0 if not aa else math.inf)
    both = 0.0
    if not plain <= within:
        gains = torch.where(sums[2] > 0, sums[1] / sums[2], 1.0)
        left = 0.0
        for a32, b32 in _aligned(first(), second()):
            a, b = a32.double(), b32.double() * gains
            left += float(_left(a.square().sum(1), (a * b).sum(1), b.square().sum(1)))
        both = _relative(left, aa)
    return Distance(
        plain=plain,
        scaled=_relative(aa - (ab * ab / bb if bb else 0.0), aa),
        gain=ab / bb if bb else math.nan,
        columns=_relative(float(_left(*sums)), aa),
        rows=_relative(rows_left, aa),
        both=both,
    )


def permuted_rows(first: Slices, second: Slices) -> bool:
    """Whether rows of A are rows of B at other places: some rows of A are looked for in all of B."""
    rows = torch.cat(list(first))
    places = torch.linspace(0, len(rows) - 1, min(_PROBES, len(rows))).long()
    probes = torch.nn.functional.normalize(rows[places], dim=1)
    best, found = torch.full((len(places),), -1.0), torch.full((len(places),), -1)
    start = 0
    for part in second:
        likeness = probes @ torch.nn.functional.normalize(part, dim=1).t()
        values, where = likeness.max(1)
        found = torch.where(values > best, where + start, found)
        best = torch.maximum(best, values)
        start += len(part)
    alike = best > _ALIKE
    return bool(alike.double().mean() >= _MOST) and bool((found[alike] != places[alike]).any())


def _left(aa: Tensor, ab: Tensor, bb: Tensor) -> Tensor:
    """What is left of squares where each entry may have a gain of its own."""
    return (aa - torch.where(bb > 0, ab.square() / bb, 0.0)).clamp(min=0).sum()


def _relative(left: float, whole: float) -> float:
    return math.sqrt(max(0.0, left) / whole) if whole else 0.0


def _aligned(first: Slices, second: Slices) -> Iterator[tuple[Tensor, Tensor]]:
    """Parts of both with the same rows, however each is cut."""
    right = torch.zeros(0)
    for part in first:
        left = part
        while len(left):
            right = right if len(right) else next(second, torch.zeros(0))
            rows = min(len(left), len(right))
            if not rows or left.shape[1:] != right.shape[1:]:
                raise ValueError("weights of different shapes")
            yield left[:rows], right[:rows]
            left, right = left[rows:], right[rows:]


def scalars(checkpoint: Checkpoint, names: Iterable[str]) -> Mapping[str, float]:
    """The values of tensors of one number each, in any float dtype."""
    return {name: float(read_tensor(checkpoint, name)) for name in names}
