"""`hub export`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from graftory.commands.export_formats import FORMATS, NOT_WRITTEN, TAKES, Request
from graftory.commands.output import json_option, print_json
from graftory.errors import ConfigError

SHARD_SIZE = "5GB"
DTYPES = ("float32", "bfloat16", "float16")


class Formats(click.Choice[str]):
    """What can be written; of some others it is said what to take instead."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """See `click.ParamType`."""
        if value in NOT_WRITTEN:
            self.fail(f"{NOT_WRITTEN[value]}.", param, ctx)
        return super().convert(value, param, ctx)


@click.command("export")
@click.argument("ref")
@click.argument("folder", metavar="DIR", type=click.Path(path_type=Path))
@click.option(
    "--format",
    "form",
    type=Formats(list(FORMATS)),
    default="model",
    show_default=True,
    help="What is written: one plain model, base and adapter as one graph (pt2), or the adapter alone for a library.",
)
@click.option("--base", help="The base model. [default: the recorded one]")
@click.option("--head", metavar="REF", help="Adapter to take task and head from, where REF is merged and has none.")
@click.option(
    "--input",
    "file",
    type=click.Path(path_type=Path),
    help="File of texts, one a line, to compare on. [default: test rows of the recorded task]",
)
@click.option(
    "--rows",
    type=click.IntRange(min=1),
    help="Texts to compare on. [default: 64; 16 if the model writes text]",
)
@click.option("--no-check", is_flag=True, help="Compare nothing: no more than one tensor is ever in memory.")
@click.option("--dtype", type=click.Choice(DTYPES), help="Type of the written weights. [default: the base's own]")
@click.option(
    "--max-shard-size", default=SHARD_SIZE, metavar="SIZE", show_default=True, help="Largest file of weights."
)
@click.option("--dequantize", is_flag=True, help="Turn a quantised base back into floating-point numbers first.")
@json_option
@click.pass_context
def command(
    context: click.Context,
    ref: str,
    folder: Path,
    form: str,
    base: str | None,
    head: str | None,
    file: Path | None,
    rows: int | None,
    no_check: bool,
    dtype: str | None,
    max_shard_size: str,
    dequantize: bool,
    as_json: bool,
) -> None:
    """Fold an adapter into its base and save one plain model, or write its files for another library.

    The base is read and written tensor by tensor. The saved model is loaded again with plain transformers and
    its logits are compared with those of base + adapter on real inputs, a layer at a time in memory; the largest
    difference is printed and stored beside it, and above what rounding explains (1e-3 in fp32) nothing is kept.

    \b
    Example:
      hub export trec@1 trec-model
      hub export trec@1 trec-model --input questions.txt --max-shard-size 2GB --json
      hub export trec@1 trec-adapter --format vllm
      hub export neck@1 neck-graph --format pt2
    """
    from graftory.hub import Hub

    _check_options(context, form, no_check)
    hub = Hub.open(context.obj)
    record = hub.record(ref)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError(f"{folder} exists and is not an empty folder; give a new one")
    request = Request(
        hub,
        record,
        folder,
        base=base or record.spec.base.id,
        head=hub.record(head) if head else None,
        file=file,
        rows=rows,
        check=not no_check,
        dtype=dtype,
        max_shard_size=max_shard_size,
        dequantize=dequantize,
    )
    result = FORMATS[form](request)
    if as_json:
        print_json(result.facts)
    else:
        for line in result.lines:
            click.echo(line)


def _check_options(context: click.Context, form: str, no_check: bool) -> None:
    """Refuse options that the format has no use for.

    Raises:
        ConfigError: If one was given.
    """
    for parameter in context.command.get_params(context):
        name = parameter.name or ""
        if context.get_parameter_source(name) is not ParameterSource.COMMANDLINE:
            continue
        known = any(name in taken for taken in TAKES.values())
        if known and name not in TAKES[form]:
            forms = " and ".join(f"--format {other}" for other, taken in TAKES.items() if name in taken)
            raise ConfigError(f"{parameter.opts[0]} and --format {form} do not go together; it is for {forms}")
        if no_check and name in ("file", "rows"):
            raise ConfigError(f"{parameter.opts[0]} and --no-check do not go together: nothing is compared")
