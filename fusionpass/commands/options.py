"""What several commands' options have in common."""

import argparse
from typing import TYPE_CHECKING

from ..arch import Arch
from ..config import Config
from .load import Program, load

if TYPE_CHECKING:
    Commands = argparse._SubParsersAction[argparse.ArgumentParser]
else:
    Commands = object


def count(text: str) -> int:
    """A number of tokens: of one, shapes are not told from constants."""
    value = int(text)
    if value < 2:
        raise argparse.ArgumentTypeError(f"{value} is less than 2")
    return value


def add_model(parser: argparse.ArgumentParser, optional: bool = False) -> None:
    """Add what says which model, if any, and how it is traced."""
    parser.add_argument(
        "model",
        metavar="MODEL",
        nargs="?" if optional else None,
        help="a folder with a Hugging Face config.json, a saved torch.export program (.pt2), or module:factory, where "
        "factory() returns a model, or (model, args) or (model, args, kwargs)",
    )
    parser.add_argument("--target", metavar="ARCH", help="sm_90, gfx942, cpu, …; default: this machine's device")
    parser.add_argument("--tokens", type=count, default=16, help="tokens of input, where the factory gives none (16)")
    parser.add_argument("--scheme", help="quantise the linears first: fp8_token, mxfp8, int8_token, …")
    parser.add_argument(
        "--skip", action="append", metavar="MODULE", help="not to be quantised (lm_head if there is one)"
    )


def here() -> Arch:
    """The architecture of this machine's GPU, or of its CPU."""
    import torch

    return Arch.of(torch.device("cuda" if torch.cuda.is_available() else "cpu"))


def program(args: argparse.Namespace, *, weights: bool = False) -> tuple[Program, Config]:
    """The model that these options name, quantised as they say, and the options to explain it with."""
    found = load(args.model, args.tokens, weights=weights)
    if args.scheme:
        found.quantize(args.scheme, args.skip)
    target = Arch(args.target) if args.target else here()
    found.notes.insert(0, f"for {target.name}")
    return found, Config.make(None, {"target": target})
