"""A conversation of ten turns about an album: every prompt brings the cache back to half of what was said."""

import kvweave
import kvweave.lab
import kvweave.models

model, processor = kvweave.models.load("lab")
album = kvweave.lab.example(images=12)
animals = ["tiger", "horse", "rabbit", "eagle", "whale", "lion"]
questions = [f"what is the code of {animal} ?" for animal in animals]
questions += [f"what colour is the triangle in image #{n} ?" for n in (10, 9, 4, 2)]

messages = album.messages()
messages[0]["content"].pop()  # the album's own question
messages[0]["content"].append({"type": "text", "text": questions[0]})

cache = kvweave.CompressedCache(model.config, kvweave.Weave(budget=0.5, defer=2))
with kvweave.attach(model):
    for number, question in enumerate(questions):
        if number:
            messages.append({"role": "user", "content": [{"type": "text", "text": question}]})
        # The whole conversation, pictures too, goes in each time: what the cache has read is not read again.
        inputs = processor.apply_chat_template(messages, tokenize=True, return_dict=True, return_tensors="pt")
        out = model.generate(**inputs, past_key_values=cache, max_new_tokens=8)
        answer = processor.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        messages.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
        entries = cache.layers[0].keys.shape[2]
        print(f"{question} {answer} ({cache.get_seq_length()} tokens in {entries} entries)")
