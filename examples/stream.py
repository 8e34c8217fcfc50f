"""A text that does not end: whatever comes, the cache holds 128 entries and what came since its last cut."""

import torch

import kvweave
import kvweave.models

model, processor = kvweave.models.load("lab")
told = "the old lion hides behind bridge the small panda runs behind forest " * 60
text = processor.tokenizer(told + "code of lion is quebec papa " + told[:200], return_tensors="pt")["input_ids"]
question = processor.tokenizer(" question: what is the code of lion ?", return_tensors="pt")["input_ids"]

cache = kvweave.CompressedCache(model.config, kvweave.SnapKV(budget=128), every=64)
answer = []
with torch.inference_mode(), kvweave.attach(model):
    for piece in text.split(64, dim=1):  # as it comes, from a file, a microphone or a camera
        model(input_ids=piece, past_key_values=cache)
    out = model(input_ids=question, past_key_values=cache)
    while len(answer) < 3:
        token = out.logits[:, -1:].argmax(-1)
        answer.append(token.item())
        out = model(input_ids=token, past_key_values=cache)

print("the code of lion:", processor.decode(answer, skip_special_tokens=True))
print(f"{cache.report['seen']} tokens read, never more than {cache.report['peak_entries']} entries held")
