"""CUDA kernel of ema_update_: run on the CPU by `cuda_on_host.h`, compiled for GPUs by nvcc, and run on a GPU."""

import ctypes
import itertools
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils.cpp_extension import include_paths

from tests.support import nvcc
from tests.support.close import assert_exact, assert_same

HERE = Path(__file__).parent
COMPILER = os.environ.get("CXX", "g++")
FLAGS = ["-O1", "-g1", "-std=c++20", "-shared", "-fPIC", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas"]
SANITIZED = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer"]

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
SCALAR_TYPES = {torch.float16: 5, torch.float32: 6, torch.float64: 7, torch.bfloat16: 15}  # torch's ScalarType
CHUNK = 2**14  # elements of a thread block: kEmaChunk
SIZES = [0, 1, 13, 63, 1000, CHUNK - 3, 2 * CHUNK + 4099]
PACKED, SCALAR, STRIDED = range(3)  # csrc/ema_table.h: Path


class Array(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p),
        ("shape", ctypes.c_void_p),
        ("steps", ctypes.c_void_p),
        ("dims", ctypes.c_int64),
        ("count", ctypes.c_int64),
        ("dtype", ctypes.c_int32),
    )


def describe(tensors: list[torch.Tensor] | None) -> tuple:
    """Arrays for C++, and the shapes and strides they point to, which must stay alive."""
    if not tensors:
        return None, None
    dims = [[(ctypes.c_int64 * t.dim())(*values) for values in (t.shape, t.stride())] for t in tensors]
    arrays = [
        Array(t.data_ptr(), *map(ctypes.addressof, shape_and_stride), t.dim(), t.numel(), SCALAR_TYPES.get(t.dtype, 4))
        for t, shape_and_stride in zip(tensors, dims)
    ]
    return (Array * len(arrays))(*arrays), dims


class Host:
    """The functions of ema_on_host.cpp, called with tensors."""

    def __init__(self, library: Path):
        self.library = ctypes.CDLL(str(library))
        self.library.ema_update.restype = ctypes.c_char_p
        self.library.chunks_of.restype = ctypes.c_int64

    def _call(self, name: str, lists: tuple, *args):
        arrays = [describe(tensors) for tensors in lists]
        return getattr(self.library, name)(len(lists[0]), *(array for array, _ in arrays), *args)

    def ema_update_(self, targets, sources, momentum, shadows=None) -> None:
        error = self._call("ema_update", (targets, sources, shadows), ctypes.c_double(momentum))
        if error:
            raise RuntimeError(error.decode())

    def table_of(self, targets, sources, shadows=None, keep=False) -> int:
        return self._call("table_of", (targets, sources, shadows), ctypes.c_bool(keep))

    def path_of(self, target, source, shadow=None) -> int:
        arrays = [describe(t if t is None else [t]) for t in (target, source, shadow)]
        return self.library.path_of(*(array for array, _ in arrays))

    def chunks_of(self, numels: list[int]) -> list[list[int]]:
        sizes = (ctypes.c_int64 * len(numels))(*numels)
        out = (ctypes.c_int64 * (3 * self.library.chunks_of(len(numels), sizes, None)))()
        self.library.chunks_of(len(numels), sizes, out)
        return [list(out[i : i + 3]) for i in range(0, len(out), 3)]


def build(folder: Path, *flags: str) -> Path:
    library = folder / "ema_on_host.so"
    includes = [f"-I{nvcc.SOURCES}", *(f"-I{path}" for path in include_paths())]
    command = [COMPILER, *FLAGS, *flags, *includes, HERE / "ema_on_host.cpp", "-o", library]
    subprocess.run(command, check=True)
    return library


@pytest.fixture(scope="module")
def host(tmp_path_factory):
    library = os.environ.get("FASTSSL_ON_HOST")  # set by test_sanitizers_find_nothing, which runs this file again
    return Host(Path(library) if library else build(tmp_path_factory.mktemp("host")))


def random(shape, dtype: torch.dtype, skip: int = 0) -> torch.Tensor:
    """A random tensor at the end of its storage, after `skip` other elements."""
    numel = torch.Size(shape).numel()
    return torch.randn(skip + numel, dtype=torch.float64).to(dtype)[skip:].view(shape)


def check(host: Host, targets, sources, momentum: float, shadows=None) -> None:
    """Checks targets and shadows against the formula, and that sources and memory outside the views are unchanged."""
    truth = [momentum * t.double() + (1 - momentum) * s.double() for t, s in zip(targets, sources)]
    plain = [torch.lerp(t, s.to(t.dtype), 1 - momentum) for t, s in zip(targets, sources)]
    written = [*targets, *(shadows or [])]
    storages = [storage_of(t).clone() for t in (*written, *sources)]
    host.ema_update_(targets, sources, momentum, shadows)
    for dtype in {t.dtype for t in targets}:
        kind = [i for i, t in enumerate(targets) if t.dtype == dtype]
        assert_exact(*(torch.cat([ts[i].flatten() for i in kind]) for ts in (targets, truth, plain)), "targets")
    for shadow, target in zip(shadows or [], targets):
        assert_same(shadow, target.to(shadow.dtype), "shadow")
    for tensor, before in zip((*written, *sources), storages):
        expected = before.clone()
        if any(tensor is output for output in written):
            expected.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset()).copy_(tensor)
        assert_same(storage_of(tensor), expected, "storage")


def storage_of(tensor: torch.Tensor) -> torch.Tensor:
    """All elements of the storage of a view."""
    return torch.empty(0, dtype=tensor.dtype).set_(tensor.untyped_storage())


@pytest.mark.parametrize("momentum", [0.0, 0.3, 0.999, 1.0])
@pytest.mark.parametrize("source_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("target_dtype", DTYPES[:2], ids=str)
def test_host_equals_the_formula(host, target_dtype, source_dtype, momentum):
    for shadow_dtype in (None, *DTYPES):
        targets = [random([n], target_dtype) for n in SIZES]
        sources = [random([n], source_dtype) for n in SIZES]
        shadows = shadow_dtype and [random([n], shadow_dtype) for n in SIZES]
        initial = [t.clone() for t in targets]
        check(host, targets, sources, momentum, shadows)
        if momentum in (0, 1):  # exact at both ends
            for target, expected in zip(targets, initial if momentum else sources):
                assert_same(target, expected.to(target_dtype), "target")


def test_host_updates_all_dtypes_in_one_launch(host):
    triples = [(t, s, h) for t in DTYPES[:2] for s in DTYPES for h in DTYPES]
    targets, sources, shadows = ([random([100 + i], dtypes[j]) for i, dtypes in enumerate(triples)] for j in range(3))
    check(host, targets, sources, 0.9, shadows)


SKIPS = [(1, 1, 1), (4, 1, 0), (1, 0, 4), (2, 2, 2), (4, 4, 4), (0, 0, 1), (8, 4, 2)]  # of target, source, shadow


@pytest.mark.parametrize("skips", SKIPS, ids=str)
def test_host_accepts_any_alignment(host, skips):
    for target_dtype in DTYPES[:2]:
        for dtype in DTYPES:
            dtypes, numel = (target_dtype, dtype, dtype), 3 * 1024 + 7
            tensors = [random([numel], d, skip) for d, skip in zip(dtypes, skips)]
            target, source, shadow = tensors
            width = 16 // target.itemsize
            fits = all(t.data_ptr() % min(16, width * t.itemsize) == 0 for t in tensors)
            assert host.path_of(target, source, shadow) == (PACKED if fits else SCALAR)
            check(host, [target], [source], 0.7, [shadow])


def channels_last(x):
    return x.view(4, 3, 8, 24).contiguous(memory_format=torch.channels_last)


VIEWS = {
    "transposed": lambda x: x.t(),
    "every other row": lambda x: x[::2],
    "columns": lambda x: x[:, 3:9],
    "channels last": channels_last,
    "channels last, sliced": lambda x: channels_last(x)[:, :, 1:-1],
    "expanded": lambda x: x[:1].expand(5, 36),
    "stride 0 in the columns": lambda x: x[:, :1].expand(64, 7),
    "many dimensions": lambda x: x.view(2, 2, 2, 2, 2, 2, 6, 6).permute(7, 6, 5, 4, 3, 2, 1, 0),
}


@pytest.mark.parametrize("view", VIEWS)
def test_host_accepts_any_strides(host, view):
    """Target, source and shadow each strided or contiguous."""
    view = VIEWS[view]
    shape = view(torch.empty(64, 36)).shape
    for strided in itertools.product([False, True], repeat=3):
        for dtypes in ((torch.float32, torch.bfloat16, torch.float16), (torch.float64, torch.float32, torch.bfloat16)):
            tensors = [view(random([64, 36], d)) if s else random(shape, d) for s, d in zip(strided, dtypes)]
            if 0 in (*tensors[0].stride(), *tensors[2].stride()):  # an element would be written twice
                continue
            target, source, shadow = tensors
            if any(strided) and not all(strided):
                assert host.path_of(*tensors) == STRIDED
            check(host, [target], [source], 0.75, [shadow])
            check(host, [target], [source], 0.75)


def test_host_treats_equal_dense_orders_as_flat(host):
    target, source = channels_last(random([64, 36], torch.float32)), channels_last(random([64, 36], torch.bfloat16))
    assert host.path_of(target, source) == PACKED
    check(host, [target], [source], 0.5)
    one = random([5, 1, 3], torch.float32)  # the stride of a dimension of size 1 has no meaning
    assert host.path_of(one.as_strided((5, 1, 3), (3, 77, 1)), one) == PACKED


def test_host_counts_dimensions_after_merging_them(host):
    """Eight dimensions that can't be merged are accepted, nine are refused; ten that merge to two are two."""
    nine = random([2] * 9, torch.float32).permute(*reversed(range(9)))
    check(host, [random([2] * 8, torch.float32)], [nine[0]], 0.5)
    with pytest.raises(RuntimeError, match="must have at most 8 dimensions: make it contiguous"):
        host.ema_update_([random([2] * 9, torch.float32)], [nine], 0.5)
    halves = random([1024, 2], torch.float32)[:, 0].view([2] * 10)
    check(host, [halves], [random([2] * 10, torch.float32)], 0.5)


def test_host_rounds_shadows_to_nearest_even(host):
    values = [1.0, 1 + 2.0**-8, 1 + 3 * 2.0**-8, 1 + 2.0**-11, 1 + 3 * 2.0**-11, 65504, 65520, -0.0, 1e-41, 3e-8]
    values += [float("nan"), float("inf"), -float("inf"), 3.4e38]
    for target_dtype in DTYPES[:2]:
        for shadow_dtype in DTYPES:
            target, shadow = torch.tensor(values, dtype=target_dtype), random([len(values)], shadow_dtype)
            host.ema_update_([target], [target.clone()], 0.5, [shadow])
            assert_same(shadow, target.to(shadow_dtype))
            assert shadow.signbit()[7] and shadow[10].isnan()


def test_host_refuses_before_it_writes(host):
    targets, sources = ([random([n], torch.float32) for n in (5, 7)] for _ in range(2))
    before = [t.clone() for t in targets]
    wrong = [
        ([*targets], [sources[0], sources[1][:6]], None, "got others at index 1"),
        ([*targets], [sources[0], sources[1].long()], None, "got others at index 1"),
        ([targets[0], targets[1].half()], sources, None, "got others at index 1"),
        ([*targets], sources, [sources[0], sources[1][None]], "got others at index 1"),
    ]
    for *lists, shadows, sentence in wrong:
        with pytest.raises(RuntimeError, match=f"^ema_update_: .*{sentence}$"):
            host.ema_update_(*lists, 0.5, shadows)
    for target, unchanged in zip(targets, before):
        assert_same(target, unchanged)


def test_host_chunks_cover_each_element_once(host):
    numels = [0, 1, CHUNK, CHUNK + 1, 0, 5 * CHUNK - 1]
    counts = [[0] * numel for numel in numels]
    for row, begin, end in host.chunks_of(numels):
        for i in range(begin, end):
            counts[row][i] += 1
    assert all(count == 1 for row in counts for count in row)
    assert host.chunks_of([]) == []


def test_host_makes_a_new_table_when_anything_differs(host):
    """A parameter that was moved to other memory must not be written at its old address."""
    memory, source, shadow = random([1024], torch.float32), random([512], torch.float32), random([512], torch.bfloat16)
    target = memory[:512]
    table = host.table_of([target], [source])
    assert host.table_of([target], [source]) == table
    changed = [
        ([memory[512:]], [source], None),  # address
        ([target], [source.clone()], None),
        ([target], [source], [shadow]),
        ([target], [source], [shadow.clone()]),
        ([target], [source.view(torch.bfloat16)[:512]], None),  # dtype, at the same address
        ([target], [source], [shadow.view(torch.float16)]),
        ([target[:511]], [source[:511]], None),  # size
        ([target.view(16, 32).t()], [source.view(32, 16)], None),  # strides
        ([target.view(32, 16).t()], [source.view(16, 32)], None),
        ([target, memory[512:]], [source, source], None),  # number of tensors
    ]
    tables = [host.table_of(*lists) for lists in changed]
    assert sorted({table, *tables}) == list(range(table, table + len(changed) + 1))


def test_host_keeps_eight_tables_and_those_of_graphs(host):
    memory, source = random([64], torch.float32), random([1], torch.float32)

    def use(i, keep=False):
        return host.table_of([memory[i : i + 1]], [source], None, keep)

    first = [use(i, keep=i == 0) for i in range(8)]
    assert use(1) == first[1]  # now 2 is the least recently used
    use(8)
    use(9)
    assert [use(i) for i in (0, 1, 4)] == [first[0], first[1], first[4]]
    assert use(2) > first[7]
    for i in range(10, 30):
        use(i)
    assert use(0) == first[0] and use(1) != first[1]


@pytest.mark.slow
def test_sanitizers_find_nothing(tmp_path):
    """Runs the host tests under the sanitizers, which end the process at an access out of bounds or misaligned."""
    names = [[COMPILER, f"-print-file-name={name}"] for name in ("libasan.so", "libubsan.so")]
    runtimes = [subprocess.run(name, capture_output=True, text=True, check=True).stdout.strip() for name in names]
    if not all(map(os.path.isabs, runtimes)):
        pytest.skip(f"{COMPILER} has no AddressSanitizer")
    environment = os.environ | {
        "FASTSSL_ON_HOST": str(build(tmp_path, *SANITIZED)),
        "LD_PRELOAD": " ".join(runtimes),
        "ASAN_OPTIONS": "detect_leaks=0",  # Python and torch keep what they allocate until the end
    }
    options = ["-q", "-x", "-s", "-p", "no:cacheprovider", "-k", "test_host"]
    command = [sys.executable, "-m", "pytest", __file__, *options]
    run = subprocess.run(command, env=environment, cwd=HERE.parent.parent, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-4000:]


needs_nvcc = pytest.mark.skipif(not nvcc.is_available(), reason="needs nvcc")


@needs_nvcc
@pytest.mark.parametrize("arch", nvcc.ARCHITECTURES)
def test_registers_do_not_spill(arch):
    kernel = nvcc.resources(arch)["fastssl::ema_update"]
    assert kernel["spill_bytes"] == kernel["stack_bytes"] == 0
    assert 16 < kernel["registers"] <= 64  # 4 blocks of 256 threads fit, and all loads of a thread are in flight


@needs_nvcc
def test_loads_are_wide_and_global():
    text = nvcc.ptx("ema", "sm_80")
    for wide in (r"ld\.global\.v4\.\w32", r"ld\.global\.v2\.\w64", r"ld\.global\.v4\.\w16", r"st\.global\.v4\.\w32"):
        assert re.search(wide, text), wide
    assert not re.search(r"\b(ld|st)\.(v\d\.)?\w\d", text)  # no generic load or store


def test_native_op_refuses_cpu_tensors():
    """The checks before the launch, which need no GPU."""
    from fastssl.ops import dispatch

    if not dispatch.native_cuda():
        pytest.skip("built without CUDA")
    op, cuda = torch.ops.fastssl.ema_update_.default, torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)
    target = torch.ones(3)
    op.redispatch(cuda, [], [], 0.5, [])
    with pytest.raises(RuntimeError, match="ema_update_: targets must all be on one device"):
        op.redispatch(cuda, [target], [torch.zeros(3)], 0.5, [])
    with pytest.raises(RuntimeError, match="must have as many tensors as targets, got 0 targets, 1 sources"):
        op.redispatch(cuda, [], [torch.zeros(3)], 0.5, [])
    assert (target == 1).all()


@pytest.mark.gpu
class TestGpu:
    """The launch, the table on the device, streams and graphs."""

    def test_equals_the_formula_when_parameters_move(self):
        from fastssl.ops import dispatch, ema_update_

        if ("ema_update_", "cuda", "native cuda") not in dispatch.table():
            pytest.skip("built without CUDA")
        for source_dtype in DTYPES:
            targets = [torch.randn(n, device="cuda") for n in SIZES]
            for _ in range(2):
                sources = [torch.randn(n, device="cuda").to(source_dtype) for n in SIZES]
                shadows = [t.bfloat16() for t in targets]
                plain = [torch.lerp(t, s.float(), 0.1) for t, s in zip(targets, sources)]
                ema_update_(targets, sources, 0.9, shadows)
                for target, expected, shadow in zip(targets, plain, shadows):
                    torch.testing.assert_close(target, expected)
                    assert_same(shadow, target.bfloat16())
                targets = [t.clone() for t in targets]

    def test_tables_outlive_launches_on_other_streams(self):
        from fastssl.ops import ema_update_

        source = torch.ones(1_000_000, device="cuda")
        targets = [torch.zeros_like(source) for _ in range(20)]  # more than the cache has room for
        torch.cuda.synchronize()
        for target in targets:
            ema_update_([target], [source], 1.0)
            with torch.cuda.stream(torch.cuda.Stream()):
                for _ in range(20):
                    ema_update_([target], [source], 0.5)
            torch.full_like(source, 7)  # may reuse the memory of an evicted table
        torch.cuda.synchronize()
        for target in targets:
            torch.testing.assert_close(target, torch.full_like(source, 1 - 0.5**20))

    def test_graphs_keep_their_table(self):
        from fastssl.ops import ema_update_

        target, source = torch.zeros(100_000, device="cuda"), torch.ones(100_000, device="cuda")
        ema_update_([target], [source], 1.0)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            ema_update_([target], [source], 0.5)
        for i in range(12):  # evicts all tables but the graph's
            ema_update_([torch.zeros(10 + i, device="cuda")], [torch.ones(10 + i, device="cuda")], 0.5)
        graph.replay()
        graph.replay()
        assert (target == 0.75).all()
        graph = torch.cuda.CUDAGraph()
        with pytest.raises(RuntimeError, match="before a CUDA graph captures it"), torch.cuda.graph(graph):
            ema_update_([source], [target], 0.5)
