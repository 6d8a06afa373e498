"""The card of a bundle: what the model is, how it was made, how it is used, in the hub's form."""

from __future__ import annotations

from collections.abc import Mapping

from mm_core.models.dvae import DECODER, DvaeConfig
from mm_core.models.family import AnyModelConfig
from mm_core.models.flava import FlavaConfig
from mm_core.models.fused_batch import Sides
from mm_core.models.fused_classifier import CLASSIFIER, ClassHead


def model_card(
    name: str,
    config: AnyModelConfig,
    recipe: str,
    data_fingerprint: str,
    metrics: Mapping[str, float],
    weights_sha256: str | None,
    class_head: ClassHead | None = None,
) -> str:
    """A model card in the hub's form. The same model gives the same card: no dates, no host names."""
    rows = "".join(f"| {key} | {value:.4f} |\n" for key, value in sorted(metrics.items()))
    table = f"\n## Metrics\n\n| metric | value |\n|---|---|\n{rows}" if rows else ""
    kind, what, use = _described(config)
    if class_head is not None:
        what += f"; fine-tuned to classify by {class_head.num_classes} classes, of {_SHOWN[class_head.sides]}"
        use += f"\n`{CLASSIFIER}` is the head that classifies: `mm_core.bundle.load_bundle(FOLDER).classify(images, texts)`.\n"
    return f"""---
library_name: transformers
pipeline_tag: {kind}
tags: [{config.family}, mm]
---

# {name}

A {config.family} model trained with mm, recipe `{recipe}`: {what}.

| | |
|---|---|
| fingerprint of the training data | `{data_fingerprint}` |
| SHA-256 of the weights | `{weights_sha256}` |

`mm.json` holds the SHA-256 of every file.
{table}
## Use

{use}"""


_SHOWN = {Sides.IMAGE: "images", Sides.TEXT: "texts", Sides.BOTH: "images with texts"}
_FED = """from PIL import Image
from transformers import AutoModel, AutoTokenizer, CLIPImageProcessor

model = AutoModel.from_pretrained(FOLDER)
tokenizer = AutoTokenizer.from_pretrained(FOLDER)
images = CLIPImageProcessor.from_pretrained(FOLDER)

texts = tokenizer(["a cat", "a dog"], padding="max_length", truncation=True, return_tensors="pt")
"""


def _described(config: AnyModelConfig) -> tuple[str, str, str]:
    """The hub's word for what it does, its sizes, and how it is used."""
    if isinstance(config, DvaeConfig):
        sizes = f"the encoder of a discrete VAE, {config.codebook.entries:,} entries, one for each 8 x 8 pixels"
        use = "With mm: `model.codebook_source=FOLDER` of a flava recipe. With transformers: `FlavaImageCodebook.from_pretrained(FOLDER)`;"
        return "feature-extraction", sizes, f"{use} pixels are\nmapped from [0, 1] to [0.1, 0.9]. `{DECODER}` holds the decoder.\n"
    sizes = f"images of {config.image_size} pixels, captions of up to {config.context_length}\ntokens, "
    sizes += f"features of {config.embed_dim} dimensions"
    with_mm = "With mm: `mm serve FOLDER`, `mm eval FOLDER`. With transformers, where FOLDER is this one:\n\n```python\n"
    if isinstance(config, FlavaConfig):
        use = """pixels = images([Image.open("cat.jpg"), Image.open("dog.jpg")], return_tensors="pt")
output = model(input_ids=texts.input_ids, attention_mask=texts.attention_mask, pixel_values=pixels.pixel_values)
print(output.multimodal_embeddings[:, 0].shape)  # of each pair; `FlavaForPreTraining` has the heads too
```
"""
        return "feature-extraction", sizes, with_mm + _FED + use
    mask = "attention_mask=texts.attention_mask, " if config.masks_padding else ""
    use = f"""pixels = images(Image.open("picture.jpg"), return_tensors="pt")
print(model(input_ids=texts.input_ids, {mask}pixel_values=pixels.pixel_values).logits_per_image.softmax(-1))
```
"""
    return "zero-shot-image-classification", sizes, with_mm + _FED + use
