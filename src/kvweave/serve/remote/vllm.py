"""How vLLM is started on a decoder that `kvweave convert --decoder` wrote."""

import json
from collections.abc import Sequence
from pathlib import Path

_CONNECTOR = {
    "kv_connector": "KvweaveConnector",
    "kv_connector_module_path": "kvweave.serve.engines.vllm",
    "kv_role": "kv_consumer",
}


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
