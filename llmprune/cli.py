"""The command line: options, and errors as one sentence. What the screen shows while it works is in display.py.

Nothing heavy is imported until a command really runs, so that `--help` and a misspelt option answer at once.
"""

from __future__ import annotations

import json
import os
import sys
from dataclasses import asdict
from importlib import import_module
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from llmprune import __version__
from llmprune.config_file import evaluation_options, read_config, typed_first
from llmprune.distributed.launch import leave, rank_in_environment, told_by_others
from llmprune.errors import HubError, LlmpruneError, UserError
from llmprune.options import Titled, cured, grouped, model_misplaced

__all__ = ["main"]

EXAMPLES = """\b
Examples:
  llmprune --model gpt2 --sparsity 2:4
  llmprune --model ./my-model --sparsity 0.5 --method wanda
  llmprune --model ./m.gguf --sparsity 4:8
  llmprune plan --model gpt2 --sparsity 2:4
  llmprune eval --model ./gpt2-alps-2of4 --against gpt2
  llmprune compare gpt2 ./gpt2-alps-2of4 ./gpt2-wanda-2of4 --tasks lambada,piqa
  llmprune verify ./gpt2-alps-2of4
  llmprune pack ./gpt2-alps-2of4 ./gpt2-packed
  llmprune generate ./gpt2-packed --prompt "Once upon a time"
"""

VERBS = {
    "plan": "What a run would do, take and bring, from configuration and headers alone.",
    "eval": "Perplexity of a model and its distance from the dense one, with standard errors and protocol.",
    "compare": "Several checkpoints of one model in one table beside the dense one.",
    "verify": "Prove that a pruned checkpoint is what its report says; exit code 1 if it is not.",
    "report": "Draw the report of a pruned checkpoint as a page, or of several side by side.",
    "push": "Push a saved checkpoint to the Hub, and compare what arrived.",
    "pack": "Store a pruned checkpoint without its zeros: half the size, the same bits.",
    "unpack": "Make a packed checkpoint dense again, every tensor bit for bit.",
    "generate": "Text from a model, packed or dense, and how fast it came.",
    "bench": "A packed model and the same one dense, side by side.",
    "tune": "Measure the ways to multiply with packed weights on this machine.",
}

HOMES = {
    "plan": "llmprune.plan.verb",
    "eval": "llmprune.eval.command",
    "compare": "llmprune.eval.compare",
    "report": "llmprune.report.command",
    "push": "llmprune.job.push",
    "generate": "llmprune.runtime.generate",
    "bench": "llmprune.runtime.bench",
    "tune": "llmprune.runtime.tune",
}
"""Verbs whose `command` lives elsewhere, because it brings torch and transformers with it; `plan` makes its own from
the options of a run."""


class Root(Titled, click.Group):
    """The group of verbs, which loads a verb only when it is called."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Names of the verbs."""
        return list(VERBS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """The verb of that name, loaded now if it lives elsewhere."""
        if cmd_name in HOMES:
            command: Any = import_module(HOMES[cmd_name]).command
            found: click.Command = command if isinstance(command, click.Command) else command(self.params)
            return found
        return super().get_command(ctx, cmd_name)

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """As click does; where a model stands in the place of a verb, with the cure."""
        try:
            return super().resolve_command(ctx, args)
        except click.UsageError as error:
            raise cured(error, model_misplaced(args[0])) from None

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """The list of verbs in the help text, without loading them."""
        with formatter.section("Further commands"):
            formatter.write_dl(list(VERBS.items()))


model_option, pattern_option = grouped("What to prune"), grouped("How")
text_option, eval_option = grouped("Calibration text"), grouped("Evaluation")
output_option, other_option = grouped("Result"), grouped("Other")
scale_option = grouped("Large models and long runs")


@click.group(
    cls=Root,
    invoke_without_command=True,
    epilog=EXAMPLES,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110, "show_default": True},
)
@model_option("--model", help="Hub id, directory, .gguf file, or 'demo' (a small model from PyPI).")
@model_option("--revision", help="Branch, tag or commit of the model on the Hub.")
@model_option("--dtype", default="auto", help="auto (as stored), float32, bfloat16 or float16.")
@model_option("--device", help="Where layers are computed: cpu, cuda, cuda:1.  [default: the GPU if there is one]")
@model_option("--trust-remote-code", is_flag=True, help="Run Python code that comes with the model.")
@pattern_option("--sparsity", default="2:4", help="N:M (N kept of every M), a fraction (0.5) or a percentage (50%).")
@pattern_option("--effort", help="fast, balanced or best: how much work for how good a result.  [default: balanced]")
@pattern_option("--method", help="magnitude, wanda, sparsegpt or alps alone, in place of an effort.")
@pattern_option(
    "--permute/--no-permute",
    default=None,
    help="N:M: let neurons and value dimensions change places first, which costs nothing.  [default: by effort]",
)
@pattern_option(
    "--dense-targets/--no-dense-targets",
    default=None,
    help="Aim at the outputs that the dense model would give on its own inputs.  [default: by effort]",
)
@pattern_option("--polish", type=int, help="N:M: sweeps in which every group may choose again.  [default: by effort]")
@pattern_option("--refit", type=int, help="Least-squares steps on the mask.  [default: by effort]")
@pattern_option("--tune", type=int, help="Passes to tune each half of a layer, its masks fixed.  [default: by effort]")
@pattern_option(
    "--distill",
    type=int,
    help="Passes to tune all layers together towards the dense model's predictions.  [default: by effort]",
)
@pattern_option("--allocation", help="Where the zeros go: uniform, owl or error.  [default: by effort]")
@pattern_option("--budget", type=float, help="N:M and --allocation error: fraction of zeros over all weights.")
@pattern_option(
    "--levels",
    multiple=True,
    default=("dense",),
    help="N:M and --allocation error: what a weight may get besides --sparsity: dense, 6:8.  [may be repeated]",
)
@pattern_option(
    "--overrides",
    multiple=True,
    metavar="ENTRY=PATTERN",
    help="Another pattern, or dense, for some weights: down_proj=4:8, layers.0.=dense.  [may be repeated]",
)
@pattern_option("--block-size", type=int, help="SparseGPT: columns per mask decision.  [default: 128]")
@pattern_option("--admm-steps", type=int, help="ALPS: steps for the mask, 0 for Wanda's choice.  [default: 12]")
@pattern_option(
    "--dampening-frac",
    type=float,
    help="Added to a Hessian's diagonal, as a fraction of its mean.  [default: 0.05; effort fast and --method: 0.01]",
)
@pattern_option(
    "--ignore",
    multiple=True,
    help="Weight to leave dense: name, last part of it (down_proj), or re:PATTERN.  [may be repeated]",
)
@pattern_option(
    "--on-indivisible", default="error", help="error or skip: weights whose inputs do not divide into groups of M."
)
@text_option("--dataset", default="c4", help="c4, wikitext2, demo, hub id, or a .txt, .jsonl or .parquet file.")
@text_option("--text-column", help="Column with the text.  [default: text, else messages]")
@text_option("--num-samples", type=int, default=128, help="Windows of text.")
@text_option("--seq-len", type=int, help="Tokens per window.  [default: 2048, or what the model takes]")
@text_option("--bos", default="auto", help="auto, always or never: BOS token at the start of every window.")
@text_option("--seed", type=int, default=0, help="Chooses the windows.")
@text_option("--batch-size", type=int, default=1, help="Windows per forward.")
@eval_option(
    "--eval-dataset", multiple=True, default=("wikitext2",), help="Perplexity before and after.  [may be repeated]"
)
@eval_option(
    "--eval-tokens", type=int, help="Tokens of each at most, one window at least.  [default: all; 16384 on a CPU]"
)
@eval_option("--eval-seq-len", type=int, help="Tokens per window.  [default: as --seq-len]")
@eval_option(
    "--eval-tasks", multiple=True, help="Zero-shot task before and after, such as lambada or piqa.  [may be repeated]"
)
@eval_option("--eval-data", metavar="FOLDER", help="JSON lines with the items of the tasks.  [default: from the Hub]")
@eval_option("--eval-limit", type=int, help="Items of each task at most.  [default: all]")
@eval_option("--no-eval", is_flag=True, help="Prune and save without measuring anything.")
@output_option(
    "--output-dir", type=click.Path(path_type=Path), help="[default: ./MODEL-METHOD-2of4, METHOD alps with any effort]"
)
@output_option("--overwrite", is_flag=True, help="Replace the output directory if it exists.")
@output_option("--max-shard-size", default="5GB", help="Size of a weight file at most.")
@output_option("--format", default="dense", help="dense, which everything reads, or packed: without the zeros.")
@output_option(
    "--push-to-hub",
    is_flag=False,
    flag_value="",
    metavar="[ID]",
    help="Push the result to the Hub, as ID or under the output's name.",
)
@output_option("--hub-private-repo", is_flag=True, help="Make a new Hub repository private.")
@output_option("--hub-revision", metavar="BRANCH", help="Push to this branch of it.  [default: main]")
@output_option("--hub-create-pr", is_flag=True, help="Open a pull request in place of a commit to main.")
@scale_option(
    "--low-memory/--no-low-memory",
    default=None,
    help="Leave the weights on disk, and hold one decoder layer at a time.  [default: if they do not fit in memory]",
)
@scale_option(
    "--activations-dir", type=click.Path(path_type=Path, file_okay=False), help="Hidden states in files there."
)
@scale_option("--resume", default="auto", help="auto: go on where the same run was cut off; never: start anew.")
@scale_option("--safe-points", type=float, default=60.0, help="Seconds between two safe points, at least.")
@other_option(
    "--config",
    "config_file",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    callback=read_config,
    is_eager=True,
    expose_value=False,
    help="Options from a YAML or JSON file, or from the config.json of a pruned model.",
)
@other_option("--quiet", is_flag=True, help="Print nothing but errors.")
@other_option("--json", "as_json", is_flag=True, help="Print the report as JSON on standard output.")
@click.version_option(__version__, prog_name="llmprune")
@click.pass_context
def root(ctx: click.Context, /, **options: Any) -> None:
    """Prune a language model in one shot: set half of its weights to zero, repair the rest, prove and measure it.

    Calibrates on a little text, prunes every linear of every decoder layer, saves a checkpoint that plain transformers
    loads, verifies it, and prints perplexity before and after.
    """
    if ctx.invoked_subcommand is not None:
        if rank_in_environment() is not None:
            raise UserError(
                f"{ctx.invoked_subcommand} is done by one process: start it without torchrun or accelerate."
            )
        _nothing_before(ctx)
        return
    if options["model"] is None:
        if len(sys.argv) < 2:
            click.echo(ctx.get_help())
            return
        raise UserError("--model is missing: a hub id (gpt2), a directory, a .gguf file, or demo.")
    _prune(options)


def _nothing_before(ctx: click.Context) -> None:
    """Refuse options between `llmprune` and a verb: they would be a run's, and nobody would hear them."""
    verb = ctx.invoked_subcommand
    for option in ctx.command.params:
        if ctx.get_parameter_source(str(option.name)) is ParameterSource.COMMANDLINE:
            name = option.opts[0]
            raise UserError(f"{name} stands before {verb}, which does not see it there: llmprune {verb} {name} …")


@root.command("verify", help=VERBS["verify"])
@click.argument("directory", type=click.Path(path_type=Path, exists=True, file_okay=False))
@click.option("--no-reload", is_flag=True, help="Check the files only; do not load the model with transformers.")
@click.option("--trust-remote-code", is_flag=True, help="Run Python code that comes with the model.")
@click.option("--json", "as_json", is_flag=True, help="Print the checks as JSON.")
def _verify(directory: Path, no_reload: bool, trust_remote_code: bool, as_json: bool) -> None:
    from llmprune.checkpoint.verify import verify
    from llmprune.display import show_verification

    result = verify(directory, reload=not no_reload, trust_remote_code=trust_remote_code)
    if as_json:
        rows = [{"what": c.what, "count": c.count, "ok": c.ok, "detail": c.detail} for c in result.checks]
        click.echo(json.dumps({"directory": str(directory), "ok": result.ok, "checks": rows}, indent=2))
    else:
        show_verification(result)
    if not result.ok:
        sys.exit(1)


_source = click.argument("source", metavar="SRC", type=click.Path(path_type=Path, exists=True, file_okay=False))
_target = click.argument("target", metavar="DST", type=click.Path(path_type=Path))
_overwrite = click.option("--overwrite", is_flag=True, help="Replace DST if it exists.")
_quiet = click.option("--quiet", is_flag=True, help="Print nothing but errors.")
_as_json = click.option("--json", "as_json", is_flag=True, help="Print the outcome as JSON.")


@root.command("pack", short_help=VERBS["pack"])
@_source
@_target
@_overwrite
@_quiet
@_as_json
def _pack(source: Path, target: Path, *, overwrite: bool, **shown: bool) -> None:
    """Store the checkpoint in SRC without its zeros, in DST: values and a bitmap, in safetensors.

    At 2:4 and at 50 % a 16-bit weight takes 9/16 of its bytes. What was pruned is read from llmprune's report; in a
    checkpoint without one, every weight is packed that becomes smaller. The result is read back and compared bit for
    bit. transformers loads it after `import llmprune`.
    """
    from llmprune.checkpoint.convert import pack_checkpoint

    _show_conversion(pack_checkpoint(source, target, overwrite=overwrite), "packed", **shown)


@root.command("unpack", short_help=VERBS["unpack"])
@_source
@_target
@_overwrite
@_quiet
@_as_json
def _unpack(source: Path, target: Path, *, overwrite: bool, **shown: bool) -> None:
    """Make the packed checkpoint in SRC dense again, in DST, every tensor bit for bit.

    It also reads the sparse-bitmask and sparse-24-bitmask checkpoints of compressed-tensors up to 0.14, which today's
    libraries load as random weights.
    """
    from llmprune.checkpoint.convert import unpack_checkpoint

    _show_conversion(unpack_checkpoint(source, target, overwrite=overwrite), "unpacked", **shown)


def _show_conversion(done: Any, verb: str, *, quiet: bool, as_json: bool) -> None:
    from llmprune.display import show_conversion

    if as_json:
        click.echo(json.dumps(asdict(done), indent=2, default=str))
    elif not quiet:
        show_conversion(done, verb)


def _prune(options: dict[str, Any]) -> None:
    from llmprune.display import observer_for, show_result
    from llmprune.distributed import team_from_environment
    from llmprune.machine import keep_memory_together

    keep_memory_together()
    quiet, as_json = options.pop("quiet"), options.pop("as_json")

    def show(result: Any) -> None:
        if as_json:
            click.echo(json.dumps(result.report.to_json(), indent=2, default=str))
        elif not quiet:
            show_result(result)

    with team_from_environment() as team:
        quiet, as_json = quiet or not team.leads, as_json and team.leads
        try:
            with observer_for(quiet=quiet) as observer:
                result = _run(options, observer=observer, team=team)
        except HubError as error:  # the work is done and saved: show it before saying what went wrong
            if error.result is not None:
                show(error.result)
            raise
    show(result)


def _run(options: dict[str, Any], *, observer: Any, team: Any) -> Any:
    from llmprune.config import EvaluationConfig, PruneConfig
    from llmprune.job import Job, run, stoppable

    typed_first(options)
    evaluation = evaluation_options(options)
    config = {name: options.pop(name) for name in PruneConfig.__dataclass_fields__ if name in options}
    job = Job(
        config=PruneConfig(**config),
        evaluation=EvaluationConfig(**evaluation),
        default_output=options["output_dir"] is None,
        **options,
    )
    with stoppable(observer.say) as stop:
        return run(job, observer, stop=stop, team=team)


def main() -> None:
    """The console script: every error that is ours, and Ctrl-C, ends in one sentence and not in a traceback; of several
    processes, in one of them."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if rank_in_environment() is not None:  # torch's own log tells of every closed connection, with its stack
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    try:
        root.main(standalone_mode=False)
    except click.exceptions.Exit as done:
        sys.exit(done.exit_code)
    except click.ClickException as error:
        if not told_by_others(error):
            error.show()
        leave(2, error)
    except LlmpruneError as error:
        if not told_by_others(error):
            click.echo(f"Error: {error}", err=True)
        leave(2, error)
    except (KeyboardInterrupt, click.Abort) as error:
        interrupt = error.__cause__ or error  # click wraps it; job/ says what it left
        saved, safe = next(iter(interrupt.args), ""), getattr(interrupt, "safe", "")
        what = f"The pruned model was saved before, in {saved}." if saved else safe or "Nothing was written."
        if not told_by_others(interrupt):
            click.echo(f"Interrupted. {what}", err=True)
        leave(getattr(interrupt, "code", 130), interrupt)
    except Exception as error:
        if not told_by_others(error):
            sys.excepthook(*sys.exc_info())  # as Python would do
        leave(1, error)
