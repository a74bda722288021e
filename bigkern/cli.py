"""The command line: bigkern info | train | evaluate | predict."""

import argparse
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

from bigkern import __version__
from bigkern.train import cnn
from bigkern.train.config import (
    DATA_SETS,
    LINEAR_LAYERS,
    OPTIMIZERS,
    CnnConfig,
    TrainConfig,
    read_config,
)
from bigkern.train.errors import UserError
from bigkern.train.predict import evaluate, predict


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

    tasks = commands.add_parser("train", help="train a reference model").add_subparsers(
        metavar="MODEL", required=True
    )
    # Only the options that were given show up, so that --resume knows what is to change.
    command = tasks.add_parser(
        "cnn", help="a CNN on handwritten digits", argument_default=argparse.SUPPRESS
    )
    add_train_options(command)
    add_cnn_options(command)
    command.set_defaults(run=train_cnn)

    command = commands.add_parser("evaluate", help="accuracy and scores per class of a run")
    command.add_argument("folder", type=Path, metavar="DIR", help="the run's --out")
    command.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    command.add_argument("--data-dir", metavar="DIR", help="where its MNIST files are now")
    command.set_defaults(run=lambda args: evaluate(args.folder, args.device, args.data_dir))

    command = commands.add_parser("predict", help="classify images with a run's model")
    command.add_argument("folder", type=Path, metavar="DIR", help="the run's --out")
    command.add_argument("images", type=Path, metavar="IMAGE", help="an image, or a folder of them")
    command.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    command.add_argument(
        "--invert", action="store_true", help="the digits are dark on a light ground"
    )
    command.set_defaults(
        run=lambda args: predict(args.folder, args.images, args.invert, args.device)
    )
    return parser


def add_train_options(parser: argparse.ArgumentParser) -> None:
    """The options of the training loop, and of the folder that a run is kept in."""

    def add(name: str, help: str, **how: Any) -> None:
        add_option(parser, TrainConfig, name, help, **how)

    add("epochs", "passes over the training set", type=int)
    add("batch_size", "examples per step, up to the full set", type=int)
    add("optimizer", "Adam from bigkern or from torch, or torch's SGD", choices=OPTIMIZERS)
    add("lr", "learning rate", type=float)
    add("momentum", "momentum of sgd", type=float)
    add("weight_decay", "L2 penalty", type=float)
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


def add_cnn_options(parser: argparse.ArgumentParser) -> None:
    def add(name: str, help: str, **how: Any) -> None:
        add_option(parser, CnnConfig, name, help, **how)

    add("data", "data set", choices=DATA_SETS)
    add("data_dir", "folder of mnist's four IDX files", metavar="DIR")
    add("download", "fetch mnist into --data-dir first", action="store_true")
    add("augment", "shift and rotate the training images at random", action="store_true")
    add("linear", "int8: INT8 products, forward and backward", choices=LINEAR_LAYERS)
    parser.add_argument(
        "--compare",
        action="store_true",
        help="train with bigkern's Adam and with torch's, and show both side by side",
    )


def add_option(
    parser: argparse.ArgumentParser, config: type[TrainConfig], name: str, help: str, **how: Any
) -> None:
    """Add the option of the field `name` of `config`, with its default in the help."""
    default = next(field.default for field in fields(config) if field.name == name)
    shown = "" if default is None or default is False else f" (default: {default})"
    parser.add_argument(f"--{name.replace('_', '-')}", help=help + shown, **how)


def print_info(args: argparse.Namespace) -> None:
    from bigkern.info import report

    print(report())


def train_cnn(args: argparse.Namespace) -> None:
    names = {field.name for field in fields(CnnConfig)}
    given = {name: value for name, value in vars(args).items() if name in names}
    out, resume = getattr(args, "out", None), getattr(args, "resume", None)
    if not (out or resume) and "save_every" in given:
        raise UserError("--save-every needs --out")
    if "compare" in args:
        if resume or "optimizer" in given:
            raise UserError("--compare can't be combined with --resume or --optimizer")
        cnn.compare(CnnConfig(**given), out)
    elif resume:
        cnn.run(read_config(resume, "cnn", CnnConfig, given), resume, resume=True)
    else:
        cnn.run(CnnConfig(**given), out)
