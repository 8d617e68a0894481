"""Images and texts: what a method finds for either, and which classes it takes for others."""

import random
from collections import Counter
from typing import Any

import torch

from fastssl.data.source import Source, Subset
from fastssl.eval.features import extract
from fastssl.eval.knn import nearest
from fastssl.eval.labels import labelled
from fastssl.eval.prompts import class_names, read_templates
from fastssl.eval.retrieval import WHOLE, captioned, retrieve
from fastssl.eval.texts import Texts
from fastssl.eval.zeroshot import build_prompts, class_features

from .images import image_of, title_of
from .parts import Answers, Table, Text, Tiles, short
from .pictures import CRISP, tile
from .run_data import RunData

SEARCHED = 500  # most held-out images, with all of their captions
CLASSIFIED = 2000  # most held-out images that are classified
QUERIES = 6  # images, and texts, whose search is shown
FOUND = 5  # what is shown of each
ROWS = 20  # most classes in the table
LONGEST = 160  # characters of a text


def retrieved(run: RunData) -> list[Any]:
    """Held-out images with the texts found for them, and texts with the images; [] without captions."""
    texts = Texts(run.run.config.text)
    source, captions = captioned(_sample(run.test_source, SEARCHED), texts.encode)
    if not len(source):
        return []
    found = retrieve(run.method, source, captions, run.size, texts, **_loading(run))
    recall, shown = found.recall(), found.captions.texts
    answers, rows = [], []
    right = found.right_texts.tolist()
    for row in _some(len(found.images)):
        image = int(found.images[row])
        picture = tile(image_of(run, source, image, WHOLE), title_of(source, image))
        own = zip(found.texts_of_images[row, :FOUND].tolist(), right[row])
        answers.append((picture, [(short(shown[text], LONGEST), is_own) for text, is_own in own]))
    right = found.right_images.tolist()
    for row in _some(len(shown)):
        pictures = [
            tile(image_of(run, source, image, WHOLE), title_of(source, image), "" if is_own else "other")
            for image, is_own in zip(found.images_of_texts[row, :FOUND].tolist(), right[row])
        ]
        rows.append((short(shown[row], LONGEST), pictures))
    return [
        Text(f"Texts found for an image, the nearest first: the first is right for {recall.image_to_text[1]:.1%}."),
        Answers(answers, crisp=max(run.size) <= CRISP),
        Text(f"Images found for a text: the first is right for {recall.text_to_image[1]:.1%}."),
        Tiles(rows, crisp=max(run.size) <= CRISP, stacked=True),
        Text(f"Searched: {recall.images:,} images, {recall.texts:,} texts."),
    ]


def confusions(run: RunData) -> list[Any]:
    """A table of classes with the shares of their images that get them; [] without labels.

    Names and templates are those of the newest zero-shot evaluation on the run's data, else the defaults.
    """
    test = labelled(_sample(run.test_source, CLASSIFIED))
    if not len(test):
        return []
    lines = [line for line in run.evaluations if line["evaluation"] == "zeroshot"]
    lines = [line for line in lines if run.run.is_own(line.get("data", run.run.options.data))]
    files = [lines[-1].get(name) if lines else None for name in ("classes", "templates")]
    files = [name if name and name.startswith("/") else None for name in files]  # else lists from Python
    texts, names = Texts(run.run.config.text), class_names(files[0], test.classes, run.run.options.data)
    sentences = read_templates(files[1])
    loading = _loading(run)
    classes = class_features(run.method.embed_text, build_prompts(names, sentences, texts), texts, loading["device"])
    images, labels, _ = extract(run.method.embed_images, test, run.size, centre=WHOLE, **loading)
    given = nearest(classes, images, 1)[:, 0]
    rows = []
    for label in labels.unique().tolist():
        own = given[labels == label].tolist()
        counts = Counter(own)
        others = [(other, count) for other, count in counts.most_common(4) if other != label][:3]
        taken = ", ".join(f"{short(names[other])} {count / len(own):.0%}" for other, count in others)
        rows.append((counts[label] / len(own), [short(names[label]), f"{len(own):,}", taken]))
    rows.sort(key=lambda row: row[0])
    hidden = f" The {ROWS} of {len(rows)} classes with the smallest shares." if len(rows) > ROWS else ""
    share = (given == labels).double().mean().item()
    table = Table(
        ["class", "images", "right", "most often taken for"],
        [[name, count, f"{right:.1%}", taken] for right, (name, count, taken) in rows[:ROWS]],
        {1, 2},
        {2: [right for right, _ in rows[:ROWS]]},
    )
    count = "one sentence" if len(sentences) == 1 else f"{len(sentences)} sentences"
    text = f"{share:.1%} of {len(labels):,} images get their class, by {count} about each.{hidden}"
    return [Text(text), table]


def _sample(source: Source, most: int) -> Subset:
    """At most so many images. They are not evenly spaced: labels and captions may repeat with a period."""
    return Subset(source, _some(len(source), most))


def _some(count: int, most: int = QUERIES) -> list[int]:
    return sorted(random.Random(0).sample(range(count), min(most, count)))


def _loading(run: RunData) -> dict[str, Any]:
    device = next(run.method.parameters()).device
    return {"device": torch.device(device), **run.run.normalisation}
