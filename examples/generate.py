"""Three lines around `generate`: a question about twelve images is answered with a fifth of the KV cache."""

import kvweave
import kvweave.lab
import kvweave.models

model, processor = kvweave.models.load("lab")
album = kvweave.lab.example(images=12)
inputs = processor.apply_chat_template(album.messages(), tokenize=True, return_dict=True, return_tensors="pt")

# weave waits for the first tokens of the answer to see what they look at: this model's answers have three.
with kvweave.compress(model, kvweave.Weave(budget=0.2, defer=2)) as session:
    out = model.generate(**inputs, max_new_tokens=8)

answer = processor.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
print(f"{album.question} {answer} (right: {album.answer})")
print(session)
