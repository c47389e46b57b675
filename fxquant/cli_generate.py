"""``fxquant generate``: text to stdout as it comes, tokens a second to stderr."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fxquant.cli_options import Json, load, note, print_json, tokenizer_in, within_context
from fxquant.errors import InputError, ModelError
from fxquant.files import shown

if TYPE_CHECKING:
    from fxquant.generate import Engine


def generate(
    out: Annotated[
        Path, typer.Argument(metavar="OUT", help="A folder that fxquant compile wrote, with --format hf or without.")
    ],
    prompt: Annotated[str, typer.Argument(metavar="PROMPT", help="The text to go on from.")],
    most: Annotated[int, typer.Option("--max-new-tokens", "-n", min=1, help="How many tokens at most.")] = 128,
    temperature: Annotated[float, typer.Option(min=0.0, help="0: always the most likely token.")] = 0.0,
    top_k: Annotated[int, typer.Option(min=0, help="Draw among so many; 0: among all.")] = 0,
    top_p: Annotated[float, typer.Option(help="Draw among the fewest that have this probability together.")] = 1.0,
    seed: Annotated[int, typer.Option(help="Of the draws.")] = 0,
    onnx: Annotated[Path | None, typer.Option(metavar="FILE", help="Run this exported file in onnxruntime.")] = None,
    tokenizer: Annotated[Path | None, typer.Option(metavar="FOLDER", help="Where OUT has no tokenizer.")] = None,
    threads: Annotated[int, typer.Option(min=0, help="Of torch or onnxruntime; 0: as they choose.")] = 0,
    activation_bits: Annotated[
        int, typer.Option(help="8 or 16: packed linears may round their input to so many bits, for speed (torch only).")
    ] = 32,
    chat: Annotated[
        bool | None,
        typer.Option("--chat/--raw", help="The prompt in the tokenizer's chat template, the default where it has one."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Generate text with a compiled language model, in torch or in onnxruntime.

    Examples:

        fxquant generate smollm2-fp6 "Once upon a time"

        fxquant generate smollm2-fp6 "Why is the sky blue?" --onnx smollm2-fp6.onnx -n 200 --temperature 0.7 --top-p 0.9
    """
    import torch

    from fxquant import generate as loop
    from fxquant.checkpoints import is_packed

    sampling = loop.Sampling(temperature, top_k, top_p, seed)
    if threads:
        torch.set_num_threads(threads)
    if not (out / "graph.json").is_file() and not is_packed(out):
        load(out)  # says what it is instead
    words = tokenizer_in(tokenizer or out, out)
    ids = loop.prompt_ids(words, prompt, chat=chat)
    engine = _engine(out, onnx, threads, activation_bits)
    if not engine.cached:
        note("the model has no KV cache, so every step computes the whole text again; compile it with --kv-cache")
    speed, tokens = loop.Speed(), list[int]()

    def kept() -> Any:
        new = loop.generate(engine, ids, most=most, sampling=sampling, stop=loop.stop_tokens(words), speed=speed)
        for token in new:
            tokens.append(token)
            yield token

    parts = []
    with within_context(onnx or out, f"{len(ids)} tokens of prompt and {most} new ones", "--max-new-tokens"):
        try:
            for part in loop.pieces(words, ids, kept()):
                parts.append(part)
                if not as_json:
                    typer.echo(shown(part), nl=False)
        finally:
            if parts and not as_json:
                typer.echo()
    if as_json:
        print_json({
            "text": "".join(parts), "tokens": tokens, "prompt_tokens": len(ids), "kv_cache": engine.cached,
            "prompt_tokens_per_second": speed.prompt_rate, "tokens_per_second": speed.step_rate,
        })  # fmt: skip
        return
    typer.echo(
        f"\n{len(ids)} tokens of prompt at {speed.prompt_rate:.1f} a second, {len(tokens)} new ones at "
        f"{speed.step_rate:.1f} a second", err=True,
    )  # fmt: skip


def _engine(out: Path, onnx: Path | None, threads: int, activation_bits: int) -> Engine:
    from fxquant import checkpoints
    from fxquant import generate as loop

    if onnx is None and checkpoints.is_packed(out):
        if activation_bits != 32:
            raise InputError("--activation-bits is for compiled models; compile the float model without --format hf")
        return loop.TransformersEngine(checkpoints.load_packed(out)[0])
    if onnx is None:
        model = load(out)
        model.activation_bits = activation_bits
        return loop.TorchEngine(model)
    if activation_bits != 32:
        raise InputError(
            "--activation-bits is for torch; a file has it from its export: fxquant export --activation-bits"
        )
    if not onnx.is_file():
        raise ModelError(f"{onnx} does not exist; write it with fxquant export {out} -o {onnx}")
    return loop.OnnxEngine(onnx, threads=threads)
