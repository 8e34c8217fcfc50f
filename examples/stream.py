"""A text that does not end: whatever comes, the cache holds 128 entries and the tokens since its last cut."""

import torch

import kvweave
import kvweave.models

model, processor = kvweave.models.load("lab")
told = "the old lion hides behind bridge the small panda runs behind forest " * 60
text = processor.tokenizer(told, return_tensors="pt")["input_ids"]

cache = kvweave.CompressedCache(model.config, kvweave.SnapKV(budget=128), every=64)
with torch.inference_mode(), kvweave.attach(model):
    for piece in text.split(64, dim=1):  # as it comes, from a file, a microphone or a camera
        model(input_ids=piece, past_key_values=cache, logits_to_keep=1)

report = cache.report
print(f"{report['seen']} tokens read, never more than {report['peak_entries']} entries held, {report['cuts']} cuts")
