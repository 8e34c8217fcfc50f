"""`kvweave flow`: how much attention crosses modalities, layer by layer."""

import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kvweave.cli import console, options

if TYPE_CHECKING:
    from kvweave.methods.flowmm import FlowMM

RATIOS = ("literal", "balanced", "nosink")


def flow(
    model: options.ModelName = "lab",
    image: options.Images = None,
    prompt: options.PromptText = None,
    theta: Annotated[
        float, typer.Option(help="FlowMM's threshold, drawn as a line: layers above it are cross-modal.")
    ] = 0.25,
    images: options.Number = None,
    task: options.Task = None,
    questions: options.Questions = None,
    seed: options.Seed = None,
    dtype: options.Dtype = "auto",
    device: options.Device = "auto",
    attention: options.Attention = "auto",
    trust_remote_code: options.TrustRemoteCode = False,
    out: options.Out = Path("out/flow"),
    json: options.Json = False,
) -> None:
    """Measure the flow ratio of each layer (the share of attention between text and images) in one prefill.

    Writes flow.png and flow.json.
    """
    from kvweave.methods.flowmm import FlowMM
    from kvweave.ops.budget import LEAST

    with console.bad_input(option="--theta"):
        # one entry is the least: every layer is cut, and so measured
        method = FlowMM(budget=LEAST, theta=theta, flow_rows=0)
    if math.isinf(theta):
        raise console.BadInput(f"--theta {theta} is not finite: allowed is a number")
    options.check_model(model)
    console.check_out(out)
    console.quiet_libraries()
    ask = options.read_ask(options.source(model, questions), image, prompt, images, task, seed)
    options.say_own_world(model, ask)
    loaded, processor = options.load(model, dtype, device, attention, trust_remote_code)
    measures = _measure(model, loaded, processor, ask, method)

    from kvweave.report.flow import figure

    with console.writing(out) as folder:
        (folder / "flow.json").write_text(console.dump_json(measures) + "\n", encoding="utf-8")
        figure(measures, folder / "flow.png")
    if json:
        console.print_json(measures)
    else:
        _print(measures, out)


def _measure(name: str, model: Any, processor: Any, ask: options.Ask, method: "FlowMM") -> dict[str, Any]:
    """The three ratios of each layer, as FlowMM computes them; nothing is decoded."""
    from kvweave.evals.one import collect, generating
    from kvweave.evals.run import store

    inputs = options.encode(processor, ask)
    with console.err().status("measuring"), options.model_errors():
        generating.check_compressible(model, method)
        run = generating.generate(model, processor, inputs, method, max_new_tokens=1)
    tokens = collect.tokens_of(processor, model.config, inputs)
    return {
        "model": name,
        "question": ask.question,
        "prompt": {
            "tokens": len(tokens),
            "visual": sum(token.visual for token in tokens),
            "images": len(ask.images),
        },
        "theta": method.theta,
        "layers": [
            {"layer": layer["layer"], **{ratio: _ratio(layer, ratio) for ratio in RATIOS}, "scope": layer["scope"]}
            for layer in run.report["layers"]
            if layer["compressed"]
        ],
        "command": console.command_line(),
        "machine": collect.machine(str(model.device)),
        "versions": store.versions(),
    }


def _ratio(layer: dict[str, Any], ratio: str) -> float | None:
    """None where the prompt has nothing to cross between."""
    from kvweave.report.data import finite

    return finite(layer["flow"] if ratio == "literal" else layer.get(f"flow_{ratio}"))


def _print(measures: dict[str, Any], folder: Path) -> None:
    from rich import box
    from rich.progress_bar import ProgressBar
    from rich.table import Table
    from rich.text import Text

    screen = console.out()
    prompt = measures["prompt"]
    screen.print(Text(measures["question"], style="bold"))
    screen.print(
        f"[dim]{measures['model']} · {prompt['tokens']} tokens, {prompt['visual']} of them visual, "
        f"{prompt['images']} images[/dim]"
    )
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("layer", justify="right")
    table.add_column("flow ratio", width=24)
    for ratio in RATIOS:
        table.add_column(ratio, justify="right")
    table.add_column(f"at {measures['theta']:g}")
    for layer in measures["layers"]:
        numbers = ["–" if layer[ratio] is None else f"{layer[ratio]:.3f}" for ratio in RATIOS]
        bar = ProgressBar(total=1, completed=min(1, max(0, layer["literal"] or 0)), width=24)
        table.add_row(str(layer["layer"]), bar, *numbers, layer["scope"] or "–")
    screen.print(table)
    screen.print(f"drawn: [bold]{folder / 'flow.png'}[/bold] (also flow.json)")
