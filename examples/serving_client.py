"""`kvweave serve` and OpenAI's own client: a picture goes in, the answer streams out, and what was kept is told."""

import base64
import io
import socket
import subprocess
import sys
import time
import urllib.request

import openai

import kvweave.lab

with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    port = free.getsockname()[1]

album = kvweave.lab.example(images=4, task="image_needle")
pieces = []
for piece in album.messages()[0]["content"]:
    if piece["type"] == "image":
        file = io.BytesIO()
        piece["image"].save(file, "PNG")
        url = f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
        piece = {"type": "image_url", "image_url": {"url": url}}
    pieces.append(piece)

# Answers of three tokens: nothing waits for eight.
command = [sys.executable, "-m", "kvweave", "serve", "--model", "lab", "--method", "weave:form=even,defer=0"]
server = subprocess.Popen([*command, "--port", str(port)])
try:
    for _ in range(600):
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{port}/health")
            break
        except OSError:
            time.sleep(0.2)
    client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="-")
    said = client.chat.completions.create(
        model="lab",
        messages=[{"role": "user", "content": pieces}],
        max_tokens=8,
        temperature=0,
        extra_body={"kvweave": {"budget": 0.4}},
    )
    print(said.choices[0].message.content, f"(right: {album.answer})")
    told = said.kvweave
    print(f"{told['kept_bytes']:,} of {told['prompt_bytes']:,} bytes kept by {told['method']}")
finally:
    server.terminate()
    server.wait()
