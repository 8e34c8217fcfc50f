"""Many questions about one album: it is read and compressed once, and no question sees the one before."""

import torch

import kvweave
import kvweave.lab
import kvweave.models

model, processor = kvweave.models.load("lab")
album = kvweave.lab.example(images=12)
questions = [
    album.question,
    "question: what is the code of lion ?",
    "question: what colour is the circle in image #3 ?",
]
asked = [processor.tokenizer(question, return_tensors="pt")["input_ids"] for question in questions]

# The album is what all prompts about it begin with.
prompt = processor.apply_chat_template(album.messages(), tokenize=True, return_dict=True, return_tensors="pt")
context = prompt["input_ids"].shape[1] - asked[0].shape[1]
columns = ("input_ids", "attention_mask", "mm_token_type_ids")
inputs = {name: x[:, :context] if name in columns else x for name, x in prompt.items()}

# No question is known yet: the model is asked about each picture, and what it then looks at stays.
cache = kvweave.CompressedCache(model.config, kvweave.Weave(budget=0.4, form="spelled"), hold=True)
with kvweave.attach(model), torch.no_grad():
    model(**inputs, past_key_values=cache)
    cache.compress(probes="default", processor=processor)
    for question, ids in zip(questions, asked, strict=True):
        with cache.question(ids) as inputs:
            out = model.generate(**inputs, max_new_tokens=8)
        print(question, processor.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
print(f"the cache holds {cache.get_seq_length()} tokens in {cache.layers[0].keys.shape[2]} entries, as before")
