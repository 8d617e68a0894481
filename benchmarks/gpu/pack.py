"""Prepares a machine with a GPU that can fetch nothing: packs what is missing there, and unpacks and checks it there.

    python -m benchmarks.gpu.pack --out build/pack --python 3.12 --limit-mb 50     # here, with a network
    python -m benchmarks.gpu.pack --unpack build/pack --site /tmp/site             # there; once for each part
    PYTHONPATH=/tmp/site python -m benchmarks.gpu.pack --check                     # there: what can be imported

A pack is a folder of parts, each a folder below the limit: the first has the compiled kernels and the wheels of other
packages; DALI and what it needs, which are larger, are cut into pieces, one a part. Each part can be carried and
unpacked alone, in any order; the last one that arrives installs DALI. The kernels of the processor levels use torch's
stable interface and serve any Python; `fastssl._C` belongs to one Python and is built there from csrc/module.cpp, in a
few seconds.
"""

import argparse
import hashlib
import importlib
import json
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
WHEELS = ("inf-cl", "memeff", "tyro", "docstring-parser", "typeguard", "shtab", "webdataset", "braceexpand")
LARGE = (  # cut into pieces: DALI, and what it imports
    *(
        "nvidia-dali-cuda130",
        "nvidia-nvimgcodec-cu13",
        "nvidia-libnvcomp-cu13",
        "nvidia-nvjpeg",
        "nvidia-nvjpeg2k-cu13",
    ),
    *("nvidia-nvtiff-cu13", "astunparse", "gast", "makefun", "optree", "nvtx", "libcst", "six", "wheel"),
)
OPTIONAL = ("inf_cl", "memeff", "nvidia.dali", "xformers", "tyro", "timm", "sklearn", "tensorboard")
PLATFORMS = ("manylinux_2_28_x86_64", "manylinux_2_27_x86_64", "manylinux_2_17_x86_64", "manylinux2014_x86_64")


def pack(out: Path, python: str, limit: int, large: tuple[str, ...] = LARGE, download=None) -> list[Path]:
    """Writes the parts of a pack and returns their folders.

    Args:
        out: folder of the pack; its earlier content is removed.
        python: version of Python there, such as "3.12".
        limit: largest size of a part in bytes.
        large: packages to cut into pieces.
        download: ``download(package, folder, python)`` puts a wheel into a folder; pip's by default.
    """
    download = download or _download
    shutil.rmtree(out, ignore_errors=True)
    first = out / "part-0"
    (first / "wheels").mkdir(parents=True)
    for package in WHEELS:
        download(package, first / "wheels", python)
    kernels = [path for path in (ROOT / "fastssl").glob("_native_*.so")]
    (first / "fastssl").mkdir()
    for path in kernels:
        shutil.copy(path, first / "fastssl")
    parts = [first]
    if large:
        whole = out / "large"
        whole.mkdir()
        for package in large:
            download(package, whole, python)
        archive = Path(shutil.make_archive(str(whole), "tar", whole))
        parts += _cut(archive, out, len(parts), limit - 2**20)
        archive.unlink()
        shutil.rmtree(whole)
    for part in parts:
        _write_digests(part)
    for part in parts:
        size = sum(path.stat().st_size for path in part.rglob("*") if path.is_file())
        if size > limit:
            raise SystemExit(
                f"benchmarks.gpu.pack: {part} has {size / 1e6:.1f} MB, more than the limit: raise --limit-mb"
            )
        print(f"{part}: {size / 1e6:.1f} MB in {sum(path.is_file() for path in part.rglob('*'))} files")
    return parts


def _cut(archive: Path, out: Path, number: int, size: int) -> list[Path]:
    """Cuts a file into pieces, each in a part of its own."""
    parts, total = [], -(-archive.stat().st_size // size)
    with archive.open("rb") as file:
        for piece in range(total):
            part = out / f"part-{number + piece}"
            (part / "pieces").mkdir(parents=True)
            (part / "pieces" / f"{archive.name}.{piece:02d}-of-{total:02d}").write_bytes(file.read(size))
            parts.append(part)
    return parts


def _download(package: str, folder: Path, python: str) -> None:
    """The wheel of a package for another Python on Linux, without those that it needs."""
    platforms = [word for platform in PLATFORMS for word in ("--platform", platform)]
    command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary=:all:", "-d", str(folder)]
    subprocess.run([*command, "--python-version", python, "--implementation", "cp", *platforms, package], check=True)


def _write_digests(part: Path) -> None:
    files = sorted(path for path in part.rglob("*") if path.is_file())
    digests = {str(path.relative_to(part)): _digest(path) for path in files}
    (part / "digests.json").write_text(json.dumps(digests, indent=1) + "\n")


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def unpack(parts: list[Path], site: Path, package: Path = ROOT / "fastssl") -> None:
    """Installs the parts that are here: kernels into the package, wheels into `site`, pieces once all have come.

    Raises:
        SystemExit: a file is damaged or missing.
    """
    site.mkdir(parents=True, exist_ok=True)
    for part in parts:
        digests = json.loads((part / "digests.json").read_text())
        for name, digest in digests.items():
            if not (part / name).is_file() or _digest(part / name) != digest:
                raise SystemExit(f"benchmarks.gpu.pack: {part / name} is missing or damaged: carry {part.name} again")
        for library in (part / "fastssl").glob("*.so"):
            shutil.copy(library, package)
        _install(sorted((part / "wheels").glob("*.whl")), site)
        for piece in (part / "pieces").glob("*"):
            shutil.copy(piece, site)
    if pieces := sorted(site.glob("large.tar.*-of-*")):
        total = int(pieces[0].name.rpartition("-of-")[2])
        if len(pieces) < total:
            print(f"{len(pieces)} of {total} pieces of DALI are here")
            return
        archive, wheels = site / "large.tar", site / "large"
        with archive.open("wb") as file:
            for piece in pieces:
                file.write(piece.read_bytes())
        shutil.unpack_archive(archive, wheels)
        _install(sorted(wheels.glob("*.whl")), site)
        shutil.rmtree(wheels)
        for path in (archive, *pieces):
            path.unlink()


def _install(wheels: list[Path], site: Path) -> None:
    if wheels:
        command = [sys.executable, "-m", "pip", "install", "-q", "--no-index", "--no-deps", "--no-compile", "--upgrade"]
        subprocess.run([*command, "--target", str(site), *map(str, wheels)], check=True)


def build_module(package: Path = ROOT / "fastssl") -> Path:
    """Compiles fastssl._C for this Python, if it is not there."""
    target = package / f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"
    if not target.exists():
        import pybind11

        levels = ",".join(
            sorted(path.name.split(".")[0].removeprefix("_native_") for path in package.glob("_native_*"))
        )
        levels = ",".join(level for level in levels.split(",") if level != "cuda")
        facts = [f'-DFASTSSL_LEVELS="{levels}"', f"-DFASTSSL_CUDA={int(any(package.glob('_native_cuda*')))}"]
        includes = [f"-I{pybind11.get_include()}", f"-I{sysconfig.get_path('include')}"]
        command = ["g++", "-O2", "-std=c++20", "-shared", "-fPIC", *facts, *includes]
        subprocess.run([*command, str(ROOT / "csrc" / "module.cpp"), "-o", str(target)], check=True)
    return target


def check() -> int:
    """Prints what can be imported, and which implementation serves each op; exit status 1 without native kernels."""
    for name in OPTIONAL:
        try:
            importlib.import_module(name)
            print(f"{name:<12} found")
        except Exception as error:
            print(f"{name:<12} {type(error).__name__}: {error}")
    from fastssl.ops import dispatch

    served = [f"{op} on {device}: {kind}" for op, device, kind in dispatch.table()]
    print("\n".join(served))
    return 0 if dispatch.native_level() else 1


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.pack", description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="write a pack to this folder")
    parser.add_argument("--python", default="3.12", help="version of Python on the other machine (3.12)")
    parser.add_argument("--limit-mb", type=float, default=50.0, help="largest size of a part in MB (50)")
    parser.add_argument("--without-dali", action="store_true", help="leave DALI out")
    parser.add_argument("--unpack", type=Path, metavar="FOLDER", help="install the parts in this folder")
    parser.add_argument("--site", type=Path, default=Path("/tmp/site"), help="folder for packages, for PYTHONPATH")
    parser.add_argument("--check", action="store_true", help="print what can be imported and what serves each op")
    options = parser.parse_args(arguments)
    if options.out:
        pack(options.out, options.python, int(options.limit_mb * 1e6), () if options.without_dali else LARGE)
    if options.unpack:
        unpack(sorted(options.unpack.glob("part-*")), options.site)
        print(build_module())
    return check() if options.check else 0


if __name__ == "__main__":
    sys.exit(main())
