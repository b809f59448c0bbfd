"""Products and decoder layers of decoding steps on a CPU: the Python side of cpu_products.h and cpu_layers.h.

The source is compiled once for each processor, with the installed C++ compiler, into the cache folder. Without a
compiler, or with FIRP_CPU_KERNELS=0, decoding uses torch's operations. float32 only.

Shapes: M rows, K inputs, N outputs, B sequences, R rows, d hidden size, Hq query heads, Hk key/value heads, D head
size, S slots.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import mmap
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from ctypes import POINTER, c_float, c_int, c_int64, c_void_p
from functools import cache
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from firp_cli.files import cache_folder
from firp_cli.machine import processor_name

SOURCE = Path(__file__).with_suffix(".cpp")
HEADERS = ("cpu_products.h", "cpu_layers.h", "cpu_coupling.h", "cpu_decoding.h")
COMPILERS = ("c++", "g++", "clang++")  # $CXX comes first
FLAGS = ("-O3", "-march=native", "-fopenmp", "-fPIC", "-std=c++17")
FLAGS_X86 = ("-mprefer-vector-width=512",)
COMPILE_SECONDS = 120.0
SWITCH = "FIRP_CPU_KERNELS"
MOST_ROWS = 256  # above, torch's own products are as fast
MOST_BYTES = 2 << 30  # of packed copies in one process
MOST_HEAD = 512  # values of a head
HUGE_PAGE, BLOCK_BYTES = 2 << 20, 64 << 20
ALIGNMENT = 16  # floats of a cache line


class CompileError(Exception):
    """Reason why this machine has no kernels."""


@cache
def compiled() -> ctypes.CDLL:
    """Return the compiled source; the first call on a machine compiles it. Raises CompileError."""
    return load()


def load(extra: Sequence[str] = ()) -> ctypes.CDLL:
    """Load the kernels, and compile them unless they are in the cache. Raises CompileError.

    Args:
        extra: more flags for the compiler.
    """
    if os.environ.get(SWITCH) == "0":
        raise CompileError(f"{SWITCH}=0")
    path, flags = _place(extra)
    try:
        if not path.exists():
            _compile(path, flags)
        library = ctypes.CDLL(str(path))
    except OSError as error:
        raise CompileError(str(error)) from error
    library.firp_lanes.restype = c_int64
    library.firp_product.argtypes = [POINTER(Matrix), c_void_p, c_int64, c_void_p, c_int]
    library.firp_before.argtypes = library.firp_after.argtypes = [POINTER(_Layer), POINTER(_Step), c_int]
    library.firp_layers.argtypes = [POINTER(POINTER(_Layer)), c_int64, POINTER(_Step), c_int64, c_int]
    for function in (library.firp_product, library.firp_before, library.firp_after, library.firp_layers):
        function.restype = None
    return library


def to_be_compiled() -> bool:
    """Return True where the first use compiles, for some seconds."""
    return os.environ.get(SWITCH) != "0" and not _place()[0].exists() and _compiler() is not None


def _place(extra: Sequence[str] = ()) -> tuple[Path, tuple[str, ...]]:
    """Return the file of this processor's kernels, and the compiler's flags for them."""
    machine = platform.machine()
    flags = (*FLAGS, *(FLAGS_X86 if machine.lower() in ("x86_64", "amd64") else ()), *extra)
    sources = (path.read_text(encoding="utf-8") for path in (SOURCE, *map(SOURCE.with_name, HEADERS)))
    parts = (*sources, *flags, machine, processor_name(), _instructions())
    key = hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]
    return cache_folder() / "kernels" / f"cpu-{key}.so", flags


def _instructions() -> str:
    """Return this processor's instruction sets, where the system lists them: two processors of one name may differ, as
    virtual ones do.
    """
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:
        return ""
    return next((line for line in lines if line.startswith(("flags", "Features"))), "")


def _compiler() -> str | None:
    names = [name for name in (os.environ.get("CXX"), *COMPILERS) if name]
    return next((found for name in names if (found := shutil.which(name))), None)


def _compile(path: Path, flags: Sequence[str]) -> None:
    """Compile to `path` and rename into place: several processes may compile at once. Raises CompileError, OSError."""
    compiler = _compiler()
    if compiler is None:
        raise CompileError("no C++ compiler is installed (g++ or clang++)")
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        # OpenMP is not linked: its symbols come from the library that torch has loaded, so that both share threads
        steps = ([*flags, "-c", str(SOURCE), "-o", "kernels.o"], ["-shared", "kernels.o", "-o", "kernels.so"])
        for arguments in steps:
            try:
                done = subprocess.run(
                    [compiler, *arguments],
                    cwd=folder,
                    capture_output=True,
                    text=True,
                    timeout=COMPILE_SECONDS,
                    check=False,
                )
            except subprocess.TimeoutExpired as error:
                raise CompileError(f"{compiler} took more than {COMPILE_SECONDS:.0f} s") from error
            if done.returncode:
                raise CompileError(f"{compiler}: {(done.stderr.strip().splitlines() or ['no message'])[0]}")
        Path(folder, "kernels.so").replace(path)


@cache
def missing() -> str | None:
    """Return the reason why this machine has no kernels, or None."""
    try:
        compiled()
    except CompileError as error:
        return str(error)
    return None


class Matrix(ctypes.Structure):
    """A packed matrix as the kernels read it."""

    _fields_ = [
        *((name, c_void_p) for name in ("panels", "bias")),
        *((name, c_int64) for name in ("outputs", "inputs", "half")),
    ]


class _Layer(ctypes.Structure):
    _fields_ = [
        *((name, Matrix) for name in ("joined", "output", "gates", "down")),
        *((name, c_void_p) for name in ("first_norm", "second_norm", "query_norm", "key_norm")),
        *((f"{name}_epsilon", c_float) for name in ("first", "second", "query", "key")),
        ("scaling", c_float),
        *((name, c_int64) for name in ("size", "query_heads", "key_heads", "head")),
    ]


class _Step(ctypes.Structure):
    _fields_ = [
        *((name, c_int64) for name in ("batch", "rows", "slots")),
        *((name, c_void_p) for name in ("hidden", "cosine", "sine", "mask")),
        *((name, c_void_p) for name in ("queries", "own_keys", "own_values", "output", "keys", "values")),
        *((name, c_int64) for name in ("angle_sequence", "angle_row", "mask_sequence", "mask_row")),
        *((f"own_{name}", c_int64) for name in ("sequence", "head", "row")),
        *((f"key_{name}", c_int64) for name in ("sequence", "head", "row")),
    ]


class _Memory:
    """Memory for packed matrices in huge pages, where the system has them. A decoding step reads all of it, and with
    small pages the processor spends a third of that time on address translation.
    """

    left: Tensor = torch.empty(0)  # rest of the last block; matrices are cut from its beginning

    @classmethod
    def take(cls, count: int) -> Tensor:
        """Return memory for (count,) float32, aligned to a cache line."""
        size = -(-count // ALIGNMENT) * ALIGNMENT
        with torch.inference_mode(False):  # matrices packed outside of inference mode share the block
            if size > len(cls.left):
                pages = mmap.mmap(
                    -1, max(4 * size, BLOCK_BYTES) + HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
                )
                if hasattr(mmap, "MADV_HUGEPAGE"):
                    with contextlib.suppress(OSError):
                        pages.madvise(mmap.MADV_HUGEPAGE)
                whole = torch.frombuffer(pages, dtype=torch.float32)
                cls.left = whole[-whole.data_ptr() % HUGE_PAGE // 4 :]
            taken, cls.left = cls.left[:count], cls.left[size:]
        return taken


class Copy:
    """Copy of a matrix beside its weights. Counts the bytes of all copies."""

    _counted: ClassVar[list[int]] = [0]  # bytes of all; a list, which `self` still reaches when the interpreter ends

    def __init__(self, size: int) -> None:
        self.bytes = size
        self._counted[0] += size

    def __del__(self) -> None:
        self._counted[0] -= getattr(self, "bytes", 0)

    @classmethod
    def total(cls) -> int:
        """Return the bytes of all copies."""
        return cls._counted[0]

    @classmethod
    def fits(cls, size: int) -> bool:
        """Return True where another copy of `size` bytes stays within the limit."""
        return cls.total() + size <= MOST_BYTES


class PackedMatrix(Copy):
    """Copy of a float32 matrix (N, K) in the order in which the kernels read, with its bias (N,).

    Args:
        paired: the matrix is a feed-forward's gate (N, K) above its up (N, K). half: keep it rounded to bfloat16. Rows,
            sums and products stay float32, so a matrix of bfloat16 values has the same products as in float32.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None = None, paired: bool = False, half: bool = False) -> None:
        super().__init__(weight.nbytes // 2 if half else weight.nbytes)
        lanes, halves = compiled().firp_lanes(), 2 if paired else 1
        self.outputs, self.inputs = weight.shape[0] // halves, weight.shape[1]
        panels = -(-self.outputs // lanes)

        def pack(values: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
            padding = (0, 0, 0, panels * lanes - self.outputs)
            parts = functional.pad(values.detach().view(halves, self.outputs, -1), padding)
            ordered = parts.view(halves, panels, lanes, -1).permute(1, 0, 3, 2)
            memory = _Memory.take(-(-ordered.numel() * dtype.itemsize // 4)).view(dtype)[: ordered.numel()]
            return memory.view(ordered.shape).copy_(ordered)

        self._panels = pack(weight, torch.bfloat16 if half else torch.float32)
        self._bias = None if bias is None else pack(bias)
        bias_address = None if self._bias is None else self._bias.data_ptr()
        self.own = Matrix(self._panels.data_ptr(), bias_address, self.outputs, self.inputs, half)

    def __call__(self, rows: Tensor) -> Tensor:
        """Return the product (..., N) of rows (..., K)."""
        rows = rows.contiguous()
        product = rows.new_empty(*rows.shape[:-1], self.outputs)
        count = rows.numel() // self.inputs
        if count:
            compiled().firp_product(self.own, rows.data_ptr(), count, product.data_ptr(), torch.get_num_threads())
        return product


Weights = tuple[Tensor, Tensor | None]  # a matrix and its bias
Norm = tuple[Tensor, float]  # an RMS norm's weight and epsilon


class PackedLayer:
    """Decoder layer in two kernels: norm, attention, norm and feed-forward gated by silu, with residuals.

    Args:
        matrices: queries, keys and values joined; attention's output; gate above up; down.
        norms: before attention and before the feed-forward; of queries and of keys, if they have norms.
        heads: numbers of query and of key heads, and the head size. scaling: factor of the scores.
    """

    def __init__(
        self, matrices: Sequence[Weights], norms: Sequence[Norm], heads: tuple[int, int, int], scaling: float
    ) -> None:
        self._matrices = [PackedMatrix(*each, paired=number == 2) for number, each in enumerate(matrices)]
        self._norms = [weight for weight, _ in norms]  # keeps the memory that the kernels read
        weights = [weight.data_ptr() for weight in self._norms] + [None] * (4 - len(norms))
        epsilons = [epsilon for _, epsilon in norms] + [0.0] * (4 - len(norms))
        matrix_pointers = (matrix.own for matrix in self._matrices)
        self.own = _Layer(*matrix_pointers, *weights, *epsilons, scaling, len(self._norms[0]), *heads)

    @staticmethod
    def serves(weight: Tensor, head_size: int, bytes_needed: int) -> bool:
        """Return True where kernels serve layers of such matrices, and copies of them stay within the limit."""
        return (
            weight.device.type == "cpu"
            and weight.dtype == torch.float32
            and missing() is None
            and head_size <= MOST_HEAD
            and Copy.fits(bytes_needed)
        )

    def __call__(
        self,
        hidden: Tensor,
        rotary: Sequence[Tensor],
        mask: Tensor | None,
        seen: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]],
    ) -> Tensor:
        """Return the layer's output (B, R, d) of rows (B, R, d).

        Args:
            rotary: cosine and sine (B or 1, R, 1, D), the sine's first half negated.
            mask: additive (B or 1, 1, R, S).
            seen: takes the rows' keys and values (B, Hk, R, D) and returns those in view, (B, Hk, S, D).
        """
        batch, rows, _ = hidden.shape
        keys, values = hidden.new_empty(2, batch, self.own.key_heads, rows, self.own.head)
        step = _Rows(self, hidden, rotary, (keys, values))
        compiled().firp_before(self.own, step.own, step.threads)
        step.see(seen(keys, values), mask)
        compiled().firp_after(self.own, step.own, step.threads)
        return step.output


class PackedLayers:
    """Consecutive layers in one call: between two layers only the kernels use the processor's caches."""

    def __init__(self, layers: Sequence[PackedLayer]) -> None:
        self._layers = list(layers)
        self._pointers = (POINTER(_Layer) * len(layers))(*(ctypes.pointer(layer.own) for layer in layers))

    def __call__(
        self,
        hidden: Tensor,
        rotary: Sequence[Tensor],
        mask: Tensor | None,
        written: tuple[Tensor, Tensor],
        seen: tuple[Tensor, Tensor],
        stride: int,
    ) -> Tensor:
        """Return the last layer's output of rows (B, R, d). `rotary`, `mask`: see `PackedLayer.__call__`.

        Args:
            written: slots for the first layer's keys and values (B, Hk, R, D), among those `seen`, (B, Hk, S, D).
            stride: floats from a layer's keys and values to the next one's.
        """
        step = _Rows(self._layers[0], hidden, rotary, written)
        step.see(seen, mask)
        compiled().firp_layers(self._pointers, len(self._layers), step.own, stride, step.threads)
        return step.output


class _Rows:
    """Rows of a decoding step as the kernels read them, and their output."""

    def __init__(
        self, layer: PackedLayer, hidden: Tensor, rotary: Sequence[Tensor], places: tuple[Tensor, Tensor]
    ) -> None:
        self.threads = torch.get_num_threads()
        self._hidden = hidden = hidden.contiguous()  # keeps the memory that the kernels use
        self._queries = hidden.new_empty(*hidden.shape[:2], layer.own.query_heads * layer.own.head)
        self.output = torch.empty_like(hidden)
        (cosine, sine), (own_keys, own_values), angles = rotary, places, rotary[0].stride()
        assert sine.stride() == angles and own_values.stride() == own_keys.stride() and angles[3] == 1
        self.own = own = _Step(*hidden.shape[:2])
        own.hidden, own.cosine, own.sine = hidden.data_ptr(), cosine.data_ptr(), sine.data_ptr()
        own.queries, own.output = self._queries.data_ptr(), self.output.data_ptr()
        own.angle_sequence, own.angle_row = angles[0] if cosine.shape[0] > 1 else 0, angles[1]
        own.own_keys, own.own_values = own_keys.data_ptr(), own_values.data_ptr()
        own.own_sequence, own.own_head, own.own_row, _ = own_keys.stride()

    def see(self, seen: tuple[Tensor, Tensor], mask: Tensor | None) -> None:
        """Let the rows attend to keys and values (B, Hk, S, D)."""
        self._seen = own, (keys, values) = self.own, seen  # keeps their memory: a cache may make them for this call
        assert values.stride() == keys.stride() and keys.stride(3) == 1
        own.slots, own.keys, own.values = keys.shape[2], keys.data_ptr(), values.data_ptr()
        own.key_sequence, own.key_head, own.key_row, _ = keys.stride()
        if mask is not None:
            assert mask.stride(3) == 1 and mask.shape[2:] == (own.rows, own.slots)
            own.mask, own.mask_row = mask.data_ptr(), mask.stride(2)
            own.mask_sequence = mask.stride(0) if mask.shape[0] > 1 else 0


def takes(hidden: Tensor) -> bool:
    """Return True where the kernels run rows (B, R, d): at most MOST_ROWS, without gradients and unless `watched`."""
    return 0 < hidden.shape[0] * hidden.shape[1] <= MOST_ROWS and not hidden.requires_grad and not watched()


def watched() -> bool:
    """Return True while a TorchDispatchMode is active, for example a counter of operations. It sees only torch's
    operations, so these must run then.
    """
    return torch._C._len_torch_dispatch_stack() > 0
