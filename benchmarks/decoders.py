"""Processor time of the JPEG decoders that install from PyPI, and whether their pixels are libjpeg's.

    python -m benchmarks.decoders            # measures, writes benchmarks/results/decoders/<machine>.json and the table
    python -m benchmarks.decoders --render   # writes the table from the stored results
    python -m benchmarks.decoders --check    # writes nothing; exit status 1 if the table is out of date

Decoders that are not installed, or can't be loaded, are left out. Each decodes the photographs of `benchmarks.loader`
to RGB in a NumPy array or a tensor, with one thread, in turn; the figure is the smallest of the rounds.
"""

import argparse
import importlib
import io
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from importlib.metadata import version

import numpy as np
import torch
from PIL import Image

from . import store
from .loader import photographs
from .machine import environment, machine
from .store import RESULTS, machine_files
from .table import PAGE, insert, markdown_table, present, write_or_check

KEPT = RESULTS / "decoders"
MARKERS = "<!-- decoders:begin -->", "<!-- decoders:end -->"
SIDES, SCALES, ROUNDS = (400, 500, 1024), (1, 2, 4), 15
HEADER = ("decoder", "pixels", "GIL", *(f"{side} px" for side in SIDES), "1,024 px at 1/2", "at 1/4", "middle rows")
LEGEND = """\
Milliseconds of processor time to decode a photograph (JPEG of quality 90, 4:2:0; the number is its shorter side) to RGB.
*Pixels*: equal to those of libjpeg's default (accurate inverse transform, smooth upsampling), or how far in the mean of
255. *GIL*: whether other Python threads run meanwhile. *Middle rows*: half of those of 1,024 pixels, where the
package can decode a part; all of the file before it must be read, as Huffman codes have no index."""

Decode = Callable[[bytes], object]


def encode_photographs(side: int) -> list[bytes]:
    """The photographs as JPEG of quality 90, with this shorter side."""
    files = []
    for photo in photographs():
        file = io.BytesIO()
        size = [round(length * side / min(photo.size)) for length in photo.size]
        photo.resize(size, Image.Resampling.LANCZOS).save(file, "JPEG", quality=90)
        files.append(file.getvalue())
    return files


def pillow() -> dict[str, Decode]:
    def decode(scale: int) -> Decode:
        def run(data: bytes):
            image = Image.open(io.BytesIO(data))
            if scale > 1:
                image.draft("RGB", (image.width // scale, image.height // scale))
            return np.array(image)

        return run

    return {f"1/{scale}": decode(scale) for scale in SCALES}


def simplejpeg() -> dict[str, Decode]:
    package = importlib.import_module("simplejpeg")

    def decode(scale: int) -> Decode:
        def run(data: bytes):
            height, width, *_ = package.decode_jpeg_header(data)
            return package.decode_jpeg(
                data, min_height=-(-height // scale), min_width=-(-width // scale), min_factor=scale
            )

        return run

    return {f"1/{scale}": decode(scale) for scale in SCALES}


def simplejpeg_fast() -> dict[str, Decode]:
    package = importlib.import_module("simplejpeg")
    return {"1/1": lambda data: package.decode_jpeg(data, fastdct=True, fastupsample=True)}


def torchvision() -> dict[str, Decode]:
    package = importlib.import_module("torchvision.io")
    return {"1/1": lambda data: package.decode_jpeg(torch.from_numpy(np.frombuffer(data, np.uint8)))}


def torchcodec() -> dict[str, Decode]:
    package = importlib.import_module("torchcodec.decoders")
    return {"1/1": lambda data: package.decode_jpeg(torch.from_numpy(np.frombuffer(data, np.uint8)))}


def imagecodecs() -> dict[str, Decode]:
    package = importlib.import_module("imagecodecs")
    return {"1/1": package.jpeg8_decode}


def opencv() -> dict[str, Decode]:
    package = importlib.import_module("cv2")
    package.setNumThreads(1)
    modes = {1: "IMREAD_COLOR_RGB", 2: "IMREAD_REDUCED_COLOR_2", 4: "IMREAD_REDUCED_COLOR_4"}

    def decode(scale: int) -> Decode:
        return lambda data: package.imdecode(np.frombuffer(data, np.uint8), getattr(package, modes[scale]))

    return {f"1/{scale}": decode(scale) for scale in SCALES}


def kornia() -> dict[str, Decode]:
    return {"1/1": importlib.import_module("kornia_rs.io").decode_image_jpeg}


def pyturbojpeg() -> dict[str, Decode]:
    library = importlib.import_module("turbojpeg").TurboJPEG()  # fails without a libturbojpeg of the system
    return {f"1/{scale}": lambda data, scale=scale: library.decode(data, 0, (1, scale)) for scale in SCALES}


def spdl() -> dict[str, Decode]:
    package = importlib.import_module("spdl.io")  # fails without an FFmpeg of the system

    def decode(data: bytes):
        frames = package.decode_packets(package.demux_image(data), filter_desc=package.get_filter_desc(pix_fmt="rgb24"))
        return package.to_numpy(package.convert_frames(frames))

    return {"1/1": decode}


def nvimagecodec() -> dict[str, Decode]:
    package = importlib.import_module("nvidia.nvimgcodec")
    device, backends = package.NVIMGCODEC_DEVICE_CPU_ONLY, [package.Backend(package.CPU_ONLY)]
    decoder = package.Decoder(device_id=device, max_num_cpu_threads=1, backends=backends)

    def middle(data: bytes):
        stream = package.CodeStream(data)
        region = package.Region(stream.height // 4, 0, 3 * stream.height // 4, stream.width)
        return np.asarray(decoder.decode(stream.get_sub_code_stream(region=region)).cpu())

    return {"1/1": lambda data: np.asarray(decoder.decode(data).cpu()), "rows": middle}


def dali() -> dict[str, Decode]:
    fn, types, pipeline_def = (
        getattr(importlib.import_module("nvidia.dali"), name) for name in ("fn", "types", "pipeline_def")
    )

    def decode(operator: Callable, **options) -> Decode:
        @pipeline_def(batch_size=1, num_threads=1, device_id=None, prefetch_queue_depth=1)
        def graph():
            file = fn.external_source(name="file", dtype=types.UINT8, ndim=1)
            return operator(file, device="cpu", output_type=types.RGB, **options)

        pipeline = graph()

        def run(data: bytes):
            pipeline.feed_input("file", [np.frombuffer(data, np.uint8)])
            return np.array(pipeline.run()[0].at(0))

        return run

    return {
        "1/1": decode(fn.decoders.image),
        "rows": decode(fn.decoders.image_slice, rel_start=[0.25, 0.0], rel_end=[0.75, 1.0], axes=[0, 1]),
    }


DECODERS: dict[str, tuple[str, Callable[[], dict[str, Decode]]]] = {  # name: (distribution, decoders by what they do)
    "simplejpeg": ("simplejpeg", simplejpeg),
    "simplejpeg, fast": ("simplejpeg", simplejpeg_fast),
    "torchcodec": ("torchcodec", torchcodec),
    "torchvision": ("torchvision", torchvision),
    "nvImageCodec": ("nvidia-nvimgcodec-cu13", nvimagecodec),
    "imagecodecs": ("imagecodecs", imagecodecs),
    "OpenCV": ("opencv-python-headless", opencv),
    "kornia-rs": ("kornia_rs", kornia),
    "DALI": ("nvidia-dali-cuda130", dali),
    "Pillow": ("pillow", pillow),
    "PyTurboJPEG": ("PyTurboJPEG", pyturbojpeg),
    "SPDL": ("spdl_io", spdl),
}


def installed() -> Iterator[tuple[str, str, dict[str, Decode]]]:
    """(name, version, decoders by what they do) of those that decode a photograph."""
    example = encode_photographs(400)[0]
    for name, (distribution, load) in DECODERS.items():
        try:
            decoders = load()
            for decode in decoders.values():
                decode(example)
            yield name, version(distribution), decoders
        except Exception as error:  # a package or one of its libraries is missing
            print(f"left out: {name}: {str(error).splitlines()[0][:150]}", file=sys.stderr)


def measure() -> Iterator[dict]:
    """A row for each decoder."""
    decoders = list(installed())
    best: dict[tuple[str, int, str], float] = {}
    for side in SIDES:
        files = encode_photographs(side)
        for _ in range(ROUNDS):
            for name, _, kinds in decoders:
                for kind, decode in kinds.items():
                    started = time.process_time()
                    for data in files:
                        decode(data)
                    seconds = (time.process_time() - started) / len(files)
                    best[name, side, kind] = min(seconds, best.get((name, side, kind), seconds))
    for name, number, kinds in decoders:
        yield {
            "decoder": name,
            "version": number,
            "milliseconds": {
                f"{side} {kind}": round(best[name, side, kind] * 1e3, 3) for side in SIDES for kind in kinds
            },
            "difference": round(difference(kinds["1/1"]), 3),
            "releases_gil": releases_gil(kinds["1/1"]),
        }


def difference(decode: Decode) -> float:
    """Mean difference of the pixels from Pillow's, which are those of libjpeg's default."""
    total = []
    for data in encode_photographs(400):
        pixels, expected = np.asarray(decode(data)), np.array(Image.open(io.BytesIO(data)))
        pixels = pixels if pixels.shape == expected.shape else pixels.transpose(1, 2, 0)
        total.append(np.abs(pixels.astype(int) - expected).mean())
    return float(np.mean(total))


def releases_gil(decode: Decode) -> bool:
    """Whether this thread goes on while another one decodes a photograph of 24 million pixels."""
    file = io.BytesIO()
    photographs()[0].resize((6000, 4000)).save(file, "JPEG", quality=90)
    data, begun, times = file.getvalue(), threading.Event(), []

    def run():
        begun.set()
        started = time.perf_counter()
        decode(data)
        times.append((started, time.perf_counter()))

    thread = threading.Thread(target=run)
    thread.start()
    begun.wait()
    ticks = []
    while thread.is_alive():
        ticks.append(time.perf_counter())
    start, end = times[0]
    inside = [tick for tick in ticks if start + 0.25 * (end - start) < tick < start + 0.75 * (end - start)]
    return len(inside) > 100


def render(paths: list) -> str:
    parts = []
    for path in paths:
        document = store.read(path)
        for run in document["runs"]:
            software = run["environment"]
            parts.append(f"**{document['machine']['name']}** · commit `{software['commit']}` · {software['date']}")
            rows = sorted(run["rows"], key=lambda row: row["milliseconds"][f"{SIDES[0]} 1/1"])
            parts.append(markdown_table(HEADER, map(_cells, rows), text_columns=3))
    return (
        "\n\n".join([*parts, LEGEND]) if parts else "No measurements yet: `python -m benchmarks.decoders` makes them."
    )


def _cells(row: dict) -> list[str]:
    kinds = [f"{side} 1/1" for side in SIDES] + ["1024 1/2", "1024 1/4", "1024 rows"]
    times = [f"{row['milliseconds'][kind]:.2f}" if kind in row["milliseconds"] else "–" for kind in kinds]
    pixels = "equal" if row["difference"] == 0 else f"{row['difference']:.2f}"
    return [f"{row['decoder']} {row['version']}", pixels, "released" if row["releases_gil"] else "held", *times]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.decoders", description=__doc__.split("\n")[0])
    parser.add_argument("--render", action="store_true", help="write the table from the stored results")
    parser.add_argument("--check", action="store_true", help="write nothing, exit with 1 if the table is out of date")
    options = parser.parse_args(arguments)
    if not (options.render or options.check):
        import cpuinfo

        torch.set_num_threads(1)
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        about = machine(cpuinfo.get_cpu_info()["brand_raw"])
        store.add(KEPT, about, environment(), list(measure()), replaces=lambda row: True)
    paths = machine_files(KEPT, shown_in=present(PAGE, MARKERS) if options.check else None)
    return write_or_check(
        {PAGE: insert(render(paths), PAGE, MARKERS)}, options.check, "python -m benchmarks.decoders --render"
    )


if __name__ == "__main__":
    sys.exit(main())
