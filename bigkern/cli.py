"""The command line: bigkern info | tune-kernels | train | evaluate | predict | generate |
compress."""

import argparse
import sys
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

from bigkern import __version__
from bigkern.models.attention import IMPLEMENTATIONS
from bigkern.models.transformer import POSITIONS
from bigkern.train import cnn, distributed, transformer
from bigkern.train.compress import compress
from bigkern.train.config import (
    DATA_SETS,
    INT8_MODES,
    LINEAR_LAYERS,
    OBJECTIVES,
    OPTIMIZERS,
    PRUNE_SCOPES,
    PRUNE_UNITS,
    QUANTIZED,
    SCHEDULES,
    CnnConfig,
    CompressConfig,
    TrainConfig,
    TransformerTrainConfig,
    read_config,
)
from bigkern.train.errors import UserError
from bigkern.train.generate import generate
from bigkern.train.predict import evaluate, predict
from bigkern.tune import tune


def main(argv: list[str] | None = None) -> int:
    """Run a command and return its exit code: 1 after a message on stderr, 130 after Ctrl-C."""
    args = build_parser().parse_args(argv)
    try:
        args.run(args)
    except KeyboardInterrupt as interrupt:
        print(f"bigkern: {interrupt or 'interrupted'}", file=sys.stderr)
        return 130
    except (UserError, NotImplementedError, OSError) as error:
        print(f"bigkern: error: {error}", file=sys.stderr)
        return 1
    return 0


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="bigkern", description=__doc__.partition(": ")[2])
    parser.add_argument("--version", action="version", version=f"bigkern {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    command = commands.add_parser("info", help="what is installed, and what runs where")
    command.set_defaults(run=print_info)

    command = commands.add_parser(
        "tune-kernels", help="measure the tile sizes of Triton's kernels on this machine's GPU"
    )
    command.add_argument("--op", required=True, help="one that the tables have rows of, as adam_")
    command.add_argument("--arch", metavar="ARCH", help="whose rows (default: the GPU's, as sm_90)")
    command.add_argument(
        "--out", type=Path, default="bigkern-tuning.json", metavar="FILE",
        help="the table, for BIGKERN_TUNING (default: %(default)s)",
    )  # fmt: skip
    command.set_defaults(run=lambda args: tune(args.op, args.arch, args.out))

    tasks = commands.add_parser("train", help="train a reference model").add_subparsers(
        metavar="MODEL", required=True
    )
    for name, help, add_model_options, train in (
        ("cnn", "a CNN on handwritten digits", add_cnn_options, train_cnn),
        ("transformer", "a Transformer on text", add_transformer_options, train_transformer),
    ):
        # Only the options that were given show up, so that --resume knows what is to change.
        command = tasks.add_parser(
            name,
            help=help,
            argument_default=argparse.SUPPRESS,
            epilog=f"On several GPUs: torchrun --nproc-per-node N -m bigkern train {name} ... Each "
            "process takes its share of every batch, so that they train as one with the same "
            "--batch-size does; dropout and augmentation draw other numbers.",
        )
        add_model_options(command)
        command.set_defaults(run=train)

    command = add_run_command(commands, "evaluate", "how a run does on what was held out")
    add_data_options(command)
    command.set_defaults(
        run=lambda args: evaluate(args.folder, args.device, data_dir=args.data_dir, text=args.text)
    )

    command = add_run_command(commands, "predict", "classify images with a run")
    command.add_argument("images", type=Path, metavar="IMAGE", help="an image, or a folder of them")
    command.add_argument(
        "--invert", action="store_true", help="the digits are dark on a light ground"
    )
    command.set_defaults(
        run=lambda args: predict(args.folder, args.images, args.invert, args.device)
    )

    command = add_run_command(commands, "generate", "write text with a Transformer's run")
    command.add_argument("--prompt", required=True, metavar="TEXT", help="what to go on with")
    command.add_argument(
        "--max-new-tokens", type=int, metavar="N", help="bytes to write (default: a full context)"
    )
    for name, type_, default, help in (
        ("temperature", float, 0.8, "divides the logits; 0: always the likeliest byte"),
        ("top-k", int, None, "draw among the K likeliest bytes only"),
        ("top-p", float, None, "draw among the likeliest bytes of this probability only"),
        ("seed", int, None, "write the same again"),
    ):
        shown = "" if default is None else f" (default: {default})"
        command.add_argument(f"--{name}", type=type_, default=default, help=help + shown)
    command.set_defaults(
        run=lambda args: generate(
            args.folder,
            args.prompt,
            args.max_new_tokens,
            args.device,
            temperature=args.temperature,
            top_k=args.top_k,
            top_p=args.top_p,
            seed=args.seed,
        )
    )

    command = add_run_command(commands, "compress", "make a smaller, faster run of a run")
    add_compress_options(command)
    command.set_defaults(run=compress_run)
    return parser


def add_run_command(commands: Any, name: str, help: str) -> argparse.ArgumentParser:
    """A command on the folder of a run."""
    command = commands.add_parser(name, help=help)
    command.add_argument("folder", type=Path, metavar="DIR", help="the run's --out")
    command.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    return command


def add_data_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--data-dir", metavar="DIR", help="where its MNIST files are now")
    parser.add_argument("--text", metavar="FILE", help="where its text is now")


def adder(parser: argparse.ArgumentParser, config: type) -> Callable[..., None]:
    """What adds the option of a field of `config`."""

    def add(name: str, help: str, flag: str | None = None, **how: Any) -> None:
        """The option of the field `name` of `config`, with its default in the help."""
        default = next(field.default for field in fields(config) if field.name == name)
        shown = "" if default is None or default is False else f" (default: {default})"
        flag = flag or f"--{name.replace('_', '-')}"
        parser.add_argument(flag, dest=name, help=help + shown, **how)

    return add


def add_train_options(
    parser: argparse.ArgumentParser, config: type[TrainConfig], contenders: str
) -> Callable[..., None]:
    """Add the options of the training loop, and of the folder that a run is kept in; return what
    adds one more field of `config`."""
    add = adder(parser, config)
    add("epochs", "passes over the training set", type=int)
    add("batch_size", "examples per step, up to the full set, of all processes together", type=int)
    add("accumulate", "parts of a process's batch, one after another through the model", type=int)
    add("optimizer", "Adam from bigkern or from torch, or torch's SGD", choices=OPTIMIZERS)
    add("lr", "learning rate", type=float)
    add("warmup_steps", "steps over which the learning rate rises", type=int)
    add("schedule", "of the learning rate; cosine: falls to a tenth", choices=SCHEDULES)
    add("momentum", "momentum of sgd", type=float)
    add("weight_decay", "L2 penalty, or decoupled", type=float)
    add(
        "decoupled_weight_decay",
        "AdamW instead of Adam",
        action=argparse.BooleanOptionalAction,
    )
    add("max_grad_norm", "clip the global gradient norm to this", type=float)
    add("amp", "autocast and GradScaler", action=argparse.BooleanOptionalAction)
    add("seed", "decides initial parameters, order and augmentation", type=int)
    add("device", "auto, cpu, cuda or cuda:N", type=str)
    add("backend", "force one implementation of bigkern's kernels", type=str)
    add("log_every", "print the loss at step 1 of an epoch and every N steps after", type=int)
    add("save_every", "save every N steps, besides each epoch", type=int)

    folder = parser.add_mutually_exclusive_group()
    folder.add_argument(
        "--out",
        type=Path,
        metavar="DIR",
        help="keep config, metrics, TensorBoard events and checkpoints in this new folder",
    )
    folder.add_argument(
        "--resume",
        type=Path,
        metavar="DIR",
        help="go on with the run in this folder, by its own options",
    )
    parser.add_argument(
        "--compare",
        action="store_true",
        help=f"train with bigkern's {contenders} and with torch's, and show both side by side",
    )
    return add


def add_cnn_options(parser: argparse.ArgumentParser) -> None:
    add = add_train_options(parser, CnnConfig, "Adam")
    add("data", "data set", choices=DATA_SETS)
    add("data_dir", "folder of mnist's four IDX files", metavar="DIR")
    add("download", "fetch mnist into --data-dir first", action="store_true")
    add("augment", "shift and rotate the training images at random", action="store_true")
    add("linear", "int8: INT8 products, forward and backward", choices=LINEAR_LAYERS)


def add_transformer_options(parser: argparse.ArgumentParser) -> None:
    add = add_train_options(parser, TransformerTrainConfig, "attention and Adam")
    add("objective", "lm: predict text; classify: digits", flag="--task", choices=OBJECTIVES)
    add("text", "learn this instead of Python's standard library", metavar="FILE")
    add("context", "bytes that the model sees", type=int)
    add("dim", "features of a byte", type=int)
    add("num_heads", "heads of the attention", type=int)
    add("num_blocks", "blocks of attention and feed-forward network", type=int)
    add("dropout", "probability", type=float)
    add("positions", "how positions are told apart", choices=POSITIONS)
    add("attention", "from bigkern or from torch", choices=IMPLEMENTATIONS)


def add_compress_options(parser: argparse.ArgumentParser) -> None:
    """In the order of the steps."""
    parser.add_argument("--out", type=Path, required=True, metavar="NEW", help="the new run")
    add = adder(parser, CompressConfig)
    add("prune", "the smallest go, this share of them", type=float, metavar="SHARE")
    add(
        "prune_unit",
        "weights become 0, which neither size nor time shows; channels are taken out",
        choices=PRUNE_UNITS,
    )
    add("prune_scope", "the share is of the model's, or of each layer's", choices=PRUNE_SCOPES)
    add("distill", "learn from the run in this folder, besides the labels", metavar="TEACHER")
    add("temperature", "divides both logits where the teacher is learnt from", type=float)
    add("distill_weight", "of the teacher in the loss; the labels have the rest", type=float)
    add("epochs", "of training after pruning, or with a teacher", type=int)
    add("lr", "learning rate of that (default: the run's)", type=float)
    add("quantize", "the linear and convolutional layers that gain by it", choices=QUANTIZED)
    add(
        "mode",
        "inputs in int8 by a scale found as they come (dynamic), or on the training set (static); "
        "weight_only: in floating point, and so are convolutions",
        choices=INT8_MODES,
    )
    add_data_options(parser)


def print_info(args: argparse.Namespace) -> None:
    from bigkern.info import report

    print(report())


def compress_run(args: argparse.Namespace) -> None:
    options = {field.name: getattr(args, field.name) for field in fields(CompressConfig)}
    config = CompressConfig(**{k: v for k, v in options.items() if v is not None})
    compress(args.folder, args.out, config, data_dir=args.data_dir, text=args.text)


def train_cnn(args: argparse.Namespace) -> None:
    train(args, "cnn", CnnConfig, cnn.run, cnn.compare)


def train_transformer(args: argparse.Namespace) -> None:
    make_config = TransformerTrainConfig.for_objective
    train(args, "transformer", make_config, transformer.run, transformer.compare)


@distributed.processes()
def train(
    args: argparse.Namespace,
    task: str,
    make_config: Callable[..., TrainConfig],
    run: Callable,
    compare: Callable,
) -> None:
    given = dict(vars(args))
    del given["run"]
    if distributed.is_launched() and "compare" in given:
        raise UserError("--compare measures one process at a time: start it without torchrun")
    out, resume = given.pop("out", None), given.pop("resume", None)
    if not (out or resume) and "save_every" in given:
        raise UserError("--save-every needs --out")
    if given.pop("compare", False):
        excluded = {
            "--resume": resume,
            **{f"--{k}": k in given for k in ("optimizer", "attention")},
        }
        if any(excluded.values()):
            raise UserError(f"--compare can't be combined with {' or '.join(excluded)}")
        compare(make_config(**given), out)
    elif resume:
        run(read_config(resume, task, make_config, given), resume, resume=True)
    else:
        run(make_config(**given), out)
