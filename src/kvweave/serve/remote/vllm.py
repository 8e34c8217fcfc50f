"""How vLLM is started on a decoder that `kvweave convert --decoder` wrote."""

import json
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

DECODER_KEY = "VLLM_API_KEY"  # as vLLM reads it
_MODULE = "vllm.entrypoints.openai.api_server"  # its script would not see packages that a virtual environment shares
_CONNECTOR = {
    "kv_connector": "KvweaveConnector",
    "kv_connector_module_path": "kvweave.serve.engines.vllm",
    "kv_role": "kv_consumer",
}


def words(vllm: str | None) -> list[str]:
    """What starts it, as an operator types it, options and all; its own module where nothing is said."""
    return shlex.split(vllm or "") or [sys.executable, "-m", _MODULE]


def command(vllm: Sequence[str], decoder: Path, root: Path, port: int) -> list[str]:
    """The command, whose own options come last.

    Args:
        vllm: what starts it, and options of the operator's.
        decoder: its model; root: the folder of all compressed prompts.
    """
    dtype = json.loads((decoder / "config.json").read_text())["dtype"]
    connector = _CONNECTOR | {"kv_connector_extra_config": {"root": str(root)}}
    return [
        *vllm,
        *("--model", str(decoder), "--skip-tokenizer-init", "--dtype", dtype),
        *("--host", "127.0.0.1", "--port", str(port)),
        *("--kv-transfer-config", json.dumps(connector)),
    ]
