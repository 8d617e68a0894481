"""The vocabulary files that lie in this package, checked by their digests."""

import gzip
import hashlib
from importlib.resources import files

SHA256 = {  # of the content, not of the compressed file
    "clip_bpe": "67603cfda2e032ad77b5f8808af37789d590db664b26df8705d2bf8b3c553fc8",
    "bert_base_uncased": "07eced375cec144d27c900241f3e339478dec958f92fddbc551f295c992038a3",
}


def read_vocabulary(name: str) -> list[str]:
    """The lines of a vocabulary.

    Raises:
        ValueError: the file is missing or damaged.
    """
    try:
        content = gzip.decompress((files(__package__) / "vocabularies" / f"{name}.txt.gz").read_bytes())
        damage = "" if hashlib.sha256(content).hexdigest() == SHA256[name] else "its checksum differs"
    except (OSError, EOFError) as error:
        content, damage = b"", str(error)
    if damage:
        raise ValueError(
            f"data: the vocabulary {name} of this installation is damaged ({damage}): install fastssl again"
        )
    return content.decode().removesuffix("\n").split("\n")
